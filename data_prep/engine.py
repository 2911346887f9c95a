"""Runs tasks, each a slide and a stage: in this process, or by Dask in processes of this machine or of a cluster.

    Task(slide, stage, call, arguments, needs) -> Outcome(slide, stage, state, seconds, facts, notes)

A task that fails stops what needs it and nothing else. Which worker runs a task changes nothing in what it writes.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, nearest, note, notes_kept
from ldm.locks import Held

if TYPE_CHECKING:
    from distributed import Client
    from distributed.deploy.cluster import Cluster

DONE, KEPT, FAILED, LEFT_OUT, BUSY = "done", "done before", "failed", "left out", "busy"
AHEAD = "fetch"  # the stage that runs while the slide before is worked on
IN_FLIGHT = 1000  # slides that a scheduler knows of at once
QUIET = {"TQDM_DISABLE": "1", "DASK_LOGGING__DISTRIBUTED": "error"}  # of worker processes: the client tells
INSTALL = "pip install 'histoldm[cluster]'"
_SLURM = (
    "jobs", "gpus", "partition", "queue", "account", "cores", "processes", "memory", "walltime", "local_directory",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is to be done with a slide.

    Attributes:
        call: a function of a module, called with `arguments`; it returns facts, in which `state` may say KEPT.
        needs: stages of the same slide that must have succeeded.
        gpu: whether it runs on a worker with a GPU, where there is one.
    """

    slide: str
    stage: str
    call: Callable[..., dict[str, Any]]
    arguments: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    gpu: bool = False


@dataclass(slots=True)
class Outcome:
    """What became of a task. state: DONE, KEPT, FAILED, LEFT_OUT or BUSY."""

    slide: str
    stage: str
    state: str
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reason: str = ""
    trace: str = ""


def attempt(task: Task, *before: Outcome) -> Outcome:
    """Run a task whose needs have ended; whatever goes wrong becomes its outcome.

    >>> attempt(Task("a.svs", "tiles", dict, {"tiles": 3})).facts
    {'tiles': 3}
    """
    for need in before:
        if need.state not in (DONE, KEPT):
            return Outcome(task.slide, task.stage, BUSY if need.state == BUSY else LEFT_OUT)
    started, outcome = time.monotonic(), Outcome(task.slide, task.stage, DONE)
    with notes_kept() as notes:
        try:
            outcome.facts = dict(task.call(**task.arguments))
            outcome.state = outcome.facts.pop("state", DONE)
        except Held as error:  # another run is at work on it
            outcome.state, outcome.reason = BUSY, str(error)
        except UserError as error:
            outcome.state, outcome.reason = FAILED, str(error)
        except Exception as error:  # a fault of one slide must not end the work on ten thousand
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            outcome.state, outcome.reason = FAILED, f"{type(error).__name__}: {reason}"
            outcome.trace = traceback.format_exc()
    outcome.seconds, outcome.notes = time.monotonic() - started, list(dict.fromkeys(notes))
    return outcome


def run_here(tasks: Sequence[Task]) -> Iterator[Outcome]:
    """Outcomes of the tasks in their order, in this process; what is AHEAD of a slide runs beside the slide before.

    >>> tasks = [Task("a.svs", "tiles", dict, {}), Task("a.svs", "features", dict, {"dim": 8}, needs=("tiles",))]
    >>> [(each.stage, each.state) for each in run_here(tasks)]
    [('tiles', 'done'), ('features', 'done')]
    """
    ended: dict[tuple[str, str], Outcome] = {}
    ahead = iter([task for task in tasks if task.stage == AHEAD])
    begun: dict[str, Future[Outcome]] = {}
    with ThreadPoolExecutor(1) as pool:

        def begin_next() -> None:
            if (task := next(ahead, None)) is not None:
                begun[task.slide] = pool.submit(attempt, task)

        begin_next()
        for task in tasks:
            if task.stage == AHEAD:
                outcome = begun.pop(task.slide).result()
                begin_next()
            else:
                outcome = attempt(task, *(ended[task.slide, need] for need in task.needs))
            ended[task.slide, task.stage] = outcome
            yield outcome


def run_by(client: Client, tasks: Sequence[Task]) -> Iterator[Outcome]:
    """Outcomes of the tasks as they end, by the workers of a Dask client. Earlier slides go first.

    The scheduler knows of IN_FLIGHT slides at once, so that its memory does not grow with the cohort.
    """
    from distributed import as_completed

    held = _resources(client)
    has, window = {name for resources in held for name in resources}, 2 * len(held)
    of_slide: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        of_slide[task.slide].append(task)
    slides, futures = list(of_slide), dict[tuple[int, str], Any]()
    ended, left = as_completed(loop=client.loop), dict[int, int]()
    coming = iter(range(len(slides)))

    def begin(i: int) -> None:
        left[i] = len(of_slide[slides[i]])
        for task in of_slide[slides[i]]:
            needs = [futures[i, need] for need in task.needs]
            if task.stage == AHEAD and (before := futures.get((i - window, "tiles"))) is not None:
                needs.append(before)  # no more copies than a few slides ahead
            kind = "FETCH" if task.stage == AHEAD else "GPU" if task.gpu and "GPU" in has else "WORK"
            futures[i, task.stage] = client.submit(
                _after if task.stage == AHEAD else attempt, task, *needs, key=f"{task.stage}-{i}-{id(tasks)}",
                resources={kind: 1} if kind in has else None, priority=-i, pure=False,
            )  # fmt: skip
            ended.add(futures[i, task.stage])

    for i in islice(coming, IN_FLIGHT):
        begin(i)
    for future in ended:
        stage, number, _ = future.key.rsplit("-", 2)
        i = int(number)
        if future.status == "finished":
            yield future.result()
        else:
            error = future.exception()
            lost = "its worker died each time that it was tried; is the memory enough?"
            killed = type(error).__name__ == "KilledWorker"
            yield Outcome(slides[i], stage, FAILED, reason=lost if killed else f"{type(error).__name__}: {error}")
        left[i] -= 1
        if not left[i]:
            for task in of_slide[slides[i]]:
                del futures[i, task.stage]
            for after in islice(coming, 1):
                begin(after)


def _resources(client: Client) -> list[dict[str, float]]:
    """The resources of each worker, when there is one: jobs of a cluster may wait for long until they start."""
    if not client.scheduler_info(n_workers=-1)["workers"]:
        note("no worker has started yet; waiting for the first one")
        client.wait_for_workers(1)
    return [info.get("resources", {}) for info in client.scheduler_info(n_workers=-1)["workers"].values()]


def _after(task: Task, *_: Outcome) -> Outcome:
    """As `attempt`, whatever became of what it waited for."""
    return attempt(task)


# --- Dask -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def dask_client(
    workers: int | None = None, scheduler: str | None = None, slurm: str | None = None
) -> Iterator[Client | None]:
    """A client of the workers that are asked for, closed at the end; None where none are.

    Args:
        workers: processes on this machine; the first ones have a GPU each, as far as there are GPUs.
        scheduler: address (tcp://host:port) or scheduler file of a Dask cluster that runs already.
        slurm: jobs of SLURM, see `slurm_settings`.
    Raises:
        UserError: several of them, Dask is not installed, no scheduler there.
    """
    places = {"--workers": workers, "--scheduler": scheduler, "--slurm": slurm}
    given = [name for name, value in places.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each say where the work runs; give one of them")
    if not given:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise UserError(f"{given[0]} needs Dask: {INSTALL}") from None
    with contextlib.ExitStack() as stack:
        if scheduler:
            client = stack.enter_context(_connected(scheduler))
        else:
            cluster = stack.enter_context(_slurm_cluster(slurm) if slurm else _local_cluster(int(workers or 1)))
            client = stack.enter_context(Client(cluster))
        yield client


def _connected(scheduler: str) -> Client:
    from distributed import Client

    by_file = "://" not in scheduler
    if by_file and not os.path.isfile(scheduler):
        raise UserError(f"--scheduler is an address, as tcp://host:8786, or a scheduler file; there is no {scheduler}")
    try:
        client = Client(scheduler_file=scheduler, timeout=20) if by_file else Client(scheduler, timeout=20)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        told = f"no Dask scheduler answers at {scheduler} ({reason}); start one with `dask scheduler`"
        raise UserError(told) from None
    return client


def _local_cluster(workers: int) -> Cluster:
    """Worker processes of one thread of arithmetic each, so that their number changes no result."""
    import dask
    import torch
    from distributed import Nanny, Scheduler, SpecCluster

    dask.config.set({f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in QUIET.items()})
    gpus, spec = torch.cuda.device_count(), {}
    for i in range(max(workers, 1)):
        env = {"CUDA_VISIBLE_DEVICES": str(i)} if i < gpus else {}
        resources = {"WORK": 1, "FETCH": 1} | ({"GPU": 1} if i < gpus else {})
        options = {"nthreads": 2 + (i < gpus), "resources": resources, "env": env, "memory_limit": None}
        spec[i] = {"cls": Nanny, "options": options}
    options = {"dashboard": has_dashboard(), "dashboard_address": ":0"}
    return SpecCluster(workers=spec, scheduler={"cls": Scheduler, "options": options}, silence_logs="error")


def has_dashboard() -> bool:
    """Whether Dask can show its page of what the workers do.

    >>> has_dashboard() in (True, False)
    True
    """
    try:
        import bokeh  # noqa: F401
    except ImportError:
        return False
    return True


def slurm_settings(text: str) -> tuple[int, dict[str, Any]]:
    """The number of jobs, and the arguments of `dask_jobqueue.SLURMCluster`, of an option --slurm.

    text: name=value, separated by commas: jobs, gpus (of each job), partition, account, cores, processes, memory,
    walltime, local_directory. Each worker has a GPU where `gpus` is given.

    >>> slurm_settings("jobs=8,partition=gpu,cores=4,memory=16GB,walltime=04:00:00,gpus=1")[0]
    8
    """
    own: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in _SLURM:
            raise UserError(f"--slurm '{part.strip()}' is not known{nearest(name, _SLURM)} Known: {', '.join(_SLURM)}.")
        own[name] = value.strip()
    for name in ("jobs", "gpus", "cores", "processes"):
        if name in own and not own[name].isdecimal():
            raise UserError(f"--slurm {name} is a whole number; got '{own[name]}'")
    jobs, gpus = int(own.pop("jobs", 1)), int(own.pop("gpus", 0))
    settings: dict[str, Any] = {"cores": int(own.pop("cores", 4)), "memory": own.pop("memory", "16GB")}
    settings["processes"] = int(own.pop("processes", max(gpus, 1)))
    settings["queue"] = own.pop("partition", own.pop("queue", None))
    resources = "WORK=1 FETCH=1" + (" GPU=1" if gpus else "")
    settings["worker_extra_args"] = ["--resources", f'"{resources}"', "--nthreads", "3" if gpus else "2"]
    settings["job_script_prologue"] = [f"export {name}={value}" for name, value in QUIET.items()]
    settings["job_extra_directives"] = [f"--gres=gpu:{gpus}"] if gpus else []
    return jobs, {**settings, **own}


def _slurm_cluster(text: str) -> Cluster:
    jobs, settings = slurm_settings(text)
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise UserError(f"--slurm needs dask-jobqueue: {INSTALL}") from None
    cluster = SLURMCluster(**settings)
    cluster.scale(jobs=jobs)
    return cluster
