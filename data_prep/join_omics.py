"""Join tables of mutations and gene expression to the slides of a cohort.

    python -m data_prep.join_omics --cohort cohort --mutation mutation.tsv --expression expression.tsv --genes genes.tsv

writes cohort/omics/mutation.parquet and expression.parquet, what they are (.json), and the column `sample` of
cohort/index.parquet; it prints what joined and what did not. Tables: csv, tsv, parquet, h5ad; samples x genes or genes
x samples; UCSC Xena's, cBioPortal's, lists of mutations (MAF). Slides and samples of TCGA join by their barcodes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ldm.data.genes import ORIENTATIONS, UNITS
from ldm.data.omics import DUPLICATES, LEVELS, join_omics
from ldm.errors import run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.join_omics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cohort", required=True, metavar="FOLDER", help="cohort folder with tiles")
    add("--mutation", metavar="TABLE", help="1 mutated, 0 not, empty unknown; or a MAF list")
    add("--expression", metavar="TABLE", help="scaled to [0, 1] by gene, over all samples but those of val and test")
    add("--genes", metavar="TABLE", help="gene ids (Entrez, Ensembl) to symbols: a column `symbol`, and columns of ids")
    add("--gene-list", metavar="FILE", help="only these genes, in this order: one symbol per line")
    add("--top-variable", type=int, metavar="N", help="only the N genes of the largest variance")
    add("--level", choices=LEVELS, default="auto", help="part of TCGA barcodes that joins (default %(default)s)")
    add("--orient", choices=ORIENTATIONS, default="auto", help="what the rows of the tables are (default %(default)s)")
    add("--unit", choices=UNITS, default="auto", help="of the expression; unit is in [0, 1] (default %(default)s)")
    add("--samples", metavar="COLUMN|CSV", help="slides' samples: a column of the index, or a CSV of slide, sample")
    add("--duplicates", choices=DUPLICATES, default="error", help="samples or genes given twice (default %(default)s)")
    add("--licence", default="", help="of the tables; recorded with them")
    for report in join_omics(**vars(parser.parse_args(argv))).values():
        print(report)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
