"""Images turned into others by a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.autoencoder.autoencoder import IdentityFirstStage
from ldm.diffusion import samplers, schedules
from ldm.diffusion.consistency import consistent, match_low, projected
from ldm.diffusion.denoiser import Cond, Denoiser
from ldm.diffusion.guidance import clip, expand_cond
from ldm.diffusion.tiled import Cover, covered, fixed_cover
from ldm.errors import UserError
from ldm.rng import canvas_noise, fold, sample_noise
from ldm.sampling.calls import explained
from ldm.sampling.canvas import decode_latents, encode_images, shown
from ldm.sampling.given import checked_condition, checked_images, checked_settings
from ldm.sampling.guided import PRECISIONS
from ldm.sampling.inversion import invert, invert_exactly, invert_published, invertible
from ldm.sampling.sampler import EXACT, ODE_SOLVERS, Inversion, Sampler
from ldm.sampling.students import unguided

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

Watch = Callable[[int, int, Tensor, Tensor], None]


@explained
@torch.no_grad()
def translate(
    model: LatentDiffusion,
    images: Tensor,
    source: Cond | None = None,
    target: Cond | Sequence[Cond] | None = None,
    sampler: Sampler | None = None,
    inversion: Inversion | None = None,
    first: int | Sequence[int] = 0,
    watch: Watch | None = None,
) -> Tensor | list[Tensor]:
    """Images (N,C,H,W) in [-1,1] under other conditions, alike in size, on the CPU; a list for a list of targets.

    By inversion (His-MMDM): the image is followed up the noise levels under the source condition, once, and down again
    under each target's. Images larger than a tile are covered by overlapping windows, any size. A model whose condition
    is the image itself is told the images.

    Args:
        source, target: conditions of N images or of one, as `model.condition` gives them; None is the null.
        sampler: how; by default `Sampler()`; its steps are those of each way. inversion: by default `Inversion()`.
        first: number of the first image, or of each: image i has the noise of number `first` + i, or first[i].
        watch: called as watch(k, step, x, x0) with latents at every step: k is the target, -1 the way up.
    UserError: images, conditions or settings that the model cannot have.

    >>> images = torch.zeros(1, 3, 16, 16)
    >>> translate(model, images, sampler=Sampler(steps=2, progress=False)).shape
    torch.Size([1, 3, 16, 16])
    """
    images = checked_images(images)
    sampler, inversion = checked_settings(Sampler, sampler), checked_settings(Inversion, inversion)
    sampler, inversion = settled(sampler, inversion, model)
    low, count = None, len(images)
    if inversion.enlarge:
        low = images
        images = F.interpolate(images, scale_factor=inversion.enlarge, mode="bicubic").clamp(-1, 1)
    check_shape(model, *images.shape[1:], "the images")
    factor, (height, width) = model.first_stage_model.downsampling, images.shape[-2:]
    if low is not None and (height % factor or width % factor):
        raise UserError(f"the sides of what is made larger must be multiples of {factor} px.")
    images = F.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")
    tile = max(images.shape[-2:]) == model.tile_size
    if sampler.cache > 1 and not tile:
        raise UserError("deep features are kept between steps, not between windows of large images; leave cache out.")
    targets = list(target) if isinstance(target, Sequence) else [target]
    if not targets:
        raise UserError("no target is given.")
    told = shown(model, model.image_condition, images) if model.image_condition else {}
    known = _condition(model, source, told, count, "source")
    conds = [_condition(model, cond, told, count, "target") for cond in targets]
    way = _Way(model, sampler, inversion, levels_of(model, sampler, inversion), tile)
    numbers = range(first, first + count) if isinstance(first, int) else list(first)
    found: list[list[Tensor]] = [[] for _ in targets]
    ways, many = len(targets) + (inversion.start == "invert"), sampler.batch_size if tile else 1
    total = count * (len(way.sigmas) - 1) * ways
    with tqdm(total=total, desc="translate", unit="step", disable=not sampler.progress) as bar:

        def see(k: int, step: int, x: Tensor, x0: Tensor) -> None:
            bar.update(len(x))
            if watch is not None:
                watch(k, step, x, x0)

        for begin in range(0, count, many):
            rows = slice(begin, min(begin + many, count))
            seeds = [fold(sampler.seed, number) for number in numbers[rows]]
            noise = partial(_noise, seeds, (model.channels, *(side // factor for side in images.shape[-2:])), tile)
            own = _rows(known, rows, model.device)
            latent = way.begin(images[rows].to(model.device), own, noise, partial(see, -1))
            wanted = None if low is None else low[rows].to(model.device)
            for k, cond in enumerate(conds):
                found[k].append(way.down(latent, _rows(cond, rows, model.device), wanted, noise, partial(see, k)))
    made = [torch.cat(parts)[..., :height, :width] for parts in found]
    return made if isinstance(target, Sequence) else made[0]


def settled(sampler: Sampler, inversion: Inversion, model: LatentDiffusion) -> tuple[Sampler, Inversion]:
    """Both with nothing left to choose, checked against the model and each other.

    >>> sampler, inversion = settled(Sampler(), Inversion(exact=True), model)
    >>> sampler.solver, inversion.start
    ('euler', 'invert')
    """
    inversion = inversion.settled(model)
    if sampler.solver is None and (inversion.exact or inversion.published):
        sampler = replace(sampler, solver="euler")
    sampler = sampler.settled(model, inversion.task)
    if inversion.start == "invert" and sampler.solver not in ODE_SOLVERS:
        raise UserError(f"an inversion follows one of {', '.join(ODE_SOLVERS)}; got '{sampler.solver}'.")
    if inversion.start == "invert" and not inversion.published and sampler.steps < 2:
        raise UserError("an inversion takes 2 steps or more.")
    if inversion.exact and sampler.solver not in EXACT:
        raise UserError(f"exact is of inversions with {', '.join(EXACT)}; got '{sampler.solver}'.")
    if inversion.published and sampler.solver != "euler":
        raise UserError(f"the published procedure is DDIM, the solver euler; got '{sampler.solver}'.")
    return sampler, inversion


@dataclass(frozen=True)
class _Way:
    """How a batch goes: to the noise it starts from, and from there down under the condition of a target.

    sigmas: descending. tile: the images are tiles, not covered by windows.
    """

    model: LatentDiffusion
    sampler: Sampler
    inversion: Inversion
    sigmas: Tensor
    tile: bool

    def begin(self, images: Tensor, source: Cond, noise: Callable[[int], Tensor], seen: samplers.Callback) -> Tensor:
        """x at the first level."""
        z = encode_images(self.model, images).to(self.model.sample_dtype)
        if self.inversion.start != "invert":
            added = noise(0).to(z) * self.sigmas[0]
            return z + added if self.inversion.start == "noise" else added
        denoiser = self.over(way_up(self.model, self.sampler, self.inversion))
        if self.inversion.published:
            return invert_published(denoiser, z, self.sigmas, source, seen)
        run = getattr(samplers, f"sample_{self.sampler.solver}")
        if self.inversion.exact:
            return invert_exactly(denoiser, z, self.sigmas, source, run, callback=seen)
        return invert(denoiser, z, self.sigmas, source, run, seen)

    def down(
        self, x: Tensor, cond: Cond, low: Tensor | None, noise: Callable[[int], Tensor], seen: samplers.Callback
    ) -> Tensor:
        """Images (B,C,H,W) on the CPU, from x at the first level. low: what they are, shrunk."""
        model, sampler = self.model, self.sampler
        if not cond and sampler.guide is None:
            sampler = replace(sampler, guidance_scale=1.0)
        solver = sampler.guided(model, cond).over(self.over)
        project = None if low is None else match_low(low, self.inversion.enlarge)
        if project is not None:
            inner = project
            if not isinstance(model.first_stage_model, IdentityFirstStage):
                inner = projected(project, partial(encode_images, model), partial(decode_latents, model))
            solver = solver.agreeing(lambda denoiser: consistent(denoiser, inner))
        x = solver.solve(x, self.sigmas, cond, lambda step: noise(step + 1), seen)
        image = decode_latents(model, x.float(), sampler.decoder)
        return (image if project is None else project(image)).clamp(-1, 1).cpu()

    def over(self, denoiser: Denoiser) -> Denoiser:
        """A denoiser of windows as one of x, whatever its size."""
        if self.tile:
            return denoiser
        cover = partial(windows_of, self.model)
        return covered(denoiser, lambda size, sigma: cover(size), None, self.sampler.batch_size)


def way_up(model: LatentDiffusion, sampler: Sampler, inversion: Inversion) -> Denoiser:
    """What is followed up the noise levels: the model without guidance.

    >>> denoiser = way_up(model, *settled(Sampler(), Inversion(), model))
    >>> denoiser(torch.zeros(1, 4, 8, 8), torch.ones(1), model.null_condition()).shape
    torch.Size([1, 4, 8, 8])
    """
    denoiser = model.denoiser(PRECISIONS[sampler.precision], sampler.compile, network=sampler.network(model))
    if model.student is not None:
        denoiser = unguided(denoiser, model.student)
    if inversion.exact and isinstance(model.first_stage_model, IdentityFirstStage):
        denoiser = clip(denoiser)  # as on the way down; as published, the way up is not clipped else
    return denoiser


def windows_of(model: LatentDiffusion, size: tuple[int, int]) -> Cover:
    """The windows by which an image of (height, width) latents is translated: at fixed places, a quarter overlapping.

    >>> len(windows_of(model, (16, 24)).rows)
    3
    """
    window = model.image_size
    return fixed_cover(size, window, max(3 * window // 4, 1), "smooth")


def levels_of(model: LatentDiffusion, sampler: Sampler, inversion: Inversion) -> Tensor:
    """Descending sigmas of the way: those of an inversion end above 0.

    >>> levels_of(model, *settled(Sampler(steps=3), Inversion(), model))[-1] > 0
    tensor(True)
    """
    if not inversion.published:
        sigmas = sampler.sigmas(model)
        levels = invertible if inversion.start == "invert" else schedules.sigmas_from
        return levels(sigmas, inversion.strength)
    if not hasattr(model.denoiser(), "table"):
        raise UserError("the published procedure needs a model with a noise table; leave `published` out.")
    if len(model.sigmas) % sampler.steps:
        raise UserError(f"published steps divide the model's {len(model.sigmas)} noise levels; got {sampler.steps}.")
    return schedules.sigmas_from(schedules.respaced_sigmas(model.sigmas, f"ddim{sampler.steps}"), inversion.strength)


def check_shape(model: LatentDiffusion, channels: int, height: int, width: int, name: str) -> None:
    """UserError unless images of this shape have the model's channels and at least the size of its tiles.

    >>> check_shape(model, 1, 64, 64, "slice.png")
    Traceback (most recent call last):
        ...
    ldm.errors.UserError: slice.png: the model works on RGB images, this is gray; convert it, or take another model.
    """
    wanted, tile = model.image_channels, model.tile_size
    if channels != wanted:
        kinds = {1: "gray", 3: "RGB"}
        own, got = (kinds.get(count, f"{count} channels") for count in (wanted, channels))
        raise UserError(f"{name}: the model works on {own} images, this is {got}; convert it, or take another model.")
    if min(height, width) < tile:
        raise UserError(
            f"{name}: {width} x {height} px is smaller than the model's tile of {tile} px; give larger images, or cut "
            "them with more of their surroundings."
        )


def _condition(model: LatentDiffusion, cond: Cond | None, told: Cond, count: int, name: str) -> dict[str, Tensor]:
    """The condition of so many images, the null where none is given; told: the images, where they are part of it."""
    null = model.null_condition()
    cond = null if cond is None else checked_condition(model, cond, name)
    counts = {len(value) for value in cond.values()} - {1}
    if counts - {count}:
        raise UserError(f"a condition is of one image or of all {count}; got one of {min(counts)}.")
    cond = expand_cond(cond, count)
    for part, images in told.items():
        if part not in cond or (part in null and torch.equal(cond[part], null[part].expand_as(cond[part]))):
            cond[part] = images.to(torch.float32)
    return cond


def _rows(cond: Cond, rows: slice, device: torch.device) -> dict[str, Tensor]:
    return {part: value[rows].to(device) for part, value in cond.items()}


def _noise(seeds: Sequence[int], shape: tuple[int, int, int], tile: bool, stream: int) -> Tensor:
    if tile:
        return sample_noise(seeds, shape, stream)
    return torch.cat([canvas_noise(seed, *shape, stream=stream) for seed in seeds])
