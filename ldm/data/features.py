"""Features of tiles from wherever they come (.npy, .h5 of CLAM, TRIDENT and STAMP, .pt, Zarr), and their grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.places import Places, places_in, unbatched
from ldm.data.spatial_zarr import is_spatial, read_spatial
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.foreign.budget import afford
from ldm.foreign.hdf5 import open_h5, values_of
from ldm.foreign.paths import allowed

H5_NAMES = ("features", "feats", "embeddings")
SUFFIXES = (".npy", ".h5", ".hdf5", ".pt", ".pth", ".zarr")


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
                "a tile store, or a .npy of shape (rows, cols, D)."
            )
        return features_to_grid(self.values, self.coords, self.step)


def read_features(path: Path | str, feature: str | None = None, dim: int | None = None) -> Features:
    """Read features of tiles.

    Args:
        path: .npy of (N, D) or (rows, cols, D); .h5 with `features`, `feats` or `embeddings` and maybe `coords`;
            .pt with a tensor or array, or a dict with one of these names; a tile store, or SpatialData as LazySlide
            writes it (.zarr).
        feature: name of the features in a .zarr.
        dim: dimension D that is wanted.
    Raises:
        UserError: unreadable, no features in it, wrong shape or dimension, another number of coords, NaN or infinity.

    >>> np.save("grid.npy", np.zeros((2, 3, 8), np.float32))
    >>> read_features("grid.npy", dim=8).values.shape
    (2, 3, 8)
    """
    path = allowed(path)
    if not path.exists():
        raise UserError(f"there are no features at {path}.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: features are read from {', '.join(SUFFIXES)}.")
    if path.suffix == ".zarr":
        features = _from_zarr(path, feature)
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
    values = np.load(path, mmap_mode="r", allow_pickle=False)  # of a file that is as long as it says
    afford(2 * 4 * values.size, f"the features of {path}")
    return Features(_floats(values, path))


def _from_h5(path: Path) -> Features:
    with open_h5(path) as file:
        name = next((n for n in H5_NAMES if n in file), None)
        if name is None:
            raise UserError(f"{path} has no {', '.join(H5_NAMES)}; it holds {', '.join(file) or 'nothing'}.")
        values = unbatched(_floats(values_of(file[name]), path))
        places = places_in(file)
    return Features(values, places)


def _from_pt(path: Path) -> Features:
    from ldm.interop.checkpoint import Inert, read_checkpoint

    content, coords = read_checkpoint(path), None
    if (found := _first_of(Inert, content)) is not None:
        kind = type(found)
        raise UserError(
            f"{path} holds objects of Python ({kind.__module__}.{kind.__qualname__}), which are not read: they could "
            "run code. Save the features alone, as torch.save(torch.as_tensor(features), ...), as .npy or as .h5."
        )
    if isinstance(content, dict):
        name = next((n for n in H5_NAMES if n in content), None)
        if name is None:
            raise UserError(
                f"{path} has no {', '.join(H5_NAMES)}; it holds {', '.join(map(str, content)) or 'nothing'}."
            )
        coords = content.get("coords")
        content = content[name]
    if isinstance(content, (list, tuple)) and len(content) == 1:
        content = content[0]
    if hasattr(content, "detach"):
        content = content.detach().float().numpy()
    if not isinstance(content, np.ndarray):
        raise UserError(f"{path} holds {type(content).__name__}, not a tensor or array of features.")
    values = unbatched(_floats(content, path))
    return Features(values, None if coords is None else Places(unbatched(np.asarray(coords))).checked(path))


def _first_of(kind: type, content: Any) -> Any:
    """The first object of a kind in containers; None where there is none."""
    if isinstance(content, kind):
        return content
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return next((found for part in parts if (found := _first_of(kind, part)) is not None), None)


def _from_zarr(path: Path, feature: str | None) -> Features:
    if is_spatial(path):
        values, places = read_spatial(path, feature)
        if values is None:
            raise UserError(f"{path} has tiles but no features; extract them (lazyslide.tl.feature_extraction).")
        return Features(values, places)
    store = TileStore.open(path)
    if feature is None:
        if not store.feature_names:
            raise UserError(f"{path} holds no features; make them with `python -m data_prep.extract_features`.")
        if len(store.feature_names) > 1:
            raise UserError(f"{path} holds features {', '.join(store.feature_names)}; name the one to use.")
        feature = store.feature_names[0]
    values = np.asarray(store.features(feature)[:])
    values = values[:, 0] if values.ndim == 3 else values
    extent, step = store.tile_size * store.downsample, store.stride * store.downsample
    return Features(values.astype(np.float32), Places(store.coords, extent, step, store.tile_size))


def _floats(values: np.ndarray, path: Path) -> np.ndarray:
    if values.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {values.dtype}, not numbers.")
    return values.astype(np.float32)


def _check(features: Features, path: Path, dim: int | None) -> None:
    values, coords = features.values, features.coords
    if values.ndim == 1 or (coords is not None and values.shape[:-1] == (1,) and len(coords) > 1):
        raise UserError(
            f"{path} holds one feature of {values.shape[-1]} values, of a whole slide; give the features of its tiles."
        )
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise UserError(f"{path} has features of shape {values.shape}; expected (N, D) or (rows, cols, D).")
    if dim is not None and values.shape[-1] != dim:
        raise UserError(
            f"{path} has features of dimension {values.shape[-1]}, but the model was trained with {dim}; "
            "use the encoder that the model names."
        )
    if coords is not None and coords.shape != (len(values), 2):
        raise UserError(
            f"{path} has {len(values)} features but coords of shape {coords.shape}; expected ({len(values)}, 2)."
        )
    bad = ~np.isfinite(values)
    if values.ndim == 3:
        holes = np.isnan(values).all(-1)
        bad &= ~holes[..., None]
        if holes.all():
            raise UserError(f"{path} is a grid of holes only.")
    if bad.any():
        rows = int(bad.any(-1).sum())
        count = values[..., 0].size
        raise UserError(f"{path} holds NaN or infinity in {rows} of {count} features; extract them again.")


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
        raise UserError(f"the step between tiles must be above 0, got {step}.")
    place = (coords - coords.min(0)) / step
    cells = place.round().astype(int)
    off = (np.abs(place - cells) * step > 1).any(1)  # a pixel of rounding is allowed
    if off.any():
        raise UserError(
            f"{int(off.sum())} of {len(coords)} tiles lie off the lattice of step {step:g} px that starts at "
            f"{tuple(coords.min(0))}; give the step between neighbouring tiles, or tiles cut on one lattice."
        )
    cols, rows = (int(last) + 1 for last in cells.max(0))
    afford(5 * rows * cols * features.shape[1], f"the grid of {rows} x {cols} tiles that these coordinates span")
    flat = cells[:, 1] * cols + cells[:, 0]
    if len(np.unique(flat)) < len(flat):
        raise UserError(f"{len(flat) - len(np.unique(flat))} tiles lie in the place of another one (step {step:g} px).")
    grid = np.full((rows * cols, features.shape[1]), np.nan, np.float32)
    grid[flat] = features
    mask = np.zeros(rows * cols, bool)
    mask[flat] = True
    return grid.reshape(rows, cols, -1), mask.reshape(rows, cols)


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
