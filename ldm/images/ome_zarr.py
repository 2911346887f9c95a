"""Reads OME-Zarr images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr

from ldm.errors import UserError

TO_MICROMETRES = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4}


class OmeZarr:
    """An OME-Zarr image (0.5; 0.4 too) of 8 bits and 1, 3 or 4 channels; of further axes, such as t and z, the first.

    Attributes:
        levels: (width, height) of each, the finest first. channels: how many. mpp: micrometres per pixel of the finest,
            0 where its axes have no unit of length.
    Raises:
        UserError: no OME-Zarr image, or one of another kind.
    """

    def __init__(self, path: Path) -> None:
        try:
            attributes = zarr.open_group(str(path), mode="r").attrs.asdict()
            image = attributes.get("ome", attributes)["multiscales"][0]
            self._axes = [axis["name"] if isinstance(axis, dict) else axis for axis in image["axes"]]
            self._arrays = [_array(path, str(dataset["path"])) for dataset in image["datasets"]]
            shape, kind = self._arrays[0].shape, self._arrays[0].dtype
            self.channels = shape[self._axes.index("c")] if "c" in self._axes else 1
            self.levels = [tuple(array.shape[self._axes.index(axis)] for axis in "xy") for array in self._arrays]
            self.mpp = _mpp(image, self._axes)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no OME-Zarr image, a Zarr group whose `multiscales` name arrays in it ({error})"
            ) from None
        if kind != np.uint8 or self.channels not in (1, 3, 4):
            held = f"{''.join(self._axes)} {shape} {kind}"
            raise UserError(f"{path} holds {held}; images of 8 bits and of 1, 3 or 4 channels are read")

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """A part of a level, in its pixels: (h,w,channels) uint8."""
        window = {"x": slice(x, x + w), "y": slice(y, y + h), "c": slice(None)}
        block = np.asarray(self._arrays[level][tuple(window.get(axis, 0) for axis in self._axes)])
        kept = [axis for axis in self._axes if axis in window]
        return np.moveaxis(block, [kept.index("y"), kept.index("x")], [0, 1]).reshape(h, w, -1)


def _array(path: Path, name: str) -> zarr.Array:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"'{name}' lies outside of it")
    return zarr.open_array(str(path / name), mode="r")


def _mpp(image: dict[str, Any], axes: Sequence[str]) -> float:
    scales = dict.fromkeys("xy", 1.0)
    for step in _scales(image):
        for axis in scales:
            scales[axis] *= float(step["scale"][axes.index(axis)])
    units = {axis["name"]: axis.get("unit") for axis in image["axes"] if isinstance(axis, dict)}
    known = [scales[axis] * TO_MICROMETRES[units[axis]] for axis in scales if units.get(axis) in TO_MICROMETRES]
    return float(np.mean(known)) if known else 0.0


def _scales(image: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for holder in (image["datasets"][0], image):
        yield from (step for step in holder.get("coordinateTransformations", []) if step["type"] == "scale")
