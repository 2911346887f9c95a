"""The commands, on a tiny real model and the real slide."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import openslide
import pytest
import torch
from PIL import Image
from test_latent_diffusion import node
from typer.testing import CliRunner

from data_prep.cohort_index import update_index
from data_prep.tile_slides import tile_slide
from ldm.cli import app
from ldm.commands.grids import asked_grid, checked_mpp
from ldm.config import instantiate_from_config
from ldm.convert import load_model
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.model_folder import write_model_folder
from ldm.sampling.tiles import sample

SHA = {"encoder": "tiny", "weights_sha256": "a" * 64, "licence": "MIT"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, demo_slide):
    """A model folder, and a tile store of the demo slide with features."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = instantiate_from_config(node(use_ema=False))
    write_model_folder(folder / "model", node(use_ema=False), model.state_dict(), {"mpp": 0.499, "encoder": SHA})
    store = tile_slide(demo_slide, folder / "cohort", stride=256, min_tissue=0.1, keep_background=0.2)
    update_index(folder / "cohort")
    rows = np.random.default_rng(0).normal(size=(len(TileStore.open(store)), 24))
    with ArrayWriter(store, "features/tiny", (24,), "f4", SHA) as writer:
        writer.append(rows)
    return folder, store


def run(*args) -> str:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False).output


def test_sample_writes_tiles_that_say_what_they_are(world, tmp_path):
    folder, store = world
    run("sample", "--model", folder / "model", "--features", store, "--count", 5, "--steps", 2, "--out", tmp_path)
    rows = list(csv.DictReader((tmp_path / "tiles.csv").open()))
    assert [row["file"] for row in rows] == [f"{i:05d}.png" for i in range(5)]
    image = Image.open(tmp_path / "00003.png")
    assert image.size == (32, 32)
    about = json.loads(image.text["SYNTHETIC"])
    assert about["model"] == "model"
    assert about["seed"] == 0
    assert f"row={rows[3]['row']}" in about["condition"]
    assert about["encoder_licence"] == "MIT"
    assert (tmp_path / "contact_sheet.png").exists()


def test_a_file_of_features_and_a_batch_size_give_the_same_tiles(world, tmp_path):
    folder, store = world
    features = np.asarray(TileStore.open(store).features("tiny")[:4])
    np.save(tmp_path / "f.npy", features)
    for name, size in (("a", 1), ("b", 4)):
        run("sample", "--model", folder / "model", "--features", tmp_path / "f.npy", "--steps", 2,
            "--batch-size", size, "--out", tmp_path / name)  # fmt: skip
    for i in range(4):
        a, b = (np.asarray(Image.open(tmp_path / name / f"{i:05d}.png")).astype(int) for name in "ab")
        assert np.abs(a - b).max() <= 1


@pytest.mark.slow
def test_an_interrupted_sample_goes_on_and_other_settings_do_not_mix(world, tmp_path, monkeypatch):
    folder, store = world
    command = ["sample", "--model", folder / "model", "--features", store, "--count", 5, "--steps", 2]
    run(*command, "--out", tmp_path / "straight")
    calls = []

    def stopped(*args, **kwargs):
        if calls:
            raise RuntimeError("power cut")
        calls.append(kwargs)
        return sample(*args, **kwargs)

    monkeypatch.setattr("ldm.commands.generate.sample", stopped)
    with pytest.raises(RuntimeError, match="power cut"):
        run(*command, "--batch-size", 2, "--out", tmp_path / "halves")
    assert sorted(path.name for path in (tmp_path / "halves").iterdir()) == ["00000.png", "00001.png"]
    first = (tmp_path / "halves" / "00000.png").stat().st_mtime_ns
    monkeypatch.undo()
    run(*command, "--batch-size", 3, "--out", tmp_path / "halves")
    assert (tmp_path / "halves" / "00000.png").stat().st_mtime_ns == first
    for i in range(5):
        a, b = (np.asarray(Image.open(tmp_path / name / f"{i:05d}.png")).astype(int) for name in ("straight", "halves"))
        assert np.abs(a - b).max() <= 1
    with pytest.raises(UserError, match=r"halves/00000.png is there and was made otherwise \(seed\)"):
        run(*command, "--seed", 1, "--out", tmp_path / "halves")
    np.save(tmp_path / "one.npy", np.zeros((1, 24), np.float32))
    (tmp_path / "halves" / "00000.png").unlink()
    with pytest.raises(UserError, match=r"00001\.png is there and is none of these images"):
        run("sample", "--model", folder / "model", "--features", tmp_path / "one.npy", "--out", tmp_path / "halves")


def test_sample_tells_tiles_of_another_extent(world, tmp_path):
    folder, store = world
    made = instantiate_from_config(node(use_ema=False))
    about = {"mpp": 0.25, "tile_size": 256, "encoder": SHA}
    write_model_folder(tmp_path / "model", node(use_ema=False), made.state_dict(), about)
    sample = ["sample", "--features", store, "--count", 1, "--steps", 1]
    assert "note: tiles of" not in run(*sample, "--model", folder / "model", "--out", tmp_path / "alike")
    assert "cover 128 um (256 px at 0.499 um/px), those that the model was trained on 64 um" in run(
        *sample, "--model", tmp_path / "model", "--out", tmp_path / "other"
    )


def test_the_models_mpp_counts_and_a_store_of_another_is_refused(world):
    _, store = world
    tiles = TileStore.open(store)
    assert checked_mpp(SimpleNamespace(metadata={}), tiles) == tiles.mpp
    assert checked_mpp(SimpleNamespace(metadata={"mpp": 0.5, "tile_size": 256}), tiles) == 0.5
    with pytest.raises(UserError, match=r"cover 128 um .* 256 um .*--mpp"):
        checked_mpp(SimpleNamespace(metadata={"mpp": 1.0, "tile_size": 256}), tiles)


@pytest.mark.slow
def test_large_image_writes_every_format_at_the_right_size_and_mpp(world, tmp_path):
    folder, store = world
    outs = [tmp_path / "image.png", tmp_path / "image.tif", tmp_path / "image.ome.zarr"]
    run("large-image", "--model", folder / "model", "--features", store, "--region", "768,1280,1024,768",
        "--size", "224,160", "--steps", 2, *(part for out in outs for part in ("--out", out)))  # fmt: skip
    assert Image.open(outs[0]).size == (224, 160)
    with openslide.OpenSlide(outs[1]) as slide:
        assert slide.dimensions == (224, 160)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.499, rel=1e-3)
        assert "SYNTHETIC" in slide.properties["tiff.ImageDescription"]
    assert (outs[2] / "zarr.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--features": "nothing.npy"}, "no features at nothing.npy"),
        ({"--feature": "tinny"}, "did you mean 'tiny'"),
        ({"--where": "split"}, "label=value"),
        ({"--where": "split=vall"}, "is selected"),
        ({"--model": "nowhere"}, "does not exist"),
        ({"--device": "cuda:9"}, "this machine has no device"),
    ],
)
def test_mistakes_of_sample_are_told_before_work(world, tmp_path, change, message):
    folder, store = world
    options = {"--model": folder / "model", "--features": store, "--out": tmp_path / "out"} | change
    with pytest.raises(UserError, match=message):
        run("sample", *(part for option in options.items() for part in option))


@pytest.mark.slow
def test_features_of_another_dimension_or_encoder_are_refused(world, tmp_path):
    folder, store = world
    np.save(tmp_path / "wrong.npy", np.zeros((3, 25), np.float32))
    with pytest.raises(UserError, match="24"):
        run("sample", "--model", folder / "model", "--features", tmp_path / "wrong.npy", "--out", tmp_path)
    rows = np.zeros((len(TileStore.open(store)), 24), np.float32)
    with ArrayWriter(store, "features/other", (24,), "f4", SHA | {"weights_sha256": "b" * 64}) as writer:
        writer.append(rows)
    with pytest.raises(UserError, match="trained on 'tiny'"):
        run("sample", "--model", folder / "model", "--features", store, "--feature", "other", "--out", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "image.gif"], "must end in"),
        (["--out", "image.png", "--region", "1,2,3"], "x,y,width,height"),
        (["--out", "image.png", "--region", "1,2,1024,1024"], "lattice"),
        (["--out", "image.png", "--size", "100"], "width,height"),
        (["--out", "/proc/nothing/image.png"], "cannot write"),
    ],
)
def test_mistakes_of_large_image_are_told_before_work(world, tmp_path, monkeypatch, options, message):
    folder, store = world
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run("large-image", "--model", folder / "model", "--features", store, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["3", "5,1", "a,b", "-1,2"])
def test_a_guidance_interval_is_two_noise_levels_or_all(world, tmp_path, text):
    folder, store = world
    call = ["large-image", "--model", folder / "model", "--features", store, "--out", tmp_path / "a.png"]
    with pytest.raises(UserError, match="low,high"):
        run(*call, f"--guidance-interval={text}")


def test_a_cohort_is_described_with_the_source_of_its_scale(tmp_path, demo_slide):
    Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(tmp_path / "plain.png")
    out = tmp_path / "cohort"
    for path, known in ((demo_slide, {}), (tmp_path / "plain.png", {"slide_mpp": 0.499})):
        tile_slide(path, out, tile_size=64, min_tissue=0.0 if known else 0.99, keep_background=0.0, **known)
    said = CliRunner().invoke(app, ["describe", str(out)], catch_exceptions=False).output
    assert "tiles of 64 px at 0.499 um per pixel" in said
    assert "source of the micrometres per pixel: header (aperio) (CMU-1-Small-Region.svs)" in said
    assert "source of the micrometres per pixel: given by hand (plain.png)" in said
    assert f"note: there is no table of tiles at {out / 'index.parquet'}" in said
    update_index(out, test=0.5)
    said = CliRunner().invoke(app, ["describe", str(out / "slides" / "plain.zarr")], catch_exceptions=False).output
    assert "plain.zarr: 1 tiles in 1 store\n" in said
    assert "1 patient; splits: 1 t" in said


def test_holes_of_a_store_take_the_feature_of_its_glass(world):
    folder, store = world
    held = TileStore.open(store)
    grid = asked_grid(load_model(folder / "model"), store, None, None, None)
    assert np.isnan(grid.features).any()
    bare = np.flatnonzero(held.labels("tissue") < 0.01)
    np.testing.assert_allclose(grid.background, held.features("tiny")[:][bare].mean(0), rtol=1e-5)
