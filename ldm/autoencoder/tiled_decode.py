"""Decoding a canvas larger than memory: tile by tile, without tone that varies from tile to tile.

A decoder's group normalisation takes its statistics over the whole image. Tiles decoded by themselves therefore differ
in tone. Here one pass over a sample of tiles, normalised together as if they were one image, fixes the statistics of
every layer, and all tiles are decoded with those. Each tile is decoded in a window with a halo of its neighbours'
latents, which is cut away with what the convolutions' borders did to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.transfers import receive, send


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


def spans(size: int, tile: int, halo: int) -> list[Span]:
    """Tiles of an axis; their windows all have one size and stay within the canvas."""
    side = min(tile + 2 * halo, size)
    starts = [min(max(start - halo, 0), size - side) for start in range(0, size, tile)]
    return [
        Span(slice(start, start + side), slice(index * tile, min((index + 1) * tile, size)))
        for index, start in enumerate(starts)
    ]


@contextmanager
def joint_group_norm(
    module: nn.Module, statistics: dict[nn.Module, tuple[Tensor, Tensor]], tiles: Sequence[tuple[Span, Span]] = ()
) -> Iterator[None]:
    """Within this context every GroupNorm of `module` normalises a batch as if it were one image.

    A layer that is not in `statistics` takes mean and variance (groups,) over the batch, of image i only within
    tiles[i], and records them there; a layer that is uses the recorded ones.
    """

    def measure(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        grouped = x.float().unflatten(1, (norm.num_groups, -1))                 # (B,G,C/G,H,W)
        if tiles:
            scale = x.shape[-1] // (tiles[0][1].window.stop - tiles[0][1].window.start)
            parts = [image[..., r.inside(scale), c.inside(scale)] for image, (r, c) in zip(grouped, tiles)]
            values = torch.cat([part.flatten(1) for part in parts], dim=1)      # (G,N)
        else:
            values = grouped.transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        return mean, variance

    def forward(self: nn.GroupNorm, x: Tensor) -> Tensor:
        if self not in statistics:
            statistics[self] = measure(self, x)
        mean, variance = statistics[self]
        scale = self.weight.view(self.num_groups, -1) * (variance + self.eps).rsqrt()[:, None]
        shift = self.bias.view(self.num_groups, -1) - mean[:, None] * scale
        return x * scale.view(1, -1, 1, 1).to(x.dtype) + shift.view(1, -1, 1, 1).to(x.dtype)

    norms = [layer for layer in module.modules() if isinstance(layer, nn.GroupNorm)]
    for norm in norms:
        norm.forward = forward.__get__(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def sampled_spans(size: int, side: int, halo: int, count: int) -> list[Span]:
    """At most `count` tiles of an axis, evenly spread from end to end, without overlap where they are few enough."""
    side = min(side, size)
    count = min(count, -(-size // side))
    starts = [round(i * (size - side) / max(count - 1, 1)) for i in range(count)]
    reach = min(side + 2 * halo, size)
    windows = [min(max(start - halo, 0), size - reach) for start in starts]
    return [
        Span(slice(window, window + reach), slice(start, start + side)) for window, start in zip(windows, starts)
    ]


@torch.no_grad()
def decode_tiles(
    first_stage: nn.Module, z: Tensor, tile: int = 64, halo: int = 16, samples: int = 4, sample_side: int = 24
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Decode latents z (1,C,h,w) of any size tile by tile: rows and columns of the image (1,3,H,W), and what is there.

    z may lie in main memory while the first stage is on a GPU; the tiles come where z is.

    Args:
        tile, halo: in latents. A canvas of one tile is decoded as it is.
        samples, sample_side: the statistics are those of a lattice of samples x samples tiles, evenly spread over the
            canvas, of so many latents a side, with half the halo; fewer where the canvas holds no more.
    """
    factor, device = first_stage.downsampling, next((p.device for p in first_stage.parameters()), z.device)
    down, across = (spans(side, tile, halo) for side in z.shape[-2:])
    if len(down) == len(across) == 1:
        whole = slice(0, z.shape[-2] * factor), slice(0, z.shape[-1] * factor)
        yield *whole, first_stage.decode(z.to(device)).to(z.device)
        return
    chosen = list(product(*(sampled_spans(side, sample_side, halo // 2, samples) for side in z.shape[-2:])))
    statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    with joint_group_norm(first_stage, statistics, chosen):
        first_stage.decode(torch.cat([z[..., rows.window, cols.window] for rows, cols in chosen]).to(device))
    under_way = None  # while the device decodes a tile, the one before comes home
    for rows, cols in product(down, across):
        with joint_group_norm(first_stage, statistics):
            part = first_stage.decode(send(z[..., rows.window, cols.window], device))
        part = part[..., rows.inside(factor), cols.inside(factor)]
        if under_way:
            yield *under_way[:2], under_way[2]()
        under_way = rows.outside(factor), cols.outside(factor), receive(part, z.device)
    yield *under_way[:2], under_way[2]()


def decode_tiled(first_stage: nn.Module, z: Tensor, tile: int = 64, halo: int = 16) -> Tensor:
    """The image (1,3,H,W) of latents z (1,C,h,w), decoded tile by tile (`decode_tiles`)."""
    image = z.new_empty(1, 3, *(side * first_stage.downsampling for side in z.shape[-2:]))
    for rows, cols, part in decode_tiles(first_stage, z, tile, halo):
        image[..., rows, cols] = part
    return image
