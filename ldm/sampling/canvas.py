"""Canvases: images of any size from grids of features, and the encoding and decoding of images of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.autoencoder.model import AttnBlock
from ldm.conditioners.compose import cells_of, keys_of, names_given
from ldm.conditioners.source_image import images_of, shown_in
from ldm.devices import send
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.fields import FeatureField
from ldm.diffusion.guidance import within
from ldm.diffusion.tiled import shifted, tiled
from ldm.errors import UserError
from ldm.images.write import to_uint8
from ldm.rng import canvas_noise
from ldm.sampling.calls import explained
from ldm.sampling.given import checked_settings, tensor_of
from ldm.sampling.local_norm import REACH, decode_tiles, local_group_norm, spans
from ldm.sampling.sampler import Sampler, Windows

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

DECODE_PART = 2048  # pixels along what is decoded in one piece
ATTENDED_PART = 512  # pixels, of first stages with attention
ENCODE_PART = 256  # latents along what is encoded in one piece


class Pixels(Protocol):
    """What takes an image part by part: (height, width, 3) uint8, as a memory map or a zarr array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __setitem__(self, place: tuple[slice, slice], values: np.ndarray) -> None: ...


@explained
@torch.no_grad()
def large_image(
    model: LatentDiffusion, features: Tensor | np.ndarray, size: tuple[int, int] | None = None,
    sampler: Sampler | None = None, windows: Windows | None = None, conditions: Mapping[str, Any] | None = None,
    background: Tensor | np.ndarray | None = None, out: Pixels | None = None,
) -> Tensor | Pixels:  # fmt: skip
    """An image of any size from a grid of SSL features: (1,3,height,width) in [-1,1] on the CPU.

    Args:
        features: (rows, cols, D): the entry at [row, col] conditions the image there. The first tile of the grid lies
            in the upper left corner, the last in the lower right. Rows of NaN are holes. Of a model that takes k x k
            features for a tile, each is of a tile's k-th part.
        size: (height, width) in pixels, multiples of the first stage's downsampling; by default adjoining tiles.
        sampler: how; by default `Sampler()`. windows: how the canvas is covered; by default `Windows()`.
        conditions: other conditions by name, the same everywhere: `{"class": "LUAD"}`. The image of a ControlNet,
            `{"control": layout}`, is of the whole canvas, (3,height,width) in [-1,1].
        background: (D,) what holes take; by default the nearest known feature.
        out: (height, width, 3) uint8, assigned to by slices: takes the image part by part as it is decoded, and is
            returned in its place.
    UserError: a grid, a size or settings that the model cannot have.

    >>> grid = torch.randn(2, 3, 8)
    >>> large_image(model, grid, sampler=Sampler(steps=2, progress=False)).shape
    torch.Size([1, 3, 32, 48])
    """
    windows = checked_settings(Windows, windows)
    sampler = checked_settings(Sampler, sampler).settled(model, "large_image")
    factor, window, tile = model.first_stage_model.downsampling, model.image_size, model.tile_size
    if isinstance(features, Mapping):
        raise UserError("a large image takes a grid of features, not a condition: ldm.large_image(model, grid)")
    features = tensor_of(features).float().cpu()
    if features.ndim != 3:
        raise UserError(f"a large image takes a grid of features (rows, cols, D); got shape {tuple(features.shape)}.")
    if model.cond_stage_model is None:
        raise UserError("the model is unconditional; a large image needs one conditioned on features.")
    cells = cells_of(model.cond_stage_model)
    height, width = size or (features.shape[0] * tile // cells, features.shape[1] * tile // cells)
    if height % factor or width % factor or min(height, width) < tile:
        raise UserError(
            f"the size must be at least one tile of {tile} px and a multiple of {factor} px; got {height}x{width}."
        )
    if windows.stride is not None and (windows.stride % factor or windows.stride > tile):
        raise UserError(f"a stride is a multiple of {factor} px up to {tile}; got {windows.stride}.")
    if out is not None and (tuple(out.shape) != (height, width, 3) or out.dtype != np.uint8):
        raise UserError(f"out must be ({height}, {width}, 3) uint8, as the image; got {tuple(out.shape)} {out.dtype}.")
    canvas = (height // factor, width // factor)
    if background is not None:
        background = torch.as_tensor(np.asarray(background), dtype=torch.float32)
    field = FeatureField(features, canvas, window, windows.interpolation, background, cells)
    target = sampler.classifier.target_of(model, [conditions or {}]) if sampler.classifier else {}
    sigmas = sampler.sigmas(model)
    led, conditions = _led(model, conditions or {}, (height, width))

    def condition(corners: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        own = model.condition(features=send(field.at(corners), model.device), **conditions)
        return own | {part: value.to(model.device).expand(len(corners)) for part, value in target.items()}

    def over_canvas(denoiser: Denoiser) -> Denoiser:
        if windows.mode == "overlap":
            stride = (windows.stride or tile // 4) // factor
            return tiled(denoiser, window, stride, condition, sampler.batch_size, model.device)
        moving = shifted(denoiser, window, condition, sampler.batch_size, sampler.seed, model.device)
        settled = tiled(denoiser, window, window // 2, condition, sampler.batch_size, model.device, blend="smooth")
        return within(settled, moving, 0.0, float(sigmas[-2]))  # nothing comes after the last step to even it out

    def noise(step: int) -> Tensor:
        return canvas_noise(sampler.seed, model.channels, *canvas, stream=step + 1)

    given = names_given(model.cond_stage_model, ["features", *conditions])
    solver = sampler.guided(model, given=given).over(over_canvas)
    home = torch.device("cpu") if windows.offload else model.device
    x = canvas_noise(sampler.seed, model.channels, *canvas).mul_(sigmas[0].cpu()).to(home)
    with tqdm(total=sampler.steps, desc="large image", unit="step", disable=not sampler.progress) as bar:
        x = solver.solve(x, sigmas, led, noise, lambda i, x, x0: bar.update())
    return decode_canvas(model, x, sampler.progress, out, sampler.decoder)


def _led(
    model: LatentDiffusion, given: Mapping[str, Any], size: tuple[int, int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The part of the condition that is an image of the whole canvas, if one is given, and what is given besides."""
    key = next((key for key in keys_of(model.cond_stage_model, "control") if key in given), None)
    if key is None:
        return {}, dict(given)
    image = images_of(given[key], f"the image of '{key}'")
    if tuple(image.shape) != (1, 3, *size):
        raise UserError(
            f"the image of '{key}' is as large as the canvas, (3, {size[0]}, {size[1]}); got {tuple(image.shape)}."
        )
    return shown(model, key, image), {name: value for name, value in given.items() if name != key}


def shown(model: LatentDiffusion, key: str, images: Tensor) -> dict[str, Tensor]:
    """Images (B,C,H,W) of any size as the part of a condition by which they act: as latents, where they do as those.

    >>> [*shown(model, "class", torch.zeros(1, 3, 16, 16))]
    ['class/concat']
    """
    told = shown_in(model.cond_stage_model, key, images)
    if not set(told) & set(model.cond_stage_model.encoded):
        return told
    latents = torch.cat([encode_images(model, image[None].to(model.device)) for image in images])
    return dict.fromkeys(told, latents)


def decode_canvas(
    model: LatentDiffusion, latents: Tensor, progress: bool = True, out: Pixels | None = None, decoder: str = "full"
) -> Tensor | Pixels:
    """The image of a canvas of scaled latents (1,C,h,w): at once if it is small, else in parts.

    Returns (1,3,H,W) in [-1,1] on the CPU; or `out`, an array (H,W,3) uint8 that can be assigned to by slices, where
    parts go as they are made, so that the image needs no memory. Latents may lie on the CPU while the model is on a
    GPU. A decoder with attention, which is quadratic in the canvas and was trained on tiles, decodes no more than
    512 px at once.

    >>> decode_canvas(model, torch.randn(1, 4, 16, 24), progress=False).shape
    torch.Size([1, 3, 32, 48])
    """
    own, latents = model.decoding(latents, decoder)
    factor = own.downsampling
    height, width = (side * factor for side in latents.shape[-2:])
    attends = has_attention(own)
    part = ATTENDED_PART if attends else DECODE_PART
    if height * width <= part**2:
        part = max(height, width)
    image = torch.empty(1, 3, height, width) if out is None else None
    total = -(-height // part) * -(-width // part)
    halo = model.image_size // 2 if attends else getattr(own, "reach", None)
    parts = decode_tiles(own, latents, model.image_size, max(part // factor, 1), halo)
    for rows, cols, decoded in tqdm(parts, desc="decode", total=total, disable=not progress or total == 1):
        if out is None:
            image[..., rows, cols] = decoded.clamp(-1, 1)
        else:
            out[rows, cols] = to_uint8(decoded)[0]
    return image if out is None else out


def encode_images(model: LatentDiffusion, images: Tensor) -> Tensor:
    """Scaled latents (B,C,h,w) of images (B,C,H,W) in [-1,1] of any size, those larger than a tile in parts.

    >>> encode_images(model, torch.zeros(1, 3, 32, 48)).shape
    torch.Size([1, 4, 16, 24])
    """
    first_stage, window = model.first_stage_model, model.image_size
    factor = first_stage.downsampling
    if factor == 1 or max(images.shape[-2:]) <= model.tile_size:
        return model.encode(images)
    part, halo = ENCODE_PART, window + REACH
    if has_attention(first_stage):
        part, halo = ATTENDED_PART // factor, window // 2
    down, across = (spans(side // factor, part, halo) for side in images.shape[-2:])
    latents = images.new_empty(len(images), model.channels, *(side // factor for side in images.shape[-2:]))
    for rows, cols in product(down, across):
        seen = images[..., _times(rows.window, factor), _times(cols.window, factor)]
        with local_group_norm(first_stage, model.tile_size, seen.shape[-1]):
            made = model.encode(seen)
        latents[..., rows.tile, cols.tile] = made[..., rows.inside(), cols.inside()]
    return latents


def decode_latents(model: LatentDiffusion, latents: Tensor, decoder: str = "full") -> Tensor:
    """Images (B,C,H,W) of scaled latents (B,C,h,w) of any size, where the latents are.

    >>> decode_latents(model, torch.randn(2, 4, 16, 24)).shape
    torch.Size([2, 3, 32, 48])
    """
    if model.first_stage_model.downsampling == 1 or max(latents.shape[-2:]) <= model.image_size:
        return model.decode(latents, decoder)
    return torch.cat([decode_canvas(model, z[None], False, decoder=decoder) for z in latents]).to(latents)


def has_attention(first_stage: nn.Module) -> bool:
    """Whether a first stage attends over its whole input, which is quadratic in the canvas.

    >>> has_attention(model.first_stage_model)
    False
    """
    return any(isinstance(layer, AttnBlock) for layer in first_stage.modules())


def _times(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)
