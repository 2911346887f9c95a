"""The UNet of "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239, appendix B) under its PyTorch names.

MIDiffusion (IEEE TMI 2024) was published with it, as were DDIM and SDEdit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.layers import Conv3x3, GroupNorm32, PointwiseConv, Upsample, attend
from ldm.networks.takes import Takes

GROUPS = 32


def original_timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B,dim) of timesteps (B,) as DDPM published it: sines first, frequencies 1 to 1/10000.

    >>> original_timestep_embedding(torch.tensor([0, 1]), 4)
    tensor([[0.0000e+00, 0.0000e+00, 1.0000e+00, 1.0000e+00],
            [8.4147e-01, 1.0000e-04, 5.4030e-01, 1.0000e+00]])
    """
    half = dim // 2
    step = math.log(10000) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=timesteps.device) * -step)
    angles = timesteps.float()[:, None] * frequencies[None]                     # (B,dim/2)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


class ResnetBlock(nn.Module):
    """Residual block; the time embedding (B,emb_channels) is added between its convolutions."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNorm32(channels, GROUPS, eps=1e-6)
        self.conv1 = Conv3x3(channels, out_channels)
        self.temb_proj = nn.Linear(emb_channels, out_channels)
        self.norm2 = GroupNorm32(out_channels, GROUPS, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.nin_shortcut = nn.Identity() if channels == out_channels else PointwiseConv(channels, out_channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(emb))[:, :, None, None].to(h.dtype)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions, one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm32(channels, GROUPS, eps=1e-6)
        self.q = PointwiseConv(channels, channels)
        self.k = PointwiseConv(channels, channels)
        self.v = PointwiseConv(channels, channels)
        self.proj_out = PointwiseConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b (h w) c") for layer in (self.q, self.k, self.v))
        h = attend(q, k, v, heads=1)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    """Downsampling by 2: a strided 3x3 convolution, padded right and below only, or average pooling."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class DDPMUNet(nn.Module):
    """UNet of DDPM: time is added in every block, attention has one head.

    Args:
        in_channels, out_ch: channels of the input (with concatenated conditions) and of the prediction.
        ch, ch_mult: width of the first level; of each level in units of it. Multiples of 32.
        num_res_blocks: residual blocks per level (one more on the way up).
        attn_resolutions: sides in pixels at which attention is applied, counted from `image_size`.
        resamp_with_conv: resample with convolutions, not by pooling alone.
        image_size: side of the images; the network takes any size that its levels divide.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_ch: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
    ):
        super().__init__()
        if any((width := ch * mult) % GROUPS for mult in (1, *ch_mult)):
            raise UserError(f"every level's width must be a multiple of {GROUPS} (group normalisation); got {width}.")
        self.takes, self.ch = Takes(in_channels, out_ch, image_size), ch
        self.divisor = 2 ** (len(ch_mult) - 1)

        def block(channels: int, out: int) -> ResnetBlock:
            return ResnetBlock(channels, out, 4 * ch, dropout)

        def level(inputs: Sequence[int], out: int, side: int) -> nn.Module:
            module = nn.Module()
            module.block = nn.ModuleList(block(channels, out) for channels in inputs)
            module.attn = nn.ModuleList(AttnBlock(out) for _ in inputs if side in attn_resolutions)
            return module

        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        widths = [ch, *(ch * mult for mult in ch_mult)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        levels = list(enumerate(pairwise(widths)))
        for i, (before, width) in levels:
            down = level([before, *[width] * (num_res_blocks - 1)], width, image_size >> i)
            if i + 1 < len(levels):
                down.downsample = Downsample(width, resamp_with_conv)
            self.down.append(down)
        self.mid = nn.Module()
        self.mid.block_1 = block(widths[-1], widths[-1])
        self.mid.attn_1 = AttnBlock(widths[-1])
        self.mid.block_2 = block(widths[-1], widths[-1])
        for i, (before, width) in levels:
            below = widths[min(i + 2, len(levels))]  # what comes up from the coarser level
            inputs = [below + width, *[2 * width] * (num_res_blocks - 1), width + before]
            up = level(inputs, width, image_size >> i)
            if i:
                up.upsample = Upsample(width, resamp_with_conv)
            self.up.append(up)
        self.norm_out = GroupNorm32(ch * ch_mult[0], GROUPS, eps=1e-6)
        self.conv_out = nn.Conv2d(ch * ch_mult[0], out_ch, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Predict (B,out_ch,H,W) from x (B,in_channels,H,W) and timesteps (B,)."""
        if x.shape[-1] % self.divisor or x.shape[-2] % self.divisor:
            raise ValueError(f"height and width must be multiples of {self.divisor}; got {tuple(x.shape[-2:])}")
        first, second = self.temb.dense
        emb = second(F.silu(first(original_timestep_embedding(timesteps, self.ch))))
        x = self.conv_in(x)
        skips = [x]
        for down in self.down:
            for i, block in enumerate(down.block):
                x = block(x, emb)
                if len(down.attn):
                    x = down.attn[i](x)
                skips.append(x)
            if hasattr(down, "downsample"):
                x = down.downsample(x)
                skips.append(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x, emb)), emb)
        for up in reversed(self.up):
            for i, block in enumerate(up.block):
                x = block(torch.cat([x, skips.pop()], dim=1), emb)
                if len(up.attn):
                    x = up.attn[i](x)
            if hasattr(up, "upsample"):
                x = up.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))
