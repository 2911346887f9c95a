"""Reads plain images by Pillow: PNG, JPEG, BMP, WebP and their like; decoded whole."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ldm.errors import UserError
from ldm.foreign.budget import afford
from ldm.images.colour import CHANNELS, Convert, converter, of_several, on_white, refuse_deep, refuse_stack
from ldm.images.damage import refuse_damaged
from ldm.images.source import Source, upright

FORMATS = ("PNG", "JPEG", "JPEG2000", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "TGA")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes of more than 8 bits
_GRAY = ("1", "L", "LA", "La")
_BASE = {mode: mode for mode in CHANNELS} | {"1": "L", "LA": "L", "La": "L", "RGBX": "RGB"}  # others become RGB


def open_plain(path: Path) -> Source | None:
    """An image that Pillow knows; None of others. Its header alone is read until pixels are asked for.

    Raises:
        UserError: more than 8 bits, several pictures, damaged, too large to be decoded whole.

    >>> Image.new("LA", (4, 6)).save("a.png")
    >>> open_plain(Path("a.png")).read(0, 0, 0, 1, 1).tolist()
    [[[255, 255, 255]]]
    """
    try:
        with _opened(path) as image:
            size, mode, orientation, deep = image.size, image.mode, _orientation(image), _is_deep(image)
            notes = _one_picture(path, image)
            convert, told = converter(_BASE.get(mode, "RGB"), image.info.get("icc_profile"))
    except Image.UnidentifiedImageError:
        return None
    if deep:
        raise refuse_deep(path)
    pixels = _pixels(path, convert)

    def read(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        return pixels()[y : y + h, x : x + w]

    return upright(Source([size], read, gray=mode in _GRAY, notes=(*notes, *[told] * bool(told))), orientation)


def read_gray_values(path: Path) -> np.ndarray:
    """A plain image as (H,W) gray values of the kind that its file holds, uint8 or deeper; of colours the luminance.

    >>> Image.fromarray(np.full((4, 6), 4000, np.uint16)).save("deep.png")
    >>> read_gray_values(Path("deep.png")).dtype
    dtype('uint16')
    """
    refuse_damaged(path)
    try:
        with _opened(path) as image:
            _one_picture(path, image)
            return np.asarray(image if image.mode in _DEEP else image.convert("L"))
    except Image.UnidentifiedImageError as error:
        raise _damaged(path, error) from None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture whose header is read; whatever Pillow raises of it within the block is one message.

    Image.UnidentifiedImageError: a kind that is not in FORMATS, as those that Pillow has other programs read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            afford(12 * math.prod(image.size), f"{path} of {image.width} x {image.height} px")
            yield image
    except (UserError, Image.UnidentifiedImageError):
        raise
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        pixels = f"{int(count[0]) / 1e6:g} million px" if count else str(error)
        raise UserError(
            f"{path} is too large for a plain image: it has {pixels}, and up to "
            f"{2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million are decoded whole; convert it to a pyramidal TIFF"
        ) from None
    except Exception as error:  # what reads damaged files raises whatever it stumbles over
        raise _damaged(path, error) from None


def _pixels(path: Path, convert: Convert) -> Callable[[], np.ndarray]:
    @lru_cache(maxsize=1)
    def pixels() -> np.ndarray:
        with _opened(path) as image:
            return _rgb(image, convert)

    return pixels


def _rgb(image: Image.Image, convert: Convert) -> np.ndarray:
    opacity = None
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("LA", "La") else "RGBA")
        opacity = np.asarray(image.getchannel("A"))
    base = _BASE.get(image.mode, "RGB")
    pixels = np.asarray(image.convert(base) if image.mode != base else image)
    rgb = convert(pixels[..., None] if pixels.ndim == 2 else pixels)
    return rgb if opacity is None else on_white(rgb, opacity)


def _is_deep(image: Image.Image) -> bool:
    """By the mode, or by the layout of the file where Pillow would drop the lower bits of 16, as of PNG and TIFF."""
    if image.mode in _DEEP:
        return True
    layouts = [tile[3] for tile in getattr(image, "tile", ())]
    raw = [layout[0] if isinstance(layout, tuple) else layout for layout in layouts]
    return any(isinstance(layout, str) and re.search(r";(16[BLN]|32)", layout) for layout in raw)


def _one_picture(path: Path, image: Image.Image) -> tuple[str, ...]:
    """What to tell of a file of several pictures, the first of which is read: cameras put previews behind it.

    UserError: it holds an animation or pages, and which is meant nobody can know.
    """
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":
        raise refuse_stack(path, f"{count} frames of an animation or pages")
    return (of_several(count),) * (count > 1)


def _orientation(image: Image.Image) -> int:
    """As EXIF numbers them, 1 is upright; Pillow turns TIFF itself, and a PNG's is not looked for behind its pixels."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({error}): it is damaged or was cut short")
