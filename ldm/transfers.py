"""Copies between main memory and a GPU that leave both at work. Elsewhere they are plain copies, or none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`. From main memory to a GPU the copy is queued there, and the caller goes on."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def receive(values: Tensor, home: torch.device) -> Callable[[], Tensor]:
    """A function that waits for `values` and gives them on `home`; on the way from a GPU the caller may go on."""
    if not values.is_cuda or home.type != "cpu":
        moved = values.to(home)
        return lambda: moved
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait
