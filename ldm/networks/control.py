"""A ControlNet of the transformer (arXiv:2302.05543, as PixCell has it): a branch that sees an image of the same place.

The branch is a twin of the network's first blocks. It reads what the network reads and the latent of an image, and what
it makes of both is added to the network's tokens, block by block.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.dit import DiT, PatchEmbed


class ControlledDiT(DiT):
    """A DiT with a ControlNet beside it, which acts where the latent of an image is concatenated to x.

    Weights of the network keep their names, so adapters of it fit; those of the branch are beneath `control`.

    Args:
        control_depth: blocks of the branch, at most as many as the network has. others: those of `DiT`.

    Attributes:
        control_scale: what the branch adds is multiplied by it.

    >>> size = dict(image_size=8, hidden_size=32, depth=3, num_heads=2, context_dim=16)
    >>> network, context = ControlledDiT(4, 4, control_depth=2, **size), torch.zeros(1, 3, 16)
    >>> x, image, time = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), torch.tensor([500.0])
    >>> network(torch.cat([x, image], 1), time, context=context).shape, network(x, time, context=context).shape
    (torch.Size([1, 4, 8, 8]), torch.Size([1, 4, 8, 8]))
    """

    def __init__(self, in_channels: int, out_channels: int, image_size: int, control_depth: int, **others: Any):
        super().__init__(in_channels, out_channels, image_size, **others)
        if not 1 <= control_depth <= len(self.blocks):
            raise UserError(f"control_depth is 1 to the network's depth, {len(self.blocks)}; got {control_depth}.")
        if not self.patch_size or self.context == "sequence":
            raise UserError("a ControlNet adds to the tokens of an image alone: patch_size above 0, context 'cross'.")
        self.control = ControlBranch(in_channels, out_channels, image_size, **others | {"depth": control_depth})
        self.control_scale = 1.0
        self.takes = replace(self.takes, control=True)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        """As the DiT's; of x (B,2*in_channels,H,W), whose second half is the latent of an image, led by that.

        UserError: a scale of what leads, and no image that does.
        """
        told = (timesteps, context, y, vector)
        if x.shape[1] == self.takes.in_channels:
            if self.control_scale != 1.0:
                raise UserError(
                    f"the control scale, {self.control_scale:g}, is of an image that leads, and none is given; give "
                    "one (--condition control=FILE), or leave the scale out."
                )
            return super().forward(x, *told)
        x, image = x.chunk(2, dim=1)
        residuals = [self.control_scale * each for each in self.control(x, image, *told)]
        return super().forward(x, *told, residuals)


class ControlBranch(DiT):
    """What a ControlNet adds to the tokens after each block of a DiT: nothing, before it is trained.

    >>> branch = ControlBranch(4, 4, image_size=8, hidden_size=32, depth=2, num_heads=2)
    >>> [each.shape for each in branch(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), torch.tensor([500.0]))]
    [torch.Size([1, 16, 32]), torch.Size([1, 16, 32])]
    """

    def __init__(self, in_channels: int, *sizes: Any, **others: Any):
        super().__init__(in_channels, *sizes, **others)
        del self.final_layer
        hidden = self.t_embedder.mlp[0].out_features
        self.cond_embedder = PatchEmbed(in_channels, hidden, self.patch_size)
        self.zero_layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in self.blocks)
        for layer in self.zero_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        image: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> list[Tensor]:
        """Tokens (B,N,D) of x and of the latent of an image (B,C,H,W), after each block, through its last layer."""
        tokens, grid = self._tokens(x, self.x_embedder)
        tokens = tokens + self._tokens(image, self.cond_embedder)[0]  # positions once more, as published
        _, modulation, context, turns = self._told(grid, tokens, timesteps, context, y, vector)
        found = []
        for block, layer in zip(self.blocks, self.zero_layers):
            tokens = self._run(block, tokens, modulation, context, turns)
            found.append(layer(tokens))
        return found


def controlled(network: nn.Module, scale: float) -> nn.Module:
    """A twin of what holds a `diffusion_model` with a ControlNet, whose scale is another; all weights are its own.

    >>> size = dict(image_size=8, hidden_size=32, depth=1, num_heads=2, control_depth=1)
    >>> holder = nn.ModuleDict({"diffusion_model": ControlledDiT(4, 4, **size)})
    >>> controlled(holder, 0.5)["diffusion_model"].control_scale, holder["diffusion_model"].control_scale
    (0.5, 1.0)
    """
    twin, inner = copy.copy(network), copy.copy(network.get_submodule("diffusion_model"))
    inner.control_scale = scale
    twin._modules = {**network._modules, "diffusion_model": inner}
    return twin
