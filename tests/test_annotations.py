from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.tables.annotations import UNDECIDED, find_files, read_crops, read_midog, read_sliderunner
from ldm.tables.votes import class_called, scores_of, without_surplus

SCHEMA = """
CREATE TABLE `Log` (`uid` INTEGER PRIMARY KEY AUTOINCREMENT,`dateTime` FLOAT,`labelId` INTEGER);
CREATE TABLE `Slides` (`uid` INTEGER PRIMARY KEY AUTOINCREMENT,`filename` TEXT,`width` INTEGER,
    `EXACTUSER` INTEGER DEFAULT 0,`height` INTEGER,`directory` TEXT,`uuid` TEXT,`exactImageID` TEXT);
CREATE TABLE `Annotations` (`uid` INTEGER PRIMARY KEY AUTOINCREMENT,`guid` TEXT,`deleted` INTEGER DEFAULT 0,
    `slide` INTEGER,`type` INTEGER,`agreedClass` INTEGER,`lastModified` REAL DEFAULT 0,`description` TEXT);
CREATE TABLE `Annotations_coordinates` (`uid` INTEGER PRIMARY KEY AUTOINCREMENT,`coordinateX` INTEGER,
    `coordinateY` INTEGER,`coordinateZ` INTEGER DEFAULT 0,`slide` INTEGER,`annoId` INTEGER,`orderIdx` INTEGER);
CREATE TABLE `Persons` (`uid` INTEGER PRIMARY KEY AUTOINCREMENT,`name` TEXT,`isExactUser` INTEGER DEFAULT 0);
CREATE TABLE `Classes` (`uid` INTEGER PRIMARY KEY AUTOINCREMENT,`name` TEXT,`color` TEXT);
CREATE TABLE `Annotations_label` (`uid` INTEGER PRIMARY KEY AUTOINCREMENT,`exact_id` INTEGER,
    `person` INTEGER DEFAULT 0,`class` INTEGER,`annoId` INTEGER);
"""
SPOT, AREA, POLYGON, CIRCLE, WHOLE_IMAGE = 1, 2, 3, 5, 6
EOSINOPHIL, MITOSIS = 1, 2


class SlideRunner:
    """Writes a database as SlideRunner does."""

    def __init__(self, path: Path, slides: list[str]):
        self.path, self.database = path, sqlite3.connect(path)
        self.database.executescript("PRAGMA synchronous = OFF;" + SCHEMA)
        self.insert("Classes", name="eosinophilic granulocyte", color="#000000")
        self.insert("Classes", name="Mitotic figure", color="#ff0000")
        for name in ("Ada", "Ben", "detector"):
            self.insert("Persons", name=name)
        for name in slides:
            self.insert("Slides", filename=name, directory="/somewhere")

    def insert(self, table: str, **values) -> int:
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        uid = self.database.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", [*values.values()]).lastrowid
        self.database.commit()
        return uid

    def cell(self, points, agreed: int, votes=(), slide: int = 1, kind: int = SPOT, deleted: int = 0) -> int:
        """votes: (person, class) in the order in which they were given."""
        uid = self.insert("Annotations", slide=slide, type=kind, agreedClass=agreed, deleted=deleted)
        for order, (x, y) in enumerate(points, 1):
            self.insert(
                "Annotations_coordinates", coordinateX=x, coordinateY=y, slide=slide, annoId=uid, orderIdx=order
            )
        for person, label in votes:
            self.insert("Annotations_label", person=person, annoId=uid, **{"class": label})
        return uid


@pytest.fixture
def database(tmp_path: Path) -> SlideRunner:
    return SlideRunner(tmp_path / "cells.sqlite", ["A.svs", "folder\\B.svs"])


def test_sliderunner_places_classes_and_votes(database):
    database.cell([(100, 200)], MITOSIS, [(1, MITOSIS), (2, MITOSIS), (3, EOSINOPHIL)])
    database.cell([(10, 20), (30, 60)], EOSINOPHIL, kind=AREA, slide=2)
    database.cell([(0, 0), (8, 0), (8, 8), (8, 9), (0, 0)], 0, [(1, EOSINOPHIL), (2, MITOSIS)], kind=POLYGON)
    database.cell([(5, 5)], MITOSIS, deleted=1)
    database.cell([], MITOSIS, kind=WHOLE_IMAGE)
    before = hashlib.sha256(database.path.read_bytes()).hexdigest()
    spot, area, polygon = read_sliderunner(database.path)
    assert (spot.slide, spot.x, spot.y, spot.name) == ("A.svs", 100, 200, "Mitotic figure")
    assert spot.votes == ("Mitotic figure", "Mitotic figure", "eosinophilic granulocyte")
    assert (area.slide, area.x, area.y, area.votes) == ("B.svs", 20, 40, ())
    assert (polygon.x, polygon.y, polygon.name) == (4, 4.5, UNDECIDED)
    assert hashlib.sha256(database.path.read_bytes()).hexdigest() == before


def test_a_region_is_no_cell_and_what_is_listed_twice_is_one(database, tmp_path, capsys):
    database.cell([(0, 0), (7000, 5000)], MITOSIS, kind=AREA)
    database.cell([(100, 200)], MITOSIS, [(1, MITOSIS)])
    database.cell([(100, 200)], MITOSIS, [(1, MITOSIS)])
    database.cell([(75, 175), (125, 225)], EOSINOPHIL, kind=AREA)
    database.cell([(300, 300)], EOSINOPHIL)
    database.cell([(100, 200)], MITOSIS, slide=2)
    cells = read_sliderunner(database.path)
    assert [(cell.slide, cell.x, cell.name) for cell in cells] == [
        ("A.svs", 100, UNDECIDED),
        ("A.svs", 300, "eosinophilic granulocyte"),
        ("B.svs", 100, "Mitotic figure"),
    ]
    told = capsys.readouterr().err
    assert "1 of 6 annotations of" in told
    assert "wider than 512 px: regions, which are no cells" in told
    assert "2 annotations of" in told
    assert "count as one cell with it, 1 of them with two classes, which are undecided" in told

    entry = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "labels": [1, 1]}
    content = {
        "images": [{"id": 1, "file_name": "a.tif"}],
        "categories": [{"id": 1, "name": "mitotic figure"}],
        "annotations": [entry, entry, {**entry, "bbox": [0, 0, 9000, 9000]}, {**entry, "bbox": [50, 0, 100, 50]}],
    }
    (tmp_path / "m.json").write_text(json.dumps(content))
    assert [(cell.x, len(cell.votes)) for cell in read_midog(tmp_path / "m.json")] == [(25, 2), (75, 2)]


def test_sliderunner_counts_each_chosen_person_once(database):
    database.cell([(1, 1)], MITOSIS, [(1, EOSINOPHIL), (2, MITOSIS), (1, MITOSIS), (3, EOSINOPHIL), (2, 0)])
    (cell,) = read_sliderunner(database.path)
    assert sorted(cell.votes) == ["Mitotic figure", "Mitotic figure", "eosinophilic granulocyte"]
    assert read_sliderunner(database.path, ["Ada", "3"])[0].votes == ("Mitotic figure", "eosinophilic granulocyte")
    with pytest.raises(UserError, match=r"no annotator 'Bem'; did you mean 'Ben'"):
        read_sliderunner(database.path, ["Bem"])


def test_sliderunner_of_the_first_version_has_no_deleted_flag(database):
    database.cell([(1, 1)], MITOSIS)
    database.database.execute("ALTER TABLE Annotations DROP COLUMN deleted")
    database.database.commit()
    assert len(read_sliderunner(database.path)) == 1


def test_sliderunner_is_read_without_the_right_to_write(database):
    database.cell([(1, 1)], MITOSIS)
    database.database.close()
    os.chmod(database.path, 0o444)
    assert len(read_sliderunner(database.path)) == 1


def test_other_databases_are_refused_by_what_they_lack(tmp_path, database):
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.executescript("CREATE TABLE Slides (uid INTEGER, name TEXT); CREATE TABLE Patients (id INTEGER);")
    with pytest.raises(UserError, match=r"not a SlideRunner database: it lacks Annotations, .*Slides\.filename.*Pat"):
        read_sliderunner(tmp_path / "other.sqlite")
    (tmp_path / "text.sqlite").write_text("x,y\n1,2\n" * 50)
    with pytest.raises(UserError, match="cannot be read as a SlideRunner database"):
        read_sliderunner(tmp_path / "text.sqlite")
    with pytest.raises(UserError, match="no annotation database at"):
        read_sliderunner(tmp_path / "absent.sqlite")
    assert not (tmp_path / "absent.sqlite").exists()
    database.cell([], MITOSIS)
    with pytest.raises(UserError, match=r"annotation 1 of .* has no coordinates"):
        read_sliderunner(database.path)


def midog(path: Path, images: list[str], annotations: list[dict]) -> Path:
    content = {
        "images": [
            {"id": i, "file_name": name, "width": 7000, "height": 5000, "tumor_type": "canine lymphoma"}
            for i, name in enumerate(images, 1)
        ],
        "annotations": [{"id": i, "image_id": 1, **entry} for i, entry in enumerate(annotations, 1)],
        "categories": [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "hard negative"}],
        "licenses": [],
    }
    path.write_text(json.dumps(content))
    return path


def test_midog_boxes_are_corners(tmp_path):
    entries = [
        {"bbox": [4336, 346, 4386, 396], "category_id": 1, "labels": [1, 1, 2]},
        {"bbox": [10.5, 20, 60.5, 70], "category_id": 2, "image_id": 2},
    ]
    mitosis, imposter = read_midog(midog(tmp_path / "MIDOG.json", ["001.tiff", "images/002.tiff"], entries))
    assert (mitosis.slide, mitosis.x, mitosis.y, mitosis.name) == ("001.tiff", 4361, 371, "mitotic figure")
    assert mitosis.votes == ("mitotic figure", "mitotic figure", "hard negative")
    assert mitosis.domain == "canine lymphoma"
    assert (imposter.slide, imposter.x, imposter.name, imposter.votes) == ("002.tiff", 35.5, "hard negative", ())


def test_files_that_are_not_midog_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"\[4336, 346, 50, 50\], which is not x1, y1, x2, y2"):
        read_midog(midog(tmp_path / "coco.json", ["1.tiff"], [{"bbox": [4336, 346, 50, 50], "category_id": 1}]))
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"not a MIDOG file: it is \[1, 2\], not"):
        read_midog(tmp_path / "list.json")
    (tmp_path / "broken.json").write_text('{"images": [')
    with pytest.raises(UserError, match="is not valid JSON"):
        read_midog(tmp_path / "broken.json")
    with pytest.raises(UserError, match=r"annotations\.0\.bbox is missing"):
        read_midog(midog(tmp_path / "points.json", ["1.tiff"], [{"category_id": 1}]))
    with pytest.raises(UserError, match="no annotation file"):
        read_midog(tmp_path / "absent.json")


def crops(folder: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), i, np.uint8)).save(folder / name)
    return folder


def test_crops_and_their_votes(tmp_path):
    folder = crops(tmp_path / "crops", ["No/1.png", "No/2.png", "Yes/3.png"])
    table = tmp_path / "votes.csv"
    rows = ["1.png,No,Yes,x,Yes,s1", "3.png,Yes, ,,Yes,s2", "9.png,No,No,,No,"]
    table.write_text("\n".join(["File,Reader A,Reader B,Note,Majority,Slide", *rows]))
    cells, rest = read_crops(folder, table)
    assert [cell.slide for cell in cells] == ["No/1.png", "No/2.png", "Yes/3.png"]
    assert [cell.name for cell in cells] == ["Yes", "No", "Yes"]
    assert [cell.votes for cell in cells] == [("No", "Yes"), (), ("Yes",)]
    assert [cell.patient for cell in cells] == ["s1", "", "s2"]
    assert (cells[0].x, cells[0].y, rest) == (12, 10, 1)
    assert read_crops(folder, table, ["Reader B"])[0][0].votes == ("Yes",)
    assert [cell.name for cell in read_crops(folder)[0]] == ["No", "No", "Yes"]


def test_mistakes_in_the_table_of_votes(tmp_path):
    folder = crops(tmp_path / "crops", ["No/1.png", "Yes/3.png"])
    table = tmp_path / "votes.csv"
    table.write_text("File,A\n1.png,No\n3.png,Yse\n")
    with pytest.raises(UserError, match=r"A calls 3.png 'Yse', which is no class; did you mean 'Yes'"):
        read_crops(folder, table)
    table.write_text("File,A\n1.png,No\n1.png,Yes\n")
    with pytest.raises(UserError, match=r"lists 1.png twice"):
        read_crops(folder, table)
    table.write_text("File,A\n1.png,No\n")
    with pytest.raises(UserError, match="no column 'B'"):
        read_crops(folder, table, ["B"])
    with pytest.raises(UserError, match="no table of votes"):
        read_crops(folder, tmp_path / "absent.csv")
    with pytest.raises(UserError, match="no folder of crops"):
        read_crops(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image lies in"):
        read_crops(tmp_path / "empty")
    with pytest.raises(UserError, match=r"several crops called 1.png"):
        read_crops(crops(folder, ["Yes/1.png"]), table)


def test_scores_hard_and_soft(database):
    database.cell([(1, 1)], MITOSIS, [(1, MITOSIS), (2, EOSINOPHIL), (3, MITOSIS)])
    database.cell([(2, 2)], 0, [(1, MITOSIS), (2, EOSINOPHIL)])
    database.cell([(3, 3)], EOSINOPHIL)
    cells = read_sliderunner(database.path)
    positive = class_called("mitotic FIGURE", cells, "positive")
    assert positive == "Mitotic figure"
    assert scores_of(cells, positive) == [1.0, None, 0.0]
    assert scores_of(cells[:2], positive, "soft") == [2 / 3, 0.5]
    with pytest.raises(UserError, match=r"1 of 3 cells have no votes.*A\.svs at \(3, 3\)"):
        scores_of(cells, positive, "soft")
    with pytest.raises(UserError, match=r"no cell is called 'Mitosis figure', which --positive names; did you mean"):
        class_called("Mitosis figure", cells, "positive")


def test_surplus_negatives_go_by_the_cell_not_by_the_order(database):
    for x in range(40):
        database.cell([(x, 0)], MITOSIS if x % 8 == 0 else EOSINOPHIL)
    cells = read_sliderunner(database.path)
    scores = scores_of(cells, "Mitotic figure")
    groups = ["left" if cell.x < 20 else "right" for cell in cells]
    kept = {cells[i].x for i in without_surplus(cells, scores, groups, seed=0)}
    assert {x for x in kept if x % 8 == 0} == {0, 8, 16, 24, 32}
    assert [sum(x < 20 for x in kept), sum(x >= 20 for x in kept)] == [6, 4]
    again = without_surplus(cells[::-1], scores[::-1], groups[::-1], seed=0)
    assert {cells[::-1][i].x for i in again} == kept
    assert {cells[i].x for i in without_surplus(cells, scores, groups, seed=1)} != kept
    assert len(without_surplus(cells, scores, groups, seed=0, most=1)) == 5 + 2


def test_files_are_found_in_subfolders(tmp_path):
    crops(tmp_path, ["a/1.png", "b/c/2.png"])
    assert find_files(tmp_path, ["2.png", "3.png"]) == {"2.png": tmp_path / "b/c/2.png"}
    crops(tmp_path, ["a/2.png"])
    with pytest.raises(UserError, match="have the same name"):
        find_files(tmp_path, ["2.png"])


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("annotations", {"bbox": [1, 2]}, "the bbox of annotation 1 is"),
        ("annotations", {"bbox": ["a", 1, 2, 3]}, "the bbox of annotation 1 is"),
        ("annotations", {"bbox": [float("nan"), 1, 2, 3]}, "the bbox of annotation 1 is"),
        ("annotations", {"bbox": None}, "the bbox of annotation 1 is"),
        ("images", {"file_name": 3}, r"images\.0\.file_name is 3, not text"),
        ("categories", {"name": None}, r"categories\.0\.name is None, not text"),
    ],
)
def test_entries_of_midog_that_are_none(tmp_path, part, values, message):
    content = {
        "images": [{"id": 1, "file_name": "a.tif"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50]}],
        "categories": [{"id": 1, "name": "mitotic figure"}],
    }
    content[part][0].update(values)
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_midog(tmp_path / "m.json")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        read_midog(tmp_path)


def test_coordinates_and_names_that_a_database_lacks(tmp_path):
    database = SlideRunner(tmp_path / "cells.sqlite", ["a.svs"])
    database.cell([(5, 7)], MITOSIS, [(1, MITOSIS)])
    database.database.execute("UPDATE Classes SET name = NULL WHERE uid = ?", (MITOSIS,))
    database.database.commit()
    assert [cell.name for cell in read_sliderunner(database.path)] == [f"class {MITOSIS}"]
    database.database.execute("UPDATE Annotations_coordinates SET coordinateX = NULL")
    database.database.commit()
    with pytest.raises(UserError, match=r"annotation 1 of .* has no coordinates"):
        read_sliderunner(database.path)
