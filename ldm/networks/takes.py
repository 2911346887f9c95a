"""What a network declares of itself: LatentDiffusion reads it, and knows no network by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ldm.errors import UserError


@dataclass(frozen=True)
class Takes:
    """What a network takes and gives, as its attribute `takes`.

    It is called as network(x, timesteps, context=..., y=..., vector=...) with what it declares, and no more.

    Attributes:
        in_channels: of x together with the maps that conditions concatenate to it. out_channels: of the prediction.
        image_size: side of the x that it was trained on.
        context_dim: of the tokens (B,L,context_dim) that it attends to, which must then be given; None: it takes none.
        vector_dim: of a vector (B,vector_dim), which may be given, or must (needs_vector); None: it takes none.
        num_classes: of the labels y (B,), which must then be given; None: it takes none.
        skips: how many of its blocks run by themselves on deep features kept from an earlier step
            (`ldm.networks.cache.DeepCache`); 0: it keeps none.
        dtype: of a sampler's x, for networks that float32 is too coarse for.

    >>> Takes(in_channels=4, out_channels=4, image_size=32, context_dim=512).vector_dim is None
    True
    """

    in_channels: int
    out_channels: int
    image_size: int | None
    context_dim: int | None = None
    vector_dim: int | None = None
    needs_vector: bool = False
    num_classes: int | None = None
    skips: int = 0
    dtype: torch.dtype = torch.float32


def declared(network: nn.Module) -> Takes:
    """What a network declares. UserError if it declares nothing.

    >>> declared(model.model.diffusion_model).context_dim
    8
    """
    takes = getattr(network, "takes", None)
    if not isinstance(takes, Takes):
        raise UserError(
            f"unet_config: a {type(network).__name__} does not declare what it takes; give it an attribute `takes` "
            "(ldm.networks.takes.Takes), as ldm.networks.unet.UNetModel has."
        )
    return takes
