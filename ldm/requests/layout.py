"""Layouts: tables that say which conditions hold where on a canvas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.conditioners.base import Conditioner
from ldm.conditioners.compose import known_key
from ldm.errors import UserError, suggest
from ldm.foreign.budget import afford
from ldm.tables.text import read_table

PLACE = ("row", "col")


@dataclass(frozen=True)
class Layout:
    """cells: (rows, cols), which of the values is there, -1 where nothing is. values: by name, as many of each."""

    cells: np.ndarray
    values: Mapping[str, Sequence[Any]]


def read_layout(path: Path, conditioner: Conditioner | None) -> Layout:
    r"""A layout from a table with the columns row and col, counted from 0, and one for each condition.

    UserError: no such columns, a cell twice, a condition or value that the model does not know.

    >>> _ = Path("l.csv").write_text("row,col,class\n0,0,A\n0,2,B\n0,1,A\n")
    >>> layout = read_layout(Path("l.csv"), model.cond_stage_model)
    >>> layout.cells, layout.values
    (array([[0, 0, 1]]), {'class': ['A', 'B']})
    """
    if conditioner is None:
        raise UserError("the model is unconditional; it takes no layout.")
    table = read_table(path, missing=("",)).fillna("")
    if lacking := [name for name in PLACE if name not in table]:
        raise UserError(f"{path} has no column '{lacking[0]}'{suggest(lacking[0], table.columns)}")
    names = [name for name in table.columns if name not in PLACE]
    if not names:
        raise UserError(f"{path} has no condition beside row and col; the model takes {', '.join(conditioner.keys)}.")
    places = []
    for name in PLACE:
        texts = table[name].tolist()
        if bad := next((text for text in texts if not text.isdecimal()), None):
            raise UserError(f"{path}: a {name} is a whole number from 0; got '{bad}'.")
        places.append(np.array(texts, dtype=np.int64))
    rows, cols = places
    shape = (int(rows.max()) + 1, int(cols.max()) + 1)
    afford(8 * shape[0] * shape[1], f"the layout of {shape[0]} x {shape[1]} cells in {path}")
    texts = list(zip(*(table[name] for name in names)))
    kinds = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    cells = np.full(shape, -1, np.int64)
    cells[rows, cols] = [kinds[text] for text in texts]
    if twice := len(texts) - int((cells >= 0).sum()):
        raise UserError(f"{path} has {twice} rows for a cell that another row has; leave one.")
    if any(not text for kind in kinds for text in kind):
        raise UserError(f"{path} has rows without a value; leave out the rows of cells on glass.")
    keys = [known_key(conditioner, name) for name in names]
    return Layout(cells, {key: [conditioner.parse(key, kind[i]) for kind in kinds] for i, key in enumerate(keys)})
