"""SiT, REPA and REPA-E, and ZoomLDM's conditioning model: through a model folder, the outputs of their own code."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import load, relative
from test_convert_pixcell import run
from torch import Tensor

import ldm
from ldm.config import instantiate_from_config
from ldm.convert import convert, load_model, read_published
from ldm.diffusion.denoiser import call_network
from ldm.errors import UserError
from ldm.model_folder import write_model_folder
from ldm.networks.dit import DiT

HEADS = "num_heads: 4"


@pytest.fixture(scope="module")
def third(shared) -> Path:
    return shared("oracle") / "third"


def checkpoint(path: Path, golden: dict, vae: dict | None = None, **parts: object) -> Path:
    """A file as the published training saves it: averages, raw weights, an object of Python."""
    state = golden["state_dict"]
    raw = {name: value + 1 for name, value in state.items()}
    content = {"model": raw, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(model="SiT-XL/2")}
    if vae is not None:
        content |= {"vae": vae, "discriminator": {"conv.weight": torch.ones(2)}}
    torch.save(content | parts, path)
    path.with_suffix(".yaml").write_text(HEADS)
    return path


@pytest.fixture(scope="module", params=["repa_sit", "repae_sit"])
def sit(request, third, tmp_path_factory):
    """Name, its model folder, the model, and what its own code gives."""
    name, folder = request.param, tmp_path_factory.mktemp("sit")
    golden, autoencoder = load(third / f"{name}.pt"), load(third / "repae_autoencoder.pt")
    vae = autoencoder["state_dict"] if name == "repae_sit" else None
    source = checkpoint(folder / "0400000.pt", golden, vae)
    torch.save(autoencoder["state_dict"], folder / "vae.pt")
    base = {} if vae else {"base": folder / "vae.pt"}
    convert(source, folder / "model", config=folder / "0400000.yaml", say=lambda line: None, **base)
    return name, folder / "model", load_model(folder / "model"), golden


def test_the_network_is_the_published_one(sit):
    _, _, model, golden = sit
    classes = [str(int(label)) for label in golden["y"].clamp(max=999)]
    cond = model.condition(class_=classes)
    null = golden["y"] == 1000
    cond["vector"][null] = model.null_condition()["vector"]
    with torch.no_grad():
        out = call_network(model.model, golden["x"], 1000 * golden["t"], cond)
    assert relative(out, golden["out"]) < 1e-5
    assert model.parameterization == "flow"


def test_samples_are_the_published_ones(sit):
    """In double precision: at t = 1 there is nothing but noise, sigma is infinite, and 1e9 stands for it."""
    _, folder, _, golden = sit
    model = load_model(folder).double()
    want = golden["sampling"]
    t = want["t_ode"]
    sigmas = (t / (1 - t)).clamp(max=1e9)
    cond = model.condition(class_=[str(int(label)) for label in want["y"]])
    high = want["guidance_high"] / (1 - want["guidance_high"])
    for scale, interval, name in ((want["cfg_scale"], (0.0, high), "ode_linear"), (1.0, "all", "ode_no_guidance")):
        settings = ldm.Sampler(guidance_scale=scale, guidance_interval=interval, solver="euler")
        solver = settings.settled(model, "sample").guided(model, cond)
        x = want["x_T"].double() * (1 + sigmas[0])
        with torch.no_grad():
            made = solver.solve(x, sigmas, cond, lambda step: None, lambda i, x, x0: None)
        assert relative(made, want[name]) < 1e-4, name


def velocity(model, golden: dict):
    """The published samplers' drift, of the converted network and its null, guided up to a time."""
    want = golden["sampling"]
    cond = model.condition(class_=[str(int(label)) for label in want["y"]])
    null = {part: value.expand(2, -1) for part, value in model.null_condition().items()}

    def at(x: Tensor, t: float, guided: float, score: bool = False) -> Tensor:
        def of(rows: dict[str, Tensor]) -> Tensor:
            v = call_network(model.model, x.float(), torch.full((2,), 1000 * t), rows).double()
            if not score:
                return v
            noise = x + (1 - t) * v  # of x = (1-t) x0 + t n
            return v + t * noise / t  # v - t * score of the diffusion 2t

        own = of(cond)
        within = want["guidance_low"] <= guided <= want["guidance_high"]
        return own + (want["cfg_scale"] - 1) * (own - of(null)) if within else own

    return at


def test_their_other_samplers_give_what_they_give_with_the_converted_network(sit):
    _, _, model, golden = sit
    want, at = golden["sampling"], velocity(model, golden)
    x, times = want["x_T"].double(), want["t_ode"].tolist()
    with torch.no_grad():
        for t, after in pairwise(times):
            first = at(x, t, t)
            moved = x + (after - t) * first
            x = moved if after == 0 else x + (after - t) * 0.5 * (first + at(moved, after, t))
        assert relative(x, want["heun_linear"]) < 1e-4
        x, times = want["x_T"].double(), want["t_sde"].tolist()
        for i, (t, after) in enumerate(pairwise(times)):
            mean = x + (after - t) * at(x, t, t, score=True)
            last = i == len(times) - 2
            x = mean if last else mean + (2 * t * (t - after)) ** 0.5 * want["sde_linear_noises"][i]
        assert relative(x, want["sde_linear"]) < 1e-4


def test_latents_are_normalised_by_the_statistics_of_the_file(third, tmp_path):
    golden, autoencoder = load(third / "repae_sit.pt"), load(third / "repae_autoencoder.pt")
    source = checkpoint(tmp_path / "a.pt", golden, autoencoder["state_dict"])
    convert(source, tmp_path / "model", config=tmp_path / "a.yaml", say=lambda line: None)
    model, latents = load_model(tmp_path / "model"), golden["latents"]
    assert relative(model.latent_scale.apply(latents["z"]), latents["normalized_by_stats"]) < 1e-5
    assert relative(model.latent_scale.undo(latents["normalized_by_stats"]), latents["denormalized"]) < 1e-5
    with torch.no_grad():
        posterior = model.first_stage_model.encode(autoencoder["image"])
        assert relative(posterior.mean, autoencoder["mean"]) < 1e-5
        assert relative(model.first_stage_model.decode(autoencoder["z_sample"]), autoencoder["dec_sample"]) < 1e-5


@pytest.mark.parametrize("linear", [False, True])
def test_a_vector_stands_in_the_place_of_the_label(linear, third, tmp_path):
    golden = load(third / "repae_sit.pt")
    golden["state_dict"] = {n: v for n, v in golden["state_dict"].items() if not n.startswith("y_embedder.")}
    vector = golden["y_vector"]
    if linear:  # the same vectors, through a layer that was made for it
        golden["state_dict"] |= {"y_embedder.weight": 0.5 * torch.eye(48), "y_embedder.bias": torch.ones(48)}
        vector = 2 * (vector - 1)
    source = checkpoint(tmp_path / "a.pt", golden, load(third / "repae_autoencoder.pt")["state_dict"])
    convert(source, tmp_path / "model", config=tmp_path / "a.yaml", say=lambda line: None)
    model = load_model(tmp_path / "model")
    with torch.no_grad():
        out = call_network(model.model, golden["x"], 1000 * golden["t"], model.condition(features=vector))
    assert relative(out, golden["out_y_vector"]) < 1e-5


def test_the_encoder_of_the_vector_is_recorded_with_its_licence(third, tmp_path):
    golden = load(third / "repae_sit.pt")
    state = {n: v for n, v in golden["state_dict"].items() if not n.startswith("y_embedder.")}
    golden["state_dict"] = state | {"y_embedder.weight": torch.ones(48, 768), "y_embedder.bias": torch.ones(48)}
    source = checkpoint(tmp_path / "a.pt", golden, load(third / "repae_autoencoder.pt")["state_dict"])
    said = run("convert", source, "--config", tmp_path / "a.yaml", "--encoder", "h0-mini-cls", "--licence",
               "CC BY-NC-ND 4.0", "--out", tmp_path / "model")  # fmt: skip
    assert "features: h0-mini-cls (CC" in said
    told = run("describe", tmp_path / "model")
    assert "features: h0-mini-cls (CC" in told
    assert "licence: CC BY-NC-ND 4.0" in told


def test_the_commands_take_it_from_conversion_to_images(sit, third, tmp_path):
    _, folder, _, _ = sit
    options = ("--model", folder, "--steps", 2, "--device", "cpu")
    run("sample", *options, "--condition", "class=7", "--count", 2, "--out", tmp_path / "tiles")
    tiles = sorted((tmp_path / "tiles").glob("0*.png"))
    assert [Image.open(tile).size for tile in tiles] == [(128, 128)] * 2
    run("translate", *options, "--images", tiles[0], "--source", "class=7", "--target", "class=8", "--out",
        tmp_path / "translated")  # fmt: skip
    assert len(list((tmp_path / "translated").glob("*.png"))) == 1


def test_a_large_image_follows_a_feature_in_the_place_of_the_label(third, tmp_path):
    """Windows are as large as its training's; each cell of a grid of features is a tile."""
    golden = load(third / "repae_sit.pt")
    golden["state_dict"] = {n: v for n, v in golden["state_dict"].items() if not n.startswith("y_embedder.")}
    source = checkpoint(tmp_path / "a.pt", golden, load(third / "repae_autoencoder.pt")["state_dict"])
    assert "licence: none is stated beside the weights" in run("convert", source, "--config", tmp_path / "a.yaml",
                                                               "--out", tmp_path / "model")  # fmt: skip
    features = np.random.default_rng(0).normal(size=(2, 3, 48)).astype("f4")
    images = {}
    for name, grid in {"one": features, "other": features[:, ::-1]}.items():
        np.save(tmp_path / f"{name}.npy", grid)
        run("large-image", "--model", tmp_path / "model", "--steps", 2, "--device", "cpu", "--seed", 1, "--features",
            tmp_path / f"{name}.npy", "--out", tmp_path / f"{name}.png")  # fmt: skip
        images[name] = np.asarray(Image.open(tmp_path / f"{name}.png"), float)
    assert images["one"].shape == (256, 384, 3)
    changed = np.abs(images["one"] - images["other"]).mean((0, 2))
    assert changed[:32].mean() > 1  # of 255: the outer tiles have other features
    assert changed[:32].mean() > changed[176:208].mean()  # the middle tile has its own in both


def test_a_large_image_of_a_transformer_is_made_in_windows_of_its_training(tmp_path, monkeypatch):
    params = {"in_channels": 5, "out_channels": 3, "image_size": 16, "hidden_size": 32, "depth": 2, "num_heads": 2,
              "context_dim": 8, "positions": "rotary"}  # fmt: skip
    features = {"embed_dim": 12, "context_dim": 8, "map_channels": 2}
    node = {"target": "ldm.latent_diffusion.LatentDiffusion", "params": {
        "unet_config": {"target": "ldm.networks.dit.DiT", "params": params},
        "first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"},
        "cond_stage_config": {"target": "ldm.conditioners.ssl.GridPatchEmbedder", "params": features},
        "parameterization": "v", "use_ema": False,
    }}  # fmt: skip
    write_model_folder(tmp_path / "model", node, instantiate_from_config(node).state_dict(), {})
    np.save(tmp_path / "grid.npy", np.random.default_rng(0).normal(size=(2, 3, 12)).astype("f4"))
    seen, forward = set(), DiT.forward

    def watched(self: DiT, x: Tensor, *args: object, **given: object) -> Tensor:
        seen.add(tuple(x.shape[1:]))
        return forward(self, x, *args, **given)

    monkeypatch.setattr(DiT, "forward", watched)
    for mode in ("shifted", "overlap"):
        run("large-image", "--model", tmp_path / "model", "--steps", 2, "--device", "cpu", "--features",
            tmp_path / "grid.npy", "--size", "56,40", "--mode", mode, "--out", tmp_path / f"{mode}.png")  # fmt: skip
        assert Image.open(tmp_path / f"{mode}.png").size == (56, 40)
    assert seen == {(5, 16, 16)}


@pytest.mark.parametrize(
    "file", ["repa_checkpoint_with_namespace.pt", "zoomldm_cdm_ckpt/0000010_as_published_with_namespace.pt"]
)
def test_a_published_file_with_its_arguments_is_read_without_making_them(file, third, tmp_path):
    """The oracle's files hold the small tensors alone."""
    (tmp_path / "flags.yaml").write_text(HEADS)
    with pytest.raises(UserError, match="lacks"):
        read_published(third / file, config=tmp_path / "flags.yaml")


def test_what_it_lacks_is_told(third, tmp_path):
    golden = load(third / "repa_sit.pt")
    source = checkpoint(tmp_path / "a.pt", golden)
    with pytest.raises(UserError, match="no published transformer has a width of 48: give --config"):
        read_published(source)
    with pytest.raises(UserError, match=r"a.pt has no autoencoder; name the one that it was trained with by --base"):
        read_published(source, config=tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("num_head: 4")
    with pytest.raises(UserError, match="a transformer is told num_heads and prediction; did you mean 'num_heads'"):
        read_published(source, config=tmp_path / "b.yaml")
    golden["state_dict"]["y_embedder.mlp.0.weight"] = torch.ones(48, 7)
    golden["state_dict"].pop("y_embedder.embedding_table.weight")
    source = checkpoint(tmp_path / "c.pt", golden, load(third / "repae_autoencoder.pt")["state_dict"])
    with pytest.raises(UserError, match="conditioned in a way that is not known"):
        read_published(source, config=tmp_path / "c.yaml")


@pytest.fixture(scope="module")
def cdm(third, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cdm")
    (folder / "flags.yaml").write_text(HEADS)
    models = {}
    for raw in (False, True):
        convert(third / "zoomldm_cdm_ckpt" / "0000010.pt", folder / str(raw), config=folder / "flags.yaml",
                raw_weights=raw, say=lambda line: None)  # fmt: skip
        models[raw] = load_model(folder / str(raw))
    return folder / "False", models, load(third / "zoomldm_cdm.pt")


def test_the_conditioning_model_is_the_published_one(cdm):
    _, models, golden = cdm
    for raw, name in ((False, "out_ema"), (True, "out_raw")):
        cond = models[raw].condition(magnification=[str(int(each)) for each in golden["y"]])
        with torch.no_grad():
            assert relative(call_network(models[raw].model, golden["x"], golden["t"], cond), golden[name]) < 1e-5
    bars = 1 / (1 + models[False].sigmas.double() ** 2)
    torch.testing.assert_close(bars, golden["sampling"]["alphas_cumprod"], rtol=1e-5, atol=1e-9)


def test_its_samples_are_the_published_ones(cdm):
    _, models, golden = cdm
    model, want = models[False], golden["sampling"]
    cond = model.condition(magnification=[str(int(each)) for each in want["y"]])
    sigmas = torch.cat([model.sigmas[want["timestep_map"]].flip(0), torch.zeros(1)])
    x = want["x_T"] * (1 + sigmas[0] ** 2).sqrt()

    def sampled(solver: str) -> Tensor:
        settings = ldm.Sampler(solver=solver, guidance_scale=1.0, eta=1.0).settled(model, "sample")
        noises = want["p_noises"]
        with torch.no_grad():
            return settings.guided(model, cond).solve(x, sigmas, cond, lambda i: noises[i], lambda i, x, x0: None)

    made = sampled("euler")
    assert relative(made, want["ddim"]) < 1e-4
    assert relative(made.mT, want["context"]) < 1e-4
    assert relative(sampled("ddpm"), want["p_sample_loop"]) < 1e-4


def test_the_command_writes_tokens_that_condition_another_model(cdm, tmp_path):
    folder, _, golden = cdm
    run("sample", "--model", folder, "--condition", "magnification=3", "--count", 2, "--steps", 3, "--out",
        tmp_path / "out")  # fmt: skip
    tokens = np.load(tmp_path / "out" / "tokens.npy")
    assert tokens.shape == (2, 65, golden["config"]["in_channels"])
    again = ldm.sample(load_model(folder), load_model(folder).condition(magnification="3"), 2,
                       ldm.Sampler(steps=3, progress=False))  # fmt: skip
    np.testing.assert_allclose(tokens, again.mT.numpy(), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="the model makes tokens, not images"):
        ldm.Sampler().settled(load_model(folder), "translate")
