"""How good scores are: ranking, agreement, calibration, with intervals that draw whole groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from scipy.stats import norm, rankdata

from ldm.errors import UserError

RESAMPLES = 1000
BINS = 10
KINDS = ("binary", "graded", "classes")


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve of scores (N,) for positive (N,) bool: the Mann-Whitney statistic; NaN for one class.

    >>> auroc(np.array([0.9, 0.8, 0.3, 0.1, 0.4]), np.array([True, True, True, False, False]))  # 5 of 6 pairs
    0.8333
    """
    positive = np.asarray(positive, bool)
    count, rest = int(positive.sum()), int((~positive).sum())
    if not count or not rest:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - count * (count + 1) / 2) / (count * rest))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of (N,) and (N,), ties averaged; NaN where one is constant.

    >>> spearman(np.array([1, 2, 3, 4]), np.array([1, 3, 2, 9]))
    0.8
    """
    a, b = rankdata(a), rankdata(b)
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else float("nan")


def calibration_error(scores: np.ndarray, targets: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) of scores (N,) in [0,1] for targets (N,) in [0,1].

    Bins hold equally many scores.

    >>> calibration_error(np.array([0.1, 0.2, 0.7, 0.9]), np.array([0, 0, 1, 1]), bins=2)
    0.175
    """
    order = np.argsort(scores, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return float(sum(abs(scores[part].mean() - targets[part].mean()) * len(part) for part in parts) / len(order))


def measures(kind: str, scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Figures of scores for targets. The first of each kind is what a training stops by; larger is better.

    binary: scores (N,), targets 0 or 1: auroc, balanced_accuracy (at 0.5), brier, ece.
    graded: scores and targets (N,) in [0,1]: spearman, auroc (of targets at or above 0.5), mae, ece.
    classes: scores (N,K), targets (N,) of 0..K-1: auroc (mean of each class against the rest), balanced_accuracy, nll,
        ece (of the most likely class).

    >>> measures("binary", np.array([0.1, 0.2, 0.7, 0.9]), np.array([0, 0, 1, 1]))
    {'auroc': 1.0, 'balanced_accuracy': 1.0, 'brier': 0.0375, 'ece': 0.175}
    """
    if kind == "binary":
        sides = [(scores >= 0.5)[targets == 1], (scores < 0.5)[targets == 0]]
        accuracy = float(np.mean([side.mean() for side in sides])) if all(map(len, sides)) else float("nan")
        return {
            "auroc": auroc(scores, targets == 1),
            "balanced_accuracy": accuracy,
            "brier": float(np.mean((scores - targets) ** 2)),
            "ece": calibration_error(scores, targets),
        }
    if kind == "graded":
        return {
            "spearman": spearman(scores, targets),
            "auroc": auroc(scores, targets >= 0.5),
            "mae": float(np.abs(scores - targets).mean()),
            "ece": calibration_error(scores, targets),
        }
    wanted = targets.astype(int)
    seen, best = np.unique(wanted), scores.argmax(1)
    own = np.clip(scores[np.arange(len(wanted)), wanted], 1e-12, 1)
    return {
        "auroc": float(np.mean([auroc(scores[:, k], wanted == k) for k in seen])),
        "balanced_accuracy": float(np.mean([(best[wanted == k] == k).mean() for k in seen])),
        "nll": float(-np.log(own).mean()),
        "ece": calibration_error(scores.max(1), (best == wanted).astype(float)),
    }


def with_intervals(
    measure: Callable[[np.ndarray], Mapping[str, float]], groups: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, list[float]]:
    """name -> [value, low, high] of `measure`, a function of the rows (n,) that it looks at.

    The interval is the middle 95% of the measure over draws of whole groups (N,) with replacement (percentile
    bootstrap). Draws in which it is not defined, such as of one class, are left out.

    >>> scores, groups = np.array([0.2, 0.4, 0.6, 0.8]), np.array(["P1", "P1", "P2", "P2"])
    >>> with_intervals(lambda rows: {"mean": scores[rows].mean()}, groups)
    {'mean': [0.5, 0.3, 0.7]}
    """
    names, member = np.unique(groups, return_inverse=True)
    rows = [np.flatnonzero(member == k) for k in range(len(names))]
    rng = np.random.default_rng(seed)
    value = measure(np.arange(len(groups)))
    drawn: dict[str, list[float]] = {name: [] for name in value}
    for _ in range(resamples if len(names) > 1 else 0):
        part = np.concatenate([rows[k] for k in rng.integers(len(names), size=len(names))])
        for name, each in measure(part).items():
            drawn[name].append(each)
    found = {}
    for name, values in drawn.items():
        known = np.array(values)[np.isfinite(values)]
        low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (float("nan"),) * 2
        found[name] = [round(float(v), 5) for v in (value[name], low, high)]
    return found


def proportion(passed: int, tried: int) -> tuple[float, float, float]:
    """passed / tried with its 95% interval (Wilson 1927).

    >>> proportion(8, 10)
    (0.8, 0.4902, 0.9433)
    """
    if not 0 <= passed <= tried or not tried:
        raise UserError(f"a proportion is of 1 or more, and none to all of them pass; got {passed} of {tried}.")
    z = float(norm.ppf(0.975))
    share, weight = passed / tried, 1 + z**2 / tried
    middle = (share + z**2 / (2 * tried)) / weight
    half = z * np.sqrt(share * (1 - share) / tried + z**2 / (4 * tried**2)) / weight
    return share, max(0.0, float(middle - half)), min(1.0, float(middle + half))


def fit_temperature(kind: str, logits: np.ndarray, targets: np.ndarray) -> tuple[float, list[float]]:
    """Temperature and offsets that make logits (N,) or (N,K) most likely: logits / temperature + offset.

    One temperature (Guo et al. 2017, section 4.2); the offsets, one for each output, undo the class frequencies that a
    balanced training has shown. targets as in `measures`.

    >>> logits = np.array([-4.0, -4.0, 4.0, 4.0] * 10)                              # sure of all
    >>> temperature, offset = fit_temperature("binary", logits, np.array([0, 0, 1, 0] * 10))
    >>> calibrated("binary", np.array([4.0]), temperature, offset)                  # of which half were right
    array([0.50])
    """
    logits = np.asarray(logits, np.float64)
    count = 1 if kind != "classes" else logits.shape[1]

    def loss(at: np.ndarray) -> float:
        scaled = logits / np.exp(at[0]) + (at[1] if count == 1 else at[1:])
        if count == 1:
            return float(np.mean(np.logaddexp(0, scaled) - targets * scaled)) + 1e-4 * float((at**2).sum())
        own = log_softmax(scaled, axis=1)[np.arange(len(scaled)), targets.astype(int)]
        return float(-own.mean()) + 1e-4 * float((at**2).sum())

    best = minimize(loss, np.zeros(1 + count), method="L-BFGS-B", bounds=[(-3, 3), *[(-10, 10)] * count])
    return float(np.exp(best.x[0])), [float(v) for v in best.x[1:]]


def calibrated(kind: str, logits: np.ndarray, temperature: float, offset: list[float]) -> np.ndarray:
    """Scores in [0,1], shaped as the logits, (..., K) for classes.

    >>> calibrated("binary", np.array([-2.0, 0.0, 2.0]), temperature=2.0, offset=[0.0])
    array([0.2689, 0.5       , 0.7311])
    """
    scaled = logits / temperature + (offset[0] if kind != "classes" else np.asarray(offset))
    return expit(scaled) if kind != "classes" else np.exp(log_softmax(scaled, axis=-1))
