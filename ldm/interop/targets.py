"""Targets and parameters of published YAML as this toolkit's nodes: the table, and nothing of the weights.

Published configs name the classes of CompVis latent-diffusion and of its forks Large-Image-Diffusion, PathLDM and
ZoomLDM. Parameters that only concern their training or their file system are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config import foreign_config
from ldm.errors import UserError, suggest
from ldm.foreign.paths import inside

UNET = "ldm.networks.unet.UNetModel"
LATENT_DIFFUSION = "ldm.latent_diffusion.LatentDiffusion"
CONDITIONER_SET = "ldm.conditioners.compose.ConditionerSet"
CLASS_EMBEDDER = "ldm.conditioners.class_token.ClassEmbedder"
RESCALER = "ldm.conditioners.rescaler.SpatialRescaler"
TEXT_EMBEDDER = "ldm.conditioners.text.TextEmbedder"
TRAINING = "ldm.autoencoder.stage.AutoencoderStage"
REPRESENTATIONS = "ldm.autoencoder.rae.RepresentationAutoencoder"
UNCONDITIONAL = ("__is_unconditional__", None)

DIFFUSION_TARGETS = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": False,  # target -> works on pixels
    "ldm.models.diffusion.ddpm.DDPM": True,
}
FIRST_STAGES = {
    "ldm.models.autoencoder.AutoencoderKL": "ldm.autoencoder.autoencoder.AutoencoderKL",
    "ldm.models.autoencoder.VQModel": "ldm.autoencoder.autoencoder.VQModel",
    "ldm.models.autoencoder.VQModelInterface": "ldm.autoencoder.autoencoder.VQModel",
    "taming.models.vqgan.VQModel": "ldm.autoencoder.autoencoder.VQModel",
    "ldm.models.autoencoder.IdentityFirstStage": "ldm.autoencoder.autoencoder.IdentityFirstStage",
}
UNETS = ("ldm.modules.diffusionmodules.openaimodel.UNetModel",)
ENCODERS = "ldm.modules.encoders.modules."

DIFFUSION_KEPT = (
    "linear_start", "linear_end", "timesteps", "beta_schedule", "cosine_s", "parameterization", "loss_type",
    "scale_factor", "scale_by_std",
)  # fmt: skip
DIFFUSION_READ = (
    "unet_config",
    "first_stage_config",
    "cond_stage_config",
    "conditioning_key",
    "concat_mode",
    "image_size",
    "channels",
    "cond_stage_key",
)
DIFFUSION_LEFT = (
    "base_learning_rate", "num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_trainable",
    "cond_stage_forward", "monitor", "use_ema", "track_fid", "fid_path", "x_feat_extracted", "scheduler_config",
    "ckpt_path", "ignore_keys", "load_only_unet", "clip_denoised", "original_elbo_weight", "v_posterior",
    "l_simple_weight", "use_positional_encodings", "learn_logvar", "logvar_init", "unet_trainable", "given_betas",
)  # fmt: skip
UNET_KEPT = (
    "image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions",
    "channel_mult", "dropout", "conv_resample", "num_heads", "num_head_channels", "use_spatial_transformer",
    "transformer_depth", "context_dim", "num_classes", "use_scale_shift_norm", "resblock_updown",
    "use_new_attention_order", "use_checkpoint", "num_heads_upsample", "legacy",
)  # fmt: skip
# of the UNet: what it may be, as it then changes nothing; None is anything
UNET_LEFT = {
    "use_fp16": None, "use_bf16": None, "ckpt_path": None, "ignore_keys": None, "dims": (2,), "n_embed": (None,),
    "use_linear_in_transformer": None,
    "disable_self_attentions": (None,), "num_attention_blocks": (None,), "disable_middle_self_attn": (False,),
}  # fmt: skip
DDCONFIG_LEFT = {
    "attn_type": ("vanilla",), "use_linear_attn": (False,), "resamp_with_conv": (True,), "give_pre_end": (False,),
    "tanh_out": (False,), "use_timestep": (False,),
}  # fmt: skip
FIRST_STAGE_LEFT = (
    "lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor", "batch_resize_range",
    "scheduler_config", "lr_g_factor", "remap", "sane_index_shape", "use_ema", "learn_logvar",
)  # fmt: skip


@dataclass
class Conditioning:
    """A translated conditioner: its node without what the weights say, and which published module it was."""

    kind: str
    node: dict[str, Any]
    published: dict[str, Any] = field(default_factory=dict)  # params that the weights are to be read with


def read_project(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model node and the whole of a project YAML, or of a config that trains a first stage here.

    It may be the name of a shipped one (`ldm.config.shipped`). Nothing in it is executed or refers to anything else.

    >>> node, whole = read_project(published / "ldm_ckpt_lid_vq" / "config.yaml")
    >>> node["target"]
    'ldm.models.diffusion.ddpm.LatentDiffusion'
    """
    config = foreign_config(path)
    node = config.get("model", config)
    if isinstance(node, Mapping) and node.get("target") == TRAINING:  # of this toolkit: what it trains
        node = (node.get("params") or {}).get("first_stage")
    if not isinstance(node, Mapping) or not isinstance(node.get("target"), str):
        raise UserError(f"{path} has no `model: {{target, params}}`; give the project YAML that the model came with.")
    return {"target": node["target"], "params": dict(node.get("params") or {})}, config


def find_project(checkpoint: Path) -> Path | None:
    """The project YAML that lies beside a checkpoint, or in `configs` of its run folder, if there is just one.

    >>> find_project(published / "ldm_ckpt_lid_vq" / "model.ckpt").name
    'config.yaml'
    """
    for folder in (checkpoint.parent, checkpoint.parent.parent / "configs"):
        named = [folder / "config.yaml", *sorted(folder.glob("*project.yaml"))]
        found = [path for path in named if path.is_file()] or sorted(folder.glob("*.yaml"))
        if found:
            one = len(found) == 1 or found[0].name == "config.yaml"
            return inside(folder, found[0].name) if one else None
    return None


def unet_node(node: Any, allow: Iterable[str], image_size: Any = None) -> dict[str, Any]:
    """The node of a published UNet; image_size: of the diffusion model, which counts.

    >>> unet_node({"target": UNETS[0], "params": {"image_size": 64, "use_fp16": True}}, allow=())
    {'target': 'ldm.networks.unet.UNetModel', 'params': {'image_size': 64}}
    """
    target, params = _node(node, "unet_config")
    if _allowed(target, allow):
        return {"target": target, "params": params}
    if target not in (*UNETS, UNET):
        raise _unknown("unet_config", target, UNETS)
    kept = _kept(params, "unet_config", UNET_KEPT, UNET_LEFT)
    of_one_width = kept.get("num_head_channels", -1) not in (-1, None)
    if of_one_width:
        kept.pop("num_heads", None)
    if not kept.pop("legacy", True) or of_one_width or kept.get("use_spatial_transformer"):
        kept.pop("num_heads_upsample", None)  # the published code does not look at it then
    kept = {name: value for name, value in kept.items() if value is not None}
    if isinstance(kept.get("context_dim"), list):
        (kept["context_dim"],) = set(kept["context_dim"])
    size = image_size or kept.get("image_size")
    if size is not None:
        kept["image_size"] = size[0] if isinstance(size, list) else size
    return {"target": UNET, "params": kept}


def first_stage_node(node: Any, allow: Iterable[str] = ()) -> dict[str, Any]:
    """The node of a published first stage.

    >>> first_stage_node({"target": "ldm.models.autoencoder.IdentityFirstStage"})
    {'target': 'ldm.autoencoder.autoencoder.IdentityFirstStage', 'params': {}}
    """
    target, params = _node(node, "first_stage_config")
    if _allowed(target, allow):
        return {"target": target, "params": params}
    if target not in FIRST_STAGES and target not in FIRST_STAGES.values():
        raise _unknown("first_stage_config", target, FIRST_STAGES)
    target = FIRST_STAGES.get(target, target)
    if target.endswith("IdentityFirstStage"):
        return {"target": target, "params": {"channels": params["channels"]} if "channels" in params else {}}
    known = ("ddconfig", "embed_dim", "n_embed")
    kept = _kept(params, "first_stage_config", known, dict.fromkeys(FIRST_STAGE_LEFT))
    if missing := [name for name in known[: 2 + target.endswith("VQModel")] if name not in kept]:
        raise UserError(f"first_stage_config.params lacks {', '.join(missing)}.")
    if target.endswith("AutoencoderKL"):
        kept.pop("n_embed", None)
    dd = dict(kept["ddconfig"])
    for name in [name for name in dd if name in DDCONFIG_LEFT]:
        _check_left(f"ddconfig.{name}", dd.pop(name), DDCONFIG_LEFT[name])
    return {"target": target, "params": {**kept, "ddconfig": dd}}


def diffusion_params(params: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The parameters of a diffusion model that mean the same to ours.

    >>> notes = []
    >>> diffusion_params({"timesteps": 1000, "monitor": "val/loss", "new": 1}, notes)
    {'timesteps': 1000}
    >>> notes
    ['model.params.new of the config is not known and was left out']
    """
    if params.get("given_betas") is not None:
        raise UserError("the config gives its betas as a list (given_betas); give linear_start and linear_end.")
    for name in params:
        if name not in (*DIFFUSION_KEPT, *DIFFUSION_READ, *DIFFUSION_LEFT):
            notes.append(f"model.params.{name} of the config is not known and was left out")
    return {name: params[name] for name in DIFFUSION_KEPT if params.get(name) is not None}


def conditioning(params: Mapping[str, Any], allow: Iterable[str]) -> Conditioning | None:
    """The conditioner of a published diffusion model; None for an unconditional one.

    >>> conditioning({"cond_stage_config": "__is_unconditional__"}, allow=()) is None
    True
    """
    node = params.get("cond_stage_config")
    key = params.get("conditioning_key") or ("concat" if params.get("concat_mode", True) else "crossattn")
    if node in UNCONDITIONAL:
        return None
    if node == "__is_first_stage__":
        raise UserError("the model is conditioned on latents of its first stage, which is not supported.")
    if key not in ("concat", "crossattn", "hybrid", "adm"):
        raise UserError(f"conditioning_key '{key}' is not known; known are concat, crossattn, hybrid and adm.")
    target, given = _node(node, "cond_stage_config")
    if _allowed(target, allow):
        return Conditioning("allowed", {"target": target, "params": given})
    if target == "torch.nn.Identity":
        if key == "adm":
            return None  # the label is embedded in the UNet
        translated = _identity(key, params)
    elif target.startswith(ENCODERS) and (name := target.removeprefix(ENCODERS)) in CONDITIONERS:
        translated = CONDITIONERS[name](given, params)
    else:
        raise _unknown("cond_stage_config", target, [ENCODERS + name for name in CONDITIONERS])
    acts_by_map = translated.kind == "rescaler"
    if acts_by_map != (key == "concat"):
        raise UserError(f"conditioning_key is '{key}', which does not fit the conditioner {target}.")
    return translated


def hybrid_map(channels: int) -> dict[str, Any]:
    """The node of a map that is concatenated to the latent as it is.

    >>> hybrid_map(4)["params"]
    {'in_channels': 4, 'stages': 0, 'key': 'map'}
    """
    return {"target": RESCALER, "params": {"in_channels": channels, "stages": 0, "key": "map"}}


def _identity(key: str, params: Mapping[str, Any]) -> Conditioning:
    if key != "concat":
        raise UserError(f"the model takes its {key} condition ready-made (torch.nn.Identity), which is not supported.")
    channels = params["unet_config"]["params"]["in_channels"] - params["unet_config"]["params"]["out_channels"]
    node = hybrid_map(channels)
    return Conditioning("rescaler", {**node, "params": {**node["params"], "key": _key(params)}})


def _class(given: Mapping[str, Any], params: Mapping[str, Any]) -> Conditioning:
    _known(given, "ClassEmbedder", ("embed_dim", "n_classes", "key", "ucg_rate"))
    node = {"target": CLASS_EMBEDDER, "params": {"dim": given["embed_dim"]}}
    return Conditioning("class", node, {"rows": given.get("n_classes", 1000)})


def _patch(given: Mapping[str, Any], params: Mapping[str, Any]) -> Conditioning:
    _known(given, "PatchEmbedder", ("patch_ssl_key", "patch_embed_dim", "target_dim", "normalize_ssl"))
    ours = {
        "embed_dim": given.get("patch_embed_dim", 768),
        "context_dim": given.get("target_dim", 512),
        "normalize": given.get("normalize_ssl", False),
    }
    return Conditioning("same", {"target": "ldm.conditioners.ssl.PatchEmbedder", "params": ours})


def _ssl(given: Mapping[str, Any], params: Mapping[str, Any]) -> Conditioning:
    known = ("patch_ssl_key", "region_ssl_key", "patch_embed_dim", "region_embed_dim", "normalize_ssl")
    _known(given, "SSLEmbedder", known)
    ours = {
        "embed_dim": given.get("patch_embed_dim", 384),
        "region_embed_dim": given.get("region_embed_dim", 768),
        "context_dim": 512,  # in the published code, not in its configs
        "normalize": given.get("normalize_ssl", False),
    }
    return Conditioning("same", {"target": "ldm.conditioners.ssl.SSLEmbedder", "params": ours})


def _grid(last_norm: bool) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Conditioning]:
    def translate(given: Mapping[str, Any], params: Mapping[str, Any]) -> Conditioning:
        known = (
            "feat_key",
            "mag_key",
            "input_channels",
            "hidden_channels",
            "vit_mlp_dim",
            "output_channels",
            "seq_length",
            "mag_levels",
            "num_layers",
            "num_heads",
            "p_uncond",
            "ckpt_path",
            "ignore_keys",
        )
        _known(given, "EmbeddingViT2", known)
        if given.get("seq_length", 64) != 64:
            raise UserError(f"cond_stage_config: seq_length is 64 in every published model; got {given['seq_length']}.")
        ours = {
            "embed_dim": given.get("input_channels", 1024),
            "context_dim": given.get("output_channels", 512),
            "hidden": given.get("hidden_channels", 512),
            "depth": given.get("num_layers", 12),
            "heads": given.get("num_heads", 8),
            "mlp": given.get("vit_mlp_dim", 2048),
            "last_norm": last_norm,
            "dropout": given.get("p_uncond", 0.0),
        }
        node = {"target": "ldm.conditioners.grid.GridEmbedder", "params": ours}
        return Conditioning("grid", node, {"levels": given.get("mag_levels", 8)})

    return translate


def _rescaler(given: Mapping[str, Any], params: Mapping[str, Any]) -> Conditioning:
    _known(given, "SpatialRescaler", ("n_stages", "method", "multiplier", "in_channels", "out_channels", "bias"))
    ours = {
        "in_channels": given.get("in_channels", 3),
        "out_channels": given.get("out_channels"),
        "stages": given.get("n_stages", 1),
        "method": given.get("method", "bilinear"),
        "multiplier": given.get("multiplier", 0.5),
        "bias": given.get("bias", False),
        "key": _key(params),
    }
    return Conditioning("rescaler", {"target": RESCALER, "params": ours})


def _clip_text(given: Mapping[str, Any], params: Mapping[str, Any]) -> Conditioning:
    _known(given, "FrozenCLIPEmbedder", ("version", "device", "max_length", "freeze", "layer", "layer_idx"))
    if given.get("layer", "last") != "last":
        raise UserError(f"cond_stage_config: the text tower's layer is '{given['layer']}'; 'last' is supported.")
    length = given.get("max_length", 77)
    ours = {"chunks": math.ceil(length / 77), "mask_padding": length > 77 or params.get("cond_stage_key") == "caption"}
    published = {"version": given.get("version", "openai/clip-vit-large-patch14")}
    return Conditioning("clip", {"target": TEXT_EMBEDDER, "params": ours}, published)


def _bert_text(given: Mapping[str, Any], params: Mapping[str, Any]) -> Conditioning:
    known = ("n_embed", "n_layer", "vocab_size", "max_seq_len", "device", "use_tokenizer", "embedding_dropout")
    _known(given, "BERTEmbedder", known)
    if not given.get("use_tokenizer", True):
        raise UserError("cond_stage_config: the model reads tokens that are no words (use_tokenizer false): no text.")
    config = {
        "token_transformer": True,
        "width": given["n_embed"],
        "layers": given["n_layer"],
        "heads": 8,
        "vocab_size": given.get("vocab_size", 30522),
        "context_length": given.get("max_seq_len", 77),
    }
    return Conditioning("bert", {"target": TEXT_EMBEDDER, "params": {"mask_padding": False}}, {"text_cfg": config})


def _open_clip_text(given: Mapping[str, Any], params: Mapping[str, Any]) -> Conditioning:
    _known(given, "FrozenOpenCLIPEmbedder", ("arch", "version", "device", "max_length", "freeze", "layer"))
    if given.get("max_length", 77) != 77:
        raise UserError(f"cond_stage_config: max_length of an open_clip tower is 77; got {given['max_length']}.")
    ours = {"layer": given.get("layer", "last"), "mask_padding": False, "pad": "zero"}
    published = {"version": given.get("arch", "ViT-H-14")}
    return Conditioning("open_clip", {"target": TEXT_EMBEDDER, "params": ours}, published)


CONDITIONERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Conditioning]] = {
    "ClassEmbedder": _class,
    "PatchEmbedder": _patch,
    "SSLEmbedder": _ssl,
    "EmbeddingViT2": _grid(last_norm=False),
    "EmbeddingViT2_5": _grid(last_norm=True),
    "SpatialRescaler": _rescaler,
    "FrozenCLIPEmbedder": _clip_text,
    "FrozenOpenCLIPEmbedder": _open_clip_text,
    "BERTEmbedder": _bert_text,
}


def _unknown(where: str, target: str, known: Iterable[str]) -> UserError:
    """The error of a target that is in no table."""
    return UserError(
        f"{where}.target '{target}' is not known{suggest(target, known)} A class of your own that has this toolkit's "
        "interface is taken with --allow-target and the beginning of its name."
    )


def _node(node: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, Mapping) or not isinstance(node.get("target"), str):
        raise UserError(f"{where} of the config is {{target, params}}; got {str(node)[:80]}.")
    return node["target"], dict(node.get("params") or {})


def _allowed(target: str, allow: Iterable[str]) -> bool:
    return any(target.startswith(prefix) for prefix in allow)


def _key(params: Mapping[str, Any]) -> str:
    return str(params.get("cond_stage_key") or "map")


def _known(given: Mapping[str, Any], where: str, known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"cond_stage_config: {where} has no parameter '{name}'{suggest(name, known)}")


def _kept(
    params: Mapping[str, Any], where: str, kept: Iterable[str], left: Mapping[str, tuple | None]
) -> dict[str, Any]:
    for name, value in params.items():
        if name in left:
            _check_left(f"{where}.params.{name}", value, left[name])
        elif name not in kept:
            raise UserError(f"{where}.params.{name} is not known{suggest(name, [*kept, *left])}")
    return {name: value for name, value in params.items() if name in kept}


def _check_left(where: str, value: Any, allowed: tuple | None) -> None:
    if allowed is not None and value not in allowed:
        raise UserError(f"{where} is {value!r}; only {' or '.join(map(repr, allowed))} is supported.")
