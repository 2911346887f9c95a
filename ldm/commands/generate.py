"""Bodies of `histoldm sample` and `large-image`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.commands.outputs import kept_tiles, provenance, weights_of
from ldm.conditioners.compose import parse_conditions
from ldm.convert import load_model
from ldm.data.features import read_features
from ldm.data.tile_store import TileStore, open_cohort
from ldm.errors import UserError
from ldm.files import writable_folder, write_text
from ldm.images.sheets import contact_sheet
from ldm.images.write import save_bigtiff, save_ome_zarr, save_png, to_uint8
from ldm.requests.tiles import check_encoder, evenly, feature_dim, is_store, pick_feature, requested_tiles
from ldm.sampling import tiles as inference

IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".ome.zarr")
SHEET_TILES = 64
FAR = 0.15  # relative difference of extent that tiles of model and store may have


def sample_tiles(
    model_path: Path, out: Path, device: str, batch_size: int, asked: Mapping[str, Any],
    negative: Sequence[str] = (), guide: Path | None = None, **settings: Any,
) -> None:  # fmt: skip
    """`histoldm sample`: one PNG per tile asked for, tiles.csv that says which is which, and a contact sheet.

    asked: arguments of `requested_tiles`; negative: conditions to move away from, guide: a model to move away from.

    Tiles are written as they are made. Those that an interrupted run of the same settings left are kept.
    """
    writable_folder(out)
    model = load_model(model_path, device)
    tiles = requested_tiles(model, **asked)
    if tiles.absent:
        print(f"{asked['features']} has no {', '.join(tiles.absent)}: unknown to the model")
    away = {
        **({"negative": model.condition(**parse_conditions(model.cond_stage_model, negative))} if negative else {}),
        **({"guide": load_model(guide, device)} if guide else {}),
    }
    if settings["guidance_scale"] is None:
        settings["guidance_scale"] = 2.0 if guide else inference.default_guidance(model)
    settings_of_all = settings | {"model_sha256": weights_of(model_path)}
    settings_of_all |= {"mpp": model.metadata["mpp"]} if model.metadata.get("mpp") else {}
    settings_of_all |= {"negative_condition": " ".join(negative)} if negative else {}
    settings_of_all |= {"guide_sha256": weights_of(guide)} if guide else {}
    paths = [out / f"{i:05d}.png" for i in range(len(tiles))]
    fixed = {name: value for name, value in tiles.fixed.items() if name not in tiles.about[0]}
    words = [" ".join(f"{k}={v}" for k, v in (row | fixed).items() if v != "") for row in tiles.about]
    texts = [
        provenance(model_path, model, words[i], settings_of_all)
        | {"condition_sha256": tiles.digest(i), "index": i}
        for i in range(len(tiles))
    ]
    kept = kept_tiles(out, dict(zip(paths, texts)))
    with tqdm(total=len(paths), initial=len(kept), desc="sample", unit="tile") as bar:
        for start in range(0, len(paths), batch_size):
            chunk = range(start, min(start + batch_size, len(paths)))
            missing = [i for i in chunk if paths[i] not in kept]
            if not missing:
                continue
            condition = model.condition(**tiles.given(chunk)) if model.cond_stage_model is not None else None
            images = to_uint8(
                inference.sample(
                    model, condition, len(chunk), batch_size=batch_size, first=start, progress=False, **settings, **away
                )
            )
            for i in missing:
                save_png(paths[i], images[i - start], texts[i])
            bar.update(len(missing))
    table = io.StringIO()
    writer = csv.DictWriter(table, ["file", *tiles.about[0], "seed", "index"])
    writer.writeheader()
    rows = zip(paths, tiles.about)
    writer.writerows({"file": p.name, **row, "seed": settings["seed"], "index": i} for i, (p, row) in enumerate(rows))
    write_text(out / "tiles.csv", table.getvalue())
    shown = evenly(len(paths), SHEET_TILES)
    made = np.stack([np.asarray(Image.open(paths[i]).convert("RGB")) for i in shown])
    sheet = contact_sheet(made, None if tiles.real is None else np.stack([tiles.real(int(i)) for i in shown]))
    save_png(out / "contact_sheet.png", sheet, provenance(model_path, model, "see tiles.csv", settings_of_all))
    print(f"wrote {len(paths) - len(kept)} tiles to {out}, kept {len(kept)}; with tiles.csv and contact_sheet.png")


def generate_large_image(
    model_path: Path, features: Path, outs: Sequence[Path], feature: str | None, region: tuple[int, ...] | None,
    size: tuple[int, ...] | None, mpp: float | None, conditions: Sequence[str], device: str, **settings: Any,
) -> None:  # fmt: skip
    """`histoldm large-image`: one image of any size, written in every format asked for."""
    for out in outs:
        if not str(out).endswith(IMAGE_SUFFIXES):
            raise UserError(f"--out must end in {', '.join(IMAGE_SUFFIXES)}; got {out}.")
        writable_folder(out.parent)
    model = load_model(model_path, device)
    given = parse_conditions(model.cond_stage_model, conditions)
    if settings["guidance_scale"] is None:
        settings["guidance_scale"] = inference.default_guidance(model)
    grid, condition, background, place = None, f"{features.name}", None, {}
    if is_store(features):
        stores = open_cohort(features)
        if len(stores) > 1:
            raise UserError(f"{features} holds {len(stores)} slides; give one store, such as {stores[0].path}.")
        store = stores[0]
        name = pick_feature(stores, feature, model)
        check_encoder(model, dict(store.features(name).attrs), store.path)
        grid, known = store.grid(region, name)
        size = size or tuple((side - 1) * store.stride + store.tile_size for side in known.shape)
        background = glass(store, name) if not known.all() else None
        condition = f"{store.slide} region {','.join(map(str, region)) if region else 'whole slide'} ({name})"
        extent = [((side - 1) * store.stride + store.tile_size) * store.downsample for side in known.shape]
        place = {"slide": store.slide, "region": [*(region or (0, 0))[:2], round(extent[1]), round(extent[0])]}
        mpp = mpp or checked_mpp(model, store)
    else:
        if region:
            raise UserError(f"--region goes with a tile store; {features} is a file of features.")
        grid, _ = read_features(features, dim=feature_dim(model)).grid()
    mpp = mpp or model.metadata.get("mpp")
    if mpp is None and any(out.suffix != ".png" for out in outs):
        raise UserError("the model does not know its micrometres per pixel; give --mpp for a TIFF or OME-Zarr.")
    image = inference.large_image(model, grid, size=size, background=background, conditions=given, **settings)
    image, condition = to_uint8(image)[0], " ".join([condition, *conditions])
    tile = model.image_size * model.first_stage_model.downsampling
    place |= {"grid": list(grid.shape[:2]), "tile_px": tile, "mpp": mpp, "size": f"{image.shape[0]}x{image.shape[1]}"}
    text = provenance(model_path, model, condition, settings | place)
    for out in outs:
        if out.suffix == ".png":
            save_png(out, image, text)
        elif out.suffix == ".zarr":
            save_ome_zarr(out, image, mpp, text)
        else:
            save_bigtiff(out, image, mpp, text)
        print(f"wrote {out} ({image.shape[1]} x {image.shape[0]} px)")


def checked_mpp(model: Any, store: TileStore) -> float | None:
    """The model's micrometres per pixel, or the store's where it does not know; UserError if their tiles differ."""
    own, side = model.metadata.get("mpp"), model.metadata.get("tile_size")
    if own and side and store.mpp and abs(store.tile_size * store.mpp / (side * own) - 1) > FAR:
        raise UserError(
            f"tiles of {store.path} cover {store.tile_size * store.mpp:.0f} um ({store.tile_size} px at "
            f"{store.mpp:.3g} um/px), those that the model was trained on {side * own:.0f} um ({side} px at {own:.3g} "
            "um/px). Tile the slide as the model's were, or give --mpp if this is what you want."
        )
    return own or store.mpp


def glass(store: TileStore, feature: str) -> np.ndarray | None:
    """The mean feature of a store's background tiles, for holes of its grid; None if it kept none."""
    if "tissue" not in store.label_names:
        return None
    rows = np.flatnonzero(store.labels("tissue") < 0.01)
    if not len(rows):
        return None
    array = store.features(feature)
    values = np.stack([array[int(row)] for row in rows[:64]]).astype(np.float32)
    return (values[:, 0] if values.ndim == 3 else values).mean(0)
