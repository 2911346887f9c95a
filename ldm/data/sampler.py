"""The order of training data, as a pure function of where one is in it.

Training reads one endless stream: permutation 0 of the tiles, then permutation 1, and so on. Global batch `step` is
the stream's slice `[step * B, (step + 1) * B)`, B = batch_size * world_size, and each rank takes its own part of that.
So no tile is dropped or repeated, every rank has as many batches as the others, and to resume is to start at a number.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ldm.rng import fold

Key = tuple[int, int]  # (index of the item, draw: the seed in [0, 2**63) of everything random in it)


class ResumableBatchSampler:
    """Batches of `(index, draw)` keys. Batch `step` is a function of the arguments and of `step` alone.

    length: items in the dataset. batch_size: items per rank and batch. `len()`: batches in one pass, at least 1.
    Iterating yields `len()` batches from the start that `set_start` gave, across the end of a pass where need be.
    """

    def __init__(self, length: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if length < 1 or batch_size < 1 or not 0 <= rank < world_size:
            given = f"{length=} {batch_size=} {rank=} {world_size=}"
            raise ValueError(f"need length >= 1, batch_size >= 1 and 0 <= rank < world_size, got {given}")
        self.length, self.batch_size, self.seed, self.rank, self.world_size = length, batch_size, seed, rank, world_size
        self.start = 0
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(fold(self.seed, epoch, self.length))  # no item has that index
        return torch.randperm(self.length, generator=generator)

    def batch(self, step: int) -> list[Key]:
        """The keys of global batch `step` (0 is the first of the whole training) that are this rank's."""
        first = (step * self.world_size + self.rank) * self.batch_size
        keys = []
        for position in range(first, first + self.batch_size):
            epoch, offset = divmod(position, self.length)
            index = int(self._permutation(epoch)[offset])
            keys.append((index, fold(self.seed, epoch, index)))
        return keys

    def set_start(self, step: int) -> None:
        """Begin the next iteration at global batch `step`."""
        self.start = step

    def __len__(self) -> int:
        return max(1, self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.batch, range(self.start, self.start + len(self)))

    def __getstate__(self) -> dict[str, Any]:  # workers that are spawned pickle the sampler
        return {key: value for key, value in vars(self).items() if key != "_permutation"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._permutation = lru_cache(maxsize=2)(self._permute)


class ResumableDataLoader(DataLoader):
    """A DataLoader over a ResumableBatchSampler that knows which batch comes next, whatever its workers prefetch.

    The dataset is asked for `(index, draw)` keys. `state_dict()` is the position in the stream, in items, so that a
    run may go on with another batch size or number of ranks; Lightning saves and restores it.
    """

    def __init__(self, dataset: Dataset, batch_sampler: ResumableBatchSampler, **kwargs: Any) -> None:
        kwargs.setdefault("worker_init_fn", ignore_interrupts)
        super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
        self.position = 0  # global batches handed out so far, over all epochs
        self._items = batch_sampler.batch_size * batch_sampler.world_size  # in a global batch

    def __iter__(self) -> Iterator[Any]:
        self.batch_sampler.set_start(self.position)
        return self._count(super().__iter__())

    def _count(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"items_seen": self.position * self._items}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["items_seen"] // self._items


def ignore_interrupts(worker: int) -> None:
    """Worker initialisation: Ctrl-C reaches the whole process group, and what it means is the main process's matter.

    >>> before = signal.getsignal(signal.SIGINT)
    >>> ignore_interrupts(0)
    >>> signal.signal(signal.SIGINT, before)
    <Handlers.SIG_IGN: 1>
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def evaluation_batches(
    length: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
) -> list[list[Key]]:
    """Batches for validation: items in order, each once (rank r has r, r + world_size, ...), the same draws every time.

    A DataLoader takes the list as its `batch_sampler`.

    >>> [[index for index, draw in batch] for batch in evaluation_batches(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    keys = [(index, fold(seed, 0, index)) for index in range(rank, length, world_size)]
    return [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
