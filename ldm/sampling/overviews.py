"""An overview of a canvas: how it lies on it, and the reading of colours from the model's latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.autoencoder.autoencoder import IdentityFirstStage
from ldm.conditioners.source_image import images_of
from ldm.devices import send
from ldm.diffusion.fields import FeatureField, LayoutField
from ldm.diffusion.overview import Blocks, Overview, Reading
from ldm.diffusion.tiled import fixed_starts, window_conds
from ldm.errors import UserError
from ldm.rng import canvas_noise
from ldm.sampling.stream import workers

if TYPE_CHECKING:
    from ldm.sampling.canvas import Canvas

LEAST = 2  # latents along a block: what single ones are decoded to depends on their neighbours
TILES = 8  # of which colours are learnt to be read
_STREAM = 0x6F76657276  # of the noise of these tiles


def laid(
    image: Any, size: tuple[int, int], factor: int, field: FeatureField | LayoutField, window: int, strength: float
) -> Overview:
    """An overview, (3,h,w) in [-1,1], on a canvas of `size` latents of `factor` px each, yet without its reading.

    A block of the canvas is a pixel of the overview, or as many as LEAST latents hold. What lies in holes of `field`,
    and what is next to it, is not followed: glass stays glass. UserError: another shape than the canvas's, or larger.

    >>> field = FeatureField(torch.zeros(2, 3, 8), (16, 24), 8)
    >>> told = laid(torch.zeros(3, 16, 24), (16, 24), 2, field, 8, 1.0)
    >>> told.colours.shape, told.followed.mean()
    (torch.Size([3, 8, 12]), tensor(1.))
    """
    image = images_of(image, "an overview")
    if tuple(image.shape[:2]) != (1, 3):
        raise UserError(f"an overview is one image (3,height,width) in [-1, 1]; got shape {tuple(image.shape)}.")
    (low, wide), (height, width) = image.shape[2:], (side * factor for side in size)
    scale = max(min(height / low, width / wide), 1.0)
    if abs(height / scale - low) > 1 or abs(width / scale - wide) > 1:
        raise UserError(
            f"an overview shows the whole canvas, at its aspect ratio and no larger; the canvas is {width} x {height} "
            f"px, the overview {wide} x {low} px. Cut it, or give the --size that it has."
        )
    axes = [Blocks(side, max(min(pixels, side // LEAST), 1)) for side, pixels in zip(size, (low, wide))]
    colours = image[0].float().cpu()
    for axis, blocks in enumerate(axes):
        colours = _area_means(colours, axis + 1, blocks)
    centres = [((blocks.edges[1:] + blocks.edges[:-1]) // 2).tolist() for blocks in axes]
    if not field.holes.any():
        return Overview(*axes, colours, torch.ones(colours.shape[1:]), strength)
    bare = [field.bare([(row - window // 2, col - window // 2) for col in centres[1]]) for row in centres[0]]
    beside = F.max_pool2d(torch.tensor(bare).float()[None, None], 3, 1, 1)[0, 0]
    return Overview(*axes, colours, 1 - beside, strength)


def _area_means(values: Tensor, dim: int, blocks: Blocks) -> Tensor:
    """Means over blocks along an axis of values that are spread evenly over it, whatever their number."""
    edges = blocks.edges.double() * values.shape[dim] / blocks.size
    total = F.pad(values.double().movedim(dim, -1).cumsum(-1), (1, 0))
    low = edges.long().clamp(max=values.shape[dim] - 1)
    until = torch.lerp(total[..., low], total[..., low + 1], edges - low)
    return (until.diff(dim=-1) / edges.diff()).movedim(-1, dim).float()


@torch.no_grad()
def reading_of(canvas: Canvas) -> Reading:
    """How colours are read from latents of a canvas's model.

    Learnt from a few tiles that the model samples under the canvas's own conditions at places from the darkest to the
    lightest of its overview, each by itself and on one thread: a function of model, settings and overview alone.

    >>> from ldm.sampling.canvas import Canvas
    >>> reading = reading_of(Canvas.of(model, torch.randn(2, 3, 8), overview=torch.zeros(3, 8, 12)))
    >>> reading.weight.shape
    torch.Size([3, 4])
    """
    model, told = canvas.model, canvas.overview
    if isinstance(model.first_stage_model, IdentityFirstStage) and model.channels == 3:
        return Reading.plain()
    block = max(LEAST, round(told.rows.size / told.rows.count))
    latents, colours = [], []
    with workers(model.device):
        for number, corner in enumerate(_places(canvas)):
            z = _tile(canvas, corner, number)
            shown = model.decode(z, canvas.sampler.decoder).clamp(-1, 1).expand(-1, 3, -1, -1)
            side = min(block, model.image_size)
            pixels = side * model.first_stage_model.downsampling
            latents.append(F.avg_pool2d(z.float(), side).flatten(2)[0].T)
            colours.append(F.avg_pool2d(shown.float(), pixels).flatten(2)[0].T)
        return Reading.fitted(torch.cat(latents).cpu(), torch.cat(colours).cpu())


def _places(canvas: Canvas) -> list[tuple[int, int]]:
    """Corners of TILES windows with conditions, evenly from the darkest to the lightest in the overview."""
    window, told = canvas.model.image_size, canvas.overview
    corners = [(row, col) for row in fixed_starts(canvas.size[0], window, window)
               for col in fixed_starts(canvas.size[1], window, window)]  # fmt: skip
    known = [corner for corner, bare in zip(corners, canvas.bare(corners)) if not bare] or corners
    grey = told.colours.mean(0)
    light = [
        float(grey[told.rows.within(row, row + window), told.cols.within(col, col + window)].mean())
        for row, col in known
    ]
    order = sorted(range(len(known)), key=lambda i: (light[i], i))
    return [known[order[round(i * (len(known) - 1) / (TILES - 1))]] for i in range(TILES)]


def _tile(canvas: Canvas, corner: tuple[int, int], number: int) -> Tensor:
    """Latents (1,C,window,window) of a tile under the condition of a window of the canvas."""
    model, window = canvas.model, canvas.model.image_size
    led = window_conds(canvas.led, [0], [corner], window)
    cond = canvas.condition([corner]) | {part: send(value, model.device) for part, value in led.items()}

    def noise(step: int) -> Tensor:
        stream = _STREAM + (step + 1) * TILES + number
        return canvas_noise(canvas.sampler.seed, model.channels, window, window, stream).to(model.device)

    x = noise(-1) * canvas.sigmas[0].to(model.device)
    return canvas.solver.solve(x, canvas.sigmas.to(model.device), cond, noise, lambda *_: None)
