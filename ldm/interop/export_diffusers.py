"""Model folders as folders that diffusers reads: networks, scheduler, text tower, and conditions beside them.

What it has no counterpart for is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.files import whole
from ldm.interop import targets
from ldm.interop.converted import Converted
from ldm.interop.diffusers_conditioning import FLOW
from ldm.interop.diffusers_config import PREDICTIONS, SCHEDULES
from ldm.interop.diffusers_folder import FIRST_STAGE, TEXT, UNET, clip_vocabulary, read_own
from ldm.interop.diffusers_names import inverse, renamed, to_linear, vae_modules
from ldm.interop.export import (
    AUTOENCODER_KL,
    DIFFUSION_DEFAULTS,
    apart,
    check_free,
    kind_of,
    lacks,
    layers_of,
    part_of,
    text_node,
    with_defaults,
    write_json,
)
from ldm.interop.export_diffusers_conditions import MODULE, conditioning, module_text
from ldm.interop.export_diffusers_transformer import PIXART, transformer
from ldm.interop.export_diffusers_unet import unet
from ldm.interop.text_names import from_open_clip, transformers_config
from ldm.interop.transformers import DIT

FORM = "diffusers"
IDENTITY = "ldm.autoencoder.autoencoder.IdentityFirstStage"
EDM = "EDMEulerScheduler"
ENDS = ("<|startoftext|>", "<|endoftext|>")
DDIM = {  # settings of the scheduler beside those of the noise table
    "class": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
PIPELINES = {"UNet2DConditionModel": "StableDiffusionPipeline", PIXART: "PixArtAlphaPipeline"}
# what a pipeline has beside networks and scheduler
NONE_OF = {
    "StableDiffusionPipeline": ("feature_extractor", "image_encoder", "safety_checker", "text_encoder", "tokenizer"),
    "PixArtAlphaPipeline": ("text_encoder", "tokenizer"),
}
WITHOUT = "text_encoder=None, tokenizer=None"


@dataclass
class _Made:
    """A folder of diffusers in the making.

    networks: name -> config and tensors. settings, tensors: of conditioning.json and conditioning.safetensors. text:
    files of a tokenizer by name.
    """

    networks: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def to_diffusers(folder: Path, out: Path, half: bool = False) -> list[str]:
    """Write a diffusion model as a folder of diffusers, a KL first stage as an AutoencoderKL's; gives what is to say.

    A model of text by KL latents is a StableDiffusionPipeline, a transformer that attends to its conditions a
    PixArtAlphaPipeline. Classes, scores and features lie beside the networks as a table and a module that gives them to
    the pipeline, and samples (`diffusers_conditioning`).
    UserError: the model has something that diffusers does not, as omics.

    >>> to_diffusers(models / "demo-omics", Path("pipeline"))
    Traceback (most recent call last):
    ldm.errors.UserError: diffusers does not have the condition OmicsEmbedder; the model cannot be written in that form.
    """
    model = read_own(folder)
    if model.node["target"] != targets.LATENT_DIFFUSION:
        return _first_stage_alone(model, out, half)
    check_free(out, "model_index.json")
    params = with_defaults(model.node["params"], DIFFUSION_DEFAULTS)
    made = _Made()
    _add_network(made, params, model, str(folder))
    scheduler = _scheduler_config(params, model.metadata.get("scheduler") or {})
    _add_first_stage(made, params, model, str(folder))
    pipeline = _pipeline(made, scheduler)
    index: dict[str, Any] = {
        "_class_name": pipeline or "DiffusionPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **{part: ["diffusers", told["_class_name"]] for part, (told, _) in made.networks.items()},
        **{part: [None, None] for part in NONE_OF.get(pipeline, ())},
    }
    if pipeline == "StableDiffusionPipeline":
        index["requires_safety_checker"] = False
    node = params.get("cond_stage_config")
    if node is not None and node["target"] == targets.TEXT_EMBEDDER:
        _add_text(made, node, model)
        if pipeline == "StableDiffusionPipeline":
            index["text_encoder"] = ["transformers", "CLIPTextModel"]
            if made.text:
                index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        elif pipeline:
            made.notes.append("its pipeline encodes prompts by T5 alone: give it prompt_embeds of the text_encoder/")
    elif made.settings["members"]:
        named = ", ".join(key for member in made.settings["members"] for key in member["keys"])
        made.notes.append(f"its conditions ({named}) lie in conditioning.json and conditioning.safetensors; {MODULE} "
                          "makes prompt_embeds of them, and samples")  # fmt: skip
    elif pipeline:
        made.notes.append("the model has no text tower: give the pipeline prompt_embeds")
    if pipeline and "text_encoder" not in made.networks:
        made.notes.append(f"load it by {pipeline}.from_pretrained(OUT, {WITHOUT})")
    beside = pipeline != "StableDiffusionPipeline" or bool(made.settings["members"])
    if not pipeline:
        made.notes.append(f"no pipeline of diffusers runs such a model: {MODULE} samples by its networks")
    licence = model.metadata.get("licence")
    made.notes.append(f"licence: {licence}" if licence else "the model folder records no licence")
    with whole(out) as part:
        write_json(part / "model_index.json", index)
        if beside:
            write_json(part / "conditioning.json", made.settings)
            save_file(apart(made.tensors), part / "conditioning.safetensors", metadata={"format": "pt"})
            (part / MODULE).write_text(module_text(), encoding="utf-8")
        write_json(part / "scheduler" / "scheduler_config.json", scheduler)
        for file, text_of in made.text.items():
            (part / "tokenizer").mkdir(exist_ok=True)
            (part / "tokenizer" / file).write_text(text_of, encoding="utf-8")
        for name, (config, state) in made.networks.items():
            write_json(part / name / "config.json", config)
            file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
            save_file(apart(state, half), part / name / file, metadata={"format": "pt"})
    return made.notes


def _add_network(made: _Made, params: Mapping[str, Any], model: Converted, source: str) -> None:
    """The network, and its conditions but text."""
    node, members, told = params.get("cond_stage_config"), [], {}
    if node is not None and node["target"] != targets.TEXT_EMBEDDER:
        members, made.tensors = conditioning(node, model)
    state = part_of(model, UNET)
    if params["unet_config"]["target"] == DIT:
        config, state, told = transformer(params["unet_config"], state, members, made.tensors)
        made.networks["transformer"] = (config, state)
    else:
        config, state = unet(params["unet_config"], state, source)
        made.networks["unet"] = (config, state)
        if "vector" in {member["acts"] for member in members}:
            config["class_embed_type"] = "identity"
    channels = config["out_channels"] // (2 if params["learn_sigma"] else 1)
    made.settings = {"members": members, "channels": channels, "size": config["sample_size"], **told}


def _add_first_stage(made: _Made, params: Mapping[str, Any], model: Converted, source: str) -> None:
    """The autoencoder of a model on latents, whose shift, and scale by channel, go to its outermost convolutions."""
    scale = model.state.get("scale_factor", params["scale_factor"])
    if params["first_stage_config"]["target"] == IDENTITY:
        if scale != 1 or params["shift_factor"]:
            raise lacks(FORM, f"pixels that are scaled (scale_factor {scale}, shift_factor {params['shift_factor']})")
        return
    config, names = _vae_config(params["first_stage_config"])
    state = to_linear(part_of(model, FIRST_STAGE))
    if params["shift_factor"] or isinstance(scale, list):
        scale = _moved(state, config, scale, params["shift_factor"])
        made.notes.append("latents are shifted, or scaled by channel: by the autoencoder itself in this form, since "
                          "pipelines do neither")  # fmt: skip
    config["scaling_factor"] = float(scale)
    made.networks["vae"] = (config, renamed(state, names, source))


def _moved(state: dict[str, Tensor], config: dict[str, Any], scale: Any, shift: Any) -> float:
    """Give 1x1 convolutions of an autoencoder the shift of its latents and their scale by channel; the scale left."""
    count = config["latent_channels"]
    left = 1.0 if isinstance(scale, list) else float(scale)
    scales = torch.tensor(scale if isinstance(scale, list) else [1.0] * count, dtype=torch.float64)
    shifts = torch.as_tensor(shift, dtype=torch.float64).expand(count)
    for name, channels in (("quant_conv", 2 * count), ("post_quant_conv", count)):
        if f"{name}.weight" not in state:
            config[f"use_{name}"] = True
            state[f"{name}.weight"] = torch.eye(channels)[:, :, None, None]
            state[f"{name}.bias"] = torch.zeros(channels)
    weight, bias = state["quant_conv.weight"].double(), state["quant_conv.bias"].double()
    ones = torch.ones_like(scales)
    state["quant_conv.weight"] = (weight * torch.cat([scales, ones])[:, None, None, None]).float()
    moved = torch.cat([(bias[:count] - shifts) * scales, bias[count:] + 2 * scales.log()])
    state["quant_conv.bias"] = moved.float()
    weight, bias = state["post_quant_conv.weight"].double(), state["post_quant_conv.bias"].double()
    state["post_quant_conv.weight"] = (weight / scales[:, None, None]).float()
    state["post_quant_conv.bias"] = (bias + weight.flatten(1) @ shifts).float()
    return left


def _pipeline(made: _Made, scheduler: dict[str, Any]) -> str | None:
    """The pipeline that runs a model by prompt_embeds, if any does."""
    if "vae" not in made.networks:
        if scheduler["_class_name"] != FLOW:
            scheduler["clip_sample"] = True  # as samplers here do of models on pixels
        return None
    config = next(config for name, (config, _) in made.networks.items() if name != "vae")
    attends = config["_class_name"] in PIPELINES and config["cross_attention_dim"] is not None
    learnt = config["_class_name"] != PIXART and config["out_channels"] != made.settings["channels"]
    beside = config["in_channels"] != made.settings["channels"]
    vectors = any(member["acts"] == "vector" for member in made.settings["members"])
    if not attends or learnt or beside or vectors or "time" in made.settings or scheduler["_class_name"] == FLOW:
        return None
    return PIPELINES[config["_class_name"]]


def _add_text(made: _Made, node: Mapping[str, Any], model: Converted) -> None:
    """The text tower, and the files of its tokenizer if its words are CLIP's."""
    text, config = text_node(node, model, FORM)
    if text["chunks"] > 1:
        made.notes.append(
            f"captions have {text['chunks']} chunks, which no pipeline joins: give prompt_embeds, each chunk encoded "
            "by itself"
        )
    tower, tokens = _tower_of(model), config["text_cfg"]["context_length"]
    encoder = transformers_config(config, layers_of(tower))
    encoder |= {"_name_or_path": config.get("name", ""), "use_attention_mask": text["mask_padding"]}
    made.networks["text_encoder"] = (encoder, from_open_clip(tower))
    if config["text_cfg"]["vocab_size"] == len(clip_vocabulary()):
        made.text = _tokenizer_files(tokens, "!" if text["pad"] == "zero" else ENDS[1])
    else:
        made.notes.append("the text tower has not CLIP's words: without a tokenizer, give the pipeline prompt_embeds")
    if text["prompt"] != "{text}":
        made.notes.append(f"the text tower was trained on prompts like '{text['prompt']}'; write them so")


def _scheduler_config(params: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a scheduler with the model's noise table: of DDIM, or of the class that the model came with; of
    rectified flow; of EDM."""
    if params["parameterization"] == "flow":
        shift = float(params["time_shift"])
        return {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": shift, "use_dynamic_shifting": False}
    if params["parameterization"] == "edm":
        if params["first_stage_config"]["target"] == IDENTITY:
            raise lacks(FORM, "clipping of EDM's predictions, as models on pixels are sampled (parameterization edm)")
        return {"_class_name": EDM, "sigma_data": params["sigma_data"], "sigma_min": 0.002, "sigma_max": 80.0}
    predictions, schedules = inverse(PREDICTIONS), inverse(SCHEDULES)
    name = params["beta_schedule"]
    if name not in schedules or (name == "cosine" and params["cosine_s"] != DIFFUSION_DEFAULTS["cosine_s"]):
        raise lacks(FORM, f"the beta_schedule '{name}' with cosine_s {params['cosine_s']}")
    settings = dict(known or DDIM)
    return {
        "_class_name": settings.pop("class"),
        **settings,
        "beta_start": params["linear_start"],
        "beta_end": params["linear_end"],
        "beta_schedule": schedules[name],
        "num_train_timesteps": params["timesteps"],
        "prediction_type": predictions[params["parameterization"]],
    }


def _first_stage_alone(model: Converted, out: Path, half: bool) -> list[str]:
    check_free(out, "config.json")
    config, names = _vae_config(model.node)
    config |= _scale_config(model.metadata)
    with whole(out) as part:
        write_json(part / "config.json", config)
        state = apart(renamed(to_linear(model.state), names, "the first stage"), half)
        save_file(state, part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    told = "" if "scale_factor" in model.metadata else ", as the model folder records none"
    return [f"scaling_factor is {config['scaling_factor']:g}{told}"]


def _scale_config(about: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers' config of a first stage says of scale and shift of its latents."""
    scale, shift = about.get("scale_factor", 1.0), about.get("shift_factor", 0.0)
    if isinstance(scale, list) or isinstance(shift, list):
        count = len(scale if isinstance(scale, list) else shift)
        scale, shift = (value if isinstance(value, list) else [value] * count for value in (scale, shift))
        return {"scaling_factor": 1.0, "latents_mean": shift, "latents_std": [1 / value for value in scale]}
    return {"scaling_factor": float(scale)} | ({"shift_factor": float(shift)} if shift else {})


def _vae_config(node: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The config of an AutoencoderKL without its scale, and our name -> diffusers' of its modules."""
    if node["target"] != AUTOENCODER_KL:
        raise lacks(FORM, f"first stages of the kind {kind_of(node)} (it has KL autoencoders)")
    c = {"mid_attention": True, "num_groups": 32, **node["params"]["ddconfig"]}
    latent, levels = node["params"]["embed_dim"], len(c["ch_mult"])
    if c["z_channels"] != latent or c["ch_mult"][0] != 1:
        raise lacks(FORM, f"z_channels {c['z_channels']} with embed_dim {latent}, or ch_mult {c['ch_mult']} of ch")
    attention = [c["resolution"] // 2**level in c["attn_resolutions"] for level in range(levels)]
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [c["ch"] * mult for mult in c["ch_mult"]],
        "down_block_types": ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in attention],
        "in_channels": c["in_channels"],
        "latent_channels": latent,
        "layers_per_block": c["num_res_blocks"],
        "mid_block_add_attention": c["mid_attention"],
        "norm_num_groups": c["num_groups"],
        "out_channels": c["out_ch"],
        "sample_size": c["resolution"],
        "up_block_types": ["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in attention[::-1]],
    }
    if not node["params"].get("quant_conv", True):
        config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    return config, inverse(vae_modules(attention, c["num_res_blocks"], c["mid_attention"]))


def _tokenizer_files(tokens: int, pad: str) -> dict[str, str]:
    """The files of transformers' CLIPTokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    ranks = SimpleTokenizer().bpe_ranks
    bos, eos = ENDS
    ends = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": pad}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": tokens,
        "tokenizer_class": "CLIPTokenizer",
        **ends,
    }
    return {
        "vocab.json": json.dumps(clip_vocabulary(), ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in sorted(ranks, key=ranks.get)), ""]),
        "special_tokens_map.json": json.dumps(ends, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


def _tower_of(model: Converted) -> dict[str, Tensor]:
    return {name.removeprefix("tower."): value for name, value in part_of(model, TEXT).items()}
