"""The command line of training: `python main.py` and `histoldm train`."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ldm.errors import UserError, run_command
from ldm.training.run import SEED, Training, check_trainer_key, merge_config

HELP = """Train the model that a config describes.

Examples:

    start a new run
        {train} --base configs/a.yaml [b.yaml ...] [key.path=value ...]
    continue a run exactly where it stopped
        {train} --resume logs/<run>
    check a config without training
        {check} --base configs/a.yaml

Later files win over earlier ones, and key.path=value wins over files. A config is a file or the name of a shipped
config, such as demo/ssl. Every argument of Lightning's Trainer is a key under `lightning.trainer` and an option here:
`lightning.trainer.max_steps=1000` and `--max_steps 1000` are the same. Ctrl-C finishes the step, saves `last.ckpt` and
prints the command that continues the run.
"""


@dataclass(frozen=True)
class Door:
    """One of the two programs that train.

    Attributes:
        program: what the user typed to start it.
        trains: whether it trains by default, without -t.
        train, check: what to type to train, and to check a config only.
    """

    program: str
    trains: bool

    @property
    def train(self) -> str:
        return self.program if self.trains else f"{self.program} -t"

    @property
    def check(self) -> str:
        return f"{self.program} -t false" if self.trains else self.program


MAIN = Door("python main.py", trains=False)  # as users of latent-diffusion know it
HISTOLDM = Door("histoldm train", trains=True)


def parser(door: Door = MAIN) -> argparse.ArgumentParser:
    """The options of training, but for the arguments of Lightning's Trainer, which `parse` takes as well.

    >>> parser(HISTOLDM).prog
    'histoldm train'
    """
    made = argparse.ArgumentParser(
        prog=door.program,
        description=HELP.format(train=door.train, check=door.check),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    switch = {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    add = made.add_argument
    train_help = f"train, or only check the config (default: {str(door.trains).lower()})"
    add("-t", "--train", default=door.trains, help=train_help, **switch)
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="configs to merge, from left to right")
    add("-r", "--resume", metavar="RUN", help="continue this run: a run folder, or a checkpoint in it")
    add("-n", "--name", help="name of the run folder, logs/<time>_<name> (default: that of the first config)")
    add("-f", "--postfix", default="", help="text to add to the run folder's name")
    add("-l", "--logdir", default="logs", metavar="DIR", help="folder of run folders (default: %(default)s)")
    add("-s", "--seed", type=int, help=f"seed of everything random (default: {SEED})")
    add("--gpus", help="GPUs to train on, such as 0,1 or 0, (default: one if there is one)")
    add("-d", "--debug", default=False, help="open the debugger if training fails", **switch)
    rate_help = "multiply the base learning rate by accumulated batches, devices and batch size "
    rate_help += "(default: true; of a resumed run, as before)"
    add("--scale_lr", help=rate_help, **switch)
    add("--no-test", default=False, help="do not evaluate on the test set of the data afterwards", **switch)
    return made


def parse(argv: Sequence[str], door: Door = MAIN) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line into options and key.path=value overrides.

    Options that are not defined here are arguments of Lightning's Trainer, and become overrides.

    Raises:
        UserError: an option is not an argument of the Trainer either.

    >>> options, overrides = parse(["-t", "--base", "demo/ssl", "--max_steps", "2", "data.params.stores=mine"])
    >>> options.base, overrides
    (['demo/ssl'], ['data.params.stores=mine', 'lightning.trainer.max_steps=2'])
    """
    own = parser(door)
    overrides = [item for item in argv if re.match(r"[A-Za-z_][\w.]*=", item)]  # before -t or --base swallows them
    options, rest = own.parse_known_args([item for item in argv if item not in overrides])
    flags = [flag for action in own._actions for flag in action.option_strings]
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        check_trainer_key(flag.removeprefix("--"), flags, flag)
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        overrides.append(f"lightning.trainer.{flag.removeprefix('--')}={value}")
    return options, overrides


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "y", "1", "false", "no", "n", "0"):
        return text.lower() in ("true", "yes", "y", "1")
    raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")


def _run(argv: Sequence[str], door: Door) -> int:
    options, overrides = parse(argv, door)
    if options.resume and options.name:
        raise UserError("--name is for a new run and --resume continues an old one; give only one of them.")
    if options.resume:
        from ldm.training.resume import check_resume, find_run

        folder, checkpoint = find_run(options.resume)
        cfg = merge_config(options, overrides, folder)
        changed = check_resume(cfg, checkpoint)
    else:
        folder, checkpoint, changed = None, None, []
        cfg = merge_config(options, overrides, None)
    folder = folder or Path(options.logdir) / f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{cfg['name']}{options.postfix}"

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    harmless = (".*LeafSpec", "Checkpoint directory .* is not empty", r"Found \d+ module\(s\) in eval mode")
    for message in (*harmless, "Total length of `list`"):  # no test set
        warnings.filterwarnings("ignore", message=message)
    training = Training(cfg, folder, checkpoint)
    for line in changed:
        training.trainer.print(line)
    if options.train:
        if code := training.fit(f"{door.train} --resume {folder}", options.debug):
            return code
    elif not checkpoint:
        training.trainer.print(f"the config is valid; train with: {door.train}")
    if not options.no_test and (options.train or checkpoint):
        training.test(None if options.train else checkpoint)
    return 0


def main(argv: Sequence[str] | None = None, door: Door = MAIN) -> int:
    """Run a command line, by default that of this process, and return the exit code.

    >>> main(["--logdri", "x"])
    2
    """
    codes: list[int] = []
    try:
        return run_command(lambda: codes.append(_run(sys.argv[1:] if argv is None else argv, door))) or codes[0]
    except SystemExit as stop:  # after --help, or an error that argparse found
        return stop.code
