"""Images to work on, known by name before they are opened: what every command reads its images as."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError, some
from ldm.images.kinds import PLAIN, called
from ldm.images.marks import read_mark
from ldm.images.slides import Slide, open_image

MOST = 2**30  # pixels that are read at once


@dataclass(frozen=True)
class Picture:
    """One image, or a part of one; opened whenever something of it is asked for, and not kept open.

    Attributes:
        file: what lists, specifications and messages call it.
        open: opens it.
        path: its file or OME-Zarr folder; None for an image that is neither, such as a tile of a store.
        about: what is known of it.
        region: the part, x, y, width, height in pixels; a number is the side of the square in its middle; None is all.
    """

    file: str
    open: Callable[[], Slide]
    path: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    region: tuple[int, int, int, int] | float | None = None

    @classmethod
    def of_file(
        cls, path: Path, file: str | None = None, about: Mapping[str, Any] | None = None, mpp: float | None = None
    ) -> Picture:
        """An image file or OME-Zarr.

        file: what it is called; None: as the path is, see `kinds.called`. mpp: micrometres per pixel, where it does not
        say them.

        >>> picture = Picture.of_file(slide_path)
        >>> picture.name, picture.size, picture.mpp, picture.suffix
        ('CMU-1-Small-Region', (2220, 2967), 0.499, '.tif')
        """
        return cls(called(path) if file is None else file, lambda: open_image(path, mpp), path, about or {})

    @classmethod
    def of_pixels(cls, pixels: np.ndarray, file: str, about: Mapping[str, Any] | None = None) -> Picture:
        """An image (H,W,3) uint8 that is in memory.

        >>> Picture.of_pixels(np.zeros((20, 30, 3), np.uint8), "a.png").part(16).size
        (16, 16)
        """
        return cls(file, lambda: Slide.of_pixels(pixels, Path(file)), about=about or {})

    @cached_property
    def _header(self) -> tuple[tuple[int, int], float, bool, tuple[str, ...]]:
        image = self.open()
        return self._box(image)[2:], image.mpp, image.gray, image.notes

    @property
    def name(self) -> str:
        """The file's name without its endings: how names of what is made of it begin."""
        return Path(self.file).stem.removesuffix(".ome")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self._header[0]

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel, None where unknown."""
        return self._header[1] or None

    @property
    def gray(self) -> bool:
        """Whether it has one channel."""
        return self._header[2]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it is read."""
        return self._header[3]

    @property
    def suffix(self) -> str:
        """The ending of files of its kind: .ome.zarr, .tif, or, of plain ones and those without a scale, .png."""
        if self.path is None or self.mpp is None or self.path.suffix.lower() in PLAIN:
            return ".png"
        return ".ome.zarr" if self.path.is_dir() else ".tif"

    def pixels(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """(H,W,3) uint8, resized where a size (width, height) is given.

        UserError: it cannot be read, or is too large to be read at once.
        """
        image = self.open()
        x, y, w, h = self._box(image)
        if w * h > MOST:
            raise UserError(
                f"{self.file} is {w} x {h} px, too large to be read at once; cut it into tiles with `python -m "
                "data_prep.tile_slides`, or ask for a part of it."
            )
        return image.read(x, y, w, h, size)

    def mark(self) -> dict[str, Any]:
        """What a generated image says of itself, see `ldm.images.marks`; {} of others."""
        return {} if self.path is None else read_mark(self.path)

    def part(self, region: tuple[int, int, int, int] | float | None) -> Picture:
        """A part of it, see `region`. UserError, when it is opened: the part reaches outside."""
        return replace(self, region=region)

    def _box(self, image: Slide) -> tuple[float, float, float, float]:
        width, height = image.dimensions
        if self.region is None:
            return 0, 0, width, height
        if not isinstance(self.region, tuple):
            side = self.region
            if min(width, height) < round(side):
                asked = f"smaller than the {side:g} px that are asked for"
                raise UserError(f"{self.file} is {width} x {height} px, {asked}.")
            return (width - side) // 2, (height - side) // 2, side, side
        x, y, w, h = self.region
        if min(x, y) < 0 or min(w, h) < 1 or x + w > width or y + h > height:
            raise UserError(f"region {x},{y},{w},{h} reaches outside {self.file}, which is {width} x {height} px.")
        return self.region


def notes_of(pictures: Iterable[Picture]) -> list[str]:
    """What a user should know of how images are read, each once, with the names of those that it is of.

    Of those that cannot be opened nothing: whoever reads their pixels says why.

    >>> Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("a.tif", dpi=(25400, 25400))
    >>> notes_of([Picture.of_file(Path("a.tif"), mpp=0.5)])
    ['its TIFF resolution tag says 1 um per pixel, which holds; the 0.5 given is for files that say none (a.tif)']
    """
    found: dict[str, list[str]] = {}
    for picture in pictures:
        try:
            notes = picture.notes
        except UserError:
            continue
        for note in notes:
            found.setdefault(note, []).append(picture.file)
    return [f"{note} ({some(names, 3)})" for note, names in found.items()]
