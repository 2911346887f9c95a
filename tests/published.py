"""Networks and noise tables of the published implementations, for the tests of parity."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.diffusion import schedules
from ldm.networks.unet import UNetModel
from ldm.sampling.inversion import invert_published


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def guided_diffusion_unet(golden: dict) -> nn.Module:
    """The UNet of create_model_and_diffusion for the oracle's configs."""
    config = golden["config"]
    net = UNetModel(
        in_channels=3, out_channels=6, model_channels=config["num_channels"],
        num_res_blocks=config["num_res_blocks"],
        attention_resolutions=[config["image_size"] // int(config["attention_resolutions"])],
        channel_mult=[int(mult) for mult in config["channel_mult"].split(",")], num_heads=config["num_heads"],
        num_classes=config["num_classes"], use_scale_shift_norm=True, resblock_updown=True,
        use_new_attention_order=config["use_new_attention_order"],
    ).eval()  # fmt: skip
    net.load_state_dict(golden["state_dict"])
    return net


def guided_diffusion_table() -> Tensor:
    betas = schedules.make_betas("sqrt_linear", 1000, 1e-4, 2e-2)
    return schedules.sigmas_from_alphas_cumprod((1 - betas).cumprod(0)).float()


def invert(denoiser, image: Tensor, sigmas: Tensor, cond: dict) -> Tensor:
    """guided-diffusion's ddim_reverse_sample_loop: to sigma = infinity, the noise."""
    return invert_published(denoiser, image, sigmas, cond) / (1 + sigmas[0] ** 2).sqrt()
