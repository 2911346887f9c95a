"""Locale-based mutual information: against the published maps and a dense form, and the network that sees it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm
from ldm.conditioners.source_image import SourceImage
from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.model_folder import write_model_folder
from ldm.networks import lmi
from ldm.networks.lmi import LMIUNet, lmi_map

ROOT = Path(__file__).resolve().parent.parent
UNET = {
    "target": "ldm.networks.unet.UNetModel",
    "params": dict(in_channels=3, out_channels=1, model_channels=32, num_res_blocks=1, attention_resolutions=[2],
                   channel_mult=[1, 1], num_heads=1, image_size=16),
}  # fmt: skip
CASES = {
    "source_target.normalised": ("source", "target"), "source_target.plain": ("source", "target"),
    "source_noisy.normalised": ("source", "noisy"), "source_noisy.plain": ("source", "noisy"),
    "source_noise.normalised": ("source", "noise"), "source_noise.plain": ("source", "noise"),
    "self.normalised": ("source", "source"), "self.plain": ("source", "source"),
    "rgb_rgb.normalised": ("source_rgb", "target_rgb"), "gray_rgb_normal.flag_False": ("source", "target_rgb"),
}  # fmt: skip


def load_benchmark():
    spec = importlib.util.spec_from_file_location("lmi_benchmark", ROOT / "benchmarks" / "lmi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dense_lmi = load_benchmark().dense_lmi


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Published networks start with zeros in their last layers; here every weight is something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


def model_node(**params) -> dict:
    return {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "unet_config": {"target": "ldm.networks.lmi.LMIUNet", "params": {"unet": UNET}},
            "first_stage_config": {
                "target": "ldm.autoencoder.autoencoder.IdentityFirstStage",
                "params": {"channels": 1},
            },
            "cond_stage_config": {
                "target": "ldm.conditioners.source_image.SourceImage",
                "params": {"size": 16},
            },
            "use_ema": False,
            **params,
        },
    }


@pytest.fixture(scope="module")
def published(oracle):
    return torch.load(oracle / "more" / "mid_lmi.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_maps_are_the_published_ones(published, name):
    source, target = (published[image] for image in CASES[name])
    wanted = published["cases"][name]["map"]
    found = lmi_map(source, target, normalized="plain" not in name)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_maps_on_the_way_of_a_published_sampler(oracle):
    sampling = torch.load(oracle / "more" / "mid_ddpm_model" / "io.pt", weights_only=True)["sampling"]
    source, conditions = sampling["source"], sampling["conditions"]
    for step, x in enumerate([sampling["x_T"], *sampling["x_after"][:2, None]]):
        found = torch.cat([lmi_map(source, x), lmi_map(source, source)], 1)[0]
        far = (found - conditions[step]).abs() > 1e-4 * conditions[step].abs().max()
        assert far.float().mean() < 1e-3  # a value that rounding moves over a grey level's edge moves its pixel's map


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 1, 9, 14), {}),
        ((1, 1, 1, 5), {"normalized": False}),
        ((1, 1, 5, 6), {"patch": 5, "bins": 125}),
        ((2, 1, 12, 12), {"sigma": 1.5, "bins": 31}),
        ((1, 1, 4, 4), {"sigma": 0.4, "bins": 256}),
    ],
)
@pytest.mark.parametrize("spread", [0.05, 0.4, 6.0])
@pytest.mark.slow
def test_maps_equal_the_dense_form(shape, settings, spread):
    rng = torch.Generator().manual_seed(1)
    source = (0.5 + 0.1 * torch.randn(shape, generator=rng)) * (torch.rand(shape, generator=rng) > 0.3)
    target = 0.4 + spread * torch.randn(shape, generator=rng)
    wanted = dense_lmi(source, target, **settings)
    assert (lmi_map(source, target, **settings) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=0.1)


def test_a_map_does_not_depend_on_the_others_of_its_batch_nor_on_the_memory_given(monkeypatch):
    images = torch.rand(3, 1, 10, 10, generator=torch.Generator().manual_seed(4))
    together = lmi_map(images, images.flip(0))
    monkeypatch.setitem(lmi.ELEMENTS, "cpu", 1)
    alone = torch.cat([lmi_map(images[i : i + 1], images.flip(0)[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_maps_under_autocast_are_of_full_precision():
    images = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lmi_map(images, images.flip(0))
    assert torch.equal(found, lmi_map(images, images.flip(0)))


@pytest.mark.parametrize("settings", [{"patch": 4}, {"patch": 1}, {"bins": 1}, {"sigma": 0.0}])
def test_settings_that_make_no_map_are_refused(settings):
    with pytest.raises(UserError, match="an LMI map"):
        lmi_map(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4), **settings)


def test_the_network_sees_the_source_through_its_maps_alone():
    network = randomized(LMIUNet(UNET)).eval()
    x, source = torch.randn(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(6)).clamp(-1, 1)
    times = torch.tensor([3.0, 700.0])
    seen = torch.cat([x, lmi_map((source + 1) / 2, (x + 1) / 2), lmi_map((source + 1) / 2, (source + 1) / 2)], 1)
    torch.testing.assert_close(network(torch.cat([x, source], 1), times), network.unet(seen, times))
    with pytest.raises(UserError, match="takes 1 channels of the image and 1 of its source; got 3"):
        network(torch.cat([x, source, source], 1), times)


def test_the_map_of_the_source_is_kept_between_steps_and_never_stale(monkeypatch):
    network, calls = LMIUNet(UNET).eval(), []
    monkeypatch.setattr(lmi, "lmi_map", lambda s, t, **settings: calls.append(1) or lmi_map(s, t, **settings))
    source = torch.rand(1, 1, 16, 16) * 2 - 1
    first = network.map_of_itself(source)
    assert network.map_of_itself(source.clone()) is first
    source[0, 0, 3, 3] -= 0.5
    assert not torch.equal(network.map_of_itself(source), first)
    assert len(calls) == 2


def test_every_weight_of_the_network_is_trained():
    model = randomized(instantiate_from_config(model_node()))
    batch = {"image": torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1}
    model.loss(batch, torch.Generator().manual_seed(0)).mean().backward()
    lacking = [name for name, p in model.model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not lacking
    assert all(name.startswith("diffusion_model.unet.") for name, _ in model.model.named_parameters())


def test_a_model_folder_translates_from_an_image_given_in_python(tmp_path):
    model = randomized(instantiate_from_config(model_node())).eval()
    write_model_folder(tmp_path / "model", model_node(), model.state_dict(), {})
    loaded = ldm.load_model(tmp_path / "model", device="cpu")
    images = np.random.default_rng(0).uniform(-1, 1, (2, 1, 16, 16)).astype(np.float32)
    cond = loaded.condition(image=images)
    assert torch.equal(cond["concat"], torch.from_numpy(images))
    found, other = (
        ldm.sample(loaded, given, sampler=ldm.Sampler(steps=2, guidance_scale=1.0, progress=False))
        for given in (cond, loaded.condition(image=-images))
    )
    assert found.shape == (2, 1, 16, 16)
    assert not torch.allclose(found, other)
    assert torch.equal(found, ldm.sample(model, cond, sampler=ldm.Sampler(steps=2, guidance_scale=1.0, progress=False)))


def test_a_dropped_source_is_a_flat_image():
    conditioner = SourceImage(size=4, dropout=0.5, key="source")
    images = torch.rand(2, 1, 4, 4) * 2 - 1
    found = conditioner({"source": images}, torch.tensor([True, False]))["concat"]
    assert torch.equal(found[:1], conditioner.null()["concat"])
    assert torch.equal(found[1], images[1])
    assert lmi_map((found[:1] + 1) / 2, torch.rand(1, 1, 4, 4))[..., 1:-1, 1:-1].abs().max() < 1e-3


def test_what_is_no_source_image_is_refused():
    conditioner = SourceImage(size=4)
    assert conditioner.read({"image": [np.zeros((1, 4, 4), np.float32)] * 3})["image"].shape == (3, 1, 4, 4)
    assert conditioner.read({"image": torch.zeros(1, 4, 4)})["image"].shape == (1, 1, 4, 4)
    with pytest.raises(UserError, match="got whole numbers"):
        conditioner.read({"image": np.zeros((1, 4, 4), np.uint8)})
    with pytest.raises(UserError, match=r"values in \[-1, 1\]; got 0 to 9"):
        conditioner.read({"image": torch.arange(10.0).view(1, 1, 2, 5)})
    with pytest.raises(UserError, match="got nan"):
        conditioner.read({"image": torch.full((1, 4, 4), torch.nan)})
    with pytest.raises(UserError, match="a source image is needed; none is given"):
        conditioner.read({"image": torch.zeros(0, 1, 4, 4)})
    with pytest.raises(UserError, match=r"have the shape \(1, 4, 4\); got \(3, 4, 4\)"):
        conditioner({"image": torch.zeros(1, 3, 4, 4)})
    with pytest.raises(UserError, match="cannot be given on a command line"):
        conditioner.parse("image", "slice.png")
