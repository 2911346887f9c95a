"""InceptionV3 in the form that FID is published with: TensorFlow's graph of 2015-12-05, whose weights were converted.

It differs from torchvision's in its pooling branches: their averages leave the padding out, and the last one takes
the maximum. Features are the 2048 channels after the global pool, of images resized to 299 px and scaled to
(x - 128) / 128.

Resizing decides the figure as much as the network does (Parmar et al. 2022, arXiv:2104.11222): `clean` is Pillow's
bicubic filter in floating point, as clean-fid has it; `tensorflow` the bilinear one of TensorFlow 1, without
antialiasing, as in the published FID and torch-fidelity.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, Inception3, InceptionE

from ldm.encoders.registry import weights_home
from ldm.errors import UserError, suggest
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.weights import check_finite

FILE = "pt_inception-2015-12-05-6726825d.pth"
SOURCE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
LICENCE = "Apache-2.0"
DIM, SIDE = 2048, 299
RESIZES = ("clean", "tensorflow")


def _leave_padding_out(branch: BasicConv2d, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The mean over 3x3 with zeros around the image -> the mean over what is in the image."""
    pooled = inputs[0]
    inside = F.avg_pool2d(torch.ones_like(pooled[:1, :1]), 3, stride=1, padding=1)
    return (pooled / inside,)


class InceptionMax(InceptionE):
    """The last block, whose pooling branch takes the maximum."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))]


class InceptionV3(Inception3):
    """uint8 images (B,H,W,3) of any size -> features (B,2048) float32. Names of the weights are torchvision's."""

    def __init__(self, resize: str = "clean"):
        if resize not in RESIZES:
            raise UserError(f"images are resized for Inception by '{resize}'{suggest(resize, RESIZES)}")
        super().__init__(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
        self.resize = resize
        self.Mixed_7c = InceptionMax(2048)
        for name, block in self.named_children():
            if name.startswith("Mixed_5") or name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
                block.branch_pool.register_forward_pre_hook(_leave_padding_out)
        self.dropout, self.fc = nn.Identity(), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        resized = clean_resize(images) if self.resize == "clean" else _tensorflow_resize(images)
        return super().forward((resized - 128) / 128)


def clean_resize(images: Tensor, side: int = SIDE) -> Tensor:
    """uint8 (B,H,W,3) -> (B,3,side,side) in 0..255.

    >>> clean_resize(torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)).unique(), SIDE
    (tensor([200.]), 299)
    """
    if images.shape[1:3] == (side, side):
        return images.permute(0, 3, 1, 2).float()
    filtered = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
        for image in images.cpu().numpy()
        for channel in np.moveaxis(image, -1, 0)
    ]
    return rearrange(torch.from_numpy(np.stack(filtered)), "(b c) h w -> b c h w", c=3).clamp(0, 255).to(images.device)


def _tensorflow_resize(images: Tensor) -> Tensor:
    """uint8 (B,H,W,3) -> (B,3,299,299) in 0..255: bilinear between pixels i and i+1 at i = place * scale."""
    x = images.permute(0, 3, 1, 2).float()
    for axis in (2, 3):
        side = x.shape[axis]
        place = torch.arange(SIDE, device=x.device) * torch.tensor(side / SIDE, device=x.device)
        low = place.floor().long()
        weight = (place - low).view(-1, *[1] * (3 - axis))
        near, far = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=side - 1))
        x = near + (far - near) * weight
    return x


def load_inception(weights: str | Path | None = None, resize: str = "clean", device: str = "cpu") -> InceptionV3:
    """The network with its weights, in eval mode; `weights_path` tells their file.

    weights: the file, or a folder that holds it; by default it is looked for in $HISTOLDM_WEIGHTS/inception.
    UserError: no such file, or one of another network.

    >>> load_inception("no/weights.pth")
    Traceback (most recent call last):
    ldm.errors.UserError: the weights of InceptionV3 for FID are not at no/weights.pth. Get ...
    """
    path = Path(weights) if weights else weights_home() / "inception"
    path = path / FILE if path.is_dir() or not path.suffix else path
    if not path.is_file():
        raise UserError(
            f"the weights of InceptionV3 for FID are not at {path}. Get {FILE} from {SOURCE} (licence: {LICENCE}) and "
            "put it there, or say where it is (--weights; $HISTOLDM_WEIGHTS replaces the folder of all weights)."
        )
    network = InceptionV3(resize)
    held = state_dict_of(read_checkpoint(path), path)
    state = {name: value for name, value in held.items() if not name.startswith("fc.")}
    wanted = network.state_dict()
    for name, value in wanted.items():
        if name not in state and name.endswith("num_batches_tracked"):
            state[name] = value
        if name not in state or state[name].shape != value.shape:
            found = tuple(state[name].shape) if name in state else "missing"
            raise UserError(f"{path} is not {FILE}: {name} is {found}, expected {tuple(value.shape)}.")
    taken = {name: state[name] for name in wanted}
    check_finite(taken, path)
    network.load_state_dict(taken)
    network.weights_path = path
    return network.to(device).eval().requires_grad_(False)
