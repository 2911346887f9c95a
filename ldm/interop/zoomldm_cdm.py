"""ZoomLDM's conditioning model (arXiv:2411.16969, section 3.3) of the tokens that condition an image: a DiT, or the
transformer of unCLIP's prior."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.interop import targets
from ldm.interop.compvis_conditions import Published, class_embedder
from ldm.interop.converted import Converted
from ldm.interop.sit import LABELS
from ldm.interop.transformers import complete, heads_of, names_in, settings_of, transformer, weights_of

PRIOR, IN = "ldm.networks.prior.PriorTransformer", "model."
MARKS = {"x_embedder.bias", "blocks.0.adaLN_modulation.1.bias", "final_layer.linear.bias"}
PRIOR_MARKS = {"model.positional_embedding", "model.embedding_proj.weight", "cond_proj.weight"}
STATISTICS = ("model.clip_mean", "model.clip_std")
SCHEDULE = {"parameterization": "x0", "beta_schedule": "cosine", "timesteps": 1000}


def is_cdm(path: Path, content: Any) -> bool:
    """Whether a file holds a transformer over a sequence: with a modulation of its own in each block, or unCLIP's.

    >>> is_cdm(Path("0000010.pt"), {"model": {"x_embedder.bias": None}})
    False
    """
    names = names_in(content)
    return names >= MARKS or names >= PRIOR_MARKS


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
    weights = weights_of(content, path, raw_weights, found)
    prior = bool(weights.keys() & PRIOR_MARKS)
    read, labels = (_prior, "cond_proj.weight") if prior else (transformer, LABELS)
    params = read(weights, settings_of(config), found, path)
    told = targets.Conditioning("class", {"target": targets.CLASS_EMBEDDER, "params": {
        "dim": params.get("vector_dim", params["hidden_size"]), "acts": "vector", "key": "magnification",
    }})  # fmt: skip
    label = {"embedding.weight": weights.pop(labels)}
    conditioner = class_embedder(Published(told, label, classes, found, path), has_null=False)
    stage = {
        "target": targets.FIRST_STAGES["ldm.models.autoencoder.IdentityFirstStage"],
        "params": {"channels": params["in_channels"]},
    }
    found.notes.append("it makes the tokens that condition ZoomLDM's images, (N,C,65), not images")
    found.metadata["makes"] = "tokens"
    complete(found, params, weights, SCHEDULE | {"learn_sigma": not prior}, (stage, {}, {}), conditioner)
    if prior:
        found.node["params"]["unet_config"]["target"] = PRIOR
    return found


def _prior(state: dict[str, Tensor], settings: Mapping[str, Any], found: Converted, path: Path) -> dict[str, Any]:
    """Parameters of the PriorTransformer with these weights, which get its own names."""
    for name in STATISTICS:
        if state.pop(name, None) is not None:
            found.unused[name] = "statistics of CLIP's embeddings, by which nothing is scaled here"
    try:
        hidden, channels = state["model.proj_in.weight"].shape
        params = {
            "in_channels": channels,
            "out_channels": len(state["model.proj_to_clip_embeddings.bias"]),
            "image_size": state["model.positional_embedding"].shape[1],
            "vector_dim": state["model.embedding_proj.weight"].shape[1],
            "hidden_size": hidden,
            "depth": len({m[1] for name in state if (m := re.match(r"model\.transformer_blocks\.(\d+)\.", name))}),
            "num_heads": heads_of(hidden, settings, found.notes),
        }
    except KeyError as error:
        raise UserError(f"{path} is no whole transformer of the published kind: it lacks {error}.") from None
    for name in [name for name in state if name.startswith(IN)]:
        state[name.removeprefix(IN)] = state.pop(name)
    return params
