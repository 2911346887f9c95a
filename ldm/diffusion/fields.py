"""A field of embeddings over a canvas: which embedding conditions a window at which place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.choices import INTERPOLATIONS
from ldm.errors import UserError


class FeatureField:
    """A grid of embeddings spread over a canvas: features[row, col] is the tile at that row and column.

    The grid's first tile lies in the canvas' upper left corner, its last in the lower right one, the others evenly
    between, whatever the grid's shape: windows at those places get those features, windows between them an
    interpolation of the four nearest.

    Args:
        features: (rows, cols, D). Rows of NaN are holes (background that was not encoded).
        size: canvas height and width, window: side of a tile, all in the same pixels.
        interpolation: linear, slerp (of vectors as they are, not of their directions, as published) or nearest.
        background: (D,) embedding that fills holes; without it they take the nearest known embedding.
        cells: of the grid along each side of a window, which takes cells x cells of them.

    >>> field = FeatureField(torch.tensor([[[0.0], [1.0]]]), size=(256, 512), window=256)
    >>> field.at([(0, 0), (0, 64), (0, 256)])
    tensor([[0.0000],
            [0.2500],
            [1.0000]])
    >>> FeatureField(torch.tensor([[[0.0], [torch.nan]]]), size=(256, 512), window=256).bare([(0, 64), (0, 192)])
    [False, True]
    """

    def __init__(
        self,
        features: Tensor,
        size: tuple[int, int],
        window: int,
        interpolation: str = "linear",
        background: Tensor | None = None,
        cells: int = 1,
    ):
        if features.ndim != 3:
            raise UserError(f"a grid of features has shape (rows, cols, D); got {tuple(features.shape)}.")
        if interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got '{interpolation}'.")
        self.holes, self.filled = features.isnan().any(-1), background is not None
        self.features = fill_holes(features.float(), background)
        if window % cells:
            raise UserError(f"a window of {window} has no {cells} cells of equal size along its side.")
        self.size, self.window, self.interpolation, self.cells = size, window // cells, interpolation, cells

    def at(self, corners: Sequence[tuple[int, int]]) -> Tensor:
        """Embeddings (K,D) of windows whose upper left corners (row, col) are given in canvas pixels; (K,D,cells,cells)
        where a window takes several."""
        if self.cells == 1:
            return self._of_cells(corners)
        grids = self._of_cells(self._inside(corners)).unflatten(0, (len(corners), self.cells, self.cells))
        return grids.permute(0, 3, 1, 2)                                        # (K,D,cells,cells)

    def bare(self, corners: Sequence[tuple[int, int]]) -> list[bool]:
        """Which windows at corners (row, col) lie in holes: no known embedding has a share in theirs; where holes have
        no embedding of their own, less than half of theirs is known."""
        rows, cols = (self._positions([corner[axis] for corner in self._inside(corners)], axis) for axis in (0, 1))
        known, r0, c0 = (~self.holes).double(), rows.floor(), cols.floor()
        r1, c1 = ((place + 1).clamp(max=most - 1) for place, most in zip((r0, c0), known.shape))
        top, bottom = (torch.lerp(known[r.long(), c0.long()], known[r.long(), c1.long()], cols - c0) for r in (r0, r1))
        share = torch.lerp(top, bottom, rows - r0).view(len(corners), -1).mean(1)
        return (share < (1e-6 if self.filled else 0.5)).tolist()

    def _inside(self, corners: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Corners of the cells of windows, window by window."""
        places = [offset * self.window for offset in range(self.cells)]
        return [(row + down, col + across) for row, col in corners for down in places for across in places]

    def _of_cells(self, corners: Sequence[tuple[int, int]]) -> Tensor:
        rows, cols = (self._positions([corner[axis] for corner in corners], axis) for axis in (0, 1))
        r0, c0 = rows.floor().long(), cols.floor().long()
        r1, c1 = (r0 + 1).clamp(max=self.features.shape[0] - 1), (c0 + 1).clamp(max=self.features.shape[1] - 1)
        fr, fc = (rows - r0)[:, None].float(), (cols - c0)[:, None].float()
        if self.interpolation == "nearest":
            return self.features[torch.where(fr[:, 0] < 0.5, r0, r1), torch.where(fc[:, 0] < 0.5, c0, c1)]
        mix = slerp if self.interpolation == "slerp" else torch.lerp
        top = mix(self.features[r0, c0], self.features[r0, c1], fc)
        bottom = mix(self.features[r1, c0], self.features[r1, c1], fc)
        return mix(top, bottom, fr)

    def _positions(self, starts: Sequence[int], axis: int) -> Tensor:
        """Fractional grid positions of window starts along one axis."""
        span, cells = self.size[axis] - self.window, self.features.shape[axis] - 1
        position = torch.tensor(starts, dtype=torch.float64) * (cells / span if span else 0.0)
        return position.clamp(0, cells)


class LayoutField:
    """A grid of cells spread evenly over a canvas: which of a list of conditions is where. A window has that of the
    cell in which its middle lies.

    Args:
        cells: (rows, cols), places in the list, -1 at holes. size: canvas height and width, window: side of a window,
            in the same pixels.

    >>> field = LayoutField(torch.tensor([[0, 1, -1]]), size=(256, 768), window=256)
    >>> field.at([(0, 0), (0, 200)]), field.bare([(0, 300), (0, 500)])
    (tensor([0, 1]), [False, True])
    """

    def __init__(self, cells: Tensor, size: tuple[int, int], window: int):
        self.layout, self.size, self.window, self.holes = cells, size, window, cells < 0

    def at(self, corners: Sequence[tuple[int, int]]) -> Tensor:
        """Places (K,) in the list of windows whose upper left corners (row, col) are given in canvas pixels."""
        rows, cols = (
            (torch.tensor([corner[axis] for corner in corners]) + self.window // 2) * self.layout.shape[axis] // side
            for axis, side in enumerate(self.size)
        )
        return self.layout[rows, cols]

    def bare(self, corners: Sequence[tuple[int, int]]) -> list[bool]:
        """Which windows at corners (row, col) are those of holes."""
        return (self.at(corners) < 0).tolist()


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation of vectors (K,D) at t (K,1); nearly parallel ones are interpolated linearly.

    >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> slerp(a, b, torch.tensor([[0.5]]))  # as long as they are
    tensor([[0.7071, 0.7071]])
    """
    cosine = (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1, keepdim=True).clamp(-1, 1)
    theta = cosine.acos()
    curved = ((1 - t) * theta).sin() / theta.sin() * a + (t * theta).sin() / theta.sin() * b
    return torch.where(cosine.abs() > 0.9995, torch.lerp(a, b, t), curved)


def fill_holes(features: Tensor, background: Tensor | None) -> Tensor:
    """The grid (rows, cols, D) with NaN rows replaced by `background`, or by their nearest known embedding.

    >>> grid = torch.tensor([[[1.0], [torch.nan], [torch.nan], [4.0]]])
    >>> fill_holes(grid, None).flatten(), fill_holes(grid, torch.tensor([0.0])).flatten()
    (tensor([1., 1., 4., 4.]), tensor([1., 0., 0., 4.]))
    """
    holes = features.isnan().any(-1)
    if not holes.any():
        return features
    if background is not None:
        return torch.where(holes[..., None], background.to(features), features)
    if holes.all():
        raise UserError("every entry of the grid of features is a hole; encode a tile, or give `background`.")
    known, missing = (~holes).nonzero(), holes.nonzero()
    chunks = missing.float().split(max(2**22 // len(known), 1))  # all pairs of a whole slide's grid are too many
    nearest = known[torch.cat([torch.cdist(chunk, known.float()).argmin(1) for chunk in chunks])]
    filled = features.clone()
    filled[missing[:, 0], missing[:, 1]] = features[nearest[:, 0], nearest[:, 1]]
    return filled
