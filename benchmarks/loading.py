"""Loading a model, against reading its file: time, and memory that is the process's own.

Writes the UNet of Large-Image-Diffusion (400.92 M parameters) with its first stage and conditioner, random weights, as
model folder and as checkpoint, and loads each in turn with a plain read of the same bytes, from the file cache of the
system. `--quick` takes a small network. Every run is a process of its own; what is printed are medians.

    python benchmarks/loading.py --work /tmp/loading
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHUNK = 1 << 24


def node(quick: bool) -> dict[str, Any]:
    width = 32 if quick else 192
    unet = {
        "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": width, "num_res_blocks": 2,
        "attention_resolutions": [8, 4, 2], "channel_mult": [1, 2, 3, 5] if not quick else [1, 2], "num_heads": 1,
        "use_spatial_transformer": True, "context_dim": 512,
    }  # fmt: skip
    stage = {
        "embed_dim": 3, "n_embed": 8192,
        "ddconfig": {
            "double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3,
            "ch": 32 if quick else 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [],
            "dropout": 0.0,
        },
    }  # fmt: skip
    return {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "use_ema": False,
            "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": unet},
            "first_stage_config": {"target": "ldm.autoencoder.autoencoder.VQModel", "params": stage},
            "cond_stage_config": {
                "target": "ldm.conditioners.ssl.PatchEmbedder",
                "params": {"embed_dim": 1024, "context_dim": 512},
            },
        },
    }


def make(work: Path, quick: bool) -> None:
    """A model folder, and the same as the checkpoint and project YAML of CompVis' code."""
    import torch

    from ldm.config import instantiate_from_config
    from ldm.convert import export_as
    from ldm.model_folder import write_model_folder

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in instantiate_from_config(node(quick)).state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    state = {name: 0.02 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    write_model_folder(work / "folder", node(quick), state, {})
    export_as("compvis", work / "folder", work / "published")


def own_memory() -> tuple[int, int]:
    """Bytes of this process: (resident and no part of a file, all that is resident)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {name: int(fields[name].split()[0]) for name in ("RssAnon", "VmRSS")}
    return 1024 * kilobytes["RssAnon"], 1024 * kilobytes["VmRSS"]


def once(kind: str, work: Path) -> None:
    """One measurement in this process, printed as JSON."""
    import torch

    import ldm.convert
    import ldm.latent_diffusion  # imports are no part of loading

    source = work / ("folder" if kind in ("read", "folder") else "published")
    file = source / ("model.safetensors" if source.name == "folder" else "model.ckpt")
    before = own_memory()
    start = time.perf_counter()
    if kind == "read":
        buffer = bytearray(file.stat().st_size)
        with file.open("rb", buffering=0) as stream:
            view = memoryview(buffer)
            while count := stream.readinto(view[:CHUNK]):
                view = view[count:]
    else:
        options = {} if source.name == "folder" else {"config": source / "config.yaml"}
        model = ldm.convert.load_model(source, **options)
    loaded = time.perf_counter() - start
    if kind != "read":  # mapped weights come into memory when they are used
        with torch.no_grad():
            total = sum(float(p.sum()) for p in model.parameters())
        assert total == total
    touched = time.perf_counter() - start
    own, resident = (after - at for after, at in zip(own_memory(), before))
    print(json.dumps({"load": loaded, "touch": touched, "own": own, "resident": resident}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, 3.4 GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--once", choices=("read", "folder", "published"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        once(options.once, options.work)
        return
    if not (options.work / "published").is_dir():
        options.work.mkdir(parents=True, exist_ok=True)
        make(options.work, options.quick)
    kinds = ("read", "folder", "published")
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(options.repeats):
        for kind in kinds:
            command = [sys.executable, __file__, "--work", str(options.work), "--once", kind]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[kind].append(json.loads(out.splitlines()[-1]))
    size = (options.work / "folder" / "model.safetensors").stat().st_size
    middle = {k: {n: statistics.median(run[n] for run in runs) for n in runs[0]} for k, runs in found.items()}
    read = middle["read"]["load"]
    print(f"file {size / 1e9:.2f} GB, read in {read:.2f} s ({size / read / 1e9:.1f} GB/s), median of {options.repeats}")
    for kind in kinds[1:]:
        m = middle[kind]
        print(
            f"{kind:<10} load {m['load']:.2f} s ({m['load'] / read:.2f} x reading), and every weight used "
            f"{m['touch']:.2f} s ({m['touch'] / read:.2f} x); memory {m['resident'] / 1e9:.2f} GB "
            f"({m['resident'] / size:.2f} x the file), of it {m['own'] / 1e9:.2f} GB the process's own"
        )


if __name__ == "__main__":
    main()
