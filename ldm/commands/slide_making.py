"""The files of a slide in the making, by one process or several, that goes on where it stopped.

All that an unfinished slide consists of is in one folder beside it, `.slide-<hash of its name>`: what it is made from
(`made.json`), its canvas step by step (`ldm.sampling.bands`), then the levels of an OME-Zarr, shard by shard, then the
TIFF. What is there is done; what is finished is given its name, and the folder removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from ldm.commands.outputs import differing
from ldm.diffusion.overview import Reading
from ldm.errors import UserError, notes_kept
from ldm.files import hidden, owned, remove, remove_empty, room, tool_version, write_text
from ldm.images.marks import read_mark
from ldm.images.pyramid import SHARD, TILE, Level, create_ome_zarr, level_sizes
from ldm.images.slide_tiff import thumbnail, write_slide_tiff
from ldm.images.write import save_png
from ldm.requests.sampling import AskedSampler
from ldm.sampling.bands import BAND, PATIENCE, Bands
from ldm.sampling.glass import Glass
from ldm.sampling.ranks import Ranks, joined
from ldm.sampling.sampler import Sampler
from ldm.sampling.shards import ShardDecoder
from ldm.sampling.stream import Places, stream, workers

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

SLIDES = (".ome.zarr", ".tif", ".tiff")
HISTORY = {"dpmpp_2m": 1, "dpmpp_2m_sde": 1, "dpmpp_3m_sde": 2, "unipc": 3}  # canvases that a solver keeps beside x
OVERVIEW = 2048  # pixels along the longer side of the picture of the whole slide
PER_PIXEL = 4.0  # bytes of a pixel in all levels of an OME-Zarr, or of a TIFF, at most


class Painted(Places, Protocol):
    """Places of a model's canvas, such as `canvas.Canvas` or `slide_translation.SlideTranslation`."""

    model: LatentDiffusion
    sampler: Sampler

    def start(self, top: int, rows: int) -> torch.Tensor: ...


def check_outs(outs: Sequence[Path]) -> None:
    """UserError if a slide cannot have these names.

    >>> check_outs([Path("a.png")])
    Traceback (most recent call last):
    ldm.errors.UserError: a slide is written as .ome.zarr, .tif, .tiff; got a.png.
    """
    for out in outs:
        if not out.name.endswith(SLIDES):
            raise UserError(f"a slide is written as {', '.join(SLIDES)}; got {out}.")
    names = [out.resolve() for out in outs]
    if len({*names}) < len(names) or len({out.parent.resolve() for out in outs}) > 1:
        raise UserError("the files of --out have different names, in one folder.")


def check_sampler(sampler: AskedSampler) -> None:
    """UserError for what no slide can be asked, before its model is read."""
    if sampler.sampler.compile:
        raise UserError("a slide has batches of several sizes, for which no network is compiled; leave it out.")


def inside(canvas: Painted, quality: int) -> dict[str, Any]:
    """What changes bytes of a slide and is not told by its files."""
    side = shard_side(canvas.model)
    known = {"version": tool_version(), "batch_size": canvas.sampler.batch_size, "band": BAND}
    return known | {"jpeg_quality": quality, "shard": side}


def scratch_of(outs: Sequence[Path]) -> Path:
    """The folder of the unfinished slide of these files.

    >>> scratch_of([Path("out/a.tif")]).parent
    PosixPath('out')
    """
    return hidden(outs[0], ".slide")


def make_slide(device: str, build: Callable[[str], Making]) -> None:
    """Make what `build` describes on a device, or go on with what was stopped: see the module."""
    with joined() as ranks, ExitStack() as stack:
        with ranks.together(), nullcontext() if ranks.leads else notes_kept():
            made = build(device_of(device, ranks))
        ranks.agree(made.record["model_sha256"][:16], "weights of the model")
        ranks.agree(made.digest, "settings or sources")
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
class Making:
    """A slide in the making.

    canvas: in latents. outs: files (SLIDES). size: (height, width) in pixels. text: what its files say of themselves.
    record: `text`, and what else changes a byte. usual: settings that need not be told. quality: of the TIFF's JPEG.
    glass: makes what windows without a condition are. reading: makes that of the canvas's overview, if it has one.
    beside: canvases that are kept besides the solver's.
    """

    canvas: Painted
    outs: Sequence[Path]
    size: tuple[int, int]
    mpp: float
    text: dict[str, Any]
    record: dict[str, Any]
    usual: Mapping[str, Any]
    quality: int = 90
    glass: Callable[[], Glass] | None = None
    reading: Callable[[], Reading] | None = None
    beside: int = 0

    @property
    def scratch(self) -> Path:
        """The folder of the unfinished slide."""
        return scratch_of(self.outs)

    @property
    def overview(self) -> Path:
        """The picture of the whole slide."""
        name = self.outs[0].name
        return self.outs[0].with_name(name[: -len(next(end for end in SLIDES if name.endswith(end)))] + ".overview.png")

    def __post_init__(self) -> None:
        object.__setattr__(self, "record", json.loads(json.dumps(self.record, default=str)))

    @property
    def digest(self) -> str:
        """Of all that changes a byte."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def zarr(self) -> Path:
        """The OME-Zarr, which a TIFF is made of too; in the folder of the unfinished slide until it is whole."""
        done = (out for out in self.outs if out.name.endswith(".zarr") and out.exists())
        return next(done, self.scratch / "levels.ome.zarr")

    def begun(self, stack: ExitStack) -> list[str]:
        """Own the place, look at what is there, and begin or go on. Names of the files that are to be made.

        stack: what ends with the run. UserError: another run writes there, something else is there, too little disk.
        """
        scratch = self.scratch
        stack.callback(remove_empty, scratch)
        stack.enter_context(owned(scratch, of=self.outs[0]))
        left = []
        for out in self.outs:
            if not os.path.lexists(out):
                left.append(out.name)
            elif not (found := read_mark(out, whole=True)) or (differ := differing(found, self.text, self.usual)):
                what = f"was made otherwise ({', '.join(differ)})" if found else "is not such a slide, or damaged"
                raise UserError(f"{out} is there and {what}; choose another --out, or remove it.")
        told = scratch / "made.json"
        if told.exists():
            if differ := differing(json.loads(told.read_text()), self.record, {}):
                raise UserError(
                    f"{scratch} holds an unfinished slide that is made otherwise ({', '.join(differ)}): go on with it "
                    "by the command that began it, remove the folder to give it up, or choose another --out."
                )
            print(f"going on with what is there of {self.outs[0]}")
        elif left:
            check_room(scratch, self.needed(), f"{self.outs[0]} ({self.size[1]} x {self.size[0]} px)")
            write_text(told, json.dumps(self.record, indent=1))
        for partial in scratch.rglob("*.partial"):  # of zarr, when it was killed
            remove(partial)
        return left

    def needed(self) -> int:
        """Bytes of disk that the slide takes at most while it is made."""
        solver, (height, width) = self.canvas.sampler.solver, self.canvas.size
        one = 4 * self.canvas.model.channels * height * width
        state = one * (1 + HISTORY.get(solver, 0))
        kinds = 1 + any(not out.name.endswith(".zarr") for out in self.outs)
        return round(self.beside * one + max(2 * state, state + kinds * PER_PIXEL * self.size[0] * self.size[1]))

    def make(self, left: Sequence[str], ranks: Ranks) -> None:
        """All that is to be made of the files `left`, in the folder of the unfinished slide."""
        sampler, model, scratch = self.canvas.sampler, self.canvas.model, self.scratch
        with ranks.together(), workers(model.device):
            if ranks.leads:
                self.prepare()
        levels = [Level(self.zarr / str(i), PATIENCE * (ranks.size > 1)) for i in range(len(level_sizes(*self.size)))]
        glass = Glass.load(scratch / "glass.npz") if (scratch / "glass.npz").exists() else None
        read = scratch / "reading.npz"
        told = self.canvas.overview.by(Reading.load(read)) if read.exists() else None
        bands = Bands(scratch, self.canvas.size, self.canvas.start, shared=ranks.size > 1)
        if ranks.told(levels[0].left()):
            latent = glass and glass.latent
            step = stream(self.canvas, bands, model.device, sampler.batch_size, latent, told, ranks, sampler.progress)
            decoder = ShardDecoder(model, bands, step, sampler.decoder, glass)
            with workers(model.device):
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
                write_slide_tiff(part, levels, self.mpp, self.text, self.quality, sampler.progress)
                os.replace(part, tiff)

    def prepare(self) -> None:
        """The levels without their pixels, the glass, if there is any, and how colours are read for an overview."""
        scratch = self.scratch
        if not self.zarr.exists():
            part = scratch / ".levels"
            remove(part)
            name = next((out.name for out in self.outs if out.name.endswith(".zarr")), self.outs[0].name)
            side = shard_side(self.canvas.model)
            os.replace(create_ome_zarr(part, name, self.size, self.mpp, self.text, side), self.zarr)
        if self.glass is not None and not (scratch / "glass.npz").exists():
            part = scratch / ".glass.npz"
            self.glass().save(part)
            os.replace(part, scratch / "glass.npz")
        if self.reading is not None and not (scratch / "reading.npz").exists():
            part = scratch / ".reading.npz"
            self.reading().save(part)
            os.replace(part, scratch / "reading.npz")

    def finish(self, left: Sequence[str]) -> None:
        """Give what is made its names, and remove the rest."""
        size = f"{self.size[1]} x {self.size[0]} px"
        if left:
            levels = [Level(self.zarr / str(i)) for i in range(len(level_sizes(*self.size)))]
            picture = save_png(self.scratch / "overview.png", thumbnail(levels, OVERVIEW), self.text)
            os.replace(picture, self.overview)
        tiff = self.scratch / "slide.tif"
        for out in sorted(self.outs, key=lambda out: out.name.endswith(".zarr")):  # of which the others are made, last
            if out.name not in left:
                print(f"{out} is there already ({size})")
                continue
            os.replace(self.zarr if out.name.endswith(".zarr") else tiff, out)
            print(f"wrote {out} ({size})")
        if left:
            print(f"wrote {self.overview}, the whole slide at a glance")
        for path in self.scratch.iterdir():
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
