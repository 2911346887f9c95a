"""`histoldm translate`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.app import app
from ldm.cli.options import (
    BatchOption,
    DeviceOption,
    EtaOption,
    ModelOption,
    Precision,
    PrecisionOption,
    Schedule,
    ScheduleOption,
    SeedOption,
    Solver,
    StepsOption,
    integers,
)
from ldm.devices import pick_device

Start = Enum("Start", {name: name for name in ("invert", "noise", "none")}, type=str)
Texts = list[str] | None


@app.command(rich_help_panel="Generate")
def translate(
    model: ModelOption,
    images: Annotated[Path, typer.Option("--images", help="An image, a folder of them, a tile store, an OME-Zarr.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the images, their list and a sheet for each.")],
    source: Annotated[
        Texts, typer.Option("--source", help="What the images are, name=value (repeat); a store knows its own.")
    ] = None,
    target: Annotated[
        Texts,
        typer.Option("--target", help="What they become: class=LUAD, 'class=LUAD; score=0.3', 'name: class=LUAD'."),
    ] = None,
    edit: Annotated[
        Texts,
        typer.Option("--edit", help="mutation=TP53:1, expression=MKI67:0:1:5 (a sweep), expression=MKI67:x2 (repeat)."),
    ] = None,
    spec: Annotated[Path | None, typer.Option("--spec", help="YAML of a batch, or His-MMDM's (.yaml, .pkl).")] = None,
    table: Annotated[
        Path | None, typer.Option("--table", help="CSV of pairs: file, source.<name>, target.<name>, label.")
    ] = None,
    class_of_name: Annotated[
        bool, typer.Option("--class-of-name", help="Sources' classes are in their names: <class>__<anything>.png.")
    ] = False,
    mutation_table: Annotated[
        Path | None, typer.Option("--mutation-table", help="Sources' mutations, of samples that the names tell.")
    ] = None,
    expression_table: Annotated[Path | None, typer.Option("--expression-table", help="Their expression.")] = None,
    features: Annotated[
        Path | None, typer.Option("--features", help="Sources' features, one for each image in order.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Encoder, by name or folder, that makes the sources' features.")
    ] = None,
    target_features: Annotated[
        Path | None, typer.Option("--target-features", help="Targets' features: one, or one for each image.")
    ] = None,
    map_features: Annotated[
        Path | None, typer.Option("--map-features", help="Map of features, of data_prep.train_feature_map.")
    ] = None,
    start: Annotated[
        Start | None,
        typer.Option("--start", help="From the image inverted (default), noised (SDEdit), or none of it."),
    ] = None,
    strength: Annotated[
        float, typer.Option("--strength", help="Share of the steps taken, up to 1: the less, the more stays.")
    ] = 1.0,
    exact: Annotated[
        bool, typer.Option("--exact", help="Inversion that the source's condition undoes; slower.")
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="His-MMDM's procedure in all details; DDIM, steps divide 1000.")
    ] = False,
    classifier: Annotated[
        Path | None, typer.Option("--classifier", help="Folder of a classifier of noisy images that guides.")
    ] = None,
    classifier_scale: Annotated[float, typer.Option("--classifier-scale", help="Of its gradient.")] = 1.0,
    guidance_scale: Annotated[
        Texts, typer.Option("--guidance-scale", help="On the way down; 1: none; or name=scale, as class=3 (repeat).")
    ] = None,
    enlarge: Annotated[
        int | None, typer.Option("--enlarge", min=2, help="Super-resolution: so many times; shrunk, it is the image.")
    ] = None,
    region: Annotated[str | None, typer.Option("--region", help="x,y,width,height px of one large image.")] = None,
    mpp: Annotated[float | None, typer.Option("--mpp", help="Micrometres per pixel, where files do not say.")] = None,
    where: Annotated[
        Texts, typer.Option("--where", help="Selection in a tile store, label=value, as split=val.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="At most so many images.")] = None,
    steps: StepsOption = 25,
    solver: Annotated[
        Solver | None, typer.Option("--solver", help="Default dpmpp_2m; euler (DDIM) of --exact and --published.")
    ] = None,
    schedule: ScheduleOption = Schedule.karras,
    eta: EtaOption = 1.0,
    seed: SeedOption = 0,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
    save_intermediates: Annotated[
        int, typer.Option("--save-intermediates", min=0, help="Denoised images to keep of each way down.")
    ] = 0,
    differences: Annotated[
        bool | None, typer.Option("--differences/--no-differences", help="Maps of what changed; of edits by default.")
    ] = None,
) -> None:
    """Turn images into others: domains, stains, genes, modalities, resolution. Size and mpp stay.

    Examples: histoldm translate --model M --images tiles --source class=COAD --target class=LUAD --out out;
    histoldm translate --model M --images a.png --edit mutation=TP53:1 --edit expression=MKI67:0:1:5 --out out
    """
    from ldm.commands.translate import translate_pictures
    from ldm.requests.tiles import parse_guidance, parse_where

    asked = {
        "region": integers(region, 4, "--region", "x,y,width,height"), "mpp": mpp, "where": parse_where(where or []),
        "count": count, "source": source or [], "targets": target or [], "edits": edit or [], "spec": spec,
        "table": table, "names": class_of_name, "mutation_table": mutation_table,
        "expression_table": expression_table, "encoder": encoder, "features": features,
        "target_features": target_features, "map_features": map_features,
    }  # fmt: skip
    translate_pictures(
        model, images, out, pick_device(device), batch_size, asked, classifier, classifier_scale, enlarge,
        save_intermediates, differences, start=start.value if start else None, strength=strength, exact=exact,
        published=published, guidance_scale=parse_guidance(guidance_scale or []), steps=steps,
        solver=solver.value if solver else None, schedule=schedule.value, eta=eta, seed=seed,
        precision=precision.value,
    )  # fmt: skip
