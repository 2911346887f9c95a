"""Reads parts of large images: whatever `ldm.images.slides` opens, and OME-Zarr."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from ldm.errors import UserError
from ldm.images.slides import open_slide

BLOCK = 2048


@dataclass(frozen=True)
class LargeImage:
    """One image at its finest level.

    Attributes: shape (H,W,3). mpp: micrometres per pixel, None where unknown. read(x, y, width, height) -> uint8 part.
    """

    path: Path
    shape: tuple[int, int, int]
    read: Callable[[int, int, int, int], np.ndarray]
    mpp: float | None = None

    def whole(self) -> np.ndarray:
        """(H,W,3) uint8."""
        return self.read(0, 0, self.shape[1], self.shape[0])

    def bands(self) -> list[tuple[int, int]]:
        """Rows (top, bottom) of horizontal bands, to go over the image part by part."""
        return [(top, min(top + BLOCK, self.shape[0])) for top in range(0, self.shape[0], BLOCK)]


def open_large(path: Path | str) -> LargeImage:
    """An image file or an OME-Zarr folder. UserError where it is neither, or not of RGB with 8 bits."""
    path = Path(path)
    if path.is_dir():
        return _ome_zarr(path)
    slide = open_slide(path, mpp=1.0)  # micrometres are asked for below
    width, height = slide.dimensions

    def read(x: int, y: int, w: int, h: int) -> np.ndarray:
        return slide.read(x, y, w, h, (w, h))

    return LargeImage(path, (height, width, 3), read, _mpp(path))


def _mpp(path: Path) -> float | None:
    try:
        return open_slide(path).mpp or None
    except UserError:
        return None


def _ome_zarr(path: Path) -> LargeImage:
    try:
        group = zarr.open_group(str(path), mode="r")
        scales = group.attrs["ome"]["multiscales"][0]["datasets"][0]
        array = group[scales["path"]]
        mpp = float(scales["coordinateTransformations"][0]["scale"][-1])
    except (FileNotFoundError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path} is no OME-Zarr image: {error}") from error
    if array.ndim != 3 or array.shape[0] != 3 or array.dtype != np.uint8:
        raise UserError(f"{path} holds {array.shape} {array.dtype}; an image of 3 channels (c, y, x) uint8 is read.")

    def read(x: int, y: int, w: int, h: int) -> np.ndarray:
        return np.moveaxis(np.asarray(array[:, y : y + h, x : x + w]), 0, -1)

    return LargeImage(path, (*array.shape[1:], 3), read, mpp)
