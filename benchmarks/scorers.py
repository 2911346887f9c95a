"""How well can an ensemble tell atypical mitotic figures, on patients that it has not seen?

    python benchmarks/scorers.py --crops AtNorM-MD --votes AtNorM-MD_expert_votes.csv --out scorers_benchmark

Data: crops of 128 px of AtNorM-MD (https://github.com/DeepMicroscopy/AMi-Br_Benchmark), named by a running number, and
the votes of five experts. No patient is told, but numbers follow the slides: the colours of neighbours correlate (the
first lines that are printed), and that fades over about 100 numbers. A group is a run of `--run` numbers, so nearly all
crops of a slide are in one group, and a group is never on both sides of a split.

The groups are cut into `--outer` folds. For each, an ensemble learns from the others (`histoldm train-scorer`: early
stopping, calibration inside them), and scores the fold. All crops are thus scored by networks that have seen nothing of
their group. Printed: AUROC and calibration of these scores for the majority, with 95% intervals over groups; beside
them what each expert reaches against the majority of the other four, a bound that the labels set; and a baseline of the
colours alone.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.errors import UserError, run_command
from ldm.files import whole, writable_folder
from ldm.images.pictures import Picture
from ldm.scorers.calibration import auroc, measures, with_intervals
from ldm.scorers.labelled import read_labelled, split_groups
from ldm.scorers.training import TEST_SCORES, Recipe, train_scorer

POSITIVE = "Atypical"
LAGS = (1, 10, 50, 100)


def crop_table(crops: Path, votes: Path, run: int, out: Path) -> pd.DataFrame:
    """Write out/crops.csv: path, class (of the folder), votes (share for POSITIVE), group, each expert's vote."""
    told = pd.read_csv(votes).set_index("Filename")
    experts = [name for name in told if name.startswith("Expert")]
    rows = []
    for path in sorted(crops.rglob("*.png"), key=lambda p: int(p.stem)):
        if path.name not in told.index:
            raise UserError(f"{votes} has no votes for {path}")
        each = (told.loc[path.name, experts] == POSITIVE).astype(int)
        own = {"path": str(path.resolve()), "class": path.parent.name, "votes": each.mean()}
        rows.append(own | {"group": f"{(int(path.stem) - 1) // run:03}", **each.to_dict()})
    if not rows:
        raise UserError(f"there are no crops in {crops}")
    table = pd.DataFrame(rows)
    with whole(out / "crops.csv") as part:
        table.to_csv(part, index=False)
    return table


def colours(table: pd.DataFrame) -> np.ndarray:
    """(N,6) mean and deviation of each channel of each crop, standardised."""
    images = (Picture.of_file(Path(path)).pixels() for path in table["path"])
    found = np.array([np.concatenate([image.mean((0, 1)), image.std((0, 1))]) for image in images])
    return (found - found.mean(0)) / found.std(0)


def of_colours(features: np.ndarray, targets: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(N,) scores of each fold by a least-squares line through the others' colours."""
    inputs, scores = np.column_stack([features, np.ones(len(features))]), np.empty(len(features))
    for k in np.unique(folds):
        line = np.linalg.lstsq(inputs[folds != k], targets[folds != k], rcond=None)[0]
        scores[folds == k] = inputs[folds == k] @ line
    return scores


def measure(options: argparse.Namespace) -> None:
    out = Path(options.out)
    writable_folder(out)
    table = crop_table(options.crops, options.votes, options.run, out)
    features = colours(table)
    near = ", ".join(f"{lag}: {(features[lag:] * features[:-lag]).mean():.2f}" for lag in LAGS)
    print(f"{len(table)} crops in {table['group'].nunique()} groups; correlation of colours by distance: {near}")
    positive = POSITIVE if options.label == "class" else None
    data = read_labelled(out / "crops.csv", label=options.label, positive=positive)
    data = replace(data, pictures=data.pictures.middle(options.crop))
    majority = (table["votes"] >= 0.5).to_numpy(float)
    folds = split_groups(data.strata, data.groups, [1 / options.outer] * options.outer, seed=options.seed)
    experts = table[[name for name in table if name.startswith("Expert")]].to_numpy()
    each = []
    for i in range(experts.shape[1]):
        rest = np.delete(experts, i, 1).sum(1)
        sure = rest != 2
        each.append(auroc(experts[sure, i], rest[sure] > 2))
    print(f"one expert against the majority of the other four: auroc {', '.join(f'{v:.3f}' for v in each)}")
    show("colours alone", of_colours(features, majority, folds), majority, data.groups, ("auroc",))
    recipe = Recipe(
        kwargs={"channels": [32, 64, 128, 256], "stem_width": 16}, size=options.size, members=options.members,
        epochs=options.epochs, patience=options.patience, views=options.views, seed=options.seed,
    )  # fmt: skip
    scores = np.full(len(data), np.nan)
    for k in range(options.outer):
        scorer = train_scorer(data, out / f"fold-{k}", recipe, options.device, options.bf16, folds == k)
        scores[folds == k] = pd.read_csv(out / f"fold-{k}" / TEST_SCORES)["score"]
        print(f"fold {k}: test auroc {scorer.about['figures']['test']['auroc'][0]:.3f}")
    with whole(out / "scores.csv") as part:
        table.assign(fold=folds, score=scores).to_csv(part, index=False)
    show("ensemble", scores, majority, data.groups)
    clear = np.isin(table["votes"], (0.0, 1.0))
    show("ensemble, where all experts agree", scores[clear], majority[clear], data.groups[clear], ("auroc",))


def show(
    what: str, scores: np.ndarray, targets: np.ndarray, groups: np.ndarray, names: tuple[str, ...] = ("auroc", "ece")
) -> None:
    found = with_intervals(lambda rows: measures("binary", scores[rows], targets[rows]), groups)
    words = "; ".join(f"{name} {found[name][0]:.3f} [{found[name][1]:.3f}, {found[name][2]:.3f}]" for name in names)
    print(f"{what}: {words} ({len(targets)} crops, {int(targets.sum())} {POSITIVE})")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=Path, required=True)
    parser.add_argument("--votes", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--run", type=int, default=50, help="consecutive numbers of a group")
    parser.add_argument("--crop", type=int, default=64, help="middle of the crops that counts, px")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--label", choices=("votes", "class"), default="votes", help="fractions, or majorities")
    parser.add_argument("--outer", type=int, default=3)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--patience", type=int, default=10)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args(argv)
    return run_command(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
