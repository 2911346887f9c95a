"""Slides in: every kind opens alike; damaged, mislabelled, empty and scale-less ones are refused in one clear line."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest
import tifffile
from PIL import Image

from conftest import ROOT
from data_prep.slide_table import find_slides, slide_names
from data_prep.tile_slides import main, tile_slide
from ldm.data.splits import patient_of, split_of
from ldm.data.store_faults import check_store
from ldm.data.tile_store import TileStore
from ldm.errors import UserError, run_command
from ldm.images.slides import Slide, open_slide
from ldm.images.tissue import TissueMask


@pytest.fixture(params=[0, 4])
def white(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Empty glass with a scanner's noise, clean or with a little dust."""
    rng = np.random.default_rng(0)
    glass = rng.normal((243, 240, 244), 2, (1200, 1000, 3)).clip(0, 255).astype(np.uint8)
    glass[500 : 500 + request.param, 500:504] = 60
    path = tmp_path / "white.png"
    Image.fromarray(glass).save(path)
    return path


def test_reads_what_openslide_reads(demo_slide: Path):
    slide = open_slide(demo_slide)
    assert slide.dimensions == (2220, 2967)
    assert slide.mpp == 0.499
    assert slide.magnification == 20
    want = np.asarray(openslide.OpenSlide(str(demo_slide)).read_region((600, 1900), 0, (300, 200)).convert("RGB"))
    assert np.array_equal(slide.read(600, 1900, 300, 200), want)
    half = slide.read(600, 1900, 300, 200, (150, 100))
    assert np.abs(half.astype(int) - np.asarray(Image.fromarray(want).reduce(2))).mean() < 6
    corner = slide.read(-10, -10, 30, 30)
    assert (corner[:10] == 255).all()
    assert (corner[:, :10] == 255).all()
    assert np.array_equal(corner[10:, 10:], slide.read(0, 0, 20, 20))
    assert (slide.read(5000, 5000, 8, 8) == 255).all()


def test_thumbnail_in_blocks_has_no_seams(demo_slide: Path, monkeypatch: pytest.MonkeyPatch):
    slide = open_slide(demo_slide)
    whole = slide.thumbnail(4.0)
    monkeypatch.setattr("ldm.images.slides._BLOCK", 700)
    assert np.abs(whole.astype(int) - slide.thumbnail(4.0)).mean() < 1.5


def test_ome_tiff_through_tifffile():
    path = ROOT / "data" / "pretrain" / "OS-1-detail.ome.tif"
    slide = open_slide(path)
    assert slide.mpp == pytest.approx(0.2271, rel=1e-3)
    assert np.array_equal(slide.read(100, 200, 64, 32), tifffile.imread(path)[200:232, 100:164])


def test_plain_images_and_transparency(tmp_path: Path):
    rgba = np.zeros((40, 50, 4), np.uint8)
    rgba[:20] = (10, 20, 30, 255)  # below it is transparent
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"--slide-mpp.*0.5 for 20x"):
        open_slide(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png", mpp=0.5)
    assert slide.mpp == 0.5
    assert slide.read(0, 0, 1, 40)[:, 0].tolist() == [[10, 20, 30]] * 20 + [[255, 255, 255]] * 20


def test_tissue_of_the_demo_slide(demo_slide: Path):
    slide = open_slide(demo_slide)
    mask = TissueMask(slide)
    assert 0.3 < mask.mask.mean() < 0.45
    inside, glass = [[900, 2000]], [[20, 20]]
    assert mask.fraction(np.array(inside + glass), 128).tolist() == [1.0, 0.0]
    coords = np.random.default_rng(0).integers(0, 2000, (50, 2))
    sx, sy = mask.mask.shape[1] / 2220, mask.mask.shape[0] / 2967
    for (x, y), fraction in zip(coords, mask.fraction(coords, 200)):
        rows, cols = slice(round(y * sy), round((y + 200) * sy)), slice(round(x * sx), round((x + 200) * sx))
        assert fraction == pytest.approx(mask.mask[rows, cols].mean(), abs=0.06)


@pytest.mark.parametrize("keep", [0.001, 0.01, 0.3, 0.6, 0.9, 0.99, 0.9999])
def test_truncated_slides_are_refused(demo_slide: Path, tmp_path: Path, keep: float):
    data = demo_slide.read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match="was cut short"):
        open_slide(path)


def test_truncated_pixels_are_refused(tmp_path: Path):
    """Directories first, pixels last, as many scanners write: the stump opens and fails only while it is read."""
    pixels = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), dtype=np.uint8)
    path = tmp_path / "a.tif"
    scale = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", **scale)
    assert open_slide(path).mpp == pytest.approx(0.5)
    path.write_bytes(path.read_bytes()[:-200_000])
    with pytest.raises(UserError, match="was cut short"):
        open_slide(path)
    whole = path.with_name("b.tif")
    tifffile.imwrite(whole, pixels, tile=(256, 256), photometric="rgb", compression="jpeg")
    data = bytearray(whole.read_bytes())
    with tifffile.TiffFile(whole) as file:
        start = file.pages[0].dataoffsets[5]
    data[start : start + 3000] = bytes(3000)
    whole.write_bytes(data)
    with pytest.raises(UserError, match="cannot be decoded"):
        open_slide(whole, mpp=0.5).read(0, 0, 1024, 1024)


def test_what_is_no_slide(tmp_path: Path):
    text = tmp_path / "a.svs"
    text.write_text("<html>404 not found</html>")
    with pytest.raises(UserError, match="holds text, not an image; it begins with '<html>404"):
        open_slide(text)
    text.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        open_slide(text)
    text.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(UserError, match="not a slide or image"):
        open_slide(text)
    with pytest.raises(UserError, match="there is no slide"):
        open_slide(tmp_path / "none.svs")
    with pytest.raises(UserError, match="up to 50"):
        open_slide(text, mpp=-1)


def test_screen_resolution_is_no_mpp(tmp_path: Path):
    path = tmp_path / "a.tif"
    pixels = np.zeros((64, 64, 3), np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    with pytest.raises(UserError, match="how many micrometres"):
        open_slide(path)


def test_tiles_are_the_slide(tiny_store: Path, demo_slide: Path):
    store, slide = TileStore.open(tiny_store), open_slide(demo_slide)
    check_store(store.path)
    assert len(store) == (2220 // 256) * (2967 // 256)
    for row in (0, 40, len(store) - 1):
        x, y = store.coords[row].tolist()
        assert np.array_equal(store.tile(row), slide.read(x, y, 256, 256))
    tissue = store.labels("tissue")
    saturation = np.array([np.ptp(store.tile(i), axis=-1).mean() for i in range(len(store))])
    assert saturation[tissue > 0.9].min() > saturation[tissue == 0].max()
    assert store.attrs["level0_size"] == [2220, 2967]


@pytest.mark.slow
def test_coarser_tiles_cover_the_same_field(demo_slide: Path, tmp_path: Path):
    store = TileStore.open(tile_slide(demo_slide, tmp_path, mpp=1.25, tile_size=64, stride=48, min_tissue=0))
    assert store.downsample == pytest.approx(1.25 / 0.499)
    x, y = store.coords[100].tolist()
    side = 64 * store.downsample
    again = open_slide(demo_slide).read(x, y, side, side, (64, 64))
    assert np.array_equal(store.tile(100), again)
    columns = int((2220 - side) // (48 * store.downsample)) + 1
    assert store.coords[columns].tolist() == [0, int(48 * store.downsample)]
    with pytest.raises(UserError, match="blown up"):
        tile_slide(demo_slide, tmp_path, mpp=0.25)


@pytest.mark.slow
def test_background_is_kept_by_seed(demo_slide: Path, tmp_path: Path):
    few = TileStore.open(tile_slide(demo_slide, tmp_path / "a", keep_background=0.0, tile_size=128, stride=128))
    more = TileStore.open(tile_slide(demo_slide, tmp_path / "b", keep_background=0.3, tile_size=128, stride=128))
    assert few.labels("tissue").min() >= 0.25
    glass = int((more.labels("tissue") < 0.25).sum())
    assert len(more) - len(few) == glass
    assert 0.2 < glass / ((2220 // 128) * (2967 // 128) - len(few)) < 0.4
    with pytest.raises(UserError, match="other settings"):
        tile_slide(demo_slide, tmp_path / "a", keep_background=0.3, tile_size=128, stride=128)


@pytest.mark.slow
def test_tiles_touch_unless_a_stride_is_given(demo_slide, tmp_path):
    store = TileStore.open(tile_slide(demo_slide, tmp_path, tile_size=128))
    assert store.stride == 128
    xs = sorted({int(x) for x, _ in store.coords[:]})
    assert min(b - a for a, b in pairwise(xs)) == 128


@pytest.mark.slow
def test_empty_glass(white: Path, tmp_path: Path):
    assert not TissueMask(open_slide(white, 0.5)).mask.any()
    with pytest.raises(UserError, match="no tissue found"):
        tile_slide(white, tmp_path / "out", slide_mpp=0.5)
    assert not (tmp_path / "out").exists()
    store = TileStore.open(tile_slide(white, tmp_path / "out", slide_mpp=0.5, min_tissue=0))
    assert len(store) == 3 * 4


def test_command_goes_on_after_a_bad_slide(demo_slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    white = tmp_path / "white.png"
    Image.new("RGB", (600, 600), "white").save(white)
    (tmp_path / "text.svs").write_text("no slide")
    out = tmp_path / "cohort"
    slides = [str(path) for path in (tmp_path / "text.svs", demo_slide, white)]
    command = ["--slides", *slides, "--out", str(out), "--stride", "512"]
    assert run_command(lambda: main(command)) == 2
    error = capsys.readouterr().err
    assert "2 of 3 slides could not be tiled" in error
    assert "Traceback" not in error
    index = pd.read_parquet(out / "index.parquet")
    assert list(index.columns) == ["slide", "row", "x", "y", "blur", "dark", "pen", "tissue", "patient", "split"]
    assert [p.name for p in (out / "slides").iterdir()] == ["CMU-1-Small-Region.zarr"]

    index["split"], index["mine"] = "test", 1.5  # a user's own columns and splits stay
    index.to_parquet(out / "index.parquet")
    assert run_command(lambda: main(["--slides", str(demo_slide), "--out", str(out), "--stride", "512"])) == 0
    again = pd.read_parquet(out / "index.parquet")
    assert again.equals(index)


@pytest.mark.slow
def test_held_out_box(demo_slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--slides", str(demo_slide), "--out", str(tmp_path), "--tile-size", "128", "--stride", "64"]

    def run(*options: str) -> int:
        return run_command(lambda: main([*command, *options]))

    assert run("--holdout", "0,1856,2220,512") == 0
    index = pd.read_parquet(tmp_path / "index.parquet")
    inside, below = index["y"].between(1856, 1856 + 512 - 128), index["y"].between(1856 - 127, 1856 + 511)
    assert (index["split"] == np.where(inside, "val", np.where(below, "none", "train"))).all()
    assert run("--holdout", "0,1856,2220,512") == 0
    assert run() == 0
    assert pd.read_parquet(tmp_path / "index.parquet").equals(index)
    assert run("--holdout", "0,1000,2220,512") == 2  # the index would go on saying train of what is held out now
    assert "other splits" in capsys.readouterr().err
    assert run("--holdout", "0,0,100,100") == 2
    assert "no tile of" in capsys.readouterr().err
    assert pd.read_parquet(tmp_path / "index.parquet").equals(index)


@pytest.mark.slow
def test_a_cohort_of_patients_gets_a_validation_split(demo_slide: Path, tmp_path: Path, capsys):
    out, slides = tmp_path / "cohort", tmp_path / "slides"
    slides.mkdir()

    def tile(*options: str) -> dict[str, set[str]]:
        main(["--slides", str(slides), "--out", str(out), "--tile-size", "512", "--stride", "1024", *options])
        return pd.read_parquet(out / "index.parquet").groupby("patient")["split"].agg(set).to_dict()

    for name in "ab":
        (slides / f"{name}.svs").symlink_to(demo_slide)
    assert tile() == {"a": {"train"}, "b": {"train"}}
    told = "no tile is held out in split 'val', on which a training validates; nothing else needs it. It takes three"
    assert told in capsys.readouterr().out
    (slides / "c.svs").symlink_to(demo_slide)
    assert tile() == {"a": {"train"}, "b": {"train"}, "c": {"val"}}
    said = capsys.readouterr().out
    assert "note: 1 of 3 patients is in split 'val', on which a training validates; --validation asks" in said

    index = pd.read_parquet(out / "index.parquet").assign(split="train", mine=1)
    index.to_parquet(out / "index.parquet")
    assert set.union(*tile().values()) == {"train"}  # what the index has stays, until a fraction is asked for
    assert "--validation 0.2 would take one of the 3 patients" in capsys.readouterr().out
    splits = tile("--validation", "0.2")
    assert splits == {name: {split_of(name, 0.2, 0)} for name in "abc"}
    assert {"val"} in splits.values()
    assert (pd.read_parquet(out / "index.parquet")["mine"] == 1).all()


def test_same_name_twice(demo_slide: Path, tmp_path: Path):
    (tmp_path / demo_slide.name).write_bytes(b"x")
    with pytest.raises(UserError, match="both become"):
        slide_names(find_slides([demo_slide, tmp_path]))
    with pytest.raises(UserError, match="no slide found"):
        find_slides([Path(__file__).parent / "configs"])


def test_patients_and_splits():
    assert patient_of("TCGA-CR-7395-01A-01-TS1.svs") == "TCGA-CR-7395"
    assert patient_of("CMU-1-Small-Region.svs") == "CMU-1-Small-Region"
    splits = [split_of(f"patient {i}", 0.1, 0.2) for i in range(2000)]
    assert splits.count("test") / 2000 == pytest.approx(0.2, abs=0.03)
    assert splits.count("val") / 2000 == pytest.approx(0.1, abs=0.03)
    assert {split_of("a", 0, 0), split_of("b", 0, 0)} == {"train"}


@pytest.mark.parametrize("spread", [0, 12])
def test_a_slide_of_one_colour_is_all_tissue(spread: int):
    """Its colour (max - min) hardly varies, so that Otsu's histogram has no bins."""
    rng = np.random.default_rng(1)
    pixels = np.array([210, 120, 170]) + rng.integers(-30, 30, 3) + rng.normal(0, spread, (72, 72, 1))
    mask = TissueMask(Slide.of_pixels(pixels.clip(0, 255).astype(np.uint8), mpp=1.0)).mask
    assert mask.all()


def test_a_small_picture_of_glass_has_no_tissue():
    """Glass narrower than the holes in tissue that are filled is none of them."""
    pixels = np.random.default_rng(0).normal(243, 3, (150, 150, 3)).clip(0, 255).astype(np.uint8)
    assert not TissueMask(Slide.of_pixels(pixels, mpp=0.495)).mask.any()
