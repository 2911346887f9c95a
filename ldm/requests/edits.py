"""Edits of conditions: the source's values with some of them changed, swept or multiplied.

mutation=TP53:1                  one gene set; the other genes stay the source's
expression=MKI67:0.9,PTEN:0.1    several
expression=MKI67:0:1:5           a sweep, start:stop:count: five targets
expression=MKI67:x2              the source's value times 2, up to 1
score=0:1:5, score=x0.5          conditions that are one number, alike
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from ldm.conditioners.base import Conditioner
from ldm.conditioners.compose import known_key
from ldm.errors import UserError, suggest

GENES = ("mutation", "expression")
NUMBERS = ("score", "multiplier")
MOST = 200  # targets of one image


@dataclass
class Target:
    """What an image is to become: values by condition, and the label that its file is called by."""

    label: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A gene of a condition, or the condition itself (gene None), and what it becomes: values, or times a factor."""

    key: str
    gene: str | None
    texts: tuple[str, ...]

    def labels(self) -> list[str]:
        name = self.gene or self.key
        return [f"{name}-{text}" for text in self.texts]


def parse_edits(conditioner: Conditioner, texts: Sequence[str]) -> list[Change]:
    """Changes of "name=..." (see above). UserError: an unknown condition or gene, no number, a gene changed twice.

    >>> conditioner = ldm.load_model(models / "demo-omics").cond_stage_model
    >>> parse_edits(conditioner, ["expression=CD58:x2"])
    [Change(key='expression', gene='CD58', texts=('x2',))]
    """
    changes: list[Change] = []
    about = conditioner.describe()
    for text in texts:
        name, equals, rest = text.partition("=")
        if not (name and equals and rest.strip()):
            raise UserError(f"an edit is name=value, as mutation=TP53:1 or expression=MKI67:0:1:5; got '{text}'.")
        key = known_key(conditioner, name.strip())
        kind = about[key].kind
        if kind in NUMBERS:
            changes.append(Change(key, None, _texts(rest, text)))
        elif kind in GENES:
            for item in rest.split(","):
                gene, colon, value = item.strip().partition(":")
                if not (gene and colon):
                    raise UserError(f"an edit of '{key}' is GENE:value, as MKI67:0.9; got '{item.strip()}'.")
                if gene not in about[key].genes:
                    raise UserError(f"the model has no gene '{gene}' in '{key}'{suggest(gene, about[key].genes)}")
                changes.append(Change(key, gene, _texts(value, text)))
        else:
            raise UserError(f"'{key}' ({kind}) is not edited by numbers; give it with --target {name}=...")
        if kind == "mutation":
            _check_mutation(changes[-1], text)
    seen = [(change.key, change.gene) for change in changes]
    if twice := next((place for place in seen if seen.count(place) > 1), None):
        raise UserError(f"'{twice[1] or twice[0]}' is edited twice; give one edit, or a sweep start:stop:count.")
    if (count := math.prod(len(change.texts) for change in changes)) > MOST:
        raise UserError(f"the sweeps make {count} targets of one image; at most {MOST}.")
    return changes


def _texts(value: str, edit: str) -> tuple[str, ...]:
    """The values of "0.9", "x2", "unknown" or of the sweep "0:1:5"."""
    parts = value.strip().split(":")
    try:
        if len(parts) == 3:
            count = int(parts[2])
            if count < 2:
                raise ValueError
            return tuple(f"{v:.4g}" for v in np.linspace(float(parts[0]), float(parts[1]), count))
        (one,) = parts
        if one.lower() != "unknown" and not math.isfinite(float(one.removeprefix("x"))):
            raise ValueError
        return (one,)
    except ValueError:
        raise UserError(f"an edit sets 0.9, x2 (times), unknown, or start:stop:count as 0:1:5; got '{edit}'.") from None


def _check_mutation(change: Change, edit: str) -> None:
    if any(text not in ("0", "1", "unknown") for text in change.texts):
        raise UserError(f"a mutation is set to 0, 1 or unknown; got '{edit}'.")


def edited(conditioner: Conditioner, source: Mapping[str, Any], changes: Sequence[Change]) -> list[Target]:
    """Targets of one image: every combination of the changes, the rest as its source.

    source: values by condition; genes as {gene: value} or an array in the model's order.

    >>> conditioner = ldm.load_model(models / "demo-omics").cond_stage_model
    >>> changes = parse_edits(conditioner, ["mutation=CHMP7:1", "expression=CD58:0:1:3"])
    >>> [target.label for target in edited(conditioner, {"class": "COAD"}, changes)]
    ['CHMP7-1_CD58-0', 'CHMP7-1_CD58-0.5', 'CHMP7-1_CD58-1']
    """
    targets = []
    about = conditioner.describe()
    for chosen in product(*(range(len(change.texts)) for change in changes)):
        values = dict(source)
        for change, place in zip(changes, chosen):
            text = change.texts[place]
            if change.gene is None:
                values[change.key] = _changed(source.get(change.key), text, change.key)
                continue
            genes = about[change.key].genes
            own = gene_values(values.get(change.key), genes)
            at = genes.index(change.gene)
            own[at] = _changed(own[at], text, change.gene)
            if about[change.key].kind == "expression":
                own[at] = np.clip(own[at], 0, 1)
            values[change.key] = own
        moving = [change.labels()[place] for change, place in zip(changes, chosen)]
        targets.append(Target(safe("_".join(moving)), values))
    return targets


def gene_values(value: Any, genes: Sequence[str]) -> np.ndarray:
    """Values (G,) in the order of genes, NaN where they are not known, of {gene: value}, an array or None.

    >>> gene_values({"TP53": 1}, ["KRAS", "TP53"])
    array([nan,  1.], dtype=float32)
    """
    if isinstance(value, Mapping):
        return np.array([value.get(gene, np.nan) for gene in genes], np.float32)
    if value is None:
        return np.full(len(genes), np.nan, np.float32)
    return np.array(value, np.float32).reshape(-1)


def _changed(value: Any, text: str, name: str) -> float:
    if text.lower() == "unknown":
        return math.nan
    if not text.startswith("x"):
        return float(text)
    if value is None or math.isnan(float(value)):
        raise UserError(f"{name} is to be multiplied, but the source's value is not known; give it with --source.")
    return float(value) * float(text[1:])


def completed(conditioner: Conditioner, source: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """The source with genes unknown where it gives none of a condition that is edited: source and target then differ in
    what is changed alone.

    >>> conditioner = ldm.load_model(models / "demo-omics").cond_stage_model
    >>> changes = parse_edits(conditioner, ["mutation=CHMP7:1"])
    >>> source = completed(conditioner, {"class": "COAD"}, changes)
    >>> source["class"], source["mutation"].shape
    ('COAD', (13,))
    """
    about = conditioner.describe()
    missing = {change.key for change in changes if change.gene is not None} - set(source)
    return {**source, **{key: gene_values(None, about[key].genes) for key in missing}}


def safe(text: str) -> str:
    """A text as part of a file's name.

    >>> safe("class LUAD; score=0.3")
    'class-LUAD-score-0.3'
    """
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text.strip()).strip("-")[:80] or "target"
