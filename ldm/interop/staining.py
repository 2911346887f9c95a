"""The flow of PixCell's virtual staining (arXiv:2506.05127), from features of H&E to those of IHC."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.interop.checkpoint import state_dict_of
from ldm.interop.converted import Converted
from ldm.interop.forms import weights_in

TARGET = "ldm.encoders.feature_map.StainingFlow"
MARKS = {"time_embed.0.weight", "input_proj.weight", "res_blocks.0.in_layers.2.weight", "out.2.weight"}


def is_staining(path: Path, content: Any) -> bool:
    """Whether a file holds the flow's network.

    >>> is_staining(Path("her2.pth"), dict.fromkeys(MARKS))
    True
    """
    return content is not None and set(map(str, weights_in(content))) >= MARKS


def read_staining(path: Path, content: Any) -> Converted:
    """A map of features, for `histoldm translate --map-features`. UserError: it maps to features of another size.

    >>> read_staining(Path("her2.pth"), {name: torch.ones(4, 6) for name in MARKS})
    Traceback (most recent call last):
    ldm.errors.UserError: her2.pth maps features of 6 values to 4; a flow is between features of one size.
    """
    state = state_dict_of(content, path)
    width, dim = state["input_proj.weight"].shape
    if (made := len(state["out.2.weight"])) != dim:
        raise UserError(f"{path} maps features of {dim} values to {made}; a flow is between features of one size.")
    params = {
        "dim": dim,
        "width": width,
        "bottleneck": len(state["res_blocks.0.in_layers.2.weight"]),
        "time_dim": len(state["time_embed.0.weight"]),
        "depth": len({found[1] for name in state if (found := re.match(r"res_blocks\.(\d+)\.", name))}),
    }
    notes = ["a map of features: `histoldm translate --map-features` takes the folder"]
    return Converted({"target": TARGET, "params": params}, state, notes=notes)
