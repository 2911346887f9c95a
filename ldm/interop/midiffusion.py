"""Checkpoints of MIDiffusion (IEEE TMI 2024): a list of weights, optimizer, epoch, step and averaged weights, of the
DDPM UNet or the guided-diffusion one, which see a source image through its LMI maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config import foreign_config
from ldm.errors import UserError, suggest
from ldm.interop.converted import Converted
from ldm.interop.guided import heads_of, unet_shape
from ldm.interop.heads import heads_told

DDPM, ADM = "temb.dense.0.weight", "time_embed.0.weight"  # names that only the one or the other UNet has
UNUSED_WEIGHTS = ("logvar",)  # of its "bayesian" kind, which uses it nowhere
# What weights do not show, by section of the published YAML, as in IXI.yml and in the training commands. Its other
# settings are of training, or stand in the weights.
DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {"image_size": 128, "rescaled": False, "logit_transform": False},
    "model": {
        "dropout": 0.0, "var_type": "fixedlarge", "geo_patch_sz": 3, "MIsigma": 2, "MInormalization": True,
        "num_heads": 1, "num_heads_upsample": -1, "num_head_channels": -1, "use_new_attention_order": False,
    },
    "diffusion": {
        "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "num_diffusion_timesteps": 1000,
    },
}  # fmt: skip
ARGUMENTS = "create_model_args"  # section of what the guided-diffusion UNet was built with
CREATE_MODEL = (
    "image_size", "num_in_channels", "num_channels", "num_res_blocks", "channel_mult", "learn_sigma", "class_cond",
    "use_checkpoint", "attention_resolutions", "num_heads", "num_head_channels", "num_heads_upsample",
    "use_scale_shift_norm", "dropout", "resblock_updown", "use_fp16", "use_new_attention_order",
)  # fmt: skip
SECTIONS = (*DEFAULTS, ARGUMENTS, "training", "sampling", "optim", "device")
SCHEDULES = {"linear": "sqrt_linear", "quad": "linear"}  # theirs -> ours


def is_midiffusion(path: Path, content: Any) -> bool:
    """Whether a checkpoint is a list of weights of one of the UNets, optimizer, epoch and step, or the DDPM UNet's
    weights alone.

    >>> is_midiffusion(Path("ckpt.pth"), {"temb.dense.0.weight": torch.ones(1)})
    True
    """
    if isinstance(content, Mapping):
        return DDPM in _names(content)
    if not isinstance(content, Sequence) or isinstance(content, str) or len(content) < 4:
        return False
    return isinstance(content[0], Mapping) and bool({DDPM, ADM} & set(_names(content[0])))


def read_midiffusion(
    path: Path, content: Any, *, config: str | Path | None = None, raw_weights: bool = False
) -> Converted:
    """The model of a checkpoint, its averaged weights where it has them.

    config: the published YAML (sections data, model, diffusion). Without it the settings of IXI are taken. What the
        guided-diffusion UNet was built with beyond that (num_heads, num_head_channels, use_new_attention_order) stands
        in a section `create_model_args`, or is the whole YAML.
    UserError: settings that the weights contradict, or that have no counterpart here.

    >>> from ldm.interop.checkpoint import read_checkpoint
    >>> path = published / "more" / "mid_ddpm_model" / "ckpt.pth"
    >>> read_midiffusion(path, read_checkpoint(path)).metadata
    {'variance': 'fixedlarge'}
    """
    found = Converted({}, {})
    settings = _settings(config, found)
    weights = _weights(content, found, raw_weights)
    network = _ddpm(weights, settings) if DDPM in weights else _adm(weights, settings)
    params = network["params"]
    out = params["out_ch"] if DDPM in weights else params["out_channels"]
    side = params["image_size"]
    if params["in_channels"] not in (out, 3 * out):
        raise UserError(
            f"{path}: a network from {params['in_channels']} to {out} channels is none of MIDiffusion's that can be "
            f"sampled: an image and two maps of it ({3 * out}), or the image alone ({out})."
        )
    guided = params["in_channels"] == 3 * out
    if DDPM not in weights:
        found.notes.append(heads_told(settings["model"], "the config says" if config else "published"))
    if guided:
        model = settings["model"]
        network = {
            "target": "ldm.networks.lmi.LMIUNet",
            "params": {
                "patch": model["geo_patch_sz"],
                "bins": model["geo_patch_sz"] ** 3,
                "sigma": float(model["MIsigma"]),
                "normalized": model["MInormalization"],
                "unit": True,
                "unet": network,
            },
        }
        found.notes.append("images in [0, 1] and no clipping on the way, as published: sample at guidance scale 1")
    prefix = "model.diffusion_model." + ("unet." if guided else "")
    found.state = {prefix + name: value for name, value in weights.items()}
    found.metadata["variance"] = settings["model"]["var_type"]
    found.node = {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "parameterization": "eps",
            **_schedule(settings["diffusion"]),
            "weight_decay": 0.0,
            "use_ema": False,
            "unet_config": network,
            "first_stage_config": {
                "target": "ldm.autoencoder.autoencoder.UnitFirstStage",
                "params": {"channels": out},
            },
            **({"cond_stage_config": _source_image(side, out)} if guided else {}),
        },
    }
    if guided:
        found.state["cond_stage_model.blank"] = next(iter(weights.values())).new_zeros(1, out, side, side)
    return found


def _source_image(side: int, channels: int) -> dict[str, Any]:
    target = "ldm.conditioners.source_image.SourceImage"
    return {"target": target, "params": {"size": side, "channels": channels, "key": "image"}}


def _names(state: Mapping[Any, Any]) -> dict[str, Any]:
    """The tensors of a state dict."""
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _weights(content: Any, found: Converted, raw_weights: bool) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        found.notes.append("the checkpoint does not say whether its weights are averages; they are all there is")
        return _used(_names(content), found)
    raw = _names(content[0])
    found.unused["[1]"] = "state of the training's optimizer"
    average = _names(content[4]) if len(content) > 4 and isinstance(content[4], Mapping) else {}
    if not average:
        if not raw_weights:
            found.notes.append("the checkpoint has no averaged weights; those of its last step are taken")
        return _used(raw, found)
    if set(average) != set(raw):
        lone = sorted(set(average) ^ set(raw))
        raise UserError(f"{len(lone)} weights are not both averaged and as trained (first: {lone[0]}).")
    if raw_weights:
        found.unused |= {f"[4] {name}": "averaged weights; raw ones were asked for" for name in content[4]}
        return _used(raw, found)
    why = "weights of the last step; the averaged ones are taken (--raw-weights: these)"
    found.unused |= {f"[0] {name}": why for name in content[0]}
    return _used(average, found)


def _used(weights: dict[str, Tensor], found: Converted) -> dict[str, Tensor]:
    for name in UNUSED_WEIGHTS:
        if weights.pop(name, None) is not None:
            found.unused[name] = "used nowhere in the published code"
    return weights


def _settings(config: str | Path | None, found: Converted) -> dict[str, dict[str, Any]]:
    """Sections of settings, the config's over the published ones."""
    given = foreign_config(config) if config else {}
    if given and not set(given) & set(SECTIONS):  # the arguments alone
        given = {ARGUMENTS: given}
    for name, section in given.items():
        if name not in SECTIONS:
            raise UserError(f"{config}: '{name}' is no section of MIDiffusion's YAML{suggest(name, SECTIONS)}")
        if name != "device" and not isinstance(section, Mapping):
            raise UserError(f"{config}: section '{name}' holds settings; got {section!r}.")
    settings = {name: {**section, **given.get(name, {})} for name, section in DEFAULTS.items()}
    arguments = given.get(ARGUMENTS, {})
    if strange := [name for name in arguments if name not in CREATE_MODEL]:
        raise UserError(f"{config}: '{strange[0]}' is no section and no setting{suggest(strange[0], CREATE_MODEL)}")
    settings["data"] |= {"image_size": arguments["image_size"]} if "image_size" in arguments else {}
    settings["model"] |= arguments
    if not config:
        found.notes.append(
            "image size 128, one attention head, LMI of 3 px patches with sigma 2, normalized, and 1000 noise levels "
            "linear in beta are taken from the published IXI.yml; the YAML of another training: --config"
        )
    for name in ("rescaled", "logit_transform"):
        if settings["data"][name]:
            raise UserError(f"{config}: data.{name} is true; only images in [0, 1] as they are can be converted.")
    return settings


def _schedule(settings: Mapping[str, Any]) -> dict[str, Any]:
    name = settings["beta_schedule"]
    if name not in SCHEDULES:
        raise UserError(f"the schedule '{name}' has no counterpart here{suggest(name, SCHEDULES)}")
    return {
        "beta_schedule": SCHEDULES[name],
        "timesteps": settings["num_diffusion_timesteps"],
        "linear_start": settings["beta_start"],
        "linear_end": settings["beta_end"],
    }


def _ddpm(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The node of the DDPM UNet; attention is where the weights have it."""
    try:
        ch, in_channels = weights["conv_in.weight"].shape[:2]
        mults, blocks = [], 0
        while (last := weights.get(f"down.{len(mults)}.block.0.conv2.weight")) is not None:
            mults.append(len(last) // ch)
        while f"down.0.block.{blocks}.conv1.weight" in weights:
            blocks += 1
        own = {
            "in_channels": in_channels,
            "out_ch": len(weights["conv_out.weight"]),
            "ch": ch,
            "ch_mult": mults,
            "num_res_blocks": blocks,
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"the weights are of no whole DDPM UNet: they lack {error}.") from error
    model, side = settings["model"], settings["data"]["image_size"]
    attention = [side >> level for level in range(len(mults)) if f"down.{level}.attn.0.q.weight" in weights]
    resample = "down.0.downsample.conv.weight" in weights or len(mults) == 1
    told = {name: value for name, value in model.items() if name != "resamp_with_conv" or len(mults) > 1}
    told |= {"attn_resolutions": sorted(model.get("attn_resolutions", attention), reverse=True)}
    shown = own | {"attn_resolutions": attention, "resamp_with_conv": resample}
    _check(shown, told, {name: name for name in shown})
    return {
        "target": "ldm.networks.ddpm_unet.DDPMUNet",
        "params": {
            **own,
            "image_size": side,
            "attn_resolutions": attention,
            "dropout": model["dropout"],
            "resamp_with_conv": resample,
        },
    }


def _adm(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The node of the guided-diffusion UNet, which is built of image size, channels and blocks alone; its heads and the
    rest are defaults."""
    if "middle_block.0.in_layers.0.weight" not in weights:
        raise UserError("the weights are of no whole guided-diffusion UNet: they lack its middle_block.")
    own, model = unet_shape(weights), settings["model"]
    names = {
        "in_channels": "in_channels",
        "num_in_channels": "in_channels",
        "ch": "model_channels",
        "num_channels": "model_channels",
        "num_res_blocks": "num_res_blocks",
        "channel_mult": "channel_mult",
        "attention_resolutions": "attention_resolutions",
        "use_scale_shift_norm": "use_scale_shift_norm",
        "resblock_updown": "resblock_updown",
        "learn_sigma": "learn_sigma",
        "class_cond": "class_cond",
    }
    outs = (own["in_channels"], own["in_channels"] // 3)  # of images, or of images beside two maps of each
    shown = own | {"learn_sigma": own["out_channels"] not in outs, "class_cond": "label_emb.weight" in weights}
    _check(shown, _arguments(model, settings["data"]["image_size"], len(own["channel_mult"])), names)
    return {
        "target": "ldm.networks.unet.UNetModel",
        "params": {
            **own,
            "image_size": settings["data"]["image_size"],
            **heads_of(model),
            "use_new_attention_order": model["use_new_attention_order"],
        },
    }


def _arguments(model: Mapping[str, Any], side: int, levels: int) -> dict[str, Any]:
    """create_model's arguments as the weights tell them: texts of numbers as lists, sides of maps as factors."""
    told = {name: value for name, value in model.items() if value not in (None, "")}
    if levels == 1:
        told.pop("resblock_updown", None)
    for name in ("channel_mult", "attention_resolutions"):
        if name in told and isinstance(told[name], str):
            numbers = [float(part) for part in told[name].split(",")]
            told[name] = sorted(side // n for n in numbers) if name == "attention_resolutions" else numbers
    if "attention_resolutions" in told:
        told["attention_resolutions"] = [n for n in told["attention_resolutions"] if n <= 2 ** (levels - 1)]
    return told


def _check(own: Mapping[str, Any], told: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """UserError if a setting of the YAML says otherwise than the weights; names: the YAML's -> ours."""
    for name, ours in names.items():
        if name in told and told[name] != own[ours]:
            raise UserError(f"the config says {name} {told[name]}, the weights are of {own[ours]}: another checkpoint?")
