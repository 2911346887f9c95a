"""Sheets of images: rows on white with words beside and under them; and maps of what a translation changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

GAP = 6
LEAST = 128  # px of the longer side of an image on a sheet: small ones are enlarged to it
ROOM = 232  # px that words under an image may take where it is narrower
WORDS, FONT, LINE = "#3c4043", 12, 17  # colour; px of letters and of their line

REAL, MADE = "real", "SYNTHETIC"  # what images on a sheet are, where both are on it

Row = Sequence[np.ndarray | None]


def grid(
    rows: Sequence[Row],
    labels: Sequence[Sequence[str]] | None = None,
    titles: Sequence[str] | None = None,
    least: int = LEAST,
    most: int | None = None,
    gap: int = GAP,
    margin: int | None = None,
) -> np.ndarray:
    """Rows of images (H,W,3) uint8 of any size on white, all as large as one another: (H',W',3) uint8.

    Args:
        rows: images, from the left; the place of None stays white.
        labels: a line of words under each image, cut where they are long.
        titles: words before each row, of one or several lines.
        least, most: pixels that the longer side has on the sheet: smaller images are enlarged, larger ones reduced.
        gap: pixels between images. margin: around all of them; None is as much as the gap.

    >>> images = [np.zeros((32, 32, 3), np.uint8)] * 2
    >>> grid([images, images], labels=[["a", "b"], ["c", "d"]]).shape
    (308, 274, 3)
    >>> grid([images], least=0, gap=2, margin=0).shape
    (32, 66, 3)
    """
    margin = gap if margin is None else margin
    largest = max(max(image.shape[:2]) for row in rows for image in row if image is not None)
    side = max(min(largest, most or largest), least)
    pictures = [[None if image is None else fitted(image, side) for image in row] for row in rows]
    shapes = [picture.shape for row in pictures for picture in row if picture is not None]
    height, width = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    if labels:
        width = max(width, min(ROOM, max(_extent(words) for row in labels for words in row)))
    foot = LINE if labels else 0
    left = margin + (max(_extent(title) for title in titles) + 2 * gap if titles else 0)
    columns = max(map(len, rows))
    across, down = left + columns * (width + gap) - gap + margin, len(rows) * (height + foot + gap) - gap + 2 * margin
    page = Image.new("RGB", (across, down), "white")
    pen = ImageDraw.Draw(page)
    for i, row in enumerate(pictures):
        top = margin + i * (height + foot + gap)
        if titles:
            pen.text((margin, top + height // 2), titles[i], WORDS, _font(), "lm")
        for j, picture in enumerate(row):
            x = left + j * (width + gap)
            if picture is not None:
                page.paste(Image.fromarray(picture), (x, top + (height - picture.shape[0]) // 2))
            if labels:
                pen.text((x, top + height + 1), _cut(labels[i][j], width), WORDS, _font())
    return np.asarray(page)


def contact_sheet(
    images: Sequence[np.ndarray],
    real: Sequence[np.ndarray] | None = None,
    labels: Sequence[str] | None = None,
    columns: int = 8,
    least: int = LEAST,
    most: int | None = None,
) -> np.ndarray:
    """Images (H,W,3) uint8 row by row, see `grid`; where real ones are given, each right above its own, and rows say
    which are real and which SYNTHETIC.

    >>> contact_sheet([np.zeros((64, 64, 3), np.uint8)] * 9).shape
    (274, 1078, 3)
    """
    rows, words = _wrapped(images, columns), labels and _wrapped(labels, columns)
    if real is None:
        return grid(rows, words, least=least, most=most)
    both = [row for pair in zip(_wrapped(real, columns), rows) for row in pair]
    words = words and [row for own in words for row in ([""] * len(own), own)]
    return grid(both, words, [REAL, MADE] * len(rows), least=least, most=most)


def labelled_sheet(rows: Sequence[Sequence[tuple[str, np.ndarray | None]]], columns: int = 6) -> np.ndarray:
    """Rows of images with a line of words under each; rows of more than `columns` go on below.

    >>> labelled_sheet([[("source", np.zeros((64, 64, 3), np.uint8))]]).shape
    (157, 140, 3)
    """
    rows = [part for row in rows for part in _wrapped(row, columns)]
    return grid([[image for _, image in row] for row in rows], [[text for text, _ in row] for row in rows], most=384)


def headed(page: np.ndarray, words: Sequence[tuple[int, str]]) -> np.ndarray:
    """A page (H,W,3) uint8 under a line of words, each beginning so many px from the left.

    >>> headed(np.zeros((20, 60, 3), np.uint8), [(0, "real")]).shape
    (37, 60, 3)
    """
    line = Image.new("RGB", (page.shape[1], LINE), "white")
    for x, text in words:
        ImageDraw.Draw(line).text((x, 1), text, WORDS, _font())
    return np.concatenate([np.asarray(line), page])


def fitted(image: np.ndarray, side: int) -> np.ndarray:
    """An image (H,W,3) uint8 made so large that its longer side has `side` px.

    >>> fitted(np.zeros((100, 50, 3), np.uint8), 10).shape
    (10, 5, 3)
    """
    scale = side / max(image.shape[:2])
    size = tuple(max(1, round(extent * scale)) for extent in image.shape[1::-1])
    if size == image.shape[1::-1]:
        return image
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(size, method))


def difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How much changed at each place, in grey levels (H,W): the mean over channels of images (H,W,3) uint8.

    >>> difference(np.zeros((1, 1, 3), np.uint8), np.array([[[0, 6, 0]]], np.uint8)).tolist()
    [[2.0]]
    """
    return np.abs(after.astype(np.float32) - before.astype(np.float32)).mean(-1)


def coloured(change: np.ndarray, most: float) -> np.ndarray:
    """A map (H,W) as colours (H,W,3) uint8, black for none, light for `most`.

    >>> coloured(np.array([[0.0, 9.0]]), most=9).sum(-1).tolist()
    [[4, 671]]
    """
    scaled = (change / max(most, 1.0)).clip(0, 1)
    return (colormaps["inferno"](scaled)[..., :3] * 255).round().astype(np.uint8)


def _wrapped(row: Sequence, columns: int) -> list[Sequence]:
    return [row[i : i + columns] for i in range(0, len(row), columns)]


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT)


def _extent(words: str) -> int:
    return max(round(_font().getlength(line)) for line in words.split("\n"))


def _cut(words: str, width: int) -> str:
    """The words, as far as they fit into `width` px."""
    if _font().getlength(words) <= width:
        return words
    return next(words[:end] + "…" for end in range(len(words), -1, -1) if _font().getlength(words[:end] + "…") <= width)
