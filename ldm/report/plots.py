"""Plots of a report, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt
from skimage.color import lab2rgb

from ldm.metrics.whole_slides import EDGES

if TYPE_CHECKING:
    from ldm.metrics.conditional import Calibration
    from ldm.metrics.large_images import Repetition, Tone
    from ldm.metrics.measure import Measure
    from ldm.metrics.memorisation import Memorisation
    from ldm.metrics.whole_slides import Drift, Repeats

GENERATED, REAL, FLAG, GREY = "#d9822b", "#3b6fb6", "#b3261e", "#9aa0a6"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "histoldm",  # the same figures are the same bytes
    "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": "#3c4043", "xtick.color": "#3c4043",
    "ytick.color": "#3c4043", "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
SHOWN = 1500  # points of a scatter plot


def _svg(figure: plt.Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def scatter(generated: np.ndarray, real: np.ndarray, seed: int = 0) -> str:
    """Both sets of features on the first two principal components of the real ones.

    >>> svg = scatter(generated, real)
    >>> svg[:4], svg.count("<use ") > len(generated) + len(real)                    # a mark for each image
    ('<svg', True)
    """
    rng = np.random.default_rng(seed)
    generated, real = (x[rng.permutation(len(x))[:SHOWN]].astype(np.float64) for x in (generated, real))
    mean = real.mean(0)
    _, _, axes_of = np.linalg.svd(real - mean, full_matrices=False)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 3.2))
        for features, colour, label in ((real, REAL, "real"), (generated, GENERATED, "generated")):
            axes.scatter(*((features - mean) @ axes_of[:2].T).T, s=10, color=colour, alpha=0.6, lw=0, label=label)
        axes.set(xlabel="first component", ylabel="second component")
        axes.legend(loc="best", markerscale=1.5)
        return _svg(figure)


def size_line(inverse: np.ndarray, values: np.ndarray, at_infinity: float, count: int) -> str:
    """FID by 1/f, and the line to infinitely many images. count: images of the smaller set.

    >>> inverse = np.array([1.0, 2.0, 4.0])
    >>> "FD∞ 10" in size_line(inverse, 10 + 3 * inverse, 10.0, count=400)
    True
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 3.2))
        axes.scatter(inverse, values, s=12, color=REAL, alpha=0.7, lw=0)
        slope = inverse @ (values - at_infinity) / (inverse @ inverse)
        axes.plot([0, inverse.max()], [at_infinity, at_infinity + slope * inverse.max()], color=REAL, lw=1)
        axes.scatter([0], [at_infinity], s=36, color=GENERATED, zorder=3, clip_on=False)
        axes.annotate(f"FD∞ {at_infinity:.4g}", (0, at_infinity), (8, -14), textcoords="offset points")
        ticks = sorted({1.0, float(inverse.max().round(1))})
        axes.set_xticks([0, *ticks], ["∞", *(f"{count / tick:.0f}" for tick in ticks)])
        axes.set(xlabel="images of the smaller set", ylabel="FID", xlim=(0, None))
        return _svg(figure)


def distance_histogram(found: Memorisation) -> str:
    """Distances to the nearest training image, of generated and of held-out images.

    >>> from ldm.encoders.feature_files import FeatureSet
    >>> from ldm.metrics.memorisation import memorisation
    >>> sets = [FeatureSet(x, pd.DataFrame({"name": range(len(x))})) for x in (generated, real[:100], real[100:])]
    >>> "5% of held-out" in distance_histogram(memorisation(*sets))
    True
    """
    generated, held_out = found.generated.distance[:, 0], found.held_out.distance[:, 0]
    high = max(np.quantile(generated, 0.99), np.quantile(held_out, 0.99), 1e-6)
    bins = np.linspace(0, high, 31)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 2.8))
        for values, colour, label in ((held_out, REAL, "held-out real"), (generated, GENERATED, "generated")):
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values.clip(max=high), bins=bins, weights=weights, color=colour, alpha=0.55, label=label)
        axes.axvline(found.limit, color=FLAG, lw=1, ls="--")
        axes.annotate(
            "5% of held-out", (found.limit, axes.get_ylim()[1]), (4, -8), textcoords="offset points", color=FLAG
        )
        axes.set(xlabel="distance to the nearest training image", ylabel="share of images", xlim=(0, high))
        axes.legend()
        return _svg(figure)


def reliability(found: Calibration) -> str:
    """Mean target over mean score of each bin, and how many images are in it.

    >>> from ldm.metrics.conditional import calibration
    >>> found = calibration(pd.DataFrame({"score": [0.1, 0.2, 0.7, 0.9], "target": [0, 0, 1, 1]}))
    >>> "mean target" in reliability(found)
    True
    """
    known = ~np.isnan(found.centre)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(3.6, 3.2))
        axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--")
        edges = (np.arange(len(found.share)) + 0.5) / len(found.share)
        axes.bar(edges, found.share, width=0.9 / len(edges), color=GREY, alpha=0.3, label="share of images")
        axes.plot(found.centre[known], found.mean[known], marker="o", ms=4, color=REAL, label="targets")
        axes.set(xlabel="score", ylabel="mean target", xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc="upper left")
        return _svg(figure)


def bars(measures: Sequence[Measure], label: str) -> str:
    """Figures with their intervals, one below the other.

    >>> from ldm.metrics.measure import Measure
    >>> svg = bars([Measure("fid_LUAD", "FID, class LUAD", 21.0, 18.0, 25.0)], "FID")
    >>> "FID, class LUAD" in svg
    True
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 0.6 + 0.32 * len(measures)))
        for place, each in enumerate(measures):
            low, high = (each.value if end is None else end for end in (each.low, each.high))
            axes.plot([low, high], [place, place], color=REAL, lw=2, alpha=0.5)
            axes.scatter([each.value], [place], color=GREY if each.invalid else REAL, s=22, zorder=3)
        axes.set_yticks(range(len(measures)), [each.title.replace("$", r"\$") for each in measures])
        axes.invert_yaxis()
        axes.set(xlabel=label)
        return _svg(figure)


def tone_map(found: Tone) -> str:
    """The mean colour of tissue in each window.

    >>> from ldm.images.slides import open_slide
    >>> from ldm.metrics.large_images import tone
    >>> "<image " in tone_map(tone(open_slide(slide_path), 512))
    True
    """
    glass = np.isnan(found.colours[..., 0])
    colours = lab2rgb(np.where(glass[..., None], [100.0, 0, 0], found.colours))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(3.2, 3.2 * max(0.3, glass.shape[0] / glass.shape[1])))
        axes.imshow(colours, interpolation="nearest")
        axes.set_axis_off()
        return _svg(figure)


def lag_map(found: Repetition) -> str:
    """Autocorrelation of window features by lag.

    >>> from ldm.metrics.large_images import repetition
    >>> "windows across" in lag_map(repetition(real[:100, :4].reshape(10, 10, 4)))
    True
    """
    rows, cols = (side // 2 for side in found.map.shape)
    limit = max(float(np.nanmax(np.abs(np.where(np.isfinite(found.map), found.map, 0)))), 1e-6)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(3.6, 3.2))
        shown = axes.imshow(found.map, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest",
                            extent=(-cols - 0.5, cols + 0.5, rows + 0.5, -rows - 0.5))  # fmt: skip
        axes.set(xlabel="windows across", ylabel="windows down")
        figure.colorbar(shown, ax=axes, shrink=0.8)
        return _svg(figure)


def seam_profiles(made: np.ndarray, real: np.ndarray) -> str:
    """Mean gradients (2n+1,) around the borders of a lattice, of a synthetic slide and of a real one.

    >>> "px from a border" in seam_profiles(np.ones(5), np.ones(5))
    True
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 2.8))
        for values, colour, label in ((real, REAL, "real"), (made, GENERATED, "generated")):
            axes.plot(np.arange(len(values)) - len(values) // 2, values, color=colour, lw=1.2, label=label)
        axes.axvline(0, color=FLAG, lw=1, ls="--")
        axes.set(xlabel="px from a border", ylabel="gradient over its mean")
        axes.legend()
        return _svg(figure)


def edge_drift(found: Drift) -> str:
    """The outermost bands of a slide, each statistic beside the range of the real slide's bands.

    >>> from ldm.metrics.whole_slides import Drift
    >>> "optical density" in edge_drift(Drift(("a", "b", "c", "d"), np.eye(4), -np.ones(4), np.ones(4)))
    True
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 2.8))
        places = np.arange(len(found.names))
        axes.bar(places, found.high - found.low, 0.8, found.low, color=GREY, alpha=0.3)
        for k, (edge, marker) in enumerate(zip(EDGES, "^v<>")):
            axes.scatter(places + 0.12 * (k - 1.5), found.edges[k], s=26, marker=marker, color=GENERATED, label=edge)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_xticks(places, [name.replace(", ", "\n") for name in found.names], fontsize=8)
        axes.set(ylabel="optical density")
        axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), handletextpad=0.2, columnspacing=1)
        return _svg(figure)


def nearest_histogram(found: Repeats, conditions: np.ndarray | None = None) -> str:
    """Distances of windows to the nearest other one of their slide, and those of their conditions.

    >>> from ldm.metrics.intervals import mean_of
    >>> from ldm.metrics.whole_slides import Repeats
    >>> "5% of real" in nearest_histogram(Repeats(np.ones(9), np.ones(9), 1.0, mean_of(np.ones(9))))
    True
    """
    sets = [(found.real, REAL, "real"), (found.made, GENERATED, "generated")]
    sets += [(conditions, GREY, "conditions")] if conditions is not None else []
    high = max(max(np.quantile(values, 0.99) for values, _, _ in sets), 1e-6)
    bins = np.linspace(0, high, 31)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 2.8))
        for values, colour, label in sets:
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values.clip(max=high), bins=bins, weights=weights, color=colour, alpha=0.55, label=label)
        axes.axvline(found.limit, color=FLAG, lw=1, ls="--")
        axes.annotate("5% of real", (found.limit, axes.get_ylim()[1]), (4, -8), textcoords="offset points", color=FLAG)
        axes.set(xlabel="distance to the nearest window", ylabel="share of windows", xlim=(0, high))
        axes.legend()
        return _svg(figure)
