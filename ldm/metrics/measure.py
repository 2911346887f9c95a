"""A measure with its interval, and what each is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ldm.metrics.intervals import DRAWS, Estimate

LOWER, HIGHER, NONE = "lower", "higher", ""
TITLES = {  # name -> title, what is better, one line
    "fid": ("FID", LOWER, "Fréchet distance of Gaussians; biased upwards by few images"),
    "fd_infinity": ("FD∞", LOWER, "FID extrapolated to infinitely many images"),
    "kid": ("KID", LOWER, "unbiased, polynomial kernel; may be below 0"),
    "cmmd": ("CMMD", LOWER, "Gaussian kernel on features of unit length, times 1000"),
    "precision": ("precision", HIGHER, "share of generated images near real ones"),
    "recall": ("recall", HIGHER, "share of real images near generated ones"),
    "density": ("density", NONE, "real neighbourhoods around a generated image; 1 is usual, more a few modes"),
    "coverage": ("coverage", HIGHER, "share of real images with a generated one in their neighbourhood"),
}


@dataclass(frozen=True)
class Measure:
    """One row of a table: a value, its 95% interval (None: none), and what to know of it.

    better: lower, higher or "". invalid: why the value is not to be used, "" if it is.
    """

    name: str
    title: str
    value: float
    low: float | None = None
    high: float | None = None
    better: str = NONE
    note: str = ""
    invalid: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in ("", None)}


def measure_of(
    name: str, estimate: Estimate, groups: Sequence[np.ndarray | None] = (None, None), title: str = "",
    better: str = NONE, note: str = "", invalid: str = "", draws: int = DRAWS, seed: int = 0,
) -> Measure:  # fmt: skip
    """An estimate as a measure. groups: of the generated and of the real images.

    >>> measure = measure_of("precision", Estimate(0.5, np.array([-0.5, 0.5]), bounds=(0.0, 1.0)))
    >>> measure.title, measure.value, (measure.low, measure.high), measure.better
    ('precision', 0.5, (0.0, 1.0), 'higher')
    """
    known = TITLES.get(name, (title or name, better, note))
    low, high = estimate.interval(*groups, draws=draws, seed=seed)
    return Measure(name, title or known[0], estimate.value, low, high, better or known[1], note or known[2], invalid)
