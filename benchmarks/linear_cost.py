"""Does the cost of a large image grow linearly? Time per megapixel and peak memory from 1024 to 4096 px.

    python benchmarks/linear_cost.py                                  # a small network with random weights: minutes
    python benchmarks/linear_cost.py --model data/models/demo-ssl --steps 12

Every image is made in a process of its own, the sizes in turns; times are medians. Memory is the peak above what the
process held before it sampled. What a canvas holds is its latents in float32, of which a solver needs several, and its
image in float32; what the peak grows by beyond `COPIES` of the latents and one image is printed as excess.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import ldm
from ldm.config import instantiate_from_config
from ldm.devices import pick_device
from ldm.errors import run_command
from ldm.latent_diffusion import LatentDiffusion

COPIES = 7  # of the latents: x, x0 and the x0 before, their sum and weights, what a step computes from them
SMALL = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {
        "parameterization": "v",
        "use_ema": False,
        "unet_config": {
            "target": "ldm.networks.unet.UNetModel",
            "params": {
                "image_size": 32, "in_channels": 8, "out_channels": 8, "model_channels": 32, "num_res_blocks": 1,
                "attention_resolutions": [2], "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True,
                "context_dim": 32,
            },
        },
        "first_stage_config": {
            "target": "ldm.autoencoder.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 8,
                "ddconfig": {
                    "double_z": True, "z_channels": 8, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 8,
                    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
                    "mid_attention": False, "num_groups": 8,
                },
            },
        },
        "cond_stage_config": {
            "target": "ldm.conditioners.ssl.PatchEmbedder", "params": {"embed_dim": 16, "context_dim": 32},
        },
    },
}  # fmt: skip


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def load(path: Path | None, device: str) -> LatentDiffusion:
    if path is not None:
        return ldm.load_model(path, device)
    torch.manual_seed(0)
    return instantiate_from_config(SMALL).eval().to(device)


def measure(options: argparse.Namespace) -> None:
    """One image of --side px: its figures as JSON on the standard output."""
    device = pick_device(options.device)
    model = load(options.model, device)
    tile = model.tile_size
    dim = model.cond_stage_model.embed_dim

    def image(side: int) -> None:
        features = torch.randn(side // tile, side // tile, dim, generator=torch.Generator().manual_seed(0))
        sampler = ldm.Sampler(steps=options.steps, batch_size=options.batch_size, progress=False)
        ldm.large_image(model, features, (side, side), sampler)

    image(2 * tile)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 2**20 if on_gpu else peak_mib()
    clock = time.process_time if options.cpu_time else time.perf_counter
    begun = clock()
    image(options.side)
    seconds = clock() - begun
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_mib()
    latents = model.channels * (options.side // model.first_stage_model.downsampling) ** 2 * 4 / 2**20
    pixels = 0.0 if on_gpu else 3 * options.side**2 * 4 / 2**20
    print(json.dumps({"seconds": seconds, "mib": peak - before, "canvas": COPIES * latents + pixels}))


def run(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    if options.side:
        return measure(options)
    results: dict[int, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(options.repeats):
        for side in options.sides:
            command = [sys.executable, __file__, *arguments, "--side", str(side)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[side].append(json.loads(out.splitlines()[-1]))
    print(
        f"{options.steps} steps, {options.repeats} of each size, {'CPU' if options.cpu_time else 'wall'} time\n"
        "   side px   s per megapixel   of the first   peak MiB   canvas MiB   excess MiB"
    )
    first = None
    for side, rows in results.items():
        pace = statistics.median(row["seconds"] for row in rows) / (side**2 / 1e6)
        first = first or pace
        peak, canvas = max(row["mib"] for row in rows), rows[0]["canvas"]
        print(f"{side:10}{pace:18.3f}{pace / first:15.3f}{peak:11.0f}{canvas:13.0f}{peak - canvas:13.0f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="model folder (default: a small network with random weights)")
    add("--sides", type=int, nargs="+", default=[1024, 2048, 4096], help="px (default %(default)s)")
    add("--steps", type=int, default=10, help="(default %(default)s)")
    add("--repeats", type=int, default=3, help="(default %(default)s)")
    add("--batch-size", type=int, default=16, help="(default %(default)s)")
    add("--device", default="auto", help="(default %(default)s)")
    add("--cpu-time", action="store_true", help="time of the process on the CPU: for a machine with other work")
    add("--side", type=int, help=argparse.SUPPRESS)  # of one image
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: run(parser.parse_args(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main())
