"""Options that several scripts share, in one wording, and the panels in which help shows all options."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import PATIENT_RULE, DeviceOption, FilesInOption, choices, inputs, output, speed
from ldm.data.tile_store import PIXELS
from ldm.errors import UserError

__all__ = ["DeviceOption", "FilesInOption", "choices", "inputs", "output", "speed"]  # as those of `histoldm`

taken = partial(typer.Option, rich_help_panel="What is taken")
regional = partial(typer.Option, rich_help_panel="Regions")
splits = partial(typer.Option, rich_help_panel="Splits")


def check_side(size: int) -> int:
    """`size`, where it can be the side of a tile."""
    if size < 8:
        raise UserError(f"--size is at least 8 px; got {size}")
    return size


Origin = choices("Origin", ("slide", "bounds"))
Precision = choices("Precision", ("fp32", "bf16", "fp16"))

StoreOption = Annotated[
    list[Path], inputs("--store", help="Tile stores that get the arrays, or cohorts of stores: one or several.")
]
WeightsOption = Annotated[
    Path | None,
    inputs("--weights", help="File of its weights (default: in its folder, or in $HISTOLDM_WEIGHTS/<name>/)."),
]
SlidesOption = Annotated[
    list[Path],
    inputs(
        "--slides",
        help="Slides or images, folders of them, patterns as 'slides/**/*.svs', or a table (CSV) with the column path "
        "and maybe mpp, patient, split, stain, roi, exclude: one or several.",
    ),
]
SlideMppOption = Annotated[
    float | None,
    inputs("--slide-mpp", help="Micrometres per pixel of the slides or images, where their files do not say it."),
]
PatientOption = Annotated[
    str | None,
    inputs("--patient", help=f"Whose a slide is: {PATIENT_RULE} (default: as file or name say it)."),
]
OutOption = Annotated[
    Path, output("--out", help="Cohort folder to write: tile stores in slides/, the table of all tiles index.parquet.")
]
PreviewsOption = Annotated[
    bool,
    output("--previews/--no-previews", help="Write pictures and GeoJSON of each slide's tissue and tiles, for QuPath."),
]
LicenceOption = Annotated[str, output("--licence", help="Licence of the data, recorded with what is written.")]
MppOption = Annotated[
    float | None, taken("--mpp", help="Micrometres per pixel of the tiles (default: those of the slide).")
]
TileSizeOption = Annotated[int, taken("--tile-size", help="Side of the square tiles in pixels.")]
StrideOption = Annotated[
    int | None, taken("--stride", help="Pixels from a tile to the next (default: its side, so that they touch).")
]
MinTissueOption = Annotated[float, taken("--min-tissue", help="Least fraction of tissue in a tile; 0 takes all tiles.")]
KeepBackgroundOption = Annotated[
    float, taken("--keep-background", help="Fraction kept of the tiles with less, so that models know glass.")
]
RegionsOption = Annotated[
    Path | None,
    regional("--regions", help="GeoJSON of regions, as QuPath exports it, or a folder with one called as each slide."),
]
InsideOption = Annotated[
    list[str] | None, regional("--inside", help="Classes of regions to tile: one or several (default: all).")
]
OutsideOption = Annotated[
    list[str] | None, regional("--outside", help="Classes of regions to leave out: one or several.")
]
MinInsideOption = Annotated[
    float, regional("--min-inside", help="Least fraction of a tile that lies in them; at 0 they are labels alone.")
]
RegionOriginOption = Annotated[
    Origin | None,
    regional("--region-origin", help="Corner that coordinates count from (default: as file and extent tell)."),
]
Pixels = choices("Pixels", PIXELS)
PixelsOption = Annotated[
    Pixels,
    output("--pixels", help="Store tiles without loss (zstd), as jpeg, or none: read from the slides where needed."),
]
JpegQualityOption = Annotated[
    int | None, output("--jpeg-quality", min=1, max=100, help="Quality of --pixels jpeg (90 where it is not said).")
]
SizeOption = Annotated[int, taken("--size", callback=check_side, help="Side of the square tiles in pixels.")]
SeedOption = Annotated[int, taken("--seed", min=0, help="Seed of what is drawn: the same seed draws the same.")]
ValidationOption = Annotated[
    float | None,
    splits(
        "--validation",
        help="Fraction of the patients in split 'val', from 0 to 1 (default: 0.1, at least one of three or more).",
    ),
]
TestOption = Annotated[
    float | None, splits("--test", help="Fraction of the patients in split 'test', from 0 to 1 (default: 0).")
]
BatchOption = Annotated[int, speed("--batch-size", help="Tiles or captions per network call.")]
FeatureBatchOption = Annotated[
    int | None,
    speed("--batch-size", help="Tiles per network call.", show_default="64 on a GPU, 8 on a CPU"),
]
TokensOption = Annotated[
    int,
    taken(
        "--tokens", min=0, help="Write patch tokens too, averaged in so many parts along each side of a tile; 0: none."
    ),
]
PrecisionOption = Annotated[Precision, speed("--precision", help="Precision of the network's arithmetic.")]


def number(count: int, noun: str) -> str:
    """How many, in words: 1 store, 3 stores."""
    return f"{count} {noun}{'s' * (count != 1)}"
