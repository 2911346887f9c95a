"""Networks of this toolkit, each beside another library's of the same size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from speed import filled, size_in_millions
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.dit import DiT
from ldm.networks.lucidrains import LucidrainsUNet
from ldm.networks.unet import UNetModel

ROOT = Path(__file__).resolve().parent.parent
UNETS = {"small": "demo/ssl.yaml", "crc": "latent-diffusion/crc_20x.yaml"}  # configs
TRANSFORMERS = {  # side of the latent, width, depth, heads
    "dit-small": (16, 192, 6, 3), "dit": (32, 384, 12, 6),
    "pixart-small": (16, 192, 6, 3), "pixart": (32, 384, 12, 6),
}  # fmt: skip
TOKENS = {"small": 4, "crc": 1, "pixart-small": 16, "pixart": 16}  # of the context
BATCHES = {
    "cpu": {"small": 4, "crc": 1, "dit-small": 8, "dit": 2, "pixart-small": 8, "pixart": 2, "lucidrains": 1},
    "cuda": {"small": 64, "crc": 16, "dit-small": 256, "dit": 64, "pixart-small": 256, "pixart": 64, "lucidrains": 32},
}
SIZES = list(BATCHES["cpu"])
CLASSES = 10
Call = Callable[[Callable[..., Any], Tensor, Tensor, Tensor], Tensor]  # of a network with x, timesteps, condition


@dataclass(frozen=True)
class Pair:
    """Two networks of one size.

    library: whose `theirs` is. shape: of x, without the batch. condition: of a batch of so many, on the CPU.
    call_ours, call_theirs: how they are called. repeated: parameters of theirs (in millions) that are copies.
    casts: theirs runs with all of its weights in bf16; else under autocast alone.
    """

    library: str
    ours: nn.Module
    theirs: nn.Module
    shape: tuple[int, int, int]
    condition: Callable[[int], Tensor]
    call_ours: Call
    call_theirs: Call
    repeated: float = 0.0
    casts: bool = True


def pair_of(size: str, side: int | None = None, tokens: int | None = None) -> Pair:
    """The pair of one of SIZES, by default with its side of x and its tokens of context."""
    if size in UNETS:
        return unets(unet_params(size), side, tokens or TOKENS[size])
    if size == "lucidrains":
        return class_unets(side or 64)
    return transformers(TRANSFORMERS[size], side, tokens or TOKENS.get(size))


def unet_params(size: str) -> dict[str, Any]:
    """Parameters of the UNet of a size's config."""
    params = OmegaConf.load(ROOT / "configs" / UNETS[size]).model.params.unet_config.params
    return {**OmegaConf.to_container(params), "use_checkpoint": False}


def of_diffusers(name: str) -> type[nn.Module]:
    try:
        import diffusers
    except ImportError as error:
        raise UserError("this benchmark compares with diffusers; install it: pip install -e .[bench]") from error
    return getattr(diffusers, name)


def diffusers_unet(params: Mapping[str, Any]) -> nn.Module:
    """diffusers' UNet of the same size."""
    widths = [params["model_channels"] * mult for mult in params["channel_mult"]]
    attends = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    heads = [params.get("num_heads") or width // params["num_head_channels"] for width in widths]
    return of_diffusers("UNet2DConditionModel")(
        sample_size=params["image_size"],
        in_channels=params["in_channels"],
        out_channels=params["out_channels"],
        block_out_channels=widths,
        layers_per_block=params["num_res_blocks"],
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in attends[::-1]],
        cross_attention_dim=params["context_dim"],
        attention_head_dim=heads,  # diffusers' name for their number
    )


def unets(params: Mapping[str, Any], side: int | None, tokens: int) -> Pair:
    """UNets under a context."""
    side = side or params["image_size"]
    return Pair(
        "diffusers",
        filled(UNetModel(**params)),
        diffusers_unet(params),
        (params["in_channels"], side, side),
        lambda batch: torch.randn(batch, tokens, params["context_dim"]),
        lambda net, x, t, context: net(x, t, context=context),
        lambda net, x, t, context: net(x, t, context, return_dict=False)[0],
    )


def transformers(size: tuple[int, int, int, int], side: int | None, tokens: int | None) -> Pair:
    """Transformers over patches of 2 x 2: PixArt's with so many tokens of context, or DiT's with classes."""
    own_side, width, depth, heads = size
    side = side or own_side
    own = partial(DiT, 4, 8, side, 2, width, depth, heads)
    sizes = {
        "num_attention_heads": heads, "attention_head_dim": width // heads, "num_layers": depth,
        "in_channels": 4, "out_channels": 8, "sample_size": side,
    }  # fmt: skip
    if tokens is None:
        theirs = of_diffusers("DiTTransformer2DModel")(**sizes, num_embeds_ada_norm=CLASSES)
        embedders = [block.norm1.emb for block in theirs.transformer_blocks]  # of time and class, one in each block
        return Pair(
            "diffusers",
            filled(own(num_classes=CLASSES + 1)),
            filled(theirs),
            (4, side, side),
            lambda batch: torch.arange(batch) % CLASSES,
            lambda net, x, t, y: net(x, t, y=y),
            lambda net, x, t, y: net(x, t, y, return_dict=False)[0],
            sum(map(size_in_millions, embedders[1:])),
        )
    theirs = of_diffusers("PixArtTransformer2DModel")(
        **sizes, cross_attention_dim=width, caption_channels=width, use_additional_conditions=False
    )
    return Pair(
        "diffusers",
        filled(own(modulation="shared", context_dim=width)),
        filled(theirs),
        (4, side, side),
        lambda batch: torch.randn(batch, tokens, width),
        lambda net, x, t, context: net(x, t, context=context),
        lambda net, x, t, context: net(x, context, t, return_dict=False)[0],
    )


class OfClass(nn.Module):
    """LucidrainsUNet under a class, as denoising-diffusion-pytorch embeds it."""

    def __init__(self, dim: int):
        super().__init__()
        self.network = LucidrainsUNet(dim)
        self.classes_emb, self.null_classes_emb = nn.Embedding(CLASSES, dim), nn.Parameter(torch.randn(dim))
        self.classes_mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))

    def forward(self, x: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        return self.network(x, timesteps, vector=self.classes_mlp(self.classes_emb(classes)))


def class_unets(side: int, dim: int = 64) -> Pair:
    """The UNets of denoising-diffusion-pytorch 1.5, in the size of the mitotic-figure DPM."""
    try:
        from denoising_diffusion_pytorch.classifier_free_guidance import Unet

        theirs = Unet(dim, CLASSES, cond_drop_prob=0.0, resnet_block_groups=8)
    except (ImportError, TypeError) as error:  # later ones are another network
        raise UserError(
            "this row compares with denoising-diffusion-pytorch 1.5, which is not here; install it: "
            "pip install -e .[bench]"
        ) from error
    return Pair(
        "lucidrains",
        OfClass(dim),
        theirs,
        (3, side, side),
        lambda batch: torch.arange(batch) % CLASSES,
        lambda net, x, t, classes: net(x, t, classes),
        lambda net, x, t, classes: net(x, t, classes),
        casts=False,
    )
