"""A large image: this toolkit's sampler against the published procedure, with the same weights, in one run.

    python benchmarks/large_image.py                                # three seeds of 1024 x 1024 px
    python benchmarks/large_image.py --seeds 1 --steps 5            # a quick look: 5 steps of the published procedure
    python benchmarks/large_image.py --student models/my-student    # and a student of the model, in its steps
    python benchmarks/large_image.py --student models/my-student --procedures student \
        --student-set {} '{"steps": 2}' '{"mode": "overlap", "stride": 192}'        # in several ways

The published procedure (Large-Image-Diffusion, arXiv:2312.07330), as its notebook sets it and scaled to the model's
window: windows at every quarter of a window (169 for 4 x 4 tiles) denoised at each of 50 DDIM steps with and without
their condition, their x0 averaged; the tiles' features slerped at the windows' corners; at last every window decoded by
itself and blended with Gaussian weights (sigma 0.8 of half a window). Written anew from its description. Given to both:
weights, features, guidance scale, precision, --batch-size of the network. What this favours the published side in: the
windows' conditions are made once, its windows are cut without a copy of the canvas.

Each image is made in a process of its own, the procedures in turns. Printed for each, means over the seeds:

time        wall, of sampling and decoding without loading the model; less what other processes take if --cpu-time
evaluations of the network: windows, with and without the condition counted as two
memory      peak of the process, of it the model as loaded; on a GPU what was allocated there
seams       as benchmarks/conditioning.py: gradient across the borders of the tile lattice over that inside tiles
distance    cosine distance of the features of tiles (every quarter) to those of the real region; by the judge as well,
            which conditioned neither, where the extra [judge] is installed
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditioning import read_region
from torch import Tensor

import ldm
from ldm.devices import pick_device
from ldm.diffusion.fields import FeatureField
from ldm.encoders.encoder import load_encoder
from ldm.errors import UserError, run_command
from ldm.files import writable_folder, write_text
from ldm.images.sheets import grid
from ldm.images.write import save_png, to_uint8
from ldm.latent_diffusion import LatentDiffusion
from ldm.metrics.seams import NEAR, seam_ratios
from ldm.rng import canvas_noise
from ldm.sampling.guided import PRECISIONS

SIGMA = 0.8  # of the published blend of decoded windows


class Clock:
    """Seconds and rows of the calls of some modules of a model, which it watches from when it is made."""

    def __init__(self, device: str, cpu_time: bool):
        self.device, self.now = device, time.process_time if cpu_time else time.perf_counter
        self.seconds = {"network": 0.0, "decoding": 0.0}
        self.rows = 0
        self.begun = self.read()

    def read(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return self.now()

    def watch(self, call: Callable[..., Tensor], part: str) -> Callable[..., Tensor]:
        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            begun = self.read()
            out = call(x, *args, **kwargs)
            self.seconds[part] += self.read() - begun
            self.rows += len(x) if part == "network" else 0
            return out

        return watched


@torch.no_grad()
def published(model: LatentDiffusion, features: Tensor, options: argparse.Namespace, seed: int) -> Tensor:
    """The published procedure: (1,3,H,W) in [0,1]. features (rows,cols,D) of adjoining tiles, or of any lattice."""
    window, factor = model.image_size, model.first_stage_model.downsampling
    height, width = (side // factor for side in options.size)
    corners = [
        (row, col)
        for stride in [window // 4]
        for row in range(0, height - window + 1, stride)
        for col in range(0, width - window + 1, stride)
    ]
    field = FeatureField(features, (height, width), window, "slerp")
    cond = model.condition(features=field.at(corners))
    null = {part: value.expand_as(cond[part]) for part, value in model.null_condition().items()}
    denoiser = model.denoiser(PRECISIONS[options.precision])
    cut = [(slice(row, row + window), slice(col, col + window)) for row, col in corners]

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        """x0 of the canvas: guided windows, averaged."""
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for first in range(0, len(cut), options.batch_size):
            part = slice(first, first + options.batch_size)
            windows = torch.cat([x[..., rows, cols] for rows, cols in cut[part]])
            both = {name: torch.cat([value[part], null[name][part]]) for name, value in cond.items()}
            with_it, without = denoiser(torch.cat([windows] * 2), sigma.expand(2 * len(windows)), both).chunk(2)
            guided = without + options.guidance_scale * (with_it - without)
            for x0, (rows, cols) in zip(guided, cut[part]):
                total[..., rows, cols] += x0
                count[..., rows, cols] += 1
        return total / count

    table = model.sigmas
    stride = len(table) // options.steps
    alphas = 1 / (1 + table**2)  # cumulative
    betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
    shape = (model.channels, height, width)
    x = canvas_noise(seed, *shape).to(model.device)  # variance-preserving
    for step in range(options.steps):
        t = len(table) - 1 - step * stride
        x0 = denoised(x / alphas[t].sqrt(), table[t])
        eps = (x - alphas[t].sqrt() * x0) / (1 - alphas[t]).sqrt()
        if t < stride:
            x = x0
            break
        previous = alphas[t - stride]
        variance = betas[t] * (1 - previous) / (1 - alphas[t])  # of a single step, whatever the stride
        noise = canvas_noise(seed, *shape, stream=step + 1).to(x)
        x = previous.sqrt() * x0 + (1 - previous - variance).sqrt() * eps + variance.sqrt() * noise

    side = window * factor
    axis = torch.linspace(-1, 1, side, device=x.device)
    kernel = torch.exp(-(axis[:, None] ** 2 + axis**2) / SIGMA**2)
    image, weight = x.new_zeros(1, 3, height * factor, width * factor), x.new_zeros(height * factor, width * factor)
    for (row, col), (rows, cols) in zip(corners, cut):
        place = slice(row * factor, row * factor + side), slice(col * factor, col * factor + side)
        image[(..., *place)] += model.decode(x[..., rows, cols]) * kernel
        weight[place] += kernel
    return (image / weight).clamp(-1, 1).cpu()


def _with(
    settings: Mapping[str, Any], model: LatentDiffusion, features: Tensor, options: argparse.Namespace, seed: int
) -> Tensor:
    """An image by this toolkit's sampler: its defaults but for `settings`, of sampling and of windows."""
    settings = {"guidance_scale": options.guidance_scale, "precision": options.precision, **settings}
    own = {name: settings.pop(name) for name in ("mode", "stride", "interpolation") if name in settings}
    sampler = ldm.Sampler(seed=seed, batch_size=options.batch_size, progress=False, **settings)
    return ldm.large_image(model, features, options.size, sampler, ldm.Windows(**own))


def ours(model: LatentDiffusion, features: Tensor, options: argparse.Namespace, seed: int) -> Tensor:
    """This toolkit's defaults, or --set."""
    return _with(options.set, model, features, options, seed)


def student(model: LatentDiffusion, features: Tensor, options: argparse.Namespace, seed: int) -> Tensor:
    """A student of the model, in the steps that it was trained for, or one of --student-set."""
    return _with(options.student_set[options.arm], model, features, options, seed)


PROCEDURES = {"published": published, "ours": ours, "student": student}


def make_image(options: argparse.Namespace) -> None:
    """One image by one procedure: image.npy and measures.json in --work. The process ends with it."""
    device = pick_device(options.device)
    model = ldm.load_model(options.student if options.procedure == "student" else options.model, device)
    features = torch.from_numpy(np.load(options.features))
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = Clock(device, options.cpu_time)
    model.model.forward = clock.watch(model.model.forward, "network")
    for decoder in filter(None, (model.first_stage_model, model.small_decoder)):
        decoder.decode = clock.watch(decoder.decode, "decoding")
    image = PROCEDURES[options.procedure](model, features, options, options.seed)
    total = clock.read() - clock.begun
    np.save(options.work / "image.npy", to_uint8(image)[0])
    measures = {
        "seconds": total, **clock.seconds, "rest": total - sum(clock.seconds.values()), "evaluations": clock.rows,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "loaded_mib": loaded / 1024,
    }  # fmt: skip
    if device.startswith("cuda"):
        measures["gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    write_text(options.work / "measures.json", json.dumps(measures))


def run_child(
    arguments: Sequence[str], procedure: str, arm: int, seed: int, grid: Path, work: Path
) -> dict[str, Any]:
    """`make_image` in a process of its own: its figures, with the image (H,W,3) uint8."""
    command = [sys.executable, __file__, *arguments, "--procedure", procedure, "--arm", str(arm), "--seed", str(seed)]
    subprocess.run([*command, "--features", str(grid), "--work", str(work)], check=True)
    return json.loads((work / "measures.json").read_text()) | {"image": np.load(work / "image.npy")}


@torch.no_grad()
def tile_features(encoder: Any, image: np.ndarray, tile: int, stride: int) -> Tensor:
    """(rows,cols,D) of tiles at every `stride` px of an image (H,W,3) uint8."""
    pixels = torch.from_numpy(image.copy()).movedim(-1, 0).float() / 127.5 - 1
    rows, cols = ((side - tile) // stride + 1 for side in image.shape[:2])
    corners = [(row * stride, col * stride) for row in range(rows) for col in range(cols)]
    batches = (corners[first : first + 32] for first in range(0, len(corners), 32))
    features = [
        encoder(torch.stack([pixels[:, row : row + tile, col : col + tile] for row, col in batch])) for batch in batches
    ]
    return torch.cat(features).view(rows, cols, -1)


def observers(encoder: Any) -> dict[str, Any]:
    """Who judges, by the result's key: the encoder that conditioned both, and the judge where it is installed."""
    from ldm.encoders.judge import PACKAGE, load_judge

    if find_spec(PACKAGE) is None:
        return {"distance": encoder}
    judge = load_judge()
    return {"distance": encoder, "distance_judge": lambda images: judge(torch.from_numpy(to_uint8(images)))}


def distances(a: Tensor, b: Tensor) -> np.ndarray:
    """Cosine distances of features (rows,cols,D) at the same places."""
    return (1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).flatten().numpy()


def seams(image: np.ndarray, tile: int) -> dict[str, float]:
    return {"seam": float(seam_ratios(image, tile)[0]), "seam_like": float(seam_ratios(image, tile, NEAR)[0])}


COLUMNS = {
    "time s": ("seconds", ".1f"), "network s": ("network", ".1f"), "decoding s": ("decoding", ".1f"),
    "rest s": ("rest", ".1f"), "evaluations": ("evaluations", ".0f"), "peak MiB": ("peak_mib", ".0f"),
    "model MiB": ("loaded_mib", ".0f"), "GPU MiB": ("gpu_mib", ".0f"), "seams": ("seam", ".3f"),
    "seams, like for like": ("seam_like", ".3f"), "distance": ("distance", ".4f"),
    "distance, judge": ("distance_judge", ".4f"),
}  # fmt: skip


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Means over the seeds, and their range where there are several."""
    wide = max(26, *(len(name) + 2 for name in results))
    lines = [f"{'':22}" + "".join(f"{name:>{wide}}" for name in results)]
    for title, (key, form) in COLUMNS.items():
        cells = []
        for rows in results.values():
            values = [row[key] for row in rows if key in row]
            cell = format(np.mean(values), form) if values else ""
            spread = f" ({min(values):{form}}..{max(values):{form}})" if len(set(values)) > 1 else ""
            cells.append(f"{cell + spread:>{wide}}")
        if any(cell.strip() for cell in cells):
            lines.append(f"{title:22}" + "".join(cells))
    return "\n".join(lines)


def run(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    if options.procedure:
        return make_image(options)
    if options.out:
        writable_folder(options.out)
    chosen = options.procedures or [name for name in PROCEDURES if name != "student" or options.student]
    if "student" in chosen and not options.student:
        raise UserError("the procedure student needs a model folder: --student")
    encoder = load_encoder(options.encoder)
    real = read_region(options.slide, options.region)
    tile = options.tile
    if any(side % tile for side in real.shape[:2]):
        raise UserError(f"--region is of whole tiles of {tile} px; it has {real.shape[1]} x {real.shape[0]} px")
    eyes = observers(encoder)
    truth = {name: tile_features(eye, real, tile, tile // 4) for name, eye in eyes.items()}
    arms = {name: (name, 0) for name in chosen if name != "student"}
    for i, settings in enumerate(options.student_set if "student" in chosen else ()):
        arms[", ".join(["student", *(f"{key} {value}" for key, value in settings.items())])] = ("student", i)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    shown: dict[str, np.ndarray] = {"real": real}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        np.save(work / "grid.npy", tile_features(encoder, real, tile, options.feature_stride or tile).numpy())
        sized = [*arguments, "--size", *map(str, real.shape[:2])]
        for seed in range(options.seeds):
            for name, (procedure, arm) in arms.items():
                made = run_child(sized, procedure, arm, seed, work / "grid.npy", work)
                image = made.pop("image")
                made |= seams(image, tile)
                for key, eye in eyes.items():
                    made[key] = float(distances(tile_features(eye, image, tile, tile // 4), truth[key]).mean())
                results[name].append(made)
                shown.setdefault(name, image)
                if options.out:
                    about = {"procedure": name, "seed": seed, "model": options.model.name}
                    save_png(options.out / f"{procedure}{arm or ''}-{seed}.png", image, about)
                print(f"{name}, seed {seed}: {json.dumps(made)}", file=sys.stderr, flush=True)
    print(
        f"{real.shape[1]} x {real.shape[0]} px, {options.seeds} seeds, guidance {options.guidance_scale:g}, "
        f"{options.precision}, {options.steps} steps as published, batches of {options.batch_size} windows; "
        f"{'CPU' if options.cpu_time else 'wall'} time\n{table(results)}"
    )
    reference = seams(real, tile)
    print(f"real region: seams {reference['seam']:.3f}, like for like {reference['seam_like']:.3f}")
    for name in results if "published" in results else ():
        if name != "published":
            ratios = [p["seconds"] / o["seconds"] for p, o in zip(results["published"], results[name])]
            spread = f"median; {min(ratios):.1f}..{max(ratios):.1f}"
            print(f"time, published over {name}: {np.median(ratios):.1f} ({spread})")
    if options.out:
        about = {"content": f"from the left: {', '.join(shown)}", "model": options.model.name}
        save_png(options.out / "side_by_side.png", grid([list(shown.values())], least=0), about)
        write_text(options.out / "measures.json", json.dumps(results, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("data/models/demo-ssl"), help="model folder (default %(default)s)")
    add("--encoder", default="data/models/demo-encoder", help="that made its features (default %(default)s)")
    add("--slide", type=Path, default=Path("data/demo/CMU-1-Small-Region.svs"), help="(default %(default)s)")
    add("--region", default="896,1472,1024,1024", help="x,y,width,height, level-0 px (default %(default)s)")
    add("--tile", type=int, default=256, help="side of the model's tiles in px (default %(default)s)")
    add("--feature-stride", type=int, help="px between the features given to both (default: adjoining tiles)")
    add("--student", type=Path, help="model folder of a student of the model")
    add("--student-set", type=json.loads, nargs="+", default=[{}], help='of the student, as {"steps": 2}; one or more')
    add("--procedures", nargs="+", choices=PROCEDURES, help="(default: all, the student if there is one)")
    add("--seeds", type=int, default=3, help="seeds 0, 1, ... (default %(default)s)")
    add("--steps", type=int, default=50, help="of the published procedure (default %(default)s)")
    add("--set", type=json.loads, default={}, help='of ours, as {"steps": 20, "solver": "unipc"}')
    add("--guidance-scale", type=float, default=2.0, help="of both (default %(default)s)")
    add("--batch-size", type=int, default=16, help="windows at once, each with and without (default %(default)s)")
    add("--precision", default="fp32", choices=PRECISIONS, help="(default %(default)s)")
    add("--device", default="auto", help="(default %(default)s)")
    add("--cpu-time", action="store_true", help="time of the process on the CPU: for a machine with other work")
    add("--out", type=Path, help="folder for the images, side by side as well, and measures.json")
    for name, kind in (("--procedure", str), ("--arm", int), ("--seed", int), ("--features", Path), ("--work", Path)):
        add(name, type=kind, help=argparse.SUPPRESS)  # of one image
    add("--size", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: run(parser.parse_args(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main())
