"""Representation autoencoders (RAE, arXiv:2510.11690) and their transformers with a wide head (DiT-DH)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.foreign.paths import only_within
from ldm.interop import targets
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.compvis_conditions import Published, class_embedder
from ldm.interop.converted import Converted
from ldm.interop.diffusers_config import fixed_settings
from ldm.interop.diffusers_folder import json_of, read_own, weights_in_folder
from ldm.interop.transformers import complete, names_in, weights_of

ENCODER, DECODER, STATISTICS = "encoder", "decoder", "stat.pt"
DDT = "ldm.networks.ddt.DDT"
MARKS = {"s_embedder.proj.weight", "s_projector.weight", "final_layer.norm_final.weight"}
LABELS = "y_embedder.embedding_table.weight"
# settings of the encoder's and the decoder's configs: the values at which they are the networks here
ENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("dinov2_with_registers",), "hidden_act": ("gelu",), "use_swiglu_ffn": (False,), "qkv_bias": (True,),
    "layer_norm_eps": (1e-6,), "num_channels": (3,),
}  # fmt: skip
DECODER_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",), "qkv_bias": (True,), "layer_norm_eps": (1e-12,), "num_channels": (3,),
}  # fmt: skip
# beginnings of transformers' names -> ours; of layers, beneath encoder.layer.N and decoder_layers.N
ENCODER_NAMES = {
    "embeddings.cls_token": "cls_token", "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed", "embeddings.patch_embeddings.projection": "proj",
}  # fmt: skip
DECODER_NAMES = {
    "trainable_cls_token": "cls_token", "decoder_pos_embed": "pos_embed", "decoder_embed": "embed",
    "decoder_norm": "norm", "decoder_pred": "pred",
}  # fmt: skip
LAYER = {
    "norm1": "norm1", "norm2": "norm2", "layernorm_before": "norm1", "layernorm_after": "norm2",
    "attention.o_proj": "proj", "attention.output.dense": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2",
    "intermediate.dense": "fc1", "output.dense": "fc2", "layer_scale1.lambda1": "scale1",
    "layer_scale2.lambda1": "scale2",
}  # fmt: skip
LEFT = {
    "embeddings.mask_token": "stood for hidden patches while the encoder was trained",
    "layernorm.weight": "of the last normalisation, which representation autoencoders do without",
    "layernorm.bias": "of the last normalisation, which representation autoencoders do without",
}
QKV = re.compile(r"attention\.(?:attention\.)?(?:(q|k|v)_proj|(query|key|value))")
BLOCK = re.compile(r"(?:encoder\.layer|decoder_layers)\.(\d+)\.(.+)")


def is_rae(path: Path, content: Any) -> bool:
    """Whether a folder holds the parts of a representation autoencoder: encoder/, decoder/ and stat.pt.

    >>> is_rae(Path("rae"), None)
    False
    """
    if content is not None:
        return False
    return all((path / part / "config.json").is_file() for part in (ENCODER, DECODER)) and (path / STATISTICS).is_file()


def read_rae(path: Path, content: Any) -> Converted:
    """The first stage of encoder/ (DINOv2 with registers, as transformers has it), decoder/ (config.json and weights)
    and stat.pt (mean and variance of each channel and place). UserError: settings or tensors that have no place.

    >>> read_rae(Path("rae"), None)
    Traceback (most recent call last):
    ldm.errors.UserError: rae/encoder/config.json does not exist; copy the whole folder.
    """
    found = Converted({}, {})
    with only_within(path):
        told, made = (json_of(path / part / "config.json") for part in (ENCODER, DECODER))
        fixed_settings(told, ENCODER_FIXED, set(told), str(path / ENCODER / "config.json"), [])
        fixed_settings(made, DECODER_FIXED, set(made), str(path / DECODER / "config.json"), [])
        encoder = _named(weights_in_folder(path / ENCODER, found.notes), ENCODER_NAMES, path / ENCODER, found)
        decoder = _named(_decoder_weights(path / DECODER), DECODER_NAMES, path / DECODER, found)
        statistics = state_dict_of(read_checkpoint(path / STATISTICS), path / STATISTICS)
    try:
        params = _parameters(encoder, decoder, statistics)
        heads = {"num_heads": told["num_attention_heads"], "decoder_heads": made["decoder_num_attention_heads"]}
    except (KeyError, IndexError) as error:
        raise UserError(f"{path} is no whole representation autoencoder: it lacks {error}.") from None
    found.node = {"target": targets.REPRESENTATIONS, "params": params | heads}
    found.state = {f"encoder.{name}": value for name, value in encoder.items()}
    found.state |= {f"decoder.{name}": value for name, value in decoder.items()}
    found.state |= {f"latent_{name}": statistics[name] for name in ("mean", "var")}
    return found


def _decoder_weights(folder: Path) -> dict[str, Tensor]:
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".pt", ".pth", ".bin", ".safetensors")]
    if len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} files of weights; leave the decoder's alone there, as model.pt.")
    return state_dict_of(read_checkpoint(files[0]), files[0])


def _parameters(
    encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], statistics: Mapping[str, Tensor]
) -> dict[str, Any]:
    channels, _, patch, _ = encoder["proj.weight"].shape
    return {
        "channels": channels,
        "depth": _blocks(encoder),
        "mlp": len(encoder["blocks.0.fc1.bias"]),
        "patch_size": patch,
        "registers": encoder["register_tokens"].shape[1],
        "positions": math.isqrt(encoder["pos_embed"].shape[1] - 1),
        "grid": statistics["mean"].shape[-1],
        "decoder_size": len(decoder["embed.bias"]),
        "decoder_depth": _blocks(decoder),
        "decoder_mlp": len(decoder["blocks.0.fc1.bias"]),
        "decoder_patch": math.isqrt(len(decoder["pred.bias"]) // 3),
    }


def _blocks(state: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _named(
    state: Mapping[str, Tensor], names: Mapping[str, str], source: Path, found: Converted
) -> dict[str, Tensor]:
    """Tensors by transformers' names, of its fourth or fifth version, under ours; queries, keys and values joined."""
    named: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name in LEFT:
            found.unused[name] = LEFT[name]
            continue
        block = BLOCK.fullmatch(name)
        inner, table, before = (block[2], LAYER, f"blocks.{block[1]}.") if block else (name, names, "")
        module, _, kind = inner.rpartition(".")
        if block and (part := QKV.fullmatch(module)):
            joined.setdefault(f"{before}qkv.{kind}", {})[(part[1] or part[2])[0]] = value
        elif inner in table:  # of tensors that are in no layer
            named[before + table[inner]] = value
        elif module in table:
            named[f"{before}{table[module]}.{kind}"] = value
        else:
            raise UserError(f"{source} holds {name}, which a representation autoencoder does not have.")
    for name, parts in joined.items():
        if len(parts) < 3:
            raise UserError(f"{source} holds {len(parts)} of the 3 tensors that {name} is made of.")
        named[name] = torch.cat([parts[part] for part in "qkv"])
    return named


def is_ddt(path: Path, content: Any) -> bool:
    """Whether a file holds a transformer with a wide head.

    >>> is_ddt(Path("stage2_model.pt"), {"ema": dict.fromkeys(MARKS)})
    True
    """
    return names_in(content) >= MARKS


def read_ddt(
    path: Path,
    content: Any,
    *,
    base: str | Path | None = None,
    classes: Sequence[str] | None = None,
    raw_weights: bool = False,
) -> Converted:
    """DiT-DH, which predicts velocities of a representation autoencoder's latents by class.

    base: the model folder made of that autoencoder. classes: names of the classes, the null not among them.
    UserError: no base, or of other latents; tensors that have no place.

    >>> read_ddt(Path("stage2_model.pt"), {"ema": {"s_embedder.proj.weight": torch.ones(4, 4, 1, 1)}})
    Traceback (most recent call last):
    ldm.errors.UserError: stage2_model.pt has no autoencoder; name the model folder that `histoldm convert` made of ...
    """
    if base is None or not (Path(base) / "config.yaml").is_file():
        raise UserError(
            f"{path} has no autoencoder; name the model folder that `histoldm convert` made of its representation "
            "autoencoder by --base."
        )
    stage = read_own(Path(base))
    if stage.node["target"] != targets.REPRESENTATIONS:
        raise UserError(f"the base {base} is no representation autoencoder, whose latents {path} was trained on.")
    found = Converted({}, {}, {name: stage.metadata[name] for name in ("licence",) if name in stage.metadata})
    weights = weights_of(content, path, raw_weights, found)
    try:
        params = _sizes(weights, found)
        label = {"embedding.weight": weights.pop(LABELS)}
    except KeyError as error:
        raise UserError(f"{path} is no whole transformer with a wide head: it lacks {error}.") from None
    own = (params["in_channels"], params["image_size"])
    latents = (stage.node["params"]["channels"], stage.node["params"]["grid"])
    if own != latents:
        raise UserError(f"{path} takes {own[0]} channels of {own[1]} x {own[1]}, the base {base} has {latents}.")
    node = {"target": targets.CLASS_EMBEDDER, "params": {"dim": params["hidden_size"][0], "acts": "vector"}}
    published = Published(targets.Conditioning("class", node), label, classes, found, path)
    shift = math.sqrt(params["in_channels"] * params["image_size"] ** 2 / 4096)
    found.notes.append(f"noise levels are shifted by {shift:.4g}, as published for latents of this size")
    flow = {"parameterization": "flow", "time_shift": shift}
    conditioner = class_embedder(published, has_null=True)
    found = complete(found, params, weights, flow, (stage.node, stage.state, {}), conditioner)
    found.node["params"]["unet_config"]["target"] = DDT
    return found


def _sizes(state: dict[str, Tensor], found: Converted) -> dict[str, Any]:
    """Parameters of the network; fixed positions go from `state` to `found.positions`, what is computed is left."""
    wide, channels, patch, _ = state["x_embedder.proj.weight"].shape
    deep = len(state["s_embedder.proj.weight"])
    table = found.positions = state.pop("pos_embed")
    found.unused["pos_embed"] = "positions, which are computed, and were found to be equal"
    heads = []
    for part, width in (("enc", deep), ("dec", wide)):
        turns = [f"{part}_feat_rope.freqs_{wave}" for wave in ("cos", "sin")]
        heads.append(width // state[turns[0]].shape[1])
        for name in turns:
            del state[name]
            found.unused[name] = "turns of rotary positions, which are computed"
    widths = [len(state[f"blocks.{i}.norm1.weight"]) for i in range(_blocks(state))]
    if deep == wide:
        raise UserError("the network is as wide in its head as before; no tensor tells where that begins.")
    return {
        "in_channels": channels,
        "out_channels": len(state["final_layer.linear.bias"]) // patch**2,
        "image_size": math.isqrt(table.shape[1]) * patch,
        "patch_size": patch,
        "hidden_size": [deep, wide],
        "depth": [widths.count(deep), widths.count(wide)],
        "num_heads": heads,
        "mlp_ratio": 4.0,
    }
