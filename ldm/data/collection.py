"""Images to work on: files of a folder, what `histoldm sample` wrote, tiles of stores.

pictures = read_pictures(Path("tiles"))                    # or a .zarr store, a cohort, an image
pictures.read(0)                                           # (H,W,3) uint8
pictures.about[0]                                          # {"file": "00000.png", "class": "LUAD", ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldm.data.conditions import index_rows, lost_index
from ldm.data.tile_store import holds_stores, open_cohort
from ldm.data.where import Where, parse_where, select, unknown
from ldm.errors import UserError, note, some, suggest
from ldm.foreign.paths import named_in
from ldm.images.kinds import ENDINGS, called, images_in, is_ome_zarr, is_there
from ldm.images.pictures import Picture, notes_of
from ldm.tables.text import read_table

LIST, SHEET = "tiles.csv", "contact_sheet"  # what `histoldm sample` writes beside its tiles
LISTS = (LIST, "sequences.csv", "translations.csv")  # of `sample`, `filter`, `resample`; `sequence`; `translate`


@dataclass(frozen=True)
class Pictures:
    """N images.

    Attributes:
        items: each of them; its `about` has `file`, or `slide` and `row`, then what the list beside it says of it.
        source: where they come from, in words. mpp: micrometres per pixel of tiles of stores, where they are alike.
        licence: "" where unknown.
    """

    items: Sequence[Picture]
    source: str
    mpp: float | None = None
    licence: str = ""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Picture:
        return self.items[i]

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.items)

    @cached_property
    def about(self) -> list[Mapping[str, Any]]:
        """What is known of each."""
        return [picture.about for picture in self.items]

    @cached_property
    def paths(self) -> list[Path] | None:
        """Their files; None for tiles of stores."""
        paths = [picture.path for picture in self.items]
        return None if None in paths else paths

    @property
    def notes(self) -> list[str]:
        """What a user should know of how their files are read."""
        files = {own.path: own for own in reversed(self.items) if own.path is not None}
        return notes_of(files.values())

    def read(self, i: int) -> np.ndarray:
        """The i-th image, (H,W,3) uint8."""
        return self.items[i].pixels()

    def name(self, i: int) -> str:
        """What the i-th image is called in messages and tables."""
        return self.items[i].file

    def words(self) -> list[str]:
        """What tells these images from others without reading them: source, names, sizes and times of files."""
        stats = [] if self.paths is None else [path.stat() for path in self.paths]
        names = [self.name(i) for i in range(len(self))]
        return [self.source, *names, *(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats)]

    def column(self, name: str) -> list[Any]:
        """What the list says of each image under `name`. UserError where it does not, of any."""
        values = self._told(name)
        if missing := [self.name(i) for i, value in enumerate(values) if pd.isna(value)]:
            raise UserError(f"{len(missing)} images of {self.source} have no {name}: {some(missing, 5)}.")
        return values

    def _told(self, name: str) -> list[Any]:
        """What the list says of each image under `name`, None where nothing. UserError where it never does."""
        known = {key for own in self.about for key in own}
        if name not in known:
            raise UserError(f"nothing says the '{name}' of the images in {self.source}{suggest(name, known)}")
        return [own.get(name) for own in self.about]

    def middle(self, crop: int | None) -> Pictures:
        """The same images, of which only the middle `crop` px are seen; None: all. A smaller one is a UserError."""
        if crop is None:
            return self
        if crop < 8:
            raise UserError(f"--crop is at least 8 px; got {crop}.")
        seen = f"{self.source} (middle {crop} px)"
        return replace(self, items=[picture.part(crop) for picture in self.items], source=seen)

    def take(self, rows: Sequence[int]) -> Pictures:
        """The images at these places."""
        return replace(self, items=[self.items[int(row)] for row in rows])

    def chosen(self, where: Where) -> Pictures:
        """The images of which the list beside them says so. UserError where there is none."""
        return self.take(np.flatnonzero(self.which(where))) if where else self

    def which(self, where: Where) -> np.ndarray:
        """(N,) bool: the images of which the list beside them says so, see `ldm.data.where`. UserError for none."""
        clauses, column = parse_where(where), cache(self._told)
        if no_such := unknown(clauses, column, f"no image of {self.source}"):
            raise UserError(no_such)
        found = select(clauses, len(self), column)
        if not found.any():
            raise UserError(f"no image of {self.source} has {' and '.join(map(str, clauses))}.")
        return found

    def told(self, about: Sequence[Mapping[str, Any]]) -> Pictures:
        """The same images, of which other things are known."""
        return replace(self, items=[replace(picture, about=own) for picture, own in zip(self.items, about)])


def read_pictures(path: Path | str, where: Where = None, subfolders: bool = True, mpp: float | None = None) -> Pictures:
    """The images at `path`: an image, a folder, an output of `histoldm sample`, a store, a cohort.

    Args:
        where: keeps those of which the list (tiles.csv, index.parquet) says so, `["split=test"]`; see `ldm.data.where`.
        subfolders: take those of a folder's subfolders too.
        mpp: micrometres per pixel of image files that do not say them.
    Raises:
        UserError: nothing there, no image, a list that names files which are not there, a selection of none.

    >>> pictures = read_pictures(cells)
    >>> pictures.name(0), pictures.read(0).shape
    ('Atypical/1007.png', (128, 128, 3))
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there are no images at {path}; give an image, a folder of images, a tile store or a cohort.")
    if holds_stores(path):
        pictures = _pictures_of_stores(path)
    elif path.is_dir() and (listed := list_of(path)) is not None:
        pictures = _listed(listed, mpp)
    elif path.is_dir() and not is_ome_zarr(path):
        files = [p for p in images_in(path, subfolders) if not p.name.startswith(SHEET)]
        if not files:
            raise UserError(f"there is no image in {path}; known endings: {ENDINGS}.")
        pictures = pictures_of_files(files, [{"file": str(p.relative_to(path))} for p in files], str(path), mpp)
    else:
        pictures = pictures_of_files([path], [{"file": called(path)}], str(path), mpp)
    return pictures.chosen(where)


def joined(first: Pictures, second: Pictures) -> Pictures:
    """The images of both, one after the other.

    >>> pictures = read_pictures(cells)
    >>> len(joined(pictures, pictures)) - len(pictures) == len(pictures)
    True
    """
    licence = "; ".join(sorted({first.licence, second.licence} - {""}))
    mpp = first.mpp if first.mpp == second.mpp else None
    return Pictures([*first, *second], f"{first.source} and {second.source}", mpp, licence)


def pictures_of_files(
    paths: Sequence[Path], about: Sequence[Mapping[str, Any]], source: str, mpp: float | None = None
) -> Pictures:
    """Images by their files; about: what is known of each, under `file` what it is called.

    >>> pictures_of_files([slide_path], [{"file": "slide.svs"}], "a slide")[0].size
    (2220, 2967)
    """
    files = [Picture.of_file(path, str(own["file"]), own, mpp) for path, own in zip(paths, about)]
    return Pictures(files, source)


def _pictures_of_stores(path: Path) -> Pictures:
    """Tiles of a store, or of a cohort, with the columns of its index.parquet."""
    stores = open_cohort(path)
    resolutions = {store.mpp for store in stores}
    licences = {str(store.attrs["licence"]) for store in stores if store.attrs.get("licence")}
    tiles = []
    for lost in dict.fromkeys(map(lost_index, stores)):
        if lost:
            note(f"{lost}.")
    for store in stores:
        labels = {name: store.labels(name).tolist() for name in store.label_names}
        listed = index_rows(store).to_dict("records") or [{}] * len(store)
        for row, known in enumerate(listed):
            own = {name: values[row] for name, values in labels.items()}
            tiles.append(store.picture(row, {"slide": store.slide, "row": row} | known | own))
    mpp = resolutions.pop() if len(resolutions) == 1 else None
    return Pictures(tiles, str(path), mpp, "; ".join(sorted(licences)))


def list_of(folder: Path) -> Path | None:
    r"""The table in a folder that a command made which says which of its files are images of their own.

    >>> _ = Path("tiles.csv").write_text("file,class\n00000.png,LUAD\n")
    >>> list_of(Path("."))
    PosixPath('tiles.csv')
    """
    return next((folder / name for name in LISTS if (folder / name).is_file()), None)


def _listed(path: Path, mpp: float | None) -> Pictures:
    """The output of `histoldm sample`, `sequence` or `translate`, with the columns of its list."""
    table = read_table(path, numbers=True, missing=("",))
    if "file" not in table:
        raise UserError(f"{path} has no column 'file'; it lists the images of its folder.")
    paths = named_in(path, table["file"])
    if missing := [file.name for file in paths if not is_there(file)]:
        raise UserError(f"{path} lists {len(missing)} images that are not there: {some(missing, 5)}.")
    return pictures_of_files(paths, table.to_dict("records"), str(path.parent), mpp)
