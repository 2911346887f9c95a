"""Run the demo: every step that is not done yet, as a command of its own, printed before it runs.

`demo_output/times.json` records what is done and what it took. Ctrl-C stops the step under way so that it can go on;
the same command continues. A step that begins anew makes the later ones begin anew.

Example:

    python -m demo
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from demo.record import Record, command_of
from demo.steps import OUT, SLIDE, Step, demo_steps, executable
from ldm.cli.script import script
from ldm.devices import faster_precision
from ldm.errors import UserError
from ldm.files import owns

IMPORT_SECONDS = 5
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # the demo needs no network
    "MALLOC_MMAP_THRESHOLD_": "4294967296",  # glibc keeps the memory of large activations: fewer page faults
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}


def run_child(command: list[str]) -> tuple[int, float]:
    """Exit code and peak MiB of a command. Ctrl-C, SIGTERM and SIGHUP reach it once each, as Ctrl-C.

    While it is young and still imports its modules there is nothing to put in order, and SIGTERM ends it quietly.
    """
    start = time.monotonic()
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    pending: list[int] = []
    before = [signal.signal(number, lambda number, _: pending.append(number)) for number in stops]
    try:
        environment = ENVIRONMENT | os.environ
        child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if pending:
                pending.clear()
                young = time.monotonic() - start < IMPORT_SECONDS
                os.kill(child.pid, signal.SIGTERM if young else signal.SIGINT)
            time.sleep(0.1)
        child.returncode = os.waitstatus_to_exitcode(status)
    finally:
        for number, handler in zip(stops, before):
            signal.signal(number, handler)
    stopped = pending and not child.returncode  # it finished all the same: stop before the next one
    return 130 if stopped else child.returncode, usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def run_step(step: Step, command: tuple[str, ...], record: Record) -> None:
    """Run one step and record it. Exits with 130 where it was stopped; UserError where it failed."""
    entry = record.steps[step.name]
    print(f"$ {shlex.join(command)}", flush=True)
    start = time.monotonic()
    code, peak = run_child(executable(command))
    entry["seconds"] += time.monotonic() - start
    entry["peak_mib"] = max(entry["peak_mib"], peak)
    entry["done"] = code == 0
    record.save()
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        print(f"\nthe demo is stopped in step '{step.name}'; `make demo` goes on from there", file=sys.stderr)
        raise SystemExit(130)
    if code:
        raise UserError(f"step '{step.name}' failed with exit code {code}; what it says is above")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@owns()
def run_demo(out: Path) -> None:
    if not SLIDE.is_file():
        raise UserError(f"{SLIDE} is not here; run the demo in the root folder of the repository")
    steps = demo_steps(out, faster_precision()[0])
    record = Record(out / "times.json")
    for number, step in enumerate(steps, start=1):
        head = f"[{number}/{len(steps)}] {step.title}"
        if record.done(step):
            print(f"{head}: done")
            continue
        print(f"\n{head}", flush=True)
        if not record.begun(step):
            record.begin(step, steps[number:])
        run_step(step, command_of(step, steps, record, out / "logs"), record)
        entry = record.steps[step.name]
        print(f"  took {clock(entry['seconds'])}, peak memory {entry['peak_mib'] / 1024:.1f} GiB")
    total = sum(entry["seconds"] for entry in record.steps.values())
    peak = max(entry["peak_mib"] for entry in record.steps.values()) / 1024
    print(
        f"\nmade in {clock(total)} with at most {peak:.1f} GiB: {out}/report.html (open it in a browser), "
        f"{out}/synthetic_1024.png and .tif (a pyramid for QuPath), the trained model in {out}/model"
    )


@script("demo", __doc__)
def main() -> None:
    run_demo(OUT)


if __name__ == "__main__":
    main.run()
