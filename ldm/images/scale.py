"""Micrometres per pixel: their units, which resolutions mean a printer or screen, and pixels that are not square."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError

LEAST, MOST = 0.01, 50.0  # um per pixel that an image of tissue can have
SQUARE = 0.02  # sides of a pixel may differ by this fraction
INCH = 25400.0
UNITS = {  # micrometres, by the names of OME-XML, OME-Zarr (UDUNITS-2) and ImageJ
    "pm": 1e-6, "picometer": 1e-6, "Å": 1e-4, "angstrom": 1e-4, "nm": 1e-3, "nanometer": 1e-3,
    "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0,
    "mm": 1e3, "millimeter": 1e3, "millimetre": 1e3, "cm": 1e4, "centimeter": 1e4, "centimetre": 1e4,
    "dm": 1e5, "decimeter": 1e5, "m": 1e6, "meter": 1e6, "metre": 1e6,
    "in": INCH, "inch": INCH, "ft": 12 * INCH, "foot": 12 * INCH, "thou": INCH / 1000, "pt": INCH / 72,
}  # fmt: skip
# dots per inch of printers and flatbed scanners that are finer than MOST
PRINTED = (
    550, 600, 640, 700, 720, 750, 800, 900, 1000, 1200, 1440, 1500, 1600, 1800, 2000, 2400, 2880, 3000, 3200, 3600,
    4000, 4800, 5760, 6400, 7200, 9600,
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """mpp: micrometres per pixel, 0 where unknown. origin: where they stand. notes: what is wrong with what is said."""

    mpp: float = 0.0
    origin: str = ""
    notes: tuple[str, ...] = ()


UNKNOWN = Scale()


def scale_of(path: Path, x: float | None, y: float | None, origin: str) -> Scale:
    """The scale of pixels of x by y micrometres; one that is missing is as the other.

    Raises:
        UserError: the pixels are not square, so that whatever is measured or generated would be stretched.

    >>> scale_of(Path("a.tif"), 0.25, 0.2502, "OME-XML").mpp
    0.2501
    >>> scale_of(Path("a.tif"), 250.0, None, "OME-XML").notes
    ('its OME-XML says 250 um per pixel, which no slide has, and is left out',)
    """
    sides = [side for side in (x, y) if side]
    if not sides:
        return UNKNOWN
    mpp = sum(sides) / len(sides)
    if not LEAST <= mpp <= MOST:  # not a number, too
        return Scale(notes=(f"its {origin} says {mpp:g} um per pixel, which no slide has, and is left out",))
    if max(sides) > min(sides) * (1 + SQUARE):
        raise UserError(
            f"{path} has pixels of {sides[0]:g} x {sides[1]:g} um ({origin}), which are not square; resample it to "
            "square pixels"
        )
    return Scale(mpp, origin)


def physical_scale(path: Path, sizes: tuple[str | float | None, ...], units: tuple[str, ...], origin: str) -> Scale:
    """The scale of pixels whose sides (x, y) are so many of these units each; None is unknown.

    >>> physical_scale(Path("a.tif"), (250, 250), ("nm", "nm"), "OME-XML")
    Scale(mpp=0.25, origin='OME-XML', notes=())
    >>> physical_scale(Path("a.tif"), (1, 1), ("pixel", "pixel"), "OME-XML").notes
    ("its OME-XML gives the size of a pixel in 'pixel', which is no unit of length",)
    """
    known = [(size, unit if len(unit) < 3 else unit.lower()) for size, unit in zip(sizes, units) if size is not None]
    if wrong := [unit for _, unit in known if unit not in UNITS]:
        return Scale(notes=(f"its {origin} gives the size of a pixel in '{wrong[0]}', which is no unit of length",))
    try:
        sides = [float(size) * UNITS[unit] for size, unit in known]
    except ValueError:
        return Scale(notes=(f"its {origin} gives the size of a pixel as '{known[0][0]}', which is no number",))
    return scale_of(path, *sides, *[None] * (2 - len(sides)), origin)


def printed(per_inch: float) -> bool:
    """Whether so many pixels per inch are the resolution of a print or screen, not of a microscope.

    >>> printed(600), printed(236 * 2.54), printed(101600)  # the second is 600, rounded to whole dots per centimetre
    (True, True, False)
    """
    return per_inch < INCH / MOST or any(math.isclose(per_inch, dpi, rel_tol=2e-3) for dpi in PRINTED)
