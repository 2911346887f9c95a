"""ZoomLDM's conditioning model in its second form, unCLIP's prior: the network, and from a checkpoint to tokens."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from published import load, relative
from test_convert_pixcell import run
from torch import Tensor

import ldm
from ldm.convert import convert, load_model, read_published
from ldm.diffusion.denoiser import call_network
from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.networks.prior import PriorTransformer

STATISTICS = {"model.clip_mean", "model.clip_std"}
MAGNIFICATIONS = ("20x", "10x", "5x", "2.5x", "1.25x", "0.625x", "0.3125x", "0.15625x")


@pytest.fixture(scope="module")
def golden(shared) -> dict:
    return load(shared("oracle") / "third" / "zoomldm_cdm_prior.pt")


@pytest.fixture(scope="module")
def flags(golden, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flags") / "flags.yaml"
    path.write_text(f"num_heads: {golden['config']['num_attention_heads']}")
    return path


def checkpoint(path: Path, state: dict[str, Tensor]) -> Path:
    """A file as the published training saves it, whose raw weights are others than the averages."""
    raw = {name: 1.1 * value for name, value in state.items()}
    args = argparse.Namespace(model="OpenAI-Prior")
    torch.save({"model": raw, "ema": state, "opt": {"state": {}}, "args": args}, path)
    return path


@pytest.fixture(scope="module")
def folder(golden, flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prior")
    source = checkpoint(out / "0000010.pt", golden["state_dict"])
    run("convert", source, "--config", flags, "--classes", ",".join(MAGNIFICATIONS), "--out", out / "model")
    return out / "model"


@pytest.fixture(scope="module")
def model(folder) -> LatentDiffusion:
    return load_model(folder)


def network(golden: dict, **more) -> PriorTransformer:
    """The published network, its weights by their names, all of them."""
    config = golden["config"]
    heads = config["num_attention_heads"]
    params = dict(hidden_size=heads * config["attention_head_dim"], depth=config["num_layers"], num_heads=heads)
    dim = config["embedding_dim"]
    net = PriorTransformer(dim, dim, config["num_embeddings"], dim, **params | more).eval()
    own = {name.removeprefix("model."): value for name, value in golden["state_dict"].items() if name not in STATISTICS}
    own.pop("cond_proj.weight")
    net.load_state_dict(own)
    return net


def conditions(golden: dict) -> dict[str, Tensor]:
    return {"vector": golden["state_dict"]["cond_proj.weight"][golden["y"]]}


def test_the_network_is_the_published_one(golden):
    with torch.no_grad():
        out = network(golden)(golden["x"], golden["t"], **conditions(golden))
        assert relative(out, golden["out"]) < 1e-5
        other = network(golden, num_heads=4)(golden["x"], golden["t"], **conditions(golden))
    assert relative(other, golden["out"]) > 1e-3


def test_training_reaches_every_parameter_and_checkpointing_changes_no_gradient(golden):
    grads = []
    for use in (False, True):
        net = network(golden, use_checkpoint=use).train()
        net(golden["x"], golden["t"], **conditions(golden)).square().mean().backward()
        assert [name for name, each in net.named_parameters() if each.grad is None or not each.grad.any()] == []
        grads.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*grads)


def test_a_batch_is_its_samples_and_one_timestep_or_condition_is_that_of_all(golden):
    net, cond, time = network(golden), conditions(golden)["vector"], torch.tensor([500.0])
    with torch.no_grad():
        whole = net(golden["x"], time.expand(3), cond)
        torch.testing.assert_close(net(golden["x"], time, cond), whole)
        for i in range(3):
            torch.testing.assert_close(net(golden["x"][i : i + 1], time, cond[i : i + 1]), whole[i : i + 1])
        torch.testing.assert_close(net(golden["x"], time, cond[:1])[0], whole[0])
        assert relative(net(golden["x"], time, cond[:1])[1], whole[1]) > 1e-3


def test_every_place_counts_and_each_token_sees_those_after_it(golden):
    net, cond = network(golden), conditions(golden)
    with torch.no_grad():
        turned = net(golden["x"].roll(1, 2), golden["t"], **cond).roll(-1, 2)
        assert relative(turned, golden["out"]) > 1e-3
        changed = golden["x"].clone()
        changed[:, :, -1] += 1
        assert relative(net(changed, golden["t"], **cond)[:, :, 0], golden["out"][:, :, 0]) > 1e-4


def test_half_precision_stays_near(golden):
    net = network(golden)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = net(golden["x"], golden["t"], **conditions(golden))
    assert relative(got.float(), golden["out"]) < 0.05


@pytest.mark.slow
def test_it_compiles_without_a_break(golden):
    net = network(golden)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(golden["x"], golden["t"], **conditions(golden)), golden["out"])


def test_the_published_size():
    """16 layers, 16 heads of 64 values, 65 tokens of 512 (ZoomLDM's code): 12 D^2 weights a layer, 2 D^2 of time."""
    with torch.device("meta"):
        net = PriorTransformer(512, 512, 65, 512)
    layer = 12 * 1024**2 + (4 + 5 + 4) * 1024
    outer = 2 * (1024**2 + 1024) + 3 * 512 * 1024 + 2 * 1024 + 512 + 65 * 1024 + 2 * 1024
    assert sum(each.numel() for each in net.parameters()) == 16 * layer + outer


def test_what_it_refuses(golden):
    with pytest.raises(UserError, match=r"hidden_size is a multiple of num_heads \(3\); got 32"):
        network(golden, num_heads=3)
    with pytest.raises(ValueError, match="takes sequences of 65 tokens; got 64"):
        network(golden)(golden["x"][:, :, 1:], golden["t"], **conditions(golden))


def test_a_folder_of_it_is_the_published_model(model, golden):
    cond = model.condition(magnification=[MAGNIFICATIONS[label] for label in golden["y"]])
    with torch.no_grad():
        assert relative(call_network(model.model, golden["x"], golden["t"], cond), golden["out"]) < 1e-5


def test_its_samples_are_those_of_the_published_rule(model, golden, shared):
    """DDIM on the table that both forms share: x0 as it is predicted, noise derived from it, the last step without."""
    want = load(shared("oracle") / "third" / "zoomldm_cdm.pt")["sampling"]
    net, labels = network(golden).double(), want["y"]
    vector = golden["state_dict"]["cond_proj.weight"][labels].double()
    bars, steps = want["alphas_cumprod"], want["timestep_map"]
    x = want["x_T"].double()
    with torch.no_grad():
        for step, before in zip(steps[::-1], [*steps[-2::-1], None], strict=True):
            x0 = net(x, torch.tensor([float(step)]), vector)
            noise = (x - bars[step].sqrt() * x0) / (1 - bars[step]).sqrt()
            bar = bars.new_ones(()) if before is None else bars[before]
            x = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    cond = model.condition(magnification=[MAGNIFICATIONS[label] for label in labels])
    sigmas = torch.cat([model.sigmas[steps].flip(0), torch.zeros(1)])
    solver = ldm.Sampler(solver="euler", guidance_scale=1.0).settled(model, "sample").guided(model, cond)
    with torch.no_grad():
        made = solver.solve(
            want["x_T"] * (1 + sigmas[0] ** 2).sqrt(), sigmas, cond, lambda step: None, lambda i, x, x0: None
        )
    assert relative(made, x) < 1e-4


def test_the_command_writes_tokens_that_condition_another_model(folder, model, golden, tmp_path):
    run("sample", "--model", folder, "--condition", "magnification=2.5x", "--count", 2, "--steps", 3, "--out",
        tmp_path / "out")  # fmt: skip
    tokens = np.load(tmp_path / "out" / "tokens.npy")
    assert tokens.shape == (2, 65, golden["config"]["embedding_dim"])
    assert "sequences of 65 tokens; PriorTransformer of" in run("describe", folder)
    again = ldm.sample(model, model.condition(magnification="2.5x"), 2, ldm.Sampler(steps=3, progress=False))
    np.testing.assert_allclose(tokens, again.mT.numpy(), rtol=1e-5, atol=1e-5)


def test_it_trains_on_tokens(model, golden):
    batch = {"image": golden["x"], "magnification": [MAGNIFICATIONS[label] for label in golden["y"]]}
    loss = model.loss(batch, torch.Generator().manual_seed(0))
    assert loss.shape == (3,)
    assert torch.isfinite(loss).all()


def wrapped(state: dict[str, Tensor], beginning: str, inner: str = "model.") -> dict[str, Tensor]:
    """The weights by names that begin so, and those of the transformer within by another name of it."""
    return {beginning + name.replace("model.", inner, 1): value for name, value in state.items()}


FORMS: dict[str, Callable[[dict], dict]] = {
    "alone": lambda state: state,
    "state_dict": lambda state: {"state_dict": state},
    "averages alone": lambda state: {"ema": state, "args": None},
    "DataParallel": lambda state: {"model": wrapped(state, "module."), "ema": state},
    "compiled": lambda state: {"model": wrapped(state, "_orig_mod."), "ema": wrapped(state, "_orig_mod.")},
    "compiled within": lambda state: {"model": wrapped(state, "", "model._orig_mod."), "ema": state},
}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_is_accounted_for_whatever_wrapped_it(form, raw, golden, flags, tmp_path):
    state = golden["state_dict"]
    torch.save(FORMS[form](state), tmp_path / "a.pt")
    found = read_published(tmp_path / "a.pt", config=flags, raw_weights=raw)
    assert {name for name in found.unused if not name.startswith(("last step: ", "averages: "))} == STATISTICS
    assert len(found.state) + len(STATISTICS) == len(state)
    assert torch.equal(found.state["model.diffusion_model.proj_in.weight"], state["model.proj_in.weight"])


def test_the_raw_weights_are_taken_where_they_are_asked_for(golden, flags, tmp_path):
    source, state = checkpoint(tmp_path / "a.pt", golden["state_dict"]), golden["state_dict"]
    taken = [read_published(source, config=flags, raw_weights=raw).state for raw in (False, True)]
    for found, factor in zip(taken, (1.0, 1.1), strict=True):
        own = found["model.diffusion_model.proj_in.weight"]
        assert torch.equal(own, factor * state["model.proj_in.weight"])


@pytest.mark.parametrize(
    ("heads", "change", "message"),
    [
        (None, {}, "no published transformer has a width of 32: give --config"),
        (3, {}, r"hidden_size is a multiple of num_heads \(3\); got 32"),
        (2, {"model.proj_in.weight": None}, "no whole transformer of the published kind: it lacks 'model.proj_in"),
        (2, {"model.transformer_blocks.1.ff.net.2.bias": None}, "transformer_blocks.1.ff.net.2.bias"),
        (2, {"model.transformer_blocks.0.attn1.to_q.weight": (32, 16)}, "transformer_blocks.0.attn1.to_q.weight"),
        (2, {"model.prd_embedding": (1, 1, 32)}, "prd_embedding"),
        (2, {"model.proj_to_clip_embeddings.bias": (48,), "model.proj_to_clip_embeddings.weight": (48, 32)},
         "out_channels is 48; the latent has 24 channels"),
    ],
)  # fmt: skip
def test_what_contradicts_the_weights_is_told(heads, change, message, golden, tmp_path):
    state = golden["state_dict"] | {name: shape and torch.ones(shape) for name, shape in change.items()}
    source = checkpoint(tmp_path / "a.pt", {name: value for name, value in state.items() if value is not None})
    (tmp_path / "flags.yaml").write_text(f"num_heads: {heads}")
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "model", config=tmp_path / "flags.yaml" if heads else None, say=lambda line: None)
