"""Tables of slides: what they say of each slide holds, and what they get wrong is one message."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_prep.slide_table import read_slides
from data_prep.tile_slides import main
from ldm.data.cohort import read_index
from ldm.data.tile_store import TileStore
from ldm.errors import UserError


@pytest.fixture
def slides(tmp_path: Path, demo_slide: Path) -> Path:
    """Three small slides in a folder of their own: a, b and c."""
    folder = tmp_path / "slides"
    folder.mkdir()
    import openslide

    pixels = np.asarray(openslide.OpenSlide(str(demo_slide)).read_region((300, 900), 0, (600, 600)).convert("RGB"))
    for name in "abc":
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def table(slides: Path, text: str) -> Path:
    path = slides.parent / "cohort.csv"
    path.write_text(text)
    return path


def run(given: Path, out: Path, *more: str) -> None:
    main(["--slides", str(given), "--out", str(out), "--tile-size", "64", *more])


def test_a_table_says_scale_patient_split_and_labels(slides, tmp_path, capsys):
    rows = "wsi,mpp,patient,split,stain,exclude\n"
    rows += "slides/a.png,0.5,P1,train,he,\nslides/b.png,0.25,P2,val,ki67,no\n"
    rows += "slides/c.png,0.5,P3,train,he,out of focus\n"
    out = tmp_path / "cohort"
    run(table(slides, rows), out)
    index = read_index(out).drop_duplicates("slide").set_index("slide")
    assert index[["patient", "split", "stain"]].to_dict("index") == {
        "a.png": {"patient": "P1", "split": "train", "stain": "he"},
        "b.png": {"patient": "P2", "split": "val", "stain": "ki67"},
    }
    assert [TileStore.open(out / "slides" / f"{name}.zarr").mpp for name in "ab"] == [0.5, 0.25]
    assert "c.png: out of focus" in capsys.readouterr().err


def test_a_changed_table_moves_splits_aloud(slides, tmp_path, capsys):
    rows = "path,mpp,patient,split\nslides/a.png,0.5,P1,{}\nslides/b.png,0.5,P2,val\n"
    run(table(slides, rows.format("train")), tmp_path / "cohort")
    run(table(slides, rows.format("test")), tmp_path / "cohort")
    index = read_index(tmp_path / "cohort")
    assert set(index.loc[index["slide"] == "a.png", "split"]) == {"test"}
    assert "a.png (train -> test)" in capsys.readouterr().err


def test_the_scale_of_a_table_holds_aloud(slides, tmp_path, demo_slide, capsys):
    shutil.copy(demo_slide, slides / "d.svs")
    run(table(slides, "path,mpp\nslides/d.svs,0.998\n"), tmp_path / "cohort", "--min-tissue", "0.9")
    store = TileStore.open(tmp_path / "cohort" / "slides" / "d.zarr")
    assert store.mpp == 0.998
    assert store.attrs["mpp_source"] == "given by hand"
    assert "says 0.499 um per pixel; the 0.998 given for it holds" in capsys.readouterr().out


def test_folders_patterns_and_tables_together(slides):
    own = table(slides, "path,stain\nslides/a.png,he\n")
    found = read_slides([own, f"{slides}/[bc].png"])
    assert [(each.path.name, dict(each.labels)) for each in found] == [
        ("b.png", {}), ("c.png", {}), ("a.png", {"stain": "he"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("name,x\na,1\n", "has no column of slides; call it path"),
        ("path\nslides/a.png\nslides/z.png\n", "names 1 files that are not there.*z.png"),
        ("path\nslides/a.png\nslides/a.png\n", "listed twice"),
        ("path,mpp\nslides/a.png,forty\n", "'forty' in the column mpp is no number"),
        ("path,mpp\nslides/a.png,-1\n", "a.png has mpp -1"),
        ("path,min_tissue\nslides/a.png,30\n", "min_tissue 30; it is a fraction"),
        ("path,split\nslides/a.png,training\n", "split 'training'; splits are train, val, test, none"),
        ("path,roi\nslides/a.png,a.geojson\n", "a.geojson"),
        ("path,exclude\nslides/a.png,yes\n", "leaves out all of its 1 slides"),
        ("path,patient,split\nslides/a.png,P,train\nslides/b.png,P,val\n", "patient P is in split 'train' by a.png"),
    ],
)
def test_what_a_table_gets_wrong(slides, rows, message):
    with pytest.raises(UserError, match=message):
        read_slides([table(slides, rows)])


def test_all_files_that_lie_elsewhere_are_named_in_one_message(slides):
    lines = ["path,roi", "slides/a.png,", "../p/x.png,/q/regions.geojson", "../p/y.png,"]
    with pytest.raises(UserError) as refused:
        read_slides([table(slides, "\n".join(lines))])
    assert "names 3 files outside of the folder" in str(refused.value)
    assert str(refused.value).endswith(f"--files-in /q --files-in {slides.parent.parent / 'p'}")


def test_a_slide_without_micrometres_is_told_of_the_column(slides, tmp_path):
    with pytest.raises(UserError, match=r"does not say how many micrometres a pixel has; .* the column mpp in a table"):
        run(table(slides, "path\nslides/a.png\n"), tmp_path / "cohort")


def test_a_pattern_without_files(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        read_slides([tmp_path / "*.svs"])


def test_other_fractions_than_those_of_the_cohort_are_refused(slides, tmp_path, capsys):
    out = tmp_path / "cohort"
    run(slides, out, "--slide-mpp", "0.5", "--validation", "0.4", "--test", "0.2")
    before = read_index(out)
    with pytest.raises(UserError, match=r"were split with --test 0\.2, and --test 0\.5 is asked for"):
        run(slides, out, "--slide-mpp", "0.5", "--test", "0.5")
    run(slides, out, "--slide-mpp", "0.5")  # none asked for: those of the cohort
    pd.testing.assert_frame_equal(read_index(out), before)
