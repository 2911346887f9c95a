r"""Write the features of every tile into its tile store, by a published encoder or an encoder folder.

Each store gets features/<encoder> (N,D) float16, or with --dihedral (N,8,D), the features of the tile's eight rotations
and flips. Its attributes record encoder, licence, SHA-256 of the weights and preprocessing. Nothing is downloaded. When
a run was interrupted, the same command goes on where it stopped; finished arrays are left as they are.

Examples:

    python -m data_prep.extract_features --store cohort \
        --encoder hipt-vits16 --weights vit256_small_dino.pth
    python -m data_prep.extract_features --store cohort/slides/a.zarr \
        --encoder data/models/demo-encoder --dihedral
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tqdm import tqdm

from data_prep.options import (
    BatchOption,
    DeviceOption,
    Precision,
    PrecisionOption,
    StoreOption,
    WeightsOption,
    inputs,
    number,
    taken,
)
from ldm.cli.script import script
from ldm.data import dihedral
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore, open_cohort
from ldm.devices import pick_device
from ldm.encoders.registry import REGISTRY, EncoderSpec
from ldm.errors import UserError
from ldm.files import sha256

if TYPE_CHECKING:
    from torch import Tensor


FAR = 0.15  # relative difference of resolution that an encoder is trusted with


def check_resolution(store: TileStore, spec: EncoderSpec) -> None:
    """UserError if the store's tiles, resized to the encoder's input, are more than 15% off its µm per pixel."""
    if spec.mpp is None:
        return
    given, meant = store.mpp * store.tile_size, spec.mpp * spec.tile_size  # µm, for the same input size
    if abs(given / meant - 1) > FAR:
        raise UserError(
            f"{store.path}: tiles of {store.tile_size} px at {store.mpp:.3g} µm per px cover {given:.0f} µm, but "
            f"encoder '{spec.name}' was made for {spec.tile_size} px at {spec.mpp:.3g} µm per px, {meant:.0f} µm. Tile "
            "the slide at that resolution (data_prep.tile_slides --mpp), or give --any-mpp if this is what you want."
        )


def feature_attrs(spec: EncoderSpec, weights: Path) -> dict[str, Any]:
    """What a feature array says of itself."""
    names = ("dim", "licence", "non_commercial", "source", "mpp", "tile_size")
    about = {"encoder": spec.name, **{name: getattr(spec, name) for name in names}}
    return about | {"weights_sha256": sha256(weights), "preprocessing": spec.preprocessing()}


def read_batches(store: TileStore, start: int, batch_size: int) -> Iterator[np.ndarray]:
    """Tiles from row `start` on, (B,T,T,3) uint8, the next batch being read while one is used."""
    ranges = [(first, min(first + batch_size, len(store))) for first in range(start, len(store), batch_size)]
    with ThreadPoolExecutor(1) as reader:
        pending = None
        for first, last in ranges:
            following = reader.submit(lambda first=first, last=last: np.asarray(store.tiles[first:last]))
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def each_variant(
    network: Callable[[Tensor], Tensor], tiles: np.ndarray, device: str, precision: str, variants: int
) -> np.ndarray:
    """What a network makes of tiles (B,T,T,3) uint8, (B,...) float32, or of their first dihedral variants, (B,V,...).

    network: images (B,3,T,T) in [-1, 1] -> (B,...). precision: of its arithmetic, fp32, bf16 or fp16.

    >>> tiles = np.zeros((2, 8, 8, 3), np.uint8)
    >>> each_variant(lambda images: images.mean((2, 3)), tiles, "cpu", "fp32", variants=8).shape
    (2, 8, 3)
    """
    import torch

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    kind, autocast = kinds[precision], precision != "fp32"
    images = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)  # (B,3,T,T)
    with torch.inference_mode(), torch.autocast(torch.device(device).type, kind, enabled=autocast):
        turned = (dihedral.apply(images, k).contiguous(memory_format=torch.channels_last) for k in range(variants))
        parts = [network(x).float().cpu() for x in turned]
    return (torch.stack(parts, 1) if variants > 1 else parts[0]).numpy()


def extract(
    stores: list[TileStore],
    encoder_name: str | Path,
    weights: Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "fp32",
    with_dihedral: bool = False,
    any_mpp: bool = False,
) -> str:
    """Write `features/<encoder>` into the stores; everything is checked first. Returns the encoder's name.

    Raises UserError: unknown encoder, missing weights, a store of another resolution, features made otherwise before.
    """
    import torch

    from ldm.encoders.encoder import find_encoder, load_encoder

    device = pick_device(device)
    if batch_size < 1:
        raise UserError(f"a batch has at least 1 tile; got a batch size of {batch_size}")
    spec, _ = find_encoder(encoder_name, weights)
    for store in stores:
        if not any_mpp:
            check_resolution(store, spec)
    encoder = load_encoder(encoder_name, weights, device)
    encoder = encoder.to(memory_format=torch.channels_last)
    if spec.non_commercial:
        print(
            f"note: encoder '{spec.name}' is licensed for non-commercial use ({spec.licence}); so are its features "
            "and the models conditioned on them. The licence is recorded in the store.",
            file=sys.stderr,
        )
    attrs = feature_attrs(spec, encoder.weights_path) | {"dihedral": with_dihedral}
    variants = dihedral.COUNT if with_dihedral else 1
    shape = (variants, spec.dim) if with_dihedral else (spec.dim,)
    with tqdm(total=sum(map(len, stores)), desc=f"features {spec.name}", unit="tile") as bar:
        for store in stores:
            with ArrayWriter(store.path, f"features/{spec.name}", shape, "f2", attrs) as writer:
                bar.update(writer.rows)
                for tiles in read_batches(store, writer.rows, batch_size):
                    rows = each_variant(encoder, tiles, device, precision, variants).astype(np.float16)
                    if not np.isfinite(rows).all():
                        raise UserError(
                            f"encoder '{spec.name}' gives values that float16 cannot hold in {store.path}; "
                            "try --precision fp32"
                        )
                    writer.append(rows)
                    bar.update(len(rows))
    return spec.name


@script("data_prep.extract_features", __doc__, f"Published encoders: {', '.join(sorted(REGISTRY))}.")
def main(
    store: StoreOption,
    encoder: Annotated[str, inputs("--encoder", help="Encoder: the name of a published one, or an encoder folder.")],
    weights: WeightsOption = None,
    dihedral: Annotated[
        bool, taken("--dihedral", help="Write the features of all eight rotations and flips of each tile.")
    ] = False,
    any_mpp: Annotated[
        bool, taken("--any-mpp", help="Take tiles of another resolution than the encoder was made for.")
    ] = False,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    stores = open_cohort(store)
    name = extract(stores, encoder, weights, batch_size, device, precision.value, dihedral, any_mpp)
    print(f"features/{name} of {sum(map(len, stores))} tiles in {number(len(stores), 'store')}")


if __name__ == "__main__":
    main.run()
