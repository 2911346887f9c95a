"""Tiling: a denoiser over a canvas of any size, made from a denoiser over windows.

Positions and sizes are in latent pixels. A window's condition comes from two places, the first of which wins:

- the cond of the canvas (B images), whose parts hold for every window; `concat` (B,C,H,W) is cut as the canvas is;
- `condition(corners)`, any function of the windows' upper left corners, as `FeatureField.at` is.

A canvas cond goes through guidance as any other, so cfg(tiled(d)) and tiled(cfg(d)) are the same but for rounding.
The canvas may live on the CPU: windows visit `device`, at most `batch_size` at a time. What a denoiser gives beside x0,
the place of its variance (`RangeDenoiser`), is averaged as x0 is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from ldm.devices import receive, send
from ldm.diffusion.denoiser import Cond, Denoiser, RangeDenoiser
from ldm.rng import fold

Corner = tuple[int, int]
WindowCondition = Callable[[Sequence[Corner]], Cond]
AnyDenoiser = TypeVar("AnyDenoiser", Denoiser, RangeDenoiser)

BLENDS = ("uniform", "smooth")


def fixed_starts(size: int, window: int, stride: int) -> list[int]:
    """Window starts along one axis, every `stride`; the last is moved inwards so that the axis is covered exactly.

    >>> fixed_starts(100, window=64, stride=32)
    [0, 32, 36]
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be in 1..{window}, the window; got {stride}")
    _check(size, window)
    return sorted({min(start, size - window) for start in range(0, size - window + stride, stride)})


def drawn_starts(size: int, window: int, *seed: int) -> list[int]:
    """Starts of windows from end to end of an axis at places drawn from `seed`, neighbours overlapping.

    As many as overlap by 3/16 of a window on average, or more where that is no whole number, so the work grows as the
    axis does. Each overlaps by 1/8 at least; the rest falls to neighbours at random, half a window at most to any.

    >>> drawn_starts(256, 64, 0), drawn_starts(256, 64, 1)
    ([0, 51, 100, 155, 192], [0, 55, 103, 157, 192])
    """
    _check(size, window)
    span, least = size - window, window // 8
    count = -(-span // (window - 3 * window // 16))
    if count <= 1:
        return [0, span] if span else [0]
    free = count * (window - least) - span
    cuts = sorted(fold(*seed, index) % (free + 1) for index in range(count - 1))
    extra = [high - low for low, high in pairwise([0, *cuts, free])]
    for index in [*range(count)] * 2:
        surplus = max(extra[index] - (window + 1) // 2, 0)
        extra[index] -= surplus
        extra[(index + 1) % count] += surplus
    return [0, *accumulate(window - least - more for more in extra)]


def _check(size: int, window: int) -> None:
    if window > size:
        raise ValueError(f"a canvas side of {size} is smaller than the window of {window}")


def smooth_weight(window: int, first: bool = False, last: bool = False) -> Tensor:
    """Raised-cosine weight (window,) along one axis; flat towards the canvas' side for its first and last window.

    >>> smooth_weight(4), smooth_weight(4, first=True)
    (tensor([0.1464, 0.8536, 0.8536, 0.1464]), tensor([1.0000, 1.0000, 0.8536, 0.1464]))
    """
    weight = (torch.pi * (torch.arange(window) + 0.5) / window).sin() ** 2
    if first:
        weight[: (window + 1) // 2] = 1
    if last:
        weight[window // 2 :] = 1
    return weight


def _place(corner: Corner, window: int) -> tuple[slice, ...]:
    """Where the window at a corner lies in a canvas (...,H,W)."""
    return (..., *(slice(start, start + window) for start in corner))


def window_conds(cond: Cond, images: Sequence[int], corners: Sequence[Corner], window: int) -> dict[str, Tensor]:
    """The condition of K windows, given by image and corner, from that of the canvas (see above).

    >>> cond = {"concat": torch.arange(16.0).view(1, 1, 4, 4), "crossattn": torch.zeros(1, 5, 16)}
    >>> windows = window_conds(cond, images=[0, 0], corners=[(0, 0), (2, 2)], window=2)
    >>> windows["concat"][1], windows["crossattn"].shape
    (tensor([[[10., 11.],
             [14., 15.]]]), torch.Size([2, 5, 16]))
    """
    conds = {}
    for part, value in cond.items():
        if part.rpartition("/")[2] == "concat":  # of a composed condition, "name/concat"
            cut = [value[image][_place(corner, window)] for image, corner in zip(images, corners)]
            conds[part] = torch.stack(cut)
        else:
            conds[part] = value[list(images)]
    return conds


@dataclass(frozen=True)
class Cover:
    """The windows of a canvas at one noise level: one at every start of `rows` with every start of `cols`.

    Attributes:
        size: (height, width) of the canvas. window: side of a window. rows, cols: ascending starts along both axes.
        smooth: whether weights fall towards a window's sides (`smooth_weight`), or are even.

    >>> Cover((4, 6), 4, (0,), (0, 2), smooth=False).corners
    [(0, 0), (0, 2)]
    """

    size: tuple[int, int]
    window: int
    rows: Sequence[int]
    cols: Sequence[int]
    smooth: bool

    @property
    def corners(self) -> list[Corner]:
        """Upper left corners, row by row."""
        return [(row, col) for row in self.rows for col in self.cols]

    def blending(self, like: Tensor) -> Callable[[Corner], Tensor]:
        """A function from the corner of a window to its weights (1,window,window), of the type of `like`."""

        @cache
        def weights(*ends: tuple[bool, bool]) -> Tensor:
            if not self.smooth:
                return torch.ones(1, self.window, self.window).to(like)
            down, across = (smooth_weight(self.window, *end) for end in ends)
            return (down[:, None] * across).to(like)[None]

        def blend(corner: Corner) -> Tensor:
            return weights(*((start == 0, start + self.window == side) for start, side in zip(corner, self.size)))

        return blend


Covering = Callable[[tuple[int, int], float], Cover]  # of a canvas's size and a noise level


def fixed_cover(size: tuple[int, int], window: int, stride: int, blend: str = "uniform") -> Cover:
    """Windows at fixed places, every `stride` along both axes; see `tiled`.

    >>> fixed_cover((4, 8), window=4, stride=2).corners
    [(0, 0), (0, 2), (0, 4)]
    """
    return Cover(size, window, *(fixed_starts(side, window, stride) for side in size), blend == "smooth")


def drawn_cover(size: tuple[int, int], window: int, seed: int, sigma: float) -> Cover:
    """Windows at places that are a function of seed and noise level; see `shifted`.

    >>> drawn_cover((8, 24), window=8, seed=0, sigma=1.0).cols
    [0, 6, 9, 16]
    """
    bits = struct.unpack("<I", struct.pack("<f", sigma))[0]
    rows, cols = (drawn_starts(side, window, seed, bits, axis) for axis, side in enumerate(size))
    return Cover(size, window, rows, cols, True)


def covered(
    denoiser: AnyDenoiser,
    covering: Covering,
    condition: WindowCondition | None = None,
    batch_size: int = 16,
    device: torch.device | None = None,
) -> AnyDenoiser:
    """Windows that `covering` gives for each noise level, their x0 averaged by weight. See `tiled` and `shifted`.

    >>> canvas = covered(lambda x, *_: x, lambda size, sigma: fixed_cover(size, 4, 2 if sigma > 1 else 4))
    >>> canvas(torch.ones(1, 1, 4, 8), torch.tensor([1.0]), {}).mean()
    tensor(1.)
    """

    def canvas(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        cover = covering((x.shape[-2], x.shape[-1]), float(sigma[0]))
        return _over_windows(denoiser, x, sigma, cond, cover, condition, batch_size, device)

    return canvas


def _over_windows(
    denoiser: AnyDenoiser,
    x: Tensor,
    sigma: Tensor,
    cond: Cond,
    cover: Cover,
    condition: WindowCondition | None,
    batch_size: int,
    device: torch.device | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Denoise every window of the canvas x (B,C,H,W), at most batch_size at a time, and average where they overlap."""
    device, corners, window = torch.device(device or x.device), cover.corners, cover.window
    blend, weight = cover.blending(x), torch.zeros_like(x[0, :1])
    for corner in corners:
        weight[_place(corner, window)] += blend(corner)
    totals: list[Tensor] = []                                                   # x0, and the variance if there is one

    def add(images: Sequence[int], chunk: Sequence[Corner], parts: Sequence[Tensor]) -> None:
        totals.extend(torch.zeros_like(x) for _ in parts[len(totals) :])
        for total, part in zip(totals, parts):
            for image, corner, values in zip(images, chunk, part):
                total[image][_place(corner, window)] += values * blend(corner)

    jobs = [(image, corner) for image in range(len(x)) for corner in corners]
    under_way = None  # while the device denoises a chunk, the one before comes home
    for start in range(0, len(jobs), batch_size):
        images, chunk = zip(*jobs[start : start + batch_size])
        windows = torch.stack([x[image][_place(corner, window)] for image, corner in zip(images, chunk)])
        conds = {**condition(chunk)} if condition else {}
        conds |= {name: send(part, device) for name, part in window_conds(cond, images, chunk, window).items()}
        out = denoiser(send(windows, device), send(sigma[list(images)], device), conds)
        parts = out if isinstance(out, tuple) else (out,)
        if under_way:
            add(*under_way[:2], [home() for home in under_way[2]])
        under_way = images, chunk, [receive(part.to(x.dtype), x.device) for part in parts]
    add(*under_way[:2], [home() for home in under_way[2]])
    averages = [total.div_(weight) for total in totals]
    return averages[0] if len(averages) == 1 else tuple(averages)


def tiled(
    denoiser: AnyDenoiser,
    window: int,
    stride: int,
    condition: WindowCondition | None = None,
    batch_size: int = 16,
    device: torch.device | None = None,
    blend: str = "uniform",
) -> AnyDenoiser:
    """Overlapping windows at fixed offsets, their x0 averaged (MultiDiffusion, arXiv:2302.08113; as published for
    large histology images, arXiv:2312.07330). A step costs about (window/stride)^2 evaluations per window area.

    blend: `uniform` weights, or `smooth` ones that fall towards a window's sides.

    >>> canvas = tiled(lambda x, *_: x - x.mean((2, 3), keepdim=True), window=4, stride=2)
    >>> canvas(torch.arange(8.0).expand(1, 1, 4, 8), torch.tensor([1.0]), {})[0, 0, 0]  # each window's mean is 0
    tensor([-1.5000, -0.5000, -0.5000,  0.5000, -0.5000,  0.5000,  0.5000,  1.5000])
    """
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}; got {blend!r}")

    def covering(size: tuple[int, int], sigma: float) -> Cover:
        return fixed_cover(size, window, stride, blend)

    return covered(denoiser, covering, condition, batch_size, device)


def shifted(
    denoiser: AnyDenoiser,
    window: int,
    condition: WindowCondition | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: torch.device | None = None,
) -> AnyDenoiser:
    """Windows at places drawn anew at every noise level: little more than one evaluation per window area and step.

    They overlap a little (`drawn_starts`), and smooth weights lead from one to the next. The places are a function of
    seed and sigma, so the denoiser keeps no state. A canvas of one window is denoised as it would be without tiling.

    >>> seen = []
    >>> canvas = shifted(lambda x, sigma, cond: (seen.append(len(x)), x)[1], window=8)
    >>> canvas(torch.zeros(1, 4, 8, 32), torch.tensor([1.0]), {}).shape, seen  # of five windows
    (torch.Size([1, 4, 8, 32]), [5])
    """

    def covering(size: tuple[int, int], sigma: float) -> Cover:
        return drawn_cover(size, window, seed, sigma)

    return covered(denoiser, covering, condition, batch_size, device)
