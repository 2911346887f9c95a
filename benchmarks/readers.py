"""How readers of slides compare: what they open, whether they give the same pixels, how long a tile takes.

    python benchmarks/readers.py [--slides FILE ...] [--tiles 400] [--rounds 3]

Each slide is read by `open_image`, as this toolkit reads it, and by OpenSlide, tiffslide, fastslide and wsidicom, as
far as they are installed: `pip install tiffslide fastslide wsidicom`; wsidata has no reader of its own, it takes one of
these. Without --slides that is the demo slide laid sixteen times into one, as SVS, as OME-TIFF and as a TIFF with a
pyramid, as this toolkit writes them. Printed are the scale that each finds, the share of pixel values that are those of
`open_image`, and the CPU time of a tile of 256 px: opened anew, each tile once, row by row, as slides are tiled; the
median over rounds in which the readers take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import tifffile
from tiling import large_slide

from ldm.images.slides import open_image
from ldm.images.write import save_bigtiff

SIDE = 256

Read = Callable[[int, int], np.ndarray]  # x, y -> (SIDE, SIDE, 3) uint8, white where transparent
Opened = tuple[Read, object]  # and the micrometres per pixel, as it says them


def open_slide(path: Path) -> Opened:
    slide = open_image(path)
    return lambda x, y: slide.read(x, y, SIDE, SIDE), slide.mpp


def openslide(path: Path) -> Opened:
    from openslide import PROPERTY_NAME_MPP_X, OpenSlide

    slide = OpenSlide(str(path))
    mpp = slide.properties.get(PROPERTY_NAME_MPP_X)
    return lambda x, y: rgb(np.asarray(slide.read_region((x, y), 0, (SIDE, SIDE)))), mpp


def tiffslide(path: Path) -> Opened:
    from tiffslide import PROPERTY_NAME_MPP_X, TiffSlide

    slide = TiffSlide(path)

    def read(x: int, y: int) -> np.ndarray:
        return rgb(slide.read_region((x, y), 0, (SIDE, SIDE), as_array=True))

    return read, slide.properties.get(PROPERTY_NAME_MPP_X)


def fastslide(path: Path) -> Opened:
    from fastslide import FastSlide

    slide = FastSlide.from_file_path(str(path))
    return lambda x, y: rgb(slide.read_region((x, y), 0, (SIDE, SIDE)).to_interleaved().numpy()), slide.mpp[0]


def wsidicom(path: Path) -> Opened:
    from wsidicom import WsiDicom

    slide = WsiDicom.open(path)
    return lambda x, y: rgb(np.asarray(slide.read_region((x, y), 0, (SIDE, SIDE)))), slide.levels.base_level.mpp.width


def rgb(pixels: np.ndarray) -> np.ndarray:
    """On white, where there is opacity."""
    if pixels.shape[-1] == 3:
        return pixels
    opacity = pixels[..., 3:].astype(np.float32) / 255
    return np.where(opacity == 1, pixels[..., :3], pixels[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)


READERS = (open_slide, openslide, tiffslide, fastslide, wsidicom)


def samples(folder: Path) -> list[Path]:
    """The demo slide, enlarged, and its pixels in other formats."""
    path = large_slide(folder / "demo.svs")
    slide = open_image(path)
    pixels = slide.read(0, 0, *slide.dimensions)
    about = {"axes": "YXS", "PhysicalSizeX": slide.mpp, "PhysicalSizeY": slide.mpp}
    how = {"tile": (256, 256), "compression": "jpeg", "photometric": "rgb"}
    with tifffile.TiffWriter(folder / "demo.ome.tif", ome=True) as file:
        file.write(pixels, subifds=2, metadata=about | {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}, **how)
        for step in (4, 16):  # a pyramid as Bio-Formats and QuPath write it
            file.write(np.ascontiguousarray(pixels[::step, ::step]), subfiletype=1, metadata=None, **how)
    return [path, folder / "demo.ome.tif", save_bigtiff(folder / "demo.tif", pixels, slide.mpp, {})]


def compare(path: Path, tiles: int, rounds: int) -> None:
    """Print what each reader makes of a slide."""
    width, height = open_image(path).dimensions
    print(f"{path.name}: {width} x {height} px")
    corners = [(x, y) for y in range(0, height - SIDE + 1, SIDE) for x in range(0, width - SIDE + 1, SIDE)][:tiles]
    ways, scales, wanted = {}, {}, None
    for opener in READERS:
        name = opener.__name__
        if opener is not open_slide and not importlib.util.find_spec(name):
            continue
        try:
            read, scales[name] = opener(path)
            got = np.stack([read(x, y) for x, y in corners[:50]]).astype(int)
        except Exception as error:  # readers raise what they like
            print(f"  {name:<10} cannot: {type(error).__name__}: {' '.join(str(error).split())[:90]}")
            continue
        wanted = got if wanted is None else wanted
        apart = np.abs(got - wanted)
        ways[opener] = f"{(apart == 0).mean():.2%} of values equal" + (
            f", at most {apart.max()} apart" * bool(apart.any())
        )
    times: dict[str, list[float]] = {opener.__name__: [] for opener in ways}
    for _ in range(rounds):
        for opener in ways:
            start = time.process_time()
            read, _ = opener(path)
            for x, y in corners:
                read(x, y)
            times[opener.__name__].append((time.process_time() - start) / len(corners) * 1e3)
    for name, same in zip(times, ways.values()):
        print(f"  {name:<10} {median(times[name]):6.2f} ms CPU a tile, {scales[name] or 'no'} um per pixel, {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slides", type=Path, nargs="+")
    parser.add_argument("--tiles", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for path in options.slides or samples(Path(scratch)):
            compare(path, options.tiles, options.rounds)


if __name__ == "__main__":
    main()
