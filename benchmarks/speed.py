"""How networks are timed: steps that take turns, what they compute, and what the machine could."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], Any]
Clock = Callable[[], float]


def filled(net: nn.Module) -> nn.Module:
    """The network with random values in layers that start at zero too, as in a trained one."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return net


def size_in_millions(net: nn.Module) -> float:
    return sum(parameter.numel() for parameter in net.parameters()) / 1e6


def seconds(step: Step, device: str, clock: Clock = time.perf_counter) -> float:
    """Time of one call."""
    start = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def race(steps: Mapping[Any, Step], rounds: int, device: str, clock: Clock = time.perf_counter) -> dict[Any, float]:
    """Median seconds of each of `steps`, which take turns after one call to warm up."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name in list(steps) if round_ % 2 else list(steps)[::-1]:
            taken = seconds(steps[name], device, clock)
            if round_:
                times[name].append(taken)
    return {name: median(each) for name, each in times.items()}


def flops_of(step: Step) -> int:
    """Floating-point operations of matrix products, convolutions and attention, two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def rates(flops: float, batch: int, taken: float, ceiling: float) -> tuple[float, float, float]:
    """Images/s, TFLOP/s and the share of the ceiling (TFLOP/s) of `batch` images of `flops` in all in `taken` s."""
    achieved = flops / taken / 1e12
    return batch / taken, achieved, achieved / ceiling


def matrix_ceiling(dtype: torch.dtype, device: str, clock: Clock = time.perf_counter) -> float:
    """TFLOP/s of the best of some large square matrix products."""
    side = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = a @ b
    return 2 * side**3 / min(seconds(lambda: torch.mm(a, b, out=out), device, clock) for _ in range(20)) / 1e12


def forward_step(call: Callable[[], Tensor], dtype: torch.dtype, device: str) -> Step:
    @torch.no_grad()
    def step() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            call()

    return step


def train_step(net: nn.Module, call: Callable[[], Tensor], dtype: torch.dtype, device: str) -> Step:
    def step() -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            out = call()
        out.float().square().mean().backward()

    return step
