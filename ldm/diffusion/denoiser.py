"""Denoisers: the one callable that samplers, guidance and tiling know.

    denoiser(x, sigma, cond) -> x0        x (B,C,H,W) = x0 + sigma*n, sigma (B,), cond a dict, x0 (B,C,H,W)

A denoiser wraps a network with the scaling it was trained with. Coordinates are variance-exploding whatever the
parameterisation; the variance-preserving x_t of DDPM is x / sqrt(1 + sigma^2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Cond = Mapping[str, Tensor]
Denoiser = Callable[[Tensor, Tensor, Cond], Tensor]
RangeDenoiser = Callable[[Tensor, Tensor, Cond], tuple[Tensor, Tensor]]  # x0 and the place of its step's variance
Network = Callable[..., Tensor]

DISCRETE = ("eps", "v", "x0")
PARAMETERIZATIONS = (*DISCRETE, "edm", "flow")


def call_network(network: Network, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Call a network with a condition where each part acts: context, class label, added vector, extra channels.

    The keys of a condition are `crossattn`, `label`, `vector`, `concat`, or, where several conditions are composed,
    such with a name before them (`text/crossattn`): context tokens then follow one another, vectors are added and
    extra channels concatenated. Extra channels of another size than x are resized bilinearly to it. `settings` are
    what a student is told.

    >>> network = lambda x, time, context: (x.shape, context.shape)
    >>> words, cells = torch.zeros(2, 5, 16), torch.zeros(2, 1, 16)
    >>> cond = {"text/crossattn": words, "ssl/crossattn": cells}
    >>> call_network(network, torch.zeros(2, 3, 8, 8), torch.tensor([7, 7]), cond)
    (torch.Size([2, 3, 8, 8]), torch.Size([2, 6, 16]))
    """
    parts: dict[str, list[Tensor]] = {}
    for key, value in cond.items():
        parts.setdefault(key.rpartition("/")[2], []).append(value)
    for extra in parts.get("concat", ()):
        if extra.shape[-2:] != x.shape[-2:]:
            extra = F.interpolate(extra.float(), x.shape[-2:], mode="bilinear")
        x = torch.cat([x, extra.to(x.dtype)], dim=1)
    inputs: dict[str, Tensor] = {}
    if "crossattn" in parts:
        inputs["context"] = torch.cat(parts["crossattn"], dim=1)
    if "vector" in parts:
        inputs["vector"] = sum(parts["vector"])
    for part, name in (("label", "y"), ("settings", "settings")):
        if part in parts:
            (inputs[name],) = parts[part]
    return network(x, time, **inputs)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values (B,) shaped to broadcast over `like` (B,...).

    >>> per_sample(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 1, 1, 1])
    """
    return values.view(-1, *[1] * (like.ndim - 1))


class TableDenoiser:
    """A network trained on a discrete noise table, predicting noise (eps), velocity (v) or the image (x0).

    Args:
        network: called as network(x_t, timestep, ...) with the timestep in table units, fractional between entries.
        table: ascending sigmas (T,) of the training schedule.
        parameterization: eps: x0 = x - sigma*eps; v (arXiv:2202.00512): x0 = x/(1+sigma^2) - sigma/sqrt(1+sigma^2)*v.

    Networks with 2C output channels (learned variance) are read by their first C; `with_variance` reads both halves.

    >>> network = lambda x, timestep: torch.zeros_like(x)  # no noise in it
    >>> denoiser = TableDenoiser(network, torch.tensor([0.1, 1.0, 10.0]))
    >>> denoiser(torch.full((1, 3, 8, 8), 0.5), torch.tensor([1.0]), {}).mean()
    tensor(0.5000)
    >>> denoiser.timestep(torch.tensor([1.0, 10**0.5, 99.0]))
    tensor([1.0000, 1.5000, 2.0000])
    """

    def __init__(self, network: Network, table: Tensor, parameterization: str = "eps"):
        if parameterization not in DISCRETE:
            raise ValueError(f"parameterization must be one of {', '.join(DISCRETE)}; got {parameterization!r}")
        self.network, self.table, self.parameterization = network, table, parameterization

    @property
    def sigma_min(self) -> float:
        return float(self.table[0])

    @property
    def sigma_max(self) -> float:
        return float(self.table[-1])

    def timestep(self, sigma: Tensor) -> Tensor:
        """Table position (B,) of sigma (B,): linear in log sigma between entries, exact at them, clamped outside."""
        log_table, log_sigma = self.table.log(), sigma.to(self.table).clamp(min=self.table[0]).log()
        low = torch.searchsorted(log_table, log_sigma, right=True).clamp(1, len(log_table) - 1) - 1
        weight = (log_sigma - log_table[low]) / (log_table[low + 1] - log_table[low])
        return low + weight.clamp(0, 1)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self._x0(x, per_sample(sigma, x), self._output(x, sigma, cond))

    def with_variance(self, x: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """x0 and, of a network with 2C outputs, the weight (B,C,H,W) of the ancestral step's log-variance between the
        posterior's (0) and the forward step's (1), see `sample_ddpm` (arXiv:2102.09672, equation 15)."""
        out = self._output(x, sigma, cond)
        if out.shape[1] != 2 * x.shape[1]:
            raise ValueError(f"the network has no learned variance: {out.shape[1]} outputs of {x.shape[1]} channels")
        return self._x0(x, per_sample(sigma, x), out), (out[:, x.shape[1] :] + 1) / 2

    def _output(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        x_t = x / (1 + per_sample(sigma, x) ** 2).sqrt()
        return call_network(self.network, x_t, self.timestep(sigma), cond).to(x.dtype)

    def _x0(self, x: Tensor, s: Tensor, out: Tensor) -> Tensor:
        out = out[:, : x.shape[1]]
        if self.parameterization == "eps":
            return x - s * out
        if self.parameterization == "v":
            return x / (1 + s**2) - s / (1 + s**2).sqrt() * out
        return out


class EDMDenoiser:
    """EDM preconditioning (arXiv:2206.00364, table 1) of a network over continuous noise levels.

    >>> denoiser = EDMDenoiser(lambda x, time: torch.zeros_like(x), sigma_data=0.5)
    >>> denoiser(torch.ones(2, 3, 8, 8), torch.tensor([0.0, 0.5]), {}).mean((1, 2, 3))  # the share of the image in x
    tensor([1.0000, 0.5000])
    """

    def __init__(self, network: Network, sigma_data: float = 1.0, sigma_min: float = 0.002, sigma_max: float = 80.0):
        self.network, self.sigma_data = network, sigma_data
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        s, total = per_sample(sigma, x), per_sample(sigma, x) ** 2 + self.sigma_data**2
        out = call_network(self.network, x / total.sqrt(), sigma.log() / 4, cond)[:, : x.shape[1]].to(x.dtype)
        return self.sigma_data**2 / total * x + s * self.sigma_data / total.sqrt() * out


class FlowDenoiser:
    """Rectified flow (arXiv:2209.03003): x_t = (1-t)*x0 + t*n, the network predicts n - x0 at 1000*t.

    In variance-exploding coordinates sigma = t/(1-t) and x_t = x/(1+sigma). shift: its noise levels are those of others
    times so much (t becomes shift*t / (1 + (shift-1)*t), arXiv:2403.03206, equation 23): more for larger latents.

    >>> denoiser = FlowDenoiser(lambda x, time: torch.zeros_like(x))  # n - x0 = 0
    >>> denoiser(torch.full((1, 3, 8, 8), 4.0), torch.tensor([3.0]), {}).mean()
    tensor(1.)
    """

    def __init__(self, network: Network, shift: float = 1.0, sigma_min: float = 0.002, sigma_max: float = 160.0):
        self.network, self.sigma_min, self.sigma_max = network, shift * sigma_min, shift * sigma_max

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        s = per_sample(sigma, x)
        x_t = x / (1 + s)
        out = call_network(self.network, x_t, 1000 * sigma / (1 + sigma), cond)[:, : x.shape[1]].to(x.dtype)
        return x_t - s / (1 + s) * out
