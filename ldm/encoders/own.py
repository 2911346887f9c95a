"""Encoders that a user brings: any timm model, with the transform of its weights, and any Python callable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from ldm.encoders.encoder import fill, pooled_tokens, read_weights, token_map
from ldm.encoders.timm_networks import make_network
from ldm.encoders.weight_names import unwrapped
from ldm.errors import UserError
from ldm.interop.weights import state_sha256

TIMM = "timm:"
AS_IT_IS = "none: images (B,3,H,W) in [-1, 1]"


class OwnEncoder:
    """A user's own encoder behind the call of `Encoder`: images (B,3,H,W) in [-1, 1] -> features (B,D) float32.

    Args:
        network: a timm model, or anything that makes features (B,D) of what it is given; a module is put on the device
            and into evaluation mode.
        name: of its features.
        transform: makes the network's input, a tensor, of a Pillow picture, as torchvision's do; None is the one of a
            timm model's weights, and of others none: they get images (B,3,H,W) in [-1, 1].
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        name: str,
        transform: Callable[[Image.Image], Tensor] | None = None,
        device: str = "cpu",
    ):
        self.network, self.name, self.device = network, name, device
        self.is_timm = isinstance(network, nn.Module) and hasattr(network, "pretrained_cfg")
        if transform is None and self.is_timm:
            transform = create_transform(**resolve_model_data_config(network), is_training=False)
        self.transform = transform
        if isinstance(network, nn.Module):
            network.eval().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        return self._checked(self.network(self._inputs(images)), len(images))

    def with_tokens(self, images: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """As `Encoder.with_tokens`, of a timm model."""
        if not self.is_timm:
            raise UserError(
                f"patch tokens are taken from encoders known by name, encoder folders and timm models; '{self.name}' "
                "is none of these: let it give them as features of its own"
            )
        raw = self.network.forward_features(self._inputs(images))
        features = self._checked(self.network.forward_head(raw, pre_logits=True), len(images))
        return features, pooled_tokens(token_map(self.network, raw), side, self.name).float()

    def _inputs(self, images: Tensor) -> Tensor:
        if self.transform is None:
            return images
        levels = images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        try:
            return torch.stack([self.transform(Image.fromarray(picture)) for picture in levels]).to(images.device)
        except (TypeError, RuntimeError) as error:
            raise UserError(
                f"the transform of encoder '{self.name}' makes no tensors of one size of Pillow pictures: {error}"
            ) from error

    def _checked(self, features: Any, count: int) -> Tensor:
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != count:
            told = (
                f"a tensor of shape {tuple(features.shape)}"
                if isinstance(features, Tensor)
                else type(features).__name__
            )
            raise UserError(
                f"encoder '{self.name}' gives {told} for {count} images; it should give one feature each, a tensor of "
                f"shape ({count}, D): wrap it in a function that pools"
            )
        return features.float()

    def about(self, licence: str = "") -> dict[str, Any]:
        """What an array of its features says of it. The SHA-256 is of its state dict: of the weights as they are."""
        source = self.network.pretrained_cfg.get("architecture", "") if self.is_timm else _name_of(self.network)
        told = {"encoder": self.name, "source": f"{TIMM}{source}" if self.is_timm else source, "mpp": None}
        if licence:
            told["licence"] = licence
        if isinstance(self.network, nn.Module):
            told["weights_sha256"] = state_sha256(self.network)
        return told | {"preprocessing": AS_IT_IS if self.transform is None else _name_of(self.transform)}


def _name_of(thing: Any) -> str:
    """What a callable is, in one line that is the same in every run."""
    told = " ".join(str(thing).split())
    if " at 0x" in told or len(told) > 2000:
        kind = thing if hasattr(thing, "__qualname__") else type(thing)
        return f"{kind.__module__}.{kind.__qualname__}"
    return told


def timm_model(arch: str, weights: str | Path | None) -> nn.Module:
    """A timm model without its classifier, its weights from a file.

    UserError: no such model, no file, weights of another model. Nothing is downloaded.

    >>> timm_model("resnet18", None)
    Traceback (most recent call last):
    ldm.errors.UserError: timm:resnet18 needs the file of its weights (--weights, weights=), ...
    """
    model = make_network(arch, 0)
    if weights is None or not Path(weights).is_file():
        hub = model.pretrained_cfg.get("hf_hub_id")
        source = f", for example from https://huggingface.co/{hub}" if hub else ""
        lacks = f"there are no weights at {weights}; {TIMM}{arch}" if weights else f"{TIMM}{arch}"
        raise UserError(f"{lacks} needs the file of its weights (--weights, weights=){source}; nothing is downloaded")
    classifier = model.pretrained_cfg.get("classifier") or ()
    names = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in unwrapped(read_weights(Path(weights))).items() if not key.startswith(names)}
    fill(model, state, Path(weights), f"timm's {arch}")
    return model.eval().requires_grad_(False)
