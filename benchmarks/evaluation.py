"""What evaluation costs, and whether its figures order real images as they should.

    python benchmarks/evaluation.py --only cost          # FID of 50 000 x 2048 features: time and memory
    python benchmarks/evaluation.py --only order --he slides/he.svs --ihc slides/ihc.tif

cost: FID of two sets of `--images` features of `--dim`, as from Inception, with its time and the process' peak memory;
then with the influences that its interval takes.

order: tiles of 128 px at 0.5 µm per px of one H&E slide, in two halves by a checkerboard, and of an IHC slide. In
features of the demo's encoder and in pixels, every distance of the two halves must be below that of H&E and IHC, and
every share of near neighbours above.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ldm.errors import UserError, run_command

SLIDE = Path("data/demo/CMU-1-Small-Region.svs")
MIB = 1024
NEARNESS = ("precision", "recall", "density", "coverage")  # the more the nearer
TILE, OWN_MPP = 128, 0.5


def peak() -> float:
    """Peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def random_features(count: int, dim: int, seed: int) -> np.ndarray:
    """(count,dim) float32 whose variances fall as those of networks' features do."""
    rng, scale = np.random.default_rng(seed), np.geomspace(1, 0.01, dim, dtype=np.float32)
    values = np.empty((count, dim), np.float32)
    for first in range(0, count, 4096):
        part = rng.standard_normal((min(4096, count - first), dim), np.float32)
        values[first : first + 4096] = (part + 0.3 * np.roll(part, 1, 1)) * scale
    return values


def cost(args: argparse.Namespace) -> None:
    from ldm.metrics import frechet

    x, y = (random_features(args.images, args.dim, seed) for seed in range(2))
    y += 0.05
    print(f"two sets of {args.images} x {args.dim}: {(x.nbytes + y.nbytes) / 2**20:.0f} MiB of features")
    begun, used = time.perf_counter(), time.process_time()
    value = frechet.frechet_distance(frechet.moments(x), frechet.moments(y))
    took = f"{time.perf_counter() - begun:.1f} s, {time.process_time() - used:.1f} s of processor time"
    print(f"FID {value:.4f}: {took}, peak memory {peak():.0f} MiB", flush=True)
    if args.interval:
        begun, used = time.perf_counter(), time.process_time()
        found = frechet.fid(x, y)
        low, high = found.interval()
        print(
            f"with its interval, {low:.4f} to {high:.4f}: {time.perf_counter() - begun:.1f} s, "
            f"{time.process_time() - used:.1f} s of processor time, peak memory {peak():.0f} MiB"
        )


def tiles_of(path: Path, mpp: float | None, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tiles (N,T,T,3) of the tissue of a slide and their corners (N,2) in level-0 px."""
    from data_prep.tile_slides import tile_slide
    from ldm.data.tile_store import TileStore

    store = TileStore.open(tile_slide(
        path, folder, mpp=OWN_MPP, tile_size=TILE, stride=TILE, min_tissue=0.5, keep_background=0.0, slide_mpp=mpp,
    ))  # fmt: skip
    return np.asarray(store.tiles[:]), store.coords // round(TILE * store.downsample)


def order(args: argparse.Namespace) -> None:
    from ldm.encoders.extractors import load_extractor
    from ldm.metrics import frechet, kernels, manifold
    from ldm.metrics.measure import TITLES
    from ldm.report.sets import encoder_of

    with tempfile.TemporaryDirectory() as folder:
        he, place = tiles_of(args.he, args.he_mpp, Path(folder))
        ihc, _ = tiles_of(args.ihc, args.ihc_mpp, Path(folder))
    odd = place.sum(1) % 2 == 1
    count = min(odd.sum(), (~odd).sum(), len(ihc))
    pick = [
        rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
        for rows in (np.flatnonzero(odd), np.flatnonzero(~odd), np.arange(len(ihc)))
    ]
    sets = [he[pick[0]], he[pick[1]], ihc[pick[2]]]
    print(f"{count} tiles of each half of {args.he.name} and of {args.ihc.name}")
    wrong = []
    for name in args.features:
        extractor = load_extractor(encoder_of(name))
        parts = [np.concatenate([extractor(images[i : i + 32]) for i in range(0, count, 32)]) for images in sets]
        found = []
        for other in (parts[1], parts[2]):
            whole = frechet.fid(parts[0], other)
            infinite = frechet.fd_infinity(*frechet.fid_by_size(parts[0], other), whole)
            own = {"fid": whole, "fd_infinity": infinite, "kid": kernels.kid(parts[0], other)}
            found.append(own | {"cmmd": kernels.cmmd(parts[0], other)} | manifold.prdc(parts[0], other))
        print(f"{name:<28} {'two halves':>28} {'H&E and IHC':>30}")
        for key, near in found[0].items():
            far = found[1][key]
            title = TITLES[key][0]
            shown = [f"{each.value:.4g} ({each.interval()[0]:.4g} to {each.interval()[1]:.4g})" for each in (near, far)]
            holds = near.value > far.value if key in NEARNESS else near.value < far.value
            print(f"  {title:<20} {shown[0]:>34} {shown[1]:>34}   {'holds' if holds else 'FAILS'}")
            wrong += [] if holds else [f"{name} {title}"]
    if wrong:
        raise UserError(f"the order does not hold for {', '.join(wrong)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=("cost", "order"), help="one of the two (default: both)")
    add("--images", type=int, default=50_000, help="of each set (default %(default)s)")
    add("--dim", type=int, default=2048, help="of the features (default %(default)s)")
    add("--interval", action="store_true", help="cost: of the interval too")
    add("--he", type=Path, default=SLIDE, help="H&E slide (default: the demo's)")
    add("--he-mpp", type=float, help="µm per px of it, where its header lacks it")
    add("--ihc", type=Path, help="IHC slide; order needs it")
    add("--ihc-mpp", type=float, help="µm per px of it, where its header lacks it")
    add("--features", nargs="+", default=["demo-encoder", "pixels"], help="extractors (default %(default)s)")
    args = parser.parse_args(argv)

    def run() -> None:
        if args.only != "cost" and args.ihc is None:
            raise UserError("order needs an IHC slide: --ihc")
        for name, body in (("cost", cost), ("order", order)):
            if args.only in (None, name):
                body(args)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
