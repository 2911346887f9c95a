"""Files that are whole or not there, and what tells two of them apart."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ldm.errors import UserError

CARD = "README.md"  # in the folder of a model: what it is, its figures, what it must not be used for


@contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to. It takes its name when the block ends well, else it goes."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    remove(part)
    try:
        yield part
        if path.is_dir():
            remove(path)
        os.replace(part, path)
    finally:
        remove(part)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def writable_folder(path: Path) -> None:
    """Make a folder where there is none; UserError if files cannot be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".histoldm-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}. Give an --out that can be written.") from error


def sha256(*paths: Path | str) -> str:
    """SHA-256 of a file; of several, or of folders, that of all their names and contents."""
    if len(paths) == 1 and Path(paths[0]).is_file():
        with Path(paths[0]).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            digest.update(f"{file.as_posix()} {sha256(file) if file.is_file() else 'missing'}\n".encode())
    return digest.hexdigest()


def tool_version() -> str:
    """The version of this toolkit, as what it writes says it."""
    try:
        return version("histoldm")
    except PackageNotFoundError:
        return "unknown"
