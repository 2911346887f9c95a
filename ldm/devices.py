"""Where PyTorch computes, and copies between main memory and a GPU that leave both at work."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
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


TRAINER = {"bf16": "bf16-mixed", "fp32": "32-true"}  # what Lightning's Trainer calls them


@cache
def faster_precision(device: str = "auto") -> tuple[str, str]:
    """bf16 or fp32, in which a network trains faster on a device, and why, in words.

    GPUs that compute in bf16 take it. On a CPU a small training step is timed in both: of the CPUs that know bf16, some
    are slower in it (AVX-512 alone) and some faster (AMX).

    >>> faster_precision("cpu")[0] in ("bf16", "fp32")
    True
    """
    import torch

    device = pick_device(device)
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU computes in it") if native else ("fp32", "this GPU has no bf16; fp16 is left to you")
    if device == "mps":
        return "fp32", "bf16 is for CUDA GPUs and CPUs"
    seconds = _step_seconds()
    ratio = seconds["bf16"] / seconds["fp32"]
    return "bf16" if ratio < 0.87 else "fp32", f"in bf16 a step takes {ratio:.1f} times as long as in fp32 on this CPU"


def _step_seconds() -> dict[str, float]:
    """Processor time of a training step of two convolutions in bf16 and in fp32, on one thread, in turns, the least of
    10: other work on the machine does not change which one is less."""
    import torch
    from torch import nn

    seconds = {"bf16": float("inf"), "fp32": float("inf")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            ends = [nn.Conv2d(128, 128, 3, padding=1) for _ in range(2)]
            network, x = nn.Sequential(ends[0], nn.GroupNorm(8, 128), nn.SiLU(), ends[1]), torch.randn(2, 128, 16, 16)
        for turn in range(11):
            for precision in seconds:
                start = time.thread_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    y = network(x)
                y.float().square().mean().backward()
                if turn:  # the first one prepares
                    seconds[precision] = min(seconds[precision], time.thread_time() - start)
            if turn and seconds["bf16"] > 6 * seconds["fp32"]:  # emulated: slow, and beyond doubt
                break
    finally:
        torch.set_num_threads(threads)
    return seconds


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
