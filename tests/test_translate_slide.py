"""A slide becomes a slide in parts: as the image in memory does, whatever was done before, by several processes."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import tiny_model
from PIL import Image
from test_slide_engine import files, ranks, run, small_shards

import ldm
from ldm.commands.translate_slide import Region
from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.images.marks import read_mark
from ldm.images.slides import Slide, open_image
from ldm.images.write import save_image
from ldm.model_folder import write_model_folder
from ldm.sampling.bands import Bands
from ldm.sampling.canvas import decode_canvas
from ldm.sampling.sampler import Inversion, Sampler
from ldm.sampling.slide_translation import SlideTranslation
from ldm.sampling.stream import stream

MODEL = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {
        "unet_config": {
            "target": "ldm.networks.unet.UNetModel",
            "params": {
                "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 16, "num_res_blocks": 1,
                "channel_mult": [1, 2], "attention_resolutions": [], "num_heads": 2, "norm_groups": 4,
                "context_dim": 16, "use_spatial_transformer": True,
            },
        },
        "first_stage_config": {
            "target": "ldm.autoencoder.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "ddconfig": {
                    "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8,
                    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "num_groups": 4,
                    "mid_attention": False,
                },
            },
        },
        "cond_stage_config": {
            "target": "ldm.conditioners.class_token.ClassEmbedder",
            "params": {"classes": ["he", "ki67"], "dim": 16, "key": "stain", "dropout": 0.1},
        },
        "use_ema": False,
    },
}  # fmt: skip


def tissue(height: int, width: int) -> np.ndarray:
    """Smooth colours (height,width,3) uint8."""
    small = np.random.default_rng(0).integers(0, 255, (height // 7, width // 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("start", ["invert", "noise"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "unipc"])
def test_bands_are_the_image_in_memory_bit_by_bit(tmp_path, solver, start):
    model, pixels = tiny_model(), tissue(88, 72)
    source, target = model.condition(class_="A"), model.condition(class_="B")
    sampler = Sampler(steps=4, solver=solver, progress=False, guidance_scale=2.0, batch_size=1)
    inversion = Inversion(start=start, strength=0.75)
    image = torch.from_numpy(pixels.copy()).movedim(-1, 0)[None].float() / 127.5 - 1
    whole = ldm.translate(model, image, source, target, sampler, inversion)

    way = SlideTranslation.of(
        model, (88, 72), lambda rows, cols: pixels[rows, cols], tmp_path / "encoded", source, target, sampler, inversion
    )
    bands = Bands(tmp_path / "canvas", way.size, way.start, 16)
    step = stream(way, bands, torch.device("cpu"), 1, progress=False)
    made = decode_canvas(model, bands.part(step, slice(0, way.size[0])), False)
    assert torch.equal(made.clamp(-1, 1), whole)


def test_a_region_is_read_in_parts_as_at_once():
    slide = Slide.of_pixels(tissue(300, 420), mpp=0.25)
    region = Region.of(slide, (40, 20, 320, 240), 0.5)
    assert (region.size, region.step) == ((120, 160), 2.0)
    whole = region.read(slice(0, 120), slice(0, 160)).astype(int)
    part = region.read(slice(37, 90), slice(51, 140)).astype(int)
    assert np.abs(part - whole[37:90, 51:140]).max() <= 1
    there = slide.read(40, 20, 320, 240, (160, 120)).astype(int)  # the places are those of the slide
    assert np.abs(whole - there)[4:-4, 4:-4].max() <= 1
    assert Region.of(slide, None, 0.2501).step == 1
    with pytest.raises(UserError, match="reaches outside of image, 420 x 300 px"):
        Region.of(slide, (400, 0, 40, 40), None)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model of stains, and a slide whose sides no latent divides."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = instantiate_from_config(MODEL)
    write_model_folder(folder / "model", MODEL, model.state_dict(), {"tile_size": 16, "mpp": 0.5})
    save_image(folder / "he.tif", tissue(141, 95), {"x": 1}, 0.5)
    return folder


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiles and shards so small that little slides have several; one thread, as each part of a slide has."""
    small_shards(monkeypatch)
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(cores)


def words(world: Path, out: Path, *more: object) -> list[str]:
    given = ["translate", "--model", world / "model", "--images", world / "he.tif", "--source", "stain=he", "--target",
             "stain=ki67", "--steps", 3, "--guidance-scale", 2, "--device", "cpu", "--out", out, *more]  # fmt: skip
    return [str(word) for word in given]


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        assert run(*words(world, folder / "a.ome.zarr")) == 0
    return folder


def test_a_slide_keeps_its_size_its_scale_and_its_place(world, reference):
    slide = open_image(reference / "a.ome.zarr")
    assert slide.dimensions == (95, 141)
    assert slide.mpp == 0.5
    told = read_mark(reference / "a.ome.zarr", whole=True)
    assert (told["source"], told["condition"]) == ("he.tif", "he.tif as stain-ki67")
    model = ldm.load_model(world / "model")
    pixels = open_image(world / "he.tif").read(0, 0, 95, 141)
    image = torch.tensor(pixels).movedim(-1, 0)[None]
    source, target = (model.condition(stain=name) for name in ("he", "ki67"))
    sampler = Sampler(steps=3, guidance_scale=2.0, progress=False)
    made = ldm.translate(model, image.float() / 127.5 - 1, source, target, sampler)
    there = slide.read(0, 0, 95, 141).astype(int)
    apart = np.abs(there - ldm.to_uint8(made)[0])  # the slide is encoded and decoded in parts with a halo
    assert apart.max() <= 8
    assert apart.mean() < 0.1


def test_any_number_of_processes_makes_the_same_bytes(world, reference, tmp_path):
    given = words(world, tmp_path / "out" / "a.ome.zarr")
    done = ranks(tmp_path / "logs", *[lambda: run(*given)] * 2)
    assert [code for code, _ in done] == [0, 0], done
    assert files(tmp_path / "out") == files(reference)


def test_killed_at_any_moment_it_goes_on(world, reference, tmp_path):
    out, fork = tmp_path / "killed" / "a.ome.zarr", multiprocessing.get_context("fork")
    for wanted in ("encoded/step-0001", "step-0001/00000.npy", "step-0003", "levels.ome.zarr/0/c"):
        process = fork.Process(target=lambda: os._exit(run(*words(world, out))))
        process.start()
        while process.is_alive() and not [*out.parent.glob(f".slide-*/{wanted}")]:
            time.sleep(0.001)
        process.kill()
        process.join()
    assert run(*words(world, out)) == 0
    assert files(out.parent) == files(reference)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target", "stain=he"], "there are 2 targets and --out is one slide, a.tif; give one target"),
        (["--count", 2], "count: that is of images, not of a slide; leave the option out"),
        (["--region", "0,0,200,40"], "the region 0,0,200,40 reaches outside of .*he.tif, 95 x 141 px"),
        (["--region", "0,0,12,40"], "smaller than the model's tile of 16 px"),
        (["--solver", "heun"], "which the solver 'heun' does not allow"),
        (["--exact"], "exact is of images in memory, not of slides; leave it out"),
        (["--differences"], "--out a.tif is a slide"),
        (["--axis", "axial"], "--out a.tif is a slide"),
    ],
)
def test_what_is_not_of_slides_is_one_message(world, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    assert run(*words(world, Path("a.tif"), *more)) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not [*tmp_path.iterdir()]
