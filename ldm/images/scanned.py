"""Reads what scanners write, by OpenSlide: SVS, NDPI, MRXS, SCN, BIF, CZI, DICOM and their like."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide
import tifffile

from ldm.errors import UserError
from ldm.images.colour import on_white
from ldm.images.dicom import beside_slide, why_no_slide
from ldm.images.scale import scale_of
from ldm.images.source import ReadLevel, Source
from ldm.images.tiff import Read, page_reader

_NAMES = re.compile(r"(FILE_\d+|INDEXFILE|ImageFile.*|MapFile|MacroImage|OptimisationFile|AuthCode)$", re.IGNORECASE)
_LIST = 1 << 20  # bytes of a list that are looked at


def open_scanned(path: Path) -> Source | None:
    """A slide of a scanner; None where OpenSlide knows no vendor of it, or takes it for a TIFF of no vendor.

    An ICC profile is told and not applied: encoders and published features are of the pixels as scanners store them.

    Raises:
        UserError: OpenSlide's own reason, where it knows the vendor and cannot open the file.

    >>> open_scanned(slide_path).scale
    Scale(mpp=0.499, origin='header (aperio)', notes=())
    """
    vendor = openslide.OpenSlide.detect_format(str(path))
    if vendor is None and path.suffix.lower() == ".mrxs":  # its own pixels are but a picture of the label
        raise UserError(f"{path} is of a MIRAX slide, and no folder {path.stem} with its Slidedat.ini lies beside it")
    if vendor in (None, "generic-tiff"):
        if reason := why_no_slide(path):
            raise UserError(f"{path} {reason}")
        return None
    if kind := beside_slide(path):  # OpenSlide would open the slide that it lies beside
        raise UserError(f"{path} is the {kind} of a slide in DICOM, not the slide; give a file of its levels (VOLUME)")
    _check_names(path)
    try:
        file = openslide.OpenSlide(str(path))
    except openslide.OpenSlideError as error:
        raise UserError(f"OpenSlide cannot open {path}, a slide of the format {vendor}: {error}") from None
    properties, factors = file.properties, file.level_downsamples

    def composed(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        corner = (round(x * factors[level]), round(y * factors[level]))
        return _flat(np.asarray(file.read_region(corner, level, (w, h))))

    direct = _direct(path, file, composed) if vendor == "aperio" else {}

    def read(level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        with suppress(Exception):  # OpenSlide says what is wrong
            if level in direct:
                return direct[level](x, y, w, h)
        return composed(level, x, y, w, h)

    x, y = (_number(properties.get(name)) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y))
    power = _number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
    scale = scale_of(path, x, y, f"header ({vendor})")
    notes = ("its ICC profile is not applied",) if "openslide.icc-size" in properties else ()
    patient = (properties.get("dicom.PatientID") or "").strip() or None
    sides = [_number(properties.get(f"openslide.bounds-{side}")) for side in ("x", "y", "width", "height")]
    bounds = None if None in sides or not any(sides[:2]) else tuple(map(int, sides))
    loose = frozenset(level for level, factor in enumerate(factors) if not factor.is_integer())  # shifted by parts
    levels = list(file.level_dimensions)
    return Source(levels, read, scale, power, patient=patient, notes=notes, bounds=bounds, loose=loose)


def _flat(rgba: np.ndarray) -> np.ndarray:
    """Colours over white, (H,W,3). They are copied by channels, in a third of the time that all three at once take."""
    if not (np.ascontiguousarray(rgba).view("<u4") >= 0xFF000000).all():
        return on_white(rgba[..., :3], rgba[..., 3])
    rgb = np.empty((*rgba.shape[:2], 3), np.uint8)
    for channel in range(3):
        rgb[..., channel] = rgba[..., channel]
    return rgb


def _direct(path: Path, file: openslide.OpenSlide, composed: ReadLevel) -> dict[int, Read]:
    """Levels of an Aperio slide whose JPEG tiles can be decoded one by one, to the pixels that OpenSlide gives.

    OpenSlide composes them by Cairo, which takes three quarters of its time.
    """
    try:
        pages = [page for page in tifffile.TiffFile(path).pages if page.is_tiled and page.compression == 7]
        held = np.memmap(path, np.uint8, "r")
        found = {}
        for level, (w, h) in enumerate(file.level_dimensions):
            page = next((page for page in pages if (page.imagewidth, page.imagelength) == (w, h)), None)
            if page is None or not file.level_downsamples[level].is_integer() or not all(page.databytecounts):
                continue  # OpenSlide shifts such a level by parts of a pixel, or fills gaps from the one before
            read = page_reader(page, held)
            side = min(64, w, h)
            places = ((0, 0), ((w - side) // 2, (h - side) // 2), (w - side, h - side))
            if all(np.array_equal(read(x, y, side, side), composed(level, x, y, side, side)) for x, y in places):
                found[level] = read
    except Exception:  # of tifffile or of a decoder; then OpenSlide reads all
        return {}
    return found


def _check_names(path: Path) -> None:
    """UserError where the list of a slide's files, of MIRAX or Hamamatsu, names one in another folder."""
    lists = {".mrxs": path.with_suffix("") / "Slidedat.ini", ".vms": path, ".vmu": path}
    listed = lists.get(path.suffix.lower())
    if listed is None or not listed.is_file():
        return
    for line in listed.read_bytes()[:_LIST].decode("latin-1").splitlines():
        key, _, name = line.partition("=")
        if _NAMES.match(key.strip()) and set("/\\") & set(name):
            raise UserError(f"{listed} names a file of another folder as its {key.strip()}; a slide's files lie in one")


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
