"""The flow of PixCell's virtual staining: the published one, and features that it maps make another stain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import load, relative
from test_conditioners import model_node, module
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import instantiate_from_config
from ldm.convert import convert, read_published
from ldm.encoders.feature_map import StainingFlow, load_transport
from ldm.errors import UserError
from ldm.images.marks import read_mark
from ldm.model_folder import write_model_folder

DIM = 12


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_flow_is_the_published_one(shared, tmp_path):
    golden = load(shared("oracle") / "third" / "pixcell_staining_mlp.pt")
    torch.save({"state_dict": golden["state_dict"]}, tmp_path / "her2.pth")
    said = run("convert", tmp_path / "her2.pth", "--licence", "MIT", "--out", tmp_path / "map")
    assert "40 tensors taken" in said
    assert "left:" not in said
    flow = load_transport(tmp_path / "map")
    assert flow.metadata["licence"] == "MIT"
    with torch.no_grad():
        out = flow(golden["x_t"], golden["t"])
    assert relative(out, golden["out"]) < 1e-5
    loss = (out - (golden["ihc"] - golden["he"])).square().mean()
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-5, atol=0)
    assert relative(flow.map(golden["he"]), golden["euler10"]) < 1e-4
    assert relative(flow.map(golden["he"][:1]), golden["euler10"][:1]) < 1e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A map of features of 12 values, and a model on pixels of 2 x 2 such for a tile of 16 px."""
    folder = tmp_path_factory.mktemp("staining")
    torch.manual_seed(0)
    torch.save(StainingFlow(DIM, width=16, bottleneck=8, time_dim=24, depth=2).state_dict(), folder / "flow.pth")
    convert(folder / "flow.pth", folder / "map", say=lambda line: None)
    node = model_node(module("raw.FeatureTokens", embed_dim=DIM, grid=2))
    params = dict(in_channels=3, out_channels=3, image_size=16, patch_size=4, hidden_size=16, depth=2, num_heads=2,
                  context_dim=DIM, context_tokens=4)  # fmt: skip
    node["params"]["unet_config"] = {"target": "ldm.networks.dit.DiT", "params": params}
    model = instantiate_from_config(node)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    write_model_folder(folder / "model", node, model.state_dict(), {})
    (folder / "he").mkdir()
    generator = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / "he" / f"{name}.png")
    np.save(folder / "he.npy", generator.normal(size=(2, 4, DIM)).astype("f4"))
    return folder


def test_each_feature_of_a_tile_is_mapped(world, tmp_path):
    """Mapped while it is translated is the same as mapped before, part by part, in the order of the tiles."""
    options = ("translate", "--model", world / "model", "--images", world / "he", "--features", world / "he.npy")
    options += ("--start", "noise", "--steps", 2, "--device", "cpu")
    run(*options, "--map-features", world / "map", "--out", tmp_path / "mapped")
    grid = torch.from_numpy(np.load(world / "he.npy"))
    np.save(tmp_path / "ihc.npy", load_transport(world / "map").map(grid.flatten(0, 1)).view(grid.shape).numpy())
    run(*options, "--target-features", tmp_path / "ihc.npy", "--out", tmp_path / "given")
    run(*options, "--target-features", world / "he.npy", "--out", tmp_path / "same")
    made = {}
    for name, label in (("mapped", "mapped"), ("given", "ihc"), ("same", "he")):
        images = [np.array(Image.open(tmp_path / name / f"{tile}__{label}.png")).astype(int) for tile in "ab"]
        made[name] = np.stack(images)
    assert np.array_equal(made["mapped"], made["given"])
    assert abs(made["mapped"] - made["same"]).max() > 2
    assert "ssl=sha256:" in read_mark(tmp_path / "mapped" / "a__mapped.png")["condition"]


def test_what_does_not_fit_is_told(world, tmp_path):
    state = load(world / "flow.pth")
    torch.save(state | {"more.weight": torch.ones(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"more\.weight"):
        convert(tmp_path / "more.pth", tmp_path / "out", say=lambda line: None)
    torch.save({name: value for name, value in state.items() if name != "out.0.bias"}, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"out\.0\.bias"):
        convert(tmp_path / "less.pth", tmp_path / "out", say=lambda line: None)
    torch.save(state | {"out.2.weight": torch.ones(5, 16)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="maps features of 12 values to 5"):
        read_published(tmp_path / "other.pth")
    with pytest.raises(UserError, match="no diffusion model; give the folder of a diffusion model"):
        run("sample", "--model", world / "map", "--out", tmp_path / "tiles")
    np.save(tmp_path / "rows.npy", np.zeros((1, 6, DIM), np.float32))
    with pytest.raises(UserError, match=r"grid of 1 x 6 is .*Give \(2 n, 2 m, 12\) for n x m tiles, .* row by row"):
        run("sample", "--model", world / "model", "--features", tmp_path / "rows.npy", "--out", tmp_path / "tiles")
    with pytest.raises(UserError, match="the map takes features"):
        load_transport(world / "map").map(torch.zeros(2, 5))
    config = world / "map" / "config.yaml"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.yaml").write_text(config.read_text().replace("depth: 2", "depth: many"))
    with pytest.raises(UserError, match="depth"):
        load_transport(tmp_path / "odd")
