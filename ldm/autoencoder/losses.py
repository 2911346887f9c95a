"""Reconstruction losses of first stages: L1 (or L2) + perceptual distance + PatchGAN with an adaptive weight.

After Esser et al. 2021 (VQGAN), eq. 5 to 7, and Rombach et al. 2022, eq. 25, with the reductions and parameter names of
CompVis' `LPIPSWithDiscriminator` (KL) and `VQLPIPSWithDiscriminator` (VQ), so their settings keep their meaning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import Reconstruction
from ldm.autoencoder.perceptual import LPIPS, FeatureDistance
from ldm.autoencoder.taming import patch_discriminator
from ldm.config import instantiate_from_config
from ldm.errors import UserError, suggest

PIXEL_LOSSES = {"l1": torch.abs, "l2": torch.square}


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """The hinge loss of a discriminator (Lim & Ye 2017): half the sum of its two terms, (), of logits of any shape.

    >>> hinge_d_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0]))
    tensor(0.3750)
    """
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """The non-saturating loss of a discriminator (Goodfellow et al. 2014): half the sum of its two cross-entropies, ().

    >>> vanilla_d_loss(torch.zeros(4), torch.zeros(4))  # a guess: log 2
    tensor(0.6931)
    """
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISC_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def adaptive_weight(nll_loss: Tensor, logits_fake: Tensor, last_layer: Tensor, disc_weight: float) -> Tensor:
    """lambda = |grad nll| / (|grad g| + 1e-4), clamped to [0, 1e4], times `disc_weight` (Esser et al. 2021, eq. 7).

    g = -mean(logits_fake); both gradients are taken at the decoder's last layer, which runs in fp32. The mean over the
    logits is divided out after the gradient, so that it does not vanish in a discriminator that runs in fp16.

    >>> last_layer = torch.nn.Parameter(torch.tensor(1.0))
    >>> adaptive_weight(3.0 * last_layer, 2.0 * last_layer.expand(4), last_layer, disc_weight=0.5)  # of 3 / 2
    tensor(0.7500)
    """
    (nll_grad,) = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)
    (g_grad,) = torch.autograd.grad(-logits_fake.sum(), last_layer, retain_graph=True)
    weight = nll_grad.float().norm() / (g_grad.float().norm() / logits_fake.numel() + 1e-4)
    return weight.clamp(0.0, 1e4).detach() * disc_weight


class _ReconstructionLoss(nn.Module):
    """What the losses of KL and VQ autoencoders share; their `nll` differs. Args as in `LPIPSWithDiscriminator`."""

    def __init__(
        self,
        disc_start: int,
        latent_weight: float,
        /,
        pixel_loss: str = "l1",
        perceptual_weight: float = 1.0,
        perceptual_loss: str | dict = "vgg",
        lpips_weights: str | None = None,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_ndf: int = 64,
        use_actnorm: bool = False,
        disc_weight: float = 1.0,
        disc_factor: float = 1.0,
        disc_loss: str = "hinge",
    ):
        super().__init__()
        if pixel_loss not in PIXEL_LOSSES:
            raise UserError(f"there is no pixel_loss '{pixel_loss}'{suggest(pixel_loss, PIXEL_LOSSES)}")
        if disc_loss not in DISC_LOSSES:
            raise UserError(f"there is no disc_loss '{disc_loss}'{suggest(disc_loss, DISC_LOSSES)}")
        self.latent_weight = latent_weight
        self.logvar = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        self.pixel_loss = PIXEL_LOSSES[pixel_loss]
        self.perceptual_weight = perceptual_weight
        if perceptual_weight == 0:
            self.perceptual_loss = None
        elif isinstance(perceptual_loss, str):
            self.perceptual_loss = LPIPS(perceptual_loss, lpips_weights)
        else:
            self.perceptual_loss = FeatureDistance(instantiate_from_config(perceptual_loss))
        self.discriminator = patch_discriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
        self.disc_start = disc_start
        self.disc_weight = disc_weight
        self.disc_factor = disc_factor
        self.disc_loss = DISC_LOSSES[disc_loss]

    def adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part in update `step`."""
        return step >= self.disc_start and self.disc_factor > 0

    def nll(self, pixels: Tensor) -> Tensor:
        """The negative log-likelihood () of the errors of pixels (B,C,H,W)."""
        raise NotImplementedError

    def reconstruction(self, x: Tensor, recon: Reconstruction) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Pixel, perceptual and latent terms: (nll, total without the adversarial term, values to log)."""
        x, y = x.float(), recon.image.float()
        pixels = self.pixel_loss(x - y)
        logs = {"l1_loss" if self.pixel_loss is torch.abs else "l2_loss": pixels.detach().mean()}
        if self.perceptual_loss is not None:
            distance = self.perceptual_loss(x, y)  # (B,1,1,1)
            pixels = pixels + self.perceptual_weight * distance
            logs["perceptual_loss"] = distance.detach().mean()
        nll = self.nll(pixels)
        total = nll + self.latent_weight * recon.latent_loss
        logs |= {
            "rec_loss": pixels.detach().mean(),
            "nll_loss": nll.detach(),
            "latent_loss": recon.latent_loss.detach(),
            "total_loss": total.detach(),
        }
        return nll, total, logs

    def forward(
        self, x: Tensor, recon: Reconstruction, step: int, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoder's loss on images (B,3,H,W) in [-1,1]: (loss, values to log)."""
        nll, loss, logs = self.reconstruction(x, recon)
        if self.adversarial(step):
            logits_fake = self.discriminator(recon.image).float()
            weight = adaptive_weight(nll, logits_fake, last_layer, self.disc_weight)
            g_loss = -logits_fake.mean()
            loss = loss + weight * self.disc_factor * g_loss
            logs |= {"g_loss": g_loss.detach(), "d_weight": weight, "total_loss": loss.detach()}
        return loss, logs

    def discriminator_loss(self, x: Tensor, recon: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on real and reconstructed images: (loss, values to log)."""
        real = self.discriminator(x).float()
        fake = self.discriminator(recon.detach()).float()
        loss = self.disc_factor * self.disc_loss(real, fake)
        logs = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in logs.items()}


class LPIPSWithDiscriminator(_ReconstructionLoss):
    """Loss of a KL autoencoder: nll = sum over pixels of (|x - y| + perceptual) / exp(logvar) + logvar, per image.

    Args:
        disc_start: update from which the discriminator is trained and weighs in; before, it is not run at all.
        kl_weight: weight of the KL divergence (nats per image) beside the nll.
        logvar_init: log-variance of the pixels; trained only with `learn_logvar` (the published models keep it at 0).
        pixel_loss: "l1" or "l2".
        perceptual_weight: weight of the perceptual distance; 0 leaves it out.
        perceptual_loss: "vgg", "alex" or "squeeze" (LPIPS), or a node {target, params} of a module that maps images
            (B,3,H,W) in [-1,1] to a list of feature maps, for a distance over a domain's own encoder.
        lpips_weights: file of LPIPS' backbone; by default where torch.hub keeps it.
        disc_num_layers, disc_in_channels, disc_ndf, use_actnorm: the PatchGAN.
        disc_weight, disc_factor: the adversarial term is disc_factor · disc_weight · adaptive weight · g.
        disc_loss: "hinge" or "vanilla".
    """

    def __init__(
        self,
        disc_start: int,
        kl_weight: float = 1.0,
        logvar_init: float = 0.0,
        learn_logvar: bool = False,
        **shared: float | str | dict | None,
    ):
        super().__init__(disc_start, kl_weight, **shared)
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=learn_logvar)

    def nll(self, pixels: Tensor) -> Tensor:
        return (pixels / self.logvar.exp() + self.logvar).sum() / pixels.shape[0]


class VQLPIPSWithDiscriminator(_ReconstructionLoss):
    """Loss of a VQ autoencoder: nll = mean over pixels of |x - y| + perceptual; the latent term is the codebook loss.

    Args:
        codebook_weight: weight of the codebook loss beside the nll.
        others: as in `LPIPSWithDiscriminator`, but for those of the KL divergence and the log-variance.
    """

    def __init__(self, disc_start: int, codebook_weight: float = 1.0, **shared: float | str | dict | None):
        super().__init__(disc_start, codebook_weight, **shared)

    def nll(self, pixels: Tensor) -> Tensor:
        return pixels.mean()
