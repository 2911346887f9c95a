"""Networks that timm knows by name, untrained; what a config of others says of one is its shape and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from ldm.errors import UserError, suggest
from ldm.foreign.modules import made
from ldm.foreign.shape import MAPPING, check_shape

# what `timm.create_model` takes beside a network's own arguments: files, downloads, tracing
OUTSIDE = (
    "cache_dir", "checkpoint_path", "exportable", "no_jit", "num_classes", "pretrained", "pretrained_cfg",
    "pretrained_cfg_overlay", "pretrained_custom_load", "pretrained_strict", "scriptable",
)  # fmt: skip


def make_network(arch: str, outputs: int, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """An untrained timm network with so many outputs; 0 is one without a head. Nothing is read or downloaded.

    UserError: a name that timm does not have, arguments that are none of the network's.

    >>> make_network("resnet10t", 3).eval()(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 3])
    >>> make_network("resnet10t", 3, {"checkpoint_path": "weights.pth"})
    Traceback (most recent call last):
    ldm.errors.UserError: resnet10t: 'checkpoint_path' is no argument of a network but says where weights are; ...
    """
    check_shape(kwargs or {}, MAPPING, f"{arch}: the arguments of the network")
    kwargs = dict(kwargs or {})
    if not isinstance(arch, str) or not timm.is_model(arch):
        raise UserError(f"timm has no network '{arch}'{suggest(str(arch), timm.list_models())}")
    if strange := sorted(set(kwargs) & set(OUTSIDE)):
        raise UserError(
            f"{arch}: '{strange[0]}' is no argument of a network but says where weights are; leave it out: weights are "
            "read from the file beside the config alone."
        )
    try:
        return made(lambda: timm.create_model(arch, pretrained=False, num_classes=outputs, **kwargs))
    except UserError:
        raise
    except Exception as error:  # networks raise whatever they stumble over in arguments of the wrong kind
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"timm cannot make {arch} with {kwargs}: {reason}") from error
