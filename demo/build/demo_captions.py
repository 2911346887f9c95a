r"""Write images of several kinds with captions, for the demo's text-to-image model.

They are tissue, slices of volumes and radiographs. captions.csv (path, text, modality, patient) lists them for
`data_prep.import_captions`. Captions say what can be told without a reader: of tissue the stain, the organ and whether
a tile has many or few nuclei (the upper and lower third of its slide by mean haematoxylin, colour deconvolution); of
slices the sequence and whether the given segmentation has tumour there; of radiographs the notes of their table. The
column patient is a block of 128 µm, or of five slices, so that splits have no pixel in common.

Example:

    python -m demo.build.demo_captions --out captioned \
        --tissue "H&E: skin=CMU-1-Small-Region.svs" "IHC: Ki67=OS-2.ome.tif" \
        --volumes FLAIR=fla.nii.gz T1=t1.nii.gz --tumour seg_fusion.nii.gz \
        --radiographs captions.csv
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from skimage.color import rgb2hed
from tqdm import tqdm

from data_prep.options import inputs, output
from ldm.cli.script import script
from ldm.data.volumes import Volume, cut_slice, in_plane, to_tile, windowed
from ldm.errors import UserError
from ldm.files import whole
from ldm.images.pictures import Picture
from ldm.images.slides import open_slide
from ldm.images.tissue import TissueMask
from ldm.tables.captions import read_captions, square

SIZE = 64  # px of all images
BLOCK = 128  # µm, of tissue that stays in one split
STRIDE = 16  # µm
SLICES = range(30, 120)  # axial
TUMOUR = 50  # voxels of a slice that has tumour
Row = tuple[np.ndarray, str, str, str]  # image, text, modality, patient


def tissue(name: str, path: Path, mpp: float | None) -> Iterator[Row]:
    """Tiles of 64 µm, those of tissue; `name` is "modality: what it is"."""
    modality, _, what = (part.strip() for part in name.partition(":"))
    slide = open_slide(path, mpp)
    mask = TissueMask(slide)
    scale = 1 / slide.mpp  # level-0 pixels per µm
    width, height = (int(side / scale) for side in slide.dimensions)
    inside = range(0, BLOCK - SIZE + 1, STRIDE)
    blocks = [(x, y) for y in range(0, height - BLOCK + 1, BLOCK) for x in range(0, width - BLOCK + 1, BLOCK)]
    places = np.array([(bx + x, by + y) for bx, by in blocks for y in inside for x in inside]).reshape(-1, 2)
    places = places[mask.fraction(places * scale, SIZE * scale) > 0.5]
    if not len(places):
        raise UserError(
            f"{path} has no tissue in squares of {SIZE} µm; are its {slide.mpp:g} µm per pixel right? See --mpp"
        )
    images = [slide.read(x * scale, y * scale, SIZE * scale, SIZE * scale, (SIZE, SIZE)) for x, y in places]
    stained = np.array([rgb2hed(image)[..., 0].mean() for image in images])
    low, high = np.quantile(stained, [1 / 3, 2 / 3])
    for image, (x, y), value in zip(images, places, stained):
        words = ", many nuclei" if value > high else ", few nuclei" if value < low else ""
        yield image, what + words, modality, f"{path.stem}-{x // BLOCK}-{y // BLOCK}"


def slices(volumes: dict[str, Path], tumour: Path) -> Iterator[Row]:
    labels = Volume(tumour).values()
    for sequence, path in volumes.items():
        volume = Volume(path)
        values = volume.values()
        if values.shape != labels.shape:
            raise UserError(f"{path} has the shape {values.shape}, {tumour} {labels.shape}: give one subject's volumes")
        low, high = np.percentile(values, (0.5, 99.5))
        for i in range(SLICES.start, min(SLICES.stop, values.shape[2])):
            ill = (cut_slice(labels, 2, i) > 0).sum() >= TUMOUR
            image = to_tile(windowed(cut_slice(values, 2, i), low, high), SIZE, in_plane(volume.spacing, 2))
            yield image, f"{sequence}, {'with' if ill else 'without'} tumour", "MRI", f"slices-{i // 5}"


def radiographs(table: Path, text_column: str) -> Iterator[Row]:
    for caption in read_captions(table, table.parent / "images", text_column=text_column).captions:
        pixels = Picture.of_file(caption.image).pixels()
        yield square(pixels, SIZE), " ".join(caption.text.split()), "X-ray", "radiographs"


def named(texts: Sequence[str]) -> list[tuple[str, Path]]:
    """NAME=FILE each; a file is what stands behind the last =."""
    pairs = [text.rpartition("=")[::2] for text in texts]
    for text, (name, path) in zip(texts, pairs):
        if not name or not Path(path).is_file():
            raise UserError(f"a source is given as NAME=FILE with a file that exists; got '{text}'")
    return [(name, Path(path)) for name, path in pairs]


@script("demo.build.demo_captions", __doc__)
def main(
    *,
    tissues: Annotated[
        list[str] | None, inputs("--tissue", help="Slide and what it shows, as 'H&E: skin=FILE': one or several.")
    ] = None,
    mpp: Annotated[float | None, inputs("--mpp", help="Micrometres per pixel of slides that do not say it.")] = None,
    volumes: Annotated[
        list[str] | None, inputs("--volumes", help="NIfTI volumes of one subject, as T1=FILE: one or several.")
    ] = None,
    tumour: Annotated[
        Path | None, inputs("--tumour", help="NIfTI labels on the same grid, above 0 where there is tumour.")
    ] = None,
    table: Annotated[
        Path | None, inputs("--radiographs", help="CSV of radiographs, which lie in images/ beside it.")
    ] = None,
    text_column: Annotated[
        str, inputs("--text-column", help="Column of captions in the table of radiographs.")
    ] = "clinical_notes",
    out: Annotated[Path, output("--out", help="Folder of images and captions.csv to write.")],
) -> None:
    if volumes and not tumour:
        raise UserError("--volumes needs --tumour, the labels that their captions are made of")
    sources = [tissue(name, path, mpp) for name, path in named(tissues or [])]
    if volumes:
        sources.append(slices(dict(named(volumes)), tumour))
    if table:
        sources.append(radiographs(table, text_column))
    if not sources:
        raise UserError("there is nothing to write; give --tissue, --volumes or --radiographs")
    (out / "images").mkdir(parents=True, exist_ok=True)
    with whole(out / "captions.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "modality", "patient"))
        rows = (row for source in sources for row in source)
        for i, (image, text, modality, patient) in enumerate(tqdm(rows, desc="images", unit="image")):
            path = f"images/{i:05d}.png"
            Image.fromarray(image).save(out / path)
            writer.writerow((path, text, modality, patient))
    print(f"{i + 1} images and {out / 'captions.csv'}")


if __name__ == "__main__":
    main.run()
