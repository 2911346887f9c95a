r"""Every command that writes is killed, met by a full disk and run twice at once, then run again: is anything lost?

Each command runs on a tiny world until it ends, and again until it is killed, or until its disk is full, before any of
its changes to a folder: a file opened for writing, renamed or removed, a folder made or removed; and at random moments.
Run again, it must leave the same bytes as the run that nothing stopped, and nothing else. Of two at once one is refused
in one message, or both are right. No run shows a traceback.

    python -m benchmarks.kills                                # every command, 24 kills each: about an hour on two cores
    python -m benchmarks.kills sample translate --kills 200

A child of a process that has imported everything runs each command, so that a kill costs less than a second. Where the
user may mount a file system (root), disks of several sizes are filled as well. tests/test_kills.py does a few of each.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import pkgutil
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

ROOT = Path(__file__).resolve().parent.parent
CHANGES = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")  # audit events, and `open`
TOLD = ("the disk is full", "No space left on device", "of disk while it is made")
LIBRARIES = (  # that commands import when they come to need them
    "lightning_fabric", "matplotlib.figure", "open_clip", "pyarrow.dataset", "pydantic",
    "pytorch_lightning", "torchmetrics", "transformers",
)  # fmt: skip
SMALL = {  # so that little data has several parts, and nobody waits for long
    "ldm.data.shards.SHARD_ROWS": 8, "ldm.scorers.select.CHUNK": 4, "data_prep.prepare.PAUSE": 0.2,
    "ldm.commands.slide_making.SHARD": 64,
    "ldm.commands.slide_making.TILE": 32,
    **{f"ldm.{name}.TILE": 32 for name in ("images.pyramid", "images.slide_tiff", "images.write")},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command: the words after `histoldm`, or after `python -m` where they begin with data_prep.

    `given`: what of the world it writes into, which each run has a copy of; the rest is in `world/`. `again`: exit
    codes of a run after it has finished. `varies`: what tells times. `parts`: it owns what it writes part by part, so
    that of two at once each may be refused a part.
    """

    words: str
    given: tuple[str, ...] = ()
    again: tuple[int, ...] = (0,)
    varies: tuple[str, ...] = ()
    parts: bool = False


NETWORK = "--arch-arg channels=[8,8,16,16] --arch-arg stem_width=8 --size 16 --epochs 2 --members 2"
SAMPLING = "--model world/model --steps 2 --batch-size 2"
CASES = {
    "sample": Case(f"sample {SAMPLING} --condition class=A --count 5 --out out"),
    "large-image": Case(
        f"large-image {SAMPLING} --features world/grid.npy --mpp 0.5 --size 320,16 --out out/a.png --out out/a.tif "
        "--out out/a.ome.zarr --out out/a.jpg"
    ),
    "slide": Case(f"slide {SAMPLING} --features world/slide.npy --mpp 0.5 --out out/a.ome.zarr --out out/a.tif"),
    "field": Case("field --model world/field --steps 2 --size 9,7 --condition class=A --out out/a.npy"),
    "translate": Case(
        f"translate {SAMPLING} --images world/images --class-of-name --target class=B --target two:\\ class=A "
        "--save-intermediates 2 --differences --out out"
    ),
    "translate slide": Case(
        f"translate {SAMPLING} --images world/slides/P1.png --mpp 0.5 --region 0,0,130,66 --source class=A "
        "--target class=B --out out/b.tif"
    ),
    "translate volume": Case(
        "translate --model world/gray --steps 2 --batch-size 2 --images world/volume.nii.gz --out out/made.nii.gz"
    ),
    "sequence": Case(f"sequence {SAMPLING} --vary score=0:1:3 --count 3 --out out"),
    "evaluate": Case(
        "evaluate --generated world/tiles --real world/cells --features pixels --features world/encoder "
        "--image-size 16 --out out"
    ),
    "train-scorer": Case(f"train-scorer --data world/cells --positive B {NETWORK} --out out"),
    "score": Case("score --scorer world/scorer --images world/cells --out out/scores.csv"),
    "filter": Case("filter --scorer world/scorer --images world/cells --top 0.3 --out out"),
    "rate": Case("rate --images world/cells --count 6 --out out", again=(2,)),
    "resample": Case(f"resample {SAMPLING} --condition class=A --scorer world/scorer --above 0.4 --until 3 --out out"),
    "utility": Case(f"utility --real world/cells --synthetic world/tiles --positive B {NETWORK} --epochs 1 --out out"),
    "export": Case("export world/run --out out/model"),
    "export over": Case("export world/run --half --out model", given=("model",)),
    "convert": Case("convert world/compvis/model.ckpt --out out/model"),
    "convert --to": Case("convert world/ssl --to compvis --out out/compvis"),
    "tile_slides": Case(
        "data_prep.tile_slides --slides world/slides --slide-mpp 0.5 --tile-size 32 --out out", parts=True
    ),
    "extract_features": Case(
        "data_prep.extract_features --store cohort --encoder world/encoder --any-mpp --batch-size 4",
        given=("cohort",),
    ),
    "encode_latents": Case(
        "data_prep.encode_latents --store cohort --first-stage world/first-stage --batch-size 4", given=("cohort",)
    ),
    "encode_captions": Case(
        "data_prep.encode_captions --store cohort --model world/tiny_clip.json --weights world/clip.pt --batch-size 4",
        given=("cohort",),
    ),
    "import_captions": Case("data_prep.import_captions --table world/captions.csv --size 16 --out out"),
    "join_omics": Case(
        "data_prep.join_omics --cohort cohort --expression world/genes.csv --unit unit", given=("cohort",)
    ),
    "slice_volumes": Case("data_prep.slice_volumes --images a=world/cells/A --size 16 --out out"),
    "mitosis_cells": Case("data_prep.mitosis_cells --crops world/cells --positive B --size 16 --out out"),
    "grid_features": Case(
        "data_prep.grid_features --store cohort --from cohort --feature own --out-name grid", given=("cohort",)
    ),
    "fit_feature_codec": Case("data_prep.fit_feature_codec --store world/cohort --feature own --out out/codec"),
    "import_features": Case(
        "data_prep.import_features --store cohort --files world/features --name given", given=("cohort",)
    ),
    "export_features": Case("data_prep.export_features --store world/cohort --feature own --to clam --out out"),
    "verify": Case("data_prep.verify --store broken --repair --encoder world/encoder", given=("broken",)),
    "train_feature_map": Case(
        "data_prep.train_feature_map --source world/a.npy --target world/b.npy --steps 2 --out out/map"
    ),
    "prepare": Case(
        "data_prep.prepare --slides world/slides --slide-mpp 0.5 --tile-size 32 --encoder world/encoder "
        "--any-mpp --first-stage world/first-stage --out out",
        varies=("runs", "summary.html"), parts=True,
    ),
}


# --- a process that runs commands in children -------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """When a run is stopped: before its change number `change`, counted from 0, by a kill, or by a disk that is full
    from then on; or killed after so many seconds. By default never."""

    change: int = -1
    full: bool = False
    seconds: float = 0.0


def serve() -> None:
    """Import everything, then run what each line of stdin asks for in a child; a line to stdout when it has ended."""
    import data_prep
    import ldm

    for package in (ldm, data_prep):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)
    for name in LIBRARIES:
        importlib.import_module(name)
    with suppress(ImportError):  # an extra
        importlib.import_module("distributed")
    print("ready", flush=True)
    children: dict[int, int] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(children.pop(job["wait"]), 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        elif (pid := os.fork()) == 0:
            run_job(job)
        else:
            children[job["number"]] = pid
            print(pid, flush=True)


def dask_setup(_: object = None) -> None:
    """Make little data have several parts in this process; Dask calls it in the workers that a run starts."""
    for name, value in SMALL.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)


def run_job(job: dict[str, Any]) -> NoReturn:
    """In a child: run a command in a folder, its output in a file, and end."""
    import torch

    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (open(stream, "w", 1, errors="backslashreplace", closefd=False) for stream in (1, 2))
        os.chdir(job["folder"])
        torch.set_num_threads(1)
        dask_setup()
        if dask := sys.modules.get("dask"):
            dask.config.set({"distributed.worker.preload": ["benchmarks.kills"]})
        if job["words"][0] == "call":
            module, _, function = job["words"][1].rpartition(".")
            getattr(importlib.import_module(module), function)(*job["words"][2:])
            code = 0
        else:
            code = command(job)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(job: dict[str, Any]) -> int:
    """Run a command line, stopped as the job says; its exit code. The number of its changes goes to the log."""
    import typer.main

    from ldm.cli import app
    from ldm.cli.script import call
    from ldm.errors import run_command

    stop, words, here, count = Stop(**job["stop"]), job["words"], os.getcwd(), 0

    def hook(event: str, about: tuple[Any, ...]) -> None:
        nonlocal count
        if not is_change(event, about, here):
            return
        count += 1
        if stop.change < 0 or count <= stop.change:
            return
        if not stop.full:
            os.kill(os.getpid(), signal.SIGKILL)
        elif event not in ("os.remove", "os.rmdir", "os.truncate"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(about[0]))

    sys.addaudithook(hook)
    if words[0].startswith("data_prep"):
        main = importlib.import_module(words[0]).main
        code = run_command(lambda: main(words[1:]))
    else:
        code = run_command(lambda: call(typer.main.get_command(app), "histoldm", words))
    print(f"changes: {count}")
    return code


def is_change(event: str, about: tuple[Any, ...], here: str) -> bool:
    """Whether an audit event is a change to a file or folder within `here`."""
    if event == "open":
        writes = about[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    else:
        writes = event in CHANGES
    if not writes or isinstance(about[0], int):
        return False
    path = os.fsdecode(about[0])
    return not os.path.isabs(path) or path.startswith(here)


# --- trials -----------------------------------------------------------------------------------------------------------


class Server:
    """The process that runs commands in children; a context manager."""

    def __enter__(self) -> Server:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_MININTERVAL": "60"}
        code = "from benchmarks.kills import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self._line() == "ready"
        self.number = 0
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        return self.process.stdout.readline().strip()

    def _ask(self, **job: Any) -> str:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._line()

    def start(self, words: Sequence[str], folder: Path, stop: Stop = Stop()) -> Run:
        self.number += 1
        log = folder.parent / f"{folder.name}-{self.number}.log"
        about = {"words": list(words), "folder": str(folder), "log": str(log), "stop": stop.__dict__}
        pid = int(self._ask(number=self.number, **about))
        return Run(self, self.number, pid, log)

    def run(self, words: Sequence[str], folder: Path, stop: Stop = Stop()) -> Run:
        """A command that has ended."""
        run = self.start(words, folder, stop)
        if stop.seconds:
            time.sleep(stop.seconds)
            os.kill(run.pid, signal.SIGKILL)  # still the server's child, if it has ended
        return run.ended()


@dataclass
class Run:
    """A run of a command. code: of its exit. said: its output."""

    server: Server
    number: int
    pid: int
    log: Path
    code: int = 0
    said: str = ""

    def ended(self) -> Run:
        self.code = int(self.server._ask(wait=self.number))
        self.said = self.log.read_text(errors="replace") if self.log.exists() else ""  # killed before it said anything
        return self

    @property
    def changes(self) -> int:
        return int(self.said.rpartition("changes: ")[2])


class Trials:
    """Trials of one command: `reference` is what an undisturbed run leaves."""

    def __init__(self, server: Server, world: Path, place: Path, name: str):
        self.server, self.world, self.place, self.name = server, world, place, name
        self.case = CASES[name]
        self.words = shlex.split(self.case.words)
        self.made = 0
        with self.folder() as folder:
            start = time.monotonic()
            run = server.run(self.words, folder)
            self.seconds = time.monotonic() - start
            self.expect(run.code == 0, run, "the undisturbed run failed")
            self.changes, self.reference = run.changes, contents(folder, self.case)
            self.expect(not (left := hidden_in(self.reference)), run, f"the undisturbed run leaves {left}")

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder to run in, with a copy of what the command writes into."""
        self.made += 1
        folder = self.place / f"{self.name.replace(' ', '-')}-{self.made}"
        folder.mkdir()
        self.furnish(folder)
        yield folder
        shutil.rmtree(folder)

    def furnish(self, folder: Path) -> None:
        (folder / "world").symlink_to(self.world)
        for name in self.case.given:
            shutil.copytree(self.world / name, folder / name)

    def expect(self, holds: bool, run: Run, what: str) -> None:
        if not holds:
            raise AssertionError(f"{self.name}: {what}\n{run.said[-800:]}")

    def finish(self, folder: Path, how: str) -> None:
        """Run the command to its end; it must leave what the undisturbed run left."""
        run = self.server.run(self.words, folder)
        fine = run.code in (0, *self.case.again) and "Traceback" not in run.said
        self.expect(fine, run, f"the run after {how} fails")
        found = contents(folder, self.case)
        self.expect(not (lost := sorted(self.reference.keys() - found.keys())), run, f"after {how} it lacks {lost}")
        self.expect(not (left := sorted(found.keys() - self.reference.keys())), run, f"after {how} it leaves {left}")
        differ = [path for path, content in found.items() if content != self.reference[path]]
        self.expect(not differ, run, f"after {how} it leaves other bytes in {differ}")

    def stopped(self, *stops: Stop, raced: bool = False) -> None:
        """The command is stopped in one run after the other, then runs to its end; raced: two at once before that."""
        with self.folder() as folder:
            for stop in stops:
                run = self.server.run(self.words, folder, stop)
                if stop.full and run.code:
                    told = run.code == 2 and any(words in run.said for words in TOLD) and "Traceback" not in run.said
                    self.expect(told, run, f"a full disk at change {stop.change} is not told")
                elif not stop.full:
                    self.expect(run.code in (0, -signal.SIGKILL, *self.case.again), run, f"{stop} fails")
            if raced:
                self.race(folder)
            self.finish(folder, f"{stops}")

    def at_once(self, pause: float) -> None:
        """Two runs, the second begun `pause` seconds after the first."""
        with self.folder() as folder:
            self.race(folder, pause)
            self.finish(folder, "two at once")

    def race(self, folder: Path, pause: float = 0.0) -> None:
        runs = [self.server.start(self.words, folder)]
        time.sleep(pause)
        runs = [run.ended() for run in (*runs, self.server.start(self.words, folder))]
        for run in runs:
            refused = run.code == 2 and "is being written by process" in run.said and "Traceback" not in run.said
            self.expect(run.code in (0, *self.case.again) or refused, run, "of two at once one fails")
        succeeds = any(run.code in (0, *self.case.again) for run in runs)
        self.expect(succeeds or self.case.parts, runs[1], "of two at once none succeeds")

    def small_disk(self, share: float) -> None:
        """A disk that has room for so much of what the command writes, and is made larger then. Needs root."""
        with self.folder() as folder:
            given = sum(file.stat().st_size + 4096 for file in folder.rglob("*") if file.is_file())
            for own in list(folder.iterdir()):
                shutil.rmtree(own) if own.is_dir() and not own.is_symlink() else own.unlink()
            written = sum(len(content) // 4096 + 1 for content in self.reference.values()) * 4096
            size = int(given + 32768 + share * max(written - given, 8192))
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "kills", str(folder)], check=True)
            try:
                self.furnish(folder)
                run = self.server.run(self.words, folder)
                told = run.code == 2 and any(words in run.said for words in TOLD) and "Traceback" not in run.said
                self.expect(run.code in (0, *self.case.again) or told, run, f"a disk of {size} bytes is not told")
                subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
                self.finish(folder, f"a disk of {size} bytes")
            finally:
                subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a reader's threads may be ending

    def spread(self, count: int, rng: random.Random) -> list[int]:
        """`count` of the changes, spread over all of them."""
        parts = [(i * self.changes // count, (i + 1) * self.changes // count) for i in range(count)]
        return sorted({rng.randrange(low, high) for low, high in parts if low < high})


def contents(folder: Path, case: Case) -> dict[str, bytes]:
    """Relative path -> bytes of everything in a folder, but for the world and what tells times; of folders b""."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] != "world" and not any(part in case.varies for part in name.parts):
            found[str(name)] = path.read_bytes() if path.is_file() else b""
    return found


def hidden_in(found: dict[str, bytes]) -> list[str]:
    return [path for path in found if any(part.startswith(".") for part in Path(path).parts)]


@contextmanager
def workplace() -> Iterator[tuple[Server, Path, Path]]:
    """The server, the world and a place for folders to run in."""
    with tempfile.TemporaryDirectory(prefix="kills-") as top, Server() as server:
        world, place = Path(top, "world"), Path(top, "runs")
        world.mkdir()
        place.mkdir()
        run = server.run(["call", "benchmarks.kills_world.build_world", str(world)], world)
        if run.code:
            raise RuntimeError(run.said)
        yield server, world, place


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "kills", folder], capture_output=True)
        return made.returncode == 0 and subprocess.run(["umount", folder], check=True).returncode == 0


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Commands: {', '.join(CASES)} (default: all).")] = None,
    kills: Annotated[int, typer.Option(help="Kills of each at its changes, and half as many at random moments.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
) -> None:
    """Kill, starve and race every command; exit code 1 where something is lost, left behind or not told."""
    mounts, failed = can_mount(), 0
    with workplace() as (server, world, place):
        for name in names or CASES:
            rng, start, faults = random.Random(f"{seed} {name}"), time.monotonic(), []
            trials = Trials(server, world, place, name)
            work = [(trials.stopped, (Stop(at),)) for at in trials.spread(kills, rng)]
            work += [(trials.stopped, (Stop(seconds=rng.uniform(0, trials.seconds)),)) for _ in range(kills // 2)]
            work += [(trials.stopped, (Stop(at, full=True),)) for at in trials.spread(kills // 2, rng)]
            work += [(trials.at_once, (rng.uniform(0, trials.seconds),)) for _ in range(max(1, kills // 6))]
            work += [(trials.small_disk, (rng.uniform(0, 1),)) for _ in range(kills // 4 * mounts)]
            for trial, about in work:
                try:
                    trial(*about)
                except AssertionError as fault:
                    faults.append(str(fault))
            failed += len(faults)
            told = f"{len(work) - len(faults)} of {len(work)} trials hold"
            print(f"{name}: {trials.changes} changes; {told} ({time.monotonic() - start:.0f} s)", flush=True)
            for fault in faults:
                print("  " + fault.replace("\n", "\n    "), flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    typer.run(main)
