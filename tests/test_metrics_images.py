"""Conditions, scores, memorisation, pairs and large images, on constructed sets whose figures are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ldm.encoders.feature_files import FeatureSet
from ldm.errors import UserError
from ldm.images.slides import open_image, open_slide
from ldm.metrics import conditional, large_images, pairs
from ldm.metrics.memorisation import memorisation, nearest
from ldm.metrics.seams import line_gradients

RNG = np.random.default_rng(3)


def feature_set(values, **table):
    names = {"name": [str(i) for i in range(len(values))]}
    about = {"extractor": "made", "data": {"path": "made"}}
    return FeatureSet(np.asarray(values, np.float32), pd.DataFrame(names | table), about)


@pytest.fixture(scope="module")
def region(demo_slide):
    return open_slide(demo_slide).read(700, 1400, 1024, 1024)


# --------------------------------------------------------------------------------------------------------- conditions


def test_images_that_follow_find_their_condition_first():
    conditions = RNG.normal(size=(50, 32))
    found = conditional.following(conditions + 0.3 * RNG.normal(size=conditions.shape), conditions)
    measures = {each.name: each for each in conditional.following_measures(found, None)}
    assert measures["retrieval_top1"].value == 1
    assert measures["retrieval_rank"].value == 1
    assert measures["condition_margin"].low > 0.8
    lost = conditional.following(RNG.normal(size=conditions.shape), conditions)
    measures = {each.name: each for each in conditional.following_measures(lost, None)}
    assert measures["condition_margin"].low < 0 < measures["condition_margin"].high
    assert measures["retrieval_rank"].value == pytest.approx(25.5, abs=6)
    alike = conditional.following(np.ones((4, 3)), np.ones((4, 3)))  # a model of one image is told nothing
    assert alike.rank.tolist() == [4, 4, 4, 4]
    assert np.allclose(alike.margin, 0)


def test_images_of_one_condition_share_it():
    conditions, which = RNG.normal(size=(10, 32)), np.repeat(np.arange(10), 5)
    made = conditions[which] + 0.3 * RNG.normal(size=(50, 32))
    found = conditional.following(made, conditions, which)
    assert (found.rank == 1).all()
    assert found.count == 10
    assert np.allclose(found.own, [conditional.cosines(made, conditions)[i, k] for i, k in enumerate(which)])
    assert conditional.clip_score(made, conditions, None, which)[1].value > 80
    with pytest.raises(UserError, match="from 2 conditions on"):
        conditional.following(made, conditions[:1], np.zeros(50, int))


def test_fid_by_class_finds_the_class_that_is_wrong():
    labels = np.repeat(["a", "b", "c"], 60)
    real = feature_set(RNG.normal(size=(180, 4)), **{"class": labels})
    shift = np.where(labels == "b", 5.0, 0.0)[:, None]
    made = feature_set(RNG.normal(size=(180, 4)) + shift, **{"class": np.where(labels == "c", "d", labels)})
    measures, warnings = conditional.per_class(made, real, "class", (None, None))
    values = {each.title: each.value for each in measures}
    assert values["FID, class b"] == pytest.approx(100, rel=0.15)
    assert values["FID, class a"] < 2
    assert warnings == ["classes in one set only, left out: c, d."]
    assert not measures[0].invalid
    few, _ = conditional.per_class(
        made, feature_set(RNG.normal(size=(3, 4)), **{"class": ["a"] * 3}), "class", (None,) * 2
    )
    assert "3 images, 4 dimensions" in few[0].invalid
    with pytest.raises(UserError, match="does not tell the 'grade'"):
        conditional.per_class(made, real, "grade", (None, None))


def test_clip_score_is_a_hundred_cosines():
    images, captions = RNG.normal(size=(20, 8)), RNG.normal(size=(20, 8))
    expected = torch.nn.functional.cosine_similarity(*map(torch.from_numpy, (images, captions))).clamp(min=0).mean()
    measures = conditional.clip_score(images, captions, None)
    assert measures[0].value == pytest.approx(100 * float(expected))
    assert conditional.clip_score(images, images, None)[0].value == pytest.approx(100)


def test_calibration_of_scores():
    score = RNG.uniform(size=4000)
    good = pd.DataFrame({"score": score, "target": (RNG.uniform(size=4000) < score).astype(float)})
    measures = {each.name: each for each in conditional.calibration(good).measures}
    assert measures["calibration_error"].value < 0.03
    assert measures["auroc"].value == pytest.approx(5 / 6, abs=0.02)  # of p drawn uniformly
    assert measures["auroc"].low < 5 / 6 < measures["auroc"].high
    sure = good.assign(score=good["score"].round() * 0.98 + 0.01, score_0=0.2, score_1=0.6)
    measures = {each.name: each for each in conditional.calibration(sure).measures}
    assert measures["calibration_error"].value == pytest.approx(0.25, abs=0.03)
    assert measures["disagreement"].value == pytest.approx(0.2)
    with pytest.raises(UserError, match=r"needs the column 'target'.*did you mean 'targets'"):
        conditional.calibration(good.rename(columns={"target": "targets"}))
    with pytest.raises(UserError, match="number from 0 to 1; row 2 has '7"):
        conditional.calibration(good.assign(score=7))


def test_a_patients_positives_and_negatives_are_drawn_together():
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(30), 20)
    shift = rng.normal(scale=0.15, size=30)[groups]  # one patient's images all score higher
    target = np.tile([0.0, 1.0], 300)
    score = (0.5 + 0.1 * (target - 0.5) + shift + rng.normal(scale=0.05, size=600)).clip(0, 1)
    table = pd.DataFrame({"score": score, "target": target})
    found = next(each for each in conditional.calibration(table, groups).measures if each.name == "auroc")
    drawn = []
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(30, size=30)])
        drawn.append(conditional.auroc(score[rows][target[rows] == 1], score[rows][target[rows] == 0]).value)
    assert found.high - found.low == pytest.approx(np.diff(np.percentile(drawn, (2.5, 97.5)))[0], rel=0.25)


def test_auroc_and_its_interval_are_those_of_all_pairs():
    above, below = RNG.normal(size=60).round(1) + 0.5, RNG.normal(size=50).round(1)
    found = conditional.auroc(above, below)
    pairs_of = (above[:, None] > below).astype(float) + 0.5 * (above[:, None] == below)
    assert found.value == pytest.approx(pairs_of.mean())
    assert np.allclose(found.generated, pairs_of.mean(1) - pairs_of.mean())
    assert np.allclose(found.real, pairs_of.mean(0) - pairs_of.mean())


# ------------------------------------------------------------------------------------------------------- memorisation


def spread(count):
    return RNG.normal(size=(count, 12))


def test_copies_are_caught_and_new_images_are_not():
    train, held_out = spread(300), feature_set(spread(100))
    copies = train[RNG.integers(32, size=80)] + 0.05 * spread(80)
    found = memorisation(feature_set(copies), held_out, feature_set(train))
    assert found.verdict == "memorises"
    assert {each.name: each.value for each in found.measures}["close_share"] == 1
    assert len(found.copies) == 80
    assert len(found.repeats) > 20  # of 32 images, several are made more than once
    fresh = memorisation(feature_set(spread(80)), held_out, feature_set(train))
    assert fresh.verdict == "no sign"
    assert fresh.measures[0].low < 0.5 < fresh.measures[0].high
    some = np.concatenate([copies[:6], spread(74)])
    assert set(range(6)) <= set(memorisation(feature_set(some), held_out, feature_set(train)).copies)


def test_the_nearest_training_image_and_equal_pixels_are_named():
    train = feature_set(spread(40))
    digests = np.array([bytes([i]) * 32 for i in range(40)], "V32")
    made = feature_set(train.values[[7, 9, 3]] + 1e-3)
    found = nearest(made, train)
    assert found.row[:, 0].tolist() == [7, 9, 3]
    assert not found.same.any()
    train = FeatureSet(train.values, train.table, train.about, digests)
    made = FeatureSet(spread(3), made.table, made.about, np.array([digests[5], b"\xff" * 32, digests[6]], "V32"))
    found = memorisation(made, feature_set(spread(30)), train)
    assert found.generated.row[[0, 2], 0].tolist() == [5, 6]
    assert found.generated.same.tolist() == [True, False, True]
    assert found.verdict == "memorises"


def test_held_out_images_that_are_in_the_training_set_hide_nothing():
    train = spread(300)
    copies = feature_set(train[RNG.integers(300, size=80)] + 0.05 * spread(80))
    mixed = feature_set(np.concatenate([train[:20], spread(100)]))
    found = memorisation(copies, mixed, feature_set(train))
    assert found.limit > 0.01
    assert found.verdict == "memorises"
    assert "20 held-out images" in found.measures[3].note


def test_a_model_of_one_image_repeats_itself():
    made = 3 * spread(1) + 1e-3 * spread(20)
    found = memorisation(feature_set(made), feature_set(spread(100)), feature_set(spread(300)))
    assert len(found.repeats) >= 10


def test_memorisation_needs_held_out_images():
    train = feature_set(spread(60))
    with pytest.raises(UserError, match="needs 20 held-out images"):
        memorisation(feature_set(spread(9)), feature_set(spread(9)), train)
    digests = np.array([bytes([i]) * 32 for i in range(60)], "V32")
    same = FeatureSet(train.values, train.table, train.about, digests)
    with pytest.raises(UserError, match="60 of 60 images of made are in the training set"):
        memorisation(feature_set(spread(9)), same, same)


# -------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.slow
def test_pairs_agree_with_scikit_image(region):
    a = region[:256, :256]
    b = (a + RNG.normal(scale=12, size=a.shape)).clip(0, 255).astype(np.uint8)
    found = pairs.measure(a, b)
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-6)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert found["ssim"] == pytest.approx(structural_similarity(a, b, channel_axis=-1, **settings), rel=1e-2)
    assert 0.5 < found["ms_ssim"] < 1
    same = pairs.measure(a, a)
    assert (same["psnr"], same["mae"]) == (pairs.IDENTICAL, 0)
    assert same["ssim"] == pytest.approx(1)
    assert same["mutual_information"] > 1.5 * found["mutual_information"]
    grey = a.mean(-1)
    share = np.bincount((grey.ravel() // 4).astype(int), minlength=64) / grey.size
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert same["mutual_information"] == pytest.approx(entropy, rel=1e-6)  # what an image says of itself
    assert np.isnan(pairs.measure(a[:100, :100], b[:100, :100])["ms_ssim"])
    assert pairs.mutual_information(a, RNG.permutation(a.reshape(-1, 3)).reshape(a.shape)) < 0.1


def test_stains_are_told_apart(region):
    from skimage.color import combine_stains, rgb_from_hed, separate_stains

    a = region[200:400, 200:400]
    stains = separate_stains(a, pairs.hed_from_rgb)
    stains[..., 1] = stains[::-1, ::-1, 1]  # another eosin, the same haematoxylin
    b = (combine_stains(stains, rgb_from_hed) * 255).clip(0, 255).astype(np.uint8)
    found = pairs.stain_similarity(a, b)
    assert found["ssim_haematoxylin"] > found["ssim_eosin"] + 0.2


def test_pairs_of_folders(region, tmp_path):
    for name, shift in (("made", 10), ("real", 0)):
        (tmp_path / name).mkdir()
        for i in range(3):
            tile = region[300 + 64 * i : 364 + 64 * i, 300:364].astype(int) + shift
            Image.fromarray(tile.clip(0, 255).astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    files = [(tmp_path / "made" / f"{i}.png", tmp_path / "real" / f"{i}.png") for i in range(3)]
    found, warnings = pairs.compare(files, perceptual=lambda x, y: (x - y).abs().mean())
    assert found["mae"].max() <= 10
    assert found["lpips"] == pytest.approx(found["mae"] / 127.5, rel=1e-4)
    assert warnings == ["3 of 3 pairs are smaller than 161 px: they have no MS-SSIM."]
    Image.fromarray(region[300:364, 300:364].mean(-1).astype(np.uint8)).save(files[2][0])
    found, warnings = pairs.compare(files)
    assert "1 of 3 pairs hold a grey image" in warnings[0]
    assert np.isnan(found["ssim_eosin"]).tolist() == [False, False, True]
    Image.fromarray(region[:50, :64]).save(files[1][0])
    with pytest.raises(UserError, match="64 x 50 px and 64 x 64 px; a pair is of one size"):
        pairs.compare(files)
    names, warnings = pairs.pair_up({"a": files[0][0], "b": files[1][0]}, {"a": files[0][1]})
    assert names == ["a"]
    assert "1 generated images have no partner" in warnings[0]
    with pytest.raises(UserError, match="no two images have the same name"):
        pairs.pair_up({"a": files[0][0]}, {"b": files[0][1]})


# ------------------------------------------------------------------------------------------------------- large images


@pytest.fixture(scope="module")
def large(region, tmp_path_factory):
    """The real region; with a tile lattice of another tone; drifting to the right; one window repeated."""
    folder = tmp_path_factory.mktemp("large")
    rows, cols = np.mgrid[:1024, :1024]
    lattice = ((rows // 128 + cols // 128) % 2 * 14 - 7)[..., None]
    drift = (cols / 1024 * 60 - 30)[..., None] * np.array([1, 0, -1])
    images = {"real": region, "seams": region + lattice, "drift": region - drift}
    images["repeated"] = np.tile(region[300:428, 500:628], (8, 8, 1))
    for name, image in images.items():
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    return {name: open_image(folder / f"{name}.png") for name in images}


def test_seams_show_where_they_are(large):
    real, seams = (
        {each.name: each for each in large_images.seam_measures(line_gradients(large[name].bands()), 128)}
        for name in ("real", "seams")
    )
    assert seams["seams"].value > real["seams"].value + 0.2
    assert "borders show" in seams["seams"].note
    assert "borders show" not in real["seams_like"].note
    assert large_images.seam_measures(line_gradients(large["real"].bands()), 600) == []


def test_tone_drift_is_told_from_tissue(large):
    real, drifting = (large_images.tone(large[name], 128) for name in ("real", "drift"))
    assert drifting.drift > real.drift + 8
    assert drifting.drift > drifting.high
    assert real.colours.shape == (8, 8, 3)
    plain = large_images.tone(large["real"], 1024)
    assert np.isnan(plain.drift)


def test_repetition_is_seen():
    features = RNG.normal(size=(8, 8, 16))
    random = large_images.repetition(features)
    assert random.strongest < 0.3
    every_third = np.tile(features[:, :3], (1, 3, 1))[:, :8]
    found = large_images.repetition(every_third)
    assert found.strongest > 0.9
    assert found.lag == (0, 3)
    assert found.closest == pytest.approx(1, abs=1e-6)
    assert found.map.shape == (15, 15)
    assert found.map[7, 7] == pytest.approx(1)
    assert np.allclose(found.map, found.map[::-1, ::-1], equal_nan=True)
    holes = features.copy()
    holes[2:5, 1:7] = np.nan
    assert large_images.repetition(holes).strongest < 0.4
    with pytest.raises(UserError, match="repetition needs 6 windows"):
        large_images.repetition(np.full((3, 3, 2), np.nan))


def test_large_images_of_all_kinds_are_read_alike(region, tmp_path):
    from ldm.images.write import save_bigtiff, save_ome_zarr

    Image.fromarray(region[:300, :280]).save(tmp_path / "x.png")
    save_bigtiff(tmp_path / "x.tif", region[:300, :280], 0.5, {}, quality=100)
    save_ome_zarr(tmp_path / "x.ome.zarr", region[:300, :280], 0.5, {})
    images = [open_image(tmp_path / name) for name in ("x.png", "x.tif", "x.ome.zarr")]
    assert [image.dimensions for image in images] == [(280, 300)] * 3
    parts = [image.read(10, 20, 100, 60).astype(int) for image in images]
    assert np.array_equal(parts[0], parts[2])
    assert np.abs(parts[0] - parts[1]).mean() < 3
    assert images[2].mpp == pytest.approx(0.5)
    assert images[1].mpp == pytest.approx(0.5, rel=1e-3)
    assert np.array_equal(np.concatenate(list(images[0].bands())), region[:300, :280])
    with pytest.raises(UserError, match="no OME-Zarr image"):
        open_image(tmp_path)
