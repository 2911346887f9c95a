"""Parts of model folders that diffusers' pipelines for text lack: UNets without cross-attention, and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.interop import diffusers_conditioning, targets
from ldm.interop.converted import Converted
from ldm.interop.diffusers_folder import TEXT
from ldm.interop.diffusers_names import renamed, unet_modules

CLASS, SCORE = targets.CLASS_EMBEDDER, "ldm.conditioners.score.ScoreEmbedder"
FEATURES = ("ldm.conditioners.ssl.PatchEmbedder", "ldm.conditioners.ssl.GridPatchEmbedder")
MODULE = "conditioning.py"


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


def conditioning(node: Mapping[str, Any], model: Converted) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `diffusers_conditioning` reads of a model's conditions: conditioning.json and its tensors.

    UserError: a condition that it does not have.

    >>> conditioning({"target": "ldm.conditioners.omics.OmicsEmbedder"}, Converted({}, {}))
    Traceback (most recent call last):
    ldm.errors.UserError: diffusers does not have the condition OmicsEmbedder; the model cannot be written in that form.
    """
    if node["target"] == targets.CONDITIONER_SET:
        nodes = {f"members.{name}.": member for name, member in node["params"]["conditioners"].items()}
    else:
        nodes = {"": node}
    members, tensors = [], {}
    for prefix, member in nodes.items():
        members.append({"prefix": prefix, **_member(member)})
        start = TEXT + prefix
        own = {prefix + n.removeprefix(start): value for n, value in model.state.items() if n.startswith(start)}
        tensors |= {name: value.float() for name, value in own.items()}
    return {"members": members}, tensors


def _member(node: Mapping[str, Any]) -> dict[str, Any]:
    target, params = node["target"], node.get("params") or {}
    if target == CLASS:
        told = {"kind": "class", "key": params.get("key", "class"), "acts": params.get("acts", "crossattn")}
        return told | {"classes": [str(name) for name in params["classes"]]}
    if target == SCORE:
        return {"kind": "score", "key": params.get("key", "score"), "acts": params.get("acts", "vector")}
    if target in FEATURES:
        grid = target == FEATURES[1]
        told = {"kind": "features", "key": params.get("key", "ssl"), "embed_dim": params["embed_dim"]}
        told |= {"normalize": params.get("normalize", not grid), "acts": "crossattn"}
        return told | ({"grid": params.get("grid", 2)} if grid else {})
    kind = str(target).rpartition(".")[2]
    raise UserError(f"diffusers does not have the condition {kind}; the model cannot be written in that form.")


def module_text() -> str:
    """The text of the module that lies beside the tensors of conditions.

    >>> "class Conditioning" in module_text()
    True
    """
    return Path(diffusers_conditioning.__file__).read_text(encoding="utf-8")
