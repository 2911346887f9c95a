"""How fast random tiles are read, which decides how fast image-space training can be.

    python benchmarks/tile_store.py [--tiles 2048] [--reads 400] [--rounds 7]

Writes tiles cut at random from the demo slide into a store in a temporary folder, then reads single random tiles
through zarr, as the toolkit reads them, and from one PNG file per tile. The ways take turns, so that what
else the machine does falls on all of them; printed are medians over the rounds, and ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import zarr
from PIL import Image

from ldm.data.store_writers import TileStoreWriter
from ldm.data.tile_store import TileStore
from ldm.images.slides import open_slide

SLIDE = Path(__file__).resolve().parent.parent / "data" / "demo" / "CMU-1-Small-Region.svs"
SIDE = 256


def write(folder: Path, count: int) -> tuple[TileStore, Path, float]:
    """The store, a folder of the same tiles as PNG, and the seconds that writing the store took."""
    slide = open_slide(SLIDE)
    pixels = slide.read(0, 0, *slide.dimensions)
    rng = np.random.default_rng(0)
    coords = np.stack([rng.integers(0, d - SIDE, count) for d in slide.dimensions], 1)
    tiles = np.stack([pixels[y : y + SIDE, x : x + SIDE] for x, y in coords])
    attrs = {"slide": SLIDE.name, "mpp": slide.mpp, "tile_size": SIDE, "stride": SIDE}
    attrs |= {"level0_size": list(slide.dimensions), "downsample": 1.0}
    start = time.perf_counter()
    with TileStoreWriter.create(folder / "a.zarr", count, attrs) as writer:
        for first in range(0, count, 256):
            writer.append(tiles[first : first + 256], coords[first : first + 256])
    seconds = time.perf_counter() - start
    (folder / "png").mkdir()
    for row, tile in enumerate(tiles):
        Image.fromarray(tile).save(folder / "png" / f"{row}.png", compress_level=6)
    return TileStore.open(folder / "a.zarr"), folder / "png", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiles", type=int, default=2048)
    parser.add_argument("--reads", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store, png, seconds = write(Path(scratch), options.tiles)
        size = sum(p.stat().st_size for p in store.path.rglob("*") if p.is_file())
        raw = options.tiles * SIDE * SIDE * 3
        default = zarr.open_array(str(store.path / "tiles"), mode="r")
        ways: dict[str, Callable[[int], object]] = {
            "zarr": lambda row: default[row],
            "TileStore": store.tile,
            "PNG files": lambda row: np.asarray(Image.open(png / f"{row}.png")),
        }
        rng = np.random.default_rng(1)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            rows = rng.integers(0, options.tiles, options.reads).tolist()
            for name, read in ways.items():
                start = time.perf_counter()
                for row in rows:
                    read(row)
                times[name].append((time.perf_counter() - start) / options.reads * 1e3)
    rate = options.tiles / seconds
    print(f"{options.tiles} tiles of {SIDE} px: written at {rate:.0f} tiles/s, {size / raw:.2f} of raw size")
    base = median(times["zarr"])
    for name, each in times.items():
        ms = median(each)
        print(
            f"{name:>13}: {ms:.2f} ms per random tile ({min(each):.2f}..{max(each):.2f}), "
            f"{base / ms:.2f} times as fast as zarr"
        )


if __name__ == "__main__":
    main()
