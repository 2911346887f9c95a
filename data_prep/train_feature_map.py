r"""Train a map from the features of one kind of tile to those of another, as from H&E to IHC for virtual staining.

It is the rectified flow of `ldm.encoders.feature_map` between two sets of features, and takes minutes on a CPU.
`histoldm translate --map-features FOLDER` then maps the features of each image.

Examples:

    python -m data_prep.train_feature_map --source he.zarr --target ihc.zarr \
        --out models/he-to-ihc
    python -m data_prep.train_feature_map --source he.npy --target ihc.npy \
        --paired --out models/he-to-ihc
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from data_prep.options import DeviceOption, inputs, output
from ldm.cli.script import script
from ldm.data.features import read_features
from ldm.data.tile_store import open_cohort
from ldm.devices import pick_device
from ldm.errors import UserError
from ldm.files import owns

HELD_OUT = 8  # every so manyth pair tells how good the map is
training = partial(typer.Option, rich_help_panel="Training")


def read_set(path: Path, feature: str | None) -> tuple[np.ndarray, dict[str, Any]]:
    """Features (N,D) of a file, a store or a folder of stores, and what is known of their encoder."""
    if not path.is_dir():
        values = read_features(path).values
        return values.reshape(-1, values.shape[-1]), {}
    rows, about = [], {}
    for store in open_cohort(path):
        found = read_features(store.path, feature)
        rows.append(found.values)
        name = feature or store.feature_names[0]
        told = dict(store.features(name).attrs)
        about = {key: told[key] for key in ("encoder", "licence", "weights_sha256") if key in told}
    return np.concatenate(rows), about


@owns(beside=True)
def train(
    source: Path,
    target: Path,
    out: Path,
    source_feature: str | None = None,
    target_feature: str | None = None,
    paired: bool = False,
    steps: int = 2000,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Train the map between two sets of features, see `read_set`, print how good it is, and write it.

    Raises:
        UserError: unreadable features, unequally many pairs, see also `ldm.encoders.feature_map.fit_transport`.
    """
    import torch

    from ldm.encoders.feature_map import fit_transport, save_transport

    (a, of_source), (b, of_target) = read_set(source, source_feature), read_set(target, target_feature)
    settings = {"paired": paired, "steps": steps, "seed": seed}
    metadata = {"source": of_source, "target": of_target, **settings, "counts": [len(a), len(b)]}
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    if paired:
        if len(a) != len(b):
            raise UserError(f"--paired takes equally many features of both; got {len(a)} and {len(b)}.")
        held = torch.arange(len(a)) % HELD_OUT == HELD_OUT - 1
        model = fit_transport(a[~held], b[~held], device=pick_device(device), **settings)
        error, spread = (model.map(a[held]) - b[held]).square().mean(), (b[held] - b[~held].mean(0)).square().mean()
        metadata["held_out_error"] = float(error / spread)
        print(f"held-out pairs: {100 * float(error / spread):.0f}% of the variance is left unexplained")
    else:
        model = fit_transport(a, b, device=pick_device(device), **settings)
        mapped = model.map(a)
        gaps = [float((values.mean(0) - b.mean(0)).norm() / b.std(0).norm()) for values in (a, mapped)]
        metadata["mean_gap"] = gaps
        print(f"distance of the means, in standard deviations: {gaps[0]:.2f} before, {gaps[1]:.2f} after")
    save_transport(out, model, metadata)
    print(f"wrote {out}")


@script("data_prep.train_feature_map", __doc__)
def main(
    source: Annotated[
        Path, inputs("--source", help="Features of the source: .npy, .h5, .pt, a tile store, a folder of stores.")
    ],
    target: Annotated[Path, inputs("--target", help="Features of the target, in any of these forms.")],
    out: Annotated[Path, output("--out", help="Folder of the map to write.")],
    source_feature: Annotated[
        str | None, inputs("--source-feature", help="Name of the source's features, where its stores have several.")
    ] = None,
    target_feature: Annotated[
        str | None, inputs("--target-feature", help="Name of the target's features, where its stores have several.")
    ] = None,
    paired: Annotated[bool, inputs("--paired", help="Take row i of both sets as features of the same place.")] = False,
    steps: Annotated[int, training("--steps", help="Steps of the training.")] = 2000,
    seed: Annotated[int, training("--seed", help="Seed of the training: the same seed gives the same map.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    train(source, target, out, source_feature, target_feature, paired, steps, seed, device)


if __name__ == "__main__":
    main.run()
