"""Where tokens are, told to a transformer: added to them as sines and cosines, or by turning queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps

import torch
from torch import Tensor


def axes(grid: Sequence[int], steps: Sequence[float], device: torch.device) -> list[Tensor]:
    """The place (N,) float64 of each point of a grid along each axis, row by row, in steps of `steps`.

    >>> axes((1, 3), (1.0, 0.5), torch.device("cpu"))
    [tensor([0., 0., 0.], dtype=torch.float64), tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)]
    """
    kind = torch.float32 if device.type == "mps" else torch.float64  # which has no other
    sides = [torch.arange(count, device=device, dtype=kind) * step for count, step in zip(grid, steps)]
    return [each.flatten() for each in torch.meshgrid(*sides, indexing="ij")]


def angles(places: Tensor, count: int) -> Tensor:
    """Places (N,) times `count` frequencies from 1 down to 1/10000: (N,count).

    >>> angles(torch.tensor([2.0]), 2)
    tensor([[2.0000, 0.0200]])
    """
    rates = 10000.0 ** (-torch.arange(count, device=places.device, dtype=places.dtype) / count)
    return places[:, None] * rates


def sincos(places: Sequence[Tensor], dim: int) -> Tensor:
    """The embedding (N,dim) float32 of places (N,) along each axis: columns, then rows; of each sines, then cosines.

    >>> sincos([torch.tensor([0.0])], 4)
    tensor([[0., 0., 1., 1.]])
    """
    turns = [angles(each, dim // len(places) // 2) for each in reversed(places)]
    return torch.cat([wave for each in turns for wave in (each.sin(), each.cos())], dim=-1).float()


def token_positions(side: int, dim: int, base: int, scale: float) -> Tensor:
    """The embedding (1,side*side,dim) of tokens on a square that lies over an image of base x base tokens (PixCell).

    >>> token_positions(4, 8, 16, 2.0).shape
    torch.Size([1, 16, 8])
    """
    places = axes((side, side), [base / side / scale] * 2, torch.zeros(()).device)
    return sincos([place + base // side**2 for place in places], dim)[None]


def kept(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of a grid, its steps, a size, and a tensor on whose device it works, which keeps its last results: a
    network asks at every step. They are shared, so nobody may change them. Compiled code, and what only traces shapes,
    computes them anew.

    >>> ones = kept(lambda grid, steps, dim, device: torch.ones(*grid, dim, device=device))
    >>> ones((2, 3), (1.0, 1.0), 4, torch.zeros(1)) is ones((2, 3), (1.0, 1.0), 4, torch.zeros(1))
    True
    """

    @lru_cache(maxsize=8)
    def keep(*given: object) -> Tensor:
        with torch.inference_mode(False):  # what is made in it could not be trained with later
            return compute(*given)

    def found(grid: tuple[int, ...], steps: tuple[float, ...], dim: int, like: Tensor) -> Tensor:
        plain = type(like) is Tensor and not torch.compiler.is_compiling()
        return (keep if plain else compute)(grid, steps, dim, like.device)

    return wraps(compute)(found)


@kept
def grid_sincos(grid: tuple[int, ...], steps: tuple[float, ...], dim: int, device: torch.device) -> Tensor:
    """`sincos` of the points of a grid.

    >>> grid_sincos((1, 2), (1.0, 1.0), 4, torch.zeros(1))[:, [1, 3]]
    tensor([[0., 1.],
            [0., 1.]])
    """
    return sincos(axes(grid, steps, device), dim)


@kept
def grid_turns(grid: tuple[int, ...], steps: tuple[float, ...], dim: int, device: torch.device) -> Tensor:
    """Cosines and sines (2,N,dim/2) of the angles by which rotary positions on a grid turn the pairs of a head of
    `dim`: on two axes half of them by the row, half by the column.

    >>> grid_turns((1,), (1.0,), 4, torch.zeros(1))
    tensor([[[1., 1.]],
            [[0., 0.]]])
    """
    count = dim // 2 // len(grid)
    turns = torch.cat([angles(each, count) for each in axes(grid, steps, device)], dim=-1).float()
    return torch.stack([turns.cos(), turns.sin()])


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x (B,heads,M,d) with neighbouring pairs of its first N tokens turned by angles, of which turns (2,N,d/2) are the
    cosines and sines; the rest stay.

    >>> turned(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[0.0]], [[1.0]]]))
    tensor([[[[0., 1.]]]])
    """
    count = turns.shape[1]
    a, b = x[:, :, :count].float().unflatten(-1, (-1, 2)).unbind(-1)                # (B,heads,N,d/2) each
    cos, sin = turns
    new = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([new, x[:, :, count:]], dim=2) if count < x.shape[2] else new
