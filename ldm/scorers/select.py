"""Scores of many images, and which of them are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from tqdm import tqdm

from ldm.data.collection import Pictures
from ldm.errors import UserError, some, suggest
from ldm.files import whole
from ldm.scorers.data import digest, to_range
from ldm.scorers.ensemble import Scorer
from ldm.scorers.labelled import Task

CHUNK = 1024  # images whose scores are written at once
DECIMALS = 6


def score_pictures(
    scorer: Scorer, pictures: Pictures, batch_size: int = 64, work: Path | None = None, progress: bool = True
) -> np.ndarray:
    """What each network says of each image: (N,M) or (N,M,K) float32, NaN for images that cannot be read.

    work: a file that holds what a stopped run has scored.
    UserError: images of another extent than the scorer's, none that can be read.

    >>> pictures = labelled.pictures.take([0, 1, 2])
    >>> score_pictures(scorer, pictures, progress=False).shape
    (3, 2)
    """
    names = digest([scorer.identity, *pictures.words()])
    tail = (scorer.count, scorer.task.outputs) if scorer.task.kind == "classes" else (scorer.count,)
    scores, done = np.full((len(pictures), *tail), np.nan, np.float32), 0
    if work is not None and work.is_file():
        with np.load(work) as held:
            if str(held["names"]) == names:
                done = int(held["done"])
                scores[:done] = held["scores"]
    with tqdm(total=len(pictures), initial=done, desc="score", unit="image", disable=not progress) as bar:
        for start in range(done, len(pictures), CHUNK):
            rows = range(start, min(start + CHUNK, len(pictures)))
            _score_rows(scorer, pictures, rows, scores, batch_size, bar)
            if work is not None:
                with whole(work) as part, part.open("wb") as stream:
                    np.savez(stream, scores=scores[: rows.stop], done=rows.stop, names=names)
    if np.isnan(scores).all():
        raise UserError(f"none of the {len(pictures)} images of {pictures.source} can be read.")
    return scores


def _score_rows(
    scorer: Scorer, pictures: Pictures, rows: range, scores: np.ndarray, batch_size: int, bar: tqdm
) -> None:
    device = next(scorer.parameters()).device
    batch: list[tuple[int, np.ndarray]] = []

    def flush() -> None:
        if batch:
            images = rearrange(to_range(np.stack([image for _, image in batch])), "b h w c -> b c h w").to(device)
            with torch.no_grad():
                scores[[i for i, _ in batch]] = scorer.members(images).float().cpu().numpy()
            bar.update(len(batch))
            batch.clear()

    for i in rows:
        try:
            image = pictures.read(i)
        except UserError:
            bar.update()
            continue
        scorer.check_extent(min(image.shape[:2]), pictures.mpp, pictures.source)
        if batch and (batch[0][1].shape != image.shape or len(batch) == batch_size):
            flush()
        batch.append((i, image))
    flush()


def places(pictures: Pictures) -> pd.DataFrame:
    """Which image each row of a table is of: file, or slide and row.

    >>> places(labelled.pictures.take([0, 1]))["file"].tolist()
    ['Atypical/1007.png', 'Atypical/1283.png']
    """
    keys = ["file"] if pictures.about and "file" in pictures.about[0] else ["slide", "row"]
    return pd.DataFrame({key: [own[key] for own in pictures.about] for key in keys})


def score_table(task: Task, scores: np.ndarray, pictures: Pictures) -> pd.DataFrame:
    """Scores (N,M) or (N,M,K) as a table: file or slide and row, label, score, the networks' own, of classes each.

    score is the mean: a probability of the positive class, a grade, or the probability of the label, the likeliest.

    >>> scores = np.array([[0.1, 0.3], [0.8, 0.9]])                                 # of two networks
    >>> score_table(labelled.task, scores, labelled.pictures.take([0, 1]))
                    file     label  score  score_0  score_1
    0  Atypical/1007.png    Normal   0.20      0.1      0.3
    1  Atypical/1283.png  Atypical   0.85      0.8      0.9
    """
    mean = scores.mean(1)
    table = places(pictures)
    known = ~np.isnan(mean.reshape(len(mean), -1)).any(1)
    if task.kind == "classes":
        best = np.where(np.isnan(mean), -1, mean).argmax(1)
        table["label"] = [task.classes[k] if fine else "" for k, fine in zip(best, known)]
        table["score"] = mean[np.arange(len(best)), best].round(DECIMALS)
        each = scores[np.arange(len(best)), :, best]
    else:
        if task.kind == "binary":
            labels = [task.classes[int(value >= 0.5)] if fine else "" for value, fine in zip(mean, known)]
            table["label"] = labels
        table["score"], each = mean.round(DECIMALS), scores
    for k in range(each.shape[1]):
        table[f"score_{k}"] = each[:, k].round(DECIMALS)
    for k, name in enumerate(task.classes if task.kind == "classes" else ()):
        table[f"p_{name}"] = mean[:, k].round(DECIMALS)
    return table


def merit(
    task: Task, mean: np.ndarray, pictures: Pictures, class_name: str | None = None, matches: str | None = None
) -> np.ndarray:
    """(N,) what images are kept by, larger is better, of their mean scores (N,) or (N,K).

    class_name: the probability of that class. matches: a column of the images' list; of a class, the probability of
    the class it names; of a grade, 1 - |score - value| / (high - low), so 1 where the score is what the column says.

    >>> pictures = labelled.pictures.take([0, 1])
    >>> merit(labelled.task, np.array([0.2, 0.9]), pictures, "Normal", None)
    array([0.8, 0.1])
    """
    if class_name is not None and matches is not None:
        raise UserError("--class and --matches exclude each other; give one.")
    if task.kind == "graded":
        if class_name is not None:
            raise UserError(f"the scorer tells a grade from {task.low:g} to {task.high:g}; it has no --class.")
        if matches is None:
            return mean
        values = pd.to_numeric(pd.Series(pictures.column(matches)), errors="coerce").to_numpy(float)
        if np.isnan(values).any():
            first = pictures.name(int(np.isnan(values).argmax()))
            raise UserError(f"--matches takes a column of numbers; '{matches}' has none for {first}.")
        return 1 - np.abs(mean - values) / (task.high - task.low)
    each = np.stack([1 - mean, mean], 1) if task.kind == "binary" else mean  # (N,K)
    if matches is not None:
        names = [f"{v:g}" if isinstance(v, (int, float)) else str(v) for v in pictures.column(matches)]
        if unknown := sorted(set(names) - set(task.classes)):
            known = suggest(unknown[0], task.classes)
            raise UserError(f"--matches takes a column of the scorer's classes; '{matches}' has '{unknown[0]}'{known}")
        return each[np.arange(len(each)), [task.classes.index(name) for name in names]]
    if class_name is None:
        if task.kind == "classes":
            raise UserError(f"say which class to keep: --class{suggest('', task.classes)} Or give --matches COLUMN.")
        return mean
    if class_name not in task.classes:
        raise UserError(f"the scorer has no class '{class_name}'{suggest(class_name, task.classes)}")
    return each[:, task.classes.index(class_name)]


def chosen(
    values: np.ndarray, above: Mapping[str, float], top: float | None, by: Sequence[Any] | None, source: str
) -> np.ndarray:
    """(N,) bool: which images are kept, of what they are kept by (N,), NaN is never.

    above: least value, under "" of all, else of a value of `by`. top: the best fraction, of each value of `by` (N,).
    UserError: nothing passes, a value of `by` without a threshold.

    >>> chosen(np.array([0.1, 0.8, 0.9, np.nan]), {}, 0.5, None, "tiles")
    array([False,  True,  True, False])
    """
    if bool(above) == (top is not None):
        raise UserError("give either a least score, --above, or a best fraction, --top.")
    if top is not None and not 0 < top <= 1:
        raise UserError(f"--top is a fraction above 0 and up to 1; got {top:g}.")
    kinds = np.array([""] * len(values) if by is None else [str(value) for value in by], dtype=object)
    if unknown := sorted(set(above) - set(kinds) - {""}):
        known = suggest(unknown[0], set(kinds)) if by is not None else "; name the column of its values with --by."
        raise UserError(f"--above {unknown[0]}=...: no image is of '{unknown[0]}'{known}")
    keep = np.zeros(len(values), bool)
    for kind in sorted(set(kinds)):
        rows = np.flatnonzero((kinds == kind) & ~np.isnan(values))
        if top is not None:
            count = math.ceil(round(top * len(rows), 9))
            keep[rows[np.argsort(-values[rows], kind="stable")[:count]]] = True
        elif (least := above.get(kind, above.get(""))) is None:
            raise UserError(f"no least score is given for '{kind}'; --above {kind}=0.5, or --above 0.5 for all others.")
        else:
            keep[rows[values[rows] >= least]] = True
    if not keep.any():
        best = np.nanmax(values)
        raise UserError(
            f"none of the {len(values)} images of {source} passes: asked for {_asked(above)}, the best has {best:.4g}, "
            f"the median is {np.nanmedian(values):.4g}. Lower --above, or keep the best tenth by --top 0.1."
        )
    return keep


def _asked(above: Mapping[str, float]) -> str:
    return some([f"{name}={value:g}" if name else f"{value:g}" for name, value in above.items()])
