"""Does each condition decide the image? Tiny models are overfitted on a few real items, one conditioner at a time.

    python benchmarks/overfit_conditions.py --data sample_data [--network transformer] [--only class text ...] [--check]

For every conditioner: how many items' conditions bring back their own image (of all training images it is the nearest
to the sample, by pixel distance), and what the null brings back: many different images, none of them in particular.
`--data` holds real data: he/ and ihc/ (slides and tiles), mitosis/ (AtNorM-MD crops and their vote table), omics/ (the
tables of cognoma/cancer-data), text_cxr/ (images and captions.csv), mr/ (a folder of NIfTI volumes per subject). Cases
whose data are not there are left out, and named.

command   python benchmarks/overfit_conditions.py --data sample_data --check
hardware  2 CPU cores: three minutes for each case in bfloat16 (AMX), of the transformer four in float32 on one core
expected  own image >= 90%; null: at least 4 images, none above half of the samples
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

import ldm
from ldm.config import instantiate_from_config
from ldm.data.datasets import to_tensor
from ldm.data.volumes import Volume, cut_slice, to_tile, windowed
from ldm.devices import faster_precision
from ldm.encoders.encoder import load_encoder
from ldm.errors import UserError, run_command
from ldm.images import sheets
from ldm.images.slides import open_slide
from ldm.images.tissue import TissueMask
from ldm.images.write import save_png

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

ROOT = Path(__file__).resolve().parent.parent
WIDTH, CONTEXT = 32, 32
NULLS = 64  # unconditional samples


@dataclass
class Case:
    """Items: images (N,C,S,S) in [-1,1], what conditions each, the node of the conditioner, what the network takes."""

    images: Tensor
    batch: dict[str, Any]
    conditioner: dict[str, Any]
    network: dict[str, Any] = field(default_factory=dict)


def module(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.conditioners.{name}", "params": {"dropout": 0.2, **params}}


def square(path: Path, size: int, side: int | None = None) -> Tensor:
    """The middle of an image file, `side` px of it (default: as much as there is), as (3,size,size)."""
    slide = open_slide(path, 1.0)
    side = side or min(slide.dimensions)
    x, y = ((extent - side) // 2 for extent in slide.dimensions)
    return to_tensor(slide.read(x, y, side, side, (size, size)))


def tissue_tiles(count: int, size: int) -> tuple[list[np.ndarray], Tensor]:
    """`count` random tiles of the demo slide, 256 px as arrays and small as images (N,3,size,size)."""
    slide = open_slide(ROOT / "data" / "demo" / "CMU-1-Small-Region.svs")
    mask, rng, tiles = TissueMask(slide), np.random.default_rng(0), []
    while len(tiles) < count:
        corner = rng.integers(0, np.array(slide.dimensions) - 512)
        if mask.fraction(corner[None], 256)[0] > 0.7:
            tiles.append(slide.read(*map(int, corner), 512, 512, (512, 512)))
    small = [
        np.asarray(
            torch.nn.functional.interpolate(
                to_tensor(tile)[None, :, 128:384, 128:384], (size, size), mode="bilinear", antialias=True
            )[0]
        )
        for tile in tiles
    ]
    return tiles, torch.from_numpy(np.stack(small))


def demo_features(tiles: list[np.ndarray]) -> Tensor:
    """Features (N,D) of 256 px tiles from the shipped encoder, standardised values."""
    encoder = load_encoder(ROOT / "data" / "models" / "demo-encoder").eval()
    with torch.no_grad():
        parts = [torch.stack([to_tensor(tile) for tile in tiles[i : i + 16]]) for i in range(0, len(tiles), 16)]
        return torch.cat([encoder(part) for part in parts])


def ssl(data: Path, size: int) -> Case:
    tiles, images = tissue_tiles(16, size)
    features = demo_features([tile[128:384, 128:384] for tile in tiles])
    node = module("ssl.PatchEmbedder", embed_dim=features.shape[1], context_dim=CONTEXT, normalize=False)
    return Case(images, {"ssl": features}, node)


def region(data: Path, size: int) -> Case:
    tiles, images = tissue_tiles(16, size)
    features = demo_features([tile[128:384, 128:384] for tile in tiles])
    around = demo_features([tile[::2, ::2] for tile in tiles])
    node = module(
        "ssl.SSLEmbedder",
        embed_dim=features.shape[1],
        region_embed_dim=around.shape[1],
        context_dim=CONTEXT,
        normalize=False,
    )
    return Case(images, {"ssl": features, "region": around}, node)


def grid(data: Path, size: int) -> Case:
    tiles, images = tissue_tiles(16, size)
    cells = [tile[128 + 128 * r :, 128 + 128 * c :][:128, :128] for tile in tiles for r in (0, 1) for c in (0, 1)]
    enlarged = [np.kron(cell, np.ones((2, 2, 1), np.uint8)) for cell in cells]
    features = rearrange(demo_features(enlarged), "(n row col) d -> n d row col", row=2, col=2)
    node = module(
        "grid.GridEmbedder", embed_dim=features.shape[1], context_dim=CONTEXT, magnifications=["20x"], hidden=64,
        depth=2, heads=4, mlp=128,
    )  # fmt: skip
    return Case(images, {"ssl": features, "magnification": ["20x"] * len(images)}, node)


def classes(data: Path, size: int) -> Case:
    files = {
        "skin H&E": data / "he" / "CMU-1-Small-Region.svs",
        "HNSC H&E": data / "he" / "TCGA-CR-7395-01A-01-TS1.svs",
        "OS-1 H&E": data / "he" / "OS-1-detail.ome.tif",
        "COAD H&E": data / "he" / "mopadi_TCGA-AD-6964" / "Tile_(16896,20480).jpg",
        "colon mucosa H&E": data / "he" / "CRC-VAL-HE-7K-NORM-TCGA-YLVCMEHK.tif",
        "lung H&E": data / "he" / "histolab_tiles" / "tcga-lung-rgb.png",
        "FHL2 IHC": data / "ihc" / "skimage_ihc.png",
        "Ki67 IHC": data / "ihc" / "OS-2-ndpi.ome.tif",
        "T1 MR": data / "mr" / "itk" / "BrainT1Slice.png",
        "fat MR": data / "mr" / "itk" / "FatMRISlice.png",
    }
    images = torch.stack([square(path, size, 512 if "he/" in path.as_posix() else None)
                          if path.suffix != ".jpg" and "CRC" not in path.name else square(path, size)
                          for path in files.values()])  # fmt: skip
    node = module("class_token.ClassEmbedder", classes=list(files), dim=CONTEXT)
    return Case(images, {"class": list(files)}, node)


def score(data: Path, size: int) -> Case:
    votes = pd.read_csv(data / "mitosis" / "AtNorM-MD_expert_votes.csv").set_index("Filename")
    soft = (votes.filter(like="Expert_") == "Atypical").mean(axis=1)
    crops = {path.name: path for path in sorted((data / "mitosis" / "AtNorM-MD").rglob("*.png"))}
    chosen = [soft[(soft - value).abs() < 1e-6].index.intersection(list(crops))[0] for value in np.linspace(0, 1, 6)]
    images = torch.stack([square(crops[name], size, 64) for name in chosen])
    scores = torch.tensor([soft[name] for name in chosen], dtype=torch.float32)
    node = module("score.ScoreEmbedder", dim=4 * WIDTH, hidden=128)
    return Case(images, {"score": scores}, node, {"context_dim": None})


def omics_rows(data: Path, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mutations and expression, in [0,1], of samples that have mutations at all."""
    mutation = pd.read_csv(data / "omics" / "mutation-matrix-all-samples.tsv", sep="\t", index_col=0)
    expression = pd.read_csv(data / "omics" / "expression-matrix-all-samples.tsv", sep="\t", index_col=0)
    names = mutation.index[mutation.sum(axis=1) > 1].intersection(expression.index)[:count]
    low, high = expression.quantile(0.01), expression.quantile(0.99)
    return mutation.loc[names], ((expression.loc[names] - low) / (high - low)).clip(0, 1)


def omics(data: Path, size: int) -> Case:
    mutation, expression = omics_rows(data, 16)
    _, images = tissue_tiles(16, size)
    node = module(
        "omics.OmicsEmbedder", dim=4 * WIDTH, mutation_genes=list(mutation), expression_genes=list(expression)
    )
    return Case(images, _omics_batch(mutation, expression), node, {"context_dim": None})


def gene_sets(data: Path, size: int) -> Case:
    mutation, expression = omics_rows(data, 16)
    _, images = tissue_tiles(16, size)
    genes, mutated = list(expression), list(mutation)
    sets = {"A": genes[:5], "B": genes[5:10], "C": genes[10:], "mutations": mutated}
    node = module("omics.GeneSetEmbedder", gene_sets=sets, dim=CONTEXT, mutation_genes=mutated, expression_genes=genes)
    return Case(images, _omics_batch(mutation, expression), node)


def _omics_batch(mutation: pd.DataFrame, expression: pd.DataFrame) -> dict[str, Tensor]:
    return {
        "mutation": torch.tensor(mutation.to_numpy(), dtype=torch.float32),
        "expression": torch.tensor(expression.to_numpy(), dtype=torch.float32),
    }


def text(data: Path, size: int) -> Case:
    table = pd.read_csv(data / "text_cxr" / "captions.csv")
    rows = [row for row in table.itertuples() if (data / "text_cxr" / "images" / row.filename).is_file()]
    images = torch.stack([square(data / "text_cxr" / "images" / row.filename, size) for row in rows])
    node = module(
        "text.TextEmbedder",
        model=str(ROOT / "configs" / "demo" / "tiny_clip.json"),
        chunks=2,
        trainable=True,
        context_dim=CONTEXT,
    )
    return Case(images, {"text": [row.clinical_notes for row in rows]}, node)


def slices(data: Path, size: int) -> Case:
    pairs = []
    for name in ("t1", "t2"):
        values = Volume(data / "mr" / "TCGA-FG-6692" / f"{name}.nii.gz").values()
        high = np.percentile(values[values > 0], 99.5)
        cuts = [to_tile(windowed(cut_slice(values, 2, z), 0, high), size) for z in range(50, 98, 3)]
        pairs.append(torch.stack([to_tensor(cut)[:1] for cut in cuts]))  # (16,1,size,size)
    node = module("source_image.SourceImage", size=size, key="source")
    return Case(pairs[1], {"source": pairs[0]}, node, {"in_channels": 2, "out_channels": 1, "context_dim": None})


def composed(data: Path, size: int) -> Case:
    tiles, images = tissue_tiles(16, size)
    features = demo_features([tile[128:384, 128:384] for tile in tiles])
    members = {
        "class": module("class_token.ClassEmbedder", classes=["first", "second"], dim=CONTEXT),
        "score": module("score.ScoreEmbedder", dim=4 * WIDTH, hidden=128),
        "ssl": module("ssl.PatchEmbedder", embed_dim=features.shape[1], context_dim=CONTEXT, normalize=False),
    }
    batch = {"class": ["first", "second"] * 8, "score": torch.linspace(0, 1, 16), "ssl": features}
    node = {"target": "ldm.conditioners.compose.ConditionerSet", "params": {"conditioners": members}}
    return Case(images, batch, node)


CASES: dict[str, Callable[[Path, int], Case]] = {
    "ssl": ssl, "region": region, "grid": grid, "class": classes, "score": score, "omics": omics,
    "gene sets": gene_sets, "text": text, "source image": slices, "composed": composed,
}  # fmt: skip


def unet(size: int, channels: int, given: dict[str, Any]) -> dict[str, Any]:
    """The node of a UNet of 1.0 million parameters."""
    params = {
        "in_channels": channels, "out_channels": channels, "model_channels": WIDTH, "num_res_blocks": 1,
        "attention_resolutions": [2], "channel_mult": [1, 2], "num_heads": 2, "context_dim": CONTEXT,
        "image_size": size, **given,
    }  # fmt: skip
    params["use_spatial_transformer"] = params["context_dim"] is not None
    return {"target": "ldm.networks.unet.UNetModel", "params": params}


def transformer(size: int, channels: int, given: dict[str, Any]) -> dict[str, Any]:
    """The node of a DiT of 1.6 million parameters, whose blocks attend to tokens and are modulated by vectors."""
    params = {
        "in_channels": channels, "out_channels": channels, "patch_size": 2, "hidden_size": 4 * WIDTH, "depth": 4,
        "num_heads": 4, "context_dim": CONTEXT, "qk_norm": "rms", "image_size": size, **given,
    }  # fmt: skip
    return {"target": "ldm.networks.dit.DiT", "params": params}


NETWORKS = {"unet": (unet, 2e-3), "transformer": (transformer, 1e-3)}  # and their highest rate of learning


def overfit(name: str, case: Case, steps: int, network: str = "unet", half: bool = False, seed: int = 0) -> Any:
    """A LatentDiffusion on pixels, trained on the case's items alone; half: in bfloat16."""
    count, channels, size, _ = case.images.shape
    node, rate = NETWORKS[network]
    torch.manual_seed(seed)
    params = {
        "unet_config": node(size, channels, case.network),
        "first_stage_config": {
            "target": "ldm.autoencoder.autoencoder.IdentityFirstStage",
            "params": {"channels": channels},
        },
        "cond_stage_config": case.conditioner,
        "parameterization": "x0",
        "use_ema": False,
    }
    model = instantiate_from_config({"target": "ldm.latent_diffusion.LatentDiffusion", "params": params}).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    rng = torch.Generator().manual_seed(seed)
    items = {"image": case.images, **case.batch}
    for _ in tqdm(range(steps), desc=name, unit="step", leave=False):
        batch = rows_of(items, torch.randint(count, (16,), generator=rng))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.loss(batch, rng).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def rows_of(items: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Rows of a batch of tensors and lists."""
    return {
        name: values[rows] if isinstance(values, Tensor) else [values[int(row)] for row in rows]
        for name, values in items.items()
    }


def nearest(samples: Tensor, images: Tensor) -> Tensor:
    """Index (N,) of the training image nearest to each sample."""
    return torch.cdist(samples.flatten(1), images.flatten(1)).argmin(1)


@torch.no_grad()
def measure(model: LatentDiffusion, case: Case, guidance_scale: float = 2.0) -> tuple[dict[str, float], Tensor]:
    """own: share of items whose condition brings their image; what the null brings; and the samples."""
    count = len(case.images)
    settings = {"steps": 12, "progress": False, "batch_size": 32}
    cond = model.condition_of(case.batch)
    samples = ldm.sample(model, cond, sampler=ldm.Sampler(guidance_scale=guidance_scale, seed=1, **settings))
    own = (nearest(samples, case.images) == torch.arange(count)).float().mean()
    nulls = ldm.sample(model, count=NULLS, sampler=ldm.Sampler(seed=2, **settings))
    drawn = nearest(nulls, case.images).bincount(minlength=count)
    found = {
        "items": count,
        "own": float(own),
        "null_images": int((drawn > 0).sum()),
        "null_most": float(drawn.max() / NULLS),
    }
    return found, samples


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of real sample data")
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="these conditioners alone")
    parser.add_argument("--network", choices=list(NETWORKS), default="unet", help="what denoises (default %(default)s)")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp32"], default="auto", help="default: the one that trains faster"
    )
    parser.add_argument("--size", type=int, default=16, help="side of the images, px (default %(default)s)")
    parser.add_argument("--steps", type=int, default=1800, help="of training, for each (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for a picture of each case, training images above samples")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--check", action="store_true", help="exit 1 if a case misses what is expected")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, rows, failed = parse(argv), {}, []
    if not args.data.is_dir():
        raise UserError(f"there is no folder of sample data at {args.data}")
    half = (faster_precision("cpu")[0] if args.precision == "auto" else args.precision) == "bf16"
    print(f"{'conditioner':<14}{'items':>6}{'own image':>11}{'null: images':>14}{'most often':>12}{'seconds':>9}")
    for name in args.only or CASES:
        began = time.monotonic()
        try:
            case = CASES[name](args.data, args.size)
        except (FileNotFoundError, UserError) as error:
            print(f"{name:<14}  left out: {str(error).splitlines()[0]}")
            continue
        model = overfit(name, case, args.steps, args.network, half)
        found, samples = measure(model, case)
        rows[name] = found
        print(
            f"{name:<14}{found['items']:>6}{found['own']:>11.0%}{found['null_images']:>14}{found['null_most']:>12.0%}"
            f"{time.monotonic() - began:>9.0f}",
            flush=True,
        )
        if found["own"] < 0.9 or found["null_images"] < 4 or found["null_most"] > 0.5:
            failed.append(name)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            sheet = sheets.grid([ldm.to_uint8(images) for images in (case.images, samples)])
            save_png(args.out / f"{name.replace(' ', '_')}.png", sheet, {"content": "training images above samples"})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.check and failed:
        raise UserError(f"missed by {', '.join(failed)}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
