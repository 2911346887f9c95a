"""What a cohort of very many slides costs beyond its tiles: scheduling, files, the table of tiles, memory.

    python benchmarks/cohort_scale.py --slides 10000 --workers 2 --out /tmp/scale

Runs as many slides of four empty stages by Dask: what scheduling costs. Then makes small synthetic slides (one tile
each, or a few, so that all else shows), prepares them, and prepares them again, when nothing is left to do. Both must
end with the same table. Prints times per slide, peak memory of the client, in which the scheduler runs too, and of the
largest worker, and the sizes of what is written. docs/scaling.md has its figures.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.cohort_index import update_index
from data_prep.engine import Task, dask_client, run_by
from data_prep.prepare import prepare
from ldm.data.cohort import finished_stores, read_index

SIDE = 72
STAGES = ("tiles", "features", "latents", "check")


def make_slides(folder: Path, count: int) -> None:
    """Slides of pink and violet noise on glass, 72 px wide, each another."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"s{i:06}.png"
        if path.exists():
            continue
        rng = np.random.default_rng(i)
        colour = np.array([210, 120, 170]) + rng.integers(-30, 30, 3)
        pixels = (colour + rng.normal(0, 12, (SIDE, SIDE, 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path)


def peak(whose: int = resource.RUSAGE_SELF) -> float:
    """Most memory that this process has had, or the largest of its children that ended, in MB."""
    return resource.getrusage(whose).ru_maxrss / 1024


def empty_stages(slides: int, workers: int) -> None:
    """Print what Dask and the engine cost where the tasks themselves cost nothing."""
    tasks = [Task(f"s{i}.png", stage, dict, {}, STAGES[:j]) for i in range(slides) for j, stage in enumerate(STAGES)]
    before = peak()
    with dask_client(workers=workers) as client:
        list(run_by(client, tasks[:400]))
        started = time.monotonic()
        ended = sum(1 for _ in run_by(client, tasks))
        each = 1000 * (time.monotonic() - started) / ended
    print(
        f"scheduling: {each:.2f} ms a task, {each * len(STAGES):.1f} ms a slide of {len(STAGES)} stages, by {workers} "
        f"workers; client and scheduler {before:.0f} MB before, {peak():.0f} MB at most",
        flush=True,
    )


def prepared(slides: list[Path], out: Path, workers: int) -> dict[str, float]:
    started = time.monotonic()
    tiling = {"tile_size": 64, "slide_mpp": 1.0}
    record = prepare(slides, out, workers=workers, tiling=tiling, validation=0.1, test=0.1)
    seconds = time.monotonic() - started
    assert not record.failed(), record.failed()[0].reason
    return {
        "seconds": seconds,
        "in tasks": sum(record.seconds().values()),
        "client MB": peak(),
        "worker MB": peak(resource.RUSAGE_CHILDREN),
        "tiles": record.tiles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=10_000, help="Number of slides.")
    parser.add_argument("--workers", type=int, default=2, help="Worker processes.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for slides and cohort; about 150 kB a slide.")
    args = parser.parse_args()
    empty_stages(args.slides, args.workers)
    make_slides(args.out / "slides", args.slides)
    cohort = args.out / "cohort"
    table = cohort / "index.parquet"
    first = sorted((args.out / "slides").iterdir())[:1]
    shutil.rmtree(args.out / "one", ignore_errors=True)
    start = prepared(first, args.out / "one", args.workers)["seconds"]
    print(f"a cohort of one slide: {start:.1f} s, most of which starts the workers; client {peak():.0f} MB", flush=True)
    digests = []
    for name in ("first run", "second run, nothing to do"):
        found = prepared([args.out / "slides"], cohort, args.workers)
        each = 1000 * (found["seconds"] - start) / args.slides
        beyond = each * args.workers - 1000 * found["in tasks"] / args.slides
        print(
            f"{name}: {found['seconds']:.0f} s for {args.slides} slides by {args.workers} workers; without the start "
            f"{each:.1f} ms a slide, {beyond:.1f} ms of a worker's time beside tasks; client {found['client MB']:.0f} "
            f"MB, largest worker {found['worker MB']:.0f} MB; {found['tiles']} tiles",
            flush=True,
        )
        digests.append(hashlib.sha256(table.read_bytes()).hexdigest())
    assert digests[0] == digests[1], "the second run changed the table of tiles"
    started = time.monotonic()
    update_index(cohort)
    known = time.monotonic() - started
    started = time.monotonic()
    stores = finished_stores(cohort)
    opened = time.monotonic() - started
    started = time.monotonic()
    index = read_index(cohort)
    read = time.monotonic() - started
    assert len(stores) == args.slides
    print(
        f"table: {table.stat().st_size / 1e6:.2f} MB, {table.stat().st_size / len(index):.0f} bytes a tile, "
        f"{index.memory_usage(deep=True).sum() / 1e6:.1f} MB in memory; read in {read:.2f} s, brought up to date in "
        f"{known:.1f} s where nothing is new; all stores opened in {opened:.1f} s"
    )
    run = max((cohort / "runs").iterdir()).stat().st_size
    page = (cohort / "summary.html").stat().st_size
    print(f"record of a run: {run / 1e6:.2f} MB; summary.html {page / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
