"""Omics of a cohort: tables joined to slides, their values made fit for a model, and a report of what joined.

    <cohort>/omics/<source>.parquet    a row per joined sample (index `sample`), a column per gene (symbol), float32:
                                       mutation 0, 1; expression in [0, 1]; NaN is unknown
    <cohort>/omics/<source>.json       source, genes, entrez, unit, scaler (low and high by gene), level,
                                       n, licence, file, sha256, report (numbers only)
    <cohort>/index.parquet             column `sample`: which row a tile has
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldm.data.cohort import merge_index, read_index
from ldm.data.sample_keys import join_keys, kept_samples, mapped, one_row_each
from ldm.errors import UserError, some, suggest
from ldm.files import owned, sha256, whole, write_text
from ldm.tables.gene_dates import dates_among
from ldm.tables.gene_lists import Scaler, read_genes, read_scaler
from ldm.tables.genes import (
    QUANTILES,
    GeneNames,
    GeneTable,
    are_ids,
    barcode,
    gene_ranges,
    read_gene_table,
    to_log2,
)

DUPLICATES = ("error", "first", "mean")
_SHOWN = 10


@dataclass
class JoinReport:
    """What became of one table. Lists hold names, in the order of the table or of the cohort."""

    source: str
    file: str
    layout: str
    how: str
    unit: str
    samples: int
    genes: int
    joined: list[str] = field(default_factory=list)  # slides
    not_joined: list[str] = field(default_factory=list)
    other_tissue: list[str] = field(default_factory=list)  # slides joined to another sample of their patient
    unused: list[str] = field(default_factory=list)  # samples of the table that no slide has
    merged: list[str] = field(default_factory=list)  # samples and genes that the table had more than once
    unknown_genes: list[str] = field(default_factory=list)  # that --genes does not know
    lacking_genes: list[str] = field(default_factory=list)  # of --gene-list or --scaler
    nameless_genes: list[str] = field(default_factory=list)
    dated_genes: list[str] = field(default_factory=list)  # that a spreadsheet turned into dates
    empty_genes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.file}, {self.samples} samples x {self.genes} genes; {self.layout}",
            f"  values: {self.unit}",
            f"  joined by {self.how}",
            f"  slides joined: {told(self.joined)}",
            f"  slides not joined: {told(self.not_joined)}",
            f"  samples of the table that no slide has: {told(self.unused, 3)}",
        ]
        for what, names in {
            "slides joined to another sample of their patient (another tissue?)": self.other_tissue,
            "more than once in the table, made one": self.merged,
            "genes that --genes does not know (ids of them are left out)": self.unknown_genes,
            "genes asked for that the table lacks, unknown in every sample": self.lacking_genes,
            "genes whose names a spreadsheet turned into dates, left out; correct them": self.dated_genes,
            "genes without a symbol, left out": self.nameless_genes,
            "genes without a known value, left out": self.empty_genes,
        }.items():
            lines += [f"  {what}: {told(names)}"] if names else []
        return "\n".join(lines)

    def counts(self) -> dict[str, int]:
        """The report in numbers, without names of slides and samples: it travels with models."""
        return {
            name: len(value) if isinstance(value, list) else value
            for name, value in vars(self).items()
            if isinstance(value, (list, int))
        }


def join_omics(
    cohort: Path | str,
    mutation: Path | str | None = None,
    expression: Path | str | None = None,
    *,
    genes: Path | str | None = None,
    gene_list: Path | str | None = None,
    top_variable: int | None = None,
    level: str = "auto",
    orient: str = "auto",
    unit: str = "auto",
    samples: str | None = None,
    duplicates: str = "error",
    scaler: Path | str | None = None,
    licence: str = "",
    layer: str | None = None,
) -> dict[str, JoinReport]:
    """Join tables of mutations and expression to the slides of a cohort, and write them beside it.

    Args:
        mutation, expression: tables as `ldm.tables.genes.read_gene_table` takes them.
        genes: table with a column `symbol` and columns of gene ids.
        gene_list: file with a gene per line: these, in this order; those that a table lacks are unknown everywhere.
        top_variable: only so many genes, those of the largest variance over training samples.
        level: which part of a TCGA barcode joins: patient (12 characters), sample (15) or, where all have it, sample.
        orient: what the tables' rows are: samples, genes or auto. unit: of the expression, one of UNITS.
        samples: where a slide's sample is named: a column of the index, or a CSV with columns slide, sample.
        duplicates: what becomes of a sample or gene that a table has twice with different values: error, first, mean
            (of mutations: mutated in either).
        scaler: omics/expression.json of another cohort, or a model folder: the expression gets its genes, in their
            order, and is scaled by its ranges; else by those of the training samples.
        licence: of the tables; recorded. layer: the matrix of tables that are h5ad files, see `read_gene_table`.
    Raises:
        UserError: whatever cannot be joined or read without guessing; nothing is written then.

    >>> join_omics("cohort")
    Traceback (most recent call last):
    ldm.errors.UserError: give a table: --mutation, --expression or both.
    """
    given = {"mutation": mutation, "expression": expression}
    paths = {source: Path(path) for source, path in given.items() if path is not None}
    if not paths:
        raise UserError("give a table: --mutation, --expression or both.")
    if gene_list is not None and top_variable is not None:
        raise UserError("--gene-list and --top-variable both choose the genes; give one of them.")
    if scaler is not None and (expression is None or gene_list is not None or top_variable is not None):
        raise UserError("--scaler is of --expression, and says its genes: no --gene-list or --top-variable with it.")
    index = read_index(cohort)
    slides = one_row_each(index)
    names = GeneNames(genes) if genes is not None else None
    wanted = None if gene_list is None else read_genes(gene_list, "--gene-list")
    ranges = None if scaler is None else read_scaler(scaler)
    known = {*slides.index, *(Path(slide).stem for slide in slides.index), *slides["patient"].astype(str)}
    if samples is not None:
        known |= {name for name in mapped(slides, index, samples).values() if name}
    tables = {source: read_gene_table(path, source, orient, known, names, layer) for source, path in paths.items()}
    ids, key, level, how = join_keys(index, [table.samples for table in tables.values()], level, samples)
    sample_of = {slide: key(name) if name else None for slide, name in ids.items()}
    held_out = index[index["split"].isin(["val", "test"])]["slide"].unique()
    held = {name for slide in held_out for name in (sample_of[slide], slides["patient"][slide]) if name}
    made = {
        source: _Join(source, path, key, level, how, duplicates).of(
            tables[source], sample_of, held, names, wanted, top_variable, unit, ids,
            ranges if source == "expression" else None,
        )
        for source, path in paths.items()
    }
    joined = {source: set(frame.index) for source, (frame, _, _) in made.items()}
    kept = kept_samples(Path(cohort), index, sample_of, joined)
    folder = Path(cohort) / "omics"
    with owned(folder, otherwise="stop it"):
        for source, (frame, about, report) in made.items():
            with whole(folder / f"{source}.parquet") as part:
                frame.to_parquet(part)
            origin = {"licence": licence, "file": paths[source].name, "sha256": sha256(paths[source])}
            write_text(folder / f"{source}.json", json.dumps(about | origin | {"report": report.counts()}, indent=1))
        merge_index(cohort, index[["slide", "row"]].assign(sample=index["slide"].map({**sample_of, **kept})))
    return {source: report for source, (_, _, report) in made.items()}


@dataclass
class _Join:
    """One table on its way into a cohort."""

    source: str
    path: Path
    key: Callable[[str], str | None]
    level: str
    how: str
    duplicates: str

    def of(
        self, table: GeneTable, sample_of: Mapping[str, str | None], held: set[str], names: GeneNames | None,
        wanted: Sequence[str] | None, top_variable: int | None, unit: str, ids: Mapping[str, str | None],
        ranges: Scaler | None,
    ) -> tuple[pd.DataFrame, dict[str, Any], JoinReport]:  # fmt: skip
        """Values of joined samples, what the JSON file says, and the report."""
        report = JoinReport(
            self.source, self.path.name, table.layout, self.how, "", len(table.samples), len(table.genes)
        )
        if self.source == "mutation":
            self._check_mutations(table)
        slides_of = defaultdict(list)
        for slide, sample in sample_of.items():
            slides_of[sample].append(slide)
        values, raw, keys = self._one_row_each(table, set(slides_of) - {None}, report)
        values, genes, entrez = self._named(table, values, names, report)
        joined = np.array([k is not None and k in slides_of for k in keys])
        self._report_joins(report, sample_of, raw, keys, joined, ids)
        training = np.array([k not in held and (barcode(r) or (r,))[0] not in held for r, k in zip(raw, keys)])
        if self.source == "expression":
            values, unit, report.unit = to_log2(values, unit, self.path.name)
            if unknown := int(np.isnan(values).sum()):
                report.unit += f", {unknown} of {values.size} unknown"
        else:
            unit, report.unit = "calls", f"{int(np.nansum(values))} mutated, {int(np.isnan(values).sum())} unknown"
        frame = pd.DataFrame(values, index=pd.Index(keys, name="sample", dtype=object), columns=genes)
        if ranges is not None:
            if unit == "unit":
                raise UserError(
                    f"{self.path} has values in [0, 1], which --scaler would scale again. Say --unit log2 if they are "
                    "logs, or leave --scaler out."
                )
            wanted = ranges.genes
        frame = self._chosen(frame, training, wanted, "--gene-list" if ranges is None else "--scaler", top_variable,
                             report)  # fmt: skip
        scaler = None
        if self.source == "expression" and unit != "unit":
            if ranges is None:
                low, high = self._ranges(frame, training)
                whose = (
                    f"the {QUANTILES[0]:.0%} and {QUANTILES[1]:.0%} quantiles of {training.sum()} samples (all but "
                    "those of val and test)"
                )
            else:
                low, high, whose = ranges.low, ranges.high, f"the ranges of {ranges.path.name}"
            frame = ((frame[joined] - low) / (high - low)).clip(0, 1)
            scaler = {"low": [float(f"{x:.6g}") for x in low], "high": [float(f"{x:.6g}") for x in high]}
            report.unit += f"; scaled to [0, 1] between {whose}"
        else:
            frame = frame[joined]
        frame = frame.astype(np.float32)
        number = dict(zip(genes, entrez))
        about = {
            "source": self.source,
            "genes": frame.columns.tolist(),
            "entrez": [number.get(gene) or (names.entrez(gene) if names else None) for gene in frame.columns],
            "unit": unit,
            "scaler": scaler,
            "level": self.level,
            "n": len(frame),
        }
        return frame, about, report

    def _ranges(self, frame: pd.DataFrame, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if training.sum() < 3:
            raise UserError(
                f"{self.path}: only {training.sum()} samples are not of the splits val and test; the range of a gene "
                "is learnt from 3 or more. Give the whole table; the ranges of another cohort or of a model as "
                "--scaler; or values in [0, 1] as --unit unit."
            )
        return gene_ranges(frame.to_numpy()[training])

    def _check_mutations(self, table: GeneTable) -> None:
        wrong = ~(np.isnan(table.values) | (table.values == 0) | (table.values == 1))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise UserError(
                f"{self.path}: the mutation of {table.genes[column]} in {table.samples[row]} is "
                f"{table.values[row, column]:g}; a mutation is 1, 0, or empty where it is unknown "
                f"({int(wrong.sum())} of {wrong.size} values are others). Is it a table of expression or of counts?"
            )

    def _one_row_each(
        self, table: GeneTable, joining: set[str], report: JoinReport
    ) -> tuple[np.ndarray, list[str], list[str | None]]:
        """Values, names in the table and join keys of samples, each that joins once."""
        keys = [self.key(name) for name in table.samples]
        groups = defaultdict(list)
        for row, (name, key) in enumerate(zip(table.samples, keys)):
            groups[key if key in joining else ("not joined", name)].append(row)
        kept = [rows[0] for rows in groups.values()]
        values = table.values if len(kept) == len(keys) else table.values[kept]
        for at, (rows, key) in enumerate(zip(groups.values(), groups)):
            if len(rows) > 1:
                called = list(dict.fromkeys(table.samples[row] for row in rows))
                several = f"{', '.join(called)}, which are all {key},"
                what = f"the sample {called[0]} {len(rows)} times" if len(called) == 1 else several
                values[at] = self._one(table.values[rows], what)
                report.merged.append(called[0] if len(called) == 1 else str(key))
        return values, [table.samples[row] for row in kept], [keys[row] for row in kept]

    def _one(self, rows: np.ndarray, what: str) -> np.ndarray:
        """One row of several: they are the same, or `duplicates` says which."""
        if self.duplicates == "error" and any(not np.array_equal(rows[0], row, equal_nan=True) for row in rows[1:]):
            raise UserError(
                f"{self.path} has {what} with different values. Say --duplicates first to take the first of them, or "
                "--duplicates mean."
            )
        if self.duplicates != "mean":
            return rows[0]
        frame = pd.DataFrame(rows)
        return (frame.max() if self.source == "mutation" else frame.mean()).to_numpy()

    def _named(
        self, table: GeneTable, values: np.ndarray, names: GeneNames | None, report: JoinReport
    ) -> tuple[np.ndarray, list[str], list[str | None]]:
        """Values by symbols, each once."""
        ids = are_ids(table.genes)
        if ids and names is None:
            raise UserError(
                f"{self.path} names genes by ids, as {table.genes[0]}, and models name them by symbols: give --genes, "
                "a table with a column of these ids and a column `symbol`."
            )
        named = [
            (gene, found, gene if found is None and not ids else found or "")
            for gene, found in zip(table.genes, names.of(table.genes) if names else table.genes)
        ]
        dates, symbols = dates_among([symbol for _, _, symbol in named]), []
        for gene, found, symbol in named:
            symbols.append("" if symbol in dates else symbol)
            if symbol in dates:
                report.dated_genes.append(dates[symbol])
            elif found is None:
                report.unknown_genes.append(gene)
            elif not symbols[-1]:
                report.nameless_genes.append(gene or "?")
        if not any(symbols):
            whose = f"{names.path} knows no gene" if names else "no name of a gene is left"
            raise UserError(f"{whose} of {self.path}, which are called {table.genes[0]}, ...")
        groups = defaultdict(list)
        for column, symbol in enumerate(symbols):
            groups[symbol].append(column)
        groups.pop("", None)
        firsts = [columns[0] for columns in groups.values()]
        kept = values[:, firsts]
        for at, (symbol, columns) in enumerate(groups.items()):
            if len(columns) > 1:
                kept[:, at] = self._one(values[:, columns].T, f"the gene {symbol} {len(columns)} times")
                report.merged.append(symbol)
        entrez = [table.entrez[c] or (table.genes[c] if table.genes[c].isdigit() else None) for c in firsts]
        return kept, list(groups), entrez

    def _report_joins(
        self, report: JoinReport, sample_of: Mapping[str, str | None], raw: Sequence[str],
        keys: Sequence[str | None], joined: np.ndarray, ids: Mapping[str, str | None],
    ) -> None:  # fmt: skip
        own = {key: name for key, name, used in zip(keys, raw, joined) if used}
        if not own:
            slide, sample = next(iter(sample_of.items()))
            named = f" ({sample})" if sample and sample != slide else ""
            patients = {found[0] for name in ids.values() if name and (found := barcode(name))}
            hint = (
                " Their patients are in it: --level patient would join them."
                if patients & {found[0] for name in raw if (found := barcode(name))}
                else " Name the slides' samples with --samples."
            )
            meets = f"a slide is called {slide}{named}, a sample of the table {raw[0]}"
            raise UserError(f"no slide is in {self.path}: {meets}.{hint}")
        report.joined = [slide for slide, sample in sample_of.items() if sample in own]
        report.not_joined = [slide for slide, sample in sample_of.items() if sample not in own]
        report.unused = [name for name, used in zip(raw, joined) if not used]
        for slide in report.joined:
            mine, its = barcode(ids[slide] or ""), barcode(own[sample_of[slide]])
            if mine and its and mine[1] and its[1] and mine[1] != its[1]:
                report.other_tissue.append(slide)

    def _chosen(
        self, frame: pd.DataFrame, training: np.ndarray, wanted: Sequence[str] | None, option: str,
        top_variable: int | None, report: JoinReport,
    ) -> pd.DataFrame:  # fmt: skip
        """The genes that `option` asks for, or those with a value in a training sample (in any, if there is none)."""
        if wanted is not None:
            lacking = [gene for gene in wanted if gene not in frame.columns]
            if len(lacking) == len(wanted):
                raise UserError(f"{self.path} has none of the genes of {option}{suggest(wanted[0], frame.columns)}")
            near = {gene: get_close_matches(gene, frame.columns, 1, 0.8) for gene in lacking[:_SHOWN]}
            report.lacking_genes = [f"{gene} (is it {near[gene][0]}?)" if near.get(gene) else gene for gene in lacking]
            return frame.reindex(columns=list(wanted))
        training = training if training.any() else np.ones(len(frame), bool)
        empty = frame.columns[frame[training].isna().all()]
        report.empty_genes = empty.tolist()
        frame = frame.drop(columns=empty)
        if frame.empty:
            raise UserError(f"{self.path} has no gene with a known value in the samples that are not val or test.")
        if top_variable is not None:
            if not 2 <= top_variable <= frame.shape[1]:
                raise UserError(f"--top-variable lies in 2..{frame.shape[1]}, the genes there are; got {top_variable}.")
            top = set(frame[training].var().nlargest(top_variable).index)
            frame = frame[[gene for gene in frame.columns if gene in top]]
        return frame


def told(names: Sequence[str], shown: int = _SHOWN) -> str:
    """How many names, and the first of them.

    >>> told(["a", "b", "c"], shown=2), told([])
    ('3 (a, b, ...)', 'none')
    """
    return f"{len(names)} ({some(names, shown)})" if names else "none"
