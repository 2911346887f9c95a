"""Features of tiles from wherever they come (.npy, CLAM and TRIDENT .h5, .pt, tile stores), and their grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from ldm.data.tile_store import TileStore
from ldm.errors import UserError

H5_NAMES = ("features", "feats", "embeddings")
SUFFIXES = (".npy", ".h5", ".hdf5", ".pt", ".pth", ".zarr")


@dataclass(frozen=True)
class Features:
    """Features of tiles.

    Attributes:
        values: (N, D) of tiles, or (rows, cols, D) of a grid where NaN rows are holes; float32.
        coords: (N, 2) level-0 x, y of the tiles' top-left corners, or None where the file has none.
        step: level-0 pixels between neighbouring tiles, where the file says.
    """

    values: np.ndarray
    coords: np.ndarray | None = None
    step: float | None = None

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
        coords, step = None, None
        if "coords" in file:
            coords = np.asarray(file["coords"][()])
            attrs = {**file.attrs, **file["coords"].attrs}
            size, overlap = attrs.get("patch_size_level0"), attrs.get("overlap_level0", 0)  # TRIDENT
            step = float(size - overlap) if size is not None else None
    return Features(values, coords, step)


def _from_pt(path: Path) -> Features:
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
    return Features(values, None if coords is None else np.asarray(coords))


def _from_store(path: Path, feature: str | None) -> Features:
    store = TileStore.open(path)
    if feature is None:
        if len(store.feature_names) != 1:
            raise UserError(f"{path} holds features {', '.join(store.feature_names) or '(none)'}; name the one to use")
        feature = store.feature_names[0]
    values = np.asarray(store.features(feature)[:])
    values = values[:, 0] if values.ndim == 3 else values
    return Features(values.astype(np.float32), store.coords, store.stride * store.downsample)


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
