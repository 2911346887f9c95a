"""Tiles and features from and to other tools: CLAM, TRIDENT, STAMP, LazySlide's Zarr. What goes out comes back."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import zarr

from conftest import ROOT
from data_prep import export_features, import_features
from data_prep.tile_slides import tile_slide
from ldm.data.cohort import write_store
from ldm.data.features import read_features
from ldm.data.spatial_zarr import read_spatial, write_spatial
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore
from ldm.encoders.registry import REGISTRY
from ldm.encoders.tool_names import NAMES
from ldm.errors import UserError, run_command

NAME = "CMU-1-Small-Region"
TO = ("clam", "trident", "stamp", "wsidata")


def read_in(*arguments: str | Path) -> None:
    import_features.main([str(argument) for argument in arguments])


def write_out(*arguments: str | Path) -> None:
    export_features.main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def lazyslide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo slide's Zarr as LazySlide wrote it, see tests/data/lazyslide_tiles.py. Do not write to it."""
    folder = tmp_path_factory.mktemp("lazyslide")
    with tarfile.open(ROOT / "tests" / "data" / "lazyslide_tiles.tar.xz") as file:
        file.extractall(folder, filter="data")
    return folder / f"{NAME}.zarr"


@pytest.fixture(scope="module")
def half(demo_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    """Overlapping tiles of 128 px at half the slide's resolution, with features `uni` of 1024 values."""
    path = tile_slide(demo_slide, tmp_path_factory.mktemp("half"), mpp=2 * 0.499, tile_size=128, stride=96)
    store = TileStore.open(path)
    values = np.random.default_rng(0).normal(size=(len(store), 1024)).astype(np.float16)
    with ArrayWriter(path, "features/uni", (1024,), "f2", {"encoder": "own", "licence": "MIT"}) as writer:
        writer.append(values)
    return store


def copy_of(store: TileStore, folder: Path) -> TileStore:
    """The store without its features, in a cohort of its own."""
    path = shutil.copytree(store.path, folder / "slides" / store.path.name)
    shutil.rmtree(path / "features" / "uni")
    return TileStore.open(path)


def quarters(tiles: np.ndarray) -> np.ndarray:
    """The mean red, green and blue of 2 x 2 parts of tiles (N,T,T,3), as the fixture's script takes them."""
    t = tiles.shape[1] // 2
    return tiles.reshape(len(tiles), 2, t, 2, t, 3).mean((2, 4), dtype=float).reshape(len(tiles), 12)


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", TO)
def test_what_goes_out_comes_back(half: TileStore, tmp_path: Path, to: str, capsys):
    write_out("--store", half.path, "--to", to, "--out", tmp_path / "out")
    back = copy_of(half, tmp_path / "back")
    read_in("--store", back.path, "--files", tmp_path / "out", "--name", "uni")
    assert np.asarray(back.features("uni")[:]).tobytes() == np.asarray(half.features("uni")[:]).tobytes()
    assert f"{len(half)} of {len(half)} tiles have a feature" in capsys.readouterr().out
    assert (back.features("uni").attrs["encoder"], back.features("uni").attrs["licence"]) == ("own", "MIT")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("[!.]*")}
    write_out("--store", half.path, "--to", to, "--out", tmp_path / "out")  # again: nothing
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("[!.]*")} == before


@pytest.mark.parametrize("to", TO)
def test_tiles_are_cut_where_they_were(half: TileStore, demo_slide: Path, tmp_path: Path, to: str):
    write_out("--store", half.path, "--to", to, "--out", tmp_path / "out")
    given = ("--slides", demo_slide, "--files", tmp_path / "out", "--name", "uni", "--out", tmp_path / "back")
    read_in(*given, "--tile-size", "128")
    back = TileStore.open(tmp_path / "back" / "slides" / f"{NAME}.zarr")
    assert np.array_equal(back.coords, half.coords)
    assert (back.tile_size, back.downsample) == (half.tile_size, half.downsample)
    assert all(np.array_equal(back.tile(i), half.tile(i)) for i in (0, len(half) // 2, len(half) - 1))
    assert np.array_equal(back.features("uni")[:], half.features("uni")[:])
    if to in ("trident", "wsidata"):  # the others do not say how far tiles are from each other
        assert back.stride == half.stride


def test_clams_files_are_as_its_readers_want_them(half: TileStore, tmp_path: Path):
    write_out("--store", half.path, "--to", "clam", "--out", tmp_path)
    values = np.asarray(half.features("uni")[:], np.float32)
    assert torch.equal(torch.load(tmp_path / "pt_files" / f"{NAME}.pt", weights_only=True), torch.tensor(values))
    with h5py.File(tmp_path / "h5_files" / f"{NAME}.h5") as file:
        assert file["features"].dtype == np.float32
        assert np.array_equal(file["coords"][:], half.coords)
    with h5py.File(tmp_path / "patches" / f"{NAME}.h5") as file:  # Whole_Slide_Bag_FP: read_region(coord, level, size)
        attrs = dict(file["coords"].attrs)
        assert (attrs["patch_level"], attrs["patch_size"]) == (0, 256)
        assert attrs["level_dim"].tolist() == [2220, 2967]


def test_tridents_files_are_as_its_readers_want_them(half: TileStore, tmp_path: Path, capsys):
    write_out("--store", half.path, "--to", "trident", "--out", tmp_path / "job", "--name", "uni_v1")
    assert "--coords_dir 10x_128px_32px_overlap" in capsys.readouterr().out
    folder = tmp_path / "job" / "10x_128px_32px_overlap"
    with (
        h5py.File(folder / "patches" / f"{NAME}_patches.h5") as patches,
        h5py.File(folder / "features_uni_v1" / f"{NAME}.h5") as features,
    ):
        attrs = dict(features["coords"].attrs)
        assert attrs == dict(patches["coords"].attrs)
        assert np.array_equal(features["coords"][:], patches["coords"][:])
        assert features["features"].attrs["encoder"] == "uni_v1"
        assert json.loads(features["features"].attrs["histoldm"])["licence"] == "MIT"
    wanted = {"patch_size": 128, "patch_size_level0": 256, "level0_magnification": 20, "target_magnification": 10,
              "overlap": 32, "name": NAME, "level0_width": 2220, "level0_height": 2967}  # fmt: skip
    assert wanted.items() <= attrs.items()


def test_stamps_files_are_as_its_readers_want_them(half: TileStore, tmp_path: Path):
    write_out("--store", half.path, "--to", "stamp", "--out", tmp_path)
    with h5py.File(tmp_path / "uni" / f"{NAME}.h5") as file:
        assert (file["feats"].dtype, file["coords"].dtype) == (np.float16, np.float32)
        assert file["coords"][:] == pytest.approx(half.coords * 0.499, abs=1e-3)
        assert (file.attrs["unit"], file.attrs["extractor"], file.attrs["feat_type"]) == ("um", "uni", "tile")
        assert (file.attrs["tile_size_um"], file.attrs["tile_size_px"]) == (pytest.approx(128 * 0.998), 128)


@pytest.mark.filterwarnings("ignore:Object at shapes.parquet")
def test_our_zarr_says_what_lazyslides_says(half: TileStore, lazyslide: Path, tmp_path: Path):
    """What wsidata.open_wsi reads: groups, encodings, types; it opened such files (0.12)."""
    write_out("--store", half.path, "--to", "wsidata", "--out", tmp_path, "--name", "quarters")
    own, their = (zarr.open_group(str(path), mode="r", use_consolidated=False)
                  for path in (tmp_path / f"{NAME}.zarr", lazyslide))  # fmt: skip
    nodes = [name for name, _ in own.members(max_depth=None) if not name.endswith("histoldm")]
    assert {"shapes/tiles", "tables/quarters_tiles/X", "tables/quarters_tiles/obs/library_id/codes"} < set(nodes)
    for name in nodes:
        assert dict(own[name].attrs) == dict(their[name].attrs), name
        if isinstance(own[name], zarr.Array):
            assert own[name].dtype == their[name].dtype, name
    spec, other = (group.attrs["tile_spec"]["tiles"] for group in (own, their))
    assert spec.keys() == other.keys()
    assert (spec["width"], spec["stride_height"], spec["mpp"], spec["base_downsample"]) == (128, 96, 0.998, 2.0)
    assert own.attrs["slide_properties"]["shape"] == their.attrs["slide_properties"]["shape"]
    assert own.attrs["spatialdata_attrs"]["version"] == their.attrs["spatialdata_attrs"]["version"]


def test_lazyslide_reads_the_nearest_whole_number_of_pixels(tmp_path: Path):
    """224 px at 2.004 are 448.9; wsidata rounds 224 * base_downsample down."""
    attrs = {"tile_size": 224, "downsample": 1 / 0.499, "mpp": 1.0, "level0_size": [2000, 1000]}
    store = write_store(tmp_path, "a", lambda i: np.zeros((224, 224, 3), np.uint8), 1, attrs=attrs)
    write_spatial(tmp_path / "a.zarr", store)
    _, places = read_spatial(tmp_path / "a.zarr")
    spec = zarr.open_group(str(tmp_path / "a.zarr"), mode="r").attrs["tile_spec"]["tiles"]
    assert (int(224 * spec["base_downsample"]), places.extent, spec["mpp"]) == (449, 449, 1.0)


def test_what_cannot_go_out_is_told(half: TileStore, tmp_path: Path, capsys):
    out = ("--out", tmp_path / "out")
    bare = copy_of(half, tmp_path / "bare")

    def told(*arguments: str | Path) -> str:
        assert run_command(lambda: write_out(*arguments, *out)) == 2
        return capsys.readouterr().err

    assert "has no features, and stamp has no files of tiles alone" in told("--store", bare.path, "--to", "stamp")
    assert "--name a/b cannot name a file" in told("--store", half.path, "--to", "stamp", "--name", "a/b")
    assert "no features 'uni2'; did you mean 'uni'" in told("--store", half.path, "--to", "clam", "--feature", "uni2")
    assert "of one name (CMU-1-Small-Region)" in told("--store", half.path, half.path, "--to", "stamp")
    with ArrayWriter(bare.path, "features/grid", (4, 2, 2), "f2") as writer:
        writer.append(np.zeros((len(bare), 4, 2, 2)))
    assert "no vectors but (4, 2, 2)" in told("--store", bare.path, "--to", "clam")
    with ArrayWriter(bare.path, "features/uni", (4,), "f2") as writer:
        writer.append(np.zeros((len(bare), 4)))
    assert "have the features grid, uni; say which by --feature" in told("--store", bare.path, "--to", "clam")
    images = write_store(tmp_path, "images", lambda i: np.zeros((8, 8, 3), np.uint8), 2, attrs={"tile_size": 8})
    slide = write_store(
        tmp_path, "slide", lambda i: np.zeros((8, 8, 3), np.uint8), 2, attrs={"tile_size": 8}, coords=[(0, 0), (8, 0)]
    )
    for store in (images, slide):
        with ArrayWriter(store.path, "features/x", (4,), "f2") as writer:
            writer.append(np.ones((2, 4)))
    assert "lie in one place, so it is of images" in told("--store", images.path, "--to", "wsidata")
    for to in ("stamp", "trident"):
        assert f"are not known, and {to} needs them" in told("--store", slide.path, "--to", to)
    assert not (tmp_path / "out").exists()
    for to in TO:
        write_out("--store", half.path, "--to", to, *out)
        error = told("--store", bare.path, "--to", to, "--feature", "uni")
        assert re.search(rf"({NAME}.h5|uni_tiles) is there already and holds something else than uni of", error)
    for to in ("clam", "wsidata"):  # neither needs a scale
        export_features.export_features([slide], to, tmp_path / "unscaled")


@pytest.mark.parametrize("to", ["clam", "trident", "wsidata"])
def test_tiles_go_out_alone_and_features_join_them(half: TileStore, demo_slide: Path, tmp_path: Path, to: str, capsys):
    bare = copy_of(half, tmp_path / "bare")
    write_out("--store", bare.path, "--to", to, "--out", tmp_path / "out")
    given = ("--slides", demo_slide, "--files", tmp_path / "out", "--out", tmp_path / "back")
    read_in(*given, "--tile-size", "128")
    back = TileStore.open(tmp_path / "back" / "slides" / f"{NAME}.zarr")
    assert np.array_equal(back.coords, half.coords)
    assert not back.feature_names
    for name in ("a", "b") if to != "clam" else ("a",):
        write_out("--store", half.path, "--to", to, "--out", tmp_path / "out", "--name", name)
        read_in("--store", bare.path, "--files", tmp_path / "out", "--feature", name if to != "clam" else "out")
    first = bare.feature_names[0]
    assert np.array_equal(bare.features(first)[:], half.features("uni")[:])
    other = tile_slide(demo_slide, tmp_path / "other", mpp=2 * 0.499, tile_size=128, stride=96, min_tissue=0.9)
    assert run_command(lambda: write_out("--store", other, "--to", to, "--out", tmp_path / "out")) == 2
    assert "has other tiles than" in capsys.readouterr().err


def test_features_go_into_lazyslides_own_zarr(lazyslide: Path, demo_slide: Path, tmp_path: Path):
    """Its tiles, our features: a table more, by the ids of its tiles, beside all that is there."""
    path = shutil.copytree(lazyslide, tmp_path / "zarr" / lazyslide.name)
    read_in("--slides", demo_slide, "--files", path, "--feature", "spread", "--out", tmp_path)
    before = sorted(p.relative_to(path) for p in path.rglob("*"))
    write_out("--store", tmp_path, "--to", "wsidata", "--out", tmp_path / "zarr", "--name", "ours")
    after = sorted(p.relative_to(path) for p in path.rglob("*"))
    assert {p.parts[:2] for p in set(after) - set(before)} == {("tables", "ours_tiles")}
    assert not set(before) - set(after)
    assert np.array_equal(read_features(path, "ours").values, read_features(path, "spread").values.astype(np.float16))
    listed = json.loads((path / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    assert {"tables/ours_tiles/X", "tables/quarters_tiles/X"} < listed.keys()  # as spatialdata keeps it


def test_of_eight_orientations_the_tiles_own_goes_out(half: TileStore, tmp_path: Path):
    store = copy_of(half, tmp_path)
    values = np.random.default_rng(0).normal(size=(len(store), 8, 4)).astype(np.float16)
    with ArrayWriter(store.path, "features/turned", (8, 4), "f2", {"dihedral": True}) as writer:
        writer.append(values)
    (path,) = export_features.export_features([store], "stamp", tmp_path / "out")
    assert np.array_equal(read_features(path).values, values[:, 0].astype(np.float32))


# --- from LazySlide ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("feature", "extent", "apart"), [("quarters_tiles_20x", 256, 0.13), ("quarters", 513, 0.7)])
def test_lazyslides_features_lie_at_their_pixels(
    lazyslide: Path, demo_slide: Path, tmp_path: Path, feature: str, extent: int, apart: float
):
    """The features are the tiles' colours: those of our tiles, to float16 (0.13 of 255), and half a grey level more
    where the two resize differently."""
    read_in("--slides", demo_slide, "--files", lazyslide, "--feature", feature, "--out", tmp_path)
    store = TileStore.open(tmp_path / "slides" / f"{NAME}.zarr")
    assert (store.tile_size, store.tile_size * store.downsample) == (256, extent)
    own = quarters(np.stack([store.tile(i) for i in range(len(store))]))
    their = np.asarray(store.features(feature)[:], float)
    assert np.abs(own - their).max() < apart
    moved = np.roll(own, 1, 0)
    assert np.abs(moved - their).max() > 10  # a wrong tile would show


def test_lazyslides_features_go_to_tiles_of_the_same_places(lazyslide: Path, demo_slide: Path, tmp_path: Path):
    read_in("--slides", demo_slide, "--files", lazyslide, "--feature", "spread", "--out", tmp_path)
    store = TileStore.open(tmp_path / "slides" / f"{NAME}.zarr")
    read_in("--store", tmp_path, "--files", lazyslide, "--feature", "quarters_tiles", "--name", "mine")
    found = read_features(lazyslide, "quarters")
    assert np.array_equal(found.coords, store.coords)
    assert np.array_equal(store.features("mine")[:], found.values.astype(np.float16))
    assert found.grid()[1].shape == (4, 2)


def test_tables_are_joined_by_the_tiles_ids(lazyslide: Path, tmp_path: Path):
    """LazySlide's rows are not always those of the tiles: they carry the tiles' ids."""
    path = shutil.copytree(lazyslide, tmp_path / lazyslide.name)
    before = read_features(path, "quarters").values
    table = zarr.open_group(str(path), mode="r+", use_consolidated=False)["tables/quarters_tiles"]
    order = np.array([3, 0, 4, 1, 2])
    table["X"][:], table["obs/tile_id"][:] = table["X"][:][order], table["obs/tile_id"][:][order]
    assert np.array_equal(read_features(path, "quarters").values, before)
    table["obs/tile_id"][:] = [0, 1, 2, 3, 9]
    with pytest.raises(UserError, match="has no features of 1 of 5 tiles"):
        read_features(path, "quarters")
    table["obs/tile_id"][:] = [0, 1, 2, 3, 3]
    with pytest.raises(UserError, match="has 5 rows and 4 ids of tiles"):
        read_features(path, "quarters")


def test_zarr_of_older_versions_is_read(lazyslide: Path, tmp_path: Path):
    old = lazyslide.parent / "v2" / lazyslide.name
    assert (old / ".zgroup").is_file()
    for feature in ("quarters", "quarters_tiles_20x", "spread"):
        new, own = read_features(lazyslide, feature), read_features(old, feature)
        assert np.array_equal(own.values, new.values)
        assert np.array_equal(own.coords, new.coords)
    read_in(
        "--slides", ROOT / "data" / "demo" / f"{NAME}.svs", "--files", old, "--feature", "spread", "--out", tmp_path
    )
    with pytest.raises(UserError, match="is Zarr v2; write it anew"):
        write_out("--store", tmp_path, "--to", "wsidata", "--out", old.parent, "--name", "ours")


def test_mistakes_with_lazyslides_zarr_are_told(
    lazyslide: Path, half: TileStore, demo_slide: Path, tmp_path: Path, capsys
):
    store = copy_of(half, tmp_path / "cohort")

    def told(*arguments: str | Path) -> str:
        assert run_command(lambda: read_in(*arguments)) == 2
        return capsys.readouterr().err

    given = ("--store", store.path, "--files", lazyslide)
    assert "several encoders: quarters, quarters_tiles_20x, spread. Say which by --feature" in told(*given)
    assert "no features 'quarter'; did you mean 'quarters'" in told(*given, "--feature", "quarter")
    assert "cover 513 level-0 px, those of" in told(*given, "--feature", "quarters")
    broken = shutil.copytree(lazyslide, tmp_path / "a" / lazyslide.name)
    shutil.rmtree(broken / "tables" / "quarters_tiles" / "X" / "c")
    assert "X lacks 1 of 1 chunks" in told("--store", store.path, "--files", broken, "--feature", "quarters")
    (broken / "shapes" / "tiles" / "shapes.parquet").write_bytes(b"PAR1")
    assert "shapes.parquet cannot be read" in told("--store", store.path, "--files", broken, "--feature", "spread")
    attrs = zarr.open_group(str(broken), mode="r+", use_consolidated=False).attrs
    spec = attrs["tile_spec"]
    attrs["tile_spec"] = {**spec, "tiles_20x": {**spec["tiles_20x"], "height": 128}}
    error = told("--store", store.path, "--files", broken, "--feature", "quarters_tiles_20x")
    assert "not squares of one size and one stride" in error
    attrs["slide_properties"] = {**attrs["slide_properties"], "shape": [100, 100]}
    attrs["tile_spec"] = spec
    error = told("--slides", demo_slide, "--files", broken, "--feature", "quarters_tiles_20x", "--out", tmp_path / "o")
    assert re.search(r"is of a slide of 100 x 100 px, and that of .* has 2220 x 2967 px", error)


def test_coordinates_alone_come_from_lazyslide(lazyslide: Path, demo_slide: Path, tmp_path: Path):
    bare = shutil.copytree(lazyslide, tmp_path / lazyslide.name)
    shutil.rmtree(bare / "tables")
    read_in("--slides", demo_slide, "--files", bare, "--out", tmp_path / "out")
    store = TileStore.open(tmp_path / "out" / "slides" / f"{NAME}.zarr")
    assert (len(store), store.feature_names, store.coords[0].tolist()) == (5, [], [564, 2117])


# --- from TRIDENT, STAMP and CLAM -------------------------------------------------------------------------------------


@pytest.fixture
def job(half: TileStore, tmp_path: Path) -> Path:
    """A job folder of TRIDENT: two encoders and a slide encoder at one size, one of them at another, too."""
    for name in ("uni_v1", "conch_v15"):
        export_features.export_features([half], "trident", tmp_path / "job", name=name)
    folder = tmp_path / "job" / "10x_128px_32px_overlap"
    slides = folder / "slide_features_titan"
    slides.mkdir()
    with h5py.File(slides / f"{NAME}.h5", "w") as file:
        file["features"], file["coords"] = np.ones(768, np.float32), half.coords
    shutil.copytree(folder / "features_uni_v1", tmp_path / "job" / "10x_256px_0px_overlap" / "features_uni_v1")
    with h5py.File(tmp_path / "job" / "10x_256px_0px_overlap" / "features_uni_v1" / f"{NAME}.h5", "a") as file:
        file["coords"].attrs.update(patch_size=256, patch_size_level0=512, overlap=0)
    with h5py.File(folder / "features_conch_v15" / f"{NAME}.h5", "a") as file:
        file["features"][:] += 1
    return tmp_path / "job"


def test_of_a_whole_job_folder_one_says_which(half: TileStore, job: Path, tmp_path: Path, capsys):
    store = copy_of(half, tmp_path / "cohort")

    def told(*arguments: str | Path) -> str:
        assert run_command(lambda: read_in("--store", store.path, "--files", job, *arguments)) == 2
        return capsys.readouterr().err

    error = told()
    assert (
        "the features of several encoders: conch_v15, uni_v1. Say which by --feature, as --feature conch_v15" in error
    )
    assert "1 files hold one feature of a whole slide and are left out" in error
    assert "has no features 'titan'" in told("--feature", "titan")
    error = told("--feature", "uni_v1")
    assert f"slide '{NAME}' has several files of features" in error
    assert "say which by --feature 10x_128px_32px_overlap/features_uni_v1" in error
    assert "cover 512 level-0 px, those of" in told("--feature", "10x_256px_0px_overlap/features_uni_v1")
    read_in("--store", store.path, "--files", job, "--feature", "10x_128px_32px_overlap/features_uni_v1")
    read_in("--store", store.path, "--files", job, "--feature", "conch_v15", "--name", "mine")
    assert store.feature_names == ["mine", "uni_v1"]
    assert np.array_equal(store.features("uni_v1")[:], half.features("uni")[:])
    assert np.abs(np.asarray(store.features("mine")[:], float) - half.features("uni")[:] - 1).max() < 0.01


def test_encoders_keep_their_terms_under_the_names_of_tools(half: TileStore, job: Path, tmp_path: Path, capsys):
    """TRIDENT's uni_v1 is the list's uni, whatever its features are called here."""
    store = copy_of(half, tmp_path / "cohort")
    files = ("--files", job / "10x_128px_32px_overlap", "--feature", "uni_v1")
    for path in job.rglob("features_uni_v1/*.h5"):  # as TRIDENT's own file, which does not say who made it
        with h5py.File(path, "a") as file:
            del file["features"].attrs["histoldm"]
    for name in ("uni_v1", "mine", "uni"):
        read_in("--store", store.path, *files, "--name", name)
        attrs = store.features(name).attrs
        assert (attrs["encoder"], attrs["non_commercial"]) == ("uni", True)
        assert "encoder 'uni' is licensed for non-commercial use" in capsys.readouterr().err
    told = "--name virchow is the encoder 'virchow', and the files say that they are of 'uni'"
    assert run_command(lambda: read_in("--store", store.path, *files, "--name", "virchow")) == 2
    assert told in capsys.readouterr().err


def test_encoders_are_not_mixed_over_slides(half: TileStore, job: Path):
    """Each slide has one file of features, but not of one encoder."""
    folder = job / "10x_128px_32px_overlap"
    (folder / "features_conch_v15" / f"{NAME}.h5").rename(folder / "features_conch_v15" / "other.h5")
    shutil.rmtree(job / "10x_256px_0px_overlap")
    with pytest.raises(UserError, match="several encoders: conch_v15, uni_v1"):
        import_features.find_slide_files([job])


def test_names_of_tools_are_those_of_published_encoders():
    assert set(NAMES.values()) <= set(REGISTRY)
    assert not set(NAMES) & set(REGISTRY)


def test_slides_without_a_tile_are_left_out(half: TileStore, job: Path, tmp_path: Path, capsys):
    """TRIDENT writes files for slides without tissue, too."""
    for folder, end in (("patches", "_patches"), ("features_uni_v1", "")):
        with h5py.File(job / "10x_128px_32px_overlap" / folder / f"blank{end}.h5", "w") as file:
            file["coords"] = np.zeros((0, 2), np.int64)
            if not end:
                file["features"] = np.zeros((0, 1024), np.float32)
    store = copy_of(half, tmp_path / "cohort")
    read_in("--store", store.path, "--files", job / "10x_128px_32px_overlap", "--feature", "uni_v1")
    assert "2 files hold no tile and are left out" in capsys.readouterr().err


def test_attributes_are_checked_against_the_store(half: TileStore, tmp_path: Path, capsys):
    (path,) = export_features.export_features([half], "trident", tmp_path / "job")
    store = copy_of(half, tmp_path / "cohort")

    def told(**attrs: float) -> str:
        with h5py.File(path, "a") as file:
            before = dict(file["coords"].attrs)
            file["coords"].attrs.update(attrs)
        assert run_command(lambda: read_in("--store", store.path, "--files", path, "--name", "uni")) == 2
        with h5py.File(path, "a") as file:
            file["coords"].attrs.update(before)
        return capsys.readouterr().err

    assert "cover 128 level-0 px, those of" in told(patch_size_level0=128, level0_magnification=10)
    assert "128 px at 10x of a slide at 40x cover 512 level-0 px, and its patch_size_level0 is 256" in told(
        level0_magnification=40
    )
    assert "is of a slide of 2220 x 2000 px" in told(level0_height=2000)
    with h5py.File(path, "a") as file:
        file["coords"].attrs.update(patch_size=32, target_magnification=2.5, overlap=8)
    read_in("--store", store.path, "--files", path, "--name", "uni")
    assert "were made of coarser tiles than those of the stores" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["2.0", "2.1", "1"])
def test_stamps_coordinates_are_micrometres(half: TileStore, demo_slide: Path, tmp_path: Path, version: str, capsys):
    tiles = np.array([(0, 2), (1, 2), (3, 4)])
    values = np.arange(12, dtype=np.float16).reshape(3, 4)
    with h5py.File(tmp_path / f"{NAME}.h5", "w") as file:
        file["feats"], file["coords"] = values, (tiles * (224 if version == "1" else 256)).astype(np.float32)
        sizes = {"2.0": {"tile_size": 256, "unit": "um"}, "1": {}}
        given = sizes.get(version, {"tile_size_um": 256.0, "tile_size_px": 224, "unit": "um"})
        file.attrs.update({"extractor": "uni", **given})
    given = ("--slides", demo_slide, "--files", tmp_path / f"{NAME}.h5", "--name", "x", "--out", tmp_path / "out")
    read_in(*given, "--tile-size", "224")
    store = TileStore.open(tmp_path / "out" / "slides" / f"{NAME}.zarr")
    assert np.array_equal(store.coords, np.rint(tiles * 256 / 0.499))
    assert (store.tile_size, store.mpp) == (224, pytest.approx(256 / 224))
    assert np.array_equal(store.features("x")[:], values)
    unknown = write_store(
        tmp_path, NAME, lambda i: np.zeros((8, 8, 3), np.uint8), 2, attrs={"tile_size": 8}, coords=[(0, 0), (8, 0)]
    )
    assert run_command(lambda: read_in("--store", unknown.path, *given[2:6])) == 2
    assert "has its coordinates in micrometres, and the slide's micrometres" in capsys.readouterr().err


def test_stamps_features_of_slides_and_patients_are_left_out(half: TileStore, tmp_path: Path, capsys):
    export_features.export_features([half], "stamp", tmp_path / "files")
    for kind in ("slide", "patient"):
        with h5py.File(tmp_path / "files" / f"{NAME}-{kind}.h5", "w") as file:
            file["feats"] = np.ones((1, 768), np.float32)
            file.attrs.update(encoder="titan", feat_type=kind)
    store = copy_of(half, tmp_path / "cohort")
    read_in("--store", store.path, "--files", tmp_path / "files", "--name", "uni")
    assert "2 files hold one feature of a whole slide" in capsys.readouterr().err


def test_clams_levels_may_be_a_little_longer_than_wide(half: TileStore, tmp_path: Path):
    """CLAM writes how much smaller a level is in x and in y: (4.0, 4.00025) where its height was rounded."""
    write_out("--store", half.path, "--to", "clam", "--out", tmp_path / "files")
    with h5py.File(tmp_path / "files" / "patches" / f"{NAME}.h5", "a") as file:
        file["coords"].attrs.update(
            patch_size=128, patch_level=1, downsample=(2.0, 2967 / 1483), level_dim=(1110, 1483)
        )
    store = copy_of(half, tmp_path / "cohort")
    read_in("--store", store.path, "--files", tmp_path / "files", "--name", "uni")
    assert np.array_equal(store.features("uni")[:], half.features("uni")[:])


def test_features_of_different_weights_are_not_mixed(half: TileStore, tmp_path: Path):
    """Two slides, one encoder by name, and not by its weights."""
    stores = []
    for weights in ("a", "b"):
        own = copy_of(half, tmp_path / weights)
        store = TileStore.open(own.path.rename(own.path.with_name(f"{weights}.zarr")))
        with ArrayWriter(store.path, "features/x", (4,), "f2", {"encoder": "x", "weights_sha256": weights}) as writer:
            writer.append(np.ones((len(store), 4)))
        stores.append(store)
    export_features.export_features(stores, "stamp", tmp_path / "out")
    with pytest.raises(UserError, match=r"features of different weights \(a, b\)"):
        import_features.import_features(stores, import_features.find_slide_files([tmp_path / "out"]), "y")


def test_two_encoders_in_clams_folders(half: TileStore, tmp_path: Path):
    for name in ("FEATS_A", "FEATS_B"):
        export_features.export_features([half], "clam", tmp_path / name)
    with pytest.raises(UserError, match=rf"several files of features .*--feature {tmp_path.name}/FEATS_A"):
        import_features.find_slide_files([tmp_path])
    found = import_features.find_slide_files([tmp_path], "FEATS_B")
    assert found[NAME].features == tmp_path / "FEATS_B" / "h5_files" / f"{NAME}.h5"
    assert found[NAME].coords == tmp_path / "FEATS_B" / "patches" / f"{NAME}.h5"
