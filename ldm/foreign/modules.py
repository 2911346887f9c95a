"""Modules that configs of others describe: built of no more parts than there are weights for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry

from ldm.errors import UserError
from ldm.foreign.budget import in_words

SPARE_PARTS, SPARE_VALUES = 2000, 1 << 28  # beyond what the weights have: heads that are taken off, blocks left out
_COUNTED: ContextVar[bool] = ContextVar("counted", default=False)
PARTS = 20  # parts without weights for each tensor that a file holds: activations, drop-outs, sequences


@contextmanager
def as_large_as(state: Mapping[str, Tensor], source: object) -> Iterator[None]:
    """A context in which modules are built that `state` has the weights of: a config that asks for far more parts, or
    for far larger ones, is refused while they are built, whatever its parameters are called.

    UserError: more parts or values than the weights have twice. source: the model, for messages.

    >>> with as_large_as({"weight": torch.zeros(2, 2)}, "model"):
    ...     torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(10**9)))
    Traceback (most recent call last):
    ldm.errors.UserError: the config of model describes a model of more than 2020 parts, and its weights are 1 ...
    """
    mine, parts, values = threading.get_ident(), 0, 0
    most_parts = SPARE_PARTS + PARTS * len(state)
    held = sum(value.numel() for value in state.values())
    most_values = SPARE_VALUES + 2 * held

    def count_parts(_: nn.Module, __: str, part: nn.Module | None) -> None:
        nonlocal parts
        if part is None or threading.get_ident() != mine:
            return
        parts += 1
        if parts > most_parts:
            raise UserError(
                f"the config of {source} describes a model of more than {most_parts} parts, and its weights are "
                f"{len(state)} tensors: it is not theirs, or made to exhaust the machine."
            )

    def count_values(_: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal values
        count_parts(_, name, value)
        if value is None or threading.get_ident() != mine:
            return
        values += value.numel()
        if values > most_values:
            raise UserError(
                f"the config of {source} describes a model of more than {in_words(4 * most_values)}, and its weights "
                f"are {in_words(4 * held)}: it is not theirs, or made to exhaust the machine."
            )

    with ExitStack() as stack:
        for register, count in (
            (registry.register_module_module_registration_hook, count_parts),
            (registry.register_module_parameter_registration_hook, count_values),
            (registry.register_module_buffer_registration_hook, count_parts),
        ):
            stack.callback(register(count).remove)
        stack.callback(_COUNTED.reset, _COUNTED.set(True))
        yield


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make` gives. Within `as_large_as` it is first made without memory, so that what is too large is
    refused before any is taken; of a module that cannot be made so, when its parts are counted.

    >>> made(lambda: torch.nn.Linear(2, 1)).weight.device
    device(type='cpu')
    """
    if _COUNTED.get() and not torch.empty(0).is_meta:
        try:
            with torch.device("meta"):
                make()
        except UserError:
            raise
        except Exception:  # what it computes while it is made needs numbers
            pass
    return make()
