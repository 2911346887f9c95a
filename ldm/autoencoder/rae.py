"""Representation autoencoder (RAE, arXiv:2510.11690): the latent is what a frozen DINOv2 says of each patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.dit import patches

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which both halves were trained on
EPS = 1e-5  # beneath the root of the latents' variance


class RepresentationAutoencoder(nn.Module):
    """First stage of a DINOv2 with registers, which encodes, and a ViT-MAE decoder, as published.

    An image of a tile's size is resized to the encoder's; its latent is one value per channel and patch, normalised by
    the mean and variance that training images have there. Other sizes than the tile's are not taken.

    Args:
        channels, depth, num_heads, mlp: width, blocks, heads and MLP width of the encoder, and so of the latent.
        patch_size: pixels of the encoder's patches. registers: tokens beside the class token that belong to no patch.
        positions: along each side of its table, from which the latent's are interpolated.
        grid: latent pixels along each side.
        decoder_size, decoder_depth, decoder_heads, decoder_mlp, decoder_patch: likewise of the decoder.

    >>> stage = RepresentationAutoencoder(8, 1, 2, 16, 7, 4, 3, 3, 12, 1, 2, 24, 4).eval()
    >>> z = stage.latent(torch.zeros(1, 3, 12, 12))
    >>> z.shape, stage.decode(z).shape
    (torch.Size([1, 8, 3, 3]), torch.Size([1, 3, 12, 12]))
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        num_heads: int,
        mlp: int,
        patch_size: int,
        registers: int,
        positions: int,
        grid: int,
        decoder_size: int,
        decoder_depth: int,
        decoder_heads: int,
        decoder_mlp: int,
        decoder_patch: int,
    ):
        super().__init__()
        self.channels, self.downsampling, self.grid = channels, decoder_patch, grid
        self.image_size, self.encoder_size = grid * decoder_patch, grid * patch_size
        self.encoder = PatchEncoder(channels, depth, num_heads, mlp, patch_size, registers, positions)
        self.decoder = PatchDecoder(
            channels, grid, decoder_size, decoder_depth, decoder_heads, decoder_mlp, decoder_patch
        )
        self.register_buffer("latent_mean", torch.zeros(channels, grid, grid))
        self.register_buffer("latent_var", torch.ones(channels, grid, grid))

    def encode(self, x: Tensor) -> Tensor:
        """(B,C,grid,grid) of images (B,3,H,W) in [-1,1] of a tile's size."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"a representation autoencoder works on tiles of {self.image_size} px alone; got "
                f"{x.shape[-1]} x {x.shape[-2]}. Cut images, or take a first stage of convolutions."
            )
        x = (x + 1) / 2
        if self.image_size != self.encoder_size:
            x = F.interpolate(x, (self.encoder_size, self.encoder_size), mode="bicubic", align_corners=False)
        mean, std = _colours(x)
        tokens = self.encoder((x - mean) / std)                                             # (B,grid*grid,C)
        z = tokens.mT.unflatten(2, (self.grid, self.grid))
        return (z - self.latent_mean) / (self.latent_var + EPS).sqrt()

    def latent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B,C,grid,grid); there is nothing to sample, the generator is ignored."""
        return self.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Images (B,3,H,W) of latents (B,C,grid,grid)."""
        if z.shape[-2:] != (self.grid, self.grid):
            raise UserError(
                f"a representation autoencoder decodes tiles of {self.grid} x {self.grid} latent pixels alone; got "
                f"{z.shape[-1]} x {z.shape[-2]}."
            )
        z = z * (self.latent_var + EPS).sqrt() + self.latent_mean
        mean, std = _colours(z)
        return 2 * (self.decoder(z.flatten(2).mT) * std + mean) - 1


def _colours(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3,1,1) of ImageNet's colours."""
    return like.new_tensor(MEAN).view(3, 1, 1), like.new_tensor(STD).view(3, 1, 1)


class PatchEncoder(nn.Module):
    """DINOv2 with registers: images (B,3,H,W) -> tokens (B,N,D) of its patches, normalised without weights."""

    def __init__(self, dim: int, depth: int, heads: int, mlp: int, patch: int, registers: int, positions: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + positions**2, dim) * 0.02)
        self.side = positions
        self.blocks = nn.ModuleList(ViTBlock(dim, heads, mlp, eps=1e-6, scaled=True) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        own, places = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if x.shape[-2:] != (self.side, self.side):
            table = places.mT.unflatten(2, (self.side, self.side)).float()
            table = F.interpolate(table, x.shape[-2:], mode="bicubic", align_corners=False, antialias=True)
            places = table.flatten(2).mT.to(places.dtype)
        x = x.flatten(2).mT + places
        first = [(self.cls_token + own).expand(len(x), -1, -1), self.register_tokens.expand(len(x), -1, -1)]
        tokens = torch.cat([*first, x], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        count = 1 + self.register_tokens.shape[1]
        return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)[:, count:]


class PatchDecoder(nn.Module):
    """The decoder of ViT-MAE: tokens (B,N,C) of a square grid -> images (B,3,H,W), of ImageNet's mean and deviation."""

    def __init__(self, channels: int, grid: int, dim: int, depth: int, heads: int, mlp: int, patch: int):
        super().__init__()
        self.grid, self.patch = grid, patch
        self.embed = nn.Linear(channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", torch.zeros(1, 1 + grid**2, dim))
        self.blocks = nn.ModuleList(ViTBlock(dim, heads, mlp, eps=1e-12, scaled=False) for _ in range(depth))
        self.norm, self.pred = nn.LayerNorm(dim, eps=1e-12), nn.Linear(dim, 3 * patch**2)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.embed(tokens)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return patches(self.pred(self.norm(tokens))[:, 1:], (self.grid, self.grid), self.patch)


class ViTBlock(nn.Module):
    """Attention and an MLP with exact GELU, each a residual, scaled value by value or not."""

    def __init__(self, dim: int, heads: int, mlp: int, eps: float, scaled: bool):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, mlp), nn.Linear(mlp, dim)
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(dim)) if scaled else None for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + (seen if self.scale1 is None else seen * self.scale1)
        made = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + (made if self.scale2 is None else made * self.scale2)
