"""Randomness belongs to the sample: every draw is a pure function of integers that name it.

Batch size, rank count, device and tiling order therefore never change an image, and a resumed run repeats the
draws of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def fold(*words: int) -> int:
    """One 63-bit seed from any number of integers; different tuples give independent seeds (numpy SeedSequence).

    >>> fold(1, 2), fold(2, 1)
    (7764949442709860949, 3304656143886516455)
    """
    entropy = [int(word) & 0xFFFFFFFFFFFFFFFF for word in words]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def generator(*words: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator seeded by `fold(*words)`.

    >>> torch.randn(2, generator=generator(7, 0)), torch.randn(2, generator=generator(7, 1))
    (tensor([-0.5283,  0.6394]), tensor([1.6582, 0.3984]))
    """
    return torch.Generator(device=device).manual_seed(fold(*words))


def sample_noise(seeds: Sequence[int], shape: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal noise (len(seeds), *shape), float32 on the CPU; image i depends on seeds[i] and stream alone.

    `stream` tells the draws of one image apart: 0 is its starting noise, k the noise added at step k.

    >>> pair, one = sample_noise([3, 7], (4, 16, 16)), sample_noise([7], (4, 16, 16))
    >>> torch.equal(pair[1:], one)
    True
    """
    return torch.stack([torch.randn(*shape, generator=generator(seed, stream)) for seed in seeds])


def training_generator(seed: int, rank: int, step: int, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator of everything random in one training step (noise levels, noise, condition dropout).

    >>> torch.randint(1000, (4,), generator=training_generator(seed=0, rank=0, step=25))
    tensor([251, 675, 921, 648])
    """
    return generator(seed, 0x7261696E, rank, step, device=device)


NOISE_BLOCK = 64  # side of the blocks of a canvas that have a generator each


def canvas_noise(
    seed: int, channels: int, height: int, width: int, stream: int = 0, block: int = NOISE_BLOCK, top: int = 0
) -> Tensor:
    """Standard normal noise (1,channels,height,width) of a canvas, or of its rows from `top` on; float32 on the CPU.

    The canvas is filled block by block, each from its own generator, so the value at a position depends on seed,
    stream and position alone: a larger canvas repeats a smaller one in its upper left corner.

    >>> small, large = canvas_noise(0, 4, 32, 32), canvas_noise(0, 4, 96, 128)
    >>> torch.equal(large[..., :32, :32], small), torch.equal(canvas_noise(0, 4, 20, 128, top=50), large[..., 50:70, :])
    (True, True)
    """
    noise = torch.empty(1, channels, height, width)
    for row in range(top // block * block, top + height, block):
        for col in range(0, width, block):
            values = torch.randn(channels, block, block, generator=generator(seed, stream, row, col))
            above = max(top - row, 0)
            part = noise[0, :, row + above - top : row + block - top, col : col + block]
            part.copy_(values[:, above : above + part.shape[1], : part.shape[2]])
    return noise
