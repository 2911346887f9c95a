"""The images that `histoldm translate` is given: files, folders, tile stores, regions of large images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from PIL import Image

from ldm.data.tile_store import TileStore, open_cohort
from ldm.errors import UserError
from ldm.images.slides import open_any

PLAIN = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SUFFIXES = (*PLAIN, ".tif", ".tiff", ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vsi", ".dcm")
GRAY = ("1", "L", "LA", "I", "I;16", "F")


@dataclass
class Picture:
    """One image to translate.

    Attributes:
        file: name that specifications know it by. name: beginning of the names of what is made of it.
        size: (width, height). gray: it has one channel. mpp: micrometres per pixel, or None. suffix: of outputs.
        pixels: reads it, (H,W,3) uint8. about: where it comes from.
    """

    file: str
    name: str
    size: tuple[int, int]
    gray: bool
    mpp: float | None
    suffix: str
    pixels: Callable[[], np.ndarray]
    about: dict[str, Any]


def read_pictures(path: Path, region: Sequence[int] | None, mpp: float | None) -> list[Picture]:
    """The images at `path`: a file, a folder of them, an OME-Zarr. region: x, y, width, height of a single one.

    Tile stores are read by `pictures_of_store`. UserError: nothing there, no image, two of one name.
    """
    if not path.exists():
        raise UserError(f"there are no images at {path}.")
    if path.is_dir() and not is_ome_zarr(path):
        if region:
            raise UserError(f"--region is of one image; {path} is a folder.")
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES or is_ome_zarr(p))
        if not files:
            raise UserError(f"{path} holds no images ({' '.join(SUFFIXES)}, .ome.zarr).")
    else:
        files = [path]
    pictures = [_picture(file, region, mpp) for file in files]
    names = [picture.name for picture in pictures]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path} has two images called {twice}; outputs are named like the inputs, so rename one.")
    return pictures


def is_ome_zarr(path: Path) -> bool:
    """Whether a path is an OME-Zarr image, and no tile store."""
    about = path / "zarr.json"
    if not about.is_file():
        return False
    return "ome" in json.loads(about.read_text(encoding="utf-8")).get("attributes", {})


def _picture(path: Path, region: Sequence[int] | None, mpp: float | None) -> Picture:
    if is_ome_zarr(path):
        return _ome_zarr(path, region, mpp)
    slide = open_any(path)
    box = _box(path, region, slide.dimensions)
    own = mpp or slide.mpp or None
    suffix = ".png" if path.suffix.lower() in PLAIN or own is None else ".tif"
    return Picture(
        path.name, path.stem.removesuffix(".ome"), box[2:], _is_gray(path), own, suffix,
        lambda: slide.read(*box, box[2:]), _about(path, region),
    )  # fmt: skip


def _ome_zarr(path: Path, region: Sequence[int] | None, mpp: float | None) -> Picture:
    group = zarr.open_group(str(path), mode="r")
    scales = group.attrs.asdict()["ome"]["multiscales"][0]
    axes = [axis["name"] for axis in scales["axes"]]
    array = group[scales["datasets"][0]["path"]]
    if axes[-3:] != ["c", "y", "x"] or array.dtype != np.uint8 or array.shape[-3] not in (1, 3):
        raise UserError(f"{path} has axes {''.join(axes)} {array.shape} {array.dtype}; images are c,y,x of 8 bits.")
    x, y, w, h = _box(path, region, array.shape[:-3:-1])
    found = scales["datasets"][0].get("coordinateTransformations", [])
    scale = next((float(each["scale"][-1]) for each in found if each["type"] == "scale"), None)
    gray = array.shape[-3] == 1

    def pixels() -> np.ndarray:
        part = np.asarray(array[(*[0] * (array.ndim - 3), slice(None), slice(y, y + h), slice(x, x + w))])
        return np.ascontiguousarray(np.broadcast_to(np.moveaxis(part, 0, -1), (h, w, 3)))

    name = path.name.removesuffix(".zarr").removesuffix(".ome")
    own = mpp or scale
    return Picture(path.name, name, (w, h), gray, own, ".ome.zarr" if own else ".png", pixels, _about(path, region))


def _box(path: Path, region: Sequence[int] | None, size: Sequence[int]) -> tuple[int, int, int, int]:
    if region is None:
        return 0, 0, int(size[0]), int(size[1])
    x, y, w, h = region
    if x + w > size[0] or y + h > size[1] or min(w, h) < 1:
        raise UserError(f"--region {x},{y},{w},{h} reaches outside {path}, which is {size[0]} x {size[1]} px.")
    return x, y, w, h


def _about(path: Path, region: Sequence[int] | None) -> dict[str, Any]:
    return {"source_image": path.name} | ({"region": ",".join(map(str, region))} if region else {})


def _is_gray(path: Path) -> bool:
    if path.suffix.lower() in (".tif", ".tiff"):
        try:
            with tifffile.TiffFile(path) as file:
                return file.pages[0].samplesperpixel == 1
        except tifffile.TiffFileError:
            return False
    if path.suffix.lower() not in PLAIN:
        return False
    with Image.open(path) as image:
        return image.mode in GRAY


def is_tile_store(path: Path) -> bool:
    """Whether a path is a tile store or a folder of them."""
    if path.is_dir() and path.suffix == ".zarr":
        return not is_ome_zarr(path)
    return path.is_dir() and bool([*(path / "slides").glob("*.zarr")] or [*path.glob("[!.]*.zarr")]) and not any(
        is_ome_zarr(p) for p in path.glob("*.zarr")
    )


def pictures_of_store(path: Path, about: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Tiles of a store or cohort, those that `requested_tiles` chose: `about` has slide (source) and row of each."""
    stores = {store.slide: store for store in open_cohort(path)}
    pictures = []
    for chosen in about:
        store: TileStore = stores[chosen["source"]]
        row, side = int(chosen["row"]), store.tile_size
        name = f"{store.slide}_{row:06d}"
        pictures.append(
            Picture(
                f"{name}.png", name, (side, side), False, store.mpp, ".png",
                lambda store=store, row=row: store.tile(row), {"source_image": store.slide, **dict(chosen)},
            )
        )
    return pictures
