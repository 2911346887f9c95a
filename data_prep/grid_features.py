r"""Write the features of the tiles inside each tile, or of the tile around it, from another magnification.

Where the tiles of --from are smaller, each tile gets a grid features/<name> (N,D,k,k): the cell at row r and column c
is the feature of the tile that covers that part; grids above 8 x 8 are averaged down to 8 x 8. With --mean it gets the
mean of its cells (N,D). Where the tiles of --from are larger, each tile gets the feature (N,D) of the one in which its
middle lies, its region.

Parts without a tile are mostly glass that was not kept. They get the mean feature of the background tiles that were, or
without any the nearest tile's; the report counts them. The cohort's table gets a column `magnification`.

Examples:

    python -m data_prep.grid_features --store cohort_5x --from cohort_20x \
        --feature uni --out-name uni-grid
    python -m data_prep.grid_features --store cohort_5x --from cohort_20x \
        --feature uni --out-name uni-mean --mean
    python -m data_prep.grid_features --store cohort_20x --from cohort_5x \
        --feature ctranspath --out-name ctranspath-5x
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from einops import pack, rearrange, unpack
from tqdm import tqdm

from data_prep.options import StoreOption, inputs, number, output, taken
from ldm.cli.script import script
from ldm.data import dihedral
from ldm.data.cohort import merge_index
from ldm.data.features import nearest_tiles
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore, open_cohort
from ldm.errors import UserError, suggest

LARGEST = 8  # cells along each side
_CELLS = 16384  # features in memory at once
GLASS = 0.01  # tissue fraction of a background tile, at most


@dataclass
class Cells:
    """Which tiles of another store are the cells of a store's tiles.

    Attributes:
        rows: (N, k*k) rows of the other store, row by row; -1 where it has no tile.
        side: k; 0 where the other's tiles are larger and `rows` (N, 1) is the one around each tile.
        offset: largest distance in level-0 px, in x or y, between a cell and its tile.
    """

    rows: np.ndarray
    side: int
    offset: float = 0.0


def _extents(store: TileStore, other: TileStore) -> tuple[float, float]:
    return store.tile_size * store.downsample, other.tile_size * other.downsample


def side_of(store: TileStore, other: TileStore) -> int:
    """Tiles of `other` along a side of those of `store`; 0 if they are larger. UserError: no whole number."""
    extent, part = _extents(store, other)
    side = round(extent / part)
    if extent < 0.98 * part:
        return 0
    if abs(extent / part / side - 1) > 0.02:
        raise UserError(
            f"tiles of {store.path} cover {extent:g} level-0 px, {extent / part:.3g} times those of {other.path} "
            f"({part:g}); a grid takes a whole number. Tile one of them at a multiple of the other's mpp"
        )
    return side


def find_cells(store: TileStore, other: TileStore) -> Cells:
    """The cells of each tile, or the tile around it."""
    extent, part = _extents(store, other)
    coords, side = other.coords, side_of(store, other)
    if not side:
        return Cells(nearest_tiles(store.coords + extent / 2, coords + part / 2, part / 2)[:, None], 0)
    steps = (np.arange(side) + 0.5) * extent / side - part / 2
    places = np.stack(np.meshgrid(steps, steps), -1).reshape(1, -1, 2)  # x, y of cells, row by row
    points = (store.coords[:, None] + places).reshape(-1, 2)
    rows = nearest_tiles(points, coords, part / 2)
    found = rows >= 0
    offset = float(np.abs(points[found] - coords[rows[found]]).max()) if found.any() else 0.0
    return Cells(rows.reshape(len(store), -1), side, offset)


def filling(cells: Cells, store: TileStore, other: TileStore, values: np.ndarray) -> tuple[np.ndarray, str]:
    """values (M,...) with what fills holes appended where needed, and how; cells.rows then has no -1."""
    holes = cells.rows < 0
    if not holes.any():
        return values, ""
    glass = other.labels("tissue") <= GLASS if "tissue" in other.label_names else np.zeros(len(other), bool)
    if glass.any():
        cells.rows[holes] = len(values)
        mean = values[glass].astype(np.float32).mean(0, keepdims=True).astype(values.dtype)
        return np.concatenate([values, mean]), "the mean feature of background tiles"
    extent, part = _extents(store, other)
    tile, cell = np.nonzero(holes)
    side = max(cells.side, 1)
    points = store.coords[tile] + (np.stack([cell % side, cell // side], 1) + 0.5) * extent / side
    cells.rows[holes] = _nearest(points, other.coords + part / 2, part)
    return values, "the nearest tile's feature"


def _nearest(points: np.ndarray, coords: np.ndarray, reach: float) -> np.ndarray:
    """The nearest of coords for each point, however far."""
    rows = np.full(len(points), -1)
    while (left := np.flatnonzero(rows < 0)).size:
        rows[left] = nearest_tiles(points[left], coords, reach)
        reach *= 2
    return rows


def write_grid(store: TileStore, other: TileStore, feature: str, out_name: str, mean: bool = False) -> str:
    """Write features/<out_name> of one store; returns its report."""
    source = other.features(feature)
    turned = bool(source.attrs.get("dihedral"))
    cells = find_cells(store, other)
    known = cells.rows >= 0
    values, how = filling(cells, store, other, np.asarray(source[:]))  # (M,[8,]D)
    dim, side, one = values.shape[-1], min(cells.side, LARGEST), mean or not cells.side
    tail = (dim,) if one else (dim, side, side)
    skipped = ("rows", "rows_sha256")
    attrs = {key: value for key, value in source.attrs.items() if key not in skipped}
    attrs |= {"dim": dim, "of": feature, "of_mpp": other.mpp, "cells": cells.side, "mean": mean, "holes": how}
    batch = max(1, _CELLS // cells.rows.shape[1])
    shape = (dihedral.COUNT, *tail) if turned else tail
    with (
        ArrayWriter(store.path, f"features/{out_name}", shape, "f2", attrs) as writer,
        tqdm(total=len(store), initial=writer.rows, desc=f"{out_name} {store.path.stem}", unit="tile") as bar,
    ):
        for start in range(writer.rows, len(store), batch):
            rows, own = cells.rows[start : start + batch], known[start : start + batch]
            part = values[rows].astype(np.float32)  # (b,k*k,[8,]D)
            if one:
                own = own | ~own.any(1, keepdims=True)  # without any tile, the filling
                weights = own / own.sum(1, keepdims=True)
                part = np.einsum("bc,bc...->b...", weights, part)  # (b,[8,]D)
            else:
                part = _grids(part, cells.side, side)
            writer.append(part.astype(np.float16))
            bar.update(len(rows))
    report = f"{store.slide}: {len(store)} tiles, {known.sum()} of {known.size} cells have a tile"
    if how:
        report += f"; the others got {how}. Tiles without any cell: {(~known.any(1)).sum()}"
    if cells.offset > 2:
        report += f"; cells and tiles lie up to {cells.offset:.0f} level-0 px apart"
    return report


def _grids(values: np.ndarray, side: int, largest: int) -> np.ndarray:
    """Cells (b,k*k,D) -> (b,D,k,k), or (b,k*k,8,D) of all orientations -> (b,8,D,k,k) with the cells turned as well."""
    grids = rearrange(values, "b (row col) ... d -> b ... d row col", row=side)
    if side > largest:
        import torch
        from torch.nn.functional import adaptive_avg_pool2d

        flat, shape = pack([torch.from_numpy(np.ascontiguousarray(grids))], "* d row col")
        grids = unpack(adaptive_avg_pool2d(flat, largest), shape, "* d row col")[0].numpy()
    if values.ndim == 4:
        grids = np.stack([dihedral.apply(grids[:, variant], variant) for variant in range(dihedral.COUNT)], 1)
    return grids


def magnification(mpp: float) -> str:
    """The usual name of a resolution: 0.5 um per pixel is 20x, and so by factors of two within a quarter."""
    level = round(math.log2(mpp / 0.25))
    usual = 0.25 * 2.0**level
    return f"{40 / 2.0**level:g}x" if abs(mpp / usual - 1) < 0.25 else f"{10 / mpp:.3g}x"


@script("data_prep.grid_features", __doc__)
def main(
    store: StoreOption,
    others: Annotated[
        list[Path],
        inputs("--from", help="Tile stores or cohorts of the same slides at the other magnification: one or several."),
    ],
    feature: Annotated[str, inputs("--feature", help="Name of the features to take from them.")],
    out_name: Annotated[str, output("--out-name", help="Name of the features to write.")],
    mean: Annotated[bool, taken("--mean", help="Write one feature for each tile, the mean of its cells.")] = False,
) -> None:
    stores = open_cohort(store)
    sources = {source.slide: source for source in open_cohort(others)}
    for each in stores:
        source = sources.get(each.slide)
        if source is None:
            raise UserError(f"no store of slide '{each.slide}' in --from{suggest(each.slide, sources)}")
        values = source.features(feature)
        if values.ndim != (3 if values.attrs.get("dihedral") else 2):
            raise UserError(
                f"features/{feature} of {source.path} are no vectors; give --feature one vector for each tile"
            )
        side_of(each, source)
    for each in stores:
        tqdm.write(write_grid(each, sources[each.slide], feature, out_name, mean))
    for cohort in {each.path.parent.parent for each in stores if each.path.parent.name == "slides"}:
        known = [each for each in stores if each.path.parent.parent == cohort and each.mpp is not None]
        tables = [
            pd.DataFrame({"slide": s.slide, "row": np.arange(len(s)), "magnification": magnification(s.mpp)})
            for s in known
        ]
        if tables:
            merge_index(cohort, pd.concat(tables))
    print(f"features/{out_name} of {sum(map(len, stores))} tiles in {number(len(stores), 'store')}")


if __name__ == "__main__":
    main.run()
