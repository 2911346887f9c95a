"""Map-style datasets: tiles of stores with their features and latents, and crops of images.

Items are dicts: `image` (3,H,W) float32 in [-1, 1], `ssl` (D,) float32, `latent` (C,h,w) float32 in first-stage units,
`row` int, `slide` str, `coord` (2,) level-0 x, y; only what was asked for is there. An item is asked for by its index,
or by (index, draw) where the integer `draw` decides everything random in it (`ldm.data.sampler` gives them), so an item
never depends on workers or on the order of reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data import dihedral as d4
from ldm.data.conditions import TileConditions, index_rows, lost_index
from ldm.data.extent import tell
from ldm.data.tile_store import TileStore, open_cohort
from ldm.data.volumes import trained_on
from ldm.data.where import Clause, Where, parse_where, select, unknown
from ldm.errors import UserError, suggest
from ldm.images.slides import open_slide
from ldm.images.tissue import TissueMask
from ldm.rng import fold

Key = int | tuple[int, int]
Box = Sequence[float]  # x, y, width, height in level-0 pixels
_TRIES = 1000


MAKE_VALIDATION = (
    "; the data_prep command that made the cohort gives it a split 'val' when it is given again with --validation, as "
    "`python -m data_prep.tile_slides --slides ... --out ... --validation 0.1`, which holds out patients, or with "
    "--holdout, a region of one slide"
)


class NoTiles(UserError):
    """Nothing in the stores is what a dataset was asked for."""


def to_tensor(image: np.ndarray, variant: int = 0) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [-1, 1], in the orientation `variant` of `ldm.data.dihedral`.

    >>> to_tensor(np.array([[[0, 127.5, 255]]])).flatten()
    tensor([-1.,  0.,  1.])
    """
    turned = d4.apply(np.moveaxis(image, -1, 0), variant)
    scaled = np.multiply(turned, 1 / 127.5, dtype=np.float32, order="C")  # numpy: torch would wake its threads for this
    scaled -= 1
    return torch.from_numpy(scaled)


def _split_key(key: Key) -> tuple[int, int | None]:
    index, draw = key if isinstance(key, tuple) else (key, None)
    return int(index), draw


def _overlaps(coords: np.ndarray, side: float, box: Box) -> np.ndarray:
    """(n,) bool: squares at `coords` (n, 2) that share area with the box."""
    x, y, w, h = box
    return (coords[:, 0] < x + w) & (coords[:, 0] + side > x) & (coords[:, 1] < y + h) & (coords[:, 1] + side > y)


def _within(coords: np.ndarray, side: float, box: Box) -> np.ndarray:
    """(n,) bool: squares at `coords` (n, 2) that lie wholly in the box."""
    x, y, w, h = box
    return (coords[:, 0] >= x) & (coords[:, 0] + side <= x + w) & (coords[:, 1] >= y) & (coords[:, 1] + side <= y + h)


class TileDataset(Dataset):
    """Tiles of finished stores.

    Args:
        stores: a `.zarr` store, a cohort folder, or several of these.
        keys: which of image, ssl, latent an item has; `row`, `slide` and `coord` always are.
        feature: name of the features for ssl; latents: name of the latents for latent.
        dihedral: show each tile in a random one of its eight orientations. Latents, which cannot be turned, must have
            been cached in all eight; features that were not are used as they are.
        where: keeps tiles by label or by column of the cohort's index.parquet, see `ldm.data.where`:
            `[split=train, tissue>0.5]`, `{split: [train, test]}`, `{tissue: {min: 0.5}}`.
        include: keeps tiles that lie wholly in one of these boxes; exclude: drops tiles that touch one of these boxes
            (x, y, width, height in level-0 pixels).
        in_memory: hold tiles, features and latents in memory.
        conditions: batch key -> where it comes from, see `ldm.data.conditions.TileConditions`:
            `{class: disease, score: votes, mutation: omics/mutation, region: features/hipt-region}`.
        missing: tiles that lack a condition are an `error`, or left out (`skip`).
        gray: images are (1,H,W), the mean of the colours.
        slides: folders of the slides of stores without pixels, see `ldm.data.slide_tiles`.
    Raises:
        UserError: anything named that is not there, rows that do not match, dimensions that differ between stores,
            latents that are not cached in eight orientations.
        NoTiles: no tile left.
    """

    def __init__(
        self,
        stores: str | Sequence[str],
        keys: Sequence[str] = ("image",),
        feature: str | None = None,
        latents: str | None = None,
        dihedral: bool = False,
        where: Where = None,
        include: Sequence[Box] | None = None,
        exclude: Sequence[Box] = (),
        in_memory: bool = False,
        conditions: Mapping[str, str] | None = None,
        missing: str = "error",
        gray: bool = False,
        slides: Sequence[str] = (),
    ) -> None:
        for key in keys:
            if key not in ("image", "ssl", "latent"):
                raise UserError(f"a tile has no '{key}'{suggest(key, ('image', 'ssl', 'latent'))}")
        self.stores = open_cohort(stores, slides)
        self.keys, self.dihedral, self.gray = tuple(keys), dihedral, gray
        self.names = {}  # key -> name of its array in the store
        if "ssl" in keys:
            self.names["ssl"] = f"features/{feature}"
            _require(feature, "feature", self.stores[0].feature_names)
        if "latent" in keys:
            self.names["latent"] = f"latents/{latents}"
            _require(latents, "latents", self.stores[0].latent_names)
        self._check_arrays(feature, latents)
        self._coords = [store.coords for store in self.stores]
        clauses = parse_where(where)
        column = cache(lambda name: np.concatenate([_values(store, name) for store in self.stores]))
        within = [_placed(store, coords, include, exclude) for store, coords in zip(self.stores, self._coords)]
        keep = np.concatenate(within) & select(clauses, sum(map(len, within)), column)
        no_such = unknown(clauses, column, "no tile")
        if no_such and keep.any():
            raise UserError(no_such)
        kept = [np.flatnonzero(own) for own in np.split(keep, np.cumsum([len(own) for own in within])[:-1])]
        if clash := sorted(set(conditions or {}) & set(self.names)):
            raise UserError(f"'{clash[0]}' is in `keys` and in `conditions`; leave it out of one of them.")
        self.conditions = TileConditions(self.stores, kept, conditions or {}, missing)
        kept = self.conditions.rows
        self._store_of = np.repeat(np.arange(len(kept)), [len(rows) for rows in kept])
        self._row_of = np.concatenate(kept)
        self._first = np.concatenate([[0], np.cumsum([len(rows) for rows in kept])])
        if not len(self._row_of):
            given = {"include": include, "exclude": exclude, "missing": conditions and missing}
            chosen = [*map(str, clauses), *(f"{name}={value}" for name, value in given.items() if value)]
            unsplit = Clause("split", "=", ("val",)) in clauses
            raise NoTiles(
                f"none of the {len(keep)} tiles of {stores} is selected by {' and '.join(chosen)}"
                + (MAKE_VALIDATION if unsplit else f"; {no_such}" if no_such else "")
            )
        held = {**self.names, **({"image": "tiles"} if "image" in keys else {})}
        self._memory = {
            (i, key): np.asarray(store.array(name)[:])
            for i, store in enumerate(self.stores)
            for key, name in held.items()
            if in_memory
        }

    def _check_arrays(self, feature: str | None, latents: str | None) -> None:
        tails: dict[str, dict[tuple[int, ...], Path]] = {}
        makers: dict[str, dict[str, Path]] = {}  # key -> SHA-256 of the weights that made the array
        for store in self.stores:
            if "ssl" in self.names:
                array = store.features(feature)
                tails.setdefault("ssl", {})[array.shape[-1:]] = store.path
            if "latent" in self.names:
                array = store.latents(latents)
                tails.setdefault("latent", {})[array.shape[-3:]] = store.path
                if self.dihedral and not array.attrs.get("dihedral"):
                    raise UserError(
                        f"{store.path} has latents '{latents}' in one orientation, and a flipped latent is not the "
                        "latent of the flipped tile: cache all eight with `python -m data_prep.encode_latents "
                        "--dihedral`, or set dihedral: false."
                    )
            for key, name in self.names.items():
                if made_by := store.array(name).attrs.get("weights_sha256"):
                    makers.setdefault(key, {})[made_by] = store.path
        for key, weights in makers.items():
            if len(weights) > 1:
                raise UserError(
                    f"'{self.names[key]}' was made by different weights in "
                    + ", ".join(f"{path} ({made_by[:12]}...)" for made_by, path in weights.items())
                )
        for key, shapes in tails.items():
            if len(shapes) > 1:
                raise UserError(
                    f"'{self.names[key]}' differs in shape between stores: "
                    + ", ".join(f"{shape} in {path}" for shape, path in shapes.items())
                )

    def __len__(self) -> int:
        return len(self._row_of)

    def check_slides(self) -> None:
        """UserError where images are read from a slide that is not there, before a training would come to it."""
        for store in self.stores:
            if "image" in self.keys and store.attrs["pixels"] == "none":
                _ = store.tiles.slide

    @property
    def metadata(self) -> dict[str, Any]:
        """What a model trained on these tiles must remember.

        mpp, tile_size; `slide_licence` where the stores know it (several, joined by "; "); `encoder`: the features'
        attributes; `latents`: first stage, SHA-256 of its weights, and scale_factor = 1/std over all stores;
        `conditions`: see `TileConditions.metadata`; `volumes`: of slices, see `ldm.data.volumes.trained_on`.
        """
        store = self.stores[0]
        known: dict[str, Any] = {"tile_size": int(store.tile_size)}
        if store.mpp is not None:
            known["mpp"] = store.mpp
        if licences := sorted({licence for store in self.stores if (licence := store.attrs.get("licence"))}):
            known["slide_licence"] = "; ".join(licences)
        if "ssl" in self.names:
            known["encoder"] = dict(store.array(self.names["ssl"]).attrs)
        if "latent" in self.names:
            arrays = [store.array(self.names["latent"]) for store in self.stores]
            attrs = [array.attrs for array in arrays]
            latents = {name: attrs[0][name] for name in ("first_stage", "weights_sha256") if name in attrs[0]}
            if all("std" in each for each in attrs):
                counts = [array.shape[0] for array in arrays]
                variance = np.average([each["std"] ** 2 for each in attrs], weights=counts)
                latents["scale_factor"] = float(1 / max(variance**0.5, 1e-8))
            known["latents"] = latents
        if self.conditions.sources:
            known["conditions"] = self.conditions.metadata
        shown = np.unique(self._store_of).tolist()
        if volumes := trained_on([dict(self.stores[i].attrs) for i in shown]):
            known["volumes"] = volumes
        return known

    def _vector(self, store: int, key: str, row: int, variant: int) -> np.ndarray:
        """One row of a cached array in the orientation `variant`, or as it is where only one was cached."""
        held = self._memory.get((store, key))
        array = self.stores[store].array(self.names[key])
        values = held[row] if held is not None else np.asarray(array[row])
        if array.attrs.get("dihedral"):
            values = values[variant]
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.stores[store].path}/{self.names[key]} row {row} holds NaN or infinity; make it again."
            )
        return values

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, draw = _split_key(key)
        store, row = int(self._store_of[index]), int(self._row_of[index])
        variant = draw % d4.COUNT if self.dihedral and draw is not None else 0
        item: dict[str, Any] = {
            "row": row,
            "slide": self.stores[store].slide,
            "coord": torch.from_numpy(self._coords[store][row].astype(np.int64)),
        }
        if "image" in self.keys:
            held = self._memory.get((store, "image"))
            item["image"] = to_tensor(self.stores[store].tile(row) if held is None else held[row], variant)
            if self.gray:
                item["image"] = item["image"].mean(0, keepdim=True)
        for name in self.names:
            item[name] = torch.from_numpy(self._vector(store, name, row, variant))
        return item | self.conditions.item(store, index - int(self._first[store]), variant)

    def values(self, key: str) -> np.ndarray:
        """The values (len(self),) of a condition that is text or a number."""
        source = self.conditions.sources.get(key)
        if source is None or "/" in source:
            known = [name for name, where in self.conditions.sources.items() if "/" not in where]
            raise UserError(f"tiles have no condition '{key}' that is one value each{suggest(key, known)}")
        return np.concatenate(self.conditions.values[key])


def _require(name: str | None, what: str, known: Sequence[str]) -> None:
    if name is None:
        raise UserError(f"name the {what} to read{suggest('', known)}")


def _values(store: TileStore, column: str) -> np.ndarray:
    """A label of a store's tiles, or a column of the index of its cohort; UserError where neither has that name."""
    if column in store.label_names:
        return store.labels(column)
    if column == "slide":
        return np.full(len(store), store.slide, object)
    index = index_rows(store)
    if column in index.columns:
        return index[column].to_numpy()
    raise UserError(
        f"tiles of {store.path} have no '{column}'{suggest(column, {*store.label_names, *index.columns})} "
        f"{lost_index(store)}".rstrip()
    )


def _placed(store: TileStore, coords: np.ndarray, include: Sequence[Box] | None, exclude: Sequence[Box]) -> np.ndarray:
    """(N,) bool: which tiles of a store lie in the boxes that are included and touch none that are excluded."""
    side = store.tile_size * store.downsample
    keep = np.ones(len(store), bool)
    if include is not None:
        keep &= np.any([_within(coords, side, box) for box in include], axis=0)
    for box in exclude:
        keep &= ~_overlaps(coords, side, box)
    return keep


class RegionDataset(Dataset):
    """Random crops of slides or images held in memory, for training a first stage on little data.

    Args:
        images: mappings with `path`, and optionally `mpp` (of its level 0, where the file does not say it), `weight`
            (default: by area) and `exclude` (boxes x, y, width, height in level-0 pixels that no crop may touch).
        size: side of a crop in pixels; mpp: micrometres per pixel of a crop, None is each image's own.
        length: items per epoch.
        background: fraction of the crops that lie on glass (less than 5% of tissue) where the image has any; the
            others hold at least a quarter of tissue.
        dihedral: turn and flip crops at random.
    """

    def __init__(
        self,
        images: Sequence[Mapping[str, Any]],
        size: int,
        length: int,
        mpp: float | None = None,
        background: float = 0.05,
        dihedral: bool = True,
    ) -> None:
        self.size, self.length, self.background, self.dihedral = size, length, background, dihedral
        self._pixels, self._masks, self._scales, self._exclude, weights = [], [], [], [], []
        for image in images:
            if unknown := set(image) - {"path", "mpp", "weight", "exclude"}:
                name = sorted(unknown)[0]
                raise UserError(
                    f"an image of RegionDataset has no '{name}'{suggest(name, ('path', 'mpp', 'weight', 'exclude'))}"
                )
            if "path" not in image:
                raise UserError(f"an image of RegionDataset lacks its path; it has {dict(image)}.")
            slide = open_slide(image["path"], image.get("mpp"))
            tell(f"{slide.path.name}: {note}" for note in slide.notes)
            pixels = slide.thumbnail(mpp or slide.mpp)
            if min(pixels.shape[:2]) < size:
                raise UserError(
                    f"{slide.path} is {pixels.shape[1]} x {pixels.shape[0]} px, smaller than crops of {size} px."
                )
            self._pixels.append(pixels)
            self._masks.append(TissueMask(slide))
            self._scales.append(slide.dimensions[0] / pixels.shape[1])
            self._exclude.append([tuple(box) for box in image.get("exclude", ())])
            weights.append(image.get("weight", pixels.shape[0] * pixels.shape[1]))
        if not self._pixels:
            raise UserError("RegionDataset needs at least one image.")
        self._weights = np.asarray(weights, float) / np.sum(weights)
        self._names = [Path(image["path"]).name for image in images]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index, draw = _split_key(key)
        rng = np.random.default_rng(fold(index) if draw is None else draw)
        i = int(rng.choice(len(self._pixels), p=self._weights))
        pixels, size = self._pixels[i], self.size
        place = self._place(i, rng, glass=True) if rng.random() < self.background else None
        place = self._place(i, rng, glass=False) if place is None else place
        if place is None:
            raise UserError(
                f"{self._names[i]} has no place on tissue for a crop of {size} px outside the excluded boxes."
            )
        x, y = place
        crop = to_tensor(pixels[y : y + size, x : x + size], int(rng.integers(d4.COUNT)) if self.dihedral else 0)
        corner = np.floor(place * self._scales[i]).astype(np.int64)
        return {"image": crop, "slide": self._names[i], "coord": torch.from_numpy(corner)}

    def _place(self, i: int, rng: np.random.Generator, glass: bool) -> np.ndarray | None:
        """A random corner x, y (2,) in pixels of image i for a crop on glass or on tissue; None if none was found."""
        height, width = (extent - self.size + 1 for extent in self._pixels[i].shape[:2])
        side = self.size * self._scales[i]  # in level-0 pixels
        for _ in range(_TRIES // 50):
            places = np.stack([rng.integers(width, size=50), rng.integers(height, size=50)], 1)
            corners = places * self._scales[i]
            tissue = self._masks[i].fraction(corners, side)
            fits = tissue < 0.05 if glass else tissue >= 0.25
            for box in self._exclude[i]:
                fits &= ~_overlaps(corners, side, box)
            if fits.any():
                return places[fits.argmax()]
        return None
