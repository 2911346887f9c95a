"""Distances over features: closed forms, agreement with the reference libraries, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.metrics import frechet, kernels, manifold
from ldm.metrics.intervals import Estimate, choose_unit, drawn_means, groups_of

RNG = np.random.default_rng(7)


def sets(n=400, m=300, dim=24, shift=0.4, seed=1):
    """Two sets of correlated features, the second one moved and stretched."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) / dim**0.5
    x = rng.normal(size=(n, dim)) @ mix
    y = (rng.normal(size=(m, dim)) * np.linspace(0.7, 1.4, dim)) @ mix + shift
    return x.astype(np.float32), y.astype(np.float32)


# ----------------------------------------------------------------------------------------------------- closed forms


def test_frechet_distance_of_gaussians_is_the_analytic_one():
    dim = 6
    turn = np.linalg.qr(RNG.normal(size=(dim, dim)))[0]
    a, b = np.linspace(0.5, 3, dim), np.linspace(2, 0.1, dim)
    mean = RNG.normal(size=dim)
    moved, still = frechet.Moments(mean, turn * a**0.5, 0), frechet.Moments(0 * mean, turn * b**0.5, 0)
    own = frechet.frechet_distance(moved, still)
    assert own == pytest.approx(mean @ mean + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-10)  # commuting covariances
    flat = frechet.Moments(0 * mean, np.diag([1.0, 2.0, 0, 0, 0, 0]), 0)  # a singular one too
    round_ = frechet.Moments(0 * mean, np.eye(dim), 0)
    assert frechet.frechet_distance(flat, round_) == pytest.approx(0 + 1 + 4, rel=1e-10)


def test_fid_of_many_gaussian_features_nears_the_analytic_distance():
    x = RNG.normal(size=(60_000, 8)) * 2 + 1
    y = RNG.normal(size=(60_000, 8))
    assert frechet.fid(x, y).value == pytest.approx(8 * (1 + 1), rel=0.02)


@pytest.mark.parametrize("count", [500, 12])  # more and fewer images than dimensions
def test_identical_sets_have_no_distance(count):
    x = (RNG.normal(size=(count, 30)) @ RNG.normal(size=(30, 30))).astype(np.float32)
    scale = frechet.moments(x).trace
    assert abs(frechet.fid(x, x[::-1]).value) < 1e-9 * scale
    assert abs(kernels.cmmd(x, x).value) < 1e-9
    found = {name: each.value for name, each in manifold.prdc(x, x).items()}
    assert found["precision"] == found["recall"] == found["coverage"] == 1


def test_kid_is_unbiased():
    x = [RNG.normal(size=(40, 8)).astype(np.float32) for _ in range(600)]
    values = np.array([kernels.kid(a, b).value for a, b in zip(x[::2], x[1::2])])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    assert (values < 0).any()
    assert values.std() > 0
    biased = [
        kernels.discrepancy(kernels.polynomial, *map(torch.from_numpy, pair), unbiased=False).value
        for pair in zip(x[:40:2], x[1:40:2])
    ]
    assert np.mean(biased) > 3 * values.std()  # the test can tell


def test_kid_of_subsets_has_the_mean_of_all_pairs():
    x, y = sets(900, 800)
    whole = kernels.kid(x, y)
    parts = kernels.kid(x, y, subsets=60, subset_size=200, all_pairs=100)
    assert parts.value == pytest.approx(whole.value, rel=0.03)
    assert np.corrcoef(parts.generated, whole.generated)[0, 1] > 0.8


def test_prdc_of_constructed_sets():
    line = np.arange(10.0)[:, None] * [1.0, 0.0]  # neighbours at distance 1: radii 1 inside, for k=2, 2 at the ends
    near, far = line + np.array([0.0, 0.5]), line + np.array([0.0, 100.0])
    found = {name: each.value for name, each in manifold.prdc(near, line, neighbours=2).items()}
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    # x within 1 of i ("<=" of radius 1, at distance 0.5 up and i across): itself only; end balls have radius 2
    assert found["density"] == pytest.approx((10 + 2) / 10 / 2)
    found = {name: each.value for name, each in manifold.prdc(far, line, neighbours=2).items()}
    assert set(found.values()) == {0}
    half = np.concatenate([line[:5], far[:5]])
    found = {name: each.value for name, each in manifold.prdc(half, line, neighbours=1).items()}
    assert found["precision"] == 0.5
    assert found["coverage"] == 0.6  # the sixth touches the fifth at its radius
    one = np.repeat(line[:1], 10, 0) + np.arange(10)[:, None] * 1e-6  # a generator of one image
    found = {name: each.value for name, each in manifold.prdc(one, line, neighbours=1).items()}
    assert found["precision"] == 1
    assert found["recall"] == 0.1


@pytest.mark.slow
def test_fd_infinity_takes_the_bias_away():
    errors, left = [], []
    for seed in range(8):
        x, y = (np.random.default_rng([seed, i]).normal(size=(400, 40)) for i in range(2))
        whole = frechet.fid(x, y)
        errors.append(whole.value)
        left.append(frechet.fd_infinity(*frechet.fid_by_size(x, y), whole).value)
    assert np.mean(errors) > 2  # the true distance is 0
    assert abs(np.mean(left)) < 0.15 * np.mean(errors)


@pytest.mark.slow
def test_fd_infinity_of_many_images_is_surer_than_their_subsets(monkeypatch):
    monkeypatch.setattr(frechet, "SKETCH", 200)
    left = []
    for seed in range(6):
        x, y = (np.random.default_rng([seed, i]).normal(size=(1600, 60)) for i in range(2))
        whole = frechet.fid(x, y)
        left.append(frechet.fd_infinity(*frechet.fid_by_size(x, y, seed), whole).value / whole.value)
    assert np.abs(left).max() < 0.3  # of the bias that FID has


# --------------------------------------------------------------------------------------- agreement with the libraries


@pytest.mark.parametrize("n", [400, 20])
def test_fid_agrees_with_torchmetrics(n):
    from torchmetrics.image.fid import _compute_fid

    x, y = sets(n, n + 10)
    means = [torch.from_numpy(part.mean(0, dtype=np.float64)) for part in (x, y)]
    covariances = [torch.from_numpy(np.cov(part.astype(float), rowvar=False)) for part in (x, y)]
    expected = float(_compute_fid(means[0], covariances[0], means[1], covariances[1]))
    assert frechet.fid(x, y).value == pytest.approx(expected, rel=1e-3)


def test_kid_agrees_with_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    x, y = sets(300, 300)
    expected = float(poly_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double()))
    assert kernels.kid(x, y).value == pytest.approx(expected, rel=1e-3)


def test_distances_agree_with_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    assert fidelity
    x, y = (torch.from_numpy(part) for part in sets(300, 300))
    statistics = [metric_fid.fid_features_to_statistics(part) for part in (x, y)]
    expected = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet.fid(x.numpy(), y.numpy()).value == pytest.approx(expected, rel=1e-3)
    expected = metric_kid.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=300, verbose=False)
    found = kernels.kid(x.numpy(), y.numpy()).value
    assert found == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    expected = metric_prc.prc_features_to_metric(x, y, prc_neighborhood=3, prc_batch_size=128, verbose=False)
    found = manifold.prdc(x.numpy(), y.numpy(), neighbours=3)
    assert 0 < found["precision"].value < 1
    for name in ("precision", "recall"):
        assert found[name].value == pytest.approx(expected[name], rel=1e-3)


def test_distances_agree_with_clean_fid():
    clean = pytest.importorskip("cleanfid.fid")
    x, y = sets(300, 300)
    expected = clean.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert frechet.fid(x, y).value == pytest.approx(expected, rel=1e-3)
    expected = clean.kernel_distance(x.astype(float), y.astype(float), num_subsets=1, max_subset_size=300)
    assert kernels.kid(x, y).value == pytest.approx(expected, rel=1e-3)


def test_cmmd_is_the_published_formula():
    x, y = sets(80, 90)
    x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (x.astype(float), y.astype(float)))
    kernel = [np.exp(-((a[:, None] - b) ** 2).sum(-1) / 200).mean() for a, b in ((x, x), (y, y), (x, y))]
    assert kernels.cmmd(3 * x, y).value == pytest.approx(1000 * (kernel[0] + kernel[1] - 2 * kernel[2]), rel=1e-6)


# --------------------------------------------------------------------------------------------------------- intervals


def measured(name, x, y):
    if name in ("fid", "kid", "cmmd"):
        return {"fid": frechet.fid, "kid": kernels.kid, "cmmd": kernels.cmmd}[name](x, y)
    return manifold.prdc(x, y)[name]


@pytest.mark.parametrize("name", ["fid", "kid", "cmmd", "precision", "coverage"])
@pytest.mark.slow
def test_intervals_are_as_wide_as_the_figure_varies(name):
    values, widths = [], []
    population = sets(20_000, 20_000, dim=10, shift=0.3, seed=3)
    for seed in range(40):
        draw = np.random.default_rng(seed).choice  # both sets anew from large populations
        x, y = (part[draw(len(part), n, replace=False)] for part, n in zip(population, (400, 350)))
        found = measured(name, x, y)
        low, high = found.interval(draws=400)
        values.append(found.value)
        widths.append((high - low) / (2 * 1.96))
    assert np.mean(widths) == pytest.approx(np.std(values), rel=0.4)


def test_influence_of_fid_is_its_derivative():
    for n, dim in ((200, 20), (40, 60)):  # more and fewer images than dimensions
        x, y = sets(n, 120, dim=dim)
        found = frechet.fid(x, y)
        more = np.concatenate([np.repeat(x, 50, 0), x[:1]])  # image 0 weighs 51/50 of the others
        again = frechet.fid(np.repeat(x, 50, 0), y)
        change = (frechet.fid(more, y).value - again.value) * (50 * n + 1)
        assert found.generated[0] == pytest.approx(change, rel=0.12, abs=0.02 * abs(found.generated).max())


def test_groups_widen_intervals_and_are_chosen_by_what_is_known():
    import pandas as pd

    values = np.repeat(RNG.normal(size=20), 30)
    groups = np.repeat(np.arange(20), 30)
    whole = Estimate(0.0, values - values.mean())
    alone, together = whole.interval(), whole.interval(generated=groups)
    assert together[1] - together[0] > 4 * (alone[1] - alone[0])
    assert drawn_means(values, None, 7, np.random.default_rng(0)).shape == (7,)
    many = RNG.gamma(2.0, size=1500)
    drawn = drawn_means(many, None, 4000, np.random.default_rng(0))
    assert drawn.std() == pytest.approx(many.std() / len(many) ** 0.5, rel=0.05)
    assert drawn.mean() == pytest.approx(many.mean(), rel=0.01)

    table = pd.DataFrame({"name": map(str, range(600)), "slide": groups, "patient": "one"})
    unit, warnings = choose_unit([table])
    assert unit == "slide"
    assert "1 patient: intervals draw slides" in warnings[0]
    only = table.drop(columns="slide")
    unit, warnings = choose_unit([table, only])
    assert unit == "image"
    assert "1 patient:" in warnings[0]
    assert groups_of(table, "image") is None
    with pytest.raises(UserError, match="by patient need 2 patients"):
        choose_unit([table], "patient")
