"""Translation: inversion and its exactness, what it costs, parity with the published procedures, agreement."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml
from published import load, relative
from test_convert_guided import converted, load_classifier, omics
from torch import Tensor

import ldm
from ldm.convert import convert, load_model
from ldm.diffusion import samplers, schedules
from ldm.diffusion.consistency import consistent, match_low, projected, shrink
from ldm.diffusion.denoiser import per_sample
from ldm.diffusion.guidance import clip
from ldm.errors import UserError
from ldm.sampling.guided import Classifier
from ldm.sampling.inversion import invert, invert_exactly, invert_published, invertible

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


@pytest.mark.parametrize("name", ["euler", "heun"])
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


def test_exact_inversion_is_of_solvers_of_one_step(images):
    with pytest.raises(ValueError, match="exact inversion is of solvers of one step"):
        invert_exactly(Mixture(), images, invertible(SIGMAS), ZERO, samplers.sample_unipc)


def test_another_class_is_the_image_moved_and_a_part_of_the_way_keeps_more(images):
    near, far = (
        samplers.sample_euler(Mixture(), invert(Mixture(), images, levels, ZERO), levels, ONE) - images
        for levels in (invertible(SIGMAS, strength) for strength in (0.2, 1.0))
    )
    torch.testing.assert_close(far, torch.ones_like(far), rtol=0, atol=0.4)       # the classes differ by a shift of 1
    assert rms(near) < rms(far) / 3


# --- agreement with a measurement -----------------------------------------------------------------------------------


def test_the_result_shrunk_is_the_image_of_low_resolution(images):
    low = shrink(images, 2)
    start = 40 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    free = samplers.sample_dpmpp_2m(Mixture(), start, SIGMAS, ZERO)
    bound = samplers.sample_dpmpp_2m(consistent(Mixture(), match_low(low, 2)), start, SIGMAS, ZERO)
    assert rms(shrink(free, 2) - low) > 0.3
    assert rms(shrink(bound, 2) - low) < 1e-5
    assert rms(bound - images) < rms(free - images)


def test_latents_agree_through_projection():
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=rng) / 8**0.5 + torch.eye(8)
    decode = lambda z: torch.einsum("ij,bjhw->bihw", mix, z).tanh()  # noqa: E731
    encode = lambda x: torch.einsum("ij,bjhw->bihw", mix.inverse(), x.clamp(-0.999, 0.999).atanh())  # noqa: E731
    wanted = decode(0.3 * torch.randn(2, 8, 8, 8, generator=rng))
    low, z = shrink(wanted, 4), 0.3 * torch.randn(2, 8, 8, 8, generator=rng)
    before = rms(shrink(decode(z), 4) - low)
    with torch.no_grad():
        assert rms(shrink(decode(projected(match_low(low, 4), encode, decode)(z)), 4) - low) < before / 5


# --- published models -----------------------------------------------------------------------------------------------


def test_parity_of_class_translation(oracle, tmp_path):
    golden = load(oracle / "hismmdm_unet.pt")
    model = load_model(converted(tmp_path, golden["state_dict"], golden["config"]))
    source, target = (model.condition(class_=golden[name]) for name in ("y", "y_target"))
    sigmas = schedules.respaced_sigmas(model.sigmas, "ddim10")
    for name, denoiser in (("ddim_reverse", clip(model.denoiser())), ("ddim_reverse_noclip", model.denoiser())):
        start = invert_published(denoiser, golden["image"], sigmas, source)
        assert relative(start / (1 + sigmas[0] ** 2).sqrt(), golden[name]) < 1e-4
    start = golden["ddim_reverse"] * (1 + sigmas[0] ** 2).sqrt()
    assert relative(samplers.sample_euler(clip(model.denoiser()), start, sigmas, target), golden["translated"]) < 1e-4


def ends(model, golden: dict, start: Tensor, cond: dict, **settings) -> Tensor:
    """The way down of `ldm.translate` as published, from another's start."""
    sigmas = schedules.respaced_sigmas(model.sigmas, "ddim10")

    def begin(*_) -> Tensor:
        return start * (1 + sigmas[0] ** 2).sqrt()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.sampling.translate.invert_published", begin)
        sampler = ldm.Sampler(steps=10, progress=False, **settings)
        return ldm.translate(model, golden["image"], None, cond, sampler, ldm.Inversion(published=True))


@pytest.mark.slow
def test_parity_of_guided_translation(oracle, tmp_path):
    """The way up to 3e-4, as random weights enlarge rounding; the way down from the published latent to 1e-4."""
    golden = load(oracle / "more" / "hismmdm_guided.pt")
    model = load_model(converted(tmp_path / "unet", golden["state_dict"], golden["config"]))
    run = golden["translate"]
    guide = Classifier(load_classifier(oracle, tmp_path / "classifier"), run["scale"])
    source, target = (model.condition(class_=golden[name]) for name in ("y", "y_target"))
    told = target | guide.target(golden["y_target"].tolist())
    sigmas = schedules.respaced_sigmas(model.sigmas, "ddim10")
    start = invert_published(model.denoiser(), golden["image"], sigmas, source)
    assert relative(start / (1 + sigmas[0] ** 2).sqrt(), run["latent"]) < 3e-4
    (made,) = ends(model, golden, run["latent"], [told], classifier=guide)
    assert relative(made, run["out"].clamp(-1, 1)) < 1e-4
    assert relative(ends(model, golden, run["latent"], target), run["out"].clamp(-1, 1)) > 1e-2
    sampler = ldm.Sampler(steps=10, classifier=guide, progress=False)
    whole = ldm.translate(model, golden["image"], source, [told], sampler, ldm.Inversion(published=True))
    assert relative(whole[0], run["out"].clamp(-1, 1)) < 2e-2


@pytest.mark.slow
def test_parity_of_omics_translation(oracle, tmp_path):
    golden = load(oracle / "more" / "hismmdm_omics_translate.pt")
    model = load_model(converted(tmp_path / "unet", golden["state_dict"], golden["config"]))
    conds = {}
    for which in ("source", "target"):
        values = omics(golden[which])
        conds[which] = model.condition(class_=values.pop("class"), **values)
    guided = golden["translated_guided"]
    guide = Classifier(load_classifier(oracle, tmp_path / "classifier"), guided["scale"])
    labels = golden["target"]["y"].tolist()
    sigmas = schedules.respaced_sigmas(model.sigmas, "ddim10")
    start = invert_published(model.denoiser(), golden["image"], sigmas, conds["source"])
    assert relative(start / (1 + sigmas[0] ** 2).sqrt(), golden["latent"]) < 3e-4
    targets = [conds["target"] | guide.target(told) for told in ([None] * len(labels), labels)]
    made = ends(model, golden, golden["latent"], targets, classifier=guide)
    assert relative(made[0], golden["translated"].clamp(-1, 1)) < 1e-4
    assert relative(made[1], guided["out"].clamp(-1, 1)) < 1e-4


@pytest.mark.slow
def test_parity_of_translation_between_modalities(oracle, tmp_path):
    """MIDiffusion's loop is ancestral, from noise alone, and the source is the condition."""
    io = load(oracle / "more" / "mid_ddpm_model" / "io.pt")
    (tmp_path / "config.yml").write_text(yaml.safe_dump(io["config"]))
    path = oracle / "more" / "mid_ddpm_model" / "ckpt.pth"
    model = load_model(convert(path, tmp_path / "model", config=tmp_path / "config.yml", say=lambda line: None))
    run = io["sampling"]
    sampler, cond = ldm.Sampler(steps=6, solver="ddpm"), model.condition(image=2 * run["source"] - 1)
    sampler, steps = sampler.settled(model, "sample"), run["step_noises"].double()
    sigmas, solver = sampler.sigmas(model), sampler.guided(model, cond)
    start = run["x_T"].double() * (1 + sigmas[0] ** 2).sqrt()
    out = solver.solve(start, sigmas, cond, lambda step: steps[step : step + 1], lambda *_: None)
    noisy = out + (0.5 * run["logvar"][0]).exp() * steps[-1]                     # as published, after the last step too
    assert relative(noisy, run["out"].double()) < 1e-3  # a grey level over its edge by the processor's rounding: 4e-4


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
    made = ldm.translate(model, large, a, [b, a], sampler=ldm.Sampler(steps=3, batch_size=4, progress=False))
    assert made[0].shape == large.shape
    assert made[0].isfinite().all()
    assert rms(made[1] - large) < rms(made[0] - large)
    alone = ldm.translate(model, large[1:], a, b, sampler=ldm.Sampler(steps=3, batch_size=1, progress=False))
    torch.testing.assert_close(alone, made[0][1:], rtol=0, atol=1e-2)            # random weights enlarge rounding


def test_targets_share_one_inversion(classes):
    model, image = classes
    conds, seen = [model.condition(class_=name) for name in "bab"], []
    sampler = ldm.Sampler(steps=4, progress=False)
    made = ldm.translate(model, image, None, conds, sampler, watch=lambda k, step, x, x0: seen.append((k, step)))
    assert seen == [(k, step) for k in (-1, 0, 1, 2) for step in range(3)]
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[1])


def test_less_noise_keeps_more_of_the_image(classes):
    model, image = classes
    near, far = (
        rms(ldm.translate(model, image, sampler=ldm.Sampler(steps=10, progress=False),
                          inversion=ldm.Inversion(start="noise", strength=strength)) - image)
        for strength in (0.2, 1.0)
    )  # fmt: skip
    assert near < 0.5 * far


def test_what_is_enlarged_is_the_image_when_it_is_shrunk(classes):
    model, image = classes
    low = shrink(image, 2)
    made = ldm.translate(model, low, sampler=ldm.Sampler(steps=3, progress=False), inversion=ldm.Inversion(enlarge=2))
    assert made.shape == image.shape
    inside = (made.abs() < 0.99).float()                                          # values are clipped to [-1, 1]
    assert rms((shrink(made, 2) - low) * (shrink(inside, 2) == 1)) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(1, 3, 8, 16)}, "16 x 8 px is smaller than the model's tile of 16 px"),
        ({"images": torch.zeros(1, 1, 16, 16)}, "the model works on RGB images, this is gray"),
        ({"images": torch.full((1, 3, 16, 16), 255.0)}, r"values in \[-1, 1\]; got 255 to 255"),
        ({"solver": "ddpm"}, "an inversion follows one of euler, heun, dpmpp_2m, unipc; got 'ddpm'"),
        ({"solver": "unipc", "exact": True}, "exact is of inversions with euler, heun; got"),
        ({"start": "middle"}, "start must be one of invert, noise, none; got 'middle'"),
        ({"start": "none"}, "start 'none' keeps nothing of the image"),
        ({"start": "noise", "exact": True}, "exact is of inversions; got start 'noise'"),
        ({"enlarge": 2, "start": "invert"}, "it starts from noise or none of it"),
        ({"enlarge": 1}, "enlarge must be a whole number of 2 or more; got 1"),
        ({"strength": 0.0}, "strength is a share of the steps"),
        ({"target": []}, "no target is given"),
        ({"published": True, "steps": 7}, "published steps divide the model's 1000 noise levels; got 7"),
    ],
)
def test_mistakes_are_one_message(classes, change, message):
    model, image = classes
    own = {"images": image[:1], "target": [None]} | change
    given = {name: own.pop(name) for name in ("images", "target")}
    settings = {name: own.pop(name) for name in ("solver", "steps") if name in own}
    with pytest.raises(UserError, match=message):
        ldm.translate(model, **given, sampler=ldm.Sampler(**settings), inversion=ldm.Inversion(**own))
