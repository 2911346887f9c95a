"""A ControlNet of the transformer: PixCell's is the published one, and an image leads whatever is made."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import load, relative
from safetensors.torch import load_file, save_file
from test_conditioners import model_node, module
from typer.testing import CliRunner

import ldm
from ldm.cli import app
from ldm.config import instantiate_from_config
from ldm.convert import convert, load_model, read_published
from ldm.diffusion.denoiser import call_network
from ldm.diffusion.guidance import cfg, compose
from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.model_folder import write_model_folder
from ldm.networks.control import ControlledDiT, controlled
from ldm.sampling.adapters import Adapters

SIDE, DIM = 16, 12
NODE = model_node(
    module(
        "compose.ConditionerSet",
        conditioners={
            "ssl": module("raw.FeatureTokens", embed_dim=DIM, grid=2),
            "control": module("source_image.ControlImage", size=SIDE),
        },
    )
)
NODE["params"]["unet_config"] = {
    "target": "ldm.networks.control.ControlledDiT",
    "params": dict(in_channels=3, out_channels=3, image_size=SIDE, patch_size=4, hidden_size=16, depth=3, num_heads=2,
                   modulation="shared", context_dim=DIM, context_tokens=4, control_depth=2),
}  # fmt: skip


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def tiny() -> LatentDiffusion:
    """A model on pixels whose weights are all drawn: tiles of 16 px, 2 x 2 features of 12 values."""
    torch.manual_seed(0)
    model = instantiate_from_config(NODE)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval().requires_grad_(False)


def image(seed: int, *size: int) -> torch.Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def third(shared) -> Path:
    return shared("oracle") / "third"


@pytest.fixture(scope="module")
def pixcell(third, tmp_path_factory):
    """Folder of the model, folder of it with its ControlNet, and what was said of the conversion."""
    folder, lines = tmp_path_factory.mktemp("control"), []
    convert(third / "pixcell_1024", folder / "base", base=third / "sd3_vae", licence="MIT", mpp=0.5, say=lines.append)
    convert(third / "pixcell_1024" / "controlnet", folder / "led", base=folder / "base", say=lines.append)
    return folder / "base", folder / "led", lines


def test_pixcells_is_the_published_one(third, pixcell):
    base, led = (load_model(folder) for folder in pixcell[:2])
    golden = load(third / "pixcell_1024" / "controlnet" / "io.pt")
    features = golden["cond"].mT.unflatten(2, (4, 4))
    cond, x, time = led.condition(features=features), golden["x"], golden["t"]
    seen = {**cond, "control/concat": golden["conditioning"]}
    with torch.no_grad():
        added = led.model.diffusion_model.control(x, golden["conditioning"], time, context=golden["cond"])
        for own, want in zip(added, golden["controlnet_block_samples"], strict=True):
            assert relative(own, want) < 1e-5
        assert relative(call_network(led.model, x, time, seen), golden["out"]) < 1e-5
        scaled = controlled(led.model, golden["conditioning_scale"])
        assert relative(call_network(scaled, x, time, seen), golden["out_scale"]) < 1e-5
        plain = call_network(base.model, x, time, base.condition(features=features))
        assert torch.equal(call_network(led.model, x, time, cond), plain)


def test_an_adapter_of_the_model_goes_along(third, pixcell):
    base, led = (load_model(folder) for folder in pixcell[:2])
    golden = load(third / "pixcell_1024" / "controlnet" / "io.pt")
    adapters = Adapters({third / "pixcell_1024" / "lora" / "MIST_HER2_lora_10.pth": 1.0})
    cond = led.condition(features=golden["cond"].mT.unflatten(2, (4, 4)))
    seen = {**cond, "control/concat": golden["conditioning"]}
    sampler = ldm.Sampler(lora=adapters, control_scale=0.0)
    with torch.no_grad():
        adapted = call_network(adapters.network(base), golden["x"], golden["t"], cond)
        torch.testing.assert_close(call_network(sampler.network(led), golden["x"], golden["t"], seen), adapted)
        both = call_network(replace(sampler, control_scale=1.0).network(led), golden["x"], golden["t"], seen)
        assert relative(both, adapted) > 0.01
        assert relative(both, golden["out"]) > 0.01


def test_every_tensor_of_the_conversion_is_accounted_for(third, pixcell):
    folder = third / "pixcell_1024" / "controlnet"
    base, led, lines = pixcell
    found = read_published(folder, base=base)
    held = load_file(folder / "diffusion_pytorch_model.safetensors")
    taken = [name for name in found.state if ".control." in name]
    joined = 2 * 6  # of the ten tensors of queries, keys and values of a block four are made
    assert len(taken) + len(found.unused) == len(held) - joined
    assert set(found.unused) == {
        "final_layer.linear.weight", "final_layer.linear.bias", "final_layer.scale_shift_table",
        "y_embedder.y_embedding",
    }  # fmt: skip
    assert any(line.startswith("1 left: a ControlNet: convert it by itself") for line in lines)
    assert {name: load_model(led).metadata[name] for name in ("licence", "mpp", "base")} == {
        "licence": "MIT", "mpp": 0.5, "base": "pixcell_1024"
    }  # fmt: skip
    said = run("describe", led)
    assert "ControlledDiT of" in said
    assert "control (size 256, channels 3)" in said
    assert "guidance scales by name: ssl\n" in said  # an image that leads has no unconditional value


def test_what_it_does_not_go_with_is_told(third, pixcell, tmp_path):
    folder = tmp_path / "controlnet"
    shutil.copytree(third / "pixcell_1024" / "controlnet", folder)
    base, led, _ = pixcell
    with pytest.raises(UserError, match="is a ControlNet; name the model that it leads by --base"):
        read_published(folder)
    with pytest.raises(UserError, match=r"is a ControlNet, and the base .* no model folder"):
        read_published(folder, base=third / "pixcell_1024")
    with pytest.raises(UserError, match="has a ControlNet already"):
        read_published(folder, base=led)
    convert(third / "pixcell_256", tmp_path / "other", base=third / "sd3_vae", say=lambda line: None)
    with pytest.raises(UserError, match="it was made for another model"):
        read_published(folder, base=tmp_path / "other")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"n_controlnet_blocks": 3}))
    with pytest.raises(UserError, match="its config says depth 3, its weights are of 2"):
        read_published(folder, base=base)
    (folder / "config.json").write_text(json.dumps(told))
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"controlnet_blocks.7.bias": torch.ones(1)}, weights)
    with pytest.raises(UserError, match=r"zero_layers\.7\.bias"):
        convert(folder, tmp_path / "out", base=base, say=lambda line: None)


def test_training_reaches_every_parameter(tiny):
    network = ControlledDiT(**NODE["params"]["unet_config"]["params"])
    network.load_state_dict(tiny.model.diffusion_model.state_dict())
    out = network(torch.randn(2, 6, SIDE, SIDE), torch.tensor([3.0, 700.0]), torch.randn(2, 4, DIM))
    out.square().mean().backward()
    assert [name for name, each in network.named_parameters() if each.grad is None or not each.grad.abs().sum()] == []


def test_a_fresh_one_changes_nothing():
    network = ControlledDiT(**NODE["params"]["unet_config"]["params"])
    torch.nn.init.normal_(network.final_layer.linear.weight)
    x, time, context = torch.randn(2, 6, SIDE, SIDE), torch.tensor([500.0]), torch.randn(2, 4, DIM)
    with torch.no_grad():
        assert torch.equal(network(x, time, context), network(x[:, :3], time, context))


def test_the_image_leads_by_its_scale_and_none_is_the_model_alone(tiny):
    features = torch.randn(2, DIM, 2, 2)
    made = {}
    for scale, shown in ((1.0, True), (0.5, True), (0.0, True), (1.0, False)):
        cond = tiny.condition(features=features, **({"control": image(1, SIDE, SIDE)} if shown else {}))
        sampler = ldm.Sampler(steps=3, control_scale=scale, progress=False)
        made[scale, shown] = ldm.sample(tiny, cond, sampler=sampler)
    torch.testing.assert_close(made[0.0, True], made[1.0, False], rtol=0, atol=1e-5)
    assert relative(made[1.0, True], made[1.0, False]) > 0.01
    assert relative(made[0.5, True], made[1.0, True]) > 0.01
    assert sampler.record(tiny, "sample").get("control_scale") is None
    assert ldm.Sampler(control_scale=0.5).record(tiny, "sample")["control_scale"] == 0.5


def test_guidance_follows_the_image_on_both_sides(tiny):
    cond = tiny.condition(features=torch.randn(2, DIM, 2, 2), control=image(2, SIDE, SIDE))
    assert set(tiny.null_condition()) == {"ssl/crossattn"}
    assert ldm.Sampler().settled(tiny, "sample").guidance_scale == 2.0
    denoiser, x, sigma = tiny.denoiser(), torch.randn(2, 3, SIDE, SIDE), torch.full((2,), 3.0)
    null = {**cond, "ssl/crossattn": tiny.null_condition()["ssl/crossattn"].expand(2, -1, -1)}
    want = denoiser(x, sigma, null) + 3 * (denoiser(x, sigma, cond) - denoiser(x, sigma, null))
    for guide in (cfg(denoiser, tiny.null_condition(), 3.0), compose(denoiser, tiny.null_condition(), [({}, 3.0)])):
        got = guide(x, sigma, cond)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)  # one batch of four, or two of two


def test_a_canvas_is_led_window_by_window(tiny):
    grid, sampler = torch.randn(2, 4, DIM), ldm.Sampler(steps=2, progress=False)
    windows = ldm.Windows(mode="overlap", stride=SIDE)  # which do not touch
    layout = image(3, SIDE, 2 * SIDE)
    other = layout.clone()
    other[..., SIDE:] = image(4, SIDE, SIDE)
    one, two = (ldm.large_image(tiny, grid, None, sampler, windows, {"control": each}) for each in (layout, other))
    assert one.shape == (1, 3, SIDE, 2 * SIDE)
    assert torch.equal(one[..., :SIDE], two[..., :SIDE])
    assert relative(two[..., SIDE:], one[..., SIDE:]) > 0.01
    with pytest.raises(UserError, match=r"as large as the canvas, \(3, 16, 32\); got \(1, 3, 16, 16\)"):
        ldm.large_image(tiny, grid, None, sampler, windows, {"control": image(3, SIDE, SIDE)})


def test_images_that_are_translated_lead(tiny):
    sampler = ldm.Sampler(steps=2, progress=False)
    layouts = torch.stack([image(5, SIDE, SIDE), image(6, SIDE, SIDE)])
    cond = tiny.condition(features=torch.randn(2, DIM, 2, 2))
    made = ldm.translate(tiny, layouts, cond, cond, sampler, first=[7, 7])
    assert relative(made[1], made[0]) > 0.01
    led = tiny.condition(features=torch.zeros(1, DIM, 2, 2), control=layouts[:1])
    twice = [ldm.translate(tiny, images[None], led, led, sampler) for images in layouts]  # the condition has its own
    assert torch.equal(*twice)
    assert ldm.translate(tiny, image(8, 24, 40)[None], sampler=sampler).shape == (1, 3, 24, 40)


def test_the_commands_are_led_by_images(tiny, tmp_path):
    folder = write_model_folder(tmp_path / "model", NODE, tiny.state_dict(), {"mpp": 0.5})
    generator = np.random.default_rng(0)
    np.save(tmp_path / "grid.npy", generator.normal(size=(2, 4, DIM)).astype("f4"))
    (tmp_path / "layouts").mkdir()
    for name, size in (("a", (SIDE, SIDE)), ("b", (SIDE, SIDE)), ("wide", (SIDE, 2 * SIDE))):
        where = tmp_path / ("layouts" if name != "wide" else ".") / f"{name}.png"
        Image.fromarray(generator.integers(0, 2, size, np.uint8) * 255).save(where)  # gray
    options = ("--model", folder, "--steps", 2, "--device", "cpu", "--features", tmp_path / "grid.npy")
    control = f"control={tmp_path / 'layouts' / 'a.png'}"
    made = {}
    for name, more in (("1", ()), ("0.5", ("--control-scale", 0.5)), ("none", None)):
        led = () if more is None else ("--condition", control, *more)
        run("sample", *options, *led, "--out", tmp_path / name)
        made[name] = [np.array(Image.open(tmp_path / name / f"0000{i}.png")).astype(int) for i in range(2)]
    assert all(abs(made[a][0] - made[b][0]).max() > 2 for a, b in (("1", "0.5"), ("1", "none"), ("0.5", "none")))
    said = Image.open(tmp_path / "0.5" / "00000.png").text
    assert "control=sha256:" in str(said)
    assert "control_scale" in str(said)
    shutil.copy(tmp_path / "layouts" / "b.png", tmp_path / "layouts" / "a.png")
    other = ("sample", *options, "--condition", control, "--out", tmp_path / "1")  # another image of the same name
    assert CliRunner().invoke(app, list(map(str, other))).exit_code
    wide = ("--condition", f"control={tmp_path / 'wide.png'}")
    run("large-image", *options, *wide, "--out", tmp_path / "large.png")
    assert Image.open(tmp_path / "large.png").size == (2 * SIDE, SIDE)
    run("translate", *options, "--images", tmp_path / "layouts", "--out", tmp_path / "translated")
    assert len(list((tmp_path / "translated").glob("*.png"))) == 2


def test_what_does_not_go_together_is_told(tiny, tmp_path):
    with pytest.raises(UserError, match=r"are \(N, 3, 16, 16\), as its tiles; got \(1, 3, 24, 24\)"):
        tiny.condition(control=image(0, 24, 24))
    with pytest.raises(UserError, match=r"values in \[-1, 1\]; got 0 to 200"):
        tiny.condition(control=torch.linspace(0, 200, 3 * SIDE**2).reshape(3, SIDE, SIDE))
    for scale in (0.0, 0.5):
        with pytest.raises(UserError, match="is of an image that leads, and none is given"):
            ldm.sample(tiny, count=1, sampler=ldm.Sampler(steps=1, control_scale=scale, progress=False))
    params = NODE["params"]["unet_config"]["params"]
    for change, message in (
        ({"control_depth": 4}, "control_depth is 1 to the network's depth, 3; got 4"),
        ({"context": "sequence"}, "adds to the tokens of an image alone"),
    ):
        with pytest.raises(UserError, match=message):
            ControlledDiT(**params | change)
    plain = {key: value for key, value in params.items() if key != "control_depth"}
    node = {**NODE, "params": {**NODE["params"], "unet_config": {"target": "ldm.networks.dit.DiT", "params": plain}}}
    with pytest.raises(UserError, match="goes with a network that has a ControlNet"):
        instantiate_from_config(node)
    node["params"]["cond_stage_config"] = module("raw.FeatureTokens", embed_dim=DIM, grid=2)
    other = instantiate_from_config(node).eval()
    with pytest.raises(UserError, match="the model has no ControlNet; leave the control scale out"):
        ldm.sample(other, count=1, sampler=ldm.Sampler(steps=1, control_scale=0.5))
    with pytest.raises(UserError, match="they must be of one kind"):
        ldm.sample(tiny, count=1, sampler=ldm.Sampler(steps=1, guide=other))
