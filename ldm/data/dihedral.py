"""The eight symmetries of a square tile (the dihedral group D4), exact on pixels: no interpolation."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")

COUNT = 8


def apply(x: Array, k: int) -> Array:
    """Variant `k` (0..7) of x (..., H, W): a left-right flip if k >= 4, then `k % 4` quarter turns counter-clockwise.

    k = 0 is x itself. numpy arrays and torch tensors alike; for odd `k % 4` H and W change places.

    >>> apply(np.array([[1, 2], [3, 4]]), 1)
    array([[2, 4],
           [1, 3]])
    >>> apply(np.array([[1, 2], [3, 4]]), 4)
    array([[2, 1],
           [4, 3]])
    """
    if not 0 <= k < COUNT:
        raise ValueError(f"a dihedral variant is 0..7, got {k}")
    if isinstance(x, np.ndarray):
        return np.rot90(np.flip(x, -1) if k >= 4 else x, k % 4, (-2, -1))
    return (x.flip(-1) if k >= 4 else x).rot90(k % 4, (-2, -1))
