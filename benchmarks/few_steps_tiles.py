"""Real tiles with the conditions of a model of any kind, and how images follow these: for few_steps.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditioning import block_bootstrap, held_out, margins
from stain_measures import called, tiles_of, train_classifier
from text_prompts import kind_of, real_images
from torch import Tensor

from ldm.data.datasets import TileDataset
from ldm.encoders.encoder import load_encoder
from ldm.errors import UserError
from ldm.images.write import to_uint8
from ldm.metrics.conditional import cosines
from ldm.requests.tiles import evenly
from ldm.scorers.calibration import spearman, with_intervals
from ldm.scorers.ensemble import load_scorer

TAUGHT = 500  # real tiles of each class that the classifier learns from, at most
Follow = Callable[[np.ndarray], list[float]]


@dataclass(frozen=True)
class Tiles:
    """Real tiles: pixels (N,H,W,3) uint8, conditions, N values each, and the group (N,) that each is drawn with.

    measure, follow: how images (S,N,H,W,3) of S seeds follow the conditions: value, low, high; and what it is called.
    """

    pixels: np.ndarray
    conditions: dict[str, Any]
    blocks: np.ndarray
    measure: str
    follow: Follow


def add_options(add: Callable[..., Any]) -> None:
    """The options of a parser that `read_tiles` reads."""
    add("--store", required=True, help="cohort of real tiles with the teacher's conditions")
    add("--split", nargs="+", default=["val"], help="of these splits (default %(default)s)")
    add("--blocks", help="column of what is drawn whole for intervals (default: columns of the slide, a tile wide)")
    add("--feature", default="demo-encoder", help="of models of features: their name (default %(default)s)")
    add("--encoder", default="data/models/demo-encoder", help="that made them (default %(default)s)")
    add("--scorer", type=Path, default=Path("data/models/demo-mitosis-scorers"), help="of models of a score: folder")
    add("--classifier-steps", type=int, default=400, help="of models of classes or captions (default %(default)s)")
    add("--count", type=int, default=96, help="conditions (default %(default)s)")


def read_tiles(options: argparse.Namespace, teacher: torch.nn.Module, metadata: dict[str, Any]) -> Tiles:
    """Tiles of a cohort under the conditions of `teacher`, whose folder has the metadata."""
    keys = {about.kind: key for key, about in teacher.cond_stage_model.describe().items()}  # kind -> condition
    about = metadata.get("conditions", {})
    sources = {key: about.get(key, {}).get("source", key) for key in keys.values()}
    if set(keys) == {"features"}:
        return _of_features(options)
    if set(keys) == {"score"}:
        return _of_scores(options, keys["score"], sources)
    if set(keys) == {"class"}:
        return _of_classes(options, keys["class"], sources)
    if set(keys) == {"text", "modality"}:
        return _of_captions(options, keys["text"], keys["modality"], sources)
    raise UserError(
        "measured are models of features, a score, a class, and text with a modality; the teacher's conditions "
        f"are {', '.join(keys.values())}."
    )


def _read(options: argparse.Namespace, sources: dict[str, str]) -> TileDataset:
    more = {"block": options.blocks} if options.blocks else {}
    keys, feature = (["image"], None) if sources else (["image", "ssl"], options.feature)
    return TileDataset(options.store, keys, feature, where={"split": options.split}, conditions={**sources, **more})


def _pixels(items: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(N,H,W,3) uint8, and the group (N,) of each tile."""
    pixels = to_uint8(torch.stack([item["image"] for item in items]))
    columns = [f"{item['slide']}:{int(item['coord'][0]) // pixels.shape[1]}" for item in items]
    return pixels, np.array([str(item.get("block", column)) for item, column in zip(items, columns)])


def _signed(pixels: np.ndarray) -> Tensor:
    """(N,3,H,W) in [-1,1] of (...,H,W,3) uint8."""
    return torch.from_numpy(pixels.reshape(-1, *pixels.shape[-3:])).movedim(-1, 1).float() / 127.5 - 1


@torch.no_grad()
def _in_parts(network: Callable[[Tensor], Tensor], images: np.ndarray) -> np.ndarray:
    """What a network gives (S,N,...) of images (S,N,H,W,3)."""
    found = np.concatenate([network(part).numpy() for part in _signed(images).split(16)])
    return found.reshape(*images.shape[:2], *found.shape[1:])


def _mean(values: np.ndarray, blocks: np.ndarray) -> list[float]:
    """The mean of values (S,N), and its interval over draws of groups (N,)."""
    return [float(values.mean()), *block_bootstrap(values.mean(0), blocks)]


def _of_features(options: argparse.Namespace) -> Tiles:
    items = held_out(_read(options, {}), options.count)
    pixels, blocks = _pixels(items)
    features, encoder = torch.stack([item["ssl"] for item in items]), load_encoder(options.encoder)
    given = features.numpy().reshape(len(items), -1)

    def follow(images: np.ndarray) -> list[float]:
        return _mean(np.stack([margins(cosines(each, given)) for each in _in_parts(encoder, images)]), blocks)

    return Tiles(pixels, {"features": features}, blocks, "margin", follow)


def _of_scores(options: argparse.Namespace, key: str, sources: dict[str, str]) -> Tiles:
    items = held_out(_read(options, sources), options.count)
    pixels, blocks = _pixels(items)
    asked, scorer = np.array([float(item[key]) for item in items]), load_scorer(options.scorer)

    def follow(images: np.ndarray) -> list[float]:
        scores = _in_parts(scorer, images).ravel()
        wanted, groups = (np.tile(each, len(images)) for each in (asked, blocks))
        return with_intervals(lambda rows: {"": spearman(wanted[rows], scores[rows])}, groups)[""]

    return Tiles(pixels, {key: asked}, blocks, "spearman", follow)


def _of_classes(options: argparse.Namespace, key: str, sources: dict[str, str]) -> Tiles:
    data = _read(options, sources)
    names = data.values(key)
    real = {name: tiles_of(options.store, sources[key], name, "train", TAUGHT) for name in np.unique(names)}
    return _called(options, data, names, real, [key])


def _of_captions(options: argparse.Namespace, key: str, modality: str, sources: dict[str, str]) -> Tiles:
    data = _read(options, sources)
    names = np.array([kind_of(*each) for each in zip(data.values(modality), data.values(key))])
    found = {kind: torch.cat(list(each.values())) for kind, each in real_images(options.store, "train").items()}
    real = {kind: images[evenly(len(images), TAUGHT)] for kind, images in found.items()}
    return _called(options, data, names, real, [key, modality])


def _called(
    options: argparse.Namespace, data: TileDataset, names: np.ndarray, real: dict[str, Tensor], keys: Sequence[str]
) -> Tiles:
    """Tiles of classes `names` (len(data),), every one of `real` equally often."""
    groups = [np.flatnonzero(names == name) for name in real]
    rows = np.concatenate([rows[evenly(len(rows), options.count // len(real))] for rows in groups])
    items = [data[int(i)] for i in rows]
    pixels, blocks = _pixels(items)
    classifier = train_classifier(real, options.classifier_steps)

    def follow(images: np.ndarray) -> list[float]:
        hits = np.empty(images.shape[:2])
        for k, name in enumerate(real):
            own = names[rows] == name
            hits[:, own] = called(classifier, _signed(images[:, own]), k).reshape(len(images), -1)
        return _mean(hits, blocks)

    return Tiles(pixels, {key: [item[key] for item in items] for key in keys}, blocks, "called", follow)
