"""Levels of a pyramid: an image and its halvings, in memory or in OME-Zarr, read and written block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from tqdm import tqdm

from ldm.files import awaited
from ldm.images.marks import mark_of, mark_text

TILE = 256
SHARD = 2048  # side of what is written at once, one file
_ACROSS = 4096  # columns of a row of tiles that are read at once
_STRIP = 512  # rows that are halved at once
_COLOURS = dict(zip("RGB", ("FF0000", "00FF00", "0000FF")))


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes (height, width) of an image and its halvings until one tile holds it.

    >>> level_sizes(600, 500)
    [(600, 500), (300, 250), (150, 125)]
    """
    sizes = [(height, width)]
    while max(sizes[-1]) > TILE:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def halved(block: np.ndarray) -> np.ndarray:
    """A block (H,W,3) uint8 at half its size: the mean of every four pixels, of a last row or column of every two.

    >>> halved(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).tolist()
    [[[4, 6, 6]]]
    """
    height, width = (-(-side // 2) for side in block.shape[:2])
    out = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _STRIP):
        part = block[2 * top : 2 * (top + _STRIP)]
        part = np.pad(part, ((0, part.shape[0] % 2), (0, part.shape[1] % 2), (0, 0)), mode="edge")
        mean = part.reshape(-1, 2, width, 2, 3).mean((1, 3), dtype=np.float32)
        out[top : top + len(mean)] = np.round(mean)
    return out


def corners(shape: tuple[int, ...], step: int) -> Iterator[tuple[int, int]]:
    """Top-left corners (y, x) of the blocks that cover an image, row by row.

    >>> list(corners((300, 500, 3), 256))
    [(0, 0), (0, 256), (256, 0), (256, 256)]
    """
    return ((y, x) for y in range(0, shape[0], step) for x in range(0, shape[1], step))


def tiles(pixels: Any, bar: tqdm | None = None) -> Iterator[np.ndarray]:
    """Tiles (256,256,3) of an image row by row; those at the border are filled with its last pixels.

    >>> [part.shape for part in tiles(tile)]
    [(256, 256, 3)]
    """
    height, width = pixels.shape[:2]
    for top in range(0, height, TILE):
        for left in range(0, width, _ACROSS):
            part = np.asarray(pixels[top : min(top + TILE, height), left : min(left + _ACROSS, width)])
            for start in range(0, part.shape[1], TILE):
                tile = part[:, start : start + TILE]
                fill = [(0, TILE - side) for side in tile.shape[:2]]
                yield np.pad(tile, (*fill, (0, 0)), mode="edge")
                if bar is not None:
                    bar.update()


def tile_bar(levels: Sequence[Any], shown: bool = True) -> tqdm:
    """A bar of the tiles of all levels, for `tiles`.

    >>> tile_bar([np.zeros((300, 500, 3))], shown=False).total
    4
    """
    count = sum(-(-each.shape[0] // TILE) * -(-each.shape[1] // TILE) for each in levels)
    return tqdm(total=count, desc="tiles", unit="tile", disable=not shown)


class Level:
    """A level of an OME-Zarr image as an array (H,W,3) uint8 that can be sliced and assigned to.

    patience: seconds for which a network's file system may not know of what other machines wrote.

    >>> folder = create_ome_zarr(Path("a.ome.zarr"), "a", (300, 500), 0.5, {}, shard=256)
    >>> level = Level(folder / "0")
    >>> level[256:300, 0:256] = np.full((44, 256, 3), 7, np.uint8)
    >>> level.shape, int(level[299:300, 0:2].max()), level.left()
    ((300, 500, 3), 7, [(0, 0), (0, 1), (1, 1)])
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        self.folder, self.patience = folder, patience
        with zarr.config.set({"array.write_empty_chunks": True}):  # so that a file says that it is done
            self.array = zarr.open_array(str(folder), mode="r+")
        self.side = (self.array.shards or self.array.chunks)[-1]
        self.shape = (*self.array.shape[1:], 3)

    def __getitem__(self, place: tuple[slice, slice]) -> np.ndarray:
        return np.moveaxis(np.asarray(self.array[(slice(None), *place)]), 0, -1)

    def __setitem__(self, place: tuple[slice, slice], values: np.ndarray) -> None:
        self.array[(slice(None), *place)] = np.moveaxis(values, -1, 0)

    def left(self) -> list[tuple[int, int]]:
        """Blocks (row, col), each one file, that are not written yet."""
        rows, cols = (-(-side // self.side) for side in self.shape[:2])
        blocks = ((row, col) for row in range(rows) for col in range(cols))
        return [(row, col) for row, col in blocks if not self._file(row, col).exists()]

    def place(self, block: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a block."""
        return tuple(
            slice(index * self.side, min((index + 1) * self.side, side)) for index, side in zip(block, self.shape)
        )

    def halved(self, rows: slice, cols: slice) -> np.ndarray:
        """Rows and columns of the next level (h,w,3), from this one."""
        there = tuple(slice(2 * own.start, min(2 * own.stop, side)) for own, side in zip((rows, cols), self.shape))
        if self.patience:
            blocks = (range(own.start // self.side, (own.stop - 1) // self.side + 1) for own in there)
            for row, col in product(*blocks):
                awaited(self._file(row, col), self.patience)
        return halved(self[there])

    def _file(self, row: int, col: int) -> Path:
        return self.folder / "c" / "0" / str(row) / str(col)


def create_ome_zarr(
    path: Path, name: str, size: tuple[int, int], mpp: float, metadata: Mapping[str, Any], shard: int | None = None
) -> Path:
    """An OME-Zarr 0.5 multiscale image without pixels: axes c, y, x in micrometres, levels until one tile holds them.

    size: (height, width). shard: side of a file's part of a level; None: each chunk is a file.

    >>> folder = create_ome_zarr(Path("a.ome.zarr"), "a", (300, 500), 0.5, {})
    >>> [Level(folder / level).shape for level in "01"]
    [(300, 500, 3), (150, 250, 3)]
    """
    sizes, datasets = level_sizes(*size), []
    for i, (height, width) in enumerate(sizes):
        fy, fx = size[0] / height, size[1] / width
        scale = {"type": "scale", "scale": [1.0, mpp * fy, mpp * fx]}
        shift = {"type": "translation", "translation": [0.0, mpp * (fy - 1) / 2, mpp * (fx - 1) / 2]}
        datasets.append({"path": str(i), "coordinateTransformations": [scale, shift]})
    axes = [{"name": "c", "type": "channel"}] + [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    channels = [{"label": n, "color": c, "active": True, "window": window} for n, c in _COLOURS.items()]
    ome = {
        "version": "0.5",
        "multiscales": [{"name": name, "axes": axes, "datasets": datasets, "type": "mean"}],
        "omero": {"channels": channels, "rdefs": {"model": "color"}},
    }
    about = mark_of(metadata) | {"description": mark_text(metadata)}
    zarr.create_group(str(path), attributes={"ome": ome, "histoldm": about})
    for i, sides in enumerate(sizes):
        zarr.create_array(
            str(path / str(i)),
            shape=(3, *sides),
            dtype="u1",
            chunks=(3, TILE, TILE),
            shards=shard and (3, shard, shard),
            dimension_names=("c", "y", "x"),
        )
    return path
