"""Sequences: one condition moves in steps; everything else, the noise of every step too, stays.

What differs between two images of a sequence is then what the model makes of the condition (DPM for mitotic figures,
DGM4MICCAI 2023, figure 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond
from ldm.diffusion.guidance import expand_cond
from ldm.diffusion.samplers import sample_euler, sample_heun
from ldm.errors import UserError
from ldm.sampling import tiles as inference
from ldm.sampling.inversion import invertible, translate

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

REAL_SOLVERS = {"euler": sample_euler, "heun": sample_heun}  # those whose steps can be inverted
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
    """`score=0:1:5` is the condition score at 0, 0.25, 0.5, 0.75 and 1; see FORM."""
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


def generated(
    model: LatentDiffusion, conditions: Sequence[Cond], count: int, first: int = 0, **settings: Any
) -> Tensor:
    """`count` sequences (count,N,3,H,W) in [-1,1] of N conditions, each of one sample.

    Sequence i is of the noise of image `first` + i of `inference.sample`, at the start and at every step of solvers
    that add some; settings are those of `sample`.
    """
    return torch.stack([inference.sample(model, cond, count, first=first, **settings) for cond in conditions], 1)


@torch.no_grad()
def moved(
    model: LatentDiffusion, images: Tensor, source: Cond, conditions: Sequence[Cond], steps: int = 50,
    guidance_scale: inference.Guidance | None = None, schedule: str = "uniform", strength: float = 1.0,
    exact: bool = True, precision: str = "fp32", solver: str = "euler",
) -> Tensor:  # fmt: skip
    """Sequences (B,N,3,H,W) in [-1,1] of real images (B,3,H,W): inverted under `source`, then decoded N times.

    source: a condition of one sample or of B, the null where nothing is known. schedule: `uniform` holds the lowest
    noise level, which the image stands for. strength: see `invertible`; exact: see
    `invert_exactly`. The condition of the source itself gives the image back at guidance scale 1.
    """
    if solver not in REAL_SOLVERS:
        raise UserError(f"real images are inverted with the solver {' or '.join(REAL_SOLVERS)}; got '{solver}'.")
    if not 0 < strength <= 1:
        raise UserError(f"the strength of an inversion is above 0, up to 1; got {strength:g}.")
    levels = invertible(inference.sampling_sigmas(model, steps, schedule), strength).to(model.device)
    encoder = inference.guided_denoiser(model, 1.0, precision)
    decoder = inference.guided_denoiser(model, guidance_scale, precision, conditions[0])
    count = len(images)
    latents = model.encode(images.to(model.device))
    targets = [expand_cond(cond, count) for cond in conditions]
    start = expand_cond(source, count)
    found = translate(encoder, decoder, latents, levels, start, targets, REAL_SOLVERS[solver], exact)
    return torch.stack([model.decode(x).clamp(-1, 1).cpu() for x in found], 1)


def rank_correlation(values: np.ndarray, scores: np.ndarray) -> float:
    """Spearman's correlation of values (N,) with scores (S,N), over all images of all sequences."""
    from scipy.stats import spearmanr

    return float(spearmanr(np.broadcast_to(values, scores.shape).ravel(), scores.ravel()).statistic)


def correlation_interval(
    values: np.ndarray, scores: np.ndarray, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The middle 95% of `rank_correlation` over draws of as many sequences with replacement."""
    rng = np.random.default_rng(seed)
    found = [rank_correlation(values, scores[rng.integers(len(scores), size=len(scores))]) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
