"""Caption tables: their forms, what is wrong with them, and the way to stores, cached features and batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import ROOT
from data_prep.encode_captions import main as encode_captions
from data_prep.import_captions import main as import_captions
from ldm.conditioners.text import TextEmbedder
from ldm.data.cohort import merge_index, read_index, write_store
from ldm.data.datasets import TileDataset
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.images.pictures import Picture
from ldm.tables.captions import drop_unreadable, read_captions, square

CONFIG = Path(__file__).parent / "configs" / "tiny_clip.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "image").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image" / f"{i}.png")
    return tmp_path


def table(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def rows(path: Path, **options) -> list[tuple[str, str, str]]:
    found = read_captions(path, **options)
    assert not found.problems, found.problems
    return [(caption.path, caption.text, caption.modality) for caption in found.captions]


@pytest.mark.parametrize(
    ("text", "expected", "form"),
    [
        ("path, Text, modality\nimage/0.png, breast with tumor, MRI\n", ("breast with tumor", "MRI"), "CSV"),
        (
            "path,Text,modal\nimage/0.png,A mass in the breast, indicating Her2.,BreastMRI\n",
            ("A mass in the breast, indicating Her2.", "BreastMRI"),
            "unquoted",
        ),
        ("PATH , text , Modality\nimage/0.png, a, b, c, and d , CT \n", ("a, b, c, and d", "CT"), "unquoted"),
        ("path,Text\nimage/0.png,one, two, three\n", ("one, two, three", ""), "unquoted"),
        ('path,Text,modality\nimage/0.png,"one, ""two""",CT\n', ('one, "two"', "CT"), "CSV"),
        ('path, Text, modality\nimage/0.png, "one, two", CT\n', ("one, two", "CT"), "CSV"),
        ('path,Text,modality\nimage/0.png,"cyst" seen, left,CT\n', ('"cyst" seen, left', "CT"), "unquoted"),
        ('path,Text,modality\nimage/0.png,12" film, left,CT\n', ('12" film, left', "CT"), "unquoted"),
        ('path,Text,modality\nimage/0.png,"two\nlines",CT\n', ("two\nlines", "CT"), "CSV"),
        ("id;caption;Modality;filename\n7;a, b;OCT;image/0.png\n", ("a, b", "OCT"), "CSV"),
        ("filename\treport\r\nimage\\0.png\ta\r\n", ("a", ""), "tab-separated"),
        ('filename\treport\nimage/0.png\t"12" film\n', ('"12" film', ""), "tab-separated"),
        ("\ufeffpath,Text\nimage/0.png,caf\u00e9 cr\u00e8me\u2028spots\n\n", ("café crème\u2028spots", ""), "CSV"),
    ],
)
def test_forms(folder, text, expected, form):
    path = table(folder, text)
    assert rows(path) == [("image/0.png", *expected)]
    assert read_captions(path).form.startswith(form)


def test_one_unquoted_row_does_not_spoil_the_quoted_ones(folder):
    text = 'path,Text,modality\nimage/0.png,"a, b",CT\nimage/1.png,c, d,MRI\nimage/2.png,e,CT\n'
    assert [row[1:] for row in rows(table(folder, text))] == [("a, b", "CT"), ("c, d", "MRI"), ("e", "CT")]


def test_columns_by_name(folder):
    path = table(folder, "who,where,what,kind\nA,0.png,x,CT\nB,1.png,y,MRI\n")
    names = {"path_column": "Where", "text_column": "what", "modality_column": "kind", "patient": "who"}
    found = read_captions(path, images=folder / "image", **names)
    assert [(c.path, c.text, c.modality, c.patient, c.line) for c in found.captions] == [
        ("0.png", "x", "CT", "A", 2),
        ("1.png", "y", "MRI", "B", 3),
    ]
    with pytest.raises(UserError, match="no column 'whom'; did you mean 'who'"):
        read_captions(path, path_column="whom")
    with pytest.raises(UserError, match="--path-column"):
        read_captions(path)
    with pytest.raises(UserError, match="--text-column"):
        read_captions(path, path_column="where")


def test_rows_that_cannot_be_used(folder):
    (folder / "image" / "broken.png").write_bytes((folder / "image" / "0.png").read_bytes()[:200])
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(folder / "image" / "deep.png")
    lines = [
        "path,Text,modality", "image/0.png,a, b,CT", "image/1.png,,CT", "image/9.png,a,CT", "image/0.png,a, b,CT",
        "image/2.png", ",a,CT", "image/broken.png,a,CT", "image/deep.png,a,CT", "image/0.png,another,CT",
    ]  # fmt: skip
    found = read_captions(table(folder, "\n".join(lines)))
    drop_unreadable(found)
    assert [caption.line for caption in found.captions] == [2, 10]
    reasons = dict(found.problems)
    assert list(reasons) == [3, 4, 5, 6, 7, 8, 9]
    for line, words in {3: "caption of image/1.png is empty", 4: "no image", 5: "stands in line 2", 6: "1 field, exp",
                        7: "no image path", 8: "cannot be read", 9: "more than 8 bits"}.items():  # fmt: skip
        assert words in reasons[line], (line, reasons[line])


def test_wrong_counts_of_a_csv_with_other_columns(folder):
    found = read_captions(table(folder, "path,Text,age,sex\nimage/0.png,a, b,7,F\nimage/1.png,c,8,M\n"))
    assert [caption.line for caption in found.captions] == [3]
    assert found.problems == [(2, "5 fields, expected 4; captions with commas need quotes")]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"path,Text\n", "no rows"), (b"path\x00\x01Text", "no text"), (b"PK\x03\x04", "Excel")],
)
def test_files_that_are_no_table(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / "t.csv")


def test_squares(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 200  # the middle square
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = Picture.of_file(tmp_path / "a.png").pixels()
    assert (square(image, 10) > 150).all()
    padded = square(image, 40, "pad")
    assert padded.shape == (40, 40, 3)
    assert (padded[:10] == 0).all()
    assert (padded[11:29, 11:29] == 200).all()
    with pytest.raises(UserError, match="shorter, pad"):
        square(image, 10, "crop")


def test_from_table_to_batch(folder, capsys):
    text = "path, Text, modality\nimage/0.png, a mass, left, CT\nimage/1.png, no mass, MRI\nimage/7.png, gone, CT\n"
    path, cohort = table(folder, text, "minim.csv"), folder / "cohort"
    arguments = ["--table", str(path), "--out", str(cohort), "--size", "32", "--licence", "CC0"]
    with pytest.raises(UserError) as error:
        import_captions(arguments)
    assert "1 of 3 rows" in str(error.value)
    assert "image/7.png" in str(error.value)
    assert not cohort.exists()
    capsys.readouterr()
    import_captions([*arguments, "--skip-bad"])
    printed = capsys.readouterr().out
    for words in ("unquoted captions", "2 of 3 rows", "line 4: there is no image", "modalities: 1 CT, 1 MRI"):
        assert words in printed
    index = read_index(cohort)
    assert index[["slide", "row", "text", "modality", "source"]].to_numpy().tolist() == [
        ["minim", 0, "a mass, left", "CT", "image/0.png"],
        ["minim", 1, "no mass", "MRI", "image/1.png"],
    ]
    store = TileStore.open(cohort / "slides" / "minim.zarr")
    assert store.attrs["licence"] == "CC0"
    expected = square(Picture.of_file(folder / "image" / "1.png").pixels(), 32)
    np.testing.assert_array_equal(store.tile(1), expected)
    dataset = TileDataset(str(cohort), conditions={"text": "text", "modality": "modality"})
    assert {key: dataset[1][key] for key in ("text", "modality")} == {"text": "no mass", "modality": "MRI"}
    assert dataset.metadata["conditions"]["modality"]["names"] == ["CT", "MRI"]
    import_captions([*arguments, "--skip-bad"])  # again: nothing is made anew
    pd.testing.assert_frame_equal(read_index(cohort), index)


def test_captions_of_a_patient_share_a_split(folder):
    lines = [f"image/{i % 4}.png,caption {i},P{i // 8}" for i in range(16)]
    path = table(folder, "\n".join(["path,text,subject", *lines]))
    import_captions(["--table", str(path), "--out", str(folder / "c"), "--size", "16", "--validation", "0.5",
                     "--patient", "subject"])  # fmt: skip
    index = read_index(folder / "c")
    assert index.groupby("patient")["split"].nunique().tolist() == [1, 1]
    assert set(index["patient"]) == {"P0", "P1"}
    import_captions(["--table", str(path), "--out", str(folder / "d"), "--size", "16", "--validation", "0.5"])
    index = read_index(folder / "d")
    assert index.groupby("source")["split"].nunique().max() == 1  # several captions of one image
    assert set(index["patient"]) == {f"image/{i}.png" for i in range(4)}


def test_captions_of_slides(folder, capsys):
    """Reports of slides or patients go to all their tiles, as PathLDM conditions on them."""
    cohort = folder / "cohort"
    for name, slide in (("a", "TCGA-A1-0001-01Z.svs"), ("b", "TCGA-A1-0002-01Z.svs"), ("c", "other.svs")):
        attrs = {"tile_size": 16, "slide": slide}
        write_store(cohort, name, lambda i: np.full((16, 16, 3), i, np.uint8), 2, attrs=attrs)
        merge_index(cohort, pd.DataFrame({"slide": slide, "row": [0, 1]}))
    text = "path,text\nTCGA-A1-0001,high grade, ductal\nTCGA-A1-0002-01Z,low grade\nTCGA-A1-0009,lost\n"
    path = table(folder, text, "reports.csv")
    import_captions(["--table", str(path), "--of-slides", "--out", str(cohort)])
    index = read_index(cohort).set_index("slide")
    assert index.loc["TCGA-A1-0001-01Z.svs", "text"].tolist() == ["high grade, ductal"] * 2
    assert index.loc["TCGA-A1-0002-01Z.svs", "text"].tolist() == ["low grade"] * 2
    assert index.loc["other.svs", "text"].isna().all()
    printed = capsys.readouterr().out
    for words in ("4 tiles of 2 slides", "1 captions belong to no", "TCGA-A1-0009", "1 slides have no caption: other"):
        assert words in printed
    dataset = TileDataset(str(cohort), conditions={"text": "text"}, missing="skip")
    assert [dataset[i]["text"] for i in range(len(dataset))] == ["high grade, ductal"] * 2 + ["low grade"] * 2
    twice = table(folder, "path,text\nTCGA-A1-0001,x\nTCGA-A1-0001-01Z.svs,y\n", "twice.csv")
    with pytest.raises(UserError, match="from line 2 and from line 3"):
        import_captions(["--table", str(twice), "--of-slides", "--out", str(cohort)])
    none = table(folder, "path,text\nTCGA-XX,x\n", "none.csv")
    with pytest.raises(UserError, match="none of the 1 names"):
        import_captions(["--table", str(none), "--of-slides", "--out", str(cohort)])


def test_captions_encoded_into_the_store_train_like_captions(folder, capsys):
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**json.loads(CONFIG.read_text())).state_dict(), folder / "clip.pt")
    path = table(folder, f"path,text,modality\nimage/0.png,a mass,CT\nimage/1.png,{'far too long ' * 60},MRI\n")
    cohort = folder / "cohort"
    import_captions(["--table", str(path), "--out", str(cohort), "--size", "16"])
    settings = {"chunks": 2, "layout": "separate", "mask_padding": False, "prompt": "{modality}: {text}"}
    command = ["--store", str(cohort), "--model", str(CONFIG), "--weights", str(folder / "clip.pt"), "--name", "clip",
               "--chunks", "2", "--layout", "separate", "--no-mask-padding", "--prompt", settings["prompt"],
               "--device", "cpu"]  # fmt: skip
    capsys.readouterr()
    encode_captions(command)
    printed = capsys.readouterr()
    assert "features/clip of 2 captions in 1 store" in printed.out
    assert printed.err.count("1 of 2 captions are longer than 150 tokens and were cut; the longest one, of 18") == 1
    assert "loses 'too long far too long" in printed.err
    text = TextEmbedder(str(CONFIG), str(folder / "clip.pt"), **settings)
    dataset = TileDataset(str(cohort), conditions={"text": "features/clip"})
    text.check_data(dataset.metadata)
    batch = {"text": torch.stack([dataset[0]["text"], dataset[1]["text"]])}
    live = TileDataset(str(cohort), conditions={"text": "text", "modality": "modality"})
    words = {key: [live[0][key], live[1][key]] for key in ("text", "modality")}
    expected = text(words)["crossattn"]
    torch.testing.assert_close(text(batch)["crossattn"], expected, rtol=1e-3, atol=1e-2)
    text(words)
    assert capsys.readouterr().err.count("1 of 2 captions are longer") == 1  # a training is told once
    encode_captions(command)  # finished already
    other = TextEmbedder(str(CONFIG), str(folder / "clip.pt"), **{**settings, "layout": "joint"})
    with pytest.raises(UserError, match="was made with layout separate"):
        other.check_data(dataset.metadata)
    index = read_index(cohort)
    index["text"] = ["", "b"]
    index.to_parquet(cohort / "index.parquet")
    with pytest.raises(UserError, match=r"1 of 2 tiles .* have no text"):
        encode_captions([*command, "--name", "again"])


def test_chest_x_rays(tmp_path, capsys):
    """A real table: quoted captions with commas, images in a folder of their own."""
    source, out = ROOT / "tests" / "data" / "captions.csv", tmp_path / "out"
    arguments = ["--table", str(source), "--out", str(out), "--size", "32", "--text-column",
                 "clinical_notes", "--modality-column", "view", "--resize", "pad"]  # fmt: skip
    with pytest.raises(UserError, match="X-ray_of_cyst"):
        import_captions(arguments)  # the images are not beside the table
    (tmp_path / "images").mkdir()
    for name in pd.read_csv(source)["filename"]:
        Image.new("L", (48, 40)).save(tmp_path / "images" / name)
    import_captions([*arguments, "--images", str(tmp_path / "images")])
    assert "7 of 7 rows" in capsys.readouterr().out
    index = read_index(out)
    assert len(index) == 7
    assert set(index["modality"]) == {"PA"}
    assert index["text"][0].endswith("Note the large cyst (arrow)")
    assert index["text"].str.contains(",").any()


@pytest.mark.parametrize("fractions", [["--validation", "2"], ["--validation", "-1", "--test", "3"]])
def test_fractions_of_splits(folder, fractions):
    path = table(folder, "path,text\nimage/0.png,a\n")
    with pytest.raises(UserError, match="fractions from 0 to 1 that sum to 1"):
        import_captions(["--table", str(path), "--out", str(folder / "out"), "--size", "16", *fractions])
    assert not (folder / "out").exists()
