"""How fast tiles are read one at a time in random order, which decides how fast a training on them can be.

    python benchmarks/tile_store.py [--tiles 2048] [--reads 400] [--rounds 7]

The same tiles, cut at random from the demo slide laid sixteen times into one, are written as tile stores (zstd, JPEG,
coordinates alone), and as others keep them: LMDB (JPEG and raw), shards of WebDataset, litdata, a file of PNG each; the
first store is read through zarr too. What is not installed is left out: `pip install lmdb webdataset litdata`. All
JPEGs are the same bytes, decoded by the same library. WebDataset has no random access: it is read from its beginning,
which is less work. One process, files in the page cache. Printed are medians over rounds in which the ways take turns:
CPU time, which does not depend on what else the machine does, tiles of it a second, and how many times as fast the
store without loss is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from itertools import cycle
from pathlib import Path
from statistics import median

import imagecodecs
import numpy as np
import zarr
from PIL import Image
from tiling import large_slide

from ldm.data.jpeg_codec import encode
from ldm.data.slide_tiles import slide_file
from ldm.data.store_writers import ArrayWriter, TileStoreWriter
from ldm.data.tile_store import PIXELS, TileStore
from ldm.images.slides import open_slide

SIDE, QUALITY = 256, 90
SHARD = 256  # tiles in a file of WebDataset

Read = Callable[[int], object]


def write_stores(folder: Path, count: int) -> tuple[dict[str, TileStore], np.ndarray]:
    """Stores of the same tiles by the kind of their pixels, and the tiles."""
    path = large_slide(folder / "large.svs")
    slide = open_slide(path)
    rng = np.random.default_rng(0)
    coords = np.stack([rng.integers(0, d - SIDE, count) for d in slide.dimensions], 1)
    tiles = slide.read_tiles(coords, SIDE, SIDE)
    attrs = {"slide": path.name, "mpp": slide.mpp, "tile_size": SIDE, "stride": SIDE, "downsample": 1.0}
    attrs |= {"level0_size": list(slide.dimensions), "jpeg_quality": QUALITY}
    stores = {}
    for pixels in PIXELS:
        store = folder / f"{pixels}.zarr"
        attrs |= {"pixels": pixels, "slide_file": slide_file(path, store)}
        with TileStoreWriter.create(store, count, attrs) as writer:
            for first in range(0, count, 64):
                writer.append(tiles[first : first + 64], coords[first : first + 64])
        stores[pixels] = TileStore.open(store)
    with ArrayWriter(stores["zstd"].path, "latents/f8", (4, 32, 32), "f2") as writer:
        writer.append(rng.standard_normal((count, 4, 32, 32)).astype(np.float16))
    return stores, tiles


def write_png(folder: Path, tiles: np.ndarray) -> Read:
    folder.mkdir()
    for row, tile in enumerate(tiles):
        Image.fromarray(tile).save(folder / f"{row}.png")
    return lambda row: np.asarray(Image.open(folder / f"{row}.png"))


def write_lmdb(folder: Path, tiles: np.ndarray, jpeg: bool) -> Read:
    import lmdb

    database = lmdb.open(str(folder), map_size=1 << 36, readahead=False)
    with database.begin(write=True) as writer:
        for row, tile in enumerate(tiles):
            writer.put(row.to_bytes(4, "big"), encode(tile, QUALITY) if jpeg else tile.tobytes())

    def read(row: int) -> np.ndarray:
        with database.begin(buffers=not jpeg) as reader:
            data = reader.get(row.to_bytes(4, "big"))
            return (
                imagecodecs.jpeg8_decode(data) if jpeg else np.frombuffer(data, np.uint8).reshape(SIDE, SIDE, 3).copy()
            )

    return read


def write_webdataset(folder: Path, tiles: np.ndarray) -> Read:
    import webdataset

    folder.mkdir()
    for first in range(0, len(tiles), SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as shard:
            for row, tile in enumerate(tiles[first : first + SHARD], first):
                data = encode(tile, QUALITY)
                entry = tarfile.TarInfo(f"{row:08d}.jpg")
                entry.size = len(data)
                shard.addfile(entry, BytesIO(data))

    def samples() -> Iterator[np.ndarray]:
        shards = sorted(map(str, folder.glob("*.tar")))
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            yield imagecodecs.jpeg8_decode(sample["jpg"])

    endless = (sample for _ in cycle([0]) for sample in samples())
    return lambda row: next(endless)


def _litdata_sample(row: int, tiles: np.ndarray) -> dict[str, object]:
    return {"row": row, "jpeg": encode(tiles[row], QUALITY)}


def write_litdata(folder: Path, tiles: np.ndarray) -> Read:
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(folder.with_name("litdata-cache"))
    import litdata

    litdata.optimize(
        partial(_litdata_sample, tiles=tiles), list(range(len(tiles))), str(folder), chunk_bytes="64MB", num_workers=1
    )
    data = litdata.StreamingDataset(str(folder))
    return lambda row: imagecodecs.jpeg8_decode(data[row]["jpeg"])


def ways_to_read(scratch: Path, count: int) -> dict[str, Read]:
    """What is measured: how to read a row."""
    stores, tiles = write_stores(scratch, count)
    through_zarr, latents = zarr.open_array(str(stores["zstd"].path / "tiles"), mode="r"), stores["zstd"].latents("f8")
    ways: dict[str, Read] = {
        "TileStore, zstd": stores["zstd"].tile,
        "TileStore, jpeg": stores["jpeg"].tile,
        "TileStore, none": stores["none"].tile,
        "TileStore, latents": lambda row: latents[row],
        "zarr, zstd": lambda row: through_zarr[row],
        "PNG files": write_png(scratch / "png", tiles),
    }
    others: dict[str, tuple[str, Callable[[], Read]]] = {
        "LMDB, raw": ("lmdb", lambda: write_lmdb(scratch / "raw", tiles, jpeg=False)),
        "LMDB, jpeg": ("lmdb", lambda: write_lmdb(scratch / "jpeg", tiles, jpeg=True)),
        "WebDataset, jpeg": ("webdataset", lambda: write_webdataset(scratch / "wds", tiles)),
        "litdata, jpeg": ("litdata", lambda: write_litdata(scratch / "litdata", tiles)),
    }
    for name, (package, write) in others.items():
        if importlib.util.find_spec(package):
            ways[name] = write()
        else:
            print(f"{name} is left out: {package} is not installed")
    for name in ("TileStore, none", "zarr, zstd", "PNG files", "LMDB, raw"):
        if name in ways and not np.array_equal(ways[name](7), tiles[7]):
            raise SystemExit(f"{name} gives other pixels")
    for name in ("LMDB, jpeg", "litdata, jpeg"):
        if name in ways and not np.array_equal(ways[name](7), stores["jpeg"].tile(7)):
            raise SystemExit(f"{name} gives other pixels")
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiles", type=int, default=2048)
    parser.add_argument("--reads", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ways = ways_to_read(Path(scratch), options.tiles)
        rng = np.random.default_rng(1)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            rows = rng.integers(0, options.tiles, options.reads).tolist()
            for name, read in ways.items():
                start = time.process_time()
                for row in rows:
                    read(row)
                if turn:  # the first opens files
                    times[name].append((time.process_time() - start) / options.reads)
    base = median(times["TileStore, zstd"])
    print(f"{options.tiles} tiles of {SIDE} px, single ones, one process")
    for name, each in times.items():
        spent = median(each)
        print(
            f"  {name:<19} {spent * 1e6:6.0f} us CPU, {1 / spent:7.0f} a second, {spent / base:5.2f} times that of zstd"
        )


if __name__ == "__main__":
    main()
