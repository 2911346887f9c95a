"""The table of all tiles of a cohort, brought up to date with its stores: one row per tile, with patient and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.slide_table import SlideEntry
from ldm.data.cohort import counted, finished_stores, index_lock, read_index
from ldm.data.splits import (
    SPLITS,
    choose_splits,
    fractions,
    owner_of,
    record_fractions,
    split_of,
    tell_validation,
    together,
)
from ldm.data.tile_store import TileStore
from ldm.errors import UserError, note
from ldm.files import whole
from ldm.tables.patients import patients_of, perhaps_shared


def held_out(coords: np.ndarray, side: float, box: Sequence[float]) -> np.ndarray:
    """Split (N,) of tiles by a held-out box (x, y, width, height): val within it, none across its border, else train.

    coords (N,2) and side are in level-0 pixels. No pixel of a val tile is in a train tile.
    """
    low, high = np.asarray(box[:2]), np.asarray(box[:2]) + np.asarray(box[2:])
    inside = ((coords >= low) & (coords + side <= high)).all(1)
    touching = ((coords < high) & (coords + side > low)).all(1)
    return np.select([inside, touching], ["val", "none"], "train")


def update_index(
    cohort: Path | str,
    validation: float | None = None,
    test: float | None = None,
    holdout: Mapping[str, Sequence[float]] | None = None,
    patient: str | None = None,
    entries: Sequence[SlideEntry] = (),
) -> Path:
    """Bring `cohort`/index.parquet up to date with its finished stores: slide, row, x, y, labels, patient, split.

    Rows of slides that the index knows already stay as they are, with whatever columns and splits a user gave them. But
    a cohort without a validation split gets one of its training tiles where a fraction for it is asked for; and where
    a patient, given anew or corrected in the index, has slides in several splits, they come together and it is told.
    What a table of slides says holds, and what it changes is told.

    Args:
        patient: whose the slides are, see `ldm.tables.patients`; None: whom the index names, else `owner_of`.
        validation, test: fractions of the patients, see `ldm.data.splits.fractions`.
        holdout: slide file name -> box (x, y, width, height) in level-0 pixels, see `held_out`.
        entries: slides of a table, with patients, splits and labels.
    Raises:
        UserError: a held-out box without tiles, or of a slide that the index knows with other splits; fractions other
            than those that the cohort was split by.
    """
    holdout = holdout or {}
    cohort = Path(cohort)
    path = cohort / "index.parquet"
    legacy = path.exists() and not (cohort / SPLITS).exists()
    asked, (validation, test) = (validation, test), fractions(cohort, validation, test)
    said = {entry.name: entry for entry in entries}
    with index_lock(cohort):
        old = read_index(cohort) if path.exists() else pd.DataFrame({"slide": [], "patient": [], "split": []})
        stores = finished_stores(cohort)
        owners = _owners(stores, old, patient) | {name: each.patient for name, each in said.items() if each.patient}
        old = old.assign(patient=old["slide"].map(owners).fillna(old["patient"]))
        if legacy:
            _tell_kept(path, old, *asked)
        late = bool(validation) and "val" not in set(old["split"])
        patients = [owners[store.slide] for store in stores if store.slide not in holdout]
        by_patient = choose_splits(patients, validation, test, old[old["split"] != "train"] if late else old)
        by_patient |= {owners[name]: each.split for name, each in said.items() if each.split and name in owners}
        rows_of = old.groupby("slide", sort=False).indices
        tables: list[pd.DataFrame] = []
        same: list[np.ndarray] = []  # rows of `old` that stay as they are and follow each other

        def take_same() -> None:
            if same:
                tables.append(old.take(np.concatenate(same)))
                same.clear()

        for store in stores:
            rows, entry = rows_of.get(store.slide, np.zeros(0, int)), said.get(store.slide)
            changes = late or store.slide in holdout or (entry is not None and (entry.labels or entry.split))
            if len(rows) == len(store) and not changes:
                same.append(rows)
                continue
            take_same()
            known = old.take(rows)
            split: str | np.ndarray = by_patient.get(owners[store.slide], "train")
            if box := holdout.get(store.slide):
                split = _box_split(store, box, known, path)
            if len(known) == len(store):
                if late and not box:
                    known = known.assign(split=known["split"].where(known["split"] != "train", split))
            else:
                known = _rows_of(store, owners[store.slide], split)
            if entry:
                known = known.assign(**entry.labels, **({"split": entry.split} if entry.split else {}))
            tables.append(known)
        take_same()
        if tables:
            table = pd.concat(tables, ignore_index=True)
            _tell_moved(old, table)
            table, moved = together(table)
            with whole(path) as part:
                table.to_parquet(part, index=False)
            if moved:
                note(moved)
            record_fractions(cohort, validation, test, table["split"])
    return path


def _owners(stores: Sequence[TileStore], old: pd.DataFrame, patient: str | None) -> dict[str, str]:
    """Slide -> patient: by the rule where one is given, else as the index has it, else as the slide says."""
    if patient is not None:
        return patients_of([store.slide for store in stores], patient)
    owners = {store.slide: owner_of(store) for store in stores} | dict(zip(old["slide"], old["patient"]))
    if alike := perhaps_shared(owners):
        note(
            f"{' and '.join(alike)} begin alike and count as patients of their own, who may come into different "
            "splits. If they are of one, say how by --patient, as --patient '^[^-_]+'."
        )
    return owners


def _box_split(store: TileStore, box: Sequence[float], known: pd.DataFrame, path: Path) -> np.ndarray:
    split = held_out(store.coords, store.tile_size * store.downsample, box)
    if "val" not in split:
        raise UserError(
            f"no tile of {store.slide} lies within the held-out box {','.join(map(str, box))}, which is "
            "x,y,width,height in level-0 pixels; give a larger one"
        )
    if len(known) == len(store) and not np.array_equal(known.sort_values("row")["split"], split):
        raise UserError(
            f"{path} gives the tiles of {store.slide} other splits than this held-out box; delete it to "
            "make them anew, and train again whatever was trained with the old ones"
        )
    return split


def _rows_of(store: TileStore, patient: str, split: str | np.ndarray) -> pd.DataFrame:
    store = TileStore(store.path, store.attrs)  # whose arrays are let go of
    x, y = store.coords.T
    columns = {"slide": store.slide, "row": np.arange(len(store)), "x": x, "y": y}
    labels = {name: store.labels(name) for name in store.label_names}
    return pd.DataFrame(columns | labels | {"patient": patient, "split": split})


def _tell_moved(old: pd.DataFrame, table: pd.DataFrame) -> None:
    """Say which slides came into another split, as a table of slides has it."""
    if "val" not in set(old["split"]):
        return
    before, after = (each.drop_duplicates("slide").set_index("slide")["split"] for each in (old, table))
    both = before.to_frame("old").join(after.rename("new"), how="inner")
    if len(changed := both[both["old"] != both["new"]]):
        first = f"{changed.index[0]} ({changed['old'].iloc[0]} -> {changed['new'].iloc[0]})"
        note(f"{len(changed)} slides are in another split now, as {first}; train again what was trained with the old")


def _tell_kept(path: Path, old: pd.DataFrame, validation: float | None, test: float | None) -> None:
    """Say where fractions that are asked for are not those of the splits that an index of before has and keeps."""
    if validation is None and not test:
        return
    known = old[["patient", "split"]].drop_duplicates().query("split in ('train', 'val', 'test')")
    wanted = (split_of(patient, validation or 0.0, test or 0.0) for patient in known["patient"])
    other = sum(split != want for split, want in zip(known["split"], wanted))
    if other and "val" in set(known["split"]):
        note(
            f"{path} keeps the splits of its patients, {other} of whom the fractions asked for would put into another: "
            "these act on new patients. Delete it and run this again to draw all anew."
        )


def tell_splits(path: Path, validation: float | None, test: float, instead: str) -> str:
    """How many tiles of an index are in which split, and what there is to tell of them, see `tell_validation`."""
    index = read_index(path.parent)
    note = tell_validation(index["patient"], index["split"], validation, test, instead)
    return f"splits: {counted(index['split'])}" + (f"\nnote: {note}" if note else "")
