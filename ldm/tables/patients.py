"""Whose a slide or image is: the one rule behind every --patient, and names that look as if they shared a patient."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from ldm.errors import UserError, suggest
from ldm.tables.text import read_table

_COLUMN = "patient"


def patients_of(names: Iterable[str], rule: str, columns: Iterable[str] = ()) -> dict[str, str]:
    r"""The patient of each name, as an option --patient says it.

    Args:
        names: of slides, images or subjects.
        rule: a table whose column `patient` (or whose second one) says the patient of the name in the first, with or
            without its ending; or a regular expression that finds the patient in a name, as its group or as a whole.
        columns: names that `rule` could have been meant as, for the message.
    Raises:
        UserError: no regular expression, a name in which it finds nothing, or that the table lacks or has twice.

    >>> patients_of(["P00-A_HE", "P00-B_HE"], r"^P\d+")
    {'P00-A_HE': 'P00', 'P00-B_HE': 'P00'}
    """
    names = list(dict.fromkeys(names))
    return _by_table(names, Path(rule)) if Path(rule).is_file() else _by_pattern(names, rule, list(columns))


def _by_pattern(names: list[str], rule: str, columns: list[str]) -> dict[str, str]:
    hint = f" It is no file, and no column{suggest(rule, columns)}" if columns else " It is no file either."
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise UserError(f"--patient '{rule}' is no regular expression: {error}.{hint}") from None
    found = {}
    for name in names:
        match = pattern.search(name)
        patient = match and (match.group(1) if match.groups() else match.group())
        if not patient:
            raise UserError(f"--patient '{rule}' finds no patient in '{name}'.{hint}")
        found[name] = patient
    return found


def _by_table(names: list[str], path: Path) -> dict[str, str]:
    table = read_table(path)
    if len(table.columns) < 2:
        raise UserError(f"{path} has one column; --patient takes a table of slides and their patients.")
    key = table.columns[0]
    value = next((name for name in table.columns if name.lower() == _COLUMN), table.columns[1])
    rows = table.dropna(subset=[key, value]).drop_duplicates([key, value])
    if (twice := rows[rows[key].duplicated()]).size:
        raise UserError(f"{path} gives {twice[key].iloc[0]} two patients; leave one of them.")
    known = dict(zip(rows[key], rows[value]))
    known = {Path(name).stem: patient for name, patient in known.items()} | known
    if lacking := [name for name in names if name not in known and Path(name).stem not in known]:
        raise UserError(f"{path} says nothing of {len(lacking)} of {len(names)} names, as {lacking[0]}; add them.")
    return {name: known.get(name, known.get(Path(name).stem)) for name in names}


def perhaps_shared(patients: Mapping[str, str]) -> list[str]:
    """Names that begin alike, as P00-A and P00-B, and have patients of their own: perhaps they are of one.

    patients: name -> patient. The first two names that begin alike, or none.

    >>> perhaps_shared({"P00-A.tif": "P00-A", "P00-B.tif": "P00-B", "P01-A.tif": "P01-A"})
    ['P00-A.tif', 'P00-B.tif']
    >>> perhaps_shared({"CMU-1.svs": "CMU-1", "CMU-2.svs": "CMU-2"})
    []
    """
    groups = defaultdict(dict)
    for name, patient in patients.items():
        first = re.split(r"[-_. ]", Path(name).name)[0]
        if re.search(r"\d", first) and first != Path(name).stem:
            groups[first].setdefault(patient, name)
    several = [list(names.values()) for names in groups.values() if len(names) > 1]
    return several[0][:2] if several and len(groups) > 1 else []
