"""Convolutional encoder and decoder of latent-diffusion (Rombach et al. 2022, appendix E; Esser et al. 2021).

Module names are those of CompVis' `ldm.modules.diffusionmodules.model`, so published first stages load by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError, suggest


def _group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nothing else uses: in its place where no gradient needs it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, dropout: float, groups: int):
        super().__init__()
        self.norm1 = _group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C',H,W)
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(self.dropout(_silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions, one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W)
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H/2,W/2); padded right and below only
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,2H,2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _level(blocks: list[nn.Module], attn: list[nn.Module]) -> nn.Module:
    level = nn.Module()
    level.block = nn.ModuleList(blocks)
    level.attn = nn.ModuleList(attn)
    return level


def _mid(channels: int, dropout: float, attention: bool, groups: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels, dropout, groups)
    mid.attn_1 = AttnBlock(channels, groups) if attention else nn.Identity()
    mid.block_2 = ResnetBlock(channels, channels, dropout, groups)
    return mid


class Encoder(nn.Module):
    """Image to latent moments: (B,in_channels,H,W) in [-1,1] -> (B,z,H/f,W/f), f = 2^(levels-1).

    z is `2·z_channels` with `double_z` (mean and log-variance of a KL latent), else `z_channels`. The levels that hold
    attention are those whose size is in `attn_resolutions` for an input of `resolution` px, whatever the real input.
    The published models have attention in the middle too (`mid_attention`) and 32 groups in every GroupNorm.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        resolution: int,
        in_channels: int,
        z_channels: int,
        double_z: bool,
        dropout: float = 0.0,
        mid_attention: bool = True,
        num_groups: int = 32,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            blocks, attn = [], []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(width, ch * mult, dropout, num_groups))
                width = ch * mult
                if resolution // 2**i in attn_resolutions:
                    attn.append(AttnBlock(width, num_groups))
            level = _level(blocks, attn)
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = _mid(width, dropout, mid_attention, num_groups)
        self.norm_out = _group_norm(width, num_groups)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B,3,H,W) -> (B,z,h,w)
        h = self.conv_in(x)
        for level in self.down:
            for j, block in enumerate(level.block):
                h = block(h)
                if len(level.attn):
                    h = level.attn[j](h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(_silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent to image: (B,z_channels,h,w) -> (B,out_ch,h·f,w·f), f = 2^(levels-1). Options as in `Encoder`.

    The last convolution always runs in fp32: 16-bit floats would band the image, and the adaptive weight of the
    adversarial loss is a ratio of gradients at this layer (`ldm.autoencoder.losses`).
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        resolution: int,
        z_channels: int,
        dropout: float = 0.0,
        mid_attention: bool = True,
        num_groups: int = 32,
    ):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _mid(width, dropout, mid_attention, num_groups)
        levels: list[nn.Module] = []
        for i in reversed(range(len(ch_mult))):
            blocks, attn = [], []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(width, ch * ch_mult[i], dropout, num_groups))
                width = ch * ch_mult[i]
                if resolution // 2**i in attn_resolutions:
                    attn.append(AttnBlock(width, num_groups))
            level = _level(blocks, attn)
            if i > 0:
                level.upsample = Upsample(width)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = _group_norm(width, num_groups)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # (B,z,h,w) -> (B,out_ch,H,W)
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            for j, block in enumerate(level.block):
                h = block(h)
                if len(level.attn):
                    h = level.attn[j](h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        h = _silu(self.norm_out(h))
        with torch.autocast(h.device.type, enabled=False):
            return self.conv_out(h.to(self.conv_out.weight.dtype))


_REQUIRED = ("ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "in_channels", "z_channels")
_OPTIONAL = ("double_z", "dropout", "mid_attention", "num_groups")


def build_encoder_decoder(ddconfig: dict, *, double_z: bool) -> tuple[Encoder, Decoder]:
    """The encoder and decoder that a published `ddconfig` describes.

    double_z: what the latent needs: True for KL, False for VQ.
    UserError: a ddconfig that says otherwise, lacks an entry, has an unknown one, or has widths that `num_groups` does
    not divide.

    >>> build_encoder_decoder({"z_channels": 4, "resolution": 64}, double_z=True)
    Traceback (most recent call last):
    ldm.errors.UserError: ddconfig lacks ch, out_ch, ch_mult, num_res_blocks, ...; it needs ...
    """
    dd = dict(ddconfig)
    for key in dd:
        if key not in _REQUIRED + _OPTIONAL:
            raise UserError(f"ddconfig has the unknown entry '{key}'{suggest(key, _REQUIRED + _OPTIONAL)}")
    missing = [key for key in _REQUIRED if key not in dd]
    if missing:
        raise UserError(f"ddconfig lacks {', '.join(missing)}; it needs {', '.join(_REQUIRED)}.")
    if dd.pop("double_z", double_z) != double_z:
        latent = "a KL latent (mean and log-variance)" if double_z else "a VQ latent"
        raise UserError(f"ddconfig.double_z is {not double_z}; {latent} needs double_z: {double_z}.")
    dd["ch_mult"] = tuple(dd["ch_mult"])
    if not dd["ch_mult"] or dd["num_res_blocks"] < 1:
        raise UserError(
            f"ddconfig needs at least one level in ch_mult and one block in num_res_blocks; got {list(dd['ch_mult'])} "
            f"and {dd['num_res_blocks']}."
        )
    widths = [dd["ch"], *(dd["ch"] * mult for mult in dd["ch_mult"])]
    groups = dd.get("num_groups", 32)
    if any(width % groups for width in widths):
        raise UserError(f"ddconfig: num_groups {groups} must divide every width; ch and ch · ch_mult are {widths}.")
    in_channels, out_ch = dd.pop("in_channels"), dd.pop("out_ch")
    return Encoder(in_channels=in_channels, double_z=double_z, **dd), Decoder(out_ch=out_ch, **dd)
