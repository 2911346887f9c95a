"""Files that are whole or not there, and the choice of a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from data_prep.encode_latents import encode_latents
from data_prep.extract_features import extract
from ldm.devices import pick_device
from ldm.errors import UNREAD, UserError, run_command
from ldm.files import sha256, whole, writable_folder, write_text


def save_half(path: Path) -> None:
    path.write_text("ha")
    raise RuntimeError("disk full")


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path: Path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="disk full"), whole(tmp_path / "a") as part:
        save_half(part)
    assert (tmp_path / "a").read_text() == "old"
    with whole(tmp_path / "a") as part:
        part.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_digest_tells_names_and_contents_apart(tmp_path: Path):
    def folder(name: str, **files: str) -> Path:
        for file, text in files.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return tmp_path / name

    first = sha256(folder("x", a="1", b="2"))
    assert sha256(folder("x", a="1", b="2")) == first
    assert sha256(folder("x", a="1", b="3")) != first
    assert sha256(tmp_path / "x" / "a") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    assert sha256(tmp_path / "x", tmp_path / "absent") != sha256(tmp_path / "x")


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into"):
        writable_folder(tmp_path / "file" / "out")


@pytest.mark.parametrize("command", [extract, encode_latents])
def test_commands_refuse_unknown_devices(command):
    with pytest.raises(UserError, match="device 'foo'"):
        command([], "encoder", device="foo")


def test_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device() == pick_device("cpu") == "cpu"
    for name in ("cuda", "cuda:7", "foo"):
        with pytest.raises(UserError, match=f"this machine has no device '{name}'; choose auto, cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (pick_device("auto"), pick_device("cuda"), pick_device("cuda:1")) == ("cuda:0", "cuda:0", "cuda:1")


def save_with_torch(path):
    torch.save({"weights": torch.zeros(100_000)}, path)


def write_words(path):
    with open(path, "w") as file:
        file.write("x" * 100_000)


def write_and_give_up(path):
    try:
        write_words(path)
    except OSError as error:
        raise RuntimeError("the store could not be written") from error


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no device that is always full")
@pytest.mark.parametrize("write", [save_with_torch, write_words, write_and_give_up])
def test_a_full_disk_is_one_line(write, capsys):
    assert run_command(lambda: write("/dev/full")) == 2
    told = capsys.readouterr().err
    assert "the disk is full" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("body", ["print('word')", "print('word ' * 100_000)", "sys.exit(print('help'))"])
@pytest.mark.parametrize("options", [[], ["-u"]])
def test_output_that_nobody_reads_ends_a_command_quietly(body, options):
    code = f"import sys; from ldm.errors import run_command; sys.exit(run_command(lambda: {body}))"
    out, gone = os.pipe()
    os.close(out)
    done = subprocess.run([sys.executable, *options, "-c", code], stdout=gone, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(gone)
    assert (done.returncode, done.stderr) == (UNREAD, b"")


def test_another_broken_pipe_is_raised():
    def command():
        raise BrokenPipeError("a worker has gone")

    with pytest.raises(BrokenPipeError, match="worker"):
        run_command(command)


def test_other_errors_are_no_full_disk():
    with pytest.raises(FileNotFoundError):
        run_command(lambda: open("no/such/file"))
