"""What strangers send holds pipes in the place of files, which archives can carry: nothing waits for them to end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attacks import model_of, refused
from PIL import Image

from data_prep.slide_table import find_slides
from ldm import model_folder
from ldm.data.cohort import read_index
from ldm.data.collection import read_pictures
from ldm.data.features import read_features
from ldm.data.tile_store import TileStore
from ldm.data.volumes import Volume
from ldm.encoders.encoder import load_encoder
from ldm.images.slides import open_image
from ldm.interop.checkpoint import read_checkpoint
from ldm.report.compare import read_report
from ldm.scorers.ensemble import load_scorer
from ldm.tables.annotations import read_sliderunner
from ldm.tables.captions import read_captions
from ldm.tables.genes import read_gene_table
from ldm.tables.geojson import read_geojson
from ldm.viewer.pictures import find
from ldm.viewer.server import Gallery

NO_FILE = "is a pipe|it is no file|[Tt]here is no|has no|do(es)? not exist|No such file"
DATA = Path(__file__).parents[1] / "data"
FILES: dict[str, Callable[[Path], object]] = {
    "a.npy": read_features, "a.h5": read_features, "a.pt": read_features, "a.ckpt": read_checkpoint,
    "a.safetensors": read_checkpoint, "index.parquet": lambda path: read_index(path.parent), "a.csv": read_captions,
    "e.csv": lambda path: read_gene_table(path, "expression"),
    "e.parquet": lambda path: read_gene_table(path, "expression"), "a.geojson": read_geojson,
    "a.geojson.gz": read_geojson, "a.nii": Volume, "a.nii.gz": Volume, "a.sqlite": read_sliderunner,
    "report.json": lambda path: read_report(path.parent), "a.png": open_image, "a.svs": open_image,
    "a.dcm": open_image, "a.tif": open_image,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_no_file(tmp_path: Path, name: str):
    os.mkfifo(tmp_path / name)
    refused(lambda: FILES[name](tmp_path / name), NO_FILE)


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
def test_a_model_folder_holds_no_pipe(tmp_path: Path, name: str):
    folder = model_of(tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(lambda: model_folder.load_network(folder), NO_FILE)


@pytest.mark.parametrize(("load", "source"), [(load_encoder, "demo-encoder"), (load_scorer, "demo-mitosis-scorers")])
def test_folders_of_encoders_and_scorers_hold_no_pipe(tmp_path: Path, load, source: str):
    folder = shutil.copytree(DATA / "models" / source, tmp_path / "model")
    for file in [*folder.glob("*.yaml"), *folder.glob("*.safetensors")]:
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        refused(lambda: load(folder), NO_FILE)
        file.unlink()
        file.write_bytes(content)
    load(folder)


@pytest.mark.parametrize("name", ["zarr.json", "tiles/zarr.json", "tiles/c/0/0/0/0"])
def test_a_tile_store_holds_no_pipe(tmp_path: Path, tiny_store: Path, name: str):
    path = shutil.copytree(tiny_store, tmp_path / "a.zarr")
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    refused(lambda: TileStore.open(path).tile(0), "is a pipe|lacks 1 of")


def test_a_pipe_among_images_is_left_out(tmp_path: Path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    for name in ("b.png", "c.svs", "d.dcm"):
        os.mkfifo(tmp_path / name)
    assert [picture.file for picture in read_pictures(tmp_path)] == ["a.png"]
    assert find_slides([tmp_path]) == [tmp_path / "a.png"]
    assert [told["name"] for told in Gallery(find([tmp_path])).told] == ["a.png"]


def test_names_of_tensors_take_no_more_than_those_of_any_model(tmp_path: Path):
    """Each of a million is looked for among all, which takes an hour."""
    path = tmp_path / "a.safetensors"
    names = ",".join(f'"a{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(200_000))
    path.write_bytes((len(names) + 2).to_bytes(8, "little") + f"{{{names}}}".encode())
    refused(lambda: read_checkpoint(path), "begins with names of 1.* MB")
