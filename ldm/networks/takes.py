"""What a network declares of itself: LatentDiffusion reads it, and knows no network by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        control: whether the latent of an image may be concatenated to x, which then leads it (a ControlNet).
        sequence: whether x is (B,in_channels,image_size), tokens in their order, and no image.
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
    control: bool = False
    sequence: bool = False
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


def check_takes(takes: Takes, parts: Mapping[str, Sequence[int]], channels: int, learn_sigma: bool) -> None:
    """UserError if a network has no place for what a conditioner tells it, or waits for what it does not.

    parts: how conditions act (control: by an encoded image) -> the widths of those that do. channels: of the latent.
    learn_sigma: it has twice as many outputs.

    >>> check_takes(Takes(4, 4, 32, context_dim=512), {"crossattn": [256]}, channels=4, learn_sigma=False)
    Traceback (most recent call last):
    ldm.errors.UserError: the conditioner gives crossattn of dimension 256, the network takes 512; make them equal.
    """
    for name, dim, needed in (
        ("crossattn", takes.context_dim, takes.context_dim is not None),
        ("vector", takes.vector_dim, takes.needs_vector),
    ):
        if wrong := [width for width in parts.get(name, ()) if width != dim]:
            raise UserError(
                f"the conditioner gives {name} of dimension {wrong[0]}, the network takes {dim or 'none'}; make them "
                "equal."
            )
        if needed and name not in parts:
            raise UserError(
                f"the network takes {name} of dimension {dim}, but no conditioner acts by {name}; leave one of them "
                "out."
            )
    if ("label" in parts) != (takes.num_classes is not None):
        raise UserError("a conditioner that acts by label goes with a network with num_classes; give both or none.")
    if ("control" in parts) != takes.control:
        raise UserError(
            "an image that is encoded (ControlImage) goes with a network that has a ControlNet (ControlledDiT); give "
            "both or none."
        )
    extra = sum(parts.get("concat", ()))
    if takes.in_channels != channels + extra:
        raise UserError(
            f"the network's in_channels is {takes.in_channels}; the latent has {channels} channels and the conditioner "
            f"adds {extra}."
        )
    if takes.out_channels != channels * (1 + learn_sigma):
        raise UserError(
            f"the network's out_channels is {takes.out_channels}; the latent has {channels} channels"
            f"{', twice with learn_sigma' if learn_sigma else ''}."
        )
