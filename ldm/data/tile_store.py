"""Tile store: one Zarr v3 group per slide that holds its tiles, and per tile its features, latents and labels.

    <slide>.zarr/  tiles (N,T,T,3) u1    coords (N,2) i4: level-0 x, y of the top-left corner    labels/<name> (N,)
                   features/<encoder> (N,D) or (N,8,D)    latents/<first stage> (N,C,h,w) or (N,8,C,h,w)

Chunks are single tiles inside shards of up to 1024 tiles, so a random tile costs one small read and a cohort few files.
Arrays with the attribute `dihedral: true` hold the eight variants of `ldm.data.dihedral` along axis 1.
A store that is being written says so; an array that is being written has a hidden name. Both resume.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.shard_files import read_description
from ldm.data.slide_tiles import SlideTiles
from ldm.data.stored_array import RowArray, StoredArray
from ldm.errors import UserError, suggest
from ldm.files import tool_version
from ldm.foreign.paths import inside
from ldm.foreign.shape import ABOVE_0, COUNT, NUMBER, SIZE, TEXT, check_shape, maybe, one_of, so_many
from ldm.images.kinds import is_ome_zarr
from ldm.images.pictures import Picture
from ldm.images.slides import Slide

# attributes that are no settings: a store may have others and be the same
TOLD = ("version", "mpp_source", "notes", "slide_file")
GROUPS = ("features", "latents", "labels")
FORMAT = 2  # of the layout, of which 1 knows no pixels but zstd; a store of a higher one is of a newer version
PIXELS = ("zstd", "jpeg", "none")  # as what tiles are stored; of `none` they are read from the slide
NEEDED = ("slide", "mpp", "tile_size", "stride", "downsample", "rows")  # attributes without which a store is none
_FORM = {  # of attributes
    "slide": TEXT, "mpp": maybe(ABOVE_0), "tile_size": SIZE, "stride": SIZE, "downsample": ABOVE_0, "rows": COUNT,
    "count?": COUNT, "level0_size?": maybe(so_many(2, SIZE)),
    "pixels?": one_of(PIXELS), "jpeg_quality?": COUNT, "slide_file?": {"name": TEXT, "path": TEXT, "digest": TEXT},
    "notes?": [TEXT], "texts?": {}, "licence?": maybe(TEXT), "patient?": maybe(TEXT), "magnification?": maybe(NUMBER),
}  # fmt: skip
_CONTENT = {"tiles": "u", "coords": "i", "features": "f", "latents": "f", "labels": "fiub"}  # kinds of numbers


class TileStore:
    """A finished tile store, read-only. Arrays open at first use, once per process, so it may travel to workers.

    Attributes:
        attrs: what the store says of itself: version, slide, mpp, mpp_source (where the slide's are from),
            magnification, tile_size, stride, level0_size (w, h), downsample (level-0 pixels per tile pixel), tissue
            (settings), licence, count, rows, complete; where labels stand for text, texts: label -> their values;
            pixels (one of PIXELS), and jpeg_quality or slide_file with it.
        path: the `.zarr` folder.
        slides: files and folders where the slide of a store without pixels is looked for, see `find_slide`.
    """

    def __init__(self, path: Path, attrs: dict[str, Any], slides: Sequence[Path | str] = ()) -> None:
        self.path, self.attrs, self.slides = path, attrs, slides
        self._arrays: dict[str, RowArray] = {}
        self._opened_by = os.getpid()

    @classmethod
    def open(
        cls, path: Path | str, allow_incomplete: bool = False, slides: Sequence[Path | str] = ()
    ) -> TileStore:
        """Open `path` (a `.zarr` folder). UserError when it is missing, no tile store, or not finished yet."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"there is no tile store at {path}; make one with `python -m data_prep.tile_slides`.")
        try:
            described = read_description(path)
            if described.get("node_type") != "group":
                raise ValueError(f"it is of the kind {described.get('node_type')}")
            attrs = described.get("attributes", {}).get("histoldm")
        except (ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path} is not a Zarr v3 group, so it is no tile store, or not a whole one ({reason}); if it was "
                "copied, copy all of it."
            ) from None
        if not isinstance(attrs, dict):
            raise UserError(
                f"{path} is a Zarr group without `histoldm` attributes, so it is no tile store, and without OME "
                "`multiscales`, so it is no image."
            )
        if (layout := attrs.get("format", 1)) not in range(1, FORMAT + 1):
            raise UserError(
                f"{path} has layout {layout} of histoldm {attrs.get('version', '?')}; this is {tool_version()}, which "
                f"reads layouts up to {FORMAT}: update it, or make the store with this version."
            )
        if lacking := [name for name in NEEDED if name not in attrs]:
            raise UserError(
                f"{path} does not say its {', '.join(lacking)} (zarr.json, attributes.histoldm), so its tiles cannot "
                "be placed; make it again, or copy it again from where it is whole."
            )
        check_shape(attrs, _FORM, f"{path} (zarr.json, attributes.histoldm)")
        if attrs.get("pixels") == "none" and "slide_file" not in attrs:
            raise UserError(f"{path} does not say which slide its pixels are read from; make it again.")
        if not attrs.get("complete") and not allow_incomplete:
            raise UserError(
                f"{path} is not finished: {attrs.get('rows', 0)} of {attrs.get('count', '?')} tiles are written; "
                "run the command that was writing it again and it goes on from there."
            )
        return cls(path, {"pixels": PIXELS[0], **attrs}, slides)

    def array(self, name: str) -> RowArray:
        """The array `name` inside the group, such as "tiles" or "features/uni". UserError where a part is missing."""
        if self._opened_by != os.getpid():
            self._arrays, self._opened_by = {}, os.getpid()
        if name not in self._arrays:
            from_slide = name == "tiles" and self.attrs["pixels"] == "none"
            array = self._of_slide() if from_slide else StoredArray(inside(self.path, name))
            inner = {"tiles": (self.tile_size, self.tile_size, 3), "coords": (2,)}.get(name, array.shape[1:])
            kinds = _CONTENT[name.partition("/")[0]]
            short = name in ("tiles", "coords") and array.ndim and len(array) < len(self)
            if array.shape[1:] != inner or not array.ndim or short or array.dtype.kind not in kinds:
                raise UserError(
                    f"{self.path}/{name} is {array.shape} {array.dtype}, which the store with {len(self)} tiles of "
                    f"{self.tile_size} px cannot hold; copy it again from where it is whole."
                )
            self._arrays[name] = array
        return self._arrays[name]

    def _of_slide(self) -> SlideTiles:
        told = self.attrs["slide_file"]
        return SlideTiles(self.path, self.coords, self.tile_size, self.downsample, told, self.slides)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "attrs": self.attrs, "slides": self.slides}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __repr__(self) -> str:
        return f"TileStore({str(self.path)!r}, {len(self)} tiles of {self.tile_size} px at {self.mpp} um/px)"

    def __len__(self) -> int:
        return int(self.attrs["rows"])

    @property
    def slide(self) -> str:
        return str(self.attrs["slide"])

    @property
    def mpp(self) -> float | None:
        """Micrometres per tile pixel; None where they are unknown, as of a radiograph."""
        return None if self.attrs["mpp"] is None else float(self.attrs["mpp"])

    @property
    def tile_size(self) -> int:
        return int(self.attrs["tile_size"])

    @property
    def stride(self) -> int:
        """Distance between neighbouring tiles, in tile pixels."""
        return int(self.attrs["stride"])

    @property
    def downsample(self) -> float:
        """Level-0 pixels per tile pixel."""
        return float(self.attrs["downsample"])

    @property
    def tiles(self) -> RowArray:
        return self.array("tiles")  # (N, T, T, 3) u1

    @property
    def coords(self) -> np.ndarray:
        return np.asarray(self.array("coords")[: len(self)])  # (N, 2) i4, level-0 x, y

    def tile(self, row: int) -> np.ndarray:
        """Tile `row` as (T, T, 3) uint8."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path} has tiles 0..{len(self) - 1}, asked for {row}")
        return np.asarray(self.tiles[int(row)])

    def picture(self, row: int, about: Mapping[str, Any] | None = None) -> Picture:
        """Tile `row`, and what is known of it, as the commands read their images.

        >>> picture = store.picture(3)
        >>> picture.file, picture.size
        ('CMU-1-Small-Region.svs row 3', (256, 256))
        """
        return Picture(f"{self.slide} row {row}", partial(self._tile_image, row), about=about or {})

    def _tile_image(self, row: int) -> Slide:
        return Slide.of_pixels(self.tile(row), self.path, self.mpp or 0.0)

    def names(self, group: str) -> list[str]:
        """Names of the finished arrays in "features", "latents" or "labels"."""
        folder = self.path / group
        return sorted(p.parent.name for p in folder.glob("*/zarr.json") if not p.parent.name.startswith("."))

    @property
    def feature_names(self) -> list[str]:
        """Names of features that are one vector per tile; maps of patch tokens are under names of their own."""
        return [name for name in self.names("features") if not self.array(f"features/{name}").attrs.get("tokens")]

    @property
    def latent_names(self) -> list[str]:
        return self.names("latents")

    @property
    def label_names(self) -> list[str]:
        return self.names("labels")

    def _named(self, group: str, name: str, make: str) -> StoredArray:
        known = self.names(group)
        if name not in known:
            raise UserError(f"{self.path} has no {group} '{name}'{suggest(name, known)} {make}")
        array = self.array(f"{group}/{name}")
        if array.shape[0] != len(self):
            raise UserError(
                f"{self.path}/{group}/{name} has {array.shape[0]} rows but the store has {len(self)} tiles; "
                "delete it and make it again."
            )
        return array

    def features(self, name: str, tokens: bool = False) -> StoredArray:
        """Features (N, D), or (N, 8, D) where its attribute `dihedral` is true.

        tokens: take maps of patch tokens too, (N, K*K, C) or (N, 8, K*K, C), K in the attribute `tokens`; without it
            they are a UserError.
        """
        array = self._named("features", name, "Make them with `python -m data_prep.extract_features`.")
        if (side := array.attrs.get("tokens")) and not tokens:
            raise UserError(
                f"{self.path}/features/{name} holds {side} x {side} patch tokens of each tile; one feature of each is "
                f"needed here{suggest('', self.feature_names)} Patch tokens are for a model with a "
                "ldm.conditioners.grid.GridTokens."
            )
        return array

    def latents(self, name: str) -> StoredArray:
        """Latents (N, C, h, w) in first-stage units, or (N, 8, C, h, w) where its attribute `dihedral` is true."""
        return self._named("latents", name, "Make them with `python -m data_prep.encode_latents`.")

    def labels(self, name: str) -> np.ndarray:
        """One value per tile, (N,): numbers, or text where the store says which number stands for which (`texts`)."""
        values = np.asarray(self._named("labels", name, "")[:])
        texts = self.attrs.get("texts", {}).get(name)
        return values if texts is None else np.array(texts, object)[values]

    def grid(self, region: Sequence[int] | None, feature: str) -> tuple[np.ndarray, np.ndarray]:
        """Features on the lattice of tiles inside a region of the slide.

        Args:
            region: (x, y, width, height) in level-0 pixels; None is the whole slide. Lattice points are
                x + column * stride and y + row * stride (times `downsample`), as far as whole tiles fit.
            feature: name of the features; of dihedral ones the plain variant is taken.
        Returns:
            features (rows, cols, D) float32, NaN where the store has no tile, and mask (rows, cols), True where it has.
        Raises:
            UserError: no tile of the store lies on the lattice.
        """
        if self.attrs.get("level0_size") is None:
            raise UserError(f"{self.path} was not cut from a slide, so its tiles form no grid.")
        array = self.features(feature)
        x, y, width, height = region if region is not None else (0, 0, *self.attrs["level0_size"])
        step, tile = self.stride * self.downsample, self.tile_size * self.downsample
        cols, rows = (int((extent - tile + 1) // step) + 1 for extent in (width, height))
        if cols < 1 or rows < 1:
            raise UserError(f"region {width} x {height} is smaller than one tile ({tile:g} level-0 px) of {self.path}.")
        coords = self.coords
        col, row = (coords[:, 0] - x) / step, (coords[:, 1] - y) / step
        near = 1.0 / step  # level-0 coordinates are rounded to whole pixels
        on = (np.abs(col - col.round()) <= near) & (np.abs(row - row.round()) <= near)
        col, row = col.round().astype(int), row.round().astype(int)
        on &= (col >= 0) & (col < cols) & (row >= 0) & (row < rows)
        if not on.any():
            inside = (coords >= (x, y)).all(1) & (coords + tile <= (x + width + 1, y + height + 1)).all(1)
            where = (
                f"the first tile inside is at {tuple(coords[inside][0].tolist())}" if inside.any() else "none inside"
            )
            raise UserError(
                f"no tile of {self.path} lies on the lattice that starts at ({x}, {y}) with step {step:g} px: {where}; "
                "let the region start at the corner of a tile."
            )
        grid = np.full((rows, cols, array.shape[-1]), np.nan, np.float32)
        for i in np.flatnonzero(on):
            values = array[int(i)]
            grid[row[i], col[i]] = values[0] if values.ndim == 2 else values
        return grid, ~np.isnan(grid[..., 0])


def is_finished(path: Path) -> bool:
    """Whether there is a tile store, and all of its tiles are written.

    >>> is_finished(store.path), is_finished(Path("nowhere.zarr"))
    (True, False)
    """
    return (path / "zarr.json").is_file() and bool(TileStore.open(path, allow_incomplete=True).attrs.get("complete"))


def as_numbers(labels: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Labels (N,) as a store holds them, text as numbers, and the texts that these stand for: its attribute `texts`.

    >>> numbers, texts = as_numbers({"tissue": [0.5, 1.0], "region": ["Tumour", "none"]})
    >>> numbers["region"].tolist(), texts
    ([0, 1], {'region': ['Tumour', 'none']})
    """
    numbers = {name: np.asarray(values) for name, values in labels.items()}
    texts = {}
    for name, values in numbers.items():
        if values.dtype.kind in "OUT":
            known, places = np.unique(values.astype(str), return_inverse=True)
            numbers[name], texts[name] = places.astype(np.int32), known.tolist()
    return numbers, texts


def holds_stores(path: Path) -> bool:
    """Whether a path is a tile store, or a folder or cohort of them, rather than images.

    >>> holds_stores(store.path), holds_stores(cells)
    (True, False)
    """
    if path.suffix == ".zarr":
        return path.is_dir() and not is_ome_zarr(path)
    found = [*path.glob("slides/*.zarr")] or [*path.glob("[!.]*.zarr")]
    return bool(found) and not any(map(is_ome_zarr, found))


def open_cohort(
    path: Path | str | Sequence[Path | str], slides: Sequence[Path | str] = ()
) -> list[TileStore]:
    """Stores of `path`: one `.zarr`, a folder of them, a cohort folder with `slides/`, or several of these.

    slides: where the slides of stores without pixels are looked for, see `ldm.data.slide_tiles`.

    >>> [found.slide for found in open_cohort(store.path.parent)]
    ['CMU-1-Small-Region.svs']
    """
    return [TileStore.open(found, slides=slides) for found in store_paths(path)]


def store_paths(path: Path | str | Sequence[Path | str]) -> list[Path]:
    """Where the stores of `path` are, as `open_cohort` takes it; whether they can be opened is not looked at.

    >>> store_paths(store.path.parent.parent) == [store.path]
    True
    """
    paths: list[Path] = []
    for p in [Path(path)] if isinstance(path, (str, Path)) else map(Path, path):
        found = [p] if p.suffix == ".zarr" else sorted((p / "slides").glob("*.zarr")) or sorted(p.glob("*.zarr"))
        if not found:
            raise UserError(f"there is no tile store in {p}: `python -m data_prep.tile_slides --out {p}` makes one.")
        paths += found
    if not paths:
        raise UserError("no tile store given.")
    return paths
