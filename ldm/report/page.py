"""What an evaluation says: one JSON, one self-contained HTML page, and lines for the terminal."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.files import tool_version, write_text
from ldm.metrics.measure import HIGHER, LOWER, Measure

KIND = "histoldm evaluation"
IDENTITY = ("pixels_sha256", "features_sha256", "files_sha256", "listing_sha256")  # of data, the surest first
ABOUT = {  # what a report tells of a set
    "kind": "kind", "count": "images", "size": "size, px", "original_size": "as given, px", "mpp": "µm per px",
    "patients": "patients", "slides": "slides", "splits": "splits", "where": "selected by", "unit": "intervals draw",
    "licence": "licence",
}  # fmt: skip


@dataclass
class Section:
    """One question and its answer: figures, plots (SVG, caption), pictures (image, caption), data for the JSON."""

    id: str
    title: str
    intro: str = ""
    extractor: str = ""
    measures: list[Measure] = field(default_factory=list)
    plots: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[tuple[np.ndarray, str]] = field(default_factory=list)
    verdict: tuple[str, str] | None = None  # good, fair or bad; in words
    data: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        known = {"id": self.id, "title": self.title, "figures": [each.as_dict() for each in self.measures]}
        known |= {name: getattr(self, name) for name in ("extractor", "data") if getattr(self, name)}
        return known | ({"verdict": self.verdict[1]} if self.verdict else {})


@dataclass
class Report:
    """An evaluation. sets: name -> what is known of it. extractors: name -> what features were made by."""

    title: str
    settings: dict[str, Any]
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    extractors: dict[str, dict[str, Any]] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    date: str = ""

    def as_dict(self) -> dict[str, Any]:
        return _plain({
            "kind": KIND, "version": tool_version(), "title": self.title, "date": self.date, "settings": self.settings,
            "sets": self.sets, "extractors": self.extractors, "warnings": self.warnings,
            "sections": [each.as_dict() for each in self.sections],
        })  # fmt: skip

    def write(self, out: Path) -> None:
        """report.json and report.html in the folder `out`."""
        write_text(out / "report.json", json.dumps(self.as_dict(), indent=1, ensure_ascii=False))
        write_text(out / "report.html", _page(self))

    def lines(self) -> list[str]:
        """The figures, for a terminal."""
        found = []
        for section in self.sections:
            if not section.measures and not section.verdict:
                continue
            found.append(section.title + (f" ({section.extractor})" if section.extractor else ""))
            found += [f"  {section.verdict[1]}"] if section.verdict else []
            width = max((len(each.title) for each in section.measures), default=0)
            for each in section.measures:
                ends = f"   95% {number(each.low)} to {number(each.high)}" if each.low is not None else ""
                tail = "   not valid: " + each.invalid if each.invalid else ""
                found.append(f"  {each.title:<{width}}  {number(each.value):>9}{ends}{tail}")
        return found


def _plain(value: Any) -> Any:
    """As JSON can hold it: NaN is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)


def number(value: float | None) -> str:
    """Four digits that count, without an exponent where it can be.

    >>> number(0.012345), number(1234.5), number(1.2e-5), number(None)
    ('0.0123', '1234', '1.20e-05', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.{min(4, max(0, 3 - math.floor(math.log10(abs(value)))))}f}"
    return f"{value:.2e}"


def interval(low: float | None, high: float | None) -> str:
    """Both ends of an interval, "" where there is none.

    >>> interval(9.5, 11), interval(None, None)
    ('9.500 – 11', '')
    """
    return "" if low is None else f"{number(low)} – {number(high)}"


def arrow(better: str) -> str:
    """Which way a figure gets better, after its title.

    >>> arrow("lower"), arrow("higher"), arrow("")
    (' ↓', ' ↑', '')
    """
    return {LOWER: " ↓", HIGHER: " ↑"}.get(better, "")


# --- HTML -------------------------------------------------------------------------------------------------------------

STYLE = """
:root { --ink: #202124; --soft: #5f6368; --line: #e3e6ea; --blue: #3b6fb6; --orange: #d9822b; --paper: #f6f7f9 }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px }
header { border-bottom: 3px solid var(--blue); padding-bottom: 16px; margin-bottom: 24px }
h1 { font-size: 28px; line-height: 1.25; margin: 0; letter-spacing: -0.01em }
header p { margin: 6px 0 0; color: var(--soft) }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 20px 24px; margin: 0 0 20px }
h2 { font-size: 19px; margin: 0 0 4px } h2 small { font-weight: 400; font-size: 14px; color: var(--soft) }
section > p { margin: 0 0 14px; color: var(--soft); max-width: 78ch }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin: 0 0 20px }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px }
.tile b { display: block; font-size: 26px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.2 }
.tile span { font-size: 13px; color: var(--soft) } .tile.invalid b { color: #9aa0a6 }
.tile em { float: right; font-style: normal; font-size: 11px; color: #9aa0a6; padding-top: 3px }
.tile i { font-style: normal; font-size: 12px; color: var(--soft); display: block; font-variant-numeric: tabular-nums }
.verdict { border-left: 4px solid; border-radius: 4px; padding: 8px 14px; margin: 0 0 16px }
.verdict.good { background: #eef6f0; border-color: #5f9e6e }
.verdict.fair { background: #fff6e8; border-color: #d9822b }
.verdict.bad { background: #fdeeed; border-color: #b3261e }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; width: 100% }
th, td { text-align: left; vertical-align: top; padding: 6px 16px 6px 0; border-bottom: 1px solid var(--line) }
thead th { color: var(--soft); font-weight: 500; font-size: 13px } tbody th { font-weight: 500; white-space: nowrap }
tr:last-child th, tr:last-child td { border-bottom: 0 }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap } td.v { font-weight: 600 } td.q { color: var(--soft) }
tr.invalid td.v { color: #9aa0a6 } .why { color: #b3261e; display: block } code { font-size: 12px; color: var(--soft) }
.sets { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 24px }
.sets h3 { font-size: 15px; margin: 8px 0 6px } .dot { display: inline-block; width: 10px; height: 10px;
  border-radius: 5px; margin-right: 6px }
.plots { display: flex; flex-wrap: wrap; gap: 24px; margin-top: 18px } figure { margin: 0; max-width: 100% }
figure.wide { width: 100%; margin-top: 18px } img, svg { max-width: 100%; height: auto; display: block }
figcaption { font-size: 13px; color: var(--soft); margin-top: 6px; max-width: 78ch }
ul.warn { margin: 0; padding-left: 20px } details { margin-top: 8px } summary { cursor: pointer; color: var(--soft) }
pre { font-size: 12px; overflow: auto; background: var(--paper); padding: 10px; border-radius: 4px }
@media print { body { background: #fff } section { break-inside: avoid } }
"""
COLOURS = {"generated": "#d9822b", "real": "#3b6fb6", "train": "#5f9e6e", "A": "#3b6fb6", "B": "#d9822b"}
HEADLINES = ("fid", "fd_infinity", "kid", "cmmd", "precision", "recall", "coverage", "ssim", "psnr", "tone_drift")


def document(title: str, lead: str, body: str) -> str:
    """A page that needs no other file: its head, its title, a line `lead` and the HTML of its `body`.

    >>> document("Evaluation", "30 November", "<p>FID 10</p>")[-70:]
    '>Evaluation</h1><p>30 November</p></header><p>FID 10</p></main></html>'
    """
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><main><header><h1>{html.escape(title)}</h1>"
        f"<p>{lead}</p></header>{body}</main></html>"
    )


def _embed(picture: np.ndarray, alt: str) -> str:
    """An <img> that carries its own JPEG, of a picture (H,W,3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=88, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">'


def _page(report: Report) -> str:
    sets = " against ".join(
        html.escape(f"{about['count']} {name} images of {about['path']}")
        for name, about in report.sets.items()
        if name in ("generated", "real", "paired")
    )
    lead = " · ".join(part for part in (report.date, sets, f"HistoLDM {tool_version()}") if part)
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in report.warnings)
    body = _headlines(report)
    if warnings:
        body += f'<section><h2>Before you use these figures</h2><ul class="warn">{warnings}</ul></section>'
    body += "".join(_section_html(each) for each in report.sections)
    return document(report.title, lead, body + _data_section(report))


def _headlines(report: Report) -> str:
    """The first figures that a reader looks for, of the first extractor."""
    shown: dict[str, tuple[Measure, str]] = {}
    for section in report.sections:
        for each in section.measures:
            if each.name in HEADLINES:
                shown.setdefault(each.name, (each, section.extractor))
    tiles = []
    for name in HEADLINES:
        if name in shown:
            each, extractor = shown[name]
            ends = f"<i>{interval(each.low, each.high)}</i>" if each.low is not None else ""
            kind = "tile invalid" if each.invalid else "tile"
            label = f"{each.title}{arrow(each.better)}"
            of = f"<em>{html.escape(extractor)}</em>" if extractor else ""
            label = f"<span>{html.escape(label)}</span>{of}"
            tiles.append(f'<div class="{kind}">{label}<b>{number(each.value)}</b>{ends}</div>')
    return f'<div class="tiles">{"".join(tiles[:8])}</div>' if tiles else ""


def _section_html(section: Section) -> str:
    of = f" <small>{html.escape(section.extractor)}</small>" if section.extractor else ""
    parts = [f"<section id={section.id}><h2>{html.escape(section.title)}{of}</h2>"]
    if section.intro:
        parts.append(f"<p>{html.escape(section.intro)}</p>")
    if section.verdict:
        kind, words = section.verdict
        parts.append(f'<div class="verdict {kind}">{html.escape(words)}</div>')
    if section.measures:
        parts.append(_measure_table(section.measures))
    if section.plots:
        drawn = "".join(
            f"<figure>{svg}<figcaption>{html.escape(words)}</figcaption></figure>" for svg, words in section.plots
        )
        parts.append(f'<div class="plots">{drawn}</div>')
    for picture, words in section.pictures:
        caption = f"<figcaption>{html.escape(words)}</figcaption>"
        parts.append(f'<figure class="wide">{_embed(picture, words)}{caption}</figure>')
    return "".join(parts) + "</section>"


def _measure_table(measures: Sequence[Measure]) -> str:
    rows = []
    for each in measures:
        why = f'<span class="why">not valid: {html.escape(each.invalid)}</span>' if each.invalid else ""
        rows.append(
            f'<tr{" class=invalid" if each.invalid else ""}>'
            f'<th scope="row">{html.escape(each.title)}{arrow(each.better)}</th>'
            f'<td class="n v">{number(each.value)}</td><td class="n">{interval(each.low, each.high)}</td>'
            f'<td class="q">{html.escape(each.note)}{why}</td></tr>'
        )
    head = "<thead><tr><th>figure<th>value<th>95% interval<th>what it is</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _data_section(report: Report) -> str:
    blocks = []
    for name, about in report.sets.items():
        rows = [(label, _told(about[key])) for key, label in ABOUT.items() if about.get(key)]
        digest = html.escape(str(next((about[key] for key in IDENTITY if about.get(key)), ""))[:24])
        cells = "".join(f'<tr><th scope="row">{label}</th><td>{html.escape(value)}</td></tr>' for label, value in rows)
        cells += f'<tr><th scope="row">SHA-256</th><td><code>{digest}…</code></td></tr>' if digest else ""
        dot = f'<i class="dot" style="background:{COLOURS.get(name, "#9aa0a6")}"></i>'
        title = f"<h3>{dot}{name}: {html.escape(str(about['path']))}</h3>"
        blocks.append(f"<div>{title}<table><tbody>{cells}</tbody></table></div>")
    for name, about in report.extractors.items():
        rows = [
            (key.replace("_", " "), _told(value)) for key, value in about.items() if key not in ("data", "extractor")
        ]
        cells = "".join(
            f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(value[:80])}</td></tr>' for key, value in rows
        )
        blocks.append(f"<div><h3>extractor {html.escape(name)}</h3><table><tbody>{cells}</tbody></table></div>")
    settings = html.escape(json.dumps(_plain(report.settings), indent=1, ensure_ascii=False))
    return (
        f'<section><h2>Data and settings</h2><div class="sets">{"".join(blocks)}</div>'
        f"<details><summary>settings</summary><pre>{settings}</pre></details></section>"
    )


def _told(value: Any) -> str:
    """A value in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return (", " if any(isinstance(each, str) for each in value) else " × ").join(map(_told, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
