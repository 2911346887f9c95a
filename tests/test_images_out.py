"""Generated images on disk: other programs open them at the right scale, and they say that they are synthetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import torch
import zarr
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.images.marks import MARK, mark_text, read_mark
from ldm.images.slides import open_image, open_slide
from ldm.images.write import save_animation, save_bigtiff, save_image, save_ome_zarr, save_png, save_real_png, to_uint8

ABOUT = {"model": "demo µ", "seed": 7, "condition": {"features": "slide.zarr"}}


@pytest.fixture(scope="module")
def image(demo_slide: Path) -> np.ndarray:
    return open_slide(demo_slide).read(400, 1500, 1001, 701)  # odd, so that levels and tiles do not divide evenly


def test_bigtiff_opens_in_openslide_at_its_scale(tmp_path: Path, image: np.ndarray):
    path = save_bigtiff(tmp_path / "a.tif", image, 0.4991, ABOUT)
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.level_dimensions == ((1001, 701), (501, 351), (251, 176))
        for axis in "xy":
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(0.4991, rel=1e-3)
        assert slide.properties["tiff.ImageDescription"].startswith("SYNTHETIC")
        assert json.loads(slide.properties["tiff.ImageDescription"].split("\n")[1]) == MARK | ABOUT
        for level in range(3):
            got = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))
            want = np.asarray(Image.fromarray(image).reduce(2**level))
            assert np.abs(got.astype(int) - want)[:-1, :-1].mean() < 4  # half a pixel of shift gives 10
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff
        assert len(file.pages) == 3  # the main chain, no SubIFDs
    reopened = open_slide(path)
    assert reopened.mpp == pytest.approx(0.4991, rel=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_bigtiff_takes_a_zarr_array(tmp_path: Path, image: np.ndarray):
    array = zarr.create_array(str(tmp_path / "a.zarr"), data=image, chunks=(64, 64, 3))
    one = save_bigtiff(tmp_path / "zarr.tif", array, 0.5, ABOUT)
    two = save_bigtiff(tmp_path / "numpy.tif", image, 0.5, ABOUT)
    assert np.array_equal(tifffile.imread(one), tifffile.imread(two))


def test_ome_zarr(tmp_path: Path, image: np.ndarray):
    path = save_ome_zarr(tmp_path / "a.ome.zarr", image, 0.5, ABOUT)
    group = zarr.open_group(str(path), mode="r")
    scales = group.attrs["ome"]["multiscales"][0]
    assert group.attrs["ome"]["version"] == "0.5"
    assert [axis["name"] for axis in scales["axes"]] == ["c", "y", "x"]
    assert np.array_equal(np.moveaxis(group["0"][:], 0, -1), image)
    for dataset in scales["datasets"]:
        array = group[dataset["path"]]
        assert array.metadata.dimension_names == ("c", "y", "x")
        scale = dataset["coordinateTransformations"][0]["scale"]
        assert np.multiply(scale[1:], array.shape[1:]) == pytest.approx(np.multiply(0.5, image.shape[:2]))
    assert group.attrs["histoldm"].items() >= (MARK | ABOUT).items()
    save_ome_zarr(path, image[:64, :64], 0.5, ABOUT)  # replaces its own
    assert zarr.open_array(str(path / "0"), mode="r").shape == (3, 64, 64)


def test_png(tmp_path: Path, image: np.ndarray):
    path = save_png(tmp_path / "new" / "a.png", image, ABOUT)
    with Image.open(path) as file:
        assert json.loads(file.text["SYNTHETIC"]) == MARK | ABOUT
        assert np.array_equal(np.asarray(file), image)


def write(path: Path, image: np.ndarray) -> Path:
    if path.suffix == ".jpg":
        Image.fromarray(image).save(path, comment=mark_text(ABOUT))
        return path
    if path.name in ("a.gif", "a.webp", "moving.png"):
        return save_animation(path, [image, 255 - image], ABOUT)
    if path.suffix == ".png":
        return save_png(path, image, ABOUT)
    return (save_ome_zarr if path.suffix == ".zarr" else save_bigtiff)(path, image, 0.5, ABOUT)


@pytest.mark.parametrize("name", ["a.png", "moving.png", "a.gif", "a.webp", "a.jpg", "a.tif", "a.ome.zarr"])
def test_the_mark_is_read_back_from_every_kind_of_file(tmp_path: Path, image: np.ndarray, name: str):
    path = write(tmp_path / name, image[:60, :80])
    assert read_mark(path) == read_mark(path, whole=True) == MARK | ABOUT
    if path.is_file():
        for length in (0, 3, 40, path.stat().st_size // 3):
            (tmp_path / "short").write_bytes(path.read_bytes()[:length])
            assert read_mark(tmp_path / "short", whole=True) == {}


def test_files_without_a_mark_say_nothing(tmp_path: Path, image: np.ndarray, demo_slide: Path):
    zarr.create_group(str(tmp_path / "other.zarr"), attributes={"histoldm": {"description": 3}})
    (tmp_path / "text.tif").write_text("SYNTHETIC\n{}")
    named = tmp_path / "text.tif", tmp_path / "other.zarr", tmp_path, tmp_path / "none", demo_slide
    assert [read_mark(path) for path in (save_real_png(tmp_path / "real.png", image[:9]), *named)] == [{}] * 6
    info = PngInfo()
    info.add_text("SYNTHETIC", "[" * 100_000)
    Image.new("RGB", (4, 4)).save(tmp_path / "deep.png", pnginfo=info)
    assert read_mark(tmp_path / "deep.png") == {}
    info = PngInfo()
    info.add_text("SYNTHETIC", "by another program")
    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.png", pnginfo=info)
    assert read_mark(tmp_path / "foreign.png") == {"SYNTHETIC": "by another program"}


class Torn:
    """An image whose second block of rows is never read to the end."""

    shape, dtype = (2100, 600, 3), np.dtype("u1")

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        if key[0].start:
            raise KeyboardInterrupt
        return np.zeros(self.shape, np.uint8)[key]


def test_nothing_half_written(tmp_path: Path):
    for save in (save_bigtiff, save_ome_zarr):
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "a", Torn(), 0.5, ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_user_mistakes(tmp_path: Path, image: np.ndarray):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        save_png(tmp_path / "file" / "a.png", image, ABOUT)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="did not write"):
        save_ome_zarr(tmp_path / "mine", image, 0.5, ABOUT)
    with pytest.raises(UserError, match="mpp"):
        save_bigtiff(tmp_path / "a.tif", image, 0, ABOUT)


def test_to_uint8_is_the_inverse_of_loading(image: np.ndarray):
    loaded = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    assert np.array_equal(to_uint8(loaded), image)
    assert to_uint8(torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1)).ravel().tolist() == [0, 128, 255]


def test_images_are_written_by_their_ending_and_read_back(tmp_path):
    image = np.tile(np.linspace(0, 255, 300).astype(np.uint8)[None, :, None], (200, 1, 3))
    for name in ("a.png", "a.jpg", "a.jpeg", "a.tif", "a.ome.zarr"):
        path = save_image(tmp_path / name, image, {"seed": 4}, 0.5)
        assert np.abs(open_image(path).read(0, 0, *image.shape[1::-1]).astype(int) - image).mean() < 8
        assert read_mark(path)["seed"] == 4
    with pytest.raises(UserError, match=r"written as \.png, \.jpg, \.jpeg, \.tif, \.tiff, \.ome\.zarr; got"):
        save_image(tmp_path / "a.gif", image, {}, 0.5)
    with pytest.raises(UserError, match="micrometres per pixel, which are unknown"):
        save_image(tmp_path / "b.tif", image, {})
    with pytest.raises(UserError, match="a JPEG has 65500 at most"):
        save_image(tmp_path / "wide.jpg", np.zeros((1, 70_000, 3), np.uint8), {})
