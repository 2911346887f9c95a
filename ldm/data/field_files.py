"""Fields of features on disk: `<name>.npy` (rows,cols,D) with NaN at holes, and `<name>.json`, what is known of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm.files import whole, write_text
from ldm.foreign.settings import read_json
from ldm.foreign.shape import ABOVE_0, MAPPING, NUMBER, SIZE, check_shape, maybe

_FORM = {
    "stride?": maybe(SIZE), "tile_size?": maybe(SIZE), "mpp?": maybe(ABOVE_0), "features?": maybe(MAPPING),
    "glass?": maybe([NUMBER]),
}  # fmt: skip


def write_field(path: Path, field: np.ndarray, about: Mapping[str, Any]) -> Path:
    """Write a field (rows,cols,D) as float16, and beside it what is known of it; returns where the latter is.

    about: what it says of itself; of its lattice `stride` and `tile_size`, in pixels of `mpp` micrometres, `features`,
    the attributes of the encoder's features, and `glass`, the feature (D,) of places that are holes.

    >>> write_field(Path("field.npy"), np.zeros((2, 3, 8), np.float32), {"stride": 64, "tile_size": 256})
    PosixPath('field.json')
    """
    with whole(path) as part, part.open("wb") as file:
        np.save(file, field.astype(np.float16))
    beside = path.with_suffix(".json")
    write_text(beside, json.dumps(about, default=str) + "\n")
    return beside


def known_of_field(path: Path) -> dict[str, Any]:
    """What stands beside a file of features of the field that it holds; {} where nothing does.

    >>> _ = write_field(Path("field.npy"), np.zeros((2, 3, 8), np.float32), {"stride": 64, "tile_size": 256})
    >>> known_of_field(Path("field.npy"))["stride"], known_of_field(Path("other.npy"))
    (64, {})
    """
    beside = path.with_suffix(".json")
    if path.suffix != ".npy" or not beside.is_file():
        return {}
    known = read_json(beside, "what is known of a field of features,")
    check_shape(known, _FORM, beside)
    return dict(known)


def extent_of(known: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, int] | None:
    """(height, width) in pixels of the image of a field of `grid` (rows, cols) places; None where it is not known.

    >>> extent_of({"stride": 64, "tile_size": 256}, (13, 29))
    (1024, 2048)
    """
    stride, tile = known.get("stride"), known.get("tile_size")
    return tuple((side - 1) * stride + tile for side in grid) if stride and tile else None
