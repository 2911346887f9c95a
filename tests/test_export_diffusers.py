"""Shipped models, and models by class, in diffusers: what its own networks and scheduler make is the same image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_convert_diffusers import NODE
from torch import Tensor

from conftest import ROOT
from ldm.config import instantiate_from_config
from ldm.convert import export_as, load_model
from ldm.diffusion.guidance import cfg, clip
from ldm.diffusion.samplers import sample_euler
from ldm.diffusion.schedules import table_sigmas
from ldm.errors import UserError
from ldm.interop.diffusers_conditioning import Conditioning, sample
from ldm.model_folder import write_model_folder

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (extra dev)")
MODELS = ROOT / "data" / "models"
LEVEL = 1 / 255
GIVEN = {
    "demo-mitosis": {"score": [0.1, 0.9]},
    "demo-stains": {"stain": ["he", "ki67"]},
    "demo-ssl": {"ssl": torch.randn(2, 512, generator=torch.Generator().manual_seed(1))},
}
STEPS, SCALE = 5, 2.0


def ours(model, cond: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Images in 0..1 by our solver over the levels of diffusers' DDIM, guided."""
    sigmas = table_sigmas(model.sigmas, STEPS, "legacy")
    denoiser = cfg(model.denoiser(), model.null_condition(), SCALE)
    pixels = model.first_stage_model.downsampling == 1
    with torch.no_grad():
        x = sample_euler(clip(denoiser) if pixels else denoiser, noise * (1 + sigmas[0] ** 2).sqrt(), sigmas, cond)
        return (model.decode(x / (1 + sigmas[-1] ** 2).sqrt()) / 2 + 0.5).clamp(0, 1)


def noise_for(model) -> Tensor:
    return torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)


@pytest.mark.parametrize("name", GIVEN)
def test_a_shipped_model_gives_the_same_images_in_diffusers(name, tmp_path):
    notes = export_as("diffusers", MODELS / name, tmp_path / "out")
    assert any("conditioning.py" in note for note in notes)
    model, noise = load_model(MODELS / name), noise_for(load_model(MODELS / name))
    condition, given = Conditioning(tmp_path / "out"), GIVEN[name]
    cond = model.condition(**given)
    for part, value in condition(**given).items():
        kind = {"prompt_embeds": "crossattn", "class_labels": "vector", "map": "concat"}[part]
        torch.testing.assert_close(value, cond[kind])
    made = sample(tmp_path / "out", condition(**given), condition(), STEPS, SCALE, noise)
    wanted = ours(model, cond, noise)
    assert (made - wanted).abs().max() < LEVEL
    assert (wanted[0] - wanted[1]).abs().max() > 10 * LEVEL


def test_the_model_of_captions_does_by_prompt_embeds(tmp_path):
    notes = export_as("diffusers", MODELS / "demo-text", tmp_path / "out")
    assert any("3 chunks" in note for note in notes)
    model = load_model(MODELS / "demo-text")
    cond, null, noise = model.condition(text=["a lymph node", "colon"]), model.null_condition(), noise_for(model)
    made = sample(tmp_path / "out", {"prompt_embeds": cond["crossattn"]}, {"prompt_embeds": null["crossattn"]}, STEPS,
                  SCALE, noise)  # fmt: skip
    assert (made - ours(model, cond, noise)).abs().max() < LEVEL


def node_of(cond: dict, **unet: object) -> dict:
    """A small latent model that attends to a condition."""
    params = NODE["params"] | {"cond_stage_config": cond}
    params["unet_config"] = {**params["unet_config"], "params": params["unet_config"]["params"] | unet}
    return {**NODE, "params": params}


CLASSES = {"target": "ldm.conditioners.class_token.ClassEmbedder", "params": {"classes": ["a", "b"], "dim": 64}}
BOTH = {"target": "ldm.conditioners.compose.ConditionerSet", "params": {"conditioners": {
    "class": CLASSES,
    "score": {"target": "ldm.conditioners.score.ScoreEmbedder", "params": {"dim": 64, "acts": "crossattn"}},
}}}  # fmt: skip


@pytest.mark.parametrize(("node", "given"), [(CLASSES, {"class": "b"}), (BOTH, {"class": "b", "score": 0.3})])
def test_a_class_is_given_to_the_pipeline_of_diffusers_as_prompt_embeds(node, given, tmp_path):
    torch.manual_seed(0)
    whole = instantiate_from_config(node_of(node))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    write_model_folder(tmp_path / "ours", node_of(node), whole.state_dict(), {"licence": "MIT"})
    export_as("diffusers", tmp_path / "ours", tmp_path / "out")
    model, noise = load_model(tmp_path / "ours"), noise_for(whole)
    condition = Conditioning(tmp_path / "out")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    size = model.tile_size
    theirs = pipe(
        **condition(**given), negative_prompt_embeds=condition()["prompt_embeds"], num_inference_steps=STEPS,
        guidance_scale=SCALE, latents=noise[:1], height=size, width=size, output_type="pt",
    ).images  # fmt: skip
    cond = model.condition(**given)
    assert (theirs - ours(model, cond, noise[:1])).abs().max() < LEVEL
    alone = sample(tmp_path / "out", condition(**given), condition(), STEPS, SCALE, noise[:1])
    assert (theirs - alone).abs().max() < LEVEL


def test_the_module_in_the_folder_needs_nothing_of_this_toolkit(tmp_path):
    export_as("diffusers", MODELS / "demo-stains", tmp_path / "out")
    code = (
        "import sys; sys.modules['ldm'] = None; from conditioning import Conditioning, sample; c = Conditioning('.');"
        "print(tuple(sample('.', c(stain='ki67'), c(), steps=2, guidance_scale=2.0).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 3, 32, 32)", done.stderr


LACKING = {
    "demo-omics": "OmicsEmbedder",
    "demo-slices": "the network LMIUNet",
    "demo-slices-pairs": "the network SourceResidual",
    "demo-ssl-student": "the network StudentNetwork",
    "demo-field": "first stages of the kind FeatureCodec",
}


@pytest.mark.parametrize(("name", "what"), LACKING.items())
def test_what_diffusers_cannot_hold_is_named(name, what, tmp_path):
    with pytest.raises(UserError, match=f"diffusers does not have .*{what}"):
        export_as("diffusers", MODELS / name, tmp_path / "out")
    assert not Path(tmp_path / "out").exists()


def test_every_shipped_diffusion_model_is_tried_here():
    configs = {path.parent.name: yaml.safe_load(path.read_text()) for path in MODELS.glob("*/config.yaml")}
    target = "ldm.latent_diffusion.LatentDiffusion"
    models = {name for name, config in configs.items() if config.get("model", {}).get("target") == target}
    assert models == {*GIVEN, *LACKING, "demo-text"}


def test_heads_of_several_widths_are_refused(tmp_path):
    plain = {"use_spatial_transformer": False, "context_dim": None}
    node = node_of(CLASSES | {"params": CLASSES["params"] | {"acts": "vector", "dim": 128}}, **plain)
    node["params"]["unet_config"]["params"] |= {"num_heads": 4, "num_head_channels": -1}
    whole = instantiate_from_config(node)
    write_model_folder(tmp_path / "ours", node, whole.state_dict(), {})
    with pytest.raises(UserError, match="UNet2DModel has heads of one width; the model's have"):
        export_as("diffusers", tmp_path / "ours", tmp_path / "out")
