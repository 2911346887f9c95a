"""A training whose loss or weights are no longer finite ends with what to try, and spares the checkpoints before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ldm.interop.checkpoint import read_checkpoint
from ldm.interop.weights import in_words, not_finite


class Diverged(Exception):
    """The loss or the weights of a training are not finite; args[0] says which, and when."""


class FiniteTraining(Callback):
    """Raises `Diverged` when a loss is NaN or infinite.

    Losses are judged at every batch on a CPU; elsewhere they are counted where they are, and the device is waited for
    every `every` batches only. With 16-mixed a loss may overflow now and then, as gradient scaling skips such steps:
    there the weights decide, or a loss that stays so.

    Args:
        every: batches from one judgement to the next, on GPUs and among ranks.
    """

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self._seen, self._bad, self._first = 0, torch.tensor(0), torch.tensor(-1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen, self._bad = 0, torch.tensor(0, device=pl_module.device)
        self._first = torch.tensor(-1, device=pl_module.device)  # step of the first loss that is not finite

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        bad = ~loss.detach().isfinite().all()
        self._seen, self._bad = self._seen + 1, self._bad + bad
        self._first = torch.where(bad & (self._first < 0), trainer.global_step, self._first)
        if self._seen >= self.every or (pl_module.device.type == "cpu" and trainer.world_size == 1):
            self._judge(trainer, pl_module, batch)

    def _judge(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        seen, bad = self._seen, int(self._bad)
        self._seen, self._bad = 0, torch.zeros_like(self._bad)
        stop, what = bad > 0, "the loss"
        if bad and trainer.precision == "16-mixed":
            wrong = not_finite(pl_module.state_dict())
            stop = bad == seen or bool(wrong)
            what = "weights" if wrong else what
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)  # all ranks stop at the same batch
        if stop:
            first = int(self._first)
            raise Diverged(
                f"{what} became NaN or infinite at step {first if first >= 0 else trainer.global_step}{_told(batch)}"
            )
        self._first = torch.full_like(self._first, -1)


class FiniteTrainer(Trainer):
    """A Trainer that raises `Diverged` in place of saving what is NaN or infinite, whoever asks for the checkpoint.

    All ranks look at weights and at the state of optimizers, so that they stop together, and no good checkpoint is
    replaced. Callbacks could not do it: Lightning does not ask them about a checkpoint of weights alone.
    """

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        weights = self.strategy.lightning_module_state_dict()
        if wrong := not_finite(weights):
            raise Diverged(f"weights became NaN or infinite by step {self.global_step}: {in_words(wrong, weights)}")
        for optimizer in [] if weights_only else self.optimizers:
            held = [values for own in optimizer.state.values() if isinstance(own, dict) for values in own.values()]
            if not_finite(dict(enumerate(held))):
                raise Diverged(f"the optimizer's state became NaN or infinite by step {self.global_step}")
        super().save_checkpoint(filepath, weights_only, storage_options)


def _told(batch: Any) -> str:
    """What of a batch is not finite, where a loss was not."""
    given = {key: value for key, value in batch.items() if isinstance(value, Tensor)} if isinstance(batch, dict) else {}
    wrong = not_finite(given)
    return f" ({next(iter(wrong))} of its batch holds NaN or infinity)" if wrong else ""


def advice(told: str, run: Path, again: str, cfg: Mapping[str, Any], clips: str) -> str:
    """The message that ends a training: what was not finite, what to try, the last good checkpoint, how to go on.

    Args:
        told: what was not finite, and when.
        run: the run folder.
        again: command that resumes it.
        cfg: its config.
        clips: key that clips gradients.

    >>> advice("the loss became NaN at step 3", Path("run"), "train --resume run", {"model": {}, "lightning": {}}, "c")
    'the loss became NaN at step 3. Nothing was saved before it. Try a lower model.base_learning_rate, c=1.0, and ...'
    """
    rate = cfg["model"].get("base_learning_rate")
    precision = str((cfg["lightning"].get("trainer") or {}).get("precision", "32-true"))
    tries = [f"a lower model.base_learning_rate{f' (now {rate:g})' if isinstance(rate, float) else ''}", f"{clips}=1.0"]
    tries += ["lightning.trainer.precision=32-true"] if "16" in precision else []
    saved = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    content = read_checkpoint(saved[-1]) if saved else {}
    held = f"The last good weights are in {saved[-1]} (step {content.get('global_step', 'unknown')})." if saved else ""
    text = f"{told}. {held or 'Nothing was saved before it.'} Try {', '.join(tries)}, and look at the data. "
    if "optimizer_states" not in content:
        start = f" from model.params.ckpt_path={saved[-1]}, which holds weights alone" if saved else ""
        return f"{text}A new run starts with these{start}."
    changed = f" model.base_learning_rate={rate / 10:g}" if isinstance(rate, float) else ""
    return text + f"Go on from it with: {again.replace(str(run), str(saved[-1]))}{changed} {clips}=1.0"
