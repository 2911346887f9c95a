"""Does the condition matter, and do the seams show? Two figures of a trained SSL-conditioned model.

    python benchmarks/conditioning.py --model demo_output/model --store demo_output/cohort --feature demo-encoder \
        --encoder data/models/demo-encoder --image demo_output/synthetic_1024.png

Conditioning: one tile is sampled for each of `--count` held-out tiles (split val) from its features, and the
features of what was sampled are extracted again. The margin of a tile is the cosine similarity between those and its
conditioning features, less the mean of the same to the other tiles' conditioning features. Held-out tiles overlap, so
they are no independent draws: the 95% interval of the mean margin is a bootstrap over blocks of slide columns as wide
as a tile, not over tiles. An image is not judged by the encoder that conditioned it alone: the margin comes again in
features of the judge (extra [judge]), between what was sampled and the held-out tiles themselves.

Seams: mean absolute difference of neighbouring pixels across the borders of the tile lattice, over that inside tiles.
It comes twice. Over all of the inside it also tells where the lattice happens to cut tissue and glass, and that its
borders lie on the edges of 8 px blocks, which JPEG has left in the real slide; the like-for-like figure takes from the
inside only block edges within 32 px of a border. Beside each stands the range of the same ratio over all other places
where the lattice could lie, and the same on the real region, where there are no seams.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.data.tile_store import open_cohort
from ldm.errors import UserError, run_command
from ldm.files import writable_folder, write_text
from ldm.images.pictures import Picture
from ldm.images.sheets import grid
from ldm.images.slides import open_slide
from ldm.images.write import save_png
from ldm.metrics.conditional import cosines
from ldm.metrics.pairs import psnr
from ldm.metrics.seams import measure_seams

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

RESAMPLES = 10_000
SHOWN = 8  # pairs in the picture


def held_out(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """`count` items of a dataset, evenly spread over it."""
    if len(dataset) < count:
        raise UserError(f"{len(dataset)} tiles are held out and {count} are asked for; give a smaller --count")
    return [dataset[int(i)] for i in np.linspace(0, len(dataset) - 1, count).round()]


def margins(similarity: np.ndarray) -> np.ndarray:
    """(N,): the diagonal of (N,N) similarities [generated, condition] less the mean of the rest of its row."""
    own, count = np.diag(similarity), len(similarity)
    return own - (similarity.sum(1) - own) / (count - 1)


def block_bootstrap(values: np.ndarray, blocks: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` (N,) when whole blocks (N,) are drawn with replacement."""
    names, index = np.unique(blocks, return_inverse=True)
    sums, sizes = np.bincount(index, values), np.bincount(index)
    draws = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[draws].sum(1) / sizes[draws].sum(1)  # (RESAMPLES,)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def read_image(path: Path) -> np.ndarray:
    """(H,W,3) uint8."""
    return Picture.of_file(path).pixels()


def read_region(path: Path, region: str) -> np.ndarray:
    """(h,w,3) uint8 of "x,y,w,h" in level-0 px."""
    parts = region.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--region takes x,y,width,height as four whole numbers; got '{region}'")
    x, y, width, height = map(int, parts)
    return open_slide(path).read(x, y, width, height, (width, height))


def judge_at_hand() -> Callable[[Tensor], Tensor] | None:
    """The judge, or None where its package is not installed."""
    from ldm.encoders.judge import load_judge, packaged

    return load_judge() if packaged().is_file() else None


def features_of(network: Callable[[Tensor], Tensor], pixels: np.ndarray) -> np.ndarray:
    """(N,D) of images (N,H,W,3) uint8."""
    import torch

    with torch.no_grad():
        return np.concatenate([network(part).numpy() for part in torch.from_numpy(pixels).split(16)])


def measure_conditioning(args: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """The figures, and a picture: held-out tiles above what was sampled from their features."""
    import torch

    import ldm
    from ldm.data.datasets import TileDataset
    from ldm.devices import pick_device
    from ldm.encoders.encoder import load_encoder

    device = pick_device(args.device)
    keys, where = ("image", "ssl"), {"split": args.split}
    items = held_out(TileDataset(str(args.store), keys, args.feature, where=where), args.count)
    conditions = torch.stack([item["ssl"] for item in items]).numpy()  # (N,D)
    images = torch.stack([item["image"] for item in items])  # (N,3,T,T)
    encoder = load_encoder(args.encoder or args.feature, device=device)
    if encoder.dim != conditions.shape[1]:
        has = conditions.shape[1]
        raise UserError(f"encoder {encoder.name} gives {encoder.dim} values, features '{args.feature}' have {has}")
    model = ldm.load_model(args.model, device)
    sampler = ldm.Sampler(
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        batch_size=args.batch_size,
        precision=args.precision,
    )
    sampled = ldm.sample(model, model.condition(features=conditions), sampler=sampler)
    parts = [slice(i, i + args.batch_size) for i in range(0, len(images), args.batch_size)]
    with torch.no_grad():
        rebuilt = torch.cat([model.decode(model.encode(images[part].to(device))).clamp(-1, 1).cpu() for part in parts])
        again, ceiling = (
            torch.cat([encoder(batch[part].to(device)).cpu() for part in parts]).numpy() for batch in (sampled, rebuilt)
        )
    similarity = cosines(again, conditions)
    gains = margins(similarity)
    judged = None
    if judge := judge_at_hand():
        seen = [features_of(judge, ldm.to_uint8(batch)) for batch in (sampled, images)]
        judged = margins(cosines(*seen))
    store = open_cohort(args.store)[0]
    extent = store.tile_size * store.downsample  # of a tile, in level-0 px
    blocks = [f"{item['slide']}:{int(item['coord'][0] // extent)}" for item in items]
    low, high = block_bootstrap(gains, np.array(blocks))
    by_judge = None if judged is None else [float(judged.mean()), *block_bootstrap(judged, np.array(blocks))]
    noise = psnr(rebuilt, images).double().numpy()
    own = float(np.diag(similarity).mean())
    measures = {
        "tiles": len(items), "blocks": len(set(blocks)), "own": own, "shuffled": own - float(gains.mean()),
        "margin": float(gains.mean()), "low": low, "high": high, "judge": by_judge,
        "reconstruction": float(np.diag(cosines(ceiling, conditions)).mean()),
        "psnr": [float(noise.mean()), *block_bootstrap(noise, np.array(blocks))],
        "feature": args.feature, "split": args.split, "steps": args.steps, "guidance_scale": args.guidance_scale,
        "seed": args.seed, "precision": args.precision,
    }  # fmt: skip
    shown = np.linspace(0, len(items) - 1, min(SHOWN, len(items))).round().astype(int)
    return measures, grid([ldm.to_uint8(batch[shown]) for batch in (images, sampled)], least=0)


def table(measures: dict[str, Any]) -> str:
    lines = []
    if c := measures.get("conditioning"):
        lines += [
            f"conditioning: {c['tiles']} held-out tiles, {c['steps']} steps, guidance {c['guidance_scale']:g},"
            f" seed {c['seed']}",
            f"  cosine similarity to its own condition      {c['own']:.3f}",
            f"  cosine similarity to shuffled conditions    {c['shuffled']:.3f}",
            f"  margin                                      {c['margin']:.3f}"
            f"   95% interval {c['low']:.3f} to {c['high']:.3f} (bootstrap over {c['blocks']} blocks of columns)",
            f"  own condition, first stage's reconstruction {c['reconstruction']:.3f}   (what sampling could reach)",
        ]
        if c.get("judge"):
            lines.append("  margin to the tile itself, by the judge     {:.3f}   {:.3f} to {:.3f}".format(*c["judge"]))
    for key, title in (("seams", "seams of the generated image"), ("seams_real", "same measure on the real region")):
        if s := measures.get(key):
            lines.append(f"{title}, {s['tile']} px lattice: gradient across borders over that inside tiles")
            for name, where in (("all", "all of the inside"), ("like", "like for like")):
                r = s[name]
                lines.append(
                    f"  {where:<43} {r['ratio']:.3f}   95% of other lattices {r['low']:.3f} to {r['high']:.3f}"
                )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    if args.count < 2:
        raise UserError(f"--count is at least 2, got {args.count}")
    if args.out:
        writable_folder(args.out)
    measures: dict[str, Any] = {}
    if args.image:
        measures["seams"] = measure_seams(read_image(args.image), args.tile, args.image)
    if args.slide and args.region:
        measures["seams_real"] = measure_seams(read_region(args.slide, args.region), args.tile, args.slide)
    measures["conditioning"], picture = measure_conditioning(args)
    print(table(measures))
    if args.out:
        about = {"content": "above: real tiles; below: generated from their features", "model": args.model.name}
        save_png(args.out / "tiles.png", picture, about | {"seed": args.seed})
        write_text(args.out / "measures.json", json.dumps(measures, indent=1))
    if args.check and measures["conditioning"]["low"] <= 0:
        raise UserError("the interval of the margin includes 0: the model does not follow its condition")
    if args.check and "seams" in measures and (ratio := measures["seams"]["all"]["ratio"]) > 1.05:
        raise UserError(f"the seam ratio {ratio:.3f} is above 1.05: tile borders show")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, type=Path, help="model folder or run folder")
    add("--store", required=True, type=Path, help="cohort folder, whose index.parquet tells the split")
    add("--feature", required=True, help="name of the conditioning features in the store")
    add("--encoder", help="encoder name or folder that made them (default: the name of the features)")
    add("--image", type=Path, help="generated large image, to measure its seams")
    add("--slide", type=Path, help="with --region: the same measure on the real slide, where there is no seam")
    add("--region", metavar="X,Y,W,H", help="level-0 px of --slide")
    add("--tile", type=int, default=256, help="lattice of the seams in px (default %(default)s)")
    add("--split", default="val", help="split to sample for (default %(default)s)")
    add("--count", type=int, default=64, help="how many of them (default %(default)s)")
    add("--steps", type=int, default=20, help="sampling steps (default %(default)s)")
    add("--guidance-scale", type=float, default=2.0, help="(default %(default)s)")
    add("--seed", type=int, default=0, help="(default %(default)s)")
    add("--batch-size", type=int, default=16, help="(default %(default)s)")
    add("--device", default="auto", help="(default %(default)s)")
    add("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="(default %(default)s)")
    add("--out", type=Path, help="folder for measures.json and tiles.png")
    add("--check", action="store_true", help="fail unless the interval excludes 0 and the seam ratio is at most 1.05")
    return run_command(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
