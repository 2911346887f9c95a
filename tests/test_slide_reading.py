"""Tiles of slides are read fast, and to the pixel as OpenSlide and `Slide.read` give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from conftest import ROOT
from ldm.errors import UserError
from ldm.images.scanned import _direct, open_scanned
from ldm.images.slides import Slide, open_image, open_slide
from ldm.images.source import Source


@pytest.fixture(scope="module")
def aperio(tmp_path_factory: pytest.TempPathFactory, demo_slide: Path) -> Path:
    """A slide as Aperio writes them, whose levels are 1, 4 and nearly 8 times smaller."""
    pixels = open_slide(demo_slide).read(200, 1500, 1500, 1100)
    path = tmp_path_factory.mktemp("aperio") / "a.svs"
    about = "Aperio Image Library v11\r\n1500x1100 |AppMag = 20|MPP = 0.499"
    with tifffile.TiffWriter(path) as file:
        for level in (pixels, pixels[::4, ::4], pixels[::8, ::8][:137, :187]):
            how = {"tile": (240, 240), "photometric": "rgb", "compression": "jpeg", "metadata": None}
            file.write(np.ascontiguousarray(level), description=about, **how)
    return path


def test_levels_of_jpeg_tiles_are_read_as_openslide_reads_them(aperio: Path):
    file, source = openslide.OpenSlide(str(aperio)), open_scanned(aperio)
    assert source.levels == [(1500, 1100), (375, 275), (187, 137)]
    assert file.level_downsamples[2] != 8

    def composed(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        corner = (round(x * file.level_downsamples[level]), round(y * file.level_downsamples[level]))
        return np.asarray(file.read_region(corner, level, (w, h)).convert("RGB"))

    assert set(_direct(aperio, file, composed)) == {0, 1}  # the last is shifted by parts of a pixel
    assert source.loose == {2}
    rng = np.random.default_rng(0)
    for level in (0, 1):
        width, height = source.levels[level]
        for _ in range(60):
            w, h = (int(rng.integers(1, min(600, side) + 1)) for side in (width, height))
            window = (int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h)
            assert np.array_equal(source.read(level, *window), composed(level, *window))


def test_what_only_openslide_can_read_it_reads(aperio: Path, tmp_path: Path):
    """A level with a gap, which OpenSlide fills from the one before; a tile that is damaged."""
    whole, gap, damaged = aperio.read_bytes(), tmp_path / "gap.svs", tmp_path / "damaged.svs"
    gap.write_bytes(whole)
    with tifffile.TiffFile(gap, mode="r+") as file:
        counts = file.pages[1].tags["TileByteCounts"]
        counts.overwrite([0, *counts.value[1:]])
        start = file.pages[0].dataoffsets[8]
    read = np.asarray(openslide.OpenSlide(str(gap)).read_region((0, 0), 1, (240, 240)).convert("RGB"))
    assert read.std() > 10
    assert np.array_equal(open_scanned(gap).read(1, 0, 0, 240, 240), read)
    damaged.write_bytes(whole[:start] + bytes(2000) + whole[start + 2000 :])
    slide = open_slide(damaged)
    with pytest.raises(UserError, match=r"damaged\.svs cannot be decoded at x=200, y=200 .*JPEG"):
        slide.read(200, 200, 256, 256)
    assert np.array_equal(slide.read(500, 0, 256, 256), open_slide(aperio).read(500, 0, 256, 256))


@pytest.mark.parametrize(
    ("extent", "side", "step"),
    [(256, 256, 256), (256, 256, 100), (300.5, 256, 128.3), (1024, 256, 300), (2048, 64, 511), (200, 256, 64)],
)
@pytest.mark.parametrize(
    "name", ["aperio", "demo/CMU-1-Small-Region.svs", "samples/cancers/TCGA-CR-7395_1600,2400.png"]
)
def test_tiles_together_are_those_that_are_read_alone(request, name: str, extent: float, side: int, step: float):
    slide = open_image(request.getfixturevalue("aperio") if name == "aperio" else ROOT / "data" / name)
    width, height = slide.dimensions
    x, y = np.meshgrid(np.arange(-50, width, step), np.arange(-20, height, 2 * step))
    coords = np.stack([x.ravel(), y.ravel()], 1)[:60]
    coords = np.concatenate([coords, coords[:3], coords[10:12] + 1])  # an order that is none
    tiles = slide.read_tiles(coords, extent, side)
    for corner, tile in zip(coords.tolist(), tiles):
        assert np.array_equal(tile, slide.read(*corner, extent, extent, (side, side)))


def test_each_pixel_of_a_row_of_overlapping_tiles_is_read_once():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 2000, 3), dtype=np.uint8)
    read = []

    def window(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        read.append(w * h)
        return pixels[y : y + h, x : x + w]

    slide = Slide(Path("a"), Source([(2000, 300)], window), 0.5)
    coords = np.array([(x, 0) for x in range(0, 1700, 64)])
    assert slide.read_tiles(coords, 256, 256).shape == (27, 256, 256, 3)
    assert sum(read) == (26 * 64 + 256) * 256
    read.clear()
    loose = Slide(Path("a"), Source([(2000, 300)], window, loose=frozenset([0])), 0.5)
    assert np.array_equal(loose.read_tiles(coords, 256, 256), slide.read_tiles(coords, 256, 256))
    assert len(read) == 27 + 1
