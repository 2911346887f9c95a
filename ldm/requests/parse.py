"""Texts of a command line as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ldm.errors import UserError


def parse_guidance(texts: Sequence[str]) -> float | dict[str, float] | None:
    """One guidance scale, or one for each condition; None for none given.

    >>> parse_guidance(["2.0"]), parse_guidance(["class=3", "text=1.5"])
    (2.0, {'class': 3.0, 'text': 1.5})
    """
    scales: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise UserError(f"a guidance scale is a number, or name=number, as class=3; got '{text}'.") from None
        if not equals:
            if len(texts) > 1:
                raise UserError("give one guidance scale, or name=scale for each condition; got both.")
            return value
        if name in scales:
            raise UserError(f"'{name}' has two guidance scales, {scales[name]:g} and {value:g}; give one.")
        scales[name] = value
    return scales or None


def parse_interval(text: str | None) -> tuple[float, float] | Literal["all"] | None:
    """Noise levels that are guided.

    >>> parse_interval("1,7"), parse_interval("all")
    ((1.0, 7.0), 'all')
    """
    if text in (None, "all"):
        return text
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        raise UserError(f"--guidance-interval takes low,high noise levels, as 1,7, or all; got '{text}'.")
    return low, high


def parse_integers(text: str | None, count: int, option: str, form: str) -> tuple[int, ...] | None:
    """`count` whole numbers with commas between them.

    >>> parse_integers("896,1472,1024,1024", 4, "--region", "x,y,width,height")
    (896, 1472, 1024, 1024)
    """
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != count or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"{option} takes {form} as {count} whole numbers; got '{text}'.")
    return tuple(int(part) for part in parts)


def ascending(kind: type[int] | type[float], text: str | None, option: str) -> tuple | None:
    """Two numbers low,high, the second greater.

    >>> ascending(float, "-160,240", "--window")
    (-160.0, 240.0)
    """
    if text is None:
        return None
    try:
        low, high = (kind(part) for part in text.split(","))
    except ValueError:
        low, high = 0, 0
    if not low < high:
        raise UserError(f"{option} takes two ascending numbers low,high; got '{text}'")
    return low, high
