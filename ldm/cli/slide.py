"""`histoldm slide`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ldm.cli.app import app
from ldm.cli.options import (
    AllowTargetOption,
    ConditionOption,
    DeviceOption,
    FeatureOption,
    ModelOption,
    OverviewOption,
    inputs,
    output,
    wanted,
)
from ldm.cli.sampling import settings
from ldm.devices import pick_device
from ldm.requests.parse import parse_integers
from ldm.requests.sampling import AskedSampler
from ldm.sampling.sampler import Windows


@app.command(rich_help_panel="Generate")
@settings("large_image")
def slide(
    model: ModelOption,
    out: Annotated[list[Path], output("--out", help="Slide: .ome.zarr, or .tif as scanners write it (repeat).")],
    sampler: AskedSampler,
    windows: Windows,
    features: Annotated[
        Path | None,
        inputs("--features", help="Features: .npy, .h5 (CLAM, TRIDENT), .pt, or a tile store (.zarr)."),
    ] = None,
    layout: Annotated[
        Path | None,
        inputs("--layout", help="Table of conditions (CSV, TSV) by place: columns row, col, and one for each."),
    ] = None,
    condition: ConditionOption = None,
    feature: FeatureOption = None,
    overview: OverviewOption = None,
    region: Annotated[
        str | None,
        wanted("--region", help="Region of the slide of a tile store: x,y,width,height in level-0 pixels."),
    ] = None,
    size: Annotated[
        str | None, wanted("--size", help="Size of the slide: width,height in pixels; by default the grid's.")
    ] = None,
    mpp: Annotated[
        float | None, wanted("--mpp", help="Micrometres per pixel of the slide; by default the model's.")
    ] = None,
    jpeg_quality: Annotated[
        int, output("--jpeg-quality", min=1, max=100, help="Quality of the JPEG tiles of a .tif.")
    ] = 90,
    device: DeviceOption = "auto",
    allow_target: AllowTargetOption = None,
) -> None:
    r"""Generate a whole slide from a grid of features or a layout of conditions: any size, in little memory.

    Stopped at any moment, the same command goes on. torchrun and SLURM start it as processes that share the work.

    Examples:

        histoldm slide --model M --features store.zarr \
            --out slide.ome.zarr --out slide.tif
        torchrun --nproc-per-node 4 -m ldm.cli slide --model M \
            --features store.zarr --out slide.tif
    """
    from ldm.commands.slide import AskedSlide, generate_slide

    asked = AskedSlide(
        model,
        out,
        features,
        layout,
        feature,
        parse_integers(region, 4, "--region", "x,y,width,height"),
        parse_integers(size, 2, "--size", "width,height"),
        mpp,
        condition or [],
        jpeg_quality,
        pick_device(device),
        overview,
    )
    generate_slide(asked, sampler, windows)
