"""The one place that touches taming-transformers: vector quantiser, PatchGAN discriminator and ActNorm.

`taming-transformers-rom1504` is the release that has `VectorQuantizer2`. Only its plain torch modules are imported; its
LPIPS (which downloads) and its Lightning models (which need an old Lightning) are not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.util import ActNorm
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.foreign.paths import allowed

__all__ = ["ActNorm", "Quantised", "VectorQuantizer", "patch_discriminator"]


class Quantised(NamedTuple):
    z: Tensor  # (B,C,h,w) nearest codes; the gradient passes straight through to the input
    loss: Tensor  # () codebook and commitment loss
    indices: Tensor  # (B,h,w), or (B·h·w,) without `sane_index_shape`


class VectorQuantizer(VectorQuantizer2):
    """Nearest code of a learned codebook `embedding.weight` (n_e,e_dim) (van den Oord et al. 2017, eq. 1 to 3).

    As in the published models, beta = 0.25 weighs the codebook term instead of the commitment term (`legacy`).
    Distances are computed in fp32 whatever the autocast: in 16 bits near codes would be confused.
    """

    def __init__(self, n_e: int, e_dim: int, remap: str | None = None, sane_index_shape: bool = False):
        if remap is not None and not allowed(remap).is_file():
            raise UserError(f"the codebook's remap file {remap} does not exist; give an .npy of used indices or null.")
        super().__init__(n_e, e_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape)

    def forward(self, z: Tensor) -> Quantised:  # (B,C,h,w)
        with torch.autocast(z.device.type, enabled=False):
            quantised, loss, (_, _, indices) = super().forward(z.float())
        return Quantised(quantised, loss, indices)


def patch_discriminator(in_channels: int, ndf: int, n_layers: int, use_actnorm: bool) -> nn.Module:
    """PatchGAN (Isola et al. 2017): image (B,C,H,W) -> logits (B,1,h,w), one for each of overlapping patches.

    >>> patch_discriminator(in_channels=3, ndf=4, n_layers=2, use_actnorm=False)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1, 6, 6])
    """
    return NLayerDiscriminator(in_channels, ndf=ndf, n_layers=n_layers, use_actnorm=use_actnorm).apply(weights_init)
