"""Matrices of AnnData files (.h5ad), read by h5py: the package itself would hold pandas below 3."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from scipy.sparse import csc_matrix, csr_matrix

from ldm.errors import UserError, some, suggest
from ldm.foreign.budget import afford
from ldm.foreign.hdf5 import open_h5, values_of

LARGEST = 1 << 31  # values; a table of more is one of cells, not of samples
_SPARSE = {"csr_matrix": csr_matrix, "csc_matrix": csc_matrix}


def read_h5ad(path: Path | str, layer: str | None = None) -> tuple[list[str], list[str], np.ndarray, str]:
    """The names of samples (obs) and genes (var), values (S,G) float32, and which matrix these are.

    Args:
        layer: X, raw or the name of a layer. None is X; raw where X has negative values, as scaled ones, or is not
            there; the only layer where neither is. Natural logs of scanpy's `log1p` in X and raw become log2.
    Raises:
        UserError: no h5ad, no such matrix, several to choose from, names or sizes that do not fit it.

    >>> with h5py.File("t.h5ad", "w") as file:
    ...     for axis, names in {"obs": ["a", "b"], "var": ["TP53", "EGFR"]}.items():
    ...         file.create_group(axis).attrs["_index"] = "name"
    ...         file[f"{axis}/name"] = names
    ...     file["layers/counts"] = np.array([[1, 0], [2, 5]])
    >>> read_h5ad("t.h5ad")[2:]
    (array([[1., 0.], [2., 5.]], dtype=float32), 'layers/counts')
    """
    path = Path(path)
    with open_h5(path) as file:
        known = _matrices(file)
        if not known:
            raise UserError(f"{path} has no matrix: neither X nor raw nor a layer.")
        name, why = _chosen(path, file, known, layer)
        samples = _names(file["obs"])
        genes = _names(file["raw/var" if name == "raw" and "var" in file["raw"] else "var"])
        values, logs = _in_log2(file, name, _values(path, known[name], (len(samples), len(genes))))
    others = [other for other in known if other != name]
    said = f"{name}{why}{logs}" + (f"; --layer takes {some(others, 5)} instead" if others else "")
    return samples, genes, values, said


def _matrices(file: h5py.File) -> dict[str, h5py.Dataset | h5py.Group]:
    found = {name: file.get(place) for name, place in (("X", "X"), ("raw", "raw/X"))}
    found |= {f"layers/{name}": node for name, node in file.get("layers", {}).items()}
    return {name: node for name, node in found.items() if node is not None and _is_matrix(node)}


def _is_matrix(node: h5py.Dataset | h5py.Group) -> bool:
    if isinstance(node, h5py.Group):
        return _text(node.attrs.get("encoding-type", "")) in _SPARSE
    return node.shape is not None and len(node.shape) == 2


def _chosen(path: Path, file: h5py.File, known: dict, layer: str | None) -> tuple[str, str]:
    """The name of the matrix to take, and why it is that one."""
    if layer is not None:
        found = next((name for name in (layer, f"layers/{layer}") if name in known), None)
        if found is None:
            raise UserError(f"{path} has no matrix '{layer}', which --layer names{suggest(layer, known)}")
        return found, ""
    if "X" in known and "raw" in known and _least(known["X"]) < 0:
        return "raw", " (X has negative values, so it was scaled)"
    if "X" in known or "raw" in known:
        return ("X", "") if "X" in known else ("raw", " (there is no X)")
    if len(known) > 1:
        raise UserError(f"{path} has no X; say which of {some(list(known), 10)} by --layer.")
    return next(iter(known)), ""


def _least(node: h5py.Dataset | h5py.Group) -> float:
    values = node if isinstance(node, h5py.Dataset) else node["data"]
    starts = range(0, values.shape[0], 1 << 12 if values.ndim > 1 else 1 << 24)
    parts = (values_of(values, slice(start, start + starts.step)) for start in starts)
    return min((float(np.nanmin(part, initial=0.0)) for part in parts), default=0.0)


def _values(path: Path, node: h5py.Dataset | h5py.Group, shape: tuple[int, int]) -> np.ndarray:
    sparse = isinstance(node, h5py.Group)
    own = tuple(int(side) for side in (node.attrs["shape"] if sparse else node.shape))
    if own != shape:
        raise UserError(f"{path}: {node.name} is {own[0]} x {own[1]}, but there are {shape[0]} obs and {shape[1]} var.")
    if shape[0] * shape[1] > LARGEST:
        raise UserError(
            f"{path} has {shape[0]} x {shape[1]} values; a slide has one row of genes, so sum up the cells of each "
            "sample first."
        )
    if not sparse:
        return values_of(node).astype(np.float32)
    make = _SPARSE[_text(node.attrs["encoding-type"])]
    parts = tuple(values_of(node[part]) for part in ("data", "indices", "indptr"))
    afford(2 * 8 * shape[0] * shape[1], f"the values of {node.name} in {path}")
    return make(parts, own).toarray().astype(np.float32)


def _in_log2(file: h5py.File, name: str, values: np.ndarray) -> tuple[np.ndarray, str]:
    """Values in log2 where scanpy's `log1p` left logs to another base, by default e, in X or raw; and what to say.

    Whole numbers are counts that were set aside before, negative values were scaled after: both stay as they are.
    """
    logged = file.get("uns/log1p")
    if logged is None or name not in ("X", "raw") or (values < 0).any() or (values == np.round(values)).all():
        return values, ""
    base = logged.get("base") if isinstance(logged, h5py.Group) else None
    if base is None or base.shape is None or _text(base[()]) == "None":
        return values / np.float32(np.log(2)), ", natural logs by uns/log1p, made log2"
    factor = float(np.log2(float(base[()])))
    return (values, "") if factor == 1 else (values * np.float32(factor), f", logs to base {base[()]:g}, made log2")


def _names(axis: h5py.Group | h5py.Dataset) -> list[str]:
    if isinstance(axis, h5py.Dataset):  # the layout before 0.7: records with a field `index`
        field = next(name for name in ("index", "_index", axis.dtype.names[0]) if name in axis.dtype.names)
        return [_text(name) for name in values_of(axis)[field]]
    return _column(axis[_text(axis.attrs["_index"])])


def _column(node: h5py.Group | h5py.Dataset) -> list[str]:
    """A column as text: an array, a categorical one (codes of categories), or a nullable one (values and mask)."""
    if isinstance(node, h5py.Dataset):
        return [_text(value) for value in values_of(node)]
    if "categories" in node:
        categories = _column(node["categories"])
        return [categories[code] if code >= 0 else "" for code in values_of(node["codes"])]
    return ["" if hidden else value for value, hidden in zip(_column(node["values"]), values_of(node["mask"]))]


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
