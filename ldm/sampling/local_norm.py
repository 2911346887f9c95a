"""Decoding a canvas larger than a tile, or than memory, as if every place were in the middle of a tile.

A decoder's group normalisation takes its statistics over the image, and was trained on tiles. Over a large canvas they
are others: half of it glass turns the tissue pale. Tiles decoded by themselves differ in tone and show. Here each place
is normalised by the statistics of the tile about it, which change smoothly over the canvas, so it is decoded as it was
trained, without borders. A canvas larger than memory is decoded in parts, each with a halo of its neighbours' latents,
which is cut away with what the part's borders did to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.devices import receive, send

REACH = 8  # latents beyond a window: what lies further away changes the demo's image by less than 0.1 grey levels
CELLS = 4  # along a tile: statistics are taken at every quarter of one
STRIP, GPU_STRIP = 2**18, 2**26  # values that are normalised at once


class Span(NamedTuple):
    """One axis of a tile, in latents: the window that is decoded, and the tile within it."""

    window: slice
    tile: slice

    def inside(self, scale: int = 1) -> slice:
        """The tile's place in its window, at `scale` times the latents' resolution."""
        start = self.tile.start - self.window.start
        return slice(start * scale, (start + self.tile.stop - self.tile.start) * scale)

    def outside(self, scale: int) -> slice:
        """The tile's place in the canvas, at `scale` times the latents' resolution."""
        return slice(self.tile.start * scale, self.tile.stop * scale)


def spans(size: int, part: int, halo: int, align: int = 1) -> list[Span]:
    """As equal parts of an axis as there are, none above `part`, in windows with a halo within the canvas, whose ends
    lie at multiples of `align`.

    >>> [(span.window, span.tile) for span in spans(100, part=50, halo=8)]
    [(slice(0, 58, None), slice(0, 50, None)), (slice(42, 100, None), slice(50, 100, None))]
    """
    count = -(-size // part)
    ends = [round(i * size / count) for i in range(count + 1)]
    return [span_of(start, stop, size, halo, align) for start, stop in pairwise(ends)]


def span_of(start: int, stop: int, size: int, halo: int, align: int = 1) -> Span:
    """A part of an axis in a window with a halo, see `spans`.

    >>> span_of(50, 100, size=200, halo=8).window
    slice(42, 108, None)
    """
    first, last = max((start - halo) // align * align, 0), min(-(-(stop + halo) // align) * align, size)
    return Span(slice(first, last), slice(start, stop))


def _strips(x: Tensor, align: int = 1) -> Iterator[slice]:
    """Rows of x (B,C,H,W), a few at a time, in multiples of `align`: as much as a cache holds, on a GPU a part of its
    memory."""
    values = STRIP if x.device.type == "cpu" else GPU_STRIP
    rows = max(values // (x[..., 0, :].numel() * align), 1) * align
    return (slice(start, min(start + rows, x.shape[-2])) for start in range(0, x.shape[-2], rows))


def local_statistics(x: Tensor, groups: int, window: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B,G,rows,cols) of x (B,C,H,W) over a group of channels and windows at every quarter of one.

    A side not longer than the window has one window, the whole of it.

    >>> mean, variance = local_statistics(torch.arange(8.0).expand(1, 2, 8, 8), groups=1, window=4)
    >>> mean[0, 0, 0], variance[0, 0, 0]
    (tensor([1.5000, 2.5000, 3.5000, 4.5000, 5.5000]), tensor([1.2500, 1.2500, 1.2500, 1.2500, 1.2500]))
    """
    cell = max(window // CELLS, 1)

    def pool(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, cell, ceil_mode=True, count_include_pad=False)

    parts = (x[..., rows, :].float() for rows in _strips(x, cell))
    pooled = zip(*((pool(part), pool(part.square())) for part in parts))
    mean, square = (torch.cat(values, -2).unflatten(1, (groups, -1)).mean(2) for values in pooled)
    size = tuple(min(CELLS, cells) for cells in mean.shape[-2:])
    mean, square = (F.avg_pool2d(values, size, 1) for values in (mean, square))
    return mean, (square - mean.square()).clamp(min=0)


def spread(count: int, side: int, window: int) -> Tensor:
    """What each place along a side takes of `count` windows at every quarter of one, (side,count): linear between the
    windows' middles, towards the ends the outermost windows.

    >>> spread(count=2, side=6, window=4)
    tensor([[1., 0.],
            [1., 0.],
            [1., 0.],
            [0., 1.],
            [0., 1.],
            [0., 1.]])
    """
    inner = min((count - 1) * max(window // CELLS, 1) + 1, side)
    before = min(window // 2, side - inner)
    place = (torch.arange(side) - before).clamp(0, inner - 1) * ((count - 1) / max(inner - 1, 1))
    return (1 - (place[:, None] - torch.arange(count)).abs()).clamp(min=0)


def normalised(norm: nn.GroupNorm, x: Tensor, window: int) -> Tensor:
    """x (B,C,H,W), each place normalised by the statistics of the window about it.

    >>> norm = nn.GroupNorm(2, 8).requires_grad_(False)
    >>> x = torch.cat([torch.zeros(1, 8, 32, 32), torch.ones(1, 8, 32, 32)], -1)    # two halves of different tone
    >>> normalised(norm, x, window=8)[0, 0, 0, ::16], norm(x)[0, 0, 0, ::16]
    (tensor([0.0000, 0.0000, 1.0000, 0.0000]), tensor([-1.0000, -1.0000,  1.0000,  1.0000]))
    """
    mean, variance = local_statistics(x, norm.num_groups, window)
    scale = (variance + norm.eps).rsqrt()
    scale, shift = (values.repeat_interleave(x.shape[1] // norm.num_groups, 1) for values in (scale, -mean * scale))
    weight, bias = norm.weight.view(-1, 1, 1), norm.bias.view(-1, 1, 1)
    down, across = (spread(count, side, window).to(scale) for count, side in zip(mean.shape[-2:], x.shape[-2:]))
    maps = [torch.einsum("bcrk,wk->brwc", values, across) for values in (scale * weight, shift * weight + bias)]
    out = torch.empty_like(x)
    for rows in _strips(x):
        share = down[rows]                                                      # (strip,windows)
        first, last = share.any(0).nonzero()[[0, -1], 0].tolist()
        near = slice(first, last + 1)
        here = (share[:, near] @ rearrange(values[:, near], "b r w c -> b r (w c)") for values in maps)
        scale, shift = (rearrange(values, "b h (w c) -> b c h w", c=x.shape[1]) for values in here)
        if x.dtype == shift.dtype:
            torch.addcmul(shift, x[..., rows, :], scale, out=out[..., rows, :])
        else:
            out[..., rows, :] = torch.addcmul(shift, x[..., rows, :].float(), scale)
    return out


@contextmanager
def local_group_norm(module: nn.Module, window: int, width: int) -> Iterator[None]:
    """Within this context every GroupNorm of `module` normalises each place by the statistics of a window about it.

    window: its side, width: that of the canvas, in the same pixels, whatever the resolution of a layer's input.

    >>> norm, x = nn.GroupNorm(2, 8).requires_grad_(False), torch.arange(64.0).expand(1, 8, 32, 64)
    >>> with local_group_norm(norm, window=8, width=64):
    ...     near = norm(x)
    >>> near.std() < norm(x).std()
    tensor(True)
    """

    def forward(self: nn.GroupNorm, x: Tensor) -> Tensor:
        return normalised(self, x, max(round(window * x.shape[-1] / width), 1))

    norms = [layer for layer in module.modules() if isinstance(layer, nn.GroupNorm)]
    for norm in norms:
        norm.forward = forward.__get__(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


@torch.no_grad()
def decode_part(
    first_stage: nn.Module, latents: Tensor, rows: Span, cols: Span, window: int, alone: bool = False
) -> Tensor:
    """The image (1,3,h,w) of one part, rows by cols, of a canvas: from the latents of its window.

    window: see `decode_tiles`. alone: the canvas is a tile or less, and decoded as it is.

    >>> span = span_of(4, 12, size=32, halo=4)
    >>> decode_part(model.first_stage_model, torch.randn(1, 4, 16, 16), span, span, window=8).shape
    torch.Size([1, 3, 16, 16])
    """
    factor = first_stage.downsampling
    if alone:
        decoded = first_stage.decode(latents)
    else:
        with local_group_norm(first_stage, window, latents.shape[-1]):
            decoded = first_stage.decode(latents.contiguous(memory_format=torch.channels_last))
    return decoded[..., rows.inside(factor), cols.inside(factor)]


@torch.no_grad()
def decode_tiles(
    first_stage: nn.Module, z: Tensor, window: int, part: int = 256, halo: int | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Decode latents z (1,C,h,w) of any size part by part: rows and columns of the image (1,3,H,W), what is there.

    z may lie in main memory while the first stage is on a GPU; the parts come where z is.

    Args:
        window: latents along the tiles that the decoder was trained on. A canvas of one is decoded as it is.
        part: latents along a part, at most.
        halo: latents about it; by default a window and some, as statistics depend on statistics beside them.

    >>> parts = decode_tiles(model.first_stage_model, torch.randn(1, 4, 16, 24), window=8, part=16)
    >>> [(cols, tuple(image.shape)) for rows, cols, image in parts]
    [(slice(0, 24, None), (1, 3, 32, 24)), (slice(24, 48, None), (1, 3, 32, 24))]
    """
    factor, device = first_stage.downsampling, next((p.device for p in first_stage.parameters()), z.device)
    halo = window + REACH if halo is None else halo
    down, across = (spans(side, part, halo, max(window // CELLS, 1)) for side in z.shape[-2:])
    under_way = None  # while the device decodes a part, the one before comes home
    for rows, cols in product(down, across):
        latents = send(z[..., rows.window, cols.window], device)
        decoded = decode_part(first_stage, latents, rows, cols, window, max(z.shape[-2:]) <= window)
        if under_way:
            yield *under_way[:2], under_way[2]()
        under_way = rows.outside(factor), cols.outside(factor), receive(decoded, z.device)
    yield *under_way[:2], under_way[2]()
