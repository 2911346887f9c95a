"""Model folders as checkpoints and project YAML of CompVis' latent-diffusion, Large-Image-Diffusion and PathLDM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import save_config
from ldm.files import whole
from ldm.interop import targets
from ldm.interop.converted import Converted
from ldm.interop.diffusers_folder import FIRST_STAGE, TEXT, UNET, read_own
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
    tower_of,
    unet_params,
    with_defaults,
    write_json,
)
from ldm.interop.noise_buffers import posterior_buffers, schedule_buffers
from ldm.interop.text_names import MARK, from_open_clip, transformers_config

# towers that transformers knows by name: (width, layers, heads, vocabulary, quick GELU)
VERSIONS = {
    (768, 12, 12, 49408, True): "openai/clip-vit-large-patch14",
    (512, 12, 8, 49408, True): "openai/clip-vit-base-patch32",
}


def to_compvis(folder: Path, out: Path, half: bool, betas: Tensor) -> list[str]:
    """Write a model as CompVis' code and its forks load it: out/model.ckpt, out/config.yaml; gives what is to be said.

    betas (T,) are the model's, for the buffers of its schedule. UserError: the model has something that they do not.
    """
    form = "CompVis' code"
    check_free(out, "model.ckpt")
    model = read_own(folder)
    params = with_defaults(model.node["params"], DIFFUSION_DEFAULTS)
    if params["parameterization"] not in ("eps", "x0"):
        raise lacks(form, f"parameterization '{params['parameterization']}' (it has eps and x0)")
    if params["learn_sigma"]:
        raise lacks(form, "learnt variances (learn_sigma)")
    unet, stage = _unet(params["unet_config"], form), _first_stage(params["first_stage_config"], form)
    state = {UNET + name: value for name, value in part_of(model, UNET).items()}
    state |= {FIRST_STAGE + name: value for name, value in part_of(model, FIRST_STAGE).items()}
    notes: list[str] = []
    conditioning, tensors, files = _conditioning(params.get("cond_stage_config"), model, form, notes)
    project = {name: params[name] for name in DIFFUSION_DEFAULTS if name not in ("learn_sigma", "scale_factor")} | {
        "scale_factor": 1.0 if params["scale_by_std"] else params["scale_factor"],
        "log_every_t": 200,
        "first_stage_key": "image",
        "image_size": unet["params"]["image_size"],
        "channels": unet["params"]["in_channels"],
        "monitor": "val/loss_simple_ema",
        "use_ema": False,
        **conditioning,
        "unet_config": unet,
        "first_stage_config": stage,
    }
    if params["scale_by_std"]:
        state["scale_factor"] = model.state["scale_factor"]
    buffers = schedule_buffers(betas) | posterior_buffers(betas)
    content = {
        "epoch": 0,
        "global_step": 0,
        "state_dict": {name: value.float() for name, value in buffers.items()} | apart(state | tensors, half),
    }
    node = {"base_learning_rate": 1e-4, "target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": project}
    with whole(out) as part:
        part.mkdir(parents=True)
        torch.save(content, part / "model.ckpt")
        save_config({"model": node}, part / "config.yaml")
        for name, config in files.items():
            write_json(part / name, config)
    return [*notes, "the weights are those that sample (averaged, if any are): use_ema is false in config.yaml"]


def _unet(node: Mapping[str, Any], form: str) -> dict[str, Any]:
    c = unet_params(node, form)
    if c["norm_groups"] != 32:
        raise lacks(form, f"group normalisation of {c['norm_groups']} groups (it has 32)")
    if c["num_classes"] is not None:
        raise lacks(form, "a UNet with class labels of its own (num_classes)")
    kept = {name: value for name, value in c.items() if name != "norm_groups" and value is not None}
    return {"target": targets.UNETS[0], "params": kept}


def _first_stage(node: Mapping[str, Any], form: str) -> dict[str, Any]:
    published = {ours: theirs for theirs, ours in reversed(targets.FIRST_STAGES.items()) if theirs.startswith("ldm.")}
    published["ldm.autoencoder.autoencoder.VQModel"] = "ldm.models.autoencoder.VQModelInterface"
    target, given = published.get(node["target"]), dict(node.get("params") or {})
    if target is None:
        raise lacks(form, f"first stages of the kind {kind_of(node)}")
    if "ddconfig" not in given:
        return {"target": target, "params": given}
    dd = dict(given["ddconfig"])
    if dd.pop("num_groups", 32) != 32 or not dd.pop("mid_attention", True):
        raise lacks(form, "autoencoders without attention in the middle, or with another number of groups than 32")
    dd["double_z"] = node["target"] == AUTOENCODER_KL
    kept = {name: given[name] for name in ("embed_dim", "n_embed") if name in given}
    return {"target": target, "params": {**kept, "ddconfig": dd, "lossconfig": {"target": "torch.nn.Identity"}}}


def _conditioning(
    node: Mapping[str, Any] | None, model: Converted, form: str, notes: list[str]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """The project's entries of a conditioner, its tensors by published names, and JSON files to lie beside."""
    if node is None:
        return {"cond_stage_config": targets.UNCONDITIONAL[0], "conditioning_key": None}, {}, {}
    kind, p = kind_of(node), dict(node.get("params") or {})
    state, files, trainable = {TEXT + name: value for name, value in part_of(model, TEXT).items()}, {}, True
    if kind == "ClassEmbedder" and p.get("acts", "crossattn") == "crossattn":
        name, key = kind, "class_label"
        given = {"embed_dim": p["dim"], "n_classes": len(p["classes"]) + 1, "key": key}
        notes.append(f"names of classes do not go along: {','.join(map(str, p['classes']))}, the null last")
    elif kind == "PatchEmbedder":
        name, key = kind, "hybrid"
        given = {"patch_ssl_key": "feat_patch", "patch_embed_dim": p["embed_dim"],
                 "target_dim": p.get("context_dim", 512), "normalize_ssl": p.get("normalize", True)}  # fmt: skip
    elif kind == "SSLEmbedder" and p.get("context_dim", 512) == 512:
        name, key = kind, "hybrid"
        given = {"patch_ssl_key": "feat_20x", "region_ssl_key": "feat_5x",
                 "patch_embed_dim": p.get("embed_dim", 384), "region_embed_dim": p.get("region_embed_dim", 768),
                 "normalize_ssl": p.get("normalize", True)}  # fmt: skip
    elif kind == "TextEmbedder":
        text, config = text_node(node, model, form)
        if text["pad"] != "eos" or (text["chunks"] > 1 and not (text["mask_padding"] and text["layout"] == "joint")):
            raise lacks(form, "captions of several chunks but as PathLDM has them, or padded with zeros")
        tower = tower_of(model)
        state = {f"{TEXT}transformer.{name}": value for name, value in from_open_clip(tower).items()}
        tokens, layers = config["text_cfg"]["context_length"], layers_of(tower)
        state[f"{TEXT}transformer.{MARK}embeddings.position_ids"] = torch.arange(tokens)[None]
        files["text_config.json"] = transformers_config(config, layers)
        name, key, trainable = "FrozenCLIPEmbedder", "caption" if text["mask_padding"] else "txt", False
        given = {"version": _version(config, layers, notes), "max_length": tokens * text["chunks"]}
        if text["prompt"] != "{text}":
            notes.append(f"the text tower was trained on prompts like '{text['prompt']}'; write them so")
    else:
        raise lacks(form, f"the condition {kind}{' added to the time embedding' if kind == 'ClassEmbedder' else ''}")
    entries = {
        "cond_stage_key": key,
        "cond_stage_trainable": trainable,
        "conditioning_key": "crossattn",
        "cond_stage_config": {"target": targets.ENCODERS + name, "params": given},
    }
    return entries, state, files


def _version(config: Mapping[str, Any], layers: int, notes: list[str]) -> str:
    """What CompVis' code builds its text tower from, before it loads the weights."""
    text = config["text_cfg"]
    shape = (text["width"], layers, text["heads"], text["vocab_size"], bool(config.get("quick_gelu")))
    if shape not in VERSIONS:
        notes.append("the text tower is none that is known by name: give its folder as cond_stage_config's version")
    return VERSIONS.get(shape, str(config.get("name", "CLIP text tower")))
