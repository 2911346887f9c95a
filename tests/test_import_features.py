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

from conftest import ROOT
from data_prep import grid_features, import_features
from data_prep.cohort_index import update_index
from data_prep.tile_slides import tile_slide
from ldm.conditioners.grid import GridEmbedder
from ldm.data import dihedral
from ldm.data.cohort import write_store
from ldm.data.datasets import TileDataset
from ldm.data.features import nearest_tiles, read_features
from ldm.data.slide_files import files_of, find_slide_files
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore
from ldm.errors import UserError, run_command
from ldm.images.slides import open_slide

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


@pytest.mark.slow
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


def test_the_real_pair_goes_through(tmp_path: Path, capsys):
    """Three tiles of a TCGA slide as pictures, and the features of all its 777 tiles."""
    (pictures := tmp_path / "mopadi_TCGA-AD-6964").mkdir()
    for tile in (ROOT / "data" / "samples" / "cancers").glob("*.jpg"):
        shutil.copy(tile, pictures / tile.name.removeprefix("TCGA-AD-6964_"))
    file = ROOT / "tests" / "data" / "TCGA-AD-6964-01Z-00-DX1_features.h5"
    command("--slides", pictures, "--files", file, "--out", tmp_path / "out", "--name", "mopadi", "--slide-mpp", "0.5")
    assert "3 pictures; 774 places of the file have none" in capsys.readouterr().out
    store = TileStore.open(tmp_path / "out" / "slides" / "mopadi_TCGA-AD-6964.zarr")
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


def test_a_file_is_of_one_slide(tmp_path: Path):
    stores = [
        write_store(tmp_path, name, lambda i: np.zeros((16, 16, 3), np.uint8), 1, attrs={"tile_size": 16})
        for name in ("case_1", "case_2")
    ]
    with h5py.File(tmp_path / "case.h5", "w") as file:
        file["features"], file["coords"] = np.ones((1, 2)), np.zeros((1, 2))
    with pytest.raises(UserError, match=r"case.h5 could be of 'case_1' and of 'case_2' by its name"):
        import_features.import_features(stores, find_slide_files([tmp_path / "case.h5"]), "x")


def test_the_nearest_tile_is_found_however_they_lie():
    rng = np.random.default_rng(0)
    coords, points = rng.uniform(-100, 900, (300, 2)), rng.uniform(-150, 950, (200, 2))
    for reach in (0.5, 20.0, 300.0):
        apart = np.abs(points[:, None] - coords[None])
        far = np.where(apart.max(2) <= reach, np.hypot(apart[..., 0], apart[..., 1]), np.inf)
        want = np.where(np.isfinite(far.min(1)), far.argmin(1), -1)
        assert np.array_equal(nearest_tiles(points, coords, reach), want)
        assert reach == 0.5 or (want >= 0).any()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("count", "5 features but .* has 6 coordinates"),
        ("own count", r"5 features but coords of shape \(6, 2\)"),
        ("extent", "cover 512 level-0 px, those of .* 256"),
        ("elsewhere", "no tile of .* lies where"),
        ("two encoders", "features of several encoders: conch, uni_v1. Say which by --feature"),
        ("twice", "2 coordinates more than once"),
        ("dim", "encoder 'uni' has 1024 values, the files have 3"),
        ("names", "none of the slides .* has a file of its name; the files are of a, b"),
        ("nan", "NaN or infinity in 1 of 6 features"),
        ("no coords", "no .h5 file with `coords` of slide"),
        ("outside", r"coordinates from .* to \(99999, 0\), but .* is 2220 x 2967 px"),
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


# --- grids from another magnification ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def magnifications(demo_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo slide at 5x and at 20x, cohorts of that name; glass is kept at 5x, and a little at 20x."""
    folder, mpp = tmp_path_factory.mktemp("magnifications"), open_slide(demo_slide).mpp
    tile_slide(demo_slide, folder / "5x", mpp=4 * mpp, tile_size=64, stride=64, keep_background=1.0)
    tile_slide(demo_slide, folder / "20x", mpp=mpp, tile_size=64, stride=64, keep_background=0.02)
    for cohort in ("5x", "20x"):
        update_index(folder / cohort)
    return folder


def two_magnifications(base: Path, folder: Path, turned: bool = False) -> tuple[Path, Path]:
    """A copy of both cohorts; features of 20x tiles are their column and row, and the variant where turned."""
    low, high = (shutil.copytree(base / name, folder / name) for name in ("5x", "20x"))
    store = TileStore.open(high / "slides" / f"{NAME}.zarr")
    values = store.coords / 64
    if turned:
        variants = np.broadcast_to(np.arange(8.0)[None, :, None], (len(values), 8, 1))
        values = np.concatenate([np.repeat(values[:, None], 8, 1), variants], 2)
    attrs = {"encoder": "place", "dihedral": turned}
    with ArrayWriter(store.path, "features/place", values.shape[1:], "f2", attrs) as writer:
        writer.append(values)
    return low, high


def lattice(cohort: Path, extent: int, size: tuple[int, int]) -> TileStore:
    """A store of blank tiles side by side over size (width, height); their feature `place` is their column and row."""
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(0, size[0], extent), np.arange(0, size[1], extent)))
    coords = np.stack([x, y], 1)
    store = write_store(cohort, "a", lambda i: np.zeros((8, 8, 3), np.uint8), len(coords), coords=coords,
                        attrs={"tile_size": 8, "downsample": extent / 8, "mpp": extent / 128})  # fmt: skip
    with ArrayWriter(store.path, "features/place", (2,), "f2", {}) as writer:
        writer.append(coords / extent)
    return store


def test_grids_hold_the_feature_of_each_part(magnifications: Path, tmp_path: Path, capsys):
    low, high = two_magnifications(magnifications, tmp_path)
    shutil.rmtree(high / "slides" / f"{NAME}.zarr" / "labels" / "tissue")  # nothing says what is glass
    given = ["--store", str(low), "--from", str(high), "--feature", "place"]
    grid_features.main([*given, "--out-name", "grid"])
    grid_features.main([*given, "--out-name", "mean", "--mean"])
    store, part = (TileStore.open(cohort / "slides" / f"{NAME}.zarr") for cohort in (low, high))
    grids, means = np.asarray(store.features("grid")[:], float), np.asarray(store.features("mean")[:], float)
    assert grids.shape == (len(store), 2, 4, 4)
    there = {tuple(xy) for xy in (part.coords // 64).tolist()}
    holes = 0
    for i, (x, y) in enumerate((store.coords // 64).tolist()):
        cells = [(x + col, y + row) for row in range(4) for col in range(4)]
        known = [cell for cell in cells if cell in there]
        holes += 16 - len(known)
        for (row, col), cell in zip(np.ndindex(4, 4), cells):
            if cell in there:
                assert tuple(grids[i, :, row, col]) == cell
        if known:
            assert means[i] == pytest.approx(np.mean(known, 0), abs=0.02)
    assert 0 < holes < 16 * len(store)
    report = capsys.readouterr().out
    assert f"{16 * len(store) - holes} of {16 * len(store)} cells have a tile" in report
    assert "the others got the nearest tile's feature" in report
    assert set(pd.read_parquet(low / "index.parquet")["magnification"]) == {"5x"}
    conditions = {"ssl": "features/grid", "magnification": "magnification"}
    dataset = TileDataset(str(low), ("image",), conditions=conditions)
    model = GridEmbedder(2, 16, ["20x", "10x", "5x"], hidden=16, depth=1, heads=2, mlp=16).eval()
    model.check_data(dataset.metadata)
    batch = torch.utils.data.default_collate([dataset[0], dataset[1]])
    assert model(batch)["crossattn"].shape == (2, 65, 16)


def test_the_other_way_gives_the_region_around(tmp_path: Path):
    region, store = lattice(tmp_path / "low", 64, (192, 128)), lattice(tmp_path / "high", 16, (208, 128))
    given = ["--store", str(tmp_path / "high"), "--from", str(tmp_path / "low"), "--feature", "place"]
    grid_features.main([*given, "--out-name", "region"])
    want = store.coords // 64
    want[want[:, 0] == 3, 0] = 2  # beyond the last region: the nearest
    assert np.array_equal(store.features("region")[:], want)
    assert len(region) == 6


def test_glass_and_orientations(magnifications: Path, tmp_path: Path, capsys):
    low, high = two_magnifications(magnifications, tmp_path, turned=True)
    given = ["--store", str(low), "--from", str(high), "--feature", "place"]
    grid_features.main([*given, "--out-name", "grid"])
    assert "the mean feature of background tiles" in capsys.readouterr().out
    store, part = (TileStore.open(cohort / "slides" / f"{NAME}.zarr") for cohort in (low, high))
    array = store.features("grid")
    assert array.shape == (len(store), 8, 3, 4, 4)
    assert array.attrs["dihedral"]
    glass = np.asarray(part.features("place")[:], np.float32)[part.labels("tissue") <= 0.01][:, 0].mean(0)
    grids = np.asarray(array[:], np.float32)
    there = {tuple(xy) for xy in (part.coords // 64).tolist()}
    empty = [i for i, (x, y) in enumerate((store.coords // 64).tolist()) if (x, y) not in there]
    assert np.allclose(grids[empty[0], 0, :2, 0, 0], glass[:2], rtol=1e-2)
    for variant in range(8):  # the layout turns, and each cell has the feature of its turned tile
        assert np.array_equal(grids[:, variant, :2], dihedral.apply(grids[:, 0, :2], variant))
        assert (grids[:, variant, 2] == variant).all()


def test_large_grids_are_averaged(tmp_path: Path):
    low, _ = lattice(tmp_path / "low", 128, (256, 128)), lattice(tmp_path / "high", 8, (256, 128))
    given = ["--store", str(tmp_path / "low"), "--from", str(tmp_path / "high"), "--feature", "place"]
    grid_features.main([*given, "--out-name", "grid"])
    grids = np.asarray(low.features("grid")[:], float)
    assert grids.shape == (2, 2, 8, 8)
    assert grids[1, 0, 3] == pytest.approx(16 + 2 * np.arange(8) + 0.5)
    assert grids[1, 1, :, 3] == pytest.approx(2 * np.arange(8) + 0.5)
    assert pd.read_parquet(tmp_path / "low" / "index.parquet")["magnification"].tolist() == ["10x", "10x"]


def test_grid_mistakes_are_told(cohort: Path, tmp_path: Path):
    for extent in (8, 16, 24):
        lattice(tmp_path / str(extent), extent, (48, 48))

    def make(store: Path, other: Path, feature: str) -> None:
        grid_features.main(["--store", str(store), "--from", str(other), "--feature", feature, "--out-name", "grid"])

    with pytest.raises(UserError, match="no features 'plaice'; did you mean 'place'"):
        make(tmp_path / "16", tmp_path / "8", "plaice")
    with pytest.raises(UserError, match=r"1\.5 times those of .*a whole number"):
        make(tmp_path / "24", tmp_path / "16", "place")
    with pytest.raises(UserError, match=r"no store of slide 'CMU-1-Small-Region\.svs' in --from"):
        make(cohort, tmp_path / "8", "place")
    make(tmp_path / "16", tmp_path / "8", "place")
    with pytest.raises(UserError, match=r"features/grid of .* are no vectors"):
        make(tmp_path / "24", tmp_path / "16", "grid")


def test_magnifications_have_their_usual_names():
    found = [grid_features.magnification(mpp) for mpp in (0.25, 0.499, 2, 64, 0.7)]
    assert found == ["40x", "20x", "5x", "0.15625x", "14.3x"]
