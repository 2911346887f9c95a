from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from conftest import ROOT
from data_prep.join_omics import join_labels, main
from ldm.conditioners.omics import OmicsEmbedder
from ldm.data.cohort import merge_index, read_index, write_store
from ldm.data.datasets import TileDataset
from ldm.data.omics import join_omics
from ldm.errors import UserError
from ldm.tables.genes import read_gene_table

HEAD, BRAIN, NORMAL, OTHER = "TCGA-CR-7395-01A-01-TS1", "TCGA-FG-6692-01Z-00-DX1", "TCGA-02-0047-11A-01-TS1", "CMU-1"


def make_cohort(folder: Path, slides: list[str], **columns) -> Path:
    """A cohort of two tiles per slide; columns: slide -> value."""
    for slide in slides:
        write_store(folder, slide, lambda i: np.full((16, 16, 3), i, np.uint8), 2, attrs={"tile_size": 16})
    table = pd.DataFrame([{"slide": slide, "row": row} for slide in slides for row in range(2)])
    for name, values in columns.items():
        table[name] = table["slide"].map(values)
    merge_index(folder, table)
    return folder


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    return make_cohort(tmp_path / "cohort", [HEAD, BRAIN, NORMAL, OTHER])


@pytest.fixture
def real() -> Path:
    return ROOT / "data" / "samples" / "cancers"


def omics(cohort: Path, source: str) -> tuple[pd.DataFrame, dict]:
    folder = cohort / "omics"
    return pd.read_parquet(folder / f"{source}.parquet"), json.loads((folder / f"{source}.json").read_text())


def small(tmp_path: Path, name: str = "table.csv", seed: int = 0, **changes) -> Path:
    """Expression in log2 of three genes in the samples a..h, where slides called a and b exist."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.uniform(0, 15, (8, 3)), index=list("abcdefgh"), columns=["TP53", "EGFR", "MKI67"])
    frame.iloc[0, 0] = 15.0
    for cell, value in changes.items():
        frame.loc[cell[0], cell[1:]] = value
    frame.to_csv(tmp_path / name, index_label="sample")
    return tmp_path / name


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make_cohort(tmp_path / "plain", ["a.svs", "b.svs"])


def test_the_real_tables_join_as_checked_by_hand(cohort, real, capsys):
    main(
        ["--cohort", str(cohort), "--mutation", str(real / "mutation-matrix-all-samples.tsv"), "--expression",
         str(real / "expression-matrix-all-samples.tsv"), "--genes", str(real / "expression-genes.tsv"),
         "--licence", "CC0"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "8756 samples x 15 genes; rows are samples (row names are samples, as TCGA-02-0047-01)" in out
    assert f"slides joined: 2 ({HEAD}, {BRAIN})\n  slides not joined: 2 ({NORMAL}, {OTHER})" in out
    assert "samples of the table that no slide has: 8754 (TCGA-02-0047-01, TCGA-02-0055-01, " in out
    assert "ids of them are left out): 2 (28653, 3174)" in out
    assert "joined by sample (the first 15 characters; all barcodes have a sample)" in out
    assert "log2 (detected); scaled to [0, 1] between the 1% and 99% quantiles of 8756 samples" in out

    raw = pd.read_csv(real / "expression-matrix-all-samples.tsv", sep="\t", index_col=0)
    ids = pd.read_csv(real / "expression-genes.tsv", sep="\t", dtype=str).set_index("entrez_gene_id")["symbol"]
    low, high = raw.quantile(0.01), raw.quantile(0.99)
    expected = ((raw - low) / (high - low)).clip(0, 1).loc[["TCGA-CR-7395-01", "TCGA-FG-6692-01"]]
    table, about = omics(cohort, "expression")
    assert table.index.tolist() == expected.index.tolist()
    assert table.index.name == "sample"
    assert table.columns.tolist() == [ids[gene] for gene in raw.columns] == about["genes"]
    np.testing.assert_allclose(table.to_numpy(), expected.to_numpy(), atol=1e-6)
    assert table.loc["TCGA-CR-7395-01", "DCN"] == pytest.approx((12.5 - 3.691) / (15.9 - 3.691), abs=1e-6)
    assert about["entrez"] == raw.columns.tolist()
    assert (about["unit"], about["level"], about["n"], about["licence"]) == ("log2", "sample", 2, "CC0")
    assert about["scaler"]["low"] == pytest.approx(low.tolist(), abs=1e-4)
    assert "TCGA" not in json.dumps(about)  # it travels with models

    mutation, about = omics(cohort, "mutation")
    assert mutation.shape == (2, 13)
    assert not mutation.to_numpy().any()
    assert about["report"]["unknown_genes"] == 2
    assert about["scaler"] is None
    samples = read_index(cohort).drop_duplicates("slide").set_index("slide")["sample"]
    assert samples[HEAD] == "TCGA-CR-7395-01"
    assert pd.isna(samples[OTHER])


def test_tiles_get_their_row_and_the_model_takes_it(cohort, real):
    paths = {name: real / f"{name}-matrix-all-samples.tsv" for name in ("mutation", "expression")}
    join_omics(cohort, **paths, genes=real / "expression-genes.tsv")
    conditions = {"mutation": "omics/mutation", "expression": "omics/expression"}
    data = TileDataset(str(cohort), conditions=conditions, missing="skip")
    assert len(data) == 4
    table, _ = omics(cohort, "expression")
    assert [item["slide"] for item in map(data.__getitem__, range(4))].count(HEAD) == 2
    for item in map(data.__getitem__, range(4)):
        np.testing.assert_array_equal(item["expression"].numpy(), table.loc[item["slide"][:15]])
    files = {f"{name}_genes": str(cohort / "omics" / f"{name}.json") for name in conditions}
    model = OmicsEmbedder(8, **files).eval()
    model.check_data(data.metadata)
    assert model({key: data[0][key][None] for key in conditions})["vector"].shape == (1, 8)
    with pytest.raises(UserError, match="the genes of 'mutation' in the data are not the model's"):
        OmicsEmbedder(8, mutation_genes=files["expression_genes"]).check_data(data.metadata)


@pytest.fixture
def part(real: Path) -> pd.DataFrame:
    """300 real samples and the two that slides have, by Entrez ids."""
    raw = pd.read_csv(real / "expression-matrix-all-samples.tsv", sep="\t", index_col=0)
    return pd.concat([raw.iloc[:300], raw.loc[["TCGA-CR-7395-01", "TCGA-FG-6692-01"]]])


def xena(part: pd.DataFrame, symbols: pd.Series, path: Path) -> Path:
    part.T.rename(index=symbols).to_csv(path / "HiSeqV2.tsv.gz", sep="\t", index_label="sample")
    return path / "HiSeqV2.tsv.gz"


def cbioportal(part: pd.DataFrame, symbols: pd.Series, path: Path) -> Path:
    table = part.T.reset_index(names="Entrez_Gene_Id")
    table.insert(0, "Hugo_Symbol", table["Entrez_Gene_Id"].map(symbols))
    path = path / "data_mrna_seq_v2_rsem.txt"
    path.write_text("# RNA\n#\n" + table.to_csv(sep="\t", index=False))
    return path


def parquet(part: pd.DataFrame, symbols: pd.Series, path: Path) -> Path:
    part.rename(columns=symbols).rename_axis("sample").to_parquet(path / "table.parquet")
    return path / "table.parquet"


def h5ad(part: pd.DataFrame, symbols: pd.Series, path: Path) -> Path:
    return write_h5ad(path / "table.h5ad", part.rename(columns=symbols))


def write_h5ad(path: Path, table: pd.DataFrame, sparse: str | None = None) -> Path:
    """A file as anndata 0.12 writes it."""
    with h5py.File(path, "w") as file:
        for axis, names in (("obs", table.index), ("var", table.columns)):
            group = file.create_group(axis)
            group.attrs.update({"_index": "_index", "encoding-type": "dataframe", "encoding-version": "0.2.0"})
            group.create_dataset("_index", data=[str(name) for name in names], dtype=h5py.string_dtype())
        if sparse is None:
            file.create_dataset("X", data=table.to_numpy(np.float32))
            return path
        values = getattr(scipy.sparse, sparse)(table.to_numpy(np.float32))
        group = file.create_group("X")
        group.attrs.update({"encoding-type": sparse, "encoding-version": "0.1.0", "shape": values.shape})
        for name in ("data", "indices", "indptr"):
            group.create_dataset(name, data=getattr(values, name))
    return path


def r_table(part: pd.DataFrame, symbols: pd.Series, path: Path) -> Path:
    text = part.rename(columns=symbols, index=lambda name: name.replace("-", ".")).to_csv(sep="\t", index_label="x")
    (path / "r.txt").write_text(text.removeprefix("x\t"))  # write.table: no name for the row names
    return path / "r.txt"


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (xena, "columns are samples (column names are samples, as TCGA-02-0047-01)"),
        (cbioportal, "columns are samples (cBioPortal's layout: Hugo_Symbol, Entrez_Gene_Id)"),
        (parquet, "rows are samples (row names are samples, as TCGA-02-0047-01)"),
        (h5ad, "rows are samples (row names are samples, as TCGA-02-0047-01)"),
        (r_table, "rows are samples (row names are samples, as TCGA.02.0047.01)"),
    ],
)
def test_every_layout_joins_to_the_same_values(cohort, real, part, tmp_path, write, says):
    ids = pd.read_csv(real / "expression-genes.tsv", sep="\t", dtype=str).set_index("entrez_gene_id")["symbol"]
    part.to_csv(tmp_path / "ids.tsv", sep="\t")
    join_omics(cohort, expression=tmp_path / "ids.tsv", genes=real / "expression-genes.tsv")
    expected, _ = omics(cohort, "expression")
    report = join_omics(cohort, expression=write(part, ids, tmp_path))["expression"]
    assert report.layout.startswith(says)
    assert (report.joined, report.not_joined, len(report.unused)) == ([HEAD, BRAIN], [NORMAL, OTHER], 300)
    table, about = omics(cohort, "expression")
    pd.testing.assert_frame_equal(table, expected, check_column_type=False, check_index_type=False, atol=1e-6)
    assert about["n"] == 2


def test_a_list_of_mutations_becomes_zeros_and_ones(cohort, tmp_path):
    lines = [
        ("TP53", 7157, "Missense_Mutation", "TCGA-CR-7395-01A-11D"),
        ("EGFR", 1956, "Silent", "TCGA-CR-7395-01A-11D"),
        ("EGFR", 1956, "Frame_Shift_Del", "TCGA-AA-0001-01A"),
        ("TTN", 7273, "Intron", "TCGA-AA-0001-01A"),
        ("TTN", 7273, "Silent", "TCGA-FG-6692-01A"),
    ]
    columns = ["Hugo_Symbol", "Entrez_Gene_Id", "Variant_Classification", "Tumor_Sample_Barcode"]
    text = pd.DataFrame(lines, columns=columns).to_csv(sep="\t", index=False)
    (tmp_path / "data_mutations.txt").write_text("#version 2.4\n" + text)
    report = join_omics(cohort, mutation=tmp_path / "data_mutations.txt")["mutation"]
    assert report.layout == "a list of mutations (MAF), 5 rows, 2 of them not silent (left out: 2 Silent, 1 Intron)"
    table, about = omics(cohort, "mutation")
    assert table.loc["TCGA-CR-7395-01"].to_dict() == {"EGFR": 0, "TP53": 1}
    assert table.loc["TCGA-FG-6692-01"].to_dict() == {"EGFR": 0, "TP53": 0}
    assert about["entrez"] == ["1956", "7157"]
    with pytest.raises(UserError, match=r"is a list of mutations .* as --mutation"):
        join_omics(cohort, expression=tmp_path / "data_mutations.txt")


@pytest.mark.slow
def test_levels_of_barcodes(tmp_path, part, real):
    part.to_csv(tmp_path / "t.tsv", sep="\t")
    genes = real / "expression-genes.tsv"
    cohort = make_cohort(tmp_path / "mr", ["TCGA-FG-6692", NORMAL, "TCGA-CR-7395-01A-01-TS1.svs"])
    report = join_omics(cohort, expression=tmp_path / "t.tsv", genes=genes)["expression"]
    assert report.how.startswith("patient (the first 12 characters; TCGA-FG-6692 names no sample)")
    assert report.joined == ["TCGA-FG-6692", NORMAL, "TCGA-CR-7395-01A-01-TS1.svs"]
    assert report.other_tissue == [NORMAL]
    assert omics(cohort, "expression")[0].index.tolist() == ["TCGA-02-0047", "TCGA-CR-7395", "TCGA-FG-6692"]
    told = join_omics(cohort, expression=tmp_path / "t.tsv", genes=genes, level="sample")["expression"]
    assert told.joined == ["TCGA-CR-7395-01A-01-TS1.svs"]
    cohort = make_cohort(tmp_path / "normal", [NORMAL])
    with pytest.raises(UserError, match=r"no slide is in .*--level patient would join them") as error:
        join_omics(cohort, expression=tmp_path / "t.tsv", genes=genes)
    assert f"{NORMAL} (TCGA-02-0047-11), a sample of the table TCGA-02-0047-01" in str(error.value)
    assert not (cohort / "omics").exists()


def test_ranges_are_learnt_without_val_and_test(tmp_path):
    slides = {"a.svs": "test", "b.svs": "val", "c.svs": "train"}
    cohort = make_cohort(tmp_path / "cohort", list(slides), split=slides)
    table = small(tmp_path)
    report = join_omics(cohort, expression=table)["expression"]
    assert "of 6 samples (all but those of val and test)" in report.unit
    raw = pd.read_csv(table, index_col=0)
    low, high = raw.iloc[2:].quantile(0.01), raw.iloc[2:].quantile(0.99)
    values, about = omics(cohort, "expression")
    assert about["scaler"]["high"] == pytest.approx(high.tolist(), rel=1e-5)
    assert values.loc["a", "TP53"] == 1  # cut: it is above all that was seen in training
    np.testing.assert_allclose(values, ((raw - low) / (high - low)).clip(0, 1).loc[["a", "b", "c"]], atol=1e-5)


def test_slides_of_other_names(plain, tmp_path):
    assert "names of slides without their ending" in join_omics(plain, expression=small(tmp_path))["expression"].how
    (tmp_path / "map.csv").write_text("slide,sample\na,c\nb.svs,d\n")
    mapped = make_cohort(tmp_path / "mapped", ["a.svs", "b.svs", "z.svs"], case={"a.svs": "g", "b.svs": "h"})
    report = join_omics(mapped, expression=small(tmp_path), samples=str(tmp_path / "map.csv"))["expression"]
    assert (report.joined, report.not_joined) == (["a.svs", "b.svs"], ["z.svs"])
    assert omics(mapped, "expression")[0].index.tolist() == ["c", "d"]
    mutation = tmp_path / "m.csv"
    mutation.write_text("sample,TP53,EGFR\nd,1,0\ng,0,\n")
    with pytest.raises(UserError, match=r"expression.parquet knows a.svs as c, and it would become g"):
        join_omics(mapped, mutation=mutation, samples="case")
    join_omics(mapped, mutation=mutation, samples=str(tmp_path / "map.csv"))
    assert omics(mapped, "mutation")[0].to_dict("index") == {"d": {"TP53": 1.0, "EGFR": 0.0}}
    assert omics(mapped, "expression")[0].index.tolist() == ["c", "d"]
    patients = make_cohort(tmp_path / "patients", ["x1.svs"], patient={"x1.svs": "a"})
    assert join_omics(patients, expression=small(tmp_path))["expression"].how.endswith("patients")


def test_choice_of_genes(plain, tmp_path):
    (tmp_path / "list.txt").write_text("MKI67\nTP35\nTP53\n")
    report = join_omics(plain, expression=small(tmp_path), gene_list=tmp_path / "list.txt")["expression"]
    table, about = omics(plain, "expression")
    assert about["genes"] == ["MKI67", "TP35", "TP53"]
    assert table["TP35"].isna().all()
    assert report.lacking_genes == ["TP35"]
    raw = pd.read_csv(small(tmp_path), index_col=0)
    join_omics(plain, expression=small(tmp_path), top_variable=2)
    least = raw.var().idxmin()
    assert omics(plain, "expression")[1]["genes"] == [gene for gene in raw.columns if gene != least]
    (tmp_path / "list.txt").write_text("NOT\nEITHER\n")
    with pytest.raises(UserError, match="none of the genes of --gene-list"):
        join_omics(plain, expression=small(tmp_path), gene_list=tmp_path / "list.txt")


def test_counts_are_logged_and_unknown_values_stay_unknown(plain, tmp_path):
    raw = pd.read_csv(small(tmp_path, aEGFR=np.nan), index_col=0)
    (2**raw - 1).to_csv(tmp_path / "counts.csv")
    join_omics(plain, expression=small(tmp_path, aEGFR=np.nan))
    expected, _ = omics(plain, "expression")
    report = join_omics(plain, expression=tmp_path / "counts.csv")["expression"]
    assert "counts, made log2(x + 1) (detected)" in report.unit
    table, about = omics(plain, "expression")
    pd.testing.assert_frame_equal(table, expected, atol=1e-5)
    assert np.isnan(table.loc["a", "EGFR"])
    assert about["unit"] == "counts"
    (raw / 15).to_csv(tmp_path / "unit.csv")
    join_omics(plain, expression=tmp_path / "unit.csv")
    table, about = omics(plain, "expression")
    np.testing.assert_allclose(table, raw.loc[["a", "b"]] / 15, rtol=1e-6)
    assert (about["unit"], about["scaler"]) == ("unit", None)


@pytest.mark.parametrize(
    ("change", "unit", "message"),
    [
        (lambda x: np.log2(x + 1), "auto", "look as if they were logged twice"),
        (lambda x: np.log2(x + 1), "log2", "look as if they were logged twice"),
        (lambda x: x, "counts", "as counts they would be logged twice. Say --unit log2"),
        (lambda x: x - 20, "counts", "counts are not negative"),
        (lambda x: 2**x, "log2", "too large for log2"),
        (lambda x: x, "unit", r"lie in \[0, 1\]"),
        (lambda x: x * np.inf, "auto", "infinite values"),
    ],
)
def test_values_that_are_not_of_their_unit(plain, tmp_path, change, unit, message):
    change(pd.read_csv(small(tmp_path), index_col=0).clip(lower=0.1)).to_csv(tmp_path / "bad.csv")
    with pytest.raises(UserError, match=message):
        join_omics(plain, expression=tmp_path / "bad.csv", unit=unit)


def test_a_sample_given_twice(plain, cohort, tmp_path):
    table = small(tmp_path)
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[1]]))
    assert join_omics(plain, expression=table)["expression"].merged == ["a"]
    table.write_text("\n".join([*lines, "a,1,2,3"]))
    with pytest.raises(UserError, match=r"has the sample a 2 times with different values. Say --duplicates first"):
        join_omics(plain, expression=table)
    join_omics(plain, expression=table, duplicates="first", unit="log2")
    first, _ = omics(plain, "expression")
    join_omics(plain, expression=table, duplicates="mean")
    mean, _ = omics(plain, "expression")
    assert mean.loc["a", "TP53"] < first.loc["a", "TP53"] == 1
    table.write_text("\n".join([*lines, "h,1,2,3"]))  # no slide has h, but the table contradicts itself
    with pytest.raises(UserError, match="the sample h 2 times"):
        join_omics(plain, expression=table)

    calls = tmp_path / "calls.csv"
    calls.write_text("sample,TP53,EGFR\nTCGA-CR-7395-01A-01D,1,0\nTCGA-CR-7395-01B-01D,0,0\nTCGA-AA-0001-01A,0,0\n")
    with pytest.raises(UserError, match="TCGA-CR-7395-01A-01D, TCGA-CR-7395-01B-01D, which are all TCGA-CR-7395-01,"):
        join_omics(cohort, mutation=calls)
    join_omics(cohort, mutation=calls, duplicates="mean")
    assert omics(cohort, "mutation")[0].loc["TCGA-CR-7395-01"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample,TP53,EGFR\na,2,0\n", "mutation of TP53 in a is 2; a mutation is 1, 0, or empty"),
        ("sample,TP53,EGFR\na,p.R273H,0\n", "has 'p.R273H' in the column TP53, where numbers belong"),
        ("sample,7157,1956\na,1,0\n", "names genes by ids, as 7157, .* give --genes"),
        ("sample,TP53,TP53\na,1,0\n", "has the gene TP53 2 times with different values"),
        ("sample,TP53,EGFR\nx,1,0\n", "no slide is in .*: a slide is called a.svs, a sample of the table x"),
        ("sample\na\n", "is no table of columns"),
        ("", "is no table of columns"),
        ("sample,TP53,EGFR\n", "has no rows"),
        ("k1,k2,k3\nr1,1,0\nr2,0,0\n", "does not tell whether its rows are samples or genes"),
        ("sample,TP53,EGFR\na,1,0,1,1\n", "cannot read"),
        ("Hugo_Symbol,Tumor_Sample_Barcode\nTP53,a\n", "no column Variant_Classification"),
        ("Hugo_Symbol,Tumor_Sample_Barcode,Variant_Classification\nTP53,a,Silent\n", "silent mutations only"),
    ],
)
def test_bad_tables(plain, tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        join_omics(plain, mutation=tmp_path / "bad.csv")
    assert not (plain / "omics").exists()
    assert "sample" not in read_index(plain)


def test_a_table_that_is_not_as_told(plain, tmp_path):
    frame = pd.read_csv(small(tmp_path), index_col=0)
    frame.T.to_csv(tmp_path / "t.csv")
    with pytest.raises(UserError, match="is to have samples in its rows, but column names are samples, as a"):
        join_omics(plain, expression=tmp_path / "t.csv", orient="samples")
    with pytest.raises(UserError, match="is to have genes in its rows, but row names are samples, as a"):
        join_omics(plain, expression=small(tmp_path), orient="genes")
    frame.T.rename_axis("Hugo_Symbol").to_csv(tmp_path / "c.csv")
    with pytest.raises(UserError, match="has a gene in each row"):
        join_omics(plain, expression=tmp_path / "c.csv", orient="samples")
    join_omics(plain, expression=tmp_path / "t.csv", orient="genes")
    assert omics(plain, "expression")[1]["genes"] == ["TP53", "EGFR", "MKI67"]


def test_delimiters_at_the_end_of_lines(tmp_path):
    (tmp_path / "t.csv").write_text("sample,TP53,EGFR\na,1,0,\nb,0,1,\n")
    table = read_gene_table(tmp_path / "t.csv", "mutation", samples=["a"])
    assert (table.samples, table.values.tolist()) == (["a", "b"], [[1, 0], [0, 1]])


def test_orientation_by_the_names_of_genes_and_by_shape(tmp_path):
    pd.DataFrame(1, index=["p_1", "p_2"], columns=["TP53", "EGFR"]).to_csv(tmp_path / "genes.csv")
    assert read_gene_table(tmp_path / "genes.csv", "mutation").layout.startswith(
        "rows are samples (column names are genes, as TP53)"
    )
    pd.DataFrame(1, index=["x_1", "x_2", "x_3"], columns=["p_1", "p_2"]).to_csv(tmp_path / "shape.csv")
    table = read_gene_table(tmp_path / "shape.csv", "mutation")
    assert table.samples == ["p_1", "p_2"]
    assert "more genes than samples" in table.layout
    assert read_gene_table(tmp_path / "shape.csv", "mutation", orient="samples").genes == ["p_1", "p_2"]


def test_names_of_genes(plain, tmp_path):
    (tmp_path / "t.csv").write_text("sample,TP53|7157,?|100130426,2-Sep,EGFR|1956\na,1,1,1,0\n")
    report = join_omics(plain, mutation=tmp_path / "t.csv")["mutation"]
    _, about = omics(plain, "mutation")
    assert (about["genes"], about["entrez"]) == (["TP53", "EGFR"], ["7157", "1956"])
    assert (report.nameless_genes, report.dated_genes) == (["?"], ["2-Sep (SEPTIN2?)"])
    (tmp_path / "t.csv").write_text("sample,ENSG00000141510.16,ENSG00000146648.5,ENSG00000000000.1\na,1,0,0\n")
    ids = "id\tgene\tGeneID\nENSG00000141510.11\tTP53\t7157\nENSG00000146648.2\tEGFR\t1956\n"
    (tmp_path / "genes.tsv").write_text(ids)
    report = join_omics(plain, mutation=tmp_path / "t.csv", genes=tmp_path / "genes.tsv")["mutation"]
    assert omics(plain, "mutation")[1]["entrez"] == ["7157", "1956"]
    assert report.unknown_genes == ["ENSG00000000000.1"]
    (tmp_path / "genes.tsv").write_text("id\tname\n1\tTP53\n")
    with pytest.raises(UserError, match="no column `symbol`; its columns are id, name"):
        join_omics(plain, mutation=tmp_path / "t.csv", genes=tmp_path / "genes.tsv")


@pytest.mark.slow
def test_a_mutation_matrix_of_all_genes(tmp_path, shared):
    real = shared("data/omics/mutation-matrix-all-genes.tsv").parent
    cohort = make_cohort(tmp_path / "cohort", ["TCGA-21-5787-01Z-00-DX1"])
    table = real / "mutation-matrix-all-genes.tsv"
    report = join_omics(cohort, mutation=table, genes=real / "expression-genes.tsv", top_variable=99)["mutation"]
    assert (report.samples, report.genes, len(report.unknown_genes)) == (50, 20224, 4647)
    values, about = omics(cohort, "mutation")
    raw = pd.read_csv(table, sep="\t", index_col=0, nrows=1).loc["TCGA-21-5787-01"]
    assert values.shape == (1, 99)
    assert values["TP53"].item() == raw["7157"] == 1
    assert values.iloc[0].tolist() == raw[about["entrez"]].tolist()
    assert 0 < values.to_numpy().sum() < 99


def test_what_is_asked_for_must_be_there(plain, tmp_path):
    with pytest.raises(UserError, match="give a table: --mutation, --expression or both"):
        join_omics(plain)
    with pytest.raises(UserError, match=r"there is no table at .*none.csv"):
        join_omics(plain, mutation=tmp_path / "none.csv")
    with pytest.raises(UserError, match="'cases' is neither; did you mean 'case'"):
        join_omics(make_cohort(tmp_path / "c", ["a"], case={"a": "x"}), expression=small(tmp_path), samples="cases")
    with pytest.raises(UserError, match="--level patient is a part of TCGA barcodes"):
        join_omics(plain, expression=small(tmp_path), level="patient")
    with pytest.raises(UserError, match=r"--top-variable lies in 2..3"):
        join_omics(plain, expression=small(tmp_path), top_variable=4)
    few = pd.read_csv(small(tmp_path), index_col=0).iloc[:2]
    few.to_csv(tmp_path / "few.csv")
    with pytest.raises(UserError, match="learnt from 3 or more"):
        join_omics(plain, expression=tmp_path / "few.csv")


@pytest.mark.parametrize("sparse", [None, "csr_matrix", "csc_matrix"])
def test_h5ad_dense_or_sparse(tmp_path, sparse):
    table = pd.DataFrame([[0, 1.5, 0], [2, 0, 3]], index=["TCGA-02-0047-01", "TCGA-02-0055-01"], columns=list("ABC"))
    read = read_gene_table(write_h5ad(tmp_path / "t.h5ad", table, sparse), "expression")
    np.testing.assert_array_equal(read.values, table.to_numpy(np.float32))
    (tmp_path / "bad.h5ad").write_text("no hdf5")
    with pytest.raises(UserError, match=r"cannot be read as \.h5ad"):
        read_gene_table(tmp_path / "bad.h5ad", "expression")


def test_labels_of_samples_become_columns_of_the_index(cohort, real, tmp_path, capsys):
    raw = pd.read_csv(real / "samples.tsv", sep="\t", index_col=0)
    raw["age_diagnosed"] = np.arange(len(raw)) % 90
    raw.to_csv(tmp_path / "samples.tsv", sep="\t")
    labels = ["--labels", str(tmp_path / "samples.tsv"), "--columns", "acronym", "age_diagnosed"]
    main(["--cohort", str(cohort), *labels])
    out = capsys.readouterr().out
    assert "acronym: 2 (HNSC 1, LGG 1)" in out
    assert f"slides joined: 2 ({HEAD}, {BRAIN})\n  slides not joined: 2 ({NORMAL}, {OTHER})" in out
    rows = read_index(cohort).drop_duplicates("slide").set_index("slide")
    assert rows.loc[HEAD, "acronym"] == raw.loc["TCGA-CR-7395-01", "acronym"] == "HNSC"
    assert rows.loc[BRAIN, "age_diagnosed"] == raw.loc["TCGA-FG-6692-01", "age_diagnosed"]
    assert rows.loc[[NORMAL, OTHER], "acronym"].isna().all()
    with pytest.raises(UserError, match="no column 'acronim'; did you mean 'acronym'"):
        join_labels(cohort, real / "samples.tsv", ["acronim"])
    with pytest.raises(UserError, match="name the --columns"):
        join_labels(cohort, real / "samples.tsv", [])
    (tmp_path / "l.csv").write_text("case,grade,split\nTCGA-CR-7395-01,1,x\nTCGA-CR-7395-01,2,x\n")
    with pytest.raises(UserError, match="different labels of TCGA-CR-7395-01"):
        join_labels(cohort, tmp_path / "l.csv", ["grade"])
    with pytest.raises(UserError, match="'split' is a column that every cohort has"):
        join_labels(cohort, tmp_path / "l.csv", ["split"])
    (tmp_path / "l.csv").write_text("case,grade\nTCGA-XX-7395-01,1\n")
    with pytest.raises(UserError, match=f"no slide is in .*: a slide is called {HEAD}, a row TCGA-XX-7395-01"):
        join_labels(cohort, tmp_path / "l.csv", ["grade"])


def mapped(tmp_path: Path, **samples: str) -> str:
    (tmp_path / "samples.csv").write_text("slide,sample\n" + "".join(f"{k}.svs,{v}\n" for k, v in samples.items()))
    return str(tmp_path / "samples.csv")


def samples_of(cohort: Path) -> dict[str, str | None]:
    index = read_index(cohort).drop_duplicates("slide").set_index("slide")["sample"]
    return {slide: None if pd.isna(sample) else sample for slide, sample in index.items()}


def test_a_slide_that_joins_no_more_has_no_sample(plain, tmp_path):
    (tmp_path / "m.csv").write_text("s,TP53,EGFR\nS1,1,0\nS2,0,1\n")
    join_omics(plain, mutation=tmp_path / "m.csv", samples=mapped(tmp_path, a="S1", b="S2"))
    report = join_omics(plain, mutation=tmp_path / "m.csv", samples=mapped(tmp_path, b="S1"))["mutation"]
    assert report.not_joined == ["a.svs"]
    assert samples_of(plain) == {"a.svs": None, "b.svs": "S1"}
    data = TileDataset(str(plain), conditions={"mutation": "omics/mutation"}, missing="skip")
    assert {data[i]["slide"] for i in range(len(data))} == {"b.svs"}


def test_tables_joined_in_separate_runs_keep_their_slides(plain, tmp_path):
    both = mapped(tmp_path, a="a", b="b")
    join_omics(plain, expression=small(tmp_path), samples=both)
    (tmp_path / "m.csv").write_text("s,TP53,EGFR\nb,1,0\n")
    join_omics(plain, mutation=tmp_path / "m.csv", samples=mapped(tmp_path, b="b"))
    assert samples_of(plain) == {"a.svs": "a", "b.svs": "b"}
    (tmp_path / "m.csv").write_text("s,TP53,EGFR\na,1,0\nb,0,1\n")
    with pytest.raises(UserError, match=r"knows a.svs as a, and it would become c"):
        join_omics(plain, mutation=tmp_path / "m.csv", samples=mapped(tmp_path, a="c", b="b"))
    other = make_cohort(tmp_path / "other", ["a.svs", "b.svs"])
    join_omics(other, expression=small(tmp_path), samples=mapped(tmp_path, a="a"))
    with pytest.raises(UserError, match=r"knows a.svs as a, and it would become no sample"):
        join_omics(other, mutation=tmp_path / "m.csv", samples=mapped(tmp_path, b="a"))


def test_labels_of_another_table_replace_all_of_the_first(plain, tmp_path):
    (tmp_path / "l.csv").write_text("s,grade\na,low\nb,high\n")
    join_labels(plain, tmp_path / "l.csv", ["grade"])
    (tmp_path / "l.csv").write_text("s,grade\nb,2\n")
    join_labels(plain, tmp_path / "l.csv", ["grade"])
    grades = read_index(plain).drop_duplicates("slide").set_index("slide")["grade"]
    assert grades["b.svs"] == 2
    assert pd.isna(grades["a.svs"])


def test_a_cohort_of_held_out_slides_keeps_its_genes(tmp_path):
    held = make_cohort(tmp_path / "held", ["a", "b"], split={"a": "test", "b": "val"})
    (tmp_path / "m.csv").write_text("s,TP53,EGFR,KRAS\na,1,0,\nb,0,1,\n")
    report = join_omics(held, mutation=tmp_path / "m.csv")["mutation"]
    assert omics(held, "mutation")[1]["genes"] == ["TP53", "EGFR"]
    assert report.empty_genes == ["KRAS"]
    (tmp_path / "m.csv").write_text("s,TP53,EGFR,KRAS\na,1,0,\nc,,,\n")
    with pytest.raises(UserError, match="no gene with a known value"):
        join_omics(held, mutation=tmp_path / "m.csv")
    with pytest.raises(UserError, match="the ranges of another cohort or of a model as --scaler"):
        join_omics(held, expression=pd.read_csv(small(tmp_path), index_col=0).loc[["a", "b"]].pipe(csv, tmp_path))


def csv(frame: pd.DataFrame, folder: Path) -> Path:
    frame.to_csv(folder / "frame.csv", index_label="sample")
    return folder / "frame.csv"


@pytest.mark.parametrize("kind", ["json", "model", "model without genes"])
def test_expression_is_scaled_as_the_model_was_trained(plain, tmp_path, kind):
    join_omics(plain, expression=small(tmp_path))
    about = omics(plain, "expression")[1]
    path = plain / "omics" / "expression.json"
    if kind != "json":
        path = tmp_path / "model"
        path.mkdir()
        known = {name: value for name, value in about.items() if name != "genes" or kind == "model"}
        config = {"model": {}, "metadata": {"conditions": {"class": {"source": "c"}, "expression": known}}}
        (path / "config.yaml").write_text(json.dumps(config))
        if kind == "model without genes":
            (path / "expression_genes.txt").write_text("\n".join(about["genes"]))
    new = make_cohort(tmp_path / "new", ["x", "y"], split={"x": "test", "y": "test"})
    table = pd.DataFrame({"OTHER": [1.5, 2.5], "MKI67": [9.5, 40 / 3], "TP53": [3.5, 20.5]}, index=["x", "y"])
    main(["--cohort", str(new), "--expression", str(csv(table, tmp_path)), "--scaler", str(path)])
    values, written = omics(new, "expression")
    assert values.columns.tolist() == written["genes"] == ["TP53", "EGFR", "MKI67"]
    low, high = (dict(zip(about["genes"], about["scaler"][end])) for end in ("low", "high"))
    expected = (9.5 - low["MKI67"]) / (high["MKI67"] - low["MKI67"])
    assert values.loc["x", "MKI67"] == pytest.approx(expected, abs=1e-5)
    assert values.loc["y", "TP53"] == 1
    assert values["EGFR"].isna().all()
    assert (written["scaler"], written["report"]["lacking_genes"]) == (about["scaler"], 1)


def test_scalers_that_are_none(plain, tmp_path):
    table = small(tmp_path)
    (tmp_path / "s.json").write_text('{"genes": ["TP53", "EGFR"], "scaler": null}')
    with pytest.raises(UserError, match="has no ranges of expression"):
        join_omics(plain, expression=table, scaler=tmp_path / "s.json")
    (tmp_path / "s.json").write_text('{"genes": ["TP53", "EGFR"], "scaler": {"low": [1], "high": [2]}}')
    with pytest.raises(UserError, match="not a low and a higher high for each of its 2 genes"):
        join_omics(plain, expression=table, scaler=tmp_path / "s.json")
    (tmp_path / "s.json").write_text('{"genes": ["TP53", "EGFR"], "scaler": {"low": [1, 1], "high": [2, 2]}}')
    (tmp_path / "unit.csv").write_text("s,TP53,EGFR\na,0.5,0.25\nb,0.1,0.2\n")
    with pytest.raises(UserError, match=r"values in \[0, 1\], which --scaler would scale again"):
        join_omics(plain, expression=tmp_path / "unit.csv", scaler=tmp_path / "s.json")
    with pytest.raises(UserError, match="--scaler is of --expression"):
        join_omics(plain, expression=table, scaler=tmp_path / "s.json", top_variable=2)
    with pytest.raises(UserError, match="cannot read `scaler`"):
        join_omics(plain, expression=table, scaler=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("s,grade\n", ["grade"], "has no rows"),
        ("s,grade,grade\na,1,2\n", ["grade"], "2 columns called 'grade'"),
        ("s,grade\na,1,2,3\n", ["grade"], "rows with more cells than its header"),
    ],
)
def test_tables_of_labels_that_are_none(plain, tmp_path, text, columns, message):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        join_labels(plain, tmp_path / "l.csv", columns)


def test_a_label_may_be_called_key(plain, tmp_path):
    (tmp_path / "l.csv").write_text("s,key\na,x\nb,y\n")
    join_labels(plain, tmp_path / "l.csv", ["key"])
    assert read_index(plain)["key"].tolist() == ["x", "x", "y", "y"]


@pytest.mark.parametrize("text", ["", "slide\na.svs\n"])
def test_samples_that_are_no_table(plain, tmp_path, text):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(UserError, match=r"s\.csv"):
        join_omics(plain, expression=small(tmp_path), samples=str(tmp_path / "s.csv"))


def test_options_that_would_do_nothing(plain, tmp_path):
    table = small(tmp_path)
    with pytest.raises(UserError, match="--columns are of a table of --labels"):
        main(["--cohort", str(plain), "--expression", str(table), "--columns", "grade"])
    (tmp_path / "g.txt").write_text("TP53\nEGFR\n")
    with pytest.raises(UserError, match="--gene-list and --top-variable both choose"):
        join_omics(plain, expression=table, gene_list=tmp_path / "g.txt", top_variable=2)


def test_a_column_of_text_takes_no_numbers(plain):
    rows = pd.DataFrame({"slide": "a.svs", "row": [0, 1]})
    merge_index(plain, rows.assign(grade="high"))
    with pytest.raises(UserError, match="'grade' of the table of tiles holds text and would get numbers"):
        merge_index(plain, rows.assign(slide="b.svs", grade=[1, 2]))
    merge_index(plain, rows.assign(slide="b.svs", grade=np.nan))
    merge_index(plain, rows.assign(grade=[1, 2]))
    assert read_index(plain)["grade"].tolist()[:2] == [1, 2]
