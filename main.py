"""Train a model that a config describes.

    python main.py -t --base configs/a.yaml [b.yaml ...] [key.path=value ...]   # a new run
    python main.py -t --resume logs/<run>                                       # go on with it, exactly
    python main.py --base configs/a.yaml                                        # check and describe, train nothing

Later files and then key.path=value win. Every argument of Lightning's Trainer is a key under `lightning.trainer` and
an option here: `lightning.trainer.max_steps=1000` and `--max_steps 1000` are the same. Ctrl-C finishes the step, saves
`last.ckpt` and says how to go on.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import pdb
import re
import shutil
import sys
import warnings
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

from ldm.errors import UserError, run_command, suggest

SEED = 23
CALLBACKS = {
    "progress_bar": "ldm.callbacks.ProgressBar",
    "image_logger": "ldm.callbacks.ImageLogger",
    "loss_recorder": "ldm.callbacks.LossRecorder",
    "learning_rate_logger": "pytorch_lightning.callbacks.LearningRateMonitor",
    "last_checkpoint": "ldm.callbacks.LastCheckpoint",
}
NOT_IN_CONFIG = {"self", "callbacks", "logger", "default_root_dir", "use_distributed_sampler"}  # main.py's own


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and key.path=value overrides. Options that are not main.py's are taken for the Trainer's."""
    parser = argparse.ArgumentParser(
        prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    switch = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    rate_help = "rate = base rate * accumulated batches * devices * batch size (true)"
    parser.add_argument("-t", "--train", default=False, help="train", **switch)
    parser.add_argument("-b", "--base", nargs="*", default=[], metavar="YAML", help="configs, merged left to right")
    parser.add_argument("-r", "--resume", metavar="RUN", help="run folder or checkpoint in one, to go on with")
    parser.add_argument("-n", "--name", help="run folder is logs/<time>_<name>; default: the first config's name")
    parser.add_argument("-f", "--postfix", default="", help="added to the run folder's name")
    parser.add_argument("-l", "--logdir", default="logs", metavar="DIR", help="folder of run folders (logs)")
    parser.add_argument("-s", "--seed", type=int, help=f"of everything random ({SEED})")
    parser.add_argument("--gpus", help="GPUs to train on, such as 0,1 or 0, (default: one if there is one)")
    parser.add_argument("-d", "--debug", default=False, help="post-mortem debugger when training fails", **switch)
    parser.add_argument("--scale_lr", default=True, help=rate_help, **switch)
    parser.add_argument("--no-test", default=False, help="do not measure on the data's test set afterwards", **switch)
    overrides = [item for item in argv if re.match(r"[A-Za-z_][\w.]*=", item)]  # before -t or --base swallows them
    options, rest = parser.parse_known_args([item for item in argv if item not in overrides])
    flags = [flag for action in parser._actions for flag in action.option_strings]
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        check_trainer_key(flag.removeprefix("--"), flags, flag)
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        overrides.append(f"lightning.trainer.{flag.removeprefix('--')}={value}")
    return options, overrides


def boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "y", "1", "false", "no", "n", "0"):
        return text.lower() in ("true", "yes", "y", "1")
    raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")


def check_trainer_key(key: str, flags: list[str] = (), option: str = "") -> None:
    from pytorch_lightning import Trainer

    known = set(inspect.signature(Trainer.__init__).parameters) - NOT_IN_CONFIG
    if option and (not option.startswith("--") or key not in known):
        raise UserError(f"unknown option '{option}'{suggest(option, [*flags, *(f'--{name}' for name in known)])}")
    if key not in known:
        raise UserError(f"unknown key 'lightning.trainer.{key}'{suggest(key, known)}")


def find_run(resume: str) -> tuple[Path, Path]:
    """(run folder, checkpoint) of `--resume`."""
    path = Path(resume)
    run, checkpoint = (path, path / "checkpoints" / "last.ckpt") if path.is_dir() else (path.parent.parent, path)
    if not path.exists():
        raise UserError(f"cannot resume '{path}': it does not exist")
    if not checkpoint.is_file():
        raise UserError(f"cannot resume '{run}': it has no checkpoints/last.ckpt")
    if not zipfile.is_zipfile(checkpoint):
        raise UserError(f"cannot resume: '{checkpoint}' is not a whole checkpoint; try another of that folder")
    for part in ("project", "lightning"):
        if not list((run / "configs").glob(f"*-{part}.yaml")):
            raise UserError(f"cannot resume '{path}': '{run}' has no configs/*-{part}.yaml, so it is not a run folder")
    return run, checkpoint


def merge_config(options: argparse.Namespace, overrides: list[str], run: Path | None) -> dict[str, Any]:
    """The run's own latest config, the --base files, the overrides and options, checked in every key."""
    from ldm.config import load_config, validate

    own = [sorted((run / "configs").glob(f"*-{part}.yaml"))[-1] for part in ("project", "lightning")] if run else []
    if not own and not options.base:
        raise UserError("give a config: --base configs/<name>.yaml, or a run to --resume")
    defaults = {} if own else {"lightning": {"callbacks": {name: {"target": cls} for name, cls in CALLBACKS.items()}}}
    cfg = load_config([*own, *options.base], overrides, defaults)
    validate(cfg)
    lightning = cfg["lightning"] = cfg.get("lightning") or {}
    trainer = lightning["trainer"] = {**(lightning.get("trainer") or {}), **choose_gpus(options.gpus)}
    for key in trainer:
        check_trainer_key(key)
    if isinstance(trainer.get("val_check_interval"), int):  # batches, counted over all epochs
        trainer.setdefault("check_val_every_n_epoch", None)
    cfg["seed"] = next(s for s in (options.seed, cfg.get("seed"), SEED) if s is not None)
    cfg["name"] = options.name or cfg.get("name") or Path((options.base or [run])[0]).stem
    return cfg


def build(node: dict[str, Any], seed: int) -> Any:
    """The model or the data; its `seed`, where it takes one and the config does not state it, is the run's."""
    from ldm.config import get_obj_from_str, instantiate_from_config

    params = node.get("params") or {}
    takes = "seed" in inspect.signature(get_obj_from_str(node["target"])).parameters and "seed" not in params
    return instantiate_from_config({"target": node["target"], "params": params}, **({"seed": seed} if takes else {}))


def build_trainer(cfg: dict[str, Any], model: Any, run: Path) -> Any:
    """The Trainer with its logger and callbacks. Its errors about `lightning.trainer` are the user's."""
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import TensorBoardLogger
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ldm.callbacks import SetupRun, StepSeed, WholeCheckpoints
    from ldm.config import check_params, instantiate_from_config

    lightning = cfg["lightning"]
    arguments = {"devices": 1, **lightning["trainer"]}
    nodes = {name: node for name, node in lightning["callbacks"].items() if node is not None}
    if arguments.get("enable_progress_bar") is False:
        nodes.pop("progress_bar", None)
    callbacks = [SetupRun(cfg), StepSeed(cfg["seed"]), *map(instantiate_from_config, nodes.values())]
    asked = (lightning.get("modelcheckpoint") or {}).get("params") or {}
    best = {"monitor": getattr(model, "monitor", None), "filename": "best-{epoch:06}-{step:09}"}
    best |= {"dirpath": str(run / "checkpoints"), "save_on_train_epoch_end": False, **asked}
    check_params(ModelCheckpoint, best, "lightning.modelcheckpoint.params")
    logger = lightning.get("logger")
    logger = instantiate_from_config(logger) if logger else TensorBoardLogger(run, name="tensorboard", version="")
    plugins = arguments.pop("plugins", None) or []
    plugins = [*(plugins if isinstance(plugins, list) else [plugins]), WholeCheckpoints()]
    own = {"logger": logger, "default_root_dir": run, "use_distributed_sampler": False, "plugins": plugins}
    try:
        best_checkpoint = [ModelCheckpoint(**best)] if best["monitor"] or asked else []
        return Trainer(**arguments, **own, callbacks=[*callbacks, *best_checkpoint])
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"Lightning does not accept lightning.trainer: {error}") from error


def choose_gpus(gpus: str | None) -> dict[str, Any]:
    """Trainer arguments of `--gpus 0,1`."""
    if gpus is None:
        return {}
    import torch

    if not re.fullmatch(r"\d+(,\d+)*,?", gpus):
        raise UserError(f"--gpus takes numbers such as 0,1 or 0, and got '{gpus}'")
    indices = [int(part) for part in gpus.split(",") if part]
    count = torch.cuda.device_count()
    if max(indices) >= count:
        has = f"GPUs 0 to {count - 1}" if count else "no CUDA GPU that PyTorch can use"
        raise UserError(f"--gpus {gpus}: this machine has {has}")
    return {"accelerator": "gpu", "devices": indices}


def set_learning_rate(cfg: dict[str, Any], model: Any, data: Any, trainer: Any, scale: bool) -> None:
    base, devices, size = cfg["model"].get("base_learning_rate"), trainer.world_size, data.batch_size
    if not isinstance(base, (int, float)):
        raise UserError(f"model.base_learning_rate must be a number such as 1.0e-06, got {base!r}")
    accumulate = trainer.accumulate_grad_batches * getattr(model, "accumulate", 1)  # the latter by hand
    model.learning_rate = accumulate * devices * size * base if scale else base
    factors = f"{accumulate} (accumulate_grad_batches) * {devices} (devices) * {size} (batch size) * " if scale else ""
    trainer.print(f"learning rate {model.learning_rate:.2e} = {factors}{base:.2e} (model.base_learning_rate)")


def train(trainer: Any, model: Any, data: Any, run: Path, checkpoint: Path | None, debug: bool) -> int:
    """Fit; 0, or 130 where a signal stopped it. A new run that ends before its first step leaves no folder."""
    from pytorch_lightning.callbacks import Timer
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ldm.callbacks import Stopped

    last = run / "checkpoints" / "last.ckpt"
    try:
        for name in ("checkpoints", "configs", "images") if trainer.is_global_zero else ():
            (run / name).mkdir(parents=True, exist_ok=checkpoint is not None)
    except OSError as error:
        raise UserError(f"cannot make the run folder '{run}': {error.strerror}; choose another --logdir") from error
    trainer.print(f"run folder {run}")
    try:
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    except (Stopped, SystemExit):  # SystemExit is what Lightning makes of a second Ctrl-C
        where = f"go on with: python main.py -t --resume {run}" if last.exists() else "before the first saved step"
        trainer.print(f"stopped at step {trainer.global_step}; {where}")
        return 130
    except (UserError, MisconfigurationException) as error:  # a loader's worker adds its traceback to the message
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
    except Exception:
        if debug:
            pdb.post_mortem(sys.exc_info()[2])
        raise
    finally:
        if trainer.is_global_zero and checkpoint is None and trainer.global_step == 0:
            shutil.rmtree(run)
    timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)
    if timer is not None and trainer.global_step < trainer.max_steps and (timer.time_remaining() or 0) <= 0:
        told = f"at step {trainer.global_step} of {trainer.max_steps}"
        trainer.print(f"the time limit (max_time) ended the training {told}; an idle or faster machine gets further")
    trainer.print(f"trained to step {trainer.global_step}: {last if last.exists() else run}")
    return 0


def run_main(argv: list[str]) -> int:
    options, overrides = parse(argv)
    if options.resume and options.name:
        raise UserError("--name names a new run and --resume goes on with an old one: give one of them")
    run, checkpoint = find_run(options.resume) if options.resume else (None, None)
    cfg = merge_config(options, overrides, run)
    run = run or Path(options.logdir) / f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{cfg['name']}{options.postfix}"

    from pytorch_lightning import seed_everything
    from pytorch_lightning.utilities.model_helpers import is_overridden

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    harmless = (".*LeafSpec", "Checkpoint directory .* is not empty", r"Found \d+ module\(s\) in eval mode")
    for message in (*harmless, "Total length of `list`"):  # no test set
        warnings.filterwarnings("ignore", message=message)
    seed_everything(cfg["seed"], workers=True, verbose=False)
    model, data = build(cfg["model"], cfg["seed"]), build(cfg["data"], cfg["seed"])
    trainer = build_trainer(cfg, model, run)
    size, device = sum(p.numel() for p in model.parameters()) / 1e6, trainer.strategy.root_device
    trainer.print(f"{cfg['name']}: {type(model).__name__}, {size:.1f} M parameters on {device}; seed {cfg['seed']}")
    if options.train:
        set_learning_rate(cfg, model, data, trainer, options.scale_lr)
        if code := train(trainer, model, data, run, checkpoint, options.debug):
            return code
    elif not checkpoint:
        trainer.print("the config is sound; add -t to train")
    tested = is_overridden("test_step", model) and is_overridden("test_dataloader", data)
    if tested and not options.no_test and (options.train or checkpoint):
        trainer.test(model, data, ckpt_path=None if options.train else checkpoint, weights_only=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    codes: list[int] = []
    return run_command(lambda: codes.append(run_main(sys.argv[1:] if argv is None else argv))) or codes[0]


if __name__ == "__main__":
    sys.exit(main())
