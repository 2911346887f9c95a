"""`histoldm evaluate`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.app import app
from ldm.cli.options import DeviceOption, SeedOption
from ldm.devices import pick_device
from ldm.errors import UserError

Resize = Enum("Resize", {name: name for name in ("clean", "tensorflow")}, type=str)
Unit = Enum("Unit", {name: name for name in ("patient", "slide", "block", "image")}, type=str)
Stains = Enum("Stains", {name: name for name in ("he", "hd")}, type=str)


@app.command(rich_help_panel="Measure and choose")
def evaluate(
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html, report.json and feature files.")],
    generated: Annotated[
        Path | None,
        typer.Option(
            "--generated",
            help="Folder of images, output of `histoldm sample`, store, cohort, feature file, or "
            "one large image (.png, .tif, .ome.zarr).",
        ),
    ] = None,
    real: Annotated[
        Path | None, typer.Option("--real", help="Real images to compare with, in any of these forms.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option("--where", help="Which real images, label=value, as split=test (repeat).")
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            "--features",
            help="Extractor: inception, pixels, clip:ViT-L-14, an encoder by name, an encoder "
            "folder, or features in stores (repeat).",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option("--weights", help="Weights of the extractor, or extractor=path (repeat).")
    ] = None,
    train: Annotated[
        Path | None, typer.Option("--train", help="Training images: are they memorised? --real is held out then.")
    ] = None,
    train_where: Annotated[
        list[str] | None, typer.Option("--train-where", help="Which training images, as split=train (repeat).")
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option("--conditions", help="Cohort whose tiles conditioned the generated ones (default: --real)."),
    ] = None,
    class_column: Annotated[
        str, typer.Option("--class", help="Column of both lists for distances by class.")
    ] = "class",
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Folder of what --generated should be, file by file: PSNR, SSIM, ...")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="CSV with score, target and members score_0, ...: calibration.")
    ] = None,
    by: Annotated[
        Unit | None, typer.Option("--by", help="What intervals draw (default: patients, else slides, else images).")
    ] = None,
    crop: Annotated[
        int | None, typer.Option("--crop", min=16, help="Cut images into squares of so many px; large images: 256.")
    ] = None,
    tile: Annotated[int, typer.Option("--tile", min=16, help="Lattice of seams of a large image, px.")] = 256,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=16, help="Resize every image to a square of so many px first.")
    ] = None,
    resize: Annotated[Resize, typer.Option("--resize", help="How Inception resizes: as clean-fid or TensorFlow.")] = (
        Resize.clean
    ),
    stains: Annotated[Stains, typer.Option("--stains", help="Of --pairs: H&E, or haematoxylin and DAB.")] = Stains.he,
    lpips: Annotated[Path | None, typer.Option("--lpips", help="AlexNet of torchvision, for LPIPS of --pairs.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", help="Two reports (report.json or folder) side by side.")
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Of the report.")] = "Evaluation",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Measure generated images against real ones: everything that the sets given allow, in one report.

    Examples: histoldm evaluate --generated tiles --real data/cohort --where split=test --features inception --train
    data/cohort --train-where split=train --out report; histoldm evaluate --compare report-a report-b --out comparison
    """
    if compare is not None and (generated or scores):
        raise UserError("--compare takes two finished reports, and nothing else but --out.")
    from ldm.commands.evaluate import Asked, compare_reports
    from ldm.commands.evaluate import evaluate as run
    from ldm.requests.tiles import parse_where

    if compare is not None:
        compare_reports(*compare, out)
        return
    selected = parse_where(where or []), parse_where(train_where or [])
    asked = Asked(
        out, generated, real, train, conditions, pairs, scores, *selected, features or [], weights or [], resize.value,
        by.value if by else None, class_column, crop, tile, image_size, stains.value, lpips, seed, title,
    )  # fmt: skip
    run(asked, pick_device(device))
