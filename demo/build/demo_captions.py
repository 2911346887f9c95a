"""Images of several kinds with captions, for the demo's text-to-image model: tissue, slices of volumes, radiographs.

    python -m demo.build.demo_captions --tissue "H&E: skin=CMU-1-Small-Region.svs"
        --tissue "IHC: Ki67=OS-2-ndpi.ome.tif"
        --volumes FLAIR=fla.nii.gz T1=t1.nii.gz --tumour seg_fusion.nii.gz --radiographs captions.csv --out captioned

writes images and captions.csv (path, text, modality, patient), which `data_prep.import_captions` reads. Captions say
what can be told without a reader: of tissue the stain, the organ and whether a tile has many or few nuclei (the upper
and lower third of its slide by mean haematoxylin, colour deconvolution); of slices the sequence and whether the given
segmentation has tumour there; of radiographs the notes of their table. The column patient is a block of 128 um, or of
five slices, so that splits have no pixel in common.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.color import rgb2hed
from tqdm import tqdm

from ldm.data.volumes import Volume, cut_slice, in_plane, to_tile, windowed
from ldm.errors import UserError, run_command
from ldm.files import whole
from ldm.images.slides import TissueMask, open_any, open_slide
from ldm.tables.captions import open_image, read_captions, square

SIZE = 64  # px of all images
BLOCK = 128  # um, of tissue that stays in one split
STRIDE = 16  # um
SLICES = range(30, 120)  # axial
TUMOUR = 50  # voxels of a slice that has tumour
Row = tuple[np.ndarray, str, str, str]  # image, text, modality, patient


def tissue(name: str, path: Path, mpp: float | None) -> Iterator[Row]:
    """Tiles of 64 um, those of tissue; `name` is "modality: what it is"."""
    modality, _, what = (part.strip() for part in name.partition(":"))
    slide = open_slide(path, None if open_any(path).mpp else mpp)
    mask = TissueMask(slide)
    scale = 1 / slide.mpp  # level-0 pixels per um
    width, height = (int(side / scale) for side in slide.dimensions)
    inside = range(0, BLOCK - SIZE + 1, STRIDE)
    blocks = [(x, y) for y in range(0, height - BLOCK + 1, BLOCK) for x in range(0, width - BLOCK + 1, BLOCK)]
    places = np.array([(bx + x, by + y) for bx, by in blocks for y in inside for x in inside]).reshape(-1, 2)
    places = places[mask.fraction(places * scale, SIZE * scale) > 0.5]
    if not len(places):
        raise UserError(f"{path} has no tissue in squares of {SIZE} um; is its um per pixel ({slide.mpp:g}) right?")
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
        yield square(open_image(caption.image), SIZE), " ".join(caption.text.split()), "X-ray", "radiographs"


def named(texts: Sequence[str]) -> list[tuple[str, Path]]:
    """NAME=FILE each; a file is what stands behind the last =."""
    pairs = [text.rpartition("=")[::2] for text in texts]
    for text, (name, path) in zip(texts, pairs):
        if not name or not Path(path).is_file():
            raise UserError(f"'{text}' is not NAME=FILE with a file that is there")
    return [(name, Path(path)) for name, path in pairs]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo.build.demo_captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tissue", action="append", default=[], metavar="'MODALITY: WHAT=FILE'", help="a slide and what it shows")
    add("--mpp", type=float, help="um per pixel of slides that do not say it")
    add("--volumes", nargs="+", default=[], metavar="SEQUENCE=FILE", help="NIfTI volumes of one subject")
    add("--tumour", type=Path, help="NIfTI labels on the same grid, above 0 where tumour is")
    add("--radiographs", type=Path, metavar="CSV", help="table of radiographs, which lie in images/ beside it")
    add("--text-column", default="clinical_notes", help="its column of captions (default %(default)s)")
    add("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    if args.volumes and not args.tumour:
        raise UserError("--volumes needs --tumour, the labels that captions are told by")
    sources: list[Iterator[Row]] = []
    sources += [tissue(name, path, args.mpp) for name, path in named(args.tissue)]
    if args.volumes:
        sources.append(slices(dict(named(args.volumes)), args.tumour))
    if args.radiographs:
        sources.append(radiographs(args.radiographs, args.text_column))
    if not sources:
        raise UserError("nothing to write: give --tissue, --volumes or --radiographs")
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    with whole(args.out / "captions.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "modality", "patient"))
        rows = (row for source in sources for row in source)
        for i, (image, text, modality, patient) in enumerate(tqdm(rows, desc="images", unit="image")):
            path = f"images/{i:05d}.png"
            Image.fromarray(image).save(args.out / path)
            writer.writerow((path, text, modality, patient))
    print(f"{i + 1} images and {args.out / 'captions.csv'}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
