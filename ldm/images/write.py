"""Writes generated images by their ending: PNG, JPEG, pyramidal BigTIFF for OpenSlide and QuPath, OME-Zarr; and films.

Each bears the mark of `ldm.images.marks`. Files are written beside their place and renamed when they are whole. The
pyramids take any array that can be sliced, such as a zarr array or a memory map larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.files import reserve, tool_version, whole
from ldm.images.marks import DESCRIPTION, KEY, mark_of, mark_text
from ldm.images.pyramid import TILE, Level, corners, create_ome_zarr, halved, level_sizes, tile_bar, tiles

SCALED = (".tif", ".tiff", ".ome.zarr")  # formats that say their micrometres per pixel
SUFFIXES = (".png", ".jpg", ".jpeg", *SCALED)
_JPEG_SIDE = 65_500  # pixels that its encoder takes
_LARGE = 2**27  # pixels of an image whose writing shows a bar
_BLOCK = 2048  # rows and columns of the finer level that are halved at once


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """(3 or 1, H, W) in [-1, 1] -> (H, W, 3) uint8; a batch (B, 3 or 1, H, W) -> (B, H, W, 3).

    >>> to_uint8(torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 3))[0, :, 0].tolist()
    [0, 128, 255]
    """
    image = image.expand(*image.shape[:-3], 3, *image.shape[-2:])
    scaled = image.detach().float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.movedim(-3, -1).cpu().numpy()


def save_image(path: Path | str, image: Any, metadata: Mapping[str, Any], mpp: float | None = None) -> Path:
    """Write image (H, W, 3) uint8 with its mark, as what its name ends in (SUFFIXES).

    mpp: micrometres per pixel, which the formats SCALED need.

    >>> from ldm.images.pictures import Picture
    >>> for name in ("a.png", "a.jpg", "a.tif", "a.ome.zarr"):
    ...     written = Picture.of_file(save_image(name, tile, {"seed": 3}, 0.5))
    ...     print(written.size, written.mpp, written.mark()["seed"])
    (256, 256) None 3
    (256, 256) None 3
    (256, 256) 0.5 3
    (256, 256) 0.5 3
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"images are written as {', '.join(SUFFIXES)}; got {path}.")
    if path.suffix in (".jpg", ".jpeg"):
        return save_jpeg(path, image, metadata)
    if not path.name.endswith(SCALED):
        return save_png(path, image, metadata)
    if mpp is None:
        raise UserError(f"{path} is to say its micrometres per pixel, which are unknown; write a PNG, or give them.")
    return (save_ome_zarr if path.suffix == ".zarr" else save_bigtiff)(path, image, mpp, metadata)


def save_jpeg(path: Path | str, image: np.ndarray, metadata: Mapping[str, Any], quality: int = 95) -> Path:
    """Write image (H, W, 3) uint8 with its mark in the comment and the EXIF description. quality: 1..100.

    >>> from ldm.images.marks import read_mark
    >>> read_mark(save_jpeg("a.jpg", tile, {"seed": 3}))["seed"]
    3
    """
    _check(image)
    if max(image.shape) > _JPEG_SIDE:
        size = f"{image.shape[1]} x {image.shape[0]} px"
        raise UserError(f"{path} would be {size}; a JPEG has {_JPEG_SIDE} at most: write a .tif or .png.")
    text, exif = mark_text(metadata), Image.Exif()
    exif[DESCRIPTION] = text
    about = {"comment": text.encode(), "exif": exif, "quality": quality, "subsampling": 0}
    return _whole(path, lambda part: Image.fromarray(np.asarray(image)).save(part, "JPEG", **about))


def save_png(path: Path | str, image: np.ndarray, metadata: Mapping[str, Any]) -> Path:
    """Write image (H, W, 3) uint8 with its mark: the metadata (model, seed, ...) and that it is synthetic.

    >>> from ldm.images.marks import read_mark
    >>> read_mark(save_png("a.png", tile, {"seed": 3}))["seed"]
    3
    """
    _check(image)
    info = _png_info(metadata)
    return _whole(path, lambda part: Image.fromarray(np.asarray(image)).save(part, "PNG", pnginfo=info))


def _png_info(metadata: Mapping[str, Any]) -> PngInfo:
    info = PngInfo()
    info.add_text(KEY, json.dumps(mark_of(metadata)))
    info.add_text("Description", mark_text(metadata))
    return info


def save_animation(
    path: Path | str, frames: Sequence[np.ndarray], metadata: Mapping[str, Any], seconds: float = 0.4
) -> Path:
    """Write frames (H, W, 3) uint8 as a moving picture without end, with its mark: .gif, .webp, or .png (an APNG).

    >>> with Image.open(save_animation("a.gif", [tile, 255 - tile], {"seed": 3})) as film:
    ...     film.n_frames
    2
    """
    for frame in frames:
        _check(frame)
    kinds = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}
    if (suffix := Path(path).suffix.lower()) not in kinds:
        raise UserError(f"a moving picture ends in {', '.join(kinds)}; got {path}.")
    text, info, exif = mark_text(metadata), _png_info(metadata), Image.Exif()
    exif[DESCRIPTION] = text
    about = {".gif": {"comment": text.encode()}, ".webp": {"exif": exif, "lossless": True}, ".png": {"pnginfo": info}}
    first, *others = (Image.fromarray(np.asarray(frame)) for frame in frames)
    timing = {"save_all": True, "append_images": others, "duration": round(1000 * seconds), "loop": 0}
    return _whole(path, lambda part: first.save(part, kinds[suffix], **timing, **about[suffix]))


def save_real_png(path: Path | str, image: np.ndarray) -> Path:
    """Write image (H, W, 3) uint8 that was not generated, without a word about it.

    >>> from ldm.images.marks import read_mark
    >>> read_mark(save_real_png("a.png", tile))
    {}
    """
    _check(image)
    return _whole(path, lambda part: Image.fromarray(np.asarray(image)).save(part, "PNG"))


def save_bigtiff(path: Path | str, image: Any, mpp: float, metadata: Mapping[str, Any], quality: int = 90) -> Path:
    """Write a pyramidal BigTIFF: levels as a chain of main directories, JPEG tiles, resolution per centimetre.

    OpenSlide opens it as generic-tiff with its levels and mpp.

    Args:
        image: (H, W, 3) uint8, sliceable.
        mpp: micrometres per pixel.
        metadata: model, seed, condition, ...: goes into ImageDescription.
        quality: of the JPEG tiles, 1..100.

    >>> from ldm.images.slides import open_image
    >>> open_image(save_bigtiff("a.tif", tile, 0.5, {"seed": 3}))
    Slide('a.tif', 256 x 256 px at 0.5 um/px)
    """
    _check(image)
    _check_mpp(mpp)

    def write(part: Path) -> None:
        levels = _pyramid(image, part.parent)
        shown = image.shape[0] * image.shape[1] > _LARGE
        with tile_bar(levels, shown) as bar, tifffile.TiffWriter(part, bigtiff=True) as file:
            for level, pixels in enumerate(levels):
                factor = image.shape[0] / pixels.shape[0], image.shape[1] / pixels.shape[1]
                file.write(
                    tiles(pixels, bar),
                    shape=pixels.shape,
                    dtype=np.uint8,
                    tile=(TILE, TILE),
                    photometric="rgb",
                    compression="jpeg",
                    compressionargs={"level": quality},
                    subsampling=(1, 1),  # H&E lives in its colours
                    resolution=(1e4 / (mpp * factor[1]), 1e4 / (mpp * factor[0])),
                    resolutionunit="CENTIMETER",
                    description=mark_text(metadata) if level == 0 else None,
                    software=f"HistoLDM {tool_version()}",
                    subfiletype=0 if level == 0 else 1,
                    metadata=None,
                )

    return _whole(path, write)


def save_ome_zarr(path: Path | str, image: Any, mpp: float, metadata: Mapping[str, Any]) -> Path:
    """Write an OME-Zarr 0.5 multiscale image: a folder, axes c, y, x in micrometres. Arguments as in `save_bigtiff`.

    >>> from ldm.images.slides import open_image
    >>> open_image(save_ome_zarr("a.ome.zarr", tile, 0.5, {"seed": 3}))
    Slide('a.ome.zarr', 256 x 256 px at 0.5 um/px)
    """
    _check(image)
    _check_mpp(mpp)

    def write(part: Path) -> None:
        create_ome_zarr(part, Path(path).name, image.shape[:2], mpp, metadata)
        for i, pixels in enumerate(_pyramid(image, part.parent)):
            level = Level(part / str(i))
            for y, x in corners(pixels.shape, _BLOCK):
                place = slice(y, y + _BLOCK), slice(x, x + _BLOCK)
                level[place] = np.asarray(pixels[place])

    return _whole(path, write)


def _check(image: Any) -> None:
    if len(image.shape) != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"an image is (H, W, 3) uint8, got {image.shape} {image.dtype}")


def _check_mpp(mpp: float) -> None:
    if not 0 < mpp < float("inf"):
        raise UserError(f"mpp is micrometres per pixel, above 0; got {mpp}")


def _whole(path: Path | str, write: Callable[[Path], None]) -> Path:
    """Let `write` make a file or folder beside `path`, then give it its name."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        if path.is_dir() and not (path / "zarr.json").is_file():
            raise UserError(f"{path} is a folder that this program did not write; give another name")
        with whole(path) as part:
            write(part)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def _pyramid(image: Any, scratch: Path) -> list[Any]:
    """`image` and its halvings until one tile holds it; the halvings lie in memory-mapped files in `scratch`."""
    levels = [image]
    for size in level_sizes(*image.shape[:2])[1:]:
        fine, file = levels[-1], scratch / f".level-{len(levels)}"
        coarse = np.memmap(file, np.uint8, "w+", shape=(*size, 3))
        reserve(file)
        for y, x in corners(fine.shape, _BLOCK):
            block = halved(np.asarray(fine[y : y + _BLOCK, x : x + _BLOCK]))
            coarse[y // 2 : y // 2 + len(block), x // 2 : x // 2 + block.shape[1]] = block
        levels.append(coarse)
    return levels
