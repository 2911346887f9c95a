"""A solver's steps over a canvas larger than memory, band by band, by one process or several; stopped, it goes on.

Every solver here asks its denoiser and goes on place by place (`ldm.diffusion.steps`). So a band of the canvas takes
its next step as soon as the windows that reach into it are evaluated, and a step is done when all bands are. Windows
come row by row, in batches that are a function of their place: neither the number of processes nor what was done before
changes a bit of the result. Rows of windows that reach into bands of two processes are evaluated by both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.devices import send
from ldm.diffusion.choices import POINTWISE
from ldm.diffusion.denoiser import Cond, Denoiser
from ldm.diffusion.overview import Overview
from ldm.diffusion.steps import Noise, Past
from ldm.diffusion.tiled import Corner, Cover, window_conds
from ldm.errors import UserError
from ldm.sampling.bands import Bands
from ldm.sampling.ranks import Ranks

ALONE = Ranks()


class Solver(Protocol):
    """What takes steps, such as `guided.GuidedSolver`."""

    def lead(self, i: int, x: Tensor, sigmas: Tensor, cond: Cond) -> Denoiser: ...

    def follow(
        self, i: int, x: Tensor, led: Denoiser, sigmas: Tensor, past: Past, noise: Noise
    ) -> tuple[Tensor, Past]: ...


class Places(Protocol):
    """A canvas of which every place can be had by itself, such as `canvas.Canvas`."""

    size: tuple[int, int]
    sigmas: Tensor
    solver: Solver
    led: Mapping[str, Tensor]

    def covering(self, size: tuple[int, int], sigma: float) -> Cover: ...

    def condition(self, corners: Sequence[Corner]) -> dict[str, Tensor]: ...

    def bare(self, corners: Sequence[Corner]) -> list[bool]: ...

    def noise(self, step: int, top: int, rows: int) -> Tensor: ...


class Led(NamedTuple):
    """Windows of one batch, and what leads where they lie."""

    corners: Sequence[Corner]
    lead: Denoiser


def check_pointwise(solver: str) -> None:
    """UserError unless a solver's steps can be taken band by band.

    >>> check_pointwise("heun")
    Traceback (most recent call last):
    ldm.errors.UserError: a slide is made step by step in parts, which the solver 'heun' does not allow, as it asks ...
    """
    if solver not in POINTWISE:
        raise UserError(
            f"a slide is made step by step in parts, which the solver '{solver}' does not allow, as it asks the "
            f"network more than once a step; take one of {', '.join(POINTWISE[:-2])}."
        )


@torch.no_grad()
def stream(
    canvas: Places,
    bands: Bands,
    device: torch.device,
    batch_size: int = 16,
    glass: Tensor | None = None,
    overview: Overview | None = None,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> int:
    """Take a canvas through all steps of its solver; how many there are. What is done already is not done again.

    Args:
        bands: where it is kept; after the call, the last step alone. batch_size: windows that the network sees at once,
            all of one row. ranks: which processes share the work.
        glass: (C,), x0 where the canvas has no condition; such windows are not evaluated. None: they are.
        overview: what the canvas is to agree with, with its reading.

    >>> from ldm.sampling.canvas import Canvas
    >>> canvas = Canvas.of(model, torch.randn(2, 3, 8))
    >>> bands = Bands(Path("canvas"), canvas.size, canvas.start)
    >>> steps = stream(canvas, bands, model.device, progress=False)
    >>> steps, bands.part(steps, slice(0, 16)).shape
    (10, torch.Size([1, 4, 16, 24]))
    """
    count = len(canvas.sigmas) - 1
    begun = ranks.told(bands.reached())
    shown = progress and ranks.leads
    with (
        tqdm(total=count * len(bands), desc="steps", unit="band", initial=begun * len(bands), disable=not shown) as bar,
        workers(device) as evaluate,
    ):
        for i in range(begun, count):
            step = _Step(canvas, bands, i, device, batch_size, glass, overview, evaluate)
            if ranks.leads:
                bands.forget(i)
            left = ranks.told(bands.left(i + 1))
            mine = [left[k] for k in ranks.share([step.cost(band) for band in left])]
            with ranks.together():
                for band in mine:
                    step.take(band)
                    bar.update()
            bar.update((i + 1) * len(bands) - bar.n)
    if ranks.leads:
        bands.forget(count)
    return count


class _Step:
    """One step of a canvas: windows are evaluated when a band first needs them, and let go when none does any more."""

    def __init__(
        self, canvas: Places, bands: Bands, i: int, device: torch.device, batch_size: int, glass: Tensor | None,
        overview: Overview | None, evaluate: Callable[..., Iterator[Denoiser]],
    ) -> None:  # fmt: skip
        self.overview = overview
        self.canvas, self.bands, self.i, self.device, self.batch_size = canvas, bands, i, device, batch_size
        self.sigmas = canvas.sigmas.to(device)
        self.cover = canvas.covering(canvas.size, float(canvas.sigmas[i]))
        self.glass = None if glass is None else glass.view(1, -1, 1, 1).to(device)
        self.evaluate = evaluate
        self.held: dict[int, list[Led]] = {}  # first row of windows -> what leads there
        self._wanted: dict[int, list[Corner]] = {}

    def wanted(self, row: int) -> list[Corner]:
        """Windows of a row that are to be evaluated: all but those on glass."""
        if row not in self._wanted:
            corners = [(row, col) for col in self.cover.cols]
            bare = [False] * len(corners) if self.glass is None else self.canvas.bare(corners)
            self._wanted[row] = [corner for corner, alone in zip(corners, bare) if not alone]
        return self._wanted[row]

    def reach(self, band: int) -> tuple[int, int]:
        """The rows on which those of a band depend: with an overview, some of the neighbours' too."""
        span = self.bands.span(band)
        return span if self.overview is None else self.overview.rows.reach(*span)

    def rows(self, band: int) -> list[int]:
        """First rows of the windows on which a band depends."""
        top, bottom = self.reach(band)
        return [row for row in self.cover.rows if row < bottom and row + self.cover.window > top]

    def cost(self, band: int) -> float:
        """About what a band costs, in windows."""
        top, bottom = self.reach(band)
        reach = ((min(row + self.cover.window, bottom) - max(row, top), row) for row in self.rows(band))
        return 1 + sum(len(self.wanted(row)) * tall / self.cover.window for tall, row in reach)

    def take(self, band: int) -> None:
        """The step of one band. Bands are taken from top to bottom."""
        rows, (top, bottom) = self.rows(band), self.bands.span(band)
        self.held = {row: self.held[row] if row in self.held else self._leads(row) for row in rows}
        x, past = self.bands.read(self.i, band)
        x, past = x.to(self.device), tuple(each.to(self.device) for each in past)
        led = self._field(rows, top, bottom)
        if self.overview is not None:
            led = self._shifted(led, band, rows)
        follow = self.canvas.solver.follow
        noise: Noise = lambda i: self.canvas.noise(i, top, bottom - top)  # noqa: E731
        self.bands.write(self.i + 1, band, *follow(self.i, x, led, self.sigmas, past, noise))

    def _shifted(self, led: Denoiser, band: int, rows: Sequence[int]) -> Denoiser:
        """What leads in a band, with the shift towards the overview added that its x0 has as the step begins."""
        (top, bottom), (first, last) = self.bands.span(band), self.reach(band)
        x = self.bands.part(self.i, slice(first, last)).to(self.device)
        sigma = self.sigmas[self.i].expand(1)
        x0 = self._field(rows, first, last)(x, sigma, {})
        shift = self.overview.shift(x0, sigma, first)[:, :, top - first : bottom - first]
        return lambda y, sigma, cond: led(y, sigma, cond) + shift

    def _leads(self, row: int) -> list[Led]:
        """What leads in the windows of a row: evaluated in batches, all of about one size, or glass."""
        wanted, window = self.wanted(row), self.cover.window
        leads = []
        if wanted:
            x = self.bands.part(self.i, slice(row, row + window))
            count = -(-len(wanted) // self.batch_size)
            ends = [round(k * len(wanted) / count) for k in range(count + 1)]
            chunks = [wanted[first:last] for first, last in pairwise(ends)]
            leads = [Led(*pair) for pair in zip(chunks, self.evaluate(lambda chunk: self._lead(chunk, x), chunks))]
        if bare := [(row, col) for col in self.cover.cols if (row, col) not in set(wanted)]:
            leads.append(Led(bare, lambda y, *_: self.glass.expand_as(y)))
        return leads

    def _lead(self, corners: Sequence[Corner], x: Tensor) -> Denoiser:
        """What leads in windows at corners; x (1,C,window,width): their rows."""
        canvas, window = self.canvas, self.cover.window
        windows = torch.stack([x[0, ..., col : col + window] for _, col in corners])
        own = window_conds(canvas.led, [0] * len(corners), corners, window)
        conds = canvas.condition(corners) | {name: send(part, self.device) for name, part in own.items()}
        return canvas.solver.lead(self.i, send(windows, self.device), self.sigmas, conds)

    def _field(self, rows: Sequence[int], top: int, bottom: int) -> Denoiser:
        """What leads in rows top..bottom of the canvas: that of the windows there, averaged by weight."""
        window, width = self.cover.window, self.canvas.size[1]
        held = [self.held[row] for row in rows if row < bottom and row + window > top]
        like = torch.zeros(1, device=self.device)
        blend = self.cover.blending(like)
        weight = like.new_zeros(1, bottom - top, width)

        def place(corner: Corner) -> tuple[slice, slice, slice]:
            """Rows of a window in the field and of the field in the window, and its columns."""
            row, col = corner
            first, last = max(row, top), min(row + window, bottom)
            return slice(first - top, last - top), slice(first - row, last - row), slice(col, col + window)

        for corner in (corner for leads in held for led in leads for corner in led.corners):
            there, inside, cols = place(corner)
            weight[:, there, cols] += blend(corner)[:, inside]

        def field(y: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            total = torch.zeros_like(y)
            for led in (led for leads in held for led in leads):
                seen = y.new_zeros(len(led.corners), y.shape[1], window, window)  # 0 outside of the field
                for own, corner in zip(seen, led.corners):
                    there, inside, cols = place(corner)
                    own[:, inside] = y[0][:, there, cols]
                values = led.lead(seen, sigma.expand(len(seen)), cond)
                for own, corner in zip(values, led.corners):
                    there, inside, cols = place(corner)
                    total[0][:, there, cols] += own[:, inside] * blend(corner)[:, inside]
            return total.div_(weight)

        return field


@contextmanager
def workers(device: torch.device) -> Iterator[Callable[..., Iterator[Any]]]:
    """A context in which this process computes with one thread at a time for each task, so that rounding is the same on
    any number of cores; and a `map` that gives each core a task. On a GPU it takes one task after the other.

    >>> with workers(torch.device("cpu")) as evaluate:
    ...     list(evaluate(lambda x: x + 1, [1, 2]))
    [2, 3]
    """
    if device.type != "cpu":
        yield map
        return
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda task, given: pool.map(torch.no_grad()(task), given)
    finally:
        torch.set_num_threads(cores)
