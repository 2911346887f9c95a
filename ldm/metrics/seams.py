"""Do the borders of tiles show in a stitched image?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError

GRID = 8  # px: blocks of the JPEG and of a first stage of f8; their edges are in real and generated pixels alike
NEAR = 32  # px beside a border that count as its surroundings
FEW = 64  # rows that are differenced at once

Lines = tuple[np.ndarray, np.ndarray]  # gradients across the lines between rows, and between columns


def line_gradients(bands: Iterable[np.ndarray]) -> Lines:
    """Mean absolute difference of grey across each line between rows (H-1,) and between columns (W-1,).

    bands: the image (H,W,3) uint8 as horizontal bands from above to below.

    >>> image = np.zeros((4, 6, 3), np.uint8)
    >>> image[2:] = 100
    >>> line_gradients([image[:3], image[3:]])  # between rows, between columns
    (array([  0., 100.,   0.]), array([0., 0., 0., 0., 0.]))
    """
    rows, columns, count, last = [], 0.0, 0, None
    for part in (band[top : top + FEW] for band in bands for top in range(0, len(band), FEW)):
        grey = part.astype(np.float64).mean(2)  # (h,W)
        columns = columns + np.abs(np.diff(grey, axis=1)).sum(0)
        count += len(grey)
        grey = grey if last is None else np.concatenate([last, grey])
        rows.append(np.abs(np.diff(grey, axis=0)).mean(1))
        last = grey[-1:]
    return np.concatenate(rows), columns / count


def seam_ratios(image: np.ndarray | Iterable[np.ndarray], tile: int, near: int | None = None) -> np.ndarray:
    """(tile,): gradient across the borders of a tile lattice over that inside tiles, for each offset of the lattice.

    image (H,W,3) uint8, or its horizontal bands. Entry 0 is the lattice that starts in the corner of the image. near:
    of the inside of tiles, take only lines within so many pixels of a border and a multiple of GRID away from it.

    >>> seams = tile[:128, :128].copy()
    >>> seams[:, 64:] //= 2  # the right half is darker
    >>> [float(seam_ratios(image, 64)[0]) for image in (tile[:128, :128], seams)]
    [1.2880, 4.9461]
    """
    return lattice_ratios(line_gradients([image] if isinstance(image, np.ndarray) else image), tile, near)


def lattice_ratios(across: Lines, tile: int, near: int | None = None) -> np.ndarray:
    """The same of `line_gradients`.

    >>> lattice_ratios((np.array([1.0, 3.0, 1.0]), np.ones(3)), 2)
    array([2. , 0.5])
    """
    ratios = []
    for offset in range(tile):
        border, inside = [], []
        for lines in across:
            distance = _from_border(len(lines), tile, offset)
            border.append(lines[distance == 0])
            like = (np.abs(distance) <= near) & (distance % GRID == 0) if near else True
            inside.append(lines[(distance != 0) & like])
        surroundings = np.concatenate(inside).mean()
        ratios.append(np.concatenate(border).mean() / surroundings if surroundings else 1.0)  # a plain image has none
    return np.array(ratios)


def seam_profile(across: Lines, tile: int, near: int = NEAR) -> np.ndarray:
    """(2 near + 1,): mean gradient from `near` px before a border of the lattice to as many behind, over its mean.

    near: less than half a tile; more is cut to that.

    >>> seam_profile((np.ones(15), np.array([1.0] * 7 + [4.0] + [1.0] * 7)), 8, near=2)
    array([0.7692, 0.7692, 1.9231, 0.7692, 0.7692])
    """
    near = min(near, (tile - 1) // 2)
    lines = np.concatenate(across)
    distance = np.concatenate([_from_border(len(own), tile, 0) for own in across])
    means = np.array([lines[distance == place].mean() for place in range(-near, near + 1)])
    return means / means.mean() if means.any() else np.ones(len(means))


def _from_border(count: int, tile: int, offset: int) -> np.ndarray:
    """(count,): of the lines between pixels, how far the nearest border of the lattice lies; before it below 0."""
    return (np.arange(count) + 1 - offset + tile // 2) % tile - tile // 2


def measure_seams(image: np.ndarray, tile: int, source: Path | str) -> dict[str, Any]:
    """The seam ratio over `all` of the inside and `like` for like, each with the 95% range of all other lattices.

    UserError: an image of less than two tiles along a side.

    >>> measured = measure_seams(tile, 64, "tile.png")
    >>> measured["all"]["low"] < measured["all"]["ratio"] < measured["all"]["high"]
    True
    """
    if min(image.shape[:2]) < 2 * tile:
        height, width = image.shape[:2]
        raise UserError(f"{source} gives {width} x {height} px; seams need two tiles of {tile} px along each side.")
    measured: dict[str, Any] = {"tile": tile}
    across = line_gradients([image])
    for name, near in (("all", None), ("like", NEAR)):
        ratios = lattice_ratios(across, tile, near)
        low, high = np.percentile(ratios[1:], (2.5, 97.5))
        measured[name] = {"ratio": float(ratios[0]), "low": float(low), "high": float(high)}
    return measured
