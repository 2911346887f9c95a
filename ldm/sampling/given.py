"""What Python callers give, in the form that sampling works on; the commonest mistakes are told with the right call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ldm.conditioners.compose import keys_of
from ldm.errors import UserError
from ldm.sampling.sampler import Inversion, Sampler, Windows

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion


Settings = TypeVar("Settings", Sampler, Windows, Inversion)
_SETTINGS = {"Sampler": "steps=..., seed=...", "Windows": "mode=...", "Inversion": "start=..., strength=..."}
PARTS = ("crossattn", "vector", "concat", "label")  # of a network, which a condition has; not what users name


def tensor_of(values: Any) -> Tensor:
    """A tensor, an array, or nested lists of numbers as a tensor, without gradients.

    >>> tensor_of(np.zeros((2, 3), np.float32)).shape
    torch.Size([2, 3])
    """
    return values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))


def checked_condition(model: LatentDiffusion, cond: Any, name: str = "cond") -> dict[str, Tensor] | None:
    """A condition as `model.condition` gives it, arrays in place of tensors too; None stays None.

    Raises:
        UserError: something else was given, such as features: the message has the right call.

    >>> checked_condition(model, np.zeros((2, 8)))
    Traceback (most recent call last):
    ldm.errors.UserError: cond is an array of shape (2, 8), not a condition; model.condition(features=...) makes ...
    """
    if cond is None:
        return None
    keys = () if model.cond_stage_model is None else model.cond_stage_model.keys
    if isinstance(cond, Mapping) and not any(key in ("features", *keys) and key not in PARTS for key in cond):
        return {part: tensor_of(value) for part, value in cond.items()}
    if isinstance(cond, Mapping):
        what = f"a dict of values ({', '.join(map(str, cond))})"
    else:
        what = f"an array of shape {tuple(cond.shape)}" if hasattr(cond, "shape") else f"{type(cond).__name__} {cond!r}"
    if not keys:
        raise UserError(f"{name} is {what}, but the model is unconditional; leave it out: ldm.sample(model, count=8)")
    known = "features" if keys_of(model.cond_stage_model, "features") else next(iter(keys))
    call = f"model.condition({known}{'_' if known == 'class' else ''}=...)"
    raise UserError(f"{name} is {what}, not a condition; {call} makes one: ldm.sample(model, {call})")


def checked_settings(kind: type[Settings], given: Any) -> Settings:
    """A Sampler, Windows or Inversion that was given, or the usual one for None.

    UserError: something else, such as a number of steps.

    >>> checked_settings(Sampler, 50)
    Traceback (most recent call last):
    ldm.errors.UserError: sampler is ldm.Sampler(steps=..., seed=...), got 50
    """
    if not isinstance(given, kind | None):
        name = kind.__name__
        raise UserError(f"{name.lower()} is ldm.{name}({_SETTINGS[name]}), got {given!r}")
    return given or kind()


def checked_images(images: Any) -> Tensor:
    """Images (N,C,H,W) in [-1,1] as float32; arrays in place of tensors too.

    Raises:
        UserError: another shape, or other values: of 0 to 255 the message has what makes them right.

    >>> checked_images(np.full((1, 3, 8, 8), 200, np.uint8))
    Traceback (most recent call last):
    ldm.errors.UserError: images have values in [-1, 1]; got 200 to 200. Of pixels in 0 to 255, give images / 127.5 - 1.
    """
    images = tensor_of(images)
    if images.ndim != 4 or not images.numel():
        one = "; one image is images[None]" if images.ndim == 3 else ""
        raise UserError(f"images are given as (N,C,H,W); got shape {tuple(images.shape)}{one}.")
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        way = "images.permute(0, 3, 1, 2), of an array images.transpose(0, 3, 1, 2)"
        raise UserError(f"images are given as (N,C,H,W); got shape {tuple(images.shape)}, (N,H,W,C): give {way}.")
    low, high = float(images.min()), float(images.max())
    if not -1.001 <= low <= high <= 1.001 or images.dtype == torch.uint8:  # NaN too
        pixels = " Of pixels in 0 to 255, give images / 127.5 - 1." if 0 <= low <= high <= 255 else ""
        raise UserError(f"images have values in [-1, 1]; got {low:g} to {high:g}.{pixels}")
    return images.float().contiguous()  # another layout in memory would be other rounding
