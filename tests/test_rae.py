"""Representation autoencoders and their transformer with a wide head: the published ones, from parts to images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from published import load, relative
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import ldm
from ldm.autoencoder.rae import RepresentationAutoencoder
from ldm.cli import app
from ldm.convert import convert, load_model, read_published
from ldm.diffusion.denoiser import call_network
from ldm.errors import UserError
from ldm.model_folder import load_first_stage
from ldm.networks.ddt import DDT

SMALL = dict(in_channels=6, out_channels=6, image_size=4, hidden_size=(16, 24), depth=(2, 1), num_heads=(2, 3))
STAGE = dict(channels=8, depth=1, num_heads=2, mlp=16, patch_size=7, registers=4, positions=3, grid=3, decoder_size=12,
             decoder_depth=1, decoder_heads=2, decoder_mlp=24, decoder_patch=4)  # fmt: skip


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def parts(folder: Path, golden: dict, old_names: bool = False) -> Path:
    """The folder that a user puts together of an autoencoder's parts; old_names: of the encoder, transformers 4's."""
    for part, config in (("encoder", "encoder_config"), ("decoder", "decoder_config")):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(golden[config]))
    state = golden["encoder_state_dict"]
    if old_names:
        names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value",
                 "o_proj": "output.dense"}  # fmt: skip
        for new, old in names.items():
            state = {name.replace(f"attention.{new}", f"attention.{old}"): value for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "encoder" / "model.safetensors")
    torch.save(golden["decoder_state_dict"], folder / "decoder" / "model.pt")
    torch.save(golden["stat"], folder / "stat.pt")
    return folder


@pytest.fixture(scope="module")
def golden(shared) -> tuple[dict, dict]:
    return tuple(load(shared("oracle") / "third" / f"rae_{name}.pt") for name in ("autoencoder", "ddt_head"))


@pytest.fixture(scope="module")
def rae(golden, tmp_path_factory) -> Path:
    """A folder with the model folders `stage` and `model`."""
    folder = tmp_path_factory.mktemp("rae")
    convert(parts(folder / "parts", golden[0]), folder / "stage", licence="MIT", say=lambda line: None)
    torch.save({"ema": golden[1]["state_dict"]}, folder / "stage2_model.pt")
    convert(folder / "stage2_model.pt", folder / "model", base=folder / "stage", say=lambda line: None)
    return folder


def test_the_autoencoder_is_the_published_one(rae, golden):
    want, stage = golden[0], load_first_stage(str(rae / "stage"))
    assert (stage.channels, stage.downsampling, stage.image_size) == (24, 4, 24)
    stage.image_size = want["image"].shape[-1]  # theirs encodes images of any size, and decodes them at its own
    with torch.no_grad():
        z = stage.latent(2 * want["image"] - 1)
        assert relative(z, want["z"]) < 1e-5
        assert relative((stage.decode(z) + 1) / 2, want["rec"]) < 1e-5
        assert relative((stage.decode(want["z_random"]) + 1) / 2, want["rec_random"]) < 1e-5


def test_every_tensor_of_the_parts_is_accounted_for(rae, golden, tmp_path):
    held = {**golden[0]["encoder_state_dict"], **golden[0]["decoder_state_dict"]}
    for old_names in (False, True):
        found = read_published(parts(tmp_path / str(old_names), golden[0], old_names))
        assert set(found.unused) == {"embeddings.mask_token", "layernorm.weight", "layernorm.bias"}
        joined = 4 * 4  # of six tensors of queries, keys and values in four blocks two are made
        assert len(found.state) - 2 + len(found.unused) == len(held) - joined
        again = load_first_stage(str(rae / "stage")).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in found.state.items())


def test_the_network_is_the_published_one(rae, golden):
    model, want = load_model(rae / "model"), golden[1]
    cond = {"vector": want["state_dict"]["y_embedder.embedding_table.weight"][want["y"]]}
    with torch.no_grad():
        assert relative(call_network(model.model, want["x"], 1000 * want["t"], cond), want["out"]) < 1e-5
    null = want["state_dict"]["y_embedder.embedding_table.weight"][-1]
    torch.testing.assert_close(model.null_condition()["vector"][0], null)
    assert model.metadata["licence"] == "MIT"
    assert model.tile_size == 24


def test_samples_are_the_published_ones(rae, golden):
    """In double precision: at t = 1 there is nothing but noise, sigma is infinite, and 1e9 stands for it."""
    model, want = load_model(rae / "model").double(), golden[1]["sampling"]
    t = want["t_grid"].double()
    sigmas = (t / (1 - t)).clamp(max=1e9)
    cond = model.condition(class_=[str(int(label)) for label in want["y"]])
    interval = tuple(want[name] / (1 - want[name]) for name in ("t_min", "t_max"))
    settings = ldm.Sampler(guidance_scale=want["cfg_scale"], guidance_interval=interval, solver="euler")
    solver = settings.settled(model, "sample").guided(model, cond)
    with torch.no_grad():
        x = want["x_T"].double() * (1 + sigmas[0])
        x = solver.solve(x, sigmas, cond, lambda step: None, lambda i, x, x0: None)
    assert relative(x / (1 + sigmas[-1]), want["out"]) < 1e-4  # theirs stops above t = 0


def test_its_times_are_shifted_as_published(rae, golden):
    want, shift = golden[1]["sampling"], golden[1]["sampling"]["time_dist_shift"]
    even = torch.linspace(1, 0.001, want["num_steps"], dtype=torch.float64)
    sigmas = shift * even / (1 - even)  # what `time_shift` does
    torch.testing.assert_close(sigmas[1:] / (1 + sigmas[1:]), want["t_grid"][1:].double(), rtol=1e-5, atol=1e-7)
    train = golden[1]["train"]
    times = 0.999 * train["u"]
    shifted = shift * times / (1 - times)
    torch.testing.assert_close(shifted / (1 + shifted), train["t"], rtol=1e-5, atol=1e-6)
    model = load_model(rae / "model")
    assert model.time_shift == pytest.approx((24 * 36 / 4096) ** 0.5)
    high = ldm.Sampler(steps=4).settled(model, "sample").sigmas(model)[0]
    assert float(high) == pytest.approx(160 * model.time_shift)
    drawn = model.training_sigmas(20000, torch.Generator().manual_seed(0)).log().mean().exp()
    assert float(drawn) == pytest.approx(model.time_shift, rel=0.05)


def test_the_loss_is_the_published_one(rae, golden):
    want = golden[1]["train"]
    model = load_model(rae / "model")
    x = (1 - want["t"].view(-1, 1, 1, 1)) * want["x1"] + want["t"].view(-1, 1, 1, 1) * want["x0"]
    cond = {"vector": golden[1]["state_dict"]["y_embedder.embedding_table.weight"][golden[1]["y"]]}
    with torch.no_grad():
        out = call_network(model.model, x, 1000 * want["t"], cond)
    assert relative(out, want["pred"]) < 1e-5
    loss = (out - (want["x0"] - want["x1"])).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, want["loss"], rtol=1e-5, atol=0)


def test_the_commands_take_it_from_its_parts_to_images(golden, tmp_path):
    source = parts(tmp_path / "parts", golden[0])
    said = run("convert", source, "--out", tmp_path / "stage")
    assert "1 left: stood for hidden patches" in said
    assert "2 left: of the last normalisation" in said
    torch.save(golden[1]["state_dict"], tmp_path / "stage2_model.pt")
    said = run("convert", tmp_path / "stage2_model.pt", "--base", tmp_path / "stage", "--out", tmp_path / "model")
    assert "noise levels are shifted by 0.4593" in said
    options = ("--model", tmp_path / "model", "--steps", 2, "--device", "cpu")
    run("sample", *options, "--condition", "class=3", "--count", 2, "--out", tmp_path / "tiles")
    tiles = sorted((tmp_path / "tiles").glob("0*.png"))
    assert [Image.open(tile).size for tile in tiles] == [(24, 24)] * 2
    (tmp_path / "in").mkdir()
    tiles[0].rename(tmp_path / "in" / "a.png")
    run("translate", *options, "--images", tmp_path / "in", "--source", "class=3", "--target", "class=7", "--out",
        tmp_path / "translated")  # fmt: skip
    assert Image.open(tmp_path / "translated" / "a__7.png").size == (24, 24)


def test_what_does_not_fit_is_told(rae, golden, tmp_path):
    source = parts(tmp_path / "parts", golden[0])
    config = source / "encoder" / "config.json"
    told = json.loads(config.read_text())
    for change, message in (
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn is True"), ({"model_type": "dinov2"}, "model_type is 'dinov2'"),
    ):  # fmt: skip
        config.write_text(json.dumps(told | change))
        with pytest.raises(UserError, match=message):
            read_published(source)
    config.write_text(json.dumps(told))
    torch.save({**golden[0]["decoder_state_dict"], "more.weight": torch.ones(1)}, source / "decoder" / "model.pt")
    with pytest.raises(UserError, match=r"holds more\.weight, which a representation autoencoder does not have"):
        read_published(source)
    checkpoint = rae / "stage2_model.pt"
    with pytest.raises(UserError, match="has no autoencoder; name the model folder"):
        read_published(checkpoint)
    with pytest.raises(UserError, match="is no representation autoencoder"):
        read_published(checkpoint, base=rae / "model")
    state = golden[1]["state_dict"]
    torch.save(state | {"pos_embed": state["pos_embed"].roll(16, 2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="positions"):
        convert(tmp_path / "other.pt", tmp_path / "out", base=rae / "stage", say=lambda line: None)
    torch.save(state | {"blocks.0.attn.q_norm.weight": torch.ones(8)}, tmp_path / "normed.pt")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.q_norm\.weight"):
        convert(tmp_path / "normed.pt", tmp_path / "out", base=rae / "stage", say=lambda line: None)


def drawn(network: torch.nn.Module) -> torch.nn.Module:
    """The network with all its weights drawn."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def test_training_reaches_every_parameter_and_a_fresh_one_predicts_zero():
    x, time, vector = torch.randn(2, 6, 4, 4), torch.tensor([3.0, 700.0]), torch.randn(2, 16)
    assert DDT(**SMALL)(x, time, vector).abs().max() == 0
    network = drawn(DDT(**SMALL))
    network(x, time, vector).square().mean().backward()
    assert [name for name, each in network.named_parameters() if each.grad is None or not each.grad.abs().sum()] == []


def test_time_place_and_vector_count_at_any_size():
    network = drawn(DDT(**SMALL))
    x, vector = torch.randn(1, 6, 4, 8), torch.randn(1, 16)

    def out(x: Tensor, time: float, vector: Tensor | None) -> Tensor:
        with torch.no_grad():
            return network(x, torch.tensor([time]), vector)

    own = out(x, 500.0, vector)
    assert own.shape == x.shape
    for other in (out(x, 520.0, vector), out(x, 500.0, None), out(x.roll(1, 2), 500.0, vector).roll(-1, 2)):
        assert relative(other, own) > 1e-4
    torch.testing.assert_close(out(x.repeat(2, 1, 1, 1), 500.0, vector.repeat(2, 1)), own.repeat(2, 1, 1, 1))


def test_it_works_on_tiles_alone():
    stage = RepresentationAutoencoder(**STAGE).eval()
    with pytest.raises(UserError, match="works on tiles of 12 px alone; got 16 x 12"):
        stage.latent(torch.zeros(1, 3, 12, 16))
    with pytest.raises(UserError, match="decodes tiles of 3 x 3 latent pixels alone; got 4 x 3"):
        stage.decode(torch.zeros(1, 8, 3, 4))
    with pytest.raises(UserError, match="heads are equal parts of the width, multiples of 4; got 3 of 16"):
        DDT(**SMALL | {"num_heads": (3, 3)})


def test_positions_are_interpolated_from_a_table_of_another_size():
    torch.manual_seed(0)
    stage = RepresentationAutoencoder(**STAGE | {"positions": 5}).eval()
    with torch.no_grad():
        z = stage.latent(torch.rand(2, 3, 12, 12) * 2 - 1)
        assert z.shape == (2, 8, 3, 3)
        assert z.isfinite().all()
        stage.encoder.pos_embed[:, 1:] = 0.5  # everywhere the same: of any size
        even = stage.latent(torch.zeros(1, 3, 12, 12))
        torch.testing.assert_close(even, even.mean((2, 3), keepdim=True).expand_as(even), rtol=1e-4, atol=1e-4)
