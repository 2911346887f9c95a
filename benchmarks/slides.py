"""What a whole slide costs: processor time, memory and disk of `histoldm slide` at several sizes.

    python benchmarks/slides.py --features cohort/slides/CMU-1-Small-Region.zarr --sides 4096 --sides 8192

The grid of a store, mirrored until it fills the slide, conditions it. Memory is that of the largest process.
Evaluations are counted by the windows of each step: of 100,000 px too, which nobody waits for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from ldm.convert import load_model
from ldm.data.tile_store import open_cohort
from ldm.sampling.canvas import Canvas
from ldm.sampling.sampler import Sampler

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data/models/demo-ssl"


def mirrored(grid: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """A grid (h,w,D) there and back again until there are rows and cols of it."""
    places = []
    for size, count in zip(grid.shape, (rows, cols)):
        period = np.r_[np.arange(size), np.arange(size - 2, 0, -1)]
        places.append(np.resize(period, count))
    return grid[places[0]][:, places[1]]


def measured(words: list[str]) -> tuple[float, float]:
    """Processor seconds of a command and its processes, and the memory (MB) of the largest."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1000


def evaluations(model: Path, features: int, side: int, steps: int) -> tuple[int, int]:
    """Windows of all steps of a slide without glass, and how often the network sees one: twice where it is guided."""
    loaded = load_model(model, "cpu")
    canvas = Canvas.of(loaded, torch.zeros(1, 1, features), (side, side), Sampler(steps=steps))
    low, high = canvas.sampler.guidance_interval
    counts = [len(canvas.covering(canvas.size, float(sigma)).corners) for sigma in canvas.sigmas[:-1]]
    twice = [1 + (low < float(sigma) <= high) for sigma in canvas.sigmas[:-1]]
    return sum(counts), sum(count * times for count, times in zip(counts, twice))


def main(
    features: Annotated[Path, typer.Option(help="Tile store with the model's features.")],
    model: Annotated[Path, typer.Option(help="Folder of a model conditioned on features.")] = MODEL,
    sides: Annotated[list[int], typer.Option(help="Pixels along each slide.")] = (4096, 8192),
    processes: Annotated[int, typer.Option(help="Processes that share the work.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps of the solver.")] = 4,
    decoder: Annotated[str, typer.Option(help="full or small.")] = "full",
) -> None:
    """Make slides of several sizes, and print what each cost."""
    store = open_cohort(features)[0]
    grid, _ = store.grid(None, store.feature_names[0])
    windows = {side: evaluations(model, grid.shape[-1], side, steps) for side in (*sides, 100_000)}
    print("    side   windows  evaluations  CPU s  CPU s/MP  largest process MB   disk MB  glass")
    for side in sides:
        count = (side - store.tile_size) // store.stride + 1
        own = mirrored(grid, count, count)
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder, "grid.npy"), own)
            start = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(processes)]
            words = ["-m", "ldm.cli", "slide", "--model", model, "--features", f"{folder}/grid.npy", "--steps", steps]
            words += ["--size", f"{side},{side}", "--decoder", decoder]
            words += ["--out", f"{folder}/a.ome.zarr", "--out", f"{folder}/a.tif"]
            seconds, memory = measured([*start, *map(str, words)])
            made = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != "grid.npy")
            disk = sum(path.stat().st_size for path in made) / 1e6
        glass = np.isnan(own[..., 0]).mean()
        numbers = f"{seconds:6.0f} {seconds / side**2 * 1e6:9.2f} {memory:19.0f} {disk:9.0f} {glass:6.0%}"
        print(f"{side:8d} {windows[side][0]:9d} {windows[side][1]:12d} {numbers}", flush=True)
    print(f"  100000 {windows[100_000][0]:9d} {windows[100_000][1]:12d}")


if __name__ == "__main__":
    typer.run(main)
