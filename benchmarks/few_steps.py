"""What a student of two to four steps keeps of its teacher: quality, diversity, the condition; and what it saves.

    python benchmarks/few_steps.py --student models/my-student --store cohort --out out/few_steps
    python benchmarks/few_steps.py --student models/my-student --store cohort --seeds 1 --count 16      # a quick look
    python benchmarks/few_steps.py --teacher data/models/demo-mitosis --student models/cells-student \
        --store data/samples/cells-held-out --split test --blocks case --guidance-scale 6

hardware  2 CPU cores, 2 GiB of memory; the package's extra [judge]
duration  3 seeds of 96 tiles, processor time of one thread: of demo-ssl about 25 minutes, of models of 32 px about 4
expected  at 4 steps KID within the teacher's interval, diversity and following at 0.95 of the teacher's or more

Under the conditions of `--count` real tiles (by default of split val, which nothing was trained on) every arm makes one
tile of each and seed, all arms from the same noise: the teacher in 50 guided steps, which is what the others are
compared with; the teacher in as few steps as the student; the student (more than one: students of other methods). The
conditions are the teacher's: features, a score, a class, or captions of those kinds that text_prompts.py knows; of
classes and kinds every one equally often. Printed for the real tiles, as far as it is told of them, and each arm:

time       of the processor, seconds a tile
KID, FD    to the real tiles, in features of the judge, which conditioned none of the images; intervals of 95% draw
           columns of the slide as wide as a tile, or the values of `--blocks`
recall, coverage   of the real tiles, in the same features
spread     mean cosine distance between images of one condition from other noise, in the same features
margin     of features: cosine of a tile's, by the encoder that conditions, to its own condition less that to others'
spearman   of a score: its rank correlation with the mean of the scorers
called     of a class or captions: share that a classifier, taught here by real tiles (split train), calls the same
apart      root mean square difference of the image from the teacher's of 50 steps under the same noise, grey levels

The 1024 px image: benchmarks/large_image.py --student FOLDER, which runs the published procedure too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditioning import block_bootstrap, features_of
from few_steps_tiles import Tiles, add_options, read_tiles
from tqdm import tqdm

import ldm
from ldm.encoders.judge import load_judge
from ldm.errors import UserError, run_command
from ldm.files import writable_folder, write_text
from ldm.images import sheets
from ldm.images.write import save_png, to_uint8
from ldm.latent_diffusion import LatentDiffusion
from ldm.metrics.frechet import fid
from ldm.metrics.kernels import kid
from ldm.metrics.manifold import prdc
from ldm.model_folder import read_model_folder

TEACHER_STEPS = 50
SHOWN = 12  # tiles in the sheet
LEAST = 64  # px that a tile has there
Made = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A way to make the tiles."""

    name: str
    model: LatentDiffusion
    steps: int


@torch.no_grad()
def make(arm: Arm, tiles: Tiles, options: argparse.Namespace, seed: int) -> tuple[np.ndarray, float]:
    """Tiles (N,H,W,3) uint8 of a seed, and the seconds of the processor that each took."""
    cond = arm.model.condition(**tiles.conditions)
    sampler = ldm.Sampler(
        steps=arm.steps, guidance_scale=options.guidance_scale, seed=seed, batch_size=8, progress=False
    )
    begun = time.process_time()
    images = ldm.sample(arm.model, cond, sampler=sampler)
    return to_uint8(images), (time.process_time() - begun) / len(images)


def spread_of(features: np.ndarray) -> np.ndarray:
    """(N,): mean cosine distance between the images of one condition; features (S,N,D) of S seeds."""
    unit = features / np.linalg.norm(features, axis=2, keepdims=True)
    count = len(unit)
    alike = (unit.sum(0) ** 2).sum(1) - count
    return 1 - alike / (count * (count - 1))


def measure(images: np.ndarray, tiles: Tiles, judge: Any, real: np.ndarray, best: np.ndarray | None) -> Made:
    """All figures of images (S,N,H,W,3) of an arm, each value, low, high; `real`: the judge's features of the tiles."""
    seeds, count = images.shape[:2]
    flat = images.reshape(-1, *images.shape[2:])
    own = features_of(judge, flat)
    blocks = np.tile(tiles.blocks, seeds)
    found: Made = {}
    for name, estimate in (("KID", kid(own, real)), ("FD", fid(own, real)), *prdc(own, real).items()):
        found[name] = [estimate.value, *estimate.interval(blocks, tiles.blocks)]
    if seeds > 1:
        spread = spread_of(own.reshape(seeds, count, -1))
        found["spread"] = [float(spread.mean()), *block_bootstrap(spread, tiles.blocks)]
    found[tiles.measure] = tiles.follow(images)
    if best is not None:
        apart = (images.astype(np.float32) - best) ** 2
        found["apart"] = [float(apart.mean() ** 0.5)]
    return found


ROWS = ("seconds", "KID", "FD", "recall", "coverage", "spread", "margin", "spearman", "called", "apart")
GOALS = ("recall", "coverage", "spread", "margin", "spearman", "called")  # of which a student keeps 0.95


def table(results: dict[str, Made]) -> str:
    """The figures of each arm, with intervals, and what is kept of the first arm's."""
    first = next(iter(results.values()))
    lines = []
    for name, made in results.items():
        lines.append(name)
        for key in ROWS:
            if key not in made:
                continue
            value = made[key][0]
            kept = f"   {value / first[key][0]:.3f} of the teacher's" if key in GOALS and made is not first else ""
            if key == "seconds" and made is not first:
                kept = f"   {first[key][0] / value:.1f} times as fast"
            if key == "KID" and made is not first:
                inside = first[key][1] <= value <= first[key][2] or value < first[key][0]
                kept = f"   {'within' if inside else 'outside'} the teacher's interval"
            lines.append(line(key, made[key]) + kept)
    return "\n".join(lines)


def line(name: str, found: Sequence[float]) -> str:
    """A figure: value, and low and high where there are any."""
    value, *ends = found
    interval = f" [{ends[0]:.4g}, {ends[1]:.4g}]" if ends else ""
    return f"    {name:10}{value:10.4g}{interval:24}"


def compared(options: argparse.Namespace) -> tuple[Tiles, dict[str, Made], list[np.ndarray]]:
    """The real tiles, the figures of each arm, the teacher in TEACHER_STEPS first, and tiles of each to be shown."""
    teacher = ldm.load_model(options.teacher)
    tiles = read_tiles(options, teacher, read_model_folder(options.teacher)[1])
    arms = [Arm(f"teacher, {TEACHER_STEPS} steps", teacher, TEACHER_STEPS)]
    for folder in options.student:
        student = ldm.load_model(folder)
        if student.student is None:
            raise UserError(f"--student {folder} is no student; configs/distil/ssl.yaml trains one.")
        arms += [Arm(f"{folder.name}, {steps} steps", student, steps) for steps in sorted(student.student.steps)[::-1]]
    fewest = sorted({arm.steps for arm in arms[1:]})[::-1]
    arms += [Arm(f"teacher, {steps} steps", teacher, steps) for steps in fewest]
    judge = load_judge()
    real = features_of(judge, tiles.pixels)
    results: dict[str, Made] = {}
    best, sheet = None, [tiles.pixels[:: max(1, len(tiles.pixels) // SHOWN)][:SHOWN]]
    with tqdm(total=len(arms) * options.seeds, unit="set") as bar:
        for arm in arms:
            made = []
            for seed in range(options.seeds):
                made.append(make(arm, tiles, options, seed))
                bar.update()
            images, seconds = np.stack([each[0] for each in made]), [each[1] for each in made]
            results[arm.name] = {"seconds": [float(np.mean(seconds))], **measure(images, tiles, judge, real, best)}
            best = images.astype(np.float32) if best is None else best
            sheet.append(images[0, :: max(1, len(tiles.pixels) // SHOWN)][:SHOWN])
    return tiles, results, sheet


def run(options: argparse.Namespace) -> None:
    if options.out:
        writable_folder(options.out)
    torch.set_num_threads(options.threads)
    tiles, results, sheet = compared(options)
    print(
        f"{len(tiles.pixels)} conditions, {options.seeds} seeds, guidance {options.guidance_scale:g}, "
        f"{options.threads} thread{'s' if options.threads > 1 else ''}\n"
        f"real tiles\n{line(tiles.measure, tiles.follow(tiles.pixels[None]))}\n{table(results)}"
    )
    if options.out:
        about = {"content": f"rows: real tiles; {'; '.join(results)}", "model": str(options.teacher)}
        save_png(options.out / "sheet.png", sheets.grid([list(row) for row in sheet], least=LEAST), about)
        write_text(options.out / "few_steps.json", json.dumps(results, indent=1))


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", type=Path, default=Path("data/models/demo-ssl"), help="model folder (default %(default)s)")
    add("--student", type=Path, nargs="+", required=True, help="model folders of its students")
    add_options(add)
    add("--seeds", type=int, default=3, help="tiles of each condition (default %(default)s)")
    add("--guidance-scale", type=float, default=2.0, help="of all arms (default %(default)s)")
    add("--threads", type=int, default=1, help="of PyTorch (default %(default)s)")
    add("--out", type=Path, help="folder for a sheet of tiles and few_steps.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: run(parser_of().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
