"""Tensors of published transformers (PixArt, SiT, DiT): the sizes that shapes tell, and what no tensor does."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import foreign_config
from ldm.errors import UserError, suggest
from ldm.interop.checkpoint import state_dict_of
from ldm.interop.converted import Converted
from ldm.interop.forms import weights_in
from ldm.interop.heads import heads_told

DIT = "ldm.networks.dit.DiT"
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published sizes S, B, L, XL, by width
PREDICTIONS = ("eps", "velocity")
SETTINGS = ("num_heads", "prediction")
NETWORK = "model.diffusion_model."


def settings_of(config: str | Path | None) -> dict[str, Any]:
    """What a user says of a transformer that its tensors do not: `num_heads`, `prediction`. UserError: anything else.

    >>> _ = Path("flags.yaml").write_text("num_heads: 2")
    >>> settings_of("flags.yaml")
    {'num_heads': 2}
    """
    given = foreign_config(Path(config)) if config else {}
    for name in given:
        if name not in SETTINGS:
            raise UserError(f"{config}: a transformer is told {' and '.join(SETTINGS)}{suggest(str(name), SETTINGS)}")
    heads, prediction = given.get("num_heads", 1), given.get("prediction", PREDICTIONS[0])
    if not isinstance(heads, int) or heads < 1:
        raise UserError(f"{config}: num_heads is a whole number, 1 or more; got {heads!r}.")
    if prediction not in PREDICTIONS:
        raise UserError(f"{config}: prediction is one of {', '.join(PREDICTIONS)}; got {prediction!r}.")
    return given


def transformer(state: dict[str, Tensor], settings: Mapping[str, Any], found: Converted, path: Path) -> dict[str, Any]:
    """Parameters of the DiT with these weights, whose fixed positions go from `state` to `found.positions`.

    UserError: a tensor that tells them is missing, a number of heads that is not known.

    >>> transformer({}, {}, Converted({}, {}), Path("sit.pt"))
    Traceback (most recent call last):
    ldm.errors.UserError: sit.pt is no whole transformer of the published kind: it lacks 'x_embedder.weight'.
    """
    try:
        return _parameters(state, settings, found)
    except (KeyError, IndexError) as error:
        raise UserError(f"{path} is no whole transformer of the published kind: it lacks {error}.") from None


def _parameters(state: dict[str, Tensor], settings: Mapping[str, Any], found: Converted) -> dict[str, Any]:
    patched = "x_embedder.proj.weight" in state
    embedder = state["x_embedder.proj.weight" if patched else "x_embedder.weight"]
    hidden, channels = embedder.shape[:2]
    patch = embedder.shape[-1] if patched else 0
    depth = 1 + max((int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    params: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": len(state["final_layer.linear.bias"]) // max(patch, 1) ** 2,
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads_of(hidden, settings, found.notes),
        "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / hidden,
    }
    if "t_block.1.bias" in state:
        params["modulation"] = "shared"
    if "y_embedder.y_proj.fc1.weight" in state:
        params["context_dim"] = state["y_embedder.y_proj.fc1.weight"].shape[1]
    if "blocks.0.attn.q_norm.weight" in state:
        params["qk_norm"] = "layer" if "blocks.0.attn.q_norm.bias" in state else "rms"
    if "pos_embed" in state:
        table = found.positions = state.pop("pos_embed")
        found.unused["pos_embed"] = "positions, which are computed, and were found to be equal"
        count = table.shape[1]
        params["image_size"] = math.isqrt(count) * patch if patched else count
        if patched and (scale := _scale(table)) != 1:
            params["position_scale"] = scale
    return params


def heads_of(hidden: int, settings: Mapping[str, Any], notes: list[str]) -> int:
    """The number of attention heads, of the config or of the published transformers of a width; said in `notes`.

    UserError: neither knows it.

    >>> heads_of(1024, {}, notes := []), notes[0]
    (16, '16 attention heads, as published transformers of width 1024 have: no tensor tells')
    """
    heads = settings.get("num_heads") or HEADS.get(hidden)
    if heads is None:
        raise UserError(
            f"no tensor tells the number of attention heads, and no published transformer has a width of {hidden}: "
            "give --config with a YAML that says it, as num_heads: 16."
        )
    whose = "the config says" if "num_heads" in settings else f"published transformers of width {hidden} have"
    notes.append(heads_told({"num_heads": heads}, whose))
    return heads


def _scale(table: Tensor) -> float:
    """What positions (1,N,D) of an image were divided by, from those of the second token, one column to the right."""
    columns = table[0, 1, : table.shape[-1] // 2].double()
    sines, cosines = columns.chunk(2)
    slow = len(sines) // 2  # turns so little that it is below pi for all scales above 1/100
    turn = float(torch.atan2(sines[slow], cosines[slow])) * 10000 ** (slow / len(sines))
    return float(f"{1 / turn:.4g}") if turn > 0 else 1.0


def average_in(content: Any) -> Mapping[str, Tensor]:
    """The averaged weights in the content of a checkpoint {model, ema, ...}; empty if there are none.

    >>> average_in({"ema": {"a": torch.ones(1)}, "args": None})
    {'a': tensor([1.])}
    """
    average = content.get("ema") if isinstance(content, Mapping) else None
    return average if isinstance(average, Mapping) else {}


def names_in(content: Any) -> set[str]:
    """Names of the weights in a checkpoint's content, of the averaged ones where it has any; of a folder's, none.

    >>> names_in({"ema": {"a": torch.ones(1)}, "args": None})
    {'a'}
    """
    return set(map(str, average_in(content) or weights_in(content)))


def weights_of(content: Any, path: Path, raw_weights: bool, found: Converted) -> dict[str, Tensor]:
    """The weights of a checkpoint {model, ema, ...}, of which one may be all there is. UserError: there are none.

    >>> weights_of({"ema": {"a": torch.ones(1)}, "args": None}, Path("sit.pt"), False, Converted({}, {}))
    {'a': tensor([1.])}
    """
    average = average_in(content)
    raw = state_dict_of(content, path) if not average or content.get("model") else {}
    return averaged_or_raw(average, raw, raw_weights, found)


def averaged_or_raw(
    average: Mapping[str, Tensor], raw: Mapping[str, Tensor], raw_weights: bool, found: Converted
) -> dict[str, Tensor]:
    """Weights of a checkpoint that holds both beside each other: the averages, unless the raw ones are asked for.

    >>> averaged_or_raw({"a": torch.ones(1)}, {"a": torch.zeros(1)}, False, Converted({}, {}))
    {'a': tensor([1.])}
    """
    if raw_weights and raw:
        found.unused |= {f"averages: {name}": "averaged weights; raw ones were asked for" for name in average}
        return dict(raw)
    if not average:
        found.notes.append("the checkpoint does not say whether its weights are averages; they are all there is")
        return dict(raw)
    why = "weights of the last step; the averaged ones are taken (--raw-weights: these)"
    found.unused |= {f"last step: {name}": why for name in raw}
    return dict(average)


def complete(
    found: Converted,
    network: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    diffusion: Mapping[str, Any],
    first_stage: tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]],
    conditioner: tuple[dict[str, Any], dict[str, Tensor]] | None,
) -> Converted:
    """Fill `found` with a diffusion model of these parts.

    diffusion: its parameterisation and noise table. first_stage: its node, weights, scale and shift of latents.

    >>> stage = ({"target": "ldm.autoencoder.autoencoder.IdentityFirstStage", "params": {}}, {}, {"scale_factor": 0.5})
    >>> found = complete(Converted({}, {}), {}, {"a": torch.ones(1)}, {"parameterization": "flow"}, stage, None)
    >>> list(found.state), found.node["params"]["scale_factor"]
    (['model.diffusion_model.a'], 0.5)
    """
    node, stage, scale = first_stage
    found.state = {NETWORK + name: value for name, value in weights.items()}
    found.state |= {f"first_stage_model.{name}": value for name, value in stage.items()}
    params: dict[str, Any] = {
        **diffusion,
        **scale,
        "use_ema": False,
        "unet_config": {"target": DIT, "params": dict(network)},
        "first_stage_config": node,
    }
    if conditioner is not None:
        params["cond_stage_config"] = conditioner[0]
        found.state |= {f"cond_stage_model.{name}": value for name, value in conditioner[1].items()}
    found.node = {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params}
    return found
