"""Translation: inversion and its exactness, what it costs, parity with the published procedures, agreement."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from published import load, relative
from test_convert_guided import converted, load_classifier, omics
from torch import Tensor

import ldm
from ldm.convert import load_model
from ldm.diffusion import samplers, schedules
from ldm.diffusion.consistency import consistent, descend, match_low, projected, shrink
from ldm.diffusion.denoiser import per_sample
from ldm.errors import UserError
from ldm.translate_images import Classifier
from ldm.translation import invert, invert_exactly, invertible, sdedit, translate

CENTRES = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


class Mixture:
    """The exact denoiser of a mixture of Gaussians about CENTRES + class, of spread 0.3; counts what it evaluates."""

    def __init__(self):
        self.rows = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        self.rows += len(x)
        centres = CENTRES[None] + cond["label"].view(-1, 1, 1, 1, 1)            # (B,K,C,H,W)
        variance = 0.09 + per_sample(sigma, x) ** 2
        apart = (x[:, None] - centres).flatten(2).square().sum(2)               # (B,K)
        weight = (-0.5 * apart / variance.view(-1, 1)).softmax(1)[..., None, None, None]
        means = 0.09 / variance * x + (1 - 0.09 / variance) * (weight * centres).sum(1)
        return means


SIGMAS = schedules.karras_sigmas(12, 0.02, 40.0)
ZERO, ONE = ({"label": torch.full((4,), value)} for value in (0.0, 1.0))


@pytest.fixture
def images() -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return CENTRES[[0, 1, 2, 1]] + 0.3 * torch.randn(4, 2, 4, 4, generator=rng)


def rms(a: Tensor) -> float:
    return float(a.square().mean().sqrt())


SOLVERS = {name: getattr(samplers, f"sample_{name}") for name in ("euler", "heun", "dpmpp_2m", "unipc")}


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_exact_inversion_undoes_decoding(images, name):
    solver, levels = SOLVERS[name], invertible(SIGMAS)
    around = {}
    for kind, up in (("plain", invert), ("exact", partial(invert_exactly, tolerance=1e-5))):
        latent = up(Mixture(), images, levels, ZERO, solver)
        around[kind] = rms(solver(Mixture(), latent, levels, ZERO) - images)
    assert around["exact"] < 1e-4
    assert around["plain"] > 20 * around["exact"]


def test_what_is_found_for_an_image_does_not_depend_on_the_batch(images):
    levels = invertible(SIGMAS)
    whole = invert_exactly(Mixture(), images, levels, ZERO, tolerance=1e-3)
    alone = invert_exactly(Mixture(), images[2:3], levels, {"label": torch.zeros(1)}, tolerance=1e-3)
    torch.testing.assert_close(whole[2:3], alone, rtol=1e-4, atol=1e-3)


def test_solvers_of_higher_order_lose_less(images):
    levels, lost = invertible(schedules.karras_sigmas(25, 0.02, 40.0)), {}
    for name, solver in SOLVERS.items():
        lost[name] = rms(solver(Mixture(), invert(Mixture(), images, levels, ZERO, solver), levels, ZERO) - images)
    assert lost["heun"] < lost["euler"] / 5
    assert lost["dpmpp_2m"] < lost["euler"] / 3


def test_targets_share_one_inversion(images):
    up, down, steps = Mixture(), Mixture(), []
    levels = invertible(SIGMAS)
    made = translate(
        up, down, images, levels, ZERO, [ONE, ZERO, ONE], samplers.sample_dpmpp_2m,
        callback=lambda step, x, x0: steps.append(step),
    )  # fmt: skip
    assert (up.rows, down.rows) == (4 * 11, 3 * 4 * 11)
    assert steps == list(range(4 * 11))
    assert torch.equal(made[0], made[2])
    assert rms(made[1] - images) < 0.1
    torch.testing.assert_close(made[0], images + 1, rtol=0, atol=0.4)             # the classes differ by a shift of 1
    with pytest.raises(ValueError, match="exact inversion is for"):
        invert_exactly(up, images, levels, ZERO, samplers.sample_unipc)


def test_partial_inversion_keeps_more(images):
    far = [
        rms(translate(Mixture(), Mixture(), images, invertible(SIGMAS, strength), ZERO, [ONE])[0] - images)
        for strength in (0.2, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2]


def test_sdedit_starts_from_the_noised_image(images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    near, free = (
        sdedit(Mixture(), images, schedules.sigmas_from(SIGMAS, strength), ZERO, noise) for strength in (0.3, 1.0)
    )
    assert rms(near - images) < 0.5 * rms(free - images)


# --- agreement with a measurement -----------------------------------------------------------------------------------


def test_the_result_shrunk_is_the_image_of_low_resolution(images):
    low = shrink(images, 2)
    start = 40 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    free = samplers.sample_dpmpp_2m(Mixture(), start, SIGMAS, ZERO)
    bound = samplers.sample_dpmpp_2m(consistent(Mixture(), match_low(low, 2)), start, SIGMAS, ZERO)
    assert rms(shrink(free, 2) - low) > 0.3
    assert rms(shrink(bound, 2) - low) < 1e-5
    assert rms(bound - images) < rms(free - images)


def test_latents_agree_through_projection_or_gradient():
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=rng) / 8**0.5 + torch.eye(8)
    decode = lambda z: torch.einsum("ij,bjhw->bihw", mix, z).tanh()  # noqa: E731
    encode = lambda x: torch.einsum("ij,bjhw->bihw", mix.inverse(), x.clamp(-0.999, 0.999).atanh())  # noqa: E731
    wanted = decode(0.3 * torch.randn(2, 8, 8, 8, generator=rng))
    low, z = shrink(wanted, 4), 0.3 * torch.randn(2, 8, 8, 8, generator=rng)
    before = rms(shrink(decode(z), 4) - low)
    for project in (projected(match_low(low, 4), encode, decode), descend(lambda z: shrink(decode(z), 4), low, 5)):
        with torch.no_grad():
            assert rms(shrink(decode(project(z)), 4) - low) < before / 5


# --- published models -----------------------------------------------------------------------------------------------


def test_parity_of_class_translation(oracle, tmp_path):
    golden = load(oracle / "hismmdm_unet.pt")
    model = load_model(converted(tmp_path, golden["state_dict"], golden["config"]))
    cond, target = (model.condition(class_=golden[name]) for name in ("y", "y_target"))
    sigmas = schedules.respaced_sigmas(model.sigmas, "ddim10")
    settings = {"steps": 10, "published": True, "progress": False}
    again = ldm.translate(model, golden["image"], cond, target, **settings)
    from_golden = samplers.sample_euler(
        partial(_clipped, model), golden["ddim_reverse_noclip"] * (1 + sigmas[0] ** 2).sqrt(), sigmas, target
    )
    assert relative(again, from_golden.clamp(-1, 1)) < 3e-4                       # the way up is not clipped


def _clipped(model, x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
    return model.denoiser()(x, sigma, cond).clamp(-1, 1)


def test_parity_of_guided_translation(oracle, tmp_path):
    golden = load(oracle / "more" / "hismmdm_guided.pt")
    model = load_model(converted(tmp_path / "unet", golden["state_dict"], golden["config"]))
    run = golden["translate"]
    guide = Classifier(load_classifier(oracle, tmp_path / "classifier"), [golden["y_target"]], run["scale"])
    cond, target = (model.condition(class_=golden[name]) for name in ("y", "y_target"))
    made = ldm.translate(
        model, golden["image"], cond, [target], steps=10, published=True, classifier=guide, progress=False
    )
    assert relative(made[0], run["out"].clamp(-1, 1)) < 1e-4
    plain = ldm.translate(model, golden["image"], cond, target, steps=10, published=True, progress=False)
    assert relative(plain, run["out"].clamp(-1, 1)) > 1e-3


def test_parity_of_omics_translation(oracle, tmp_path):
    golden = load(oracle / "more" / "hismmdm_omics_translate.pt")
    model = load_model(converted(tmp_path / "unet", golden["state_dict"], golden["config"]))
    conds = {}
    for which in ("source", "target"):
        values = omics(golden[which])
        conds[which] = model.condition(class_=values.pop("class"), **values)
    guided = golden["translated_guided"]
    guide = Classifier(
        load_classifier(oracle, tmp_path / "classifier"), [None, golden["target"]["y"]], guided["scale"]
    )
    made = ldm.translate(
        model, golden["image"], conds["source"], [conds["target"]] * 2, steps=10, published=True, classifier=guide,
        progress=False,
    )  # fmt: skip
    assert relative(made[0], golden["translated"].clamp(-1, 1)) < 1e-4
    assert relative(made[1], guided["out"].clamp(-1, 1)) < 1e-4


@pytest.fixture(scope="module")
def classes(oracle, tmp_path_factory):
    """A published pixel model of classes, and an image."""
    golden = load(oracle / "hismmdm_unet.pt")
    folder = converted(tmp_path_factory.mktemp("his"), golden["state_dict"], golden["config"], classes=list("abcde"))
    return load_model(folder), golden["image"]


def test_larger_images_go_through_windows(classes):
    model, image = classes
    large = torch.cat([image, image.flip(3)], 3)[..., :20]
    large = F.pad(large, (0, 0, 0, 6), mode="reflect")                           # (2,3,22,20), window 16
    a, b = (model.condition(class_=name) for name in "ab")
    made = ldm.translate(model, large, a, [b, a], steps=3, batch_size=4, progress=False)
    assert made[0].shape == large.shape
    assert made[0].isfinite().all()
    assert rms(made[1] - large) < rms(made[0] - large)
    alone = ldm.translate(model, large[1:], a, b, steps=3, batch_size=1, progress=False)
    torch.testing.assert_close(alone, made[0][1:], rtol=0, atol=1e-4)


def test_exact_inversion_of_a_model(classes):
    model, image = classes
    source = model.condition(class_="a")
    again = ldm.translate(model, 0.5 * image, source, source, steps=4, solver="euler", exact=True, progress=False)
    plain = ldm.translate(model, 0.5 * image, source, source, steps=4, solver="euler", progress=False)
    assert -20 * math.log10(rms(again - 0.5 * image) / 2) > 35
    assert rms(again - 0.5 * image) < rms(plain - 0.5 * image) / 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(1, 3, 8, 16)}, "16 x 8 px is smaller than the model's tile of 16 px"),
        ({"images": torch.zeros(1, 1, 16, 16)}, "the model works on RGB images, this is gray"),
        ({"images": torch.full((1, 3, 16, 16), 255.0)}, r"values in \[-1, 1\]; got 255 to 255"),
        ({"solver": "ddpm"}, "an inversion follows one of euler, heun, dpmpp_2m, unipc; got 'ddpm'"),
        ({"solver": "unipc", "exact": True}, "exact is of inversions with euler, heun, dpmpp_2m"),
        ({"start": "middle"}, "start must be one of invert, noise, none"),
        ({"strength": 0.0}, "strength is a share of the steps"),
        ({"target": []}, "no target is given"),
        ({"published": True, "steps": 7}, "published steps divide the model's 1000 noise levels; got 7"),
        ({"low": torch.zeros(1, 3, 5, 5)}, "the same multiple of 2 or more"),
    ],
)
def test_mistakes_are_one_message(classes, change, message):
    model, image = classes
    given = {"images": image[:1], "target": [None], **change}
    with pytest.raises(UserError, match=message):
        ldm.translate(model, **given, progress=False)
