"""Cut whole-slide images into tile stores.

    python -m data_prep.tile_slides --slides a.svs folder/ --out cohort

writes cohort/slides/<slide>.zarr for each slide and cohort/index.parquet over all of them. An interrupted run goes on
where it stopped when the same command is given again; finished slides are skipped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ldm.data.cohort import check_fractions, patient_of, split_of
from ldm.data.shards import WriterLock
from ldm.data.tile_store import TileStore, TileStoreWriter
from ldm.errors import UserError, run_command
from ldm.files import whole
from ldm.images.slides import Slide, TissueMask, open_slide

# what is taken when a folder is given
SUFFIXES = set(".svs .tif .tiff .ndpi .vms .vmu .scn .mrxs .svslide .bif .czi .dcm .png .jpg .jpeg".split())
_BATCH = 64


def tile_slide(
    path: Path | str,
    out: Path | str,
    *,
    mpp: float | None = None,
    tile_size: int = 256,
    stride: int | None = None,
    min_tissue: float = 0.25,
    keep_background: float = 0.05,
    licence: str = "",
    slide_mpp: float | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Tile one slide into the store `out`/slides/<stem>.zarr and return its path.

    Tiles lie on the lattice that starts at the slide's corner, whole tiles only, row by row. The label `tissue` holds
    each tile's tissue fraction.

    Args:
        path: slide or image file.
        out: cohort folder.
        mpp: micrometres per tile pixel; None is the slide's own. Finer than the slide is refused.
        tile_size, stride: in tile pixels; stride None is the tile size: tiles that touch.
        min_tissue: least tissue fraction of a tile, 0..1; at 0 all tiles are kept.
        keep_background: fraction of the other tiles that is kept, so that models know glass too.
        licence: recorded in the store.
        slide_mpp: micrometres per level-0 pixel, where the header lacks it or is wrong.
        seed: picks the background tiles.
        workers: threads that read the slide; None is up to 8.
    Raises:
        UserError: unreadable slide, no mpp, no tissue, unwritable folder, a store made with other settings.
    """
    for name, value in {"min_tissue": min_tissue, "keep_background": keep_background}.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} is a fraction from 0 to 1, got {value}")
    stride = tile_size if stride is None else stride
    if tile_size < 8 or stride < 1:
        raise UserError(f"tile_size is at least 8 px and stride at least 1, got {tile_size} and {stride}")
    path = Path(path)
    slide = open_slide(path, slide_mpp)
    mpp = slide.mpp if mpp is None else mpp
    if mpp < slide.mpp * 0.99:
        raise UserError(f"{path} has {slide.mpp:g} um per pixel; tiles of {mpp:g} would be blown up. Ask for more mpp")
    downsample = mpp / slide.mpp
    extent = tile_size * downsample
    attrs = {
        "slide": path.name,
        "slide_bytes": path.stat().st_size,
        "mpp": mpp,
        "magnification": slide.magnification,
        "tile_size": tile_size,
        "stride": stride,
        "level0_size": list(slide.dimensions),
        "downsample": downsample,
        "tissue": {"min_tissue": min_tissue, "keep_background": keep_background, "seed": seed},
        "licence": licence,
    }
    store = Path(out) / "slides" / f"{path.stem}.zarr"
    if (store / "zarr.json").exists():
        before = TileStore.open(store, allow_incomplete=True).attrs
        if before["complete"] and all(before.get(name) == value for name, value in attrs.items()):
            return store
    coords, tissue = _choose(slide, extent, stride * downsample, min_tissue, keep_background, seed)

    def read(corner: np.ndarray) -> np.ndarray:
        return slide.read(*corner.tolist(), extent, extent, (tile_size, tile_size))

    workers = workers or min(8, os.cpu_count() or 1)
    with (
        TileStoreWriter.create(store, len(coords), attrs, {"tissue": "f4"}) as writer,
        ThreadPoolExecutor(workers) as pool,
    ):
        start = writer.rows
        with tqdm(total=len(coords), initial=start, desc=f"tiling {path.name}", unit="tile") as bar:
            for first in range(start, len(coords), _BATCH):
                part = slice(first, min(first + _BATCH, len(coords)))
                tiles = np.stack(list(pool.map(read, coords[part])))  # (n, T, T, 3)
                writer.append(tiles, coords[part], {"tissue": tissue[part]})
                bar.update(len(tiles))
    return store


def _choose(
    slide: Slide, extent: float, step: float, min_tissue: float, keep_background: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (n, 2) i4 and tissue fractions (n,) of the tiles to keep."""
    cols, rows = (int((d - extent + 1e-6) // step) + 1 for d in slide.dimensions)
    if cols < 1 or rows < 1:
        raise UserError(f"{slide.path} is {slide.dimensions} px, smaller than one tile of {extent:g} level-0 px")
    y, x = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    coords = np.floor(np.stack([x.ravel(), y.ravel()], 1) * step).astype(np.int32)
    mask = TissueMask(slide)
    tissue = mask.fraction(coords, extent)
    keep = tissue >= min_tissue
    if not keep.any():
        raise UserError(
            f"no tissue found on {slide.path}: no tile has a tissue fraction of {min_tissue:g} or more "
            f"(the most is {tissue.max():.2f}). Is it the right slide? A lower --min-tissue takes more, 0 all tiles"
        )
    keep |= np.random.default_rng(seed).random(len(coords)) < keep_background
    return coords[keep], tissue[keep]


def held_out(coords: np.ndarray, side: float, box: Sequence[float]) -> np.ndarray:
    """Split (N,) of tiles by a held-out box (x, y, width, height): val within it, none across its border, else train.

    coords (N,2) and side are in level-0 pixels. No pixel of a val tile is in a train tile.
    """
    low, high = np.asarray(box[:2]), np.asarray(box[:2]) + np.asarray(box[2:])
    inside = ((coords >= low) & (coords + side <= high)).all(1)
    touching = ((coords < high) & (coords + side > low)).all(1)
    return np.select([inside, touching], ["val", "none"], "train")


def update_index(
    cohort: Path | str,
    validation: float = 0.0,
    test: float = 0.0,
    holdout: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Bring `cohort`/index.parquet up to date with its finished stores: slide, row, x, y, tissue, patient, split.

    Rows of slides that the index knows already stay as they are, with whatever columns and splits a user gave them.

    Args:
        validation, test: fractions of the patients.
        holdout: slide file name -> box (x, y, width, height) in level-0 pixels, see `held_out`.
    Raises:
        UserError: a held-out box without tiles, or of a slide that the index knows with other splits.
    """
    holdout = holdout or {}
    cohort = Path(cohort)
    path = cohort / "index.parquet"
    with WriterLock(cohort / ".lock-index"):
        old = pd.read_parquet(path) if path.exists() else pd.DataFrame({"slide": []})
        tables = []
        for folder in sorted((cohort / "slides").glob("*.zarr")):
            store = TileStore.open(folder, allow_incomplete=True)
            if not store.attrs["complete"]:
                continue
            known = old[old["slide"] == store.slide]
            split: str | np.ndarray = split_of(patient_of(store.slide), validation, test)
            if box := holdout.get(store.slide):
                split = held_out(store.coords, store.tile_size * store.downsample, box)
                if "val" not in split:
                    raise UserError(f"no tile of {store.slide} lies within the held-out box {tuple(box)}")
                if len(known) == len(store) and not np.array_equal(known.sort_values("row")["split"], split):
                    raise UserError(
                        f"{path} gives the tiles of {store.slide} other splits than this held-out box; delete it to "
                        "make them anew, and train again whatever was trained with the old ones"
                    )
            if len(known) == len(store):
                tables.append(known)
                continue
            x, y = store.coords.T
            columns = {"slide": store.slide, "row": np.arange(len(store)), "x": x, "y": y}
            labels = {name: store.labels(name) for name in store.label_names}
            owner = {"patient": patient_of(store.slide), "split": split}
            tables.append(pd.DataFrame(columns | labels | owner))
        if tables:
            with whole(path) as part:
                pd.concat(tables, ignore_index=True).to_parquet(part, index=False)
    return path


def find_slides(paths: Sequence[Path | str]) -> list[Path]:
    """Files given, and slide files of folders given. UserError for none, or for two that would get the same store."""
    slides: list[Path] = []
    for p in map(Path, paths):
        slides += sorted(q for q in p.iterdir() if q.suffix.lower() in SUFFIXES) if p.is_dir() else [p]
    if not slides:
        raise UserError(f"no slide found in {', '.join(map(str, paths))}; known endings: {' '.join(sorted(SUFFIXES))}")
    stems: dict[str, Path] = {}
    for slide in slides:
        if slide.stem in stems:
            raise UserError(f"{stems[slide.stem]} and {slide} would both become {slide.stem}.zarr; rename one of them")
        stems[slide.stem] = slide
    return slides


def box(text: str) -> tuple[int, ...]:
    """x,y,width,height as four whole numbers."""
    values = tuple(int(part) for part in text.split(","))
    if len(values) != 4:
        raise ValueError(text)
    return values


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.tile_slides",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--slides", nargs="+", required=True, metavar="PATH", help="slides, images, or folders of them")
    add("--out", required=True, metavar="FOLDER", help="cohort folder to write")
    add("--mpp", type=float, help="um per tile pixel (default: the slide's own)")
    add("--tile-size", type=int, default=256, help="px (default %(default)s)")
    add("--stride", type=int, help="px between neighbouring tiles (default: the tile size)")
    add("--min-tissue", type=float, default=0.25, help="least tissue fraction of a tile (default %(default)s)")
    add("--keep-background", type=float, default=0.05, help="fraction kept of the other tiles (default %(default)s)")
    add("--licence", default="", help="of the slides; recorded in the stores")
    add("--slide-mpp", type=float, help="um per pixel of the slides, where their headers lack it")
    add("--seed", type=int, default=0, help="picks the background tiles (default %(default)s)")
    add("--workers", type=int, help="threads that read a slide (default: up to 8)")
    add("--validation", type=float, default=0.0, help="fraction of patients in split 'val' (default %(default)s)")
    add("--test", type=float, default=0.0, help="fraction of patients in split 'test' (default %(default)s)")
    add("--holdout", type=box, metavar="X,Y,W,H", help="level-0 px held out of a slide: its tiles are split 'val'")
    args = vars(parser.parse_args(argv))
    holdout = args.pop("holdout")
    slides, out = find_slides(args.pop("slides")), Path(args.pop("out"))
    validation, test = args.pop("validation"), args.pop("test")
    check_fractions(validation, test)
    if holdout is not None and len(slides) > 1:
        raise UserError("--holdout is a box of one slide; for several use --validation and --test (by patient)")
    failures, tiles = [], 0
    for path in slides:
        try:
            tiles += len(TileStore.open(tile_slide(path, out, **args)))
        except UserError as error:
            failures.append(str(error))
            tqdm.write(f"error: {error}", file=sys.stderr)
    if len(failures) < len(slides):
        index = update_index(out, validation, test, {slides[0].name: holdout} if holdout else None)
        print(f"{len(slides) - len(failures)} slides, {tiles} tiles in {out / 'slides'}; table of all tiles: {index}")
    if failures and len(slides) > 1:
        listed = "".join(f"\n  {failure}" for failure in failures)
        raise UserError(f"{len(failures)} of {len(slides)} slides could not be tiled:{listed}")
    if failures:
        raise SystemExit(2)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
