"""How a student is sampled: what it takes of the settings, and the policies that are followed, tiles and canvases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diffusion import samplers, steps
from ldm.diffusion.choices import OF_STUDENTS
from ldm.diffusion.denoiser import Cond, Denoiser
from ldm.diffusion.overview import Shift
from ldm.diffusion.policies import Policies, clipped
from ldm.diffusion.student import Student
from ldm.errors import UserError, suggest

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion
    from ldm.sampling.sampler import Sampler

USUAL_SCALE = 2.0


def student_defaults(sampler: Sampler, model: LatentDiffusion) -> dict[str, Any]:
    """What a student's sampling takes where nothing is said. UserError: a setting that it cannot have.

    >>> from ldm.sampling.sampler import Sampler
    >>> student_defaults(Sampler(), student)
    {'guidance_scale': 2.0, 'guidance_interval': 'all', 'steps': 4, 'solver': 'policy'}
    """
    student: Student = model.student
    inside = "guidance is inside of a student, which is told its scale"
    for given, name, why in (
        (sampler.negative is not None, "negative", inside),
        (sampler.guide is not None, "guide", inside),
        (sampler.guidance_rescale, "guidance_rescale", inside),
        (sampler.guidance_interval not in (None, "all"), "guidance_interval", inside),
        (sampler.classifier is not None, "classifier", "it would be asked at every small step"),
        (sampler.cache > 1, "cache", "steps are far apart"),
        (sampler.lora, "lora", "an adapter is of its teacher"),
    ):
        if given:
            raise UserError(f"a student takes no {name}: {why}; leave it out, or take the teacher.")
    chosen = {"guidance_scale": _usual_scale(student), "guidance_interval": "all"}
    if student.method not in OF_STUDENTS:
        return chosen
    for name in ("solver", "schedule"):
        value = getattr(sampler, name)
        if value not in (None, student.method):
            raise UserError(f"a student has its own {name}, which it was trained for; got '{value}', leave it out.")
    return chosen | {"steps": max(student.steps), "solver": student.method}


def _usual_scale(student: Student) -> float | dict[str, float]:
    if student.guidance is None:
        return 1.0
    low, high = student.guidance
    usual = min(max(USUAL_SCALE, low), high)
    return dict.fromkeys(student.conditions, usual) or usual


def told_scales(student: Student, given: float | Mapping[str, float]) -> Tensor:
    """The scales (1,S) that a student is told. UserError: scales that it was not trained for.

    >>> told_scales(Student(guidance=(1.0, 6.0)), 7.5)
    Traceback (most recent call last):
    ldm.errors.UserError: the student was trained for guidance scales of 1 to 6; got 7.5.
    """
    if student.guidance is None:
        if given != 1.0:
            raise UserError(f"the student was trained without guidance; leave the scale out (got {given}).")
        return torch.zeros(1, 0)
    low, high = student.guidance
    if isinstance(given, Mapping) != bool(student.conditions):
        names = " ".join(f"{name}=2" for name in student.conditions)
        wanted = f"a scale for each of its conditions, as {names}" if names else "one guidance scale"
        raise UserError(f"the student was trained with {wanted}; got {given}.")
    scales = dict(given) if isinstance(given, Mapping) else {"": given}
    for name in scales:
        if student.conditions and name not in student.conditions:
            raise UserError(f"the student has no scale of '{name}'{suggest(name, student.conditions)}")
    values = [scales.get(name, min(max(1.0, low), high)) for name in student.conditions or ("",)]
    if wrong := [value for value in values if not low <= value <= high]:
        raise UserError(f"the student was trained for guidance scales of {low:g} to {high:g}; got {wrong[0]:g}.")
    return torch.tensor([values], dtype=torch.float32)


def told(denoiser: Denoiser, student: Student, scales: Tensor) -> Denoiser:
    """The denoiser of a student, told guidance scales (1,S).

    >>> told(lambda x, sigma, cond: cond["settings"], Student(), torch.ones(1, 1))(torch.zeros(2, 1), 0, {}).shape
    torch.Size([2, 1])
    """
    return lambda x, sigma, cond: denoiser(x, sigma, student.told(cond, scales.to(x).expand(len(x), -1)))


def unguided(denoiser: Denoiser, student: Student) -> Denoiser:
    """The denoiser of a student, told no guidance. UserError: it was trained with guidance only.

    >>> unguided(lambda x, sigma, cond: cond["settings"], Student())(torch.zeros(2, 1), 0, {}).tolist()
    [[0.0], [0.0]]
    """
    none = dict.fromkeys(student.conditions, 1.0) or 1.0
    return told(denoiser, student, told_scales(student, none))


@dataclass(frozen=True)
class PolicySolver:
    """A student's policies and the loop that follows them, as `guided.GuidedSolver` is of denoisers."""

    policies: Policies
    student: Student
    solver: str = "policy"

    def over(self, cover: Callable[[Denoiser], Denoiser]) -> PolicySolver:
        """The same on a canvas: `cover` makes a denoiser of windows one of the canvas."""
        return replace(self, policies=on_canvas(self.policies, cover))

    def agreeing(self, change: Callable[[Denoiser], Denoiser]) -> PolicySolver:
        """With `change` made to every policy, as `consistency.consistent` does."""
        return replace(self, policies=lambda *step: change(self.policies(*step)))

    def shifted(self, shift: Shift) -> PolicySolver:
        """With `shift` of the image at the beginning of a step added all along it."""

        def policies(x: Tensor, start: Tensor, end: Tensor, cond: Cond) -> Denoiser:
            policy = self.policies(x, start, end, cond)
            more = shift(policy(x, start, cond), start)
            return lambda y, sigma, cond: policy(y, sigma, cond) + more

        return replace(self, policies=policies)

    def lead(self, i: int, x: Tensor, sigmas: Tensor, cond: Cond) -> Denoiser:
        """The policies of step i where windows x (B,C,h,w) lie."""
        return self.policies(x, *(level.expand(len(x)) for level in sigmas[i : i + 2]), cond)

    def follow(
        self, i: int, x: Tensor, led: Denoiser, sigmas: Tensor, past: steps.Past, noise: samplers.Noise
    ) -> tuple[Tensor, steps.Past]:
        """x at sigmas[i + 1]; nothing is left for the next step. led: the policy at these places."""
        return steps.policy(i, x, led, sigmas, {}, self.student.substeps, self.student.shift)[0], ()

    def solve(self, x: Tensor, sigmas: Tensor, cond: Cond, noise: samplers.Noise, seen: samplers.Callback) -> Tensor:
        """x at the last of sigmas (N+1,), from x (B,C,H,W) at the first."""
        own = self.student
        return samplers.sample_policy(self.policies, x, sigmas, cond, own.substeps, own.shift, callback=seen)


def policy_solver(sampler: Sampler, model: LatentDiffusion, precision: torch.dtype, pixels: bool) -> PolicySolver:
    """The policies of a model's student under the guidance scale of the settings; clipped, of pixels.

    >>> from ldm.sampling.sampler import Sampler
    >>> policy_solver(Sampler().settled(student, "sample"), student, torch.float32, pixels=False).solver
    'policy'
    """
    scales = told_scales(model.student, sampler.guidance_scale)
    plain = model.policies(precision, sampler.compile, sampler.network(model))

    def policies(x: Tensor, start: Tensor, end: Tensor, cond: Cond) -> Denoiser:
        return plain(x, start, end, model.student.told(cond, scales.to(x).expand(len(x), -1)))

    return PolicySolver(clipped(policies) if pixels else policies, model.student)


def on_canvas(policies: Policies, cover: Callable[[Denoiser], Denoiser]) -> Policies:
    """Policies of a canvas from those of windows: each window's leads there, and their x0 are blended at every small
    step. The windows of a step are those of its first noise level, whatever draws them.

    >>> windows = lambda x, start, end, cond: lambda y, sigma, cond: y / 2
    >>> policies = on_canvas(windows, lambda denoiser: denoiser)
    >>> policy = policies(torch.ones(1, 1, 2, 2), torch.ones(1), torch.zeros(1), {})
    >>> policy(torch.ones(1, 1, 2, 2), torch.ones(1), {}).mean()
    tensor(0.5000)
    """

    def canvas(x: Tensor, start: Tensor, end: Tensor, cond: Cond) -> Denoiser:
        made: list[Denoiser] = []                                               # of the windows, batch by batch

        def begin(windows: Tensor, sigma: Tensor, conds: Cond) -> Tensor:
            made.append(policies(windows, sigma, end[:1].to(sigma).expand(len(windows)), conds))
            return made[-1](windows, sigma, conds)

        first = cover(begin)(x, start, cond)

        def policy(y: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            if y is x:
                return first
            parts = iter(made)

            def lead(windows: Tensor, _: Tensor, conds: Cond) -> Tensor:
                return next(parts)(windows, sigma[:1].to(windows.device).expand(len(windows)), conds)

            return cover(lead)(y, start, cond)

        return policy

    return canvas
