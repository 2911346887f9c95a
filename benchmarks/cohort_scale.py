"""What a cohort of very many slides costs beyond its tiles: scheduling, files, the table of tiles, memory.

    python benchmarks/cohort_scale.py --slides 10000 --workers 2 --out /tmp/scale

Makes small synthetic slides (one tile each, so that all else shows), prepares them by Dask, and prepares them again,
when nothing is left to do. Both must end with the same table. Prints seconds per slide, peak memory of the client and
of the largest worker, size of the table and the time to read it. docs/guide/cluster.md has its figures.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.prepare import prepare
from ldm.data.cohort import read_index

SIDE = 72


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


def measured(slides: Path, out: Path, workers: int) -> dict[str, float]:
    started = time.monotonic()
    tiling = {"tile_size": 64, "slide_mpp": 1.0}
    record = prepare([slides], out, workers=workers, tiling=tiling, validation=0.1, test=0.1)
    seconds = time.monotonic() - started
    assert not record.failed(), record.failed()[0].reason
    own = record.seconds()
    return {
        "seconds": seconds,
        "in tasks": sum(own.values()),
        "client MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "worker MB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "tiles": record.tiles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=10_000, help="Number of slides.")
    parser.add_argument("--workers", type=int, default=2, help="Worker processes.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for slides and cohort; about 40 kB a slide.")
    args = parser.parse_args()
    make_slides(args.out / "slides", args.slides)
    table = args.out / "cohort" / "index.parquet"
    digests = []
    for name in ("first run", "second run, nothing to do"):
        found = measured(args.out / "slides", args.out / "cohort", args.workers)
        each = 1000 * found["seconds"] / args.slides
        beyond = each * args.workers - 1000 * found["in tasks"] / args.slides
        print(
            f"{name}: {found['seconds']:.0f} s for {args.slides} slides by {args.workers} workers, {each:.1f} ms a "
            f"slide; {beyond:.1f} ms of a worker's time beside tasks; client {found['client MB']:.0f} MB, largest "
            f"worker {found['worker MB']:.0f} MB; {found['tiles']} tiles"
        )
        digests.append(hashlib.sha256(table.read_bytes()).hexdigest())
    assert digests[0] == digests[1], "the second run changed the table of tiles"
    started = time.monotonic()
    index = read_index(args.out / "cohort")
    print(
        f"table: {table.stat().st_size / 1e6:.2f} MB, {table.stat().st_size / len(index):.0f} bytes a tile; "
        f"read in {time.monotonic() - started:.2f} s"
    )


if __name__ == "__main__":
    main()
