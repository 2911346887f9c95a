"""Is a model that learnt its images by heart caught, and is one that did not left alone?

    python benchmarks/memorisation.py --out memorisation

Two pixel models of 32 px are trained for `--minutes` of processor time each on the demo slide at 4 µm per px, outside
its held-out band: one on 32 crops, which it learns by heart, one on 2000. 64 images of each are compared with its
training images, against crops of the held-out band. A third model needs no training: the denoiser that is ideal for the
32 crops, their mean weighed by how likely each is under the noise.

Prints, for each: the share of images that are nearer to a training image than 95% of held-out ones, the area under the
curve of the two distances, and the verdict; fails where that is wrong. With --out, sheets of images.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.diffusion.denoiser import Cond, Denoiser, per_sample
from ldm.diffusion.losses import error_scale, scaled_error
from ldm.diffusion.samplers import sample_ddim
from ldm.diffusion.schedules import karras_sigmas
from ldm.encoders.extractors import load_extractor
from ldm.encoders.feature_files import FeatureSet
from ldm.errors import UserError, run_command
from ldm.files import writable_folder
from ldm.images.sheets import MADE, REAL, grid
from ldm.images.slides import open_slide
from ldm.images.write import save_png, to_uint8
from ldm.metrics.memorisation import Memorisation, memorisation
from ldm.networks.layers import timestep_embedding
from ldm.report.page import number

SLIDE = Path("data/demo/CMU-1-Small-Region.svs")
HELD_OUT = (1856, 2368)  # rows of it, level-0 px: what the demo holds out
SIDE, MPP, COPIED, ALL, HELD = 32, 4.0, 32, 2000, 200
WIDTH, BLOCKS = 512, 3
BATCH, RATE = 128, 1e-3
SIGMA_DATA = 0.5
SIGMAS = (0.05, 10.0)


class Layers(nn.Module):
    """A residual network over whole images that gives the image without noise: it sees all pixels at once, and learns a
    few images by heart in a minute."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(3 * SIDE**2, WIDTH), nn.Linear(WIDTH, 3 * SIDE**2)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(BLOCKS)
        )

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        at = self.time(timestep_embedding(20 * sigma.log(), WIDTH))
        h = self.inward((x / per_sample(sigma**2 + SIGMA_DATA**2, x).sqrt()).flatten(1))
        for block in self.blocks:
            h = h + block(h + at)
        return self.outward(h).tanh().view_as(x)


def crops(count: int, held_out: bool, seed: int) -> np.ndarray:
    """(count,SIDE,SIDE,3) uint8 with tissue, inside the held-out band of the demo slide or outside it."""
    slide = open_slide(SLIDE)
    image = slide.thumbnail(MPP)
    scale = slide.mpp / MPP
    top, bottom = (round(edge * scale) for edge in HELD_OUT)
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        y, x = (int(rng.integers(extent - SIDE + 1)) for extent in image.shape[:2])
        inside, outside = top <= y and y + SIDE <= bottom, y + SIDE <= top or y >= bottom
        crop = image[y : y + SIDE, x : x + SIDE]
        if (inside if held_out else outside) and crop.mean() < 215:
            found.append(crop)
    return np.stack(found)


def train(images: np.ndarray, minutes: float, seed: int, name: str) -> Denoiser:
    """A denoiser trained on images (N,SIDE,SIDE,3) for so many minutes of processor time."""
    torch.manual_seed(seed)
    denoiser = Layers()
    optimiser = torch.optim.AdamW(denoiser.parameters(), RATE)
    data = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    begun, spent, steps = time.process_time(), 0.0, 0
    with tqdm(total=round(60 * minutes), desc=name, unit="s") as bar:
        while spent < 60 * minutes:
            for group in optimiser.param_groups:
                group["lr"] = RATE * max(0.02, 1 - spent / (60 * minutes))
            x0 = data[torch.randint(len(data), (BATCH,))]
            sigma = torch.empty(BATCH).uniform_(*map(math.log, SIGMAS)).exp()
            estimate = denoiser(x0 + sigma[:, None, None, None] * torch.randn_like(x0), sigma, {})
            loss = scaled_error(estimate, x0, error_scale("x0", sigma)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1
            now = time.process_time() - begun
            bar.update(int(now) - int(spent))
            bar.set_postfix(steps=steps, loss=f"{loss.item():.3f}")
            spent = now
    return denoiser


def ideal(images: np.ndarray) -> Denoiser:
    """The denoiser that is best for these images and no others: E[x0 | x] when x0 is one of them."""
    data = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).flatten(1)  # (N,D)

    def denoise(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        apart = torch.cdist(x.flatten(1), data).square()
        return ((-apart / (2 * sigma[:, None] ** 2)).softmax(1) @ data).view_as(x)

    return denoise


@torch.no_grad()
def sample(denoiser: Denoiser, count: int, seed: int) -> np.ndarray:
    """(count,SIDE,SIDE,3) uint8."""
    sigmas, source = karras_sigmas(50, *SIGMAS), torch.Generator().manual_seed(seed)

    def noise(step: int) -> Tensor:
        return torch.randn(count, 3, SIDE, SIDE, generator=source)

    return to_uint8(sample_ddim(denoiser, noise(0) * sigmas[0], sigmas, {}, noise, 1.0).clamp(-1, 1))


def features(images: np.ndarray, name: str) -> FeatureSet:
    table = pd.DataFrame({"name": [f"{name} {i}" for i in range(len(images))]})
    return FeatureSet(load_extractor("pixels")(images), table, {"extractor": "pixels", "data": {"path": name}})


def run(args: argparse.Namespace) -> None:
    if args.out:
        writable_folder(args.out)
    if args.threads:
        torch.set_num_threads(args.threads)
    all_images, held_out = crops(ALL, False, 0), crops(HELD, True, 1)
    few = all_images[:COPIED]
    models = {
        "ideal for 32 images": (few, lambda: ideal(few), "memorises"),
        "overfitted on 32 images": (few, lambda: train(few, args.minutes, 0, "32 images"), "memorises"),
        f"trained on {ALL} images": (
            all_images,
            lambda: train(all_images, args.minutes, 0, f"{ALL} images"),
            "no sign",
        ),
    }
    wrong = []
    for name, (images, make, expected) in models.items():
        made = sample(make(), args.count, args.seed)
        found = memorisation(features(made, "made"), features(held_out, "held out"), features(images, "train"))
        close, nearer = found.measures[1], found.measures[0]
        print(
            f"{name}: close to a training image {number(close.value)} ({number(close.low)} to {number(close.high)}), "
            f"nearer than held-out {number(nearer.value)} ({number(nearer.low)} to {number(nearer.high)}), median "
            f"distance {number(found.measures[2].value)}: {found.verdict}",
            flush=True,
        )
        if (found.verdict == "memorises") != (expected == "memorises"):
            wrong.append(f"{name}: {found.verdict}")
        if args.out:
            path = args.out / f"{name.replace(' ', '-')}.png"
            save_png(
                path,
                sheet(made, images, found),
                {"content": f"generated images and the nearest training images: {name}"},
            )
    if wrong:
        raise UserError("; ".join(wrong))


def sheet(made: np.ndarray, images: np.ndarray, found: Memorisation) -> np.ndarray:
    """Generated images above the nearest training images."""
    order = np.linspace(0, len(made) - 1, 10).round().astype(int)
    words = [f"{found.generated.distance[i, 0]:.3f}" for i in order]
    rows = [made[order], images[found.generated.row[order, 0]]]
    return grid(rows, [words, [""] * len(order)], [MADE, f"{REAL}, nearest"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=2.0, help="processor time of each training (default %(default)s)")
    add("--count", type=int, default=64, help="images sampled from each (default %(default)s)")
    add("--seed", type=int, default=0, help="of the samples (default %(default)s)")
    add("--threads", type=int, help="of torch")
    add("--out", type=Path, help="folder for sheets of images")
    return run_command(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
