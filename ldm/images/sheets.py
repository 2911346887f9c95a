"""What shows a translation: maps of what changed, and a sheet for each image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw

WIDEST, LEAST = 384, 132  # px of an image on a sheet
COLUMNS = 6
GAP, LINE = 6, 14


def difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How much changed at each place, in grey levels (H,W): the mean over channels of images (H,W,3) uint8."""
    return np.abs(after.astype(np.float32) - before.astype(np.float32)).mean(-1)


def coloured(change: np.ndarray, most: float) -> np.ndarray:
    """A map (H,W) as colours (H,W,3) uint8, black for none, light for `most`."""
    scaled = (change / max(most, 1.0)).clip(0, 1)
    return (colormaps["inferno"](scaled)[..., :3] * 255).round().astype(np.uint8)


def labelled_sheet(rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> np.ndarray:
    """Rows of images (H,W,3) of one size with a line of text under each, (H',W',3) uint8; long rows go on below."""
    rows = [row[i : i + COLUMNS] for row in rows for i in range(0, len(row), COLUMNS)]
    height, width = rows[0][0][1].shape[:2]
    side = max(height, width)
    scale = WIDEST / side if side > WIDEST else max(LEAST // side, 1)  # small tiles are seen, too
    w, h = max(round(width * scale), 1), max(round(height * scale), 1)
    columns = max(len(row) for row in rows)
    cell_w, cell_h = max(w, LEAST) + GAP, h + LINE + GAP
    sheet = Image.new("RGB", (columns * cell_w + GAP, len(rows) * cell_h + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (text, image) in enumerate(row):
            left, top = GAP + j * cell_w, GAP + i * cell_h
            sheet.paste(Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS), (left, top))
            while len(text) > 4 and draw.textlength(text) > cell_w - GAP:
                text = text[:-4] + "..."
            draw.text((left, top + h + 1), text, fill="black")
    return np.asarray(sheet)
