"""Perceptual distance between images. No weight is ever downloaded."""

from __future__ import annotations

import warnings
from pathlib import Path

import lpips
import torch
from torch import Tensor, nn

from ldm.autoencoder.weights import read_state_dict
from ldm.encoders.encoder import load_encoder
from ldm.errors import UserError
from ldm.foreign.paths import allowed
from ldm.interop.weights import check_finite

# torchvision's ImageNet backbones, under the names that torch.hub stores them by
BACKBONES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}


def find_backbone(net: str, weights: str | None = None) -> Path:
    """The file of LPIPS' backbone `net`: `weights`, or where torch.hub keeps it. UserError where it is not.

    >>> find_backbone("vgg", "none.pth")
    Traceback (most recent call last):
    ldm.errors.UserError: LPIPS needs the ImageNet backbone vgg16-397923af.pth, which is not at none.pth. Get ...
    """
    if net not in BACKBONES:
        raise UserError(f"LPIPS has no backbone '{net}'; give one of {', '.join(BACKBONES)}.")
    path = allowed(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net]
    if not path.is_file():
        raise UserError(
            f"LPIPS needs the ImageNet backbone {BACKBONES[net]}, which is not at {path}. Get it from "
            f"https://download.pytorch.org/models/{BACKBONES[net]} (torchvision, BSD-3-Clause; trained on ImageNet "
            "images, whose terms allow non-commercial research) and put it there, or name your copy by "
            "model.params.loss.params.lpips_weights; model.params.loss.params.perceptual_weight=0 trains without LPIPS"
        )
    return path


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018): two images (B,3,H,W) in [-1,1] -> (B,1,1,1).

    `weights` is torchvision's ImageNet backbone; by default it is looked for where torch.hub keeps it. The linear heads
    come with the `lpips` package. A missing backbone raises `UserError`.
    """

    def __init__(self, net: str = "vgg", weights: str | None = None):
        super().__init__()
        path = find_backbone(net, weights)
        with warnings.catch_warnings():  # lpips calls torchvision by its old argument names
            warnings.simplefilter("ignore")
            self.model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        _load_trunk(self.model.net, path)
        self.model.requires_grad_(False)

    def train(self, mode: bool = True) -> LPIPS:
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model(x, y)


def _load_trunk(trunk: nn.Module, path: Path) -> None:
    """Copy torchvision's `features.<i>.…` into lpips' `slice<k>.<i>.…`."""
    state = read_state_dict(path)
    names = {key: "features." + key.split(".", 1)[1] for key in trunk.state_dict()}
    missing = [source for source in names.values() if source not in state]
    if missing:
        raise UserError(f"{path} is not the torchvision backbone that LPIPS needs: it lacks {missing[0]}.")
    taken = {key: state[source] for key, source in names.items()}
    check_finite(taken, path)
    trunk.load_state_dict(taken)


class EncoderMaps(nn.Module):
    """The first `levels` feature maps of a tile encoder (`ldm.encoders.encoder`), of images at their own resolution.

    Images (B,3,H,W) in [-1,1] -> list of (B,C_i,H_i,W_i). The trunk must take any size, as convolutional ones do.
    """

    def __init__(self, encoder: str, weights: str | None = None, levels: int = 3):
        super().__init__()
        self.encoder = load_encoder(encoder, weights)
        self.levels = list(range(levels))

    def forward(self, x: Tensor) -> list[Tensor]:
        inputs = self.encoder.normalise((x + 1) / 2)
        return self.encoder.model.forward_intermediates(inputs, indices=self.levels, intermediates_only=True)


class FeatureDistance(nn.Module):
    """LPIPS' form over any frozen encoder: mean squared difference of unit-length feature vectors, summed over maps.

    `encoder` maps images (B,3,H,W) in [-1,1] to a list of feature maps (B,C_i,H_i,W_i). Result (B,1,1,1).
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> FeatureDistance:
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0], 1, 1, 1)
        for fx, fy in zip(self.encoder(x), self.encoder(y), strict=True):
            fx, fy = (f.float() / (f.float().norm(dim=1, keepdim=True) + 1e-6) for f in (fx, fy))
            total = total + (fx - fy).square().sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
        return total
