"""A slide under another condition, in parts: what `stream` takes up the noise levels and down again.

The slide is encoded band by band, followed up under the source's condition, and down under the target's, as `translate`
does with an image in memory: with windows at fixed places, so that a place of the one is the same place of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser
from ldm.diffusion.guidance import expand_cond
from ldm.diffusion.steps import Noise, Past
from ldm.diffusion.tiled import Corner, Cover
from ldm.errors import UserError
from ldm.rng import canvas_noise, fold
from ldm.sampling.bands import Bands
from ldm.sampling.canvas import encode_part, encoded_at_once
from ldm.sampling.guided import GuidedSolver
from ldm.sampling.local_norm import CELLS, span_of, spans
from ldm.sampling.sampler import Inversion, Sampler
from ldm.sampling.stream import check_pointwise
from ldm.sampling.students import PolicySolver
from ldm.sampling.translate import check_shape, levels_of, settled, way_up, windows_of

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

Read = Callable[[slice, slice], np.ndarray]  # rows, columns of a slide in pixels of the model -> (h,w,3) uint8


@dataclass(frozen=True)
class TwoWays:
    """Steps up the noise levels under the source's condition, then down under the target's.

    turn: how many go up. source, target: conditions of one sample.
    """

    up: GuidedSolver | None
    down: GuidedSolver | PolicySolver
    turn: int
    source: Cond
    target: Cond

    def lead(self, i: int, x: Tensor, sigmas: Tensor, cond: Cond) -> Denoiser:
        """What step i follows where windows x (B,C,h,w) lie."""
        own = {part: value.to(x.device) for part, value in (self.source if i < self.turn else self.target).items()}
        cond = {**expand_cond(own, len(x)), **cond}
        if i < self.turn:
            return self.up.lead(i, x, sigmas[: self.turn + 1], cond)
        return self.down.lead(i - self.turn, x, sigmas[self.turn :], cond)

    def follow(
        self, i: int, x: Tensor, led: Denoiser, sigmas: Tensor, past: Past, noise: Noise
    ) -> tuple[Tensor, Past]:
        """x after step i, and what the next needs; nothing of the way up is of use on the way down."""
        if i < self.turn:
            x, past = self.up.follow(i, x, led, sigmas[: self.turn + 1], past, noise)
            return x, () if i == self.turn - 1 else past
        return self.down.follow(i - self.turn, x, led, sigmas[self.turn :], past, noise)


@dataclass(frozen=True)
class SlideTranslation:
    """A slide that becomes another, of which every place can be had by itself.

    Attributes:
        size: (height, width) in latents. pixels: the same in pixels, of the slide itself. read: the slide.
        sampler, inversion: settled. sigmas: noise levels up and down. solver: of windows.
        kept: where its encoded bands are kept.
    """

    model: LatentDiffusion
    size: tuple[int, int]
    pixels: tuple[int, int]
    read: Read
    sampler: Sampler
    inversion: Inversion
    sigmas: Tensor
    solver: TwoWays
    kept: Path
    led: ClassVar[dict[str, Tensor]] = {}

    @classmethod
    def of(
        cls, model: LatentDiffusion, pixels: tuple[int, int], read: Read, kept: Path, source: Cond, target: Cond,
        sampler: Sampler | None = None, inversion: Inversion | None = None,
    ) -> SlideTranslation:  # fmt: skip
        """A slide of (height, width) pixels and its way. UserError: settings that do not allow it in parts.

        >>> null, white = model.null_condition(), np.full((32, 48, 3), 255, np.uint8)
        >>> read = lambda rows, cols: white[rows, cols]
        >>> SlideTranslation.of(model, (32, 48), read, Path("canvas"), null, null, Sampler(steps=3)).sigmas.shape
        torch.Size([5])
        """
        sampler, inversion = settled(sampler or Sampler(), inversion or Inversion(), model)
        check_shape(model, 3, *pixels, "the slide")
        if model.image_condition:
            raise UserError("the model's condition is the image itself, of which a slide in parts has none.")
        for name in ("enlarge", "exact", "published"):
            if getattr(inversion, name):
                raise UserError(f"{name} is of images in memory, not of slides; leave it out.")
        check_pointwise(sampler.solver)
        levels = levels_of(model, sampler, inversion)
        inverts = inversion.start == "invert"
        up = GuidedSolver(sampler.solver, 0.0, way_up(model, sampler, inversion)) if inverts else None
        guided = sampler if target or sampler.guide is not None else replace(sampler, guidance_scale=1.0)
        solver = TwoWays(up, guided.guided(model, target), (len(levels) - 1) * inverts, source, target)
        sigmas = torch.cat([levels.flip(0), levels[1:]]) if inverts else levels
        factor = model.first_stage_model.downsampling
        size = tuple(-(-side // factor) for side in pixels)
        return cls(model, size, pixels, read, sampler, inversion, sigmas, solver, kept)

    @cached_property
    def encoded(self) -> Bands:
        """The slide's latents: step 1 of bands of their own, written as they are first asked for."""
        return Bands(self.kept, self.size, self.encode)

    def encode(self, top: int, rows: int) -> Tensor:
        """Latents (1,C,rows,width) of the rows from `top` on, from the pixels about them."""
        model, factor = self.model, self.model.first_stage_model.downsampling
        part, halo = encoded_at_once(model)
        align = max(model.image_size // CELLS, 1)
        down = span_of(top, top + rows, self.size[0], halo, align)
        out = torch.empty(1, model.channels, rows, self.size[1])
        for across in spans(self.size[1], part, halo, align):
            there = (slice(own.window.start * factor, own.window.stop * factor) for own in (down, across))
            seen = torch.tensor(self.read(*there)).to(model.device).movedim(-1, 0)[None].float() / 127.5 - 1
            out[..., across.tile] = encode_part(model, seen, down, across).cpu()
        return out

    def covering(self, size: tuple[int, int], sigma: float) -> Cover:
        """The windows at a noise level: at the same places at all of them."""
        return windows_of(self.model, size)

    def condition(self, corners: Sequence[Corner]) -> dict[str, Tensor]:
        """Nothing: the conditions are the same everywhere, and those of the way up are others than of the way down."""
        return {}

    def bare(self, corners: Sequence[Corner]) -> list[bool]:
        """No window is without a condition."""
        return [False] * len(corners)

    def start(self, top: int, rows: int) -> Tensor:
        """x (1,C,rows,width) at the first level, of the rows from `top` on."""
        z = self._latents(top, rows)
        return z if self.inversion.start == "invert" else z + self.noise(-1, top, rows) * self.sigmas[0].cpu()

    def noise(self, step: int, top: int, rows: int) -> Tensor:
        """What a step of a solver adds to some rows."""
        seed = fold(self.sampler.seed, 0)
        return canvas_noise(seed, self.model.channels, rows, self.size[1], stream=step + 1, top=top)

    def _latents(self, top: int, rows: int) -> Tensor:
        for band in range(top // self.encoded.rows, (top + rows - 1) // self.encoded.rows + 1):
            first, last = self.encoded.span(band)
            if band in self.encoded.left(1):
                self.encoded.write(1, band, self.encode(first, last - first))
        return self.encoded.part(1, slice(top, top + rows))
