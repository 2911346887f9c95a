"""Which tiles a user asks for: the conditions of each, by name, of a table, of a file of features or of a store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.conditioners.compose import cells_of, keys_of, known_key, parse_conditions
from ldm.data.conditions import has_condition, lost_index
from ldm.data.features import read_features
from ldm.data.tile_store import TileStore, open_cohort
from ldm.data.where import Where
from ldm.errors import UserError, note, suggest
from ldm.images.write import to_uint8
from ldm.tables.text import read_table

if TYPE_CHECKING:
    from ldm.conditioners.base import Conditioner
    from ldm.latent_diffusion import LatentDiffusion


@dataclass
class Requests:
    """N tiles to make.

    Attributes:
        about: for each, what it is of: source, row, conditions in words.
        values: condition -> N values. fixed: condition -> the value of all.
        real: a reader of the i-th real tile (T,T,3) uint8, where they come from real ones.
        absent: conditions of the model that neither a store nor the user gave; null to the model.
    """

    about: list[dict[str, Any]]
    values: dict[str, Sequence[Any]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    real: Callable[[int], np.ndarray] | None = None
    absent: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.about)

    def given(self, rows: range) -> dict[str, Any]:
        """The conditions of a range of tiles, for `LatentDiffusion.condition`."""
        own = {}
        for name, values in self.values.items():
            part = list(values[rows.start : rows.stop])
            alike = isinstance(part[0], np.ndarray) and len({value.shape for value in part}) == 1
            own[name] = np.stack(part) if alike else part
        return own | self.fixed

    def digest(self, row: int) -> str:
        """SHA-256 of all conditions of one tile."""
        known = hashlib.sha256(json.dumps(self.fixed, sort_keys=True, default=in_words).encode())
        for name, values in sorted(self.values.items()):
            value = values[row]
            known.update(name.encode())
            array = isinstance(value, np.ndarray)
            known.update(value.astype(np.float32).tobytes() if array else str(value).encode())
        return known.hexdigest()


def in_words(value: Any) -> str:
    """A value of a condition in words: an array as the beginning of its SHA-256.

    >>> in_words(0.5), in_words(np.zeros(2, np.float32))
    ('0.5', 'sha256:af5570f5a1810b7a')
    """
    return f"sha256:{hashlib.sha256(value.tobytes()).hexdigest()[:16]}" if isinstance(value, np.ndarray) else str(value)


@dataclass(frozen=True)
class AskedTiles:
    """Which tiles a user asks for.

    Attributes:
        features: a file of features, one tile for each; or a cohort or store, one for each tile selected by `where`,
            with all that the model is conditioned on as its training data had it.
        feature: name of the feature in a store. where: see `ldm.data.where`.
        conditions: "name=value", the same for every tile; they replace those of a store.
        table: CSV or TSV with a column for each condition and a tile for each row.
        count: how many; at most so many, evenly chosen, of features, store or table.
    """

    features: Path | None = None
    feature: str | None = None
    where: Where = ()
    conditions: Sequence[str] = ()
    table: Path | None = None
    count: int | None = None


def requested_tiles(model: LatentDiffusion, asked: AskedTiles) -> Requests:
    """The tiles that a user asks for. UserError: what goes together with nothing, or that the model does not take.

    >>> model = ldm.load_model(models / "demo-text")
    >>> found = requested_tiles(model, AskedTiles(conditions=["text=a lymph node"], count=2))
    >>> len(found), found.given(range(2))
    (2, {'text': 'a lymph node'})
    """
    features, table, count, conditions = asked.features, asked.table, asked.count, asked.conditions
    conditioner = model.cond_stage_model
    fixed = parse_conditions(conditioner, conditions)
    words = {name.partition("=")[0]: name.partition("=")[2] for name in conditions}
    if features is not None and table is not None:
        raise UserError("give features or a table of conditions, not both.")
    if features is None and asked.where:
        raise UserError("a selection (--where) is of a tile store's tiles; name the store with --features.")
    if table is not None:
        return _of_table(conditioner, table, fixed, count)
    if features is None:
        if conditioner is not None and not fixed:
            raise UserError(
                f"say what the tiles shall show: --condition name=value ({', '.join(conditioner.keys)}), --features or "
                "--table."
            )
        return Requests([{"source": "", **words} for _ in range(count or 1)], fixed=fixed)
    if conditioner is None:
        raise UserError("the model is unconditional; it takes no features.")
    if not is_store(features):
        return _of_file(model, features, asked.where, fixed, count)
    return _of_store(model, features, asked.feature, asked.where, fixed, count)


def _of_table(conditioner: Conditioner | None, path: Path, fixed: dict[str, Any], count: int | None) -> Requests:
    if conditioner is None:
        raise UserError("the model is unconditional; it takes no table.")
    table = read_table(path, missing=("",)).fillna("")
    header, lines = list(table.columns), table.to_numpy().tolist()
    rows = evenly(len(lines), count)
    values: dict[str, Any] = {}
    for column, name in enumerate(header):
        key = known_key(conditioner, name)
        if key in values or key in fixed:
            raise UserError(f"{path}: '{name}' is given twice, in two columns or by --condition too.")
        if key in keys_of(conditioner, "control"):
            raise UserError(f"{path}: an image for each row is for `histoldm translate --images`; leave {name} out.")
        texts = [lines[row][column] for row in rows]
        if "" in texts:
            raise UserError(f"{path}: row {int(rows[texts.index('')]) + 2} has no {name}; fill it in.")
        values[key] = [conditioner.parse(key, text) for text in texts]
    about = [{"source": path.name, "row": int(row), **dict(zip(header, lines[row]))} for row in rows]
    return Requests(about, values, fixed)


def _of_file(model: LatentDiffusion, path: Path, where: Where, fixed: dict[str, Any], count: int | None) -> Requests:
    if where:
        raise UserError(f"--where selects tiles of a store; {path} is a file of features.")
    key = known_key(model.cond_stage_model, "features")
    vectors = features_in(path, feature_dim(model), cells_of(model.cond_stage_model))
    vectors = vectors[~np.isnan(vectors).reshape(len(vectors), -1).any(1)]
    rows = evenly(len(vectors), count)
    return Requests([{"source": path.name, "row": int(row)} for row in rows], {key: list(vectors[rows])}, fixed)


def features_in(path: Path, dim: int | None, cells: int = 1) -> np.ndarray:
    """What describes each tile in a file of features: (N,D), or the blocks (N,D,cells,cells) of its grid.

    >>> np.save("grid.npy", np.zeros((2, 4, 8), np.float32))
    >>> features_in(Path("grid.npy"), dim=8).shape, features_in(Path("grid.npy"), dim=8, cells=2).shape
    ((8, 8), (2, 8, 2, 2))
    """
    found = read_features(path, dim=dim)
    return blocks(found.grid()[0], cells) if cells > 1 else found.values.reshape(-1, found.values.shape[-1])


def blocks(grid: np.ndarray, cells: int) -> np.ndarray:
    """The blocks (N,D,cells,cells) of a grid (rows,cols,D), row by row, each of which describes one tile.

    >>> blocks(np.zeros((4, 8, 3)), 4).shape
    (2, 3, 4, 4)
    """
    rows, cols, dim = grid.shape
    if rows % cells or cols % cells:
        raise UserError(
            f"the model takes {cells} x {cells} features for a tile; a grid of {rows} x {cols} is no whole number of "
            f"such blocks. Give ({cells} n, {cells} m, {dim}) for n x m tiles, which are taken row by row."
        )
    parted = grid.reshape(rows // cells, cells, cols // cells, cells, dim)
    return parted.transpose(0, 2, 4, 1, 3).reshape(-1, dim, cells, cells)


def _of_store(
    model: LatentDiffusion,
    path: Path,
    feature: str | None,
    where: Where,
    fixed: dict[str, Any],
    count: int | None,
) -> Requests:
    from ldm.data.datasets import TileDataset

    stores = open_cohort(path)
    paths, keys = [str(store.path) for store in stores], model.cond_stage_model.keys
    recorded = model.metadata.get("conditions", {})
    sources = {key: recorded[key]["source"] for key in keys if key in recorded and key not in fixed}
    about = model.cond_stage_model.describe()
    images = [key for key in keys if about[key].kind == "image" and key not in fixed]
    if "ssl" in keys and "ssl" not in fixed and "ssl" not in sources:
        sources["ssl"] = f"features/{pick_feature(stores, feature, model)}"
    elif feature is not None:
        raise UserError(f"--feature '{feature}': the model takes {sources.get('ssl', 'no features of stores')}.")
    absent: list[str] = []
    if fixed:  # the user said what the tiles are: what no store says besides is unknown, and no mistake
        absent = [key for key, source in sources.items() if not any(has_condition(store, source) for store in stores)]
        sources = {key: source for key, source in sources.items() if key not in absent}
        for lost in {lost_index(store) for store in stores if absent} - {""}:
            note(f"{lost}.")
    for key, source in sources.items():
        if source.startswith("features/"):
            for store in stores:
                array = store.features(source.removeprefix("features/"), tokens=True)
                check_encoder(model, dict(array.attrs), store.path, key)
    if not sources and not images and not fixed:
        raise UserError(
            f"the model's conditions ({', '.join(keys)}) are not in {path}; give them by name, --condition or --source."
        )
    dataset = TileDataset(paths, () if sources else ("image",), where=where, conditions=sources, missing="skip")
    model.cond_stage_model.check_data(dataset.metadata)
    pictures = TileDataset(paths, ("image",), where=where, conditions=sources, missing="skip")
    rows = evenly(len(dataset), count)
    items = [dataset[int(row)] for row in rows]
    for item, row in zip(items, rows if images else ()):
        shown = pictures[int(row)]["image"]
        item |= {key: shown.mean(0, keepdim=True) if about[key].channels == 1 else shown for key in images}
    words = [
        {"source": item["slide"], "row": item["row"], "x": int(item["coord"][0]), "y": int(item["coord"][1])}
        | {key: _in_words(item[key]) for key in sources if _in_words(item[key]) is not None}
        for item in items
    ]
    values = {key: [_plain(item[key]) for item in items] for key in [*sources, *images]}
    return Requests(words, values, fixed, lambda i: to_uint8(pictures[int(rows[i])]["image"]), absent)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return float(value) if value.ndim == 0 else value.numpy()


def _in_words(value: Any) -> str | float | None:
    plain = _plain(value)
    return None if isinstance(plain, np.ndarray) else plain


def is_store(path: Path) -> bool:
    """Whether a path is a tile store or a folder of them rather than a feature file.

    >>> is_store(store.path), is_store(Path("features.npy"))
    (True, False)
    """
    return path.is_dir()


def pick_feature(stores: Sequence[TileStore], feature: str | None, model: LatentDiffusion) -> str:
    """The feature to read from stores: the one asked for, the model's own encoder, or the only one there is.

    >>> pick_feature([store], None, ldm.load_model(models / "demo-ssl"))
    Traceback (most recent call last):
    ldm.errors.UserError: ...CMU-1-Small-Region.zarr has no features; make them with ...
    """
    names = stores[0].feature_names
    recorded = model.metadata.get("conditions", {}).get("ssl", {}).get("source", "").removeprefix("features/")
    wanted = feature or recorded or model.metadata.get("encoder", {}).get("encoder")
    if not names:
        raise UserError(f"{stores[0].path} has no features; make them with `python -m data_prep.extract_features`.")
    if wanted is None and len(names) == 1:
        wanted = names[0]
    if wanted not in names:
        if wanted in stores[0].names("features"):
            stores[0].features(wanted)  # patch tokens, which it refuses
        given = f"--feature '{wanted}'" if wanted else "several features"
        raise UserError(f"{stores[0].path}: {given}{suggest(wanted or '', names)}")
    return wanted


def check_encoder(model: LatentDiffusion, attrs: Mapping[str, Any], source: Path, key: str = "ssl") -> None:
    """UserError if features (`attrs` of their array) were made by another encoder than the model's condition `key`.

    >>> model = ldm.load_model(models / "demo-ssl")
    >>> check_encoder(model, {"encoder": "uni"}, Path("a.zarr"))
    Traceback (most recent call last):
    ldm.errors.UserError: a.zarr holds features of encoder 'uni', but the model was trained on 'demo-encoder' ...
    """
    own = model.metadata.get("conditions", {}).get(key) or (model.metadata.get("encoder", {}) if key == "ssl" else {})
    for name, given in (("weights_sha256", "weights"), ("encoder", "name")):
        if own.get(name) and attrs.get(name):
            if own[name] != attrs[name]:
                raise UserError(
                    f"{source} holds features of encoder '{attrs.get('encoder')}', but the model was trained on "
                    f"'{own.get('encoder')}' ({given} {own[name][:12]}); extract features with that one."
                )
            return


def feature_dim(model: LatentDiffusion) -> int | None:
    """Dimension of the features that the model is conditioned on.

    >>> feature_dim(ldm.load_model(models / "demo-ssl"))
    512
    """
    return next((about.dim for about in model.cond_stage_model.describe().values() if about.kind == "features"), None)


def evenly(total: int, count: int | None) -> np.ndarray:
    """At most `count` of range(total), evenly spread.

    >>> evenly(100, 3)
    array([ 0, 50, 99])
    """
    if count is None or count >= total:
        return np.arange(total)
    return np.linspace(0, total - 1, count).round().astype(int)
