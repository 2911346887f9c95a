"""Labelled images for training a scorer: folders of classes, a table, a rating table, a cohort; split by patient."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldm.data.collection import Pictures, list_of, pictures_of_files, read_pictures
from ldm.data.tile_store import holds_stores
from ldm.data.where import Where
from ldm.errors import UserError, some, suggest
from ldm.foreign.paths import named_in
from ldm.images.kinds import is_there
from ldm.scorers.calibration import KINDS
from ldm.tables.patients import patients_of
from ldm.tables.text import read_table

GRADES = 5  # bins of grades of which there are many
PATIENTS = ("patient", "group", "case", "slide")  # columns that say whose an image is, the surest first
LABELS = ("label", "rating", "class")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Task:
    """What a scorer says.

    kind: `binary` (probability of classes[1]), `graded` (a number from low to high), `classes` (a probability of each).
    of: the column, or what else the labels are called.
    """

    kind: str
    of: str
    classes: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"the kind of a scorer is one of {', '.join(KINDS)}; got '{self.kind}'.")

    @property
    def outputs(self) -> int:
        return len(self.classes) if self.kind == "classes" else 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"classes": list(self.classes)}


@dataclass(frozen=True)
class Labelled:
    """N images with what they are.

    Attributes:
        pictures: the images. task: what is told of them.
        targets: (N,) float: 0 or 1; a grade scaled to [0,1]; the number of a class.
        groups: (N,) of text: whose they are; images of one group are never on both sides of a split.
        notes: what the user should know of them.
    """

    pictures: Pictures
    task: Task
    targets: np.ndarray
    groups: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def strata(self) -> np.ndarray:
        """(N,) int: the class, or the bin of the grade, of each."""
        if self.task.kind != "graded":
            return self.targets.astype(int)
        values, member = np.unique(self.targets, return_inverse=True)
        return member if len(values) <= 2 * GRADES else np.minimum((self.targets * GRADES).astype(int), GRADES - 1)

    def take(self, rows: Sequence[int]) -> Labelled:
        rows = np.asarray(rows, int)
        return replace(self, pictures=self.pictures.take(rows), targets=self.targets[rows], groups=self.groups[rows])

    def counts(self) -> dict[str, int]:
        """How many images there are of each class or grade, by name."""
        if self.task.kind == "graded":
            values = self.task.low + self.targets * (self.task.high - self.task.low)
            return {f"{value:g}": count for value, count in sorted(Counter(values.round(6).tolist()).items())[:50]}
        return {name: int((self.targets == k).sum()) for k, name in enumerate(self.task.classes)}


def read_labelled(
    path: Path | str,
    label: str | None = None,
    kind: str | None = None,
    positive: str | None = None,
    patient: str | None = None,
    where: Where = None,
    task: Task | None = None,
) -> Labelled:
    """Labelled images.

    Args:
        path: a folder with a subfolder for each class; a CSV or TSV (path, label and maybe patient; paths are relative
            to it) or a rating table; an output of `histoldm sample`; a tile store or cohort.
        label: column that holds the label; default: `label`, `rating` or `class`.
        kind: binary, graded or classes; by default what the labels look like: two names, numbers, several names.
        positive: the class that a binary scorer gives the probability of; not asked for where the labels are 0 and 1.
        patient: column that says whose an image is; default: `patient`, `group`, `case` or `slide`, if there is one.
        where: keeps images of which the table says so, see `ldm.data.where`.
        task: the labels are to fit that task, of other images.
    Raises:
        UserError: one class only, labels missing or of no use, images that are not there.

    >>> read_labelled(cells, positive="Atypical").counts()
    {'Normal': 24, 'Atypical': 24}
    """
    path = Path(path)
    if path.is_dir() and list_of(path) is None and not holds_stores(path):
        pictures = _of_subfolders(path)
        label = label or "class"
    elif path.suffix.lower() in (".csv", ".tsv"):
        pictures = _of_table(path)
    else:
        pictures = read_pictures(path)
    pictures = pictures.chosen(where)
    columns = set(pictures.about[0])
    if label is None:
        label = next((name for name in LABELS if name in columns), None)
        if label is None:
            raise UserError(f"which column of {path} is the label? Give --label{suggest('label', columns)}")
    values = pictures.column(label)
    task = task or _task_of(values, label, kind, positive, path)
    groups, notes = groups_of(pictures, patient)
    return Labelled(pictures, task, targets_of(values, task, pictures), groups, notes)


def _of_subfolders(path: Path) -> Pictures:
    pictures = read_pictures(path)
    flat = [own["file"] for own in pictures.about if "/" not in own["file"]]
    if flat:
        raise UserError(
            f"{path} holds images outside the subfolders of classes ({some(flat, 3)}); put each class into a "
            "subfolder, or give a CSV with path and label."
        )
    about = [own | {"class": own["file"].split("/")[0]} for own in pictures.about]
    return pictures.told(about)


def _of_table(path: Path) -> Pictures:
    table = read_table(path, numbers=True)
    column = next((name for name in ("path", "file", "filename", "image") if name in table), None)
    if column is None:
        raise UserError(f"{path} has no column of image files{suggest('path', ['path', 'file', 'filename', 'image'])}")
    files = named_in(path, table[column])
    if missing := [str(file) for file in files if not is_there(file)]:
        raise UserError(f"{path} names {len(missing)} images that are not there: {some(missing, 5)}.")
    if twice := sorted(name for name, count in Counter(map(str, files)).items() if count > 1):
        raise UserError(f"{path} lists {len(twice)} images twice: {some(twice, 5)}.")
    about = table.drop(columns=column).to_dict("records")
    about = [{"file": str(name)} | own for name, own in zip(table[column], about)]
    return pictures_of_files(files, about, str(path))


def _task_of(values: Sequence[Any], label: str, kind: str | None, positive: str | None, path: Path | str) -> Task:
    """The task that labels set. UserError: they are all the same, or not of the `kind` that is asked for."""
    known = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if len(known) < 2:
        raise UserError(f"all {len(values)} images of {path} have the {label} {known[0]}; a scorer learns from two.")
    numbers = not any(isinstance(value, str) for value in known)
    kind = kind or ("graded" if numbers and set(known) != {0, 1} else "binary" if len(known) == 2 else "classes")
    if kind == "graded":
        if not numbers:
            listed = some([str(value) for value in known], 5)
            raise UserError(f"the {label} of {path} is not a number ({listed}); give --kind classes.")
        return Task(kind, label, (), float(known[0]), float(known[-1]))
    names = [f"{value:g}" if isinstance(value, (int, float)) else str(value) for value in known]
    if kind == "binary":
        positive = positive or ("1" if set(names) == {"0", "1"} else "")
        if positive not in names:
            raise UserError(f"which {label} of {path} is the positive one? Give --positive{suggest(positive, names)}")
        rest = [name for name in names if name != positive]
        return Task(kind, label, (rest[0] if len(rest) == 1 else f"not {positive}", positive))
    if len(names) > len(values) // 4:
        raise UserError(f"{path} has {len(names)} values of {label} on {len(values)} images; is it another column?")
    return Task(kind, label, tuple(names))


def targets_of(values: Sequence[Any], task: Task, pictures: Pictures) -> np.ndarray:
    """(N,) float targets of a task, see `Labelled`. UserError names the images whose labels are none of it.

    >>> targets_of(["Normal", "Atypical"], labelled.task, labelled.pictures)
    array([0., 1.])
    """
    if task.kind == "graded":
        numbers = pd.to_numeric(pd.Series(list(values)), errors="coerce").to_numpy(float)
        wrong = ~((numbers >= task.low - 1e-9) & (numbers <= task.high + 1e-9))
        targets = (numbers - task.low) / (task.high - task.low)
    else:
        names = [f"{value:g}" if isinstance(value, (int, float)) else str(value) for value in values]
        rest = task.kind == "binary" and task.classes[0] == f"not {task.classes[1]}"
        place = {name: k for k, name in enumerate(task.classes)}
        targets = np.array([place.get(name, 0 if rest else np.nan) for name in names], float)
        wrong = np.isnan(targets)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        allowed = f"{task.low:g} to {task.high:g}" if task.kind == "graded" else ", ".join(task.classes)
        raise UserError(
            f"{wrong.sum()} images of {pictures.source} have a {task.of} that is none of {allowed}; the first is "
            f"{pictures.name(first)}: {values[first]}."
        )
    return targets


def groups_of(pictures: Pictures, patient: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) names of groups, and a note where images are split one by one.

    patient: a column, or a rule for the images' names, see `ldm.tables.patients`; None: a column of PATIENTS.

    >>> groups, notes = groups_of(labelled.pictures, None)
    >>> groups[0], notes
    ('Atypical/1007.png', ('nothing says whose the images are: they are split one by one',))
    """
    known = {name for own in pictures.about for name in own}
    column = patient or next((name for name in PATIENTS if name in pictures.about[0]), None)
    alone = np.array([pictures.name(i) for i in range(len(pictures))], dtype=object)
    if patient is not None and patient not in known:
        owners = patients_of(alone, patient, known)
        pictures = pictures.told([{**own, patient: owners[name]} for own, name in zip(pictures.about, alone)])
    if column is None:
        return alone, ("nothing says whose the images are: they are split one by one",)
    groups = np.array([str(value) for value in pictures.column(column)], dtype=object)
    if patient is None and len(set(groups)) == 1:
        return alone, (f"all images have the {column} '{groups[0]}': they are split one by one",)
    if patient is not None and UNKNOWN not in groups and len(set(groups)) < 2:
        raise UserError(f"all images have the {patient} '{groups[0]}'; they cannot be split by it.")
    return np.where(groups == UNKNOWN, alone, groups), ()


def split_groups(strata: np.ndarray, groups: np.ndarray, parts: Sequence[float], seed: int = 0) -> np.ndarray:
    """(N,) int: the part that each image is in. Whole groups (N,), about `parts` (fractions that sum to 1) of each
    stratum (N,).

    Groups in an order that a hash of the seed gives, the large ones first, go where they are missed most.

    >>> groups = np.array(["P1", "P1", "P2", "P2", "P3", "P3", "P4", "P4"])
    >>> split_groups(np.array([0, 1] * 4), groups, (0.75, 0.25))
    array([0, 0, 0, 0, 0, 0, 1, 1])
    """
    names, member = np.unique(groups, return_inverse=True)
    kinds, stratum = np.unique(strata, return_inverse=True)
    table = np.zeros((len(names), len(kinds)))
    np.add.at(table, (member, stratum), 1)
    share = np.asarray(parts, float)[:, None] * table.sum(0)[None]  # wanted of each stratum in each part
    place = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names]
    scale = 1 / np.maximum(table.sum(0), 1)
    have, at = np.zeros_like(share), np.zeros(len(names), int)
    spread = (table * scale).sum(1).round(3)
    for g in sorted(range(len(names)), key=lambda g: (-spread[g], place[g])):
        # how far all parts are from their share when the group goes to each
        before, after = ((have - share) * scale) ** 2, ((have + table[g] - share) * scale) ** 2
        gain = ((after - before) / np.maximum(share * scale, 1e-9)).sum(1)
        gain[np.asarray(parts) == 0] = np.inf
        at[g] = int(gain.argmin())
        have[at[g]] += table[g]
    return at[member]


def check_splits(data: Labelled, part: np.ndarray, count: int, what: str) -> None:
    """UserError unless every part 0..count-1 holds at least two classes (or different grades).

    >>> check_splits(labelled, np.where(labelled.targets == 1, 0, 1), 2, "a training and a test part")
    Traceback (most recent call last):
        ...
    ldm.errors.UserError: the 48 images of ... in 48 groups cannot be split into a training and a test part that ...
    """
    for k in range(count):
        held = np.unique(data.targets[part == k])
        if len(held) < 2:
            groups = len(set(data.groups))
            raise UserError(
                f"the {len(data)} images of {data.pictures.source} in {groups} groups cannot be split into {what} that "
                "hold two classes each; label more images, or ask for fewer --members or a smaller --test."
            )
