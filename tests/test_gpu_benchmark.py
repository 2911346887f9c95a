"""The benchmark of a GPU, at the tiny size that it takes on a CPU."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import gpu


@pytest.fixture
def run(tmp_path):
    def go(*words: str) -> tuple[int, dict]:
        code = gpu.main(["--device", "cpu", "--out", str(tmp_path), *words])
        return code, json.loads((tmp_path / "gpu.json").read_text())["parts"]

    return go


def test_published_sizes():
    size = gpu.full()
    with torch.device("meta"):
        unet, transformer = gpu.ldm_unet(size.unet), gpu.transformer(size.transformer)
    assert gpu.size_in_millions(unet) == pytest.approx(400.92, abs=0.01)
    assert 590 < gpu.size_in_millions(transformer) < 620


@pytest.mark.slow
def test_every_part_but_the_compiler_runs_on_a_cpu(run, tmp_path, capsys):
    code, parts = run("--parts", *(part for part in gpu.PARTS if part != "compile"))
    assert code == 0
    assert {name: len(told["rows"]) for name, told in parts.items()} == {
        "peak": 2, "unet": 2, "transformer": 2, "image": 2, "agreement": 1
    }  # fmt: skip
    for part in ("unet", "transformer"):
        for row in parts[part]["rows"]:
            assert row["seconds"] * row["images_per_second"] == pytest.approx(row["batch"])
            assert 0 < row["of_peak"] < 1
    assert parts["agreement"]["rows"][0]["largest_difference"] == 0  # of a CPU with itself
    image = Image.open(tmp_path / "image.png")
    assert image.size == (256, 256)
    assert len(image.getcolors(maxcolors=256**2)) > 100
    assert "256 x 256 px" in capsys.readouterr().out


def test_a_part_that_fails_loses_no_other_and_a_batch_that_does_not_fit_is_halved(run, monkeypatch, capsys):
    fits = gpu.flops_of

    def too_large(step):
        if len(tried) < 2:
            tried.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fits(step)

    tried: list[object] = []
    monkeypatch.setattr(gpu, "flops_of", too_large)
    monkeypatch.setattr(gpu, "matrix_ceiling", lambda *given: 1 / 0)
    code, parts = run("--parts", "peak", "transformer")
    assert code == 2
    assert parts["peak"]["failed"].startswith("ZeroDivisionError")
    assert [row["batch"] for row in parts["transformer"]["rows"]] == [1, 1]  # a quarter of 4, and 1 as it is
    assert "failed: peak" in capsys.readouterr().err


def test_what_the_budget_leaves_no_time_for_is_named(run, capsys):
    code, parts = run("--parts", "peak", "unet", "--minutes", "0")
    assert code == 0
    assert all(told["skipped"] and not told["rows"] for told in parts.values())
    assert capsys.readouterr().out.count("the 0 minutes are used up") == 2
