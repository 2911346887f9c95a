"""The demo's machinery: steps that are done are skipped, stopped ones go on, failed ones say so; figures are right."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import threading
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import __main__ as demo
from demo import figures, report
from demo.record import Record, command_of
from demo.steps import HELD_OUT, REGION, Step, demo_steps
from ldm.errors import UserError
from ldm.metrics.seams import seam_ratios

ROOT = Path(__file__).resolve().parent.parent


def load_benchmark():
    spec = importlib.util.spec_from_file_location("conditioning", ROOT / "benchmarks" / "conditioning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conditioning = load_benchmark()


def note(out: Path, name: str) -> Step:
    """A step that appends a line to log.txt and makes its output."""
    code = f"open(r'{out / 'log.txt'}', 'a').write('{name} '); open(r'{out / name}', 'w').write('x')"
    return Step(name, name, ("python", "-c", code), (out / name,))


@pytest.fixture
def three(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(demo, "demo_steps", lambda out, precision: [note(out, name) for name in "abc"])
    monkeypatch.chdir(ROOT)
    return tmp_path


def log(out: Path) -> list[str]:
    return (out / "log.txt").read_text().split()


def test_a_second_run_repeats_nothing(three, capsys):
    demo.run_demo(three)
    demo.run_demo(three)
    assert log(three) == ["a", "b", "c"]
    assert "$ python -c" in capsys.readouterr().out  # the command is shown
    entry = json.loads((three / "times.json").read_text())["steps"]["b"]
    assert entry["done"]
    assert entry["seconds"] > 0
    assert entry["peak_mib"] > 1


def test_a_missing_output_is_made_again_with_all_that_builds_on_it(three):
    demo.run_demo(three)
    (three / "b").unlink()
    demo.run_demo(three)
    assert log(three) == ["a", "b", "c", "b", "c"]


def test_a_changed_command_is_run_again_over_its_old_output(three, monkeypatch):
    demo.run_demo(three)
    changed = Step("a", "a", (*note(three, "a").command, "--more"), (three / "a",))
    steps = [changed, note(three, "b"), note(three, "c")]
    monkeypatch.setattr(demo, "demo_steps", lambda out, precision: steps)
    demo.run_demo(three)
    assert log(three) == ["a", "b", "c"] * 2


def test_a_failed_step_stops_the_demo_and_says_which(three, monkeypatch):
    steps = [note(three, "a"), Step("b", "b", ("python", "-c", "raise SystemExit(3)")), note(three, "c")]
    monkeypatch.setattr(demo, "demo_steps", lambda out, precision: steps)
    with pytest.raises(UserError, match="'b' failed with exit code 3"):
        demo.run_demo(three)
    assert log(three) == ["a"]


PATIENT = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1]).write_text("x")
    time.sleep(30)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_reaches_the_step_and_the_next_run_goes_on_with_it(three, monkeypatch):
    ready = three / "ready"
    steps = [note(three, "a"), Step("b", "b", ("python", "-c", PATIENT, str(ready)), (three / "kept",))]
    monkeypatch.setattr(demo, "demo_steps", lambda out, precision: steps)
    monkeypatch.setattr(demo, "IMPORT_SECONDS", 0)

    def press() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        demo.run_demo(three)
    assert stopped.value.code == 130
    record = Record(three / "times.json")
    assert record.done(steps[0])
    assert record.begun(steps[1])
    (three / "kept").write_text("half")  # what the stopped command left, for it to go on with
    look = f"import sys; sys.exit(not open(r'{three / 'kept'}').read() == 'half')"
    again = Step("b", "b", ("python", "-c", look), (three / "kept",))
    record.steps["b"]["command"] = list(again.command)
    record.save()
    monkeypatch.setattr(demo, "demo_steps", lambda out, precision: [steps[0], again])
    demo.run_demo(three)
    assert log(three) == ["a"]


def test_a_stopped_training_is_resumed_and_its_run_named_to_later_steps(tmp_path):
    steps = demo_steps(tmp_path)
    names = [step.name for step in steps]
    training, export = steps[names.index("ssl")], steps[names.index("export")]
    record = Record(tmp_path / "times.json")
    record.begin(training, [])
    logs = tmp_path / "logs"
    assert "--resume" not in command_of(training, steps, record, logs)
    old, run = logs / "2001-01-01T00-00-00_ssl", logs / "2999-01-01T00-00-00_ssl"
    for folder in (old, run):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "last.ckpt").touch()
    assert command_of(training, steps, record, logs)[3:5] == ("--resume", str(run))
    assert str(run) in command_of(export, steps, record, logs)
    assert not any("{" in part for part in command_of(export, steps, record, logs))


def test_demo_commands_take_only_options_that_exist(tmp_path):
    from data_prep import encode_latents, extract_features, tile_slides

    for step in demo_steps(tmp_path):
        for module in (tile_slides, extract_features, encode_latents):
            if module.__name__ in step.command:
                module.main.command.make_context(step.name, list(step.command[3:]))
        for part in step.command:
            if part.endswith(".yaml"):
                assert (ROOT / part).is_file(), part


def test_a_training_whose_run_folder_is_gone_is_not_done(tmp_path):
    steps = demo_steps(tmp_path)
    training = next(step for step in steps if step.run_name == "ssl")
    record = Record(tmp_path / "times.json")
    record.begin(training, [])
    record.steps["ssl"]["done"] = True
    assert not record.done(training)
    (tmp_path / "logs" / "2999-01-01T00-00-00_ssl" / "checkpoints").mkdir(parents=True)
    (tmp_path / "logs" / "2999-01-01T00-00-00_ssl" / "checkpoints" / "last.ckpt").touch()
    assert record.done(training)


def test_a_step_whose_weights_changed_begins_anew_with_all_that_builds_on_it(three, monkeypatch):
    weights = three / "weights"
    weights.mkdir()
    (weights / "model").write_text("old")
    steps = [note(three, "a"), replace(note(three, "b"), inputs=(weights,)), note(three, "c")]
    monkeypatch.setattr(demo, "demo_steps", lambda out, precision: steps)
    demo.run_demo(three)
    (weights / "model").write_text("new")
    demo.run_demo(three)
    assert log(three) == ["a", "b", "c", "b", "c"]


def test_what_commands_and_their_configs_name_are_inputs(tmp_path):
    for step in demo_steps(tmp_path):
        if step.name in ("figures", "report"):  # they read what earlier steps made, of the same encoder and slide
            continue
        named = [part for part in step.command if part.startswith(("data/", "configs/"))]
        text = "".join((ROOT / part).read_text() for part in named if part.endswith(".yaml"))
        named += re.findall(r": (data/models/[\w-]+)", text)
        assert {str(path) for path in step.inputs} >= set(named), step.name


def test_the_report_lists_what_is_done(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.yaml").write_text("model: {}")
    steps = [note(tmp_path, name) for name in "ab"]
    record = {name: {"seconds": 5.0, "peak_mib": 1.0, "command": ["x"], "done": name == "a"} for name in "ab"}
    page = report.settings_section(steps, record, tmp_path)
    assert "<th scope=row>a</th>" in page
    assert "<th scope=row>b</th>" not in page
    assert "<th scope=row>total</th><td>5 s</td>" in page


def test_check_takes_the_plain_seam_ratio_and_an_unwritable_folder_is_told_first(tmp_path, monkeypatch):
    seams = {"tile": 64, "all": {"ratio": 1.2, "low": 0.9, "high": 1.1}, "like": {"ratio": 1.0, "low": 0.9, "high": 1}}
    measured = dict.fromkeys(("own", "shuffled", "margin", "low", "high", "reconstruction"), 0.5)
    measured |= {"tiles": 2, "steps": 1, "guidance_scale": 2.0, "seed": 0, "blocks": 2}
    monkeypatch.setattr(conditioning, "read_image", lambda path: None)
    monkeypatch.setattr(conditioning, "measure_seams", lambda *_: seams)
    monkeypatch.setattr(conditioning, "measure_conditioning", lambda _: (measured, np.zeros((8, 8, 3), np.uint8)))
    given = dict(count=2, image=tmp_path, slide=None, region=None, tile=64, model=tmp_path, seed=0, check=True)
    with pytest.raises(UserError, match=r"1\.200 is above"):
        conditioning.run(Namespace(out=tmp_path / "out", **given))
    assert "SYNTHETIC" in Image.open(tmp_path / "out" / "tiles.png").text
    (tmp_path / "file").touch()
    monkeypatch.setattr(conditioning, "measure_conditioning", lambda _: pytest.fail("worked before it looked"))
    with pytest.raises(UserError, match="cannot write into"):
        conditioning.run(Namespace(out=tmp_path / "file" / "out", **given))


def test_damaged_record_is_a_message(tmp_path):
    (tmp_path / "times.json").write_text('{"steps": ')
    with pytest.raises(UserError, match="damaged"):
        Record(tmp_path / "times.json")


def test_the_region_shows_the_held_out_band():
    assert figures.overlap(REGION, HELD_OUT) == (0, 384, 1024, 896)
    assert figures.overlap((0, 0, 100, 100), HELD_OUT) is None


def test_report_parts_carry_their_pictures_and_escape_text():
    picture = figures.annotate(np.full((512, 512, 3), 240, np.uint8), "SYNTHETIC", 0.5, (0, 100, 512, 300))
    embedded = report.embed(Image.fromarray(picture), 'a "b"')
    assert embedded.startswith('<img alt="a &quot;b&quot;" src="data:image/jpeg;base64,/9j/')
    assert "&lt;x&gt;" in report.table([("<x>", 1)])
    curves = figures.loss_curves([(1, "train/loss", 2.0), (2, "train/loss", 1.0)], [("train/loss", "val/loss")])
    assert curves.startswith("<svg")
    assert "train/loss" in curves
    assert "val/loss" not in curves


def test_margin_is_own_similarity_less_the_mean_of_the_others():
    similarity = np.array([[0.9, 0.1, 0.3], [0.0, 0.8, 0.4], [0.5, 0.1, 0.6]])
    assert conditioning.margins(similarity) == pytest.approx([0.7, 0.6, 0.3])


def test_bootstrap_draws_whole_blocks():
    values = np.array([0.0] * 50 + [1.0] * 50)
    low, high = conditioning.block_bootstrap(values, np.array(["a"] * 50 + ["b"] * 50))
    assert (low, high) == (0.0, 1.0)  # two blocks: the mean is 0, 1/2 or 1
    low, high = conditioning.block_bootstrap(values, np.arange(100))
    assert 0.35 < low < 0.45
    assert 0.55 < high < 0.65


@pytest.mark.parametrize("near", [None, 32])
def test_seam_ratio_sees_seams_and_only_those(near):
    rng = np.random.default_rng(0)
    smooth = rng.normal(128, 8, (256, 256, 3))
    clean = seam_ratios(smooth.clip(0, 255).astype(np.uint8), 64, near)
    assert clean.shape == (64,)
    assert clean[0] == pytest.approx(1, abs=0.06)
    tiles = np.kron(rng.normal(0, 25, (4, 4)), np.ones((64, 64)))[..., None]  # each tile has a tint of its own
    tinted = seam_ratios((smooth + tiles).clip(0, 255).astype(np.uint8), 64, near)
    assert tinted[0] > 1.5
    assert tinted.argmax() == 0


def test_like_for_like_seams_overlook_blocks_of_jpeg():
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.normal(128, 20, (32, 32)), np.ones((8, 8)))[..., None] + rng.normal(0, 4, (256, 256, 3))
    image = blocks.clip(0, 255).astype(np.uint8)
    assert seam_ratios(image, 64)[0] > 2
    assert seam_ratios(image, 64, 32)[0] == pytest.approx(1, abs=0.1)


def test_held_out_tiles_are_spread_over_the_split():
    assert [item["row"] for item in conditioning.held_out([{"row": i} for i in range(9)], 3)] == [0, 4, 8]
    with pytest.raises(UserError, match="2 tiles are held out and 3 are asked for"):
        conditioning.held_out([{}, {}], 3)
