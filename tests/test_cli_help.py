"""Help comes at once and shows an example, for every command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer.main

from ldm.cli import app

HEAVY = ("torch", "pandas", "zarr", "numpy", "PIL", "openslide", "pytorch_lightning")
SECONDS = 1.0  # of processor time: other work on the machine makes no command slow
ASK = """
import io, json, sys, time
from contextlib import redirect_stdout
from ldm.cli import app
told = {}
for words in json.loads(sys.argv[1]):
    start = 0 if not told else time.process_time()
    with redirect_stdout(io.StringIO()) as text:
        app([*words, "--help"], standalone_mode=False, prog_name="histoldm")
    loaded = sorted(set(json.loads(sys.argv[2])) & set(sys.modules))
    told[" ".join(words)] = {"text": text.getvalue(), "loaded": loaded, "seconds": time.process_time() - start}
print(json.dumps(told))
"""


def leaves(command, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command line that does something, down through the groups."""
    inner = getattr(command, "commands", None)
    return [words] if inner is None else [leaf for name in inner for leaf in leaves(inner[name], (*words, name))]


COMMANDS = [(), *leaves(typer.main.get_command(app))]


def ask(commands: list[tuple[str, ...]]) -> dict[str, dict]:
    """The help of commands in a fresh Python, the first from its start."""
    call = [sys.executable, "-c", ASK, json.dumps(commands), json.dumps(HEAVY)]
    return json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def told() -> dict[str, dict]:
    return ask(COMMANDS)


def test_the_commands_are_found():
    assert {("sample",), ("large-image",), ("view",), ("doctor",), ("convert",)} <= set(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "histoldm")
def test_help_loads_nothing_heavy_and_shows_an_example(told, words):
    said = told[" ".join(words)]
    assert said["loaded"] == []
    assert "usage: histoldm" in said["text"].lower()
    assert "Example" in said["text"]


def test_help_is_quick():
    quickest = min(ask([("large-image",)])["large-image"]["seconds"] for _ in range(3))
    assert quickest < SECONDS
