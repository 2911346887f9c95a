"""Fréchet distances of features: FID, and its extrapolation to infinitely many images.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)       (Heusel et al. 2017, arXiv:1706.08500, eq. 6)

With S1 = L1 L1^T and S2 = L2 L2^T the last trace is the sum of the singular values of L1^T L2, which needs no matrix
square root and is as accurate for singular covariances. L is the set itself, centred, where it has fewer images than
dimensions, else from the eigenvectors of the covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from ldm.metrics.intervals import Estimate

BLOCK = 4096  # rows that are float64 at a time
LARGEST = 2.5  # of 1/f, f being the smallest fraction that the extrapolation takes
SIZES = 8  # sizes of subsets that the extrapolation is through
REPEATS = 4  # subsets of each size
SKETCH = 4096  # images of each set that the extrapolation's subsets are drawn from


@dataclass(frozen=True)
class Moments:
    """Mean (D,), number of images, and a factor (D,r) of the covariance: L L^T = S, divided by N - 1."""

    mean: np.ndarray
    factor: np.ndarray
    count: int

    @property
    def trace(self) -> float:
        return float((self.factor**2).sum())


def moments(features: np.ndarray) -> Moments:
    """Mean and covariance of features (N,D), in float64 whatever the features are.

    >>> moments(real).trace  # of 16 dimensions of variance 1
    16.0026
    """
    count, dim = features.shape
    mean = np.zeros(dim)
    for part in _parts(features):
        mean += part.sum(0)
    mean /= count
    if count <= dim:
        return Moments(mean, (features.astype(np.float64) - mean).T / np.sqrt(count - 1), count)
    covariance = np.zeros((dim, dim))
    for part in _parts(features):
        part -= mean
        covariance += part.T @ part
    values, vectors = scipy.linalg.eigh(covariance / (count - 1), overwrite_a=True, check_finite=False)
    kept = values > values[-1] * dim * np.finfo(float).eps
    return Moments(mean, vectors[:, kept] * np.sqrt(values[kept]), count)


def _parts(features: np.ndarray):
    for first in range(0, len(features), BLOCK):
        yield features[first : first + BLOCK].astype(np.float64)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance of two Gaussians.

    >>> frechet_distance(moments(generated), moments(real))  # of the distributions: 16 * 0.25^2 = 1
    1.4639
    """
    shared = scipy.linalg.svdvals(a.factor.T @ b.factor, overwrite_a=True, check_finite=False).sum()
    return float(((a.mean - b.mean) ** 2).sum() + a.trace + b.trace - 2 * shared)


def fid(generated: np.ndarray, real: np.ndarray) -> Estimate:
    """FID of features (N,D) and (M,D), with the influence of every image.

    The singular value decomposition L1^T L2 = U s V^T gives it: weighing image x of the generated set by 1 + e changes
    the last trace by e/2 |s^(1/2) U^T L1^+ (x - m1)|^2, and of the real set alike with V and L2.

    >>> estimate = fid(generated, real)  # of the distributions: 16 * 0.25^2 = 1
    >>> estimate.value, estimate.interval()
    (1.4639, (1.0720, 1.8514))
    """
    a, b = moments(generated), moments(real)
    left, values, right = scipy.linalg.svd(
        a.factor.T @ b.factor, full_matrices=False, overwrite_a=True, check_finite=False
    )
    apart = a.mean - b.mean
    value = float(apart @ apart + a.trace + b.trace - 2 * values.sum())
    roots = np.sqrt(values)
    of_each = (generated, a, left * roots, apart), (real, b, right.T * roots, -apart)
    return Estimate(value, *(_influence(*each) for each in of_each), bounds=(0.0, np.inf))


def _influence(features: np.ndarray, own: Moments, directions: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """(N,): what each image adds. directions (r,k): singular vectors times the roots of their values."""
    if own.factor.shape[1] == len(features):  # the factor is the set itself: L^+ (x_i - m) is sqrt(n-1) e_i
        inside = (own.count - 1) * (directions**2).sum(1)
        inside_of = [inside[first : first + BLOCK] for first in range(0, len(features), BLOCK)]
    else:
        size = (own.factor**2).sum(0)  # columns are orthogonal: L^+ = diag(1/size) L^T
        back = own.factor / size @ directions  # (D,k)
        inside_of = [(((part - own.mean) @ back) ** 2).sum(1) for part in _parts(features)]
    added = []
    for part, inside in zip(_parts(features), inside_of):
        part -= own.mean
        added.append(2 * part @ apart + (part**2).sum(1) - inside)
    influence = np.concatenate(added)
    return influence - influence.mean()


def fid_by_size(generated: np.ndarray, real: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """FID of random subsets that hold a fraction f of both sets: 1/f (n,) and FID (n,).

    >>> inverse, values = fid_by_size(generated, real)
    >>> [float(values[inverse == at].mean()) for at in (1.0, 2.5)]  # fewer images, more distance
    [1.4639, 2.4068]
    """
    rng = np.random.default_rng(seed)
    base = min(1.0, SKETCH / max(len(generated), len(real)))
    inverse, values = [], []
    for fraction in base / np.linspace(1, LARGEST, SIZES):
        for _ in range(REPEATS if fraction < 1 else 1):
            parts = []
            for features in (generated, real):
                rows = rng.choice(len(features), max(2, round(fraction * len(features))), replace=False)
                parts.append(moments(features[rows]))
            inverse.append(1 / fraction)
            values.append(frechet_distance(*parts))
    return np.array(inverse), np.array(values)


def fd_infinity(inverse: np.ndarray, values: np.ndarray, whole: Estimate) -> Estimate:
    """FID at infinitely many images (Chong & Forsyth 2020, arXiv:1911.07023): the line of `fid_by_size` at 1/f = 0.

    FID is biased upwards by about c1/N + c2/M, which is proportional to 1/f. The publication takes fractions of the
    generated set only, which is the same for a real set of any size to spare. whole: `fid` of the whole sets, which the
    line goes through at 1/f = 1, and whose influences the interval takes.

    >>> fd_infinity(*fid_by_size(generated, real), whole=fid(generated, real)).value  # of the distributions: 1
    0.7103
    """
    away, more = inverse - 1, values - whole.value
    spread = max(away @ away, 1e-12)
    slope = away @ more / spread
    rest = more - slope * away
    error = np.sqrt((rest @ rest) / max(len(values) - 1, 1) / spread)
    return Estimate(float(whole.value - slope), whole.generated, whole.real, spread=float(error))
