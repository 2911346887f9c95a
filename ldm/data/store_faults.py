"""What is wrong with a tile store on disk: missing, cut, changed and strange files, arrays that are half made.

Each file of an array is held against the digest that was recorded when it was written; arrays of older versions and of
others, which have none, are decoded instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ldm.data.shard_files import Damage, digest_of, read_description
from ldm.data.stored_array import StoredArray
from ldm.data.tile_store import GROUPS, TileStore
from ldm.errors import UserError
from ldm.files import LOCK
from ldm.locks import Held, Lock

FILE, ARRAY, HALF, LEFT, STORE, INDEX, TABLE = "file", "array", "half", "left", "store", "index", "table"
SLIDE = "slide"
_PARTIAL = ".partial"
_OURS = re.compile(r"-[0-9a-f]{8}")  # how this version ends the names of arrays that it is making


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        store: the store, or of an index its cohort. what: the fault, in words.
        kind: what would be made again: FILE, a file of an array; ARRAY, all of it; HALF, the rest of one that is half
            made; STORE, all of it; INDEX, rows of the table of tiles; TABLE, all of it. LEFT: what should not be there.
            SLIDE: the slide of a store without pixels, which is not there, or another.
        array: its name in the store, as "features/uni". file: which of its files. path: where it is.
    """

    store: Path
    what: str
    kind: str
    array: str = ""
    file: int | None = None
    path: Path | None = None

    def __str__(self) -> str:
        shard = "" if self.file is None else f"shard {self.file} ({self.path.relative_to(self.store / self.array)})"
        return f"{', '.join(filter(None, (str(self.store), self.array, shard)))}: {self.what}"


def find_faults(path: Path | str, slides: Sequence[Path | str] = ()) -> Iterator[Fault]:
    """All faults of a store, array by array. Each file is read once, about as fast as the disk gives it.

    slides: where the slide of a store without pixels is looked for, see `ldm.data.slide_tiles.find_slide`.

    >>> list(find_faults(store.path))
    []
    """
    path = Path(path)
    try:
        store = TileStore.open(path, allow_incomplete=True, slides=slides)
    except UserError as error:
        yield Fault(path, _without(error, path), STORE)
        return
    if not store.attrs.get("complete"):
        count = store.attrs.get("count", "?")
        told = f"not finished: {len(store)} of {count} tiles are written; the command that was writing it goes on"
        yield Fault(path, told, STORE)
        return
    shapes = {"tiles": (len(store), store.tile_size, store.tile_size, 3), "coords": (len(store), 2)}
    labels = {*store.label_names, *(["tissue"] if "tissue" in store.attrs else [])}
    names = [*shapes, *(f"labels/{name}" for name in sorted(labels))]
    names += [f"{group}/{name}" for group in ("features", "latents") for name in store.names(group)]
    if store.attrs["pixels"] == "none":
        names.remove("tiles")
    faults = [fault for name in names for fault in _array_faults(store, name, shapes.get(name))]
    yield from faults
    if "tiles" not in names and not any(fault.array == "coords" for fault in faults):
        try:
            _ = store.tiles.slide
        except UserError as error:
            yield Fault(path, _without(error, path).rpartition(". Say")[0], SLIDE, "tiles")
    yield from _left_over(path)


def check_store(path: Path | str) -> None:
    """UserError, which names what is wrong, unless a store is finished and whole.

    >>> check_store(store.path)
    """
    if faults := list(find_faults(path)):
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}; `python -m data_prep.verify --repair` makes it again where it can.")


def _without(error: UserError, path: Path) -> str:
    return str(error).removeprefix("the array ").removeprefix(f"{path} ").rstrip(".")


def _array_faults(store: TileStore, name: str, shape: tuple[int, ...] | None) -> Iterator[Fault]:
    folder = store.path / name
    fault = partial(Fault, store.path, array=name)
    try:
        array = StoredArray(folder, allow_lost=True)
    except UserError as error:
        yield fault(_without(error, folder), ARRAY)
        return
    if array.shape != (expected := shape or (len(store), *array.shape[1:])):
        yield fault(f"has shape {array.shape}, and that of this store is {expected}", ARRAY)
        return
    files = array.files()
    if array.digests is not None and len(array.digests) != len(files):
        yield fault(f"records digests of {len(array.digests)} of its {len(files)} files", ARRAY)
        return
    for i, what in enumerate(_each(partial(_file_fault, array, files), len(files))):
        if what:
            yield fault(what, FILE, file=i, path=files[i])
    known = {folder / "zarr.json", *files}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in known:
            yield fault(f"{path.relative_to(folder)} is no file of this array", LEFT, path=path)


def _each(call: Callable[[int], str], count: int) -> Iterator[str]:
    """call(0), call(1), ...: by several threads, but for a single one, as most arrays of a small slide are one file."""
    if count < 2:
        yield from map(call, range(count))
        return
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from pool.map(call, range(count))


def _file_fault(array: StoredArray, files: list[Path], i: int) -> str:
    """What is wrong with file i, or ""."""
    if not files[i].is_file():
        return "is missing"
    if array.digests is None:
        return _damage(array, files, i)
    try:
        digest = digest_of(files[i])
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if digest == array.digests[i]:
        return ""
    if digest in array.digests:
        return f"holds the rows of shard {array.digests.index(digest)}"
    return _damage(array, files, i) or "is readable, and not what was written: it was changed, or is of another store"


def _damage(array: StoredArray, files: list[Path], i: int) -> str:
    """Why file i cannot be decoded, or ""."""
    try:
        if array.layout is None:  # laid out by others; all of it
            array[:]
        else:
            rows = array.layout.rows_of(i)
            array.layout.read(array.path, rows.start, rows.stop)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (Damage, UserError) as error:
        return str(error).removeprefix(str(files[i])).lstrip(", ").rstrip(".")
    return ""


def _left_over(path: Path) -> Iterator[Fault]:
    """What writers that were killed, and other versions, left in a store."""
    for group in ("", *GROUPS):
        for file in sorted(path.glob(f"{group}/*.partial" if group else "*.partial")):
            name = file.relative_to(path).as_posix()
            yield Fault(path, "was being written when its process was killed", LEFT, name, path=file)
        for folder in sorted(path.glob(f"{group}/*/")) if group else ():
            name = folder.relative_to(path).as_posix()
            if folder.name.startswith(_PARTIAL):
                kind, what = _half_made(folder)
                yield Fault(path, what, kind, name, path=folder)
            elif not folder.name.startswith(".") and not (folder / "zarr.json").is_file():
                yield Fault(path, "is no array, as it has no zarr.json", ARRAY, name)


def _half_made(folder: Path) -> tuple[str, str]:
    """Whether anybody goes on with a half-made array, and what to say of it."""
    mark = folder.name.removeprefix(_PARTIAL)
    if not _OURS.fullmatch(mark):
        return LEFT, "was left half made by another version, and nothing goes on with it"
    try:
        described = read_description(folder)
        rows, count = described["attributes"]["rows"], described["shape"][0]
    except (OSError, ValueError, KeyError):
        return LEFT, "was left half made, and does not say by what"
    lock = folder.with_name(f"{LOCK}{mark}")
    try:
        if lock.exists():
            Lock(lock).acquire().release()
    except Held as error:
        return HALF, str(error).removesuffix(".")
    except OSError:
        pass  # read-only
    told = described["attributes"]
    of = f" of {maker}" if (maker := told.get("encoder") or told.get("first_stage")) else ""
    return HALF, f"half made, {rows} of {count} rows{of}: the command that was writing it goes on"
