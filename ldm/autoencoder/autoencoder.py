"""First stages: image (B,3,H,W) in [-1,1] <-> latent (B,channels,H/f,W/f). Plain modules, no training code.

All share one face: `encode`, `latent`, `decode`, `channels`, `downsampling`. Latents are unscaled (first-stage units).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.autoencoder.latent import DiagonalGaussian
from ldm.autoencoder.model import build_encoder_decoder
from ldm.autoencoder.taming import VectorQuantizer
from ldm.errors import UserError


class Reconstruction(NamedTuple):
    image: Tensor  # (B,3,H,W)
    latent_loss: Tensor  # () KL divergence per image, or codebook loss
    indices: Tensor | None  # codebook indices of a VQ latent
    latent: Tensor  # (B,C,h,w) that it was decoded from


class AutoencoderKL(nn.Module):
    """Autoencoder with a diagonal Gaussian latent of `embed_dim` channels (Rombach et al. 2022, section 3.1).

    quant_conv: whether 1x1 convolutions stand between encoder, latent and decoder; those of SD3 and FLUX have none.
    """

    def __init__(self, ddconfig: dict, embed_dim: int, quant_conv: bool = True):
        super().__init__()
        self.encoder, self.decoder = build_encoder_decoder(ddconfig, double_z=True)
        z_channels = ddconfig["z_channels"]
        if not quant_conv and embed_dim != z_channels:
            raise UserError(
                f"without quant_conv embed_dim is z_channels, as the latent is the encoder's; got {embed_dim} and "
                f"{z_channels}."
            )
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1) if quant_conv else nn.Identity()
        self.channels = embed_dim
        self.downsampling = 2 ** (len(ddconfig["ch_mult"]) - 1)

    def encode(self, x: Tensor) -> DiagonalGaussian:  # (B,3,H,W), H and W multiples of f
        _check_size(x, self.downsampling)
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(x)))

    def latent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B,C,h,w): the mode of the posterior, or a sample from it if a generator is given."""
        posterior = self.encode(x)
        return posterior.mode() if generator is None else posterior.sample(generator)

    def decode(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,3,H,W)
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Reconstruct from a sample of the posterior, or from its mode without a generator."""
        posterior = self.encode(x)
        z = posterior.mode() if generator is None else posterior.sample(generator)
        return Reconstruction(self.decode(z), posterior.kl().mean(), None, z)

    def get_last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def freeze_encoder(self) -> None:
        """Stop training whatever decides the latent of an image."""
        self.encoder.requires_grad_(False)
        self.quant_conv.requires_grad_(False)


class VQModel(nn.Module):
    """Autoencoder with a codebook of `n_embed` vectors of `embed_dim` channels (VQGAN, Esser et al. 2021).

    As in CompVis' `VQModelInterface`, the latent is the encoder's output before quantisation and `decode` quantises.
    """

    def __init__(
        self,
        ddconfig: dict,
        n_embed: int,
        embed_dim: int,
        remap: str | None = None,
        sane_index_shape: bool = False,
    ):
        super().__init__()
        self.encoder, self.decoder = build_encoder_decoder(ddconfig, double_z=False)
        z_channels = ddconfig["z_channels"]
        self.quantize = VectorQuantizer(n_embed, embed_dim, remap=remap, sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.channels = embed_dim
        self.downsampling = 2 ** (len(ddconfig["ch_mult"]) - 1)

    def encode(self, x: Tensor) -> Tensor:  # (B,3,H,W) -> (B,C,h,w), not quantised
        _check_size(x, self.downsampling)
        return self.quant_conv(self.encoder(x))

    def latent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B,C,h,w) before quantisation; there is nothing to sample, the generator is ignored."""
        return self.encode(x)

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:  # (B,C,h,w) -> (B,3,H,W)
        if not force_not_quantize:
            z = self.quantize(z).z
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        quantised = self.quantize(self.encode(x))
        image = self.decode(quantised.z, force_not_quantize=True)
        return Reconstruction(image, quantised.loss, quantised.indices, quantised.z)

    def get_last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def freeze_encoder(self) -> None:
        """Stop training whatever decides the latent and the codes of an image."""
        for module in (self.encoder, self.quant_conv, self.quantize):
            module.requires_grad_(False)


class IdentityFirstStage(nn.Module):
    """The first stage of a pixel-space model: the latent is the image."""

    downsampling = 1

    def __init__(self, channels: int = 3):
        super().__init__()
        self.channels = channels

    def encode(self, x: Tensor) -> Tensor:
        return x

    def latent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z


class UnitFirstStage(nn.Module):
    """The first stage of a pixel-space model that works on [0, 1], as published models of medical slices do: the
    latent is the image's intensity. Nothing is clipped on the way from noise to image."""

    downsampling = 1

    def __init__(self, channels: int = 1):
        super().__init__()
        self.channels = channels

    def encode(self, x: Tensor) -> Tensor:
        return (x + 1) / 2

    def latent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return 2 * z - 1


def _check_size(x: Tensor, downsampling: int) -> None:
    height, width = x.shape[-2:]
    if height % downsampling or width % downsampling:
        raise ValueError(f"image sides must be multiples of {downsampling} px; got {height} x {width}.")
