"""Stable Diffusion in one file: 1.x without a config, as sizes are read off the tensors; 2.x with its YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.interop import targets
from ldm.interop.checkpoint import state_dict_of
from ldm.interop.compvis import FIRST_STAGE, NETWORK, read_by, read_compvis
from ldm.interop.compvis_conditions import CONDITIONER
from ldm.interop.converted import Converted
from ldm.interop.first_stages import first_stage_params
from ldm.interop.forms import weights_in
from ldm.interop.text_names import is_transformers, left_out

HEADS = 8  # of every attention of the 1.x networks; no tensor tells
LATENT_SIDE = 64  # of the 512 px that it was trained on
BETAS = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
SCALE_FACTOR = 0.18215
CLIP_L = "openai/clip-vit-large-patch14"
OPEN_CLIP = f"{CONDITIONER}model.transformer.resblocks."  # begins the names of Stable Diffusion 2's text tower
XL = "conditioner.embedders."


def is_stable_diffusion(path: Path, content: Any) -> bool:
    """Whether a file holds a UNet, a KL autoencoder and a CLIP text tower by CompVis' names, or is a later one.

    >>> state = {"model.diffusion_model.input_blocks.0.0.weight": None, "conditioner.embedders.0.weight": None}
    >>> is_stable_diffusion(Path("sdxl.safetensors"), state)
    True
    """
    state = weights_in(content)
    if f"{NETWORK}input_blocks.0.0.weight" not in state:
        return False
    if any(str(name).startswith((OPEN_CLIP, XL)) for name in state):
        return True
    kl = f"{FIRST_STAGE}quant_conv.weight" in state and f"{FIRST_STAGE}quantize.embedding.weight" not in state
    return kl and is_transformers({name: None for name in state if str(name).startswith(CONDITIONER)})


def read_stable_diffusion(
    path: Path, content: Any, *, config: str | Path | None = None, raw_weights: bool = False
) -> Converted:
    """A Stable Diffusion checkpoint (.ckpt, .safetensors), by a project YAML if one is given or lies beside it.

    UserError: Stable Diffusion XL, 2.x without a YAML, tensors that are missing or have no place.

    >>> read_stable_diffusion(Path("sdxl.safetensors"), {"conditioner.embedders.0.weight": torch.ones(1)})
    Traceback (most recent call last):
    ldm.errors.UserError: sdxl.safetensors is Stable Diffusion XL, which has two text towers: 1.x and 2.x are supported.
    """
    state = state_dict_of(content, path)
    if any(name.startswith(XL) for name in state):
        raise UserError(f"{path} is Stable Diffusion XL, which has two text towers: 1.x and 2.x are supported.")
    if config is not None or _has_project(path):
        return read_compvis(path, content, config=config, raw_weights=raw_weights)
    if any(name.startswith(OPEN_CLIP) for name in state):
        raise UserError(
            f"{path} is Stable Diffusion 2, and does not say whether it predicts noise or velocity: give the project "
            "YAML that it came with (v2-inference.yaml, v2-inference-v.yaml), --config."
        )
    found = Converted({}, {})
    tower = {name: value for name, value in state.items() if name.startswith(CONDITIONER)}
    found.unused |= left_out(tower)
    state = {name: value for name, value in state.items() if name not in found.unused}
    try:
        project = _project_of(state, found.notes)
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0]}, which Stable Diffusion 1.x has; is it whole?") from None
    read_by(project, "Stable Diffusion 1.x", path, state, found, raw_weights)
    return found


def _has_project(path: Path) -> bool:
    """Whether the project YAML of a diffusion model lies beside a checkpoint."""
    project = targets.find_project(path)
    try:
        return project is not None and targets.read_project(project)[0]["target"] in targets.DIFFUSION_TARGETS
    except UserError:  # a YAML of something else
        return False


def _project_of(state: Mapping[str, Tensor], notes: list[str]) -> dict[str, Any]:
    """The model node of the project YAML of a checkpoint, from the shapes of its tensors and its betas.

    What tensors do not tell is that of Stable Diffusion 1.x, and noted.
    """
    network = _within(state, NETWORK)
    notes.append(
        f"what the file does not say is that of Stable Diffusion 1.x: {HEADS} attention heads, eps, "
        f"{8 * LATENT_SIDE} px, scale_factor {SCALE_FACTOR} and betas where it holds none"
    )
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    words = shapes[next(name for name in shapes if name.endswith("embeddings.token_embedding.weight"))]
    version = CLIP_L if words == (49408, 768) else "CLIP text tower"
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            **_betas(state.get("betas")),
            "scale_factor": SCALE_FACTOR,
            "conditioning_key": "crossattn",
            "cond_stage_key": "txt",
            "unet_config": {"target": targets.UNETS[0], "params": _unet_params(network)},
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": first_stage_params(_within(state, FIRST_STAGE)),
            },
            "cond_stage_config": {
                "target": f"{targets.ENCODERS}FrozenCLIPEmbedder",
                "params": {"version": version},
            },
        },
    }


def _unet_params(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Parameters of the UNet with tensors of these shapes, by their names within it."""
    width = shapes["time_embed.0.weight"][1]
    levels: list[list[tuple[int, bool]]] = [[]]  # (channels, attention) of the blocks of each level
    for index in range(1, 1 + _count(shapes, r"input_blocks\.(\d+)\.0\.")):
        block = f"input_blocks.{index}."
        if f"{block}0.op.weight" in shapes:
            levels.append([])
        elif f"{block}0.out_layers.3.weight" in shapes:
            attends = f"{block}1.transformer_blocks.0.attn2.to_k.weight" in shapes
            levels[-1].append((shapes[f"{block}0.out_layers.3.weight"][0], attends))
    blocks = {len(level) for level in levels}
    if len(blocks) != 1 or any(len(set(level)) != 1 for level in levels) or 0 in blocks:
        raise UserError("the network's levels are not alike in their blocks: it is no UNet of Stable Diffusion 1.x.")
    middle = "middle_block.1.transformer_blocks."
    if f"{middle}0.attn2.to_k.weight" not in shapes:
        raise UserError("the network has no cross-attention in its middle: it is no UNet of Stable Diffusion 1.x.")
    first = "input_blocks.1.0."
    return {
        "image_size": LATENT_SIDE,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": width,
        "num_res_blocks": blocks.pop(),
        "attention_resolutions": [2**i for i, level in enumerate(levels) if level[0][1]],
        "channel_mult": [level[0][0] // width for level in levels],
        "num_heads": HEADS,
        "use_spatial_transformer": True,
        "transformer_depth": _count(shapes, re.escape(middle) + r"(\d+)\.") + 1,
        "context_dim": shapes[f"{middle}0.attn2.to_k.weight"][1],
        "use_scale_shift_norm": shapes[f"{first}emb_layers.1.weight"][0] > shapes[f"{first}in_layers.2.weight"][0],
    }


def _betas(betas: Tensor | None) -> dict[str, Any]:
    """The noise table of a file's betas (T,), whose ends and length tell it; of Stable Diffusion where it has none."""
    if betas is None:
        return BETAS
    start, end = (float(f"{float(betas[at]):.6g}") for at in (0, -1))
    return {"linear_start": start, "linear_end": end, "timesteps": len(betas)}


def _within(state: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): tuple(v.shape) for name, v in state.items() if name.startswith(prefix)}


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    """The largest number in the place of a group in the names; UserError if there is none."""
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    if not found:
        raise UserError(f"the file has no tensors by the names of Stable Diffusion 1.x ({pattern}).")
    return max(found)
