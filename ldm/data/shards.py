"""Zarr arrays in whole shards: reading them fast, and writing them so that an interruption costs at most one shard.

Two processes that write one shard lose rows without an error, so a writer takes a lock, gathers a whole shard in memory
and writes it at once, by renaming a finished file. How many rows are durable is recorded by its owner after they are.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

SHARD_ROWS = 1024
SHARD_BYTES = 256 << 20
CHUNK_BYTES = 32 << 10
_IMPORTED_BY = os.getpid()
# zarr's own pipeline renames a finished shard into place; empty chunks are written so that a missing shard is an error
_WRITING = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline", "array.write_empty_chunks": True}


def codec_settings() -> dict[str, Any]:
    """zarr settings for reading: the `zarrs` codec pipeline where installed (benchmarks/tile_store.py measures it).

    Its thread pool does not survive a fork: a read of several chunks in a forked worker would wait for ever. Child
    processes therefore decode in their own thread.

    >>> codec_settings()["codec_pipeline.path"]
    'zarrs.ZarrsCodecPipeline'
    """
    if importlib.util.find_spec("zarrs") is None:
        return {}
    settings: dict[str, Any] = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
    if os.getpid() != _IMPORTED_BY or multiprocessing.parent_process() is not None:
        settings |= {"codec_pipeline.chunk_concurrent_maximum": 1, "threading.max_workers": 1}
    return settings


def _power_of_two(limit: float) -> int:
    return 1 << max(int(limit), 1).bit_length() - 1


def create_array(
    group: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    whole_chunk: bool = False,
    attrs: Mapping[str, Any] | None = None,
) -> zarr.Array:
    """An array in shards of 1024 rows or 256 MiB, whose chunks hold one tile, or small rows up to 32 KiB.

    Its description, attrs with it, is one file, which is there whole or not at all.

    >>> array = create_array(Path("."), "tiles", (2000, 16, 16, 3), "uint8")
    >>> array.chunks, array.shards
    ((1, 16, 16, 3), (1024, 16, 16, 3))
    """
    row_bytes = max(int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize, 1)
    shard = min(SHARD_ROWS, _power_of_two(SHARD_BYTES / row_bytes))
    is_image = np.dtype(dtype) == np.uint8 and len(shape) == 4
    chunk = shard if whole_chunk else 1 if is_image else min(shard, _power_of_two(CHUNK_BYTES / row_bytes))
    with zarr.config.set(_WRITING):
        return zarr.create_array(
            str(group / name),
            shape=shape,
            dtype=dtype,
            chunks=(chunk, *shape[1:]),
            shards=None if whole_chunk else (shard, *shape[1:]),
            compressors=zarr.codecs.ZstdCodec(level=1) if is_image else None,  # floats hardly shrink
            attributes=dict(attrs or {}),
            overwrite=True,
        )


def open_writable(path: Path) -> zarr.Array:
    """An array that is there, to write rows into; its empty chunks are written too.

    What zarr was writing in it when it was killed is removed.

    >>> _ = create_array(Path("."), "values", (10, 2), "float32")
    >>> open_writable(Path("values"))[0] = 3.0
    >>> open_writable(Path("values"))[0].tolist()
    [3.0, 3.0]
    """
    for file in path.rglob("*.partial"):
        file.unlink()
    with zarr.config.set(_WRITING):
        return zarr.open_array(str(path), mode="r+")


class ShardBuffer:
    """Rows of several arrays that grow together; whole shards go to disk, the rest waits in memory."""

    def __init__(self, arrays: Mapping[str, zarr.Array], shard: int, rows: int) -> None:
        self.arrays, self.shard, self.durable = arrays, shard, rows
        start = rows - rows % shard  # the rows of an unfinished shard are taken up again and written anew with the rest
        self.waiting = {name: [np.asarray(a[start:rows])] if rows > start else [] for name, a in arrays.items()}
        self.start, self.rows = start, rows

    def append(self, rows: Mapping[str, np.ndarray]) -> bool:
        """Add rows; True when at least one shard became durable."""
        counts = {name: len(values) for name, values in rows.items()}
        if set(counts) != set(self.arrays) or len(set(counts.values())) != 1:
            raise ValueError(f"expected as many rows for each of {sorted(self.arrays)}, got {counts}")
        for name, values in rows.items():
            tail = self.arrays[name].shape[1:]
            if values.shape[1:] != tail:
                raise ValueError(f"{name} rows have shape {tail}, got {values.shape[1:]}")
        total = self.arrays[next(iter(rows))].shape[0]
        added = next(iter(counts.values()))
        if self.rows + added > total:
            raise ValueError(f"{self.rows + added} rows appended to an array of {total}")
        for name, values in rows.items():
            # a copy, so that the caller may reuse its buffer
            self.waiting[name].append(np.array(values, dtype=self.arrays[name].dtype))
        self.rows += added
        if self.rows - self.start < self.shard:
            return False
        self.flush(self.rows - self.rows % self.shard)
        return True

    def flush(self, end: int) -> None:
        """Write rows up to `end`; they are durable after this."""
        if end == self.durable or end == self.start:
            return
        held = {name: np.concatenate(parts) for name, parts in self.waiting.items()}
        whole = end - end % self.shard
        for name, array in self.arrays.items():
            for start in range(self.start, end, self.shard):
                stop = min(start + self.shard, end)
                array[start:stop] = held[name][start - self.start : stop - self.start]
        self.waiting = {name: [values[whole - self.start :]] for name, values in held.items()}
        self.start, self.durable = whole, end
