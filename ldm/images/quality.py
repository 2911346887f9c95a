"""What is wrong with tiles, as numbers that one can select by: marks of pens, blur, what is too dark to see through.

All are measured in micrometres, so that tiles of any resolution compare, and cost little beside reading a tile:

    pen    share of ink: green and blue, which absorb red far more than green light, and red, which lets red light
           alone pass, by optical densities over 8 um. Haematoxylin, eosin, DAB and blood do not reach these bounds.
    blur   how wide edges are (Marziliano et al. 2002, "A no-reference perceptual blur metric"): 0 where brightness
           changes within half a micrometre, 1 where it takes two or more.
    dark   share that passes less than a quarter of the light in every colour over 8 um: folds, black ink, pigment,
           rims of bubbles.

Of 473 real tiles in focus (13 scanners and cameras; H&E and DAB) none has blur above 0.73 or pen above 0.01; blurred by
1 um (standard deviation) all are above 0.75. Ink that hardly colours, light blue over eosin above all, is not found.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

LIMITS = {"pen": 0.05, "blur": 0.75, "dark": 0.1}  # above these a tile is worth a look
QUALITY = tuple(LIMITS)
_LOOK = 8.0  # um over which colours are averaged: wider than nuclei, thinner than strokes
_STEP = 0.5  # um within which a sharp edge changes; blurred ones take _REACH of these
_REACH = 4
_EDGE = 20  # least change of brightness, of 255, that is an edge rather than noise
_EDGES = 0.0005  # least share of edges of a tile that says how sharp they are
_GLASS = 215  # brightness of what is not stained
_FEW = 8  # tiles at once, which a processor's cache holds
_INK, _RED, _DARK = 0.15, 0.45, 64  # bounds of optical densities, and of brightness


def quality_of(tiles: np.ndarray, mpp: float) -> dict[str, np.ndarray]:
    """Pen, blur and dark of tiles.

    tiles: (n, T, T, 3) uint8. mpp: micrometres per pixel. Each of QUALITY -> (n,) float32 from 0 to 1.

    >>> {name: values.round(2).tolist() for name, values in quality_of(tile[None], 0.5).items()}
    {'pen': [0.0], 'blur': [0.56], 'dark': [0.0]}
    """
    factor = max(1, min(round(_LOOK / mpp), tiles.shape[1]))
    every = max(1, factor // 4)  # of a square that is averaged, 16 pixels are enough
    few = np.ascontiguousarray(tiles[:, ::every, ::every])
    small = np.stack([np.asarray(Image.fromarray(tile).reduce(factor // every)) for tile in few])  # (n, t, t, 3)
    dark = (small.max(-1) < _DARK).mean((1, 2))
    return {"pen": _pen(small), "blur": _blur(tiles[..., 1], mpp, small), "dark": dark.astype(np.float32)}


def flagged(labels: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many tiles are above each of LIMITS, of the labels (n,) that are there.

    >>> flagged({"pen": np.array([0, 0.3]), "tissue": np.array([1, 1])})
    {'pen': 1}
    """
    return {name: int((labels[name] > limit).sum()) for name, limit in LIMITS.items() if name in labels}


def tell_flagged(labels: Mapping[str, np.ndarray]) -> str:
    """The same in words, and how to leave them out; "" where there are none.

    >>> tell_flagged({"pen": np.array([0, 0.3]), "blur": np.array([0.2, 0.1])})
    "1 tiles have pen>0.05; of other commands, --where 'pen<=0.05' leaves them out"
    """
    found = [(f"{name}>{LIMITS[name]:g}", count) for name, count in flagged(labels).items() if count]
    if not found:
        return ""
    told = ", ".join(f"{count} tiles have {fault}" for fault, count in found)
    return f"{told}; of other commands, --where '{found[0][0].replace('>', '<=')}' leaves them out"


def _pen(small: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(-np.log10(np.maximum(small, 1) / np.float32(255)), -1, 0)
    cold = red - green > _INK
    warm = (np.minimum(green, blue) - red > _RED) & (blue < 1.15 * green)  # DAB has more blue than green
    return (cold | warm).mean((1, 2), dtype=np.float32)


def _blur(bright: np.ndarray, mpp: float, small: np.ndarray) -> np.ndarray:
    """bright: (n, T, T) uint8, where stains differ most from glass."""
    step = max(1, round(_STEP / mpp))
    few = [_edges(bright[first : first + _FEW], step) for first in range(0, len(bright), _FEW)]
    steep, whole, edges = np.concatenate(few, axis=1)
    found = (1 - steep / np.maximum(whole, 1)) / (1 - 1 / _REACH)
    coarse = small[..., 1].reshape(len(small), -1)
    something = (coarse.mean(1) < _GLASS) | (np.ptp(coarse, axis=1) > _EDGE)  # else there is nothing to be out of focus
    return np.where(edges < _EDGES, something, np.clip(found, 0, 1)).astype(np.float32)


def _edges(bright: np.ndarray, step: int) -> np.ndarray:
    """Of the edges of tiles (n, T, T), along every fourth row and column, (3, n): the changes within their steepest
    steps, their whole changes, both summed, and their share of all places."""
    steep, whole, share = np.zeros((3, len(bright)))
    for lines in (bright[:, ::4], bright[:, :, ::4].swapaxes(1, 2)):
        if lines.shape[-1] <= _REACH * step:
            continue
        lines = np.ascontiguousarray(lines)
        once, change = _change(lines, step), _change(lines, _REACH * step)
        width = change.shape[-1]
        most = once[..., :width].copy()
        for k in range(1, _REACH):
            np.maximum(most, once[..., k * step : k * step + width], out=most)
        edge = change > _EDGE
        for total, values in ((steep, most), (whole, change)):
            values *= edge
            total += values.sum((1, 2), dtype=np.uint32)
        share += edge.view(np.uint8).sum((1, 2), dtype=np.uint32) / (2 * edge[0].size)
    return np.stack([steep, whole, share])


def _change(lines: np.ndarray, step: int) -> np.ndarray:
    """Absolute differences of pixels `step` apart along the last axis, uint8."""
    a, b = lines[..., step:], lines[..., :-step]
    return np.maximum(a, b) - np.minimum(a, b)
