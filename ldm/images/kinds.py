"""Which files are images: one table of their endings, and the images that a path holds."""

from __future__ import annotations

from pathlib import Path

from ldm.foreign.settings import read_json
from ldm.images.dicom import one_per_series

PLAIN = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # without a scale; decoded whole
_JPEG = b"\xff\xd8\xff"
_PLAIN = (b"\x89PNG", _JPEG, b"BM", b"GIF8")
SLIDES = (".tif", ".tiff", ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms", ".vmu", ".czi", ".dcm")
SEVERAL, PLATE = "bioformats2raw.layout", "plate"  # what OME-Zarr folders of several images, of wells say that they are
ENDINGS = " ".join((*PLAIN, *SLIDES, ".ome.zarr"))


def is_plain(path: Path) -> bool:
    """Whether a file begins as PNG, JPEG, BMP, WebP or GIF do, and is not named as a slide: .mrxs begins as JPEG.

    >>> is_plain(slide_path)
    False
    """
    if path.suffix.lower() in SLIDES:
        return False
    with path.open("rb") as file:
        head = file.read(12)
    return head.startswith(_PLAIN) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def is_jpeg(path: Path) -> bool:
    """Whether a file begins as JPEG does.

    >>> is_jpeg(slide_path)
    False
    """
    with path.open("rb") as file:
        return file.read(3) == _JPEG


def is_image(path: Path) -> bool:
    """Whether a path looks like an image: a file by its ending, a folder by what it says that it holds.

    >>> is_image(slide_path), is_image(slide_path.parent)
    (True, False)
    """
    return path.is_file() if path.suffix.lower() in (*PLAIN, *SLIDES) else is_ome_zarr(path)


def is_ome_zarr(path: Path) -> bool:
    """Whether a path is a folder that holds OME-Zarr (0.4 or 0.5), one image or several; a tile store is none.

    >>> is_ome_zarr(store.path)
    False
    """
    for name in ("zarr.json", ".zattrs"):
        try:
            told = read_json(path / name)
            told = told["attributes"]["ome"] if name == "zarr.json" else told
            return any(told.get(kind) for kind in ("multiscales", SEVERAL, PLATE))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return False


def is_there(path: Path) -> bool:
    """Whether at a path there is what an image can be, a file or an OME-Zarr folder; as tables that name images ask.

    >>> is_there(slide_path), is_there(slide_path.parent)
    (True, False)
    """
    return path.is_file() or is_ome_zarr(path)


def called(path: Path) -> str:
    """What the image at a path is called: as its file is, and of one in a folder of several as this and the folder.

    >>> called(slide_path)
    'CMU-1-Small-Region.svs'
    """
    several = path.parent
    inside = path.is_dir() and several.suffix == ".zarr" and is_ome_zarr(several)
    return f"{several.stem}_{path.name}{several.suffix}" if inside else path.name


def images_in(folder: Path, subfolders: bool = False) -> list[Path]:
    """The images of a folder, and maybe of those in it, sorted; nothing whose name begins with a point.

    Of a DICOM series the one file that stands for the slide, see `ldm.images.dicom`.

    >>> [path.name for path in images_in(slide_path.parent)]
    ['CMU-1-Small-Region.svs']
    """
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if is_image(path):
            found.append(path)
        elif subfolders and path.is_dir() and path.suffix != ".zarr":
            found += images_in(path, True)
    return one_per_series(found)
