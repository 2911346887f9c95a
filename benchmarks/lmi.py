"""What LMI maps cost: `ldm.networks.lmi.lmi_map` beside the dense form, which holds every joint histogram at once.

    python benchmarks/lmi.py [--size 128] [--batch 1] [--rounds 5] [--threads 1]

The source is a smooth image with a black ground, as a slice is; targets are another smooth image and pure noise. The
two forms take turns, so that what else the machine does falls on both; printed are medians over the rounds, ratios,
the largest difference, and each form's peak memory, measured in a process of its own.

On two CPU cores that other work kept busy, which falls on both forms, `--rounds 3` printed

    target image, 1 x 128 px: largest relative difference 1.9e-06
      dense      24676 ms (  1.0x)   peak  1534.8 MB (   1.0x less)
      lmi_map      678 ms ( 36.4x)   peak     9.2 MB ( 165.9x less)
    target noise, 1 x 128 px: largest relative difference 1.2e-06
      dense      14330 ms (  1.0x)   peak  1534.9 MB (   1.0x less)
      lmi_map      623 ms ( 23.0x)   peak     4.2 MB ( 364.2x less)
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from statistics import median

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from ldm.networks.lmi import EPS, lmi_map


@torch.no_grad()
def dense_lmi(
    source: Tensor, target: Tensor, patch: int = 3, bins: int = 27, sigma: float = 2.0, normalized: bool = True
) -> Tensor:
    """The map (B,1,H,W) of gray images by its definition, with all (B*H*W*patch^2, bins, bins) histograms in memory."""
    (b, _, h, w), half, pixels = source.shape, patch // 2, patch**2
    centres, width = torch.linspace(0, 255, bins), 2 * sigma**2

    def patches(image: Tensor) -> Tensor:
        return F.unfold(F.pad(image, [half] * 4), patch)                        # (B,pixels,places)

    source, target = ((255 * image).int().float() for image in (source, target))
    size = {"h": h, "w": w}
    spread = rearrange(patches(target), "b (i j) (h w) -> b 1 (h i) (w j)", i=patch, **size)
    others = rearrange(patches(spread), "b p (h i w j) -> (b h w i j) p 1", i=patch, j=patch, **size)
    own = repeat(patches(source), "b p place -> (b place candidate) p 1", candidate=pixels)
    k1, k2 = (torch.exp(-0.5 * ((values - centres) / width) ** 2) for values in (own, others))
    p1, p2 = (k.mean(1) / (k.mean(1).sum(1, keepdim=True) + EPS) for k in (k1, k2))
    joint = k1.transpose(1, 2) @ k2
    joint = joint / (joint.sum((1, 2), keepdim=True) + EPS)
    h1, h2, h12 = (-(p * (p + EPS).log2()).flatten(1).sum(1) for p in (p1, p2, joint))
    information = h1 + h2 - h12
    if normalized:
        information = 2 * (information + EPS) / (h1 + h2 + EPS)
    return reduce(information, "(b h w candidate) -> b 1 h w", "max", b=b, **size)


def smooth(count: int, size: int, seed: int) -> Tensor:
    """Smooth images (count,1,size,size) in [0, 1], black outside a disc."""
    rng = torch.Generator().manual_seed(seed)
    image = F.interpolate(torch.rand(count, 1, size // 8, size // 8, generator=rng), size=(size, size), mode="bicubic")
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    return image.clamp(0, 1) * (x**2 + y**2 < 0.7)


def peak_memory(form: Callable[..., Tensor], source: Tensor, target: Tensor, threads: int) -> float:
    """MB that a form takes at most, in a new process; this one must be small still, as a child starts at its peak."""
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.SimpleQueue()
    process = spawn.Process(target=_run_once, args=(form, source, target, threads, answer))
    process.start()
    used = answer.get()
    process.join()
    return used


def _run_once(form: Callable[..., Tensor], source: Tensor, target: Tensor, threads: int, answer: SimpleQueue) -> None:
    torch.set_num_threads(threads)
    form(source[..., :16, :16], target[..., :16, :16])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    form(source, target)
    answer.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=128, help="side of the images (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    noise = torch.randn(options.batch, 1, options.size, options.size, generator=torch.Generator().manual_seed(2))
    source = smooth(options.batch, options.size, 0)
    targets = {"image": smooth(options.batch, options.size, 1), "noise": noise}
    forms = {"dense": dense_lmi, "lmi_map": lmi_map}
    memory = {
        (name, form): peak_memory(function, source, target, options.threads)
        for name, target in targets.items()
        for form, function in forms.items()
    }
    for name, target in targets.items():
        times: dict[str, list[float]] = {form: [] for form in forms}
        found = {}
        for _ in range(options.rounds):
            for form, function in forms.items():
                start = time.perf_counter()
                found[form] = function(source, target)
                times[form].append(time.perf_counter() - start)
        seconds = {form: median(each) for form, each in times.items()}
        error = (found["dense"] - found["lmi_map"]).abs().max() / found["dense"].abs().max()
        print(f"target {name}, {options.batch} x {options.size} px: largest relative difference {error:.1e}")
        for form in forms:
            print(
                f"  {form:8} {seconds[form] * 1e3:7.0f} ms ({seconds['dense'] / seconds[form]:5.1f}x)   "
                f"peak {memory[name, form]:7.1f} MB ({memory[name, 'dense'] / max(memory[name, form], 0.1):6.1f}x less)"
            )


if __name__ == "__main__":
    main()
