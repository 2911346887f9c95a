r"""Write the places and features of tiles in the files of CLAM, TRIDENT, STAMP or LazySlide, to go on there.

clam: patches/, h5_files/ and pt_files/. trident: a job folder, <magnification>x_<size>px_<overlap>px_overlap/ with
patches/ and features_<name>/. stamp: <name>/<slide>.h5, in micrometres. wsidata: <slide>.zarr (SpatialData), for
`wsidata.open_wsi(slide, store=OUT)`. Each says how large tiles are and where, as these tools check it, and in the
attribute `histoldm` encoder, licence and weights. data_prep.import_features reads them all.

Several features go one after the other into one folder. A Zarr that LazySlide wrote gets them as a table more, if its
tiles are the store's. What is there already is left if it is the same, and is an error if it is not.

Examples:

    python -m data_prep.export_features --store cohort \
        --feature uni --to trident --name uni_v1 --out job
    python -m data_prep.export_features --store cohort \
        --feature uni --to wsidata --out zarr
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import h5py
import numpy as np
from tqdm import tqdm

from data_prep.options import choices, inputs, number, output
from ldm.cli.script import script
from ldm.data.slide_files import SlideFiles, told_in
from ldm.data.spatial_zarr import add_features, ids_of_tiles, mpp_of_slide, write_spatial
from ldm.data.tile_store import TileStore, open_cohort
from ldm.errors import UserError, some, suggest
from ldm.files import owns, tool_version, whole, writable_folder

MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))  # TRIDENT's: below this mpp, this


@dataclass(frozen=True)
class Exported:
    """The tiles of a store and their features, as they are written.

    Attributes:
        name: of the features. values: (N, D) float16; None for tiles alone. about: what is told of them.
    """

    store: TileStore
    name: str
    values: np.ndarray | None
    about: dict[str, Any]

    @property
    def slide(self) -> str:
        return self.store.path.stem

    @property
    def coords(self) -> np.ndarray:
        return self.store.coords.astype(np.int64)  # (N, 2) level-0 x, y

    @property
    def extent(self) -> int:
        """Level-0 pixels that a tile covers along each side."""
        return round(self.store.tile_size * self.store.downsample)

    @property
    def told(self) -> dict[str, str]:
        return {"histoldm": json.dumps(self.about)}


def magnification(mpp: float) -> float:
    """What TRIDENT calls a resolution in micrometres per pixel.

    >>> magnification(0.499), magnification(0.25), magnification(4.0)
    (20, 40, 2.5)
    """
    return next((named for below, named in MAGNIFICATIONS if mpp < below), 10 / mpp)


def write_h5(
    path: Path, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any] = {}
) -> None:
    """Write arrays, their attributes by name, and the file's own, whole or not at all.

    >>> write_h5(Path("a.h5"), {"coords": np.zeros((1, 2))}, {"coords": {"patch_size": 256}})
    >>> int(h5py.File("a.h5")["coords"].attrs["patch_size"])
    256
    """
    writable_folder(path.parent)
    with whole(path) as part, h5py.File(part, "w") as file:
        file.attrs.update(own)
        for name, values in arrays.items():
            file[name] = values
            file[name].attrs.update(attrs.get(name, {}))


def _write_patches(path: Path, what: Exported, attrs: Mapping[str, Any]) -> None:
    """Write coordinates, or see that those which are there, for other features, are the same."""
    if not path.exists():
        return write_h5(path, {"coords": what.coords}, {"coords": attrs})
    places = SlideFiles(what.slide, None, path).read()[1]
    if not np.array_equal(places.coords, what.coords) or abs((places.extent or 0) / what.extent - 1) > 0.01:
        raise UserError(f"{path} has other tiles than {what.store.path}; choose another --out.")


class Clam:
    """A tile is a patch of level 0, as large as it is there, so that CLAM needs no level of the tile's resolution."""

    scaled, alone = False, True

    def tiles(self, out: Path, what: Exported) -> Path:
        path = out / "patches" / f"{what.slide}.h5"
        attrs = {"patch_size": what.extent, "patch_level": 0, "downsample": (1.0, 1.0), "name": what.slide}
        if size := what.store.attrs.get("level0_size"):
            attrs |= {"level_dim": tuple(size), "downsampled_level_dim": tuple(size)}
        _write_patches(path, what, attrs | {"save_path": str(path.parent)})
        return path

    def place(self, out: Path, what: Exported) -> Path:
        return out / "h5_files" / f"{what.slide}.h5"

    def features(self, out: Path, what: Exported) -> None:
        import torch

        features = what.values.astype(np.float32)
        writable_folder(out / "pt_files")
        with whole(out / "pt_files" / f"{what.slide}.pt") as part:
            torch.save(torch.from_numpy(features), part)
        arrays = {"features": features, "coords": what.coords.astype(np.int32)}
        write_h5(self.place(out, what), arrays, {"features": what.told})

    def hint(self, out: Path, places: Sequence[Path]) -> str:
        return f"CLAM reads them with --data_root_dir {out} (train) or --data_h5_dir {out} (extract)."


class Trident:
    """A job folder."""

    scaled, alone = True, True

    def _folder(self, out: Path, what: Exported) -> Path:
        size, overlap = what.store.tile_size, what.store.tile_size - what.store.stride
        return out / f"{magnification(what.store.mpp):g}x_{size}px_{overlap}px_overlap"

    def _attrs(self, out: Path, what: Exported) -> dict[str, Any]:
        store = what.store
        level0 = magnification(mpp_of_slide(store))
        target = level0 / store.downsample
        attrs = {
            "patch_size": store.tile_size, "patch_size_level0": what.extent, "level0_magnification": level0,
            "target_magnification": round(target) if abs(target - round(target)) < 1e-6 else target,
            "overlap": store.tile_size - store.stride, "name": what.slide, "savetodir": str(self._folder(out, what)),
        }  # fmt: skip
        if size := store.attrs.get("level0_size"):
            attrs |= {"level0_width": size[0], "level0_height": size[1]}
        return attrs

    def tiles(self, out: Path, what: Exported) -> Path:
        path = self._folder(out, what) / "patches" / f"{what.slide}_patches.h5"
        _write_patches(path, what, self._attrs(out, what))
        return path

    def place(self, out: Path, what: Exported) -> Path:
        return self._folder(out, what) / f"features_{what.name}" / f"{what.slide}.h5"

    def features(self, out: Path, what: Exported) -> None:
        place = self.place(out, what)
        made = {"name": what.slide, "savetodir": str(place.parent), "encoder": what.name, **what.told}
        arrays = {"features": what.values.astype(np.float32), "coords": what.coords}
        write_h5(place, arrays, {"features": made, "coords": self._attrs(out, what)})

    def hint(self, out: Path, places: Sequence[Path]) -> str:
        folders = sorted({path.parent.parent.name for path in places})
        return f"TRIDENT goes on with --job_dir {out} --coords_dir {' or '.join(folders)}."


class Stamp:
    """Without STAMP's version and code hash, which say which code of STAMP made a file; it reads files without them."""

    scaled, alone = True, False

    def tiles(self, out: Path, what: Exported) -> Path:
        return self.place(out, what)  # they are in the same file

    def place(self, out: Path, what: Exported) -> Path:
        return out / what.name / f"{what.slide}.h5"

    def features(self, out: Path, what: Exported) -> None:
        store = what.store
        coords = (what.coords * mpp_of_slide(store)).astype(np.float32)
        attrs = {
            "unit": "um", "tile_size_um": store.tile_size * store.mpp, "tile_size_px": store.tile_size,
            "extractor": what.name, "feat_type": "tile",
        }  # fmt: skip
        write_h5(self.place(out, what), {"coords": coords, "feats": what.values}, {"feats": what.told}, attrs)

    def hint(self, out: Path, places: Sequence[Path]) -> str:
        return f"STAMP reads them with feature_dir: {places[0].parent}."


class Wsidata:
    """SpatialData Zarr. What is there already may be LazySlide's own, if its tiles are the same."""

    scaled, alone = False, True

    def tiles(self, out: Path, what: Exported) -> Path:
        path = out / f"{what.slide}.zarr"
        if path.exists():
            ids_of_tiles(path, what.store)
        else:
            writable_folder(out)
            with whole(path) as part:
                write_spatial(part, what.store)
        return path

    def place(self, out: Path, what: Exported) -> Path:
        return out / f"{what.slide}.zarr" / "tables" / f"{what.name}_tiles"

    def features(self, out: Path, what: Exported) -> None:
        add_features(out / f"{what.slide}.zarr", what.store, what.name, what.values, what.about)

    def hint(self, out: Path, places: Sequence[Path]) -> str:
        return f'LazySlide reads them with wsidata.open_wsi(slide, store="{out}").'


class Tool(Protocol):
    """How another tool's files are written.

    tiles: write the places of tiles, or see that those which are there are the same. place: where features are, which
    `features` writes. hint: how the tool reads them.
    scaled: micrometres per pixel must be known. alone: tiles go without features, too.
    """

    scaled: bool
    alone: bool

    def tiles(self, out: Path, what: Exported) -> Path: ...
    def place(self, out: Path, what: Exported) -> Path: ...
    def features(self, out: Path, what: Exported) -> None: ...
    def hint(self, out: Path, places: Sequence[Path]) -> str: ...


TOOLS: dict[str, Tool] = {"clam": Clam(), "trident": Trident(), "stamp": Stamp(), "wsidata": Wsidata()}
To = choices("To", TOOLS)


@owns()
def export_features(
    stores: Sequence[TileStore], to: str, out: Path, feature: str | None = None, name: str | None = None
) -> list[Path]:
    """Write the tiles of stores and their features as another tool reads them; everything is checked first.

    Args:
        to: clam, trident, stamp or wsidata. out: the folder.
        feature: which features of the stores; None is the only one there is. Of stores without any the tiles are
            written alone. name: what the files call them.
    Returns:
        the file of each slide, for wsidata its Zarr.
    Raises:
        UserError: no such features, features that are no vectors, tiles without places or scale, two stores of one
            name, other files of that name.

    >>> export_features([store], "trident", Path("job"))
    [PosixPath('job/20x_256px_0px_overlap/patches/CMU-1-Small-Region_patches.h5')]
    """
    if to not in TOOLS:
        raise UserError(f"there is no tool '{to}' to write files for{suggest(to, TOOLS)}")
    tool, feature = TOOLS[to], feature or _only_feature(stores)
    name = name or feature or ""
    if name != Path(name).name:
        raise UserError(f"--name {name} cannot name a file; give one without '/'.")
    for store in stores:
        _check(store, feature, to)
    stems = Counter(store.path.stem for store in stores)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise UserError(f"several stores are of slides of one name ({some(twice, 3)}); export them to several folders.")
    written = []
    for store in tqdm(stores, desc=f"{feature or 'tiles'} for {to}", unit="slide"):
        what = _exported(store, feature, name)
        written.append(tool.tiles(out, what))
        if feature is None:
            continue
        if to != "wsidata":
            written[-1] = tool.place(out, what)
        if not tool.place(out, what).exists():
            tool.features(out, what)
        elif told_in(written[-1], name) != what.about:
            raise UserError(
                f"{tool.place(out, what)} is there already and holds something else than {feature} of {store.path}; "
                "choose another --out or --name, or delete it."
            )
    return written


def _only_feature(stores: Sequence[TileStore]) -> str | None:
    """The features that all stores have; None where no store has any. UserError where it is not clear."""
    common = sorted(set.intersection(*(set(store.feature_names) for store in stores)))
    if len(common) == 1:
        return common[0]
    known = sorted({name for store in stores for name in store.feature_names})
    if not known:
        return None
    held = f"the features {', '.join(common)}" if common else f"no features in common ({', '.join(known)})"
    raise UserError(f"the {number(len(stores), 'store')} have {held}; say which by --feature.")


def _check(store: TileStore, feature: str | None, to: str) -> None:
    """UserError unless a store's tiles and features can be written."""
    tool = TOOLS[to]
    if feature is None and not tool.alone:
        raise UserError(
            f"{store.path} has no features, and {to} has no files of tiles alone; make some with "
            "`python -m data_prep.extract_features`."
        )
    if feature is not None:
        array = store.features(feature)
        if array.ndim != (3 if array.attrs.get("dihedral") else 2):
            raise UserError(f"features/{feature} of {store.path} are no vectors but {array.shape[1:]}; {to} has none.")
    if len(np.unique(store.coords, axis=0)) < len(store):
        raise UserError(f"tiles of {store.path} lie in one place, so it is of images rather than of a slide.")
    if tool.scaled and store.mpp is None:
        raise UserError(
            f"the micrometres per pixel of {store.path} are not known, and {to} needs them; cut the tiles with "
            "--slide-mpp."
        )


def _exported(store: TileStore, feature: str | None, name: str) -> Exported:
    about = {
        "slide": store.slide, "slide_licence": store.attrs.get("licence", ""), "mpp": store.mpp,
        "tile_size": store.tile_size, "stride": store.stride, "downsample": store.downsample,
    }  # fmt: skip
    if feature is None:
        return Exported(store, name, None, about)
    array = store.features(feature)
    values = np.asarray(array[:])
    values = values[:, 0] if values.ndim == 3 else values  # of eight orientations the tile's own
    digest = hashlib.sha256(store.coords.tobytes() + values.tobytes()).hexdigest()
    kept = {key: value for key, value in array.attrs.items() if key not in ("rows", "dihedral", "rows_sha256")}
    about |= {**kept, "name": name, "sha256": digest, "tool": f"histoldm {tool_version()}"}
    return Exported(store, name, values, json.loads(json.dumps(about)))


@script("data_prep.export_features", __doc__)
def main(
    store: Annotated[list[Path], inputs("--store", help="Tile stores, or cohorts of stores: one or several.")],
    to: Annotated[To, output("--to", help="The tool whose files are written.")],
    out: Annotated[Path, output("--out", help="Folder to write the files into.")],
    feature: Annotated[
        str | None, inputs("--feature", help="Which features of the stores (default: the only ones that they have).")
    ] = None,
    name: Annotated[
        str | None,
        output("--name", help="What the files call the features, as the tool calls its encoder (default: --feature)."),
    ] = None,
) -> None:
    stores = open_cohort(store)
    written = export_features(stores, to.value, out, feature, name)
    print(f"{sum(map(len, stores))} tiles of {number(len(written), 'slide')} in {out}")
    print(TOOLS[to.value].hint(out, written))


if __name__ == "__main__":
    main.run()
