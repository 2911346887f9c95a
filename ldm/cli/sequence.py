"""`histoldm sequence`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.app import app
from ldm.cli.options import (
    BatchOption,
    ConditionOption,
    DeviceOption,
    EtaOption,
    GuidanceOption,
    ModelOption,
    Precision,
    PrecisionOption,
    Schedule,
    SeedOption,
    Solver,
)
from ldm.devices import pick_device

Animation = Enum("Animation", {name: name for name in ("gif", "apng", "webp")}, type=str)


@app.command(rich_help_panel="Generate")
def sequence(
    model: ModelOption,
    vary: Annotated[str, typer.Option("--vary", help="name=start:stop:count, as score=0:1:5; of genes MKI67:0:1:5.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for images, their list, a grid and an animation.")],
    condition: ConditionOption = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="How many sequences (8, or one per real image).")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Real images to start from: a file, a folder, a tile store.")
    ] = None,
    images_mpp: Annotated[
        float | None, typer.Option("--images-mpp", help="Their micrometres per pixel, where not the model's.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option("--where", help="Selection in a tile store, label=value, as split=val.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", help="name=value that real images are inverted under; a store knows its own."),
    ] = None,
    strength: Annotated[
        float, typer.Option("--strength", help="Of the inversion, up to 1: the less, the more of the image stays.")
    ] = 1.0,
    scorer: Annotated[
        Path | None, typer.Option("--scorer", help="Scorer folder: its curve under the grid, its scores in the list.")
    ] = None,
    animation: Annotated[Animation, typer.Option("--animation", help="Format of the moving picture.")] = Animation.gif,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Sampling steps (20, or 50 from real images).")
    ] = None,
    solver: Annotated[
        Solver | None, typer.Option("--solver", help="dpmpp_2m, or euler from real images (heun is possible).")
    ] = None,
    schedule: Annotated[
        Schedule | None, typer.Option("--schedule", help="Where the steps lie: trailing, or uniform from real images.")
    ] = None,
    eta: EtaOption = 1.0,
    guidance_scale: GuidanceOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    """Move one condition in steps with the noise kept: what the model makes of it, image by image.

    Examples: histoldm sequence --model M --vary score=0:1:5 --count 8 --scorer SCORERS --out sequences;
    from real cells: histoldm sequence --model M --vary score=0:1:5 --images cohort --where split=val --out moved
    """
    from ldm.commands.sequence import write_sequences
    from ldm.requests.tiles import parse_guidance, parse_where

    write_sequences(
        model, out, pick_device(device), vary, condition or [], batch_size, scorer, animation.value,
        {"images": images, "mpp": images_mpp, "where": parse_where(where or []), "source": source or [],
         "strength": strength, "count": count},
        steps=steps, solver=solver.value if solver else None, schedule=schedule.value if schedule else None,
        eta=eta, seed=seed, precision=precision.value, guidance_scale=parse_guidance(guidance_scale or []),
    )  # fmt: skip
