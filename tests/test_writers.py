"""One way to write a file, and one run at a time in what a command writes, whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer.main

from conftest import ROOT
from ldm.cli import app
from ldm.cli.script import call
from ldm.errors import UserError
from ldm.files import SCRATCH, hidden, names_in, owned, sha256, whole, write_text
from ldm.images.write import save_image
from ldm.locks import Held, clear_dead


def killed(work: Callable[[], object], at: int = 0) -> bool:
    """Whether `work`, in a child that is killed before its rename number `at`, was killed."""
    if (pid := os.fork()) == 0:
        renames = 0

        def hook(event: str, _: tuple) -> None:
            nonlocal renames
            renames += event == "os.rename"
            if event == "os.rename" and renames == at:
                kill()

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half(path: Path) -> None:
    with whole(path) as part:
        part.write_text("half")
        kill()


def write_folder(path: Path, text: str) -> None:
    with whole(path) as part:
        part.mkdir()
        (part / "a").write_text(text)


def test_two_writers_of_one_file_write_their_own(tmp_path: Path):
    path = tmp_path / "a"
    with whole(path) as first:
        first.write_text("first")
        with whole(path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert everything(tmp_path) == ["a"]


def test_two_writers_of_one_folder_replace_it_one_after_the_other(tmp_path: Path):
    path = tmp_path / "a"
    write_folder(path, "old")
    with whole(path) as first:
        first.mkdir()
        write_folder(path, "second")
    assert everything(tmp_path) == ["a"]
    assert everything(path) == []


def test_a_dead_writer_leaves_nothing_and_a_living_one_keeps_its_own(tmp_path: Path):
    path = tmp_path / "a"
    with whole(path) as living:
        living.write_text("living")
        assert killed(lambda: half(path))
        assert len(everything(tmp_path)) == 2
        write_text(path, "third")
        assert living.read_text() == "living"
    assert path.read_text() == "living"
    assert killed(lambda: half(path))
    write_text(path, "last")
    assert everything(tmp_path) == ["a"]


@pytest.mark.parametrize("length", [1, 250, 255])
def test_names_of_any_length_can_be_written(tmp_path: Path, length: int):
    write_text(tmp_path / ("n" * length), "text")
    with owned(tmp_path / ("n" * length), beside=True):
        write_text(tmp_path / ("n" * length), "more")
    assert everything(tmp_path) == ["n" * length]


def test_a_file_and_a_folder_replace_each_other(tmp_path: Path):
    path = tmp_path / "a"
    write_text(path, "file")
    write_folder(path, "folder")
    assert (path / "a").read_text() == "folder"
    write_text(path, "file")
    assert path.read_text() == "file"
    assert everything(tmp_path) == ["a"]


@pytest.mark.parametrize("at", range(1, 4))
def test_a_kill_while_a_folder_is_replaced_loses_neither(tmp_path: Path, at: int):
    path = tmp_path / "a"
    write_folder(path, "old")
    was_killed = killed(lambda: write_folder(path, "new"), at)
    assert was_killed  # at the rename that fails, the one that puts the old aside, the one that places the new
    with whole(path) as part:
        assert (path / "a").read_text() == "old"
        part.mkdir()
        (part / "a").write_text("newer")
    assert (path / "a").read_text() == "newer"
    assert everything(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_placed_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "a"
    write_folder(path, "old")
    with pytest.raises(FileNotFoundError), whole(path):
        pass  # nothing was written
    assert (path / "a").read_text() == "old"
    assert everything(tmp_path) == ["a"]


def test_scratch_of_pyramids_lies_in_that_of_their_file(tmp_path: Path):
    image = np.zeros((600, 600, 3), np.uint8)
    for name in ("a.tif", "a.ome.zarr"):
        assert killed(lambda name=name: save_image(tmp_path / name, image, {}, 0.5), at=1)
        assert len(everything(tmp_path)) == 1
        with owned(tmp_path / name, beside=True):
            assert names_in(tmp_path) == []
        assert everything(tmp_path) == []


def test_what_is_owned_is_refused_and_freed(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with owned(out):
        with pytest.raises(Held, match=f"out is being written by process {os.getpid()} on .*choose another --out"):
            owned(out).__enter__()
        write_text(out / "a", "text")
        assert names_in(out) == ["a"]
        assert sha256(out) == (digest := sha256(out))
    assert everything(out) == ["a"]
    assert sha256(out) == digest
    with owned(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_the_next_owner_clears_what_the_dead_left(tmp_path: Path):
    def begin() -> None:
        with owned(tmp_path):
            (tmp_path / "sheets").mkdir()
            half(tmp_path / "sheets" / "a")

    assert killed(begin)
    assert everything(tmp_path) == [".lock", "sheets"]
    assert everything(tmp_path / "sheets") != []
    with owned(tmp_path):
        assert everything(tmp_path / "sheets") == []
    assert everything(tmp_path) == ["sheets"]


def test_the_owner_of_a_file_clears_all_that_is_dead_around_it(tmp_path: Path):
    assert killed(lambda: half(tmp_path / "a"))
    with owned(tmp_path / "b", beside=True):
        write_text(tmp_path / "b", "text")
    assert everything(tmp_path) == ["b"]


def test_locks_of_other_machines_are_respected_and_those_of_this_one_taken_over(tmp_path: Path):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "boot": "long ago"}))
    with pytest.raises(Held, match=r"process 1 on elsewhere; if that process is dead, delete .*\.lock"):
        owned(tmp_path).__enter__()
    for text in ("", "{", "[]"):
        (tmp_path / ".lock").write_text(text)
        with owned(tmp_path):
            pass
        assert everything(tmp_path) == []


def test_children_of_the_killed_hold_no_lock(tmp_path: Path):
    def begin() -> None:
        with owned(tmp_path):
            if os.fork() == 0:
                (tmp_path / "child").write_text(str(os.getpid()))
                time.sleep(60)
                os._exit(0)
            while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
                time.sleep(0.01)
            kill()

    assert killed(begin)
    child = int((tmp_path / "child").read_text())
    try:
        with owned(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_links_in_a_folder_of_others_lose_nothing_elsewhere(tmp_path: Path):
    """A folder that came from others may hold locks and scratch that are links to files and folders of the user."""
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.mkdir()
    write_text(precious / "a", "text")
    out.mkdir()
    (out / ".lock").symlink_to(precious / "a")
    with pytest.raises(UserError, match="cannot write into"):
        owned(out).__enter__()
    assert clear_dead(out) == []
    (out / ".lock").unlink()
    scratch = hidden(out / "b", SCRATCH)
    scratch.with_name(f"{scratch.name}-0").symlink_to(precious)
    inner = scratch.with_name(f"{scratch.name}-1")
    inner.mkdir()
    (inner / ".aside").symlink_to(precious)
    with owned(out):
        write_text(out / "b", "more")
    assert {path.name: path.read_text() for path in precious.iterdir()} == {"a": "text"}
    assert (out / "b").read_text() == "more"
    assert not inner.exists()


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write into .*file: Not a directory\. Choose another --out"):
        owned(tmp_path / "file").__enter__()
    with pytest.raises(UserError, match=r"cannot write .*there is no folder|Not a directory"):
        write_text(tmp_path / "file" / "a", "text")
    with pytest.raises(UserError, match=r"has a name of its own, which '\.' is not"):
        write_text(".", "text")


# the words without which a command does not begin; what they name need not be there
NEEDED = {
    "sample": ["--model", "m"],
    "large-image": ["--model", "m", "--features", "f"],
    "field": ["--model", "m", "--size", "4,4"],
    "translate": ["--model", "m", "--images", "i"],
    "sequence": ["--model", "m", "--vary", "score=0:1:5"],
    "evaluate": ["--generated", "g", "--real", "r"],
    "train-scorer": ["--data", str(ROOT / "data" / "samples" / "cells"), "--positive", "Atypical"],
    "score": ["--scorer", "s", "--images", "i"],
    "filter": ["--scorer", "s", "--images", "i", "--above", "0.5"],
    "rate": ["--images", "i"],
    "resample": ["--model", "m", "--scorer", "s", "--above", "0.5"],
    "utility": ["--real", "r", "--synthetic", "s"],
    "export": ["run"],
    "convert": ["model.ckpt"],
}
ENDINGS = {"large-image": ".png", "field": ".npy", "score": ".csv"}
AGREED = {"slide"}  # owns its place when its processes have agreed on what they make: tests/test_slide_engine.py
COMMANDS = typer.main.get_command(app).commands.items()
WRITING = [name for name, command in COMMANDS if "out" in {p.name for p in command.params} and name not in AGREED]


@pytest.mark.parametrize("name", WRITING)
def test_a_second_run_of_a_command_is_refused(tmp_path: Path, name: str):
    out = tmp_path / f"out{ENDINGS.get(name, '')}"
    with owned(out, beside=name in ("large-image", "field", "score", "export", "convert")):
        with pytest.raises(Held, match="choose another --out"):
            call(typer.main.get_command(app), "histoldm", [name, *NEEDED[name], "--out", str(out)])
