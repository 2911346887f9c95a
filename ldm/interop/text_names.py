"""Names and settings of transformers' CLIP text tower (CLIPTextModel, CLIPModel) as those of open_clip's, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.foreign.shape import ABOVE_0, MAPPING, TEXT, Is, check_shape, maybe

MARK = "text_model."  # stands before the names of the text tower, under whatever prefix, but in transformers 5
NORM, TOKENS = "final_layer_norm.weight", "embeddings.token_embedding.weight"  # a tower has both
WHOLE = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# transformers' defaults, which its newer config files leave out
DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint holds a CLIP text tower under transformers' names.

    >>> tower = {"text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"}
    >>> is_transformers(dict.fromkeys(tower))
    True
    """
    return bool(_prefixes(state))


def _prefixes(state: Mapping[str, Tensor]) -> set[str]:
    """What stands before the names of each text tower in a checkpoint."""
    ends = {name.removesuffix(NORM) for name in state if name.endswith(NORM)}
    return {prefix for prefix in ends if prefix + TOKENS in state and (not prefix or prefix.endswith("."))}


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower in a checkpoint of transformers' names, under the names of open_clip's.

    Query, key and value of a layer become one matrix; position_ids, the image tower and the projection are left out.
    UserError: the checkpoint holds no such tower, or more than one.

    >>> list(to_open_clip({TOKENS: torch.ones(9, 8), NORM: torch.ones(8)}))
    ['token_embedding.weight', 'ln_final.weight']
    """
    prefixes = _prefixes(state)
    if len(prefixes) != 1:
        raise UserError(
            f"the checkpoint holds {len(prefixes) or 'no'} CLIP text towers; expected names as "
            f"{MARK}encoder.layers.0.self_attn.q_proj.weight under one prefix."
        )
    prefix = prefixes.pop()
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    named = {}
    for name, value in own.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in WHOLE:
            named[WHOLE[name]] = value
        elif layer and layer[2] in BLOCK:
            named[f"transformer.resblocks.{layer[1]}.{BLOCK[layer[2]]}.{layer[3]}"] = value
        elif layer and layer[2] == "self_attn.q_proj":
            parts = [f"encoder.layers.{layer[1]}.self_attn.{part}_proj.{layer[3]}" for part in "qkv"]
            if lacking := [part for part in parts if part not in own]:
                raise UserError(f"the checkpoint's text tower lacks {lacking[0]}.")
            named[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat([own[p] for p in parts])
    return named


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_open_clip`: the tower's tensors under transformers' names, after MARK.

    >>> list(from_open_clip({"ln_final.weight": torch.ones(8)}))
    ['text_model.final_layer_norm.weight']
    """
    whole = {ours: name for name, ours in WHOLE.items()}
    block = {ours: name for name, ours in BLOCK.items()}
    named = {}
    for name, value in state.items():
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
        if name in whole:
            named[MARK + whole[name]] = value
        elif layer and layer[2] == "attn.in_proj":
            for part, third in zip("qkv", value.chunk(3)):
                named[f"{MARK}encoder.layers.{layer[1]}.self_attn.{part}_proj.{layer[3]}"] = third
        else:
            assert layer, f"a CLIP text tower has no {name}"
            named[f"{MARK}encoder.layers.{layer[1]}.{block[layer[2]]}.{layer[3]}"] = value
    return named


def left_out(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The tensors of a checkpoint that `to_open_clip` does not use, and why.

    UserError: one that a text tower does not have.

    >>> tower = {TOKENS: torch.ones(9, 8), NORM: torch.ones(8), "embeddings.position_ids": torch.arange(9)}
    >>> left_out(tower)
    {'embeddings.position_ids': 'positions, which are counted'}
    """
    prefix = next(iter(_prefixes(state)))
    used = {prefix + name.removeprefix(MARK) for name in from_open_clip(to_open_clip(state))}
    outside = ("text_projection", "visual_projection", "vision_model", "logit_scale")
    reasons = {}
    for name in state:
        if name.endswith("embeddings.position_ids"):
            reasons[name] = "positions, which are counted"
        elif name.removeprefix(prefix.removesuffix(MARK)).startswith(outside):
            reasons[name] = "a part of CLIP beyond the text tower's token features"
        elif name not in used:
            raise UserError(f"the text tower holds {name}, which a CLIP text model does not have.")
    return reasons


def transformers_config(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config.json of transformers' CLIPTextModel of an open_clip model config, with that many layers.

    UserError: settings that it does not have.

    >>> text = {"vocab_size": 49408, "width": 768, "context_length": 77, "heads": 12}
    >>> transformers_config({"text_cfg": text, "embed_dim": 768}, layers=12)["intermediate_size"]
    3072
    """
    text = {"mlp_ratio": 4.0, "ls_init_value": None, **config["text_cfg"]}
    if text["ls_init_value"] is not None:
        raise UserError("the text tower has layer scales (ls_init_value), which transformers' CLIP does not have.")
    words = text["vocab_size"]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "hidden_size": text["width"],
        "intermediate_size": round(text["mlp_ratio"] * text["width"]),
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": text["context_length"],
        "num_attention_heads": text["heads"],
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": config["embed_dim"],
        "vocab_size": words,
    }


_SIDE = Is("a whole number from 1 to 10000000", lambda value: type(value) is int and 1 <= value <= 10**7)
_DEPTH = Is("a whole number from 1 to 1000", lambda value: type(value) is int and 1 <= value <= 1000)
_TEXT_CFG = {
    "width?": _SIDE, "heads?": _SIDE, "vocab_size?": _SIDE, "context_length?": _SIDE, "layers?": _DEPTH,
    "mlp_ratio?": ABOVE_0, "hf_model_name?": maybe(TEXT),
}  # fmt: skip
_TRANSFORMERS = {
    "hidden_size?": _SIDE, "num_attention_heads?": _SIDE, "vocab_size?": _SIDE, "max_position_embeddings?": _SIDE,
    "intermediate_size?": _SIDE, "num_hidden_layers?": _DEPTH,
}  # fmt: skip


def text_config(config: Any, source: object) -> dict[str, Any]:
    """A model's config in open_clip's terms, of what a config.json of open_clip or transformers holds, checked.

    UserError: another kind of model, sizes that are none. source: where it stands, for messages.

    >>> text_config({"text_cfg": {"width": "512"}}, "config.json")
    Traceback (most recent call last):
    ldm.errors.UserError: config.json: text_cfg.width is '512', not a whole number from 1 to 10000000.
    """
    check_shape(config, {"model_cfg?": MAPPING}, source)
    config = config.get("model_cfg", config)
    if "text_cfg" not in config:
        check_shape(config, {**_TRANSFORMERS, "text_config?": maybe(_TRANSFORMERS)}, source)
        config = open_clip_config(config)
    check_shape(config, {"text_cfg": _TEXT_CFG, "hf_config?": _TRANSFORMERS}, source)
    return config


def open_clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's model config (text side) of a transformers config.json of CLIPTextModel or CLIPModel.

    UserError: another kind of model, or an activation that open_clip's tower does not have.

    >>> open_clip_config({"model_type": "clip_text_model", "hidden_size": 768})["text_cfg"]["width"]
    768
    """
    kind = config.get("model_type", "")
    if kind not in ("clip", "clip_text_model", ""):
        raise UserError(f"the config is of a '{kind}' model; expected a CLIP model or CLIP text model.")
    own = config.get("text_config") if kind == "clip" else config
    text = {**DEFAULTS, **(own or {})}
    if text["hidden_act"] not in ("quick_gelu", "gelu"):
        raise UserError(f"the text tower's activation is '{text['hidden_act']}'; known are quick_gelu and gelu.")
    if text.get("layer_norm_eps", 1e-5) != 1e-5:
        raise UserError(f"the text tower's layer_norm_eps is {text['layer_norm_eps']}; a CLIP's is 1e-5.")
    width = text["hidden_size"]
    return {
        "embed_dim": config.get("projection_dim", text.get("projection_dim", width)),
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": width,
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / width,
        },
    }
