"""A cohort: a folder of tile stores and the table of all their tiles.

    <cohort>/slides/<name>.zarr    index.parquet: slide, row, x, y, patient, split, and a column for every condition
    <cohort>/omics/<source>.parquet, <source>.json    one row per sample, see `ldm.data.omics`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ldm.data.splits import choose_splits, owner_of, patient_of, record_fractions, tell_validation, together
from ldm.data.store_writers import TileStoreWriter
from ldm.data.tile_store import TileStore, as_numbers
from ldm.errors import UserError, note
from ldm.files import whole
from ldm.locks import Lock
from ldm.tables.parquet import read_parquet

_BATCH = 64


def split_table(
    table: pd.DataFrame, cohort: Path | str, validation: float | None, test: float, instead: str
) -> tuple[pd.DataFrame, str]:
    """A table of tiles (slide, patient, any other columns) with the column `split`, and what to tell of it, or "".

    The splits of patients that other slides of the cohort have stay; see `choose_splits` and `tell_validation`.

    >>> table, told = split_table(pd.DataFrame({"slide": "a", "patient": list("abc")}), "cohort", None, 0.0, "")
    >>> table["split"].tolist()
    ['train', 'train', 'val']
    """
    path = Path(cohort) / "index.parquet"
    index = read_index(cohort) if path.exists() else None
    others = None if index is None else index[~index["slide"].isin(table["slide"])]
    splits = choose_splits(table["patient"], validation, test, others)
    table = table.assign(split=table["patient"].map(splits))
    whole_cohort = pd.concat([others, table[["patient", "split"]]])
    return table, tell_validation(whole_cohort["patient"], whole_cohort["split"], validation, test, instead)


def counted(values: Iterable[str]) -> str:
    """How often each value is there, the most frequent first: "3 train, 1 val".

    >>> counted(["val", "train", "train"])
    '2 train, 1 val'
    """
    return ", ".join(f"{count} {name}" for name, count in Counter(values).most_common())


def write_store(
    cohort: Path | str,
    name: str,
    images: Callable[[int], np.ndarray],
    count: int,
    *,
    attrs: Mapping[str, Any],
    coords: np.ndarray | None = None,
    labels: Mapping[str, np.ndarray] | None = None,
    desc: str | None = None,
) -> TileStore:
    """Write images as the tile store `slides/<name>.zarr` of a cohort, or go on with an interrupted one.

    Args:
        images: i -> tile i (T,T,3) uint8, called once for every tile that is not on disk yet.
        attrs: at least tile_size; mpp (None where micrometres are unknown), slide (default: `name`), licence, and
            whatever says how the tiles were made: a store begun with other attrs is an error.
        coords: (count, 2) level-0 x, y of the tiles' corners; zeros where there is no slide.
        labels: name -> (count,) numbers or text.
    Raises:
        UserError: the folder cannot be written, or holds a store of the same name made otherwise.

    >>> write_store("cohort", "cells", lambda i: tile, 2, attrs={"tile_size": 256})
    TileStore('cohort/slides/cells.zarr', 2 tiles of 256 px at None um/px)
    """
    labels, texts = as_numbers(labels or {})
    coords = np.zeros((count, 2), np.int32) if coords is None else np.asarray(coords, np.int32)
    attrs = {
        "slide": name, "mpp": None, "magnification": None, "stride": attrs["tile_size"], "level0_size": None,
        "downsample": 1.0, **attrs,
    } | ({"texts": texts} if texts else {})  # fmt: skip
    path = Path(cohort) / "slides" / f"{name}.zarr"
    dtypes = {label: str(values.dtype) for label, values in labels.items()}
    with (
        TileStoreWriter.create(path, count, attrs, dtypes) as writer,
        tqdm(total=count, initial=writer.rows, desc=desc or name, unit="tile", leave=False) as bar,
    ):
        for first in range(count if writer.finished else writer.rows, count, _BATCH):
            rows = range(first, min(first + _BATCH, count))
            part = slice(rows.start, rows.stop)
            own = {label: values[part] for label, values in labels.items()}
            writer.append(np.stack([images(i) for i in rows]), coords[part], own)
            bar.update(len(rows))
    return TileStore.open(path)


def read_index(cohort: Path | str) -> pd.DataFrame:
    """The table of all tiles of a cohort. UserError where there is none, or a broken one.

    >>> store = write_store("cohort", "cells", lambda i: tile, 2, attrs={"tile_size": 256})
    >>> _ = merge_index("cohort", pd.DataFrame({"slide": "cells", "row": [0, 1]}))
    >>> list(read_index("cohort"))
    ['slide', 'row', 'x', 'y', 'patient', 'split']
    """
    path = Path(cohort) / "index.parquet"
    if not path.is_file():
        raise UserError(f"there is no table of tiles at {path}; the data_prep commands write one with the tiles.")
    again = "copy it again, or delete it and run the command that wrote it again"
    index = read_parquet(path, "the table of tiles", again)
    if lacking := [name for name in ("slide", "row", "patient", "split") if name not in index]:
        raise UserError(f"the table of tiles {path} has no column {', '.join(lacking)}; it is none of this toolkit.")
    whole = index["row"].dtype.kind in "iu" and index["row"].min() >= 0 if len(index) else True
    if not whole or not index["slide"].map(lambda name: isinstance(name, str)).all():
        raise UserError(f"the table of tiles {path} has rows that name no slide and row of it; {again}.")
    return index


def index_lock(cohort: Path | str) -> Lock:
    """The lock of a cohort's table of tiles, which whoever changes the table holds; a second one waits.

    >>> with index_lock("."):
    ...     print(Path(".lock-index").exists())
    True
    """
    return Lock(Path(cohort) / ".lock-index", wait=300)


def merge_index(
    cohort: Path | str, table: pd.DataFrame, drawn: tuple[float | None, float] | None = None
) -> Path:
    """Bring rows of `table` (slide, row, any other columns) into the cohort's index.parquet.

    Rows that the index knows get the table's columns and keep their others; new rows are added. x and y come from the
    stores; patient and split, where nothing gives them, are `patient_of(slide)` and "train".

    Args:
        drawn: the fractions (validation, test) that the table's splits were drawn by, to be remembered.
    Raises:
        UserError: the same slide and row twice, a slide without a store, a row that its store does not have, a column
            that would hold text and numbers.

    >>> store = write_store("cohort", "cells", lambda i: tile, 2, attrs={"tile_size": 256})
    >>> _ = merge_index("cohort", pd.DataFrame({"slide": "cells", "row": [0, 1], "grade": ["low", "high"]}))
    >>> read_index("cohort")["grade"].tolist()
    ['low', 'high']
    """
    cohort = Path(cohort)
    path = cohort / "index.parquet"
    keys = ["slide", "row"]
    if missing := set(keys) - set(table):
        raise UserError(f"the table of tiles lacks {', '.join(sorted(missing))}")
    if twice := table.duplicated(keys).sum():
        first = table[table.duplicated(keys)].iloc[0]
        raise UserError(f"{twice} tiles are listed twice, the first is row {first['row']} of {first['slide']}")
    stores = {store.slide: store for store in finished_stores(cohort)}
    for slide, rows in table.groupby("slide")["row"]:
        if slide not in stores:
            raise UserError(f"{cohort} has no finished store of the slide '{slide}'")
        if rows.min() < 0 or rows.max() >= len(stores[slide]):
            raise UserError(f"{stores[slide].path} has {len(stores[slide])} tiles; the table has row {rows.max()}")
    with index_lock(cohort):
        old = read_index(cohort) if path.exists() else pd.DataFrame({"slide": [], "row": []})
        merged = _updated(old, table, keys)
        for slide in table["slide"].unique():
            of_slide = merged["slide"] == slide
            corners = stores[slide].coords[merged.loc[of_slide, "row"].astype(int)]  # (n, 2)
            merged.loc[of_slide, ["x", "y"]] = corners
        merged = merged.astype({"row": int, "x": int, "y": int})
        slides = merged["slide"].map(lambda slide: owner_of(stores[slide]) if slide in stores else patient_of(slide))
        merged["patient"] = merged["patient"].fillna(slides) if "patient" in merged else slides
        merged["split"] = merged["split"].fillna("train") if "split" in merged else "train"
        merged, moved = together(merged)
        if moved:
            note(moved)
        first = [*keys, "x", "y", "patient", "split"]
        merged = merged[first + [name for name in merged if name not in first]]
        with whole(path) as part:
            merged.to_parquet(part, index=False)
        if drawn:
            record_fractions(cohort, *drawn, merged["split"])
    return path


def _updated(old: pd.DataFrame, new: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """`old` with the columns of `new` in the rows that both have, and the rows that only `new` has after them."""
    old, new = old.set_index(keys), new.set_index(keys)
    rows = old.index.append(new.index.difference(old.index, sort=False))
    merged, given = old.reindex(rows), rows.isin(new.index)
    for name in new:
        kinds = [_kind(new[name])] + ([_kind(old[name][~old.index.isin(new.index)])] if name in old else [])
        if {"text", "numbers"} <= set(kinds):
            raise UserError(
                f"the column '{name}' of the table of tiles holds {kinds[1]} and would get {kinds[0]} in some rows; "
                "rename one of them"
            )
        values = new[name].reindex(rows)
        merged[name] = values if given.all() or name not in merged else values.where(given, merged[name])
    return merged.reset_index()


def _kind(column: pd.Series) -> str:
    """numbers, text, or "" where nothing is known."""
    if not column.notna().any():
        return ""
    return "numbers" if pd.api.types.is_numeric_dtype(column.infer_objects()) else "text"


def finished_stores(cohort: Path | str) -> list[TileStore]:
    """The stores of a cohort that are finished, by their names.

    >>> [store.slide for store in finished_stores(store.path.parent.parent)]
    ['CMU-1-Small-Region.svs']
    """
    found = [TileStore.open(p, allow_incomplete=True) for p in sorted((Path(cohort) / "slides").glob("*.zarr"))]
    return [store for store in found if store.attrs["complete"]]
