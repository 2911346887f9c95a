"""Crops of the grids of features of slides, of which models of fields are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data import dihedral as d4
from ldm.data.datasets import Key, NoTiles, TileDataset
from ldm.data.tile_store import TileStore
from ldm.data.where import Where
from ldm.errors import UserError
from ldm.rng import fold


class FieldCrops(Dataset):
    """Square crops, at random places, of the lattices on which the tiles of slides lie, as images of features.

    Items are dicts: `image` (D,size,size) float32, NaN where the slide has no tile; `slide`; `coord` (2,) level-0 x, y
    of the crop's first tile; `conditions` of the tile that is nearest to its middle. A crop touches no tile that
    `where` leaves out. Tiles that a store kept of its background are holes, as those that it did not keep.

    Args:
        stores: a `.zarr` store, a cohort folder, or several, all of one stride.
        feature: name of the features. size: tiles along each side of a crop. length: items of an epoch.
        least: share of a crop's places that have a tile, at least.
        dihedral: turn and flip crops at random; features that a store has in all eight orientations turn with them.
        where, conditions, missing: as of `ldm.data.datasets.TileDataset`.
        in_memory: hold the features in memory.
    Raises:
        UserError: as TileDataset; stores of several strides. NoTiles: no place for a crop.
    """

    def __init__(
        self,
        stores: str | Sequence[str],
        feature: str,
        size: int,
        length: int,
        least: float = 0.25,
        dihedral: bool = False,
        where: Where = None,
        conditions: Mapping[str, str] | None = None,
        missing: str = "error",
        in_memory: bool = False,
    ) -> None:
        if size < 1 or length < 1 or not 0 < least <= 1:
            raise UserError(
                "crops have a size and a length of 1 or more, and `least` above 0 and up to 1; got "
                f"{size}, {length} and {least:g}."
            )
        self.size, self.length, self.dihedral, self.feature = size, length, dihedral, feature
        self.tiles = TileDataset(stores, ("ssl",), feature, where=where, conditions=conditions, missing=missing)
        if len(strides := {store.stride for store in self.tiles.stores}) > 1:
            raise UserError(f"the stores have strides of {', '.join(map(str, sorted(strides)))} px; give those of one.")
        self._coords = [store.coords for store in self.tiles.stores]
        self.lattices = [lattice(store) for store in self.tiles.stores]         # (rows,cols): row of the store, or -1
        self._chosen = [np.full(len(store), -1) for store in self.tiles.stores]  # row -> its place among the chosen
        self._corners = []
        for places, chosen, rows in zip(self.lattices, self._chosen, self.tiles.conditions.rows):
            chosen[rows] = np.arange(len(rows))
            known = places >= 0
            unwanted = known & (chosen[places] < 0)
            fits = (_sums(unwanted, size) == 0) & (_sums(known, size) >= least * size**2)
            self._corners.append(np.argwhere(fits))
        self._ends = np.cumsum([len(corners) for corners in self._corners])
        if not self._ends[-1]:
            shapes = ", ".join(f"{rows} x {cols}" for rows, cols in sorted({each.shape for each in self.lattices})[:5])
            raise NoTiles(
                f"no crop of {size} x {size} tiles, {least:.0%} of them there and none left out by {where}, lies in "
                f"the grids of {stores} (rows x cols: {shapes}); take a smaller size or other tiles."
            )
        arrays = [store.features(feature) for store in self.tiles.stores]
        self._arrays = [np.asarray(array[:]) if in_memory else array for array in arrays]
        self._turned = [bool(array.attrs.get("dihedral")) for array in arrays]

    def __len__(self) -> int:
        return self.length

    @property
    def metadata(self) -> dict[str, Any]:
        """What a model trained on these crops must remember: as TileDataset, and of which lattice its fields are."""
        return self.tiles.metadata | {"field": {"feature": self.feature, "stride": self.tiles.stores[0].stride}}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, draw = key if isinstance(key, tuple) else (key, None)
        rng = np.random.default_rng(fold(index) if draw is None else draw)
        number = int(rng.integers(self._ends[-1]))
        which = int(np.searchsorted(self._ends, number, "right"))
        row, col = self._corners[which][number - self._ends[which]]
        return self.crop(which, int(row), int(col), int(rng.integers(d4.COUNT)) if self.dihedral else 0)

    def crop(self, which: int, row: int, col: int, variant: int = 0) -> dict[str, Any]:
        """The item of the crop of a store's lattice whose first tile is at (row, col), in orientation `variant`."""
        store, places = self.tiles.stores[which], self.lattices[which][row : row + self.size, col : col + self.size]
        known = np.argwhere(places >= 0)
        rows = places[tuple(known.T)]
        values = self._values(which, rows, variant)
        if not np.isfinite(values).all():
            raise UserError(f"{store.path}/features/{self.feature} holds NaN or infinity; make it again.")
        image = np.full((values.shape[1], *places.shape), np.nan, np.float32)
        image[:, known[:, 0], known[:, 1]] = values.T
        middle = int(np.abs(known - (self.size - 1) / 2).sum(1).argmin())
        step = store.stride * store.downsample
        corner = self._coords[which][rows[0]] - np.round(known[0, ::-1] * step).astype(int)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(d4.apply(image, variant))),
            "slide": store.slide,
            "coord": torch.from_numpy(corner.astype(np.int64)),
        } | self.tiles.conditions.item(which, int(self._chosen[which][rows[middle]]), variant)

    def _values(self, which: int, rows: np.ndarray, variant: int) -> np.ndarray:
        """Features (n,D) of rows of a store, in an orientation where it has all."""
        array, turned = self._arrays[which], self._turned[which]
        if isinstance(array, np.ndarray):
            values = array[rows, variant] if turned else array[rows]
        else:
            values = np.stack([array[int(row)][variant] if turned else array[int(row)] for row in rows])
        return values.astype(np.float32)


def lattice(store: TileStore) -> np.ndarray:
    """(rows, cols): which row of a store is the tile at each place of the slide's lattice, -1 where none is.

    Tiles that the store kept of its background, with less tissue than it asks of others, are none. UserError: tiles
    that were not cut from a slide, or lie on no lattice.

    >>> places = lattice(store)
    >>> places.shape, int((places >= 0).sum())
    ((11, 8), 41)
    """
    if store.attrs.get("level0_size") is None:
        raise UserError(f"{store.path} was not cut from a slide, so its tiles form no grid.")
    step, coords = store.stride * store.downsample, store.coords
    first = coords.min(0) % step
    at = (coords - first) / step                                                # (N,2) column, row
    if (np.abs(at - at.round()) > 1 / step).any():
        raise UserError(f"the tiles of {store.path} lie on no lattice of {step:g} px; tile the slide again.")
    at = at.round().astype(int)
    extent = np.array(store.attrs["level0_size"]) - store.tile_size * store.downsample - first
    cols, rows = np.maximum((extent + 1) // step, at.max(0)).astype(int) + 1
    places = np.full((rows, cols), -1)
    kept = np.ones(len(store), bool)
    least = (store.attrs.get("tissue") or {}).get("min_tissue")
    if least and "tissue" in store.label_names:
        kept = store.labels("tissue") >= least
    places[at[kept, 1], at[kept, 0]] = np.flatnonzero(kept)
    return places


def _sums(mask: np.ndarray, size: int) -> np.ndarray:
    """(rows-size+1, cols-size+1): how many places of a mask are in the square at each corner; empty if none fits."""
    if min(mask.shape) < size:
        return np.zeros((0, 0), int)
    total = np.pad(mask.astype(int), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
