"""Pictures of README and pages, made by the shipped models of shipped data: `python docs/page_pictures.py`.

Writes docs/images/capabilities.jpg, what the toolkit does in one strip, docs/images/conditions.jpg, a row for each kind
of condition, docs/images/field.jpg, a field of features with its image, and docs/images/slide.jpg, a slide made of
another one. Some fifteen minutes on two CPU cores. Real images have a dark frame; all others are synthetic.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import ldm
from data_prep import slice_volumes
from ldm.data.tile_store import TileStore
from ldm.encoders.encoder import load_encoder
from ldm.images.sheets import fitted
from ldm.images.slides import open_slide
from ldm.sampling.sweeps import sweep_noise

ROOT = Path(__file__).resolve().parent.parent
DATA, OUT = ROOT / "data", ROOT / "docs" / "images"
SLIDE = DATA / "demo" / "CMU-1-Small-Region.svs"
TILES = [(896, 2048), (1152, 2048)]  # level-0 x, y in the band that no model was trained on
NOISES = (4, 1)  # synthetic tiles of each
REGION = (896, 1472, 768)  # level-0 x, y and side of the large image; it reaches into that band
STAIN_REGIONS = {  # stain -> file, µm per px where the file does not say it, x and y; below what was trained on
    "he": ("pretrain/OS-1-detail.ome.tif", None, 40, 771),
    "ki67": ("samples/stains/OS-2-ndpi.ome.tif", None, 600, 1620),
    "fhl2": ("samples/stains/ihc.png", 0.5, 100, 358),
}
SCORES = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPTS = [
    ("skin, many nuclei", "H&E"), ("skin, few nuclei", "H&E"), ("colon cancer, many nuclei", "H&E"),
    ("Ki67, many nuclei", "IHC"), ("T1, without tumour", "MRI"),
]  # fmt: skip
GAP, FRAME, QUALITY = 6, 3, 88
REAL, WORDS = (32, 33, 36), (60, 64, 67)

Images = Sequence[np.ndarray]


def pictures(images: Tensor) -> list[np.ndarray]:
    """(N,C,H,W) in [-1,1] as N images (H,W,3) uint8."""
    return list(ldm.to_uint8(images))


def tensor(images: Images) -> Tensor:
    """Images (H,W,3) uint8 as (N,3,H,W) in [-1,1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def framed(image: np.ndarray, side: int) -> np.ndarray:
    """A real image, its longer side `side` px, with a dark frame."""
    made = np.array(fitted(image, side))
    for edge in (np.s_[:FRAME], np.s_[-FRAME:], np.s_[:, :FRAME], np.s_[:, -FRAME:]):
        made[edge] = REAL
    return made


@cache
def model(name: str) -> ldm.latent_diffusion.LatentDiffusion:
    return ldm.load_model(DATA / "models" / name)


@cache
def feature_tiles() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Real held-out tiles, and synthetic ones from the feature of each: NOISES."""
    slide = open_slide(SLIDE)
    real = [slide.read(x, y, 256, 256, (256, 256)) for x, y in TILES]
    with torch.inference_mode():
        features = load_encoder(str(DATA / "models" / "demo-encoder"))(tensor(real))
    cond = model("demo-ssl").condition(features=features.repeat_interleave(torch.tensor(NOISES), 0))
    return real, pictures(ldm.sample(model("demo-ssl"), cond, sampler=ldm.Sampler(steps=12, seed=1, progress=False)))


@cache
def large_image() -> np.ndarray:
    """A region of the slide, generated from the grid of features of its tiles: (768,768,3) uint8."""
    x, y, side = REGION
    slide, step = open_slide(SLIDE), 128
    places = [(x + column, y + row) for row in range(0, side - 255, step) for column in range(0, side - 255, step)]
    tiles = [slide.read(left, top, 256, 256, (256, 256)) for left, top in places]
    with torch.inference_mode():
        features = load_encoder(str(DATA / "models" / "demo-encoder"))(tensor(tiles))
    count = (side - 256) // step + 1
    grid = features.reshape(count, count, -1)
    return pictures(ldm.large_image(model("demo-ssl"), grid, (side, side), ldm.Sampler(progress=False)))[0]


@cache
def stained() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Real regions (72,128,3) of each stain, and the one of H&E as each other stain."""
    real = {}
    for stain, (file, mpp, x, y) in STAIN_REGIONS.items():
        slide = open_slide(DATA / file, mpp)
        real[stain] = slide.read(x, y, 128 / slide.mpp, 72 / slide.mpp, (128, 72))
    stains, sampler = model("demo-stains"), ldm.Sampler(guidance_scale=2, progress=False)
    others = [stain for stain in real if stain != "he"]
    targets = [stains.condition(stain=stain) for stain in others]
    made = ldm.translate(stains, tensor([real["he"]]), stains.condition(stain="he"), targets, sampler)
    return real, {stain: pictures(image)[0] for stain, image in zip(others, made)}


@cache
def sequences(count: int = 4) -> list[list[np.ndarray]]:
    """Cells (32,32,3) of one noise each under rising scores."""
    cells = model("demo-mitosis")
    conditions = [cells.condition(score=score) for score in SCORES]
    made = sweep_noise(cells, conditions, count, ldm.Sampler(steps=12, guidance_scale=6, progress=False))
    return [pictures(sequence) for sequence in made]


@cache
def prompted() -> list[np.ndarray]:
    texts, modalities = zip(*PROMPTS)
    cond = model("demo-text").condition(text=list(texts), modality=list(modalities))
    return pictures(
        ldm.sample(model("demo-text"), cond, sampler=ldm.Sampler(steps=12, guidance_scale=3, progress=False))
    )


@cache
def slices() -> dict[str, list[np.ndarray]]:
    """Two held-out slices (64,64,3) of T2, T1 and FLAIR, and T1 made of T2 and of FLAIR."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{name}=*_{name}.nii.gz" for name in ("t1", "t2", "fla")]
        volumes = ["--volumes", str(DATA / "samples" / "slices"), "--modality", *names]
        slice_volumes.main([*volumes, "--percentiles", "0,98", "--size", "64", "--out", folder])  # as it was trained
        stores = {
            name: TileStore.open(Path(folder, "slides", f"TCGA-FG-6692_{name}.zarr")) for name in ("t1", "t2", "fla")
        }
        real = {name: [np.array(store.tile(row)) for row in (4, 14)] for name, store in stores.items()}
    heads = model("demo-slices")
    for source in ("t2", "fla"):
        gray = tensor([np.broadcast_to(image, (*image.shape[:2], 3)) for image in real[source]])[:, :1]
        made = [
            ldm.translate(heads, gray, sampler=ldm.Sampler(steps=12, seed=seed, guidance_scale=1.0, progress=False))
            for seed in range(3)
        ]
        real[f"t1 of {source}"] = pictures(torch.stack(made).mean(0))
    return {name: [np.broadcast_to(image, (*image.shape[:2], 3)) for image in images] for name, images in real.items()}


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def block(rows: Sequence[Images], gap: int = 2) -> np.ndarray:
    """Rows of images of one size as one image."""
    white = [np.pad(image, ((0, gap), (0, gap), (0, 0)), constant_values=255) for row in rows for image in row]
    across = len(rows[0])
    lines = [np.concatenate(white[i : i + across], 1) for i in range(0, len(white), across)]
    return np.concatenate(lines)[:-gap, :-gap]


def strip(panels: Sequence[tuple[str, str, np.ndarray]], height: int, width: int) -> Image.Image:
    """Panels side by side, each `height` px high under two lines of words, in a picture `width` px wide."""
    images = [fitted(image, round(height * max(1, image.shape[1] / image.shape[0]))) for _, _, image in panels]
    head, gap = 40, (width - sum(image.shape[1] for image in images)) // (len(images) - 1)
    page = Image.new("RGB", (width, head + height), "white")
    pen, x = ImageDraw.Draw(page), 0
    for (title, about, _), image in zip(panels, images):
        pen.text((x, 2), title, REAL, font(14))
        pen.text((x, 21), about, WORDS, font(11))
        page.paste(Image.fromarray(image), (x, head))
        x += image.shape[1] + gap
    return page


def capabilities() -> Image.Image:
    """What the toolkit does, in one strip."""
    real, made = feature_tiles()
    regions, others = stained()
    heads = slices()
    tiles = [[framed(image, 256), fitted(other, 256)] for image, other in zip(real, (made[0], made[-1]))]
    stains = [[framed(regions["he"], 256)], [fitted(others["ki67"], 256)]]
    cells = [[fitted(image, 128) for image in row] for row in sequences()]
    brains = [[framed(heads[name][i], 128) if name != "t1 of t2" else fitted(heads[name][i], 128) for i in (0, 1)]
              for name in ("t2", "t1 of t2", "t1")]  # fmt: skip
    panels = [
        ("Tiles from features", "real | synthetic", block(tiles)),
        ("Stains", "H&E, made Ki67", block(stains)),
        ("Scores", "atypical: 0 to 1", block(cells)),
        ("Modalities", "T2 | made T1 | real T1", block(brains)),
        ("Images of any size", "from a grid of features", large_image()),
    ]
    return strip(panels, 238, 1200)


def conditions() -> Image.Image:
    """A row for each kind of condition, five images in each, with words under them."""
    side, left, foot = 150, 150, 18
    real, made = feature_tiles()
    regions, others = stained()
    heads = slices()

    def real_one(name: str, of: str) -> tuple[str, np.ndarray]:
        return name, framed(regions[of] if of in regions else heads[of][1], side)

    rows = [
        ("SSL features\ndemo-ssl", [("real, held out", framed(real[0], side)), *[
            (f"of its feature, noise {i + 1}", made[i]) for i in range(NOISES[0])
        ]]),
        ("class\ndemo-stains", [
            real_one("real H&E", "he"), ("Ki67 made of it", others["ki67"]), ("FHL2 made of it", others["fhl2"]),
            real_one("real Ki67", "ki67"), real_one("real FHL2", "fhl2"),
        ]),
        ("score\ndemo-mitosis", [(f"score {score:g}", cell) for score, cell in zip(SCORES, sequences()[1])]),
        ("text\ndemo-text", [(f"{text}", image) for (text, _), image in zip(PROMPTS, prompted())]),
        ("image\ndemo-slices", [
            real_one("real T2", "t2"), ("T1 made of it", heads["t1 of t2"][1]), real_one("real T1", "t1"),
            ("T1 made of FLAIR", heads["t1 of fla"][1]), real_one("real FLAIR", "fla"),
        ]),
    ]  # fmt: skip
    pieces = [[(words, fitted(image, side)) for words, image in row] for _, row in rows]
    heights = [max(image.shape[0] for _, image in row) + foot for row in pieces]
    page = Image.new("RGB", (left + 5 * (side + GAP), sum(heights) + GAP * len(rows)), "white")
    pen, y = ImageDraw.Draw(page), 0
    for (title, _), row, height in zip(rows, pieces, heights):
        pen.text((4, y + (height - foot) // 2), title, REAL, font(14), "lm")
        for i, (words, image) in enumerate(row):
            page.paste(Image.fromarray(image), (left + i * (side + GAP), y))
            pen.text((left + i * (side + GAP), y + height - foot + 2), words, WORDS, font(10))
        y += height + GAP
    return page


def field(tiles: int = 29) -> Image.Image:
    """A field of features that no slide has, and its image of 2048 px, made small."""
    fields, side = model("demo-field"), (tiles - 1) * 64 + 256
    grid = ldm.feature_field(fields, (tiles, tiles), ldm.Sampler(progress=False))
    codec, sampler = fields.first_stage_model, ldm.Sampler(progress=False)
    colours = pictures(codec.picture(grid.permute(2, 0, 1)[None]))[0].repeat(20, 0).repeat(20, 1)
    image = ldm.large_image(model("demo-ssl"), grid, (side, side), sampler, background=codec.glass)
    panels = [
        ("A field of features", "demo-field: three of its components as colours, glass white", colours),
        ("Its image", f"demo-ssl: {side} px, made small; synthetic", pictures(image)[0]),
    ]
    return strip(panels, 590, 1190)


def slide(tiles: int = 125, part: int = 1024) -> Image.Image:
    """A slide of 8192 px of a field, made small; the middle of it; and the real slide."""
    with tempfile.TemporaryDirectory() as folder:
        grid, out = f"{folder}/field.npy", f"{folder}/slide.tif"
        ways = ["--model", DATA / "models/demo-ssl-student", "--features", grid, "--decoder", "small"]
        for words in (
            ["field", "--model", DATA / "models/demo-field", "--size", f"{tiles},{tiles}", "--out", grid],
            ["slide", *ways, "--out", out],
        ):
            subprocess.run([sys.executable, "-m", "ldm.cli", *map(str, words)], cwd=ROOT, check=True)
        made, real = open_slide(out), open_slide(SLIDE)
        side, corner = made.dimensions[0], (made.dimensions[0] - part) // 2
        panels = [
            ("A slide of a sampled field", f"demo-ssl-student: {side} px, made small; synthetic", made.thumbnail(6.0)),
            ("The middle of it", f"{part} px", made.read(corner, corner, part, part)),
            ("The real slide", "that all models were trained on", framed(real.thumbnail(2.0), 420)),
        ]
    return strip(panels, 420, 1200)


def main() -> None:
    for make in (capabilities, conditions, field, slide):
        path = OUT / f"{make.__name__}.jpg"
        make().save(path, quality=QUALITY, optimize=True)
        print(f"{path.name}  {path.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
