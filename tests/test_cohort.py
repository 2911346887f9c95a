"""Cohorts of any images: stores, the table of tiles, and the conditions that tiles carry."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import default_collate

from ldm.data import dihedral
from ldm.data.balance import Balanced
from ldm.data.cohort import merge_index, read_index, write_store
from ldm.data.datasets import TileDataset
from ldm.data.splits import choose_splits, split_of, tell_validation
from ldm.data.store_writers import ArrayWriter
from ldm.errors import UserError

TILES = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)


def make(cohort, name: str, **index) -> None:
    write_store(cohort, name, lambda i: TILES[i], 6, attrs={"tile_size": 16, "mpp": 0.5})
    merge_index(cohort, pd.DataFrame({"slide": name, "row": range(6), **index}))


@pytest.fixture
def cohort(tmp_path):
    make(tmp_path, "a", **{"class": list("xxxxxy"), "score": np.linspace(0, 1, 6), "sample": "S1"})
    make(tmp_path, "b", **{"class": list("xxxxxx"), "score": 0.5, "sample": "S2", "split": "val"})
    (tmp_path / "omics").mkdir()
    table = pd.DataFrame([[0, 1, np.nan], [1, 0, 0]], index=["S2", "S1"], columns=["TP53", "EGFR", "KRAS"])
    table.to_parquet(tmp_path / "omics" / "mutation.parquet")
    (tmp_path / "omics" / "mutation.json").write_text(json.dumps({"unit": "calls"}))
    return tmp_path


@pytest.mark.slow
def test_an_interrupted_store_goes_on_without_asking_for_its_tiles_again(tmp_path):
    asked = []

    def image(i):
        asked.append(i)
        if i == 130 and asked.count(130) == 1:
            raise KeyboardInterrupt
        return TILES[i % 6]

    def write():
        return write_store(tmp_path, "big", image, 1100, attrs={"tile_size": 16})

    with pytest.raises(KeyboardInterrupt):
        write()
    store = write()
    assert len(store) == 1100
    assert asked.count(0) + asked.count(1050) <= 3  # nothing but the open shard is asked for twice
    np.testing.assert_array_equal(store.tile(1099), TILES[1099 % 6])
    assert store.mpp is None
    with pytest.raises(UserError, match="other settings"):
        write_store(tmp_path, "big", image, 1100, attrs={"tile_size": 16, "licence": "CC0"})


def test_the_table_gains_columns_and_rows_and_keeps_the_others(cohort):
    merge_index(cohort, pd.DataFrame({"slide": ["a", "b"], "row": [1, 5], "text": ["one", "two"], "score": [0.9, 0.8]}))
    index = read_index(cohort).set_index(["slide", "row"])
    assert len(index) == 12
    assert index.loc[("a", 1), ["text", "score", "class"]].tolist() == ["one", 0.9, "x"]
    assert index.loc[("a", 2), "score"] == 0.4
    assert index["text"].notna().sum() == 2
    assert index["split"].groupby("slide").first().to_dict() == {"a": "train", "b": "val"}
    assert index["patient"].unique().tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"slide": ["a", "a"], "row": [1, 1]}, "listed twice"),
        ({"slide": ["c"], "row": [0]}, "no finished store of the slide 'c'"),
        ({"slide": ["a"], "row": [6]}, "has 6 tiles"),
        ({"slide": ["a"]}, "lacks row"),
    ],
)
def test_a_table_that_does_not_fit_is_one_message(cohort, table, message):
    with pytest.raises(UserError, match=message):
        merge_index(cohort, pd.DataFrame(table))


def test_tiles_carry_their_conditions(cohort):
    with ArrayWriter(cohort / "slides" / "a.zarr", "features/f", (4,), "f4", {"encoder": "e"}) as writer:
        writer.append(np.arange(24).reshape(6, 4))
    sources = {"class": "class", "score": "score", "mutation": "omics/mutation", "region": "features/f"}
    data = TileDataset(str(cohort / "slides" / "a.zarr"), conditions=sources, gray=True, in_memory=True)
    batch = default_collate([data[2], data[5]])
    assert batch["class"] == ["x", "y"]
    torch.testing.assert_close(batch["score"], torch.tensor([0.4, 1.0]))
    torch.testing.assert_close(batch["mutation"], torch.tensor([[1.0, 0, 0], [1, 0, 0]]))
    torch.testing.assert_close(batch["region"][1], torch.arange(20.0, 24.0))
    assert batch["image"].shape == (2, 1, 16, 16)
    np.testing.assert_allclose(batch["image"][0, 0], TILES[2].mean(-1) / 127.5 - 1, atol=1e-6)
    about = data.metadata["conditions"]
    assert about["class"] == {"source": "class", "names": ["x", "y"]}
    assert about["mutation"] == {"source": "omics/mutation", "unit": "calls", "genes": ["TP53", "EGFR", "KRAS"]}
    assert about["region"] == {"source": "features/f", "shape": [4], "encoder": "e", "rows": 6}


def test_unknown_calls_stay_unknown(cohort):
    data = TileDataset(str(cohort), conditions={"mutation": "omics/mutation"}, where={"split": "val"})
    assert data[0]["mutation"].isnan().tolist() == [False, False, True]


def test_tiles_without_a_condition_are_an_error_or_left_out(cohort):
    merge_index(cohort, pd.DataFrame({"slide": "a", "row": [1], "class": [None]}))
    with pytest.raises(UserError, match=r"1 of 6 tiles of a have no class \(the first is row 1\)"):
        TileDataset(str(cohort), conditions={"class": "class"})
    data = TileDataset(str(cohort), conditions={"class": "class"}, missing="skip")
    assert [data[i]["row"] for i in range(len(data))] == [0, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert data[1]["image"].equal(TileDataset(str(cohort))[2]["image"])


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"class": "clas"}, "did you mean 'class'"),
        ({"mutation": "omics/mutations"}, "did you mean 'mutation'"),
        ({"region": "features/none"}, "none"),
        ({"image": "class"}, "which tiles have anyway"),
    ],
)
def test_a_wrong_source_is_one_message(cohort, conditions, message):
    with pytest.raises(UserError, match=message):
        TileDataset(str(cohort), conditions=conditions)


def test_rare_classes_are_shown_as_often_as_frequent_ones(cohort):
    node = {
        "target": "ldm.data.datasets.TileDataset",
        "params": {"stores": str(cohort), "conditions": {"class": "class", "score": "score"}},
    }
    data = Balanced(node, by="class")
    items = [data[(i, 31 * i)] for i in range(len(data))]
    assert Counter(item["class"] for item in items) == {"x": 6, "y": 6}
    assert len({(item["slide"], item["row"]) for item in items if item["class"] == "x"}) > 3
    assert data[(4, 124)]["image"].equal(items[4]["image"])  # the draw decides
    halves = Balanced(node, by="score", thresholds=[0.45])
    assert Counter(float(halves[(i, i)]["score"]) >= 0.45 for i in range(12)) == {True: 6, False: 6}
    with pytest.raises(UserError, match="nothing to balance"):
        Balanced(node | {"params": {**node["params"], "where": {"split": "val"}}}, by="class")


def test_features_of_conditions_are_checked_as_those_of_keys(cohort):
    def write(slide, name, rows, **attrs):
        path = cohort / "slides" / f"{slide}.zarr"
        with ArrayWriter(path, f"features/{name}", rows.shape[1:], "f4", attrs) as writer:
            writer.append(rows)

    rows = np.arange(24.0).reshape(6, 4)
    for slide, sha in (("a", "1" * 64), ("b", "2" * 64)):
        write(slide, "f", rows, weights_sha256=sha)
        write(slide, "g", rows[:, : 3 + (slide == "a")])
        write(slide, "h", np.where(rows == 5, np.nan, rows))
    with pytest.raises(UserError, match="different weights"):
        TileDataset(str(cohort), conditions={"region": "features/f"})
    with pytest.raises(UserError, match="differs in shape"):
        TileDataset(str(cohort), conditions={"region": "features/g"})
    with pytest.raises(UserError, match="row 1 holds NaN"):
        TileDataset(str(cohort), conditions={"region": "features/h"})[1]


def test_a_grid_of_features_turns_with_its_tile(cohort):
    grid = np.stack([TILES[:, ::8, ::8].mean(-1)] * 1, 1)  # (6, 1, 2, 2): what lies where
    with ArrayWriter(cohort / "slides" / "a.zarr", "features/grid", (1, 2, 2), "f4", {}) as writer:
        writer.append(grid)
    store = str(cohort / "slides" / "a.zarr")
    data = TileDataset(store, conditions={"grid": "features/grid"}, dihedral=True)
    for draw in range(8):
        item = data[(3, draw)]
        expected = dihedral.apply(grid[3], draw)
        np.testing.assert_allclose(item["grid"], expected, atol=1e-5)


def test_two_cohorts_have_omics_tables_of_their_own(cohort, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    make(other, "c", sample="S1")
    (other / "omics").mkdir()
    table = pd.DataFrame([[0, 0, 1.0]], index=["S1"], columns=["TP53", "EGFR", "KRAS"])
    table.to_parquet(other / "omics" / "mutation.parquet")
    data = TileDataset([str(cohort), str(other)], conditions={"mutation": "omics/mutation", "again": "omics/mutation"})
    assert data[0]["mutation"].tolist() == [1, 0, 0]
    assert data[len(data) - 1]["mutation"].tolist() == data[len(data) - 1]["again"].tolist() == [0, 0, 1]
    table[["EGFR", "TP53", "KRAS"]].to_parquet(other / "omics" / "mutation.parquet")
    with pytest.raises(UserError, match="other genes"):
        TileDataset([str(cohort), str(other)], conditions={"mutation": "omics/mutation"})


def index_of(splits: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame({"patient": list(splits), "split": list(splits.values())})


def test_a_tenth_of_the_patients_validates_and_at_least_one():
    many = choose_splits([f"p{i}" for i in range(2000)], None, 0.2)
    assert Counter(many.values())["val"] / 2000 == pytest.approx(0.1, abs=0.02)
    assert many == {patient: split_of(patient, 0.1, 0.2) for patient in many}
    for count in range(3, 12):
        assert "val" in choose_splits(map(str, range(count)), None, 0.0).values(), count
    assert set(choose_splits(["a", "b"], None, 0.0).values()) == {"train"}
    assert set(choose_splits("abcdefgh", 0.0, 0.0).values()) == {"train"}


def test_patients_of_the_cohort_keep_their_split():
    index = index_of({"a": "val", "b": "test"})
    assert choose_splits(["a", "b", "c"], None, 0.0, index) == {"a": "val", "b": "test", "c": "train"}
    assert choose_splits(["a", "b", "c"], 0.0, 0.0, index) == {"a": "val", "b": "test", "c": "train"}
    regions = pd.DataFrame({"patient": ["a"] * 3, "split": ["train", "none", "val"]})  # parts of a slide are held out
    assert choose_splits(["a", "b", "c"], None, 0.0, regions) == dict.fromkeys("abc", "train")
    assert "val" in choose_splits(["c"], None, 0.0, index_of({"a": "train", "b": "train"})).values()


@pytest.mark.parametrize(
    ("patients", "splits", "asked", "told"),
    [
        ("aab", "train train train", None, "It takes three patients, and there are two. Or so"),
        ("a", "train", None, "there is one"),
        ("abc", "train train val", None, "1 of 3 patients is in split 'val'"),
        ("abc", "train train val", 0.3, ""),
        ("abc", "train train train", 0.0, ""),
    ],
)
def test_what_is_told_of_validation(patients, splits, asked, told):
    said = tell_validation(patients, splits.split(), asked, 0.0, "Or so")
    assert told in said
    assert bool(told) == bool(said)


def test_a_fraction_that_takes_nobody_is_told_with_one_that_does():
    patients = [f"p{i}" for i in range(5)]
    said = tell_validation(patients, ["train"] * 5, 0.01, 0.0, "")
    least = float(said.split("--validation ")[1].split()[0])
    assert "val" in choose_splits(patients, least, 0.0).values()
    assert "val" not in choose_splits(patients, least - 0.02, 0.0).values()
