"""Images turned into others by a trained model: what notebooks and `histoldm translate` call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.autoencoder.autoencoder import IdentityFirstStage, UnitFirstStage
from ldm.autoencoder.model import AttnBlock
from ldm.diffusion import samplers, schedules
from ldm.diffusion.consistency import Projection, consistent, match_low, projected
from ldm.diffusion.denoiser import Cond, Denoiser
from ldm.diffusion.guidance import class_log_probability, classifier_guidance, expand_cond
from ldm.diffusion.tiled import tiled
from ldm.errors import UserError, suggest
from ldm.rng import canvas_noise, fold, sample_noise
from ldm.sampling.inversion import invert, invert_exactly, invert_published, invertible
from ldm.sampling.local_norm import REACH, local_group_norm, spans
from ldm.sampling.tiles import (
    ATTENDED_PART,
    PRECISIONS,
    Guidance,
    decode_canvas,
    guided_denoiser,
    run_solver,
    sampling_sigmas,
)

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

STARTS = ("invert", "noise", "none")
ODE_SOLVERS = ("euler", "heun", "dpmpp_2m", "unipc")  # that are followed both ways
EXACT = ("euler", "heun")
ENCODE_PART = 256  # latents along what is encoded in one piece
Watch = Callable[[int, int, Tensor, Tensor], None]


@dataclass
class Classifier:
    """A classifier of noisy images to guide by (arXiv:2105.05233).

    network: logits (B,K) of (x_t, timestep), as `model_folder.load_network` gives it, on images or latents as the
    model works on. scale: of its gradient. labels: for each target a class, by name (of the network's metadata) or
    number, or one for each image; None does not guide that target.
    """

    network: nn.Module
    labels: Sequence[Any]
    scale: float = 1.0

    def indices(self, count: int) -> list[Tensor | None]:
        """The labels (count,) of each target, None where it is not guided."""
        names = getattr(self.network, "metadata", {}).get("classes", [])

        def index(value: Any) -> int:
            if isinstance(value, str) and value not in names:
                raise UserError(f"the classifier has no class '{value}'{suggest(value, names)}")
            return names.index(value) if isinstance(value, str) else int(value)

        lists = [list(given) if isinstance(given, (list, tuple, Tensor)) else [given] * count for given in self.labels]
        return [None if None in values else torch.tensor([index(value) for value in values]) for values in lists]


@torch.no_grad()
def translate(
    model: LatentDiffusion,
    images: Tensor,
    source: Cond | None = None,
    target: Cond | Sequence[Cond] | None = None,
    steps: int = 25,
    solver: str | None = None,
    start: str = "invert",
    strength: float = 1.0,
    exact: bool = False,
    guidance_scale: Guidance | None = 1.0,
    classifier: Classifier | None = None,
    low: Tensor | None = None,
    schedule: str = "karras",
    eta: float = 1.0,
    published: bool = False,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    batch_size: int = 16,
    precision: str = "fp32",
    given: Sequence[str] | None = None,
    watch: Watch | None = None,
    progress: bool = True,
) -> Tensor | list[Tensor]:
    """Images (N,C,H,W) in [-1,1] under other conditions, alike in size, on the CPU; a list for a list of targets.

    By inversion (His-MMDM): the image is followed up the noise levels under the source condition, once, and down again
    under each target's. Images larger than a tile are covered by overlapping windows, any size.

    Args:
        source, target: conditions of N images or of one, as `model.condition` gives them; None is the null.
        steps: each way. solver: one of ODE_SOLVERS for `start` invert, any of SOLVERS otherwise; by
            default dpmpp_2m, and euler where it is to be exact or as published.
        start: `invert`; `noise`: from the image with noise of the first level (SDEdit, arXiv:2108.01073); `none`: from
            noise alone, for models whose condition is the image itself (translation between modalities).
        strength: in (0, 1]: the share of the steps that are taken, the last ones; below 1 more of the image stays.
        exact: each step up is solved such that the step down undoes it: the source's condition gives the image back
            to 1e-3. Costs two to four times the evaluations up; solvers in EXACT.
        guidance_scale: classifier-free, on the way down; see `ldm.sampling.tiles.sample`.
        classifier: a `Classifier`, whose gradient guides the way down.
        low: images (N,C,h,w) of a resolution lower by a whole number: the result, shrunk, is these (super-resolution).
        published: the procedure of His-MMDM in all details (`ldm.sampling.inversion.invert_published`, DDIM over every
            1000/steps-th entry of the model's noise table).
        seed, first: noise of image i depends on `seed` and on `first` + i, or first[i].
        given: names of the target's conditions, for guidance scales by name.
        watch: called as watch(k, step, x, x0) with latents at every step: k is the target, -1 the way up.
    """
    targets = list(target) if isinstance(target, Sequence) else [target]
    solver = solver or ("euler" if exact or published else "dpmpp_2m")
    _check(model, images, targets, start, solver, exact, published, classifier)
    way = _Way(
        model, _levels(model, steps, schedule, start, strength, published), solver, start,
        exact, published, eta, guidance_scale, classifier, precision, batch_size, given,
    )  # fmt: skip
    conds = [_condition(model, cond, len(images)) for cond in targets]
    known = _condition(model, source, len(images))
    labels = [None] * len(targets) if classifier is None else classifier.indices(len(images))
    factor, (height, width) = model.first_stage_model.downsampling, images.shape[-2:]
    scale = None if low is None else _scale(low, images, factor)
    images = F.pad(images.float(), (0, -width % factor, 0, -height % factor), mode="replicate")
    whole = max(images.shape[-2:]) == model.image_size * factor
    many = batch_size if whole else 1
    found: list[list[Tensor]] = [[] for _ in targets]
    ways = len(targets) + (start == "invert")
    numbers = range(first, first + len(images)) if isinstance(first, int) else list(first)
    with tqdm(total=len(images) * (len(way.sigmas) - 1) * ways, desc="translate", disable=not progress) as bar:

        def see(k: int, step: int, x: Tensor, x0: Tensor) -> None:
            bar.update(len(x))
            if watch is not None:
                watch(k, step, x, x0)

        for begin in range(0, len(images), many):
            rows = slice(begin, min(begin + many, len(images)))
            seeds = [fold(seed, number) for number in numbers[rows]]
            noise = partial(_noise, seeds, (model.channels, *(side // factor for side in images.shape[-2:])), whole)
            latent = way.begin(images[rows].to(model.device), _rows(known, rows), noise, partial(see, -1))
            project = None if low is None else match_low(low[rows].to(model.device), scale)
            for k, cond in enumerate(conds):
                label = None if labels[k] is None else labels[k][rows]
                x = way.down(latent, _rows(cond, rows), label, project, noise, partial(see, k))
                image = decoded(model, x.float())
                image = image if project is None else project(image)
                found[k].append(image.clamp(-1, 1)[..., :height, :width].cpu())
    made = [torch.cat(parts) for parts in found]
    return made if isinstance(target, Sequence) else made[0]


@dataclass
class _Way:
    """How a batch goes: to the noise it starts from, and from there down under the condition of a target."""

    model: LatentDiffusion
    sigmas: Tensor
    solver: str
    start: str
    exact: bool
    published: bool
    eta: float
    guidance: Guidance | None
    classifier: Classifier | None
    precision: str
    batch_size: int
    given: Sequence[str] | None

    def begin(
        self, images: Tensor, source: Cond, noise: Callable[[int], Tensor], seen: samplers.Callback
    ) -> Tensor:
        """x at the first level."""
        z = encoded(self.model, images).to(self.model.sample_dtype)
        if self.start != "invert":
            added = noise(0).to(z) * self.sigmas[0]
            return z + added if self.start == "noise" else added
        denoiser = guided_denoiser(self.model, 1.0, self.precision)
        if not self.exact:  # as published: the way up is not clipped
            denoiser = self.model.denoiser(PRECISIONS[self.precision])
        denoiser = self.over(denoiser, z)
        if self.published:
            return invert_published(denoiser, z, self.sigmas, source, seen)
        run = getattr(samplers, f"sample_{self.solver}")
        if self.exact:
            return invert_exactly(denoiser, z, self.sigmas, source, run, tolerance=1e-3, callback=seen)
        return invert(denoiser, z, self.sigmas, source, run, seen)

    def down(
        self, x: Tensor, cond: Cond, label: Tensor | None, project: Projection | None, noise: Callable[[int], Tensor],
        seen: samplers.Callback,
    ) -> Tensor:  # fmt: skip
        """x at the last level, from x at the first."""
        model = self.model
        denoiser = guided_denoiser(model, self.guidance if cond else 1.0, self.precision, cond, given=self.given)
        if label is not None:
            denoiser, cond = _classified(model, denoiser, self.classifier), {**cond, LABEL: label.to(x.device)}
        denoiser = self.over(denoiser, x)
        if project is not None:
            if not isinstance(model.first_stage_model, IdentityFirstStage):
                project = projected(project, partial(encoded, model), partial(decoded, model))
            denoiser = consistent(denoiser, project)
        return run_solver(
            self.solver, denoiser, x, self.sigmas, cond, lambda step: noise(step + 1), self.eta, seen
        )

    def over(self, denoiser: Denoiser, x: Tensor) -> Denoiser:
        """A denoiser of windows as one of x, whatever its size."""
        window = self.model.image_size
        if max(x.shape[-2:]) == window:
            return denoiser
        return tiled(denoiser, window, max(3 * window // 4, 1), batch_size=self.batch_size, blend="smooth")


def _levels(
    model: LatentDiffusion, steps: int, schedule: str, start: str, strength: float, published: bool
) -> Tensor:
    """Descending sigmas of the way: those of an inversion end above 0."""
    if not 0 < strength <= 1:
        raise UserError(f"strength is a share of the steps, above 0 and up to 1; got {strength:g}.")
    if not published:
        sigmas = sampling_sigmas(model, steps, schedule)
        if start != "invert":
            return schedules.sigmas_from(sigmas, strength)
        if steps < 2:
            raise UserError("an inversion takes 2 steps or more.")
        return invertible(sigmas, strength)
    if not hasattr(model.denoiser(), "table"):
        raise UserError("the published procedure needs a model with a noise table; leave `published` out.")
    if not 1 <= steps <= len(model.sigmas) or len(model.sigmas) % steps:
        raise UserError(f"published steps divide the model's {len(model.sigmas)} noise levels; got {steps}.")
    return schedules.sigmas_from(schedules.respaced_sigmas(model.sigmas, f"ddim{steps}"), strength)


def _check(
    model: LatentDiffusion, images: Tensor, targets: Sequence[Any], start: str, solver: str, exact: bool,
    published: bool, classifier: Classifier | None,
) -> None:  # fmt: skip
    """UserError for what cannot be translated, or not so."""
    if start not in STARTS:
        raise UserError(f"start must be one of {', '.join(STARTS)}; got '{start}'.")
    if start == "invert" and solver not in ODE_SOLVERS:
        raise UserError(f"an inversion follows one of {', '.join(ODE_SOLVERS)}; got '{solver}'.")
    if exact and (start != "invert" or solver not in EXACT):
        raise UserError(f"exact is of inversions with {', '.join(EXACT)}; got start '{start}', solver '{solver}'.")
    if published and (exact or start != "invert" or solver != "euler"):
        raise UserError("the published procedure is DDIM inversion, with euler and not exact; leave the others out.")
    if not targets:
        raise UserError("no target is given.")
    if classifier is not None and len(classifier.labels) != len(targets):
        raise UserError(f"the classifier has labels for {len(classifier.labels)} targets of {len(targets)}.")
    if classifier is not None and not hasattr(model.denoiser(), "table"):
        raise UserError("a classifier of noisy images guides models with a noise table.")
    check_images(model, images)


def check_images(model: LatentDiffusion, images: Tensor) -> None:
    """UserError unless images (N,C,H,W) are such as the model works on."""
    if images.ndim != 4 or not images.numel():
        raise UserError(f"images are given as (N,C,H,W); got shape {tuple(images.shape)}.")
    check_shape(model, *images.shape[1:], "the images")
    low, high = float(images.min()), float(images.max())
    if not -1.001 <= low <= high <= 1.001:  # NaN too
        raise UserError(f"images have values in [-1, 1]; got {low:g} to {high:g}.")


def check_shape(model: LatentDiffusion, channels: int, height: int, width: int, name: str) -> None:
    """UserError unless images of this shape have the model's channels and at least the size of its tiles."""
    wanted, tile = image_channels(model), model.image_size * model.first_stage_model.downsampling
    if channels != wanted:
        kinds = {1: "gray", 3: "RGB"}
        own, got = (kinds.get(count, f"{count} channels") for count in (wanted, channels))
        raise UserError(f"{name}: the model works on {own} images, this is {got}; convert it, or take another model.")
    if min(height, width) < tile:
        raise UserError(
            f"{name}: {width} x {height} px is smaller than the model's tile of {tile} px; give larger images, or cut "
            "them with more of their surroundings."
        )


def image_channels(model: LatentDiffusion) -> int:
    """Channels of the images that a model works on: 3 (RGB) or 1 (gray)."""
    pixels = isinstance(model.first_stage_model, (IdentityFirstStage, UnitFirstStage))
    return model.channels if pixels else 3


def _scale(low: Tensor, images: Tensor, factor: int) -> int:
    """How many times larger the images are than those of low resolution."""
    scale = images.shape[-1] // max(low.shape[-1], 1)
    if (*images.shape[:2], *(side * scale for side in low.shape[-2:])) != tuple(images.shape) or scale < 2:
        raise UserError(
            f"images of {tuple(images.shape)} are to match low-resolution ones of {tuple(low.shape)}: their sides must "
            "be the same multiple of 2 or more."
        )
    if any(side % factor for side in images.shape[-2:]):
        raise UserError(f"the sides of what is made larger must be multiples of {factor} px.")
    return scale


def _condition(model: LatentDiffusion, cond: Cond | None, count: int) -> dict[str, Tensor]:
    """The condition of `count` images; the null where none is given."""
    cond = model.null_condition() if cond is None else cond
    counts = {len(value) for value in cond.values()} - {1}
    if counts - {count}:
        raise UserError(f"a condition is of one image or of all {count}; got one of {min(counts)}.")
    return expand_cond(cond, count)


def _rows(cond: Cond, rows: slice) -> dict[str, Tensor]:
    return {part: value[rows] for part, value in cond.items()}


def _noise(seeds: Sequence[int], shape: tuple[int, int, int], tiles: bool, stream: int) -> Tensor:
    if tiles:
        return sample_noise(seeds, shape, stream)
    return torch.cat([canvas_noise(seed, *shape, stream=stream) for seed in seeds])


LABEL = "classifier/label"  # in a condition: the classes that a classifier guides to; the network does not see them


def _classified(model: LatentDiffusion, denoiser: Denoiser, classifier: Classifier) -> Denoiser:
    """A denoiser under classifier guidance; the condition brings the labels."""
    likely = class_log_probability(classifier.network, model.denoiser().timestep)

    def plain(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return denoiser(x, sigma, {part: value for part, value in cond.items() if part != LABEL})

    return classifier_guidance(plain, lambda x, sigma, cond: likely(x, sigma, {"label": cond[LABEL]}), classifier.scale)


def encoded(model: LatentDiffusion, images: Tensor) -> Tensor:
    """Scaled latents (B,C,h,w) of images (B,C,H,W) of any size; those larger than a tile as `decode_tiles` decodes."""
    first_stage, window = model.first_stage_model, model.image_size
    factor = first_stage.downsampling
    if factor == 1 or max(images.shape[-2:]) <= window * factor:
        return model.encode(images)
    attends = any(isinstance(layer, AttnBlock) for layer in first_stage.modules())
    part, halo = (ATTENDED_PART // factor, window // 2) if attends else (ENCODE_PART, window + REACH)
    down, across = (spans(side // factor, part, halo) for side in images.shape[-2:])
    latents = images.new_empty(len(images), model.channels, *(side // factor for side in images.shape[-2:]))
    for rows, cols in product(down, across):
        seen = images[..., _times(rows.window, factor), _times(cols.window, factor)]
        with local_group_norm(first_stage, window * factor, seen.shape[-1]):
            made = model.encode(seen)
        latents[..., rows.tile, cols.tile] = made[..., rows.inside(), cols.inside()]
    return latents


def _times(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


def decoded(model: LatentDiffusion, latents: Tensor) -> Tensor:
    """Images (B,C,H,W) of scaled latents, where the latents are."""
    if model.first_stage_model.downsampling == 1 or max(latents.shape[-2:]) <= model.image_size:
        return model.decode(latents)
    return torch.cat([decode_canvas(model, z[None], progress=False) for z in latents]).to(latents)
