"""Readers of cell annotations: SlideRunner databases, MIDOG files, and crops with a table of votes.

Each gives `Cell`s: where a cell lies, what it was agreed to be, and what each annotator called it.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import pandas as pd

from ldm.errors import UserError, note, suggest
from ldm.foreign.settings import parse_json
from ldm.foreign.shape import ANYTHING, Is, check_shape, maybe
from ldm.images.kinds import ENDINGS, images_in
from ldm.images.slides import open_image
from ldm.tables.text import read_table, read_text

LARGEST = 512  # level-0 pixels; no cell is so wide: what is larger is a region
UNDECIDED = "undecided"  # the class of a cell whose annotators did not agree
_SLIDERUNNER = {
    "Slides": ("uid", "filename"),
    "Annotations": ("uid", "slide", "type", "agreedClass"),
    "Annotations_coordinates": ("coordinateX", "coordinateY", "annoId"),
    "Annotations_label": ("uid", "person", "class", "annoId"),
    "Classes": ("uid", "name"),
    "Persons": ("uid", "name"),
}
_ID = Is("a number or text", lambda value: isinstance(value, (int, float, str)))
_NAME = Is("text", lambda value: isinstance(value, str) and value != "")
_MIDOG = {
    "images": [{"id": _ID, "file_name": _NAME}],
    "annotations": [{"image_id": _ID, "category_id": _ID, "bbox": ANYTHING, "labels?": maybe([_ID])}],
    "categories": [{"id": _ID, "name": _NAME}],
}
_WHOLE_IMAGE = 6  # SlideRunner's type of an annotation without a place; 1..5 are spot, area, polygon, spot, circle


@dataclass(frozen=True)
class Cell:
    """One annotated cell.

    Attributes:
        slide: file name of the slide, or of the crop relative to its folder.
        x, y: centre in level-0 pixels.
        name: its agreed class, or UNDECIDED.
        votes: the class that each annotator gave it; may be empty.
        patient, domain: where the annotations know them, else "".
    """

    slide: str
    x: float
    y: float
    name: str
    votes: tuple[str, ...] = ()
    patient: str = ""
    domain: str = ""

    def __str__(self) -> str:
        return f"{self.slide} at ({self.x:g}, {self.y:g})"


def read_sliderunner(path: Path | str, annotators: Sequence[str] = ()) -> list[Cell]:
    """Cells of a SlideRunner database (SQLite; MITOS_WSI_CCMCT, MITOS_WSI_CMC and others), which is not written to.

    The centre of an area, circle or polygon is that of its box. Deleted annotations, and those of whole images, are no
    cells; nor are regions, which are wider than LARGEST. Of an annotator's several labels the last counts; class 0 is
    no label. What is annotated twice is one cell (of MIDOG files too); what was left out is said.

    Args:
        annotators: names or ids of the persons whose votes count; none is all.
    Raises:
        UserError: no such file, not SQLite, another schema, an unknown annotator, an annotation without coordinates.

    >>> read_sliderunner("cells.sqlite")
    Traceback (most recent call last):
    ldm.errors.UserError: there is no annotation database at cells.sqlite
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no annotation database at {path}")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as database:
            optional = _check_schema(database, path)
            return _sliderunner_cells(database, path, optional, annotators)
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} cannot be read as a SlideRunner database (SQLite): {error}") from None


def _check_schema(database: sqlite3.Connection, path: Path) -> bool:
    """UserError unless SlideRunner's tables and columns are there; whether annotations can be marked as deleted."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    lacking = [table for table in _SLIDERUNNER if table not in tables]
    columns = {table: {row[1] for row in database.execute(f"PRAGMA table_info({table})")} for table in _SLIDERUNNER}
    for table, needed in _SLIDERUNNER.items():
        if table in tables:
            lacking += [f"{table}.{name}" for name in needed if name not in columns[table]]
    if lacking:
        raise UserError(
            f"{path} is not a SlideRunner database: it lacks {', '.join(lacking)}; its tables are "
            f"{', '.join(sorted(tables)) or '(none)'}"
        )
    return "deleted" in columns["Annotations"]


def _sliderunner_cells(
    database: sqlite3.Connection, path: Path, can_delete: bool, annotators: Sequence[str]
) -> list[Cell]:
    classes = {uid: name or f"class {uid}" for uid, name in database.execute("SELECT uid, name FROM Classes")}
    persons = dict(database.execute("SELECT uid, name FROM Persons"))
    chosen = _persons(persons, annotators)
    slides = {
        uid: PurePosixPath((name or "").replace("\\", "/")).name
        for uid, name in database.execute("SELECT uid, filename FROM Slides")
    }
    places = {
        uid: (x, y, side)
        for uid, x, y, side in database.execute(
            "SELECT annoId, (MIN(coordinateX) + MAX(coordinateX)) / 2.0, (MIN(coordinateY) + MAX(coordinateY)) / 2.0, "
            "MAX(MAX(coordinateX) - MIN(coordinateX), MAX(coordinateY) - MIN(coordinateY)) "
            "FROM Annotations_coordinates GROUP BY annoId"
        )
    }
    votes: dict[int, dict[int, str]] = {}
    for uid, person, label in database.execute("SELECT annoId, person, class FROM Annotations_label ORDER BY uid"):
        if label and (chosen is None or person in chosen):
            votes.setdefault(uid, {})[person] = classes.get(label, f"class {label}")
    kept = " AND (deleted IS NULL OR deleted = 0)" if can_delete else ""
    cells = []
    for uid, slide, agreed in database.execute(
        f"SELECT uid, slide, agreedClass FROM Annotations WHERE type IS NOT {_WHOLE_IMAGE}{kept} ORDER BY uid"
    ):
        if not all(isinstance(place, (int, float)) for place in places.get(uid, (None,))):
            raise UserError(f"annotation {uid} of {path} has no coordinates; delete it in SlideRunner")
        name = classes.get(agreed, f"class {agreed}") if agreed else UNDECIDED
        given = tuple(votes.get(uid, {}).values())
        file = slides.get(slide) or f"slide {slide}, which is not in the database"
        x, y, side = places[uid]
        cells.append((Cell(file, x, y, name, given), side))
    return _each_once(cells, path)


def _each_once(found: Sequence[tuple[Cell, float]], path: Path) -> list[Cell]:
    """The cells among annotations and their sides: no regions, and one for each place. What is left out is said."""
    cells = [cell for cell, side in found if side <= LARGEST]
    if regions := len(found) - len(cells):
        wide = f"wider than {LARGEST} px: regions, which are no cells"
        note(f"{regions} of {len(found)} annotations of {path} are {wide}.")
    places: dict[tuple[str, int, int], list[Cell]] = {}
    for cell in cells:
        places.setdefault((cell.slide, round(cell.x), round(cell.y)), []).append(cell)
    once = [_one(same) for same in places.values()]
    if twice := len(cells) - len(once):
        told = sum(len({cell.name for cell in same} - {UNDECIDED}) > 1 for same in places.values())
        of_them = f", {told} of them with two classes, which are undecided" if told else ""
        note(f"{twice} annotations of {path} lie where another one does and count as one cell with it{of_them}.")
    return once


def _one(same: Sequence[Cell]) -> Cell:
    """One cell of several at the same place: undecided where they are of two classes, with the votes of all."""
    names = {cell.name for cell in same} - {UNDECIDED}
    votes = same[0].votes if all(cell.votes == same[0].votes for cell in same) else sum((c.votes for c in same), ())
    if len(names) > 1:
        votes = votes or tuple(cell.name for cell in same)
    return replace(same[0], name=names.pop() if len(names) == 1 else UNDECIDED, votes=votes)


def _persons(persons: dict[int, str], annotators: Sequence[str]) -> set[int] | None:
    """Ids of the persons named by name or id; None for all."""
    if not annotators:
        return None
    ids = {name: uid for uid, name in persons.items()} | {str(uid): uid for uid in persons}
    if unknown := [name for name in annotators if name not in ids]:
        raise UserError(f"the database has no annotator '{unknown[0]}'{suggest(unknown[0], ids)}")
    return {ids[name] for name in annotators}


def read_midog(path: Path | str) -> list[Cell]:
    """Cells of a MIDOG file (MIDOG.json, MIDOG++.json): COCO-like, but `bbox` holds corners x1, y1, x2, y2.

    `labels`, where annotations have them, are the experts' votes as category ids; an image's `tumor_type` is the domain
    of its cells.

    Raises:
        UserError: no such file, no JSON, another layout, boxes that are not corners.

    >>> box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 60, 70]}
    >>> images, categories = [{"id": 1, "file_name": "001.tiff"}], [{"id": 1, "name": "mitotic figure"}]
    >>> import json
    >>> text = json.dumps({"images": images, "categories": categories, "annotations": [box]})
    >>> _ = Path("MIDOG.json").write_text(text)
    >>> print(read_midog("MIDOG.json")[0])
    001.tiff at (35, 45)
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no annotation file at {path}")
    content = parse_json(read_text(path), path)
    check_shape(content, _MIDOG, f"{path} is not a MIDOG file")
    classes = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    try:
        return _each_once([_midog_cell(entry, images, classes, path) for entry in content["annotations"]], path)
    except KeyError as error:
        raise UserError(f"{path} is not a MIDOG file: no image or category has the id {error}") from None


def _midog_cell(
    entry: dict[str, Any], images: dict[int, Any], classes: dict[int, str], path: Path
) -> tuple[Cell, float]:
    """A cell, and the side of its box."""
    try:
        left, top, right, bottom = map(float, entry["bbox"])
    except (TypeError, ValueError):
        left = top = right = bottom = math.nan
    if not (left < right and top < bottom and math.isfinite(left + top + right + bottom)):
        raise UserError(
            f"{path}: the bbox of annotation {entry.get('id')} is {entry['bbox']}, which is not x1, y1, x2, y2 as in "
            "MIDOG; if the file has COCO's x, y, width, height, convert it"
        )
    image = images[entry["image_id"]]
    votes = tuple(classes[vote] for vote in entry.get("labels") or ())
    name = PurePosixPath(image["file_name"].replace("\\", "/")).name
    domain = str(image.get("tumor_type") or "")
    cell = Cell(name, (left + right) / 2, (top + bottom) / 2, classes[entry["category_id"]], votes, domain=domain)
    return cell, max(right - left, bottom - top)


def read_crops(
    folder: Path | str, votes: Path | str | None = None, annotators: Sequence[str] = ()
) -> tuple[list[Cell], int]:
    """Cells that were cut out already, one per image file, and the number of rows of the table without an image.

    A crop's class is the table's `Majority`, or the name of its subfolder. The table is a CSV whose first column is the
    file name; annotators are its columns that hold names of classes; `patient`, or else `slide`, where there, is its
    owner.

    Args:
        votes: the table; without it no cell has votes.
        annotators: columns whose votes count; none is all.
    Raises:
        UserError: no image, two of one name, no table, a row twice, a vote for an unknown class.

    >>> Path("crops/atypical").mkdir(parents=True)
    >>> Image.new("RGB", (64, 64)).save("crops/atypical/1.png")
    >>> cells, unused = read_crops("crops")
    >>> cells[0].name, cells[0].x, unused
    ('atypical', 32.0, 0)
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder of crops at {folder}")
    files = images_in(folder, subfolders=True)
    if not files:
        raise UserError(f"no image lies in {folder}; known endings: {ENDINGS}")
    names = [path.name for path in files]
    if votes is not None and (twice := next((a for a, b in zip(sorted(names), sorted(names)[1:]) if a == b), None)):
        raise UserError(f"{folder} has several crops called {twice}, so the table of votes cannot tell them apart")
    classes = {path.name: path.parent.name if path.parent != folder else UNDECIDED for path in files}
    table = pd.DataFrame(index=pd.Index([], dtype=str)) if votes is None else _vote_table(Path(votes))
    columns = {str(name).casefold(): name for name in reversed(table.columns)}
    majority, owner = columns.get("majority"), columns.get("patient", columns.get("slide"))
    known = {name for name in classes.values() if name != UNDECIDED}
    known |= set(table[majority].dropna()) if majority else set()
    voters = _voters(table.drop(columns=[name for name in (majority, owner) if name]), known, annotators, votes)
    cells = []
    for path in files:
        row = table.loc[path.name] if path.name in table.index else None
        agreed = row[majority] if row is not None and majority and pd.notna(row[majority]) else classes[path.name]
        given = tuple(row[name] for name in voters if pd.notna(row[name])) if row is not None else ()
        patient = str(row[owner]) if row is not None and owner and pd.notna(row[owner]) else ""
        x, y = (side / 2 for side in open_image(path).dimensions)
        cells.append(Cell(str(path.relative_to(folder)), x, y, agreed, given, patient))
    return cells, len(set(table.index) - set(names))


def _vote_table(path: Path) -> pd.DataFrame:
    """The table, its first column as index, texts stripped."""
    if not path.is_file():
        raise UserError(f"there is no table of votes at {path}")
    table = read_table(path)
    table = table.dropna(subset=[table.columns[0]]).set_index(table.columns[0])
    if table.index.has_duplicates:
        raise UserError(f"{path} lists {table.index[table.index.duplicated()][0]} twice")
    return table


def _voters(table: pd.DataFrame, known: set[str], annotators: Sequence[str], path: Path | str | None) -> list[str]:
    """The columns of votes: those named, or all that hold names of classes."""
    for name in annotators:
        if name not in table.columns:
            raise UserError(f"{path} has no column '{name}'{suggest(name, table.columns)}")
    voters = list(annotators) or [name for name in table.columns if known & set(table[name])]
    for name in voters if known else ():
        for file, vote in table[name].dropna().items():
            if vote not in known:
                raise UserError(f"{path}: {name} calls {file} '{vote}', which is no class{suggest(vote, known)}")
    return voters


def find_files(folder: Path | str, names: Iterable[str]) -> dict[str, Path]:
    """The files of these names in a folder and below. UserError for no folder, or a name that is there twice.

    >>> Path("slides").mkdir()
    >>> Path("slides/a.svs").touch()
    >>> find_files("slides", ["a.svs", "b.svs"])
    {'a.svs': PosixPath('slides/a.svs')}
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder of slides at {folder}")
    wanted, found = set(names), {}
    for path in sorted(folder.rglob("*")):
        if path.name in wanted:
            if path.name in found:
                raise UserError(f"{found[path.name]} and {path} have the same name; the annotations mean one of them")
            found[path.name] = path
    return found
