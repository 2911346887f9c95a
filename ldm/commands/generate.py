"""Bodies of `histoldm sample` and `large-image`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ldm.commands.grids import asked_grid
from ldm.commands.outputs import kept_images, provenance, written
from ldm.commands.overviews import asked_overview
from ldm.conditioners.compose import parse_conditions
from ldm.convert import load_model, weights_of
from ldm.data.extent import extent_differs, tell
from ldm.data.slide_tiles import NoSlide
from ldm.data.tile_store import open_cohort
from ldm.errors import UserError, note
from ldm.files import owns, whole, write_text
from ldm.images.pictures import Picture
from ldm.images.sheets import contact_sheet
from ldm.images.write import SCALED, SUFFIXES, save_image, save_png, to_uint8
from ldm.requests.sampling import AskedSampler
from ldm.requests.tiles import (
    AskedTiles,
    Requests,
    evenly,
    in_words,
    is_store,
    requested_tiles,
)
from ldm.sampling.canvas import large_image
from ldm.sampling.sampler import Sampler, Windows, changed
from ldm.sampling.tiles import sample

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

SHEET_TILES = 64


@owns()
def sample_tiles(model_path: Path, out: Path, device: str, asked: AskedTiles, sampler: AskedSampler) -> None:
    """`histoldm sample`: one PNG per tile asked for, tiles.csv that says which is which, and a contact sheet.

    Tiles are written as they are made. Those that an interrupted run of the same settings left are kept.
    """
    model = load_model(model_path, device)
    tiles = requested_tiles(model, asked)
    if tiles.absent:
        print(f"{asked.features} has no {', '.join(tiles.absent)}: unknown to the model")
    if asked.features is not None and is_store(asked.features):
        tell(extent_differs(store, model.metadata) for store in open_cohort(asked.features))
    chosen = sampler.loaded(model)
    about = sampler.record(chosen, model, "sample") | {"model_sha256": weights_of(model_path)}
    about |= {"mpp": model.metadata["mpp"]} if model.metadata.get("mpp") else {}
    if len(model.latent_shape) == 2:
        sample_tokens(model_path, model, out, tiles, chosen, about)
        return
    paths = [out / f"{i:05d}.png" for i in range(len(tiles))]
    shown = evenly(len(paths), SHEET_TILES)
    real = _real(tiles, shown)
    fixed = {name: in_words(value) for name, value in tiles.fixed.items() if name not in tiles.about[0]}
    words = [" ".join(f"{k}={v}" for k, v in (row | fixed).items() if v != "") for row in tiles.about]
    texts = [
        provenance(model_path, model, words[i], about) | {"condition_sha256": tiles.digest(i), "index": i}
        for i in range(len(tiles))
    ]
    kept = kept_images(out, dict(zip(paths, texts)), Sampler.usual(model, "sample"))
    quiet = replace(chosen, progress=False)
    with tqdm(total=len(paths), initial=len(kept), desc="sample", unit="tile") as bar:
        for start in range(0, len(paths), chosen.batch_size):
            chunk = range(start, min(start + chosen.batch_size, len(paths)))
            missing = [i for i in chunk if paths[i] not in kept]
            if not missing:
                continue
            given = tiles.given(chunk)
            condition = model.condition(**given) if model.cond_stage_model is not None else None
            if chosen.classifier is not None:
                condition |= chosen.classifier.target_of(model, [tiles.given(range(i, i + 1)) for i in chunk])
            images = to_uint8(sample(model, condition, len(chunk), quiet, first=start))
            for i in missing:
                save_png(paths[i], images[i - start], texts[i])
            bar.update(len(missing))
    table = io.StringIO()
    writer = csv.DictWriter(table, ["file", *tiles.about[0], "seed", "index"])
    writer.writeheader()
    rows = zip(paths, tiles.about)
    writer.writerows({"file": p.name, **row, "seed": chosen.seed, "index": i} for i, (p, row) in enumerate(rows))
    write_text(out / "tiles.csv", table.getvalue())
    made = np.stack([Picture.of_file(paths[i]).pixels() for i in shown])
    save_png(
        out / "contact_sheet.png", contact_sheet(made, real), provenance(model_path, model, "see tiles.csv", about)
    )
    print(written(len(paths), len(kept), "tiles", out, "tiles.csv and contact_sheet.png"))


def _real(tiles: Requests, shown: np.ndarray) -> np.ndarray | None:
    """The real tiles (n,T,T,3) that the sheet shows beside; None where there are none, or, as is told, no slide is."""
    try:
        return None if tiles.real is None else np.stack([tiles.real(int(i)) for i in shown])
    except NoSlide as error:
        note(f"contact_sheet.png shows no real tiles: {error}")
        return None


def sample_tokens(
    model_path: Path, model: LatentDiffusion, out: Path, tiles: Requests, sampler: Sampler, about: dict[str, Any]
) -> None:
    """tokens.npy (N,L,C) of a model whose samples condition another, tokens.csv of which is which, tokens.json."""
    cond = model.condition(**tiles.given(range(len(tiles)))) if model.cond_stage_model is not None else None
    tokens = sample(model, cond, len(tiles), sampler).mT.contiguous().numpy()
    table = io.StringIO()
    writer = csv.DictWriter(table, ["row", *tiles.about[0], "seed", "index"])
    writer.writeheader()
    writer.writerows({"row": i, **row, "seed": sampler.seed, "index": i} for i, row in enumerate(tiles.about))
    out.mkdir(parents=True, exist_ok=True)
    with whole(out / "tokens.npy") as part, part.open("wb") as file:
        np.save(file, tokens)
    write_text(out / "tokens.csv", table.getvalue())
    text = provenance(model_path, model, "see tokens.csv", about)
    write_text(out / "tokens.json", json.dumps(text, indent=2, default=str) + "\n")
    print(written(len(tiles), 0, "samples of tokens", out, "tokens.csv and tokens.json"))


@owns("outs", beside=True)
def generate_large_image(
    model_path: Path,
    features: Path,
    outs: Sequence[Path],
    feature: str | None,
    region: tuple[int, ...] | None,
    size: tuple[int, int] | None,
    mpp: float | None,
    conditions: Sequence[str],
    overview: Path | None,
    device: str,
    sampler: AskedSampler,
    windows: Windows,
) -> None:
    """`histoldm large-image`: one image of any size, written in every format asked for. size: (height, width)."""
    for out in outs:
        if not str(out).endswith(SUFFIXES):
            raise UserError(f"--out must end in {', '.join(SUFFIXES)}; got {out}.")
    model = load_model(model_path, device)
    chosen = sampler.loaded(model)
    given = parse_conditions(model.cond_stage_model, conditions)
    low, seen = asked_overview(overview, windows)
    about = sampler.record(chosen, model, "large_image") | changed(windows) | seen
    grid = asked_grid(model, features, feature, region, mpp)
    mpp = grid.mpp or model.metadata.get("mpp")
    if mpp is None and any(str(out).endswith(SCALED) for out in outs):
        raise UserError("the model does not know its micrometres per pixel; give --mpp for a TIFF or OME-Zarr.")
    size, known = size or grid.size, grid.background
    image = large_image(model, grid.features, size, chosen, windows, given, known, overview=low)
    image, condition = to_uint8(image)[0], " ".join([grid.words, *conditions])
    place = grid.place | {"grid": list(grid.features.shape[:2]), "tile_px": model.tile_size, "mpp": mpp}
    place |= {"size": f"{image.shape[1]}x{image.shape[0]}"}
    text = provenance(model_path, model, condition, about | place)
    for out in outs:
        save_image(out, image, text, mpp)
        print(f"wrote {out} ({image.shape[1]} x {image.shape[0]} px)")
