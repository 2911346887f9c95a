"""The slides that --slides names: files, folders, patterns, or a table that says more of each."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd

from ldm.errors import UserError, note, some
from ldm.foreign.paths import named_in
from ldm.images.dicom import SUFFIX, one_per_series, series_of
from ldm.images.kinds import ENDINGS, called, images_in, is_ome_zarr
from ldm.images.scale import MOST
from ldm.images.slides import open_image
from ldm.tables.text import as_values, read_table

TABLES = (".csv", ".tsv", ".txt")
_PATH = ("path", "wsi", "slide", "slide_path", "filename", "file")  # the column of the files; wsi is TRIDENT's
_SPLITS = ("train", "val", "test", "none")
_NO = ("", "0", "0.0", "no", "false", "n", "f")
_YES = ("1", "1.0", "yes", "true", "y", "t")


@dataclass(frozen=True)
class SlideEntry:
    """A slide, and what a table says of it; what it leaves empty is None or "".

    Attributes:
        path: its file or folder.
        mpp: micrometres per level-0 pixel, which hold even where the slide's header says others.
        patient, split: whose it is; train, val, test or none.
        roi: regions drawn on it, GeoJSON.
        min_tissue, keep_background: as of `tile_slide`, for this slide.
        labels: further columns, which become columns of the cohort's table of tiles.
        name: what it is called, see `slide_names`.
    """

    path: Path
    mpp: float | None = None
    patient: str = ""
    split: str = ""
    roi: Path | None = None
    min_tissue: float | None = None
    keep_background: float | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def settings(self) -> dict[str, Any]:
        """Its name, and what the table says of how it is tiled, as arguments of `tile_slide`.

        >>> SlideEntry(Path("a.svs"), mpp=0.25, name="a.svs").settings()
        {'name': 'a.svs', 'slide_mpp': 0.25, 'slide_mpp_holds': True}
        """
        own = {"name": self.name, "min_tissue": self.min_tissue, "keep_background": self.keep_background}
        own |= {"slide_mpp": self.mpp, "slide_mpp_holds": True} if self.mpp else {}
        own |= {"regions": self.roi}
        return {name: value for name, value in own.items() if value is not None}


def read_slides(given: Sequence[Path | str]) -> list[SlideEntry]:
    """The slides of files, folders, patterns such as "slides/**/*.svs", and tables (CSV, TSV).

    A table has a column path (or wsi, as TRIDENT's; slide; filename), relative to the table's folder, where the files
    lie, or in a folder that `ldm.foreign.paths.files_in` allows; and may have mpp, patient, split, roi, exclude,
    min_tissue and keep_background. exclude holds yes, no or the reason why a slide is left out. Other columns, as
    stain, become labels of the tiles.

    Raises:
        UserError: nothing found, a file that a table names and that is not there, a value out of range, one slide
            twice, a patient in two splits.

    >>> _ = Path("slides.csv").write_text(f"path,stain\\n{slide_path.resolve()},he\\n")
    >>> from ldm.foreign.paths import files_in
    >>> with files_in([slide_path.parent]):
    ...     [(each.path.name, each.labels) for each in read_slides(["slides.csv"])]
    [('CMU-1-Small-Region.svs', {'stain': 'he'})]
    """
    entries: list[SlideEntry] = []
    paths: list[Path] = []
    for each in map(Path, given):
        if each.suffix.lower() in TABLES and each.is_file():
            entries += _of_table(each)
        elif not each.exists() and glob.has_magic(str(each)):
            found = sorted(map(Path, glob.glob(str(each), recursive=True)))
            if not found:
                raise UserError(f"no file matches {each}")
            paths += found
        else:
            paths.append(each)
    known: dict[Path, SlideEntry] = {}
    for entry in entries:
        if known.setdefault(entry.path, entry) is not entry:
            raise UserError(f"{entry.path} is listed twice; leave one of its rows")
    names = slide_names(find_slides([*paths, *known]))
    _check_series(known, names)
    listed = [replace(known.get(path, SlideEntry(path)), name=name) for path, name in names.items()]
    _check_patients(listed)
    return listed


def find_slides(paths: Sequence[Path | str]) -> list[Path]:
    """Files given, and slide files of folders given; of a DICOM series one. UserError for none."""
    slides: list[Path] = []
    for p in map(Path, paths):
        slides += images_in(p) if p.is_dir() and not is_ome_zarr(p) else [p]
    for path in slides:
        path.name.encode()  # as in what is written: `ldm.errors.run_command` tells of one that is not UTF-8
    slides = one_per_series(found := slides)
    if not slides:
        for path in found:  # why a file that was named is none
            open_image(path)
        raise UserError(f"no slide found in {', '.join(map(str, paths))}; slides end in {ENDINGS}")
    return slides


def _check_series(known: Mapping[Path, SlideEntry], taken: Iterable[Path]) -> None:
    """UserError where a table names a file of a DICOM series for which another one stands that it does not name."""
    series = {series_of(path): path for path in taken}
    for path in known:
        stands = series.get(series_of(path)) if path not in series.values() else None
        if stands is not None and stands not in known:
            raise UserError(
                f"{path} is a file of the DICOM series for which {stands} stands, its finest level; name that one in "
                "the table"
            )


def slide_names(slides: Iterable[Path]) -> dict[Path, str]:
    """What each slide is called in a cohort, with its ending; its store is named by it, without.

    That is its file's name; of DICOM series whose files have one name, as exports give it, their folders' before it.
    UserError: two other slides would get the same store.

    >>> slide_names([Path("a.svs"), Path("x/DCM_0.dcm"), Path("y/DCM_0.dcm")])
    {PosixPath('a.svs'): 'a.svs', PosixPath('x/DCM_0.dcm'): 'x_DCM_0.dcm', PosixPath('y/DCM_0.dcm'): 'y_DCM_0.dcm'}
    """
    names = {slide: called(slide) for slide in slides}
    alike = {name: [slide for slide, own in names.items() if own == name] for name in names.values()}
    for name, own in alike.items():
        depth = 0
        while len({names[slide] for slide in own}) < len(own) and Path(name).suffix.lower() == SUFFIX:
            depth += 1
            names |= {slide: "_".join((*slide.resolve().parts[-1 - depth : -1], name)) for slide in own}
    stores: dict[str, Path] = {}
    for slide, name in names.items():
        if (other := stores.setdefault(Path(name).stem, slide)) is not slide:
            raise UserError(f"{other} and {slide} would both become {Path(name).stem}.zarr; rename one of them")
    return names


def tell_renamed(names: Mapping[Path, str], out: Path) -> None:
    """Say which slides are called by their folders too. UserError: the cohort has one of them by its file's name.

    >>> tell_renamed({Path("x/DCM_0.dcm"): "x_DCM_0.dcm", Path("y/DCM_0.dcm"): "y_DCM_0.dcm"}, Path("cohort"))
    """
    renamed = {slide: name for slide, name in names.items() if name != called(slide)}
    for slide in renamed:
        if (store := out / "slides" / f"{slide.stem}.zarr").exists():
            raise UserError(
                f"{store} is of a slide whose file has the name of others given now, and which would be there twice; "
                "delete it and give all of them at once"
            )
    if renamed:
        slide, name = next(iter(renamed.items()))
        note(f"{len(renamed)} DICOM series have files of one name; they are called by folder, as {slide} is {name}")


def _of_table(path: Path) -> list[SlideEntry]:
    table = read_table(path)
    names = {name.strip().lower(): name for name in table.columns}
    column = next((names[name] for name in _PATH if name in names), None)
    if column is None:
        raise UserError(
            f"{path} has no column of slides; call it path (or {', '.join(_PATH[1:])}). Its columns: "
            f"{some(list(table.columns))}"
        )
    known = ("mpp", "patient", "split", "roi", "exclude", "min_tissue", "keep_background")
    of = {name: names[name] for name in known if name in names}
    others = [name for name in table.columns if name != column and name not in of.values()]
    for name in others:
        if meant := get_close_matches(name.lower(), known, n=1, cutoff=0.75):
            note(f"{path}: the column '{name}' becomes a label of the tiles; did you mean '{meant[0]}'?")
    if table[column].isna().any():
        raise UserError(f"{path} has {int(table[column].isna().sum())} rows without a slide in '{column}'")
    typed = {name: as_values(table[name], path) for name in others}
    numbers = {name: _numbers(table[of[name]], path) for name in ("mpp", "min_tissue", "keep_background") if name in of}
    entries, left, missing = [], [], []
    reasons = [_cell(row, of, "exclude").lower() for _, row in table.iterrows()]
    taken = table[[reason in _NO for reason in reasons]]
    named_in(path, [*taken[column], *(taken[of["roi"]].dropna() if "roi" in of else [])])
    for i, row in table.iterrows():
        file = path.parent / str(row[column])
        reason = _cell(row, of, "exclude")
        if reason.lower() not in _NO:
            left.append(f"{file.name}{'' if reason.lower() in _YES else f': {reason}'}")
            continue
        if not file.exists():
            missing.append(str(file))
            continue
        roi = _cell(row, of, "roi")
        split = _cell(row, of, "split")
        if split and split not in _SPLITS:
            raise UserError(f"{path}: {file.name} has the split '{split}'; splits are {', '.join(_SPLITS)}")
        region = path.parent / roi if roi else None
        if region and not region.exists():
            missing.append(str(region))
        own = {name: float(values[i]) for name, values in numbers.items() if pd.notna(values[i])}
        _check_numbers(own, file, path)
        labels = {name: values[i] for name, values in typed.items()}
        entry = SlideEntry(file, patient=_cell(row, of, "patient"), split=split, labels=labels, **own)
        entries.append(entry if not roi else SlideEntry(**{**vars(entry), "roi": region}))
    if missing:
        raise UserError(f"{path} names {len(missing)} files that are not there: {some(missing, 3)}")
    if left:
        note(f"{path} leaves out {len(left)} of {len(table)} slides ({some(left, 5)})")
    if not entries:
        raise UserError(f"{path} leaves out all of its {len(table)} slides")
    return entries


def _cell(row: pd.Series, of: Mapping[str, str], name: str) -> str:
    value = row[of[name]] if name in of else None
    return "" if value is None or pd.isna(value) else str(value).strip()


def _numbers(column: pd.Series, path: Path) -> pd.Series:
    values = as_values(column, path)
    if not pd.api.types.is_numeric_dtype(values) and values.notna().any():
        wrong = next(cell for cell in values.dropna() if not pd.notna(pd.to_numeric(cell, errors="coerce")))
        raise UserError(f"{path}: '{wrong}' in the column {column.name} is no number")
    return values


def _check_numbers(own: Mapping[str, float], file: Path, path: Path) -> None:
    if not 0 < own.get("mpp", 1) <= MOST:
        raise UserError(f"{path}: {file.name} has mpp {own['mpp']:g}; it is above 0 and up to {MOST:g}")
    for name in ("min_tissue", "keep_background"):
        if not 0 <= own.get(name, 0) <= 1:
            raise UserError(f"{path}: {file.name} has {name} {own[name]:g}; it is a fraction from 0 to 1")


def _check_patients(entries: Iterable[SlideEntry]) -> None:
    splits: dict[str, tuple[str, Path]] = {}
    for entry in entries:
        if not entry.patient or not entry.split:
            continue
        split, path = splits.setdefault(entry.patient, (entry.split, entry.path))
        if split != entry.split:
            raise UserError(
                f"patient {entry.patient} is in split '{split}' by {path.name} and in '{entry.split}' by "
                f"{entry.path.name}; slides of one patient belong in one split"
            )
