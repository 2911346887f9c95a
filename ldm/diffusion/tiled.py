"""Tiling: a denoiser over a canvas of any size, made from a denoiser over windows.

Positions and sizes are in latent pixels. The condition of a window comes from `condition(corners)`, so that every
window has its own; the cond given to the canvas denoiser is not looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoiser
from ldm.rng import fold

Corner = tuple[int, int]
WindowCondition = Callable[[Sequence[Corner]], Cond]


def fixed_starts(size: int, window: int, stride: int) -> list[int]:
    """Window starts along one axis: every `stride`, the last moved inwards so that the axis is covered exactly."""
    if window > size:
        raise ValueError(f"a canvas side of {size} is smaller than the window of {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be in 1..{window}, the window; got {stride}")
    return sorted({min(start, size - window) for start in range(0, size - window + stride, stride)})


def shifted_starts(size: int, window: int, offset: int) -> list[int]:
    """Starts of adjoining windows moved by -offset (0 <= offset < window), the outer ones moved inwards."""
    if window > size:
        raise ValueError(f"a canvas side of {size} is smaller than the window of {window}")
    return sorted({min(max(start, 0), size - window) for start in range(-offset, size, window)})


def _over_windows(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, corners: Sequence[Corner], window: int, condition: WindowCondition,
    batch_size: int, device: torch.device | None,
) -> Tensor:  # fmt: skip
    """Denoise every window of the canvas x (B,C,H,W), at most batch_size at a time, and average where they overlap."""
    device = device or x.device
    total, weight = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    for row, col in corners:
        weight[..., row : row + window, col : col + window] += 1
    for image in range(len(x)):
        for start in range(0, len(corners), batch_size):
            chunk = corners[start : start + batch_size]
            windows = torch.stack([x[image, :, r : r + window, c : c + window] for r, c in chunk]).to(device)
            level = sigma[image].to(device).expand(len(chunk))
            x0 = denoiser(windows, level, condition(chunk)).to(total)
            for (r, c), part in zip(chunk, x0):
                total[image, :, r : r + window, c : c + window] += part
    return total / weight


def tiled(
    denoiser: Denoiser, window: int, stride: int, condition: WindowCondition, batch_size: int = 16,
    device: torch.device | None = None,
) -> Denoiser:  # fmt: skip
    """Overlapping windows at fixed offsets, their x0 averaged (MultiDiffusion, arXiv:2302.08113; as published for
    large histology images, arXiv:2312.07330). A step costs about (window/stride)^2 evaluations per window area.
    """

    def canvas(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        rows, cols = (fixed_starts(size, window, stride) for size in x.shape[-2:])
        corners = [(row, col) for row in rows for col in cols]
        return _over_windows(denoiser, x, sigma, corners, window, condition, batch_size, device)

    return canvas


def shifted(
    denoiser: Denoiser, window: int, condition: WindowCondition, batch_size: int = 16, seed: int = 0,
    device: torch.device | None = None,
) -> Denoiser:  # fmt: skip
    """Adjoining windows at an offset drawn anew at every noise level: one evaluation per window area and step.

    The offset is a function of seed and sigma, so the denoiser keeps no state. Windows overlap only at the canvas'
    border, where outer ones are moved inwards. A canvas of one window is denoised as it would be without tiling.
    """

    def canvas(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        bits = struct.unpack("<I", struct.pack("<f", float(sigma[0])))[0]
        rows, cols = (
            shifted_starts(size, window, fold(seed, bits, axis) % window) for axis, size in enumerate(x.shape[-2:])
        )
        corners = [(row, col) for row in rows for col in cols]
        return _over_windows(denoiser, x, sigma, corners, window, condition, batch_size, device)

    return canvas
