"""Stores hold tiles without loss, as JPEG, or not at all: everything that reads tiles takes all three."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from torch.utils.data import DataLoader

from conftest import ROOT
from data_prep.encode_latents import encode_latents
from data_prep.extract_features import extract
from data_prep.prepare import main as prepare
from data_prep.repair import Sources, repair
from data_prep.slide_stages import size_of
from data_prep.tile_slides import main, tile_slide
from data_prep.verify import verify
from ldm.cli import app
from ldm.commands.describe import describe_stores
from ldm.data.datasets import TileDataset
from ldm.data.image_sets import content_sha256, open_images
from ldm.data.jpeg_codec import decode, encode
from ldm.data.module import TileDataModule
from ldm.data.slide_tiles import WHERE, NoSlide, identity
from ldm.data.store_faults import FILE, SLIDE, find_faults
from ldm.data.store_writers import TileStoreWriter
from ldm.data.tile_store import PIXELS, TileStore, open_cohort
from ldm.errors import UserError, run_command
from ldm.images.write import save_ome_zarr
from ldm.viewer.pictures import find
from ldm.viewer.server import Gallery

MODELS = ROOT / "data" / "models"


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, demo_slide: Path) -> Path:
    folder = tmp_path_factory.mktemp("here") / "slides"
    folder.mkdir()
    return Path(shutil.copy(demo_slide, folder / "a.svs")).parent


@pytest.fixture(scope="module")
def cohorts(slides: Path) -> dict[str, Path]:
    """The demo slide in tiles of 128 px, by what is stored of their pixels; beside the folder of slides."""
    made = {}
    for pixels in PIXELS:
        made[pixels] = slides.parent / pixels
        words = ["--slides", str(slides), "--out", str(made[pixels]), "--tile-size", "128", "--stride", "100"]
        main([*words, "--pixels", pixels, "--no-previews"])
    return made


@pytest.fixture(scope="module")
def stores(cohorts: dict[str, Path]) -> dict[str, TileStore]:
    return {pixels: open_cohort(cohort)[0] for pixels, cohort in cohorts.items()}


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def test_tiles_are_the_same_without_loss_and_near_as_jpeg(stores: dict[str, TileStore]):
    lossless, jpeg, none = (stores[pixels] for pixels in PIXELS)
    assert len(lossless) == len(jpeg) == len(none) > 200
    want = lossless.tiles[:]
    assert np.array_equal(none.tiles[:], want)
    assert (none.tiles.shape, none.tiles.dtype, none.tiles.ndim) == (want.shape, np.uint8, 4)
    for key in (3, -1, slice(5, 9), [7, 2], (slice(2, 4), 0), slice(None, None, 50), (..., 1)):
        assert np.array_equal(none.tiles[key], want[key])
    assert np.array_equal(none.tile(11), want[11])
    for row in (-1, len(none)):
        with pytest.raises(IndexError):
            none.tile(row)
    near = jpeg.tiles[:]
    assert psnr(near, want) > 35  # of quality 90
    assert min(psnr(a, b) for a, b in zip(near, want)) > 31
    assert np.array_equal(jpeg.tile(11), near[11])
    for store in (jpeg, none):
        assert np.array_equal(store.coords, lossless.coords)
        for label in lossless.label_names:
            assert np.array_equal(store.labels(label), lossless.labels(label))


def test_what_they_say_and_how_large_they_are(stores: dict[str, TileStore], slides: Path, capsys):
    told = {pixels: json.loads((store.path / "zarr.json").read_text()) for pixels, store in stores.items()}
    told = {pixels: each["attributes"]["histoldm"] for pixels, each in told.items()}
    assert {pixels: (each["pixels"], each["format"]) for pixels, each in told.items()} == {
        "zstd": ("zstd", 1), "jpeg": ("jpeg", 2), "none": ("none", 2),
    }  # fmt: skip
    assert told["jpeg"]["jpeg_quality"] == 90
    assert told["none"]["slide_file"]["path"] == "../../../slides/a.svs"
    assert str(slides) not in json.dumps(told)
    assert not (stores["none"].path / "tiles").exists()
    sizes = {pixels: size_of(store.path) for pixels, store in stores.items()}
    assert sizes["zstd"] > 3 * sizes["jpeg"] > 30 * sizes["none"]
    describe_stores(stores["jpeg"].path)
    describe_stores(stores["none"].path)
    said = capsys.readouterr().out
    assert "tiles of 128 px at 0.499 um per pixel, as JPEG of quality 90\n" in said
    assert "tiles of 128 px at 0.499 um per pixel, read from the slide\n" in said


def test_all_that_reads_tiles_takes_each_kind(slides: Path, tmp_path: Path):
    cohorts = {pixels: tmp_path / pixels for pixels in PIXELS}
    for pixels, cohort in cohorts.items():
        words = ["--slides", str(slides), "--out", str(cohort), "--tile-size", "128", "--stride", "450"]
        main([*words, "--pixels", pixels, "--no-previews"])
    few = slice(0, 12)
    features, latents, images, contents = {}, {}, {}, {}
    for pixels, cohort in cohorts.items():
        stores = open_cohort(cohort)
        extract(stores, MODELS / "demo-encoder", any_mpp=True)
        encode_latents(stores, MODELS / "demo-ssl")
        features[pixels] = stores[0].features("demo-encoder")[:]
        latents[pixels] = stores[0].latents("demo-ssl")[few]
        assert verify(cohort) == []
        data = TileDataset(str(cohort), ("image", "ssl"), feature="demo-encoder", where="split=train")
        loaded = next(iter(DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="fork")))
        assert torch.equal(loaded["image"], torch.stack([data[i]["image"] for i in range(8)]))
        held = TileDataset(str(cohort), ("image",), in_memory=True)
        images[pixels] = torch.stack([held[i]["image"] for i in range(12)])
        shown = open_images(cohort)
        assert shown.pictures[5].size == (128, 128)
        contents[pixels] = content_sha256(shown)
    for made in (features, latents, images):
        assert np.array_equal(made["none"], made["zstd"])
        assert not np.array_equal(made["jpeg"], made["zstd"])
    assert len(set(contents.values())) == 3
    similar = [np.corrcoef(a, b)[0, 1] for a, b in zip(features["jpeg"].astype(float), features["zstd"].astype(float))]
    assert np.median(similar) > 0.99


@pytest.mark.parametrize("stop_at", [5, 40, 100])
def test_an_interrupted_store_of_jpegs_loses_nothing_twice(tmp_path: Path, stores, stop_at: int, monkeypatch):
    monkeypatch.setattr("ldm.data.shards.SHARD_ROWS", 32)
    tiles, coords = stores["zstd"].tiles[:150], stores["zstd"].coords[:150]
    attrs = {"slide": "a", "mpp": 1.0, "tile_size": 128, "stride": 128, "level0_size": [9, 9], "downsample": 1.0}
    attrs |= {"pixels": "jpeg", "jpeg_quality": 60}

    def write(path: Path, batch: int, until: int = 150) -> None:
        with TileStoreWriter.create(path, 150, attrs) as writer:
            for start in range(writer.rows, until, batch):
                writer.append(tiles[start : min(start + batch, until)], coords[start : min(start + batch, until)])
            if until < 150:
                raise KeyboardInterrupt

    write(tmp_path / "whole.zarr", 13)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.zarr", 7, stop_at)
    assert len(TileStore.open(tmp_path / "a.zarr", allow_incomplete=True)) == stop_at
    write(tmp_path / "a.zarr", 11)
    assert files(tmp_path / "a.zarr") == files(tmp_path / "whole.zarr")
    again = np.empty_like(tiles[0])
    for row, tile in enumerate(tiles):
        decode(encode(tile, 60), again)
        assert np.array_equal(TileStore.open(tmp_path / "a.zarr").tile(row), again)


def test_zarr_reads_jpegs_with_the_toolkit_and_says_what_is_missing_without(stores: dict[str, TileStore]):
    path = stores["jpeg"].path / "tiles"
    assert np.array_equal(zarr.open_array(str(path), mode="r")[5:8], stores["jpeg"].tiles[5:8])
    alone = "import importlib.metadata as m, sys; m.entry_points = lambda **_: m.EntryPoints(); import zarr; "
    code = alone + "zarr.open_array(sys.argv[1], mode='r')[0]"  # as where the toolkit is not installed
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode != 0
    assert "histoldm.jpeg" in done.stderr


def test_a_jpeg_of_another_size_or_none_is_told(tmp_path: Path):
    tile = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(encode(tile, 90), np.empty((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(b"no JPEG", tile)


@pytest.mark.parametrize(("pixels", "quality"), [("webp", None), ("jpeg", 0), ("jpeg", 101)])
def test_other_pixels_are_refused(tmp_path: Path, demo_slide: Path, pixels: str, quality: int):
    with pytest.raises(UserError, match="pixels are zstd, jpeg, none, JPEG's quality 1 to 100"):
        tile_slide(demo_slide, tmp_path, pixels=pixels, jpeg_quality=quality)


def test_a_store_is_of_one_kind(cohorts: dict[str, Path], slides: Path):
    for pixels, other in (("zstd", "jpeg"), ("jpeg", "none"), ("none", "zstd")):
        with pytest.raises(UserError, match=f"pixels was '{pixels}', now '{other}'"):
            tile_slide(slides / "a.svs", cohorts[pixels], tile_size=128, stride=100, pixels=other, previews=False)
    with pytest.raises(UserError, match="jpeg_quality was 90, now 50"):
        tile_slide(slides / "a.svs", cohorts["jpeg"], tile_size=128, stride=100, pixels="jpeg", jpeg_quality=50)
    words = ["--slides", str(slides), "--out", str(cohorts["none"]), "--tile-size", "128", "--stride", "100"]
    with pytest.raises(UserError, match="was made with pixels none, and pixels zstd is asked for now"):
        prepare([*words, "--no-previews"])


# --- where the slide lies ---------------------------------------------------------------------------------------------


@pytest.fixture
def moved(cohorts: dict[str, Path], slides: Path, tmp_path: Path, monkeypatch) -> Path:
    """A store without pixels, and its slide, in other folders than when it was made."""
    monkeypatch.delenv(WHERE, raising=False)
    shutil.copytree(cohorts["none"], tmp_path / "elsewhere" / "cohort")
    (tmp_path / "wsi" / "case-1").mkdir(parents=True)
    shutil.copy(slides / "a.svs", tmp_path / "wsi" / "case-1" / "a.svs")
    return tmp_path / "elsewhere" / "cohort" / "slides" / "a.zarr"


def test_the_slide_is_found_where_it_is_said_to_lie(moved: Path, stores: dict[str, TileStore], monkeypatch):
    want = stores["zstd"].tile(5)
    told = r"a\.zarr holds coordinates alone, .* its slide a\.svs: it was not found\. Say .*export HISTOLDM_SLIDES="
    with pytest.raises(UserError, match=told):
        TileStore.open(moved).tile(5)
    wsi = moved.parents[3] / "wsi"
    for given in (wsi, wsi / "case-1", wsi / "case-1" / "a.svs"):
        assert np.array_equal(TileStore.open(moved, slides=[given]).tile(5), want)
    again = pickle.loads(pickle.dumps(TileStore.open(moved, slides=[wsi])))
    assert np.array_equal(again.tile(5), want)
    data = TileDataset(str(moved), ("image",), slides=[str(wsi)])
    assert torch.equal(data[5]["image"], TileDataset(str(stores["zstd"].path), ("image",))[5]["image"])
    monkeypatch.setenv(WHERE, f"/nowhere:{wsi}")
    assert np.array_equal(TileStore.open(moved).tile(5), want)
    monkeypatch.delenv(WHERE)
    shutil.copytree(wsi / "case-1", moved.parents[2] / "slides")  # as it lay when the store was made
    assert np.array_equal(TileStore.open(moved).tile(5), want)


def test_another_slide_of_that_name_is_not_taken(moved: Path, tmp_path: Path):
    other = tmp_path / "wsi" / "a.svs"
    whole = (tmp_path / "wsi" / "case-1" / "a.svs").read_bytes()
    other.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    Image.fromarray(np.full((400, 400, 3), 90, np.uint8)).save(tmp_path / "b.png")
    store = TileStore.open(moved, slides=[other])
    with pytest.raises(UserError, match=r"its slide a\.svs: .*wsi/a\.svs is another file of that name"):
        store.tile(0)
    found = TileStore.open(moved, slides=[tmp_path / "wsi"])  # the right one lies deeper
    assert found.tiles.slide == tmp_path / "wsi" / "case-1" / "a.svs"


def test_tiling_again_records_where_the_slide_lies_now(moved: Path, stores: dict[str, TileStore]):
    wsi = moved.parents[3] / "wsi"
    words = ["--slides", str(wsi / "case-1"), "--out", str(moved.parents[1]), "--tile-size", "128", "--stride", "100"]
    for command in (main, prepare):
        shutil.rmtree(moved)
        shutil.copytree(stores["none"].path, moved)
        command([*words, "--pixels", "none", "--no-previews"])
        assert TileStore.open(moved).tiles.slide.resolve() == wsi / "case-1" / "a.svs"
        assert np.array_equal(TileStore.open(moved).tile(5), stores["zstd"].tile(5))
        assert verify(moved) == []
    other = wsi / "case-1" / "a.svs"
    whole = other.read_bytes()
    other.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # as many bytes
    with pytest.raises(UserError, match=r"a\.zarr is of another file than the slide a\.svs that is given"):
        main([*words, "--pixels", "none", "--no-previews"])


def test_tiles_are_sampled_where_the_slide_is_not(moved: Path, tmp_path: Path, capsys):
    extract(open_cohort(moved, slides=[tmp_path / "wsi"]), MODELS / "demo-encoder", any_mpp=True)
    words = ["--model", MODELS / "demo-ssl", "--features", moved, "--count", 1, "--steps", 1, "--out", tmp_path / "out"]
    app(["sample", *map(str, words)], standalone_mode=False)
    said = capsys.readouterr()
    assert "wrote 1 tiles" in said.out
    assert "contact_sheet.png shows no real tiles: " in said.err
    assert "its slide a.svs: it was not found" in said.err


def test_a_training_says_in_one_line_that_a_slide_is_not_there(moved: Path, capsys):
    node = {"target": "ldm.data.datasets.TileDataset", "params": {"stores": str(moved), "keys": ["image"]}}
    with pytest.raises(NoSlide, match="it was not found"):
        TileDataModule(node)  # at once, and not when it comes to that tile
    loader = DataLoader(TileDataset(str(moved)), num_workers=1, multiprocessing_context="fork")
    assert run_command(lambda: next(iter(loader))) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {moved} holds coordinates alone, ")
    assert said.count("\n") == 1


def test_the_viewer_takes_a_cohort_and_tells_once_that_a_slide_is_not_there(moved: Path, tmp_path: Path, monkeypatch):
    with pytest.raises(UserError) as told:
        Gallery(find([moved.parents[1]]))
    assert str(told.value).count("it was not found") == 1
    monkeypatch.setenv(WHERE, str(tmp_path / "wsi"))
    gallery = Gallery(find([moved.parents[1]]))
    assert len(gallery.told) == len(TileStore.open(moved))
    assert gallery.thumbnail(5).shape == (128, 128, 3)


def test_folders_of_ome_zarr_that_say_the_same_are_told_apart(tmp_path: Path, stores: dict[str, TileStore]):
    tiles = {tmp_path / "x": stores["zstd"].tile(5), tmp_path / "y": stores["zstd"].tile(6)}
    one, other = (save_ome_zarr(folder / "a.ome.zarr", tile, 0.5, {}) for folder, tile in tiles.items())
    assert (one / "zarr.json").read_bytes() == (other / "zarr.json").read_bytes()
    assert identity(one) == identity(Path(shutil.copytree(one, tmp_path / "z" / "a.ome.zarr")))
    assert identity(one) != identity(other)
    for each in (one, other):  # as bioformats2raw lays an image out
        (each.parent / "several" / "0").mkdir(parents=True)
        each.rename(each.parent / "several" / "0")
    assert identity(one.parent / "several") != identity(other.parent / "several")


def _read(path: Path, slides: list[Path], queue) -> None:
    store = TileStore.open(path, slides=slides)
    queue.put(int(store.tiles[0:40].sum()))


def test_forked_processes_read_beside_each_other(moved: Path, stores: dict[str, TileStore]):
    wsi = [moved.parents[3] / "wsi"]
    want = int(stores["zstd"].tiles[0:40].sum())
    assert int(TileStore.open(moved, slides=wsi).tiles[0:40].sum()) == want  # opened in this process too
    context = get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read, args=(moved, wsi, queue)) for _ in range(3)]
    for child in children:
        child.start()
    try:
        assert [queue.get(timeout=60) for _ in children] == [want] * 3
    finally:
        for child in children:
            child.kill()
            child.join()


def test_verify_looks_for_the_slide(moved: Path):
    (fault,) = find_faults(moved)
    assert (fault.kind, fault.array) == (SLIDE, "tiles")
    assert fault.what.endswith("pixels are read from its slide a.svs: it was not found")
    ((line, mended),) = repair([fault], Sources())
    assert not mended
    assert "give the folder of its slide by --slides here, and by $HISTOLDM_SLIDES to other commands" in line
    assert list(find_faults(moved, [moved.parents[3] / "wsi"])) == []


@pytest.mark.parametrize("pixels", ["jpeg", "none"])
def test_files_are_made_again_to_the_byte(cohorts: dict[str, Path], slides: Path, tmp_path: Path, pixels: str):
    cohort = Path(shutil.copytree(cohorts[pixels], cohorts[pixels].with_name(f"mended-{pixels}")))
    before = files(cohort)
    arrays = ["coords", "labels/blur", "labels/tissue"] + ["tiles"] * (pixels == "jpeg")
    for array in arrays:
        file = next(p for p in (cohort / "slides/a.zarr" / array / "c").rglob("*") if p.is_file())
        file.write_bytes(file.read_bytes()[:-40])
    faults = verify(cohort)
    assert sorted(fault.array for fault in faults if fault.kind == FILE) == sorted(arrays)
    assert all(line.endswith("made again, as it was") for line, _ in repair(faults, Sources([slides])))
    assert files(cohort) == before
    shutil.rmtree(cohort)


def test_prepare_records_the_slide_and_not_its_copy(slides: Path, tmp_path: Path, capsys):
    words = ["--slides", str(slides), "--out", str(tmp_path / "cohort"), "--tile-size", "256", "--pixels", "none"]
    prepare([*words, "--cache", str(tmp_path / "cache"), "--no-previews"])
    assert "record where their slides lie, relative to the store" in capsys.readouterr().err
    store = TileStore.open(tmp_path / "cohort" / "slides" / "a.zarr")
    assert store.tiles.slide.resolve() == slides / "a.svs"
    assert store.tile(0).std() > 1
