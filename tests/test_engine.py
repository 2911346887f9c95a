"""Tasks of slides: in this process and by Dask alike, with workers that die, slides that fail, and others at work."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from data_prep.engine import (
    AHEAD,
    BUSY,
    DONE,
    FAILED,
    KEPT,
    LEFT_OUT,
    Task,
    attempt,
    dask_client,
    run_by,
    run_here,
    slurm_settings,
)
from ldm.errors import UserError, note
from ldm.locks import Held


def write(path: Path, text: str) -> dict:
    path.write_text(text)
    note("written")
    return {"bytes": len(text)}


def refuse() -> dict:
    raise UserError("no tissue")


def break_down() -> dict:
    return {}["nothing"]


def be_busy() -> dict:
    raise Held("another run is at work")


def die_once(mark: Path) -> dict:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def die() -> dict:
    os.kill(os.getpid(), signal.SIGKILL)


def cohort(folder: Path) -> list[Task]:
    """Slides that go well, are refused, break down and are busy, each with two stages."""
    tasks = [
        Task("a", "tiles", write, {"path": folder / "a", "text": "tiles"}),
        Task("b", "tiles", refuse, {}),
        Task("c", "tiles", break_down, {}),
        Task("d", "tiles", be_busy, {}),
        Task("e", "tiles", dict, {"state": KEPT, "tiles": 2}),
    ]
    return [
        each
        for task in tasks
        for each in (
            task,
            Task(task.slide, "features", write, {"path": folder / f"{task.slide}2", "text": "f"}, ("tiles",)),
        )
    ]


def check_cohort(outcomes: list, folder: Path) -> None:
    found = {(each.slide, each.stage): each for each in outcomes}
    assert len(found) == len(outcomes) == 10
    states = {place: each.state for place, each in found.items()}
    assert [states[slide, "tiles"] for slide in "abcde"] == [DONE, FAILED, FAILED, BUSY, KEPT]
    assert [states[slide, "features"] for slide in "abcde"] == [DONE, LEFT_OUT, LEFT_OUT, BUSY, DONE]
    assert found["a", "tiles"].facts == {"bytes": 5}
    assert found["a", "tiles"].notes == ["written"]
    assert found["b", "tiles"].reason == "no tissue"
    assert not found["b", "tiles"].trace
    assert found["c", "tiles"].reason == "KeyError: 'nothing'"
    assert "break_down" in found["c", "tiles"].trace
    assert sorted(path.name for path in folder.iterdir()) == ["a", "a2", "e2"]


def test_a_slide_that_fails_stops_its_own_stages_alone(tmp_path):
    check_cohort(list(run_here(cohort(tmp_path))), tmp_path)


def test_copies_are_made_one_slide_ahead(tmp_path):
    tasks = []
    for name in "abc":
        tasks.append(Task(name, AHEAD, write, {"path": tmp_path / name, "text": ""}))
        tasks.append(Task(name, "tiles", dict, {}, (AHEAD,)))
    seen = []
    for outcome in run_here(tasks):
        seen.append((outcome.slide, outcome.stage))
        if seen[-1] == ("a", "tiles"):
            assert not (tmp_path / "c").exists()
    assert seen == [(name, stage) for name in "abc" for stage in (AHEAD, "tiles")]


@pytest.mark.slow
def test_dask_does_the_same_and_survives_the_death_of_workers(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("data_prep.engine.IN_FLIGHT", 2)
    with dask_client(workers=2) as client:
        known = [(outcome, len(client.futures)) for outcome in run_by(client, cohort(tmp_path / "out"))]
        check_cohort([outcome for outcome, _ in known], tmp_path / "out")
        assert max(count for _, count in known) <= 4  # of ten tasks: two slides of two stages
        tasks = [Task("a", "tiles", die_once, {"mark": tmp_path / "died"}), Task("b", "tiles", dict, {})]
        assert {each.slide: each.state for each in run_by(client, tasks)} == {"a": DONE, "b": DONE}
        assert (tmp_path / "died").exists()
        (lost,) = run_by(client, [Task("a", "tiles", die, {})])
    assert lost.state == FAILED
    assert "its worker died each time" in lost.reason


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"workers": 2, "scheduler": "tcp://localhost:1"}, "--workers and --scheduler each say where the work runs"),
        ({"scheduler": "nowhere.json"}, "there is no nowhere.json"),
    ],
)
def test_places_that_are_none(asked, message):
    pytest.importorskip("distributed")
    with pytest.raises(UserError, match=message), dask_client(**asked):
        pass


def test_without_a_place_the_work_is_done_here():
    with dask_client() as client:
        assert client is None


def test_jobs_of_slurm():
    jobqueue = pytest.importorskip("dask_jobqueue")
    jobs, settings = slurm_settings("jobs=8,partition=gpu,cores=4,memory=16GB,walltime=04:00:00,gpus=1,account=lab")
    assert jobs == 8
    with jobqueue.SLURMCluster(**settings) as cluster:
        script = cluster.job_script()
    for line in ("#SBATCH -p gpu", "#SBATCH -A lab", "#SBATCH -t 04:00:00", "#SBATCH --gres=gpu:1"):
        assert line in script
    assert '--resources "WORK=1 FETCH=1 GPU=1"' in script


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitions=gpu", "--slurm 'partitions=gpu' is not known; did you mean 'partition'"),
        ("gpu", "--slurm 'gpu' is not known"),
        ("jobs=many", "--slurm jobs is a whole number; got 'many'"),
    ],
)
def test_jobs_that_slurm_does_not_know(text, message):
    with pytest.raises(UserError, match=message):
        slurm_settings(text)


def test_an_outcome_tells_how_long_it_took():
    assert attempt(Task("a", "tiles", dict, {})).seconds >= 0
