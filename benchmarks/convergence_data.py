"""What `convergence.py` trains on and is judged by: a cohort of real H&E, its first stage, tensors, judged real tiles.

Every image is cut into 96 px tiles at 0.5 um/px by `data_prep`. Of each a region is held out: of the demo slide the
band that its encoder never saw, of others the right two fifths. A tile lies wholly in one part or in none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from ldm.data.tile_store import open_cohort
from ldm.errors import UserError
from ldm.files import write_text
from ldm.images.slides import open_slide
from ldm.images.write import to_uint8

ROOT = Path(__file__).resolve().parent.parent
DEMO_SLIDE, ENCODER = (ROOT / "data" / name for name in ("demo/CMU-1-Small-Region.svs", "models/demo-encoder"))
BAND = (1856, 512)  # y and height of the demo slide's region that its encoder and first stage were not trained on
TRAINED = 0.6  # of the width of every other image; the rest is held out
MPP, TILE, CROP = 0.5, 96, 128  # um/px; px of a tile, and of the crops that the first stage is trained on
BLOCK = 256  # px of a tile's image: the squares that intervals draw
IMAGES = {  # pattern below --data -> um/px, which most of the files do not say
    "he/CMU-1-Small-Region.svs": 0.499,
    "more/he/instanseg_HE_example.ome.tif": 0.50008,
    "he/OS-1-detail.ome.tif": 0.2271,
    "more/geojson/puma/*.tif": 0.23,
    "more/he/ucsb_breast/*.png": 0.25,
    "more/he/brecahad/images/*.jpg": 0.25,
    "he/mopadi_*/*.jpg": 0.5,
}
PARTS = ("train", "held-out")


@dataclass(frozen=True)
class Image:
    """An image of the cohort and the box x, y, width, height of its level 0 that is held out."""

    path: Path
    mpp: float
    size: tuple[int, int]
    held_out: tuple[int, int, int, int]


def images(data: Path | None) -> list[Image]:
    """The cohort below a folder; the demo slide alone where there is none. UserError: the folder has none of it."""
    found = [(DEMO_SLIDE, IMAGES["he/CMU-1-Small-Region.svs"])]
    if data is not None:
        found = [(path, mpp) for pattern, mpp in IMAGES.items() for path in sorted(data.glob(pattern))]
        if not found:
            raise UserError(f"{data} has none of the images of this benchmark: {', '.join(IMAGES)}")
    cohort = []
    for path, mpp in found:
        width, height = open_slide(path, mpp).dimensions
        column = round(TRAINED * width)
        box = (0, BAND[0], width, BAND[1]) if path.name == DEMO_SLIDE.name else (column, 0, width - column, height)
        cohort.append(Image(path.resolve(), mpp, (width, height), box))
    return cohort


def outlines(image: Image) -> dict:
    """GeoJSON of what is trained on (`train`) and what is held out of an image."""
    (width, height), (x, y, w, h) = image.size, image.held_out
    trained = [(0, 0, width, y), (0, y + h, width, height - y - h)] if w == width else [(0, 0, x, height)]
    parts = [(PARTS[0], box) for box in trained] + [(PARTS[1], image.held_out)]
    features = [
        {
            "type": "Feature",
            "properties": {"classification": {"name": name}},
            "geometry": {"type": "Polygon", "coordinates": [[[a, b], [a + c, b], [a + c, b + d], [a, b + d], [a, b]]]},
        }
        for name, (a, b, c, d) in parts
    ]
    return {"type": "FeatureCollection", "features": features}


def run(*command: object) -> None:
    """A Python program of the repository, on one core; its words come with its failure."""
    told = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    if told.returncode:
        raise UserError(f"{' '.join(map(str, command))} failed:\n{told.stdout[-2000:]}")


def tile(cohort: Sequence[Image], out: Path, stride: int) -> None:
    """The cohorts out/train and out/held-out."""
    regions, table = out / "regions", out / "images.csv"
    regions.mkdir(exist_ok=True)
    for image in cohort:
        write_text(regions / f"{image.path.stem}.geojson", json.dumps(outlines(image)))
    write_text(table, "path,mpp\n" + "".join(f'"{image.path}",{image.mpp}\n' for image in cohort))
    allowed = [word for folder in sorted({image.path.parent for image in cohort}) for word in ("--files-in", folder)]
    for part in PARTS:
        run("-m", "data_prep.tile_slides", "--slides", table, *allowed, "--mpp", MPP, "--tile-size", TILE,
            "--stride", stride, "--regions", regions, "--inside", part, "--min-inside", 1,
            "--no-previews", "--out", out / part)  # fmt: skip


def fit_first_stage(cohort: Sequence[Image], out: Path, steps: int, seed: int = 0) -> None:
    """out/first-stage: the shipped one, which knows one stain, trained on for some steps on what is not held out."""
    folder, run_folder, config = out / "first-stage", out / "first-stage-run", out / "first-stage.yaml"
    if folder.exists():
        return
    shutil.rmtree(run_folder, ignore_errors=True)
    crops = [{"path": str(each.path), "mpp": each.mpp, "exclude": [list(each.held_out)]} for each in cohort]
    settings = {
        "model": {"base_learning_rate": 5e-5, "params": {"freeze_encoder": False}},
        "data": {"params": {
            "batch_size": 8,
            "train": {"params": {"images": crops, "size": CROP, "mpp": MPP, "length": 100_000}},
            "validation": {"params": {"stores": str(out / PARTS[1]), "where": None}},
        }},
        "lightning": {"trainer": {"max_steps": steps, "max_time": None, "val_check_interval": steps}},
    }  # fmt: skip
    write_text(config, yaml.safe_dump(settings))
    base = ROOT / "configs" / "demo" / "first_stage.yaml"
    run("main.py", "-t", "--base", base, config, "--name", "first-stage", "--logdir", run_folder, "--seed", seed)
    from ldm.model_folder import export

    export(next(run_folder.glob("*_first-stage")), folder)


def prepare(data: Path | None, out: Path, stride: int, first_stage_steps: int, count: int) -> None:
    """All that runs need below `out`; what is there already is left as it is."""
    if (out / "real.pt").exists():
        return
    cohort = images(data)
    tile(cohort, out, stride)
    fit_first_stage(cohort, out, first_stage_steps)
    for part in PARTS:
        turned = ["--dihedral"] if part == PARTS[0] else []
        store = ("--store", out / part, *turned)
        run("-m", "data_prep.extract_features", *store, "--encoder", ENCODER, "--tokens", 4, "--any-mpp")
        run("-m", "data_prep.encode_latents", *store, "--first-stage", out / "first-stage", "--name", "first-stage")
    torch.save(tensors(out / PARTS[0]), out / "train.pt")
    judge_real(out, count)


def tensors(cohort: Path, every: bool = True) -> dict[str, Tensor]:
    """What a training step reads of each tile in each orientation: latent (N,C,h,w), ssl (N,D), repa (N,T,4,4)."""
    read: dict[str, list[np.ndarray]] = {"latent": [], "ssl": [], "repa": []}
    name = ENCODER.name
    for store in open_cohort(cohort):
        turned = (8,) if store.latents("first-stage").attrs.get("dihedral") else ()
        for key, array in (
            ("latent", store.latents("first-stage")),
            ("ssl", store.features(name)),
            ("repa", store.features(f"{name}-tokens4", tokens=True)),
        ):
            values = np.asarray(array[:], np.float32)
            values = values.reshape(-1, *values.shape[1 + len(turned) :])
            if key == "repa":
                values = values.transpose(0, 2, 1).reshape(len(values), -1, 4, 4)
            read[key].append(values)
    return {key: torch.from_numpy(np.concatenate(values)) for key, values in read.items()}


def held_out(cohort: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` held-out tiles, evenly spread: images (N,T,T,3) uint8, and the block of its image that each lies in."""
    pictures, blocks = [], []
    for store in open_cohort(cohort):
        pictures.append(np.asarray(store.tiles[:]))
        places = np.asarray(store.coords) // round(BLOCK * store.downsample)
        blocks += [f"{store.slide}:{x},{y}" for x, y in places]
    rows = chosen(len(blocks), count)
    return np.concatenate(pictures)[rows], np.array(blocks)[rows]


def chosen(available: int, count: int) -> np.ndarray:
    """Which rows are taken. UserError: there are not so many."""
    if available < count:
        raise UserError(f"{available} tiles are held out, and {count} are judged; give --data a folder that has more")
    return np.linspace(0, available - 1, count).round().astype(int)


def judged(pictures: np.ndarray) -> np.ndarray:
    """The judge's features (N,1280) of images (N,H,W,3) uint8."""
    from ldm.encoders.judge import load_judge

    judge = load_judge()
    with torch.no_grad():
        return torch.cat(
            [judge(torch.from_numpy(part)) for part in np.array_split(pictures, -(-len(pictures) // 32))]
        ).numpy()


def judge_real(out: Path, count: int) -> None:
    """out/real.pt: what samples are judged against, the conditions that they are made under, and the floors of KID."""
    from ldm.model_folder import load_first_stage

    pictures, blocks = held_out(out / PARTS[1], count)
    rows, values = chosen(len(tensors(out / PARTS[1])["ssl"]), count), tensors(out / PARTS[1])
    stage = load_first_stage(str(out / "first-stage")).eval()
    with torch.no_grad():
        rebuilt = torch.cat([stage.decode(part) for part in values["latent"][rows].split(16)]).clamp(-1, 1)
    trained = np.concatenate([np.asarray(store.tiles[:]) for store in open_cohort(out / PARTS[0])])
    content = {
        "ssl": values["ssl"][rows], "pictures": torch.from_numpy(pictures),
        "rebuilt": torch.from_numpy(to_uint8(rebuilt)),
        "blocks": blocks.tolist(), "features": torch.from_numpy(judged(pictures)),
        "features_rebuilt": torch.from_numpy(judged(to_uint8(rebuilt))),
        "features_train": torch.from_numpy(judged(trained[chosen(len(trained), min(count, len(trained)))])),
    }  # fmt: skip
    torch.save(content, out / "real.new")
    os.replace(out / "real.new", out / "real.pt")


def describe(cohort: Sequence[Image]) -> list[dict]:
    return [{key: str(value) for key, value in asdict(each).items()} for each in cohort]
