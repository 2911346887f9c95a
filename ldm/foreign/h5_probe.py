"""Finds out, in a process of its own, whether HDF5 can read a file: on a damaged one its library may loop or crash.

`python -m ldm.foreign.h5_probe` reads names of files from its input, a JSON text a line, and answers each with "" or
with what is wrong. It walks through all that names, attributes and texts need; values lie in blocks, which cannot loop.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import h5py

SECONDS, PER_SECOND = 5, 1 << 24  # of the processor that a file may take: so many, and one more for so many bytes
MEMORY = 1 << 33  # bytes that the process may take
MOST = 100_000  # arrays and groups that are looked at
ROWS = 64  # texts that are read at once
COMPRESSED = 100  # texts that a byte of an array may stand for; one of more is refused without reading it


def why_unreadable(path: Path) -> str:
    """Why HDF5 cannot read a file, or "".

    >>> _ = Path("a.h5").write_bytes(b"not HDF5")
    >>> why_unreadable(Path("a.h5"))
    'Unable to synchronously open file (file signature not found)'
    """
    told = path.stat()
    return _asked(str(path.resolve()), told.st_size, told.st_mtime_ns)


@lru_cache(maxsize=1024)
def _asked(path: str, size: int, changed: int) -> str:
    global _prober
    if _prober is None or _prober.process.poll() is not None or _prober.owner != os.getpid():
        _prober = _Prober()
    return _prober.ask(path)


class _Prober:
    """The process, started at the first file."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True,  # Ctrl-C is not for it
        )  # fmt: skip
        atexit.register(self.end)

    def ask(self, path: str) -> str:
        try:
            print(json.dumps(path), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        self.process.wait()
        return "HDF5's library comes to no end with it, or crashes: it is damaged"

    def end(self) -> None:
        if self.owner == os.getpid():
            for pipe in (self.process.stdin, self.process.stdout):
                pipe.close()
            self.process.wait()


_prober: _Prober | None = None


def _walk(path: str) -> None:
    """Read all of a file but the values of arrays. What lies in other files is left alone."""
    with h5py.File(path, "r") as file:
        seen, left = set(), [file]
        while left:
            group = left.pop()
            _ = dict(group.attrs)
            for name in group:
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    continue
                node = group[name]
                place = h5py.h5o.get_info(node.id).addr
                if place in seen or len(seen) > MOST:
                    continue
                seen.add(place)
                if isinstance(node, h5py.Group):
                    left.append(node)
                elif isinstance(node, h5py.Dataset):
                    _ = dict(node.attrs)
                    _walk_array(node)


def _walk_array(node: h5py.Dataset) -> None:
    layout = node.id.get_create_plist()
    if layout.get_layout() == h5py.h5d.VIRTUAL or layout.get_external_count() or not node.shape:
        return
    if layout.get_layout() == h5py.h5d.CHUNKED:
        node.id.chunk_iter(lambda info: None)
    if node.dtype.kind == "O" and node.ndim == 1 and len(node) <= node.id.get_storage_size() * COMPRESSED:
        for first in range(0, len(node), ROWS):
            _ = node[first : first + ROWS]


def _main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        path = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = used.ru_utime + used.ru_stime + SECONDS + os.path.getsize(path) // PER_SECOND
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, resource.RLIM_INFINITY))
        try:
            _walk(path)
            answer = ""
        except Exception as error:  # h5py raises errors of many kinds for what it cannot read
            answer = str(error).partition("\n")[0] or type(error).__name__
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
