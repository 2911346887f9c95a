"""Attention heads: what no shape of a weight tells, and is therefore said where a model is converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def heads_told(params: Mapping[str, Any], whose: str) -> str:
    """What is noted of a network's heads, which `whose` says.

    >>> heads_told({"num_heads": 8}, "the config says")
    '8 attention heads, as the config says: no tensor tells'
    >>> heads_told({"num_head_channels": 64}, "the flags say")
    'attention heads of 64 channels, as the flags say: no tensor tells'
    """
    width, count = params.get("num_head_channels", -1), params.get("num_heads", -1)
    told = f"attention heads of {width} channels" if width not in (-1, None) else f"{count} attention heads"
    up = params.get("num_heads_upsample", -1)
    if up not in (-1, None, count) and width in (-1, None):
        told += f" ({up} on the way up)"
    return f"{told}, as {whose}: no tensor tells"
