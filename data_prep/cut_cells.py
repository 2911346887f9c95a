"""Cells as tiles: squares around their centres, out of slides or of crops, each source into one tile store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from ldm.data.cohort import write_store
from ldm.data.splits import UNKNOWN, patient_of
from ldm.errors import UserError
from ldm.images.slides import Slide, open_image, open_slide
from ldm.tables.annotations import Cell


def cell_corner(x: float, y: float, extent: float) -> tuple[int, int]:
    """Upper left corner, whole level-0 pixels, of the square of side `extent` around (x, y)."""
    return math.floor(x - extent / 2 + 0.5), math.floor(y - extent / 2 + 0.5)


def cut_cell(slide: Slide, x: float, y: float, size: int, downsample: float = 1.0) -> np.ndarray:
    """The square of size * downsample level-0 pixels around (x, y) as (size, size, 3) uint8.

    What lies beyond the slide is the mirror image of what lies inside, so that the cell stays in the middle.
    """
    extent = size * downsample
    left, top = cell_corner(x, y, extent)
    width, height = slide.dimensions
    right, bottom = math.ceil(left + extent), math.ceil(top + extent)
    if left >= 0 and top >= 0 and right <= width and bottom <= height:
        return slide.read(left, top, extent, extent, (size, size))
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    inside = slide.read(x0, y0, x1 - x0, y1 - y0)
    around = np.pad(inside, ((y0 - top, bottom - y1), (x0 - left, right - x1), (0, 0)), mode="reflect")
    if downsample == 1:
        return around
    return np.asarray(Image.fromarray(around).resize((size, size), Image.Resampling.LANCZOS, (0, 0, extent, extent)))


def cut_slides(
    cells: Sequence[Cell],
    table: pd.DataFrame,
    paths: dict[str, Path],
    out: Path,
    attrs: dict[str, object],
    size: int,
    mpp: float | None,
    slide_mpp: float | None,
) -> tuple[pd.DataFrame, int]:
    """Write a store for each slide of `table`; the table of what was written, and how many crops were mirrored."""
    written, mirrored = [], 0
    for name, rows in tqdm(list(table.groupby("slide")), desc="slides", unit="slide"):
        slide = open_slide(paths[name], slide_mpp)
        downsample = downsample_to(slide, mpp)
        x, y = (np.array([getattr(cells[i], axis) for i in rows["cell"]]) for axis in "xy")
        rows = rows.iloc[np.lexsort([x, y])]  # neighbours one after the other: slides are read faster
        own = [cells[i] for i in rows["cell"]]
        extent = size * downsample
        coords = np.array([cell_corner(cell.x, cell.y, extent) for cell in own], np.int32)
        mirrored += int(((coords < 0) | (coords + extent > slide.dimensions)).any(1).sum())

        def image(i: int, slide=slide, own=own, downsample=downsample) -> np.ndarray:
            return cut_cell(slide, own[i].x, own[i].y, size, downsample)

        about = {"slide": name, "mpp": slide.mpp * downsample, **slide.about}
        about |= {"tile_size": size, "level0_size": list(slide.dimensions), "downsample": downsample}
        _write(out, paths[name].stem, image, coords, own, {**attrs, **about})
        written.append(rows.assign(row=range(len(rows))))
    return pd.concat(written, ignore_index=True), mirrored


def cut_crops(
    cells: Sequence[Cell],
    table: pd.DataFrame,
    folder: Path,
    out: Path,
    attrs: dict[str, object],
    size: int,
    mpp: float | None,
    slide_mpp: float | None,
) -> pd.DataFrame:
    """Write the middle of each crop into one store; the table of what was written, with the column `file`."""
    own = [cells[i] for i in table["cell"]]
    first = open_image(folder / own[0].slide, slide_mpp)
    slide_mpp = first.mpp or None
    if mpp is not None and slide_mpp is None:
        raise UserError("--mpp needs the resolution of the crops, which their files do not say: give it by --slide-mpp")
    downsample = mpp / slide_mpp if mpp else 1.0
    if downsample < 0.99:
        raise UserError(
            f"the crops have {slide_mpp:g} µm per pixel; cells of {mpp:g} would be blown up. Give an mpp of at least "
            f"{slide_mpp:g}"
        )
    extent = math.ceil(size * downsample)
    for cell in own:
        if min(cell.x, cell.y) * 2 < extent:
            raise UserError(
                f"{folder / cell.slide} is {cell.x * 2:g} x {cell.y * 2:g} px, and a cell of {size} px takes {extent} "
                "of them; give a smaller --size"
            )

    def image(i: int) -> np.ndarray:
        return cut_cell(open_image(folder / own[i].slide), own[i].x, own[i].y, size, downsample)

    attrs = {**attrs, "tile_size": size, "mpp": slide_mpp * downsample if slide_mpp else None, "downsample": downsample}
    attrs |= first.about
    name = folder.resolve().name
    _write(out, name, image, np.zeros((len(own), 2), np.int32), own, attrs)
    # without a word on the patient each crop was split as one of its own, called like its file
    alone = [not cell.patient and patient_of(Path(cell.slide).name) for cell in own]
    known = [UNKNOWN if owner == name else owner for owner, name in zip(table["patient"], alone)]
    return table.rename(columns={"slide": "file"}).assign(slide=name, row=range(len(own)), patient=known)


def _write(
    out: Path,
    name: str,
    images: Callable[[int], np.ndarray],
    coords: np.ndarray,
    cells: Sequence[Cell],
    attrs: dict[str, object],
) -> None:
    """One store. Its attrs tell the choice of cells by a hash, so that it goes on only with the same."""
    listed = "\n".join(f"{cell.slide} {cell.x:g} {cell.y:g}" for cell in cells)
    attrs = {**attrs, "cells": hashlib.sha256(listed.encode()).hexdigest()}
    write_store(out, name, images, len(cells), attrs=attrs, coords=coords, desc=name)


def downsample_to(slide: Slide, mpp: float | None) -> float:
    """Level-0 pixels of a slide for one of `mpp`; 1 where that is None. UserError if cells would be enlarged."""
    if mpp is not None and mpp < slide.mpp * 0.99:
        raise UserError(
            f"{slide.path} has {slide.mpp:g} µm per pixel; cells of {mpp:g} would be blown up. Give an mpp of at least "
            f"{slide.mpp:g}"
        )
    return mpp / slide.mpp if mpp else 1.0
