"""Names and settings of transformers' CLIP text tower (CLIPTextModel, CLIPModel) as those of open_clip's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError

MARK = "text_model."  # all that follows it, under whatever prefix, is the text tower
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
    """Whether a checkpoint holds a CLIP text tower under transformers' names."""
    return any(name.endswith(MARK + "final_layer_norm.weight") for name in state)


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower in a checkpoint of transformers' names, under the names of open_clip's.

    Query, key and value of a layer become one matrix; position_ids, the image tower and the projection are left out.
    UserError: the checkpoint holds no such tower, or more than one.
    """
    prefixes = {name.partition(MARK)[0] for name in state if name.endswith(MARK + "final_layer_norm.weight")}
    if len(prefixes) != 1:
        raise UserError(
            f"the checkpoint holds {len(prefixes) or 'no'} CLIP text towers; expected names as "
            f"{MARK}encoder.layers.0.self_attn.q_proj.weight under one prefix."
        )
    prefix = prefixes.pop() + MARK
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


def open_clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's model config (text side) of a transformers config.json of CLIPTextModel or CLIPModel.

    UserError: another kind of model, or an activation that open_clip's tower does not have.
    """
    kind = config.get("model_type", "")
    if kind not in ("clip", "clip_text_model", ""):
        raise UserError(f"the config is of a '{kind}' model; expected a CLIP model or CLIP text model.")
    own = config.get("text_config") if kind == "clip" else config
    text = {**DEFAULTS, **(own or {})}
    if text["hidden_act"] not in ("quick_gelu", "gelu"):
        raise UserError(f"the text tower's activation is '{text['hidden_act']}'; known are quick_gelu and gelu.")
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
