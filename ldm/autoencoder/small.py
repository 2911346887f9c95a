"""A small decoder: what a first stage's decoder makes of latents, nearly, in a fraction of its time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.errors import UserError

RANGE = 4.0  # scaled latents beyond it are drawn in


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class SmallDecoder(nn.Module):
    """Scaled latents (B,C,h,w) -> images (B,out_channels,H,W), without norms and attention, as TAESD is for Stable
    Diffusion: what it makes of a place depends on `reach` latents around it, so canvases are decoded in parts exactly.

    Args:
        channels: of latents. out_channels: of images. factor: pixels along a latent, a power of 2.
        widths, blocks: of the levels from the latent's size on, each twice as large as the one before; the last factor
            of 2 is made of channels (pixel shuffle).

    >>> decoder = SmallDecoder(4, factor=4, widths=(16, 8), blocks=(1, 1))
    >>> decoder(torch.zeros(1, 4, 8, 12)).shape, decoder.reach
    (torch.Size([1, 3, 32, 48]), 6)
    """

    def __init__(
        self, channels: int, out_channels: int = 3, factor: int = 8, widths: Sequence[int] = (64, 48, 32),
        blocks: Sequence[int] = (3, 2, 1),
    ):  # fmt: skip
        super().__init__()
        levels = factor.bit_length() - 1
        if factor < 2 or factor != 2**levels:
            raise UserError(f"small decoders are of first stages that shrink images by a power of 2; got {factor}.")
        if not len(widths) == len(blocks) == levels:
            wrong = f"got {list(widths)} and {list(blocks)}"
            raise UserError(f"a small decoder of factor {factor} has {levels} widths and blocks; {wrong}.")
        self.factor = factor
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.ReLU()]
        for level, (width, count) in enumerate(zip(widths, blocks)):
            layers += [Residual(width) for _ in range(count)]
            last = level == levels - 1
            wide = 4 * out_channels if last else widths[level + 1]
            layers += [nn.Conv2d(width, wide, 3, padding=1)]
            layers += [nn.PixelShuffle(2)] if last else [nn.Upsample(scale_factor=2, mode="nearest"), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    @property
    def downsampling(self) -> int:
        """Pixels along a latent."""
        return self.factor

    @property
    def reach(self) -> int:
        """Latents around a place on which its pixels depend."""
        reach, size = 1.0, 1.0
        for layer in self.layers[2:]:
            if isinstance(layer, Residual):
                reach += 2 * size
            elif isinstance(layer, nn.Conv2d):
                reach += size
            elif isinstance(layer, nn.Upsample):
                size /= 2
        return int(-(-reach // 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(RANGE * torch.tanh(z / RANGE))

    def decode(self, z: Tensor) -> Tensor:
        """The images, as those of a first stage."""
        return self(z)
