"""Features and tiles from files of CLAM and TRIDENT: the feature of a tile is the one of its place."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from data_prep import import_features
from data_prep.tile_slides import update_index
from ldm.data.datasets import TileDataset
from ldm.data.features import files_of, find_slide_files, nearest_tiles, read_features
from ldm.data.slides import open_slide
from ldm.data.tile_store import TileStore
from ldm.errors import UserError, run_command

NAME = "CMU-1-Small-Region"


def trident(folder: Path, coords: np.ndarray, values: np.ndarray, name: str = NAME, **attrs) -> Path:
    """A TRIDENT job folder of one slide."""
    attrs = {"patch_size": 256, "patch_size_level0": 256, "overlap": 0, **attrs}
    for path, data in {
        folder / "patches" / f"{name}_patches.h5": {"coords": coords},
        folder / "features_uni_v1" / f"{name}.h5": {"coords": coords, "features": values},
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            for key, value in data.items():
                file[key] = value
            file["coords"].attrs.update(attrs)
    return folder


def clam(folder: Path, coords: np.ndarray, values: np.ndarray) -> Path:
    """CLAM's folders of one slide: coordinates with attributes, and a bare tensor."""
    (folder / "patches").mkdir(parents=True)
    (folder / "pt_files").mkdir()
    with h5py.File(folder / "patches" / f"{NAME}.h5", "w") as file:
        file["coords"] = coords
        file["coords"].attrs.update({"patch_size": 128, "patch_level": 1, "downsample": (2.0, 2.0)})
    torch.save(torch.from_numpy(values), folder / "pt_files" / f"{NAME}.pt")
    return folder


def numbered(coords: np.ndarray) -> np.ndarray:
    """Features that say where they are from."""
    return np.column_stack([coords / 256, np.ones(len(coords))]).astype(np.float32)


@pytest.fixture
def cohort(tiny_store: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_store, tmp_path / "cohort" / "slides" / tiny_store.name)
    update_index(tmp_path / "cohort")
    return tmp_path / "cohort"


def command(*arguments: str | Path) -> None:
    import_features.main([str(argument) for argument in arguments])


def shuffled(coords: np.ndarray) -> np.ndarray:
    return coords[np.random.default_rng(0).permutation(len(coords))]


@pytest.mark.parametrize("kind", ["trident", "clam", "h5", "folder"])
def test_a_tile_gets_the_feature_of_its_place(cohort: Path, tmp_path: Path, kind: str, capsys):
    store = TileStore.open(cohort / "slides" / f"{NAME}.zarr")
    coords = shuffled(np.concatenate([store.coords, [[9, 9]]]))
    values = numbered(coords)
    if kind == "trident":
        files = trident(tmp_path / "job", coords, values)
    elif kind == "clam":
        files = clam(tmp_path / "clam", coords, values)
    else:
        files = tmp_path / (f"{NAME}_features.h5" if kind == "h5" else f"{NAME}/features.h5")
        files.parent.mkdir(exist_ok=True)
        with h5py.File(files, "w") as file:
            file["feats"], file["coords"] = values, coords + 0.4
    command("--store", cohort, "--files", files, "--name", "mine", "--encoder-licence", "CC BY 4.0")
    assert "88 of 88 tiles have a feature, 0 have none; 1 of 89 features have no tile" in capsys.readouterr().out
    array = store.features("mine")
    assert np.array_equal(array[:], numbered(store.coords).astype(np.float16))
    assert array.attrs["licence"] == "CC BY 4.0"
    item = TileDataset(str(cohort), ("ssl",), "mine")[40]
    assert (item["ssl"][:2] * 256).tolist() == item["coord"].tolist()
    command("--store", cohort, "--files", files, "--name", "mine", "--encoder-licence", "CC BY 4.0")  # again: nothing
    values[:] += 1
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["feats"], file["coords"] = values, coords
    with pytest.raises(UserError, match="other settings"):
        command("--store", cohort, "--files", tmp_path / "other.h5", "--name", "mine", "--encoder-licence", "CC BY 4.0")


def test_a_tensor_finds_its_coordinates_beside_its_folder(cohort: Path, tmp_path: Path):
    store = TileStore.open(cohort / "slides" / f"{NAME}.zarr")
    folder = clam(tmp_path / "clam", store.coords[::-1], numbered(store.coords[::-1]))
    command("--store", cohort, "--files", folder / "pt_files", "--name", "mine")
    assert np.array_equal(store.features("mine")[:], numbered(store.coords).astype(np.float16))


def test_tiles_without_a_feature_are_an_error_or_left_out(cohort: Path, tmp_path: Path, capsys):
    store = TileStore.open(cohort / "slides" / f"{NAME}.zarr")
    index = pd.read_parquet(cohort / "index.parquet").assign(split="val", grade=range(88))
    index.to_parquet(cohort / "index.parquet")
    kept = np.flatnonzero(store.labels("tissue") > 0.5)
    coords = shuffled(store.coords[kept])
    job = trident(tmp_path / "job", coords, numbered(coords))
    with pytest.raises(UserError, match=rf"{88 - len(kept)} of 88 tiles have no feature"):
        command("--store", cohort, "--files", job, "--name", "mine")
    assert store.feature_names == []
    assert f"{len(kept)} of 88 tiles have a feature" in capsys.readouterr().out
    command("--store", cohort, "--files", job, "--name", "mine", "--missing", "drop", "--out", tmp_path / "new")
    new = TileStore.open(tmp_path / "new" / "slides" / f"{NAME}.zarr")
    assert np.array_equal(new.coords, store.coords[kept])
    assert np.array_equal(new.tile(5), store.tile(int(kept[5])))
    assert np.array_equal(new.features("mine")[:], numbered(new.coords).astype(np.float16))
    table = pd.read_parquet(tmp_path / "new" / "index.parquet")
    assert table["grade"].tolist() == kept.tolist()
    assert set(table["split"]) == {"val"}


def test_tiles_are_cut_where_the_file_says(demo_slide: Path, tmp_path: Path):
    coords = np.array([[300, 1800], [812, 1800], [300, 2312], [900, 2000]])
    job = trident(tmp_path / "job", coords, numbered(coords), patch_size=256, patch_size_level0=512, overlap=32)
    given = ("--slides", demo_slide, "--files", job, "--out", tmp_path / "cohort", "--name", "mine")
    command(*given, "--tile-size", "128")
    slide = open_slide(demo_slide)
    store = TileStore.open(tmp_path / "cohort" / "slides" / f"{NAME}.zarr")
    assert np.array_equal(store.coords, coords)
    assert (store.tile_size, store.downsample, store.stride) == (128, 4, round(448 / 4))
    assert store.mpp == pytest.approx(0.499 * 4)
    for row, (x, y) in enumerate(coords.tolist()):
        assert np.array_equal(store.tile(row), slide.read(x, y, 512, 512, (128, 128)))
    assert np.array_equal(store.features("mine")[:], numbered(coords).astype(np.float16))
    assert pd.read_parquet(tmp_path / "cohort" / "index.parquet")["x"].tolist() == coords[:, 0].tolist()
    clam_folder = clam(tmp_path / "clam", coords, numbered(coords))
    command("--slides", demo_slide, "--files", clam_folder / "patches", "--out", tmp_path / "bare")  # coordinates alone
    bare = TileStore.open(tmp_path / "bare" / "slides" / f"{NAME}.zarr")
    assert np.array_equal(bare.tile(1), slide.read(812, 1800, 256, 256, (128, 128)))
    assert bare.feature_names == []


def test_the_real_pair_goes_through(shared: Path, tmp_path: Path, capsys):
    """Three tiles of a TCGA slide as pictures, and the features of all its 777 tiles."""
    pictures = shared / "data" / "he" / "mopadi_TCGA-AD-6964"
    file = shared / "data" / "embeddings" / "TCGA-AD-6964-01Z-00-DX1_features.h5"
    command("--slides", pictures, "--files", file, "--out", tmp_path, "--name", "mopadi", "--slide-mpp", "0.5")
    assert "3 pictures; 774 places of the file have none" in capsys.readouterr().out
    store = TileStore.open(tmp_path / "slides" / "mopadi_TCGA-AD-6964.zarr")
    found = read_features(file)
    for row, (x, y) in enumerate([(16896, 20480), (22016, 11776), (23040, 25088)]):
        assert store.coords[row].tolist() == [x, y]
        assert np.array_equal(store.tile(row), np.asarray(Image.open(pictures / f"Tile_({x},{y}).jpg")))
        want = found.values[(found.coords == (x, y)).all(1)]
        assert np.array_equal(store.features("mopadi")[row][None], want.astype(np.float16))
    assert (store.tile_size, store.mpp) == (512, 0.5)


def test_slides_and_files_go_together_by_name(tmp_path: Path):
    for name in ("TCGA-A1-01Z-00-DX1_features", "TCGA-A1-01Z-00-DX10.ffff_features", "b.svs"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["features"], file["coords"] = np.ones((1, 2)), np.zeros((1, 2))
    found = find_slide_files([tmp_path])
    assert list(found) == ["TCGA-A1-01Z-00-DX1", "TCGA-A1-01Z-00-DX10.ffff", "b.svs"]
    assert files_of("TCGA-A1-01Z-00-DX1.aaaa", found).name == "TCGA-A1-01Z-00-DX1"
    assert files_of("TCGA-A1-01Z-00-DX10", found).name == "TCGA-A1-01Z-00-DX10.ffff"
    assert files_of("TCGA-A1", found) is None
    with pytest.raises(UserError, match="could be"):
        files_of("b", {**found, "b_2": found["b.svs"]})


def test_the_nearest_tile_is_found_however_they_lie():
    rng = np.random.default_rng(0)
    coords, points = rng.uniform(-100, 900, (300, 2)), rng.uniform(-150, 950, (200, 2))
    for reach in (0.5, 20.0, 300.0):
        far = np.abs(points[:, None] - coords[None]).max(2)
        want = np.where(far.min(1) <= reach, far.argmin(1), -1)
        assert np.array_equal(nearest_tiles(points, coords, reach), want)
        assert reach == 0.5 or (want >= 0).any()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("count", "5 features but .* has 6 coordinates"),
        ("own count", r"5 features but coords of shape \(6, 2\)"),
        ("extent", "cover 512 level-0 px, but tiles of .* cover 256"),
        ("elsewhere", "no tile of .* lies where"),
        ("two encoders", "several files of features"),
        ("twice", "2 coordinates more than once"),
        ("dim", "encoder 'uni' has 1024 values, the files have 3"),
        ("names", "none of the slides .* has a file of its name; the files are of a, b"),
        ("nan", "NaN or infinity in 1 of 6 features"),
        ("no coords", "no .h5 file with `coords` of slide"),
        ("outside", r"coordinates up to \(99999, 0\), but .* is 2220 x 2967 px"),
        ("no extent", "give --patch-size"),
        ("broken", "cannot be read as .h5"),
        ("nothing", "no .h5 or .pt file"),
    ],
)
def test_mistakes_are_told(cohort: Path, demo_slide: Path, tmp_path: Path, case: str, message: str, capsys):
    coords = TileStore.open(cohort / "slides" / f"{NAME}.zarr").coords[:6]
    values, job, name = numbered(coords), tmp_path / "job", "mine"
    features = job / "features_uni_v1" / f"{NAME}.h5"
    target = ("--store", cohort)
    if case == "count":
        clam(job, coords, values[:5])
    elif case == "no coords":
        clam(job, coords, values)
        shutil.rmtree(job / "patches")
    elif case == "own count":
        trident(job, coords, values[:5])
    elif case == "extent":
        trident(job, coords, values, patch_size_level0=512)
    elif case == "elsewhere":
        trident(job, coords + 100, values)
    elif case == "twice":
        trident(job, coords[[0, 0, 1, 1, 2, 3]], values)
    elif case == "names":
        trident(job, coords, values, "a")
        trident(job, coords, values, "b")
    elif case == "outside":
        trident(job, np.array([[0, 0], [99999, 0]]), values[:2])
        target = ("--slides", demo_slide, "--out", tmp_path / "out")
    elif case != "nothing":
        trident(job, coords, np.where(np.arange(6)[:, None] == 3, np.nan, values) if case == "nan" else values)
    if case == "two encoders":
        shutil.copytree(job / "features_uni_v1", job / "features_conch")
    if case == "no extent":
        shutil.rmtree(job / "patches")
        with h5py.File(features, "a") as file:
            file["coords"].attrs.clear()
        target = ("--slides", demo_slide, "--out", tmp_path / "out")
    if case == "broken":
        features.write_bytes(features.read_bytes()[:500])
    if case == "nothing":
        job.mkdir()
    if case == "dim":
        name, target = "uni", ("--slides", demo_slide, "--out", tmp_path / "out")
    assert run_command(lambda: command(*target, "--files", job, "--name", name)) == 2
    assert re.search(message, capsys.readouterr().err)
