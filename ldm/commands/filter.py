"""Bodies of `histoldm score`, `filter` and `rate`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldm.data.collection import LIST, Pictures, read_pictures
from ldm.data.extent import tell
from ldm.data.where import Where
from ldm.errors import UserError, some
from ldm.files import hidden, names_in, owns, whole, write_text
from ldm.images.sheets import contact_sheet
from ldm.images.write import save_png, save_real_png
from ldm.requests.tiles import evenly
from ldm.scorers.calibration import proportion
from ldm.scorers.ensemble import load_scorer
from ldm.scorers.labelled import Task, targets_of
from ldm.scorers.ratings import MOST, parse_scale, write_rating_folder
from ldm.scorers.select import chosen, merit, score_pictures, score_table

SHOWN = 48  # images of a contact sheet
SETTINGS, SCORES, PARTIAL = "filter.json", "scores.csv", ".scored"


@owns(beside=True)
def score_images(
    scorer: Sequence[Path],
    images: Path,
    out: Path,
    device: str,
    batch_size: int,
    crop: int | None,
    where: Where,
    target: str | None = None,
) -> None:
    """`histoldm score`: a table of what the networks say of each image.

    target: a column of the images' list that says what each shall be; it goes into the table as `target`, of classes
    as 1 where the label is that.
    """
    if out.suffix.lower() != ".csv":
        raise UserError(f"--out is a .csv file; got {out}.")
    network, pictures = load_scorer(scorer, device), read_pictures(images, where).middle(crop)
    tell(pictures.notes)
    task = network.task
    wanted = None if target is None else targets_of(pictures.column(target), task, pictures)
    work = hidden(out, PARTIAL)  # what a stopped run has scored
    table = score_table(network.task, score_pictures(network, pictures, batch_size, work), pictures)
    if wanted is not None:
        table["target"] = as_scores(task, wanted, table)
    with whole(out) as part:
        table.to_csv(part, index=False)
    work.unlink(missing_ok=True)
    told = table["score"].dropna()
    print(f"wrote {len(table)} scores to {out}: mean {told.mean():.4f}, from {told.min():.4f} to {told.max():.4f}")
    say_unreadable(table, pictures)


def as_scores(task: Task, wanted: np.ndarray, table: pd.DataFrame) -> np.ndarray:
    """Targets (N,) as the scores of a table are: 0 or 1, a grade; of classes 1 where its label is the wanted one."""
    if task.kind == "graded":
        return task.low + wanted * (task.high - task.low)
    if task.kind == "binary":
        return wanted.astype(int)
    return (table["label"] == [task.classes[int(k)] for k in wanted]).to_numpy(int)


def say_unreadable(table: pd.DataFrame, pictures: Pictures) -> None:
    if rows := np.flatnonzero(table["score"].isna()).tolist():
        print(f"note: {len(rows)} images cannot be read: {some([pictures.name(i) for i in rows], 5)}")


def parse_above(texts: Sequence[str]) -> dict[str, float]:
    """Least scores: "0.5" of all, under "", "LUAD=0.7" of one value."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise UserError(f"--above takes a number, 0.5, or value=number, LUAD=0.7; got '{text}'.") from None
        if name in found:
            raise UserError(f"--above is given twice for {name or 'all'}: {found[name]:g} and {value:g}.")
        found[name] = value
    return found


@owns()
def filter_images(
    scorer: Sequence[Path],
    images: Path,
    out: Path,
    device: str,
    batch_size: int,
    crop: int | None,
    above: Sequence[str],
    top: float | None,
    class_name: str | None,
    matches: str | None,
    by: str | None,
    link: bool,
) -> None:
    """`histoldm filter`: a folder of the images that pass, with their list, all scores and contact sheets."""
    network, pictures = load_scorer(scorer, device), read_pictures(images).middle(crop)
    tell(pictures.notes)
    if out.resolve() == images.resolve():
        raise UserError(f"--out {out} is the folder of the images; give another.")
    values_of = None if by is None else pictures.column(by)
    least = parse_above(above)
    begin = {"scorer": network.name, "scorer_sha256": network.identity, "images": images.name, "above": least}
    begin |= {"top": top, "class": class_name, "matches": matches, "by": by, "crop": crop, "count": len(pictures)}
    _check_folder(out, begin)
    scores = score_pictures(network, pictures, batch_size, out / PARTIAL)
    values = merit(network.task, scores.mean(1), pictures, class_name, matches)
    keep = chosen(values, least, top, values_of, str(images))
    write_text(out / SETTINGS, json.dumps(begin, indent=1))
    table = score_table(network.task, scores, pictures).assign(kept_by=values.round(6), kept=keep)
    with whole(out / SCORES) as part:
        table.to_csv(part, index=False)
    rows = np.flatnonzero(keep)
    names = _copied(pictures, rows, out, link)
    listed = [
        {**{k: v for k, v in pictures.about[row].items() if k != "file"}, "scored": table["score"][row]} for row in rows
    ]
    own = pd.DataFrame([{"file": name} | row for name, row in zip(names, listed)])
    with whole(out / LIST) as part:
        own.to_csv(part, index=False)
    ranked = rows[np.argsort(-values[rows], kind="stable")]
    rest = np.flatnonzero(~keep & ~np.isnan(values))
    _sheet(pictures, ranked[evenly(len(ranked), SHOWN)], values, out / "contact_sheet.png")
    if len(rest):
        ranked = rest[np.argsort(-values[rest], kind="stable")]
        _sheet(pictures, ranked[evenly(len(ranked), SHOWN)], values, out / "contact_sheet_rejected.png")
    share, low, high = proportion(len(rows), len(pictures))
    accepted = {"kept": len(rows), "acceptance": [round(v, 5) for v in (share, low, high)]}
    write_text(out / SETTINGS, json.dumps(begin | accepted, indent=1))
    (out / PARTIAL).unlink(missing_ok=True)
    print(f"kept {len(rows)} of {len(pictures)} images in {out}: {share:.1%} [{low:.1%}, {high:.1%}]")
    if values_of is not None:
        for kind in sorted(set(map(str, values_of))):
            of_kind = np.array([str(value) == kind for value in values_of])
            print(f"  {by}={kind}: {int((keep & of_kind).sum())} of {int(of_kind.sum())}")
    say_unreadable(table, pictures)


def _check_folder(out: Path, begin: Mapping[str, Any]) -> None:
    """UserError if `out` holds other things than an earlier run of the same settings, which is done again."""
    if (out / SETTINGS).is_file():
        before = json.loads((out / SETTINGS).read_text())
        if differ := sorted(name for name, value in begin.items() if before.get(name) != json.loads(json.dumps(value))):
            raise UserError(f"{out} holds images kept otherwise ({', '.join(differ)} differ); give another --out.")
    elif files := [name for name in names_in(out) if name != PARTIAL]:
        raise UserError(f"{out} holds other files ({files[0]}, ...); give an --out that is empty or new.")


def _copied(pictures: Pictures, rows: Sequence[int], out: Path, link: bool) -> list[str]:
    """Copy, or hard-link, images into `out`, tiles of stores as PNG; their names there."""
    names = []
    for row in rows:
        own = pictures.about[row]
        name = str(own["file"]) if "file" in own else f"{Path(own['slide']).stem}_{own['row']:06d}.png"
        if Path(name).is_absolute() or ".." in Path(name).parts:  # a list may name images of other folders
            name = f"{row:06d}_{Path(name).name}"
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path, copy = pictures[row].path, os.link if link else shutil.copy2
        if path is None:
            save_real_png(target, pictures.read(row))
        else:
            with whole(target) as part:
                try:
                    shutil.copytree(path, part, copy_function=copy) if path.is_dir() else copy(path, part)
                except OSError as error:
                    if not link:
                        raise
                    raise UserError(f"cannot link {path} into {out}: {error.strerror or error}.") from error
        names.append(name)
    return names


def _sheet(pictures: Pictures, rows: Sequence[int], values: np.ndarray, path: Path) -> None:
    """A contact sheet of images under what they are kept by."""
    images, words = [pictures.read(int(i)) for i in rows], [f"{values[i]:.3f}" for i in rows]
    sheet = contact_sheet(images, labels=words, most=MOST)
    if not any(pictures[int(i)].mark() for i in rows):
        save_real_png(path, sheet)
    else:
        save_png(path, sheet, {"of": LIST})


@owns()
def rate(images: Path, out: Path, count: int, scale: str, seed: int) -> None:
    """`histoldm rate`: numbered contact sheets and a table for people to fill in."""
    pictures, names = read_pictures(images), parse_scale(scale)
    tell(pictures.notes)
    if out.resolve() == images.resolve():
        raise UserError(f"--out {out} is the folder of the images; give another.")
    written = write_rating_folder(pictures, out, count, names, seed)
    print(
        f"wrote {written} images to {out}. Look at contact_sheet_*.png, fill in the column 'rating' of "
        f"{out}/ratings.csv ({', '.join(names)}), then: histoldm train-scorer --data {out}/ratings.csv --out FOLDER"
    )
