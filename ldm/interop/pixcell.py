"""PixCell (arXiv:2506.05127): the folder of its diffusers pipeline, read without its code, and training checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.foreign.paths import only_within
from ldm.interop.checkpoint import state_dict_of
from ldm.interop.converted import Converted
from ldm.interop.diffusers_config import fixed_settings, schedule_params
from ldm.interop.diffusers_folder import first_stage_in, json_of, weights_in_folder
from ldm.interop.first_stages import first_stage_of
from ldm.interop.forms import weights_in
from ldm.interop.transformers import averaged_or_raw, complete, settings_of, transformer

CLASS = "PixCellTransformer2DModel"
MARKS = {"y_embedder.y_proj.fc1.weight", "t_block.1.weight", "x_embedder.proj.weight"}
UNI2 = 1536  # values of UNI2-h's features, which its published models are conditioned on
SCHEDULE = {"beta_schedule": "linear", "prediction_type": "epsilon"}  # IDDPM's, of its training
# settings of the transformer's config that change something: the values at which it is the network here
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",), "attention_bias": (True,), "attention_type": ("default",),
    "norm_elementwise_affine": (False,), "norm_type": ("ada_norm_single",), "use_additional_conditions": (False, None),
}  # fmt: skip
READ = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "sample_size",
    "patch_size", "interpolation_scale", "caption_channels", "caption_num_tokens",
)  # fmt: skip
SILENT = {"dropout", "norm_eps", "norm_num_groups", "num_embeds_ada_norm", "upcast_attention", "cross_attention_dim"}
# diffusers' name -> PixArt's; of a block, beneath transformer_blocks.N -> blocks.N
MODULES = {
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_projection.uncond_embedding": "y_embedder.y_embedding",
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "scale_shift_table": "final_layer.scale_shift_table",
    "y_pos_embed.y_pos_embed": "y_pos_embed",
}
BLOCK = {
    "attn1.to_out.0": "attn.proj", "attn2.to_q": "cross_attn.q_linear", "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2", "scale_shift_table": "scale_shift_table",
}  # fmt: skip
JOINED = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v")}


def is_pixcell(path: Path, content: Any) -> bool:
    """Whether a folder is PixCell's pipeline or its transformer, or a file one of its training's checkpoints.

    >>> is_pixcell(Path("epoch_1.pth"), {"state_dict": dict.fromkeys(MARKS)})
    True
    """
    if content is not None:
        return MARKS <= set(map(str, weights_in(content)))
    with only_within(path):
        config = _transformer_in(path) / "config.json"
        return config.is_file() and json_of(config).get("_class_name") == CLASS


def read_pixcell(
    path: Path,
    content: Any,
    *,
    base: str | Path | None = None,
    config: str | Path | None = None,
    raw_weights: bool = False,
) -> Converted:
    """A pipeline's folder (transformer/, scheduler/, vae/), its transformer's alone, or a checkpoint of the training.

    base: the autoencoder, where the folder has no vae/: a model folder, diffusers' folder or a file. config: YAML with
    num_heads, which a checkpoint does not tell. UserError: no autoencoder, a setting that has no counterpart here.

    >>> read_pixcell(Path("epoch_1.pth"), {"state_dict": {"x_embedder.proj.weight": torch.ones(4, 4, 2, 2)}})
    Traceback (most recent call last):
    ldm.errors.UserError: epoch_1.pth has no autoencoder; ...
    """
    found = Converted({}, {})
    if content is None:
        with only_within(path):
            params, weights, schedule, stage = _of_folder(path, config, raw_weights, found)
    else:
        stage = None
        params, weights = _of_checkpoint(path, content, base, config, raw_weights, found)
        schedule = schedule_params(SCHEDULE, str(path), found.notes)
    if base is not None:
        stage = first_stage_of(Path(base))
    if stage is None:
        raise _no_autoencoder(path)
    found.notes += stage.notes
    null = weights.pop("y_embedder.y_embedding", None)
    if null is None:
        raise UserError(f"{path} lacks the embedding of no condition (uncond_embedding); get it whole.")
    tokens, dim = null.shape
    if tokens > 1:
        params["context_tokens"] = tokens
    if params["out_channels"] not in (params["in_channels"], 2 * params["in_channels"]):
        raise UserError(f"{path}: it takes {params['in_channels']} channels and gives {params['out_channels']}.")
    learnt = {"learn_sigma": True} if params["out_channels"] != params["in_channels"] else {}
    node = {
        "target": "ldm.conditioners.raw.FeatureTokens",
        "params": {"embed_dim": dim, "grid": math.isqrt(tokens)},
    }
    if dim == UNI2:
        found.metadata["encoder"] = {"encoder": "uni2-h"}
        found.notes.append("features of 1536 values are taken to be UNI2-h's, as those of PixCell's published models")
    conditioner = (node, {"uncond_embedding": null})
    return complete(found, params, weights, schedule | learnt, (stage.node, stage.state, stage.metadata), conditioner)


def _no_autoencoder(path: Path) -> UserError:
    return UserError(
        f"{path} has no autoencoder; name the one that it was trained with by --base: the folder of Stable Diffusion "
        "3's vae, a file of it, or a model folder made of them."
    )


def _transformer_in(folder: Path) -> Path:
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def _of_folder(
    folder: Path, config: str | Path | None, raw_weights: bool, found: Converted
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], Converted | None]:
    if config is not None or raw_weights:
        raise UserError(f"{folder} says its settings and has one set of weights; leave --config and --raw-weights out.")
    params, weights = network_in(_transformer_in(folder), found.notes)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        about = json_of(scheduler)
        found.metadata["scheduler"] = {"class": about.get("_class_name", "")}
        found.metadata["scheduler"] |= {name: value for name, value in about.items() if name[0] != "_"}
    else:
        about = SCHEDULE
        found.notes.append(f"{folder} has no scheduler/: the noise is that of PixCell's training, linear betas")
    if (folder / "controlnet").is_dir():
        found.unused["controlnet/"] = "a ControlNet: convert it by itself, with this model's folder as --base"
    stage = first_stage_in(folder / "vae") if (folder / "vae" / "config.json").is_file() else None
    return params, weights, schedule_params(about, str(scheduler), found.notes), stage


def network_in(
    folder: Path, notes: list[str], depth: str = "num_layers", more: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Parameters and weights of the transformer in a folder, whose config and weights agree.

    depth: the setting that is its number of blocks. more: what it has besides, beginning of diffusers' name -> of ours.
    UserError: a setting that has no counterpart here, or that its weights contradict; a tensor that has no place.

    >>> network_in(Path("transformer"), [])
    Traceback (most recent call last):
    ldm.errors.UserError: transformer/config.json does not exist; copy the whole folder.
    """
    told = json_of(folder / "config.json")
    fixed_settings(told, FIXED, {*READ, *SILENT, depth}, str(folder / "config.json"), notes)
    if lost := [name for name in (*READ, depth) if name not in told]:
        raise UserError(f"{folder / 'config.json'} lacks {lost[0]}; copy the whole folder.")
    weights = to_pixart(weights_in_folder(folder, notes), str(folder), more)
    params = transformer(weights, {"num_heads": told["num_attention_heads"]}, Converted({}, {}), folder)
    size, scale = told["sample_size"], told["interpolation_scale"]
    params |= {"image_size": size}
    if (scale := scale or max(size // 64, 1)) != 1:
        params["position_scale"] = float(scale)
    wanted = {
        "hidden_size": told["num_attention_heads"] * told["attention_head_dim"],
        "depth": told[depth],
        "patch_size": told["patch_size"],
        "in_channels": told["in_channels"],
        "out_channels": told["out_channels"],
        "context_dim": told["caption_channels"],
    }
    for name, value in wanted.items():
        if params.get(name) != value:
            raise UserError(f"{folder}: its config says {name} {value}, its weights are of {params.get(name)}.")
    return params, weights


def _of_checkpoint(
    path: Path,
    content: Any,
    base: str | Path | None,
    config: str | Path | None,
    raw_weights: bool,
    found: Converted,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if base is None:
        raise _no_autoencoder(path)
    average = content.get("state_dict_ema") if isinstance(content, Mapping) else None
    raw = state_dict_of(content, path)
    weights = averaged_or_raw(average if isinstance(average, Mapping) else {}, raw, raw_weights, found)
    params = transformer(weights, settings_of(config), found, path)
    if "image_size" not in params:
        raise UserError(f"{path} lacks pos_embed, which tells the size of its images; give the published folder.")
    return params, weights


def to_pixart(
    state: Mapping[str, Tensor], source: str, more: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Tensors by diffusers' names under PixArt's, queries, keys and values joined. UserError: one has no place.

    more: further tensors, beginning of their name -> of ours.

    >>> parts = {f"transformer_blocks.0.attn1.to_{part}.bias": torch.ones(2) for part in "qkv"}
    >>> {name: tuple(value.shape) for name, value in to_pixart(parts, "transformer").items()}
    {'blocks.0.attn.qkv.bias': (6,)}
    """
    named: dict[str, Tensor] = {}
    joined: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        if other := next((theirs for theirs in more or {} if name.startswith(theirs)), None):
            named[more[other] + name.removeprefix(other)] = value
            continue
        block = re.match(r"transformer_blocks\.(\d+)\.(.+)", name)
        inner, table = (block[2], BLOCK) if block else (name, MODULES)
        module, _, kind = inner.rpartition(".")
        before = f"blocks.{block[1]}." if block else ""
        whole = next((ours for ours, parts in JOINED.items() if block and module in parts), None)
        if whole is not None:
            joined.setdefault(f"{before}{whole}.{kind}", {})[JOINED[whole].index(module)] = value
        elif inner in table:  # of tensors that are in no layer
            named[before + table[inner]] = value
        elif module in table:
            named[f"{before}{table[module]}.{kind}"] = value
        else:
            raise UserError(f"{source} holds {name}, which PixCell's transformer does not have; nothing was converted.")
    for name, parts in joined.items():
        count = len(JOINED[next(ours for ours in JOINED if f".{ours}." in name)])
        if len(parts) < count:
            raise UserError(f"{source} holds {len(parts)} of the {count} tensors that {name} is made of.")
        named[name] = torch.cat([parts[i] for i in range(count)])
    return named
