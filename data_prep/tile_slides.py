r"""Cut whole-slide images into tiles: a tile store per slide, and one table of all tiles.

The cohort folder gets slides/<slide>.zarr for each slide, and index.parquet. Whole tiles only, on a lattice that starts
at the slide's corner; tissue is found by its colour. All slides of a cohort should have one --mpp. When a run was
interrupted, the same command goes on where it stopped; finished slides are skipped.

Examples:

    python -m data_prep.tile_slides --slides slides/ --mpp 0.5 --out cohort
    python -m data_prep.tile_slides --slides a.svs b.svs --mpp 0.5 \
        --validation 0.1 --test 0.1 --out cohort
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from data_prep.batches import ahead
from data_prep.cohort_index import tell_splits, update_index
from data_prep.options import (
    FilesInOption,
    InsideOption,
    JpegQualityOption,
    KeepBackgroundOption,
    LicenceOption,
    MinInsideOption,
    MinTissueOption,
    MppOption,
    OutOption,
    OutsideOption,
    PatientOption,
    Pixels,
    PixelsOption,
    PreviewsOption,
    RegionOriginOption,
    RegionsOption,
    SeedOption,
    SlideMppOption,
    SlidesOption,
    StrideOption,
    TestOption,
    TileSizeOption,
    ValidationOption,
    number,
    speed,
    splits,
)
from data_prep.slide_table import read_slides, tell_renamed
from ldm.cli.script import script
from ldm.data.extent import tell, tell_scales
from ldm.data.slide_tiles import check_quality, slide_file, tell_pixels
from ldm.data.splits import fractions
from ldm.data.store_writers import TileStoreWriter
from ldm.data.tile_store import PIXELS, TOLD, TileStore, as_numbers
from ldm.errors import UserError
from ldm.files import clear_left
from ldm.images.kinds import called
from ldm.images.previews import lacks_previews, preview_files, write_previews
from ldm.images.quality import QUALITY, quality_of, tell_flagged
from ldm.images.slides import Slide, open_slide
from ldm.images.tissue import TissueMask
from ldm.requests.parse import parse_integers
from ldm.tables.geojson import read_geojson
from ldm.tables.regions import LABEL, SlideRegions, check_files, find_regions

JPEG_QUALITY = 90  # where none is said
_BATCH = 32  # tiles that are read at once


def tile_slide(
    path: Path | str,
    out: Path | str,
    *,
    name: str | None = None,
    mpp: float | None = None,
    tile_size: int = 256,
    stride: int | None = None,
    min_tissue: float = 0.25,
    keep_background: float = 0.05,
    licence: str = "",
    slide_mpp: float | None = None,
    slide_mpp_holds: bool = False,
    regions: Path | str | None = None,
    inside: Sequence[str] = (),
    outside: Sequence[str] = (),
    min_inside: float = 0.5,
    region_origin: str | None = None,
    seed: int = 0,
    previews: bool = True,
    pixels: str = "zstd",
    jpeg_quality: int | None = None,
    origin: Path | str | None = None,
    workers: int | None = None,
) -> Path:
    """Tile one slide into the store `out`/slides/<stem of its name>.zarr and return its path.

    Tiles lie on the lattice that starts at the slide's corner, whole tiles only, row by row. Their labels: `tissue`,
    the tissue fraction; `region`, the class of regions that has most of it; and those of `ldm.images.quality`.

    Args:
        path: slide or image file.
        out: cohort folder.
        name: what the slide is called; None: as its file, see `ldm.images.kinds.called`.
        mpp: micrometres per tile pixel; None is the slide's own. Finer than the slide is refused.
        tile_size, stride: in tile pixels; stride None is the tile size: tiles that touch.
        min_tissue: least tissue fraction of a tile, 0..1; at 0 all tiles are kept.
        keep_background: fraction of the other tiles that is kept, so that models know glass too.
        licence: recorded in the store.
        slide_mpp: micrometres per level-0 pixel, where the header lacks it.
        slide_mpp_holds: take them even where the header says others, as a table of slides does.
        regions: GeoJSON of regions on it, or a folder where it lies by the slide's name, see `ldm.tables.geojson`.
        inside, outside: classes of regions to tile, and to leave out. None inside: all of the slide that is not
            outside; neither: all regions.
        min_inside: least fraction of a tile that lies inside and not outside; at 0 regions are labels alone.
        region_origin: what their coordinates count from, see `ldm.tables.regions.SlideRegions`.
        pixels: "zstd" stores tiles without loss, "jpeg" as JPEG of `jpeg_quality`, by default 90, "none" not at all:
            they are read from the slide where they are needed.
        origin: where the slide lies for good, where `path` is a copy for now.
        seed: picks the background tiles.
        previews: write a picture and GeoJSON of tissue and tiles into `out`/previews, see `ldm.images.previews`.
        workers: threads that read the slide; None is up to 8.
    Raises:
        UserError: unreadable slide, no mpp, no tissue, unwritable folder, a store made with other settings, regions
            that are not there or of another slide.
    """
    fractions = {"min_tissue": min_tissue, "keep_background": keep_background, "min_inside": min_inside}
    for fraction, value in fractions.items():
        if not 0 <= value <= 1:
            raise UserError(f"{fraction} is a fraction from 0 to 1; got {value}")
    if (inside or outside) and regions is None:
        raise UserError(f"{', '.join([*inside, *outside])}: classes of regions need a file of them; give regions")
    check_quality(pixels, jpeg_quality)
    jpeg_quality = JPEG_QUALITY if jpeg_quality is None else jpeg_quality
    if pixels not in PIXELS or not 1 <= jpeg_quality <= 100:
        raise UserError(f"pixels are {', '.join(PIXELS)}, JPEG's quality 1 to 100; got {pixels} and {jpeg_quality}")
    stride = tile_size if stride is None else stride
    if tile_size < 8 or stride < 1:
        raise UserError(f"tile_size is at least 8 px and stride at least 1 px; got {tile_size} and {stride}")
    path = Path(path)
    name = name or called(path)
    slide = open_slide(path, slide_mpp, slide_mpp_holds)
    mpp = slide.mpp if mpp is None else mpp
    if mpp < slide.mpp * 0.99:
        raise UserError(
            f"{path} has {slide.mpp:g} µm per pixel; tiles of {mpp:g} would be blown up. Give an mpp of at least "
            f"{slide.mpp:g}"
        )
    downsample = mpp / slide.mpp
    extent = tile_size * downsample
    attrs = {
        "slide": name,
        "slide_bytes": path.stat().st_size,
        "mpp": mpp,
        **slide.about,
        "tile_size": tile_size,
        "stride": stride,
        "level0_size": list(slide.dimensions),
        "downsample": downsample,
        "tissue": {"min_tissue": min_tissue, "keep_background": keep_background, "seed": seed},
        "licence": licence,
        "regions": None,
        "pixels": pixels,
    }
    drawn = None if regions is None else read_geojson(find_regions(regions, name))
    if drawn is not None:
        asked = {"inside": sorted(inside), "outside": sorted(outside), "min_inside": min_inside}
        asked["origin"] = region_origin
        attrs["regions"] = {"file": drawn.path.name, "sha256": drawn.sha256, **asked}
    store = Path(out) / "slides" / f"{Path(name).stem}.zarr"
    if pixels == "jpeg":
        attrs["jpeg_quality"] = jpeg_quality
    if pixels == "none":
        attrs["slide_file"] = slide_file(Path(origin or path), store)
    finished = False
    if (store / "zarr.json").exists():
        begun = TileStore.open(store, allow_incomplete=True)
        before, finished = begun.attrs, begun.attrs["complete"]
        if not finished and (absent := sorted({*QUALITY} - {*begun.label_names})):
            raise UserError(
                f"{store} was begun by version {before.get('version', '?')} of this toolkit, which did not measure "
                f"{', '.join(absent)}; delete it"
            )
        finished &= all(before.get(each) == attrs[each] for each in attrs.keys() - {*TOLD})
    if finished:  # clears what a killed run left, and records where the slide lies now
        now = before | {name: value for name, value in attrs.items() if name == "slide_file"}
        TileStoreWriter.create(store, before["count"], now).close(complete=True)
        for path in preview_files(out, name):
            clear_left(path)
    if finished and not (previews and lacks_previews(out, name)):
        return store
    mask, on_slide = TissueMask(slide), drawn and SlideRegions(drawn, slide, region_origin)
    if finished:
        _preview(store, out, slide, mask, on_slide)
        return store
    if on_slide is not None:
        attrs["notes"] = [*slide.notes, *on_slide.notes, *on_slide.check(inside, outside)]
    coords, labels, texts = choose_tiles(slide, attrs, mask, on_slide)
    attrs |= {"texts": texts} if texts else {}

    def read(part: slice) -> tuple[slice, np.ndarray, dict[str, np.ndarray]]:
        tiles = slide.read_tiles(coords[part], extent, tile_size)
        return part, tiles, quality_of(tiles, mpp)

    dtypes = {label: str(values.dtype) for label, values in labels.items()} | dict.fromkeys(QUALITY, "float32")
    with TileStoreWriter.create(store, len(coords), attrs, dtypes) as writer:
        parts = (slice(first, min(first + _BATCH, len(coords))) for first in range(writer.rows, len(coords), _BATCH))
        with tqdm(total=len(coords), initial=writer.rows, desc=f"tiling {name}", unit="tile", leave=None) as bar:
            for part, tiles, quality in ahead(read, parts, workers or min(8, os.cpu_count() or 1)):
                writer.append(tiles, coords[part], {name: values[part] for name, values in labels.items()} | quality)
                bar.update(len(tiles))
    if previews:
        _preview(store, out, slide, mask, on_slide)
    return store


def choose_tiles(
    slide: Slide, attrs: Mapping[str, Any], mask: TissueMask, drawn: SlideRegions | None
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, list[str]]]:
    """Corners (n, 2) i4 of the tiles that a store with these attributes has, their labels (n,), and the texts of these.

    >>> slide = open_slide(slide_path)
    >>> coords, labels, _ = choose_tiles(slide, store.attrs | {"stride": 128}, TissueMask(slide), None)
    >>> len(coords) > 2 * len(store), list(labels)
    (True, ['tissue'])
    """
    extent, asked = attrs["tile_size"] * attrs["downsample"], attrs.get("regions")
    coords = _lattice(slide, extent, attrs["stride"] * attrs["downsample"])
    labels, wanted = {"tissue": mask.fraction(coords, extent)}, np.ones(len(coords), bool)
    if drawn is not None:
        labels[LABEL] = drawn.labels(coords, extent)
        wanted = drawn.wanted(coords, extent, asked["inside"], asked["outside"], asked["min_inside"])
    keep = _choose(labels["tissue"], wanted, slide, **attrs["tissue"])
    return coords[keep], *as_numbers({label: values[keep] for label, values in labels.items()})


def _preview(store: Path, out: Path | str, slide: Slide, mask: TissueMask, drawn: SlideRegions | None) -> None:
    """Write the previews of a finished store."""
    tiles = TileStore.open(store)
    labels = {label: tiles.labels(label) for label in tiles.label_names}
    side, shapes = tiles.tile_size * tiles.downsample, [*drawn.shapes.values()] if drawn else []
    write_previews(out, tiles.slide, slide, mask, tiles.coords, side, labels, shapes)


def _lattice(slide: Slide, extent: float, step: float) -> np.ndarray:
    """Corners (n, 2) i4 of all whole tiles of a slide, row by row."""
    cols, rows = (int((d - extent + 1e-6) // step) + 1 for d in slide.dimensions)
    if cols < 1 or rows < 1:
        width, height = slide.dimensions
        raise UserError(
            f"{slide.path} is {width} x {height} px, smaller than one tile of {extent:g} level-0 px; ask for a smaller"
        )
    y, x = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    return np.floor(np.stack([x.ravel(), y.ravel()], 1) * step).astype(np.int32)


def _choose(
    tissue: np.ndarray, wanted: np.ndarray, slide: Slide, min_tissue: float, keep_background: float, seed: int
) -> np.ndarray:
    """(n,) bool: which tiles to keep, by their tissue fractions (n,), among those that are wanted (n,) bool."""
    keep = wanted & (tissue >= min_tissue)
    if not keep.any():
        of = "in its regions " if not wanted.all() else ""
        raise UserError(
            f"no tissue found {of}on {slide.path}: no tile {of}has a tissue fraction of {min_tissue:g} or more (the "
            f"most is {tissue[wanted].max():.2f}). Is it the right slide? A lower --min-tissue takes more, 0 all tiles"
        )
    return keep | (wanted & (np.random.default_rng(seed).random(len(tissue)) < keep_background))


@script("data_prep.tile_slides", __doc__)
def main(
    slides: SlidesOption,
    out: OutOption,
    files_in: FilesInOption = None,
    slide_mpp: SlideMppOption = None,
    patient: PatientOption = None,
    licence: LicenceOption = "",
    mpp: MppOption = None,
    tile_size: TileSizeOption = 256,
    stride: StrideOption = None,
    min_tissue: MinTissueOption = 0.25,
    keep_background: KeepBackgroundOption = 0.05,
    seed: SeedOption = 0,
    validation: ValidationOption = None,
    test: TestOption = None,
    holdout: Annotated[
        str | None,
        splits(
            "--holdout",
            help="Box x,y,width,height in level-0 pixels of one slide: tiles inside are split 'val', those across its "
            "border in none.",
        ),
    ] = None,
    regions: RegionsOption = None,
    inside: InsideOption = None,
    outside: OutsideOption = None,
    min_inside: MinInsideOption = 0.5,
    region_origin: RegionOriginOption = None,
    previews: PreviewsOption = True,
    pixels: PixelsOption = Pixels.zstd,
    jpeg_quality: JpegQualityOption = None,
    workers: Annotated[int | None, speed("--workers", help="Threads that read a slide (default: up to 8).")] = None,
) -> None:
    found, box = read_slides(slides), parse_integers(holdout, 4, "--holdout", "x,y,width,height")
    validation, test = fractions(out, validation, test)
    if box is not None and len(found) > 1:
        raise UserError(
            f"--holdout is a box of one slide, and there are {len(found)}; use --validation and --test, which hold out "
            "patients"
        )
    check_quality(pixels.value, jpeg_quality)
    tell_pixels(pixels)
    tell_renamed({entry.path: entry.name for entry in found}, out)
    drawn = {"inside": inside or [], "outside": outside or []}
    check_files([(entry.roi or regions, entry.name) for entry in found if entry.roi or regions], **drawn)
    drawn |= {"regions": regions, "min_inside": min_inside, "region_origin": region_origin and region_origin.value}
    failures, stores = [], []
    asked = {"mpp": mpp, "tile_size": tile_size, "stride": stride, "min_tissue": min_tissue, "seed": seed}
    asked |= {"keep_background": keep_background, "licence": licence, "slide_mpp": slide_mpp, "workers": workers}
    asked |= {"previews": previews, "pixels": pixels.value, "jpeg_quality": jpeg_quality}
    asked |= drawn
    for entry in found:
        try:
            stores.append(TileStore.open(tile_slide(entry.path, out, **asked | entry.settings())))
        except UserError as error:
            if len(found) == 1:
                raise
            failures.append(str(error))
            tqdm.write(f"error: {error}", file=sys.stderr)
    if stores:
        path = update_index(out, validation, test, {found[0].name: box} if box else None, patient, found)
        where = f"{number(len(stores), 'store')} in {out / 'slides'}"
        print(f"{sum(map(len, stores))} tiles in {where}; table of all tiles: {path}")
        print("\n".join(tell_scales(stores)))
        measured = [store for store in stores if {*QUALITY} <= {*store.label_names}]
        labels = {each: np.concatenate([store.labels(each) for store in measured] or [[]]) for each in QUALITY}
        tell([tell_flagged(labels)])
        instead = f"To hold out a region of a slide, delete {path} and give this command again with --holdout."
        print(tell_splits(path, 0.0 if box else validation, test, instead))
    if failures:
        listed = "".join(f"\n  {failure}" for failure in failures)
        raise UserError(f"{len(failures)} of {len(found)} slides could not be tiled:{listed}")


if __name__ == "__main__":
    main.run()
