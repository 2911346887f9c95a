"""Features as they are: the network that they condition projects them itself, as published transformers do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ldm.conditioners.base import About, where_kept
from ldm.conditioners.grid import FeatureGrid
from ldm.conditioners.ssl import check_features
from ldm.errors import UserError


class FeatureTokens(FeatureGrid):
    """k x k features as cross-attention tokens, row by row (PixCell, arXiv:2506.05127).

    Reads batch[key] (B,D,k,k), for k = 1 also (B,D), and gives {"crossattn": (B,k*k,D)}. The unconditional value is
    a buffer of the model, drawn once and never trained, as published.

    Args:
        embed_dim: dimension D of the encoder's features, the network's context_dim.
        grid: cells along each side.
        dropout: probability of dropping the condition of a training sample.
        key: batch key that holds the features.

    >>> FeatureTokens(8, grid=2).forward({"ssl": torch.zeros(3, 8, 2, 2)})["crossattn"].shape
    torch.Size([3, 4, 8])
    """

    def __init__(self, embed_dim: int, grid: int = 1, dropout: float = 0.1, key: str = "ssl"):
        super().__init__(embed_dim, dropout, key)
        if grid < 1:
            raise UserError(f"grid is the number of features along each side, 1 or more; got {grid}.")
        self.grid = grid
        self.register_buffer("uncond_embedding", torch.randn(grid * grid, embed_dim) * embed_dim**-0.5)

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of a batch; samples where drop (B,) is true get the unconditional value."""
        groups = self.grids(self._value(batch, self.keys[0]))
        if wrong := [grids.shape[-1] for _, grids in groups if grids.shape[-1] != self.grid]:
            raise UserError(f"the model takes {self.grid} x {self.grid} features; got {wrong[0]} x {wrong[0]}.")
        tokens = rearrange(groups[0][1].to(self.uncond_embedding), "b d row col -> b (row col) d")
        return {"crossattn": where_kept(tokens, self.uncond_embedding, drop)}

    def null(self) -> dict[str, Tensor]:
        return {"crossattn": self.uncond_embedding[None]}

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = values.values()
        return {self.keys[0]: self.as_batch(value)}

    def describe(self) -> dict[str, About]:
        return {self.keys[0]: About("features", dim=self.embed_dim, grid=(self.grid,) if self.grid > 1 else ())}


class FeatureVector(FeatureGrid):
    """One feature of each image, added to the embedding of the time (SiT with a feature in the label's place).

    Reads batch[key] (B,D) and gives {"vector": (B,D)}. The unconditional value is a buffer: zeros, or what a published
    model has.

    Args:
        embed_dim: dimension D of the encoder's features, the network's vector_dim.
        dropout: probability of dropping the condition of a training sample.
        key: batch key that holds the features.

    >>> FeatureVector(8).null()["vector"].shape
    torch.Size([1, 8])
    """

    def __init__(self, embed_dim: int, dropout: float = 0.1, key: str = "ssl"):
        super().__init__(embed_dim, dropout, key)
        self.register_buffer("uncond_embedding", torch.zeros(1, embed_dim))

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of a batch; samples where drop (B,) is true get the unconditional value."""
        features = torch.as_tensor(self._value(batch, self.keys[0])).to(self.uncond_embedding)
        if features.ndim != 2 or features.shape[1] != self.embed_dim:
            raise UserError(
                f"the model takes features of dimension {self.embed_dim}; got an array of shape "
                f"{tuple(features.shape)}. Use features of the encoder that it was trained with."
            )
        return {"vector": where_kept(features, self.uncond_embedding, drop)}

    def null(self) -> dict[str, Tensor]:
        return {"vector": self.uncond_embedding}

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = values.values()
        return {self.keys[0]: self.as_batch(value)}

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        check_features(self.keys[0], metadata, self.embed_dim, "embed_dim")

    def describe(self) -> dict[str, About]:
        return {self.keys[0]: About("features", dim=self.embed_dim)}
