r"""Cut slices out of volumes of several modalities, or take them from folders of images.

Each subject and modality (of images: each modality) becomes a tile store, and index.parquet gets the columns `subject`,
`modality`, `slice`, `patient` and `split`. What a pattern's * stands for names the subject, or its folder if that is
nothing. Volumes are turned to RAS orientation; those of one subject must share their voxel grid. When a run was
interrupted, the same command goes on where it stopped.

Examples:

    python -m data_prep.slice_volumes --volumes BraTS \
        --modality t1=*_t1.nii.gz t2=*_t2.nii.gz --out cohort
    python -m data_prep.slice_volumes --images t1=slices/T1 pd=slices/PD \
        --out cohort
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from tqdm import tqdm

from data_prep.options import (
    LicenceOption,
    OutOption,
    PatientOption,
    SizeOption,
    TestOption,
    ValidationOption,
    inputs,
    number,
    taken,
)
from ldm.cli.options import Axis
from ldm.cli.script import script
from ldm.data.cohort import counted, merge_index, split_table, write_store
from ldm.data.splits import fractions
from ldm.data.volumes import (
    AXES,
    AXIS,
    FOREGROUND,
    PERCENTILES,
    Volume,
    cut_slice,
    in_plane,
    to_tile,
    window_of,
    windowed,
)
from ldm.errors import UserError, note, suggest
from ldm.files import sha256
from ldm.images.kinds import ENDINGS, images_in
from ldm.images.plain import read_gray_values
from ldm.requests.parse import ascending
from ldm.tables.patients import patients_of

SATURATED = 1.25  # a volume that goes on so far beyond its white is worth a note
LEAST_FOREGROUND = 0.05


@dataclass(frozen=True)
class Settings:
    """How slices are cut.

    Attributes:
        axis: of the slices, see AXES.
        between: first slice and the one after the last; None is all.
        least_foreground: fraction of a slice that must be brighter than FOREGROUND of the window, in every modality.
        window: values that become black and white; None takes `percentiles` of each volume's head, see `window_of`.
        size: side of a tile in pixels.
        patient: whose a subject is, see `ldm.tables.patients`; None: each is a patient.
    """

    axis: int = AXES["axial"]
    between: tuple[int, int] | None = None
    least_foreground: float = LEAST_FOREGROUND
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] = PERCENTILES
    size: int = 128
    licence: str = ""
    patient: str | None = None


def find_subjects(paths: Sequence[Path | str], patterns: Mapping[str, str]) -> dict[str, dict[str, Path]]:
    """subject -> modality -> file, of the files given and of all under the folders given.

    UserError: a path that is not there, a pattern that no file has, a file that two patterns have, two files of one
    subject and modality.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is nothing at {path}; --volumes takes NIfTI files and folders of them")
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    subjects: dict[str, dict[str, Path]] = {}
    owners: dict[Path, str] = {}
    for modality, pattern in patterns.items():
        if "/" in pattern:
            raise UserError(f"a pattern is that of a file's name, as *_t1.nii.gz, without folders; got '{pattern}'")
        matcher = re.compile("".join("(.*)" if letter == "*" else re.escape(letter) for letter in pattern))
        found = [(file, match) for file in files if (match := matcher.fullmatch(file.name))]
        if not found:
            seen = sorted({file.name for file in files})
            raise UserError(f"no file is called '{pattern}', which --modality {modality} names{suggest(pattern, seen)}")
        for file, match in found:
            if file in owners:
                raise UserError(f"{file} is both {owners[file]} and {modality}; make their patterns differ")
            owners[file] = modality
            subject = "_".join(part.strip("_-. ") for part in match.groups()).strip("_") or file.resolve().parent.name
            if (other := subjects.setdefault(subject, {}).setdefault(modality, file)) != file:
                raise UserError(f"{other} and {file} are both {modality} of '{subject}'; give one of them")
    return subjects


def complete(subjects: Mapping[str, Mapping[str, Path]], modalities: Sequence[str]) -> tuple[list[str], list[str]]:
    """Subjects that have all modalities, and for each other one a line of what it lacks. UserError if none has all."""
    lacking = {name: [m for m in modalities if m not in has] for name, has in subjects.items()}
    lines = [f"{name} (no {', '.join(without)})" for name, without in sorted(lacking.items()) if without]
    whole = sorted(name for name, without in lacking.items() if not without)
    if not whole:
        raise UserError(f"no subject has all of {', '.join(modalities)}: {'; '.join(lines)}")
    return whole, lines


def same_grid(volumes: Mapping[str, Volume]) -> Volume:
    """The first of volumes on the same voxel grid; UserError if they are not."""
    first, *others = volumes.values()
    for volume in others:
        volume.check_same_grid(first)
    return first


def tell_window(path: Path, values: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Black and white of a volume; printed, with a note where much brighter voxels become white too."""
    low, high, white, top = window_of(values, percentiles)
    tqdm.write(f"{path.name}: {low:g} is black, {high:g} white ({white:.2%} of the head)")
    if top - low > SATURATED * (high - low) > 0:
        note(
            f"{path.name} has values up to {top:g}: what is brighter than {high:g}, perhaps a lesion, is all white. "
            "--percentiles or --window take more of it."
        )
    return low, high


def slice_subject(out: Path | str, subject: str, volumes: Mapping[str, Volume], settings: Settings) -> pd.DataFrame:
    """Write the stores `<subject>_<modality>` of a cohort; their rows for its index.

    UserError: volumes on different grids, no slice left, a volume that is the same everywhere.
    """
    first = same_grid(volumes)
    axis, count = settings.axis, first.shape[settings.axis]
    start, stop = settings.between or (0, count)
    if not 0 <= start < stop <= count:
        raise UserError(f"{first.path} has slices 0..{count - 1}; the range {start},{stop} is not in them")
    values, windows = {}, {}
    kept = np.ones(stop - start, bool)
    others = tuple(i for i in range(3) if i != axis)
    for modality, volume in volumes.items():
        values[modality] = volume.values()
        low, high = settings.window or tell_window(volume.path, values[modality], settings.percentiles)
        if not low < high:
            raise UserError(f"{volume.path} is {low:g} nearly everywhere; give a --window or wider --percentiles")
        windows[modality] = (low, high)
        body = values[modality].take(range(start, stop), axis) > low + FOREGROUND * (high - low)
        kept &= body.mean(others) >= settings.least_foreground
    slices = (np.flatnonzero(kept) + start).tolist()
    if not slices:
        raise UserError(
            f"no slice of {subject} has a fraction of {settings.least_foreground:g} of foreground in every modality; "
            "ask for less by --least-foreground, or choose slices by --range"
        )
    plane = in_plane(first.spacing, axis)
    extent = max(first.shape[i] * first.spacing[i] for i in others)
    tables = []
    for modality, volume in volumes.items():
        low, high = windows[modality]

        def image(i: int, voxels: np.ndarray = values[modality], low: float = low, high: float = high) -> np.ndarray:
            return to_tile(windowed(cut_slice(voxels, axis, slices[i]), low, high), settings.size, plane)

        attrs = {
            "tile_size": settings.size,
            "subject": subject,
            "modality": modality,
            "slices": slices,
            "axis": axis,
            "spacing_mm": [extent / settings.size] * 2,
            "slice_spacing_mm": first.spacing[axis],
            "window": [low, high],
            "percentiles": None if settings.window else list(settings.percentiles),
            "source": volume.path.name,
            "source_sha256": sha256(volume.path),
            "licence": settings.licence,
        }
        name = f"{subject}_{modality}"
        write_store(out, name, image, len(slices), attrs=attrs, desc=name)
        rows = {"slide": name, "row": range(len(slices)), "subject": subject, "modality": modality, "slice": slices}
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables, ignore_index=True)


def slice_all(
    out: Path | str, paths: Sequence[Path | str], patterns: Mapping[str, str], settings: Settings
) -> tuple[pd.DataFrame, list[str]]:
    """Slice every subject that has all modalities; rows for the index, and subjects left out, with the reason.

    Headers are read, and their grids compared, before any slice is written.
    """
    subjects = find_subjects(paths, patterns)
    names, lines = complete(subjects, list(patterns))
    patients = owners(names, settings.patient)
    volumes = {name: {m: Volume(subjects[name][m]) for m in patterns} for name in names}
    for of_subject in volumes.values():
        same_grid(of_subject)
    tables = []
    for name in tqdm(names, desc="subjects", unit="subject"):
        try:
            tables.append(slice_subject(out, name, volumes[name], settings))
        except UserError as error:
            if len(names) == 1:
                raise
            lines.append(f"{name} ({error})")
    if not tables:
        raise UserError("no subject could be sliced:" + "".join(f"\n  {line}" for line in lines))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(patient=table["subject"].map(patients)), lines


def read_gray(path: Path, window: tuple[float, float] | None) -> np.ndarray:
    """A gray image (H,W) in [0, 1]; UserError if it cannot be read, or has more than 8 bits and no window is given."""
    values = read_gray_values(path)
    if values.dtype != np.uint8 and window is None:
        raise UserError(f"{path} has more than 8 bits; say which values are black and white by --window")
    return windowed(values, *(window or (0, 255)))


def find_images(folders: Mapping[str, Path]) -> tuple[list[str], dict[str, dict[str, Path]], list[str]]:
    """Names that all folders have, modality -> name -> file, and a line for each name that some folder lacks."""
    files: dict[str, dict[str, Path]] = {}
    for modality, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"there is no folder of images at {folder}; --images takes folders, as t1=slices/T1")
        files[modality] = {}
        for path in images_in(folder):
            if (other := files[modality].setdefault(path.stem, path)) != path:
                raise UserError(f"{other} and {path} have the same name; give one of them")
        if not files[modality]:
            raise UserError(f"no image in {folder}; images end in {ENDINGS}")
    owners = {name: {m: own[name] for m, own in files.items() if name in own} for own in files.values() for name in own}
    names, lines = complete(owners, list(folders))
    return names, files, lines


def slice_images(out: Path | str, folders: Mapping[str, Path], settings: Settings) -> tuple[pd.DataFrame, list[str]]:
    """Write a store `<folder>_<modality>` for each folder of images; rows for the index, and names left out.

    Images are matched by name; a pair of different sizes is a UserError.
    """
    names, files, lines = find_images(folders)
    patients = list(owners(names, settings.patient).values())
    for name in names:
        sizes = {modality: read_gray(own[name], settings.window).shape for modality, own in files.items()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{modality} {width} x {height}" for modality, (height, width) in sizes.items())
            raise UserError(f"the images '{name}' differ in size: {told} px; resample them to one")
    tables = []
    for modality, folder in folders.items():
        paths = [files[modality][name] for name in names]

        def image(i: int, paths: list[Path] = paths) -> np.ndarray:
            return to_tile(read_gray(paths[i], settings.window), settings.size)

        listed = "\n".join(f"{path.name} {sha256(path)}" for path in tqdm(paths, desc="checking", leave=False))
        attrs = {
            "tile_size": settings.size,
            "modality": modality,
            "spacing_mm": None,
            "licence": settings.licence,
            "window": list(settings.window) if settings.window else None,
            "source": folder.name,
            "source_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        }
        name = f"{folder.resolve().name}_{modality}"
        write_store(out, name, image, len(paths), attrs=attrs, desc=name)
        rows = {"slide": name, "row": range(len(paths)), "subject": names, "modality": modality, "slice": 0}
        tables.append(pd.DataFrame({**rows, "patient": patients}))
    return pd.concat(tables, ignore_index=True), lines


def owners(subjects: Sequence[str], rule: str | None) -> dict[str, str]:
    """The patient of each subject: the subject itself where no rule says it."""
    return {name: name for name in subjects} if rule is None else patients_of(subjects, rule)


def assignments(texts: Sequence[str], option: str, form: str) -> dict[str, str]:
    """modality -> value of texts modality=value."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not value or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{option} takes {form}; got '{text}'")
        if name in pairs:
            raise UserError(f"{option} names the modality '{name}' twice; name it once")
        pairs[name] = value
    return pairs


@script("data_prep.slice_volumes", __doc__)
def main(
    *,
    volumes: Annotated[
        list[Path] | None,
        inputs("--volumes", help="NIfTI files, or folders searched with all folders in them: one or several."),
    ] = None,
    modality: Annotated[
        list[str] | None,
        inputs(
            "--modality", help="Modality and the names of its files of --volumes, as t1=*_t1.nii.gz: one or several."
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        inputs("--images", help="Modality and its folder of images, as t1=slices/T1: one or several, matched by name."),
    ] = None,
    patient: PatientOption = None,
    out: OutOption,
    licence: LicenceOption = "",
    axis: Annotated[Axis, taken("--axis", help="Axis along which the slices follow one another.")] = Axis.axial,
    between: Annotated[
        str | None, taken("--range", help="Slices first,end of each volume, without the one at end (default: all).")
    ] = None,
    least_foreground: Annotated[
        float | None,
        taken(
            "--least-foreground",
            help="Least fraction of foreground in a slice, in every modality (default: "
            f"{LEAST_FOREGROUND:g}, with --range 0).",
        ),
    ] = None,
    window: Annotated[str | None, taken("--window", help="Values low,high that become black and white.")] = None,
    percentiles: Annotated[
        str | None,
        taken(
            "--percentiles",
            help="Percentiles low,high of each volume's head that become black and white, without --window (default: "
            f"{PERCENTILES[0]:g},{PERCENTILES[1]:g}).",
        ),
    ] = None,
    size: SizeOption = 128,
    validation: ValidationOption = None,
    test: TestOption = None,
) -> None:
    if bool(volumes) == bool(images):
        raise UserError("give either --volumes with --modality, or --images")
    if bool(volumes) != bool(modality):
        raise UserError("--volumes and --modality go together, as --modality t1=*_t1.nii.gz t2=*_t2.nii.gz")
    if images and (between or least_foreground is not None or percentiles):
        raise UserError("--range, --least-foreground and --percentiles are of --volumes; leave them out with --images")
    if window and percentiles:
        raise UserError("--window and --percentiles both say what becomes black and white; give one of them")
    least = (0.0 if between else LEAST_FOREGROUND) if least_foreground is None else least_foreground
    low, high = ascending(float, percentiles, "--percentiles") or PERCENTILES
    if not 0 <= least <= 1:
        raise UserError(f"--least-foreground is a fraction from 0 to 1; got {least:g}")
    if not 0 <= low <= high <= 100:
        raise UserError(f"--percentiles lie from 0 to 100; got {low:g},{high:g}")
    validation, test = fractions(out, validation, test)
    settings = Settings(
        AXIS[axis],
        ascending(int, between, "--range"),
        least,
        ascending(float, window, "--window"),
        (low, high),
        size,
        licence,
        patient,
    )
    if images:
        folders = assignments(images, "--images", "modality=folder, as t1=slices/T1")
        table, left_out = slice_images(out, {name: Path(folder) for name, folder in folders.items()}, settings)
    else:
        patterns = assignments(modality, "--modality", "modality=pattern, as t1=*_t1.nii.gz")
        table, left_out = slice_all(out, volumes, patterns, settings)
    instead = "Or `where` in the config holds out some of the slices, as configs/demo/slices_lmi.yaml does."
    table, note = split_table(table, out, validation, test, instead)
    index = merge_index(out, table, (validation, test))
    subjects = number(table["subject"].nunique(), "subject")
    print(f"{subjects}, slices: {counted(table['modality'])}; table of all tiles: {index}")
    print(f"splits: {counted(table['split'])}" + (f"\nnote: {note}" if note else ""))
    if left_out:
        print(f"{len(left_out)} left out:", *left_out, sep="\n  ")


if __name__ == "__main__":
    main.run()
