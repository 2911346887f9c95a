"""A sheet of images that people rate, and their ratings read back.

A rating folder holds copies of the images in images/, numbered contact sheets, ratings.csv to be filled in (number,
file, rating, note) and ratings.json: the scale, and what each image was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.data.collection import Pictures, pictures_of_files
from ldm.errors import UserError, some
from ldm.files import sha256, whole, write_text
from ldm.foreign.paths import named_in
from ldm.foreign.settings import read_json
from ldm.foreign.shape import COUNT, MAPPING, TEXT, check_shape
from ldm.images.sheets import contact_sheet
from ldm.images.write import save_png, save_real_png
from ldm.rng import fold
from ldm.scorers.labelled import Labelled, Task, groups_of, targets_of
from ldm.tables.text import read_table

TABLE, ABOUT = "ratings.csv", "ratings.json"
PAGE = 48  # images of a sheet
MOST = 256  # px of an image on a sheet
_FORM = {"scale": [TEXT], "images": [{"number": COUNT, "file": TEXT, "sha256": TEXT, "was": MAPPING}]}


def parse_scale(text: str) -> list[str]:
    """The ratings of a scale: "1-5" is 1, 2, 3, 4, 5; "bad,good" two names, the last of them the good one.

    >>> parse_scale("1-5"), parse_scale("bad, good")
    (['1', '2', '3', '4', '5'], ['bad', 'good'])
    """
    low, dash, high = text.partition("-")
    if dash and low.strip().isdecimal() and high.strip().isdecimal() and int(low) < int(high) <= int(low) + 100:
        return [str(value) for value in range(int(low), int(high) + 1)]
    names = [name.strip() for name in text.split(",")]
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        raise UserError(f"--scale takes grades, as 1-5, or names from bad to good, as bad,good; got '{text}'.")
    return names


def write_rating_folder(pictures: Pictures, out: Path, count: int, scale: Sequence[str], seed: int) -> int:
    """Write a rating folder of at most `count` images, drawn at random, in random order; returns how many.

    UserError: `out` holds ratings already, or other files.

    >>> write_rating_folder(labelled.pictures, Path("rating"), 4, parse_scale("1-5"), seed=0)
    4
    >>> sorted(path.name for path in Path("rating").iterdir())
    ['contact_sheet_01.png', 'images', 'ratings.csv', 'ratings.json']
    """
    if (out / TABLE).is_file():
        raise UserError(f"{out / TABLE} is there already and may hold ratings; choose another --out.")
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(fold(seed)).permutation(len(pictures))[:count]
    digits = max(3, len(str(len(rows))))
    about, shown, synthetic = [], [], False
    for number, row in enumerate(rows.tolist(), 1):
        picture = pictures[row]
        image, mark = picture.pixels(), picture.mark()
        synthetic = synthetic or bool(mark)
        copied = picture.path is not None and picture.path.is_file()
        file = out / "images" / f"{number:0{digits}}{picture.path.suffix.lower() if copied else '.png'}"
        if copied:
            with whole(file) as part:
                shutil.copyfile(picture.path, part)
        elif mark:
            save_png(file, image, mark)
        else:
            save_real_png(file, image)
        shown.append(image)
        about.append(
            {"number": number, "file": f"images/{file.name}", "sha256": sha256(file), "was": pictures.about[row]}
        )
    for page, start in enumerate(range(0, len(shown), PAGE), 1):
        numbers = [entry["number"] for entry in about[start : start + PAGE]]
        sheet = contact_sheet(shown[start : start + PAGE], labels=[str(number) for number in numbers], most=MOST)
        file = out / f"contact_sheet_{page:02}.png"
        save_png(file, sheet, {"of": TABLE}) if synthetic else save_real_png(file, sheet)
    told = {"scale": list(scale), "source": pictures.source, "images": about}
    write_text(out / ABOUT, json.dumps(told, indent=1, default=str))
    table = pd.DataFrame([{"number": e["number"], "file": e["file"], "rating": "", "note": ""} for e in about])
    write_text(out / TABLE, table.to_csv(index=False))
    return len(rows)


def is_rating_table(path: Path) -> bool:
    """Whether a table lies in a rating folder.

    >>> _ = write_rating_folder(labelled.pictures, Path("rating"), 4, ["bad", "good"], seed=0)
    >>> is_rating_table(Path("rating/ratings.csv"))
    True
    """
    return path.suffix.lower() == ".csv" and (path.parent / ABOUT).is_file()


def read_ratings(path: Path, skip_unrated: bool = False) -> Labelled:
    """The rated images of a rating folder's table: grades from the scale's lowest to its highest, or its names.

    UserError names the rows that are missing, not rated, rated outside the scale or given twice, and images that are
    not the ones that were handed out.

    >>> _ = write_rating_folder(labelled.pictures, Path("rating"), 4, parse_scale("1-5"), seed=0)
    >>> table = pd.read_csv("rating/ratings.csv").assign(rating=[1, 5, 3, 4])
    >>> table.to_csv("rating/ratings.csv", index=False)
    >>> read_ratings(Path("rating/ratings.csv")).targets
    array([0.  , 1.  , 0.5 , 0.75])
    """
    told = read_json(path.parent / ABOUT, "what was handed out,")
    check_shape(told, _FORM, path.parent / ABOUT)
    table, known = read_table(path, missing=("",)).fillna(""), {entry["number"]: entry for entry in told["images"]}
    if lacking := {"number", "rating"} - set(table):
        raise UserError(f"{path} has no column {', '.join(sorted(lacking))}; it was written with number and rating.")
    ratings: dict[int, str] = {}
    wrong: list[str] = []
    for line, (number, rating) in enumerate(zip(table["number"], table["rating"].str.strip()), 2):
        if not str(number).strip().isdecimal() or int(number) not in known:
            wrong.append(f"row {line}: no image has the number '{number}'")
        elif int(number) in ratings:
            wrong.append(f"row {line}: number {number} comes twice")
        elif rating and rating not in told["scale"]:
            wrong.append(f"row {line}: '{rating}' is none of {some(told['scale'], 12)}")
        else:
            ratings[int(number)] = rating
    if wrong:
        raise UserError(
            f"{path} has {len(wrong)} rows of no use: {'; '.join(wrong[:5])}{'; ...' if wrong[5:] else ''}."
        )
    unrated = sorted(set(known) - {number for number, rating in ratings.items() if rating})
    if unrated and not skip_unrated:
        raise UserError(
            f"{len(unrated)} of {len(known)} images of {path} are not rated: {some(list(map(str, unrated)), 12)}. Rate "
            "them, or leave them out with --skip-unrated."
        )
    rated = sorted(set(known) - set(unrated))
    if not rated:
        raise UserError(f"no image of {path} is rated.")
    files = named_in(path, [known[number]["file"] for number in rated])
    for number, file in zip(rated, files):
        if not file.is_file() or sha256(file) != known[number]["sha256"]:
            raise UserError(f"{file} is missing or is not the image that was handed out as number {number}.")
    about = [{**known[n]["was"], "file": known[n]["file"], "rating": ratings[n]} for n in rated]
    pictures, scale = pictures_of_files(files, about, str(path)), told["scale"]
    values = [ratings[number] for number in rated]
    if len(set(values)) < 2:
        raise UserError(f"all {len(values)} images of {path} are rated {values[0]}; a scorer learns from two ratings.")
    if all(name.isdecimal() for name in scale):
        task = Task("graded", "rating", (), float(scale[0]), float(scale[-1]))
    else:
        task = Task("binary" if len(scale) == 2 else "classes", "rating", tuple(scale))
    groups, notes = groups_of(pictures, None)
    if unrated:
        notes = (*notes, f"{len(unrated)} images are not rated and left out")
    return replace(Labelled(pictures, task, targets_of(values, task, pictures), groups), notes=notes)
