"""A set of images to evaluate: what is in it, whose it is, and what tells it from another set.

images = open_images(Path("tiles"))                  # a folder, an output of `histoldm sample`, a store, a cohort,
images = open_images(Path("image.tif"), crop=256)    # or a large image as its crops
images.pictures.read(0), images.table
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from ldm.data.collection import Pictures, list_of, read_pictures
from ldm.data.splits import patient_of
from ldm.data.tile_store import open_cohort
from ldm.data.where import Where, parse_where
from ldm.errors import UserError, some
from ldm.files import sha256
from ldm.images.kinds import is_there
from ldm.images.pictures import Picture
from ldm.images.slides import Slide, open_image

CROP = 256
BLOCK_SIDE = 512  # level-0 px of the squares of a slide that intervals draw where the slides are too few
TCGA = r"(TCGA-\w{2}-\w{4})"


@dataclass(frozen=True)
class ImageSet:
    """Images and what is known of them.

    Attributes:
        pictures: reads them. table: name, and where known slide, patient, block (a square of a slide), and the columns
            of the list beside them. about: path, kind, count, size, mpp, where, listing_sha256, what a report says.
        side: every image is resized to a square of so many pixels; None as they are.
        warnings: what a user should know of them.
        files: those that hold them, or folders of them: what `content_sha256` reads.
    """

    pictures: Pictures
    table: pd.DataFrame
    about: dict[str, Any]
    side: int | None = None
    warnings: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, i: int) -> np.ndarray:
        """The i-th image, (H,W,3) uint8."""
        image = self.pictures.read(i)
        if self.side is None or image.shape[:2] == (self.side, self.side):
            return image
        return np.asarray(Image.fromarray(image).resize((self.side, self.side), Image.Resampling.LANCZOS))


def open_images(path: Path, where: Where = None, crop: int | None = None, side: int | None = None) -> ImageSet:
    """The images at `path`.

    where: which tiles of a cohort or rows of a list. crop: cut images into squares of so many pixels side by side; a
    single image is cut into CROP. side: resize every image to a square, the only way to take images of several sizes.
    UserError: nothing there, no image, images of several sizes, a crop larger than an image.

    >>> images = open_images(cells, side=64)
    >>> len(images), images.read(0).shape, images.table["class"].unique().tolist()
    (48, (64, 64, 3), ['Atypical', 'Normal'])
    """
    path = Path(path)
    if is_there(path):
        if where:
            raise UserError(f"a selection (--where) is of tiles of a cohort or rows of a list; {path} is one image.")
        pictures, kind = _crops(read_pictures(path), crop or CROP), "large image"
    else:
        pictures = read_pictures(path, where)
        kind = "tiles of stores" if pictures.paths is None else "list" if list_of(path) else "folder"
        if crop is not None:
            if pictures.paths is None:
                raise UserError(f"--crop cuts files of images; {path} holds tiles of stores, which are cut already.")
            pictures, kind = _crops(pictures, crop), "crops of a folder"
    sizes, grey = _looked_at(pictures, "crop" in kind or kind == "large image")
    warnings = pictures.notes
    if len(sizes) > 1 and side is None:
        listed = ", ".join(f"{w} x {h} px ({len(rows)}, as {pictures.name(rows[0])})" for (w, h), rows in sizes.items())
        raise UserError(
            f"the images of {path} are of {len(sizes)} sizes: {listed}. Their features would differ by the resizing "
            "alone; keep one size, or give --image-size to resize all of them first."
        )
    if 0 < len(grey) < len(pictures):
        names = some([pictures.name(i) for i in grey], 3)
        warnings.append(f"{len(grey)} of {len(pictures)} images of {path} are grey ({names}), the others in colour.")
    first = next(iter(sizes))
    about = {
        "path": path.name or str(path), "kind": kind, "count": len(pictures), "mpp": pictures.mpp,
        "size": [side, side] if side else list(first), "original_size": list(first),
        "where": [*map(str, parse_where(where))], "grey": len(grey), "licence": pictures.licence,
        "listing_sha256": _listing_sha256(path, pictures),
    }  # fmt: skip
    table = table_of(pictures)
    about |= {unit + "s": int(table[unit].nunique()) for unit in ("slide", "patient") if unit in table}
    if "split" in table:
        about["splits"] = {str(name): int(n) for name, n in table["split"].value_counts().items()}
    return ImageSet(pictures, table, about, side, tuple(warnings), _files(path, pictures))


def _files(path: Path, pictures: Pictures) -> tuple[Path, ...]:
    """Files that hold these images; of slides in several files all of them, of stores the folders of their tiles,
    or where they have none, what says where on which slide these are."""
    if pictures.paths is None:
        shown = {own["slide"] for own in pictures.about}
        stores = [store for store in open_cohort(path) if store.slide in shown]
        parts = {store: ("coords", "zarr.json") if store.attrs["pixels"] == "none" else ("tiles",) for store in stores}
        return tuple(store.path / part for store, own in parts.items() for part in own)
    files: list[Path] = []
    for own in dict.fromkeys(pictures.paths):
        beside = {".mrxs": [own.with_suffix("")], ".dcm": sorted(own.parent.glob(f"*{own.suffix}"))}
        files += [own, *(each for each in beside.get(own.suffix.lower(), []) if each.exists())]
    return tuple(dict.fromkeys(files))


def content_sha256(images: ImageSet) -> str:
    """SHA-256 of what images show: the bytes of their files, whatever their place and time, which parts of them the
    images are, and the side that they are resized to.

    >>> content_sha256(open_images(cells)) == content_sha256(open_images(cells, side=64))
    False
    """
    within = {top: sorted(top.rglob("*")) if top.is_dir() else [top] for top in images.files}
    files = [(top, own) for top, each in within.items() for own in each if own.is_file()]
    with ThreadPoolExecutor() as readers:  # hashing needs no GIL
        hashes = readers.map(sha256, (own for _, own in files))
        bar = tqdm(zip(files, hashes), total=len(files), desc="reading", unit="file", disable=len(files) < 5000)
        digest = hashlib.sha256(str(images.side).encode())
        for (top, own), told in bar:
            digest.update(f"{own.relative_to(top.parent).as_posix()} {told}\n".encode())
    for picture in images.pictures:
        digest.update(f"{picture.file} {picture.region}\n".encode())
    return digest.hexdigest()


def table_of(pictures: Pictures) -> pd.DataFrame:
    """What is known of each image: name, slide, patient, block, and the columns of the list.

    >>> list(table_of(read_pictures(cells)))
    ['name', 'file', 'class']
    """
    table = pd.DataFrame(pictures.about)
    table.insert(0, "name", [pictures.name(i) for i in range(len(pictures))])
    if "slide" not in table and "source" in table and table["source"].notna().all() and "x" in table:
        table["slide"] = table["source"].astype(str)  # of the tile whose features conditioned it
    if "slide" not in table:
        barcode = table["name"].str.extract(TCGA, expand=False)
        if barcode.notna().all():
            table["patient"] = barcode
    elif "patient" not in table:
        table["patient"] = [patient_of(str(slide)) for slide in table["slide"]]
    if "slide" in table and {"x", "y"} <= set(table):
        table["block"] = [
            f"{s}:{int(x) // BLOCK_SIDE}:{int(y) // BLOCK_SIDE}"
            for s, x, y in zip(table["slide"], table["x"], table["y"])
        ]
    folder = table["name"].map(lambda name: str(Path(name).parent))
    if "class" not in table and folder.nunique() > 1 and (folder != ".").all():
        table["class"] = folder
    return table


def _listing_sha256(path: Path, pictures: Pictures) -> str:
    """What tells these images from others without reading them: names, sizes and times of files; stores' attributes."""
    digest = hashlib.sha256()
    if pictures.paths is not None:
        for file in dict.fromkeys(pictures.paths):
            known = file.stat() if file.is_file() else next(file.glob("z*.json"), file).stat()
            digest.update(f"{file.name} {known.st_size} {known.st_mtime_ns}\n".encode())
    else:
        for store in open_cohort(path):
            digest.update(json.dumps([store.path.name, store.attrs], sort_keys=True, default=str).encode())
    for i in range(len(pictures)):
        digest.update(pictures.name(i).encode())
    return digest.hexdigest()


def _looked_at(pictures: Pictures, cut: bool) -> tuple[dict[tuple[int, int], list[int]], list[int]]:
    """Sizes (w,h) -> the images that have it, the most frequent first; and which images are grey. cut: crops."""
    sizes: dict[tuple[int, int], list[int]] = {}
    grey = []
    if cut or pictures.paths is None:  # crops are alike, and so are tiles of one store
        alike: dict[str, list[int]] = {}
        for i, own in enumerate(pictures.about):
            alike.setdefault("" if cut else str(own["slide"]), []).append(i)
        for rows in alike.values():
            sizes.setdefault(pictures[rows[0]].size, []).extend(rows)
        return sizes, grey
    for i, picture in enumerate(tqdm(pictures, desc="headers", unit="image", disable=len(pictures) < 5000)):
        sizes.setdefault(picture.size, []).append(i)
        if picture.gray:
            grey.append(i)
    order = Counter({size: len(rows) for size, rows in sizes.items()}).most_common()
    return {size: sizes[size] for size, _ in order}, grey


def _crops(pictures: Pictures, side: int) -> Pictures:
    """Squares of `side` px side by side, of each image from its upper left corner."""
    crops, mpp = [], None
    for picture in pictures:
        image = picture.open()
        mpp = mpp or image.mpp or None
        width, height = image.dimensions
        if min(height, width) < side:
            raise UserError(
                f"{picture.path} is {width} x {height} px, smaller than crops of {side} px; give a smaller --crop."
            )
        for y in range(0, height - side + 1, side):
            for x in range(0, width - side + 1, side):
                about = {"file": f"{picture.file}:{x},{y}", "slide": picture.file, "x": x, "y": y}
                opener = partial(_open, picture.path)
                crops.append(Picture(about["file"], opener, picture.path, about, (x, y, side, side)))
    return Pictures(crops, pictures.source, mpp)


@lru_cache(maxsize=2)
def _open(path: Path) -> Slide:
    """An image that is read part by part, held open."""
    return open_image(path)


def images_by_name(path: Path) -> dict[str, Path]:
    """The image files of a folder (or one file) by their name without its ending, to pair two folders.

    >>> list(images_by_name(cells))[:2]
    ['Atypical/1007', 'Atypical/1283']
    """
    if is_there(path):
        return {"": path}
    pictures = read_pictures(path)
    if pictures.paths is None:
        raise UserError(f"pairs are of image files by name; {path} holds tiles of stores.")
    found: dict[str, Path] = {}
    for own in pictures.paths:
        key = str(own.relative_to(path).with_suffix(""))
        if key in found:
            raise UserError(f"{found[key]} and {own} have the same name but for their ending; keep one of them.")
        found[key] = own
    return found
