"""Canvases: images of any size from grids of features, and the encoding and decoding of images of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from ldm.diffusion.fields import FeatureField, LayoutField
from ldm.diffusion.overview import Overview
from ldm.diffusion.tiled import Cover, covered, drawn_cover, fixed_cover
from ldm.errors import UserError
from ldm.images.write import to_uint8
from ldm.rng import canvas_noise
from ldm.sampling.calls import explained
from ldm.sampling.given import checked_settings, tensor_of
from ldm.sampling.local_norm import REACH, Span, decode_tiles, local_group_norm, spans
from ldm.sampling.overviews import laid, reading_of
from ldm.sampling.sampler import Sampler, Windows

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion
    from ldm.sampling.guided import GuidedSolver
    from ldm.sampling.students import PolicySolver

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
    overview: Tensor | np.ndarray | None = None,
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
        overview: (3,h,w) in [-1,1], the whole image at a lower magnification, which it is to agree with; as far as
            `windows.overview_strength` says. See `ldm.diffusion.overview`.
    UserError: a grid, a size, an overview or settings that the model cannot have.

    >>> grid = torch.randn(2, 3, 8)
    >>> large_image(model, grid, sampler=Sampler(steps=2, progress=False)).shape
    torch.Size([1, 3, 32, 48])
    """
    canvas = Canvas.of(model, features, size, sampler, windows, conditions, background, overview)
    size = tuple(side * model.first_stage_model.downsampling for side in canvas.size)
    if out is not None and (tuple(out.shape) != (*size, 3) or out.dtype != np.uint8):
        got = f"{tuple(out.shape)} {out.dtype}"
        raise UserError(f"out must be ({size[0]}, {size[1]}, 3) uint8, as the image; got {got}.")
    sampler = canvas.sampler

    def over_canvas(denoiser: Denoiser) -> Denoiser:
        return covered(denoiser, canvas.covering, canvas.condition, sampler.batch_size, model.device)

    home = torch.device("cpu") if canvas.windows.offload else model.device
    x, sigmas = canvas.start(0, canvas.size[0]).to(home), canvas.sigmas
    with tqdm(total=sampler.steps, desc="large image", unit="step", disable=not sampler.progress) as bar:
        solver = canvas.solver.over(over_canvas)
        if canvas.overview is not None:
            solver = solver.shifted(canvas.overview.by(reading_of(canvas)).shift)
        x = solver.solve(x, sigmas, canvas.led, canvas.noise, lambda i, x, x0: bar.update())
    return decode_canvas(model, x, sampler.progress, out, sampler.decoder)


@dataclass(frozen=True)
class Canvas:
    """What a large image is made from: the noise it begins with, its windows, what conditions them, and the solver.

    Everything of a place is a function of that place, so that a canvas can be made in parts, in any order.

    Attributes:
        size: (height, width) in latents. sampler, windows: settled. sigmas: noise levels (N+1,).
        solver: of windows. field: the features, or what of `table` holds, by place. conditions: others, the same
            everywhere. led: the part of the condition that is an image of the whole canvas. overview: what it is to
            agree with, yet without its reading (`overviews.reading_of`).
    """

    model: LatentDiffusion
    size: tuple[int, int]
    sampler: Sampler
    windows: Windows
    sigmas: Tensor
    solver: GuidedSolver | PolicySolver
    field: FeatureField | LayoutField
    conditions: Mapping[str, Any]
    led: Mapping[str, Tensor]
    table: Mapping[str, Tensor] = field(default_factory=dict)
    overview: Overview | None = None

    @classmethod
    def of(
        cls, model: LatentDiffusion, features: Tensor | np.ndarray, size: tuple[int, int] | None = None,
        sampler: Sampler | None = None, windows: Windows | None = None, conditions: Mapping[str, Any] | None = None,
        background: Tensor | np.ndarray | None = None, overview: Tensor | np.ndarray | None = None,
    ) -> Canvas:  # fmt: skip
        """A canvas of what `large_image` takes. UserError: a grid, a size or settings that the model cannot have.

        >>> Canvas.of(model, torch.randn(2, 3, 8)).size
        (16, 24)
        """
        if isinstance(features, Mapping):
            raise UserError("a large image takes a grid of features, not a condition: ldm.large_image(model, grid)")
        features = tensor_of(features).float().cpu()
        if features.ndim != 3:
            told = f"a large image takes a grid of features (rows, cols, D); got shape {tuple(features.shape)}."
            raise UserError(told)
        if model.cond_stage_model is None:
            raise UserError("the model is unconditional; a large image needs one conditioned on features.")
        cells = cells_of(model.cond_stage_model)
        size = size or tuple(side * model.tile_size // cells for side in features.shape[:2])
        if background is not None:
            background = torch.as_tensor(np.asarray(background), dtype=torch.float32)

        def spread(canvas: tuple[int, int], windows: Windows) -> FeatureField:
            return FeatureField(features, canvas, model.image_size, windows.interpolation, background, cells)

        return cls._of(model, size, sampler, windows, conditions or {}, ["features"], spread, overview)

    @classmethod
    def of_layout(
        cls, model: LatentDiffusion, layout: np.ndarray, values: Mapping[str, Sequence[Any]],
        size: tuple[int, int] | None = None, sampler: Sampler | None = None, windows: Windows | None = None,
        conditions: Mapping[str, Any] | None = None, overview: Tensor | np.ndarray | None = None,
    ) -> Canvas:  # fmt: skip
        """A canvas of a layout of conditions.

        Args:
            layout: (rows, cols), which of the values is there, -1 where nothing is. values: by name, as many of each.
            size: (height, width) in pixels; by default a tile for each cell. The rest as of `large_image`.
        UserError: conditions, a size or settings that the model cannot have.

        >>> canvas = Canvas.of_layout(model, np.array([[0, 1]]), {"class": ["A", "B"]})
        >>> canvas.size, canvas.condition([(0, 0), (0, 8)])["class/vector"].shape
        ((8, 16), torch.Size([2, 32]))
        """
        conditions, cells = conditions or {}, torch.as_tensor(layout)
        size = size or tuple(side * model.tile_size for side in layout.shape)
        made = cls._of(
            model, size, sampler, windows, conditions, [*values],
            lambda canvas, windows: LayoutField(cells, canvas, model.image_size), overview,
        )  # fmt: skip
        return replace(made, table=model.condition(**values, **made.conditions))

    @classmethod
    def _of(
        cls, model: LatentDiffusion, size: tuple[int, int], sampler: Sampler | None, windows: Windows | None,
        conditions: Mapping[str, Any], names: Sequence[str],
        spread: Callable[[tuple[int, int], Windows], FeatureField | LayoutField],
        overview: Tensor | np.ndarray | None,
    ) -> Canvas:  # fmt: skip
        """A canvas of size (height, width) in pixels. spread: its field, and names: of what that tells."""
        windows = checked_settings(Windows, windows)
        sampler = checked_settings(Sampler, sampler).settled(model, "large_image")
        factor, tile, (height, width) = model.first_stage_model.downsampling, model.tile_size, size
        if height % factor or width % factor or min(height, width) < tile:
            raise UserError(
                f"the size must be at least one tile of {tile} px and a multiple of {factor} px; got {height}x{width}."
            )
        if windows.stride is not None and (windows.stride % factor or windows.stride > tile):
            raise UserError(f"a stride is a multiple of {factor} px up to {tile}; got {windows.stride}.")
        canvas = (height // factor, width // factor)
        own = spread(canvas, windows)
        target = sampler.classifier.target_of(model, [conditions]) if sampler.classifier else {}
        led, others = _led(model, conditions, (height, width))
        solver = sampler.guided(model, given=names_given(model.cond_stage_model, [*names, *others]))
        made = cls(model, canvas, sampler, windows, sampler.sigmas(model), solver, own, others, led | target)
        if overview is None:
            return made
        strength = windows.overview_strength
        return replace(made, overview=laid(overview, canvas, factor, own, model.image_size, strength))

    def condition(self, corners: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The condition of windows at corners (row, col), in latents, but for `led`."""
        told = self.field.at(corners)
        if self.table:
            return {part: value[told.to(value.device)] for part, value in self.table.items()}
        return self.model.condition(features=send(told, self.model.device), **self.conditions)

    def covering(self, size: tuple[int, int], sigma: float) -> Cover:
        """The windows at a noise level, with which a step begins."""
        window, factor = self.model.image_size, self.model.first_stage_model.downsampling
        if self.windows.mode == "overlap":
            return fixed_cover(size, window, (self.windows.stride or self.model.tile_size // 4) // factor)
        if 0 < sigma <= float(self.sigmas[-2]):  # nothing comes after the last step to even it out
            return fixed_cover(size, window, window // 2, "smooth")
        return drawn_cover(size, window, self.sampler.seed, sigma)

    def bare(self, corners: Sequence[tuple[int, int]]) -> list[bool]:
        """Which windows at corners (row, col) lie in holes of the grid alone."""
        return self.field.bare(corners)

    def start(self, top: int, rows: int) -> Tensor:
        """x (1,C,rows,width) at the first noise level, of the rows from `top` on."""
        own = canvas_noise(self.sampler.seed, self.model.channels, rows, self.size[1], top=top)
        return own.mul_(self.sigmas[0].cpu())

    def noise(self, step: int, top: int = 0, rows: int | None = None) -> Tensor:
        """What a step of a solver adds, of all rows or of some."""
        rows = self.size[0] if rows is None else rows
        return canvas_noise(self.sampler.seed, self.model.channels, rows, self.size[1], step + 1, top=top)


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
    part, halo = decoded_at_once(own, model.image_size)
    if height * width <= part**2:
        part = max(height, width)
    image = torch.empty(1, 3, height, width) if out is None else None
    total = -(-height // part) * -(-width // part)
    parts = decode_tiles(own, latents, model.image_size, max(part // factor, 1), halo)
    for rows, cols, decoded in tqdm(parts, desc="decode", total=total, disable=not progress or total == 1):
        if out is None:
            image[..., rows, cols] = decoded.clamp(-1, 1)
        else:
            out[rows, cols] = to_uint8(decoded)[0]
    return image if out is None else out


def decoded_at_once(first_stage: nn.Module, window: int) -> tuple[int, int]:
    """Pixels along what is decoded in one piece, and the latents about it that are decoded with it and cut away.

    >>> decoded_at_once(model.first_stage_model, window=8)
    (2048, 16)
    """
    if has_attention(first_stage):
        return ATTENDED_PART, window // 2
    return DECODE_PART, getattr(first_stage, "reach", window + REACH)


def encode_images(model: LatentDiffusion, images: Tensor) -> Tensor:
    """Scaled latents (B,C,h,w) of images (B,C,H,W) in [-1,1] of any size, those larger than a tile in parts.

    >>> encode_images(model, torch.zeros(1, 3, 32, 48)).shape
    torch.Size([1, 4, 16, 24])
    """
    factor = model.first_stage_model.downsampling
    if factor == 1 or max(images.shape[-2:]) <= model.tile_size:
        return model.encode(images)
    part, halo = encoded_at_once(model)
    down, across = (spans(side // factor, part, halo) for side in images.shape[-2:])
    latents = images.new_empty(len(images), model.channels, *(side // factor for side in images.shape[-2:]))
    for rows, cols in product(down, across):
        seen = images[..., _times(rows.window, factor), _times(cols.window, factor)]
        latents[..., rows.tile, cols.tile] = encode_part(model, seen, rows, cols)
    return latents


def encoded_at_once(model: LatentDiffusion) -> tuple[int, int]:
    """Latents along what is encoded in one piece, and those about it whose pixels are seen with it.

    >>> encoded_at_once(model)
    (256, 16)
    """
    first_stage = model.first_stage_model
    if first_stage.downsampling == 1:
        return ENCODE_PART, 0
    if has_attention(first_stage):
        return ATTENDED_PART // first_stage.downsampling, model.image_size // 2
    return ENCODE_PART, model.image_size + REACH


def encode_part(model: LatentDiffusion, seen: Tensor, rows: Span, cols: Span) -> Tensor:
    """Scaled latents (B,C,h,w) of a part of images, from the pixels (B,C,H,W) of its window.

    >>> span = spans(32, part=8, halo=4)[1]
    >>> encode_part(model, torch.zeros(1, 3, 32, 32), span, span).shape
    torch.Size([1, 4, 8, 8])
    """
    with local_group_norm(model.first_stage_model, model.tile_size, seen.shape[-1]):
        made = model.encode(seen)
    return made[..., rows.inside(), cols.inside()]


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
