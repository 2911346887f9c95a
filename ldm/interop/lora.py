"""LoRA adapters (arXiv:2106.09685) of peft, diffusers, kohya and this toolkit: read, and placed in a network's weights.

An adapter changes the weight of a layer by scale * up @ down, of low rank. Files name layers as the network of their
library does; those names are looked for among ours, directly and by the tables of `diffusers_names`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError, suggest
from ldm.files import sha256
from ldm.foreign.paths import only_within
from ldm.foreign.settings import read_json
from ldm.foreign.shape import ABOVE_0, MAPPING, SIZE, TEXT, check_shape, maybe
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.diffusers_names import unet_modules
from ldm.interop.pixcell import BLOCK, JOINED, MODULES
from ldm.interop.terms import licence_beside
from ldm.interop.weights import AVERAGE, check_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (WEIGHTS, "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
BEFORE = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "lora_unet_")
WAYS = ("lora_", "lora.", "lora_linear_layer.")  # kohya's, diffusers' present and former one
TEXT_TOWERS = ("text_encoder", "lora_te")
DOWN, UP = (
    tuple(f"{form}.weight" for form in (f"lora_{letter}.default", f"lora_{letter}", *(f"{way}{word}" for way in WAYS)))
    for letter, word in (("A", "down"), ("B", "up"))
)
OTHERS = ("hada_", "lokr_", "dora_scale", "lora_magnitude_vector", "lora_mid", "lora_embedding_", "oft_")
PROCESSOR = re.compile(r"\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight$")  # of diffusers before 2023
_CONFIG = {
    "r?": SIZE, "lora_alpha?": ABOVE_0, "rank_pattern?": maybe(MAPPING), "alpha_pattern?": maybe({"*": ABOVE_0}),
    "peft_type?": TEXT, "base_model_name_or_path?": maybe(TEXT), "histoldm?": MAPPING,
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """A layer's change, scale * up @ down: down (r,in,...), up (out,r,...), of a convolution with its sides."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def change(self) -> Tensor:
        """(out, in * sides) float32.

        >>> LowRank(torch.ones(1, 2), torch.ones(3, 1), 0.5).change()[0]
        tensor([0.5000, 0.5000])
        """
        return self.scale * (self.up.flatten(1).float() @ self.down.flatten(1).float())


@dataclass(frozen=True)
class Lora:
    """An adapter as it was read.

    name: of its folder or file. layers: name of a layer, as the file has it -> its change. base: weights of the layers
    before the change, where the file holds them. sha256: of the file. about: what this toolkit said of it. licence:
    what that says, or the card beside it.
    """

    name: str
    layers: dict[str, LowRank]
    sha256: str
    base: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None


@dataclass(frozen=True)
class Placed:
    """The change of a weight of ours by name: of all its rows, or of the part-th of `parts` equal parts of them."""

    weight: str
    low: LowRank
    part: int = 0
    parts: int = 1
    theirs: str = ""


def read_lora(path: str | Path) -> Lora:
    """An adapter from a folder of peft, diffusers or this toolkit, from a file, or from a run folder that trains one.

    UserError: there is none, another kind of adapter, weights of a text tower, tensors that belong to no layer.

    >>> read_lora("no/adapter")
    Traceback (most recent call last):
    ldm.errors.UserError: there is no adapter at no/adapter; give a folder with adapter_model.safetensors, ...
    """
    path = Path(path)
    file = next((path / name for name in (*FILES, "checkpoints/last.ckpt") if (path / name).is_file()), path)
    if not file.is_file():
        raise UserError(f"there is no adapter at {path}; give a folder with {', '.join(FILES)}, or such a file.")
    with only_within(file.parent):
        content = read_checkpoint(file, lora=True)
        config = file.parent / CONFIG
        settings = read_json(config, "the adapter's settings") if config.is_file() else {}
    check_shape(settings, _CONFIG, config)
    if settings.get("peft_type", "LORA") != "LORA" or settings.get("use_dora"):
        kind = "DORA" if settings.get("use_dora") else settings["peft_type"]
        raise UserError(f"{path} is an adapter of the kind {kind}; LoRA alone is supported.")
    about = dict(settings.get("histoldm") or {})
    if isinstance(content, Mapping) and "histoldm_lora" in content:
        about = dict(content["histoldm_lora"])
    state = _trained(state_dict_of(content, file))
    check_finite({name: value for name, value in state.items() if "lora" in name}, file)
    downs, ups, alphas, rest = _sorted(state, path)
    base = {name.replace(".base_layer.", "."): value for name, value in rest.items()}
    if rest and not any(".base_layer." in name for name in rest):
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise UserError(f"{path} holds {next(iter(rest))}{more}, which are no part of a LoRA; nothing was read.")
    if not downs or downs.keys() != ups.keys():
        lone = sorted(downs.keys() ^ ups.keys())
        what = f"one of the two matrices of {lone[0]} alone" if lone else "no matrices of a LoRA"
        raise UserError(f"{path} holds {what}; give an adapter with lora_A and lora_B (or lora_down and lora_up).")
    terms = about.get("licence") if isinstance(about.get("licence"), str) else licence_beside(path)
    layers = {}
    for name, down in downs.items():
        up, rank = ups[name], len(down)
        if up.ndim < 2 or up.shape[1] != rank:
            raise UserError(f"{path}: {name} has matrices {tuple(down.shape)} and {tuple(up.shape)}, which do not fit.")
        alpha = float(alphas[name]) if name in alphas else _alpha(settings, name, rank, about)
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        layers[name] = LowRank(down, up, scale)
    return Lora(path.stem if path.is_file() else path.name, layers, sha256(file), base, about, terms)


def _trained(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter; of a training of this toolkit their averages, where there are any."""
    average = {name.removeprefix(AVERAGE): value for name, value in state.items() if name.startswith(AVERAGE)}
    found = {name: value for name, value in state.items() if not name.startswith((AVERAGE, "repa."))}
    if not average:
        return found
    return {name: average.get(name.removeprefix("model.").replace(".", ""), value) for name, value in found.items()}


def _sorted(
    state: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Matrices down and up and alphas by layer, and what is none of these."""
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    if towers := [name for name in state if name.startswith(TEXT_TOWERS)]:
        raise UserError(
            f"{path} also changes a text tower ({towers[0]} and {len(towers) - 1} more), which stays as it is here; "
            "images would not be those that it was trained for. Give an adapter of the network alone."
        )
    if others := [name for name in state if any(mark in name for mark in OTHERS)]:
        raise UserError(f"{path} holds {others[0]}: another kind of adapter; LoRA alone is supported.")
    for name, value in state.items():
        short = next((name.removeprefix(before) for before in BEFORE if name.startswith(before)), name)
        short = PROCESSOR.sub(lambda found: f".{found[1]}.lora.{found[2]}.weight", short)
        short = short.replace(".to_out.lora.", ".to_out.0.lora.")
        for endings, found in ((DOWN, downs), (UP, ups), (("alpha",), alphas)):
            ending = next((each for each in endings if short.endswith(f".{each}")), None)
            if ending:
                found[short.removesuffix(f".{ending}")] = value
                break
        else:
            rest[short] = value
    return downs, ups, alphas, rest


def _alpha(settings: Mapping[str, Any], name: str, rank: int, about: Mapping[str, Any]) -> float:
    """alpha of a layer by the settings: of its own pattern, of all, or its rank."""
    for part, value in (settings.get("alpha_pattern") or {}).items():  # names; a stranger's pattern is not run
        if re.search(r"[^\w.]", str(part)):
            raise UserError(f"the adapter's alpha_pattern {part!r} is no name of a layer; write names there.")
        if name == part or name.endswith(f".{part}"):
            return float(value)
    return float(settings.get("lora_alpha") or about.get("alpha") or rank)


def placed(lora: Lora, weights: Mapping[str, Tensor]) -> list[Placed]:
    """Where the changes of an adapter lie among a network's weights by name. UserError: one fits nowhere.

    >>> lora = Lora("mine", {"to_q": LowRank(torch.ones(1, 2), torch.ones(3, 1))}, "")
    >>> placed(lora, {"to_q.weight": torch.zeros(3, 2)})[0].weight
    'to_q.weight'
    """
    known = _names(weights)
    flat = {name.replace(".", "_"): name for name in known}
    found = []
    for theirs, low in lora.layers.items():
        name = theirs if theirs in known else flat.get(theirs.replace(".", "_"))
        if name is None:
            raise UserError(
                f"the adapter {lora.name} changes {theirs}, which this network does not have"
                f"{suggest(theirs, known)} It was made for another model."
            )
        weight, part, parts = known[name]
        own = weights[weight]
        rows, values = own.shape[0] // parts, own[0].numel()
        made = (low.up.shape[0], low.down[0].numel())
        if made != (rows, values):
            raise UserError(
                f"the adapter {lora.name} changes {theirs} by {made[0]} x {made[1]} values, and this network has "
                f"{rows} x {values} there; it was made for another model."
            )
        found.append(Placed(weight, low, part, parts, theirs))
    _check_base(lora, known, weights)
    return found


def _names(weights: Mapping[str, Tensor]) -> dict[str, tuple[str, int, int]]:
    """Every name that a layer goes by -> the name of its weight here, and which part of how many it is."""
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    known = {layer: (f"{layer}.weight", 0, 1) for layer in layers}
    if "input_blocks.0.0.weight" in weights:
        for theirs, ours in unet_modules(*_levels(weights)).items():
            for layer in layers:
                if layer == ours or layer.startswith(f"{ours}."):
                    known.setdefault(theirs + layer.removeprefix(ours), (f"{layer}.weight", 0, 1))
    for layer in layers:
        block = re.match(r"blocks\.(\d+)\.(.+)", layer)
        before, table, inner = (f"transformer_blocks.{block[1]}.", BLOCK, block[2]) if block else ("", MODULES, layer)
        known |= {before + theirs: (f"{layer}.weight", 0, 1) for theirs, ours in table.items() if ours == inner}
        parts = JOINED.get(inner, ()) if block else ()
        known |= {before + theirs: (f"{layer}.weight", part, len(parts)) for part, theirs in enumerate(parts)}
    return known


def _levels(names: Iterable[str]) -> tuple[list[bool], int]:
    """Which levels of a UNet have attention, and how many blocks each has, by the names of its weights."""
    held = set(names)
    numbers = {int(name.split(".")[1]) for name in held if name.startswith("input_blocks.")}
    downs = sorted(int(name.split(".")[1]) for name in held if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name))
    blocks = downs[0] - 1 if downs else max(numbers)
    firsts = range(1, max(numbers) + 1, blocks + 1)
    return [any(name.startswith(f"input_blocks.{first}.1.") for name in held) for first in firsts], blocks


def _check_base(lora: Lora, known: Mapping[str, tuple[str, int, int]], weights: Mapping[str, Tensor]) -> None:
    """UserError if the file holds weights of the model that it was trained on, and they are others than these."""
    for name, held in lora.base.items():
        weight, part, parts = known.get(name.removesuffix(".weight"), ("", 0, 1))
        if not weight or not name.endswith(".weight"):
            continue
        own = weights[weight].chunk(parts)[part].detach().cpu().float()
        near = held.numel() == own.numel() and torch.allclose(
            held.float().reshape(own.shape), own, rtol=1e-2, atol=1e-3 * float(own.abs().max())
        )
        if not near:
            raise UserError(
                f"the adapter {lora.name} was trained on other weights of {name.removesuffix('.weight')} than this "
                "model has; give the model that it was trained on."
            )


def to_peft(layers: Mapping[str, LowRank], about: Mapping[str, Any], base: str) -> tuple[dict[str, Tensor], str]:
    """Tensors and the text of the settings of a peft folder. about: rank, alpha and what else is to be remembered.

    >>> layers = {"attn": LowRank(torch.ones(1, 2), torch.ones(3, 1))}
    >>> list(to_peft(layers, {"rank": 1, "alpha": 1}, "my-model")[0])
    ['base_model.model.attn.lora_A.weight', 'base_model.model.attn.lora_B.weight']
    """
    about = {key: value for key, value in about.items() if key != "base"}  # places are private
    state = {}
    for name, low in layers.items():
        state[f"base_model.model.{name}.lora_A.weight"] = low.down
        state[f"base_model.model.{name}.lora_B.weight"] = low.up
    settings = {
        "peft_type": "LORA", "r": about["rank"], "lora_alpha": about["alpha"], "target_modules": sorted(layers),
        "base_model_name_or_path": base, "bias": "none", "inference_mode": True, "histoldm": dict(about),
    }  # fmt: skip
    return state, json.dumps(settings, indent=2) + "\n"
