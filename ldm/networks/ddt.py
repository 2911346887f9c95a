"""The transformer with a wide head, DiT-DH, of representation autoencoders (RAE, arXiv:2510.11690).

Deep and narrow blocks read the noisy latent and tell two wide ones, token by token, how to modulate it: latents of many
channels need the width. Attribute names are those of the published code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.dit import Block, FinalLayer, PatchEmbed, SwiGLU, patches
from ldm.networks.positions import grid_sincos, grid_turns
from ldm.networks.takes import Takes

RATES = 256  # frequencies of the time


class DDT(nn.Module):
    """A transformer whose last blocks are wider than those that tell them how to modulate.

    Args:
        in_channels, out_channels: channels of the latent and of the prediction.
        image_size: side of the latent that it is trained on; others are taken, with positions interpolated to it.
        patch_size: latent pixels per token and side.
        hidden_size, depth, num_heads: width of a token, blocks and heads of attention, of both parts.
        mlp_ratio: width of the MLPs, before a third of it becomes their gate.
        time_scale: timesteps are multiplied by it: it knows time from 0 to 1.

    >>> network = DDT(6, 6, image_size=4, hidden_size=(16, 24), depth=(2, 1), num_heads=(2, 3))
    >>> network(torch.zeros(1, 6, 4, 4), torch.tensor([500.0]), vector=torch.zeros(1, 16)).shape
    torch.Size([1, 6, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int,
        patch_size: int = 1,
        hidden_size: Sequence[int] = (1152, 2048),
        depth: Sequence[int] = (28, 2),
        num_heads: Sequence[int] = (16, 16),
        mlp_ratio: float = 4.0,
        time_scale: float = 0.001,
    ):
        super().__init__()
        for width, heads in zip(hidden_size, num_heads, strict=True):
            if width % heads or width // heads % 4:
                raise UserError(f"heads are equal parts of the width, multiples of 4; got {heads} of {width}.")
        if image_size % patch_size:
            raise UserError(f"image_size {image_size} is not a multiple of patch_size {patch_size}.")
        (deep, wide), self.patch_size, self.base = hidden_size, patch_size, image_size // patch_size
        self.heads, self.encoding, self.time_scale = tuple(num_heads), depth[0], time_scale
        self.t_embedder = FourierTime(deep)
        self.s_embedder, self.x_embedder = (PatchEmbed(in_channels, width, patch_size) for width in (deep, wide))
        self.s_projector = nn.Linear(deep, wide)
        self.blocks = nn.ModuleList(
            GatedBlock(width, heads, mlp_ratio)
            for width, heads, count in zip(hidden_size, num_heads, depth, strict=True)
            for _ in range(count)
        )
        self.final_layer = FinalLayer(wide, patch_size**2 * out_channels, "block", "weighted")
        self.takes = Takes(in_channels, out_channels, image_size, vector_dim=deep)
        self.reset_parameters()

    @property
    def stages(self) -> nn.ModuleList:
        """Its blocks in the order in which they run."""
        return self.blocks

    def reset_parameters(self) -> None:
        """Initial weights: every block begins as the identity, and the prediction as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedder in (self.s_embedder, self.x_embedder):
            nn.init.xavier_uniform_(embedder.proj.weight.flatten(1))
        for part in (*self.blocks, self.final_layer):
            part.reset_parameters()

    def forward(self, x: Tensor, timesteps: Tensor, vector: Tensor | None = None) -> Tensor:
        """Predict (B,out_channels,H,W) from x (B,in_channels,H,W), timesteps (B,) or (1,) and a vector (B,deep)."""
        side = self.patch_size
        if x.shape[-1] % side or x.shape[-2] % side:
            raise ValueError(f"height and width must be multiples of {side}; got {tuple(x.shape[-2:])}")
        grid = (x.shape[-2] // side, x.shape[-1] // side)
        steps = tuple(self.base / count for count in grid)
        tokens, told = self.x_embedder(x), self.s_embedder(x)                       # (B,N,wide), (B,N,deep)
        turns = [grid_turns(grid, steps, tokens.shape[-1] // self.heads[1], x)]
        turns.insert(0, grid_turns(grid, steps, told.shape[-1] // self.heads[0], x))
        time = self.t_embedder(timesteps.float() * self.time_scale, tokens.dtype)   # (B or 1,deep)
        emb = F.silu(time if vector is None else time + vector)
        told = told + grid_sincos(grid, steps, told.shape[-1], x).to(told.dtype)
        for block in self.blocks[: self.encoding]:
            told = block(told, emb, None, turns[0])
        told = self.s_projector(F.silu(time[:, None] + told))                       # (B,N,wide)
        for block in self.blocks[self.encoding :]:
            tokens = block(tokens, told, None, turns[1])
        return patches(self.final_layer(tokens, told), grid, side)

    def positions_of(self) -> Tensor:
        """What is added to the tokens of the deep part (N,deep), of the size that it was trained on."""
        return grid_sincos((self.base, self.base), (1.0, 1.0), self.s_projector.in_features, torch.zeros(()))


class GatedBlock(Block):
    """A block with weighted norms and a gated MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__(dim, heads, mlp_ratio, "block", False, "weighted", "swiglu", None)
        self.mlp = SwiGLU(dim, int(dim * mlp_ratio) * 2 // 3)


class FourierTime(nn.Module):
    """Times (B,) from 0 to 1 -> (B,D), through sines and cosines of frequencies that were drawn once."""

    W: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("W", torch.randn(RATES))
        self.mlp = nn.Sequential(nn.Linear(2 * RATES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        angles = 2 * torch.pi * times[:, None] * self.W
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype))
