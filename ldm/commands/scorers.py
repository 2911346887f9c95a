"""Bodies of `histoldm train-scorer` and `utility`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ldm.data.collection import joined
from ldm.data.extent import tell
from ldm.data.where import Where, parse_where
from ldm.errors import UserError, some
from ldm.files import owns, write_text
from ldm.scorers.calibration import measures, with_intervals
from ldm.scorers.ensemble import Ensemble
from ldm.scorers.labelled import Labelled, read_labelled
from ldm.scorers.ratings import is_rating_table, read_ratings
from ldm.scorers.training import BEST_OF, TEST_SCORES, Recipe, folds_of, train_scorer
from ldm.tables.text import read_table

ARMS = ("real", "synthetic", "both")


@dataclass(frozen=True)
class AskedLabels:
    """What a user says of labelled images; of each None is told by the data, see `read_labelled`.

    Attributes:
        label, patient: columns. kind: binary, graded or classes. positive: class that a binary score is for.
        where: which images count, see `ldm.data.where`.
    """

    label: str | None = None
    kind: str | None = None
    positive: str | None = None
    patient: str | None = None
    where: Where = ()


def labelled(data: Path, asked: AskedLabels, crop: int | None = None, skip_unrated: bool = False) -> Labelled:
    """The middle `crop` px of labelled images, or of a rating folder or its table."""
    images = _read(data, asked, skip_unrated)
    tell(images.pictures.notes)
    return replace(images, pictures=images.pictures.middle(crop))


def _read(data: Path, asked: AskedLabels, skip_unrated: bool) -> Labelled:
    table = data / "ratings.csv" if data.is_dir() else data
    if table.is_file() and is_rating_table(table):
        if given := [name for name, value in asdict(asked).items() if value]:
            raise UserError(f"--{given[0]} does not go with the rating table {table}, which knows its scale.")
        return read_ratings(table, skip_unrated)
    if skip_unrated:
        raise UserError(f"--skip-unrated goes with a rating table; {data} is none.")
    return read_labelled(data, **asdict(asked))


def train(
    data: Path,
    out: Path,
    asked: AskedLabels,
    recipe: Recipe,
    device: str,
    bf16: bool,
    licence: str,
    half: bool = False,
    crop: int | None = None,
    skip_unrated: bool = False,
) -> None:
    """`histoldm train-scorer`: a scorer folder of labelled images."""
    images = labelled(data, asked, crop, skip_unrated)
    counts = ", ".join(f"{count} {name}" for name, count in images.counts().items())
    print(f"{len(images)} images in {len(set(images.groups))} groups, {images.task.kind}: {counts}")
    for note in images.notes:
        print(f"note: {note}")
    scorer = train_scorer(images, out, recipe, device, bf16, licence=licence, half=half)
    for line in report(scorer):
        print(line)
    print(f"wrote {out}")


def report(scorer: Ensemble) -> list[str]:
    """The figures of a scorer with their intervals, a line each."""
    lines = []
    for part, words in (("test", "held-out groups"), ("validation", "validation folds, which early stopping has seen")):
        for name, value in scorer.about["figures"].get(part, {}).items():
            if name.endswith("_of_members"):
                lines.append(f"  {name}: {', '.join(f'{each:.3f}' for each in value)}")
            else:
                lines.append(f"{part} {name} {value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}] ({words})")
    return [*lines, f"temperature {scorer.temperature:.3f}; best epochs {scorer.about['best_epochs']}"]


@owns()
def utility(
    real: Path,
    synthetic: Path,
    out: Path,
    asked: AskedLabels,
    recipe: Recipe,
    device: str,
    bf16: bool,
    held_out: Where,
    crop: int | None = None,
) -> None:
    """`histoldm utility`: what synthetic images are worth for training a classifier.

    Three ensembles of one recipe learn from the real images, from the synthetic ones and from both, and are tested on
    the same held-out groups of real images, see `held_out_of`. Writes utility.json and a scorer folder for each.
    """
    own = labelled(real, asked, crop)
    made = read_labelled(synthetic, label=asked.label, task=own.task)
    test = held_out_of(own, recipe, held_out)
    made = replace(made, groups=np.array([f"synthetic {group}" for group in made.groups], dtype=object))
    print(f"{len(own)} real images ({test.sum()} held out) and {len(made)} synthetic ones; {own.task.kind}")
    if not held_out:
        print("note: the model of the synthetic images must not have seen the held-out images; --held-out names those")
    tested, arms = own.take(np.flatnonzero(test)), own.take(np.flatnonzero(~test))
    parts = {"real": (arms,), "synthetic": (made,), "both": (arms, made)}
    scores = {}
    for arm in ARMS:
        data = together(*parts[arm], tested)
        held = np.arange(len(data)) >= len(data) - len(tested)
        print(f"{arm}: trained on {len(data) - len(tested)} images")
        train_scorer(data, out / arm, recipe, device, bf16, held)
        table = read_table(out / arm / TEST_SCORES, numbers=True)
        columns = [f"p_{name}" for name in own.task.classes] if own.task.kind == "classes" else "score"
        scores[arm] = table[columns].to_numpy()
    found = compared(tested, scores)
    about = {"real": real.name, "synthetic": synthetic.name, "test": len(tested), "synthetic_images": len(made)}
    about |= {"test_groups": len(set(tested.groups)), "real_images": len(arms), "recipe": recipe.__dict__}
    about["held_out"] = [*map(str, parse_where(held_out))]
    write_text(out / "utility.json", json.dumps({**about, "figures": found}, indent=1))
    for name, value in found.items():
        print(f"{name:<28} {value[0]:+.4f} [{value[1]:+.4f}, {value[2]:+.4f}]")
    print("95% intervals: a bootstrap over the held-out groups; another training's chance is not in them")


def held_out_of(own: Labelled, recipe: Recipe, named: Where) -> np.ndarray:
    """(N,) bool: the real images to test on: those of which their table says so, else a part of the groups at random.

    UserError: none, all, or a group on both sides.
    """
    if not named:
        test = folds_of(own, recipe) < 0
        if not test.any():
            raise UserError("--test 0 leaves no real images to compare on; give a fraction.")
        return test
    words = " and ".join(map(str, parse_where(named)))
    test = own.pictures.which(named)
    if test.all():
        raise UserError(f"every real image has {words}; --held-out names a part of them.")
    if both := sorted(set(own.groups[test]) & set(own.groups[~test])):
        raise UserError(f"{len(both)} groups are on both sides of --held-out {words}: {some(both, 5)}.")
    return test


def together(*parts: Labelled) -> Labelled:
    """The images of several sets of one task, one after the other."""
    whole = parts[0]
    for part in parts[1:]:
        whole = Labelled(
            joined(whole.pictures, part.pictures),
            whole.task,
            np.concatenate([whole.targets, part.targets]),
            np.concatenate([whole.groups, part.groups]),
            tuple(dict.fromkeys(whole.notes + part.notes)),
        )
    return whole


def compared(tested: Labelled, scores: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """The main figure of each arm, and its differences to real images alone, [value, low, high] of paired draws."""
    name = BEST_OF[tested.task.kind]

    def measure(rows: np.ndarray) -> dict[str, float]:
        each = {arm: measures(tested.task.kind, own[rows], tested.targets[rows])[name] for arm, own in scores.items()}
        differences = {f"{name} {arm} - real": each[arm] - each["real"] for arm in ARMS[1:]}
        return {f"{name} {arm}": value for arm, value in each.items()} | differences

    return with_intervals(measure, tested.groups)
