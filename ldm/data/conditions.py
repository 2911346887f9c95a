"""What conditions a tile: values of the cohort's table, features of its store, rows of its omics tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldm.data import dihedral
from ldm.data.cohort import read_index
from ldm.data.splits import fallen_apart
from ldm.data.tile_store import TileStore
from ldm.errors import UserError, note, suggest
from ldm.foreign.settings import read_json
from ldm.foreign.shape import MAPPING, check_shape
from ldm.tables.parquet import read_parquet

TAKEN = ("image", "latent", "row", "slide", "coord")
NAMES_SHOWN = 1000


class TileConditions:
    """The conditions of chosen tiles of stores: batch key -> source.

    A source is `<column>`, a label of the store or a column of the cohort's index.parquet (text stays text, a number
    is a float32 scalar); `features/<name>`, an array of the store; or `omics/<source>`, the row of the cohort's table
    whose index is the tile's `sample` (NaN is unknown).

    Args:
        rows: for each store the rows that are chosen.
        missing: what becomes of tiles that lack a value: `error`, or `skip`, which leaves them out (`rows` has the
            others).
    """

    def __init__(
        self,
        stores: Sequence[TileStore],
        rows: Sequence[np.ndarray],
        sources: Mapping[str, str],
        missing: str = "error",
    ):
        if missing not in ("error", "skip"):
            raise UserError(f"`missing` is error or skip; got '{missing}'.")
        for key in sources:
            if key in TAKEN:
                raise UserError(f"a condition cannot be called '{key}', which tiles have anyway.")
        self.sources, self.stores = dict(sources), stores
        self.tables: dict[str, list[OmicsTable]] = {}  # key -> the table of each store's cohort
        self.values: dict[str, list[np.ndarray]] = {key: [] for key in sources}  # per store, of the chosen rows
        self.rows: list[np.ndarray] = []
        self.skipped = 0
        for store, chosen in zip(stores, rows):
            columns = {key: self._column(store, key, source)[chosen] for key, source in sources.items()}
            lacking = np.zeros(len(chosen), bool)
            for key, values in columns.items():
                none = pd.isna(values) if values.dtype == object else ~np.isfinite(values.astype(float))
                if none.any() and missing == "error":
                    raise UserError(
                        f"{none.sum()} of {len(chosen)} tiles of {store.slide} have no {sources[key]} (the first is "
                        f"row {chosen[none][0]}); fill it in, select others with `where`, or leave them out with "
                        "`missing: skip`."
                    )
                lacking |= none
            self.skipped += int(lacking.sum())
            self.rows.append(chosen[~lacking])
            for key, values in columns.items():
                self.values[key].append(values[~lacking])
        for source in sources.values():
            if source.startswith("features/"):
                self._check_alike(source)

    def _check_alike(self, source: str) -> None:
        """UserError unless an array has the same shape and maker in all stores."""
        arrays = {store.path: store.array(source) for store in self.stores}
        shapes = {array.shape[2 if array.attrs.get("dihedral") else 1 :]: path for path, array in arrays.items()}
        widths = {shape[-1 if len(shape) == 2 else 0] for shape in shapes}
        if len({len(shape) for shape in shapes}) > 1 or len(widths) > 1:
            listed = ", ".join(f"{shape} in {path}" for shape, path in shapes.items())
            raise UserError(f"'{source}' differs in shape between stores: {listed}")
        makers = {made_by: path for path, array in arrays.items() if (made_by := array.attrs.get("weights_sha256"))}
        if len(makers) > 1:
            listed = ", ".join(f"{path} ({made_by[:12]}...)" for made_by, path in makers.items())
            raise UserError(f"'{source}' was made by different weights in {listed}")

    def _column(self, store: TileStore, key: str, source: str) -> np.ndarray:
        """One value for every tile of a store: a label, a row of the store's array, or a row of an omics table."""
        kind, _, name = source.partition("/")
        if kind == "features" and name:
            store.features(name, tokens=True)
            return np.arange(len(store))
        index = index_rows(store)
        if kind == "omics" and name:
            path = _cohort_of(store) / "omics" / f"{name}.parquet"
            changed = path.stat().st_mtime_ns if path.is_file() else 0
            table = _omics_table(_cohort_of(store), name, changed)
            tables = self.tables.setdefault(key, [])
            tables.append(table)
            if table.about["genes"] != tables[0].about["genes"]:
                raise UserError(f"{path} has other genes than the first cohort's; join both with one list of genes.")
            if "sample" not in index:
                raise UserError(f"{_cohort_of(store)} has no column `sample`; run `python -m data_prep.join_omics`.")
            return table.index.get_indexer(index["sample"]).astype(float) + np.where(
                index["sample"].isin(table.index), 0.0, np.nan
            )
        if source in store.label_names:
            return store.labels(source)
        if source not in index:
            raise UserError(
                f"the condition '{key}' is to come from '{source}', which tiles of {store.path} do not have"
                f"{suggest(source, {*store.label_names, *index.columns})} {lost_index(store)}".rstrip()
            )
        column = index[source]
        return column.to_numpy(float) if pd.api.types.is_numeric_dtype(column) else column.to_numpy(object)

    def item(self, store: int, place: int, variant: int = 0) -> dict[str, Tensor | str]:
        """The conditions of the place-th chosen tile of a store; arrays of eight orientations in `variant`."""
        found: dict[str, Tensor | str] = {}
        for key, source in self.sources.items():
            value = self.values[key][store][place]
            kind, _, name = source.partition("/")
            if kind == "features" and name:
                array = self.stores[store].array(source)
                values = np.asarray(array[int(value)], np.float32)
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{self.stores[store].path}/{source} row {int(value)} holds NaN or infinity; make it again."
                    )
                if array.attrs.get("dihedral"):
                    values = values[variant]
                if side := array.attrs.get("tokens"):  # a map (k*k,D) is a grid, row by row
                    values = np.ascontiguousarray(values.T).reshape(-1, side, side)
                if values.ndim == 3 and not array.attrs.get("dihedral"):  # a grid (D,k,k) turns with its tile
                    values = np.ascontiguousarray(dihedral.apply(values, variant))
                found[key] = torch.from_numpy(values)
            elif key in self.tables:
                found[key] = torch.from_numpy(self.tables[key][store].values[int(value)])
            else:
                found[key] = value if isinstance(value, str) else torch.tensor(float(value))
        return found

    @property
    def metadata(self) -> dict[str, Any]:
        """For each key: its source, and the names that text takes (up to a thousand), what the stores say of a number,
        the genes and scalers of an omics table, or the attributes of a feature."""
        known: dict[str, Any] = {}
        for key, source in self.sources.items():
            about: dict[str, Any] = {"source": source}
            kind, _, name = source.partition("/")
            if kind == "features" and name:
                array = self.stores[0].features(name, tokens=True)
                shape = list(array.shape[2 if array.attrs.get("dihedral") else 1 :])
                if side := array.attrs.get("tokens"):
                    shape = [shape[1], side, side]
                about |= {"shape": shape, **array.attrs}
            elif key in self.tables:
                about = {**self.tables[key][0].about, **about}
            elif any(values.dtype == object for values in self.values[key]):
                names = sorted({str(value) for values in self.values[key] for value in values})
                about["names"] = names if len(names) <= NAMES_SHOWN else []
            else:  # what the stores say of a number: which class a score of 1 is, how it was made
                said = self.stores[0].attrs.get(source)
                about |= said if isinstance(said, dict) else {}
            known[key] = about
        return known


def has_condition(store: TileStore, source: str) -> bool:
    """Whether a store's tiles have a condition: an omics table of its cohort, a label or a column; of features True,
    as those have messages of their own where they lack.

    >>> has_condition(store, "tissue"), has_condition(store, "stage")
    (True, False)
    """
    kind, _, name = source.partition("/")
    if kind == "omics" and name:
        return (_cohort_of(store) / "omics" / f"{name}.parquet").is_file()
    if kind == "features" and name:
        return True
    return source in store.label_names or source in index_rows(store)


class OmicsTable:
    """cohort/omics/<source>.parquet in memory: index of samples, values (S,G) float32, what <source>.json says."""

    def __init__(self, cohort: Path, source: str):
        path = cohort / "omics" / f"{source}.parquet"
        if not path.is_file():
            known = sorted(p.stem for p in path.parent.glob("*.parquet"))
            raise UserError(
                f"there is no omics table at {path}{suggest(source, known)} Make one with `python -m "
                "data_prep.join_omics`."
            )
        again = "run `python -m data_prep.join_omics` again"
        table = read_parquet(path, "the omics table", again)
        if not all(kind.kind in "fiub" for kind in table.dtypes):
            raise UserError(f"the omics table {path} holds more than numbers; {again}.")
        self.index = pd.Index(table.index.astype(str))
        self.values = np.array(table, np.float32)
        about = path.with_suffix(".json")
        told = read_json(about, "what is known of an omics table,") if about.is_file() else {}
        check_shape(told, MAPPING, about)
        self.about = {**told, "genes": [str(name) for name in table.columns]}


@lru_cache(maxsize=8)
def _omics_table(cohort: Path, source: str, changed: int) -> OmicsTable:
    """An omics table as of the time `changed`, read once however many stores of the cohort there are."""
    return OmicsTable(cohort, source)


def _cohort_of(store: TileStore) -> Path:
    """The cohort folder that a store lies in."""
    return store.path.absolute().parent.parent


@lru_cache(maxsize=4)
def _index_of(path: Path, changed: int) -> dict[str, pd.DataFrame]:
    index = read_index(path.parent)
    if apart := fallen_apart(index):
        patient, splits = next(iter(apart.items()))
        note(
            f"{len(apart)} patients of {path} have slides in several splits, as {patient} in {' and '.join(splits)}: "
            "what is measured on one is known from the other. The command that wrote the tiles puts them together."
        )
    return {slide: rows.sort_values("row") for slide, rows in index.groupby("slide", sort=False)}


def index_path(store: TileStore) -> Path:
    """Where the table of tiles of a store's cohort is, if there is one.

    >>> index_path(store).parent == store.path.parent.parent
    True
    """
    return _cohort_of(store) / "index.parquet"


def lost_index(store: TileStore) -> str:
    """That a store lies in a cohort without a table of tiles, and what makes it anew; "" where it is there, or where
    the store stands by itself.

    >>> lost_index(store)
    'there is no table of tiles at ...index.parquet, where patients, splits and conditions stand; copy it there, or ...'
    """
    path = index_path(store)
    if path.is_file() or store.path.absolute().parent.name != "slides":
        return ""
    return (
        f"there is no table of tiles at {path}, where patients, splits and conditions stand; copy it there, or give "
        "the data_prep command that wrote the tiles again, which keeps them"
    )


def index_rows(store: TileStore) -> pd.DataFrame:
    """The rows of the cohort's index.parquet that are this store's, in its order; empty where there is no index.

    >>> index_rows(store).empty                                                     # the store stands by itself
    True
    """
    path = index_path(store)
    if not path.is_file():
        return pd.DataFrame()
    index = _index_of(path, path.stat().st_mtime_ns).get(store.slide, pd.DataFrame({"row": []}))
    if not np.array_equal(index["row"], np.arange(len(store))):
        raise UserError(
            f"{path} has {len(index)} rows for {store.slide} but its store has {len(store)} tiles; delete it "
            "and run the command that wrote it again."
        )
    return index
