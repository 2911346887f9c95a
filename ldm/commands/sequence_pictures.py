"""Pictures of sequences: a grid with the scorer's curve under it, and the frames of a moving one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE = 72  # px of an image on the grid, at least
GAP = 4
AXIS = 52  # px left of the grid, where the curve has its scale
CURVE = 150  # px, height of the curve
LINE, MEAN = "#9db8dc", "#1f4e9c"


def enlarged(images: np.ndarray) -> np.ndarray:
    """(...,H,W,3) by a whole factor to at least SIDE px, so that cells of 32 px can be seen."""
    factor = -(-SIDE // images.shape[-2])
    return images.repeat(factor, -3).repeat(factor, -2)


def sheet(
    images: np.ndarray, values: Sequence[float], label: str, scores: np.ndarray | None, first: np.ndarray | None
) -> np.ndarray:
    """Sequences (S,N,H,W,3) as rows over the values of the condition, and the scorer's curves (all,N) under them.

    first: real images (S,H,W,3) that the sequences start from, to their left.
    """
    images = enlarged(images)
    rows, count, height, width = images.shape[:4]
    left = AXIS if first is None else AXIS + width + 3 * GAP
    page = np.full((rows * (height + GAP), left + count * (width + GAP) + GAP, 3), 255, np.uint8)
    for i in range(rows):
        top = i * (height + GAP)
        if first is not None:
            page[top : top + height, AXIS : AXIS + width] = enlarged(first[i])
        for k in range(count):
            x = left + k * (width + GAP)
            page[top : top + height, x : x + width] = images[i, k]
    centres = [left + k * (width + GAP) + width / 2 for k in range(count)]
    return np.concatenate([page, curve(page.shape[1], centres, values, label, scores)])


def film(images: np.ndarray, values: Sequence[float], label: str, scores: np.ndarray | None) -> list[np.ndarray]:
    """Frames (H,W,3), there and back: all sequences (S,N,H,W,3) at one value, marked on the curve under them."""
    images = enlarged(images)
    count, steps, height, width = images.shape[:4]
    columns = min(count, 4)
    rows = -(-count // columns)
    frames = []
    for k in range(steps):
        across = AXIS + max(columns * (width + GAP) + GAP, 260)
        page = np.full((rows * (height + GAP), across, 3), 255, np.uint8)
        for i in range(count):
            top, x = i // columns * (height + GAP), AXIS + i % columns * (width + GAP)
            page[top : top + height, x : x + width] = images[i, k]
        centres = np.linspace(AXIS + 16, across - 24, steps).tolist()
        frames.append(np.concatenate([page, curve(across, centres, values, label, scores, at=k)]))
    return frames + frames[-2:0:-1]


def curve(
    width: int, centres: Sequence[float], values: Sequence[float], label: str, scores: np.ndarray | None,
    at: int | None = None,
) -> np.ndarray:  # fmt: skip
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
