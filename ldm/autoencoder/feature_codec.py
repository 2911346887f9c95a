"""The first stage of grids of features: few whitened channels and back, of which a diffusion model makes new grids.

A grid of features of tiles is an image of D channels, NaN where there is no tile (glass). Neighbouring channels of an
encoder tell much the same: a principal component analysis keeps the share of their variance that is asked for. What
it leaves out is texture: no model learns it, it is drawn (`FeatureCodec.texture`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError

DRAWN = 0.99  # of the variance that kept and drawn components have together, at least
SPAN = 2.5  # deviations of a component from dark to bright in a picture


class FeatureCodec(nn.Module):
    """Grids (B,D,h,w) of features, NaN at holes <-> latents (B,channels,h,w): whitened components, and where tissue is.

    The last channel is 1 where there is a tile and -1 at holes, whose other channels are 0. Decoded, a place is a hole
    where that channel is below 0. `fit_codec` makes one of features.

    Args:
        dim: D, of the features. channels: of the latent, one more than the components that are kept.
        glass: whether it knows the feature of glass, `glass` (D,), which takes the place of holes in an image.
        rest: further components, that are drawn.
    """

    downsampling = 1

    def __init__(self, dim: int, channels: int, glass: bool = False, rest: int = 0):
        super().__init__()
        if not 1 <= channels - 1 <= dim:
            raise UserError(f"a codec of {dim} features has 2 to {dim + 1} channels; got {channels}.")
        self.dim, self.channels = dim, channels
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("components", torch.eye(dim, channels - 1))        # (D,K), orthonormal columns
        self.register_buffer("std", torch.ones(channels - 1))
        self.register_buffer("glass", torch.zeros(dim) if glass else None)
        self.register_buffer("rest", torch.zeros(dim, rest) if rest else None)  # (D,R), each as long as its deviation

    def encode(self, x: Tensor) -> Tensor:
        """(B,channels,h,w) of grids (B,D,h,w). UserError: another D."""
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise UserError(
                f"the first stage takes grids of features (B, {self.dim}, rows, cols); got {tuple(x.shape)}."
            )
        known = ~x.isnan().any(1, keepdim=True)
        centred = torch.where(known, x.float() - self.mean[:, None, None], 0.0)
        with torch.autocast(x.device.type, enabled=False):  # in float32 whatever the network is trained in
            z = torch.einsum("bdhw,dk->bkhw", centred, self.components / self.std)
        return torch.cat([z, torch.where(known, 1.0, -1.0).to(z)], 1)

    def latent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B,channels,h,w); there is nothing to sample, the generator is ignored."""
        return self.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Grids (B,D,h,w) of latents (B,channels,h,w), NaN at holes."""
        x = torch.einsum("bkhw,dk->bdhw", z[:, :-1], self.components * self.std) + self.mean[:, None, None]
        return torch.where(z[:, -1:] < 0, torch.nan, x)

    def texture(self, noise: Tensor, overlap: int) -> Tensor:
        """What the kept components leave out, drawn: (B,D,h,w) of white noise (B,R,h+overlap-1,w+overlap-1).

        Tiles share it as far as they overlap, overlap being the side of a tile in strides: tiles i strides apart have a
        correlation of 1 - i / overlap.

        >>> codec = fit_codec([torch.randn(100, 4)], share=0.5)[0]
        >>> codec.texture(torch.randn(1, codec.rest.shape[1], 8, 8), overlap=4).shape
        torch.Size([1, 4, 5, 5])
        """
        shared = F.avg_pool2d(noise.float(), overlap, 1) * overlap
        return torch.einsum("brhw,dr->bdhw", shared, self.rest)

    def picture(self, x: Tensor) -> Tensor:
        """Pictures (B,3,h,w) in [-1,1] of grids (B,D,h,w): the first three components as colours, glass white."""
        z = self.encode(x)
        shown = z[:, :-1][:, [min(k, self.channels - 2) for k in range(3)]] / SPAN
        return torch.where(z[:, -1:] < 0, 1.0, shown.clamp(-1, 1))


def fit_codec(batches: Iterable[Tensor], share: float, glass: Tensor | None = None) -> tuple[FeatureCodec, float]:
    """The codec of features, in batches (N,D), that keeps at least `share` of their variance, and the share it keeps.

    Components are the leading eigenvectors of the covariance, summed up in float64; those after them, up to DRAWN of
    the variance, are drawn. glass: (D,) feature of glass.
    UserError: a share outside of 0..1, fewer features than dimensions of one, features that do not differ.

    >>> features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    >>> codec, kept = fit_codec([features], share=0.8)
    >>> codec.channels, kept
    (5, 0.8591)
    """
    if not 0 < share <= 1:
        raise UserError(f"the share of the variance that is kept is above 0 and up to 1; got {share:g}.")
    count, total, squares = 0, 0.0, 0.0
    for batch in batches:
        values = batch.double()
        count, total, squares = count + len(values), total + values.sum(0), squares + values.T @ values
    if count < 2:
        raise UserError(f"a codec is fitted to two or more features; there are {count}.")
    mean = total / count
    values, vectors = torch.linalg.eigh(squares / count - torch.outer(mean, mean))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if values[0] <= 1e-12:
        raise UserError("the features are all the same; a codec needs some that differ.")
    kept = values.cumsum(0) / values.sum()
    number = min(int((kept < share - 1e-9).sum()) + 1, int((values > 1e-9 * values[0]).sum()))
    told = max(min(int((kept < DRAWN).sum()) + 1, len(mean)), number)
    codec = FeatureCodec(len(mean), number + 1, glass is not None, told - number)
    codec.mean.copy_(mean)
    codec.components.copy_(vectors[:, :number])
    codec.std.copy_(values[:number].sqrt())
    if codec.rest is not None:
        codec.rest.copy_(vectors[:, number:told] * values[number:told].sqrt())
    if glass is not None:
        codec.glass.copy_(glass)
    return codec.eval().requires_grad_(False), float(kept[number - 1])
