"""Transformers of model folders as diffusers' PixArtTransformer2DModel and DiTTransformer2DModel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.interop.diffusers_names import inverse
from ldm.interop.export import lacks, with_defaults
from ldm.interop.pixcell import BLOCK, JOINED, MODULES

PIXART, DIT = "PixArtTransformer2DModel", "DiTTransformer2DModel"
FIXED = {"positions": "sincos", "norm": "layer", "mlp": "gelu", "qk_norm": None, "context": "cross", "mlp_ratio": 4.0,
         "num_classes": None}  # fmt: skip
DEFAULTS = FIXED | {  # of our parameters
    "patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16, "modulation": "block", "context_dim": None,
    "vector_dim": None, "position_scale": 1.0, "time_scale": 1.0,
}  # fmt: skip
OURS = inverse(MODULES)
OF_DIT = {  # our modules beside those of PixArt -> DiTTransformer2DModel's
    "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2",
}  # fmt: skip
OF_BLOCK = inverse(BLOCK) | {"adaLN_modulation.1": "norm1.linear"}
TABLE = "norm1.emb.class_embedder.embedding_table.weight"


def transformer(
    node: Mapping[str, Any], state: Mapping[str, Tensor], members: Sequence[dict[str, Any]], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Config and tensors of a transformer in diffusers, and what `diffusers_conditioning.network` is to be told.

    members, tensors: of its conditions, as `export_diffusers_conditions.conditioning` gives them; what the network
    adds to its conditions goes to them, a table of classes from them to the network. UserError: what diffusers'
    transformers do not have, in one message.

    >>> transformer({"params": {"positions": "rotary", "mlp": "swiglu"}}, {}, [], {})
    Traceback (most recent call last):
    ldm.errors.UserError: diffusers does not have transformers with positions rotary, mlp swiglu; the model cannot ...
    """
    c = with_defaults(node["params"], DEFAULTS)
    shared = c["modulation"] == "shared"
    _check(c, shared, {member["acts"] for member in members})
    if "y_pos_embed" in state:
        tensors["network.positions"] = state["y_pos_embed"].float()
    config = {
        "_class_name": PIXART if shared else DIT,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": c["hidden_size"] // c["num_heads"],
        "in_channels": c["in_channels"],
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_attention_heads": c["num_heads"],
        "num_layers": c["depth"],
        "out_channels": c["out_channels"],
        "patch_size": c["patch_size"],
        "sample_size": c["image_size"],
    }
    if shared:
        scale = c["position_scale"]
        config |= {
            "caption_channels": c["context_dim"],
            "cross_attention_dim": None if c["context_dim"] is None else c["hidden_size"],
            "interpolation_scale": int(scale) if scale == int(scale) else scale,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        }
        told = {} if c["time_scale"] == 1 else {"time": {"scale": c["time_scale"]}}
        return config, _named(state, OURS, ()), told
    table, by_vectors = _table(c, state, members, tensors)
    config |= {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": len(table) - 1}
    told = {"time": {"scale": c["time_scale"]}} | ({"by_vectors": True} if by_vectors else {})
    named = _named(state, OURS | OF_DIT, ("t_embedder.", "vector_embedder."))
    for block in range(c["depth"]):
        for theirs, ours in (("linear_1", "mlp.0"), ("linear_2", "mlp.2")):
            for kind in ("weight", "bias"):
                place = f"transformer_blocks.{block}.norm1.emb.timestep_embedder.{theirs}.{kind}"
                named[place] = state[f"t_embedder.{ours}.{kind}"]
        named[f"transformer_blocks.{block}.{TABLE}"] = table
    return config, named, told


def _check(c: Mapping[str, Any], shared: bool, acts: set[str]) -> None:
    lost = [f"{name} {c[name]}" for name, value in FIXED.items() if c[name] != value]
    if not c["patch_size"]:
        lost.append("tokens without a place in an image (patch_size 0)")
    if shared and (c["vector_dim"] is not None or "vector" in acts):
        lost.append("a vector added to the time embedding where all blocks share their modulation (shared)")
    if not shared and c["context_dim"] is not None:
        lost.append("cross-attention where each block has its own modulation (block)")
    if not shared and c["position_scale"] != 1:
        lost.append(f"position_scale {c['position_scale']} where each block has its own modulation (block)")
    if lost:
        raise lacks("diffusers", f"transformers with {', '.join(lost)}")


def _table(
    c: Mapping[str, Any], state: Mapping[str, Tensor], members: Sequence[dict[str, Any]], tensors: dict[str, Tensor]
) -> tuple[Tensor, bool]:
    """Embeddings (K+1,D) of a DiT's labels, the null last; whether it takes vectors in their place."""
    vectors = [member for member in members if member["acts"] == "vector"]
    linear = [state[f"vector_embedder.{kind}"] for kind in ("weight", "bias") if f"vector_embedder.{kind}" in state]
    if len(vectors) == 1 and vectors[0]["kind"] == "class":
        vectors[0]["acts"] = "label"
        table = tensors.pop(f"{vectors[0]['prefix']}embedding.weight")
        return (F.linear(table, *linear) if linear else table), False
    if linear:
        tensors |= {"network.vector.weight": linear[0].float(), "network.vector.bias": linear[1].float()}
    return torch.zeros(2, c["hidden_size"]), bool(vectors)


def _named(state: Mapping[str, Tensor], modules: Mapping[str, str], left: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors under diffusers' names, queries, keys and values apart; without those whose names begin with `left`."""
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "y_pos_embed" or name.startswith(left):
            continue
        block = re.match(r"blocks\.(\d+)\.(.+)", name)
        inner, table = (block[2], OF_BLOCK) if block else (name, modules)
        before = f"transformer_blocks.{block[1]}." if block else ""
        module, _, kind = inner.rpartition(".")
        if inner in table:  # of tensors that are in no layer
            named[before + table[inner]] = value
        elif module in JOINED:
            parts = value.chunk(len(JOINED[module]))
            named |= {f"{before}{theirs}.{kind}": part for theirs, part in zip(JOINED[module], parts)}
        else:
            named[f"{before}{table[module]}.{kind}"] = value
    return named
