"""A cohort: a folder of tile stores and the table of all their tiles.

    <cohort>/slides/<name>.zarr    index.parquet: slide, row, x, y, patient, split, and a column for every condition
    <cohort>/omics/<source>.parquet, <source>.json    one row per sample, see `ldm.data.omics`
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ldm.data.shards import WriterLock
from ldm.data.store_writers import TileStoreWriter
from ldm.data.tile_store import TileStore
from ldm.errors import UserError, note, some
from ldm.files import whole

UNKNOWN = "unknown"  # the patient of images that nothing says it of
HELD_OUT = ("test", "val")
VALIDATION = 0.1  # fraction of the patients in split 'val' where none is asked for
_BATCH = 64


def patient_of(slide: str) -> str:
    """The patient a slide belongs to: the TCGA barcode's first 12 characters, or the file name without its ending.

    >>> patient_of("TCGA-CR-7395-01A-01-TS1.svs"), patient_of("a.svs")
    ('TCGA-CR-7395', 'a')
    """
    return slide[:12] if re.match(r"TCGA-\w{2}-\w{4}", slide) else Path(slide).stem


def owner_of(store: TileStore) -> str:
    """The patient of a store's slide: whom its file names, as DICOM does, else `patient_of` its name.

    >>> owner_of(store)
    'CMU-1-Small-Region'
    """
    return str(store.attrs.get("patient") or patient_of(store.slide))


def split_of(patient: str, validation: float, test: float) -> str:
    """train, val or test by a hash of the patient: the slides of one stay together, however the cohort grows.

    >>> [split_of(f"patient {i}", 0.2, 0.2) for i in range(3, 8)]
    ['train', 'val', 'train', 'train', 'val']
    """
    place = _place(patient)
    return "test" if place < test else "val" if place < test + validation else "train"


def _place(patient: str) -> float:
    """Where a patient lies in [0, 1), by a hash."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64


def choose_splits(
    patients: Iterable[str], validation: float | None, test: float, index: pd.DataFrame | None = None
) -> dict[str, str]:
    """The split of each patient: train, val or test.

    Args:
        validation, test: fractions of the patients, see `split_of`. A validation of None is a tenth of the cohort, and
            at least one patient; none where it has one or two patients, whom a training would miss.
        index: patient and split of the cohort's other tiles; their patients keep their split.

    >>> choose_splits(["a", "b"], None, 0.0), Counter(choose_splits("abcdefgh", None, 0.0).values())
    ({'a': 'train', 'b': 'train'}, Counter({'train': 7, 'val': 1}))
    """
    patients = sorted(set(patients))
    known: dict[str, set[str]] = {} if index is None else index.groupby("patient")["split"].agg(set).to_dict()
    least_one = validation is None and len(known.keys() | patients) > 2
    fraction = validation if validation is not None else VALIDATION if least_one else 0.0
    splits = {patient: split_of(patient, fraction, test) for patient in patients}
    for patient in known.keys() & splits:
        splits[patient] = known[patient].pop() if len(known[patient]) == 1 else "train"  # parts of a slide differ
    new = [patient for patient in patients if patient not in known and splits[patient] == "train"]
    if least_one and new and "val" not in {*splits.values(), *(() if index is None else index["split"])}:
        splits[min(new, key=_place)] = "val"
    return splits


def fallen_apart(index: pd.DataFrame) -> dict[str, list[str]]:
    """Patients whose slides are in several splits -> these. Parts of one slide may be: a region of it was held out.

    index: slide, patient and split of tiles.

    >>> table = pd.DataFrame({"slide": ["a", "b", "c", "c"], "patient": ["p", "p", "q", "q"],
    ...                       "split": ["train", "val", "train", "val"]})
    >>> fallen_apart(table)
    {'p': ['train', 'val']}
    """
    known = index.loc[index["patient"] != UNKNOWN, ["patient", "slide", "split"]].drop_duplicates()
    whole_slides = known[~known.duplicated(["patient", "slide"], keep=False)]
    splits = whole_slides.groupby("patient")["split"].agg(lambda own: sorted(set(own)))
    return {str(patient): own for patient, own in splits.items() if len(own) > 1}


def together(index: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The index with the slides of every patient in one split, and what was moved, in words, or "".

    Slides of a patient that `fallen_apart` names go to test if one of them is there, else to val.

    >>> table = pd.DataFrame({"slide": ["a", "b"], "patient": "p", "split": ["train", "val"]})
    >>> together(table)[1]
    '1 patients were in several splits: their tiles (2) are now together in val or test (p); train again what ...'
    """
    apart = fallen_apart(index)
    if not apart:
        return index, ""
    goal = {patient: next(name for name in (*HELD_OUT, own[0]) if name in own) for patient, own in apart.items()}
    mixed = index.groupby(["patient", "slide"])["split"].transform("nunique") > 1
    moves = index["patient"].isin(goal) & ~mixed
    index = index.assign(split=index["split"].mask(moves, index["patient"].map(goal)))
    return index, (
        f"{len(apart)} patients were in several splits: their tiles ({int(moves.sum())}) are now together in val or "
        f"test ({some(list(goal), 5)}); train again what was trained with the old splits"
    )


def tell_validation(
    patients: Iterable[str], splits: Iterable[str], validation: float | None, test: float, instead: str
) -> str:
    """What a user should know of a cohort's validation split: that it was made unasked, or why there is none.

    Args:
        patients, splits: of each tile. validation, test: the fractions that were asked for, see `choose_splits`.
        instead: how to validate where there are too few patients.

    >>> tell_validation("abc", ["train", "train", "val"], None, 0.0, "")
    "1 of 3 patients is in split 'val', on which a training validates; --validation asks for another fraction"
    """
    pairs = set(zip(patients, splits))
    known, held = {patient for patient, _ in pairs}, sum(split == "val" for _, split in pairs)
    if held or validation == 0:
        told = f"{held} of {len(known)} patients {'is' if held == 1 else 'are'} in split 'val', on which a training "
        return f"{told}validates; --validation asks for another fraction" if validation is None else ""
    told = "no tile is in split 'val', on which a training validates: "
    if validation is None and len(known) < 3:
        return f"{told}it takes three patients, and there {'are two' if len(known) == 2 else 'is one'}. {instead}"
    least = min((place for patient in known if (place := _place(patient)) >= test), default=1.0) - test
    return f"{told}--validation {math.ceil(least * 100 + 1) / 100:g} would take one of the {len(known)} patients"


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


def check_fractions(validation: float | None, test: float) -> None:
    """UserError unless these fractions of the patients can be in the splits val and test.

    >>> check_fractions(0.5, 0.6)
    Traceback (most recent call last):
    ldm.errors.UserError: --validation and --test are fractions from 0 to 1 that sum to 1 at most; got 0.5 and 0.6
    """
    asked = VALIDATION if validation is None else validation
    if not (asked >= 0 and test >= 0 and asked + test <= 1):
        raise UserError(
            f"--validation and --test are fractions from 0 to 1 that sum to 1 at most; got {asked:g} and {test:g}"
        )


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
        labels: name -> (count,) numbers.
    Raises:
        UserError: the folder cannot be written, or holds a store of the same name made otherwise.

    >>> write_store("cohort", "cells", lambda i: tile, 2, attrs={"tile_size": 256})
    TileStore('cohort/slides/cells.zarr', 2 tiles of 256 px at None um/px)
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
    """The table of all tiles of a cohort. UserError where there is none, or a broken one.

    >>> store = write_store("cohort", "cells", lambda i: tile, 2, attrs={"tile_size": 256})
    >>> _ = merge_index("cohort", pd.DataFrame({"slide": "cells", "row": [0, 1]}))
    >>> list(read_index("cohort"))
    ['slide', 'row', 'x', 'y', 'patient', 'split']
    """
    path = Path(cohort) / "index.parquet"
    if not path.is_file():
        raise UserError(f"there is no table of tiles at {path}; the data_prep commands write one with the tiles.")
    try:
        index = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the table of tiles {path} is broken ({str(error).splitlines()[0]}); copy it again, or delete it and run "
            "the command that wrote it again."
        ) from None
    if lacking := [name for name in ("slide", "row", "patient", "split") if name not in index]:
        raise UserError(f"the table of tiles {path} has no column {', '.join(lacking)}; it is none of this toolkit.")
    return index


def merge_index(cohort: Path | str, table: pd.DataFrame) -> Path:
    """Bring rows of `table` (slide, row, any other columns) into the cohort's index.parquet.

    Rows that the index knows get the table's columns and keep their others; new rows are added. x and y come from the
    stores; patient and split, where nothing gives them, are `patient_of(slide)` and "train".

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
    stores = {store.slide: store for store in _stores(cohort)}
    for slide, rows in table.groupby("slide")["row"]:
        if slide not in stores:
            raise UserError(f"{cohort} has no finished store of the slide '{slide}'")
        if rows.min() < 0 or rows.max() >= len(stores[slide]):
            raise UserError(f"{stores[slide].path} has {len(stores[slide])} tiles; the table has row {rows.max()}")
    with WriterLock(cohort / ".lock-index"):
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
