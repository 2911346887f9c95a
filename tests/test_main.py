"""Training: runs, resumes and refusals. Everything in one process; `tiny_training` is the model and the data."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.main import get_command

from ldm import cli, config
from ldm.callbacks import LastCheckpoint
from ldm.cli.script import call
from ldm.devices import TRAINER, faster_precision
from ldm.errors import UserError
from ldm.files import owned
from ldm.training import command
from ldm.training.files import SOURCES, check_files
from ldm.training.run import merge_config

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "tests" / "configs"
TINY = str(CONFIGS / "tiny.yaml")


@pytest.fixture(autouse=True)
def _tiny_is_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "ALLOWED", (*config.ALLOWED, "tiny_training."))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def train(*argv: str) -> int:
    return command.main(["-t", "--enable_progress_bar", "false", *argv])


def only_run(logdir: str) -> Path:
    (run,) = Path(logdir).iterdir()
    return run


def checkpoint(run: Path, name: str = "last.ckpt") -> dict:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def assert_same_training(a: dict, b: dict) -> None:
    """Bitwise equal weights, buffers, optimiser, schedule and position in the data."""
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for first, second in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        assert first["param_groups"] == second["param_groups"]
        for index, state in first["state"].items():
            for name, value in state.items():
                assert torch.equal(value, second["state"][index][name]), (index, name)
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert a["TinyData"] == b["TinyData"]
    batches = [c["loops"]["fit_loop"]["epoch_loop.batch_progress"] for c in (a, b)]
    assert batches[0] == batches[1]
    assert a["epoch"] == b["epoch"]


# 22 items in batches of 4 are 5 batches an epoch; validation every 3 batches, wherever in the epoch that is
RESUMES = {
    "mid-epoch": ([], 7),
    "epoch end": ([], 5),
    "validation": ([], 6),
    "workers": (["data.params.num_workers=2"], 7),
    "persistent workers": (["data.params.num_workers=2", "data.params.persistent=true"], 5),
    "accumulation": (["--accumulate_grad_batches", "2"], 4),
    "accumulation, workers": (["--accumulate_grad_batches", "2", "data.params.num_workers=2"], 6),
    "validation every epoch": (["--val_check_interval", "1.0", "--check_val_every_n_epoch", "1"], 8),
}


@pytest.mark.parametrize("case", RESUMES)
@pytest.mark.slow
def test_a_resumed_run_is_the_straight_run(case):
    options, half = RESUMES[case]
    assert train("-b", TINY, "-l", "straight", *options) == 0
    assert train("-b", TINY, "-l", "halves", *options, "--max_steps", str(half)) == 0
    run = only_run("halves")
    assert checkpoint(run)["global_step"] == half
    assert train("-r", str(run), "lightning.trainer.max_steps=12") == 0
    straight = checkpoint(only_run("straight"))
    assert straight["global_step"] == 12
    assert_same_training(straight, checkpoint(run))
    rows = [(only_run(logs) / "losses.csv").read_text() for logs in ("straight", "halves")]
    assert rows[0] == rows[1]
    assert len(rows[0].splitlines()) > 12


@pytest.mark.parametrize("model", ["tiny_diffusion", "tiny_autoencoder"])
@pytest.mark.slow
def test_the_real_models_resume_exactly(model):
    configs = ["-b", str(CONFIGS / f"{model}.yaml")]
    assert train(*configs, "-l", "straight", "--max_steps", "6") == 0
    assert train(*configs, "-l", "halves", "--max_steps", "3") == 0
    run = only_run("halves")
    assert train("-r", str(run), "--max_steps", "6") == 0
    assert_same_training(checkpoint(only_run("straight")), checkpoint(run))


@pytest.mark.parametrize(
    ("where", "stop_at", "options"),
    [("train", 4, []), ("train", 5, ["--accumulate_grad_batches", "2"]), ("val", 6, [])],
    ids=["after a step", "inside an accumulation window", "in validation"],
)
@pytest.mark.slow
def test_ctrl_c_saves_and_the_resumed_run_is_the_straight_run(where, stop_at, options, capsys):
    assert train("-b", TINY, "-l", "straight", *options) == 0
    stop = [f"data.params.stop_at={stop_at}", f"data.params.where={where}"]
    assert train("-b", TINY, "-l", "stopped", *options, *stop) == 130
    run = only_run("stopped")
    assert f"python main.py -t --resume {run}" in capsys.readouterr().out
    assert checkpoint(run)["global_step"] < 12
    assert train("-r", str(run), "data.params.stop_at=-1") == 0
    assert_same_training(checkpoint(only_run("straight")), checkpoint(run))


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_the_workers_too():
    options = ["data.params.num_workers=1", "data.params.delay=0.1"]
    options += ["data.params.stop_at=2", "data.params.where=group"]
    code = "import sys, main; from ldm import config; config.ALLOWED += ('tiny_training.',); sys.exit(main.main())"
    path = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, "-t", "-b", TINY, *options]
    done = subprocess.run(command, env=path, start_new_session=True, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint(only_run("logs"))["global_step"] == 2


@pytest.mark.slow
def test_any_checkpoint_of_a_run_resumes_exactly_and_repeatedly():
    assert train("-b", TINY, "-l", "straight", "lightning.modelcheckpoint.params.save_top_k=-1") == 0
    run = only_run("straight")
    straight = checkpoint(run)
    best = sorted((run / "checkpoints").glob("best-*.ckpt"))
    assert [torch.load(path, weights_only=True)["global_step"] for path in best] == [3, 6, 9, 12]
    for steps, start in ((5, best[0]), (11, run), (12, run)):
        assert train("-r", str(start), "--max_steps", str(steps)) == 0
        assert checkpoint(run)["global_step"] == steps
    assert_same_training(straight, checkpoint(run))


def test_a_run_folder_holds_what_users_of_latent_diffusion_know():
    name = ["-n", "mine", "-f", "_v2", "-s", "7", "data.params.length=30"]
    assert command.main(["-t", "-b", TINY, *name, "--limit_val_batches=1", "lightning.trainer.max_steps=4"]) == 0
    run = only_run("logs")
    assert run.name.endswith("_mine_v2")
    assert {path.name for path in run.iterdir()} == {"checkpoints", "configs", "images", "losses.csv", "tensorboard"}
    (project,) = (run / "configs").glob("*-project.yaml")
    (lightning,) = (run / "configs").glob("*-lightning.yaml")
    merged = config.load_config([project, lightning])
    assert merged["data"]["params"] == {"batch_size": 4, "length": 30}
    assert (merged["seed"], merged["lightning"]["trainer"]["limit_val_batches"]) == (7, 1)
    assert checkpoint(run)["histoldm_config"] == merged
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best-epoch=000000-step=000000003.ckpt",
        "last.ckpt",
    ]
    grid = Image.open(run / "images" / "val" / "inputs_gs-000003_e-000000_b-000000.png")
    assert (grid.mode, grid.size) == ("RGB", (2 * 4 + 3 * 6, 4 + 2 * 6))  # a validation batch has 2
    assert "SYNTHETIC" not in grid.text
    samples = Image.open(run / "images" / "train" / "samples_gs-000004_e-000000_b-000003.png")
    assert json.loads(samples.text["SYNTHETIC"])["step"] == 4
    rows = list(csv.DictReader((run / "losses.csv").open()))
    assert [int(row["batch"]) for row in rows if row["name"] == "val/loss"] == [3]


@pytest.mark.slow
def test_a_training_that_its_time_limit_ends_says_so(capsys):
    assert train("-b", TINY, "--max_steps", "100000", "--max_time", "00:00:00:01", "--limit_val_batches", "0") == 0
    assert re.search(r"the time limit \(max_time\) ended the training at step \d+ of 100000", capsys.readouterr().out)


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(capsys):
    assert train("-b", TINY, "-l", "full", "--max_steps", "1", "--limit_val_batches", "0") == 0
    run = only_run("full")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # no file can become whole
    try:
        assert train("-r", str(run), "--max_steps", "2") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the disk is full" in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert hidden_in(run) == []
    assert train("-r", str(run), "--max_steps", "2") == 0


def hidden_in(run: Path) -> list[Path]:
    return [path for path in run.rglob("*") if path.name.startswith(".")]


def test_a_run_has_one_training_at_a_time_and_is_cleared_of_what_a_killed_one_left(capsys):
    assert train("-b", TINY, "-l", "one", "--max_steps", "1", "--limit_val_batches", "0") == 0
    run = only_run("one")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    with owned(run):
        assert train("-r", str(run), "--max_steps", "2") == 2
    assert re.search(r"is being written by process \d+ on .*; wait for it or stop it", capsys.readouterr().err)
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    for name in (".lock", "checkpoints/.part-0123abcd-0/best.ckpt"):  # as a kill leaves them
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    assert train("-r", str(run), "--max_steps", "2") == 0
    assert hidden_in(run) == []


def test_precision_auto_is_settled_told_and_kept(capsys):
    assert train("-b", TINY, "--precision", "auto", "--max_steps", "1", "--limit_val_batches", "0") == 0
    taken, why = faster_precision("cpu")
    assert f"precision {TRAINER[taken]}: {why}" in capsys.readouterr().out
    run = only_run("logs")
    assert train("-r", str(run), "--max_steps", "2") == 0
    assert "precision" not in capsys.readouterr().out
    recorded = [config.load_config([path]) for path in (run / "configs").glob("*-lightning.yaml")]
    assert {cfg["lightning"]["trainer"]["precision"] for cfg in recorded} == {TRAINER[taken]}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86")
@pytest.mark.parametrize("instructions", ["AVX512_CORE", "AVX2"])
def test_a_cpu_without_instructions_for_bf16_trains_in_fp32(instructions):
    code = "from ldm.devices import faster_precision; print(faster_precision('cpu')[0])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ONEDNN_MAX_CPU_ISA": instructions}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "fp32\n"


def test_learning_rate_is_scaled_as_in_latent_diffusion(capsys):
    accumulate = ["--accumulate_grad_batches", "2", "--max_steps", "1", "--limit_val_batches", "0"]
    assert train("-b", TINY, *accumulate) == 0
    assert "8.00e-03 = 2 (accumulate_grad_batches) * 1 (devices) * 4 (batch size) * 1.00e-03" in capsys.readouterr().out
    assert train("-b", TINY, "-l", "plain", "--scale_lr", "false", *accumulate) == 0
    schedule = checkpoint(only_run("plain"))["lr_schedulers"][0]
    assert schedule["base_lrs"] == [1e-3]


REFUSALS = {
    "no config": ([], "--base"),
    "absent config": (["-b", "tiny.yml"], "config 'tiny.yml' does not exist"),
    "key of the model": (["-b", TINY, "model.params.widht=3"], "'model.params.widht' of TinyModel; did you mean"),
    "key of the trainer": (["-b", TINY, "lightning.trainer.max_step=3"], "'lightning.trainer.max_step'; did you mean"),
    "option": (["-b", TINY, "--max_stpes", "3"], "unknown option '--max_stpes'; did you mean '--max_steps'"),
    "own option": (["-b", TINY, "--logdri", "x"], "unknown option '--logdri'; did you mean '--logdir'"),
    "value of the trainer": (["-b", TINY, "--precision", "17"], "Lightning does not accept lightning.trainer"),
    "callback": (["-b", TINY, "lightning.callbacks.image_logger.params.frequency=3"], "'batch_frequency'"),
    "target": (["-b", TINY, "model.target=tiny_training.TinyModle"], "'tiny_training' has no 'TinyModle'; did"),
    "module": (["-b", TINY, "data.target=ldm.data.modul.Tiles"], "package 'ldm.data' has no 'modul'"),
    "foreign target": (["-b", TINY, "model.target=os.system"], "'os.system' is not allowed"),
    "GPU": (["-b", TINY, "--gpus", "99,"], "--gpus '99,': this machine has"),
    "GPU list": (["-b", TINY, "--gpus", "all"], "--gpus takes numbers of GPUs"),
    "monitor": (["-b", TINY, "model.params.monitor=val/los"], "'val/los'; did you mean 'val/loss'"),
    "data": (["-b", TINY, "data.params.length=0"], "there are no tiles"),
    "item": (["-b", TINY, *(f"data.params.{p}" for p in ("damaged=3", "length=4", "num_workers=1"))], "error: tile 3"),
    "run to resume": (["-r", "logs/none"], "cannot resume 'logs/none': it does not exist"),
    "name and resume": (["-r", "logs/none", "-n", "x"], "--name is for a new run"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_mistake_costs_one_line_and_leaves_nothing(case, capsys):
    argv, message = REFUSALS[case]
    assert train(*argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not any(path.is_dir() for path in Path("logs").glob("*"))


def test_unwritable_logdir(capsys):
    Path("file").write_text("")
    assert train("-b", TINY, "-l", "file/logs") == 2
    assert "cannot make the run folder 'file/logs/" in capsys.readouterr().err


def test_damaged_runs_are_not_resumed(capsys):
    for folder in ("run/checkpoints", "run/configs"):
        os.makedirs(folder)
    assert train("-r", "run") == 2
    Path("run/checkpoints/last.ckpt").write_bytes(b"PK\x03\x04 half")
    assert train("-r", "run") == 2
    torch.save({}, "run/checkpoints/last.ckpt")
    Path("run/configs/2026-project.yaml").write_text("model: {}")
    assert train("-r", "run") == 2
    errors = capsys.readouterr().err.splitlines()
    assert "it has no checkpoints/last.ckpt" in errors[0]
    assert "is not a complete checkpoint" in errors[1]
    assert "has no configs/*-lightning.yaml" in errors[2]


@pytest.mark.parametrize(
    ("options", "measured"), [(["data.params.test=3"], True), ([], False), (["data.params.test=3", "--no-test"], False)]
)
@pytest.mark.slow
def test_a_test_set_is_measured_after_training(options, measured, capsys):
    assert train("-b", TINY, "--max_steps", "1", *options) == 0
    assert ("test/loss" in capsys.readouterr().out) == measured
    if measured:
        run = only_run("logs")
        assert command.main(["-r", str(run), "--enable_progress_bar", "false"]) == 0  # without -t: of a finished run
        assert "test/loss" in capsys.readouterr().out


def test_ranks_that_differ_in_validation_batches_do_not_wait_for_each_other():
    last = LastCheckpoint()
    last._stop = True
    strategy = SimpleNamespace(reduce_boolean_decision=lambda *_, **__: pytest.fail("a collective in validation"))
    trainer = SimpleNamespace(world_size=2, sanity_checking=False, strategy=strategy)
    last.on_validation_batch_start(trainer, None)


SHIPPED = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "demo")


def bases_of(path: Path) -> list[str]:
    """The files that the command in a config's header names: a second file goes with its first."""
    said = re.search(r"--base ((?:\S+\.yaml ?)+)", path.read_text())
    return [str(ROOT / name) for name in said[1].split()]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_name_only_what_exists(path):
    assert str(path) in bases_of(path)
    cfg = merge_config(*command.parse(["-b", *bases_of(path)]), None)
    assert cfg["name"]


def named_weights(node: object) -> Iterator[str]:
    """The files under weights/ that a model starts from, and its first stage's folder."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key in ("ckpt_path", "folder") and value:
            yield value
        yield from named_weights(value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_all_that_a_shipped_config_lacks_is_one_message_with_the_way_on(path, monkeypatch):
    monkeypatch.setenv("HISTOLDM_WEIGHTS", "weights")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    cfg = merge_config(*command.parse(["-b", *bases_of(path)]), None)
    with pytest.raises(UserError) as error:
        check_files(cfg)
    said = str(error.value)
    for name in named_weights(cfg["model"]):
        assert f"{name} is missing" in said
        assert SOURCES[name] in said
    if stores := cfg["data"]["params"].get("stores"):  # else conditions are drawn
        assert f"{stores if isinstance(stores, str) else ', '.join(stores)} " in said
    if "autoencoder" in str(path):
        assert "hub/checkpoints/vgg16-397923af.pth. Get it from https://" in said
        assert "model.params.loss.params.perceptual_weight=0" in said
        assert "model.params.ckpt_path=null" in said


def test_files_that_no_dataset_reads_are_not_missed(tmp_path):
    (tmp_path / "mine").mkdir()
    words = ["-b", "demo/ssl", "model.params.first_stage_config.params.folder=mine"]
    words += [f"data.params.{split}.params.stores=mine" for split in ("train", "validation")]
    check_files(merge_config(*command.parse(words), None))  # data.params.stores itself is not there
    with pytest.raises(UserError, match=r"^demo_output/cohort is missing .* data\.params\.stores=FOLDER"):
        check_files(merge_config(*command.parse(words[:-1]), None))


def test_without_train_the_config_is_checked_and_nothing_is_written(capsys):
    assert command.main(["-b", TINY]) == 0
    assert "the config is valid" in capsys.readouterr().out
    assert not Path("logs").exists()


def at_histoldm(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        call(get_command(cli.app), "histoldm", ["train", *argv])
    return stop.value.code


def test_histoldm_train_is_another_door_to_the_same(capsys):
    assert at_histoldm("-b", TINY, "--enable_progress_bar", "false", "data.params.stop_at=2") == 130  # without -t
    assert f"continue with: histoldm train --resume {only_run('logs')}" in capsys.readouterr().out
    call(get_command(cli.app), "histoldm", ["train", "-t", "false", "-b", TINY])
    assert "train with: histoldm train\n" in capsys.readouterr().out
    assert at_histoldm("-b", TINY, "--max_stpes", "3") == 2
    assert "unknown option '--max_stpes'; did you mean '--max_steps'" in capsys.readouterr().err


def test_both_doors_show_the_same_help(capsys):
    assert command.main(["--help"]) == 0
    main = capsys.readouterr().out
    call(get_command(cli.app), "histoldm", ["train", "--help"])
    options = [
        text[text.index("options:") :].replace("(default: true)", "(default: false)")
        for text in (main, capsys.readouterr().out)
    ]
    assert options[0] == options[1]
    assert "python main.py -t --base" in main


def test_shipped_configs_are_found_by_name(capsys):
    found = [
        merge_config(*command.parse(["-b", name]), None)
        for name in ("demo/ssl", "demo/ssl.yaml", "configs/demo/ssl.yaml")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["name"] == "ssl"
    Path("demo").mkdir()
    Path("demo/ssl.yaml").write_text(Path(TINY).read_text())  # a file of the working folder comes first
    assert merge_config(*command.parse(["-b", "demo/ssl.yaml"]), None)["model"]["target"] == "tiny_training.TinyModel"
    assert train("-b", "demo/sll") == 2
    error = capsys.readouterr().err
    assert "config 'demo/sll' does not exist; did you mean 'demo/ssl'? Shipped configs: autoencoder/kl-f4," in error
    assert "own/transformer, own/transformer_cpu." in error
