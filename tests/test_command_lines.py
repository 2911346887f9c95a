"""What a user gets wrong, Ctrl-C and a full disk look and exit alike for `histoldm` and for every script."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import typer
from scripts import MODULES, examples_of, script_of

import ldm.cli
import ldm.commands.describe
from ldm.cli.script import script

STOPPED = "stopped; run the same command again to continue.\n"
FULL = "error: the disk is full (out/part); make room and run the same command again.\n"


@script("several", "Take several.\n\nIn one\nparagraph.\n\n    python -m several\n        --names a")
def several(
    names: Annotated[list[str], typer.Option("--names", help="Names.")],
    sizes: Annotated[list[int] | None, typer.Option("--sizes", help="Sizes.")] = None,
    size: Annotated[int, typer.Option("--size", help="Size.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Quick.")] = False,
) -> None:
    print(names, sizes, size, quick)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--names a", "['a'] None 1 False"),
        ("--names a b c --size 2 --sizes 3 4 --quick", "['a', 'b', 'c'] [3, 4] 2 True"),
        ("--names a --names b c --quick", "['a', 'b', 'c'] None 1 True"),
        ("--names=a b --sizes=1", "['a', 'b'] [1] 1 False"),
    ],
)
def test_a_list_option_takes_several_words_and_may_be_repeated(words, told, capsys):
    several(words.split())
    assert capsys.readouterr().out.strip() == told


def exit_of(run: Callable[[], None], argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    with pytest.raises(SystemExit) as stop:
        run()
    return stop.value.code


@pytest.mark.parametrize("words", ["--nmaes a", "--names a --size x", "--names a --quick b", ""])
def test_a_usage_error_of_a_script_is_exit_code_2(words, capsys, monkeypatch):
    assert exit_of(several.run, words.split(), monkeypatch) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(
        "Usage: python -m several [OPTIONS]\nTry 'python -m several --help' for help.\n\nError: "
    )


def test_help_of_a_script_is_its_docstring_wrapped_for_the_terminal(capsys, monkeypatch):
    assert exit_of(several.run, ["--help"], monkeypatch) == 0
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {"Usage: python -m several [OPTIONS]", "In one paragraph.", "python -m several", "--names a"} <= set(said)


def interrupt(*_: object, **__: object) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job begun in the background ignores
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()


def fill_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/part")


def test_histoldm_is_stopped_by_ctrl_c_and_by_a_full_disk(monkeypatch, capsys):
    monkeypatch.setattr(ldm.commands.describe, "describe_model", interrupt)
    assert exit_of(ldm.cli.main, ["describe", "x"], monkeypatch) == 130
    assert capsys.readouterr().err == STOPPED
    monkeypatch.setattr(ldm.commands.describe, "describe_model", fill_disk)
    assert exit_of(ldm.cli.main, ["describe", "x"], monkeypatch) == 2
    assert capsys.readouterr().err == FULL


def test_histoldm_tells_a_mistake_once(monkeypatch, capsys, tmp_path: Path):
    assert exit_of(ldm.cli.main, ["describe", str(tmp_path / "none")], monkeypatch) == 2
    assert capsys.readouterr().err == f"error: model {tmp_path / 'none'} does not exist.\n"
    assert exit_of(ldm.cli.main, ["describe"], monkeypatch) == 2
    assert "\n\nError: Missing argument 'path'.\n" in capsys.readouterr().err


@pytest.mark.parametrize("module", MODULES)
def test_a_mistake_in_a_script_is_one_message(module, monkeypatch, capsys, tmp_path: Path):
    """The inputs of its example are not there."""
    monkeypatch.chdir(tmp_path)
    assert exit_of(script_of(module).run, examples_of(module)[0], monkeypatch) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: (.|\n)*\S\n", said)
    assert said.count("error: ") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", MODULES)
def test_an_unknown_option_of_a_script_is_a_usage_error(module, monkeypatch, capsys):
    assert exit_of(script_of(module).run, ["--no-such-option"], monkeypatch) == 2
    head = f"Usage: python -m {module} [OPTIONS]"
    assert re.fullmatch(
        rf"{re.escape(head)}.*\nTry 'python -m {module} --help' .*\n\nError: .*\n", capsys.readouterr().err
    )


@pytest.mark.parametrize("module", MODULES)
def test_a_script_is_stopped_by_ctrl_c_and_by_a_full_disk(module, monkeypatch, capsys):
    for stop, code, told in ((interrupt, 130, STOPPED), (fill_disk, 2, FULL)):
        monkeypatch.setattr(script_of(module).command, "callback", stop)
        assert exit_of(script_of(module).run, examples_of(module)[0], monkeypatch) == code
        assert capsys.readouterr().err == told
