"""Ensembles that score images: their figures, their data, their training, their folders."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.data.cohort import merge_index, write_store
from ldm.data.collection import read_pictures
from ldm.encoders.timm_networks import make_network
from ldm.errors import UserError
from ldm.foreign.paths import files_in
from ldm.rng import generator
from ldm.scorers import training as scorer_training
from ldm.scorers.calibration import (
    auroc,
    calibrated,
    calibration_error,
    fit_temperature,
    measures,
    proportion,
    spearman,
    with_intervals,
)
from ldm.scorers.data import augmented, balanced_order, prepared, to_range
from ldm.scorers.ensemble import ResNetEnsemble, load_scorer, save_scorer
from ldm.scorers.labelled import read_labelled, split_groups
from ldm.scorers.select import score_pictures
from ldm.scorers.training import Recipe, begin_with, network_logits, train_scorer

FAST = {"batch_size": 6, "learning_rate": 5e-3}
TINY = {"channels": [8, 8, 16, 16], "stem_width": 8}


def recipe(**changes) -> Recipe:
    return Recipe(**{"kwargs": TINY, "size": 16, "members": 2, "epochs": 6, "shift": 1, "test": 0.25, **FAST} | changes)


def cell(rng: np.random.Generator, grade: float, side: int = 16) -> np.ndarray:
    """A tile with a spot in its middle, the darker the higher the grade."""
    image = np.full((side, side, 3), (215, 180, 210), float) + rng.normal(0, 6, (side, side, 3))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    image[x**2 + y**2 < (side / 4) ** 2] -= 110 * grade
    return image.clip(0, 255).astype(np.uint8)


def write_cells(folder, count: int, kinds: dict[str, float], patients: int = 8) -> pd.DataFrame:
    """Images of each kind in a folder of classes; the table of them."""
    rng, rows = np.random.default_rng(0), []
    for name, grade in kinds.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(cell(rng, grade)).save(folder / name / f"{i:03}.png")
            rows.append({"path": f"{name}/{i:03}.png", "label": name, "patient": f"P{i % patients}", "grade": grade})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """40 images of good and bad cells of 8 patients, with a table cells.csv."""
    folder = tmp_path_factory.mktemp("cells")
    table = write_cells(folder, 20, {"good": 1.0, "bad": 0.0})
    table.to_csv(folder / "cells.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """A scorer folder of those cells."""
    out = tmp_path_factory.mktemp("scorers") / "good"
    data = read_labelled(cells / "cells.csv", positive="good")
    train_scorer(data, out, recipe(), licence="CC0", progress=False)
    return out


# --- figures ---------------------------------------------------------------------------------------------------------


def test_auroc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 60) / 5, rng.random(60) < 0.4  # with ties
    pairs = [(s > t) + 0.5 * (s == t) for s in scores[positive] for t in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert np.isnan(auroc(scores, np.ones(60, bool)))


def test_spearman_is_scipys():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, 50), rng.integers(0, 5, 50)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(spearman(a, np.ones(50)))


def test_calibration_error_of_constructed_scores():
    scores = np.repeat([0.2, 0.8], 50)
    targets = np.concatenate([np.repeat([1, 0], [10, 40]), np.repeat([1, 0], [30, 20])]).astype(float)
    assert calibration_error(scores, targets, bins=2) == pytest.approx((0 + abs(0.8 - 0.6)) / 2)


def test_a_proportion_and_its_interval():
    assert proportion(8, 10) == pytest.approx((0.8, 0.49016, 0.94332), abs=1e-5)  # Wilson 1927
    assert proportion(0, 20)[1] == 0
    with pytest.raises(UserError):
        proportion(3, 2)


def test_intervals_draw_whole_groups():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 30)
    values = rng.normal(size=20)[groups] + 0.1 * rng.normal(size=600)

    def mean(rows):
        return {"mean": float(values[rows].mean())}

    value, low, high = with_intervals(mean, groups)["mean"]
    assert value == pytest.approx(values.mean(), abs=1e-4)
    wide, narrow = high - low, np.diff(with_intervals(mean, np.arange(600))["mean"][1:])[0]
    assert 0.5 < wide / (2 * 1.96 * values.reshape(20, 30).mean(1).std() / 20**0.5) < 1.5
    assert wide > 3 * narrow


@pytest.mark.parametrize("kind", ["binary", "classes"])
def test_temperature_and_offset_are_found_again(kind):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, 8000 if kind == "binary" else (8000, 3))
    truth = calibrated(kind, logits, 2.5, [0.7] if kind == "binary" else [0.7, 0.0, -0.7])
    drawn = rng.random(8000)
    targets = (drawn < truth).astype(float) if kind == "binary" else (drawn[:, None] > truth.cumsum(1)).sum(1)
    temperature, offset = fit_temperature(kind, logits, targets)
    assert temperature == pytest.approx(2.5, rel=0.06)
    shift, wanted = (offset[0], 0.7) if kind == "binary" else (offset[0] - offset[2], 1.4)
    assert shift == pytest.approx(wanted, abs=0.1)
    before = measures(kind, calibrated(kind, logits, 1.0, [0.0]), targets)
    after = measures(kind, calibrated(kind, logits, temperature, offset), targets)
    assert after["ece"] < 0.02 < 0.1 < before["ece"]


# --- data ------------------------------------------------------------------------------------------------------------


def test_groups_stay_together_and_classes_are_spread():
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, 60, 900))
    strata = (rng.random(900) < 0.2).astype(int)
    part = split_groups(strata, groups, (0.6, 0.2, 0.2), seed=3)
    assert all(len(set(part[groups == g])) == 1 for g in set(groups))
    for k, share in enumerate((0.6, 0.2, 0.2)):
        for stratum in (0, 1):
            assert (part[strata == stratum] == k).mean() == pytest.approx(share, abs=0.04)
    assert (split_groups(strata, groups, (0.6, 0.2, 0.2), seed=4) != part).any()
    assert (split_groups(strata, groups, (1.0, 0.0)) == 0).all()


def test_folders_tables_and_cohorts_hold_the_same_labels(cells, tmp_path):
    of_folder = read_labelled(cells, positive="good")
    assert of_folder.task.classes == ("bad", "good")
    assert of_folder.counts() == {"bad": 20, "good": 20}
    assert "split one by one" in of_folder.notes[0]
    of_table = read_labelled(cells / "cells.csv", positive="good")
    assert len(set(of_table.groups)) == 8
    assert not of_table.notes
    table = pd.read_csv(cells / "cells.csv")
    images = [np.asarray(Image.open(cells / path)) for path in table["path"]]
    write_store(tmp_path, "s", lambda i: images[i], 40, attrs={"tile_size": 16, "mpp": 0.5, "licence": "CC0"})
    about = table[["label", "grade"]].assign(slide="s", row=range(40), case=table["patient"])
    merge_index(tmp_path, about)
    of_cohort = read_labelled(tmp_path, label="grade", patient="case")
    assert of_cohort.task.kind == "binary"
    assert of_cohort.task.classes == ("0", "1")
    assert of_cohort.pictures.mpp == 0.5
    for i in (0, 25):
        assert np.array_equal(of_cohort.pictures.read(i), of_table.pictures.read(i))
        assert of_cohort.targets[i] == of_table.targets[i]
        assert of_cohort.groups[i] == of_table.groups[i]
    write_store(tmp_path / "bare", "t", lambda i: images[i], 4, attrs={"tile_size": 16}, labels={"grade": [0, 1, 0, 1]})
    write_store(tmp_path / "bare", "u", lambda i: images[i], 4, attrs={"tile_size": 16}, labels={"grade": [0, 1, 0, 1]})
    assert read_labelled(tmp_path / "bare", label="grade").groups.tolist() == ["t"] * 4 + ["u"] * 4
    chosen = read_labelled(tmp_path, label="grade", patient="case", where={"label": "good"}, task=of_cohort.task)
    assert chosen.targets.tolist() == [1] * 20
    with pytest.raises(UserError, match="all images have the case 'P0'; they cannot be split by it"):
        read_labelled(tmp_path, label="grade", patient="case", where={"case": "P0"})


@pytest.fixture
def elsewhere(cells):
    """Tables may name the images of `cells`."""
    with files_in([cells]):
        yield


@pytest.mark.usefixtures("elsewhere")
def test_grades_are_scaled_and_votes_keep_their_fractions(cells, tmp_path):
    table = pd.read_csv(cells / "cells.csv")
    table["path"] = [str(cells / path) for path in table["path"]]
    table["stars"] = np.arange(40) % 5 + 1
    table.to_csv(tmp_path / "t.csv", index=False)
    data = read_labelled(tmp_path / "t.csv", label="stars")
    assert (data.task.kind, data.task.low, data.task.high) == ("graded", 1, 5)
    assert sorted(set(data.targets)) == [0, 0.25, 0.5, 0.75, 1]
    assert data.counts() == {str(k): 8 for k in range(1, 6)}
    assert len(set(data.strata)) == 5
    order = balanced_order(np.repeat([0, 1, 2], [30, 6, 4]), 0)
    assert np.bincount(np.repeat([0, 1, 2], [30, 6, 4])[order]).tolist() in ([13, 13, 14], [13, 14, 13], [14, 13, 13])


@pytest.mark.usefixtures("elsewhere")
def test_mistakes_in_labels_are_told(cells, tmp_path):
    with pytest.raises(UserError, match=r"which label of .* is the positive one\? .*Known: bad, good"):
        read_labelled(cells / "cells.csv")
    with pytest.raises(UserError, match="did you mean 'good'"):
        read_labelled(cells / "cells.csv", positive="god")
    with pytest.raises(UserError, match=r"nothing says the 'lable' .*did you mean 'label'"):
        read_labelled(cells / "cells.csv", label="lable")
    table = pd.read_csv(cells / "cells.csv")
    table["path"] = [str(cells / path) for path in table["path"]]
    table[table["label"] == "good"].to_csv(tmp_path / "one.csv", index=False)
    with pytest.raises(UserError, match=r"all 20 images of .*one.csv have the label good; a scorer learns from two"):
        read_labelled(tmp_path / "one.csv", positive="good")
    table.assign(path=table["path"].where(table.index != 3, "gone.png")).to_csv(tmp_path / "gone.csv", index=False)
    with pytest.raises(UserError, match=r"names 1 images that are not there: .*gone\.png"):
        read_labelled(tmp_path / "gone.csv", positive="good")
    table.assign(label=table["label"].where(table.index != 3, None)).to_csv(tmp_path / "blank.csv", index=False)
    with pytest.raises(UserError, match=r"1 images of .* have no label: .*good/003\.png"):
        read_labelled(tmp_path / "blank.csv", positive="good")
    pd.concat([table, table[:2]]).to_csv(tmp_path / "twice.csv", index=False)
    with pytest.raises(UserError, match="lists 2 images twice"):
        read_labelled(tmp_path / "twice.csv", positive="good")
    (tmp_path / "flat").mkdir()
    shutil.copy(cells / "good" / "000.png", tmp_path / "flat")
    with pytest.raises(UserError, match="outside the subfolders of classes"):
        read_labelled(tmp_path / "flat")
    with pytest.raises(UserError, match="there are no images at"):
        read_labelled(tmp_path / "nothing")


def test_augmentation_moves_pixels_and_makes_none():
    images = to_range(np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8))
    moved = augmented(images, 0.0, 3, generator(0))
    for image, other in zip(images, moved):
        assert set(other.unique().tolist()) <= set(image.unique().tolist())
        assert not torch.equal(image, other)
    assert torch.equal(moved, augmented(images, 0.0, 3, generator(0)))
    coloured = augmented(images, 0.2, 0, generator(1))
    assert coloured.abs().max() <= 1
    white = augmented(torch.ones(4, 3, 16, 16), 0.2, 0, generator(1))
    assert white.std() > 0  # light changes, and nothing is left as it was


# --- training --------------------------------------------------------------------------------------------------------


def test_an_ensemble_learns_and_says_what_it_is(cells, trained):
    scorer = load_scorer(trained)
    about = yaml.safe_load((trained / "config.yaml").read_text())["metadata"]
    value, low, high = about["figures"]["test"]["auroc"]
    assert value > 0.95
    assert low <= value <= high
    assert about["licence"] == "CC0"
    assert about["data"]["counts"] == {"bad": 20, "good": 20}
    assert about["data"]["groups"] == 8
    assert len(about["data"]["sha256"]) == 64
    assert scorer.view.tile_size == 16
    table = pd.read_csv(trained / "test_scores.csv")
    assert set(table["group"]) < {f"P{i}" for i in range(8)}
    pictures = read_pictures(cells)
    scores = score_pictures(scorer, pictures, batch_size=7, progress=False)
    assert scores.shape == (40, 2)
    good = np.array([pictures.name(i).startswith("good") for i in range(40)])
    assert auroc(scores.mean(1), good) > 0.95
    images = torch.stack([to_range(pictures.read(i)).permute(2, 0, 1) for i in range(4)])
    torch.testing.assert_close(scorer(images), scorer.members(images).mean(1))
    np.testing.assert_allclose(scorer(images).numpy(), scores[:4].mean(1), atol=1e-5)
    assert not (trained / scorer_training.WORK).exists()


def test_images_that_change_are_scored_anew(trained, tmp_path):
    rng, scorer, work = np.random.default_rng(0), load_scorer(trained), tmp_path / "scores.npz"
    (tmp_path / "in").mkdir()
    found = []
    for grade in (1.0, 0.0):
        Image.fromarray(cell(rng, grade)).save(tmp_path / "in" / "0.png")
        found.append(score_pictures(scorer, read_pictures(tmp_path / "in"), work=work, progress=False).mean())
    assert found[0] > found[1] + 0.1


@pytest.mark.slow
def test_a_stopped_training_gives_the_same_weights(cells, trained, tmp_path, monkeypatch):
    data, calls = read_labelled(cells / "cells.csv", positive="good"), []
    epoch = scorer_training._epoch

    def stopped(*args):
        calls.append(1)
        if len(calls) in (3, 7):
            raise KeyboardInterrupt
        return epoch(*args)

    monkeypatch.setattr(scorer_training, "_epoch", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_scorer(data, tmp_path / "s", recipe(), licence="CC0", progress=False)
    with pytest.raises(UserError, match=r"does not exist|has no config.yaml"):
        load_scorer(tmp_path / "s")
    with pytest.raises(UserError, match=r"unfinished training of other settings \(learning_rate differ\)"):
        train_scorer(data, tmp_path / "s", recipe(learning_rate=0.1), progress=False)
    train_scorer(data, tmp_path / "s", recipe(), licence="CC0", progress=False)
    assert len(calls) <= 2 * 6 + 2
    for k in range(2):
        ours, theirs = (load_file(folder / f"member-{k}.safetensors") for folder in (tmp_path / "s", trained))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "s" / "config.yaml").read_text() == (trained / "config.yaml").read_text()
    monkeypatch.setattr(scorer_training, "_epoch", None)
    train_scorer(data, tmp_path / "s", recipe(), progress=False)  # nothing is left to do
    prepared(data.pictures, recipe().size, tmp_path / "s" / ".training", progress=False)
    (tmp_path / "s" / ".training" / "images.npy").unlink()  # killed while what is not needed any more was removed
    train_scorer(data, tmp_path / "s", recipe(), progress=False)
    assert not (tmp_path / "s" / ".training").exists()
    with pytest.raises(UserError, match=r"a scorer of other settings \(seed differ\)"):
        train_scorer(data, tmp_path / "s", recipe(seed=1), progress=False)


@pytest.mark.slow
def test_the_best_epoch_is_kept_and_patience_ends_a_member(cells, tmp_path, monkeypatch):
    data, seen = read_labelled(cells / "cells.csv", positive="good"), []
    epoch, planned = scorer_training._epoch, [0.6, 0.9, 0.7, 0.8, 0.85] * 2

    def noted(run, network, *rest):
        loss = epoch(run, network, *rest)
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return loss

    def told(kind, scores, targets):
        found = measures(kind, scores, targets)
        return found | {"auroc": planned[len(seen) - 1]} if len(seen) and told.early else found

    told.early = True
    monkeypatch.setattr(scorer_training, "_epoch", noted)
    monkeypatch.setattr(scorer_training, "measures", told)
    scorer = train_scorer(data, tmp_path / "s", recipe(epochs=20, patience=3), progress=False)
    assert scorer.about["best_epochs"] == [2, 2]
    assert scorer.about["epochs"] == [5, 5]
    for k, best in enumerate((1, 6)):
        kept = load_file(tmp_path / "s" / f"member-{k}.safetensors")
        assert all(torch.equal(kept[name], seen[best][name]) for name in kept)


@pytest.mark.slow
def test_grades_and_classes_are_learnt(tmp_path):
    kinds = {"low": 0.0, "middle": 0.45, "top": 1.0}
    table = write_cells(tmp_path / "cells", 16, kinds, patients=6)
    table.to_csv(tmp_path / "cells" / "cells.csv", index=False)
    graded = train_scorer(
        read_labelled(tmp_path / "cells" / "cells.csv", label="grade"),
        tmp_path / "graded",
        recipe(epochs=7, views=8),
        progress=False,
    )
    rng = np.random.default_rng(5)
    images = torch.stack([to_range(cell(rng, g)).permute(2, 0, 1) for g in (0.0, 0.45, 1.0)])
    scores = graded(images)
    assert scores[0] < scores[1] < scores[2]
    torch.testing.assert_close(graded(images.rot90(1, (2, 3))), scores, rtol=1e-4, atol=1e-5)  # eight views
    data = read_labelled(tmp_path / "cells" / "cells.csv")
    assert data.task.kind == "classes"
    classes = train_scorer(data, tmp_path / "classes", recipe(epochs=7), progress=False)
    found = classes(images)
    assert found.shape == (3, 3)
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    assert classes.about["figures"]["test"]["auroc"][0] > 0.8
    assert list(pd.read_csv(tmp_path / "classes" / "test_scores.csv"))[-3:] == ["p_low", "p_middle", "p_top"]


def test_given_weights_are_where_a_member_begins(tmp_path):
    torch.manual_seed(0)
    teacher = make_network("resnet10t", 1000, TINY)
    save_file(teacher.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(1)
    network = make_network("resnet10t", 1, TINY)
    begin_with(network, tmp_path / "w.safetensors")
    assert torch.equal(network.conv1[0].weight, teacher.conv1[0].weight)
    assert network.fc.weight.shape == (1, 16)
    with pytest.raises(UserError, match=r"does not fit the network: .* tensors are missing or differ, as conv1"):
        begin_with(make_network("resnet10t", 1, TINY | {"stem_width": 16}), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        begin_with(network, tmp_path / "none.safetensors")


def test_mistakes_of_training_are_told(cells, tmp_path):
    data = read_labelled(cells / "cells.csv", positive="good")
    with pytest.raises(UserError, match="--members is 2 to 20; got 1"):
        recipe(members=1)
    with pytest.raises(UserError, match="timm has no network 'resnet10'; did you mean 'resnet10"):
        train_scorer(data, tmp_path / "s", recipe(arch="resnet10", kwargs=None))
    with pytest.raises(UserError, match="timm has no network 'hf-hub:timm/resnet10t'"):
        train_scorer(data, tmp_path / "s", recipe(arch="hf-hub:timm/resnet10t", kwargs=None))
    with pytest.raises(UserError, match="cannot be split into 5 folds that hold two classes each"):
        train_scorer(data.take([0, 1, 2, 20, 21, 22]), tmp_path / "s", recipe(members=5))
    assert not (tmp_path / "s").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(notes.txt"):
        train_scorer(data, tmp_path / "full", recipe(), progress=False)
    shutil.copytree(cells, tmp_path / "cells")
    (tmp_path / "cells" / "good" / "004.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"004\.png holds text, not an image"):
        train_scorer(
            read_labelled(tmp_path / "cells" / "cells.csv", positive="good"), tmp_path / "t", recipe(), progress=False
        )
    with pytest.raises(UserError, match=r"good/000\.png is 16 x 16 px, smaller than the 24 px"):
        data.pictures.middle(24).read(0)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_comes_back_whole_and_runs_nothing(trained, tmp_path):
    scorer = load_scorer([trained])
    save_scorer(tmp_path / "again", scorer)
    again = load_scorer(tmp_path / "again")
    images = torch.rand(3, 3, 20, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(scorer(images), again(images))
    assert scorer.identity == load_scorer(trained).identity != ""

    def broken(change) -> None:
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(trained, tmp_path / "b")
        config = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
        text = change(config)
        (tmp_path / "b" / "config.yaml").write_text(text if isinstance(text, str) else yaml.safe_dump(config))

    broken(lambda c: c["scorer"].update(arch="hf-hub:someone/network"))
    with pytest.raises(UserError, match="timm has no network 'hf-hub:someone/network'"):
        load_scorer(tmp_path / "b")
    broken(lambda c: f"scorer: !!python/object/apply:os.system ['touch {tmp_path}/ran']")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_scorer(tmp_path / "b")
    assert not (tmp_path / "ran").exists()
    broken(lambda c: c["scorer"]["task"].update(kind="other"))
    with pytest.raises(UserError, match=r"scorer\.task\.kind is 'other', not one of binary, graded, classes"):
        load_scorer(tmp_path / "b")
    broken(lambda c: c["scorer"].update(kwargs={}))
    with pytest.raises(UserError, match=r"member-0.safetensors is no resnet10t with 1 outputs: conv1"):
        load_scorer(tmp_path / "b")
    broken(lambda c: None)
    weights = load_file(tmp_path / "b" / "member-1.safetensors")
    weights["conv1.0.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, tmp_path / "b" / "member-1.safetensors")
    with pytest.raises(UserError, match=r"member-1\.safetensors are of no use: 1 of the \d+ values of conv1"):
        load_scorer(tmp_path / "b")
    (tmp_path / "b" / "member-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"member-1.safetensors does not exist"):
        load_scorer(tmp_path / "b")
    with pytest.raises(UserError, match=r"is no scorer: it has no config.yaml"):
        load_scorer(tmp_path)


@pytest.mark.slow
def test_half_weights_are_stored_half_and_computed_whole(cells, trained, tmp_path):
    data = read_labelled(cells / "cells.csv", positive="good")
    for _ in range(2):  # the second time nothing is left to do, a card beside it or not
        made = train_scorer(data, tmp_path / "s", recipe(), licence="CC0", progress=False, half=True)
        (tmp_path / "s" / "README.md").write_text("what it is")
    with pytest.raises(UserError, match=r"a scorer of other settings \(half differ\)"):
        train_scorer(data, tmp_path / "s", recipe(), progress=False)
    for k in range(2):
        ours, theirs = (load_file(folder / f"member-{k}.safetensors") for folder in (tmp_path / "s", trained))
        assert all(
            torch.equal(ours[name], theirs[name].half() if theirs[name].is_floating_point() else theirs[name])
            for name in theirs
        )
    assert all(value.dtype == torch.float32 for value in made.parameters())
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (made(images) - load_scorer(trained)(images)).abs().max() < 5e-3
    told, names = pd.read_csv(tmp_path / "s" / "test_scores.csv"), [data.pictures.name(i) for i in range(len(data))]
    held_out = data.pictures.take([names.index(name) for name in told.iloc[:, 0]])
    scores = score_pictures(made, held_out, progress=False).mean(1)
    np.testing.assert_allclose(scores, told["score"], atol=2e-5)  # the figures are of the weights that are kept


@pytest.mark.slow
def test_published_networks_have_the_same_face():
    torch.manual_seed(0)
    scorer = ResNetEnsemble(2).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        each = scorer.members(images)
        assert each.shape == (2, 2)
        torch.testing.assert_close(scorer(images), each.mean(1))
    assert (scorer.task.kind, scorer.count) == ("binary", 2)
    scorer.check_extent(64, 0.25, "cells")


def test_images_of_another_extent_are_refused(trained):
    scorer = load_scorer(trained)
    object.__setattr__(scorer.view, "mpp", 0.5)
    scorer.check_extent(32, 0.25, "cells")
    with pytest.raises(UserError, match=r"cover 16.0 um .* 8.0 um .*--crop 32"):
        scorer.check_extent(64, 0.25, "cells")
    scorer.check_extent(64, None, "cells")


def test_logits_do_not_depend_on_the_batch(trained):
    scorer = load_scorer(trained)
    images = np.random.default_rng(0).integers(0, 256, (130, 3, 16, 16), dtype=np.uint8)
    together = network_logits(scorer.networks[0], images, scorer.view, 1, "cpu")
    np.testing.assert_allclose(
        network_logits(scorer.networks[0], images[128:], scorer.view, 1, "cpu"), together[128:], atol=1e-5
    )
    assert json.dumps(scorer.task.as_dict())
