"""Pixels of any colour model as RGB of 8 bits, white where they are transparent; the same for every kind of file.

CMYK, CIELab and YCbCr by Pillow and its LittleCMS; an embedded ICC profile that is not sRGB is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from ldm.errors import UserError

Convert = Callable[[np.ndarray], np.ndarray]  # (H,W,C) uint8 -> (H,W,3) uint8
CHANNELS = {"L": 1, "RGB": 3, "YCbCr": 3, "LAB": 3, "CMYK": 4}
_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # of ICC profiles
_RGB_NAMES = ({"r", "red"}, {"g", "green"}, {"b", "blue"})


def converter(mode: str, profile: bytes | None = None) -> tuple[Convert, str]:
    """What makes RGB of pixels of a mode in CHANNELS, and what to tell of an ICC profile, or "".

    >>> convert, told = converter("CMYK")
    >>> convert(np.full((1, 1, 4), 51, np.uint8)).tolist(), told
    ([[[163, 163, 163]]], '')
    """
    if profile and mode in _SPACES.values():
        transform, told = _profiled(profile, mode)
        if transform is not None or told:
            return transform or converter(mode)[0], told
    if mode == "L":
        return (lambda pixels: np.broadcast_to(pixels, (*pixels.shape[:2], 3))), ""
    if mode == "RGB":
        return (lambda pixels: pixels), ""
    if mode == "LAB":
        return _applied(_lab(), mode), ""
    return (lambda pixels: np.asarray(_image(pixels, mode).convert("RGB"))), ""


@cache
def _lab() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")


def _image(pixels: np.ndarray, mode: str) -> Image.Image:
    height, width = pixels.shape[:2]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels).tobytes())


def _applied(transform: ImageCms.ImageCmsTransform, mode: str) -> Convert:
    def convert(pixels: np.ndarray) -> np.ndarray:
        rgb = np.asarray(transform.apply(_image(pixels, mode)))
        return np.broadcast_to(rgb[..., 1:2], rgb.shape) if mode == "L" else rgb

    return convert


def _profiled(profile: bytes, mode: str) -> tuple[Convert | None, str]:
    try:
        given = ImageCms.ImageCmsProfile(BytesIO(profile))
        name = ImageCms.getProfileDescription(given).strip()
        if "srgb" in name.lower().replace(" ", ""):
            return None, ""
        if _SPACES.get(given.profile.xcolor_space.strip()) != mode:
            raise ValueError(f"it is of {given.profile.xcolor_space.strip()}")
        transform = ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        return None, f"its ICC profile cannot be applied ({error})"
    return _applied(transform, mode), f"its colours are converted to sRGB from its ICC profile '{name}'"


def on_white(rgb: np.ndarray, opacity: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    """Colours (H,W,3) uint8 of an opacity (H,W) uint8 over white. premultiplied: they are multiplied by it already.

    >>> on_white(np.zeros((1, 2, 3), np.uint8), np.array([[255, 51]], np.uint8))[0].tolist()
    [[0, 0, 0], [204, 204, 204]]
    """
    if opacity.min(initial=255) == 255:
        return rgb
    share = opacity[..., None].astype(np.uint32)
    own = rgb.astype(np.uint32) * (255 if premultiplied else share)
    return np.minimum((own + 255 * (255 - share) + 127) // 255, 255).astype(np.uint8)


def refuse_deep(path: Path) -> UserError:
    """What to say of pixels of more than 8 bits: which part of their range is meant, no file says.

    >>> str(refuse_deep(Path("a.png")))
    'a.png has more than 8 bits per sample, and 8 are read: choose the range to show and save it with 8'
    """
    return UserError(
        f"{path} has more than 8 bits per sample, and 8 are read: choose the range to show and save it with 8"
    )


def refuse_channels(path: Path, count: int, names: list[str]) -> UserError:
    """What to say of channels that are no colours, as of immunofluorescence.

    >>> str(refuse_channels(Path("a.tif"), 2, ["DAPI", "CD8"]))
    'a.tif holds 2 channels (DAPI, CD8) that are no colours, as of fluorescence; images in RGB or gray are read: ...'
    """
    told = f" ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})" if any(names) else ""
    return UserError(
        f"{path} holds {count} channels{told} that are no colours, as of fluorescence; images in RGB or gray are read: "
        "save it as RGB, or one channel as gray"
    )


def refuse_stack(path: Path, held: str) -> UserError:
    """What to say of several planes, times or pictures in one file. held: in words.

    >>> str(refuse_stack(Path("a.tif"), "ZYX (5, 64, 64)"))
    'a.tif holds several images, ZYX (5, 64, 64); single ones are read: save the one that you mean'
    """
    return UserError(f"{path} holds several images, {held}; single ones are read: save the one that you mean")


def of_several(count: int) -> str:
    """What to tell of a file whose other images are smaller than the first, as thumbnails, labels and previews are.

    >>> of_several(2)
    'its file holds 2 images, of which the first is read'
    """
    return f"its file holds {count} images, of which the first is read"


def says_rgb(names: list[str], colours: list[str]) -> bool:
    """Whether three channels of these names and colours (RRGGBB; "" where unknown) can be red, green and blue.

    >>> says_rgb(["R", "G", "B"], []), says_rgb(["DAPI", "CD8", "PanCK"], [])
    (True, False)
    >>> says_rgb([], ["0000FF", "00FF00", "FF0000"])
    False
    """
    named = [name.strip().lower() for name in names]
    own = all(
        not name or name in known or name.removeprefix("channel").strip(" :_-").isdigit()
        for name, known in zip(named, _RGB_NAMES)
    )
    return own and [c.upper() for c in colours[:3] if c] in ([], ["FF0000", "00FF00", "0000FF"])
