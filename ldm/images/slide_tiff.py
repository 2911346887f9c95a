"""Writes a pyramidal BigTIFF as scanners do: laid out as Aperio's, with thumbnail, label and macro image, ICC profile,
micrometres per pixel and magnification, so that OpenSlide, QuPath and their like take it for a slide.

Its first ImageDescription begins as that layout wants it, and says at once that it is SYNTHETIC; the mark
(`ldm.images.marks`) is one of its fields, which OpenSlide gives as the property aperio.SYNTHETIC.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageCms, ImageDraw, ImageFont

from ldm.files import tool_version
from ldm.images.marks import APERIO, FIELD, KEY, mark_of
from ldm.images.pyramid import TILE, tile_bar, tiles

THUMBNAIL, LABEL, MACRO = 1024, 400, (1200, 400)  # pixels: longer side, side, width and height
_REDUCED, _MACRO = 1, 9  # subfile types of Aperio's label and macro image
_FRAME = 16


@cache
def srgb() -> bytes:
    """The ICC profile of sRGB, the same bytes every time.

    >>> srgb()[36:40]
    b'acsp'
    """
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes([0x07, 0xD0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0])  # its date: the first of January 2000
    return bytes(profile)


def thumbnail(levels: Sequence[Any], side: int = THUMBNAIL) -> np.ndarray:
    """A picture (h,w,3) uint8 of an image, its longer side `side` at most. levels: of its pyramid, finest first.

    >>> thumbnail([tile], side=64).shape
    (64, 64, 3)
    """
    level = next((each for each in reversed(levels) if max(each.shape) >= side), levels[0])
    picture = Image.fromarray(np.ascontiguousarray(level[0 : level.shape[0], 0 : level.shape[1]]))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def label_image(metadata: Mapping[str, Any]) -> np.ndarray:
    """What stands on the slide's label, (400,400,3) uint8: that it is synthetic, its model and its seed.

    >>> label_image({"model": "demo-ssl", "seed": 3}).shape
    (400, 400, 3)
    """
    picture = Image.new("RGB", (LABEL, LABEL), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((4, 4, LABEL - 5, LABEL - 5), outline="black", width=3)
    lines = [f"HistoLDM {tool_version()}", "not a real specimen"]
    lines += [f"{name} {str(metadata[name])[:24]}" for name in ("model", "seed", "size", "mpp") if name in metadata]
    draw.text((24, 24), KEY, "black", ImageFont.load_default(52))
    for i, line in enumerate(lines):
        draw.text((24, 110 + 44 * i), line, "black", ImageFont.load_default(28))
    return np.asarray(picture)


def macro_image(picture: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The glass with its label at the left and the specimen on it, (400,1200,3) uint8.

    >>> macro_image(tile, label_image({})).shape
    (400, 1200, 3)
    """
    wide, tall = MACRO
    edge = np.median(np.concatenate([picture[0], picture[-1]]), 0)
    glass = Image.new("RGB", MACRO, tuple(int(value) for value in edge))
    glass.paste(Image.fromarray(label).resize((tall, tall)), (0, 0))
    specimen = Image.fromarray(picture)
    specimen.thumbnail((wide - tall - 2 * _FRAME, tall - 2 * _FRAME), Image.Resampling.LANCZOS)
    glass.paste(specimen, (tall + (wide - tall - specimen.width) // 2, (tall - specimen.height) // 2))
    return np.asarray(glass)


def write_slide_tiff(
    path: Path, levels: Sequence[Any], mpp: float, metadata: Mapping[str, Any], quality: int = 90, progress: bool = True
) -> None:
    """Write the levels of an image, finest first, as a slide; part by part, so that they may be larger than memory.

    Args:
        levels: (H,W,3) uint8 each, sliceable. mpp: micrometres per pixel of the first. metadata: goes into the mark.
        quality: of the JPEG tiles, 1..100.

    >>> import openslide
    >>> write_slide_tiff(Path("a.tif"), [tile], 0.5, {"seed": 3, "model": "m"}, progress=False)
    >>> slide = openslide.OpenSlide("a.tif")
    >>> [slide.properties[f"openslide.{name}"] for name in ("objective-power", "mpp-x")], [*slide.associated_images]
    (['20', '0.5'], ['label', 'macro', 'thumbnail'])
    """
    height, width = levels[0].shape[:2]
    picture, label = thumbnail(levels), label_image(metadata)
    told = json.dumps(mark_of(metadata)).replace("|", "\\u007c")
    head = f"{APERIO} by HistoLDM {tool_version()}, {KEY}: not a real specimen"
    about = f"{head}\n{width}x{height} [0,0 {width}x{height}] ({TILE}x{TILE}) JPEG/RGB Q={quality}"
    fields = f"|AppMag = {round(10 / mpp, 1):g}|MPP = {mpp:g}{FIELD}{told}"
    jpeg = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": quality}, "subsampling": (1, 1)}
    with tile_bar(levels, progress) as bar, tifffile.TiffWriter(path, bigtiff=True) as file:

        def level(pixels: Any, description: str | None, **more: Any) -> None:
            factor = height / pixels.shape[0], width / pixels.shape[1]
            resolution = tuple(1e4 / (mpp * each) for each in reversed(factor))
            file.write(
                tiles(pixels, bar), shape=(*pixels.shape[:2], 3), dtype=np.uint8, tile=(TILE, TILE), **jpeg,
                resolution=resolution, resolutionunit="CENTIMETER", description=description, metadata=None,
                software=f"HistoLDM {tool_version()}", iccprofile=srgb(), **more,
            )  # fmt: skip

        def beside(pixels: np.ndarray, name: str, **more: Any) -> None:
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            file.write(
                pixels, rowsperstrip=len(pixels), description=f"{head}\n{name} {size}".rstrip(), metadata=None, **more
            )

        level(levels[0], about + fields)
        beside(picture, "", **jpeg)  # the second picture is the thumbnail, whatever it is called
        for pixels in levels[1:]:
            level(pixels, None)
        beside(label, "label", photometric="rgb", compression="lzw", subfiletype=_REDUCED)
        beside(macro_image(picture, label), "macro", subfiletype=_MACRO, **jpeg)
