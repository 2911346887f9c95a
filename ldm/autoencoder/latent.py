"""The diagonal Gaussian that a KL autoencoder's encoder describes (Kingma & Welling 2014)."""

from __future__ import annotations

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


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
