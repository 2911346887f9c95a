"""An ensemble of ResNet-34 that scores cells as mitotic figures, as published with the mitotic-figure DPM.

    scorer = load_scorer(["Ensemble_1/model_checkpoint.pt", ...], device="cuda")
    scores = scorer(images)                                    # (B,3,H,W) in [-1,1] -> (B,) in [0,1]

Weights are on request from the authors of "Characterizing the Features of Mitotic Figures Using a Conditional Diffusion
Probabilistic Model" (DGM4MICCAI 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet34

from ldm.errors import UserError
from ldm.interop.checkpoint import read_checkpoint, state_dict_of

UPSAMPLING = 4  # cells of 64 px are seen at 256 px
WHITE = 0.99  # quantile of a cell's values that is set to 1


class ResNetEnsemble(nn.Module):
    """The mean of `count` networks' probabilities that a cell is a mitotic figure.

    A cell is enlarged and divided by its own 99th percentile; nothing is clipped, and there is no other normalisation.
    """

    def __init__(self, count: int = 3):
        super().__init__()
        self.networks = nn.ModuleList(resnet34(num_classes=1) for _ in range(count))

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B,) of cells (B,3,H,W) in [-1,1]; the networks were trained on 64 px at 0.25 µm per px."""
        return self.logits(images).sigmoid().mean(1)

    def logits(self, images: Tensor) -> Tensor:
        """What each network says of each cell, (B,count)."""
        cells = self.prepare(images)
        return torch.cat([network(cells) for network in self.networks], dim=1)

    @staticmethod
    def prepare(images: Tensor) -> Tensor:
        """The networks' input (B,3,4H,4W) of images (B,3,H,W) in [-1,1]."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be (B,3,H,W) in [-1, 1], got {tuple(images.shape)} {images.dtype}")
        cells = F.interpolate((images.float() + 1) / 2, scale_factor=UPSAMPLING, mode="bilinear")
        white = cells.flatten(1).quantile(WHITE, dim=1)
        return cells / white.clamp(min=1e-6).view(-1, 1, 1, 1)


def load_scorer(paths: Sequence[str | Path], device: str | torch.device = "cpu") -> ResNetEnsemble:
    """The ensemble of the networks in `paths`, ready to score. Nothing in the files is executed.

    UserError: no path, a file that cannot be read or is of another network.
    """
    if isinstance(paths, str | Path) or not paths:
        raise UserError(f"a scorer is made of a list of checkpoints, published are three; got {paths!r}.")
    with torch.device("meta"):
        scorer = ResNetEnsemble(len(paths))
    for network, path in zip(scorer.networks, paths):
        content = read_checkpoint(path)
        inner = content.get("model_state_dict", content) if isinstance(content, Mapping) else content
        state = {name.removeprefix("module."): value for name, value in state_dict_of(inner, path).items()}
        wanted = {name: value.shape for name, value in network.state_dict().items()}
        for name in [*wanted, *state]:
            held = tuple(state[name].shape) if name in state else "missing"
            due = tuple(wanted[name]) if name in wanted else "no such tensor"
            if held != due:
                raise UserError(f"{path} is no ResNet-34 with one output: {name} is {held}, expected {due}.")
        floats = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
        network.load_state_dict(floats, assign=True)
    return scorer.to(device).eval().requires_grad_(False)
