"""Each command that writes, killed, with a full disk and twice at once; `python -m benchmarks.kills` does more."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from scripts import MODULES

from benchmarks.kills import CASES, Server, Stop, Trials, can_mount, workplace
from ldm.cli import app


@pytest.fixture(scope="module")
def places() -> Iterator[tuple[Server, Path, Path]]:
    with workplace() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_command_that_was_stopped_and_raced_leaves_what_an_undisturbed_one_leaves(places, name: str):
    rng = random.Random(name)
    trials = Trials(*places, name)
    first, second, third = trials.spread(3, rng)
    trials.stopped(Stop(first), Stop(second, full=True), Stop(third), raced=True)
    if can_mount() and trials.seconds < 1:
        trials.small_disk(rng.uniform(0.2, 0.8))


def test_every_command_that_writes_is_tried():
    reading = {"describe", "doctor", "view"}
    trained = {"train"}  # of which tests/test_main.py sees that it resumes exactly
    tried = {case.words.split()[0] for case in CASES.values()}
    scripts = {module for module in MODULES if module.startswith("data_prep")}
    assert tried == {*typer.main.get_command(app).commands, *scripts} - reading - trained
