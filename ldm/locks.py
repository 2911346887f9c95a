"""Locks that the kernel drops with their process: what a killed process held is told from what a living one holds."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from ldm.errors import UserError


class Held(UserError):
    """A lock that somebody else holds."""


class NoLocks(UserError):
    """A file system that has no locks."""


class Lock:
    """A lock file that names its holder. Held, a UserError, when another live process holds it.

    The lock of a killed process is simply taken over; but not that of another machine, because from here nobody can see
    whether that process lives.

    Args:
        path: the file. of: what is written, by default the folder of the file.
        otherwise: what a user can do if it is held, but to wait.
        strict: respect what another machine left.
        wait: seconds to wait for another process, before it is Held.

    >>> with Lock(Path(".lock")):
    ...     Lock(Path(".lock"), of="tiles").acquire()
    Traceback (most recent call last):
    ldm.locks.Held: tiles is being written by process ... on ...; wait for it or stop it.
    """

    handles: set[int] = set()  # noqa: RUF012, of all locks that this process holds

    def __init__(
        self,
        path: Path | str,
        of: Path | str | None = None,
        otherwise: str = "stop it",
        strict: bool = True,
        wait: float = 0.0,
    ) -> None:
        self.path, self.otherwise, self.strict, self.wait = Path(path), otherwise, strict, wait
        self.of = self.path.parent if of is None else of
        self._handle, self._pid = -1, 0

    def acquire(self) -> Self:
        until = time.monotonic() + self.wait
        while True:
            try:
                return self._acquire()
            except Held:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.1)

    def _acquire(self) -> Self:
        while self._handle < 0:
            with ExitStack() as undo:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                undo.callback(os.close, handle)
                if self._takes(handle):
                    undo.callback(self.path.unlink, missing_ok=True)
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, json.dumps({"pid": os.getpid(), **_machine()}).encode(), 0)
                    undo.pop_all()
                    self._handle, self._pid = handle, os.getpid()
                    self.handles.add(handle)
        return self

    def _takes(self, handle: int) -> bool:
        """Whether the lock is ours now; False if its file was released and removed while we came to it."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Held(f"{self._words(_holder(handle))}; wait for it or {self.otherwise}.") from None
            raise NoLocks(f"{self.of} is on a file system without locks ({error.strerror}).") from None
        try:
            if os.stat(self.path).st_ino != os.fstat(handle).st_ino:
                return False
        except FileNotFoundError:
            return False
        holder = _holder(handle)
        if self.strict and holder and not any(holder.get(name) == value for name, value in _machine().items()):
            raise Held(f"{self._words(holder)}; if that process is dead, delete {self.path}.")
        return True

    def _words(self, holder: dict[str, Any]) -> str:
        return f"{self.of} is being written by process {holder.get('pid', '?')} on {holder.get('host', '?')}"

    def release(self) -> None:
        if self._handle >= 0 and self._pid == os.getpid():
            self.path.unlink(missing_ok=True)
            self.handles.discard(self._handle)
            os.close(self._handle)
        self._handle = -1

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()


def clear_dead(folder: Path, strict: bool = True) -> list[Path]:
    """Remove the locks of dead processes in a folder and those within it; which they were. strict: see `Lock`.

    >>> Path(".lock-tiles").touch()
    >>> clear_dead(Path("."))
    [PosixPath('.lock-tiles')]
    """
    dead = []
    for path in sorted(folder.rglob(".lock*")):
        with suppress(Held, OSError), Lock(path, strict=strict):
            dead.append(path)
    return dead


def _close_copies() -> None:
    """In a forked child: close what it has of its parent's locks, so that it keeps none of them when that is killed."""
    for handle in Lock.handles:
        os.close(handle)
    Lock.handles.clear()


os.register_at_fork(after_in_child=_close_copies)


@functools.cache
def _machine() -> dict[str, str]:
    """What tells this machine from others. Containers on one have its kernel's boot in common."""
    known = {"host": socket.gethostname()}
    with suppress(OSError):
        known["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return known


def _holder(handle: int) -> dict[str, Any]:
    try:
        told = json.loads(os.pread(handle, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
