"""`histoldm sample` and `histoldm large-image`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.app import app
from ldm.cli.options import (
    AllowTargetOption,
    BatchOption,
    ConditionOption,
    DeviceOption,
    EtaOption,
    FeatureOption,
    FeaturesOption,
    GuidanceOption,
    Interpolation,
    IntervalOption,
    Mode,
    ModelOption,
    Precision,
    PrecisionOption,
    Schedule,
    ScheduleOption,
    SeedOption,
    Solver,
    SolverOption,
    StepsOption,
    integers,
    interval,
)
from ldm.devices import pick_device


@app.command(rich_help_panel="Generate")
def sample(
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the tiles, their list and a contact sheet.")],
    condition: ConditionOption = None,
    features: Annotated[
        Path | None,
        typer.Option("--features", help="Features (.npy, .h5, .pt), or a tile store: its conditions, tile by tile."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--table", help="CSV or TSV: a column per condition, a tile per row.")
    ] = None,
    feature: FeatureOption = None,
    where: Annotated[
        list[str] | None, typer.Option("--where", help="Selection in a tile store, label=value, as split=val.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="How many; evenly chosen where there are more.")
    ] = None,
    steps: StepsOption = 20,
    solver: SolverOption = Solver.dpmpp_2m,
    schedule: ScheduleOption = Schedule.trailing,
    eta: EtaOption = 1.0,
    guidance_scale: GuidanceOption = None,
    guidance_interval: IntervalOption = "all",
    guidance_rescale: Annotated[
        float, typer.Option("--guidance-rescale", min=0, max=1, help="Draws contrast that guidance raised back.")
    ] = 0.0,
    negative_condition: Annotated[
        list[str] | None, typer.Option("--negative-condition", help="name=value to move away from (repeat).")
    ] = None,
    guide_model: Annotated[
        Path | None, typer.Option("--guide-model", help="Smaller or less trained model to move away from.")
    ] = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network first: pays for many tiles.")] = False,
    cache: Annotated[
        int, typer.Option("--cache", min=1, help="Deep features at every n-th step only: faster, approximate.")
    ] = 1,
    allow_target: AllowTargetOption = None,
) -> None:
    """Generate tiles under conditions by name, of a table, of a file of features, or of the tiles of a store.

    Examples: histoldm sample --model M --condition class=LUAD --condition score=0.7 --count 8 --out tiles;
    histoldm sample --model data/models/demo-ssl --features store.zarr --where split=val --out tiles
    """
    from ldm.commands.generate import sample_tiles
    from ldm.requests.tiles import parse_guidance, parse_where

    asked = {"features": features, "feature": feature, "where": parse_where(where or []), "table": table}
    sample_tiles(
        model, out, pick_device(device), batch_size, {**asked, "conditions": condition or [], "count": count},
        negative=negative_condition or [], guide=guide_model,
        steps=steps, solver=solver.value, schedule=schedule.value, eta=eta,
        guidance_scale=parse_guidance(guidance_scale or []), guidance_interval=interval(guidance_interval),
        guidance_rescale=guidance_rescale, seed=seed, precision=precision.value, compile=compile, cache=cache,
    )  # fmt: skip


@app.command("large-image", rich_help_panel="Generate")
def large_image(
    model: ModelOption,
    features: FeaturesOption,
    out: Annotated[
        list[Path], typer.Option("--out", help="Output file: .png, .tif (pyramid), .ome.zarr. May be repeated.")
    ],
    condition: ConditionOption = None,
    feature: FeatureOption = None,
    region: Annotated[
        str | None, typer.Option("--region", help="x,y,width,height of the slide, level-0 px, for a tile store.")
    ] = None,
    size: Annotated[str | None, typer.Option("--size", help="height,width in px; default: the grid's.")] = None,
    mode: Annotated[Mode, typer.Option("--mode", help="shifted windows, or overlap as published.")] = Mode.shifted,
    stride: Annotated[int | None, typer.Option("--stride", help="Of --mode overlap, in px.")] = None,
    interpolation: Annotated[Interpolation, typer.Option("--interpolation", help="Between the grid's features.")] = (
        Interpolation.linear
    ),
    mpp: Annotated[float | None, typer.Option("--mpp", help="Micrometres per pixel; default: the model's.")] = None,
    steps: StepsOption = 10,
    solver: SolverOption = Solver.dpmpp_2m,
    schedule: ScheduleOption = Schedule.trailing,
    eta: EtaOption = 1.0,
    guidance_scale: GuidanceOption = None,
    guidance_interval: IntervalOption = "1,7",
    seed: SeedOption = 0,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
    allow_target: AllowTargetOption = None,
) -> None:
    """Generate one image of any size from a grid of features; the one at (row, col) conditions the image there.

    Example: histoldm large-image --model M --features store.zarr --region 896,1472,1024,1024 --out image.tif
    """
    from ldm.commands.generate import generate_large_image
    from ldm.requests.tiles import parse_guidance

    generate_large_image(
        model, features, out, feature, integers(region, 4, "--region", "x,y,width,height"),
        integers(size, 2, "--size", "height,width"), mpp, condition or [], pick_device(device), mode=mode.value,
        stride=stride, interpolation=interpolation.value, steps=steps, solver=solver.value, schedule=schedule.value,
        eta=eta, guidance_scale=parse_guidance(guidance_scale or []), seed=seed, batch_size=batch_size,
        precision=precision.value, guidance_interval=interval(guidance_interval),
    )  # fmt: skip
