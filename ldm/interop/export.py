"""Model folders as folders of diffusers' StableDiffusionPipeline, and what all forms of others share.

What a form has no counterpart for is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import UserError
from ldm.files import names_in, whole
from ldm.interop import targets
from ldm.interop.converted import Converted
from ldm.interop.diffusers_config import PREDICTIONS, SCHEDULES
from ldm.interop.diffusers_folder import FIRST_STAGE, TEXT, UNET, clip_vocabulary, read_own
from ldm.interop.diffusers_names import renamed, to_linear, unet_modules, vae_modules
from ldm.interop.export_diffusers_parts import MODULE, conditioning, module_text, pixel_unet
from ldm.interop.text_names import from_open_clip, transformers_config

AUTOENCODER_KL = "ldm.autoencoder.autoencoder.AutoencoderKL"
IDENTITY = "ldm.autoencoder.autoencoder.IdentityFirstStage"
ENDS = ("<|startoftext|>", "<|endoftext|>")
DDIM = {  # settings of the scheduler beside those of the noise table
    "class": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
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
    "loss_type": "l2",
}  # fmt: skip
TEXT_DEFAULTS: dict[str, Any] = {
    "chunks": 1, "context_dim": None, "layer": "last", "layout": "joint", "mask_padding": True, "pad": "eos",
    "prompt": "{text}", "text_only": False,
}  # fmt: skip


def to_diffusers(folder: Path, out: Path, half: bool = False) -> list[str]:
    """Write a diffusion model as a folder of diffusers, a KL first stage as an AutoencoderKL's; gives what is to say.

    A model of text by KL latents is a StableDiffusionPipeline. Classes, scores and features lie beside the networks as
    a table and a module that gives them to the pipeline (`diffusers_conditioning`).
    UserError: the model has something that diffusers does not, as omics.

    >>> to_diffusers(models / "demo-omics", Path("pipeline"))
    Traceback (most recent call last):
    ldm.errors.UserError: diffusers does not have the condition OmicsEmbedder; the model cannot be written in that form.
    """
    form = "diffusers"
    model = read_own(folder)
    if model.node["target"] != targets.LATENT_DIFFUSION:
        return _first_stage_alone(model, out, half)
    check_free(out, "model_index.json")
    params = with_defaults(model.node["params"], DIFFUSION_DEFAULTS)
    notes: list[str] = []
    c = unet_params(params["unet_config"], form)
    for name in ("conv_resample", "num_classes", "resblock_updown"):
        if c[name] != UNET_DEFAULTS[name]:
            raise lacks(form, f"UNets with {name} {c[name]}")
    if c["channel_mult"][0] != 1:
        raise lacks(form, f"UNets whose first level is not of model_channels (channel_mult {c['channel_mult']})")
    node = params.get("cond_stage_config")
    told, tensors = (None, {}) if node is None or node["target"] == targets.TEXT_EMBEDDER else conditioning(node, model)
    acts = {member["acts"] for member in told["members"]} if told else set()
    scheduler = _scheduler_config(params, model.metadata.get("scheduler") or {}, form)
    if c["use_spatial_transformer"]:
        unet, unet_names = _unet_config(c)
        networks = {"unet": (unet, renamed(part_of(model, UNET), unet_names, str(folder)))}
    else:
        networks = {"unet": pixel_unet(c, part_of(model, UNET), str(folder))}
        unet = networks["unet"][0]
    if "vector" in acts:
        unet["class_embed_type"] = "identity"
    index: dict[str, Any] = {
        "_class_name": "DDIMPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", unet["_class_name"]],
    }
    if params["first_stage_config"]["target"] == IDENTITY:
        scheduler["clip_sample"] = True  # as samplers here do of models on pixels
    else:
        vae, vae_names = _vae_config(params["first_stage_config"], form)
        scale = model.state.get("scale_factor", params["scale_factor"])
        if params["shift_factor"] or isinstance(scale, list):
            raise lacks(form, "latents that are shifted, or scaled by channel")
        vae["scaling_factor"] = float(scale)
        networks["vae"] = (vae, renamed(to_linear(part_of(model, FIRST_STAGE)), vae_names, str(folder)))
        index["vae"] = ["diffusers", vae["_class_name"]]
    if "vae" in networks and c["use_spatial_transformer"]:
        index |= {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "text_encoder": [None, None],
            "tokenizer": [None, None],
        }
    tokenizer: dict[str, str] = {}
    if told is not None:
        notes.append(f"its conditions ({', '.join(m['key'] for m in told['members'])}) lie in conditioning.json and "
                     f"conditioning.safetensors; {MODULE} makes prompt_embeds of them, and samples")  # fmt: skip
        if "vae" in networks and acts == {"crossattn"} and unet["in_channels"] == unet["out_channels"]:
            notes.append("load it by StableDiffusionPipeline.from_pretrained(OUT, text_encoder=None, tokenizer=None)")
        if unet["in_channels"] != unet["out_channels"]:
            notes.append(f"a map beside the latents is given by no pipeline: sample with {MODULE}")
    elif node is not None:
        text, config = text_node(node, model, form)
        if text["chunks"] > 1:
            notes.append(
                f"captions have {text['chunks']} chunks, which no pipeline joins: give prompt_embeds, each chunk "
                "encoded by itself"
            )
        tower, tokens = _tower_of(model), config["text_cfg"]["context_length"]
        encoder = transformers_config(config, layers_of(tower))
        encoder |= {"_name_or_path": config.get("name", ""), "use_attention_mask": text["mask_padding"]}
        networks["text_encoder"] = (encoder, from_open_clip(tower))
        if "vae" in networks:
            index["text_encoder"] = ["transformers", "CLIPTextModel"]
        if config["text_cfg"]["vocab_size"] == len(clip_vocabulary()):
            tokenizer = _tokenizer_files(tokens, "!" if text["pad"] == "zero" else ENDS[1])
            if "vae" in networks:
                index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        else:
            notes.append("the text tower has not CLIP's words: without a tokenizer, give the pipeline prompt_embeds")
        if text["prompt"] != "{text}":
            notes.append(f"the text tower was trained on prompts like '{text['prompt']}'; write them so")
    else:
        notes.append("the model has no text tower: give the pipeline prompt_embeds")
    licence = model.metadata.get("licence")
    notes.append(f"licence: {licence}" if licence else "the model folder records no licence")
    with whole(out) as part:
        write_json(part / "model_index.json", index)
        if told is not None:
            write_json(part / "conditioning.json", told)
            save_file(apart(tensors), part / "conditioning.safetensors", metadata={"format": "pt"})
        if told is not None or index["_class_name"] != "StableDiffusionPipeline":
            (part / MODULE).write_text(module_text(), encoding="utf-8")
        write_json(part / "scheduler" / "scheduler_config.json", scheduler)
        for name, text_of in tokenizer.items():
            (part / "tokenizer").mkdir(exist_ok=True)
            (part / "tokenizer" / name).write_text(text_of, encoding="utf-8")
        for name, (config, state) in networks.items():
            write_json(part / name / "config.json", config)
            file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
            save_file(apart(state, half), part / name / file, metadata={"format": "pt"})
    return notes


def _first_stage_alone(model: Converted, out: Path, half: bool) -> list[str]:
    check_free(out, "config.json")
    config, names = _vae_config(model.node, "diffusers' AutoencoderKL")
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


def _unet_config(c: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The config of a UNet2DConditionModel, and our name -> diffusers' of its modules."""
    widths = [mult * c["model_channels"] for mult in c["channel_mult"]]
    attention = [2**level in c["attention_resolutions"] for level in range(len(widths))]
    fixed = c["num_head_channels"]
    config = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": c["num_heads"] if fixed == -1 else [width // fixed for width in widths],
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": c["context_dim"],
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        "downsample_padding": 1,
        "dropout": c["dropout"],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": c["in_channels"],
        "layers_per_block": c["num_res_blocks"],
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": c["norm_groups"],
        "out_channels": c["out_channels"],
        "resnet_time_scale_shift": "scale_shift" if c["use_scale_shift_norm"] else "default",
        "sample_size": c["image_size"],
        "transformer_layers_per_block": c["transformer_depth"],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in attention[::-1]],
        "use_linear_projection": False,
    }
    return config, _inverse(unet_modules(attention, c["num_res_blocks"]))


def _vae_config(node: Mapping[str, Any], form: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The config of an AutoencoderKL without its scale, and our name -> diffusers' of its modules."""
    if node["target"] != AUTOENCODER_KL:
        raise lacks(form, f"first stages of the kind {kind_of(node)} (it has KL autoencoders)")
    c = {"mid_attention": True, "num_groups": 32, **node["params"]["ddconfig"]}
    latent, levels = node["params"]["embed_dim"], len(c["ch_mult"])
    if c["z_channels"] != latent or c["ch_mult"][0] != 1:
        raise lacks(form, f"z_channels {c['z_channels']} with embed_dim {latent}, or ch_mult {c['ch_mult']} of ch")
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
    return config, _inverse(vae_modules(attention, c["num_res_blocks"], c["mid_attention"]))


def _scheduler_config(params: Mapping[str, Any], known: Mapping[str, Any], form: str) -> dict[str, Any]:
    """The config of a scheduler with the model's noise table; of DDIM, or of the class that the model came with."""
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    schedules = {ours: theirs for theirs, ours in SCHEDULES.items()}
    if params["parameterization"] not in predictions:
        raise lacks(form, f"parameterization '{params['parameterization']}' (it has {', '.join(predictions)})")
    if params["learn_sigma"]:
        raise lacks(form, "learnt variances (learn_sigma)")
    name = params["beta_schedule"]
    if name not in schedules or (name == "cosine" and params["cosine_s"] != DIFFUSION_DEFAULTS["cosine_s"]):
        raise lacks(form, f"the beta_schedule '{name}' with cosine_s {params['cosine_s']}")
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


# --- of every form -----------------------------------------------------------------------------------------------


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


def _tower_of(model: Converted) -> dict[str, Tensor]:
    return {name.removeprefix("tower."): value for name, value in part_of(model, TEXT).items()}


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


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names.items()}


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
