"""Training losses: every parameterisation is a weighted error of the denoised image.

The published objectives are recovered exactly: with eps-prediction |eps - eps_hat| = |x0 - D(x)| / sigma.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import PARAMETERIZATIONS, per_sample


def error_scale(parameterization: str, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Factor (B,) that turns an x0 error into the error of what the network predicts.

    >>> error_scale("v", torch.tensor([0.1, 1.0, 10.0]))
    tensor([10.0499,  1.4142,  1.0050])
    """
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
    raise ValueError(f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}; got {parameterization!r}")


def min_snr_scale(sigma: Tensor, gamma: float, parameterization: str, sigma_data: float = 1.0) -> Tensor:
    """Weight (B,) on the squared network error so that the x0 error weighs min(SNR, gamma) (arXiv:2303.09556, eq. 6).

    SNR = 1/sigma^2; for eps the weight is min(SNR, gamma)/SNR, for v min(SNR, gamma)/(SNR+1), for x0 min(SNR, gamma).

    >>> min_snr_scale(torch.tensor([0.1, 1.0, 10.0]), 5.0, "eps")  # low noise weighs less
    tensor([0.0500, 1.0000, 1.0000])
    """
    return (1 / sigma**2).clamp(max=gamma) / error_scale(parameterization, sigma, sigma_data) ** 2


def scaled_error(estimate: Tensor, x0: Tensor, scale: Tensor, kind: str = "l2") -> Tensor:
    """Mean error (B,) of an estimate of x0 (B,C,H,W), scaled by scale (B,) before the norm; kind is l2 or l1.

    >>> x0 = torch.zeros(2, 3, 8, 8)
    >>> scaled_error(x0 + 0.5, x0, torch.tensor([1.0, 2.0]))
    tensor([0.2500, 1.0000])
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"loss kind must be l1 or l2; got {kind!r}")
    error = ((estimate - x0).float() * per_sample(scale, x0)).flatten(1)
    return error.square().mean(1) if kind == "l2" else error.abs().mean(1)


def variational_bound(x0: Tensor, estimate: Tensor, place: Tensor, sigma: Tensor, table: Tensor) -> Tensor:
    """The term of the variational bound at sigma (B,), in bits per dimension (B,): what trains a learned variance.

    KL(q(x_s|x,x0) || p(x_s|x)) for the table's next lower level s, and at its lowest level the negative log-likelihood
    of 8-bit pixels in [-1,1] (arXiv:2102.09672, equations 4, 5 and 15).

    Args:
        x0, estimate: the image and its estimate (B,C,H,W). Only the variance should be trained by this: give the
            estimate detached. place: the step's log-variance between the posterior's (0) and the forward step's (1).
        table: ascending sigmas (T,) of the training schedule; sigma are entries of it.

    >>> table, x0 = torch.tensor([0.1, 1.0, 10.0]), torch.zeros(2, 3, 8, 8)
    >>> small, large = torch.zeros_like(x0), torch.ones_like(x0)
    >>> [variational_bound(x0, x0, place, table[1:], table).tolist() for place in (small, large)]
    [[0.0, 0.0], [2.1220, 0.1358]]
    """
    index = torch.searchsorted(table, sigma).clamp(max=len(table) - 1)
    s, t = (per_sample(table[i], x0).double() for i in ((index - 1).clamp(min=0), index.clamp(min=1)))
    small = s**2 * (t**2 - s**2) / t**2                                         # variances of x_s = x0 + s*n
    large = (t**2 - s**2) * (1 + s**2) / (1 + t**2)
    place, difference = place.double(), (x0 - estimate).double()
    log_ratio = place * (large / small).log()
    shift = difference * (1 - s**2 / t**2)
    divergence = 0.5 * (log_ratio - 1 + (-log_ratio).exp() + shift**2 / small * (-log_ratio).exp())

    lowest = s**2 / (1 + s**2)                                                  # forward variance of the first step
    log_scale = 0.5 * (place * lowest.log() + (1 - place) * (small / (1 + s**2)).log())
    likelihood = _pixel_log_likelihood(x0.double(), difference, (-log_scale).exp())
    bound = torch.where(per_sample(index == 0, x0), -likelihood, divergence)
    return (bound.flatten(1).mean(1) / math.log(2)).float()


def _pixel_log_likelihood(x: Tensor, difference: Tensor, inverse_scale: Tensor) -> Tensor:
    """Log-probability of 8-bit pixels x in [-1,1] under a Gaussian around x - difference, the outer bins open."""
    above = torch.special.ndtr((difference + 1 / 255) * inverse_scale)
    below = torch.special.ndtr((difference - 1 / 255) * inverse_scale)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
