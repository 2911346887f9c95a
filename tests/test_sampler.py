"""Sampler: what it takes and refuses, what files say of it, and every setting of it in every generating command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import examples
import numpy as np
import pytest
import torch
from PIL import Image
from test_conditioners import model_node, module
from typer.testing import CliRunner

import ldm
from ldm.cli import app
from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.images.marks import read_mark
from ldm.images.write import save_png, to_uint8
from ldm.model_folder import write_model_folder
from ldm.networks.encoder_unet import EncoderUNetModel
from ldm.sampling.sampler import TASKS, Sampler
from ldm.scorers.ensemble import Ensemble, Task, View, save_scorer

FROZEN = Path(__file__).parent / "frozen" / "0.1.0"
CLASSES = ["A", "B", "C"]
CONDITIONS = {
    "ssl": module("ssl.PatchEmbedder", embed_dim=5, context_dim=24, dropout=0.1),
    "class": module("class_token.ClassEmbedder", classes=CLASSES, dim=128, acts="vector", dropout=0.1),
    "score": module("score.ScoreEmbedder", dim=128, dropout=0.1),
}
NODE = model_node(module("compose.ConditionerSet", conditioners=CONDITIONS))
JUDGE = {
    "image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1,
    "attention_resolutions": [], "channel_mult": [1, 1], "num_head_channels": 32, "pool": "adaptive",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `model`, `weak`, `judge` (a classifier of noisy images), `scorer`; features.npy; images of 16 px."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("model", "weak")):
        torch.manual_seed(seed)
        model = instantiate_from_config(NODE).eval()
        with torch.no_grad():
            for parameter in model.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        write_model_folder(folder / name, NODE, model.state_dict(), {"mpp": 0.5, "tile_size": 16})
    torch.manual_seed(3)
    judge = EncoderUNetModel(**JUDGE)
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    node = {"target": "ldm.networks.encoder_unet.EncoderUNetModel", "params": JUDGE}
    write_model_folder(folder / "judge", node, judge.state_dict(), {"classes": CLASSES})
    rng = np.random.default_rng(0)
    np.save(folder / "features.npy", rng.normal(size=(2, 3, 5)).astype(np.float32))
    for i in range(3):
        save_png(folder / "images" / f"{i}.png", rng.integers(0, 256, (16, 16, 3), np.uint8), {})
    (folder / "scorer").mkdir()
    view = View(16, (0.5,) * 3, (0.5,) * 3, 16, 0.5)
    save_scorer(folder / "scorer", Ensemble(Task("graded", "score"), view, "resnet10t", 1))
    return folder


@pytest.fixture(scope="module")
def model(world):
    return ldm.load_model(world / "model")


def run(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# --- checked when made, and against the model ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of 1 or more; got 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"solver": "dpm9"}, "solver must be one of dpmpp_2m, .*; got 'dpm9'"),
        ({"schedule": "cosine"}, "schedule must be one of"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16"),
        ({"eta": 2.0, "solver": "ddim"}, r"eta must be a number in 0\.\.1; got 2.0"),
        ({"eta": 0.5, "solver": "euler"}, "euler does not take it"),
        ({"guidance_scale": float("nan")}, "a guidance scale is a finite number"),
        ({"guidance_interval": (3.0, 1.0)}, "a guidance interval is"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be a number in 0\.\.1"),
        ({"cache": 2, "compile": True}, "either compiled or keeps its deep features"),
        ({"cache": 2, "guidance_interval": (0.1, 1.0)}, "guide all steps, or leave the cache out"),
        ({"guidance_scale": {"class": 2.0}, "guidance_rescale": 0.5}, "guidance scales by name go without"),
        ({"seed": -1}, "seed must be a whole number of 0 or more"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more"),
    ],
)
def test_what_cannot_be_is_told_when_it_is_made(settings, message):
    with pytest.raises(UserError, match=message):
        Sampler(**settings)


def test_what_the_model_cannot_do_is_told_before_it_is_sampled(model):
    with pytest.raises(UserError, match="dpmpp_2m does not take it"):
        Sampler(eta=0.5).settled(model, "sample")
    with pytest.raises(UserError, match=r"steps must be in 1\.\.1000; got 1001"):
        Sampler(steps=1001).settled(model, "sample")
    cond = model.condition(class_="A") | {"target": torch.zeros(1).long()}
    with pytest.raises(UserError, match="give the classifier that guides"):
        ldm.sample(model, cond, sampler=Sampler(steps=1))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_all_it_needs(model, task):
    model = examples.tiny_fields() if task == "field" else model
    settled = Sampler().settled(model, task)
    assert settled.settled(model, task) == settled
    assert None not in (settled.steps, settled.solver, settled.schedule, settled.guidance_scale, settled.precision)
    assert settled.guidance_scale == (1.0 if task == "invert" else 2.0)
    assert settled.precision == "fp32"  # on a CPU, whatever it can do
    assert Sampler().record(model, task) == {"seed": 0}


def test_files_say_the_seed_and_what_differs(model):
    told = Sampler(seed=4, steps=20, solver="ddim", guidance_interval=(0.5, 7.0), batch_size=3).record(model, "sample")
    assert told == {"seed": 4, "solver": "ddim", "guidance_interval": [0.5, 7.0]}
    assert Sampler(guidance_interval=(1.0, 7.0)).record(model, "large_image") == {"seed": 0}


def test_an_ancestral_sampler_takes_the_models_variance_everywhere(oracle, tmp_path):
    """A published model with a learned variance: a translation from noise alone is the sample; windows have it too."""
    from test_convert_guided import converted

    golden = torch.load(oracle / "hismmdm_unet.pt", weights_only=True)
    model = ldm.load_model(converted(tmp_path, golden["state_dict"], golden["config"], classes=list("abcde")))
    assert model.learn_sigma
    sampler = Sampler(steps=3, solver="ddpm", schedule="trailing", guidance_scale=2.0, progress=False)
    learned = sampler.settled(model, "sample").guided(model)
    assert learned.variance is None
    cond, image = model.condition(class_="b"), golden["image"]
    tile = ldm.sample(model, cond, 1, sampler)
    free = ldm.translate(model, image[:1], None, cond, sampler, ldm.Inversion(start="noise"))
    with pytest.MonkeyPatch.context() as patch:  # the noise alone, as `sample` begins
        patch.setattr("ldm.sampling.translate.encode_images", lambda model, images: torch.zeros_like(images))
        assert torch.equal(ldm.translate(model, image[:1], None, cond, sampler, ldm.Inversion(start="noise")), tile)
    assert not torch.equal(free, tile)
    wide = ldm.translate(model, torch.cat([image[:1]] * 2, 3), None, cond, sampler, ldm.Inversion(start="noise"))
    assert wide.shape == (1, 3, 16, 32)
    small = ldm.Inversion(enlarge=2)
    assert ldm.translate(model, image[:1, :, ::2, ::2], None, cond, sampler, small).shape == (1, 3, 16, 16)
    model.metadata["variance"], model.learn_sigma = "fixedlarge", False
    assert sampler.settled(model, "sample").guided(model).variance == 1.0


# --- every setting in every command ----------------------------------------------------------------------------------


def command(name: str, world: Path) -> tuple[list[Any], str]:
    """A generating command without its settings and its --out, and the image of it to look at."""
    model = ["--model", world / "model", "--steps", 4]
    features = ["--features", world / "features.npy"]
    images = ["--images", world / "images"]
    given = ["--condition", "class=A", "--condition", "score=0.5"]
    return {
        "sample": (["sample", *model, *given, "--count", 2], "00001.png"),
        "large-image": (["large-image", *model, *features, *given], "out.png"),
        "translate": (["translate", *model, *images, "--source", "class=B", "--target", "class=A"], "1__A.png"),
        "sequence": (
            ["sequence", *model, "--vary", "score=0:1:2", "--condition", "class=A", "--count", 2], "00001_01.png"
        ),
        "sequence of images": (
            ["sequence", *model, *images, "--vary", "score=0:1:2", "--condition", "class=A"], "00001_01.png"
        ),
        "resample": (
            ["resample", *model, *given, "--scorer", world / "scorer", "--above", -9, "--until", 2], "000001.png"
        ),
    }[name]  # fmt: skip


COMMANDS = ("sample", "large-image", "translate", "sequence", "sequence of images", "resample")
# setting -> its options, what a file says of it; the image changes
SETTINGS: dict[str, tuple[Callable[[Path], list[Any]], dict[str, Any]]] = {
    "steps": (lambda world: ["--steps", 3], {}),
    "schedule": (lambda world: ["--schedule", "exponential"], {"schedule": "exponential"}),
    "solver": (lambda world: ["--solver", "heun"], {"solver": "heun"}),
    "guidance scale": (lambda world: ["--guidance-scale", 3.5], {"guidance_scale": 3.5}),
    "guidance scales by name": (lambda world: ["--guidance-scale", "class=3.5"], {"guidance_scale": {"class": 3.5}}),
    "guidance interval": (
        lambda world: ["--guidance-interval", "0.3,5", "--guidance-scale", 4],
        {"guidance_interval": [0.3, 5.0]},
    ),
    "guidance rescale": (lambda world: ["--guidance-rescale", 0.9, "--guidance-scale", 4], {"guidance_rescale": 0.9}),
    "negative": (
        lambda world: ["--negative-condition", "class=C", "--guidance-scale", 4],
        {"negative_condition": "class=C"},
    ),
    "guide": (lambda world: ["--guide-model", world / "weak", "--guidance-scale", 4], {"guide_sha256": None}),
    "classifier": (
        lambda world: ["--classifier", world / "judge", "--classifier-scale", 40],
        {"classifier_scale": 40.0},
    ),
    "cache": (lambda world: ["--cache", 2], {"cache": 2}),
    "seed": (lambda world: ["--seed", 5], {"seed": 5}),
    "precision": (lambda world: ["--precision", "bf16"], {"precision": "bf16"}),
}
REFUSED = {
    ("large-image", "cache"): "windows of a large image move",
}
UNCHANGED = {  # the way that an image inverted exactly goes is its own, whatever the noise
    ("translate", "seed"),
    ("sequence of images", "seed"),
}


@pytest.fixture(scope="module")
def usual(world, tmp_path_factory) -> dict[str, np.ndarray]:
    """The image of each command with all settings as they are."""
    found = {}
    for name in COMMANDS:
        call, image = command(name, world)
        found[name] = made(call, image, tmp_path_factory.mktemp("usual"))
    return found


def made(call: list[Any], image: str, folder: Path) -> np.ndarray:
    run(*call, "--out", folder / image if call[0] == "large-image" else folder)
    return np.asarray(Image.open(folder / image).convert("RGB"))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.slow
def test_every_setting_works_in_every_command_or_says_why_not(world, usual, name, setting, tmp_path):
    (call, image), (options, told) = command(name, world), SETTINGS[setting]
    call = [*call, *options(world)]
    if message := REFUSED.get((name, setting)):
        with pytest.raises(UserError, match=message):
            made(call, image, tmp_path)
        return
    pixels = made(call, image, tmp_path)
    assert np.array_equal(pixels, usual[name]) == ((name, setting) in UNCHANGED)
    mark = read_mark(tmp_path / image)
    for key, value in told.items():
        assert key in mark
        assert value is None or mark[key] == value
    if "steps" not in told and setting == "steps":
        assert mark["steps"] == 3


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.slow
def test_compiled_networks_and_code_of_others_reach_every_command(world, usual, name, tmp_path, monkeypatch):
    """Compiled code gives the same image; here PyTorch's compiler runs what it is given as it is."""
    calls, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: calls.append(1) or compile(*a, **k | {"backend": "eager"}))
    call, image = command(name, world)
    pixels = made([*call, "--compile"], image, tmp_path)
    assert calls
    assert np.abs(pixels.astype(int) - usual[name]).max() <= 1
    shutil.copytree(world / "model", tmp_path / "others")
    config = tmp_path / "others" / "config.yaml"
    config.write_text(config.read_text().replace("ldm.networks.unet.UNetModel", "elsewhere.Network"))
    monkeypatch.syspath_prepend(tmp_path)
    code = "from ldm.networks.unet import UNetModel\n\n\nclass Network(UNetModel):\n    pass\n"
    (tmp_path / "elsewhere.py").write_text(code)
    call[call.index(world / "model")] = tmp_path / "others"
    with pytest.raises(UserError, match="--allow-target"):
        made(call, image, tmp_path / "no")
    out = tmp_path / "yes"
    out.mkdir()
    assert np.array_equal(made([*call, "--allow-target", "elsewhere."], image, out), usual[name])


# --- the same words, the same image --------------------------------------------------------------------------------


@pytest.mark.slow
def test_python_and_commands_give_the_same_images_bit_for_bit(world, model, tmp_path):
    given = model.condition(class_="A", score=0.5)
    settings = ["--steps", 5, "--seed", 3, "--guidance-interval", "0.2,9"]
    sampler = Sampler(steps=5, seed=3, guidance_interval=(0.2, 9.0), progress=False)
    run("sample", "--model", world / "model", "--condition", "class=A", "--condition", "score=0.5", "--count", 3,
        *settings, "--out", tmp_path / "tiles")  # fmt: skip
    same(tmp_path / "tiles", "0*.png", ldm.sample(model, given, 3, sampler))
    run("large-image", "--model", world / "model", "--features", world / "features.npy", "--condition", "class=A",
        *settings, "--out", tmp_path / "large" / "image.png")  # fmt: skip
    features = np.load(world / "features.npy")
    same(tmp_path / "large", "*.png", ldm.large_image(model, features, None, sampler, conditions={"class": "A"}))
    run("translate", "--model", world / "model", "--images", world / "images", "--source", "class=B", "--target",
        "class=A", *settings, "--out", tmp_path / "other")  # fmt: skip
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted((world / "images").glob("*.png"))])
    images = torch.from_numpy(pixels).movedim(-1, 1).float() / 127.5 - 1
    source, target = model.condition(class_="B"), model.condition(class_="A")
    same(tmp_path / "other", "*__A.png", ldm.translate(model, images, source, target, sampler))


def same(folder: Path, pattern: str, images: torch.Tensor) -> None:
    found = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob(pattern))])
    assert np.array_equal(found, to_uint8(images))


@pytest.mark.slow
def test_a_model_whose_condition_is_the_image_is_told_it(tmp_path):
    """The shipped model of slices: without a word of settings, in Python and by the command."""
    folder = Path(__file__).parents[1] / "data" / "models" / "demo-slices"
    model = ldm.load_model(folder)
    rng = np.random.default_rng(0)
    shown = np.repeat(rng.integers(0, 256, (1, model.tile_size, model.tile_size, 1), np.uint8), 3, -1)
    save_png(tmp_path / "images" / "a.png", shown[0], {})
    run("translate", "--model", folder, "--images", tmp_path / "images", "--steps", 3, "--out", tmp_path / "out")
    images = torch.from_numpy(shown[..., :1]).movedim(-1, 1).float() / 127.5 - 1
    made = ldm.translate(model, images, sampler=Sampler(steps=3, progress=False))
    found = np.asarray(Image.open(tmp_path / "out" / "a__translated.png").convert("RGB"))
    assert np.array_equal(found, to_uint8(made)[0])


# --- what version 0.1.0 wrote ---------------------------------------------------------------------------------------


def test_a_model_folder_of_0_1_0_gives_its_images():
    model = ldm.load_model(FROZEN / "model")
    images = ldm.sample(model, model.condition(class_="A"), 2, Sampler(steps=4, seed=3, progress=False))
    torch.testing.assert_close(images, torch.from_numpy(np.load(FROZEN / "image.npy")), rtol=0, atol=1e-4)


def test_a_run_folder_of_0_1_0_is_a_model_and_goes_on(tmp_path):
    from ldm.training.command import main

    shutil.copytree(FROZEN / "run", tmp_path / "run")
    assert ldm.load_model(tmp_path / "run").tile_size == 8
    stores = [f"data.params.{part}.params.stores={FROZEN / 'cohort'}" for part in ("train", "validation")]
    assert main(["-t", "--resume", str(tmp_path / "run"), "--max_steps", "3", *stores]) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3


def test_an_unfinished_folder_of_0_1_0_is_finished(tmp_path):
    """Its files say every setting, those too that are as they always are."""
    shutil.copytree(FROZEN / "tiles", tmp_path / "tiles")
    assert "guidance_rescale" in json.loads(Image.open(tmp_path / "tiles" / "00000.png").text["SYNTHETIC"])
    call = ["sample", "--model", FROZEN / "model", "--condition", "class=A", "--count", 3, "--steps", 4]
    assert "wrote 1 tiles" in run(*call, "--seed", 3, "--out", tmp_path / "tiles")
    with pytest.raises(UserError, match=r"was made otherwise \(solver\)"):
        run(*call, "--seed", 3, "--solver", "euler", "--out", tmp_path / "tiles")
