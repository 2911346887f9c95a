"""Names and places that the system refuses: a result, or one line that says what to do; nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm.cli
from benchmarks.kills import can_mount
from data_prep import prepare, tile_slides
from ldm.errors import UserError, note, run_command

CAFE = os.fsdecode(b"caf\xe9")  # Latin-1, which some archives hold


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images of slides; the test runs in the folder above."""
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.fromarray(np.random.default_rng(0).integers(0, 200, (64, 64, 3), np.uint8)).save(
            tmp_path / "images" / f"{name}.png"
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "images"


def told(
    words: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, fine: bool = False
) -> str:
    """What `histoldm` says on stderr: one line, and exit code 2. fine: or it succeeds."""
    monkeypatch.setattr(sys, "argv", ["histoldm", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        ldm.cli.main()
    said = capsys.readouterr().err
    if fine and stop.value.code == 0:
        return ""
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("length", [240, 248, 255, 256, 260])
@pytest.mark.parametrize("end", ["", "/ratings", ".csv"])
def test_names_of_any_length(images: Path, length: int, end: str, monkeypatch, capsys):
    out = "n" * (length - 4 * (end == ".csv")) + end
    said = told(["rate", "--images", "images", "--count", "2", "--out", out], monkeypatch, capsys, fine=True)
    assert ("File name too long" in said) == (length > 255)
    assert [path.name for path in images.parent.iterdir()] == ["images"] if said else Path(out, "ratings.csv").exists()


def test_a_name_that_is_too_long_within_a_name_that_fits(images: Path, monkeypatch, capsys):
    """That of a store adds .zarr to that of its slide."""
    (images / "a.png").rename(images / f"{'n' * 251}.png")
    words = ["--slides", "images", "--slide-mpp", "0.5", "--tile-size", "32", "--out", "out"]
    assert run_command(lambda: tile_slides.main(words)) == 2
    assert "File name too long" in capsys.readouterr().err
    assert (images.parent / "out" / "slides" / "b.zarr").is_dir()


def test_a_name_that_is_not_utf8_is_told_before_anything_is_done(images: Path, monkeypatch, capsys):
    said = told(["rate", "--images", "images", "--count", "2", "--out", f"{CAFE} x/a"], monkeypatch, capsys)
    assert said.startswith(r"error: the name 'caf\udce9' is not UTF-8, in which names are recorded; rename that file")
    assert [path.name for path in images.parent.iterdir()] == ["images"]


def test_a_file_whose_name_is_not_utf8_is_told(images: Path, monkeypatch, capsys):
    (images / "a.png").rename(images / f"{CAFE}.png")
    words = ["evaluate", "--generated", "images", "--real", "images", "--features", "pixels", "--out", "out"]
    said = told(words, monkeypatch, capsys)
    assert r"caf\udce9.png' is not UTF-8" in said
    assert len(said) < 150
    words = ["--slides", "images", "--slide-mpp", "0.5", "--tile-size", "32", "--out", "out"]
    assert run_command(lambda: prepare.main(words)) == 2
    assert r"caf\udce9.png' is not UTF-8" in capsys.readouterr().err
    assert not Path("out", "slides").exists()


def test_no_name_and_no_note_commands_the_terminal(tmp_path: Path, capsys):
    """As a title of its window that is another, or text that is hidden by what follows."""

    def command() -> None:
        note("\x1b]0;other\x07")
        raise UserError("\x1b[2J\x9b1A \u202egnp.a is\n\tno image")

    assert run_command(command) == 2
    expected = "note: \\x1b]0;other\\x07\nerror: \\x1b[2J\\x9b1A \\u202egnp.a is\n\tno image\n"
    assert capsys.readouterr().err == expected


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no folder in which nobody may write")
def test_a_folder_in_which_nothing_can_be_made(images: Path, monkeypatch, capsys):
    said = told(["rate", "--images", "images", "--count", "2", "--out", "/proc/out"], monkeypatch, capsys)
    assert said == "error: cannot write into /proc/out: No such file or directory. Choose another --out.\n"
    words = ["--slides", "images", "--slide-mpp", "0.5", "--tile-size", "32", "--out", "/proc/out"]
    assert run_command(lambda: prepare.main(words)) == 2
    assert "cannot write into /proc/out" in capsys.readouterr().err


def test_links_in_a_circle_and_a_file_for_a_folder(images: Path, monkeypatch, capsys):
    Path("a").symlink_to("b")
    Path("b").symlink_to("a")
    for place in ("a", "images/a.png"):
        told(["rate", "--images", place + "/x", "--count", "2", "--out", "out"], monkeypatch, capsys)
        told(["rate", "--images", "images", "--count", "2", "--out", place + "/x"], monkeypatch, capsys)
        told(["describe", place + "/x"], monkeypatch, capsys)
        told(["view", place + "/x"], monkeypatch, capsys)
    assert not Path("out").exists()


@pytest.fixture
def read_only(images: Path) -> Iterator[Path]:
    if not can_mount():
        pytest.skip("needs the right to mount a file system")
    subprocess.run(["mount", "--bind", images, images], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", images], check=True)
        yield images
    finally:
        subprocess.run(["umount", "--lazy", images], check=True)


def test_a_read_only_folder_is_read_and_not_written(read_only: Path, monkeypatch, capsys):
    told(["rate", "--images", "images", "--count", "2", "--out", "out"], monkeypatch, capsys, fine=True)
    assert Path("out", "ratings.csv").exists()
    said = told(["rate", "--images", "images", "--count", "2", "--out", "images/out"], monkeypatch, capsys)
    assert said == "error: cannot write into images/out: Read-only file system. Choose another --out.\n"
    words = ["--slides", "images", "--slide-mpp", "0.5", "--tile-size", "32", "--out", "images/out"]
    assert run_command(lambda: prepare.main(words)) == 2
    assert "Read-only file system" in capsys.readouterr().err
