"""The commonest mistakes of Python callers are told with the right call, and arrays do in place of tensors."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import examples
import numpy as np
import pytest
import torch

import ldm
from conftest import ROOT
from ldm.encoders.encoder import load_encoder
from ldm.errors import UserError

FAST = ldm.Sampler(steps=2, progress=False)
MODEL, ENCODER = (ROOT / "data" / "models" / name for name in ("demo-ssl", "demo-encoder"))


@pytest.fixture(scope="module")
def model():
    """A tiny model of SSL features (N,8) and classes, on tiles of 16 px."""
    return examples.tiny_model()


PICTURE = (1, 3, 16, 16)
MISTAKES = {
    "features": (
        lambda m: ldm.sample(m, torch.zeros(4, 8)),
        r"an array of shape \(4, 8\), .*: ldm\.sample\(model, model\.condition\(features=\.\.\.\)\)",
    ),
    "an array": (lambda m: ldm.sample(m, np.zeros((4, 8))), r"not a condition; model\.condition\(features=\.\.\.\)"),
    "a dict": (lambda m: ldm.sample(m, {"features": np.zeros((4, 8))}), r"cond is a dict of values \(features\), not"),
    "a class": (lambda m: ldm.sample(m, "LUAD"), "cond is str 'LUAD', not a condition"),
    "steps": (lambda m: ldm.sample(m, None, 2, 50), r"sampler is ldm\.Sampler\(steps=\.\.\., seed=\.\.\.\), got 50"),
    "feature= of a condition": (
        lambda m: m.condition(feature=np.zeros(8)),
        "no condition 'feature'; did you mean 'features'",
    ),
    "feature=": (
        lambda m: ldm.sample(m, feature=np.zeros((2, 8))),
        r"ldm\.sample takes no feature=: give cond=model\.condition\(features=\.\.\.\)$",
    ),
    "settings of 0.1": (
        lambda m: ldm.sample(m, features=np.zeros((2, 8)), steps=20, guidance_scale=2.0, seed=0),
        r"and sampler=ldm\.Sampler\(steps=\.\.\., guidance_scale=\.\.\., seed=\.\.\.\)$",
    ),
    "settings of a large image": (
        lambda m: ldm.large_image(m, np.zeros((2, 2, 8)), mode="overlap", class_="A"),
        r"give windows=ldm\.Windows\(mode=\.\.\.\) and conditions=\{'class': \.\.\.\}$",
    ),
    "settings of a translation": (
        lambda m: ldm.translate(m, np.zeros(PICTURE), start="noise", class_="A"),
        r"give inversion=ldm\.Inversion\(start=\.\.\.\) and target=model\.condition\(class_=\.\.\.\)$",
    ),
    "another name": (lambda m: ldm.sample(m, num_steps=20), r"give sampler=ldm\.Sampler\(steps=\.\.\.\)$"),
    "a typo": (lambda m: ldm.translate(m, image=np.zeros(PICTURE)), "takes no image=; did you mean 'images'"),
    "no model": (lambda m: ldm.sample(count=2), r"missing .* 'model'; it is called as ldm\.sample\(model, cond"),
    "windows by name": (lambda m: ldm.large_image(m, np.zeros((2, 2, 8)), windows="overlap"), "windows is ldm.Windows"),
    "a setting of the sampler": (lambda m: ldm.Sampler(step=20), r"ldm\.Sampler takes no step=; did you mean 'steps'"),
    "settings by place": (lambda m: ldm.Sampler(20), r"by name, as ldm\.Sampler\(steps=\.\.\.\)"),
    "0 to 255": (lambda m: ldm.translate(m, torch.full(PICTURE, 255.0)), r"got 255 to 255\. .* images / 127\.5 - 1"),
    "uint8": (lambda m: ldm.translate(m, np.zeros(PICTURE, np.uint8)), r"give images / 127\.5 - 1"),
    "channels last": (lambda m: ldm.translate(m, np.zeros((1, 16, 16, 3))), r"\(N,H,W,C\): give images\.permute\(0, 3"),
    "one image": (lambda m: ldm.translate(m, np.zeros((3, 16, 16))), r"one image is images\[None\]"),
    "a target": (lambda m: ldm.translate(m, np.zeros(PICTURE), target=np.zeros(8)), "target is an array of shape"),
    "a condition for a grid": (lambda m: ldm.large_image(m, {"crossattn": 0}), r"ldm\.large_image\(model, grid\)"),
    "gpu": (lambda m: ldm.load_model(MODEL, device="gpu"), r"no device 'gpu'; choose auto, cpu.*a GPU is cuda"),
    "gpu of an encoder": (lambda m: load_encoder(str(ENCODER), device="gpu"), "no device 'gpu'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_with_the_right_call(mistake, model):
    call, told = MISTAKES[mistake]
    with pytest.raises(UserError, match=told):
        call(model)


def test_arrays_do_in_place_of_tensors(model):
    features = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    cond = model.condition(features=features)
    wanted = ldm.sample(model, cond, sampler=FAST)
    assert torch.equal(ldm.sample(model, {part: value.numpy() for part, value in cond.items()}, sampler=FAST), wanted)
    grown = torch.tensor(features, requires_grad=True)
    assert torch.equal(ldm.sample(model, model.condition(features=grown), sampler=FAST), wanted)
    translated = [ldm.translate(model, images, target=cond, sampler=FAST) for images in (wanted, wanted.numpy())]
    assert torch.equal(*translated)
    grid = torch.tensor(features[None], requires_grad=True)
    images = [ldm.large_image(model, given, sampler=FAST) for given in (features[None], grid)]
    assert torch.equal(*images)


def test_the_package_says_its_version_and_what_load_model_gives():
    assert ldm.__version__ == version("histoldm")
    assert "__version__" in dir(ldm)
    assert list(inspect.signature(ldm.sample).parameters) == ["model", "cond", "count", "sampler", "first"]
    assert inspect.signature(ldm.load_model).return_annotation == "LatentDiffusion"
