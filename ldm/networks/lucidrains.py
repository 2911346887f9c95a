"""The UNet of denoising-diffusion-pytorch in its classifier-free-guidance form, under its parameter names.

The mitotic-figure DPM (DGM4MICCAI 2023) was published with it. Its condition comes as a vector that stands beside the
time embedding; `ldm.conditioners.score.LucidrainsScore` gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.ddpm_unet import original_timestep_embedding
from ldm.networks.layers import GroupNorm32, attend
from ldm.networks.takes import Takes

HEADS, HEAD_CHANNELS = 4, 32


class TimeEmbedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        return original_timestep_embedding(timesteps, self.dim)


class StandardizedConv(nn.Module):
    """3x3 convolution whose filters are standardised, each to mean 0 and variance 1 (arXiv:1903.10520).

    It is not an nn.Conv2d, whose stored weights are those that act: what casts or lays out weights must not touch it.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = F.layer_norm(self.weight.float(), self.weight.shape[1:], eps=1e-5)
        return F.conv2d(x, weight.to(x.dtype), self.bias.to(x.dtype), padding=1)


class ChannelNorm(nn.Module):
    """Normalisation over the channels of each position, with a gain and no bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.g.flatten()
        normed = F.layer_norm(x.movedim(1, -1).float(), gain.shape, gain.float(), eps=1e-5)  # (B,H,W,C)
        return normed.movedim(-1, 1).to(x.dtype).contiguous()


class Block(nn.Module):
    """Convolution, group normalisation, optional scale and shift, SiLU."""

    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.proj = StandardizedConv(channels, out_channels)
        self.norm = GroupNorm32(out_channels, groups)

    def forward(self, x: Tensor, scale_shift: Sequence[Tensor] | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return F.silu(x)


class ResnetBlock(nn.Module):
    """Residual block; its first half is scaled and shifted by the embedding (B,emb_channels)."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, groups: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        self.block1 = Block(channels, out_channels, groups)
        self.block2 = Block(out_channels, out_channels, groups)
        self.res_conv = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale_shift = self.mlp(emb)[:, :, None, None].chunk(2, dim=1)
        return self.block2(self.block1(x, scale_shift)) + self.res_conv(x)


class LinearAttention(nn.Module):
    """Attention whose cost is linear in the positions (arXiv:1812.01243), four heads of 32."""

    def __init__(self, channels: int):
        super().__init__()
        inner = HEADS * HEAD_CHANNELS
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(inner, channels, 1), ChannelNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        qkv = rearrange(self.to_qkv(x), "b (qkv heads c) h w -> qkv b heads c (h w)", qkv=3, heads=HEADS)
        q, k, v = qkv[0].softmax(-2) * HEAD_CHANNELS**-0.5, qkv[1].softmax(-1), qkv[2]
        out = (v / (height * width)) @ k.transpose(-1, -2) @ q
        return self.to_out(rearrange(out, "b heads c (h w) -> b (heads c) h w", h=height))


class Attention(nn.Module):
    """Self-attention over all positions, four heads of 32."""

    def __init__(self, channels: int):
        super().__init__()
        inner = HEADS * HEAD_CHANNELS
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.to_out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(x), "b (qkv c) h w -> qkv b (h w) c", qkv=3)
        out = attend(q, k, v, HEADS)
        return self.to_out(rearrange(out, "b (h w) c -> b c h w", h=x.shape[-2]))


class PreNorm(nn.Module):
    def __init__(self, channels: int, fn: nn.Module):
        super().__init__()
        self.norm, self.fn = ChannelNorm(channels), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class LucidrainsUNet(nn.Module):
    """UNet with linear attention at every level, conditioned by a vector beside the time embedding.

    Args:
        dim: width of the first level. dim_mults: width of each further level in units of it, that of the last is the
            middle's.
        channels: of the image and of the prediction.
        resnet_block_groups: groups of every group normalisation.
        image_size: recorded; the network takes any size that its levels divide.
    """

    def __init__(
        self,
        dim: int,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        resnet_block_groups: int = 8,
        image_size: int | None = None,
    ):
        super().__init__()
        if any((width := dim * mult) % resnet_block_groups for mult in (1, *dim_mults)):
            raise UserError(
                f"every level's width must be a multiple of {resnet_block_groups} (resnet_block_groups); got {width}."
            )
        self.takes = Takes(channels, channels, image_size, vector_dim=4 * dim, needs_vector=True)
        self.divisor = 2 ** (len(dim_mults) - 1)
        widths = [dim, *(dim * mult for mult in dim_mults)]
        levels = list(pairwise(widths))

        def res(channels: int, out: int) -> ResnetBlock:
            return ResnetBlock(channels, out, 8 * dim, resnet_block_groups)

        def attention(channels: int, kind: type[nn.Module] = LinearAttention) -> Residual:
            return Residual(PreNorm(channels, kind(channels)))

        self.init_conv = nn.Conv2d(channels, dim, 7, padding=3)
        self.time_mlp = nn.Sequential(
            TimeEmbedding(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim)
        )
        self.downs = nn.ModuleList()
        for level, (narrow, wide) in enumerate(levels, 1):
            last = level == len(levels)
            down = nn.Conv2d(narrow, wide, 3, padding=1) if last else nn.Conv2d(narrow, wide, 4, stride=2, padding=1)
            self.downs.append(nn.ModuleList([res(narrow, narrow), res(narrow, narrow), attention(narrow), down]))
        middle = widths[-1]
        self.mid_block1 = res(middle, middle)
        self.mid_attn = attention(middle, Attention)
        self.mid_block2 = res(middle, middle)
        self.ups = nn.ModuleList()
        for level, (narrow, wide) in enumerate(reversed(levels), 1):
            up: nn.Module = nn.Conv2d(wide, narrow, 3, padding=1)
            if level < len(levels):
                up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), up)
            self.ups.append(nn.ModuleList([res(wide + narrow, wide), res(wide + narrow, wide), attention(wide), up]))
        self.final_res_block = res(2 * dim, dim)
        self.final_conv = nn.Conv2d(dim, channels, 1)

    def forward(self, x: Tensor, timesteps: Tensor, vector: Tensor | None = None) -> Tensor:
        """Predict (B,channels,H,W) from x (B,channels,H,W), timesteps (B,) and the condition's vector (B,4*dim)."""
        if x.shape[-1] % self.divisor or x.shape[-2] % self.divisor:
            raise ValueError(f"height and width must be multiples of {self.divisor}; got {tuple(x.shape[-2:])}")
        wanted = self.takes.vector_dim
        if vector is None or vector.shape[-1] != wanted:
            given = "none" if vector is None else f"one of dimension {vector.shape[-1]}"
            raise UserError(
                f"the network takes a condition that acts by vector, of dimension {wanted}; got {given}. Use "
                "ldm.conditioners.score.LucidrainsScore with the network's dim."
            )
        time = self.time_mlp(timesteps).expand(len(x), -1)
        emb = torch.cat([time, vector.expand(len(x), -1)], dim=-1)              # (B,8*dim)
        x = first = self.init_conv(x)
        skips: list[Tensor] = []
        for block1, block2, attention, down in self.downs:
            x = block1(x, emb)
            skips.append(x)
            x = attention(block2(x, emb))
            skips.append(x)
            x = down(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, emb)), emb)
        for block1, block2, attention, up in self.ups:
            x = block1(torch.cat([x, skips.pop()], dim=1), emb)
            x = block2(torch.cat([x, skips.pop()], dim=1), emb)
            x = up(attention(x))
        return self.final_conv(self.final_res_block(torch.cat([x, first], dim=1), emb))
