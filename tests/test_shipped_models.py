"""The small models that come with the repository: they load, say what they are, and do what they were trained for."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

import ldm
from conftest import ROOT
from ldm.cli import app
from ldm.data.collection import read_pictures
from ldm.data.volumes import Volume
from ldm.metrics.fields import neighbour_correlation

MODELS = ROOT / "data" / "models"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


MADE = [
    "demo-ssl", "demo-ssl-student", "demo-field", "demo-mitosis", "demo-stains", "demo-slices",
    "demo-slices-pairs", "demo-omics", "demo-text",
]  # fmt: skip


@pytest.mark.parametrize("name", MADE)
@pytest.mark.slow
def test_a_model_says_what_it_is_and_the_data_page_lists_it(name):
    told = run("describe", MODELS / name).output
    assert "licence: MIT" in told or name.startswith("demo-ssl")
    assert f"`models/{name}/`" in (ROOT / "data" / "README.md").read_text()


def test_the_models_are_small():
    assert sum(path.stat().st_size for path in MODELS.rglob("*.safetensors")) < 85e6


def test_a_field_has_tissue_glass_and_neighbours_that_belong_together():
    field = ldm.feature_field(ldm.load_model(MODELS / "demo-field"), (20, 24), ldm.Sampler(steps=8, progress=False))
    known = ~field.isnan().any(-1)
    assert 0.3 < known.float().mean() < 1
    assert neighbour_correlation(field.numpy(), 1)[0].value > 0.8


@pytest.mark.slow
def test_a_rising_score_darkens_and_spreads_the_mitotic_figure():
    model = ldm.load_model(MODELS / "demo-mitosis")
    cells = [
        ldm.sample(
            model,
            model.condition(score=score),
            8,
            sampler=ldm.Sampler(steps=6, guidance_scale=6.0, seed=1, progress=False),
        )
        for score in (0.0, 1.0)
    ]
    dark = [(images.mean(1) < -0.4).float().mean().item() for images in cells]  # share of dark pixels
    assert dark[1] > 1.3 * dark[0], dark


@pytest.mark.slow
def test_a_tile_translated_to_ki67_turns_blue_and_brown(tmp_path):
    region = tifffile.imread(ROOT / "data" / "pretrain" / "OS-1-detail.ome.tif")[900:1041, 100:241]
    tile = Image.fromarray(region).resize((32, 32), Image.Resampling.LANCZOS)  # about 1 um/px
    tile.save(tmp_path / "tile.png")
    run("translate", "--model", MODELS / "demo-stains", "--images", tmp_path / "tile.png", "--out", tmp_path / "out",
        "--source", "stain=he", "--target", "stain=ki67", "--guidance-scale", 2, "--steps", 8, "--mpp", 1)  # fmt: skip
    made = np.asarray(Image.open(next((tmp_path / "out").glob("tile__*.png"))).convert("RGB")).astype(float)
    before = np.asarray(tile).astype(float)
    violet = [float((image[..., 0] - image[..., 1]).mean()) for image in (before, made)]  # eosin is red, not green
    assert violet[0] > 25, violet
    assert violet[1] < violet[0] / 2, violet


@pytest.mark.slow
def test_a_tile_translated_to_the_other_cancer_is_stained_as_its_sample():
    model = ldm.load_model(MODELS / "demo-omics")
    path = ROOT / "data" / "samples" / "cancers" / "TCGA-CR-7395_1600,2400.png"
    region = np.asarray(Image.open(path).convert("RGB"))
    tiles = torch.stack([torch.from_numpy(region[100:164, x : x + 64].copy()) for x in (100, 500, 900)])
    tiles = tiles.permute(0, 3, 1, 2).float() / 127.5 - 1
    source, target = (model.condition(class_=name) for name in ("HNSC", "COAD"))
    made = ldm.translate(model, tiles, source, target, sampler=ldm.Sampler(steps=8, guidance_scale=2.0, progress=False))
    pink = [(images[:, 0] - images[:, 2]).mean().item() for images in (tiles, made)]  # red over blue
    assert pink[0] > 0.3, pink
    assert pink[1] < pink[0] / 2, pink


@pytest.mark.slow
def test_the_text_decides_what_an_image_shows():
    model = ldm.load_model(MODELS / "demo-text")
    made = {}
    for modality, text in (("H&E", "skin, many nuclei"), ("IHC", "Ki67, many nuclei"), ("MRI", "FLAIR, with tumour")):
        cond = model.condition(text=text, modality=modality)
        made[modality] = ldm.sample(
            model, cond, 4, sampler=ldm.Sampler(steps=6, guidance_scale=2.5, seed=0, progress=False)
        )
    colour = {name: (images.amax(1) - images.amin(1)).mean().item() for name, images in made.items()}
    bright = {name: images.mean().item() for name, images in made.items()}
    assert colour["MRI"] < 0.15 < colour["H&E"], colour
    assert bright["MRI"] < bright["H&E"] < bright["IHC"], bright


@pytest.mark.slow
def test_a_slice_of_another_contrast_keeps_its_head():
    model = ldm.load_model(MODELS / "demo-slices")
    rows, cols = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    radius = (rows**2 + (cols * 1.2) ** 2).sqrt()
    source = torch.where(radius < 0.6, 0.2 + 0.4 * torch.cos(9 * radius), -1.0)[None, None]
    made = ldm.sample(model, model.condition(image=source), sampler=ldm.Sampler(steps=6, seed=0, progress=False))
    inside, outside = made[0, 0][radius < 0.5].mean(), made[0, 0][radius > 0.8].mean()
    assert inside > outside + 0.5, (float(inside), float(outside))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "least"), [("t2", 0.55), ("flair", 0.35), ("t1post", 0.65)])
def test_a_head_that_trained_nothing_becomes_a_t1_that_is_like_its_own(source, least, tmp_path):
    head = ROOT / "data" / "samples" / "heads" / "patient19"
    run("translate", "--model", MODELS / "demo-slices-pairs", "--images", head / f"{source}.nii.gz",
        "--out", tmp_path / "t1.nii.gz", "--steps", 1)  # fmt: skip
    made, own, real = (Volume(path) for path in (tmp_path / "t1.nii.gz", head / f"{source}.nii.gz", head / "t1.nii.gz"))
    assert np.array_equal(made.own.affine, own.own.affine)
    values, real = made.values(), real.values()
    inside = (own.values() > 50) & (real > 50)
    assert np.corrcoef(values[inside], real[inside])[0, 1] > least
    assert not values[ndimage.binary_dilation(own.values() > 10, iterations=6) == 0].any()


@pytest.mark.slow
def test_the_sheets_of_a_command_are_no_images_of_its_output(tmp_path):
    out = tmp_path / "sequences"
    call = ["sequence", "--model", MODELS / "demo-mitosis", "--vary", "score=0:1:2"]
    run(*call, "--count", 2, "--steps", 1, "--out", out)
    pictures = read_pictures(out)
    assert len(pictures) == 4  # and grid.png beside them
    assert pictures.column("score") == [0, 1, 0, 1]
