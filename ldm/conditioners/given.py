"""Conditions by name: what users give to a model, in Python or on a command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ldm.conditioners.base import Conditioner
from ldm.conditioners.compose import ConditionerSet
from ldm.errors import UserError, suggest


def conditions_given(conditioner: Conditioner, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The condition of values by name, see `LatentDiffusion.condition`; those not given are null."""
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
    """The batch key that a user's `name` stands for."""
    name = name.removesuffix("_")
    if name in conditioner.keys:
        return name
    kinds = {key: about.get("kind") for key, about in conditioner.describe().items()}
    features = [key for key, kind in kinds.items() if kind == "features"]
    if name == "features" and len(features) == 1:
        return features[0]
    raise UserError(f"the model has no condition '{name}'{suggest(name, conditioner.keys)}")


def names_given(conditioner: Conditioner, keys: Iterable[str]) -> list[str]:
    """Names of the conditioners, of a set, that take conditions given by these names."""
    if not isinstance(conditioner, ConditionerSet):
        return []
    return list(dict.fromkeys(conditioner.owners[known_key(conditioner, key)] for key in keys))


def parse_conditions(conditioner: Conditioner | None, texts: Sequence[str]) -> dict[str, Any]:
    """Values of `name=text` as a command line gives them: ["class=LUAD", "mutation=TP53:1"]."""
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
