"""Sequences: one condition moves in steps; everything else, the noise of every step too, stays.

What differs between two images of a sequence is then what the model makes of the condition (DPM for mitotic figures,
DGM4MICCAI 2023, figure 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond
from ldm.errors import UserError
from ldm.sampling.sampler import EXACT, Inversion, Sampler
from ldm.sampling.tiles import sample
from ldm.sampling.translate import translate

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

FORM = "name=start:stop:count, as score=0:1:5, or name=part:start:stop:count, as expression=MKI67:0:1:5"


@dataclass(frozen=True)
class Sweep:
    """A condition `name` that takes `values` one after the other; `part` is what of it moves, such as a gene."""

    name: str
    part: str
    values: tuple[float, ...]

    def texts(self) -> list[str]:
        """The condition's values as a command line gives them."""
        return [f"{self.part}:{value:.6g}" if self.part else f"{value:.6g}" for value in self.values]


def parse_sweep(text: str) -> Sweep:
    """`score=0:1:5` is the condition score at 0, 0.25, 0.5, 0.75 and 1; see FORM.

    >>> parse_sweep("score=0:1:3")
    Sweep(name='score', part='', values=(0.0, 0.5, 1.0))
    >>> parse_sweep("expression=MKI67:0:1:5").texts()[:2]
    ['MKI67:0', 'MKI67:0.25']
    """
    name, equals, rest = text.partition("=")
    *part, start, stop, count = rest.split(":") if rest.count(":") >= 2 else [""] * 3
    try:
        low, high, number = float(start), float(stop), int(count)
    except ValueError:
        low, high, number = math.nan, math.nan, 0
    if not (name and equals and math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"what varies is {FORM}; got '{text}'.")
    if number < 2 or low == high:
        raise UserError(f"a sequence has 2 or more different values; got '{text}'.")
    return Sweep(name, ":".join(part), tuple(low + (high - low) * k / (number - 1) for k in range(number)))


def sweep_noise(
    model: LatentDiffusion, conditions: Sequence[Cond], count: int, sampler: Sampler | None = None, first: int = 0
) -> Tensor:
    """`count` sequences (count,N,3,H,W) in [-1,1] of N conditions, each of one sample.

    Sequence i has the noise of image `first` + i of `tiles.sample`, at the start and at every step of solvers that add
    some.

    >>> sweep_noise(model, [model.null_condition()] * 3, 2, Sampler(steps=1, progress=False)).shape
    torch.Size([2, 3, 3, 16, 16])
    """
    return torch.stack([sample(model, cond, count, sampler, first) for cond in conditions], 1)


def sweep_images(
    model: LatentDiffusion, images: Tensor, source: Cond, conditions: Sequence[Cond], sampler: Sampler | None = None,
    strength: float = 1.0,
) -> Tensor:  # fmt: skip
    """Sequences (B,N,3,H,W) in [-1,1] of real images (B,3,H,W): inverted exactly under `source`, then decoded N times.

    source: a condition of one sample or of B, the null where nothing is known. By default the steps hold the lowest
    noise level, which the image stands for (TASKS["sweep"]); strength: see `Inversion`. The condition of the source
    itself gives the image back at guidance scale 1.

    >>> images = torch.zeros(1, 3, 16, 16)
    >>> null = model.null_condition()
    >>> sweep_images(model, images, null, [null, null], Sampler(steps=2, progress=False)).shape
    torch.Size([1, 2, 3, 16, 16])
    """
    sampler = (sampler or Sampler()).settled(model, "sweep")
    if sampler.solver not in EXACT:
        raise UserError(f"real images are inverted with the solver {' or '.join(EXACT)}; got '{sampler.solver}'.")
    inversion = Inversion(start="invert", exact=True, strength=strength)
    return torch.stack(translate(model, images, source, list(conditions), sampler, inversion), 1)
