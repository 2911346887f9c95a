"""Conditions of a model folder as `diffusers_conditioning`, the module beside an exported model, reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.interop import diffusers_conditioning, targets
from ldm.interop.converted import Converted
from ldm.interop.diffusers_folder import TEXT
from ldm.interop.export import kind_of, lacks

MODULE = "conditioning.py"


def conditioning(node: Mapping[str, Any], model: Converted) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What `diffusers_conditioning` reads of a model's conditions: the members of conditioning.json, and tensors.

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
        kind = kind_of(member)
        if kind not in KINDS:
            beside = " beside others" if member["target"] == targets.TEXT_EMBEDDER else ""
            raise lacks("diffusers", f"the condition {kind}{beside}")
        members.append({"prefix": prefix, **KINDS[kind](member.get("params") or {})})
        start = TEXT + prefix
        own = {prefix + n.removeprefix(start): value for n, value in model.state.items() if n.startswith(start)}
        tensors |= {name: value.float() for name, value in own.items()}
    return members, tensors


def _class(p: Mapping[str, Any]) -> dict[str, Any]:
    told = {"kind": "class", "keys": [p.get("key", "class")], "acts": p.get("acts", "crossattn")}
    return told | {"classes": [str(name) for name in p["classes"]]}


def _score(p: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "score", "keys": [p.get("key", "score")], "acts": p.get("acts", "vector")}


def _feature(p: Mapping[str, Any], normalize: bool = True) -> dict[str, Any]:
    told = {"kind": "features", "keys": [p.get("key", "ssl")], "acts": "crossattn"}
    return told | {"normalize": p.get("normalize", normalize)}


def _cells(p: Mapping[str, Any]) -> dict[str, Any]:
    return _feature(p, normalize=False) | {"grid": p.get("grid", 2)}


def _region(p: Mapping[str, Any]) -> dict[str, Any]:
    keys = [p.get("key", "ssl"), p.get("region_key", "region")]
    return {"kind": "region", "keys": keys, "acts": "crossattn", "normalize": p.get("normalize", True)}


def _vector(p: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "vector", "keys": [p.get("key", "ssl")], "acts": "vector"}


def _tokens(p: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "tokens", "keys": [p.get("key", "ssl")], "acts": "crossattn"}


def _levels(p: Mapping[str, Any]) -> dict[str, Any]:
    levels = p.get("magnifications", 8)
    return {
        "kind": "levels",
        "keys": [p.get("key", "ssl"), p.get("magnification_key", "magnification")],
        "acts": "crossattn",
        "levels": [str(level) for level in (range(levels) if isinstance(levels, int) else levels)],
        "depth": p.get("depth", 12),
        "heads": p.get("heads", 8),
        "standardize": p.get("standardize", True),
    }


def _map(p: Mapping[str, Any]) -> dict[str, Any]:
    told = {"stages": p.get("stages", 1), "method": p.get("method", "bilinear")}
    told |= {"multiplier": p.get("multiplier", 0.5)}
    return {"kind": "map", "keys": [p.get("key", "map")], "acts": "concat", **told}


def _image(p: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "map", "keys": [p.get("key", "image")], "acts": "concat", "stages": 0}


KINDS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "ClassEmbedder": _class, "ScoreEmbedder": _score, "PatchEmbedder": _feature, "GridPatchEmbedder": _cells,
    "SSLEmbedder": _region, "FeatureVector": _vector, "FeatureTokens": _tokens, "GridTokens": _tokens,
    "GridEmbedder": _levels, "SpatialRescaler": _map, "SourceImage": _image,
}  # fmt: skip


def module_text() -> str:
    """The text of the module that lies beside the tensors of conditions.

    >>> "class Conditioning" in module_text()
    True
    """
    return Path(diffusers_conditioning.__file__).read_text(encoding="utf-8")
