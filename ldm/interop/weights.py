"""What is asked of weights wherever they come in or go out, and which of averaged and raw ones a model is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.errors import UserError, note

NETWORK, AVERAGE = "model.", "model_ema."  # before the names of the network's weights and of their averages
STALE = "were never updated while it was trained; its raw weights are taken"


def not_finite(state: Mapping[str, Tensor]) -> dict[str, int]:
    """How many values of each tensor are NaN or infinite; tensors without any are left out.

    A sum is not finite where a value is not, so that one pass tells the tensors to look at.

    >>> not_finite({"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(2), "c": torch.tensor(1)})
    {'a': 1}
    """
    floats = {name: value.detach() for name, value in state.items() if _holds_floats(value)}
    places: dict[torch.device, list[str]] = {}
    for name, value in floats.items():
        places.setdefault(value.device, []).append(name)
    found = {}
    for names in places.values():
        told = torch.stack([_sum(floats[name]) for name in names]).isfinite().tolist()  # a device is waited for once
        for name in (name for name, finite in zip(names, told) if not finite):
            if wrong := int((~floats[name].isfinite()).sum()):  # a sum of finite values may overflow
                found[name] = wrong
    return found


def _holds_floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0 and not value.is_meta


def _sum(value: Tensor) -> Tensor:
    return (value.float() if value.itemsize == 1 else value).sum(dtype=torch.float32)


def in_words(wrong: Mapping[str, int], state: Mapping[str, Tensor]) -> str:
    """What `not_finite` found, in words.

    >>> in_words({"a": 1}, {"a": torch.zeros(2)})
    '1 of the 2 values of a are NaN or infinite'
    """
    first = next(iter(wrong))
    others = f", and values of {len(wrong) - 1} other tensors" if len(wrong) > 1 else ""
    return f"{wrong[first]} of the {state[first].numel()} values of {first} are NaN or infinite{others}"


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """UserError if weights are not finite, naming a tensor and how many of its values are not.

    >>> check_finite({"out.weight": torch.tensor([float("inf"), 0.0])}, "model.ckpt")
    Traceback (most recent call last):
    ldm.errors.UserError: the weights in model.ckpt are of no use: 1 of the 2 values of out.weight are NaN or ...
    """
    if wrong := not_finite(state):
        raise UserError(
            f"the weights in {source} are of no use: {in_words(wrong, state)}. Take an earlier checkpoint of the "
            "training, or get the file anew."
        )


def never_updated(average: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> bool:
    """Whether averages are still what training began with, while the raw weights have moved on.

    They are if they counted no update, or if a weight that begins as zeros is still zeros in the average alone.

    Args:
        average: averaged weights by CompVis' names, without dots and prefix; `num_updates` among them where it is kept.
        raw: the trained weights by their own names.

    >>> raw = {"out.weight": torch.ones(2)}
    >>> [never_updated({"outweight": torch.full((2,), value)}, raw) for value in (0.9, 0.0)]
    [False, True]
    """
    pairs = [(average[key], value) for name, value in raw.items() if (key := name.replace(".", "")) in average]
    counted = average.get("num_updates")
    if counted is not None and int(counted) == 0 and any(not torch.equal(*pair) for pair in pairs):
        return True
    return any(not kept.any() and value.any() for kept, value in pairs if kept.is_floating_point())


def averaged(state: Mapping[str, Tensor], names: Iterable[str], source: str | Path) -> dict[str, Tensor]:
    """A diffusion model's weights, those of its network averaged where there are averages that were updated.

    Args:
        state: of a checkpoint, averages among it.
        names: of the weights of which averages are looked for.

    >>> averaged({"model.a.b": torch.zeros(1), "model_ema.ab": torch.ones(1)}, ["model.a.b"], "model.ckpt")
    {'model.a.b': tensor([1.])}
    """
    found = {name: value for name, value in state.items() if not name.startswith(AVERAGE)}
    average = {name.removeprefix(AVERAGE): value for name, value in state.items() if name.startswith(AVERAGE)}
    raw = {name.removeprefix(NETWORK): value for name, value in state.items() if name.startswith(NETWORK)}
    if average and never_updated(average, raw):
        note(f"the averaged weights in {source} {STALE}")
    elif average:
        flat = {name: name.removeprefix(NETWORK).replace(".", "") for name in names if name.startswith(NETWORK)}
        found |= {name: average[key] for name, key in flat.items() if key in average}
    return found


def state_sha256(network: nn.Module) -> str:
    """SHA-256 of a module's weights and buffers: names, types, shapes and values.

    >>> state_sha256(nn.Identity())[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(np.asarray(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)).tobytes())
    return digest.hexdigest()
