"""Samplers: each one visible loop over descending sigmas, without state, without knowledge of models.

All take `denoiser(x, sigma, cond) -> x0`, the starting x (B,C,H,W) at sigmas[0], and sigmas (N+1,). Noise that a
sampler adds comes from `noise(step) -> (B,C,H,W)`, so that it can be a function of each sample's seed. `callback(step,
x, x0)` sees every step. To start from an image, give x0 + sigmas[0]*noise and `schedules.sigmas_from`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser, RangeDenoiser
from ldm.diffusion.policies import Policies, clock, pieces
from ldm.errors import UserError

Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


def _nothing(step: int, x: Tensor, x0: Tensor) -> None:
    pass


def _checked(x: Tensor, sigmas: Tensor) -> Tensor:
    if not torch.isfinite(sigmas).all():
        raise UserError("sigmas must be finite; a zero-terminal-SNR table has no finite first sigma to start from.")
    return sigmas.to(x.device)


@torch.no_grad()
def sample_euler(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, callback: Callback = _nothing) -> Tensor:
    """Euler steps of the probability-flow ODE: deterministic DDIM (arXiv:2010.02502), its inversion if ascending.

    >>> float(sample_euler(denoiser, x, sigmas, {}).std() / x.std())  # the exact solution's is (1 + 10^2)^-0.5 = 0.0995
    0.0918
    """
    sigmas = _checked(x, sigmas)
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        x = x0 + (x - x0) * (sigmas[i + 1] / sigmas[i])
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond,
    noise: Noise,
    eta: float = 1.0,
    callback: Callback = _nothing,
) -> Tensor:
    """DDIM with stochasticity eta in [0,1] (arXiv:2010.02502, equation 16).

    In these coordinates it is Euler ancestral: eta 1 is k-diffusion's, and DDPM's sampler with the small variance.

    >>> float(sample_ddim(denoiser, x, sigmas, {}, noise).std())  # of the data it is 1
    0.8595
    """
    sigmas = _checked(x, sigmas)
    for i in range(len(sigmas) - 1):
        sigma, target = sigmas[i], sigmas[i + 1]
        x0 = denoiser(x, sigma.expand(len(x)), cond)
        up = eta * target * ((sigma**2 - target**2).clamp(min=0).sqrt() / sigma)
        down = (target**2 - up**2).clamp(min=0).sqrt()
        x = x0 + (x - x0) / sigma * down
        if up > 0:
            x = x + noise(i).to(x) * up
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_heun(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, callback: Callback = _nothing) -> Tensor:
    """Heun's second-order steps (EDM, arXiv:2206.00364, algorithm 1): two evaluations a step, one for the last.

    >>> float(sample_heun(denoiser, x, sigmas, {}).std() / x.std())  # the exact solution's is 0.0995
    0.1007
    """
    sigmas = _checked(x, sigmas)
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        d = (x - x0) / sigmas[i]
        euler = x + d * (sigmas[i + 1] - sigmas[i])
        if sigmas[i + 1] > 0:
            d_next = (euler - denoiser(euler, sigmas[i + 1].expand(len(x)), cond)) / sigmas[i + 1]
            x = x + (d + d_next) / 2 * (sigmas[i + 1] - sigmas[i])
        else:
            x = euler
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_dpmpp_2m(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, callback: Callback = _nothing) -> Tensor:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2): second order, one evaluation a step.

    >>> float(sample_dpmpp_2m(denoiser, x, sigmas, {}).std() / x.std())  # the exact solution's is 0.0995
    0.1008
    """
    sigmas = _checked(x, sigmas)
    previous = None
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        if sigmas[i + 1] == 0:
            x = x0
        else:
            h = (sigmas[i] / sigmas[i + 1]).log()
            d = x0
            if previous is not None:
                r = (sigmas[i - 1] / sigmas[i]).log() / h
                d = x0 + (x0 - previous) / (2 * r)
            x = sigmas[i + 1] / sigmas[i] * x - (-h).expm1() * d
        previous = x0
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_ddpm(
    denoiser: Denoiser | RangeDenoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond,
    noise: Noise,
    variance: float | None = 0.0,
    gradient: Denoiser | None = None,
    callback: Callback = _nothing,
) -> Tensor:
    """Ancestral sampling (DDPM, arXiv:2006.11239, algorithm 2), over the whole table or respaced.

    The log-variance of a step lies between the posterior's, `fixed small`, and the forward step's, `fixed large`
    (arXiv:2102.09672, equation 15): `variance` is its place, 0 small, 1 large. None takes it from the denoiser, which
    then returns (x0, place), as `TableDenoiser.with_variance` does (`guidance.keep_variance` guides such a one).

    gradient: of a classifier (`guidance.target_gradient`). The mean moves by the step's variance times the gradient at
    x_t = x / sqrt(1 + sigma^2) (arXiv:2105.05233, algorithm 1); in the last step, whose posterior variance is 0, by
    that of the step before, as published.

    >>> [float(sample_ddpm(denoiser, x, sigmas, {}, noise, variance).std()) for variance in (0.0, 1.0)]
    [0.8595, 1.0052]
    """
    sigmas = _checked(x, sigmas)
    posterior = sigmas[0] * 0                                                   # of the step before, at its lower level
    for i in range(len(sigmas) - 1):
        sigma, target = sigmas[i], sigmas[i + 1]
        out = denoiser(x, sigma.expand(len(x)), cond)
        x0, place = out if variance is None else (out, variance)
        step = sigma**2 - target**2
        small, large = step * (target / sigma) ** 2, step * (1 + target**2) / (1 + sigma**2)
        if target == 0:
            small = posterior / (1 + sigma**2)
        posterior, spread = small, small * (large / small.clamp(min=1e-20)) ** place
        mean = x0 + (x - x0) * (target / sigma) ** 2
        if gradient is not None:
            slope = gradient(x, sigma.expand(len(x)), cond)
            mean = mean + spread * ((1 + sigma**2) / (1 + target**2)).sqrt() * slope
        x = mean + noise(i).to(x) * spread.sqrt() if target > 0 else mean
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_dpmpp_2m_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond,
    noise: Noise,
    eta: float = 1.0,
    callback: Callback = _nothing,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, section 5, midpoint form); eta 0 is DPM-Solver++(2M).

    >>> float(sample_dpmpp_2m_sde(denoiser, x, sigmas, {}, noise).std())  # of the data it is 1
    1.0385
    """
    sigmas = _checked(x, sigmas)
    previous = None
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        if sigmas[i + 1] == 0:
            x = x0
        else:
            h = (sigmas[i] / sigmas[i + 1]).log()
            d = x0
            if previous is not None:
                r = (sigmas[i - 1] / sigmas[i]).log() / h
                d = x0 + (x0 - previous) / (2 * r)
            x = (-h * (1 + eta)).exp() * x - (-h * (1 + eta)).expm1() * d
            if eta:
                x = x + noise(i).to(x) * sigmas[i + 1] * (-(-2 * eta * h).expm1()).sqrt()
        previous = x0
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_dpmpp_3m_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond,
    noise: Noise,
    eta: float = 1.0,
    callback: Callback = _nothing,
) -> Tensor:
    """SDE-DPM-Solver++(3M), as k-diffusion calls it; eta 0 is a third-order solver of the ODE.

    x0 along log sigma is the parabola through the last three evaluations, integrated exactly (exponential
    Adams-Bashforth, as arXiv:2211.01095, equation 9). The published codes take half of the parabola's curvature, which
    makes them second-order; here it counts whole.

    >>> float(sample_dpmpp_3m_sde(denoiser, x, sigmas, {}, noise).std())  # of the data it is 1
    1.0021
    """
    sigmas = _checked(x, sigmas)
    seen: list[Tensor] = []                                                     # earlier x0, latest first
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        if sigmas[i + 1] == 0:
            x = x0
        else:
            h = (sigmas[i] / sigmas[i + 1]).log()
            k = h * (1 + eta)
            x = (-k).exp() * x - (-k).expm1() * x0
            phi_2 = (-k).expm1() / k + 1
            if seen:
                r0 = (sigmas[i - 1] / sigmas[i]).log() / h
                slope = (x0 - seen[0]) / r0
                if len(seen) == 2:
                    r1 = (sigmas[i - 2] / sigmas[i - 1]).log() / h
                    bend = (slope - (seen[0] - seen[1]) / r1) / (r0 + r1)
                    slope = slope + bend * r0
                    x = x - (2 * phi_2 / k - 1) * bend
                x = x + phi_2 * slope
            if eta:
                x = x + noise(i).to(x) * sigmas[i + 1] * (-(-2 * eta * h).expm1()).sqrt()
        seen = [x0, *seen][:2]
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_plms(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, callback: Callback = _nothing) -> Tensor:
    """PLMS (arXiv:2202.09778, as CompVis' PLMSSampler): linear multistep of up to fourth order with the coefficients
    of equal steps, started by one averaged step that costs an evaluation more. For parity with published samples.

    >>> float(sample_plms(denoiser, x, sigmas, {}).std() / x.std())  # the exact solution's is 0.0995
    0.0999
    """
    weights = ((3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    sigmas = _checked(x, sigmas)
    slopes: list[Tensor] = []                                                   # latest first
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        slopes = [(x - x0) / sigmas[i], *slopes][:4]
        d = slopes[0]
        if len(slopes) > 1:
            d = sum(w * slope for w, slope in zip(weights[len(slopes) - 2], slopes))
        elif sigmas[i + 1] > 0:
            euler = x + d * (sigmas[i + 1] - sigmas[i])
            d_next = (euler - denoiser(euler, sigmas[i + 1].expand(len(x)), cond)) / sigmas[i + 1]
            d = (d + d_next) / 2
        x = x + d * (sigmas[i + 1] - sigmas[i])
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_unipc(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, order: int = 2, callback: Callback = _nothing
) -> Tensor:
    """UniPC (arXiv:2302.04867, algorithm 1) of order 1 to 3: a multistep predictor, and a corrector that takes the
    evaluation at the predicted point, which the next step needs anyway: one evaluation a step.

    >>> [float(sample_unipc(denoiser, x, sigmas, {}, order).std() / x.std()) for order in (1, 2, 3)]  # exact: 0.0995
    [0.0973, 0.1000, 0.0993]
    """
    if order not in (1, 2, 3):
        raise ValueError(f"the order of UniPC is 1, 2 or 3; got {order}")
    levels = _checked(x, sigmas).tolist()
    history: list[tuple[float, Tensor]] = []                                    # (sigma, x0), latest first
    start = x                                                                   # corrected x at history[0]
    for i, (sigma, target) in enumerate(pairwise(levels)):
        x0 = denoiser(x, torch.full((len(x),), sigma).to(x), cond)
        if history:
            x = _unipc_step(start, history, sigma, x0)
        history = [(sigma, x0), *history][:order]
        start = x
        x = _unipc_step(start, history, target) if target > 0 else x0
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_policy(
    student: Policies,
    x: Tensor,
    sigmas: Tensor,
    cond: Cond,
    substeps: int = 32,
    shift: float = 1.0,
    callback: Callback = _nothing,
) -> Tensor:
    """A student's steps (pi-Flow, arXiv:2510.14974): one evaluation of the network gives a policy, a denoiser that is
    followed by Euler's method to the step's end; `substeps` of all steps together, even in `policies.clock`.

    >>> student = lambda x, start, end, cond: denoiser  # whose policy is the teacher itself
    >>> [float(sample_policy(student, x, sigmas, {}, n).std() / x.std()) for n in (4, 400)]  # exact: 0.0995
    [0.0918, 0.0992]
    """
    sigmas = _checked(x, sigmas)
    times = clock(sigmas, shift)
    for i in range(len(sigmas) - 1):
        start, end = sigmas[i], sigmas[i + 1]
        policy = student(x, start.expand(len(x)), end.expand(len(x)), cond)
        count = max(1, round(float((times[i] - times[i + 1]) / times[0]) * substeps))
        for sigma, target in pieces(start, end, count, shift):
            x0 = policy(x, sigma.expand(len(x)), cond)
            x = x0 + (x - x0) * (target / sigma)
        callback(i, x, x0)
    return x


@torch.no_grad()
def sample_consistency(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, noise: Noise, callback: Callback = _nothing
) -> Tensor:
    """Steps of a consistency model (arXiv:2303.01469, algorithm 1): to the image, and up again with fresh noise.

    >>> float(sample_consistency(denoiser, x, sigmas, {}, noise).std())  # of the data it is 1
    0.6278
    """
    sigmas = _checked(x, sigmas)
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        x = x0 + noise(i).to(x) * sigmas[i + 1] if sigmas[i + 1] > 0 else x0
        callback(i, x, x0)
    return x


def _unipc_step(
    x: Tensor, history: list[tuple[float, Tensor]], target: float, target_x0: Tensor | None = None
) -> Tensor:
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
