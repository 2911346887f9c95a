"""Conditions that are drawn from a list: what an item is, how often, and a student that is trained on nothing else."""

from __future__ import annotations

import pytest
import torch
import yaml
from test_distillation import UNET, teacher

import ldm
from ldm.data.drawn import DrawnConditions
from ldm.data.module import TileDataModule
from ldm.errors import UserError
from ldm.model_folder import export, load_model
from ldm.training.command import main

SCORE = {"target": "ldm.conditioners.score.ScoreEmbedder", "params": {"dim": 8, "acts": "crossattn"}}


def test_every_choice_comes_equally_often_and_numbers_of_a_range_are_even():
    drawn = DrawnConditions([{"stain": "he", "score": [0.2, 0.6]}, {"stain": "ki67", "score": 1}], length=400)
    items = [drawn[(i, 0)] for i in range(len(drawn))]
    assert [item["stain"] for item in items[:4]] == ["he", "ki67", "he", "ki67"]
    assert {float(item["score"]) for item in items if item["stain"] == "ki67"} == {1.0}
    scores = torch.stack([item["score"] for item in items if item["stain"] == "he"])
    assert scores.dtype == torch.float32
    assert scores.min() > 0.2
    assert scores.max() < 0.6
    assert abs(float(scores.mean()) - 0.4) < 0.03
    assert torch.equal(torch.stack([drawn[(i, 0)]["score"] for i in range(0, 400, 2)]), scores)  # and again the same
    assert not torch.equal(drawn[(0, 1)]["score"], scores[0])


def test_a_batch_has_what_a_conditioner_reads():
    node = {
        "target": "ldm.data.drawn.DrawnConditions",
        "params": {"choices": [{"text": "skin", "modality": "H&E"}, {"text": "T1", "modality": "MRI"}], "length": 8},
    }
    data = TileDataModule(train=node, validation=node, batch_size=4)
    (batch, _) = data.val_dataloader()
    assert sorted(zip(batch["text"], batch["modality"])) == [("T1", "MRI")] * 2 + [("skin", "H&E")] * 2
    assert data.metadata == {}


@pytest.mark.parametrize(
    ("choices", "length", "message"),
    [
        ([], 8, "one or more conditions"),
        ({"score": [0, 1]}, 8, "one or more conditions"),
        ([{"score": 0.5}, {"stain": "he"}], 8, "the first has score, number 2 stain"),
        ([{}], 8, "number 1 nothing"),
        ([{"score": [1, 0]}], 8, r"'score' is text, a number, or a range \[low, high\]; got \[1, 0\]"),
        ([{"score": [0, 0.5, 1]}], 8, "a range"),
        ([{"score": True}], 8, "a range"),
        ([{"score": float("nan")}], 8, "a range"),
        ([{"score": ["a", "b"]}], 8, "a range"),
        ([{"score": None}], 8, "a range"),
        ([{"score": 1}], 0, "1 or more; got 0"),
        ([{"score": 1}], 2.5, "1 or more; got 2.5"),
    ],
)
def test_choices_that_are_none_are_told(choices, length, message):
    with pytest.raises(UserError, match=message):
        DrawnConditions(choices, length)


@pytest.mark.slow
def test_a_student_is_trained_on_conditions_alone(tmp_path):
    own = teacher(tmp_path / "teacher", pixels=True, conditioner=SCORE, parameterization="v", beta_schedule="cosine")
    params = {"choices": [{"score": [0.0, 1.0]}], "length": 16}
    node = {"target": "ldm.data.drawn.DrawnConditions", "params": params}
    config = {
        "model": {
            "base_learning_rate": 1e-3, "scale_lr": False, "target": "ldm.distillation.student.Distillation",
            "params": {"teacher": str(own), "components": 2, "substeps": 8, "guidance": [1.0, 8.0]},
        },
        "data": {
            "target": "ldm.data.module.TileDataModule", "params": {"batch_size": 8, "train": node, "validation": node},
        },
        "lightning": {"trainer": {"max_steps": 2, "accelerator": "cpu", "precision": "32", "val_check_interval": 2}},
    }  # fmt: skip
    (tmp_path / "distil.yaml").write_text(yaml.safe_dump(config))
    assert main(["-t", "--base", str(tmp_path / "distil.yaml"), "--logdir", str(tmp_path / "logs")]) == 0
    model = load_model(export(next((tmp_path / "logs").iterdir()), tmp_path / "student"))
    assert model.metadata["teacher"] == "teacher"
    before = load_model(own).model.diffusion_model.state_dict()
    moved = model.model.diffusion_model.network.state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in before.items() if name in moved)
    images = ldm.sample(model, model.condition(score=0.5), count=2, sampler=ldm.Sampler(guidance_scale=8.0))
    assert images.shape == (2, 3, UNET["image_size"], UNET["image_size"])
