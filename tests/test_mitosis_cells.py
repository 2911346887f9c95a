from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_annotations import EOSINOPHIL, MITOSIS, SlideRunner, crops, midog

from conftest import ROOT
from data_prep.cut_cells import cut_cell
from data_prep.mitosis_cells import main, prepare
from ldm.data.cohort import read_index
from ldm.data.store_faults import check_store
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.images.slides import open_slide

NAME = "CMU-1-Small-Region.svs"
SIZE = (2220, 2967)  # of that slide


@pytest.fixture
def database(tmp_path, demo_slide) -> SlideRunner:
    """Two mitoses and three others on the demo slide, one of them at its corner and one outside."""
    database = SlideRunner(tmp_path / "cells.sqlite", [NAME])
    database.cell([(500, 700)], MITOSIS, [(1, MITOSIS), (2, MITOSIS)])
    database.cell([(1200, 300)], EOSINOPHIL, [(1, MITOSIS), (2, EOSINOPHIL)])
    database.cell([(2219, 2960)], MITOSIS, [(1, MITOSIS), (3, EOSINOPHIL)])
    database.cell([(3000, 100)], EOSINOPHIL, [(1, EOSINOPHIL)])
    database.cell([(800, 900)], 0, [(1, EOSINOPHIL), (2, MITOSIS)])
    return database


def tiles_at(cohort, name: str) -> dict[tuple[int, int], np.ndarray]:
    store = TileStore.open(cohort / "slides" / f"{name}.zarr")
    check_store(store.path)
    return {tuple(corner): store.tile(row) for row, corner in enumerate(store.coords.tolist())}


def test_cells_of_a_sliderunner_database(tmp_path, demo_slide, database):
    report = prepare(tmp_path / "out", sqlite=database.path, slides=demo_slide.parent)
    tiles = tiles_at(tmp_path / "out", "CMU-1-Small-Region")
    slide = open_slide(demo_slide)
    assert set(tiles) == {(468, 668), (1168, 268), (2187, 2928)}
    for x, y in [(468, 668), (1168, 268)]:
        assert np.array_equal(tiles[x, y], slide.read(x, y, 64, 64))
    index = read_index(tmp_path / "out").set_index(["x", "y"]).sort_index()
    assert index["score"].to_dict() == {(468, 668): 1.0, (1168, 268): 0.0, (2187, 2928): 1.0}
    assert index["class"].to_dict()[1168, 268] == "eosinophilic granulocyte"
    assert set(index["votes"]) == {2}
    assert set(index["patient"]) == {"CMU-1-Small-Region"}
    assert set(index["slide"]) == {NAME}
    assert "annotated: 5 cells: 2 Mitotic figure, 2 eosinophilic granulocyte, 1 undecided" in report
    assert "outside their slides, left out: 1, the first is CMU-1-Small-Region.svs at (3000, 100)" in report
    assert "mirror image: 1" in report
    assert "1 undecided cells have no hard label" in report
    attrs = TileStore.open(tmp_path / "out" / "slides" / "CMU-1-Small-Region.zarr").attrs
    assert attrs["score"] == {"positive": "Mitotic figure", "labels": "hard"}
    assert attrs["mpp"] == slide.mpp


def test_soft_scores_are_the_fraction_of_the_chosen_votes(tmp_path, demo_slide, database):
    given = {"sqlite": database.path, "slides": demo_slide.parent, "labels": "soft"}
    prepare(tmp_path / "all", **given)
    index = read_index(tmp_path / "all").set_index("x")
    assert index["score"].to_dict() == {468: 1.0, 1168: 0.5, 2187: 0.5, 768: 0.5}
    assert index["class"][768] == "undecided"
    prepare(tmp_path / "two", **given, annotators=["Ada", "Ben"])
    assert read_index(tmp_path / "two").set_index("x")["score"].to_dict() == {468: 1, 1168: 0.5, 2187: 1, 768: 0.5}
    with pytest.raises(UserError, match=r"3 of 4 cells have no votes.*\(500, 700\)"):
        prepare(tmp_path / "none", **given, annotators=["detector"])
    assert not (tmp_path / "none").exists()


def test_a_cell_at_the_edge_stays_in_the_middle(demo_slide):
    slide = open_slide(demo_slide)
    tile = cut_cell(slide, 2215, 10, 64)
    assert tile.shape == (64, 64, 3)
    inside = slide.read(2183, 0, 37, 42)
    assert np.array_equal(tile[22:, :37], inside)
    assert np.array_equal(tile[21, :37], inside[1])
    assert np.array_equal(tile[22:, 37], inside[:, -2])


def test_cells_at_another_resolution(tmp_path, demo_slide, database):
    slide = open_slide(demo_slide)
    given = {"sqlite": database.path, "slides": demo_slide.parent, "size": 32}
    prepare(tmp_path / "out", **given, mpp=slide.mpp * 2)
    tiles = tiles_at(tmp_path / "out", "CMU-1-Small-Region")
    expected = Image.fromarray(slide.read(468, 668, 64, 64)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(tiles[468, 668], expected)
    corner = tiles[2187, 2928]  # its lower half continues beyond the slide
    direct = Image.fromarray(slide.read(2187, 2928, 32, 38)).resize((16, 19), Image.Resampling.LANCZOS)
    assert np.abs(corner[:15, :14].astype(int) - np.asarray(direct)[:15, :14]).max() <= 1
    with pytest.raises(UserError, match="would be blown up"):
        prepare(tmp_path / "finer", **given, mpp=0.1)


def test_cells_of_a_midog_file(tmp_path, demo_slide):
    boxes = {(100, 100): 1, (400, 600): 2, (1000.5, 50): 2, (1300, 2000): 2}
    entries = [{"bbox": [x - 25, y - 25, x + 25, y + 25], "category_id": kind} for (x, y), kind in boxes.items()]
    file = midog(tmp_path / "MIDOG.json", [NAME], entries)
    given = ["--midog", str(file), "--images", str(demo_slide.parent), "--size", "50", "--out"]
    main([*given, str(tmp_path / "out")])
    tiles, slide = tiles_at(tmp_path / "out", "CMU-1-Small-Region"), open_slide(demo_slide)
    assert set(tiles) == {(75, 75), (375, 575), (976, 25), (1275, 1975)}
    for (x, y), tile in tiles.items():
        assert np.array_equal(tile, slide.read(x, y, 50, 50))
    index = read_index(tmp_path / "out")
    assert index.set_index("x")["score"].to_dict() == {75: 1.0, 375: 0.0, 976: 0.0, 1275: 0.0}
    assert set(index["domain"]) == {"canine lymphoma"}
    main([*given, str(tmp_path / "balanced"), "--balance"])
    chosen = read_index(tmp_path / "balanced")
    assert sorted(chosen["score"]) == [0, 1]
    main([*given, str(tmp_path / "again"), "--balance"])
    assert read_index(tmp_path / "again").equals(chosen)
    report = prepare(tmp_path / "one", midog=file, images=demo_slide.parent, classes=["Mitotic figure"])
    assert "cut: 1 cells: 1 mitotic figure" in report
    main([*given, str(tmp_path / "few"), "--negatives-per-slide", "2"])
    assert sorted(read_index(tmp_path / "few")["score"]) == [0, 0, 1]
    with pytest.raises(UserError, match="does not say whose votes"):
        main([*given, str(tmp_path / "x"), "--annotators", "Ada"])


def test_slides_that_are_not_there(tmp_path, demo_slide):
    entries = [
        {"bbox": [100, 100, 150, 150], "category_id": 1},
        {"bbox": [100, 100, 150, 150], "category_id": 2, "image_id": 2},
    ]
    file = midog(tmp_path / "MIDOG.json", [NAME, "002.tiff"], entries)
    with pytest.raises(UserError, match=r"1 of 2 annotated slides are not in .*: 002.tiff; --skip-missing"):
        prepare(tmp_path / "out", midog=file, images=demo_slide.parent)
    assert not (tmp_path / "out").exists()
    report = prepare(tmp_path / "out", midog=file, images=demo_slide.parent, skip_missing=True)
    assert "slides not found: 1: 002.tiff" in report
    assert "cut: 1 cells: 1 mitotic figure" in report
    entries[0]["bbox"] = [9000, 9000, 9050, 9050]
    lost = midog(tmp_path / "lost.json", [NAME], entries[:1])
    with pytest.raises(UserError, match=r"all 1 annotations lie outside .*\(9025, 9025\)"):
        prepare(tmp_path / "lost", midog=lost, images=demo_slide.parent)


def test_real_crops_and_their_experts(tmp_path):
    folder = ROOT / "data" / "samples" / "cells"
    votes = tmp_path / "votes.csv"
    votes.write_text((folder / "AtNorM-MD_expert_votes.csv").read_text() + "none.png" + 6 * ",Normal" + "\n")
    given = {"crops": folder, "votes": votes, "positive": "Atypical", "slide_mpp": 0.25, "validation": 0.2}
    report = prepare(tmp_path / "soft", **given, labels="soft")
    index = read_index(tmp_path / "soft")
    assert index["class"].value_counts().to_dict() == {"Normal": 24, "Atypical": 24}
    counts = {0.0: 18, 0.2: 6, 0.6: 9, 0.8: 9, 1.0: 6}
    assert index["score"].value_counts().to_dict() == counts
    assert index["score"].mean() == pytest.approx(0.4125)
    assert set(index["votes"]) == {5}
    assert set(index["patient"]) == {"unknown"}
    assert 0.15 < (index["split"] == "val").mean() < 0.25
    assert "1 rows of" in report
    assert "patients are unknown" in report
    store = TileStore.open(tmp_path / "soft" / "slides" / "cells.zarr")
    for row in (0, 30, 47):
        crop = np.asarray(Image.open(folder / index.set_index("row")["file"][row]).convert("RGB"))
        assert np.array_equal(store.tile(row), crop[32:96, 32:96])
    assert store.mpp == 0.25
    prepare(tmp_path / "hard", **given, balance=True)
    hard = read_index(tmp_path / "hard")
    assert hard["score"].value_counts().to_dict() == {1.0: 24, 0.0: 23}
    halves = hard.groupby("split")["score"].mean()
    assert halves.to_dict() == pytest.approx({"train": 0.5, "val": 0.5}, abs=0.02)


def test_splits_are_by_slide_never_by_cell(tmp_path, demo_slide):
    pixels = open_slide(demo_slide).read(0, 0, 128, 128)
    (tmp_path / "slides").mkdir()
    names = [f"{i:02}.png" for i in range(12)]
    for name in names:
        Image.fromarray(pixels).save(tmp_path / "slides" / name)
    entries = [
        {"bbox": [x, x, x + 50, x + 50], "category_id": 1 + x % 2, "image_id": i}
        for i in range(1, 13)
        for x in range(5, 25, 5)
    ]
    file = midog(tmp_path / "MIDOG.json", names, entries)
    given = {"midog": file, "images": tmp_path / "slides", "size": 16, "validation": 0.3, "test": 0.2}
    with pytest.raises(UserError, match="--slide-mpp"):
        prepare(tmp_path / "out", **given)
    prepare(tmp_path / "out", **given, slide_mpp=0.25)
    index = read_index(tmp_path / "out")
    assert len(index) == 48
    assert (index.groupby("slide")["split"].nunique() == 1).all()
    assert set(index["split"]) == {"train", "val", "test"}


def test_crops_mistakes(tmp_path):
    folder = crops(tmp_path / "crops", ["No/1.png", "No/2.png", "Yes/3.png"])
    with pytest.raises(UserError, match=r"1.png is 24 x 20 px, and a cell of 32 px takes 32"):
        prepare(tmp_path / "out", crops=folder, positive="Yes", size=32)
    with pytest.raises(UserError, match=r"3 of 3 cells have no votes.*No/1.png"):
        prepare(tmp_path / "out", crops=folder, positive="Yes", size=16, labels="soft")
    with pytest.raises(UserError, match=r"no cell is called 'mitotic figure', which --positive names.*Known: No, Yes"):
        prepare(tmp_path / "out", crops=folder, size=16)
    with pytest.raises(UserError, match="give it by --slide-mpp"):
        prepare(tmp_path / "out", crops=folder, positive="Yes", size=16, mpp=0.5)
    with pytest.raises(UserError, match="got none"):
        prepare(tmp_path / "out")
    with pytest.raises(UserError, match="--slides goes with --sqlite, not with --crops"):
        prepare(tmp_path / "out", crops=folder, slides=folder)
    with pytest.raises(UserError, match="--midog needs --images"):
        prepare(tmp_path / "out", midog=folder)
    assert not (tmp_path / "out").exists()
    report = prepare(tmp_path / "out", crops=folder, positive="Yes", size=16)
    assert "cut: 3 cells: 2 No, 1 Yes" in report
    assert json.loads(read_index(tmp_path / "out")["score"].to_json(orient="values")) == [0, 0, 1]
    with pytest.raises(UserError, match="made with other settings"):
        prepare(tmp_path / "out", crops=folder, positive="No", size=16)


def test_a_stopped_run_goes_on(tmp_path, demo_slide, database, monkeypatch):
    import data_prep.mitosis_cells as module

    whole = prepare(tmp_path / "whole", sqlite=database.path, slides=demo_slide.parent)
    monkeypatch.setattr(module, "merge_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", sqlite=database.path, slides=demo_slide.parent)
    monkeypatch.undo()
    assert prepare(tmp_path / "out", sqlite=database.path, slides=demo_slide.parent) == whole
    pd.testing.assert_frame_equal(read_index(tmp_path / "out"), read_index(tmp_path / "whole"))


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_no_positive_cell_is_said(tmp_path, labels):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "s.png")
    cell = {"image_id": 1, "bbox": [10, 10, 30, 30], "category_id": 2, "labels": [1, 2, 2]}
    names = [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "other"}]
    content = {"images": [{"id": 1, "file_name": "s.png"}], "annotations": [cell], "categories": names}
    (tmp_path / "m.json").write_text(json.dumps(content))
    options = {"midog": tmp_path / "m.json", "images": tmp_path, "slide_mpp": 0.25, "size": 16, "labels": labels}
    with pytest.raises(UserError, match=r"none is 'mitotic figure' with a score of 0\.5 or above"):
        prepare(tmp_path / "out", balance=True, **options)


def test_a_broken_crop_is_named(tmp_path):
    crops(tmp_path / "crops", ["Yes/1.png", "No/2.png"])
    (tmp_path / "crops" / "bad.png").write_text("no image")
    with pytest.raises(UserError, match=r"bad.png holds text, not an image"):
        prepare(tmp_path / "out", crops=tmp_path / "crops", positive="Yes", size=16)
