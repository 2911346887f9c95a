"""Checkpoints of the mitotic-figure DPM: network, samplers and scorers through our folders and functions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from published import load, relative
from torch import Tensor
from torchvision.models import resnet34

import ldm
from ldm import convert
from ldm.diffusion import samplers, schedules
from ldm.diffusion.denoiser import per_sample
from ldm.diffusion.guidance import cfg, clip
from ldm.errors import UserError
from ldm.interop.mitotic import BUFFERS, OTHER_BUFFERS
from ldm.model_folder import load_model
from ldm.scorers.ensemble import ResNetEnsemble, load_scorer

CONFIG = "image_size: 16\n"


@pytest.fixture(scope="module")
def golden(oracle):
    return load(oracle / "mitotic_lucidrains.pt")


def published(golden: dict, timesteps: int = 1000, module: str = "module.") -> dict:
    """A checkpoint as the published training writes it."""
    betas = schedules.make_betas("cosine", timesteps)
    one, cumprod = torch.ones(1).double(), (1 - betas).cumprod(0)
    buffers = {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": torch.cat([one, cumprod[:-1]]),
        "sqrt_alphas_cumprod": cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1 / cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / cumprod - 1).sqrt(),
        **dict.fromkeys(OTHER_BUFFERS, betas),
    }
    state = {module + name: value.float() for name, value in buffers.items()}
    state |= {f"{module}model.{name}": value for name, value in golden["unet_state_dict"].items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    return {"epoch": "40", "model_state_dict": state, "optimizer_classification_state_dict": optimizer}


def converted(folder: Path, checkpoint: dict, say=lambda line: None, **options) -> torch.nn.Module:
    torch.save(checkpoint, folder / "model_checkpoint.pt")
    (folder / "config.yml").write_text(CONFIG)
    convert.convert(folder / "model_checkpoint.pt", folder / "model", config=folder / "config.yml", say=say, **options)
    return load_model(folder / "model")


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    return converted(tmp_path_factory.mktemp("cells"), published(golden))


@pytest.fixture(scope="module")
def short(golden, tmp_path_factory):
    """The same weights with 20 noise levels."""
    return converted(tmp_path_factory.mktemp("cells20"), published(golden, 20))


def test_the_checkpoint_of_the_tests_has_the_published_names(golden):
    assert set(published(golden)["model_state_dict"]) == set(golden["checkpoint_keys"])
    assert len(BUFFERS) + len(OTHER_BUFFERS) == 13


def test_the_network_is_the_published_one(golden, model):
    vector = model.condition(score=golden["classes"])["vector"]
    null = model.null_condition()["vector"].expand_as(vector)
    with torch.no_grad():
        cond, uncond = (model.model(golden["x"], golden["t"], vector=v) for v in (vector, null))
    assert relative(cond, golden["out_cond"]) < 1e-5
    assert relative(uncond, golden["out_null"]) < 1e-5
    assert relative(uncond + 8 * (cond - uncond), golden["out_cond_scale_8"]) < 1e-5
    cumprod = golden["diffusion_buffers"]["alphas_cumprod"].double()
    torch.testing.assert_close(1 / (1 + model.sigmas.double() ** 2), cumprod, rtol=1e-5, atol=1e-12)


def unit(images: Tensor) -> Tensor:
    return (images + 1) / 2


def test_ddim_as_published(golden, model):
    """There x0 is clipped but the noise is still that of the unclipped x0: an x0 that makes a step of ours do so.

    From sigma 20 000 at guidance 8, rounding alone makes 3e-4 between two computations of it.
    """
    run = golden["ddim_eta0_scale8_nodrop"]
    steps = len(run["times"]) - 1
    sigmas = schedules.table_sigmas(model.sigmas, steps)
    assert schedules.table_timesteps(1000, steps)[::-1] == run["times"][:-1]
    guided = cfg(model.denoiser(), model.null_condition(), 8.0)

    def clipped_apart(x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        x0 = guided(x, sigma, cond)
        step = int((sigmas == sigma[0]).nonzero()[0, 0])
        ratio = sigmas[step + 1] / sigmas[step]
        return (x0.clamp(-1, 1) - ratio * x0) / (1 - ratio)

    start, cond = run["x_T"] * (1 + sigmas[0] ** 2).sqrt(), model.condition(score=golden["classes"])
    out = samplers.sample_ddim(clipped_apart, start, sigmas, cond, lambda step: start, eta=0.0)
    assert relative(unit(out), run["out"]) < 1e-3
    correct = samplers.sample_ddim(clip(guided), start, sigmas, cond, lambda step: start, eta=0.0)
    assert relative(unit(correct), run["out"]) > 1e-2


@pytest.mark.slow
def test_ancestral_sampling_as_shipped(golden, short):
    """The published sampler drops its condition in half of the draws: two masks a step, the second of the null."""
    run = golden["as_shipped_ancestral20_scale8"]
    sigmas, cond = schedules.table_sigmas(short.sigmas, 20), short.condition(score=golden["classes"])
    null, kept = short.null_condition(), run["keep_masks"][::2]
    assert not run["keep_masks"][1::2].any()
    guided = cfg(short.denoiser(), null, 8.0)
    start, noises = run["noises"][0] * (1 + sigmas[0] ** 2).sqrt(), run["noises"][1:]

    def sampled(denoiser) -> Tensor:
        return unit(samplers.sample_ddpm(clip(denoiser), start, sigmas, cond, lambda step: noises[step]))

    def shipped(x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        mask = kept[int((sigmas == sigma[0]).nonzero()[0, 0])]
        return guided(x, sigma, {part: torch.where(per_sample(mask, v), v, null[part]) for part, v in cond.items()})

    assert relative(sampled(shipped), run["out"]) < 1e-4
    assert relative(sampled(guided), run["out"]) > 1e-2


def test_a_real_cell_is_changed_as_published(golden, short):
    run = golden["from_noised_real_12_of_20_nodrop"]
    sigmas = schedules.table_sigmas(short.sigmas, 20)[-run["start_t"] - 1 :]
    guided = clip(cfg(short.denoiser(), short.null_condition(), 8.0))
    start, cond = run["noise"] * (1 + sigmas[0] ** 2).sqrt(), short.condition(score=golden["classes"])
    out = samplers.sample_ddpm(guided, start, sigmas, cond, lambda step: run["noises"][step])
    assert relative(unit(out), run["out"]) < 1e-4


def test_cells_by_score(model):
    images = ldm.sample(
        model, model.condition(score=[0.0, 1.0]), sampler=ldm.Sampler(steps=2, guidance_scale=4.0, progress=False)
    )
    assert images.shape == (2, 3, 16, 16)
    assert not torch.allclose(images[0], images[1])


@pytest.mark.parametrize("module", ["module.", ""])
def test_every_tensor_is_accounted_for(golden, tmp_path, module):
    torch.save(published(golden, module=module), tmp_path / "cells.pt")
    found = convert.read_published(tmp_path / "cells.pt")
    assert set(found.unused) == {*BUFFERS, *OTHER_BUFFERS, "optimizer_classification_state_dict"}
    assert len(found.state) == len(golden["unet_state_dict"])
    convert.check(found, tmp_path)
    assert any("image_size is taken to be 64" in note for note in found.notes)


@pytest.mark.slow
def test_a_network_alone_and_one_of_half_precision(golden, tmp_path):
    torch.save(golden["unet_state_dict"], tmp_path / "unet.pt")
    found = convert.read_published(tmp_path / "unet.pt")
    convert.check(found, tmp_path)
    assert any("no noise schedule" in note for note in found.notes)
    checkpoint = published(golden)
    checkpoint["model_state_dict"] = {name: value.half() for name, value in checkpoint["model_state_dict"].items()}
    half = converted(tmp_path, checkpoint)
    vector = half.condition(score=golden["classes"])["vector"]
    with torch.no_grad():
        out = half.model(golden["x"], golden["t"], vector=vector)
    assert out.dtype == torch.float32
    assert relative(out, golden["out_cond"]) < 2e-2


def changed(golden: dict, **tensors: Tensor | None) -> dict:
    checkpoint = published(golden)
    state = checkpoint["model_state_dict"] | {name.replace("__", "."): value for name, value in tensors.items()}
    return {**checkpoint, "model_state_dict": {name: value for name, value in state.items() if value is not None}}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"module__model__final_conv__bias": None}, "1 weights are missing"),
        ({"module__model__init_conv__weight": None}, "lacks the network's first convolution"),
        ({"module__model__extra": torch.zeros(2)}, "1 are not of this model"),
        ({"module__ema": torch.zeros(2)}, r"1 tensors of .* have no place in the model \(first: ema\)"),
        ({"module__model__mid_attn__fn__norm__g": torch.ones(1, 8, 1, 1)}, "has shape"),
        ({"module__model__classes_emb__weight": torch.zeros(10, 16)}, "conditioned on classes"),
        ({"module__betas": schedules.make_betas("sqrt", 1000).float()}, "noise schedule"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(golden, tmp_path, tensors, message):
    torch.save(changed(golden, **tensors), tmp_path / "cells.pt")
    with pytest.raises(UserError, match=message):
        convert.convert(tmp_path / "cells.pt", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_linear_schedule_is_told_from_its_betas(golden, tmp_path):
    betas = torch.linspace(1e-4, 2e-2, 1000)
    cumprod = (1 - betas.double()).cumprod(0).float()
    new = {f"module__{name}": None for name in BUFFERS} | {"module__betas": betas, "module__alphas_cumprod": cumprod}
    torch.save(changed(golden, **new), tmp_path / "cells.pt")
    found = convert.read_published(tmp_path / "cells.pt")
    convert.check(found, tmp_path)
    assert found.node["params"]["beta_schedule"] == "sqrt_linear"


@pytest.mark.parametrize(
    ("text", "message"), [("size: 16", "'size' is no setting"), ("image_size: none", "a whole number above 0")]
)
def test_settings_that_it_does_not_have(golden, tmp_path, text, message):
    torch.save(published(golden), tmp_path / "cells.pt")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        convert.read_published(tmp_path / "cells.pt", config=tmp_path / "c.yaml")


# --- scorers -------------------------------------------------------------------------------------------------------


def random_resnet(seed: int) -> dict[str, Tensor]:
    """The oracle's weights, from their description."""
    with torch.device("meta"):
        net = resnet34(num_classes=1)
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            state[name] = noise.mul_(math.sqrt(2 / math.prod(parameter.shape[1:])))
        else:
            state[name] = 1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise
    for name, buffer in net.named_buffers():
        if "running" in name:
            noise = torch.randn(buffer.shape, generator=generator)
            state[name] = 0.1 * noise if name.endswith("mean") else 1 + 0.2 * noise.abs()
        else:
            state[name] = torch.zeros((), dtype=torch.int64)
    return {name: value * 0.3 if name.endswith("bn2.weight") else value for name, value in state.items()}


@pytest.mark.slow
def test_cells_are_scored_as_published(oracle, tmp_path):
    golden = load(oracle / "more" / "mitotic_resnet34.pt")
    paths = []
    for seed, wanted in zip(golden["seeds"], golden["weight_checks"]):
        state = random_resnet(seed)
        for name, total in wanted["sum_abs"].items():
            assert float(state[name].double().abs().sum()) == pytest.approx(total, rel=1e-6)
        paths.append(tmp_path / f"{seed}.pt")
        torch.save({"epoch": "7", "model_state_dict": state}, paths[-1])
    scorer = load_scorer(paths)
    images = 2 * golden["cells"] - 1
    torch.testing.assert_close(scorer.prepare(images)[..., ::5, ::5], golden["network_input"], rtol=1e-5, atol=1e-6)
    logits = scorer.logits(images)
    assert relative(logits, golden["logits"]) < 1e-5
    torch.testing.assert_close(logits.sigmoid(), golden["probabilities"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scorer(images[:1]), golden["score"][:1], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"is a ResNet-34 scorer.*load_scorer reads it"):
        convert.read_published(paths[0])


def test_a_scorer_judges_each_cell_alone_and_bears_black():
    scorer = ResNetEnsemble(1).eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images[1] = -1
    with torch.no_grad():
        scores = scorer(images)
        torch.testing.assert_close(scorer(images[:1]), scores[:1], rtol=1e-4, atol=1e-4)
    assert scores.shape == (2,)
    assert torch.isfinite(scores).all()
    dim = (images[:1] + 1) / 4 - 1  # half as bright
    torch.testing.assert_close(scorer.prepare(dim), scorer.prepare(images[:1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"must be \(B,3,H,W\)"):
        scorer(images[0])


def test_scorers_that_are_none(tmp_path):
    torch.save({"model_state_dict": {"fc.weight": torch.zeros(2, 512)}}, tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"net.pt is no ResNet-34 with one output: conv1.weight is missing"):
        load_scorer([tmp_path / "net.pt"])
    with pytest.raises(UserError, match="all published checkpoints, which are three"):
        load_scorer(tmp_path / "net.pt")
    with pytest.raises(UserError, match="does not exist"):
        load_scorer([tmp_path / "other.pt"])
