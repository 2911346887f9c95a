"""How fast the UNet is, beside diffusers' UNet2DConditionModel of the same size.

    pip install -e .[bench]
    python benchmarks/network.py [--sizes small crc] [--device cpu] [--rounds 9]
    python benchmarks/network.py --only caching --model data/models/demo-ssl

Both networks have the same channels, blocks, attention and context, random weights, and run in turns in one process;
printed are medians of the rounds and their ratio. diffusers has its default (SDPA) attention. The sizes are those of
configs/demo/ssl.yaml (4 context tokens) and configs/latent-diffusion/crc_20x.yaml (1 token, 400.92 M parameters).

    forward     inference; bf16 is autocast for both
    train       forward and backward; bf16 is autocast for both
    sampling    inference as `LatentDiffusion.denoiser` calls the network below float32, its weights cast once, beside
                diffusers with all of its weights in bf16, in its faster memory layout

TFLOP/s count the matrix products and convolutions of our forward (and backward) pass; the ceiling is a large product
of the same precision in the same run. On a GPU both networks are in channels_last.

Caching: what `denoiser(cache=N)` (DeepCache) costs and saves when a model samples under features of tiles of the demo
slide: relative difference of the final latents from those without it, and how many times as fast sampling is.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.devices import pick_device
from ldm.errors import UserError, run_command
from ldm.networks.cache import CastNetwork
from ldm.networks.unet import UNetModel

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"small": "demo/ssl.yaml", "crc": "latent-diffusion/crc_20x.yaml"}
TOKENS = {"small": 4, "crc": 1}
BATCHES = {"cpu": {"small": 4, "crc": 1}, "cuda": {"small": 64, "crc": 16}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INTERVALS = (1, 2, 3, 5)  # steps from one computation of deep features to the next
Step = Callable[[], Any]


def unet_params(size: str) -> dict[str, Any]:
    """Parameters of the UNet of a size's config."""
    params = OmegaConf.load(ROOT / "configs" / CONFIGS[size]).model.params.unet_config.params
    return {**OmegaConf.to_container(params), "use_checkpoint": False}


def diffusers_unet(params: Mapping[str, Any]) -> nn.Module:
    """diffusers' UNet of the same size."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise UserError("this benchmark compares with diffusers; install it: pip install -e .[bench]") from error
    widths = [params["model_channels"] * mult for mult in params["channel_mult"]]
    attends = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    heads = [params.get("num_heads") or width // params["num_head_channels"] for width in widths]
    return UNet2DConditionModel(
        sample_size=params["image_size"],
        in_channels=params["in_channels"],
        out_channels=params["out_channels"],
        block_out_channels=widths,
        layers_per_block=params["num_res_blocks"],
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in attends[::-1]],
        cross_attention_dim=params["context_dim"],
        attention_head_dim=heads,  # diffusers' name for their number
    )


def our_unet(params: Mapping[str, Any]) -> UNetModel:
    """Our UNet; layers that start at zero are random too, as in a trained network."""
    net = UNetModel(**params)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return net


def size_in_millions(net: nn.Module) -> float:
    return sum(parameter.numel() for parameter in net.parameters()) / 1e6


def seconds(step: Step, device: str) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(steps: Mapping[Any, Step], rounds: int, device: str) -> dict[Any, float]:
    """Median seconds of each of `steps`, which take turns after one call to warm up."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name in list(steps) if round_ % 2 else list(steps)[::-1]:
            taken = seconds(steps[name], device)
            if round_:
                times[name].append(taken)
    return {name: median(each) for name, each in times.items()}


def flops_of(step: Step) -> int:
    """Floating-point operations of matrix products, convolutions and attention, two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def rates(flops: float, batch: int, taken: float, ceiling: float) -> tuple[float, float, float]:
    """Images/s, TFLOP/s and the share of the ceiling (TFLOP/s) of `batch` images of `flops` in all in `taken` s."""
    achieved = flops / taken / 1e12
    return batch / taken, achieved, achieved / ceiling


def matrix_ceiling(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of the best of some large square matrix products."""
    side = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = a @ b
    return 2 * side**3 / min(seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(20)) / 1e12


def forward_step(call: Callable[[], Tensor], dtype: torch.dtype, device: str) -> Step:
    @torch.no_grad()
    def step() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            call()

    return step


def train_step(net: nn.Module, call: Callable[[], Tensor], dtype: torch.dtype, device: str) -> Step:
    def step() -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            out = call()
        out.float().square().mean().backward()

    return step


def compare(size: str, options: argparse.Namespace, ceilings: Mapping[str, float]) -> None:
    """Print a size's table."""
    params, device = unet_params(size), options.device
    torch.manual_seed(0)
    nets = {"ours": our_unet(params), "diffusers": diffusers_unet(params)}
    millions = {name: size_in_millions(net) for name, net in nets.items()}
    if abs(millions["ours"] / millions["diffusers"] - 1) > 0.02:
        raise UserError(f"the networks are not of one size: {millions}")
    batch = options.batch or BATCHES[device][size]
    layout = torch.contiguous_format if device == "cpu" else torch.channels_last
    nets = {name: net.to(device, memory_format=layout) for name, net in nets.items()}
    side = options.side or params["image_size"]
    x = torch.randn(batch, params["in_channels"], side, side, device=device).contiguous(memory_format=layout)
    timesteps = torch.full((batch,), 500, device=device)
    context = torch.randn(batch, options.tokens or TOKENS[size], params["context_dim"], device=device)
    calls = {
        "ours": lambda: nets["ours"](x, timesteps, context=context),
        "diffusers": lambda: nets["diffusers"](x, timesteps, context, return_dict=False)[0],
    }
    print(
        f"\n{size}: {millions['ours']:.2f} M parameters, diffusers {millions['diffusers']:.2f} M; latents "
        f"{tuple(x.shape)}, {context.shape[1]} context tokens"
    )
    print(f"{'':14}{'ours':>10}{'diffusers':>12}{'ratio':>8}{'images/s':>10}{'TFLOP/s':>9}{'of ceiling':>12}")
    for mode in options.modes:
        for net in nets.values():
            net.train(mode == "train")
        for precision in ["bf16"] if mode == "sampling" else options.precisions:
            dtype = DTYPES[precision]
            if mode == "train":
                steps = {name: train_step(nets[name], call, dtype, device) for name, call in calls.items()}
            elif mode == "forward":
                steps = {name: forward_step(call, dtype, device) for name, call in calls.items()}
            else:
                steps = sampling_steps(nets, x, timesteps, context)
            flops = flops_of(steps["ours"])
            taken = race(steps, options.rounds, device)
            ours, theirs = taken.pop("ours"), min(taken.values())
            speed, achieved, share = rates(flops, batch, ours, ceilings[precision])
            print(
                f"{mode:9}{precision:5}{ours * 1e3:8.0f}ms{theirs * 1e3:10.0f}ms{theirs / ours:8.2f}{speed:10.2f}"
                f"{achieved:9.3f}{share:12.0%}",
                flush=True,
            )
            for net in nets.values():
                net.zero_grad(set_to_none=True)


def sampling_steps(nets: Mapping[str, nn.Module], x: Tensor, timesteps: Tensor, context: Tensor) -> dict[str, Step]:
    """Inference in bf16 with weights that are cast beforehand."""
    dtype = torch.bfloat16
    ours = CastNetwork(nets["ours"], dtype)
    steps = {"ours": torch.no_grad()(lambda: ours(x, timesteps, context=context))}
    for layout in (torch.contiguous_format, torch.channels_last):
        theirs = copy.deepcopy(nets["diffusers"]).to(dtype, memory_format=layout)
        inputs = x.to(dtype, memory_format=layout), timesteps, context.to(dtype)
        steps[f"diffusers {layout}"] = torch.no_grad()(
            lambda theirs=theirs, inputs=inputs: theirs(*inputs, return_dict=False)[0]
        )
    return steps


@torch.no_grad()
def caching(options: argparse.Namespace) -> None:
    """Print what caching deep features does to the samples of a model."""
    import ldm
    from ldm.diffusion.guidance import cfg
    from ldm.diffusion.samplers import sample_dpmpp_2m
    from ldm.encoders.encoder import load_encoder
    from ldm.images.slides import open_slide
    from ldm.rng import sample_noise

    model = ldm.load_model(options.model, options.device)
    slide = open_slide(ROOT / "data" / "demo" / "CMU-1-Small-Region.svs")
    side = model.tile_size
    width, height = slide.dimensions
    places = [(int(x * width), int(y * height)) for x in (0.15, 0.4, 0.65) for y in (0.3, 0.6)]
    tiles = torch.stack([torch.from_numpy(slide.read(x, y, side, side).copy()) for x, y in places])
    features = load_encoder(options.encoder)(tiles.permute(0, 3, 1, 2).float() / 127.5 - 1)
    cond = {name: value.to(options.device) for name, value in model.condition(features=features).items()}
    shape = (model.channels, model.image_size, model.image_size)
    for steps in (20, 50):
        sigmas = ldm.Sampler(steps=steps).settled(model, "sample").sigmas(model)
        noise = sample_noise(range(len(places)), shape).to(model.device) * sigmas[0]

        def run(interval: int, sigmas: Tensor = sigmas, noise: Tensor = noise) -> Tensor:
            denoiser = model.denoiser(torch.bfloat16, cache=interval)
            return sample_dpmpp_2m(cfg(denoiser, model.null_condition(), 2.0), noise, sigmas, cond)

        results = {n: run(n) for n in INTERVALS}
        taken = race({n: partial(run, n) for n in INTERVALS}, max(options.rounds // 3, 1), options.device)
        print(f"\n{options.model}, {steps} steps of DPM-Solver++(2M), guidance 2, bf16, {len(places)} tiles")
        for n in INTERVALS[1:]:
            difference = float((results[n] - results[1]).norm() / results[1].norm())
            speed = taken[1] / taken[n]
            print(f"cache={n}: {speed:.2f} times as fast, relative difference {difference:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument(
        "--modes", nargs="+", choices=["forward", "train", "sampling"], default=["forward", "train", "sampling"]
    )
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, help="default: 4 and 1 on a CPU, 64 and 16 on a GPU")
    parser.add_argument("--side", type=int, help="of the latents; default: the config's")
    parser.add_argument("--tokens", type=int, help="of the context; default: 4 and 1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda")
    parser.add_argument("--only", choices=["networks", "caching"])
    parser.add_argument("--model", type=Path, default=ROOT / "data" / "models" / "demo-ssl")
    parser.add_argument("--encoder", type=Path, default=ROOT / "data" / "models" / "demo-encoder")
    options = parser.parse_args()
    options.device = torch.device(pick_device(options.device)).type
    if options.device not in BATCHES:
        raise UserError(f"this benchmark runs on {' or '.join(BATCHES)}; got {options.device}.")
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    load = f", load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores" if options.device == "cpu" else ""
    print(f"{name}{load}; PyTorch {torch.__version__}")
    if options.only != "caching":
        ceilings = {precision: matrix_ceiling(dtype, options.device) for precision, dtype in DTYPES.items()}
        print("; ".join(f"{precision} products: {value:.2f} TFLOP/s" for precision, value in ceilings.items()))
        for size in options.sizes:
            compare(size, options, ceilings)
    if options.only != "networks":
        caching(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
