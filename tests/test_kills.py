"""Each command that writes, killed, with a full disk and twice at once; `python -m benchmarks.kills` does more."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.kills import CASES, Server, Stop, Trials, can_mount, workplace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def places() -> Iterator[tuple[Server, Path, Path]]:
    with workplace() as made:
        yield made


@pytest.mark.parametrize("name", CASES)
def test_a_command_that_was_stopped_and_raced_leaves_what_an_undisturbed_one_leaves(places, name: str):
    rng = random.Random(name)
    trials = Trials(*places, name)
    first, second, third = trials.spread(3, rng)
    trials.stopped(Stop(first), Stop(second, full=True), Stop(third), raced=True)
    if can_mount() and trials.seconds < 1:
        trials.small_disk(rng.uniform(0.2, 0.8))
