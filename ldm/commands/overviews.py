"""The overview that a large image or a slide is asked to agree with, from a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.images.pictures import Picture
from ldm.sampling.sampler import Windows


def asked_overview(path: Path | None, windows: Windows) -> tuple[np.ndarray | None, dict[str, Any]]:
    """The overview (3,h,w) in [-1,1] of an image file, if one is asked for, and what files say of it: a hash of its
    pixels. UserError: it cannot be read; a strength without an overview.

    >>> low, told = asked_overview(slide_path, Windows())
    >>> low.shape, [*told]
    ((3, 2967, 2220), ['overview_sha256'])
    """
    if path is None:
        if windows.overview_strength != Windows().overview_strength:
            raise UserError("--overview-strength goes with an --overview; give one, or leave it out.")
        return None, {}
    pixels = Picture.of_file(path).pixels()
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1, {"overview_sha256": digest}
