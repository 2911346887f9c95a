"""Arrays that grow in whole files, so that an interruption costs at most one shard.

Two processes that write one shard lose rows without an error, so a writer takes a lock, gathers a whole shard in memory
and writes it at once, by renaming a finished file. Its digest, and how many rows are durable, is recorded after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ldm.data.jpeg_codec import JpegCodec
from ldm.data.shard_files import Damage, Layout, digest_of, read_description, write_file
from ldm.data.stored_array import AGAIN, DIGESTS
from ldm.errors import UserError

SHARD_ROWS = 1024
SHARD_BYTES = 256 << 20
CHUNK_BYTES = 32 << 10


def _power_of_two(limit: float) -> int:
    return 1 << max(int(limit), 1).bit_length() - 1


def create_array(
    group: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    whole_chunk: bool = False,
    attrs: Mapping[str, Any] | None = None,
    jpeg: int | None = None,
) -> GrowingArray:
    """An array in shards of 1024 rows or 256 MiB, whose chunks hold one tile, or small rows up to 32 KiB.

    jpeg: the quality of tiles that are stored as JPEG; None stores them as they are.

    Each chunk has a checksum, which is checked whenever it is read. The description, attrs with it, is one file, which
    is there whole or not at all.

    >>> array = create_array(Path("."), "tiles", (2000, 16, 16, 3), "uint8")
    >>> array.layout.chunks, array.layout.shards
    ((1, 16, 16, 3), (1024, 16, 16, 3))
    """
    row_bytes = max(int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize, 1)
    shard = min(SHARD_ROWS, _power_of_two(SHARD_BYTES / row_bytes))
    is_image = np.dtype(dtype) == np.uint8 and len(shape) == 4
    chunk = shard if whole_chunk else 1 if is_image else min(shard, _power_of_two(CHUNK_BYTES / row_bytes))
    lossless = is_image and jpeg is None
    zarr.create_array(
        str(group / name),
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=None if whole_chunk else (shard, *shape[1:]),
        serializer="auto" if jpeg is None else JpegCodec(jpeg),
        # level -1 is read in half the time of level 1, for 4% more bytes; floats hardly shrink
        compressors=zarr.codecs.ZstdCodec(level=-1, checksum=True) if lossless else zarr.codecs.Crc32cCodec(),
        attributes={**(attrs or {}), DIGESTS: []},
        overwrite=True,
    )
    return GrowingArray(group / name)


class GrowingArray:
    """An array to whose end rows are written, in whole files of which each has its digest recorded.

    What was being written in it when a process was killed is removed.

    Attributes:
        path: the array's folder. layout: of its files. attrs: what it says of itself, but for digests.

    >>> array = create_array(Path("."), "values", (3, 2), "float32")
    >>> array.append(np.ones((3, 2)))
    >>> array.flush()
    >>> array.describe()
    >>> zarr.open_array("values")[2].tolist(), len(array.digests)
    ([1.0, 1.0], 1)
    """

    def __init__(self, path: Path, rows: int = 0) -> None:
        """`rows` are there already; those of an unfinished file are taken up and written anew with the rest."""
        for file in path.rglob("*.partial"):
            file.unlink()
        self.path, self._array = path, zarr.open_array(str(path), mode="r+")
        layout = Layout.of(read_description(path))
        if layout is None:
            raise UserError(f"{path} is laid out as this version does not write it; delete that folder")
        self.layout = layout
        attrs = self._array.attrs.asdict()
        whole, more = divmod(rows, layout.shard)
        self._digests: list[str] = attrs.pop(DIGESTS, [])[:whole]
        self.attrs: dict[str, Any] = attrs
        self._chunks: list[bytes] = []
        self._rest = layout.empty(0)
        self._last = ""  # digest of the unfinished file
        try:
            self._digests += [digest_of(path / layout.file(i)) for i in range(len(self._digests), whole)]
            if more:
                self._chunks, self._rest = layout.packed(path, whole, more)
                self._last = digest_of(path / layout.file(whole))
        except (OSError, Damage) as error:
            raise UserError(f"what an interrupted run left of {path} is damaged ({error}); {AGAIN}.") from None

    @property
    def digests(self) -> list[str]:
        """Of the files that are written."""
        return [*self._digests, self._last] if self._last else list(self._digests)

    def append(self, rows: np.ndarray) -> None:
        """Add rows; whole files are written, the rest waits in memory, packed."""
        layout = self.layout
        rows = np.asarray(rows, layout.dtype)
        rows = np.concatenate([self._rest, rows]) if len(self._rest) else rows
        whole = len(rows) - len(rows) % layout.chunk
        for at in range(0, whole, layout.chunk):
            self._chunks.append(layout.pack(rows[at : at + layout.chunk]))
            if len(self._chunks) * layout.chunk == layout.shard:
                self._digests.append(self._write(self._chunks))
                self._chunks, self._last = [], ""
        self._rest = rows[whole:].copy()  # the caller may use its array again

    def flush(self) -> None:
        """Write the unfinished file too, if there is one."""
        rest = [self.layout.pack(self._rest)] if len(self._rest) else []
        if self._chunks or rest:
            self._last = self._write([*self._chunks, *rest])

    def _write(self, chunks: list[bytes]) -> str:
        return write_file(self.path / self.layout.file(len(self._digests)), self.layout.parts_of(chunks))

    def describe(self, **attrs: Any) -> None:
        """Record attributes, and the digests of what is written, in one write."""
        self.attrs |= attrs
        self._array.update_attributes({**attrs, DIGESTS: self.digests})


class ShardBuffer:
    """Rows of several arrays that grow together; whole shards go to disk, the rest waits in memory.

    Where shards hold fewer rows in one array than in others, as of large tiles, these are written as far as that one.
    """

    def __init__(self, arrays: Mapping[str, GrowingArray], rows: int) -> None:
        self.arrays, self.durable, self.rows = arrays, rows, rows
        self.shard = min(array.layout.shard for array in arrays.values())

    def append(self, rows: Mapping[str, np.ndarray]) -> bool:
        """Add rows; True when at least one shard became durable."""
        counts = {name: len(values) for name, values in rows.items()}
        if set(counts) != set(self.arrays) or len(set(counts.values())) != 1:
            raise ValueError(f"expected as many rows for each of {sorted(self.arrays)}, got {counts}")
        for name, values in rows.items():
            tail = self.arrays[name].layout.shape[1:]
            if values.shape[1:] != tail:
                raise ValueError(f"{name} rows have shape {tail}, got {values.shape[1:]}")
        total = self.arrays[next(iter(rows))].layout.shape[0]
        added = next(iter(counts.values()))
        if self.rows + added > total:
            raise ValueError(f"{self.rows + added} rows appended to an array of {total}")
        for name, values in rows.items():
            self.arrays[name].append(values)
        before, self.rows = self.rows, self.rows + added
        if self.rows // self.shard == before // self.shard:
            return False
        for array in self.arrays.values():
            if array.layout.shard > self.shard:
                array.flush()
        self.durable = self.rows - self.rows % self.shard
        return True

    def flush(self) -> None:
        """Write all rows; they are durable after this."""
        if self.durable != self.rows:
            for array in self.arrays.values():
                array.flush()
            self.durable = self.rows
