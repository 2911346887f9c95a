"""Adapters: read in everyone's forms, added to weights, trained, exported and merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_cohort import DIT, FIRST_STAGE, UNET, config, make_cohort, train
from torch import nn

import ldm
from ldm.cli.app import app
from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.interop.lora import Lora, LowRank, placed, read_lora
from ldm.model_folder import load_model, read_model_folder, write_model_folder
from ldm.networks.dit import DiT
from ldm.networks.lora import LoraSettings, adapt
from ldm.networks.unet import UNetModel
from ldm.sampling.adapters import Adapters, parse_adapters
from ldm.training.command import main

SPATIAL = {**UNET, "use_spatial_transformer": True, "context_dim": 16}


def filled(network: nn.Module) -> nn.Module:
    """With weights that are nowhere zero."""
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return network


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    return make_cohort(tmp_path)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A class-conditional transformer with cross-attention, not trained."""
    node = {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "unet_config": {"target": "ldm.networks.dit.DiT", "params": {**DIT, "context_dim": 16}},
            "first_stage_config": FIRST_STAGE, "use_ema": False, "parameterization": "flow",
            "cond_stage_config": {
                "target": "ldm.conditioners.class_token.ClassEmbedder",
                "params": {"classes": ["0", "1"], "dim": 16},
            },
        },
    }  # fmt: skip
    torch.manual_seed(0)
    model = instantiate_from_config(node)
    filled(model.model)
    return write_model_folder(tmp_path / "base", node, model.state_dict(), {"licence": "MIT", "mpp": 0.5})


def low(outputs: int, inputs: int, rank: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


# --- forms ------------------------------------------------------------------------------------------------------------


FORMS = ("peft", "peft default", "diffusers", "diffusers of before", "kohya", "own")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_change(tmp_path, form):
    down, up = low(64, 64)
    theirs = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    state, alpha = {}, 4.0
    if form.startswith("peft"):
        middle = ".default" if form.endswith("default") else ""
        state = {
            f"base_model.model.{theirs}.lora_A{middle}.weight": down,
            f"base_model.model.{theirs}.lora_B{middle}.weight": up,
        }
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    elif form == "diffusers":
        state = {f"unet.{theirs}.lora.down.weight": down, f"unet.{theirs}.lora.up.weight": up}
        alpha = 2.0
    elif form == "diffusers of before":
        before = theirs.removesuffix("to_q")
        state = {f"{before}processor.to_q_lora.down.weight": down, f"{before}processor.to_q_lora.up.weight": up}
        alpha = 2.0
    else:
        flat = f"lora_unet_{theirs.replace('.', '_')}"
        if form == "own":
            flat = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q"
        state = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(4.0)}
    save_file(state, tmp_path / "adapter_model.safetensors")
    network = UNetModel(**SPATIAL)
    (found,) = placed(read_lora(tmp_path), dict(network.named_parameters()))
    assert found.weight == "input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(found.low.change(), alpha / 2 * up @ down)


def test_parts_of_joined_layers_go_to_their_rows():
    network = filled(DiT(**DIT, context_dim=16))
    weights = dict(network.named_parameters())
    names = {"attn1.to_k": ("attn.qkv", 1), "attn2.to_v": ("cross_attn.kv_linear", 1), "ff.net.2": ("mlp.fc2", 0)}
    layers = {}
    for name in names:
        outputs, inputs = (32, 128) if name == "ff.net.2" else (32, 32)
        layers[f"transformer_blocks.1.{name}"] = LowRank(*low(outputs, inputs))
    for each in placed(Lora("a", layers, ""), weights):
        ours, part = names[each.theirs.removeprefix("transformer_blocks.1.")]
        assert (each.weight, each.part) == (f"blocks.1.{ours}.weight", part)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.lora_A.weight": torch.ones(2, 3)}, "one of the two matrices of a alone"),
        ({"text_encoder.a.lora_A.weight": torch.ones(2, 3)}, "changes a text tower"),
        ({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 4)}, "do not fit"),
        ({"a.hada_w1_a": torch.ones(2, 3)}, "another kind of adapter"),
        ({"a.weight": torch.ones(2, 3)}, "no part of a LoRA"),
        ({"a.lora_A.weight": torch.full((2, 3), torch.nan), "a.lora_B.weight": torch.ones(3, 2)}, "NaN"),
    ],
)
def test_what_is_no_adapter_is_told(tmp_path, state, message):
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path)


def test_what_a_stranger_wrote_runs_no_pattern_and_names_no_file(tmp_path):
    down, up = low(96, 32)
    save_file({"a.lora_A.weight": down, "a.lora_B.weight": up}, tmp_path / "adapter_model.safetensors")
    for settings, message in (
        ({"alpha_pattern": {"(a+)+$": 1}}, "no name of a layer"), ({"alpha_pattern": {"a": "x"}}, "alpha_pattern.a is"),
        ({"lora_alpha": -1}, "lora_alpha is"), ({"peft_type": "LOHA"}, "LoRA alone"),
    ):  # fmt: skip
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=message):
            read_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"alpha_pattern": {"a": 6}, "lora_alpha": 2}))
    assert read_lora(tmp_path).layers["a"].scale == 3


def test_an_adapter_of_another_network_is_told():
    weights = dict(DiT(**DIT, context_dim=16).named_parameters())
    with pytest.raises(UserError, match="does not have"):
        placed(Lora("a", {"blocks.9.attn.qkv": LowRank(*low(96, 32))}, ""), weights)
    with pytest.raises(UserError, match="by 96 x 16 values, and this network has 96 x 32"):
        placed(Lora("a", {"blocks.0.attn.qkv": LowRank(*low(96, 16))}, ""), weights)
    other = {"transformer_blocks.0.attn2.to_q.weight": torch.ones(32, 32)}
    with pytest.raises(UserError, match="trained on other weights"):
        placed(Lora("a", {"blocks.0.attn.proj": LowRank(*low(32, 32))}, "", base=other), weights)


def test_paths_and_scales():
    assert parse_adapters(["a/b=0.5", "c"]) == {"a/b": 0.5, "c": 1.0}
    with pytest.raises(UserError, match="path=scale"):
        parse_adapters(["a=b"])
    with pytest.raises(UserError, match="twice"):
        parse_adapters(["a=1", "a=2"])


# --- on a model -------------------------------------------------------------------------------------------------------


def adapter_file(path: Path, seed: int) -> Path:
    state = {}
    for name, (outputs, inputs) in {"blocks.0.attn.qkv": (96, 32), "blocks.2.mlp.fc1": (128, 32)}.items():
        down, up = low(outputs, inputs, seed=seed)
        state |= {f"{name}.lora_A.weight": 0.1 * down, f"{name}.lora_B.weight": 0.1 * up}
    save_file(state, path)
    return path


def test_several_adapters_add_and_merged_ones_give_the_same_image(model_folder, tmp_path):
    model = load_model(model_folder)
    one, two = (adapter_file(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two")))
    cond = model.condition(class_="0")
    plain = ldm.Sampler(steps=2, progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = ldm.sample(model, cond, 2, plain)
    both = ldm.sample(model, cond, 2, ldm.Sampler(steps=2, progress=False, lora={one: 0.5, two: -2.0}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (both - image).abs().max() > 1e-3
    assert torch.equal(ldm.sample(model, cond, 2, plain), image)
    exactly = torch.nn.Module.state_dict(Adapters({one: 0.5, two: -2.0}).network(model))
    wanted = before["model.diffusion_model.blocks.0.attn.qkv.weight"].clone()
    for path, scale in ((one, 0.5), (two, -2.0)):
        held = load_file(path)
        wanted += scale * held["blocks.0.attn.qkv.lora_B.weight"] @ held["blocks.0.attn.qkv.lora_A.weight"]
    torch.testing.assert_close(exactly["diffusion_model.blocks.0.attn.qkv.weight"], wanted)
    assert app_of("export", one, "--merge", "0.5", "--base", model_folder, "--out", tmp_path / "first") == 0
    assert app_of("export", two, "--merge", "-2", "--base", tmp_path / "first", "--out", tmp_path / "merged") == 0
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(ldm.sample(merged, cond, 2, plain), both, atol=1e-5, rtol=0)
    assert read_model_folder(tmp_path / "merged")[1]["licence"] == "MIT"


def app_of(*words: object) -> int:
    import typer.main

    from ldm.cli.script import call
    from ldm.errors import run_command

    return run_command(lambda: call(typer.main.get_command(app), "histoldm", [str(word) for word in words]))


def test_the_command_takes_adapters_and_files_say_so(model_folder, tmp_path, capsys):
    from ldm.images.marks import read_mark

    one = adapter_file(tmp_path / "one.safetensors", 0)
    words = ["sample", "--model", model_folder, "--condition", "class=0", "--count", 1, "--steps", 2]
    assert app_of(*words, "--lora", f"{one}=0.5", "--out", tmp_path / "out") == 0
    mark = read_mark(tmp_path / "out" / "00000.png")
    assert "one=0.5 sha256:" in json.dumps(mark)
    capsys.readouterr()
    assert app_of(*words, "--lora", f"{one}=0.6", "--out", tmp_path / "out") == 2  # a folder of other settings
    assert app_of(*words, "--lora", "none", "--out", tmp_path / "b") == 2
    assert "there is no adapter at none" in capsys.readouterr().err


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UNetModel, DiT])
def test_an_adapted_network_begins_as_it_was_and_trains_the_adapter_alone(kind):
    torch.manual_seed(0)
    network = filled(kind(**(UNET if kind is UNetModel else DIT)))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    before, names = network(x, t), set(network.state_dict())
    adapt(network, LoraSettings(rank=2, targets="all"), seed=0)
    assert torch.equal(network(x, t), before)
    assert names < set(network.state_dict())
    for name, weight in network.named_parameters():
        assert weight.requires_grad == (".lora_" in name)
        if ".lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    after = network(x, t)
    assert (after - before).abs().max() > 1e-2
    after.square().sum().backward()
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in trained)


def adapter_config(cohort: Path, base: Path, **lora) -> dict:
    node = read_model_folder(base)[0]["params"]
    cfg = config(cohort, "dit", "own")
    params = {name: value for name, value in node.items() if name != "use_ema"}
    cfg["model"]["params"] = {**params, "ckpt_path": str(base), "lora": {"rank": 2, **lora}}
    cfg["data"]["params"]["conditions"] = {"class": "grade"}
    return cfg


def test_a_trained_adapter_is_kept_alone_resumed_sampled_exported_and_merged(cohort, model_folder, tmp_path):
    cfg = adapter_config(cohort, model_folder, alpha=4)
    run = train(tmp_path, cfg, "whole")
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(".lora_" in name or name.startswith("model_ema.") for name in content["state_dict"])
    part = train(tmp_path, cfg, "part", "--max_steps", "2")
    assert main(["-t", "--resume", str(part), "--max_steps", "4", "--no-test"]) == 0
    again = torch.load(part / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in content["state_dict"].items())

    with pytest.raises(UserError, match="holds an adapter of"):
        load_model(run)
    assert app_of("export", run, "--out", tmp_path / "adapter") == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (2, 4, "LORA")
    assert str(model_folder) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert app_of("export", tmp_path / "adapter", "--merge", 1, "--out", tmp_path / "merged") == 2  # it names no file
    assert app_of("export", run, "--merge", 1, "--out", tmp_path / "merged") == 0
    model = load_model(model_folder)
    cond = model.condition(class_="1")
    images = [
        ldm.sample(model, cond, 1, ldm.Sampler(steps=2, progress=False, lora={path: 1.0}))
        for path in (run, tmp_path / "adapter")
    ]
    images.append(ldm.sample(load_model(tmp_path / "merged"), cond, 1, ldm.Sampler(steps=2, progress=False)))
    plain = ldm.sample(model, cond, 1, ldm.Sampler(steps=2, progress=False))
    assert all((image - images[0]).abs().max() < 1e-5 for image in images)
    assert (plain - images[0]).abs().max() > 1e-5


def test_an_adapter_goes_on_with_its_own_base_alone(cohort, model_folder, tmp_path, capsys):
    run = train(tmp_path, adapter_config(cohort, model_folder), "begun", "--max_steps", "2")
    model = load_model(model_folder)
    filled(model.model)
    node, metadata = read_model_folder(model_folder)
    write_model_folder(model_folder, node, model.state_dict(), metadata)
    assert main(["-t", "--resume", str(run), "--max_steps", "4", "--no-test"]) == 2
    assert "trained on other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"rank": 0}, "lora.rank"), ({"rnak": 3}, "did you mean 'rank'"), ({"targets": ["atn"]}, "no layer within atn")],
)
def test_mistakes_are_told_before_anything_is_trained(cohort, model_folder, tmp_path, capsys, lora, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(adapter_config(cohort, model_folder, **lora)))
    assert main(["-t", "--base", str(path), "--logdir", str(tmp_path / "logs")]) == 2
    assert message in capsys.readouterr().err
