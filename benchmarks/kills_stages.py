"""`data_prep.prepare` killed in each of its stages, alone and under Dask, its workers too: is anything lost?

    python -m benchmarks.kills_stages                  # 20 kills in each stage, alone and by a scheduler's two workers
    python -m benchmarks.kills_stages --kills 4 --places local

Each trial begins with a cohort of which the stages before are done, kills at a random moment of the stage, and lets the
same command finish: it must leave the bytes that an undisturbed run in one process leaves, nothing else, and `verify`
finds no fault. Places: alone, in one process; scheduler, a running Dask cluster with two workers, of which the client,
one worker or all processes are killed; local, `--workers 2`. A run whose workers are killed must succeed by itself.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.kills import TOLD, Case, Run, Server, contents, hidden_in, workplace
from ldm.errors import some

STAGES = ("tiles", "features", "latents", "check")
PLACES = ("alone", "scheduler", "local")
VICTIMS = ("client", "worker", "all")
CASE = Case("", varies=("runs", "summary.html"))
WORDS = "data_prep.prepare --slides slides --slide-mpp 0.5 --tile-size 32 --out out".split()
MODELS = {
    "features": "--encoder world/encoder --any-mpp".split(),
    "latents": "--first-stage world/first-stage".split(),
}
LONG = 120.0  # seconds after which a run hangs


def make_slides(folder: Path, count: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        slide = np.full((160, 192, 3), 240, np.uint8)
        slide[32:128, 32:160] = rng.integers(90, 200, (96, 128, 3)) * np.array([1.0, 0.6, 0.9])
        Image.fromarray(slide).save(folder / f"P{i}.png")


# --- a Dask cluster, each process of which the server forks -----------------------------------------------------------


def be_scheduler(file: str) -> None:
    import asyncio

    from distributed import Scheduler

    async def serve() -> None:
        async with Scheduler(scheduler_file=file, host="127.0.0.1", dashboard=False) as scheduler:
            await scheduler.finished()

    asyncio.run(serve())


def be_worker(file: str, scratch: str) -> None:
    import asyncio

    from distributed import Worker

    async def serve() -> None:
        options = {"nthreads": 2, "resources": {"WORK": 1, "FETCH": 1}, "local_directory": scratch, "dashboard": False}
        async with Worker(scheduler_file=file, **options) as worker:
            await worker.finished()

    os.environ["TQDM_DISABLE"] = "1"
    asyncio.run(serve())


class Cluster:
    """A scheduler and workers; one that was killed is followed by another."""

    def __init__(self, server: Server, place: Path, workers: int) -> None:
        self.server, self.place, self.file = server, place, place / "scheduler.json"
        place.mkdir()
        self.scheduler = self._start("be_scheduler", str(self.file))
        self.workers = [self._worker() for _ in range(workers)]

    def _start(self, name: str, *words: str) -> Run:
        return self.server.start(["call", f"benchmarks.kills_stages.{name}", *words], self.place)

    def _worker(self) -> Run:
        return self._start("be_worker", str(self.file), str(self.place / "scratch"))

    def kill(self, number: int) -> None:
        end(self.workers[number])
        self.workers[number] = self._worker()

    def close(self) -> None:
        for run in (*self.workers, self.scheduler):
            end(run)


def end(run: Run) -> Run:
    with suppress(ProcessLookupError):
        os.kill(run.pid, signal.SIGKILL)
    return run.ended()


def is_over(run: Run) -> bool:
    stat = Path(f"/proc/{run.pid}/stat").read_text()  # its parent has not waited for it yet
    return stat.rpartition(")")[2].split()[0] == "Z"


def family(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


# --- trials -----------------------------------------------------------------------------------------------------------


class StageTrials:
    """Trials in one place. `reference`: what an undisturbed run in one process leaves."""

    def __init__(self, server: Server, world: Path, runs: Path, place: str, slides: int = 4, workers: int = 2) -> None:
        self.server, self.world, self.place, self.made = server, world, place, 0
        self.runs = Path(tempfile.mkdtemp(dir=runs, prefix=f"{place}-"))
        make_slides(self.runs / "slides", slides)
        self.before = {}
        for i, stage in enumerate(STAGES):  # the cohort with the stages before done
            self.before[stage] = self.runs / f"before-{stage}"
            self._furnish(self.before[stage], self.before[STAGES[i - 1]] if i else None)
            models = [word for name in STAGES[:i] for word in MODELS.get(name, [])]
            if i:
                run = server.run([*WORDS, *models], self.before[stage])
                self.expect(run.code == 0, run, "the undisturbed run failed")
        self.reference = contents(self.before["check"], CASE)
        self.expect(not hidden_in(self.reference), run, "the undisturbed run leaves hidden files")
        self.cluster = Cluster(server, self.runs / "cluster", workers) if place == "scheduler" else None
        by = {"alone": [], "scheduler": ["--scheduler", str(self.runs / "cluster" / "scheduler.json")]}
        words = [*WORDS, *MODELS["features"], *MODELS["latents"]]
        self.words = [*words, *by.get(place, ["--workers", str(workers)])]
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def __enter__(self) -> StageTrials:
        return self

    def __exit__(self, *_: object) -> None:
        if self.cluster:
            self.cluster.close()

    def expect(self, holds: bool, run: Run, what: str) -> None:
        if not holds:
            raise AssertionError(f"{self.place}: {what}\n{run.said[-800:]}")

    def _furnish(self, folder: Path, cohort: Path | None) -> None:
        folder.mkdir()
        (folder / "world").symlink_to(self.world)
        (folder / "slides").symlink_to(self.runs / "slides")
        if cohort is not None and (cohort / "out").exists():
            shutil.copytree(cohort / "out", folder / "out")

    @contextmanager
    def folder(self, stage: str) -> Iterator[Path]:
        self.made += 1
        folder = self.runs / f"{stage}-{self.made}"
        self._furnish(folder, self.before[stage])
        yield folder
        shutil.rmtree(folder)

    def begin(self, folder: Path) -> Run:
        """A run whose work has begun."""
        run = self.server.start(self.words, folder)
        self.wait(run, lambda: run.log.exists() and "preparing" in run.log.read_text(errors="replace"))
        return run

    def wait(self, run: Run, ready: object = None) -> None:
        until = time.monotonic() + LONG
        while not (is_over(run) or (ready and ready())):
            if time.monotonic() > until:
                raise AssertionError(f"{self.place}: hangs\n{end(run).said[-800:]}")
            time.sleep(0.005)

    def measure(self, stage: str) -> None:
        """How long the work takes where nothing stops it; it must leave the reference."""
        with self.folder(stage) as folder:
            run = self.begin(folder)
            start = time.monotonic()
            self.wait(run)
            self.seconds[stage] = time.monotonic() - start
            run.ended()
            self.expect(run.code == 0, run, "the undisturbed run failed")
            self.check(folder, run, "an undisturbed run")

    def killed(self, stage: str, rng: random.Random, victim: str) -> bool:
        """One trial; False where the run had ended before the kill."""
        if not self.seconds[stage]:
            self.measure(stage)
        with self.folder(stage) as folder:
            run = self.begin(folder)
            time.sleep(rng.uniform(0, self.seconds[stage]))
            over = is_over(run)
            workers = family(run.pid) if self.place == "local" and not over else []
            if victim in ("worker", "all"):
                if self.cluster:
                    every = range(len(self.cluster.workers))
                    for number in every if victim == "all" else [rng.choice(every)]:
                        self.cluster.kill(number)
                chosen = workers if victim == "all" else rng.sample(workers, min(1, len(workers)))
                for pid in chosen:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            if victim == "worker":
                self.wait(run)
                run.ended()
                self.expect(run.code == 0, run, f"a killed worker in {stage} ends the run")
            else:
                end(run)
                self.expect(run.code in (0, -signal.SIGKILL), run, f"a kill in {stage} fails otherwise")
            self.finish(folder, f"a killed {victim} in {stage}")
        return not over

    def at_once(self, pause: float) -> None:
        """Two runs of the whole command, the second begun `pause` seconds after the first: both succeed."""
        with self.folder("tiles") as folder:
            runs = [self.server.start(self.words, folder)]
            time.sleep(pause)
            runs.append(self.server.start(self.words, folder))
            for run in runs:
                self.wait(run)
            for run in [run.ended() for run in runs]:
                self.expect(run.code == 0 and "Traceback" not in run.said, run, "of two at once one fails")
            self.check(folder, run, "two at once")

    @contextmanager
    def disk(self, how: str) -> Iterator[Path]:
        """A folder to run in of which out/ is a file system of its own, mounted so: `ro`, or `size=64k`. Needs root."""
        with self.folder("tiles") as folder:
            out = folder / "out"
            out.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", how, "kills", str(out)], check=True)
            try:
                yield folder
            finally:
                subprocess.run(["umount", "--lazy", str(out)], check=True)

    def starved(self, share: float) -> None:
        """A disk with room for so much of the cohort: told; and when it is made larger the command goes on."""
        size = sum(len(content) // 4096 + 1 for content in self.reference.values()) * 4096
        with self.disk(f"size={int(share * size)}") as folder:
            run = self.server.run(self.words, folder)
            told = run.code == 2 and any(words in run.said for words in TOLD) and "Traceback" not in run.said
            self.expect(told, run, f"a disk with room for {share:.0%} is not told")
            subprocess.run(["mount", "-o", "remount,size=1g", str(folder / "out")], check=True)
            self.finish(folder, f"a disk with room for {share:.0%}")

    def locked(self) -> None:
        """A target that is read-only: told; and when it can be written the command runs."""
        with self.disk("ro") as folder:
            run = self.server.run(self.words, folder)
            told = run.code == 2 and "Read-only file system" in run.said and "Traceback" not in run.said
            self.expect(told, run, "a read-only target is not told")
            subprocess.run(["mount", "-o", "remount,rw", str(folder / "out")], check=True)
            self.finish(folder, "a read-only target")

    def finish(self, folder: Path, how: str) -> None:
        """The command again, to its end."""
        run = self.server.start(self.words, folder)
        self.wait(run)
        run.ended()
        self.expect(run.code == 0 and "Traceback" not in run.said, run, f"the run after {how} fails")
        self.check(folder, run, how)
        verified = self.server.run(["data_prep.verify", "--store", "out"], folder)
        self.expect(verified.code == 0, verified, f"verify finds faults after {how}")

    def check(self, folder: Path, run: Run, how: str) -> None:
        found = contents(folder, CASE)
        lost, left = sorted(self.reference.keys() - found.keys()), sorted(found.keys() - self.reference.keys())
        self.expect(not lost and not left, run, f"after {how} it lacks {some(lost)} and leaves {some(left)}")
        differ = [path for path, content in found.items() if content != self.reference[path]]
        self.expect(not differ, run, f"after {how} it leaves other bytes in {some(differ)}")


def victims(place: str) -> Sequence[str]:
    return ("client",) if place == "alone" else VICTIMS


def main(
    kills: Annotated[int, typer.Option(help="Kills in each stage, in each place.")] = 20,
    places: Annotated[str, typer.Option(help=f"Where: of {','.join(PLACES)}.")] = "alone,scheduler",
    stages: Annotated[str, typer.Option(help=f"Which: of {','.join(STAGES)}.")] = ",".join(STAGES),
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
) -> None:
    """Kill prepare in each stage; exit code 1 where something is lost or left."""
    failed = 0
    with workplace() as (server, world, runs):
        for place in places.split(","):
            with StageTrials(server, world, runs, place) as trials:
                for stage in stages.split(","):
                    rng, start, made, faults = random.Random(f"{seed} {place} {stage}"), time.monotonic(), 0, []
                    while made < kills:
                        try:
                            made += trials.killed(stage, rng, victims(place)[made % len(victims(place))])
                        except AssertionError as fault:
                            made += 1
                            faults.append(str(fault))
                    failed += len(faults)
                    told = f"{made - len(faults)} of {made} kills leave the same bytes"
                    print(f"{place}, {stage}: {told} ({time.monotonic() - start:.0f} s)", flush=True)
                    for fault in faults:
                        print("  " + fault.replace("\n", "\n    "), flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    typer.run(main)
