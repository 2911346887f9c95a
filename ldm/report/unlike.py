"""What makes two sets of images differ, or agree, before any model has a part in it: colours, compression, copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np

from ldm.data.extent import FAR
from ldm.data.image_sets import ImageSet
from ldm.errors import some
from ldm.files import sha256
from ldm.images.kinds import is_jpeg
from ldm.metrics.pairs import GREY, colourfulness

LOOKED_AT = 32  # images of a set, evenly spread


def unlike(sets: Mapping[str, ImageSet]) -> list[str]:
    """What a user should know of the sets (role -> images) of an evaluation before its figures.

    That one is grey and the other in colour, one compressed as JPEG and the other not, one of another scale; files that
    several sets have, or one has twice.

    >>> for folder, image in {"new": tile, "old": tile[..., :1].repeat(3, 2)}.items():
    ...     Path(folder).mkdir()
    ...     Image.fromarray(image).save(f"{folder}/a.png")
    >>> from ldm.data.image_sets import open_images
    >>> unlike({"generated": open_images(Path("new")), "real": open_images(Path("old"))})
    ['the real images are grey and the generated in colour: the figures measure that too.']
    """
    notes = []
    if {"generated", "real"} <= sets.keys():
        own = {role: sets[role] for role in ("generated", "real")}
        notes += _split("grey", "in colour", {role: _grey(images) for role, images in own.items()})
        mpps = {role: images.about["mpp"] for role, images in own.items()}
        if all(mpps.values()) and abs(mpps["generated"] / mpps["real"] - 1) > FAR:
            told = " and ".join(f"the {role} images have {mpp:.3g} um/px" for role, mpp in mpps.items())
            notes.append(f"{told}: the figures measure that too.")
        notes += _split("JPEG", "not", {role: _jpeg(images) for role, images in own.items()})
    return notes + _copies(sets)


def _split(this: str, other: str, shares: Mapping[str, float]) -> list[str]:
    """shares: role -> fraction of the images that are `this`."""
    first, second = sorted(shares, key=shares.__getitem__, reverse=True)
    if shares[first] < 0.9 or shares[second] > 0.1:
        return []
    return [f"the {first} images are {this} and the {second} {other}: the figures measure that too."]


def _spread(images: ImageSet) -> list[int]:
    return np.unique(np.linspace(0, len(images) - 1, min(len(images), LOOKED_AT)).round().astype(int)).tolist()


def _grey(images: ImageSet) -> float:
    return float(np.mean([colourfulness(images.read(i)) < GREY for i in _spread(images)]))


def _jpeg(images: ImageSet) -> float:
    paths = images.pictures.paths
    return float(np.mean([paths[i].is_file() and is_jpeg(paths[i]) for i in _spread(images)])) if paths else 0.0


def _copies(sets: Mapping[str, ImageSet]) -> list[str]:
    """Files that are the same byte by byte, in two sets or in one."""
    files = {
        role: [path for path in dict.fromkeys(images.pictures.paths or ()) if path.is_file()]
        for role, images in sets.items()
    }
    by_size: dict[int, list[tuple[str, Path]]] = defaultdict(list)
    for role, paths in files.items():
        for path in paths:
            by_size[path.stat().st_size].append((role, path))
    alike: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for same in by_size.values():
        if len(same) > 1:
            for role, path in same:
                alike[sha256(path)].append((role, path))
    notes = []
    for role in sets:
        own = [[path for other, path in same if other == role] for same in alike.values()]
        if doubles := [paths[1].name for paths in own if len(paths) > 1]:
            notes.append(f"copies among the {role} files: {sum(len(p) - 1 for p in own if p)} ({some(doubles, 3)}).")
    for pair in combinations(sets, 2):
        both = [same for same in alike.values() if set(pair) <= {role for role, _ in same}]
        if both:
            names = [next(path.name for role, path in same if role == pair[0]) for same in both]
            notes.append(f"files that are in both the {pair[0]} and the {pair[1]} set: {len(both)} ({some(names, 3)}).")
    return notes
