"""Settings of diffusers' UNet2DConditionModel, AutoencoderKL and schedulers as this toolkit's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.errors import UserError, suggest
from ldm.interop.diffusers_names import unet_modules, vae_modules
from ldm.interop.targets import UNET

# settings of UNet2DConditionModel that its counterpart here has at these values alone
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"), "addition_embed_type": (None,), "attention_type": ("default",),
    "center_input_sample": (False,), "class_embed_type": (None,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
    "cross_attention_norm": (None,), "downsample_padding": (1,), "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,), "flip_sin_to_cos": (True,), "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False), "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "norm_eps": (1e-5,), "num_class_embeds": (None,),
    "only_cross_attention": (False,), "resnet_out_scale_factor": (1,), "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default", "scale_shift"), "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,), "time_embedding_act_fn": (None,), "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}  # fmt: skip
UNET_DEFAULTS: dict[str, Any] = {
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1280,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "dropout": 0.0, "in_channels": 4,
    "layers_per_block": 2, "norm_num_groups": 32, "num_attention_heads": None, "out_channels": 4, "sample_size": None,
    "time_embedding_dim": None, "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
# these change no output, or nothing without others of UNET_FIXED; the second half is of an average's folder
UNET_SILENT = {
    "addition_embed_type_num_heads", "addition_time_embed_dim", "class_embeddings_concat",
    "projection_class_embeddings_input_dim", "upcast_attention", "use_linear_projection",
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
}  # fmt: skip
VAE_DEFAULTS: dict[str, Any] = {
    "block_out_channels": (64,), "down_block_types": ("DownEncoderBlock2D",), "in_channels": 3, "latent_channels": 4,
    "layers_per_block": 1, "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 32, "scaling_factor": 0.18215, "up_block_types": ("UpDecoderBlock2D",),
    "latents_mean": None, "latents_std": None, "shift_factor": None,
    "use_post_quant_conv": True, "use_quant_conv": True,
}  # fmt: skip
VAE_SILENT = {"force_upcast"}
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULER_DEFAULTS: dict[str, Any] = {
    "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "trained_betas": None,
}  # fmt: skip


def unet_node(config: Mapping[str, Any], where: str, notes: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The node of a UNet2DConditionModel's config, and diffusers' name -> ours of its modules.

    attention_head_dim of these configs is the number of heads, whatever its name. UserError: a setting that has no
    counterpart here.

    >>> node, modules = unet_node({}, "unet/config.json", [])
    >>> node["params"]["channel_mult"], modules["mid_block.resnets.1.conv2"]
    ([1, 2, 4, 4], 'middle_block.2.out_layers.3')
    """
    c = _settings(config, UNET_DEFAULTS, UNET_FIXED, UNET_SILENT, where, notes)
    mult = _multiples(c["block_out_channels"], where)
    attention = [_kind(kind, "CrossAttnDownBlock2D", "DownBlock2D", where) for kind in c["down_block_types"]]
    up = [_kind(kind, "CrossAttnUpBlock2D", "UpBlock2D", where) for kind in c["up_block_types"]]
    if len(attention) != len(mult) or up != attention[::-1]:
        raise UserError(f"{where}: the up_block_types do not mirror the down_block_types, one for each level.")
    width, blocks = c["block_out_channels"][0], _one(c, "layers_per_block", where)
    if c["time_embedding_dim"] not in (None, 4 * width):
        raise UserError(f"{where}: time_embedding_dim is {c['time_embedding_dim']}; supported is {4 * width}.")
    size = c["sample_size"]
    params = {
        "image_size": max(size) if isinstance(size, list) else size,
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "model_channels": width,
        "num_res_blocks": blocks,
        "attention_resolutions": [2**level for level, attends in enumerate(attention) if attends],
        "channel_mult": mult,
        "dropout": c["dropout"],
        **_heads(c, attention, where),
        "use_spatial_transformer": True,
        "transformer_depth": _one(c, "transformer_layers_per_block", where),
        "context_dim": _one(c, "cross_attention_dim", where),
        "use_scale_shift_norm": c["resnet_time_scale_shift"] == "scale_shift",
        "norm_groups": c["norm_num_groups"],
    }
    return {"target": UNET, "params": params}, unet_modules(attention, blocks)


def _heads(c: Mapping[str, Any], attention: Sequence[bool], where: str) -> dict[str, int]:
    """num_heads or num_head_channels of a UNet whose levels may differ in the number of heads."""
    given = c["num_attention_heads"] or c["attention_head_dim"]
    widths = c["block_out_channels"]
    heads = list(given) if isinstance(given, (list, tuple)) else [given] * len(widths)
    used = {(heads[i], widths[i]) for i in range(len(widths)) if attention[i] or i == len(widths) - 1}
    if len({count for count, _ in used}) == 1:
        return {"num_heads": heads[-1]}
    if len({width / count for count, width in used}) == 1:
        return {"num_head_channels": widths[-1] // heads[-1]}
    raise UserError(f"{where}: levels differ both in number and in width of attention heads ({given}).")


def vae_node(
    config: Mapping[str, Any], where: str, notes: list[str]
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """The node of an AutoencoderKL's config, diffusers' name -> ours of its modules, and scale and shift of latents.

    >>> node, modules, scale = vae_node({"shift_factor": 0.0609}, "vae/config.json", [])
    >>> node["params"]["ddconfig"]["ch"], scale
    (64, {'scale_factor': 0.18215, 'shift_factor': 0.0609})
    """
    c = _settings(config, VAE_DEFAULTS, VAE_FIXED, VAE_SILENT, where, notes)
    mult = _multiples(c["block_out_channels"], where)
    attention = [_kind(kind, "AttnDownEncoderBlock2D", "DownEncoderBlock2D", where) for kind in c["down_block_types"]]
    up = [_kind(kind, "AttnUpDecoderBlock2D", "UpDecoderBlock2D", where) for kind in c["up_block_types"]]
    if len(attention) != len(mult) or up != attention[::-1]:
        raise UserError(f"{where}: the up_block_types do not mirror the down_block_types, one for each level.")
    size, blocks = c["sample_size"], _one(c, "layers_per_block", where)
    size = max(max(size) if isinstance(size, list) else size, 2 ** len(mult))
    ddconfig = {
        "double_z": True,
        "z_channels": c["latent_channels"],
        "resolution": size,
        "in_channels": c["in_channels"],
        "out_ch": c["out_channels"],
        "ch": c["block_out_channels"][0],
        "ch_mult": mult,
        "num_res_blocks": blocks,
        "attn_resolutions": [size // 2**level for level, attends in enumerate(attention) if attends],
        "dropout": 0.0,
        "mid_attention": c["mid_block_add_attention"],
        "num_groups": c["norm_num_groups"],
    }
    params = {"embed_dim": c["latent_channels"], "ddconfig": ddconfig}
    if c["use_quant_conv"] != c["use_post_quant_conv"]:
        raise UserError(f"{where} has one of use_quant_conv and use_post_quant_conv; supported are both or neither.")
    if not c["use_quant_conv"]:
        params["quant_conv"] = False
    node = {"target": "ldm.autoencoder.autoencoder.AutoencoderKL", "params": params}
    return node, vae_modules(attention, blocks, c["mid_block_add_attention"]), _latent_scale(c, where)


def _latent_scale(c: Mapping[str, Any], where: str) -> dict[str, Any]:
    """scale_factor and shift_factor; each of all channels, or where latents_mean and latents_std are given, of each."""
    scale, shift, mean, std = (c[name] for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"))
    if (mean is None) != (std is None) or (mean is not None and shift):
        raise UserError(f"{where}: latents_mean and latents_std go together, and not with a shift_factor.")
    if mean is not None:
        return {"scale_factor": [float(scale) / each for each in std], "shift_factor": [float(each) for each in mean]}
    return {"scale_factor": float(scale)} | ({"shift_factor": float(shift)} if shift else {})


def schedule_params(config: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """The noise table and parameterisation of a scheduler_config.json. UserError: a table that has no counterpart.

    >>> params = schedule_params({"beta_schedule": "scaled_linear", "beta_end": 0.012}, "scheduler_config.json", [])
    >>> params["beta_schedule"], params["linear_end"], params["parameterization"]
    ('linear', 0.012, 'eps')
    """
    kind = str(config.get("_class_name", ""))
    tabled = "num_train_timesteps" in config or "beta_schedule" in config
    if not tabled or "FlowMatch" in kind or "EDM" in kind:
        raise UserError(f"{where} is a {kind or 'config without a noise table'}; expected one with betas, as DDIM's.")
    c = {**SCHEDULER_DEFAULTS, **config}
    if c["rescale_betas_zero_snr"]:
        raise UserError(
            f"{where}: rescale_betas_zero_snr makes the noisiest level infinite, from which no solver here can start."
        )
    if c["trained_betas"] is not None:
        raise UserError(f"{where}: trained_betas gives a table of its own; tables are {', '.join(SCHEDULES)}.")
    for name, known in (("beta_schedule", SCHEDULES), ("prediction_type", PREDICTIONS)):
        if c[name] not in known:
            raise UserError(f"{where}: {name} '{c[name]}' has no counterpart{suggest(c[name], known)}")
    for name in ("clip_sample", "thresholding"):
        if c.get(name):
            notes.append(f"the scheduler clips what it predicts ({name}); samplers do not clip latents here")
    return {
        "parameterization": PREDICTIONS[c["prediction_type"]],
        "beta_schedule": SCHEDULES[c["beta_schedule"]],
        "timesteps": c["num_train_timesteps"],
        "linear_start": c["beta_start"],
        "linear_end": c["beta_end"],
    }


def _settings(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    silent: set[str],
    where: str,
    notes: list[str],
) -> dict[str, Any]:
    """A network's settings with diffusers' defaults. UserError for one that its counterpart here does not have."""
    fixed_settings(config, fixed, {*defaults, *silent}, where, notes)
    chosen = {**{name: allowed[0] for name, allowed in fixed.items()}, **defaults}
    return chosen | {name: value for name, value in config.items() if name in chosen}


def fixed_settings(
    config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], known: set[str], where: str, notes: list[str]
) -> None:
    """UserError for a setting that is none of its `fixed` values; those that are not `known` are noted.

    >>> fixed_settings({"act_fn": "mish"}, VAE_FIXED, set(), "vae/config.json", [])
    Traceback (most recent call last):
    ldm.errors.UserError: vae/config.json: act_fn is 'mish'; supported is 'silu' or 'swish'.
    """
    for name, allowed in fixed.items():
        value = config.get(name, allowed[0])
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if value not in allowed:
            raise UserError(f"{where}: {name} is {value!r}; supported is {' or '.join(map(repr, allowed))}.")
    for name, value in config.items():
        if not (name.startswith("_") or name in known or name in fixed) and value not in (None, False):
            notes.append(f"{where}: the setting {name} ({value!r}) is not known and was left")


def _kind(kind: str, attends: str, plain: str, where: str) -> bool:
    if kind not in (attends, plain):
        raise UserError(f"{where}: blocks of type {kind} are not supported; {attends} and {plain} are.")
    return kind == attends


def _one(config: Mapping[str, Any], name: str, where: str) -> int:
    """A setting that is given once, or equally for every level."""
    value = config[name]
    values = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(values) != 1 or not isinstance(one := values.pop(), int):
        raise UserError(f"{where}: {name} is {value}; it must be one number, the same in all levels.")
    return one


def _multiples(widths: Sequence[int], where: str) -> list[int]:
    if any(width % widths[0] for width in widths):
        raise UserError(f"{where}: block_out_channels {list(widths)} are not multiples of the first.")
    return [width // widths[0] for width in widths]
