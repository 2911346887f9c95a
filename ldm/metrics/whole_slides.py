"""Does a synthetic slide hold together? Drift of its stains from edge to edge, and windows that repeat themselves.

Each is measured like for like on a real slide, in bands and windows of the same size; seams are those of
`ldm.metrics.seams`. A slide is read in bands of windows, so memory holds a band of it at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from skimage.feature import match_template

from ldm.errors import UserError
from ldm.images.slides import Slide
from ldm.metrics.intervals import Estimate, mean_of
from ldm.metrics.large_images import FAR, tissue_of
from ldm.metrics.pairs import STAINS, stain_amounts

ALONG = 4  # windows along each side of a slide, at least
LEAST = 8  # windows with tissue whose distances say something
EDGES = ("top", "bottom", "left", "right")
SIXTHS = 6.0  # of `stain_amounts`, to optical densities
QUANTILE = 0.05  # of the real slide's nearest distances; as many of its windows are nearer
DRAWS = 20  # of windows of the larger slide, as many as the smaller one has
SHOWN = 16  # closest pairs whose pixels are compared
COPY = 0.95  # correlation of pixels from which a window is a copy
PLAIN = 8.0  # grey levels: deviation of a window below which it has no texture to compare


@dataclass(frozen=True)
class BandStains:
    """Stains of the tissue in bands of windows: statistics `names`, of rows (R,4) and of columns (C,4).

    Mean and standard deviation over the pixels, of optical densities; NaN where a band has less tissue than one window,
    or than a quarter of what half of the bands have. windows: (rows, columns) of the slide.
    """

    names: tuple[str, ...]
    rows: np.ndarray
    columns: np.ndarray
    windows: tuple[int, int]


def band_stains(image: Slide, window: int, stains: str = "he", longest: tuple[int, int] = (2**31, 2**31)) -> BandStains:
    """The stains of an image in bands of `window` px, from the top down and from the left to the right.

    stains: of STAINS, `he` or `hd`. longest: windows of a column, and of a row: longer ones are cut to several bands.
    UserError: fewer than ALONG bands with tissue in a direction.

    >>> found = band_stains(Slide.of_pixels(tile), window=32)
    >>> found.names[:2], found.rows.shape, found.rows[0, :2]
    (('haematoxylin, mean', 'haematoxylin, spread'), (8, 4), array([0.0509, 0.0468]))
    >>> band_stains(Slide.of_pixels(tile), window=32, longest=(8, 4)).rows.shape
    (16, 4)
    """
    cols, rows = (side // window for side in image.dimensions)
    sums = np.zeros((rows, cols, 5))  # pixels, and of each stain the sum and that of squares
    for row in range(rows):
        band = image.read(0, row * window, cols * window, window)
        for col in range(cols):
            part = band[:, col * window : (col + 1) * window]
            amounts = SIXTHS * stain_amounts(part[tissue_of(part)], stains)  # (n,2)
            sums[row, col] = [len(amounts), *amounts.sum(0), *np.square(amounts).sum(0)]
    found = BandStains(
        tuple(f"{stain}, {what}" for stain in STAINS[stains] for what in ("mean", "spread")),
        *(_statistics(own, most, window**2) for own, most in ((sums, longest[1]), (sums.swapaxes(0, 1), longest[0]))),
        (rows, cols),
    )
    for what, bands in (("rows", found.rows), ("columns", found.columns)):
        kept = int((~np.isnan(bands[:, 0])).sum())
        if kept < ALONG:
            raise UserError(
                f"{image.path} has tissue in {kept} {what} of windows of {window} px, and drift is measured over "
                f"{ALONG} at least: give a slide with more tissue, or smaller windows by --crop."
            )
    return found


def _statistics(sums: np.ndarray, most: int, least: int) -> np.ndarray:
    """(B,4): mean and deviation of each stain, of pixels, sums and sums of squares (R,C,5) of bands of C windows, or of
    pieces of them of `most`; NaN where they have fewer than `least` pixels or than a quarter of their median."""
    length = min(most, sums.shape[1])
    pieces = sums.shape[1] // length
    sums = sums[:, : pieces * length].reshape(-1, length, 5).sum(1)
    count = np.where(sums[:, :1] >= least, sums[:, :1], np.nan)
    if not np.isnan(count).all():
        count = np.where(count >= np.nanmedian(count) / 4, count, np.nan)
    mean, square = sums[:, 1:3] / count, sums[:, 3:] / count
    return np.stack([mean, np.sqrt((square - mean**2).clip(min=0))], -1).reshape(-1, 4)


@dataclass(frozen=True)
class Drift:
    """How far the outermost bands of a slide are from its median band: edges (4,4), EDGES by statistic.

    low, high: (4,) of each statistic the same of all bands of the real slide. spans: (2,4), from top to bottom and from
    left to right the range of both edges and the median.
    """

    names: tuple[str, ...]
    edges: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def spans(self) -> np.ndarray:
        pairs = self.edges.reshape(2, 2, -1)
        return pairs.max(1).clip(min=0) - pairs.min(1).clip(max=0)

    @property
    def usual(self) -> np.ndarray:
        """(4,): the range of the real slide's bands."""
        return (self.high - self.low).clip(min=1e-6)

    @property
    def ratio(self) -> float:
        """The largest of spans over what is usual: up to 1 the slide drifts no more than the real one varies."""
        return float((self.spans / self.usual).max())


def deviations(bands: np.ndarray) -> np.ndarray:
    """Of bands (n,4) those with tissue, less their median.

    >>> deviations(np.array([[1.0, 0], [np.nan, np.nan], [2, 0], [6, 0]]))[:, 0]
    array([-1.,  0.,  4.])
    """
    kept = bands[~np.isnan(bands[:, 0])]
    return kept - np.median(kept, axis=0)


def drift(made: BandStains, real: BandStains) -> Drift:
    """The drift of a slide, against how bands of a real one vary; these should be no longer than those of the slide.

    >>> even, odd = np.zeros((6, 4)), np.tile([[0.1], [-0.1]], (3, 4))
    >>> falling = np.linspace(0.5, -0.5, 6)[:, None] * np.ones(4)
    >>> names = ("a", "b", "c", "d")
    >>> found = drift(BandStains(names, falling, even, (6, 6)), BandStains(names, odd, odd, (6, 6)))
    >>> found.ratio, found.spans[:, 0]
    (5.0, array([1., 0.]))
    """
    edges = np.concatenate([deviations(bands)[[0, -1]] for bands in (made.rows, made.columns)])
    usual = np.concatenate([deviations(bands) for bands in (real.rows, real.columns)])
    return Drift(made.names, edges, usual.min(0), usual.max(0))


@dataclass(frozen=True)
class Windows:
    """Windows of a slide that hold tissue: corners (N,2) x, y in px, place (N,2) row and column, features (N,D)."""

    corners: np.ndarray
    place: np.ndarray
    features: np.ndarray


def read_windows(
    image: Slide, window: int, tissue: np.ndarray, extract: Callable[[np.ndarray], np.ndarray], most: int, seed: int
) -> Windows:
    """Features of at most `most` windows of `window` px side by side, drawn by the seed from those with tissue.

    tissue: (rows,cols) bool. extract: (B,H,W,3) uint8 to (B,D).

    >>> found = read_windows(Slide.of_pixels(tile), 64, np.ones((4, 4), bool), lambda x: x.mean((1, 2)), 10, seed=0)
    >>> found.corners.shape, found.features.shape
    ((10, 2), (10, 3))
    """
    place = np.argwhere(tissue)
    place = place[np.sort(np.random.default_rng(seed).permutation(len(place))[:most])]
    corners, features = place[:, ::-1] * window, []
    for row in np.unique(place[:, 0]):
        features.append(extract(image.read_tiles(corners[place[:, 0] == row], window, window)))
    return Windows(corners, place, np.concatenate(features).astype(np.float64))


def spread_of(features: np.ndarray) -> float:
    """The root mean square distance of features (N,D) from their mean: the unit of distances.

    >>> spread_of(np.array([[0.0, 0.0], [2.0, 0.0]]))
    1.0
    """
    return float(np.sqrt(np.square(features - features.mean(0)).sum(1).mean()))


def apart(features: np.ndarray, place: np.ndarray, unit: float) -> np.ndarray:
    """Distances (N,N) of features (N,D), in units; infinite between windows less than FAR windows apart.

    >>> apart(np.eye(3), np.array([[0, 0], [0, 1], [0, 2]]), unit=1.0)[0]
    array([   inf,    inf, 1.4142])
    """
    square = np.square(features).sum(1)
    found = np.sqrt((square[:, None] + square - 2 * features @ features.T).clip(min=0)) / max(unit, 1e-12)
    near = np.abs(place[:, None] - place[None]).max(-1) < FAR
    return np.where(near, np.inf, found)


@dataclass(frozen=True)
class Repeats:
    """Distances of windows to the nearest other one of their slide: of a slide and of a real one, as many at a time.

    share: of the slide's windows that are nearer than `limit`, below which lie QUANTILE of the real ones.
    """

    made: np.ndarray
    real: np.ndarray
    limit: float
    share: Estimate


def repeats(made: np.ndarray, real: np.ndarray, seed: int = 0) -> Repeats:
    """Compare nearest distances. made, real: distances within each slide, see `apart`.

    More windows are nearer to one another: so of the larger slide as many as of the smaller one are drawn, DRAWS times.
    UserError: hardly a window with tissue has another one FAR windows away.

    >>> place = np.arange(0, 400, 2)[:, None] * np.ones(2, int)
    >>> copies = np.tile(real[:10], (20, 1))                              # ten windows, twenty times each
    >>> distances = [apart(features, place, 1.0) for features in (copies, real[:200])]
    >>> found = repeats(*distances)
    >>> found.share.value, float(np.median(found.made))
    (1.0, 0.0)
    """
    count = min(len(made), len(real))
    rng = np.random.default_rng(seed)
    own, usual = (_drawn(distances, count, rng) for distances in (made, real))
    known, drawn = usual[np.isfinite(usual)], np.isfinite(own)
    if min(len(known), drawn.sum()) < LEAST:
        which = "real" if len(known) < LEAST else "generated"
        raise UserError(
            f"the tissue of the {which} slide lies in one place: repetition is measured over {LEAST} windows at least "
            f"that have another one {FAR} windows away. Give a slide with more tissue, or smaller windows by --crop."
        )
    limit = float(np.quantile(known, QUANTILE))
    below = ((own < limit) & drawn).sum(0)[drawn.any(0)] / drawn.sum(0)[drawn.any(0)]
    return Repeats(own[drawn], known, limit, mean_of(below, bounds=(0.0, 1.0)))


def _drawn(distances: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, N): nearest distances among `count` windows that are drawn; infinite of those that are not."""
    draws = DRAWS if count < len(distances) else 1
    found = np.full((draws, len(distances)), np.inf)
    for i in range(draws):
        rows = rng.permutation(len(distances))[:count]
        found[i, rows] = distances[np.ix_(rows, rows)].min(1)
    return found


@dataclass(frozen=True)
class Pair:
    """Two windows of a slide (N of `Windows`), their distance, and how well the middle of one is found in the other:
    the correlation of grey at the best place, 1 for a copy."""

    one: int
    other: int
    distance: float
    match: float


def closest_pairs(image: Slide, window: int, windows: Windows, distances: np.ndarray, most: int = SHOWN) -> list[Pair]:
    """The closest pairs of windows, the nearest first, each window in one at most, with their pixels compared.

    The middle of one window, half as wide, is looked for wherever it lies in the other and half a window around that.

    >>> image = Slide.of_pixels(np.tile(tile[:64, :64], (4, 4, 1)))
    >>> windows = read_windows(image, 64, np.ones((4, 4), bool), lambda x: x.mean((1, 2)), 16, seed=0)
    >>> [pair.match for pair in closest_pairs(image, 64, windows, apart(windows.features, windows.place, 1.0), most=2)]
    [1.0, 1.0]
    """
    nearest, free, pairs = distances.min(1), np.ones(len(distances), bool), []
    for one in np.argsort(nearest, kind="stable"):
        if len(pairs) == most or not np.isfinite(nearest[one]):
            break
        if not free[one]:
            continue
        other = int(np.where(free, distances[one], np.inf).argmin())
        if np.isfinite(distance := float(distances[one, other])) and free[other]:
            free[[one, other]] = False
            match = _match(image, window, windows.corners[one], windows.corners[other])
            pairs.append(Pair(int(one), other, distance, match))
    return pairs


def _match(image: Slide, window: int, one: np.ndarray, other: np.ndarray) -> float:
    """The best correlation of the middle of the window at `one` (x, y) with any place around that at `other`."""
    half, quarter = window // 2, window // 4
    middle = image.read(*(one + quarter), half, half).mean(-1)
    if middle.std() < PLAIN:
        return 0.0
    around = image.read(*(other - half), window + 2 * half, window + 2 * half).mean(-1)
    return float(np.nan_to_num(match_template(around, middle)).max())


def conditions_at(windows: Windows, window: int, grid: np.ndarray, stride: int, tile: int) -> np.ndarray:
    """(N,D): of a grid (rows,cols,D) of tiles the one that is nearest to each window; NaN in holes and outside.

    window, stride, tile: sides of a window, from tile to tile, and of a tile in px.

    >>> windows = Windows(np.array([[0, 0], [128, 64]]), np.zeros((2, 2)), np.zeros((2, 1)))
    >>> conditions_at(windows, 128, np.arange(6.0).reshape(2, 3, 1), stride=64, tile=128)[:, 0]
    array([0., 5.])
    """
    cols, rows = np.round((windows.corners + (window - tile) / 2) / stride).astype(int).T
    inside = (rows >= 0) & (rows < grid.shape[0]) & (cols >= 0) & (cols < grid.shape[1])
    found = np.full((len(rows), grid.shape[2]), np.nan)
    found[inside] = grid[rows[inside], cols[inside]]
    return found
