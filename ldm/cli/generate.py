"""`histoldm sample` and `histoldm large-image`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ldm.cli.app import app
from ldm.cli.options import (
    AllowTargetOption,
    ConditionOption,
    DeviceOption,
    FeatureOption,
    FeaturesOption,
    ModelOption,
    OverviewOption,
    WhereOption,
    inputs,
    output,
    wanted,
)
from ldm.cli.sampling import settings
from ldm.data.where import parse_where
from ldm.devices import pick_device
from ldm.requests.parse import parse_integers
from ldm.requests.sampling import AskedSampler
from ldm.sampling.sampler import Windows


@app.command(rich_help_panel="Generate")
@settings("sample")
def sample(
    model: ModelOption,
    out: Annotated[Path, output("--out", help="Folder for the tiles, their list and a contact sheet.")],
    sampler: AskedSampler,
    condition: ConditionOption = None,
    features: Annotated[
        Path | None,
        inputs("--features", help="Features (.npy, .h5, .pt), or a tile store: its conditions, tile by tile."),
    ] = None,
    table: Annotated[
        Path | None, inputs("--table", help="Table of conditions (CSV, TSV): a column for each, a row per tile.")
    ] = None,
    feature: FeatureOption = None,
    where: WhereOption = None,
    count: Annotated[
        int | None, wanted("--count", min=1, help="Number of tiles; evenly chosen where there are more.")
    ] = None,
    device: DeviceOption = "auto",
    allow_target: AllowTargetOption = None,
) -> None:
    r"""Generate tiles under conditions by name, of a table, of a file of features, or of the tiles of a store.

    Examples:

        histoldm sample --model M --condition class=LUAD \
            --condition score=0.7 --count 8 --out tiles
        histoldm sample --model data/models/demo-ssl --features store.zarr \
            --where split=val --out tiles
    """
    from ldm.commands.generate import sample_tiles
    from ldm.requests.tiles import AskedTiles

    asked = AskedTiles(features, feature, parse_where(where), condition or [], table, count)
    sample_tiles(model, out, pick_device(device), asked, sampler)


@app.command("large-image", rich_help_panel="Generate")
@settings("large_image")
def large_image(
    model: ModelOption,
    features: FeaturesOption,
    out: Annotated[list[Path], output("--out", help="Output file: .png, .jpg, .tif (pyramid) or .ome.zarr (repeat).")],
    sampler: AskedSampler,
    windows: Windows,
    condition: ConditionOption = None,
    feature: FeatureOption = None,
    overview: OverviewOption = None,
    region: Annotated[
        str | None,
        wanted("--region", help="Region of the slide of a tile store: x,y,width,height in level-0 pixels."),
    ] = None,
    size: Annotated[
        str | None, wanted("--size", help="Size of the image: width,height in pixels; by default the grid's.")
    ] = None,
    mpp: Annotated[
        float | None, wanted("--mpp", help="Micrometres per pixel of the image; by default the model's.")
    ] = None,
    device: DeviceOption = "auto",
    allow_target: AllowTargetOption = None,
) -> None:
    r"""Generate one image of any size from a grid of features; the one at (row, col) conditions the image there.

    Example:

        histoldm large-image --model M --features store.zarr \
            --region 896,1472,1024,1024 --out image.tif
    """
    from ldm.commands.generate import generate_large_image

    wide = parse_integers(size, 2, "--size", "width,height")
    generate_large_image(
        model,
        features,
        out,
        feature,
        parse_integers(region, 4, "--region", "x,y,width,height"),
        wide and wide[::-1],
        mpp,
        condition or [],
        overview,
        pick_device(device),
        sampler,
        windows,
    )
