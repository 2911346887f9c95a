"""The same picture in every encoding, in every command that takes images: the same pixels, or the same refusal."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from typer.testing import CliRunner

from conftest import ROOT
from data_prep.import_captions import main as import_captions
from data_prep.tile_slides import tile_slide
from ldm.cli import app
from ldm.commands.translate import to_tensor
from ldm.config import instantiate_from_config
from ldm.data.collection import read_pictures
from ldm.data.image_sets import images_by_name, open_images
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.images.write import save_image
from ldm.metrics.pairs import compare
from ldm.model_folder import write_model_folder
from ldm.report.unlike import unlike
from ldm.requests.translations import AskedTranslations, pictures_and_plans
from ldm.scorers.labelled import read_labelled
from ldm.viewer.pictures import find
from ldm.viewer.server import Gallery

SIDE = 64
PICTURE = np.full((SIDE, SIDE, 3), 255, np.uint8)
PICTURE[8:56, 8:48] = (200, 90, 160)
PICTURE[8:20, 8:20] = (64, 20, 128)  # on its upper left, so that neither turning nor mirroring goes unseen
OPACITY = np.where((PICTURE == 255).all(-1), 0, 255).astype(np.uint8)
CLEAR = np.dstack([PICTURE * (OPACITY[..., None] > 0), OPACITY])  # black where it is transparent
PLANES = np.moveaxis(PICTURE, -1, 0).copy()
TILED = {"tile": (32, 32), "compression": "zlib"}


def pillow(mode: str | None = None, pixels: np.ndarray = PICTURE, **how):
    def write(path: Path) -> None:
        image = Image.fromarray(pixels)
        (image.convert(mode) if mode else image).save(path, **how)

    return write


def tiff(pixels: np.ndarray = PICTURE, **how):
    return lambda path: tifffile.imwrite(path, pixels, **{"photometric": "rgb", "metadata": None, **how})


def lab() -> np.ndarray:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return np.asarray(ImageCms.profileToProfile(Image.fromarray(PICTURE), *profiles, outputMode="LAB"))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def ome(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(PICTURE, photometric="rgb", subifds=1, metadata={"axes": "YXS"}, **TILED)
        file.write(PICTURE[::2, ::2], photometric="rgb", subfiletype=1, **TILED)


# name -> how it is written, by how much its pixels may differ
READ = {
    "rgb.png": (pillow(), 0),
    "palette.png": (lambda path: Image.fromarray(PICTURE).quantize(3).save(path), 0),
    "clear.png": (pillow(pixels=CLEAR), 0),
    "turned.png": (pillow(pixels=np.ascontiguousarray(np.rot90(PICTURE)), exif=turned(6)), 0),
    "rgb.jpg": (pillow(quality=100, subsampling=0), 3),
    "cmyk.jpg": (pillow("CMYK", quality=100, subsampling=0), 5),
    "strips.tif": (tiff(compression="lzw"), 0),
    "tiles.tif": (tiff(**TILED), 0),
    "planes.tif": (tiff(PLANES, planarconfig="separate", **TILED), 0),
    "cmyk.tif": (tiff(np.asarray(Image.fromarray(PICTURE).convert("CMYK")), photometric="separated"), 0),
    "lab.tif": (tiff(lab(), photometric="cielab", **TILED), 3),
    "clear.tif": (tiff(CLEAR, extrasamples=["assocalpha"], **TILED), 0),
    "turned.tif": (tiff(PICTURE[::-1, ::-1].copy(), extratags=[(274, 3, 1, 3, True)], **TILED), 0),
    "levels.ome.tif": (ome, 0),
    "ours.ome.zarr": (lambda path: save_image(path, PICTURE, {}, 0.5), 0),
}


def frames(path: Path) -> None:
    """An animation of three frames."""
    first, *others = (Image.fromarray(np.roll(PICTURE, shift, 0)) for shift in (0, 8, 16))
    first.save(path, save_all=True, append_images=others)


def pages(path: Path) -> None:
    """A small picture before the large one, as some exports have it."""
    with tifffile.TiffWriter(path) as file:
        for pixels in (PICTURE[::2, ::2].copy(), PICTURE):
            file.write(pixels, photometric="rgb", metadata=None)


DEEP, STAINS = "more than 8 bits per sample", "3 channels (DAPI, CD8, PanCK) that are no colours"
SEVERAL = "single ones are read: save the one that you mean"
CHANNELS = {"axes": "CYX", "Channel": {"Name": ["DAPI", "CD8", "PanCK"]}}
REFUSED = {
    "strips.tif": (tiff(PICTURE.astype(np.uint16) * 16), DEEP),
    "tiles.tif": (tiff(PICTURE.astype(np.uint16) * 16, **TILED), DEEP),
    "gray.png": (pillow(pixels=PICTURE[..., 0].astype(np.uint16) * 257), DEEP),
    "rgb.png": (lambda path: path.write_bytes(imagecodecs.png_encode(PICTURE.astype(np.uint16) * 257)), DEEP),
    "frames.png": (frames, SEVERAL),
    "frames.webp": (frames, SEVERAL),
    "frames.gif": (frames, SEVERAL),
    "pages.tif": (pages, SEVERAL),
    "planes.tif": (lambda path: tifffile.imwrite(path, np.stack([PICTURE] * 3), photometric="rgb"), SEVERAL),
    "a.ome.tif": (lambda path: tifffile.imwrite(path, PLANES, photometric="minisblack", metadata=CHANNELS), STAINS),
}


UNET = {
    "image_size": SIDE, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1,
    "attention_resolutions": [], "channel_mult": [1], "num_heads": 2,
}  # fmt: skip
CLASSES = {
    "target": "ldm.conditioners.class_token.ClassEmbedder",
    "params": {"classes": ["A", "B"], "dim": 128, "acts": "vector"},
}
NODE = {
    "target": "ldm.latent_diffusion.LatentDiffusion",
    "params": {
        "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": UNET},
        "first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage", "params": {"channels": 3}},
        "cond_stage_config": {
            "target": "ldm.conditioners.compose.ConditionerSet",
            "params": {"conditioners": {"class": CLASSES}},
        },
        "use_ema": False,
    },
}


@pytest.fixture(scope="module")
def model():
    """A model of the picture's size that learnt nothing."""
    return instantiate_from_config(NODE).eval()


def by_tile_slides(path: Path, out: Path, model) -> np.ndarray:
    return TileStore.open(tile_slide(path, out, slide_mpp=0.5, tile_size=SIDE, min_tissue=0)).tile(0)


def by_import_captions(path: Path, out: Path, model) -> np.ndarray:
    (table := out / "captions.csv").write_text(f"path,text\n{path},tissue\n")
    words = ["--table", str(table), "--files-in", str(path.parent), "--size", str(SIDE)]
    import_captions([*words, "--out", str(out / "captioned")])
    return TileStore.open(out / "captioned" / "slides" / "captions.zarr").tile(0)


def by_translate(path: Path, out: Path, model) -> np.ndarray:
    pictures, _ = pictures_and_plans(model, path, AskedTranslations(source=["class=A"], targets=["class=B"]))
    return ((to_tensor(model, pictures[0]) + 1) * 127.5).round().byte().movedim(0, -1).numpy()


def by_evaluate(path: Path, out: Path, model) -> np.ndarray:
    return open_images(path, crop=SIDE).read(0)


def by_view(path: Path, out: Path, model) -> np.ndarray:
    gallery = Gallery(find([path]))
    gallery.thumbnail(0)
    return gallery.tile(0, level=6, col=0, row=0)


COMMANDS = [by_tile_slides, by_import_captions, by_translate, by_evaluate, by_view]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
@pytest.mark.parametrize("name", READ)
def test_the_same_pixels(tmp_path, model, name, command):
    write, tolerance = READ[name]
    write(tmp_path / name)
    (out := tmp_path / "out").mkdir()
    found = command(tmp_path / name, out, model).astype(int)
    assert np.abs(found - PICTURE).max() <= tolerance


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
@pytest.mark.parametrize("name", REFUSED)
def test_the_same_refusal(tmp_path, model, name, command):
    write, message = REFUSED[name]
    write(tmp_path / name)
    (out := tmp_path / "out").mkdir()
    with pytest.raises(UserError) as refused:
        command(tmp_path / name, out, model)
    assert message in str(refused.value)
    assert str(tmp_path / name) in str(refused.value)


@pytest.mark.slow
def test_all_of_them_through_whole_commands(tmp_path, model):
    (images := tmp_path / "images").mkdir()
    for name, (write, _) in READ.items():
        write(images / f"{name.partition('.')[0]}-{name.replace('.', '-')}.{name.partition('.')[2]}")
    write_model_folder(tmp_path / "model", NODE, model.state_dict(), {"tile_size": SIDE})

    def run(*given: object) -> str:
        return CliRunner().invoke(app, [str(word) for word in given], catch_exceptions=False).output

    out = tmp_path / "translated"
    run("translate", "--model", tmp_path / "model", "--images", images, "--source", "class=A", "--target", "class=B",
        "--steps", 2, "--out", out)  # fmt: skip
    made = read_pictures(out)
    pixels = {made.name(i): made.read(i).astype(int) for i in range(len(made))}
    assert len(pixels) == len(READ)
    assert all(np.abs(own - pixels["rgb-rgb-png__B.png"]).max() < 9 for own in pixels.values())
    encoder = ROOT / "data" / "models" / "demo-encoder"
    said = run("evaluate", "--generated", out, "--real", images, "--features", encoder, "--out", tmp_path / "report")
    assert f"note: {len(READ)} images are fewer than the" in said
    rows = [f"images/{path.name},{i % 2}\n" for i, path in enumerate(sorted(images.iterdir()))]
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(rows))
    assert len(read_labelled(tmp_path / "labels.csv")) == len(READ)
    gallery = Gallery(find([images]))
    assert (len(gallery.sources), gallery.failed) == (len(READ), [])


def test_pairs_of_unlike_files_are_pairs_of_pictures(tmp_path):
    for folder, names in {"new": ("clear.tif", "palette.png"), "old": ("clear.png", "palette.png")}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            READ[name][0](tmp_path / folder / name)
    new, old = images_by_name(tmp_path / "new"), images_by_name(tmp_path / "old")
    values, warnings = compare([(new[name], old[name]) for name in sorted(new)])
    assert values["mae"].tolist() == [0, 0]
    assert "2 of 2 pairs are the same image twice, pixel by pixel." in warnings


def test_sets_that_differ_before_any_model_does_are_told(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        tile = np.clip(PICTURE + rng.integers(-20, 20, PICTURE.shape), 0, 255).astype(np.uint8)
        gray = np.asarray(Image.fromarray(tile).convert("L"))
        kinds = {"colour": ("png", tile), "jpeg": ("jpg", tile), "gray": ("png", np.dstack([gray] * 3))}
        for folder, (ending, pixels) in kinds.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.{ending}")
    for name in ("0.png", "1.png"):
        (tmp_path / "jpeg" / f"copy-{name}").write_bytes((tmp_path / "colour" / "3.png").read_bytes())
    sets = {name: open_images(tmp_path / name) for name in ("colour", "jpeg", "gray")}
    assert unlike({"generated": sets["gray"], "real": sets["colour"]}) == [
        "the generated images are grey and the real in colour: the figures measure that too."
    ]
    assert unlike({"generated": sets["colour"], "real": sets["jpeg"]}) == [
        "copies among the real files: 1 (copy-1.png).",
        "files that are in both the generated and the real set: 1 (3.png).",
    ]
    for name in ("0.png", "1.png"):
        (tmp_path / "jpeg" / f"copy-{name}").unlink()
    assert unlike({"generated": sets["colour"], "real": open_images(tmp_path / "jpeg")}) == [
        "the real images are JPEG and the generated not: the figures measure that too."
    ]
    assert unlike({"generated": sets["colour"], "real": sets["colour"]}) == [
        "files that are in both the generated and the real set: 4 (0.png, 1.png, 2.png, ...)."
    ]
