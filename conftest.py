"""Fixtures of the tests and of the examples in docstrings.

An example runs in an empty folder and knows `torch`, `np`, `pd`, `Path`, PIL's `Image`, `ldm` and the names in
EXAMPLES. Floats are compared to the digits that are written (pytest's NUMBER).
"""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

import ldm
from ldm.data.tile_store import TileStore
from ldm.diffusion.denoiser import Cond
from ldm.diffusion.schedules import karras_sigmas
from ldm.rng import sample_noise

ROOT = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A path of the larger sample data, which stand beside the repository where it is developed."""

    def find(name: str) -> Path:
        path = ROOT.parent / "shared" / name
        return path if path.exists() else pytest.skip(f"../shared/{name} does not come with the repository")

    return find


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tensors computed by the published implementations, and the checkpoints that they were computed with."""
    from published import unpack

    yield (folder := unpack(ROOT / "tests" / "oracle", tmp_path_factory.mktemp("oracle")))
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def demo_slide() -> Path:
    return ROOT / "data" / "demo" / "CMU-1-Small-Region.svs"


@pytest.fixture(scope="session")
def tiny_store(demo_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo slide as a tile store of 256 px tiles side by side, background tiles included. Do not write to it."""
    from data_prep.tile_slides import tile_slide

    return tile_slide(demo_slide, tmp_path_factory.mktemp("cohort"), keep_background=1.0)


def _ideal(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def _echo(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    return cond["vector"].view(-1, 1, 1, 1).expand_as(x)


EXAMPLES: dict[str, Callable[[pytest.FixtureRequest], object]] = {
    # the ideal denoiser of pixels from a standard normal distribution; one whose image is its condition's vector (B,1)
    "denoiser": lambda request: _ideal,
    "echo": lambda request: _echo,
    # two images (2,3,8,8) of noise at sigma 10, levels (21,) of twenty steps from there to 0, the noise of each step
    "x": lambda request: 10 * sample_noise([0, 1], (3, 8, 8)),
    "sigmas": lambda request: karras_sigmas(20, 0.01, 10.0),
    "noise": lambda request: lambda step: sample_noise([0, 1], (3, 8, 8), step + 1),
    # features (200,16) of generated images and (300,16) of real ones, a quarter deviation apart in each dimension
    "generated": lambda request: np.random.default_rng(0).normal(0.25, 1, (200, 16)).astype(np.float32),
    "real": lambda request: np.random.default_rng(1).normal(0, 1, (300, 16)).astype(np.float32),
    # the path of a slide, a folder of images of cells in subfolders by class, a tile store
    "slide_path": lambda request: ROOT / "data/demo/CMU-1-Small-Region.svs",
    "cells": lambda request: ROOT / "data/samples/cells",
    "store": lambda request: TileStore.open(request.getfixturevalue("tiny_store")),
    # a tile (256,256,3) uint8
    "tile": lambda request: np.array(Image.open(ROOT / "data/samples/cancers/TCGA-CR-7395_1600,2400.png"))[:256, :256],
}


@pytest.fixture(autouse=True)
def _example(request: pytest.FixtureRequest) -> None:
    """The folder and the names of the examples of a docstring: of EXAMPLES, what they use."""
    if not (examples := getattr(request.node, "dtest", None)):
        return
    request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
    source = "".join(example.source for example in examples.examples)
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    names = request.getfixturevalue("doctest_namespace")
    names |= {"torch": torch, "np": np, "pd": pd, "Path": Path, "Image": Image, "ldm": ldm}
    names |= {name: make(request) for name, make in EXAMPLES.items() if name in used}
