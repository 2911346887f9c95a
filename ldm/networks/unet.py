"""The denoising UNet of CompVis latent-diffusion and OpenAI guided-diffusion, one network for both.

Attribute names (`time_embed`, `label_emb`, `input_blocks`, `middle_block`, `output_blocks`, `out`) are those of the
published code, so published checkpoints load by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.networks.layers import (
    AttentionBlock,
    Downsample,
    GroupNorm32,
    ResBlock,
    SpatialTransformer,
    Upsample,
    timestep_embedding,
    zero_module,
)
from ldm.networks.takes import Takes


class TimestepEmbedSequential(nn.Sequential):
    """A sequence whose layers get the time embedding or the context where they take one."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """UNet with attention and conditioning by cross-attention, class label or an added vector.

    Args:
        in_channels, out_channels: channels of the input (with concatenated conditions) and of the prediction.
        model_channels: width of the first level; every level's width must be a multiple of norm_groups.
        num_res_blocks: residual blocks per level (one more on the way up).
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which attention is applied.
        channel_mult: width of each level in units of model_channels.
        num_heads / num_head_channels: give one; the latter fixes the width of a head instead of their number.
        num_heads_upsample: heads on the way up, where num_heads counts them; -1 is num_heads.
        use_spatial_transformer, transformer_depth, context_dim: cross-attention to a context (B,L,context_dim).
        num_classes: labels y (B,) are embedded and added to the time embedding.
        use_scale_shift_norm, resblock_updown, use_new_attention_order: guided-diffusion's options.
        use_checkpoint: trade compute for memory while training.
        image_size: recorded, as published configs do; the network takes any size that its levels divide.
        norm_groups: groups of every group normalisation; 32 in the published models.
        stem_channels: width of the first convolution; None is model_channels, guided-diffusion has the first level's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        dropout: float = 0.0,
        conv_resample: bool = True,
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        num_classes: int | None = None,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_checkpoint: bool = False,
        image_size: int | None = None,
        norm_groups: int = 32,
        stem_channels: int | None = None,
        num_heads_upsample: int = -1,
    ):
        super().__init__()
        if (num_heads == -1) == (num_head_channels == -1):
            raise UserError("the UNet takes either num_heads or num_head_channels; give exactly one of them.")
        if use_spatial_transformer != (context_dim is not None):
            raise UserError("the UNet's use_spatial_transformer and context_dim go together; give both or neither.")
        widths, stem = [int(mult * model_channels) for mult in channel_mult], stem_channels or model_channels
        if wrong := [width for width in (stem, *widths) if width % norm_groups]:
            raise UserError(f"every level's width must be a multiple of {norm_groups} (norm_groups); got {wrong[0]}.")
        self.model_channels, self.context_dim, self.num_classes = model_channels, context_dim, num_classes
        self.divisor = 2 ** (len(channel_mult) - 1)
        self.use_checkpoint = use_checkpoint
        emb = 4 * model_channels

        def attention(channels: int, count: int = num_heads) -> nn.Module:
            heads = count if num_head_channels == -1 else channels // num_head_channels
            if channels % heads:
                raise UserError(f"{heads} attention heads do not divide a level of {channels} channels.")
            if use_spatial_transformer:
                return SpatialTransformer(
                    channels, heads, channels // heads, transformer_depth, context_dim, dropout, norm_groups
                )
            return AttentionBlock(channels, heads, use_new_attention_order, norm_groups)

        def res(channels: int, out: int, **resample: bool) -> ResBlock:
            return ResBlock(channels, emb, out, dropout, use_scale_shift_norm, norm_groups=norm_groups, **resample)

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)

        channels = stem
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skips, factor = [channels], 1
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(channels, width)]
                channels = width
                if factor in attention_resolutions:
                    layers.append(attention(channels))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(channels)
            if level != len(widths) - 1:
                down = res(channels, channels, down=True) if resblock_updown else Downsample(channels, conv_resample)
                self.input_blocks.append(TimestepEmbedSequential(down))
                skips.append(channels)
                factor *= 2

        self.middle_block = TimestepEmbedSequential(
            res(channels, channels), attention(channels), res(channels, channels)
        )

        self.output_blocks = nn.ModuleList()
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        for level, width in reversed(list(enumerate(widths))):
            for block in range(num_res_blocks + 1):
                layers = [res(channels + skips.pop(), width)]
                channels = width
                if factor in attention_resolutions:
                    layers.append(attention(channels, heads_up))
                if level and block == num_res_blocks:
                    layers.append(
                        res(channels, channels, up=True) if resblock_updown else Upsample(channels, conv_resample)
                    )
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            GroupNorm32(channels, norm_groups), nn.SiLU(), zero_module(nn.Conv2d(channels, out_channels, 3, padding=1))
        )
        self.takes = Takes(
            in_channels,
            out_channels,
            image_size,
            context_dim,
            emb,
            num_classes=num_classes,
            skips=len(self.input_blocks) - 1,
        )

    @property
    def stages(self) -> list[nn.Module]:
        """Its blocks in the order in which they run."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        """Predict (B,out_channels,H,W) from x (B,in_channels,H,W) and timesteps (B,), integer or fractional.

        Timesteps (1,) are those of all samples, embedded once.

        context (B,L,context_dim) is attended to, y (B,) is a class label, vector (B,4*model_channels) is added to
        the time embedding.
        """
        return self.run(x, timesteps, context, y, vector)[0]

    def run(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
        shallow: int = 1,
        deep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and the features (B,C',H',W') that reach the last `shallow` blocks; given as `deep`, they are
        taken as they are and only the first and the last `shallow` blocks run."""
        if x.shape[-1] % self.divisor or x.shape[-2] % self.divisor:
            raise ValueError(f"height and width must be multiples of {self.divisor}; got {tuple(x.shape[-2:])}")
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("class labels y must be given if and only if the UNet has num_classes")
        if (context is not None) != (self.context_dim is not None):
            raise ValueError("a context must be given if and only if the UNet has a context_dim")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))   # (B or 1,E)
        if y is not None:
            emb = emb + self.label_emb(y)
        if vector is not None:
            emb = emb + vector

        skips: list[Tensor] = []
        for block in self.input_blocks if deep is None else self.input_blocks[:shallow]:
            x = self._run(block, x, emb, context)
            skips.append(x)
        if deep is None:
            deep = self._run(self.middle_block, x, emb, context)
            for block in self.output_blocks[:-shallow]:
                deep = self._run(block, torch.cat([deep, skips.pop()], dim=1), emb, context)
        x = deep
        for block in self.output_blocks[-shallow:]:
            x = self._run(block, torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x), deep

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, emb, context, use_reentrant=False)
        return block(x, emb, context)
