"""Exponential moving average of a network's weights, stored under CompVis' `model_ema` names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """Shadow copy of a module's trainable parameters: shadow <- d*shadow + (1-d)*weight.

    The decay warms up, d = min(decay, (1+n)/(10+n)) after n updates. Buffers are named as CompVis' LitEma names them:
    the parameter's name without dots, beside `decay` and `num_updates`.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999):
        super().__init__()
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        for name, parameter in self._parameters_of(module):
            self.register_buffer(name, parameter.detach().clone())

    @staticmethod
    def _parameters_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield name.replace(".", ""), parameter

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the shadow towards the module's present weights; once per optimiser step."""
        self.num_updates += 1
        decay = torch.minimum(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        names, parameters = zip(*self._parameters_of(module))
        shadows = [self.get_buffer(name) for name in names]
        torch._foreach_lerp_(shadows, [p.detach() for p in parameters], 1.0 - float(decay))

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's weights by the averaged ones."""
        for name, parameter in self._parameters_of(module):
            parameter.copy_(self.get_buffer(name))

    @contextmanager
    def averaged(self, module: nn.Module) -> Iterator[None]:
        """Within this context the module has the averaged weights; afterwards its own again, also after an error."""
        own = [parameter.detach().clone() for _, parameter in self._parameters_of(module)]
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, parameter), weight in zip(self._parameters_of(module), own):
                    parameter.copy_(weight)
