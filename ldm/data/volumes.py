"""Slices of volumes: reading NIfTI, and cutting slices to square tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from einops import repeat
from PIL import Image

from ldm.errors import UserError, note
from ldm.foreign.budget import COMPRESSED, afford, plausible
from ldm.foreign.paths import allowed

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # of a volume in RAS orientation: right, anterior, superior
FOREGROUND = 0.05  # of the window: what is brighter belongs to the body
LARGEST = 1 << 31  # voxels
SIDES = (1e-4, 1e3)  # mm that the side of a voxel can have


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
            image = _nifti(allowed(self.path))
            file = Path(image.file_map["image"].filename)
            if image.affine is None or not np.isfinite(image.affine).all() or not np.linalg.det(image.affine):
                raise UserError(f"{self.path} does not say where its voxels lie: its affine is broken; correct it.")
            image = nibabel.as_closest_canonical(nibabel.squeeze_image(image))
        except UserError:
            raise
        except Exception as error:  # nibabel raises errors of many kinds for what it cannot read
            raise UserError(f"cannot read the volume {self.path}: {error}") from error
        if len(image.shape) != 3:
            raise UserError(f"{self.path} has {len(image.shape)} dimensions {image.shape}; give 3-D volumes.")
        kind = image.get_data_dtype()
        if kind.names or kind.kind not in "biuf":
            what, instead = ("colours", "one channel of them") if kind.names else (f"{kind} values", "their magnitude")
            raise UserError(f"{self.path} holds {what}; slices are gray: write {instead} as a volume of numbers.")
        if min(image.shape) < 1 or np.prod(image.shape, dtype=float) > LARGEST:
            sides = " x ".join(map(str, image.shape))
            raise UserError(f"{self.path} says that it has {sides} voxels; its header is broken, or it is no volume.")
        voxels, packed = float(np.prod(image.shape, dtype=float)), file.suffix.lower() in (".gz", ".bz2", ".zst")
        what = f"the {' x '.join(map(str, image.shape))} voxels of {self.path}"
        plausible(voxels * kind.itemsize, file.stat().st_size, what, COMPRESSED if packed else 1)
        afford(8 * voxels, what)
        self._image = image
        self.shape = tuple(map(int, image.shape))
        self.affine = np.asarray(image.affine, float)
        self.spacing = tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())
        if not all(SIDES[0] <= side <= SIDES[1] for side in self.spacing):
            raise UserError(f"{self.path} says that its voxels are {self.spacing} mm large; correct its affine.")

    def values(self) -> np.ndarray:
        """(X,Y,Z) float32; what is not finite is the least of the others, which is told."""
        try:
            values = np.asarray(self._image.dataobj, np.float32)
        except Exception as error:  # as above
            raise UserError(f"cannot read the voxels of {self.path}: {error}") from error
        finite = np.isfinite(values)
        if not finite.any():
            raise UserError(f"{self.path} has no finite voxel.")
        if finite.all():
            return values
        least, count = values[finite].min(), values.size - int(finite.sum())
        note(f"{count} of {values.size} voxels of {self.path} are NaN or infinite and count as {least:g}, its least.")
        return np.where(finite, values, least)

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


def _nifti(path: Path) -> Any:
    """A NIfTI image, of which the header is read. Other forms that nibabel knows are not opened: some name files."""
    import nibabel

    sniff = None
    for kind in (nibabel.Nifti1Image, nibabel.Nifti1Pair, nibabel.Nifti2Image, nibabel.Nifti2Pair):
        found, sniff = kind.path_maybe_image(path, sniff)
        if found:
            return kind.from_filename(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such file: '{path}'")
    raise UserError(f"cannot read the volume {path}: it is no NIfTI (.nii, .nii.gz, .hdr with .img).")


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


def window_of(values: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float, float, float]:
    """Black and white of a volume by percentiles of its head, its share that is white, and the largest value.

    The head (or body) is what is brighter than FOREGROUND of the range between the 2% and 98% percentiles: air around
    it does not count, so that the window does not depend on how much of it there is.

    Returns: low, high, the fraction of the head at or above high, the 99.99% percentile of the head.

    >>> volume = np.zeros((10, 10, 10))
    >>> volume[:5, :5, :5] = np.arange(100, 225).reshape(5, 5, 5)
    >>> window_of(volume, (0, 100))[:2]
    (100.0, 224.0)
    """
    least, most = np.percentile(values, (2, 98))
    head = values[values > least + FOREGROUND * (most - least)]
    head = head if head.size else values
    low, high, top = np.percentile(head, (*percentiles, 99.99)).tolist()
    return low, high, float((head >= high).mean()), top


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
