"""One reader of images: every kind of file, in every command; what is refused, and which images a path holds."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from data_prep.slide_table import find_slides
from ldm.data.collection import pictures_of_files, read_pictures
from ldm.data.image_sets import open_images
from ldm.errors import UserError
from ldm.images.kinds import images_in
from ldm.images.pictures import Picture
from ldm.images.slides import open_image
from ldm.images.write import save_bigtiff, save_ome_zarr, save_png
from ldm.viewer.pictures import describe, find

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 255, (40, 56, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 255, (40, 56), dtype=np.uint8)
CLEAR = np.concatenate([COLOUR, np.full((40, 56, 1), 255, np.uint8)], -1)
CLEAR[:10, :, 3] = 0
ON_WHITE = np.where(CLEAR[..., 3:] == 0, 255, COLOUR).astype(np.uint8)
COLOURS = np.linspace(0, 255, 768).astype(np.uint8).reshape(256, 3)
TILED = {"tile": (16, 16), "compression": "deflate"}


def palette(path):
    image = Image.fromarray(GRAY, "P")
    image.putpalette(COLOURS.tobytes())
    image.save(path)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right makes it upright
    Image.fromarray(np.rot90(COLOUR)).save(path, exif=exif, lossless=True)


def zarr_gray(path):
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 250, 250]}]}]
    zarr.create_group(str(path), attributes={"multiscales": [{"axes": axes, "datasets": datasets}]}, zarr_format=2)
    zarr.create_array(str(path / "0"), data=GRAY[None], zarr_format=2)


# name -> how it is written, its pixels, whether it is gray
KINDS = {
    "rgb.png": (lambda path: Image.fromarray(COLOUR).save(path), COLOUR, False),
    "clear.png": (lambda path: Image.fromarray(CLEAR).save(path), ON_WHITE, False),
    "gray.png": (lambda path: Image.fromarray(GRAY).save(path), GRAY, True),
    "palette.png": (palette, COLOURS[GRAY], False),
    "turned.webp": (turned, COLOUR, False),
    "strips.tif": (lambda path: tifffile.imwrite(path, COLOUR, photometric="rgb"), COLOUR, False),
    "clear.tif": (lambda path: tifffile.imwrite(path, CLEAR, photometric="rgb", extrasamples=[2]), ON_WHITE, False),
    "gray.tif": (lambda path: tifffile.imwrite(path, GRAY, photometric="minisblack"), GRAY, True),
    "tiled-gray.tif": (lambda path: tifffile.imwrite(path, GRAY, photometric="minisblack", **TILED), GRAY, True),
    "white.tif": (lambda path: tifffile.imwrite(path, 255 - GRAY, photometric="miniswhite"), GRAY, True),
    "palette.tif": (palette, COLOURS[GRAY], False),
    "planes.tif": (
        lambda path: tifffile.imwrite(path, COLOUR.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        COLOUR,
        False,
    ),
    "ours.ome.zarr": (lambda path: save_ome_zarr(path, COLOUR, 0.5, {}), COLOUR, False),
    "gray.zarr": (zarr_gray, GRAY, True),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    write, pixels, gray = KINDS[request.param]
    write(tmp_path / request.param)
    return tmp_path / request.param, pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2), gray


def test_every_command_reads_the_same_pixels(kind):
    path, pixels, gray = kind
    for picture in (Picture.of_file(path), read_pictures(path)[0], read_pictures(path.parent)[0]):
        assert np.array_equal(picture.pixels(), pixels)
        assert (picture.size, picture.gray, picture.file) == ((56, 40), gray, path.name)
        assert np.array_equal(picture.part((3, 5, 20, 10)).pixels(), pixels[5:15, 3:23])
        assert np.array_equal(picture.part(16).pixels(), pixels[12:28, 20:36])
    images = open_images(path, crop=20)
    assert len(images) == 4
    assert np.array_equal(images.read(3), pixels[20:40, 20:40])
    told = describe(find([path])[0])
    assert (told["name"], told["width"], told["height"], told["synthetic"] is None) == (
        path.name,
        56,
        40,
        not path.name.startswith("ours"),
    )
    assert find_slides([path.parent]) == [path]
    assert np.array_equal(np.concatenate(list(open_image(path).bands())), pixels)


def stack(path):
    tifffile.imwrite(path, np.stack([GRAY] * 5), photometric="minisblack")


def deep_tiff(path):
    tifffile.imwrite(path, GRAY.astype(np.uint16), photometric="minisblack")


def outside(path):
    zarr_gray(path.parent / "other.zarr")
    zarr_gray(path)
    zarr.open_group(str(path)).attrs["multiscales"] = [{"axes": ["y", "x"], "datasets": [{"path": "../other.zarr/0"}]}]


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.png", lambda path: Image.fromarray(GRAY.astype(np.uint16)).save(path), "more than 8 bits"),
        ("a.tif", deep_tiff, "more than 8 bits"),
        ("a.tif", stack, "holds several images, [QZI]YX"),
        ("a.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(300)), "cannot be read|not a slide"),
        ("a.jpg", lambda path: path.write_text("<html>"), "holds text"),
        ("a.zarr", outside, "lies outside of it"),
    ],
)
def test_what_no_command_reads_is_one_message(tmp_path, name, write, message):
    write(tmp_path / name)
    for read in (open_image, lambda path: Picture.of_file(path).size, lambda path: read_pictures(path).read(0)):
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)


def test_a_scale_given_by_hand_is_for_files_that_say_none(tmp_path):
    save_bigtiff(tmp_path / "a.tif", COLOUR, 0.5, {})
    picture = Picture.of_file(tmp_path / "a.tif", mpp=0.25)
    assert picture.mpp == pytest.approx(0.5, rel=1e-3)
    assert (picture.suffix, picture.name) == (".tif", "a")
    image = open_image(tmp_path / "a.tif", mpp=0.25)
    told = "its TIFF resolution tag says 0.5 um per pixel, which holds; the 0.25 given is for files that say none"
    assert image.notes == (told,)
    Image.fromarray(COLOUR).save(tmp_path / "b.png")
    image = open_image(tmp_path / "b.png", mpp=0.25)
    assert (image.mpp, image.mpp_source, image.notes) == (0.25, "given by hand", ())
    assert Picture.of_file(tmp_path / "b.ome.zarr").name == "b"


def test_which_images_a_folder_holds(tmp_path):
    for name in ("b.PNG", "a.png", ".hidden.png", "contact_sheet.png", "sub/c.png", "sub/.git/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(GRAY).save(tmp_path / name, "PNG")
    save_ome_zarr(tmp_path / "sub" / "e.ome.zarr", COLOUR, 0.5, {})
    assert [picture.file for picture in read_pictures(tmp_path)] == ["a.png", "b.PNG", "sub/c.png", "sub/e.ome.zarr"]
    assert [picture.file for picture in read_pictures(tmp_path, subfolders=False)] == ["a.png", "b.PNG"]
    assert [path.name for path in images_in(tmp_path)] == ["a.png", "b.PNG", "contact_sheet.png"]
    (tmp_path / "tiles.csv").write_text("file,class\na.png,x\nsub/c.png,y\n")
    assert [dict(own) for own in read_pictures(tmp_path).about] == [
        {"file": "a.png", "class": "x"},
        {"file": "sub/c.png", "class": "y"},
    ]


def test_parts_that_are_not_there_are_told(tmp_path):
    picture = Picture.of_pixels(COLOUR, "a.png")
    with pytest.raises(UserError, match=r"region 50,0,10,10 reaches outside a\.png, which is 56 x 40 px"):
        picture.part((50, 0, 10, 10)).pixels()
    with pytest.raises(UserError, match=r"a\.png is 56 x 40 px, smaller than the 41 px that are asked for"):
        picture.part(41).pixels()
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(3, 40_000, 40_000), chunks=(3, 1000, 1000), dtype="u1")
    zarr.create_group(
        str(tmp_path / "b.zarr"),
        attributes={"ome": {"multiscales": [{"axes": ["c", "y", "x"], "datasets": [{"path": "0"}]}]}},
    )
    (tmp_path / "a.zarr").rename(tmp_path / "b.zarr" / "0")
    huge = Picture.of_file(tmp_path / "b.zarr")
    assert huge.size == array.shape[:0:-1]
    with pytest.raises(UserError, match="40000 x 40000 px, too large to be read at once"):
        huge.pixels()
    assert (huge.part(64).pixels() == 0).all()


def test_pictures_say_what_was_generated(tmp_path):
    save_png(tmp_path / "a.png", COLOUR, {"seed": 3})
    Image.fromarray(COLOUR).save(tmp_path / "b.png")
    about = [{"file": "a.png"}, {"file": "b.png"}]
    made, real = pictures_of_files([tmp_path / "a.png", tmp_path / "b.png"], about, "two")
    assert (made.mark()["seed"], real.mark(), made.part(8).mark()["seed"]) == (3, {}, 3)
