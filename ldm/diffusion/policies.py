"""Policies: what a student's one network call gives for a whole step (pi-Flow, arXiv:2510.14974).

A policy is a denoiser(x, sigma, cond) -> x0 for the noise levels of its step, start >= sigma > end, that calls no
network: it is followed through many small steps for the price of one evaluation. Coordinates are variance-exploding as
everywhere (x = x0 + sigma*n); in the published ones, x_t = (1-t)*x0 + t*n, sigma = t/(1-t).

    student(x, start, end, cond) -> policy                             one network call, see `samplers.sample_policy`
    policy(x, sigma, cond) -> x0                                       any number of times
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser, per_sample
from ldm.diffusion.guidance import clip
from ldm.errors import UserError

Policies = Callable[[Tensor, Tensor, Tensor, Cond], Denoiser]  # (x, start, end, cond): of one step
POLICIES = ("mixture", "grid")


def clock(sigma: Tensor, shift: float = 1.0) -> Tensor:
    """Time 0..1 of noise levels along which steps and small steps are even: sigma / (sigma + shift).

    With shift 1 it is the time of a flow; shift s is its timestep shift (arXiv:2403.03206, equation 23) undone, which
    leaves more of the steps to noise above s.

    >>> clock(torch.tensor([0.0, 3.0, 9.0]), shift=3.0)
    tensor([0.0000, 0.5000, 0.7500])
    """
    return sigma / (sigma + shift)


def level(time: Tensor, shift: float = 1.0) -> Tensor:
    """The noise level at a time of `clock`, its inverse.

    >>> level(torch.tensor([0.0, 0.5, 0.75]), shift=3.0)
    tensor([0., 3., 9.])
    """
    return shift * time / (1 - time)


def policy_sigmas(steps: int, sigma_max: float, shift: float = 1.0, last: float = 0.5) -> Tensor:
    """Descending sigmas (steps+1,) from sigma_max to 0: even steps of `clock`, the last `last` times as long.

    >>> policy_sigmas(2, sigma_max=99.0)
    tensor([99.0000,  0.4925,  0.0000])
    """
    lengths = torch.ones(steps, dtype=torch.float64)
    lengths[-1] = last if steps > 1 else 1.0
    first = clock(torch.tensor(sigma_max, dtype=torch.float64), shift)
    left = lengths.flip(0).cumsum(0).flip(0) / lengths.sum() * first
    return torch.cat([torch.tensor([sigma_max]), level(left[1:], shift), torch.zeros(1)]).float()


def clipped(policies: Policies) -> Policies:
    """Policies whose images stay in [-1,1], as those of models of pixels do (`guidance.clip`).

    >>> wild = clipped(lambda x, start, end, cond: lambda y, sigma, cond: y)
    >>> wild(torch.ones(1), torch.ones(1), torch.zeros(1), {})(torch.full((1,), 5.0), torch.ones(1), {})
    tensor([1.])
    """
    return lambda *step: clip(policies(*step))


def mixture_policy(means: Tensor, log_std: Tensor, log_weights: Tensor, x: Tensor, sigma: Tensor) -> Denoiser:
    """The mean of x0 given x at `sigma` and at lower levels, where the network says that x0 is a mixture of Gaussians.

    At `sigma` itself it is the mixture's mean; further down x tells more, and the policy goes towards the components
    that it has come near (arXiv:2510.14974, section 3.2).

    Args:
        means: (B,K,C,H,W) of x0. log_std: (B,1,1,1,1), of all components, in units of x0. log_weights: (B,K,1,H,W), to
            a constant. x, sigma: (B,C,H,W) and (B,), where the network was called.

    >>> means = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1, 1)
    >>> log_std, even, start = torch.full((1, 1, 1, 1, 1), -5.0), torch.zeros(1, 2, 1, 1, 1), torch.tensor([10.0])
    >>> policy = mixture_policy(means, log_std, even, torch.zeros(1, 1, 1, 1), start)
    >>> [round(float(policy(torch.full((1, 1, 1, 1), 0.1), torch.tensor([s]), {})), 3) for s in (10.0, 1.0, 0.1)]
    [0.001, 0.1, 1.0]
    """
    variance, at = (2 * log_std).exp(), per_sample(sigma, means)

    def policy(y: Tensor, level: Tensor, cond: Cond) -> Tensor:
        now = per_sample(level, means)
        more = 1 / now**2 - 1 / at**2                                           # precision that x adds to that of start
        told = (y / per_sample(level, y) ** 2 - x / per_sample(sigma, x) ** 2)[:, None]  # (B,1,C,H,W)
        share = 1 / (1 + variance * more)
        fit = (means * told).sum(2, keepdim=True) - more / 2 * means.square().sum(2, keepdim=True)
        weights = (log_weights + share * fit).softmax(1)                        # (B,K,1,H,W)
        return (weights * share * (means + variance * told)).sum(1)

    return policy


def grid_policy(maps: Tensor, start: Tensor, end: Tensor, shift: float = 1.0) -> Denoiser:
    """x0 that depends on the noise level alone, linear in `clock` between those that the network gives.

    maps: (B,N,C,H,W), the first at `end`, the last at `start` (B,), evenly between (arXiv:2510.14974, DX policy).

    >>> policy = grid_policy(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1), torch.tensor([3.0]), torch.tensor([1.0]))
    >>> [float(policy(torch.zeros(1, 1, 1, 1), torch.tensor([sigma]), {})) for sigma in (3.0, 5 / 3, 1.0)]
    [1.0, 0.5, 0.0]
    """
    first, last, count = clock(end, shift), clock(start, shift), maps.shape[1]

    def policy(y: Tensor, level: Tensor, cond: Cond) -> Tensor:
        place = ((clock(level, shift) - first) / (last - first)).clamp(0, 1) * (count - 1)
        low = place.floor().long().clamp(max=count - 2)
        below, above = (maps[torch.arange(len(maps), device=maps.device), i] for i in (low, low + 1))
        return torch.lerp(below, above, per_sample(place - low, below).to(below))

    return policy


def follow(
    policy: Denoiser, x: Tensor, start: Tensor, end: Tensor, cond: Cond, substeps: Tensor, shift: float = 1.0
) -> Tensor:
    """x at `end` (B,) from x at `start` (B,): Euler's steps, `substeps` (B,) of them, even in `clock`.

    >>> policy = lambda x, sigma, cond: torch.zeros_like(x)
    >>> start, end = torch.tensor([4.0, 4.0]), torch.tensor([2.0, 0.0])
    >>> follow(policy, torch.ones(2, 1, 1, 1), start, end, {}, torch.tensor([1, 8])).flatten()
    tensor([0.5000, 0.0000])
    """
    times, length = clock(start, shift), clock(start, shift) - clock(end, shift)
    for step in range(int(substeps.max())):
        done, then = ((step + i) / substeps for i in (0, 1))
        now = torch.where(done >= 1, end, level(times - done.clamp(max=1) * length, shift)).to(start)
        to = torch.where(then >= 1, end, level(times - then.clamp(max=1) * length, shift)).to(start)
        moving = (done < 1) & (now > 0)
        ratio = torch.where(moving, to / now.clamp(min=1e-12), torch.ones_like(now))
        x0 = policy(x, torch.where(moving, now, start), cond)
        x = x0 + (x - x0) * per_sample(ratio, x)
    return x


@dataclass(frozen=True)
class Draws:
    """Where along a step a student is shown its teacher: uniform numbers student (B,M) and teacher (B,M-1)."""

    student: Tensor
    teacher: Tensor

    @classmethod
    def of(cls, count: int, states: int, rng: torch.Generator) -> Draws:
        """Drawn for `count` samples and `states` places each.

        >>> Draws.of(4, 2, torch.Generator()).teacher.shape
        torch.Size([4, 1])
        """
        numbers = torch.rand(count, 2 * states - 1, generator=rng, device=rng.device)
        return cls(*numbers.split([states, states - 1], 1))


@dataclass(frozen=True)
class Imitation:
    """How a student is compared with its teacher along a step (pi-Flow, arXiv:2510.14974, algorithm 1).

    Attributes:
        states: places of a step at which the teacher is asked. substeps: of the whole way from noise to image.
        window: substeps over which the policy's velocity is averaged before it is compared.
        shift: of `clock`.

    >>> Imitation(states=2).substeps
    128
    """

    states: int = 2
    substeps: int = 128
    window: int = 3
    shift: float = 1.0

    def compare(
        self, policy: Denoiser, teacher: Denoiser, x: Tensor, start: Tensor, end: Tensor, cond: Cond, told: Cond,
        share: float, draws: Draws,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The mean squared difference (B,) of velocities, and x (B,C,H,W) at the step's end.

        Between the places at which the teacher is asked the policy leads, along the student's own way, and for `share`
        of the step the teacher does, by one step of Euler's: early in training, when the policy leads nowhere yet.

        Args:
            x, start, end: where the step begins, its noise levels (B,). cond, told: the condition of the policy and of
                the teacher, whose denoiser is guided already.
        """
        free = (clock(start, self.shift) - clock(end, self.shift) - self.window / self.substeps).clamp(min=0)
        ours = _lengths(draws.student.sort(1).values * ((1 - share) * free)[:, None])
        ends = torch.cat([draws.teacher.sort(1).values, torch.ones_like(draws.teacher[:, :1])], 1)
        theirs = _lengths(ends * (share * free)[:, None])
        time, sigma, errors = clock(start, self.shift), start, []
        for led, teaching in zip(ours.unbind(1), theirs.unbind(1)):
            with torch.no_grad():
                time, x, sigma = self._led(policy, x, time, sigma, led, cond)
                x0 = teacher(x, sigma, told)
                slope = _velocity(x, x0, sigma)
            until = (time - teaching).clamp(min=0)
            mean = self._mean_velocity(policy, x, time, sigma, until, cond)
            errors.append((mean - slope).float().square().flatten(1).mean(1))
            lower = level(until, self.shift)
            x = x0 + (x - x0) * per_sample(lower / sigma, x)
            time, sigma = until, lower
        with torch.no_grad():
            x = self._led(policy, x, time, sigma, time - clock(end, self.shift), cond)[1]
        return torch.stack(errors).mean(0), x

    def _led(
        self, policy: Denoiser, x: Tensor, time: Tensor, sigma: Tensor, length: Tensor, cond: Cond
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Time, x and noise level after the policy has led for `length`."""
        until = (time - length).clamp(min=0)
        lower = level(until, self.shift)
        return until, follow(policy, x, sigma, lower, cond, self._count(length), self.shift), lower

    def _count(self, length: Tensor) -> Tensor:
        return (length * self.substeps).round().clamp(min=1)

    def _mean_velocity(
        self, policy: Denoiser, x: Tensor, time: Tensor, sigma: Tensor, until: Tensor, cond: Cond
    ) -> Tensor:
        """The policy's mean velocity from `time` to a window below `until`; its velocity at `time`, if that is near."""
        until = (until - self.window / self.substeps).clamp(min=0)
        count = ((time - until) * self.substeps).round()
        here = _velocity(x, policy(x, sigma, cond), sigma)
        if not (far := count >= 2).any():
            return here
        lower = level(until, self.shift)
        moved = follow(policy, x, sigma, lower, cond, count.clamp(min=1), self.shift)
        high, low = sigma / (1 + sigma), lower / (1 + lower)                    # times of a flow
        state = x / per_sample(1 + sigma, x), moved / per_sample(1 + lower, x)
        mean = (state[0] - state[1]) / per_sample(high - low, x).clamp(min=1e-6)
        return torch.where(per_sample(far, x), mean, here)


def _velocity(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """n - x0, the velocity of a flow, whatever the model predicts."""
    return (x - x0) / per_sample(sigma, x) - x0


def _lengths(ends: Tensor) -> Tensor:
    """Lengths (B,M) of stretches from 0 that end at (B,M)."""
    return torch.diff(ends, dim=1, prepend=torch.zeros_like(ends[:, :1]))


def pieces(start: Tensor, end: Tensor, substeps: int, shift: float = 1.0) -> Sequence[tuple[Tensor, Tensor]]:
    """The small steps of a step from `start` to `end` (scalars), even in `clock`: (from, to) noise levels.

    >>> [(round(float(a), 2), round(float(b), 2)) for a, b in pieces(torch.tensor(3.0), torch.tensor(0.0), 3)]
    [(3.0, 1.0), (1.0, 0.33), (0.33, 0.0)]
    """
    if substeps < 1:
        raise UserError(f"a policy is followed through 1 small step or more; got {substeps}.")
    times = torch.linspace(0, 1, substeps + 1).to(start)[1:-1]
    between = level(torch.lerp(clock(start, shift), clock(end, shift), times), shift)
    return list(pairwise([start, *between, end]))
