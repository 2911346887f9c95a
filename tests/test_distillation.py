"""Distillation: teachers of every kind, what a student learns, how it is kept and sampled, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tiny_cohort import FIRST_STAGE, make_cohort
from typer.testing import CliRunner

import ldm
from ldm.cli import app
from ldm.config import instantiate_from_config
from ldm.distillation.student import Distillation
from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.model_folder import export, load_model, write_model_folder
from ldm.networks.dit import DiT
from ldm.networks.student import StudentNetwork
from ldm.networks.unet import UNetModel
from ldm.rng import canvas_noise
from ldm.sampling.sweeps import sweep_images
from ldm.training.command import main

UNET = {
    "image_size": 8, "model_channels": 16, "num_res_blocks": 1, "channel_mult": [1, 2], "attention_resolutions": [2],
    "num_heads": 2, "norm_groups": 4, "use_spatial_transformer": True, "context_dim": 8,
}  # fmt: skip
DIT = {"image_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "context_dim": 8}
NETWORKS = {"unet": (UNetModel, UNET), "dit": (DiT, DIT)}
SSL = {"target": "ldm.conditioners.ssl.PatchEmbedder", "params": {"embed_dim": 6, "context_dim": 8, "key": "ssl"}}
PIXELS = {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage", "params": {}}


def kind(width: int) -> dict:
    return {
        "target": "ldm.conditioners.class_token.ClassEmbedder",
        "params": {"classes": ["A", "B"], "dim": width, "acts": "vector"},
    }


def teacher(
    folder: Path, network: str = "unet", pixels: bool = False, conditioner: dict | None = SSL, **params
) -> Path:
    """The folder of a teacher that learnt nothing, with weights that are nowhere 0."""
    made, own = NETWORKS[network]
    channels = 3 if pixels else 4
    outputs = channels * (1 + params.get("learn_sigma", False))
    net = {**own, "in_channels": channels, "out_channels": outputs}
    if conditioner is None:
        net.pop("context_dim")
        net.pop("use_spatial_transformer", None)
    node = {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "unet_config": {"target": f"{made.__module__}.{made.__name__}", "params": net},
            "first_stage_config": PIXELS if pixels else FIRST_STAGE,
            "cond_stage_config": conditioner, "use_ema": False, **params,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    model = instantiate_from_config(node)
    for weight in model.parameters():
        weight.data.add_(0.02 * torch.randn_like(weight))
    return write_model_folder(folder, node, model.state_dict(), {"mpp": 0.5, "tile_size": model.tile_size})


def batch(model: LatentDiffusion, latents: bool = True, count: int = 4) -> dict:
    rng = torch.Generator().manual_seed(1)
    given = {"ssl": torch.randn(count, 6, generator=rng), "class": torch.arange(count) % 2}
    shown = {"latent": torch.randn(count, *model.latent_shape, generator=rng).clamp(-1, 1)} if latents else {}
    return shown | {key: given[key] for key in (model.cond_stage_model.keys if model.cond_stage_model else ())}


@pytest.mark.parametrize("policy", ["mixture", "grid"])
@pytest.mark.parametrize("parameterization", ["eps", "v", "x0", "edm", "flow"])
def test_a_student_begins_as_its_teacher_whatever_that_predicts(parameterization, policy, tmp_path):
    folder = teacher(tmp_path / "teacher", parameterization=parameterization)
    student = Distillation(str(folder), policy=policy, components=3, spread=0.0).eval()
    given = student.condition_of(batch(student))
    x, start, end = torch.randn(4, 4, 8, 8), torch.full((4,), 3.0), torch.full((4,), 1.0)
    wanted = load_model(folder).denoiser()(x, start, given)
    told = student.student.told(given, torch.full((4, 1), 2.0))
    policy = student.policies()(x, start, end, told)
    assert torch.allclose(policy(x, start, told), wanted, atol=2e-5)


@pytest.mark.parametrize("method", ["policy", "consistency", "guidance"])
@pytest.mark.parametrize(
    ("network", "pixels", "more"),
    [
        ("unet", False, {"parameterization": "eps"}),
        ("unet", True, {"parameterization": "v", "beta_schedule": "cosine"}),
        ("dit", False, {"parameterization": "flow"}),
        ("dit", True, {"parameterization": "edm"}),
        ("unet", False, {"parameterization": "eps", "learn_sigma": True}),
    ],
)
def test_every_weight_of_a_student_learns(method, network, pixels, more, tmp_path):
    folder = teacher(tmp_path / "teacher", network, pixels, **more)
    student = Distillation(str(folder), method=method, components=3, substeps=16)
    for weight in student.model.parameters():  # the last layer of what it is told begins at 0
        weight.data.add_(0.02 * torch.randn_like(weight))
    losses = student.loss(batch(student), torch.Generator().manual_seed(2))
    assert losses.shape == (4,)
    assert torch.isfinite(losses).all()
    losses.mean().backward()
    lost = [name for name, weight in student.model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert all("cross_attn.q_linear" in name for name in lost)  # a single token of context has weight 1 whatever asks
    assert all(weight.grad is None for weight in student.cond_stage_model.parameters())
    assert all(weight.grad is None for weight in student.leader.parameters())


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_students_predictions_are_affine_in_each_guidance_scale(network):
    made, params = NETWORKS[network]
    node = {"target": f"{made.__module__}.{made.__name__}", "params": {**params, "in_channels": 4, "out_channels": 4}}
    student = StudentNetwork(node, channels=4, copies=2, extra=3, settings=3, directions=[2.0, 3.0]).eval()
    for weight in student.network.parameters():  # the last layer of what it is told stays 0, as it begins
        weight.data.add_(0.1 * torch.randn_like(weight))
    x, context = torch.randn(1, 4, 8, 8).expand(3, -1, -1, -1), torch.randn(1, 1, 8).expand(3, -1, -1)
    for which in (0, 1):
        told = torch.ones(3, 3)
        told[:, which] = torch.tensor([1.0, 2.5, 4.0]).log()
        low, between, high = student(x, torch.full((3,), 500.0), settings=told, context=context)
        assert torch.allclose(between[:8], (low + high)[:8] / 2, atol=1e-5)
        assert (high - low)[:8].abs().max() > 1e-3
        assert torch.allclose((high - low)[:4], (high - low)[4:8], atol=1e-5)  # all copies go one way
        assert torch.allclose(low[8:], high[8:], atol=1e-6)  # widths and weights of a mixture stay


def test_without_data_a_student_learns_on_its_own_way_and_another_method_says_why_not(tmp_path):
    folder = teacher(tmp_path / "teacher")
    student = Distillation(str(folder), components=2)
    losses = student.loss(batch(student, latents=False), torch.Generator().manual_seed(2))
    losses.mean().backward()
    assert losses.shape == (4,)
    assert torch.isfinite(losses).all()
    other = Distillation(str(folder), method="guidance")
    with pytest.raises(UserError, match="is trained on latents or images; the data give none"):
        other.loss(batch(other, latents=False), torch.Generator())


def test_several_conditions_have_a_scale_each(tmp_path):
    members = {"ssl": SSL, "class": kind(64)}
    both = {"target": "ldm.conditioners.compose.ConditionerSet", "params": {"conditioners": members}}
    folder = teacher(tmp_path / "teacher", conditioner=both)
    student = Distillation(str(folder), components=2).eval()
    student.metadata = {}
    assert list(student.student.conditions) == ["ssl", "class"]
    cond = student.condition(features=torch.ones(1, 6), class_="A")
    plain = ldm.Sampler(steps=2, progress=False)
    made = {
        scales: ldm.sample(student, cond, sampler=ldm.Sampler(steps=2, guidance_scale=dict(scales), progress=False))
        for scales in ((("ssl", 2.0), ("class", 2.0)), (("ssl", 4.0), ("class", 2.0)))
    }
    usual = ldm.sample(student, cond, sampler=plain)
    assert torch.equal(usual, made[(("ssl", 2.0), ("class", 2.0))])
    for wrong, message in ((3.0, "a scale for each"), ({"sslx": 2.0}, "did you mean 'ssl'"), ({"ssl": 9.0}, "1 to 6")):
        with pytest.raises(UserError, match=message):
            ldm.sample(student, cond, sampler=ldm.Sampler(guidance_scale=wrong, progress=False))
    scales = torch.tensor([[3.0, 1.5]]).expand(4, 2)
    sigma, x = torch.full((4,), 2.0), torch.randn(4, 4, 8, 8)
    cond = student.condition_of(batch(student))
    model = load_model(folder)
    guided = ldm.Sampler(guidance_scale={"ssl": 3.0, "class": 1.5}).settled(model, "sample").guided(model, cond)
    assert torch.allclose(student.teacher_denoiser(scales)(x, sigma, cond), guided.denoiser(x, sigma, cond), atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student's folder, made by the commands from a teacher and a cohort without its latents."""
    folder = tmp_path_factory.mktemp("distilled")
    store = make_cohort(folder)
    own = teacher(folder / "teacher")
    config = {
        "model": {
            "base_learning_rate": 1e-3, "scale_lr": False, "target": "ldm.distillation.student.Distillation",
            "params": {"teacher": str(own), "components": 2, "substeps": 8},
        },
        "data": {
            "target": "ldm.data.module.TileDataModule",
            "params": {
                "batch_size": 8, "keys": ["ssl"], "stores": str(store.parent), "feature": "own",
                "train": {"target": "ldm.data.datasets.TileDataset", "params": {}},
                "validation": {"target": "ldm.data.datasets.TileDataset", "params": {}},
            },
        },
        "lightning": {
            "callbacks": {"image_logger": {"params": {"batch_frequency": 2, "max_images": 2}}},
            "trainer": {"max_steps": 2, "accelerator": "cpu", "precision": "32", "val_check_interval": 2},
        },
    }  # fmt: skip
    (folder / "distil.yaml").write_text(yaml.safe_dump(config))
    assert main(["-t", "--base", str(folder / "distil.yaml"), "--logdir", str(folder / "logs"), "--name", "tiny"]) == 0
    (run,) = (folder / "logs").iterdir()
    return run, export(run, folder / "student"), own


def test_a_student_is_a_model_folder_like_any_other(trained):
    run, folder, _ = trained
    model = load_model(folder)
    told = CliRunner().invoke(app, ["describe", str(folder)], catch_exceptions=False).output
    assert "UNetModel of" in told
    assert "student: policy, 2 or 4 steps, guidance scale 1 to 6" in told
    assert type(model) is LatentDiffusion
    assert list(model.student.steps) == [2, 4]
    assert model.metadata["mpp"] == 0.5
    assert sorted(path.name for path in (run / "images").rglob("*.png"))
    held = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any(name.startswith("_leader") for name in held["state_dict"])
    cond = model.condition(features=torch.randn(3, 6))
    four, two = (ldm.sample(model, cond, sampler=ldm.Sampler(steps=n, progress=False)) for n in (4, 2))
    assert four.shape == (3, 3, 32, 32)
    assert not torch.equal(four, two)
    assert torch.equal(four, ldm.sample(model, cond, sampler=ldm.Sampler(progress=False)))  # 4 is usual
    one_by_one = ldm.sample(model, cond, sampler=ldm.Sampler(progress=False, batch_size=1))
    assert torch.allclose(four, one_by_one, atol=1e-4)


def test_a_students_large_image_is_the_tile_where_one_window_covers_it(trained):
    model = load_model(trained[1])
    grid, sampler = torch.randn(1, 1, 6), ldm.Sampler(progress=False)
    image = ldm.large_image(model, grid, sampler=sampler)
    solver = sampler.settled(model, "large_image").guided(model)
    sigmas = sampler.settled(model, "large_image").sigmas(model)
    x = canvas_noise(0, 4, 8, 8) * sigmas[0]
    x = solver.solve(x, sigmas, model.condition(features=grid[0]), None, lambda *_: None)
    assert torch.allclose(image, model.decode(x).clamp(-1, 1), atol=1e-4)
    grid = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    one, many = (ldm.large_image(model, grid, sampler=ldm.Sampler(progress=False, batch_size=n)) for n in (1, 16))
    assert one.shape == (1, 3, 64, 96)
    assert torch.allclose(one, many, atol=1e-4)


def test_the_network_is_asked_once_for_a_step_and_a_window(trained, monkeypatch):
    model, rows = load_model(trained[1]), []
    network = model.model.diffusion_model
    network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    ldm.sample(model, model.condition(features=torch.randn(3, 6)), sampler=ldm.Sampler(steps=4, progress=False))
    assert rows == [3, 3, 3, 3]
    rows.clear()
    ldm.large_image(model, torch.randn(2, 2, 6), sampler=ldm.Sampler(steps=2, progress=False))
    assert sum(rows) == 9 + 9  # shifted windows, then those of the last step, which overlap by half


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3}, "was trained for 2 or 4 steps; got 3"),
        ({"solver": "heun"}, "its own solver"),
        ({"schedule": "karras"}, "its own schedule"),
        ({"guidance_scale": 7.0}, "guidance scales of 1 to 6; got 7"),
        ({"guidance_interval": (1.0, 5.0)}, "takes no guidance_interval"),
        ({"guidance_rescale": 0.5}, "takes no guidance_rescale"),
        ({"cache": 2}, "takes no cache"),
    ],
)
def test_what_a_student_cannot_do_is_told(trained, settings, message):
    model = load_model(trained[1])
    with pytest.raises(UserError, match=message):
        ldm.sample(model, model.condition(features=torch.randn(1, 6)), sampler=ldm.Sampler(progress=False, **settings))


def test_a_student_translates_from_noise_and_does_not_invert(trained):
    model, images = load_model(trained[1]), torch.zeros(1, 3, 32, 48)
    with pytest.raises(UserError, match="an image is not inverted by it"):
        ldm.translate(model, images, sampler=ldm.Sampler(progress=False))
    with pytest.raises(UserError, match="an image is not inverted by it"):
        sweep_images(model, images, null := model.null_condition(), [null])
    way = ldm.Inversion(start="noise", strength=0.5)
    assert ldm.translate(model, images, sampler=ldm.Sampler(progress=False), inversion=way).shape == images.shape
    with pytest.raises(UserError, match="a student cannot guide"):
        ldm.sample(load_model(trained[2]), count=1, sampler=ldm.Sampler(guide=model, progress=False))
    with pytest.raises(UserError, match="is of models that were distilled"):
        ldm.sample(load_model(trained[2]), count=1, sampler=ldm.Sampler(solver="policy", progress=False))


@pytest.mark.parametrize("method", ["consistency", "guidance"])
def test_students_of_other_methods_sample_too(method, tmp_path):
    student = Distillation(str(teacher(tmp_path / "teacher")), method=method).eval()
    student.metadata = {}
    cond = student.condition(features=torch.randn(2, 6))
    for settings in ({}, {"guidance_scale": 4.0}, {"steps": 2}):
        made = ldm.sample(student, cond, sampler=ldm.Sampler(progress=False, **settings))
        assert made.shape == (2, 3, 32, 32)
    if method == "guidance":
        assert ldm.translate(student, torch.zeros(1, 3, 32, 32), sampler=ldm.Sampler(progress=False, steps=3)).shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "gan"}, "method is one of policy, consistency, guidance"),
        ({"steps": [0]}, "whole numbers from 1 to 64"),
        ({"guidance": [6, 1]}, "lowest and highest scale"),
        ({"components": 1}, "components are a whole number from 2"),
        ({"window": 99}, "window from 0 below substeps"),
    ],
)
def test_a_wrong_setting_of_a_student_is_told(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Distillation(str(teacher(tmp_path / "teacher")), **change)


def test_a_teacher_that_is_a_student_is_refused(trained):
    with pytest.raises(UserError, match="is itself a student; give the model that it was distilled from"):
        Distillation(str(trained[1]))


def test_a_teacher_without_conditions_has_a_student_that_is_told_none(tmp_path):
    student = Distillation(str(teacher(tmp_path / "teacher", conditioner=None)), components=2)
    assert student.student.guidance is None
    student.loss(batch(student), torch.Generator()).mean().backward()
    assert ldm.sample(student.eval(), count=2, sampler=ldm.Sampler(progress=False)).shape == (2, 3, 32, 32)
