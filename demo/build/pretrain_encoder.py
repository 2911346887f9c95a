r"""Pre-train a small tile encoder by self-supervision: SimCLR over tiles and, as in DenseCL, over their cells.

NT-Xent (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", eq. 1) between two
views of a tile, plus the same loss between corresponding cells of the two feature maps (Wang et al. 2021, "Dense
Contrastive Learning for Self-Supervised Visual Pre-Training", eq. 3; here the correspondence is known). Views differ in
stain (Tellez et al. 2018, HED jitter), brightness, contrast, blur, and only mildly in position and scale; both get the
same rotation and flip, so that the feature keeps where things are in the tile. Pairs that are known not to be negatives
(overlapping tiles, two pieces of empty glass) are left out of the denominator.

The folder gets encoder.yaml and model.safetensors (see `ldm.encoders.encoder`). When a run was interrupted, the same
command goes on where it stopped.

Example:

    python -m demo.build.pretrain_encoder --out FOLDER \
        --config configs/demo/encoder.yaml
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
import yaml
from einops import rearrange
from kornia.filters import gaussian_blur2d
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from data_prep.options import inputs, output
from ldm.cli.script import script
from ldm.config import load_config
from ldm.data.augment import restained
from ldm.encoders.encoder import Encoder, load_encoder
from ldm.encoders.spec import EncoderSpec
from ldm.errors import UserError, suggest
from ldm.files import owns, whole, write_text
from ldm.images.slides import open_slide

# rows haematoxylin, eosin, DAB (Ruifrok and Johnston 2001): optical density per channel
STAINS = F.normalize(torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]), dim=1)
BLUR = (2 * math.log(2)) ** -0.5  # px, of a Gaussian whose weights are 1, 2, 1
EMPTY_DENSITY = 0.12  # mean optical density above which a pixel is tissue
STATE = "pretrain-state.pt"
KEYS = {"name", "licence", "seed", "encoder", "images", "views", "train"}
VIEW_KEYS = {"shift", "scale", "stain", "brightness", "contrast", "blur", "background"}
TRAIN_KEYS = {"steps", "batch_size", "learning_rate", "weight_decay", "warmup", "temperature", "local_weight",
              "projection", "save_every"}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ images


@dataclass
class SourceImage:
    """One image at the encoder's working resolution, and the top-left corners that training may crop at.

    pixels (H,W,3) uint8; tissue, glass: (K,2) int row, column of crops of `size` px; weight: share of the tiles.
    """

    pixels: np.ndarray
    tissue: np.ndarray
    glass: np.ndarray
    weight: float


def read_image(path: Path, mpp: float | None) -> tuple[np.ndarray, float]:
    """Level 0 of a slide or image, (H,W,3) uint8, and its µm per pixel; `mpp` where the file does not say."""
    slide = open_slide(path, mpp)
    return slide.read(0, 0, *slide.dimensions), slide.mpp


def tissue_mask(pixels: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """True where the mean optical density of a pixel, (...,3) in [0, 255] or (B,3,H,W) in [0, 1], is tissue's."""
    if isinstance(pixels, Tensor):
        return -pixels.clamp_min(1 / 255).log().mean(1) > EMPTY_DENSITY  # (B,H,W)
    return -np.log(np.maximum(pixels.astype(np.float32), 1) / 255).mean(-1) > EMPTY_DENSITY


def corners(pixels: np.ndarray, size: int, exclude: list[tuple[float, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Top-left (row, column), (K,2), of size x size crops outside `exclude` (x, y, w, h): those on tissue, on glass."""
    height, width = pixels.shape[0] - size + 1, pixels.shape[1] - size + 1
    if height < 1 or width < 1:
        return np.zeros((0, 2), int), np.zeros((0, 2), int)
    total = np.pad(tissue_mask(pixels).astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    fraction = (total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]) / size**2
    allowed = np.ones((height, width), bool)
    for x, y, w, h in exclude:  # a crop touches the rectangle if it starts less than `size` before it
        top, left = max(0, math.floor(y) - size + 1), max(0, math.floor(x) - size + 1)
        allowed[top : math.ceil(y + h), left : math.ceil(x + w)] = False
    return np.argwhere(allowed & (fraction >= 0.25)), np.argwhere(allowed & (fraction < 0.05))


def read_working(entry: dict, spec: EncoderSpec) -> tuple[np.ndarray, float]:
    """One of the config's images, resampled so that tile_size px at mpp are input_size px; and the factor it took."""
    pixels, mpp = read_image(Path(entry["path"]), entry.get("mpp"))
    ratio = mpp / spec.mpp * spec.input_size / spec.tile_size
    size = (round(pixels.shape[1] * ratio), round(pixels.shape[0] * ratio))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)), ratio


def load_images(config: dict, spec: EncoderSpec, size: int) -> list[SourceImage]:
    """The config's images at the working resolution, with the places where crops of `size` px may be taken."""
    images = []
    for entry in config["images"]:
        pixels, ratio = read_working(entry, spec)
        exclude = [tuple(value * ratio for value in rectangle) for rectangle in entry.get("exclude", [])]
        tissue, glass = corners(pixels, size, exclude)
        if not len(tissue):
            raise UserError(f"image {entry['path']} has no crop of {size / ratio:.0f} px on tissue that may be used")
        images.append(SourceImage(pixels, tissue, glass, float(entry.get("weight", 1))))
    return images


# ------------------------------------------------------------------------------------------------------------- views


def draw_crops(images: list[SourceImage], count: int, size: int, background: float, rng: np.random.Generator):
    """`count` random crops: (B,3,S,S) float in [0, 1] and their places (B,3) int: image, row, column."""
    weights = np.array([image.weight for image in images])
    chosen = rng.choice(len(images), count, p=weights / weights.sum())
    glass = rng.random(count) < background
    crops, places = [], []
    for index, empty in zip(chosen, glass, strict=True):
        image = images[index]
        pool = image.glass if empty and len(image.glass) else image.tissue
        row, column = pool[rng.integers(len(pool))]
        crops.append(image.pixels[row : row + size, column : column + size])
        places.append((index, row, column))
    crops = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255  # (B,3,S,S)
    return crops, torch.tensor(np.array(places))


def dihedral_matrices(count: int, generator: torch.Generator) -> Tensor:
    """Random rotations by 90 degrees and flips, (B,2,2)."""
    turns = torch.randint(4, (count,), generator=generator) * (math.pi / 2)
    c, s = turns.cos().round(), turns.sin().round()
    flips = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    return torch.stack([torch.stack([c * flips, -s], -1), torch.stack([s * flips, c], -1)], -2)


def uniform(shape: tuple[int, ...], half: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * half


def make_view(crops: Tensor, turn: Tensor, out: int, views: dict, ratio: float, generator: torch.Generator):
    """One augmented view of crops (B,3,S,S): (B,3,out,out) in [0, 1], and which pixels are tissue (B,out,out)."""
    batch, side = crops.shape[0], crops.shape[-1]
    scale = 1 + uniform((batch, 1, 1), views["scale"], generator)
    shift = uniform((batch, 2, 1), views["shift"] * ratio * 2 / side, generator)
    theta = torch.cat([turn * scale * out / side, shift], -1)  # (B,2,3)
    grid = F.affine_grid(theta, [batch, 3, out, out], align_corners=False)
    view = F.grid_sample(crops, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    tissue = tissue_mask(view)  # (B,out,out)

    gain = 1 + uniform((batch, 3, 1), views["stain"], generator)
    offset = uniform((batch, 3), views["stain"] / 4, generator) @ STAINS
    mix = torch.linalg.inv(STAINS) @ (gain * STAINS)  # (B,3,3): unmix, scale, mix
    view = restained(view, mix, offset[..., None, None] * tissue[:, None])
    mean = view.mean((1, 2, 3), keepdim=True)
    view = (view - mean) * (1 + uniform((batch, 1, 1, 1), views["contrast"], generator)) + mean
    view = view * (1 + uniform((batch, 1, 1, 1), views["brightness"], generator))
    blurred = torch.rand((batch, 1, 1, 1), generator=generator) < views["blur"]
    view = torch.where(blurred, gaussian_blur2d(view, 3, (BLUR, BLUR)), view)
    return view.clamp(0, 1), tissue


# -------------------------------------------------------------------------------------------------------------- loss


def nt_xent(a: Tensor, b: Tensor, ignore: Tensor, temperature: float) -> Tensor:
    """NT-Xent (SimCLR eq. 1) of N pairs a[i], b[i], (N,D) each; ignore (N,N) bool: pairs that are no negatives."""
    count = a.shape[0]
    z = F.normalize(torch.cat([a, b]).float(), dim=1)  # (2N,D)
    logits = z @ z.T / temperature
    positive = torch.cat([torch.arange(count, 2 * count), torch.arange(count)])
    mask = ignore.repeat(2, 2)
    mask[torch.arange(2 * count), positive] = False
    mask.fill_diagonal_(True)
    return F.cross_entropy(logits.masked_fill(mask, float("-inf")), positive)


def known_non_negatives(places: Tensor, empty: Tensor, side: int) -> Tensor:
    """(N,N) bool: pairs closer than `side` px (places (N,3): image, row, column), pairs of empty ones (empty (N,))."""
    same = places[:, None, 0] == places[None, :, 0]
    close = ((places[:, None, 1:] - places[None, :, 1:]).abs() < side).all(-1)
    return (same & close) | (empty[:, None] & empty[None, :])


def projection_head(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class Contrast(nn.Module):
    """The encoder's trunk with the two projection heads that training needs and the encoder folder leaves behind."""

    def __init__(self, encoder: Encoder, projection: int):
        super().__init__()
        self.encoder, self.grid = encoder, encoder.spec.grid
        self.tile_head = projection_head(encoder.dim, 512, projection)
        self.cell_head = projection_head(encoder.dim // self.grid**2, 256, projection)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """views (B,3,S,S) in [0, 1] -> tile projections (B,P), cell projections (B*k*k,P)."""
        inputs = self.encoder.normalise(views)
        features = self.encoder.pool(self.encoder.model.forward_features(inputs))  # (B,C*k*k)
        cells = rearrange(features, "b (c cell) -> (b cell) c", cell=self.grid**2)
        return self.tile_head(features), self.cell_head(cells)


# ---------------------------------------------------------------------------------------------------------- training


def learning_rate(step: int, train: dict) -> float:
    """Linear warm-up, then cosine to 0."""
    if step < train["warmup"]:
        return train["learning_rate"] * (step + 1) / train["warmup"]
    done = (step - train["warmup"]) / max(1, train["steps"] - train["warmup"])
    return train["learning_rate"] * 0.5 * (1 + math.cos(math.pi * done))


def training_step(model: Contrast, images: list[SourceImage], config: dict, step: int, size: int) -> Tensor:
    spec, train, views = model.encoder.spec, config["train"], config["views"]
    rng = np.random.default_rng((config["seed"], step))
    generator = torch.Generator().manual_seed(config["seed"] * 1_000_003 + step)
    crops, places = draw_crops(images, train["batch_size"], size, views["background"], rng)
    turn = dihedral_matrices(len(crops), generator)
    ratio = spec.input_size / spec.tile_size
    (a, tissue), (b, _) = (make_view(crops, turn, spec.input_size, views, ratio, generator) for _ in range(2))
    empty = F.adaptive_avg_pool2d(tissue.float()[:, None], model.grid).flatten(1) < 0.05  # (B,k*k)
    both = torch.cat([a, b]).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        tiles, cells = model(both)
    (tile_a, tile_b), (cell_a, cell_b) = tiles.chunk(2), cells.chunk(2)
    tile_ignore = known_non_negatives(places, empty.all(1), spec.input_size // 2)
    owner = torch.arange(len(crops)).repeat_interleave(model.grid**2)
    cell_ignore = known_non_negatives(places[owner], empty.flatten(), spec.input_size)
    cell_ignore &= (owner[:, None] != owner[None, :]) | (empty.flatten()[:, None] & empty.flatten()[None, :])
    w = train["local_weight"]
    return (1 - w) * nt_xent(tile_a, tile_b, tile_ignore, train["temperature"]) + w * nt_xent(
        cell_a, cell_b, cell_ignore, train["temperature"]
    )


def fit(model: Contrast, images: list[SourceImage], config: dict, out: Path, size: int) -> float:
    """Run (or continue) the steps; the state lies in `out`. Returns the seconds spent over all runs."""
    train, state_path = config["train"], out / STATE
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": train["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups)
    start, spent = 0, 0.0
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        if state["config"] != config:
            raise UserError(f"{state_path} belongs to a run with another config: remove it or choose another --out")
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        start, spent = state["step"], state["seconds"]
    began, average = time.monotonic() - spent, None
    steps = range(start, train["steps"])
    bar = tqdm(steps, initial=start, total=train["steps"], desc="pretrain", unit="step", mininterval=2)
    for step in bar:
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, train)
        loss = training_step(model, images, config, step, size)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)
        if not math.isfinite(average):
            raise UserError(f"the loss is not finite at step {step}: lower train.learning_rate")
        if (step + 1) % train["save_every"] == 0 or step + 1 == train["steps"]:
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step + 1,
                "seconds": time.monotonic() - began,
                "config": config,
            }
            with whole(state_path) as part:
                torch.save(state, part)
    return time.monotonic() - began


# ----------------------------------------------------------------------------------------------------------- figures


@torch.no_grad()
def embed(encoder: Encoder, images: Tensor) -> Tensor:
    """Features (B,D) of images (B,3,S,S) in [0, 1] at the working resolution."""
    return torch.cat([encoder.features(encoder.normalise(part)) for part in images.split(64)])


def held_out_tiles(encoder: Encoder, config: dict, size: int) -> dict[str, np.ndarray]:
    """The features on tiles inside the first image's first excluded rectangle, at a stride of a quarter; each (N,).

    hit: whether the nearest (by cosine) of all held-out tiles to another view of it is the tile itself. tissue: its
    tissue fraction; error: of that, by ridge regression on the features of all tiles that do not touch the rectangle.
    column: where it lies across, in tiles.
    """
    spec, entry = encoder.spec, config["images"][0]
    pixels, ratio = read_working(entry, spec)
    x, y, w, h = (value * ratio for value in entry["exclude"][0])
    side, pad = spec.input_size, (size - spec.input_size) // 2
    rows, columns = (range(pad, extent - side - pad, side // 4) for extent in pixels.shape[:2])
    places = np.array([(row, column) for row in rows for column in columns])
    row, column = places.T
    inside = (row >= y) & (row + side <= y + h) & (column >= x) & (column + side <= x + w)
    outside = (row + side <= y) | (row >= y + h) | (column + side <= x) | (column >= x + w)
    stack = np.stack([pixels[r - pad : r + side + pad, c - pad : c + side + pad] for r, c in places])
    crops = torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255  # (N,3,S,S)
    tiles = crops[..., pad : pad + side, pad : pad + side]
    fraction, features = tissue_mask(tiles).double().mean((1, 2)), embed(encoder, tiles)

    turn = torch.eye(2).expand(int(inside.sum()), 2, 2)
    generator = torch.Generator().manual_seed(0)
    views, _ = make_view(crops[inside], turn, side, config["views"], side / spec.tile_size, generator)
    similarity = F.normalize(embed(encoder, views), dim=1) @ F.normalize(features[inside], dim=1).T
    hit = similarity.argmax(1) == torch.arange(len(similarity))

    design = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    known = design[outside]
    ridge = torch.linalg.solve(known.T @ known + 10 * torch.eye(known.shape[1]), known.T @ fraction[outside])
    error = design[inside] @ ridge - fraction[inside]
    return {
        "hit": hit.double().numpy(),
        "tissue": fraction[inside].numpy(),
        "error": error.numpy(),
        "column": column[inside] / side,
    }


def held_out_measures(encoder: Encoder, config: dict, size: int) -> dict[str, float]:
    """Figures of `held_out_tiles`: their count; how often one with tissue is found again; R2 of the tissue fraction."""
    if not config["images"][0].get("exclude"):
        return {}
    tiles = held_out_tiles(encoder, config, size)
    return {"held_out_tiles": len(tiles["hit"]), **{name: round(v, 4) for name, v in tile_measures(tiles).items()}}


def tile_measures(tiles: Mapping[str, np.ndarray]) -> dict[str, float]:
    r2 = 1 - np.square(tiles["error"]).mean() / tiles["tissue"].var()
    return {"retrieval_top1": float(tiles["hit"][tiles["tissue"] > 0.25].mean()), "tissue_r2": float(r2)}


@torch.no_grad()
def set_standardisation(encoder: Encoder, images: list[SourceImage], config: dict, size: int) -> None:
    """Give the encoder the mean and standard deviation of its features over 2048 training tiles."""
    margin = (size - encoder.spec.input_size) // 2
    parts = []
    for part in range(16):
        rng = np.random.default_rng((config["seed"], 2**31 + part))
        crops, _ = draw_crops(images, 128, size, config["views"]["background"], rng)
        parts.append(embed(encoder, crops[..., margin : -margin or None, margin : -margin or None]))
    features = torch.cat(parts)
    encoder.feature_mean.copy_(features.mean(0))
    encoder.feature_std.copy_(features.std(0).clamp_min(0.05 * features.std(0).median()))


def check_keys(given: dict, known: set[str], where: str) -> None:
    """UserError if `given` has other keys than `known`, or lacks one."""
    for key in sorted(given.keys() - known):
        raise UserError(f"unknown key '{key}' in {where}{suggest(key, known)}")
    if missing := sorted(known - given.keys()):
        raise UserError(f"{where} lacks {', '.join(missing)}")


def build(config: dict) -> tuple[Contrast, int]:
    """The model that is trained, with random weights, and the side of the crops that its views are cut from."""
    check_keys(config, KEYS, "the config")
    check_keys(config["views"], VIEW_KEYS, "the config's views")
    check_keys(config["train"], TRAIN_KEYS, "the config's train")
    torch.manual_seed(config["seed"])
    try:
        spec = EncoderSpec(
            name=config["name"],
            licence=config["licence"],
            source="self-supervised by demo.build.pretrain_encoder",
            standardise=True,
            **config["encoder"],
        )
    except TypeError as error:
        raise UserError(f"the config's encoder: {error}") from error
    if spec.pooling != "grid" or spec.mpp is None:
        raise UserError(f"the config's encoder needs pooling: grid and an mpp, got {spec.pooling}, {spec.mpp}")
    model = Contrast(Encoder(spec), config["train"]["projection"]).to(memory_format=torch.channels_last)
    half = spec.input_size / 2 * (1 + config["views"]["scale"])
    return model, 2 * math.ceil(half + config["views"]["shift"] * spec.input_size / spec.tile_size)


@owns()
def pretrain(config: dict, out: Path) -> None:
    """Train, standardise, measure, and write the encoder folder."""
    model, size = build(config)
    encoder = model.encoder
    images = load_images(config, encoder.spec, size)
    seconds = fit(model, images, config, out, size)
    encoder.eval()
    set_standardisation(encoder, images, config, size)
    measures = held_out_measures(encoder, config, size)
    state = encoder.state_dict()
    weights = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in state.items()}
    record = encoder.spec.as_dict() | {
        "figures": measures,
        "training": {"steps": config["train"]["steps"], "minutes": round(seconds / 60, 1), "images": config["images"]},
    }
    text = yaml.safe_dump(record, sort_keys=False, width=110)
    with whole(out / "model.safetensors") as part:
        save_file(weights, part)
    write_text(out / "encoder.yaml", text)
    load_encoder(out)
    parameters = sum(value.numel() for value in encoder.parameters()) / 1e6
    print(
        f"{out}: {encoder.name}, {encoder.dim} values per tile, {parameters:.2f} M parameters, "
        f"{seconds / 60:.1f} minutes; on held-out tiles: {measures}"
    )


@script("demo.build.pretrain_encoder", __doc__)
def main(
    *,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the config, key.path=value.")] = None,
    path: Annotated[Path, inputs("--config", help="Config, YAML, as configs/demo/encoder.yaml.")],
    exclude: Annotated[
        list[str] | None,
        inputs("--exclude", help="Box x,y,width,height, pixels of the first image, to keep out of training (repeat)."),
    ] = None,
    out: Annotated[Path, output("--out", help="Encoder folder to write.")],
) -> None:
    config = load_config([path], overrides or [])
    for text in exclude or []:
        try:
            x, y, width, height = (float(value) for value in text.split(","))
        except ValueError:
            raise UserError(f"--exclude takes x,y,width,height as 4 numbers; got '{text}'.") from None
        config["images"][0].setdefault("exclude", []).append([x, y, width, height])
    pretrain(config, out)


if __name__ == "__main__":
    main.run()
