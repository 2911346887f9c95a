"""Denoisers, samplers, guidance and tiling against the published code and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ldm.diffusion import schedules
from ldm.diffusion.denoiser import EDMDenoiser, FlowDenoiser, TableDenoiser
from ldm.diffusion.fields import FeatureField, slerp
from ldm.diffusion.guidance import cfg
from ldm.diffusion.losses import error_scale, min_snr_scale, scaled_error, variational_bound
from ldm.diffusion.samplers import sample_ddim, sample_dpmpp_2m, sample_euler, sample_heun
from ldm.diffusion.tiled import drawn_starts, fixed_starts, shifted, tiled
from ldm.networks.unet import UNetModel
from ldm.rng import canvas_noise, sample_noise


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def table(**kwargs) -> torch.Tensor:
    alphas_cumprod = (1 - schedules.make_betas(**kwargs)).cumprod(0)
    return schedules.sigmas_from_alphas_cumprod(alphas_cumprod).float()


@pytest.fixture(scope="module")
def published(oracle):
    """The tiny published model: its io, our UNet with its weights, its noise table."""
    folder = oracle / "ldm_ckpt_lid_vq"
    state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    prefix = "model.diffusion_model."
    net = UNetModel(**torch.load(oracle / "ldm_unet_A.pt", weights_only=True)["config"]).eval()
    net.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    sigmas = schedules.sigmas_from_alphas_cumprod(state["alphas_cumprod"].double()).float()
    return torch.load(folder / "io.pt", weights_only=True), net, sigmas, state


def test_the_noise_table_is_the_published_one(published):
    _, _, _, state = published
    betas = schedules.make_betas("linear", 1000, 0.0015, 0.0195)
    torch.testing.assert_close((1 - betas).cumprod(0).float(), state["alphas_cumprod"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine", "sqrt_linear", "sqrt"])
@pytest.mark.parametrize("length", [20, 1000])
def test_beta_schedules_match_the_published_ones(oracle, name, length):
    golden = torch.load(oracle / "more" / "ldm_ddpm_cosine.pt", weights_only=True)["beta_schedules"]
    reference = golden[f"{name}_{length}"]
    ours = schedules.make_betas(name, length, 1e-4, 2e-2)
    torch.testing.assert_close(ours, torch.as_tensor(reference).double(), rtol=1e-6, atol=1e-12)


def test_ddim_with_guidance_reproduces_the_published_sampler(published):
    io, net, sigmas, _ = published
    raw = io["raw"]
    denoiser = cfg(TableDenoiser(net, sigmas), {"crossattn": raw["uc"][:1]}, io["cfg_scale"])
    visited = schedules.table_sigmas(sigmas, io["S"], "legacy")
    start = io["x_T"] * (1 + visited[0] ** 2).sqrt()
    states: list[torch.Tensor] = []
    out = sample_euler(denoiser, start, visited, {"crossattn": raw["c"]}, callback=lambda i, x, x0: states.append(x))
    scale = (1 + visited[-1] ** 2).sqrt()
    assert relative(out / scale, raw["ddim"]) < 1e-5
    for state, sigma, golden in zip(states, visited[1:], raw["ddim_x_inter"][1:]):
        assert relative(state / (1 + sigma**2).sqrt(), golden) < 1e-5
    plain = sample_euler(TableDenoiser(net, sigmas), start, visited, {"crossattn": raw["c"]})
    assert relative(plain / scale, raw["ddim_no_cfg"]) < 1e-5


def test_stochastic_ddim_reproduces_the_published_sampler(published):
    io, net, sigmas, _ = published
    raw, golden = io["raw"], io["ddim_eta1"]
    denoiser = cfg(TableDenoiser(net, sigmas), {"crossattn": raw["uc"][:1]}, io["cfg_scale"])
    visited = schedules.table_sigmas(sigmas, io["S"], "legacy")
    start = io["x_T"] * (1 + visited[0] ** 2).sqrt()
    noise = golden["noises"]
    out = sample_ddim(denoiser, start, visited, {"crossattn": raw["c"]}, noise=lambda i: noise[i], eta=1.0)
    assert relative(out / (1 + visited[-1] ** 2).sqrt(), golden["out"]) < 1e-4


def test_the_training_loss_is_the_published_one(published):
    io, net, sigmas, _ = published
    golden = io["p_losses"]
    sigma = sigmas[golden["t"]]
    noisy = golden["x_start"] + sigma.view(-1, 1, 1, 1) * golden["noise"]
    estimate = TableDenoiser(net, sigmas)(noisy, sigma, {"crossattn": io["raw"]["c"]})
    loss = scaled_error(estimate, golden["x_start"], error_scale("eps", sigma))
    torch.testing.assert_close(loss.mean(), golden["loss"], rtol=1e-5, atol=0)


def gaussian(sigma_data: float = 0.5, mean: float = 0.3):
    """The exact denoiser of data ~ N(mean, sigma_data^2), and the exact endpoint of its ODE from x at sigma."""

    def denoiser(x, sigma, cond):
        s = sigma.view(-1, 1, 1, 1)
        return (sigma_data**2 * x + s**2 * mean) / (s**2 + sigma_data**2)

    def solution(x, sigma):
        return mean + (x - mean) * sigma_data / math.sqrt(sigma**2 + sigma_data**2)

    return denoiser, solution


@pytest.mark.parametrize(
    ("sampler", "order"), [(sample_euler, 1), (sample_heun, 2), (sample_dpmpp_2m, 2)], ids=["euler", "heun", "2m"]
)
def test_the_error_falls_with_the_solvers_order(sampler, order):
    denoiser, solution = gaussian()
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64) * 20
    errors = []
    for steps in (20, 40, 80):
        ramp = schedules.karras_sigmas(steps, 0.02, 20.0)[:-1].double()
        target = (solution(x, 20.0) - 0.3) / 0.5 * math.sqrt(0.02**2 + 0.25) + 0.3
        errors.append(float((sampler(denoiser, x, ramp, {}) - target).abs().max()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(slopes) > order - 0.35, slopes


def test_inversion_is_euler_upwards():
    denoiser, _ = gaussian()
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas = schedules.exponential_sigmas(400, 0.01, 20.0)[:-1].double()
    back = sample_euler(denoiser, sample_euler(denoiser, x, sigmas.flip(0), {}), sigmas, {})
    assert relative(back, x) < 2e-2


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "edm", "flow"])
def test_every_parameterisation_gives_x0_when_its_network_is_right(kind):
    torch.manual_seed(0)
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    sigmas = table()
    sigma = sigmas[torch.tensor([3, 400, 900])]
    s = sigma.view(-1, 1, 1, 1)
    target = {
        "eps": noise,
        "v": (noise - s * x0) / (1 + s**2).sqrt(),
        "x0": x0,
        "edm": ((x0 - (x0 + s * noise) * 0.25 / (s**2 + 0.25)) * (s**2 + 0.25).sqrt() / (s * 0.5)),
        "flow": noise - x0,
    }[kind]
    times = []

    def network(x, t):
        times.append(t)
        return target

    if kind == "edm":
        denoiser = EDMDenoiser(network, sigma_data=0.5)
    elif kind == "flow":
        denoiser = FlowDenoiser(network)
    else:
        denoiser = TableDenoiser(network, sigmas, kind)
    torch.testing.assert_close(denoiser(x0 + s * noise, sigma, {}), x0, rtol=1e-3, atol=1e-4)
    if kind in ("eps", "v", "x0"):
        assert times[0].tolist() == [3, 400, 900]
    # the scaled x0 error is the network's own error, for a network that errs by 1
    wrong = {"eps": TableDenoiser, "v": TableDenoiser, "x0": TableDenoiser}
    if kind in wrong:
        off = TableDenoiser(lambda x, t: target + 1, sigmas, kind)
        loss = scaled_error(off(x0 + s * noise, sigma, {}), x0, error_scale(kind, sigma))
        torch.testing.assert_close(loss, torch.ones(3), rtol=1e-3, atol=1e-3)


def test_min_snr_weights():
    sigma = torch.tensor([0.1, 1.0, 10.0])
    torch.testing.assert_close(min_snr_scale(sigma, 5.0, "eps"), torch.tensor([0.05, 1.0, 1.0]))
    torch.testing.assert_close(min_snr_scale(sigma, 5.0, "x0"), torch.tensor([5.0, 1.0, 0.01]))


def test_spacings():
    assert schedules.table_timesteps(1000, 10, "legacy") == list(range(1, 1000, 100))
    assert schedules.table_timesteps(1000, 10, "trailing") == list(range(99, 1000, 100))
    assert schedules.table_timesteps(1000, 3, "uniform") == [0, 500, 999]
    with pytest.raises(ValueError, match="legacy spacing leaves"):
        schedules.table_timesteps(1000, 1000, "legacy")
    with pytest.raises(ValueError, match="steps must be in"):
        schedules.table_timesteps(1000, 0)
    for steps in (1, 7, 30, 333, 1000):
        visited = schedules.table_sigmas(table(), steps)
        assert len(visited) == steps + 1
        assert (visited.diff() < 0).all()


def test_a_table_that_ends_at_infinity_is_refused():
    denoiser, _ = gaussian()
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        sample_euler(denoiser, torch.randn(1, 1, 2, 2), torch.tensor([math.inf, 1.0, 0.0]), {})


# --- noise -----------------------------------------------------------------------------------------------------


def test_noise_belongs_to_the_sample_and_to_the_position():
    together = sample_noise([5, 6, 7], (2, 4, 4))
    assert torch.equal(together[1:2], sample_noise([6], (2, 4, 4)))
    assert not torch.equal(together[:1], sample_noise([5], (2, 4, 4), stream=1))
    large = canvas_noise(3, 2, 150, 200)
    assert torch.equal(large[..., :70, :90], canvas_noise(3, 2, 70, 90))
    assert abs(float(large.std()) - 1) < 0.02


# --- tiling ----------------------------------------------------------------------------------------------------


def test_starts_cover_the_axis():
    for size in (32, 40, 57, 128):
        for starts in (
            fixed_starts(size, 32, 16),
            fixed_starts(size, 32, 32),
            *(drawn_starts(size, 32, s) for s in range(32)),
        ):
            covered = torch.zeros(size)
            for start in starts:
                assert 0 <= start <= size - 32
                covered[start : start + 32] += 1
            assert covered.min() >= 1
    with pytest.raises(ValueError, match="smaller than the window"):
        fixed_starts(16, 32, 16)


def per_pixel(x, sigma, cond):
    return x * 0.5 + cond["crossattn"].mean((1, 2)).view(-1, 1, 1, 1)


def constant_condition(corners):
    return {"crossattn": torch.ones(len(corners), 1, 3)}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_tiling_a_per_pixel_denoiser_changes_nothing(batch_size):
    x, sigma = torch.randn(2, 3, 56, 72), torch.tensor([2.0, 2.0])
    expected = per_pixel(x, sigma, {"crossattn": torch.ones(2, 1, 3)})
    for canvas in (
        tiled(per_pixel, 32, 8, constant_condition, batch_size),
        shifted(per_pixel, 32, constant_condition, batch_size),
    ):
        torch.testing.assert_close(canvas(x, sigma, {}), expected)


def test_a_canvas_of_one_window_is_the_untiled_sample():
    net = UNetModel(in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=[2],
                    channel_mult=[1, 2], num_heads=1, use_spatial_transformer=True, context_dim=8).eval()  # fmt: skip
    denoiser, condition = TableDenoiser(net, table()), torch.randn(1, 1, 8)
    sigmas = schedules.table_sigmas(table(), 4)
    x = torch.randn(1, 3, 16, 16) * sigmas[0]
    whole = sample_dpmpp_2m(denoiser, x, sigmas, {"crossattn": condition})
    for canvas in (
        shifted(denoiser, 16, lambda corners: {"crossattn": condition}),
        tiled(denoiser, 16, 8, lambda corners: {"crossattn": condition}),
    ):
        assert torch.equal(sample_dpmpp_2m(canvas, x, sigmas, {}), whole)


def test_features_row_col_condition_the_image_there():
    features = torch.arange(6.0).view(2, 3, 1)  # (rows=2, cols=3, D=1)
    field = FeatureField(features, (64, 96), 32)

    def paint(x, sigma, cond):
        return cond["crossattn"][:, 0, 0].view(-1, 1, 1, 1).expand_as(x)

    def at(corners):
        return {"crossattn": field.at(corners)[:, None]}

    image = tiled(paint, 32, 32, at)(torch.zeros(1, 1, 64, 96), torch.ones(1), {})
    assert image[0, 0, ::32, ::32].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_field_interpolates_and_fills_holes():
    features = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])  # (1, 2, 2)
    middle = [(0, 16)]
    torch.testing.assert_close(FeatureField(features, (32, 64), 32).at(middle), torch.tensor([[0.5, 0.5]]))
    half = math.sqrt(0.5)
    torch.testing.assert_close(FeatureField(features, (32, 64), 32, "slerp").at(middle), torch.tensor([[half, half]]))
    torch.testing.assert_close(slerp(features[0, :1], features[0, :1], torch.tensor([[0.3]])), features[0, :1])
    holed = features.clone()
    holed[0, 1] = float("nan")
    assert FeatureField(holed, (32, 64), 32).at([(0, 32)]).tolist() == [[0.0, 1.0]]
    glass = torch.tensor([7.0, 7.0])
    assert FeatureField(holed, (32, 64), 32, background=glass).at([(0, 32)]).tolist() == [[7.0, 7.0]]


def test_guidance_commutes_with_the_batch_and_scale_one_is_free():
    calls = []

    def denoiser(x, sigma, cond):
        calls.append(len(x))
        return x + cond["crossattn"].mean((1, 2)).view(-1, 1, 1, 1)

    x, sigma = torch.randn(3, 1, 2, 2), torch.ones(3)
    cond, null = {"crossattn": torch.randn(3, 1, 4)}, {"crossattn": torch.zeros(1, 1, 4)}
    assert cfg(denoiser, null, 1.0) is denoiser
    guided = cfg(denoiser, null, 3.0)(x, sigma, cond)
    assert calls == [6]
    torch.testing.assert_close(guided, x + 3 * cond["crossattn"].mean((1, 2)).view(-1, 1, 1, 1))


def test_the_variational_bound_is_the_divergence_of_the_two_gaussians():
    table = schedules.sigmas_from_alphas_cumprod((1 - schedules.make_betas("linear", 50)).cumprod(0)).float()
    x0, sigma = torch.rand(3, 3, 4, 4) * 2 - 1, table[[7, 30, 49]]
    exact = variational_bound(x0, x0, torch.zeros_like(x0), sigma, table)
    torch.testing.assert_close(exact, torch.zeros(3), atol=1e-6, rtol=0)
    estimate, place = x0 + 0.1 * torch.randn_like(x0), torch.rand_like(x0)
    found = variational_bound(x0, estimate, place, sigma, table)
    for b, t in enumerate((7, 30, 49)):
        s, t = table[t - 1].double(), table[t].double()
        small, large = s**2 * (t**2 - s**2) / t**2, (t**2 - s**2) * (1 + s**2) / (1 + t**2)
        width = (place[b] * large.log() + (1 - place[b]) * small.log()).exp().sqrt()
        means = (x0[b] * (1 - s**2 / t**2), estimate[b] * (1 - s**2 / t**2))
        true, model = torch.distributions.Normal(means[0], small.sqrt()), torch.distributions.Normal(means[1], width)
        expected = torch.distributions.kl_divergence(true, model).mean() / math.log(2)
        assert float(found[b]) == pytest.approx(float(expected), rel=1e-5)


def test_the_lowest_level_is_the_likelihood_of_pixels():
    table = schedules.sigmas_from_alphas_cumprod((1 - schedules.make_betas("linear", 50)).cumprod(0)).float()
    grays = (torch.arange(256.0) / 127.5 - 1).view(256, 1, 1, 1)
    estimate, place = torch.full_like(grays, 0.11), torch.full_like(grays, 0.4)
    bits = variational_bound(grays, estimate, place, table[:1].expand(256), table)
    assert float((0.5 ** bits.double()).sum()) == pytest.approx(1.0, abs=1e-3)  # the 256 levels share all mass
    assert int(bits.argmin()) == round((0.11 + 1) * 127.5)
