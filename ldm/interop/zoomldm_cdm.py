"""ZoomLDM's conditioning model (arXiv:2411.16969, section 3.3): a DiT over the tokens that condition an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.interop import targets
from ldm.interop.checkpoint import state_dict_of
from ldm.interop.compvis_conditions import Published, class_embedder
from ldm.interop.converted import Converted
from ldm.interop.forms import weights_in
from ldm.interop.sit import LABELS
from ldm.interop.transformers import averaged_or_raw, complete, settings_of, transformer

MARKS = {"x_embedder.bias", "blocks.0.adaLN_modulation.1.bias", "final_layer.linear.bias"}
SCHEDULE = {"parameterization": "x0", "beta_schedule": "cosine", "timesteps": 1000, "learn_sigma": True}


def is_cdm(path: Path, content: Any) -> bool:
    """Whether a file holds a transformer with a modulation of its own in each block, over a sequence.

    >>> is_cdm(Path("0000010.pt"), {"model": {"x_embedder.bias": None}})
    False
    """
    return content is not None and MARKS <= set(map(str, weights_in(content)))


def read_cdm(
    path: Path,
    content: Any,
    *,
    config: str | Path | None = None,
    classes: Sequence[str] | None = None,
    raw_weights: bool = False,
) -> Converted:
    """A model of the 65 tokens (C,65) of an image of a magnification, the magnification's own the first.

    classes: names of the magnifications. config: YAML with num_heads. What it samples is ZoomLDM's context as it is.

    >>> from ldm.interop.transformers import HEADS
    >>> HEADS[768]  # attention heads, by width, where no config says them
    12
    """
    found = Converted({}, {})
    average = content.get("ema") or {}
    weights = averaged_or_raw(average, state_dict_of(content, path), raw_weights, found)
    params = transformer(weights, settings_of(config), found, path)
    told = targets.Conditioning("class", {"target": targets.CLASS_EMBEDDER, "params": {
        "dim": params["hidden_size"], "acts": "vector", "key": "magnification",
    }})  # fmt: skip
    label = {"embedding.weight": weights.pop(LABELS)}
    conditioner = class_embedder(Published(told, label, classes, found, path), has_null=False)
    stage = {
        "target": targets.FIRST_STAGES["ldm.models.autoencoder.IdentityFirstStage"],
        "params": {"channels": params["in_channels"]},
    }
    found.notes.append("it makes the tokens that condition ZoomLDM's images, (N,C,65), not images")
    found.metadata["makes"] = "tokens"
    return complete(found, params, weights, SCHEDULE, (stage, {}, {}), conditioner)
