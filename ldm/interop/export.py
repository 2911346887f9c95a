"""What writing model folders in the forms of others shares: refusals, parameters with their defaults, files.

What a form has no counterpart for is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.files import names_in
from ldm.interop import targets
from ldm.interop.converted import Converted

AUTOENCODER_KL = "ldm.autoencoder.autoencoder.AutoencoderKL"
# defaults of our parameters that decide whether there is a counterpart
UNET_DEFAULTS: dict[str, Any] = {
    "channel_mult": [1, 2, 4, 8], "context_dim": None, "conv_resample": True, "dropout": 0.0, "norm_groups": 32,
    "num_classes": None, "num_head_channels": -1, "num_heads": -1, "num_heads_upsample": -1, "resblock_updown": False,
    "transformer_depth": 1, "use_new_attention_order": False, "use_scale_shift_norm": False,
    "use_spatial_transformer": False,
}  # fmt: skip
UNET_NEEDED = (
    "image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions",
)  # fmt: skip
UNET_TRAINING = ("use_checkpoint",)
DIFFUSION_DEFAULTS: dict[str, Any] = {
    "parameterization": "eps", "beta_schedule": "linear", "timesteps": 1000, "linear_start": 1e-4, "linear_end": 2e-2,
    "cosine_s": 8e-3, "learn_sigma": False, "scale_factor": 1.0, "shift_factor": 0.0, "scale_by_std": False,
    "loss_type": "l2", "sigma_data": 1.0, "time_shift": 1.0,
}  # fmt: skip
TEXT_DEFAULTS: dict[str, Any] = {
    "chunks": 1, "context_dim": None, "layer": "last", "layout": "joint", "mask_padding": True, "pad": "eos",
    "prompt": "{text}", "text_only": False,
}  # fmt: skip


def lacks(form: str, what: str) -> UserError:
    """The error of a model with something that a form has no place for.

    >>> print(lacks("CompVis' code", "flow matching"))
    CompVis' code does not have flow matching; the model cannot be written in that form.
    """
    return UserError(f"{form} does not have {what}; the model cannot be written in that form.")


def kind_of(node: Mapping[str, Any]) -> str:
    """The name of a node's class, without its module.

    >>> kind_of({"target": "ldm.networks.unet.UNetModel"})
    'UNetModel'
    """
    return str(node["target"]).rpartition(".")[2]


def with_defaults(params: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the defaults of those that are missing or None.

    >>> with_defaults({"dropout": None, "num_heads": 8}, {"dropout": 0.0})
    {'dropout': 0.0, 'num_heads': 8}
    """
    return {**defaults, **{name: value for name, value in params.items() if value is not None}}


def unet_params(node: Mapping[str, Any], form: str) -> dict[str, Any]:
    """All parameters of a UNetModel that concern its outputs.

    >>> from ldm.interop.diffusers_folder import read_own
    >>> node = read_own(models / "demo-ssl").node["params"]["unet_config"]
    >>> unet_params(node, "diffusers")["norm_groups"]
    32
    """
    if node["target"] != targets.UNET:
        raise lacks(form, f"the network {kind_of(node)}")
    given = {name: value for name, value in node["params"].items() if name not in UNET_TRAINING}
    for name in given:
        if name not in UNET_DEFAULTS and name not in UNET_NEEDED:
            raise lacks(form, f"the UNet's {name}")
    whole = with_defaults(given, UNET_DEFAULTS)
    if whole["use_spatial_transformer"] and whole["num_heads_upsample"] not in (-1, whole["num_heads"]):
        raise lacks(form, "cross-attention of other heads on the way up (num_heads_upsample)")
    return whole


def text_node(node: Mapping[str, Any], model: Converted, form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of a CLIP text condition, and the tower's config. UserError: another condition.

    >>> text_node({"target": "ldm.conditioners.score.ScoreEmbedder"}, Converted({}, {}), "diffusers")
    Traceback (most recent call last):
    ldm.errors.UserError: diffusers does not have the condition ScoreEmbedder; the model cannot be written in that form.
    """
    if node["target"] != targets.TEXT_EMBEDDER:
        raise lacks(form, f"the condition {kind_of(node)}")
    text = with_defaults(node["params"], TEXT_DEFAULTS)
    if text["text_only"]:
        text["prompt"] = "{text}"
    if text["context_dim"] is not None:
        raise lacks(form, "a projection after the text tower (context_dim)")
    file = str(text["model"]).removeprefix("./")
    if file not in model.files:
        raise UserError(f"the model folder lacks the config of its text tower, {text['model']}; copy it whole.")
    config = json.loads(model.files[file])
    if config["text_cfg"].get("hf_model_name"):
        raise lacks(form, f"the text tower {config['text_cfg']['hf_model_name']} (it has CLIP's)")
    return text, config


def layers_of(tower: Mapping[str, Tensor]) -> int:
    """The number of transformer blocks in a text tower.

    >>> layers_of({f"transformer.resblocks.{i}.attn.in_proj_weight": torch.ones(1) for i in range(12)})
    12
    """
    return sum(name.endswith("attn.in_proj_weight") for name in tower)


def part_of(model: Converted, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it.

    >>> part_of(Converted({}, {"model.out.bias": torch.zeros(1), "scale_factor": torch.ones(1)}), "model.")
    {'out.bias': tensor([0.])}
    """
    return {name.removeprefix(prefix): value for name, value in model.state.items() if name.startswith(prefix)}


def apart(state: Mapping[str, Tensor], half: bool = False) -> dict[str, Tensor]:
    """The tensors, in float16 with `half`; one that shares memory with another is copied, as a file holds each alone.

    >>> weight = torch.ones(2)
    >>> tensors = apart({"a": weight, "b": weight})
    >>> tensors["a"].data_ptr() == tensors["b"].data_ptr()
    False
    """
    given, seen = {}, set()
    for name, value in state.items():
        value = (value.half() if half and value.is_floating_point() else value).contiguous()
        memory = value.untyped_storage()
        shared = memory.data_ptr() in seen or memory.nbytes() > value.numel() * value.itemsize
        seen.add(memory.data_ptr())
        given[name] = value.clone() if shared else value
    return given


def check_free(out: Path, mark: str) -> None:
    """UserError unless `out` can be written: nothing is there, or a folder with `mark`, which an export made before.

    >>> Path("notes").mkdir()
    >>> check_free(Path("notes"), "model.ckpt")
    """
    if out.is_file() or (out.is_dir() and not (out / mark).exists() and names_in(out)):
        raise UserError(f"{out} exists and holds something else than a model in this form; name another with --out.")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, and the folders above it.

    >>> write_json(Path("unet/config.json"), {"in_channels": 4})
    >>> print(Path("unet/config.json").read_text())
    {
      "in_channels": 4
    }
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
