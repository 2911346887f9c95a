"""Policies of a step: parity with the published ones (pi-Flow), closed forms, and the loop that follows them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from published import load
from torch import Tensor

from ldm.diffusion import samplers
from ldm.diffusion.policies import (
    Draws,
    Imitation,
    clock,
    follow,
    grid_policy,
    level,
    mixture_policy,
    pieces,
    policy_sigmas,
)

FAR = 1e9  # the noise level that stands for the end of a flow, t = 1


def flat(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def level_of(t: Tensor) -> Tensor:
    """The noise level at a flow's time."""
    t = t.double()
    return torch.where(t >= 1, torch.full_like(t, FAR), t / (1 - t).clamp(min=1e-12))


@pytest.fixture(scope="module")
def published(shared):
    return load(shared("oracle") / "third" / "piflow_policies.pt")


class Step:
    """A published step in our coordinates, and its policies from what the network predicted, which are velocities."""

    def __init__(self, o):
        self.shift, self.start = o["shift"], level_of(o["sigma_src"])
        self.end = self.at(o["raw_t_src"] - o["segment_size"])
        x, t = o["x_src"].double(), o["sigma_src"].double().view(-1, 1, 1, 1, 1)
        self.x, self.given = x * flat(1 + self.start), {**o["gm"], "dx": o["dx"]}
        self.x0 = lambda velocity: x[:, None] - t * velocity
        self.t = t

    def at(self, raw: Tensor) -> Tensor:
        return level(raw.double(), self.shift)

    def policy(self, name: str, parts: dict[str, Tensor]):
        if name == "dx_grid":
            return grid_policy(self.x0(parts["dx"]), self.start, self.end, self.shift)
        log_std, log_weights = parts["logstds"] + self.t.log(), parts["logweights"]
        if name.startswith("gmflow_temperature"):
            heat = torch.tensor(float(name.rpartition("_")[2]), dtype=torch.float64)
            log_std, log_weights = log_std + heat.log() / 2, log_weights / heat
        return mixture_policy(self.x0(parts["means"]), log_std, log_weights, self.x, self.start)


@pytest.mark.parametrize("name", ["gmflow", "gmflow_temperature_0.3", "dx_grid"])
def test_policies_and_rollouts_are_the_published_ones(published, name):
    step, o = Step(published), published["policies"][name]
    policy = step.policy(name, {key: value.double() for key, value in step.given.items()})
    for x_t, t, velocity in zip(o["x_t"], o["sigma_t"], o["u"]):
        sigma = level_of(t)
        found = (x_t - policy(x_t * flat(1 + sigma), sigma, {})) / flat(t)
        assert (found - velocity).abs().max() <= 1e-5 * velocity.abs().max()
    end = step.at(o["rollout_end_raw_t"])
    substeps = ((published["raw_t_src"] - o["rollout_end_raw_t"]) * published["total_substeps"]).round()
    x = follow(policy, step.x, step.start, end, {}, substeps, step.shift) / flat(1 + end)
    assert (x - o["rollout_x"]).abs().max() <= 1e-5 * o["rollout_x"].abs().max()


@pytest.mark.parametrize("name", ["gmflow", "dx_grid"])
def test_the_imitation_loss_and_its_gradients_are_the_published_ones(published, name):
    step, o = Step(published), published["imitation"][name]
    used = ["dx"] if name == "dx_grid" else ["means", "logstds", "logweights"]
    parts = {key: step.given[key].double().requires_grad_() for key in used}
    answers = iter(zip(o["teacher_x"], o["teacher_t"], o["teacher_u"]))

    def teacher(x, sigma, cond):
        x_t, t, velocity = next(answers)
        assert (1000 * sigma / (1 + sigma) - t).abs().max() < 1e-3
        assert (x / flat(1 + sigma) - x_t).abs().max() <= 1e-5 * x_t.abs().max()
        return x / flat(1 + sigma) - flat(sigma / (1 + sigma)) * velocity

    imitation = Imitation(o["num_intermediate_states"], published["total_substeps"], o["window_substeps"], step.shift)
    draws = Draws(o["student_uniforms"].double(), o["teacher_uniforms"].double())
    end = step.at(o["raw_t_dst"])
    errors, x = imitation.compare(
        step.policy(name, parts), teacher, step.x, step.start, end, {}, {}, o["teacher_ratio"], draws
    )
    loss = 0.5 * o["loss_scale"] * errors.mean()
    assert abs(float(loss.detach()) / float(o["loss"]) - 1) < 1e-5
    assert (x / flat(1 + end) - o["x_dst"]).abs().max() <= 1e-5 * o["x_dst"].abs().max()
    loss.backward()
    wanted = {"dx": o["grad"]} if name == "dx_grid" else o["grad"]
    for key, value in parts.items():
        assert (value.grad - wanted[key]).abs().max() <= 5e-5 * wanted[key].abs().max(), key


def gaussian(mean: float, std: float):
    """The exact denoiser of images from N(mean, std^2)."""
    return lambda x, sigma, cond: (std**2 * x + flat(sigma) ** 2 * mean) / (std**2 + flat(sigma) ** 2)


def test_a_mixture_of_one_gaussian_is_its_exact_denoiser_at_every_level():
    mean, std = 0.3, 0.7
    start, x = torch.tensor([20.0, 5.0]).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64) * 5
    exact = gaussian(mean, std)
    variance = std**2 * start**2 / (std**2 + start**2)                          # of x0 once x is known
    for row in range(2):  # a sample's posterior is its own
        own = slice(row, row + 1)
        policy = mixture_policy(
            exact(x[own], start[own], {})[:, None], (variance[own].log() / 2).view(1, 1, 1, 1, 1),
            torch.zeros(1, 1, 1, 4, 4).double(), x[own], start[own],
        )  # fmt: skip
        for sigma in (5.0, 1.0, 0.1):
            y, at = torch.randn(1, 3, 4, 4).double(), torch.tensor([sigma]).double()
            assert torch.allclose(policy(y, at, {}), exact(y, at, {}), atol=1e-9)


def test_a_policy_that_is_the_teacher_ends_where_many_steps_of_the_teacher_do():
    teacher = gaussian(0.3, 0.7)
    sigmas = policy_sigmas(4, 50.0)
    x = 50 * torch.randn(2, 3, 4, 4)
    seen = []

    def student(x, start, end, cond):
        seen.append((float(start[0]), float(end[0])))
        return teacher

    found = samplers.sample_policy(student, x, sigmas, {}, substeps=400)
    exact = 0.3 + 0.7 * (x - 0.3) / (0.7**2 + 50.0**2) ** 0.5
    assert (found - exact).abs().max() < 0.01
    assert seen == [(float(a), float(b)) for a, b in pairwise(sigmas)]  # one call a step


def test_a_perfect_student_has_no_loss_and_another_one_has():
    teacher, mean = gaussian(0.3, 0.7), 0.3
    start, end = torch.tensor([20.0]), torch.tensor([1.0])
    x, draws = 20 * torch.randn(1, 3, 4, 4), Draws.of(1, 3, torch.Generator().manual_seed(0))
    imitation = Imitation(states=3, substeps=256, window=0)
    for share in (0.0, 0.4):
        same, _ = imitation.compare(teacher, teacher, x, start, end, {}, {}, share, draws)
        other, _ = imitation.compare(gaussian(mean + 1, 0.7), teacher, x, start, end, {}, {}, share, draws)
        assert float(same) < 0.01 < 0.1 < float(other)  # Euler steps of the teacher end a little beside its way


def test_steps_are_even_in_time_and_end_at_the_image():
    sigmas = policy_sigmas(3, 80.0, shift=2.0)
    lengths = -clock(sigmas, 2.0).diff()
    assert (float(sigmas[0]), float(sigmas[-1])) == (80.0, 0.0)
    assert torch.allclose(lengths / lengths[0], torch.tensor([1.0, 1.0, 0.5]), atol=1e-4)
    small = pieces(sigmas[0], sigmas[1], 5, 2.0)
    assert (small[0][0], small[-1][1]) == (sigmas[0], sigmas[1])
    assert all(before[1] == after[0] for before, after in pairwise(small))


def test_samples_are_followed_through_their_own_number_of_small_steps():
    teacher = gaussian(0.0, 1.0)
    start, end = torch.tensor([9.0, 4.0]), torch.tensor([0.5, 0.0])
    x = torch.randn(2, 1, 2, 2)
    both = follow(teacher, x, start, end, {}, torch.tensor([3, 7]))
    alone = [follow(teacher, x[i : i + 1], start[i : i + 1], end[i : i + 1], {}, torch.tensor([n]))
             for i, n in enumerate((3, 7))]  # fmt: skip
    assert torch.allclose(both, torch.cat(alone), atol=1e-6)
