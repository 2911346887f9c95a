"""Cut slices out of volumes of several modalities, or take them from folders of images.

    python -m data_prep.slice_volumes --volumes BraTS --modality t1=*_t1.nii.gz t2=*_t2.nii.gz --out cohort
    python -m data_prep.slice_volumes --images t1=slices/T1 pd=slices/PD --out cohort

writes a tile store for each subject and modality (for images: each modality) and cohort/index.parquet with the columns
`subject`, `modality`, `slice`, `patient`, `split`. What a pattern's * stands for names the subject, or its folder if
that is nothing. Volumes are turned to RAS orientation; those of one subject must share their voxel grid. An interrupted
run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from ldm.data.cohort import check_fractions, counted, merge_index, split_table, write_store
from ldm.data.datasets import IMAGE_SUFFIXES
from ldm.data.volumes import AXES, FOREGROUND, Volume, cut_slice, in_plane, to_tile, windowed
from ldm.errors import UserError, run_command, suggest
from ldm.files import sha256

PERCENTILES = (0.5, 99.5)
LEAST_FOREGROUND = 0.05


@dataclass(frozen=True)
class Settings:
    """How slices are cut.

    Attributes:
        axis: of the slices, see AXES.
        between: first slice and the one after the last; None is all.
        least_foreground: fraction of a slice that must be brighter than FOREGROUND of the window, in every modality.
        window: values that become black and white; None takes `percentiles` of each volume.
        size: side of a tile in pixels.
        patient: regular expression of what names the patient in a subject's name; None is all of it.
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
            raise UserError(f"there is no volume and no folder of volumes at {path}")
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    subjects: dict[str, dict[str, Path]] = {}
    owners: dict[Path, str] = {}
    for modality, pattern in patterns.items():
        if "/" in pattern:
            raise UserError(f"a pattern is of file names, as *_t1.nii.gz; got '{pattern}'")
        matcher = re.compile("".join("(.*)" if letter == "*" else re.escape(letter) for letter in pattern))
        found = [(file, match) for file in files if (match := matcher.fullmatch(file.name))]
        if not found:
            seen = sorted({file.name for file in files})
            raise UserError(f"no file is called '{pattern}', as modality {modality} asks for{suggest(pattern, seen)}")
        for file, match in found:
            if file in owners:
                raise UserError(f"{file} is of both {owners[file]} and {modality}; make their patterns differ")
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
        low, high = settings.window or np.percentile(values[modality], settings.percentiles).tolist()
        if not low < high:
            raise UserError(f"{volume.path} is {low:g} nearly everywhere; give a --window or wider --percentiles")
        windows[modality] = (low, high)
        body = values[modality].take(range(start, stop), axis) > low + FOREGROUND * (high - low)
        kept &= body.mean(others) >= settings.least_foreground
    slices = (np.flatnonzero(kept) + start).tolist()
    if not slices:
        raise UserError(
            f"no slice of {subject} has {settings.least_foreground:g} of foreground in every modality; ask for less by "
            "--least-foreground, or choose slices by --range"
        )
    plane = in_plane(first.spacing, axis)
    extent = max(first.shape[i] * first.spacing[i] for i in others)
    tables = []
    for modality, volume in volumes.items():
        low, high = windows[modality]

        def image(i: int, voxels: np.ndarray = values[modality], low: float = low, high: float = high) -> np.ndarray:
            return to_tile(windowed(cut_slice(voxels, axis, slices[i]), low, high), settings.size, plane)

        attrs = {
            "tile_size": settings.size, "subject": subject, "modality": modality, "slices": slices, "axis": axis,
            "spacing_mm": [extent / settings.size] * 2, "slice_spacing_mm": first.spacing[axis], "window": [low, high],
            "percentiles": None if settings.window else list(settings.percentiles), "source": volume.path.name,
            "source_sha256": sha256(volume.path), "licence": settings.licence,
        }  # fmt: skip
        name = f"{subject}_{modality}"
        write_store(out, name, image, len(slices), attrs=attrs, desc=name)
        rows = {"slide": name, "row": range(len(slices)), "subject": subject, "modality": modality, "slice": slices}
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables, ignore_index=True)


def slice_all(
    out: Path | str, paths: Sequence[str], patterns: Mapping[str, str], settings: Settings
) -> tuple[pd.DataFrame, list[str]]:
    """Slice every subject that has all modalities; rows for the index, and subjects left out, with the reason.

    Headers are read, and their grids compared, before any slice is written.
    """
    subjects = find_subjects(paths, patterns)
    names, lines = complete(subjects, list(patterns))
    patients = {name: patient_in(name, settings.patient) for name in names}
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
    try:
        with Image.open(path) as image:
            deep = image.mode.startswith(("I", "F"))
            values = np.asarray(image if deep else image.convert("L"), np.float32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {error}") from error
    if deep and window is None:
        raise UserError(f"{path} has more than 8 bits; give its black and white by --window")
    return windowed(values, *(window or (0, 255)))


def find_images(folders: Mapping[str, Path]) -> tuple[list[str], dict[str, dict[str, Path]], list[str]]:
    """Names that all folders have, modality -> name -> file, and a line for each name that some folder lacks."""
    files: dict[str, dict[str, Path]] = {}
    for modality, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"there is no folder of images at {folder}")
        files[modality] = {}
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
            if (other := files[modality].setdefault(path.stem, path)) != path:
                raise UserError(f"{other} and {path} have the same name; give one of them")
        if not files[modality]:
            raise UserError(f"no image in {folder}; known endings: {' '.join(sorted(IMAGE_SUFFIXES))}")
    owners = {name: {m: own[name] for m, own in files.items() if name in own} for own in files.values() for name in own}
    names, lines = complete(owners, list(folders))
    return names, files, lines


def slice_images(out: Path | str, folders: Mapping[str, Path], settings: Settings) -> tuple[pd.DataFrame, list[str]]:
    """Write a store `<folder>_<modality>` for each folder of images; rows for the index, and names left out.

    Images are matched by name; a pair of different sizes is a UserError.
    """
    names, files, lines = find_images(folders)
    patients = [patient_in(name, settings.patient) for name in names]
    for name in names:
        sizes = {modality: read_gray(own[name], settings.window).shape for modality, own in files.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f"the images '{name}' differ in size: {', '.join(f'{m} {s}' for m, s in sizes.items())}")
    tables = []
    for modality, folder in folders.items():
        paths = [files[modality][name] for name in names]

        def image(i: int, paths: list[Path] = paths) -> np.ndarray:
            return to_tile(read_gray(paths[i], settings.window), settings.size)

        listed = "\n".join(f"{path.name} {sha256(path)}" for path in tqdm(paths, desc="checking", leave=False))
        attrs = {
            "tile_size": settings.size, "modality": modality, "spacing_mm": None, "licence": settings.licence,
            "window": list(settings.window) if settings.window else None, "source": folder.name,
            "source_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        }  # fmt: skip
        name = f"{folder.resolve().name}_{modality}"
        write_store(out, name, image, len(paths), attrs=attrs, desc=name)
        rows = {"slide": name, "row": range(len(paths)), "subject": names, "modality": modality, "slice": 0}
        tables.append(pd.DataFrame({**rows, "patient": patients}))
    return pd.concat(tables, ignore_index=True), lines


def patient_in(subject: str, pattern: str | None) -> str:
    """The part of a subject's name that names the patient, the whole name without a pattern."""
    if pattern is None:
        return subject
    match = re.search(pattern, subject)
    if match is None or not (patient := match.group(1) if match.groups() else match.group()):
        raise UserError(f"--patient '{pattern}' finds no patient in '{subject}'")
    return patient


def pair(kind: type, text: str) -> tuple:
    """a,b as two ascending numbers."""
    values = tuple(kind(part) for part in text.split(","))
    if len(values) != 2 or not values[0] < values[1]:
        raise argparse.ArgumentTypeError(f"'{text}' is not two ascending numbers a,b")
    return values


def assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value) or not re.fullmatch(r"[\w.-]+", name):
        raise argparse.ArgumentTypeError(f"'{text}' is not modality=value, as t1=*_t1.nii.gz")
    return name, value


def axis(text: str) -> int:
    if text in AXES:
        return AXES[text]
    if text in ("0", "1", "2"):
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(AXES)}, 0, 1, 2")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.slice_volumes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--volumes", nargs="+", metavar="PATH", help="NIfTI files, or folders that are searched")
    inputs.add_argument(
        "--images", nargs="+", type=assignment, metavar="MODALITY=FOLDER", help="folders of images, matched by name"
    )
    add("--modality", nargs="+", type=assignment, metavar="MODALITY=PATTERN", help="file names of --volumes")
    add("--out", required=True, metavar="FOLDER", help="cohort folder to write")
    add("--axis", type=axis, default=AXES["axial"], help="axial (2), coronal (1), sagittal (0); default axial")
    add("--range", type=lambda text: pair(int, text), metavar="A,B", help="slices A to B-1 (default: all)")
    add(
        "--least-foreground", type=float, metavar="FRACTION",
        help=f"drop slices with less in any modality (default {LEAST_FOREGROUND:g}, with --range 0)",
    )  # fmt: skip
    add("--window", type=lambda text: pair(float, text), metavar="LO,HI", help="values of black and white")
    add(
        "--percentiles", type=lambda text: pair(float, text), metavar="LO,HI",
        help=f"of each volume, in place of --window (default {PERCENTILES[0]:g},{PERCENTILES[1]:g})",
    )  # fmt: skip
    add("--size", type=int, default=128, help="px, side of a tile (default %(default)s)")
    add("--patient", metavar="REGEX", help="what names the patient in a subject's name (default: all of it)")
    add("--validation", type=float, help="fraction of patients in split 'val' (default: 0.1 of three or more)")
    add("--test", type=float, default=0.0, help="fraction of patients in split 'test' (default %(default)s)")
    add("--licence", default="", help="of the data; recorded in the stores")
    args = parser.parse_args(argv)
    if bool(args.volumes) != bool(args.modality):
        parser.error("--modality goes with --volumes: t1=*_t1.nii.gz t2=*_t2.nii.gz")
    if args.images and (args.range or args.least_foreground is not None or args.percentiles):
        parser.error("--range, --least-foreground and --percentiles are of --volumes")
    if args.window and args.percentiles:
        parser.error("give --window or --percentiles")
    least = (0.0 if args.range else LEAST_FOREGROUND) if args.least_foreground is None else args.least_foreground
    percentiles = args.percentiles or PERCENTILES
    if args.size < 8 or not 0 <= least <= 1 or not 0 <= percentiles[0] <= percentiles[1] <= 100:
        raise UserError("--size is at least 8, --least-foreground a fraction from 0 to 1, --percentiles from 0 to 100")
    check_fractions(args.validation, args.test)
    if args.patient is not None:
        try:
            re.compile(args.patient)
        except re.error as error:
            raise UserError(f"--patient '{args.patient}' is no regular expression: {error}") from None
    settings = Settings(args.axis, args.range, least, args.window, percentiles, args.size, args.licence, args.patient)
    named = args.modality or args.images
    if len(dict(named)) < len(named):
        raise UserError("a modality is named twice")
    if args.images:
        table, left_out = slice_images(args.out, {m: Path(folder) for m, folder in named}, settings)
    else:
        table, left_out = slice_all(args.out, args.volumes, dict(named), settings)
    instead = "Or `where` in the config holds out some of the slices, as configs/demo/slices_lmi.yaml does."
    table, note = split_table(table, args.out, args.validation, args.test, instead)
    index = merge_index(args.out, table)
    print(f"{table['subject'].nunique()} subjects, slices: {counted(table['modality'])}; table of all tiles: {index}")
    print(f"splits: {counted(table['split'])}" + (f"\nnote: {note}" if note else ""))
    if left_out:
        print(f"{len(left_out)} left out:", *left_out, sep="\n  ")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
