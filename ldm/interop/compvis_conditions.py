"""Conditioners of CompVis' checkpoints and of its forks: their tensors as those of conditioners here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.foreign.paths import inside
from ldm.foreign.settings import settings_text
from ldm.interop import targets
from ldm.interop.clip_config import tower_config
from ldm.interop.converted import Converted
from ldm.interop.text_names import to_open_clip

CONDITIONER = "cond_stage_model."
TEXT_MODEL = "text_model.json"
Member = tuple[dict[str, Any], dict[str, Tensor]]  # node and weights of a conditioner


@dataclass
class Published:
    """A conditioner in a checkpoint.

    Attributes:
        told: what the project says of it. weights: its tensors, without CompVis' prefix.
        classes: names that the user gives, of classes or magnifications.
        found: the model that it is a part of, which gets notes and files. path: of the checkpoint.
    """

    told: targets.Conditioning
    weights: dict[str, Tensor]
    classes: Sequence[str] | None
    found: Converted
    path: Path

    @property
    def params(self) -> dict[str, Any]:
        return self.told.node["params"]

    def node(self, **params: Any) -> dict[str, Any]:
        """The conditioner's node with these parameters beside its own."""
        return {"target": self.told.node["target"], "params": {**params, **self.params}}


def read_conditioner(given: Published) -> tuple[str, Member]:
    """The name of a conditioner among those of its model, its node and its weights by our names.

    UserError: tensors that it does not have, another number of names than of classes, missing words.

    >>> told = targets.Conditioning("same", {"target": "ldm.conditioners.ssl.PatchEmbedder", "params": {}})
    >>> given = Published(told, {"proj.weight": torch.ones(2, 2)}, None, Converted({}, {}), Path("model.ckpt"))
    >>> name, (node, weights) = read_conditioner(given)
    >>> name, node["target"], list(weights)
    ('condition', 'ldm.conditioners.ssl.PatchEmbedder', ['proj.weight'])
    """
    name, read = KINDS[given.told.kind]
    return name, read(given)


def class_embedder(given: Published, has_null: bool | None = None) -> Member:
    """A ClassEmbedder of an embedding's weights.

    has_null: whether the last embedding is the unconditional one; None is told by the number of names. A model without
    has a null of zeros in its place.

    >>> told = targets.Conditioning("class", {"target": targets.CLASS_EMBEDDER, "params": {"dim": 4}})
    >>> weights, names = {"embedding.weight": torch.ones(3, 4)}, ["LUAD", "COAD"]
    >>> node, weights = class_embedder(Published(told, weights, names, Converted({}, {}), Path("model.ckpt")))
    >>> node["params"]["classes"], weights["embedding.weight"].shape
    (['LUAD', 'COAD'], torch.Size([3, 4]))
    """
    classes, published, notes = given.classes, given.told.published, given.found.notes
    weight = given.weights.get("embedding.weight")
    if weight is None or set(given.weights) != {"embedding.weight"}:
        names = ", ".join(given.weights) or "none"
        raise UserError(f"a class condition has one tensor, embedding.weight; the checkpoint has {names}.")
    rows, told_by_names = len(weight), has_null is None
    if published.get("rows", rows) != rows:
        raise UserError(f"the config says {published['rows']} classes, the checkpoint has embeddings of {rows}.")
    if told_by_names:
        has_null = classes is None or len(classes) == rows - 1
    count = rows - has_null
    if classes is not None and len(classes) != count:
        allowed = f"{rows - 1} (without the unconditional one, the last) or {rows}" if told_by_names else str(count)
        raise UserError(f"the model has {rows} class embeddings; give {allowed} names, got {len(classes)}.")
    if classes is None:
        last = "; the last of its embeddings is taken as the unconditional one" if has_null else ""
        notes.append(f"the classes have no names: they are 0 to {count - 1}{last}. --classes names them")
    if not has_null:
        notes.append("the model was not trained without a class: sample it with guidance scale 1")
        weight = torch.cat([weight, torch.zeros_like(weight[:1])])
    names = [str(name) for name in (classes if classes is not None else range(count))]
    node = given.node(classes=names)
    node["params"]["dropout"] = 0.1 if has_null else 0.0
    return node, {"embedding.weight": weight}


def _same(given: Published) -> Member:
    return given.told.node, given.weights


def _grid(given: Published) -> Member:
    levels, classes = given.told.published["levels"], given.classes
    if classes is not None and len(classes) != levels:
        raise UserError(f"the model has {levels} magnifications; --classes gives {len(classes)} names.")
    if classes is None:
        given.found.notes.append(f"the magnifications have no names: they are 0 to {levels - 1}. --classes names them")
    node = given.node()
    node["params"]["magnifications"] = list(classes) if classes is not None else levels
    return node, given.weights


def _rescaler(given: Published) -> Member:
    return given.told.node, given.weights | blank(given.params["in_channels"])


def _clip(given: Published) -> Member:
    for name in [name for name in given.weights if name.endswith("position_ids")]:
        given.found.unused[CONDITIONER + name] = "0, 1, 2, ..."
        del given.weights[name]
    tower = to_open_clip(given.weights)
    merged = 2 * sum("attn.in_proj" in name for name in tower)  # query, key and value are one tensor
    if len(given.weights) != len(tower) + merged:
        raise UserError("the checkpoint's text tower holds tensors that a CLIP text tower does not have.")
    member = _text_tower(given, tower, quick_gelu=True)
    asks = "does not look" if given.params["mask_padding"] else "looks"
    given.found.notes.append(f"the text tower {asks} at padding, as the published code whose config this is")
    return member


def _open_clip(given: Published) -> Member:
    tower = {name.removeprefix("model."): value for name, value in given.weights.items()}
    for name in [name for name in tower if name in ("text_projection", "logit_scale", "attn_mask")]:
        given.found.unused[f"{CONDITIONER}model.{name}"] = "a part of CLIP beyond the text tower's token features"
        del tower[name]
    node, weights = _text_tower(given, tower, quick_gelu=False)
    if given.params["layer"] == "penultimate":
        layers = json.loads(given.found.files[TEXT_MODEL])["text_cfg"]["layers"]
        last = f"transformer.resblocks.{layers - 1}."
        for name in [name for name in tower if name.startswith(last)]:
            why = "the text tower's last block, which the model does not use"
            given.found.unused[f"{CONDITIONER}model.{name}"] = why
            del weights[f"tower.{name}"]
    return node, weights


def _text_tower(given: Published, tower: Mapping[str, Tensor], quick_gelu: bool) -> Member:
    """The condition on a CLIP text tower, whose config becomes a file of the model."""
    text, source = tower_config(tower, given.told.published["version"], given.path, quick_gelu)
    given.found.files[TEXT_MODEL] = text
    given.found.notes.append(f"heads and activation of the text tower are those of {source}")
    return given.node(model=f"./{TEXT_MODEL}"), {f"tower.{name}": value for name, value in tower.items()}


def _bert(given: Published) -> Member:
    words = inside(given.path.parent, "tokenizer.json")
    if not words.is_file():
        raise UserError(
            "the model reads text by the words of bert-base-uncased, which its checkpoint does not hold: put its "
            "tokenizer.json (https://huggingface.co/google-bert/bert-base-uncased, Apache-2.0) into "
            f"{given.path.parent}."
        )
    weights = {}
    for name, value in given.weights.items():
        if name.startswith("transformer.to_logits."):
            given.found.unused[CONDITIONER + name] = "predicts words, which conditioning does not"
        else:
            weights["tower." + name.removeprefix("transformer.")] = value
    about = {"name": "bert-embedder", "licence": "that of the model"}
    given.found.files[TEXT_MODEL] = json.dumps({**about, **given.told.published}, indent=2)
    given.found.files["tokenizer.json"] = settings_text(words, "the tokenizer")
    return given.node(model=f"./{TEXT_MODEL}", tokenizer="./tokenizer.json"), weights


# kind of `targets.Conditioning` -> name among the conditioners of a model, reader
KINDS: dict[str, tuple[str, Callable[[Published], Member]]] = {
    "allowed": ("condition", _same),
    "same": ("condition", _same),
    "class": ("class", class_embedder),
    "grid": ("grid", _grid),
    "rescaler": ("map", _rescaler),
    "clip": ("text", _clip),
    "open_clip": ("text", _open_clip),
    "bert": ("text", _bert),
}


def compose(members: Mapping[str, Member], state: dict[str, Tensor]) -> dict[str, Any] | None:
    """The node of one conditioner or of a set of them; their weights go to `state`.

    >>> state = {}
    >>> node = compose({"class": ({"target": targets.CLASS_EMBEDDER}, {"embedding.weight": torch.ones(3, 4)})}, state)
    >>> node["target"], list(state)
    ('ldm.conditioners.class_token.ClassEmbedder', ['cond_stage_model.embedding.weight'])
    """
    if not members:
        return None
    if len(members) == 1:
        ((node, weights),) = members.values()
        state |= {CONDITIONER + name: value for name, value in weights.items()}
        return node
    for member, (_, weights) in members.items():
        state |= {f"{CONDITIONER}members.{member}.{name}": value for name, value in weights.items()}
    conditioners = {name: node for name, (node, _) in members.items()}
    return {"target": targets.CONDITIONER_SET, "params": {"conditioners": conditioners}}


def blank(channels: int) -> dict[str, Tensor]:
    """The weights of a map's null, which is zero.

    >>> blank(3)["blank"].shape
    torch.Size([1, 3, 1, 1])
    """
    return {"blank": torch.zeros(1, channels, 1, 1)}
