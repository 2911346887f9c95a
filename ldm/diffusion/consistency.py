"""Agreement with a measurement, such as an image of low resolution: functions from denoiser to denoiser.

    super_resolved = consistent(denoiser, match_low(low, 4))
    super_resolved = consistent(denoiser, projected(match_low(low, 4), encode, decode))

The first is for models that work on pixels, the second for latent ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser, per_sample

Projection = Callable[[Tensor], Tensor]  # an x0 (B,C,H,W) to the nearest, or a nearer, one that agrees


def consistent(denoiser: Denoiser, project: Projection, low: float = 0.0) -> Denoiser:
    """The denoised image, brought into agreement at every noise level above `low` (DDNM, arXiv:2212.00490, 3.2).

    >>> agreeing = consistent(denoiser, match_low(torch.full((2, 3, 2, 2), 0.25), 4))
    >>> shrink(agreeing(x, torch.tensor([10.0, 10.0]), {}), 4)[0, 0]
    tensor([[0.2500, 0.2500],
            [0.2500, 0.2500]])
    """

    def agreeing(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        x0 = denoiser(x, sigma, cond)
        return torch.where(per_sample(sigma > low, x0), project(x0), x0)

    return agreeing


def shrink(image: Tensor, factor: int) -> Tensor:
    """(B,C,H,W) -> (B,C,H/factor,W/factor): the mean of every block of factor x factor.

    >>> shrink(torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]]), 2)
    tensor([[[[2.]]]])
    """
    return F.avg_pool2d(image, factor)


def match_low(low: Tensor, factor: int) -> Projection:
    """The nearest image whose blocks of factor x factor have the means low (B,C,h,w): every block is shifted by what it
    lacks.

    >>> match_low(torch.tensor([[[[3.0]]]]), 2)(torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]]))
    tensor([[[[1., 2.],
              [3., 6.]]]])
    """

    def project(image: Tensor) -> Tensor:
        lack = low.to(image) - shrink(image, factor)
        return image + lack.repeat_interleave(factor, -2).repeat_interleave(factor, -1)

    return project


def projected(project: Projection, encode: Projection, decode: Projection) -> Projection:
    """A projection of images as one of latents: by how much the decoded image moves, encoded, the latent is moved.

    What the first stage loses cancels, as both images are encoded.

    >>> brighter = lambda image: image + 0.5
    >>> projected(brighter, encode=lambda image: image / 10, decode=lambda z: 10 * z)(torch.zeros(1, 4, 2, 2)).mean()
    tensor(0.0500)
    """

    def in_latents(z: Tensor) -> Tensor:
        image = decode(z)
        return z + encode(project(image)) - encode(image)

    return in_latents
