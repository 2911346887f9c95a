"""SpatialData Zarr, as LazySlide and wsidata keep the tiles of a slide and their features: read and written.

    <slide>.zarr/  shapes/<tiles>/shapes.parquet: the box of each tile and its tile_id
                   tables/<encoder>_<tiles>/: AnnData with X (N,D) and the tile_id of each row
                   attrs: tile_spec/<tiles> (size, stride, downsample), slide_properties (shape, mpp)

Boxes are in level-0 pixels. Zarr v2, of older versions of theirs, is read too.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from ldm.data.places import Places
from ldm.data.tile_store import TileStore
from ldm.errors import UserError, some, suggest
from ldm.files import whole
from ldm.foreign.budget import COMPRESSED, afford, plausible
from ldm.foreign.settings import read_json
from ldm.foreign.zarrs import check_zarr
from ldm.tables.parquet import check_parquet

TILES = "tiles"  # the name of the tiles where a Zarr has one kind of them
WIDEST = 1 << 16  # values of a feature
# a box in WKB: little-endian (1), polygon (3), its rings (1), points of that ring (5)
_BOX = np.dtype([("order", "u1"), ("kind", "<u4"), ("rings", "<u4"), ("points", "<u4"), ("xy", "<f8", (5, 2))])
_BOX_IS = {"order": 1, "kind": 3, "rings": 1, "points": 5}


def is_spatial(path: Path) -> bool:
    """Whether a path is a folder that holds SpatialData; a tile store is none.

    >>> is_spatial(store.path)
    False
    """
    if not path.is_dir():
        return False
    try:
        return "spatialdata_attrs" in read_json(path / "zarr.json")["attributes"]
    except (ValueError, KeyError, TypeError):
        return (path / ".zgroup").is_file() and (path / "shapes" / ".zgroup").is_file()


def features_in(path: Path) -> dict[str, str]:
    """The features of tiles in a SpatialData Zarr: encoder -> name of the table.

    >>> write_spatial(Path("a.zarr"), store)
    >>> add_features(Path("a.zarr"), store, "uni", np.zeros((len(store), 4)), {})
    >>> features_in(Path("a.zarr"))
    {'uni': 'uni_tiles'}
    """
    with _reading(path):
        root = _opened(path)
        shapes, found = _members(root, "shapes"), {}
        for name in _members(root, "tables"):
            table = root[f"tables/{name}"]
            region = table.attrs.get("region")
            if isinstance(region, str) and region in shapes and region in _specs(root) and "X" in table:
                found[name.removesuffix(f"_{region}") if region == TILES else name] = name
    return found


def read_spatial(path: Path, feature: str | None = None) -> tuple[np.ndarray | None, Places]:
    """Tiles and their features in a SpatialData Zarr.

    Args:
        feature: encoder or name of the table; None is the only one there is.
    Returns:
        features (N, D) in the order of the tiles, None where there are none, and the places of the tiles.
    Raises:
        UserError: broken, without tiles, several features and none named, tiles that are no squares, features of other
            tiles.

    >>> write_spatial(Path("a.zarr"), store)
    >>> add_features(Path("a.zarr"), store, "uni", np.zeros((len(store), 4)), {})
    >>> values, places = read_spatial(Path("a.zarr"))
    >>> values.shape, places.coords[1], places.extent, places.size
    ((88, 4), array([256.,   0.]), 256.0, 256)
    """
    known = features_in(path)
    if feature is None and len(known) > 1:
        raise UserError(f"{path} has the features {', '.join(known)}; name the one to use.")
    table = known.get(feature, feature) if feature is not None else next(iter(known.values()), None)
    if feature is not None and table not in known.values():
        raise UserError(f"{path} has no features '{feature}'{suggest(feature, known)}")
    with _reading(path):
        root = _opened(path)
        if table is None:
            tiles = _tile_set(root, path)
            return None, _places(root, path, tiles, _boxes(root, path, tiles, "tile_id")[1])
        group = root[f"tables/{table}"]
        tiles = str(group.attrs["region"])
        ids, boxes = _boxes(root, path, tiles, str(group.attrs.get("instance_key")))
        places = _places(root, path, tiles, boxes)
        rows = _rows_of(path, group, table, ids)
        return np.asarray(group["X"][:], np.float32)[rows], places


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever zarr and pyarrow raise of what they cannot read, as one message: they have no error of their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as SpatialData Zarr ({reason}); copy or write it again.") from None


def _opened(path: Path, mode: Literal["r", "r+"] = "r") -> zarr.Group:
    check_zarr(path)
    return zarr.open_group(str(path), mode=mode, use_consolidated=False)


def _members(root: zarr.Group, name: str) -> list[str]:
    return sorted(root[name].group_keys()) if name in root else []


def _specs(root: zarr.Group) -> Mapping[str, Any]:
    specs = root.attrs.get("tile_spec")
    return specs if isinstance(specs, dict) else {}


def _tile_set(root: zarr.Group, path: Path) -> str:
    """The tiles of a Zarr without features: `tiles`, or the only ones."""
    known = [name for name in _members(root, "shapes") if name in _specs(root)]
    if TILES in known:
        return TILES
    if len(known) != 1:
        told = f"several kinds of tiles ({some(known)}) and none is named `{TILES}`" if known else "no tiles"
        raise UserError(f"{path} has {told}; tile the slide there (lazyslide.pp.tile_tissues), or give another file.")
    return known[0]


def _boxes(root: zarr.Group, path: Path, tiles: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids (N,) and boxes (N, 4) of tiles: left, top, right, bottom."""
    source = path / "shapes" / tiles / "shapes.parquet"
    if root[f"shapes/{tiles}"].attrs.get("encoding-type") != "ngff:shapes" or not source.is_file():
        raise UserError(
            f"{path}/shapes/{tiles} is not in the form that SpatialData 0.2 and later write (shapes.parquet); open it "
            "there and write it again."
        )
    placed = root[f"shapes/{tiles}"].attrs.get("coordinateTransformations") or []
    if any(not isinstance(each, dict) or each.get("type") != "identity" for each in placed):
        raise UserError(f"{path}/shapes/{tiles} is in other coordinates than level-0 pixels; write it in those.")
    with _reading(source):
        held = pq.read_metadata(source)
        plausible(held.num_rows * _BOX.itemsize, source.stat().st_size, f"the tiles of {source}", COMPRESSED)
        check_parquet(source)
        table = pq.read_table(source)
        geometry = table["geometry"].combine_chunks()
    if not (pa.types.is_binary(geometry.type) or pa.types.is_large_binary(geometry.type)) or not len(geometry):
        raise UserError(f"{source} has geometry of type {geometry.type} in {len(geometry)} rows; WKB is read.")
    raw = geometry.to_pylist()
    box = np.frombuffer(b"".join(raw), _BOX) if {len(each) for each in raw} == {_BOX.itemsize} else np.empty(0, _BOX)
    if len(box) != len(raw) or any((box[name] != value).any() for name, value in _BOX_IS.items()):
        raise UserError(f"{source} has shapes that are no boxes; only tiles are read.")
    low, high = box["xy"].min(1), box["xy"].max(1)
    ids = table[key].to_numpy() if key in table.column_names else table.to_pandas().index.to_numpy()
    return ids, np.hstack([low, high])


def _places(root: zarr.Group, path: Path, tiles: str, boxes: np.ndarray) -> Places:
    sides = boxes[:, 2:] - boxes[:, :2]
    extent = float(sides[0, 0])
    try:
        spec, shape = _specs(root)[tiles], (root.attrs.get("slide_properties") or {}).get("shape")
        width, height, stride, stride_down = (
            int(spec[name]) for name in ("width", "height", "stride_width", "stride_height")
        )
        down = float(spec["base_downsample"])
        slide = None if shape is None else (float(shape[1]), float(shape[0]))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        raise UserError(f"{path} does not say how wide its {tiles} and their strides are (tile_spec).") from None
    if width != height or stride_down != stride or width < 1 or np.ptp(sides) > 1 or not extent > 0:
        raise UserError(f"{path}/shapes/{tiles} are not squares of one size and one stride; cut square tiles.")
    if abs(extent / (width * down) - 1) > 0.01:
        raise UserError(
            f"{path} contradicts itself: its {tiles} are {extent:g} level-0 px wide, and by its tile_spec "
            f"{width * down:g}. Tile the slide again."
        )
    return Places(boxes[:, :2], extent, float(int(stride * down)), width, slide)


def _rows_of(path: Path, group: zarr.Group, table: str, ids: np.ndarray) -> np.ndarray:
    """The row of each tile in a table, by its id. UserError where a tile has none, or the table cannot be a table."""
    values, key = group["X"], str(group.attrs.get("instance_key"))
    if not isinstance(values, zarr.Array) or values.ndim != 2 or not 0 < values.shape[1] <= WIDEST:
        raise UserError(f"{path}/tables/{table} has no dense X of shape (N, D); write the features as a NumPy array.")
    if lost := values.nchunks - values.nchunks_initialized:
        raise UserError(f"{path}/tables/{table}/X lacks {lost} of {values.nchunks} chunks; copy it again.")
    count = values.shape[0]
    afford(3 * values.nbytes, f"{path}/tables/{table}/X")
    if f"obs/{key}" in group and group[f"obs/{key}"].shape != (count,):
        raise UserError(f"{path}/tables/{table} has {count} rows, and tile ids of another shape; write it again.")
    own = np.asarray(group[f"obs/{key}"][:]) if f"obs/{key}" in group else np.arange(count)
    if not pd.Index(own).is_unique or not pd.Index(ids).is_unique:
        raise UserError(
            f"{path}/tables/{table} has {count} rows and {pd.Index(own).nunique()} ids of tiles; each tile has one."
        )
    rows = pd.Index(own).get_indexer(ids)
    if (rows < 0).any():
        raise UserError(
            f"{path}/tables/{table} has no features of {(rows < 0).sum()} of {len(rows)} tiles; extract them again."
        )
    return rows


# --- out --------------------------------------------------------------------------------------------------------------


def write_spatial(path: Path, store: TileStore) -> None:
    """Write the tiles of a store, and its labels, as a new SpatialData Zarr, which `wsidata.open_wsi` opens.

    >>> write_spatial(Path("a.zarr"), store)
    >>> is_spatial(Path("a.zarr"))
    True
    """
    downsample = _downsample(store)
    spec = {
        "height": store.tile_size, "width": store.tile_size, "stride_height": store.stride,
        "stride_width": store.stride, "mpp": store.mpp, "ops_level": 0, "ops_downsample": downsample,
        "base_level": 0, "base_downsample": downsample, "tissue_name": None,
    }  # fmt: skip
    slide: dict[str, Any] = {"mpp": mpp_of_slide(store), "magnification": store.attrs.get("magnification")}
    if size := store.attrs.get("level0_size"):
        slide["shape"] = [size[1], size[0]]
    attrs = {"spatialdata_attrs": {"version": "0.2"}, "slide_properties": slide, "tile_spec": {TILES: spec}}
    root = zarr.create_group(str(path), attributes=attrs)
    _write_shapes(root.create_group("shapes"), path / "shapes" / TILES, store, int(store.tile_size * downsample))


def add_features(path: Path, store: TileStore, name: str, values: np.ndarray, about: Mapping[str, Any]) -> None:
    """Write features of a store's tiles as a new table of a SpatialData Zarr that has the same tiles.

    Args:
        path: a Zarr of `write_spatial`, or LazySlide's. name: of the features. values: (N, D), written as float32.
        about: what is known of them, kept as JSON in the table's `uns`, see `about_features`.
    Raises:
        UserError: other tiles, or Zarr v2.

    >>> write_spatial(Path("a.zarr"), store)
    >>> add_features(Path("a.zarr"), store, "uni", np.zeros((len(store), 4)), {"licence": "MIT"})
    >>> read_spatial(Path("a.zarr"), "uni")[0].shape
    (88, 4)
    """
    ids, table = ids_of_tiles(path, store), f"{name}_{TILES}"
    root = _opened(path, "r+")
    if root.metadata.zarr_format != 3:
        raise UserError(f"{path} is Zarr v2; write it anew with a newer spatialdata, or choose another --out.")
    with whole(path / root.require_group("tables").path / table) as part:
        _write_table(part, np.asarray(values, np.float32), ids, json.dumps(dict(about)))
    if root.metadata.consolidated_metadata or '"consolidated_metadata"' in (path / "zarr.json").read_text():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes.parquet, which is no part of Zarr
            zarr.consolidate_metadata(str(path))


def ids_of_tiles(path: Path, store: TileStore) -> np.ndarray:
    """The ids (N,) that a SpatialData Zarr gives to the tiles of a store. UserError where its tiles are others.

    >>> write_spatial(Path("a.zarr"), store)
    >>> ids_of_tiles(Path("a.zarr"), store)[:3]
    array([0, 1, 2])
    """
    with _reading(path):
        root = _opened(path)
        if f"shapes/{TILES}" not in root:
            raise UserError(f"{path} has no tiles; choose another --out.")
        ids, boxes = _boxes(root, path, TILES, "tile_id")
    row_of = {(round(x), round(y)): row for row, (x, y) in enumerate(boxes[:, :2].tolist())}
    rows = [row_of.get((x, y), -1) for x, y in store.coords.tolist()]
    extent = store.tile_size * store.downsample
    if sorted(rows) != list(range(len(boxes))) or abs(float(boxes[0, 2] - boxes[0, 0]) / extent - 1) > 0.01:
        raise UserError(f"{path} has other tiles than {store.path}; choose another --out.")
    return ids[rows]


def about_features(path: Path, feature: str | None = None) -> Any:
    """What `add_features` was told of features; None of a table that it did not write, or that is not there.

    >>> write_spatial(Path("a.zarr"), store)
    >>> add_features(Path("a.zarr"), store, "uni", np.zeros((len(store), 4)), {"licence": "MIT"})
    >>> about_features(Path("a.zarr"), "uni")
    {'licence': 'MIT'}
    """
    name = f"tables/{features_in(path).get(feature, feature)}/uns/histoldm"
    with _reading(path):
        root = _opened(path)
        return json.loads(str(root[name][()])) if name in root else None


def _write_table(path: Path, values: np.ndarray, ids: np.ndarray, told: str) -> None:
    """A group in AnnData's encoding, as SpatialData annotates tiles with it."""
    annotates = {"region": TILES, "region_key": "library_id", "instance_key": "tile_id"}
    kind = {**_encoding("anndata", "0.1.0"), "spatialdata-encoding-type": "ngff:regions_table", "version": "0.2"}
    table = zarr.create_group(str(path), attributes={**kind, **annotates})
    _array(table, "X", values)
    obs = _frame(table, "obs", ["tile_id", "library_id"], ids)
    _array(obs, "tile_id", ids)
    library = obs.create_group("library_id", attributes={"ordered": False, **_encoding("categorical", "0.2.0")})
    _array(library, "codes", np.zeros(len(values), np.int8))
    _array(library, "categories", np.array([TILES]))
    _frame(table, "var", [], np.arange(values.shape[1]))
    uns = table.create_group("uns", attributes=_encoding("dict", "0.1.0"))
    keys = uns.create_group("spatialdata_attrs", attributes=_encoding("dict", "0.1.0"))
    for key, value in annotates.items():
        _array(keys, key, np.array(value))
    _array(uns, "histoldm", np.array(told))


def mpp_of_slide(store: TileStore) -> float | None:
    """Micrometres per level-0 pixel of a store's slide, None where unknown.

    >>> mpp_of_slide(store)
    0.499
    """
    return None if store.mpp is None else float(f"{store.mpp / store.downsample:.12g}")


def _downsample(store: TileStore) -> float:
    """The store's, such that a tile covers the nearest whole number of pixels; wsidata rounds a fraction down."""
    side = store.tile_size
    whole = round(side * store.downsample)
    downsample = whole / side
    while int(side * downsample) < whole:
        downsample = math.nextafter(downsample, math.inf)
    return downsample


def _write_shapes(shapes: zarr.Group, folder: Path, store: TileStore, side: int) -> None:
    space = {"axes": [{"name": axis, "type": "space", "unit": "unit"} for axis in "xy"]}
    placed = {"type": "identity", "input": {"name": "xy", **space}, "output": {"name": "global", **space}}
    shapes.create_group(TILES, attributes={
        "encoding-type": "ngff:shapes", "axes": ["x", "y"], "coordinateTransformations": [placed],
        "spatialdata_attrs": {"version": "0.3"},
    })  # fmt: skip
    low = store.coords.astype(float)
    boxes = np.zeros(len(low), _BOX)
    for name, value in _BOX_IS.items():
        boxes[name] = value
    boxes["xy"] = low[:, None] + side * np.array([(1, 0), (1, 1), (0, 1), (0, 0), (1, 0)])
    columns = {name: store.labels(name) for name in store.label_names} | {"tile_id": np.arange(len(low))}
    table = pa.table({**columns, "geometry": pa.array([box.tobytes() for box in boxes], pa.binary())})
    bounds = [*low.min(0).tolist(), *(low.max(0) + side).tolist()]
    column = {"encoding": "WKB", "crs": None, "geometry_types": ["Polygon"], "bbox": bounds}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), folder / "shapes.parquet")


def _encoding(kind: str, version: str) -> dict[str, str]:
    return {"encoding-type": kind, "encoding-version": version}


def _frame(group: zarr.Group, name: str, columns: list[str], index: np.ndarray) -> zarr.Group:
    told = {"column-order": columns, "_index": "_index", **_encoding("dataframe", "0.2.0")}
    frame = group.create_group(name, attributes=told)
    _array(frame, "_index", index.astype(str))
    return frame


def _array(group: zarr.Group, name: str, values: np.ndarray) -> None:
    """Numbers or text in AnnData's encoding."""
    text = values.dtype.kind == "U"
    kind = "array" if not text else "string-array" if values.ndim else "string"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr says of text that other readers may not know it; AnnData does
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=str if text else values.dtype,
            chunks=tuple(min(side, 1024) for side in values.shape),
            attributes=_encoding(kind, "0.2.0"),
            config={"write_empty_chunks": True},
        )
    array[...] = values.astype(object) if text else values
