"""Whole slides: as the image that is made at once, by any number of processes, whatever was done before."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
import typer.main
from examples import tiny_model, tiny_student
from test_large_image import Stub, mixed
from test_large_image import grid as features
from torch import Tensor

from benchmarks.kills_world import SSL_MODEL
from conftest import ROOT
from ldm.cli import app
from ldm.cli.script import call
from ldm.commands import slide_making
from ldm.config import instantiate_from_config
from ldm.convert import load_model
from ldm.diffusion.choices import POINTWISE, STOCHASTIC
from ldm.diffusion.tiled import covered
from ldm.errors import UserError, run_command
from ldm.files import owned
from ldm.images.marks import read_mark
from ldm.images.slides import open_image
from ldm.model_folder import write_model_folder
from ldm.sampling.bands import Bands
from ldm.sampling.canvas import Canvas, decode_canvas, large_image
from ldm.sampling.glass import Glass
from ldm.sampling.guided import GuidedSolver
from ldm.sampling.ranks import joined
from ldm.sampling.sampler import Sampler, Windows
from ldm.sampling.shards import REACH, ShardDecoder
from ldm.sampling.stream import stream


def canvas_of(model=None, grid: Tensor | None = None, mode: str = "shifted", **settings) -> Canvas:
    """Of a model in pixels that costs next to nothing; its windows are 16 px."""
    settings = {"steps": 3, "progress": False, "batch_size": 1, **settings}
    grid = features(5, 4) if grid is None else grid
    return Canvas.of(model or Stub(mixed), grid, sampler=Sampler(**settings), windows=Windows(mode=mode))


def of_latents(grid: Tensor, model=None, **settings) -> Canvas:
    """Of a tiny model of latents, whose windows are 8 of them."""
    return canvas_of(model or tiny_model(), grid, **settings)


def random(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, 8, generator=torch.Generator().manual_seed(0))


def bands_of(canvas: Canvas, folder: Path, rows: int = 16) -> Bands:
    return Bands(folder, canvas.size, canvas.start, rows)


def streamed(canvas: Canvas, folder: Path, rows: int = 16, **settings) -> Tensor:
    """The canvas after its last step."""
    bands = bands_of(canvas, folder, rows)
    step = stream(canvas, bands, torch.device("cpu"), canvas.sampler.batch_size, progress=False, **settings)
    return bands.part(step, slice(0, canvas.size[0]))


def at_once(canvas: Canvas) -> Tensor:
    """The same as a canvas in memory."""
    solver = canvas.solver.over(lambda d: covered(d, canvas.covering, canvas.condition, canvas.sampler.batch_size))
    with torch.no_grad():
        x = canvas.start(0, canvas.size[0])
        return solver.solve(x, canvas.sigmas, canvas.led, canvas.noise, lambda *_: None)


@pytest.mark.parametrize("solver", POINTWISE[:-2])
def test_bands_are_the_canvas_bit_by_bit(tmp_path, solver):
    eta = {"eta": 0.5} if solver in STOCHASTIC else {}
    canvas = canvas_of(solver=solver, steps=4, guidance_interval="all", **eta)
    assert torch.equal(streamed(canvas, tmp_path), at_once(canvas))


@pytest.mark.parametrize("mode", ["shifted", "overlap"])
def test_bands_of_any_height_are_the_canvas_with_either_windows(tmp_path, mode):
    canvas = canvas_of(mode=mode)
    for rows in (7, 64):
        assert torch.equal(streamed(canvas, tmp_path / f"{rows}", rows), at_once(canvas))


def test_a_students_policies_are_followed_band_by_band(tmp_path):
    canvas = of_latents(random(3, 2), tiny_student(), steps=2)
    assert torch.equal(streamed(canvas, tmp_path), at_once(canvas))


def test_batches_change_rounding_alone_and_cores_nothing(tmp_path):
    canvas, cores = of_latents(random(3, 4), batch_size=3), torch.get_num_threads()
    one = streamed(canvas, tmp_path / "one")
    torch.testing.assert_close(one, at_once(canvas), rtol=0, atol=1e-4)
    try:
        torch.set_num_threads(3)
        assert torch.equal(streamed(canvas, tmp_path / "three"), one)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(cores)


def test_what_is_done_is_not_done_again_and_two_steps_are_kept(tmp_path):
    canvas, seen = canvas_of(batch_size=2), []
    condition = canvas.condition
    whole = streamed(canvas, tmp_path / "whole")
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["step-0003"]

    class Stopped(Exception):
        pass

    def watched(after: int) -> Callable:
        def told(corners):
            seen.append(len(corners))
            if len(seen) > after:
                raise Stopped
            return condition(corners)

        return told

    for after in (9, 20, 15, 22):
        seen.clear()
        object.__setattr__(canvas, "condition", watched(after))
        with pytest.raises(Stopped):
            streamed(canvas, tmp_path / "stopped")
        assert len([*(tmp_path / "stopped").glob("step-*")]) <= 2
    seen.clear()
    object.__setattr__(canvas, "condition", watched(10**6))
    assert torch.equal(streamed(canvas, tmp_path / "stopped"), whole)
    rest = len(seen)
    seen.clear()
    streamed(canvas, tmp_path / "again")
    assert 0 < rest < 0.8 * len(seen)


def test_windows_on_glass_are_not_evaluated_and_parts_of_it_not_decoded(tmp_path):
    grid = random(2, 8)
    grid[:, 3:] = torch.nan
    canvas, seen = of_latents(grid), []  # 16 x 64 latents
    glass, condition = Glass.of(canvas, None), canvas.condition
    object.__setattr__(canvas, "condition", lambda corners: (seen.extend(corners), condition(corners))[1])
    x = streamed(canvas, tmp_path, glass=glass.latent)
    assert seen
    assert not any(canvas.bare(seen))
    assert glass.cells(x[..., 32:]).all()  # no window that reaches there has a condition
    assert not glass.cells(x[..., :24]).any()
    object.__setattr__(canvas, "condition", condition)
    evaluated = streamed(canvas, tmp_path / "evaluated")
    assert torch.equal(x[..., :4], evaluated[..., :4])  # no window of glass has reached these
    decoder = ShardDecoder(canvas.model, bands_of(canvas, tmp_path), 3, glass=glass)
    there = decoder.pixels(slice(0, 32), slice(104, 128))
    assert (there == glass.colour).all()
    both = decoder.pixels(slice(0, 32), slice(0, 128))  # one part, decoded: no rim where the canvas ends
    assert (both[:, 2 * (32 + REACH) :] == glass.colour).all()
    plain = ShardDecoder(canvas.model, decoder.bands, 3).pixels(slice(0, 32), slice(0, 128))
    assert (both[:, : 2 * 24] == plain[:, : 2 * 24]).all()
    assert (both != plain).any()


def test_shards_are_decoded_as_the_canvas_is(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.sampling.canvas.DECODE_PART", 32)
    canvas = of_latents(random(5, 4), steps=1)
    x = streamed(canvas, tmp_path)
    whole = np.zeros((80, 64, 3), np.uint8)
    decode_canvas(canvas.model, x, progress=False, out=whole)
    decoder = ShardDecoder(canvas.model, bands_of(canvas, tmp_path), 1)
    parts = [decoder.pixels(slice(top, min(top + 32, 80)), slice(0, 64)) for top in (0, 32, 64)]
    assert np.abs(np.concatenate(parts).astype(int) - whole).max() <= 1


def test_a_layout_says_which_condition_is_where(tmp_path):
    layout = np.array([[0, 0, 1, 1, -1, -1, -1]])
    given = Sampler(steps=2, guidance_scale=1.0, progress=False)
    canvas = Canvas.of_layout(tiny_model(), layout, {"class": ["A", "B"]}, sampler=given)  # 8 x 56 latents
    corners = [(0, 0), (0, 11), (0, 12), (0, 27), (0, 28), (0, 48)]
    assert canvas.bare(corners) == [False] * 4 + [True] * 2
    told = canvas.condition(corners[:4])
    for label, rows in (("A", (0, 1)), ("B", (2, 3))):
        for part, value in canvas.model.condition(class_=label).items():
            assert all(torch.equal(told[part][row], value[0]) for row in rows)
    glass = Glass.of(canvas, None)
    x = streamed(canvas, tmp_path, glass=glass.latent)
    assert glass.cells(x[..., 36:]).all()
    assert not glass.cells(x[..., :32]).any()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model, another one, a grid, and one with a hole."""
    folder = tmp_path_factory.mktemp("world")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = instantiate_from_config(SSL_MODEL)
        about = {"tile_size": 16, "mpp": 0.5}
        write_model_folder(folder / f"model{seed}", SSL_MODEL, model.state_dict(), about)
    grid = np.random.default_rng(0).normal(size=(8, 6, 6)).astype(np.float32)
    np.save(folder / "grid.npy", grid)
    grid[4:, 3:] = np.nan
    np.save(folder / "holed.npy", grid)
    return folder


def small_shards(patch: pytest.MonkeyPatch) -> None:
    """Tiles and shards so small that little images have several."""
    for name in ("images.pyramid", "images.slide_tiff", "images.write", "commands.slide_making"):
        patch.setattr(f"ldm.{name}.TILE", 32)
    patch.setattr("ldm.commands.slide_making.SHARD", 64)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiles and shards so small that little images have several."""
    small_shards(monkeypatch)


def words(world: Path, out: Path, *more: object, model: str = "model0", grid: str = "holed") -> list[str]:
    given = ["slide", "--model", world / model, "--features", world / f"{grid}.npy", "--steps", 2, "--out", out, *more]
    return [str(word) for word in given]


def run(*given: str) -> int:
    return run_command(lambda: call(typer.main.get_command(app), "histoldm", given))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory) -> Path:
    """A slide by one process."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        assert run(*words(world, folder / "a.ome.zarr", "--out", folder / "a.tif", "--seed", 3)) == 0
    return folder


def test_a_slide_is_what_a_large_image_is(world, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # one shard
    options = ["--batch-size", 1, "--out", tmp_path / "a.tif"]
    assert run(*words(world, tmp_path / "a.ome.zarr", *options, grid="grid")) == 0
    assert "wrote" in capsys.readouterr().out
    slide = open_image(tmp_path / "a.ome.zarr")
    assert slide.dimensions == (96, 128)
    model = load_model(world / "model0", "cpu")
    sampler = Sampler(steps=2, batch_size=1, progress=False)
    image = large_image(model, np.load(world / "grid.npy"), sampler=sampler)
    image = image.add(1).mul(127.5).round()[0].movedim(0, -1).to(torch.uint8).numpy()
    assert np.abs(slide.read(0, 0, 96, 128).astype(int) - image).max() <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ome.zarr", "a.overview.png", "a.tif"]


def test_the_tiff_is_a_slide_to_openslide(reference):
    slide = openslide.OpenSlide(str(reference / "a.tif"))
    assert slide.level_dimensions == ((96, 128), (48, 64), (24, 32))
    assert slide.properties["openslide.vendor"] == "aperio"
    assert slide.properties["openslide.objective-power"] == "20"
    assert float(slide.properties["openslide.mpp-x"]) == 0.5
    assert set(slide.associated_images) == {"label", "macro", "thumbnail"}
    assert slide.color_profile is not None
    held = open_image(reference / "a.ome.zarr")
    for level, factor in ((0, 1), (1, 2), (2, 4)):
        width, height = slide.level_dimensions[level]
        ours = held.read(0, 0, 96, 128, (width, height)).astype(int)
        theirs = np.asarray(slide.read_region((0, 0), level, (width, height)).convert("RGB"))
        assert np.abs(ours - theirs).mean() < 8, factor
    for out in ("a.tif", "a.ome.zarr", "a.overview.png"):
        assert read_mark(reference / out, whole=True)["seed"] == 3


def test_what_is_computed_is_computed_on_one_thread_each(world, tmp_path, monkeypatch):
    """Rounding depends on the number of threads, and torchrun gives each process one where a process alone has all."""
    seen = {}

    def watched(owner: type, name: str) -> None:
        inner = getattr(owner, name)

        def call(*given, **more):
            seen.setdefault(name, set()).add(torch.get_num_threads())
            return inner(*given, **more)

        monkeypatch.setattr(owner, name, call)

    watched(ShardDecoder, "pixels")
    watched(Glass, "of")
    watched(GuidedSolver, "lead")
    cores = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert run(*words(world, tmp_path / "a.ome.zarr")) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(cores)
    assert seen == {"pixels": {1}, "of": {1}, "lead": {1}}


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


def as_rank(rank: int, size: int, port: int, log: Path, task: Callable[[], int]) -> None:
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}", "TQDM_DISABLE": "1"}
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (open(stream, "w", 1, closefd=False) for stream in (1, 2))
        torch.set_num_threads(1)
        code = 1
        try:
            code = task()
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdout.flush()
            os._exit(code)


def ranks(folder: Path, *tasks: Callable[[], int]) -> list[tuple[int, str]]:
    """Exit code and output of each of the processes that work together."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    folder.mkdir(exist_ok=True)
    logs = [folder / f"{rank}.log" for rank in range(len(tasks))]
    started = [
        fork.Process(target=as_rank, args=(rank, len(tasks), port, logs[rank], task)) for rank, task in enumerate(tasks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    return [(process.exitcode, log.read_text()) for process, log in zip(started, logs)]


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_makes_the_same_bytes(world, reference, tmp_path, size):
    out = tmp_path / "out"
    given = words(world, out / "a.ome.zarr", "--out", out / "a.tif", "--seed", 3)
    done = ranks(tmp_path / "logs", *[lambda: run(*given)] * size)
    assert [code for code, _ in done] == [0] * size, done
    assert files(out) == files(reference)
    assert "wrote" in done[0][1]
    assert not any(said for _, said in done[1:])


def test_two_processes_are_killed_and_one_goes_on(world, reference, tmp_path):
    out = tmp_path / "out"
    given = words(world, out / "a.ome.zarr", "--out", out / "a.tif", "--seed", 3)

    def killed(writes: int) -> Callable[[], int]:
        def task() -> int:
            done, write = [], Bands.write

            def counted(*args) -> None:
                write(*args)
                done.append(1)
                if len(done) == writes:
                    os.kill(os.getpid(), signal.SIGKILL)

            Bands.write = counted
            return run(*given)

        return task

    (first, _), (second, _) = ranks(tmp_path / "logs", killed(2), killed(1))
    assert -signal.SIGKILL in (first, second)
    left = [path.name for path in out.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".slide-")
    assert run(*given) == 0
    assert files(out) == files(reference)


@pytest.mark.slow
def test_torchrun_starts_it(world, tmp_path):
    given = words(world, tmp_path / "a.tif")
    script = Path(sys.executable).with_name("torchrun")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [script, "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "ldm.cli", *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert open_image(tmp_path / "a.tif").dimensions == (96, 128)


def test_processes_that_see_other_models_or_fail_end_with_one_message(world, tmp_path):
    out = tmp_path / "a.tif"
    tasks = [lambda name=name: run(*words(world, out, model=name)) for name in ("model0", "model1")]
    (first, said), (second, silent) = ranks(tmp_path / "models", *tasks)
    assert (first, second, silent) == (2, 2, "")
    assert said.startswith("error: the 2 processes see different weights of the model: process 0 has ")
    bad = lambda: run(*words(world, out, "--solver", "heun"))  # noqa: E731
    (first, said), (second, silent) = ranks(tmp_path / "bad", bad, bad)
    assert (first, second, silent) == (2, 2, "")
    assert said.count("error:") == 1

    def fails_second() -> int:
        def work() -> None:
            with joined() as own, own.together():
                if own.rank == 1:
                    raise UserError("no room left")

        return run_command(work)

    (first, silent), (second, said) = ranks(tmp_path / "one", fails_second, fails_second)
    assert (first, silent, second, said) == (2, "", 2, "error: no room left\n")

    def killed() -> int:
        def work() -> None:
            with joined() as own, own.together():
                if own.rank == 1:
                    os._exit(9)

        return run_command(work)

    (first, said), (second, _) = ranks(tmp_path / "killed", killed, killed)
    assert (first, second) == (2, 9)
    assert said.startswith("error: another of the 2 processes has ended; what is done is kept")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--solver", "heun"), "the solver 'heun' does not allow.*take one of dpmpp_2m, unipc, euler"),
        (("--size", "64,64"), "grid of 8 rows and 6 columns does not match 64 x 64 px.*side by side are 96 x 128 px"),
        (("--layout", "a.csv"), "made from --features or from a --layout; give one of them"),
        (("--size", "8,8"), "the size must be at least one tile of 16 px"),
        (("--offload",), "leave --offload out"),
        (("--compile",), "no network is compiled; leave it out"),
        (("--mpp", "0.5", "--out", "b.png"), "a slide is written as .ome.zarr, .tif, .tiff; got b.png"),
        (("--out", "elsewhere/a.tif"), "different names, in one folder"),
    ],
)
def test_what_cannot_be_is_one_message_before_any_work(world, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert run(*words(world, Path("a.ome.zarr"), *options)) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not [*tmp_path.iterdir()]


def test_too_little_disk_is_told_before_work(tmp_path):
    told = r"a.tif needs up to 1,000,000,000 MB of disk while it is made, and .* are free"
    with pytest.raises(UserError, match=told):
        slide_making.check_room(tmp_path / ".slide", 10**15, "a.tif")


def test_another_slide_in_its_place_is_told_and_a_second_run_waits_its_turn(world, reference, tmp_path, capsys):
    out = tmp_path / "a.tif"
    with owned(slide_making.scratch_of([out]), of=out):
        assert run(*words(world, out)) == 2
    assert f"{out} is being written by process" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
    scratch = slide_making.scratch_of([out])
    scratch.mkdir()
    (scratch / "made.json").write_text('{"seed": 7}')
    assert run(*words(world, out)) == 2
    assert "holds an unfinished slide that is made otherwise (SYNTHETIC, " in capsys.readouterr().err
    assert run(*words(world, reference / "a.ome.zarr", "--seed", 4)) == 2
    assert "a.ome.zarr is there and was made otherwise (seed)" in capsys.readouterr().err
    assert run(*words(world, reference / "a.ome.zarr", "--seed", 3)) == 0
    assert "is there already" in capsys.readouterr().out


def test_a_tiff_is_made_of_an_ome_zarr_that_is_there(world, reference, tmp_path, capsys):
    shutil.copytree(reference / "a.ome.zarr", tmp_path / "a.ome.zarr")
    assert run(*words(world, tmp_path / "a.ome.zarr", "--out", tmp_path / "a.tif", "--seed", 3)) == 0
    assert "steps" not in capsys.readouterr().err
    assert files(tmp_path) == files(reference)
