"""Finds the tissue on a slide."""

from __future__ import annotations

import numpy as np
from PIL import Image
from skimage.filters import gaussian, threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

from ldm.images.slides import Slide


class TissueMask:
    """Where a slide has tissue: `mask` (h, w) bool over the whole slide at `mpp` um per pixel.

    `picture` (h, w, 3) uint8 is the whole slide, no side longer than 1200 px.

    Smoothed over about a cell (8 um), a pixel is tissue where its colour (max - min over RGB) or its optical density is
    above Otsu's threshold, both bounded so that the noise of empty glass is never split into tissue and not tissue.
    Specks below 2500 um2 go, holes below 10 000 um2 are filled.
    """

    def __init__(self, slide: Slide, mpp: float = 8.0) -> None:
        self.mpp = min(
            mpp, max(slide.mpp, max(slide.dimensions) * slide.mpp / 512)
        )  # small slides are looked at closer
        thumbnail = slide.thumbnail(self.mpp)
        small = Image.fromarray(thumbnail)
        small.thumbnail((1200, 1200), Image.Resampling.BOX)
        self.picture = np.asarray(small)
        smooth = gaussian(thumbnail, sigma=8.0 / self.mpp, channel_axis=-1)  # in [0, 1]
        glass = np.maximum(np.percentile(smooth.reshape(-1, 3), 99, axis=0), 0.86)  # its tint; tissue is darker
        smooth = np.clip(smooth / glass, 1 / 256, 1)
        colour, density = smooth.max(-1) - smooth.min(-1), -np.log10(smooth).mean(-1)
        tissue = (colour > _otsu(colour, 0.03, 0.12)) | (density > _otsu(density, 0.035, 0.20))
        pixel = self.mpp**2
        most = tissue.size // 4  # of a small picture, whose tissue is no speck and whose glass no hole
        tissue = remove_small_objects(tissue, max_size=max(1, min(int(2500 / pixel), most)))
        self.mask = remove_small_holes(tissue, max_size=max(1, min(int(10_000 / pixel), most)))
        self._scale = (self.mask.shape[1] / slide.dimensions[0], self.mask.shape[0] / slide.dimensions[1])
        self._sums = np.pad(self.mask.cumsum(0).cumsum(1), ((1, 0), (1, 0))).astype(np.float64)

    def _sum_to(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Tissue in mask pixels between the corner (0, 0) and (x, y), bilinear between whole pixels."""
        h, w = self._sums.shape
        x, y = np.clip(x, 0, w - 1), np.clip(y, 0, h - 1)
        x0, y0 = np.minimum(x.astype(int), w - 2), np.minimum(y.astype(int), h - 2)
        fx, fy = x - x0, y - y0
        s = self._sums
        upper = s[y0, x0] * (1 - fx) + s[y0, x0 + 1] * fx
        lower = s[y0 + 1, x0] * (1 - fx) + s[y0 + 1, x0 + 1] * fx
        return upper * (1 - fy) + lower * fy

    def fraction(self, coords: np.ndarray, extent: float) -> np.ndarray:
        """Tissue fraction (n,) of squares with corners `coords` (n, 2) and side `extent`, both in level-0 pixels."""
        x0, y0 = coords[:, 0] * self._scale[0], coords[:, 1] * self._scale[1]
        x1, y1 = (coords[:, 0] + extent) * self._scale[0], (coords[:, 1] + extent) * self._scale[1]
        total = self._sum_to(x1, y1) - self._sum_to(x0, y1) - self._sum_to(x1, y0) + self._sum_to(x0, y0)
        return np.clip(total / ((x1 - x0) * (y1 - y0)), 0, 1).astype(np.float32)


def _otsu(values: np.ndarray, low: float, high: float) -> float:
    return float(np.clip(threshold_otsu(values) if np.ptp(values) > 1e-4 else high, low, high))  # flat: no threshold
