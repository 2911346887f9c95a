"""Training losses: every parameterisation is a weighted error of the denoised image.

The published objectives are recovered exactly: with eps-prediction |eps - eps_hat| = |x0 - D(x)| / sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser, per_sample


def error_scale(parameterization: str, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Factor (B,) that turns an x0 error into the error of what the network predicts."""
    if parameterization == "eps":
        return 1 / sigma
    if parameterization == "v":
        return (1 + sigma**2).sqrt() / sigma
    if parameterization == "x0":
        return torch.ones_like(sigma)
    if parameterization == "edm":  # arXiv:2206.00364, table 1: lambda = (sigma^2 + sigma_data^2) / (sigma*sigma_data)^2
        return (sigma**2 + sigma_data**2).sqrt() / (sigma * sigma_data)
    if parameterization == "flow":
        return (1 + sigma) / sigma
    raise ValueError(f"unknown parameterization {parameterization!r}")


def min_snr_scale(sigma: Tensor, gamma: float, parameterization: str, sigma_data: float = 1.0) -> Tensor:
    """Weight (B,) on the squared network error so that the x0 error weighs min(SNR, gamma) (arXiv:2303.09556, eq. 6).

    SNR = 1/sigma^2; for eps the weight is min(SNR, gamma)/SNR, for v min(SNR, gamma)/(SNR+1), for x0 min(SNR, gamma).
    """
    return (1 / sigma**2).clamp(max=gamma) / error_scale(parameterization, sigma, sigma_data) ** 2


def denoising_loss(
    denoiser: Denoiser, x0: Tensor, sigma: Tensor, noise: Tensor, cond: Cond, scale: Tensor, kind: str = "l2"
) -> Tensor:
    """Mean error (B,) of the denoised x0 + sigma*noise, scaled by scale (B,) before the norm; kind is l2 or l1."""
    if kind not in ("l1", "l2"):
        raise ValueError(f"loss kind must be l1 or l2; got {kind!r}")
    error = denoiser(x0 + per_sample(sigma, x0) * noise, sigma, cond) - x0
    error = (error.float() * per_sample(scale, x0)).flatten(1)
    return error.square().mean(1) if kind == "l2" else error.abs().mean(1)
