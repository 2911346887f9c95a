"""Damaged files of every kind, given to what reads them: a result or a UserError, in little time and memory.

    python tests/fuzzing.py --minutes 30                    all kinds by turns, with seeds of their own
    python tests/fuzzing.py --only png --seed 3             40 mutations of one kind
    python tests/fuzzing.py --only png --seed 3 --number 17 one of them, with its traceback

Each kind (`fuzz_kinds`) makes a whole sample, of which one file at a time is damaged (`mutations`). It is read in a
child process with limits; one that dies or hangs is replaced. What fails is printed with the line that repeats it.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "MALLOC_ARENA_MAX"):
    os.environ[_name] = "1"  # threads take address space, which is limited here

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 8.0  # of the processor that one reading may take
WALL = 60.0  # seconds that it may take, in which it may wait for a busy machine
GROWTH = 1 << 30  # bytes by which a reading may grow


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        make: writes whole files into an empty folder.
        enter: reads them as the commands do, given the folder and another one to write to.
        files: patterns of the files that are damaged.
        own: the user writes them, and may ask for more memory than there is.
    """

    name: str
    make: Callable[[Path], object]
    enter: Callable[[Path, Path], object]
    files: tuple[str, ...] = ("*",)
    own: bool = False


@dataclass
class Failure:
    """kind, number and seed repeat it; how: what the mutation did; what: how it went wrong."""

    kind: str
    number: int
    seed: int
    how: str
    what: str
    detail: str = ""

    @property
    def again(self) -> str:
        return f"python tests/fuzzing.py --only {self.kind} --seed {self.seed} --number {self.number}"

    def __str__(self) -> str:
        return f"{self.kind} {self.number} ({self.how}): {self.what}\n    {self.again}\n{self.detail}"


@dataclass
class Found:
    """What the mutations of a kind led to: how many gave a result, how many a message, and what went wrong."""

    results: int = 0
    messages: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0


def fuzz(kind: Kind, seed: int, numbers: range, folder: Path) -> Found:
    """Read as many mutations of a kind, in children of this process."""
    found, begun, first = Found(), time.monotonic(), numbers.start
    place = folder / kind.name
    while first < numbers.stop:
        first = _child(kind, seed, range(first, numbers.stop), place, found)
        if found.failures and found.failures[-1].number < 0:  # not even the whole sample can be read
            break
    shutil.rmtree(place, ignore_errors=True)
    found.seconds = time.monotonic() - begun
    return found


def _child(kind: Kind, seed: int, numbers: range, folder: Path, found: Found) -> int:
    """Read mutations in one child until all are read or it ends; the first number that is not read."""
    receive, send = os.pipe()
    log = folder.with_suffix(".log")
    child = os.fork()
    if child == 0:
        os.close(receive)
        _become(log)
        status = 1
        try:
            _read_all(kind, seed, numbers, folder, os.fdopen(send, "w", buffering=1))
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(send)
    now, how = -1, "the whole sample"
    for told in _lines(receive, child):
        if told is None:
            os.kill(child, signal.SIGKILL)
            break
        entry = json.loads(told)
        if "failure" in entry:
            found.failures.append(Failure(**entry["failure"]))
        elif "begins" in entry:
            now, how = entry["begins"], entry["how"]
        else:
            found.results += entry["kind"] == "result"
            found.messages += entry["kind"] == "message"
            now += 1
            how = ""
    os.close(receive)
    _, status = os.waitpid(child, 0)
    if status:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        how_it_died = f"of {signal.Signals(number).name}" if number else f"with {os.waitstatus_to_exitcode(status)}"
        what = "it hangs" if number == signal.SIGKILL else f"the process ended {how_it_died}"
        detail = log.read_text(errors="replace")[-6000:] if log.exists() else ""
        found.failures.append(Failure(kind.name, now, seed, how, what, _in_product(detail)))
        return now + 1
    return numbers.stop


def _lines(pipe: int, child: int) -> Iterator[str | None]:
    """Lines as they come; None where the child takes too long over the next."""
    held = b""
    begun, used = time.monotonic(), _used(child)
    while True:
        ready, _, _ = select.select([pipe], [], [], 0.5)
        if ready:
            part = os.read(pipe, 1 << 16)
            if not part:
                return
            *lines, held = (held + part).split(b"\n")
            yield from (line.decode() for line in lines)
            begun, used = time.monotonic(), _used(child)
        elif _used(child) - used > SECONDS or time.monotonic() - begun > WALL:
            os.kill(child, signal.SIGUSR1)  # faulthandler writes where it is
            time.sleep(0.3)
            yield None
            return


def _used(child: int) -> float:
    """Seconds of the processor that a process has used."""
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


def _become(log: Path) -> None:
    """A child's own standard streams, and what it tells when it dies."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    gc.freeze()  # what is imported is no garbage
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)


def _read_all(kind: Kind, seed: int, numbers: range, folder: Path, told: Any) -> None:
    def tell(**entry: Any) -> None:
        told.write(json.dumps(entry) + "\n")

    for place in (folder, folder.with_suffix(".out")):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    try:
        whole = sample(kind, folder)
        outcome = _reading(kind, folder)
    except Exception as error:
        outcome = f"it cannot be made: {error}", _in_product(traceback.format_exc())
    if outcome != "result":
        outcome = outcome if isinstance(outcome, tuple) else (f"it is refused: {outcome}", "")
        tell(failure=asdict(Failure(kind.name, -1, seed, "the whole sample", *outcome)))
        return
    for number in numbers:
        path, how, data = mutation(kind, seed, number, whole)
        tell(begins=number, how=how)
        path.write_bytes(data)
        gc.collect()
        _limit_memory()
        outcome = _reading(kind, folder)
        if isinstance(outcome, str):
            tell(kind=outcome.partition(":")[0])
        else:
            tell(failure=asdict(Failure(kind.name, number, seed, how, *outcome)))
        path.write_bytes(whole[path])


def sample(kind: Kind, folder: Path) -> dict[Path, bytes]:
    """Make a whole sample; the files of it that are damaged, and what they hold."""
    kind.make(folder)
    found = {path for pattern in kind.files for path in folder.glob(pattern) if path.is_file()}
    return {path: path.read_bytes() for path in sorted(found)}


def mutation(kind: Kind, seed: int, number: int, whole: dict[Path, bytes]) -> tuple[Path, str, bytes]:
    """The file that a mutation damages, what it does, and its content then."""
    from mutations import damaged

    draw = random.Random(f"{kind.name} {seed} {number}")
    path = draw.choice(list(whole))
    how, data = damaged(path.name, whole[path], draw)
    return path, f"{path.name}: {how}"[:200], data


def _reading(kind: Kind, folder: Path) -> str | tuple[str, str]:
    """ "result", "message: ..." or what failed and where."""
    from ldm.errors import UserError

    out = folder.with_suffix(".out")
    try:
        kind.enter(folder, out)
        return "result"
    except UserError as error:
        cause: BaseException | None = error
        while cause is not None and not kind.own:
            if isinstance(cause, MemoryError) or "allocate" in str(cause).partition("\n")[0].lower():
                return f"it took more than {GROWTH >> 20} MiB", _in_product(traceback.format_exc())
            cause = cause.__cause__ or cause.__context__
        return f"message: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", _in_product(traceback.format_exc())
    finally:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()


def _in_product(text: str) -> str:
    """The lines of a traceback that stand in this repository, and the last."""
    lines = text.strip().splitlines()
    own = [line.strip() for line in lines if str(ROOT) in line or "/tests/" in line]
    return "\n".join(f"      {line.replace(str(ROOT), '')}" for line in [*own[-5:], *lines[-2:]])


def _limit_memory() -> None:
    """From now on this process may grow by GROWTH."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + GROWTH, resource.RLIM_INFINITY))


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code is 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python tests/fuzzing.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40, help="mutations of each kind")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on with further seeds for so long")
    parser.add_argument("--only", nargs="*", default=[], help="these kinds")
    parser.add_argument("--without", nargs="*", default=[], help="all kinds but these")
    parser.add_argument("--number", type=int, help="this mutation alone, with its traceback")
    parser.add_argument("--json", type=Path, help="write what was found there")
    options = parser.parse_args(argv)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from fuzz_kinds import KINDS

    chosen = set(options.only or [kind.name for kind in KINDS]) - set(options.without)
    kinds = [kind for kind in KINDS if kind.name in chosen]
    if unknown := {*options.only, *options.without} - {kind.name for kind in KINDS}:
        parser.error(f"unknown kinds {', '.join(unknown)}; there are {', '.join(kind.name for kind in KINDS)}")
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as folder:
        if options.number is not None:
            return _once(kinds[0], options.seed, options.number, Path(folder))
        return _all(kinds, options, Path(folder))


def _all(kinds: list[Kind], options: argparse.Namespace, folder: Path) -> int:
    until, seed, seen, everything = time.monotonic() + 60 * options.minutes, options.seed, Counter(), {}
    while True:
        for kind in kinds:
            found = everything[kind.name] = fuzz(kind, seed, range(options.count), folder)
            print(f"{kind.name:18} seed {seed}: {found.results} read, {found.messages} told, "
                  f"{len(found.failures)} failed, {found.seconds:.1f} s", flush=True)  # fmt: skip
            for failure in found.failures:
                fingerprint = (failure.kind, failure.what[:40], failure.detail[-200:])
                seen[fingerprint] += 1
                if seen[fingerprint] == 1:
                    print(failure, flush=True)
        seed += 1
        if time.monotonic() > until:
            break
    if options.json:
        options.json.write_text(json.dumps({name: asdict(found) for name, found in everything.items()}))
    return int(bool(seen))


def _once(kind: Kind, seed: int, number: int, folder: Path) -> int:
    from ldm.errors import UserError

    place, out = folder / kind.name, folder / f"{kind.name}.out"
    place.mkdir()
    out.mkdir()
    path, how, data = mutation(kind, seed, number, sample(kind, place))
    path.write_bytes(data)
    print(f"{how}\nit begins {data[:200]!r}")
    try:
        print("result:", kind.enter(place, out))
    except UserError as error:
        print("message:", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
