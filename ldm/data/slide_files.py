"""The files of a slide: its features and the coordinates of its tiles, in CLAM's and TRIDENT's folders or alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ldm.data.features import H5_NAMES, Places, places_in, read_features
from ldm.errors import UserError, note

_ENDS = re.compile(r"[_-](patches|features|feats|embeddings|coords)$", re.IGNORECASE)
_PLAIN = ("patches", "features", "feats", "embeddings", "coords")  # files of these names are called like their folder


@dataclass
class SlideFiles:
    """The files of one slide: its features, and the coordinates of its tiles where those are in another file."""

    name: str
    features: Path | None = None
    coords: Path | None = None

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
        found = read_features(self.features)
        if found.values.ndim != 2:
            raise UserError(f"{self.features} has features of shape {found.values.shape}; expected (N, D).")
        if found.places is None and places is None:
            raise UserError(
                f"{self.features} has no coordinates, and no .h5 file with `coords` of slide '{self.name}' was found; "
                "give the folder that holds both (CLAM: patches/ and pt_files/; TRIDENT: patches/ and features_*/)."
            )
        if places is not None and len(places.coords) != len(found.values):
            raise UserError(
                f"{self.features} has {len(found.values)} features but {self.coords} has {len(places.coords)} "
                "coordinates; they are of different runs."
            )
        if found.places is None:
            return found.values, places
        same = places is not None and found.places.extent is None and np.array_equal(places.coords, found.coords)
        return found.values, places if same else found.places


def _read_places(path: Path) -> Places:
    """Where the tiles of a CLAM or TRIDENT coordinate file are. UserError: unreadable, none in it, of another shape."""
    try:
        with h5py.File(path, "r") as file:
            places = places_in(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read as {path.suffix}: {str(error).splitlines()[0]}") from None
    if places is None:
        raise UserError(f"{path} has no `coords`.")
    if places.coords.ndim != 2 or places.coords.shape[1] != 2 or not len(places.coords):
        raise UserError(f"{path} has coords of shape {places.coords.shape}; expected (N, 2).")
    return places


def find_slide_files(paths: Sequence[Path | str]) -> dict[str, SlideFiles]:
    """The files of each slide by the slide's name, from files and folders of CLAM, TRIDENT or alike.

    Names are the files' without endings such as `_patches` and `_features`. A file that has both features and
    coordinates is preferred to a tensor (.pt), whose coordinates are then looked for beside its folder.
    UserError: no file, a broken one, two files of features for one slide.

    >>> Path("pt_files").mkdir()
    >>> torch.save(torch.zeros(4, 8), "pt_files/slide-1.pt")
    >>> found = find_slide_files(["pt_files"])
    >>> {name: files.features.name for name, files in found.items()}
    {'slide-1': 'slide-1.pt'}
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there are no features at {path}.")
        inside = path.rglob("*") if path.is_dir() else [path]
        files += sorted(p for p in inside if p.suffix in (".h5", ".hdf5", ".pt", ".pth"))
    for path in [path for path in files if path.suffix in (".pt", ".pth")]:
        near = [
            path.parent.parent / folder / f"{path.stem}{end}.h5"
            for folder in ("h5_files", "patches")
            for end in ("", "_patches")
        ]
        files += [p for p in near if p.is_file() and p not in files]
    if not files:
        raise UserError(f"no .h5 or .pt file in {', '.join(map(str, paths))}.")
    kinds: dict[str, dict[str, list[Path]]] = {}
    for path in files:
        kinds.setdefault(_slide_name(path), {}).setdefault(_kind(path), []).append(path)
    slides = {}
    if of_slides := [path for own in kinds.values() for path in own.get("whole slide", ())]:
        note(f"{len(of_slides)} files hold one feature of a whole slide and are left out, as {of_slides[0]}.")
    for name, own in sorted(kinds.items()):
        features = own.get("both") or own.get("features") or []
        if len(features) > 1:
            listed = ", ".join(map(str, features))
            raise UserError(f"slide '{name}' has several files of features ({listed}); give those of one encoder.")
        coords = own.get("coords", [])
        if not features and len(coords) > 1:
            listed = ", ".join(map(str, coords))
            raise UserError(f"slide '{name}' has several files of coordinates ({listed}); give one.")
        if features or coords:
            slides[name] = SlideFiles(name, features[0] if features else None, coords[0] if coords else None)
    if not slides:
        raise UserError(f"{', '.join(map(str, paths))}: no file has {', '.join(H5_NAMES)} or coords.")
    return slides


def _slide_name(path: Path) -> str:
    stem = path.parent.name if path.stem.lower() in _PLAIN else path.stem
    return _ENDS.sub("", stem)


def _kind(path: Path) -> str:
    if path.suffix in (".pt", ".pth"):
        return "features"
    try:
        with h5py.File(path, "r") as file:
            named = [name for name in H5_NAMES if name in file]
            has_features, has_coords = bool(named), "coords" in file
            whole_slide = has_features and file[named[0]].ndim == 1
    except OSError as error:
        raise UserError(f"{path} cannot be read as {path.suffix}: {str(error).splitlines()[0]}") from None
    if has_features and whole_slide:
        return "whole slide"
    return {(True, True): "both", (True, False): "features", (False, True): "coords"}.get(
        (has_features, has_coords), "other"
    )


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
