"""What may be allocated for what others made: no more than its file can hold, and than this machine has."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from ldm.errors import UserError

SMALL = 1 << 26  # bytes that are allocated without a question
COMPRESSED = 10_000  # times that a file's bytes may become more when they are decoded
DEFLATE = 1032  # times that Deflate reaches
_CGROUPS = (  # of version 2 and 1: mount, files of the limit and of what is used
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def afford(size: float, what: str) -> None:
    """UserError unless this machine has the memory for so many bytes. what: begins the message.

    >>> afford(2**60, "the image a.png")
    Traceback (most recent call last):
    ldm.errors.UserError: the image a.png would take 1.15 EB of memory, and this machine has ... left.
    """
    if size > SMALL and size > (left := available()):
        raise UserError(f"{what} would take {in_words(size)} of memory, and this machine has {in_words(left)} left.")


def plausible(size: float, held: float, what: str, times: float = 1) -> None:
    """UserError where something says that it has far more bytes than its file can hold.

    Args:
        size: bytes that it would take. held: bytes that its file has for it.
        times: how many of them a byte of the file may become, see COMPRESSED.

    >>> plausible(2**34, 1500, "the features of a.pt")
    Traceback (most recent call last):
    ldm.errors.UserError: the features of a.pt would take 17.2 GB, and the file has 1.5 kB for it: it is damaged, ...
    """
    if size > max(SMALL, held * times):
        raise UserError(
            f"{what} would take {in_words(size)}, and the file has {in_words(held)} for it: it is damaged, or made to "
            "exhaust the machine."
        )


def in_words(size: float) -> str:
    """So many bytes, in words.

    >>> in_words(12), in_words(1500), in_words(2**60), in_words(1e300)
    ('12 bytes', '1.5 kB', '1.15 EB', '1e+282 EB')
    """
    size = float(size)
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} EB"


def available() -> int:
    """Bytes of memory that this process may still take: what the machine has free, its limits and its container's.

    >>> 0 < available() < 2**60
    True
    """
    return max(0, min(_bounds()))


def _bounds() -> Iterator[int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):  # not Linux: all that is built in
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - _number(Path("/proc/self/statm")) * os.sysconf("SC_PAGE_SIZE")
    for mount, most, used in _CGROUPS:
        for folder in _cgroups(Path(mount), "memory" if mount.endswith("memory") else ""):
            if (bound := _number(folder / most)) > 0:
                yield bound - _number(folder / used) + _cache(folder / "memory.stat")


def _cgroups(mount: Path, controller: str) -> Iterator[Path]:
    """The group of this process and those around it; within a container the mount is its own."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    place = next((path for _, names, path in lines if controller in names.split(",")), None)
    if place is not None:
        inner = mount / place.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount))


def _number(path: Path) -> int:
    """The first number in a file; 0 where there is none, as of "max"."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _cache(path: Path) -> int:
    """Bytes of files that a group holds in memory and gives back when they are needed."""
    try:
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("inactive_file "))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
