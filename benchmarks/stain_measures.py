"""Measures that benchmarks of stains, classes and prompts share: a classifier of real tiles, haematoxylin, intervals.

The classifier is a small convolutional network that learns here, in seconds, from real tiles of the regions that models
were trained on; its accuracy on held-out real tiles says what its judgement is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import rgb2hed
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from ldm.data import dihedral
from ldm.data.datasets import TileDataset
from ldm.images.write import to_uint8
from ldm.requests.tiles import evenly


def tiles_of(cohort: str, column: str, name: str, split: str, count: int | None = None) -> Tensor:
    """Tiles (N,3,H,W) in [-1,1] of one class, evenly chosen."""
    tiles = TileDataset(cohort, ("image",), where={column: name, "split": split})
    return torch.stack([tiles[int(i)]["image"] for i in evenly(len(tiles), count)])


def train_classifier(tiles: Mapping[str, Tensor], steps: int, seed: int = 0) -> nn.Module:
    """A classifier (B,3,H,W) -> (B,K) of real tiles, in random orientation, brightness and contrast."""
    torch.manual_seed(seed)
    widths = (3, 16, 32, 64)
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.ReLU()) for a, b in pairwise(widths)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(tiles)))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        labels = torch.randint(len(tiles), (32,), generator=rng)
        classes = [list(tiles.values())[k] for k in labels]
        images = [each[int(torch.randint(len(each), (), generator=rng))] for each in classes]
        batch = dihedral.apply(torch.stack(images), int(torch.randint(8, (), generator=rng)))
        contrast = 0.8 + 0.4 * torch.rand(32, 1, 1, 1, generator=rng)
        shift = 0.2 * torch.randn(32, 1, 1, 1, generator=rng)
        loss = F.cross_entropy(network(batch * contrast + shift), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def called(classifier: nn.Module, images: Tensor, k: int) -> np.ndarray:
    """(N,) of 0 and 1: whether the classifier takes images (N,3,H,W) for class k."""
    return (classifier(images).argmax(1) == k).float().numpy()


def haematoxylin(images: Tensor) -> np.ndarray:
    """The haematoxylin channel (N,H,W) of images (N,3,H,W) in [-1,1]."""
    return rgb2hed(to_uint8(images))[..., 0].astype(np.float32)


def likeness(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """SSIM (N,) of haematoxylin channels, each as it spreads around its own mean: stains differ in strength."""
    normed = [
        (each - each.mean((1, 2), keepdims=True)) / (each.std((1, 2), keepdims=True) + 1e-6) for each in (first, second)
    ]
    return np.array([structural_similarity(a, b, data_range=4.0) for a, b in zip(*normed)])


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """The mean of values (N,), and the middle 95% of it over draws with replacement."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def told(values: np.ndarray) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


@dataclass(frozen=True)
class Pair:
    """Tiles of `source` as `target`'s, in one way.

    called (N,): whether the classifier takes each for the target's. kept (N,): SSIM of the haematoxylin with the
    source's; other (N,): of real target tiles of another place, which is what chance gives.
    """

    way: str
    source: str
    target: str
    called: np.ndarray
    kept: np.ndarray
    other: np.ndarray

    def line(self) -> str:
        way = f"{self.way:22} " if self.way else ""
        return (
            f"{way}{self.source:>6} -> {self.target:6} {len(self.called)} tiles: called {self.target} "
            f"{told(self.called)}; haematoxylin SSIM with the source {told(self.kept)}, of real {self.target} tiles "
            f"{told(self.other)}"
        )


def judged(
    classifier: nn.Module, names: Sequence[str], source: str, target: str, chosen: Tensor, image: Tensor, other: Tensor,
    way: str = "",
) -> Pair:  # fmt: skip
    """The measures of translations `image` of the tiles `chosen`, beside real tiles `other` of the target."""
    own = haematoxylin(chosen)
    return Pair(
        way,
        source,
        target,
        called(classifier, image, names.index(target)),
        likeness(own, haematoxylin(image)),
        likeness(own, haematoxylin(other)),
    )


def together(pairs: Sequence[Pair], name: str) -> np.ndarray:
    """One measure of all tiles of several pairs, by its name."""
    return np.concatenate([getattr(pair, name) for pair in pairs])


def summary(pairs: Sequence[Pair]) -> str:
    shares = f"SSIM {told(together(pairs, 'kept'))}, of real target tiles {told(together(pairs, 'other'))}"
    return f"all {len(together(pairs, 'called'))}: called the target {told(together(pairs, 'called'))}; {shares}"


def right(classifier: nn.Module, real: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """class -> (N,) of 0 and 1: which of its held-out real tiles the classifier knows. The order is that of classes."""
    return {name: called(classifier, tiles, k) for k, (name, tiles) in enumerate(real.items())}


def known(hits: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {each.mean():.0%} of {len(each)}" for name, each in hits.items())


def shown(tiles: Tensor, count: int = 12) -> np.ndarray:
    """The first tiles (count,H,W,3) uint8, a row of a sheet."""
    return to_uint8(tiles[:count])
