"""`histoldm translate`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.app import app
from ldm.cli.options import (
    AllowTargetOption,
    Axis,
    DeviceOption,
    FilesInOption,
    ModelOption,
    WhereOption,
    inputs,
    output,
    wanted,
)
from ldm.cli.sampling import settings
from ldm.data.where import parse_where
from ldm.devices import pick_device
from ldm.requests.parse import ascending, parse_integers
from ldm.requests.sampling import AskedSampler
from ldm.sampling.sampler import Inversion

Texts = list[str] | None
source_of = partial(typer.Option, rich_help_panel="What the images are")
volume = partial(typer.Option, rich_help_panel="Volumes")


@app.command(rich_help_panel="Generate")
@settings(
    "invert",
    "translate",
    solver="dpmpp_2m; euler of --exact and --published",
    guidance_scale="1 of inversions, else 2, or 1 of models without a null",
)
def translate(
    model: ModelOption,
    images: Annotated[
        Path,
        inputs(
            "--images",
            help="Images to turn: an image, a folder of them, a tile store, an OME-Zarr; NIfTI volumes.",
        ),
    ],
    out: Annotated[
        Path,
        output(
            "--out",
            help="Folder for the images, their list and a sheet for each; of a volume .nii.gz, .nii; of a slide of any "
            "size .ome.zarr, .tif.",
        ),
    ],
    sampler: AskedSampler,
    inversion: Inversion,
    source: Annotated[
        Texts, source_of("--source", help="What the images are, name=value (repeat); a store knows its own.")
    ] = None,
    target: Annotated[
        Texts,
        wanted("--target", help="What they become: class=LUAD, 'class=LUAD; score=0.3', 'name: class=LUAD'."),
    ] = None,
    edit: Annotated[
        Texts,
        wanted(
            "--edit",
            help="What of the source changes: mutation=TP53:1, expression=MKI67:0:1:5 (a sweep), MKI67:x2 (repeat).",
        ),
    ] = None,
    spec: Annotated[
        Path | None, wanted("--spec", help="Specification of a batch: YAML, or His-MMDM's (.yaml, .pkl).")
    ] = None,
    table: Annotated[
        Path | None, wanted("--table", help="Table of pairs (CSV): file, source.<name>, target.<name>, label.")
    ] = None,
    class_of_name: Annotated[
        bool, source_of("--class-of-name", help="Take the sources' classes from names: <class>__<anything>.png.")
    ] = False,
    mutation_table: Annotated[
        Path | None, source_of("--mutation-table", help="Table of the sources' mutations, of samples in the names.")
    ] = None,
    expression_table: Annotated[
        Path | None, source_of("--expression-table", help="Table of the sources' expression, likewise.")
    ] = None,
    features: Annotated[
        Path | None, source_of("--features", help="Features of the sources, one for each image in order.")
    ] = None,
    encoder: Annotated[
        str | None, source_of("--encoder", help="Encoder, by name or folder, that makes the sources' features.")
    ] = None,
    target_features: Annotated[
        Path | None, wanted("--target-features", help="Features of the targets: one, or one for each image.")
    ] = None,
    map_features: Annotated[
        Path | None, wanted("--map-features", help="Map of features, of data_prep.train_feature_map.")
    ] = None,
    region: Annotated[
        str | None, inputs("--region", help="Region of one large image: x,y,width,height in pixels.")
    ] = None,
    mpp: Annotated[
        float | None, inputs("--mpp", help="Micrometres per pixel of the images, where files do not say.")
    ] = None,
    axis: Annotated[
        Axis | None, volume("--axis", help="Axis along which slices follow one another (the model's, else axial).")
    ] = None,
    window: Annotated[
        str | None, volume("--window", help="Values low,high of the volume that are black and white.")
    ] = None,
    percentiles: Annotated[
        str | None,
        volume("--percentiles", help="The same by percentiles of its head (the model's, else 0.5,99.9)."),
    ] = None,
    scale: Annotated[
        str | None,
        volume("--scale", help="Values low,high that black and white become (the model's, else the volume's own)."),
    ] = None,
    where: WhereOption = None,
    files_in: FilesInOption = None,
    count: Annotated[int | None, inputs("--count", min=1, help="Number of images at most.")] = None,
    device: DeviceOption = "auto",
    save_intermediates: Annotated[
        int, output("--save-intermediates", min=0, help="Number of denoised images to keep of each way down.")
    ] = 0,
    differences: Annotated[
        bool | None,
        output("--differences/--no-differences", help="Draw maps of what changed; by default of edits."),
    ] = None,
    allow_target: AllowTargetOption = None,
) -> None:
    r"""Turn images into others: domains, stains, genes, modalities, resolution. Size and mpp stay.

    Examples:

        histoldm translate --model M --images tiles --source class=COAD \
            --target class=LUAD --out out
        histoldm translate --model M --images a.png --edit mutation=TP53:1 \
            --edit expression=MKI67:0:1:5 --out out
        histoldm translate --model M --images brain_t2.nii.gz --out brain_t1.nii.gz
        histoldm translate --model M --images slide.svs --source stain=he \
            --target stain=ki67 --out ki67.ome.zarr
    """
    from ldm.commands.slide_making import SLIDES
    from ldm.commands.translate import translate_pictures
    from ldm.commands.translate_slide import translate_slide
    from ldm.commands.translate_volumes import AskedVolumes, translate_volumes
    from ldm.data.volumes import WRITTEN, volumes_in
    from ldm.errors import UserError
    from ldm.requests.translations import AskedTranslations

    asked = AskedTranslations(
        parse_integers(region, 4, "--region", "x,y,width,height"),
        mpp,
        parse_where(where),
        count,
        source or [],
        target or [],
        edit or [],
        spec,
        table,
        class_of_name,
        mutation_table,
        expression_table,
        encoder,
        features,
        target_features,
        map_features,
    )
    how = AskedVolumes(
        axis and axis.value,
        *(
            ascending(float, text, f"--{name}")
            for name, text in {"window": window, "percentiles": percentiles, "scale": scale}.items()
        ),
    )
    device = pick_device(device)
    if volumes_in(images):
        if save_intermediates or differences:
            raise UserError("--save-intermediates and --differences are of images, not of volumes; leave them out.")
        return translate_volumes(model, images, out, device, asked, how, sampler, inversion)
    if out.name.endswith(SLIDES):
        if how != AskedVolumes() or save_intermediates or differences is not None:
            raise UserError(
                f"--out {out.name} is a slide; --axis, --window, --percentiles, --scale are of volumes, and "
                "--save-intermediates and --differences of images. Leave them out."
            )
        return translate_slide(model, images, out, device, asked, sampler, inversion)
    if how != AskedVolumes() or out.name.lower().endswith(WRITTEN):
        raise UserError(
            f"{images} is no NIfTI volume, nor a folder of nothing else; --axis, --window, --percentiles, --scale and "
            "an --out that ends as volumes do are of those."
        )
    translate_pictures(model, images, out, device, asked, sampler, inversion, save_intermediates, differences)
