"""Tiling: a denoiser over a canvas of any size, made from a denoiser over windows.

Positions and sizes are in latent pixels. A window's condition comes from two places, the first of which wins:

- the cond of the canvas (B images). Parts shaped as the network takes them hold for every window; `concat` (B,C,H,W) is
  cut as the canvas is; `crossattn` (B,rows,cols,L,D), `vector` (B,rows,cols,D) and `label` (B,rows,cols) are fields,
  read linearly (labels: nearest) with their first cell at the first window, their last at the last.
- `condition(corners)`, any function of the windows' upper left corners, as `FeatureField.at` is.

A canvas cond goes through guidance as any other, so cfg(tiled(d)) and tiled(cfg(d)) are the same but for rounding.
The canvas may live on the CPU: windows visit `device`, at most `batch_size` at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ldm.devices import receive, send
from ldm.diffusion.denoiser import Cond, Denoiser
from ldm.rng import fold

Corner = tuple[int, int]
WindowCondition = Callable[[Sequence[Corner]], Cond]

BLENDS = ("uniform", "smooth")
BORDERS = ("inward", "circular", "replicate")
AXES = {"crossattn": 3, "vector": 2, "label": 1}  # of the parts that may be fields, without rows and cols


def fixed_starts(size: int, window: int, stride: int, border: str = "inward") -> list[int]:
    """Window starts along one axis, every `stride`.

    At an `inward` border the last start is moved inwards so that the axis is covered exactly; a `circular` axis has
    windows that run on at the other end; at a `replicate` border windows hang over both ends.

    >>> fixed_starts(100, window=64, stride=32)
    [0, 32, 36]
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be in 1..{window}, the window; got {stride}")
    _check(size, window, border)
    if border == "circular":
        return list(range(0, size, stride))
    if border == "replicate":
        return list(range(stride - window, size, stride))
    return sorted({min(start, size - window) for start in range(0, size - window + stride, stride)})


def shifted_starts(size: int, window: int, offset: int, border: str = "circular") -> list[int]:
    """Starts of adjoining windows moved by -offset (0 <= offset < window) on an axis without an inner end.

    Outer windows run on at the other end (`circular`), or hang over the ends (`replicate`).
    """
    _check(size, window, border)
    if border == "circular":
        return [start % size for start in range(-offset, size - offset, window)]
    return list(range(-offset, size, window))


def drawn_starts(size: int, window: int, *seed: int) -> list[int]:
    """Starts of windows from end to end of an axis at places drawn from `seed`, neighbours overlapping.

    As many as overlap by 3/16 of a window on average, or more where that is no whole number, so the work grows as the
    axis does. Each overlaps by 1/8 at least; the rest falls to neighbours at random, half a window at most to any.

    >>> drawn_starts(256, 64, 0), drawn_starts(256, 64, 1)
    ([0, 51, 100, 155, 192], [0, 55, 103, 157, 192])
    """
    _check(size, window, "inward")
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


def _check(size: int, window: int, border: str) -> None:
    if window > size:
        raise ValueError(f"a canvas side of {size} is smaller than the window of {window}")
    if border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(BORDERS)}; got {border!r}")


def _check_blend(blend: str) -> None:
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}; got {blend!r}")


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


def _cut(canvas: Tensor, corner: Corner, window: int, border: str) -> Tensor:
    """The window (C,window,window) of canvas (C,H,W) at a corner, beyond its sides as the border says."""
    (row, col), (height, width) = corner, canvas.shape[-2:]
    if 0 <= row <= height - window and 0 <= col <= width - window:
        return canvas[:, row : row + window, col : col + window]
    rows, cols = (torch.arange(start, start + window, device=canvas.device) for start in corner)
    if border == "circular":
        rows, cols = rows % height, cols % width
    return canvas[:, rows.clamp(0, height - 1)[:, None], cols.clamp(0, width - 1)]


def _add(canvas: Tensor, part: Tensor, corner: Corner, border: str) -> None:
    """Add a window (C,window,window) to canvas (C,H,W) at a corner; around a circular border, else what lies inside."""
    (row, col), (height, width) = corner, canvas.shape[-2:]
    if border == "circular":
        rows, cols = (torch.arange(s, s + part.shape[-1], device=canvas.device) for s in corner)
        canvas[:, (rows % height)[:, None], cols % width] += part
    else:
        top, left = max(row, 0), max(col, 0)
        inside = part[:, top - row : height - row, left - col : width - col]
        canvas[:, top : top + inside.shape[1], left : left + inside.shape[2]] += inside


def read_field(field: Tensor, images: Sequence[int], corners: Sequence[Corner], size: Corner, window: int) -> Tensor:
    """A field (B,rows,cols,...) at windows of its images, (K,...): linear between cells; integers: the nearest cell."""
    places, fractions = [], []
    for axis in (0, 1):
        span, cells = size[axis] - window, field.shape[1 + axis] - 1
        place = torch.tensor([corner[axis] for corner in corners], dtype=torch.float64) * (cells / span if span else 0)
        place = place.clamp(0, cells)
        low = place.round().long() if not field.is_floating_point() else place.floor().long()
        places.append((low, (low + 1).clamp(max=cells)))
        fractions.append((place - low).view(-1, *[1] * (field.ndim - 3)).to(field))
    index, (r0, r1), (c0, c1) = torch.tensor(images), *places
    if not field.is_floating_point():
        return field[index, r0, c0]
    top = torch.lerp(field[index, r0, c0], field[index, r0, c1], fractions[1])
    bottom = torch.lerp(field[index, r1, c0], field[index, r1, c1], fractions[1])
    return torch.lerp(top, bottom, fractions[0])


def window_conds(
    cond: Cond, images: Sequence[int], corners: Sequence[Corner], size: Corner, window: int, border: str = "inward"
) -> dict[str, Tensor]:
    """The condition of K windows, given by image and corner, from that of the canvas (see above).

    >>> cond = {"concat": torch.arange(16.0).view(1, 1, 4, 4), "crossattn": torch.zeros(1, 5, 16)}
    >>> windows = window_conds(cond, images=[0, 0], corners=[(0, 0), (2, 2)], size=(4, 4), window=2)
    >>> windows["concat"][1], windows["crossattn"].shape
    (tensor([[[10., 11.],
             [14., 15.]]]), torch.Size([2, 5, 16]))
    """
    conds = {}
    for part, value in cond.items():
        kind = part.rpartition("/")[2]  # of a composed condition, "name/kind"
        if kind == "concat":
            conds[part] = torch.stack([_cut(value[i], corner, window, border) for i, corner in zip(images, corners)])
        elif value.ndim == AXES[kind] + 2:
            conds[part] = read_field(value, images, corners, size, window)
        else:
            conds[part] = value[list(images)]
    return conds


def _over_windows(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Cond, corners: Sequence[Corner], window: int,
    condition: WindowCondition | None, batch_size: int, device: torch.device | None, border: str, smooth: bool,
) -> Tensor:  # fmt: skip
    """Denoise every window of the canvas x (B,C,H,W), at most batch_size at a time, and average where they overlap."""
    device, size = torch.device(device or x.device), (x.shape[-2], x.shape[-1])

    @cache
    def weights(*ends: tuple[bool, bool]) -> Tensor:                            # (1,window,window)
        down, across = (smooth_weight(window, *end) for end in ends)
        return (down[:, None] * across).to(x)[None]

    def blend(corner: Corner) -> Tensor:
        if border != "inward":
            return weights((False, False), (False, False))
        return weights(*((start == 0, start + window == side) for start, side in zip(corner, size)))

    total, weight = torch.zeros_like(x), torch.zeros_like(x[0, :1])
    whole = torch.ones_like(x[0, :1, :window, :window])
    for corner in corners:
        _add(weight, blend(corner) if smooth else whole, corner, border)

    def add(images: Sequence[int], chunk: Sequence[Corner], x0: Tensor) -> None:
        for image, corner, part in zip(images, chunk, x0):
            _add(total[image], part * blend(corner) if smooth else part, corner, border)

    jobs = [(image, corner) for image in range(len(x)) for corner in corners]
    under_way = None  # while the device denoises a chunk, the one before comes home
    for start in range(0, len(jobs), batch_size):
        images, chunk = zip(*jobs[start : start + batch_size])
        windows = torch.stack([_cut(x[image], corner, window, border) for image, corner in zip(images, chunk)])
        conds = window_conds(cond, images, chunk, size, window, border)
        conds = {
            **(condition(chunk) if condition else {}), **{name: send(part, device) for name, part in conds.items()}
        }  # fmt: skip
        x0 = denoiser(send(windows, device), send(sigma[list(images)], device), conds).to(total.dtype)
        if under_way:
            add(*under_way[:2], under_way[2]())
        under_way = images, chunk, receive(x0, x.device)
    add(*under_way[:2], under_way[2]())
    return total.div_(weight)


def tiled(
    denoiser: Denoiser, window: int, stride: int, condition: WindowCondition | None = None, batch_size: int = 16,
    device: torch.device | None = None, blend: str = "uniform", border: str = "inward",
) -> Denoiser:  # fmt: skip
    """Overlapping windows at fixed offsets, their x0 averaged (MultiDiffusion, arXiv:2302.08113; as published for
    large histology images, arXiv:2312.07330). A step costs about (window/stride)^2 evaluations per window area.

    blend: `uniform` weights, or `smooth` ones that fall towards a window's sides. border: `inward`, outer windows end
    at the canvas' sides; `circular`, a canvas without sides, whose opposite ends meet; `replicate`, windows hang over
    and see the outermost pixels repeated.

    >>> canvas = tiled(lambda x, *_: x - x.mean((2, 3), keepdim=True), window=4, stride=2)
    >>> canvas(torch.arange(8.0).expand(1, 1, 4, 8), torch.tensor([1.0]), {})[0, 0, 0]  # each window's mean is 0
    tensor([-1.5000, -0.5000, -0.5000,  0.5000, -0.5000,  0.5000,  0.5000,  1.5000])
    """
    _check_blend(blend)

    def canvas(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        rows, cols = (fixed_starts(size, window, stride, border) for size in x.shape[-2:])
        corners = [(row, col) for row in rows for col in cols]
        return _over_windows(
            denoiser, x, sigma, cond, corners, window, condition, batch_size, device, border, blend == "smooth"
        )

    return canvas


def shifted(
    denoiser: Denoiser, window: int, condition: WindowCondition | None = None, batch_size: int = 16, seed: int = 0,
    device: torch.device | None = None, border: str = "inward", blend: str = "smooth",
) -> Denoiser:  # fmt: skip
    """Windows at places drawn anew at every noise level: little more than one evaluation per window area and step.

    At the `inward` border they overlap a little (`drawn_starts`), and smooth weights lead from one to the next; at
    others, which are those of `tiled`, they adjoin at a drawn offset. The places are a function of seed and sigma, so
    the denoiser keeps no state. A canvas of one window is denoised as it would be without tiling.

    >>> seen = []
    >>> canvas = shifted(lambda x, sigma, cond: (seen.append(len(x)), x)[1], window=8)
    >>> canvas(torch.zeros(1, 4, 8, 32), torch.tensor([1.0]), {}).shape, seen  # of five windows
    (torch.Size([1, 4, 8, 32]), [5])
    """
    _check_blend(blend)

    def starts(size: int, *draw: int) -> list[int]:
        if border == "inward":
            return drawn_starts(size, window, seed, *draw)
        return shifted_starts(size, window, fold(seed, *draw) % window, border)

    def canvas(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        bits = struct.unpack("<I", struct.pack("<f", float(sigma[0])))[0]
        rows, cols = (starts(size, bits, axis) for axis, size in enumerate(x.shape[-2:]))
        corners = [(row, col) for row in rows for col in cols]
        return _over_windows(
            denoiser, x, sigma, cond, corners, window, condition, batch_size, device, border, blend == "smooth"
        )

    return canvas
