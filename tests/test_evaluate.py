"""`histoldm evaluate`, from images on disk to the report."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conftest import ROOT
from ldm.cli import app
from ldm.data.cohort import merge_index, write_store
from ldm.errors import UserError
from ldm.images.slides import open_slide

SIDE = 64


def run(*arguments):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def report(folder):
    return json.loads((folder / "report.json").read_text())


def section(folder, name):
    return next(each for each in report(folder)["sections"] if each["id"] == name)


def measures(folder, name="distances"):
    return {each["name"]: each for each in section(folder, name)["figures"]}


@pytest.fixture(scope="module")
def region(demo_slide):
    return open_slide(demo_slide).read(600, 200, 1280, 1280)


@pytest.fixture(scope="module")
def world(region, tmp_path_factory):
    """A cohort of two slides, 100 tiles each, split in train and test; folders of images to evaluate."""
    folder = tmp_path_factory.mktemp("world")
    corners = np.array([(x, y) for y in range(0, 1280, SIDE) for x in range(0, 1280, SIDE)])[::2]
    tiles = np.stack([region[y : y + SIDE, x : x + SIDE] for x, y in corners])
    for i, slide in enumerate(("TCGA-AA-0001-01", "TCGA-AA-0002-01")):
        own = slice(100 * i, 100 * i + 100)
        write_store(folder / "cohort", slide, tiles[own].__getitem__, 100, coords=corners[own],
                    attrs={"tile_size": SIDE, "mpp": 0.5, "licence": "CC0-1.0"})  # fmt: skip
        split = np.where(np.arange(100) % 2, "train", "test")
        index = {"slide": slide, "row": range(100), "split": split, "class": np.where(np.arange(100) < 50, "a", "b")}
        merge_index(folder / "cohort", pd.DataFrame(index))
    rng = np.random.default_rng(0)
    (folder / "made").mkdir()
    rows = []
    for i, row in enumerate(range(0, 100, 2)):  # noisy images of test tiles, as their conditions would give
        image = (tiles[row] + rng.normal(scale=25, size=tiles[row].shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "made" / f"{i:05d}.png")
        x, y = corners[row]
        rows.append({"file": f"{i:05d}.png", "source": "TCGA-AA-0001-01", "row": row, "x": x, "y": y,
                     "class": "a" if row < 50 else "b", "seed": 0, "index": i})  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "made" / "tiles.csv", index=False)
    (folder / "copies").mkdir()
    for i, row in enumerate(range(1, 100, 4)):
        Image.fromarray(tiles[row]).save(folder / "copies" / f"{i}.png")
    (folder / "flat").mkdir()
    for i in range(20):
        Image.fromarray(np.full((SIDE, SIDE, 3), 100 + 5 * i, np.uint8)).save(folder / "flat" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def evaluated(world):
    """The report of the noisy images, with all that the sets allow."""
    out = world / "report"
    output = run(
        "--generated", world / "made", "--real", world / "cohort", "--where", "split=test", "--train", world / "cohort",
        "--train-where", "split=train", "--features", "pixels", "--out", out, "--title", "Noisy <tiles>",
    )  # fmt: skip
    return out, output


def test_a_report_has_everything_that_the_sets_allow(evaluated):
    out, output = evaluated
    found = report(out)
    assert [each["id"] for each in found["sections"]] == [
        "samples", "distances", "classes", "conditions", "memorisation",
    ]  # fmt: skip
    names = ["fid", "fd_infinity", "kid", "cmmd", "precision", "recall", "density", "coverage"]
    measured = measures(out)
    assert list(measured) == names
    assert all(each["low"] <= each["value"] <= each["high"] for each in measured.values())
    assert measures(out, "conditions")["condition_margin"]["low"] > 0
    assert measures(out, "conditions")["retrieval_top1"]["value"] > 0.8
    assert section(out, "memorisation")["data"]["verdict"] == "no sign"
    real = found["sets"]["real"]
    assert (real["count"], real["splits"], real["patients"], real["licence"]) == (100, {"test": 100}, 2, "CC0-1.0")
    assert real["where"] == ["split=test"]
    assert len(real["pixels_sha256"]) == 64
    assert real["unit"] == "blocks"
    assert found["extractors"]["pixels"]["dim"] == 3072
    assert found["settings"]["seed"] == 0
    assert "FID" in output
    assert "wrote" in output


def test_too_few_images_for_a_covariance_are_told(evaluated):
    out, output = evaluated
    assert "50 images, 3072 dimensions" in measures(out)["fid"]["invalid"]
    assert "invalid" not in measures(out)["kid"]
    assert "50 images are fewer than the 3072 dimensions of pixels: FID and FD∞ are not valid" in " ".join(
        report(out)["warnings"]
    )
    assert "not valid" in output


def test_the_page_stands_alone(evaluated):
    out, _ = evaluated
    page = (out / "report.html").read_text()
    assert "Noisy &lt;tiles&gt;" in page
    assert "SYNTHETIC" in page
    links = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert links
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert "<script" not in page
    assert page.count("<svg") >= 4


@pytest.mark.slow
def test_features_are_not_made_twice(world, evaluated):
    out, _ = evaluated
    files = {path: path.stat().st_mtime_ns for path in (out / "features").iterdir()}
    assert {path.name for path in files} == {
        f"{role}-pixels.h5" for role in ("generated", "real", "train", "conditions")
    }
    kept = measures(out)
    run("--generated", out / "features" / "generated-pixels.h5", "--real", out / "features" / "real-pixels.h5",
        "--out", world / "of-files")  # fmt: skip
    assert measures(world / "of-files") == kept
    assert files == {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_copies_of_training_images_are_caught(world):
    out = world / "copied"
    output = run("--generated", world / "copies", "--real", world / "cohort", "--where", "split=test", "--train",
                 world / "cohort", "--train-where", "split=train", "--features", "pixels", "--out", out)  # fmt: skip
    data = section(out, "memorisation")["data"]
    assert data["verdict"] == "memorises"
    assert len(data["flagged"]) == 25
    assert all(each["identical"] for each in data["flagged"])
    assert data["flagged"][0]["train"].startswith("TCGA-AA-0001-01 row ")
    assert "The model memorises" in output


@pytest.mark.slow
def test_two_reports_are_compared(world, evaluated):
    run("--generated", world / "flat", "--real", world / "cohort", "--where", "split=test", "--features", "pixels",
        "--out", world / "flat-report")  # fmt: skip
    output = run("--compare", evaluated[0], world / "flat-report" / "report.json", "--out", world / "comparison")
    assert re.search(r"FID .*B is worse", output)
    assert output.count("B is worse") >= 2
    assert "50 and 20 generated images" in output
    assert "note: not valid: FID, FD∞ (50 images, 3072 dimensions" in output
    page = (world / "comparison" / "comparison.html").read_text()
    assert "B is worse" in page
    with pytest.raises(UserError, match=r"the report of `histoldm evaluate` .*tiles\.csv is not valid JSON"):
        run("--compare", evaluated[0], world / "made" / "tiles.csv", "--out", world / "comparison")


@pytest.mark.slow
def test_a_large_image_is_measured_whole_and_in_crops(region, world):
    Image.fromarray(region[:640, :640]).save(world / "large.png")
    Image.fromarray(region[640:, 640:]).save(world / "other.png")
    out = world / "large-report"
    run("--generated", world / "large.png", "--real", world / "other.png", "--crop", "128", "--tile", "128",
        "--features", "pixels", "--out", out)  # fmt: skip
    names = [each["id"] for each in report(out)["sections"]]
    assert names == ["samples", "distances", "together", "canvas-generated", "canvas-real", "whole"]
    canvas = measures(out, "canvas-generated")
    assert {"seams", "seams_like", "tone_drift", "repetition", "closest_windows"} <= canvas.keys()
    assert 0 < measures(out, "whole")["whole_distance"]["value"] < 2
    assert report(out)["sets"]["generated"]["count"] == 25


@pytest.mark.slow
def test_pairs_and_scores(world):
    table = pd.DataFrame({"file": map(str, range(40)), "score": np.linspace(0, 1, 40), "target": np.arange(40) >= 20})
    table.assign(target=table["target"].astype(int)).to_csv(world / "scores.csv", index=False)
    out = world / "pairs"
    run("--generated", world / "made", "--pairs", world / "made", "--scores", world / "scores.csv", "--out", out)
    measured = measures(out, "pairs")
    assert measured["ssim"]["value"] == pytest.approx(1)
    assert measured["psnr"]["value"] == 100
    assert len(section(out, "pairs")["data"]["pairs"]) == 50
    assert measures(out, "scores")["auroc"]["value"] == 1
    sets = report(out)["sets"]
    assert sets["generated"]["files_sha256"] == sets["paired"]["files_sha256"] != sets["scores"]["files_sha256"]
    assert "50 generated images of made against 50 paired images of made" in (out / "report.html").read_text()
    if "lpips" not in measured:
        assert any("LPIPS is left out" in text and "https://" in text for text in report(out)["warnings"])


@pytest.mark.slow
def test_captions_are_scored_by_clip(world, tmp_path):
    config = ROOT / "tests" / "configs" / "tiny_clip.json"
    known = json.loads(config.read_text())
    torch.manual_seed(0)
    network = open_clip.model.CLIP(known["embed_dim"], known["vision_cfg"], known["text_cfg"], quick_gelu=True)
    torch.save(network.state_dict(), tmp_path / "clip.pt")
    shutil.copytree(world / "made", tmp_path / "made")
    table = pd.read_csv(tmp_path / "made" / "tiles.csv")
    table.assign(text=[f"tile {i % 5}" for i in range(len(table))]).to_csv(tmp_path / "made" / "tiles.csv", index=False)
    run("--generated", tmp_path / "made", "--real", world / "cohort", "--features", f"clip:{config}", "--weights",
        tmp_path / "clip.pt", "--out", tmp_path / "out")  # fmt: skip
    captions = measures(tmp_path / "out", "captions")
    assert captions["clip_score"]["low"] <= captions["clip_score"]["value"] <= 100
    assert measures(tmp_path / "out")["cmmd"]["value"] >= 0
    assert report(tmp_path / "out")["extractors"]["clip:tiny_clip"]["dim"] == known["embed_dim"]


@pytest.mark.slow
def test_halves_of_a_slide_are_near_and_another_stain_is_far(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("evaluation", ROOT / "benchmarks" / "evaluation.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    ihc = ROOT / "data" / "samples" / "stains" / "OS-2-ndpi.ome.tif"
    assert benchmark.main(["--only", "order", "--ihc", str(ihc), "--features", "pixels"]) == 0
    assert capsys.readouterr().out.count("holds") == 8  # every figure


@pytest.mark.slow
def test_mistakes_are_one_message_each(world, tmp_path):
    real = ("--real", world / "cohort", "--out", tmp_path)
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32))
    np.save(tmp_path / "y.npy", np.zeros((30, 6), np.float32))
    np.save(tmp_path / "few.npy", np.ones((3, 5), np.float32))
    Image.fromarray(np.zeros((80, 80, 3), np.uint8)).save(tmp_path / "empty.png")
    (tmp_path / "other").mkdir()
    for i in range(9):
        Image.fromarray(np.zeros((80, 80, 3), np.uint8)).save(tmp_path / "other" / f"{i}.png")
    wrong = [
        (("--out", tmp_path), "say what to evaluate"),
        (("--generated", world / "made", "--out", tmp_path), "say what to compare with"),
        (("--generated", world / "made", *real), "say what features to measure in"),
        (("--generated", tmp_path / "empty", "--features", "pixels", *real), "no image in"),
        (("--generated", tmp_path / "nowhere", "--features", "pixels", *real), "there is nothing at"),
        (("--generated", tmp_path / "other", "--features", "pixels", *real), "generated 80 x 80 px, real 64 x 64 px"),
        (("--generated", world / "made", "--features", "incepton", *real), "did you mean 'inception'"),
        (("--generated", world / "made", "--features", "pixels", "--where", "split=vall", *real), "has split=vall"),
        (("--generated", tmp_path / "x.npy", "--real", tmp_path / "y.npy", "--out", tmp_path), "different extractors"),
        (("--generated", tmp_path / "x.npy", "--real", tmp_path / "x.npy", "--features", "pixels", "--out", tmp_path),
         "hold theirs already"),
        (("--generated", tmp_path / "few.npy", "--real", tmp_path / "x.npy", "--out", tmp_path), "need 8 at least"),
        (("--generated", world / "made", "--features", "pixels", "--by", "patient", *real), "need 2 patients"),
        (("--generated", world / "made", "--features", "incepton", "--class", "clas", *real), "did you mean 'class'"),
        (("--generated", world / "made", "--train", world / "cohort", "--pairs", world / "made", "--out", tmp_path),
         "give --real too"),
    ]  # fmt: skip
    for arguments, message in wrong:
        with pytest.raises(UserError, match=re.escape(message)):
            run(*arguments)
