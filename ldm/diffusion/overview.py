"""Agreement of a canvas with an overview of it, an image of the whole at a lower magnification.

    followed = overview(tiled(denoiser, ...), told.shift)                       a function from denoiser to denoiser

As in DDNM (arXiv:2212.00490, section 3.2) and ILVR (arXiv:2108.02938), a denoised image is shifted by what it lacks:
its means over blocks become those of the overview, its details stay. ZoomLDM's joint multi-scale sampling
(arXiv:2411.16969) asks for the same of a latent model's decoded images. A decoder costs more than the network: here a
linear reading, fitted once, says what colour a block of latents is decoded to, and how well it knows.

Blocks belong to the canvas, not to its windows, so windows, batches and bands change nothing. What blocks lack is
spread over their places by parabolas that meet without a step and keep every block's mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser

FEW = 1e-9  # beside which what is known of latents counts
Shift = Callable[[Tensor, Tensor], Tensor]  # of x0 (B,C,H,W) at sigma (B,), all the same: what is added to it


def overview(denoiser: Denoiser, shift: Shift) -> Denoiser:
    """The denoised canvas, shifted towards an overview: `Overview.shift`.

    >>> rows = cols = Blocks(4, 2)
    >>> told = Overview(rows, cols, torch.full((3, 2, 2), 0.5), torch.ones(2, 2), 1.0, Reading.plain())
    >>> followed = overview(lambda x, sigma, cond: x, told.shift)
    >>> cols.means(rows.means(followed(torch.randn(1, 3, 4, 4), torch.ones(1), {}), 2), 3)[0, 0]
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """

    def followed(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        x0 = denoiser(x, sigma, cond)
        return x0 + shift(x0, sigma)

    return followed


class Blocks:
    """An axis of `size` places cut into `count` blocks, as even as whole places are.

    >>> Blocks(10, 3).edges
    tensor([ 0,  3,  7, 10])
    """

    def __init__(self, size: int, count: int):
        self.size, self.count = size, count
        self.edges = torch.arange(count + 1).mul(2 * size).add(count) // (2 * count)
        self.lengths = self.edges.diff()
        self.of = torch.repeat_interleave(torch.arange(count), self.lengths)    # (size,) the block of each place
        length = self.lengths[self.of].double()
        place = (torch.arange(size) - self.edges[self.of] + 0.5) / length
        bend = place * (1 - place) / (1 / 6 + 1 / (12 * length**2))            # of mean 1 over the places of a block
        self._weights = [(1 - place - bend / 2) / 2, bend, (place - bend / 2) / 2]  # of the block before, itself, after
        self._weights[1] = 1 - self._weights[0] - self._weights[2]

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """The places, in whole blocks, on which what is spread over start..stop depends.

        >>> Blocks(12, 4).reach(4, 6)
        (0, 9)
        """
        first, last = int(self.of[start]) - 1, int(self.of[stop - 1]) + 2
        return int(self.edges[max(first, 0)]), int(self.edges[min(last, self.count)])

    def within(self, start: int, stop: int) -> slice:
        """Which blocks lie in start..stop, where blocks begin and end."""
        return slice(int(self.of[start]), int(self.of[stop - 1]) + 1)

    def means(self, values: Tensor, dim: int, start: int = 0) -> Tensor:
        """Means over blocks along `dim`, of values that begin at the place `start`, where a block begins.

        >>> Blocks(4, 2).means(torch.tensor([0.0, 2.0, 3.0, 5.0]), 0)
        tensor([1., 4.])
        """
        own = self.within(start, start + values.shape[dim])
        first, lengths = self.edges[own] - start, self.lengths[own]
        shape = [-1 if axis == dim else 1 for axis in range(values.ndim)]
        total = 0
        for step in range(int(lengths.max())):
            there = (first + step).clamp(max=values.shape[dim] - 1).to(values.device)
            inside = (step < lengths).to(values).view(shape)
            total = total + values.index_select(dim, there) * inside
        return total / lengths.to(values).view(shape)

    def spread(self, values: Tensor, dim: int, start: int = 0) -> Tensor:
        """Values of blocks along `dim`, the first of which begins at `start`, over their places: the parabola of each
        block goes from the mean of its own and the last value to that of its own and the next one, and has its mean.

        >>> Blocks(9, 3).spread(torch.tensor([0.0, 3.0, 0.0]), 0)
        tensor([-0.3421, -0.3158,  0.6579,  2.6842,  3.6316,  2.6842,  0.6579, -0.3158, -0.3421])
        """
        first = int(self.of[start])
        stop = int(self.edges[first + values.shape[dim]])
        shape = [-1 if axis == dim else 1 for axis in range(values.ndim)]
        total = 0
        for side, weight in zip((-1, 0, 1), self._weights):
            there = (self.of[start:stop] - first + side).clamp(0, values.shape[dim] - 1).to(values.device)
            total = total + values.index_select(dim, there) * weight[start:stop].to(values).view(shape)
        return total


@dataclass(frozen=True)
class Reading:
    """The colour of a block of latents, read from their mean: weight @ mean + bias, but for an error.

    weight: (3,C). bias: (3,). spread: (C,C), covariance of the means of blocks. error: (3,3), that of what the reading
    gets wrong.

    >>> Reading.plain().colours(torch.full((1, 3, 1, 1), 0.25)).flatten()
    tensor([0.2500, 0.2500, 0.2500])
    """

    weight: Tensor
    bias: Tensor
    spread: Tensor
    error: Tensor

    @classmethod
    def plain(cls) -> Reading:
        """Of models that work on pixels."""
        return cls(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3, 3))

    @classmethod
    def fitted(cls, latents: Tensor, colours: Tensor) -> Reading:
        """By least squares, from means of blocks of latents (N,C) and of the pixels that they are decoded to (N,3).

        >>> latents = torch.randn(50, 4)
        >>> reading = Reading.fitted(latents, latents[:, :3] / 2 + 0.1)
        >>> reading.bias, (reading.weight @ reading.gain(10.0, places=4)).diagonal()
        (tensor([0.1000, 0.1000, 0.1000]), tensor([1.0000, 1.0000, 1.0000]))
        """
        z, y = latents.double(), colours.double()
        mean_z, mean_y = z.mean(0), y.mean(0)
        z, y = z - mean_z, y - mean_y
        spread = z.T @ z / len(z)
        few = FEW * spread.trace() * torch.eye(z.shape[1]).to(z)
        weight = torch.linalg.solve(spread + few, z.T @ y / len(z)).T
        left = y - z @ weight.T
        error = left.T @ left / len(z)
        return cls(*(part.float() for part in (weight, mean_y - weight @ mean_z, spread, error)))

    def colours(self, means: Tensor) -> Tensor:
        """(B,3,h,w) of means of blocks (B,C,h,w)."""
        return _mixed(self.weight, means) + self.bias.to(means).view(1, -1, 1, 1)

    def gain(self, sigma: float, places: float) -> Tensor:
        """(C,3), what is added to the latents of a block of so many places for a colour that they lack, at a noise
        level: the mean of Gaussian latents given x and the colour, less that given x alone.

        Far above the noise of the reading's errors it is what brings the colour about and is likeliest besides; where x
        tells more than the reading does, it fades, so that its errors are not drawn into the image.

        >>> unsure = Reading(torch.eye(3), torch.zeros(3), torch.eye(3), 0.01 * torch.eye(3))
        >>> [round(float(unsure.gain(sigma, 1.0)[0, 0]), 2) for sigma in (10.0, 0.1, 0.01)]
        [0.99, 0.5, 0.01]
        """
        weight, spread, error = (part.double().cpu() for part in (self.weight, self.spread, self.error))
        noise = sigma**2 / places * torch.eye(len(spread)).double()
        left = spread @ torch.linalg.solve(spread + noise, noise)               # covariance of the means given x
        seen = weight @ left @ weight.T
        few = FEW * seen.trace().clamp(min=1e-30) * torch.eye(3).double()
        return torch.linalg.solve(seen + error + few, weight @ left).T.float()

    def save(self, file: Path) -> None:
        """Write it, in full precision.

        >>> Reading.plain().save(Path("reading.npz"))
        >>> Reading.load(Path("reading.npz")).weight.diagonal()
        tensor([1., 1., 1.])
        """
        np.savez(file, **{name: value.numpy() for name, value in vars(self).items()})

    @classmethod
    def load(cls, file: Path) -> Reading:
        """What `save` wrote."""
        return cls(**{name: torch.from_numpy(value) for name, value in np.load(file).items()})


@dataclass(frozen=True)
class Overview:
    """What the blocks of a canvas are to look like.

    Attributes:
        rows, cols: blocks along both axes. colours: (3,rows,cols) in [-1,1], what each is to show.
        followed: (rows,cols), 1 where they are; 0, as in holes, where nothing is shifted.
        strength: 0..1, the share of what is lacking that is made up at each step.
        reading: of colours from latents; None until it is fitted.
    """

    rows: Blocks
    cols: Blocks
    colours: Tensor
    followed: Tensor
    strength: float
    reading: Reading | None = None

    def by(self, reading: Reading) -> Overview:
        """The same with a reading."""
        return replace(self, reading=reading)

    def lack(self, x0: Tensor, top: int = 0) -> Tensor:
        """What blocks lack (B,3,h,w): x0 (B,C,H,width) begins at the row `top`, where a block begins."""
        means = self.cols.means(self.rows.means(x0, 2, top), 3)
        own = self.rows.within(top, top + x0.shape[2])
        return (self.colours[:, own].to(x0) - self.reading.colours(means)) * self.followed[own].to(x0)

    def shift(self, x0: Tensor, sigma: Tensor, top: int = 0) -> Tensor:
        """What is added to x0 (B,C,H,width) at sigma (B,), all the same; it begins at the row `top`, as a block does.

        Where x0 is a part of the canvas, blocks at its ends lack their neighbours, and want them: `rows.reach`.

        >>> rows, cols = Blocks(4, 2), Blocks(2, 1)
        >>> told = Overview(rows, cols, torch.full((3, 2, 1), 0.5), torch.tensor([[1.0], [0.0]]), 1.0, Reading.plain())
        >>> told.shift(torch.zeros(1, 3, 4, 2), torch.ones(1))[0, 0, :, 0].view(2, 2).mean(1)
        tensor([0.5000, 0.0000])
        """
        places = self.rows.size * self.cols.size / (self.rows.count * self.cols.count)
        gain = self.strength * self.reading.gain(float(sigma[0]), places)
        moved = _mixed(gain, self.lack(x0, top))
        return self.cols.spread(self.rows.spread(moved, 2, top), 3)


def _mixed(weight: Tensor, values: Tensor) -> Tensor:
    """weight (K,C) of values (B,C,h,w) at every place by itself, the same in any part of a canvas to the last bit."""
    weight = weight.to(values)
    return sum(weight[:, i].view(1, -1, 1, 1) * values[:, i : i + 1] for i in range(values.shape[1]))
