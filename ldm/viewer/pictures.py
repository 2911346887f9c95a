"""Pictures to look at: of files, folders and tile stores, and what the page is told of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.tile_store import TileStore, holds_stores
from ldm.errors import UserError
from ldm.images.kinds import ENDINGS, PLAIN, images_in
from ldm.images.pictures import Picture

SHOWN_TILES = 400  # of a tile store
_LARGEST = 2**53  # that a page's numbers hold
_MOST_LINES = 10_000  # of a grid of conditions


@dataclass(frozen=True)
class Source:
    """A picture that was asked for.

    listed: it was found in a folder or store, not named itself. refused: why it is not to be shown, or "".
    """

    picture: Picture
    listed: bool = False
    refused: str = ""


def find(paths: Iterable[Path]) -> list[Source]:
    """The pictures of files, of folders of images, of tile stores (evenly chosen where a store holds many) and cohorts.

    What cannot be shown, as a store that is not whole or a link that leads out of a folder, is among them, with the
    reason.

    Raises:
        UserError: a path that is not there, a folder that cannot be listed or is without pictures.

    >>> [source.picture.file for source in find([slide_path.parent])]
    ['CMU-1-Small-Region.svs']
    """
    sources: list[Source] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is nothing at {path}; give images, slides, OME-Zarr, or folders of them.")
        if path.is_file() or path.suffix == ".zarr":
            sources += _named(path)
            continue
        try:
            inside = ("[!.]*.zarr", "slides/[!.]*.zarr")  # the latter of a cohort
            stores = [store for kind in inside for store in sorted(path.glob(kind)) if holds_stores(store)]
            found = sorted([*images_in(path), *stores])
        except OSError as error:
            raise UserError(f"{path} cannot be listed: {error.strerror}.") from None
        if not found:
            raise UserError(f"{path} holds no picture ({ENDINGS}, tile stores).")
        for file in found:
            sources += _of_folder(file, path, file in stores)
    return sources


def _named(path: Path) -> list[Source]:
    try:
        return _tiles(path) if holds_stores(path) else [Source(Picture.of_file(path))]
    except UserError as error:
        return [Source(Picture.of_file(path), refused=str(error))]


def _of_folder(file: Path, folder: Path, store: bool) -> list[Source]:
    try:
        if out := _way_out(file, folder.resolve()):
            link = "it is a link that" if out == file else f"{out.relative_to(file)} in it is a link that"
            raise UserError(f"{file} is not shown: {link} leads out of {folder}; name {out.resolve()} to look at it.")
        return _tiles(file) if store else [Source(Picture.of_file(file), listed=True)]
    except UserError as error:
        return [Source(Picture.of_file(file), listed=True, refused=str(error))]


def _way_out(file: Path, folder: Path) -> Path | None:
    """The first link by which a file, or what a Zarr folder holds, lies outside of `folder`; None if all is inside."""
    for path in (file, *_links(file)):
        if path.is_symlink() and not path.resolve().is_relative_to(folder):
            return path
    return None


def _links(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        yield from (path for name in (*folders, *files) if (path := Path(place, name)).is_symlink())


def _tiles(path: Path) -> list[Source]:
    store = TileStore.open(path)
    rows = np.linspace(0, len(store) - 1, min(len(store), SHOWN_TILES)).round().astype(int)
    return [Source(store.picture(row), listed=True) for row in rows.tolist()]


def describe(source: Source) -> dict[str, Any]:
    """What the page is told of a picture, as JSON can hold it: name, width, height, mpp (None: unknown), synthetic
    (None: it does not say that it is), and where it says so slide, region (x, y, width, height in level-0 px of the
    slide), grid (rows, cols of its condition) and tile_px.

    Raises:
        UserError: it cannot be read, or is refused. Only of PNG and its like that were named, not found, more than the
            header is read.

    >>> describe(find([slide_path])[0])["width"]
    2220
    """
    if source.refused:
        raise UserError(source.refused)
    picture = source.picture
    said = picture.mark()
    width, height = picture.size
    if not source.listed and picture.path.suffix.lower() in PLAIN:
        picture.pixels()
    told = {
        "name": picture.file, "width": width, "height": height, "synthetic": said or None,
        "mpp": picture.mpp or (said["mpp"] if _above_0(said.get("mpp")) else None), **_place(said),
    }  # fmt: skip
    return told


def _place(said: dict[str, Any]) -> dict[str, Any]:
    """What a mark says of where its image belongs; None for what is missing or makes no sense."""
    slide, region, grid, tile = (said.get(key) for key in ("slide", "region", "grid", "tile_px"))
    if not (isinstance(region, list) and len(region) == 4 and all(map(_is_number, region)) and min(region[2:]) > 0):
        region = None
    if not (isinstance(grid, list) and len(grid) == 2 and all(n in range(1, _MOST_LINES) for n in grid)):
        grid = None
    slide = slide if isinstance(slide, str) else None
    return {"slide": slide, "region": region, "grid": grid, "tile_px": tile if _above_0(tile) else None}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST


def _above_0(value: Any) -> bool:
    return _is_number(value) and value > 0
