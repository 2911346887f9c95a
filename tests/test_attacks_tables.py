"""Tables that others wrote name the files of their own folder; others take a word from the user, --files-in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from attacks import refused
from PIL import Image

from data_prep.import_captions import main as import_captions
from data_prep.slide_table import read_slides
from data_prep.tile_slides import main as tile_slides
from ldm.data.collection import read_pictures
from ldm.errors import UserError
from ldm.files import sha256
from ldm.foreign.paths import files_in
from ldm.scorers.labelled import read_labelled
from ldm.scorers.ratings import read_ratings
from ldm.tables.captions import read_captions


@pytest.fixture
def private(tmp_path, monkeypatch) -> Path:
    """A folder of images of the user's, beside the folder `got` that came from somebody."""
    for name in ("private", "got"):
        (tmp_path / name).mkdir()
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    (tmp_path / "got" / "link.png").symlink_to(tmp_path / "private" / "0.png")
    (tmp_path / "got" / "folder").symlink_to(tmp_path / "private")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "private"


WAYS: dict[str, Callable[[Path], str]] = {
    "absolute": lambda private: str(private / "0.png"),
    "above": lambda private: f"../{private.name}/0.png",
    "link": lambda private: "link.png",
    "through a link": lambda private: "folder/0.png",
}


def captions(path: Path, name: str) -> object:
    path.with_name("captions.csv").write_text(f"path,text\n0.png,One\n{name},Two\n")
    return [each for each in read_captions(path.with_name("captions.csv")).problems if "lies outside of" in each[1]]


def listed(path: Path, name: str) -> object:
    pd.DataFrame({"file": ["0.png", name]}).to_csv(path.with_name("tiles.csv"), index=False)
    return read_pictures(path.parent)


def labelled(path: Path, name: str) -> object:
    pd.DataFrame({"path": ["0.png", name], "label": ["a", "b"]}).to_csv(path.with_name("labels.csv"), index=False)
    return read_labelled(path.with_name("labels.csv"), positive="a")


def rated(path: Path, name: str) -> object:
    images = [{"number": i, "file": file, "sha256": sha256(path.parent / file), "was": {}}
              for i, file in enumerate(("0.png", name))]  # fmt: skip
    path.with_name("ratings.json").write_text(json.dumps({"scale": ["bad", "good"], "images": images}))
    pd.DataFrame({"number": [0, 1], "rating": ["bad", "good"]}).to_csv(path.with_name("ratings.csv"), index=False)
    return read_ratings(path.with_name("ratings.csv"))


def slides(path: Path, name: str) -> object:
    path.with_name("slides.csv").write_text(f"path\n1.png\n{name}\n")
    return read_slides([path.with_name("slides.csv")])


def regions(path: Path, name: str) -> object:
    path.with_name("slides.csv").write_text(f"path,roi\n1.png,{name}\n")
    return read_slides([path.with_name("slides.csv")])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("table", [listed, labelled, rated, slides, regions])
def test_tables_name_files_of_their_own_folder(tmp_path, private, table, way):
    name, path = WAYS[way](private), tmp_path / "got" / "table.csv"
    said = refused(lambda: table(path, name), "outside of the folder .* say where they lie")
    assert name in said
    folder = said.rpartition("--files-in ")[2]  # what it says can be typed
    assert os.path.samefile(folder, private)
    with files_in([folder]):
        assert table(path, name)
    if table is not regions:
        assert table(path, "0.png" if table is slides else "1.png")


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_captions_whose_images_lie_elsewhere_are_told(tmp_path, private, way):
    ((line, reason),) = captions(tmp_path / "got" / "a.csv", WAYS[way](private))
    assert line == 3
    assert reason.endswith(f"--files-in {private}")
    with files_in([private]):
        assert not captions(tmp_path / "got" / "a.csv", WAYS[way](private))


def test_options_say_where_files_may_lie(tmp_path, private):
    captions(tmp_path / "got" / "a.csv", str(private / "1.png"))
    command = ["--table", "got/captions.csv", "--size", "64", "--out", str(tmp_path / "cohort")]
    with pytest.raises(UserError, match=f"line 3: .* lies outside of got; if you mean it, --files-in {private}"):
        import_captions(command)
    import_captions([*command, "--files-in", str(private)])
    (tmp_path / "got" / "slides.csv").write_text(f"path\n{private / '0.png'}\n")
    command = ["--slides", "got/slides.csv", "--slide-mpp", "0.5", "--tile-size", "32", "--min-tissue", "0"]
    with pytest.raises(UserError, match="outside of the folder got"):
        tile_slides([*command, "--out", str(tmp_path / "tiles")])
    tile_slides([*command, "--out", str(tmp_path / "tiles"), "--files-in", str(private)])
    with pytest.raises(UserError, match="outside of the folder got"):  # it holds for its command alone
        tile_slides([*command, "--out", str(tmp_path / "more")])
