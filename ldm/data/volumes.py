"""Volumes: reading and writing NIfTI, cutting slices to square tiles, and putting tiles back where they were cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import repeat
from PIL import Image
from scipy import ndimage

from ldm.errors import UserError, note
from ldm.files import whole
from ldm.foreign.budget import COMPRESSED, afford, plausible
from ldm.foreign.paths import allowed

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # of a volume in RAS orientation: right, anterior, superior
AXIS = AXES | {str(number): number for number in AXES.values()}  # by name or number
FOREGROUND = 0.05  # of the window: what is brighter belongs to the body
PERCENTILES = (0.5, 99.9)  # of the head, that are black and white where nothing else is said
LARGEST = 1 << 31  # voxels
VOLUMES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")
WRITTEN = (".nii", ".nii.gz")
SIDES = (1e-4, 1e3)  # mm that the side of a voxel can have


class Volume:
    """A 3-D NIfTI image in RAS+ orientation, whatever its file's: axes run to the right, to anterior, to superior.

    The header is read at once, voxels by `values`.

    Attributes:
        shape (3), spacing (3) in mm, affine (4,4) voxel to mm. own: nibabel's image of the file, as it lies there.
    """

    def __init__(self, path: Path | str):
        import nibabel

        self.path = Path(path)
        try:
            image = _nifti(allowed(self.path))
            file = Path(image.file_map["image"].filename)
            if image.affine is None or not np.isfinite(image.affine).all() or not np.linalg.det(image.affine):
                raise UserError(f"{self.path} does not say where its voxels lie: its affine is broken; correct it.")
            self.own = image
            image = nibabel.as_closest_canonical(nibabel.squeeze_image(image))
        except UserError:
            raise
        except Exception as error:  # nibabel raises errors of many kinds for what it cannot read
            raise UserError(f"cannot read the volume {self.path}: {error}") from error
        if len(image.shape) != 3:
            raise UserError(
                f"{self.path} has {len(image.shape)} dimensions {image.shape}; give 3-D volumes: nibabel.four_to_three "
                "and fslsplit make them of one of four dimensions."
            )
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

    def save(self, path: Path | str, values: np.ndarray, text: str, shown: tuple[float, float]) -> None:
        """Write values (X,Y,Z), RAS+ as `values()` gives them, as a volume like the file: turned as it lies there.

        Affine, sform, qform and their codes, units and the size of voxels stay the file's; the numbers are float32,
        without a slope. Extensions of the file, which may tell of its patient, do not go along.

        text: the mark of what is generated, see `ldm.images.marks.mark_text`: its first line stands in `descrip`, all
        of it in an extension (a comment). shown: values that viewers show black and white.
        UserError: a name that does not end in .nii or .nii.gz.
        """
        import nibabel
        from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

        path = Path(path)
        if not path.name.lower().endswith(WRITTEN):
            raise UserError(f"a volume is written as {' or '.join(WRITTEN)}; got {path.name}.")
        turn = ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), io_orientation(self.own.affine))
        turned = apply_orientation(np.asarray(values, np.float32), turn).reshape(self.own.shape)
        second = isinstance(self.own, (nibabel.Nifti2Image, nibabel.Nifti2Pair))
        header = self.own.header.copy()
        header.extensions.clear()
        header.set_data_dtype(np.float32)
        header["descrip"] = text.splitlines()[0].encode("ascii", "replace")[:79]
        header["cal_min"], header["cal_max"] = shown
        image = (nibabel.Nifti2Image if second else nibabel.Nifti1Image)(turned, self.own.affine, header)
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", text.encode("ascii", "replace")))
        with whole(path) as part:
            nibabel.save(image, part)

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
    return repeat(np.rint(fitted(image, size, spacing) * 255).astype(np.uint8), "h w -> h w 3")


def fitted(image: np.ndarray, size: int, spacing: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """`to_tile`, of numbers: (size,size) float32, zero around the image.

    >>> tile = fitted(np.ones((50, 100)), 64)
    >>> tile.shape, float(tile.sum()) / 64
    ((64, 64), 32.0)
    """
    top, left, height, width = _place(image.shape, size, spacing)
    tile = np.zeros((size, size), np.float32)
    tile[top : top + height, left : left + width] = _resized(image, (height, width), Image.Resampling.BILINEAR)
    return tile


def unfitted(tile: np.ndarray, shape: tuple[int, int], spacing: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """What `fitted` made of an image of this shape (H,W), back at its size: (H,W) float32, nothing moved. Bicubic.

    >>> image = np.linspace(0, 1, 96, dtype=np.float32)[:, None].repeat(80, 1)
    >>> round(float(abs(unfitted(fitted(image, 64), image.shape) - image)[2:-2].max()), 2)
    0.0
    """
    top, left, height, width = _place(shape, len(tile), spacing)
    return _resized(tile[top : top + height, left : left + width], shape, Image.Resampling.BICUBIC)


def _place(shape: tuple[int, ...], size: int, spacing: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of an image in its tile."""
    extent = [length * each for length, each in zip(shape, spacing)]
    height, width = (max(1, round(size * each / max(extent))) for each in extent)
    return (size - height) // 2, (size - width) // 2, height, width


def _resized(image: np.ndarray, shape: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image, np.float32)).resize(shape[::-1], how))


def put_slice(values: np.ndarray, axis: int, index: int, image: np.ndarray) -> None:
    """Set slice `index` of a volume (X,Y,Z), as `cut_slice` gives it.

    >>> volume = np.zeros((4, 5, 6))
    >>> put_slice(volume, AXES["coronal"], 2, np.arange(24).reshape(6, 4))
    >>> bool((cut_slice(volume, AXES["coronal"], 2) == np.arange(24).reshape(6, 4)).all())
    True
    """
    values[(slice(None),) * axis + (index,)] = image[::-1].T


def head_in(image: np.ndarray, margin: int = 1) -> np.ndarray:
    """Where the head (or body) is in a slice (H,W) that is `windowed`: what is brighter than FOREGROUND, what that
    encloses, and `margin` pixels around. Bool.

    >>> ring = np.zeros((9, 9))
    >>> ring[2:7, 2:7] = 1
    >>> ring[3:6, 3:6] = 0
    >>> int(head_in(ring, margin=0).sum()), int(head_in(ring).sum())
    (25, 45)
    """
    filled = ndimage.binary_fill_holes(image > FOREGROUND)
    return ndimage.binary_dilation(filled, iterations=margin) if margin and filled.any() else filled


def trained_on(attrs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a model must remember of the volumes whose slices, stores of these attributes, it learned to make.

    Returns: `modality`, `axis` and `percentiles` where all have the same, and `window`: the values that were black and
    white, the median of all. {} unless all are slices of volumes.

    >>> trained_on([{"modality": "t1", "axis": 2, "window": [0, high], "percentiles": [0, 98]} for high in (90, 110)])
    {'modality': 't1', 'axis': 2, 'percentiles': [0, 98], 'window': [0.0, 100.0]}
    """
    if not attrs or not all(each.get("axis") is not None and each.get("window") for each in attrs):
        return {}
    known = {}
    for name in ("modality", "axis", "percentiles"):
        first = attrs[0].get(name)
        if first is not None and all(each.get(name) == first for each in attrs):
            known[name] = first
    return known | {"window": np.median([each["window"] for each in attrs], 0).tolist()}


def volumes_in(path: Path) -> list[Path]:
    """The NIfTI volumes that a path is: the file itself, or those of a folder that holds no other files, sorted.

    >>> volumes_in(slide_path)
    []
    """
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        found = [file for file in files if _is_volume(file)]
        return [file for file in found if not _of_pair(file)] if len(found) == len(files) else []
    return [path] if _is_volume(path) else []


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(VOLUMES)


def _of_pair(path: Path) -> bool:
    """The file of voxels beside a header."""
    return ".img" in path.name.lower() and path.with_name(path.name.replace(".img", ".hdr")).exists()


def name_of(path: Path) -> str:
    """The name of a volume's file without its endings.

    >>> name_of(Path("a/brain.t1.nii.gz"))
    'brain.t1'
    """
    ending = next((each for each in sorted(VOLUMES, key=len, reverse=True) if path.name.lower().endswith(each)), "")
    return path.name[: len(path.name) - len(ending)]
