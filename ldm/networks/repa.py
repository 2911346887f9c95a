"""Representation alignment: a block of the denoiser is trained to know what an encoder knows of the clean image.

REPA (arXiv:2410.06940, eq. 8). What the block gives of the noisy image is projected, and compared with features or
tokens of the clean one, which the store already holds. Sampling never sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import check_params
from ldm.errors import UserError
from ldm.networks.takes import declared


@dataclass(frozen=True)
class Alignment:
    """What a config says of the alignment, `repa: {feature: uni2-h, weight: 0.5, block: 8}`.

    feature: name of the store's features; those of `data_prep.extract_features --tokens 4` are compared place by place.
    block: whose output is aligned, counted from 1: of a transformer's blocks, or of a UNet's on the way down, its
        middle one and those on the way up. weight: of this loss beside the denoising loss. hidden: width of the
        projection.

    >>> Alignment("uni2-h", block=8).weight
    0.5
    """

    feature: str
    block: int
    weight: float = 0.5
    hidden: int = 2048

    def __post_init__(self):
        if not (isinstance(self.block, int) and self.block >= 1):
            raise UserError(f"repa.block counts from 1; got {self.block!r}.")
        if not (isinstance(self.weight, int | float) and self.weight > 0):
            raise UserError(f"repa.weight is above 0; got {self.weight!r}; leave repa out to train without it.")
        if not (isinstance(self.hidden, int) and self.hidden >= 1):
            raise UserError(f"repa.hidden is a width of at least 1; got {self.hidden!r}.")


def alignment_of(node: Mapping[str, Any], network: nn.Module) -> Alignment:
    """What a config says, checked against the network. UserError: unknown keys, a block that it does not have.

    >>> alignment_of({"feature": "uni2-h", "blok": 3}, model.model.diffusion_model)
    Traceback (most recent call last):
    ldm.errors.UserError: unknown key 'repa.blok' of Alignment; did you mean 'block'? ...
    """
    check_params(Alignment, node, "repa")
    alignment = Alignment(**node)
    block_of(network, alignment.block)
    return alignment


def block_of(network: nn.Module, number: int) -> nn.Module:
    """The number-th block of a network, counted from 1. UserError: it has no blocks to align, or fewer.

    >>> type(block_of(model.model.diffusion_model, 1)).__name__
    'TimestepEmbedSequential'
    """
    blocks: Sequence[nn.Module] | None = getattr(network, "stages", None)
    if blocks is None:
        raise UserError(
            f"repa aligns a block of a UNetModel or a DiT; a {type(network).__name__} does not say which blocks it has."
        )
    if number > len(blocks):
        raise UserError(f"repa.block is {number}; the network has {len(blocks)} blocks.")
    return blocks[number - 1]


class Projection(nn.Module):
    """Three layers from a block's width to the features', applied to every place of its map (section 3.1)."""

    def __init__(self, width: int, dim: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )

    def forward(self, maps: Tensor, target: Tensor) -> Tensor:
        """1 - cosine of the angle between projection and target, (B,).

        maps: (B,C,h,w) of the block. target: (B,D) of the whole image, with which the mean over all places is compared;
        or (B,D,k,l), place by place, at the coarser of the two resolutions.
        """
        made = self.layers(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)            # (B,D,h,w)
        target = target.to(made)
        if target.ndim == 2:
            return 1 - F.cosine_similarity(made.mean((2, 3)), target)
        side = [min(pair) for pair in zip(made.shape[2:], target.shape[2:])]
        made, target = F.adaptive_avg_pool2d(made, side), F.adaptive_avg_pool2d(target, side)
        return 1 - F.cosine_similarity(made, target).mean((1, 2))


@contextmanager
def watched(network: nn.Module, alignment: Alignment | None) -> Iterator[list[Tensor]]:
    """A context that gathers what the aligned block of a network gives, as maps (B,C,h,w); None: nothing.

    >>> network = model.model.diffusion_model
    >>> with watched(network, Alignment("uni2-h", block=1)) as maps, torch.no_grad():
    ...     _ = network(torch.zeros(1, 4, 8, 8), torch.ones(1), context=torch.zeros(1, 1, 8))
    >>> maps[0].shape
    torch.Size([1, 8, 8, 8])
    """
    maps: list[Tensor] = []
    if alignment is None:
        yield maps
        return
    inputs: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    def gather(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if out.ndim == 3:  # tokens (B,N,D), row by row; those of a context come after them
            grid = [side // network.patch_size for side in inputs[-1].shape[-2:]]
            out = out[:, : grid[0] * grid[1]].unflatten(1, grid).permute(0, 3, 1, 2)
        maps.append(out)

    block = block_of(network, alignment.block)
    handles = network.register_forward_pre_hook(keep_input), block.register_forward_hook(gather)
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def projection(alignment: Alignment, network: nn.Module, feature: Tensor | None, seed: int) -> Projection:
    """An untrained projection from the aligned block of a network to features like `feature`, (D,) or (D,k,l).

    UserError: there is no such feature.

    >>> network = model.model.diffusion_model
    >>> made = projection(Alignment("uni2-h", block=1, hidden=8), network, torch.zeros(1536), seed=0)
    >>> made.layers[0].in_features, made.layers[-1].out_features
    (8, 1536)
    """
    if not isinstance(feature, Tensor) or feature.ndim not in (1, 3):
        raise UserError(
            f"repa.feature: training tiles have no feature '{alignment.feature}' under the key 'repa'; give the data "
            f"targets={{'repa': 'features/{alignment.feature}'}}."
        )
    takes, like = declared(network), next(network.parameters())
    given = {}
    if takes.context_dim is not None:
        given["context"] = like.new_zeros(1, 1, takes.context_dim)
    if takes.needs_vector:
        given["vector"] = like.new_zeros(1, takes.vector_dim)
    if takes.num_classes is not None:
        given["y"] = torch.zeros(1, dtype=torch.long, device=like.device)
    x = like.new_zeros(1, takes.in_channels, takes.image_size, takes.image_size)
    with torch.no_grad(), watched(network, alignment) as maps:
        network(x, like.new_zeros(1), **given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Projection(maps[0].shape[1], feature.shape[0], alignment.hidden)
