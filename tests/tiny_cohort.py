"""A cohort of tiles of noise, and the smallest trainings on it, for the tests of what a training may do besides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from ldm.data.store_writers import ArrayWriter, TileStoreWriter
from ldm.networks.dit import DiT
from ldm.networks.unet import UNetModel
from ldm.training.command import main

UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1,
    "channel_mult": [1, 2], "attention_resolutions": [2], "num_heads": 2,
}  # fmt: skip
DIT = {"image_size": 8, "in_channels": 4, "out_channels": 4, "hidden_size": 32, "depth": 3, "num_heads": 2}
NETWORKS = {"unet": UNetModel, "dit": DiT}
FIRST_STAGE = {
    "target": "ldm.autoencoder.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1],
            "num_res_blocks": 1, "attn_resolutions": [],
        },
    },
}  # fmt: skip


def make_cohort(folder: Path) -> Path:
    """48 tiles with latents, a grade of 0 or 1, a feature of 6 numbers and a map of it on 2 x 2 cells."""
    rng = np.random.default_rng(0)
    path = folder / "cohort" / "a.zarr"
    attrs = {"slide": "a.png", "mpp": 0.5, "tile_size": 32, "stride": 32, "downsample": 1.0, "level0_size": [96, 96]}
    with TileStoreWriter.create(path, 48, attrs, {"grade": "float32"}) as writer:
        pixels = rng.integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)
        writer.append(pixels, np.arange(96).reshape(48, 2) * 32, {"grade": np.arange(48) % 2})
    for name, shape, about in (
        ("latents/first", (4, 8, 8), {}), ("features/own", (6,), {}), ("features/own-map", (4, 6), {"tokens": 2}),
    ):  # fmt: skip
        with ArrayWriter(path, name, shape, "float16", about) as writer:
            writer.append(rng.normal(size=(48, *shape)).astype(np.float16))
    return path


def config(cohort: Path, kind: str, feature: str, **repa) -> dict:
    target = f"{NETWORKS[kind].__module__}.{NETWORKS[kind].__name__}"
    return {
        "model": {
            "base_learning_rate": 1e-3, "scale_lr": False, "target": "ldm.latent_diffusion.LatentDiffusion",
            "params": {
                "parameterization": "flow", "first_stage_config": FIRST_STAGE,
                "unet_config": {"target": target, "params": UNET if kind == "unet" else DIT},
                "repa": {"feature": feature, "block": 2, "hidden": 16, **repa},
            },
        },
        "data": {
            "target": "ldm.data.module.TileDataModule",
            "params": {
                "batch_size": 8, "stores": str(cohort), "keys": ["latent"], "latents": "first",
                **{split: {"target": "ldm.data.datasets.TileDataset"} for split in ("train", "validation")},
            },
        },
        "lightning": {"trainer": {"accelerator": "cpu", "max_steps": 4}},
    }  # fmt: skip


def train(tmp_path: Path, cfg: dict, name: str, *more: str) -> Path:
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(cfg))
    logs = tmp_path / "logs"
    assert main(["-t", "--base", str(path), "--logdir", str(logs), "--name", name, "--no-test", *more]) == 0
    return next(logs.glob(f"*_{name}"))
