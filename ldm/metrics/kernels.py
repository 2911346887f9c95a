"""Kernel distances of features: KID and CMMD, both the squared maximum mean discrepancy.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

KID (Bińkowski et al. 2018, arXiv:1801.01401): k = (x·y / D + 1)^3, over pairs of different images: unbiased.
CMMD (Jayasumana et al. 2024, arXiv:2401.09603): features of unit length, k = exp(-|x - y|^2 / (2·10^2)), over all
pairs, times 1000. It was published for CLIP's image features (ViT-L/14 at 336 px).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm.metrics.intervals import Estimate

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as published
ALL_PAIRS = 5000  # images of a set up to which KID is over all pairs, which has the same mean and varies less
SIGMA, SCALE = 10.0, 1000.0
BLOCK = 2048
Kernel = Callable[[Tensor, Tensor], Tensor]


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(N,D), (M,D) -> (N,M).

    >>> polynomial(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    tensor([[8., 1.]])
    """
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """(N,D), (M,D) -> (N,M).

    >>> gaussian(torch.tensor([[0.0]]), torch.tensor([[0.0], [10.0]]))
    tensor([[1.0000, 0.6065]])
    """
    apart = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return (-apart.clamp(min=0) / (2 * SIGMA**2)).exp()


def row_sums(kernel: Kernel, x: Tensor, y: Tensor) -> np.ndarray:
    """(N,) float64: the sum of k(x_i, y_j) over j.

    >>> row_sums(gaussian, torch.tensor([[0.0], [10.0]]), torch.tensor([[0.0], [0.0]]))
    array([2.        , 1.2131])
    """
    total = np.zeros(len(x))
    for i in range(0, len(x), BLOCK):
        rows = x[i : i + BLOCK]
        total[i : i + BLOCK] = sum(
            kernel(rows, y[j : j + BLOCK]).sum(1, dtype=torch.float64).cpu().numpy() for j in range(0, len(y), BLOCK)
        )
    return total


def discrepancy(kernel: Kernel, x: Tensor, y: Tensor, unbiased: bool) -> Estimate:
    """The squared discrepancy over all pairs of two sets, with the influence of every image.

    >>> x, y = torch.from_numpy(generated), torch.from_numpy(real)
    >>> discrepancy(polynomial, x, y, unbiased=True).value, discrepancy(polynomial, x, y, unbiased=False).value
    (0.1655, 0.2315)
    """
    n, m = len(x), len(y)
    means = []
    for own in (x, y):
        sums, count = row_sums(kernel, own, own), len(own)
        if unbiased:
            own_kernel = torch.cat([kernel(part, part).diagonal() for part in own.split(64)])
            sums, count = sums - own_kernel.double().cpu().numpy(), count - 1
        means.append(sums / count)
    across = row_sums(kernel, x, y) / m
    back = row_sums(kernel, y, x) / n
    value = means[0].mean() + means[1].mean() - 2 * across.mean()
    return Estimate(float(value), _centred(2 * (means[0] - across)), _centred(2 * (means[1] - back)))


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()


def kid(
    generated: np.ndarray, real: np.ndarray, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE,
    all_pairs: int = ALL_PAIRS, device: str = "cpu", seed: int = 0,
) -> Estimate:  # fmt: skip
    """KID of features (N,D) and (M,D). Values below 0 occur: the sets then differ less than two draws do.

    Sets of up to `all_pairs` images: over all pairs. Larger ones: the mean over `subsets` random subsets of
    `subset_size` images, and influences from kernel means over as many random images as `all_pairs`.

    >>> kid(generated, real).value, kid(real[:150], real[150:]).value
    (0.1655, -0.00447)
    """
    rng = np.random.default_rng(seed)
    x, y = (torch.from_numpy(np.ascontiguousarray(part)).to(device, torch.float32) for part in (generated, real))
    if max(len(x), len(y)) <= all_pairs:
        return discrepancy(polynomial, x.double(), y.double(), unbiased=True)
    size = min(subset_size, len(x), len(y))
    values = []
    for _ in range(subsets):
        rows, others = (torch.from_numpy(rng.choice(len(part), size, replace=False)) for part in (x, y))
        values.append(discrepancy(polynomial, x[rows].double(), y[others].double(), unbiased=True).value)
    few_x, few_y = (part[torch.from_numpy(rng.permutation(len(part))[:all_pairs])] for part in (x, y))
    influences = [
        _centred(2 * (row_sums(polynomial, own, like) / len(like) - row_sums(polynomial, own, other) / len(other)))
        for own, like, other in ((x, few_x, few_y), (y, few_y, few_x))
    ]
    return Estimate(float(np.mean(values)), *influences, spread=float(np.std(values) / np.sqrt(subsets)))


def cmmd(generated: np.ndarray, real: np.ndarray, device: str = "cpu") -> Estimate:
    """CMMD of features (N,D) and (M,D), which are scaled to unit length.

    >>> cmmd(generated, real).value, cmmd(real[:150], real[150:]).value
    (0.5572, 0.1111)
    """
    x, y = (_unit(part, device) for part in (generated, real))
    found = discrepancy(gaussian, x, y, unbiased=False)
    return Estimate(SCALE * found.value, SCALE * found.generated, SCALE * found.real, bounds=(0.0, np.inf))


def _unit(features: np.ndarray, device: str) -> Tensor:
    values = torch.from_numpy(np.asarray(features, np.float64)).to(device)
    return values / values.norm(dim=1, keepdim=True).clamp(min=1e-12)
