"""What the notebooks share: a folder to work in, commands that are quiet until they fail, pictures side by side.

    from workspace import begin, show
    out = begin("01")

Jupyter, VS Code and `make notebooks` start a notebook in its own folder, where this file is found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython
from PIL import Image

import ldm

ROOT = Path(__file__).resolve().parent.parent
SYNTHETIC = "#1f4e9c"  # words about synthetic images
STYLE = {
    "figure.constrained_layout.use": True, "figure.dpi": 85, "figure.titlesize": 11, "axes.titlesize": 9,
    "axes.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False,
}  # fmt: skip


def begin(number: str) -> Path:
    """The empty folder out/notebooks/<number>, as a path from the repository's folder, where all paths begin now.

    `%%bash` cells begin there too, with the kernel's Python. What their commands print is shown, their progress and
    warnings only if one of them fails, which ends the cell. Figures are JPEGs.
    """
    os.chdir(ROOT)
    out = Path("out", "notebooks", number)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    warnings.filterwarnings("ignore", message="IProgress not found")  # bars in plain text will do
    plt.rcParams.update(STYLE)
    if shell := get_ipython():
        shell.run_line_magic("config", "InlineBackend.figure_formats = ['jpeg']")
        shell.register_magic_function(lambda line, cell: commands(cell), "cell", "bash")
    return out


def commands(script: str) -> None:
    """Run a script of bash up to its first failing command, for which it raises CalledProcessError."""
    call = ["bash", "-eu", "-o", "pipefail", "-c", script]
    done = subprocess.run(call, capture_output=True, text=True, encoding="utf-8")
    print(done.stdout, end="")
    if done.returncode:
        print(done.stderr, end="", file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, script)


def pixels(path: Path) -> np.ndarray:
    """An image file as (H,W,3) uint8."""
    return np.asarray(Image.open(path).convert("RGB"))


def tensor(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Images (H,W,C) uint8, alike in size, as the models take them: (N,C,H,W) in [-1,1]."""
    return torch.from_numpy(np.stack(list(images))).movedim(-1, 1).float() / 127.5 - 1


def draw(axes: Any, images: Sequence, titles: Sequence[str] = (), label: str = "", **options: Any) -> None:
    """Draw images in a row of axes: arrays, PIL images, or tensors (C,H,W) in [-1,1].

    titles: over the images; label: at the left of the first. Words that begin with "synthetic" are blue.
    """
    axes = np.ravel(axes)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    for axis, image in zip(axes, images):
        axis.imshow(_array(image), **{"interpolation": "lanczos", "cmap": "gray"} | options)
    for axis, title in zip(axes, titles):
        axis.set_title(title, color=_colour(title))
    axes[0].set_ylabel(label, color=_colour(label))


def show(rows: Mapping[str, Sequence], titles: Sequence[str] = (), heading: str = "", side: float = 1.7) -> None:
    """A figure of rows of images, {label: images}, with titles over the first row; an image is `side` inches wide."""
    columns = max(map(len, rows.values()))
    first = _array(next(iter(rows.values()))[0])
    height = side * first.shape[0] / first.shape[1] + 0.06
    size = side * columns, height * len(rows) + 0.3 * bool(titles) + 0.3 * bool(heading)
    figure, grid = plt.subplots(len(rows), columns, squeeze=False, figsize=size)
    for axes, (label, images), over in zip(grid, rows.items(), [titles, *[()] * len(rows)]):
        draw(axes, images, over, label)
    if heading:
        figure.suptitle(heading)
    plt.show()


def _array(image: Any) -> np.ndarray:
    return ldm.to_uint8(image) if isinstance(image, torch.Tensor) else np.asarray(image)


def _colour(words: str) -> str:
    return SYNTHETIC if words.startswith("synthetic") else "black"
