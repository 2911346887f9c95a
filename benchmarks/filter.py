"""Does a filter raise the share of good images? Real crops against degraded ones.

    python benchmarks/filter.py --images AtNorM-MD --crop 64 --out filter_benchmark

Every image is either left as it is or degraded in one way, at a random strength: blurred, noisy, of other colours, or
with a piece cut out. Groups of images whose names are near each other by number (as those of one slide are) go to the
training or to the test as a whole. `histoldm train-scorer` learns good from bad on the training part (without random
colours, which would hide the fault), and `histoldm filter` keeps those of the test part at or above --above.

Printed: acceptance, the share of good images, before and after the filter, with 95% intervals (Wilson); how many of
the good ones are kept, and of each fault; the AUROC. The contact sheets of what is kept and rejected are in out/kept.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from ldm.commands.filter import filter_images
from ldm.data.collection import read_pictures
from ldm.errors import UserError, run_command
from ldm.files import remove, whole, writable_folder
from ldm.images.write import save_real_png
from ldm.rng import fold
from ldm.scorers.calibration import auroc, proportion
from ldm.scorers.labelled import read_labelled
from ldm.scorers.training import Recipe, train_scorer

FAULTS = ("blur", "noise", "colour", "cutout")


def degraded(image: np.ndarray, fault: str, rng: np.random.Generator) -> np.ndarray:
    """An image (H,W,3) uint8 with a fault of random strength."""
    values, side = image.astype(float), min(image.shape[:2])
    if fault == "blur":
        sigma = side / 64 * rng.uniform(1.0, 3.0)
        values = gaussian_filter(values, (sigma, sigma, 0))
    elif fault == "noise":
        values = values + rng.normal(0, rng.uniform(12, 40), values.shape)
    elif fault == "colour":
        density = -np.log((values + 1) / 256)
        gain = 1 + rng.choice((-1, 1), 3) * rng.uniform(0.25, 0.6, 3)
        values = 256 * np.exp(-density * gain) - 1
    elif fault == "cutout":
        size = round(side * rng.uniform(0.2, 0.45))
        y, x = rng.integers(0, side - size, 2)
        values[y : y + size, x : x + size] = rng.choice((0, 255, values.mean()))
    else:
        raise ValueError(fault)
    return values.round().clip(0, 255).astype(np.uint8)


def write_images(options: argparse.Namespace, out: Path) -> pd.DataFrame:
    """Write the images of training and test, each folder with its tiles.csv: file, label, fault, group, origin."""
    pictures = read_pictures(options.images).middle(options.crop)
    rng, rows = np.random.default_rng(fold(options.seed)), []
    numbers = [re.findall(r"\d+", Path(pictures.name(i)).stem) for i in range(len(pictures))]
    if not all(numbers):
        raise UserError(f"{options.images}: file names hold no running number, which tells the slides apart.")
    groups = [int(found[-1]) // options.run for found in numbers]
    tested = {g for g in set(groups) if np.random.default_rng(fold(options.seed, g)).random() < options.test}
    for i, group in enumerate(groups):
        part = "test" if group in tested else "train"
        fault = "" if rng.random() < options.good else str(rng.choice(FAULTS))
        image = pictures.read(i)
        name = f"{i:05d}.png"
        save_real_png(out / part / name, degraded(image, fault, rng) if fault else image)
        rows.append({"file": name, "part": part, "label": "bad" if fault else "good", "fault": fault or "none",
                     "group": group, "origin": pictures.name(i)})  # fmt: skip
    table = pd.DataFrame(rows)
    for part, own in table.groupby("part"):
        with whole(out / str(part) / "tiles.csv") as path:
            own.drop(columns="part").to_csv(path, index=False)
    return table[table["part"] == "test"].set_index("file")


def measure(options: argparse.Namespace) -> None:
    out = Path(options.out)
    for part in ("train", "test"):
        writable_folder(out / part)
    test = write_images(options, out)
    data = read_labelled(out / "train", positive="good")
    recipe = Recipe(
        kwargs={"channels": [32, 64, 128, 256], "stem_width": 16}, size=options.size, members=options.members,
        epochs=options.epochs, colour=0.0, test=0.0, seed=options.seed,
    )  # fmt: skip
    train_scorer(data, out / "scorer", recipe, options.device, options.bf16)
    remove(out / "kept")
    filter_images(
        [out / "scorer"], out / "test", out / "kept", options.device, 64, None, [str(options.above)], None, None, None,
        "fault", False,
    )  # fmt: skip
    scores = pd.read_csv(out / "kept" / "scores.csv").set_index("file").join(test[["fault"]])
    good, kept = (scores["fault"] == "none").to_numpy(), scores["kept"].to_numpy()
    for what, rows in (("before", np.ones(len(good), bool)), ("after", kept)):
        share, low, high = proportion(int(good[rows].sum()), int(rows.sum()))
        print(f"acceptance {what}: {share:.3f} [{low:.3f}, {high:.3f}] ({good[rows].sum()} of {rows.sum()} are good)")
    for fault, own in scores.groupby("fault"):
        share, low, high = proportion(int(own["kept"].sum()), len(own))
        what = "good images" if fault == "none" else fault
        print(f"kept of {what}: {share:.3f} [{low:.3f}, {high:.3f}] of {len(own)}")
    print(f"auroc of good against degraded: {auroc(scores['score'].to_numpy(), good):.3f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--crop", type=int, default=None, help="middle of the images that counts, px")
    parser.add_argument("--run", type=int, default=50, help="consecutive numbers of a group")
    parser.add_argument("--good", type=float, default=0.5, help="share of images that are left as they are")
    parser.add_argument("--test", type=float, default=0.35, help="share of the groups that is the test")
    parser.add_argument("--above", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args(argv)
    return run_command(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
