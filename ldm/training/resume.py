"""What resuming takes from a run, and what of its config may be changed by then."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.errors import UserError
from ldm.foreign.settings import check_settings
from ldm.foreign.shape import MAPPING, check_shape
from ldm.interop.checkpoint import read_checkpoint
from ldm.interop.forms import name_form
from ldm.interop.weights import in_words, not_finite

PARTS = ("project", "lightning")  # of a run's config, a file each
OWN, RATE = "histoldm_config", "histoldm_learning_rate"  # in checkpoints
# The keys of the model that take effect when a run goes on; all else about it stands in the checkpoint.
CHANGEABLE = (
    "base_learning_rate", "scale_lr", "use_checkpoint", "monitor", "gradient_clip_val", "accumulate_grad_batches",
    "folder",  # its weights are compared
)  # fmt: skip


def find_run(resume: str) -> tuple[Path, Path]:
    """The run folder and the checkpoint that `--resume` names, either of which it may give.

    Raises:
        UserError: there is nothing to resume.

    >>> find_run("logs/none")
    Traceback (most recent call last):
    ldm.errors.UserError: cannot resume 'logs/none': it does not exist
    """
    path = Path(resume)
    if not path.exists():
        raise UserError(f"cannot resume '{path}': it does not exist")
    if (path / "model.safetensors").is_file():
        raise UserError(f"cannot resume '{path}': it is a model folder, which has no state of a training{_anew(path)}")
    run, checkpoint = (path, path / "checkpoints" / "last.ckpt") if path.is_dir() else (path.parent.parent, path)
    if path.is_file():
        _check_configs(run, path)
    if not checkpoint.is_file():
        for place in (checkpoint, path):
            name_form(place)
        raise UserError(f"cannot resume '{run}': it has no checkpoints/last.ckpt")
    if not _is_whole(checkpoint):
        raise UserError(f"cannot resume: '{checkpoint}' is not a complete checkpoint; try another one of that folder")
    _check_configs(run, path)
    content = read_checkpoint(checkpoint)
    if not isinstance(content, Mapping) or OWN not in content:
        raise UserError(f"cannot resume '{checkpoint}': it is no training of this toolkit{_anew(checkpoint)}")
    return run, checkpoint


def _is_whole(checkpoint: Path) -> bool:
    try:
        return zipfile.is_zipfile(checkpoint)
    except zipfile.BadZipFile:  # the end of one, with other numbers in it
        return False


def _check_configs(run: Path, path: Path) -> None:
    for part in PARTS:
        if not list((run / "configs").glob(f"*-{part}.yaml")):
            way = _anew(path) if path.is_file() else ""
            raise UserError(f"cannot resume '{path}': '{run}' has no configs/*-{part}.yaml: it is no run folder{way}")


def _anew(path: Path) -> str:
    return f"; a new run starts from its weights: --base CONFIG model.params.ckpt_path={path}"


def check_resume(cfg: dict[str, Any], checkpoint: Path) -> list[str]:
    """Compare a config with that of the checkpoint which is to be resumed; a line for each change that takes effect.

    Whether the learning rate was scaled is filled in where a run did not record it.

    Raises:
        UserError: a key that a resume cannot change, weights that are not finite.

    >>> node = {"target": "torch.nn.Linear", "params": {"in_features": 2}}
    >>> torch.save({"histoldm_config": {"model": node, "seed": 1}, "state_dict": {}}, "last.ckpt")
    >>> check_resume({"model": {**node, "scale_lr": True}, "seed": 2}, Path("last.ckpt"))
    Traceback (most recent call last):
    ldm.errors.UserError: a resumed run cannot change seed (1 -> 2). ...
    """
    content = read_checkpoint(checkpoint)
    check_settings(content[OWN], checkpoint, OWN)
    check_shape(content, {"state_dict": MAPPING}, checkpoint)
    _check_weights(checkpoint, content["state_dict"])
    before = dict(_leaves(content[OWN]))
    if "scale_lr" not in cfg["model"]:  # of version 0.1.0
        cfg["model"]["scale_lr"] = rate_of(content) != before.get("model.base_learning_rate")
    before.setdefault("model.scale_lr", cfg["model"]["scale_lr"])
    now = dict(_leaves(cfg))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    refused = [key for key in keys if not _may_change(key, now.get(key))]
    if refused:
        configs = checkpoint.parent.parent / "configs"
        words = [str(path) for part in PARTS for path in sorted(configs.glob(f"*-{part}.yaml"))[-1:]]
        words += [f"{key}={now.get(key, 'null')}" for key in refused]
        words += [] if "model.params.ckpt_path" in refused else [f"model.params.ckpt_path={checkpoint}"]
        told = ", ".join(f"{key} ({_shown(before.get(key))} -> {_shown(now.get(key))})" for key in refused)
        raise UserError(
            f"a resumed run cannot change {told}. Leave it as it is, or start a new run from these weights: "
            f"--base {' '.join(words)}"
        )
    return [f"changed {key}: {_shown(before.get(key))} -> {_shown(now.get(key))}" for key in keys]


def _may_change(key: str, value: Any) -> bool:
    """Whether a changed key takes effect on a resumed run. Weights to start from may be left out, but not replaced."""
    if key == "seed" or key.startswith("model."):
        return key.rpartition(".")[2] in CHANGEABLE or (key == "model.params.ckpt_path" and value is None)
    return True


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a config."""
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _check_weights(checkpoint: Path, weights: Mapping[str, Any]) -> None:
    if wrong := not_finite(weights):
        others = [path for path in sorted(checkpoint.parent.glob("*.ckpt")) if path != checkpoint]
        good = [str(path) for path in others if not not_finite(read_checkpoint(path).get("state_dict", {}))]
        way = f"; resume {' or '.join(good)}" if good else ", and the run has no other checkpoint that can be"
        raise UserError(f"cannot resume '{checkpoint}': {in_words(wrong, weights)}{way}")


def rate_of(content: Mapping[str, Any]) -> float | None:
    """The learning rate that a checkpoint was trained with, before its schedule; None if it does not say.

    >>> rate_of({"optimizer_states": [{"param_groups": [{"lr": 5e-4, "initial_lr": 1e-3}]}]})
    0.001
    """
    groups = [group for state in content.get("optimizer_states", ()) for group in state["param_groups"]]
    return content.get(RATE, groups[0].get("initial_lr", groups[0]["lr"]) if groups else None)


def set_rate(content: dict[str, Any], rate: float) -> None:
    """Replace the learning rate in a checkpoint's optimizers and schedules, in which it stays where it is.

    >>> content = {"optimizer_states": [{"param_groups": [{"lr": 5e-4, "initial_lr": 1e-3}]}], "lr_schedulers": []}
    >>> set_rate(content, 1e-4)
    >>> content["optimizer_states"][0]["param_groups"]
    [{'lr': 5e-05, 'initial_lr': 0.0001}]
    """
    old = rate_of(content)

    def moved(value: float) -> float:
        return rate if value == old or not old else rate * (value / old)

    for state in content["optimizer_states"]:
        for group in state["param_groups"]:
            group |= {name: moved(group[name]) for name in ("lr", "initial_lr") if name in group}
    for schedule in content["lr_schedulers"]:
        schedule |= {name: list(map(moved, schedule[name])) for name in ("base_lrs", "_last_lr") if name in schedule}


class ResumedRate(Callback):
    """Records the learning rate in checkpoints, and applies that of the config to those which are resumed."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RATE] = pl_module.learning_rate

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        old, rate = rate_of(checkpoint), pl_module.learning_rate
        if trainer.state.fn == "fit" and old is not None and old != rate:
            set_rate(checkpoint, rate)
            trainer.print(f"learning rate {old:.2e} -> {rate:.2e}, from step {checkpoint['global_step']} on")
