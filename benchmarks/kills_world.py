"""The tiny world in which `benchmarks.kills` runs every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


MODEL: dict[str, Any] = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {
        "use_ema": False,
        "unet_config": {
            "target": "ldm.networks.unet.UNetModel",
            "params": {
                "image_size": 16, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1,
                "attention_resolutions": [1], "channel_mult": [1], "num_heads": 2, "use_spatial_transformer": True,
                "context_dim": 8,
            },
        },
        "first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"},
        "cond_stage_config": {
            "target": "ldm.conditioners.compose.ConditionerSet",
            "params": {
                "conditioners": {
                    "ssl": {
                        "target": "ldm.conditioners.ssl.PatchEmbedder",
                        "params": {"embed_dim": 6, "context_dim": 8},
                    },
                    "class": {
                        "target": "ldm.conditioners.class_token.ClassEmbedder",
                        "params": {"classes": ["A", "B"], "dim": 128, "acts": "vector"},
                    },
                    "score": {
                        "target": "ldm.conditioners.score.ScoreEmbedder",
                        "params": {"dim": 128, "acts": "vector", "hidden": 8},
                    },
                }
            },
        },
    },
}  # fmt: skip
GRAY: dict[str, Any] = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {
        "use_ema": False,
        "unet_config": {
            "target": "ldm.networks.unet.UNetModel",
            "params": {
                "image_size": 16, "in_channels": 2, "out_channels": 1, "model_channels": 32, "num_res_blocks": 1,
                "attention_resolutions": [], "channel_mult": [1], "num_heads": 2,
            },
        },
        "first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage", "params": {"channels": 1}},
        "cond_stage_config": {
            "target": "ldm.conditioners.source_image.SourceImage", "params": {"size": 16, "key": "source"},
        },
    },
}  # fmt: skip
FIRST_STAGE: dict[str, Any] = {
    "target": "ldm.autoencoder.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
            "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
        },
    },
}  # fmt: skip
SSL_MODEL: dict[str, Any] = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {
        "use_ema": False,
        "unet_config": {
            "target": "ldm.networks.unet.UNetModel",
            "params": MODEL["params"]["unet_config"]["params"] | {"image_size": 8, "in_channels": 4, "out_channels": 4},
        },
        "first_stage_config": FIRST_STAGE,
        "cond_stage_config": MODEL["params"]["cond_stage_config"]["params"]["conditioners"]["ssl"],
    },
}


FIELD: dict[str, Any] = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {
        "use_ema": False,
        "unet_config": {
            "target": "ldm.networks.unet.UNetModel",
            "params": {
                "image_size": 4, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1,
                "attention_resolutions": [], "channel_mult": [1], "num_heads": 1,
            },
        },
        "first_stage_config": {
            "target": "ldm.autoencoder.feature_codec.FeatureCodec", "params": {"dim": 6, "channels": 4},
        },
        "cond_stage_config": MODEL["params"]["cond_stage_config"]["params"]["conditioners"]["class"],
    },
}  # fmt: skip


def build_world(place: str) -> None:
    """In `place`: model, first stage, a run, a scorer, images, a cohort, tables: all tiny, the same every time."""
    import h5py
    import nibabel
    import numpy as np
    import open_clip
    import pandas as pd
    import torch
    from PIL import Image

    from data_prep.extract_features import extract
    from ldm.config import instantiate_from_config
    from ldm.convert import export_as
    from ldm.data.cohort import merge_index, write_store
    from ldm.data.store_writers import ArrayWriter
    from ldm.data.tile_store import TileStore
    from ldm.images.write import save_png
    from ldm.model_folder import write_model_folder
    from ldm.scorers.labelled import read_labelled
    from ldm.scorers.training import Recipe, train_scorer

    folder = Path(place)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = instantiate_from_config(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    write_model_folder(folder / "model", MODEL, model.state_dict(), {"tile_size": 16, "mpp": 0.5})
    content = {"histoldm_config": {"model": MODEL, "data": {}}, "state_dict": model.state_dict(), "global_step": 1}
    (folder / "run" / "checkpoints").mkdir(parents=True)
    torch.save(content, folder / "run" / "checkpoints" / "last.ckpt")
    for name, node in (("first-stage", FIRST_STAGE), ("ssl", SSL_MODEL), ("gray", GRAY), ("field", FIELD)):
        write_model_folder(folder / name, node, instantiate_from_config(node).state_dict(), {})
    export_as("compvis", folder / "ssl", folder / "compvis")
    shutil.copytree(ROOT / "data" / "models" / "demo-encoder", folder / "encoder")
    shutil.copy(ROOT / "tests" / "configs" / "tiny_clip.json", folder)
    config = json.loads((folder / "tiny_clip.json").read_text())
    clip = open_clip.model.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    torch.save(clip.state_dict(), folder / "clip.pt")

    def cell(light: float, side: int = 16) -> np.ndarray:
        image = rng.integers(120, 180, (side, side, 3))
        image[side // 4 : -side // 4, side // 4 : -side // 4] = 40 + 150 * light
        return (image + rng.integers(0, 20, image.shape)).astype(np.uint8)

    for name, count, light in (("A", 12, 0.0), ("B", 12, 1.0)):
        for i in range(count):
            path = folder / "cells" / name / f"P{i // 2}-{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(cell(light)).save(path)
    (folder / "images").mkdir()
    for name in ("A__a", "A__b", "B__c"):
        Image.fromarray(cell(0.5)).save(folder / "images" / f"{name}.png")
    (folder / "tiles").mkdir()
    rows = []
    for i in range(10):
        save_png(folder / "tiles" / f"{i:05d}.png", cell(i % 2), {"index": i})
        rows.append({"file": f"{i:05d}.png", "class": "AB"[i % 2], "seed": 0, "index": i})
    pd.DataFrame(rows).to_csv(folder / "tiles" / "tiles.csv", index=False)
    recipe = Recipe(kwargs={"channels": [8, 8, 16, 16], "stem_width": 8}, size=16, members=2, epochs=2, shift=1)
    train_scorer(read_labelled(folder / "cells", positive="B"), folder / "scorer", recipe, progress=False)
    (folder / "slides").mkdir()
    for name in ("P1", "P2"):
        slide = np.full((192, 256, 3), 240, np.uint8)
        slide[32:160, 32:224] = rng.integers(90, 200, (128, 192, 3)) * np.array([1.0, 0.6, 0.9])
        Image.fromarray(slide).save(folder / "slides" / f"{name}.png")
    tiles, values = np.stack([cell(i % 3 / 2) for i in range(20)]), rng.normal(size=(20, 6)).astype(np.float32)
    coords = np.stack([np.arange(20) % 5 * 16, np.arange(20) // 5 * 16], 1)
    about = {"tile_size": 16, "mpp": 0.5, "level0_size": [80, 64]}
    store = write_store(folder / "cohort", "P1", tiles.__getitem__, 20, attrs=about, coords=coords)
    with ArrayWriter(store.path, "features/own", (6,), "f2", {"encoder": "own"}) as writer:
        writer.append(values)
    texts = [f"tissue number {i}" for i in range(20)]
    merge_index(folder / "cohort", pd.DataFrame({"slide": "P1", "row": range(20), "text": texts}))
    np.save(folder / "grid.npy", rng.normal(size=(1, 20, 6)).astype(np.float32))
    holed = np.random.default_rng(1).normal(size=(8, 6, 6)).astype(np.float32)
    holed[4:, 3:] = np.nan
    np.save(folder / "slide.npy", holed)
    for name in "ab":
        np.save(folder / f"{name}.npy", rng.normal(size=(32, 6)).astype(np.float32))
    listed = {"path": [f"images/{name}.png" for name in ("A__a", "A__b", "B__c")], "text": texts[:3]}
    pd.DataFrame(listed).to_csv(folder / "captions.csv", index=False)
    pd.DataFrame({"sample": ["P1", "P2"], "TP53": [0.5, 0.25], "EGFR": [0.75, 1.0]}).to_csv(
        folder / "genes.csv", index=False
    )
    (folder / "features").mkdir()
    with h5py.File(folder / "features" / "P1.h5", "w") as file:
        file["features"], file["coords"] = values, coords
        file["coords"].attrs.update({"patch_size": 16, "patch_level": 0, "patch_size_level0": 16})
    broken = Path(shutil.copytree(store.path, folder / "broken" / "slides" / store.path.name))
    shutil.copy(folder / "cohort" / "index.parquet", folder / "broken")
    name = extract([TileStore.open(broken)], folder / "encoder", batch_size=4, any_mpp=True)
    shards = sorted(path for path in (broken / "features" / name / "c").rglob("*") if path.is_file())
    shards[1].unlink()
    head = np.zeros((14, 12, 9), np.int16)
    head[3:11, 2:10, 1:8] = rng.integers(200, 900, (8, 8, 7))
    nibabel.save(nibabel.Nifti1Image(head, np.diag([-2.0, 2.0, 3.0, 1.0])), folder / "volume.nii.gz")
