"""What converted models are trained on is what the published codes train them on: losses and their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import load, relative
from test_convert_pixcell import grids
from test_convert_sit import checkpoint
from torch import Tensor

from ldm.convert import convert, load_model
from ldm.diffusion.losses import error_scale, scaled_error, variational_bound
from ldm.latent_diffusion import LatentDiffusion
from ldm.networks.repa import Alignment, Projection, watched


@pytest.fixture(scope="module")
def third(shared) -> Path:
    return shared("oracle") / "third"


def trained_on(model: LatentDiffusion, golden: dict, cond: dict[str, Tensor], monkeypatch) -> Tensor:
    """`LatentDiffusion.loss` (B,) of latents, noise and noise levels that are given in place of drawn ones."""
    sigmas = golden["t"] / (1 - golden["t"]) if model.parameterization == "flow" else model.sigmas[golden["t"]]
    monkeypatch.setattr(model, "training_sigmas", lambda count, rng: sigmas)
    monkeypatch.setattr(model, "condition_of", lambda batch, drop: cond)
    monkeypatch.setattr(model, "latents_of", lambda batch, rng: batch["latent"])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, **how: golden["noise"].reshape(shape))
        return model.loss({"latent": golden["x0"]}, torch.Generator(), dropout=False)


@pytest.mark.parametrize(("name", "kind"), [("repa_sit", "linear"), ("repae_sit", "linear_bn_eval")])
def test_representation_alignment(name, kind, third, tmp_path, monkeypatch):
    golden, autoencoder = load(third / f"{name}.pt"), load(third / "repae_autoencoder.pt")["state_dict"]
    torch.save(autoencoder, tmp_path / "vae.pt")
    vae = autoencoder if name == "repae_sit" else None
    source = checkpoint(tmp_path / "0400000.pt", golden, vae)
    base = {} if vae else {"base": tmp_path / "vae.pt"}
    convert(source, tmp_path / "model", config=tmp_path / "0400000.yaml", say=lambda line: None, **base)
    model, config, given = load_model(tmp_path / "model"), golden["config"], dict(golden["loss"])
    if vae:  # normalised by their running statistics; theirs adds 1e-4 to the variance, 5e-5 of the latents
        given["x0"] = model.latent_scale.apply(given["x0"])
    alignment = Alignment("dinov2", block=config["encoder_depth"], weight=given["proj_coeff"])
    projection = Projection(config["hidden_size"], config["z_dims"][0], config["projector_dim"])
    theirs = {n: v for n, v in golden["state_dict"].items() if n.startswith("projectors.0.")}
    projection.layers.load_state_dict({n.removeprefix("projectors.0."): v for n, v in theirs.items()})
    network = model.model.diffusion_model.requires_grad_(True)
    cond = {"vector": golden["state_dict"]["y_embedder.embedding_table.weight"][given["y"]]}
    with watched(network, alignment) as maps:
        losses = trained_on(model, given, cond, monkeypatch)
    (features,), want = given["features"], given[kind]
    apart = projection(maps[0], features.mT.unflatten(2, maps[0].shape[2:]))
    total = losses.mean() + alignment.weight * apart.mean()
    close = 1e-4 if vae else 1e-5
    assert relative(losses, want["denoising_loss"]) < close
    assert relative(apart.mean() - 1, want["proj_loss"]) < close  # 1 - cosine here, -cosine there
    assert relative(total - alignment.weight, want["total"]) < close
    total.backward()
    assert relative(network.x_embedder.proj.weight.grad, want["grad_x_embedder"]) < 10 * close
    if "grad_projector" in want:
        assert relative(projection.layers[0].weight.grad, want["grad_projector"]) < 10 * close


@pytest.mark.parametrize("name", ["pixcell_256", "pixcell_1024"])
def test_pixcells_noise_and_variance(name, third, tmp_path, monkeypatch):
    convert(third / name, tmp_path / "model", base=third / "sd3_vae", say=lambda line: None)
    model, golden = load_model(tmp_path / "model"), load(third / name / "io.pt")["train"]
    side = round(golden["y"].shape[1] ** 0.5)
    hybrid(model, golden, model.condition(features=grids(golden["y"], side)), monkeypatch)


def test_the_tokens_of_zoomldms_conditioning_model(third, tmp_path, monkeypatch):
    golden = load(third / "zoomldm_cdm.pt")
    (tmp_path / "flags.yaml").write_text(f"num_heads: {golden['config']['num_heads']}")
    source = third / "zoomldm_cdm_ckpt" / "0000010.pt"
    flags = {"config": tmp_path / "flags.yaml", "raw_weights": True}  # the ones that are trained
    convert(source, tmp_path / "model", say=lambda line: None, **flags)
    model, golden = load_model(tmp_path / "model"), golden["train"]
    cond = model.condition(magnification=[str(int(each)) for each in golden["y"]])
    hybrid(model, golden, cond, monkeypatch)


@torch.no_grad()
def hybrid(model: LatentDiffusion, golden: dict, cond: dict[str, Tensor], monkeypatch) -> None:
    """The error and the bound that trains the variance, apart and together (arXiv:2102.09672)."""
    whole = trained_on(model, golden, cond, monkeypatch)
    sigma = model.sigmas[golden["t"]]
    x0, shape = golden["x0"], (-1, *[1] * (golden["x0"].ndim - 1))
    noisy = x0 + sigma.view(shape) * golden["noise"]
    estimate, place = model.denoiser().with_variance(noisy, sigma, cond)
    error = scaled_error(estimate, x0, error_scale(model.parameterization, sigma))
    bound = variational_bound(x0, estimate, place, sigma, model.sigmas)
    later = golden["t"] > 0
    torch.testing.assert_close(error, golden["mse"], rtol=1e-5, atol=0)
    torch.testing.assert_close(bound[later], golden["vb"][later], rtol=1e-4, atol=0)
    torch.testing.assert_close(bound, golden["vb"], rtol=5e-2, atol=0)  # theirs approximates the normal distribution
    torch.testing.assert_close(whole[later], golden["loss"][later], rtol=1e-4, atol=0)
    torch.testing.assert_close(whole, golden["loss"], rtol=5e-2, atol=0)
