"""Devices: where PyTorch computes, in which precision, and copies that do not keep a GPU waiting."""

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
    """The device that a `--device` option names, in PyTorch's form.

    Args:
        name: `auto` for the first GPU, or the CPU if there is none; or cpu, cuda, cuda:1, mps.
    Raises:
        UserError: this machine has no such device.

    >>> pick_device("cpu")
    'cpu'
    """
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    gpus += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return gpus[0] if gpus else "cpu"
    if name == "cuda" and "cuda:0" in gpus:
        return "cuda:0"
    if name not in ("cpu", *gpus):
        word = " PyTorch's word for a GPU is cuda." if name.lower().startswith("gpu") else ""
        raise UserError(f"this machine has no device '{name}'; choose auto, {', '.join(['cpu', *gpus])}.{word}")
    return name


TRAINER = {"bf16": "bf16-mixed", "fp32": "32-true"}  # precision -> its name in Lightning's Trainer


@cache
def faster_precision(device: str = "auto") -> tuple[str, str]:
    """The precision in which networks train faster on a device, bf16 or fp32, and the reason in words.

    A GPU gets bf16 if its hardware computes in it. On a CPU a small training step is timed in both, because CPUs with
    bf16 instructions differ: those with AMX and some with AVX-512 are faster in bf16, others are slower.

    >>> faster_precision("cpu")[0] in ("bf16", "fp32")
    True
    """
    import torch

    device = pick_device(device)
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU computes in it") if native else ("fp32", "this GPU does not compute in bf16")
    if device == "mps":
        return "fp32", "bf16 is used on CUDA GPUs and CPUs only"
    seconds = _step_seconds()
    ratio = seconds["bf16"] / seconds["fp32"]
    return "bf16" if ratio < 0.87 else "fp32", f"a step in bf16 takes {ratio:.1f} times as long as in fp32 on this CPU"


def _step_seconds() -> dict[str, float]:
    """Processor time (s) of a training step of two convolutions, by precision.

    The two are timed in turns on one thread, and the least of 10 is taken, so that other work on the machine does not
    decide which one is faster.
    """
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
                if turn:  # the first turn is a warm-up
                    seconds[precision] = min(seconds[precision], time.thread_time() - start)
            if turn and seconds["bf16"] > 6 * seconds["fp32"]:  # emulated: so slow that no more turns are needed
                break
    finally:
        torch.set_num_threads(threads)
    return seconds


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy `values` to `device`. A copy from main memory to a GPU is queued, and the caller does not wait for it.

    >>> send(torch.zeros(2, 3), torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def receive(values: Tensor, home: torch.device) -> Callable[[], Tensor]:
    """Start to copy `values` to `home`; the function that is returned waits for the copy and returns it.

    >>> receive(torch.zeros(2, 3), torch.device("cpu"))().shape
    torch.Size([2, 3])
    """
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
