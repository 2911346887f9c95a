"""Guidance: functions from denoiser to denoiser. They nest in any order with each other and with tiling."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser


def cat_conds(*conds: Cond) -> dict[str, Tensor]:
    """Conditions of several batches as the condition of one; all must have the same parts."""
    return {part: torch.cat([cond[part] for cond in conds]) for part in conds[0]}


def cfg(denoiser: Denoiser, null: Cond, scale: float) -> Denoiser:
    """Classifier-free guidance (arXiv:2207.12598): x0 = null + scale*(conditional - null), in one batched call.

    `null` is the unconditional condition of one sample, (1,...) for each part. Scale 1 is no guidance and costs none.
    """
    if scale == 1.0:
        return denoiser

    def guided(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        nulls = {part: value.expand(len(x), *value.shape[1:]) for part, value in null.items()}
        both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cat_conds(nulls, cond))
        unconditional, conditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guided


def clip(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Clip the denoised image, as pixel-space models are sampled."""

    def clipped(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return denoiser(x, sigma, cond).clamp(low, high)

    return clipped
