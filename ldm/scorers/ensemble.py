"""Ensembles that score images: those trained here, and the ResNet-34 published with the mitotic-figure DPM.

    scorer = load_scorer("mitosis_scorer", device="cuda")      # a folder that `histoldm train-scorer` wrote
    scorer = load_scorer(["Ensemble_1/model_checkpoint.pt", ...])   # published networks
    scores = scorer(images)                                    # (B,3,H,W) in [-1,1] -> (B,), of classes (B,K)
    each = scorer.members(images)                              # (B,M) or (B,M,K): what each network says

A scorer folder holds config.yaml and a member-<k>.safetensors for each network; nothing in it is executed. Published
weights are on request from the authors of "Characterizing the Features of Mitotic Figures Using a Conditional Diffusion
Probabilistic Model" (DGM4MICCAI 2023).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet34

from ldm.data import dihedral
from ldm.devices import pick_device
from ldm.encoders.timm_networks import make_network
from ldm.errors import UserError
from ldm.files import sha256, whole
from ldm.foreign.modules import as_large_as
from ldm.foreign.paths import inside
from ldm.foreign.settings import read_yaml
from ldm.foreign.shape import ABOVE_0, MAPPING, NUMBER, SIZE, TEXT, Is, check_shape, maybe, one_of, so_many
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.weights import check_finite
from ldm.scorers.labelled import KINDS, Task

UPSAMPLING = 4  # cells of 64 px are seen at 256 px
WHITE = 0.99  # quantile of a cell's values that is set to 1
CONFIG, MEMBER = "config.yaml", "member-{}.safetensors"
_FORM = {
    "scorer": {
        "task": {"kind": one_of(KINDS), "of": TEXT, "classes": [TEXT], "low?": NUMBER, "high?": NUMBER}, "arch": TEXT,
        "members": Is("a whole number from 1 to 100", lambda value: type(value) is int and 1 <= value <= 100),
        "kwargs": maybe(MAPPING), "temperature": ABOVE_0, "offset": [NUMBER], "views": one_of((1, 8)),
    },
    "preprocessing": {
        "size": Is("a whole number from 1 to 8192", lambda value: type(value) is int and 1 <= value <= 8192),
        "mean": so_many(3, NUMBER), "std": so_many(3, ABOVE_0), "tile_size": maybe(SIZE), "mpp": maybe(ABOVE_0),
    },
    "metadata?": maybe(MAPPING),
}  # fmt: skip
FAR = 0.15  # relative difference of extent that images and those of the training may have


@dataclass(frozen=True)
class View:
    """How a network sees an image: resized to size x size px, then (value - mean) / std, values in [0, 1].

    tile_size, mpp: pixels and micrometres per pixel of the images trained on (None: several, or unknown).
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    tile_size: int | None = None
    mpp: float | None = None

    def fit(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1], of which the middle square counts, as (B,3,size,size)."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B,3,H,W) in [-1, 1], got {tuple(images.shape)} {images.dtype}")
        side = min(images.shape[-2:])
        top, left = ((extent - side) // 2 for extent in images.shape[-2:])
        images = images[..., top : top + side, left : left + side].float()
        if side == self.size:
            return images
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1] as the network takes them."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((images + 1) / 2 - mean) / std

    def check_extent(self, side: int, mpp: float | None, source: str) -> None:
        """UserError if images of `side` px at `mpp` show another extent of tissue than those of the training."""
        if not (self.tile_size and self.mpp and mpp):
            return
        own, given = self.tile_size * self.mpp, side * mpp
        if abs(given / own - 1) > FAR:
            fix = f"score their middle by --crop {round(own / mpp)}" if given > own else "cut larger tiles"
            raise UserError(
                f"images of {source} cover {given:.1f} um ({side} px at {mpp:.3g} um/px), those that the scorer was "
                f"trained on {own:.1f} um ({self.tile_size} px at {self.mpp:.3g}); {fix}."
            )


class Scorer(nn.Module):
    """The mean of M networks' calibrated scores.

    Attributes: task (what the score says), name, count (M), about (metadata: data, figures, licence), identity
    (SHA-256 of what it was loaded from).
    """

    task: Task
    name: str
    count: int
    about: dict[str, Any]
    identity: str = ""

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B,) of images (B,3,H,W) in [-1,1]: a probability, or a grade from low to high; of classes (B,K)."""
        return self.members(images).mean(1)

    def members(self, images: Tensor) -> Tensor:
        """What each network says: (B,M), of classes (B,M,K)."""
        raise NotImplementedError

    def check_extent(self, side: int, mpp: float | None, source: str) -> None:
        """UserError if images of `side` px at `mpp` show another extent than those of the training."""


class Ensemble(Scorer):
    """Networks of one timm architecture trained on the same task, each image seen in `views` of its eight orientations.

    temperature, offset: of their calibration, see `ldm.scorers.calibration.fit_temperature`.
    """

    def __init__(
        self, task: Task, view: View, arch: str, count: int, kwargs: Mapping[str, Any] | None = None,
        temperature: float = 1.0, offset: Sequence[float] = (0.0,), views: int = 1, name: str = "",
        about: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.task, self.view, self.arch, self.kwargs, self.views = task, view, arch, dict(kwargs or {}), views
        self.count, self.name, self.about = count, name, dict(about or {})
        self.temperature, self.offset = float(temperature), [float(value) for value in offset]
        self.networks = nn.ModuleList(make_network(arch, task.outputs, kwargs) for _ in range(count))

    def members(self, images: Tensor) -> Tensor:
        seen = self.view.normalise(self.view.fit(images))
        logits = torch.stack([logits_of(network, seen, self.views) for network in self.networks], 1)  # (B,M,outputs)
        scaled = logits / self.temperature + logits.new_tensor(self.offset)
        if self.task.kind == "classes":
            return scaled.softmax(-1)
        scores = scaled[..., 0].sigmoid()
        return self.task.low + scores * (self.task.high - self.task.low) if self.task.kind == "graded" else scores

    def check_extent(self, side: int, mpp: float | None, source: str) -> None:
        self.view.check_extent(side, mpp, source)


def logits_of(network: nn.Module, seen: Tensor, views: int) -> Tensor:
    """(B,outputs): mean over the first `views` of the eight orientations of network inputs (B,3,S,S).

    >>> seen, network = torch.randn(2, 3, 16, 16), scorer.networks[0]
    >>> turned = logits_of(network, seen.rot90(1, (-2, -1)), 8)
    >>> (turned - logits_of(network, seen, 8)).abs().max() < 1e-5                   # whichever way up an image is
    tensor(True)
    """
    return sum(network(dihedral.apply(seen, k)).float() for k in range(views)) / views


def save_scorer(folder: Path | str, scorer: Ensemble, half: bool = False) -> Path:
    """Write a scorer folder: weights first, config.yaml last, so that one with a config is whole.

    half: weights in float16, which `load_scorer` reads back as float32.

    >>> sorted(path.name for path in save_scorer("cells", scorer).iterdir())
    ['config.yaml', 'member-0.safetensors', 'member-1.safetensors']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for k, network in enumerate(scorer.networks):
        state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        if half:
            state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        with whole(folder / MEMBER.format(k)) as part:
            save_file(state, part)
    config = {
        "scorer": {
            "task": scorer.task.as_dict(), "arch": scorer.arch, "kwargs": scorer.kwargs, "members": scorer.count,
            "views": scorer.views, "temperature": scorer.temperature, "offset": scorer.offset,
        },
        "preprocessing": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(scorer.view).items()},
        "metadata": scorer.about,
    }  # fmt: skip
    with whole(folder / CONFIG) as part:
        part.write_text(yaml.safe_dump(config, sort_keys=False, width=120), encoding="utf-8")
    return folder


def load_scorer(source: str | Path | Sequence[str | Path], device: str | torch.device = "cpu") -> Scorer:
    """A scorer, ready to score: a scorer folder, or the ensemble of published networks in a list of checkpoints.

    UserError: no path, a folder that is none, a file that cannot be read or is of another network.

    >>> loaded, images = load_scorer(save_scorer("cells", scorer)), torch.zeros(1, 3, 64, 64)
    >>> torch.equal(loaded(images), scorer(images)), loaded.members(images).shape
    (True, torch.Size([1, 2]))
    """
    if isinstance(source, str | Path) or (len(source) == 1 and Path(source[0]).is_dir()):
        folder = Path(source if isinstance(source, str | Path) else source[0])
        scorer = _of_folder(folder)
        files = [folder / CONFIG, *(folder / MEMBER.format(k) for k in range(scorer.count))]
    elif not source:
        raise UserError(
            "a scorer is a folder that `histoldm train-scorer` wrote, or a list of published checkpoints; got none."
        )
    else:
        scorer, files = _of_checkpoints(source), list(map(Path, source))
    scorer.identity = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    return scorer.to(pick_device(str(device))).eval().requires_grad_(False)


def _of_folder(folder: Path) -> Ensemble:
    if folder.is_file():
        raise UserError(f"{folder} is one file; give a scorer's folder, or all published checkpoints, which are three.")
    if not (folder / CONFIG).is_file():
        state = "is no scorer: it has no config.yaml" if folder.is_dir() else "does not exist"
        raise UserError(f"the scorer {folder} {state}. `histoldm train-scorer --out FOLDER` makes one.")
    config = read_yaml(inside(folder, CONFIG), "the scorer's config")
    check_shape(config, _FORM, f"{folder / CONFIG} does not describe a scorer")
    own, seen = config["scorer"], config["preprocessing"]
    task = Task(**{f.name: own["task"][f.name] for f in fields(Task) if f.name in own["task"]})
    task = replace(task, classes=tuple(task.classes))
    if len(own["offset"]) not in (1, task.outputs):
        raise UserError(f"{folder / CONFIG} has {len(own['offset'])} offsets for {task.outputs} outputs of a network.")
    view = View(**{f.name: tuple(v) if isinstance(v := seen[f.name], list) else v for f in fields(View)})
    paths = [inside(folder, MEMBER.format(k)) for k in range(own["members"])]
    states = [state_dict_of(read_checkpoint(path), path) for path in paths]
    with as_large_as({(k, name): value for k, state in enumerate(states) for name, value in state.items()}, folder):
        scorer = Ensemble(
            task, view, own["arch"], own["members"], own["kwargs"], own["temperature"], own["offset"], own["views"],
            folder.resolve().name, config.get("metadata"),
        )  # fmt: skip
    for network, state, path in zip(scorer.networks, states, paths):
        _fill(network, state, path, f"{scorer.arch} with {task.outputs} outputs")
    return scorer


def _fill(network: nn.Module, state: Mapping[str, Tensor], path: Path | str, what: str) -> None:
    """Give a network its weights. UserError names the first tensor that does not fit."""
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    for name in [*wanted, *state]:
        held = tuple(state[name].shape) if name in state else "missing"
        due = tuple(wanted[name]) if name in wanted else "no such tensor"
        if held != due:
            raise UserError(f"{path} is no {what}: {name} is {held}, expected {due}.")
    check_finite(state, path)
    floats = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    network.load_state_dict(floats, assign=True)


class ResNetEnsemble(Scorer):
    """The mean of `count` published networks' probabilities that a cell is a mitotic figure.

    A cell is enlarged and divided by its own 99th percentile; nothing is clipped, and there is no other normalisation.
    They were trained on cells of 64 px at 0.25 µm per px.
    """

    def __init__(self, count: int = 3):
        super().__init__()
        self.task = Task("binary", "class", ("other", "mitotic figure"))
        self.name, self.count, self.about = "mitotic-figure DPM", count, {"licence": "on request from the authors"}
        self.networks = nn.ModuleList(resnet34(num_classes=1) for _ in range(count))

    def members(self, images: Tensor) -> Tensor:
        return self.logits(images).sigmoid()

    def logits(self, images: Tensor) -> Tensor:
        """What each network says of each cell, (B,count)."""
        cells = self.prepare(images)
        return torch.cat([network(cells) for network in self.networks], dim=1)

    @staticmethod
    def prepare(images: Tensor) -> Tensor:
        """The networks' input (B,3,4H,4W) of images (B,3,H,W) in [-1,1]."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B,3,H,W) in [-1, 1], got {tuple(images.shape)} {images.dtype}")
        cells = F.interpolate((images.float() + 1) / 2, scale_factor=UPSAMPLING, mode="bilinear")
        white = cells.flatten(1).quantile(WHITE, dim=1)
        return cells / white.clamp(min=1e-6).view(-1, 1, 1, 1)


def _of_checkpoints(paths: Sequence[str | Path]) -> ResNetEnsemble:
    with torch.device("meta"):
        scorer = ResNetEnsemble(len(paths))
    for network, path in zip(scorer.networks, paths):
        state = state_dict_of(read_checkpoint(path), path)
        _fill(network, state, path, "ResNet-34 with one output")
    return scorer
