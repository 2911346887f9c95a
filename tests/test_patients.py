"""One rule of patients for every command: slides of one never fall apart, and what is corrected moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT
from data_prep import import_captions, tile_slides
from ldm.data.cohort import merge_index, read_index
from ldm.data.conditions import index_rows
from ldm.data.splits import split_of
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.tables.patients import patients_of, perhaps_shared


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    return np.asarray(Image.open(ROOT / "data/samples/cancers/TCGA-CR-7395_1600,2400.png"))[:64, :64]


@pytest.fixture
def slides(tmp_path: Path, tissue: np.ndarray) -> Path:
    """Two slides, A and B, of each of ten patients."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for patient in range(10):
        for part in "AB":
            Image.fromarray(tissue).save(folder / f"P{patient:02}-{part}_HE.png")
    return folder


def tiled(slides: Path, *options: str) -> pd.DataFrame:
    """The index of slides cut into tiles of 32 px."""
    out = slides.parent / "cohort"
    tile_slides.main(["--slides", str(slides), "--slide-mpp", "0.5", "--tile-size", "32", "--out", str(out), *options])
    return read_index(out)


def apart(index: pd.DataFrame) -> list[str]:
    """Patients P00, P01, ... whose slides are in several splits."""
    splits = index.groupby(index["slide"].str[:3])["split"].nunique()
    return splits[splits > 1].index.tolist()


def test_two_slides_of_a_patient_fall_apart_only_with_a_note(slides, capsys):
    index = tiled(slides, "--validation", "0.3")
    assert apart(index)  # each file counts as a patient
    assert "P00-A_HE.png and P00-B_HE.png begin alike and count as patients of their own" in capsys.readouterr().err
    assert index["patient"].nunique() == 20


def test_a_patient_option_keeps_them_together(slides, capsys):
    index = tiled(slides, "--validation", "0.3", "--patient", r"^P\d+")
    assert not apart(index)
    assert set(index["patient"]) == {f"P{i:02}" for i in range(10)}
    assert all(split == split_of(patient, 0.3, 0.0) for patient, split in zip(index["patient"], index["split"]))
    told = capsys.readouterr()
    assert "begin alike" not in told.err
    assert "of 10 patients" in told.out or "validation" not in told.out


def test_patients_that_are_corrected_later_move_their_slides(slides, capsys):
    before = tiled(slides, "--validation", "0.3")
    capsys.readouterr()
    after = tiled(slides, "--validation", "0.3", "--patient", r"^P\d+")
    assert not apart(after)
    assert set(after["patient"]) == {f"P{i:02}" for i in range(10)}
    assert "patients were in several splits: their tiles" in capsys.readouterr().err
    held = before[before["split"] != "train"]["slide"].str[:3]
    assert set(after[after["split"] == "train"]["slide"].str[:3]).isdisjoint(held)  # nobody goes into training


@pytest.mark.parametrize("later", ["tile_slides", "merge_index"])
def test_a_corrected_column_of_the_index_is_followed(slides, later, capsys):
    index = tiled(slides, "--validation", "0.3")
    cohort = slides.parent / "cohort"
    index["patient"] = index["slide"].str[:3]
    index.to_parquet(cohort / "index.parquet")
    assert apart(index)
    capsys.readouterr()
    index_rows(TileStore.open(cohort / "slides" / "P00-A_HE.zarr"))  # whoever trains with it is told
    assert "have slides in several splits, as P0" in capsys.readouterr().err
    if later == "tile_slides":
        index = tiled(slides, "--validation", "0.3")
    else:
        merge_index(cohort, index[["slide", "row"]].assign(grade=1))
        index = read_index(cohort)
    assert not apart(index)
    assert "are now together in val or test" in capsys.readouterr().err


def test_fractions_of_a_second_run_are_not_ignored_silently(slides, capsys):
    tiled(slides, "--validation", "0.2", "--patient", r"^P\d+")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"were split with --validation 0\.2, and --validation 0\.9 is asked for"):
        tiled(slides, "--validation", "0.9", "--patient", r"^P\d+")
    (slides.parent / "cohort" / "splits.json").unlink()  # as a cohort of before, which does not say it
    tiled(slides, "--validation", "0.9", "--patient", r"^P\d+")
    assert "keeps the splits of its patients" in capsys.readouterr().err


def test_a_table_names_the_patients(slides):
    lines = [f"P{i:02}-{part}_HE\tcase {i // 2}" for i in range(10) for part in "AB"]
    (slides.parent / "patients.tsv").write_text("\n".join(["file\tpatient", *lines]))
    index = tiled(slides, "--patient", str(slides.parent / "patients.tsv"))
    assert set(index["patient"]) == {f"case {i}" for i in range(5)}
    assert index[index["slide"] == "P03-A_HE.png"]["patient"].unique().tolist() == ["case 1"]


def test_rules_that_name_nobody(tmp_path):
    for rule, columns, message in (
        (r"\d+x", (), r"--patient '\\d\+x' finds no patient in 'P00-A'. It is no file either"),
        ("(", (), "is no regular expression"),
        ("patien", ("patient", "stage"), "finds no patient in 'P00-A'. It is no file, and no column; did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            patients_of(["P00-A"], rule, columns)
    (tmp_path / "t.csv").write_text("slide,patient\nP00-A,x\nP00-A,y\n")
    with pytest.raises(UserError, match="gives P00-A two patients"):
        patients_of(["P00-A"], str(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_text("slide,patient\nP00-A,x\nP00-B,'--\n")
    with pytest.raises(UserError, match="says nothing of 1 of 2 names, as P00-B"):
        patients_of(["P00-A.png", "P00-B"], str(tmp_path / "t.csv"))


def test_names_that_begin_alike():
    assert perhaps_shared({name: name for name in ("2024-01-01_a", "2024-02-02_b")}) == []  # all of them begin so
    assert perhaps_shared({"TCGA-AA-0001-01Z.svs": "TCGA-AA-0001", "TCGA-AA-0002-01Z.svs": "TCGA-AA-0002"}) == []
    assert perhaps_shared({"1.svs": "1", "2.svs": "2"}) == []


def test_captions_take_the_same_rule(slides, capsys):
    lines = [f"{path.name},tissue {path.stem}" for path in sorted(slides.iterdir())]
    (slides / "captions.csv").write_text("\n".join(["path,text", *lines]))
    given = ["--table", str(slides / "captions.csv"), "--size", "32", "--validation", "0.3"]
    import_captions.main([*given, "--out", str(slides.parent / "c"), "--patient", r"^P\d+"])
    index = read_index(slides.parent / "c")
    assert set(index["patient"]) == {f"P{i:02}" for i in range(10)}
    assert index.groupby("patient")["split"].nunique().max() == 1
