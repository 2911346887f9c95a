"""A network that changes the image it is told of, for translation between modalities that show the same structures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.networks.takes import declared


class SourceResidual(nn.Module):
    """A network whose prediction is the source image plus a change of it.

    Its input is x_t and, after it, the source (`ldm.conditioners.source_image.SourceImage` gives it as "concat"), both
    with the channels of the prediction. Before training it gives the source back, fine structure and all, which a
    network that is normalised in every layer otherwise learns last. For images, not noise: of the parameterization x0.

    Args:
        unet: node of the network; its in_channels are twice its out_channels.
    Raises:
        UserError: another number of channels.

    >>> node = {"target": "ldm.networks.unet.UNetModel", "params": {"in_channels": 2, "out_channels": 1, "num_heads": 1,
    ...         "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [], "channel_mult": [1]}}
    >>> x = torch.rand(1, 2, 8, 8)
    >>> bool((SourceResidual(node)(x, torch.tensor([999])) == x[:, 1:]).all())          # its last layer begins at zero
    True
    """

    def __init__(self, unet: Mapping[str, Any]):
        super().__init__()
        self.unet = instantiate_from_config(unet)
        self.takes = replace(declared(self.unet), skips=0)
        if self.takes.in_channels != 2 * self.takes.out_channels:
            raise UserError(
                "a SourceResidual's network takes an image and its source, and gives an image: in_channels must be "
                f"twice out_channels; got {self.takes.in_channels} and {self.takes.out_channels}."
            )

    def forward(self, x: Tensor, timesteps: Tensor, **condition: Tensor) -> Tensor:
        """The source plus the network's output, (B,out_channels,H,W), from x (B,in_channels,H,W) = x_t and source, and
        timesteps (B,)."""
        return x[:, self.takes.out_channels :] + self.unet(x, timesteps, **condition)
