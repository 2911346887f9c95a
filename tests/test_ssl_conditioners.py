"""Conditioners on SSL features: one, patch and region, grids; parity with the published ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published import load, relative

from conftest import ROOT
from ldm import config
from ldm.conditioners.grid import GridEmbedder, GridTokens
from ldm.conditioners.ssl import GridPatchEmbedder, PatchEmbedder, SSLEmbedder, with_noise
from ldm.data.module import collate
from ldm.errors import UserError
from ldm.training.run import CALLBACKS


def tiny_grid(**params) -> GridEmbedder:
    torch.manual_seed(0)
    params = {"embed_dim": 12, "context_dim": 16, "hidden": 16, "depth": 2, "heads": 4, "mlp": 24, **params}
    model = GridEmbedder(**params)
    with torch.no_grad():  # no bias stays zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def zoom_vit(golden: dict, **params) -> GridEmbedder:
    model = GridEmbedder(32, 48, hidden=48, depth=2, mlp=64, dropout=0.1, **params)
    state = {k: v for k, v in golden["state_dict"].items() if params.get("last_norm", True) or "layer_norm" not in k}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def cond_weights(path) -> dict:
    state = load(path)
    prefix = "cond_stage_model."
    return {k.removeprefix(prefix): v for k, v in state.get("state_dict", state).items() if k.startswith(prefix)}


# --- patch and region ----------------------------------------------------------------------------------------------


def test_patch_and_region_match_the_published_embedder(oracle):
    folder = oracle / "more" / "lid_ssl_ckpt"
    model = SSLEmbedder(24, 40).eval().requires_grad_(False)
    model.load_state_dict(cond_weights(folder / "model.ckpt"))
    io = load(folder / "io.pt")
    batch = {"ssl": io["batch"]["feat_20x"], "region": io["batch"]["feat_5x"]}
    assert relative(model(batch)["crossattn"], io["c"]) < 1e-5
    assert relative(model.null()["crossattn"].expand(2, 2, 512), io["uc"]) < 1e-5
    dropped = model(batch, torch.tensor([True, False]))["crossattn"]
    assert relative(dropped[0], io["uc"][0]) < 1e-5
    assert relative(dropped[1], io["c"][1]) < 1e-5


def test_without_a_region_its_token_is_that_of_zeros():
    model = SSLEmbedder(6, 10, 8).eval()
    patch = torch.randn(3, 6)
    tokens = model({"ssl": patch})["crossattn"]
    assert tokens.shape == (3, 2, 8)
    assert torch.equal(tokens, model({"ssl": patch, "region": torch.zeros(3, 10)})["crossattn"])
    assert torch.equal(tokens[:, 1], model.region_fc.bias.expand(3, 8))
    dropped = model.train()({"ssl": patch}, torch.tensor([True, False, True]))["crossattn"]
    assert torch.equal(dropped[[0, 2]], model.null()["crossattn"].expand(2, 2, 8))


def test_features_as_users_give_them():
    model = SSLEmbedder(6, 10, 8).eval()
    patch, region = torch.randn(2, 6), torch.randn(2, 10)
    want = model({"ssl": patch, "region": region})["crossattn"]
    for as_given in (torch.Tensor.numpy, torch.Tensor.tolist, list, lambda rows: [row.numpy() for row in rows]):
        given = model.read({"ssl": as_given(patch), "region": as_given(region)})
        assert torch.equal(model(given)["crossattn"], want)
    one = model(model.read({"ssl": patch.numpy(), "region": region[0].tolist()}))["crossattn"]
    torch.testing.assert_close(one[0], want[0])
    assert torch.equal(one[1, 1], one[0, 1])  # one region for all


def test_the_region_alone_is_dropped_in_training_only():
    model = SSLEmbedder(6, 10, 8, region_dropout=0.5)
    batch = {"ssl": torch.randn(64, 6), "region": torch.randn(64, 10)}
    whole, trained = model.eval()(batch)["crossattn"], model.train()(batch)["crossattn"]
    lost = (trained[:, 1] == model.region_fc.bias).all(1)
    assert 10 < int(lost.sum()) < 54
    assert torch.equal(trained[:, 0], whole[:, 0])
    assert torch.allclose(trained[~lost, 1], whole[~lost, 1])


def test_noise_is_relative_repeatable_and_of_training_only():
    features = torch.tensor([[1.0], [50.0]]) * torch.randn(2, 4000)
    ratio = (with_noise(features, 0.2) - features).norm(dim=1) / features.norm(dim=1)
    assert torch.allclose(ratio, torch.tensor([0.2, 0.2]), atol=0.02)
    assert torch.equal(with_noise(torch.zeros(1, 5), 1.0), torch.zeros(1, 5))
    batch = {"ssl": torch.randn(4, 6), "region": torch.randn(4, 10)}
    for model in (
        PatchEmbedder(6, 8, noise=0.3),
        SSLEmbedder(6, 10, 8, region_dropout=0, noise=0.3),
        GridPatchEmbedder(6 * 4, 8, noise=0.3),
    ):
        given = {**batch, "ssl": torch.randn(4, 24)} if isinstance(model, GridPatchEmbedder) else batch

        def tokens(model=model, given=given) -> torch.Tensor:
            torch.manual_seed(7)
            return model(given)["crossattn"]

        assert torch.equal(tokens(), tokens())
        noisy = tokens()
        plain = model.eval()(given)["crossattn"]
        assert not torch.allclose(noisy, plain)
        assert torch.equal(plain, model(given)["crossattn"])
        drop = torch.ones(4, dtype=torch.bool)
        assert torch.equal(model.train()(given, drop)["crossattn"], model.null()["crossattn"].expand_as(plain))


# --- grids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["1x1", "2x2", "4x4", "8x8", "12x12"])
def test_grids_match_the_published_transformer(oracle, case):
    golden = load(oracle / "more" / "zoomldm_vit.pt")
    io = golden["cases"][case]
    model = zoom_vit(golden)
    raw = {"ssl": io["raw_grid"], "magnification": io["mag"]}
    assert relative(model.prepared(io["raw_grid"]), io["ssl_feat"]) < 1e-5
    assert relative(model.slots(io["raw_grid"]), io["padded"]) < 1e-5
    assert relative(model(raw)["crossattn"], io["tokens"]) < 1e-5
    prepared = {"ssl": io["ssl_feat"], "magnification": io["mag"]}
    assert relative(zoom_vit(golden, standardize=False)(prepared)["crossattn"], io["tokens"]) < 1e-5
    older = zoom_vit(golden, last_norm=False)(raw)["crossattn"]
    assert relative(older, io["tokens_without_last_norm"]) < 1e-5
    if case == "1x1":
        flat = {"ssl": io["raw_grid"].flatten(1), "magnification": io["mag"]}
        assert relative(model(flat)["crossattn"], io["tokens"]) < 1e-5


def test_mixed_grids_match_the_published_transformer(oracle):
    golden = load(oracle / "more" / "zoomldm_vit.pt")
    io = golden["mixed"]
    model = zoom_vit(golden, standardize=False)
    assert relative(model({"ssl": io["ssl_feat"], "magnification": io["mag"]})["crossattn"], io["tokens"]) < 1e-5
    back = {"ssl": io["ssl_feat"][::-1], "magnification": io["mag"].flip(0)}
    assert relative(model(back)["crossattn"], io["tokens"].flip(0)) < 1e-5


def test_the_published_checkpoint_gives_its_condition(oracle):
    folder = oracle / "more" / "zoomldm_ckpt"
    model = zoom_vit({"state_dict": cond_weights(folder / "weights.ckpt")}, standardize=False)
    io = load(folder / "io.pt")
    cond = model({"ssl": io["batch"]["ssl_feat"], "magnification": io["batch"]["mag"]})
    assert relative(cond["crossattn"], io["raw"]["c"]) < 1e-5


def test_grids_have_a_null_of_zeros_and_drop_to_it():
    model = tiny_grid()
    batch = {"ssl": torch.randn(2, 12, 2, 2), "magnification": torch.tensor([0, 7])}
    tokens = model(batch, torch.tensor([False, True]))["crossattn"]
    assert tokens.shape == (2, 65, 16)
    assert torch.equal(tokens[1:], model.null()["crossattn"])
    assert not tokens[1].any()
    assert torch.equal(tokens[0], model(batch)["crossattn"][0])


def test_grids_by_magnification_names_and_as_users_give_them():
    model = tiny_grid(magnifications=["20x", "10x", "5x", "2.5x"])
    grids = torch.randn(3, 12, 4, 4)
    want = model({"ssl": grids, "magnification": torch.tensor([2, 2, 3])})["crossattn"]
    for levels in (["5x", "5x", "2.5x"], [5, 5, 2.5], np.array(["5", "5x", "2.5"])):
        given = model.read({"ssl": grids.numpy(), "magnification": levels})
        assert torch.equal(model(given)["crossattn"], want)
    one = model.read({"ssl": grids[0].tolist(), "magnification": model.parse("magnification", "5x")})
    torch.testing.assert_close(model(one)["crossattn"], want[:1])
    several = model(model.read({"ssl": [grids[0].numpy(), torch.randn(12)], "magnification": "5x"}))["crossattn"]
    torch.testing.assert_close(several[:1], want[:1])
    assert model.describe()["magnification"].names == ("20x", "10x", "5x", "2.5x")


def test_grid_tokens_know_places_and_null():
    torch.manual_seed(0)
    model = GridTokens(12, 16, grid=2).eval()
    grids = torch.randn(2, 12, 2, 2)
    tokens = model({"ssl": grids})["crossattn"]
    assert tokens.shape == (2, 4, 16)
    same = model({"ssl": torch.ones(1, 12, 2, 2)})["crossattn"][0]
    assert len({tuple(row.tolist()) for row in same}) == 4
    moved = grids.clone()
    moved[:, :, 0, 1] += 1  # row 0, column 1 is the second token
    changed = (model({"ssl": moved})["crossattn"] - tokens).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False, True, False, False]
    dropped = model({"ssl": grids}, torch.tensor([True, False]))["crossattn"]
    assert torch.equal(dropped[:1], model.null()["crossattn"])
    assert torch.equal(dropped[1], tokens[1])
    assert torch.allclose(model.positions[:, 0], torch.tensor([8.0, 24, 8, 24]).sin())  # columns first
    assert torch.allclose(model.positions[:, 6], torch.tensor([8.0, 8, 24, 24]).sin())


# --- all -----------------------------------------------------------------------------------------------------------

SOME = {"magnification": torch.tensor([0, 1, 2]), "region": torch.randn(3, 10)}
BATCHES = {
    "patch": (lambda: PatchEmbedder(12, 16), {"ssl": torch.randn(3, 12)}),
    "cells": (lambda: GridPatchEmbedder(12, 16), {"ssl": torch.randn(3, 12)}),
    "region": (lambda: SSLEmbedder(12, 10, 16), {"ssl": torch.randn(3, 12), **SOME}),
    "grid": (lambda: tiny_grid(), {"ssl": [torch.randn(12, k, k) for k in (1, 4, 8)], **SOME}),
    "tokens": (lambda: GridTokens(12, 16, hidden=20), {"ssl": torch.randn(3, 12, 4, 4)}),
}


@pytest.mark.parametrize("name", BATCHES)
def test_gradient_reaches_every_parameter(name):
    make, batch = BATCHES[name]
    model = make().train()
    torch.manual_seed(1)
    cond = model(batch, torch.tensor([False, True, False]))
    sum((value * torch.randn_like(value)).sum() for value in cond.values()).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SSLEmbedder(6, 10)({"ssl": torch.randn(2, 6), "region": torch.randn(2, 9)}), "dimension 10"),
        (lambda: SSLEmbedder(6, 10)({"region": torch.randn(2, 10)}), "conditioned on 'ssl'"),
        (lambda: SSLEmbedder(6, 10).read({"region": torch.randn(2, 10)}), "give both"),
        (lambda: SSLEmbedder(6, 10, key="a", region_key="a"), "two features"),
        (lambda: SSLEmbedder(6, 10, region_dropout=2), "probability"),
        (lambda: SSLEmbedder(6, 10).parse("region", "x"), "no text stands for"),
        (lambda: PatchEmbedder(6, noise=-1), "0 or more; got -1"),
        (lambda: tiny_grid()({"ssl": torch.randn(1, 12, 3, 3), "magnification": torch.tensor([0])}), "1, 2, 4, 8 or"),
        (lambda: tiny_grid()({"ssl": torch.randn(1, 12, 4, 2), "magnification": torch.tensor([0])}), "square grids"),
        (lambda: tiny_grid()({"ssl": torch.randn(1, 9, 2, 2), "magnification": torch.tensor([0])}), "dimension 12"),
        (lambda: tiny_grid()({"ssl": torch.randn(3, 12), "magnification": torch.tensor([0, 1])}), "one each"),
        (lambda: tiny_grid()({"ssl": torch.randn(1, 12), "magnification": torch.tensor([8])}), r"0\.\.7; got \[8\]"),
        (lambda: tiny_grid(magnifications=["20x", "5x"]).levels("25x"), "no magnification '25x'; did you mean"),
        (lambda: tiny_grid(magnifications=["20x", "20x"]), "different names"),
        (lambda: tiny_grid().read({"ssl": torch.randn(12)}), "give both"),
        (lambda: tiny_grid().parse("ssl", "0.1"), "no text stands for"),
        (lambda: tiny_grid(heads=3), "multiple of heads"),
        (lambda: GridTokens(12, 16, grid=2)({"ssl": torch.randn(1, 12, 4, 4)}), "takes 2 x 2 features"),
        (lambda: GridTokens(10, 16), "multiple of 4"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("model", [PatchEmbedder(12), SSLEmbedder(12, 10), tiny_grid(), GridTokens(12, 16)])
def test_features_of_another_size_are_told_before_training(model):
    model.check_data({"encoder": {"encoder": "uni", "dim": 12}})
    model.check_data({"conditions": {"ssl": {"source": "features/uni", "encoder": "uni", "shape": [12, 4, 4]}}})
    model.check_data({})
    about = {"source": "features/uni", "encoder": "uni", "shape": [1024]}
    for metadata in ({"encoder": {"encoder": "uni", "dim": 1024}}, {"conditions": {"ssl": about}}):
        with pytest.raises(UserError, match=r"encoder 'uni' with 1024 values.*embed_dim is 12"):
            model.check_data(metadata)
    if len(model.keys) == 2 and model.keys[1] == "region":
        with pytest.raises(UserError, match="region_embed_dim is 10"):
            model.check_data({"conditions": {"region": {"shape": [768], "encoder": "ctranspath"}}})
    if len(model.keys) == 2 and model.keys[1] == "magnification":
        with pytest.raises(UserError, match="no magnification '40x'"):
            model.check_data({"conditions": {"magnification": {"names": ["40x"]}}})


# --- configs and batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tokens"), [("brca_20x_region", 2), ("zoomldm_brca", 65)])
def test_the_published_configs_hold(name, tokens):
    defaults = {"lightning": {"callbacks": {name: {"target": target} for name, target in CALLBACKS.items()}}}
    cfg = config.load_config([ROOT / "configs" / "latent-diffusion" / f"{name}.yaml"], (), defaults)
    config.validate(cfg)
    params = cfg["model"]["params"]
    model = config.instantiate_from_config(params["cond_stage_config"])
    data = cfg["data"]["params"]
    assert set(model.keys) <= {*data["keys"], *data["conditions"]}
    assert model.null()["crossattn"].shape == (1, tokens, params["unet_config"]["params"]["context_dim"])


def test_grids_of_several_sizes_make_one_batch():
    model = tiny_grid(magnifications=["20x", "10x"])
    items = [{"ssl": torch.randn(12, k, k), "magnification": m, "row": 0} for k, m in ((1, "20x"), (2, "10x"))]
    batch = collate(items)
    assert [grid.shape[-1] for grid in batch["ssl"]] == [1, 2]
    assert batch["row"].tolist() == [0, 0]
    both = model(batch)["crossattn"]
    for i, item in enumerate(items):
        torch.testing.assert_close(both[i : i + 1], model(collate([item]))["crossattn"])
    assert collate(items[:1] * 3)["ssl"].shape == (3, 12, 1, 1)
