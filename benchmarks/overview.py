"""Does a large image agree with its overview, and is it still an image of the model? One region of a slide.

    python benchmarks/overview.py                                   # the demo's student, 1024 x 1024 px, 16 px a pixel
    python benchmarks/overview.py --model data/models/demo-ssl --factor 32 --out out/overview

The region's features condition every image. Its overviews: none; the region itself, shrunk; the same turned by 180
degrees, which contradicts the features; the same with 15% less green. Printed for each image, of its means over blocks
of an overview's pixel and of four times that, beside those of the overview (the region's own, where there is none):

r           correlation, mean of the three channels
off         mean absolute difference, of 255
hue         correlation of red less green
seams       gradient across the borders of tiles over that beside them, like for like (`ldm.metrics.seams`); low and
            high: 95% of the same of other lattices
detail      mean absolute difference of neighbouring pixels, over the real region's
time        CPU seconds, of sampling, decoding and learning to read colours
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from conditioning import read_region
from large_image import tile_features

import ldm
from ldm.devices import pick_device
from ldm.encoders.encoder import load_encoder
from ldm.errors import UserError, run_command
from ldm.files import writable_folder
from ldm.images.write import save_png, to_uint8
from ldm.metrics.seams import NEAR, seam_ratios


def shrunk(image: np.ndarray, factor: int) -> np.ndarray:
    """(h,w,3), means over blocks of an image (H,W,3).

    >>> shrunk(np.arange(4.0).reshape(2, 2, 1).repeat(3, 2), 2)
    array([[[1.5, 1.5, 1.5]]])
    """
    height, width = (side // factor for side in image.shape[:2])
    return image.astype(np.float64).reshape(height, factor, width, factor, 3).mean((1, 3))


def agreement(image: np.ndarray, low: np.ndarray) -> list[float]:
    """r, off and hue of the means of blocks of an image (H,W,3) and an overview (h,w,3) in 0..255."""
    own = shrunk(image, image.shape[0] // len(low))
    r = np.mean([np.corrcoef(own[..., i].ravel(), low[..., i].ravel())[0, 1] for i in range(3)])
    hue = np.corrcoef((own[..., 0] - own[..., 1]).ravel(), (low[..., 0] - low[..., 1]).ravel())[0, 1]
    return [float(r), float(np.abs(own - low).mean()), float(hue)]


def detail(image: np.ndarray) -> float:
    """Mean absolute difference of neighbours across an image (H,W,3)."""
    return float(np.abs(np.diff(image.mean(2), axis=1)).mean())


def run(options: argparse.Namespace) -> None:
    if options.out:
        writable_folder(options.out)
    model = ldm.load_model(options.model, pick_device(options.device))
    real = read_region(options.slide, options.region)
    far = 4 * options.factor
    if any(side % far for side in real.shape[:2]):
        raise UserError(f"--region is of whole blocks of {far} px; it has {real.shape[1]} x {real.shape[0]} px")
    grid = tile_features(load_encoder(options.encoder), real, model.tile_size, options.stride)
    low = shrunk(real, options.factor)
    sampler = ldm.Sampler(seed=options.seed, batch_size=4, progress=False)
    windows = ldm.Windows(overview_strength=options.strength)
    columns = ("r", "off", "hue", f"r, {far} px", "off", "hue", "seams", "low", "high", "detail", "time")
    print(" " * 10 + "".join(f"{name:>11}" for name in columns))
    for name, told in {"none": None, "its own": low, "turned": low[::-1, ::-1], "tinted": low * (1, 0.85, 1)}.items():
        begun = time.process_time()
        given = None if told is None else (told / 127.5 - 1).transpose(2, 0, 1).astype(np.float32)
        made = ldm.large_image(model, grid, real.shape[:2], sampler, windows, overview=given)
        seconds, image, wanted = time.process_time() - begun, to_uint8(made)[0], low if told is None else told
        figures = [*agreement(image, wanted), *agreement(image, shrunk(np.ascontiguousarray(wanted), 4))]
        seams = seam_ratios(image, model.tile_size, NEAR)
        figures += [seams[0], *np.percentile(seams[1:], (2.5, 97.5)), detail(image) / detail(real), seconds]
        print(f"{name:10}" + "".join(f"{value:11.3f}" for value in figures), flush=True)
        if options.out:
            save_png(options.out / f"{name.replace(' ', '-')}.png", image, {"overview": name, "seed": options.seed})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("data/models/demo-ssl-student"), help="model folder (default %(default)s)")
    add("--encoder", default="data/models/demo-encoder", help="that made its features (default %(default)s)")
    add("--slide", type=Path, default=Path("data/demo/CMU-1-Small-Region.svs"), help="(default %(default)s)")
    add("--region", default="896,1472,1024,1024", help="x,y,width,height in level-0 px (default %(default)s)")
    add("--factor", type=int, default=16, help="pixels of the image along one of the overview (default %(default)s)")
    add("--stride", type=int, default=64, help="pixels between features (default %(default)s)")
    add("--strength", type=float, default=1.0, help="overview_strength (default %(default)s)")
    add("--seed", type=int, default=0, help="of the images (default %(default)s)")
    add("--device", default="auto", help="(default %(default)s)")
    add("--out", type=Path, help="folder for the images")
    options = parser.parse_args(argv)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
