"""What comes back when an image is inverted and decoded under its own condition, and what that costs.

    python benchmarks/inversion.py [--model data/models/demo-ssl] [--images SLIDE_OR_STORE] [--count 4] [--device cpu]

Real tiles, each with its own features, go up the noise levels and down again. Printed for each procedure: network
evaluations up and down for each image, seconds, PSNR against the first stage's own reconstruction (what the diffusion
model loses) and against the image (what both lose). The last rows are the published loop, DDIM over all 1000 levels,
and the procedures here that reach its PSNR with at most a twentieth of its evaluations.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.convert import load_model
from ldm.data.tile_store import open_cohort
from ldm.diffusion import samplers, schedules
from ldm.encoders.encoder import load_encoder
from ldm.images.slides import open_image
from ldm.metrics.pairs import psnr
from ldm.sampling.canvas import encode_images
from ldm.sampling.inversion import invert, invert_exactly, invertible
from ldm.sampling.sampler import Sampler

ROOT = Path(__file__).resolve().parent.parent


class Counted:
    """A denoiser that counts the images it evaluates."""

    def __init__(self, denoiser):
        self.denoiser, self.rows = denoiser, 0

    def __call__(self, x: Tensor, sigma: Tensor, cond) -> Tensor:
        self.rows += len(x)
        return self.denoiser(x, sigma, cond)


def real_tiles(path: Path, side: int, count: int) -> Tensor:
    """Tiles (N,3,side,side) in [-1,1] of a store, or of a slide, the most textured ones of a grid."""
    if path.is_dir():
        (store, *_) = open_cohort(path)
        rows = np.linspace(0, len(store) - 1, count).round().astype(int)
        tiles = np.stack([store.tile(int(row)) for row in rows])
    else:
        slide = open_image(path)
        corners = [
            (x, y)
            for x in range(0, slide.dimensions[0] - side, side)
            for y in range(0, slide.dimensions[1] - side, side)
        ]
        found = sorted((slide.read(x, y, side, side) for x, y in corners), key=lambda tile: -tile.std())
        tiles = np.stack(found[: len(found) // 2 : max(1, len(found) // 2 // count)][:count])
    return torch.from_numpy(tiles).movedim(-1, 1).float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "data/models/demo-ssl")
    parser.add_argument("--encoder", default=str(ROOT / "data/models/demo-encoder"))
    parser.add_argument("--images", type=Path, default=ROOT / "data/demo/CMU-1-Small-Region.svs")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="without the published loop of 1000 levels")
    given = parser.parse_args()
    model = load_model(given.model, given.device)
    side = model.tile_size
    images = real_tiles(given.images, side, given.count).to(given.device)
    keys = {} if model.cond_stage_model is None else model.cond_stage_model.describe()
    cond = model.null_condition()
    if any(about.kind == "features" for about in keys.values()):
        cond = model.condition(features=load_encoder(given.encoder, device=given.device)(images))
    latents = encode_images(model, images)
    cond = {part: value.expand(len(images), *value.shape[1:]) for part, value in cond.items()}
    with torch.no_grad():
        again = model.decode(latents).clamp(-1, 1)
    alone = psnr(again, images).mean()
    print(f"{given.model.name}, {len(images)} tiles of {side} px; first stage alone: {alone:.1f} dB")
    print(f"{'procedure':<44}{'up':>7}{'down':>7}{'s':>8}{'dB of latent':>14}{'dB of image':>13}")
    runs = [("DDIM, 50 steps, uniform", "euler", 50, "uniform", None)]
    runs += [(f"DDIM, {n} steps", "euler", n, "karras", None) for n in (25, 50)]
    runs += [(f"DPM-Solver++(2M), {n} steps", "dpmpp_2m", n, "karras", None) for n in (15, 25, 50)]
    runs += [("Heun, 25 steps", "heun", 25, "karras", None)]
    runs += [("DDIM, 50 steps, exact", "euler", 50, "karras", 1e-3)]
    measures = []
    for name, solver, steps, schedule, tolerance in runs:
        levels = invertible(Sampler(steps=steps, schedule=schedule).settled(model, "invert").sigmas(model))
        up = invert if tolerance is None else partial(invert_exactly, tolerance=tolerance)
        measures.append(measure(model, name, solver, levels, up, latents, cond, again, images))
    if given.quick or not hasattr(model.denoiser(), "table"):
        return
    levels = schedules.table_sigmas(model.sigmas, len(model.sigmas))
    loop = measure(model, "DDIM, all levels (published)", "euler", levels, invert, latents, cond, again, images)
    for name, cost, _, _, of_image in measures:
        if 20 * cost <= loop[1] and of_image >= loop[4] - 0.1:
            print(f"equal to it within 0.1 dB of the image: {name}, {loop[1] / cost:.0f} times fewer evaluations")


def measure(model, name, solver, levels, up, latents, cond, again, images) -> tuple[str, float, float, float, float]:
    run, denoiser = getattr(samplers, f"sample_{solver}"), Counted(model.denoiser())
    begin = time.perf_counter()
    latent = up(denoiser, latents, levels, cond, run)
    before = denoiser.rows
    found = run(denoiser, latent, levels, cond)
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        made = model.decode(found).clamp(-1, 1)
    counts = [rows / len(images) for rows in (before, denoiser.rows - before)]
    of_latent, of_image = (float(psnr(made, wanted).mean()) for wanted in (again, images))
    print(f"{name:<44}{counts[0]:>7.0f}{counts[1]:>7.0f}{seconds:>8.1f}{of_latent:>14.1f}{of_image:>13.2f}", flush=True)
    return name, sum(counts), seconds, of_latent, of_image


if __name__ == "__main__":
    main()
