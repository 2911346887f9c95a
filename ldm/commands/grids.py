"""The grid of features of which a large image or a slide is asked, from a tile store or a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.data.extent import extent_differs
from ldm.data.features import read_features
from ldm.data.field_files import extent_of, known_of_field
from ldm.data.tile_store import TileStore, open_cohort
from ldm.errors import UserError
from ldm.files import sha256
from ldm.requests.tiles import check_encoder, feature_dim, is_store, pick_feature

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion


@dataclass(frozen=True)
class Grid:
    """What is known of a grid.

    Attributes:
        features: (rows, cols, D), NaN at holes. background: (D,) what holes take, None where nothing is known of it.
        size: (height, width) of its image in pixels, None where the grid does not say. mpp: of the image, or None.
        words: what condition it is. place: what files say of where it was.
    """

    features: np.ndarray
    words: str
    background: np.ndarray | None = None
    size: tuple[int, int] | None = None
    mpp: float | None = None
    place: dict[str, Any] = field(default_factory=dict)


def asked_grid(
    model: LatentDiffusion, features: Path, feature: str | None, region: Sequence[int] | None, mpp: float | None
) -> Grid:
    """The grid of a tile store, or of a region of its slide (x, y, width, height), or of a file of features; of a field
    that `histoldm field` made, also how large its image is and which feature its glass has.

    mpp: of the image, where the user says it. UserError: features that the model does not take, several slides.
    """
    if not is_store(features):
        if region:
            raise UserError(f"--region goes with a tile store; {features} is a file of features.")
        grid, known = read_features(features, dim=feature_dim(model)).grid()[0], known_of_field(features)
        check_encoder(model, known.get("features") or {}, features)
        own = known.get("glass") and np.array(known["glass"], np.float32)
        place = {"field_sha256": sha256(features)} if known else {}
        return Grid(grid, features.name, own, extent_of(known, grid.shape[:2]), mpp or known.get("mpp"), place)
    stores = open_cohort(features)
    if len(stores) > 1:
        raise UserError(f"{features} holds {len(stores)} slides; give one store, such as {stores[0].path}.")
    store = stores[0]
    name = pick_feature(stores, feature, model)
    check_encoder(model, dict(store.features(name).attrs), store.path)
    grid, known = store.grid(region, name)
    extent = [((side - 1) * store.stride + store.tile_size) * store.downsample for side in known.shape]
    return Grid(
        grid,
        f"{store.slide} region {','.join(map(str, region)) if region else 'whole slide'} ({name})",
        None if known.all() else glass(store, name),
        tuple((side - 1) * store.stride + store.tile_size for side in known.shape),
        mpp or checked_mpp(model, store),
        {"slide": store.slide, "region": [*(region or (0, 0))[:2], round(extent[1]), round(extent[0])]},
    )


def checked_mpp(model: LatentDiffusion, store: TileStore) -> float | None:
    """The model's micrometres per pixel, or the store's where it does not know; UserError if their tiles differ."""
    if differs := extent_differs(store, model.metadata):
        raise UserError(f"{differs}. Tile the slide as the model's were, or give --mpp if this is what you want.")
    return model.metadata.get("mpp") or store.mpp


def glass(store: TileStore, feature: str) -> np.ndarray | None:
    """The mean feature of a store's background tiles, for holes of its grid; None if it kept none."""
    if "tissue" not in store.label_names:
        return None
    rows = np.flatnonzero(store.labels("tissue") < 0.01)
    if not len(rows):
        return None
    array = store.features(feature)
    values = np.stack([array[int(row)] for row in rows[:64]]).astype(np.float32)
    return (values[:, 0] if values.ndim == 3 else values).mean(0)
