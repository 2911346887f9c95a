"""What is done, what it took, and how an interrupted step goes on."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from demo.steps import Step
from ldm.errors import UserError
from ldm.files import remove, sha256, write_text


class Record:
    """`times.json`: per step its command, digest of inputs, seconds, peak MiB, when it began, whether it is done.

    Run folders of trainings are looked for in `logs` beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.logs = path, path.parent / "logs"
        try:
            self.steps: dict[str, dict[str, Any]] = json.loads(path.read_text())["steps"] if path.exists() else {}
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; delete it, and the demo starts again") from None

    def save(self) -> None:
        write_text(self.path, json.dumps({"steps": self.steps}, indent=1))

    def done(self, step: Step) -> bool:
        entry = self.steps.get(step.name, {})
        left = all(path.exists() for path in step.outputs)
        left = left and (not step.run_name or find_run(self.logs, step, entry.get("begun", "")) is not None)
        return entry.get("done", False) and left and self._same(step)

    def begun(self, step: Step) -> bool:
        """Whether an interrupted run of this very command on the same inputs can go on."""
        return step.name in self.steps and not self.steps[step.name]["done"] and self._same(step)

    def _same(self, step: Step) -> bool:
        entry = self.steps[step.name]
        return entry["command"] == list(step.command) and entry.get("inputs") == sha256(*step.inputs)

    def begin(self, step: Step, later: list[Step]) -> None:
        """Forget the step and all that builds on it."""
        for path in step.outputs:
            remove(path)
        for each in (step, *later):
            self.steps.pop(each.name, None)
        now = f"{datetime.now():%Y-%m-%dT%H-%M-%S}"
        self.steps[step.name] = {
            "title": step.title, "command": list(step.command), "inputs": sha256(*step.inputs), "begun": now,
            "seconds": 0.0, "peak_mib": 0.0, "done": False,
        }  # fmt: skip
        self.save()


def find_run(logs: Path, step: Step, begun: str) -> Path | None:
    """The resumable run folder that a training step has made since it began."""
    runs = [run for run in sorted(logs.glob(f"*_{step.run_name}")) if run.name >= begun]
    runs = [run for run in runs if (run / "checkpoints" / "last.ckpt").is_file()]
    return runs[-1] if runs else None


def runs_of(steps: list[Step], record: Record, logs: Path) -> dict[str, Path | None]:
    """Run folder of each training step that has begun, None while there is nothing to resume."""
    trainings = [step for step in steps if step.run_name and step.name in record.steps]
    return {step.name: find_run(logs, step, record.steps[step.name]["begun"]) for step in trainings}


def command_of(step: Step, steps: list[Step], record: Record, logs: Path) -> tuple[str, ...]:
    """The command to type now: with run folders filled in, and resuming a training that was interrupted."""
    runs = runs_of(steps, record, logs)
    if runs.get(step.name):
        return ("python", "main.py", "-t", "--resume", str(runs[step.name]), "--no-test")
    return tuple(part.format(**runs) for part in step.command)
