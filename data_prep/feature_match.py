"""Which feature of a slide's files belongs to which tile of its store: by names of slides and by places on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm.data.features import nearest_tiles
from ldm.data.places import Places
from ldm.data.slide_files import SlideFiles, files_of
from ldm.data.spatial_zarr import mpp_of_slide
from ldm.data.tile_store import TileStore
from ldm.errors import UserError


@dataclass
class Match:
    """What a store and the files of its slide have in common.

    Attributes:
        rows: (N,) the feature of each tile, -1 for none. shape: (number, dimension) of the file's features.
        coarse: pixels of the tiles that the features were made of, where these show less than the store's.
    """

    store: TileStore
    files: SlideFiles | None
    rows: np.ndarray
    shape: tuple[int, int] = (0, 0)
    coarse: int | None = None

    @property
    def without(self) -> int:
        return int((self.rows < 0).sum())

    def report(self) -> str:
        unused = self.shape[0] - len(np.unique(self.rows[self.rows >= 0]))
        return (
            f"{self.store.slide}: {len(self.rows) - self.without} of {len(self.rows)} tiles have a feature, "
            f"{self.without} have none; {unused} of {self.shape[0]} features have no tile"
        )


def match(store: TileStore, files: SlideFiles | None, patch_size: float | None = None) -> Match:
    """Find the feature of every tile of a store. UserError: tiles of another size, none in common.

    patch_size: level-0 pixels that a tile of the files covers, where they do not say it.
    """
    if files is None:
        return Match(store, None, np.full(len(store), -1))
    values, places = files.read()
    if values is None:
        raise UserError(f"{files.source} has coordinates but no features; --slides cuts tiles there")
    places = places.in_pixels(mpp_of_slide(store), files.source)
    check_slide(places, store.attrs.get("level0_size"), files, store.path)
    extent = store.tile_size * store.downsample
    given = extent_of(places, patch_size, files)
    apart = usual_step(places.coords)
    if given is None and apart and apart < 0.75 * extent:
        raise UserError(
            f"{files.source} does not say how large its tiles are; they lie {apart:g} px apart, and those of "
            f"{store.path} cover {extent:g} level-0 px: are they features of smaller tiles? If they do cover that much "
            f"and overlap, say so by --patch-size {extent:g}"
        )
    if given is not None and abs(given / extent - 1) > 0.01:
        raise UserError(
            f"the tiles of {files.source} cover {given:g} level-0 px, those of {store.path} {extent:g}; cut "
            "tiles of that size by --slides, or by data_prep.tile_slides --mpp"
        )
    check_distinct(places, files)
    rows = nearest_tiles(store.coords, places.coords, max(0.5, store.downsample / 2))
    if (rows >= 0).mean() < 0.5:
        for factor in (2, 4, 8, 16, 32, 64):
            if (nearest_tiles(store.coords, places.coords * factor, max(0.5, store.downsample / 2)) >= 0).mean() > 0.5:
                raise UserError(
                    f"the coordinates of {files.source} are those of the tiles of {store.path} divided by {factor}: "
                    "they are in pixels of a smaller level of the slide; write them in pixels of level 0"
                )
    if (rows < 0).all():
        own, other = (tuple(np.asarray(coords[0]).tolist()) for coords in (store.coords, places.coords))
        raise UserError(
            f"no tile of {store.path} lies where {files.source} has one: its first is at {own}, the file's at {other}. "
            "Is it the same slide, tiled with the same stride? --slides cuts tiles where the file says"
        )
    coarse = places.size if places.size and extent / places.size > 1.01 * store.downsample else None
    return Match(store, files, rows, values.shape, coarse)


def check_slide(places: Places, size: Sequence[int] | None, files: SlideFiles, of: object) -> None:
    """UserError if files say that their slide has another size (width, height) than this one."""
    if places.slide and size and any(abs(own / other - 1) > 0.01 for own, other in zip(places.slide, size)):
        raise UserError(
            f"{files.source} is of a slide of {places.slide[0]:g} x {places.slide[1]:g} px, and that of {of} has "
            f"{size[0]} x {size[1]} px; is it the file of another slide?"
        )


def extent_of(places: Places, patch_size: float | None, files: SlideFiles) -> float | None:
    """Level-0 pixels that a tile covers, as the file or --patch-size says it; UserError where they differ."""
    if places.extent and patch_size and abs(places.extent / patch_size - 1) > 0.01:
        raise UserError(
            f"--patch-size says that a tile covers {patch_size:g} level-0 px, {files.source} says {places.extent:g}; "
            "leave --patch-size out, it is for files that do not say it"
        )
    return places.extent or patch_size


def usual_step(coords: np.ndarray) -> float | None:
    """How far most tiles are from the next one in their row; None where no row has two."""
    ordered = coords[np.lexsort((coords[:, 0], coords[:, 1]))]
    steps = np.diff(ordered[:, 0])[np.diff(ordered[:, 1]) == 0]
    values, counts = np.unique(steps[steps > 0], return_counts=True)
    return float(values[counts.argmax()]) if len(values) else None


def check_distinct(places: Places, files: SlideFiles) -> None:
    if twice := len(places.coords) - len(np.unique(places.coords, axis=0)):
        raise UserError(f"{files.source} has {twice} coordinates more than once; leave one row of each")


def pair(names: Sequence[str], found: dict[str, SlideFiles]) -> list[SlideFiles | None]:
    """The files of each slide. One slide and one file belong together whatever their names."""
    files = [files_of(name, found) for name in names]
    takers: dict[str, str] = {}
    for name, own in zip(names, files):
        if own is not None and (other := takers.setdefault(own.name, name)) != name:
            raise UserError(
                f"{own.source} could be of '{other}' and of '{name}' by its name; name files like their slides"
            )
    if files == [None] and len(found) == 1:
        return list(found.values())
    if not any(files):
        raise UserError(
            f"none of the slides ({', '.join(names[:3])}{', ...' * (len(names) > 3)}) has a file of its name; the "
            f"files are of {', '.join(list(found)[:3])}{', ...' * (len(found) > 3)}. Name files like their slides"
        )
    return files
