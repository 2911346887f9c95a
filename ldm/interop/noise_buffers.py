"""The buffers of a noise schedule that CompVis' checkpoints hold."""

from __future__ import annotations

import torch
from torch import Tensor


def schedule_buffers(betas: Tensor) -> dict[str, Tensor]:
    """The buffers of CompVis' models that follow from betas (T,) alone, in float64.

    >>> schedule_buffers(torch.tensor([0.5, 0.5]))["alphas_cumprod"]
    tensor([0.5000, 0.2500])
    """
    cumprod = (1 - betas).cumprod(0)
    return {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": torch.cat([torch.ones_like(cumprod[:1]), cumprod[:-1]]),
        "sqrt_alphas_cumprod": cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1 / cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / cumprod - 1).sqrt(),
    }


def posterior_buffers(betas: Tensor) -> dict[str, Tensor]:
    """Those of the posterior q(x_{t-1} | x_t, x_0) (DDPM, arXiv:2006.11239, equations 6 and 7), in float64.

    >>> buffers = posterior_buffers(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    >>> float(buffers["posterior_variance"][0])
    0.0
    """
    cumprod = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones_like(cumprod[:1]), cumprod[:-1]])
    variance = betas * (1 - before) / (1 - cumprod)
    return {
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - cumprod),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - cumprod),
    }
