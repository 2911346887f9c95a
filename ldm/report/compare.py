"""Two evaluations compared: figures that both have, and whether they differ by more than their intervals."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.foreign.settings import read_json
from ldm.foreign.shape import MAPPING, NUMBER, TEXT, check_shape, maybe
from ldm.metrics.measure import LOWER
from ldm.report.page import IDENTITY, KIND, arrow, document, interval, number

SAYS = {  # what a difference says -> in words, its colour
    "better": ("B is better", "#5f9e6e"),
    "worse": ("B is worse", "#b3261e"),
    "differs": ("they differ", "#d9822b"),
    "same": ("no difference shown", "#9aa0a6"),
}
_FIGURE = {
    "name": TEXT, "title": TEXT, "value": maybe(NUMBER), "low?": maybe(NUMBER), "high?": maybe(NUMBER), "better?": TEXT,
    "invalid?": TEXT,
}  # fmt: skip
_FORM = {  # of a report, as far as it is read here
    "title": TEXT, "date": TEXT, "sets": {"*": MAPPING}, "extractors": {"*": MAPPING},
    "sections": [{"id": TEXT, "title": TEXT, "extractor?": TEXT, "figures": [_FIGURE]}],
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A figure that two reports have.

    a, b: the figure in each report's JSON. difference: of b and a. low, high: its 95% interval, None where a figure has
    none. better: lower, higher or "". says: a key of SAYS, "" without an interval.
    """

    section: str
    extractor: str
    title: str
    better: str
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    difference: float
    low: float | None = None
    high: float | None = None
    says: str = ""


def read_report(path: Path) -> dict[str, Any]:
    """The JSON of an evaluation, or its folder. UserError where it is none.

    >>> import json
    >>> _ = Path("report.json").write_text(json.dumps(reports[0]))
    >>> read_report(Path("."))["title"]
    'An evaluation'
    """
    path = path / "report.json" if path.is_dir() else path
    found = read_json(path, "the report of `histoldm evaluate`")
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"{path} is no report of `histoldm evaluate`; it writes report.json into its --out.")
    check_shape(found, _FORM, path)
    return found


def _by_key(report: Mapping[str, Any]) -> dict[tuple[str, str, str], tuple[dict[str, Any], dict[str, Any]]]:
    """(section, extractor, name) -> section and figure."""
    return {
        (section["id"], section.get("extractor", ""), each["name"]): (section, each)
        for section in report["sections"]
        for each in section["figures"]
    }


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Difference], list[str]]:
    """The figures that both reports have, and warnings where they are not of the same real data or extractor.

    A difference counts where the intervals of the two, added in quadrature, leave 0 out.

    >>> rows, warnings = compared(*reports)
    >>> rows[0].difference, (rows[0].low, rows[0].high), rows[0].says
    (4.0, (2.5858, 5.4142), 'worse')
    """
    warnings = []
    of = [report["sets"].get("real") or report["sets"].get("paired", {}) for report in (a, b)]
    marks = [next((each[key] for key in IDENTITY if each.get(key)), None) for each in of]
    if marks[0] != marks[1]:
        names = " and ".join(str(each.get("path", "none")) for each in of)
        warnings.append(f"the real images differ ({names}): figures against them cannot be compared.")
    makers = [report["extractors"] for report in (a, b)]
    for name in sorted(makers[0].keys() & makers[1].keys()):
        keys = ("weights_sha256", "resize", "preprocessing")
        if any(makers[0][name].get(key) != makers[1][name].get(key) for key in keys):
            warnings.append(f"the extractor {name} differs in weights or resizing: its figures cannot be compared.")
    counts = [report["sets"].get("generated", {}).get("count") for report in (a, b)]
    if counts[0] != counts[1]:
        warnings.append(
            f"the reports are of {counts[0]} and {counts[1]} generated images: FID falls with their number; FD∞, KID "
            "and CMMD can be compared."
        )
    known = [_by_key(report) for report in (a, b)]
    rows, invalid = [], {}
    for key, (section, one) in known[0].items():
        _, other = known[1].get(key, ({}, {"value": None}))
        if one["value"] is None or other["value"] is None:
            continue
        rows.append(_difference(section["title"], key[1], one, other))
        if why := one.get("invalid") or other.get("invalid"):
            invalid.setdefault(why, []).append(one["title"])
    warnings += [f"not valid: {', '.join(titles)} ({why})." for why, titles in invalid.items()]
    if not rows:
        raise UserError("the two reports have no figure in common; evaluate both with the same --features.")
    return rows, warnings


def _difference(section: str, extractor: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    better, difference = a.get("better", ""), b["value"] - a["value"]
    row = Difference(section, extractor, a["title"], better, a, b, difference)
    if any(each.get(end) is None for each in (a, b) for end in ("low", "high")):
        return row
    half = math.hypot(*((each["high"] - each["low"]) / 2 for each in (a, b)))
    says = "same"
    if abs(difference) > half:
        says = "differs" if not better else "better" if (difference < 0) == (better == LOWER) else "worse"
    return replace(row, low=difference - half, high=difference + half, says=says)


def compare_page(
    a: Mapping[str, Any], b: Mapping[str, Any], rows: Sequence[Difference], warnings: Sequence[str]
) -> str:
    """Two reports side by side, as an HTML page.

    >>> "B is worse" in compare_page(*reports, *compared(*reports))
    True
    """
    body = ""
    if warnings:
        listed = "".join(f"<li>{html.escape(text)}</li>" for text in warnings)
        body += f'<section><h2>Before you compare</h2><ul class="warn">{listed}</ul></section>'
    head = "<thead><tr><th>figure<th>A<th><th>B<th><th>B − A<th>95%<th></tr></thead>"
    for (title, extractor), own in _by_section(rows).items():
        of = f" <small>{html.escape(extractor)}</small>" if extractor else ""
        cells = "".join(map(_table_row, own))
        table = f'<div class="scroll"><table>{head}<tbody>{cells}</tbody></table></div>'
        body += f"<section><h2>{html.escape(title)}{of}</h2>{table}</section>"
    names = [f"{each['title']} ({each['date']})" for each in (a, b)]
    return document("Two evaluations compared", f"A: {html.escape(names[0])}<br>B: {html.escape(names[1])}", body)


def _by_section(rows: Sequence[Difference]) -> dict[tuple[str, str], list[Difference]]:
    found: dict[tuple[str, str], list[Difference]] = {}
    for row in rows:
        found.setdefault((row.section, row.extractor), []).append(row)
    return found


def _table_row(row: Difference) -> str:
    cells = f'<th scope="row">{html.escape(row.title)}{arrow(row.better)}</th>'
    for value, low, high in (
        *((each["value"], each.get("low"), each.get("high")) for each in (row.a, row.b)),
        (row.difference, row.low, row.high),
    ):
        cells += f'<td class="n v">{number(value)}</td><td class="n q">{interval(low, high)}</td>'
    words, colour = SAYS.get(row.says, ("", ""))
    dot = f'<i class="dot" style="background:{colour}"></i>{words}' if words else ""
    return f"<tr>{cells}<td>{dot}</td></tr>"


def compare_lines(rows: Sequence[Difference]) -> list[str]:
    r"""The rows, for a terminal.

    >>> print(*compare_lines(compared(*reports)[0]), sep="\n")
    Distance
      FID         10        14         4   95% 2.586 to 5.414: B is worse
    """
    width = max(len(row.title) for row in rows)
    found = []
    for (title, extractor), own in _by_section(rows).items():
        found.append(f"{title} ({extractor})" if extractor else title)
        for row in own:
            values = " ".join(f"{number(value):>9}" for value in (row.a["value"], row.b["value"], row.difference))
            ends = f"   95% {number(row.low)} to {number(row.high)}: {SAYS[row.says][0]}" if row.says else ""
            found.append(f"  {row.title:<{width}}  {values}{ends}")
    return found
