"""Volumes that were made slice by slice: whether neighbouring slices agree."""

from __future__ import annotations

import numpy as np


def roughness(slices: np.ndarray, where: np.ndarray | None = None) -> float:
    """How rough a stack of slices (N,H,W), N and H or W at least 3, is through the plane, in units of in the plane.

    The root mean square of second differences v[k-1] - 2 v[k] + v[k+1] from slice to slice, over that along rows and
    columns: slices that do not agree with their neighbours raise it, a blur of all alike does not. The voxels of two
    stacks are to be compared at the same sizes, since it grows with the distance of slices.

    where: (N,H,W) bool, places that count; all by default. NaN where nothing varies in the plane.

    >>> rows = np.cos(np.arange(32))
    >>> round(roughness(rows[:, None, None] + rows[:, None] + rows), 2)             # alike along all axes
    1.0
    """
    volume = np.asarray(slices, np.float64)
    through, *inside = (_second(volume, axis, where) for axis in range(3))
    within = np.concatenate(inside)
    scale = float(np.sqrt(np.square(within).mean())) if within.size else 0.0
    return float(np.sqrt(np.square(through).mean())) / scale if scale and through.size else float("nan")


def _second(volume: np.ndarray, axis: int, where: np.ndarray | None) -> np.ndarray:
    moved = np.moveaxis(volume, axis, 0)
    found = moved[:-2] - 2 * moved[1:-1] + moved[2:]
    if where is None:
        return found.ravel()
    own = np.moveaxis(where, axis, 0)
    return found[own[:-2] & own[1:-1] & own[2:]]
