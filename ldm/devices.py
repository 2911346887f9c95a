"""Where PyTorch computes, and copies between main memory and a GPU that leave both at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:  # torch is imported when it is first needed: a command's --help need not wait for it
    import torch
    from torch import Tensor


def pick_device(name: str = "auto") -> str:
    """The device of `--device`: `auto` is a GPU where there is one. UserError if it is not on this machine."""
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    gpus += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return gpus[0] if gpus else "cpu"
    if name == "cuda" and "cuda:0" in gpus:
        return "cuda:0"
    if name not in ("cpu", *gpus):
        raise UserError(f"device '{name}' is not on this machine; it has {', '.join(['cpu', *gpus])}; auto chooses.")
    return name


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
    import torch

    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait
