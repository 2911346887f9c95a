"""From one image to another through the noise: inversion and decoding, and starts from a noised image.

All are functions of denoiser(x, sigma, cond) -> x0 in the coordinates x = x0 + sigma*n. Guidance, clipping and tiling
are denoisers made from denoisers before they come here; inversion is a sampler over ascending sigmas.

    levels = invertible(sigmas)                                        # descending, ends above 0
    latent = invert(denoiser, x0, levels, source)                      # x at levels[0]
    images = [sample_euler(cfg(denoiser, null, 2.0), latent, levels, target) for target in targets]

The image stands for x at the lowest of the levels, where the noise is too weak to be seen, and what decoding leaves
there is the image again: the way up and the way down visit the same levels, so with one condition they undo each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser, per_sample
from ldm.diffusion.samplers import sample_euler, sample_heun
from ldm.diffusion.schedules import sigmas_from

Solver = Callable[..., Tensor]  # solver(denoiser, x, sigmas, cond, callback=...), as the samplers without noise
Callback = Callable[[int, Tensor, Tensor], None]


def _nothing(step: int, x: Tensor, x0: Tensor) -> None:
    pass


def invertible(sigmas: Tensor, strength: float = 1.0) -> Tensor:
    """The levels (n,) of descending sigmas between which an ODE can be followed both ways: those above 0.

    strength in (0, 1] takes the last of them only, so that the image is not noised to the end (partial inversion).

    >>> invertible(torch.tensor([10.0, 3.0, 1.0, 0.1, 0.0]), strength=0.5)
    tensor([3.0000, 1.0000, 0.1000])
    """
    return sigmas_from(sigmas[sigmas > 0], strength)


@torch.no_grad()
def invert(
    denoiser: Denoiser, x0: Tensor, sigmas: Tensor, cond: Cond, solver: Solver = sample_euler,
    callback: Callback = _nothing,
) -> Tensor:  # fmt: skip
    """The noisy x (B,C,H,W) at sigmas[0] from which `solver` comes to the image x0 (B,C,H,W) under the condition.

    DDIM inversion (arXiv:2010.02502, section 4.3; His-MMDM, doi:10.1101/2024.07.11.24310294) with `sample_euler`; any
    sampler that adds no noise is inverted alike, as far as its step upwards undoes its step downwards: to the order of
    the solver. `invert_exactly` undoes it to a tolerance.

    sigmas: descending; a last one of 0 is left out, and x0 stands for x at the one before (`invertible`).

    >>> image = torch.full((1, 3, 8, 8), 0.5)
    >>> latent = invert(denoiser, image, sigmas, {})
    >>> latent.std(), (sample_euler(denoiser, latent, invertible(sigmas), {}) - image).abs().max()
    (tensor(0.), tensor(0.0743))
    """
    return solver(denoiser, x0, sigmas[sigmas > 0].flip(0), cond, callback=callback)


@torch.no_grad()
def invert_exactly(
    denoiser: Denoiser, x0: Tensor, sigmas: Tensor, cond: Cond, solver: Solver = sample_euler,
    tolerance: float = 1e-4, iterations: int = 30, memory: int = 4, callback: Callback = _nothing,
) -> Tensor:  # fmt: skip
    """As `invert`, each step solved implicitly: `solver` takes the result back to x0, to the tolerance.

    The step from a up to b is the fixed point of x <- x + (x_a - step(x)), where step is the solver's own step from b
    down to a (arXiv:2309.04907 for DDIM): a contraction where the denoiser's derivative lies between 0 and 1. Anderson
    mixing of the last `memory` differences finds it in a few evaluations. For solvers of one step, `sample_euler`
    (DDIM) and `sample_heun`; a step that looks back at earlier ones cannot be undone by itself.

    tolerance: root mean square of x_a - step(x), relative to that of the image; iterations: at most so many evaluations
    of a step. A sample that is not there by then keeps its best x.

    >>> image = torch.full((1, 3, 8, 8), 0.5)
    >>> latent = invert_exactly(denoiser, image, sigmas, {})
    >>> (sample_euler(denoiser, latent, invertible(sigmas), {}) - image).abs().max() < 1e-3
    tensor(True)
    """
    levels = sigmas[sigmas > 0].flip(0).to(x0.device)
    scale = x0.flatten(1).square().mean(1).sqrt().clamp(min=1e-6)
    if solver not in (sample_euler, sample_heun):
        raise ValueError("exact inversion is of solvers of one step, sample_euler and sample_heun")
    x, slope = x0, torch.zeros_like(x0)
    for i, (low, high) in enumerate(pairwise(levels)):
        step = partial(solver, denoiser, sigmas=torch.stack([high, low]), cond=cond)
        found = _solved(step, x, x + slope * (high - low), tolerance * scale, iterations, memory)
        slope, x = (found - x) / (high - low), found
        callback(i, x, x0)
    return x


def _solved(
    step: Callable[..., Tensor], wanted: Tensor, guess: Tensor, tolerance: Tensor, iterations: int, memory: int
) -> Tensor:
    """x (B,...) with step(x=x) = wanted: x <- x + wanted - step(x), under Anderson mixing (Walker and Ni, 2011).

    tolerance (B,): of the residual's root mean square. What is found for a sample does not depend on the others.
    """
    x = best = guess
    least = torch.full_like(tolerance, torch.inf)
    history: list[tuple[Tensor, Tensor]] = []                                   # x and residual (B,N), oldest first
    for _ in range(iterations):
        residual = (wanted - step(x=x)).flatten(1)
        size = residual.square().mean(1).sqrt()
        better = (least > tolerance) & (size < least)
        best = torch.where(per_sample(better, x), x, best)
        least = torch.where(better, size, least)
        if (least <= tolerance).all():
            break
        history = [*history, (x.flatten(1), residual)][-memory - 1 :]
        moved = x.flatten(1) + residual
        if len(history) > 1:
            steps, changes = (torch.stack(values, 2).double().diff(dim=2) for values in zip(*history))  # (B,N,m)
            gram = changes.transpose(1, 2) @ changes                            # (B,m,m)
            ridge = 1e-9 * gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True).clamp(min=1e-12)
            gram = gram + torch.diag_embed(ridge.expand(-1, gram.shape[1]))
            weights = torch.linalg.solve(gram, changes.transpose(1, 2) @ residual.double()[..., None])
            moved = moved - ((steps + changes) @ weights)[..., 0].to(moved)
        x = moved.view_as(wanted)
    return best


@torch.no_grad()
def invert_published(
    denoiser: Denoiser, x0: Tensor, sigmas: Tensor, cond: Cond, callback: Callback = _nothing
) -> Tensor:
    """As His-MMDM and guided-diffusion invert (ddim_reverse_sample_loop): what to start `sample_euler` with.

    The image stands for the variance-preserving state at the lowest level, sigmas (N+1,) ending at 0; and one step more
    leads to sigma = infinity, whose noise stands for the variance-preserving state at sigmas[0].

    >>> image = torch.full((1, 3, 8, 8), 0.5)
    >>> latent = invert_published(denoiser, image, sigmas, {})
    >>> sample_euler(denoiser, latent, sigmas, {}).mean()
    tensor(0.4236)
    """
    low, high = sigmas[-2], sigmas[0]
    x = invert(denoiser, x0 * (1 + low**2).sqrt(), sigmas, cond, callback=callback)
    noise = (x - denoiser(x, high.expand(len(x)).to(x.device), cond)) / high
    return noise * (1 + high**2).sqrt()
