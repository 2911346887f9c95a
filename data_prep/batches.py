"""Batches of a store's tiles, read ahead, and what a network makes of them, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ldm.data.tile_store import TileStore

_READERS = 2  # threads
Item = TypeVar("Item")
Made = TypeVar("Made")


def read_batches(store: TileStore, start: int, batch_size: int, stop: int | None = None) -> Iterator[np.ndarray]:
    """Tiles from row `start` on, up to `stop`, (B,T,T,3) uint8; the next batches are read while one is used.

    >>> [len(tiles) for tiles in read_batches(store, 80, 5)]
    [5, 3]
    """
    stop = len(store) if stop is None else stop
    parts = (slice(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size))
    yield from ahead(store.tiles.__getitem__, parts, _READERS)


def ahead(make: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
    """make(item) of each item, in order; as many as there are threads are made while one is used.

    >>> list(ahead(lambda x: 2 * x, [1, 2, 3], 2))
    [2, 4, 6]
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_order(make: Callable[[Item], Made], items: Iterable[Item], device: str, alone: bool = False) -> Iterator[Made]:
    """make(item) of each item, in order.

    On a CPU as many at once as there are threads of arithmetic, each in one thread: sums that are split over threads
    are rounded otherwise, and so results would depend on the machine.

    alone: one at a time, of a `make` that is not known to bear more.

    >>> list(in_order(lambda x: 2 * x, [1, 2, 3], "cpu"))
    [2, 4, 6]
    """
    import torch

    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1:
        yield from map(make, items)
        return
    torch.set_num_threads(1)
    try:
        yield from ahead(make, items, 1 if alone else threads)
    finally:
        torch.set_num_threads(threads)
