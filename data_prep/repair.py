"""Makes again what `data_prep.verify` found wrong in tile stores, and nothing else.

What is made again is compared with the digest that was recorded when it was first written. Tiles are read from their
slide, features and latents made of the tiles, by the weights that made the others of their array or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.batches import in_order, read_batches
from data_prep.cohort_index import update_index
from data_prep.encode_latents import encode_latents, latent_attrs, latent_rows
from data_prep.extract_features import FeatureRows, extract, feature_attrs, resolve, usual_batch
from data_prep.slide_table import SlideEntry, read_slides
from data_prep.tile_slides import choose_tiles
from ldm.data.slide_tiles import WHERE
from ldm.data.store_faults import ARRAY, FILE, HALF, INDEX, LEFT, SLIDE, STORE, TABLE, Fault
from ldm.data.store_writers import remake_file
from ldm.data.stored_array import StoredArray
from ldm.data.tile_store import TileStore
from ldm.devices import pick_device
from ldm.errors import UserError
from ldm.files import remove
from ldm.images.quality import QUALITY, quality_of
from ldm.images.slides import Slide, open_image
from ldm.images.tissue import TissueMask
from ldm.tables.geojson import read_geojson
from ldm.tables.regions import SlideRegions, find_regions

_ORDER = (LEFT, FILE, ARRAY, HALF, STORE, SLIDE, TABLE, INDEX)
_PARTS = ("coords", "tiles", "labels", "features", "latents")  # each is made of those before it


class Sources:
    """What stores were made of, as far as it is given: slides, an encoder, a first stage.

    Args:
        slides: as of `read_slides`. regions: GeoJSON of regions, or their folder, as of `tile_slide`.
        encoder, weights: as of `extract`. first_stage: a model folder.
        device, precision, batch_size: how the networks compute; the precision of latents is the recorded one.
    Raises:
        UserError: no such slides, encoder or model.
    """

    def __init__(
        self,
        slides: Sequence[Path | str] = (),
        regions: Path | None = None,
        encoder: str | Path | None = None,
        weights: Path | None = None,
        first_stage: Path | None = None,
        device: str = "auto",
        precision: str = "fp32",
        batch_size: int | None = None,
    ) -> None:
        self.entries = {entry.name: entry for entry in read_slides(slides)} if slides else {}
        self.regions, self.encoder, self.weights, self.first_stage = regions, encoder, weights, first_stage
        self.device, self.precision = pick_device(device), precision
        self.batch_size = batch_size or usual_batch(self.device)

    @cached_property
    def network(self) -> Any:
        """The encoder; None where none is given."""
        return None if self.encoder is None else resolve(self.encoder, self.weights, device=self.device)

    @cached_property
    def stage(self) -> Any:
        """The first stage; None where none is given."""
        from ldm.model_folder import load_first_stage

        return None if self.first_stage is None else load_first_stage(str(self.first_stage)).to(self.device)

    @cached_property
    def makers(self) -> list[dict[str, Any]]:
        """What arrays of the encoder and of the first stage say of their maker."""
        made = [] if self.network is None else [feature_attrs(self.network)]
        if self.stage is not None:
            of_stage = latent_attrs(self.first_stage, self.stage, False, "fp32")
            made.append({key: of_stage[key] for key in ("first_stage", "weights_sha256")})
        return made


def repair(faults: Sequence[Fault], sources: Sources) -> Iterator[tuple[str, bool]]:
    """Make again what is wrong: for each fault a line that says what was done, and whether it is mended."""

    def place(fault: Fault) -> tuple[int, int]:
        return _ORDER.index(fault.kind), _PARTS.index(part) if (part := fault.array.partition("/")[0]) in _PARTS else 0

    indexes: set[Path] = set()
    for fault in sorted(faults, key=place):
        if fault.kind == INDEX and fault.store in indexes:
            yield f"{fault.store}, {fault.array}: see above", True
            continue
        indexes |= {fault.store} if fault.kind == INDEX else set()
        shard = "" if fault.file is None else f", shard {fault.file}"
        name = ", ".join(filter(None, (str(fault.store), fault.array))) + shard
        try:
            yield f"{name}: {_mend(fault, sources)}", True
        except UserError as error:
            yield f"{name}: not repaired: {error}", False


def _mend(fault: Fault, sources: Sources) -> str:
    """What was done. UserError: why nothing was."""
    group = fault.array.partition("/")[0]
    if fault.kind == LEFT:
        remove(fault.path)
        return "removed"
    if fault.kind == INDEX:
        return _mend_index(fault, sources)
    if fault.kind == TABLE:
        raise UserError("columns that were joined are not made by rule; give the commands that made it again")
    if fault.kind == STORE:
        raise UserError("give the command that made it again; where it stops, delete the store first")
    if fault.kind == SLIDE:
        raise UserError(f"give the folder of its slide by --slides here, and by ${WHERE} to other commands")
    store = TileStore.open(fault.store, slides=[entry.path for entry in sources.entries.values()])
    if fault.kind == FILE and group in ("features", "latents"):
        return _mend_made(fault, store, sources)
    if fault.kind == FILE:
        return _mend_tiles(fault, store, sources)
    if group not in ("features", "latents"):
        raise UserError("all of the store is to be made again: delete it, and give the command that made it")
    return _make_whole(fault, store, sources)


# --- tiles, coordinates, labels ---------------------------------------------------------------------------------------


def _mend_tiles(fault: Fault, store: TileStore, sources: Sources) -> str:
    entry = sources.entries.get(store.slide)
    if entry is None:
        raise UserError(f"--slides has no slide {store.slide}" if sources.entries else "give its slide by --slides")
    if store.attrs["level0_size"] is None:
        raise UserError("the tiles are no part of a slide; delete the store, and give the command that made it")
    slide = _slide_of(entry.path, store)
    size = entry.path.stat().st_size
    if list(slide.dimensions) != store.attrs["level0_size"] or store.attrs.get("slide_bytes", size) != size:
        raise UserError(f"{entry.path} is another file than the slide that the tiles are of")
    array = StoredArray(store.path / fault.array, allow_lost=True)
    rows = _span(array, fault)
    tiled = "tissue" in store.attrs  # by `tile_slide`, whose rules are known
    if fault.array == "tiles":
        values = _read(slide, store, rows)
    elif (label := fault.array.removeprefix("labels/")) in QUALITY:
        values = quality_of(_read(slide, store, rows), store.mpp)[label]
    elif tiled:
        drawn = _regions(store, slide, entry, sources)
        coords, labels, _ = choose_tiles(slide, store.attrs, TissueMask(slide), drawn)
        made = {"coords": coords, **{f"labels/{name}": own for name, own in labels.items()}}
        if fault.array not in made:
            raise UserError("no rule of data_prep.tile_slides makes it")
        if len(coords) != len(store):
            raise UserError(f"{entry.path} gives {len(coords)} tiles now, and had {len(store)}")
        values = made[fault.array][rows]
    else:
        raise UserError("the tiles were chosen by no rule; delete the store, and give the command that made it")
    return _put(fault, array, values, tiled, "the slide is read otherwise by the libraries that are installed now")


def _read(slide: Slide, store: TileStore, rows: slice) -> np.ndarray:
    return slide.read_tiles(store.coords[rows], store.tile_size * store.downsample, store.tile_size)


def _slide_of(path: Path, store: TileStore) -> Slide:
    """The slide at its own scale, or where the store was made at another, at that."""
    slide, mpp = open_image(path), store.mpp / store.downsample
    return slide if isclose(slide.mpp, mpp, rel_tol=1e-9) else open_image(path, float(f"{mpp:.12g}"), holds=True)


def _regions(store: TileStore, slide: Slide, entry: SlideEntry, sources: Sources) -> SlideRegions | None:
    """The regions that a store was tiled by; None where it was by none."""
    if not (asked := store.attrs.get("regions")):
        return None
    if (given := entry.roi or sources.regions) is None:
        raise UserError(f"it was tiled by the regions of {asked['file']}; give them by --regions or in the table")
    file = read_geojson(find_regions(given, store.slide))
    if file.sha256 != asked["sha256"]:
        raise UserError(f"{file.path} is not the file of regions that it was tiled by")
    return SlideRegions(file, slide, asked["origin"])


# --- features and latents ---------------------------------------------------------------------------------------------


def _mend_made(fault: Fault, store: TileStore, sources: Sources) -> str:
    array = StoredArray(store.path / fault.array, allow_lost=True)
    rows, attrs = _span(array, fault), array.attrs
    turned = bool(attrs.get("dihedral"))
    batches = read_batches(store, rows.start, sources.batch_size, rows.stop)
    if fault.array.startswith("features/"):
        _check_maker(attrs, "encoder", "--encoder", sources)
        name, tokens = fault.array.removeprefix("features/"), int(attrs.get("tokens", 0))
        name = name.removesuffix(f"-tokens{tokens}")
        made = FeatureRows(sources.network, name, tokens, turned, store.tile_size, sources.device, sources.precision)
        parts = [each[fault.array] for each in in_order(made, batches, sources.device)]
    else:
        _check_maker(attrs, "first_stage", "--first-stage", sources)
        made = partial(latent_rows, sources.stage, turned, sources.device, attrs["precision"])
        parts = list(in_order(made, batches, sources.device))
    values = np.concatenate(parts)
    return _put(fault, array, values, True, "another device, batch size or precision rounds otherwise")


def _check_maker(attrs: dict[str, Any], key: str, option: str, sources: Sources) -> None:
    """UserError unless what made an array is given."""
    if (maker := attrs.get(key)) is None or "weights_sha256" not in attrs:
        raise UserError("it was made elsewhere; bring it in again as before, after deleting it")
    given = next((each for each in sources.makers if key in each), None)
    if given is None or given[key] != maker:
        raise UserError(f"it was made by {maker}; give that by {option}")
    if given["weights_sha256"] != attrs["weights_sha256"]:
        raise UserError(
            f"it was made by other weights ({attrs['weights_sha256'][:12]}...) than those of {option} "
            f"({given['weights_sha256'][:12]}...), and one array has one maker; give those, or delete the array"
        )


def _make_whole(fault: Fault, store: TileStore, sources: Sources) -> str:
    """Make all of an array of features or latents, or the rest of a half-made one."""
    group, _, leaf = fault.array.partition("/")
    attrs = _attrs_of(store, fault)
    turned, tokens = bool(attrs.get("dihedral")), int(attrs.get("tokens", 0))
    source, option = (sources.network, "--encoder") if group == "features" else (sources.stage, "--first-stage")
    if source is None:
        raise UserError(f"give what made it by {option}")
    if fault.kind == ARRAY:
        remove(store.path / fault.array)
    if group == "features":
        name = None if fault.kind == HALF else leaf.removesuffix(f"-tokens{tokens}")
        made = extract(
            [store], sources.encoder, sources.weights, sources.batch_size, sources.device, sources.precision,
            turned, any_mpp=True, tokens=tokens, name=name,
        )  # fmt: skip
    else:
        name = None if fault.kind == HALF else leaf
        precision = attrs.get("precision", sources.precision)
        made, _ = encode_latents(
            [store], sources.first_stage, name, turned, sources.batch_size, sources.device, precision
        )
    if fault.kind == HALF and fault.path.exists():
        raise UserError(f"it is no array of {made}; give the command that was writing it again, or delete it")
    return "made again"


def _attrs_of(store: TileStore, fault: Fault) -> dict[str, Any]:
    """What an array says of itself, or where it says nothing its like in the stores beside."""
    beside = [path for path in sorted(store.path.parent.glob("*.zarr")) if path != store.path]
    for path in (fault.path or store.path / fault.array, *(each / fault.array for each in beside)):
        if (path / "zarr.json").is_file():
            try:
                return StoredArray(path, allow_lost=True).attrs
            except UserError:
                continue
    return {}


# --- both -------------------------------------------------------------------------------------------------------------


def _span(array: StoredArray, fault: Fault) -> slice:
    if array.layout is None:
        raise UserError("it is laid out as this toolkit does not write; delete it and make it again")
    rows = array.layout.rows_of(fault.file)
    return slice(rows.start, rows.stop)


def _put(fault: Fault, array: StoredArray, values: np.ndarray, sure: bool, why: str) -> str:
    if remake_file(fault.store, fault.array, fault.file, values, sure):
        return "made again, as it was"
    if not sure:
        told = "no digest is recorded by which to tell" if array.digests is None else "it is not what was recorded"
        raise UserError(f"what the slide gives may not be what was there: {told}; delete the store and make it again")
    return f"made again{'' if array.digests is None else f'; not byte for byte as it was: {why}'}"


def _mend_index(fault: Fault, sources: Sources) -> str:
    update_index(fault.store, entries=list(sources.entries.values()))
    return "brought up to date with the stores"
