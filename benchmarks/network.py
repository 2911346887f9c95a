"""How fast the networks are, beside other libraries' of the same size.

    pip install -e .[bench]
    python benchmarks/network.py [--sizes small crc dit pixart lucidrains] [--device cpu] [--rounds 9]
    python benchmarks/network.py --only caching --model data/models/demo-ssl

Both networks have the same channels, blocks, attention and condition, random weights, and run in turns in one process;
printed are medians of the rounds and their ratio. diffusers has its default (SDPA) attention.

    small, crc         UNetModel beside UNet2DConditionModel: configs/demo/ssl.yaml (4 context tokens) and
                       configs/latent-diffusion/crc_20x.yaml (1 token, 400.92 M parameters)
    dit-small, dit     DiT under classes beside DiTTransformer2DModel: 64 and 256 tokens
    pixart-small, pixart    DiT with cross-attention to 16 tokens beside PixArtTransformer2DModel
    lucidrains         LucidrainsUNet beside the UNet of denoising-diffusion-pytorch 1.5

    forward     inference; bf16 is autocast for both
    train       forward and backward; bf16 is autocast for both
    sampling    inference as `LatentDiffusion.denoiser` calls the network below float32, its weights cast once, beside
                diffusers with all of its weights in bf16, in its faster memory layout (lucidrains: autocast)

TFLOP/s count the matrix products and convolutions of our forward (and backward) pass; the ceiling is a large product
of the same precision in the same run. On a GPU both networks are in channels_last. `--cpu-time` counts the processor's
time instead, for a machine that does other things; set OMP_NUM_THREADS=1 with it.

Caching: what `denoiser(cache=N)` (DeepCache) costs and saves when a model samples under features of tiles of the demo
slide: relative difference of the final latents from those without it, and how many times as fast sampling is.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from pairs import BATCHES, ROOT, SIZES, Pair, pair_of
from speed import DTYPES, Step, flops_of, forward_step, matrix_ceiling, race, rates, size_in_millions, train_step
from torch import Tensor

from ldm.devices import pick_device
from ldm.errors import UserError, run_command
from ldm.networks.cache import CastNetwork

INTERVALS = (1, 2, 3, 5)  # steps from one computation of deep features to the next


def compare(size: str, options: argparse.Namespace, ceilings: Mapping[str, float]) -> None:
    """Print a size's table."""
    device = options.device
    torch.manual_seed(0)
    try:
        pair = pair_of(size, options.side, options.tokens)
    except UserError as error:
        print(f"\n{size}: skipped; {error}")
        return
    ours, theirs = size_in_millions(pair.ours), size_in_millions(pair.theirs)
    if abs(ours / (theirs - pair.repeated) - 1) > 0.02:
        raise UserError(f"the networks are not of one size: {ours:.2f} M parameters and {theirs:.2f} M")
    layout = torch.contiguous_format if device == "cpu" else torch.channels_last
    nets = [net.to(device, memory_format=layout) for net in (pair.ours, pair.theirs)]
    batch = options.batch or BATCHES[device][size]
    x = torch.randn(batch, *pair.shape, device=device).contiguous(memory_format=layout)
    given = (x, torch.full((batch,), 500, device=device), pair.condition(batch).to(device))
    repeated = f" ({pair.repeated:.2f} M of them copies of one embedder)" if pair.repeated else ""
    print(
        f"\n{size}: {ours:.2f} M parameters, {pair.library} {theirs:.2f} M{repeated}; x {tuple(x.shape)}, condition "
        f"{tuple(given[2].shape)}"
    )
    print(f"{'':14}{'ours':>10}{pair.library:>12}{'ratio':>8}{'images/s':>10}{'TFLOP/s':>9}{'of ceiling':>12}")
    for mode in options.modes:
        for net in nets:
            net.train(mode == "train")
        for precision in ["bf16"] if mode == "sampling" else options.precisions:
            steps = steps_of(pair, mode, DTYPES[precision], given)
            flops = flops_of(steps["ours"])
            taken = race(steps, options.rounds, device, options.clock)
            mine, other = taken.pop("ours"), min(taken.values())
            speed, achieved, share = rates(flops, batch, mine, ceilings[precision])
            print(
                f"{mode:9}{precision:5}{mine * 1e3:8.0f}ms{other * 1e3:10.0f}ms{other / mine:8.2f}{speed:10.2f}"
                f"{achieved:9.3f}{share:12.0%}",
                flush=True,
            )
            for net in nets:
                net.zero_grad(set_to_none=True)


def steps_of(pair: Pair, mode: str, dtype: torch.dtype, given: tuple[Tensor, ...]) -> dict[str, Step]:
    """What is timed: "ours", and the other library's in one or more ways."""
    device = given[0].device.type
    ours, theirs = partial(pair.call_ours, pair.ours, *given), partial(pair.call_theirs, pair.theirs, *given)
    if mode == "train":
        return {
            "ours": train_step(pair.ours, ours, dtype, device),
            "theirs": train_step(pair.theirs, theirs, dtype, device),
        }
    others = {"theirs": forward_step(theirs, dtype, device)}
    if mode == "forward":
        return {"ours": forward_step(ours, dtype, device), **others}
    if pair.casts:
        others = {}
        for layout in (torch.contiguous_format, torch.channels_last):
            net = copy.deepcopy(pair.theirs).to(dtype, memory_format=layout)
            x, timesteps, condition = given
            cast = condition.to(dtype) if condition.is_floating_point() else condition
            call = partial(pair.call_theirs, net, x.to(dtype, memory_format=layout), timesteps, cast)
            others[f"theirs, {layout}"] = torch.no_grad()(call)
    return {"ours": torch.no_grad()(partial(pair.call_ours, CastNetwork(pair.ours, dtype), *given)), **others}


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
        taken = race(
            {n: partial(run, n) for n in INTERVALS}, max(options.rounds // 3, 1), options.device, options.clock
        )
        print(f"\n{options.model}, {steps} steps of DPM-Solver++(2M), guidance 2, bf16, {len(places)} tiles")
        for n in INTERVALS[1:]:
            difference = float((results[n] - results[1]).norm() / results[1].norm())
            speed = taken[1] / taken[n]
            print(f"cache={n}: {speed:.2f} times as fast, relative difference {difference:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument(
        "--modes", nargs="+", choices=["forward", "train", "sampling"], default=["forward", "train", "sampling"]
    )
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, help="default: by the size, 1 to 8 on a CPU, 16 to 256 on a GPU")
    parser.add_argument("--side", type=int, help="of the latents; default: by the size")
    parser.add_argument("--tokens", type=int, help="of the context; default: 1, 4 or 16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="the processor's time in the place of the clock's")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda")
    parser.add_argument("--only", choices=["networks", "caching"])
    parser.add_argument("--model", type=Path, default=ROOT / "data" / "models" / "demo-ssl")
    parser.add_argument("--encoder", type=Path, default=ROOT / "data" / "models" / "demo-encoder")
    options = parser.parse_args()
    options.device = torch.device(pick_device(options.device)).type
    if options.device not in BATCHES:
        raise UserError(f"this benchmark runs on {' or '.join(BATCHES)}; got {options.device}.")
    options.clock = time.process_time if options.cpu_time else time.perf_counter
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    load = f", load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores" if options.device == "cpu" else ""
    print(f"{name}{load}; PyTorch {torch.__version__}")
    if options.only != "caching":
        ceilings = {
            precision: matrix_ceiling(dtype, options.device, options.clock) for precision, dtype in DTYPES.items()
        }
        print("; ".join(f"{precision} products: {value:.2f} TFLOP/s" for precision, value in ceilings.items()))
        for size in options.sizes:
            compare(size, options, ceilings)
    if options.only != "networks":
        caching(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
