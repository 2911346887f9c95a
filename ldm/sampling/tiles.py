"""Tiles from a model and conditions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.denoiser import Cond
from ldm.diffusion.guidance import expand_cond
from ldm.diffusion.samplers import Noise
from ldm.errors import UserError
from ldm.networks.takes import declared
from ldm.rng import fold, sample_noise
from ldm.sampling.calls import explained
from ldm.sampling.given import checked_condition, checked_settings
from ldm.sampling.sampler import Sampler

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion


@explained
@torch.no_grad()
def sample(
    model: LatentDiffusion,
    cond: Cond | None = None,
    count: int | None = None,
    sampler: Sampler | None = None,
    first: int = 0,
) -> Tensor:
    """Sample tiles: (N,3,H,W) in [-1,1] on the CPU; (N,1,H,W) of models of gray images; (N,C,L) of models of tokens.

    Args:
        cond: a condition of N samples, or of one that `count` samples share, as `model.condition` gives it; None is the
            null, and what unconditional models take.
        sampler: how; by default `Sampler()`.
        first: number of the first image: image i has the noise of number `first` + i.
    UserError: a count that is not the condition's, settings that the model cannot have.

    >>> sample(model, count=2, sampler=Sampler(steps=2, progress=False)).shape
    torch.Size([2, 3, 16, 16])
    """
    sampler = checked_settings(Sampler, sampler)
    return torch.cat([decoded(model, x, sampler.decoder) for x in _batches(model, cond, count, sampler, first)])


@explained
@torch.no_grad()
def sample_latents(
    model: LatentDiffusion,
    cond: Cond | None = None,
    count: int | None = None,
    sampler: Sampler | None = None,
    first: int = 0,
) -> Tensor:
    """The scaled latents (N,C,h,w) of `sample`, of which `decoded` makes its images, on the model's device.

    >>> latents = sample_latents(model, count=2, sampler=Sampler(steps=2, progress=False))
    >>> torch.equal(decoded(model, latents), sample(model, count=2, sampler=Sampler(steps=2, progress=False)))
    True
    """
    return torch.cat(list(_batches(model, cond, count, checked_settings(Sampler, sampler), first)))


@torch.no_grad()
def decoded(model: LatentDiffusion, latents: Tensor, decoder: str = "full") -> Tensor:
    """Tiles (N,C,H,W) in [-1,1], on the CPU, of scaled latents; samples of tokens (N,C,L) as they are.

    >>> decoded(model, torch.randn(2, *model.latent_shape)).shape
    torch.Size([2, 3, 16, 16])
    """
    made = model.decode(latents, decoder)
    return (made.clamp(-1, 1) if made.ndim == 4 else made).cpu()


def _batches(
    model: LatentDiffusion, cond: Cond | None, count: int | None, sampler: Sampler, first: int
) -> Iterator[Tensor]:
    """Scaled latents, batch by batch."""
    cond = checked_condition(model, cond)
    if not cond:
        if sampler.named:
            raise UserError("guidance scales by name need conditions by name; none is given.")
        cond = model.null_condition()
        if sampler.guide is None and sampler.negative is None and model.student is None:  # nothing to guide from
            sampler = replace(sampler, guidance_scale=1.0)
    sampler = sampler.settled(model, "sample")
    given = next((len(value) for value in cond.values()), None)
    count = count or given or 1
    if given not in (None, 1, count):
        raise UserError(f"the condition is of {given} samples, count asks for {count}; give one condition, or equal.")
    cond = expand_cond({part: value.to(model.device) for part, value in cond.items()}, count)
    context = declared(model.model.diffusion_model).context_dim
    if context is not None and not any("crossattn" in part for part in cond):
        raise UserError("the network attends to a context, and the model has no conditioner that gives one.")
    solver, sigmas = sampler.guided(model, cond), sampler.sigmas(model)
    shape = model.latent_shape
    with tqdm(total=count * sampler.steps, desc="sample", unit="step", disable=not sampler.progress) as bar:
        for start in range(0, count, sampler.batch_size):
            rows = range(start, min(start + sampler.batch_size, count))
            seeds = [fold(sampler.seed, first + row) for row in rows]
            part = {name: value[rows.start : rows.stop] for name, value in cond.items()}
            x = sample_noise(seeds, shape).to(model.device, model.sample_dtype) * sigmas[0]
            x = solver.solve(x, sigmas, part, tile_noise(seeds, shape), lambda i, x, x0: bar.update(len(x)))
            yield x.float()


def tile_noise(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """What solvers add to the tiles of these seeds at each step, (len(seeds), *shape).

    >>> tile_noise([0, 1], (4, 8, 8))(step=0).shape
    torch.Size([2, 4, 8, 8])
    """
    return lambda step: sample_noise(seeds, shape, stream=step + 1)
