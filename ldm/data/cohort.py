"""A cohort: a folder of tile stores and the table of all their tiles.

    <cohort>/slides/<name>.zarr    index.parquet: slide, row, x, y, patient, split, and a column for every condition
    <cohort>/omics/<source>.parquet, <source>.json    one row per sample, see `ldm.data.omics`
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ldm.data.shards import WriterLock
from ldm.data.tile_store import TileStore, TileStoreWriter
from ldm.errors import UserError
from ldm.files import whole

_BATCH = 64


def patient_of(slide: str) -> str:
    """The patient a slide belongs to: the TCGA barcode's first 12 characters, or the file name without its ending."""
    return slide[:12] if re.match(r"TCGA-\w{2}-\w{4}", slide) else Path(slide).stem


def split_of(patient: str, validation: float, test: float) -> str:
    """train, val or test by a hash of the patient: the slides of one stay together, however the cohort grows."""
    place = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
    return "test" if place < test else "val" if place < test + validation else "train"


def check_fractions(validation: float, test: float) -> None:
    """UserError unless these fractions of the patients can be in the splits val and test."""
    if not (validation >= 0 and test >= 0 and validation + test <= 1):
        raise UserError(
            f"--validation and --test are fractions from 0 to 1 that sum to 1 at most; got {validation:g} and {test:g}"
        )


def counted(values: Iterable[str]) -> str:
    """How often each value is there, the most frequent first: "3 train, 1 val"."""
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
        labels: name -> (count,) numbers.
    Raises:
        UserError: the folder cannot be written, or holds a store of the same name made otherwise.
    """
    labels = labels or {}
    coords = np.zeros((count, 2), np.int32) if coords is None else np.asarray(coords, np.int32)
    attrs = {
        "slide": name, "mpp": None, "magnification": None, "stride": attrs["tile_size"], "level0_size": None,
        "downsample": 1.0, **attrs,
    }  # fmt: skip
    path = Path(cohort) / "slides" / f"{name}.zarr"
    dtypes = {label: str(np.asarray(values).dtype) for label, values in labels.items()}
    with (
        TileStoreWriter.create(path, count, attrs, dtypes) as writer,
        tqdm(total=count, initial=writer.rows, desc=desc or name, unit="tile", leave=False) as bar,
    ):
        for first in range(count if writer.finished else writer.rows, count, _BATCH):
            rows = range(first, min(first + _BATCH, count))
            part = slice(rows.start, rows.stop)
            own = {label: np.asarray(values)[part] for label, values in labels.items()}
            writer.append(np.stack([images(i) for i in rows]), coords[part], own)
            bar.update(len(rows))
    return TileStore.open(path)


def read_index(cohort: Path | str) -> pd.DataFrame:
    """The table of all tiles of a cohort. UserError where there is none."""
    path = Path(cohort) / "index.parquet"
    if not path.is_file():
        raise UserError(f"there is no table of tiles at {path}; the data_prep commands write one with the tiles.")
    return pd.read_parquet(path)


def merge_index(cohort: Path | str, table: pd.DataFrame) -> Path:
    """Bring rows of `table` (slide, row, any other columns) into the cohort's index.parquet.

    Rows that the index knows get the table's columns and keep their others; new rows are added. x and y come from the
    stores; patient and split, where nothing gives them, are `patient_of(slide)` and "train".

    Raises:
        UserError: the same slide and row twice, a slide without a store, a row that its store does not have, a column
            that would hold text and numbers.
    """
    cohort = Path(cohort)
    path = cohort / "index.parquet"
    keys = ["slide", "row"]
    if missing := set(keys) - set(table):
        raise UserError(f"the table of tiles lacks {', '.join(sorted(missing))}")
    if twice := table.duplicated(keys).sum():
        first = table[table.duplicated(keys)].iloc[0]
        raise UserError(f"{twice} tiles are listed twice, the first is row {first['row']} of {first['slide']}")
    stores = {store.slide: store for store in _stores(cohort)}
    for slide, rows in table.groupby("slide")["row"]:
        if slide not in stores:
            raise UserError(f"{cohort} has no finished store of the slide '{slide}'")
        if rows.min() < 0 or rows.max() >= len(stores[slide]):
            raise UserError(f"{stores[slide].path} has {len(stores[slide])} tiles; the table has row {rows.max()}")
    with WriterLock(cohort / ".lock-index"):
        old = pd.read_parquet(path) if path.exists() else pd.DataFrame({"slide": [], "row": []})
        merged = _updated(old, table, keys)
        for slide in table["slide"].unique():
            of_slide = merged["slide"] == slide
            corners = stores[slide].coords[merged.loc[of_slide, "row"].astype(int)]  # (n, 2)
            merged.loc[of_slide, ["x", "y"]] = corners
        merged = merged.astype({"row": int, "x": int, "y": int})
        slides = merged["slide"].map(patient_of)
        merged["patient"] = merged["patient"].fillna(slides) if "patient" in merged else slides
        merged["split"] = merged["split"].fillna("train") if "split" in merged else "train"
        first = [*keys, "x", "y", "patient", "split"]
        merged = merged[first + [name for name in merged if name not in first]]
        with whole(path) as part:
            merged.to_parquet(part, index=False)
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


def _stores(cohort: Path) -> list[TileStore]:
    found = [TileStore.open(p, allow_incomplete=True) for p in sorted((cohort / "slides").glob("*.zarr"))]
    return [store for store in found if store.attrs["complete"]]
