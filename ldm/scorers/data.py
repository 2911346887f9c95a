"""Labelled images as a scorer's training takes them: decoded once into a file, shown balanced, changed at random."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ldm.data import dihedral
from ldm.data.augment import restained
from ldm.data.collection import Pictures
from ldm.files import reserve, whole, write_text
from ldm.scorers.ensemble import View


def to_range(images: np.ndarray | Tensor) -> Tensor:
    """uint8 of any shape -> float in [-1,1].

    >>> to_range(np.array([0, 255], np.uint8))
    tensor([-1.,  1.])
    """
    return (images if isinstance(images, Tensor) else torch.tensor(images)).float() / 127.5 - 1


def prepared(pictures: Pictures, size: int, folder: Path, progress: bool = True) -> tuple[np.ndarray, set[int]]:
    """All images as a network sees them, (N,3,size,size) uint8 mapped from a file in `folder`, and their sides in px.

    The file is read again when the same images are asked for. UserError names an image that cannot be read.

    >>> images, sides = prepared(labelled.pictures, 16, Path("work"), progress=False)
    >>> images.shape, sides
    ((48, 3, 16, 16), {128})
    """
    folder.mkdir(exist_ok=True)
    path, told, shape = folder / "images.npy", folder / "images.json", (len(pictures), 3, size, size)
    about = {"shape": list(shape), "names": digest(pictures.words())}
    if told.is_file() and path.is_file() and (held := json.loads(told.read_text()))["about"] == about:
        return np.load(path, mmap_mode="r"), set(held["sides"])
    view, sides = View(size), set()
    with whole(path) as part:
        images = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        reserve(part)
        for i in tqdm(range(len(pictures)), desc="read images", unit="image", disable=not progress):
            image = pictures.read(i)
            sides.add(min(image.shape[:2]))
            seen = view.fit(rearrange(to_range(image), "h w c -> 1 c h w"))[0]
            images[i] = ((seen + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        images.flush()
        del images
    write_text(told, json.dumps({"about": about, "sides": sorted(sides)}))
    return np.load(path, mmap_mode="r"), sides


def digest(words: Iterable[str]) -> str:
    """SHA-256 of words in their order.

    >>> digest(["a.png", "b.png"])[:12]
    '1baca9d47fd8'
    """
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def identity(images: np.ndarray, words: Iterable[str]) -> str:
    """SHA-256 of images (N,...) uint8 and of what is said of them.

    >>> images = np.zeros((2, 3, 8, 8), np.uint8)
    >>> identity(images, ["a", "b"]) == identity(images + 1, ["a", "b"])
    False
    """
    known = hashlib.sha256(digest(words).encode())
    for start in range(0, len(images), 256):
        known.update(np.ascontiguousarray(images[start : start + 256]).tobytes())
    return known.hexdigest()


def view_of(pictures: Pictures, images: np.ndarray, rows: np.ndarray, sides: set[int]) -> View:
    """How networks see images (N,3,S,S) uint8: normalised by mean and deviation of those at `rows`.

    >>> view = view_of(labelled.pictures, np.full((48, 3, 16, 16), 128, np.uint8), np.arange(48), {128})
    >>> view.size, view.mean, view.tile_size
    (16, (0.5020, 0.5020, 0.5020), 128)
    """
    some = images[rows[:4096]] / np.float32(255)
    mean, std = some.mean((0, 2, 3)), np.maximum(some.std((0, 2, 3)), 0.01)
    mean, std = (tuple(round(float(v), 5) for v in values) for values in (mean, std))
    return View(images.shape[-1], mean, std, min(sides) if len(sides) == 1 else None, pictures.mpp)


def balanced_order(strata: np.ndarray, seed: int) -> np.ndarray:
    """(N,) places: every stratum equally often, each passed through before one of its images comes again.

    >>> strata = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    >>> np.bincount(strata[balanced_order(strata, seed=0)])
    array([4, 4])
    """
    rng = np.random.default_rng(seed)
    kinds, member = np.unique(strata, return_inverse=True)
    each = -(-len(strata) // len(kinds))
    rows = []
    for k in range(len(kinds)):
        own = np.flatnonzero(member == k)
        rows.append(np.concatenate([rng.permutation(own) for _ in range(-(-each // len(own)))])[:each])
    return rng.permutation(np.concatenate(rows))[: len(strata)]


def augmented(images: Tensor, colour: float, shift: int, rng: torch.Generator) -> Tensor:
    """Images (B,3,S,S) in [-1,1], each in a random orientation, shifted, its channels' optical densities scaled.

    colour: strength of the change of density; shift: largest shift, px. Pixels are not interpolated, so a sharp image
    stays sharp.

    >>> images = torch.rand(2, 3, 16, 16)
    >>> turned = augmented(images, colour=0.0, shift=0, rng=torch.Generator().manual_seed(0))
    >>> torch.equal(turned, images), torch.equal(turned.flatten(1).sort().values, images.flatten(1).sort().values)
    (False, True)
    """
    count, side = len(images), images.shape[-1]
    turns = torch.randint(dihedral.COUNT, (count,), generator=rng).tolist()
    moved = torch.randint(2 * shift + 1, (count, 2), generator=rng).tolist()
    padded = F.pad(images, (shift,) * 4, mode="reflect") if shift else images
    out = torch.stack(
        [dihedral.apply(image[:, y : y + side, x : x + side], k) for image, k, (y, x) in zip(padded, turns, moved)]
    )
    if not colour:
        return out
    gain = 1 + colour * torch.randn(count, 3, generator=rng)
    light = 0.3 * colour * torch.randn(count, 3, 1, 1, generator=rng)
    return (2 * restained((out + 1) / 2, gain.diag_embed(), light) - 1).clamp(-1, 1)
