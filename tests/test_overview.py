"""Agreement with an overview: exact on pixels, at any place, by any windows, bands and processes; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import tiny_model, tiny_student
from PIL import Image
from test_large_image import Stub, mixed
from test_large_image import grid as features
from test_slide_engine import _small, bands_of, files, random, ranks, run, words, world  # noqa: F401
from torch import Tensor

from ldm.diffusion.choices import POINTWISE, STOCHASTIC
from ldm.diffusion.overview import Blocks, Overview, Reading
from ldm.diffusion.tiled import covered
from ldm.errors import UserError
from ldm.images.marks import read_mark
from ldm.sampling.bands import Bands
from ldm.sampling.canvas import Canvas, large_image
from ldm.sampling.glass import Glass
from ldm.sampling.overviews import reading_of
from ldm.sampling.sampler import Sampler, Windows
from ldm.sampling.stream import stream


def low(rows: int, cols: int, seed: int = 0) -> Tensor:
    """An overview of values that a model in pixels can have."""
    return torch.rand(3, rows, cols, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.6


def canvas_of(overview: Tensor, grid: Tensor | None = None, model=None, strength: float = 1.0, **settings) -> Canvas:
    settings = {"steps": 3, "progress": False, "batch_size": 1, **settings}
    grid = features(5, 4) if grid is None else grid
    windows = Windows(overview_strength=strength)
    return Canvas.of(model or Stub(mixed), grid, sampler=Sampler(**settings), windows=windows, overview=overview)


def at_once(canvas: Canvas) -> Tensor:
    solver = canvas.solver.over(lambda d: covered(d, canvas.covering, canvas.condition, canvas.sampler.batch_size))
    solver = solver.shifted(canvas.overview.by(reading_of(canvas)).shift)
    with torch.no_grad():
        x = canvas.start(0, canvas.size[0])
        return solver.solve(x, canvas.sigmas, canvas.led, canvas.noise, lambda *_: None)


def streamed(canvas: Canvas, folder: Path, rows: int = 16, **settings) -> Tensor:
    bands, told = bands_of(canvas, folder, rows), canvas.overview.by(reading_of(canvas))
    step = stream(canvas, bands, torch.device("cpu"), 1, overview=told, progress=False, **settings)
    return bands.part(step, slice(0, canvas.size[0]))


def block_means(x: Tensor, told: Overview) -> Tensor:
    return told.cols.means(told.rows.means(x, 2), 3)[0]


@pytest.mark.parametrize("size", [7, 12, 100, 1000])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_what_is_spread_keeps_means_and_has_no_steps(size, count):
    blocks = Blocks(size, count)
    assert blocks.lengths.sum() == size
    assert blocks.lengths.max() - blocks.lengths.min() <= 1
    values = torch.randn(2, count, generator=torch.Generator().manual_seed(0))
    spread = blocks.spread(values, 1)
    torch.testing.assert_close(blocks.means(spread, 1), values, rtol=0, atol=1e-4)
    torch.testing.assert_close(blocks.spread(torch.ones(count), 0), torch.ones(size))
    if size == 1000:  # 7 blocks: over a step of a border it moves no more than within blocks
        moves = spread.diff(dim=1).abs()
        border = moves[:, blocks.edges[1:-1] - 1]
        assert count == 1 or border.max() < 1.01 * moves.max() < 0.2


def test_a_part_is_spread_as_the_whole_bit_by_bit():
    blocks, values = Blocks(50, 9), torch.randn(1, 1, 50, 3, generator=torch.Generator().manual_seed(0))
    whole = blocks.spread(blocks.means(values, 2), 2)
    for start, stop in ((0, 7), (7, 20), (20, 23), (23, 50)):
        first, last = blocks.reach(start, stop)
        part = blocks.spread(blocks.means(values[:, :, first:last], 2, first), 2, first)
        assert torch.equal(part[:, :, start - first : stop - first], whole[:, :, start:stop])


@pytest.mark.parametrize(("rows", "cols"), [(20, 16), (40, 32), (13, 10), (3, 3), (80, 64)])
def test_of_pixels_block_means_are_the_overview(rows, cols):
    """80 x 64 px under windows of 16: integer and other factors, down to one that pixels do not hold."""
    canvas = canvas_of(low(rows, cols), guidance_scale=1.0)
    made, told = at_once(canvas), canvas.overview
    torch.testing.assert_close(block_means(made, told), told.colours, rtol=0, atol=1e-5)
    if rows in (20, 40):
        torch.testing.assert_close(told.colours, low(rows, cols), rtol=0, atol=1e-6)
    free = at_once(canvas_of(low(rows, cols), strength=0.0, guidance_scale=1.0))
    assert (block_means(free, told) - told.colours).abs().mean() > 0.1


@pytest.mark.parametrize("solver", POINTWISE[:-2])
def test_bands_are_the_canvas_bit_by_bit(tmp_path, solver):
    eta = {"eta": 0.5} if solver in STOCHASTIC else {}
    canvas = canvas_of(low(11, 9), solver=solver, guidance_interval="all", **eta)
    whole = at_once(canvas)
    for rows in (7, 16, 64):
        assert torch.equal(streamed(canvas, tmp_path / f"{rows}", rows), whole)


@pytest.mark.slow
@pytest.mark.parametrize("student", [False, True])
def test_bands_of_latents_and_of_policies_too(tmp_path, student):
    canvas = canvas_of(low(12, 8), random(3, 2), tiny_student() if student else tiny_model(), steps=2)
    whole = at_once(canvas)
    assert torch.equal(streamed(canvas, tmp_path), whole)
    told, free = canvas.overview.by(reading_of(canvas)), replace(canvas.overview, strength=0.0)
    without = at_once(replace(canvas, overview=free))
    assert told.lack(whole).abs().mean() < 0.97 * told.lack(without).abs().mean()  # of a decoder that learnt nothing
    torch.testing.assert_close(
        without, at_once(replace(canvas, overview=replace(free, colours=-free.colours))), rtol=0, atol=0
    )


@pytest.mark.slow
def test_batches_change_rounding_alone():
    made = [at_once(canvas_of(low(12, 8), random(3, 2), tiny_model(), batch_size=size)) for size in (1, 5)]
    torch.testing.assert_close(*made, rtol=0, atol=1e-4)


def test_a_reading_fades_where_x_tells_more_than_it_does():
    latents = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([[0.3, 0, 0, 0.1], [0, 0.3, 0, 0], [0, 0.2, 0.3, 0]])
    colours = latents @ weight.T + 0.1 + 0.02 * torch.randn(400, 3, generator=torch.Generator().manual_seed(1))
    reading = Reading.fitted(latents, colours)
    torch.testing.assert_close(reading.weight, weight, rtol=0, atol=0.01)
    torch.testing.assert_close(reading.error.diagonal().sqrt(), torch.full((3,), 0.02), rtol=0.2, atol=0)
    shares = [(reading.weight @ reading.gain(sigma, 4)).trace() / 3 for sigma in (100.0, 1.0, 0.1, 0.01)]
    assert 0.98 < shares[0] <= 1
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.05
    torch.testing.assert_close(Reading.plain().gain(0.01, 4), torch.eye(3), rtol=0, atol=1e-6)


def test_glass_stays_glass(tmp_path):
    grid = random(2, 8)
    grid[:, 3:] = torch.nan
    canvas = canvas_of(low(8, 32), grid, tiny_model(), steps=2)                 # 16 x 64 latents, blocks of 2
    assert canvas.overview.followed[:, :8].all()
    assert not canvas.overview.followed[:, 16:].any()
    glass = Glass.of(canvas, None)
    x = streamed(canvas, tmp_path, glass=glass.latent)
    assert glass.cells(x[..., 32:]).all()
    assert not glass.cells(x[..., :16]).any()


def test_what_no_overview_is():
    for bad, word in (
        (torch.zeros(3, 10, 10), r"the canvas is 64 x 80 px, the overview 10 x 10 px"),
        (torch.zeros(3, 160, 128), r"no larger; the canvas is 64 x 80 px, the overview 128 x 160 px"),
        (torch.zeros(1, 10, 8), r"shape \(1, 1, 10, 8\)"),
        (torch.full((3, 10, 8), 200.0), r"in \[-1, 1\]; got 200"),
    ):
        with pytest.raises(UserError, match=word):
            canvas_of(bad)
    with pytest.raises(UserError, match=r"overview_strength must be a number in 0\.\.1; got 2"):
        Windows(overview_strength=2.0)
    image = large_image(Stub(mixed), features(5, 4), sampler=Sampler(steps=2, progress=False), overview=low(10, 8))
    assert image.shape == (1, 3, 80, 64)


# --- the commands -----------------------------------------------------------------------------------------------------


def overview_file(path: Path, seed: int = 0) -> Path:
    """Of the 96 x 128 px of `world`'s grids."""
    pixels = np.random.default_rng(seed).integers(40, 250, (16, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.slow
def test_a_slide_follows_what_it_began_with(world, tmp_path, capsys):  # noqa: F811
    given = ["--overview", overview_file(tmp_path / "low.png")]
    out = tmp_path / "a.tif"
    assert run(*words(world, tmp_path / "free.tif")) == 0
    assert run(*words(world, out, *given)) == 0
    assert read_mark(out)["overview_sha256"]
    assert "overview_sha256" not in read_mark(tmp_path / "free.tif")
    assert out.read_bytes() != (tmp_path / "free.tif").read_bytes()
    capsys.readouterr()
    other = ["--overview", overview_file(tmp_path / "other.png", seed=1)]
    assert run(*words(world, out, *other)) != 0
    assert "was made otherwise (overview_sha256)" in capsys.readouterr().err
    assert run(*words(world, out, *given, "--overview-strength", 0.5)) != 0
    assert "was made otherwise (overview_strength)" in capsys.readouterr().err
    assert run(*words(world, tmp_path / "b.tif", "--overview-strength", 0.5)) != 0
    assert "--overview-strength goes with an --overview" in capsys.readouterr().err
    Image.new("RGB", (12, 12)).save(tmp_path / "square.png")
    assert run(*words(world, tmp_path / "b.tif", "--overview", tmp_path / "square.png")) != 0
    assert "the canvas is 96 x 128 px, the overview 12 x 12 px" in capsys.readouterr().err


@pytest.mark.slow
def test_a_large_image_is_the_slide_and_says_what_it_followed(world, tmp_path):  # noqa: F811
    given = ["--overview", str(overview_file(tmp_path / "low.png")), "--batch-size", "1"]
    slide = words(world, tmp_path / "a.ome.zarr", *given, grid="grid")
    assert run(*slide) == 0
    out = str(tmp_path / "b.ome.zarr")
    assert run("large-image", *slide[1 : slide.index("--out")], "--out", out, *given) == 0
    one, two = (json.loads((tmp_path / name / "zarr.json").read_text())["attributes"] for name in ("a.ome.zarr", out))
    assert one["histoldm"]["overview_sha256"] == two["histoldm"]["overview_sha256"]


@pytest.mark.slow
def test_processes_and_a_kill_leave_the_same_bytes(world, tmp_path, monkeypatch):  # noqa: F811
    told = ["--overview", overview_file(tmp_path / "low.png")]

    def asked(folder: str) -> list[str]:
        return words(world, tmp_path / folder / "a.tif", *told)

    assert run(*asked("one")) == 0
    done = ranks(tmp_path / "logs", *[lambda: run(*asked("two"))] * 2)
    assert [code for code, _ in done] == [0, 0], done
    assert files(tmp_path / "two") == files(tmp_path / "one")

    class Stopped(Exception):
        pass

    write, count = Bands.write, []

    def stops(*given) -> None:
        write(*given)
        count.append(1)
        if len(count) == 1:
            raise Stopped

    monkeypatch.setattr(Bands, "write", stops)
    with pytest.raises(Stopped):
        run(*asked("stopped"))
    monkeypatch.setattr(Bands, "write", write)
    (scratch,) = (tmp_path / "stopped").iterdir()
    assert (scratch / "reading.npz").exists()
    monkeypatch.setattr("ldm.commands.slide.reading_of", lambda canvas: pytest.fail("read anew"))
    assert run(*asked("stopped")) == 0
    assert files(tmp_path / "stopped") == files(tmp_path / "one")
