"""What the examples in docstrings know, beside the names of the module that they stand in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

import ldm
from conftest import ROOT
from ldm.data.tile_store import TileStore
from ldm.diffusion.denoiser import Cond
from ldm.diffusion.schedules import karras_sigmas
from ldm.diffusion.student import Student
from ldm.distillation.student import STUDENT
from ldm.latent_diffusion import LatentDiffusion
from ldm.metrics.measure import Measure
from ldm.report.page import Report, Section
from ldm.rng import sample_noise
from ldm.scorers.ensemble import Ensemble, View
from ldm.scorers.labelled import Task, read_labelled

EVERYWHERE = {"torch": torch, "np": np, "pd": pd, "Path": Path, "Image": Image, "ldm": ldm}


def _ideal(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def _echo(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    return cond["vector"].view(-1, 1, 1, 1).expand_as(x)


@cache
def tiny_model() -> LatentDiffusion:
    """A LatentDiffusion that learnt nothing: tiles of 16 px, features `ssl` of 8 values and a class A or B."""
    return _tiny(lambda unet: unet)


@cache
def tiny_student() -> LatentDiffusion:
    """The same, distilled by nobody: `Student()`."""
    about = {"channels": 4, **Student().outputs}
    return _tiny(lambda unet: {"target": STUDENT, "params": {"network": unet, **about}}, student={})


def _tiny(network: Callable[[dict[str, Any]], dict[str, Any]], **params: Any) -> LatentDiffusion:
    first_stage = {
        "embed_dim": 4,
        "ddconfig": {"z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
                     "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "mid_attention": False},
    }  # fmt: skip
    unet = {
        "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 8, "num_res_blocks": 1,
        "attention_resolutions": [1], "channel_mult": [1], "num_heads": 2, "use_spatial_transformer": True,
        "context_dim": 8, "norm_groups": 4,
    }  # fmt: skip
    conditioners = {
        "ssl": {"target": "ldm.conditioners.ssl.PatchEmbedder", "params": {"embed_dim": 8, "context_dim": 8}},
        "class": {
            "target": "ldm.conditioners.class_token.ClassEmbedder",
            "params": {"classes": ["A", "B"], "dim": 32, "acts": "vector"},
        },
    }
    torch.manual_seed(0)
    model = LatentDiffusion(
        network({"target": "ldm.networks.unet.UNetModel", "params": unet}),
        {"target": "ldm.autoencoder.autoencoder.AutoencoderKL", "params": first_stage},
        {"target": "ldm.conditioners.compose.ConditionerSet", "params": {"conditioners": conditioners}},
        use_ema=False,
        **params,
    )
    return model.eval().requires_grad_(False)


@cache
def tiny_fields() -> LatentDiffusion:
    """A model of fields that learnt nothing: crops of 4 x 4 features of 8 values, of a class A or B."""
    unet = {
        "image_size": 4, "in_channels": 4, "out_channels": 4, "model_channels": 8, "num_res_blocks": 1,
        "attention_resolutions": [], "channel_mult": [1], "num_heads": 1, "norm_groups": 4,
    }  # fmt: skip
    classes = {"classes": ["A", "B"], "dim": 32, "acts": "vector"}
    torch.manual_seed(0)
    model = LatentDiffusion(
        {"target": "ldm.networks.unet.UNetModel", "params": unet},
        {"target": "ldm.autoencoder.feature_codec.FeatureCodec", "params": {"dim": 8, "channels": 4, "glass": True}},
        {"target": "ldm.conditioners.class_token.ClassEmbedder", "params": classes},
        use_ema=False,
    )
    model.metadata |= {"field": {"feature": "tiny", "stride": 8}, "tile_size": 16, "mpp": 0.5}
    return model.eval().requires_grad_(False)


@cache
def _scorer() -> Ensemble:
    torch.manual_seed(0)
    task = Task("binary", "class", ("Normal", "Atypical"))
    scorer = Ensemble(task, View(16), "resnet10t", 2, {"channels": [8, 8, 16, 16], "stem_width": 8}, name="cells")
    return scorer.eval().requires_grad_(False)


def _report(fid: float) -> dict[str, Any]:
    figure = Measure("fid", "FID", fid, fid - 1, fid + 1, better="lower")
    return Report("An evaluation", {}, sections=[Section("distances", "Distance", measures=[figure])]).as_dict()


BY_NAME: dict[str, Callable[[pytest.FixtureRequest], object]] = {
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
    # a copy of the store that may be written to
    "writable": lambda request: TileStore.open(
        copytree(request.getfixturevalue("tiny_store"), request.getfixturevalue("tmp_path") / "own.zarr")
    ),
    # the folders of the models that come with the toolkit, and of checkpoints as other projects published theirs
    "models": lambda request: ROOT / "data/models",
    "published": lambda request: request.getfixturevalue("oracle"),
    # the cells as labelled images, atypical or not; a scorer of two networks that learnt nothing
    "labelled": lambda request: read_labelled(ROOT / "data/samples/cells", positive="Atypical"),
    "scorer": lambda request: _scorer(),
    # the JSON of two evaluations: FID 10 and 14, each ± 1
    "reports": lambda request: (_report(10.0), _report(14.0)),
    # a diffusion model, see `tiny_model`
    "model": lambda request: tiny_model(),
    # a model of fields of features, see `tiny_fields`
    "fields": lambda request: tiny_fields(),
    # `model` as a student: its network is told a guidance scale and gives policies
    "student": lambda request: tiny_student(),
    # a tile (256,256,3) uint8
    "tile": lambda request: np.array(Image.open(ROOT / "data/samples/cancers/TCGA-CR-7395_1600,2400.png"))[:256, :256],
}
