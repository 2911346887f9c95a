"""The shape of what others wrote: which entries it has, of which kind and in which range, checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.errors import UserError


@dataclass(frozen=True)
class Is:
    """A kind of value: its name, to follow "is not", and whether a value is one."""

    words: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


ANYTHING = Is("anything", lambda value: True)
TEXT = Is("text", lambda value: isinstance(value, str))
NUMBER = Is("a number", _number)
ABOVE_0 = Is("a number above 0", lambda value: _number(value) and value > 0)
COUNT = Is("a whole number from 0 on", lambda value: type(value) is int and 0 <= value < 2**53)
SIZE = Is("a whole number above 0", lambda value: type(value) is int and 0 < value < 2**31)
SWITCH = Is("true or false", lambda value: isinstance(value, bool))
MAPPING = Is("`key: value` pairs", lambda value: isinstance(value, Mapping))
LIST = Is("a list", lambda value: isinstance(value, (list, tuple)))

@dataclass(frozen=True)
class Maybe:
    """A form, or none."""

    form: Any


Form = Is | Maybe | Mapping[str, Any] | list


def maybe(form: Form) -> Form:
    """A form, or none.

    >>> check_shape({"mpp": None}, {"mpp": maybe(ABOVE_0)}, "zarr.json")
    """
    if not isinstance(form, Is):
        return Maybe(form)
    return Is(f"{form.words}, or null", lambda value: value is None or form.holds(value))


def so_many(count: int, kind: Is) -> Is:
    """A list of so many values of a kind.

    >>> check_shape([0.5, 0.5, "x"], so_many(3, NUMBER), "mean")
    Traceback (most recent call last):
    ldm.errors.UserError: mean: it is [0.5, 0.5, 'x'], not a list of 3, each a number.
    """

    def holds(value: Any) -> bool:
        return LIST.holds(value) and len(value) == count and all(map(kind.holds, value))

    return Is(f"a list of {count}, each {kind.words}", holds)


def one_of(values: Sequence[Any]) -> Is:
    """One of a few values.

    >>> check_shape(3, one_of([1, 8]), "views")
    Traceback (most recent call last):
    ldm.errors.UserError: views: it is 3, not one of 1, 8.
    """
    return Is(f"one of {', '.join(map(str, values))}", lambda value: any(value == each for each in values))


def check_shape(value: Any, form: Form, source: object, where: str = "") -> None:
    """UserError unless a value has a form; the message names the entry that has not.

    Args:
        form: a kind of value; a mapping of the entries that must be there, or may be where their name ends with "?",
            "*" that of all others, which else are free; or a list of one form, that of all entries of a list.
        source: where the value stands, for messages. where: the dotted key in it.

    >>> check_shape({"images": [{"number": "1"}]}, {"images": [{"number": COUNT, "file?": TEXT}]}, "ratings.json")
    Traceback (most recent call last):
    ldm.errors.UserError: ratings.json: images.0.number is '1', not a whole number from 0 on.
    """
    if isinstance(form, Maybe):
        if value is None:
            return
        form = form.form
    kind = form if isinstance(form, Is) else MAPPING if isinstance(form, Mapping) else LIST
    if not kind.holds(value):
        told = repr(value)
        told = told if len(told) <= 60 else f"{told[:57]}..."
        raise UserError(f"{source}: {where or 'it'} is {told}, not {kind.words}.")
    inside = f"{where}." if where else ""
    if isinstance(form, Mapping):
        for name, child in form.items():
            key = name.removesuffix("?")
            if key == "*":
                for other in value.keys() - form.keys():
                    check_shape(value[other], child, source, f"{inside}{other}")
            elif key in value:
                check_shape(value[key], child, source, f"{inside}{key}")
            elif key == name:
                raise UserError(f"{source}: {inside}{key} is missing.")
    elif isinstance(form, list):
        for index, entry in enumerate(value):
            check_shape(entry, form[0], source, f"{inside}{index}")
