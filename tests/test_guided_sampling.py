"""Guidance of whole models: by a negative condition, by a weaker model, within an interval, with rescaling."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from test_conditioners import build, model_node, module
from typer.testing import CliRunner

import ldm
from ldm.cli import app
from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.model_folder import write_model_folder

SETTINGS = {"steps": 3, "progress": False, "guidance_scale": 3.0}
CLASSES = module("class_token.ClassEmbedder", classes=["LUAD", "LUSC", "BRCA"], dim=128, acts="vector")
PLAIN = {"use_spatial_transformer": False, "context_dim": None}
NODE = model_node(CLASSES, unet=PLAIN)


@pytest.fixture(scope="module")
def model():
    return build(CLASSES, unet=PLAIN)


def test_a_negative_condition_stands_in_place_of_the_null(model):
    luad, lusc = (model.condition(class_=name) for name in ("LUAD", "LUSC"))
    denoiser = ldm.Sampler(guidance_scale=3.0, negative=lusc).settled(model, "sample").guided(model).denoiser
    torch.manual_seed(0)
    x, sigma = torch.randn(2, model.channels, 16, 16), torch.tensor([2.0, 0.5])
    both = {part: value.expand(2, *value.shape[1:]) for part, value in luad.items()}
    bare = model.denoiser()
    with torch.no_grad():
        wanted, away = bare(x, sigma, both), bare(x, sigma, {k: v.expand_as(both[k]) for k, v in lusc.items()})
        expected = (away + 3 * (wanted - away)).clamp(-1, 1)  # pixels
        torch.testing.assert_close(denoiser(x, sigma, both), expected, atol=1e-4, rtol=1e-5)
    plain, other = (
        ldm.sample(model, luad, sampler=ldm.Sampler(negative=negative, **SETTINGS)) for negative in (None, lusc)
    )
    assert not torch.allclose(plain, other)
    with pytest.raises(UserError, match="of one sample"):
        ldm.sample(model, luad, sampler=ldm.Sampler(negative=both, **SETTINGS))


def test_a_model_that_guides_itself_changes_nothing_and_a_weaker_one_does(model):
    cond = model.condition(class_="BRCA")
    plain = ldm.sample(model, cond, sampler=ldm.Sampler(**{**SETTINGS, "guidance_scale": 1.0}))
    torch.testing.assert_close(
        ldm.sample(model, cond, sampler=ldm.Sampler(guide=model, **SETTINGS)), plain, atol=1e-4, rtol=0
    )
    torch.manual_seed(5)
    weak = instantiate_from_config(NODE).eval()
    assert not torch.allclose(ldm.sample(model, cond, sampler=ldm.Sampler(guide=weak, **SETTINGS)), plain, atol=1e-3)
    other = build(module("class_token.ClassEmbedder", classes=["a", "b"], dim=24))
    with pytest.raises(UserError, match="of one kind"):
        ldm.sample(model, cond, sampler=ldm.Sampler(guide=other, **SETTINGS))
    with pytest.raises(UserError, match="stands in for the null"):
        ldm.sample(model, cond, sampler=ldm.Sampler(guide=weak, negative=cond, **SETTINGS))


def test_an_interval_guides_its_noise_levels_alone(model):
    cond, sigmas = model.condition(class_="LUAD"), ldm.Sampler(steps=3).settled(model, "sample").sigmas(model)
    guided, free = (
        ldm.sample(model, cond, sampler=ldm.Sampler(**{**SETTINGS, "guidance_scale": s})) for s in (3.0, 1.0)
    )
    for interval, same in (((0.0, 1e9), guided), ((1e8, 1e9), free)):
        torch.testing.assert_close(
            ldm.sample(model, cond, sampler=ldm.Sampler(guidance_interval=interval, **SETTINGS)), same
        )
    part = ldm.sample(model, cond, sampler=ldm.Sampler(guidance_interval=(float(sigmas[1]) - 1e-3, 1e9), **SETTINGS))
    assert not torch.allclose(part, guided)
    assert not torch.allclose(part, free)


def test_rescaled_guidance_has_the_contrast_of_the_condition(model):
    cond, sigma = model.condition(class_="LUAD"), torch.tensor([0.05])
    x = torch.randn(1, model.channels, 16, 16) / 10  # nothing is clipped
    with torch.no_grad():
        wanted = model.denoiser()(x, sigma, cond).std()
        sampler = ldm.Sampler(guidance_scale=3.0, guidance_rescale=1.0).settled(model, "sample")
        torch.testing.assert_close(sampler.guided(model).denoiser(x, sigma, cond).std(), wanted)
    with pytest.raises(UserError, match=r"0\.\.1"):
        ldm.sample(model, cond, sampler=ldm.Sampler(guidance_rescale=1.5, **SETTINGS))


@pytest.mark.slow
def test_the_command_takes_them_and_files_say_so(tmp_path, model):
    write_model_folder(tmp_path / "model", NODE, model.state_dict(), {})
    call = ["sample", "--model", tmp_path / "model", "--condition", "class=LUAD", "--count", 2, "--steps", 2]
    call += ["--negative-condition", "class=LUSC", "--guidance-interval", "0.1,50", "--guidance-rescale", 0.5]

    def run(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)

    run(*call, "--out", tmp_path / "tiles")
    about = json.loads(Image.open(tmp_path / "tiles" / "00001.png").text["SYNTHETIC"])
    assert about["negative_condition"] == "class=LUSC"
    assert about["guidance_interval"] == [0.1, 50.0]
    guided = [*call[:9], "--guide-model", tmp_path / "model", "--out", tmp_path / "guided"]
    run(*guided)
    assert "guide_sha256" in json.loads(Image.open(tmp_path / "guided" / "00000.png").text["SYNTHETIC"])
    with pytest.raises(UserError, match="did you mean 'LUSC'"):
        run(*call[:9], "--negative-condition", "class=LUSK", "--out", tmp_path / "none")
    assert not (tmp_path / "none" / "00000.png").exists()
