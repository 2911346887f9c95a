"""Arrays of tile stores as they are read: what is missing or broken on disk is an error and never a zero."""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ldm.data.shard_files import Layout, read_description
from ldm.errors import UserError
from ldm.foreign.shape import LIST, check_shape, maybe
from ldm.foreign.zarrs import check_array, check_zarr

AGAIN = "copy the whole store again, or delete that folder and make it again"
DIGESTS = "digests"  # attribute: the digest of each file in the order of its rows, see `ldm.data.shard_files.digest_of`


class RowArray(ABC):
    """An array that is read by its rows; indexing gives NumPy arrays, as those of NumPy do.

    Attributes:
        path: where it is, for messages.
    """

    path: Path

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def dtype(self) -> np.dtype: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop, a copy."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        try:
            return self._take(key)
        except (IndexError, UserError):
            raise
        except Exception as error:
            raise UserError(f"{self.path}[{key}] cannot be read: {_reason(error)}; {AGAIN}.") from None

    def _take(self, key: Any) -> np.ndarray:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self.read(start, max(start, stop)) if step == 1 else self._take(np.arange(start, stop, step))
        if isinstance(key, tuple) and key and key[0] is not Ellipsis:
            rows, rest = self._take(key[0]), key[1:]
            return rows[rest] if rows.ndim < self.ndim else rows[(slice(None), *rest)]
        if isinstance(key, (list, np.ndarray)):
            chosen = np.arange(len(self))[np.asarray(key, None if len(key) else int)]
            rows = np.empty((chosen.size, *self.shape[1:]), self.dtype)
            for place, row in enumerate(chosen.flat):
                rows[place] = self._take(int(row))
            return rows.reshape(*chosen.shape, *self.shape[1:])
        if key is Ellipsis or isinstance(key, tuple):
            return self.read(0, len(self))[key]
        row = operator.index(key)
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.path} has rows 0..{len(self) - 1}, asked for {row}")
        row %= len(self)
        return self.read(row, row + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


class StoredArray(RowArray):
    """A Zarr array, read-only.

    Writers write every chunk, also those of zeros, so that a file which is not there was lost; zarr itself would fill
    its place with zeros.

    Args:
        path: the array's folder.
        allow_lost: open it where files are missing too; reading these is still an error.
    Attributes:
        path: the array's folder. shape, dtype, chunks, shards: as zarr has them.
        attrs: what it says of itself, but for `digests`: those of its files, None where it has none recorded.
        layout: of its files; None where others wrote them in another way, and zarr reads them.
    Raises:
        UserError: no array there, attributes that cannot be read, a shard that is missing; when it is indexed, one
            that is broken.
    """

    def __init__(self, path: Path | str, allow_lost: bool = False) -> None:
        self.path = Path(path)
        try:
            described = read_description(self.path)
            self.layout = Layout.of(described)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.layout = None  # zarr says why
        try:
            check_array(described, self.path) if self.layout else check_zarr(self.path)
            self._array = zarr.open_array(str(self.path), mode="r", zarr_format=3) if self.layout is None else None
            attrs = described.get("attributes", {}) if self.layout else self._array.attrs.asdict()
            check_shape(attrs, {f"{DIGESTS}?": maybe(LIST)}, "what it says of itself")
        except Exception as error:  # zarr has no error of its own for what it cannot read
            raise UserError(f"the array {self.path} cannot be opened ({_reason(error)}); {AGAIN}.") from None
        self._shape = self.layout or self._array
        self.attrs: dict[str, Any] = {name: value for name, value in attrs.items() if name != DIGESTS}
        self.digests: list[str] | None = attrs.get(DIGESTS)
        files = self.files()
        if not allow_lost and (lost := [file for file in files if not file.is_file()]):
            first = lost[0].relative_to(self.path)
            raise UserError(f"{self.path} lacks {len(lost)} of {len(files)} shards ({first} ...); {AGAIN}.")
        root = os.path.realpath(self.path) + os.sep
        if out := [file for file in files if not os.path.realpath(file).startswith(root)]:
            raise UserError(f"{out[0]} is a link that leads out of {self.path}; copy the file there, if you trust it.")

    def files(self) -> list[Path]:
        """The files that hold the rows, in their order: shards, or chunks where there are none."""
        if self.layout is not None:
            return [self.path / name for name in self.layout.files]
        outer = self.shards or self.chunks
        counts = [range(-(-side // part)) for side, part in zip(self.shape, outer)]
        key = self._array.metadata.chunk_key_encoding.encode_chunk_key
        return [self.path / key(place) for place in product(*counts)]

    @property
    def chunks(self) -> tuple[int, ...]:
        return self._shape.chunks

    @property
    def shards(self) -> tuple[int, ...] | None:
        return self._shape.shards

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape.shape

    @property
    def dtype(self) -> np.dtype:
        return self._shape.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._array[start:stop] if self.layout is None else self.layout.read(self.path, start, stop)

    def _take(self, key: Any) -> np.ndarray:
        return self._array[key] if self.layout is None else super()._take(key)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
