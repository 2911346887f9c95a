"""Body of `histoldm slide`: a slide without limit of size, by one process or several, that goes on where it stopped.

All that an unfinished slide consists of is in one folder beside it, `.slide-<hash of its name>`: what it is made from
(`made.json`), its canvas step by step (`ldm.sampling.bands`), then the levels of an OME-Zarr, shard by shard, then the
TIFF. What is there is done; what is finished is given its name, and the folder removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ldm.commands.grids import Grid, asked_grid
from ldm.commands.outputs import differing, provenance
from ldm.conditioners.compose import parse_conditions
from ldm.convert import load_model, weights_of
from ldm.diffusion.choices import POINTWISE
from ldm.errors import UserError, notes_kept
from ldm.files import hidden, owned, remove, remove_empty, room, sha256, tool_version, write_text
from ldm.images.marks import read_mark
from ldm.images.pyramid import SHARD, TILE, Level, create_ome_zarr, level_sizes
from ldm.images.slide_tiff import thumbnail, write_slide_tiff
from ldm.images.write import save_png
from ldm.latent_diffusion import LatentDiffusion
from ldm.requests.layout import read_layout
from ldm.requests.sampling import AskedSampler
from ldm.sampling.bands import BAND, PATIENCE, Bands
from ldm.sampling.canvas import Canvas
from ldm.sampling.glass import Glass
from ldm.sampling.ranks import Ranks, joined
from ldm.sampling.sampler import Sampler, Windows, changed
from ldm.sampling.shards import ShardDecoder
from ldm.sampling.stream import stream

SLIDES = (".ome.zarr", ".tif", ".tiff")
HISTORY = {"dpmpp_2m": 1, "dpmpp_2m_sde": 1, "dpmpp_3m_sde": 2, "unipc": 3}  # canvases that a solver keeps beside x
OVERVIEW = 2048  # pixels along the longer side of the picture of the whole slide
NEAR, FAR = 0.2, 1.6  # of a tile: how far apart neighbours of a grid may lie
PER_PIXEL = 4.0  # bytes of a pixel in all levels of an OME-Zarr, or of a TIFF, at most


@dataclass(frozen=True)
class AskedSlide:
    """What a command line asks: the model, a grid of features or a layout of conditions, and where the slide goes.

    outs: files (SLIDES). size: (width, height) in pixels. quality: of the TIFF's JPEG.
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

    def __post_init__(self) -> None:
        if (self.features is None) == (self.layout is None):
            raise UserError("a slide is made from --features or from a --layout; give one of them.")
        if self.layout is not None and (self.region or self.feature):
            raise UserError("--region and --feature go with --features; leave them out with a --layout.")
        for out in self.outs:
            if not out.name.endswith(SLIDES):
                raise UserError(f"a slide is written as {', '.join(SLIDES)}; got {out}.")
        names = [out.resolve() for out in self.outs]
        if len({*names}) < len(names) or len({out.parent.resolve() for out in self.outs}) > 1:
            raise UserError("the files of --out have different names, in one folder.")

    @property
    def scratch(self) -> Path:
        """The folder of the unfinished slide."""
        return hidden(self.outs[0], ".slide")

    @property
    def overview(self) -> Path:
        """The picture of the whole slide."""
        name = self.outs[0].name
        return self.outs[0].with_name(name[: -len(next(end for end in SLIDES if name.endswith(end)))] + ".overview.png")


def generate_slide(asked: AskedSlide, sampler: AskedSampler, windows: Windows) -> None:
    """Make a slide, or go on with one that was stopped. See the module."""
    with joined() as ranks, ExitStack() as stack:
        with ranks.together(), nullcontext() if ranks.leads else notes_kept():
            asked = replace(asked, device=device_of(asked.device, ranks))
            made = Made.of(asked, sampler, windows)
        ranks.agree(made.record["model_sha256"][:16], "weights of the model")
        ranks.agree(made.digest, "settings or features")
        with ranks.together():
            left = [] if not ranks.leads else made.begun(stack)
        left = ranks.told(left)
        if left:
            made.make(left, ranks)
        with ranks.together():
            if ranks.leads:
                made.finish(left)


def device_of(device: str, ranks: Ranks) -> str:
    """The device of this process: of several on a machine each has a GPU of its own.

    >>> device_of("cpu", Ranks())
    'cpu'
    """
    count = torch.cuda.device_count()
    return f"cuda:{ranks.local % count}" if ranks.size > 1 and device.startswith("cuda") and count else device


@dataclass(frozen=True)
class Made:
    """A slide in the making.

    canvas: in latents. grid: of its features. size: (height, width) in pixels. text: what its files say of themselves.
    record: `text`, and what else changes a byte.
    """

    asked: AskedSlide
    canvas: Canvas
    grid: Grid
    size: tuple[int, int]
    mpp: float
    text: dict[str, Any]
    record: dict[str, Any]

    @classmethod
    def of(cls, asked: AskedSlide, sampler: AskedSampler, windows: Windows) -> Made:
        """What is asked, checked. UserError: what the model, the grid or the solver cannot have."""
        if windows.offload:
            raise UserError("the canvas of a slide is on disk, and the device holds a part of it; leave --offload out.")
        if sampler.sampler.compile:
            raise UserError("a slide has batches of several sizes, for which no network is compiled; leave it out.")
        model = load_model(asked.model, asked.device)
        chosen = sampler.loaded(model)
        given = parse_conditions(model.cond_stage_model, asked.conditions)
        about = sampler.record(chosen, model, "large_image") | changed(windows)
        size = asked.size and asked.size[::-1]
        if asked.layout is not None:
            layout = read_layout(asked.layout, model.cond_stage_model)
            grid = Grid(layout.cells, asked.layout.name, mpp=asked.mpp)
            canvas = Canvas.of_layout(model, layout.cells, layout.values, size, chosen, windows, given)
            about["layout_sha256"] = sha256(asked.layout)
        else:
            grid = asked_grid(model, asked.features, asked.feature, asked.region, asked.mpp)
            canvas = Canvas.of(model, grid.features, size or grid.size, chosen, windows, given, grid.background)
            check_spacing(canvas)
        mpp = grid.mpp or model.metadata.get("mpp")
        if mpp is None:
            raise UserError("the model does not know its micrometres per pixel; give --mpp.")
        if canvas.sampler.solver not in POINTWISE:
            raise UserError(
                f"a slide is made step by step in parts, which the solver '{canvas.sampler.solver}' does not allow, as "
                f"it asks the network more than once a step; take one of {', '.join(POINTWISE[:-2])}."
            )
        height, width = (side * model.first_stage_model.downsampling for side in canvas.size)
        known = {"grid": list(grid.features.shape[:2]), "tile_px": model.tile_size, "mpp": mpp}
        text = provenance(
            asked.model, model, " ".join([grid.words, *asked.conditions]),
            about | {"model_sha256": weights_of(asked.model)} | grid.place | known | {"size": f"{width}x{height}"},
        )  # fmt: skip
        inside = {
            "grid_sha256": hashlib.sha256(grid.features.tobytes()).hexdigest(), "version": tool_version(),
            "batch_size": chosen.batch_size, "jpeg_quality": asked.quality, "band": BAND, "shard": shard_side(model),
        }  # fmt: skip
        return cls(asked, canvas, grid, (height, width), mpp, text, json.loads(json.dumps(text | inside, default=str)))

    @property
    def digest(self) -> str:
        """Of all that changes a byte."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def zarr(self) -> Path:
        """The OME-Zarr, which a TIFF is made of too; in the folder of the unfinished slide until it is whole."""
        done = (out for out in self.asked.outs if out.name.endswith(".zarr") and out.exists())
        return next(done, self.asked.scratch / "levels.ome.zarr")

    def begun(self, stack: ExitStack) -> list[str]:
        """Own the place, look at what is there, and begin or go on. Names of the files that are to be made.

        stack: what ends with the run. UserError: another run writes there, something else is there, too little disk.
        """
        asked, scratch = self.asked, self.asked.scratch
        stack.callback(remove_empty, scratch)
        stack.enter_context(owned(scratch, of=asked.outs[0]))
        usual = Sampler.usual(self.canvas.model, "large_image")
        left = []
        for out in asked.outs:
            if not os.path.lexists(out):
                left.append(out.name)
            elif not (found := read_mark(out, whole=True)) or (differ := differing(found, self.text, usual)):
                what = f"was made otherwise ({', '.join(differ)})" if found else "is not such a slide, or damaged"
                raise UserError(f"{out} is there and {what}; choose another --out, or remove it.")
        told = scratch / "made.json"
        if told.exists():
            if differ := differing(json.loads(told.read_text()), self.record, {}):
                raise UserError(
                    f"{scratch} holds an unfinished slide that is made otherwise ({', '.join(differ)}): go on with it "
                    "by the command that began it, remove the folder to give it up, or choose another --out."
                )
            print(f"going on with what is there of {asked.outs[0]}")
        elif left:
            check_room(scratch, self.needed(), f"{asked.outs[0]} ({self.size[1]} x {self.size[0]} px)")
            write_text(told, json.dumps(self.record, indent=1))
        for partial in scratch.rglob("*.partial"):  # of zarr, when it was killed
            remove(partial)
        return left

    def needed(self) -> int:
        """Bytes of disk that the slide takes at most while it is made."""
        solver, (height, width) = self.canvas.sampler.solver, self.canvas.size
        state = 4 * self.canvas.model.channels * height * width * (1 + HISTORY.get(solver, 0))
        kinds = 1 + any(not out.name.endswith(".zarr") for out in self.asked.outs)
        return round(max(2 * state, state + kinds * PER_PIXEL * self.size[0] * self.size[1]))

    def make(self, left: Sequence[str], ranks: Ranks) -> None:
        """All that is to be made of the files `left`, in the folder of the unfinished slide."""
        sampler, model, scratch = self.canvas.sampler, self.canvas.model, self.asked.scratch
        with ranks.together():
            if ranks.leads:
                self.prepare()
        levels = [Level(self.zarr / str(i), PATIENCE * (ranks.size > 1)) for i in range(len(level_sizes(*self.size)))]
        glass = Glass.load(scratch / "glass.npz") if (scratch / "glass.npz").exists() else None
        bands = Bands(scratch, self.canvas.size, self.canvas.start, shared=ranks.size > 1)
        if ranks.told(levels[0].left()):
            latent = glass and glass.latent
            step = stream(self.canvas, bands, model.device, sampler.batch_size, latent, ranks, sampler.progress)
            decoder = ShardDecoder(model, bands, step, sampler.decoder, glass)
            shared(levels[0], ranks, "decode", sampler.progress, decoder.pixels)
        if ranks.leads:
            for path in scratch.glob("step-*"):
                remove(path)
        for finer, level in pairwise(levels):
            shared(level, ranks, "levels", sampler.progress and len(level.left()) > 1, finer.halved)
        tiff = scratch / "slide.tif"
        with ranks.together():
            if ranks.leads and any(not name.endswith(".zarr") for name in left) and not tiff.exists():
                part = scratch / ".slide.tif"
                write_slide_tiff(part, levels, self.mpp, self.text, self.asked.quality, sampler.progress)
                os.replace(part, tiff)

    def prepare(self) -> None:
        """The levels without their pixels, and the glass, if there is any."""
        scratch = self.asked.scratch
        if not self.zarr.exists():
            part = scratch / ".levels"
            remove(part)
            name = next((out.name for out in self.asked.outs if out.name.endswith(".zarr")), self.asked.outs[0].name)
            side = shard_side(self.canvas.model)
            os.replace(create_ome_zarr(part, name, self.size, self.mpp, self.text, side), self.zarr)
        if self.canvas.field.holes.any() and not (scratch / "glass.npz").exists():
            part = scratch / ".glass.npz"
            Glass.of(self.canvas, self.grid.background).save(part)
            os.replace(part, scratch / "glass.npz")

    def finish(self, left: Sequence[str]) -> None:
        """Give what is made its names, and remove the rest."""
        asked, size = self.asked, f"{self.size[1]} x {self.size[0]} px"
        if left:
            levels = [Level(self.zarr / str(i)) for i in range(len(level_sizes(*self.size)))]
            picture = save_png(asked.scratch / "overview.png", thumbnail(levels, OVERVIEW), self.text)
            os.replace(picture, asked.overview)
        tiff = asked.scratch / "slide.tif"
        for out in sorted(asked.outs, key=lambda out: out.name.endswith(".zarr")):  # of which the others are made, last
            if out.name not in left:
                print(f"{out} is there already ({size})")
                continue
            os.replace(self.zarr if out.name.endswith(".zarr") else tiff, out)
            print(f"wrote {out} ({size})")
        if left:
            print(f"wrote {asked.overview}, the whole slide at a glance")
        for path in asked.scratch.iterdir():
            if path.name != ".lock":
                remove(path)


def shared(level: Level, ranks: Ranks, what: str, progress: bool, pixels: Any) -> None:
    """Write what is left of a level, each process its own blocks: `pixels(rows, cols)` of each."""
    left = ranks.told(level.left())
    mine = [left[k] for k in ranks.share([1.0] * len(left))]
    with ranks.together():
        for block in tqdm(mine, desc=what, unit="shard", disable=not (progress and ranks.leads)):
            place = level.place(block)
            level[place] = pixels(*place)


def check_spacing(canvas: Canvas) -> None:
    """UserError if the grid of features of a canvas is not one of its size.

    >>> check_spacing(Canvas.of(model, torch.randn(8, 8, 8), size=(32, 32)))
    Traceback (most recent call last):
    ldm.errors.UserError: the grid of 8 rows and 8 columns does not match 32 x 32 px: its features would lie 2 px ...
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


def check_room(folder: Path, needed: int, what: str) -> None:
    """UserError if the disk of a folder has less room than is needed.

    >>> check_room(Path("out"), 10**18, "out/slide.tif")
    Traceback (most recent call last):
    ldm.errors.UserError: out/slide.tif needs up to 1,000,000,000,000 MB of disk while it is made, and ... are free ...
    """
    if needed > (free := room(folder)):
        raise UserError(
            f"{what} needs up to {needed / 1e6:,.0f} MB of disk while it is made, and {free / 1e6:,.0f} are free in "
            f"{folder.parent}; make room, or choose another --out."
        )


def shard_side(model: LatentDiffusion) -> int:
    """Pixels along a shard: whole chunks and whole latents, about SHARD."""
    factor = model.first_stage_model.downsampling
    least = int(np.lcm(TILE, factor))
    return least * max(SHARD // least, 1)
