"""From what annotators called cells to scores in [0, 1], and choices of cells that do not depend on their order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from ldm.errors import UserError, suggest
from ldm.tables.annotations import UNDECIDED, Cell

LABELS = ("hard", "soft")


def class_called(name: str, cells: Sequence[Cell], option: str) -> str:
    """The class of cells or votes that is called `name`, given by the option; upper and lower case are the same.

    UserError if there is none.

    >>> class_called("Mitosis", [Cell("a.svs", 10, 20, "mitosis")], "positive")
    'mitosis'
    """
    known = {name for cell in cells for name in (cell.name, *cell.votes)} - {UNDECIDED}
    found = [other for other in sorted(known) if other.casefold() == name.casefold()]
    if not found:
        raise UserError(f"no cell is called '{name}', which --{option} names{suggest(name, known)}")
    return name if name in found else found[0]


def scores_of(cells: Sequence[Cell], positive: str, labels: str = "hard") -> list[float | None]:
    """Each cell's score for the class `positive`.

    hard: 1 for cells of that class, 0 for others, None for undecided ones. soft: the fraction of votes for that class.
    UserError: soft scores of cells without votes.

    >>> cells = [Cell("a.png", 32, 32, "typical", ("typical", "atypical", "typical", "typical"))]
    >>> scores_of(cells, "atypical"), scores_of(cells, "atypical", "soft")
    ([0.0], [0.25])
    """
    if labels not in LABELS:
        raise UserError(f"labels are {' or '.join(LABELS)}; got '{labels}'")
    if labels == "hard":
        return [None if cell.name == UNDECIDED else float(cell.name == positive) for cell in cells]
    if silent := [cell for cell in cells if not cell.votes]:
        listed = ", ".join(map(str, silent[:5])) + (", ..." if len(silent) > 5 else "")
        raise UserError(
            f"{len(silent)} of {len(cells)} cells have no votes, so they have no soft score: {listed}. Use --labels "
            "hard, or give their votes"
        )
    return [cell.votes.count(positive) / len(cell.votes) for cell in cells]


def distribution(cells: Sequence[Cell], positive: str) -> Counter[tuple[int, int]]:
    """How many cells have (votes for `positive`, votes).

    >>> dict(distribution([Cell("a.png", 32, 32, "typical", ("typical", "atypical"))], "atypical"))
    {(1, 2): 1}
    """
    return Counter((cell.votes.count(positive), len(cell.votes)) for cell in cells)


def without_surplus(
    cells: Sequence[Cell], scores: Sequence[float], groups: Sequence[str], seed: int, most: int | None = None
) -> list[int]:
    """Places of the cells left when each group has at most `most` negatives (score below 0.5; None: as many as others).

    Which negatives stay is a hash of the cell, so a longer list keeps most of them.

    >>> cells = [Cell("a.svs", x, 0, "cell") for x in range(4)]
    >>> kept = without_surplus(cells, scores=[1, 0, 0, 0], groups=["a.svs"] * 4, seed=0)
    >>> len(kept), 0 in kept
    (2, True)
    """

    def place(row: int) -> bytes:
        cell = cells[row]
        return hashlib.sha256(f"{seed} {cell.slide} {cell.x:g} {cell.y:g}".encode()).digest()

    rows: dict[str, tuple[list[int], list[int]]] = {}
    for row, (score, group) in enumerate(zip(scores, groups)):
        rows.setdefault(group, ([], []))[score >= 0.5].append(row)
    kept = [
        [*positives, *sorted(negatives, key=place)[: len(positives) if most is None else most]]
        for negatives, positives in rows.values()
    ]
    return sorted(row for group in kept for row in group)
