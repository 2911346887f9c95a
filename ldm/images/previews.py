"""What became of a slide, to look at: a picture of its tissue and tiles, and the same as GeoJSON that QuPath opens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from PIL import Image, ImageDraw
from skimage.measure import find_contours

from ldm.files import tool_version, whole, write_text
from ldm.images.slides import Slide
from ldm.images.tissue import TissueMask

FOLDER = "previews"  # of a cohort
TISSUE, TILE, REGION = (20, 130, 60), (30, 80, 200), (215, 90, 20)  # colours of lines


def preview_files(cohort: Path | str, name: str) -> tuple[Path, Path]:
    """Where the picture and the GeoJSON of a slide are, by its name.

    >>> [path.as_posix() for path in preview_files("cohort", "a.svs")]
    ['cohort/previews/a.png', 'cohort/previews/a.geojson']
    """
    folder, stem = Path(cohort) / FOLDER, Path(name).stem
    return folder / f"{stem}.png", folder / f"{stem}.geojson"


def lacks_previews(cohort: Path | str, name: str) -> bool:
    """Whether the picture or the GeoJSON of a slide is not there.

    >>> lacks_previews("cohort", "a.svs")
    True
    """
    return not all(path.is_file() for path in preview_files(cohort, name))


def write_previews(
    cohort: Path | str,
    name: str,
    slide: Slide,
    mask: TissueMask,
    coords: np.ndarray,
    side: float,
    labels: Mapping[str, np.ndarray],
    regions: Sequence[shapely.Geometry] = (),
) -> None:
    """Write the picture and the GeoJSON of a slide's tiles.

    Args:
        name: what the slide is called.
        coords: (n, 2) corners x, y of the tiles; side: theirs; both in level-0 pixels.
        labels: name -> (n,) of the tiles: numbers become QuPath's measurements, text its metadata.
        regions: drawn into the picture, in level-0 pixels.

    >>> slide, labels = Slide.of_pixels(tile, mpp=2), {"tissue": np.array([0.9])}
    >>> write_previews("cohort", "a.svs", slide, TissueMask(slide), np.array([[0, 0]]), 128, labels)
    >>> [path.exists() for path in preview_files("cohort", "a.svs")]
    [True, True]
    """
    picture, geojson = preview_files(cohort, name)
    picture.parent.mkdir(parents=True, exist_ok=True)
    tissue = outlines(mask.mask, slide.dimensions)
    with whole(picture) as part:
        draw_tiles(mask.picture, slide.dimensions, tissue, coords, side, regions).save(part, "PNG")
    origin = slide.bounds[:2] if slide.bounds else (0, 0)
    collection = {
        "type": "FeatureCollection",
        "histoldm": {
            "version": tool_version(), "slide": name, "level0_size": list(slide.dimensions),
            "origin": "bounds" if slide.bounds else "slide",
        },
        "features": [*tissue_features(tissue, origin), *tile_features(coords, side, labels, origin)],
    }  # fmt: skip
    write_text(geojson, json.dumps(collection, separators=(",", ":"), allow_nan=False))


def outlines(mask: np.ndarray, size: tuple[int, int]) -> list[shapely.Polygon]:
    """The parts of a mask (h, w) bool as polygons with holes, in pixels of the image (width, height) that it covers.

    They run half-way between the middles of mask pixels, and are off by a quarter of a mask pixel at most after that.

    >>> mask = np.zeros((8, 8), bool)
    >>> mask[1:7, 1:7], mask[3:5, 3:5] = True, False
    >>> part, = outlines(mask, (80, 80))
    >>> part.bounds, len(part.interiors)
    ((10.0, 10.0, 70.0, 70.0), 1)
    """
    scale = np.array([size[0] / mask.shape[1], size[1] / mask.shape[0]])
    padded = np.pad(mask, 1).astype(np.float32)
    lines = [shapely.linearrings(line[:, ::-1] - 0.5) for line in find_contours(padded, 0.5)]
    areas = shapely.get_parts(shapely.simplify(shapely.build_area(shapely.geometrycollections(lines)), 0.25))
    return [part for part in shapely.transform(areas, lambda corners: corners * scale) if part.area > 0]


def tissue_features(parts: Sequence[shapely.Polygon], origin: tuple[int, int] = (0, 0)) -> list[dict[str, Any]]:
    """GeoJSON features of tissue, annotations of QuPath. origin: the pixel that coordinates count from.

    >>> tissue_features([shapely.box(0, 0, 9, 5)])[0]["properties"]["classification"]["name"]
    'Tissue'
    """
    about = {"objectType": "annotation", "classification": {"name": "Tissue", "color": list(TISSUE)}}
    features = []
    for part in parts:
        rings = [_rounded(np.array(ring.coords) - origin) for ring in (part.exterior, *part.interiors)]
        geometry = {"type": "Polygon", "coordinates": rings}
        features.append({"type": "Feature", "geometry": geometry, "properties": about})
    return features


def tile_features(
    coords: np.ndarray, side: float, labels: Mapping[str, np.ndarray], origin: tuple[int, int] = (0, 0)
) -> list[dict[str, Any]]:
    """GeoJSON features of tiles, as `write_previews` takes them: QuPath's tiles with measurements, `row` first.

    >>> tile_features(np.array([[256, 0]]), 256, {"tissue": np.array([0.5])})[0]["properties"]
    {'objectType': 'tile', 'measurements': {'row': 0, 'tissue': 0.5}}
    """
    square = np.array([(0, 0), (side, 0), (side, side), (0, side), (0, 0)])
    rings = _rounded(coords[:, None] + square - np.array(origin))  # (n, 5, 2)
    numbers = {name: np.round(values.astype(float), 4).tolist() for name, values in labels.items() if _counts(values)}
    texts = {name: values.astype(str).tolist() for name, values in labels.items() if not _counts(values)}
    features = []
    for row, ring in enumerate(rings):
        about: dict[str, Any] = {"objectType": "tile", "measurements": {"row": row}}
        about["measurements"] |= {name: values[row] for name, values in numbers.items() if isfinite(values[row])}
        if texts:
            about["metadata"] = {name: values[row] for name, values in texts.items()}
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": geometry, "properties": about})
    return features


def _counts(values: np.ndarray) -> bool:
    return values.dtype.kind in "iufb"


def _rounded(corners: np.ndarray) -> list[Any]:
    """Corners to a hundredth of a pixel, as QuPath writes them, without a point where all are whole."""
    corners = np.round(corners, 2)
    return (corners.astype(int) if (corners == np.floor(corners)).all() else corners).tolist()


def draw_tiles(
    picture: np.ndarray,
    size: tuple[int, int],
    tissue: Sequence[shapely.Polygon],
    coords: np.ndarray,
    side: float,
    regions: Sequence[shapely.Geometry] = (),
) -> Image.Image:
    """A picture (h, w, 3) of a slide of `size` level-0 pixels with tissue, tiles and regions drawn over it.

    >>> draw_tiles(tile, (2560, 2560), [shapely.box(100, 100, 900, 900)], np.array([[0, 0]]), 512).size
    (256, 256)
    """
    image = Image.fromarray(picture).convert("RGB")
    scale = np.array(image.size) / size
    layer = Image.new("RGBA", image.size, (255, 255, 255, 0))
    pen = ImageDraw.Draw(layer)
    for x, y in coords * scale:
        right, bottom = x + side * scale[0], y + side * scale[1]
        pen.rectangle((x, y, max(x, right - 1), max(y, bottom - 1)), fill=(*TILE, 28), outline=(*TILE, 190))
    for shapes, colour in ((tissue, TISSUE), (regions, REGION)):
        for part in shapely.get_parts(np.array([*shapes], object)):
            for ring in (part.exterior, *part.interiors):
                pen.line([tuple(corner) for corner in np.array(ring.coords) * scale], fill=(*colour, 255), width=2)
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")
