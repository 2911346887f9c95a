"""Locale-based mutual information (LMI) of two images, and a UNet that is conditioned on it.

MIDiffusion (IEEE TMI 2024): images of different modality are compared by what their neighbourhoods tell of each
other, not by their grey levels, so a model trained on the target modality alone translates from any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.networks.takes import declared

EPS = 1e-10
TAIL = 1e-8  # of a level's largest kernel value: what is smaller is left out of the joint histograms
FLOOR = 1e-18  # kernel values below count as 0: nothing beside EPS, and their products would be slow, denormal numbers
SEEN = 0.01  # sum of a level's kernel: a patch of one such level tells nothing of a pixel of such a level
ROUNDING = 2.0**-25  # of float32 in [-1, 1]
ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}  # of joint histograms in memory at a time


@torch.no_grad()
def lmi_map(
    source: Tensor, target: Tensor, patch: int = 3, bins: int = 27, sigma: float = 2.0, normalized: bool = True
) -> Tensor:
    """How much the neighbourhood of each pixel tells of the target's around the same place, (B,C,H,W).

    Values are grey levels trunc(255 v); histograms are soft, a level v adds exp(-((v - bin) / 2 sigma^2)^2 / 2) to
    each of `bins` bins over 0..255; what lies far outside [0, 1] adds nothing. The patch of the source is compared
    with patch^2 candidates of the target, and the largest mutual information of the paired pixels counts (in bits, or
    normalized: twice it over the sum of both entropies; the published map in all its details, such as _candidates that
    are no plain shifts of the patch, zeros around the image, and 2 where both patches are far outside the range).

    Each pixel needs histograms only over the bins that its two patches reach; pixels with windows of the same size
    are computed together, few at a time. A source patch of one grey level, as on black ground, tells nothing: 0.

    Args:
        source, target: (B,C,H,W) around [0, 1]; any device, the same one. Colours are taken one by one, then always
            normalized. A colour target of a gray source counts by its first channel, normalized, then each map is
            scaled to [0, 1].
        patch: odd side of a neighbourhood.

    >>> image = torch.linspace(0, 1, 36).view(1, 1, 6, 6)
    >>> targets = {"itself": image, "inverted": 1 - image, "flat": torch.full_like(image, 0.5)}
    >>> {name: round(float(lmi_map(image, target)[0, 0, 2, 2]), 2) for name, target in targets.items()}
    {'itself': 0.44, 'inverted': 0.44, 'flat': 0.0}
    """
    if patch < 3 or patch % 2 == 0:
        raise UserError(f"the patch of an LMI map must have an odd side of at least 3; got {patch}.")
    if not 2 <= bins <= 256 or sigma <= 0:
        raise UserError(f"an LMI map takes 2 to 256 bins and a sigma above 0; got {bins} and {sigma:g}.")
    colour_of_gray = source.shape[1] == 1 and target.shape[1] > 1
    if colour_of_gray:
        target, normalized = target[:, :1], True
    if source.shape != target.shape:
        raise ValueError(f"source and target differ in shape: {tuple(source.shape)} and {tuple(target.shape)}")
    size = source.shape
    with torch.autocast(source.device.type, enabled=False):
        table = _Kernels(bins, sigma, source.device)
        images = [table.levels(image.reshape(-1, *size[2:])) for image in (source, target)]  # 2 x (BC,H,W)
        found = _largest(images, table, patch, normalized or size[1] > 1).view(size)
    if colour_of_gray:
        low, high = found.amin((1, 2, 3), keepdim=True), found.amax((1, 2, 3), keepdim=True)
        found = (found - low) / (high - low).clamp(min=EPS)
    return found.to(source.dtype)


class _Kernels:
    """The soft histogram of every grey level: `values` (L,bins), their `sums` (L,), and the bins `low`..`high` that a
    level reaches. Levels so far outside 0..255 that they reach none share the two ends of the table."""

    def __init__(self, bins: int, sigma: float, device: torch.device):
        width = 2 * sigma**2
        self.bins, self.reach = bins, int(10 * width) + 1  # exp(-10^2 / 2) is below FLOOR
        levels = torch.arange(-self.reach, 256 + self.reach, device=device).float()
        centres = torch.linspace(0, 255, bins, device=device)
        self.values = F.threshold(torch.exp(-0.5 * ((levels[:, None] - centres) / width) ** 2), FLOOR, 0.0)
        self.sums = self.values.sum(1)
        reached = (self.values >= TAIL * self.values.amax(1, keepdim=True)) & (self.values > 0)
        place = torch.arange(bins, device=device)
        self.low = torch.where(reached, place, bins).amin(1)
        self.high = torch.where(reached, place, -1).amax(1)
        self._windows: dict[int, Tensor] = {}

    def levels(self, image: Tensor) -> Tensor:
        """Rows of the table for an image's values."""
        return (image.float() * 255).nan_to_num().clamp(-self.reach, 255 + self.reach).int() + self.reach

    def window(self, levels: Tensor, low: Tensor, width: int) -> Tensor:
        """Kernels (*levels.shape, width) of levels (n,...) over bins low (n,) to low + width."""
        if width not in self._windows:
            self._windows[width] = self.values.unfold(1, width, 1).reshape(-1, width)
        starts = self.bins - width + 1
        rows = levels * starts + low.view(-1, *[1] * (levels.ndim - 1))
        return self._windows[width].index_select(0, rows.flatten()).view(*levels.shape, width)


def _largest(images: Sequence[Tensor], table: _Kernels, patch: int, normalized: bool) -> Tensor:
    """The map (N,H,W) of the levels (N,H,W) of source and target."""
    (n, h, w), device, half = images[0].shape, images[0].device, patch // 2
    around = [F.pad(image, [half] * 4, value=table.reach) for image in images]  # zeros around the image
    side = w + 2 * half
    base = torch.arange(n, device=device) * (h + 2 * half) * side                            # (N,): an image's first

    def windows(image: Tensor) -> tuple[Tensor, Tensor]:
        """First bin and number of bins, in fours, that the patch of each pixel reaches, (NHW,) each."""
        low, high = (F.max_pool2d(ends[image].float(), patch, 1) for ends in (-table.low, table.high))
        low = -low
        width = ((high - low + 4) // 4 * 4).clamp(4, table.bins)
        low = torch.minimum(low, table.bins - width)
        return low.flatten().long(), width.flatten().long()

    (low1, width1), (low2, width2) = (windows(image) for image in around)
    rows = torch.arange(patch, device=device) + torch.arange(h, device=device)[:, None]      # (H,P)
    cols = torch.arange(patch, device=device) + torch.arange(w, device=device)[:, None]
    own = base[:, None, None, None, None] + rows[:, None, :, None] * side + cols[None, :, None, :]
    own = rearrange(own, "n h w i j -> (n h w) (i j)")
    rows, cols = (_candidates(length, patch, device) for length in (h, w))                   # (H,P,P): pixel, candidate
    flat = around[0].float()
    plain = F.max_pool2d(flat, patch, 1) == -F.max_pool2d(-flat, patch, 1)
    plain &= (table.sums[images[0]] > SEEN) & (table.sums[images[1]] > SEEN)
    source, target = (image.flatten() for image in around)
    found = torch.zeros(n * h * w, device=device)
    scratch = _Scratch(device)
    for chosen, first, second in _groups(width1, width2, patch, (~plain).flatten().nonzero()[:, 0]):
        y, x = chosen // w % h, chosen % w
        pairs = (
            base[chosen // (h * w), None, None, None, None]
            + rows[y][:, :, None, :, None] * side
            + cols[x][:, None, :, None, :]
        )
        pairs = rearrange(pairs, "n i j k l -> n (i j) (k l)")                                # (n,pixel,candidate)
        levels1, levels2 = source[own[chosen]], target[pairs]
        k1 = table.window(levels1, low1[chosen], first)                                      # (n,pixel,w1)
        k2 = table.window(levels2, low2[chosen], second)                                     # (n,pixel,candidate,w2)
        found[chosen] = _information(k1, k2, table.sums[levels1], table.sums[levels2], normalized, scratch).amax(1)
    return found


def _candidates(length: int, patch: int, device: torch.device | str = "cpu") -> Tensor:
    """Along one axis, the target's pixels (length,pixel,candidate) that pair with those of the patch at each place.

    Counted from `patch // 2` before the image's first, where zeros lie. The published code spreads the image to one
    patch beside the other and takes patches of that: candidate c's pixel i is what lies at patch * y + c + i - half
    there, so the row after a patch's last is the next pixel's first.
    """
    half = patch // 2
    i, c = torch.arange(patch, device=device)[:, None], torch.arange(patch, device=device)
    spread = patch * torch.arange(length, device=device).view(-1, 1, 1) + c + i - half
    inside = (spread >= 0) & (spread < patch * length)
    return torch.where(inside, spread // patch + spread % patch, 0)


class _Scratch:
    """Two pieces of memory that all parts of the work use one after the other."""

    def __init__(self, device: torch.device):
        self.memory = torch.empty(2, 0, device=device)

    def take(self, *shape: int) -> tuple[Tensor, Tensor]:
        size = math.prod(shape)
        if self.memory.shape[1] < size:
            self.memory = self.memory.new_empty(2, size)
        first, second = self.memory[:, :size].view(2, *shape)
        return first, second


def _groups(width1: Tensor, width2: Tensor, patch: int, which: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """Pixels of `which` whose patches reach equally many bins, few at a time: indices, bins of source and of target."""
    budget = ELEMENTS["cpu" if width1.device.type == "cpu" else "cuda"]
    keys, order = (width1 * 1024 + width2)[which].sort()
    order = which[order]
    found, counts = keys.unique_consecutive(return_counts=True)
    for key, members in zip(found.tolist(), order.split(counts.tolist())):
        first, second = divmod(key, 1024)
        for chosen in members.split(max(1, budget // (first * second * patch**2))):
            yield chosen, first, second


def _information(k1: Tensor, k2: Tensor, sums1: Tensor, sums2: Tensor, normalized: bool, scratch: _Scratch) -> Tensor:
    """Mutual information (n,candidate) of paired pixels.

    Args:
        k1 (n,pixel,w1), k2 (n,pixel,candidate,w2): kernels; sums1 (n,pixel), sums2 (n,pixel,candidate): over all bins.
    """
    n, pixels, count, width = k2.shape
    joint_sum = (sums1[..., None] * sums2).sum(1) + EPS                                      # (n,candidate)
    k2 /= joint_sum[:, None, :, None]
    first = torch.cat([k1, torch.ones_like(k1[..., :1])], 2)                                 # its last row gives p2
    joint, logs = scratch.take(n, first.shape[2], count * width)
    torch.bmm(first.transpose(1, 2), k2.view(n, pixels, count * width), out=joint)           # (n,w1+1,candidate*w2)
    p2 = joint[:, -1].view(n, count, width) * (joint_sum / (sums2.sum(1) + pixels * EPS))[..., None]
    p1 = k1.sum(1) / (sums1.sum(1, keepdim=True) + pixels * EPS)
    h1, h2 = (-(p * (p + EPS).log2()).sum(-1) for p in (p1, p2))
    torch.add(joint, EPS, out=logs).log2_().mul_(joint)
    h12 = -logs[:, :-1].sum(1).view(n, count, width).sum(2)
    information = h1[:, None] + h2 - h12
    return 2 * (information + EPS) / (h1[:, None] + h2 + EPS) if normalized else information


def lmi_score(
    source: Tensor, target: Tensor, window: int = 9, stride: int = 4, bins: int = 27, sigma: float = 2.0
) -> Tensor:
    """How much windows of the source tell of the target's at the same place, (B,) from 0; differentiable.

    The mean over windows of 2 I / (H1 + H2), each window's grey levels counted in soft histograms of the kernel of
    `lmi_map`, but at no whole levels, so that a gradient leads to the target (`ldm.diffusion.guidance`). The kernel
    keeps it below 1, to which only sharp histograms of an image and itself would come. Windows of one grey level in
    the source, as on black ground, tell nothing and are left out.

    Args:
        source, target: (B,C,H,W) around [0, 1], of equally many channels, taken one by one.
        window: side of a window; stride: pixels between windows. Wider ones than those of `lmi_map`: a gradient needs
            more pairs of pixels than a comparison. sigma: the kernel's width is 2 sigma^2 grey levels.

    >>> image = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    >>> lmi_score(image, 1 - image), lmi_score(image, torch.full_like(image, 0.5))
    (tensor([0.5378]), tensor([0.]))
    """
    if source.shape != target.shape:
        raise ValueError(f"source and target differ in shape: {tuple(source.shape)} and {tuple(target.shape)}")
    if min(source.shape[-2:]) < window:
        raise UserError(f"images of {source.shape[-1]} x {source.shape[-2]} px are smaller than a window of {window}.")
    centres = torch.linspace(0, 255, bins, device=source.device)

    def kernels(image: Tensor) -> Tensor:
        pixels = F.unfold(image.float().flatten(0, 1)[:, None], window, stride=stride)       # (BC,window^2,L)
        pixels = rearrange(pixels, "b p l -> b l p 1") * 255
        return torch.exp(-0.5 * ((pixels - centres) / (2 * sigma**2)) ** 2) + EPS            # (...,bins)

    k1, k2 = kernels(source), kernels(target)
    k1, k2 = k1 / k1.sum(-1, keepdim=True), k2 / k2.sum(-1, keepdim=True)
    joint = k1.transpose(2, 3) @ k2 / window**2                                              # (BC,L,bins,bins)
    h1, h2, h12 = (-(p * (p + EPS).log2()).flatten(2).sum(-1) for p in (k1.mean(2), k2.mean(2), joint))
    flat = kernels(source).mean(2).amax(-1) >= 0.99 * kernels(source).amax((2, 3))           # all pixels alike
    told = torch.where(flat, 0.0, 2 * (h1 + h2 - h12) / (h1 + h2 + EPS))                     # (BC,L)
    counted = (~flat).sum(1).clamp(min=1)
    return (told.sum(1) / counted).view(source.shape[:2]).mean(1)


class LMIUNet(nn.Module):
    """A UNet that sees a source image only through its LMI maps (zero-shot translation, MIDiffusion).

    Its input is x_t and, after it, the source image (`ldm.conditioners.source_image.SourceImage` gives it as "concat"),
    both in [-1, 1]. The UNet gets x_t, LMI(source, x_t) and LMI(source, source); no gradient goes through the maps.

    Args:
        unet: node of the network; its in_channels are three times the image's channels (1 or 3).
        patch, bins, sigma, normalized: as `lmi_map`'s.
        unit: x_t is of images in [0, 1], as the published network's (first stage `UnitFirstStage`); the source is not.

    A sampler's x is float64: rounding of float32 would move some values over the edge of a grey level, and a level is
    worth up to 1e-4 of the sample.
    """

    def __init__(
        self,
        unet: Mapping[str, Any],
        patch: int = 3,
        bins: int = 27,
        sigma: float = 2.0,
        normalized: bool = True,
        unit: bool = False,
    ):
        super().__init__()
        self.unit = unit
        self.unet = instantiate_from_config(unet)
        inner = declared(self.unet)
        self.channels, rest = divmod(inner.in_channels, 3)
        if rest:
            raise UserError(
                "the UNet of an LMIUNet takes an image and two maps of as many channels: its in_channels must be 3 or "
                f"9; got {inner.in_channels}."
            )
        self.takes = replace(inner, in_channels=2 * self.channels, skips=0, dtype=torch.float64)
        self.settings = {"patch": patch, "bins": bins, "sigma": sigma, "normalized": normalized}
        self._of_itself: tuple[Tensor, Tensor] | None = None  # the last source and its map

    def forward(self, x: Tensor, timesteps: Tensor, **condition: Tensor) -> Tensor:
        """The UNet's prediction from x (B,in_channels,H,W) = x_t and source, and timesteps (B,).

        x may be float64, as samplers have it (`takes.dtype`); the UNet computes in float32.
        """
        if x.shape[1] != self.takes.in_channels:
            raise UserError(
                f"an LMIUNet takes {self.channels} channels of the image and {self.channels} of its source; got "
                f"{x.shape[1]} in all. Condition it on a source image alone (SourceImage)."
            )
        image, source = x.float().split(self.channels, dim=1)
        seen = image.detach() if self.unit else _unit(image)
        maps = [lmi_map(_unit(source), seen, **self.settings), self.map_of_itself(source)]
        return self.unet(torch.cat([image, *maps], dim=1), timesteps, **condition)

    def map_of_itself(self, source: Tensor) -> Tensor:
        """LMI(source, source): computed once for all steps of a sampler, which come with the same source."""
        if self.training:
            return lmi_map(_unit(source), _unit(source), **self.settings)
        known = self._of_itself
        if known is None or known[0].device != source.device or not torch.equal(known[0], source):
            known = source.detach().clone(), lmi_map(_unit(source), _unit(source), **self.settings)
            self._of_itself = known
        return known[1]


def _unit(image: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], and a little up: the way to [-1, 1] and back must not put a grey level below itself."""
    return (image.detach() + 1) / 2 + ROUNDING
