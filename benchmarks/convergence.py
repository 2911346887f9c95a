"""Does training cost less? Large-Image-Diffusion's recipe (arXiv:2312.07330) beside today's, on one processor's time.

    python benchmarks/convergence.py --data sample_data --out out/convergence
    python benchmarks/convergence.py --out out/convergence-quick --quick     # the demo slide alone, a few minutes

hardware  2 CPU cores, 3 GiB of memory; the package's extra [judge]
duration  about an hour of processor time, timing included; --quick 2 minutes
expected  the recipe's last KID, about 0.22, is passed in an eighth of its time by v (docs/guide/performance.md)

Tiles of 96 px at 0.5 um/px are cut from real H&E below --data, and a region of every image is held out. All arms learn
from the same tiles, features and latents, for the same processor time of one thread in fp32: their steps are timed in
turns first. Measuring is not counted, nor is making features and latents, which the recipe needs as well. After each
checkpoint, samples under the conditions of held-out tiles (averaged weights, dpmpp_2m, no guidance) are compared with
these tiles by a network that conditioned none of them: KID and FD of the judge's features. KID decides, as it is
unbiased; both are of one number of images.

The recipe: a UNet, eps, uniform timesteps, plain error, one cross-attention token of the normalised feature, averaged
weights; its published learning rate of 1e-4, or 1e-3, whichever is better here. Not as published: its size, its batch
of 16, and weights that start from nothing. Its first stage is that of all arms, so that the judge sees decoders alike:
the shipped one, trained on for this cohort's stains. All arms are tried for a quarter of the time with one seed; the
best of ours by KID, and the recipe, get all of it and all seeds. One run of the recipe goes on to four times the time,
and its samples are once made by its own sampler (DDIM, 50 steps).

Printed are curves, and after which share of its time an arm has the recipe's last KID, between checkpoints linear over
the logarithm of time. Intervals of 95% draw blocks of 256 px of the images, the same for all arms, and seeds. --out
keeps everything, with a sheet of samples; what was stopped goes on when it is run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convergence_data import describe, images, prepare
from convergence_runs import ARMS, CANDIDATES, LAST, QUICK, RECIPES, Run, Scale, time_steps, trained

from ldm.errors import UserError, run_command
from ldm.files import writable_folder, write_text
from ldm.images import sheets
from ldm.images.write import save_png
from ldm.metrics.kernels import kid

DRAWS = 2000
GOAL = 1 / 4
Unit = tuple[str, int, float]  # arm, seed, fraction up to which it is trained


def reached(fractions: Sequence[float], values: Sequence[float], target: float) -> float:
    """The fraction of the time at which a curve first falls to a target: linear over the logarithm of time.

    The first fraction where the curve is below from the start, infinity where it never is.

    >>> round(reached([0.25, 0.5, 1.0], [4.0, 2.0, 1.0], 3.0), 4)  # half of the way from 1/4 to 1/2 of the time
    0.3536
    >>> reached([0.25, 0.5, 1.0], [4.0, 2.0, 1.0], 0.5)
    inf
    """
    below = np.flatnonzero(np.asarray(values) <= target)
    if not len(below):
        return math.inf
    if (i := int(below[0])) == 0:
        return float(fractions[0])
    part = (values[i - 1] - target) / (values[i - 1] - values[i])
    start, end = math.log(fractions[i - 1]), math.log(fractions[i])
    return math.exp(start + part * (end - start))


def drawn(values: np.ndarray, influence: np.ndarray, blocks: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """Curves (draws,F): means over seeds of values (S,F), with seeds and blocks (N,) of images drawn with replacement.

    influence (S,F,N): what each image adds. The blocks drawn are the same for all curves.
    """
    names, index = np.unique(blocks, return_inverse=True)
    member = np.eye(len(names))[index]  # (N,G)
    times = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    change = np.einsum("dg,sfg->dsf", times, influence @ member) / (times @ member.sum(0))[:, None, None]
    seeds = np.random.default_rng(1).multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)
    return np.einsum("ds,dsf->df", seeds / len(values), values + change)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """95%, of samples (D,) that may hold infinity."""
    ordered = np.sort(samples)
    low, high = (ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in (0.025, 0.975))
    return float(low), float(high)


def train_all(units: Sequence[Unit], scale: Scale, out: Path, workers: int) -> None:
    """Train what is not trained yet, in processes of one thread each; one worker is this process itself."""
    todo = [unit for unit in units if not Run(unit[0], unit[1], scale, out).finished(unit[2])]
    if workers == 1:
        for unit in todo:
            print(trained(*unit, scale, out), flush=True)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(trained, *unit, scale, out) for unit in todo]:
            print(future.result(), flush=True)


def measured(name: str, seeds: int, scale: Scale, out: Path, until: float = LAST) -> dict[str, Any]:
    """Of an arm: steps (S,F), kid, kid_rebuilt and fd (S,F), and influences (S,F,N) of kid and fd."""
    runs = [Run(name, seed, scale, out) for seed in range(seeds)]
    at = [fraction for fraction in scale.checkpoints if fraction <= until]
    told = [[json.loads(run.measured(each).read_text()) for each in at] for run in runs]
    kept = [[torch.load(run.measured(each).with_suffix(".pt"), weights_only=True) for each in at] for run in runs]
    own: dict[str, Any] = {
        key: np.array([[each[key] for each in row] for row in told]) for key in ("steps", "kid", "kid_rebuilt", "fd")
    }
    return own | {
        f"{key}_influence": np.array([[each[key].numpy() for each in row] for row in kept]) for key in ("kid", "fd")
    }


def tried(scale: Scale, out: Path) -> list[dict[str, Any]]:
    """Rows of a table of all arms at the fraction up to which each is tried, with one seed."""
    blocks = np.array(torch.load(out / "real.pt", weights_only=True)["blocks"])
    rows = []
    for name in (*RECIPES, *CANDIDATES):
        own = measured(name, 1, scale, out, scale.candidate)
        row = {"arm": name, "words": ARMS[name].words, "steps": int(own["steps"][0, -1])}
        for key in ("kid", "fd"):
            samples = drawn(own[key], own[f"{key}_influence"], blocks)[:, -1]
            row[key] = [float(own[key][0, -1]), *interval(samples)]
        rows.append(row)
    return rows


def best(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """The arm of the least KID among these."""
    return min((row for row in rows if row["arm"] in names), key=lambda row: row["kid"][0])["arm"]


def compared(names: Sequence[str], scale: Scale, out: Path) -> dict[str, Any]:
    """Curves of arms with all seeds, and after which share of the time each has the first one's last KID and FD."""
    blocks = np.array(torch.load(out / "real.pt", weights_only=True)["blocks"])
    own = {name: measured(name, scale.seeds, scale, out) for name in names}
    result: dict[str, Any] = {}
    for name in names:
        each = own[name]
        told: dict[str, Any] = {"words": ARMS[name].words, "steps": each["steps"].mean(0).round().tolist()}
        told["kid_rebuilt"] = each["kid_rebuilt"].mean(0).tolist()
        for key in ("kid", "fd"):
            curves = {n: drawn(own[n][key], own[n][f"{key}_influence"], blocks) for n in (name, names[0])}
            told[key] = [
                [float(value), *interval(samples)] for value, samples in zip(each[key].mean(0), curves[name].T)
            ]
            told[f"{key}_seeds"] = each[key].tolist()
            target, targets = own[names[0]][key].mean(0)[-1], curves[names[0]][:, -1]
            shares = np.array([reached(scale.checkpoints, c, t) for c, t in zip(curves[name], targets)])
            told[f"{key}_reached"] = [reached(scale.checkpoints, each[key].mean(0), target), *interval(shares)]
        result[name] = told
    return result


def share(value: float, first: float) -> str:
    """A share of the time in words; at the first checkpoint, at most that."""
    return "not reached" if math.isinf(value) else f"at most {value:.3g}" if value <= first else f"{value:.2f}"


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    at = [f"{fraction:.4g}" for fraction in report["scale"]["checkpoints"]]
    lines = [
        f"KID, judge, {report['scale']['count']} images, {report['scale']['seeds']} seeds, by share of the time:",
        "",
    ]
    lines += [f"| arm | {' | '.join(at)} | steps |", "|---" * (len(at) + 2) + "|"]
    for told in report["arms"].values():
        cells = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in told["kid"]]
        lines.append(f"| {told['words']} | {' | '.join(cells)} | {told['steps'][-1]:.0f} |")
    lines += ["", f"| arm | {' | '.join('FD at ' + each for each in at)} |", "|---" * (len(at) + 1) + "|"]
    lines += [
        f"| {told['words']} | {' | '.join(f'{v[0]:.1f}' for v in told['fd'])} |" for told in report["arms"].values()
    ]
    lines += ["", "| arm | share of the time to the recipe's last KID | to its last FD |", "|---|---|---|"]
    first = report["scale"]["checkpoints"][0]
    for told in report["arms"].values():
        cells = [
            f"{share(value, first)} ({share(low, first)} to {share(high, first)})"
            for value, low, high in (told["kid_reached"], told["fd_reached"])
        ]
        lines.append(f"| {told['words']} | {' | '.join(cells)} |")
    lines += ["", f"Tried with one seed for {report['scale']['candidate']:.4g} of the time:", ""]
    lines += ["| arm | KID | FD | steps |", "|---|---|---|---|"]
    for row in report["candidates"]:
        value, low, high = row["kid"]
        lines.append(
            f"| {row['words']} | {value:.3f} ({low:.3f} to {high:.3f}) | {row['fd'][0]:.1f} | {row['steps']} |"
        )
    floors = ", ".join(f"{name} {value:.3f}" for name, value in report["floors"].items())
    ours = report["arms"][report["best"]]["kid_reached"][0]
    met = "met" if ours <= GOAL else "missed"
    longer = ", ".join(
        f"after {at:g} times the time {value:.3f}" for at, value in zip(report["scale"]["longer"], report["longer"])
    )
    sampler = f"by its own sampler (DDIM, 50 steps) {report['published_sampler']:.3f}"
    lines += ["", f"KID of the recipe, seed 0: {sampler}; {longer}", f"KID of {floors}"]
    return "\n".join([*lines, f"best: {report['best']}; goal of {GOAL} of the time: {met}"])


def sheet(names: Sequence[str], scale: Scale, out: Path) -> None:
    """out/samples.png: held-out tiles, their reconstructions, and samples of seed 0 at each checkpoint."""
    real = torch.load(out / "real.pt", weights_only=True)
    rows, titles = [], []
    for name in names:
        run = Run(name, 0, scale, out)
        for at in run.marks(scale.longer[-1]):
            kept = run.measured(at).with_suffix(".pt")
            if kept.exists():
                rows.append(list(torch.load(kept, weights_only=True)["pictures"].numpy()))
                titles.append(f"{name} {at:.4g}")
    shown = np.linspace(0, scale.count - 1, len(rows[0])).round().astype(int)
    rows[:0] = [list(real[key][shown].numpy()) for key in ("pictures", "rebuilt")]
    page = sheets.grid(rows, titles=["real", "first stage", *titles], least=96, most=96)
    save_png(out / "samples.png", page, {"content": "real tiles, reconstructions, and synthetic ones by arm and time"})


def floors(out: Path) -> dict[str, float]:
    """KID to the held-out tiles of what no arm makes: their reconstructions, and tiles that were trained on."""
    real = torch.load(out / "real.pt", weights_only=True)
    own = {name: real[name].numpy() for name in ("features", "features_rebuilt", "features_train")}
    return {
        "the first stage's reconstructions": kid(own["features_rebuilt"], own["features"]).value,
        "training tiles": kid(own["features_train"], own["features"]).value,
    }


def measure(data: Path | None, out: Path, scale: Scale, workers: int) -> dict[str, Any]:
    """Everything, or what is left of it. UserError: `out` was begun with other settings."""
    torch.set_num_threads(1)
    writable_folder(out)
    settings = json.dumps({"scale": asdict(scale), "images": describe(images(data))}, indent=1)
    begun = out / "settings.json"
    if begun.exists() and begun.read_text() != settings:
        raise UserError(f"{out} was begun with other sizes or images ({begun}); give another --out, or delete it")
    write_text(begun, settings)
    prepare(data, out, scale.stride, scale.first_stage_steps, scale.count)
    time_steps(scale, out)
    train_all([(name, 0, scale.candidate) for name in (*RECIPES, *CANDIDATES)], scale, out, workers)
    candidates = tried(scale, out)
    names = (best(RECIPES, candidates), best(CANDIDATES, candidates))
    train_all([(name, seed, LAST) for seed in range(scale.seeds) for name in names], scale, out, workers)
    first = Run(names[0], 0, scale, out)
    published_sampler = first.by_published_sampler()  # of the weights at the end of the time: before it goes on
    train_all([(names[0], 0, scale.longer[-1])], scale, out, workers=1)
    report = {
        "scale": asdict(scale), "best": names[1], "arms": compared(names, scale, out), "candidates": candidates,
        "published_sampler": published_sampler,
        "longer": [json.loads(first.measured(at).read_text())["kid"] for at in scale.longer],
        "floors": floors(out),
    }  # fmt: skip
    write_text(out / "report.json", json.dumps(report, indent=1))
    write_text(out / "table.md", table(report) + "\n")
    sheet((*names, *(name for name in ARMS if name not in names)), scale, out)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with he/ and more/ of real H&E (default: the demo slide alone)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps everything")
    parser.add_argument("--quick", action="store_true", help="seconds of training: tries that all of it works")
    parser.add_argument("--workers", type=int, default=2, help="processes that train (default %(default)s)")
    options = parser.parse_args(argv)
    scale = QUICK if options.quick else Scale()
    return run_command(lambda: print(table(measure(options.data, options.out, scale, options.workers))))


if __name__ == "__main__":
    sys.exit(main())
