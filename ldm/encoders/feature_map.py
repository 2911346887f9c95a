"""Rectified flow between two spaces of features: what a tile's features would be in another stain.

The flow (arXiv:2209.03003) is a small MLP v(x, t) with x_t = (1-t)*x0 + t*x1, trained on pairs (x0, x1), the same place
seen twice, or, where there are none, on random pairs, which minibatch optimal transport (arXiv:2302.00482) sorts into
near ones. It is saved as a folder: `model.safetensors`, and `config.yaml` with the spaces' means and scales.

    transport = fit_transport(he_features, ihc_features, paired=False)
    mapped = transport.map(he_features)                                         # (N,D1)

That of PixCell's virtual staining (arXiv:2506.05127), converted by `histoldm convert`, is another MLP: `StainingFlow`.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

from ldm.errors import UserError
from ldm.files import whole
from ldm.foreign.modules import as_large_as
from ldm.foreign.paths import inside
from ldm.foreign.settings import read_yaml
from ldm.foreign.shape import MAPPING, SIZE, TEXT, check_shape, maybe
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.weights import check_finite
from ldm.rng import generator

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
CONVERTED = "ldm.encoders.feature_map.StainingFlow"  # of a published map's folder
LEAST = 16  # features of each side


class FeatureFlow(nn.Module):
    """A velocity (B,target_dim) at x (B,target_dim) and time t (B,) from 0 to 1, along which features are mapped."""

    steps = 20  # that `map` takes by default
    metadata: dict[str, Any]

    def __init__(self, dim: int, target_dim: int):
        super().__init__()
        self.dim, self.target_dim = dim, target_dim
        self.metadata = {}

    def start(self, features: Tensor) -> Tensor:
        """Where the flow begins from features (N,dim)."""
        return features

    def end(self, x: Tensor) -> Tensor:
        """Features (N,target_dim) of where it ends."""
        return x

    def step(self, x: Tensor, t: float, length: float) -> Tensor:
        """x a step further; Euler's."""
        return x + length * self(x, torch.full((len(x),), t).to(x))

    @torch.no_grad()
    def map(self, features: Tensor, steps: int | None = None) -> Tensor:
        """Features (N,dim) of the source space as features (N,target_dim) of the target's, on the CPU."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(f"the map takes features (N, {self.dim}); got {tuple(features.shape)}.")
        steps = self.steps if steps is None else steps
        x = self.start(features.float().to(next(self.parameters())))
        for i in range(steps):
            x = self.step(x, i / steps, 1 / steps)
        return self.end(x).cpu()


class Transport(FeatureFlow):
    """Maps features (N,dim) to (N,target_dim), along the flow of a time-dependent MLP over standardised features.

    Spaces of different size are joined by a linear map, `bridge`, which is fitted to pairs.
    """

    def __init__(self, dim: int, target_dim: int, width: int = 512, depth: int = 3):
        super().__init__(dim, target_dim)
        self.width, self.depth = width, depth
        for name, size in (("source", dim), ("target", target_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.register_buffer("bridge", torch.eye(dim, target_dim))
        self.register_buffer("frequencies", 2.0 ** torch.arange(6) * torch.pi)
        sizes = [target_dim + 2 * len(self.frequencies), *[width] * depth]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, target_dim))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity (B,target_dim) at x (B,target_dim) and time t (B,)."""
        angles = t[:, None] * self.frequencies
        return self.net(torch.cat([x, angles.sin(), angles.cos()], 1))

    def start(self, features: Tensor) -> Tensor:
        """Standardised features where the flow begins."""
        return ((features - self.source_mean) / self.source_std) @ self.bridge

    def end(self, x: Tensor) -> Tensor:
        """Features of standardised ones."""
        return x * self.target_std + self.target_mean

    def step(self, x: Tensor, t: float, length: float) -> Tensor:
        """The midpoint's."""
        middle = super().step(x, t, length / 2)
        return x + length * self(middle, torch.full((len(x),), t + length / 2).to(x))


class StainingFlow(FeatureFlow):
    """The flow from H&E to IHC features of PixCell's virtual staining, with its names of weights: residual blocks that
    the time shifts, over features as they are.

    >>> StainingFlow(8, width=16, bottleneck=12, time_dim=24, depth=2).map(torch.zeros(1, 8)).shape
    torch.Size([1, 8])
    """

    steps = 10

    def __init__(self, dim: int, width: int, bottleneck: int, time_dim: int, depth: int):
        super().__init__(dim, dim)
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.input_proj = nn.Linear(dim, width)
        self.res_blocks = nn.ModuleList(StainingBlock(width, bottleneck, time_dim) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.SiLU(), nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rates = 10000.0 ** (-torch.arange(self.width // 2, device=x.device) / (self.width // 2))
        angles = 999 * t[:, None] * rates
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))                  # (B,time_dim)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, time)
        return self.out(x)


class StainingBlock(nn.Module):
    """x (B,width) and an MLP of it, into whose middle the time (B,time_dim) is added."""

    def __init__(self, width: int, bottleneck: int, time_dim: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, bottleneck))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, bottleneck))
        last = nn.Linear(bottleneck, width)
        self.out_layers = nn.Sequential(nn.LayerNorm(bottleneck), nn.SiLU(), nn.Identity(), last)  # 2: a dropout

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.out_layers(self.in_layers(x) + self.emb_layers(time))


def fit_transport(
    source: Tensor,
    target: Tensor,
    paired: bool,
    steps: int = 2000,
    batch_size: int = 128,
    width: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Transport:
    """Train a `Transport` of features source (N,D0) to target (M,D1); paired: row i of both is the same place.

    UserError: too few features, unequal numbers of pairs, spaces of different size without pairs.

    >>> he, ihc = torch.randn(64, 2), torch.randn(64, 2) + 5
    >>> transport = fit_transport(he, ihc, paired=False, steps=5, progress=False)
    >>> bool(((transport.map(he) - 5).mean(0).abs() < 1).all())
    True
    """
    source, target = (values.float().to(device) for values in (source, target))
    for name, values in (("source", source), ("target", target)):
        if values.ndim != 2 or len(values) < LEAST or not values.isfinite().all():
            raise UserError(f"the {name} features are (N, D), finite, {LEAST} at least; got {tuple(values.shape)}.")
    if paired and len(source) != len(target):
        raise UserError(f"pairs are equally many on both sides; got {len(source)} and {len(target)} features.")
    if not paired and source.shape[1] != target.shape[1]:
        raise UserError(
            f"features of {source.shape[1]} and {target.shape[1]} values are of different spaces: that takes pairs."
        )
    torch.manual_seed(seed)
    model = Transport(source.shape[1], target.shape[1], width).to(device)
    for name, values in (("source", source), ("target", target)):
        getattr(model, f"{name}_mean").copy_(values.mean(0))
        getattr(model, f"{name}_std").copy_(values.std(0).clamp(min=1e-6))
    ends = (target - model.target_mean) / model.target_std
    if paired:
        begins = (source - model.source_mean) / model.source_std
        ridge = 1e-1 * len(begins) * torch.eye(begins.shape[1], device=begins.device)
        model.bridge.copy_(torch.linalg.solve(begins.T @ begins + ridge, begins.T @ ends))
    begins = model.start(source)
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rng = generator(seed, 0x666C6F77)
    for _ in tqdm(range(steps), desc="transport", disable=not progress):
        rows = torch.randint(len(begins), (batch_size,), generator=rng).to(begins.device)
        others = rows if paired else torch.randint(len(ends), (batch_size,), generator=rng).to(ends.device)
        a, b = begins[rows], ends[others]
        if not paired:
            b = b[torch.as_tensor(linear_sum_assignment(torch.cdist(a, b).cpu().numpy())[1]).to(b.device)]
        t = torch.rand(batch_size, generator=rng).to(a)
        loss = (model(torch.lerp(a, b, t[:, None]), t) - (b - a)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    if not loss.isfinite():
        raise UserError("the loss of the map became NaN or infinite; lower its learning rate, and look at the features")
    return model.eval().requires_grad_(False)


def save_transport(folder: Path, model: Transport, metadata: dict[str, Any]) -> Path:
    """Write a folder of a map; metadata: encoders, licences, what it was trained on.

    >>> folder = save_transport(Path("map"), Transport(4, 4), {"licence": "MIT"})
    >>> load_transport(folder).metadata
    {'licence': 'MIT'}
    """
    if folder.exists() and not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is there and is no folder of a map; choose another --out.")
    shape = {name: getattr(model, name) for name in ("dim", "target_dim", "width", "depth")}
    with whole(folder) as part:
        part.mkdir(parents=True)
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, part / WEIGHTS)
        (part / CONFIG).write_text(yaml.safe_dump({"transport": shape, "metadata": metadata}), encoding="utf-8")
    return folder


def load_transport(folder: Path) -> FeatureFlow:
    """The map in a folder that `save_transport` wrote, or `histoldm convert` of a published one, with its metadata.

    >>> folder = save_transport(Path("map"), Transport(384, 512), {"licence": "MIT"})
    >>> load_transport(folder).map(torch.zeros(3, 384)).shape
    torch.Size([3, 512])
    """
    found = (folder / CONFIG).is_file()
    config = read_yaml(inside(folder, CONFIG), "the map's config") if found else None
    node = config.get("model") if isinstance(config, dict) else None
    converted = isinstance(node, dict) and node.get("target") == CONVERTED
    if not converted and (not isinstance(config, dict) or "transport" not in config):
        raise UserError(f"{folder} is no map of features; `python -m data_prep.train_feature_map` makes one.")
    kind = StainingFlow if converted else Transport
    sizes = dict.fromkeys(list(inspect.signature(kind).parameters), SIZE)
    form = {"model": {"target": TEXT, "params": sizes}} if converted else {"transport": sizes}
    check_shape(config, {**form, "metadata?": maybe(MAPPING)}, folder / CONFIG)
    given = node["params"] if converted else config["transport"]
    weights = state_dict_of(read_checkpoint(inside(folder, WEIGHTS)), folder / WEIGHTS)
    with torch.device("meta"), as_large_as(weights, folder):
        model = kind(**{name: given[name] for name in sizes})
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{folder / WEIGHTS} is not of the map that {CONFIG} describes: {reason}") from error
    check_finite(weights, folder)
    model.metadata = dict(config.get("metadata") or {})
    return model.eval().requires_grad_(False)
