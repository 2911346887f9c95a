"""The table of all tiles of a cohort, brought up to date with its stores: one row per tile, with patient and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.data.cohort import counted, read_index
from ldm.data.shards import WriterLock
from ldm.data.splits import choose_splits, owner_of, split_of, tell_validation, together
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
    test: float = 0.0,
    holdout: Mapping[str, Sequence[float]] | None = None,
    patient: str | None = None,
) -> Path:
    """Bring `cohort`/index.parquet up to date with its finished stores: slide, row, x, y, tissue, patient, split.

    Rows of slides that the index knows already stay as they are, with whatever columns and splits a user gave them. But
    a cohort without a validation split gets one of its training tiles where a fraction for it is asked for; and where
    a patient, given anew or corrected in the index, has slides in several splits, they come together and it is told.

    Args:
        patient: whose the slides are, see `ldm.tables.patients`; None: whom the index names, else `owner_of`.
        validation, test: fractions of the patients, see `ldm.data.cohort.choose_splits`.
        holdout: slide file name -> box (x, y, width, height) in level-0 pixels, see `held_out`.
    Raises:
        UserError: a held-out box without tiles, or of a slide that the index knows with other splits.
    """
    holdout = holdout or {}
    cohort = Path(cohort)
    path = cohort / "index.parquet"
    with WriterLock(cohort / ".lock-index"):
        old = read_index(cohort) if path.exists() else pd.DataFrame({"slide": [], "patient": [], "split": []})
        found = [TileStore.open(p, allow_incomplete=True) for p in sorted((cohort / "slides").glob("*.zarr"))]
        stores = [store for store in found if store.attrs["complete"]]
        owners = {store.slide: owner_of(store) for store in stores}
        owners |= dict(zip(old["slide"], old["patient"]))
        if patient is not None:
            owners = patients_of([store.slide for store in stores], patient)
            old = old.assign(patient=old["slide"].map(owners).fillna(old["patient"]))
        elif alike := perhaps_shared(owners):
            note(
                f"{' and '.join(alike)} begin alike and count as patients of their own, who may come into different "
                "splits. If they are of one, say how by --patient, as --patient '^[^-_]+'."
            )
        patients = [owners[store.slide] for store in stores if store.slide not in holdout]
        _tell_kept(path, old, validation, test)
        late = bool(validation) and "val" not in set(old["split"])
        by_patient = choose_splits(patients, validation, test, old[old["split"] != "train"] if late else old)
        tables = []
        for store in stores:
            known = old[old["slide"] == store.slide]
            split: str | np.ndarray = by_patient.get(owners[store.slide], "train")
            if box := holdout.get(store.slide):
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
            if len(known) == len(store):
                moved = known["split"].where(known["split"] != "train", split)
                tables.append(known.assign(split=moved) if late and not box else known)
                continue
            x, y = store.coords.T
            columns = {"slide": store.slide, "row": np.arange(len(store)), "x": x, "y": y}
            labels = {name: store.labels(name) for name in store.label_names}
            owner = {"patient": owners[store.slide], "split": split}
            tables.append(pd.DataFrame(columns | labels | owner))
        if tables:
            table, moved = together(pd.concat(tables, ignore_index=True))
            with whole(path) as part:
                table.to_parquet(part, index=False)
            if moved:
                note(moved)
    return path


def _tell_kept(path: Path, old: pd.DataFrame, validation: float | None, test: float) -> None:
    """Say where fractions that are asked for are not those of the splits that an index has and keeps."""
    if validation is None and not test:
        return
    known = old[["patient", "split"]].drop_duplicates().query("split in ('train', 'val', 'test')")
    other = sum(split != split_of(patient, validation or 0.0, test) for patient, split in known.itertuples(index=False))
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
