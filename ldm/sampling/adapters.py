"""Adapters (LoRA) on a model while it samples: a twin of its network with their changes in its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.errors import UserError, note
from ldm.interop.lora import Lora, placed, read_lora
from ldm.interop.weights import state_sha256
from ldm.networks.lora import changed

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

NETWORK = "diffusion_model."  # within what a model calls


class Adapters:
    """Adapters with their scales. The twin is made once for a model, and again when its weights have changed.

    scales: folder or file -> scale. UserError: no adapter there, one that is given twice, a scale that is no number.

    >>> Adapters({"no/adapter": 0.8})
    Traceback (most recent call last):
    ldm.errors.UserError: there is no adapter at no/adapter; give a folder with adapter_model.safetensors, ...
    """

    def __init__(self, scales: Mapping[str | Path, float]):
        self.loras: list[tuple[Lora, float]] = []
        for path, scale in scales.items():
            if not isinstance(scale, int | float) or not -100 <= scale <= 100:
                raise UserError(f"the scale of an adapter is a number from -100 to 100; {path} has {scale!r}.")
            lora = read_lora(path)
            if any(lora.sha256 == other.sha256 for other, _ in self.loras):
                raise UserError(f"the adapter {path} is given twice; give it once, with one scale.")
            self.loras.append((lora, float(scale)))
        self._made: tuple[list[tuple[int, int]], nn.Module] | None = None

    def record(self) -> list[str]:
        """What files say of them: name, scale, SHA-256 and licence of each."""
        return [
            f"{lora.name}={scale:g} sha256:{lora.sha256[:16]}" + (f" ({lora.licence})" if lora.licence else "")
            for lora, scale in self.loras
        ]

    def network(self, model: LatentDiffusion) -> nn.Module:
        """What `model.model` is with the adapters. UserError: one was made for another network."""
        version = [(weight.data_ptr(), weight._version) for weight in model.model.parameters()]
        if self._made is None or self._made[0] != version:
            self._made = version, changed(model.model, self._changes(model.model.diffusion_model))
        return self._made[1]

    @torch.no_grad()
    def _changes(self, network: nn.Module) -> dict[str, Tensor]:
        weights, changes = dict(network.named_parameters()), {}
        for lora, scale in self.loras:
            base = lora.about.get("base_sha256")
            if base and base != state_sha256(network):
                note(
                    f"the adapter {lora.name} was trained on {lora.about.get('base', 'another model')}, whose weights "
                    "are not those of this model; look at what it makes."
                )
            for each in placed(lora, weights):
                own = weights[each.weight]
                name = NETWORK + each.weight
                whole = changes.setdefault(name, torch.zeros(own.shape[0], own[0].numel(), device=own.device))
                rows = len(whole) // each.parts
                whole[each.part * rows : (each.part + 1) * rows] += scale * each.low.change().to(own.device)
        return changes


def parse_adapters(texts: Sequence[str]) -> dict[str, float]:
    """`path` or `path=scale` -> scale.

    >>> parse_adapters(["adapters/her2=0.8", "adapters/sharp"])
    {'adapters/her2': 0.8, 'adapters/sharp': 1.0}
    """
    scales: dict[str, float] = {}
    for text in texts:
        path, equals, number = text.rpartition("=")
        if not equals or Path(text).exists():
            path, number = text, "1"
        try:
            scale = float(number)
        except ValueError:
            raise UserError(f"an adapter is a path, or path=scale, as adapters/her2=0.8; got '{text}'.") from None
        if path in scales:
            raise UserError(f"the adapter {path} is given twice; give it once, with one scale.")
        scales[path] = scale
    return scales
