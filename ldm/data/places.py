"""Where tiles lie on a slide, as the files of CLAM, TRIDENT and STAMP say it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ldm.errors import UserError
from ldm.foreign.hdf5 import values_of

_FARTHEST = 1e9  # level-0 pixels, or micrometres, that a place on a slide has at most
STAMP_1 = (224, 256.0)  # pixels and micrometres of a tile of STAMP 1, which wrote neither


@dataclass(frozen=True)
class Places:
    """Where tiles lie on a slide.

    Attributes:
        coords: (N, 2) level-0 x, y of the tiles' top-left corners.
        extent: level-0 pixels that a tile covers along each side; step: between neighbouring tiles; size: pixels of a
            tile as it was cut. slide: width and height of the slide. None where the file does not say.
        micrometres: coords, extent and step are in micrometres, not in pixels; see `in_pixels`.
    """

    coords: np.ndarray
    extent: float | None = None
    step: float | None = None
    size: int | None = None
    slide: tuple[float, float] | None = None
    micrometres: bool = False

    def checked(self, source: Path | str) -> Places:
        """The same. UserError for coordinates and sizes that no tile has.

        >>> Places(np.array([[0, 0]]), extent=-1).checked("a.h5")
        Traceback (most recent call last):
        ldm.errors.UserError: a.h5 says that its tiles have an extent of -1 px; correct it, or write it again.
        """
        if self.coords.dtype.kind not in "iuf" or not (np.abs(self.coords.astype(float)) < _FARTHEST).all():
            raise UserError(f"{source} has coords that are no places on a slide ({self.coords.dtype}); write it again.")
        sizes = {"an extent": self.extent, "a size": self.size, "a distance": self.step}
        for name, value in sizes.items():
            if value is not None and not 0 < value < _FARTHEST:
                told = f"{source} says that its tiles have {name} of {value:g} px"
                raise UserError(f"{told}; correct it, or write it again.")
        return self

    def in_pixels(self, mpp: float | None, source: Path) -> Places:
        """The same in level-0 pixels, each `mpp` µm wide. UserError if that is not known and needed.

        >>> Places(np.array([[0.0, 256.0]]), 256.0, micrometres=True).in_pixels(0.5, "a.h5").coords
        array([[  0., 512.]])
        """
        if not self.micrometres:
            return self
        if not mpp:
            raise UserError(
                f"{source} has its coordinates in micrometres, and the slide's micrometres per pixel are not known; "
                "cut its tiles with --slide-mpp."
            )
        extent, step = (None if value is None else value / mpp for value in (self.extent, self.step))
        return replace(self, coords=self.coords / mpp, extent=extent, step=step, micrometres=False)


def places_in(file: h5py.File) -> Places | None:
    """`coords` of a file of CLAM, TRIDENT or STAMP, and what its attributes say of the tiles.

    UserError: an attribute that is no number, attributes that contradict each other.

    >>> with h5py.File("a.h5", "w") as file:
    ...     file["coords"] = np.array([[0, 0], [512, 0]])
    ...     file["coords"].attrs.update({"patch_size": "256", "patch_size_level0": np.array([512])})
    ...     places_in(file).extent, places_in(file).size
    (512.0, 256)
    """
    return _places_in(file).checked(file.filename) if "coords" in file else None


def _places_in(file: h5py.File) -> Places:
    attrs = {**file.attrs, **file["coords"].attrs}
    coords = unbatched(values_of(file["coords"]))

    def number(name: str, default: float | None = None) -> float | None:
        return _number(attrs[name], name, file.filename) if name in attrs else default

    if "tile_size_um" in attrs or (attrs.get("unit") == "um" and "tile_size" in attrs):
        side, size = number("tile_size_um", number("tile_size")), number("tile_size_px")
        return Places(coords, side, side, None if size is None else round(size), micrometres=True)
    size, extent = number("patch_size"), number("patch_size_level0")
    if "extractor" in attrs and size is None and not np.any(coords % STAMP_1[0]):
        return Places(coords / STAMP_1[0] * STAMP_1[1], STAMP_1[1], STAMP_1[1], STAMP_1[0], micrometres=True)
    step, slide, downsample = None, None, number("downsample", 1.0)
    if extent is not None:  # TRIDENT; `overlap` is in pixels of a tile
        overlap = number("overlap_level0", number("overlap", 0.0) * (extent / size if size else 1.0))
        step = extent - overlap
        _check_magnification(size, extent, number("level0_magnification"), number("target_magnification"), file)
        if "level0_width" in attrs and "level0_height" in attrs:
            slide = (number("level0_width"), number("level0_height"))
    elif size is not None and ("downsample" in attrs or number("patch_level", 0.0) == 0):  # CLAM
        extent = size * downsample
        if np.shape(attrs.get("level_dim")) == (2,):
            slide = tuple(float(side) * downsample for side in attrs["level_dim"])
    return Places(coords, extent, step, None if size is None else round(size), slide)


def _check_magnification(
    size: float | None, extent: float, level0: float | None, target: float | None, file: h5py.File
) -> None:
    if size and level0 and target and abs(size * level0 / target / extent - 1) > 0.02:
        raise UserError(
            f"{file.filename} contradicts itself: patches of {size:g} px at {target:g}x of a slide at {level0:g}x "
            f"cover {size * level0 / target:g} level-0 px, and its patch_size_level0 is {extent:g}. Write it again."
        )


def _number(value: Any, name: str, path: str) -> float:
    """An attribute that tools write as a number, text, or an array: one number, or two, for x and y, that agree."""
    try:
        each = [float(v.decode() if isinstance(v, bytes) else v) for v in np.ravel(value)]
        if each and max(each) - min(each) <= 0.01 * abs(max(each)):
            return float(np.mean(each))
    except ValueError:
        pass
    raise UserError(f"{path}: the attribute `{name}` of its coords is {value!r}, which is not one number.")


def unbatched(values: np.ndarray) -> np.ndarray:
    """(1, N, D) or (N, 1, D), as some extractors write, -> (N, D).

    >>> unbatched(np.zeros((1, 5, 8))).shape, unbatched(np.zeros((5, 1, 8))).shape
    ((5, 8), (5, 8))
    """
    single = next((axis for axis in (0, 1) if values.ndim == 3 and values.shape[axis] == 1), None)
    return values if single is None else values.squeeze(single)
