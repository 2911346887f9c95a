"""Conditioning on an image of the same place: translation between modalities, and layouts for a ControlNet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.conditioners.base import About, Conditioner, where_kept
from ldm.errors import UserError
from ldm.images.pictures import Picture


class SourceImage(Conditioner):
    """An image beside the noisy one: {"concat": (B,channels,size,size)}.

    Reads batch[key], images (B,channels,size,size) in [-1, 1]. A zero-shot model (`ldm.networks.lmi.LMIUNet`) is
    trained with key "image": the target modality is its own source, and any other is given in its place to translate;
    a supervised one, such as `ldm.networks.residual.SourceResidual`, with the "source" of `ldm.data.pairs.PairDataset`.

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
        return {self.keys[0]: images_of(value, "a source image")}

    def parse(self, key: str, text: str) -> Any:
        raise UserError(f"'{key}' is a source image and cannot be given on a command line; give an array in Python.")

    def describe(self) -> dict[str, About]:
        return {self.keys[0]: About("image", size=self.size, channels=self.channels)}


class ControlImage(Conditioner):
    """An image whose latent leads a network that has a ControlNet: {"concat": (B,3,size,size)}, encoded by the model.

    Reads batch[key], images (B,3,size,size) in [-1, 1]. It has no unconditional value: where no image is given the
    network is led by none, and guidance by other conditions follows the image on both sides, as ControlNets do.

    Args:
        size: side of the images in pixels, the model's tile.
        key: batch key, and the name under which users give the image; a command takes a file, control=layout.png.

    >>> conditioner = ControlImage(64)
    >>> conditioner(conditioner.read({"control": torch.zeros(3, 64, 64)}))["concat"].shape, conditioner.null()
    (torch.Size([1, 3, 64, 64]), {})
    """

    encoded = ("concat",)

    def __init__(self, size: int, key: str = "control"):
        super().__init__(dropout=0.0)
        self.size, self.keys = size, (key,)

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        images = torch.as_tensor(self._value(batch, self.keys[0]))
        if images.ndim != 4 or images.shape[1:] != (3, self.size, self.size):
            raise UserError(
                f"the model's '{self.keys[0]}' images are (N, 3, {self.size}, {self.size}), as its tiles; got "
                f"{tuple(images.shape)}. Cut them, or make one image of any size with `large-image`."
            )
        return {"concat": images}

    def null(self) -> dict[str, Tensor]:
        return {}

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = values.values()
        return {self.keys[0]: images_of(value, f"an image of '{self.keys[0]}'")}

    def parse(self, key: str, text: str) -> Any:
        pixels = Picture.of_file(Path(text)).pixels()
        return pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1

    def describe(self) -> dict[str, About]:
        return {self.keys[0]: About("control", size=self.size, channels=3)}


def images_of(value: Any, name: str) -> Tensor:
    """Images (N,C,H,W) in [-1, 1] from a tensor or array of them, a list, or one (C,H,W). UserError: other values.

    >>> images_of([np.zeros((3, 8, 8), np.float32)] * 2, "an image").shape
    torch.Size([2, 3, 8, 8])
    """
    if isinstance(value, (list, tuple)):
        value = torch.stack([torch.as_tensor(np.asarray(image)) for image in value])
    images = torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value))
    if not images.is_floating_point():
        raise UserError(f"{name} has values in [-1, 1]; got whole numbers. Scale them: v / 127.5 - 1.")
    if not images.numel():
        raise UserError(f"{name} is needed; none is given.")
    low, high = images.min().item(), images.max().item()
    if not -1.001 <= low <= high <= 1.001:  # NaN too
        raise UserError(f"{name} has values in [-1, 1]; got {low:g} to {high:g}.")
    return images[None] if images.ndim == 3 else images


def shown_in(conditioner: Conditioner, key: str, images: Tensor) -> dict[str, Tensor]:
    """Images (B,C,H,W) as the part of a condition by which the one that is an image acts; key: of that one.

    >>> list(shown_in(ControlImage(64), "control", torch.zeros(1, 3, 8, 8)))
    ['concat']
    """
    owners = getattr(conditioner, "owners", None)
    return {f"{owners[key]}/concat" if owners else "concat": images}
