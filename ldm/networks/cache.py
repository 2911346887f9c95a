"""What a network may keep from one step of sampling to the next: cast weights, compiled code, deep features."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.takes import declared

Network = Callable[..., Tensor]


def cast_weights(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network with its convolutions' and linear layers' weights in dtype, and maps in channels_last.

    To be called under autocast, which else casts all weights at every call; results are the same to rounding. Other
    weights are shared with the network; later changes of those that were cast do not reach the copy.

    >>> twin = cast_weights(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)), torch.bfloat16)
    >>> twin[0].weight.dtype, twin[1].weight.dtype
    (torch.bfloat16, torch.float32)
    """
    twin = copy.copy(network)
    twin._modules = {name: cast_weights(child, dtype) for name, child in network._modules.items()}
    if isinstance(network, nn.Conv2d | nn.Conv1d | nn.Linear):
        twin._parameters = {
            name: None if weight is None else nn.Parameter(_cast(weight, dtype), requires_grad=False)
            for name, weight in network._parameters.items()
        }
    return twin


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if weight.ndim == 4 else torch.preserve_format
    return weight.detach().to(dtype, memory_format=layout)


class CastNetwork:
    """A network below float32: under autocast, with weights that are cast once and again when they have changed."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, wrap: Callable[[nn.Module], Network] = lambda n: n):
        self.network, self.dtype, self.wrap = network, dtype, wrap
        self._version: list[tuple[int, int]] = []
        self._cast: Network = network

    def __call__(self, x: Tensor, *args: Tensor, **cond: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=self.dtype):
            if torch.is_grad_enabled():
                return self.network(x, *args, **cond).float()
            version = [(weight.data_ptr(), weight._version) for weight in self.network.parameters()]
            if version != self._version:
                self._cast, self._version = self.wrap(cast_weights(self.network, self.dtype)), version
            return self._cast(x, *args, **cond).float()


class CompiledNetwork:
    """A network through torch.compile for inputs of fixed size: smaller batches are filled up to the largest so far.

    Where it cannot be compiled, for want of a compiler, a warning says so and the network runs as it is.
    """

    def __init__(self, network: nn.Module):
        self.network: Network = network
        self.compiled: Network | None = torch.compile(network, dynamic=False)
        self.size = 0

    def __call__(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        from torch._dynamo.exc import TorchDynamoException  # slow to import

        if self.compiled is None:
            return self.network(x, timesteps, **cond)
        count = len(x)
        self.size = max(self.size, count)
        filled = {name: _filled(value, self.size) for name, value in cond.items()}
        try:
            return self.compiled(_filled(x, self.size), _filled(timesteps, self.size), **filled)[:count]
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"the network could not be compiled ({reason}); it runs uncompiled.", stacklevel=2)
            self.compiled = None
            return self.network(x, timesteps, **cond)


def _filled(values: Tensor, size: int) -> Tensor:
    """values (B,...) as (size,...), the last repeated."""
    if len(values) == size:
        return values
    return torch.cat([values, values[-1:].expand(size - len(values), *values.shape[1:])])


class DeepCache:
    """A network that computes its deep features at every `interval`-th step and reuses them between (arXiv:2312.00858).

    The network declares that it can (`Takes.skips`), and runs as `UNetModel.run` does. The first `shallow` blocks and
    the last `shallow` run at every step. Features are reused only while calls follow each other as the steps of one
    sampling run do: same shape, same condition, falling timesteps. Two calls at one timestep are parts of a larger
    batch: from then on nothing is reused. Not for windows that move between steps.
    """

    def __init__(self, network: nn.Module, interval: int, shallow: int = 1):
        skips = declared(network).skips
        if not skips:
            raise UserError(f"a {type(network).__name__} keeps no deep features between steps; leave the cache out.")
        if interval < 1 or not 1 <= shallow <= skips:
            raise UserError(
                f"feature caching takes an interval of 1 or more and 1..{skips} shallow blocks; got {interval} and "
                f"{shallow}."
            )
        self.network, self.interval, self.shallow = network, interval, shallow
        self._age = 0
        self._last: dict[str, Tensor] = {}
        self._size: list[object] = []
        self._deep: Tensor | None = None
        self._in_parts = False

    def __call__(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        if self.interval == 1 or torch.is_grad_enabled():
            return self.network(x, timesteps, **cond)
        follows = self._follows(x, {"timesteps": timesteps, **cond})
        self._age = self._age + 1 if follows else 0
        if self._age % self.interval == 0:
            self._deep = None
        out, self._deep = self.network.run(x, timesteps, **cond, shallow=self.shallow, deep=self._deep)
        return out

    def _follows(self, x: Tensor, inputs: dict[str, Tensor]) -> bool:
        """Whether this call is the step after the last one."""
        last, self._last = self._last, inputs
        size, self._size = self._size, [x.shape, *((v.shape, v.dtype, v.device) for v in inputs.values())]
        if size != self._size or last.keys() != inputs.keys():
            return False
        change = inputs["timesteps"] - last["timesteps"]
        self._in_parts |= bool((change == 0).any())
        same = all(torch.equal(value, last[name]) for name, value in inputs.items() if name != "timesteps")
        return not self._in_parts and same and bool((change < 0).all())
