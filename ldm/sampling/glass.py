"""The glass of a slide: what a canvas is where it has no condition, without the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.guidance import TARGET
from ldm.rng import canvas_noise
from ldm.sampling.canvas import Canvas

PLAIN = (243, 243, 243)  # where nothing is known of a slide's glass
_STREAM = 0x676C617373  # of the noise of the tile that shows what colour it has


@dataclass(frozen=True)
class Glass:
    """latent: (C,), scaled, what windows on glass are denoised to. colour: (3,) uint8, what it is decoded to."""

    latent: Tensor
    colour: np.ndarray

    @classmethod
    @torch.no_grad()
    def of(cls, canvas: Canvas, feature: np.ndarray | None) -> Glass:
        """Glass of the colour that the model gives to `feature` (D,), the slide's background; plain, if None.

        A tile of that feature is sampled. Its median colour is encoded as an even image, of which the middle is taken:
        a canvas of it has no structure, and goes on where the windows beside it end.

        >>> glass = Glass.of(Canvas.of(model, torch.randn(2, 3, 8)), None)
        >>> glass.latent.shape, glass.colour.shape
        (torch.Size([4]), (3,))
        """
        model = canvas.model
        colour = np.array(PLAIN)
        if feature is not None and set(canvas.led) <= {TARGET}:
            colour = np.median(_pixels(model.decode(_sampled(canvas, feature), canvas.sampler.decoder)), axis=(0, 1))
        even = torch.as_tensor(colour / 127.5 - 1, dtype=torch.float32, device=model.device)
        side = model.tile_size
        latent = _middle(model.encode(even.view(1, 3, 1, 1).expand(1, -1, side, side))).mean((2, 3))[0]
        flat = latent.view(1, -1, 1, 1).expand(1, -1, model.image_size, model.image_size)
        shown = _pixels(_middle(model.decode(flat, canvas.sampler.decoder)))
        return cls(latent.cpu(), np.median(shown, axis=(0, 1)).round().astype(np.uint8))

    def save(self, file: Path) -> None:
        """Write it, in full precision."""
        np.savez(file, latent=self.latent.numpy(), colour=self.colour)

    @classmethod
    def load(cls, file: Path) -> Glass:
        """What `save` wrote."""
        held = np.load(file)
        return cls(torch.from_numpy(held["latent"]), held["colour"])

    def cells(self, latents: Tensor) -> Tensor:
        """(h,w) bool: which of latents (1,C,h,w) are glass, to rounding."""
        own = self.latent.view(-1, 1, 1)
        return ((latents[0] - own).abs() <= 1e-5 * own.abs().max().clamp(min=1)).all(0)


def _sampled(canvas: Canvas, feature: np.ndarray) -> Tensor:
    """Latents (1,C,window,window) of a tile of a feature."""
    model, window = canvas.model, canvas.model.image_size
    cells = canvas.field.cells
    values = torch.as_tensor(feature, dtype=torch.float32, device=model.device)[None]
    values = values if cells == 1 else values[..., None, None].expand(1, -1, cells, cells)
    cond = model.condition(features=values, **canvas.conditions) | {
        part: value.to(model.device) for part, value in canvas.led.items()
    }

    def noise(step: int) -> Tensor:
        return canvas_noise(canvas.sampler.seed, model.channels, window, window, _STREAM + step + 1)

    x = noise(-1).to(model.device) * canvas.sigmas[0].to(model.device)
    return canvas.solver.solve(x, canvas.sigmas, cond, noise, lambda *_: None)


def _middle(values: Tensor) -> Tensor:
    """The middle half of (1,C,h,w) along both axes."""
    height, width = values.shape[-2:]
    return values[..., height // 4 : -(height // 4), width // 4 : -(width // 4)]


def _pixels(image: Tensor) -> np.ndarray:
    """(h,w,3) in 0..255 of an image (1,3 or 1,h,w) in [-1,1]."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5)[0].expand(3, -1, -1).movedim(0, -1).cpu().numpy()
