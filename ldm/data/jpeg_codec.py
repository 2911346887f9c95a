"""Tiles as JPEG in Zarr arrays: the codec `histoldm.jpeg`, which turns a chunk of one tile (1,T,T,3) uint8 into a JPEG.

Colours are not subsampled (4:4:4). Zarr readers without this toolkit say that they know no codec of this name; after
`import ldm.data.jpeg_codec`, or where the toolkit is installed, zarr itself reads such arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import imagecodecs
import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.registry import register_codec

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

NAME = "histoldm.jpeg"


def encode(tile: np.ndarray, quality: int) -> bytes:
    """A tile (T,T,3) uint8 as JPEG.

    >>> encode(tile, 90)[:3].hex()
    'ffd8ff'
    """
    return bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), quality, subsampling="444"))


def decode(data: bytes, into: np.ndarray) -> None:
    """Decode a JPEG into a tile (T,T,3). ValueError where it is none, or of another size.

    >>> decode(encode(tile, 90), again := np.empty_like(tile))
    >>> bool(np.abs(again.astype(int) - tile).mean() < 3)
    True
    """
    try:
        imagecodecs.jpeg8_decode(data, out=into)
    except (imagecodecs.Jpeg8Error, ValueError) as error:
        raise ValueError(f"it cannot be decoded ({error})") from None


@dataclass(frozen=True)
class JpegCodec(ArrayBytesCodec):
    """The codec, as zarr takes it. quality: 1 to 100."""

    is_fixed_size = False
    quality: int = 90

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        return {"name": NAME, "configuration": {"quality": self.quality}}

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        rows = np.empty(chunk_spec.shape, np.uint8)
        decode(chunk_bytes.to_bytes(), rows[0])
        return chunk_spec.prototype.nd_buffer.from_numpy_array(rows)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return chunk_spec.prototype.buffer.from_bytes(encode(chunk_array.as_numpy_array()[0], self.quality))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError  # it depends on the tile


register_codec(NAME, JpegCodec)
