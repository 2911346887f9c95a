"""Images with captions, listed in a table, as tile stores of a cohort.

    python -m data_prep.import_captions --table captions.csv --out cohort --size 256

reads `path, Text, modality` tables (commas inside captions need no quotes) and CSV with any columns, see
`ldm.tables.captions`. It writes cohort/slides/<table>.zarr and, into cohort/index.parquet, the columns text, modality
(where the table has it) and source (the image's path). An interrupted run goes on where it stopped.

    python -m data_prep.import_captions --table reports.csv --of-slides --out cohort

reads captions of slides, or of patients, that `cohort` has tiles of, and writes them into its index for every tile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.data.cohort import check_fractions, counted, merge_index, read_index, split_table, write_store
from ldm.errors import UserError, run_command, some
from ldm.tables.captions import RESIZES, Caption, CaptionTable, drop_unreadable, open_image, read_captions, square

LISTED = 20  # problems that are printed


def import_table(
    table: CaptionTable, out: Path | str, size: int = 256, resize: str = "shorter", validation: float | None = None,
    test: float = 0.0, licence: str = "",
) -> tuple[pd.DataFrame, str]:  # fmt: skip
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
        "tile_size": size, "resize": resize, "licence": licence, "table": table.path.name,
        "images_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }  # fmt: skip

    def image(i: int) -> np.ndarray:
        return square(open_image(captions[i].image), size, resize)

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
    instead = "Or --patient-column names a finer column, or `where` in the config holds out some of the images."
    rows, note = split_table(rows, out, validation, test, instead)
    merge_index(out, rows)
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
                    f"{table.path}; leave one"
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
        report.append(f"  {len(unknown)} captions are of no slide of {out}: {some(unknown, LISTED)}")
    if bare:
        report.append(f"  {len(bare)} slides have no caption: {some(bare, LISTED)}; `missing: skip` leaves them out")
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.import_captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", nargs="+", required=True, type=Path, metavar="CSV", help="caption tables; each becomes a store")
    add("--out", required=True, type=Path, metavar="FOLDER", help="cohort folder to write")
    add("--of-slides", action="store_true", help="the table names slides or patients of --out instead of images")
    add("--images", type=Path, metavar="FOLDER", help="where relative image paths start (default: the table's folder)")
    add("--size", type=int, default=256, help="side of the tiles in px (default %(default)s)")
    add("--resize", choices=RESIZES, default="shorter",
        help="shorter: scale the shorter side and cut out the middle; pad: scale the longer side, pad with black "
        "(default %(default)s)")  # fmt: skip
    add("--path-column", metavar="NAME", help="column of the image path (default: path, filename, image, ...)")
    add("--text-column", metavar="NAME", help="column of the caption (default: text, caption, report, ...)")
    add("--modality-column", metavar="NAME", help="column of the modality (default: modality or modal)")
    add("--patient-column", metavar="NAME", help="column of the patient; splits keep patients together")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be used, instead of stopping")
    add("--validation", type=float, help="fraction of patients in split 'val' (default: 0.1 of three or more)")
    add("--test", type=float, default=0.0, help="fraction of patients in split 'test' (default %(default)s)")
    add("--licence", default="", help="of the images; recorded in the stores")
    args = parser.parse_args(argv)
    if args.size < 8:
        raise UserError(f"--size {args.size}: tiles are at least 8 px")
    check_fractions(args.validation, args.test)
    if len({path.stem for path in args.table}) < len(args.table):
        raise UserError("two tables have the same name, which is that of their store; rename one of them")
    tables = []
    for path in args.table:
        columns = (args.path_column, args.text_column, args.modality_column, args.patient_column)
        table = read_captions(path, args.images, *columns, of_files=not args.of_slides)
        if not args.of_slides:
            drop_unreadable(table)
        total = len(table.captions) + len(table.problems)
        print(f"{path}: {table.form}; {len(table.captions)} of {total} rows can be used")
        if not table.captions:
            raise UserError(f"no row of {path} can be used (--images says where paths start):{list_problems(table)}")
        if table.problems and not args.skip_bad:
            raise UserError(
                f"{len(table.problems)} of {total} rows of {path} cannot be used:{list_problems(table)}\n"
                "Correct them, or leave them out with --skip-bad."
            )
        if table.problems:
            print(f"left out:{list_problems(table)}")
        tables.append(table)
    for table in tables:
        if args.of_slides:
            print(caption_slides(table, args.out))
            continue
        rows, note = import_table(table, args.out, args.size, args.resize, args.validation, args.test, args.licence)
        print(f"{len(rows)} tiles in {args.out / 'slides' / table.path.stem}.zarr\n{report(rows)}")
        if note:
            print(f"note: {note}")
    print(f"table of all tiles: {args.out / 'index.parquet'}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
