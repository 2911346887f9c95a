"""Precision, recall, density and coverage: how the nearest neighbours of real and generated images lie.

With r(y) the distance of a real image y to its k-th nearest other real image:

    precision   share of generated images within r(y) of some real y      (Kynkäänniemi et al. 2019, arXiv:1904.06991)
    recall      the same with real and generated exchanged
    density     mean number of real y within whose r(y) a generated image lies, over k
    coverage    share of real y that have a generated image within r(y)    (Naeem et al. 2020, arXiv:2002.09797)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.metrics.intervals import Estimate

NEIGHBOURS = 5
BLOCK = 1024


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (N,M) of (N,D) and (M,D), of float64 to stay exact near 0.

    >>> distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([[5., 1.]], dtype=torch.float64)
    """
    return torch.cdist(x.double(), y.double(), compute_mode="use_mm_for_euclid_dist")


def radii(features: Tensor, neighbours: int) -> Tensor:
    """(N,): the distance of each to its k-th nearest other.

    >>> radii(torch.tensor([[0.0], [1.0], [3.0]]), neighbours=1)
    tensor([1., 1., 2.], dtype=torch.float64)
    """
    found = [distances(part, features).kthvalue(neighbours + 1).values for part in features.split(BLOCK)]
    return torch.cat(found)


def prdc(
    generated: np.ndarray, real: np.ndarray, neighbours: int = NEIGHBOURS, device: str = "cpu"
) -> dict[str, Estimate]:
    """Precision, recall, density, coverage of features (N,D) and (M,D).

    Their intervals draw the images that are counted, with the radii of the others as they are.

    >>> {name: estimate.value for name, estimate in prdc(generated, real).items()}
    {'precision': 0.84, 'recall': 0.84, 'density': 0.8600, 'coverage': 0.8067}
    """
    x, y = (torch.from_numpy(np.ascontiguousarray(part)).to(device).double() for part in (generated, real))
    radius_x, radius_y = radii(x, neighbours), radii(y, neighbours)
    inside, density, recalled = [], [], torch.zeros(len(y), dtype=torch.bool, device=device)
    nearest = torch.full((len(y),), torch.inf, dtype=torch.double, device=device)
    for first, part in zip(range(0, len(x), BLOCK), x.split(BLOCK)):
        apart = distances(part, y)  # (n,M)
        within = apart <= radius_y
        inside.append(within.any(1))
        density.append(within.sum(1) / neighbours)
        recalled |= (apart <= radius_x[first : first + len(part), None]).any(0)
        nearest = torch.minimum(nearest, apart.min(0).values)
    of_generated = {"precision": torch.cat(inside), "density": torch.cat(density)}
    of_real = {"recall": recalled, "coverage": nearest <= radius_y}
    found = {}
    for name, values in (of_generated | of_real).items():
        counted = values.double().cpu().numpy()
        added = counted - counted.mean()
        bounds = (0.0, np.inf) if name == "density" else (0.0, 1.0)
        sides = {"generated" if name in of_generated else "real": added}
        found[name] = Estimate(float(counted.mean()), **sides, bounds=bounds)
    return {name: found[name] for name in ("precision", "recall", "density", "coverage")}
