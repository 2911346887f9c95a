"""Conditioning on a source image of the same place: translation between modalities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.conditioners.base import About, Conditioner, where_kept
from ldm.errors import UserError


class SourceImage(Conditioner):
    """An image beside the noisy one: {"concat": (B,channels,size,size)}.

    Reads batch[key], images (B,channels,size,size) in [-1, 1]. A zero-shot model (`ldm.networks.lmi.LMIUNet`) is
    trained with key "image": the target modality is its own source, and any other is given in its place to translate;
    a supervised one with the "source" of `ldm.data.pairs.PairDataset`.

    The unconditional value is a flat mid-gray image, zeros, which tells nothing of any other. Models that never saw it
    (dropout 0, as published) are sampled at guidance scale 1.

    Args:
        size: side of the images in pixels, the network's image_size; channels: of the source.
        key: batch key, and the name under which users give the source.
    """

    def __init__(self, size: int, channels: int = 1, dropout: float = 0.0, key: str = "image"):
        super().__init__(dropout)
        self.size, self.channels, self.keys = size, channels, (key,)
        self.register_buffer("blank", torch.zeros(1, channels, size, size))

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        images = torch.as_tensor(self._value(batch, self.keys[0])).to(self.blank)
        if images.ndim != 4 or images.shape[1:] != self.blank.shape[1:]:
            raise UserError(
                f"the model's source images ('{self.keys[0]}') have the shape {tuple(self.blank.shape[1:])}; got "
                f"{tuple(images.shape[1:])}. Cut slices with the model's size, and read them with gray: true if it has "
                "one channel."
            )
        return {"concat": where_kept(images, self.blank, drop)}

    def null(self) -> dict[str, Tensor]:
        return {"concat": self.blank}

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = values.values()
        if isinstance(value, (list, tuple)):
            value = torch.stack([torch.as_tensor(np.asarray(image)) for image in value])
        images = torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value))
        if not images.is_floating_point():
            raise UserError("a source image has values in [-1, 1]; got whole numbers. Scale them: v / 127.5 - 1.")
        if not images.numel():
            raise UserError("no source image is given.")
        low, high = images.min().item(), images.max().item()
        if not -1.001 <= low <= high <= 1.001:  # NaN too
            raise UserError(f"a source image has values in [-1, 1]; got {low:g} to {high:g}.")
        return {self.keys[0]: images[None] if images.ndim == 3 else images}

    def parse(self, key: str, text: str) -> Any:
        raise UserError(f"'{key}' is a source image and cannot be given on a command line; give an array in Python.")

    def describe(self) -> dict[str, About]:
        return {self.keys[0]: About("image", size=self.size, channels=self.channels)}
