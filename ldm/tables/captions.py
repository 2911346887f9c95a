"""Caption tables: which image a caption is of, and of what modality.

Two forms are read, and told apart by their content:

    CSV         any columns under a header, captions quoted where they hold commas; also with ; or tabs between
    unquoted    `path, Text` or `path, Text, modality`: commas inside captions are not quoted, so the path is what
                stands before the first comma, the modality what stands after the last

Rows that cannot be used are collected, each with its line and the reason.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from ldm.errors import UserError, suggest
from ldm.foreign.paths import stray
from ldm.images.kinds import is_there
from ldm.images.pictures import Picture
from ldm.tables.patients import patients_of
from ldm.tables.text import Record, cells_of, is_missing, read_text, records

# names by which columns are found, in any case
KNOWN = {
    "path": ("path", "image_path", "image", "filename", "file_name", "file"),
    "text": ("text", "caption", "report", "description", "prompt"),
    "modality": ("modality", "modal"),
}
RESIZES = ("shorter", "pad")


@dataclass(frozen=True)
class Caption:
    """A row of a table. line: where it stands; image: its file; path: as the table names it; modality, patient: ""
    where the table has none."""

    line: int
    image: Path
    path: str
    text: str
    modality: str = ""
    patient: str = ""


@dataclass
class CaptionTable:
    """What a caption table holds. form: how it was read, in words; problems: (line, reason) of rows that are no use."""

    path: Path
    form: str
    captions: list[Caption] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)

    @property
    def has_modality(self) -> bool:
        return any(caption.modality for caption in self.captions)


def read_captions(
    path: Path | str,
    images: Path | str | None = None,
    path_column: str | None = None,
    text_column: str | None = None,
    modality_column: str | None = None,
    patient: str | None = None,
    of_files: bool = True,
) -> CaptionTable:
    """Read a caption table and check its rows: fields, captions, duplicates, images that are not there.

    Args:
        of_files: paths are those of files, which must be there; else names of something else, such as slides.
        images: folder that relative image paths start from, and in which the images lie unless
            `ldm.foreign.paths.files_in` says where else; None is the table's own.
        path_column, text_column, modality_column: names of columns, in any case; by default those of KNOWN are found.
        patient: whose an image is: the name of a column, or a rule for its path, see `ldm.tables.patients`.
    Raises:
        UserError: no such file, no text, no such columns, no rows.

    >>> _ = Path("captions.csv").write_text("path,text\\na.png,Clear lungs\\nb.png,\\n")
    >>> table = read_captions("captions.csv", of_files=False)
    >>> [caption.text for caption in table.captions], table.problems
    (['Clear lungs'], [(3, 'the caption of b.png is empty')])
    """
    path = Path(path)
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    if not lines[0].strip():
        raise UserError(f"{path} is empty or begins with an empty line; the first line names its columns")
    delimiter = "\t" if "\t" in lines[0] else max(",;", key=lines[0].count)
    header = [name.strip() for name in cells_of(lines[0], delimiter)]
    given = {"path": path_column, "text": text_column, "modality": modality_column}
    given |= {"patient": patient} if (patient or "").strip().lower() in map(str.lower, header) else {"patient": None}
    places = {kind: _place(path, header, kind, name) for kind, name in given.items()}
    rows = _whole(lines, delimiter, len(header))
    plain = list(places.values())[: len(header)] == list(range(len(header))) and 2 <= len(header) <= 3
    if rows is None and delimiter == "," and plain:
        last = ", the modality last" if len(header) > 2 else ""
        table = CaptionTable(path, f"unquoted captions with commas: the path first{last}")
        found = _unquoted(table, lines, len(header))
    else:
        named = ", ".join(f"{kind} in '{header[place]}'" for kind, place in places.items() if place is not None)
        kind = "tab-separated" if delimiter == "\t" else "CSV"
        table = CaptionTable(path, f"{kind} with {len(header)} columns: {named}")
        found = iter(rows) if rows is not None else _counted(table, lines, delimiter, len(header))
    _collect(table, found, places, Path(images) if images else path.parent, of_files)
    if not (table.captions or table.problems):
        raise UserError(f"{path} has a header and no rows")
    if patient is not None and places["patient"] is None:
        owners = patients_of([caption.path for caption in table.captions], patient, header)
        table.captions = [replace(caption, patient=owners[caption.path]) for caption in table.captions]
    return table


def _place(path: Path, header: Sequence[str], kind: str, given: str | None) -> int | None:
    """The place of a column; None where an optional one is not there."""
    lower = [name.lower() for name in header]
    if given is not None:
        if given.strip().lower() not in lower:
            raise UserError(f"{path} has no column '{given}'{suggest(given, header)}")
        return lower.index(given.strip().lower())
    for name in KNOWN.get(kind, ()):
        if name in lower:
            return lower.index(name)
    if kind in ("path", "text"):
        raise UserError(
            f"{path} has no column that is known to hold the {'image path' if kind == 'path' else 'caption'}: it has "
            f"{', '.join(header)}. Name it with --{kind}-column"
        )
    return None


def _whole(lines: Sequence[str], delimiter: str, count: int) -> list[Record] | None:
    """All rows under the header if each has `count` cells, read without quotes or with them; else None."""
    for quoted in (False, True):
        try:
            rows = list(records(_ended(lines), delimiter, quoted))[1:]
        except csv.Error:
            continue
        if all(len(row.cells) == count for row in rows):
            return rows
    return None


def _unquoted(table: CaptionTable, lines: Sequence[str], count: int) -> Iterator[Record]:
    """Lines that are path, caption, perhaps modality; a line that is proper CSV is read as such."""
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            cells = next(records([line], ",", True)).cells
        except csv.Error:
            cells = []
        if len(cells) == count:
            yield Record(number, cells)
            continue
        parts = line.split(",")
        if len(parts) < count:
            table.problems.append((number, f"{_fields(len(parts))}, expected {count}"))
            continue
        last = len(parts) - (count - 2)
        yield Record(number, [parts[0], ",".join(parts[1:last]), *parts[last:]])


def _counted(table: CaptionTable, lines: Sequence[str], delimiter: str, count: int) -> Iterator[Record]:
    """The rows of a table that have `count` cells; the others are problems."""
    try:
        rows = list(records(_ended(lines), delimiter, delimiter != "\t"))[1:]
    except csv.Error:
        rows = list(records(_ended(lines), delimiter, False))[1:]
    for row in rows:
        if len(row.cells) == count:
            yield row
        else:
            told = f"{_fields(len(row.cells))}, expected {count}; captions with commas need quotes"
            table.problems.append((row.line, told))


def _ended(lines: Sequence[str]) -> Iterator[str]:
    return (line + "\n" for line in lines)


def _fields(count: int) -> str:
    return f"{count} field{'s' * (count != 1)}"


def _collect(
    table: CaptionTable,
    rows: Iterator[Record],
    places: dict[str, int | None],
    folder: Path,
    of_files: bool,
) -> None:
    seen: dict[tuple[str, str], int] = {}
    rows = list(rows)
    told = [{kind: row.cells[at].strip() if at is not None else "" for kind, at in places.items()} for row in rows]
    images = [folder / values["path"].replace("\\", "/") for values in told]  # an absolute path stays one
    out = set(stray(images, folder)) if of_files else ()
    for place, ((line, _), values, image) in enumerate(zip(rows, told, images)):
        name, text = values["path"].replace("\\", "/"), values["text"]
        if not name:
            reason = "no image path"
        elif is_missing(text):
            reason = f"the caption of {name} is empty"
        elif (name, text) in seen:
            reason = f"{name} with the same caption stands in line {seen[name, text]} already"
        elif place in out:
            reason = f"{name} lies outside of {folder}; if you mean it, --files-in {image.resolve().parent}"
        elif of_files and not is_there(image):
            reason = f"there is no image {image}"
        else:
            seen[name, text] = line
            table.captions.append(Caption(line, image, name, text, values["modality"], values["patient"]))
            continue
        table.problems.append((line, reason))
    table.problems.sort()


def drop_unreadable(table: CaptionTable, workers: int = 8) -> None:
    """Decode every image; those that cannot be read become problems.

    >>> Path("a.png").touch()
    >>> _ = Path("captions.csv").write_text("path,text\\na.png,Clear lungs\\n")
    >>> table = read_captions("captions.csv")
    >>> drop_unreadable(table)
    >>> table.captions, table.problems[0][0]
    ([], 2)
    """
    images = sorted({caption.image for caption in table.captions})
    with ThreadPoolExecutor(workers) as pool:
        checked = pool.map(_unreadable, images)
        found = tqdm(checked, desc="checking images", total=len(images), unit="image", leave=False)
        reasons = {image: reason for image, reason in zip(images, found) if reason}
    bad = [caption for caption in table.captions if caption.image in reasons]
    table.problems += [(caption.line, reasons[caption.image]) for caption in bad]
    table.problems.sort()
    table.captions = [caption for caption in table.captions if caption.image not in reasons]


def _unreadable(path: Path) -> str:
    """Why an image cannot be read; "" if it can."""
    try:
        Picture.of_file(path).pixels()
    except UserError as error:
        return str(error)
    return ""


def square(image: np.ndarray, size: int, resize: str = "shorter") -> np.ndarray:
    """An image (H, W, 3) uint8 as (size, size, 3).

    resize: shorter: scaled so that its shorter side is `size`, and its middle cut out; pad: the longer side, and the
    rest is black.

    >>> square(np.zeros((100, 200, 3), np.uint8), 64).shape
    (64, 64, 3)
    """
    if resize not in RESIZES:
        raise UserError(f"resize is one of {', '.join(RESIZES)}; got '{resize}'")
    fit = ImageOps.fit if resize == "shorter" else ImageOps.pad
    return np.asarray(fit(Image.fromarray(image), (size, size), Image.Resampling.BICUBIC))
