"""A canvas that is larger than memory, on disk: bands of rows, each a file that is whole or not there.

    folder/step-0003/00017.npy      x of band 17 after three steps, and what its solver needs for the fourth

Which bands there are says how far the work is, so that it goes on where it was stopped, and processes that share the
folder take one another's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.files import awaited, remove
from ldm.rng import NOISE_BLOCK

BAND = NOISE_BLOCK  # rows of a band: noise is drawn in blocks of as many
PATIENCE = 90.0  # seconds for which a network's file system may not know what another machine wrote

Start = Callable[[int, int], Tensor]  # rows x (1,C,rows,width) from `top` on, before the first step


class Bands:
    """The canvas (1,C,height,width) as it is after each step; step 0 is what it begins with.

    Args:
        folder: where its files are. size: (height, width) in latents. start: what it begins with. rows: of a band; the
            last may be shorter. shared: whether other processes write there too.

    >>> bands = Bands(Path("canvas"), (100, 80), lambda top, rows: torch.zeros(1, 4, rows, 80))
    >>> bands.write(1, 0, torch.ones(1, 4, 64, 80), (torch.full((1, 4, 64, 80), 2.0),))
    >>> bands.left(1), bands.reached()
    ([1], 0)
    >>> x, past = bands.read(1, 0)
    >>> x.mean(), [each.mean() for each in past]
    (tensor(1.), [tensor(2.)])
    """

    def __init__(self, folder: Path, size: tuple[int, int], start: Start, rows: int = BAND, shared: bool = False):
        self.folder, self.size, self.start, self.rows, self.shared = folder, size, start, rows, shared

    def __len__(self) -> int:
        return -(-self.size[0] // self.rows)

    def span(self, band: int) -> tuple[int, int]:
        """First row of a band, and the one after its last.

        >>> Bands(Path("canvas"), (100, 80), None).span(1)
        (64, 100)
        """
        return band * self.rows, min((band + 1) * self.rows, self.size[0])

    def left(self, step: int) -> list[int]:
        """Bands that are not there yet after so many steps."""
        return [band for band in range(len(self)) if not self._file(step, band).exists()]

    def reached(self) -> int:
        """The latest step after which every band is there; 0 before the first."""
        steps = (int(path.name.partition("-")[2]) for path in self.folder.glob("step-*"))
        return next((step for step in sorted(steps, reverse=True) if not self.left(step)), 0)

    def write(self, step: int, band: int, x: Tensor, past: Sequence[Tensor] = ()) -> None:
        """Keep x (1,C,rows,width) of a band after a step, with what the solver needs beside it."""
        file = self._file(step, band)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}-{os.getpid()}")
        with part.open("wb") as stream:
            np.save(stream, torch.cat([x, *past]).cpu().numpy())
        os.replace(part, file)

    def read(self, step: int, band: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (1,C,rows,width) of a band after a step, and what the solver needs beside it."""
        top, bottom = self.span(band)
        if step == 0:
            return self.start(top, bottom - top), ()
        x, *past = torch.from_numpy(np.array(self._held(step, band))).split(1)
        return x, tuple(past)

    def part(self, step: int, rows: slice, cols: slice = slice(None)) -> Tensor:
        """x (1,C,h,w) of any rows and columns after a step."""
        if step == 0:
            return self.start(rows.start, rows.stop - rows.start)[..., cols]
        parts = []
        for band in range(rows.start // self.rows, (rows.stop - 1) // self.rows + 1):
            top, bottom = self.span(band)
            own = slice(max(rows.start - top, 0), min(rows.stop, bottom) - top)
            parts.append(torch.from_numpy(np.array(self._held(step, band)[:1, :, own, cols])))
        return torch.cat(parts, 2)

    def forget(self, before: int) -> None:
        """Remove what there is of the steps before one."""
        for path in self.folder.glob("step-*"):
            if int(path.name.partition("-")[2]) < before:
                remove(path)

    def _file(self, step: int, band: int) -> Path:
        return self.folder / f"step-{step:04d}" / f"{band:05d}.npy"

    def _held(self, step: int, band: int) -> np.ndarray:
        return np.load(awaited(self._file(step, band), PATIENCE * self.shared), mmap_mode="r")
