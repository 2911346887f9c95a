"""The files of a slide: its features and the coordinates of its tiles, as CLAM, TRIDENT, STAMP and LazySlide write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.data.features import H5_NAMES, read_features
from ldm.data.places import Places, places_in
from ldm.data.spatial_zarr import about_features, features_in, is_spatial, read_spatial
from ldm.errors import UserError, note, suggest
from ldm.foreign.hdf5 import open_h5

_ENDS = re.compile(r"[_-](patches|features|feats|embeddings|coords)$", re.IGNORECASE)
_FOLDER = re.compile(r"(?P<slide>slide_)?features_(?P<encoder>.+)$")  # of TRIDENT
OF_SLIDES = ("slide", "patient")  # STAMP's feat_type of features that are none of tiles
_PLAIN = ("patches", "features", "feats", "embeddings", "coords")  # files of these names are called like their folder


@dataclass
class SlideFiles:
    """The files of one slide: its features, and the coordinates of its tiles where those are in another file."""

    name: str
    features: Path | None = None
    coords: Path | None = None
    feature: str | None = None  # name of the features in a .zarr
    encoder: str = ""  # what made the features, if folder or file say it

    @property
    def source(self) -> Path:
        """The file that messages name."""
        return self.features or self.coords

    def read(self) -> tuple[np.ndarray | None, Places]:
        """Features (N, D), None where there are only coordinates, and their places.

        UserError: an unreadable file, no coordinates, another number of them than of features.
        """
        places = None if self.coords is None else _read_places(self.coords)
        if self.features is None:
            return None, places
        found = read_features(self.features, self.feature)
        if found.values.ndim != 2:
            raise UserError(f"{self.features} has features of shape {found.values.shape}; expected (N, D).")
        if found.places is None and places is None:
            raise UserError(
                f"{self.features} has no coordinates, and no .h5 file with `coords` of slide '{self.name}' was found; "
                "give the folder that holds both (CLAM: patches/ and pt_files/; TRIDENT: patches/ and features_*/)."
            )
        if found.places is None and len(places.coords) != len(found.values):
            raise UserError(
                f"{self.features} has {len(found.values)} features but {self.coords} has {len(places.coords)} "
                "coordinates; they are of different runs."
            )
        if found.places is None:
            return found.values, places
        same = places is not None and found.places.extent is None and np.array_equal(places.coords, found.coords)
        return found.values, places if same else found.places


def told_in(path: Path, feature: str | None = None) -> dict[str, Any]:
    """What `data_prep.export_features` wrote of the features in a file; nothing in files of others.

    feature: name of the features in a .zarr.

    >>> told_in(Path("a.h5"))
    {}
    """
    try:
        if path.suffix == ".zarr":
            told = about_features(path, feature)
        else:
            with open_h5(path) as file:
                own = [each.attrs["histoldm"] for each in file.values() if "histoldm" in each.attrs]
                told = json.loads(own[0]) if own else {}
    except (OSError, ValueError, TypeError, RuntimeError, KeyError):  # is told when it is read
        return {}
    return told if isinstance(told, dict) else {}


def _read_places(path: Path) -> Places:
    """Where the tiles of a file of coordinates are. UserError: unreadable, none in it, of another shape."""
    if path.suffix == ".zarr":
        return read_spatial(path)[1]
    with open_h5(path) as file:
        places = places_in(file)
    if places is None:
        raise UserError(f"{path} has no `coords`.")
    if places.coords.ndim != 2 or places.coords.shape[1] != 2 or not len(places.coords):
        raise UserError(f"{path} has coords of shape {places.coords.shape}; expected (N, 2).")
    return places


def find_slide_files(paths: Sequence[Path | str], feature: str | None = None) -> dict[str, SlideFiles]:
    """The files of each slide by the slide's name, from files and folders of CLAM, TRIDENT, STAMP, LazySlide or alike.

    Names are the files' without endings such as `_patches` and `_features`. A file that has both features and
    coordinates is preferred to a tensor (.pt), whose coordinates are then looked for beside its folder. Features of
    whole slides, and files without a tile, are left out and told.

    Args:
        feature: which features, where there are several: their encoder, or the end of their folder's path.
    Raises:
        UserError: no file, a broken one, features of several encoders, no such feature, two files for one slide.

    >>> Path("features_uni").mkdir()
    >>> torch.save(torch.zeros(4, 8), "features_uni/slide-1.pt")
    >>> found = find_slide_files(["features_uni"], "uni")
    >>> {name: files.features.name for name, files in found.items()}
    {'slide-1': 'slide-1.pt'}
    """
    files = tqdm(_paths_in(paths), desc="looking at files", unit="file", delay=5)
    found = [each for path in files for each in _look(path)]
    for kind, told in _LEFT_OUT.items():
        if own := [each.path for each in found if each.kind == kind]:
            note(f"{len(own)} {told} and are left out, as {own[0]}.")
    found = _of_encoder(found, feature, paths)
    kinds: dict[str, dict[str, list[_Found]]] = {}
    for each in found:
        kinds.setdefault(_slide_name(each.path), {}).setdefault(each.kind, []).append(each)
    slides = {}
    for name, own in sorted(kinds.items()):
        features, coords = own.get("both") or own.get("features", []), own.get("coords", [])
        for several, what in ((features, "features"), ([] if features else coords, "coordinates")):
            if len(several) > 1:
                listed = ", ".join(str(each.path) for each in several)
                raise UserError(
                    f"slide '{name}' has several files of {what} ({listed}); give one of them, or say which by "
                    f"--feature {_tail(several[0])}."
                )
        if features:
            near = max(coords, key=lambda each: _common(each.path, features[0].path), default=None)
            own = features[0]
            slides[name] = SlideFiles(name, own.path, near and near.path, own.table, own.encoder)
        elif coords:
            slides[name] = SlideFiles(name, None, coords[0].path)
    if not slides:
        raise UserError(f"{', '.join(map(str, paths))}: no file has {', '.join(H5_NAMES)} or coords.")
    return slides


@dataclass(frozen=True)
class _Found:
    """A file, or a table of features in a Zarr. encoder: what made its features, if folder or file say it."""

    path: Path
    kind: str  # both, features, coords, one of _LEFT_OUT, or other
    encoder: str = ""
    table: str | None = None


_LEFT_OUT = {"slide": "files hold one feature of a whole slide", "empty": "files hold no tile"}


def _paths_in(paths: Sequence[Path | str]) -> list[Path]:
    """The files .h5 and .pt and the folders .zarr in paths, and the coordinates that lie beside a tensor's folder."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there are no features at {path}.")
        files += sorted(_inside(path))
    for path in [path for path in files if path.suffix in (".pt", ".pth")]:
        near = [
            path.parent.parent / folder / f"{path.stem}{end}.h5"
            for folder in ("h5_files", "patches")
            for end in ("", "_patches")
        ]
        files += [p for p in near if p.is_file() and p not in files]
    if not files:
        raise UserError(f"no .h5 or .pt file and no .zarr of SpatialData in {', '.join(map(str, paths))}.")
    return files


def _inside(path: Path) -> Iterator[Path]:
    if path.suffix == ".zarr":
        if is_spatial(path):
            yield path
    elif path.is_file():
        if path.suffix in (".h5", ".hdf5", ".pt", ".pth"):
            yield path
    else:
        for each in path.iterdir():
            if not each.name.startswith("."):
                yield from _inside(each)


def _look(path: Path) -> list[_Found]:
    """What is in a file."""
    folder = _FOLDER.match(path.parent.name)
    encoder = folder["encoder"] if folder else ""
    if path.suffix == ".zarr":
        tables = features_in(path).items()
        return [_Found(path, "both", name, table) for name, table in tables] or [_Found(path, "coords")]
    if folder and folder["slide"]:
        return [_Found(path, "slide", encoder)]
    if path.suffix in (".pt", ".pth"):
        return [_Found(path, "features", encoder)]
    with open_h5(path) as file:
        name, coords = next((name for name in H5_NAMES if name in file), None), "coords" in file
        if name is None:
            empty = coords and not len(file["coords"])
            return [_Found(path, "empty" if empty else "coords" if coords else "other")]
        told = file.attrs.get("extractor") or file[name].attrs.get("encoder")  # STAMP, TRIDENT
        if not encoder and isinstance(told, str) and told != "None":
            encoder = told
        if file[name].ndim == 1 or file.attrs.get("feat_type") in OF_SLIDES:
            return [_Found(path, "slide", encoder)]
        kind = "empty" if 0 in file[name].shape[:1] else "both" if coords else "features"
        return [_Found(path, kind, encoder)]


def _of_encoder(found: list[_Found], feature: str | None, paths: Sequence[Path | str]) -> list[_Found]:
    """The features that are meant, and all coordinates. UserError where that is not clear, or none is."""
    having = [each for each in found if each.kind in ("both", "features")]
    known = sorted({each.encoder for each in having if each.encoder})
    if feature is None:
        if len(known) > 1:
            raise UserError(
                f"{', '.join(map(str, paths))} has the features of several encoders: {', '.join(known)}. Say which by "
                f"--feature, as --feature {known[0]}."
            )
        return found
    meant = [
        each for each in having if feature in (each.encoder, each.table) or f"/{_tail(each)}".endswith(f"/{feature}")
    ]
    if not meant:
        known = known or sorted({_group(each.path).name for each in having})
        raise UserError(f"{', '.join(map(str, paths))} has no features '{feature}'{suggest(feature, known)}")
    return meant + [each for each in found if each.kind == "coords"]


def _group(path: Path) -> Path:
    """The folder of all files of features that were made together; CLAM has two in it, one for each form."""
    return path.parent.parent if path.parent.name in ("pt_files", "h5_files") else path.parent


def _tail(found: _Found) -> str:
    """The end of the path of a group, by which `--feature` tells it from others."""
    group = _group(found.path)
    return f"{group.parent.name}/{group.name}"


def _common(a: Path, b: Path) -> int:
    """How many folders two paths have in common."""
    return sum(x == y for x, y in zip(a.parts, b.parts))


def _slide_name(path: Path) -> str:
    stem = path.parent.name if path.stem.lower() in _PLAIN else path.stem
    return _ENDS.sub("", stem)


def files_of(slide: str, found: Mapping[str, SlideFiles]) -> SlideFiles | None:
    """The files of a slide: those of its name, else of the one name that begins it or that it begins, up to `.` or `_`.

    TCGA's slides, say, go by their barcode with and without the long identifier after it.

    >>> found = {"TCGA-05-4244-01Z": SlideFiles("TCGA-05-4244-01Z")}
    >>> files_of("TCGA-05-4244-01Z.d4ff32cd", found).name
    'TCGA-05-4244-01Z'
    """
    if slide in found:
        return found[slide]
    near = [name for name in found if _begins(name, slide) or _begins(slide, name)]
    if len(near) > 1:
        raise UserError(f"slide '{slide}' could be {' or '.join(sorted(near))} by name; name the files like the slide.")
    return found[near[0]] if near else None


def _begins(short: str, long: str) -> bool:
    return long.startswith(short) and long[len(short) : len(short) + 1] in (".", "_")
