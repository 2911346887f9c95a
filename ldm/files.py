"""Writing files so that they are complete or not there, by one writer at a time, and checksums that tell them apart.

`whole` writes a file or folder in a folder of scratch beside its place, `.part-<hash of its name>-<number>`, and
renames it when it is whole. `owned` keeps a second run out of what a command writes. Both hold a lock that ends with
its process (`ldm.locks`): the next run tells what a killed one left from what a living one writes, and clears it away.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from ldm.errors import UserError, note
from ldm.locks import Held, Lock, NoLocks

CARD = "README.md"  # the model card in a model folder: what it is, its figures, what it must not be used for
LOCK, SCRATCH = ".lock", ".part"  # how the names of locks, and of folders of scratch, begin
_ASIDE = ".aside"  # in scratch: what a new folder is about to replace
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)  # a folder is there, or is to come there
_WRITERS = 100  # of one file at once, at most

Function = TypeVar("Function", bound=Callable[..., Any])


def hidden(path: Path, kind: str) -> Path:
    """A path beside `path` for what is known of it while it is made: hidden, and short whatever its name.

    >>> hidden(Path("tiles/scores.csv"), ".rows")
    PosixPath('tiles/.rows-a8edeb79')
    """
    return path.with_name(f"{kind}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}")


@contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """A context that gives a path of the same name, in a folder of scratch, to write a file or folder to.

    If the block succeeds, what it wrote is renamed to `path` and replaces what was there; if it fails, nothing of it
    stays. The block may use the folder of scratch, the parent of the path that it gets, for files of its own. Of two
    writers at once each writes its own, and the last one's stays. Where a kill came while a folder was replaced, the
    old one is put back first.

    >>> with whole("a.txt") as part:
    ...     _ = part.write_text("done")
    >>> Path("a.txt").read_text()
    'done'
    """
    path = _named(path)
    scratch, lock = _scratch_of(path)
    try:
        yield (part := scratch / path.name)
        _replace(path, part, scratch / _ASIDE / path.name)
    finally:
        _clear(scratch)
        lock.release()
        remove_empty(scratch)  # unless the next writer has it already


def _named(path: Path | str) -> Path:
    path = Path(path)
    if path.name in ("", ".."):
        raise UserError(f"what is written whole has a name of its own, which '{path}' is not; give one.")
    return path


def _scratch_of(path: Path) -> tuple[Path, Lock]:
    """An empty folder of scratch for `path`, and the lock by which it is ours. Cleared of what dead writers left."""
    for number in range(_WRITERS):
        scratch = _numbered(path, number)
        lock = Lock(scratch / LOCK)
        if scratch.is_symlink():  # of somebody who would have another folder cleared
            continue
        try:
            scratch.mkdir(exist_ok=True)
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            lock.acquire()
        except (Held, FileNotFoundError, PermissionError):  # of another writer, cleared away just now, another user's
            continue
        except NoLocks:  # then nobody can tell who lives
            return Path(tempfile.mkdtemp(prefix=f"{scratch.name}-", dir=path.parent)), lock
        _clear(scratch)
        while (more := _numbered(path, number := number + 1)).exists():  # of one who wrote while another did
            _clear_dead(more)
        return scratch, lock
    raise UserError(f"{path} is being written by {_WRITERS} others at once; delete {_numbered(path, 0)} and its like.")


def _numbered(path: Path, number: int) -> Path:
    own = hidden(path, SCRATCH)
    return own.with_name(f"{own.name}-{number}")


def _replace(path: Path, part: Path, aside: Path) -> None:
    """Rename `part` to `path`. A folder that is there is moved to `aside` first, since no folder can be replaced."""
    while True:
        try:
            return os.replace(part, path)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        remove(aside)
        aside.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another writer moved it
            os.replace(path, aside)


def _clear(scratch: Path) -> None:
    """Empty a folder of scratch that is ours; what was set aside in it is put back if nothing has taken its place."""
    set_aside = scratch / _ASIDE
    for aside in () if set_aside.is_symlink() else set_aside.glob("*"):
        if not os.path.lexists(place := scratch.parent / aside.name):
            os.replace(aside, place)
    for own in scratch.iterdir():
        if own.name != LOCK:
            remove(own)


def _clear_dead(scratch: Path, strict: bool = True) -> None:
    """Remove a folder of scratch unless its writer lives."""
    if scratch.is_symlink():
        return
    with suppress(OSError, Held, NoLocks):
        with Lock(scratch / LOCK, strict=strict):
            _clear(scratch)
        scratch.rmdir()


def clear_left(path: Path) -> None:
    """Clear away what dead writers of a file left beside it, where it is there and not written again.

    >>> Path(".part-a8edeb79-0").mkdir()
    >>> clear_left(Path("scores.csv"))
    >>> Path(".part-a8edeb79-0").exists()
    False
    """
    for scratch in path.parent.glob(f"{hidden(path, SCRATCH).name}-*"):
        _clear_dead(scratch)


@contextmanager
def owned(
    path: Path | str, beside: bool = False, otherwise: str = "choose another --out", of: Path | None = None
) -> Iterator[None]:
    """A context in which no other run writes into the folder `path`.

    It is made, with its parents, if need be, and removed again if nothing came into it. Scratch that dead writers left
    there is cleared away.

    beside: `path` is a file, or a folder that is written whole, and what is locked is its place in the folder above.
    otherwise: what a user can do where another run writes, but to wait. of: what messages say is written, by default
    `path`.

    UserError: another run is writing there, or nothing can be written there.

    >>> with owned("tiles"), owned("tiles"):
    ...     pass
    Traceback (most recent call last):
    ldm.locks.Held: tiles is being written by process ... on ...; wait for it or choose another --out.
    """
    path = _named(path) if beside else Path(path)
    folder = path.parent if beside else path
    lock = Lock(hidden(path, LOCK) if beside else path / LOCK, of or path, otherwise)
    with ExitStack() as stack:
        try:
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                stack.callback(remove_empty, folder)
            stack.enter_context(lock)
        except NoLocks as error:
            note(f"{error} Let no other run write there before this one ends.")
        except OSError as error:
            raise _cannot_write(folder, error, "into ", " Choose another --out.") from error
        own = hidden(path, SCRATCH).name if beside else SCRATCH
        for scratch in folder.glob(f"{SCRATCH}-*") if beside else _all_scratch(folder):
            _clear_dead(scratch, strict=not scratch.name.startswith(own))  # what is owned is no other machine's either
        yield


def remove_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it.

    >>> remove_empty(Path("nowhere"))
    """
    with suppress(OSError):  # something is in it
        folder.rmdir()


def _all_scratch(folder: Path) -> Iterator[Path]:
    """Folders of scratch in a folder and those within it, but for hidden ones and arrays."""
    for root, names, _ in os.walk(folder):
        yield from (Path(root, name) for name in names if name.startswith(SCRATCH))
        names[:] = [name for name in names if not name.startswith(".") and not name.endswith(".zarr")]


def owns(name: str = "out", beside: bool = False) -> Callable[[Function], Function]:
    """Decorator: while the function runs, its argument `name`, a path or several, is `owned`.

    >>> @owns()
    ... def draw(out: Path) -> None:
    ...     print(names_in(out), [path.name for path in out.iterdir()])
    >>> draw(Path("tiles"))
    [] ['.lock']
    """

    def give(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments[name]
            paths = [given] if isinstance(given, (str, Path)) else given
            with ExitStack() as stack:
                for path in dict.fromkeys(map(Path, paths)):
                    stack.enter_context(owned(path, beside))
                return function(*args, **kwargs)

        return run

    return give


def _cannot_write(path: Path, error: OSError, into: str = "", do: str = "") -> Exception:
    """What to raise: a full disk is told as one, see `ldm.errors.run_command`."""
    return error if error.errno in _FULL else UserError(f"cannot write {into}{path}: {error.strerror}.{do}")


def names_in(folder: Path) -> list[str]:
    """Names of what a folder holds, sorted, but for the locks and scratch of writers.

    >>> write_text("a.txt", "one line")
    >>> Path(".lock").touch()
    >>> names_in(Path("."))
    ['a.txt']
    """
    return sorted(path.name for path in folder.iterdir() if not _of_writers(path.name))


def _of_writers(name: str) -> bool:
    return name.startswith((LOCK, SCRATCH))


def write_text(path: Path | str, text: str) -> None:
    """Write a text file in UTF-8. The file is complete or not there.

    >>> write_text("a.txt", "one line")
    >>> Path("a.txt").read_text()
    'one line'
    """
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def reserve(path: Path) -> None:
    """Give a file that has its size the room for it, before it is written through memory.

    On a full disk this is an OSError; without it the write itself would end the process.

    >>> _ = np.memmap("a", np.uint8, "w+", shape=(8192,))
    >>> reserve(Path("a"))
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def awaited(path: Path, seconds: float) -> Path:
    """A file that another machine has written, of which a network's file system may not know yet.

    It is looked for again until it is there, or so many seconds have passed.

    >>> awaited(Path("a.txt"), seconds=0).name
    'a.txt'
    """
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        with suppress(OSError):
            os.listdir(path.parent)  # so that it asks its server
        time.sleep(0.2)
    return path


def room(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, or of the nearest one above it that is there.

    >>> room(Path("nowhere")) > 0
    True
    """
    folder = folder.absolute()
    return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.is_dir())).free


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
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise _cannot_write(path, error, "into ", " Choose another --out.") from error


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
        inside = path.rglob("*") if path.is_dir() else [path]
        files = sorted(p for p in inside if p == path or (p.is_file() and not _of_writers(p.name)))
        for file in files:
            digest.update(f"{file.as_posix()} {sha256(file) if file.is_file() else 'missing'}\n".encode())
    return digest.hexdigest()


@functools.cache
def tool_version() -> str:
    """The version of this toolkit, as recorded in the files that it writes; "unknown" if it is not installed.

    >>> f"histoldm {tool_version()}"
    'histoldm ...'
    """
    try:
        return version("histoldm")
    except PackageNotFoundError:
        return "unknown"
