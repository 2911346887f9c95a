"""Outlines that people drew on slides, as files have them: GeoJSON in the dialects of QuPath, and V7 Darwin's JSON.

    on top      a FeatureCollection, a list of Features, one Feature, or a bare geometry; features in `childObjects`
    areas       Polygon, MultiPolygon, GeometryCollection, with holes; an ellipse as QuPath means it (`isEllipse`)
    class       `classification` as text, {name}, {names} or {name, parentClass}, else the object's own name
    packed      .gz, or a .zip with one such file in it

What has no area (points, lines) counts as no region; that, and what had to be repaired, is told.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from ldm.errors import UserError
from ldm.foreign.paths import allowed

SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz", ".zip")
UNCLASSIFIED = "unclassified"
MOST_CROSSINGS = 5_000_000  # of an outline that is repaired, and 50 for each of its corners
MOST_BYTES = 512 << 20  # of a file, unpacked; annotations without detections and measurements take far less
FARTHEST = 10_000_000  # px from the corner; no slide is so wide
_ANGLES = np.linspace(0, 2 * np.pi, 256, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)  # (256, 2)
_AREAS = ("Polygon", "MultiPolygon")
_GEOMETRIES = (*_AREAS, "GeometryCollection", "Point", "MultiPoint", "LineString", "MultiLineString")
_EXPORT = "QuPath writes one by File > Export objects as GeoJSON"


@dataclass(frozen=True)
class Region:
    """One outline: the name of its class, and its Polygon or MultiPolygon in pixels, as the file counts them."""

    name: str
    shape: shapely.Geometry


@dataclass(frozen=True)
class RegionFile:
    """What a file of outlines holds.

    Attributes:
        path: of the file. sha256: of its content, unpacked.
        regions: in the order of the file.
        size: (width, height) of the image that the file says it is of, in pixels; None where it does not.
        origin: "slide" or "bounds" where the file says what its coordinates count from, see `ldm.tables.regions`.
        notes: what was left out or repaired, in words.
    """

    path: Path
    sha256: str
    regions: tuple[Region, ...]
    size: tuple[int, int] | None = None
    origin: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted({region.name for region in self.regions})


@dataclass
class _Found:
    """What reading has found so far."""

    path: Path
    regions: list[Region] = field(default_factory=list)
    left: Counter = field(default_factory=Counter)  # kind -> how many are no regions
    repaired: int = 0

    def add(self, name: str, shape: shapely.Geometry) -> None:
        if shape.area > 0:
            self.regions.append(Region(name, shape))
        else:
            self.left["outline without an area"] += 1


def read_geojson(path: Path | str) -> RegionFile:
    """The outlines of a file.

    Raises:
        UserError: no such file, no GeoJSON, not whole, too large, coordinates that are no numbers or beyond any slide.

    >>> square = {"type": "Polygon", "coordinates": [[[0, 0], [8, 0], [8, 8], [0, 8]]]}
    >>> _ = Path("a.geojson").write_text(json.dumps({"type": "Feature", "geometry": square,
    ...                                              "properties": {"classification": {"name": "Tumour"}}}))
    >>> region, = read_geojson("a.geojson").regions
    >>> region.name, region.shape.area
    ('Tumour', 64.0)
    """
    path = Path(path)
    data = _content(path)
    try:
        top = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path} is no JSON, or not all of it ({reason}); {_EXPORT}") from None
    found, about = _Found(path), top if isinstance(top, dict) else {}
    try:
        image = about.get("item") or about.get("image")
        if isinstance(about.get("annotations"), list) and isinstance(image, dict):
            _read_darwin(about["annotations"], found)
            slot = next(iter(image.get("slots") or [image]))
            size, origin = _size([slot.get("width"), slot.get("height")]), None
        else:
            for feature in _features(top, path):
                _read_feature(feature, found)
            own = about.get("histoldm") if isinstance(about.get("histoldm"), dict) else {}
            size, origin = _size(own.get("level0_size")), own.get("origin")
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not laid out as GeoJSON is ({type(error).__name__}: {error}); {_EXPORT}") from None
    origin = origin if origin in ("slide", "bounds") else None
    return RegionFile(path, hashlib.sha256(data).hexdigest(), tuple(found.regions), size, origin, tuple(_notes(found)))


def _content(path: Path) -> bytes:
    """A file's bytes, unpacked. UserError: not there, too large, broken."""
    too_large = UserError(
        f"{path} is larger than {MOST_BYTES >> 20} MB unpacked, too large for regions of a slide; export annotations "
        "alone, without detections and measurements"
    )
    try:
        if allowed(path).suffix.lower() == ".zip":
            data = _zipped(path)
        else:
            with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
                data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read regions from {path}: {error.strerror or error}") from None
    except (EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"cannot unpack {path}: {error}; pack it anew, or give the .geojson itself") from None
    if len(data) > MOST_BYTES:
        raise too_large
    return data


def _zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path) as packed:
        names = [name for name in packed.namelist() if name.lower().endswith((".geojson", ".json"))]
        names = [name for name in names if not name.startswith("__MACOSX/")]
        if len(names) != 1:
            raise UserError(f"{path} holds {len(names)} GeoJSON files; give a .zip with one, or the .geojson itself")
        with packed.open(names[0]) as stream:
            return stream.read(MOST_BYTES + 1)


def _features(top: Any, path: Path) -> Iterator[Mapping[str, Any]]:
    """The features in whatever lies on top, those within others (QuPath's hierarchy) after them."""
    todo = [top]
    while todo:
        part = todo.pop()
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, list):
            todo += reversed(part)
        elif kind == "FeatureCollection":
            todo += reversed(part["features"])
        elif kind == "Feature":
            properties = part.get("properties") or {}
            todo += reversed(properties.get("childObjects") or properties.get("children") or [])
            yield part
        elif kind in _GEOMETRIES:
            yield {"geometry": part}
        else:
            what = f"an object with {', '.join(map(str, [*part][:5])) or 'nothing'}" if isinstance(part, dict) else part
            raise UserError(f"{path} is no GeoJSON: where features should be is {str(what)[:80]}; {_EXPORT}")


def _read_feature(feature: Mapping[str, Any], found: _Found) -> None:
    properties, geometry = feature.get("properties") or {}, feature.get("geometry")
    kind = properties.get("objectType") or properties.get("object_type") or feature.get("id")
    name = _class_of(properties)
    if kind in ("root", "PathRootObject") or (properties.get("isMissing") and "tma" in str(kind).lower()):
        return
    if kind in ("tile", "PathTileObject") and name == UNCLASSIFIED:
        found.left["tile without a class"] += 1
        return
    if not isinstance(geometry, dict):
        found.left["object without a geometry"] += 1
        return
    if polygons := _parts(geometry, found):
        found.add(name, _shape_of(polygons, found))


def _parts(geometry: Mapping[str, Any], found: _Found) -> list[list[Any]]:
    """The polygons of a geometry, each as its rings (n,2), the first around it and holes after it."""
    todo, polygons = [geometry], []
    while todo:
        part = todo.pop()
        kind = part.get("type")
        if kind == "GeometryCollection":
            todo += part.get("geometries") or []
        elif kind not in _GEOMETRIES:
            known = ", ".join(_GEOMETRIES)
            raise UserError(f"{found.path} has a geometry of the type {str(kind)[:40]!r}; known are {known}")
        elif kind not in _AREAS:
            found.left[kind] += 1
        elif part.get("isEllipse"):  # QuPath takes the box around the corners, and so do its users
            corners = _rings(part["coordinates"] if kind == "Polygon" else part["coordinates"][0], found)[0]
            low, high = corners.min(0), corners.max(0)
            polygons.append([(low + high) / 2 + _CIRCLE * (high - low) / 2])
        else:
            each = [part["coordinates"]] if kind == "Polygon" else part["coordinates"]
            polygons += [_rings(rings, found) for rings in each]
    return polygons


def _rings(rings: Sequence[Any], found: _Found) -> list[np.ndarray]:
    """Rings of corners (n,2) float64; those that are open, or have corners that are no numbers, count as repaired."""
    read = []
    for ring in rings:
        try:
            corners = np.array([corner[:2] for corner in ring], np.float64)
        except (TypeError, ValueError, KeyError, OverflowError):
            corners = np.zeros(0)
        if corners.shape != (len(ring), 2) and len(ring):
            raise UserError(f"{found.path} has coordinates that are no pairs of numbers, as {str(ring)[:80]}")
        corners = corners.reshape(-1, 2)
        finite = np.isfinite(corners).all(1)
        corners = corners[finite]
        if (np.abs(corners) > FARTHEST).any():
            raise UserError(
                f"{found.path} has coordinates up to {np.abs(corners).max():g} px, which no slide has; GeoJSON of a "
                "slide counts level-0 pixels from its corner"
            )
        found.repaired += bool(not finite.all() or (len(corners) and (corners[0] != corners[-1]).any()))
        read.append(corners)
    return read


def _shape_of(polygons: Sequence[Sequence[np.ndarray]], found: _Found) -> shapely.Geometry:
    """What the polygons of one object cover, repaired where they are none."""
    shapes = [
        _valid(shapely.Polygon(shell, [hole for hole in holes if len(hole) > 2]), found)
        for shell, *holes in (rings for rings in polygons if rings)
        if len(shell) > 2
    ]
    return shapely.union_all(shapes) if len(shapes) != 1 else shapes[0]


def _valid(shape: shapely.Geometry, found: _Found) -> shapely.Geometry:
    """A polygon as it is, or repaired where it crosses itself; of that what has an area."""
    if shape.is_valid:
        return shape
    found.repaired += 1
    corners = shapely.get_coordinates(shape)
    if (crossings := _overlaps(corners)) > MOST_CROSSINGS + 50 * len(corners):
        raise UserError(
            f"an outline of {len(corners)} corners crosses itself some {crossings} times, which is none that is drawn; "
            "leave it out."
        )
    parts = shapely.get_parts(shapely.make_valid(shape, method="structure", keep_collapsed=False))
    return shapely.union_all(parts[shapely.area(parts) > 0])


def _overlaps(corners: np.ndarray) -> int:
    """About how often edges of an outline may cross: pairs of them whose boxes overlap, of a sample of them.

    >>> _overlaps(np.array([[0, 0], [1, 0], [2, 0], [3, 0], [4, 0]]))  # four edges, that touch their neighbours
    10
    """
    low, high = np.minimum(corners[:-1], corners[1:]), np.maximum(corners[:-1], corners[1:])
    some = np.linspace(0, len(low) - 1, min(len(low), 500)).astype(int)
    pairs = sum(int(((low <= high[i]) & (low[i] <= high)).all(1).sum()) for i in some)
    return pairs * len(low) // max(len(some), 1)


def _class_of(properties: Mapping[str, Any]) -> str:
    """The class of an object: as it is classified, else its own name, else UNCLASSIFIED."""
    given = properties.get("classification")
    if isinstance(given, Mapping):
        names = list(given.get("names") or [])
        while not names and isinstance(given, Mapping) and given.get("name"):  # of QuPath 0.2: Tumour: Positive
            names.append(given["name"])
            given = given.get("parentClass")
            while isinstance(given, Mapping) and given.get("name"):
                names.insert(0, given["name"])
                given = given.get("parentClass")
        given = ": ".join(str(name).strip() for name in names)
    if not isinstance(given, str) or not given.strip():
        given = properties.get("name")
    return str(given).strip() if given not in (None, "") and str(given).strip() else UNCLASSIFIED


def _read_darwin(annotations: Sequence[Mapping[str, Any]], found: _Found) -> None:
    """Annotations of V7 Darwin (JSON 1.0 and 2.0): paths of which one within another is a hole, boxes, ellipses."""
    for each in annotations:
        name = str(each.get("name") or UNCLASSIFIED)
        polygon, ellipse, box = each.get("polygon"), each.get("ellipse"), each.get("bounding_box")
        others = [kind for kind in ("line", "keypoint", "skeleton", "mask", "tag", "raster_layer") if kind in each]
        if isinstance(polygon, Mapping):
            paths = polygon.get("paths") or [polygon.get("path") or [], *(polygon.get("additional_paths") or [])]
            paths = [[(corner["x"], corner["y"]) for corner in path] for path in paths if path]
            rings = _rings([[*path, path[0]] for path in paths], found)  # they are never closed
            shapes = [_valid(shapely.Polygon(ring), found) for ring in rings if len(ring) > 3]
            shape = reduce(shapely.symmetric_difference, shapes, shapely.Polygon())
        elif isinstance(ellipse, Mapping):
            centre, radius = (np.array([ellipse[k]["x"], ellipse[k]["y"]], float) for k in ("center", "radius"))
            angle = float(ellipse.get("angle") or 0)
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            corners = _CIRCLE * radius @ turn + centre
            shape = shapely.Polygon(_rings([[*corners, corners[0]]], found)[0])
        elif isinstance(box, Mapping) and not others:
            x, y, w, h = (float(box[side]) for side in "xywh")
            shape = shapely.Polygon(_rings([[(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)]], found)[0])
        else:
            found.left[others[0] if others else "object without a geometry"] += 1
            continue
        found.add(name, shape)


def _size(given: Any) -> tuple[int, int] | None:
    """A (width, height), None of what is none."""
    whole = isinstance(given, list) and len(given) == 2 and all(isinstance(side, int) and side > 0 for side in given)
    return (given[0], given[1]) if whole else None


def _notes(found: _Found) -> Iterator[str]:
    if found.left:
        listed = ", ".join(f"{count} {kind}" for kind, count in found.left.most_common())
        yield f"{sum(found.left.values())} drawn objects are no regions ({listed})"
    if found.repaired:
        yield f"{found.repaired} outlines of regions crossed themselves, were open or lacked corners, and are repaired"
