"""The sets of an evaluation and their features, whatever form they were given in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.data.collection import read_pictures
from ldm.data.image_sets import ImageSet, open_images, table_of
from ldm.data.tile_store import holds_stores, open_cohort
from ldm.data.where import Where
from ldm.encoders.clip import load_clip
from ldm.encoders.encoder import find_encoder
from ldm.encoders.extractors import CLIP, Extractor, load_extractor
from ldm.encoders.feature_files import SUFFIXES, FeatureSet, extract, features_of_stores, read_feature_file
from ldm.encoders.registry import REGISTRY
from ldm.encoders.text_models import find_tower
from ldm.errors import UserError
from ldm.files import sha256

MODELS = Path("data/models")


@dataclass
class Extractors:
    """The extractors that are asked for by name, made when one is needed. weights: name -> file."""

    weights: Mapping[str, Path]
    device: str
    resize: str
    made: dict[str, Extractor] = field(default_factory=dict)

    def get(self, name: str) -> Extractor:
        if name not in self.made:
            self.made[name] = self._load(name)
        return self.made[name]

    def _load(self, name: str) -> Extractor:
        weights = self.weights.get(name)
        if not name.startswith(CLIP):
            return load_extractor(encoder_of(name), weights, self.device, self.resize)
        source = find_tower(name.removeprefix(CLIP), str(weights) if weights else None)
        if source.is_bert:
            raise UserError(f"'{name}' has a BERT as its text tower; CLIP's own towers can be evaluated with.")
        return load_clip(source.name, source.config, source.weights, self.device, source.licence)


def encoder_of(name: str) -> str:
    """An encoder of the repository's data/models by its bare name, else the name itself.

    >>> Path("data/models/demo-encoder").mkdir(parents=True)
    >>> encoder_of("demo-encoder"), encoder_of("inception")
    ('data/models/demo-encoder', 'inception')
    """
    shipped = MODELS / name
    return str(shipped) if name not in REGISTRY and not Path(name).is_dir() and shipped.is_dir() else name


@dataclass
class Source:
    """A set as the user gave it. role: generated, real or train."""

    role: str
    path: Path
    where: Where
    crop: int | None = None
    side: int | None = None

    def __post_init__(self):
        if not self.path.exists():
            raise UserError(f"there is nothing at {self.path}, given by --{self.role}.")
        if self.is_file_of_features and self.where:
            raise UserError(f"a selection of {self.role} images is of a cohort's tiles; {self.path} is a feature file.")

    @property
    def is_file_of_features(self) -> bool:
        return self.path.is_file() and self.path.suffix in SUFFIXES

    @cached_property
    def images(self) -> ImageSet:
        return open_images(self.path, self.where, self.crop, self.side)

    @cached_property
    def has_stores(self) -> bool:
        """Whether this is a tile store or a cohort."""
        return holds_stores(self.path)

    def features(self, name: str, extractors: Extractors, out: Path) -> FeatureSet:
        """The features `name` of the set: of its file, of stores that have them already, or extracted into `out`."""
        if self.is_file_of_features:
            return read_feature_file(self.path)
        stored = self.stored(name, extractors.weights.get(name)) if self.has_stores and self.side is None else None
        if stored is not None:
            return features_of_stores(self.path, stored, self.where)
        extractor = extractors.get(name)
        return extract(self.images, extractor, self.file(extractor, out), desc=f"{self.role}: {extractor.name}")

    def file(self, extractor: Extractor, out: Path) -> Path:
        return out / "features" / f"{self.role}-{extractor.name.replace(':', '-').replace('/', '-')}.h5"

    def stored(self, name: str, weights: Path | None) -> str | None:
        """The name of features in all stores that this extractor made; None where there are none."""
        stores = open_cohort(self.path)
        own = name
        encoder = encoder_of(name)
        if encoder in REGISTRY or Path(encoder).is_dir():
            try:
                spec, path = find_encoder(encoder, weights)
            except UserError:  # the weights are not here: the name has to do
                spec, path = (REGISTRY[encoder], None) if encoder in REGISTRY else (None, None)
            own = spec.name if spec else name
            mark = sha256(path) if path else None
        else:
            mark = None
        for store in stores:
            if own not in store.feature_names:
                return None
            if mark and store.features(own).attrs.get("weights_sha256", mark) != mark:
                return None
        return own


def of_conditions(
    generated: FeatureSet, source: Source, name: str, extractors: Extractors, out: Path
) -> tuple[FeatureSet, np.ndarray] | None:
    """The features of the tiles that generated images were conditioned on, and which images those are.

    None where the list does not name two tiles (slide, row) of that cohort.

    >>> made = FeatureSet(real[:2], pd.DataFrame({"slide": store.slide, "row": [3, 7]}))
    >>> source = Source("conditions", store.path, {})
    >>> tiles, known = of_conditions(made, source, "pixels", Extractors({}, "cpu", "clean"), Path("out"))
    >>> tiles.values.shape, known
    ((2, 3072), array([0, 1]))
    """
    table = generated.table
    if not source.has_stores or not {"slide", "row"} <= set(table):
        return None
    tiles = table_of(read_pictures(source.path))
    place = pd.Series(
        np.arange(len(tiles)), index=pd.MultiIndex.from_arrays([tiles["slide"], tiles["row"].astype(int)])
    )
    asked = pd.MultiIndex.from_arrays([table["slide"].astype(str), table["row"].astype(int)])
    found = place.reindex(asked)
    known = np.flatnonzero(found.notna())
    rows = found.to_numpy()[known].astype(int)
    if len(set(rows)) < 2:
        return None
    whole = Source("conditions", source.path, {})
    stored = whole.stored(name, extractors.weights.get(name))
    if stored is not None:
        return features_of_stores(source.path, stored).take(rows), known
    images = whole.images
    chosen = ImageSet(
        images.pictures.take(rows),
        images.table.iloc[rows].reset_index(drop=True),
        images.about | {"count": len(rows), "rows": rows.tolist()},
        files=images.files,
    )
    extractor = extractors.get(name)
    return extract(chosen, extractor, whole.file(extractor, out), desc=f"conditions: {extractor.name}"), known


def parse_weights(texts: list[str], names: list[str]) -> dict[str, Path]:
    """`name=path`, or a path where one extractor is asked for.

    >>> Path("weights.pt").touch()
    >>> parse_weights(["inception=weights.pt"], ["inception", "clip"])
    {'inception': PosixPath('weights.pt')}
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or name not in names:
            if len(names) != 1:
                raise UserError(f"--weights takes extractor=path where several are asked for; got '{text}'.")
            name, path = names[0], text
        if not Path(path).exists():
            raise UserError(f"there are no weights at {path}, given by --weights.")
        found[name] = Path(path)
    return found
