"""Samplers and schedules: parity with the published loops, known orders on solvable data, images to start from."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from published import guided_diffusion_table, guided_diffusion_unet, invert, load, relative
from torch import Tensor

from ldm.diffusion import choices, samplers, schedules
from ldm.diffusion.denoiser import TableDenoiser
from ldm.diffusion.guidance import cfg, clip, keep_variance
from ldm.networks.unet import UNetModel
from ldm.sampling.guided import GuidedSolver

# --- parity: guided-diffusion (His-MMDM) --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def his(oracle):
    golden = load(oracle / "hismmdm_unet.pt")
    table = guided_diffusion_table()
    return golden, TableDenoiser(guided_diffusion_unet(golden), table), schedules.respaced_sigmas(table, "ddim10")


def test_respacing_is_guided_diffusions(his):
    golden, _, sigmas = his
    assert schedules.respaced_timesteps(1000, "ddim10") == golden["timestep_map"].tolist()
    torch.testing.assert_close(1 / (1 + sigmas[:-1].flip(0).double() ** 2), golden["alphas_cumprod"], rtol=1e-6, atol=0)
    sections = schedules.respaced_timesteps(300, "10,15,20")  # "the first 100 are strided to 10, .. 15, .. 20"
    assert [sections[i] for i in (0, 9, 10, 24, 25, 44)] == [0, 99, 100, 199, 200, 299]
    assert schedules.respaced_timesteps(1000, "1000") == list(range(1000))
    with pytest.raises(ValueError, match="no integer stride takes 300 steps"):
        schedules.respaced_timesteps(1000, "ddim300")
    with pytest.raises(ValueError, match="cannot give 600"):
        schedules.respaced_timesteps(1000, "10,600")


@pytest.mark.parametrize(("name", "wrap"), [("ddim_sample", clip), ("ddim_sample_noclip", lambda d: d)])
def test_ddim_reproduces_guided_diffusion(his, name, wrap):
    golden, denoiser, sigmas = his
    start = golden["x_T"] * (1 + sigmas[0] ** 2).sqrt()
    states: list[Tensor] = []
    out = samplers.sample_euler(
        wrap(denoiser), start, sigmas, {"label": golden["y"]}, callback=lambda i, x, x0: states.append(x)
    )
    assert relative(out, golden[name]) < 5e-5
    if name == "ddim_sample":
        for state, sigma, published in zip(states, sigmas[1:], golden["ddim_sample_intermediates"]):
            assert relative(state / (1 + sigma**2).sqrt(), published) < 5e-5


@pytest.mark.parametrize(
    ("name", "wrap", "tolerance"), [("ddim_reverse", clip, 1e-5), ("ddim_reverse_noclip", lambda d: d, 3e-5)]
)
def test_ddim_inversion_reproduces_guided_diffusion(his, name, wrap, tolerance):
    golden, denoiser, sigmas = his
    latent = invert(wrap(denoiser), golden["image"], sigmas, {"label": golden["y"]})
    assert relative(latent, golden[name]) < tolerance


def test_translation_by_inversion_reproduces_guided_diffusion(his):
    golden, denoiser, sigmas = his
    def forward(latent: Tensor) -> Tensor:
        start = latent * (1 + sigmas[0] ** 2).sqrt()
        return samplers.sample_euler(clip(denoiser), start, sigmas, {"label": golden["y_target"]})

    assert relative(forward(golden["ddim_reverse"]), golden["translated"]) < 1e-4
    # from our own latent, equal to 3e-6: this net multiplies rounding by 40 (in float64 the difference is 3.6e-4)
    latent = invert(clip(denoiser), golden["image"], sigmas, {"label": golden["y"]})
    assert relative(forward(latent), golden["translated"]) < 5e-4


def test_ancestral_sampling_with_learned_variance_reproduces_guided_diffusion(his):
    golden, denoiser, sigmas = his
    published = golden["p_sample_loop"]
    start = golden["x_T"] * (1 + sigmas[0] ** 2).sqrt()

    noises, cond = published["noises"], {"label": golden["y"]}
    joint = keep_variance(denoiser.with_variance, clip)
    out = samplers.sample_ddpm(joint, start, sigmas, cond, lambda step: noises[step], variance=None)
    assert relative(out, published["out"]) < 5e-5
    fixed = samplers.sample_ddpm(clip(denoiser), start, sigmas, cond, lambda step: noises[step])
    assert relative(fixed, published["out"]) > 1e-3
    with pytest.raises(ValueError, match="no learned variance"):
        TableDenoiser(lambda x, t: x, denoiser.table).with_variance(start, sigmas[:2], {})


# --- parity: CompVis -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.slow
def test_ancestral_sampling_reproduces_compvis(oracle, weights):
    golden = load(oracle / "more" / "ldm_ddpm_cosine.pt")
    run = golden["p_sample_loop" if weights == "raw" else "p_sample_loop_ema"]
    prefix = "model.diffusion_model."
    names = [key.removeprefix(prefix) for key in golden["state_dict"] if key.startswith(prefix)]
    source = {name: prefix + name for name in names}
    if weights == "ema":
        source = {name: "model_ema." + f"diffusion_model.{name}".replace(".", "") for name in names}
    params = golden["config"]["unet_config"]["params"]
    net = UNetModel(**params).eval()
    net.load_state_dict({name: golden["state_dict"][key] for name, key in source.items()})
    betas = schedules.make_betas("cosine", 20)
    table = schedules.sigmas_from_alphas_cumprod((1 - betas).cumprod(0)).float()
    sigmas = schedules.table_sigmas(table, 20)
    states: list[Tensor] = []
    out = samplers.sample_ddpm(
        clip(TableDenoiser(net, table)), run["x_T"] * (1 + sigmas[0] ** 2).sqrt(), sigmas, {},
        lambda step: run["noises"][step], callback=lambda i, x, x0: states.append(x),
    )  # fmt: skip
    assert relative(out, run["out"]) < 5e-5
    for state, sigma, published in zip(states, sigmas[1:], run.get("intermediates", [out])[1:]):
        assert relative(state / (1 + sigma**2).sqrt(), published) < 5e-5
    ddim = samplers.sample_ddim(
        clip(TableDenoiser(net, table)), run["x_T"] * (1 + sigmas[0] ** 2).sqrt(), sigmas, {},
        lambda step: run["noises"][step], eta=1.0,
    )  # fmt: skip
    assert relative(ddim, out) < 1e-4


def compvis(folder: Path, config: dict) -> TableDenoiser:
    state = load(folder / "model.ckpt")["state_dict"]
    prefix = "model.diffusion_model."
    net = UNetModel(**config).eval()
    net.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return TableDenoiser(net, schedules.sigmas_from_alphas_cumprod(state["alphas_cumprod"].double()).float())


def test_plms_reproduces_compvis(oracle):
    io = load(oracle / "ldm_ckpt_lid_vq" / "io.pt")
    denoiser = compvis(oracle / "ldm_ckpt_lid_vq", load(oracle / "ldm_unet_A.pt")["config"])
    sigmas = schedules.table_sigmas(denoiser.table, io["S"], "legacy")
    guided = cfg(denoiser, {"crossattn": io["raw"]["uc"][:1]}, io["cfg_scale"])
    start = io["x_T"] * (1 + sigmas[0] ** 2).sqrt()
    out = samplers.sample_plms(guided, start, sigmas, {"crossattn": io["raw"]["c"]})
    assert relative(out / (1 + sigmas[-1] ** 2).sqrt(), io["raw"]["plms"]) < 1e-5


@pytest.fixture(scope="module")
def concat(oracle):
    folder = oracle / "more" / "ldm_concat_ckpt"
    io = load(folder / "io.pt")
    denoiser = compvis(folder, dict(
        in_channels=6, out_channels=3, model_channels=32, attention_resolutions=[2], num_res_blocks=1,
        channel_mult=[1, 2], num_head_channels=32, resblock_updown=True,
    ))  # fmt: skip
    return io, denoiser, schedules.table_sigmas(denoiser.table, 10, "legacy")


def test_concatenated_conditions_and_step_noise_reproduce_compvis(concat):
    io, denoiser, sigmas = concat
    start, last = io["x_T"] * (1 + sigmas[0] ** 2).sqrt(), (1 + sigmas[-1] ** 2).sqrt()
    out = samplers.sample_euler(denoiser, start, sigmas, {"concat": io["c"]})
    assert relative(out / last, io["ddim"]) < 1e-5
    noises = io["ddim_eta1"]["noises"]
    out = samplers.sample_ddim(denoiser, start, sigmas, {"concat": io["c"]}, lambda step: noises[step])
    assert relative(out / last, io["ddim_eta1"]["out"]) < 1e-5


def test_inpainting_with_fresh_noise_reproduces_compvis(concat):
    """Their mask rule pastes x0 with new noise into x before each step."""
    io, denoiser, sigmas = concat
    run, start = io["ddim_mask"], io["x_T"] * (1 + sigmas[0] ** 2).sqrt()

    def pasted(x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        step = int((sigmas == sigma[0]).nonzero()[0, 0])
        known = run["x0"] + sigma[0] * run["q_noises"][step]
        found = denoiser(run["mask"] * known + (1 - run["mask"]) * x, sigma, cond)
        return run["mask"] * run["x0"] + (1 - run["mask"]) * found

    out = samplers.sample_euler(pasted, start, sigmas, {"concat": io["c"]}) / (1 + sigmas[-1] ** 2).sqrt()
    free = 1 - run["mask"]
    assert relative(out * free, run["out"] * free) < 1e-5


# --- orders on data whose solution is known ------------------------------------------------------------------------


STDS = torch.tensor([[0.2, 0.35], [0.6, 1.0]], dtype=torch.float64)            # one per pixel


def gaussian(std: float | Tensor, mean: float = 0.3):
    """The exact denoiser of N(mean, std^2) and the solution of its ODE from x at sigma down to target."""

    def denoiser(x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        return (std**2 * x + s**2 * mean) / (s**2 + std**2)

    def solution(x: Tensor, sigma: float, target: float) -> Tensor:
        return mean + (x - mean) * ((target**2 + std**2) / (sigma**2 + std**2)) ** 0.5

    return denoiser, solution


def mixture(means: tuple[float, ...] = (-1.0, 0.2, 1.1), std: float = 0.15):
    """The exact denoiser of an even mixture of Gaussians, pixel by pixel."""

    def denoiser(x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        s2 = sigma.view(-1, 1, 1, 1).to(x) ** 2
        centres = torch.tensor(means, dtype=x.dtype).view(-1, 1, 1, 1, 1)
        weights = (-((x - centres) ** 2) / (2 * (s2 + std**2))).softmax(0)
        return (weights * (std**2 * x + s2 * centres) / (s2 + std**2)).sum(0)

    return denoiser


def silent(step: int) -> Tensor:
    raise AssertionError("a deterministic sampler draws no noise")


def deterministic(sampler, *extra, **options):
    return lambda denoiser, x, sigmas: sampler(denoiser, x, sigmas, {}, *extra, **options)


SOLVERS = {
    "euler": (deterministic(samplers.sample_euler), 1),
    "ddim": (deterministic(samplers.sample_ddim, silent, eta=0.0), 1),
    "heun": (deterministic(samplers.sample_heun), 2),
    "dpmpp_2m": (deterministic(samplers.sample_dpmpp_2m), 2),
    "dpmpp_2m_sde": (deterministic(samplers.sample_dpmpp_2m_sde, silent, eta=0.0), 2),
    "dpmpp_3m_sde": (deterministic(samplers.sample_dpmpp_3m_sde, silent, eta=0.0), 3),
    "unipc_1": (deterministic(samplers.sample_unipc, order=1), 2),
    "unipc_2": (deterministic(samplers.sample_unipc, order=2), 3),
    "unipc_3": (deterministic(samplers.sample_unipc, order=3), 4),
}


def slopes(errors: list[float]) -> list[float]:
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize("name", SOLVERS)
def test_the_error_falls_with_the_solvers_order(name):
    """UniPC's corrector gives it an order more than its predictor has. The start is so noisy that the lower order of a
    multistep's first steps does not show."""
    sampler, order = SOLVERS[name]
    denoiser, solution = gaussian(STDS)
    x = torch.linspace(-1200, 1200, 16, dtype=torch.float64).view(4, 1, 2, 2)
    errors = []
    for steps in (60, 120, 240):
        sigmas = torch.linspace(math.log(400), math.log(0.02), steps + 1, dtype=torch.float64).exp()
        errors.append(float((sampler(denoiser, x, sigmas) - solution(x, 400.0, 0.02)).abs().max()))
    assert min(slopes(errors)) > order - 0.4, (slopes(errors), errors)


def mixture_error(sampler, steps: int) -> float:
    denoiser = mixture()
    x = torch.linspace(-30, 30, 1024, dtype=torch.float64).view(1, 1, 32, 32)
    fine = torch.linspace(math.log(10), math.log(0.01), 801, dtype=torch.float64).exp()
    exact = samplers.sample_heun(denoiser, x, fine, {})
    sigmas = torch.linspace(math.log(10), math.log(0.01), steps + 1, dtype=torch.float64).exp()
    return float((sampler(denoiser, x, sigmas) - exact).square().mean().sqrt())


@pytest.mark.slow
def test_twenty_steps_of_second_order_are_within_the_error_of_a_hundred_of_ddim():
    ddim = mixture_error(SOLVERS["ddim"][0], 100)
    for name in ("dpmpp_2m", "dpmpp_3m_sde", "unipc_2", "unipc_3"):
        error = mixture_error(SOLVERS[name][0], 20)
        assert error < ddim / 2, (name, error, ddim)


def test_optimised_steps_lower_the_error_on_data_that_they_were_not_made_for():
    """The table comes from one Gaussian field; here are single Gaussians of other widths, and a mixture."""
    denoiser, solution = gaussian(STDS)
    x = 15 * torch.linspace(-2, 2, 64, dtype=torch.float64).view(16, 1, 2, 2)
    many = samplers.sample_heun(mixture(), x, schedules.exponential_sigmas(600, 0.04, 15.0).double(), {})
    for steps in (10, 20):
        errors = {}
        for name in ("karras", "optimised"):
            sigmas = getattr(schedules, f"{name}_sigmas")(steps, 0.04, 15.0).double()
            assert len(sigmas) == steps + 1
            assert (sigmas.diff() < 0).all()
            torch.testing.assert_close(sigmas[[0, -2]], torch.tensor([15.0, 0.04]).double(), rtol=1e-5, atol=0)
            a = samplers.sample_dpmpp_2m(denoiser, x, sigmas, {}) - solution(x, 15.0, 0.0)
            b = samplers.sample_dpmpp_2m(mixture(), x, sigmas, {}) - many
            errors[name] = float(a.square().mean().sqrt()), float(b.square().mean().sqrt())
        for model in (0, 1):
            assert errors["optimised"][model] < 0.75 * errors["karras"][model], errors
    wide = schedules.optimised_sigmas(10, 1e-4, 1e4)
    assert (float(wide[0]), float(wide[-2])) == (pytest.approx(160), pytest.approx(0.002))


def test_multistep_formulas_against_their_papers():
    """Deterministic limits: 2M SDE at eta 0 is 2M; UniPC's first step is DDIM's."""
    denoiser = mixture()
    x, sigmas = torch.randn(2, 1, 4, 4).double() * 10, schedules.karras_sigmas(7, 0.02, 10.0).double()
    a = samplers.sample_dpmpp_2m(denoiser, x, sigmas, {})
    b = samplers.sample_dpmpp_2m_sde(denoiser, x, sigmas, {}, silent, eta=0.0)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    one = samplers.sample_unipc(denoiser, x, sigmas[:2], {})
    torch.testing.assert_close(one, samplers.sample_euler(denoiser, x, sigmas[:2], {}), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="order of UniPC"):
        samplers.sample_unipc(denoiser, x, sigmas, {}, order=4)


def test_ddim_with_eta_is_euler_ancestral():
    """k-diffusion's get_ancestral_step, from its description."""
    denoiser = mixture()
    x, sigmas = torch.randn(2, 1, 4, 4).double() * 10, schedules.karras_sigmas(9, 0.02, 10.0).double()
    noises, eta = torch.randn(9, 2, 1, 4, 4).double(), 0.7
    theirs = x
    for i, (a, b) in enumerate(pairwise(sigmas)):
        up = min(b, eta * (b**2 * (a**2 - b**2) / a**2).sqrt())
        d = (theirs - denoiser(theirs, a.expand(2), {})) / a
        theirs = theirs + d * ((b**2 - up**2).sqrt() - a) + noises[i] * up * (b > 0)
    ours = samplers.sample_ddim(denoiser, x, sigmas, {}, lambda step: noises[step], eta=eta)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def stochastic(sampler, **options):
    return lambda denoiser, x, sigmas, noise: sampler(denoiser, x, sigmas, {}, noise, **options)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (stochastic(samplers.sample_ddim), 100), (stochastic(samplers.sample_ddpm), 100),
        (stochastic(samplers.sample_ddpm, variance=1.0), 400), (stochastic(samplers.sample_dpmpp_2m_sde), 30),
        (stochastic(samplers.sample_dpmpp_3m_sde), 30), (stochastic(samplers.sample_dpmpp_2m_sde, eta=0.5), 30),
    ],
    ids=["ddim", "ddpm_small", "ddpm_large", "2m_sde", "3m_sde", "2m_sde_half"],
)  # fmt: skip
@pytest.mark.slow
def test_stochastic_samplers_draw_from_the_data(sampler, steps):
    """Mean, spread and the share of each mode of 40 000 pixels."""
    generator = torch.Generator().manual_seed(3)
    x = 20 * torch.randn(1, 1, 200, 200, generator=generator)
    sigmas = schedules.exponential_sigmas(steps, 0.01, 20.0)

    def noise(step: int) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    out = sampler(mixture(), x, sigmas, noise)
    nearest = (out.flatten()[:, None] - torch.tensor([-1.0, 0.2, 1.1])).abs()
    assert nearest.argmin(1).bincount().div(out.numel()).sub(1 / 3).abs().max() < 0.03
    assert abs(float(nearest.min(1).values.square().mean().sqrt()) - 0.15) < 0.02


def test_the_sde_solvers_beat_ancestral_steps():
    """On the spread of samples of a Gaussian, at few steps."""
    std, steps = 0.5, 12
    denoiser, _ = gaussian(std)
    sigmas = torch.linspace(math.log(20), math.log(0.02), steps + 1, dtype=torch.float64).exp()

    def spread(sampler) -> float:  # linear in x and in each noise: impulse responses give the exact variance
        total = 0.0
        for k in range(-1, steps):
            x = torch.full((1, 1, 1, 1), 0.3 + (20.0 if k < 0 else 0.0), dtype=torch.float64)
            out = sampler(denoiser, x, sigmas, lambda step, k=k: torch.full((1, 1, 1, 1), float(step == k)))
            total += float(out.sum() - 0.3) ** 2
        return abs(math.sqrt(total) - math.sqrt(std**2 + 0.02**2))

    names = ("ddim", "dpmpp_2m_sde", "dpmpp_3m_sde")
    ancestral, second, third = (spread(stochastic(getattr(samplers, f"sample_{name}"))) for name in names)
    assert ancestral > 3 * max(second, third)


# --- starting points and known regions -----------------------------------------------------------------------------


def test_a_sampler_starts_from_an_image_at_any_level():
    sigmas = schedules.karras_sigmas(20, 0.02, 20.0)
    assert torch.equal(schedules.sigmas_from(sigmas, 1.0), sigmas)
    assert torch.equal(schedules.sigmas_from(sigmas, 0.25), sigmas[15:])
    assert len(schedules.sigmas_from(sigmas, 0.001)) == 2
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match="strength"):
            schedules.sigmas_from(sigmas, strength)
    denoiser, noise = mixture(), torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    image = torch.full((1, 1, 32, 32), 0.2)
    kept = []
    for strength in (0.2, 0.5, 1.0):
        part = schedules.sigmas_from(sigmas, strength)
        out = samplers.sample_dpmpp_2m(denoiser, image + part[0] * noise, part, {})
        kept.append(float(((out - 0.2).abs() < 0.45).float().mean()))
    assert kept[0] > 0.99
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde", "plms", "unipc"])
def test_infinite_sigmas_are_refused(name):
    extra = [silent] if name in ("ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde") else []
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        getattr(samplers, f"sample_{name}")(
            mixture(), torch.randn(1, 1, 2, 2), torch.tensor([math.inf, 1.0, 0.0]), {}, *extra
        )


def test_every_solver_is_run_by_its_name():
    x, sigmas = torch.full((1, 1, 4, 4), 5.0), schedules.karras_sigmas(25, 0.01, 20.0)
    for solver in choices.SOLVERS:
        steps: list[int] = []
        run = GuidedSolver(solver, 0.0, mixture())
        out = run.solve(x, sigmas, {}, lambda step: torch.zeros_like(x), lambda i, *_, s=steps: s.append(i))
        assert steps == list(range(25))
        assert (out.view(-1, 1) - torch.tensor([-1.0, 0.2, 1.1])).abs().min(1).values.max() < 0.6, solver
