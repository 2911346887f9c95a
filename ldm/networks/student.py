"""The network of a student: its teacher's, told guidance scales, with the outputs of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.networks.takes import declared

WIDTH = 128  # of the embedding of settings


class StudentNetwork(nn.Module):
    """A network whose outputs are repeated, and which is told more by numbers.

    Args:
        network: node of the teacher's network.
        channels: of a prediction, the teacher's first. copies: predictions that it gives. extra: further channels.
        settings: numbers (B,settings) that it is told, embedded and added to its vector; 0: none.
        directions: of the first settings, which are logarithms of guidance scales, the middle of those scales. Guidance
            is affine in its scale (arXiv:2207.12598, equation 6), and so are the predictions: to each, a direction
            times (scale / middle - 1) is added, C channels for each scale that the network gives once for all copies.

    >>> node = {"target": "ldm.networks.dit.DiT", "params": {"in_channels": 4, "out_channels": 4, "image_size": 8,
    ...     "hidden_size": 32, "depth": 1, "num_heads": 2}}
    >>> network = StudentNetwork(node, channels=4, copies=2, extra=3, settings=1)
    >>> network(torch.zeros(1, 4, 8, 8), torch.tensor([500.0]), settings=torch.ones(1, 1)).shape
    torch.Size([1, 11, 8, 8])
    """

    def __init__(
        self, network: Mapping[str, Any], channels: int, copies: int = 1, extra: int = 0, settings: int = 0,
        directions: Sequence[float] = (),
    ):  # fmt: skip
        super().__init__()
        with torch.device("meta"):
            alone = declared(instantiate_from_config(network))
        if alone.sequence:
            raise UserError("a student makes images; the network is of tokens.")
        if settings and alone.vector_dim is None:
            raise UserError("the network takes no vector, by which a student is told its guidance scales.")
        if len(directions) > settings or any(middle <= 0 for middle in directions):
            raise UserError(f"directions are scales above 0, of {settings} settings at most; got {list(directions)}.")
        self.copies, self.extra, self.channels, self.given = copies, extra, channels, alone.out_channels
        self.directions = list(directions)
        self.network = instantiate_from_config(_of_channels(network, (copies + len(directions)) * channels + extra))
        self.takes = replace(alone, out_channels=channels, skips=0)
        self.settings = None
        if settings:
            self.settings = nn.Sequential(
                nn.Linear(settings, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
                nn.Linear(WIDTH, alone.vector_dim),
            )  # fmt: skip
            nn.init.zeros_(self.settings[-1].weight)
            nn.init.zeros_(self.settings[-1].bias)

    def forward(self, x: Tensor, timesteps: Tensor, settings: Tensor | None = None, **cond: Tensor) -> Tensor:
        """(B,copies*C+extra,H,W) of x (B,C,H,W); conditions are the teacher's network's."""
        if (settings is None) != (self.settings is None):
            raise ValueError("a student is told its settings, as many as it was made for, if and only if it takes some")
        if settings is not None:
            vector = self.settings(settings)
            cond["vector"] = vector if "vector" not in cond else cond["vector"] + vector
        out = self.network(x, timesteps, **cond)
        if not self.directions:
            return out
        count = len(self.directions)
        copies, ways, extra = out.split([self.copies * self.channels, count * self.channels, self.extra], 1)
        strength = settings[:, :count].exp() / settings.new_tensor(self.directions) - 1
        moved = torch.einsum("bs,bschw->bchw", strength.to(ways), ways.unflatten(1, (count, self.channels)))
        return torch.cat([copies + moved.repeat(1, self.copies, 1, 1), extra], 1)

    @torch.no_grad()
    def begin(self, teacher: Mapping[str, Tensor], spread: float = 0.0) -> None:
        """Take the weights of the teacher's network: each copy predicts as it does; directions and extra are 0.

        spread: of random differences between the copies, as a share of the weights' own; torch's seed decides them.
        """
        own = self.network.state_dict()
        if set(own) != set(teacher):
            raise UserError("the student's network is not the teacher's; their weights have other names.")
        for name, value in own.items():
            given = teacher[name].to(value)
            if given.shape != value.shape:
                given = self._repeated(given, len(value), spread)
            value.copy_(given)

    def _repeated(self, head: Tensor, rows: int, spread: float) -> Tensor:
        """Rows of an output layer: of the teacher's channels, or of groups of them (patches, channels last)."""
        groups = len(head) // self.given
        each = head.view(groups, self.given, *head.shape[1:])[:, : self.channels]
        copies = each.repeat(1, self.copies, *[1] * (head.ndim - 1))
        noise = torch.randn(copies.shape).to(copies) * (spread * float(head.std(correction=0)))
        extra = head.new_zeros(groups, len(self.directions) * self.channels + self.extra, *head.shape[1:])
        return torch.cat([copies + noise, extra], 1).reshape(rows, *head.shape[1:])


def _of_channels(node: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The node of a network with `count` output channels, or of one that wraps it."""
    params = dict(node.get("params") or {})
    for name in ("out_channels", "out_ch"):
        if name in params:
            return {**node, "params": {**params, name: count}}
    for name, value in params.items():
        if isinstance(value, Mapping) and "target" in value:
            return {**node, "params": {**params, name: _of_channels(value, count)}}
    raise UserError(
        f"{node['target']} is not told how many channels it predicts (out_channels); a student is of a network that is."
    )
