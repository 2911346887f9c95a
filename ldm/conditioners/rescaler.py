"""Conditioning on a map of the same place, such as a segmentation, beside the latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioners.base import About, Conditioner, where_kept
from ldm.errors import UserError

METHODS = ("nearest", "bilinear", "bicubic", "area")


class SpatialRescaler(Conditioner):
    """A map, made smaller in stages and mapped to fewer channels: {"concat": (B,C,h,w)} (arXiv:2112.10752, 4.3).

    Reads batch[key] (B,in_channels,H,W), such as one-hot classes of pixels. The unconditional value is a map of zeros.

    Args:
        in_channels: of the map. out_channels: after a 1x1 convolution; None is without.
        stages: how often the map is resized by `multiplier`; 0 for a map of the latent's size.
        method: of resizing: nearest, bilinear, bicubic, area.
        bias: of the convolution.
        key: batch key, and the name under which users give the map.
    """

    def __init__(
        self, in_channels: int, out_channels: int | None = None, stages: int = 1, method: str = "bilinear",
        multiplier: float = 0.5, bias: bool = False, dropout: float = 0.0, key: str = "map",
    ):  # fmt: skip
        super().__init__(dropout)
        if method not in METHODS:
            raise UserError(f"`method` of a map is one of {', '.join(METHODS)}; got '{method}'.")
        if stages < 0:
            raise UserError(f"`stages` of a map is 0 or more; got {stages}.")
        self.keys, self.in_channels = (key,), in_channels
        self.stages, self.method, self.multiplier = stages, method, multiplier
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.register_buffer("blank", torch.zeros(1, in_channels, 1, 1))

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        maps = torch.as_tensor(self._value(batch, self.keys[0])).to(self.blank)
        if maps.ndim != 4 or maps.shape[1] != self.in_channels:
            raise UserError(
                f"'{self.keys[0]}' is a map of {self.in_channels} channels, as (N, {self.in_channels}, H, W); got an "
                f"array of shape {tuple(maps.shape)}."
            )
        maps = where_kept(maps, self.blank, drop)
        for _ in range(self.stages):
            maps = F.interpolate(maps, scale_factor=self.multiplier, mode=self.method)
        return {"concat": self._mapped(maps)}                                   # (B,C,h,w)

    def null(self) -> dict[str, Tensor]:
        return {"concat": self._mapped(self.blank)}                             # (1,C,1,1), for any size

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = values.values()
        if isinstance(value, (list, tuple)):
            value = torch.stack([torch.as_tensor(item) for item in value])
        maps = torch.as_tensor(value).float()
        return {self.keys[0]: maps[None] if maps.ndim == 3 else maps}

    def parse(self, key: str, text: str) -> Any:
        raise UserError(f"'{key}' is a map and cannot be given on a command line; give an array in Python.")

    def describe(self) -> dict[str, About]:
        return {self.keys[0]: About("map", channels=self.in_channels)}

    def _mapped(self, maps: Tensor) -> Tensor:
        return self.channel_mapper(maps) if hasattr(self, "channel_mapper") else maps
