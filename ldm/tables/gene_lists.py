"""Lists of genes, and the ranges by which expression is scaled: what a model and its tables agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError, some
from ldm.foreign.settings import parse_json, read_yaml
from ldm.foreign.shape import TEXT, check_shape
from ldm.tables.gene_dates import dates_among
from ldm.tables.text import read_text

_SHOWN = 8


def read_genes(genes: Sequence[str] | str | Path, what: str) -> tuple[str, ...]:
    """Names of genes: a list of them, a text file of one per line, or a cohort's omics/<source>.json.

    Raises:
        UserError: an unreadable file, fewer than two genes, a gene twice, names that are dates.

    >>> _ = Path("genes.txt").write_text("TP53")
    >>> read_genes("genes.txt", "genes")
    Traceback (most recent call last):
    ldm.errors.UserError: `genes` (genes.txt) names two or more genes; got TP53.
    """
    source = ""
    if isinstance(genes, (str, Path)):
        source, text = f" ({genes})", read_text(genes, what)
        if Path(genes).suffix == ".json":
            told = parse_json(text, genes)
            if not isinstance(told, Mapping) or not isinstance(told.get("genes"), list):
                raise UserError(f"{genes} is no omics/<source>.json: it has no list `genes`.")
            genes = told["genes"]
        else:
            genes = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    check_shape(genes, [TEXT], f"`{what}`{source}")
    names = tuple(map(str, genes))
    if len(names) < 2:
        raise UserError(f"`{what}`{source} names two or more genes; got {', '.join(names) or 'none'}.")
    if dates := dates_among(names):
        raise UserError(
            f"`{what}`{source} has names that a spreadsheet turned into dates: {some(list(dates.values()), _SHOWN)}; "
            "write the genes' names."
        )
    if len(set(names)) < len(names):
        raise UserError(f"`{what}`{source} has {some(repeated(names), _SHOWN)} twice.")
    return names


def repeated(names: Iterable[str]) -> list[str]:
    """The names that are there more than once.

    >>> repeated(["TP53", "EGFR", "TP53"])
    ['TP53']
    """
    return [name for name, count in Counter(names).items() if count > 1]


@dataclass(frozen=True)
class Scaler:
    """The log2 values (G,) that became 0 and 1 of each gene."""

    path: Path
    genes: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray


def read_scaler(path: Path | str) -> Scaler:
    """The ranges of a cohort's omics/expression.json, or of the expression that a model folder was trained with.

    Raises:
        UserError: an unreadable file, no ranges in it, ranges that are not those of its genes.

    >>> told = '{"genes": ["TP53", "EGFR"], "scaler": {"low": [0, 1], "high": [5, 9]}}'
    >>> _ = Path("expression.json").write_text(told)
    >>> read_scaler("expression.json").high.tolist()
    [5.0, 9.0]
    """
    path = Path(path)
    file = path / "config.yaml" if path.is_dir() else path
    content = read_yaml(file, "`scaler` from")  # JSON is YAML
    about = _in_model(content, path) if path.is_dir() else content
    if not isinstance(about, Mapping) or not isinstance(about.get("scaler"), Mapping):
        raise UserError(
            f"{file} has no ranges of expression: a scaler is the omics/expression.json of a cohort whose expression "
            "was not in [0, 1] already, or the folder of a model that was trained with it."
        )
    genes = read_genes(about.get("genes") or (), "scaler")
    try:
        low, high = (np.array(about["scaler"][name], np.float64) for name in ("low", "high"))
        fits = low.shape == high.shape == (len(genes),) and bool((low < high).all())
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"the ranges in {file} are not a low and a higher high for each of its {len(genes)} genes.")
    return Scaler(path, genes, low, high)


def _in_model(content: Any, folder: Path) -> Mapping[str, Any] | None:
    """What the config of a model folder says of its expression, with the genes in the model's order."""
    metadata = content.get("metadata") if isinstance(content, Mapping) else None
    conditions = metadata.get("conditions") if isinstance(metadata, Mapping) else None
    known = conditions.values() if isinstance(conditions, Mapping) else ()
    found = [about for about in known if isinstance(about, Mapping) and about.get("scaler")]
    if len(found) != 1:
        return None
    files = sorted(folder.glob("*expression_genes.txt"))  # if several: those of conditioners that read the same values
    return {"genes": read_genes(files[0], "scaler") if files else (), **found[0]}
