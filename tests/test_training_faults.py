"""What goes wrong in a training or with its weights is told, and replaces nothing that was good."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm import config
from ldm.autoencoder import weights as first_stage_weights
from ldm.convert import convert, export_as, load_model
from ldm.encoders.encoder import load_encoder
from ldm.errors import UserError
from ldm.interop.weights import averaged, not_finite
from ldm.model_folder import export, load_first_stage, load_weights, read_model_folder, write_model_folder
from ldm.training import command
from ldm.training.health import Diverged, FiniteTraining

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "configs" / "tiny.yaml")
FROZEN = ROOT / "tests" / "frozen" / "0.1.0"
MODEL = ROOT / "data" / "models" / "demo-ssl"
NAN = float("nan")


@pytest.fixture(autouse=True)
def _tiny_is_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "ALLOWED", (*config.ALLOWED, "tiny_training."))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def train(*argv: str) -> int:
    quiet = ("--enable_progress_bar", "false", "--limit_val_batches", "1", "lightning.callbacks.image_logger=null")
    return command.main(["-t", *quiet, *argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 4 steps whose learning rate was scaled: 4 * 1e-3."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "ALLOWED", (*config.ALLOWED, "tiny_training."))
        patch.chdir(folder)
        assert train("-b", TINY, "-l", "logs", "--max_steps", "4") == 0
    (run,) = (folder / "logs").iterdir()
    return run


@pytest.fixture
def run(finished: Path) -> Path:
    """A copy of it in the working folder."""
    return Path(shutil.copytree(finished, "run"))


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


# --- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_is_nan_stops_the_training_and_the_command_told_goes_on(capsys):
    every = "lightning.callbacks.last_checkpoint.params.every_n_train_steps=2"
    assert train("-b", TINY, every, "data.params.nan_at=7") == 2
    error = capsys.readouterr().err
    (run,) = Path("logs").iterdir()
    assert "error: the loss became NaN or infinite at step 7." in error
    assert f"The last good weights are in {run}/checkpoints/last.ckpt (step 6)." in error
    assert "Try a lower model.base_learning_rate (now 0.001), lightning.trainer.gradient_clip_val=1.0, and" in error
    assert "Traceback" not in error
    assert (last(run)["global_step"], not_finite(last(run)["state_dict"])) == (6, {})
    told = shlex.split(error.rpartition("python main.py -t ")[2])
    assert train(*told, "data.params.nan_at=-1", "--max_steps", "8") == 0
    assert "learning rate 4.00e-03 -> 4.00e-04, from step 6 on" in capsys.readouterr().out
    assert last(run)["lr_schedulers"][0]["base_lrs"] == [4e-4]


def test_weights_that_are_nan_are_never_saved(capsys):
    assert train("-b", TINY, "data.params.broken_at=3") == 2  # validation, and the best checkpoint, come after batch 3
    error = capsys.readouterr().err
    assert "weights became NaN or infinite by step 3: 1 of the 48 values of average are NaN" in error
    assert "Nothing was saved before it." in error
    (run,) = Path("logs").iterdir()
    assert list((run / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_way_of_saving_saves_weights_that_are_nan(capsys, precision):
    """Lightning asks no callback about a checkpoint of weights alone, nor whoever calls `Trainer.save_checkpoint`."""
    own = "lightning.modelcheckpoint.params"
    ways = [f"{own}.save_weights_only=true", f"{own}.monitor=null", f"{own}.every_n_train_steps=1"]
    ways += ["lightning.callbacks.last_checkpoint=null", f"{own}.save_last=true", f"{own}.filename=only"]
    assert train("-b", TINY, *ways, "data.params.broken_at=3", "--precision", precision) == 2
    error = capsys.readouterr().err
    (run,) = Path("logs").iterdir()
    assert "weights became NaN or infinite by step 4: 1 of the 48 values of average are NaN" in error
    assert f"The last good weights are in {run}/checkpoints/" in error
    assert ".ckpt, which holds weights alone.\n" in error
    saved = sorted((run / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in saved] == ["last.ckpt", "only.ckpt"]
    for path in saved:
        content = torch.load(path, weights_only=True)
        assert (content["global_step"], not_finite(content["state_dict"])) == (3, {})


def test_a_loss_in_bf16_that_is_nan_keeps_the_last_good_checkpoint(capsys):
    every = "lightning.callbacks.last_checkpoint.params.every_n_train_steps=2"
    assert train("-b", TINY, every, "data.params.nan_at=5", "--precision", "bf16-mixed") == 2
    assert "Try a lower model.base_learning_rate (now 0.001), lightning.trainer.gradient_clip_val=1.0, lightning." \
        "trainer.precision=32-true" in capsys.readouterr().err
    (run,) = Path("logs").iterdir()
    assert (last(run)["global_step"], not_finite(last(run)["state_dict"])) == (4, {})


def test_moments_of_the_optimizer_that_are_infinite_are_not_saved(capsys):
    assert train("-b", TINY, "data.params.overflow_at=3") == 2
    assert "the optimizer's state became NaN or infinite by step 3" in capsys.readouterr().err
    (run,) = Path("logs").iterdir()
    assert list((run / "checkpoints").iterdir()) == []


def test_losses_on_a_gpu_are_judged_every_few_batches_and_fp16_may_overflow_once():
    module = torch.nn.Linear(1, 1)
    module.device = torch.device("meta")  # any that is no CPU; counting stays where it is asked for
    trainer = SimpleNamespace(world_size=1, global_step=0, precision="32-true")

    def show(watch: FiniteTraining, *losses: float) -> None:
        watch._seen, watch._bad, watch._first = 0, torch.tensor(0), torch.tensor(-1)
        for trainer.global_step, loss in enumerate(losses, start=1):
            watch.on_train_batch_end(trainer, module, {"loss": torch.tensor(loss)}, {"x": torch.tensor([NAN])}, 0)

    watch = FiniteTraining(every=3)
    show(watch, 1, NAN)
    with pytest.raises(Diverged, match=r"the loss became NaN or infinite at step 2 \(x of its batch holds NaN"):
        show(watch, 1, NAN, 1)
    trainer.precision = "16-mixed"
    show(watch, 1, float("inf"), 1)
    with pytest.raises(Diverged, match="at step 1"):
        show(watch, *[float("inf")] * 3)
    module.weight.data.fill_(NAN)
    with pytest.raises(Diverged, match="weights became NaN or infinite at step 2"):
        show(watch, 1, float("inf"), 1)


def broken_copy(folder: Path, of: str = "") -> Path:
    """A copy of a folder of weights, one value of which is NaN, in the part whose names begin with `of`."""
    copy = Path(shutil.copytree(folder, f"broken-{folder.name}"))
    state = load_file(copy / "model.safetensors")
    first = next(key for key, value in state.items() if value.ndim > 1 and key.startswith(of))
    state[first].view(-1)[0] = NAN
    save_file(state, copy / "model.safetensors")
    return copy


def frozen_with_nan() -> Path:
    checkpoint = Path(shutil.copytree(FROZEN / "run", "frozen")) / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    for name, value in content["state_dict"].items():
        if value.is_floating_point() and "out2weight" in name.replace(".", ""):  # raw and averaged
            value.view(-1)[0] = NAN
    torch.save(content, checkpoint)
    return checkpoint


DOORS = {
    "load_model": lambda: ldm.load_model(broken_copy(MODEL)),
    "load_first_stage": lambda: load_first_stage(str(broken_copy(MODEL, "first_stage"))),
    "load_weights": lambda: load_weights(ldm.load_model(MODEL), broken_copy(MODEL, "cond_stage")),
    "first stage": lambda: first_stage_weights.load_weights(
        load_first_stage(str(MODEL)), broken_copy(MODEL, "first_stage")
    ),
    "export": lambda: export(frozen_with_nan(), "out"),
    "a run as a model": lambda: load_model(frozen_with_nan().parents[1]),
    "encoder": lambda: load_encoder(str(broken_copy(ROOT / "data" / "models" / "demo-encoder"))),
    "convert --to": lambda: export_as("compvis", broken_copy(MODEL), "out"),
}


@pytest.mark.parametrize("door", DOORS)
def test_weights_with_nan_go_in_and_out_nowhere(door):
    with pytest.raises(UserError, match=r"of the \d+ values of .* are NaN or infinite"):
        DOORS[door]()
    assert not Path("out").exists()


def test_published_weights_with_nan_are_refused(oracle):
    folder = Path(shutil.copytree(oracle / "ldm_ckpt_lid_vq", "published"))
    content = torch.load(folder / "model.ckpt", weights_only=False)
    content["state_dict"]["first_stage_model.decoder.conv_in.weight"][0, 0, 0, 0] = float("inf")
    torch.save(content, folder / "model.ckpt")
    for enter in (lambda: convert(folder, "out", say=lambda line: None), lambda: ldm.load_model(folder)):
        with pytest.raises(UserError, match=r"values of first_stage_model\.decoder\.conv_in\.weight are NaN or inf"):
            enter()


def test_float16_that_overflows_is_told():
    node = {"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1}}
    with pytest.raises(UserError, match=r"out is not written: 1 of the 1 values of weight .*: store them in full"):
        write_model_folder("out", node, {"weight": torch.tensor([[1e6]])}, {}, torch.float16)
    assert read_model_folder(write_model_folder("out", node, {"weight": torch.tensor([[1e6]])}, {}))[0] == node


def test_averages_that_were_never_updated_are_told_and_left(capsys):
    raw = {"model.out.weight": torch.ones(2), "model.in.weight": torch.full((2,), 3.0)}
    fresh = {"model_ema.outweight": torch.zeros(2), "model_ema.inweight": torch.ones(2)}
    assert averaged(raw | fresh, raw, "model.ckpt") == raw
    assert "averaged weights in model.ckpt were never updated while it was trained; its raw" in capsys.readouterr().err
    counted = {"model_ema.outweight": torch.full((2,), 0.5), "model_ema.num_updates": torch.tensor(0)}
    assert averaged(raw | counted, raw, "model.ckpt") == raw
    counted["model_ema.num_updates"] += 7
    assert averaged(raw | counted, raw, "model.ckpt")["model.out.weight"].tolist() == [0.5, 0.5]


# --- resuming -------------------------------------------------------------------------------------------------------


def test_another_learning_rate_is_applied_told_and_recorded(run, capsys):
    assert train("-r", str(run), "model.base_learning_rate=1e-6", "--max_steps", "5") == 0
    out = capsys.readouterr().out
    assert "changed model.base_learning_rate: 0.001 -> 1e-06" in out
    assert "changed lightning.trainer.max_steps: 4 -> 5" in out
    assert "learning rate 4.00e-03 -> 4.00e-06, from step 4 on" in out
    held = last(run)
    (group,) = held["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], held["lr_schedulers"][0]["base_lrs"]) == (4e-6, [4e-6])
    assert group["lr"] == pytest.approx(4e-6 * 6 / 10)  # where the warm-up is
    assert held["histoldm_config"]["model"]["base_learning_rate"] == 1e-6
    assert train("-r", str(run), "--max_steps", "6") == 0
    assert "->" not in capsys.readouterr().out.replace("max_steps: 5 -> 6", "")


def test_scale_lr_stays_as_it_was(run, capsys):
    assert train("-r", str(run), "--scale_lr", "false", "--max_steps", "5") == 0
    assert "changed model.scale_lr: True -> False" in (out := capsys.readouterr().out)
    assert "learning rate 4.00e-03 -> 1.00e-03, from step 4 on" in out
    assert train("-r", str(run), "--max_steps", "6") == 0
    assert "learning rate 1.00e-03 = 1.00e-03 (model.base_learning_rate)" in capsys.readouterr().out
    assert last(run)["lr_schedulers"][0]["base_lrs"] == [1e-3]


REFUSED = {
    "architecture": ("model.params.width=16", "cannot change model.params.width (8 -> 16). Leave"),
    "seed": ("seed=7", "cannot change seed (23 -> 7). Leave it as it is, or start a new run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_resume_cannot_change_is_refused(case, run, capsys):
    option, told = REFUSED[case]
    before = sorted(run.rglob("*"))
    assert train("-r", str(run), option) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.rstrip().endswith(f"{option} model.params.ckpt_path={run}/checkpoints/last.ckpt")
    assert sorted(run.rglob("*")) == before


def test_a_run_that_is_at_its_end_says_so(run, capsys):
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert train("-r", str(run)) == 0
    told = f"the run is at step 4 already, and max_steps is 4; go on with: python main.py -t --resume {run} --max_steps"
    assert told in capsys.readouterr().out
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_broken_checkpoints_are_not_resumed_and_good_ones_named(run, capsys):
    good = run / "checkpoints" / "best-epoch=000000-step=000000003.ckpt"
    content = last(run)
    content["state_dict"]["average"][0] = NAN
    torch.save(content, run / "checkpoints" / "last.ckpt")
    assert train("-r", str(run), "--max_steps", "5") == 2
    assert f"average are NaN or infinite; resume {good}" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["file", "legacy file", "run folder of others", "model folder"])
def test_weights_are_no_run(form, capsys):
    folder = Path("logs/theirs")
    path = folder / "checkpoints" / "model.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {"a": torch.ones(1)}}, path, _use_new_zipfile_serialization=form != "legacy file")
    if form == "run folder of others":
        (folder / "configs").mkdir()
        for part in ("project", "lightning"):
            shutil.copy(TINY, folder / "configs" / f"2022-{part}.yaml")
    path = MODEL if form == "model folder" else path
    assert train("-r", str(path)) == 2
    told = f"; a new run starts from its weights: --base CONFIG model.params.ckpt_path={path}"
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_0_1_0_keeps_its_rate(capsys):
    run = Path(shutil.copytree(FROZEN / "run", "run"))
    stores = [f"data.params.{part}.params.stores={FROZEN / 'cohort'}" for part in ("train", "validation")]
    old = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]
    assert train("-r", str(run), "--max_steps", "3", *stores) == 0
    assert "learning rate 1.00e-04 -> " not in capsys.readouterr().out
    held = last(run)
    assert held["optimizer_states"][0]["param_groups"][0]["initial_lr"] == old["initial_lr"]
    assert held["histoldm_config"]["model"]["scale_lr"] == (old["initial_lr"] != 1e-4)


def test_a_run_goes_on_with_its_own_first_stage_only():
    model = ldm.load_model(MODEL)
    checkpoint = {"state_dict": {name: value.clone() for name, value in model.state_dict().items()}}
    model.on_load_checkpoint(checkpoint)
    checkpoint["state_dict"]["first_stage_model.decoder.conv_in.weight"] += 1
    with pytest.raises(UserError, match=r"is not the one of the checkpoint \(decoder\.conv_in\.weight differs\)"):
        model.on_load_checkpoint(checkpoint)
