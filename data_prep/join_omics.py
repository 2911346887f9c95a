r"""Join tables of mutations, gene expression and labels of samples to the slides of a cohort.

The cohort gets omics/mutation.parquet and expression.parquet, a .json beside each that says what it holds, and in
index.parquet the column `sample`; labels become columns of index.parquet. What joined and what did not is printed.
Tables are csv, tsv, parquet or h5ad, samples x genes or genes x samples, as of UCSC Xena or cBioPortal, or lists of
mutations (MAF). Slides and samples of TCGA join by their barcodes.

Examples:

    python -m data_prep.join_omics --cohort cohort --mutation mutation.tsv \
        --expression expression.tsv --genes genes.tsv
    python -m data_prep.join_omics --cohort cohort --labels samples.tsv \
        --columns acronym stage
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from data_prep.options import LicenceOption, choices, inputs, taken
from ldm.cli.script import script
from ldm.data.cohort import merge_index, read_index
from ldm.data.omics import DUPLICATES, join_omics, told
from ldm.data.sample_keys import LEVELS, join_keys
from ldm.errors import UserError, suggest
from ldm.tables.genes import ORIENTATIONS, UNITS
from ldm.tables.text import as_values, read_table

Level = choices("Level", LEVELS)
Orientation = choices("Orientation", ORIENTATIONS)
Unit = choices("Unit", UNITS)
Duplicates = choices("Duplicates", DUPLICATES)


def join_labels(
    cohort: Path | str, labels: Path | str, columns: Sequence[str], level: str = "auto", samples: str | None = None
) -> str:
    """Bring columns of a table of samples or patients (its first column names them) into the cohort's index.

    Text stays text; a column of numbers becomes numbers. A slide that does not join has none of these labels, also if
    an earlier table gave it some. Returns the report.

    Raises:
        UserError: an unknown column, a sample with two values, no slide in the table.
    """
    labels, frame, index = Path(labels), read_table(labels), read_index(cohort)
    for column in columns:
        if column not in frame.columns:
            raise UserError(f"{labels} has no column '{column}'{suggest(column, frame.columns)}")
        if column in ("slide", "row", "x", "y", "patient", "split", "sample"):
            raise UserError(f"'{column}' is a column that every cohort has; rename the one in {labels}.")
    if not columns:
        raise UserError(f"name the --columns of {labels} to take: {', '.join(frame.columns[1:])}.")
    rows, columns = len(frame), list(dict.fromkeys(columns))
    frame = frame.dropna(subset=[frame.columns[0]])
    if frame.empty:
        raise UserError(f"{labels} has no rows that name a sample or patient in the column {frame.columns[0]}.")
    ids, key, _, how = join_keys(index, [frame.iloc[:, 0].tolist()], level, samples)
    sample_of = {slide: key(name) for slide, name in ids.items() if name}
    known = frame[columns].set_axis(frame.iloc[:, 0].map(key))
    known = known[known.index.isin(set(sample_of.values()) - {None})]
    differ = (known.groupby(level=0).nunique(dropna=False) > 1).any(axis=1)
    if differ.any():
        raise UserError(f"{labels} has two different labels of {differ.idxmax()}; leave one of them.")
    known = known[~known.index.duplicated()]
    joined = {slide: sample for slide, sample in sample_of.items() if sample in known.index}
    if not joined:
        slide = next(iter(ids))
        raise UserError(
            f"no slide is in {labels}: a slide is called {slide}, a row {frame.iloc[0, 0]}; --samples says which "
            "sample a slide is of."
        )
    table = index[["slide", "row"]].copy()
    lines = [f"labels: {labels.name}, {rows} rows; {len(known)} samples or patients have slides; joined by {how}"]
    if rows > len(frame):
        lines.append(f"  rows that name no sample, left out: {rows - len(frame)}")
    for column in columns:
        values = as_values(known[column], labels)
        table[column] = table["slide"].map({slide: values[sample] for slide, sample in joined.items()})
        counts = table.drop_duplicates("slide")[column].value_counts()
        unknown = len(joined) - int(counts.sum())
        told_unknown = f"; unknown for {unknown} of the slides joined" if unknown else ""
        lines.append(f"  {column}: {told([f'{name} {count}' for name, count in counts.items()])}{told_unknown}")
    merge_index(cohort, table)
    others = [slide for slide in ids if slide not in joined]
    return "\n".join([*lines, f"  slides joined: {told(list(joined))}", f"  slides not joined: {told(others)}"])


@script("data_prep.join_omics", __doc__)
def main(
    cohort: Annotated[Path, inputs("--cohort", help="Cohort folder with tiles, which gets the tables.")],
    mutation: Annotated[
        Path | None, inputs("--mutation", help="Table of mutations: 1 mutated, 0 not, empty unknown; or a MAF list.")
    ] = None,
    expression: Annotated[
        Path | None,
        inputs("--expression", help="Table of gene expression, which is scaled to 0..1 by gene over training samples."),
    ] = None,
    labels: Annotated[
        Path | None, inputs("--labels", help="Table of labels of samples or patients; its first column names them.")
    ] = None,
    genes: Annotated[
        Path | None,
        inputs("--genes", help="Table of gene symbols, column `symbol`, with their Entrez or Ensembl ids in others."),
    ] = None,
    samples: Annotated[
        str | None,
        inputs("--samples", help="Which sample a slide is of: a column of index.parquet, or a CSV of slide, sample."),
    ] = None,
    orient: Annotated[
        Orientation, inputs("--orient", help="What a row of the tables is: a sample, or a gene.")
    ] = Orientation.auto,
    unit: Annotated[Unit, inputs("--unit", help="Unit of the expression; `unit` lies in 0..1 already.")] = Unit.auto,
    layer: Annotated[
        str | None,
        inputs("--layer", help="Matrix of an .h5ad file: X, raw or a layer (default: X; raw where X is scaled)."),
    ] = None,
    licence: LicenceOption = "",
    columns: Annotated[
        list[str] | None, taken("--columns", help="Columns of --labels to take: one or several.")
    ] = None,
    gene_list: Annotated[
        Path | None, taken("--gene-list", help="File with a gene symbol per line: only these genes, in this order.")
    ] = None,
    top_variable: Annotated[
        int | None, taken("--top-variable", help="Take only so many genes, those of the largest variance.")
    ] = None,
    scaler: Annotated[
        Path | None,
        taken(
            "--scaler", help="Take genes and ranges of the expression from another cohort's expression.json or a model."
        ),
    ] = None,
    level: Annotated[
        Level, taken("--level", help="Part of TCGA barcodes by which slides and samples join.")
    ] = Level.auto,
    duplicates: Annotated[
        Duplicates, taken("--duplicates", help="What a sample or gene that is given twice with other values becomes.")
    ] = Duplicates.error,
) -> None:
    if columns and labels is None:
        raise UserError("--columns are of a table of --labels; give it too.")
    if mutation is not None or expression is not None or labels is None:
        reports = join_omics(
            cohort,
            mutation,
            expression,
            genes=genes,
            gene_list=gene_list,
            top_variable=top_variable,
            level=level.value,
            orient=orient.value,
            unit=unit.value,
            samples=samples,
            duplicates=duplicates.value,
            scaler=scaler,
            licence=licence,
            layer=layer,
        )
        print(*reports.values(), sep="\n")
    if labels is not None:
        print(join_labels(cohort, labels, columns or [], level.value, samples))


if __name__ == "__main__":
    main.run()
