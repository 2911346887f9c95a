"""Opens slides and images of any kind behind one face, and finds the tissue on them.

PNG, JPEG and their like by Pillow; of other files what OpenSlide reads (SVS, NDPI, MRXS, SCN, DICOM, pyramidal TIFF),
then what tifffile does (OME-TIFF and plain TIFF), then Pillow; folders as OME-Zarr.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import openslide
import tifffile
import zarr
from PIL import ExifTags, Image, ImageOps
from skimage.filters import gaussian, threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

from ldm.errors import UserError
from ldm.images.kinds import PLAIN
from ldm.images.ome_zarr import OmeZarr
from ldm.images.tiff_check import missing_bytes

# level, x, y, width, height in pixels of that level, inside it -> (height, width, 3) uint8
ReadLevel = Callable[[int, int, int, int, int], np.ndarray]
_BLOCK = 4096
_MAX_MPP = 50.0  # a coarser "resolution" is a screen's or a printer's, not a microscope's
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes of more than 8 bits
_GRAY = ("1", "L", "LA")


class Slide:
    """One slide or image, read-only.

    Attributes:
        path: its file or OME-Zarr folder.
        dimensions: (width, height) of level 0 in pixels.
        mpp: micrometres per level-0 pixel, 0 where they are unknown.
        magnification: objective power, or None where the file does not say.
        gray: whether it has one channel; it is read as three that are alike.
    """

    def __init__(
        self, path: Path, levels: list[tuple[int, int]], read_level: ReadLevel, mpp: float = 0.0,
        magnification: float | None = None, gray: bool = False,
    ) -> None:  # fmt: skip
        self.path, self.dimensions, self.mpp, self.magnification = path, levels[0], mpp, magnification
        self.gray, self._levels, self._read_level = gray, levels, read_level

    @classmethod
    def of_pixels(cls, pixels: np.ndarray, path: Path = Path("image"), mpp: float = 0.0) -> Slide:
        """An image (H,W,3) uint8 that is in memory. path: what it is called in messages."""
        size = (pixels.shape[1], pixels.shape[0])
        return cls(path, [size], lambda level, x, y, w, h: pixels[y : y + h, x : x + w], mpp)

    def __repr__(self) -> str:
        return f"Slide({self.path.name!r}, {self.dimensions[0]} x {self.dimensions[1]} px at {self.mpp:g} um/px)"

    def _best_level(self, downsample: float) -> tuple[int, float]:
        """The coarsest level that is not coarser than asked, and its own downsample."""
        factors = [self.dimensions[0] / w for w, _ in self._levels]
        level = max((i for i, f in enumerate(factors) if f <= downsample * 1.01), key=factors.__getitem__, default=0)
        return level, factors[level]

    def read(self, x: float, y: float, w: float, h: float, size: tuple[int, int] | None = None) -> np.ndarray:
        """Read a region given in level-0 pixels.

        Args:
            x, y, w, h: top-left corner and extent in level-0 pixels; may be fractions and may reach outside the slide.
            size: (width, height) of the result; None is one pixel per level-0 pixel.
        Returns:
            (height, width, 3) uint8 RGB, white outside the slide and where the file is transparent.
        Raises:
            UserError: the file cannot be decoded there.
        """
        width, height = size or (round(w), round(h))
        level, factor = self._best_level(min(w / width, h / height))
        left, top, right, bottom = (v / factor for v in (x, y, x + w, y + h))
        x0, y0, x1, y1 = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
        pixels = np.full((y1 - y0, x1 - x0, 3), 255, np.uint8)
        level_w, level_h = self._levels[level]
        cx0, cy0, cx1, cy1 = max(x0, 0), max(y0, 0), min(x1, level_w), min(y1, level_h)
        if cx1 > cx0 and cy1 > cy0:
            try:
                inside = self._read_level(level, cx0, cy0, cx1 - cx0, cy1 - cy0)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"{self.path} cannot be decoded at x={x:g}, y={y:g} ({error}): "
                    "the file is damaged or was cut short; copy it again from its source"
                ) from None
            pixels[cy0 - y0 : cy1 - y0, cx0 - x0 : cx1 - x0] = inside
        if pixels.shape[:2] == (height, width) and (left, top, right, bottom) == (x0, y0, x1, y1):
            return pixels
        box = (left - x0, top - y0, right - x0, bottom - y0)
        resample = Image.Resampling.LANCZOS if right - left > width else Image.Resampling.BICUBIC
        return np.asarray(Image.fromarray(pixels).resize((width, height), resample, box))

    def read_in_parts(self, x: float, y: float, w: float, h: float, size: tuple[int, int]) -> np.ndarray:
        """As `read`, in parts of at most _BLOCK^2 pixels: little memory where the file has no level near `size`."""
        width, height = size
        _, factor = self._best_level(min(w / width, h / height))
        if w * h / factor**2 <= _BLOCK**2 or max(size) == 1:
            return self.read(x, y, w, h, size)
        along = 1 if width >= height else 0  # the axis that is cut
        first = size[1 - along] // 2
        cut = (w, h)[1 - along] * first / size[1 - along]
        if along:
            parts = [(x, y, cut, h, (first, height)), (x + cut, y, w - cut, h, (width - first, height))]
        else:
            parts = [(x, y, w, cut, (width, first)), (x, y + cut, w, h - cut, (width, height - first))]
        return np.concatenate([self.read_in_parts(*part) for part in parts], axis=along)

    def bands(self) -> Iterator[np.ndarray]:
        """The finest level from top to bottom, (h, width, 3) uint8 at a time."""
        width, height = self.dimensions
        for top in range(0, height, _BLOCK // 2):
            yield self.read(0, top, width, min(_BLOCK // 2, height - top))

    def thumbnail(self, mpp: float) -> np.ndarray:
        """The whole slide at about `mpp` um per pixel, (h, w, 3) uint8; read in blocks, so that memory stays small."""
        width, height = (max(1, round(d * self.mpp / mpp)) for d in self.dimensions)
        out = np.empty((height, width, 3), np.uint8)
        sx, sy = self.dimensions[0] / width, self.dimensions[1] / height
        _, factor = self._best_level(min(sx, sy))
        step = max(1, int(_BLOCK * factor / max(sx, sy)))
        for top in range(0, height, step):
            for left in range(0, width, step):
                w, h = min(step, width - left), min(step, height - top)
                out[top : top + h, left : left + w] = self.read(left * sx, top * sy, w * sx, h * sy, (w, h))
        return out


def open_image(path: Path | str, mpp: float | None = None) -> Slide:
    """Open a slide or an image of any kind: what every command reads pixels through.

    Pixels are RGB of 8 bits, upright, white where the file is transparent. Of PNG and its like the header alone is read
    at first, then all of them; of other kinds what is asked for.

    Args:
        mpp: micrometres per level-0 pixel; overrides what the file says.
    Raises:
        UserError: no such file, no image, more than 8 bits, cut short.

    >>> open_image(slide_path)
    Slide('CMU-1-Small-Region.svs', 2220 x 2967 px at 0.499 um/px)
    """
    path = Path(path)
    if mpp is not None and not 0 < mpp <= _MAX_MPP:
        raise UserError(f"mpp is micrometres per pixel, above 0 and up to {_MAX_MPP:g}; got {mpp}")
    if not path.exists():
        raise UserError(f"there is no slide or image at {path}")
    if path.is_dir():
        slide = _with_zarr(path)
    else:
        _refuse_damaged(path)
        plain = path.suffix.lower() in PLAIN
        openers = (_with_pillow,) if plain else (_with_openslide, _with_tifffile, _with_pillow)
        slide = next((slide for opener in openers if (slide := opener(path)) is not None), None)
    if slide is None:
        raise UserError(f"{path} is not a slide or image that OpenSlide, tifffile or Pillow can read")
    if mpp is not None:
        slide.mpp = mpp
    return slide


def open_slide(path: Path | str, mpp: float | None = None) -> Slide:
    """As `open_image`, of one whose micrometres per pixel are known: UserError where neither it nor `mpp` says them.

    >>> open_slide(slide_path).mpp
    0.499
    """
    slide = open_image(path, mpp)
    if not slide.mpp:
        known = f"at {slide.magnification:g}x probably {10 / slide.magnification:g}" if slide.magnification else ""
        raise UserError(
            f"{path} does not say how many micrometres a pixel has; pass --slide-mpp (mpp= in Python), "
            f"{known or 'about 0.25 for 40x, 0.5 for 20x, 1.0 for 10x'}"
        )
    return slide


def read_gray_values(path: Path) -> np.ndarray:
    """A plain image as (H,W) gray values of the kind that its file holds, uint8 or deeper; of colours the luminance.

    >>> Image.fromarray(np.full((4, 6), 4000, np.uint16)).save("deep.png")
    >>> read_gray_values(Path("deep.png")).dtype
    dtype('uint16')
    """
    _refuse_damaged(path)
    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode in _DEEP else image.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _damaged(path, error) from None


def _refuse_damaged(path: Path) -> None:
    """UserError for empty files, text files and TIFF files that point beyond their end."""
    try:
        head = path.open("rb").read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{path} is empty (0 bytes); copy it again from its source")
    lists = path.suffix.lower() in (".vms", ".vmu")  # Hamamatsu's text files that name the images of a slide
    if not lists and b"\0" not in head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        start = head.decode().split("\n")[0][:60]
        raise UserError(f"{path} holds text, not an image; it begins with '{start}'")
    if missing := missing_bytes(path):
        raise UserError(
            f"{path} was cut short at {path.stat().st_size} bytes ({missing}); copy it again from its source"
        )


def _with_openslide(path: Path) -> Slide | None:
    try:
        file = openslide.OpenSlide(str(path))
    except openslide.OpenSlideError:
        return None
    properties = file.properties
    factors = file.level_downsamples

    def read_level(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        corner = (round(x * factors[level]), round(y * factors[level]))
        return _on_white(file.read_region(corner, level, (w, h)))

    mpps = [
        float(properties[k]) for k in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y) if k in properties
    ]
    power = properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    gray = properties.get(openslide.PROPERTY_NAME_VENDOR) == "generic-tiff" and _one_sample(path)
    levels = list(file.level_dimensions)
    return Slide(path, levels, read_level, _usable_mpp(mpps), float(power) if power else None, gray)


def _one_sample(path: Path) -> bool:
    with tifffile.TiffFile(path) as file:
        return file.pages[0].samplesperpixel == 1


def _with_tifffile(path: Path) -> Slide | None:
    try:
        file = tifffile.TiffFile(path)
        series, kind = file.series[0], file.pages[0].photometric
    except (tifffile.TiffFileError, IndexError, ValueError):
        return None
    channels = series.shape[2] if series.ndim == 3 else 1
    known = {1: ("MINISBLACK",), 3: ("RGB", "YCBCR"), 4: ("RGB",)}.get(channels, ())
    if series.ndim > 3 or series.dtype != np.uint8 or kind is None or kind.name not in known:
        if len(file.pages) == 1 and series.dtype in (np.uint8, np.bool_):
            return None  # a palette, CMYK, planes, ...: Pillow's business
        raise UserError(
            f"{path} holds {series.axes} {series.shape} {series.dtype}; RGB and gray images of 8 bits are read"
        )
    arrays = [zarr.open_array(level.aszarr(), mode="r") for level in series.levels]

    def read_level(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        return _as_rgb(np.asarray(arrays[level][y : y + h, x : x + w]).reshape(h, w, channels))

    levels = [(level.shape[1], level.shape[0]) for level in series.levels]
    return Slide(path, levels, read_level, _usable_mpp(_tiff_mpps(file)), _ome_magnification(file), channels == 1)


def _with_zarr(path: Path) -> Slide:
    image = OmeZarr(path)
    return Slide(path, image.levels, lambda *part: _as_rgb(image.read(*part)), image.mpp, gray=image.channels == 1)


def _as_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H,W,3) of (H,W,1), (H,W,3), or (H,W,4) whose last channel is opacity."""
    if pixels.shape[2] == 4:
        return _on_white(Image.fromarray(pixels))
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _tiff_mpps(file: tifffile.TiffFile) -> list[float]:
    """Micrometres per pixel in x and y from OME-XML, else from the resolution tags."""
    if file.ome_metadata:
        image = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
        pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
        scale = {"nm": 1e-3, "mm": 1e3, "cm": 1e4}
        found = [
            float(pixels[f"PhysicalSize{a}"]) * scale.get(pixels.get(f"PhysicalSize{a}Unit", "µm"), 1.0)
            for a in "XY"
            if f"PhysicalSize{a}" in pixels
        ]
        if found:
            return found
    tags = file.pages[0].tags
    unit_um = {2: 25400.0, 3: 10000.0}.get(int(tags.valueof("ResolutionUnit") or 1))
    ratios = [tags.valueof(name) for name in ("XResolution", "YResolution")]
    return [unit_um * r[1] / r[0] for r in ratios if unit_um and r and r[0] and r[1]]


def _ome_magnification(file: tifffile.TiffFile) -> float | None:
    if not file.ome_metadata:
        return None
    objective = tifffile.xml2dict(file.ome_metadata)["OME"].get("Instrument", {})
    objective = objective.get("Objective", {}) if isinstance(objective, dict) else {}
    power = objective.get("NominalMagnification") if isinstance(objective, dict) else None
    return float(power) if power else None


def _with_pillow(path: Path) -> Slide | None:
    try:
        with Image.open(path) as image:
            size, mode, orientation = image.size, image.mode, _orientation(image)
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is too large for a plain image: {error}; convert it to a pyramidal TIFF") from None
    except Image.UnidentifiedImageError:
        return None
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(path, error) from None
    if mode in _DEEP:
        raise UserError(f"{path} has more than 8 bits per pixel (mode {mode}); window it and save it with 8")

    @lru_cache(maxsize=1)
    def pixels() -> np.ndarray:
        try:
            with Image.open(path) as image:
                return _on_white(image if orientation == 1 else ImageOps.exif_transpose(image))
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(path, error) from None

    def read_level(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        return pixels()[y : y + h, x : x + w]

    return Slide(path, [size[::-1] if orientation > 4 else size], read_level, gray=mode in _GRAY)


def _orientation(image: Image.Image) -> int:
    """As EXIF numbers them, 1 is upright; Pillow turns TIFF itself, and a PNG's is not looked for behind its pixels."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({error}): it is damaged or was cut short")


def _on_white(image: Image.Image) -> np.ndarray:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _usable_mpp(mpps: list[float]) -> float:
    """The mean of x and y, or 0 where there is none that a microscope could have."""
    mpp = float(np.mean(mpps)) if mpps else 0.0
    return mpp if 0 < mpp <= _MAX_MPP else 0.0


class TissueMask:
    """Where a slide has tissue: `mask` (h, w) bool over the whole slide at `mpp` um per pixel.

    Smoothed over about a cell (8 um), a pixel is tissue where its colour (max - min over RGB) or its optical density is
    above Otsu's threshold, both bounded so that the noise of empty glass is never split into tissue and not tissue.
    Specks below 2500 um2 go, holes below 10 000 um2 are filled.
    """

    def __init__(self, slide: Slide, mpp: float = 8.0) -> None:
        self.mpp = min(
            mpp, max(slide.mpp, max(slide.dimensions) * slide.mpp / 512)
        )  # small slides are looked at closer
        thumbnail = slide.thumbnail(self.mpp)
        smooth = gaussian(thumbnail, sigma=8.0 / self.mpp, channel_axis=-1)  # in [0, 1]
        glass = np.maximum(np.percentile(smooth.reshape(-1, 3), 99, axis=0), 0.86)  # its tint; tissue is darker
        smooth = np.clip(smooth / glass, 1 / 256, 1)
        colour, density = smooth.max(-1) - smooth.min(-1), -np.log10(smooth).mean(-1)
        tissue = (colour > _otsu(colour, 0.03, 0.12)) | (density > _otsu(density, 0.035, 0.20))
        pixel = self.mpp**2
        tissue = remove_small_objects(tissue, max_size=max(1, int(2500 / pixel)))
        self.mask = remove_small_holes(tissue, max_size=max(1, int(10_000 / pixel)))
        self._scale = (self.mask.shape[1] / slide.dimensions[0], self.mask.shape[0] / slide.dimensions[1])
        self._sums = np.pad(self.mask.cumsum(0).cumsum(1), ((1, 0), (1, 0))).astype(np.float64)

    def _sum_to(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Tissue in mask pixels between the corner (0, 0) and (x, y), bilinear between whole pixels."""
        h, w = self._sums.shape
        x, y = np.clip(x, 0, w - 1), np.clip(y, 0, h - 1)
        x0, y0 = np.minimum(x.astype(int), w - 2), np.minimum(y.astype(int), h - 2)
        fx, fy = x - x0, y - y0
        s = self._sums
        upper = s[y0, x0] * (1 - fx) + s[y0, x0 + 1] * fx
        lower = s[y0 + 1, x0] * (1 - fx) + s[y0 + 1, x0 + 1] * fx
        return upper * (1 - fy) + lower * fy

    def fraction(self, coords: np.ndarray, extent: float) -> np.ndarray:
        """Tissue fraction (n,) of squares with corners `coords` (n, 2) and side `extent`, both in level-0 pixels."""
        x0, y0 = coords[:, 0] * self._scale[0], coords[:, 1] * self._scale[1]
        x1, y1 = (coords[:, 0] + extent) * self._scale[0], (coords[:, 1] + extent) * self._scale[1]
        total = self._sum_to(x1, y1) - self._sum_to(x0, y1) - self._sum_to(x1, y0) + self._sum_to(x0, y0)
        return np.clip(total / ((x1 - x0) * (y1 - y0)), 0, 1).astype(np.float32)


def _otsu(values: np.ndarray, low: float, high: float) -> float:
    return float(np.clip(threshold_otsu(values) if np.ptp(values) > 0 else high, low, high))
