"""Writers of tile stores and of arrays in them: whole shards, one writer, resumable. `ldm.data.tile_store` reads."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ldm.data.shard_files import digest_of, write_file
from ldm.data.shards import GrowingArray, ShardBuffer, create_array
from ldm.data.stored_array import DIGESTS, StoredArray
from ldm.data.tile_store import FORMAT, GROUPS, PIXELS, TOLD, TileStore
from ldm.errors import UserError
from ldm.files import LOCK, hidden, remove, tool_version
from ldm.locks import Lock


def _plain(value: Any) -> Any:
    """As it reads back from JSON, so that settings compare equal after a round trip."""
    return json.loads(json.dumps(value))


class _Writer(AbstractContextManager):
    """Closed at the end of its `with`, as complete unless an error ended it."""

    @abstractmethod
    def close(self, complete: bool) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(complete=kind is None)


def remake_file(store: Path, name: str, i: int, rows: np.ndarray, sure: bool) -> bool:
    """Write file i of the array `name` of a finished store again; whether its digest is the recorded one.

    sure: that these rows belong there, although their digest is another, or none is recorded; else nothing is written
    then. With another the new one is recorded. UserError: somebody is writing there.

    >>> rows = writable.array("coords")[:]
    >>> [remake_file(writable.path, "coords", 0, each, sure=False) for each in (rows, rows + 1)]
    [True, False]
    """
    folder = store / name
    with Lock(store / ".lock-tiles"), Lock(hidden(folder, LOCK), of=folder):
        array = StoredArray(folder, allow_lost=True)
        content = array.layout.file_of(np.asarray(rows, array.dtype))
        same = array.digests is not None and digest_of(content) == array.digests[i]
        if same or sure:
            write_file(array.files()[i], content)
        if sure and not same and array.digests is not None:
            array.digests[i] = digest_of(content)
            zarr.open_array(str(folder), mode="r+").update_attributes({DIGESTS: array.digests})
    return same


class TileStoreWriter(_Writer):
    """Writes one slide's tiles, coordinates and labels; a context manager. See `create`."""

    def __init__(self, path: Path, lock: Lock, group: zarr.Group, attrs: dict[str, Any], buffer: ShardBuffer | None):
        self.path, self.attrs = path, attrs
        self._lock, self._group, self._buffer = lock, group, buffer

    @classmethod
    def create(
        cls, path: Path | str, count: int, attrs: Mapping[str, Any], labels: Mapping[str, str] | None = None
    ) -> TileStoreWriter:
        """Begin a store of `count` tiles, or go on with an interrupted one.

        Args:
            path: the `.zarr` folder.
            attrs: at least slide, mpp, tile_size, stride, level0_size, downsample; pixels are "zstd" unless it says
                "jpeg", with jpeg_quality, or "none", with slide_file; see `TileStore`.
            labels: name -> dtype of the labels given to `append`.
        Returns:
            A writer whose `rows` says how many tiles are on disk already: append from there on.
        Raises:
            UserError: the folder cannot be written, another writer is at work, or it was begun with other settings.
        """
        path = Path(path)
        attrs = {"version": tool_version(), "format": 1, "pixels": PIXELS[0], **attrs, "count": int(count)}
        attrs = _plain(attrs | ({"format": FORMAT} if attrs["pixels"] != PIXELS[0] else {}))
        if count < 1:
            raise UserError(f"a tile store holds at least one tile, got count={count}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = Lock(path / ".lock-tiles").acquire()
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}") from None
        try:
            return cls._begin(path, lock, attrs, dict(labels or {}))
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _begin(cls, path: Path, lock: Lock, attrs: dict[str, Any], labels: dict[str, str]) -> TileStoreWriter:
        names = ["tiles"] * (attrs["pixels"] != "none") + ["coords", *(f"labels/{name}" for name in labels)]
        for file in path.glob("*.partial"):  # of zarr, when it was killed
            file.unlink()
        if (path / "zarr.json").exists():
            before = TileStore.open(path, allow_incomplete=True).attrs
            differ = sorted(k for k in attrs.keys() | before.keys() if attrs.get(k) != before.get(k))
            differ = [k for k in differ if k not in ("rows", "complete", "format", *TOLD)]
            if differ:
                changes = ", ".join(f"{k} was {before.get(k)!r}, now {attrs.get(k)!r}" for k in differ)
                raise UserError(
                    f"{path} was made with other settings ({changes}); delete it or write to another folder"
                )
            lies, lay = (each.get("slide_file", {}) for each in (attrs, before))
            if lies.get("digest") != lay.get("digest"):
                raise UserError(
                    f"{path} is of another file than the slide {attrs['slide']} that is given, and its labels and "
                    "features would be of other pixels; give the slide as it was, or write to another folder"
                )
            group = zarr.open_group(str(path), mode="r+")
            rows = int(before["rows"])
            if before["complete"] and lies != lay:
                before |= {"slide_file": lies}  # elsewhere than before
                group.update_attributes({"histoldm": before})
            if before["complete"]:
                return cls(path, lock, group, before, None)
            arrays = {name: GrowingArray(path / name, rows) for name in names}
        else:
            t, count = attrs["tile_size"], attrs["count"]
            arrays = {}
            if "tiles" in names:
                quality = attrs["jpeg_quality"] if attrs["pixels"] == "jpeg" else None
                arrays["tiles"] = create_array(path, "tiles", (count, t, t, 3), "u1", jpeg=quality)
            arrays["coords"] = create_array(path, "coords", (count, 2), "i4", whole_chunk=True)
            for name in GROUPS:
                zarr.create_group(str(path / name), overwrite=True)
            for name, dtype in labels.items():
                arrays[f"labels/{name}"] = create_array(path, f"labels/{name}", (count,), dtype, whole_chunk=True)
            rows = 0
            # the group's own metadata comes last: before it there is no store, after it an unfinished one
            group = zarr.create_group(str(path), attributes={"histoldm": {**attrs, "rows": 0, "complete": False}})
        return cls(path, lock, group, attrs, ShardBuffer(arrays, rows))

    @property
    def rows(self) -> int:
        """Tiles given so far, those of an interrupted run included."""
        return self._buffer.rows if self._buffer else int(self.attrs["rows"])

    @property
    def finished(self) -> bool:
        """True when the store was whole already: there is nothing to append."""
        return self._buffer is None

    def append(self, tiles: np.ndarray, coords: np.ndarray, labels: Mapping[str, np.ndarray] | None = None) -> None:
        """Add tiles (n, T, T, 3) uint8, coords (n, 2) level-0 x, y, and one value per tile for each label.

        Of a store without pixels the tiles are not kept.
        """
        if self._buffer is None:
            raise ValueError(f"{self.path} is finished; nothing can be appended")
        rows = {"tiles": np.asarray(tiles)} if "tiles" in self._buffer.arrays else {}
        rows |= {"coords": np.asarray(coords)}
        rows |= {f"labels/{name}": np.asarray(values) for name, values in (labels or {}).items()}
        if self._buffer.append(rows):
            self._record()

    def _record(self, complete: bool = False) -> None:
        self.attrs = {**self.attrs, "rows": self._buffer.durable, "complete": complete}
        for array in self._buffer.arrays.values():
            array.describe()
        self._group.update_attributes({"histoldm": self.attrs})  # after the arrays' digests

    def close(self, complete: bool) -> None:
        try:
            if self._buffer is not None:
                if complete and self.rows != self.attrs["count"]:
                    raise ValueError(f"{self.path} wants {self.attrs['count']} tiles but {self.rows} were appended")
                self._buffer.flush()
                self._record(complete)
        finally:
            self._lock.release()


class ArrayWriter(_Writer):
    """Writes one per-tile array of a finished store (features, latents, a label): resumable, whole shards, one writer.

    The array grows under a hidden name and takes its own when it is whole. Use as a context manager::

        with ArrayWriter(store.path, "features/uni", (1024,), "f2", {"licence": ...}) as writer:
            for start in range(writer.rows, len(store), batch): writer.append(...)     # (n, 1024)

    Args:
        store_path: the tile store.
        name: "features/<encoder>", "latents/<first stage>" or "labels/<name>".
        shape_tail: shape of one row.
        attrs: what the rows were made with; going on with, or asking again for, an array made otherwise is a UserError.
    """

    def __init__(
        self,
        store_path: Path | str,
        name: str,
        shape_tail: Sequence[int],
        dtype: str,
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        store = TileStore.open(store_path)
        group, _, leaf = name.partition("/")
        if group not in GROUPS or not leaf or "/" in leaf or leaf.startswith("."):
            raise UserError(f"'{name}' is no array name: use features/<name>, latents/<name> or labels/<name>")
        self.final = store.path / group / leaf
        self.partial = hidden(self.final, ".partial")
        self.count, self.attrs = len(store), _plain(dict(attrs or {}))
        self._buffer: ShardBuffer | None = None
        shape = (self.count, *map(int, shape_tail))
        try:
            self.final.parent.mkdir(exist_ok=True)
            self._lock = Lock(hidden(self.final, LOCK), of=self.final).acquire()
        except OSError as error:
            raise UserError(f"cannot write to {store.path}: {error.strerror}") from None
        try:
            if (self.final / "zarr.json").exists():
                self._check_same(self.final, shape, dtype)
            elif (self.partial / "zarr.json").exists():
                rows = int(self._check_same(self.partial, shape, dtype).get("rows", 0))
                self._buffer = ShardBuffer({"rows": GrowingArray(self.partial, rows)}, rows)
            else:
                begun = {**self.attrs, "rows": 0}
                array = create_array(self.partial.parent, self.partial.name, shape, dtype, attrs=begun)
                self._buffer = ShardBuffer({"rows": array}, 0)
        except BaseException:
            self._lock.release()
            raise

    def _check_same(self, path: Path, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
        """What the array that is there says of itself; UserError where it was made otherwise."""
        array = StoredArray(path, allow_lost=True)
        before = {**array.attrs, "shape": list(array.shape), "dtype": str(array.dtype)}
        now = {**self.attrs, "shape": list(shape), "dtype": str(np.dtype(dtype))}
        differ = sorted(k for k in now if before.get(k) != now[k])
        if differ:
            changes = ", ".join(f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in differ)
            raise UserError(
                f"{path} was made with other settings ({changes}); choose another name or delete that folder"
            )
        return before

    @property
    def rows(self) -> int:
        """Rows given so far, those of an interrupted run included; all of them when the array was whole already."""
        return self._buffer.rows if self._buffer else self.count

    @property
    def finished(self) -> bool:
        """True when the array was whole already: there is nothing to append."""
        return self._buffer is None

    def append(self, rows: np.ndarray) -> None:
        """Add rows (n, *shape_tail)."""
        if self._buffer is None:
            raise ValueError(f"{self.final} is finished; nothing can be appended")
        if self._buffer.append({"rows": np.asarray(rows)}):
            self._describe()

    def flush(self) -> StoredArray:
        """Make all rows given so far durable and return the array, to measure it before it takes its name."""
        self._buffer.flush()
        self._describe()
        return StoredArray(self.partial, allow_lost=True)

    def add_attrs(self, **attrs: Any) -> None:
        """Record what is known only after the rows, such as their measured scale."""
        self._describe(**_plain(attrs))

    def _describe(self, **attrs: Any) -> None:
        self._buffer.arrays["rows"].describe(**attrs, rows=self._buffer.durable)

    def close(self, complete: bool) -> None:
        try:
            if self._buffer is not None:
                if complete and self.rows != self.count:
                    raise ValueError(f"{self.final} wants {self.count} rows but {self.rows} were appended")
                self.flush()
                if complete:
                    remove(self.final)  # what is there is no array
                    self.partial.rename(self.final)
                    self._buffer = None
        finally:
            self._lock.release()
