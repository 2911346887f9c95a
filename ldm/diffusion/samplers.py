"""Samplers: each one visible loop over descending sigmas, without state, without knowledge of models.

All take `denoiser(x, sigma, cond) -> x0`, the starting x (B,C,H,W) at sigmas[0], and sigmas (N+1,). Noise that a
sampler adds comes from `noise(step) -> (B,C,H,W)`, so that it can be a function of each sample's seed. `callback(step,
x, x0)` sees every step. To start from an image, give x0 + sigmas[0]*noise and `schedules.sigmas_from`. What a step
makes of x0 stands in `steps`, where it needs no more than that one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion import steps
from ldm.diffusion.denoiser import Cond, Denoiser, RangeDenoiser
from ldm.diffusion.policies import Policies
from ldm.diffusion.steps import Noise, Past
from ldm.errors import UserError

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
        x, _ = steps.euler(i, x, x0, sigmas)
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
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        x, _ = steps.ddim(i, x, x0, sigmas, (), noise, eta)
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
    past: Past = ()
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        x, past = steps.dpmpp_2m(i, x, x0, sigmas, past)
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
    past: Past = ()
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        x, past = steps.dpmpp_2m_sde(i, x, x0, sigmas, past, noise, eta)
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
    past: Past = ()
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].expand(len(x)), cond)
        x, past = steps.dpmpp_3m_sde(i, x, x0, sigmas, past, noise, eta)
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
    sigmas = _checked(x, sigmas)
    past: Past = ()
    for i in range(len(sigmas) - 1):
        x0 = denoiser(x, sigmas[i].to(x).expand(len(x)), cond)
        x, past = steps.unipc(i, x, x0, sigmas, past, order)
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
    for i in range(len(sigmas) - 1):
        start, end = (level.expand(len(x)) for level in sigmas[i : i + 2])
        policy = student(x, start, end, cond)
        x, x0 = steps.policy(i, x, policy, sigmas, cond, substeps, shift)
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
        x, _ = steps.consistency(i, x, x0, sigmas, (), noise)
        callback(i, x, x0)
    return x
