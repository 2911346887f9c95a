"""Body of `histoldm slide`: a slide from a grid of features (`ldm.commands.slide_making` makes its files)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ldm.commands.grids import Grid, asked_grid
from ldm.commands.outputs import provenance
from ldm.commands.overviews import asked_overview
from ldm.commands.slide_making import Making, check_outs, check_sampler, inside, make_slide
from ldm.conditioners.compose import parse_conditions
from ldm.convert import load_model, weights_of
from ldm.errors import UserError
from ldm.files import sha256
from ldm.requests.layout import read_layout
from ldm.requests.sampling import AskedSampler
from ldm.sampling.canvas import Canvas
from ldm.sampling.glass import Glass
from ldm.sampling.overviews import reading_of
from ldm.sampling.sampler import Sampler, Windows, changed
from ldm.sampling.stream import check_pointwise

NEAR, FAR = 0.1, 1.6  # of a tile: how far apart neighbours of a grid may lie


@dataclass(frozen=True)
class AskedSlide:
    """What a command line asks: the model, a grid of features or a layout of conditions, and where the slide goes.

    outs: files (SLIDES). size: (width, height) in pixels. quality: of the TIFF's JPEG. overview: image of the whole.
    """

    model: Path
    outs: Sequence[Path]
    features: Path | None = None
    layout: Path | None = None
    feature: str | None = None
    region: tuple[int, ...] | None = None
    size: tuple[int, int] | None = None
    mpp: float | None = None
    conditions: Sequence[str] = ()
    quality: int = 90
    device: str = "cpu"
    overview: Path | None = None

    def __post_init__(self) -> None:
        if (self.features is None) == (self.layout is None):
            raise UserError("a slide is made from --features or from a --layout; give one of them.")
        if self.layout is not None and (self.region or self.feature):
            raise UserError("--region and --feature go with --features; leave them out with a --layout.")
        check_outs(self.outs)


def generate_slide(asked: AskedSlide, sampler: AskedSampler, windows: Windows) -> None:
    """Make a slide, or go on with one that was stopped."""
    make_slide(asked.device, lambda device: making_of(replace(asked, device=device), sampler, windows))


def making_of(asked: AskedSlide, sampler: AskedSampler, windows: Windows) -> Making:
    """What is asked, checked. UserError: what the model, the grid or the solver cannot have."""
    if windows.offload:
        raise UserError("the canvas of a slide is on disk, and the device holds a part of it; leave --offload out.")
    check_sampler(sampler)
    model = load_model(asked.model, asked.device)
    chosen = sampler.loaded(model)
    given = parse_conditions(model.cond_stage_model, asked.conditions)
    about = sampler.record(chosen, model, "large_image") | changed(windows)
    size = asked.size and asked.size[::-1]
    low, seen = asked_overview(asked.overview, windows)
    if asked.layout is not None:
        layout = read_layout(asked.layout, model.cond_stage_model)
        grid = Grid(layout.cells, asked.layout.name, mpp=asked.mpp)
        canvas = Canvas.of_layout(model, layout.cells, layout.values, size, chosen, windows, given, low)
        about["layout_sha256"] = sha256(asked.layout)
    else:
        grid = asked_grid(model, asked.features, asked.feature, asked.region, asked.mpp)
        canvas = Canvas.of(model, grid.features, size or grid.size, chosen, windows, given, grid.background, low)
        if asked.size:
            check_spacing(canvas)
    mpp = grid.mpp or model.metadata.get("mpp")
    if mpp is None:
        raise UserError("the model does not know its micrometres per pixel; give --mpp.")
    check_pointwise(canvas.sampler.solver)
    height, width = (side * model.first_stage_model.downsampling for side in canvas.size)
    known = {"grid": list(grid.features.shape[:2]), "tile_px": model.tile_size, "mpp": mpp}
    text = provenance(
        asked.model, model, " ".join([grid.words, *asked.conditions]),
        about | seen | {"model_sha256": weights_of(asked.model)} | grid.place | known | {"size": f"{width}x{height}"},
    )  # fmt: skip
    record = text | {"grid_sha256": hashlib.sha256(grid.features.tobytes()).hexdigest()} | inside(canvas, asked.quality)
    return Making(
        canvas, asked.outs, (height, width), mpp, text, record, Sampler.usual(model, "large_image"), asked.quality,
        partial(Glass.of, canvas, grid.background) if canvas.field.holes.any() else None,
        partial(reading_of, canvas) if canvas.overview is not None else None,
    )  # fmt: skip


def check_spacing(canvas: Canvas) -> None:
    """UserError if the grid of features of a canvas is not one of its size.

    >>> check_spacing(Canvas.of(model, torch.randn(20, 20, 8), size=(32, 32)))
    Traceback (most recent call last):
    ldm.errors.UserError: the grid of 20 rows and 20 columns does not match 32 x 32 px: its features would lie 1 px ...
    """
    rows, cols = canvas.field.holes.shape
    size = tuple(side * canvas.model.first_stage_model.downsampling for side in canvas.size)
    tile = canvas.model.tile_size / canvas.field.cells
    steps = [(side - tile) / (count - 1) for side, count in zip(size, (rows, cols)) if count > 1]
    alone = all(side <= FAR * tile for side, count in zip(size, (rows, cols)) if count == 1)
    even = max(steps, default=1.0) - min(steps, default=1.0) <= 0.1 * tile
    if alone and even and all(NEAR * tile <= step <= FAR * tile for step in steps):
        return
    whole = f"{round(cols * tile)} x {round(rows * tile)} px"
    apart = " and ".join(f"{step:.0f}" for step in dict.fromkeys(reversed(steps))) or "no"
    raise UserError(
        f"the grid of {rows} rows and {cols} columns does not match {size[1]} x {size[0]} px: its features would lie "
        f"{apart} px apart, and each is of a tile of {tile:g} px. Tiles side by side are {whole}; leave --size out, or "
        "give the grid of this size."
    )
