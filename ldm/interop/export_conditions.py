"""Conditioners of model folders as those of CompVis' latent-diffusion, Large-Image-Diffusion, PathLDM and ZoomLDM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.interop import targets
from ldm.interop.converted import Converted
from ldm.interop.diffusers_folder import TEXT
from ldm.interop.export import kind_of, lacks, layers_of, text_node
from ldm.interop.text_names import MARK, from_open_clip, transformers_config

FORM = "CompVis' code"
# towers that transformers knows by name: (width, layers, heads, vocabulary, quick GELU)
VERSIONS = {
    (768, 12, 12, 49408, True): "openai/clip-vit-large-patch14",
    (512, 12, 8, 49408, True): "openai/clip-vit-base-patch32",
}


@dataclass
class Told:
    """What a checkpoint and its project say of a conditioner.

    Attributes:
        name, params: class among CompVis' encoders, and its parameters. key: of the batch, cond_stage_key.
        state: its tensors by published names, without CompVis' prefix. files: JSON files to lie beside.
        acts: conditioning_key. labels: embeddings (K,D) of classes that the UNet itself has.
    """

    name: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    acts: str | None = "crossattn"
    trainable: bool = True
    labels: Tensor | None = None
    files: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def entries(self) -> dict[str, Any]:
        """The project's entries."""
        if self.acts is None:
            return {"cond_stage_config": targets.UNCONDITIONAL[0], "conditioning_key": None}
        target = targets.ENCODERS + self.name if self.labels is None and self.name else "torch.nn.Identity"
        return {
            "cond_stage_key": self.key,
            "cond_stage_trainable": self.trainable,
            "conditioning_key": self.acts,
            "cond_stage_config": {"target": target, "params": self.params},
        }

    @property
    def state(self) -> dict[str, Tensor]:
        return {TEXT + name: value for name, value in self.tensors.items()}


def conditioning(node: Mapping[str, Any] | None, model: Converted) -> Told:
    """What CompVis' code is to be told of a model's conditioner. UserError: it has no such.

    >>> conditioning(None, Converted({}, {})).entries
    {'cond_stage_config': '__is_unconditional__', 'conditioning_key': None}
    """
    if node is None:
        return Told(acts=None)
    if node["target"] != targets.CONDITIONER_SET:
        return _one(node, model, "")
    members = dict(node["params"]["conditioners"])
    free = [name for name, member in members.items() if _is_free_map(member)]
    if len(members) != 2 or len(free) != 1:
        raise lacks(FORM, f"the conditions {' and '.join(members)} together (it has one, and a map beside the latent)")
    (other,) = members.keys() - set(free)
    told = _one(members[other], model, f"members.{other}.")
    if told.acts != "crossattn":
        raise lacks(FORM, f"the condition {other} together with a map, but by cross-attention")
    told.acts = "hybrid"
    told.notes.append(f"conditioning_key is hybrid: c_concat is the {free[0]}, c_crossattn the {other}")
    return told


def _is_free_map(node: Mapping[str, Any]) -> bool:
    """Whether a condition is a map that is concatenated to the latent as it is."""
    given = node.get("params") or {}
    return node["target"] == targets.RESCALER and given.get("stages", 1) == 0 and given.get("out_channels") is None


def _one(node: Mapping[str, Any], model: Converted, member: str) -> Told:
    prefix = TEXT + member
    own = {name.removeprefix(prefix): value for name, value in model.state.items() if name.startswith(prefix)}
    if kind_of(node) not in KINDS:
        raise lacks(FORM, f"the condition {kind_of(node)}")
    return KINDS[kind_of(node)](node, dict(node.get("params") or {}), own, model)


def _class(node: Mapping[str, Any], p: dict[str, Any], own: dict[str, Tensor], model: Converted) -> Told:
    names, weight = ",".join(map(str, p["classes"])), own["embedding.weight"]
    if p.get("acts", "crossattn") == "crossattn":
        params = {"embed_dim": p["dim"], "n_classes": len(weight), "key": "class_label"}
        note = f"names of classes do not go along: {names}, the null last"
        return Told("ClassEmbedder", params, "class_label", own, notes=[note])
    trained = bool(weight[-1].any())  # a null of zeros was never an embedding of the UNet
    note = f"names of classes do not go along: {names}" + (", and as last class the null" if trained else "")
    return Told(key="class_label", acts="adm", labels=weight if trained else weight[:-1], notes=[note])


def _patch(node: Mapping[str, Any], p: dict[str, Any], own: dict[str, Tensor], model: Converted) -> Told:
    params = {
        "patch_ssl_key": "feat_patch",
        "patch_embed_dim": p["embed_dim"],
        "target_dim": p.get("context_dim", 512),
        "normalize_ssl": p.get("normalize", True),
    }
    return Told("PatchEmbedder", params, "hybrid", own)


def _ssl(node: Mapping[str, Any], p: dict[str, Any], own: dict[str, Tensor], model: Converted) -> Told:
    if p.get("context_dim", 512) != 512:
        raise lacks(FORM, f"an SSLEmbedder of context_dim {p['context_dim']} (it has 512)")
    params = {
        "patch_ssl_key": "feat_20x",
        "region_ssl_key": "feat_5x",
        "patch_embed_dim": p.get("embed_dim", 384),
        "region_embed_dim": p.get("region_embed_dim", 768),
        "normalize_ssl": p.get("normalize", True),
    }
    return Told("SSLEmbedder", params, "hybrid", own)


def _grid(node: Mapping[str, Any], p: dict[str, Any], own: dict[str, Tensor], model: Converted) -> Told:
    levels = p.get("magnifications", 8)
    names = [] if isinstance(levels, int) else list(map(str, levels))
    params = {
        "feat_key": "ssl_feat",
        "mag_key": "mag",
        "num_layers": p.get("depth", 12),
        "num_heads": p.get("heads", 8),
        "input_channels": p.get("embed_dim", 1024),
        "hidden_channels": p.get("hidden", 512),
        "vit_mlp_dim": p.get("mlp", 2048),
        "output_channels": p.get("context_dim", 512),
        "mag_levels": len(names) or levels,
        "p_uncond": p.get("dropout", 0.1),
    }
    notes = [f"names of magnifications do not go along: {','.join(names)}"] if names else []
    if not p.get("standardize", True):
        notes.append("features go in as they are: ZoomLDM's data loader standardises them, leave that out")
    name = "EmbeddingViT2_5" if p.get("last_norm", True) else "EmbeddingViT2"
    return Told(name, params, "hybrid", own, notes=notes)


def _map(node: Mapping[str, Any], p: dict[str, Any], own: dict[str, Tensor], model: Converted) -> Told:
    own.pop("blank")
    key = p.get("key", "map")
    if _is_free_map(node):
        return Told(key=key, acts="concat")
    params = {
        "n_stages": p.get("stages", 1),
        "method": p.get("method", "bilinear"),
        "multiplier": p.get("multiplier", 0.5),
        "in_channels": p["in_channels"],
        "out_channels": p.get("out_channels"),
        "bias": p.get("bias", False),
    }
    return Told("SpatialRescaler", params, key, own, "concat")


def _text(node: Mapping[str, Any], p: dict[str, Any], own: dict[str, Tensor], model: Converted) -> Told:
    text, config = text_node(node, model, FORM)
    if text["pad"] != "eos" or (text["chunks"] > 1 and not (text["mask_padding"] and text["layout"] == "joint")):
        raise lacks(FORM, "captions of several chunks but as PathLDM has them, or padded with zeros")
    tower = {name.removeprefix("tower."): value for name, value in own.items()}
    tensors = {f"transformer.{name}": value for name, value in from_open_clip(tower).items()}
    tokens, layers = config["text_cfg"]["context_length"], layers_of(tower)
    tensors[f"transformer.{MARK}embeddings.position_ids"] = torch.arange(tokens)[None]
    notes: list[str] = []
    params = {"version": _version(config, layers, notes), "max_length": tokens * text["chunks"]}
    if text["prompt"] != "{text}":
        notes.append(f"the text tower was trained on prompts like '{text['prompt']}'; write them so")
    files = {"text_config.json": transformers_config(config, layers)}
    key = "caption" if text["mask_padding"] else "txt"
    return Told("FrozenCLIPEmbedder", params, key, tensors, trainable=False, files=files, notes=notes)


def _version(config: Mapping[str, Any], layers: int, notes: list[str]) -> str:
    """What CompVis' code builds its text tower from, before it loads the weights."""
    text = config["text_cfg"]
    shape = (text["width"], layers, text["heads"], text["vocab_size"], bool(config.get("quick_gelu")))
    if shape not in VERSIONS:
        notes.append("the text tower is none that is known by name: give its folder as cond_stage_config's version")
    return VERSIONS.get(shape, str(config.get("name", "CLIP text tower")))


KINDS: dict[str, Callable[[Mapping[str, Any], dict[str, Any], dict[str, Tensor], Converted], Told]] = {
    "ClassEmbedder": _class, "PatchEmbedder": _patch, "SSLEmbedder": _ssl, "GridEmbedder": _grid,
    "SpatialRescaler": _map, "TextEmbedder": _text,
}  # fmt: skip
