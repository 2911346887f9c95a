"""Do generated images show what they were asked for? Features of conditions, classes, captions, scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from ldm.encoders.feature_files import FeatureSet
from ldm.errors import UserError, suggest
from ldm.metrics import frechet
from ldm.metrics.intervals import Estimate, mean_of
from ldm.metrics.measure import HIGHER, LOWER, Measure, measure_of

BINS = 10
BLOCK = 2048  # images whose similarities are held at once
LEAST = 2  # images of a class that a distance needs


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarities (N,M) of features (N,D) and (M,D).

    >>> cosines(np.array([[1.0, 0.0]]), np.array([[2.0, 0.0], [1.0, 1.0]]))
    array([[1.        , 0.7071]])
    """
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12) for x in (a, b))
    return a @ b.T


@dataclass(frozen=True)
class Following:
    """How N generated images follow their conditions, of which there are `count`.

    own (N,): cosine to the own condition. margin (N,): that less the mean cosine to the others. rank (N,): 1 is best.
    """

    own: np.ndarray
    margin: np.ndarray
    rank: np.ndarray
    count: int


def following(generated: np.ndarray, conditions: np.ndarray, which: np.ndarray | None = None) -> Following:
    """Features of generated images (N,D) against those of conditions (M,D).

    which: (N,) the row of the condition that each image was made from; None: row by row. rank: place of the own
    condition among all, by similarity; equal ones count as before it. UserError: a single condition.

    >>> conditions = np.eye(3)
    >>> found = following(np.array([[1.0, 0.2, 0.0], [0.0, 0.1, 1.0]]), conditions, which=np.array([0, 1]))
    >>> found.own, found.rank
    (array([0.9806, 0.0995]), array([1, 2]))
    """
    if len(conditions) < 2:
        raise UserError("whether images follow their conditions is told from 2 conditions on; got 1.")
    return _against(generated, conditions, which)


def _against(images: np.ndarray, given: np.ndarray, which: np.ndarray | None, least: float = -1.0) -> Following:
    """Cosines of images (N,D) and what was given (M,D), smaller ones than `least` counting as that."""
    which = np.arange(len(images)) if which is None else which
    parts = []
    for first in range(0, len(images), BLOCK):
        similarity = cosines(images[first : first + BLOCK], given).clip(min=least)
        own = similarity[np.arange(len(similarity)), which[first : first + BLOCK]]
        others = (similarity.sum(1) - own) / max(len(given) - 1, 1)
        parts.append((own, own - others, (similarity >= own[:, None]).sum(1)))
    return Following(*(np.concatenate(each) for each in zip(*parts)), len(given))


def following_measures(found: Following, groups: np.ndarray | None, **settings: int) -> list[Measure]:
    """Rows of a report, with intervals by `groups` (N,) of the images; settings: of `measure_of`.

    >>> found = following(np.eye(8) + 0.1, np.eye(8))
    >>> [(measure.name, measure.value) for measure in following_measures(found, None)[:3]]
    [('condition_cosine', 0.9723), ('condition_margin', 0.8839), ('retrieval_top1', 1.0)]
    """
    count = found.count

    def mean(name: str, values: np.ndarray, title: str, note: str, better: str = HIGHER, **bounds: tuple) -> Measure:
        return measure_of(name, mean_of(values, **bounds), (groups, None), title, better, note, **settings)

    unit = {"bounds": (0.0, 1.0)}
    return [
        mean("condition_cosine", found.own, "similarity to the own condition", "cosine of features"),
        mean("condition_margin", found.margin, "margin over the others' conditions", "0: the condition has no effect"),
        mean("retrieval_top1", found.rank == 1, "own condition found first", f"of {count}; by chance {1 / count:.3f}",
             **unit),
        mean("retrieval_top5", found.rank <= 5, "own condition among the first 5",
             f"of {count}; by chance {min(1, 5 / count):.3f}", **unit),
        mean("retrieval_rank", found.rank, "mean rank of the own condition", f"1 to {count}; by chance "
             f"{(count + 1) / 2:.1f}", LOWER),
    ]  # fmt: skip


def per_class(
    generated: FeatureSet,
    real: FeatureSet,
    column: str,
    groups: tuple[np.ndarray | None, np.ndarray | None],
    **settings: int,
) -> tuple[list[Measure], list[str]]:
    """FID within each class that both sets have, and warnings. UserError where a set does not know `column`.

    >>> tables = [pd.DataFrame({"cancer": ["LUAD", "LUSC"] * (len(part) // 2)}) for part in (generated, real)]
    >>> sets = [FeatureSet(part, table) for part, table in zip((generated, real), tables)]
    >>> measures, warnings = per_class(*sets, "cancer", (None, None))
    >>> [(measure.name, measure.value, measure.note) for measure in measures]
    [('fid_cancer_LUAD', 2.4843, '100 generated, 150 real'), ('fid_cancer_LUSC', 1.8231, '100 generated, 150 real')]
    """
    for features in (generated, real):
        if column not in features.table:
            raise UserError(
                f"{features.name} does not tell the '{column}' of its images{suggest(column, features.table.columns)}"
            )
    labels = [features.table[column].astype(str).to_numpy() for features in (generated, real)]
    names = sorted(set(labels[0]) & set(labels[1]))
    alone = sorted(set(labels[0]) ^ set(labels[1]))
    warnings = [f"classes in one set only, left out: {', '.join(alone[:10])}."] if alone else []
    measures = []
    for name in names:
        rows = [np.flatnonzero(own == name) for own in labels]
        if min(map(len, rows)) < LEAST:
            warnings.append(f"{column} {name} has {min(map(len, rows))} image; it has no distance.")
            continue
        own = [None if group is None else group[row] for group, row in zip(groups, rows)]
        estimate = frechet.fid(generated.values[rows[0]], real.values[rows[1]])
        few = few_images(*map(len, rows), generated.values.shape[1])
        note = f"{len(rows[0])} generated, {len(rows[1])} real"
        measures.append(
            measure_of(f"fid_{column}_{name}", estimate, own, f"FID, {column} {name}", LOWER, note, few, **settings)
        )
    if not measures:
        raise UserError(f"no {column} is in both sets with {LEAST} images: {', '.join(alone[:10])}.")
    return measures, warnings


def few_images(generated: int, real: int, dim: int) -> str:
    """Why FID is not valid for so few images, "" if it is.

    >>> few_images(50, 5000, 2048)
    '50 images, 2048 dimensions: the covariance is singular and the bias large; compare by KID or CMMD'
    """
    fewest = min(generated, real)
    if fewest > dim:
        return ""
    return f"{fewest} images, {dim} dimensions: the covariance is singular and the bias large; compare by KID or CMMD"


def clip_score(
    images: np.ndarray,
    captions: np.ndarray,
    groups: np.ndarray | None,
    which: np.ndarray | None = None,
    **settings: int,
) -> list[Measure]:
    """CLIP score, 100 max(cos, 0) of images (N,D) and their captions (M,D) (Hessel et al. 2021, arXiv:2104.08718).

    which: (N,) the row of each image's caption; None: row by row.

    >>> images, captions = np.eye(4) + 0.5, np.eye(4)
    >>> [(measure.name, measure.value) for measure in clip_score(images, captions, None)]
    [('clip_score', 86.6025), ('clip_margin', 57.7350)]
    """
    found = _against(images, captions, which, 0.0)
    return [
        measure_of("clip_score", mean_of(100 * found.own), (groups, None), "CLIP score", HIGHER, "100 · cosine",
               **settings),
        measure_of("clip_margin", mean_of(100 * found.margin), (groups, None), "CLIP score less that of other captions",
               HIGHER, "0: the caption has no effect", **settings),
    ]  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Scores against what they should be. centre, mean, share (bins,): of scores, targets and images; NaN: no image."""

    measures: list[Measure]
    centre: np.ndarray
    mean: np.ndarray
    share: np.ndarray


def calibration(table: pd.DataFrame, groups: np.ndarray | None = None, **settings: int) -> Calibration:
    """Of a table with `score` in 0..1, `target` (a label 0 or 1, or the score that was asked for), members score_0, ...

    Expected calibration error: mean over images of |mean score - mean target| of their bin, of BINS equally wide ones.

    >>> table = pd.DataFrame({"score": [0.1, 0.2, 0.7, 0.9], "target": [0, 0, 1, 1]})
    >>> {measure.name: measure.value for measure in calibration(table).measures}
    {'calibration_error': 0.1750, 'brier': 0.0375, 'score_bias': -0.025, 'auroc': 1.0}
    """
    for name in ("score", "target"):
        if name not in table:
            raise UserError(f"a table of scores needs the column '{name}'{suggest(name, table.columns)}")
        wrong = ~pd.to_numeric(table[name], errors="coerce").between(0, 1)
        if wrong.any():
            raise UserError(
                f"{name} is a number from 0 to 1; row {int(wrong.argmax()) + 2} has '{table[name][wrong.argmax()]}'."
            )
    score, target = (table[name].to_numpy(float) for name in ("score", "target"))
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre, mean = (np.bincount(place, values, BINS) / count for values in (score, target))
    gap = np.abs(centre - mean)[place]
    side = np.sign(centre - mean)[place]
    error = Estimate(float(gap.mean()), side * (score - target) - gap.mean(), bounds=(0.0, 1.0))
    both = (groups, None)
    measures = [
        measure_of("calibration_error", error, both, "expected calibration error", LOWER, f"{BINS} bins", **settings),
        measure_of("brier", mean_of((score - target) ** 2), both, "Brier score", LOWER, "squared error", **settings),
        measure_of(
            "score_bias", mean_of(score - target), both, "mean score less mean target", note="0 is best", **settings
        ),
    ]
    if set(np.unique(target)) == {0.0, 1.0}:
        parts, influence = auroc(score[target == 1], score[target == 0]), np.empty(len(score))
        for own, added in ((target == 1, parts.generated), (target == 0, parts.real)):
            influence[own] = added * len(score) / own.sum()  # a patient's positives and negatives are drawn together
        estimate = Estimate(parts.value, influence, bounds=parts.bounds)
        measures.append(
            measure_of("auroc", estimate, both, "AUROC", HIGHER, "a positive scores above a negative", **settings)
        )
    members = [table[name].to_numpy(float) for name in table if name.startswith("score_") and name[6:].isdigit()]
    if len(members) > 1:
        apart = np.std(members, axis=0)
        measures.append(measure_of("disagreement", mean_of(apart), both, "disagreement of the ensemble", LOWER,
                              f"standard deviation over {len(members)} members", **settings))  # fmt: skip
    return Calibration(measures, centre, mean, count / len(score))


def auroc(above: np.ndarray, below: np.ndarray) -> Estimate:
    """P(a > b) + P(a = b)/2 for a of `above` (N,), b of `below` (M,), with influences (DeLong et al. 1988).

    >>> auroc(np.array([0.9, 0.8, 0.3]), np.array([0.1, 0.4])).value  # 5 of 6 pairs
    0.8333
    """
    n, m = len(above), len(below)
    ranks = rankdata(np.concatenate([above, below]))
    of_above = (ranks[:n] - rankdata(above)) / m  # share of b that each a is above
    of_below = 1 - (ranks[n:] - rankdata(below)) / n
    value = float(of_above.mean())
    return Estimate(value, of_above - value, of_below - value, bounds=(0.0, 1.0))
