"""Checkpoints of the mitotic-figure DPM (DGM4MICCAI 2023): denoising-diffusion-pytorch, its classes a score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import foreign_config
from ldm.errors import UserError, suggest
from ldm.interop.converted import Converted

MARK = "null_classes_emb"  # only this network has it
CONDITIONER = (MARK, "classes_emb.", "classes_mlp.")
SCORER = {"conv1.weight", "layer4.2.conv2.weight", "fc.weight"}
SETTINGS = {"image_size": 64, "resnet_block_groups": 8}  # which weights do not show, as published
BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
)  # fmt: skip
OTHER_BUFFERS = (
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "p2_loss_weight",
)


def is_mitotic(path: Path, content: Any) -> bool:
    """Whether a checkpoint holds this network, or one of the scorers that were published beside it.

    >>> is_mitotic(Path("model.pt"), {"model.null_classes_emb": torch.ones(1)})
    True
    """
    names = set(_weights(content))
    return any(name.endswith(MARK) for name in names) or names >= SCORER


def read_mitotic(path: Path, content: Any, *, config: str | Path | None = None) -> Converted:
    """The diffusion model of a checkpoint.

    config: YAML with image_size (64) or resnet_block_groups (8), where they are not the published ones.
    UserError: a scorer; classes in place of a score; tensors that have no place.

    >>> golden = torch.load(published / "mitotic_lucidrains.pt")
    >>> found = read_mitotic(Path("model.pt"), golden["unet_state_dict"])
    >>> found.node["params"]["unet_config"]["params"]["dim_mults"]
    [1, 2]
    """
    weights = _weights(content)
    name = next((name for name in weights if name.endswith(MARK)), None)
    if name is None:
        raise UserError(f"{path} is a ResNet-34 scorer, no diffusion model; ldm.scorers.ensemble.load_scorer reads it.")
    inner = name.removesuffix(MARK)  # "model." of a published checkpoint
    outer = inner.removesuffix("model.")
    network = {name.removeprefix(inner): value for name, value in weights.items() if name.startswith(inner)}
    around = {name.removeprefix(outer): value for name, value in weights.items() if not name.startswith(inner)}
    if strange := [name for name in around if name not in (*BUFFERS, *OTHER_BUFFERS)]:
        raise UserError(f"{len(strange)} tensors of {path} have no place in the model (first: {outer}{strange[0]}).")
    if tuple(network.get("classes_emb.weight", torch.empty(0)).shape[1:]) != (1,):
        raise UserError(f"{path} is conditioned on classes; only the form that takes one score is known here.")

    found = Converted({}, {})
    settings = _settings(config, found)
    for name, value in network.items():
        part = "cond_stage_model." if name.startswith(CONDITIONER) else "model.diffusion_model."
        found.state[part + name] = value
    found.schedule = {name: value for name, value in around.items() if name in BUFFERS}
    for name in around:
        found.unused[outer + name] = "of the noise schedule, which the config gives"
    for key in content if "model_state_dict" in content else ():
        if key not in ("model_state_dict", "epoch"):
            found.unused[key] = "state of the training's optimizer"
    found.notes += [
        "the network is taken to predict the noise, as published: the checkpoint does not say",
        "published cells were sampled in 1000 ancestral steps at guidance scale 8 with the condition dropped in half "
        "of the draws, which acts like about 4: --solver ddpm --steps 1000 --guidance-scale 4",
    ]
    found.node = _node(network, _schedule(around, found), settings, path)
    return found


def _weights(content: Any) -> dict[str, Tensor]:
    inner = content.get("model_state_dict", content) if isinstance(content, Mapping) else None
    state = inner if isinstance(inner, Mapping) else {}
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _settings(config: str | Path | None, found: Converted) -> dict[str, int]:
    given = foreign_config(config) if config else {}
    for name, value in given.items():
        if name not in SETTINGS:
            raise UserError(f"{config}: '{name}' is no setting of this network{suggest(name, SETTINGS)}")
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{config}: {name} is a whole number above 0; got {value!r}.")
    for name, published in SETTINGS.items():
        if name not in given:
            found.notes.append(f"{name} is taken to be {published}, as published; a YAML with another: --config")
    return {**SETTINGS, **given}


def _schedule(buffers: Mapping[str, Tensor], found: Converted) -> dict[str, Any]:
    """The noise table: cosine, or linear in beta. Whether it is so is checked when all is converted."""
    betas = buffers.get("betas")
    if betas is None:
        found.notes.append("the checkpoint holds no noise schedule; it is taken to be cosine with 1000 levels")
        return {"beta_schedule": "cosine", "timesteps": 1000}
    betas = betas.double()
    line = torch.linspace(float(betas[0]), float(betas[-1]), len(betas), dtype=torch.float64)
    if torch.allclose(betas, line, rtol=1e-3, atol=1e-6):
        ends = {"linear_start": float(betas[0]), "linear_end": float(betas[-1])}
        return {"beta_schedule": "sqrt_linear", "timesteps": len(betas), **ends}
    return {"beta_schedule": "cosine", "timesteps": len(betas)}


def _node(
    network: Mapping[str, Tensor], schedule: Mapping[str, Any], settings: Mapping[str, int], path: Path
) -> dict[str, Any]:
    first = network.get("init_conv.weight")
    if first is None or first.ndim != 4:
        raise UserError(f"{path} lacks the network's first convolution, init_conv.weight.")
    dim, channels = first.shape[:2]
    mults = []
    while (down := network.get(f"downs.{len(mults)}.3.weight")) is not None:
        mults.append(len(down) // dim)
    return {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "parameterization": "eps",
            **schedule,
            "loss_type": "l1",
            "weight_decay": 0.0,
            "use_ema": False,
            "unet_config": {
                "target": "ldm.networks.lucidrains.LucidrainsUNet",
                "params": {"dim": dim, "dim_mults": mults, "channels": channels, **settings},
            },
            "first_stage_config": {
                "target": "ldm.autoencoder.autoencoder.IdentityFirstStage",
                "params": {"channels": channels},
            },
            "cond_stage_config": {
                "target": "ldm.conditioners.score.LucidrainsScore",
                "params": {"dim": dim, "dropout": 0.5},
            },
        },
    }
