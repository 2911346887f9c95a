"""Images to score or to learn from: files of a folder, what `histoldm sample` wrote, tiles of stores.

pictures = read_pictures(Path("tiles"))                    # or a .zarr store, a cohort, an image
pictures.read(0)                                           # (H,W,3) uint8
pictures.about[0]                                          # {"file": "00000.png", "class": "LUAD", ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ldm.data.cohort import read_index
from ldm.data.tile_store import TileStore, open_cohort
from ldm.errors import UserError, some, suggest
from ldm.tables.annotations import CROP_SUFFIXES

LIST, SHEET = "tiles.csv", "contact_sheet"  # what `histoldm sample` writes beside its tiles
LISTS = (LIST, "sequences.csv", "translations.csv")  # of `sample`, `filter`, `resample`; `sequence`; `translate`
DEEP = ("I", "F", "I;16", "I;16B", "I;16L")  # Pillow's modes of more than 8 bits


@dataclass(frozen=True)
class Pictures:
    """N images.

    Attributes:
        about: of each: `file`, or `slide` and `row`; then what the list beside it says of it.
        read: i -> (H,W,3) uint8. paths: their files; None for tiles of stores.
        mpp: micrometres per pixel where known. source: where they come from, in words. licence: "" where unknown.
    """

    about: list[dict[str, Any]]
    read: Callable[[int], np.ndarray]
    source: str
    paths: list[Path] | None = None
    mpp: float | None = None
    licence: str = ""

    def __len__(self) -> int:
        return len(self.about)

    def name(self, i: int) -> str:
        """What the i-th image is called in messages and tables."""
        own = self.about[i]
        return str(own["file"]) if "file" in own else f"{own['slide']} row {own['row']}"

    def words(self) -> list[str]:
        """What tells these images from others without reading them: source, names, sizes and times of files."""
        stats = [] if self.paths is None else [path.stat() for path in self.paths]
        names = [self.name(i) for i in range(len(self))]
        return [self.source, *names, *(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats)]

    def column(self, name: str) -> list[Any]:
        """What the list says of each image under `name`. UserError where it does not."""
        known = {key for own in self.about for key in own}
        if name not in known:
            raise UserError(f"nothing says the '{name}' of the images in {self.source}{suggest(name, known)}")
        if missing := [self.name(i) for i, own in enumerate(self.about) if pd.isna(own.get(name))]:
            raise UserError(f"{len(missing)} images of {self.source} have no {name}: {some(missing, 5)}")
        return [own[name] for own in self.about]

    def middle(self, crop: int | None) -> Pictures:
        """The same images, of which only the middle `crop` px are seen; None: all. A smaller one is a UserError."""
        if crop is None:
            return self
        if crop < 8:
            raise UserError(f"--crop is at least 8 px; got {crop}.")
        seen = f"{self.source} (middle {crop} px)"
        return replace(self, read=lambda i: cropped(self.read(i), crop, self.name(i)), source=seen)

    def take(self, rows: Sequence[int]) -> Pictures:
        """The images at these places."""
        rows = [int(row) for row in rows]
        paths = None if self.paths is None else [self.paths[row] for row in rows]
        about = [self.about[row] for row in rows]
        return replace(self, about=about, read=lambda i: self.read(rows[i]), paths=paths)


def read_pictures(path: Path | str, where: Mapping[str, Any] | None = None) -> Pictures:
    """The images at `path`: an image, a folder with its subfolders, an output of `histoldm sample`, a store, a cohort.

    where: keeps those of which the list (tiles.csv, index.parquet) says so, `{"split": "test"}`.
    UserError: nothing there, no image, a list that names files which are not there, a selection of none.
    """
    path = Path(path)
    if path.is_dir() and (path.suffix == ".zarr" or any(path.glob("*.zarr")) or any(path.glob("slides/*.zarr"))):
        pictures = pictures_of_stores(path)
    elif (listed := list_of(path)) is not None:
        pictures = _listed(listed)
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in CROP_SUFFIXES and p.is_file())
        hidden = {p for p in files if any(part.startswith(".") for part in p.relative_to(path).parts)}
        files = [p for p in files if p not in hidden and not p.name.startswith(SHEET)]
        if not files:
            raise UserError(f"there is no image in {path}; known endings: {' '.join(sorted(CROP_SUFFIXES))}")
        pictures = pictures_of_files(files, [{"file": str(p.relative_to(path))} for p in files], str(path))
    elif path.is_file():
        pictures = pictures_of_files([path], [{"file": path.name}], str(path))
    else:
        raise UserError(f"there are no images at {path}; give a folder of images, a tile store or a cohort.")
    for name, value in (where or {}).items():
        told = pictures.column(name)
        rows = [i for i, own in enumerate(told) if str(own) == str(value)]
        if not rows:
            raise UserError(f"no image of {path} has {name}={value}{suggest(str(value), set(map(str, told)))}")
        pictures = pictures.take(rows)
    return pictures


def cropped(image: np.ndarray, crop: int, name: str) -> np.ndarray:
    """The middle `crop` px of an image (H,W,3). UserError for a smaller one."""
    height, width = image.shape[:2]
    if min(height, width) < crop:
        raise UserError(f"{name} is {width} x {height} px, smaller than --crop {crop}")
    top, left = (height - crop) // 2, (width - crop) // 2
    return image[top : top + crop, left : left + crop]


def joined(first: Pictures, second: Pictures) -> Pictures:
    """The images of both, one after the other."""
    count, paths = len(first), None
    if first.paths is not None and second.paths is not None:
        paths = first.paths + second.paths
    licence = "; ".join(sorted({first.licence, second.licence} - {""}))
    mpp = first.mpp if first.mpp == second.mpp else None
    return Pictures(
        first.about + second.about, lambda i: first.read(i) if i < count else second.read(i - count),
        f"{first.source} and {second.source}", paths, mpp, licence,
    )  # fmt: skip


def pictures_of_files(paths: Sequence[Path], about: Sequence[dict[str, Any]], source: str) -> Pictures:
    paths = list(paths)
    return Pictures(list(about), lambda i: read_image(paths[i]), source, paths)


def pictures_of_stores(path: Path) -> Pictures:
    """Tiles of a store, or of a cohort, with the columns of its index.parquet."""
    stores = open_cohort(path)
    resolutions = {store.mpp for store in stores}
    licences = {str(store.attrs["licence"]) for store in stores if store.attrs.get("licence")}
    places = [(store, row) for store in stores for row in range(len(store))]
    known, about = {}, []
    for folder in {cohort_of(store) for store in stores} - {None}:
        rows = read_index(folder).set_index(["slide", "row"])
        known |= rows[~rows.index.duplicated()].to_dict("index")
    for store in stores:
        labels = {name: store.labels(name).tolist() for name in store.label_names}
        for row in range(len(store)):
            own = {name: values[row] for name, values in labels.items()}
            about.append({"slide": store.slide, "row": row} | known.get((store.slide, row), {}) | own)
    mpp = resolutions.pop() if len(resolutions) == 1 else None
    return Pictures(about, lambda i: places[i][0].tile(places[i][1]), str(path), None, mpp, "; ".join(sorted(licences)))


def cohort_of(store: TileStore) -> Path | None:
    """The cohort folder that a store lies in, if it has an index."""
    folder = store.path.resolve().parent.parent
    return folder if (folder / "index.parquet").is_file() else None


def list_of(folder: Path) -> Path | None:
    """The table in a folder that a command made which says which of its files are images of their own."""
    return next((folder / name for name in LISTS if (folder / name).is_file()), None)


def _listed(path: Path) -> Pictures:
    """The output of `histoldm sample`, `sequence` or `translate`, with the columns of its list."""
    table = read_table(path)
    if "file" not in table:
        raise UserError(f"{path} has no column 'file'; it lists the images of its folder.")
    paths = [path.parent / str(name) for name in table["file"]]
    if missing := [file.name for file in paths if not file.is_file()]:
        raise UserError(f"{path} lists {len(missing)} images that are not there: {some(missing, 5)}")
    return pictures_of_files(paths, table.to_dict("records"), str(path.parent))


def read_table(path: Path, text: bool = False) -> pd.DataFrame:
    """A CSV, or a TSV by its ending. text: all values as they stand there, "" where there is none.

    UserError where it cannot be read or has no rows.
    """
    as_text = {"dtype": str, "keep_default_na": False} if text else {}
    try:
        table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", skipinitialspace=True, **as_text)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip()
        raise UserError(f"cannot read the table {path}: {reason}.") from error
    if table.empty:
        raise UserError(f"{path} has no rows.")
    return table.rename(columns=lambda name: str(name).strip())


def read_image(path: Path) -> np.ndarray:
    """An image file as (H,W,3) uint8. UserError that names it, if it cannot be read or has more than 8 bits."""
    try:
        with Image.open(path) as image:
            if image.mode in DEEP:
                raise UserError(f"{path} has more than 8 bits per channel (mode {image.mode}); save it with 8.")
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the image {path} cannot be read: {error}") from error
