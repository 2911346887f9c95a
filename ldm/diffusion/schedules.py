"""Noise tables of trained models, and the descending sigmas that samplers visit.

sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod): the noise level in variance-exploding coordinates x = x0 + sigma*n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.errors import UserError

STEP_DENSITY = (
    160.0, 46.0, 23.88, 15.04, 10.42, 7.592, 5.642, 4.146, 2.904, 2.234, 1.746, 1.366, 1.06, 0.8155, 0.6241, 0.4762,
    0.3634, 0.2767, 0.2081, 0.1526, 0.1066, 0.06919, 0.03793, 0.01683, 0.002,
)  # of `optimised_sigmas`, derived by benchmarks/optimise_steps.py  # fmt: skip
MOST = 100_000  # noise levels of a model; published ones have 1000 to 4000
SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")


def make_betas(
    schedule: str = "linear",
    timesteps: int = 1000,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> Tensor:
    """Betas (timesteps,) in float64, named as CompVis names them.

    `linear` is linear in sqrt(beta) (diffusers: scaled_linear); `sqrt_linear` is linear in beta (guided-diffusion:
    linear); `sqrt` is the square root of the latter; `cosine` is arXiv:2102.09672, equation 17, clipped at 0.999.

    UserError: timesteps that are no whole number from 1 to MOST, other parameters that are no numbers from 0 to 1.

    >>> betas = make_betas("linear", 1000, 0.0015, 0.0195)
    >>> betas[[0, 500, 999]].tolist()
    [0.0015, 0.00796, 0.0195]
    """
    if not isinstance(timesteps, int) or not 1 <= timesteps <= MOST:
        raise UserError(f"timesteps is the number of noise levels, a whole number from 1 to {MOST}; got {timesteps}.")
    for name, value in {"linear_start": linear_start, "linear_end": linear_end, "cosine_s": cosine_s}.items():
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise UserError(f"{name} of the noise schedule is a number from 0 to 1; got {value!r}.")
    if schedule == "linear":
        return torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64) ** 2
    if schedule == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64)
    if schedule == "sqrt":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64) ** 0.5
    if schedule == "cosine":
        time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + cosine_s
        alphas = torch.cos(time / (1 + cosine_s) * math.pi / 2) ** 2
        return (1 - alphas[1:] / alphas[:-1]).clamp(0, 0.999)
    raise UserError(f"beta_schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}.")


def sigmas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """The sigma table (T,), ascending, of alphas_cumprod (T,).

    >>> sigmas_from_alphas_cumprod(torch.tensor([0.99, 0.5, 0.01]))
    tensor([0.1005, 1.0000, 9.9499])
    """
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def table_timesteps(length: int, steps: int, spacing: str = "trailing") -> list[int]:
    """Ascending indices into a table of `length` entries.

    `trailing` divides (0, length] evenly and ends at the noisiest entry; `uniform` divides [0, length-1] evenly and
    holds both ends; `legacy` is CompVis' `range(0, length, length // steps) + 1`, kept for parity: it can give one
    step more than asked for, and is refused where it would leave the table.

    >>> table_timesteps(1000, 5), table_timesteps(1000, 5, "legacy")
    ([199, 399, 599, 799, 999], [1, 201, 401, 601, 801])
    """
    if not 1 <= steps <= length:
        raise ValueError(f"steps must be in 1..{length}, the length of the model's noise table; got {steps}")
    if spacing == "trailing":
        indices = [round(length - i * length / steps) - 1 for i in range(steps)][::-1]
    elif spacing == "uniform":
        indices = [round(i * (length - 1) / max(steps - 1, 1)) for i in range(steps)] if steps > 1 else [length - 1]
    elif spacing == "legacy":
        indices = [i + 1 for i in range(0, length, length // steps)]
        if indices[-1] >= length:
            raise ValueError(f"the legacy spacing leaves a table of {length} at {steps} steps; use 'trailing'")
    else:
        raise ValueError(f"spacing must be trailing, uniform or legacy; got {spacing!r}")
    return indices


def respaced_timesteps(length: int, respacing: str) -> list[int]:
    """Ascending indices into a table of `length` entries as guided-diffusion's `timestep_respacing` names them.

    `ddimN` is every k-th from 0, for the k that gives exactly N; `N` or `a,b,c` divides the table into that many equal
    sections and takes a, b, c evenly spaced entries of each, ends included.

    >>> respaced_timesteps(1000, "ddim5"), respaced_timesteps(1000, "3,2")
    ([0, 200, 400, 600, 800], [0, 250, 499, 500, 999])
    """
    if respacing.startswith("ddim"):
        steps = int(respacing[4:])
        for stride in range(1, length + 1):
            if len(range(0, length, stride)) == steps:
                return list(range(0, length, stride))
        raise ValueError(f"no integer stride takes {steps} steps from a table of {length}; use 'trailing' spacing")
    counts, indices, start = [int(count) for count in respacing.split(",")], [], 0
    for section, count in enumerate(counts):
        size = length // len(counts) + (section < length % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"a section of {size} entries cannot give {count} steps (respacing {respacing!r})")
        indices += [start + round(i * (size - 1) / max(count - 1, 1)) for i in range(count)]
        start += size
    return indices


def respaced_sigmas(table: Tensor, respacing: str) -> Tensor:
    """Descending sigmas (steps+1,), ending at 0, of a guided-diffusion model's table (T,) and `timestep_respacing`.

    >>> respaced_sigmas(torch.linspace(0.01, 10.0, 1000), "ddim5")
    tensor([8.0100, 6.0100, 4.0100, 2.0100, 0.0100, 0.0000])
    """
    return torch.cat([table[respaced_timesteps(len(table), respacing)].flip(0), torch.zeros_like(table[:1])])


def sigmas_from(sigmas: Tensor, strength: float) -> Tensor:
    """The last `strength` (0..1] of descending sigmas (N+1,), at least one step.

    SDEdit (arXiv:2108.01073): start a sampler from x0 + sigmas[0]*noise; the smaller the strength, the more stays.

    >>> sigmas_from(torch.tensor([10.0, 3.0, 1.0, 0.3, 0.0]), strength=0.5)
    tensor([1.0000, 0.3000, 0.0000])
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1]; got {strength}")
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, round(strength * steps)) :]


def table_sigmas(table: Tensor, steps: int, spacing: str = "trailing") -> Tensor:
    """Descending sigmas (steps+1,) taken from a model's own table (T,), ending at 0.

    The `legacy` spacing ends at table[0] > 0 instead of 0, as the published DDIM sampler does.

    >>> table = torch.linspace(0.01, 10.0, 1000)
    >>> table_sigmas(table, 4)
    tensor([10.0000,  7.5000,  5.0000,  2.5000,  0.0000])
    >>> table_sigmas(table, 4, "legacy")
    tensor([7.5200, 5.0200, 2.5200, 0.0200, 0.0100])
    """
    visited = table[table_timesteps(len(table), steps, spacing)].flip(0)
    last = table[:1] if spacing == "legacy" else torch.zeros_like(table[:1])
    return torch.cat([visited, last])


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Descending sigmas (steps+1,), ending at 0 (EDM, arXiv:2206.00364, equation 5).

    >>> karras_sigmas(4, 0.01, 10.0)
    tensor([1.0000e+01, 1.9361e+00, 2.2575e-01, 1.0000e-02, 0.0000e+00])
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)]).float()


def exponential_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Descending sigmas (steps+1,) evenly spaced in log sigma, ending at 0.

    >>> exponential_sigmas(4, 0.01, 10.0)
    tensor([1.0000e+01, 1.0000e+00, 1.0000e-01, 1.0000e-02, 0.0000e+00])
    """
    ramp = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp()
    return torch.cat([ramp, torch.zeros(1, dtype=torch.float64)]).float()


def optimised_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Descending sigmas (steps+1,), ending at 0, as dense as a second-order solver wants them (arXiv:2404.14507).

    STEP_DENSITY holds noise levels of equal importance, found by minimising DPM-Solver++(2M)'s discretisation error on
    a field of unit variance with the spectrum of images; the steps divide the stretch between sigma_max and sigma_min
    evenly on that scale, log-linear between its entries, and start and end within it (160 .. 0.002).

    >>> optimised_sigmas(4, 0.01, 10.0)
    tensor([1.0000e+01, 1.5438e+00, 2.8645e-01, 1.0000e-02, 0.0000e+00])
    """
    levels = -torch.tensor(STEP_DENSITY, dtype=torch.float64).log()             # ascending
    ends = -torch.tensor([sigma_max, sigma_min], dtype=torch.float64).log()
    ends = ends.clamp(levels[0], levels[-1])
    low = torch.searchsorted(levels, ends, right=True).clamp(1, len(levels) - 1) - 1
    first, last = (low + (ends - levels[low]) / (levels[low + 1] - levels[low])).tolist()
    place = torch.linspace(first, last, steps, dtype=torch.float64)
    low = place.floor().long().clamp(max=len(levels) - 2)
    ramp = (-torch.lerp(levels[low], levels[low + 1], place - low)).exp()
    return torch.cat([ramp, torch.zeros(1, dtype=torch.float64)]).float()
