"""Derive the step density of the `optimised` schedule (`ldm.diffusion.schedules.STEP_DENSITY`).

    python benchmarks/optimise_steps.py

In the spirit of Align Your Steps (arXiv:2404.14507): noise levels are moved until the discretisation error of a solver,
DPM-Solver++(2M), is least. The model of the data is a Gaussian field of unit variance whose power falls with frequency
as 1/(1 + f^2), as that of images and latents does; its denoiser and trajectories are exact, component by component. The
squared local errors of all steps, carried to the end, are summed, so errors cannot cancel by an accident of the model.
Prints the table and the error of every schedule. About a minute on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion import schedules
from ldm.diffusion.samplers import sample_dpmpp_2m


def spectrum(side: int, components: int = 24, exponent: float = 2.0) -> tuple[Tensor, Tensor]:
    """Variances (K,) of frequency bands of a side x side field of mean variance 1, and the share of each band (K,)."""
    frequency = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt().flatten().sort().values
    power = 1 / (1 + radius**exponent)
    bands = (power / power.mean()).tensor_split(components)
    return torch.stack([band.mean() for band in bands]), torch.tensor([len(band) / side**2 for band in bands])


def local_error(log_sigmas: Tensor, variances: Tensor, shares: Tensor) -> Tensor:
    """Sum of squared local errors of 2M at the end, sigma 0, over descending log_sigmas (N,) and the step to 0."""
    sigmas, v = log_sigmas.exp(), variances[:, None]                            # (N,), (K,1)
    gain = (1 / (1 + sigmas**2 / v)).sqrt()                                     # from sigma to 0, of x/sqrt(v)
    x = 1 / gain                                                                # exact trajectory ending at 1
    x0 = x / (1 + sigmas**2 / v)                                                # its denoised values
    h = -log_sigmas.diff()
    slope = (x0[:, 1:-1] - x0[:, :-2]) / (2 * h[:-1] / h[1:])
    d = torch.cat([x0[:, :1], x0[:, 1:-1] + slope], dim=1)                      # 2M's constant x0 of each step
    step = sigmas[1:] / sigmas[:-1] * x[:, :-1] - (-h).expm1() * d
    errors = torch.cat([(step - x[:, 1:]) * gain[:, 1:], x0[:, -1:] - 1], dim=1)
    return (shares * variances * errors.square().sum(1)).sum()


def optimise(steps: int, low: float, high: float, variances: Tensor, shares: Tensor, iterations: int = 1500) -> Tensor:
    """Descending sigmas (steps,) from high to low with the least local error; the ends stay."""
    gaps = torch.zeros(steps - 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([gaps], lr=0.02)

    def log_sigmas() -> Tensor:
        fractions = torch.cat([torch.zeros(1, dtype=torch.float64), gaps.softmax(0).cumsum(0)])
        return math.log(high) + fractions * (math.log(low) - math.log(high))

    for _ in range(iterations):
        optimiser.zero_grad()
        local_error(log_sigmas(), variances, shares).log().backward()
        optimiser.step()
    return log_sigmas().detach().exp()


def endpoint_error(sigmas: Tensor, variances: Tensor, shares: Tensor) -> float:
    """Root mean square error of 2M's result on the field: the solver is linear, so one trajectory per band tells."""
    v = variances.view(-1, 1, 1, 1)

    def denoiser(x: Tensor, sigma: Tensor, cond: dict) -> Tensor:
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2 / v)

    start = (v + sigmas[0].double() ** 2).sqrt()
    out = sample_dpmpp_2m(denoiser, start, sigmas.double(), {})
    return float((shares * (out - v.sqrt()).flatten().square()).sum().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=25, help="entries of the table")
    parser.add_argument("--side", type=int, default=32, help="latent pixels of the modelled field")
    options = parser.parse_args()
    variances, shares = spectrum(options.side)
    table = optimise(options.nodes, 0.002, 160.0, variances, shares)
    print("STEP_DENSITY = (" + ", ".join(f"{sigma:.4g}" for sigma in table.tolist()) + ")\n")

    betas = schedules.make_betas("linear", 1000, 0.0015, 0.0195)
    levels = schedules.sigmas_from_alphas_cumprod((1 - betas).cumprod(0))
    low, high = float(levels[0]), float(levels[-1])
    make: dict[str, Callable[[int], Tensor]] = {
        "trailing": lambda n: schedules.table_sigmas(levels, n),
        "uniform": lambda n: schedules.table_sigmas(levels, n, "uniform"),
        "karras": lambda n: schedules.karras_sigmas(n, low, high),
        "exponential": lambda n: schedules.exponential_sigmas(n, low, high),
        "optimised": lambda n: schedules.optimised_sigmas(n, low, high),
    }
    print(f"2M's error on the field, sigma {high:.1f} .. {low:.3f}\nsteps  " + "".join(f"{name:>13}" for name in make))
    for steps in (6, 8, 10, 15, 20, 30):
        errors = (endpoint_error(schedule(steps), variances, shares) for schedule in make.values())
        print(f"{steps:5}  " + "".join(f"{error:13.5f}" for error in errors))


if __name__ == "__main__":
    main()
