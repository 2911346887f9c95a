"""Training of an ensemble that scores images: balanced, split by patient, stopped early, calibrated, resumable.

A part of the groups is held out as the test. The rest is cut into as many folds as there are members; each member
learns from all folds but its own, which is its validation. The weights of its best epoch are kept. What the members say
of their validation folds gives the temperature (Guo et al. 2017) and the offset that undoes the balanced sampling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ldm.encoders.timm_networks import make_network
from ldm.errors import UserError
from ldm.files import CARD, names_in, owns, remove, tool_version, whole, write_text
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.weights import check_finite
from ldm.rng import fold, generator
from ldm.scorers.calibration import calibrated, fit_temperature, measures, with_intervals
from ldm.scorers.data import augmented, balanced_order, identity, prepared, to_range, view_of
from ldm.scorers.ensemble import CONFIG, MEMBER, Ensemble, View, load_scorer, logits_of, save_scorer
from ldm.scorers.labelled import Labelled, check_splits, split_groups
from ldm.scorers.select import places

WORK, TEST_SCORES = ".training", "test_scores.csv"  # folder of an unfinished training; table of a finished one
BEST_OF = {"binary": "auroc", "graded": "spearman", "classes": "auroc"}
WARMUP = 0.1  # of the steps
HEADS = ("fc.", "head.", "classifier.")  # timm's last layers, which given weights need not fit
ALLOWED = {
    "size": ("at least 16 px", lambda r: r.size >= 16),
    "members": ("2 to 20", lambda r: 2 <= r.members <= 20),
    "test": ("from 0 to 0.9", lambda r: 0 <= r.test <= 0.9),
    "epochs": ("at least 1", lambda r: r.epochs >= 1),
    "patience": ("at least 1", lambda r: r.patience >= 1),
    "batch_size": ("at least 2", lambda r: r.batch_size >= 2),
    "learning_rate": ("above 0", lambda r: r.learning_rate > 0),
    "colour": ("from 0 to 1", lambda r: 0 <= r.colour <= 1),
    "shift": ("from 0 to below half the size", lambda r: 0 <= r.shift < r.size // 2),
    "views": ("1 or 8", lambda r: r.views in (1, 8)),
}


@dataclass(frozen=True)
class Recipe:
    """How an ensemble is trained. Everything here, with the data, decides every weight.

    Attributes:
        arch, kwargs: the timm network. weights: a local file to begin with.
        size: px along a side that the network sees.
        members: networks. test: fraction of the groups that is held out.
        epochs: at most; patience: epochs without a better validation figure after which a member stops.
        colour: strength of random changes of the channels' optical density; shift: largest random shift, px.
        views: orientations that a score is averaged over, 1 or 8.
    """

    arch: str = "resnet10t"
    kwargs: dict[str, Any] | None = None
    weights: str | None = None
    size: int = 64
    members: int = 4
    test: float = 0.2
    epochs: int = 40
    patience: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    colour: float = 0.1
    shift: int = 4
    views: int = 1
    seed: int = 0

    def __post_init__(self):
        for name, (allowed, fine) in ALLOWED.items():
            if not fine(self):
                raise UserError(f"--{name.replace('_', '-')} is {allowed}; got {getattr(self, name)}.")


@dataclass
class Run:
    """A training at work. images: (N,3,S,S) uint8. folds: (N,) int, the member that an image validates, -1: test."""

    data: Labelled
    recipe: Recipe
    images: np.ndarray
    folds: np.ndarray
    view: View
    out: Path
    device: str
    bf16: bool
    progress: bool

    @property
    def kind(self) -> str:
        return self.data.task.kind

    def logits(self, network: nn.Module, rows: np.ndarray, quick: bool = False) -> np.ndarray:
        """Logits of images at `rows`: (n,), of classes (n,K). quick: one orientation, the training's precision."""
        views, bf16 = (1, self.bf16) if quick else (self.recipe.views, False)
        found = network_logits(network, self.images[np.asarray(rows)], self.view, views, self.device, bf16)
        return found if self.kind == "classes" else found[:, 0]


@owns()
def train_scorer(
    data: Labelled, out: Path | str, recipe: Recipe, device: str = "cpu", bf16: bool = False,
    test: np.ndarray | None = None, licence: str = "", progress: bool = True, half: bool = False,
) -> Ensemble:  # fmt: skip
    """Train an ensemble and write it as the scorer folder `out`; go on where a stopped run of the same settings was.

    test: (N,) bool, the images to hold out in place of a random part of the groups. bf16: of the networks' arithmetic.
    half: keep weights in float16; the figures of the test are of these.
    Returns the scorer, ready to score.
    UserError: too few groups or classes, an image that cannot be read, `out` holding something else.

    >>> some = labelled.take(np.arange(4, 44))
    >>> tiny = {"channels": [8, 8, 16, 16], "stem_width": 8}
    >>> scorer = train_scorer(some, "cells", Recipe(kwargs=tiny, size=16, members=2, epochs=1), progress=False)
    >>> scorer(torch.zeros(3, 3, 16, 16)).shape, sorted(scorer.about["figures"])
    (torch.Size([3]), ['test', 'validation'])
    """
    out = Path(out)
    folds = folds_of(data, recipe, test)
    make_network(recipe.arch, 1, recipe.kwargs)  # a mistake in it shows before any work
    known = (WORK, TEST_SCORES, CONFIG, CARD)
    strange = [name for name in names_in(out) if name not in known and not fnmatch(name, MEMBER.format("*"))]
    if strange:
        raise UserError(f"{out} holds other files ({strange[0]}, ...); give an --out that is empty or new.")
    images, sides = prepared(data.pictures, recipe.size, out / WORK, progress)
    words = (f"{t:.6f} {g} {f}" for t, g, f in zip(data.targets, data.groups, folds))
    settings = {
        "recipe": asdict(recipe), "task": data.task.as_dict(), "bf16": bf16, "half": half, "version": tool_version(),
        "data_sha256": identity(images, words),
    }  # fmt: skip
    if (out / CONFIG).is_file():
        return _finished(out, settings, device)
    _begin(out, settings)
    view = view_of(data.pictures, images, np.flatnonzero(folds >= 0), sides)
    run = Run(data, recipe, images, folds, view, out, device, bf16, progress)
    held_out = np.concatenate([_member(run, member) for member in range(recipe.members)])
    rows = np.concatenate([np.flatnonzero(folds == k) for k in range(recipe.members)])
    temperature, offset = fit_temperature(run.kind, held_out, data.targets[rows])
    scorer = Ensemble(
        data.task, view, recipe.arch, recipe.members, recipe.kwargs, round(temperature, 5),
        [round(v, 5) for v in offset], recipe.views, out.resolve().name,
    )  # fmt: skip
    for k, network in enumerate(scorer.networks):
        _read_weights(network, out / MEMBER.format(k))
    if half:
        scorer.half().float()  # as it will be read back
    scorer.to(device).eval()
    own = calibrated(run.kind, held_out, scorer.temperature, scorer.offset)
    scorer.about = _about(run, scorer, _measured(data, rows, own), settings, licence)
    save_scorer(out, scorer, half)
    remove(out / WORK)
    return load_scorer(out, device)


def folds_of(data: Labelled, recipe: Recipe, test: np.ndarray | None = None) -> np.ndarray:
    """(N,) int: the member that each image validates, -1 for the test. UserError if a part would hold one class.

    >>> np.bincount(folds_of(labelled, Recipe(members=4)) + 1)                      # the test, four folds
    array([10, 10, 10, 10,  8])
    """
    if test is None:
        parts = (1 - recipe.test, recipe.test)
        test = split_groups(data.strata, data.groups, parts, fold(recipe.seed, 1)) == 1
    rest, count = np.flatnonzero(~test), recipe.members
    folds = np.full(len(data), -1)
    folds[rest] = split_groups(data.strata[rest], data.groups[rest], [1 / count] * count, fold(recipe.seed, 2))
    check_splits(data, folds, count, f"{count} folds")
    if test.any():
        check_splits(data, test.astype(int), 2, "a training and a test part")
    return folds


def _finished(out: Path, settings: dict[str, Any], device: str) -> Ensemble:
    scorer = load_scorer(out, device)
    remove(out / WORK)
    _check_same(scorer.about.get("training", {}), settings, f"{out} holds a scorer of", "give another --out")
    return scorer


def _begin(out: Path, settings: dict[str, Any]) -> None:
    path = out / WORK / "settings.json"
    if path.is_file():
        todo = "repeat its command to finish it, or give another --out"
        _check_same(json.loads(path.read_text()), settings, f"{out} holds an unfinished training of", todo)
    write_text(path, json.dumps(settings))


def _check_same(before: dict[str, Any], now: dict[str, Any], what: str, todo: str) -> None:
    before, now = {"half": False, **before}, json.loads(json.dumps(now))
    differ = sorted(name for name in now if before.get(name) != now[name])
    if "recipe" in differ and isinstance(before.get("recipe"), dict):
        own = {key for key, value in now["recipe"].items() if before["recipe"].get(key) != value}
        differ = [*sorted(own), *(name for name in differ if name not in ("recipe", "data_sha256"))]
    if differ:
        raise UserError(f"{what} other settings ({', '.join(differ)} differ); {todo}.")


def _member(run: Run, member: int) -> np.ndarray:
    """Train one network. Its best weights become MEMBER in `out`; returns its logits of its validation fold."""
    recipe, work = run.recipe, run.out / WORK
    result, state_path, best_path = work / f"validation-{member}.npy", work / "state.pt", MEMBER.format(member)
    if result.is_file():
        return np.load(result)
    train, validation = np.flatnonzero((run.folds >= 0) & (run.folds != member)), np.flatnonzero(run.folds == member)
    torch.manual_seed(fold(recipe.seed, member, 3))
    network = make_network(recipe.arch, run.data.task.outputs, recipe.kwargs)
    if recipe.weights:
        begin_with(network, recipe.weights)
    network = network.to(run.device)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = _warm_cosine(optimizer, -(-len(train) // recipe.batch_size) * recipe.epochs)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    now: dict[str, Any] = {"member": member, "epoch": 0, "best": float("-inf"), "best_epoch": 0, "history": []}
    if state_path.is_file() and (held := _state(state_path))["now"]["member"] == member:
        now = held["now"]
        for name, part in parts.items():
            part.load_state_dict(held[name])
    name, words = BEST_OF[run.kind], f"member {member + 1}/{recipe.members}"
    with tqdm(total=recipe.epochs, initial=now["epoch"], desc=words, unit="epoch", disable=not run.progress) as bar:
        while now["epoch"] < recipe.epochs and now["epoch"] - now["best_epoch"] < recipe.patience:
            epoch = now["epoch"] = now["epoch"] + 1
            loss = _epoch(run, network, optimizer, schedule, train, (member, epoch))
            scores = calibrated(run.kind, run.logits(network, validation, quick=True), 1.0, [0.0])
            measured = float(measures(run.kind, scores, run.data.targets[validation])[name])
            now["history"].append([round(loss, 5), round(measured, 5)])
            if measured > now["best"]:
                now |= {"best": measured, "best_epoch": epoch}
                _save_weights(run.out / best_path, network)
            with whole(state_path) as file:
                torch.save({key: part.state_dict() for key, part in parts.items()} | {"now": now}, file)
            bar.set_postfix({"loss": f"{loss:.3f}", name: f"{measured:.3f}", "best": f"{now['best']:.3f}"})
            bar.update()
    if not np.isfinite(now["best"]):
        raise UserError(f"{words} never told its validation images apart; label more images of each kind.")
    _read_weights(network, run.out / best_path)
    logits = run.logits(network, validation)
    write_text(work / f"history-{member}.json", json.dumps(now))
    with whole(result) as file, file.open("wb") as stream:
        np.save(stream, logits)
    return logits


def _warm_cosine(optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear rise over the first WARMUP of `total` steps, then half a cosine to 0."""
    warm = max(1, int(total * WARMUP))

    def factor(step: int) -> float:
        return min(
            (step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warm) / max(1, total - warm))))
        )

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _epoch(
    run: Run,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    train: np.ndarray,
    where: tuple[int, int],
) -> float:
    """One epoch in which every class, or bin of grades, is shown equally often; the mean loss."""
    recipe, losses = run.recipe, []
    network.train()
    order = balanced_order(run.data.strata[train], fold(recipe.seed, *where, 4))
    for step, start in enumerate(range(0, len(order), recipe.batch_size)):
        rows = np.sort(train[order[start : start + recipe.batch_size]])
        if len(rows) < 2:  # batch normalisation needs two
            continue
        seen = augmented(
            to_range(run.images[rows]), recipe.colour, recipe.shift, generator(recipe.seed, *where, step, 5)
        )
        targets = torch.from_numpy(run.data.targets[rows]).to(run.device)
        with torch.autocast(torch.device(run.device).type, torch.bfloat16, enabled=run.bf16):
            logits = network(run.view.normalise(seen).to(run.device))
        loss = _loss_of(run.kind, logits.float(), targets)
        if not loss.isfinite():
            raise UserError(
                f"the loss became NaN or infinite in epoch {where[1]}; train with a lower --learning-rate and another "
                "--out, in fp32 if this was bf16, and look at the images."
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def _loss_of(kind: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits (B,outputs) for targets (B,), grades being probabilities."""
    if kind == "classes":
        return F.cross_entropy(logits, targets.long())
    return F.binary_cross_entropy_with_logits(logits[:, 0], targets.float())


@torch.no_grad()
def network_logits(
    network: nn.Module, images: np.ndarray, view: View, views: int, device: str, bf16: bool = False
) -> np.ndarray:
    """Logits (n,outputs) of images (n,3,S,S) uint8.

    >>> network_logits(scorer.networks[0], np.zeros((5, 3, 16, 16), np.uint8), scorer.view, 1, "cpu").shape
    (5, 1)
    """
    network.eval()
    found = []
    for start in range(0, len(images), 128):
        seen = view.normalise(to_range(images[start : start + 128]).to(device))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            found.append(logits_of(network, seen, views).cpu().numpy())
    return np.concatenate(found)


def begin_with(network: nn.Module, path: str | Path) -> None:
    """Give a network the weights of a local file; its last layer may differ. UserError where others do not fit.

    >>> network, other = make_network("resnet10t", 1), make_network("resnet10t", 1000)
    >>> torch.save(other.state_dict(), "imagenet.pt")
    >>> begin_with(network, "imagenet.pt")
    >>> torch.equal(network.layer1[0].conv1.weight, other.layer1[0].conv1.weight)
    True
    """
    state, wanted = state_dict_of(read_checkpoint(path), path), network.state_dict()
    fits = {name: value for name, value in state.items() if name in wanted and value.shape == wanted[name].shape}
    lost = [name for name in wanted if name not in fits and not name.startswith(HEADS)]
    if lost:
        raise UserError(f"{path} does not fit the network: {len(lost)} tensors are missing or differ, as {lost[0]}.")
    check_finite(fits, path)
    network.load_state_dict({**wanted, **fits})


def _state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged pickle, anything
        raise UserError(
            f"{path} is damaged ({type(error).__name__}); delete it, and its member begins anew."
        ) from error


def _save_weights(path: Path, network: nn.Module) -> None:
    with whole(path) as part:
        save_file({name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}, part)


def _read_weights(network: nn.Module, path: Path) -> None:
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the weights of this training ({error}); use another --out.") from error


def _measured(data: Labelled, rows: Sequence[int], scores: np.ndarray) -> dict[str, Any]:
    """name -> [value, low, high]: figures of scores in [0,1] of the images at `rows`; 95% intervals by group."""
    targets, groups = data.targets[rows], data.groups[rows]
    return with_intervals(lambda part: measures(data.task.kind, scores[part], targets[part]), groups)


def _about(
    run: Run, scorer: Ensemble, validation: dict[str, Any], settings: dict[str, Any], licence: str
) -> dict[str, Any]:
    """Metadata of a scorer; writes what it says of the test images as a table."""
    data, kind, name = run.data, run.kind, BEST_OF[run.kind]
    told, test = {"validation": validation}, np.flatnonzero(run.folds < 0)
    if len(test):
        each = [run.logits(network, test) for network in scorer.networks]
        each = [calibrated(kind, logits, scorer.temperature, scorer.offset) for logits in each]
        mean = np.mean(each, 0)
        singles = [round(measures(kind, scores, data.targets[test])[name], 5) for scores in each]
        told = {"test": _measured(data, test, mean) | {f"{name}_of_members": singles}, **told}
        table = places(data.pictures.take(test)).assign(group=data.groups[test])
        columns = [f"p_{of}" for of in data.task.classes] if kind == "classes" else ["score"]
        table[["target", *columns]] = np.column_stack([data.targets[test], mean.round(6)])
        with whole(run.out / TEST_SCORES) as part:
            table.to_csv(part, index=False)
    histories = [json.loads((run.out / WORK / f"history-{k}.json").read_text()) for k in range(run.recipe.members)]
    return {
        "data": {
            "source": Path(data.pictures.source).name, "label": data.task.of, "images": len(data), "test": len(test),
            "groups": len(set(data.groups)), "counts": data.counts(), "sha256": settings["data_sha256"],
            "licence": data.pictures.licence, "notes": list(data.notes),
        },
        "figures": told, "epochs": [history["epoch"] for history in histories],
        "best_epochs": [history["best_epoch"] for history in histories], "licence": licence,
        "training": json.loads(json.dumps(settings)),
    }  # fmt: skip
