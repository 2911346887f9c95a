"""A map from features of one kind of tile to those of another, as of H&E to IHC, for virtual staining by features.

    python -m data_prep.train_feature_map --source he.zarr --target ihc.zarr --out models/he-to-ihc
    python -m data_prep.train_feature_map --source he.npy --target ihc.npy --paired --out models/he-to-ihc

Trains the rectified flow of `ldm.encoders.feature_map` between two sets of features: files (.npy, .h5, .pt) or stores.
`histoldm translate --map-features models/he-to-ihc` then maps each image's features. Minutes on a processor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.features import read_features
from ldm.data.tile_store import open_cohort
from ldm.devices import pick_device
from ldm.encoders.feature_map import fit_transport, save_transport
from ldm.errors import UserError, run_command
from ldm.files import writable_folder

HELD_OUT = 8  # every so manyth pair tells how good the map is


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


def train(arguments: argparse.Namespace) -> None:
    writable_folder(arguments.out.parent)
    (source, of_source), (target, of_target) = (
        read_set(path, name)
        for path, name in ((arguments.source, arguments.source_feature), (arguments.target, arguments.target_feature))
    )
    settings = {"paired": arguments.paired, "steps": arguments.steps, "seed": arguments.seed}
    metadata = {"source": of_source, "target": of_target, **settings, "counts": [len(source), len(target)]}
    a, b = torch.from_numpy(source), torch.from_numpy(target)
    if arguments.paired:
        if len(a) != len(b):
            raise UserError(f"--paired takes equally many features; got {len(a)} and {len(b)}.")
        held = torch.arange(len(a)) % HELD_OUT == HELD_OUT - 1
        model = fit_transport(a[~held], b[~held], device=pick_device(arguments.device), **settings)
        error, spread = (model.map(a[held]) - b[held]).square().mean(), (b[held] - b[~held].mean(0)).square().mean()
        metadata["held_out_error"] = float(error / spread)
        print(f"held-out pairs: {100 * float(error / spread):.0f}% of the variance is left unexplained")
    else:
        model = fit_transport(a, b, device=pick_device(arguments.device), **settings)
        mapped = model.map(a)
        gaps = [float((values.mean(0) - b.mean(0)).norm() / b.std(0).norm()) for values in (a, mapped)]
        metadata["mean_gap"] = gaps
        print(f"distance of the means, in standard deviations: {gaps[0]:.2f} before, {gaps[1]:.2f} after")
    save_transport(arguments.out, model, metadata)
    print(f"wrote {arguments.out}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.train_feature_map", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--source", type=Path, required=True, help="features of the source: a file, a store, a folder of stores")
    add("--target", type=Path, required=True, help="features of the target")
    add("--out", type=Path, required=True, help="folder to write")
    add("--source-feature", help="name of the source's feature, where a store has several")
    add("--target-feature", help="name of the target's")
    add("--paired", action="store_true", help="row i of both is the same place")
    add("--steps", type=int, default=2000, help="of training (2000)")
    add("--seed", type=int, default=0, help="of the training (0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(run_command(main))
