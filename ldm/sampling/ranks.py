"""Several processes that make one thing together: by torchrun, or as the tasks of a SLURM step.

They share a folder, in which each finds what the others made, and exchange no tensors: they meet when a step is done,
and tell one another a few words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ldm.errors import UserError

LONGEST = timedelta(days=30)  # that a process waits for the others; those that end are noticed at once
FIRST_PORT, PORTS = 20_000, 20_000


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together; alone by default.

    Attributes:
        rank: its number. size: how many there are. local: its number on its machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether it is the one that does what is done once."""
        return self.rank == 0

    def told(self, value: Any) -> Any:
        """What the first process has as `value`.

        >>> Ranks().told("go")
        'go'
        """
        return self._gathered(value)[0]

    def agree(self, value: str, what: str) -> None:
        """UserError, by the first process, where another has another value; the others end without a word.

        >>> Ranks().agree("a3f1", "weights of the model")
        """
        values = self._gathered(value)
        other = next((rank for rank, each in enumerate(values) if each != values[0]), None)
        if other is None:
            return
        if not self.leads:
            raise SystemExit(2)
        raise UserError(
            f"the {self.size} processes see different {what}: process 0 has {values[0]}, process {other} "
            f"{values[other]}. Give all of them the same files."
        )

    def share(self, costs: Sequence[float]) -> list[int]:
        """Which pieces of work are this process's: neighbours, about as costly as those of each other.

        >>> [Ranks(rank, 3).share([1, 1, 1, 1, 4, 1, 1]) for rank in range(3)]
        [[0, 1, 2], [3, 4], [5, 6]]
        """
        total, before, own = sum(costs) or 1.0, 0.0, []
        for piece, cost in enumerate(costs):
            if min(int((before + cost / 2) / total * self.size), self.size - 1) == self.rank:
                own.append(piece)
            before += cost
        return own

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context at whose end all processes meet. Where one has failed, all end, and that one says why.

        >>> with Ranks().together():
        ...     pass
        """
        fault = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            fault = error
        failed = [rank for rank, well in enumerate(self._gathered(fault is None)) if not well]
        if failed and failed[0] == self.rank:
            raise fault
        if failed:
            raise SystemExit(2)

    def _gathered(self, value: Any) -> list[Any]:
        """What each process has as `value`."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError:  # its connection was closed
            if not self.leads:
                raise SystemExit(2) from None
            raise UserError(
                f"another of the {self.size} processes has ended; what is done is kept: run the same command again."
            ) from None
        return values


@contextmanager
def joined() -> Iterator[Ranks]:
    """A context in which the processes that were started together know one another.

    UserError: they cannot be joined.

    >>> with joined() as ranks:
    ...     ranks
    Ranks(rank=0, size=1, local=0)
    """
    told = os.environ
    if "RANK" in told and "WORLD_SIZE" in told:  # by torchrun
        ranks = Ranks(int(told["RANK"]), int(told["WORLD_SIZE"]), int(told.get("LOCAL_RANK", 0)))
    elif int(told.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        ranks = Ranks(int(told["SLURM_PROCID"]), int(told["SLURM_STEP_NUM_TASKS"]), int(told["SLURM_LOCALID"]))
        told.setdefault("MASTER_ADDR", first_node(told["SLURM_STEP_NODELIST"]))
        told.setdefault("MASTER_PORT", str(FIRST_PORT + int(told["SLURM_JOB_ID"]) % PORTS))
    else:
        ranks = Ranks()
    if ranks.size == 1:
        yield ranks
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.size, timeout=LONGEST)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {ranks.size} processes cannot be joined: {str(error).splitlines()[0]}") from None
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def first_node(nodes: str) -> str:
    """The first machine of a list as SLURM writes it.

    >>> first_node("gpu[007-009,012],login1"), first_node("a,b")
    ('gpu007', 'a')
    """
    name = re.match(r"([^,\[]*)(?:\[([^\],-]+))?", nodes)
    return name[1] + (name[2] or "")
