"""Decoding a canvas larger than memory: tile by tile, without tone that varies from tile to tile.

A decoder's group normalisation takes its statistics over the whole image. Tiles decoded by themselves therefore differ
in tone. Here one pass over a sample of tiles, normalised together as if they were one image, fixes the statistics of
every layer, and all tiles are decoded with those. Each tile is decoded in a window with a halo of its neighbours'
latents, which is cut away with what the convolutions' borders did to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


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


@torch.no_grad()
def decode_tiled(
    first_stage: nn.Module,
    z: Tensor,
    tile: int = 64,
    halo: int = 16,
    samples: int = 8,
    progress: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Decode latents z (1,C,h,w) of any size to an image (1,3,H,W), tile by tile.

    tile, halo: in latents. samples: tiles over which the statistics are taken, evenly spread over the canvas. A canvas
    of one tile is decoded as it is.
    """
    tiles = [(rows, cols) for rows in spans(z.shape[-2], tile, halo) for cols in spans(z.shape[-1], tile, halo)]
    if len(tiles) == 1:
        image = first_stage.decode(z)
        progress(1)
        return image
    chosen = [tiles[i] for i in sorted({round(i * (len(tiles) - 1) / max(samples - 1, 1)) for i in range(samples)})]
    statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    factor = first_stage.downsampling
    image = z.new_empty(1, 3, z.shape[-2] * factor, z.shape[-1] * factor)
    with joint_group_norm(first_stage, statistics, chosen):
        first_stage.decode(torch.cat([z[..., rows.window, cols.window] for rows, cols in chosen]))
        for rows, cols in tiles:
            part = first_stage.decode(z[..., rows.window, cols.window])
            image[..., rows.outside(factor), cols.outside(factor)] = (
                part[..., rows.inside(factor), cols.inside(factor)]
            )
            progress(1)
    return image
