"""Has a model learnt its training images by heart? Distances to the nearest of them, against those of held-out images.

A held-out real image is as near to the training images as a new one of the same kind. Generated images that are nearer
show what was learnt by heart; the comparison needs no threshold of its own, and no assumption on the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ldm.encoders.feature_files import FeatureSet, check_alike
from ldm.errors import UserError
from ldm.metrics.conditional import auroc
from ldm.metrics.intervals import mean_of
from ldm.metrics.measure import LOWER, Measure, measure_of

QUANTILE = 0.05  # of held-out distances; as many held-out images are nearer
CAUGHT = 0.25  # share of generated images below it, from whose lower end on a model memorises
NEIGHBOURS = 3
BLOCK = 1024
LEAST = 20  # held-out images
EQUAL = 1e-7  # distance up to which features are those of the same image


@dataclass(frozen=True)
class Nearest:
    """The nearest training images: distance (N,k), the nearest first, and their rows (N,k). same: identical pixels."""

    distance: np.ndarray
    row: np.ndarray
    same: np.ndarray


@dataclass(frozen=True)
class Memorisation:
    """What the comparison says: `memorises`, `nearer` or `no sign`; figures; nearest of both; the copies' rows."""

    verdict: str
    measures: list[Measure]
    generated: Nearest
    held_out: Nearest
    limit: float
    copies: np.ndarray
    repeats: list[tuple[int, int]]

    @property
    def words(self) -> str:
        return {
            "memorises": "The model memorises: far more generated images are close to a training image than held-out "
            "ones are. Do not share it, nor its images, before you have looked at the sheet.",
            "nearer": "Generated images are nearer to the training images than held-out ones are, without a sign of "
            "copies: usual of images that are smoother or nearer to the mean than real ones. Look at the sheet.",
            "no sign": "No sign of memorisation: generated images are as far from training images as held-out ones.",
        }[self.verdict]


def nearest(
    features: FeatureSet,
    train: FeatureSet,
    neighbours: int = NEIGHBOURS,
    device: str = "cpu",
    centre: np.ndarray | None = None,
) -> Nearest:
    """The nearest training images by the cosine distance of features, 1 - cos, from `centre` (D,), the training mean.

    Digests tell equal pixels.

    >>> train = FeatureSet(np.array([[1.0, 0.0], [-1.0, 0.0]]), pd.DataFrame())
    >>> found = nearest(FeatureSet(np.array([[0.9, 0.1]]), pd.DataFrame()), train)
    >>> found.row, found.distance
    (array([[0, 1]]), array([[0.00612, 1.9939]]))
    """
    mean = train.values.mean(0) if centre is None else centre
    own, other = (
        torch.nn.functional.normalize(torch.from_numpy(each.values - mean).to(device).double(), dim=1)
        for each in (features, train)
    )
    found = [(1 - part @ other.T).topk(min(neighbours, len(train)), largest=False) for part in own.split(BLOCK)]
    distance, row = (torch.cat([getattr(each, name) for each in found]).cpu().numpy() for name in ("values", "indices"))
    same = np.zeros(len(features), bool)
    if features.digest is not None and train.digest is not None:
        known = {digest.tobytes(): i for i, digest in enumerate(train.digest)}
        for i, digest in enumerate(features.digest):
            if digest.tobytes() in known:
                same[i], row[i, 0], distance[i, 0] = True, known[digest.tobytes()], 0.0
    return Nearest(distance.clip(min=0), row, same)


def memorisation(
    generated: FeatureSet,
    held_out: FeatureSet,
    train: FeatureSet,
    groups: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    device: str = "cpu",
    **settings: int,
) -> Memorisation:
    """Compare distances to the training images. groups: of generated and held-out images, for the intervals.

    Held-out images that are training images too are left out. UserError: features of different extractors, fewer than
    LEAST held-out images, most of them among the training ones.

    >>> train, held_out = (FeatureSet(part, pd.DataFrame()) for part in (real[:200], real[200:]))
    >>> copies = FeatureSet(train.values[:50] + 0.01, pd.DataFrame())
    >>> fresh = FeatureSet(-real[200:], pd.DataFrame())
    >>> [memorisation(each, held_out, train).verdict for each in (copies, fresh)]
    ['memorises', 'no sign']
    """
    for features in (generated, held_out):
        check_alike(features, train)
    if len(held_out) < LEAST:
        raise UserError(
            f"memorisation needs {LEAST} held-out images to compare with; {held_out.name} has {len(held_out)}."
        )
    own, real = nearest(generated, train, device=device), nearest(held_out, train, device=device)
    fresh = ~(real.same | (real.distance[:, 0] < EQUAL))
    known = int((~fresh).sum())
    if fresh.mean() < 0.5 or fresh.sum() < LEAST:
        raise UserError(
            f"{known} of {len(held_out)} images of {held_out.name} are in the training set "
            f"{train.name} too: they are not held out. Select by --where split=test and --train-where split=train."
        )
    near, usual = own.distance[:, 0], real.distance[fresh, 0]
    groups = groups[0], None if groups[1] is None else groups[1][fresh]
    limit = float(np.quantile(usual, QUANTILE))
    below = near < limit
    closer = auroc(-near, -usual)  # a generated image is nearer than a held-out one
    share = mean_of(below, bounds=(0.0, 1.0))
    measures = [
        measure_of("nearer", closer, groups, "generated nearer than held-out", LOWER, "0.5: as near as real",
               **settings),
        measure_of("close_share", share, (groups[0], None), "close to a training image", LOWER,
               f"share below {limit:.3f}, where {QUANTILE:.0%} of held-out images are", **settings),
        Measure("nearest_median", "median distance to training", float(np.median(near)),
               note=f"held-out {np.median(usual):.3f}; 1 - cosine of features"),
        Measure("identical", "pixels of a training image", float(own.same.sum()), better=LOWER,
               note="exact duplicates" + (f"; {known} held-out images are such too, and left out" if known else "")),
    ]  # fmt: skip
    repeats = repeated(generated, limit, train.values.mean(0), device)
    measures.append(
        Measure(
            "repeated",
            "pairs of generated images as close",
            float(len(repeats)),
            better=LOWER,
            note=f"below {limit:.3f} of each other",
        )
    )
    caught = own.same.any() or measures[1].low > CAUGHT
    verdict = "memorises" if caught else "nearer" if measures[0].low > 0.5 else "no sign"
    return Memorisation(verdict, measures, own, real, limit, np.flatnonzero(below | own.same), repeats)


def repeated(features: FeatureSet, limit: float, centre: np.ndarray, device: str = "cpu") -> list[tuple[int, int]]:
    """Pairs of images of one set whose distance from `centre` (D,), the training mean, is below the limit.

    >>> features = FeatureSet(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01]]), pd.DataFrame())
    >>> repeated(features, limit=0.1, centre=np.zeros(2))
    [(0, 2)]
    """
    found = nearest(features, features, 2, device, centre)
    pairs = set()
    for i, (distances, rows) in enumerate(zip(found.distance, found.row)):
        pairs |= {(min(i, int(j)), max(i, int(j))) for d, j in zip(distances, rows) if j != i and d < limit}
    return sorted(pairs)
