"""Random changes of pairs of gray slices: heads of other shapes, scanners of other grey levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.rng import generator

STREAM = 0x62656E64  # tells its draws from what else an item's draw decides
KNOTS = 6  # of the curve that grey levels go through
FIELD = 4  # cells along the side of a bias field


@dataclass(frozen=True)
class Bending:
    """How a pair is changed, by draws of its own.

    Args:
        geometry: strength in [0, 1]. Both images are turned by up to 45 degrees, scaled along each axis by up to 25%
            and moved by up to 10% of the side, all times the strength, alike; what comes in is black.
        intensity: strength in [0, 1]. The grey levels of the source, which is told, go through a rising curve, up to
            2 ** (2 * strength) steep or flat in parts, a gain and a gamma within factors of 1.5, and a smooth field
            within 1 +- 0.4, as coils leave it (all times the strength). Black stays black. The target, which is to
            be made, keeps its own.

    >>> Bending(geometry=0.5)
    Bending(geometry=0.5, intensity=0.0)
    """

    geometry: float = 0.0
    intensity: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("geometry", self.geometry), ("intensity", self.intensity)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f"{name} of pairs is a number from 0 (off) to 1; got {value!r}.")

    def __call__(self, image: Tensor, source: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """The pair, each (C,H,W) in [-1, 1], changed as the integer `draw` decides.

        >>> image = torch.full((1, 16, 16), -1.0)
        >>> [bool((each == -1).all()) for each in Bending(0.5, 0.5)(image, image, 3)]     # black stays black
        [True, True]
        """
        if not (self.geometry or self.intensity):
            return image, source
        draws = generator(draw, STREAM)
        turn = torch.rand(5, generator=draws) * 2 - 1
        curve = torch.rand(KNOTS, generator=draws) * 2 - 1
        gain, gamma = (torch.rand(2, generator=draws) * 2 - 1).tolist()
        field = torch.rand(1, 1, FIELD, FIELD, generator=draws) * 2 - 1
        if self.geometry:
            image, source = _turned(torch.stack([image, source]), self.geometry * turn).unbind()
        if self.intensity:
            source = _changed(source, self.intensity, curve, gain, gamma, field)
        return image, source


def _turned(pair: Tensor, draws: Tensor) -> Tensor:
    angle, along, across, down, right = draws.tolist()
    cos, sin = math.cos(angle * math.pi / 4), math.sin(angle * math.pi / 4)
    scale = torch.tensor([1.25**along, 1.25**across])
    turn = torch.tensor([[cos, -sin], [sin, cos]]) * scale[:, None]
    theta = torch.cat([turn, 0.2 * torch.tensor([[right], [down]])], 1)[None].expand(len(pair), -1, -1)
    grid = F.affine_grid(theta, pair.shape, align_corners=False)
    turned = F.grid_sample(pair + 1, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return turned.clamp(0, 2) - 1


def _changed(
    image: Tensor, strength: float, curve: Tensor, gain: float, gamma: float, field: Tensor
) -> Tensor:
    levels = ((image + 1) / 2).clamp(0, 1)
    steps = 2 ** (2 * strength * curve)
    knots = torch.cat([torch.zeros(1), steps.cumsum(0) / steps.sum()])                       # rising from 0 to 1
    place = levels * KNOTS
    low = place.floor().clamp(max=KNOTS - 1)
    first, second = knots[low.long()], knots[low.long() + 1]
    levels = first + (place - low) * (second - first)
    levels = levels ** (1.5 ** (strength * gamma)) * 1.5 ** (strength * gain)
    smooth = F.interpolate(field, size=image.shape[-2:], mode="bicubic", align_corners=True)[0]
    return 2 * (levels * (1 + 0.4 * strength * smooth)).clamp(0, 1) - 1
