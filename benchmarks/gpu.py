"""What one GPU does with networks of published sizes, in eight minutes, with nothing to download.

    pip install -e .
    python benchmarks/gpu.py --out gpu          # table on the screen; gpu/gpu.json, gpu/image.png

Without a GPU, or with --device cpu, everything runs at a tiny size, which shows that it runs; most of its
time is the compiler's (--parts leaves it out).

    unet          UNetModel of configs/latent-diffusion/crc_20x.yaml, 400.92 M parameters, latents of 64 x 64
    transformer   DiT with cross-attention to 16 tokens, 610 M parameters, latents of 64 x 64 in patches of 2 x 2
                  of each: inference in bf16 as a model samples, its weights cast once, and a training step, forward and
                  backward, under autocast
    image         1024 x 1024 px of data/models/demo-ssl under features of the demo slide, twice: the second time counts
    agreement     tiles of the same model and seed in float32 on this device and on the CPU
    compile       the unet through `ldm.sample`, with `Sampler(compile=...)` off and on; the first call apart

TFLOP/s count matrix products, convolutions and attention, two for each multiply-add; "of peak" is their share of the
best large matrix product of the same run. Memory is the most that PyTorch held. A batch that does not fit is halved. A
part that fails loses no other; those that the budget (--minutes) leaves no time for are skipped, and named.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pairs import ROOT, unet_params
from PIL import Image
from speed import DTYPES, Step, filled, flops_of, matrix_ceiling, race, rates, seconds, size_in_millions, train_step
from torch import Tensor, nn

import ldm
from ldm.config import instantiate_from_config
from ldm.devices import pick_device
from ldm.encoders.encoder import load_encoder
from ldm.errors import UserError, printable, run_command
from ldm.files import writable_folder, write_text
from ldm.images.slides import open_slide
from ldm.networks.cache import CastNetwork
from ldm.networks.dit import DiT

MODEL, ENCODER = (ROOT / "data" / "models" / name for name in ("demo-ssl", "demo-encoder"))
SLIDE = ROOT / "data" / "demo" / "CMU-1-Small-Region.svs"
BF16 = DTYPES["bf16"]
Row = dict[str, Any]
TOKENS = 16  # of the transformer's context


@dataclass(frozen=True)
class Size:
    """How large the parts are."""

    unet: Row
    transformer: Row
    batch: int  # of forward; a quarter of it of training
    image: int  # side in pixels
    steps: int
    tiles: int
    rounds: int


def full() -> Size:
    transformer = {"image_size": 64, "hidden_size": 1152, "depth": 28, "num_heads": 16, "context_dim": 1152}
    return Size(unet_params("crc"), transformer, batch=64, image=1024, steps=10, tiles=16, rounds=9)


def tiny() -> Size:
    unet = unet_params("crc") | {"image_size": 16, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1]}
    unet |= {"attention_resolutions": [1]}
    transformer = {"image_size": 16, "hidden_size": 64, "depth": 2, "num_heads": 2, "context_dim": 64}
    return Size(unet, transformer, batch=4, image=256, steps=2, tiles=2, rounds=2)


class Bench:
    """The parts, and what they share. device: cpu or cuda."""

    def __init__(self, size: Size, device: str, folder: Path):
        self.size, self.device, self.folder = size, device, folder
        self.ceiling = 0.0  # TFLOP/s of bf16 products

    def peak(self) -> Iterator[Row]:
        for precision, dtype in DTYPES.items():
            ceiling = matrix_ceiling(dtype, self.device)
            self.ceiling = ceiling if dtype == BF16 else self.ceiling
            yield {"what": f"matrix product, {precision}", "tflops": ceiling}

    def unet(self) -> Iterator[Row]:
        params = self.size.unet
        yield from self._network(lambda: ldm_unet(params), params["in_channels"], params["image_size"], 1)

    def transformer(self) -> Iterator[Row]:
        yield from self._network(
            lambda: transformer(self.size.transformer), 4, self.size.transformer["image_size"], TOKENS
        )

    def _network(self, make: Callable[[], nn.Module], channels: int, side: int, tokens: int) -> Iterator[Row]:
        with torch.device(self.device):
            net = filled(make())
        layout = torch.contiguous_format if self.device == "cpu" else torch.channels_last
        net = net.to(memory_format=layout)
        about = f"{size_in_millions(net):.1f} M parameters, {side} x {side}"
        cast = CastNetwork(net, BF16)

        def step(mode: str, batch: int) -> Step:
            x = torch.randn(batch, channels, side, side, device=self.device).contiguous(memory_format=layout)
            context = torch.randn(batch, tokens, net.takes.context_dim, device=self.device)
            given = {"timesteps": torch.full((batch,), 500, device=self.device), "context": context}
            if mode == "training":
                return train_step(net.train(), lambda: net(x, **given), BF16, self.device)
            net.eval()
            return torch.no_grad()(lambda: cast(x, **given))

        for mode, batch in (("inference", self.size.batch), ("training", max(self.size.batch // 4, 1))):
            yield {"what": f"{mode}, bf16", "about": about, **self._timed(partial(step, mode), batch)}
            net.zero_grad(set_to_none=True)
            cast = None if mode == "inference" else cast  # its weights make room

    def _timed(self, step: Callable[[int], Step], batch: int) -> Row:
        """Speed and memory of a step, in the largest batch of `batch` or its halves that fits."""
        while True:
            self._clear()
            try:
                run = step(batch)
                flops = flops_of(run)
                taken = race({"": run}, self.size.rounds, self.device)[""]
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch //= 2
                continue
            images, tflops, share = rates(flops, batch, taken, self.ceiling or 1.0)
            held = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None
            row = {"batch": batch, "seconds": taken, "images_per_second": images, "tflops": tflops}
            return row | {"memory_gib": held, "of_peak": share if self.ceiling else None}

    def _clear(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def image(self) -> Iterator[Row]:
        model, side = ldm.load_model(MODEL, self.device), self.size.image
        count = side // model.tile_size
        grid = slide_features(count**2, model.tile_size).unflatten(0, (count, count))
        sampler = ldm.Sampler(steps=self.size.steps, progress=False)
        made: list[Tensor] = []
        for what in ("first time", "again"):
            self._clear()
            taken = seconds(lambda: made.append(ldm.large_image(model, grid, (side, side), sampler)), self.device)
            held = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None
            about = f"{side} x {side} px, {sampler.steps} steps, {what}"
            yield {
                "what": "image",
                "about": about,
                "seconds": taken,
                "images_per_second": 1 / taken,
                "memory_gib": held,
            }
        pixels = made[-1][0].add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(self.folder / "image.png")

    def agreement(self) -> Iterator[Row]:
        features = slide_features(self.size.tiles, 256)
        sampler = ldm.Sampler(steps=self.size.steps, precision="fp32", seed=1, progress=False)
        made = []
        for device in ("cpu", self.device):
            model = ldm.load_model(MODEL, device)
            made.append(ldm.sample(model, model.condition(features=features.to(model.device)), sampler=sampler))
        difference = (made[0] - made[1]).abs() * 127.5
        mean, largest = float(difference.mean()), float(difference.max())
        about = f"{len(features)} tiles; differences of 255 gray values: {mean:.4f} in the mean, {largest:.3f} at most"
        yield {
            "what": f"fp32, cpu and {self.device}", "about": about, "mean_difference": mean,
            "largest_difference": largest,
        }  # fmt: skip

    def compile(self) -> Iterator[Row]:
        model = instantiate_from_config(plain_model(self.size.unet)).to(self.device).eval()
        filled(model)
        count, condition = self.size.tiles, model.condition(**{"class": ["a"]})
        for on in (False, True):
            self._clear()
            sampler = ldm.Sampler(
                steps=self.size.steps,
                precision="bf16",
                batch_size=count,
                compile=on,
                guidance_scale=1.0,
                progress=False,
            )
            run = partial(ldm.sample, model, condition, count, sampler)
            if on:  # a compiled network lives as long as one call of `sample`; its code is kept by PyTorch
                torch.compiler.reset()
            first = seconds(run, self.device)
            taken = race({"": run}, max(self.size.rounds // 3, 1), self.device)[""]
            yield {
                "what": f"compile {'on' if on else 'off'}", "batch": count, "seconds": taken,
                "images_per_second": count / taken, "first_seconds": first,
                "about": f"{sampler.steps} steps of the unet; the first call took {first:.1f} s",
            }  # fmt: skip


def ldm_unet(params: Row) -> nn.Module:
    return instantiate_from_config({"target": "ldm.networks.unet.UNetModel", "params": params})


def transformer(params: Row) -> nn.Module:
    return DiT(4, 8, modulation="shared", **params)


def plain_model(unet: Row) -> Row:
    """The config of a model in the space of its UNet, conditioned on a class."""
    conditioner = {"classes": ["a", "b"], "dim": unet["context_dim"]}
    return {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "use_ema": False,
            "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": unet},
            "first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"},
            "cond_stage_config": {"target": "ldm.conditioners.class_token.ClassEmbedder", "params": conditioner},
        },
    }


def slide_features(count: int, side: int) -> Tensor:
    """Features (count,D) of tiles of the demo slide, spread over it."""
    slide = open_slide(SLIDE)
    width, height = (extent - side for extent in slide.dimensions)
    rows = max(round(count**0.5), 1)
    columns = -(-count // rows)
    places = [(width * x // columns, height * y // rows) for y in range(rows) for x in range(columns)][:count]
    tiles = torch.stack([torch.from_numpy(slide.read(x, y, side, side).copy()) for x, y in places])
    return load_encoder(ENCODER)(tiles.permute(0, 3, 1, 2).float() / 127.5 - 1)


PARTS = ("peak", "unet", "transformer", "image", "agreement", "compile")


def shown(row: Row) -> str:
    """A row of the table."""
    cells = [f"  {row['what']:24}"]
    for key, form, unit in (
        ("batch", "{:5d}", ""), ("seconds", "{:9.4f}", " s"), ("images_per_second", "{:9.2f}", "/s"),
        ("tflops", "{:8.2f}", " TFLOP/s"), ("of_peak", "{:5.0%}", " of peak"), ("memory_gib", "{:6.1f}", " GiB"),
    ):  # fmt: skip
        cells.append(form.format(row[key]) + unit if row.get(key) is not None else "")
    return "  ".join([*filter(None, cells), row.get("about", "")]).rstrip()


def run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    device = torch.device(pick_device(options.device)).type
    if device not in ("cpu", "cuda"):
        raise UserError(f"this benchmark runs on cpu or cuda; got {device}.")
    writable_folder(options.out)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device == "cpu":
        print("no GPU: tiny sizes, which show that everything runs")
    print(f"{name}; PyTorch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    report: Row = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "parts": {}}
    bench = Bench(full() if device == "cuda" else tiny(), device, options.out)
    for part in options.parts:
        print(part, flush=True)
        rows: list[Row] = []
        told: Row = {"rows": rows}
        report["parts"][part] = told
        work, start = getattr(bench, part)(), time.monotonic()
        try:
            while True:
                if time.monotonic() - began > 60 * options.minutes:
                    told["skipped"] = f"the {options.minutes:g} minutes are used up"
                    print(f"  {'the rest is ' if rows else ''}skipped: {told['skipped']}", flush=True)
                    break
                rows.append(next(work))
                print(shown(rows[-1]), flush=True)
        except StopIteration:
            pass
        except Exception as error:  # whatever it is, the other parts go on
            first = printable((str(error).splitlines() or [""])[0])
            told["failed"] = f"{type(error).__name__}: {first}"
            print(f"  failed: {told['failed']}", flush=True)
        told["seconds"] = time.monotonic() - start
        del work
        bench._clear()
        write_text(options.out / "gpu.json", json.dumps(report, indent=1))
    print(f"{time.monotonic() - began:.0f} s; {options.out / 'gpu.json'}")
    if failed := [part for part, told in report["parts"].items() if "failed" in told]:
        raise UserError(f"failed: {', '.join(failed)}; the reason stands at each.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of gpu.json and image.png")
    parser.add_argument("--minutes", type=float, default=8, help="after these no further part begins")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda")
    return run_command(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
