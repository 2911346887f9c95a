"""Do the borders of tiles show in a stitched image?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError

GRID = 8  # px: blocks of the JPEG and of a first stage of f8; their edges are in real and generated pixels alike
NEAR = 32  # px beside a border that count as its surroundings


def line_gradients(bands: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean absolute difference of grey across each line between rows (H-1,) and between columns (W-1,).

    bands: the image (H,W,3) uint8 as horizontal bands from above to below.

    >>> image = np.zeros((4, 6, 3), np.uint8)
    >>> image[2:] = 100
    >>> line_gradients([image[:3], image[3:]])  # between rows, between columns
    (array([  0., 100.,   0.]), array([0., 0., 0., 0., 0.]))
    """
    rows, columns, count, last = [], 0.0, 0, None
    for band in bands:
        grey = band.astype(np.float64).mean(2)  # (h,W)
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
    across = line_gradients([image] if isinstance(image, np.ndarray) else image)
    ratios = []
    for offset in range(tile):
        border, inside = [], []
        for lines in across:
            behind = (np.arange(len(lines)) + 1 - offset) % tile  # lines since the last border
            distance = np.minimum(behind, tile - behind)
            border.append(lines[distance == 0])
            like = (distance <= near) & (distance % GRID == 0) if near else True
            inside.append(lines[(distance > 0) & like])
        surroundings = np.concatenate(inside).mean()
        ratios.append(np.concatenate(border).mean() / surroundings if surroundings else 1.0)  # a plain image has none
    return np.array(ratios)


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
    for name, near in (("all", None), ("like", NEAR)):
        ratios = seam_ratios(image, tile, near)
        low, high = np.percentile(ratios[1:], (2.5, 97.5))
        measured[name] = {"ratio": float(ratios[0]), "low": float(low), "high": float(high)}
    return measured
