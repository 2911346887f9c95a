"""Checkpoints of MIDiffusion: both networks, and a translation as published through a model folder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from published import load, relative
from torch import Tensor, nn

import ldm
from ldm import convert
from ldm.diffusion import samplers, schedules
from ldm.errors import UserError
from ldm.model_folder import load_model
from ldm.networks import lmi
from ldm.networks.ddpm_unet import DDPMUNet

ADM, DDPM = "mid_adm_unet", "mid_ddpm_model"


@pytest.fixture(scope="module")
def published(oracle):
    """name -> (path of the checkpoint, its inputs and outputs)."""
    folder = oracle / "more"
    return {name: (folder / name / "ckpt.pth", load(folder / name / "io.pt")) for name in (ADM, DDPM)}


def settings(io: dict) -> dict:
    return io["config"] if "config" in io else {"create_model_args": io["create_model_args"]}


def converted(published: tuple[Path, dict], folder: Path, **options) -> nn.Module:
    path, io = published
    (folder / "config.yml").write_text(yaml.safe_dump(settings(io)))
    convert.convert(path, folder / "model", config=folder / "config.yml", say=lambda line: None, **options)
    return load_model(folder / "model")


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", [ADM, DDPM])
@pytest.mark.slow
def test_the_networks_are_the_published_ones(published, tmp_path, name, raw):
    model, (_, io) = converted(published[name], tmp_path, raw_weights=raw), published[name]
    with torch.no_grad():
        out = model.model.diffusion_model.unet(torch.cat([io["x"], io["cond"]], 1), io["t"])
    assert relative(out, io["eps_raw" if raw else "eps_ema"]) < 1e-5


@pytest.mark.slow
def test_a_translation_is_the_published_one(published, tmp_path):
    """Published samplers add noise after the last step too. x is of the type that the model asks for: the maps see grey
    levels, and rounding of float32, which differs between processors, moves some over their edges: a level is then
    worth up to 5e-4."""
    run = published[DDPM][1]["sampling"]
    model = converted(published[DDPM], tmp_path)
    betas = schedules.make_betas("sqrt_linear", 6, 1e-4, 0.3)
    torch.testing.assert_close(betas.float(), run["betas"])
    sigmas, cond = schedules.table_sigmas(model.sigmas, 6), model.condition(image=2 * run["source"] - 1)
    states: list[Tensor] = []
    out = samplers.sample_ddpm(
        model.denoiser(), run["x_T"].to(model.sample_dtype) * (1 + sigmas[0] ** 2).sqrt(), sigmas, cond,
        lambda step: run["step_noises"][step : step + 1], variance=1.0, callback=lambda i, x, x0: states.append(x),
    )  # fmt: skip
    for state, sigma, wanted in zip(states[:-1], sigmas[1:], run["x_after"]):
        assert relative(state / (1 + sigma**2).sqrt(), wanted[None]) < 1e-3
    noisy = out + (0.5 * run["logvar"][0]).exp() * run["step_noises"][-1]
    assert relative(noisy, run["out"]) < 1e-3
    image = (model.decode(noisy).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(image.float(), run["image"], rtol=0, atol=2e-3)


def test_a_slice_is_translated_by_name(published, tmp_path):
    model = converted(published[ADM], tmp_path)
    source = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sampler = ldm.Sampler(steps=2, guidance_scale=1.0, progress=False)
    found, other = (
        ldm.sample(model, model.condition(image=image), sampler=sampler)
        for image in (source, -source)
    )
    assert found.shape == (2, 1, 16, 16)
    assert not torch.allclose(found, other)
    seen = []
    model.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    ldm.sample(model, model.condition(image=source[:1]), sampler=ldm.Sampler(steps=1, progress=False))
    assert seen == [torch.float64]
    image = torch.linspace(-1, 1, 5).view(1, 1, 1, 5)
    torch.testing.assert_close(model.encode(image), torch.linspace(0, 1, 5).view(1, 1, 1, 5))
    torch.testing.assert_close(model.decode(model.encode(image)), image)


def test_grey_levels_of_8_bit_images_survive_the_way_to_the_network():
    levels = torch.arange(256)
    for images in (levels / 127.5 - 1, 2 * (levels / 255) - 1):
        assert torch.equal((lmi._unit(images) * 255).int(), levels.int())


@pytest.mark.parametrize("name", [ADM, DDPM])
def test_every_tensor_is_accounted_for(published, name):
    path, _ = published[name]
    content = load(path)
    found = convert.read_published(path)
    convert.check(found, path)
    assert set(found.unused) == {"[1]"} | {f"[0] {key.removeprefix('module.')}" for key in content[0]}
    assert len(found.state) == len(content[4]) + 1  # and the source's null
    assert any("IXI.yml" in note for note in found.notes)
    raw = convert.read_published(path, raw_weights=True)
    assert set(raw.unused) == {"[1]"} | {f"[4] {key}" for key in content[4]}
    assert found.node["params"]["timesteps"] == 1000


def test_other_forms_of_the_file(published, tmp_path):
    """Without averages; without DataParallel's prefix; a bare state dict; two weights on images alone."""
    content = load(published[DDPM][0])
    torch.save(content[:4], tmp_path / "raw.pth")
    found = convert.read_published(tmp_path / "raw.pth")
    assert any("no averaged weights" in note for note in found.notes)
    plain = {name.removeprefix("module."): value for name, value in content[0].items()}
    torch.save([plain, *content[1:]], tmp_path / "plain.pth")
    convert.check(convert.read_published(tmp_path / "plain.pth"), tmp_path)
    torch.save(plain | {"logvar": torch.zeros(1000)}, tmp_path / "bare.pth")
    bare = convert.read_published(tmp_path / "bare.pth")
    convert.check(bare, tmp_path)
    assert bare.unused == {"logvar": "used nowhere in the published code"}
    assert bare.state.keys() == found.state.keys()


def test_the_sdedit_network_sees_the_image_alone(tmp_path):
    net = DDPMUNet(32, 1, 1, 32, [1, 2], 1, [16], dropout=0.1)
    torch.save([net.state_dict(), {}, 1, 10], tmp_path / "ckpt.pth")
    (tmp_path / "c.yml").write_text("data: {image_size: 32}\nmodel: {ch_mult: [1, 2]}\n")
    found = convert.read_published(tmp_path / "ckpt.pth", config=tmp_path / "c.yml")
    convert.check(found, tmp_path)
    params = found.node["params"]
    assert params["unet_config"]["params"]["attn_resolutions"] == [16]
    assert "cond_stage_config" not in params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"ch_mult": [1, 2, 2, 2]}}, r"ch_mult \[1, 2, 2, 2\], the weights are of \[1, 1, 1, 2\]"),
        ({"model": {"attn_resolutions": [64]}}, r"the config says attn_resolutions \[64\], the weights are of"),
        ({"model": {"resamp_with_conv": False}}, "the config says resamp_with_conv False, the weights are of True"),
        ({"modle": {"ch": 32}}, "did you mean 'model'"),
        ({"model": 3}, "section 'model' holds settings"),
        ({"data": {"rescaled": True}}, "data.rescaled is true"),
        ({"diffusion": {"beta_schedule": "jsd"}}, "'jsd' has no counterpart"),
    ],
)
def test_settings_that_cannot_be(published, tmp_path, change, message):
    path, io = published[DDPM]
    config = copy.deepcopy(io["config"])
    for section, values in change.items():
        config[section] = config.get(section, {}) | values if isinstance(values, dict) else values
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=message):
        convert.read_published(path, config=tmp_path / "c.yml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learn_sigma": True}, "the config says learn_sigma True, the weights are of False"),
        ({"class_cond": True}, "the config says class_cond True, the weights are of False"),
        ({"channel_mult": "1,2,3"}, "the config says channel_mult"),
        ({"resblock_updown": True}, "the config says resblock_updown True"),
        ({"use_scale_shift_norm": "flip"}, "the config says use_scale_shift_norm"),
    ],
)
def test_arguments_that_the_weights_contradict_are_told(published, tmp_path, change, message):
    path, io = published[ADM]
    arguments = dict(io["create_model_args"])
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"create_model_args": arguments}))
    found = convert.read_published(path, config=tmp_path / "c.yml")
    assert any("as the config says: no tensor tells" in note for note in found.notes)
    if "use_scale_shift_norm" in change:
        own = found.node["params"]["unet_config"]["params"]["unet"]["params"]
        change = {"use_scale_shift_norm": not own["use_scale_shift_norm"]}
    (tmp_path / "c.yml").write_text(yaml.safe_dump({"create_model_args": arguments | change}))
    with pytest.raises(UserError, match=message):
        convert.read_published(path, config=tmp_path / "c.yml")


def test_arguments_of_the_guided_diffusion_network(published, tmp_path):
    path, io = published[ADM]
    up = {"image_size": 16, "num_heads": 2, "num_heads_upsample": 4}
    for text, heads in ((io["create_model_args"], 2), ({"image_size": 16, "num_head_channels": 32}, None), (up, 2)):
        (tmp_path / "c.yml").write_text(yaml.safe_dump(text))
        unet = convert.read_published(path, config=tmp_path / "c.yml").node["params"]["unet_config"]["params"]["unet"]
        assert unet["params"].get("num_heads") == heads
        assert unet["params"].get("num_heads_upsample") == (4 if text is up else None)
        assert unet["params"]["image_size"] == 16
    for text, message in (
        ({"num_channels": 64}, "num_channels 64, the weights are of 32"),
        ({"num_head": 2}, "did you mean 'num_heads'"),
    ):
        (tmp_path / "c.yml").write_text(yaml.safe_dump(text))
        with pytest.raises(UserError, match=message):
            convert.read_published(path, config=tmp_path / "c.yml")


def test_checkpoints_that_do_not_fit_are_refused(published, tmp_path):
    content = load(published[DDPM][0])
    average = dict(content[4])
    average.pop("norm_out.bias")
    cases = {
        r"1 weights are not both averaged and as trained \(first: norm_out.bias\)": [*content[:4], average],
        "lack 'conv_in.weight'": [{"module.temb.dense.0.weight": torch.zeros(2, 2)}, {}, 1, 2],
        "lack its middle_block": [{"module.time_embed.0.weight": torch.zeros(2, 2)}, {}, 1, 2],
        "from 2 to 1 channels is none": [
            {**content[0], "module.conv_in.weight": content[0]["module.conv_in.weight"][:, :2]}, {}, 1, 2
        ],
    }
    for message, changed in cases.items():
        torch.save(changed, tmp_path / "ckpt.pth")
        with pytest.raises(UserError, match=message):
            convert.read_published(tmp_path / "ckpt.pth")
    surplus = [{**content[0], "module.extra": torch.zeros(1)}, {}, 1, 2]
    torch.save(surplus, tmp_path / "ckpt.pth")
    with pytest.raises(UserError, match="1 are not of this model"):
        convert.convert(tmp_path / "ckpt.pth", tmp_path / "model")
