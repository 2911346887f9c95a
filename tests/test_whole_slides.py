"""Whether a synthetic slide holds together: seams, drift, wallpaper and pasted texture are told from real tissue."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import ROOT
from ldm.cli import app
from ldm.data.field_files import write_field
from ldm.encoders.extractors import Extractor, load_extractor
from ldm.errors import UserError
from ldm.images.slides import Slide, open_slide
from ldm.images.write import save_bigtiff, save_ome_zarr
from ldm.metrics import whole_slides
from ldm.metrics.seams import line_gradients, seam_profile
from ldm.report.large_images import Conditions, Looked, together

WINDOW = 128
SIDE = 8 * WINDOW


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor(str(ROOT / "data/models/demo-encoder"))


@pytest.fixture(scope="module")
def tissue(demo_slide) -> np.ndarray:
    """Skin (2048,1024,3) of the demo slide; its upper half passes as generated, the whole is the real slide."""
    return open_slide(demo_slide).read(700, 919, SIDE, 2 * SIDE)


@pytest.fixture(scope="module")
def real(tissue, extractor) -> Looked:
    return Looked.at(Slide.of_pixels(tissue), WINDOW, extractor)


@pytest.fixture
def judged(real, extractor):
    """What is said of an image (H,W,3): verdict, figures, section."""

    def judge(pixels: np.ndarray, **settings: Conditions):
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
        made = Looked.at(Slide.of_pixels(pixels), WINDOW, extractor)
        section = together(made, real, WINDOW, "he", extractor, most=256, seed=0, **settings)
        return section.verdict, {each.name: each for each in section.measures}, section

    return judge


@pytest.mark.slow
@pytest.mark.parametrize("top", [0, SIDE // 2, SIDE])
def test_real_tissue_holds_together(judged, tissue, top):
    (kind, words), figures, section = judged(tissue[top : top + SIDE])
    assert kind == "good", words
    assert figures["seams_to_real"].low < 1 < figures["seams_to_real"].high
    assert figures["stain_drift"].value <= 1
    assert figures["copied_windows"].value == 0
    assert figures["repeated_share"].low < whole_slides.QUANTILE
    assert len(section.plots) == 3
    assert len(section.data["closest_pairs"]) > 4


@pytest.mark.slow
def test_seams_are_told(judged, tissue):
    rows, cols = np.mgrid[:SIDE, :SIDE] // WINDOW
    (kind, words), figures, _ = judged(tissue[:SIDE] + ((rows + cols) % 2 * 12 - 6)[..., None])
    assert kind == "bad"
    assert "Borders of tiles of 128 px show" in words
    assert figures["seams_to_real"].low > 1.2
    assert "It drifts" not in words
    assert "copies" not in words


@pytest.mark.slow
def test_drift_is_told_and_where(judged, tissue):
    fading = np.linspace(0.6, 1.4, SIDE)[:, None, None]  # optical densities, from above to below
    (kind, words), figures, _ = judged(255 * (np.maximum(tissue[:SIDE], 1) / 255) ** fading)
    assert kind == "bad"
    assert figures["stain_drift"].value > 1
    assert re.search(r"It drifts: eosin, mean by 0\.\d+ from top to bottom", words)
    assert "left to right" not in words
    assert "Borders" not in words


@pytest.mark.slow
@pytest.mark.parametrize("period", [WINDOW, 300])
def test_wallpaper_is_told(judged, tissue, period):
    paper = np.tile(tissue[600 : 600 + period, 300 : 300 + period], (8, 8, 1))[:SIDE, :SIDE]
    (kind, words), figures, _ = judged(paper)
    assert kind == "bad"
    assert "It holds copies" in words
    assert "It repeats itself" in words
    assert figures["copied_windows"].value > 4
    assert figures["repeated_share"].low > 0.5


@pytest.mark.slow
def test_one_pasted_piece_is_told(judged, tissue):
    pasted = tissue[:SIDE].copy()
    pasted[700:1000, 30:330] = pasted[300:600, 500:800]
    (kind, words), _, section = judged(pasted)
    assert kind == "bad"
    assert "It holds copies" in words
    assert "It repeats itself" not in words
    best = max(section.data["closest_pairs"], key=lambda pair: pair["correlation"])
    assert best["correlation"] > 0.99
    (a, b) = sorted(best["corners"], key=lambda corner: corner[1])
    assert 300 <= a[1] < 600 <= b[1]


@pytest.mark.slow
def test_windows_as_alike_as_their_conditions_repeat_nothing_of_their_own(judged, tissue, extractor):
    copies = np.tile(tissue[512:1024, 256:768], (2, 2, 1))
    noisy = copies + np.random.default_rng(0).normal(0, 40, copies.shape)  # pixels are no copies
    corners = [(x, y) for y in range(0, SIDE, WINDOW) for x in range(0, SIDE, WINDOW)]
    features = extractor(Slide.of_pixels(copies).read_tiles(np.array(corners), WINDOW, WINDOW)).reshape(8, 8, -1)
    verdict, figures, _ = judged(noisy, conditions=Conditions(features, WINDOW, WINDOW))
    assert figures["nearest_to_conditions"].value > 1
    assert "no more alike than their conditions" in verdict[1]
    other = features + np.random.default_rng(1).normal(0, 3 * features.std(), features.shape)
    verdict, figures, _ = judged(noisy, conditions=Conditions(other, WINDOW, WINDOW))
    assert figures["nearest_to_conditions"].value < 1
    assert "It repeats itself" in verdict[1]


@pytest.mark.slow
def test_scrambled_tissue_has_less_structure(judged, tissue):
    tiles = tissue.reshape(16, WINDOW, 8, WINDOW, 3).swapaxes(1, 2).reshape(-1, WINDOW, WINDOW, 3)
    tiles = tiles[np.random.default_rng(0).permutation(len(tiles))]
    scrambled = tiles.reshape(16, 8, WINDOW, WINDOW, 3).swapaxes(1, 2).reshape(tissue.shape)
    (_, words), figures, _ = judged(scrambled)
    assert "It has less structure than real tissue" in words
    assert figures["correlation_1"].high < figures["real_correlation_1"].low
    assert "structure" not in judged(tissue[::-1])[0][1]


def test_distances_leave_out_neighbours_and_counts_are_made_equal():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 8))
    place = np.argwhere(np.ones((20, 20)))
    distances = whole_slides.apart(features, place, whole_slides.spread_of(features))
    assert np.isinf(distances[0, [0, 1, 20, 21]]).all()
    assert distances[0, 2] == pytest.approx(
        np.linalg.norm(features[0] - features[2]) / whole_slides.spread_of(features)
    )
    few = distances[:60, :60]  # of the same kind: more windows have nearer ones, which must not count
    assert np.median(distances.min(1)) < 0.8 * np.median(few.min(1))
    assert whole_slides.repeats(distances, few).share.value < 0.15
    assert whole_slides.repeats(few, distances).share.value < 0.15
    assert whole_slides.repeats(distances, few, seed=1).share.value != whole_slides.repeats(distances, few).share.value
    with pytest.raises(UserError, match="the tissue of the real slide lies in one place"):
        whole_slides.repeats(distances, np.full((9, 9), np.inf))


def test_bands_are_those_of_the_tissue_alone(tissue):
    glass = np.full((4 * WINDOW, SIDE, 3), 250, np.uint8)
    alone, both = (
        whole_slides.band_stains(Slide.of_pixels(pixels), WINDOW)
        for pixels in (tissue[:SIDE], np.concatenate([glass, tissue[:SIDE]]))
    )
    assert np.isnan(both.rows[:4]).all()
    assert np.allclose(both.rows[4:], alone.rows, equal_nan=True)
    assert np.allclose(both.columns, alone.columns, equal_nan=True)
    hd = whole_slides.band_stains(Slide.of_pixels(tissue[:SIDE]), WINDOW, "hd")
    assert hd.names[2] == "DAB, mean"
    with pytest.raises(UserError, match="has tissue in 0 rows of windows of 128 px"):
        whole_slides.band_stains(Slide.of_pixels(glass), WINDOW)


@pytest.mark.slow
def test_drift_is_left_out_of_a_narrow_strip_of_tissue(judged, tissue):
    strip = np.full((SIDE, SIDE, 3), 250, np.uint8)
    strip[:, :256] = tissue[512 : 512 + SIDE, 300:556]
    _, figures, section = judged(strip)
    assert "Drift of stains is left out" in section.intro
    assert "has tissue in 2 columns" in section.intro
    assert "stain_drift" not in figures
    assert "repeated_share" in figures


def test_the_profile_of_seams_has_its_peak_at_the_border(tissue):
    pixels = tissue[:SIDE].astype(int)
    pixels[:, 512:] -= 60
    profile = seam_profile(line_gradients([pixels.clip(0, 255)]), 512)
    assert profile.argmax() == 32
    assert seam_profile(line_gradients([pixels.clip(0, 255)]), 20).shape == (19,)


@pytest.mark.parametrize(("width", "rows"), [(3, 2048), (30_000, 1024), (200_000, 512)])
def test_bands_of_wide_slides_hold_few_rows(width, rows):
    image = Slide.of_pixels(np.broadcast_to(np.uint8(0), (4096, width, 3)))
    assert [len(band) for band in image.bands()] == [rows] * (4096 // rows)


@pytest.fixture(scope="module")
def slides(tissue, tmp_path_factory):
    """Slides as files: the real one, wallpaper, one without tissue, a small one, one of another scale."""
    folder = tmp_path_factory.mktemp("slides")
    paper = np.tile(tissue[600:728, 300:428], (8, 8, 1))
    save_bigtiff(folder / "real.tif", tissue, 0.5, {}, quality=95)
    save_bigtiff(folder / "paper.tif", paper, 0.5, {}, quality=95)
    save_ome_zarr(folder / "paper.ome.zarr", paper, 0.5, {})
    save_bigtiff(folder / "finer.tif", tissue, 0.25, {}, quality=95)
    Image.fromarray(np.full((SIDE, SIDE, 3), 248, np.uint8)).save(folder / "glass.png")
    Image.fromarray(tissue[: 3 * WINDOW]).save(folder / "small.png")
    write_field(folder / "field.npy", np.random.default_rng(0).normal(size=(8, 8, 3072)).astype(np.float32),
                {"stride": WINDOW, "tile_size": WINDOW, "feature": "pixels"})  # fmt: skip
    write_field(folder / "other.npy", np.ones((8, 8, 4), np.float32),
                {"stride": WINDOW, "tile_size": WINDOW, "feature": "uni"})  # fmt: skip
    write_field(folder / "large.npy", np.ones((9, 20, 4), np.float32),
                {"stride": WINDOW, "tile_size": WINDOW, "feature": "pixels"})  # fmt: skip
    np.save(folder / "bare.npy", np.ones((8, 8, 4), np.float32))
    return folder


def run(*arguments) -> str:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.parametrize("made", ["paper.tif", "paper.ome.zarr"])
def test_two_slides_are_compared_by_the_command(slides, tmp_path, made):
    common = ("--generated", slides / made, "--real", slides / "real.tif", "--tile", WINDOW, "--crop", WINDOW,
              "--features", "pixels", "--conditions", slides / "field.npy")  # fmt: skip
    output = run(*common, "--windows", 40, "--out", tmp_path / "report")
    assert "Does the slide hold together? (pixels)" in output
    assert "It holds copies" in output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    section = next(each for each in report["sections"] if each["id"] == "together")
    assert section["data"]["windows"][0] == 40
    figures = {each["name"]: each["value"] for each in section["figures"]}
    assert figures["nearest_to_conditions"] < 0.1
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<section id=together><h2>Does the slide hold together?" in page
    assert "distance to the nearest window" in page


@pytest.mark.parametrize(
    ("made", "real", "more", "message"),
    [
        ("small.png", "real.tif", (), "small.png (--generated) is 1024 x 384 px. Large images are compared as wholes"),
        ("paper.tif", "small.png", (), "small.png (--real) is 1024 x 384 px"),
        ("paper.tif", "finer.tif", (), "finer.tif 0.25: large images are compared at one scale"),
        ("glass.png", "real.tif", (), "glass.png (--generated) has tissue in 0 windows of 128 px"),
        ("paper.tif", "real.tif", ("--conditions", "bare.npy"), "does not say on which lattice its features lie"),
        ("paper.tif", "real.tif", ("--conditions", "other.npy"), "holds features of uni, and windows are measured in"),
        ("paper.tif", "real.tif", ("--conditions", "large.npy"), "the grid of an image of 2560 x 1152 px"),
    ],
)
def test_mistakes_are_one_message_each(slides, tmp_path, made, real, more, message):
    more = [slides / each if str(each).endswith(".npy") else each for each in more]
    with pytest.raises(UserError, match=re.escape(message)):
        run("--generated", slides / made, "--real", slides / real, "--tile", WINDOW, "--crop", WINDOW,
            "--features", "pixels", *more, "--out", tmp_path)  # fmt: skip
