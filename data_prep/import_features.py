r"""Import features, and cut tiles, from the files that CLAM, TRIDENT, STAMP, LazySlide or the like have written.

With --store the tiles of a cohort get the features of the same places. With --slides the tiles of slides are cut where
the files say, as large as they say, and get their features; from files of coordinates alone they are only cut.

Of several features, as in a job folder of TRIDENT or a Zarr of LazySlide, --feature says which; those of whole slides
are left out. Slides and files belong together by name, tiles and features by level-0 coordinates, within half a tile
pixel. A folder of pictures that are named by their coordinates ("Tile_(512,1024).jpg", "a_512_1024.png") counts as a
slide.

Examples:

    python -m data_prep.import_features --slides slides/*.svs \
        --files TRIDENT_JOB --feature uni_v1 --name uni --out cohort
    python -m data_prep.import_features --store cohort \
        --files slides/*.zarr --feature uni2
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from data_prep.cohort_index import tell_splits, update_index
from data_prep.encoder_facts import encoder_attrs, told_of
from data_prep.feature_match import Match, check_distinct, check_slide, extent_of, match, pair, usual_step
from data_prep.options import (
    LicenceOption,
    PatientOption,
    SlideMppOption,
    TestOption,
    ValidationOption,
    choices,
    inputs,
    number,
    output,
    taken,
)
from data_prep.slide_table import find_slides, slide_names, tell_renamed
from ldm.cli.script import script
from ldm.data.cohort import merge_index, read_index, write_store
from ldm.data.extent import tell_scales
from ldm.data.features import nearest_tiles
from ldm.data.slide_files import SlideFiles, find_slide_files
from ldm.data.splits import fractions
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore, open_cohort
from ldm.errors import UserError, note
from ldm.images.kinds import called, images_in
from ldm.images.slides import GIVEN, open_image, open_slide
from ldm.images.tissue import TissueMask

_PLACE = re.compile(r"\((\d+)\s*,\s*(\d+)\)|(?:^|[_-])x?_?(\d+)[_-]y?_?(\d+)$", re.IGNORECASE)
Missing = choices("Missing", ("error", "drop"))


# --- features -> tiles that are there ---------------------------------------------------------------------------------


def import_features(
    stores: Sequence[TileStore],
    found: dict[str, SlideFiles],
    name: str,
    licence: str = "",
    drop_to: Path | None = None,
    patch_size: float | None = None,
) -> list[TileStore]:
    """Write `features/<name>` into stores, and return them; everything is checked first.

    Args:
        drop_to: a new cohort for the tiles that have a feature; None is an error where a tile has none.
    Raises:
        UserError: tiles without a feature, see also `match`, features made otherwise before.
    """
    files = pair([store.path.stem for store in stores], found)
    matches = [match(store, own, patch_size) for store, own in zip(stores, tqdm(files, desc="matching", unit="slide"))]
    for each in matches:
        tqdm.write(each.report())
    without = sum(each.without for each in matches)
    if without and drop_to is None:
        bare = sum(each.without == len(each.rows) for each in matches)
        raise UserError(
            f"{without} of {sum(map(len, stores))} tiles have no feature, among them all tiles of {bare} slides. Leave "
            "them out by --missing drop --out NEW_COHORT, or cut tiles where the features are by --slides. "
            "(data_prep.tile_slides keeps some background, which CLAM and TRIDENT do not.)"
        )
    if coarse := [each for each in matches if each.coarse]:
        first = coarse[0]
        note(
            f"the features of {number(len(coarse), 'slide')} were made of coarser tiles than those of the stores "
            f"({first.files.source}: {first.coarse} px, {first.store.path}: {first.store.tile_size} px over the same "
            "tissue); models conditioned on them see less than the tile shows."
        )
    dims = sorted({each.shape[1] for each in matches if each.files})
    if len(dims) > 1:
        raise UserError(
            f"the files have features of {' and '.join(map(str, dims))} values; give the files of one encoder"
        )
    attrs = encoder_attrs(name, dims[0], licence, told_of([each.files for each in matches if each.files]))
    done = []
    for each in tqdm(matches, desc=f"features {name}", unit="slide"):
        if each.files is None:
            continue
        store = each.store if drop_to is None else _kept(each, drop_to)
        write_features(store, name, each.files.read()[0][each.rows[each.rows >= 0]], attrs)
        done.append(store)
    return done


def _kept(each: Match, cohort: Path) -> TileStore:
    """A copy of a store with the tiles that have a feature, in another cohort."""
    store, kept = each.store, np.flatnonzero(each.rows >= 0)
    own = {k: v for k, v in store.attrs.items() if k not in ("version", "format", "count", "rows", "complete")}
    labels = {name: store.labels(name)[kept] for name in store.label_names}
    new = write_store(
        cohort,
        store.path.stem,
        lambda i: store.tile(int(kept[i])),
        len(kept),
        attrs=own,
        labels=labels,
        coords=store.coords[kept],
        desc=f"keeping {store.path.stem}",
    )
    index = store.path.parent.parent / "index.parquet"
    if index.is_file():
        table = read_index(index.parent)
        table = table[table["slide"] == store.slide].set_index("row").loc[kept]
        merge_index(cohort, table.assign(row=np.arange(len(kept))).reset_index(drop=True))
    return new


def write_features(store: TileStore, name: str, values: np.ndarray, attrs: dict[str, Any]) -> None:
    """Write values (N,D) as features/<name>, float16. Other values under that name are a UserError."""
    rows = values.astype(np.float16)
    if not np.isfinite(rows).all():
        raise UserError(f"{store.slide}: float16 cannot hold features of up to {np.abs(values).max():g}")
    own = {**attrs, "rows_sha256": hashlib.sha256(rows.tobytes()).hexdigest()}
    with ArrayWriter(store.path, f"features/{name}", rows.shape[1:], "f2", own) as writer:
        if not writer.finished:
            writer.append(rows[writer.rows :])


# --- tiles where the files say ----------------------------------------------------------------------------------------


class PictureFolder:
    """A folder of square tiles whose names hold their level-0 x, y."""

    def __init__(self, path: Path):
        self.path = path
        found = [(_PLACE.search(p.stem), p) for p in images_in(path)]
        found = [(place, p) for place, p in found if place]
        self.files = [p for _, p in found]
        self.coords = np.array([[int(n) for n in place.groups() if n] for place, _ in found]).reshape(-1, 2)
        if not self.files:
            raise UserError(f"{path} has no pictures that are named by their coordinates, as Tile_(512,1024).jpg")
        self.size, _ = open_image(self.files[0]).dimensions

    def read(self, i: int, size: int) -> np.ndarray:
        """Picture i as (size,size,3) uint8."""
        image = open_image(self.files[i])
        if image.dimensions != (self.size, self.size):
            given = " x ".join(map(str, image.dimensions))
            raise UserError(f"{self.files[i]} is {given} px; the others are {self.size} x {self.size}")
        return image.read(0, 0, self.size, self.size, (size, size))


def is_picture_folder(path: Path) -> bool:
    """Whether a path is a folder in which most pictures are named by coordinates."""
    if not path.is_dir():
        return False
    names = [p.stem for p in images_in(path)]
    return bool(names) and sum(bool(_PLACE.search(name)) for name in names) > len(names) / 2


def cut(
    path: Path,
    files: SlideFiles,
    out: Path,
    name: str | None,
    *,
    slide_name: str | None = None,
    tile_size: int | None = None,
    patch_size: float | None = None,
    licence: str = "",
    slide_mpp: float | None = None,
    encoder_licence: str = "",
) -> TileStore:
    """Cut the tiles of a slide where its files say, and write their features.

    Args:
        slide_name: what the slide is called; None: as its file or folder is.
        tile_size: pixels of a tile; None is what the files say. patch_size: level-0 pixels that a tile covers, where
            the files do not say.
        licence: of the slide. slide_mpp: micrometres per level-0 pixel, where the slide lacks it.
        encoder_licence: of the features' encoder.
    Raises:
        UserError: extent unknown, coordinates outside the slide, see also `SlideFiles.read` and `open_slide`.
    """
    values, places = files.read()
    if values is not None and name is None:
        raise UserError(f"{files.features} has features; give them a --name, as --name uni")
    slide_name, of_pictures = slide_name or called(path), is_picture_folder(path)
    if of_pictures:
        places = places.in_pixels(slide_mpp, files.source)
        check_distinct(places, files)
        folder = PictureFolder(path)
        extent = extent_of(places, patch_size, files) or float(folder.size)
        tile_size = tile_size or folder.size
        rows = nearest_tiles(folder.coords, places.coords, 0.5)
        if (rows < 0).any():
            lost = folder.files[int(np.flatnonzero(rows < 0)[0])]
            raise UserError(
                f"{(rows < 0).sum()} pictures lie where {files.source} has no tile, the first is {lost}; is it the "
                "file of another slide?"
            )
        print(f"{path.name}: {len(rows)} pictures; {len(places.coords) - len(rows)} places of the file have none")
        coords, mpp, level0, labels = folder.coords, slide_mpp, None, {}
        about = {"magnification": None, "mpp_source": GIVEN if slide_mpp else ""}

        def read(i: int) -> np.ndarray:
            return folder.read(i, tile_size)
    else:
        slide = open_slide(path, slide_mpp)
        places = places.in_pixels(slide.mpp, files.source)
        check_distinct(places, files)
        check_slide(places, slide.dimensions, files, path)
        extent, apart = extent_of(places, patch_size, files), usual_step(places.coords)
        if places.step and apart and apart < 0.75 * places.step:
            raise UserError(
                f"the tiles of {files.source} lie {apart:g} px apart, and by its attributes {places.step:g} level-0 "
                "px: are the coordinates in pixels of a smaller level? Write them in pixels of level 0"
            )
        if extent is None:
            raise UserError(
                f"{files.source} does not say how large its tiles are; give --patch-size in level-0 "
                "pixels, or the folder with the coordinate files (patches/), too"
            )
        tile_size = tile_size or places.size or round(extent)
        coords, rows, level0 = np.rint(places.coords).astype(np.int64), np.arange(len(places.coords)), slide.dimensions
        if (coords < 0).any() or (coords >= level0).any():
            raise UserError(
                f"{files.source} has coordinates from {tuple(coords.min(0).tolist())} to "
                f"{tuple(coords.max(0).tolist())}, but {path} is {level0[0]} x {level0[1]} px; is it the file of "
                "another slide?"
            )
        mpp, about = slide.mpp, slide.about
        labels = {"tissue": TissueMask(slide).fraction(coords, extent).astype(np.float32)}

        def read(i: int) -> np.ndarray:
            return slide.read(*coords[i].tolist(), extent, extent, (tile_size, tile_size))

    downsample = extent / tile_size
    attrs = {
        "slide": slide_name,
        "mpp": None if mpp is None else float(f"{mpp * downsample:.12g}"),  # 0.5, not 0.49999999999999994
        **about,
        "tile_size": tile_size,
        "stride": max(1, round((places.step or _gap(places.coords) or extent) / downsample)),
        "level0_size": None if level0 is None else list(level0),
        "downsample": downsample,
        "licence": licence,
        "coords_sha256": hashlib.sha256(np.ascontiguousarray(coords).tobytes()).hexdigest(),
    }
    if path.is_file():
        attrs["slide_bytes"] = path.stat().st_size
    stem = slide_name if of_pictures else Path(slide_name).stem
    store = write_store(out, stem, read, len(coords), attrs=attrs, coords=coords, labels=labels, desc=f"tiling {stem}")
    if values is not None:
        attrs = encoder_attrs(name, values.shape[1], encoder_licence, told_of([files]))
        write_features(store, name, values[rows], attrs)
    return store


def _gap(coords: np.ndarray) -> float:
    """The least distance of neighbours in x or y, 0 for a single tile."""
    gaps = np.concatenate([np.diff(np.unique(axis)) for axis in np.asarray(coords).T])
    return float(gaps.min()) if len(gaps) else 0.0


def slide_paths(paths: Sequence[Path]) -> dict[Path, str]:
    """Slides, the slides in folders, and folders of pictures as they are, and what each is called."""
    folders = {path: path.name for path in paths if is_picture_folder(path)}
    others = [path for path in paths if path not in folders]
    return folders | (slide_names(find_slides(others)) if others else {})


def cut_all(
    slides: Sequence[Path],
    found: dict[str, SlideFiles],
    out: Path,
    name: str | None,
    validation: float | None,
    test: float,
    patient: str | None = None,
    **settings: str | float | None,
) -> list[TileStore]:
    """Cut all slides that have files, each with the settings of `cut`. UserError if one of them cannot be cut."""
    names, stores, failures = slide_paths(slides), [], []
    tell_renamed(names, out)
    stems = [own if is_picture_folder(path) else Path(own).stem for path, own in names.items()]
    for (path, own), stem, files in zip(names.items(), stems, pair(stems, found)):
        try:
            if files is None:
                raise UserError(f"{path} has no file of its name ({stem}) among --files")
            stores.append(cut(path, files, out, name, slide_name=own, **settings))
        except UserError as error:
            failures.append(str(error))
    if stores:
        path = update_index(out, validation, test, patient=patient)
        instead = "Cut the tiles with data_prep.tile_slides --holdout to hold out a region of a slide."
        print(tell_splits(path, validation, test, instead))
    if failures:
        listed = "".join(f"\n  {failure}" for failure in failures)
        raise UserError(f"{len(failures)} of {len(names)} slides could not be cut:{listed}")
    return stores


@script("data_prep.import_features", __doc__)
def main(
    files: Annotated[
        list[Path],
        inputs("--files", help="Files of CLAM, TRIDENT, STAMP or LazySlide, or their folders: one or several."),
    ],
    feature: Annotated[
        str | None,
        inputs("--feature", help="Which features of the files, where they have several: uni_v1, or their folder."),
    ] = None,
    store: Annotated[
        list[Path] | None,
        inputs("--store", help="Tile stores that get features, or cohorts of stores: one or several."),
    ] = None,
    slides: Annotated[
        list[Path] | None,
        inputs("--slides", help="Slides to cut where the files say, or folders of them: one or several."),
    ] = None,
    slide_mpp: SlideMppOption = None,
    patient: PatientOption = None,
    patch_size: Annotated[
        float | None, inputs("--patch-size", help="Side of a tile in level-0 pixels, where the files do not say it.")
    ] = None,
    out: Annotated[
        Path | None, output("--out", help="Cohort folder to write, for --slides and for --missing drop.")
    ] = None,
    name: Annotated[
        str | None, output("--name", help="Name of the features, best that of their encoder (default: --feature).")
    ] = None,
    licence: LicenceOption = "",
    encoder_licence: Annotated[
        str, output("--encoder-licence", help="Licence of the features' encoder, recorded with them.")
    ] = "",
    tile_size: Annotated[
        int | None, taken("--tile-size", help="Side of the square tiles in pixels (default: what the files say).")
    ] = None,
    missing: Annotated[
        Missing, taken("--missing", help="Tiles without a feature are an error, or left out of the new cohort --out.")
    ] = Missing.error,
    validation: ValidationOption = None,
    test: TestOption = None,
) -> None:
    if bool(store) == bool(slides):
        raise UserError("give either --store, tiles that get features, or --slides, to cut tiles where the files say")
    validation, test = fractions(out, validation, test)
    found = find_slide_files(files, feature)
    name = name or (feature and feature.rpartition("/")[2].removeprefix("features_"))
    if store:
        if not name:
            raise UserError("give the features a name by --name, best that of their encoder, as --name uni")
        if (missing is Missing.drop) != (out is not None):
            raise UserError("--missing drop and --out go together: the tiles that have a feature become a new cohort")
        stores = import_features(open_cohort(store), found, name, encoder_licence, out, patch_size)
    else:
        if out is None:
            raise UserError("--slides needs --out, the cohort folder to write")
        stores = cut_all(
            slides,
            found,
            out,
            name,
            validation,
            test,
            patient=patient,
            tile_size=tile_size,
            patch_size=patch_size,
            licence=licence,
            slide_mpp=slide_mpp,
            encoder_licence=encoder_licence,
        )
    features = f" with features/{name}" if name else ""
    print(f"{sum(map(len, stores))} tiles{features} in {number(len(stores), 'store')}")
    if slides:
        print("\n".join(tell_scales(stores)))


if __name__ == "__main__":
    main.run()
