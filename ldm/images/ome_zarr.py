"""Reads OME-Zarr images, 0.4 and 0.5."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr

from ldm.errors import UserError, some
from ldm.foreign.zarrs import check_zarr
from ldm.images.colour import converter, on_white, refuse_channels, refuse_deep, refuse_stack, says_rgb
from ldm.images.kinds import PLATE, SEVERAL, is_ome_zarr
from ldm.images.scale import UNKNOWN, Scale, physical_scale
from ldm.images.source import Source

MOST_LEVELS = 64  # each is smaller than the one before


def open_ome_zarr(path: Path) -> Source:
    """An OME-Zarr image of 8 bits: gray, RGB, or RGB with opacity; of a folder of bioformats2raw the one in it.

    Raises:
        UserError: no OME-Zarr image or several, more than 8 bits, channels that are no colours, several planes or
            times.

    >>> from ldm.images.write import save_ome_zarr
    >>> open_ome_zarr(save_ome_zarr("a.ome.zarr", tile, 0.5, {})).scale
    Scale(mpp=0.5, origin='OME-Zarr axes', notes=())
    """
    check_zarr(path)
    try:
        told = _told(path)
        if SEVERAL in told or PLATE in told:
            path = _only_image(path, PLATE in told)
            told = _told(path)
        image = told["multiscales"][0]
        axes = [axis["name"] if isinstance(axis, dict) else axis for axis in image["axes"]]
        if len(image["datasets"]) > MOST_LEVELS:
            raise UserError(f"{path} has {len(image['datasets'])} levels; no image has more than {MOST_LEVELS}.")
        arrays = [_array(path, str(dataset["path"])) for dataset in image["datasets"]]
        shape, kind = arrays[0].shape, arrays[0].dtype
        channels = shape[axes.index("c")] if "c" in axes else 1
        levels = [tuple(int(array.shape[axes.index(axis)]) for axis in "xy") for array in arrays]
        names, colours = _channels(told)
        scale = _scale(path, image, axes)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no OME-Zarr image, a Zarr group whose `multiscales` name arrays in it ({error})"
        ) from None
    if any(shape[i] > 1 for i, axis in enumerate(axes) if axis not in "xyc"):
        raise refuse_stack(path, f"{''.join(axes).upper()} {shape}")
    if kind != np.uint8:
        raise refuse_deep(path)
    if channels not in (1, 3, 4) or (channels > 1 and not says_rgb(names, colours)):
        raise refuse_channels(path, channels, names)
    gray, _ = converter("L")

    def read(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        window = {"x": slice(x, x + w), "y": slice(y, y + h), "c": slice(None)}
        block = np.asarray(arrays[level][tuple(window.get(axis, 0) for axis in axes)])
        kept = [axis for axis in axes if axis in window]
        pixels = np.moveaxis(block, [kept.index("y"), kept.index("x")], [0, 1]).reshape(h, w, -1)
        return gray(pixels) if channels == 1 else on_white(pixels[..., :3], pixels[..., 3:].min(-1, initial=255))

    return Source(levels, read, scale, gray=channels == 1, notes=_lacking(arrays[0]))


def _told(path: Path) -> dict[str, Any]:
    attributes = zarr.open_group(str(path), mode="r").attrs.asdict()
    return attributes.get("ome", attributes)


def _only_image(path: Path, plate: bool) -> Path:
    """The image of a folder of images. UserError: it holds several, or the wells of a plate, or none."""
    depth = "*/*/*" if plate else "*"  # row, column, field
    images = sorted(filter(is_ome_zarr, path.glob(depth)), key=lambda image: (len(image.name), str(image)))
    if len(images) == 1:
        return images[0]
    if not images:
        raise UserError(f"{path} says that it holds OME-Zarr images, and none is in it; copy it again from its source")
    what = "is a plate of" if plate else "holds"
    raise UserError(f"{path} {what} {len(images)} images ({some([str(i) for i in images], 4)}); give the one you mean")


def _lacking(array: zarr.Array) -> tuple[str, ...]:
    """What to tell of chunks or shards without a file: Zarr leaves out those of its fill value; copies lose some."""
    outer = array.shards or array.chunks
    whole = math.prod(-(-side // part) for side, part in zip(array.shape, outer))
    lost = whole - array.nchunks_initialized * math.prod(array.chunks) // math.prod(outer)
    told = f"{lost} of {whole} chunks of its finest level have no file and are read as {array.fill_value}"
    return (f"{told}; copy it again if they were lost",) if lost > 0 else ()


def _array(path: Path, name: str) -> zarr.Array:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"'{name}' lies outside of it")
    return zarr.open_array(str(path / name), mode="r")


def _channels(told: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names and colours of the channels, "" where unknown."""
    channels = told.get("omero", {}).get("channels", [])
    return tuple([str(channel.get(key, "")) for channel in channels] for key in ("label", "color"))


def _scale(path: Path, image: dict[str, Any], axes: Sequence[str]) -> Scale:
    """Of the finest level: its own scale times that of all levels, in the unit of its axes; unknown where both lack."""
    sides, steps = dict.fromkeys("xy", 1.0), list(_scales(image))
    if not steps:
        return UNKNOWN
    for step in steps:
        for axis in sides:
            sides[axis] *= float(step["scale"][axes.index(axis)])
    units = {axis["name"]: axis.get("unit") for axis in image["axes"] if isinstance(axis, dict)}
    known = [axis for axis in sides if units.get(axis)]
    return physical_scale(path, tuple(sides[a] for a in known), tuple(units[a] for a in known), "OME-Zarr axes")


def _scales(image: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for holder in (image["datasets"][0], image):
        yield from (step for step in holder.get("coordinateTransformations", []) if step["type"] == "scale")
