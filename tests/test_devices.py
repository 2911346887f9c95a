"""Every path of a GPU user, without a GPU: fake tensors say that they lie on one, and whatever mixes devices raises.

Under PyTorch's FakeTensorMode an operation computes shapes and devices alone. Where a program asks for a value (is all
of it finite?) the answer is yes, or 1. What cannot be run so is named in CANNOT: there a shape depends on values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils.weak import WeakIdKeyDictionary

import ldm
from ldm.diffusion.denoiser import PARAMETERIZATIONS
from ldm.model_folder import load_model
from ldm.networks.ema import EMA

MODELS = Path(__file__).resolve().parent.parent / "data" / "models"
NAMES = ("demo-ssl", "demo-stains", "demo-omics", "demo-mitosis", "demo-text", "demo-slices")
RUN = tuple(name for name in NAMES if name != "demo-slices")
CANNOT = {
    "demo-slices": "local mutual information takes the positions of largest values, whose number depends on them",
    "decoding a canvas": "statistics of tissue are taken of the places that have any, whose number depends on them",
    "offload, gradients": "streams and autograd's engine ask the driver for the device",
    "inversion": "it looks for the levels of its table that can be inverted, whose number depends on them",
    "omics and scores by name": "a message picks the values that are out of range, whose number depends on them",
    "bf16, fp16": "autocast of CUDA is off where there is no GPU",
    "compile": "needs a compiler for the device",
}
pytestmark = pytest.mark.slow
ATEN = torch.ops.aten
CUDA = torch.device("cuda", 0)


class Gpu(FakeTensorMode):
    """Fake tensors of which everything is true but that there are NaN."""

    def __init__(self):
        super().__init__()
        self.untrue = WeakIdKeyDictionary()

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ATEN._local_scalar_dense.default:
            return args[0] not in self.untrue if args[0].dtype == torch.bool else 1
        if func is ATEN.equal.default:
            return True
        if func is ATEN._pin_memory.default:
            return args[0]
        made = super().dispatch(func, types, args, kwargs)
        is_nan = func is ATEN.isnan.default or (func is ATEN.ne.Tensor and args[0] is args[1])
        if is_nan or (args and isinstance(args[0], Tensor) and args[0] in self.untrue and isinstance(made, Tensor)):
            self.untrue[made] = True
        return made


def on_gpu(module: nn.Module) -> nn.Module:
    """A module whose weights and buffers are fake tensors of a GPU; to be called within the mode."""
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                made = torch.empty(weight.shape, dtype=weight.dtype, device=CUDA)
                each._parameters[name] = nn.Parameter(made, requires_grad=weight.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
        if isinstance(each, pl.LightningModule):
            each._device = CUDA
    return module


@contextmanager
def gpu(name: str) -> Iterator[Any]:
    model = load_model(MODELS / name)
    with Gpu():
        yield on_gpu(model)


def latents(model: Any, count: int = 2) -> Tensor:
    return torch.empty(count, model.channels, model.image_size, model.image_size, device=CUDA)


def condition(model: Any, count: int) -> dict[str, Tensor]:
    return {key: value.expand(count, *value.shape[1:]) for key, value in model.null_condition().items()}


@pytest.mark.parametrize("name", RUN)
def test_denoising_and_the_first_stage(name):
    with gpu(name) as model:
        x, sigma = latents(model), torch.ones(2, device=CUDA)
        assert model.denoiser()(x, sigma, condition(model, 2)).device == CUDA
        images = model.decode(x)
        assert images.device == CUDA
        assert model.encode(images).device == CUDA


@pytest.mark.parametrize("name", RUN)
def test_sampling_with_guidance(name):
    with gpu(name) as model:
        for more in ({}, {"solver": "ddim"}, {"guidance_interval": (0.5, 1.5)}, {"cache": 2}):
            cond = condition(model, 2)
            scale = 2.0 if cond else 1.0
            sampler = ldm.Sampler(steps=2, guidance_scale=scale, progress=False, **more)
            assert ldm.sample(model, cond, 2, sampler).shape[0] == 2


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("demo-stains", {"stain": "he"}), ("demo-text", {"text": "a nucleus"}),
        ("demo-ssl", {"features": np.zeros(512, np.float32)}),
    ],
)  # fmt: skip
def test_conditions_by_name_come_to_the_device(name, given):
    with gpu(name) as model:
        cond = model.condition(**given)
        assert {value.device for value in cond.values()} == {CUDA}
        sampler = ldm.Sampler(steps=2, progress=False)
        assert ldm.sample(model, cond, 1, sampler).shape[0] == 1


def test_windows_of_a_large_image():
    features, sampler = np.zeros((2, 2, 512), np.float32), ldm.Sampler(steps=2, progress=False)
    with gpu("demo-ssl") as model, pytest.raises(DynamicOutputShapeException) as stopped:
        ldm.large_image(model, features, (512, 512), sampler)
    assert "decode_canvas" in [entry.name for entry in stopped.traceback]  # all steps were taken


def test_a_translation():
    with gpu("demo-stains") as model:
        images = torch.zeros(1, 3, model.tile_size, model.tile_size)
        source, target = (condition(model, 1) for _ in range(2))
        sampler, inversion = ldm.Sampler(steps=2, progress=False), ldm.Inversion(start="noise")
        assert ldm.translate(model, images, source, target, sampler, inversion).shape == images.shape


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("name", RUN)
def test_a_training_step(name, parameterization):
    with gpu(name) as model:
        model.parameterization = parameterization
        model.train().requires_grad_(True)
        model.model_ema = on_gpu(EMA(model.model))
        x0, cond = latents(model), condition(model, 2)
        model.latents_of = lambda batch, rng=None: x0
        model.condition_of = lambda batch, drop=None: cond
        loss = model.loss({}, torch.Generator(), dropout=False).mean()
        assert loss.device == CUDA
        model.model_ema.update(model.model)
        with model.averaged_weights():
            pass
