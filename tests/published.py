"""Networks, weights and noise tables of the published implementations, for the tests of parity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.diffusion import schedules
from ldm.networks.unet import UNetModel
from ldm.sampling.inversion import invert_published

AWAY = 0.1  # deviations of a weight by which the average of the weights is away from it


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def unpack(packed: Path, folder: Path) -> Path:
    """`folder`, with the files of tests/oracle as their publishers write them: the random weights are drawn again."""
    for path in packed.rglob("*.*"):
        out = folder / path.relative_to(packed)
        out.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".pt":
            out.write_bytes(path.read_bytes())
            continue
        content = _with_weights(load(path))
        out = out.with_suffix("") if "." in out.stem else out  # of model.ckpt.pt, model.ckpt
        save_file(content, out) if out.suffix == ".safetensors" else torch.save(content, out)
    return folder


def _with_weights(content: Any) -> Any:
    if isinstance(content, dict):
        return draw(content) if "drawn" in content else {key: _with_weights(each) for key, each in content.items()}
    return [_with_weights(each) for each in content] if isinstance(content, list) else content


def draw(recipe: dict) -> dict[str, Tensor]:
    """Weights from the seed and the shapes of each network, and tensors that are `kept` (tests/oracle/README.md)."""
    state: dict[str, Tensor] = {}
    for part in recipe["drawn"]:
        generator, prefix, drawn = torch.Generator().manual_seed(part["seed"]), part["prefix"], {}
        if "average_of" in part:
            for name in part["names"]:
                raw = state[part["average_of"] + name]
                noise = torch.randn(raw.shape, generator=generator)
                drawn[name.replace(".", "") if part["dotless"] else name] = raw + AWAY * raw.std(correction=0) * noise
        else:
            drawn = {name: _weight(name, shape, generator, part) for name, shape in part["shapes"].items()}
        total = sum(float(value.double().abs().sum()) for value in drawn.values())
        assert math.isclose(total, part["sum"], rel_tol=1e-6), "this torch draws other random numbers than the oracle's"
        state |= {prefix + name: value for name, value in drawn.items()}
    return state | recipe["kept"]


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator, part: dict) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith(".g") or (len(shape) == 1 and name.endswith("weight")):
        value = 1 + 0.1 * noise
    else:
        value = 0.05 * noise if len(shape) == 1 else part["scale"] * noise / math.prod(shape[1:]) ** 0.5
    return value.half() if part["half"] else value


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
