"""Genes and sets of genes: the names behind the values of omics conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError, some, suggest
from ldm.tables.gene_lists import read_genes, repeated
from ldm.tables.text import read_text

KINDS = ("mutation", "expression")
UNKNOWN = ("unknown", "nan", "na", "")
_SHOWN = 8


class GeneSource:
    """The genes of one omics source, in order, and the values that are given for them.

    Args:
        kind: mutation: 1 is mutated, 0 is not; expression: values in [0, 1]. NaN is unknown, a mutation of 2 too.
        genes: names, or the path of a text file (a name per line) or of a cohort's omics/<source>.json.
        key: batch key, and the name under which users give the values.
    """

    def __init__(self, kind: str, genes: Sequence[str] | str | Path, key: str):
        self.kind, self.key = kind, key
        self.genes = read_genes(genes, f"{kind}_genes")
        self._index = {name: index for index, name in enumerate(self.genes)}

    def __len__(self) -> int:
        return len(self.genes)

    def of(self, values: Any) -> Tensor:
        """A batch's values as a tensor (B,G), its shape checked."""
        values = torch.as_tensor(values)
        if values.ndim != 2 or values.shape[1] != len(self):
            raise UserError(
                f"'{self.key}' is an array (N, {len(self)}), a column for each of the model's genes in their order; "
                f"got shape {tuple(values.shape)}."
            )
        return values

    def read(self, value: Any) -> Tensor:
        """Values (N,G) of {"TP53": 1, ...}, of a list of N such, or of an array (G,) or (N,G) in gene order.

        Genes that are not named are unknown.
        """
        if hasattr(value, "to_dict"):  # pandas: its names count, not its order
            value = value.to_dict("records") if hasattr(value, "columns") else value.to_dict()
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            values = torch.full((len(value), len(self)), math.nan)
            for row, named in zip(values, value):
                for name, given in named.items():
                    row[self.index(name)] = self._number(name, given)
        else:
            try:
                values = torch.as_tensor(np.asarray(value, dtype=np.float32)).clone()
            except (TypeError, ValueError) as error:
                example = '{"TP53": 1}' if self.kind == "mutation" else '{"MKI67": 0.9}'
                raise UserError(f"'{self.key}' is given as {example}, or as an array; got {value!r:.80}.") from error
            values = self.of(values[None] if values.ndim == 1 else values)
        if self.kind == "mutation":
            values[values == 2] = math.nan
        self._check(values)
        return values

    def parse(self, text: str) -> dict[str, float]:
        """{"TP53": 1.0, "EGFR": nan} of "TP53:1,EGFR:unknown"."""
        values = {}
        for item in text.split(","):
            name, colon, number = item.strip().rpartition(":")
            if not (name and colon):
                example = "TP53:1,EGFR:0" if self.kind == "mutation" else "MKI67:0.9,PTEN:0.1"
                raise UserError(f"'{self.key}' is written {self.key}={example}; got '{item.strip()}'.")
            if name in values:
                raise UserError(f"'{self.key}' names the gene {name} twice.")
            values[name] = self._number(name, number)
        return values

    def index(self, name: str) -> int:
        """The column of a gene."""
        if name not in self._index:
            if str(name).upper() in self._index:
                raise UserError(f"the model has no gene '{name}' in '{self.key}'; did you mean '{str(name).upper()}'?")
            raise UserError(f"the model has no gene '{name}' in '{self.key}'{suggest(name, self.genes)}")
        return self._index[name]

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        """UserError if the data's columns are not the model's genes in the same order."""
        found = metadata.get("conditions", {}).get(self.key, {})
        if not found or tuple(genes := found.get("genes") or ()) == self.genes:
            return
        if not genes:
            raise UserError(
                f"the data take '{self.key}' from {found.get('source')}, which has no genes; name a source "
                "omics/<source>, as `python -m data_prep.join_omics` writes it."
            )
        lacking, surplus = (
            [name for name in these if name not in set(those)]
            for these, those in ((self.genes, genes), (genes, self.genes))
        )
        differ = [
            f"{what} {len(names)} ({some(names, _SHOWN)})"
            for what, names in (("the data lack", lacking), ("the model lacks", surplus))
            if names
        ]
        raise UserError(
            f"the genes of '{self.key}' in the data are not the model's: "
            + ("; ".join(differ) if differ else "they are the same in another order")
            + f". To train on these data, give the conditioner their omics/*.json as {self.kind}_genes; to keep the "
            "model's genes, write its list to a file and join the table again with --gene-list."
        )

    def _number(self, name: str, given: Any) -> float:
        if given is None or (isinstance(given, str) and given.strip().lower() in UNKNOWN):
            return math.nan
        try:
            value = float(given)
        except (TypeError, ValueError):
            raise UserError(f"'{self.key}' of {name} is {self._allowed()}; got {given!r}.") from None
        if self.kind == "mutation" and value == 2:
            return math.nan
        return value

    def _check(self, values: Tensor) -> None:
        within = (values == 0) | (values == 1) if self.kind == "mutation" else (values >= 0) & (values <= 1)
        known = values.isnan() | within
        if not known.all():
            row, column = (~known).nonzero()[0].tolist()
            hint = (
                " Scale log2 values by the gene's low and high in the cohort's omics/expression.json, as `python -m "
                "data_prep.join_omics` does for a table: (x - low) / (high - low), cut at 0 and 1."
                if self.kind == "expression"
                else ""
            )
            got = f"{float(values[row, column]):g}"
            raise UserError(f"'{self.key}' of {self.genes[column]} is {self._allowed()}; got {got}.{hint}")

    def _allowed(self) -> str:
        return "0, 1 or unknown" if self.kind == "mutation" else "a number in [0, 1], or unknown"


def read_gene_sets(sets: Mapping[str, Sequence[str]] | str | Path) -> dict[str, tuple[str, ...]]:
    r"""Name -> genes, of a mapping or of a GMT file: lines of name, description and genes, separated by tabs.

    Raises:
        UserError: an unreadable file, a line that is no gene set, a name twice, no set.

    >>> _ = Path("sets.gmt").write_text("DNA REPAIR\tfrom a review\tBRCA1\tATM\n")
    >>> read_gene_sets("sets.gmt")
    {'DNA REPAIR': ('BRCA1', 'ATM')}
    """
    if isinstance(sets, Mapping):
        named = [(str(name), list(genes)) for name, genes in sets.items()]
    else:
        named = []
        for number, line in enumerate(read_text(sets, "gene_sets").splitlines(), 1):
            if not line.strip():
                continue
            fields = [field.strip() for field in line.split("\t")]
            if len(fields) < 3:
                raise UserError(
                    f"{sets}, line {number} is no gene set; a GMT line is name, description and genes, separated by "
                    f"tabs; got '{line[:60]}'."
                )
            named.append((fields[0], fields[2:]))
    read = {name: tuple(dict.fromkeys(str(gene) for gene in genes if gene)) for name, genes in named}
    if len(read) < len(named):
        raise UserError(f"`gene_sets` has {some(repeated(name for name, _ in named), _SHOWN)} twice.")
    if not read:
        raise UserError(f"`gene_sets` names at least one set of genes; {sets} has none.")
    return read


def gmt_text(sets: Mapping[str, Sequence[str]]) -> str:
    r"""Gene sets as the text of a GMT file.

    >>> gmt_text({"DNA REPAIR": ("BRCA1", "ATM")})
    'DNA REPAIR\t\tBRCA1\tATM\n'
    """
    return "".join("\t".join([name, "", *genes]) + "\n" for name, genes in sets.items())
