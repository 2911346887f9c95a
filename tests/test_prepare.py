"""A cohort by one command: the same bytes by any number of processes; what fails is told, kept and tried again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from data_prep.engine import DONE, FAILED, Outcome
from data_prep.prepare import main, prepare
from data_prep.run_record import RunRecord
from ldm.data.cohort import read_index
from ldm.data.store_faults import check_store
from ldm.data.tile_store import TileStore, open_cohort
from ldm.errors import UserError, run_command

MODELS = ROOT / "data" / "models"


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, demo_slide: Path) -> Path:
    """Six small slides of real tissue, and a table of them."""
    import openslide

    folder = tmp_path_factory.mktemp("source") / "slides"
    folder.mkdir()
    slide = openslide.OpenSlide(str(demo_slide))
    for i in range(6):
        region = slide.read_region((600 + 40 * i, 1900), 0, (320, 256)).convert("RGB")
        Image.fromarray(np.asarray(region)).save(folder / f"s{i}.png")
    rows = "".join(f"slides/s{i}.png,0.499,P{i},{'he' if i % 2 else 'ki67'}\n" for i in range(6))
    (folder.parent / "cohort.csv").write_text("path,mpp,patient,stain\n" + rows)
    return folder.parent / "cohort.csv"


def words(slides: Path, out: Path, *more: str) -> list[str]:
    given = ["--slides", str(slides), "--out", str(out), "--tile-size", "64", "--validation", "0.3"]
    models = ["--encoder", str(MODELS / "demo-encoder"), "--any-mpp", "--first-stage", str(MODELS / "demo-ssl")]
    return [*given, *models, "--batch-size", "8", *more]


def bytes_of(cohort: Path) -> dict[str, str]:
    """Digest of each file, but for what tells of the run."""
    files = (path for path in cohort.rglob("*") if path.is_file() and "runs" not in path.parts)
    kept = {path.relative_to(cohort).as_posix(): path for path in files if path.name != "summary.html"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kept.items()}


@pytest.fixture(scope="module")
def prepared(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("here") / "cohort"
    main(words(slides, out))
    return out


def test_one_command_makes_tiles_features_latents_and_checks(prepared, slides):
    stores = open_cohort(prepared)
    assert [store.slide for store in stores] == [f"s{i}.png" for i in range(6)]
    for store in stores:
        assert store.feature_names == ["demo-encoder"]
        assert store.latent_names == ["demo-ssl"]
        check_store(store.path)
    index = read_index(prepared)
    assert len(index) == sum(map(len, stores))
    assert set(index.groupby("slide")["stain"].first()) == {"he", "ki67"}
    assert set(index["patient"]) == {f"P{i}" for i in range(6)}
    (run,) = (prepared / "runs").glob("*.json")
    told = json.loads(run.read_text())
    assert told["settings"]["tiling"]["tile_size"] == 64
    assert told["tiles"] == len(index)
    assert {each["stage"] for each in told["outcomes"]} == {"tiles", "features", "latents", "check"}
    assert all(each["state"] == "done" for each in told["outcomes"])
    page = (prepared / "summary.html").read_text()
    assert "s3.png" in page
    assert "min of features" in page


@pytest.mark.slow
def test_other_processes_make_the_same_bytes(prepared, slides, tmp_path):
    pytest.importorskip("distributed")
    main(words(slides, tmp_path / "cohort", "--workers", "2", "--cache", str(tmp_path / "near")))
    assert bytes_of(tmp_path / "cohort") == bytes_of(prepared)
    assert not any((tmp_path / "near").iterdir())


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(slides, tmp_path, capsys):
    out, folder = tmp_path / "cohort", tmp_path / "slides"
    folder.mkdir()
    for i in range(2):
        (folder / f"s{i}.png").write_bytes((slides.parent / "slides" / f"s{i}.png").read_bytes())
    (folder / "s9.png").write_text("no image")
    asked = ["--slides", str(folder), "--out", str(out), "--tile-size", "64", "--slide-mpp", "0.499"]
    assert run_command(lambda: main(asked)) == 2
    told = capsys.readouterr()
    assert "1 slide failed; the same command tries them again:\n  s9.png, tiles: " in told.err
    assert "tiles: 2 done, 1 failed" in told.out
    before = bytes_of(out)
    (folder / "s9.png").write_bytes((slides.parent / "slides" / "s5.png").read_bytes())
    main(asked)
    assert "tiles: 1 done, 2 done before" in capsys.readouterr().out
    stores = {name: digest for name, digest in before.items() if name.startswith("slides")}
    assert len(stores) > 10
    assert stores.items() <= bytes_of(out).items()
    assert len(list((out / "runs").glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tile-size", "32"], r"was made with tile_size 64, and tile_size 32 is asked for now"),
        (["--min-tissue", "0.5"], r"was made with min_tissue 0.25, and min_tissue 0.5 is asked for"),
        (["--validation", "0.6"], r"were split with --validation 0.3, and --validation 0.6 is asked for"),
        (["--encoder", "unii"], "unii"),
        (["--first-stage", "nowhere"], "nowhere"),
    ],
)
def test_other_settings_than_those_of_the_cohort_are_refused_before_any_work(prepared, slides, more, message):
    before = bytes_of(prepared)
    with pytest.raises(UserError, match=message):
        main([*words(slides, prepared), *more])
    assert bytes_of(prepared) == before


def test_the_page_of_very_many_slides_shows_as_many_as_a_browser_can_and_failed_ones_first(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.run_record.ROWS", 3)
    record = RunRecord(tmp_path, [{"path": f"s{i}.png", "mpp": None} for i in range(5)], {})
    for i in range(5):
        record.add(Outcome(f"s{i}.png", "tiles", FAILED if i == 4 else DONE, facts={"tiles": i}))
    record.write()
    page = (tmp_path / "summary.html").read_text()
    assert [f"s{i}.png" in page for i in range(5)] == [True, True, False, False, True]
    assert "Of 5 slides 3, failed ones first; the other 2 are in runs/ alone." in page
    (run,) = (tmp_path / "runs").iterdir()
    told = json.loads(run.read_text())
    assert told["slides"][0] == {"path": "s0.png"}
    assert told["outcomes"][3] == {
        "slide": "s3.png",
        "stage": "tiles",
        "state": "done",
        "seconds": 0.0,
        "facts": {"tiles": 3},
    }


def test_from_python(slides, tmp_path):
    record = prepare([slides], tmp_path / "cohort", tiling={"tile_size": 64, "min_tissue": 0.5})
    assert record.tiles == sum(len(TileStore.open(path)) for path in (tmp_path / "cohort" / "slides").iterdir())
    assert not record.failed()


def test_locks_of_a_machine_that_crashed(slides, tmp_path, capsys):
    slide = slides.parent / "slides" / "s0.png"
    asked = ["--slides", str(slide), "--out", str(tmp_path / "cohort"), "--tile-size", "64"]
    store = tmp_path / "cohort" / "slides" / "s0.zarr"
    store.mkdir(parents=True)
    (store / ".lock-tiles").write_text('{"pid": 1, "host": "node7", "boot": "another"}')
    main([*asked, "--slide-mpp", "0.499", "--clear-dead-locks"])
    assert ".lock-tiles is of a process that does not run any more; removed" in capsys.readouterr().err
    assert len(TileStore.open(store)) > 10
