"""The figures of the models in data/models, as their cards state them.

    make models-report            # or python benchmarks/models_report.py; SAVE=1, or --save, writes the cards
    python benchmarks/models_report.py --only demo-stains demo-slices

Everything is measured on what the repository holds: data/demo, data/pretrain, data/samples, data/models. A table for
each model is printed and written to out/models_report.json. What a stopped run has measured is kept there and used
again as long as the model and the benchmarks are the same. With --save the figures go to data/models/measures.json and
into the tables of the cards, data/models/<model>/README.md. Else the last lines say which figures differ from the
cards': another processor rounds otherwise, bfloat16 is used where it is native. One core computes, so that the number
of cores changes nothing: 6 minutes with native bfloat16.

What is measured, and on which data, is in model_measures.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import model_measures as measured
from model_measures import MODELS, OUT, Row, quietly
from tqdm import tqdm

from ldm.errors import UserError, run_command
from ldm.files import CARD, sha256, writable_folder, write_text

ROOT = Path(__file__).resolve().parent.parent
FIGURES = MODELS / "measures.json"


@dataclass(frozen=True)
class Job:
    """seconds: of one core with native bfloat16, about."""

    measure: Callable[[Path, str], list[Row]]
    seconds: int


JOBS = {
    "demo-encoder": Job(measured.encoder, 15),
    "demo-ssl": Job(measured.ssl, 70),
    "demo-ssl-student": Job(measured.student, 1000),
    "demo-field": Job(measured.field, 40),
    "demo-mitosis": Job(measured.mitosis, 35),
    "demo-mitosis-scorers": Job(measured.scorers, 5),
    "demo-stains": Job(measured.stains, 35),
    "demo-slices": Job(measured.slices, 70),
    "demo-slices-pairs": Job(measured.slices_pairs, 15),
    "demo-omics": Job(measured.omics, 95),
    "demo-text": Job(measured.text, 150),
}


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as a table of Markdown, as cards have it."""
    head = ["| measure | value | 95% interval | on |", "|---|---|---|---|"]
    return head + [f"| {each.measure} | {each.value} | {each.interval} | {each.on} |" for each in rows]


def rows_of(card: str) -> list[Row]:
    """The rows of the table under `## Figures` of a card."""
    section = re.split(r"^## ", card, flags=re.MULTILINE)
    (measures,) = [part for part in section if part.startswith("Figures\n")]
    lines = [line for line in measures.partition("\n### ")[0].splitlines() if line.startswith("|")][2:]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]


def with_table(card: str, rows: Sequence[Row]) -> str:
    """The card with these rows in the table under `## Figures`; its other words stay."""
    before, heading, rest = card.partition("\n## Figures\n")
    if not heading:
        raise UserError("a card has the heading `## Figures`")
    section, *others = re.split(r"(?=^###? )", rest, flags=re.MULTILINE)
    words = "\n".join(line for line in section.splitlines() if not line.startswith("|")).strip()
    new = "\n".join(["", *table(rows), *(["", words] if words else []), "", ""])
    return before + heading + new + "".join(others)


def key_of(folder: Path) -> str:
    """What decides a model's figures: its files, the scorers', and the benchmarks."""
    files = [*folder.iterdir(), *(MODELS / "demo-mitosis-scorers").iterdir(), *(ROOT / "benchmarks").glob("*.py")]
    kept = sorted(path for path in files if path.is_file() and path.name != CARD)
    return hashlib.sha256("".join(map(sha256, kept)).encode()).hexdigest()


def set_up() -> str:
    """One thread, whose roundings do not depend on the number of cores; returns the precision to compute in."""
    import torch

    torch.set_num_threads(1)
    sys.path.append(str(ROOT))
    from ldm.devices import faster_precision

    return faster_precision("cpu")[0]


def report(options: argparse.Namespace) -> None:
    os.chdir(ROOT)
    if unknown := [name for name in options.only or () if name not in JOBS]:
        raise UserError(f"no model is called {unknown[0]}; there are {', '.join(JOBS)}")
    asked = [name for name in options.only or JOBS if any((MODELS / name).glob("*.safetensors"))]
    if lacking := [name for name in options.only or () if name not in asked]:
        raise UserError(f"{MODELS / lacking[0]} has no weights (*.safetensors); there is nothing to measure")
    writable_folder(OUT)
    result = OUT.with_suffix(".json")
    done: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
    saved = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    total, differ, precision = sum(JOBS[name].seconds for name in asked), [], ""
    bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed}, left {remaining}"
    with tqdm(total=total, bar_format=bar_format) as bar:
        for name in asked:
            bar.set_description(name)
            key = key_of(MODELS / name)
            if options.fresh or options.save or done.get(name, {}).get("key") != key:
                precision = precision or set_up()
                with quietly():
                    rows = JOBS[name].measure(MODELS / name, precision)
                done[name] = {"key": key, "precision": precision, "rows": [asdict(each) for each in rows]}
                write_text(result, json.dumps(done, indent=1))
            rows = done[name]["rows"]
            before = {each["measure"]: each["value"] for each in saved.get(name, [])}
            differ += [
                f"{name}: {each['measure']} {each['value']}, card {before.get(each['measure'], 'none')}"
                for each in rows
                if before.get(each["measure"]) != each["value"]
            ]
            bar.update(JOBS[name].seconds)
            bar.write("\n".join(["", name, *table([Row(**each) for each in rows])]), file=sys.stdout)
    if options.save:
        save({name: done[name]["rows"] for name in asked}, saved)
    elif differ:
        raise UserError("\n  ".join([f"{len(differ)} figures are not those of the cards:", *differ]))
    else:
        print(f"\nall figures are those of the cards in {MODELS}")


def save(found: dict[str, list[dict[str, str]]], saved: dict[str, list[dict[str, str]]]) -> None:
    """Write measures.json and the tables of the cards."""
    everything = {name: (saved | found)[name] for name in JOBS if name in saved | found}
    write_text(FIGURES, json.dumps(everything, indent=1) + "\n")
    for name, rows in found.items():
        card = MODELS / name / CARD
        if card.is_file():
            write_text(card, with_table(card.read_text(), [Row(**each) for each in rows]))
    print(f"\nwrote {FIGURES} and the tables of {len(found)} cards")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models alone")
    parser.add_argument("--save", action="store_true", help="measure anew; write measures.json and the cards' tables")
    parser.add_argument("--fresh", action="store_true", help="measure what was measured already, too")
    return run_command(lambda: report(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
