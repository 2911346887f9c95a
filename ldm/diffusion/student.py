"""What a distilled model was trained for, and what its network's outputs mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser, per_sample
from ldm.diffusion.policies import POLICIES, Policies, clock, grid_policy, mixture_policy, policy_sigmas
from ldm.errors import UserError

METHODS = ("policy", "consistency", "guidance")
SETTINGS = "settings"  # the part of a condition that tells a student its guidance scales, and where its step ends
WIDTH = 0.5  # of a mixture's components before training, in units of how far x0 is unknown


@dataclass(frozen=True)
class Student:
    """A model that was trained to follow a teacher in few steps, under guidance that it is told as a number.

    Attributes:
        method: policy, a policy for each step (arXiv:2510.14974); consistency, the image that a noisy one leads to
            (arXiv:2310.04378); guidance, one guided prediction at the price of one (arXiv:2210.03142), any steps.
        steps: numbers of steps that it was trained for; of guidance any number is taken.
        policy: mixture or grid (`ldm.diffusion.policies`). components: of the mixture, or levels of the grid.
        substeps: of all steps together. shift: of `policies.clock`, along which steps are even.
        guidance: lowest and highest guidance scale that it was trained for; None: it is told none.
        conditions: names of the conditions that have a scale each, where there are several.

    >>> Student(steps=(2, 4)).sigmas(4, sigma_max=99.0)
    tensor([99.0000,  2.4146,  0.7370,  0.1647,  0.0000])
    """

    method: str = "policy"
    steps: Sequence[int] = (2, 4)
    policy: str = "mixture"
    components: int = 8
    substeps: int = 32
    shift: float = 1.0
    guidance: Sequence[float] | None = (1.0, 6.0)
    conditions: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value, choices in (("method", self.method, METHODS), ("policy", self.policy, POLICIES)):
            if value not in choices:
                raise UserError(f"a student's {name} is one of {', '.join(choices)}; got {value!r}.")
        steps = self.steps if isinstance(self.steps, Sequence) and not isinstance(self.steps, str) else []
        if not steps or not all(type(count) is int and 1 <= count <= 64 for count in steps):
            raise UserError(f"a student's steps are whole numbers from 1 to 64, as [2, 4]; got {self.steps!r}.")
        for name, low, high in (("components", 2, 64), ("substeps", max(steps), 1024)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UserError(f"a student's {name} are a whole number from {low} to {high}; got {value!r}.")
        if not isinstance(self.shift, int | float) or not 0 < self.shift <= 1000:
            raise UserError(f"a student's shift is a number above 0; got {self.shift!r}.")
        scales = self.guidance
        if scales is not None and not (
            isinstance(scales, Sequence) and len(scales) == 2 and 0 < scales[0] <= scales[1] < math.inf
        ):
            raise UserError(f"a student's guidance is its lowest and highest scale, as [1, 6]; got {scales!r}.")

    @property
    def scales(self) -> int:
        """How many guidance scales it is told."""
        return 0 if self.guidance is None else max(len(self.conditions), 1)

    @property
    def middles(self) -> list[float]:
        """The middle of the guidance scales that it is told, for each of them: their geometric mean."""
        return [math.sqrt(math.prod(self.guidance))] * self.scales if self.scales else []

    @property
    def outputs(self) -> dict[str, Any]:
        """What its network is made of its teacher's with (`ldm.networks.student.StudentNetwork`)."""
        if self.method != "policy":
            return {"copies": 1, "extra": 0, "settings": self.scales, "directions": self.middles}
        extra = self.components + 1 if self.policy == "mixture" else 0
        return {"copies": self.components, "extra": extra, "settings": self.scales + 1, "directions": self.middles}

    def words(self) -> str:
        """What it is, for a reader.

        >>> Student(steps=(2, 4)).words()
        'policy, 2 or 4 steps, guidance scale 1 to 6'
        """
        told = "no guidance scale" if self.guidance is None else "guidance scale {:g} to {:g}".format(*self.guidance)
        steps = "" if self.method == "guidance" else f"{' or '.join(map(str, self.steps))} steps, "
        return f"{self.method}, {steps}{told}"

    def sigmas(self, steps: int, sigma_max: float) -> Tensor:
        """Descending noise levels (steps+1,) of its steps. UserError: steps that it was not trained for."""
        if steps not in self.steps:
            known = " or ".join(map(str, self.steps))
            raise UserError(f"the student was trained for {known} steps; got {steps}.")
        return policy_sigmas(steps, sigma_max, self.shift)

    def told(self, cond: Cond, scales: Tensor) -> dict[str, Tensor]:
        """The condition with guidance scales (B,S), or (1,S), in it.

        >>> Student().told({}, torch.tensor([[1.0]]))
        {'settings': tensor([[0.]])}
        """
        return {**cond, SETTINGS: scales.log()} if self.scales else dict(cond)

    def policies(
        self, network: Callable[..., Tensor], make_denoiser: Callable[[Callable[..., Tensor]], Denoiser]
    ) -> Policies:
        """The policies that `network` gives, which predicts what `make_denoiser` makes x0 of."""

        def student(x: Tensor, start: Tensor, end: Tensor, cond: Cond) -> Denoiser:
            count, channels, outputs = len(x), x.shape[1], []

            def seen(*args: Tensor, **parts: Tensor) -> Tensor:
                outputs.append(network(*args, **parts))
                return outputs[0][:, :channels]

            make_denoiser(seen)(x, start, {**cond, SETTINGS: self._settings(cond, start, end)})
            out = outputs[0].to(x.dtype)
            copies = out[:, : self.components * channels].unflatten(1, (self.components, channels))
            repeated = (value.repeat_interleave(self.components, 0) for value in (x, start))
            x0 = make_denoiser(lambda *_: copies.flatten(0, 1))(*repeated, {}).unflatten(0, (count, self.components))
            if self.policy == "grid":
                return grid_policy(x0, start, end, self.shift)
            rest = out[:, self.components * channels :]
            unknown = WIDTH * start / (1 + start**2).sqrt()  # how far x0 is, of data of variance 1
            log_std = rest[:, -1:].mean((2, 3), keepdim=True)[:, None] + per_sample(unknown.log(), x0)
            return mixture_policy(x0, log_std, rest[:, :-1, None], x, start)

        return student

    def _settings(self, cond: Mapping[str, Tensor], start: Tensor, end: Tensor) -> Tensor:
        """What the network is told (B,S+1): the scales, and which part of the way to the image the step leaves."""
        left = (clock(end, self.shift) / clock(start, self.shift))[:, None]
        scales = cond[SETTINGS].expand(len(left), -1) if self.scales else left[:, :0]
        return torch.cat([scales, left.to(scales)], 1)
