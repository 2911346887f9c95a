"""Datasets, the DataModule, features in and latents: the right thing for the right tile, and repeatable."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from torch import nn

from conftest import ROOT
from data_prep import encode_latents as latents_command
from data_prep.cohort_index import update_index
from data_prep.encode_latents import encode_latents
from data_prep.tile_slides import tile_slide
from ldm.data import dihedral
from ldm.data.cohort import merge_index, write_store
from ldm.data.collection import read_pictures
from ldm.data.datasets import RegionDataset, TileDataset
from ldm.data.features import features_to_grid, read_features
from ldm.data.module import TileDataModule
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore
from ldm.errors import UserError, run_command
from ldm.images.slides import open_slide

TARGET = "ldm.data.datasets.TileDataset"


class Pool(nn.Module):
    """A first stage that halves twice, so that its latents can be computed by hand; it is not symmetric."""

    channels, downsampling = 3, 4

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., ::4, ::4]


@pytest.fixture(scope="module")
def store(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo slide's store in a cohort of its own, with features and latents that know their tile and variant."""
    cohort = tmp_path_factory.mktemp("datasets")
    path = cohort / "slides" / tiny_store.name
    shutil.copytree(tiny_store, path)
    update_index(cohort)
    count = len(TileStore.open(path))
    row, variant = np.arange(count), np.arange(8)
    both = np.stack(np.broadcast_arrays(row[:, None], variant), -1)  # (N, 8, 2)
    with ArrayWriter(path, "features/turned", (8, 2), "f4", {"dihedral": True}) as writer:
        writer.append(both)
    with ArrayWriter(path, "features/plain", (3,), "f4") as writer:
        writer.append(np.repeat(row[:, None], 3, 1))
    tiles = torch.from_numpy(TileStore.open(path).tiles[:]).permute(0, 3, 1, 2) / 127.5 - 1
    with ArrayWriter(path, "latents/turned", (8, 3, 64, 64), "f2", {"dihedral": True}) as writer:
        writer.append(torch.stack([Pool().latent(dihedral.apply(tiles, k)) for k in range(8)], 1).numpy())
    with ArrayWriter(path, "latents/plain", (3, 64, 64), "f2") as writer:
        writer.append(Pool().latent(tiles).numpy())
    return path


@pytest.mark.parametrize("in_memory", [False, True])
def test_items_belong_together_in_every_orientation(store: Path, in_memory: bool):
    data = TileDataset(str(store), ("image", "ssl", "latent"), "turned", "turned", dihedral=True, in_memory=in_memory)
    tiles = TileStore.open(store)
    seen = set()
    for draw in range(8):
        item = data[(60, draw)]
        seen.add(int(item["ssl"][1]))
        assert item["ssl"].tolist() == [60, draw]
        assert item["image"].shape == (3, 256, 256)
        assert torch.allclose(Pool().latent(item["image"]), item["latent"], atol=1e-3)
        original = dihedral.apply(item["image"], draw if draw >= 4 else -draw % 4)
        assert torch.equal(((original + 1) * 127.5).round().byte(), torch.from_numpy(tiles.tile(60)).permute(2, 0, 1))
        assert item["coord"].tolist() == tiles.coords[60].tolist()
        assert (item["row"], item["slide"]) == (60, "CMU-1-Small-Region.svs")
    assert len(seen) == 8
    assert data[60]["ssl"].tolist() == [60, 0]  # without a draw nothing is turned
    assert TileDataset(str(store), ("ssl",), "plain", dihedral=True)[(60, 5)]["ssl"].tolist() == [60] * 3


def test_latents_are_never_turned(store: Path):
    with pytest.raises(UserError, match=r"flipped latent is not.*--dihedral"):
        TileDataset(str(store), ("latent",), latents="plain", dihedral=True)


def test_selection(store: Path):
    tiles = TileStore.open(store)
    tissue, coords = tiles.labels("tissue"), tiles.coords
    data = TileDataset(str(store), where={"tissue": {"min": 0.5}, "split": "train", "patient": ["CMU-1-Small-Region"]})
    assert len(data) == (tissue >= 0.5).sum()
    box = (512, 512, 512, 600)
    inside = TileDataset(str(store), include=[box])
    assert {tuple(inside[i]["coord"].tolist()) for i in range(len(inside))} == {
        (x, y) for x in (512, 768) for y in (512, 768)
    }
    outside = TileDataset(str(store), exclude=[box])
    assert len(outside) == len(coords) - 2 * 3  # the third row of tiles reaches into the box
    with pytest.raises(UserError, match="none of the 88 tiles"):
        TileDataset(str(store), where={"split": "test"})
    with pytest.raises(UserError, match="did you mean 'tissue'"):
        TileDataset(str(store), where={"tisue": 1})
    with pytest.raises(UserError, match="min and max"):
        TileDataset(str(store), where={"tissue": {"least": 1}})


def test_mistakes_in_the_config(store: Path, tmp_path: Path):
    for wrong, message in (
        ({"keys": ["imag"]}, "did you mean 'image'"),
        ({"keys": ["ssl"]}, "name the feature to read. Known: plain, turned"),
        ({"keys": ["ssl"], "feature": "plan"}, "did you mean 'plain'"),
        ({"keys": ["latent"], "latents": "kl"}, "encode_latents"),
        ({"stores": str(tmp_path / "no.zarr")}, "tile_slides"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            TileDataset(**{"stores": str(store), **wrong})
    other = tmp_path / "slides" / "other.zarr"
    shutil.copytree(store, other)
    shutil.rmtree(other / "features" / "plain")
    with ArrayWriter(other, "features/plain", (5,), "f4") as writer:
        writer.append(np.ones((88, 5)))
    with pytest.raises(UserError, match="differs in shape between stores"):
        TileDataset([str(store), str(other)], ["ssl"], "plain")
    with ArrayWriter(other, "features/broken", (5,), "f4") as writer:
        writer.append(np.full((88, 5), np.nan))
    with pytest.raises(UserError, match="NaN"):
        TileDataset(str(other), ["ssl"], "broken")[3]


def test_a_model_remembers_licences_and_latents_of_its_data(store: Path, tmp_path: Path):
    known = TileDataset(str(store)).metadata
    assert known.keys() == {"mpp", "tile_size"}  # this store does not know a licence
    stores = [tmp_path / name / "slides" / "a.zarr" for name in "ab"]
    for path, licence, std in zip(stores, ("CC0-1.0", "CC-BY-4.0"), (0.5, 1.5)):
        shutil.copytree(store, path)
        group = zarr.open_group(str(path), mode="r+")
        group.attrs["histoldm"] = {**group.attrs["histoldm"], "licence": licence}
        with ArrayWriter(path, "latents/kl", (2,), "f2", {"first_stage": "kl", "weights_sha256": "c" * 64}) as writer:
            writer.append(np.zeros((88, 2)))
            writer.add_attrs(std=std)
    known = TileDataset([str(path) for path in stores], ["latent"], latents="kl").metadata
    assert known["slide_licence"] == "CC-BY-4.0; CC0-1.0"
    scale = pytest.approx(1 / np.sqrt((0.25 + 2.25) / 2))
    assert known["latents"] == {"first_stage": "kl", "weights_sha256": "c" * 64, "scale_factor": scale}
    zarr.open_array(str(stores[1] / "latents" / "kl"), mode="r+").attrs["weights_sha256"] = "d" * 64
    with pytest.raises(UserError, match=r"'latents/kl' was made by different weights in .*\(c{12}"):
        TileDataset([str(path) for path in stores], ["latent"], latents="kl")


@pytest.mark.slow
def test_validation_of_a_model_of_latents_shows_its_tiles(demo_slide: Path, tmp_path: Path):
    from test_latent_diffusion import build

    path = tile_slide(demo_slide, tmp_path, tile_size=32, stride=512, min_tissue=0.0)
    count = len(TileStore.open(path))
    for name, tail in (("features/f", (24,)), ("latents/l", (4, 16, 16))):
        with ArrayWriter(path, name, tail, "f4") as writer:
            writer.append(np.random.default_rng(0).normal(size=(count, *tail)))
    params = {"stores": str(path), "feature": "f", "latents": "l"}
    nodes = {
        split: {"target": TARGET, "params": {**params, "keys": keys}}
        for split, keys in (("train", ["latent", "ssl"]), ("validation", ["image", "latent", "ssl"]))
    }
    batch = next(iter(TileDataModule(**nodes, batch_size=2).val_dataloader()))
    model = build().eval()
    model.first_stage_model.latent = lambda *_: pytest.fail("the tile was encoded although its latent is known")
    images = model.log_images(batch, 2)
    assert torch.equal(images["inputs"], batch["image"])
    assert images["samples"].shape == (2, 3, 32, 32)


def test_nodes_of_the_data_module(store: Path):
    params = {"stores": str(store), "keys": ["ssl", "latent"], "feature": "turned", "latents": "turned"}
    nodes = {
        "train": {"target": TARGET, "params": {**params, "dihedral": True}},
        "validation": {"target": TARGET, "params": {**params, "where": {"tissue": {"min": 0.9}}}},
    }

    def order(workers: int, batches: int) -> list[list[list[float]]]:
        data = TileDataModule(**nodes, batch_size=16, num_workers=workers, seed=3)
        return [batch["ssl"].tolist() for batch, _ in zip(data.train_dataloader(), range(batches))]

    assert order(0, 4) == order(2, 4)
    data = TileDataModule(**nodes, batch_size=16, seed=3)
    assert {int(row[1]) for batch in order(0, 4) for row in batch} == set(range(8))
    assert sum(len(batch["row"]) for batch in data.val_dataloader()) == len(data.datasets["validation"])
    assert data.test_dataloader() == []
    assert data.val_dataloader().dataset[0].keys() == {"row", "slide", "coord", "ssl", "latent"}
    with pytest.raises(UserError, match="batch_size"):
        TileDataModule(**nodes, batch_size=0)


def test_what_the_datasets_share_is_stated_once(store: Path):
    shared = {"stores": str(store), "keys": ["ssl", "latent"], "feature": "turned", "latents": "turned"}
    train = {"target": TARGET, "params": {"dihedral": True, "conditions": {"tissue": "tissue"}}}
    balanced = {"by": "tissue", "thresholds": [0.5], "dataset": train}
    data = TileDataModule(
        train={"target": "ldm.data.balance.Balanced", "params": balanced},
        validation={"target": TARGET, "params": {"keys": ["image"], "where": {"tissue": {"min": 0.9}}}},
        in_memory=True,
        **shared,
    )
    tiles = data.datasets["train"].dataset
    alone = TileDataset(**shared, dihedral=True, conditions={"tissue": "tissue"}, in_memory=True)
    assert vars(tiles).keys() == vars(alone).keys()
    assert all(torch.equal(tiles[(5, 3)][key], alone[(5, 3)][key]) for key in ("ssl", "latent", "tissue"))
    assert data.datasets["validation"].keys == ("image",)
    assert data.datasets["validation"]._memory.keys() == {(0, "image")}


def test_values_that_no_tile_has_are_told_with_those_that_there_are(tmp_path):
    tile = np.zeros((16, 16, 3), np.uint8)
    written = write_store(tmp_path, "a", lambda i: tile, 2, attrs={"tile_size": 16})
    rows = {"slide": "a", "row": [0, 1], "cancer": ["LUAD", "LUSC"], "grade": [1, 2]}
    merge_index(tmp_path, pd.DataFrame(rows))
    for where, message in (
        ({"cancer": "LUAC"}, "no tile has cancer=LUAC; did you mean 'LUSC'. Known: LUAD, LUSC"),
        ({"grade": 7}, r"no tile has grade=7\. Known: 1, 2"),
        ({"cancers": "LUAD"}, "have no 'cancers'; did you mean 'cancer'"),
    ):
        with pytest.raises(UserError, match=message):
            TileDataset(str(written.path), where=where)


def test_a_table_of_tiles_that_is_lost_is_told(tmp_path, capsys):
    tile = np.zeros((16, 16, 3), np.uint8)
    written = write_store(tmp_path, "a", lambda i: tile, 2, attrs={"tile_size": 16})
    merge_index(tmp_path, pd.DataFrame({"slide": "a", "row": [0, 1], "split": "val", "class": "x"}))
    os.rename(tmp_path / "index.parquet", tmp_path / "kept.parquet")
    message = rf"there is no table of tiles at {tmp_path / 'index.parquet'}, .* data_prep command that wrote the tiles"
    for asked in ({"where": {"split": "val"}}, {"conditions": {"class": "class"}}):
        with pytest.raises(UserError, match=message):
            TileDataset(str(tmp_path), **asked)
    assert len(read_pictures(tmp_path)) == 2
    assert re.search(f"note: {message}", capsys.readouterr().err)
    shutil.copytree(written.path, tmp_path / "alone.zarr")
    read_pictures(tmp_path / "alone.zarr")
    assert "note:" not in capsys.readouterr().err
    for content, told in ((b"PAR1", "is broken"), (b"", "is broken")):
        (tmp_path / "index.parquet").write_bytes(content)
        for take in (lambda: TileDataset(str(tmp_path), where={"split": "val"}), lambda: read_pictures(tmp_path)):
            with pytest.raises(UserError, match=f"the table of tiles .* {told}"):
                take()
    (tmp_path / "index.parquet").unlink()
    os.rename(tmp_path / "kept.parquet", tmp_path / "index.parquet")
    index = pd.read_parquet(tmp_path / "index.parquet")
    index.iloc[:1].to_parquet(tmp_path / "index.parquet")
    for take in (lambda: TileDataset(str(tmp_path), where={"split": "val"}), lambda: read_pictures(tmp_path)):
        with pytest.raises(UserError, match="has 1 rows for a but its store has 2 tiles; delete it"):
            take()


def test_splits_that_a_cohort_does_not_have(store: Path, capsys: pytest.CaptureFixture[str]):
    cohort = str(store.parents[1])
    nodes = {split: {"target": TARGET, "params": {"where": {"split": split}}} for split in ("train", "val", "test")}
    data = TileDataModule(nodes["train"], nodes["train"], nodes["test"], stores=cohort)
    assert data.test_dataloader() == []
    assert capsys.readouterr().out.startswith("there is nothing to test on: none of the ")
    with pytest.raises(UserError, match=r"selected by split=val; the data_prep command .* again with --validation"):
        TileDataModule(nodes["train"], nodes["val"], stores=cohort)
    with pytest.raises(UserError, match="none of the"):
        TileDataModule({"target": TARGET, "params": {"where": {"split": "test"}}}, stores=cohort)


def test_datasets_travel_to_workers(store: Path):
    data = TileDataset(str(store), ("image", "ssl"), "turned", dihedral=True)
    want = data[(5, 9)]
    again = pickle.loads(pickle.dumps(data))[(5, 9)]
    assert torch.equal(want["image"], again["image"])
    assert torch.equal(want["ssl"], again["ssl"])


@pytest.mark.slow
def test_region_crops(demo_slide: Path):
    box = [0, 1856, 2220, 512]
    data = RegionDataset([{"path": str(demo_slide), "exclude": [box]}], size=64, length=10, mpp=0.998)
    pixels = open_slide(demo_slide).thumbnail(0.998)
    glass = 0
    for draw in range(60):
        item = data[(draw % 10, draw)]
        x, y = item["coord"].tolist()
        assert y + 128 <= 1857 or y >= 1856 + 512 - 1
        glass += bool((item["image"] > 0.8).all())
        if draw < 5:
            col, row = round(x / 2), round(y / 2)
            near = [pixels[row + j : row + j + 64, col + i : col + i + 64] for i in (0, 1) for j in (0, 1)]
            crop = ((item["image"] + 1) * 127.5).round().byte().numpy()
            turned = [np.ascontiguousarray(np.moveaxis(dihedral.apply(crop, k), 0, -1)) for k in range(8)]
            assert any(np.array_equal(a, b) for a in turned for b in near)
    assert glass < 10
    data.background = 1.0
    assert min(float(data[(0, draw)]["image"].mean()) for draw in range(20)) > 0.8
    data.background = 0.05
    assert torch.equal(data[(3, 77)]["image"], data[(4, 77)]["image"])  # the draw decides
    with pytest.raises(UserError, match="did you mean 'exclude'"):
        RegionDataset([{"path": str(demo_slide), "exlude": []}], 64, 10)
    with pytest.raises(UserError, match="outside the excluded boxes"):
        RegionDataset([{"path": str(demo_slide), "exclude": [[0, 0, 2220, 2967]]}], 64, 10)[0]
    with pytest.raises(UserError, match="smaller than crops"):
        RegionDataset([{"path": str(demo_slide)}], 4000, 10)


@pytest.mark.slow
def test_latents_of_a_store(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("ldm.model_folder.load_first_stage", lambda folder: Pool())
    folder = tmp_path / "pool"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.yaml").write_text("model: {target: Pool}\nmetadata: {mpp: 1.0}")
    stores = [TileStore.open(store)]

    calls = 0
    original = latents_command.each_variant

    def interrupted(*arguments: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(latents_command, "each_variant", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_latents(stores, folder, with_dihedral=True, batch_size=20, device="cpu")
    assert "pool" not in stores[0].latent_names
    before = calls
    name, scale = encode_latents(stores, folder, with_dihedral=True, batch_size=20, device="cpu")
    assert calls - before == 3  # two batches were kept, three were left
    made, want = stores[0].latents(name), stores[0].latents("turned")
    assert np.array_equal(made[:], want[:])
    assert scale == pytest.approx(1 / want[:].astype(np.float64).std(), rel=1e-4)
    assert made.attrs["scale_factor"] == pytest.approx(scale)
    assert made.attrs["dihedral"]
    assert f"{stores[0].path} has 0.499 um/px, and {folder} was trained at 1 um/px" in capsys.readouterr().out
    assert encode_latents(stores, folder, with_dihedral=True, device="cpu") == (name, pytest.approx(scale))
    with pytest.raises(UserError, match="other settings"):
        encode_latents(stores, folder, device="cpu")


def test_latents_need_a_model_folder(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--store", str(store), "--first-stage", str(tmp_path / "none")]
    assert run_command(lambda: latents_command.main(command)) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_features_of_published_extractors():
    path = ROOT / "tests" / "data" / "TCGA-AD-6964-01Z-00-DX1_features.h5"
    features = read_features(path, dim=16)
    assert features.values.shape == (777, 16)
    grid, mask = features.grid()
    assert mask.sum() == 777
    for i in (0, 300, 776):
        col, row = ((features.coords[i] - features.coords.min(0)) // 512).tolist()
        assert np.array_equal(grid[row, col], features.values[i])
    with pytest.raises(UserError, match="dimension 16, but the model was trained with 384"):
        read_features(path, dim=384)


def test_features_in_every_format(tmp_path: Path, store: Path):
    values = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    coords = np.array([(x, y) for y in (0, 256) for x in (0, 256, 512)])
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "grid.npy", values.reshape(1, 6, 4))  # a grid of one row is a grid
    torch.save({"features": torch.from_numpy(values), "coords": torch.from_numpy(coords)}, tmp_path / "a.pt")
    torch.save(torch.from_numpy(values)[None], tmp_path / "b.pt")
    with h5py.File(tmp_path / "trident.h5", "w") as file:
        file["features"] = values[None]
        file["coords"] = coords
        file["coords"].attrs["patch_size_level0"] = 256
    for name in ("a.npy", "a.pt", "b.pt", "trident.h5"):
        assert np.array_equal(read_features(tmp_path / name).values, values)
    for name in ("a.pt", "trident.h5"):
        assert np.array_equal(read_features(tmp_path / name).grid()[0], values.reshape(2, 3, 4))
    assert read_features(tmp_path / "grid.npy").grid()[0].shape == (1, 6, 4)
    assert read_features(tmp_path / "trident.h5").step == 256
    with pytest.raises(UserError, match="no coordinates"):
        read_features(tmp_path / "a.npy").grid()
    from_store = read_features(store, "plain")
    assert np.array_equal(from_store.grid()[0][..., 0], np.arange(88).reshape(11, 8))
    with pytest.raises(UserError, match="name the one to use"):
        read_features(store)


def test_bad_feature_files(tmp_path: Path):
    values, coords = np.ones((6, 4), np.float32), np.zeros((5, 2), int)
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["feats"], file["coords"] = values, coords
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file["something"] = values
    np.save(tmp_path / "flat.npy", values[0])
    np.save(tmp_path / "nan.npy", np.where(np.eye(6, 4) > 0, np.nan, values))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    (tmp_path / "broken.h5").write_bytes(b"not hdf5")
    (tmp_path / "broken.npy").write_bytes(b"not npy")
    (tmp_path / "a.csv").write_text("1,2")
    for name, message in (
        ("rows.h5", "6 features but coords of shape"),
        ("none.h5", "it holds something"),
        ("flat.npy", "holds one feature of 4 values, of a whole slide"),
        ("nan.npy", "NaN or infinity in 4 of 6"),
        ("text.npy", "not numbers"),
        ("broken.h5", "cannot be read as .h5"),
        ("broken.npy", "cannot be read as .npy"),
        ("a.csv", "features are read from"),
        ("missing.npy", "there are no features"),
    ):
        with pytest.raises(UserError, match=message):
            read_features(tmp_path / name)


def test_lattices():
    values = np.arange(4, dtype=np.float32)[:, None]
    grid, mask = features_to_grid(values, np.array([(10, 20), (10, 30), (20, 30), (40, 20)]))
    assert mask.tolist() == [[True, False, False, True], [True, True, False, False]]
    assert grid[1, 0, 0] == 1  # one step down, none to the right
    assert grid[0, 3, 0] == 3
    assert np.isnan(grid[0, 1]).all()
    with pytest.raises(UserError, match="off the lattice"):
        features_to_grid(values, np.array([(0, 0), (10, 0), (20, 0), (35, 0)]), 10)
    with pytest.raises(UserError, match="place of another"):
        features_to_grid(values, np.array([(0, 0), (10, 0), (10, 0), (20, 0)]))
