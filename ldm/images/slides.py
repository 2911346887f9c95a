"""Opens slides and images of any kind behind one face: the one place where files become pixels.

What a file holds decides who reads it, not its ending: PNG, JPEG and their like Pillow (`plain`), what scanners write
OpenSlide (`scanned`), other TIFF and OME-TIFF tifffile (`tiff`), a folder zarr (`ome_zarr`). All give RGB of 8 bits,
upright, white where transparent, or the same refusal (`colour`, `scale`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import UserError
from ldm.foreign.paths import allowed
from ldm.images.damage import refuse_damaged
from ldm.images.kinds import is_plain
from ldm.images.ome_zarr import open_ome_zarr
from ldm.images.plain import open_plain
from ldm.images.scale import MOST
from ldm.images.scanned import open_scanned
from ldm.images.source import Source
from ldm.images.tiff import open_tiff

_BLOCK = 4096
_BAND, _FEW_ROWS = 2**25, 512  # pixels of a band, and rows that it has however wide: those of a tile of most files
_SMALL, _MOST = 2**28, 2**40  # pixels that any file may have; the largest slides have about 2**37
_PER_BYTE = 100_000  # pixels that a byte of a slide may stand for: a tile that is white, or not there
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of a level
GIVEN = "given by hand"  # the origin of a scale that no file says


class Slide:
    """One slide or image, read-only.

    Attributes:
        path: its file or OME-Zarr folder.
        dimensions: (width, height) of level 0 in pixels.
        mpp: micrometres per level-0 pixel, 0 where they are unknown.
        mpp_source: where they stand, such as "OME-XML"; "" where they are unknown.
        magnification: objective power, or None where the file does not say.
        gray: whether it has one channel; it is read as three that are alike.
        patient: whom the file names, as DICOM does; None where it names nobody.
        notes: what a user should know of how it is read. scale_notes: those of its micrometres per pixel.
        bounds: (x, y, width, height) of the part that a scanner filled, where it left a margin around it; else None.
    """

    def __init__(self, path: Path, source: Source, mpp: float | None = None, holds: bool = False) -> None:
        self.path, self.dimensions, self.magnification = path, source.levels[0], source.magnification
        self.gray, self.patient, self._levels, self._read_level = (
            source.gray,
            source.patient,
            source.levels,
            source.read,
        )
        self.bounds, self._loose = source.bounds, source.loose
        said = source.scale
        own = said.mpp and not holds
        self.mpp, self.mpp_source = (said.mpp, said.origin) if own or not mpp else (mpp, GIVEN)
        self.scale_notes, self.notes = said.notes, source.notes + said.notes
        if mpp and said.mpp and abs(said.mpp / mpp - 1) > 0.01:
            told = f"its {said.origin} says {said.mpp:g} um per pixel"
            given = f"the {mpp:g} given" + (" for it holds" if holds else " is for files that say none")
            self.notes += (f"{told}; {given}" if holds else f"{told}, which holds; {given}",)

    @classmethod
    def of_pixels(cls, pixels: np.ndarray, path: Path = Path("image"), mpp: float | None = None) -> Slide:
        """An image (H,W,3) uint8 that is in memory. path: what it is called in messages."""
        size = (pixels.shape[1], pixels.shape[0])
        return cls(path, Source([size], lambda level, x, y, w, h: pixels[y : y + h, x : x + w]), mpp)

    def __repr__(self) -> str:
        return f"Slide({self.path.name!r}, {self.dimensions[0]} x {self.dimensions[1]} px at {self.mpp:g} um/px)"

    @property
    def about(self) -> dict[str, Any]:
        """What a tile store records of it: magnification, mpp_source, and, where there are any, patient and notes.

        >>> open_image(slide_path).about
        {'magnification': 20.0, 'mpp_source': 'header (aperio)'}
        """
        known = {"patient": self.patient, "notes": list(self.notes)}
        about = {"magnification": self.magnification, "mpp_source": self.mpp_source}
        return about | {name: value for name, value in known.items() if value}

    def _best_level(self, downsample: float) -> tuple[int, float]:
        """The coarsest level that is not coarser than asked, and its own downsample."""
        factors = [self.dimensions[0] / w for w, _ in self._levels]
        level = max((i for i, f in enumerate(factors) if f <= downsample * 1.01), key=factors.__getitem__, default=0)
        return level, factors[level]

    def read(self, x: float, y: float, w: float, h: float, size: tuple[int, int] | None = None) -> np.ndarray:
        """Read a region given in level-0 pixels.

        Args:
            x, y, w, h: top-left corner and extent in level-0 pixels; may be fractions and may reach outside the slide.
            size: (width, height) of the result; None is one pixel per level-0 pixel.
        Returns:
            (height, width, 3) uint8 RGB, white outside the slide and where the file is transparent.
        Raises:
            UserError: the file cannot be decoded there.
        """
        width, height = size or (round(w), round(h))
        level, factor = self._best_level(min(w / width, h / height))
        box = (x / factor, y / factor, (x + w) / factor, (y + h) / factor)
        around = _around(box)
        return _fit(self._window(level, around), around, box, (width, height))

    def read_tiles(self, coords: np.ndarray, extent: float, side: int) -> np.ndarray:
        """Squares of the slide, each as `read` gives it; those in a row that overlap are cut from one part of it.

        coords (n, 2): corners x, y, and extent: the sides, in level-0 pixels. side: of a result. (n, side, side, 3).

        >>> slide = open_image(slide_path)
        >>> slide.read_tiles(np.array([(0, 0), (128, 0)]), 256, 256).shape
        (2, 256, 256, 3)
        """
        level, factor = self._best_level(extent / side)
        ends = np.stack([coords, coords + extent], 1).reshape(-1, 4)
        boxes = [tuple(box) for box in (ends / factor).tolist()]
        tiles = np.empty((len(boxes), side, side, 3), np.uint8)
        for run in _runs([_around(box) for box in boxes], alone=level in self._loose):
            around = (run[0][1][0], run[0][1][1], run[-1][1][2], run[0][1][3])
            part = self._window(level, around)
            for i, (x0, y0, x1, y1) in run:
                tiles[i] = _fit(part[:, x0 - around[0] : x1 - around[0]], (x0, y0, x1, y1), boxes[i], (side, side))
        return tiles

    def _window(self, level: int, around: Box) -> np.ndarray:
        """Whole pixels of a level, white outside of it."""
        x0, y0, x1, y1 = around
        level_w, level_h = self._levels[level]
        cx0, cy0, cx1, cy1 = max(x0, 0), max(y0, 0), min(x1, level_w), min(y1, level_h)
        if (cx0, cy0, cx1, cy1) == around:
            return self._read_inside(level, around)
        pixels = np.full((y1 - y0, x1 - x0, 3), 255, np.uint8)
        if cx1 > cx0 and cy1 > cy0:
            pixels[cy0 - y0 : cy1 - y0, cx0 - x0 : cx1 - x0] = self._read_inside(level, (cx0, cy0, cx1, cy1))
        return pixels

    def _read_inside(self, level: int, box: Box) -> np.ndarray:
        x0, y0, x1, y1 = box
        try:
            return self._read_level(level, x0, y0, x1 - x0, y1 - y0)
        except UserError:
            raise
        except Exception as error:
            factor = self.dimensions[0] / self._levels[level][0]
            raise UserError(
                f"{self.path} cannot be decoded at x={x0 * factor:.0f}, y={y0 * factor:.0f} ({error}): "
                "the file is damaged or was cut short; copy it again from its source"
            ) from None

    def read_in_parts(self, x: float, y: float, w: float, h: float, size: tuple[int, int]) -> np.ndarray:
        """As `read`, in parts of at most _BLOCK^2 pixels: little memory where the file has no level near `size`."""
        width, height = size
        _, factor = self._best_level(min(w / width, h / height))
        if w * h / factor**2 <= _BLOCK**2 or max(size) == 1:
            return self.read(x, y, w, h, size)
        along = 1 if width >= height else 0  # the axis that is cut
        first = size[1 - along] // 2
        cut = (w, h)[1 - along] * first / size[1 - along]
        if along:
            parts = [(x, y, cut, h, (first, height)), (x + cut, y, w - cut, h, (width - first, height))]
        else:
            parts = [(x, y, w, cut, (width, first)), (x, y + cut, w, h - cut, (width, height - first))]
        return np.concatenate([self.read_in_parts(*part) for part in parts], axis=along)

    def bands(self) -> Iterator[np.ndarray]:
        """The finest level from top to bottom, (h, width, 3) uint8 at a time."""
        width, height = self.dimensions
        rows = min(_BLOCK // 2, max(_FEW_ROWS, _BAND // width // _FEW_ROWS * _FEW_ROWS))
        for top in range(0, height, rows):
            yield self.read(0, top, width, min(rows, height - top))

    def thumbnail(self, mpp: float) -> np.ndarray:
        """The whole slide at about `mpp` um per pixel, (h, w, 3) uint8; read in blocks, so that memory stays small."""
        width, height = (max(1, round(d * self.mpp / mpp)) for d in self.dimensions)
        out = np.empty((height, width, 3), np.uint8)
        sx, sy = self.dimensions[0] / width, self.dimensions[1] / height
        _, factor = self._best_level(min(sx, sy))
        step = max(1, int(_BLOCK * factor / max(sx, sy)))
        for top in range(0, height, step):
            for left in range(0, width, step):
                w, h = min(step, width - left), min(step, height - top)
                out[top : top + h, left : left + w] = self.read(left * sx, top * sy, w * sx, h * sy, (w, h))
        return out


def _around(box: Sequence[float]) -> Box:
    left, top, right, bottom = box
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


def _fit(pixels: np.ndarray, around: Box, box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """What lies in `box` of pixels that begin and end as `around` says, at a size (width, height)."""
    if pixels.shape[1::-1] == size and tuple(box) == around:
        return pixels
    x0, y0, _, _ = around
    left, top, right, bottom = box
    resample = Image.Resampling.LANCZOS if right - left > size[0] else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize(size, resample, (left - x0, top - y0, right - x0, bottom - y0)))


def _runs(windows: Sequence[Box], alone: bool) -> Iterator[list[tuple[int, Box]]]:
    """Windows with their places, those together that follow one another in a row and overlap."""
    run: list[tuple[int, Box]] = []
    for i, (x0, y0, x1, y1) in enumerate(windows):
        if run:
            last, top, end, bottom = run[-1][1]
            if alone or (y0, y1) != (top, bottom) or not last <= x0 < end or x1 - run[0][1][0] > _BLOCK:
                yield run
                run = []
        run.append((i, (x0, y0, x1, y1)))
    if run:
        yield run


def open_image(path: Path | str, mpp: float | None = None, holds: bool = False) -> Slide:
    """Open a slide or an image of any kind: what every command reads pixels through.

    Pixels are RGB of 8 bits, upright, white where the file is transparent. Of PNG and its like the header alone is read
    at first, then all of them; of other kinds what is asked for.

    Args:
        mpp: micrometres per level-0 pixel of a file that does not say them. One that does keeps its own; `notes` tell.
        holds: `mpp` is of this very file, and holds even where it says another; `notes` tell.
    Raises:
        UserError: no such file, no image, more than 8 bits, channels that are no colours, several planes, pixels that
            are not square, cut short; or OpenSlide's reason.

    >>> open_image(slide_path)
    Slide('CMU-1-Small-Region.svs', 2220 x 2967 px at 0.499 um/px)
    """
    path = allowed(path)
    if mpp is not None and not 0 < mpp <= MOST:
        raise UserError(f"mpp is micrometres per pixel, above 0 and up to {MOST:g}; got {mpp}")
    if not path.exists():
        raise UserError(f"there is no slide or image at {path}")
    return Slide(path, _source(path), mpp, holds)


def _source(path: Path) -> Source:
    try:
        if path.is_dir():
            openers = (open_ome_zarr,)
        else:
            refuse_damaged(path)
            openers = (open_plain,) if is_plain(path) else (open_scanned, open_tiff, open_plain)
        source = next((source for opener in openers if (source := opener(path)) is not None), None)
    except UserError:
        raise
    except Exception as error:  # what reads damaged files raises whatever it stumbles over
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged or was cut short; copy it again "
            "from its source"
        ) from error
    if source is None:
        raise UserError(f"{path} is not a slide or image that OpenSlide, tifffile or Pillow can read")
    if any(min(size) < 1 for size in source.levels):
        raise UserError(f"{path} says that it has {source.levels[0][0]} x {source.levels[0][1]} px; it is damaged")
    _check_size(path, source)
    return source


def _check_size(path: Path, source: Source) -> None:
    """UserError for an image that is larger than its files can be."""
    width, height = source.levels[0]
    most = _MOST if path.is_dir() else min(_MOST, max(_SMALL, _PER_BYTE * _bytes_of(path)))
    if width * height > most:
        raise UserError(
            f"{path} says that it is {width} x {height} px, more than its files can hold: it is damaged, or made to "
            "exhaust the machine"
        )


def _bytes_of(path: Path) -> int:
    """Of a file, and of those beside it that may be parts of the same slide."""
    beside = path.parent.glob("*.dcm") if path.suffix.lower() == ".dcm" else path.with_suffix("").glob("*")
    if path.suffix.lower() in (".vms", ".vmu"):
        beside = path.parent.glob("*")
    return path.stat().st_size + sum(each.stat().st_size for each in beside if each.is_file())


def open_slide(path: Path | str, mpp: float | None = None, holds: bool = False) -> Slide:
    """As `open_image`, of one whose micrometres per pixel are known: UserError where neither it nor `mpp` says them.

    >>> open_slide(slide_path).mpp
    0.499
    """
    slide = open_image(path, mpp, holds)
    if not slide.mpp:
        wrong = f" ({'; '.join(slide.scale_notes)})" if slide.scale_notes else ""
        known = f"at {slide.magnification:g}x probably {10 / slide.magnification:g}" if slide.magnification else ""
        raise UserError(
            f"{path} does not say how many micrometres a pixel has{wrong}; pass --slide-mpp (mpp= in Python, the "
            "column mpp in a table of slides), "
            f"{known or 'about 0.25 for 40x, 0.5 for 20x, 1.0 for 10x'}"
        )
    return slide
