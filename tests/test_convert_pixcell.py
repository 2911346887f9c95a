"""PixCell, from its folder and its training's checkpoints: through a model folder, the outputs of its own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import load, relative
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import ldm
from ldm.cli import app
from ldm.convert import convert, load_model, read_published
from ldm.diffusion.denoiser import call_network
from ldm.diffusion.fields import FeatureField
from ldm.diffusion.samplers import sample_euler
from ldm.diffusion.schedules import table_sigmas
from ldm.diffusion.tiled import tiled
from ldm.errors import UserError
from ldm.interop.lora import placed
from ldm.sampling.adapters import Adapters

SIZES = {"pixcell_256": 1, "pixcell_1024": 4}


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def third(shared) -> Path:
    return shared("oracle") / "third"


@pytest.fixture(scope="module", params=SIZES)
def pixcell(request, third, tmp_path_factory):
    """Name, its model folder, the model, and what its own code gives."""
    name, folder = request.param, tmp_path_factory.mktemp("pixcell") / "model"
    convert(third / name, folder, base=third / "sd3_vae", say=lambda line: None)
    return name, folder, load_model(folder), load(third / name / "io.pt")


def grids(tokens: Tensor, side: int) -> Tensor:
    """Tokens (B,k*k,D), row by row, as grids of features (B,D,k,k)."""
    return tokens.mT.unflatten(2, (side, side))


def test_the_network_is_the_published_one_at_any_size_and_time(pixcell):
    name, _, model, golden = pixcell
    cond = model.condition(features=grids(golden["cond"], SIZES[name]))
    with torch.no_grad():
        for x, time, given, want in (
            ("x", "t", cond, "out"), ("x", "t_float", cond, "out_t_float"), ("x", "t", None, "out_uncond"),
            ("x_other_size", "t", cond, "out_other_size"),
        ):  # fmt: skip
            count = len(golden[x])
            rows = given or {part: value.expand(count, -1, -1) for part, value in model.null_condition().items()}
            rows = {part: value[:count] for part, value in rows.items()}
            out = call_network(model.model, golden[x], golden[time][:count], rows)
            assert relative(out, golden[want]) < 1e-5, want
    assert model.learn_sigma
    assert model.parameterization == "eps"


def test_samples_are_the_published_ones(pixcell):
    name, _, model, golden = pixcell
    want = golden["sampling"]
    cond = model.condition(features=grids(want["cond"], SIZES[name]))
    torch.testing.assert_close(1 / (1 + model.sigmas.double() ** 2), want["alphas_cumprod"], rtol=1e-5, atol=1e-9)
    sampler = ldm.Sampler(guidance_scale=want["guidance"], solver="dpmpp_2m").settled(model, "sample")
    visited = torch.cat([model.sigmas[want["diffusers_timesteps"]], torch.zeros(1)])
    solver = sampler.guided(model, cond)

    def noisy(sigmas: Tensor) -> Tensor:
        return want["x_T"] * (1 + sigmas[0] ** 2).sqrt()

    with torch.no_grad():
        made = solver.solve(noisy(visited), visited, cond, lambda step: None, lambda i, x, x0: None)
        assert relative(made, want["diffusers_dpmpp"]) < 1e-4
        assert relative(model.decode(made), want["decoded"]) < 1e-4

        bars = torch.tensor(want["dpms_alphas_cumprod"], dtype=torch.float64)
        sigmas = ((1 - bars) / bars).sqrt().float()
        at = model.denoiser().timestep(sigmas[:-1])
        torch.testing.assert_close(at, torch.tensor(want["dpms_model_times"]), rtol=0, atol=2e-3)
        made = solver.solve(noisy(sigmas), sigmas[:-1], cond, lambda step: None, lambda i, x, x0: None)
        made = sample_euler(solver.denoiser, made, sigmas[-2:], cond)  # its last step is of first order
        assert relative(made / (1 + sigmas[-1] ** 2).sqrt(), want["dpms_original"]) < 1e-4

        sigmas = table_sigmas(model.sigmas, len(want["ddim_timesteps"]), "uniform")
        made = sample_euler(solver.denoiser, noisy(sigmas), sigmas, cond)
        assert relative(made, want["ddim_16ch"]) < 1e-4


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("raw", [False, True])
def test_a_checkpoint_of_the_training_is_the_same_network(name, raw, third, tmp_path):
    folder = third / name / "original"
    (tmp_path / "flags.yaml").write_text("num_heads: 2")
    lines: list[str] = []
    convert(
        folder / "epoch_3_step_1234.pth", tmp_path / "model", base=third / "sd3_vae", config=tmp_path / "flags.yaml",
        raw_weights=raw, say=lines.append,
    )  # fmt: skip
    model, golden = load_model(tmp_path / "model"), load(folder / "io.pt")
    cond = model.condition(features=grids(golden["y"], SIZES[name]))
    with torch.no_grad():
        out = call_network(model.model, golden["x"], golden["t"], cond)
    assert relative(out, golden["out" if raw else "out_ema"]) < 1e-5
    assert any("2 attention heads, as the config says" in line for line in lines)
    weights = load(folder / "epoch_3_step_1234.pth")["state_dict" if raw else "state_dict_ema"]
    assert torch.equal(model.null_condition()["crossattn"][0], weights["y_embedder.y_embedding"])


def test_a_canvas_is_the_one_of_their_large_image_sampler(third, tmp_path):
    convert(third / "pixcell_1024", tmp_path / "model", base=third / "sd3_vae", say=lambda line: None)
    model, golden = load_model(tmp_path / "model"), load(third / "pixcell_1024" / "large_image.pt")
    window, cells = golden["window"], golden["tokens_side"]
    field = FeatureField(golden["embeddings"], tuple(golden["canvas"]), window, cells=cells)

    def condition(corners):
        return model.condition(features=field.at(corners))

    steps = [time - 1 for time in golden["timesteps"]]
    sigmas = torch.cat([model.sigmas[steps], model.sigmas[:1]])
    sampler = ldm.Sampler(guidance_scale=golden["w"] + 1, solver="euler", guidance_interval="all")
    solver = sampler.settled(model, "large_image").guided(model, given=["features"])
    solver = solver.over(lambda each: tiled(each, window, golden["stride"], condition, 16, torch.device("cpu")))
    x = golden["x_T"] * (1 + sigmas[0] ** 2).sqrt()
    with torch.no_grad():
        x = solver.solve(x, sigmas, {}, lambda step: None, lambda i, x, x0: None)
    assert relative(x / (1 + sigmas[-1] ** 2).sqrt(), golden["out"]) < 1e-4


def test_the_commands_take_it_from_conversion_to_images(pixcell, third, tmp_path):
    name, _, _, golden = pixcell
    cells, dim = SIZES[name], golden["cond"].shape[-1]
    said = run("convert", third / name, "--base", third / "sd3_vae", "--licence", "CC BY-NC 4.0", "--mpp", 0.5,
               "--out", tmp_path / "model")  # fmt: skip
    assert "licence: CC BY-NC 4.0" in said
    assert "licence: CC BY-NC 4.0" in run("describe", tmp_path / "model")
    np.save(tmp_path / "grid.npy", np.random.default_rng(0).normal(size=(2 * cells, cells, dim)).astype("f4"))
    options = ("--model", tmp_path / "model", "--steps", 2, "--device", "cpu")
    run("sample", *options, "--features", tmp_path / "grid.npy", "--out", tmp_path / "tiles")
    tiles = sorted((tmp_path / "tiles").glob("0*.png"))
    side = 8 * golden["x"].shape[-1]
    assert [Image.open(tile).size for tile in tiles] == [(side, side)] * 2
    run("large-image", *options, "--features", tmp_path / "grid.npy", "--out", tmp_path / "large.png")
    assert Image.open(tmp_path / "large.png").size == (side, 2 * side)
    (tmp_path / "in").mkdir()
    shutil.copy(tiles[0], tmp_path / "in" / "a.png")
    for file, values in (("from", np.zeros), ("to", np.ones)):
        np.save(tmp_path / f"{file}.npy", values((1, dim) if cells == 1 else (cells, cells, dim), "f4"))
    run("translate", *options, "--images", tmp_path / "in", "--features", tmp_path / "from.npy", "--target-features",
        tmp_path / "to.npy", "--out", tmp_path / "translated")  # fmt: skip
    assert len(list((tmp_path / "translated").glob("*.png"))) == 1


def published_sizes(folder: Path, out: Path) -> Path:
    """The folder with features of 1536 values, as the published models', and their card."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.pt", "original", "controlnet", "lora"))
    place = out / "transformer"
    state = load_file(place / "diffusion_pytorch_model.safetensors")
    config = json.loads((place / "config.json").read_text())
    for key in ("caption_projection.linear_1.weight", "caption_projection.uncond_embedding"):
        state[key] = torch.randn(len(state[key]), 1536)
    save_file(state, place / "diffusion_pytorch_model.safetensors")
    (place / "config.json").write_text(json.dumps(config | {"caption_channels": 1536}))
    (out / "README.md").write_text("---\nlicense: apache-2.0\n---\nPixCell")
    return out


def test_the_encoder_and_the_terms_are_recorded_and_said(third, tmp_path):
    source = published_sizes(third / "pixcell_256", tmp_path / "pixcell")
    lines: list[str] = []
    convert(source, tmp_path / "model", base=third / "sd3_vae", say=lines.append)
    assert "licence: apache-2.0" in lines
    assert any(line.startswith("features: uni2-h (CC") for line in lines), lines
    said = run("describe", tmp_path / "model")
    assert "features: uni2-h (CC" in said
    assert "licence: apache-2.0" in said


def card(folder: Path, licence: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")


def test_the_card_beside_a_checkpoint_or_above_a_part_says_the_terms(third, tmp_path):
    """Of the training's files, which lie in a folder of their own, and of parts of a pipeline."""
    source = tmp_path / "weights" / "epoch_3_step_1234.pth"
    card(source.parent, "cc-by-nc-4.0")
    shutil.copy(third / "pixcell_256" / "original" / source.name, source)
    (tmp_path / "flags.yaml").write_text("num_heads: 2")
    lines: list[str] = []
    convert(source, tmp_path / "model", base=third / "sd3_vae", config=tmp_path / "flags.yaml", say=lines.append)
    assert "licence: cc-by-nc-4.0" in lines
    assert load_model(tmp_path / "model").metadata["licence"] == "cc-by-nc-4.0"
    (source.parent / "README.md").unlink()
    convert(source, tmp_path / "model", base=third / "sd3_vae", config=tmp_path / "flags.yaml", say=lines.append)
    assert "licence: none is stated beside the weights; look it up, and record it by --licence" in lines
    folder = published_sizes(third / "pixcell_256", tmp_path / "pixcell")
    found = read_published(folder / "transformer", base=third / "sd3_vae")
    assert found.metadata["licence"] == "apache-2.0"
    (tmp_path / "secret").write_text("---\nlicense: told\n---\n")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    assert "licence" not in read_published(folder, base=third / "sd3_vae").metadata


def test_an_adapters_terms_go_with_what_it_makes(third, tmp_path):
    convert(third / "pixcell_1024", tmp_path / "model", base=third / "sd3_vae", licence="MIT", say=lambda line: None)
    adapter = tmp_path / "lora" / "MIST_HER2_lora_10.pth"
    card(adapter.parent, "cc-by-nc-4.0")
    shutil.copy(third / "pixcell_1024" / "lora" / adapter.name, adapter)
    assert Adapters({adapter: 0.5}).record()[0].endswith(" (cc-by-nc-4.0)")
    said = run("export", adapter, "--merge", 1, "--base", tmp_path / "model", "--out", tmp_path / "her2")
    assert "states no licence" not in said
    assert "licence: MIT; adapter MIST_HER2_lora_10: cc-by-nc-4.0" in run("describe", tmp_path / "her2")
    (adapter.parent / "README.md").unlink()
    run("export", adapter, "--merge", 1, "--base", tmp_path / "model", "--out", tmp_path / "her2")
    assert load_model(tmp_path / "her2").metadata["licence"] == "MIT"
    run("export", adapter, "--merge", 1, "--base", tmp_path / "model", "--out", tmp_path / "her2", "--licence", "mine")
    assert load_model(tmp_path / "her2").metadata["licence"] == "mine"


def test_what_it_lacks_is_told_in_one_message(third, tmp_path):
    for source in (third / "pixcell_256", third / "pixcell_256" / "original" / "epoch_3_step_1234.pth"):
        with pytest.raises(UserError, match="has no autoencoder; name the one that it was trained with by --base"):
            read_published(source)
    with pytest.raises(UserError, match="give --config with a YAML that says it, as num_heads: 16"):
        read_published(third / "pixcell_256" / "original" / "epoch_3_step_1234.pth", base=third / "sd3_vae")
    folder = published_sizes(third / "pixcell_256", tmp_path / "pixcell")
    config = folder / "transformer" / "config.json"
    told = json.loads(config.read_text())
    for change, message in (
        ({"use_additional_conditions": True}, "use_additional_conditions is True"),
        ({"num_layers": 4}, "its config says depth 4, its weights are of 3"),
        ({"caption_channels": 40}, "its config says context_dim 40, its weights are of 1536"),
    ):
        config.write_text(json.dumps(told | change))
        with pytest.raises(UserError, match=message):
            read_published(folder, base=third / "sd3_vae")
    config.write_text(json.dumps(told))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"new.weight": torch.ones(1)}, weights)
    with pytest.raises(UserError, match=r"holds new.weight, which PixCell's transformer does not have"):
        read_published(folder, base=third / "sd3_vae")


def test_the_vae_of_the_pipeline_is_found(third, tmp_path):
    folder = published_sizes(third / "pixcell_256", tmp_path / "pixcell")
    shutil.copytree(third / "sd3_vae", folder / "vae", ignore=shutil.ignore_patterns("*.pt"))
    params = read_published(folder).node["params"]
    assert (params["scale_factor"], params["shift_factor"]) == (1.5305, 0.0609)


def test_positions_that_are_not_its_own_are_refused(third, tmp_path):
    checkpoint = load(third / "pixcell_256" / "original" / "epoch_3_step_1234.pth")
    table = checkpoint["state_dict_ema"]["pos_embed"]
    checkpoint["state_dict_ema"]["pos_embed"] = table.roll(18, 2)  # rows before columns
    torch.save(checkpoint, tmp_path / "epoch.pth")
    (tmp_path / "flags.yaml").write_text("num_heads: 2")
    with pytest.raises(UserError, match="positions"):
        convert(tmp_path / "epoch.pth", tmp_path / "model", base=third / "sd3_vae", config=tmp_path / "flags.yaml")


def test_the_staining_adapter_is_the_published_one(third, pixcell):
    name, _, model, _ = pixcell
    if name != "pixcell_1024":
        pytest.skip("an adapter is there of the larger model alone")
    folder = third / name / "lora"
    golden, adapters = load(folder / "io.pt"), Adapters({folder / "MIST_HER2_lora_10.pth": 1.0})
    cond = model.condition(features=grids(golden["cond"], SIZES[name]))
    with torch.no_grad():
        out = call_network(adapters.network(model), golden["x"], golden["t"], cond)
    assert relative(out, golden["out"]) < 1e-5
    other = dict(model.model.diffusion_model.named_parameters())
    other["blocks.0.attn.qkv.weight"] = other["blocks.0.attn.qkv.weight"] * 2
    with pytest.raises(UserError, match="trained on other weights"):
        placed(adapters.loras[0][0], other)
