"""Scoring, filtering, rating, resampling and utility, by their commands on small real scorers and models."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_distillation import teacher
from test_scorers import FAST, TINY, cell, write_cells
from test_sequence import NODE
from typer.testing import CliRunner

import ldm
from ldm.cli import app
from ldm.commands.filter import as_scores
from ldm.commands.resample import Log
from ldm.commands.scorers import held_out_of
from ldm.config import instantiate_from_config
from ldm.data.cohort import merge_index, write_store
from ldm.data.collection import read_pictures
from ldm.distillation.decoder import DecoderDistillation
from ldm.errors import UserError
from ldm.images.write import save_png, to_uint8
from ldm.model_folder import write_model_folder
from ldm.sampling.tiles import sample_latents
from ldm.scorers.data import to_range
from ldm.scorers.ensemble import ResNetEnsemble, load_scorer
from ldm.scorers.labelled import Task, read_labelled
from ldm.scorers.ratings import parse_scale, read_ratings
from ldm.scorers.select import chosen, merit
from ldm.scorers.training import Recipe, train_scorer

ARCH = [part for name, value in TINY.items() for part in ("--arch-arg", f"{name}={value}")]
SMALL = Recipe(kwargs=TINY, size=16, members=2, epochs=8, shift=1, test=0.25, **FAST)


def run(*args) -> str:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False).output


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scorers of good cells and of grades, an output of `sample` with good and bad tiles, and a model of cells."""
    folder = tmp_path_factory.mktemp("world")
    table = write_cells(folder / "cells", 16, {"good": 1.0, "bad": 0.0}, patients=8)
    table.to_csv(folder / "cells" / "cells.csv", index=False)
    for name, asked in (("binary", {"positive": "good"}), ("graded", {"label": "grade", "kind": "graded"})):
        train_scorer(read_labelled(folder / "cells" / "cells.csv", **asked), folder / name, SMALL, progress=False)
    rng, rows = np.random.default_rng(1), []
    (folder / "tiles").mkdir()
    for i in range(12):
        grade = float(i % 3 == 0)
        save_png(folder / "tiles" / f"{i:05d}.png", cell(rng, grade), {"model": "m", "index": i})
        kind, wanted = ("good" if i % 2 == 0 else "bad"), 1.0 if i < 6 else 0.0
        rows.append({"file": f"{i:05d}.png", "source": "", "class": kind, "score": wanted, "seed": 0, "index": i})
    pd.DataFrame(rows).to_csv(folder / "tiles" / "tiles.csv", index=False)
    save_png(folder / "tiles" / "contact_sheet.png", cell(rng, 0.0, 40), {"model": "m"})
    torch.manual_seed(0)
    model = instantiate_from_config(NODE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    write_model_folder(folder / "model", NODE, model.state_dict(), {"tile_size": 16})
    return folder


GOOD = [f"{i:05d}.png" for i in range(0, 12, 3)]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_score_writes_a_row_for_each_image(world, tmp_path):
    run("score", "--scorer", world / "binary", "--images", world / "tiles", "--target", "class", "--out",
        tmp_path / "s.csv")  # fmt: skip
    table = pd.read_csv(tmp_path / "s.csv")
    assert list(table) == ["file", "label", "score", "score_0", "score_1", "target"]
    assert list(table["file"]) == [f"{i:05d}.png" for i in range(12)]
    np.testing.assert_allclose(table["score"], table[["score_0", "score_1"]].mean(axis=1), atol=2e-6)
    assert sorted(table.nlargest(4, "score")["file"]) == GOOD
    assert set(table.nlargest(4, "score")["label"]) == {"good"}
    assert table["target"].tolist() == [1, 0] * 6
    assert [p.name for p in tmp_path.iterdir()] == ["s.csv"]


def test_targets_are_what_scores_should_be():
    wanted, table = np.array([0.0, 0.0, 1.0]), pd.DataFrame({"label": ["a", "b", ""]})
    assert as_scores(Task("classes", "class", ("a", "b")), wanted, table).tolist() == [1, 0, 0]
    assert as_scores(Task("graded", "rating", (), 1.0, 5.0), wanted, table).tolist() == [1, 1, 5]


def test_a_store_is_scored_by_slide_and_row_and_its_tiles_are_kept(world, tmp_path):
    rng = np.random.default_rng(2)
    images = [cell(rng, float(i % 2)) for i in range(8)]
    write_store(tmp_path / "cohort", "s.svs", lambda i: images[i], 8, attrs={"tile_size": 16})
    merge_index(tmp_path / "cohort", pd.DataFrame({"slide": "s.svs", "row": range(8), "site": ["a"] * 4 + ["b"] * 4}))
    run("score", "--scorer", world / "binary", "--images", tmp_path / "cohort", "--where", "site=b", "--out",
        tmp_path / "s.csv")  # fmt: skip
    assert pd.read_csv(tmp_path / "s.csv")[["slide", "row"]].to_numpy().tolist() == [["s.svs", i] for i in range(4, 8)]
    said = run("filter", "--scorer", world / "binary", "--images", tmp_path / "cohort", "--top", 0.25, "--by", "site",
               "--out", tmp_path / "kept")  # fmt: skip
    assert "site=a: 1 of 4" in said
    listed = pd.read_csv(tmp_path / "kept" / "tiles.csv")
    assert listed["row"].isin([1, 3, 5, 7]).all()
    assert listed["site"].tolist() == ["a", "b"]
    for name, row in zip(listed["file"], listed["row"]):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "kept" / name)), images[row])


def test_images_that_are_read_in_part_are_told(world, tmp_path):
    (tmp_path / "photographs").mkdir()
    first, preview = (Image.fromarray(cell(np.random.default_rng(0), 1.0)) for _ in range(2))
    first.save(tmp_path / "photographs" / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    said = run("score", "--scorer", world / "binary", "--images", tmp_path / "photographs", "--out", tmp_path / "s.csv")
    assert "note: its file holds 2 images, of which the first is read (a.jpg)" in said


def test_an_unreadable_image_is_reported_and_never_kept(world, tmp_path):
    for i, grade in enumerate((1.0, 0.0)):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(cell(np.random.default_rng(i), grade, 20)).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    said = run("score", "--scorer", world / "binary", "--images", tmp_path / "in", "--out", tmp_path / "s.csv")
    assert "1 images cannot be read: bad.png" in said
    assert pd.read_csv(tmp_path / "s.csv").set_index("file")["score"].isna().to_dict() == {
        "0.png": False,
        "1.png": False,
        "bad.png": True,
    }
    said = run("filter", "--scorer", world / "binary", "--images", tmp_path / "in", "--top", 1, "--out", tmp_path / "o")
    assert "kept 2 of 3" in said
    for name in ("0.png", "1.png"):
        (tmp_path / "in" / name).unlink()
    with pytest.raises(UserError, match=r"none of the 1 images of .* can be read"):
        run("score", "--scorer", world / "binary", "--images", tmp_path / "in", "--out", tmp_path / "t.csv")


@pytest.mark.slow
def test_published_networks_score_through_the_same_command(world, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save({"model_state_dict": ResNetEnsemble(1).networks[0].state_dict()}, tmp_path / f"{seed}.pt")
    (tmp_path / "in").mkdir()
    for i in range(2):
        Image.fromarray(cell(np.random.default_rng(i), 1.0)).save(tmp_path / "in" / f"{i}.png")
    run("score", "--scorer", tmp_path / "0.pt", "--scorer", tmp_path / "1.pt", "--images", tmp_path / "in", "--out",
        tmp_path / "s.csv")  # fmt: skip
    table = pd.read_csv(tmp_path / "s.csv")
    scorer = load_scorer([tmp_path / "0.pt", tmp_path / "1.pt"])
    image = to_range(read_pictures(tmp_path / "in").read(1)).permute(2, 0, 1)
    assert table["score"][1] == pytest.approx(float(scorer(image[None])), abs=1e-5)


def test_what_images_are_kept_by():
    pictures = read_pictures_of([{"class": "a", "score": 0.5}, {"class": "b", "score": 1.0}])
    classes = Task("classes", "class", ("a", "b", "c"))
    mean = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]])
    np.testing.assert_allclose(merit(classes, mean, pictures, matches="class"), [0.7, 0.4])
    np.testing.assert_allclose(merit(classes, mean, pictures, "c"), [0.1, 0.1])
    with pytest.raises(UserError, match=r"say which class to keep: --class.*Known: a, b, c"):
        merit(classes, mean, pictures)
    with pytest.raises(UserError, match=r"--matches takes .* classes; 'score' has '0.5'"):
        merit(classes, mean, pictures, matches="score")
    graded = Task("graded", "score", (), 0.0, 2.0)
    np.testing.assert_allclose(merit(graded, np.array([0.5, 0.4]), pictures, matches="score"), [1.0, 0.7])
    with pytest.raises(UserError, match="it has no --class"):
        merit(graded, mean[:, 0], pictures, "a")
    binary = Task("binary", "class", ("b", "a"))
    np.testing.assert_allclose(merit(binary, np.array([0.9, 0.3]), pictures, matches="class"), [0.9, 0.7])
    np.testing.assert_allclose(merit(binary, np.array([0.9, 0.3]), pictures, "b"), [0.1, 0.7])


def read_pictures_of(about):
    from ldm.data.collection import Pictures
    from ldm.images.pictures import Picture

    image = np.zeros((8, 8, 3), np.uint8)
    return Pictures([Picture.of_pixels(image, f"{i}.png", row) for i, row in enumerate(about)], "tiles")


def test_thresholds_and_fractions():
    values, by = np.array([0.9, 0.1, np.nan, 0.6, 0.5, 0.4]), list("aaabbb")
    assert chosen(values, {"": 0.5}, None, None, "x").tolist() == [True, False, False, True, True, False]
    assert chosen(values, {"": 0.5, "a": 0.05}, None, by, "x").tolist() == [True, True, False, True, True, False]
    assert chosen(values, {}, 1 / 3, by, "x").tolist() == [True, False, False, True, False, False]
    assert chosen(values, {}, 0.2, None, "x").sum() == 1
    for above, top, words in [
        ({"": 0.95}, None, r"none of the 6 images of x passes: asked for 0.95, the best has 0.9, the median is 0.5"),
        ({}, None, "either a least score"),
        ({"": 1}, 0.5, "either a least score"),
        ({}, 1.5, "a fraction above 0 and up to 1"),
        ({"c": 0.5}, None, "no image is of 'c'; Known|no image is of 'c'. Known"),
        ({"a": 0.5}, None, "no least score is given for 'b'"),
    ]:
        with pytest.raises(UserError, match=words):
            chosen(values, above, top, by, "x")


# --- filter ----------------------------------------------------------------------------------------------------------


def test_filter_keeps_what_passes_with_its_rows(world, tmp_path):
    out = tmp_path / "kept"
    command = ["filter", "--scorer", world / "binary", "--images", world / "tiles", "--out", out]
    with pytest.raises(UserError, match=r"none of the 12 images .* passes: asked for 1.5"):
        run(*command, "--above", 1.5)
    said = run(*command, "--top", 1 / 3)
    assert "kept 4 of 12 images" in said
    assert "33.3% [13.8%, 60.9%]" in said
    listed = pd.read_csv(out / "tiles.csv")
    assert listed["file"].tolist() == GOOD
    assert listed["class"].tolist() == ["good", "bad", "good", "bad"]
    for name in GOOD:
        assert (out / name).read_bytes() == (world / "tiles" / name).read_bytes()
    scores = pd.read_csv(out / "scores.csv")
    assert scores["kept"].sum() == 4
    assert len(scores) == 12
    about = json.loads((out / "filter.json").read_text())
    assert about["acceptance"][0] == pytest.approx(1 / 3, abs=1e-4)
    for sheet in ("contact_sheet.png", "contact_sheet_rejected.png"):
        with Image.open(out / sheet) as image:
            assert "SYNTHETIC" in image.text
    run(*command, "--top", 1 / 3)
    with pytest.raises(UserError, match=r"images kept otherwise \(top differ\)"):
        run(*command, "--top", 0.5)
    with pytest.raises(UserError, match="is the folder of the images"):
        run(*command[:-1], world / "tiles", "--top", 0.5)


def test_filter_links_and_goes_by_conditions(world, tmp_path):
    command = ["filter", "--scorer", world / "graded", "--images", world / "tiles", "--link", "--matches", "score"]
    run(*command, "--by", "score", "--top", 1 / 3, "--out", tmp_path / "near")
    listed = pd.read_csv(tmp_path / "near" / "tiles.csv")
    wanted = pd.read_csv(world / "tiles" / "tiles.csv").set_index("file")["score"][listed["file"]]
    assert np.isin(listed["file"], GOOD).tolist() == (wanted == 1).tolist()
    assert listed["score"].tolist() == wanted.tolist()  # the condition stays what it was
    assert os.stat(tmp_path / "near" / listed["file"][0]).st_nlink >= 2
    with pytest.raises(UserError, match="nothing says the 'grade' of the images"):
        run(*command[:-1], "grade", "--top", 0.5, "--out", tmp_path / "x")


def test_images_of_other_folders_are_kept_inside(world, tmp_path):
    (tmp_path / "list").mkdir()
    files = [f"../{i}.png" if i % 2 else str(tmp_path / f"{i}.png") for i in range(2)]
    for i in range(2):
        Image.fromarray(cell(np.random.default_rng(i), 1.0)).save(tmp_path / f"{i}.png")
    pd.DataFrame({"file": files}).to_csv(tmp_path / "list" / "tiles.csv", index=False)
    kept = tmp_path / "o" / "kept"
    command = ("filter", "--scorer", world / "binary", "--images", tmp_path / "list", "--top", 1, "--out", kept)
    with pytest.raises(UserError, match=f"names 2 files outside of the folder .* --files-in {tmp_path}"):
        run(*command)
    run(*command, "--files-in", tmp_path)
    assert pd.read_csv(kept / "tiles.csv")["file"].tolist() == ["000000_0.png", "000001_1.png"]
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["kept"]


# --- people ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ratings_go_out_and_come_back(world, tmp_path):
    out = tmp_path / "ratings"
    run("rate", "--images", world / "tiles", "--out", out, "--count", 10, "--scale", "bad,good")
    table = pd.read_csv(out / "ratings.csv", dtype=str, keep_default_na=False)
    assert len(table) == 10
    with Image.open(out / "contact_sheet_01.png") as sheet:
        assert "SYNTHETIC" in sheet.text
        assert sheet.size[0] > 8 * 128
    about = json.loads((out / "ratings.json").read_text())
    was = {entry["file"]: entry["was"]["file"] for entry in about["images"]}
    assert [was[file] for file in table["file"]] != sorted(was.values())  # in random order
    for file, name in was.items():
        assert (out / file).read_bytes() == (world / "tiles" / name).read_bytes()
    table["rating"] = ["good" if was[file] in GOOD else "bad" for file in table["file"]]

    def saved(change):
        new = table.copy()
        changed = change(new)
        (new if changed is None else changed).to_csv(out / "ratings.csv", index=False)
        return out / "ratings.csv"

    data = read_ratings(saved(lambda t: None))
    assert data.task == Task("binary", "rating", ("bad", "good"))
    assert data.targets.sum() == (table["rating"] == "good").sum()
    assert data.pictures.about[0]["rating"] == table["rating"][0]
    for change, words in [
        (lambda t: t.__setitem__("rating", ["fine", *t["rating"][1:]]), r"row 2: 'fine' is none of bad, good"),
        (lambda t: t.__setitem__("number", ["77", *t["number"][1:]]), "row 2: no image has the number '77'"),
        (lambda t: t.__setitem__("number", [t["number"][1], *t["number"][1:]]), "row 3: number 2 comes twice"),
        (lambda t: t.drop(index=[0, 1]), "2 of 10 images .* are not rated: 1, 2. Rate"),
        (lambda t: t.__setitem__("rating", ["", *t["rating"][1:]]), "1 of 10 images .* are not rated: 1. Rate"),
        (lambda t: t.__setitem__("rating", "good"), "all 10 images .* are rated good"),
        (lambda t: t.drop(columns="rating"), "has no column rating"),
    ]:
        with pytest.raises(UserError, match=words):
            read_ratings(saved(change))
    assert len(read_ratings(saved(lambda t: t.drop(index=[0])), skip_unrated=True)) == 9
    saved(lambda t: None)
    said = run("train-scorer", "--data", out, "--out", tmp_path / "filter", "--size", 16, "--members", 2, "--epochs", 3,
               "--test", 0, "--shift", 1, "--colour", 0, *ARCH)  # fmt: skip
    assert "validation auroc" in said
    assert load_scorer(tmp_path / "filter").task.classes == ("bad", "good")
    with pytest.raises(UserError, match="--label does not go with the rating table"):
        run("train-scorer", "--data", out, "--label", "x", "--out", tmp_path / "f2")
    with pytest.raises(UserError, match="may hold ratings"):
        run("rate", "--images", world / "tiles", "--out", out)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out / table["file"][0])
    with pytest.raises(UserError, match="is not the image that was handed out as number 1"):
        read_ratings(out / "ratings.csv")


def test_scales():
    assert parse_scale("1-5") == ["1", "2", "3", "4", "5"]
    assert parse_scale("bad, fair,good") == ["bad", "fair", "good"]
    for text in ("5-1", "good", "a,a", "a,,b"):
        with pytest.raises(UserError, match="--scale takes"):
            parse_scale(text)


# --- resample --------------------------------------------------------------------------------------------------------


def resample(world, out, *args, until=3, most=40, batch=4):
    return run("resample", "--model", world / "model", "--scorer", world / "graded", "--steps", 2, "--until", until,
               "--max-attempts", most, "--batch-size", batch, "--out", out, *args)  # fmt: skip


@pytest.fixture(scope="module")
def threshold(world, tmp_path_factory):
    """A score that about a third of the model's cells reach."""
    out = tmp_path_factory.mktemp("all")
    resample(world, out, "--condition", "score=0.8", "--above", -1, until=12, most=12)
    scores = pd.read_csv(out / "attempts.csv")["score"]
    assert scores.nunique() == 12
    return float(scores.quantile(0.67))


@pytest.mark.slow
def test_tiles_are_sampled_until_enough_pass(world, tmp_path, threshold, monkeypatch):
    given = ("--condition", "score=0.8", "--above", threshold)
    said = resample(world, tmp_path / "a", *given)
    attempts, listed = pd.read_csv(tmp_path / "a" / "attempts.csv"), pd.read_csv(tmp_path / "a" / "tiles.csv")
    assert attempts["kept"].sum() == len(listed) == 3
    assert ((attempts["score"] >= threshold) == attempts["kept"]).all()
    assert attempts["index"].is_unique
    assert f"3 of {len(attempts)} attempts passed" in said
    name = listed["file"][1]
    scorer, image = load_scorer(world / "graded"), read_pictures(tmp_path / "a" / name).read(0)
    score = float(scorer(to_range(image).permute(2, 0, 1)[None]))
    assert score == pytest.approx(listed["scored"][1], abs=1e-5)
    about = json.loads(Image.open(tmp_path / "a" / name).text["SYNTHETIC"])
    assert about["index"] == listed["index"][1]
    assert about["scorer_sha256"] == scorer.identity
    run("sample", "--model", world / "model", "--condition", "score=0.8", "--steps", 2, "--count", about["index"] + 1,
        "--out", tmp_path / "plain")  # fmt: skip
    plain = np.asarray(Image.open(tmp_path / "plain" / f"{about['index']:05d}.png")).astype(int)
    assert np.abs(plain - image).max() <= 1
    calls = []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return sample_latents(*args, **kwargs)

    monkeypatch.setattr("ldm.commands.resample.sample_latents", stopped)
    with pytest.raises(RuntimeError, match="power cut"):
        resample(world, tmp_path / "b", *given, batch=1)
    monkeypatch.undo()
    resample(world, tmp_path / "b", *given, batch=1)
    again = pd.read_csv(tmp_path / "b" / "attempts.csv")
    pd.testing.assert_frame_equal(again, attempts, rtol=0, atol=0.02)
    with pytest.raises(UserError, match=r"tiles of other settings \(above differ\)"):
        resample(world, tmp_path / "b", "--condition", "score=0.8", "--above", 0.99)


def test_attempts_are_bounded_and_go_on(world, tmp_path):
    given = ("--condition", "score=0.2", "--above", 2)
    with pytest.raises(UserError, match=r"0 of 2 tiles passed in 5 attempts \(0.0% \[0.0%, 43.4%\]\); a larger"):
        resample(world, tmp_path, *given, until=2, most=5)
    with pytest.raises(UserError, match="0 of 2 tiles passed in 7 attempts"):
        resample(world, tmp_path, *given, until=2, most=7)
    assert pd.read_csv(tmp_path / "attempts.csv")["index"].tolist() == list(range(7))
    assert json.loads((tmp_path / "resample.json").read_text())["attempts"] == 7


@pytest.mark.slow
def test_each_request_gets_its_own(world, tmp_path):
    (tmp_path / "t.csv").write_text("score\n0.1\n0.9\n")
    given = ("--table", tmp_path / "t.csv", "--matches", "score", "--above", 0.05)
    said = resample(world, tmp_path / "o", *given, until=2)
    listed = pd.read_csv(tmp_path / "o" / "tiles.csv")
    resample(world, tmp_path / "one", *given, until=2, batch=1)
    assert pd.read_csv(tmp_path / "one" / "tiles.csv")["index"].tolist() == listed["index"].tolist()
    assert listed["row"].value_counts().to_dict() == {0: 2, 1: 2}
    assert listed["score"].tolist() == [(0.1, 0.9)[row] for row in listed["row"]]  # what was asked for
    assert "score=0.1: 2 of" in said
    for options, words in [
        (("--above", "a=0.5"), "takes one number here"),
        (("--above", 0.5, "--class", "x"), "it has no --class"),
        (("--above", 0.5, "--matches", "grade"), "nothing says the 'grade'"),
        (("--above", "high"), "--above takes a number"),
    ]:
        with pytest.raises(UserError, match=words):
            resample(world, tmp_path / "x", "--condition", "score=0.5", *options)
    with pytest.raises(UserError, match="cannot pass in --max-attempts 2"):
        resample(world, tmp_path / "x", "--condition", "score=0.5", "--above", 0.5, most=2)


def test_what_fails_by_the_small_decoder_is_not_decoded_in_full(world, tmp_path):
    training = DecoderDistillation(str(teacher(tmp_path / "teacher")), widths=[8, 8], blocks=[1, 1])
    write_model_folder(tmp_path / "model", training.node, training.state_dict(), {"tile_size": 32})
    np.save(tmp_path / "f.npy", np.ones((1, 6), np.float32))
    model, network = ldm.load_model(tmp_path / "model"), load_scorer(world / "graded")
    cond = model.condition(features=torch.ones(12, 6))

    def scores(decoder):
        made = ldm.sample(model, cond, sampler=ldm.Sampler(steps=2, progress=False, decoder=decoder))
        pixels = to_range(to_uint8(made)).permute(0, 3, 1, 2)
        return network(pixels).numpy()

    quick, full = scores("small"), scores("full")
    least = float(np.median(quick))
    given = ("--features", tmp_path / "f.npy", "--above", least, "--until", 12, "--max-attempts", 12, "--steps", 2)
    with pytest.raises(UserError, match="of 12 tiles passed in 12 attempts"):
        run("resample", "--model", tmp_path / "model", "--scorer", world / "graded", "--out", tmp_path / "o", *given)
    attempts = pd.read_csv(tmp_path / "o" / "attempts.csv")
    shown = np.where(quick >= least, full, quick)
    np.testing.assert_allclose(attempts["score"], shown, atol=2e-3)
    assert (quick < least).sum() == 6
    assert not attempts["kept"][quick < least].any()


def test_rounds_ask_for_what_is_lacking():
    log = Log(3, 2)
    assert log.round() == [0, 0, 0, 1, 1, 1]
    for i, (request, passes) in enumerate([(0, True), (0, True), (0, True), (1, False), (1, True), (1, False)]):
        log.add({"index": i, "request": request, "kept": passes})
    assert not log.lacks(0)
    assert log.round() == [1] * 5  # two lack, and about two of five pass
    assert not log.done


# --- utility ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_utility_compares_on_the_same_real_images(world, tmp_path):
    made = write_cells(tmp_path / "made", 6, {"good": 0.9, "bad": 0.1})
    assert len(made) == 12
    said = run("utility", "--real", world / "cells" / "cells.csv", "--synthetic", tmp_path / "made", "--positive",
               "good", "--size", 16, "--epochs", 8, "--shift", 1, "--batch-size", 6, "--learning-rate", 0.005, "--out",
               tmp_path / "u", *ARCH)  # fmt: skip
    found = json.loads((tmp_path / "u" / "utility.json").read_text())
    assert set(found["figures"]) == {
        "auroc real", "auroc synthetic", "auroc both", "auroc synthetic - real", "auroc both - real",
    }  # fmt: skip
    tables = [pd.read_csv(tmp_path / "u" / arm / "test_scores.csv") for arm in ("real", "synthetic", "both")]
    assert len(tables[0]) == found["test"] > 0
    assert all(table["file"].tolist() == tables[0]["file"].tolist() for table in tables)
    images = [load_scorer(tmp_path / "u" / arm).about["data"]["images"] for arm in ("real", "synthetic", "both")]
    assert images == [32, 12 + found["test"], 44]
    value, low, high = found["figures"]["auroc synthetic"]
    assert low <= value <= high
    assert value > 0.8
    assert "auroc both - real" in said
    assert "must not have seen the held-out images" in said


def test_utility_tests_on_the_images_that_are_named(world):
    own = read_labelled(world / "cells" / "cells.csv", positive="good")
    test = held_out_of(own, Recipe(test=0.3), {"patient": "P3"})
    assert set(own.groups[test]) == {"P3"}
    assert test.sum() == 4
    with pytest.raises(UserError, match=r"are on both sides of --held-out label=good: P0, P1"):
        held_out_of(own, Recipe(test=0.3), {"label": "good"})
    with pytest.raises(UserError, match=r"no image of .* has patient=P9"):
        held_out_of(own, Recipe(test=0.3), {"patient": "P9"})
