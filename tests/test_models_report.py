"""The cards of the shipped models state what `make models-report` printed, and have all headings."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from conftest import ROOT
from ldm.model_card import HEADINGS

sys.path.append(str(ROOT / "benchmarks"))

import model_measures
import models_report
from models_report import CARD, JOBS, Row

MODELS = ROOT / "data" / "models"
SHIPPED = sorted(path.parent.name for path in MODELS.glob("*/*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_states_the_figures_of_the_report_and_has_all_headings(name):
    card = (MODELS / name / CARD).read_text()
    assert card.startswith(f"# {name}\n")
    assert tuple(re.findall(r"^## (.+)$", card, re.MULTILINE)) == HEADINGS
    assert all(part.strip() for part in re.split(r"^## .+$", card, flags=re.MULTILINE)[1:])
    kept = [Row(**each) for each in json.loads((MODELS / "measures.json").read_text())[name]]
    assert models_report.rows_of(card) == kept
    assert kept
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", each.value) for each in kept)


def test_every_shipped_model_is_measured():
    assert set(SHIPPED) <= set(JOBS)
    assert set(json.loads((MODELS / "measures.json").read_text())) <= set(JOBS)


def test_a_table_is_written_into_its_card_and_read_again():
    rows = [model_measures.row("a", (0.1234, 0.1, 0.15), "3 tiles"), model_measures.row("b", [2.0], "one", 1)]
    assert rows[1] == Row("b", "2.0", "", "one")
    assert model_measures.share("c", np.array([1.0, 1.0, 0.0]), "3").interval == "0.208 to 0.939"
    card = "# m\n\n## Data\n\nx\n\n## Figures\n\n| old |\n|---|\n| 1 |\n\nWords of mine.\n\n## Use\n\n| kept | |\n"
    new = models_report.with_table(card, rows)
    assert models_report.rows_of(new) == rows
    assert "Words of mine." in new
    assert "old" not in new
    assert new.endswith("## Use\n\n| kept | |\n")
    assert models_report.with_table(new, rows) == new


def test_what_was_measured_is_kept_until_its_model_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models_report, "ROOT", tmp_path)
    calls = []

    def measure(folder, precision):
        calls.append(folder.name)
        return [model_measures.row("x", [len(calls)], "here", 0)]

    monkeypatch.setattr(models_report, "JOBS", {"demo-x": models_report.Job(measure, 1)})
    folder = tmp_path / "data" / "models" / "demo-x"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "models" / "demo-mitosis-scorers").mkdir()
    (folder / "model.safetensors").write_text("1")
    (folder / CARD).write_text("# demo-x\n\n## Figures\n\n## Use\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models_report, "set_up", lambda: "fp32")
    assert models_report.main(["--save"]) == 0
    assert "| x | 1 |  | here |" in (folder / CARD).read_text()
    assert models_report.main([]) == 0
    assert calls == ["demo-x"]
    assert "all figures are those of the cards" in capsys.readouterr().out
    (folder / "model.safetensors").write_text("2")
    assert models_report.main([]) == 2
    assert "demo-x: x 2, card 1" in capsys.readouterr().err
    assert models_report.main(["--only", "demo-y"]) == 2
