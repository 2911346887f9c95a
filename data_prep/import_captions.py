r"""Write images with captions, listed in a table, as tile stores of a cohort; or give slides their captions.

A table has the columns path, text and, if known, modality and patient; commas inside captions need no quotes, and other
names of columns are given as options (see `ldm.tables.captions`). Each table becomes slides/<table>.zarr, and in
index.parquet the columns text, modality and source (the path of the image). With --of-slides the table names slides or
patients that the cohort has tiles of, and all their tiles get its captions. When a run was interrupted, the same
command goes on where it stopped.

Examples:

    python -m data_prep.import_captions --table captions.csv --size 256 \
        --validation 0.1 --out cohort
    python -m data_prep.import_captions --table reports.csv --of-slides \
        --out cohort
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd

from data_prep.options import (
    FilesInOption,
    LicenceOption,
    OutOption,
    SizeOption,
    TestOption,
    ValidationOption,
    choices,
    inputs,
    taken,
)
from ldm.cli.options import PATIENT_RULE
from ldm.cli.script import script
from ldm.data.cohort import counted, merge_index, read_index, split_table, write_store
from ldm.data.extent import tell
from ldm.data.splits import fractions
from ldm.errors import UserError, some
from ldm.images.pictures import Picture, notes_of
from ldm.tables.captions import RESIZES, Caption, CaptionTable, drop_unreadable, read_captions, square

LISTED = 20  # problems that are printed
Resize = choices("Resize", RESIZES)


def import_table(
    table: CaptionTable,
    out: Path | str,
    size: int = 256,
    resize: str = "shorter",
    validation: float | None = None,
    test: float = 0.0,
    licence: str = "",
) -> tuple[pd.DataFrame, str]:
    """Write the images of a table as the store `slides/<table>.zarr` of `out`, and their captions into its index.

    Args:
        size, resize: side of the square tiles, see `ldm.tables.captions.square`.
        validation, test: fractions of the patients (of the images, where the table names none) in these splits; all
            captions of one are in the same.
        licence: of the images; recorded in the store.
    Returns:
        the rows of the index, and what to tell of their splits, or "" (`ldm.data.cohort.split_table`).
    """
    captions, name = table.captions, table.path.stem
    listed = json.dumps([[caption.path, caption.image.stat().st_size] for caption in captions])
    attrs = {
        "tile_size": size,
        "resize": resize,
        "licence": licence,
        "table": table.path.name,
        "images_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }

    def image(i: int) -> np.ndarray:
        return square(Picture.of_file(captions[i].image).pixels(), size, resize)

    write_store(out, name, image, len(captions), attrs=attrs, desc=name)
    rows = pd.DataFrame(
        {
            "slide": name,
            "row": np.arange(len(captions)),
            "patient": [caption.patient or caption.path for caption in captions],
            "text": [caption.text for caption in captions],
            "source": [caption.path for caption in captions],
        }
    )
    if table.has_modality:
        rows["modality"] = [caption.modality for caption in captions]
    instead = "Or --patient names a finer column, or `where` in the config holds out some of the images."
    rows, note = split_table(rows, out, validation, test, instead)
    merge_index(out, rows, (validation, test))
    return rows, note


def caption_slides(table: CaptionTable, out: Path | str) -> str:
    """Give the captions of a table that names slides or patients to all their tiles in the index of `out`.

    A name is that of the slide file, with or without its ending, or the patient's. Returns a report.
    Raises UserError: a slide that gets two captions, or none that gets any.
    """
    index = read_index(out)
    names = index[["slide", "patient"]].drop_duplicates()
    names = names.assign(stem=names["slide"].map(lambda slide: Path(slide).stem))
    owner: dict[str, Caption] = {}
    unknown = []
    for caption in table.captions:
        match = names[(names[["slide", "stem", "patient"]] == caption.path).any(axis=1)]
        if match.empty:
            unknown.append(caption.path)
        for slide in match["slide"]:
            if slide in owner:
                raise UserError(
                    f"{slide} gets a caption from line {owner[slide].line} and from line {caption.line} of "
                    f"{table.path}; leave one of them"
                )
            owner[slide] = caption
    if not owner:
        shown = ", ".join(unknown[:3])
        raise UserError(
            f"none of the {len(unknown)} names in {table.path} ({shown}, ...) is a slide or patient of {out}, which "
            f"has {', '.join(names['slide'][:3])}, ... of {', '.join(names['patient'][:3])}, ..."
        )
    rows = index.loc[index["slide"].isin(owner), ["slide", "row"]]
    rows["text"] = rows["slide"].map(lambda slide: owner[slide].text)
    if table.has_modality:
        rows["modality"] = rows["slide"].map(lambda slide: owner[slide].modality)
    merge_index(out, rows)
    bare = sorted(set(names["slide"]) - set(owner))
    report = [f"{len(rows)} tiles of {len(owner)} slides have captions now"]
    if unknown:
        report.append(f"  {len(unknown)} captions belong to no slide of {out}: {some(unknown, LISTED)}")
    if bare:
        report.append(
            f"  {len(bare)} slides have no caption: {some(bare, LISTED)}; a config leaves them out by `missing: skip`"
        )
    return "\n".join(report)


def list_problems(table: CaptionTable) -> str:
    """The rows that cannot be used, a line each."""
    shown = [f"\n  line {line}: {reason}" for line, reason in table.problems[:LISTED]]
    more = len(table.problems) - len(shown)
    return "".join(shown) + (f"\n  ... and {more} more" if more else "")


def report(rows: pd.DataFrame) -> str:
    """What was written, in a few lines."""
    parts = [f"  splits: {counted(rows['split'])}"]
    if "modality" in rows:
        parts.append(f"  modalities: {counted(rows['modality'].replace('', '(none)'))}")
    words = rows["text"].str.split().str.len()
    parts.append(f"  captions: {rows['text'].nunique()} different ones, {words.min()} to {words.max()} words")
    several = int((rows.groupby("source").size() > 1).sum())
    if several:
        parts.append(f"  {several} images have several captions, each with a tile of its own")
    return "\n".join(parts)


@script("data_prep.import_captions", __doc__)
def main(
    table: Annotated[
        list[Path], inputs("--table", help="Tables of captions, CSV: one or several; each becomes a store.")
    ],
    out: OutOption,
    of_slides: Annotated[
        bool, inputs("--of-slides", help="Read names of slides or patients of --out where paths of images would be.")
    ] = False,
    images: Annotated[
        Path | None, inputs("--images", help="Folder of the images, where relative paths begin (default: the table's).")
    ] = None,
    files_in: FilesInOption = None,
    path_column: Annotated[
        str | None, inputs("--path-column", help="Column of the image's path (default: path, filename, image, ...).")
    ] = None,
    text_column: Annotated[
        str | None, inputs("--text-column", help="Column of the caption (default: text, caption, report, ...).")
    ] = None,
    modality_column: Annotated[
        str | None, inputs("--modality-column", help="Column of the modality (default: modality or modal).")
    ] = None,
    patient: Annotated[
        str | None,
        inputs("--patient", help=f"Whose an image is: a column of the table, {PATIENT_RULE}."),
    ] = None,
    licence: LicenceOption = "",
    size: SizeOption = 256,
    resize: Annotated[
        Resize,
        taken("--resize", help="Scale the shorter side and cut out the middle, or the longer one and pad with black."),
    ] = Resize.shorter,
    skip_bad: Annotated[
        bool, taken("--skip-bad", help="Leave out rows that cannot be used, and list them, instead of stopping.")
    ] = False,
    validation: ValidationOption = None,
    test: TestOption = None,
) -> None:
    validation, test = fractions(out, validation, test)
    if len({path.stem for path in table}) < len(table):
        raise UserError("two tables have the same name, and their stores would have it too; rename one of them")
    tables = []
    for path in table:
        columns = (path_column, text_column, modality_column, patient)
        read = read_captions(path, images, *columns, of_files=not of_slides)
        if not of_slides:
            drop_unreadable(read)
            tell(notes_of(map(Picture.of_file, dict.fromkeys(caption.image for caption in read.captions))))
        total = len(read.captions) + len(read.problems)
        print(f"{path}: {read.form}; {len(read.captions)} of {total} rows can be used")
        if not read.captions:
            raise UserError(f"no row of {path} can be used (--images says where paths begin):{list_problems(read)}")
        if read.problems and not skip_bad:
            raise UserError(
                f"{len(read.problems)} of {total} rows of {path} cannot be used:{list_problems(read)}\n"
                "Correct them, or leave them out with --skip-bad."
            )
        if read.problems:
            print(f"left out:{list_problems(read)}")
        tables.append(read)
    for read in tables:
        if of_slides:
            print(caption_slides(read, out))
            continue
        rows, note = import_table(read, out, size, resize.value, validation, test, licence)
        print(f"{len(rows)} tiles in {out / 'slides' / read.path.stem}.zarr\n{report(rows)}")
        if note:
            print(f"note: {note}")
    print(f"table of all tiles: {out / 'index.parquet'}")


if __name__ == "__main__":
    main.run()
