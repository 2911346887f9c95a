"""Guidance by likeness to another image: for translation with models that were trained without a source."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser, per_sample

Likeness = Callable[[Tensor], Tensor]


def likeness_guidance(denoiser: Denoiser, likeness: Likeness, scale: float) -> Denoiser:
    """Guidance of the denoised image to where `likeness` is greater: x0 + scale * N * sigma^2 * d likeness(x0) / dx.

    With p(source | x) proportional to exp(scale * N * likeness(x0(x))) this is classifier guidance (arXiv:2105.05233,
    algorithm 2) whose classifier sees the denoised image (arXiv:2209.14687, equation 10): the gradient goes through the
    denoiser, also inside no-grad samplers. N, the number of pixels, makes one scale fit every size.

    likeness(x0) -> (B,) of images (B,C,H,W), differentiable and a mean over places: zero-shot translation compares a
    source of another modality, by the LMI of networks, `lambda x0: lmi_score(source, (x0 + 1) / 2)`.
    """

    def guided(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            x0 = denoiser(at, sigma, cond)
            (gradient,) = torch.autograd.grad(likeness(x0).sum(), at)
        return x0.detach() + scale * x.shape[-2:].numel() * per_sample(sigma, x) ** 2 * gradient

    return guided
