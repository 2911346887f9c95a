"""The downward half of the guided-diffusion UNet as a classifier of noisy images (ADM, arXiv:2105.05233, section 4).

Names of parameters are those of guided-diffusion's `EncoderUNetModel`, so published classifiers load by name.
`ldm.diffusion.guidance.class_log_probability` makes guidance of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.layers import (
    AttentionBlock,
    Downsample,
    GroupNorm32,
    ResBlock,
    attend,
    timestep_embedding,
    zero_module,
)
from ldm.networks.unet import TimestepEmbedSequential

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
HIDDEN = 2048  # of the spatial pools


class AttentionPool2d(nn.Module):
    """Attention from the mean of a feature map (B,C,side,side) to its positions and itself -> (B,out_channels) (CLIP).

    Its qkv layout is (q,k,v) x heads, whatever that of the network before it.
    """

    def __init__(self, side: int, channels: int, head_channels: int, out_channels: int):
        super().__init__()
        self.num_heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(-1, keepdim=True), x], dim=-1)                    # (B,C,N+1)
        if x.shape[-1] != self.positional_embedding.shape[-1]:
            raise ValueError(
                f"the classifier's pool takes {self.positional_embedding.shape[-1] - 1} positions, got "
                f"{x.shape[-1] - 1}; give images of its image_size"
            )
        qkv = self.qkv_proj(x + self.positional_embedding.to(x.dtype))
        q, k, v = rearrange(qkv, "b (qkv c) n -> qkv b n c", qkv=3)
        pooled = attend(q[:, :1], k, v, self.num_heads)                         # (B,1,C), what the mean asks for
        return self.c_proj(pooled.transpose(1, 2))[:, :, 0]


class EncoderUNetModel(nn.Module):
    """Classifier of noisy images: logits (B,out_channels) from x (B,in_channels,H,W) and timesteps (B,).

    Args:
        pool: attention (published classifiers; needs num_head_channels and images of image_size), adaptive (mean of the
            last map), spatial and spatial_v2 (means of all maps, through two layers).
        channel_mult: may be fractions (0.5), as of 512 px.
        others: as `ldm.networks.unet.UNetModel`'s.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ):
        super().__init__()
        if pool not in POOLS:
            raise UserError(f"the classifier's pool must be one of {', '.join(POOLS)}; got '{pool}'.")
        if pool == "attention" and num_head_channels == -1:
            raise UserError("the classifier's attention pool needs num_head_channels, the width of a head.")
        widths = [int(mult * model_channels) for mult in channel_mult]
        if odd := [width for width in widths if width % 32]:
            raise UserError(f"every level's width must be a multiple of 32 (group normalisation); got {odd[0]}.")
        self.image_size, self.model_channels, self.pool = image_size, model_channels, pool
        self.in_channels, self.out_channels = in_channels, out_channels
        emb = 4 * model_channels

        def attention(channels: int) -> nn.Module:
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            if channels % heads:
                raise UserError(f"{heads} attention heads do not divide a level of {channels} channels.")
            return AttentionBlock(channels, heads, use_new_attention_order)

        def res(channels: int, out: int, **resample: bool) -> ResBlock:
            return ResBlock(channels, emb, out, dropout, use_scale_shift_norm, **resample)

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        channels, factor = widths[0], 1
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(in_channels, channels, 3, padding=1))])
        features = channels
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(channels, width)]
                channels = width
                if factor in attention_resolutions:
                    layers.append(attention(channels))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                features += channels
            if level != len(widths) - 1:
                down = res(channels, channels, down=True) if resblock_updown else Downsample(channels, conv_resample)
                self.input_blocks.append(TimestepEmbedSequential(down))
                features += channels
                factor *= 2
        self.middle_block = TimestepEmbedSequential(
            res(channels, channels), attention(channels), res(channels, channels)
        )
        self.out = self._head(channels, features + channels, image_size // factor, num_head_channels)

    def _head(self, channels: int, features: int, side: int, head_channels: int) -> nn.Sequential:
        if self.pool == "spatial":
            return nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, self.out_channels))
        if self.pool == "spatial_v2":
            return nn.Sequential(
                nn.Linear(features, HIDDEN), GroupNorm32(HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, self.out_channels)
            )
        layers: list[nn.Module] = [GroupNorm32(channels), nn.SiLU()]
        if self.pool == "attention":
            return nn.Sequential(*layers, AttentionPool2d(side, channels, head_channels, self.out_channels))
        last = zero_module(nn.Conv2d(channels, self.out_channels, 1))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), last, nn.Flatten())

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        means: list[Tensor] = []
        for block in [*self.input_blocks, self.middle_block]:
            x = block(x, emb, None)
            means.append(x.mean((2, 3)))
        return self.out(torch.cat(means, dim=1) if self.pool.startswith("spatial") else x)
