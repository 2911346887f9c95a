"""How fast slides are tiled, beside a plain loop of OpenSlide that reads the same tiles and keeps none of them.

    python benchmarks/tiling.py [--slide FILE] [--strides 256 128] [--rounds 3]

Without --slide the demo slide is laid sixteen times into one of 8880 x 11868 px with a pyramid. `tile_slides` does all
that it does: tissue, labels of quality, compression, digests, files. CPU time in one thread, since the time on the
clock says little on machines that do other things too; the ways take turns, and printed are medians. LazySlide, where
it is installed, finds tissue and tiles, and reads the tiles as its own iterator gives them.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import openslide
import tifffile

from data_prep.tile_slides import tile_slide
from ldm.data.tile_store import TileStore
from ldm.images.slides import open_slide

SLIDE = Path(__file__).resolve().parent.parent / "data" / "demo" / "CMU-1-Small-Region.svs"
SIDE = 256


def large_slide(path: Path, times: int = 4) -> Path:
    """The demo slide, `times` x `times` of it side by side, as Aperio writes slides: tiles of 240 px, a pyramid."""
    slide = open_slide(SLIDE)
    pixels = np.tile(slide.read(0, 0, *slide.dimensions), (times, times, 1))
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for factor in (1, 4, 16):
            height, width = (side // factor * factor for side in pixels.shape[:2])
            level = pixels[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
            level = level.mean((1, 3), dtype=np.float32).round().astype(np.uint8) if factor > 1 else pixels
            about = f"Aperio Image Library v11\r\n{width}x{height} |AppMag = 20|MPP = {slide.mpp}"
            how = {"tile": (240, 240), "photometric": "rgb", "compression": "jpeg", "metadata": None}
            file.write(level, description=about, **how)
    return path


def plain_loop(path: Path, corners: list[tuple[int, int]]) -> int:
    """What everybody writes first; how many tiles it read."""
    slide = openslide.OpenSlide(str(path))
    for corner in corners:
        np.asarray(slide.read_region(corner, 0, (SIDE, SIDE)).convert("RGB"))
    return len(corners)


def lazyslide(path: Path, stride: int) -> int:
    """Tissue and tiles as LazySlide finds them, and the tiles' pixels; how many there were."""
    import lazyslide as zs
    from wsidata import open_wsi

    slide = open_wsi(str(path), store=None)
    zs.pp.find_tissues(slide)
    zs.pp.tile_tissues(slide, SIDE, stride_px=stride, mpp=slide.properties.mpp)
    return sum(np.asarray(tile.image).shape == (SIDE, SIDE, 3) for tile in slide.iter.tile_images("tiles"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slide", type=Path)
    parser.add_argument("--strides", type=int, nargs="+", default=[SIDE, SIDE // 2])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = options.slide or large_slide(Path(scratch) / "large.svs")
        print(f"{path.name}: {' x '.join(map(str, open_slide(path).dimensions))} px, {options.rounds} rounds")
        for stride in options.strides:
            compare(path, Path(scratch) / "out", stride, options.rounds)


def compare(path: Path, out: Path, stride: int, rounds: int) -> None:
    """Print the CPU time per tile of each way."""
    store = TileStore.open(tile_slide(path, out, stride=stride, workers=1, previews=False))
    corners = [tuple(corner) for corner in store.coords.tolist()]

    def ours() -> int:
        shutil.rmtree(out)
        return len(TileStore.open(tile_slide(path, out, stride=stride, workers=1, previews=False)))

    ways: dict[str, Callable[[], int]] = {"OpenSlide, a plain loop": lambda: plain_loop(path, corners)}
    ways |= {"tile_slides": ours}
    if importlib.util.find_spec("lazyslide"):
        ways["LazySlide"] = lambda: lazyslide(path, stride)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            count = way()
            times[name].append((time.process_time() - start) / count * 1e3)
    shutil.rmtree(out)
    base = median(times["OpenSlide, a plain loop"])
    print(f"a tile every {stride} px: {len(corners)} tiles of {SIDE} px")
    for name, each in times.items():
        spent = median(each)
        print(f"  {name:<24} {spent:5.2f} ms CPU a tile, {base / spent:5.2f} of the loop's speed")


if __name__ == "__main__":
    main()
