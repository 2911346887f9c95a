"""The files of a Zarr array whose chunks hold whole rows: where a row lies, how it is packed, what is damaged.

Such arrays are all of the tile stores'. zarr reads and writes the same bytes, through an event loop that takes several
times as long as the row itself; here a row is one look into the index of its shard, one read and one decompression.
Open files are not kept, so that processes may fork and files may be replaced.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import imagecodecs
import numpy as np
from numcodecs import zstd

from ldm.data import jpeg_codec
from ldm.foreign.budget import afford
from ldm.foreign.paths import inside
from ldm.foreign.settings import read_json

ABSENT = 2**64 - 1  # offset and length of a chunk that a shard lacks
_CRC = struct.Struct("<I")
_INDEXES = 4096  # of shards that a process remembers: of 1024 chunks each, 64 MiB
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_INDEX_CODECS = [_BYTES, {"name": "crc32c"}]

DIGEST_BYTES = 16


class Damage(ValueError):
    """A file that is not as it was written; the message says how."""


def _check_crc(data: bytes) -> bytes:
    if len(data) < _CRC.size or google_crc32c.value(data[: -_CRC.size]) != _CRC.unpack(data[-_CRC.size :])[0]:
        raise Damage("its checksum does not fit")
    return data[: -_CRC.size]


def _with_crc(data: bytes) -> bytes:
    return data + _CRC.pack(google_crc32c.value(data))


def _from_zstd(data: bytes, into: np.ndarray) -> None:
    try:
        decoded = imagecodecs.zstd_decode(data, out=into.reshape(-1).view(np.uint8))
    except imagecodecs.ZstdError as error:
        raise Damage(f"it cannot be decompressed ({error})") from None
    _check_size(len(decoded), into)


def _from_jpeg(data: bytes, into: np.ndarray) -> None:
    if len(into) != 1:
        raise Damage(f"it is to hold {len(into)} tiles, and a JPEG is one")
    try:
        jpeg_codec.decode(_check_crc(data), into[0])
    except ValueError as error:
        raise Damage(str(error)) from None


def _from_bytes(data: bytes, into: np.ndarray) -> None:
    _check_size(len(data), into)
    into[...] = np.frombuffer(data, into.dtype).reshape(into.shape)


def _check_size(got: int, into: np.ndarray) -> None:
    if got != into.nbytes:
        raise Damage(f"it holds {got} bytes instead of {into.nbytes}")


@dataclass(frozen=True)
class Packing:
    """How a chunk of rows becomes bytes: `encode(rows)`, and back: `decode(data, into)`; Damage where it cannot."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, np.ndarray], None]

    @classmethod
    def of(cls, codecs: Sequence[Mapping[str, Any]], dtype: np.dtype) -> Packing | None:
        """That of codecs as Zarr names them; None for others than this toolkit's.

        >>> packing = Packing.of([{"name": "bytes", "configuration": {"endian": "little"}}], np.dtype("f4"))
        >>> packing.encode(np.ones(2, "f4")).hex()
        '0000803f0000803f'
        """
        names, told = [codec["name"] for codec in codecs], [codec.get("configuration", {}) for codec in codecs]
        if names == [jpeg_codec.NAME, "crc32c"]:
            quality = told[0]["quality"]
            return cls(lambda rows: _with_crc(jpeg_codec.encode(rows[0], quality)), _from_jpeg)
        if not codecs or codecs[0] not in (_BYTES, {"name": "bytes"} if dtype.itemsize == 1 else None):
            return None
        if names[1:] == ["zstd"]:
            level, checked = told[1]["level"], bool(told[1].get("checksum"))
            return cls(lambda rows: zstd.compress(rows, level, checked), _from_zstd)
        if names[1:] == ["crc32c"]:
            return cls(lambda rows: _with_crc(rows.tobytes()), lambda data, into: _from_bytes(_check_crc(data), into))
        return cls(lambda rows: rows.tobytes(), _from_bytes) if names[1:] == [] else None


@dataclass(frozen=True)
class Layout:
    """Where the rows of an array lie. Files hold `shard` rows each, in chunks of `chunk` rows.

    Attributes:
        shape, dtype: of the array. packing: of a chunk. fill: the values of a chunk that its writer left out.
        sharded: whether a file is chunks and an index of them; else it is one chunk.
        chunks, shards: as zarr has them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    shard: int
    chunk: int
    packing: Packing
    sharded: bool
    separator: str
    fill: np.ndarray

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Layout | None:
        """That of an array whose zarr.json is given; None where its files are laid out otherwise, as others do it.

        >>> Layout.of(read_description(store.path / "tiles")).shards
        (1024, 256, 256, 3)
        """
        shape = tuple(described["shape"])
        outer, codecs = tuple(described["chunk_grid"]["configuration"]["chunk_shape"]), described["codecs"]
        keys = described["chunk_key_encoding"]
        known = described["zarr_format"] == 3 and described["chunk_grid"]["name"] == "regular"
        if not known or keys["name"] != "default" or described.get("storage_transformers") or not shape:
            return None
        dtype = np.dtype(described["data_type"])
        inner, sharded = outer, [codec["name"] for codec in codecs] == ["sharding_indexed"]
        if sharded:
            own = codecs[0]["configuration"]
            inner, codecs = tuple(own["chunk_shape"]), own["codecs"]
            if own["index_codecs"] != _INDEX_CODECS or own.get("index_location", "end") != "end":
                return None
        packing = Packing.of(codecs, dtype)
        whole_rows = inner[1:] == outer[1:] == shape[1:]
        if packing is None or not whole_rows or inner[0] < 1 or outer[0] % inner[0] or dtype.hasobject:
            return None
        separator = keys.get("configuration", {}).get("separator", "/")
        fill = np.array(described["fill_value"], dtype)
        return cls(shape, dtype, outer[0], inner[0], packing, sharded, separator, fill)

    @property
    def chunks(self) -> tuple[int, ...]:
        return (self.chunk, *self.shape[1:])

    @property
    def shards(self) -> tuple[int, ...] | None:
        return (self.shard, *self.shape[1:]) if self.sharded else None

    @property
    def files(self) -> list[str]:
        """Names of the files in the array's folder, in the order of their rows."""
        return [self.file(i) for i in range(-(-self.shape[0] // self.shard))]

    def file(self, i: int) -> str:
        return self.separator.join(["c", str(i), *("0" * (len(self.shape) - 1))])

    def rows_of(self, i: int) -> range:
        """The rows that file i holds."""
        return range(i * self.shard, min((i + 1) * self.shard, self.shape[0]))

    def empty(self, rows: int) -> np.ndarray:
        return np.empty((rows, *self.shape[1:]), self.dtype)

    # --- reading ---

    def read(self, folder: Path, start: int, stop: int) -> np.ndarray:
        """Rows start..stop, a copy. Damage, or OSError, where a file is not as it was written."""
        afford((stop - start) * math.prod(self.chunks[1:]) * self.dtype.itemsize, f"rows {start}..{stop} of {folder}")
        rows = self.empty(stop - start)
        at = start
        while at < stop:
            i = at // self.shard
            end = min(stop, (i + 1) * self.shard)
            self._read_within(folder, i, at - i * self.shard, rows[at - start : end - start])
            at = end
        return rows

    def _read_within(self, folder: Path, i: int, first: int, into: np.ndarray) -> None:
        """Rows of file i from its row `first` on."""
        with _Opened(os.path.join(folder, self.file(i))) as file:
            at = 0
            while at < len(into):
                place, skipped = divmod(first + at, self.chunk)
                data = self._chunk_bytes(file, place)
                part = into[at : at + self.chunk - skipped]
                try:
                    if data is None:
                        part[...] = self.fill
                    elif len(part) == self.chunk:
                        self.packing.decode(data, part)
                    else:
                        self.packing.decode(data, whole := self.empty(self.chunk))
                        part[...] = whole[skipped : skipped + len(part)]
                except Damage as error:
                    raise Damage(f"{file.path}, chunk {place}: {error}") from None
                at += len(part)

    def _chunk_bytes(self, file: _Opened, place: int) -> bytes | None:
        if not self.sharded:
            return file.read(file.size, 0)
        index = _index(file, self.shard // self.chunk)
        offset, length = index[2 * place], index[2 * place + 1]
        return None if offset == ABSENT else file.read(length, offset)

    def packed(self, folder: Path, i: int, rows: int) -> tuple[list[bytes], np.ndarray]:
        """The chunks of file i that its first `rows` rows fill, as they are there, and its rows that fill none."""
        whole = rows // self.chunk
        with _Opened(os.path.join(folder, self.file(i))) as file:
            chunks = [self._chunk_bytes(file, place) for place in range(whole)]
            if None in chunks:
                raise Damage(f"{file.path} lacks its chunk {chunks.index(None)}")
            rest = self.empty(rows - whole * self.chunk)
            self._read_within(folder, i, whole * self.chunk, rest)
        return chunks, rest

    # --- writing ---

    def pack(self, rows: np.ndarray) -> bytes:
        """The bytes of a chunk; of fewer rows than it has, they are followed by zeros."""
        if len(rows) < self.chunk:
            rows = np.concatenate([rows, np.zeros((self.chunk - len(rows), *rows.shape[1:]), rows.dtype)])
        return self.packing.encode(np.ascontiguousarray(rows))

    def parts_of(self, chunks: Sequence[bytes]) -> list[bytes]:
        """The content of a file with these chunks, in their order; further ones are absent."""
        if not self.sharded:
            return list(chunks)
        lengths = np.array([len(chunk) for chunk in chunks], np.uint64)
        index = np.full((self.shard // self.chunk, 2), ABSENT, "<u8")
        index[: len(chunks), 0] = np.cumsum(lengths) - lengths
        index[: len(chunks), 1] = lengths
        return [*chunks, _with_crc(index.tobytes())]

    def file_of(self, rows: np.ndarray) -> list[bytes]:
        """The content of a file with these rows, in parts.

        >>> Layout.of(read_description(store.path / "coords")).file_of(np.array([(256, 512)], "i4"))[0][:8].hex()
        '0001000000020000'
        """
        return self.parts_of([self.pack(rows[at : at + self.chunk]) for at in range(0, len(rows), self.chunk)])


class _Opened:
    """A file while it is read. Equal where it is the same file with the same content, so that its index is known."""

    def __init__(self, path: str) -> None:
        self.path, self._handle = path, os.open(path, os.O_RDONLY)
        found = os.fstat(self._handle)
        self.size, self._same = found.st_size, (path, found.st_ino, found.st_size, found.st_mtime_ns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Opened) and self._same == other._same

    def __hash__(self) -> int:
        return hash(self._same)

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def read(self, length: int, offset: int) -> bytes:
        if offset + length > self.size:
            raise Damage(f"{self.path} is cut short: it has {self.size} bytes")
        data = os.pread(self._handle, length, offset)
        while len(data) < length and (more := os.pread(self._handle, length - len(data), offset + len(data))):
            data += more
        return data


@lru_cache(_INDEXES)
def _index(file: _Opened, chunks: int) -> array[int]:
    """Offset and length of each chunk of a shard, one after the other."""
    length = 16 * chunks + _CRC.size
    if file.size < length:
        raise Damage(f"{file.path} is cut short: it has {file.size} bytes")
    try:
        content = _check_crc(file.read(length, file.size - length))
    except Damage:
        raise Damage(f"{file.path} is cut short or damaged: the checksum of its index does not fit") from None
    index = array("Q")
    index.frombytes(content)
    return index


def read_description(folder: Path) -> dict[str, Any]:
    """What an array or group says of itself: its zarr.json. ValueError where it has none.

    >>> read_description(store.path)["node_type"]
    'group'
    """
    described = read_json(inside(folder, "zarr.json"), "the description")
    if not isinstance(described, dict) or described.get("zarr_format") != 3:
        raise ValueError("it is not of Zarr 3")
    return described


def write_file(path: Path, content: Sequence[bytes]) -> str:
    """Write a file of an array, given in parts, and return its digest. It is there whole or as it was before.

    >>> write_file(Path("c/0"), [b"ab", b"c"]) == digest_of(Path("c/0"))
    True
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.partial")
    try:
        with part.open("wb") as file:
            file.writelines(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return digest_of(content)


def digest_of(content: Sequence[bytes] | Path) -> str:
    """The digest of a file or of its parts, as stores record it: BLAKE2b of 16 bytes, in hexadecimal.

    >>> digest_of([b"ab", b"c"])
    'cf4ab791c62b8d2b2109c90275287816'
    """
    if not isinstance(content, Path):
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for part in content:
            digest.update(part)
        return digest.hexdigest()
    with content.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()
