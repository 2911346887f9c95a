"""What tiling leaves to look at: outlines of tissue and tiles as QuPath opens them, and reading those again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image
from scipy.ndimage import binary_dilation

from data_prep.tile_slides import main, tile_slide
from ldm.data.tile_store import TileStore
from ldm.files import LOCK, SCRATCH, hidden, names_in
from ldm.images.previews import TISSUE, outlines, preview_files, tissue_features, write_previews
from ldm.images.slides import Slide, open_slide
from ldm.images.source import Source
from ldm.images.tissue import TissueMask
from ldm.tables.geojson import read_geojson
from ldm.tables.regions import SlideRegions


@pytest.fixture(scope="module")
def tiled(demo_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cohort of the demo slide, and the store."""
    folder = tmp_path_factory.mktemp("tiled")
    return folder, tile_slide(demo_slide, folder)


def collection(path: Path) -> dict:
    def no_number(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return json.loads(path.read_text(), parse_constant=no_number)


def test_outlines_are_those_of_the_mask(demo_slide: Path):
    mask = TissueMask(open_slide(demo_slide))
    scale = 2220 / mask.mask.shape[1]  # level-0 pixels a mask pixel
    parts = outlines(mask.mask, (2220, 2967))
    assert sum(part.area for part in parts) == pytest.approx(mask.mask.sum() * scale**2, rel=0.01)
    assert sum(len(part.interiors) for part in parts) > 0
    tissue = shapely.union_all(parts)
    rows, cols = np.indices(mask.mask.shape)
    middles = shapely.points((cols.ravel() + 0.5) * scale, (rows.ravel() + 0.5) * 2967 / mask.mask.shape[0])
    shapely.prepare(tissue)
    wrong = shapely.contains(tissue, middles) != mask.mask.ravel()
    assert shapely.distance(tissue.boundary, middles[wrong]).max(initial=0) <= scale / 2
    assert wrong.mean() < 0.001
    assert outlines(np.zeros((9, 9), bool), (90, 90)) == []
    (whole,) = outlines(np.ones((9, 9), bool), (90, 90))
    assert whole.bounds == (0, 0, 90, 90)


def test_geojson_comes_back_as_it_went_out(tiled, demo_slide: Path):
    folder, path = tiled
    store, slide = TileStore.open(path), open_slide(demo_slide)
    geojson = preview_files(folder, demo_slide.name)[1]
    mask = TissueMask(slide)
    file = read_geojson(geojson)
    assert (file.size, file.origin, file.classes) == (slide.dimensions, "slide", ["Tissue"])
    assert file.notes == (f"{len(store)} drawn objects are no regions ({len(store)} tile without a class)",)
    there = outlines(mask.mask, slide.dimensions)
    assert len(file.regions) == len(there)
    for region, part in zip(file.regions, there):
        assert shapely.hausdorff_distance(region.shape, part) <= 1
    inside = SlideRegions(file, slide).inside(store.coords, 256, ["Tissue"], [])
    assert np.abs(inside - store.labels("tissue")).max() < 0.02
    lattice = np.stack(np.meshgrid(np.arange(8) * 256, np.arange(11) * 256), -1).reshape(-1, 2)
    wanted = SlideRegions(file, slide).inside(lattice, 256, ["Tissue"], []) >= 0.5
    again = TileStore.open(tile_slide(demo_slide, folder / "again", regions=geojson, min_tissue=0, previews=False))
    assert np.array_equal(again.coords, lattice[wanted])
    assert not (folder / "again/previews").exists()


def test_qupath_finds_what_it_needs(tiled, demo_slide: Path):
    """Types, and colours of classes, without which QuPath 0.6 refuses a feature; measurements are numbers."""
    folder, path = tiled
    store = TileStore.open(path)
    features = collection(preview_files(folder, demo_slide.name)[1])["features"]
    assert {each["type"] for each in features} == {"Feature"}
    tissue = [each for each in features if each["properties"]["objectType"] == "annotation"]
    assert tissue
    assert all(each["properties"]["classification"] == {"name": "Tissue", "color": [*TISSUE]} for each in tissue)
    tiles = [each for each in features if each["properties"]["objectType"] == "tile"]
    assert len(tiles) == len(store) == len(features) - len(tissue)
    for row, ((x, y), share) in enumerate(zip(store.coords.tolist(), store.labels("tissue").tolist())):
        ring = [[x, y], [x + 256, y], [x + 256, y + 256], [x, y + 256], [x, y]]
        assert tiles[row]["geometry"] == {"type": "Polygon", "coordinates": [ring]}
        measured = tiles[row]["properties"]["measurements"]
        assert measured["row"] == row
        assert measured["tissue"] == pytest.approx(share, abs=1e-4)
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in measured.values())


def test_the_picture_shows_tissue_and_tiles(tiled, demo_slide: Path):
    folder, path = tiled
    store = TileStore.open(path)
    with Image.open(preview_files(folder, demo_slide.name)[0]) as image:
        pixels = np.asarray(image).astype(int)
    assert pixels.shape == (512, 383, 3)
    scale = 383 / 2220
    green = (pixels == TISSUE).all(-1)
    assert 500 < green.sum() < 8000
    near = np.zeros_like(green)
    for x, y in store.coords * scale:
        near[int(y), int(x) : int(x + 256 * scale)] = True
    blue = pixels[..., 2] - pixels[..., 0]
    assert blue[near & ~green].mean() > 60  # the upper edge of each tile
    beside = ~binary_dilation(green, iterations=2)
    for x, y in store.coords * scale:
        beside[int(y) : int(y + 257 * scale) + 1, int(x) : int(x + 257 * scale) + 1] = False
    assert beside.mean() > 0.3
    assert np.array_equal(pixels[beside], TissueMask(open_slide(demo_slide)).picture[beside])  # and nothing else


def test_slides_with_bounds_count_from_them_as_qupath_does(tmp_path):
    rng = np.random.default_rng(0)

    def read(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        pixels = np.full((h, w, 3), 245, np.uint8)
        rows, cols = np.arange(y, y + h)[:, None], np.arange(x, x + w)
        stained = (rows - 1500) ** 2 + (cols - 2000) ** 2 < 400**2
        pixels[stained] = np.array((180, 60, 140)) + rng.integers(-9, 9, (stained.sum(), 1))
        return pixels

    slide = Slide(Path("a.mrxs"), Source([(4000, 3000)], read, bounds=(1000, 500, 2500, 2000)), 0.5)
    mask = TissueMask(slide)
    labels = {"tissue": np.ones(1, np.float32), "region": np.array(["Tumour"], object), "empty": np.array([np.nan])}
    write_previews(tmp_path, "a.mrxs", slide, mask, np.array([[2000, 1500]]), 100.5, labels)
    geojson = preview_files(tmp_path, "a.mrxs")[1]
    (tile,) = [each for each in collection(geojson)["features"] if each["properties"]["objectType"] == "tile"]
    assert tile["geometry"]["coordinates"][0][:3] == [[1000, 1000], [1100.5, 1000], [1100.5, 1100.5]]
    assert tile["properties"]["measurements"] == {"row": 0, "tissue": 1}
    assert tile["properties"]["metadata"] == {"region": "Tumour"}
    back = SlideRegions(read_geojson(geojson), slide)  # which would have to be asked, did the file not say it
    assert back.origin == "bounds"
    x, y = back.shapes["Tissue"].centroid.coords[0]
    assert (x, y) == pytest.approx((2000, 1500), abs=8)
    assert back.shapes["Tissue"].area == pytest.approx(np.pi * 400**2, rel=0.08)


def test_what_lacks_is_made_and_what_is_there_is_left(demo_slide: Path, tmp_path):
    ask = ["--slides", str(demo_slide), "--out", str(tmp_path)]
    main([*ask, "--no-previews"])
    picture, geojson = preview_files(tmp_path, demo_slide.name)
    assert not picture.parent.exists()
    main(ask)
    first = picture.read_bytes(), geojson.read_bytes()
    geojson.unlink()
    main(ask)
    assert (picture.read_bytes(), geojson.read_bytes()) == first
    written = picture.stat().st_mtime_ns
    main(ask)
    assert picture.stat().st_mtime_ns == written


def test_what_a_kill_left_beside_a_finished_picture_is_cleared_away(tiled, demo_slide: Path):
    folder, _ = tiled
    for path in preview_files(folder, demo_slide.name):
        (left := path.with_name(f"{hidden(path, SCRATCH).name}-0")).mkdir()
        (left / LOCK).touch()
    before = {*names_in(folder / "previews")}
    tile_slide(demo_slide, folder)
    assert {path.name for path in (folder / "previews").iterdir()} == before


def test_coordinates_are_rounded_to_hundredths():
    (part,) = tissue_features([shapely.box(0.123, 0, 9.987654, 5)])
    assert part["geometry"]["coordinates"][0][0] == [9.99, 0]
