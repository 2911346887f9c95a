"""Latents that know what an encoder knows: the loss that aligns a first stage with patch tokens (VA-VAE).

Yao, Yang & Wang 2025, arXiv:2501.01423, section 3.2: latents of many channels reconstruct better and are harder to
generate; those that are aligned are less so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import check_params
from ldm.errors import UserError


@dataclass(frozen=True)
class LatentAlignment:
    """What a config says of it, `align: {feature: uni2-h-tokens, weight: 0.1}`.

    feature: name of patch tokens in the store, from `data_prep.extract_features --tokens 16`.
    weight: of the loss, beside a reconstruction loss whose gradient at the encoder's last layer is as long.
    cosine_margin, distance_margin: angles and differences of angles that are good enough.
    """

    feature: str
    weight: float = 0.1
    cosine_margin: float = 0.5
    distance_margin: float = 0.25

    def __post_init__(self):
        for name, low, high in (("weight", 0, 1e4), ("cosine_margin", -1e-9, 1), ("distance_margin", -1e-9, 1)):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and low < value <= high):
                raise UserError(f"align.{name} is between {max(low, 0)} and {high:g}; got {value!r}.")


def alignment_of(node: Mapping[str, Any]) -> LatentAlignment:
    """What a config says, checked. UserError: an unknown key, a value out of range.

    >>> alignment_of({"feature": "uni2-h-tokens"}).cosine_margin
    0.5
    """
    check_params(LatentAlignment, node, "align")
    return LatentAlignment(**node)


class TokenAlignment(nn.Module):
    """Latents (B,C,h,w), projected, against tokens (B,D,k,l) of the same images.

    feature: tokens (D,k,l) of one image, for their number of channels. UserError: it is missing, or no map.

    >>> align = TokenAlignment(LatentAlignment("tokens"), channels=4, feature=torch.zeros(6, 2, 2))
    >>> align(torch.randn(3, 4, 8, 8), torch.randn(3, 6, 2, 2)).shape
    torch.Size([])
    """

    def __init__(self, alignment: LatentAlignment, channels: int, feature: Tensor | None):
        super().__init__()
        if not isinstance(feature, Tensor) or feature.ndim != 3:
            held = "are not there" if feature is None else f"are of shape {tuple(feature.shape)}"
            raise UserError(
                f"align.feature: '{alignment.feature}' is to be a map of patch tokens, and its values {held}; make one "
                "with `python -m data_prep.extract_features --tokens 16`."
            )
        self.alignment = alignment
        self.project = nn.Conv2d(channels, feature.shape[0], 1, bias=False)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """L_mcos + L_mdms (equations 1 and 2), (), at the coarser of the two resolutions."""
        made, tokens = self.project(latents.float()), tokens.float()                    # (B,D,h,w), (B,D,k,l)
        side = [min(pair) for pair in zip(made.shape[2:], tokens.shape[2:])]
        made, tokens = (
            F.normalize(F.adaptive_avg_pool2d(each, side).flatten(2), dim=1) for each in (made, tokens)
        )                                                                               # (B,D,N), of length 1
        cosines = F.relu(1 - self.alignment.cosine_margin - (made * tokens).sum(1))     # (B,N)
        apart = made.transpose(1, 2) @ made - tokens.transpose(1, 2) @ tokens           # (B,N,N)
        return cosines.mean() + F.relu(apart.abs() - self.alignment.distance_margin).mean()


def balance(reference: Tensor, loss: Tensor, layer: Tensor) -> Tensor:
    """|grad reference| / |grad loss| at a layer's weights, (): what makes two losses pull as hard (equation 5).

    >>> layer = torch.nn.Parameter(torch.tensor(1.0))
    >>> balance(3.0 * layer, 2.0 * layer, layer)
    tensor(1.5000)
    """
    first, second = (
        torch.autograd.grad(each, layer, retain_graph=True)[0].float().norm() for each in (reference, loss)
    )
    return (first / (second + 1e-4)).clamp(max=1e8).detach()
