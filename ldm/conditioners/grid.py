"""Conditioning on a grid of SSL features: those of many tiles, with their places, for one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder

from ldm.conditioners.base import About, Conditioner, as_list, where_kept
from ldm.conditioners.ssl import check_features, no_text
from ldm.errors import UserError, suggest

SIDE = 8  # cells along each side of the largest grid
SIDES = (1, 2, 4, SIDE)  # with an odd number of cells the published form has no middle


class FeatureGrid(Conditioner):
    """What conditioners on a grid of features share.

    They read batch[key]: (B,D,k,k), or (B,D), which is a single cell, or a list of B grids (D,k,k) of any sizes. The
    cell at [row, col] describes that place of the image.
    """

    def __init__(self, embed_dim: int, dropout: float, key: str):
        super().__init__(dropout)
        self.embed_dim, self.keys = embed_dim, (key,)

    def grids(self, values: Any) -> list[tuple[Tensor, Tensor]]:
        """The grids by size: (indices (b,) in the batch, grids (b,D,k,k)) for every k that occurs."""
        if isinstance(values, Tensor):
            return [(torch.arange(len(values), device=values.device), self._square(values))]
        by_size: dict[torch.Size, list[int]] = {}
        grids = [torch.as_tensor(grid) for grid in values]
        for index, grid in enumerate(grids):
            by_size.setdefault(grid.shape, []).append(index)
        return [
            (torch.tensor(indices, device=grids[0].device), self._square(torch.stack([grids[i] for i in indices])))
            for indices in by_size.values()
        ]

    def _square(self, grids: Tensor) -> Tensor:
        if grids.ndim == 2:
            grids = grids[:, :, None, None]
        if grids.ndim != 4 or grids.shape[1] != self.embed_dim or grids.shape[2] != grids.shape[3]:
            raise UserError(
                f"the model takes square grids of features of dimension {self.embed_dim}, as ({self.embed_dim}, k, k); "
                f"got an array of shape {tuple(grids.shape[1:])}. Use features of the encoder that it was trained with."
            )
        return grids

    def as_batch(self, value: Any) -> Any:
        """What users give, (D,), (D,k,k), (N,D), (N,D,k,k) or a list of N arrays, as a batch."""
        if isinstance(value, (list, tuple)) and value and hasattr(value[0], "ndim"):
            return [torch.as_tensor(grid, dtype=torch.float32) for grid in value]
        value = torch.as_tensor(value, dtype=torch.float32)
        return value[None] if value.ndim in (1, 3) else value

    def parse(self, key: str, text: str) -> Any:
        raise no_text(key)

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        check_features(self.keys[0], metadata, self.embed_dim, "embed_dim", grids=True)


class GridEmbedder(FeatureGrid):
    """1, 4, 16 or 64 features and the magnification, through a transformer (ZoomLDM, arXiv:2411.16969).

    Also reads batch[magnification_key] (B,): names of levels, or their indices as integers. Gives {"crossattn":
    (B,65,context_dim)}: the magnification's token, then 64 slots, whose middle ones hold the cells row by row and the
    others a learned padding. Grids above 8 x 8 are averaged down to it. The unconditional value is zeros in place of
    all tokens.

    Args:
        embed_dim: dimension of the encoder's features.
        context_dim: dimension of the tokens, the UNet's context_dim.
        magnifications: names of the levels, such as 20x, 10x; or their number.
        hidden, depth, heads, mlp: width, layers, attention heads and feed-forward width of the transformer.
        standardize: first scale every cell's feature to mean 0 and standard deviation 1 over its values.
        last_norm: normalise the tokens at the end; false is the older published class, EmbeddingViT2.
        dropout: probability of dropping the condition of a training sample.
        key, magnification_key: batch keys.
    """

    def __init__(
        self, embed_dim: int = 1024, context_dim: int = 512, magnifications: int | Sequence[str] = 8,
        hidden: int = 512, depth: int = 12, heads: int = 8, mlp: int = 2048, standardize: bool = True,
        last_norm: bool = True, dropout: float = 0.1, key: str = "ssl", magnification_key: str = "magnification",
    ):  # fmt: skip
        super().__init__(embed_dim, dropout, key)
        self.keys = (key, magnification_key)
        levels = range(magnifications) if isinstance(magnifications, int) else magnifications
        self.magnifications = tuple(str(level) for level in levels)
        if not self.magnifications or len(set(self.magnifications)) < len(self.magnifications):
            raise UserError(f"magnifications are different names, or their number; got {magnifications}.")
        if hidden % heads:
            raise UserError(f"hidden is a multiple of heads; got {hidden} and {heads}.")
        self.context_dim, self.standardize = context_dim, standardize
        self.mag_embedding = nn.Embedding(len(self.magnifications), hidden)
        self.dim_reduce = nn.Linear(embed_dim, hidden)
        self.pad_token = nn.Parameter(torch.randn(1, 1, hidden))
        self.encoder = Encoder(SIDE**2 + 1, depth, heads, hidden, mlp, 0.0, 0.0, partial(nn.LayerNorm, eps=1e-6))
        self.final_proj = nn.Linear(hidden, context_dim)
        self.layer_norm = nn.LayerNorm(context_dim) if last_norm else nn.Identity()

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of a batch; samples where drop (B,) is true get the unconditional value."""
        slots = self.slots(self._value(batch, self.keys[0]))                    # (B,64,hidden)
        levels = self.levels(self._value(batch, self.keys[1]))                  # (B,)
        if len(levels) not in (1, len(slots)):
            raise UserError(f"{len(slots)} grids have {len(levels)} magnifications; give one each.")
        first = self.mag_embedding(levels)[:, None].expand(len(slots), -1, -1)
        tokens = self.encoder(torch.cat([first, slots], 1))                     # (B,65,hidden)
        tokens = self.layer_norm(self.final_proj(tokens))                       # (B,65,context_dim)
        return {"crossattn": where_kept(tokens, tokens.new_zeros(()), drop)}

    def null(self) -> dict[str, Tensor]:
        return {"crossattn": self.pad_token.new_zeros(1, SIDE**2 + 1, self.context_dim)}

    def slots(self, values: Any) -> Tensor:
        """Projected cells in the middle of 64 slots (B,64,hidden), the padding token in the others."""
        order, parts = [], []
        for indices, grids in self.grids(values):
            grids = self.prepared(grids.to(self.pad_token))
            cells = self.dim_reduce(rearrange(grids, "b d row col -> b (row col) d"))
            count = cells.shape[1]
            start = SIDE**2 // 2 - count // 2
            taken = torch.arange(SIDE**2, device=cells.device)[:, None]
            taken = (taken >= start) & (taken < start + count)                  # (64,1)
            cells = F.pad(cells, (0, 0, start, SIDE**2 - start - count))
            parts.append(torch.where(taken, cells, self.pad_token))
            order.append(indices)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def prepared(self, grids: Tensor) -> Tensor:
        """Grids (b,D,k,k) at most 8 x 8 and standardised, as the published data loader gives them."""
        side = grids.shape[-1]
        if side > SIDE:
            grids = F.adaptive_avg_pool2d(grids, SIDE)
        elif side not in SIDES:
            raise UserError(f"a grid of features has {', '.join(map(str, SIDES))} or more cells a side; got {side}.")
        if self.standardize:
            grids = (grids - grids.mean(1, keepdim=True)) / (grids.std(1, keepdim=True) + 1e-8)
        return grids

    def levels(self, values: Any) -> Tensor:
        """Indices (B,) of magnifications by name ("5x", also 5), or of indices in an integer tensor after a check."""
        known = self.magnifications
        if isinstance(values, Tensor) and not values.is_floating_point():
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < len(known):
                raise UserError(f"magnification indices lie in 0..{len(known) - 1}; got {values.unique().tolist()}.")
            return values.reshape(-1).to(self.pad_token.device)
        indices = []
        for value in as_list(values):
            name = f"{value:g}" if isinstance(value, float) else str(value)
            name = name if name in known else f"{name}x"
            if name not in known:
                raise UserError(f"the model has no {self.keys[1]} '{value}'{suggest(name, known)}")
            indices.append(known.index(name))
        return torch.tensor(indices, device=self.pad_token.device)

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        key, level = self.keys
        for name, other in ((key, level), (level, key)):
            if name not in values:
                raise UserError(f"'{other}' goes with '{name}'; give both.")
        return {key: self.as_batch(values[key]), level: self.levels(values[level])}

    def parse(self, key: str, text: str) -> Any:
        return text if key == self.keys[1] else super().parse(key, text)

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        super().check_data(metadata)
        for name in metadata.get("conditions", {}).get(self.keys[1], {}).get("names", ()):
            self.levels(name)

    def describe(self) -> dict[str, About]:
        key, level = self.keys
        return {
            key: About("features", dim=self.embed_dim, grid=tuple(SIDES)),
            level: About("class", names=tuple(self.magnifications)),
        }


class GridTokens(FeatureGrid):
    """k x k features, one cross-attention token each, with 2-D sine-cosine positions (PixCell, arXiv:2506.05127).

    Gives {"crossattn": (B,k*k,context_dim)}: feature plus position, projected. The unconditional value is k*k learned
    embeddings in place of features and positions.

    Args:
        embed_dim: dimension of the encoder's features, a multiple of 4.
        context_dim: dimension of the tokens, the network's.
        grid: cells along each side.
        hidden: width of a layer between; None is a single linear map.
        dropout: probability of dropping the condition of a training sample.
        key: batch key that holds the features.
    """

    def __init__(
        self, embed_dim: int, context_dim: int, grid: int = 4, hidden: int | None = None,
        dropout: float = 0.1, key: str = "ssl",
    ):  # fmt: skip
        super().__init__(embed_dim, dropout, key)
        if grid < 1 or embed_dim % 4:
            raise UserError(f"grid is at least 1 and embed_dim a multiple of 4; got {grid} and {embed_dim}.")
        self.grid = grid
        self.uncond_embedding = nn.Parameter(torch.randn(grid * grid, embed_dim) * embed_dim**-0.5)
        self.register_buffer("positions", _sincos_2d(embed_dim, grid))
        layers = [nn.Linear(embed_dim, context_dim)]
        if hidden is not None:
            layers = [nn.Linear(embed_dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, context_dim)]
        self.projection = nn.Sequential(*layers)

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of a batch; samples where drop (B,) is true get the unconditional value."""
        groups = self.grids(self._value(batch, self.keys[0]))
        if wrong := [grids.shape[-1] for _, grids in groups if grids.shape[-1] != self.grid]:
            raise UserError(f"the model takes {self.grid} x {self.grid} features; got {wrong[0]} x {wrong[0]}.")
        cells = rearrange(groups[0][1].to(self.positions), "b d row col -> b (row col) d") + self.positions
        return {"crossattn": self.projection(where_kept(cells, self.uncond_embedding, drop))}

    def null(self) -> dict[str, Tensor]:
        return {"crossattn": self.projection(self.uncond_embedding[None])}

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = values.values()
        return {self.keys[0]: self.as_batch(value)}

    def describe(self) -> dict[str, About]:
        return {self.keys[0]: About("features", dim=self.embed_dim, grid=(self.grid,))}


def _sincos_2d(dim: int, grid: int) -> Tensor:
    """Positions (grid*grid,dim) of cells, row by row: sines and cosines of the column, then of the row.

    Positions are the cells' middles on a canvas of 32 units a side, as in PixCell's models of 512 and 1024 px, so that
    grids of all sizes span the same range.
    """
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    places = (torch.arange(grid, dtype=torch.float64) + 0.5) * 32 / grid
    waves = places[:, None] * rates                                             # (grid,dim/4)
    waves = torch.cat([waves.sin(), waves.cos()], 1)                            # (grid,dim/2)
    cols, rows = (repeat(waves, f"{axis} d -> (row col) d", row=grid, col=grid) for axis in ("col", "row"))
    return torch.cat([cols, rows], 1).float()
