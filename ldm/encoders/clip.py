"""CLIP as an extractor: its image tower for CMMD, both towers for the CLIP score. Weights are read from disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from torch import Tensor

from ldm.encoders.extractors import Extractor, to_signed
from ldm.errors import UserError
from ldm.files import sha256
from ldm.foreign.modules import as_large_as, made
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.text_names import is_transformers, to_open_clip
from ldm.interop.weights import check_finite

VISION = "vision_model."
STEM = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
}
NORMS = {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel of transformers, both towers and their projections, under open_clip's names."""
    named = {"logit_scale": state["logit_scale"], "text_projection": state["text_projection.weight"].T}
    named["visual.proj"] = state["visual_projection.weight"].T
    named |= to_open_clip(state)
    vision = {name.removeprefix(VISION): value for name, value in state.items() if name.startswith(VISION)}
    layers = {name: value for name, value in vision.items() if name.startswith("encoder.layers.")}
    # the blocks of both towers are alike: read these as a text tower's, around a stem that one must have
    stem = {"embeddings.token_embedding.weight": torch.empty(0), "final_layer_norm.weight": torch.empty(0)}
    blocks = to_open_clip(layers | stem)
    named |= {f"visual.{name}": value for name, value in blocks.items() if name.startswith("transformer.")}
    for theirs, ours in STEM.items():
        named[f"visual.{ours}"] = vision[theirs]
    for theirs, ours in NORMS.items():
        named |= {f"visual.{ours}.{part}": vision[f"{theirs}.{part}"] for part in ("weight", "bias")}
    return named


def load_clip(name: str, config: Mapping[str, Any], weights: Path, device: str = "cpu", licence: str = "") -> Extractor:
    """CLIP as an extractor of features of unit length.

    config: open_clip's model config, with `vision_cfg`. weights: its checkpoint, in open_clip's or transformers' names.
    UserError: no image tower in either, weights of another model.

    >>> config = {"embed_dim": 8, "vision_cfg": {"width": 8}}
    >>> load_clip("tiny", config, Path("tiny.pt"))
    Traceback (most recent call last):
    ldm.errors.UserError: the CLIP model 'tiny' has no text_cfg in its config, so its image tower is unknown.
    """
    for part in ("vision_cfg", "text_cfg", "embed_dim"):
        if part not in config:
            raise UserError(f"the CLIP model '{name}' has no {part} in its config, so its image tower is unknown.")
    state = state_dict_of(read_checkpoint(weights), weights)
    vision, text, quick = dict(config["vision_cfg"]), dict(config["text_cfg"]), bool(config.get("quick_gelu"))
    with as_large_as(state, f"the CLIP model '{name}'"):
        network = made(lambda: CLIP(config["embed_dim"], dict(vision), dict(text), quick_gelu=quick))
    try:
        state = _from_transformers(state) if is_transformers(state) and "visual.proj" not in state else state
    except KeyError as error:
        raise UserError(f"{weights} does not hold the CLIP model '{name}': {error.args[0]} is missing.") from error
    wanted = network.state_dict()
    for key, value in wanted.items():
        if key not in state or state[key].shape != value.shape:
            found = tuple(state[key].shape) if key in state else "missing"
            misfit = f"{key} is {found}, not {tuple(value.shape)}"
            raise UserError(f"{weights} does not hold the CLIP model '{name}': {misfit}.")
    taken = {key: state[key].float() for key in wanted}
    check_finite(taken, weights)
    network.load_state_dict(taken)
    network = network.to(device).eval().requires_grad_(False)
    side = network.visual.image_size
    side = side if isinstance(side, int) else side[0]
    mean, std = (
        torch.tensor(config.get(key) or default, device=device)[:, None, None]
        for key, default in (("mean", OPENAI_DATASET_MEAN), ("std", OPENAI_DATASET_STD))
    )

    def features(images: Tensor) -> Tensor:
        scaled = F.interpolate(to_signed(images), (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        return network.encode_image(((scaled + 1) / 2 - mean) / std, normalize=True)

    def words(captions: list[str]) -> np.ndarray:
        tokens = open_clip.SimpleTokenizer(context_length=network.context_length)
        with torch.inference_mode():
            parts = [tokens(captions[i : i + 256]).to(device) for i in range(0, len(captions), 256)]
            return torch.cat([network.encode_text(ids, normalize=True).cpu() for ids in parts]).numpy()

    about = {
        "extractor": f"clip:{name}",
        "weights_sha256": sha256(weights),
        "resize": f"bicubic to {side} px",
        "licence": licence,
    }
    return Extractor(f"clip:{name}", config["embed_dim"], features, about, device, words)
