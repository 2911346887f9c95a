"""Features of tiles from wherever they come (.npy, CLAM and TRIDENT .h5, .pt, tile stores), and their grid."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ldm.data.tile_store import TileStore
from ldm.errors import UserError

H5_NAMES = ("features", "feats", "embeddings")
SUFFIXES = (".npy", ".h5", ".hdf5", ".pt", ".pth", ".zarr")


@dataclass(frozen=True)
class Places:
    """Where tiles lie on a slide.

    Attributes:
        coords: (N, 2) level-0 x, y of the tiles' top-left corners.
        extent: level-0 pixels that a tile covers along each side; step: between neighbouring tiles; size: pixels of a
            tile as it was cut. None where the file does not say.
    """

    coords: np.ndarray
    extent: float | None = None
    step: float | None = None
    size: int | None = None


@dataclass(frozen=True)
class Features:
    """Features of tiles.

    Attributes:
        values: (N, D) of tiles, or (rows, cols, D) of a grid where NaN rows are holes; float32.
        places: where the tiles are, or None where the file does not say.
    """

    values: np.ndarray
    places: Places | None = None

    @property
    def coords(self) -> np.ndarray | None:
        return None if self.places is None else self.places.coords

    @property
    def step(self) -> float | None:
        return None if self.places is None else self.places.step

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """The features as a grid (rows, cols, D) and its mask (rows, cols); see `features_to_grid`."""
        if self.values.ndim == 3:
            return self.values, ~np.isnan(self.values).any(-1)
        if self.coords is None:
            raise UserError(
                "these features have no coordinates, so their places are unknown; give a file with coords, "
                "a tile store, or a .npy of shape (rows, cols, D)"
            )
        return features_to_grid(self.values, self.coords, self.step)


def read_features(path: Path | str, feature: str | None = None, dim: int | None = None) -> Features:
    """Read features of tiles.

    Args:
        path: .npy of (N, D) or (rows, cols, D); .h5 with `features`, `feats` or `embeddings` and maybe `coords`;
            .pt with a tensor, or a dict with one of these names; or a tile store (.zarr).
        feature: name of the features in a tile store.
        dim: dimension D that is wanted.
    Raises:
        UserError: unreadable, no features in it, wrong shape or dimension, another number of coords, NaN or infinity.

    >>> np.save("grid.npy", np.zeros((2, 3, 8), np.float32))
    >>> read_features("grid.npy", dim=8).values.shape
    (2, 3, 8)
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there are no features at {path}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: features are read from {', '.join(SUFFIXES)}")
    if path.suffix == ".zarr":
        features = _from_store(path, feature)
    else:
        readers = {".npy": _from_npy, ".h5": _from_h5, ".hdf5": _from_h5}
        try:
            features = readers.get(path.suffix, _from_pt)(path)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path} cannot be read as {path.suffix}: {str(error).splitlines()[0]}") from None
    _check(features, path, dim)
    return features


def _from_npy(path: Path) -> Features:
    return Features(_floats(np.load(path, allow_pickle=False), path))


def _from_h5(path: Path) -> Features:
    with h5py.File(path, "r") as file:
        name = next((n for n in H5_NAMES if n in file), None)
        if name is None:
            raise UserError(f"{path} has no {', '.join(H5_NAMES)}; it holds {', '.join(file) or 'nothing'}")
        values = _unbatched(_floats(file[name][()], path))
        places = _places(file)
    return Features(values, places)


def _places(file: h5py.File) -> Places | None:
    """`coords` of a CLAM or TRIDENT file and what its attributes say of the tiles."""
    if "coords" not in file:
        return None
    attrs = {**file.attrs, **file["coords"].attrs}
    size = int(attrs["patch_size"]) if "patch_size" in attrs else None
    extent, step = attrs.get("patch_size_level0"), None
    if extent is not None:  # TRIDENT; `overlap` is in pixels of a tile
        overlap = attrs.get("overlap_level0", attrs.get("overlap", 0) * (float(extent) / size if size else 1.0))
        step = float(extent) - float(overlap)
    elif size is not None and ("downsample" in attrs or int(attrs.get("patch_level", 0)) == 0):  # CLAM
        extent = size * float(np.ravel(attrs.get("downsample", 1.0))[0])
    return Places(np.asarray(file["coords"][()]), None if extent is None else float(extent), step, size)


def _from_pt(path: Path) -> Features:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    coords = None
    if isinstance(content, dict):
        name = next((n for n in H5_NAMES if n in content), None)
        if name is None:
            raise UserError(
                f"{path} has no {', '.join(H5_NAMES)}; it holds {', '.join(map(str, content)) or 'nothing'}"
            )
        coords = content.get("coords")
        content = content[name]
    if not isinstance(content, torch.Tensor):
        raise UserError(f"{path} holds {type(content).__name__}, not a tensor of features")
    values = _unbatched(_floats(content.float().numpy(), path))
    return Features(values, None if coords is None else Places(np.asarray(coords)))


def _from_store(path: Path, feature: str | None) -> Features:
    store = TileStore.open(path)
    if feature is None:
        if not store.feature_names:
            raise UserError(f"{path} holds no features; make them with `python -m data_prep.extract_features`")
        if len(store.feature_names) > 1:
            raise UserError(f"{path} holds features {', '.join(store.feature_names)}; name the one to use")
        feature = store.feature_names[0]
    values = np.asarray(store.features(feature)[:])
    values = values[:, 0] if values.ndim == 3 else values
    extent, step = store.tile_size * store.downsample, store.stride * store.downsample
    return Features(values.astype(np.float32), Places(store.coords, extent, step, store.tile_size))


def _floats(values: np.ndarray, path: Path) -> np.ndarray:
    if values.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {values.dtype}, not numbers")
    return values.astype(np.float32)


def _unbatched(values: np.ndarray) -> np.ndarray:
    """(1, N, D), as some extractors write, -> (N, D)."""
    return values[0] if values.ndim == 3 and values.shape[0] == 1 else values


def _check(features: Features, path: Path, dim: int | None) -> None:
    values, coords = features.values, features.coords
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise UserError(f"{path} has features of shape {values.shape}; expected (N, D) or (rows, cols, D)")
    if dim is not None and values.shape[-1] != dim:
        raise UserError(
            f"{path} has features of dimension {values.shape[-1]}, but the model was trained with {dim}; "
            "use the encoder that the model names"
        )
    if coords is not None and coords.shape != (len(values), 2):
        raise UserError(
            f"{path} has {len(values)} features but coords of shape {coords.shape}; expected ({len(values)}, 2)"
        )
    bad = ~np.isfinite(values)
    if values.ndim == 3:
        holes = np.isnan(values).all(-1)
        bad &= ~holes[..., None]
        if holes.all():
            raise UserError(f"{path} is a grid of holes only")
    if bad.any():
        rows = int(bad.any(-1).sum())
        raise UserError(f"{path} holds NaN or infinity in {rows} of {values[..., 0].size} features; extract them again")


def features_to_grid(
    features: np.ndarray, coords: np.ndarray, step: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Lay features on the lattice of their coordinates: `grid[row, col]` is the tile `row` steps down and `col` right.

    Args:
        features: (N, D). coords: (N, 2) x, y of top-left corners.
        step: distance of neighbours, in the coordinates' pixels; None takes the smallest that occurs.
    Returns:
        grid (rows, cols, D) float32 with NaN at holes, mask (rows, cols), True where there is a tile. The corner (0, 0)
        is at the least x and the least y.
    Raises:
        UserError: coordinates that are on no lattice, or two tiles in one place.

    >>> grid, mask = features_to_grid(np.array([[1.0], [2.0], [3.0]]), np.array([(0, 0), (512, 0), (0, 512)]))
    >>> grid[..., 0], int(mask.sum())
    (array([[ 1.,  2.],
           [ 3., nan]], dtype=float32), 3)
    """
    coords = np.asarray(coords, np.float64)
    if step is None:
        gaps = np.concatenate([np.diff(np.unique(axis)) for axis in coords.T])
        step = float(gaps.min()) if len(gaps) else 1.0
    if step <= 0:
        raise UserError(f"the step between tiles must be above 0, got {step}")
    place = (coords - coords.min(0)) / step
    cells = place.round().astype(int)
    off = (np.abs(place - cells) * step > 1).any(1)  # a pixel of rounding is allowed
    if off.any():
        raise UserError(
            f"{int(off.sum())} of {len(coords)} tiles lie off the lattice of step {step:g} px that starts at "
            f"{tuple(coords.min(0))}; give the step between neighbouring tiles, or tiles cut on one lattice"
        )
    cols, rows = cells.max(0) + 1
    flat = cells[:, 1] * cols + cells[:, 0]
    if len(np.unique(flat)) < len(flat):
        raise UserError(f"{len(flat) - len(np.unique(flat))} tiles lie in the place of another one (step {step:g} px)")
    grid = np.full((rows * cols, features.shape[1]), np.nan, np.float32)
    grid[flat] = features
    mask = np.zeros(rows * cols, bool)
    mask[flat] = True
    return grid.reshape(rows, cols, -1), mask.reshape(rows, cols)


# --- the files of a slide: CLAM's and TRIDENT's folders ---------------------------------------------------------------

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
            raise UserError(f"{self.features} has features of shape {found.values.shape}; expected (N, D)")
        if found.places is None and places is None:
            raise UserError(
                f"{self.features} has no coordinates, and no .h5 file with `coords` of slide '{self.name}' was found; "
                "give the folder that holds both (CLAM: patches/ and pt_files/; TRIDENT: patches/ and features_*/)"
            )
        if places is not None and len(places.coords) != len(found.values):
            raise UserError(
                f"{self.features} has {len(found.values)} features but {self.coords} has {len(places.coords)} "
                "coordinates; they are of different runs"
            )
        if found.places is None:
            return found.values, places
        same = places is not None and found.places.extent is None and np.array_equal(places.coords, found.coords)
        return found.values, places if same else found.places


def _read_places(path: Path) -> Places:
    """Where the tiles of a CLAM or TRIDENT coordinate file are. UserError: unreadable, none in it, of another shape."""
    try:
        with h5py.File(path, "r") as file:
            places = _places(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read as {path.suffix}: {str(error).splitlines()[0]}") from None
    if places is None:
        raise UserError(f"{path} has no `coords`")
    if places.coords.ndim != 2 or places.coords.shape[1] != 2 or not len(places.coords):
        raise UserError(f"{path} has coords of shape {places.coords.shape}; expected (N, 2)")
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
            raise UserError(f"there are no features at {path}")
        inside = path.rglob("*") if path.is_dir() else [path]
        files += sorted(p for p in inside if p.suffix in (".h5", ".hdf5", ".pt", ".pth"))
    for path in [path for path in files if path.suffix in (".pt", ".pth")]:
        near = [path.parent.parent / folder / f"{path.stem}{end}.h5"
                for folder in ("h5_files", "patches") for end in ("", "_patches")]  # fmt: skip
        files += [p for p in near if p.is_file() and p not in files]
    if not files:
        raise UserError(f"no .h5 or .pt file in {', '.join(map(str, paths))}")
    kinds: dict[str, dict[str, list[Path]]] = {}
    for path in files:
        kinds.setdefault(_slide_name(path), {}).setdefault(_kind(path), []).append(path)
    slides = {}
    for name, own in sorted(kinds.items()):
        features = own.get("both") or own.get("features") or []
        if len(features) > 1:
            listed = ", ".join(map(str, features))
            raise UserError(f"slide '{name}' has several files of features ({listed}); give those of one encoder")
        coords = own.get("coords", [])
        if not features and len(coords) > 1:
            listed = ", ".join(map(str, coords))
            raise UserError(f"slide '{name}' has several files of coordinates ({listed}); give one")
        if features or coords:
            slides[name] = SlideFiles(name, features[0] if features else None, coords[0] if coords else None)
    if not slides:
        raise UserError(f"{', '.join(map(str, paths))}: no file has {', '.join(H5_NAMES)} or coords")
    return slides


def _slide_name(path: Path) -> str:
    stem = path.parent.name if path.stem.lower() in _PLAIN else path.stem
    return _ENDS.sub("", stem)


def _kind(path: Path) -> str:
    if path.suffix in (".pt", ".pth"):
        return "features"
    try:
        with h5py.File(path, "r") as file:
            has_features, has_coords = any(name in file for name in H5_NAMES), "coords" in file
    except OSError as error:
        raise UserError(f"{path} cannot be read as {path.suffix}: {str(error).splitlines()[0]}") from None
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
        raise UserError(f"slide '{slide}' could be {' or '.join(sorted(near))} by name; name the files like the slide")
    return found[near[0]] if near else None


def _begins(short: str, long: str) -> bool:
    return long.startswith(short) and long[len(short) : len(short) + 1] in (".", "_")


def nearest_tiles(points: np.ndarray, coords: np.ndarray, reach: float) -> np.ndarray:
    """For each point (n, 2) the index of the nearest of those `coords` (N, 2) that are within `reach` in x and in y, or
    -1 where none is.

    >>> nearest_tiles(np.array([[0, 0], [250, 10], [900, 900]]), np.array([[0, 0], [256, 0]]), reach=64)
    array([ 0,  1, -1])
    """
    points, coords = np.asarray(points, float), np.asarray(coords, float)
    low = np.minimum(points.min(0), coords.min(0)) - 2 * reach
    wide = int((max(points.max(), coords.max()) - low.min()) // reach) + 4

    def bucket(xy: np.ndarray, dx: int = 0, dy: int = 0) -> np.ndarray:
        cells = ((xy - low) // reach).astype(np.int64)
        return (cells[:, 0] + dx) * wide + cells[:, 1] + dy

    order = np.argsort(bucket(coords), kind="stable")
    keys = bucket(coords)[order]
    best, distance = np.full(len(points), -1), np.full(len(points), np.inf)
    for dx, dy in [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]:
        wanted = bucket(points, dx, dy)
        first, last = np.searchsorted(keys, wanted), np.searchsorted(keys, wanted, "right")
        for step in range(int((last - first).max())):
            here = np.flatnonzero(first + step < last)
            found = order[first[here] + step]
            apart = np.abs(points[here] - coords[found])
            far = np.where(apart.max(1) <= reach, np.hypot(*apart.T), np.inf)
            nearer = far < distance[here]
            best[here[nearer]], distance[here[nearer]] = found[nearer], far[nearer]
    return best
