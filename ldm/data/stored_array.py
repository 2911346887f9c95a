"""Arrays of tile stores as they are read: what is missing or broken on disk is an error and never a zero."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from ldm.data.shards import codec_settings
from ldm.errors import UserError

AGAIN = "copy the whole store again, or delete that folder and make it again"


class StoredArray:
    """A zarr array, read-only, through the fastest pipeline there is. Indexing gives NumPy arrays.

    Writers write every chunk, also those of zeros, so that a file which is not there was lost; zarr itself would fill
    its place with zeros.

    Attributes:
        path: the array's folder. shape, dtype, chunks, shards, attrs: as zarr has them.
    Raises:
        UserError: no array there, attributes that cannot be read, a shard that is missing; when it is indexed, one
            that is broken.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with zarr.config.set(codec_settings()):
                self._array = zarr.open_array(str(self.path), mode="r")
        except Exception as error:  # zarr has no error of its own for what it cannot read
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"the array {self.path} cannot be opened ({reason}); {AGAIN}.") from None
        self.attrs: dict[str, Any] = self._array.attrs.asdict()
        shards = self.files()
        if lost := [file for file in shards if not file.is_file()]:
            first = lost[0].relative_to(self.path)
            raise UserError(f"{self.path} lacks {len(lost)} of {len(shards)} shards ({first} ...); {AGAIN}.")

    def files(self) -> list[Path]:
        """The files that hold the rows, in their order: shards, or chunks where there are none."""
        outer = self.shards or self.chunks
        counts = [range(-(-side // part)) for side, part in zip(self.shape, outer)]
        key = self._array.metadata.chunk_key_encoding.encode_chunk_key
        return [self.path / key(place) for place in product(*counts)]

    @property
    def chunks(self) -> tuple[int, ...]:
        return self._array.chunks

    @property
    def shards(self) -> tuple[int, ...] | None:
        return self._array.shards

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        try:
            return self._array[key]
        except IndexError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.path}[{key}] cannot be read: {reason}; {AGAIN}.") from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)
