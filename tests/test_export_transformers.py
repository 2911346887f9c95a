"""Transformers, flows and grids of features in diffusers: its own networks and schedulers make the same images."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import load, relative
from test_convert_diffusers import NODE
from test_export_diffusers import LEVEL, SCALE, STEPS, diffusers, noise_for, ours
from torch import Tensor

from ldm.config import instantiate_from_config
from ldm.convert import convert, export_as, load_model
from ldm.diffusion.guidance import cfg, clip
from ldm.diffusion.samplers import sample_dpmpp_2m, sample_euler
from ldm.diffusion.schedules import karras_sigmas
from ldm.errors import UserError
from ldm.interop.diffusers_conditioning import NOISIEST, Conditioning, sample
from ldm.interop.export_diffusers_transformer import DEFAULTS
from ldm.model_folder import write_model_folder
from ldm.networks.dit import DiT

OURS = dict(image_size=8, in_channels=4, out_channels=4, hidden_size=48, depth=2, num_heads=4)
PIXART = OURS | {"modulation": "shared", "context_dim": 64}
GENERATOR = torch.Generator().manual_seed(3)
FLOW = {"parameterization": "flow"}
PIXELS = {"first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"}, "scale_factor": 1.0}
UNET = NODE["params"]["unet_config"]["params"]


def conditioner(name: str, **params: Any) -> dict:
    return {"target": f"ldm.conditioners.{name}", "params": params}


def together(**members: dict) -> dict:
    return conditioner("compose.ConditionerSet", conditioners=members)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


TOKEN = conditioner("class_token.ClassEmbedder", classes=["a", "b", "c"], dim=64)
LABEL = conditioner("class_token.ClassEmbedder", classes=["a", "b", "c"], dim=48, acts="vector")
SCORE = conditioner("score.ScoreEmbedder", dim=48, hidden=8)
GRID = conditioner("grid.GridEmbedder", embed_dim=12, context_dim=64, magnifications=["20x", "10x"], hidden=16, depth=2,
                   heads=2, mlp=24)  # fmt: skip
# network's parameters, conditioner, what is given, the diffusion's parameters
# fmt: off
TRANSFORMERS = {
    "PixArt by class": (PIXART | {"out_channels": 8}, TOKEN, {"class": ["a", "c"]}, {"learn_sigma": True}),
    "PixArt that predicts v": (PIXART, TOKEN, {"class": ["b"]}, {"parameterization": "v"}),
    "PixArt by 2 x 2 features, and a flow": (
        PIXART | {"context_dim": 12, "context_tokens": 4, "position_scale": 0.5},
        conditioner("raw.FeatureTokens", embed_dim=12, grid=2), {"ssl": drawn(2, 12, 2, 2)},
        FLOW | {"shift_factor": [0.1, -0.2, 0.3, 0.0], "scale_factor": [0.5, 1.5, 2.0, 1.0]},
    ),
    "PixArt with a map of features beside": (
        PIXART | {"in_channels": 7},
        conditioner("ssl.GridPatchEmbedder", embed_dim=20, context_dim=64, grid=2, map_channels=3),
        {"ssl": drawn(2, 20)}, {"shift_factor": 0.2},
    ),
    "PixArt of EDM": (PIXART, TOKEN, {"class": ["a", "c"]}, {"parameterization": "edm", "sigma_data": 0.6}),
    "DiT by label": (OURS | {"out_channels": 8}, LABEL, {"class": ["a", "c"]}, {"learn_sigma": True}),
    "DiT by a projected label": (OURS | {"vector_dim": 20}, LABEL | {"params": LABEL["params"] | {"dim": 20}},
                                 {"class": ["b"]}, {}),
    "DiT by label and score": (OURS, together(label=LABEL, score=SCORE), {"class": ["a", "b"], "score": [0.1, 0.9]},
                               {}),
    "SiT by a feature": (OURS | {"vector_dim": 20, "time_scale": 0.001}, conditioner("raw.FeatureVector", embed_dim=20),
                         {"ssl": drawn(2, 20)}, FLOW),
    "DiT of pixels, and a flow": (OURS | {"in_channels": 3, "out_channels": 3}, SCORE, {"score": [0.2, 0.8]},
                                  FLOW | PIXELS),
    "DiT of pixels": (OURS | {"in_channels": 3, "out_channels": 3}, LABEL, {"class": ["a", "b"]}, PIXELS),
}
UNETS = {
    "tile and region": ({}, conditioner("ssl.SSLEmbedder", embed_dim=20, region_embed_dim=12, context_dim=64),
                        {"ssl": drawn(2, 20), "region": drawn(2, 12)}, {}),
    "2 x 2 features": ({}, conditioner("grid.GridTokens", embed_dim=20, context_dim=64, grid=2, hidden=8),
                       {"ssl": drawn(2, 20, 2, 2)}, FLOW),
    "4 x 4 features and a magnification": ({}, GRID, {"ssl": drawn(2, 12, 4, 4), "magnification": ["10x", "20x"]}, {}),
    "features larger than its grid": ({}, GRID, {"ssl": drawn(1, 12, 16, 16), "magnification": ["10x"]}, {}),
    "a class and maps beside": (
        {"in_channels": 9},
        together(label=TOKEN, map=conditioner("rescaler.SpatialRescaler", in_channels=5, out_channels=2, stages=1),
                 other=conditioner("source_image.SourceImage", size=16, channels=3)),
        {"class": ["a", "b"], "map": drawn(2, 5, 16, 16), "image": drawn(2, 3, 16, 16).clamp(-1, 1)}, {},
    ),
}
# fmt: on


def written(folder: Path, network: dict, node: dict, diffusion: dict, target: str = "ldm.networks.dit.DiT") -> Path:
    """A small model folder, all of whose weights are drawn."""
    torch.manual_seed(0)
    params = copy.deepcopy(NODE["params"]) | {"cond_stage_config": node, "scale_factor": 0.7} | diffusion
    params["unet_config"] = {"target": target, "params": network}
    whole = instantiate_from_config({**NODE, "params": params})
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    write_model_folder(folder, {**NODE, "params": params}, whole.state_dict(), {})
    return folder


def flowing(model, cond: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Images in 0..1 by our solver over the times of `sample`, guided."""
    times = torch.tensor([NOISIEST * (1 - i / STEPS) for i in range(STEPS)] + [0.0])
    return solved(model, cond, noise, times / (1 - times))


def of_edm(model, cond: dict[str, Tensor], noise: Tensor) -> Tensor:
    sigmas = karras_sigmas(STEPS, model.denoiser().sigma_min, model.denoiser().sigma_max)
    return solved(model, cond, noise, sigmas)


def by_dpmpp(model, cond: dict[str, Tensor], noise: Tensor) -> Tensor:
    """By the scheduler that PixCell comes with."""
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", timestep_spacing="linspace")
    scheduler.set_timesteps(STEPS)
    return solved(model, cond, noise, torch.cat([model.sigmas[scheduler.timesteps], torch.zeros(1)]), sample_dpmpp_2m)


def solved(model, cond: dict[str, Tensor], noise: Tensor, sigmas: Tensor, solver=sample_euler) -> Tensor:
    """Images in 0..1 over descending noise levels; what begins at the noise that each parameterisation has there."""
    denoiser = cfg(model.denoiser(), model.null_condition(), SCALE)
    denoiser = clip(denoiser) if model.first_stage_model.downsampling == 1 else denoiser
    start = 1 + sigmas[0] if model.parameterization == "flow" else (1 + sigmas[0] ** 2).sqrt()
    with torch.no_grad():
        return (model.decode(solver(denoiser, noise * start, sigmas, cond)) / 2 + 0.5).clamp(0, 1)


SOLVERS = {"flow": flowing, "edm": of_edm}


def same_images(folder: Path, out: Path, given: dict, solve: Callable = ours) -> tuple[Tensor, Conditioning]:
    """What the exported folder samples, once it is seen to be what the model does, and to follow the condition."""
    model, condition = load_model(folder), Conditioning(out)
    count = len(next(iter(given.values())))
    noise, cond = noise_for(model)[:count], model.condition(**given)
    solve = SOLVERS.get(model.parameterization, solve)
    made = sample(out, condition(**given), condition(), STEPS, SCALE, noise)
    wanted = solve(model, cond, noise)
    assert (made - wanted).abs().max() < LEVEL
    null = {part: value.expand(count, *value.shape[1:]) for part, value in model.null_condition().items()}
    assert (wanted - solve(model, null, noise)).abs().max() > 3 * LEVEL
    return made, condition


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_gives_the_same_images_in_diffusers(name, tmp_path):
    network, node, given, diffusion = TRANSFORMERS[name]
    folder = written(tmp_path / "ours", network, node, diffusion)
    notes = export_as("diffusers", folder, tmp_path / "out")
    made, condition = same_images(folder, tmp_path / "out", given)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    kind = "DiTTransformer2DModel" if network.get("modulation") is None else "PixArtTransformer2DModel"
    assert index["transformer"] == ["diffusers", kind]
    if index["_class_name"] != "PixArtAlphaPipeline":
        assert any("no pipeline" in note for note in notes)
        return
    pipe = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path / "out", text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    model = load_model(folder)
    embeds = condition(**given)["prompt_embeds"]
    null = condition()["prompt_embeds"].expand_as(embeds)
    mask = torch.ones(embeds.shape[:2])
    theirs = pipe(
        prompt=None, negative_prompt=None, prompt_embeds=embeds, negative_prompt_embeds=null,
        prompt_attention_mask=mask, negative_prompt_attention_mask=mask, num_inference_steps=STEPS,
        guidance_scale=SCALE, latents=noise_for(model)[: len(embeds)], use_resolution_binning=False, output_type="pt",
    ).images  # fmt: skip
    assert (theirs - made).abs().max() < LEVEL


def test_only_what_a_pipeline_runs_is_called_one(tmp_path):
    for name, pipeline in {"PixArt by class": "PixArtAlphaPipeline", "SiT by a feature": "DiffusionPipeline",
                           "PixArt with a map of features beside": "DiffusionPipeline"}.items():  # fmt: skip
        network, node, _, diffusion = TRANSFORMERS[name]
        export_as("diffusers", written(tmp_path / name, network, node, diffusion), tmp_path / f"{name}-out")
        index = json.loads((tmp_path / f"{name}-out" / "model_index.json").read_text())
        assert index["_class_name"] == pipeline


@pytest.mark.parametrize("name", UNETS)
def test_grids_regions_and_maps_give_the_same_images_in_diffusers(name, tmp_path):
    more, node, given, diffusion = UNETS[name]
    folder = written(tmp_path / "ours", UNET | more, node, diffusion, "ldm.networks.unet.UNetModel")
    export_as("diffusers", folder, tmp_path / "out")
    same_images(folder, tmp_path / "out", given)


def test_labels_are_those_of_diffusers_own_class(tmp_path):
    """Its table holds the classes, and after them the null."""
    network, node, _, diffusion = TRANSFORMERS["DiT by label"]
    folder = written(tmp_path / "ours", network, node, diffusion)
    export_as("diffusers", folder, tmp_path / "out")
    net = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    table = load_model(folder).cond_stage_model.embedding.weight
    for block in net.transformer_blocks:
        assert torch.equal(block.norm1.emb.class_embedder.embedding_table.weight, table)
    condition = Conditioning(tmp_path / "out")
    assert condition(**{"class": ["a", "c"]})["class_labels"].tolist() == [0, 2]
    assert condition()["class_labels"].tolist() == [3]


def test_the_shift_of_a_flow_is_the_schedulers(tmp_path):
    network, node, _, diffusion = TRANSFORMERS["PixArt by 2 x 2 features, and a flow"]
    folder = written(tmp_path / "ours", network, node, diffusion | {"time_shift": 3.0})
    export_as("diffusers", folder, tmp_path / "out")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    times = torch.tensor([0.9, 0.5, 0.1])
    scheduler.set_timesteps(sigmas=times.tolist())
    shifted = 3 * times / (1 - times)  # what `time_shift` makes of a noise level
    torch.testing.assert_close(scheduler.sigmas[:-1], shifted / (1 + shifted))


def test_shifted_latents_are_those_of_the_exported_autoencoder(tmp_path):
    network, node, _, diffusion = TRANSFORMERS["PixArt by 2 x 2 features, and a flow"]
    folder = written(tmp_path / "ours", network, node, diffusion)
    notes = export_as("diffusers", folder, tmp_path / "out")
    assert any("latents are shifted, or scaled by channel" in note for note in notes)
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out" / "vae").eval()
    model, image = load_model(folder), drawn(2, 3, 16, 16).clamp(-1, 1)
    scale = torch.tensor(diffusion["scale_factor"])[:, None, None]
    with torch.no_grad():
        theirs, mine = vae.encode(image).latent_dist, model.first_stage_model.encode(image)
        torch.testing.assert_close(theirs.mean, model.latent_scale.apply(mine.mean), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.std, (mine.logvar / 2).exp() * scale, rtol=1e-4, atol=1e-5)
        latents = drawn(2, 4, 8, 8)
        assert relative(vae.decode(latents).sample, model.decode(latents)) < 1e-5


@pytest.mark.parametrize(("more", "what"), [
    ({"positions": "rotary", "mlp": "swiglu"}, "transformers with positions rotary, mlp swiglu"),
    ({"norm": "rms", "qk_norm": "rms"}, "transformers with norm rms, qk_norm rms"),
    ({"context_dim": 64}, "cross-attention where each block has its own modulation"),
    ({"context_dim": 64, "context": "sequence"}, "context sequence"),
    ({"mlp_ratio": 2.0}, "mlp_ratio 2.0"),
    ({"modulation": "shared"}, "a vector added to the time embedding where all blocks share their modulation"),
])  # fmt: skip
def test_a_transformer_that_diffusers_cannot_hold_is_refused_by_name(more, what, tmp_path):
    node = TOKEN if "context_dim" in more else LABEL
    folder = written(tmp_path / "ours", OURS | more, node, {})
    with pytest.raises(UserError, match=f"diffusers does not have .*{what}"):
        export_as("diffusers", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pixcell_256", "pixcell_1024"])
def test_pixcell_goes_to_diffusers_own_pixart(name, shared, tmp_path):
    third = shared("oracle") / "third"
    convert(third / name, tmp_path / "ours", base=third / "sd3_vae", say=lambda line: None)
    export_as("diffusers", tmp_path / "ours", tmp_path / "out")
    golden = load(third / name / "io.pt")
    side = round(golden["cond"].shape[1] ** 0.5)
    features = golden["cond"].mT.unflatten(2, (side, side))
    net = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer").eval()
    condition = Conditioning(tmp_path / "out")
    with torch.no_grad():
        embeds = condition(ssl=features)["prompt_embeds"]
        out = net(golden["x"], encoder_hidden_states=embeds, timestep=golden["t"].expand(len(golden["x"]))).sample
    assert relative(out, golden["out"]) < 1e-5
    same_images(tmp_path / "ours", tmp_path / "out", {"ssl": features[:2]}, by_dpmpp)


def test_defaults_are_those_of_the_network():
    own = inspect.signature(DiT).parameters
    assert {name: own[name].default for name in DEFAULTS} == DEFAULTS
