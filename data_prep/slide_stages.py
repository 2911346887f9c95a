"""The stages of `data_prep.prepare`, each of one slide, as a worker runs them; each returns facts of what it did."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.engine import DONE, KEPT
from data_prep.fetch import Fetched
from ldm.data.store_faults import check_store
from ldm.data.tile_store import TileStore, is_finished
from ldm.devices import pick_device
from ldm.errors import UserError, note
from ldm.images.quality import QUALITY, flagged


def tile(path: Path, out: Path, settings: Mapping[str, Any], cache: Path | None = None) -> dict[str, Any]:
    """Tile a slide, from the copy of it in `cache` where there is one."""
    from data_prep.tile_slides import tile_slide

    store = store_of(out, settings["name"])
    kept = is_finished(store)
    with Fetched(path, None if kept else cache) as near:
        try:
            opened = TileStore.open(tile_slide(near, out, origin=path, **settings))
        except UserError as error:
            raise type(error)(str(error).replace(str(near), str(path))) from None
    for told in opened.attrs.get("notes", ()):
        note(told)
    flags = flagged({label: opened.labels(label) for label in opened.label_names if label in QUALITY})
    return {"tiles": len(opened), **flags, "bytes": size_of(store), "state": KEPT if kept else DONE}


def features(store: Path, **settings: Any) -> dict[str, Any]:
    """Write the features of a store's tiles."""
    from data_prep.extract_features import extract

    opened = TileStore.open(store)
    before = opened.names("features")
    network = encoder_of(settings.pop("encoder"), settings.pop("weights", None), settings.get("device", "auto"))
    name = extract([opened], network, **settings)
    return {"feature": name, "state": KEPT if opened.names("features") == before else DONE}


def latents(store: Path, **settings: Any) -> dict[str, Any]:
    """Write the latents of a store's tiles."""
    from data_prep.encode_latents import encode_latents

    opened = TileStore.open(store)
    before = set(opened.latent_names)
    stage = first_stage_of(str(settings["first_stage_folder"]))
    name, _ = encode_latents([opened], **settings, first_stage=stage)
    return {"latents": name, "state": KEPT if name in before else DONE}


@functools.lru_cache(1)
def encoder_of(encoder: str | Path, weights: Path | None, device: str) -> Any:
    """An encoder, loaded once in each process."""
    from data_prep.extract_features import resolve

    return resolve(encoder, weights, device=pick_device(device))


@functools.lru_cache(1)
def first_stage_of(folder: str) -> Any:
    from ldm.model_folder import load_first_stage

    return load_first_stage(folder)


def check(store: Path) -> dict[str, Any]:
    """Check that a store is whole, and how large it is."""
    check_store(store)
    return {"bytes": size_of(store)}


def store_of(out: Path | str, slide: str) -> Path:
    """Where the store of a slide is.

    >>> store_of("cohort", "a.svs").as_posix()
    'cohort/slides/a.zarr'
    """
    return Path(out) / "slides" / f"{Path(slide).stem}.zarr"


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder.

    >>> size_of(store.path) > 1000
    True
    """
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
