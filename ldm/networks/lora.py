"""LoRA (arXiv:2106.09685): layers that learn a change of low rank beside frozen weights, and weights with it added.

While it trains, an adapted layer has the weight W + scale * lora_B @ lora_A, of which W is frozen and keeps its name.
To sample, the change is added to the weights of a twin of the network, which costs nothing then.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import check_params
from ldm.errors import UserError

TARGETS = ("attn1", "attn2", "attn", "cross_attn", "qkv")  # modules whose layers are adapted by default


@dataclass(frozen=True)
class LoraSettings:
    """What a config says of an adapter to train, `lora: {rank: 16}`.

    rank: of the change. alpha: the change is multiplied by alpha / rank; by default by 1.
    targets: names of modules of the network, within which every linear layer and convolution is adapted: by default the
        attention. "all" adapts all.

    >>> LoraSettings(rank=16).scale
    1.0
    """

    rank: int
    alpha: float | None = None
    targets: Sequence[str] = TARGETS

    def __post_init__(self):
        if not (isinstance(self.rank, int) and 1 <= self.rank <= 4096):
            raise UserError(f"lora.rank is a whole number from 1 to 4096; got {self.rank!r}.")
        if self.alpha is not None and not (isinstance(self.alpha, int | float) and self.alpha > 0):
            raise UserError(f"lora.alpha is above 0; got {self.alpha!r}.")

    @property
    def scale(self) -> float:
        """What the change is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Matrix(nn.Module):
    """One of the two matrices of a change, of the shape that peft gives it."""

    def __init__(self, *shape: int, like: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, device=like.device, dtype=like.dtype))


class Adapted:
    """What a layer becomes by `adapt`: whoever reads its weight gets the frozen one with the change added."""

    _parameters: dict[str, Tensor]

    @property
    def weight(self) -> Tensor:
        frozen = self._parameters["weight"]
        change = self.lora_B.weight.flatten(1) @ self.lora_A.weight.flatten(1)      # (out,in*sides)
        return frozen + self.lora_scale * change.reshape(frozen.shape)


class AdaptedLinear(Adapted, nn.Linear):
    """A linear layer with a change of low rank."""


class AdaptedConv1d(Adapted, nn.Conv1d):
    """A convolution over a sequence with a change of low rank."""


class AdaptedConv2d(Adapted, nn.Conv2d):
    """A convolution with a change of low rank."""


ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: AdaptedLinear, nn.Conv1d: AdaptedConv1d, nn.Conv2d: AdaptedConv2d
}  # fmt: skip


def adapt(network: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Freeze a network, and give its target layers a change of low rank, which is zero at first.

    UserError: no layer of these names.

    >>> network = nn.ModuleDict({"attn": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)})
    >>> adapt(network, LoraSettings(rank=2), seed=0)
    >>> [name for name, weight in network.named_parameters() if weight.requires_grad]
    ['attn.lora_A.weight', 'attn.lora_B.weight']
    """
    network.requires_grad_(False)
    targets = {settings.targets} if isinstance(settings.targets, str) else set(settings.targets)
    chosen = [
        layer
        for name, layer in network.named_modules()
        if type(layer) in ADAPTED and ("all" in targets or targets & set(name.split(".")))
    ]
    if not chosen:
        parts = {part for name, _ in network.named_modules() for part in name.split(".") if not part.isdigit()}
        raise UserError(
            f"lora.targets: the network has no layer within {', '.join(sorted(targets))}; its modules are called "
            f"{', '.join(sorted(parts - {''}))}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in chosen:
            _give(layer, settings)


def _give(layer: nn.Module, settings: LoraSettings) -> None:
    weight = layer.weight
    outputs, inputs, *sides = weight.shape
    if getattr(layer, "groups", 1) != 1:
        raise UserError("lora.targets: a convolution in groups cannot be adapted; choose others.")
    layer.lora_A = Matrix(settings.rank, inputs, *sides, like=weight)
    layer.lora_B = Matrix(outputs, settings.rank, *(1 for _ in sides), like=weight)
    layer.lora_scale = settings.scale
    nn.init.kaiming_uniform_(layer.lora_A.weight, a=5**0.5)
    layer.__class__ = ADAPTED[type(layer)]


def adapted(network: nn.Module, node: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """`adapt` a network as a config says; its rank and alpha. UserError: an unknown key, a value out of range.

    >>> adapted(nn.ModuleDict({"attn": nn.Linear(4, 4)}), {"rank": 2}, seed=0)
    {'rank': 2, 'alpha': 2}
    """
    check_params(LoraSettings, node, "lora")
    settings = LoraSettings(**node)
    adapt(network, settings, seed)
    return {"rank": settings.rank, "alpha": settings.rank if settings.alpha is None else settings.alpha}


def trained_alone(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without the weights of a module that are frozen.

    >>> layer = nn.Linear(1, 1)
    >>> _ = layer.weight.requires_grad_(False)
    >>> list(trained_alone(layer, layer.state_dict()))
    ['bias']
    """
    frozen = {name for name, weight in module.named_parameters() if not weight.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def check_same(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """UserError if an adapter that is to go on was of another rank, or of other weights.

    >>> now = {"rank": 4, "alpha": 4, "base_sha256": "ab12", "base": "m"}
    >>> check_same(now | {"rank": 8}, now)
    Traceback (most recent call last):
    ldm.errors.UserError: the adapter of this checkpoint was trained on other weights than those of m, or of another ...
    """
    keys = ("rank", "alpha", "base_sha256")
    if before is None or any(before.get(key) != now[key] for key in keys):
        raise UserError(
            f"the adapter of this checkpoint was trained on other weights than those of {now['base']}, or of another "
            "rank; give those again, or start a new run."
        )


def changed(network: nn.Module, changes: Mapping[str, Tensor]) -> nn.Module:
    """A twin of a network with `changes` added to its weights by name; all other weights are the network's own.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> twin = changed(network, {"0.bias": torch.ones(2)})
    >>> (twin[0].bias - network[0].bias).tolist(), twin[1] is network[1]
    ([1.0, 1.0], True)
    """
    return _changed(network, changes, "")


def _changed(module: nn.Module, changes: Mapping[str, Tensor], prefix: str) -> nn.Module:
    if not any(name.startswith(prefix) for name in changes):
        return module
    twin = copy.copy(module)
    twin._parameters = {
        name: weight if (change := changes.get(prefix + name)) is None else _sum(weight, change)
        for name, weight in module._parameters.items()
    }
    twin._modules = {name: _changed(child, changes, f"{prefix}{name}.") for name, child in module._modules.items()}
    return twin


def _sum(weight: Tensor, change: Tensor) -> nn.Parameter:
    made = weight.detach().clone()  # in its own layout
    return nn.Parameter(made.add_(change.to(weight).reshape(weight.shape)), requires_grad=False)
