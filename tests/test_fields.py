"""Fields of features: their first stage, crops of slides' grids, sampling of any size, the command, the measures."""

from __future__ import annotations

import copy
import json

import examples
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ldm
from data_prep.cohort_index import update_index
from data_prep.fit_feature_codec import fit, main
from data_prep.tile_slides import tile_slide
from ldm.autoencoder.feature_codec import FeatureCodec, fit_codec
from ldm.cli import app
from ldm.commands.grids import asked_grid
from ldm.config import instantiate_from_config
from ldm.data import dihedral
from ldm.data.datasets import NoTiles
from ldm.data.features import read_features
from ldm.data.field_crops import FieldCrops, lattice
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.metrics.fields import blocks_of, field_measures, neighbour_correlation
from ldm.model_folder import load_first_stage, write_model_folder
from ldm.rng import canvas_noise, generator
from ldm.sampling.feature_fields import TEXTURE

FAST = ldm.Sampler(steps=3, progress=False)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, demo_slide):
    """The demo slide at a stride of 128 px. Its features in orientation k are (x, y, k) of the tile, in strides."""
    folder = tmp_path_factory.mktemp("fields")
    path = tile_slide(demo_slide, folder, stride=128, min_tissue=0.1, keep_background=0.3)
    update_index(folder, holdout={demo_slide.name: (0, 1856, 2220, 512)})
    store = TileStore.open(path)
    rows = [[[*(xy / 128), k] for k in range(8)] for xy in store.coords]
    with ArrayWriter(path, "features/where", (8, 3), "f4", {"encoder": "where", "dihedral": True}) as writer:
        writer.append(np.array(rows))
    return folder


@pytest.fixture
def model():
    return examples.tiny_fields()


# --- the first stage ------------------------------------------------------------------------------------------------


def test_a_codec_of_all_the_variance_gives_features_and_holes_back():
    x = torch.randn(2, 6, 5, 4, generator=generator(0))
    codec, kept = fit_codec([x.permute(0, 2, 3, 1).reshape(-1, 6)], share=1.0)
    assert codec.channels == 7
    assert kept == pytest.approx(1)
    x[0, :, 1, 2] = torch.nan
    z = codec.encode(x)
    assert torch.equal(z[:, -1] < 0, x.isnan().any(1))
    torch.testing.assert_close(codec.decode(z), x, equal_nan=True)


def test_components_are_white_and_keep_the_share_that_is_asked_for():
    values = torch.randn(500, 8, generator=generator(1)) @ torch.randn(8, 8, generator=generator(2))
    codec, kept = fit_codec(values.split(100), share=0.8)
    z = codec.encode(values.T[None, :, :, None])[0, :-1, :, 0]                  # (K,500)
    torch.testing.assert_close(z @ z.T / 500, torch.eye(len(z)), atol=1e-4, rtol=0)
    lost = (codec.decode(codec.encode(values.T[None, :, :, None]))[0, :, :, 0].T - values).var(0, correction=0).sum()
    assert 1 - float(lost / values.var(0, correction=0).sum()) == pytest.approx(kept, abs=1e-4)
    fewer, less = fit_codec([values], share=0.5)
    assert fewer.channels < codec.channels
    assert 0.5 <= less < 0.8 <= kept


def test_what_components_leave_out_is_drawn_as_tiles_that_overlap_share_it():
    values = torch.randn(2000, 8, generator=generator(1)) @ torch.randn(8, 8, generator=generator(2))
    codec, kept = fit_codec([values], share=0.6)
    noise = torch.randn(1, codec.rest.shape[1], 203, 203, generator=generator(3))
    x = codec.texture(noise, overlap=4)[0]                                      # (D,200,200)
    left = values - codec.decode(codec.encode(values.T[None, :, :, None]))[0, :, :, 0].T
    drawn, wanted = torch.cov(x.flatten(1)), torch.cov(left.T)
    assert float((drawn - wanted).norm() / wanted.norm()) < 0.15
    assert float(drawn.trace() / torch.cov(values.T).trace()) == pytest.approx(1 - kept, abs=0.03)
    assert (codec.rest.T @ codec.components).abs().max() < 1e-5
    for lag in range(1, 6):
        shared = float((x[:, lag:] * x[:, :-lag]).sum() / (x[:, lag:].norm() * x[:, :-lag].norm()))
        assert shared == pytest.approx(max(1 - lag / 4, 0), abs=0.05)
    whole, _ = fit_codec([values], share=1.0)
    assert whole.rest is None


def test_a_field_of_a_model_that_draws_texture_is_its_own_and_texture(model):
    sampler = ldm.Sampler(steps=2, seed=3, progress=False)
    plain = ldm.feature_field(model, (6, 9), sampler)
    model = copy.deepcopy(model)
    codec = model.first_stage_model
    codec.rest = torch.randn(codec.dim, 5, generator=generator(4))
    model.metadata = {**model.metadata, "tile_size": 256, "field": {"stride": 64, "feature": "own"}}
    textured = ldm.feature_field(model, (6, 9), sampler)
    noise = canvas_noise(3, 5, 9, 12, stream=TEXTURE)
    wanted = plain + codec.texture(noise, 4)[0].permute(1, 2, 0)
    torch.testing.assert_close(textured, wanted, equal_nan=True)
    assert not torch.allclose(textured, plain, equal_nan=True)
    other = ldm.feature_field(model, (6, 9), ldm.Sampler(steps=2, seed=4, progress=False))
    assert not torch.allclose(textured, other, equal_nan=True)


def test_a_model_whose_tiles_overlap_without_end_draws_nothing(model):
    model = copy.deepcopy(model)
    model.first_stage_model.rest = torch.ones(model.first_stage_model.dim, 5)
    model.metadata = {**model.metadata, "tile_size": 65536, "field": {"stride": 1, "feature": "own"}}
    with pytest.raises(UserError, match="65536 over each other along a side, where 64 at most"):
        ldm.feature_field(model, (6, 9), FAST)


def test_a_codec_refuses_what_it_cannot_hold():
    with pytest.raises(UserError, match=r"above 0 and up to 1; got 1\.5"):
        fit_codec([torch.randn(4, 2)], 1.5)
    with pytest.raises(UserError, match="all the same"):
        fit_codec([torch.ones(4, 2)], 0.9)
    with pytest.raises(UserError, match=r"\(B, 3, rows, cols\); got \(1, 4, 2, 2\)"):
        FeatureCodec(3, 3).encode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(UserError, match="2 to 4 channels; got 9"):
        FeatureCodec(3, 9)


def test_a_codec_is_fitted_to_the_tiles_that_are_chosen_and_is_a_first_stage(cohort, tmp_path, capsys):
    main(["--store", str(cohort), "--where", "split=train", "--share", "0.99", "--out", str(tmp_path / "codec")])
    assert "components keep" in capsys.readouterr().out
    codec = load_first_stage(str(tmp_path / "codec"))
    store = TileStore.open(next((cohort / "slides").glob("*.zarr")))
    chosen = ldm_index(cohort)["split"] == "train"
    torch.testing.assert_close(codec.mean[:2], torch.from_numpy(store.coords[chosen] / 128).float().mean(0))
    glass = store.coords[store.labels("tissue") < 0.01] / 128
    torch.testing.assert_close(codec.glass[:2], torch.from_numpy(glass).float().mean(0))
    with pytest.raises(UserError, match=r"no features 'other'"):
        fit([cohort], tmp_path / "none", feature="other")


def ldm_index(cohort):
    from ldm.data.cohort import read_index

    return read_index(cohort)


# --- crops of grids -------------------------------------------------------------------------------------------------


def test_crops_show_the_tiles_that_lie_there_in_every_orientation(cohort):
    crops = FieldCrops(str(cohort), "where", 4, 50, dihedral=True)
    places = lattice(crops.tiles.stores[0])
    seen = set()
    for index in range(50):
        item = crops[(index, 1000 + index)]
        image = item["image"].numpy()
        known = ~np.isnan(image[0])
        k = int(image[2][known][0])
        seen.add(k)
        assert (image[2][known] == k).all()
        upright = dihedral.apply(image, (4 - k) % 4 if k < 4 else k)            # undo a turn; a flip undoes itself
        col, row = (item["coord"].numpy() // 128).tolist()
        here = places[row : row + 4, col : col + 4] >= 0
        rows, cols = np.nonzero(~np.isnan(upright[0]))
        assert np.array_equal(here, ~np.isnan(upright[0]))
        assert np.array_equal(upright[0][rows, cols], col + cols)
        assert np.array_equal(upright[1][rows, cols], row + rows)
    assert seen == set(range(8))
    assert torch.equal(crops[(3, 7)]["image"].nan_to_num(9), crops[(3, 7)]["image"].nan_to_num(9))


def test_crops_touch_no_tile_that_is_left_out_and_background_is_a_hole(cohort):
    crops = FieldCrops(str(cohort), "where", 3, 60, where={"split": "train"}, in_memory=True)
    store, index = crops.tiles.stores[0], ldm_index(cohort)
    out = {tuple(xy // 128) for xy in store.coords[index["split"] != "train"]}
    glass = {tuple(xy // 128) for xy in store.coords[store.labels("tissue") < 0.1]}
    assert out
    assert glass
    for i in range(60):
        image = crops[i]["image"].numpy()
        there = {tuple(image[:2, r, c].astype(int)) for r, c in np.argwhere(~np.isnan(image[0]))}
        assert len(there) >= 0.25 * 9
        assert not there & (out | glass)
    with pytest.raises(NoTiles, match="no crop of 40 x 40 tiles"):
        FieldCrops(str(cohort), "where", 40, 1)
    with pytest.raises(UserError, match="`least` above 0"):
        FieldCrops(str(cohort), "where", 4, 1, least=0)
    assert crops.metadata["field"] == {"feature": "where", "stride": 128}


def test_a_crop_has_the_condition_of_the_tile_in_its_middle(cohort):
    crops = FieldCrops(str(cohort), "where", 3, 1, conditions={"y": "y"})
    image, item = crops.crop(0, 5, 6)["image"], crops.crop(0, 5, 6)
    assert not image.isnan().any()
    assert item["y"] == 128 * image[1, 1, 1]


def test_a_training_reaches_every_weight_and_makes_pictures(cohort, model):
    torch.manual_seed(0)
    fields = instantiate_from_config(
        {
            "target": "ldm.latent_diffusion.LatentDiffusion",
            "params": {
                "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": {
                    "image_size": 4, "in_channels": 4, "out_channels": 4, "model_channels": 8, "num_res_blocks": 1,
                    "attention_resolutions": [], "channel_mult": [1, 2], "num_heads": 1, "norm_groups": 4}},
                "first_stage_config": {"target": "ldm.autoencoder.feature_codec.FeatureCodec",
                                       "params": {"dim": 3, "channels": 4}},
                "cond_stage_config": {"target": "ldm.conditioners.class_token.ClassEmbedder",
                                      "params": {"classes": ["train", "val", "none"], "dim": 32, "acts": "vector",
                                                 "dropout": 0.5, "key": "split"}},
            },
        }
    )  # fmt: skip
    crops = FieldCrops(str(cohort), "where", 4, 64, conditions={"split": "split"}, dihedral=True)
    items = [crops[(i, i)] for i in range(64)]
    batch = {"image": torch.stack([item["image"] for item in items]), "split": [item["split"] for item in items]}
    for parameter in fields.model.parameters():  # zero at the start, and in front of all others
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    fields.loss(batch, generator(0)).mean().backward()
    trained = [*fields.model.named_parameters(), *fields.cond_stage_model.named_parameters()]
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for _, each in trained)
    assert torch.isfinite(fields.loss(batch, generator(0))).all()
    shown = fields.log_images({"image": batch["image"], "split": batch["split"]}, n=2)
    assert set(shown) == {"inputs", "reconstructions", "samples", "samples_guided"}
    assert all(image.shape == (2, 3, 4, 4) and image.abs().max() <= 1 for image in shown.values())


# --- sampling -------------------------------------------------------------------------------------------------------


def test_a_field_of_any_size_depends_on_seed_and_condition_alone(model):
    field = ldm.feature_field(model, (9, 13), FAST, {"class": "A"})
    assert field.shape == (9, 13, 8)
    known = ~field.isnan().any(-1)
    assert known.any()
    assert not known.all()
    again = ldm.feature_field(model, (9, 13), ldm.Sampler(steps=3, progress=False, batch_size=2), {"class": "A"})
    torch.testing.assert_close(again, field, equal_nan=True, atol=1e-4, rtol=1e-4)
    assert ldm.feature_field(model, (3, 2), FAST).shape == (3, 2, 8)  # smaller than a window
    other = ldm.feature_field(model, (9, 13), ldm.Sampler(steps=3, progress=False, seed=1), {"class": "A"})
    assert not torch.equal(other.nan_to_num(9), field.nan_to_num(9))


def test_a_field_of_a_window_is_a_sample_of_it(model):
    field = ldm.feature_field(model, (4, 4), FAST)
    from ldm.diffusion.samplers import sample_dpmpp_2m

    sigmas = FAST.settled(model, "field").sigmas(model)
    x = sample_dpmpp_2m(model.denoiser(), canvas_noise(0, 4, 4, 4) * sigmas[0], sigmas, model.null_condition())
    torch.testing.assert_close(field, model.decode(x)[0].permute(1, 2, 0), equal_nan=True, atol=1e-4, rtol=1e-4)


def test_models_of_fields_and_of_images_are_told_apart(model):
    images = examples.tiny_model()
    with pytest.raises(UserError, match=r"makes images, not fields of features; configs/own/field\.yaml trains"):
        ldm.feature_field(images, (4, 4))
    for call in (
        lambda: ldm.sample(model, count=1),
        lambda: ldm.large_image(model, torch.zeros(2, 2, 8)),
        lambda: ldm.translate(model, torch.zeros(1, 3, 4, 4), target=model.condition(class_="A")),
    ):
        with pytest.raises(UserError, match="makes fields of features, not images: sample it by `histoldm field`"):
            call()
    for size in ((4,), (0, 4), (4, 2.5)):
        with pytest.raises(UserError, match=r"\(rows, cols\), 1 or more"):
            ldm.feature_field(model, size)
    with pytest.raises(UserError, match="has no condition 'organ'"):
        ldm.feature_field(model, (4, 4), conditions={"organ": "lung"})


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model of fields as a folder."""
    model, path = examples.tiny_fields(), tmp_path_factory.mktemp("model") / "tiny"
    unet = {
        "image_size": 4, "in_channels": 4, "out_channels": 4, "model_channels": 8, "num_res_blocks": 1,
        "attention_resolutions": [], "channel_mult": [1], "num_heads": 1, "norm_groups": 4,
    }  # fmt: skip
    node = {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": unet},
            "first_stage_config": {
                "target": "ldm.autoencoder.feature_codec.FeatureCodec",
                "params": {"dim": 8, "channels": 4, "glass": True},
            },
            "cond_stage_config": {
                "target": "ldm.conditioners.class_token.ClassEmbedder",
                "params": {"classes": ["A", "B"], "dim": 32, "acts": "vector"},
            },
            "use_ema": False,
        },
    }
    return write_model_folder(path, node, model.state_dict(), model.metadata)


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_command_writes_a_field_what_is_known_of_it_and_a_picture(folder, tmp_path):
    done = run("field", "--model", folder, "--size", "7,5", "--condition", "class=B", "--steps", 3, "--seed", 4,
               "--out", tmp_path / "field.npy")  # fmt: skip
    assert "7 x 5 tiles" in done.output
    assert "64 x 48 px" in done.output
    grid, known = read_features(tmp_path / "field.npy", dim=8).grid()
    made = ldm.feature_field(ldm.load_model(folder), (5, 7), ldm.Sampler(steps=3, seed=4), {"class": "B"})
    np.testing.assert_allclose(grid, made.numpy(), atol=2e-3, rtol=2e-3)
    about = json.loads((tmp_path / "field.json").read_text())
    assert about["stride"] == 8
    assert about["seed"] == 4
    assert about["condition"] == "class=B"
    assert len(about["glass"]) == 8
    picture = Image.open(tmp_path / "field.png")
    assert "SYNTHETIC" in picture.text
    shown = np.asarray(picture)[:: picture.height // 5, :: picture.width // 7]
    assert np.array_equal((shown == 255).all(-1) | known, np.ones((5, 7), bool))


def test_a_field_tells_how_large_its_image_is_and_what_its_glass_is(folder, tmp_path):
    run("field", "--model", folder, "--size", "7,5", "--steps", 3, "--out", tmp_path / "field.npy")
    grid = asked_grid(examples.tiny_model(), tmp_path / "field.npy", None, None, None)
    assert grid.size == (48, 64)
    assert grid.mpp == 0.5
    assert grid.background.shape == (8,)
    assert grid.features.shape == (5, 7, 8)
    (tmp_path / "field.json").unlink()
    plain = asked_grid(examples.tiny_model(), tmp_path / "field.npy", None, None, None)
    assert (plain.size, plain.background, plain.mpp) == (None, None, None)
    (tmp_path / "field.json").write_text('{"stride": "wide"}')
    with pytest.raises(UserError, match="stride"):
        asked_grid(examples.tiny_model(), tmp_path / "field.npy", None, None, None)


def test_describe_says_that_a_model_makes_fields(folder):
    told = run("describe", folder).output
    assert "fields of features, by crops of 4 x 4 tiles" in told
    assert "stride of a field: 8 px" in told


def test_commands_refuse_each_other_s_models(folder, tmp_path, models_folder):
    for args in (
        ("sample", "--count", 1, "--condition", "class=A", "--out", tmp_path / "tiles"),
        ("large-image", "--features", tmp_path / "grid.npy", "--out", tmp_path / "image.png"),
    ):
        error = run(args[0], "--model", folder, *args[1:]).exception
        assert "makes fields of features, not images" in str(error)
    stains = models_folder / "demo-stains"
    error = run("field", "--model", stains, "--size", "4,4", "--out", tmp_path / "f.npy").exception
    assert "makes images, not fields of features" in str(error)
    for size, out, told in (("4", "f.npy", "--size takes width,height"), ("4,4", "f.pt", "ends in .npy")):
        assert told in str(run("field", "--model", folder, "--size", size, "--out", tmp_path / out).exception)


@pytest.fixture
def models_folder():
    from conftest import ROOT

    return ROOT / "data" / "models"


# --- measures -------------------------------------------------------------------------------------------------------


def test_the_correlation_is_that_of_pairs_at_the_lag_without_holes():
    rng = np.random.default_rng(0)
    field = rng.normal(size=(6, 7, 3))
    field[2, 3] = np.nan
    centred = field - np.nanmean(field, (0, 1))
    pairs = [
        (centred[r, c], centred[r + 2 * down, c + 2 * (1 - down)])
        for down in (0, 1) for r in range(6 - 2 * down) for c in range(7 - 2 * (1 - down))
    ]  # fmt: skip
    pairs = [(a, b) for a, b in pairs if not np.isnan(a + b).any()]
    wanted = sum(a @ b for a, b in pairs) / sum((a @ a + b @ b) / 2 for a, b in pairs)
    estimate, blocks = neighbour_correlation(field, 2)
    assert estimate.value == pytest.approx(wanted)
    assert len(blocks) == len(pairs) == len(estimate.generated)
    low, high = estimate.interval(blocks)
    assert low < wanted < high
    with pytest.raises(UserError, match="needs 16 pairs"):
        neighbour_correlation(field, 6)


def test_measures_tell_a_field_that_is_scrambled_and_one_of_other_features():
    rng = np.random.default_rng(0)
    real = np.cumsum(np.cumsum(rng.normal(size=(20, 20, 4)), 0), 1) / 20
    real[:3] = np.nan
    scrambled = real.copy()
    known = ~np.isnan(real[..., 0])
    scrambled[known] = rng.permutation(real[known])
    found = {measure.name: measure for measure in field_measures(scrambled, real, lags=(1, 2))}
    assert found["fid"].value == pytest.approx(0, abs=1e-6)  # the same features
    assert found["correlation_1"].value < found["real_correlation_1"].low  # at other places
    assert found["tissue"].value == found["real_tissue"].value == pytest.approx(17 / 20)
    moved = {measure.name: measure for measure in field_measures(real + 3, real, lags=(1,))}
    assert moved["kid"].low > found["kid"].high
    assert moved["correlation_1"].value == pytest.approx(moved["real_correlation_1"].value)
    with pytest.raises(UserError, match="of 3 and of 4 values"):
        field_measures(real[..., :3], real)
    with pytest.raises(UserError, match="16 features or more"):
        field_measures(np.full((8, 8, 4), np.nan), real)


def test_blocks_are_squares():
    assert np.array_equal(blocks_of(np.ones((4, 4), bool), 2).reshape(4, 4)[::2, ::2], [[0, 1], [3, 4]])
