"""Which patient a slide is of, and which split a patient is in: train, val or test."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ldm.data.tile_store import TileStore
from ldm.errors import UserError, some
from ldm.files import clear_left, write_text
from ldm.tables.text import read_text

UNKNOWN = "unknown"  # the patient of images that nothing says it of
HELD_OUT = ("test", "val")
SPLITS = "splits.json"  # in a cohort: the fractions that its splits were drawn by
VALIDATION = 0.1  # fraction of the patients in split 'val' where none is asked for


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

    >>> choose_splits(["a", "b"], None, 0.0), sorted(choose_splits("abcde", None, 0.0).values())
    ({'a': 'train', 'b': 'train'}, ['train', 'train', 'train', 'train', 'val'])
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
    told = "no tile is held out in split 'val', on which a training validates; nothing else needs it"
    if validation is None and len(known) < 3:
        return f"{told}. It takes three patients, and there {'are two' if len(known) == 2 else 'is one'}. {instead}"
    least = min((place for patient in known if (place := _place(patient)) >= test), default=1.0) - test
    return f"{told}: --validation {math.ceil(least * 100 + 1) / 100:g} would take one of the {len(known)} patients"


def fractions(cohort: Path | str | None, validation: float | None, test: float | None) -> tuple[float | None, float]:
    """The fractions of its patients that a cohort holds out: those asked for, or else those that it was split by.

    A cohort without a tile in split 'val' may still get some: `validation` is then free.

    Args:
        cohort: its folder; None where there is none yet.
        validation, test: as of `choose_splits`; None where they are not asked for.
    Raises:
        UserError: no fractions, or others than those that the cohort was split by.

    >>> fractions("cohort", None, 0.2), fractions("cohort", 0.5, 0.6)
    Traceback (most recent call last):
    ldm.errors.UserError: --validation and --test are fractions from 0 to 1 that sum to 1 at most; got 0.5 and 0.6
    """
    taken = VALIDATION if validation is None else validation
    if not (taken >= 0 and (test or 0) >= 0 and taken + (test or 0) <= 1):
        raise UserError(
            f"--validation and --test are fractions from 0 to 1 that sum to 1 at most; got {taken:g} and {test or 0:g}"
        )
    before = None if cohort is None else _recorded(cohort)
    if before is None:
        return validation, test or 0.0
    free = not before["held"]  # no tile is in split 'val' yet
    asked = {"validation": None if free else validation, "test": test}
    drawn = {"validation": VALIDATION if before["validation"] is None else before["validation"], "test": before["test"]}
    if differ := [name for name, value in asked.items() if value is not None and value != drawn[name]]:
        old = " ".join(f"--{name} {drawn[name]:g}" for name in differ)
        new = " ".join(f"--{name} {asked[name]:g}" for name in differ)
        raise UserError(
            f"the patients of {cohort} were split with {old}, and {new} is asked for now. Leave that out to keep the "
            f"splits, or delete index.parquet and {SPLITS} in it and give the command again to draw all anew; then "
            "train again whatever was trained with the old ones"
        )
    return validation if free and validation is not None else before["validation"], before["test"]


def record_fractions(cohort: Path | str, validation: float | None, test: float, splits: Iterable[str]) -> None:
    """Remember the fractions that the splits of a cohort were drawn by. splits: of its tiles.

    >>> record_fractions("cohort", 0.1, 0.2, ["train", "val"])
    >>> json.loads(Path("cohort/splits.json").read_text())
    {'validation': 0.1, 'test': 0.2, 'held': True}
    """
    told = {"validation": validation, "test": test, "held": "val" in set(splits)}
    if told != _recorded(cohort):
        Path(cohort).mkdir(parents=True, exist_ok=True)
        write_text(Path(cohort) / SPLITS, json.dumps(told) + "\n")
    clear_left(Path(cohort) / SPLITS)


def _recorded(cohort: Path | str) -> dict[str, float | None] | None:
    path = Path(cohort) / SPLITS
    if not (path.is_file() and path.with_name("index.parquet").is_file()):
        return None
    try:
        told = json.loads(read_text(path))
        drawn = None if told["validation"] is None else float(told["validation"])
        return {"validation": drawn, "test": float(told["test"]), "held": bool(told["held"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is broken; delete it, and the fractions asked for act on new patients") from None
