"""Conditioning on self-supervised (SSL) features of a tile and of the region around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioners.base import About, Conditioner
from ldm.errors import UserError


class PatchEmbedder(Conditioner):
    """One SSL feature vector per tile, projected to one cross-attention token (arXiv:2312.07330, section 3.1).

    Reads batch[key] (B,embed_dim) and gives {"crossattn": (B,1,context_dim)}. The unconditional value is the zero
    vector through the projection, as in the published models; dropout sets a sample to it.

    Args:
        embed_dim: dimension of the encoder's features.
        context_dim: dimension of the token, the UNet's context_dim.
        normalize: L2-normalise features first.
        dropout: probability of dropping the condition of a training sample.
        key: batch key that holds the features.
        noise: noise augmentation while training, see `with_noise`.
    """

    def __init__(
        self, embed_dim: int, context_dim: int = 512, normalize: bool = True, dropout: float = 0.1, key: str = "ssl",
        noise: float = 0.0,
    ):  # fmt: skip
        super().__init__(dropout)
        self.embed_dim, self.context_dim = embed_dim, context_dim
        self.normalize, self.keys, self.noise = normalize, (key,), _checked_noise(noise)
        self.patch_fc = nn.Linear(embed_dim, context_dim)

    def forward(self, batch: Mapping[str, Tensor], drop: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of a batch; samples where drop (B,) is true get the unconditional value."""
        return self.embed(self.features_of(batch, drop))

    def null(self) -> dict[str, Tensor]:
        """The unconditional condition of one sample."""
        return self.embed(self.patch_fc.weight.new_zeros(1, self.embed_dim))

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = values.values()
        return {self.keys[0]: _as_rows(value)}

    def parse(self, key: str, text: str) -> Any:
        raise no_text(key)

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        check_features(self.keys[0], metadata, self.embed_dim, "embed_dim")

    def describe(self) -> dict[str, About]:
        return {self.keys[0]: About("features", dim=self.embed_dim)}

    def embed(self, features: Tensor) -> dict[str, Tensor]:
        """The condition of features (B,embed_dim) as `features_of` gives them."""
        return {"crossattn": self.patch_fc(features)[:, None]}                  # (B,1,context_dim)

    def features_of(self, batch: Mapping[str, Tensor], drop: Tensor | None) -> Tensor:
        """The batch's features (B,embed_dim), checked, normalised if asked for, zero where dropped."""
        features = _checked_features(self._value(batch, self.keys[0]), self.embed_dim).to(self.patch_fc.weight)
        if self.normalize:
            features = F.normalize(features, dim=1)
        if self.training and self.noise:
            features = with_noise(features, self.noise)
        return features if drop is None else features.masked_fill(drop[:, None], 0)


class GridPatchEmbedder(PatchEmbedder):
    """PatchEmbedder for encoders whose feature is pooled over a grid of cells, so that it tells where things lie.

    Beside the token of the whole feature it gives {"concat": (B,map_channels,grid,grid)}, each cell's part projected;
    the network sees that map at its own size, concatenated to its input.

    Args:
        grid: cells along each side; embed_dim is laid out as (embed_dim/grid^2, grid, grid).
        map_channels: channels of the map; the UNet's in_channels are those of the latent and these.
        others: as PatchEmbedder's.
    """

    def __init__(
        self, embed_dim: int, context_dim: int = 512, grid: int = 2, map_channels: int = 8, normalize: bool = False,
        dropout: float = 0.1, key: str = "ssl", noise: float = 0.0,
    ):  # fmt: skip
        super().__init__(embed_dim, context_dim, normalize, dropout, key, noise)
        if embed_dim % grid**2:
            raise UserError(f"a feature of {embed_dim} values has no {grid} x {grid} cells of equal size.")
        self.grid = grid
        self.cell_fc = nn.Linear(embed_dim // grid**2, map_channels)

    def embed(self, features: Tensor) -> dict[str, Tensor]:
        cells = rearrange(features, "b (d row col) -> b row col d", row=self.grid, col=self.grid)
        return {**super().embed(features), "concat": rearrange(self.cell_fc(cells), "b row col c -> b c row col")}


class SSLEmbedder(Conditioner):
    """Features of a tile and of the region around it, two cross-attention tokens (arXiv:2312.07330, BRCA at 20x).

    Reads batch[key] (B,embed_dim) and batch[region_key] (B,region_embed_dim), gives {"crossattn": (B,2,context_dim)}:
    [patch, region]. The unconditional value is zeros through both projections. A batch without regions has zeros for
    them; with `region_dropout` the model learns to do without.

    Args:
        embed_dim, region_embed_dim: dimensions of the two features.
        context_dim: dimension of the tokens, the UNet's context_dim.
        normalize: L2-normalise both features first.
        dropout: probability of dropping both features of a training sample.
        region_dropout: probability of dropping the region of a training sample and not its patch. The published data
            loader drops each by itself with probability 0.1.
        key, region_key: batch keys that hold the features.
        noise: noise augmentation of both while training, see `with_noise`.
    """

    def __init__(
        self, embed_dim: int = 384, region_embed_dim: int = 768, context_dim: int = 512, normalize: bool = True,
        dropout: float = 0.1, region_dropout: float = 0.1, key: str = "ssl", region_key: str = "region",
        noise: float = 0.0,
    ):  # fmt: skip
        super().__init__(dropout)
        if key == region_key:
            raise UserError(f"patch and region are two features; both are to come from '{key}'.")
        if not 0 <= region_dropout <= 1:
            raise UserError(f"region_dropout is a probability in [0, 1]; got {region_dropout}.")
        self.keys, self.dims = (key, region_key), (embed_dim, region_embed_dim)
        self.embed_dim, self.normalize, self.region_dropout = embed_dim, normalize, region_dropout
        self.noise = _checked_noise(noise)
        self.patch_fc = nn.Linear(embed_dim, context_dim)
        self.region_fc = nn.Linear(region_embed_dim, context_dim)

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of a batch; samples where drop (B,) is true get the unconditional value."""
        patch = self._features(self._value(batch, self.keys[0]), self.embed_dim)
        region = batch.get(self.keys[1])
        region = patch.new_zeros(1, self.dims[1]) if region is None else self._features(region, self.dims[1])
        if self.training and self.region_dropout:
            lost = torch.rand(len(patch), 1, device=patch.device) < self.region_dropout
            region = region.expand(len(patch), -1).masked_fill(lost, 0)
        if drop is not None:
            patch, region = patch.masked_fill(drop[:, None], 0), region.masked_fill(drop[:, None], 0)
        return self._tokens(patch, region)

    def null(self) -> dict[str, Tensor]:
        return self._tokens(*(self.patch_fc.weight.new_zeros(1, dim) for dim in self.dims))

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if self.keys[0] not in values:
            raise UserError(f"'{self.keys[1]}' goes with '{self.keys[0]}', the features of the tile; give both.")
        return {key: _as_rows(value) for key, value in values.items()}

    def parse(self, key: str, text: str) -> Any:
        raise no_text(key)

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        for key, dim, name in zip(self.keys, self.dims, ("embed_dim", "region_embed_dim")):
            check_features(key, metadata, dim, name)

    def describe(self) -> dict[str, About]:
        return {key: About("features", dim=d, optional=o) for key, d, o in zip(self.keys, self.dims, (False, True))}

    def _features(self, values: Any, dim: int) -> Tensor:
        features = _checked_features(values, dim).to(self.patch_fc.weight)       # (B,dim)
        if self.normalize:
            features = F.normalize(features, dim=1)
        return with_noise(features, self.noise) if self.training and self.noise else features

    def _tokens(self, patch: Tensor, region: Tensor) -> dict[str, Tensor]:
        tokens = torch.broadcast_tensors(self.patch_fc(patch), self.region_fc(region))
        return {"crossattn": torch.stack(tokens, 1)}                            # (B,2,context_dim)


def with_noise(features: Tensor, noise: float) -> Tensor:
    """features (B,D,...) plus Gaussian noise whose standard deviation is `noise` times their root mean square over D.

    Noise and feature vectors then have lengths of about noise : 1, whatever the encoder's scale; a zero vector stays
    zero. Drawn from torch's global generator, which training seeds at every step.

    >>> noisy = with_noise(torch.ones(100, 384), 0.2)
    >>> round((noisy - 1).std().item(), 1)
    0.2
    """
    scale = features.square().mean(1, keepdim=True).sqrt()
    return features + noise * scale * torch.randn_like(features)


def _checked_noise(noise: float) -> float:
    """`noise` of a conditioner, 0 or more."""
    if not noise >= 0:
        raise UserError(f"noise is relative to the feature's length, 0 or more; got {noise}.")
    return noise


def _as_rows(value: Any) -> Tensor:
    """One feature (D,), or several (N,D), as (N,D) float32. UserError for what is no array of finite numbers."""
    several = isinstance(value, (list, tuple)) and value and hasattr(value[0], "ndim")
    try:
        features = torch.stack([torch.as_tensor(row) for row in value]) if several else torch.as_tensor(value)
        features = features.float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"features are an array of numbers (D,) or (N,D); got {type(value).__name__}.") from error
    if not features.isfinite().all():
        raise UserError("features hold NaN or infinity; make them again.")
    return features[None] if features.ndim == 1 else features


def _checked_features(values: Any, dim: int) -> Tensor:
    """Features (B,dim); UserError for another shape."""
    features = torch.as_tensor(values)
    if features.ndim != 2 or features.shape[1] != dim:
        raise UserError(
            f"the model takes SSL features of dimension {dim}; got an array of shape {tuple(features.shape)}. "
            "Use features of the encoder that the model was trained with."
        )
    return features


def no_text(key: str) -> UserError:
    """The error of features that are given as text on a command line.

    >>> no_text("ssl")
    UserError("'ssl' are features, which no text stands for; give a file of features or a tile store.")
    """
    return UserError(f"'{key}' are features, which no text stands for; give a file of features or a tile store.")


def check_features(key: str, metadata: Mapping[str, Any], dim: int, param: str, grids: bool = False) -> None:
    """UserError if the features that a dataset gives as `key` are known to have another dimension than `dim`, or to be
    maps of patch tokens where the conditioner takes no `grids`.

    >>> check_features("ssl", {"encoder": {"encoder": "gigapath", "dim": 1536}}, 384, "embed_dim")
    Traceback (most recent call last):
        ...
    ldm.errors.UserError: the data's 'ssl' are features of encoder 'gigapath' with 1536 values, ...
    """
    about = metadata.get("conditions", {}).get(key)
    if about is None:
        about = metadata.get("encoder", {}) if key == "ssl" else {}
    shape = about.get("shape") or [about.get("dim")]
    if (side := about.get("tokens")) and not grids:
        raise UserError(
            f"the data's '{key}' are {side} x {side} patch tokens of encoder '{about.get('encoder', 'unknown')}': "
            "ldm.conditioners.grid.GridTokens takes them; this conditioner takes one feature of each tile."
        )
    if shape[0] is not None and shape[0] != dim:
        raise UserError(
            f"the data's '{key}' are features of encoder '{about.get('encoder', 'unknown')}' with {shape[0]} values, "
            f"but the conditioner's {param} is {dim}. Set {param}: {shape[0]}, or name features of another encoder."
        )
