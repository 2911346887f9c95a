"""Callbacks of training: the run folder, exact resuming, image grids, losses and the progress bar.

The run folder is `trainer.default_root_dir`; only global rank 0 writes into it.
"""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, TQDMProgressBar
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from ldm.config import save_config
from ldm.errors import UserError, suggest
from ldm.files import whole
from ldm.images.sheets import contact_sheet
from ldm.images.write import save_png, save_real_png, to_uint8
from ldm.rng import fold


class Stopped(Exception):
    """A signal stopped the training; `last.ckpt` holds everything up to step `args[0]`."""


def _batches_done(trainer: Trainer) -> int:
    """Number of training batches begun since the start of the run, over all epochs and resumes."""
    return trainer.fit_loop.total_batch_idx + 1


class SetupRun(Callback):
    """Writes the merged config into the run folder and, as `histoldm_config`, into every checkpoint.

    Args:
        config: the merged config, plain containers.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "configs"
            now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
            project = {key: value for key, value in self.config.items() if key != "lightning"}
            save_config(project, folder / f"{now}-project.yaml")
            save_config({"lightning": self.config.get("lightning") or {}}, folder / f"{now}-lightning.yaml")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitor, logged = getattr(pl_module, "monitor", None), trainer.callback_metrics
        if monitor and monitor not in logged:
            raise UserError(f"validation does not log the value to monitor, '{monitor}'{suggest(monitor, logged)}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["histoldm_config"] = self.config


class StepSeed(Callback):
    """Seeds torch before every training batch from (seed, rank, batch number).

    Whatever draws from torch's global generators, such as dropout, then repeats after a resume, and sampling in
    between (validation, image grids) does not change the training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        torch.manual_seed(fold(self.seed, trainer.global_rank, _batches_done(trainer)))


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints so that they are complete or not there: beside their place, then renamed.

    If the disk is full or the machine stops, the previous checkpoint stays as it is. Lightning's own implementation
    copies the file from the temporary folder, which may stop halfway.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            torch.save(checkpoint, part)


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt`, and makes every checkpoint resume exactly.

    Progress (Lightning's loop counters, the loader's position) is recorded at the end of each batch in which an
    optimizer stepped, which is where weights change, and goes into every checkpoint, whenever it is saved. A resume
    therefore always continues with the batch after an optimizer step: a partial accumulation window is done again, not
    lost, and a validation that was running is not repeated.

    `last.ckpt` is saved when training ends, and when SIGINT (Ctrl-C) or SIGTERM arrives: the current step is finished,
    then `Stopped` is raised. A second signal stops at once.

    Args:
        every_n_train_steps: `last.ckpt` is also saved after this many optimizer steps.
    """

    def __init__(self, every_n_train_steps: int = 500) -> None:
        if every_n_train_steps < 1:
            raise UserError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        self.every_n_train_steps = every_n_train_steps
        self._progress: dict[str, Any] = {}
        self._step = self._saved_step = 0
        self._at_step = True  # whether no batch was accumulated since the last step
        self._stop = False
        self._handlers: dict[int, Callable[..., object] | int | None] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = self._saved_step = trainer.global_step
        self._progress, self._at_step, self._stop = {}, True, False
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def _signal(self, number: int, frame: FrameType | None) -> None:
        self._restore_handlers()
        self._stop = True
        if rank_zero_only.rank == 0:  # not print(): a signal may interrupt a print
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._at_step = trainer.global_step != self._step
        if self._at_step:
            self._step = trainer.global_step
            self._progress = {"loops": {"fit_loop": trainer.fit_loop.state_dict()}}
            if trainer.datamodule is not None and (state := trainer.datamodule.state_dict()):
                self._progress[type(trainer.datamodule).__qualname__] = state

    # Saving waits for the next hook, so that the checkpoint holds what the model does in its own on_train_batch_end.
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if self._at_step and self._asked_to_stop(trainer):
            self._save(trainer)
            raise Stopped(trainer.global_step)
        if self._at_step and self._step - self._saved_step >= self.every_n_train_steps:
            self._save(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        # Ranks may have different numbers of validation batches, and a decision that all must take would wait forever:
        # with several ranks it is taken at the next training batch.
        alone = trainer.world_size == 1
        if alone and not trainer.sanity_checking and self._at_step and self._asked_to_stop(trainer):
            self._save(trainer)
            raise Stopped(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for key, value in self._progress.items():
            checkpoint[key] = {**checkpoint[key], **value}

    def _asked_to_stop(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self._stop
        return trainer.strategy.reduce_boolean_decision(self._stop, all=False)  # all ranks stop at the same batch

    def _save(self, trainer: Trainer) -> None:
        if self._step > self._saved_step and not trainer.fast_dev_run:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
            self._saved_step = self._step


class ImageLogger(Callback):
    """Writes grids of the images that `pl_module.log_images(batch, n)` returns: {name: (B,3,H,W) in [-1,1]}.

    They go to `images/{train,val}/<name>_gs-<step>_e-<epoch>_b-<batch>.png` and to TensorBoard, for the first batch of
    every validation too. Metadata marks all but `inputs` as SYNTHETIC. A model without `log_images` gets none.

    Args:
        batch_frequency: training batches from one grid to the next.
        max_images: images of a grid.
    """

    def __init__(self, batch_frequency: int = 500, max_images: int = 4) -> None:
        if batch_frequency < 1 or max_images < 1:
            raise UserError(f"batch_frequency and max_images must be at least 1, got {batch_frequency}, {max_images}")
        self.batch_frequency, self.max_images = batch_frequency, max_images

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        if _batches_done(trainer) % self.batch_frequency == 0:
            self._log(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0 and not trainer.sanity_checking:
            self._log(trainer, pl_module, batch, batch_idx, "val")

    def _log(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, split: str) -> None:
        if not trainer.is_global_zero or not hasattr(pl_module, "log_images"):
            return
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                images = pl_module.log_images(batch, self.max_images)
        finally:
            for module, training in modes.items():  # frozen parts stay in eval mode
                module.training = training
        step, epoch = trainer.global_step, trainer.current_epoch
        folder = Path(trainer.default_root_dir) / "images" / split
        for name, stack in images.items():
            grid = contact_sheet(to_uint8(stack[: self.max_images]), columns=4, least=0)
            path = folder / f"{name}_gs-{step:06}_e-{epoch:06}_b-{batch_idx:06}.png"
            if name == "inputs":
                save_real_png(path, grid)
            else:
                about = {"content": name, "model": type(pl_module).__name__, "run": Path(trainer.default_root_dir).name}
                save_png(path, grid, about | {"step": step, "split": split})
            add_image = getattr(getattr(trainer.logger, "experiment", None), "add_image", None)
            if add_image:
                add_image(f"{split}/{name}", grid, step, dataformats="HWC")


class LossRecorder(Callback):
    """Appends what the module logs to `losses.csv`: columns `batch` (number of training batches), `name`, `value`.

    Validation values are written after every validation. After a resume, rows later than the checkpoint are dropped,
    so that the file is that of an uninterrupted run.

    Args:
        every_n_batches: training batches from one row of a training value to the next.
    """

    HEADER = ("batch", "name", "value")

    def __init__(self, every_n_batches: int = 10) -> None:
        if every_n_batches < 1:
            raise UserError(f"every_n_batches must be at least 1, got {every_n_batches}")
        self.every_n_batches = every_n_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.path = Path(trainer.default_root_dir) / "losses.csv"
            rows = read_losses(self.path) if self.path.exists() else []
            with whole(self.path) as part, part.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(self.HEADER)
                writer.writerows(row for row in rows if row[0] <= _batches_done(trainer))

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if _batches_done(trainer) % self.every_n_batches == 0:
            self._append(trainer, {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("val")})

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._append(trainer, {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val")})

    def _append(self, trainer: Trainer, metrics: Mapping[str, Tensor]) -> None:
        # Lightning has `x`, `x_step` and `x_epoch` for one logged x: x alone is enough
        rows = [
            (_batches_done(trainer), name, f"{float(value):.7g}")
            for name, value in sorted(metrics.items())
            if name.removesuffix("_step").removesuffix("_epoch") == name or name.rsplit("_", 1)[0] not in metrics
        ]
        if rows and trainer.is_global_zero:
            with self.path.open("a", newline="") as file:
                csv.writer(file).writerows(rows)


def read_losses(path: str | Path) -> list[tuple[int, str, float]]:
    """Read the rows (batch, name, value) of a `losses.csv`. An incomplete last line is left out.

    >>> _ = Path("losses.csv").write_text("batch,name,value\\n10,train/loss,0.5\\n20,train/lo")
    >>> read_losses("losses.csv")
    [(10, 'train/loss', 0.5)]
    """
    with Path(path).open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(int(row[0]), row[1], float(row[2])) for row in rows if len(row) == 3 and row[2]]


class ProgressBar(TQDMProgressBar):
    """A single progress bar for the whole training: steps, time left, images per second, and the logged losses."""

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        super().on_train_start(trainer)
        bar = self.train_progress_bar
        self._by_step = trainer.max_steps > 0
        self._last_time = self._images_per_s = 0.0
        limit = trainer.max_steps if self._by_step else (trainer.max_epochs or -1) * trainer.num_training_batches
        bar.total = int(limit) if 0 < limit < float("inf") else None
        bar.unit = "step" if self._by_step else "batch"
        bar.initial = bar.n = trainer.global_step if self._by_step else _batches_done(trainer)
        bar.set_description("training")

    def on_train_epoch_start(self, *_: object) -> None:
        pass  # one bar for all epochs

    def on_train_epoch_end(self, *_: object) -> None:
        pass

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        self._last_time = self._last_time or time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        now = time.monotonic()
        sizes = [len(value) for value in batch.values() if isinstance(value, Tensor)] if isinstance(batch, dict) else []
        rate = trainer.world_size * (sizes[0] if sizes else 0) / max(now - self._last_time, 1e-9)
        self._images_per_s = 0.9 * self._images_per_s + 0.1 * rate if self._images_per_s else rate
        self._last_time = now
        bar = self.train_progress_bar
        if not bar.disable and _batches_done(trainer) % self.refresh_rate == 0:
            bar.n = trainer.global_step if self._by_step else _batches_done(trainer)
            metrics = {key: value for key, value in self.get_metrics(trainer, pl_module).items() if key != "v_num"}
            bar.set_postfix({"images/s": f"{self._images_per_s:.3g}", "epoch": trainer.current_epoch, **metrics})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._last_time = 0.0  # the time of a validation is not training time
