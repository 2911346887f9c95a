"""What a Sampler makes of a model: noise levels, and its denoiser under guidance with the solver that follows it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.autoencoder import IdentityFirstStage
from ldm.conditioners.compose import guidance_terms, keys_of
from ldm.diffusion import samplers, schedules, steps
from ldm.diffusion.choices import OF_STUDENTS, STOCHASTIC
from ldm.diffusion.denoiser import Cond, Denoiser, RangeDenoiser
from ldm.diffusion.guidance import (
    TARGET,
    autoguidance,
    cfg,
    class_log_probability,
    classifier_guidance,
    clip,
    compose,
    keep_variance,
    target_gradient,
    within,
    without_target,
)
from ldm.diffusion.overview import Shift, overview
from ldm.errors import UserError, suggest
from ldm.networks.takes import declared
from ldm.sampling.calls import explained
from ldm.sampling.students import PolicySolver, policy_solver, told, told_scales

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion
    from ldm.sampling.sampler import Sampler

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Cover = Callable[[Denoiser], Denoiser]  # a denoiser of windows as one of a canvas


@explained
@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier of noisy images to guide by (arXiv:2105.05233).

    network: logits (B,K) of (x_t, timestep), as `model_folder.load_network` gives it, on images or latents as the
    model works on. scale: of its gradient. The condition brings the classes that it guides to, one for each image:
    `model.condition(class_="LUAD") | classifier.target(["LUAD"])`.
    """

    network: nn.Module
    scale: float = 1.0

    def target(self, labels: Sequence[str | int | None], names: Sequence[str] = ()) -> dict[str, Tensor]:
        """The part of a condition that guides to classes, by name or number; None guides to none.

        names: of the classes, where the network's metadata do not have them. UserError: an unknown name.
        """
        names = list(getattr(self.network, "metadata", {}).get("classes") or names)

        def index(label: str | int | None) -> int:
            if isinstance(label, str) and label not in names:
                raise UserError(f"the classifier has no class '{label}'{suggest(label, names)}")
            return -1 if label is None else names.index(label) if isinstance(label, str) else int(label)

        return {TARGET: torch.tensor([index(label) for label in labels])}

    def target_of(self, model: LatentDiffusion, conditions: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The same of the class among what is given of each image by name, for the model's condition."""
        key = next(iter(keys_of(model.cond_stage_model, "class")), None)
        if key is None:
            raise UserError("a classifier guides to the class of an image, and the model has no such condition.")
        names = model.cond_stage_model.describe()[key].names
        return self.target([given.get(key, given.get(f"{key}_")) for given in conditions], names)


@dataclass(frozen=True)
class GuidedSolver:
    """A denoiser and what follows it: `solve` runs the solver, `over` makes both of them those of a canvas.

    gradient: of a classifier, where the solver itself moves by it (`sample_ddpm`). variance: see `sample_ddpm`.
    """

    solver: str
    eta: float
    denoiser: Denoiser | RangeDenoiser
    gradient: Denoiser | None = None
    variance: float | None = 0.0

    def over(self, cover: Cover) -> GuidedSolver:
        """The same on a canvas: `cover` makes a denoiser of windows one of the canvas."""
        gradient = None if self.gradient is None else cover(self.gradient)
        return replace(self, denoiser=cover(self.denoiser), gradient=gradient)

    def agreeing(self, change: Cover) -> GuidedSolver:
        """With `change` made to the denoised image, as `consistency.consistent` does."""
        if self.variance is None:
            return replace(self, denoiser=keep_variance(self.denoiser, change))
        return replace(self, denoiser=change(self.denoiser))

    def shifted(self, shift: Shift) -> GuidedSolver:
        """With `shift` of it added to the denoised image."""
        return self.agreeing(lambda denoiser: overview(denoiser, shift))

    def lead(self, i: int, x: Tensor, sigmas: Tensor, cond: Cond) -> Denoiser:
        """What step i follows where windows x (B,C,h,w) lie: their x0, whatever it is asked (`PolicySolver.lead`)."""
        x0 = self.denoiser(x, sigmas[i].expand(len(x)), cond)
        return lambda *_: x0

    def follow(
        self, i: int, x: Tensor, led: Denoiser, sigmas: Tensor, past: steps.Past, noise: samplers.Noise
    ) -> tuple[Tensor, steps.Past]:
        """x at sigmas[i + 1] and what the next step needs, from those of step i: `solve` step by step, place by place.

        led: what leads at these places. The solver is one of choices.POINTWISE.
        """
        name = "ddim" if self.solver == "euler_ancestral" else self.solver
        run, x0 = getattr(steps, name), led(x, sigmas[i].expand(len(x)), {})
        if self.solver in STOCHASTIC:
            return run(i, x, x0, sigmas, past, noise, self.eta)
        return run(i, x, x0, sigmas, past, noise) if name == "consistency" else run(i, x, x0, sigmas, past)

    def solve(self, x: Tensor, sigmas: Tensor, cond: Cond, noise: samplers.Noise, seen: samplers.Callback) -> Tensor:
        """x at the last of sigmas (N+1,), from x (B,C,H,W) at the first. noise(step): what solvers add."""
        name = "ddim" if self.solver == "euler_ancestral" else self.solver  # the same in these coordinates
        run = getattr(samplers, f"sample_{name}")
        if self.solver in STOCHASTIC:
            return run(self.denoiser, x, sigmas, cond, noise, self.eta, callback=seen)
        if self.solver == "consistency":
            return run(self.denoiser, x, sigmas, cond, noise, callback=seen)
        if self.solver == "ddpm":
            return run(self.denoiser, x, sigmas, cond, noise, self.variance, self.gradient, callback=seen)
        return run(self.denoiser, x, sigmas, cond, callback=seen)


def sampling_sigmas(sampler: Sampler, model: LatentDiffusion) -> Tensor:
    """Descending noise levels (steps+1,) for a model: of its own table (trailing, uniform, legacy), or its range.

    UserError: steps that its table does not have.

    >>> from ldm.sampling.sampler import Sampler
    >>> sampling_sigmas(Sampler(steps=3).settled(model, "sample"), model)[-2:]
    tensor([0.6919, 0.0000])
    """
    denoiser, steps = model.denoiser(), sampler.steps
    if sampler.solver in OF_STUDENTS:
        return model.student.sigmas(steps, denoiser.sigma_max).to(model.sigmas)
    discrete = hasattr(denoiser, "table")
    most = len(model.sigmas) if discrete else 10_000
    if steps > most:
        raise UserError(f"steps must be in 1..{most}; got {steps}.")
    if sampler.schedule == "legacy" and (not discrete or len(model.sigmas) % steps or steps == len(model.sigmas)):
        table = f"divide its {len(model.sigmas)} levels" if discrete else "do not exist for this model"
        raise UserError(f"the legacy schedule takes steps of the model's noise table that {table}; got {steps}.")
    if sampler.schedule in ("trailing", "uniform", "legacy") and discrete:
        return schedules.table_sigmas(model.sigmas, steps, sampler.schedule)
    continuous = {"exponential": schedules.exponential_sigmas, "optimised": schedules.optimised_sigmas}
    make = continuous.get(sampler.schedule, schedules.karras_sigmas)  # models without a table have no other
    return make(steps, denoiser.sigma_min, denoiser.sigma_max).to(model.sigmas)


def guided_solver(
    sampler: Sampler, model: LatentDiffusion, cond: Cond | None = None, given: Collection[str] | None = None
) -> GuidedSolver | PolicySolver:
    """The model's denoiser under guidance, and the solver for it; clipped if the model works on pixels.

    cond, given: the condition, or the names of the conditions that there are, for guidance scales by name.

    >>> from ldm.sampling.sampler import Sampler
    >>> solver = guided_solver(Sampler().settled(model, "sample"), model)
    >>> solver.solver, solver.denoiser(torch.zeros(1, 4, 8, 8), torch.ones(1), model.condition(class_="A")).shape
    ('dpmpp_2m', torch.Size([1, 4, 8, 8]))
    """
    pixels = isinstance(model.first_stage_model, IdentityFirstStage) and len(model.latent_shape) == 3
    if sampler.solver == "policy":
        return policy_solver(sampler, model, PRECISIONS[sampler.precision], pixels)
    null = _negative(sampler.negative, model) if sampler.negative else model.null_condition()
    outside = sampler.named and model.student is None
    terms = guidance_terms(null, cond or null, sampler.guidance_scale, given) if outside else None
    weak = _alike(model, sampler.guide).denoiser(PRECISIONS[sampler.precision]) if sampler.guide is not None else None
    gradient = None
    if sampler.classifier is not None:
        likely = class_log_probability(sampler.classifier.network, model.denoiser().timestep)
        gradient = target_gradient(likely, sampler.classifier.scale)
    elif cond and TARGET in cond:
        raise UserError("the condition has a target to guide to; give the classifier that guides, in the Sampler.")
    ancestral = sampler.solver == "ddpm"

    def guide(denoiser: Denoiser, free: Denoiser) -> Denoiser:
        if model.student is not None:
            strong = told(denoiser, model.student, told_scales(model.student, sampler.guidance_scale))
        elif weak is not None:
            strong = autoguidance(denoiser, weak, sampler.guidance_scale)
        elif terms is not None:
            strong = compose(denoiser, null, terms)
        else:
            strong = cfg(denoiser, null, sampler.guidance_scale, sampler.guidance_rescale)
        strong, free = (clip(strong), clip(free)) if pixels else (strong, free)
        if gradient is not None:
            strong = without_target(strong) if ancestral else classifier_guidance(strong, gradient)
            free = without_target(free)
        return strong if sampler.guidance_interval == "all" else within(strong, free, *sampler.guidance_interval)

    precision, network = PRECISIONS[sampler.precision], sampler.network(model)
    plain = free = model.denoiser(precision, sampler.compile, sampler.cache, network)
    if sampler.compile:  # for batches of one size, and those of guided steps are larger
        free = model.denoiser(precision, sampler.compile, network=network)
    variance = float(model.metadata.get("variance") == "fixedlarge")
    denoiser: Denoiser | RangeDenoiser = guide(plain, free)
    if ancestral and model.learn_sigma:
        variance, denoiser = None, keep_variance(plain.with_variance, lambda joint: guide(joint, joint))
    if gradient is not None and sampler.guidance_interval != "all":
        gradient = within(gradient, lambda x, sigma, cond: torch.zeros_like(x), *sampler.guidance_interval)
    return GuidedSolver(sampler.solver, sampler.eta, denoiser, gradient if ancestral else None, variance)


def _negative(negative: Cond, model: LatentDiffusion) -> Cond:
    """A condition to stand in place of the null: of one sample, with the same parts."""
    null = model.null_condition()
    if set(negative) != set(null) or any(len(value) != 1 for value in negative.values()):
        wanted = ", ".join(null) or "nothing"
        raise UserError(f"a negative condition is of one sample, with {wanted}, as the model's own condition.")
    return negative


def _alike(model: LatentDiffusion, guide: LatentDiffusion) -> LatentDiffusion:
    """A model to guide by, which must take the same latents and conditions."""

    def kind(m: LatentDiffusion) -> dict[str, Any]:
        parts = {part: tuple(value.shape[-1:]) for part, value in m.null_condition().items()}
        led = {"control": True} if declared(m.model.diffusion_model).control else {}
        return {"latent": (m.channels, m.image_size), **led, **parts}

    if guide.student is not None:
        raise UserError("a student cannot guide, as guidance is inside of it; give a model that was not distilled.")
    own, other = kind(model), kind(guide)
    if own != other:
        raise UserError(f"the guiding model takes {other}, the model {own}; they must be of one kind.")
    return guide
