"""Module names of diffusers' UNet2DConditionModel and AutoencoderKL, and those of this toolkit (CompVis')."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ldm.errors import UserError

UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ATTENTION = {name: name for name in ("norm", "proj_in", "transformer_blocks", "proj_out")}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# of the autoencoder's attention in folders written before 2023
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# 1x1 convolutions here, linear layers in diffusers (of the UNet with use_linear_projection)
POINTWISE = ("proj_in.weight", "proj_out.weight", ".q.weight", ".k.weight", ".v.weight")


def unet_modules(attention: Sequence[bool], blocks: int) -> dict[str, str]:
    """diffusers' name -> ours of a UNet's modules; attention: which levels have it, first the widest maps' one.

    >>> unet_modules([True, False], blocks=1)["down_blocks.0.attentions.0.proj_in"]
    'input_blocks.1.1.proj_in'
    """
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    _add(names, "mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    _add(names, "mid_block.attentions.0", "middle_block.1", UNET_ATTENTION)
    _add(names, "mid_block.resnets.1", "middle_block.2", UNET_RESNET)
    levels = len(attention)
    for level, attends in enumerate(attention):
        down = f"down_blocks.{level}"
        first = 1 + level * (blocks + 1)
        for j in range(blocks):
            _add(names, f"{down}.resnets.{j}", f"input_blocks.{first + j}.0", UNET_RESNET)
            if attends:
                _add(names, f"{down}.attentions.{j}", f"input_blocks.{first + j}.1", UNET_ATTENTION)
        if level < levels - 1:
            names[f"{down}.downsamplers.0.conv"] = f"input_blocks.{first + blocks}.0.op"
        up = f"up_blocks.{levels - 1 - level}"
        first = (levels - 1 - level) * (blocks + 1)
        for j in range(blocks + 1):
            _add(names, f"{up}.resnets.{j}", f"output_blocks.{first + j}.0", UNET_RESNET)
            if attends:
                _add(names, f"{up}.attentions.{j}", f"output_blocks.{first + j}.1", UNET_ATTENTION)
        if level:
            names[f"{up}.upsamplers.0.conv"] = f"output_blocks.{first + blocks}.{1 + attends}.conv"
    return names


def vae_modules(attention: Sequence[bool], blocks: int, mid_attention: bool = True) -> dict[str, str]:
    """diffusers' name -> ours of a KL autoencoder's modules; attention as in `unet_modules`.

    >>> vae_modules([False, False], blocks=1)["encoder.mid_block.attentions.0.to_q"]
    'encoder.mid.attn_1.q'
    """
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len(attention)
    for side in ("encoder", "decoder"):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for j in (0, 1):
            _add(names, f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", VAE_RESNET)
        if mid_attention:
            _add(names, f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", VAE_ATTENTION)
        for level, attends in enumerate(attention):
            down = side == "encoder"
            theirs = f"encoder.down_blocks.{level}" if down else f"decoder.up_blocks.{levels - 1 - level}"
            ours = f"encoder.down.{level}" if down else f"decoder.up.{level}"
            for j in range(blocks if down else blocks + 1):
                _add(names, f"{theirs}.resnets.{j}", f"{ours}.block.{j}", VAE_RESNET)
                if attends:
                    _add(names, f"{theirs}.attentions.{j}", f"{ours}.attn.{j}", VAE_ATTENTION)
            if down and level < levels - 1:
                names[f"{theirs}.downsamplers.0.conv"] = f"{ours}.downsample.conv"
            elif not down and level:
                names[f"{theirs}.upsamplers.0.conv"] = f"{ours}.upsample.conv"
    return names


def renamed(state: Mapping[str, Tensor], modules: Mapping[str, str], source: str) -> dict[str, Tensor]:
    """The tensors under the names that `modules` gives to the modules they are in. UserError: one is in none.

    >>> list(renamed({"conv_in.weight": torch.ones(1)}, unet_modules([True], 1), "unet"))
    ['input_blocks.0.0.weight']
    """
    named = {}
    for name, value in state.items():
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if module := modules.get(".".join(parts[:end])):
                named[".".join((module, *parts[end:]))] = value
                break
        else:
            raise UserError(f"{source} holds {name}, which a model of its config does not have; nothing was converted.")
    return named


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """Our name -> diffusers', of names the other way round.

    >>> inverse({"conv_in": "input_blocks.0.0"})
    {'input_blocks.0.0': 'conv_in'}
    """
    return {ours: theirs for theirs, ours in names.items()}


def to_convolutions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state, in our names, with linear layers that are 1x1 convolutions here in that shape.

    >>> to_convolutions({"encoder.mid.attn_1.q.weight": torch.ones(4, 4)})["encoder.mid.attn_1.q.weight"].shape
    torch.Size([4, 4, 1, 1])
    """
    return {
        name: value[:, :, None, None] if _pointwise(name) and value.ndim == 2 else value
        for name, value in state.items()
    }


def to_linear(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_convolutions`.

    >>> to_linear({"encoder.mid.attn_1.q.weight": torch.ones(4, 4, 1, 1)})["encoder.mid.attn_1.q.weight"].shape
    torch.Size([4, 4])
    """
    return {name: value.flatten(1) if _pointwise(name) else value for name, value in state.items()}


def modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors with the present names of its attention.

    >>> list(modern({"decoder.mid_block.attentions.0.query.weight": torch.ones(1)}))
    ['decoder.mid_block.attentions.0.to_q.weight']
    """
    named = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        named[f"{parent}.{OLD_NAMES[last]}.{kind}" if last in OLD_NAMES else name] = value
    return named


def _pointwise(name: str) -> bool:
    return name.endswith(POINTWISE)


def _add(names: dict[str, str], theirs: str, ours: str, parts: Mapping[str, str]) -> None:
    names.update({f"{theirs}.{part}": f"{ours}.{own}" for part, own in parts.items()})
