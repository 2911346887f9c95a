"""Which patient a slide is of, and which split a patient is in: train, val or test."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ldm.data.tile_store import TileStore
from ldm.errors import UserError, some

UNKNOWN = "unknown"  # the patient of images that nothing says it of
HELD_OUT = ("test", "val")
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
