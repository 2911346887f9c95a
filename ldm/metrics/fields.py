"""How sampled fields of features differ from those of slides: in their features, and in how far these tell of others.

A field is (rows,cols,D), NaN at holes. The correlation at a lag is

    r(l) = sum (a - m)·(b - m) / sum (|a - m|^2 + |b - m|^2) / 2

over all pairs of features a, b that lie l places apart along rows or columns, m the mean over the field: 1 where
neighbours are equal, 0 where they are independent. Intervals draw square blocks of a field, as places near one another
are alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.errors import UserError
from ldm.metrics.frechet import fid
from ldm.metrics.intervals import Estimate
from ldm.metrics.kernels import kid
from ldm.metrics.measure import Measure, measure_of

LAGS = (1, 2, 4, 8)
BLOCK = 4  # places along each side of a block
LEAST = 16  # pairs of a lag


def blocks_of(known: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """(N,): the block of each place that a mask (rows,cols) has, row by row.

    >>> blocks_of(np.ones((2, 6), bool), block=4)
    array([0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1])
    """
    row, col = np.nonzero(known)
    return row // block * (known.shape[1] // block + 1) + col // block


def neighbour_correlation(field: np.ndarray, lag: int, block: int = BLOCK) -> tuple[Estimate, np.ndarray]:
    """The correlation r of a field at a lag, with the influence of each pair, and the block (P,) of each pair.

    NaN where all features are the same. UserError: fewer than 16 pairs lie so far apart.

    >>> field = np.repeat(np.random.default_rng(0).normal(size=(8, 8, 4)), 2, axis=1)  # every other pair across equal
    >>> estimate, blocks = neighbour_correlation(field, 1)
    >>> estimate.value, estimate.interval(blocks)
    (0.2891, (0.2329, 0.3744))
    """
    known = ~np.isnan(field).any(-1)
    number = np.full(known.shape, -1)
    number[known] = blocks_of(known, block)
    products, sizes, blocks = [], [], []
    if known.any():
        centred = field - field[known].mean(0)
        for values, own in ((centred, number), (centred.swapaxes(0, 1), number.T)):
            both = (own[:-lag] >= 0) & (own[lag:] >= 0)
            a, b = values[:-lag][both], values[lag:][both]
            products.append((a * b).sum(-1))
            sizes.append(((a**2).sum(-1) + (b**2).sum(-1)) / 2)
            blocks.append(own[:-lag][both])
    count = sum(map(len, blocks))
    if count < LEAST:
        raise UserError(f"a correlation needs {LEAST} pairs of features; {count} lie {lag} apart in the field.")
    product, size = np.concatenate(products).astype(float), np.concatenate(sizes).astype(float)
    if not size.any():  # all features are the same
        return Estimate(np.nan), np.concatenate(blocks)
    value = product.sum() / size.sum()
    estimate = Estimate(float(value), (product - value * size) / size.mean(), bounds=(-1.0, 1.0))
    return estimate, np.concatenate(blocks)


def field_measures(
    sampled: np.ndarray, real: np.ndarray, lags: Sequence[int] = LAGS, block: int = BLOCK
) -> list[Measure]:
    """Measures of a sampled field beside a real one, with intervals over blocks of both.

    Of features by themselves, wherever they lie: `kid` and `fid` of those of the one to those of the other. Of each lag
    that both are long enough for: `correlation_<lag>` of the sampled field and `real_correlation_<lag>`. And the share
    of places that are no holes.

    UserError: fields of other features, fields of holes.

    >>> rng = np.random.default_rng(0)
    >>> found = field_measures(rng.normal(size=(12, 12, 4)), rng.normal(size=(12, 12, 4)), lags=(1,))
    >>> [measure.name for measure in found]
    ['kid', 'fid', 'correlation_1', 'real_correlation_1', 'tissue', 'real_tissue']
    """
    if sampled.shape[-1] != real.shape[-1]:
        raise UserError(f"fields of {sampled.shape[-1]} and of {real.shape[-1]} values are of other encoders.")
    masks = [~np.isnan(each).any(-1) for each in (sampled, real)]
    if min(mask.sum() for mask in masks) < LEAST:
        raise UserError(f"a field is measured by {LEAST} features or more; the others are holes.")
    features = [each[mask] for each, mask in zip((sampled, real), masks)]
    groups = [blocks_of(mask, block) for mask in masks]
    found = [measure_of("kid", kid(*features), groups), measure_of("fid", fid(*features), groups)]
    for lag in lags:
        for name, field in (("correlation", sampled), ("real_correlation", real)):
            if max(field.shape[:2]) > lag:
                estimate, own = neighbour_correlation(field, lag, block)
                title = f"correlation at {lag} tiles{', real' * (field is real)}"
                found.append(measure_of(f"{name}_{lag}", estimate, (own, None), title))
    for name, mask in zip(("tissue", "real_tissue"), masks):
        found.append(Measure(name, name.replace("_", " "), float(mask.mean())))
    return found
