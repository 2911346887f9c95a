"""Zarr folders that others wrote: all that they name lies in them, and their chunks are no larger than can be held."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.foreign.budget import afford
from ldm.foreign.paths import allowed, lies_in
from ldm.foreign.settings import read_json

DESCRIPTIONS = ("zarr.json", ".zarray")  # of Zarr 3, of arrays of Zarr 2
FEW = 1_000_000  # chunks that may lack a file: those of the fill value are left out
SPARSE = 4096  # chunks to a file: in a shard, or left out
# codecs that turn bytes to numbers and texts and do nothing else, by the names of both versions; the JPEG is this
# toolkit's, see `ldm.data.jpeg_codec`
CODECS = {
    "adler32", "astype", "bitround", "blosc", "bytes", "bz2", "crc32", "crc32c", "delta", "fixedscaleoffset",
    "fletcher32", "gzip", "histoldm.jpeg", "lz4", "lzma", "packbits", "quantize", "sharding_indexed", "shuffle",
    "transpose", "vlen-bytes", "vlen-utf8", "zlib", "zstd",
}  # fmt: skip


def check_zarr(path: Path) -> None:
    """UserError unless a Zarr folder can be read: no link in it leads out, no codec does more than decode, no array has
    far more chunks than files or chunks that take more memory than there is.

    >>> check_zarr(store.path)
    """
    root = allowed(path).resolve()
    try:
        places = (root, *filter(Path.exists, map(root.joinpath, DESCRIPTIONS)))
        _check(root, tuple(os.stat(place).st_mtime_ns for place in places))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error


@lru_cache(256)
def _check(root: Path, stamps: tuple[int, ...]) -> None:
    """stamps: of what was looked at before; an image is opened for each of its parts."""
    files: Counter[str] = Counter()
    described, left = [], [str(root)]
    while left:
        folder = left.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and not lies_in(Path(entry.path), root):
                    raise UserError(
                        f"{entry.path} is a link that leads out of {root}: a Zarr is read from its own folder alone. "
                        "If you trust it, copy the file there."
                    )
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                    continue
                if not entry.is_file():
                    allowed(entry.path)  # no pipe
                files[folder] += 1
                if entry.name in DESCRIPTIONS:
                    described.append(Path(entry.path))
    for path in described:
        told, folder = read_json(path), str(path.parent)
        if isinstance(told, Mapping) and (path.name == ".zarray" or told.get("node_type") == "array"):
            held = sum(count for name, count in files.items() if name == folder or name.startswith(folder + os.sep))
            check_array(told, path.parent, held)


def check_array(told: Mapping[str, Any], folder: Path, held: int = 0) -> None:
    """UserError for the description of an array that is none which can be read. held: the files in its folder.

    >>> told = {"shape": [4], "chunks": [4], "dtype": "|u1", "compressor": {"id": "pickle"}, "filters": None}
    >>> check_array(told, Path("a.zarr"))
    Traceback (most recent call last):
    ldm.errors.UserError: a.zarr is packed by the codec 'pickle', which is none that is read here.
    """
    for name in _codecs(told.get("codecs") or [told.get("compressor"), *(told.get("filters") or ())]):
        if name.removeprefix("numcodecs.") not in CODECS:
            raise UserError(f"{folder} is packed by the codec {name!r}, which is none that is read here.")
    try:
        shape = [int(side) for side in told["shape"]]
        parts = told["chunks"] if "chunks" in told else told["chunk_grid"]["configuration"]["chunk_shape"]
        chunk = [int(side) for side in parts]
        if len(chunk) != len(shape) or min([0, *shape]) < 0 or min([1, *chunk]) < 1:
            raise ValueError("its chunks do not divide it")
        count = math.prod(-(-side // part) for side, part in zip(shape, chunk))
        if (own := (told.get("codecs") or [{}])[0]).get("name") == "sharding_indexed":
            inner = [int(side) for side in own["configuration"]["chunk_shape"]]
            count, chunk = count * math.prod(-(-whole // part) for whole, part in zip(chunk, inner)), inner
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{folder} does not say its shape and its chunks ({error}); copy it again.") from error
    if count > max(FEW, SPARSE * held):
        raise UserError(
            f"{folder} would have {count} chunks of an array of shape {tuple(shape)}, and {held} files are there for "
            "them: it is damaged, or made to exhaust the machine."
        )
    afford(2 * math.prod(chunk) * _width(told), f"a chunk of {folder}")


def _codecs(listed: Any) -> Iterator[str]:
    """Names of codecs, those within shards too."""
    for codec in listed if isinstance(listed, list) else ():
        if isinstance(codec, Mapping):
            yield str(codec.get("name", codec.get("id")))
            inner = codec.get("configuration")
            for part in ("codecs", "index_codecs"):
                yield from _codecs(inner.get(part) if isinstance(inner, Mapping) else None)


def _width(told: Mapping[str, Any]) -> int:
    """Bytes of a value; 16 of texts, whose lengths are not known."""
    try:
        return max(1, np.dtype(told.get("dtype") or told["data_type"]).itemsize)
    except (TypeError, KeyError, ValueError):
        return 16
