"""Conditioning on self-supervised (SSL) features of a tile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
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
    """

    def __init__(
        self, embed_dim: int, context_dim: int = 512, normalize: bool = True, dropout: float = 0.1, key: str = "ssl"
    ):
        super().__init__(dropout)
        self.embed_dim, self.context_dim = embed_dim, context_dim
        self.normalize, self.keys = normalize, (key,)
        self.patch_fc = nn.Linear(embed_dim, context_dim)

    def forward(self, batch: Mapping[str, Tensor], drop: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of a batch; samples where drop (B,) is true get the unconditional value."""
        return self.embed(self.features_of(batch, drop))

    def null(self) -> dict[str, Tensor]:
        """The unconditional condition of one sample."""
        return self.embed(self.patch_fc.weight.new_zeros(1, self.embed_dim))

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = values.values()
        features = torch.as_tensor(value, dtype=torch.float32)
        return {self.keys[0]: features[None] if features.ndim == 1 else features}

    def describe(self) -> dict[str, Any]:
        return {self.keys[0]: {"kind": "features", "dim": self.embed_dim}}

    def embed(self, features: Tensor) -> dict[str, Tensor]:
        """The condition of features (B,embed_dim) as `features_of` gives them."""
        return {"crossattn": self.patch_fc(features)[:, None]}                  # (B,1,context_dim)

    def features_of(self, batch: Mapping[str, Tensor], drop: Tensor | None) -> Tensor:
        """The batch's features (B,embed_dim), checked, normalised if asked for, zero where dropped."""
        features = torch.as_tensor(self._value(batch, self.keys[0])).to(self.patch_fc.weight)  # (B,embed_dim)
        if features.ndim != 2 or features.shape[1] != self.embed_dim:
            raise UserError(
                f"the model takes SSL features of dimension {self.embed_dim}; got an array of shape "
                f"{tuple(features.shape)}. Use features of the encoder that the model was trained with."
            )
        if self.normalize:
            features = F.normalize(features, dim=1)
        if drop is not None:
            features = torch.where(drop[:, None], torch.zeros_like(features), features)
        return features


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
        dropout: float = 0.1, key: str = "ssl",
    ):  # fmt: skip
        super().__init__(embed_dim, context_dim, normalize, dropout, key)
        if embed_dim % grid**2:
            raise UserError(f"a feature of {embed_dim} values has no {grid} x {grid} cells of equal size.")
        self.grid = grid
        self.cell_fc = nn.Linear(embed_dim // grid**2, map_channels)

    def embed(self, features: Tensor) -> dict[str, Tensor]:
        cells = features.unflatten(1, (-1, self.grid * self.grid)).transpose(1, 2)  # (B,grid^2,embed_dim/grid^2)
        layout = self.cell_fc(cells).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return {**super().embed(features), "concat": layout}                    # (B,map_channels,grid,grid)
