"""Tiling: the published large image, what a canvas owes its windows, blends."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from published import load, relative
from torch import Tensor

from ldm.diffusion import samplers, schedules
from ldm.diffusion.denoiser import TableDenoiser
from ldm.diffusion.fields import FeatureField
from ldm.diffusion.guidance import cfg, compose, within
from ldm.diffusion.tiled import BLENDS, drawn_starts, fixed_starts, shifted, smooth_weight, tiled, window_conds
from ldm.networks.unet import UNetModel
from ldm.rng import canvas_noise

# --- the published large image (Large-Image-Diffusion) --------------------------------------------------------------


@pytest.fixture(scope="module")
def large(oracle):
    """get_panorama's net, noise and conditions, set as that code is: windows of 64 every 16; its guidance w = 3 is
    scale 4; its net sees t where the tables are read at t - 1; embeddings slerped at the windows' corners."""
    golden = load(oracle / "lid_large_image.pt")
    state = load(oracle / "ldm_ckpt_lid_vq" / "model.ckpt")["state_dict"]
    prefix = "model.diffusion_model."
    net = UNetModel(**load(oracle / "ldm_unet_A.pt")["config"]).eval()
    net.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    betas = schedules.make_betas("linear", 1000, 0.0015, 0.0195).float()
    table = schedules.sigmas_from_alphas_cumprod((1 - betas).cumprod(0))  # their cumprod is in float32
    late = TableDenoiser(lambda x, t, **cond: net(x, t + 1, **cond), table)
    field = FeatureField(golden["embeddings"].view(2, 2, 24), (128, 128), 64, "slerp")
    weight, bias = state["cond_stage_model.patch_fc.weight"], state["cond_stage_model.patch_fc.bias"]

    def condition(corners):
        return {"crossattn": F.linear(F.normalize(field.at(corners), dim=1), weight, bias)[:, None]}

    torch.testing.assert_close(
        condition([(row, col) for row in range(0, 65, 16) for col in range(0, 65, 16)])["crossattn"],
        golden["window_context"],
    )
    guided = cfg(late, {"crossattn": golden["uncond_context"]}, 1 + golden["params"]["guidance"])
    canvas = tiled(guided, 64, golden["params"]["sliding_window_size"], condition, batch_size=7)
    start = golden["init_epsilon"] * table[-1] + golden["init_randn"]
    return golden, canvas, table, betas, start


@pytest.mark.slow
def test_the_published_large_image(large):
    golden, canvas, table, _, start = large
    visited = torch.tensor(golden["ddim=0"]["t_range"]) - 1
    sigmas = torch.cat([table[visited], torch.zeros(1)])
    out = samplers.sample_euler(canvas, start, sigmas, {})
    assert relative(out, golden["ddim=0"]["latent"]) < 1e-5


@pytest.mark.slow
def test_the_published_stochastic_large_image(large):
    """Its noise at a step of any stride has the variance of a single step, beta_t(1-abar_prev)/(1-abar): as eta."""
    golden, canvas, table, betas, x = large
    visited = torch.tensor(golden["ddim=1"]["t_range"]) - 1
    sigmas = torch.cat([table[visited], torch.zeros(1)])
    noises = golden["ddim=1"]["step_noise"]
    for step in range(len(visited)):
        sigma, target = sigmas[step : step + 2]
        ancestral = 1 - (1 + target**2) / (1 + sigma**2)  # the stride's own beta
        eta = float((betas[visited[step]] / ancestral).sqrt())
        x = samplers.sample_ddim(canvas, x, sigmas[step : step + 2], {}, lambda _, k=step: noises[k], eta=eta)
    assert relative(x, golden["ddim=1"]["latent"]) < 1e-5


# --- a small real network -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A tiny UNet of every condition: one token, an added vector, two concatenated channels."""
    torch.manual_seed(0)
    net = UNetModel(
        in_channels=5, out_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=[2],
        channel_mult=[1, 2], num_heads=2, use_spatial_transformer=True, context_dim=8,
    ).eval()  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.08) if parameter.ndim > 1 else None
    betas = schedules.make_betas("linear", 1000, 0.0015, 0.0195)
    return TableDenoiser(net, schedules.sigmas_from_alphas_cumprod((1 - betas).cumprod(0)).float())


def canvas_cond(count: int, height: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "crossattn": torch.randn(count, 1, 8, generator=generator),
        "vector": torch.randn(count, 128, generator=generator),
        "concat": torch.randn(count, 2, height, width, generator=generator),
    }


def sigmas_of(denoiser: TableDenoiser, steps: int = 3) -> Tensor:
    return schedules.table_sigmas(denoiser.table, steps)


@pytest.mark.parametrize(
    "make",
    [lambda d, n: tiled(d, 16, 8, batch_size=n), lambda d, n: shifted(d, 16, batch_size=n)],
    ids=["tiled", "shifted"],
)
@pytest.mark.slow
def test_chunks_and_batches_do_not_change_the_image(small, make):
    cond, sigmas = canvas_cond(2, 24, 40), sigmas_of(small)
    x = torch.cat([canvas_noise(seed, 3, 24, 40) for seed in (0, 1)]) * sigmas[0]
    whole = samplers.sample_dpmpp_2m(make(small, 64), x, sigmas, cond)
    for batch_size in (1, 5):
        out = samplers.sample_dpmpp_2m(make(small, batch_size), x, sigmas, cond)
        torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    second = {part: value[1:] for part, value in cond.items()}
    out = samplers.sample_dpmpp_2m(make(small, 5), x[1:], sigmas, second)
    torch.testing.assert_close(out, whole[1:], rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize(
    "make",
    [lambda d: tiled(d, 16, 8), lambda d: tiled(d, 16, 8, blend="smooth"), lambda d: shifted(d, 16)],
    ids=["uniform", "smooth", "shifted"],
)
def test_guidance_and_tiling_commute(small, make):
    cond, sigmas = canvas_cond(1, 24, 40), sigmas_of(small)
    null = {"crossattn": torch.zeros(1, 1, 8), "vector": torch.zeros(1, 128)}
    x = canvas_noise(3, 3, 24, 40) * sigmas[0]
    outside = samplers.sample_euler(cfg(make(small), {**null, "concat": cond["concat"]}, 3.0), x, sigmas, cond)

    def inside(x, sigma, cond):  # each window's own concatenated image stays with it
        return cfg(small, {**null, "concat": cond["concat"]}, 3.0)(x, sigma, cond)

    torch.testing.assert_close(
        samplers.sample_euler(make(inside), x, sigmas, cond), outside, rtol=1e-4, atol=1e-4 * float(outside.abs().max())
    )


@pytest.mark.parametrize("make", [lambda d: tiled(d, 16, 8), lambda d: shifted(d, 16)], ids=["tiled", "shifted"])
@pytest.mark.slow
def test_scales_of_their_own_and_intervals_commute_with_tiling(small, make):
    cond, sigmas = canvas_cond(1, 24, 40), sigmas_of(small)
    cond.pop("concat")
    narrow = TableDenoiser(lambda x, t, **kw: small.network(torch.cat([x, x[:, :2]], 1), t, **kw), small.table)
    null = {"crossattn": torch.zeros(1, 1, 8), "vector": torch.zeros(1, 128)}
    terms = [({"vector": null["vector"]}, 3.0), ({"crossattn": null["crossattn"]}, 1.5)]
    x, (low, high) = canvas_noise(3, 3, 24, 40) * sigmas[0], (float(sigmas[2]), float(sigmas[1]))
    outside = within(compose(make(narrow), null, terms), make(narrow), low - 1e-3, high + 1e-3)
    inside = make(within(compose(narrow, null, terms), narrow, low - 1e-3, high + 1e-3))
    a, b = (samplers.sample_euler(denoiser, x, sigmas, cond) for denoiser in (outside, inside))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
    assert not torch.allclose(a, samplers.sample_euler(make(narrow), x, sigmas, cond), rtol=1e-2)


@pytest.mark.parametrize(
    "make",
    [lambda d: tiled(d, 16, 8), lambda d: tiled(d, 16, 4, blend="smooth"), lambda d: shifted(d, 16, seed=4)],
    ids=["uniform", "smooth", "shifted"],
)
def test_a_canvas_of_one_window_is_the_untiled_sample_bitwise(small, make):
    cond, sigmas = canvas_cond(1, 16, 16), sigmas_of(small)
    x = canvas_noise(0, 3, 16, 16) * sigmas[0]
    untiled = samplers.sample_unipc(small, x, sigmas, cond)
    assert torch.equal(samplers.sample_unipc(make(small), x, sigmas, cond), untiled)


def blur(x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
    """A denoiser that sees five pixels each way, as far as its window goes."""
    return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


def test_a_larger_canvas_continues_a_smaller_one():
    """The noise belongs to the position and windows see the same surroundings, so the field is the same inland."""
    sigma = torch.ones(1)
    small, large = canvas_noise(0, 3, 48, 48), canvas_noise(0, 3, 80, 64)
    for canvas in (tiled(blur, 16, 8), tiled(blur, 16, 8, blend="smooth")):
        a, b = canvas(small, sigma, {}), canvas(large, sigma, {})
        torch.testing.assert_close(a[..., :32, :32], b[..., :32, :32])


def test_shifted_windows_agree_on_the_field_wherever_they_lie():
    x, sigma = canvas_noise(0, 3, 96, 96), torch.ones(1)
    exact = blur(x, sigma, {})
    fields = torch.stack([shifted(blur, 32, seed=seed)(x, sigma, {}) for seed in range(8)])
    off = (fields - exact).square()  # where windows meet alone
    assert (off > 1e-9).float().mean((1, 2, 3, 4)).max() < 0.5
    assert (fields.mean(0) - exact).square().mean() < 0.4 * off.mean()  # which is elsewhere each time
    assert len({float(field.sum()) for field in fields}) == 8
    assert not torch.equal(shifted(blur, 32)(x, sigma, {}), shifted(blur, 32)(x, 2 * sigma, {}))


def test_drawn_windows_overlap_everywhere_and_grow_in_number_as_the_axis_does():
    for window in (1, 3, 7, 8, 16, 32, 64):
        for size in (*range(window, 6 * window), 40 * window):
            starts = drawn_starts(size, window, size, 1)
            gaps = torch.tensor(starts).diff()
            assert (starts[0], starts[-1]) == (0, size - window)
            assert len(gaps) <= 1 or 0 < gaps.min() <= gaps.max() <= window - window // 8
    per_axis = [len(drawn_starts(count * 32, 32, 0)) / count for count in (4, 8, 16)]
    assert per_axis == [1.25] * 3
    places = torch.tensor([drawn_starts(512, 32, seed) for seed in range(64)]).float().std(0)
    assert places[5:-5].min() > 2  # they move, in the middle as well
    assert drawn_starts(512, 32, 4, 5) == drawn_starts(512, 32, 4, 5) != drawn_starts(512, 32, 4, 6)


def test_smooth_weights_hide_where_windows_meet():
    x, sigma = canvas_noise(0, 3, 32, 128), torch.ones(1)
    exact = blur(x, sigma, {})
    off = {blend: float((tiled(blur, 32, 24, blend=blend)(x, sigma, {}) - exact).square().mean()) for blend in BLENDS}
    assert off["smooth"] < 0.4 * off["uniform"], off


# --- blends -------------------------------------------------------------------------------------------------------


def test_starts_cover_the_axis():
    for size in (32, 40, 57, 128):
        for stride in (1, 8, 32):
            starts = fixed_starts(size, 32, stride)
            assert (starts[0], starts[-1]) == (0, size - 32)
            assert all(0 < b - a <= stride for a, b in pairwise(starts))
    with pytest.raises(ValueError, match="a canvas side of 16 is smaller than the window of 32"):
        fixed_starts(16, 32, 8)
    with pytest.raises(ValueError, match="blend must be one of uniform, smooth"):
        tiled(blur, 16, 8, blend="gaussian")


@pytest.mark.parametrize("blend", ["uniform", "smooth"])
def test_every_pixel_weighs_one(blend):
    """A denoiser of each pixel by itself is the same tiled, at every blend and batch; so is what it gives beside x0."""
    x, sigma = torch.randn(2, 3, 37, 50), torch.ones(2)
    for canvas in (
        lambda d: tiled(d, 16, 5, blend=blend, batch_size=4),
        lambda d: tiled(d, 16, 16, blend=blend),
        lambda d: shifted(d, 16, seed=3),
        lambda d: shifted(d, 32),
    ):
        torch.testing.assert_close(canvas(lambda x, sigma, cond: 0.5 * x)(x, sigma, {}), 0.5 * x)
        x0, variance = canvas(lambda x, sigma, cond: (0.5 * x, x**2))(x, sigma, {})
        torch.testing.assert_close(x0, 0.5 * x)
        torch.testing.assert_close(variance, x**2)


def test_smooth_weights_fall_towards_inner_sides_alone():
    assert torch.equal(smooth_weight(16, first=True, last=True), torch.ones(16))
    left, middle = smooth_weight(16, first=True), smooth_weight(16)
    assert torch.equal(left[:8], torch.ones(8))
    assert left[15] < 0.01
    assert middle[0] < 0.01
    torch.testing.assert_close(middle, middle.flip(0))
    torch.testing.assert_close(middle[:8] + middle[8:], torch.ones(8))  # a stride of half a window sums to one


def test_smooth_blends_have_no_steps():
    """Windows that disagree: the step at a window's side is smaller than with uniform weights."""

    def tone(x, sigma, cond):
        return cond["crossattn"].view(-1, 1, 1, 1).expand_as(x)

    def along(corners):
        return {"crossattn": torch.tensor([column / 64 for _, column in corners]).view(-1, 1, 1)}

    uniform, smooth = (
        tiled(tone, 16, 8, along, blend=blend)(torch.zeros(1, 1, 16, 80), torch.ones(1), {})
        for blend in ("uniform", "smooth")
    )
    assert smooth.diff(dim=-1).abs().max() < 0.5 * uniform.diff(dim=-1).abs().max()


# --- the condition of a canvas --------------------------------------------------------------------------------------


def test_holes_are_conditioned_as_background():
    features = torch.tensor([[[1.0], [float("nan")]], [[2.0], [3.0]]])
    field = FeatureField(features, (64, 64), 32, background=torch.tensor([-1.0]))

    def paint(x, sigma, cond):
        return cond["crossattn"].view(-1, 1, 1, 1).expand_as(x)

    image = tiled(paint, 32, 32, lambda corners: {"crossattn": field.at(corners)})(
        torch.zeros(1, 1, 64, 64), torch.ones(1), {}
    )
    assert image[0, 0, ::32, ::32].tolist() == [[1, -1], [2, 3]]


def test_parts_of_the_canvas_go_before_the_windows_condition():
    seen = {}

    def watch(x, sigma, cond):
        seen.update(cond)
        return x

    def condition(corners):
        return {"crossattn": torch.zeros(len(corners), 1, 2), "vector": torch.zeros(len(corners), 2)}

    cond = {"vector": torch.ones(1, 2), "concat": torch.arange(16.0).expand(1, 1, 8, 16)}
    tiled(watch, 8, 8, condition)(torch.zeros(1, 1, 8, 16), torch.ones(1), cond)
    assert seen["crossattn"].sum() == 0
    assert seen["vector"].tolist() == [[1, 1], [1, 1]]
    assert seen["concat"][:, 0, 0, 0].tolist() == [0, 8]


def test_parts_of_a_composed_condition_are_windowed_like_their_own():
    corners, maps, vectors = [(0, 0), (16, 5)], torch.randn(2, 2, 32, 32), torch.randn(2, 4)
    cond = {"mask/concat": maps, "class/vector": vectors, "target": torch.tensor([3, 1])}
    found = window_conds(cond, [1, 0], corners, 16)
    assert torch.equal(found["mask/concat"][0], maps[1, :, :16, :16])
    assert torch.equal(found["mask/concat"][1], maps[0, :, 16:, 5:21])
    assert torch.equal(found["class/vector"], vectors.flip(0))
    assert found["target"].tolist() == [1, 3]
