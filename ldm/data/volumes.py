"""Slices of volumes: reading NIfTI, cutting slices to square tiles, and pairs of modalities of the same place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import repeat
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.cohort import read_index
from ldm.data.datasets import Key, TileDataset
from ldm.errors import UserError, suggest

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # of a volume in RAS orientation: right, anterior, superior
FOREGROUND = 0.05  # of the window: what is brighter belongs to the body


class Volume:
    """A 3-D NIfTI image in RAS+ orientation, whatever its file's: axes run to the right, to anterior, to superior.

    The header is read at once, voxels by `values`.

    Attributes:
        shape (3), spacing (3) in mm, affine (4,4) voxel to mm.
    """

    def __init__(self, path: Path | str):
        import nibabel

        self.path = Path(path)
        try:
            image = nibabel.as_closest_canonical(nibabel.squeeze_image(nibabel.load(self.path)))
        except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
            raise UserError(f"cannot read the volume {self.path}: {error}") from error
        if len(image.shape) != 3:
            raise UserError(f"{self.path} has {len(image.shape)} dimensions {image.shape}; give 3-D volumes.")
        self._image = image
        self.shape = tuple(map(int, image.shape))
        self.affine = np.asarray(image.affine, float)
        self.spacing = tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())

    def values(self) -> np.ndarray:
        """(X,Y,Z) float32; what is not finite is the least of the others."""
        try:
            values = np.asarray(self._image.dataobj, np.float32)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"cannot read the voxels of {self.path}: {error}") from error
        finite = np.isfinite(values)
        if not finite.any():
            raise UserError(f"{self.path} has no finite voxel.")
        return values if finite.all() else np.where(finite, values, values[finite].min())

    def check_same_grid(self, other: Volume, tolerance: float = 1e-3) -> None:
        """UserError unless the voxels of both lie at the same places."""
        if self.shape != other.shape:
            raise UserError(
                f"{self.path} has {self.shape} voxels, {other.path} has {other.shape}; register and resample one to "
                "the other first."
            )
        if (off := np.abs(self.affine - other.affine).max()) > tolerance:
            raise UserError(
                f"the affines of {self.path} and {other.path} differ by {off:.3g}, so their voxels lie at different "
                "places; register and resample one to the other first."
            )


def in_plane(spacing: tuple[float, float, float], axis: int) -> tuple[float, float]:
    """Row and column spacing of the slices along an axis.

    >>> in_plane((1.0, 2.0, 3.0), AXES["coronal"])
    (3.0, 1.0)
    """
    across, up = (spacing[i] for i in range(3) if i != axis)
    return up, across


def cut_slice(values: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Slice `index` (H,W) of a volume (X,Y,Z) in RAS+ orientation, as it is looked at: superior, or in axial slices
    anterior, is up; the patient's left is on the left, in sagittal slices posterior.

    >>> volume = np.zeros((4, 5, 6))
    >>> volume[0, :, 5] = 1                                                         # the patient's left, superior
    >>> float(cut_slice(volume, AXES["coronal"], 2)[0, 0]), cut_slice(volume, AXES["coronal"], 2).shape
    (1.0, (6, 4))
    """
    return np.take(values, index, axis).T[::-1]


def windowed(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values to [0, 1], low to 0 and high to 1.

    >>> windowed(np.array([-2000, -160, 240]), -160, 240)
    array([0., 0., 1.], dtype=float32)
    """
    return ((np.asarray(image, np.float32) - low) / (high - low)).clip(0, 1)


def to_tile(image: np.ndarray, size: int, spacing: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """(H,W) in [0, 1] as a gray tile (size,size,3) uint8: square pixels, the longer side fills it, black around.

    Bilinear with antialiasing; spacing of rows and columns in any unit.

    >>> tile = to_tile(np.ones((50, 100)), 64)
    >>> tile.shape, int((tile[:, 0, 0] > 0).sum())                                  # half of it is border
    ((64, 64, 3), 32)
    """
    extent = [length * each for length, each in zip(image.shape, spacing)]
    height, width = (max(1, round(size * each / max(extent))) for each in extent)
    whole = Image.fromarray(np.ascontiguousarray(image, np.float32))
    resized = whole.resize((width, height), Image.Resampling.BILINEAR)
    tile = np.zeros((size, size), np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    tile[top : top + height, left : left + width] = resized
    return repeat(np.rint(tile * 255).astype(np.uint8), "h w -> h w 3")


class PairDataset(Dataset):
    """Slices of one modality with the same slices of another, matched by subject and slice number.

    Items: `image` (C,H,W), the target, and `source` (C,H,W), both in [-1, 1] and turned alike; `subject`, `slice`, and
    what tiles have anyway (of the target). Asked for as those of `ldm.data.datasets.TileDataset`.

    Args:
        cohort: folder that `data_prep.slice_volumes` wrote.
        source, target: modalities.
        gray: one channel, else three.
        where: keeps targets, as `TileDataset`'s. dihedral: show each pair in a random one of eight orientations.
    Raises:
        UserError: a modality that is not there, two slices of one name, no pair left.
    """

    def __init__(
        self,
        cohort: str,
        source: str,
        target: str,
        gray: bool = True,
        where: Mapping[str, Any] | None = None,
        dihedral: bool = False,
    ) -> None:
        index = read_index(cohort)
        if missing := {"subject", "modality", "slice"} - set(index):
            raise UserError(
                f"the tiles of {cohort} have no {', '.join(sorted(missing))}; make pairs with "
                "`python -m data_prep.slice_volumes`."
            )
        for modality in (source, target):
            if modality not in (known := index["modality"].dropna().unique()):
                raise UserError(f"{cohort} has no modality '{modality}'{suggest(modality, known)}")
        named = {"subject": "subject", "slice": "slice"}

        def tiles(modality: str, chosen: Mapping[str, Any]) -> TileDataset:
            chosen = {**chosen, "modality": modality}
            return TileDataset(cohort, where=chosen, conditions=named, gray=gray, dihedral=dihedral)

        self.source, self.target = source, target
        self.targets, self.sources = tiles(target, where or {}), tiles(source, {})
        places: dict[tuple[str, int], int] = {}
        for place, key in enumerate(_places(self.sources)):
            if key in places:
                raise UserError(f"{cohort} has slice {key[1]} of {key[0]} in {source} twice; delete one of the stores.")
            places[key] = place
        pairs = [(i, places[key]) for i, key in enumerate(_places(self.targets)) if key in places]
        if not pairs:
            raise UserError(
                f"{cohort} has {len(self.targets)} slices of {target}, and for none a slice of {source} of the same "
                "subject and number."
            )
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, *draw = key if isinstance(key, tuple) else (key,)
        target, source = self.pairs[int(index)]
        item = self.targets[(target, *draw)] if draw else self.targets[target]
        other = self.sources[(source, *draw)] if draw else self.sources[source]
        return item | {"source": other["image"]}

    @property
    def metadata(self) -> dict[str, Any]:
        """What a model trained on these pairs must remember."""
        known = {key: value for key, value in self.targets.metadata.items() if key != "conditions"}
        return known | {"source_modality": self.source, "target_modality": self.target}


def _places(tiles: TileDataset) -> list[tuple[str, int]]:
    return list(zip(tiles.values("subject").tolist(), tiles.values("slice").astype(int).tolist()))
