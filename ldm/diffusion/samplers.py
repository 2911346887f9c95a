"""Samplers: each one visible loop over descending sigmas, without state, without knowledge of models.

All take `denoiser(x, sigma, cond) -> x0`, the starting x (B,C,H,W) at sigmas[0], and sigmas (N+1,). Noise that a
sampler adds comes from `noise(step) -> (B,C,H,W)`, so that it can be a function of each sample's seed. `callback(step,
x, x0)` sees every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser

Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


def _nothing(step: int, x: Tensor, x0: Tensor) -> None:
    pass


def _checked(x: Tensor, sigmas: Tensor) -> Tensor:
    if not torch.isfinite(sigmas).all():
        raise ValueError("sigmas must be finite; a zero-terminal-SNR table has no finite first sigma to start from")
    return sigmas.to(x.device)


@torch.no_grad()
def sample_euler(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, callback: Callback = _nothing
) -> Tensor:
    """Euler steps of the probability-flow ODE: deterministic DDIM (arXiv:2010.02502), its inversion if ascending."""
    sigmas = _checked(x, sigmas)
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        d = (x - x0) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, noise: Noise, eta: float = 1.0,
    callback: Callback = _nothing,
) -> Tensor:  # fmt: skip
    """DDIM with stochasticity eta in [0,1] (arXiv:2010.02502, equation 16); eta 1 is DDPM's ancestral sampler."""
    sigmas = _checked(x, sigmas)
    for i in range(len(sigmas) - 1):
        sigma, target = sigmas[i], sigmas[i + 1]
        x0 = denoiser(x, sigma.expand(len(x)), cond)
        up = eta * target * ((sigma**2 - target**2).clamp(min=0).sqrt() / sigma)
        down = (target**2 - up**2).clamp(min=0).sqrt()
        x = x0 + (x - x0) / sigma * down
        if up > 0:
            x = x + noise(i).to(x) * up
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_heun(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, callback: Callback = _nothing
) -> Tensor:
    """Heun's second-order steps (EDM, arXiv:2206.00364, algorithm 1): two evaluations a step, one for the last."""
    sigmas = _checked(x, sigmas)
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        d = (x - x0) / sigmas[i]
        euler = x + d * (sigmas[i + 1] - sigmas[i])
        if sigmas[i + 1] > 0:
            d_next = (euler - denoiser(euler, sigmas[i + 1].expand(len(x)), cond)) / sigmas[i + 1]
            x = x + (d + d_next) / 2 * (sigmas[i + 1] - sigmas[i])
        else:
            x = euler
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_dpmpp_2m(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, callback: Callback = _nothing
) -> Tensor:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2): second order, one evaluation a step."""
    sigmas = _checked(x, sigmas)
    previous = None
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        if sigmas[i + 1] == 0:
            x = x0
        else:
            h = (sigmas[i] / sigmas[i + 1]).log()
            d = x0
            if previous is not None:
                r = (sigmas[i - 1] / sigmas[i]).log() / h
                d = x0 + (x0 - previous) / (2 * r)
            x = sigmas[i + 1] / sigmas[i] * x - (-h).expm1() * d
        previous = x0
        callback(i, x, x0)
    return x
