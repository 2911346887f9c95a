"""`histoldm evaluate`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.app import app
from ldm.cli.options import DeviceOption, FilesInOption, SeedOption, choices, inputs, output
from ldm.data.where import FORMS
from ldm.devices import pick_device
from ldm.errors import UserError

measure = partial(typer.Option, rich_help_panel="How it is measured")
Resize = choices("Resize", ("clean", "tensorflow"))
Unit = choices("Unit", ("patient", "slide", "block", "image"))
Stains = choices("Stains", ("he", "hd"))


@app.command(rich_help_panel="Measure and choose")
def evaluate(
    out: Annotated[Path, output("--out", help="Folder for report.html, report.json and feature files.")],
    generated: Annotated[
        Path | None,
        inputs(
            "--generated",
            help="Generated images: a folder, an output of `histoldm sample`, a store, a cohort, a feature file, or "
            "one large image (.png, .tif, .ome.zarr).",
        ),
    ] = None,
    real: Annotated[Path | None, inputs("--real", help="Real images to compare with, in any of these forms.")] = None,
    where: Annotated[
        list[str] | None, inputs("--where", help=f"Selection of the real images: {FORMS} (repeat).")
    ] = None,
    files_in: FilesInOption = None,
    features: Annotated[
        list[str] | None,
        measure(
            "--features",
            help="Extractor of features: inception, judge (knows photographs alone, so it conditioned none of the "
            "images), pixels, clip:ViT-L-14, an encoder by name, an encoder folder, or features in stores (repeat).",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None, measure("--weights", help="Weights of the extractor, or extractor=path (repeat).")
    ] = None,
    train: Annotated[
        Path | None,
        inputs("--train", help="Training images, to see whether they are memorised; --real is held out then."),
    ] = None,
    train_where: Annotated[
        list[str] | None, inputs("--train-where", help="Selection of the training images, as split=train (repeat).")
    ] = None,
    conditions: Annotated[
        Path | None,
        inputs(
            "--conditions",
            help="Cohort whose tiles conditioned the generated ones; by default --real. Of a whole slide: the field or "
            "store that it was made of.",
        ),
    ] = None,
    class_column: Annotated[
        str, measure("--class", help="Column of both lists that names classes, for distances by class.")
    ] = "class",
    pairs: Annotated[
        Path | None,
        inputs("--pairs", help="Folder of what --generated should be, file by file, for PSNR, SSIM and their like."),
    ] = None,
    scores: Annotated[
        Path | None,
        inputs("--scores", help="Table of scores to calibrate (CSV): score, target and members score_0, ..."),
    ] = None,
    by: Annotated[
        Unit | None, measure("--by", help="What intervals draw; by default patients, else slides, else images.")
    ] = None,
    crop: Annotated[
        int | None,
        measure("--crop", min=16, help="Side in pixels of squares that images are cut into; large images: 256."),
    ] = None,
    tile: Annotated[
        int,
        measure("--tile", min=16, help="Side in pixels of the lattice whose seams are looked for in a large image."),
    ] = 256,
    windows: Annotated[
        int,
        measure("--windows", min=8, max=4096, help="Most windows of a whole slide among which twins are looked for."),
    ] = 1024,
    image_size: Annotated[
        int | None,
        measure("--image-size", min=16, help="Side in pixels of squares that every image is resized to first."),
    ] = None,
    resize: Annotated[
        Resize, measure("--resize", help="How Inception's input is resized: as clean-fid or as TensorFlow does.")
    ] = Resize.clean,
    stains: Annotated[
        Stains, measure("--stains", help="Stains that are told apart: H&E, or haematoxylin and DAB.")
    ] = Stains.he,
    lpips: Annotated[
        Path | None, measure("--lpips", help="Weights of torchvision's AlexNet, for LPIPS of --pairs.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        inputs("--compare", help="Two reports to set side by side (report.json, or their folders)."),
    ] = None,
    title: Annotated[str, output("--title", help="Title of the report.")] = "Evaluation",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    r"""Measure generated images against real ones: everything that the sets given allow, in one report.

    Examples:

        histoldm evaluate --generated tiles --out report \
            --real data/cohort --where split=test --features inception \
            --train data/cohort --train-where split=train
        histoldm evaluate --generated slide.tif --real real.svs --out report \
            --features data/models/demo-encoder --conditions field.npy
        histoldm evaluate --compare report-a report-b --out comparison
    """
    if compare is not None and (generated or scores):
        raise UserError("--compare takes two finished reports, and nothing else but --out.")
    from ldm.commands.evaluate import Asked, compare_reports
    from ldm.commands.evaluate import evaluate as run
    from ldm.data.where import parse_where

    if compare is not None:
        compare_reports(*compare, out)
        return
    selected = parse_where(where), parse_where(train_where)
    asked = Asked(
        out,
        generated,
        real,
        train,
        conditions,
        pairs,
        scores,
        *selected,
        features or [],
        weights or [],
        resize.value,
        by.value if by else None,
        class_column,
        crop,
        tile,
        windows,
        image_size,
        stains.value,
        lpips,
        seed,
        title,
    )
    run(asked, pick_device(device))
