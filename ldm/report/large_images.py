"""Sections of a report on large images: the canvas of each, and whether a synthetic slide holds together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange

from ldm.encoders.extractors import Extractor
from ldm.errors import UserError
from ldm.images.sheets import LEAST, fitted, grid
from ldm.images.slides import Slide
from ldm.metrics import conditional, large_images, whole_slides
from ldm.metrics.fields import neighbour_correlation
from ldm.metrics.large_images import Tone
from ldm.metrics.measure import LOWER, Measure, measure_of
from ldm.metrics.memorisation import CAUGHT
from ldm.metrics.seams import NEAR, Lines, lattice_ratios, line_gradients, seam_profile
from ldm.metrics.whole_slides import COPY, DRAWS, EDGES, QUANTILE, Drift, Pair, Windows
from ldm.report import plots
from ldm.report.page import Section

SEAM = 1.02  # like for like over that of the real slide: up to here borders do not show
LAGS = 64  # windows along the middle of an image whose autocorrelation is taken
APART = (1, 2)  # windows, at which features are correlated: of slides of four windows along a side too
PAIRS = 6  # closest pairs on the page


@dataclass(frozen=True)
class Looked:
    """A large image and what all its pixels say: gradients across lines, and the tone of windows of `window` px.

    features: (rows,cols,D) of the windows in the middle side by side, LAGS along each side at most, NaN where there is
    little tissue; None without an extractor.
    """

    image: Slide
    window: int
    across: Lines
    tones: Tone
    features: np.ndarray | None

    @classmethod
    def at(cls, image: Slide, window: int, extractor: Extractor | None = None) -> Looked:
        tones = large_images.tone(image, window)
        features = None if extractor is None else _middle_features(image, window, tones, extractor)
        return cls(image, window, line_gradients(image.bands()), tones, features)

    @property
    def tissue(self) -> np.ndarray:
        """(rows,cols) bool: windows that hold tissue."""
        return ~np.isnan(self.tones.colours[..., 0])


def canvas(looked: Looked, role: str, tile: int, extractor: str = "") -> Section:
    """The seams, tone and repetition of one large image.

    role: generated or real. tile: pixels of the tiles that it was made of. extractor: the name of what made the
    features of windows; without them the repetition is left out.

    >>> looked = Looked.at(Slide.of_pixels(np.tile(tile, (4, 4, 1))), window=256)
    >>> section = canvas(looked, "generated", 256)
    >>> {each.name: each.value for each in section.measures}
    {'seams': 4.2742, 'seams_like': 3.3608, 'tone_drift': 0.0}
    """
    image, tones, window = looked.image, looked.tones, looked.window
    measures = large_images.seam_measures(looked.across, tile) + large_images.tone_measures(tones)
    section = Section(
        f"canvas-{role}",
        f"The canvas of the {role} image",
        f"{' × '.join(map(str, image.dimensions))} px, windows of {window} px. The same measures of a real image say "
        "what is usual.",
        measures=measures,
    )
    if looked.tissue.any():
        section.plots.append((plots.tone_map(tones), "Mean colour of the tissue in each window; white: little tissue."))
    features = looked.features
    if features is not None:
        if (~np.isnan(features[..., 0])).sum() >= large_images.LEAST and min(features.shape[:2]) > 1:
            found = large_images.repetition(features)
            section.measures += large_images.repetition_measures(found)
            section.extractor = extractor
            section.plots.append((plots.lag_map(found), "Autocorrelation of window features by lag."))
    picture = _whole_picture(image, 640)
    section.pictures.append((fitted(picture, 640), "SYNTHETIC" if role == "generated" else "Real"))
    return section


def _middle_features(image: Slide, window: int, tones: Tone, extractor: Extractor) -> np.ndarray:
    whole = ~np.isnan(tones.colours[..., 0])
    first = [max(0, (side - LAGS) // 2) for side in whole.shape]
    tissue = whole[first[0] : first[0] + LAGS, first[1] : first[1] + LAGS]
    features = np.full((*tissue.shape, extractor.dim), np.nan, np.float32)
    for row in np.flatnonzero(tissue.any(1)):
        cols = np.flatnonzero(tissue[row])
        corners = np.stack([cols + first[1], np.full(len(cols), row + first[0])], 1) * window
        features[row, cols] = extractor(image.read_tiles(corners, window, window))
    return features


def _whole_picture(image: Slide, side: int) -> np.ndarray:
    """The whole image reduced to at most about `side` px, band by band."""
    step = max(1, max(image.dimensions) // side)
    bands = []
    for band in image.bands():
        height, width = (each // step * step for each in band.shape[:2])
        if height:
            cells = rearrange(band[:height, :width], "(h i) (w j) c -> h w (i j) c", i=step, j=step)
            bands.append(cells.mean(2, dtype=np.float32).round().astype(np.uint8))
    return np.concatenate(bands)


def whole_distance(generated: Slide, real: Slide, extractor: Extractor, side: int = 1024) -> Section:
    """The distance of two whole images, each reduced to one view of at most `side` px.

    >>> from ldm.encoders.extractors import load_extractor
    >>> image = Slide.of_pixels(tile)
    >>> whole_distance(image, image, load_extractor("pixels")).measures[0].value
    0.0
    """
    features = [extractor(_whole_picture(image, side)[None])[0] for image in (generated, real)]
    cosine = float(conditional.cosines(features[0][None], features[1][None])[0, 0])
    measures = [
        Measure(
            "whole_distance",
            "distance of the whole images",
            1 - cosine,
            better=LOWER,
            note="1 - cosine of their features, each image as one view",
        )
    ]
    return Section("whole", "The whole image", extractor=extractor.name, measures=measures)


@dataclass(frozen=True)
class Conditions:
    """Features (rows,cols,D) that a slide was made of, NaN at holes; px from tile to tile and of their sides."""

    grid: np.ndarray
    stride: int
    tile: int


def together(
    made: Looked, real: Looked, tile: int, stains: str, extractor: Extractor, most: int, seed: int,
    conditions: Conditions | None = None,
) -> Section:  # fmt: skip
    """Whether a synthetic slide holds together, against a real one: seams, drift of stains, repetition.

    made, real: with features by the extractor. tile: pixels of the lattice whose borders might show. stains: `he` or
    `hd`. most: windows of each slide whose features are compared, drawn by the seed. conditions: what the slide was
    made of, in the extractor's features.
    Drift is left out where too few bands have tissue. UserError: the tissue of one of them lies in one place.

    >>> from ldm.encoders.extractors import load_extractor
    >>> from ldm.images.slides import open_image
    >>> real = Slide.of_pixels(open_image(slide_path).read(0, 0, 1024, 1024))
    >>> wallpaper = Slide.of_pixels(np.tile(tile[:128, :128], (8, 8, 1)))
    >>> extractor = load_extractor("pixels")
    >>> both = [Looked.at(image, 128, extractor) for image in (wallpaper, real)]
    >>> section = together(*both, 128, "he", extractor, most=64, seed=0)
    >>> section.verdict[0], {each.name: each.value for each in section.measures}["copied_windows"]
    ('bad', 16)
    """
    section = Section(
        "together",
        "Does the slide hold together?",
        f"{_size(made)} against {_size(real)} of a real slide, like for like in windows of {made.window} px.",
        extractor.name,
    )
    faults: list[tuple[str, str]] = []  # bad or fair, in words
    both = (made, real)
    _seams(section, faults, both, tile)
    try:
        own = whole_slides.band_stains(made.image, made.window, stains)
        usual = whole_slides.band_stains(real.image, real.window, stains, own.windows)
        _drift(section, faults, whole_slides.drift(own, usual))
    except UserError as error:
        section.intro += f" Drift of stains is left out: {error}"
    windows = [whole_slides.read_windows(e.image, e.window, e.tissue, extractor, most, seed) for e in both]
    _repetition(section, faults, both, windows, conditions, seed)
    _structure(section, faults, both, seed)
    if faults:
        worst = "bad" if any(kind == "bad" for kind, _ in faults) else "fair"
        section.verdict = (worst, " ".join(words for _, words in sorted(faults)))
    else:
        words = (
            "It holds together: no borders, no more drift than the real slide varies, no more repetition than it has."
        )
        section.verdict = ("good", words)
    return section


def _size(looked: Looked) -> str:
    return f"{' × '.join(map(str, looked.image.dimensions))} px"


def _seams(section: Section, faults: list[tuple[str, str]], both: Sequence[Looked], tile: int) -> None:
    """The seam ratio over that of the real slide; its interval is of how the ratios of all other lattices vary."""
    ratios = [lattice_ratios(each.across, tile, NEAR).clip(min=1e-6) for each in both]
    own, usual = (float(each[0]) for each in ratios)
    ratio = own / usual
    spread = 1.96 * float(np.sqrt(sum(np.log(each[1:]).var() for each in ratios)))
    low, high = ratio * np.exp(-spread), ratio * np.exp(spread)
    words = f"gradient across {tile} px borders over that beside them {own:.3f}, real {usual:.3f}"
    note = f"{words}; up to {SEAM} none show; the interval is of all other lattices"
    section.measures.append(Measure("seams_to_real", "seams against real", ratio, low, high, better=LOWER, note=note))
    if ratio > SEAM and low > 1:
        faults.append(("bad", f"Borders of tiles of {tile} px show."))
    profiles = [seam_profile(each.across, tile) for each in both]
    words = "Mean gradient around the borders of the lattice. JPEG and first stages make a comb of 8 px of their own."
    section.plots.append((plots.seam_profiles(*profiles), words))


def _drift(section: Section, faults: list[tuple[str, str]], found: Drift) -> None:
    note = "the largest below over the range of the real slide; up to 1 it varies no more"
    section.measures.append(Measure("stain_drift", "drift of stains", found.ratio, better=LOWER, note=note))
    for i, name in enumerate(found.names):
        way = int(found.spans[:, i].argmax())
        span, usual = float(found.spans[way, i]), float(found.usual[i])
        ends = " to ".join(EDGES[2 * way : 2 * way + 2])
        note = (
            f"optical density, range of outermost and median bands, {ends}; of all bands of the real slide {usual:.3f}"
        )
        section.measures.append(Measure(f"drift_{name.replace(', ', '_')}", name, span, better=LOWER, note=note))
        if span > usual:
            faults.append(("bad", f"It drifts: {name} by {span:.3f} from {ends}, the real slide by {usual:.3f}."))
    words = "The outermost bands less the median one; grey: all bands of the real slide less theirs."
    section.plots.append((plots.edge_drift(found), words))


def _repetition(
    section: Section, faults: list[tuple[str, str]], both: Sequence[Looked], windows: Sequence[Windows],
    conditions: Conditions | None, seed: int,
) -> None:  # fmt: skip
    unit = whole_slides.spread_of(windows[1].features)
    distances = [whole_slides.apart(each.features, each.place, unit) for each in windows]
    found = whole_slides.repeats(*distances, seed=seed)
    pairs = [
        whole_slides.closest_pairs(each.image, each.window, own, between)
        for each, own, between in zip(both, windows, distances)
    ]
    looked_at = len(pairs[0])
    copied = sum(pair.match >= COPY for pair in pairs[0])
    own, usual = (float(np.median(each)) for each in (found.made, found.real))
    counts = [len(each.features) for each in windows]
    drawn = f"{min(counts)} windows" + (f", {DRAWS} times of {max(counts)}" if counts[0] != counts[1] else "")
    share = measure_of(
        "repeated_share", found.share, title="windows with a twin", better=LOWER, seed=seed,
        note=f"share nearer to another than {1 - QUANTILE:.0%} of real windows are ({found.limit:.3f}): {drawn}",
    )  # fmt: skip
    best = [max((pair.match for pair in each), default=0.0) for each in pairs]
    section.measures += [
        Measure("nearest_window", "distance to the nearest window", own,
                note=f"median; real {usual:.3f}; 1 is the spread of the real slide's windows"),
        share,
        Measure("copied_windows", "copied windows", copied, better=LOWER,
                note=f"of the {looked_at} closest pairs those whose pixels correlate by {COPY} or more; best "
                f"{best[0]:.2f}, real {best[1]:.2f}"),
    ]  # fmt: skip
    if copied:
        faults.append(
            ("bad", f"It holds copies: {copied} of the {looked_at} closest pairs of windows agree in pixels.")
        )
    of_conditions = None
    if conditions is not None:
        ratio, of_conditions = _beside_conditions(windows[0], both[0].window, distances[0], conditions, unit)
        note = "median nearest distance over that of the conditions of the same windows; below 1: more alike than these"
        section.measures.append(Measure("nearest_to_conditions", "windows against their conditions", ratio, note=note))
    if share.low > QUANTILE:
        said = f"{share.value:.0%} of windows have a nearer twin than {1 - QUANTILE:.0%} of the real slide's"
        if of_conditions is not None and ratio >= 1:
            faults.append(("fair", f"{said}, but are no more alike than their conditions."))
        elif share.low > CAUGHT:
            faults.append(("bad", f"It repeats itself: {said}."))
        else:
            faults.append(("fair", f"Its windows are more alike than real ones: {said}."))
    words = "Distances to the nearest other window, two windows away or more, among as many windows."
    section.plots.append((plots.nearest_histogram(found, of_conditions), words))
    words = "The closest pairs of windows: distance, and correlation of their pixels."
    section.pictures.append((_closest(both, windows, pairs), words))
    section.data = {
        "closest_pairs": [_told(pair, windows[0], both[0].window) for pair in pairs[0]],
        "windows": counts, "unit": unit,
    }  # fmt: skip


def _structure(section: Section, faults: list[tuple[str, str]], both: Sequence[Looked], seed: int) -> None:
    """Whether windows tell of others as far away as they do in the real slide: tissue is larger than a window."""
    lost = []
    larger = all(a >= b for a, b in zip(*(each.tissue.shape for each in both)))  # a smaller one holds less variety
    for lag in APART:
        found = []
        for each, who in zip(both, ("", "real_")):
            try:
                estimate, blocks = neighbour_correlation(each.features, lag)
            except UserError:  # too few pairs with tissue
                continue
            if np.isfinite(estimate.value):  # else all windows are alike
                title = f"correlation {lag * each.window} px apart{', real' if who else ''}"
                note = "of features of windows; blocks of 4 x 4 windows are drawn"
                found.append(
                    measure_of(f"{who}correlation_{lag}", estimate, (blocks, None), title, note=note, seed=seed)
                )
        if len(found) == 2:
            section.measures += found
            if found[0].high < found[1].low and larger:
                own, usual = (each.value for each in found)
                lost.append(f"{lag * both[0].window} px apart {own:.2f}, real {usual:.2f}")
    if lost:
        faults.append(("fair", f"It has less structure than real tissue: correlation of windows {', '.join(lost)}."))


def _beside_conditions(
    windows: Windows, window: int, distances: np.ndarray, conditions: Conditions, unit: float
) -> tuple[float, np.ndarray]:
    """The median nearest distance of windows over that of their conditions, and the latter's distances."""
    own = whole_slides.conditions_at(windows, window, conditions.grid, conditions.stride, conditions.tile)
    rows = np.flatnonzero(~np.isnan(own[:, 0]))
    between = whole_slides.apart(own[rows], windows.place[rows], unit).min(1)
    nearest = distances[np.ix_(rows, rows)].min(1)
    return float(np.median(nearest) / np.median(between)), between[np.isfinite(between)]


def _closest(both: Sequence[Looked], windows: Sequence[Windows], pairs: Sequence[Sequence[Pair]]) -> np.ndarray:
    """The closest pairs of the synthetic slide, then those of the real one."""
    rows, labels = [], []
    for each, own, close in zip(both, windows, pairs):
        shown = close[:PAIRS]
        for side in ([pair.one for pair in shown], [pair.other for pair in shown]):
            rows.append([each.image.read(*own.corners[i], each.window, each.window) for i in side])
        labels += [[""] * len(shown), [f"{pair.distance:.2f} · r {pair.match:.2f}" for pair in shown]]
    return grid(rows, labels, ["SYNTHETIC", "its nearest", "real", "its nearest"], most=LEAST)


def _told(pair: Pair, windows: Windows, window: int) -> dict[str, object]:
    corners = [windows.corners[each].tolist() for each in (pair.one, pair.other)]
    return {"corners": corners, "side": window, "distance": pair.distance, "correlation": pair.match}
