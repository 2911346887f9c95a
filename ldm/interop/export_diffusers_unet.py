"""UNets of model folders as diffusers' UNet2DConditionModel and UNet2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.interop.diffusers_names import inverse, renamed, unet_modules
from ldm.interop.export import UNET_DEFAULTS, lacks, unet_params


def unet(node: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of a UNet in diffusers. UserError: a setting that it does not have.

    >>> unet({"target": "ldm.networks.lmi.LMIUNet", "params": {}}, {}, "model")
    Traceback (most recent call last):
    ldm.errors.UserError: diffusers does not have the network LMIUNet; the model cannot be written in that form.
    """
    form = "diffusers"
    c = unet_params(node, form)
    for name in ("conv_resample", "num_classes", "resblock_updown"):
        if c[name] != UNET_DEFAULTS[name]:
            raise lacks(form, f"UNets with {name} {c[name]}")
    if c["channel_mult"][0] != 1:
        raise lacks(form, f"UNets whose first level is not of model_channels (channel_mult {c['channel_mult']})")
    if not c["use_spatial_transformer"]:
        return pixel_unet(c, state, source)
    config, names = _attending(c)
    return config, renamed(state, names, source)


def _attending(c: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The config of a UNet2DConditionModel, and our name -> diffusers' of its modules."""
    widths = [mult * c["model_channels"] for mult in c["channel_mult"]]
    attention = [2**level in c["attention_resolutions"] for level in range(len(widths))]
    fixed = c["num_head_channels"]
    config = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": c["num_heads"] if fixed == -1 else [width // fixed for width in widths],
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": c["context_dim"],
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        "downsample_padding": 1,
        "dropout": c["dropout"],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": c["in_channels"],
        "layers_per_block": c["num_res_blocks"],
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": c["norm_groups"],
        "out_channels": c["out_channels"],
        "resnet_time_scale_shift": "scale_shift" if c["use_scale_shift_norm"] else "default",
        "sample_size": c["image_size"],
        "transformer_layers_per_block": c["transformer_depth"],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in attention[::-1]],
        "use_linear_projection": False,
    }
    return config, inverse(unet_modules(attention, c["num_res_blocks"]))


def pixel_unet(c: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of the UNet2DModel that a UNet without cross-attention is.

    c: all its parameters, of `export.unet_params`. UserError: heads of another width in each level, which it lacks.

    >>> pixel_unet({"channel_mult": [1, 2], "model_channels": 32, "num_heads": 4, "num_head_channels": -1,
    ...     "attention_resolutions": [1, 2]}, {}, "model")
    Traceback (most recent call last):
    ldm.errors.UserError: diffusers' UNet2DModel has heads of one width; the model's have 8, 16.
    """
    widths = [mult * c["model_channels"] for mult in c["channel_mult"]]
    attention = [2**level in c["attention_resolutions"] for level in range(len(widths))]
    used = {wide for wide, attends in zip(widths, [*attention[:-1], True]) if attends}
    head = {c["num_head_channels"] if c["num_head_channels"] != -1 else wide // c["num_heads"] for wide in used}
    if len(head) > 1:
        told = ", ".join(map(str, sorted(head)))
        raise UserError(f"diffusers' UNet2DModel has heads of one width; the model's have {told}.")
    config = {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "add_attention": True,
        "attention_head_dim": head.pop(),
        "attn_norm_num_groups": c["norm_groups"],
        "block_out_channels": widths,
        "class_embed_type": None,
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        "downsample_padding": 1,
        "dropout": c["dropout"],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": c["in_channels"],
        "layers_per_block": c["num_res_blocks"],
        "norm_eps": 1e-5,
        "norm_num_groups": c["norm_groups"],
        "out_channels": c["out_channels"],
        "resnet_time_scale_shift": "scale_shift" if c["use_scale_shift_norm"] else "default",
        "sample_size": c["image_size"],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in attention[::-1]],
    }
    modules = unet_modules(attention, c["num_res_blocks"])
    places = {ours[:-5]: theirs[:-5] for theirs, ours in modules.items() if theirs.endswith(".norm")}
    heads = {wide: wide // config["attention_head_dim"] for wide in widths}
    found = {name: value for name, value in state.items() if not name.startswith(tuple(f"{p}." for p in places))}
    found = renamed(found, {ours: theirs for theirs, ours in modules.items() if ".attentions." not in theirs}, source)
    for ours, theirs in places.items():
        for kind in ("weight", "bias"):
            found[f"{theirs}.group_norm.{kind}"] = state[f"{ours}.norm.{kind}"]
            found[f"{theirs}.to_out.0.{kind}"] = _flat(state[f"{ours}.proj_out.{kind}"])
            parts = _flat(state[f"{ours}.qkv.{kind}"])
            count = heads[len(parts) // 3]
            order = (3, count, -1) if c["use_new_attention_order"] else (count, 3, -1)
            parts = parts.unflatten(0, order)
            parts = parts if c["use_new_attention_order"] else parts.transpose(0, 1)
            for letter, part in zip("qkv", parts):
                found[f"{theirs}.to_{letter}.{kind}"] = part.flatten(0, 1)
    return config, found


def _flat(value: Tensor) -> Tensor:
    """A 1x1 convolution's tensor as that of a linear layer."""
    return value[:, :, 0] if value.ndim == 3 else value
