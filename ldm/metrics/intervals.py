"""Intervals of figures over two sets of images: a bootstrap of what each image adds.

A figure F of two sets is, to first order in the weights of their images, F + mean of a(x) over the generated + mean of
b(y) over the real ones, where a and b (the influence of an image, mean 0) have closed forms for every figure here. The
bootstrap draws groups of images (patients, slides, blocks of a slide, or images) with replacement and sums their
influences, so thousands of draws cost nothing, and the interval is centred on the figure itself: drawing the images
anew and computing a Fréchet distance again would add the bias of duplicates to each draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ldm.errors import UserError

DRAWS = 2000
LEVEL = 0.95
UNITS = ("patient", "slide", "block", "image")
MANY = 1000  # groups, whose mean is normal to any purpose
FEW = 5  # groups, below which drawing groups says nothing


@dataclass(frozen=True)
class Estimate:
    """A figure and what each image adds to it.

    Attributes:
        value: the figure. generated (N,), real (M,): influences; empty where the figure does not depend on that set.
        spread: standard error of what is random in the computation itself (subsets, extrapolation).
        bounds: the range of the figure.
    """

    value: float
    generated: np.ndarray = field(default_factory=lambda: np.empty(0))
    real: np.ndarray = field(default_factory=lambda: np.empty(0))
    spread: float = 0.0
    bounds: tuple[float, float] = (-np.inf, np.inf)

    def interval(
        self, generated: np.ndarray | None = None, real: np.ndarray | None = None, draws: int = DRAWS, seed: int = 0
    ) -> tuple[float, float]:
        """The 95% interval when groups (N,), (M,) are drawn with replacement; None draws single images."""
        rng = np.random.default_rng(seed)
        change = self.spread * rng.standard_normal(draws)
        for influence, groups in ((self.generated, generated), (self.real, real)):
            if len(influence):
                change += drawn_means(influence, groups, draws, rng)
        tail = (1 - LEVEL) / 2 * 100
        low, high = np.clip(self.value + np.percentile(change, (tail, 100 - tail)), *self.bounds)
        return float(low), float(high)


def mean_of(values: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """The mean of values (N,), one per generated image, as an estimate.

    >>> estimate = mean_of(np.array([0.0, 1.0, 1.0, 1.0]), bounds=(0.0, 1.0))
    >>> estimate.value, estimate.interval()
    (0.75, (0.25, 1.0))
    """
    values = np.asarray(values, float)
    return Estimate(float(values.mean()), values - values.mean(), bounds=bounds)


def drawn_means(values: np.ndarray, groups: np.ndarray | None, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,): means of `values` (N,) when whole groups (N,) are drawn with replacement.

    Of more than MANY groups these are drawn from the normal distribution that they have then.

    >>> values, patients = np.array([0.0, 0.0, 1.0, 1.0]), np.array(["a", "a", "b", "b"])
    >>> [float(drawn_means(values, own, 2000, np.random.default_rng(0)).std()) for own in (None, patients)]
    [0.2437, 0.3571]
    """
    if groups is None:
        sums, sizes = np.asarray(values, float), np.ones(len(values))
    else:
        index = np.unique(groups, return_inverse=True)[1]
        sums, sizes = np.bincount(index, values), np.bincount(index).astype(float)
    count = len(sums)
    if count > MANY:
        mean = sums.sum() / sizes.sum()
        return rng.normal(mean, np.sqrt(((sums - mean * sizes) ** 2).sum()) / sizes.sum(), draws)
    part = max(1, 4_000_000 // count)
    means = []
    for first in range(0, draws, part):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(part, draws - first))  # (part,G)
        means.append(times @ sums / (times @ sizes))
    return np.concatenate(means)


def choose_unit(tables: Sequence[pd.DataFrame], asked: str | None = None) -> tuple[str, list[str]]:
    """The unit whose draws the intervals are of, and warnings: the coarsest of UNITS of which all sets have FEW.

    asked: a unit that the user wants.

    >>> table = pd.DataFrame({"patient": ["a"] * 10, "slide": list("abcdefghij")})
    >>> choose_unit([table])[0], choose_unit([table], asked="image")[0]
    ('slide', 'image')
    """
    counts = {unit: min(_count(table, unit) for table in tables) for unit in UNITS}
    if asked is not None:
        known = [unit for unit in UNITS if counts[unit] >= 2]
        if asked not in known:
            raise UserError(f"intervals by {asked} need 2 {asked}s in every set; these sets have {', '.join(known)}.")
        return asked, []
    unit = next((unit for unit in UNITS if counts[unit] >= FEW), "image")
    warnings = []
    if counts["patient"] and unit != "patient":
        fewest = counts["patient"]
        warnings.append(
            f"the images of a set are of {fewest} patient{'s' * (fewest > 1)}: intervals draw {unit}s, and say how the "
            "figure varies within these patients, not over patients."
        )
    return unit, warnings


def _count(table: pd.DataFrame, unit: str) -> int:
    if unit == "image":
        return len(table)
    return int(table[unit].nunique()) if unit in table and table[unit].notna().all() else 0


def groups_of(table: pd.DataFrame, unit: str) -> np.ndarray | None:
    """The group of each image (N,), None for images themselves.

    >>> table = pd.DataFrame({"patient": ["a", "a", "b"]})
    >>> groups_of(table, "patient"), groups_of(table, "image")
    (array(['a', 'a', 'b'], dtype='<U1'), None)
    """
    return None if unit == "image" else table[unit].to_numpy(str)
