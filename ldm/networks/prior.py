"""The transformer of unCLIP's prior (arXiv:2204.06125, section 2.2) over a sequence, as ZoomLDM's second CDM has it.

The condition and the time are two tokens before those of the sequence, all attend to all, and nothing is modulated.
Attribute names are those of diffusers' class of this name, so published weights load by name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.networks.layers import CrossAttention, FeedForward, timestep_embedding
from ldm.networks.takes import Takes


class PriorTransformer(nn.Module):
    """Transformer over a sequence (B,C,N) whose positions are learnt, conditioned by a vector.

    Args:
        in_channels, out_channels: channels of the sequence and of the prediction.
        image_size: tokens of the sequence.
        vector_dim: of the condition, a vector (B,vector_dim).
        hidden_size, depth, num_heads: width of a token, blocks, heads of attention.
        use_checkpoint: trade compute for memory while training.
    UserError: heads that are no equal parts of the width.

    >>> network = PriorTransformer(6, 6, image_size=5, vector_dim=4, hidden_size=16, depth=1, num_heads=2)
    >>> network(torch.zeros(2, 6, 5), torch.tensor([500.0]), vector=torch.zeros(2, 4)).shape
    torch.Size([2, 6, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int,
        vector_dim: int,
        hidden_size: int = 1024,
        depth: int = 16,
        num_heads: int = 16,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise UserError(f"hidden_size is a multiple of num_heads ({num_heads}); got {hidden_size}.")
        self.use_checkpoint = use_checkpoint
        self.time_embedding = TimeEmbedding(hidden_size)
        self.proj_in, self.embedding_proj = nn.Linear(in_channels, hidden_size), nn.Linear(vector_dim, hidden_size)
        self.positional_embedding = nn.Parameter(torch.zeros(1, image_size, hidden_size))
        self.transformer_blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(hidden_size)
        self.proj_to_clip_embeddings = nn.Linear(hidden_size, out_channels)
        self.takes = Takes(
            in_channels, out_channels, image_size, vector_dim=vector_dim, needs_vector=True, sequence=True
        )

    def forward(self, x: Tensor, timesteps: Tensor, vector: Tensor) -> Tensor:
        """Predict (B,out_channels,N) from x (B,in_channels,N), timesteps (B or 1,), and a vector (B or 1,vector_dim).

        ValueError: a sequence of another length than the positions that were learnt.
        """
        if x.shape[-1] != self.takes.image_size:
            raise ValueError(f"the transformer takes sequences of {self.takes.image_size} tokens; got {x.shape[-1]}")
        tokens = self.proj_in(x.transpose(1, 2))                                    # (B,N,D)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        told = (self.embedding_proj(vector), self.time_embedding(timesteps, tokens.dtype))  # (B or 1,D) each
        tokens = torch.cat([*(each[:, None].expand(len(x), -1, -1) for each in told), tokens], dim=1)
        for block in self.transformer_blocks:
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return self.proj_to_clip_embeddings(self.norm_out(tokens[:, len(told) :])).transpose(1, 2)


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each pre-normalised and residual."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, None, heads, dim // heads, bias=True)
        self.ff = FeedForward(dim, inner=GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class GELU(nn.Module):
    """A linear layer and GELU in its exact form."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class TimeEmbedding(nn.Module):
    """Timesteps (B,) -> (B,D). Their sines, as many as the network is wide, are float32 whatever its precision."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        sines = timestep_embedding(timesteps, self.linear_1.in_features).to(dtype)
        return self.linear_2(F.silu(self.linear_1(sines)))
