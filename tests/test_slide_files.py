"""Files of features as tools write them: read, or told by what is wrong; every feature lies at its tile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from data_prep.import_features import import_features
from ldm.data.cohort import write_store
from ldm.data.features import read_features
from ldm.data.slide_files import find_slide_files
from ldm.data.tile_store import TileStore
from ldm.errors import UserError

SIDE = 256
COORDS = np.array([(x, y) for y in range(0, 4 * SIDE, SIDE) for x in range(0, 4 * SIDE, SIDE)], np.int64)
VALUES = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
TRIDENT = {"patch_size": SIDE, "patch_size_level0": SIDE, "overlap": 0}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    """A store of 4 x 4 tiles, the first one at (256, 0)."""
    attrs = {"tile_size": 8, "level0_size": [4 * SIDE, 4 * SIDE], "downsample": SIDE / 8}
    order = np.roll(np.arange(16), -1)
    tile = np.zeros((8, 8, 3), np.uint8)
    return write_store(
        tmp_path_factory.mktemp("cohort"), "S1", lambda i: tile, 16, attrs=attrs, coords=COORDS[order]
    )


@pytest.fixture
def store(written: TileStore, tmp_path: Path) -> TileStore:
    return TileStore.open(shutil.copytree(written.path, tmp_path / "slides" / "S1.zarr"))


def h5(path: Path, features: np.ndarray | None, coords: np.ndarray | None, **attrs: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if features is not None:
            file["features"] = features
        if coords is not None:
            file["coords"] = coords
            file["coords"].attrs.update(attrs)
    return path


def pt(path: Path, content: object) -> Path:
    h5(path.parent.parent / "patches" / "S1.h5", None, COORDS, **TRIDENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


T = torch.tensor(VALUES)
GOOD: dict[str, Callable[[Path], Path]] = {
    "numbers": lambda d: h5(d / "S1.h5", VALUES, COORDS, **TRIDENT),
    "one-element arrays": lambda d: h5(d / "S1.h5", VALUES, COORDS, **{k: np.array([v]) for k, v in TRIDENT.items()}),
    "text": lambda d: h5(d / "S1.h5", VALUES, COORDS, **{k: str(v) for k, v in TRIDENT.items()}),
    "bytes": lambda d: h5(d / "S1.h5", VALUES, COORDS, **{k: np.bytes_(str(v)) for k, v in TRIDENT.items()}),
    "no attributes": lambda d: h5(d / "S1.h5", VALUES, COORDS),
    "a batch of one": lambda d: h5(d / "S1.h5", VALUES[None], COORDS[None], **TRIDENT),
    "each a batch": lambda d: h5(d / "S1.h5", VALUES[:, None], COORDS, **TRIDENT),
    "half precision": lambda d: h5(d / "S1.h5", VALUES.astype(np.float16), COORDS.astype(np.float32), **TRIDENT),
    "CLAM": lambda d: h5(d / "S1.h5", VALUES, COORDS, patch_size=64, patch_level=1, downsample=np.array([4.0, 4.0])),
    "beside a slide's feature": lambda d: h5(d / "job" / "slide_features_x" / "S1.h5", VALUES[0], COORDS)
    and h5(d / "job" / "features_x" / "S1.h5", VALUES, COORDS, **TRIDENT).parent.parent,
    "with a gradient": lambda d: pt(d / "pt_files" / "S1.pt", T.clone().requires_grad_()),
    "a parameter": lambda d: pt(d / "pt_files" / "S1.pt", torch.nn.Parameter(T)),
    "a list of one": lambda d: pt(d / "pt_files" / "S1.pt", [T]),
    "a dict": lambda d: pt(d / "pt_files" / "S1.pt", {"features": T[None], "coords": torch.tensor(COORDS)}),
    "an array": lambda d: pt(d / "pt_files" / "S1.pt", VALUES),
    "arrays": lambda d: pt(
        d / "pt_files" / "S1.pt", {"feats": VALUES.astype(np.float16), "coords": COORDS, "patch_size": np.int64(SIDE)}
    ),
    "bfloat16": lambda d: pt(d / "pt_files" / "S1.pt", T.bfloat16()),
}


@pytest.mark.parametrize("name", GOOD)
def test_features_lie_at_their_tiles(store: TileStore, tmp_path: Path, name: str, capsys):
    import_features([store], find_slide_files([GOOD[name](tmp_path / "files")]), "x", "MIT")
    found = store.features("x")[:]
    assert store.coords[0].tolist() == [256, 0]
    np.testing.assert_array_equal(found[0], VALUES[1])  # 8, 9, ... at (256, 0)
    np.testing.assert_array_equal(found, np.roll(VALUES, -1, 0))
    assert ("one feature of a whole slide" in capsys.readouterr().err) == (name == "beside a slide's feature")


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an attribute of two numbers": (
        lambda d: h5(d / "S1.h5", VALUES, COORDS, patch_size=np.array([256, 128])),
        r"the attribute `patch_size` of its coords is array\(\[256, 128\]\), which is not one number",
    ),
    "an attribute in words": (
        lambda d: h5(d / "S1.h5", VALUES, COORDS, patch_size_level0="large"),
        "the attribute `patch_size_level0` of its coords is 'large'",
    ),
    "NaN": (
        lambda d: h5(d / "S1.h5", np.where(np.arange(16)[:, None] < 3, np.nan, VALUES), COORDS, **TRIDENT),
        "NaN or infinity in 3 of 16 features",
    ),
    "boxes": (lambda d: h5(d / "S1.h5", VALUES, np.hstack([COORDS, COORDS + 256])), r"coords of shape \(16, 4\)"),
    "pixels of a level": (
        lambda d: h5(d / "S1.h5", VALUES, COORDS // 4, patch_size_level0=256),
        "are those of the tiles of .* divided by 4: they are in pixels of a smaller level",
    ),
    "smaller tiles": (
        lambda d: h5(d / "S1.h5", np.repeat(VALUES, 4, 0), _halves()),
        "they lie 128 px apart, and those of .* cover 256 level-0 px: are they features of smaller tiles",
    ),
    "smaller tiles that say so": (
        lambda d: h5(d / "S1.h5", np.repeat(VALUES, 4, 0), _halves(), patch_size=128, patch_size_level0=128),
        "cover 128 level-0 px, those of .* 256",
    ),
    "two features for a slide": (lambda d: h5(d / "S1.h5", VALUES[:2], COORDS, **TRIDENT), "2 features but coords of"),
    "one feature for a slide": (lambda d: h5(d / "S1.h5", VALUES[:1], COORDS), "one feature of 8 values, of a wh"),
    "only slides' features": (lambda d: h5(d / "S1.h5", VALUES[0], COORDS), "no file has features"),
    "objects in a tensor file": (
        lambda d: pt(d / "pt_files" / "S1.pt", {"features": T, "from": d}),
        r"holds objects of Python \(pathlib\.\w+\), .* Save the features alone, as torch\.save",
    ),
    "an array of objects": (lambda d: pt(d / "pt_files" / "S1.pt", VALUES.astype(object)), "holds object, not numbers"),
    "no tensor file": (
        lambda d: d.mkdir() or ((d / "S1.pt").write_bytes(b"no tensor" * 9) and d),
        "it is no file of torch",
    ),
    "another name": (lambda d: pt(d / "pt_files" / "S1.pt", {"feature": T}), "it holds feature"),
}


def _halves() -> np.ndarray:
    return np.array([(x, y) for y in range(0, 4 * SIDE, SIDE // 2) for x in range(0, 4 * SIDE, SIDE // 2)], np.int64)


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_wrong_are_told(store: TileStore, tmp_path: Path, name: str):
    make, message = BAD[name]
    with pytest.raises(UserError, match=message):
        import_features([store], find_slide_files([make(tmp_path / "files")]), "x", "MIT")
    assert not store.feature_names


def test_overlapping_tiles_can_be_said(store: TileStore, tmp_path: Path):
    found = find_slide_files([h5(tmp_path / "S1.h5", np.repeat(VALUES, 4, 0), _halves())])
    import_features([store], found, "x", "MIT", patch_size=256)
    assert store.features("x").shape == (16, 8)
    found = find_slide_files([h5(tmp_path / "S1.h5", VALUES, COORDS, **TRIDENT)])
    with pytest.raises(UserError, match=r"--patch-size says that a tile covers 512 level-0 px, .* says 256"):
        import_features([store], found, "y", "MIT", patch_size=512)


def test_a_slides_feature_is_none_of_its_tiles(tmp_path: Path):
    torch.save(T[0], tmp_path / "s.pt")
    with pytest.raises(UserError, match="one feature of 8 values, of a whole slide"):
        read_features(tmp_path / "s.pt")
