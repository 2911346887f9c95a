"""The denoising transformer: DiT, SiT, PixArt, ZoomLDM's CDM and today's variants, one network for all.

Attribute names (`x_embedder`, `t_embedder`, `y_embedder`, `t_block`, `blocks`, `final_layer`) are those of the
published code, so published checkpoints load by name. Shapes: tokens (B,N,D), modulation (B or 1,1,D).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.networks.layers import attend_heads, timestep_embedding
from ldm.networks.positions import grid_sincos, grid_turns, token_positions, turned
from ldm.networks.takes import Takes

TIME_DIM = 256  # of the sinusoidal embedding of timesteps in all published transformers


class DiT(nn.Module):
    """Transformer over patches of a latent, conditioned by time, vectors and labels through adaptive LayerNorm
    (arXiv:2212.09748), and by tokens through cross-attention (arXiv:2310.00426) or in the sequence.

    Args:
        in_channels, out_channels: channels of the input (with concatenated conditions) and of the prediction.
        image_size: side of the latent that it is trained on; others are taken, with positions interpolated to it.
        patch_size: latent pixels per token and side. 0: x is a sequence (B,C,N) of image_size tokens, each as it is.
        hidden_size, depth, num_heads, mlp_ratio: width of a token, blocks, heads of attention, width of the MLP.
        modulation: "block", each block has its own (adaLN-Zero); "shared", one for all and a table each (adaLN-single).
        context_dim: of the tokens (B,L,context_dim) that it attends to; None: none.
        context: "cross", each block attends to the tokens; "sequence", they are tokens among those of the image.
        context_tokens: above 1, this many tokens lie on a square grid, whose positions are added to them.
        num_classes: labels y (B,) are embedded and added to the time embedding.
        vector_dim: of a vector (B,vector_dim), projected and added to it; None: of (B,hidden_size), added as it is.
        positions: "sincos", added to the tokens; "rotary", turns queries and keys (arXiv:2104.09864, by axis).
        position_scale: positions are divided by it (PixArt's interpolation_scale).
        norm: "layer" or "rms", of tokens. mlp: "gelu" (tanh) or "swiglu" (arXiv:2002.05202).
        qk_norm: None, "layer" or "rms": of queries and keys.
        time_scale: timesteps are multiplied by it: 0.001 for networks that know time from 0 to 1 (SiT).
        use_checkpoint: trade compute for memory while training.

    >>> network = DiT(4, 4, image_size=8, hidden_size=32, depth=2, num_heads=2, context_dim=16)
    >>> network(torch.zeros(1, 4, 8, 12), torch.tensor([500.0]), context=torch.zeros(1, 3, 16)).shape
    torch.Size([1, 4, 8, 12])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        modulation: Literal["block", "shared"] = "block",
        context_dim: int | None = None,
        context: Literal["cross", "sequence"] = "cross",
        context_tokens: int = 1,
        num_classes: int | None = None,
        vector_dim: int | None = None,
        positions: Literal["sincos", "rotary"] = "sincos",
        position_scale: float = 1.0,
        norm: Literal["layer", "rms"] = "layer",
        mlp: Literal["gelu", "swiglu"] = "gelu",
        qk_norm: Literal["layer", "rms"] | None = None,
        time_scale: float = 1.0,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        _check(
            modulation=(modulation, "block", "shared"),
            context=(context, "cross", "sequence"),
            positions=(positions, "sincos", "rotary"),
            norm=(norm, "layer", "rms"),
            mlp=(mlp, "gelu", "swiglu"),
            qk_norm=(qk_norm, None, "layer", "rms"),
        )
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size is a multiple of num_heads ({num_heads}) and of 4; got {hidden_size}.")
        if positions == "rotary" and (hidden_size // num_heads) % 4:
            raise UserError(f"rotary positions need heads of a multiple of 4; got {hidden_size // num_heads}.")
        if patch_size and image_size % patch_size:
            raise UserError(f"image_size {image_size} is not a multiple of patch_size {patch_size}.")
        side = round(context_tokens**0.5)
        if context_tokens > 1 and (side**2 != context_tokens or context_dim is None or context_dim % 4):
            raise UserError(
                f"context_tokens {context_tokens} lie on a square, with a context_dim that is a multiple of 4; "
                f"got context_dim {context_dim}."
            )
        self.image_size, self.patch_size, self.out_channels = image_size, patch_size, out_channels
        self.head_dim, self.positions, self.position_scale = hidden_size // num_heads, positions, position_scale
        self.time_scale, self.use_checkpoint, self.context = time_scale, use_checkpoint, context
        patch = max(patch_size, 1)

        embedder = PatchEmbed(in_channels, hidden_size, patch) if patch_size else nn.Linear(in_channels, hidden_size)
        self.x_embedder = embedder
        self.t_embedder = TimeEmbedder(hidden_size)
        if num_classes is not None or context_dim is not None:
            self.y_embedder = ConditionEmbedder(hidden_size, num_classes, context_dim)
        if context_tokens > 1:
            base = image_size // max(patch_size, 1)
            self.register_buffer("y_pos_embed", token_positions(side, context_dim, base, position_scale))
        if vector_dim is not None:
            self.vector_embedder = nn.Linear(vector_dim, hidden_size)
        if modulation == "shared":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        crossed = context_dim is not None and context == "cross"
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, modulation, crossed, norm, mlp, qk_norm) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch**2 * out_channels, modulation, norm)
        self.takes = Takes(
            in_channels, out_channels, image_size, context_dim, vector_dim or hidden_size,
            needs_vector=vector_dim is not None, num_classes=num_classes, sequence=not patch_size,
        )  # fmt: skip
        self.reset_parameters()

    @property
    def stages(self) -> nn.ModuleList:
        """Its blocks in the order in which they run."""
        return self.blocks

    def reset_parameters(self) -> None:
        """Initial weights: every block begins as the identity, and the prediction as zero (DiT, section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.patch_size:
            nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:
            block.reset_parameters()
        self.final_layer.reset_parameters()

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """Predict (B,out_channels,H,W) from x (B,in_channels,H,W) and timesteps (B,), integer or fractional.

        Timesteps (1,) are those of all samples, embedded once. context (B,L,context_dim) is attended to, y (B,) is a
        class label, vector (B,vector_dim) is added to the time embedding. residuals (B,N,D) are added to the tokens,
        one after each of the first blocks.
        """
        tokens, grid = self._tokens(x, self.x_embedder)                             # (B,N,D), (rows, columns)
        emb, modulation, context, turns = self._told(grid, tokens, timesteps, context, y, vector)
        count = tokens.shape[1]
        if context is not None and self.context == "sequence":
            tokens, context = torch.cat([tokens, context.expand(len(tokens), -1, -1)], dim=1), None
        for block, residual in zip_longest(self.blocks, residuals):
            tokens = self._run(block, tokens, modulation, context, turns)
            tokens = tokens if residual is None else tokens + residual
        tokens = self.final_layer(tokens[:, :count], emb)                           # (B,N,P*P*out)
        return self._image(tokens, grid)

    def _told(
        self,
        grid: Sequence[int],
        tokens: Tensor,
        timesteps: Tensor,
        context: Tensor | None,
        y: Tensor | None,
        vector: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What the blocks are told beside the tokens: the embedding of the time, modulation, context, turns."""
        if (y is not None) != (self.takes.num_classes is not None):
            raise ValueError("class labels y must be given if and only if the transformer has num_classes")
        if (context is not None) != (self.takes.context_dim is not None):
            raise ValueError("a context must be given if and only if the transformer has a context_dim")
        emb = self.t_embedder(timesteps.float() * self.time_scale, tokens.dtype)    # (B or 1,D)
        if y is not None:
            emb = emb + self.y_embedder.embedding_table(y)
        if vector is not None:
            emb = emb + (self.vector_embedder(vector) if hasattr(self, "vector_embedder") else vector)
        if context is not None:
            if hasattr(self, "y_pos_embed"):
                context = context + self.y_pos_embed.to(context.dtype)
            context = self.y_embedder.y_proj(context)                               # (B,L,D)
        modulation = self.t_block(emb) if hasattr(self, "t_block") else emb         # (B or 1,6D or D)
        turns = None
        if self.positions == "rotary":
            turns = grid_turns(grid, self._steps(grid), self.head_dim, tokens)      # (2,N,head_dim/2)
        return emb, modulation, context, turns

    def _run(
        self, block: nn.Module, tokens: Tensor, modulation: Tensor, context: Tensor | None, turns: Tensor | None
    ) -> Tensor:
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(block, tokens, modulation, context, turns, use_reentrant=False)
        return block(tokens, modulation, context, turns)

    def _tokens(self, x: Tensor, embedder: nn.Module) -> tuple[Tensor, tuple[int, ...]]:
        """The tokens (B,N,D) of x, row by row, and the sides of their grid."""
        if self.patch_size:
            if x.shape[-1] % self.patch_size or x.shape[-2] % self.patch_size:
                raise ValueError(f"height and width must be multiples of {self.patch_size}; got {tuple(x.shape[-2:])}")
            grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
            tokens = embedder(x)
        else:
            tokens, grid = embedder(x.transpose(1, 2)), (x.shape[-1],)
        if self.positions == "sincos":
            places = grid_sincos(grid, self._steps(grid), tokens.shape[-1], x)
            tokens = tokens + places.to(tokens.dtype)
        return tokens, grid

    def _steps(self, grid: Sequence[int]) -> tuple[float, ...]:
        """From token to token along each axis, in tokens of the size that it was trained on."""
        base = self.image_size // max(self.patch_size, 1)
        return tuple(base / count / self.position_scale for count in grid)

    def positions_of(self) -> Tensor:
        """What is added to the tokens of the size that it was trained on (N,D), of positions "sincos"."""
        grid = (self.image_size // max(self.patch_size, 1),) * (2 if self.patch_size else 1)
        return grid_sincos(grid, self._steps(grid), self.t_embedder.mlp[0].out_features, torch.zeros(()))

    def _image(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """(B,out,H,W) from tokens (B,N,P*P*out), each a patch as (row, column, channel)."""
        if not self.patch_size:
            return tokens.transpose(1, 2)
        return patches(tokens, grid, self.patch_size)


def patches(tokens: Tensor, grid: Sequence[int], side: int) -> Tensor:
    """An image (B,C,H,W) of the patches in tokens (B,N,side*side*C), each as (row, column, channel).

    >>> patches(torch.arange(8.0).view(1, 2, 4), (1, 2), 2)[0, 0]
    tensor([[0., 1., 4., 5.],
            [2., 3., 6., 7.]])
    """
    parts = tokens.unflatten(-1, (side, side, -1)).unflatten(1, tuple(grid))
    image = parts.permute(0, 5, 1, 3, 2, 4)                                         # (B,C,rows,side,columns,side)
    return image.reshape(len(image), -1, grid[0] * side, grid[1] * side)


class Block(nn.Module):
    """Self-attention, cross-attention where there is a context, and an MLP, each a residual."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        modulation: str,
        crossed: bool,
        norm: str,
        mlp: str,
        qk_norm: str | None,
    ):
        super().__init__()
        self.norm1, self.norm2 = Norm(dim, norm), Norm(dim, norm)
        self.attn = SelfAttention(dim, heads, qk_norm)
        if crossed:
            self.cross_attn = CrossAttention(dim, heads)
        hidden = int(dim * mlp_ratio)
        self.mlp = SwiGLU(dim, -(-hidden * 2 // 3 // 8) * 8) if mlp == "swiglu" else Mlp(dim, hidden)
        if modulation == "shared":
            self.scale_shift_table = nn.Parameter(torch.empty(6, dim))
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def reset_parameters(self) -> None:
        if hasattr(self, "adaLN_modulation"):
            nn.init.zeros_(self.adaLN_modulation[1].weight)
        else:
            nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)
        if hasattr(self, "cross_attn"):
            nn.init.zeros_(self.cross_attn.proj.weight)

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor | None, turns: Tensor | None) -> Tensor:
        """x (B,N,D), modulation (B or 1,D) of this block's own, or (B,N,D) of each token, or (B or 1,6D) of all blocks
        -> (B,N,D)."""
        if hasattr(self, "adaLN_modulation"):
            parts = _each(self.adaLN_modulation(modulation)).chunk(6, dim=-1)       # 6 x (B or 1,1 or N,D)
        else:
            shared = modulation.unflatten(-1, self.scale_shift_table.shape)         # (B or 1,6,D)
            parts = (self.scale_shift_table + shared)[:, None].unbind(2)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = torch.addcmul(x, gate_a, self.attn(self.norm1(x, scale_a, shift_a), turns))
        if context is not None:
            x = x + self.cross_attn(x, context)
        return torch.addcmul(x, gate_m, self.mlp(self.norm2(x, scale_m, shift_m)))


def _each(modulation: Tensor) -> Tensor:
    """Modulation (B,D) of all tokens, or (B,N,D) of each, so that it goes with tokens (B,N,D)."""
    return modulation[:, None] if modulation.ndim == 2 else modulation


class SelfAttention(nn.Module):
    """Attention of tokens to each other."""

    def __init__(self, dim: int, heads: int, qk_norm: str | None):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if qk_norm is not None:
            kind = nn.LayerNorm if qk_norm == "layer" else nn.RMSNorm
            self.q_norm, self.k_norm = (kind(dim // heads, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, turns: Tensor | None) -> Tensor:
        q, k, v = _heads(self.qkv(x), 3, self.heads)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        if turns is not None:
            q, k = turned(q, turns), turned(k, turns)
        return self.proj(attend_heads(q, k, v))


class CrossAttention(nn.Module):
    """Attention of tokens (B,N,D) to a context (B,L,D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B,N,D), or (B,1,D) where all tokens get the same: a single token of context has weight 1 whatever asks."""
        k, v = _heads(self.kv_linear(context), 2, self.heads)
        (count, dim), length = x.shape[1:], context.shape[1]
        if length == 1 and not self.training:
            return self.proj(v.transpose(1, 2).flatten(2))
        if k.dtype == torch.float32 and 3 * length * (self.heads * count + dim) <= count * dim:
            return self._folded(x, k, v)
        (q,) = _heads(self.q_linear(x), 1, self.heads)
        return self.proj(attend_heads(q, k, v))

    def _folded(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same with the weights of queries and output multiplied into keys and values (B,heads,L,d), which costs
        less where these are few and products are what costs: tokens are multiplied by D x heads*L, not D x D."""
        k = k * k.shape[-1] ** -0.5
        weight, bias = (each.unflatten(0, (self.heads, -1)) for each in (self.q_linear.weight, self.q_linear.bias))
        keys, offset = (k @ weight).flatten(1, 2), (k @ bias[..., None]).flatten(1)         # (B,heads*L,D), (B,heads*L)
        values = v @ self.proj.weight.t().unflatten(0, (self.heads, -1))                    # (B,heads,L,D)
        scores = x @ keys.transpose(1, 2) + offset[:, None]                                 # (B,N,heads*L)
        weights = scores.unflatten(-1, (self.heads, -1)).softmax(-1).to(values.dtype).flatten(2)
        return weights @ values.flatten(1, 2) + self.proj.bias


def _heads(x: Tensor, parts: int, heads: int) -> list[Tensor]:
    """x (B,N,parts*heads*d) as its parts, each (B,heads,N,d)."""
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(parts, dim=-1)]


class Mlp(nn.Module):
    """Two layers with GELU in its tanh form between."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """An MLP of `hidden` values gated by SiLU: two thirds of one without a gate are as many weights."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Norm(nn.Module):
    """Normalisation of tokens over their width, without weights ("weighted": by RMS, with them): what modulates them
    scales and shifts."""

    def __init__(self, dim: int, kind: str):
        super().__init__()
        self.dim, self.kind = dim, kind
        self.weight = nn.Parameter(torch.ones(dim)) if kind == "weighted" else None

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x (B,N,D), scale and shift (B or 1,1,D) -> norm(x) * (1 + scale) + shift."""
        norm = F.layer_norm if self.kind == "layer" else F.rms_norm
        normed = norm(x, (self.dim,), self.weight, eps=1e-6).to(x.dtype)
        return torch.addcmul(shift, normed, 1 + scale)


class FinalLayer(nn.Module):
    """Tokens (B,N,D) -> patches (B,N,out), modulated by the embedding of the time."""

    def __init__(self, dim: int, out: int, modulation: str, norm: str):
        super().__init__()
        self.norm_final, self.linear = Norm(dim, norm), nn.Linear(dim, out)
        if modulation == "shared":
            self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        if hasattr(self, "adaLN_modulation"):
            nn.init.zeros_(self.adaLN_modulation[1].weight)
        else:
            nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if hasattr(self, "adaLN_modulation"):
            shift, scale = _each(self.adaLN_modulation(emb)).chunk(2, dim=-1)
        else:
            shift, scale = (self.scale_shift_table + emb[:, None])[:, None].unbind(2)
        return self.linear(self.norm_final(x, scale, shift))


class PatchEmbed(nn.Module):
    """Tokens (B,N,D) of the patches of x (B,C,H,W), row by row."""

    def __init__(self, in_channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """Timesteps (B,) -> (B,D). Their sines are float32 whatever the network's precision."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_embedding(timesteps, TIME_DIM).to(dtype))


class ConditionEmbedder(nn.Module):
    """Labels to vectors by a table, and tokens of a context to the network's width by an MLP, as there are."""

    def __init__(self, dim: int, num_classes: int | None, context_dim: int | None):
        super().__init__()
        if num_classes is not None:
            self.embedding_table = nn.Embedding(num_classes, dim)
            nn.init.normal_(self.embedding_table.weight, std=0.02)
        if context_dim is not None:
            self.y_proj = Mlp(context_dim, dim)
            self.y_proj.fc2 = nn.Linear(dim, dim)


def _check(**given: tuple[object, ...]) -> None:
    """UserError unless each first value is one of those after it."""
    for name, (value, *known) in given.items():
        if value not in known:
            raise UserError(f"{name} of a transformer is one of {', '.join(map(str, known))}; got {value}.")
