"""What turns images into features that distances are measured in: Inception, the judge, tile encoders, CLIP's tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.encoders import inception, judge
from ldm.encoders.encoder import load_encoder
from ldm.encoders.registry import REGISTRY
from ldm.errors import UserError, suggest
from ldm.files import sha256

CLIP = "clip:"
PIXELS = 32


@dataclass(frozen=True)
class Extractor:
    """An extractor: uint8 images (B,H,W,3) -> features (B,D) float32.

    about: extractor, weights_sha256, resize or preprocessing, licence: what two feature files must share.
    words: captions -> (B,D) features in the same space, of a CLIP.
    """

    name: str
    dim: int
    network: Callable[[Tensor], Tensor]  # uint8 (B,H,W,3) on the device -> (B,D)
    about: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    words: Callable[[list[str]], np.ndarray] | None = None

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.network(torch.from_numpy(images).to(self.device)).float().cpu().numpy()


def to_signed(images: Tensor) -> Tensor:
    """uint8 (B,H,W,3) -> (B,3,H,W) in [-1,1].

    >>> to_signed(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)).flatten().tolist()
    [-1.0, 1.0]
    """
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def _pixels(images: Tensor) -> Tensor:
    """uint8 (B,H,W,3) -> (B,3*PIXELS*PIXELS): the images themselves, made small by averaging."""
    return F.adaptive_avg_pool2d(to_signed(images), PIXELS).flatten(1)


def load_extractor(
    name: str, weights: str | Path | None = None, device: str = "cpu", resize: str = "clean"
) -> Extractor:
    """`inception`, `judge`, an encoder of the registry by name, an encoder folder, or `pixels`. Nothing is downloaded.

    resize: how images come to Inception's size, `clean` or `tensorflow`; encoders have their own.

    >>> extract = load_extractor("pixels")
    >>> extract(np.zeros((2, 256, 256, 3), np.uint8)).shape
    (2, 3072)
    """
    if name == "inception":
        network = inception.load_inception(weights, resize, device)
        about = {
            "extractor": "inception",
            "weights_sha256": sha256(network.weights_path),
            "resize": resize,
            "licence": inception.LICENCE,
        }
        return Extractor(name, inception.DIM, network, about, device)
    if name == "judge":
        network = judge.load_judge(weights, device)
        about = {"extractor": name, "weights_sha256": sha256(network.weights_path), "licence": judge.LICENCE}
        return Extractor(name, judge.DIM, network, about, device)
    if name == "pixels":
        about = {"extractor": name, "resize": f"mean to {PIXELS} px"}
        return Extractor(name, 3 * PIXELS**2, _pixels, about, device)
    if name not in REGISTRY and not Path(name).is_dir():
        known = ["inception", "judge", "pixels", f"{CLIP}ViT-L-14", *REGISTRY]
        raise UserError(f"'{name}' is no extractor and no encoder folder{suggest(name, known)}")
    encoder = load_encoder(name, weights, device)
    about = {
        "extractor": encoder.name,
        "weights_sha256": sha256(encoder.weights_path),
        "preprocessing": encoder.spec.preprocessing(),
        "licence": encoder.licence,
    }
    return Extractor(encoder.name, encoder.dim, lambda images: encoder(to_signed(images)), about, device)
