"""What a run on a cohort did: runs/<time>.json for programs, summary.html for people."""

from __future__ import annotations

import html
import json
import platform
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.engine import DONE, FAILED, Outcome
from ldm.files import tool_version, writable_folder, write_text
from ldm.images.quality import QUALITY
from ldm.report.page import document

ROWS = 10_000  # of slides that the page shows, as no browser could show a million
PACKAGES = ("torch", "zarr", "numpy", "openslide-python", "tifffile", "timm")


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    told = {each.name: getattr(outcome, each.name) for each in fields(outcome)}
    return told | {"seconds": round(outcome.seconds, 4)}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON, one a line, without what is empty: a file of a million stays small, and line by line to read."""
    told = ({name: value for name, value in row.items() if value not in (None, "", [], {}, ())} for row in rows)
    return ",".join(f"\n  {json.dumps(row, default=str, ensure_ascii=False)}" for row in told)


class RunRecord:
    """Outcomes of a run, as they come.

    Args:
        out: the cohort. entries: its slides as the run took them. asked: its settings.
    """

    def __init__(self, out: Path, entries: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> None:
        self.out, self.entries, self.asked = out, list(entries), dict(asked)
        self.started = datetime.now().astimezone()
        self.outcomes: list[Outcome] = []
        self.tiles = 0

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.tiles += outcome.facts.get("tiles", 0)

    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.state == FAILED]

    def notes(self) -> dict[str, list[str]]:
        """What was told of slides: text -> slides."""
        found: dict[str, list[str]] = defaultdict(list)
        for outcome in self.outcomes:
            for text in outcome.notes:
                found[text].append(outcome.slide)
        return dict(found)

    def seconds(self) -> dict[str, float]:
        """Stage -> seconds that all its tasks took together."""
        total: dict[str, float] = defaultdict(float)
        for outcome in self.outcomes:
            total[outcome.stage] += outcome.seconds
        return dict(total)

    def write(self) -> None:
        """runs/<time>.json, and summary.html, which shows the last run."""
        ended = datetime.now().astimezone()
        writable_folder(runs := self.out / "runs")
        about = {
            "version": tool_version(), "python": platform.python_version(), "machine": platform.node(),
            "packages": {name: version(name) for name in PACKAGES}, "command": sys.argv,
            "started": self.started.isoformat(timespec="seconds"), "ended": ended.isoformat(timespec="seconds"),
            "settings": self.asked, "tiles": self.tiles, "minutes": {k: v / 60 for k, v in self.seconds().items()},
            "notes": self.notes(),
        }  # fmt: skip
        rows = {"slides": self.entries, "outcomes": map(_as_dict, self.outcomes)}
        text = json.dumps(about, indent=1, default=str, ensure_ascii=False).removesuffix("\n}")
        text += "".join(f',\n "{name}": [{_lines(each)}\n ]' for name, each in rows.items()) + "\n}\n"
        name = self.started.strftime("%Y-%m-%dT%H-%M-%S")
        path = next(path for i in range(1000) if not (path := runs / f"{name}{f'-{i}' if i else ''}.json").exists())
        write_text(path, text)
        write_text(self.out / "summary.html", self._page(ended))

    def _page(self, ended: datetime) -> str:
        by_slide: dict[str, dict[str, Outcome]] = defaultdict(dict)
        for outcome in self.outcomes:
            by_slide[outcome.slide][outcome.stage] = outcome
        failed = {outcome.slide for outcome in self.failed()}
        size = sum(outcome.facts.get("bytes", 0) for outcome in self.outcomes if outcome.stage == "check")
        figures: list[tuple[str, Any]] = [("slides", len(by_slide)), ("failed", len(failed)), ("tiles", self.tiles)]
        figures += [("GB", f"{size / 1e9:.2f}")]
        figures += [(f"min of {stage}", f"{seconds / 60:.1f}") for stage, seconds in self.seconds().items()]
        body = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in figures)
        body = f'<div class="tiles">{body}</div>'
        notes = self.notes().items()
        if listed := "".join(f"<li>{html.escape(text)} <small>({len(own)} slides)</small></li>" for text, own in notes):
            body += f'<section><h2>Told of slides</h2><ul class="warn">{listed}</ul></section>'
        stages = list(dict.fromkeys(outcome.stage for outcome in self.outcomes))
        head = "".join(f"<th>{html.escape(stage)}</th>" for stage in ("slide", "", *stages, "tiles", *QUALITY, "MB"))
        order = sorted(by_slide, key=lambda slide: (slide not in failed, slide))
        rows = "".join(self._row(slide, by_slide[slide], stages) for slide in order[:ROWS])
        body += f'<section><h2>Slides</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>{rows}</table></div>'
        if (more := len(order) - ROWS) > 0:
            body += f"<p>Of {len(order)} slides {ROWS}, failed ones first; the other {more} are in runs/ alone.</p>"
        settings = html.escape(json.dumps(self.asked, indent=1, default=str))
        body += f"</section><section><h2>Settings</h2><pre>{settings}</pre></section>"
        minutes = (ended - self.started).total_seconds() / 60
        lead = f"{self.started:%d %B %Y, %H:%M} · {minutes:.1f} minutes · HistoLDM {tool_version()}"
        return document(f"Cohort {self.out.absolute().name}", lead, body)

    def _row(self, slide: str, found: Mapping[str, Outcome], stages: Sequence[str]) -> str:
        """The row of a slide; its picture is referred to, as a page of ten thousand could not hold them."""
        picture, cells = f"previews/{Path(slide).stem}.png", ""
        if (self.out / picture).exists():
            cells = f'<img loading="lazy" width="160" alt="" src="{html.escape(picture)}">'
        cells = f"<td>{cells}</td>"
        for stage in stages:
            outcome = found.get(stage, Outcome(slide, stage, ""))
            seconds = f" {outcome.seconds:.1f} s" if outcome.state == DONE else ""
            why = f'<span class="why">{html.escape(outcome.reason)}</span>' if outcome.reason else ""
            cells += f"<td>{outcome.state}{seconds}{why}</td>"
        facts = found["tiles"].facts if "tiles" in found else {}
        counts = "".join(f'<td class="n">{facts.get(name, "")}</td>' for name in ("tiles", *QUALITY))
        size = found["check"].facts.get("bytes") if "check" in found else None
        held = "" if size is None else f"{size / 1e6:.1f}"
        return f'<tr><th>{html.escape(slide)}</th>{cells}{counts}<td class="n">{held}</td></tr>'
