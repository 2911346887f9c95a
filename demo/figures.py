"""Pictures of the report, as PIL images or SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("agg")
from matplotlib import font_manager
from matplotlib import pyplot as plt

from ldm.images.sheets import grid

SPLITS = {"train": "#3b6fb6", "val": "#d9822b", "none": "#9aa0a6"}  # colours of the splits
BAND = "#d9822b"
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#9aa0a6", "axes.labelcolor": "#3c4043", "xtick.color": "#3c4043",
    "ytick.color": "#3c4043", "legend.frameon": False,
}  # fmt: skip


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _tag(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int) -> None:
    font = _font(size)
    left, top, right, bottom = draw.textbbox(corner, text, font=font)
    pad = size // 3
    draw.rectangle((left - pad, top - pad, right + pad, bottom + pad), fill=(32, 33, 36))
    draw.text(corner, text, font=font, fill="white")


def overlap(region: Sequence[int], band: Sequence[int]) -> tuple[int, int, int, int] | None:
    """The part of `band` inside `region`, both (x, y, width, height), as (left, top, right, bottom) in the region."""
    x, y, width, height = region
    left, top = max(band[0] - x, 0), max(band[1] - y, 0)
    right, bottom = min(band[0] + band[2] - x, width), min(band[1] + band[3] - y, height)
    return (left, top, right, bottom) if left < right and top < bottom else None


def annotate(image: np.ndarray, title: str, mpp: float, band: tuple[int, int, int, int] | None) -> np.ndarray:
    """image (H,W,3) uint8 with its title, a scale bar of 100 um, and brackets along the sides of the held-out band."""
    picture = Image.fromarray(image).copy()
    draw = ImageDraw.Draw(picture)
    size = max(12, picture.width // 40)
    _tag(draw, (size, size), title, size)
    length, bottom = round(100 / mpp), picture.height - size
    width = max(4, size // 4)
    text = "100 µm"
    extent = draw.textlength(text, font=_font(size))
    draw.rectangle((size - 6, bottom - 2 * size - 6, size + max(length, extent) + 6, bottom + 6), fill=(255, 255, 255))
    draw.rectangle((size, bottom - width, size + length, bottom), fill=(32, 33, 36))
    draw.text((size, bottom - 2 * size), text, font=_font(size), fill=(32, 33, 36))
    if band:
        left, top, right, low = band
        for x in (left, right - width):
            draw.rectangle((x, top, x + width, low), fill=BAND)
        for y in (top, low - width):  # short arms: the tissue stays visible
            draw.rectangle((left, y, left + 3 * size, y + width), fill=BAND)
            draw.rectangle((right - 3 * size, y, right, y + width), fill=BAND)
        label = "held out"
        extent = draw.textlength(label, font=_font(size))
        _tag(draw, (int(right - extent - size - width), top + size), label, size)
    return np.asarray(picture)


def details(real: np.ndarray, generated: np.ndarray, corners: Sequence[tuple[int, int]], side: int) -> np.ndarray:
    """Crops (row, col) of `side` px at full resolution: the real ones above, the generated ones below."""
    rows = [[image[r : r + side, c : c + side] for r, c in corners] for image in (real, generated)]
    return grid(rows, least=0, gap=8, margin=0)


def slide_map(thumbnail: Image.Image, centres: np.ndarray, splits: np.ndarray, scale: float, spot: float,
              band: Sequence[int], region: Sequence[int]) -> Image.Image:  # fmt: skip
    """Thumbnail with a spot at each tile's centre (N,2), level-0 px, coloured by split; the band and the region."""
    picture = thumbnail.convert("RGB")
    draw = ImageDraw.Draw(picture, "RGBA")
    radius = spot * scale / 2
    for (x, y), split in zip(centres * scale, splits):
        colour = SPLITS.get(str(split), "#000000")
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour + "c0")
    for (x, y, width, height), colour in ((band, BAND), (region, "#202124")):
        draw.rectangle([v * scale for v in (x, y, x + width - 1, y + height - 1)], outline=colour, width=3)
    return picture


def _svg(figure: plt.Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def tissue_histogram(tissue: np.ndarray) -> str:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.2, 2.2))
        axes.hist(tissue, bins=np.linspace(0, 1, 21), color=SPLITS["train"], rwidth=0.9)
        axes.set(xlabel="tissue fraction of a tile", ylabel="tiles", xlim=(0, 1))
        return _svg(figure)


def loss_curves(rows: Sequence[tuple[int, str, float]], names: Sequence[tuple[str, str]]) -> str:
    """One panel per (training name, validation name) of `losses.csv`; a name that was not logged has no line."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(names), figsize=(4.2 * len(names), 2.4), squeeze=False)
        for axes, pair in zip(panels[0], names):
            for name, colour, width in zip(pair, (SPLITS["train"], SPLITS["val"]), (1.0, 2.0)):
                points = np.array([(batch, value) for batch, n, value in rows if n == name])
                if len(points):
                    marker = "o" if name == pair[1] else None
                    axes.plot(*points.T, color=colour, lw=width, marker=marker, ms=3, label=name)
            axes.set(xlabel="training batches")
            axes.legend()
        figure.tight_layout()
        return _svg(figure)


def newest(folder: Path, name: str) -> Path | None:
    """The last grid `<name>_gs-*.png` that training wrote into `folder`."""
    return max(folder.glob(f"{name}_gs-*.png"), default=None)
