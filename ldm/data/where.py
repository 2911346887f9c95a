"""Which tiles or images are selected: `--where` of commands and `where` of configs, read and applied in one place.

    split=val    slide!=a.svs    tissue>0.5    tissue<=0.9    stain in he,ki67    region not in Pen,Fold

Several selections hold together. Configs may also say them as a mapping: `{split: train}`, `{split: [train, test]}`,
`{tissue: {min: 0.5, max: 0.9}}`. A value that is unknown, as a tile's region on a slide without any, equals nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, suggest

if TYPE_CHECKING:  # commands read selections before anything large is imported
    import numpy as np

FORMS = "label=value, label!=value, label>number (or >=, <, <=) or 'label in a,b'"
_ORDERS = (">=", "<=", ">", "<")
_FORM = re.compile(r"(?P<column>.+?)(?:\s*(?P<sign>>=|<=|!=|==|=|>|<)\s*|\s+(?P<word>(?:not\s+)?in)\s+)(?P<value>.+)")


@dataclass(frozen=True)
class Clause:
    """One selection: what a column has to be.

    Attributes:
        column: a label of tiles, or a column of the table of tiles.
        sign: "=" (one of the values), "!=" (none of them), or ">=", "<=", ">", "<" (than the one value, a number).
    """

    column: str
    sign: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        listed = ",".join(map(_shown, self.values))
        if len(self.values) == 1:
            return f"{self.column}{self.sign}{listed}"
        return f"{self.column} {'in' if self.sign == '=' else 'not in'} {listed}"

    def holds(self, values: Iterable[Any]) -> np.ndarray:
        """(N,) bool: of which of the column's values (N,) it holds.

        UserError: a number is compared with text that is none, or text by size.

        >>> parse_where("tissue>0.5")[0].holds([0.2, 0.5, 0.8, None]).tolist()
        [False, False, True, False]
        """
        import numpy as np

        known, typed = _typed(values)
        if self.sign in _ORDERS:
            if typed.dtype == object:
                given = next(value for value in typed if value is not None)
                raise UserError(f"'{self.column}' holds text, as {given!r}, which {self.sign} does not compare; use =")
            compare = {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less}[self.sign]
            limit = _stored(self.values[0], typed[known])
            return known & compare(typed, limit, where=known, out=np.zeros(len(known), bool))
        if typed.dtype == object:
            wanted: list[Any] = [str(value) for value in self.values]
        else:
            wanted = [_stored(_number(value, self.column), typed[known]) for value in self.values]
        found = known & np.isin(typed, wanted)
        return found if self.sign == "=" else ~found


Where = Mapping[str, Any] | str | Sequence[str | Clause] | None


def parse_where(where: Where) -> tuple[Clause, ...]:
    """Selections as `--where` has them (text, or several) or as configs may (a mapping too), read.

    UserError: one that has none of the forms.

    >>> [str(clause) for clause in parse_where(["split=val", "tissue > 0.5", "stain in he, ki67"])]
    ['split=val', 'tissue>0.5', 'stain in he,ki67']
    >>> parse_where({"tissue": {"min": 0.5}}) == parse_where("tissue>=0.5")
    True
    """
    if isinstance(where, Mapping):
        return tuple(clause for column, wanted in where.items() for clause in _of_mapping(str(column), wanted))
    texts = [where] if isinstance(where, str) else where or ()
    return tuple(text if isinstance(text, Clause) else _of_text(str(text)) for text in texts)


def select(where: Iterable[Clause], count: int, column: Callable[[str], Iterable[Any]]) -> np.ndarray:
    """(count,) bool: which of so many tiles are selected. column: its name -> the values (count,) of the tiles.

    >>> table = pd.DataFrame({"stain": ["he", "ki67", "pas"], "grade": [1, 2, 3]})
    >>> select(parse_where(["stain in he,pas", "grade>1"]), 3, table.get).tolist()
    [False, False, True]
    """
    import numpy as np

    keep = np.ones(count, bool)
    for clause in where:
        keep &= clause.holds(column(clause.column))
    return keep


def unknown(where: Iterable[Clause], column: Callable[[str], Iterable[Any]], what: str) -> str:
    """That a value which is asked for is nowhere, or a limit beyond all there are, and what there is; "" where not.

    column: as that of `select`, of all tiles there are. what: the tiles or images in words, "no tile".

    >>> unknown(parse_where("stain=hee"), {"stain": ["he", "ki67"]}.get, "no tile")
    "no tile has stain=hee; did you mean 'he'? Known: he, ki67."
    """
    for clause in where:
        known, typed = _typed(column(clause.column))
        there = typed[known]
        if clause.sign in _ORDERS:
            if not clause.holds(there).any():
                span = f"it is from {min(there):g} to {max(there):g}." if len(there) else "it is unknown of all."
                return f"{what} has {clause}; {span}"
            continue
        names = {*map(_shown, dict.fromkeys(there.tolist()))}
        for value in clause.values:
            if (shown := _shown(value if typed.dtype == object else _number(value, clause.column))) not in names:
                return f"{what} has {clause.column}={shown}{suggest(shown, names)}"
    return ""


def _of_text(text: str) -> Clause:
    found = _FORM.fullmatch(text.strip())
    if not found:
        raise UserError(f"a selection is {FORMS}; got '{text}'. In a shell, < and > stand in quotes.")
    column, sign, word, value = found["column"], found["sign"], found["word"], found["value"]
    if word:
        values = tuple(part.strip() for part in value.split(",") if part.strip())
        if not values:
            raise UserError(f"a selection with `in` lists values, as 'stain in he,ki67'; got '{text}'.")
        return Clause(column, "=" if word == "in" else "!=", values)
    if sign in _ORDERS:
        return Clause(column, sign, (_number(value, column),))
    return Clause(column, sign.replace("==", "="), (value,))


def _of_mapping(column: str, wanted: Any) -> list[Clause]:
    if isinstance(wanted, Mapping):
        if not wanted or set(wanted) - {"min", "max"}:
            raise UserError(f"where.{column} takes a value, a list, or min and max; got {sorted(map(str, wanted))}.")
        signs = {"min": ">=", "max": "<="}
        return [Clause(column, signs[name], (_number(limit, column),)) for name, limit in wanted.items()]
    values = tuple(wanted) if isinstance(wanted, (list, tuple)) else (wanted,)
    if not values or any(isinstance(value, (Mapping, list, tuple)) or value is None for value in values):
        raise UserError(f"where.{column} takes a value, a list of values, or min and max; got {wanted!r}.")
    return [Clause(column, "=", values)]


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise UserError(f"'{column}' is a number; it is never '{value}'.")
    return number


def _stored(number: float, values: np.ndarray) -> float:
    """A number as values have it that were stored as float32, as labels are: their 0.4 is not quite that of float64."""
    import numpy as np

    short = float(np.float32(number))
    return short if not number.is_integer() and (values.astype(np.float32) == values).all() else number


def _shown(value: Any) -> str:
    """A value as it is written: numbers without needless digits, as index.parquet makes 1.0 of 1."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() else f"{value:.7g}"


def _typed(values: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Which of the values (N,) are known, and all of them as float, or where any is no number as text (object)."""
    import numpy as np
    import pandas as pd

    array = values if isinstance(values, np.ndarray) else np.array([*values, None], object)[:-1]
    if array.dtype.kind in "iuf":
        return ~np.isnan(array), array.astype(float)
    codes, each = pd.factorize(array.astype(object))
    if all(isinstance(value, (int, float, np.number)) and not isinstance(value, bool) for value in each):
        return codes >= 0, np.array([*map(float, each), math.nan])[codes]
    return codes >= 0, np.array([*map(str, each), None], object)[codes]
