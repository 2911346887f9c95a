r"""Write the latents of every tile into its tile store, by a trained first stage.

Each store gets latents/<name> (N,C,h,w) float16 in the first stage's own units (the mode of its posterior), or with
--dihedral (N,8,C,h,w), the latents of the tile's eight rotations and flips: a flipped latent is not the latent of the
flipped tile. Attributes record the SHA-256 of the weights, the shape, and the scale_factor 1/std that brings the
store's latents to unit variance. When a run was interrupted, the same command goes on where it stopped; finished arrays
are left as they are.

Examples:

    python -m data_prep.encode_latents --store cohort \
        --first-stage models/vq-f4
    python -m data_prep.encode_latents --store cohort \
        --first-stage models/vq-f4 --dihedral --name vq-f4-turned
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tqdm import tqdm

from data_prep.batches import in_order, read_batches
from data_prep.extract_features import each_variant
from data_prep.options import (
    BatchOption,
    DeviceOption,
    Precision,
    PrecisionOption,
    StoreOption,
    inputs,
    number,
    output,
    taken,
)
from ldm.cli.script import script
from ldm.data import dihedral
from ldm.data.extent import scale_differs, tell
from ldm.data.store_writers import ArrayWriter
from ldm.data.stored_array import StoredArray
from ldm.data.tile_store import TileStore, open_cohort
from ldm.devices import pick_device
from ldm.errors import UserError
from ldm.files import sha256

if TYPE_CHECKING:
    from torch import nn


def moments(array: StoredArray) -> tuple[int, float, float]:
    """Count, mean and mean square of all values of an array, read shard by shard."""
    step = (array.shards or array.chunks)[0]
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, array.shape[0], step):
        values = np.asarray(array[start : start + step], dtype=np.float32)
        count += values.size
        total += float(values.sum(dtype=np.float64))
        squares += float(np.square(values).sum(dtype=np.float64))
    return count, total / count, squares / count


def spread(parts: Sequence[tuple[int, float, float]]) -> float:
    """Standard deviation of the union of arrays whose `moments` are given."""
    counts, means, squares = map(np.asarray, zip(*parts))
    mean = np.average(means, weights=counts)
    return float(np.sqrt(max(np.average(squares, weights=counts) - mean**2, 0)))


def encode_latents(
    stores: Sequence[TileStore],
    first_stage_folder: Path | str,
    name: str | None = None,
    with_dihedral: bool = False,
    batch_size: int = 16,
    device: str = "auto",
    precision: str = "fp32",
    first_stage: nn.Module | None = None,
) -> tuple[str, float]:
    """Write `latents/<name>` into the stores. Returns the name and scale_factor = 1/std over all of them.

    Args:
        stores: finished tile stores.
        first_stage_folder: model folder of the first stage.
        name: of the latents; None is the folder's name.
        with_dihedral: all eight orientations, for training with turned and flipped tiles.
        precision: fp32, bf16 or fp16, of the first stage's own arithmetic.
        first_stage: that of the folder, where it is loaded already.
    Raises:
        UserError: no model folder, tiles that the first stage cannot halve often enough, latents made otherwise before,
            values beyond float16.
    """
    import torch

    from ldm.model_folder import load_first_stage, read_model_folder

    folder = Path(first_stage_folder)
    name = name or folder.resolve().name
    device = pick_device(device)
    if batch_size < 1:
        raise UserError(f"a batch has at least 1 tile; got a batch size of {batch_size}")
    first_stage = load_first_stage(str(folder)) if first_stage is None else first_stage
    first_stage = first_stage.to(device, memory_format=torch.channels_last)
    factor = first_stage.downsampling
    for store in stores:
        if store.tile_size % factor:
            raise UserError(
                f"{store.path} has tiles of {store.tile_size} px; first stage {folder} takes multiples of {factor} px"
            )
    _, trained = read_model_folder(folder)
    tell([scale_differs({str(store.path): store.mpp for store in stores}, trained, str(folder))])
    attrs = latent_attrs(folder, first_stage, with_dihedral, precision)
    measured = []
    with tqdm(total=sum(map(len, stores)), desc=f"latents {name}", unit="tile") as bar:
        for store in stores:
            side = store.tile_size // factor
            shape = (*((dihedral.COUNT,) if with_dihedral else ()), first_stage.channels, side, side)
            with ArrayWriter(store.path, f"latents/{name}", shape, "f2", attrs) as writer:
                bar.update(writer.rows)
                rows_of = partial(latent_rows, first_stage, with_dihedral, device, precision, where=store.path)
                for rows in in_order(rows_of, read_batches(store, writer.rows, batch_size), device):
                    writer.append(rows)
                    bar.update(len(rows))
                if not writer.finished:
                    part = moments(writer.flush())
                    writer.add_attrs(std=spread([part]), scale_factor=1 / max(spread([part]), 1e-8))
                else:
                    part = moments(store.latents(name))
            measured.append(part)
    return name, 1 / max(spread(measured), 1e-8)


def latent_rows(
    first_stage: nn.Module,
    with_dihedral: bool,
    device: str,
    precision: str,
    tiles: np.ndarray,
    where: Path | str = "these tiles",
) -> np.ndarray:
    """Latents (B,C,h,w) or (B,8,C,h,w) float16 of tiles (B,T,T,3) uint8. UserError, `where`: beyond float16."""
    variants = dihedral.COUNT if with_dihedral else 1
    rows = each_variant(first_stage.latent, tiles, device, precision, variants).astype(np.float16)
    if not np.isfinite(rows).all():
        raise UserError(f"float16 cannot hold the latents that the first stage gives in {where}")
    return rows


def latent_attrs(folder: Path, first_stage: nn.Module, with_dihedral: bool, precision: str) -> dict[str, Any]:
    """What a latent array says of itself."""
    return {
        "first_stage": folder.resolve().name,
        "weights_sha256": sha256(folder / "model.safetensors"),
        "channels": first_stage.channels,
        "downsampling": first_stage.downsampling,
        "dihedral": with_dihedral,
        "precision": precision,
    }


@script("data_prep.encode_latents", __doc__)
def main(
    store: StoreOption,
    first_stage: Annotated[Path, inputs("--first-stage", help="Model folder of the first stage.")],
    name: Annotated[
        str | None, output("--name", help="Name of the latents in the stores (default: that of the model folder).")
    ] = None,
    dihedral: Annotated[
        bool, taken("--dihedral", help="Write the latents of all eight rotations and flips of each tile.")
    ] = False,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    stores = open_cohort(store)
    name, scale = encode_latents(stores, first_stage, name, dihedral, batch_size, device, precision.value)
    tiles = sum(map(len, stores))
    print(f"latents/{name} of {tiles} tiles in {number(len(stores), 'store')}; scale_factor 1/std = {scale:.5f}")


if __name__ == "__main__":
    main.run()
