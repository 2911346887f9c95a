"""Guidance: parity with the published classifier guidance, closed forms, and that it nests."""

from __future__ import annotations

import math

import pytest
import torch
from published import guided_diffusion_table, guided_diffusion_unet, invert, load, relative
from torch import Tensor

from ldm.diffusion import samplers, schedules
from ldm.diffusion.denoiser import TableDenoiser, per_sample
from ldm.diffusion.guidance import (
    autoguidance,
    cfg,
    class_log_probability,
    classifier_guidance,
    clip,
    compose,
    keep_variance,
    target_gradient,
    within,
    without_target,
)
from ldm.networks.encoder_unet import EncoderUNetModel


class Counted:
    """A linear denoiser of two conditions that counts the rows it evaluates."""

    def __init__(self):
        self.rows: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        self.rows.append(len(x))
        text, kind = (cond[part].flatten(1).mean(1).view(-1, 1, 1, 1) for part in ("crossattn", "vector"))
        return 0.5 * x + text + 2 * kind + 0.3 * text * kind


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 4, generator=generator)
    cond = {"crossattn": torch.randn(3, 1, 5, generator=generator), "vector": torch.randn(3, 4, generator=generator)}
    null = {"crossattn": torch.full((1, 1, 5), 0.1), "vector": torch.full((1, 4), -0.2)}
    return x, torch.full((3,), 2.0), cond, null


def test_compose_with_one_full_term_is_classifier_free_guidance(batch):
    x, sigma, cond, null = batch
    d = Counted()
    assert torch.equal(compose(d, null, [({}, 3.0)])(x, sigma, cond), cfg(d, null, 3.0)(x, sigma, cond))


def test_each_condition_has_its_scale_and_the_null_is_evaluated_once(batch):
    x, sigma, cond, null = batch
    d = Counted()
    terms = [({"vector": null["vector"]}, 3.0), ({"crossattn": null["crossattn"]}, 1.5), (null, 0.0)]
    out = compose(d, null, terms)(x, sigma, cond)
    assert d.rows == [9]
    full = {part: value.expand(3, *value.shape[1:]) for part, value in null.items()}
    base = d(x, sigma, full)
    text = d(x, sigma, {**full, "crossattn": cond["crossattn"]})
    kind = d(x, sigma, {**full, "vector": cond["vector"]})
    torch.testing.assert_close(out, base + 3 * (text - base) + 1.5 * (kind - base))
    with pytest.raises(ValueError, match="drops labels; the condition has crossattn, vector"):
        compose(d, null, [({"labels": torch.zeros(1)}, 1.0)])


def test_a_negative_condition_may_differ_by_sample(batch):
    x, sigma, cond, _ = batch
    negative = {part: value.flip(0) for part, value in cond.items()}
    d = Counted()
    out = cfg(d, negative, 2.0)(x, sigma, cond)
    bad = d(x, sigma, negative)
    torch.testing.assert_close(out, bad + 2 * (d(x, sigma, cond) - bad))


def test_a_null_of_other_parts_is_refused(batch):
    x, sigma, cond, _ = batch
    with pytest.raises(ValueError, match="they must agree"):
        cfg(Counted(), {"crossattn": torch.zeros(1, 1, 5)}, 2.0)(x, sigma, cond)


def test_rescale_draws_the_spread_back(batch):
    x, sigma, cond, null = batch

    def d(x, sigma, cond):
        return x * (1 + cond["vector"].mean(1).view(-1, 1, 1, 1))

    plain, conditional = cfg(d, null, 4.0)(x, sigma, cond), d(x, sigma, cond)
    full, half = (cfg(d, null, 4.0, rescale=phi)(x, sigma, cond) for phi in (1.0, 0.5))
    torch.testing.assert_close(full.flatten(1).std(1), conditional.flatten(1).std(1))
    torch.testing.assert_close(half, (full + plain) / 2)
    alone = {part: value[1:2] for part, value in cond.items()}
    torch.testing.assert_close(cfg(d, null, 4.0, rescale=1.0)(x[1:2], sigma[1:2], alone), full[1:2])


def test_guidance_acts_within_its_interval(batch):
    x, _, cond, null = batch
    d = Counted()
    guided = within(cfg(d, null, 3.0), d, 0.5, 2.0)
    for level, rows in ((2.0, [6]), (0.5, [3]), (5.0, [3])):
        d.rows.clear()
        guided(x, torch.full((3,), level), cond)
        assert d.rows == rows
    mixed = guided(x, torch.tensor([0.1, 1.0, 9.0]), cond)
    torch.testing.assert_close(mixed[1], cfg(d, null, 3.0)(x, torch.ones(3), cond)[1])
    torch.testing.assert_close(mixed[::2], d(x, torch.ones(3), cond)[::2])


def test_autoguidance_extrapolates_from_the_weaker_model(batch):
    x, sigma, cond, _ = batch
    strong, weak = Counted(), (lambda x, sigma, cond: 0.4 * x)
    out = autoguidance(strong, weak, 1.7)(x, sigma, cond)
    torch.testing.assert_close(out, 0.4 * x + 1.7 * (strong(x, sigma, cond) - 0.4 * x))
    assert autoguidance(strong, weak, 1.0) is strong


def test_clipping(batch):
    x, sigma, cond, _ = batch
    identity = lambda x, sigma, cond: x  # noqa: E731
    assert torch.equal(clip(identity)(3 * x, sigma, cond), (3 * x).clamp(-1, 1))


def test_the_variance_of_the_condition_survives_batched_guidance(batch):
    x, sigma, cond, null = batch

    def joint(x, sigma, cond):
        kind = cond["vector"].mean(1).view(-1, 1, 1, 1)
        return 0.5 * x + kind, kind.expand_as(x)

    x0, variance = keep_variance(joint, lambda d: clip(cfg(d, null, 3.0)))(x, sigma, cond)
    assert torch.equal(variance, joint(x, sigma, cond)[1])
    torch.testing.assert_close(x0, clip(cfg(lambda *a: joint(*a)[0], null, 3.0))(x, sigma, cond))


# --- classifier gradients ------------------------------------------------------------------------------------------


def test_classifier_guidance_gives_the_exact_posterior_inside_a_no_grad_sampler():
    """Data N(0, 1) and an observation y = x0 + e, e ~ N(0, 1/4), seen through the noise: p(y|x) is Gaussian, and the
    guided model is the posterior N(4/5 y, 1/5)."""
    y, spread2 = 0.8, 0.25
    posterior_mean, posterior_var = y / (1 + spread2), spread2 / (1 + spread2)

    def prior(x, sigma, cond):
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    def log_likelihood(x, sigma, cond):
        s2 = sigma.view(-1, 1, 1, 1) ** 2
        return (-((y - x / (1 + s2)) ** 2) / (2 * (spread2 + s2 / (1 + s2)))).flatten(1).sum(1)

    guided = classifier_guidance(prior, target_gradient(log_likelihood, 1.0))
    x, sigma = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.tensor([0.3, 4.0], dtype=torch.float64)
    s2 = sigma.view(-1, 1, 1, 1) ** 2
    exact = (posterior_var * x + s2 * posterior_mean) / (posterior_var + s2)
    torch.testing.assert_close(guided(x, sigma, {}), exact)
    start = 40 * torch.randn(1, 1, 100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = samplers.sample_dpmpp_2m(guided, start, schedules.karras_sigmas(40, 0.01, 40.0).double(), {})
    assert not out.requires_grad
    assert abs(float(out.mean()) - posterior_mean) < 0.02
    assert abs(float(out.std()) - math.sqrt(posterior_var)) < 0.02


def told(labels: Tensor) -> dict[str, Tensor]:
    """The network's labels, and the classifier's target."""
    return {"label": labels, "target": labels}


@pytest.fixture(scope="module")
def published(oracle):
    classifier = load(oracle / "more" / "hismmdm_classifier.pt")
    net = EncoderUNetModel(**classifier["config"]).eval()
    net.load_state_dict(classifier["state_dict"])
    golden = load(oracle / "more" / "hismmdm_guided.pt")
    table = guided_diffusion_table()
    denoiser = TableDenoiser(guided_diffusion_unet(golden), table)
    log_probability = class_log_probability(net, denoiser.timestep)
    return classifier, net, golden, denoiser, log_probability, schedules.respaced_sigmas(table, "ddim10")


def test_the_classifiers_gradient_is_the_published_one(published):
    classifier, net, _, denoiser, log_probability, _ = published
    with torch.no_grad():
        assert relative(net(classifier["x"], classifier["t"]), classifier["logits"]) < 1e-5
    sigma = denoiser.table[classifier["t"]]
    scale = (1 + sigma**2).sqrt().view(-1, 1, 1, 1)  # dx/dx_t
    gradient = target_gradient(log_probability, 1.0)(classifier["x"] * scale, sigma, {"target": classifier["y"]})
    assert relative(gradient * scale, classifier["grad"]) < 1e-4


@pytest.mark.parametrize("name", ["guided_scale_1_clip", "guided_scale_8_clip", "guided_scale_8_noclip"])
def test_guided_samples_are_the_published_ones(published, name):
    _, _, golden, denoiser, log_probability, sigmas = published
    run = golden[name]
    base = denoiser if "noclip" in name else clip(denoiser)
    guided = classifier_guidance(base, target_gradient(log_probability, run["scale"]))
    start = golden["x_T"] * (1 + sigmas[0] ** 2).sqrt()
    states: list[Tensor] = []
    out = samplers.sample_euler(guided, start, sigmas, told(golden["y"]), callback=lambda i, x, x0: states.append(x))
    assert relative(out, run["out"]) < 1e-4
    for state, sigma, published_state in zip(states, sigmas[1:], run["intermediates"]):
        assert relative(state / (1 + sigma**2).sqrt(), published_state) < 1e-4


@pytest.mark.slow
def test_guided_stochastic_samples_and_translations_are_the_published_ones(published):
    _, _, golden, denoiser, log_probability, sigmas = published
    scale = (1 + sigmas[0] ** 2).sqrt()
    run = golden["guided_eta_0.7"]
    guided = classifier_guidance(clip(denoiser), target_gradient(log_probability, run["scale"]))
    out = samplers.sample_ddim(
        guided, golden["x_T"] * scale, sigmas, told(golden["y"]), lambda step: run["noises"][step], eta=0.7
    )
    assert relative(out, run["out"]) < 1e-4
    latent = invert(denoiser, golden["image"], sigmas, {"label": golden["y"]})
    assert relative(latent, golden["translate"]["latent"]) < 3e-4
    start = golden["translate"]["latent"] * scale
    out = samplers.sample_euler(guided, start, sigmas, told(golden["y_target"]))
    assert relative(out, golden["translate"]["out"]) < 1e-4


def test_guided_ancestral_samples_are_the_published_ones(published):
    """There the step's mean moves by its learned variance times the gradient at x_t."""
    _, _, golden, denoiser, log_probability, sigmas = published
    run = golden["ancestral_guided"]
    joint = keep_variance(denoiser.with_variance, lambda d: without_target(clip(d)))
    out = samplers.sample_ddpm(
        joint, golden["x_T"] * (1 + sigmas[0] ** 2).sqrt(), sigmas, told(golden["y"]), lambda step: run["noises"][step],
        variance=None, gradient=target_gradient(log_probability, run["scale"]),
    )  # fmt: skip
    assert relative(out, run["out"]) < 1e-4


def test_the_variance_is_that_of_the_whole_condition_under_composed_guidance(batch):
    """Whatever the order of the terms, whichever of them are left out, and however many samples are in the batch."""
    x, sigma, cond, null = batch

    def joint(x, sigma, cond):
        told = cond["vector"].mean(1) + 10 * cond["crossattn"].mean((1, 2))
        return x * per_sample(told, x), per_sample(told, x).expand_as(x)

    whole = joint(x, sigma, cond)[1]
    drop = {"vector": {"crossattn": null["crossattn"]}, "crossattn": {"vector": null["vector"]}}
    for order in (["vector", "crossattn"], ["crossattn", "vector"], ["vector"]):
        terms = [(drop[name], 2.0) for name in order]
        guided = keep_variance(joint, lambda d, terms=terms: compose(d, null, terms))
        x0, variance = guided(x, sigma, cond)
        torch.testing.assert_close(variance, whole)
        plain = compose(lambda x, s, c: joint(x, s, c)[0], null, terms)(x, sigma, cond)
        torch.testing.assert_close(x0, plain)
