"""Several conditions of one model, each with its own dropout and guidance scale; and conditions as users name them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioners.base import About, Conditioner
from ldm.config import instantiate_from_config
from ldm.errors import UserError, suggest


class ConditionerSet(Conditioner):
    """Any set of conditioners by name. Its condition has a key "name/part" for every part of every conditioner.

    The network is given all of them: cross-attention tokens one after the other, vectors added, maps concatenated
    (`ldm.diffusion.denoiser.call_network`). As they stay apart until then, each can be dropped, and guided, by itself.

    Args:
        conditioners: name -> config node of a conditioner. No two may read the same batch key.
    """

    def __init__(self, conditioners: Mapping[str, Mapping[str, Any]]):
        super().__init__(dropout=0.0)
        if not conditioners or not isinstance(conditioners, Mapping):
            raise UserError("`conditioners` is a mapping of names to config nodes, at least one.")
        for name in conditioners:
            if any(mark in str(name) for mark in "/+=.") or hasattr(nn.ModuleDict, str(name)):
                raise UserError(f"a conditioner cannot be called '{name}'; choose a word without '/', '+', '=' or '.'.")
        self.nodes = {name: dict(node) for name, node in conditioners.items()}
        self.members = nn.ModuleDict({name: instantiate_from_config(node) for name, node in self.nodes.items()})
        owners: dict[str, str] = {}
        for name, member in self.members.items():
            for key in member.keys:
                if key in owners:
                    raise UserError(f"conditioners '{owners[key]}' and '{name}' both read '{key}'; rename one's `key`.")
                owners[key] = name
        self.keys, self.owners = tuple(owners), owners
        self.encoded = tuple(f"{name}/{part}" for name, member in self.members.items() for part in member.encoded)
        nulled = [member.dropout for member in self.members.values() if not member.encoded]
        self.dropout = min(nulled, default=0.0)  # 0: some null was never trained

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of a batch; sample b loses condition k where drop (B,K) is true."""
        drops = [None] * len(self.members) if drop is None else drop.unbind(1)
        return _named({name: member(batch, d) for (name, member), d in zip(self.members.items(), drops)})

    def null(self) -> dict[str, Tensor]:
        return _named({name: member.null() for name, member in self.members.items()})

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        return torch.stack([member.draw(count, rng) for member in self.members.values()], 1)  # (count,K)

    def given(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """The condition of what users give; conditions that they do not give are null."""
        conds = {}
        for name, member in self.members.items():
            own = {key: value for key, value in values.items() if self.owners[key] == name}
            conds[name] = member(member.read(own)) if own else member.null()
        return _named(conds)

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for name, member in self.members.items():
            own = {key: value for key, value in values.items() if self.owners[key] == name}
            batch |= member.read(own) if own else {}
        return batch

    def parse(self, key: str, text: str) -> Any:
        return self.members[self.owners[key]].parse(key, text)

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        for member in self.members.values():
            member.check_data(metadata)

    def describe(self) -> dict[str, About]:
        return {key: about for member in self.members.values() for key, about in member.describe().items()}

    def portable(self) -> tuple[dict[str, Any], dict[str, str]]:
        nodes, files = {}, {}
        for name, member in self.members.items():
            params, own = member.portable()
            renamed = {file: f"{name}_{file}" for file in own}
            files |= {renamed[file]: text for file, text in own.items()}
            params = {key: _renamed(value, renamed) for key, value in params.items()}
            nodes[name] = {**self.nodes[name], "params": {**self.nodes[name].get("params", {}), **params}}
        return {"conditioners": nodes}, files


def _named(conds: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}/{part}": value for name, cond in conds.items() for part, value in cond.items()}


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    return f"./{names[value[2:]]}" if isinstance(value, str) and value[2:] in names and value[:2] == "./" else value


def guidance_terms(
    null: Mapping[str, Tensor],
    cond: Mapping[str, Tensor],
    scales: Mapping[str, float],
    given: Collection[str] | None = None,
) -> list[tuple[dict[str, Tensor], float]]:
    """Terms for `ldm.diffusion.guidance.compose`: each condition alone, at its own scale.

    scales: name -> scale; "class+text" guides by both jointly. Conditions that are not named have scale 1. given: names
    of the conditions that are given at all; the others add nothing and are left out. Without it those are left out
    that equal their null.

    >>> null, cond = model.null_condition(), model.condition(class_="A")
    >>> [(sorted(other), scale) for other, scale in guidance_terms(null, cond, {"class": 3.0})]
    [(['ssl/crossattn'], 3.0)]
    """
    names = list(dict.fromkeys(key.partition("/")[0] for key in null if "/" in key))
    if not names:
        raise UserError("guidance scales by name are for models of several conditions; give one number.")
    groups = {name: tuple(name.split("+")) for name in scales}
    for group in groups.values():
        for name in group:
            if name not in names:
                raise UserError(f"the model has no condition '{name}' to guide by{suggest(name, names)}")
    named = [name for group in groups.values() for name in group]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise UserError(f"'{twice[0]}' has two guidance scales; give one.")
    terms = []
    for group, scale in [(groups[key], float(scale)) for key, scale in scales.items()] + [
        ((name,), 1.0) for name in names if name not in named
    ]:
        own = [key for key in null if key.partition("/")[0] in group]
        differ = (not torch.equal(cond[key], null[key].expand_as(cond[key])) for key in own)
        if any(differ) if given is None else set(group) & set(given):
            terms.append(({key: null[key] for key in null if key not in own}, scale))
    return terms


def conditions_given(conditioner: Conditioner, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The condition of values by name, see `LatentDiffusion.condition`; those not given are null.

    >>> cond = conditions_given(model.cond_stage_model, {"class": ["A", "B"]})
    >>> {part: tuple(value.shape) for part, value in cond.items()}
    {'ssl/crossattn': (2, 1, 8), 'class/vector': (2, 32)}
    """
    values = {}
    for name, value in given.items():
        key = known_key(conditioner, name)
        if key in values:
            raise UserError(f"the condition '{key}' is given twice.")
        values[key] = value
    if not values:
        raise UserError(f"no condition is given; the model takes {', '.join(conditioner.keys)}.")
    composed = isinstance(conditioner, ConditionerSet)
    cond = conditioner.given(values) if composed else conditioner(conditioner.read(values))
    counts = {len(value) for value in cond.values()} - {1}
    if len(counts) > 1:
        raise UserError(f"conditions of one call are one or equally many; got {', '.join(map(str, sorted(counts)))}.")
    count = counts.pop() if counts else 1
    return {part: value.expand(count, *value.shape[1:]) for part, value in cond.items()}


def known_key(conditioner: Conditioner, name: str) -> str:
    """The batch key that a user's `name` stands for.

    >>> known_key(model.cond_stage_model, "class_"), known_key(model.cond_stage_model, "features")
    ('class', 'ssl')
    """
    name = name.removesuffix("_")
    if name in conditioner.keys:
        return name
    features = [key for key in keys_of(conditioner, "features") if not conditioner.describe()[key].optional]
    if name == "features" and len(features) == 1:
        return features[0]
    known = [*conditioner.keys, *(["features"] if len(features) == 1 else [])]
    raise UserError(f"the model has no condition '{name}'{suggest(name, known)}")


def keys_of(conditioner: Conditioner | None, kind: str) -> list[str]:
    """The batch keys of a kind (see `About`); none of an unconditional model, whose conditioner is None.

    >>> keys_of(model.cond_stage_model, "class")
    ['class']
    """
    about = {} if conditioner is None else conditioner.describe()
    return [key for key, told in about.items() if told.kind == kind]


def cells_of(conditioner: Conditioner | None) -> int:
    """Cells along each side of the grid of features that describes one image: 1 where one feature does, or many may.

    >>> cells_of(model.cond_stage_model)
    1
    """
    grids = [conditioner.describe()[key].grid for key in keys_of(conditioner, "features")]
    return next((grid[0] for grid in grids if len(grid) == 1), 1)


def names_given(conditioner: Conditioner, keys: Iterable[str]) -> list[str]:
    """Names of the conditioners, of a set, that take conditions given by these names.

    >>> names_given(model.cond_stage_model, ["features"])
    ['ssl']
    """
    if not isinstance(conditioner, ConditionerSet):
        return []
    return list(dict.fromkeys(conditioner.owners[known_key(conditioner, key)] for key in keys))


def parse_conditions(conditioner: Conditioner | None, texts: Sequence[str]) -> dict[str, Any]:
    """Values of `name=text` as a command line gives them: ["class=LUAD", "mutation=TP53:1"].

    >>> parse_conditions(model.cond_stage_model, ["class=A"])
    {'class': 'A'}
    """
    values = {}
    for item in texts:
        name, equals, text = item.partition("=")
        if not (name and equals and text.strip()):
            raise UserError(f"a condition is name=value, as class=LUAD; got '{item}'.")
        if conditioner is None:
            raise UserError(f"the model is unconditional; it takes no '{name}'.")
        key = known_key(conditioner, name)
        if key in values:
            raise UserError(f"the condition '{key}' is given twice.")
        values[key] = conditioner.parse(key, text)
    return values
