"""Each command that writes, killed, with a full disk and twice at once; `python -m benchmarks.kills` does more."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from scripts import MODULES

from benchmarks.kills import CASES, Server, Stop, Trials, can_mount, workplace
from benchmarks.kills_stages import STAGES, VICTIMS, StageTrials
from ldm.cli import app


@pytest.fixture(scope="module")
def places() -> Iterator[tuple[Server, Path, Path]]:
    with workplace() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_command_that_was_stopped_and_raced_leaves_what_an_undisturbed_one_leaves(places, name: str):
    rng = random.Random(name)
    trials = Trials(*places, name)
    first, second, third = trials.spread(3, rng)
    trials.stopped(Stop(first), Stop(second, full=True), Stop(third), raced=True)
    if can_mount() and trials.seconds < 1:
        trials.small_disk(rng.uniform(0.2, 0.8))


def test_every_command_that_writes_is_tried():
    reading = {"describe", "doctor", "view"}
    trained = {"train"}  # of which tests/test_main.py sees that it resumes exactly
    tried = {case.words.split()[0] for case in CASES.values()}
    scripts = {module for module in MODULES if module.startswith("data_prep")}
    assert tried == {*typer.main.get_command(app).commands, *scripts} - reading - trained


@pytest.mark.slow
def test_a_cohort_is_the_same_whatever_is_killed_in_whatever_stage(places):
    pytest.importorskip("distributed")
    with StageTrials(*places, "scheduler", slides=2) as trials:
        for i, stage in enumerate(STAGES):
            trials.killed(stage, random.Random(i), VICTIMS[i % 3])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_cohort_is_the_same_by_any_number_of_workers_and_by_two_commands_at_once(places, workers: int):
    pytest.importorskip("distributed")
    with StageTrials(*places, "scheduler" if workers else "alone", slides=2, workers=workers) as trials:
        trials.measure("tiles")
        trials.at_once(0.1 * workers)


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="mounts file systems, as root may")
def test_a_cohort_on_a_full_disk_and_on_one_that_cannot_be_written(places):
    pytest.importorskip("distributed")
    with StageTrials(*places, "scheduler", slides=2) as trials:
        trials.starved(0.4)
        trials.locked()
