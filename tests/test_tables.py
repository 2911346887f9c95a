"""Text tables from many programs, h5ad files of many kinds, names of genes that became dates."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from test_omics import make_cohort

from data_prep.join_omics import join_labels
from ldm.data.omics import join_omics
from ldm.errors import UserError
from ldm.tables.gene_dates import genes_of_date
from ldm.tables.gene_lists import read_genes
from ldm.tables.genes import read_gene_table, to_log2
from ldm.tables.text import find_form, read_table

GENES = ["TP53", "KRAS", "EGFR", "BRAF"]
MAF = ["Hugo_Symbol", "Variant_Classification", "Tumor_Sample_Barcode", "Notes"]
BARCODES = [f"TCGA-AA-000{i}-01A-11D-A123-09" for i in range(6)]


def maf(path: Path, notes: dict[tuple[int, int], str], columns: list[str] = MAF) -> Path:
    """Every gene mutated in every sample; notes: (sample, gene) -> free text."""
    rows = [
        dict(zip(MAF, (gene, "Missense_Mutation", sample, notes.get((i, j), "."))))
        for i, sample in enumerate(BARCODES)
        for j, gene in enumerate(GENES)
    ]
    lines = ["#version 2.4", "\t".join(columns), *("\t".join(row[name] for name in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("columns", [MAF, MAF[::-1], ["Notes", *MAF[:3]]])
def test_a_lone_quote_swallows_no_mutation(tmp_path, columns):
    notes = {(1, 0): '"putative', (3, 0): '"driver" see text', (4, 2): '5" end', (5, 3): '"'}
    table = read_gene_table(maf(tmp_path / "quote.maf", notes, columns), "mutation")
    assert (table.samples, table.genes) == (BARCODES, sorted(GENES))
    assert table.values.sum() == 24
    assert table.layout.startswith("a list of mutations (MAF), 24 rows, 24 of them not silent")


def test_a_lone_quote_swallows_no_slide(tmp_path, capsys):
    slides = [f"TCGA-AA-000{i}-01Z-00-DX1" for i in range(6)]
    cohort = make_cohort(tmp_path / "cohort", slides)
    comments = ["ok", '"not sure', "ok", "ok", '"not sure', "ok"]
    rows = [f"TCGA-AA-000{i}\t{'LUAD' if i % 2 else 'LUSC'}\t{comments[i]}" for i in range(6)]
    (tmp_path / "clin.tsv").write_text("\n".join(["submitter_id\tcancer\tcomment", *rows]) + "\n")
    told = join_labels(cohort, tmp_path / "clin.tsv", ["cancer"])
    assert "slides joined: 6" in told
    assert "clin.tsv, 6 rows; 6 samples or patients have slides" in told
    assert "cancer: 2 (LUSC 3, LUAD 3)" in told


RIGHT = [["a", "1.5", "x, y"], ["b", None, "é"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", b'id,age,text\na,1.5,"x, y"\nb,,\xc3\xa9\n'),
        ("bom.csv", '\ufeffid,age,text\na,1.5,"x, y"\nb,NA,é\n'.encode()),
        ("crlf.csv", 'id,age,text\r\n"a","1.5","x, y"\r\n"b","","é"\r\n'.encode()),
        ("mac.tsv", "id\tage\ttext\ra\t1.5\tx, y\rb\t\té\r".encode()),
        ("utf16.txt", 'id\tage\ttext\r\n"a"\t1.5\t"x, y"\r\nb\t\té\r\n'.encode("utf-16")),
        ("big.txt", "id\tage\ttext\na\t1.5\tx, y\nb\t\té\n".encode("utf-16-be")),
        ("semicolon.csv", "sep=;\nid;age;text\na;1.5;x, y\nb;'--;é\n".encode()),
        ("latin.csv", 'id,age,text\na,1.5,"x, y"\nb,[Not Available],é\n'.encode("latin-1")),
        ("r.txt", '"id"\t"age"\t"text"\n"a"\t1.5\t"x, y"\n"b"\tNA\t"é"\n'.encode()),
        ("zipped.tsv.gz", gzip.compress("#made\nid\tage\ttext\na\t1.5\tx, y\nb\tNot Reported\té\n".encode(), mtime=0)),
        ("spaces.csv", 'id, age, text\na, 1.5, "x, y"\n\nb, unknown, é\n'.encode()),
        ("ends.csv", 'id,age,text,,\na,1.5,"x, y",,\nb,,é,,\n,,,,\n'.encode()),
        ("hash.tsv", "#id\tage\ttext\na\t1.5\tx, y\nb\t[Unknown]\té\n".encode()),
    ],
)
def test_the_same_table_however_it_is_written(tmp_path, name, content, capsys):
    (tmp_path / name).write_bytes(content)
    table = read_table(tmp_path / name)
    assert table.columns.tolist() == ["id", "age", "text"]
    assert table.astype(object).where(table.notna(), None).to_numpy().tolist() == RIGHT
    told = capsys.readouterr().err
    assert ("Windows-1252" in told) == (name == "latin.csv")
    assert ("1 of them are empty" in told) == (name == "ends.csv")


def test_cells_of_several_lines_and_quotes_need_quotes(tmp_path, capsys):
    (tmp_path / "t.csv").write_text('id,text\na,"two\nlines"\nb,"say ""no"""\nc,"x, y"\n')
    assert read_table(tmp_path / "t.csv")["text"].tolist() == ["two\nlines", 'say "no"', "x, y"]
    (tmp_path / "t.csv").write_text('id,text\na,"not sure\nb,ok\nc,"not sure\n')  # no quotes hold anything together
    assert read_table(tmp_path / "t.csv")["text"].tolist() == ['"not sure', "ok", '"not sure']
    (tmp_path / "t.csv").write_text("id,text\na,x\nb,y,z\n")
    with pytest.raises(UserError, match=r"line 3 has 3 cells, the header 2: .* need quotes"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "t.tsv").write_text("id\ttext\na\tx\ty\nb\tz\n")  # the first row has one too many
    with pytest.raises(UserError, match="line 2 has 3 cells, the header 2"):
        read_table(tmp_path / "t.tsv")
    (tmp_path / "t.csv").write_text("id,text,more\na,x,1\nb\n")
    assert read_table(tmp_path / "t.csv")["text"].isna().tolist() == [False, True]
    assert "1 rows with fewer cells than its header (the first is line 3)" in capsys.readouterr().err
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"id,text\na,b\n" * 999)[:40])
    with pytest.raises(UserError, match="cut off or broken"):
        find_form(tmp_path / "t.csv.gz")


def test_decimal_commas(tmp_path):
    (tmp_path / "t.csv").write_text("sample;TP53;EGFR\na;1,5;3\nb;2,25;0\n")
    values = read_gene_table(tmp_path / "t.csv", "expression", samples=["a"]).values
    np.testing.assert_array_equal(values, [[1.5, 3], [2.25, 0]])
    (tmp_path / "t.tsv").write_text("sample\tTP53\tEGFR\na\t1,5\t3\nb\t2,25\t'--\n")
    values = read_gene_table(tmp_path / "t.tsv", "expression", samples=["a"]).values
    np.testing.assert_array_equal(values, [[1.5, 3], [2.25, np.nan]])
    (tmp_path / "t.tsv").write_text("sample\tTP53\tEGFR\na\t1,500\t3\nb\t20\t0\n")
    with pytest.raises(UserError, match="'1,500' in the column TP53: its comma may be a decimal one or separate thous"):
        read_gene_table(tmp_path / "t.tsv", "expression", samples=["a"])


def test_placeholders_are_unknown_in_every_column(tmp_path):
    cohort = make_cohort(tmp_path / "cohort", list("abcdef"))
    words = ["II", "'--", "[Not Available]", "[Unknown]", "not reported", "[Not Applicable]"]
    ages = ["61", "'--", "70", "[Not Available]", "Not Reported", "55"]
    lines = [f"{name}\t{word}\t{age}" for name, word, age in zip("abcdef", words, ages)]
    (tmp_path / "l.tsv").write_text("\n".join(["id\tstage\tage", *lines]))
    told = join_labels(cohort, tmp_path / "l.tsv", ["stage", "age"])
    assert "stage: 1 (II 1); unknown for 5 of the slides joined" in told
    index = pd.read_parquet(cohort / "index.parquet").drop_duplicates("slide")
    assert index["stage"].notna().tolist() == [True, *[False] * 5]
    assert index["age"].fillna(-1).tolist() == [61, -1, 70, -1, -1, 55]
    (tmp_path / "e.tsv").write_text("sample\tTP53\tEGFR\na\t0.5\t'--\nb\t[Not Available]\t0.25\n")
    report = join_omics(cohort, expression=tmp_path / "e.tsv")["expression"]
    assert report.joined == ["a", "b"]
    assert pd.read_parquet(cohort / "omics" / "expression.parquet").isna().to_numpy().sum() == 2


def test_mutations_that_lack_their_gene_are_counted(tmp_path, capsys):
    path = maf(tmp_path / "t.maf", {})
    path.write_text(path.read_text().replace("TP53\t", "\t", 1))
    assert read_gene_table(path, "mutation").values.sum() == 23
    assert "1 of 24 mutations name no sample, no gene or no kind, and are left out" in capsys.readouterr().err


# --- names that became dates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["2-Sep", "02-Sep", "Sep-02", "Sep 2", "2-Sep-24", "02-Sep-2024", "2024-09-02", "2024-09-02 00:00:00",
     "2.9.2024", "02/09/2024", "2. Sep", "sept-2", "September 2", "2 septembre"],
)  # fmt: skip
def test_every_form_of_a_date_is_its_gene(name):
    assert "SEPTIN2" in genes_of_date(name)


def test_names_that_are_no_dates():
    for name in ("TP53", "HLA-A", "MARCHF1", "SEPTIN2", "DEC1", "1-8U", "C1orf112", "7157", "MT-ND1", "NKX2-1", "44256",
                 "RP11-34P13.7", "ENSG00000141510.16", "H2AC11", "MAR-2X"):  # fmt: skip
        assert genes_of_date(name) is None, name
    assert [genes_of_date(name) for name in ("1-Mar", "11-Mar", "1-Dec", "15-Sep", "9-Jun")] == [
        ("MARCHF1", "MTARC1"), ("MARCHF11",), ("DELEC1",), ("SELENOF",), (),
    ]  # fmt: skip


def test_genes_that_became_dates_are_told(tmp_path):
    cohort = make_cohort(tmp_path / "cohort", ["a", "b"])
    names = "TP53,EGFR,KRAS,BRAF,1-Mar,2024-09-02,44256"
    (tmp_path / "t.csv").write_text(f"sample,{names}\na,1,1,0,0,1,1,1\nb,0,0,0,1,0,0,0\n")
    report = join_omics(cohort, mutation=tmp_path / "t.csv")["mutation"]
    assert report.dated_genes == ["1-Mar (MARCHF1 or MTARC1?)", "2024-09-02 (SEPTIN2?)", "44256 (MARCHF1 or MTARC1?)"]
    assert "turned into dates, left out; correct them: 3 (1-Mar (MARCHF1" in str(report)
    assert report.genes == 7
    (tmp_path / "genes.txt").write_text("TP53\nEGFR\nDec-01\n")
    with pytest.raises(UserError, match=r"turned into dates: Dec-01 \(DELEC1\?\)"):
        read_genes(tmp_path / "genes.txt", "--gene-list")


# --- h5ad -------------------------------------------------------------------------------------------------------------

COUNTS = np.random.default_rng(0).poisson(20, (6, 4)).astype(np.float32)


def column(group: h5py.Group, name: str, values: list[str], kind: str) -> None:
    """A column as anndata writes it."""
    if kind == "categorical":
        node = group.create_group(name)
        node["categories"] = sorted(values)
        node["codes"] = np.array([sorted(values).index(value) for value in values], np.int8)
    elif kind == "nullable-string-array":
        node = group.create_group(name)
        node["values"], node["mask"] = values, np.zeros(len(values), bool)
    else:
        node = group.create_dataset(name, data=values)
    node.attrs["encoding-type"] = kind


def h5ad(path: Path, matrices: dict[str, np.ndarray], kind: str = "string-array", sparse: bool = False) -> Path:
    with h5py.File(path, "w") as file:
        axes = {"obs": BARCODES, "var": GENES} | ({"raw/var": GENES} if "raw/X" in matrices else {})
        for axis, names in axes.items():
            group = file.create_group(axis)
            group.attrs["_index"] = "_index"
            column(group, "_index", names, kind)
        for name, values in matrices.items():
            if not sparse:
                file[name] = values
                continue
            held = scipy.sparse.csr_matrix(values)
            group = file.create_group(name)
            group.attrs.update({"encoding-type": "csr_matrix", "shape": values.shape})
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(held, part)
    return path


@pytest.mark.parametrize("kind", ["string-array", "categorical", "nullable-string-array"])
@pytest.mark.parametrize("sparse", [False, True])
def test_h5ad_with_any_index(tmp_path, kind, sparse):
    table = read_gene_table(h5ad(tmp_path / "t.h5ad", {"X": COUNTS}, kind, sparse), "expression")
    assert (table.samples, table.genes) == (BARCODES, GENES)
    np.testing.assert_array_equal(table.values, COUNTS)
    assert table.layout.endswith("; X")


@pytest.mark.parametrize("sparse", [False, True])
def test_which_matrix_of_an_h5ad_is_taken_is_said(tmp_path, sparse):
    scaled = (COUNTS - COUNTS.mean(0)) / COUNTS.std(0)
    path = h5ad(tmp_path / "t.h5ad", {"X": scaled, "raw/X": COUNTS, "layers/log": np.log2(COUNTS + 1)}, sparse=sparse)
    table = read_gene_table(path, "expression")
    np.testing.assert_array_equal(table.values, COUNTS)
    assert "raw (X has negative values, so it was scaled); --layer takes X, layers/log instead" in table.layout
    np.testing.assert_allclose(read_gene_table(path, "expression", layer="log").values, np.log2(COUNTS + 1), rtol=1e-6)
    np.testing.assert_allclose(read_gene_table(path, "expression", layer="X").values, scaled, rtol=1e-6)
    with pytest.raises(UserError, match="no matrix 'layers/logs', which --layer names; did you mean 'layers/log'"):
        read_gene_table(path, "expression", layer="layers/logs")
    only = read_gene_table(h5ad(tmp_path / "l.h5ad", {"layers/counts": COUNTS}), "expression")
    np.testing.assert_array_equal(only.values, COUNTS)
    with pytest.raises(UserError, match="has no X; say which of layers/a, layers/b by --layer"):
        read_gene_table(h5ad(tmp_path / "m.h5ad", {"layers/a": COUNTS, "layers/b": COUNTS}), "expression")
    with pytest.raises(UserError, match="is 4 x 6, but there are 6 obs and 4 var"):
        read_gene_table(h5ad(tmp_path / "n.h5ad", {"X": COUNTS.T}), "expression")
    with pytest.raises(UserError, match="has no matrix"):
        read_gene_table(h5ad(tmp_path / "o.h5ad", {}), "expression")


@pytest.mark.parametrize(
    ("base", "by"), [(None, np.log1p), (2.0, lambda x: np.log2(x + 1)), (10.0, lambda x: np.log10(x + 1))]
)
def test_logs_of_scanpy_become_log2(tmp_path, base, by):
    """scanpy's `log1p` takes natural logs unless it is told otherwise, and says the base in `uns`."""
    path = h5ad(tmp_path / "t.h5ad", {"X": by(COUNTS).astype(np.float32), "layers/counts": COUNTS})
    with h5py.File(path, "a") as file:
        logged = file.create_group("uns/log1p")
        logged["base"] = h5py.Empty("f4") if base is None else base
    table = read_gene_table(path, "expression")
    np.testing.assert_allclose(table.values, np.log2(COUNTS + 1), rtol=1e-5)
    assert ("made log2" in table.layout) == (base != 2)
    np.testing.assert_array_equal(read_gene_table(path, "expression", layer="counts").values, COUNTS)


def test_z_scores_are_no_expression():
    scaled = (COUNTS - COUNTS.mean(0)) / COUNTS.std(0)
    with pytest.raises(UserError, match="they look like z-scores"):
        to_log2(scaled, "auto", "t.csv")
    assert to_log2(scaled, "log2", "t.csv")[1] == "log2"
    xena = np.log2(np.where(COUNTS < 20, 0, COUNTS) + 0.001)  # with negative values
    assert to_log2(xena, "auto", "t.csv")[1] == "log2"
