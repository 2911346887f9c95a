"""Sequences: one condition moves and the noise stays; as files, and from real cells."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conftest import ROOT
from ldm.cli import app
from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.images.pictures import Picture
from ldm.images.sheets import fitted
from ldm.images.write import save_animation
from ldm.model_folder import write_model_folder
from ldm.sampling.sampler import Sampler
from ldm.sampling.sweeps import Sweep, parse_sweep, sweep_images, sweep_noise
from ldm.sampling.tiles import sample
from ldm.scorers.ensemble import Ensemble, Task, View, save_scorer

NODE = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {
        "parameterization": "v",
        "beta_schedule": "cosine",
        "use_ema": False,
        "unet_config": {
            "target": "ldm.networks.unet.UNetModel",
            "params": {
                "image_size": 16, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1,
                "attention_resolutions": [], "channel_mult": [1, 1], "num_head_channels": 32,
                "use_scale_shift_norm": True,
            },
        },
        "first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"},
        "cond_stage_config": {
            "target": "ldm.conditioners.score.ScoreEmbedder",
            "params": {"dim": 128, "acts": "vector", "hidden": 16, "dropout": 0.1},
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A small model that has not learnt anything, but whose images follow its score."""
    torch.manual_seed(0)
    model = instantiate_from_config(NODE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp("models") / "cells"
    write_model_folder(folder, NODE, model.state_dict(), {"mpp": 0.5, "tile_size": 16})
    return folder


@pytest.fixture(scope="module")
def model(model_folder):
    from ldm.convert import load_model

    return load_model(model_folder, "cpu")


@pytest.fixture(scope="module")
def scorer_folder(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    view = View(16, (0.5,) * 3, (0.5,) * 3, 16, 0.5)
    folder = tmp_path_factory.mktemp("scorers") / "tiny"
    folder.mkdir()
    return save_scorer(folder, Ensemble(Task("graded", "score"), view, "resnet10t", 2))


@pytest.fixture(scope="module")
def cells() -> list[Path]:
    return sorted((ROOT / "data" / "samples" / "cells" / "Atypical").glob("*.png"))[:3]


def run(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    return result.output


def test_what_varies_is_read_from_a_line():
    assert parse_sweep("score=0:1:5") == Sweep("score", "", (0.0, 0.25, 0.5, 0.75, 1.0))
    assert parse_sweep("expression=MKI67:1:0:3").texts() == ["MKI67:1", "MKI67:0.5", "MKI67:0"]
    assert parse_sweep("mutation=HLA:A:0:1:2").part == "HLA:A"


@pytest.mark.parametrize("text", ["a", "a=0:1", "a=0:1:1", "a=1:1:4", "a=0:x:3", "=0:1:3", "a=0:inf:3"])
def test_what_is_no_sequence_is_one_message(text):
    with pytest.raises(UserError, match=r"score=0:1:5|2 or more"):
        parse_sweep(text)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler_ancestral"])
def test_every_image_of_a_sequence_has_the_same_noise_at_every_step(model, solver):
    conditions = [model.condition(score=value) for value in (0.0, 1.0, 0.0)]
    settings = {"steps": 4, "solver": solver, "seed": 3, "progress": False}
    made = sweep_noise(model, conditions, 3, Sampler(**settings))
    assert made.shape == (3, 3, 3, 16, 16)
    assert torch.equal(made[:, 0], made[:, 2])  # noise of a step that was drawn anew would show here
    assert (made[:, 0] - made[:, 1]).abs().amax() > 0.05
    assert (made[0, 0] - made[1, 0]).abs().amax() > 0.05
    alone = sample(model, conditions[1], 1, Sampler(**settings), first=2)
    torch.testing.assert_close(made[2:, 1], alone, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_real_cell_comes_back_under_its_own_score_and_moves_under_another(model, cells):
    real = np.stack([Picture.of_file(path).part(32.0).pixels((16, 16)) for path in cells])
    images = torch.from_numpy(real).movedim(-1, 1).float() / 127.5 - 1
    conditions = [model.condition(score=value) for value in (0.8, 0.0)]
    sampler = Sampler(steps=12, guidance_scale=1.0, progress=False)
    made = sweep_images(model, images, conditions[0], conditions, sampler)
    error = (made[:, 0] - images).square().mean((1, 2, 3))
    assert (10 * (4 / error).log10()).min() > 35  # dB, between [-1, 1]
    assert ((made[:, 1] - images).square().mean((1, 2, 3)) > 4 * error).all()
    less = sweep_images(model, images, conditions[0], conditions, sampler, strength=0.3)
    assert (less[:, 1] - images).abs().mean() < (made[:, 1] - images).abs().mean()


def test_the_middle_of_a_cell_is_what_training_saw(cells):
    from data_prep.cut_cells import cut_cell
    from ldm.images.slides import open_slide

    slide = open_slide(cells[0], mpp=0.25)
    seen = Picture.of_file(cells[0]).part(64.0).pixels((32, 32))
    assert np.array_equal(seen, cut_cell(slide, 64, 64, 32, 2.0))


@pytest.mark.slow
def test_the_command_writes_images_a_list_a_grid_and_an_animation(model_folder, scorer_folder, tmp_path):
    asked = ("sequence", "--model", model_folder, "--vary", "score=0:1:3", "--count", 2, "--steps", 2,
             "--out", tmp_path)  # fmt: skip
    said = run(*asked, "--scorer", scorer_folder)
    assert "wrote 6 images" in said
    assert "Spearman" in said
    rows = list(csv.DictReader((tmp_path / "sequences.csv").open()))
    assert [row["file"] for row in rows] == [f"{i:05d}_{k:02d}.png" for i in range(2) for k in range(3)]
    assert [row["score"] for row in rows[:3]] == ["0", "0.5", "1"]
    assert len({row["scorer"] for row in rows}) == 6
    about = json.loads(Image.open(tmp_path / "00001_02.png").text["SYNTHETIC"])
    assert about["condition"] == "score=1"
    assert (about["sequence"], about["position"], about["seed"]) == (1, 2, 0)
    grid = Image.open(tmp_path / "grid.png")
    assert json.loads(grid.text["SYNTHETIC"])["scorer"]["name"] == "tiny"
    pixels = np.asarray(grid)
    first = fitted(np.asarray(Image.open(tmp_path / "00000_00.png").convert("RGB")), 96)
    assert np.array_equal(pixels[: first.shape[0], 52 : 52 + first.shape[1]], first)
    with Image.open(tmp_path / "sequence.gif") as moving:
        assert moving.n_frames == 4  # there and back
        assert moving.info["comment"].startswith(b"SYNTHETIC")
    before = (tmp_path / "00001_02.png").stat().st_mtime_ns
    (tmp_path / "00000_01.png").unlink()
    assert "wrote 1 images" in run(*asked)
    assert (tmp_path / "00001_02.png").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was made otherwise"):
        run(*asked, "--seed", 5)


@pytest.mark.slow
def test_the_command_starts_from_real_cells(model_folder, cells, tmp_path):
    for path in cells:
        (tmp_path / "cells").mkdir(exist_ok=True)
        (tmp_path / "cells" / path.name).write_bytes(path.read_bytes())
    asked = ("sequence", "--model", model_folder, "--vary", "score=0:1:2", "--images", tmp_path / "cells",
             "--images-mpp", 0.25, "--source", "score=0.8", "--steps", 4, "--count", 2,
             "--animation", "apng")  # fmt: skip
    assert "wrote 4 images" in run(*asked, "--out", tmp_path / "out")
    about = json.loads(Image.open(tmp_path / "out" / "00001_00.png").text["SYNTHETIC"])
    assert (about["source_image"], about["source_condition"]) == (cells[1].name, "score=0.8")
    assert Image.open(tmp_path / "out" / "sequence.png").n_frames == 2
    with pytest.raises(UserError, match="euler or heun"):
        run(*asked, "--solver", "dpmpp_2m", "--out", tmp_path / "other")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_moving_pictures_say_that_they_are_synthetic(tmp_path, name):
    frames = [np.full((9, 12, 3), value, np.uint8) for value in (0, 100, 250)]
    with Image.open(save_animation(tmp_path / name, frames, {"model": "m", "seed": 4})) as moving:
        assert moving.n_frames == 3
        said = {
            "gif": lambda: moving.info["comment"].decode(),
            "webp": lambda: moving.getexif()[0x010E],
            "png": lambda: moving.text["Description"],
        }[name[2:]]()
        moving.seek(2)
        assert np.array_equal(np.asarray(moving.convert("RGB")), frames[2])
    assert said.startswith("SYNTHETIC")
    assert '"seed": 4' in said
    with pytest.raises(UserError, match="ends in"):
        save_animation(tmp_path / "a.mp4", frames, {})


def test_a_gene_varies_as_a_score_does():
    from ldm.commands.sequence import conditions_of
    from ldm.conditioners.compose import conditions_given
    from ldm.conditioners.omics import OmicsEmbedder

    conditioner = OmicsEmbedder(8, mutation_genes=["TP53", "EGFR"], expression_genes=["MKI67", "PTEN"])

    class Model:
        cond_stage_model = conditioner

        def condition(self, **given):
            return conditions_given(conditioner, given)

    moved = conditions_of(Model(), parse_sweep("expression=MKI67:0:1:3"), ["mutation=TP53:1"])
    wanted = Model().condition(mutation={"TP53": 1}, expression={"MKI67": 0.5})
    assert len(moved) == 3
    torch.testing.assert_close(moved[1], wanted)
    assert any(not torch.equal(moved[0][part], moved[2][part]) for part in wanted)


@pytest.mark.slow
def test_mistakes_are_one_message_before_any_work(model_folder, cells, tmp_path):
    asked = ("sequence", "--model", model_folder, "--out", tmp_path / "o", "--vary")
    for args, message in (
        (("scor=0:1:3",), "no condition 'scor'.*did you mean 'score'"),
        (("score=0:2:3",), "lies in"),
        (("score=0:1:3", "--condition", "score=1"), "leave it out"),
        (("score=0:1:3", "--source", "score=1"), "--images"),
        (("score=0:1:3", "--images", tmp_path / "none"), "no images at"),
        (("score=0:1:3", "--images", cells[0], "--images-mpp", 0.02), "smaller than"),
        (("score=0:1:3", "--images", cells[0], "--strength", 2), "above 0 and up to 1"),
    ):
        with pytest.raises(UserError, match=message):
            run(*asked, *args)
    assert not list((tmp_path / "o").glob("*.png"))
