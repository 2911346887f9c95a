"""HDF5 files that others wrote: opened where they hold all that they name, and read where it can be held."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ldm.errors import UserError
from ldm.foreign.budget import COMPRESSED, afford, plausible
from ldm.foreign.h5_probe import why_unreadable
from ldm.foreign.paths import allowed

MOST = 100_000  # links that are looked at
TEXTS = 256  # that are read at once


@contextmanager
def open_h5(path: Path | str, again: str = "") -> Iterator[h5py.File]:
    """An HDF5 file, read-only, that refers to no other file: every reader opens one by this.

    again: how to get it anew, for messages.
    UserError: it is none, or damaged, also where this shows while it is open; external links, arrays whose values lie
    in other files, as external storage or as parts of a virtual array; more links than can be looked at.

    >>> with h5py.File("a.h5", "w") as file:
    ...     file["features"] = h5py.ExternalLink("/home/anybody/private.h5", "features")
    >>> with open_h5("a.h5") as file:
    ...     pass
    Traceback (most recent call last):
    ldm.errors.UserError: a.h5: 'features' is a link to another file; the values of an .h5 are read from itself alone...
    """
    path = Path(path)
    try:
        if why := why_unreadable(allowed(path)):
            raise OSError(why)
        with h5py.File(path, "r") as file:
            _check(file, path)
            yield file
    except UserError:
        raise
    except Exception as error:  # h5py raises errors of many kinds for what it cannot read
        reason = str(error).partition("\n")[0] or type(error).__name__
        anew = f"; {again}" * bool(again)
        raise UserError(f"{path} cannot be read as {path.suffix or 'HDF5'}: {reason}{anew}") from error


def _check(file: h5py.File, path: Path | str) -> None:
    seen, left, count = set(), [("", file)], 0
    while left:
        name, group = left.pop()
        for own in group:
            inner, count = f"{name}/{own}" if name else own, count + 1
            if count > MOST:
                raise UserError(f"{path} has more than {MOST} arrays and groups; it is none that is read here.")
            try:
                link = group.get(own, getlink=True)
            except TypeError:  # of a kind that h5py does not know
                raise _refused(path, inner, "is a link of an unknown kind") from None
            if isinstance(link, h5py.ExternalLink):
                raise _refused(path, inner, "is a link to another file")
            if isinstance(link, h5py.SoftLink):  # to a name in this file, all of whose links are looked at
                continue
            node = group[own]
            if isinstance(node, h5py.Dataset):
                layout = node.id.get_create_plist()
                if layout.get_layout() == h5py.h5d.VIRTUAL:
                    raise _refused(path, inner, "is put together of arrays in other files")
                if layout.get_external_count():
                    raise _refused(path, inner, "has its values in another file")
            elif isinstance(node, h5py.Group) and (place := h5py.h5o.get_info(node.id).addr) not in seen:
                seen.add(place)
                left.append((inner, node))


def _refused(path: Path | str, name: str, why: str) -> UserError:
    return UserError(
        f"{path}: '{name}' {why}; the values of an .h5 are read from itself alone. If you trust it, copy them into one "
        "file (h5repack, or h5py)."
    )


def values_of(node: h5py.Dataset, rows: slice = slice(None)) -> Any:
    """The values of an array, or rows of it. UserError: more than its file holds, or than the machine has memory for.

    >>> with h5py.File("a.h5", "w") as file:
    ...     values_of(file.create_dataset("features", (10**9, 10**6), "f4", chunks=(1, 10**6)))
    Traceback (most recent call last):
    ldm.errors.UserError: the values of /features in a.h5 would take 4 PB, and the file has 0 bytes for it: it is ...
    """
    if not node.shape:
        return node[()]
    count = len(range(*rows.indices(node.shape[0])))
    what, size = f"the values of {node.name} in {node.file.filename}", math.prod(node.shape) * node.dtype.itemsize
    plausible(size, node.id.get_storage_size(), what, COMPRESSED)
    afford(3 * size * count / max(node.shape[0], 1), what)  # twice more while they are converted
    return node[rows] if node.dtype.kind != "O" or node.ndim > 1 else _texts(node, range(*rows.indices(node.shape[0])))


def _texts(node: h5py.Dataset, rows: range) -> np.ndarray:
    """Values of any length, whose file may say of all that they are the same long one."""
    held, size, parts = node.file.id.get_filesize(), 0, [np.empty(0, object)]
    for first in rows[::TEXTS]:
        part = node[first : min(first + TEXTS, rows.stop)]
        size += sum(len(value) for value in part if isinstance(value, bytes))
        plausible(size, held, f"the texts of {node.name} in {node.file.filename}")
        parts.append(part)
    return np.concatenate(parts)
