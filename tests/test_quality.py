"""Pen, blur and dark of tiles: faults are found, and tissue of many scanners and stains is not taken for one."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from data_prep.tile_slides import main, tile_slide
from ldm.data.datasets import TileDataset
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.images.previews import preview_files
from ldm.images.quality import LIMITS, QUALITY, flagged, quality_of
from ldm.images.slides import open_image, open_slide

RNG = np.random.default_rng(0)
# file or folder below shared/data -> micrometres per pixel, by their headers or as their sources say
SOURCES = {
    "he/CMU-1-Small-Region.svs": 0.5,
    "he/TCGA-CR-7395-01A-01-TS1.svs": 1.0,
    "he/OS-1-detail.ome.tif": 0.227,
    "he/histolab_tiles/tcga-lung-rgb.png": 0.25,
    "he/histolab_tiles/medium-nuclei-score-level0.png": 0.25,
    "he/histolab_tiles/medium-nuclei-score-level1-2.png": 0.5,
    "ihc/OS-2-ndpi.ome.tif": 0.227,  # DAB with blue nuclei
    "ihc/OS-2-vsi.ome.tif": 0.346,
    "ihc/skimage_ihc.png": 0.5,  # DAB
    "more/he/instanseg_HE_example.ome.tif": 0.5,
    "more/he/ucsb_breast": 0.5,
    "more/he/brecahad/images": 0.25,
    "more/he/nct_crc_nonorm": 0.5,
    "more/geojson/puma/training_set_metastatic_roi_094.tif": 0.23,
}
INKS = {"green": (20, 130, 90), "blue": (25, 60, 170), "red": (215, 30, 50)}


@pytest.fixture(scope="module")
def tissue(shared) -> list[tuple[float, np.ndarray]]:
    """Real tiles with tissue, and their micrometres per pixel."""
    tiles = []
    for name, mpp in SOURCES.items():
        path: Path = shared(f"data/{name}")
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            image = open_image(file)
            width, height = image.dimensions
            side = min(256, width, height)
            corners = [(x, y) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)]
            found = [image.read(*corner, side, side) for corner in corners]
            tiles += [(mpp, each) for each in found if (each.min(-1) < 215).mean() > 0.25][:40]
    assert len(tiles) > 250
    return tiles


def measured(tiles: list[tuple[float, np.ndarray]]) -> dict[str, np.ndarray]:
    each = [quality_of(tile[None], mpp) for mpp, tile in tiles]
    return {name: np.concatenate([found[name] for found in each]) for name in QUALITY}


def out_of_focus(tile: np.ndarray, um: float, mpp: float) -> np.ndarray:
    """A blurred tile with the noise of a camera and of JPEG, which an image out of focus has too."""
    soft = gaussian_filter(tile.astype(float), (um / mpp, um / mpp, 0)) + RNG.normal(0, 1.5, tile.shape)
    stream = io.BytesIO()
    Image.fromarray(soft.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return np.asarray(Image.open(stream))


def test_tissue_in_focus_has_no_fault(tissue):
    found = measured(tissue)
    assert found["pen"].max() < LIMITS["pen"] / 2
    assert found["blur"].max() < LIMITS["blur"]
    assert (found["dark"] > LIMITS["dark"]).mean() < 0.01
    assert all(((values >= 0) & (values <= 1)).all() and values.dtype == np.float32 for values in found.values())


@pytest.mark.slow
def test_blurred_tissue_ranks_below_and_is_told_from_sharp(tissue):
    tissue = tissue[::3]
    sharp = measured(tissue)["blur"]
    before = sharp
    for um in (0.5, 1, 2):
        soft = measured([(mpp, out_of_focus(tile, um, mpp)) for mpp, tile in tissue])["blur"]
        assert (soft > before).mean() > 0.99
        assert um < 1 or soft.min() > LIMITS["blur"] > sharp.max()
        before = soft
    gone = measured([(mpp, out_of_focus(tile, 8, mpp)) for mpp, tile in tissue])["blur"]
    assert (gone > LIMITS["blur"]).mean() > 0.97  # without any edge left


def test_ink_over_tissue_and_glass(tissue):
    for colour, through in INKS.items():
        ink = np.array(through) / 255
        found = measured([(mpp, (tile * ink).astype(np.uint8)) for mpp, tile in tissue[::4]])
        assert (found["pen"] > 0.2).mean() > 0.8, colour
        glass = quality_of((np.full((1, 256, 256, 3), 243) * ink).astype(np.uint8), 0.5)
        assert glass["pen"] == 1
    black = measured([(mpp, (tile * 0.12).astype(np.uint8)) for mpp, tile in tissue[::4]])
    assert black["dark"].min() == 1


def test_a_real_green_mark(shared):
    image = open_image(shared("data/he/histolab_tiles/medium-nuclei-score-green-pen-level1.png"))
    tiles = np.stack([image.read(x, y, 256, 256) for y in (0, 256) for x in (0, 256)])
    for mpp in (0.25, 0.5, 1.0):
        pen = quality_of(tiles, mpp)["pen"]
        assert (pen[:2] > 0.4).all()  # the upper half is under the mark, the lower is not
        assert (pen[2:] < 0.06).all()


def test_glass_has_no_fault_and_shares_are_shares():
    glass = RNG.normal((243, 240, 244), 2, (2, 256, 256, 3)).clip(0, 255).astype(np.uint8)
    glass[1, :, :64] = (20, 140, 90)  # a quarter green
    found = quality_of(glass, 0.5)
    assert found["pen"].tolist() == [0, 0.25]
    assert found["blur"][0] == 0
    assert found["dark"].tolist() == [0, 0]
    glass[0, :128] = 20
    assert quality_of(glass, 0.5)["dark"][0] == 0.5
    for side, mpp in ((8, 0.25), (8, 16.0), (31, 1.0), (1024, 0.25)):  # small and odd ones too
        assert all(len(values) == 1 for values in quality_of(glass[:1, :side, :side], mpp).values())


def test_measures_do_not_depend_on_the_resolution(demo_slide: Path):
    """The same tissue, out of focus by a micrometre, at twice the pixels."""
    slide = open_slide(demo_slide)
    fine = np.stack([out_of_focus(slide.read(x, y, 512, 512), 1, 0.25) for x, y in ((600, 1500), (800, 2000))])
    coarse = np.stack([np.asarray(Image.fromarray(tile).reduce(2)) for tile in fine])
    one, other = quality_of(fine, 0.25), quality_of(coarse, 0.5)
    assert one["dark"] == pytest.approx(other["dark"], abs=0.02)
    assert one["blur"] == pytest.approx(other["blur"], abs=0.05)
    assert one["blur"].min() > LIMITS["blur"] - 0.05


def test_labels_of_tiles_select_them(demo_slide: Path, tmp_path, capsys):
    main(["--slides", str(demo_slide), "--out", str(tmp_path), "--keep-background", "1"])
    store = TileStore.open(tmp_path / "slides/CMU-1-Small-Region.zarr")
    assert store.label_names == ["blur", "dark", "pen", "tissue"]
    again = quality_of(np.stack([store.tile(row) for row in range(len(store))]), store.mpp)
    assert all(np.array_equal(store.labels(name), values) for name, values in again.items())
    index = pd.read_parquet(tmp_path / "index.parquet")
    assert {*QUALITY} < {*index.columns}
    dark = TileDataset(str(tmp_path), where=["dark>0.01", "tissue>0.5"])
    assert 0 < len(dark) == ((index["dark"] > 0.01) & (index["tissue"] > 0.5)).sum() < len(store)
    assert '"blur":' in preview_files(tmp_path, demo_slide.name)[1].read_text()
    labels = {name: store.labels(name) for name in QUALITY}
    said = capsys.readouterr().out
    for name, count in flagged(labels).items():
        assert (f"{count} tiles have {name}>{LIMITS[name]:g}" in said) == bool(count)


def test_a_store_begun_without_them_is_told(demo_slide: Path, tmp_path):
    from ldm.data.store_writers import TileStoreWriter

    path = tile_slide(demo_slide, tmp_path / "whole", previews=False)
    attrs = {k: v for k, v in TileStore.open(path).attrs.items() if k not in ("rows", "complete", "count", "version")}
    begun = tmp_path / "slides" / path.name
    TileStoreWriter.create(begun, 43, attrs, {"tissue": "f4"}).close(complete=False)
    with pytest.raises(UserError, match="did not measure blur, dark, pen; delete it"):
        tile_slide(demo_slide, tmp_path)


def test_they_cost_little_beside_reading_a_tile(demo_slide: Path):
    """Less than a quarter of what OpenSlide takes to read it."""
    slide, plain = open_slide(demo_slide), openslide.OpenSlide(str(demo_slide))
    corners = [(600 + 64 * (i % 8), 1500 + 64 * (i // 8)) for i in range(64)]

    def seconds(call) -> float:
        best = []
        for _ in range(5):
            start = time.process_time()
            call()
            best.append(time.process_time() - start)
        return min(best)

    tiles = np.stack([slide.read(x, y, 256, 256) for x, y in corners])
    reading = seconds(lambda: [np.asarray(plain.read_region(corner, 0, (256, 256))) for corner in corners])
    assert seconds(lambda: quality_of(tiles, 0.5)) < 0.25 * reading
