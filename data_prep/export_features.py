r"""Write the places and features of tiles in the files of CLAM, TRIDENT, STAMP or LazySlide, to go on there.

clam: patches/, h5_files/ and pt_files/. trident: a job folder, <magnification>x_<size>px_<overlap>px_overlap/ with
patches/ and features_<name>/. stamp: <name>/<slide>.h5, in micrometres. wsidata: <slide>.zarr (SpatialData), for
`wsidata.open_wsi(slide, store=OUT)`. Each says how large tiles are and where, as these tools check it, and in the
attribute `histoldm` encoder, licence and weights. data_prep.import_features reads them all.

What lies in --out already is left if it is the same, and is an error if it is not.

Examples:

    python -m data_prep.export_features --store cohort \
        --feature uni --to trident --name uni_v1 --out job
    python -m data_prep.export_features --store cohort \
        --feature uni --to wsidata --out zarr
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
from tqdm import tqdm

from data_prep.options import choices, inputs, number, output
from ldm.cli.script import script
from ldm.data.slide_files import told_in
from ldm.data.spatial_zarr import mpp_of_slide, write_spatial
from ldm.data.tile_store import TileStore, open_cohort
from ldm.errors import UserError, some, suggest
from ldm.files import owns, tool_version, whole, writable_folder

MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))  # TRIDENT's: below this mpp, this


@dataclass(frozen=True)
class Exported:
    """The tiles of a store and their features, as they are written.

    Attributes:
        name: of the features. values: (N, D) float16. about: what is told of them.
    """

    store: TileStore
    name: str
    values: np.ndarray
    about: dict[str, Any]

    @property
    def slide(self) -> str:
        return self.store.path.stem

    @property
    def coords(self) -> np.ndarray:
        return self.store.coords  # (N, 2) level-0 x, y

    @property
    def extent(self) -> int:
        """Level-0 pixels that a tile covers along each side."""
        return round(self.store.tile_size * self.store.downsample)


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


def _clam(out: Path, what: Exported) -> None:
    """A tile is a patch of level 0, as large as it is there, so that CLAM needs no level of the tile's resolution."""
    import torch

    coords, features = what.coords.astype(np.int32), what.values.astype(np.float32)
    attrs = {"patch_size": what.extent, "patch_level": 0, "downsample": (1.0, 1.0), "name": what.slide}
    if size := what.store.attrs.get("level0_size"):
        attrs |= {"level_dim": tuple(size), "downsampled_level_dim": tuple(size)}
    patches = out / "patches" / f"{what.slide}.h5"
    write_h5(patches, {"coords": coords.astype(np.int64)}, {"coords": attrs | {"save_path": str(patches.parent)}})
    writable_folder(out / "pt_files")
    with whole(out / "pt_files" / f"{what.slide}.pt") as part:
        torch.save(torch.from_numpy(features), part)
    write_h5(_clam_place(out, what), {"features": features, "coords": coords}, {"features": _told(what)})


def _clam_place(out: Path, what: Exported) -> Path:
    return out / "h5_files" / f"{what.slide}.h5"


def _trident(out: Path, what: Exported) -> None:
    store, place = what.store, _trident_place(out, what)
    folder = place.parent.parent
    level0 = magnification(mpp_of_slide(store))
    target = level0 / store.downsample
    attrs: dict[str, Any] = {
        "patch_size": store.tile_size, "patch_size_level0": what.extent, "level0_magnification": level0,
        "target_magnification": round(target) if abs(target - round(target)) < 1e-6 else target,
        "overlap": store.tile_size - store.stride, "name": what.slide, "savetodir": str(folder),
    }  # fmt: skip
    if size := store.attrs.get("level0_size"):
        attrs |= {"level0_width": size[0], "level0_height": size[1]}
    coords = what.coords.astype(np.int64)
    write_h5(folder / "patches" / f"{what.slide}_patches.h5", {"coords": coords}, {"coords": attrs})
    made = {"name": what.slide, "savetodir": str(place.parent), "encoder": what.name, **_told(what)}
    arrays = {"features": what.values.astype(np.float32), "coords": coords}
    write_h5(place, arrays, {"features": made, "coords": attrs})


def _trident_place(out: Path, what: Exported) -> Path:
    store = what.store
    named = f"{magnification(store.mpp):g}x_{store.tile_size}px_{store.tile_size - store.stride}px_overlap"
    return out / named / f"features_{what.name}" / f"{what.slide}.h5"


def _stamp(out: Path, what: Exported) -> None:
    """Without STAMP's version and code hash, which say which code of STAMP made a file; it reads files without them."""
    store = what.store
    coords = (what.coords * mpp_of_slide(store)).astype(np.float32)
    attrs = {
        "unit": "um", "tile_size_um": store.tile_size * store.mpp, "tile_size_px": store.tile_size,
        "extractor": what.name, "feat_type": "tile",
    }  # fmt: skip
    write_h5(_stamp_place(out, what), {"coords": coords, "feats": what.values}, {"feats": _told(what)}, attrs)


def _stamp_place(out: Path, what: Exported) -> Path:
    return out / what.name / f"{what.slide}.h5"


def _wsidata(out: Path, what: Exported) -> None:
    writable_folder(out)
    with whole(_wsidata_place(out, what)) as part:
        write_spatial(part, what.store, what.name, what.values, what.about)


def _wsidata_place(out: Path, what: Exported) -> Path:
    return out / f"{what.slide}.zarr"


@dataclass(frozen=True)
class Tool:
    """write: the files of a slide below a folder. place: the one that is written last, and says what it is of.

    scaled: micrometres per pixel must be known.
    """

    write: Callable[[Path, Exported], None]
    place: Callable[[Path, Exported], Path]
    scaled: bool = False


TOOLS = {
    "clam": Tool(_clam, _clam_place),
    "trident": Tool(_trident, _trident_place, scaled=True),
    "stamp": Tool(_stamp, _stamp_place, scaled=True),
    "wsidata": Tool(_wsidata, _wsidata_place),
}
To = choices("To", TOOLS)


def _told(what: Exported) -> dict[str, str]:
    return {"histoldm": json.dumps(what.about)}


@owns()
def export_features(
    stores: Sequence[TileStore], to: str, out: Path, feature: str | None = None, name: str | None = None
) -> list[Path]:
    """Write the tiles of stores and their features as another tool reads them; everything is checked first.

    Args:
        to: clam, trident, stamp or wsidata. out: the folder.
        feature: which features of the stores; None is the only one there is. name: what the files call them.
    Returns:
        the file of features of each slide, for wsidata its Zarr.
    Raises:
        UserError: no such features, features that are no vectors, tiles without places or scale, two stores of one
            name, other files of that name.

    >>> export_features([store], "trident", Path("job"), "uni")
    Traceback (most recent call last):
    ldm.errors.UserError: ...zarr has no features 'uni'...
    """
    if to not in TOOLS:
        raise UserError(f"there is no tool '{to}' to write files for{suggest(to, TOOLS)}")
    tool = TOOLS[to]
    names = sorted(set.intersection(*(set(store.feature_names) for store in stores)))
    if feature is None:
        if len(names) != 1:
            held = f"the features {', '.join(names)}; say which by --feature" if names else "no features in common"
            raise UserError(f"the {number(len(stores), 'store')} have {held}.")
        feature = names[0]
    for store in stores:
        _check(store, feature, tool, to)
    if len({store.path.stem for store in stores}) < len(stores):
        twice = sorted(s for s in {x.path.stem for x in stores} if sum(s == x.path.stem for x in stores) > 1)
        raise UserError(f"several stores are of slides of one name ({some(twice, 3)}); export them to several folders.")
    written = []
    for store in tqdm(stores, desc=f"features {feature} for {to}", unit="slide"):
        what = _exported(store, feature, name or feature)
        place = tool.place(out, what)
        if not place.exists():
            tool.write(out, what)
        elif told_in(place) != what.about:
            raise UserError(
                f"{place} is there already and holds something else than {feature} of {store.path}; choose another "
                "--out, or delete it."
            )
        written.append(place)
    return written


def _check(store: TileStore, feature: str, tool: Tool, to: str) -> None:
    """UserError unless a store's features can be written."""
    array = store.features(feature)
    if array.ndim != (3 if array.attrs.get("dihedral") else 2):
        raise UserError(f"features/{feature} of {store.path} are no vectors but {array.shape[1:]}; {to} has no such.")
    if len(np.unique(store.coords, axis=0)) < len(store):
        raise UserError(f"tiles of {store.path} lie in one place, so it is of images rather than of a slide.")
    if tool.scaled and store.mpp is None:
        raise UserError(
            f"the micrometres per pixel of {store.path} are not known, and {to} needs them; cut the tiles with "
            "--slide-mpp."
        )


def _exported(store: TileStore, feature: str, name: str) -> Exported:
    array = store.features(feature)
    values = np.asarray(array[:])
    values = values[:, 0] if values.ndim == 3 else values  # of eight orientations the tile's own
    digest = hashlib.sha256(store.coords.tobytes() + values.tobytes()).hexdigest()
    kept = {key: value for key, value in array.attrs.items() if key not in ("rows", "dihedral", "rows_sha256")}
    about = {
        **kept, "name": name, "slide": store.slide, "slide_licence": store.attrs.get("licence", ""),
        "mpp": store.mpp, "tile_size": store.tile_size, "stride": store.stride, "downsample": store.downsample,
        "sha256": digest, "tool": f"histoldm {tool_version()}",
    }  # fmt: skip
    return Exported(store, name, values, json.loads(json.dumps(about)))


HINTS = {
    "clam": "CLAM reads them with --data_root_dir {out} (train) or --data_h5_dir {out} (extract).",
    "trident": "TRIDENT goes on with --job_dir {out} --coords_dir {folder}.",
    "stamp": "STAMP reads them with feature_dir: {folder}.",
    "wsidata": 'LazySlide reads them with wsidata.open_wsi(slide, store="{out}").',
}


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
    folders = {"trident": written[0].parent.parent.name, "stamp": written[0].parent}
    print(HINTS[to.value].format(out=out, folder=folders.get(to.value)))


if __name__ == "__main__":
    main.run()
