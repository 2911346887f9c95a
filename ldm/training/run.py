"""One training: merge and check its config, build the model, the data and the Trainer, fit and test."""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, suggest
from ldm.files import owned
from ldm.training.files import check_files

if TYPE_CHECKING:  # imported when training begins, so that --help does not wait for it
    from pytorch_lightning import LightningDataModule, LightningModule, Trainer

MAX_SEED = 2**32 - 1  # of NumPy's
SEED = 23
CALLBACKS = {
    "progress_bar": "ldm.callbacks.ProgressBar",
    "image_logger": "ldm.callbacks.ImageLogger",
    "loss_recorder": "ldm.callbacks.LossRecorder",
    "learning_rate_logger": "pytorch_lightning.callbacks.LearningRateMonitor",
    "last_checkpoint": "ldm.callbacks.LastCheckpoint",
}
NOT_IN_CONFIG = {"self", "callbacks", "logger", "default_root_dir", "use_distributed_sampler"}  # set here


def check_trainer_key(key: str, flags: Sequence[str] = (), option: str = "") -> None:
    """Raise UserError unless `key` is an argument of Lightning's Trainer that a config may set.

    Args:
        key: name of the argument.
        flags: options of the command line, which a misspelt option is compared with.
        option: the option that the user typed; "" where the key stands in a config.

    >>> check_trainer_key("max_steps")
    """
    from pytorch_lightning import Trainer

    known = set(inspect.signature(Trainer.__init__).parameters) - NOT_IN_CONFIG
    if option and (not option.startswith("--") or key not in known):
        raise UserError(f"unknown option '{option}'{suggest(option, [*flags, *(f'--{name}' for name in known)])}")
    if key not in known:
        raise UserError(f"unknown key 'lightning.trainer.{key}'{suggest(key, known)}")


def merge_config(options: argparse.Namespace, overrides: Sequence[str], run: Path | None) -> dict[str, Any]:
    """Merge the latest config of a run that is resumed, the --base files and the overrides, and check the result.

    Args:
        options: from `command.parse`.
        overrides: from `command.parse`.
        run: the run folder to resume, or None.
    Returns:
        The config, with `name` and `seed` filled in.
    Raises:
        UserError: there is no config, or it is wrong.

    >>> from ldm.training.command import parse
    >>> merge_config(*parse(["--base", "demo/ssl", "--max_steps", "2"]), None)["lightning"]["trainer"]["max_steps"]
    2
    """
    from ldm.config import load_config, validate

    gpus = _gpus(options.gpus)  # first: building what the config names takes longer
    own = [sorted((run / "configs").glob(f"*-{part}.yaml"))[-1] for part in ("project", "lightning")] if run else []
    if not own and not options.base:
        raise UserError("there is no config; give one with --base configs/<name>.yaml, or a run to --resume.")
    defaults = {} if own else {"lightning": {"callbacks": {name: {"target": cls} for name, cls in CALLBACKS.items()}}}
    cfg = load_config([*own, *options.base], overrides, defaults)
    validate(cfg)
    lightning = cfg["lightning"] = cfg.get("lightning") or {}
    if run and not lightning.get("callbacks"):
        raise UserError(f"{own[-1]} has no `lightning: {{callbacks: ...}}`; copy the run's configs again.")
    trainer = lightning["trainer"] = {**(lightning.get("trainer") or {}), **gpus}
    for key in trainer:
        check_trainer_key(key)
    if isinstance(trainer.get("val_check_interval"), int):  # batches, counted over all epochs
        trainer.setdefault("check_val_every_n_epoch", None)
    if options.scale_lr is not None:
        cfg["model"]["scale_lr"] = options.scale_lr
    elif not run:
        cfg["model"].setdefault("scale_lr", True)
    cfg["seed"] = next(s for s in (options.seed, cfg.get("seed"), SEED) if s is not None)
    if type(cfg["seed"]) is not int or not 0 <= cfg["seed"] <= MAX_SEED:
        raise UserError(f"seed is {cfg['seed']!r}; it is a whole number from 0 to {MAX_SEED}.")
    cfg["name"] = options.name or cfg.get("name") or Path((options.base or [run])[0]).stem
    return cfg


def _gpus(gpus: str | None) -> dict[str, Any]:
    """The Trainer's arguments for `--gpus 0,1`."""
    if gpus is None:
        return {}
    import torch

    if not re.fullmatch(r"\d+(,\d+)*,?", gpus):
        raise UserError(f"--gpus takes numbers of GPUs, such as 0,1 or 0; got '{gpus}'.")
    indices = [int(part) for part in gpus.split(",") if part]
    count = torch.cuda.device_count()
    if not count:
        raise UserError(
            f"--gpus '{gpus}': this machine has no CUDA GPU that PyTorch can use; leave --gpus out to train on the CPU."
        )
    if max(indices) >= count:
        raise UserError(f"--gpus '{gpus}': choose from this machine's GPUs, 0 to {count - 1}.")
    return {"accelerator": "gpu", "devices": indices}


def _settle_precision(trainer: dict[str, Any]) -> str:
    """Replace the precision `auto` in the config by the one that is faster on the device; the message that says why."""
    from ldm.devices import TRAINER, faster_precision

    if trainer.get("precision") != "auto":
        return ""
    precision, why = faster_precision("cpu" if trainer.get("accelerator") == "cpu" else "auto")
    trainer["precision"] = TRAINER[precision]
    return f"precision {TRAINER[precision]}: {why}"


class Training:
    """A training that is ready to begin: model, data and Trainer are built, and nothing is written yet.

    Args:
        cfg: complete config, see `merge_config`.
        folder: run folder, which `fit` creates.
        checkpoint: checkpoint to continue from, or None for a new run.
    Raises:
        UserError: something is wrong with the config, the data or the weights.
    """

    def __init__(self, cfg: dict[str, Any], folder: Path, checkpoint: Path | None) -> None:
        from pytorch_lightning import seed_everything

        self.cfg, self.folder, self.checkpoint = cfg, folder, checkpoint
        model = cfg["model"]
        params = model.get("params") or {}
        if checkpoint is not None and "ckpt_path" in params and not params.get("lora"):  # weights are the checkpoint's
            model = {**model, "params": {**model["params"], "ckpt_path": None}}
        check_files({**cfg, "model": model})
        precision = _settle_precision(cfg["lightning"]["trainer"])
        seed_everything(cfg["seed"], workers=True, verbose=False)
        self.model: LightningModule = self._build(model)
        self.data: LightningDataModule = self._build(cfg["data"], targets=getattr(self.model, "targets", {}))
        self.trainer = self._trainer()
        size, device = sum(p.numel() for p in self.model.parameters()) / 1e6, self.trainer.strategy.root_device
        kind = type(self.model).__name__
        self.trainer.print(f"{cfg['name']}: {kind}, {size:.1f} M parameters on {device}; seed {cfg['seed']}")
        if precision:
            self.trainer.print(precision)

    def _build(self, node: Mapping[str, Any], **more: Any) -> LightningModule | LightningDataModule:
        """Build the model or the data, with the run's seed if it takes a `seed` that the config does not give, and with
        what of `more` says anything."""
        from ldm.config import get_obj_from_str, instantiate_from_config

        params = node.get("params") or {}
        takes = "seed" in inspect.signature(get_obj_from_str(node["target"])).parameters and "seed" not in params
        seed = {"seed": self.cfg["seed"]} if takes else {}
        more = {name: value for name, value in more.items() if value}
        return instantiate_from_config({"target": node["target"], "params": params}, **seed, **more)

    def _trainer(self) -> Trainer:
        """Build the Trainer with its logger and callbacks; what it rejects in `lightning.trainer` is a UserError."""
        from pytorch_lightning.callbacks import ModelCheckpoint
        from pytorch_lightning.loggers import TensorBoardLogger
        from pytorch_lightning.utilities.exceptions import MisconfigurationException

        from ldm.callbacks import SetupRun, StepSeed, WholeCheckpoints
        from ldm.config import check_params, instantiate_from_config
        from ldm.training.health import FiniteTrainer, FiniteTraining
        from ldm.training.resume import ResumedRate

        lightning = self.cfg["lightning"]
        arguments = {"devices": 1, **lightning["trainer"]}
        nodes = {name: node for name, node in (lightning.get("callbacks") or {}).items() if node is not None}
        if arguments.get("enable_progress_bar") is False:
            nodes.pop("progress_bar", None)
        callbacks = [SetupRun(self.cfg), StepSeed(self.cfg["seed"]), FiniteTraining(), ResumedRate()]
        callbacks += map(instantiate_from_config, nodes.values())
        asked = (lightning.get("modelcheckpoint") or {}).get("params") or {}
        best = {"monitor": getattr(self.model, "monitor", None), "filename": "best-{epoch:06}-{step:09}"}
        best |= {"dirpath": str(self.folder / "checkpoints"), "save_on_train_epoch_end": False, **asked}
        check_params(ModelCheckpoint, best, "lightning.modelcheckpoint.params")
        logger = lightning.get("logger")
        logger = instantiate_from_config(logger) if logger else TensorBoardLogger(self.folder, "tensorboard", "")
        plugins = arguments.pop("plugins", None) or []
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), WholeCheckpoints()]
        own = {"logger": logger, "default_root_dir": self.folder, "use_distributed_sampler": False, "plugins": plugins}
        try:
            best_checkpoint = [ModelCheckpoint(**best)] if best["monitor"] or asked else []
            return FiniteTrainer(**arguments, **own, callbacks=[*callbacks, *best_checkpoint])
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"Lightning does not accept lightning.trainer: {error}") from error

    def _set_learning_rate(self) -> None:
        base, trainer = self.cfg["model"].get("base_learning_rate"), self.trainer
        scale = self.cfg["model"].get("scale_lr", True)
        devices, size = trainer.world_size, self.data.batch_size
        if not isinstance(base, (int, float)):
            raise UserError(f"model.base_learning_rate must be a number such as 1.0e-06, got {base!r}.")
        if not isinstance(scale, bool):
            raise UserError(f"model.scale_lr must be true or false, got {scale!r}.")
        accumulate = trainer.accumulate_grad_batches * getattr(self.model, "accumulate", 1)  # and the model's own
        rate = self.model.learning_rate = accumulate * devices * size * base if scale else base
        factors = f"{accumulate} (accumulate_grad_batches) * {devices} (devices) * {size} (batch size) * "
        trainer.print(f"learning rate {rate:.2e} = {factors if scale else ''}{base:.2e} (model.base_learning_rate)")

    def fit(self, again: str, debug: bool = False) -> int:
        """Train, and return the exit code: 0, or 130 if a signal stopped it.

        A new run that ends before its first step leaves no folder.

        Args:
            again: command that continues a stopped run.
            debug: open the debugger if training fails.
        """
        from pytorch_lightning.callbacks import Timer
        from pytorch_lightning.utilities.exceptions import MisconfigurationException

        from ldm.callbacks import Stopped
        from ldm.interop.checkpoint import read_checkpoint
        from ldm.training.health import Diverged, advice

        self._set_learning_rate()
        trainer, run, last = self.trainer, self.folder, self.folder / "checkpoints" / "last.ckpt"
        begun = -1 if self.checkpoint is None else read_checkpoint(self.checkpoint)["global_step"]
        try:
            for name in ("checkpoints", "configs", "images") if trainer.is_global_zero else ():
                (run / name).mkdir(parents=True, exist_ok=self.checkpoint is not None)
        except OSError as error:
            reason = error.strerror
            raise UserError(f"cannot make the run folder '{run}': {reason}; choose another --logdir.") from error
        trainer.print(f"run folder {run}")
        owner = owned(run, otherwise="stop it") if trainer.is_global_zero else nullcontext()
        try:
            with owner:
                trainer.fit(self.model, self.data, ckpt_path=self.checkpoint, weights_only=True)
        except (Stopped, SystemExit):  # Lightning raises SystemExit after a second Ctrl-C
            where = f"continue with: {again}" if last.exists() else "nothing was saved yet"
            trainer.print(f"stopped at step {trainer.global_step}; {where}")
            return 130
        except Diverged as stop:
            clips = "lightning.trainer" if self.model.automatic_optimization else "model.params"
            raise UserError(advice(str(stop), run, again, self.cfg, f"{clips}.gradient_clip_val")) from stop
        except (UserError, MisconfigurationException) as error:  # a loader's worker adds its traceback
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
        except Exception:
            if debug:
                import pdb

                pdb.post_mortem(sys.exc_info()[2])
            raise
        finally:
            if trainer.is_global_zero and self.checkpoint is None and trainer.global_step == 0:
                shutil.rmtree(run)
        timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)
        late = timer is not None and trainer.global_step < trainer.max_steps and (timer.time_remaining() or 0) <= 0
        if late:
            told = f"at step {trainer.global_step} of {trainer.max_steps}; a faster machine gets further in that time"
            trainer.print(f"the time limit (max_time) ended the training {told}")
        if trainer.global_step == begun and not late:
            limit = "max_steps" if 0 < trainer.max_steps <= begun else "max_epochs"
            reached = f"the run is at step {begun} already, and {limit} is {getattr(trainer, limit)}"
            trainer.print(f"nothing was trained: {reached}; go on with: {again} --{limit} MORE")
        else:
            trainer.print(f"trained to step {trainer.global_step}: {last if last.exists() else run}")
        return 0

    def test(self, checkpoint: Path | None) -> None:
        """Evaluate on the data's test set, if it has one: a checkpoint, or None for what `fit` has just trained."""
        from pytorch_lightning.utilities.model_helpers import is_overridden

        if is_overridden("test_step", self.model) and is_overridden("test_dataloader", self.data):
            self.trainer.test(self.model, self.data, ckpt_path=checkpoint, weights_only=True)
