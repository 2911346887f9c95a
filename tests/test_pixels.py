"""Pixels and their scale as users' files hold them: the same for every kind of file, or a refusal with its reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image, ImageCms

from conftest import ROOT
from data_prep.tile_slides import tile_slide
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.images.pictures import Picture
from ldm.images.slides import open_image, open_slide
from ldm.images.write import save_bigtiff

MARK, CENTRE, GLASS = (64, 20, 128), (200, 90, 160), (245, 245, 245)
PLACES = ((50, 50), (128, 128), (5, 5))  # x, y of the three in `tissue`


def tissue(side: int = 256) -> np.ndarray:
    """Pink on glass, with a violet mark on its upper left, so that neither turning nor mirroring goes unseen."""
    image = np.full((side, side, 3), GLASS, np.uint8)
    eighth = side // 8
    image[eighth:-eighth, eighth:-eighth] = CENTRE
    image[eighth : 2 * eighth, eighth : 2 * eighth] = MARK
    return image


TISSUE = tissue()
OPACITY = np.zeros((256, 256), np.uint8)
OPACITY[32:224, 32:224] = 255
TILED = {"tile": (64, 64), "compression": "zlib"}


def colours(path: Path) -> list[list[int]]:
    """The mark, the centre and the corner as they are read."""
    image = open_image(path)
    return [image.read(x, y, 1, 1)[0, 0].tolist() for x, y in PLACES]


def write(path: Path, pixels: np.ndarray, **how) -> Path:
    tifffile.imwrite(path, pixels, **{"photometric": "rgb", "metadata": None, **how})
    return path


def ome(path: Path, pixels: np.ndarray = TISSUE, axes: str = "YXS", size=None, unit=None, **how) -> Path:
    """An OME-TIFF as QuPath, bfconvert and tifffile write it. size: PhysicalSizeX and Y."""
    metadata = {"axes": axes} | how.pop("about", {})
    for axis, own in zip("XY", size or ()):
        metadata |= {f"PhysicalSize{axis}": own} | ({f"PhysicalSize{axis}Unit": unit} if unit else {})
    with tifffile.TiffWriter(path, ome=True) as file:
        levels = how.pop("levels", 0)
        file.write(pixels, metadata=metadata, subifds=levels, **{"photometric": "rgb", **how})
        for level in range(levels):
            step = 2 ** (level + 1)
            file.write(pixels[::step, ::step], subfiletype=1, **{"photometric": "rgb", **how})
    return path


def lab(path: Path, **how) -> Path:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(TISSUE), *profiles, outputMode="LAB")
    pixels = np.asarray(image)  # a* and b* are signed, as in a TIFF
    return write(path, pixels, photometric="cielab", **how)


def cmyk(path: Path, **how) -> Path:
    return write(path, np.asarray(Image.fromarray(TISSUE).convert("CMYK")), photometric="separated", **how)


@pytest.mark.parametrize("make", [cmyk, lab])
@pytest.mark.parametrize("how", [{}, TILED], ids=["strips", "tiles"])
def test_colour_models(tmp_path, make, how):
    assert np.abs(np.subtract(colours(make(tmp_path / "a.tif", **how)), [MARK, CENTRE, GLASS])).max() <= 2


def test_cmyk_of_jpeg_is_that_of_tiff(tmp_path):
    Image.fromarray(TISSUE).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(np.subtract(colours(tmp_path / "a.jpg"), [MARK, CENTRE, GLASS])).max() <= 6


@pytest.mark.parametrize("how", [{}, TILED], ids=["strips", "tiles"])
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_transparent_is_white(tmp_path, how, kind):
    pixels = np.dstack([TISSUE * (OPACITY[..., None] > 0), OPACITY])
    path = write(tmp_path / "a.tif", pixels, extrasamples=[kind], **how)
    assert colours(path) == [list(MARK), list(CENTRE), [255, 255, 255]]
    gray = np.dstack([TISSUE[..., 0] * (OPACITY > 0), OPACITY])
    write(tmp_path / "b.tif", gray, photometric="minisblack", extrasamples=[kind], planarconfig="contig", **how)
    assert colours(tmp_path / "b.tif") == [[64] * 3, [200] * 3, [255] * 3]
    pixels = np.dstack([np.zeros_like(TISSUE), np.full_like(OPACITY, 51)])
    write(tmp_path / "c.tif", pixels, extrasamples=[kind], **how)
    assert open_image(tmp_path / "c.tif").read(0, 0, 1, 1).tolist() == [[[204, 204, 204]]]
    Image.fromarray(pixels).save(tmp_path / "c.png")
    assert open_image(tmp_path / "c.png").read(0, 0, 1, 1).tolist() == [[[204, 204, 204]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_exif(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = TISSUE[:200]
    turns = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
             6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1)}  # fmt: skip
    stored = np.ascontiguousarray(turns[orientation])
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(stored).save(tmp_path / "b.tif", exif=exif)
    tag = [(274, 3, 1, orientation, True)]
    write(tmp_path / "c.tif", stored, extratags=tag, **TILED)
    write(tmp_path / "d.tif", np.moveaxis(stored, -1, 0).copy(), planarconfig="separate", extratags=tag, **TILED)
    for name in ("a.png", "b.tif", "c.tif", "d.tif"):
        image = open_image(tmp_path / name)
        assert image.dimensions == (256, 200)
        assert np.array_equal(image.read(0, 0, 256, 200), upright), name
        assert np.array_equal(image.read(20, 70, 90, 33), upright[70:103, 20:110]), name


def test_more_than_8_bits_are_refused_everywhere(tmp_path):
    deep, gray = TISSUE.astype(np.uint16) * 16, TISSUE[..., 0].astype(np.uint16) * 16  # values of 12 bits
    write(tmp_path / "a.tif", deep)
    write(tmp_path / "b.tif", deep, **TILED)
    write(tmp_path / "c.tif", gray, photometric="minisblack", **TILED)
    write(tmp_path / "d.tif", gray.astype(np.float32), photometric="minisblack")
    (tmp_path / "e.png").write_bytes(imagecodecs.png_encode(deep))
    Image.fromarray(gray).save(tmp_path / "f.png")
    (tmp_path / "g.png").write_bytes(imagecodecs.png_encode(np.dstack([gray, gray])))
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match="has more than 8 bits per sample, and 8 are read"):
            open_image(path)


def test_fewer_bits(tmp_path):
    levels = (TISSUE[..., 0] // 64).astype(np.uint8)  # 0..3
    write(tmp_path / "a.tif", levels, photometric="minisblack", bitspersample=2)
    assert colours(tmp_path / "a.tif") == [[85] * 3, [255] * 3, [255] * 3]
    write(tmp_path / "b.tif", TISSUE[..., 1] > 50, photometric="minisblack")
    assert colours(tmp_path / "b.tif") == [[0] * 3, [255] * 3, [255] * 3]
    Image.fromarray(TISSUE[..., 1] > 50).save(tmp_path / "c.tif", compression="group4")
    assert colours(tmp_path / "c.tif") == [[0] * 3, [255] * 3, [255] * 3]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_palettes(tmp_path, name):
    Image.fromarray(TISSUE).quantize(4).save(tmp_path / name)
    assert colours(tmp_path / name) == [list(MARK), list(CENTRE), list(GLASS)]


def test_an_icc_profile_is_applied_and_told(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()  # not of RGB: told, not applied
    Image.fromarray(TISSUE).save(tmp_path / "a.png", icc_profile=profile)
    assert colours(tmp_path / "a.png") == [list(MARK), list(CENTRE), list(GLASS)]
    assert "its ICC profile cannot be applied" in open_image(tmp_path / "a.png").notes[0]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write(tmp_path / "b.tif", TISSUE, iccprofile=srgb)
    assert (colours(tmp_path / "b.tif"), open_image(tmp_path / "b.tif").notes) == (colours(tmp_path / "a.png"), ())
    swapped = swapped_profile(srgb)
    Image.fromarray(TISSUE).save(tmp_path / "c.png", icc_profile=swapped)
    write(tmp_path / "d.tif", TISSUE, iccprofile=swapped, **TILED)
    want = [[b, g, r] for r, g, b in (MARK, CENTRE, GLASS)]
    for name in ("c.png", "d.tif"):
        assert np.abs(np.subtract(colours(tmp_path / name), want)).max() <= 3
        assert open_image(tmp_path / name).notes == ("its colours are converted to sRGB from its ICC profile 'BGR'",)


def swapped_profile(srgb: bytes) -> bytes:
    """sRGB's profile whose red and blue have changed places."""
    data = bytearray(srgb)
    count = int.from_bytes(data[128:132], "big")
    entries = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    at = entries[b"desc"]
    start, size = (int.from_bytes(data[at + k : at + k + 4], "big") for k in (4, 8))
    name = "BGR".ljust((size - 28) // 2).encode("utf-16-be")
    data[start + 28 : start + 28 + len(name)] = name
    return bytes(data)


def test_channels_that_are_no_colours(tmp_path):
    stack = np.moveaxis(TISSUE, -1, 0).copy()
    names = {"Channel": {"Name": ["DAPI", "CD8", "PanCK"]}}
    plain = {"photometric": "minisblack", "axes": "CYX", "about": names}
    ome(tmp_path / "a.ome.tif", stack, **plain, **TILED)
    ome(tmp_path / "b.ome.tif", stack.astype(np.uint16), **plain)
    path = tmp_path / "c.zarr"
    channels = [{"label": name, "color": "FFFFFF"} for name in names["Channel"]["Name"]]
    about = {"multiscales": [{"axes": ["c", "y", "x"], "datasets": [{"path": "0"}]}], "omero": {"channels": channels}}
    zarr.create_group(str(path), attributes={"ome": about})
    zarr.create_array(str(path / "0"), data=stack)
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=r"3 channels \(DAPI, CD8, PanCK\) that are no colours, as of fluorescence"):
            open_image(path)
    write(tmp_path / "d.tif", np.dstack([TISSUE, OPACITY, OPACITY]), extrasamples=[0, 0])
    with pytest.raises(UserError, match="holds 5 channels that are no colours"):
        open_image(tmp_path / "d.tif")
    write(tmp_path / "e.tif", np.dstack([TISSUE, OPACITY]), extrasamples=[0])
    assert colours(tmp_path / "e.tif") == [list(MARK), list(CENTRE), list(GLASS)]
    assert open_image(tmp_path / "e.tif").notes == (
        "its channel 4 is left out: the file does not say that it is opacity",
    )


PLANES = np.moveaxis(TISSUE, -1, 0).copy()
MICRON = {"size": (0.25, 0.25), "unit": "µm"}


@pytest.mark.parametrize(
    ("make", "mpp", "levels"),
    [
        (lambda p: ome(p, **MICRON, levels=1, **TILED), 0.25, 2),
        (lambda p: ome(p, **MICRON, resolution=(1200, 1200), resolutionunit="INCH", **TILED), 0.25, 1),
        (lambda p: ome(p, PLANES, "SYX", planarconfig="SEPARATE", **MICRON, **TILED), 0.25, 1),
        (lambda p: ome(p, PLANES, "SYX", planarconfig="SEPARATE", **MICRON), 0.25, 1),
        (lambda p: ome(p, size=(250, 250), unit="nm"), 0.25, 1),
        (lambda p: ome(p, size=(0.25, 0.25)), 0.25, 1),  # micrometres where no unit is given
        (lambda p: ome(p, size=(2.5e-7, 2.5e-7), unit="m"), 0.25, 1),
        (lambda p: ome(p, size=(1, 1), unit="pixel"), 0, 1),
    ],
    ids=["subifds", "beside-1200-dpi", "planar-tiles", "planar-strips", "nm", "no-unit", "m", "pixel"],
)
def test_ome_tiff(tmp_path, make, mpp, levels):
    image = open_image(make(tmp_path / "a.ome.tif"))
    assert image.mpp == pytest.approx(mpp)
    assert image.mpp_source == ("OME-XML" if mpp else "")
    assert len(image._levels) == levels
    assert colours(tmp_path / "a.ome.tif") == [list(MARK), list(CENTRE), list(GLASS)]
    if levels == 2:
        assert np.array_equal(image.read(0, 0, 256, 256, (128, 128)), TISSUE[::2, ::2])


@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [
        *[((dpi, dpi), "INCH", 0) for dpi in (72, 96, 300, 600, 1200, 2400)],
        *[((dpi / 2.54, dpi / 2.54), "CENTIMETER", 0) for dpi in (72, 300, 600, 1200)],
        *[((dots, dots), "CENTIMETER", 0) for dots in (236, 472)],  # 600 and 1200 dpi in whole dots
        ((4, 4), "NONE", 0),
        ((40000, 40000), "CENTIMETER", 0.25),
        ((101600, 101600), "INCH", 0.25),
        ((1000, 1000), "CENTIMETER", 10.0),
    ],
)
@pytest.mark.parametrize("how", [{}, TILED], ids=["strips", "tiles"])
def test_resolution_tags(tmp_path, resolution, unit, mpp, how):
    path = write(tmp_path / "a.tif", TISSUE, resolution=resolution, resolutionunit=unit, **how)
    image = open_image(path)
    assert image.mpp == pytest.approx(mpp)
    assert image.mpp_source == ("TIFF resolution tag" if mpp else "")


def test_the_first_of_several_images_is_read_and_told(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(TISSUE, photometric="rgb", metadata=None)
        file.write(TISSUE[:100], photometric="rgb", metadata=None)
    assert colours(tmp_path / "a.tif") == [list(MARK), list(CENTRE), list(GLASS)]
    assert open_image(tmp_path / "a.tif").notes == ("its file holds 2 images, of which the first is read",)


def test_previews_behind_a_photograph_are_told(tmp_path):
    first = Image.fromarray(TISSUE)
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[first.resize((64, 64))], quality=95)
    assert np.abs(np.subtract(colours(tmp_path / "a.jpg"), [MARK, CENTRE, GLASS])).max() <= 6
    assert open_image(tmp_path / "a.jpg").notes == ("its file holds 2 images, of which the first is read",)


def test_transparency_of_one_colour_and_of_palettes(tmp_path):
    Image.fromarray(TISSUE).save(tmp_path / "a.png", transparency=GLASS)
    Image.fromarray(TISSUE[..., 0]).save(tmp_path / "b.png", transparency=245)
    image = Image.fromarray(TISSUE).quantize(3)
    image.save(tmp_path / "c.png", transparency=image.getpixel((5, 5)))
    assert colours(tmp_path / "a.png") == colours(tmp_path / "c.png") == [list(MARK), list(CENTRE), [255] * 3]
    assert colours(tmp_path / "b.png") == [[64] * 3, [200] * 3, [255] * 3]


@pytest.mark.parametrize("how", [{}, {"tile": (64, 64)}], ids=["strips", "tiles"])
def test_jpeg_inside_tiff(tmp_path, how):
    jpeg = {"compression": "jpeg", "subsampling": (2, 2), "compressionargs": {"level": 95}}
    path = write(tmp_path / "a.tif", TISSUE, **jpeg, **how)
    assert np.abs(np.subtract(colours(path), [MARK, CENTRE, GLASS])).max() <= 6


def test_imagej_unit(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", TISSUE[None, None], imagej=True, resolution=(4, 4), metadata={"unit": "um"})
    assert open_image(tmp_path / "a.tif").mpp == pytest.approx(0.25)


def test_impossible_sizes_are_told(tmp_path):
    with pytest.raises(UserError, match=r"in 'pixel', which is no unit of length\); pass --slide-mpp"):
        open_slide(ome(tmp_path / "a.ome.tif", size=(1, 1), unit="pixel"))
    with pytest.raises(UserError, match=r"in 'Mm', which is no unit of length"):
        open_slide(ome(tmp_path / "e.ome.tif", size=(1e-12, 1e-12), unit="Mm"))
    with pytest.raises(UserError, match="says 250 um per pixel, which no slide has"):
        open_slide(ome(tmp_path / "b.ome.tif", size=(250, 250), unit="µm"))
    with pytest.raises(UserError, match=r"pixels of 0.25 x 0.5 um \(OME-XML\), which are not square"):
        open_image(ome(tmp_path / "c.ome.tif", size=(0.25, 0.5), unit="µm"))
    write(tmp_path / "d.tif", TISSUE, resolution=(40000, 20000), resolutionunit="CENTIMETER", **TILED)
    with pytest.raises(UserError, match="not square"):
        open_image(tmp_path / "d.tif")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(("unit", "step"), [("nanometer", 250), ("micrometer", 0.25), ("millimeter", 0.00025)])
def test_ome_zarr_scales(tmp_path, version, unit, step):
    path = tmp_path / "a.zarr"
    axes = [{"name": "c", "type": "channel"}, *({"name": a, "type": "space", "unit": unit} for a in "yx")]
    scales = [[{"type": "scale", "scale": [1.0, 2.0**k, 2.0**k]}] for k in (0, 1)]
    datasets = [{"path": str(k), "coordinateTransformations": scale} for k, scale in enumerate(scales)]
    whole = [{"type": "scale", "scale": [1, step, step]}]
    about = {"multiscales": [{"axes": axes, "datasets": datasets, "coordinateTransformations": whole}]}
    kind = {"zarr_format": 2 if version == "0.4" else 3}
    about = about if version == "0.4" else {"ome": {"version": version, **about}}
    zarr.create_group(str(path), attributes=about, **kind)
    for k in (0, 1):
        zarr.create_array(str(path / str(k)), data=PLANES[:, :: k + 1, :: k + 1], **kind)
    image = open_image(path)
    assert (image.mpp, image.mpp_source, len(image._levels)) == (pytest.approx(0.25), "OME-Zarr axes", 2)
    assert np.array_equal(image.read(0, 0, 256, 256, (128, 128)), TISSUE[::2, ::2])


def test_ome_zarr_without_a_scale_has_none(tmp_path):
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    about = {"multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    zarr.create_group(str(tmp_path / "a.zarr"), attributes=about, zarr_format=2)
    zarr.create_array(str(tmp_path / "a.zarr" / "0"), data=PLANES[0], zarr_format=2)
    assert open_image(tmp_path / "a.zarr").mpp == 0


def of_bioformats2raw(root: Path, sides: Sequence[int], version: str = "0.4") -> Path:
    """A folder as bioformats2raw writes it: OME with the XML, and a numbered image for each side."""
    kind = {"zarr_format": 2 if version == "0.4" else 3}

    def told(about: dict) -> dict:
        return about if version == "0.4" else {"ome": {"version": version, **about}}

    zarr.create_group(str(root), attributes=told({"bioformats2raw.layout": 3}), **kind)
    zarr.create_group(str(root / "OME"), attributes=told({"series": [str(i) for i in range(len(sides))]}), **kind)
    for i, side in enumerate(sides):
        axes = [{"name": n, "type": "space", "unit": "micrometer"} if n in "xy" else {"name": n} for n in "tczyx"]
        datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1, 0.5, 0.5]}]}]
        zarr.create_group(
            str(root / str(i)), attributes=told({"multiscales": [{"axes": axes, "datasets": datasets}]}), **kind
        )
        zarr.create_array(str(root / str(i) / "0"), data=PLANES[None, :, None, :side, :side].copy(), **kind)
    return root


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_folder_of_bioformats2raw_is_its_image(tmp_path, version):
    image = open_image(of_bioformats2raw(tmp_path / "a.zarr", [256], version))
    assert (image.dimensions, image.mpp) == ((256, 256), 0.5)
    assert np.array_equal(image.read(0, 0, 256, 256), TISSUE)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_several_images_in_a_folder_are_named(tmp_path, version):
    path = of_bioformats2raw(tmp_path / "a.zarr", [256, 64, 32], version)
    named = ", ".join(re.escape(str(path / str(i))) for i in range(3))
    with pytest.raises(UserError, match=rf"a\.zarr holds 3 images \({named}\); give the one you mean"):
        open_image(path)
    assert open_image(path / "1").dimensions == (64, 64)
    assert Picture.of_file(path / "1").name == "a_1"
    store = TileStore.open(tile_slide(path / "0", tmp_path / "cohort", tile_size=128, min_tissue=0))
    assert (store.path.name, store.slide, len(store)) == ("a_0.zarr", "a_0.zarr", 4)


def test_a_plate_of_wells_is_told(tmp_path):
    plate = {"plate": {"wells": []}}
    zarr.create_group(str(tmp_path / "p.zarr"), attributes=plate, zarr_format=2)
    of_bioformats2raw(tmp_path / "p.zarr" / "A" / "1", [64, 64])
    with pytest.raises(UserError, match=r"is a plate of 2 images \(.*A/1/0, .*A/1/1\); give the one you mean"):
        open_image(tmp_path / "p.zarr")


@pytest.mark.parametrize("shards", [None, (128, 128)])
def test_chunks_that_an_ome_zarr_lacks_are_told(tmp_path, shards):
    axes = [{"name": axis, "type": "space"} for axis in "yx"]
    about = {"ome": {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}}
    zarr.create_group(str(tmp_path / "a.zarr"), attributes=about)
    zarr.create_array(str(tmp_path / "a.zarr" / "0"), data=PLANES[0], chunks=(64, 64), shards=shards)
    assert open_image(tmp_path / "a.zarr").notes == ()
    (tmp_path / "a.zarr" / "0" / "c" / "0" / "1").unlink()
    (note,) = open_image(tmp_path / "a.zarr").notes
    assert note.startswith(f"1 of {4 if shards else 16} chunks of its finest level have no file and are read as 0;")


def test_parts_that_a_file_leaves_out_are_white(tmp_path):
    tiles = [TISSUE[:64, :64], None, None, None]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(iter(tiles), shape=(128, 128, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb", metadata=None)
    image = open_image(tmp_path / "a.tif").read(0, 0, 128, 128)
    assert np.array_equal(image[:64, :64], TISSUE[:64, :64])
    assert (image[64:] == 255).all()


def test_levels_in_a_chain_are_read(tmp_path):
    save_bigtiff(tmp_path / "a.tif", np.tile(TISSUE, (4, 4, 1)), 0.5, {}, quality=95)
    image = open_image(tmp_path / "a.tif")
    assert [width for width, _ in image._levels] == [1024, 512, 256]
    coarse = image.read(0, 0, 1024, 1024, (256, 256)).astype(int)
    assert np.abs(coarse - np.tile(tissue(64), (4, 4, 1))).mean() < 3


def test_a_mirax_slide_without_its_folder_is_not_its_label(tmp_path):
    Image.fromarray(TISSUE).save(tmp_path / "a.mrxs", "JPEG")
    with pytest.raises(UserError, match=r"no folder a with its Slidedat\.ini lies beside it"):
        open_image(tmp_path / "a.mrxs")
    Image.fromarray(TISSUE).save(tmp_path / "b.tif", "PNG")
    assert colours(tmp_path / "b.tif") == [list(MARK), list(CENTRE), list(GLASS)]


def test_one_room_opens_pixels():
    """Every other module asks ldm.images; `doctor` alone tries OpenSlide itself."""
    opens = re.compile(r"Image\.open\(|imread\(|TiffFile\(|OpenSlide\(|dcmread\(")
    found = []
    for room in ("ldm", "data_prep", "demo"):
        for path in sorted((ROOT / room).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            if any(opens.search(line) for line in lines if not line.strip().startswith((">>>", "..."))):
                found.append(path.relative_to(ROOT))
    assert [path for path in found if path.parts[:2] != ("ldm", "images")] == [Path("ldm/commands/doctor.py")]
