"""Two evaluations compared: figures that both have, and whether they differ by more than their intervals."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.metrics.measure import HIGHER, LOWER
from ldm.report.page import IDENTITY, KIND, document, number


def read_report(path: Path) -> dict[str, Any]:
    """The JSON of an evaluation, or its folder. UserError where it is none."""
    path = path / "report.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the report {path}: {error.strerror}") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"{path} is no report of `histoldm evaluate`; it writes report.json into its --out.")
    return found


def _by_key(report: Mapping[str, Any]) -> dict[tuple[str, str, str], tuple[dict[str, Any], dict[str, Any]]]:
    """(section, extractor, name) -> section and figure."""
    return {
        (section["id"], section.get("extractor", ""), each["name"]): (section, each)
        for section in report["sections"]
        for each in section["figures"]
    }


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of figures that both reports have, and warnings where they are not of the same real data or extractor.

    A difference counts where the intervals of the two, added in quadrature, leave 0 out.
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
        warnings.append(f"generated: {counts[0]} and {counts[1]} images: FID falls with their number; FD∞, KID "
                        "and CMMD can be compared.")  # fmt: skip
    known = [_by_key(report) for report in (a, b)]
    rows, invalid = [], {}
    for key, (section, one) in known[0].items():
        if key not in known[1]:
            continue
        other = known[1][key][1]
        values = [each["value"] for each in (one, other)]
        if None in values:
            continue
        row = {"section": section["title"], "extractor": key[1], "title": one["title"], "better": one.get("better", ""),
               "a": one, "b": other, "difference": values[1] - values[0]}  # fmt: skip
        if all("low" in each for each in (one, other)):
            half = math.hypot(*((each["high"] - each["low"]) / 2 for each in (one, other)))
            row |= {"low": row["difference"] - half, "high": row["difference"] + half}
            counts = abs(row["difference"]) > half
            better = (row["difference"] < 0) == (row["better"] == LOWER)
            row["says"] = (
                ("better" if better else "worse") if counts and row["better"] else "differs" if counts else "same"
            )
        rows.append(row)
        if why := one.get("invalid") or other.get("invalid"):
            invalid.setdefault(why, []).append(row["title"])
    warnings += [f"not valid: {', '.join(titles)} ({why})." for why, titles in invalid.items()]
    if not rows:
        raise UserError("the two reports have no figure in common; evaluate both with the same --features.")
    return rows, warnings


def compare_page(
    a: Mapping[str, Any], b: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], warnings: list[str]
) -> str:
    """Two reports side by side."""
    words = {"better": "B is better", "worse": "B is worse", "differs": "they differ", "same": "no difference shown"}
    colours = {"better": "#5f9e6e", "worse": "#b3261e", "differs": "#d9822b", "same": "#9aa0a6"}
    body = ""
    if warnings:
        listed = "".join(f"<li>{html.escape(text)}</li>" for text in warnings)
        body += f'<section><h2>Before you compare</h2><ul class="warn">{listed}</ul></section>'
    titles = list(dict.fromkeys((row["section"], row["extractor"]) for row in rows))
    for title, extractor in titles:
        cells = []
        for row in rows:
            if (row["section"], row["extractor"]) != (title, extractor):
                continue
            ends = [
                f"{number(row[s].get('low'))} – {number(row[s].get('high'))}" if "low" in row[s] else "" for s in "ab"
            ]
            range_of = f"{number(row['low'])} – {number(row['high'])}" if "low" in row else ""
            said = row.get("says", "")
            dot = f'<i class="dot" style="background:{colours[said]}"></i>{words[said]}' if said else ""
            arrow_of = {LOWER: " ↓", HIGHER: " ↑"}.get(row["better"], "")
            cells.append(
                f'<tr><th scope="row">{html.escape(row["title"])}{arrow_of}</th>'
                + "".join(
                    f'<td class="n v">{number(row[s]["value"])}</td><td class="n q">{e}</td>'
                    for s, e in zip("ab", ends)
                )
                + f'<td class="n v">{number(row["difference"])}</td><td class="n q">{range_of}</td><td>{dot}</td></tr>'
            )
        of = f" <small>{html.escape(extractor)}</small>" if extractor else ""
        head = "<thead><tr><th>figure<th>A<th><th>B<th><th>B − A<th>95%<th></tr></thead>"
        table = f'<div class="scroll"><table>{head}<tbody>{"".join(cells)}</tbody></table></div>'
        body += f"<section><h2>{html.escape(title)}{of}</h2>{table}</section>"
    names = [f"{each['title']} ({each['date']})" for each in (a, b)]
    return document("Two evaluations compared", f"A: {html.escape(names[0])}<br>B: {html.escape(names[1])}", body)


def compare_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows, for a terminal."""
    said = {"better": "B is better", "worse": "B is worse", "differs": "they differ", "same": "no difference shown"}
    width = max(len(row["title"]) for row in rows)
    found, title = [], None
    for row in rows:
        of = row["section"] + (f" ({row['extractor']})" if row["extractor"] else "")
        if of != title:
            found.append(of)
            title = of
        values = f"{number(row['a']['value']):>9} {number(row['b']['value']):>9} {number(row['difference']):>9}"
        ends = f"   95% {number(row['low'])} to {number(row['high'])}: {said[row['says']]}" if "low" in row else ""
        found.append(f"  {row['title']:<{width}}  {values}{ends}")
    return found
