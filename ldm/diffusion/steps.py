"""One step of each solver that asks its denoiser once a step: what the loops of `samplers` do with the x0 they get.

A step goes from sigmas[i] to sigmas[i + 1] at every place by itself: it needs x and x0 there, and what it left itself
for the next step, `past`, () at first. So a canvas larger than memory takes it in parts.

    x, past = step(i, x, x0, sigmas, past)                             x, x0 (B,C,H,W), sigmas (N+1,), past: as x
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser
from ldm.diffusion.policies import clock, pieces

Noise = Callable[[int], Tensor]
Past = tuple[Tensor, ...]


def euler(i: int, x: Tensor, x0: Tensor, sigmas: Tensor, past: Past = ()) -> tuple[Tensor, Past]:
    """See `samplers.sample_euler`.

    >>> euler(0, torch.tensor([8.0]), torch.tensor([0.0]), torch.tensor([4.0, 1.0]))
    (tensor([2.]), ())
    """
    return x0 + (x - x0) * (sigmas[i + 1] / sigmas[i]), ()


def ddim(
    i: int, x: Tensor, x0: Tensor, sigmas: Tensor, past: Past, noise: Noise, eta: float = 1.0
) -> tuple[Tensor, Past]:
    """See `samplers.sample_ddim`.

    >>> ddim(0, torch.tensor([8.0]), torch.tensor([0.0]), torch.tensor([4.0, 1.0]), (), torch.zeros, eta=0.0)
    (tensor([2.]), ())
    """
    sigma, target = sigmas[i], sigmas[i + 1]
    up = eta * target * ((sigma**2 - target**2).clamp(min=0).sqrt() / sigma)
    down = (target**2 - up**2).clamp(min=0).sqrt()
    x = x0 + (x - x0) / sigma * down
    if up > 0:
        x = x + noise(i).to(x) * up
    return x, ()


def consistency(i: int, x: Tensor, x0: Tensor, sigmas: Tensor, past: Past, noise: Noise) -> tuple[Tensor, Past]:
    """See `samplers.sample_consistency`.

    >>> consistency(0, torch.tensor([8.0]), torch.tensor([3.0]), torch.tensor([4.0, 0.0]), (), torch.ones)
    (tensor([3.]), ())
    """
    return (x0 + noise(i).to(x) * sigmas[i + 1] if sigmas[i + 1] > 0 else x0), ()


def dpmpp_2m(i: int, x: Tensor, x0: Tensor, sigmas: Tensor, past: Past = ()) -> tuple[Tensor, Past]:
    """See `samplers.sample_dpmpp_2m`; past: the x0 of the step before.

    >>> dpmpp_2m(1, torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([4.0, 2.0, 1.0]), (torch.tensor([0.0]),))
    (tensor([1.7500]), (tensor([1.]),))
    """
    if sigmas[i + 1] == 0:
        return x0, ()
    h = (sigmas[i] / sigmas[i + 1]).log()
    x = sigmas[i + 1] / sigmas[i] * x - (-h).expm1() * _second_order(i, x0, sigmas, past, h)
    return x, (x0,)


def dpmpp_2m_sde(
    i: int, x: Tensor, x0: Tensor, sigmas: Tensor, past: Past, noise: Noise, eta: float = 1.0
) -> tuple[Tensor, Past]:
    """See `samplers.sample_dpmpp_2m_sde`; past: the x0 of the step before.

    >>> sigmas, before = torch.tensor([4.0, 2.0, 1.0]), (torch.tensor([0.0]),)
    >>> dpmpp_2m_sde(1, torch.tensor([2.0]), torch.tensor([1.0]), sigmas, before, torch.ones, eta=0.0)
    (tensor([1.7500]), (tensor([1.]),))
    """
    if sigmas[i + 1] == 0:
        return x0, ()
    h = (sigmas[i] / sigmas[i + 1]).log()
    d = _second_order(i, x0, sigmas, past, h)
    x = (-h * (1 + eta)).exp() * x - (-h * (1 + eta)).expm1() * d
    if eta:
        x = x + noise(i).to(x) * sigmas[i + 1] * (-(-2 * eta * h).expm1()).sqrt()
    return x, (x0,)


def _second_order(i: int, x0: Tensor, sigmas: Tensor, past: Past, h: Tensor) -> Tensor:
    """x0 half a step on, along the line through this one and the one before."""
    if not past:
        return x0
    r = (sigmas[i - 1] / sigmas[i]).log() / h
    return x0 + (x0 - past[0]) / (2 * r)


def dpmpp_3m_sde(
    i: int, x: Tensor, x0: Tensor, sigmas: Tensor, past: Past, noise: Noise, eta: float = 1.0
) -> tuple[Tensor, Past]:
    """See `samplers.sample_dpmpp_3m_sde`; past: the two x0 before, latest first.

    >>> dpmpp_3m_sde(0, torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([2.0, 0.0]), (), torch.ones)
    (tensor([1.]), ())
    """
    if sigmas[i + 1] == 0:
        return x0, ()
    h = (sigmas[i] / sigmas[i + 1]).log()
    k = h * (1 + eta)
    x = (-k).exp() * x - (-k).expm1() * x0
    phi_2 = (-k).expm1() / k + 1
    if past:
        r0 = (sigmas[i - 1] / sigmas[i]).log() / h
        slope = (x0 - past[0]) / r0
        if len(past) == 2:
            r1 = (sigmas[i - 2] / sigmas[i - 1]).log() / h
            bend = (slope - (past[0] - past[1]) / r1) / (r0 + r1)
            slope = slope + bend * r0
            x = x - (2 * phi_2 / k - 1) * bend
        x = x + phi_2 * slope
    if eta:
        x = x + noise(i).to(x) * sigmas[i + 1] * (-(-2 * eta * h).expm1()).sqrt()
    return x, (x0, *past)[:2]


def unipc(i: int, x: Tensor, x0: Tensor, sigmas: Tensor, past: Past = (), order: int = 2) -> tuple[Tensor, Past]:
    """See `samplers.sample_unipc`; past: x corrected at the level before, and x0 of the last levels, latest first.

    >>> unipc(0, torch.tensor([8.0]), torch.tensor([0.0]), torch.tensor([4.0, 1.0]))
    (tensor([2.]), (tensor([8.]), tensor([0.])))
    """
    sigma, target = float(sigmas[i]), float(sigmas[i + 1])
    history = [(float(sigmas[i - 1 - back]), value) for back, value in enumerate(past[1:])]  # latest first
    if history:
        x = _unipc(past[0], history, sigma, x0)
    history = [(sigma, x0), *history][:order]
    return (_unipc(x, history, target) if target > 0 else x0), (x, *(value for _, value in history))


def _unipc(x: Tensor, history: list[tuple[float, Tensor]], target: float, target_x0: Tensor | None = None) -> Tensor:
    """From x at history[0] to `target`: UniP of order len(history), or UniC if target_x0 is known (B(h) = e^h - 1)."""
    sigma, x0 = history[0]
    h = math.log(sigma / target)
    nodes = [math.log(sigma / past) / h for past, _ in history[1:]]
    values = [value for _, value in history[1:]]
    if target_x0 is not None:
        nodes, values = [*nodes, 1.0], [*values, target_x0]
    phi_1 = math.expm1(-h)
    rhs, phi, factorial = [], phi_1 / -h - 1, 1
    for n in range(1, len(nodes) + 1):
        rhs.append(phi * factorial / phi_1)
        factorial *= n + 1
        phi = phi / -h - 1 / factorial
    weights = [0.5]  # as published, in place of the solution, for one unknown
    if len(nodes) != 1:
        powers = torch.tensor(nodes, dtype=torch.float64) ** torch.arange(len(nodes))[:, None]
        weights = torch.linalg.solve(powers, torch.tensor(rhs, dtype=torch.float64)).tolist()
    d = x0 + sum(weight * (value - x0) / node for weight, value, node in zip(weights, values, nodes))
    return target / sigma * x - phi_1 * d


def policy(
    i: int, x: Tensor, led: Denoiser, sigmas: Tensor, cond: Cond, substeps: int = 32, shift: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x, and the last x0 on the way there: see `samplers.sample_policy`; `led`: the policy of this step.

    >>> nothing = lambda x, sigma, cond: torch.zeros_like(x)
    >>> policy(0, torch.ones(1, 1, 1, 1), nothing, torch.tensor([4.0, 2.0, 0.0]), {})[0]
    tensor([[[[0.5000]]]])
    """
    times = clock(sigmas, shift)
    count = max(1, round(float((times[i] - times[i + 1]) / times[0]) * substeps))
    for sigma, target in pieces(sigmas[i], sigmas[i + 1], count, shift):
        x0 = led(x, sigma.expand(len(x)), cond)
        x = x0 + (x - x0) * (target / sigma)
    return x, x0
