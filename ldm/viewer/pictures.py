"""Pictures to look at: of files, folders and tile stores, and what the page is told of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.tile_store import TileStore, holds_stores
from ldm.errors import UserError
from ldm.images.kinds import ENDINGS, PLAIN, images_in
from ldm.images.pictures import Picture

SHOWN_TILES = 400  # of a tile store


@dataclass(frozen=True)
class Source:
    """A picture that was asked for. listed: it was found in a folder or store, not named itself."""

    picture: Picture
    listed: bool = False


def find(paths: Iterable[Path]) -> list[Source]:
    """The pictures of files, of folders of images, and of tile stores (evenly chosen where a store holds many).

    Raises:
        UserError: a path that is not there, a folder without pictures.

    >>> [source.picture.file for source in find([slide_path.parent])]
    ['CMU-1-Small-Region.svs']
    """
    sources: list[Source] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is nothing at {path}; give images, slides, OME-Zarr, or folders of them.")
        if path.is_file() or path.suffix == ".zarr":
            sources += _tiles(path) if holds_stores(path) else [Source(Picture.of_file(path))]
            continue
        stores = [store for store in sorted(path.glob("[!.]*.zarr")) if holds_stores(store)]
        found = sorted([*images_in(path), *stores])
        if not found:
            raise UserError(f"{path} holds no picture ({ENDINGS}, tile stores).")
        for file in found:
            sources += _tiles(file) if file in stores else [Source(Picture.of_file(file), listed=True)]
    return sources


def _tiles(path: Path) -> list[Source]:
    store = TileStore.open(path)
    rows = np.linspace(0, len(store) - 1, min(len(store), SHOWN_TILES)).round().astype(int)
    return [Source(store.picture(row), listed=True) for row in rows.tolist()]


def describe(source: Source) -> dict[str, Any]:
    """What the page is told of a picture: name, width, height, mpp (None: unknown), synthetic (None: it does not say
    that it is), and where it says so slide, region (x, y, width, height in level-0 px of the slide), grid (rows, cols
    of its condition) and tile_px.

    Raises:
        UserError: it cannot be read. Only of PNG and its like that were named, not found, more than the header is read.

    >>> describe(find([slide_path])[0])["width"]
    2220
    """
    picture = source.picture
    said = picture.mark()
    told = {key: said.get(key) for key in ("slide", "region", "grid", "tile_px")}
    width, height = picture.size
    if not source.listed and picture.path.suffix.lower() in PLAIN:
        picture.pixels()
    mpp = picture.mpp or _number(said.get("mpp"))
    return {"name": picture.file, "width": width, "height": height, "mpp": mpp, "synthetic": said or None, **told}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 < value < float("inf") else None
