"""`benchmarks/few_steps.py`: real tiles under a model's conditions, and whether images follow these."""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from test_distillation import teacher

from conftest import ROOT
from ldm.data.cohort import merge_index, write_store
from ldm.errors import UserError
from ldm.model_folder import load_model, read_model_folder

sys.path.append(str(ROOT / "benchmarks"))

import few_steps
import few_steps_tiles
import text_prompts

CLASS = {"target": "ldm.conditioners.class_token.ClassEmbedder", "params": {"classes": ["A", "B"], "dim": 8}}
MODELS = ROOT / "data" / "models"


def asked(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    few_steps_tiles.add_options(parser.add_argument)
    return parser.parse_args(words)


def read(folder, *words: str) -> few_steps_tiles.Tiles:
    return few_steps_tiles.read_tiles(asked(*words), load_model(folder), read_model_folder(folder)[1])


@pytest.fixture(scope="module")
def stains(tmp_path_factory):
    """A teacher of the classes A and B, and 12 dark tiles that are A's, 36 bright ones B's, of two splits."""
    folder = tmp_path_factory.mktemp("stains")
    rng = np.random.default_rng(0)
    bright = np.arange(48) % 4 > 0
    pixels = (rng.integers(0, 60, (48, 16, 16, 3)) + 180 * bright[:, None, None, None]).astype(np.uint8)
    attrs = {"tile_size": 16, "mpp": 1.0, "downsample": 1.0}
    coords = np.stack([np.arange(48) * 16, np.zeros(48, int)], 1)
    write_store(folder / "cohort", "a", lambda i: pixels[i], 48, attrs=attrs, coords=coords)
    rows = {"slide": "a", "row": range(48), "class": np.where(bright, "B", "A"), "patient": np.arange(48) // 8}
    merge_index(folder / "cohort", pd.DataFrame(rows | {"split": np.where(np.arange(48) < 24, "train", "val")}))
    made = teacher(folder / "teacher", pixels=True, conditioner=CLASS)
    return made, folder / "cohort"


def test_classes_come_equally_often_and_a_classifier_of_real_tiles_tells_them(stains):
    made, cohort = stains
    tiles = read(made, "--store", str(cohort), "--count", "8", "--blocks", "patient", "--classifier-steps", "60")
    assert tiles.measure == "called"
    assert tiles.conditions == {"class": ["A"] * 4 + ["B"] * 4}
    assert (tiles.pixels.mean((1, 2, 3)) > 120).tolist() == [False] * 4 + [True] * 4
    assert len(set(tiles.blocks)) == 3  # patients of the split val
    both = np.stack([tiles.pixels, tiles.pixels])
    assert tiles.follow(both)[0] == 1.0
    assert tiles.follow(both[:, ::-1])[0] == 0.0
    half = np.stack([tiles.pixels, tiles.pixels[::-1]])
    value, low, high = tiles.follow(half)
    assert low <= value == 0.5 <= high
    without = read(made, "--store", str(cohort), "--count", "8", "--classifier-steps", "1")
    assert len(set(without.blocks)) == 8  # a column of the slide each


@pytest.mark.slow
def test_scores_are_followed_by_their_ranks():
    words = ("--store", str(ROOT / "data/samples/cells-held-out"), "--split", "test", "--blocks", "case")
    tiles = read(MODELS / "demo-mitosis", *words, "--count", "60")
    assert tiles.measure == "spearman"
    value, low, high = tiles.follow(tiles.pixels[None])
    assert low < value < high
    assert 0.2 < value < 0.8
    scores = tiles.conditions["score"]
    order = np.argsort(scores, kind="stable")
    turned = np.empty_like(tiles.pixels)
    turned[order] = tiles.pixels[order[::-1]]  # the highest score has the cell of the lowest
    assert tiles.follow(turned[None])[0] < 0
    assert tiles.follow(np.stack([tiles.pixels, turned]))[0] < value


def test_a_model_of_other_conditions_is_refused_with_their_names():
    with pytest.raises(UserError, match="text with a modality; the teacher's conditions are class, mutation, expr"):
        read(MODELS / "demo-omics", "--store", "cohort")


def test_a_captions_kind_is_told_from_its_words():
    assert text_prompts.kind_of("H&E", "colon cancer, few nuclei") == "H&E colon cancer"
    assert text_prompts.kind_of("IHC", "FHL2, colon") == "FHL2"
    assert text_prompts.kind_of("MRI", "T1, with tumour") == "T1"
    for modality, text in (("MRI", "T1 with contrast, with tumour"), ("X-ray", "skin"), ("IHC", "skin")):
        assert text_prompts.kind_of(modality, text) == ""


def test_figures_of_an_arm_and_their_table(stains):
    made, cohort = stains
    tiles = read(made, "--store", str(cohort), "--count", "12", "--blocks", "patient", "--classifier-steps", "30")

    def judge(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.movedim(-1, 1).float(), 8).flatten(1)

    real = few_steps.features_of(judge, tiles.pixels)
    other = np.random.default_rng(1).permuted(tiles.pixels, axis=1)
    images = np.stack([tiles.pixels, other])
    found = {"seconds": [2.0], **few_steps.measure(images, tiles, judge, real, None)}
    again = {"seconds": [0.5], **few_steps.measure(images, tiles, judge, real, images.astype(np.float32))}
    assert {"seconds", "KID", "FD", "recall", "coverage", "spread", "called"} <= set(found)
    assert again["apart"] == [0.0]
    assert found["spread"][0] > 0
    text = few_steps.table({"teacher": found, "student": again})
    assert "4.0 times as fast" in text
    assert "1.000 of the teacher's" in text
    assert "within the teacher's interval" in text
