r"""Fit the first stage of a model that makes fields of features: few whitened components of an encoder's features.

What it writes is the first_stage of configs/own/field.yaml. It is a principal component analysis of the features in the
stores, in all eight orientations where they have them; of tiles on glass it keeps the mean, which holes of a field
become in an image.

Examples:

    python -m data_prep.fit_feature_codec --store cohort \
        --where split=train --out models/feature-codec
    python -m data_prep.fit_feature_codec --store cohort \
        --feature uni --share 0.95 --out models/uni-codec
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np

from data_prep.options import inputs, output, taken
from ldm.cli.options import FeatureOption, WhereOption
from ldm.cli.script import script
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.files import owns

if TYPE_CHECKING:
    import torch

TARGET = "ldm.autoencoder.feature_codec.FeatureCodec"
GLASS = 0.01  # least tissue of a tile that is none of glass
MOST = 256  # tiles on glass of a store that its mean is of
BATCH = 1024


@owns(beside=True)
def fit(
    stores: Sequence[Path], out: Path, feature: str | None = None, where: Sequence[str] = (), share: float = 0.9
) -> Path:
    """Fit the codec of the features `feature` of stores, and write it as the model folder `out`.

    where: which tiles it is fitted to, `["split=train"]`. share: of their variance that is kept, at least.
    UserError: stores of several features of which none is named, see also `ldm.autoencoder.feature_codec.fit_codec`.
    """
    from ldm.autoencoder.feature_codec import fit_codec
    from ldm.data.datasets import TileDataset
    from ldm.data.tile_store import open_cohort
    from ldm.model_folder import write_model_folder

    opened = open_cohort(list(stores))
    names = sorted(set.intersection(*(set(store.feature_names) for store in opened)))
    if feature is None and len(names) != 1:
        raise UserError(f"name the features by --feature; the stores have {', '.join(names) or 'none in common'}.")
    feature = feature or names[0]
    tiles = TileDataset([str(path) for path in stores], ("ssl",), feature, where=list(where) or None)
    batches = _batches(tiles.stores, tiles.conditions.rows, feature)
    codec, kept = fit_codec(batches, share, _glass(tiles.stores, feature))
    known = tiles.metadata
    metadata = {key: known[key] for key in ("encoder", "mpp", "tile_size", "slide_licence") if key in known}
    params = {"dim": codec.dim, "channels": codec.channels, "glass": codec.glass is not None}
    params |= {} if codec.rest is None else {"rest": codec.rest.shape[1]}
    metadata |= {"kept": round(kept, 4), "tiles": len(tiles)}
    folder = write_model_folder(out, {"target": TARGET, "params": params}, codec.state_dict(), metadata)
    print(
        f"wrote {folder}: {codec.channels - 1} components keep {kept:.1%} of the variance of {len(tiles)} features "
        f"'{feature}' ({codec.dim} values); with the channel of tissue, models of it have {codec.channels} channels"
    )
    return folder


def _batches(stores: Sequence[TileStore], chosen: Sequence[np.ndarray], feature: str) -> Iterator[torch.Tensor]:
    import torch

    for store, rows in zip(stores, chosen):
        array = store.features(feature)
        for first in range(0, len(rows), BATCH):
            values = np.stack([array[int(row)] for row in rows[first : first + BATCH]]).astype(np.float32)
            yield torch.from_numpy(values).flatten(0, -2)


def _glass(stores: Sequence[TileStore], feature: str) -> torch.Tensor | None:
    """The mean feature (D,) of tiles without tissue; None where the stores kept none."""
    import torch

    found = []
    for store in stores:
        if "tissue" in store.label_names:
            rows = np.flatnonzero(store.labels("tissue") < GLASS)[:MOST]
            values = [np.asarray(store.features(feature)[int(row)], np.float32) for row in rows]
            found += [each if each.ndim == 1 else each.mean(0) for each in values]
    return torch.from_numpy(np.mean(found, 0)) if found else None


@script("data_prep.fit_feature_codec", __doc__)
def main(
    store: Annotated[list[Path], inputs("--store", help="Tile stores, or cohorts of stores: one or several.")],
    out: Annotated[Path, output("--out", help="Model folder to write.")],
    feature: FeatureOption = None,
    where: WhereOption = None,
    share: Annotated[float, taken("--share", help="Share of the features' variance that is kept, up to 1.")] = 0.9,
) -> None:
    fit(store, out, feature, where or (), share)


if __name__ == "__main__":
    main.run()
