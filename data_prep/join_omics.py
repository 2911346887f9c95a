"""Join tables of mutations, gene expression and labels of samples to the slides of a cohort.

    python -m data_prep.join_omics --cohort cohort --mutation mutation.tsv --expression expression.tsv --genes genes.tsv
    python -m data_prep.join_omics --cohort cohort --labels samples.tsv --columns acronym

writes cohort/omics/mutation.parquet and expression.parquet, what they are (.json), and the column `sample` of
cohort/index.parquet; labels become columns of that index. It prints what joined and what did not. Tables: csv, tsv,
parquet, h5ad; samples x genes or genes x samples; UCSC Xena's, cBioPortal's, lists of mutations (MAF). Slides and
samples of TCGA join by their barcodes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ldm.data.cohort import merge_index, read_index
from ldm.data.omics import DUPLICATES, LEVELS, join_keys, join_omics, told
from ldm.errors import UserError, run_command, suggest
from ldm.tables.genes import ORIENTATIONS, UNITS, text_table


def join_labels(
    cohort: Path | str, labels: Path | str, columns: Sequence[str], level: str = "auto", samples: str | None = None
) -> str:
    """Bring columns of a table of samples or patients (its first column names them) into the cohort's index.

    Text stays text; a column of numbers becomes numbers. A slide that does not join has none of these labels, also if
    an earlier table gave it some. Returns the report.

    Raises:
        UserError: an unknown column, a sample with two values, no slide in the table.
    """
    labels, frame, index = Path(labels), text_table(Path(labels)), read_index(cohort)
    for column in columns:
        if column not in frame.columns:
            raise UserError(f"{labels} has no column '{column}'{suggest(column, frame.columns)}")
        if column in ("slide", "row", "x", "y", "patient", "split", "sample"):
            raise UserError(f"'{column}' is a column that every cohort has; rename the one of {labels}.")
    if not columns:
        raise UserError(f"name the --columns of {labels} to take: {', '.join(frame.columns[1:])}.")
    frame, columns = frame.dropna(subset=[frame.columns[0]]), list(dict.fromkeys(columns))
    if frame.empty:
        raise UserError(f"{labels} has no rows.")
    ids, key, _, how = join_keys(index, [frame.iloc[:, 0].tolist()], level, samples)
    sample_of = {slide: key(name) for slide, name in ids.items() if name}
    known = frame[columns].set_axis(frame.iloc[:, 0].map(key))
    known = known[known.index.isin(set(sample_of.values()) - {None})]
    differ = (known.groupby(level=0).nunique(dropna=False) > 1).any(axis=1)
    if differ.any():
        raise UserError(f"{labels} has different labels of {differ.idxmax()}.")
    known = known[~known.index.duplicated()]
    joined = {slide: sample for slide, sample in sample_of.items() if sample in known.index}
    if not joined:
        slide = next(iter(ids))
        raise UserError(f"no slide is in {labels}: a slide is called {slide}, a row {frame.iloc[0, 0]}. See --samples.")
    table = index[["slide", "row"]].copy()
    lines = [f"labels: {labels.name}; joined by {how}"]
    for column in columns:
        values = known[column]
        numbers = pd.to_numeric(values, errors="coerce")
        values = numbers if (numbers.notna() | values.isna()).all() else values
        table[column] = table["slide"].map({slide: values[sample] for slide, sample in joined.items()})
        counts = table.drop_duplicates("slide")[column].value_counts()
        lines.append(f"  {column}: {told([f'{name} {count}' for name, count in counts.items()])}")
    merge_index(cohort, table)
    others = [slide for slide in ids if slide not in joined]
    return "\n".join([*lines, f"  slides joined: {told(list(joined))}", f"  slides not joined: {told(others)}"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.join_omics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cohort", required=True, metavar="FOLDER", help="cohort folder with tiles")
    add("--mutation", metavar="TABLE", help="1 mutated, 0 not, empty unknown; or a MAF list")
    add("--expression", metavar="TABLE", help="scaled to [0, 1] by gene: --scaler, or all but val and test")
    add("--labels", metavar="TABLE", help="labels of samples or patients; its first column names them")
    add("--columns", nargs="+", default=(), metavar="NAME", help="columns of --labels to bring into the index")
    add("--genes", metavar="TABLE", help="gene ids (Entrez, Ensembl) to symbols: a column `symbol`, and columns of ids")
    add("--gene-list", metavar="FILE", help="only these genes, in this order: one symbol per line")
    add("--top-variable", type=int, metavar="N", help="only the N genes of the largest variance")
    add("--level", choices=LEVELS, default="auto", help="part of TCGA barcodes that joins (default %(default)s)")
    add("--orient", choices=ORIENTATIONS, default="auto", help="what the rows of the tables are (default %(default)s)")
    add("--unit", choices=UNITS, default="auto", help="of the expression; unit is in [0, 1] (default %(default)s)")
    add("--samples", metavar="COLUMN|CSV", help="slides' samples: a column of the index, or a CSV of slide, sample")
    add("--duplicates", choices=DUPLICATES, default="error", help="samples or genes given twice (default %(default)s)")
    add("--scaler", metavar="PATH", help="genes and ranges of the expression: expression.json of a cohort, or a model")
    add("--licence", default="", help="of the tables; recorded with them")
    args = vars(parser.parse_args(argv))
    labels, columns = args.pop("labels"), args.pop("columns")
    if columns and not labels:
        raise UserError("--columns are of a table of --labels; give it too.")
    if args["mutation"] or args["expression"] or not labels:
        for report in join_omics(**args).values():
            print(report)
    if labels:
        print(join_labels(args["cohort"], labels, columns, args["level"], args["samples"]))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
