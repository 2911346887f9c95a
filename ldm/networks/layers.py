"""Layers of the denoising networks, with the parameter names of CompVis latent-diffusion and guided-diffusion.

Shapes: feature maps (B,C,H,W), token sequences (B,N,C), time embeddings (B,E).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding (B,dim) of timesteps (B,), integer or fractional; cosines first (DDPM, arXiv:2006.11239).

    >>> timestep_embedding(torch.tensor([0.0, 1.0]), 4)
    tensor([[1.0000, 1.0000, 0.0000, 0.0000],
            [0.5403, 0.9999, 0.8415, 0.0100]])
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timesteps.device).float() / half)
    angles = timesteps[:, None].float() * frequencies[None]                     # (B,dim/2)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def zero_module(module: nn.Module) -> nn.Module:
    """The module with all its parameters set to zero: a residual branch that starts as the identity.

    >>> zero_module(torch.nn.Linear(2, 2))(torch.ones(1, 2))
    tensor([[0., 0.]], grad_fn=<AddmmBackward0>)
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class NormedSiLU(nn.SiLU):
    """SiLU of a normalised map that nothing else reads: in its memory, where no gradient needs it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


def _residual(x: Tensor, update: Tensor) -> Tensor:
    """x + update, in the memory of the update where it has the shape."""
    return update.add_(x) if update.shape == x.shape else x + update


class GroupNorm32(nn.GroupNorm):
    """Group normalisation whose statistics are float32 whatever the input's precision; the output keeps it."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5):
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype != torch.float64:  # the CPU kernel keeps float32 statistics by itself
            slow = x.dtype != torch.float32 and x.shape[-2:].numel() < 1024 and not x.is_contiguous()
            if not slow:  # its form for small channels_last maps is slow but in float32
                return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)


class Conv3x3(nn.Conv2d):
    """3x3 convolution that keeps the size."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.out_channels > 2 * x[:, 0].numel():
            return self._product(x)  # weights that outweigh the maps are not laid out anew
        return super().forward(x)

    def _product(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (1, 1, 1, 1))
        shifted = [x[:, :, row : row + height, col : col + width] for row in range(3) for col in range(3)]
        if self.weight.is_contiguous():
            columns = rearrange(shifted, "k b c h w -> (c k) (b h w)")
            out = torch.addmm(self.bias[:, None], self.weight.flatten(1), columns)
            return rearrange(out, "o (b h w) -> b o h w", h=height, w=width).contiguous()
        columns = torch.cat([rearrange(part, "b c h w -> b h w c") for part in shifted], dim=-1)
        out = F.linear(columns, rearrange(self.weight, "o c kh kw -> o (kh kw c)"), self.bias)
        return rearrange(out, "b h w o -> b o h w")


class PointwiseConv(nn.Conv2d):
    """1x1 convolution."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            return rearrange(self.tokens(rearrange(x, "b c h w -> b h w c")), "b h w o -> b o h w")
        if x.device.type == "cpu" and x.shape[-2:].numel() >= self.in_channels:  # where maps outweigh the weights
            weight = self.weight.flatten(1).expand(len(x), -1, -1)              # (B,out,in)
            return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).unflatten(-1, x.shape[-2:])
        return super().forward(x)

    def tokens(self, x: Tensor) -> Tensor:
        """The same of tokens: (...,in) -> (...,out)."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then an optional 3x3 convolution."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.is_contiguous():
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)  # several times as fast there
        else:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Downsampling by 2: a strided 3x3 convolution, or average pooling."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None):
        super().__init__()
        if use_conv:
            self.op: nn.Module = nn.Conv2d(channels, out_channels or channels, 3, stride=2, padding=1)
        else:
            self.op = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block conditioned on the time embedding, optionally resampling by 2 (ADM, arXiv:2105.05233, section 3).

    With `use_scale_shift_norm` the embedding modulates as norm(h)*(1+scale)+shift, else it is added to h.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = False,
        up: bool = False,
        down: bool = False,
        norm_groups: int = 32,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm32(channels, norm_groups), NormedSiLU(), Conv3x3(channels, out_channels)
        )
        self.resample = Upsample(channels, False) if up else Downsample(channels, False) if down else None
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels * (1 + use_scale_shift_norm)))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels, norm_groups),
            NormedSiLU(),
            nn.Dropout(dropout),
            zero_module(Conv3x3(out_channels, out_channels)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else PointwiseConv(channels, out_channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)                                                             # (B,out,H,W)
        emb = self.emb_layers(emb)[:, :, None, None].to(h.dtype)                # (B,out or 2*out,1,1)
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h.add_(emb))
        return _residual(self.skip_connection(x), h)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head scaled dot-product attention (arXiv:1706.03762): q (B,N,C), k and v (B,M,C) -> (B,N,C).

    >>> q, k = torch.zeros(1, 1, 4), torch.randn(1, 2, 4)
    >>> attend(q, k, torch.tensor([[[0.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0]]]), heads=2)  # a mean: q prefers none
    tensor([[[1., 2., 3., 4.]]])
    """
    q, k, v = (rearrange(x, "b n (heads c) -> b heads n c", heads=heads) for x in (q, k, v))
    return attend_heads(q, k, v)


def attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of heads that are apart: q (B,heads,N,c), k and v (B,heads,M,c) -> (B,N,heads*c).

    >>> attend_heads(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8)).shape
    torch.Size([1, 4, 16])
    """
    if q.device.type == "cpu" and q.requires_grad and k.dtype != torch.float32 and q.shape[2] * k.shape[2] <= 1024**2:
        out = _attend_plainly(q, k, v)  # below float32 the CPU's fused kernel is several times slower backwards
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b heads n c -> b n (heads c)")


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v, size = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), q.shape
    weights = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=size[-1] ** -0.5).softmax(-1)
    return torch.bmm(weights.to(v.dtype), v).view(size)                         # (B,heads,N,C/heads)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, guided-diffusion's form.

    `new_attention_order` tells how the 3C outputs of `qkv` are laid out: (q,k,v) x heads, or heads x (q,k,v) (legacy).
    """

    def __init__(self, channels: int, num_heads: int = 1, new_attention_order: bool = False, norm_groups: int = 32):
        super().__init__()
        self.num_heads = num_heads
        self.new_attention_order = new_attention_order
        self.norm = GroupNorm32(channels, norm_groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        qkv = F.linear(tokens, self.qkv.weight[:, :, 0], self.qkv.bias)         # (B,N,3C)
        order = "(qkv heads c)" if self.new_attention_order else "(heads qkv c)"
        q, k, v = rearrange(qkv, f"b n {order} -> qkv b n (heads c)", qkv=3, heads=self.num_heads)
        h = attend(q, k, v, self.num_heads)
        h = F.linear(h, self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[-2])


class CrossAttention(nn.Module):
    """Attention of x (B,N,C) to a context (B,M,D), or to itself. bias: of queries, keys and values."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias)
        self.to_k = nn.Linear(context_dim or query_dim, inner, bias)
        self.to_v = nn.Linear(context_dim or query_dim, inner, bias)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def ignores_query(self, context: Tensor) -> bool:
        """Is the output (B,1,C) for any x? A single key has weight 1 whatever the query."""
        return context.shape[1] == 1 and not (self.training and self.to_out[1].p)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        if not self.training and self.ignores_query(context):
            return self.to_out(self.to_v(context))
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    """Gated linear unit with GELU (arXiv:2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Transformer feed-forward layer of 4 times the width. inner: makes the layer to it, with its activation."""

    def __init__(self, dim: int, dropout: float = 0.0, inner: Callable[[int, int], nn.Module] = GEGLU):
        super().__init__()
        self.net = nn.Sequential(inner(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each pre-normalised and residual."""

    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int | None, dropout: float = 0.0):
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim_head, dropout)
        self.ff = FeedForward(dim, dropout)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = _residual(x, self.attn1(self.norm1(x)))
        asking = x[:, :1] if context is not None and self.attn2.ignores_query(context) else x
        x = _residual(x, self.attn2(self.norm2(asking), context))
        return _residual(x, self.ff(self.norm3(x)))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with cross-attention to a context (arXiv:2112.10752)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        dim_head: int,
        depth: int,
        context_dim: int | None,
        dropout: float = 0.0,
        norm_groups: int = 32,
    ):
        super().__init__()
        inner = heads * dim_head
        self.norm = GroupNorm32(channels, norm_groups, eps=1e-6)
        self.proj_in = PointwiseConv(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads, dim_head, context_dim, dropout) for _ in range(depth)
        )
        self.proj_out = zero_module(PointwiseConv(inner, channels))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = self.proj_in.tokens(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out.tokens(h)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[-2])
