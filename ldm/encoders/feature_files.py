"""Feature files: the features of a set of images, whose they are, and how they were made. Distances read only these.

    <set>.h5   features (N,D) f4    digest (N,) sha-256 of the pixels    table/<column> (N,)
               attrs: histoldm (JSON), sha256 of all of this, which is checked when it is read

`ldm.data.features` reads them too, as any .h5 with `features`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from tqdm import tqdm

from ldm.data.collection import read_pictures
from ldm.data.features import read_features
from ldm.data.image_sets import ImageSet, content_sha256, table_of
from ldm.data.tile_store import open_cohort
from ldm.data.where import Where, parse_where
from ldm.encoders.extractors import Extractor
from ldm.errors import UserError, note
from ldm.files import hidden, owns, remove, tool_version, whole, write_text
from ldm.foreign.hdf5 import open_h5, values_of
from ldm.foreign.shape import MAPPING, check_shape

SUFFIXES = (".h5", ".hdf5", ".npy", ".pt", ".pth")
SAME = ("extractor", "weights_sha256", "resize", "preprocessing")  # what files that are compared share
AGAIN = "extract its features again"
DIGEST = 32
COPIED = 16_384  # rows copied at once


@dataclass(frozen=True)
class FeatureSet:
    """Features (N,D) float32 of a set, its table (see `ImageSet`), and about: extractor, weights, data.

    digest: SHA-256 of each image's pixels, where they were read.
    """

    values: np.ndarray
    table: pd.DataFrame
    about: dict[str, Any] = field(default_factory=dict)
    digest: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def name(self) -> str:
        return str(self.about.get("data", {}).get("path", "features"))

    def take(self, rows: np.ndarray) -> FeatureSet:
        digest = None if self.digest is None else self.digest[rows]
        return FeatureSet(self.values[rows], self.table.iloc[rows].reset_index(drop=True), self.about, digest)


@owns(beside=True)
def extract(images: ImageSet, extractor: Extractor, out: Path, batch_size: int = 64, desc: str = "") -> FeatureSet:
    """Write the features of images to the feature file `out`, batch by batch, and read it.

    What an interrupted run left is gone on with. Features of the same content by the same extractor are not made again.
    UserError: a value that is not finite, another run that writes the file.

    >>> from ldm.data.image_sets import open_images
    >>> from ldm.encoders.extractors import load_extractor
    >>> found = extract(open_images(cells), load_extractor("pixels"), Path("cells.h5"))
    >>> found.values.shape, found.about["extractor"]
    ((48, 3072), 'pixels')
    """
    data = images.about | {"content_sha256": content_sha256(images), "table_sha256": _table_sha256(images.table)}
    wanted = {"version": 1, **extractor.about, "dim": extractor.dim, "data": data}
    wanted = json.loads(json.dumps(wanted, default=str))
    part = hidden(out, ".rows")
    if (held := _held(out, wanted)) is not None:
        wanted["data"]["pixels_sha256"] = held.about["data"]["pixels_sha256"]
        if _told(held.about) != wanted:  # the images moved, or what is known of them changed
            write_feature_file(out, FeatureSet(held.values, images.table, wanted, held.digest))
        remove(part)
        return read_feature_file(out)
    begun = part / "about.json"
    if not (begun.is_file() and _maker(json.loads(begun.read_text())) == _maker(wanted)):
        remove(part)
        part.mkdir()
        write_text(begun, json.dumps(wanted))
    with (part / "features").open("ab") as rows, (part / "digest").open("ab") as digests:
        first = min(rows.tell() // (4 * extractor.dim), digests.tell() // DIGEST)
        first -= first % batch_size  # the same batches as without an interruption
        rows.truncate(first * 4 * extractor.dim)
        digests.truncate(first * DIGEST)
        bar = tqdm(total=len(images), initial=first, desc=desc or f"features {extractor.name}", unit="image")
        with bar:
            for batch in _batches(images, first, batch_size):
                values = extractor(batch)
                if not np.isfinite(values).all():
                    where = images.about["path"]
                    raise UserError(f"{extractor.name} gives values that are not finite for images of {where}.")
                rows.write(values.astype("<f4").tobytes())
                digests.write(b"".join(hashlib.sha256(image.tobytes()).digest() for image in batch))
                rows.flush()
                digests.flush()
                bar.update(len(batch))
    pixels = hashlib.sha256((part / "digest").read_bytes()).hexdigest()
    wanted["data"]["pixels_sha256"] = pixels
    values = np.memmap(part / "features", "<f4", "r", shape=(len(images), extractor.dim))
    digest = np.fromfile(part / "digest", f"V{DIGEST}")
    write_feature_file(out, FeatureSet(values, images.table, wanted, digest))
    del values
    remove(part)
    return read_feature_file(out)


def _held(path: Path, wanted: Mapping[str, Any]) -> FeatureSet | None:
    """The features that a file has already, if they are of what is wanted and as they were written."""
    if not path.is_file():
        return None
    try:
        about = _read_about(path)
        return read_feature_file(path) if _maker(about) == _maker(wanted) else None
    except UserError as error:
        note(f"{error} They are made anew.")
        return None


def _told(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of itself, but for what wrote it."""
    return {key: value for key, value in about.items() if key != "tool"}


def _maker(about: Mapping[str, Any]) -> dict[str, Any]:
    """Of what, and by what, features are: the content of the images, and the extractor."""
    return _told(about) | {"data": about.get("data", {}).get("content_sha256")}


def _table_sha256(table: pd.DataFrame) -> str:
    return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()


def _batches(images: ImageSet, first: int, batch_size: int) -> Iterator[np.ndarray]:
    """Images from the first on, (B,H,W,3) uint8, the next batch being read while one is used."""
    ranges = [range(start, min(start + batch_size, len(images))) for start in range(first, len(images), batch_size)]
    with ThreadPoolExecutor(1) as reader:
        pending = None
        for rows in ranges:
            following = reader.submit(lambda rows=rows: np.stack([images.read(i) for i in rows]))
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def write_feature_file(path: Path, features: FeatureSet) -> None:
    """Write a feature file, whole or not at all.

    >>> features = FeatureSet(np.ones((1, 2)), pd.DataFrame({"name": ["a.png"]}), {"extractor": "pixels"})
    >>> write_feature_file(Path("a.h5"), features)
    >>> read_feature_file(Path("a.h5")).table["name"].tolist()
    ['a.png']
    """
    with whole(path) as part, h5py.File(part, "w") as file:
        rows = file.create_dataset("features", features.values.shape, "f4")
        for start in range(0, len(features), COPIED):
            rows[start : start + COPIED] = features.values[start : start + COPIED]
        if features.digest is not None:
            file.create_dataset("digest", data=features.digest)
        for name, column in features.table.items():
            number = pd.api.types.is_numeric_dtype(column)
            values = column.to_numpy(float) if number else column.fillna("").astype(str).to_list()
            kind = "f8" if number else h5py.string_dtype()
            file.create_dataset(f"table/{str(name).replace('/', ' ')}", data=values, dtype=kind)
        about = json.dumps({**features.about, "tool": f"histoldm {tool_version()}"}, default=str)
        file.attrs["histoldm"] = about
        file.attrs["sha256"] = _checksum(file, about)


def _checksum(file: h5py.File, about: str) -> str:
    """SHA-256 of what a feature file holds."""
    digest = hashlib.sha256(about.encode())
    for name in ("features", "digest"):
        values = file.get(name, ())
        for start in range(0, len(values), COPIED):
            digest.update(np.ascontiguousarray(values[start : start + COPIED]).tobytes())
    for name, column in sorted(file.get("table", {}).items()):
        text = h5py.check_string_dtype(column.dtype)
        digest.update(name.encode() + (b"\0".join(column[:]) if text else column[:].tobytes()))
    return digest.hexdigest()


def _read_about(path: Path) -> dict[str, Any]:
    """What a feature file says of itself; nothing, if it was not written here."""
    with open_h5(path, AGAIN) as file:
        told = json.loads(file.attrs["histoldm"]) if "histoldm" in file.attrs else {}
    check_shape(told, {"data?": MAPPING}, path, "histoldm")
    return told


def read_feature_file(path: Path) -> FeatureSet:
    """A feature file, or features of any kind that `ldm.data.features` reads, of which nothing more is known.

    >>> np.save("features.npy", np.zeros((5, 8), np.float32))
    >>> read_feature_file(Path("features.npy")).values.shape
    (5, 8)
    """
    about = _read_about(path) if path.suffix in (".h5", ".hdf5") and path.is_file() else {}
    if not about:
        values = read_features(path).values
        values = values.reshape(-1, values.shape[-1])
        values = values[~np.isnan(values).any(1)]
        table = pd.DataFrame({"name": [str(i) for i in range(len(values))]})
        data = {"path": path.name, "kind": "features", "count": len(values), "features_sha256": _sha256_of(values)}
        return FeatureSet(values, table, {"data": data, "dim": values.shape[1]})
    with open_h5(path, AGAIN) as file:
        values = values_of(file["features"]).astype(np.float32)
        digest = values_of(file["digest"]) if "digest" in file else None
        columns = {}
        for name, column in file.get("table", {}).items():
            own, text = values_of(column), h5py.check_string_dtype(column.dtype) is not None
            columns[name] = [value.decode() for value in own] if text else own
        if file.attrs.get("sha256", told := _checksum(file, file.attrs["histoldm"])) != told:
            raise OSError("it is not as it was written")
        if "name" not in columns or values.ndim != 2 or any(len(own) != len(values) for own in columns.values()):
            raise OSError("its table is not that of its features")
    table = pd.DataFrame(columns)
    own = table[["name", *[name for name in table if name != "name"]]]
    return FeatureSet(_finite(values, path), own, about, digest)


def _finite(values: np.ndarray, path: Path) -> np.ndarray:
    """The values (N,D). UserError where one is NaN or infinite."""
    wrong = int((~np.isfinite(values).all(1)).sum())
    if wrong:
        raise UserError(f"{wrong} of {len(values)} features of {path} are NaN or infinite; extract them again.")
    return values


def _sha256_of(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


def features_of_stores(path: Path, feature: str, where: Where = None) -> FeatureSet:
    """The features `feature` that the tiles of a store or cohort have already. UserError where they have none.

    >>> features_of_stores(store.path, "uni")
    Traceback (most recent call last):
    ldm.errors.UserError: ...zarr has no features 'uni'. Known: (none). Make them with `python -m ...`.
    """
    stores = {store.slide: store for store in open_cohort(path)}
    arrays = {slide: store.features(feature) for slide, store in stores.items()}
    makers = {attrs.get("weights_sha256"): slide for slide, attrs in ((s, dict(a.attrs)) for s, a in arrays.items())}
    if len(makers) > 1:
        differ = ", ".join(makers.values())
        raise UserError(f"the features '{feature}' of {path} were made by different weights in {differ}.")
    pictures = read_pictures(path, where)
    table = table_of(pictures)
    values = np.empty((len(table), next(iter(arrays.values())).shape[-1]), np.float32)
    for slide, rows in table.groupby("slide").indices.items():
        own = np.asarray(arrays[slide][:], np.float32)
        own = own[:, 0] if own.ndim == 3 else own
        values[rows] = own[table["row"].to_numpy(int)[rows]]
    attrs = dict(next(iter(arrays.values())).attrs)
    data = {
        "path": path.name,
        "kind": "features of stores",
        "count": len(table),
        "mpp": pictures.mpp,
        "where": [*map(str, parse_where(where))],
        "licence": pictures.licence,
        "features_sha256": _sha256_of(values),
        "slides": int(table["slide"].nunique()),
        "patients": int(table["patient"].nunique()),
    }
    if "split" in table:
        data["splits"] = {str(name): int(n) for name, n in table["split"].value_counts().items()}
    about = {"extractor": attrs.get("encoder", feature), "dim": values.shape[1], "data": data}
    about |= {name: attrs[name] for name in ("weights_sha256", "preprocessing", "licence") if name in attrs}
    return FeatureSet(_finite(values, path), table, about)


def check_alike(a: FeatureSet, b: FeatureSet) -> None:
    """UserError unless two sets of features can be compared: of one dimension and, as far as known, one maker.

    >>> table = pd.DataFrame({"name": ["a"]})
    >>> sets = [FeatureSet(np.zeros((1, dim)), table) for dim in (384, 512)]
    >>> check_alike(*sets)
    Traceback (most recent call last):
    ldm.errors.UserError: features has features of dimension 384, features of 512: they are of different extractors; ...
    """
    if a.values.shape[1] != b.values.shape[1]:
        raise UserError(
            f"{a.name} has features of dimension {a.values.shape[1]}, {b.name} of {b.values.shape[1]}: they are of "
            "different extractors; extract both with the same one (--features)."
        )
    for name in SAME:
        own, other = a.about.get(name), b.about.get(name)
        if own is not None and other is not None and own != other:
            raise UserError(
                f"{a.name} and {b.name} hold features of different extractors: {name} is {_short(own)} and "
                f"{_short(other)}; extract both with the same one (--features)."
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:60] + ("..." if len(text) > 60 else "")
