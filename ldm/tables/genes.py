"""Tables of omics as users have them: matrices either way round, cBioPortal's, MAF, h5ad; their values and units."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ldm.errors import UserError, note
from ldm.tables.h5ad import read_h5ad
from ldm.tables.parquet import read_parquet
from ldm.tables.text import (
    Form,
    as_values,
    find_form,
    read_chunks,
    read_table,
    tell_rows,
    text_columns,
    without_placeholders,
)

ORIENTATIONS = ("auto", "samples", "genes")
UNITS = ("auto", "log2", "unit", "counts")
QUANTILES = (0.01, 0.99)
LARGEST_LOG2 = 30.0  # no count is 2^30 times another
SMALLEST_LOG2 = 6.0  # log2 of 2^64: a whole table below it has been logged twice
TCGA = re.compile(r"TCGA[-.](\w{2})[-.](\w{4})(?![A-Za-z0-9])(?:[-.](\d{2})(?![0-9]))?", re.IGNORECASE)
NON_SILENT = frozenset(
    "missense_mutation nonsense_mutation nonstop_mutation frame_shift_del frame_shift_ins in_frame_del in_frame_ins "
    "splice_site translation_start_site de_novo_start_inframe de_novo_start_outofframe start_codon_snp start_codon_del "
    "start_codon_ins stop_codon_del stop_codon_ins".split()
)
_SYMBOL = re.compile(r"[A-Z][A-Z0-9]+(?:[-.][A-Z0-9]+)*|C\d+orf\d+")
_ID = re.compile(r"\d+|ENSG\d+(\.\d+)?")
_GENE_COLUMNS = ("hugo_symbol", "entrez_gene_id", "cytoband")
_SYMBOL_COLUMNS = ("symbol", "hugo_symbol", "gene_symbol", "gene_name", "gene")
_CHUNK = 1000


@dataclass
class GeneTable:
    """Values (S,G) float32 of samples and genes by the names that the file has. NaN is unknown."""

    samples: list[str]
    genes: list[str]  # symbols or ids; "" where the file has none
    entrez: list[str | None]
    values: np.ndarray
    layout: str  # how it was read, and why so


class GeneNames:
    """The symbols of gene ids, from a table with a column of symbols and columns of Entrez or other ids."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        frame = read_table(self.path)
        named = {name.lower(): name for name in frame.columns}
        symbol = next((named[name] for name in _SYMBOL_COLUMNS if name in named), None)
        if symbol is None:
            raise UserError(f"{path} has no column `symbol`; its columns are {', '.join(frame.columns)}.")
        self._columns = {name: _without_version(frame[name]) for name in frame.columns}
        self._symbols = frame[symbol]
        self.symbols = set(frame[symbol].dropna())
        entrez = next((frame[named[n]] for n in named if "entrez" in n or n == "geneid"), None)
        self._entrez = {} if entrez is None else dict(zip(frame[symbol], entrez))

    def known(self, genes: Sequence[str]) -> float:
        """The share of genes that the column which knows most of them knows."""
        ids = _without_version(pd.Series(genes, dtype=object))
        return max(float(ids.isin(column).mean()) for column in self._columns.values())

    def of(self, genes: Sequence[str]) -> list[str | None]:
        """Symbols of ids; "" where the table has none, None for an unknown id. Symbols stay as they are."""
        ids = _without_version(pd.Series(genes, dtype=object))
        if ids.isin(self.symbols).mean() >= max(ids.isin(c).mean() for c in self._columns.values()):
            return [gene if gene in self.symbols else None for gene in genes]
        column = max(self._columns.values(), key=lambda column: ids.isin(column).sum())
        symbol = dict(zip(column, self._symbols.fillna("")))
        return [symbol.get(gene) for gene in ids]

    def entrez(self, symbol: str) -> str | None:
        found = self._entrez.get(symbol)
        return None if found is None or pd.isna(found) else str(found)


def barcode(name: str) -> tuple[str, str | None] | None:
    """Patient (12 characters) and sample (15, or None) of the TCGA barcode that `name` begins with; None if none.

    >>> barcode("TCGA-CR-7395-01Z-00-DX1.svs"), barcode("tcga.cr.7395"), barcode("CMU-1.svs")
    (('TCGA-CR-7395', 'TCGA-CR-7395-01'), ('TCGA-CR-7395', None), None)
    """
    found = TCGA.match(name)
    if not found:
        return None
    patient = f"TCGA-{found[1]}-{found[2]}".upper()
    return patient, f"{patient}-{found[3]}" if found[3] else None


def read_gene_table(
    path: Path | str, kind: str, orient: str = "auto", samples: Collection[str] = (), names: GeneNames | None = None,
    layer: str | None = None,
) -> GeneTable:  # fmt: skip
    r"""Read a table of mutations or expression.

    Args:
        path: .csv, .tsv, .txt (also .gz), .parquet or .h5ad. A matrix of samples x genes or genes x samples whose first
            column names the rows; cBioPortal's (Hugo_Symbol, Entrez_Gene_Id, a column per sample); or a MAF list of
            mutations. Leading lines that start with # are skipped.
        kind: mutation or expression. orient: what the rows are (samples, genes), or auto.
        samples: names by which samples are known. names: symbols of gene ids.
        layer: the matrix of an h5ad file, see `ldm.tables.h5ad.read_h5ad`.
    Raises:
        UserError: an unreadable file, cells that are no numbers, an orientation that the names contradict.

    >>> _ = Path("t.csv").write_text("gene,p_1,p_2\nTP53,1,0\nEGFR,0,\n")
    >>> table = read_gene_table("t.csv", "mutation", samples=["p_1"])
    >>> table.samples, table.genes, table.values.tolist()
    (['p_1', 'p_2'], ['TP53', 'EGFR'], [[1.0, 0.0], [0.0, nan]])
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no table at {path}.")
    if path.suffix == ".h5ad":
        rows, columns, values, said = read_h5ad(path, layer)
    else:
        parquet = _parquet(path) if path.suffix == ".parquet" else None
        form = find_form(path) if parquet is None else None
        header = form.header if parquet is None else parquet.columns.tolist()
        if len(header) < 2:
            raise UserError(f"{path} is no table of columns separated by tabs or commas; it begins '{header[0][:60]}'.")
        said = f"{len(parquet)} rows of {len(header)} columns" if form is None else form.words
        low = [name.lower() for name in header]
        if {"hugo_symbol", "tumor_sample_barcode"} <= set(low):
            if kind != "mutation":
                raise UserError(f"{path} is a list of mutations (MAF); give it as --mutation.")
            return _from_maf(path, read_table(path) if parquet is None else without_placeholders(parquet))
        text = [i for i, name in enumerate(low) if name in _GENE_COLUMNS] or [0]
        ids, columns, values = _read_text(form, text) if parquet is None else _read_parquet(path, parquet, text)
        if len(low) > len(text) and low[text[0]] in _GENE_COLUMNS:
            return _from_cbioportal(path, ids, columns, values, orient, said)
        rows = ids.iloc[:, 0].fillna("").tolist()
    flip, reason = _orientation(path, rows, columns, orient, set(samples), names, path.suffix == ".h5ad")
    if flip:
        rows, columns, values = columns, rows, values.T
    genes = [gene.partition("|") for gene in columns]  # TP53|7157
    return GeneTable(
        rows,
        ["" if gene[0] == "?" else gene[0] for gene in genes],
        [gene[2] if gene[2].isdigit() else None for gene in genes],
        np.ascontiguousarray(values),
        f"{'columns' if flip else 'rows'} are samples ({reason}); {said}",
    )


def are_ids(genes: Sequence[str]) -> bool:
    """Whether most genes are Entrez or Ensembl ids and not symbols.

    >>> are_ids(["7157", "ENSG00000141510.16", "TP53"]), are_ids(["TP53", "EGFR"])
    (True, False)
    """
    return bool(np.mean([bool(_ID.fullmatch(gene)) for gene in genes]) > 0.5)


def to_log2(values: np.ndarray, unit: str, name: str) -> tuple[np.ndarray, str, str]:
    """Expression (S,G) in log2 (or in [0, 1] as it is), its unit, and what was found and done.

    Raises:
        UserError: values that cannot be of that unit: negative counts, logs of logs, numbers too large for logs,
            z-scores.

    >>> values, unit, told = to_log2(np.array([[0.0, 7.0], [63.0, 1.0]]), "auto", "t.csv")
    >>> values.tolist(), unit, told
    ([[0.0, 3.0], [6.0, 1.0]], 'counts', '0 .. 63, counts, made log2(x + 1) (detected)')
    """
    known = values[~np.isnan(values)]
    if not len(known) or not np.isfinite(known).all():
        raise UserError(f"{name} has {'infinite' if len(known) else 'no'} values; expression is a number, or empty.")
    low, high, whole_numbers = float(known.min()), float(known.max()), bool((known == np.round(known)).all())
    says, told = f"{name} has values from {low:g} to {high:g}", unit != "auto"
    if unit == "auto":
        if _are_z_scores(values):
            raise UserError(
                f"{says}, and most genes have a mean of 0 and a deviation of 1: they look like z-scores, which cannot "
                "be compared with expression elsewhere. Give the table from before, as of an h5ad by --layer; or say "
                "--unit log2 to take them as they are."
            )
        counts = low >= 0 and (high > LARGEST_LOG2 or (whole_numbers and high > 1))
        unit = "unit" if low >= 0 and high <= 1 else "counts" if counts else "log2"
    if unit == "unit" and not 0 <= low <= high <= 1:
        raise UserError(f"{says}; values of unit 'unit' lie in [0, 1]. Say --unit log2 or --unit counts.")
    if unit == "counts" and low < 0:
        raise UserError(f"{says}; counts are not negative. Is it log2 already? Say --unit log2.")
    if unit == "counts" and high < LARGEST_LOG2 and not whole_numbers:
        raise UserError(
            f"{says}, fractions among them: they look like logs already, and as counts they would be logged twice. "
            "Say --unit log2."
        )
    if unit == "log2" and high > LARGEST_LOG2:
        raise UserError(f"{says}, too large for log2. Say --unit counts, or scale them to [0, 1].")
    if unit == "log2" and low >= 0 and high < SMALLEST_LOG2:
        raise UserError(
            f"{says}: they look as if they were logged twice. Give the table before its second log; values that are "
            "right as they are can be scaled to [0, 1] and given as --unit unit."
        )
    done = {"unit": "in [0, 1] as they are", "log2": "log2", "counts": "counts, made log2(x + 1)"}[unit]
    values = np.log2(values + 1) if unit == "counts" else values
    return values, unit, f"{low:g} .. {high:g}, {done}{'' if told else ' (detected)'}"


def _are_z_scores(values: np.ndarray) -> bool:
    """Whether genes of values (S,G) have been shifted to a mean of 0 and scaled to a deviation of 1."""
    if len(values) < 5:
        return False
    frame = pd.DataFrame(values)
    mean, deviation = frame.mean().abs(), frame.std()
    return bool(((mean < 0.05) & ((deviation - 1).abs() < 0.15)).mean() > 0.5)


def gene_ranges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Robust low and high (G,) of values (S,G). A gene that never differs lies in the middle of its range.

    >>> low, high = gene_ranges(np.array([[0.0, 5.0], [10.0, 5.0]]))
    >>> low.tolist(), high.tolist()
    ([0.1, 4.5], [9.9, 5.5])
    """
    frame = pd.DataFrame(values)
    low, high = (frame.quantile(q).fillna(0.5).to_numpy(np.float64) for q in QUANTILES)
    same = high <= low
    return np.where(same, low - 0.5, low), np.where(same, low + 0.5, high)


def _orientation(
    path: Path, rows: list[str], columns: list[str], orient: str, samples: set[str], names: GeneNames | None, h5ad: bool
) -> tuple[bool, str]:
    """Whether a matrix has genes in its rows, and what says so."""

    def sample(name: str) -> bool:
        return name in samples or barcode(name) is not None

    def genes(ids: list[str]) -> float:
        if names is not None:
            return names.known([name.partition("|")[0] for name in ids])
        looks = [bool((_SYMBOL.fullmatch(n) or _ID.fullmatch(n)) and not sample(n)) for n in ids]
        return float(np.mean(looks)) if looks else 0.0

    of_samples = [np.mean([sample(name) for name in ids]) if ids else 0.0 for ids in (rows, columns)]
    of_genes = [genes(rows), genes(columns)]
    if of_samples[0] != of_samples[1]:
        flip = bool(of_samples[1] > of_samples[0])
        first = next(filter(sample, columns if flip else rows))
        reason = f"{'column' if flip else 'row'} names are samples, as {first}"
    elif abs(of_genes[0] - of_genes[1]) >= 0.2:
        flip = of_genes[0] > of_genes[1]
        reason = f"{'row' if flip else 'column'} names are genes, as {(rows if flip else columns)[0]}"
    elif orient == "auto" and not h5ad and len(rows) == len(columns):
        raise UserError(
            f"{path} does not tell whether its rows are samples or genes: say --orient samples or --orient genes. "
            f"Its first row is called {rows[0]}, its first column {columns[0]}."
        )
    else:
        flip = not h5ad and len(rows) > len(columns)
        reason = "as h5ad files are" if h5ad else f"a table of {len(rows)} x {len(columns)} has more genes than samples"
        if orient != "auto":
            flip, reason = orient == "genes", "as told"
    if orient != "auto" and flip != (orient == "genes"):
        other = "samples" if orient == "genes" else "genes"
        raise UserError(
            f"{path} is to have {orient} in its rows, but {reason}. Say --orient {other}, or leave it to be detected."
        )
    return flip, reason


def _from_cbioportal(
    path: Path, ids: pd.DataFrame, columns: list[str], values: np.ndarray, orient: str, said: str
) -> GeneTable:
    if orient == "samples":
        raise UserError(f"{path} has a gene in each row (column {ids.columns[0]}); --orient samples does not fit it.")
    by = {name.lower(): ids[name].fillna("") for name in ids.columns}
    entrez = [value or None for value in by.get("entrez_gene_id", pd.Series([""] * len(ids)))]
    genes = by.get("hugo_symbol", by.get("entrez_gene_id")).tolist()
    layout = f"columns are samples (cBioPortal's layout: {', '.join(ids.columns)}); {said}"
    genes = [gene or (number or "") for gene, number in zip(genes, entrez)]
    return GeneTable(columns, genes, entrez, np.ascontiguousarray(values.T), layout)


def _from_maf(path: Path, frame: pd.DataFrame) -> GeneTable:
    """Mutations as 0 and 1 of a list of them; samples with silent ones only have 0 everywhere."""
    by = {name.lower(): name for name in frame.columns}
    if "variant_classification" not in by:
        raise UserError(f"{path} has no column Variant_Classification, so silent mutations cannot be left out.")
    rows, change = len(frame), by["variant_classification"]
    frame = frame.dropna(subset=[by["tumor_sample_barcode"], by["hugo_symbol"], change])
    acts = frame[change].str.lower().isin(NON_SILENT)
    silent = ", ".join(f"{count} {name}" for name, count in frame[change][~acts].value_counts().items())
    if not acts.any():
        raise UserError(f"{path} has silent mutations only: {silent or 'no row says its kind'}.")
    if rows > len(frame):
        note(f"{path}: {rows - len(frame)} of {rows} mutations name no sample, no gene or no kind, and are left out.")
    samples = list(dict.fromkeys(frame[by["tumor_sample_barcode"]]))
    genes = sorted(set(frame[by["hugo_symbol"]][acts]))
    values = np.zeros((len(samples), len(genes)), np.float32)
    places = pd.Index(samples).get_indexer(frame[by["tumor_sample_barcode"]][acts])
    values[places, pd.Index(genes).get_indexer(frame[by["hugo_symbol"]][acts])] = 1
    entrez: dict[str, str] = {}
    if "entrez_gene_id" in by:
        numbers = ["" if pd.isna(number) else str(number) for number in frame[by["entrez_gene_id"]]]
        entrez = dict(zip(frame[by["hugo_symbol"]], numbers))
    left = f" (left out: {silent})" if silent else ""
    layout = f"a list of mutations (MAF), {rows} rows, {acts.sum()} of them not silent{left}"
    return GeneTable(samples, genes, [entrez.get(gene) or None for gene in genes], values, layout)


def _read_text(form: Form, text: list[int]) -> tuple[pd.DataFrame, list[str], np.ndarray]:
    """Text columns, names of the other columns, and their values (rows, columns) float32."""
    path, header = form.path, form.header
    others = [i for i in range(len(header)) if i not in text]
    ids, values, rows, empty = [], [], 0, 0
    with tqdm(desc=f"reading {path.name}", total=form.rows, unit="row", leave=False) as bar:
        for chunk in read_chunks(form, text, _CHUNK):
            bare = chunk.isna().all(axis=1)
            rows, empty = rows + len(chunk), empty + int(bare.sum())
            chunk = chunk[~bare] if bare.any() else chunk
            ids.append(chunk[text])
            named = chunk[others].set_axis([header[i] for i in others], axis=1)
            values.append(_numbers(path, named, form.separator))
            bar.update(len(chunk))
    if rows != form.rows:
        raise UserError(f"{path} has {form.rows} rows, and {rows} could be read; save it as tab-separated text.")
    tell_rows(form, empty)
    names = pd.concat(ids, ignore_index=True).set_axis([header[i] for i in text], axis=1)
    names = without_placeholders(names.apply(lambda column: column.str.strip()))
    return names, [header[i] for i in others], np.concatenate(values)


def _parquet(path: Path) -> pd.DataFrame:
    frame = read_parquet(path, "the table")
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index(names=frame.index.name or "")
    return frame.rename(columns=str)


def _read_parquet(path: Path, frame: pd.DataFrame, text: list[int]) -> tuple[pd.DataFrame, list[str], np.ndarray]:
    ids = frame.iloc[:, text].astype(object)
    rest = frame.drop(columns=ids.columns)
    return ids.where(ids.isna(), ids.astype(str)), rest.columns.tolist(), _numbers(path, rest)


def _numbers(path: Path, frame: pd.DataFrame, separator: str = ",") -> np.ndarray:
    """Values (rows, columns) float32; UserError naming a cell that is no number."""
    for i in text_columns(frame):
        column = without_placeholders(frame.iloc[:, [i]]).iloc[:, 0]
        numbers = as_values(column, path, separator)
        if not pd.api.types.is_numeric_dtype(numbers) and column.notna().any():
            wrong = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
            raise UserError(
                f"{path} has '{wrong.iloc[0]}' in the column {frame.columns[i]}, where numbers belong; an unknown "
                "value is an empty cell or NA."
            )
        frame.isetitem(i, pd.to_numeric(numbers))
    return frame.to_numpy(np.float32, na_value=np.nan)


def _without_version(ids: pd.Series) -> pd.Series:
    """ENSG00000141510.16 -> ENSG00000141510."""
    return ids.str.replace(r"^(ENSG\d+)\.\d+$", r"\1", regex=True)
