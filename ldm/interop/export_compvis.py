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
from ldm.interop.diffusers_folder import FIRST_STAGE, UNET, read_own
from ldm.interop.export import (
    AUTOENCODER_KL,
    DIFFUSION_DEFAULTS,
    apart,
    check_free,
    kind_of,
    lacks,
    part_of,
    unet_params,
    with_defaults,
    write_json,
)
from ldm.interop.export_conditions import FORM, conditioning
from ldm.interop.noise_buffers import posterior_buffers, schedule_buffers

VQ = "ldm.autoencoder.autoencoder.VQModel"
PREDICTIONS = ("eps", "x0", "v")
OF_FORK = "it predicts velocity (v): Stability AI's fork for Stable Diffusion 2 has that, CompVis' own code has not"


def to_compvis(folder: Path, out: Path, half: bool, betas: Tensor) -> list[str]:
    """Write a model as CompVis' code and its forks load it: out/model.ckpt, out/config.yaml; gives what is to be said.

    betas (T,) are a diffusion model's, for the buffers of its schedule; a first stage has none. UserError: the model
    has something that they do not.

    >>> to_compvis(models / "demo-ssl", Path("compvis"), half=False, betas=torch.linspace(1e-4, 0.02, 1000))
    Traceback (most recent call last):
    ldm.errors.UserError: CompVis' code does not have ...; the model cannot be written in that form.
    """
    check_free(out, "model.ckpt")
    model = read_own(folder)
    if model.node["target"] != targets.LATENT_DIFFUSION:
        node = _first_stage(model.node)
        node["target"] = node["target"].replace("VQModelInterface", "VQModel")
        return _written(out, {"base_learning_rate": 4.5e-6, **node}, apart(model.state, half), {}, [])
    params = with_defaults(model.node["params"], DIFFUSION_DEFAULTS)
    if params["parameterization"] not in PREDICTIONS:
        raise lacks(FORM, f"parameterization '{params['parameterization']}' (it has {', '.join(PREDICTIONS)})")
    if params["learn_sigma"]:
        raise lacks(FORM, "learnt variances (learn_sigma)")
    unet, stage = _unet(params["unet_config"]), _first_stage(params["first_stage_config"])
    state = {UNET + name: value for name, value in part_of(model, UNET).items()}
    state |= {FIRST_STAGE + name: value for name, value in part_of(model, FIRST_STAGE).items()}
    told = conditioning(params.get("cond_stage_config"), model)
    if told.labels is not None:
        unet["params"]["num_classes"] = len(told.labels)
        state[UNET + "label_emb.weight"] = told.labels
    if params["shift_factor"] or isinstance(params["scale_factor"], list):
        raise lacks(FORM, "latents that are shifted, or scaled by channel")
    left = ("learn_sigma", "scale_factor", "shift_factor", "sigma_data", "time_shift")
    project = {name: params[name] for name in DIFFUSION_DEFAULTS if name not in left} | {
        "scale_factor": 1.0 if params["scale_by_std"] else params["scale_factor"],
        "log_every_t": 200,
        "first_stage_key": "image",
        "image_size": unet["params"]["image_size"],
        "channels": unet["params"]["out_channels"],
        "monitor": "val/loss_simple_ema",
        "use_ema": False,
        **told.entries,
        "unet_config": unet,
        "first_stage_config": stage,
    }
    if params["scale_by_std"]:
        state["scale_factor"] = model.state["scale_factor"]
    buffers = schedule_buffers(betas) | posterior_buffers(betas)
    tensors = {name: value.float() for name, value in buffers.items()} | apart(state | told.state, half)
    node = {"base_learning_rate": 1e-4, "target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": project}
    said = "the weights are those that sample (averaged, if any are): use_ema is false in config.yaml"
    notes = [*told.notes, *([OF_FORK] if params["parameterization"] == "v" else []), said]
    return _written(out, node, tensors, told.files, notes)


def _written(
    out: Path, node: Mapping[str, Any], state: Mapping[str, Tensor], files: Mapping[str, Any], notes: list[str]
) -> list[str]:
    with whole(out) as part:
        part.mkdir(parents=True)
        torch.save({"epoch": 0, "global_step": 0, "state_dict": dict(state)}, part / "model.ckpt")
        save_config({"model": node}, part / "config.yaml")
        for name, config in files.items():
            write_json(part / name, config)
    return notes


def _unet(node: Mapping[str, Any]) -> dict[str, Any]:
    c = unet_params(node, FORM)
    if c["norm_groups"] != 32:
        raise lacks(FORM, f"group normalisation of {c['norm_groups']} groups (it has 32)")
    if c["num_classes"] is not None:
        raise lacks(FORM, "a UNet with class labels of its own (num_classes)")
    kept = {name: value for name, value in c.items() if name != "norm_groups" and value is not None}
    return {"target": targets.UNETS[0], "params": kept}


def _first_stage(node: Mapping[str, Any]) -> dict[str, Any]:
    published = {ours: theirs for theirs, ours in reversed(targets.FIRST_STAGES.items()) if theirs.startswith("ldm.")}
    published[VQ] = "ldm.models.autoencoder.VQModelInterface"
    target, given = published.get(node["target"]), dict(node.get("params") or {})
    if target is None:
        raise lacks(FORM, f"first stages of the kind {kind_of(node)}")
    if "ddconfig" not in given:
        return {"target": target, "params": given}
    dd = dict(given["ddconfig"])
    if not given.get("quant_conv", True):
        raise lacks(FORM, "autoencoders without quant_conv")
    if dd.pop("num_groups", 32) != 32 or not dd.pop("mid_attention", True):
        raise lacks(FORM, "autoencoders without attention in the middle, or with another number of groups than 32")
    dd["double_z"] = node["target"] == AUTOENCODER_KL
    kept = {name: given[name] for name in ("embed_dim", "n_embed") if name in given}
    return {"target": target, "params": {**kept, "ddconfig": dd, "lossconfig": {"target": "torch.nn.Identity"}}}
