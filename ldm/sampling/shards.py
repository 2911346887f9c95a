"""Decodes a canvas that lies in bands on disk: any part of its image by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ldm.devices import send
from ldm.images.write import to_uint8
from ldm.sampling.bands import Bands
from ldm.sampling.canvas import decoded_at_once
from ldm.sampling.glass import Glass
from ldm.sampling.local_norm import CELLS, decode_part, span_of

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

REACH = 4  # latents around those of tissue whose pixels are decoded; others of glass are even, at a canvas' border too
PART = 1024  # pixels along what a CPU decodes at once: a third more work than twice as many, with half the memory


class ShardDecoder:
    """Pixels of parts of a canvas, each decoded with a halo of its neighbours' latents.

    Args:
        bands, step: where the canvas is, scaled latents. decoder: full or small. glass: what is nothing but it has its
            colour, and parts of it are not decoded.

    >>> bands = Bands(Path("canvas"), (16, 24), lambda top, rows: torch.zeros(1, 4, rows, 24))
    >>> ShardDecoder(model, bands, 0).pixels(slice(0, 16), slice(16, 48)).shape
    (16, 32, 3)
    """

    def __init__(
        self, model: LatentDiffusion, bands: Bands, step: int, decoder: str = "full", glass: Glass | None = None
    ) -> None:
        self.model, self.bands, self.step, self.decoder, self.glass = model, bands, step, decoder, glass
        self.own, _ = model.decoding(torch.zeros(1, model.channels, 1, 1, device=model.device), decoder)
        part, self.halo = decoded_at_once(self.own, model.image_size)
        self.part = min(part, PART) if model.device.type == "cpu" else part

    @torch.no_grad()
    def pixels(self, rows: slice, cols: slice) -> np.ndarray:
        """(h,w,3) uint8 of rows and columns of the image, which begin with a latent."""
        factor = self.model.first_stage_model.downsampling
        bottom, right = (-(-own.stop // factor) for own in (rows, cols))
        out = np.empty((bottom * factor - rows.start, right * factor - cols.start, 3), np.uint8)
        part = max(self.part // factor, 1)
        for top in range(rows.start // factor, bottom, part):
            for left in range(cols.start // factor, right, part):
                down, across = slice(top, min(top + part, bottom)), slice(left, min(left + part, right))
                y, x = top * factor - rows.start, left * factor - cols.start
                tall, wide = ((own.stop - own.start) * factor for own in (down, across))
                out[y : y + tall, x : x + wide] = self._decoded(down, across)
        return out[: rows.stop - rows.start, : cols.stop - cols.start]

    def _decoded(self, rows: slice, cols: slice) -> np.ndarray:
        """What rows and columns of latents are decoded to."""
        window, size = self.model.image_size, self.bands.size
        align = max(window // CELLS, 1)
        spans = (span_of(part.start, part.stop, side, self.halo, align) for part, side in zip((rows, cols), size))
        down, across = spans
        latents = self.bands.part(self.step, down.window, across.window)
        bare = None if self.glass is None else self.glass.cells(latents)
        if bare is not None and bare.all():
            return self.glass.colour  # of every pixel
        latents = self.model.decoding(send(latents, self.model.device), self.decoder)[1]
        decoded = decode_part(self.own, latents, down, across, window, max(size) <= window)
        image = to_uint8(decoded.clamp(-1, 1))[0]
        if bare is not None:
            near = F.max_pool2d((~bare)[None].float(), 2 * REACH + 1, 1, REACH)[0] > 0
            even = ~near[down.inside(1), across.inside(1)].numpy()
            factor = self.model.first_stage_model.downsampling
            image[even.repeat(factor, 0).repeat(factor, 1)] = self.glass.colour
        return image
