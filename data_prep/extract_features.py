r"""Write the features of every tile into its tile store, by a published encoder, an encoder folder or a timm model.

Each store gets features/<encoder> (N,D) float16, or with --dihedral (N,8,D), the features of the tile's eight rotations
and flips; with --tokens 4 also features/<encoder>-tokens4 (N,16,C), or (N,8,16,C), the means of the patch tokens in
4 x 4 parts of the tile. Attributes record encoder, licence, SHA-256 of the weights and preprocessing. Nothing is
downloaded. When a run was interrupted, the same command goes on where it stopped; finished arrays are left as they are.

Examples:

    python -m data_prep.extract_features --store cohort \
        --encoder hipt-vits16 --weights vit256_small_dino.pth
    python -m data_prep.extract_features --store cohort/slides/a.zarr \
        --encoder data/models/demo-encoder --dihedral
    python -m data_prep.extract_features --store cohort \
        --encoder timm:resnet50 --weights resnet50.safetensors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tqdm import tqdm

from data_prep.batches import in_order, read_batches
from data_prep.encoder_facts import tell_terms
from data_prep.options import (
    DeviceOption,
    FeatureBatchOption,
    Precision,
    PrecisionOption,
    StoreOption,
    TokensOption,
    WeightsOption,
    inputs,
    number,
    output,
    taken,
)
from ldm.cli.script import script
from ldm.data import dihedral
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore, open_cohort
from ldm.devices import pick_device
from ldm.encoders.registry import REGISTRY
from ldm.encoders.spec import EncoderSpec
from ldm.errors import UserError, note
from ldm.files import sha256

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm.encoders.encoder import Encoder
    from ldm.encoders.own import OwnEncoder


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


def feature_attrs(encoder: Encoder | OwnEncoder, licence: str = "") -> dict[str, Any]:
    """What a feature array says of its encoder."""
    from ldm.encoders.own import state_sha256

    if not hasattr(encoder, "spec"):
        return encoder.about(licence)
    spec, path = encoder.spec, encoder.weights_path
    names = ("licence", "non_commercial", "source", "mpp", "tile_size")
    about = {"encoder": spec.name, **{name: getattr(spec, name) for name in names}}
    about["weights_sha256"] = sha256(path) if path else state_sha256(encoder)
    return about | {"preprocessing": spec.preprocessing()}


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
    several = np.repeat(tiles, 2, axis=0) if len(tiles) == 1 else tiles  # one image alone takes other kernels on a CPU
    images = torch.from_numpy(several).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)  # (B,3,T,T)
    with torch.inference_mode(), torch.autocast(torch.device(device).type, kind, enabled=autocast):
        turned = (dihedral.apply(images, k).contiguous(memory_format=torch.channels_last) for k in range(variants))
        parts = [network(x).float().cpu()[: len(tiles)] for x in turned]
    return (torch.stack(parts, 1) if variants > 1 else parts[0]).numpy()


def check_encoder(encoder: str | Path, weights: str | Path | None = None) -> None:
    """UserError unless an encoder that is given by name is known and its weights are there.

    >>> check_encoder(models / "demo-encoder")
    """
    from ldm.encoders.encoder import find_encoder
    from ldm.encoders.own import TIMM, timm_model

    if str(encoder).startswith(TIMM):
        timm_model(str(encoder).removeprefix(TIMM), weights)
    else:
        find_encoder(encoder, weights)


def resolve(
    encoder: str | Path | Callable[[Tensor], Tensor],
    weights: str | Path | None = None,
    name: str | None = None,
    transform: Callable[[Image], Tensor] | None = None,
    device: str = "cpu",
) -> Encoder | OwnEncoder:
    """The encoder that `extract` is asked for, on a device: by name, an encoder folder, `timm:<model>`, or one's own.

    >>> resolve(lambda images: images.mean((2, 3)), name="colours").name
    'colours'
    """
    import torch

    from ldm.encoders.encoder import Encoder, load_encoder
    from ldm.encoders.own import TIMM, OwnEncoder, timm_model

    if isinstance(encoder, (str, Path)):
        if transform is not None:
            raise UserError(f"encoder '{encoder}' has its own transform; transform= goes with a model or a callable")
        if str(encoder).startswith(TIMM):
            arch = str(encoder).removeprefix(TIMM)
            return OwnEncoder(timm_model(arch, weights), name or arch, None, device)
        encoder, weights = load_encoder(encoder, weights, device), None
    if weights is not None:
        raise UserError("weights= is the file of an encoder that is given by name; load those of your own yourself")
    if isinstance(encoder, Encoder):
        return encoder.to(device, memory_format=torch.channels_last)
    if isinstance(encoder, OwnEncoder):
        return encoder
    if not callable(encoder):
        raise UserError(f"an encoder is a name, a folder, a timm model or a callable; got {type(encoder).__name__}")
    if not name:
        raise UserError("give the features of your own encoder a name, as name='my-encoder'")
    return OwnEncoder(encoder, name, transform, device)


def extract(
    stores: Sequence[TileStore],
    encoder: str | Path | Callable[[Tensor], Tensor],
    weights: str | Path | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    with_dihedral: bool = False,
    any_mpp: bool = False,
    tokens: int = 0,
    name: str | None = None,
    transform: Callable[[Image], Tensor] | None = None,
    licence: str = "",
) -> str:
    """Write `features/<name>` into stores; everything is checked first. Returns the name.

    Args:
        stores: finished tile stores.
        encoder: the name of a published encoder, an encoder folder, `timm:<model>` with `weights`; or one's own: a timm
            model, or any callable that makes features (B,D) of images, with its `transform`.
        weights: file of the weights of an encoder that is given by name; None looks in its usual place.
        batch_size: tiles per call of the network, counted before turning; None is 64 on a GPU and 8 on a CPU.
        precision: of the network's arithmetic, fp32, bf16 or fp16.
        with_dihedral: features of all eight rotations and flips of each tile.
        any_mpp: take tiles of another resolution than the encoder was made for.
        tokens: beside the features write `features/<name>-tokens<K>` (N,K*K,C), the mean of the patch tokens in each of
            K x K parts of the tile, row by row; 0 writes none.
        name: of the features; None is the encoder's. One's own encoder needs one.
        transform: makes the input of one's own encoder of a Pillow picture, as torchvision's do; None is that of a timm
            model's weights, and of a callable none: it gets images (B,3,H,W) in [-1, 1].
        licence: of the encoder, recorded with the features, where it is not known.
    Raises:
        UserError: unknown encoder, missing weights, a store of another resolution, features made otherwise before,
            values beyond float16, an encoder that gives no feature for each image.

    >>> own = lambda images: torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)
    >>> extract([writable], own, name="colours", licence="CC0")
    'colours'
    >>> writable.features("colours").shape
    (88, 6)
    """
    device = pick_device(device)
    batch_size = usual_batch(device) if batch_size is None else batch_size
    if batch_size < 1:
        raise UserError(f"a batch has at least 1 tile; got a batch size of {batch_size}")
    network = resolve(encoder, weights, name, transform, device)
    spec = getattr(network, "spec", None)
    for store in stores if spec is not None and not any_mpp else ():
        check_resolution(store, spec)
    name = name or network.name
    if spec is not None and licence:
        raise UserError(
            f"the licence of encoder '{spec.name}' is known, {spec.licence}; leave out --licence (licence=), which is "
            "for encoders that are not known by name"
        )
    if spec is not None and spec.non_commercial:
        tell_terms(spec.name, spec.licence)
    elif spec is None and not licence:
        note(f"the licence of encoder '{name}' is not known; record it by --licence (licence=)")
    made = FeatureRows(network, name, tokens, with_dihedral, stores[0].tile_size, device, precision)
    attrs = feature_attrs(network, licence)
    with tqdm(total=sum(map(len, stores)), desc=f"features {name}", unit="tile") as bar:
        for store in stores:
            with ExitStack() as stack:
                writers = [
                    stack.enter_context(ArrayWriter(store.path, array, shape, "f2", attrs | made.attrs[array]))
                    for array, shape in made.shapes.items()
                ]
                start = min(writer.rows for writer in writers)
                bar.update(start)
                batches = in_order(
                    partial(made, where=store.path), read_batches(store, start, batch_size), device, alone=spec is None
                )
                for first, rows in zip(count(start, batch_size), batches):
                    for writer, part in zip(writers, rows.values()):
                        if len(new := part[max(0, writer.rows - first) :]):  # one array may be further than the other
                            writer.append(new)
                    bar.update(len(part))
    return name


class FeatureRows:
    """What an encoder makes of tiles: rows of one array, or of two where it gives patch tokens too.

    Attributes:
        shapes: name of the array -> shape of a row. attrs: name -> what the array says beside `feature_attrs`.

    >>> own = resolve(lambda images: images.mean((2, 3)), name="colours")
    >>> made = FeatureRows(own, "colours", 0, True, 256, "cpu", "fp32")
    >>> made.shapes, made(tile[None])["features/colours"].shape
    ({'features/colours': (8, 3)}, (1, 8, 3))
    """

    def __init__(
        self,
        network: Encoder | OwnEncoder,
        name: str,
        tokens: int,
        with_dihedral: bool,
        tile_size: int,
        device: str,
        precision: str,
    ) -> None:
        import torch

        self._network, self._name, self._tokens = network, name, tokens
        self._device, self._precision = device, precision
        with torch.inference_mode():  # one tile tells the widths
            probe = torch.zeros(1, 3, tile_size, tile_size, device=device)
            found = network.with_tokens(probe, tokens) if tokens else (network(probe),)
        self._variants = dihedral.COUNT if with_dihedral else 1
        turned = (self._variants,) if with_dihedral else ()
        self._parts = {f"features/{name}": found[0].shape[1:]}
        self.attrs = {f"features/{name}": {"dihedral": with_dihedral, "dim": found[0].shape[1]}}
        if tokens:
            self._parts[f"features/{name}-tokens{tokens}"] = found[1].shape[1:]
            about = {"dihedral": with_dihedral, "dim": found[1].shape[2], "tokens": tokens}
            self.attrs[f"features/{name}-tokens{tokens}"] = about
        self.shapes = {array: (*turned, *shape) for array, shape in self._parts.items()}

    def _call(self, images: Tensor) -> Tensor:
        import torch

        if not self._tokens:
            return self._network(images)
        features, parts = self._network.with_tokens(images, self._tokens)
        return torch.cat([features, parts.flatten(1)], 1)

    def __call__(self, tiles: np.ndarray, where: Path | str = "these tiles") -> dict[str, np.ndarray]:
        """Rows of each array, of tiles (B,T,T,3) uint8. UserError, which says `where`: beyond float16."""
        rows = each_variant(self._call, tiles, self._device, self._precision, self._variants).astype(np.float16)
        if not np.isfinite(rows).all():
            raise UserError(
                f"encoder '{self._name}' gives values that float16 cannot hold in {where}; try --precision fp32"
            )
        widths = [math.prod(shape) for shape in self._parts.values()]
        split = zip(self._parts.items(), np.split(rows, np.cumsum(widths)[:-1], axis=-1))
        return {array: part.reshape(*part.shape[:-1], *shape) for (array, shape), part in split}


def usual_batch(device: str) -> int:
    """Tiles per call of a network where nobody says: as many as keep a GPU busy; on a CPU few, which its caches hold.

    >>> usual_batch("cuda:0"), usual_batch("cpu")
    (64, 8)
    """
    return 8 if device == "cpu" else 64


@script("data_prep.extract_features", __doc__, f"Published encoders: {', '.join(sorted(REGISTRY))}.")
def main(
    store: StoreOption,
    encoder: Annotated[
        str,
        inputs(
            "--encoder",
            help="Encoder: the name of a published one, an encoder folder, or timm:<model> with --weights.",
        ),
    ],
    weights: WeightsOption = None,
    licence: Annotated[
        str, inputs("--licence", help="Licence of an encoder that is not known by name, recorded with its features.")
    ] = "",
    name: Annotated[
        str | None, output("--name", help="Name of the features in the stores (default: that of the encoder).")
    ] = None,
    tokens: TokensOption = 0,
    dihedral: Annotated[
        bool, taken("--dihedral", help="Write the features of all eight rotations and flips of each tile.")
    ] = False,
    any_mpp: Annotated[
        bool, taken("--any-mpp", help="Take tiles of another resolution than the encoder was made for.")
    ] = False,
    batch_size: FeatureBatchOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    stores = open_cohort(store)
    name = extract(
        stores, encoder, weights, batch_size, device, precision.value, dihedral, any_mpp, tokens, name, licence=licence
    )
    beside = f" and features/{name}-tokens{tokens}" if tokens else ""
    print(f"features/{name}{beside} of {sum(map(len, stores))} tiles in {number(len(stores), 'store')}")


if __name__ == "__main__":
    main.run()
