"""Training that aligns a block of the network, or the latents of a first stage, with features of the store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_cohort import DIT, FIRST_STAGE, NETWORKS, UNET, config, make_cohort, train

from ldm.autoencoder.alignment import LatentAlignment, TokenAlignment, balance
from ldm.data.module import TileDataModule
from ldm.errors import UserError
from ldm.model_folder import export, load_first_stage, load_model
from ldm.networks.repa import Alignment, Projection, alignment_of, projection, watched
from ldm.training.command import main


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    return make_cohort(tmp_path)


def network_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return NETWORKS[kind](**(UNET if kind == "unet" else DIT))


def test_a_projection_is_compared_with_what_the_store_holds():
    torch.manual_seed(0)
    project, maps = Projection(5, 3, 8), torch.randn(2, 5, 4, 6)
    with torch.no_grad():
        places = project.layers(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)       # (B,3,4,6)
        assert project(maps, places).abs().max() < 1e-6
        assert project(maps, 7 * places.mean((2, 3))).abs().max() < 1e-6            # of the whole image
        assert project(maps, F.adaptive_avg_pool2d(places, (2, 2))).abs().max() < 1e-6
        fine = F.interpolate(places, scale_factor=2)                                # finer than the network's
        assert project(maps, fine).abs().max() < 1e-6
        assert project(maps, -places).sub(2).abs().max() < 1e-6
        turned = project(maps, places.flip(3))
    assert (turned > 0.005).all()                                                  # place by place


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_gradient_reaches_what_lies_before_the_block_alone(kind, checkpointed):
    torch.manual_seed(0)
    network = network_of(kind)
    network.use_checkpoint = checkpointed
    alignment = alignment_of({"feature": "x", "block": 2, "hidden": 8}, network)
    project = projection(alignment, network, torch.zeros(6, 2, 2), seed=0)
    with watched(network, alignment) as maps:
        out = network(torch.randn(2, 4, 8, 16), torch.tensor([3.0, 700.0]))
    assert len(maps) == 1
    assert maps[0].shape == ((2, 32, 8, 16) if kind == "unet" else (2, 32, 4, 8))
    if kind == "dit":  # blocks begin as the identity
        for block in network.blocks:
            torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
        with watched(network, alignment) as maps:
            out = network(torch.randn(2, 4, 8, 16), torch.tensor([3.0, 700.0]))
    project(maps[0], torch.randn(2, 6, 2, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in project.parameters())
    stages = list(network.stages)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stages[0].parameters())
    assert all(p.grad is None for p in stages[2].parameters())
    assert out.shape == (2, 4, 8, 16)
    assert not network._forward_pre_hooks
    assert not stages[1]._forward_hooks


@pytest.mark.parametrize(("kind", "feature"), [("unet", "own"), ("dit", "own-map")])
def test_what_a_training_leaves_knows_nothing_of_the_alignment(cohort, tmp_path, kind, feature):
    cfg = config(cohort, kind, feature, weight=2.0)
    run = train(tmp_path, cfg, "aligned")
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert any(name.startswith("repa.layers") for name in content["state_dict"])
    model = load_model(run)
    assert not hasattr(model, "repa")
    folder = export(run, tmp_path / "model")
    assert "repa" not in (folder / "config.yaml").read_text()
    exported = load_model(folder).model.state_dict()
    assert all(torch.equal(value, exported[name]) for name, value in model.model.state_dict().items())


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(cohort, tmp_path):
    cfg = config(cohort, "dit", "own-map")
    whole = train(tmp_path, cfg, "whole")
    part = train(tmp_path, cfg, "part", "--max_steps", "2")
    assert main(["-t", "--resume", str(part), "--max_steps", "4", "--no-test"]) == 0
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, part)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_targets_are_of_the_training_alone_and_are_not_recorded(cohort):
    node = {"target": "ldm.data.datasets.TileDataset", "params": {"keys": ["latent"]}}
    data = TileDataModule(
        node, node, stores=str(cohort), latents="first", conditions={"map": "features/own-map"},
        targets={"repa": "features/own"},
    )  # fmt: skip
    assert set(data.datasets["train"][0]) - set(data.datasets["validation"][0]) == {"repa"}
    assert set(data.metadata["conditions"]) == {"map"}


@pytest.mark.parametrize(
    ("repa", "message"),
    [
        ({"block": 10}, "the network has 9 blocks"),
        ({"blok": 1}, "did you mean 'block'"),
        ({"block": 0}, "counts from 1"),
        ({"weight": 0}, "above 0"),
        ({"feature": "owm"}, "did you mean 'own'"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(cohort, tmp_path, capsys, repa, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(config(cohort, "unet", **{"feature": "own", **repa})))
    assert main(["-t", "--base", str(path), "--logdir", str(tmp_path / "logs")]) == 2
    assert message in capsys.readouterr().err


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match="does not say which blocks"):
        alignment_of({"feature": "x", "block": 1}, torch.nn.Linear(1, 1))
    assert Alignment("x", 1).weight == 0.5


# --- latents of a first stage -----------------------------------------------------------------------------------------


def first_stage_config(cohort: Path, **align) -> dict:
    loss = {"disc_start": 3, "perceptual_weight": 0, "disc_ndf": 4, "disc_num_layers": 2}
    node = {"target": "ldm.data.datasets.TileDataset"}
    return {
        "model": {
            "base_learning_rate": 1e-3, "scale_lr": False, "target": "ldm.autoencoder.stage.AutoencoderStage",
            "params": {
                "first_stage": FIRST_STAGE, "align": {"feature": "own-map", **align},
                "loss": {"target": "ldm.autoencoder.losses.LPIPSWithDiscriminator", "params": loss},
            },
        },
        "data": {
            "target": "ldm.data.module.TileDataModule",
            "params": {"batch_size": 8, "stores": str(cohort), "keys": ["image"], "train": node, "validation": node},
        },
        "lightning": {"trainer": {"accelerator": "cpu", "max_steps": 4}},
    }  # fmt: skip


def test_angles_of_latents_and_their_differences_have_margins():
    align = TokenAlignment(LatentAlignment("x"), channels=2, feature=torch.zeros(2, 1, 2))
    with torch.no_grad():
        align.project.weight.copy_(torch.eye(2)[:, :, None, None])
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    same, apart = (torch.stack(pair, 1)[None, :, None] for pair in ((one, one), (one, two)))    # (1,2,1,2)
    with torch.no_grad():
        assert align(3 * same, same) == 0
        assert align(-same, same) == pytest.approx(1.5)  # cosine -1, but equal to one another
        assert align(apart, same) == pytest.approx(0.5 / 2 + 0.75 * 2 / 4)  # one of two places, two of four pairs


def test_the_balance_is_the_ratio_of_gradients():
    layer = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    assert balance((layer**2).sum(), layer.sum(), layer) == pytest.approx(10 / 2**0.5, rel=1e-3)


def test_a_first_stage_with_aligned_latents_is_a_first_stage(cohort, tmp_path):
    run = train(tmp_path, first_stage_config(cohort), "latents")
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["state_dict"]["align.project.weight"].shape == (6, 4, 1, 1)
    part = train(tmp_path, first_stage_config(cohort), "part", "--max_steps", "2")
    assert main(["-t", "--resume", str(part), "--max_steps", "4", "--no-test"]) == 0
    again = torch.load(part / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in content["state_dict"].items())
    first_stage = load_first_stage(str(export(run, tmp_path / "first-stage")))
    assert first_stage.latent(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("align", "message"),
    [
        ({"feature": "own"}, "is to be a map of patch tokens"),
        ({"feature": "own-mop"}, "did you mean 'own-map'"),
        ({"weight": 0}, "align.weight is between"),
        ({"wieght": 1}, "did you mean 'weight'"),
    ],
)
def test_mistakes_in_an_alignment_of_latents_are_told(cohort, tmp_path, capsys, align, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(first_stage_config(cohort, **align)))
    assert main(["-t", "--base", str(path), "--logdir", str(tmp_path / "logs")]) == 2
    assert message in capsys.readouterr().err
