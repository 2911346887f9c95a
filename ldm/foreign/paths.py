"""Where files may lie that others name: within the folder that they came in, whatever it names or links to."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ldm.errors import UserError

_WITHIN: ContextVar[tuple[Path, ...]] = ContextVar("within", default=())
_FILES_IN: ContextVar[tuple[Path, ...]] = ContextVar("files_in", default=())
OWN = ("config.yaml", "model.safetensors")  # what a model folder's further files are not called


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path, its links followed, lies in a folder.

    The files in a snapshot of a Hugging Face cache are links to its blobs, which count as in it.

    >>> lies_in(Path("model/genes.txt"), Path("model")), lies_in(Path("model/../genes.txt"), Path("model"))
    (True, False)
    """
    path, folder = path.resolve(), folder.resolve()
    if path.is_relative_to(folder):
        return True
    snapshots = next((parent.parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"), None)
    return snapshots is not None and path.parent == snapshots.parent / "blobs"


@contextmanager
def only_within(folder: Path | str, *more: Path | str) -> Iterator[None]:
    """A context in which `allowed` takes no path outside of a folder that others filled, its links followed.

    It is set while such a folder is read, and while a model is built of its config, so that files which its parameters
    name are its own. One within another only narrows it: a model folder names no other model folder.

    Args:
        more: what is open too: files that the user or this toolkit put there.

    >>> with only_within("model"):
    ...     allowed("/proc/self/environ")
    Traceback (most recent call last):
    ldm.errors.UserError: /proc/self/environ lies outside of the folder model, which names it or links to it: what ...
    """
    allowed(folder)
    token = _WITHIN.set((Path(folder), *map(Path, more)))
    try:
        yield
    finally:
        _WITHIN.reset(token)


def allowed(path: Path | str) -> Path:
    """The path of a file or folder that is to be opened, which may not be there.

    UserError: within `only_within`, one that lies outside; a pipe or a device, which may never end.

    >>> allowed("genes.txt")
    PosixPath('genes.txt')
    >>> os.mkfifo("a.npy")
    >>> allowed("a.npy")
    Traceback (most recent call last):
    ldm.errors.UserError: a.npy is a pipe, a socket or a device, and no file; write what it gives to one.
    """
    path, folders = Path(path), _WITHIN.get()
    if folders and not any(lies_in(path, folder) for folder in folders):
        raise UserError(
            f"{path} lies outside of the folder {folders[0]}, which names it or links to it: what others made is read "
            "from its own folder alone. If you trust it, copy the file into that folder."
        )
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # not there, or no name of a file
        return path
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is a pipe, a socket or a device, and no file; write what it gives to one.")
    return path


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a folder that others filled. UserError: it lies outside, by its name or by a link.

    >>> inside(Path("model"), "../other/weights.pt")
    Traceback (most recent call last):
    ldm.errors.UserError: model/../other/weights.pt lies outside of the folder model, which names it or links to ...
    """
    with only_within(folder):
        return allowed(folder / name)


def write_files(files: Mapping[str, str], folder: Path, source: object) -> None:
    """Write the texts of a checkpoint's further files, by name, into a folder. source: the checkpoint, for messages.

    >>> write_files({"../genes.txt": "TP53"}, Path("model"), "a.ckpt")
    Traceback (most recent call last):
    ldm.errors.UserError: a.ckpt holds a file called '../genes.txt', which is no plain name of one; it is not written.
    """
    for name, text in files.items():
        plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not plain or name in ("", "..", *OWN):
            raise UserError(f"{source} holds a file called {name!r}, which is no plain name of one; it is not written.")
        if not isinstance(text, str):
            raise UserError(f"{source} holds {name}, which is {type(text).__name__} and no text; it is not written.")
        (folder / name).write_text(text, encoding="utf-8")


# --- tables that name files -----------------------------------------------------------------------------------------


@contextmanager
def files_in(folders: Iterable[Path | str]) -> Iterator[None]:
    """A context in which tables may name files of these folders too: what the option --files-in says.

    >>> with files_in(["/data/slides"]):
    ...     named_in(Path("slides.csv"), ["/data/slides/a.svs"])
    [PosixPath('/data/slides/a.svs')]
    """
    token = _FILES_IN.set((*_FILES_IN.get(), *map(Path, folders)))
    try:
        yield
    finally:
        _FILES_IN.reset(token)


def named_in(table: Path, names: Iterable[Any], folder: Path | None = None) -> list[Path]:
    """The files that a table names, which may have come from anybody: those of its own folder.

    Args:
        folder: where relative paths begin, and where the files may lie; None: the table's.
    Raises:
        UserError: a file that lies outside of it, by an absolute path, by `..` or by a link, and in no folder that
            --files-in names.

    >>> named_in(Path("cohort/captions.csv"), ["a.png", "../private/b.png"])
    Traceback (most recent call last):
    ldm.errors.UserError: cohort/captions.csv names 1 file outside of the folder cohort, as ../private/b.png. If you ...
    """
    names, folder = [str(name) for name in names], table.parent if folder is None else folder
    paths = [folder / name for name in names]
    if out := stray(paths, folder):
        count, where = len(out), sorted({str(paths[place].resolve().parent) for place in out})
        where = where if len(where) < 4 else [os.path.commonpath(where)]
        raise UserError(
            f"{table} names {count} file{'s' * (count > 1)} outside of the folder {folder}, as {names[out[0]]}. If you "
            f"mean to read them, say where they lie: {' '.join(f'--files-in {each}' for each in where)}"
        )
    return paths


def stray(paths: Sequence[Path], folder: Path) -> list[int]:
    """The places of those paths that lie outside of `folder` and of what --files-in names, their links followed.

    >>> stray([Path("cohort/a.png"), Path("/a.png")], Path("cohort"))
    [1]
    """
    roots = tuple(os.path.join(os.path.realpath(root), "") for root in (folder, *_FILES_IN.get()))
    parents: dict[Path, str] = {}
    out = []
    for place, path in enumerate(paths):
        parent = parents.get(path.parent) or parents.setdefault(path.parent, os.path.realpath(path.parent))
        real = os.path.join(parent, path.name)
        if path.name == ".." or os.path.islink(real):
            real = os.path.realpath(path)
        if not real.startswith(roots):
            out.append(place)
    return out
