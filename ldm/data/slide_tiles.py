"""Tiles of stores that hold coordinates alone: their pixels are read from the slide when they are asked for.

Such a store records how its slide's file is called, where it lay relative to the store, and a digest of some of its
bytes. It is looked for in the folders that are given, in those of $HISTOLDM_SLIDES, and where it lay; whatever is found
is read no further unless it has these bytes, so that a store of others can name no file that they do not know.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.shard_files import DIGEST_BYTES
from ldm.data.stored_array import RowArray
from ldm.errors import UserError, note
from ldm.images.slides import Slide, open_image

WHERE = "HISTOLDM_SLIDES"  # folders, as PATH has them
_PART = 1 << 16  # bytes at the beginning, the middle and the end that tell a file from others
_FEW = 32  # files of pixels of an OME-Zarr that tell it from others
_OPEN = 8  # slides that a process keeps open
_OF_FOLDERS = ("zarr.json", ".zattrs", "0/zarr.json", "0/.zarray")  # what tells an OME-Zarr from others


class NoSlide(UserError):
    """The slide of a store without pixels is not there, or another has its name."""


def slide_file(path: Path, store: Path) -> dict[str, str]:
    """What a store records of its slide's file: name, path relative to the store, digest.

    >>> slide_file(slide_path, Path("cohort/slides/a.zarr"))["name"]
    'CMU-1-Small-Region.svs'
    """
    beside = Path(os.path.relpath(path.resolve(), store.resolve())).as_posix()
    return {"name": path.name, "path": beside, "digest": identity(path)}


def check_quality(pixels: str, jpeg_quality: int | None) -> None:
    """UserError for a quality of JPEG that nothing would be stored with.

    >>> check_quality("zstd", 80)
    Traceback (most recent call last):
    ldm.errors.UserError: a quality of JPEG goes with --pixels jpeg; got pixels 'zstd' and quality 80.
    """
    if jpeg_quality is not None and pixels != "jpeg":
        raise UserError(
            f"a quality of JPEG goes with --pixels jpeg; got pixels '{pixels}' and quality {jpeg_quality}."
        )


def tell_pixels(pixels: str) -> None:
    """Say what a store without pixels records.

    >>> tell_pixels("zstd")
    """
    if pixels == "none":
        note("stores without pixels record where their slides lie, relative to the store; keep both where they are")


def identity(path: Path) -> str:
    """A digest that tells a slide from others: of its size, and of bytes at its beginning, middle and end.

    >>> len(identity(slide_path))
    32
    """
    files = [path / name for name in _OF_FOLDERS] + _chunks(path) if path.is_dir() else [path]
    if path.suffix.lower() == ".mrxs":
        files.append(path.with_suffix("") / "Slidedat.ini")
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for file in files:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for start in (0, size // 2, max(0, size - _PART)):
                stream.seek(start)
                digest.update(stream.read(_PART))
    return digest.hexdigest()


def _chunks(path: Path) -> list[Path]:
    """A few files of the coarsest level of an OME-Zarr, whose metadata may be those of others."""
    for depth in ("*", "*/*"):  # the latter of bioformats2raw
        if levels := sorted(file.parent for name in ("zarr.json", ".zarray") for file in path.glob(f"{depth}/{name}")):
            return [file for file in sorted(levels[-1].rglob("*")) if file.is_file()][:_FEW]
    return []


def find_slide(store: Path, told: Mapping[str, str], given: Sequence[Path | str] = ()) -> Path:
    """The file of a store's slide. told: what the store records of it. given: files, or folders, to look in first.

    NoSlide: it is not there, or another has its name.

    >>> told = slide_file(slide_path, Path("a.zarr"))
    >>> find_slide(Path("b/a.zarr"), told, [slide_path.parent]) == slide_path
    True
    """
    wrong: Path | None = None
    for path in _candidates(store, told, given):
        if path.exists():
            if identity(path) == told["digest"]:
                return path
            wrong = wrong or path
    found = f"{wrong} is another file of that name" if wrong else "it was not found"
    raise NoSlide(
        f"{store} holds coordinates alone, and pixels are read from its slide {told['name']}: {found}. Say in which "
        f"folder it lies: export {WHERE}=/folder (slides= in Python)."
    )


def _candidates(store: Path, told: Mapping[str, str], given: Sequence[Path | str]) -> Iterator[Path]:
    name = Path(told["name"]).name
    places = [Path(place) for place in (*given, *filter(None, os.environ.get(WHERE, "").split(os.pathsep)))]
    yield from (place if place.name == name else place / name for place in places)
    yield store / told["path"]
    for place in places:
        yield from _files_within(str(place)).get(name, [])


@lru_cache(8)
def _files_within(folder: str) -> dict[str, list[Path]]:
    """Name -> the files and folders of that name in a folder and those in it."""
    found: dict[str, list[Path]] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found.setdefault(name, []).append(Path(root, name))
        folders[:] = [name for name in folders if not name.endswith(".zarr")]
    return found


@lru_cache(_OPEN)
def _opened(path: str, process: int) -> Slide:
    """A slide, opened once in each process: a forked one would share its place in the file with others."""
    return open_image(path)


class SlideTiles(RowArray):
    """The tiles (N,T,T,3) uint8 of a store without pixels; indexed as NumPy arrays are.

    Args:
        store: its path. coords: (N, 2) level-0 x, y. side: of a tile in pixels; downsample: level-0 pixels for one.
        told: what the store records of its slide. given: see `find_slide`.
    Raises:
        NoSlide, UserError: when it is indexed: the slide is not there, cannot be read.
    """

    def __init__(
        self,
        store: Path,
        coords: np.ndarray,
        side: int,
        downsample: float,
        told: Mapping[str, str],
        given: Sequence[Path | str] = (),
    ) -> None:
        self.path, self._coords, self._side, self._extent = store / "tiles", coords, side, side * downsample
        self._store, self._told, self._given = store, told, given
        self.attrs: dict[str, Any] = {}
        self._slide: Path | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._coords), self._side, self._side, 3)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    @property
    def slide(self) -> Path:
        """The slide's file."""
        self._slide = self._slide or find_slide(self._store, self._told, self._given)
        return self._slide

    def read(self, start: int, stop: int) -> np.ndarray:
        slide = _opened(str(self.slide), os.getpid())
        return slide.read_tiles(self._coords[start:stop], self._extent, self._side)
