"""Reads TIFF: plain, tiled, pyramidal, OME-TIFF, ImageJ's; what scanners write goes to OpenSlide.

Strips and tiles of any layout, compression and colour model of TIFF 6.0 are decoded one by one as they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from tifffile import EXTRASAMPLE, PHOTOMETRIC

from ldm.errors import UserError, some
from ldm.foreign.budget import afford
from ldm.images.colour import (
    CHANNELS,
    Convert,
    converter,
    of_several,
    on_white,
    refuse_channels,
    refuse_deep,
    refuse_stack,
)
from ldm.images.scale import INCH, UNITS, UNKNOWN, Scale, physical_scale, printed, scale_of
from ldm.images.source import Source, upright

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MODES = {
    PHOTOMETRIC.MINISBLACK: "L", PHOTOMETRIC.MINISWHITE: "L", PHOTOMETRIC.PALETTE: "L", PHOTOMETRIC.RGB: "RGB",
    PHOTOMETRIC.YCBCR: "YCbCr", PHOTOMETRIC.SEPARATED: "CMYK", PHOTOMETRIC.CIELAB: "LAB", PHOTOMETRIC.ICCLAB: "LAB",
}  # fmt: skip
_OPACITY = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
_USUAL = (1, 5, 7, 8, 32773, 32946)  # compressions that every reader knows: none, LZW, JPEG, Deflate, PackBits
_JPEG = (6, 7)  # decoded to RGB by their own decoder
_HELD = 2**25  # bytes of tiles and strips that are kept decoded, for neighbours share them
_MOST_HELD = 3 * 2**25  # the same of wide images, of which two rows are kept

Read = Callable[[int, int, int, int], np.ndarray]  # x, y, width, height -> (height, width, samples)


def open_tiff(path: Path) -> Source | None:
    """A TIFF file; None where it is none, or its compression is one that only Pillow may know.

    Raises:
        UserError: more than 8 bits, channels that are no colours, several planes, pixels that are not square.

    >>> from ldm.images.write import save_bigtiff
    >>> source = open_tiff(save_bigtiff("a.tif", tile, 0.5, {}))
    >>> source.levels, source.scale.origin
    ([(256, 256)], 'TIFF resolution tag')
    """
    try:
        file = tifffile.TiffFile(path, _multifile=False)  # which its OME-XML may name: its own pixels alone
        series = file.series[0]
        pages = [level.keyframe for level in series.levels]
    except (tifffile.TiffFileError, LookupError, ValueError):
        return None
    page, ome = pages[0], _ome_image(file)
    _check_axes(path, series, ome)
    if page.dtype == np.int8:
        raise UserError(f"{path} holds numbers below 0 (int8); images of 0 to 255 are read")
    if page.dtype is None or page.dtype not in (np.uint8, np.bool_):
        raise refuse_deep(path)
    mode = _MODES.get(page.photometric)
    if mode is None or (mode == "CMYK" and page.tags.valueof("InkSet", 1) != 1):
        name = getattr(page.photometric, "name", page.photometric)
        raise UserError(f"{path} is of the colour model {name}; gray, RGB, palette, CMYK, CIELab and YCbCr are read")
    held = np.memmap(path, np.uint8, "r")  # threads and forked processes share no place in the file
    reads = [page_reader(own, held) for own in pages]
    if page.compression not in _USUAL or page.is_subsampled:
        try:
            reads[0](0, 0, 1, 1)
        except Exception:  # whatever a decoder raises; Pillow's libtiff may know it
            return None
    to_rgb, notes = _to_rgb(path, page, mode)
    notes += _first_of_several(path, file)

    def read(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        return to_rgb(reads[level](x, y, w, h))

    scale = _scale(path, file, ome)
    levels = [(own.imagewidth, own.imagelength) for own in pages]
    gray = mode == "L" and page.photometric != PHOTOMETRIC.PALETTE
    source = Source(levels, read, scale, _ome_magnification(file), gray, notes=notes)
    return upright(source, page.tags.valueof("Orientation", 1))


def _check_axes(path: Path, series: tifffile.TiffPageSeries, ome: dict[str, Any]) -> None:
    sizes = dict(zip(series.axes, series.shape))
    if set(sizes) <= {"Y", "X", "S"}:
        return
    if sizes.get("C", 1) > 1 and max((n for axis, n in sizes.items() if axis not in "YXCS"), default=1) == 1:
        channels = ome.get("Pixels", {}).get("Channel", [])
        channels = channels if isinstance(channels, list) else [channels]
        raise refuse_channels(path, sizes["C"], [str(channel.get("Name", "")) for channel in channels])
    raise refuse_stack(path, f"{series.axes} {series.shape}")


def _first_of_several(path: Path, file: tifffile.TiffFile) -> tuple[str, ...]:
    """What to tell of a file of several images, the first of which is read.

    UserError: another is as large or larger, and which is meant nobody can know.
    """
    sizes = [(series.keyframe.imagewidth, series.keyframe.imagelength) for series in file.series]
    if max((w * h for w, h in sizes[1:]), default=0) >= sizes[0][0] * sizes[0][1]:
        listed = some([f"{w} x {h} px" for w, h in sizes], 5)
        raise refuse_stack(path, f"{len(sizes)} of {listed}, and the first is not larger than the others")
    return (of_several(len(sizes)),) * (len(sizes) > 1)


def _to_rgb(path: Path, page: tifffile.TiffPage, mode: str) -> tuple[Convert, tuple[str, ...]]:
    """What makes RGB of a page's samples (H,W,S), and what to tell of it."""
    kind, extras, notes = page.photometric, list(page.extrasamples), []
    count = CHANNELS[mode]
    beyond = page.samplesperpixel - count
    if beyond < 0:
        raise UserError(
            f"{path} has {page.samplesperpixel} samples per pixel; its colour model {kind.name} has {count}"
        )
    if beyond and not extras:
        extras = [EXTRASAMPLE.UNASSALPHA]
    opacity = next((i for i, extra in enumerate(extras[:beyond]) if extra in _OPACITY), None)
    others = beyond - (opacity is not None)
    if others > 1 or (others and mode == "L"):
        raise refuse_channels(path, page.samplesperpixel, [])
    if others:
        notes.append(f"its channel {count + 1} is left out: the file does not say that it is opacity")
    if kind == PHOTOMETRIC.YCBCR and page.compression not in _USUAL[:2] + _USUAL[3:]:
        mode = "RGB"  # the decoder of JPEG and its like has made it of it
    colours, told = converter(mode, page.iccprofile)
    palette = _palette(page) if kind == PHOTOMETRIC.PALETTE else None
    top = 2**page.bitspersample - 1 if isinstance(page.bitspersample, int) else 255

    def to_rgb(samples: np.ndarray) -> np.ndarray:
        own = samples[..., :count]
        if palette is not None:
            rgb = palette[own[..., 0]]
        else:
            if top < 255:
                own = (own.astype(np.uint16) * 255 // top).astype(np.uint8)
            if kind == PHOTOMETRIC.MINISWHITE:
                own = 255 - own
            elif kind == PHOTOMETRIC.ICCLAB:
                own = own ^ np.array([0, 128, 128], np.uint8)  # its a* and b* are not signed
            rgb = colours(own)
        if opacity is None:
            return rgb
        return on_white(rgb, samples[..., count + opacity], extras[opacity] == EXTRASAMPLE.ASSOCALPHA)

    return to_rgb, tuple(notes + [told] * bool(told))


def _palette(page: tifffile.TiffPage) -> np.ndarray:
    """(256,3) uint8; colours beyond those of the file are black."""
    colours = np.asarray(page.colormap).T
    colours = colours >> 8 if colours.max() > 255 else colours  # some writers give 8 bits
    return np.pad(colours.astype(np.uint8), ((0, max(0, 256 - len(colours))), (0, 0)))


def page_reader(page: tifffile.TiffPage, held: np.ndarray) -> Read:
    """Reads a part of a page, as (h,w,samples) uint8; white where the file has no strip or tile. held: its bytes.

    >>> page = tifffile.TiffFile(slide_path).pages[0]
    >>> page_reader(page, np.memmap(slide_path, np.uint8, "r"))(100, 200, 256, 128).shape
    (128, 256, 3)
    """
    planes, _, height, width, own = page.shaped
    tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
    tall = min(tall, height) if not page.is_tiled else tall
    across, down = math.ceil(width / wide), math.ceil(height / tall)
    afford(2 * tall * wide * own, f"each of the {across * down} parts of {held.filename}, {width} x {height} px,")
    empty = 0 if page.photometric in (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.SEPARATED) else 255

    def segment(index: int) -> np.ndarray | None:
        count = page.databytecounts[index]
        if not count:
            return None
        start = page.dataoffsets[index]
        data = held[start : start + count].tobytes()
        decoded, _, _ = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        return decoded[0].view(np.uint8)

    each = tall * wide * own
    segment = lru_cache(max(4, _HELD // each, min(2 * across + 4, _MOST_HELD // each)))(segment)

    def read(x: int, y: int, w: int, h: int) -> np.ndarray:
        out = np.full((h, w, planes * own), empty, np.uint8)
        for plane in range(planes):
            for row in range(y // tall, (y + h - 1) // tall + 1):
                for col in range(x // wide, (x + w - 1) // wide + 1):
                    part = segment((plane * down + row) * across + col)
                    if part is None:
                        continue
                    top, left = row * tall, col * wide
                    y0, x0 = max(y, top), max(x, left)
                    part = part[y0 - top : y + h - top, x0 - left : x + w - left]
                    to = out[y0 - y :, x0 - x :, plane * own : (plane + 1) * own]
                    to[: part.shape[0], : part.shape[1]] = part[: to.shape[0], : to.shape[1]]
        return out

    return read


def _ome_image(file: tifffile.TiffFile) -> dict[str, Any]:
    """The first image of OME-XML; {} where there is none."""
    image = _ome(file).get("Image", {})
    return image[0] if isinstance(image, list) else image


def _ome(file: tifffile.TiffFile) -> dict[str, Any]:
    try:
        return tifffile.xml2dict(file.ome_metadata)["OME"] if file.ome_metadata else {}
    except (ValueError, LookupError, SyntaxError):
        return {}


def _ome_magnification(file: tifffile.TiffFile) -> float | None:
    found = _ome(file).get("Instrument", {})
    for name in ("Instrument", "Objective"):
        found = found[0] if isinstance(found, list) and found else found
        found = found.get("Objective", {}) if name == "Instrument" and isinstance(found, dict) else found
    power = found.get("NominalMagnification") if isinstance(found, dict) else None
    return float(power) if power else None


def _scale(path: Path, file: tifffile.TiffFile, ome: dict[str, Any]) -> Scale:
    """From OME-XML, else from ImageJ's unit and the resolution tags, else from these alone."""
    pixels = ome.get("Pixels", {})
    sizes = tuple(pixels.get(f"PhysicalSize{axis}") for axis in "XY")
    if any(sizes):
        units = tuple(str(pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "XY")
        return physical_scale(path, sizes, units, "OME-XML")
    tags = file.pages[0].tags
    ratios = [tags.valueof(name) for name in ("XResolution", "YResolution")]
    per_unit = [r[0] / r[1] if r and r[0] and r[1] else None for r in ratios]  # pixels
    if unit := str((file.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ"):
        if unit in UNITS and UNITS[unit] != INCH:
            return physical_scale(path, tuple(1 / n if n else None for n in per_unit), (unit, unit), "ImageJ metadata")
    inches = {2: 1.0, 3: 2.54}.get(int(tags.valueof("ResolutionUnit") or 1))
    known = [n * inches for n in per_unit if n and inches]
    if not known or any(printed(n) for n in known):
        return UNKNOWN
    return scale_of(path, *(INCH / n for n in known), *[None] * (2 - len(known)), "TIFF resolution tag")
