"""Pictures of sequences: a grid with the scorer's curve under it, and the frames of a moving one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ldm.images.sheets import MADE, REAL, grid, headed

SIDE = 96  # px of an image on the grid, at least
GAP = 4
AXIS = 52  # px left of the grid, where the curve has its scale
CURVE = 150  # px, height of the curve
LINE, MEAN = "#9db8dc", "#1f4e9c"


def sheet(
    images: np.ndarray, values: Sequence[float], label: str, scores: np.ndarray | None, first: np.ndarray | None
) -> np.ndarray:
    """Sequences (S,N,H,W,3) as rows over the values of the condition, and the scorer's curves (all,N) under them.

    first: real images (S,H,W,3) that the sequences start from, to their left; words over both say which they are.
    """
    body, left = _grid(images), AXIS
    if first is not None:
        starts = _grid(first[:, None])
        apart = np.full((len(body), 4 * GAP, 3), 255, np.uint8)
        across = starts.shape[1] + apart.shape[1]
        left += across
        body = headed(np.concatenate([starts, apart, body], 1), [(0, REAL), (across, MADE)])
    page = np.pad(body, ((0, GAP), (AXIS, GAP), (0, 0)), constant_values=255)
    step = (page.shape[1] - left) / len(values)
    centres = [left + k * step + (step - GAP) / 2 for k in range(len(values))]
    return np.concatenate([page, curve(page.shape[1], centres, values, label, scores)])


def film(images: np.ndarray, values: Sequence[float], label: str, scores: np.ndarray | None) -> list[np.ndarray]:
    """Frames (H,W,3), there and back: all sequences (S,N,H,W,3) at one value, marked on the curve under them."""
    frames = []
    for k in range(len(values)):
        body = _grid([images[i : i + 4, k] for i in range(0, len(images), 4)])
        across = AXIS + max(body.shape[1] + GAP, 260)
        page = np.pad(body, ((0, GAP), (AXIS, across - AXIS - body.shape[1]), (0, 0)), constant_values=255)
        centres = np.linspace(AXIS + 16, across - 24, len(values)).tolist()
        frames.append(np.concatenate([page, curve(across, centres, values, label, scores, at=k)]))
    return frames + frames[-2:0:-1]


def _grid(rows: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    return grid(rows, least=SIDE, gap=GAP, margin=0)


def curve(
    width: int,
    centres: Sequence[float],
    values: Sequence[float],
    label: str,
    scores: np.ndarray | None,
    at: int | None = None,
) -> np.ndarray:
    """The scorer's curve of every sequence (S,N) and their mean over the condition's values, whose places are `centres`
    (px): (CURVE,width,3); without scores the values alone. at: the value to mark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bottom = 36
    tall = CURVE if scores is not None else bottom + 3 * GAP
    figure = Figure(figsize=(width / 100, tall / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((AXIS / width, bottom / tall, 1 - (AXIS + GAP) / width, (tall - bottom - GAP) / tall))
    axes.set_xlim(AXIS, width - GAP)
    step = -(-len(values) // max(2, int((centres[-1] - centres[0]) // 36)))
    ticks = range(0, len(values), step)
    axes.set_xticks([centres[k] for k in ticks], [f"{values[k]:.3g}" for k in ticks], fontsize=8)
    axes.set_xlabel(label, fontsize=8, labelpad=1)
    axes.spines[["top", "right"]].set_visible(False)
    if at is not None:
        axes.axvline(centres[at], color="#d9822b", linewidth=3, alpha=0.6)
    if scores is None:
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
    else:
        axes.plot(centres, scores[:64].T, color=LINE, linewidth=0.7, alpha=0.7)
        axes.plot(centres, scores.mean(0), color=MEAN, linewidth=2.2, marker="o", markersize=4)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_ylabel("scorer", fontsize=8, labelpad=1)
        axes.grid(axis="y", linewidth=0.3)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return pixels if pixels.shape[:2] == (tall, width) else np.asarray(Image.fromarray(pixels).resize((width, tall)))
