"""From an image to an encoder's input: resized exactly as the published transforms do, cut, normalised."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.encoders.spec import EncoderSpec

BITS = 22  # of the fraction in which Pillow keeps its weights


def prepare(images: Tensor, spec: EncoderSpec) -> Tensor:
    """Images (B,3,H,W) in [-1, 1] of any size -> the input (B,3,S,S) of an encoder's network.

    >>> from ldm.encoders.registry import REGISTRY
    >>> prepare(torch.zeros(2, 3, 256, 256), REGISTRY["prov-gigapath"]).shape
    torch.Size([2, 3, 224, 224])
    """
    side = spec.resize or spec.input_size
    if images.shape[-2:] != (side, side):
        resize = resize_as_pillow if spec.pillow else resize_float
        images = resize(images.float(), side, spec.interpolation)
    margin = round((side - spec.input_size) / 2)
    images = images[..., margin : margin + spec.input_size, margin : margin + spec.input_size]
    return normalise((images + 1) / 2, spec)


def normalise(images: Tensor, spec: EncoderSpec) -> Tensor:
    """Images (B,3,H,W) in [0, 1], less the encoder's mean, by its standard deviation.

    >>> from ldm.encoders.registry import REGISTRY
    >>> normalise(torch.ones(1, 3, 1, 1), REGISTRY["hipt-vits16"]).flatten()
    tensor([1., 1., 1.])
    """
    mean, std = (images.new_tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return (images - mean) / std


def resize_float(images: Tensor, side: int, interpolation: str) -> Tensor:
    """Images (B,3,H,W) in [-1, 1] in side x side px, antialiased, in floating point.

    >>> resize_float(torch.ones(1, 3, 8, 8), 4, "bicubic").shape
    torch.Size([1, 3, 4, 4])
    """
    resized = F.interpolate(images, (side, side), mode=interpolation, antialias=True)
    return resized.clamp(-1, 1)  # bicubic overshoots: stay in the range of images


def resize_as_pillow(images: Tensor, side: int, interpolation: str) -> Tensor:
    """Images (B,3,H,W) in [-1, 1] in side x side px, grey level by grey level what Pillow makes of 8-bit pictures.

    Pillow, and with it torchvision on pictures, resizes rows, then columns, by weights of 22 bits, and rounds to whole
    levels after each. Gradients go through the rounding as if it were not there.

    >>> picture = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    >>> own = resize_as_pillow(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1, 7, "bicubic")
    >>> theirs = np.asarray(Image.fromarray(picture).resize((7, 7), Image.Resampling.BICUBIC))
    >>> bool(((own[0].permute(1, 2, 0) + 1) * 127.5).round().eq(torch.tensor(theirs)).all())
    True
    """
    device = images.device
    if device.type == "mps":  # it has no double precision
        images = images.cpu()
    levels = _whole((images.double() + 1) * 127.5)
    height, width = images.shape[-2:]
    if width != side:
        weights = pillow_weights(width, side, interpolation).to(levels.device)
        levels = _whole(levels @ weights.mT / 2**BITS)
    if height != side:
        weights = pillow_weights(height, side, interpolation).to(levels.device)
        levels = _whole(weights @ levels / 2**BITS)
    return (levels / 127.5 - 1).float().to(device)


def _whole(levels: Tensor) -> Tensor:
    """The nearest whole grey levels of 0 to 255, upwards from a half."""
    rounded = (levels + 0.5).floor().clamp(0, 255)
    return levels + (rounded - levels).detach() if levels.requires_grad else rounded


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.abs(x), 0, None)


def _cubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (1.0, _triangle),
    "bicubic": (2.0, _cubic),
}


@lru_cache(maxsize=64)
def pillow_weights(size: int, side: int, interpolation: str) -> Tensor:
    """How Pillow weighs `size` pixels for each of `side`: whole numbers (side,size), in units of 2^-22, float64.

    >>> (pillow_weights(4, 2, "bilinear") / 2**BITS)[0]
    tensor([0.4286, 0.4286, 0.1429, 0.0000], dtype=torch.float64)
    """
    scale = size / side
    reach, weigh = FILTERS[interpolation]
    stretch = max(scale, 1.0)
    weights = np.zeros((side, size))
    for place in range(side):
        centre = (place + 0.5) * scale
        first = max(int(centre - reach * stretch + 0.5), 0)
        last = min(int(centre + reach * stretch + 0.5), size)
        own = weigh((np.arange(first, last) - centre + 0.5) * (1 / stretch))
        total = 0.0
        for weight in own:  # one after the other, as Pillow adds them
            total += weight
        weights[place, first:last] = own / total if total else own
    units = weights * (1 << BITS)
    return torch.from_numpy(np.trunc(units + np.where(units < 0, -0.5, 0.5)))
