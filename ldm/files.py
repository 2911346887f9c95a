"""Writing files so that they are complete or not there, and checksums that tell them apart."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ldm.errors import UserError

CARD = "README.md"  # the model card in a model folder: what it is, its figures, what it must not be used for


@contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """A context that gives a path beside `path` to write a file or folder to.

    If the block succeeds, the new file is renamed to `path` and replaces what was there; if it fails, it is removed.

    >>> with whole("a.txt") as part:
    ...     _ = part.write_text("done")
    >>> Path("a.txt").read_text()
    'done'
    """
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
    """Write a text file in UTF-8. The file is complete or not there.

    >>> write_text("a.txt", "one line")
    >>> Path("a.txt").read_text()
    'one line'
    """
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it exists. Of a symbolic link only the link is removed.

    >>> remove(Path("a.txt"))
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def writable_folder(path: Path) -> None:
    """Create a folder if it does not exist; raise UserError if files cannot be written into it.

    >>> Path("taken").touch()
    >>> writable_folder(Path("taken"))
    Traceback (most recent call last):
    ldm.errors.UserError: cannot write into taken: File exists. Choose another --out.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".histoldm-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}. Choose another --out.") from error


def sha256(*paths: Path | str) -> str:
    """SHA-256 in hexadecimal: of a file's content; for a folder or several paths, of all file names and contents.

    >>> write_text("a.txt", "abc")
    >>> sha256("a.txt")[:8]
    'ba7816bf'
    """
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
    """The version of this toolkit, as recorded in the files that it writes; "unknown" if it is not installed.

    >>> f"histoldm {tool_version()}"
    'histoldm ...'
    """
    try:
        return version("histoldm")
    except PackageNotFoundError:
        return "unknown"
