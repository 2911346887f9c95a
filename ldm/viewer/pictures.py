"""Pictures to look at: slides, BigTIFF, OME-Zarr, PNG, JPEG and tiles of stores behind one face, and what they say of
themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from PIL import Image

from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.images.marks import read_mark
from ldm.images.slides import Slide, open_any

PLAIN = (".png", ".jpg", ".jpeg")
SLIDES = tuple(".svs .tif .tiff .ndpi .vms .vmu .scn .mrxs .svslide .bif .czi .dcm".split())
SHOWN_TILES = 400  # of a tile store
TO_MICROMETRES = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4}


@dataclass(frozen=True)
class Source:
    """A picture that was asked for: a file, an OME-Zarr folder, or tile `row` of a tile store.

    listed: it was found in a folder or store, not named itself.
    """

    path: Path
    row: int | None = None
    listed: bool = False

    @property
    def name(self) -> str:
        return self.path.name if self.row is None else f"{self.path.stem} tile {self.row}"


def find(paths: Iterable[Path]) -> list[Source]:
    """The pictures of files, of folders of images, and of tile stores (evenly chosen where a store holds many).

    Raises:
        UserError: a path that is not there, a folder without pictures.
    """
    sources: list[Source] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is nothing at {path}; give images, slides, OME-Zarr, or folders of them.")
        if path.suffix == ".zarr":
            sources += _of_zarr(path, listed=False)
        elif path.is_file():
            sources.append(Source(path))
        else:
            found = sorted(file for file in path.iterdir() if not file.name.startswith(".") and _is_picture(file))
            if not found:
                raise UserError(f"{path} holds no picture ({', '.join((*PLAIN, *SLIDES, '.zarr'))}).")
            for file in found:
                sources += _of_zarr(file, listed=True) if file.suffix == ".zarr" else [Source(file, listed=True)]
    return sources


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in (*PLAIN, *SLIDES) if path.is_file() else path.suffix == ".zarr"


def _of_zarr(path: Path, listed: bool) -> list[Source]:
    if "histoldm" in (attributes := _attributes(path)) and "tile_size" in attributes["histoldm"]:
        rows = len(_store(path))
        chosen = np.linspace(0, rows - 1, min(rows, SHOWN_TILES)).round().astype(int)
        return [Source(path, int(row), listed=True) for row in chosen]
    return [Source(path, listed=listed)]


def open_picture(source: Source) -> Slide:
    """A picture that can be read by regions; its mpp is 0 where it says none.

    PNG and JPEG have no levels and are decoded whole; of everything else only what is looked at is read.
    """
    if source.row is not None:
        store = _store(source.path)
        pixels = store.tile(source.row)
        return Slide(source.path, [(pixels.shape[1], pixels.shape[0])], _crop(pixels), store.mpp or 0.0, None)
    return _open_ome_zarr(source.path) if source.path.suffix == ".zarr" else open_any(source.path)


def describe(source: Source) -> dict[str, Any]:
    """What the page is told of a picture: name, width, height, mpp (None: unknown), synthetic (None: it does not say
    that it is), and where it says so slide, region (x, y, width, height in level-0 px of the slide), grid (rows, cols
    of its condition) and tile_px.

    Raises:
        UserError: it cannot be read. Of PNG and JPEG in folders, which may be thousands, only the header is looked at.
    """
    said = {} if source.row is not None else read_mark(source.path)
    told = {key: said.get(key) for key in ("slide", "region", "grid", "tile_px")}
    (width, height), mpp = _measure(source)
    mpp = mpp or _number(said.get("mpp"))
    return {"name": source.name, "width": width, "height": height, "mpp": mpp, "synthetic": said or None, **told}


def _measure(source: Source) -> tuple[tuple[int, int], float]:
    """Width and height in pixels, and mpp, 0 where unknown."""
    if source.row is not None:
        store = _store(source.path)
        return (store.tile_size, store.tile_size), store.mpp or 0.0
    if source.listed and source.path.suffix.lower() in PLAIN:
        try:
            with Image.open(source.path) as image:
                return image.size, 0.0
        except (OSError, Image.DecompressionBombError) as error:
            raise UserError(f"{source.path} cannot be read: {error}") from None
    picture = open_picture(source)
    return picture.dimensions, picture.mpp


@lru_cache(maxsize=8)
def _store(path: Path) -> TileStore:
    return TileStore.open(path)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 < value < float("inf") else None


def _crop(pixels: np.ndarray) -> Any:
    return lambda level, x, y, w, h: pixels[y : y + h, x : x + w]


def _attributes(path: Path) -> dict[str, Any]:
    try:
        return zarr.open_group(str(path), mode="r").attrs.asdict()
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no OME-Zarr image and no tile store: it opens as no group ({error}).") from None


def _open_ome_zarr(path: Path) -> Slide:
    """An OME-Zarr image (0.5; 0.4 too): 8-bit RGB or grey. Of further axes, such as t and z, the first plane."""
    attributes = _attributes(path)
    images = attributes.get("ome", attributes).get("multiscales")
    if not images:
        raise UserError(f"{path} is a Zarr group without OME `multiscales`, so it is no image.")
    image = images[0]
    axes = [axis["name"] if isinstance(axis, dict) else axis for axis in image["axes"]]
    arrays = [zarr.open_array(str(path / dataset["path"]), mode="r") for dataset in image["datasets"]]
    channels = arrays[0].shape[axes.index("c")] if "c" in axes else 1
    if arrays[0].dtype != np.uint8 or channels not in (1, 3, 4) or not {"x", "y"} <= set(axes):
        held = f"{''.join(axes)} {arrays[0].shape} {arrays[0].dtype}"
        raise UserError(f"{path} holds {held}; only 8-bit images of 1, 3 or 4 channels are shown.")
    places = {axis: axes.index(axis) for axis in axes}

    def read_level(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        window = {"x": slice(x, x + w), "y": slice(y, y + h), "c": slice(0, min(channels, 3))}
        block = np.asarray(arrays[level][tuple(window.get(axis, 0) for axis in axes)])
        kept = [axis for axis in axes if axis in window]
        block = np.moveaxis(block, [kept.index("y"), kept.index("x")], [0, 1]).reshape(h, w, -1)
        return np.broadcast_to(block, (h, w, 3))

    sizes = [(array.shape[places["x"]], array.shape[places["y"]]) for array in arrays]
    return Slide(path, sizes, read_level, _ome_mpp(image, axes), None)


def _ome_mpp(image: dict[str, Any], axes: Sequence[str]) -> float:
    scales = dict.fromkeys("xy", 1.0)
    for step in _scales(image):
        for axis in scales:
            scales[axis] *= float(step["scale"][axes.index(axis)])
    units = {axis["name"]: axis.get("unit") for axis in image["axes"] if isinstance(axis, dict)}
    known = [scales[axis] * TO_MICROMETRES[units[axis]] for axis in scales if units.get(axis) in TO_MICROMETRES]
    return float(np.mean(known)) if known else 0.0


def _scales(image: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for holder in (image["datasets"][0], image):
        yield from (step for step in holder.get("coordinateTransformations", []) if step["type"] == "scale")
