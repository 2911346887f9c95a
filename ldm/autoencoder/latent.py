"""The diagonal Gaussian that a KL autoencoder's encoder describes (Kingma & Welling 2014)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


class LatentScale:
    """Latents as a diffusion model sees them: (z - shift) * scale, of variance about 1.

    scale, shift: of all channels, or one of each: SD3's first stage has shift 0.0609 and scale 1.5305, REPA-E's
    (arXiv:2504.10483) one of each channel.

    >>> scale = LatentScale(2.0, [0.5, 1.0])
    >>> scale.apply(torch.ones(1, 2, 1, 1)).flatten()
    tensor([1., 0.])
    >>> scale.undo(scale.apply(torch.ones(1, 2, 1, 1))).flatten()
    tensor([1., 1.])
    """

    def __init__(self, scale: float | Sequence[float] | Tensor, shift: float | Sequence[float] = 0.0):
        self.scale, self.shift = scale, shift

    def apply(self, z: Tensor) -> Tensor:
        """(B,C,h,w) in units of the first stage -> in units of the model."""
        return _of_channels(self.scale, z) * (z - _of_channels(self.shift, z) if self.shift else z)

    def undo(self, z: Tensor) -> Tensor:
        """(B,C,h,w) in units of the model -> in units of the first stage."""
        z = z / _of_channels(self.scale, z)
        return z + _of_channels(self.shift, z) if self.shift else z


def _of_channels(value: float | Sequence[float] | Tensor, z: Tensor) -> float | Tensor:
    if isinstance(value, Sequence):
        return torch.tensor(value, dtype=z.dtype, device=z.device)[:, None, None]
    return value


class DiagonalGaussian:
    """N(mean, exp(logvar)) over latents (B,C,h,w); the log-variance is clamped to [-30, 20]."""

    def __init__(self, mean: Tensor, logvar: Tensor):
        self.mean = mean
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Split an encoder's output (B,2C,h,w) into mean and log-variance, in fp32."""
        return cls(*moments.float().chunk(2, dim=1))

    def sample(self, generator: torch.Generator) -> Tensor:
        """mean + std·n, (B,C,h,w); n is drawn on the generator's device, so a CPU generator gives the same on a GPU."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1) in nats, summed over C, h, w: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))
