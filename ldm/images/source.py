"""What a reader of files knows of one: how large it is, how its pixels are read, at which scale it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ldm.images.scale import UNKNOWN, Scale

# level, x, y, width, height in pixels of that level, inside it -> (height, width, 3) uint8
ReadLevel = Callable[[int, int, int, int, int], np.ndarray]


@dataclass(frozen=True)
class Source:
    """One image as its file holds it.

    Attributes:
        levels: (width, height) of each, the finest first.
        read: reads a part of a level as RGB of 8 bits.
        scale: micrometres per pixel of the finest level, and where they come from.
        magnification: objective power, None where unknown.
        gray: whether it has one channel; it is read as three that are alike.
        patient: whom the file names, None where it names nobody.
        notes: what a user should know of its pixels.
        bounds: (x, y, width, height) of the part that a scanner filled, where it left a margin around it; else None.
        loose: levels of which a part is read a little otherwise alone than within a larger one.
    """

    levels: list[tuple[int, int]]
    read: ReadLevel
    scale: Scale = UNKNOWN
    magnification: float | None = None
    gray: bool = False
    patient: str | None = None
    notes: tuple[str, ...] = ()
    bounds: tuple[int, int, int, int] | None = None
    loose: frozenset[int] = frozenset()


def upright(source: Source, orientation: int) -> Source:
    """The same image, turned and mirrored as EXIF's and TIFF's orientation 1..8 says; another number changes nothing.

    >>> pixels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1).repeat(3, 2)
    >>> source = Source([(3, 2)], lambda level, x, y, w, h: pixels[y : y + h, x : x + w])
    >>> turned = upright(source, 6)
    >>> turned.levels, turned.read(0, 0, 0, 2, 3)[..., 0].tolist()
    ([(2, 3)], [[3, 0], [4, 1], [5, 2]])
    """
    if orientation not in range(2, 9):
        return source
    swap, mirrored, flipped = orientation > 4, orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7)

    def read(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        width, height = source.levels[level]
        x, y, w, h = (y, x, h, w) if swap else (x, y, w, h)
        pixels = source.read(level, width - x - w if mirrored else x, height - y - h if flipped else y, w, h)
        pixels = pixels[:: -1 if flipped else 1, :: -1 if mirrored else 1]
        return pixels.swapaxes(0, 1) if swap else pixels

    levels = [(h, w) for w, h in source.levels] if swap else source.levels
    return replace(source, levels=levels, read=read)
