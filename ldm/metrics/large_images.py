"""What only a large image can get wrong: seams, a tone that drifts over the canvas, a texture that repeats itself.

Each is measured on one image; a real region of the same size says what is usual.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skimage.color import rgb2lab

from ldm.errors import UserError
from ldm.images.slides import Slide
from ldm.metrics.measure import LOWER, Measure
from ldm.metrics.seams import NEAR, Lines, lattice_ratios

DENSITY = -np.log10(np.arange(256, dtype=np.float32).clip(min=1) / 255)  # optical, of a brightness
GLASS = 0.05  # mean optical density up to which a pixel is glass
TISSUE = 0.25  # least share of tissue of a window whose tone counts
LEAST = 6  # windows that a trend over the canvas needs
BLOCK = 512  # windows that are compared with all at once
SAME = 1e-3  # autocorrelations that are told as equal
FAR = 2  # windows apart, from which similarity is repetition: neighbours share tissue


@dataclass(frozen=True)
class Tone:
    """Mean colour (rows,cols,3) L*a*b* of the tissue in each window (NaN: too little), and how it drifts.

    drift: the range of its linear trend over the canvas, in Delta E. low, high: what is left when windows are shuffled,
    95% of it: the drift that windows without order have.
    """

    colours: np.ndarray
    drift: float
    low: float
    high: float


def tissue_of(pixels: np.ndarray) -> np.ndarray:
    """(H,W) bool: where pixels (H,W,3) uint8 are no glass.

    >>> tissue_of(np.array([[[243, 243, 243], [200, 120, 180]]], np.uint8))
    array([[False,  True]])
    """
    return sum(DENSITY[pixels[..., channel]] for channel in range(3)) > 3 * GLASS


def tone(image: Slide, window: int, seed: int = 0) -> Tone:
    """The tone of an image in windows of `window` px side by side.

    >>> image = Slide.of_pixels(tile)
    >>> found = tone(image, window=64)
    >>> found.colours.shape, found.drift, (found.low, found.high)
    ((4, 4, 3), 6.7663, (1.4706, 6.8119))
    """
    cols, rows = (side // window for side in image.dimensions)
    colours = np.full((rows, cols, 3), np.nan)
    for row in range(rows):
        band = image.read(0, row * window, cols * window, window)
        for col in range(cols):
            part = band[:, col * window : (col + 1) * window]
            tissue = tissue_of(part)
            if tissue.mean() >= TISSUE:
                colours[row, col] = rgb2lab(part[tissue]).mean(0)
    place = np.argwhere(~np.isnan(colours[..., 0]))
    if len(place) < LEAST:
        return Tone(colours, np.nan, np.nan, np.nan)
    known = colours[tuple(place.T)]
    rng = np.random.default_rng(seed)
    shuffled = [_drift(place, known[rng.permutation(len(known))]) for _ in range(500)]
    return Tone(colours, _drift(place, known), *map(float, np.percentile(shuffled, (2.5, 97.5))))


def _drift(place: np.ndarray, colours: np.ndarray) -> float:
    """The largest Delta E between two corners of the canvas of the plane through colours (n,3) at place (n,2)."""
    design = np.column_stack([np.ones(len(place)), place])
    planes, *_ = np.linalg.lstsq(design, colours, rcond=None)  # (3,3): constant, per row, per column
    low, high = place.min(0), place.max(0)
    corners = np.array([[1, r, c] for r in (low[0], high[0]) for c in (low[1], high[1])]) @ planes
    return float(max(np.linalg.norm(a - b) for a in corners for b in corners))


@dataclass(frozen=True)
class Repetition:
    """Autocorrelation (2R-1,2C-1) of window features by lag, lag 0 in the middle; the strongest at FAR windows or more,
    its lag (rows, cols), and the largest similarity of two single windows so far apart."""

    map: np.ndarray
    strongest: float
    lag: tuple[int, int]
    closest: float


def repetition(features: np.ndarray) -> Repetition:
    """Of features (rows,cols,D) of windows side by side, NaN where there is none.

    The autocorrelation at a lag is the mean cosine similarity of windows that far apart, of features less their mean
    and over lags of which there are at least as many pairs as a quarter of the windows.

    >>> features = np.random.default_rng(0).normal(size=(4, 4, 8))
    >>> found = repetition(np.tile(features, (1, 2, 1)))  # the right half repeats the left one
    >>> found.lag, found.strongest
    ((0, 4), 1.0)
    """
    rows, cols = features.shape[:2]
    known = ~np.isnan(features[..., 0])
    if known.sum() < LEAST:
        raise UserError(f"repetition needs {LEAST} windows with tissue; there are {int(known.sum())}.")
    unit = np.where(known[..., None], features, 0) - features[known].mean(0)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True).clip(min=1e-12) * known[..., None]
    shape = (2 * rows, 2 * cols)  # zero padding: no wrapping around
    spectrum = np.fft.rfft2(unit, shape, axes=(0, 1))
    sums = np.fft.irfft2((np.abs(spectrum) ** 2).sum(-1), shape)
    pairs = np.fft.irfft2(np.abs(np.fft.rfft2(known.astype(float), shape)) ** 2, shape).round()
    with np.errstate(invalid="ignore", divide="ignore"):
        by_lag = np.where(pairs > 0, sums / pairs, np.nan)
    by_lag = np.fft.fftshift(by_lag)[1:, 1:]  # lags -(R-1)..R-1
    enough = np.fft.fftshift(pairs)[1:, 1:] >= known.sum() / 4
    lags = np.stack(np.meshgrid(np.arange(1 - rows, rows), np.arange(1 - cols, cols), indexing="ij"), -1)
    apart = (np.abs(lags).max(-1) >= FAR) & enough
    strongest = np.where(apart, by_lag, -np.inf)
    equal = lags[strongest >= strongest.max() - SAME]
    lag = equal[np.abs(equal).sum(1).argmin()]  # a period shows at its multiples too
    place, own, closest = np.argwhere(known), unit[known], -np.inf
    for first in range(0, len(own), BLOCK):
        part = slice(first, first + BLOCK)
        far = np.abs(place[part, None] - place[None]).max(-1) >= FAR
        closest = max(closest, np.where(far, own[part] @ own.T, -np.inf).max())
    closest = float(closest) if np.isfinite(closest) else np.nan
    return Repetition(by_lag, float(strongest.max()), tuple(map(int, np.abs(lag))), closest)


def seam_measures(across: Lines, tile: int) -> list[Measure]:
    """Seam ratios of `line_gradients` on the lattice of `tile` px; none of less than two tiles along a side.

    >>> from ldm.metrics.seams import line_gradients
    >>> [(measure.name, measure.value) for measure in seam_measures(line_gradients([tile]), tile=64)]
    [('seams', 1.3247), ('seams_like', 1.0133)]
    """
    if min(map(len, across)) + 1 < 2 * tile:
        return []
    found = []
    for name, near, note in (("seams", None, "all lines"), ("seams_like", NEAR, "edges of 8 px blocks near a border")):
        ratios = lattice_ratios(across, tile, near)
        low, high = map(float, np.percentile(ratios[1:], (2.5, 97.5)))
        of = (
            f"gradient across {tile} px borders over that inside, {note}; 95% of other lattices {low:.3f} to {high:.3f}"
        )
        said = "" if ratios[0] <= high else ": borders show"
        found.append(Measure(name, f"seam ratio, {note}", float(ratios[0]), better=LOWER, note=of + said))
    return found


def tone_measures(found: Tone) -> list[Measure]:
    """The drift as a row of a report; none where too few windows hold tissue.

    >>> tone_measures(Tone(np.zeros((4, 4, 3)), drift=3.2, low=0.4, high=1.6))[0].note
    'ΔE between corners of the linear trend; shuffled windows 0.4 to 1.6'
    """
    if np.isnan(found.drift):
        return []
    note = f"ΔE between corners of the linear trend; shuffled windows {found.low:.1f} to {found.high:.1f}"
    return [Measure("tone_drift", "tone drift over the canvas", found.drift, better=LOWER, note=note)]


def repetition_measures(found: Repetition) -> list[Measure]:
    """The strongest repetition and the most similar windows as rows of a report.

    >>> repetition_measures(Repetition(np.zeros((7, 7)), strongest=0.6, lag=(0, 4), closest=0.9))[0].note
    'autocorrelation of window features, at 0 down and 4 across'
    """
    rows, cols = found.lag
    note = f"autocorrelation of window features, at {rows} down and {cols} across"
    return [
        Measure("repetition", "repetition", found.strongest, better=LOWER, note=note),
        Measure(
            "closest_windows",
            "most similar windows",
            found.closest,
            better=LOWER,
            note=f"cosine of centred features, {FAR} windows apart or more; near 1: a copy",
        ),
    ]
