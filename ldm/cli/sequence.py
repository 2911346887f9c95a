"""`histoldm sequence`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ldm.cli.app import app
from ldm.cli.options import (
    AllowTargetOption,
    ConditionOption,
    DeviceOption,
    FilesInOption,
    ModelOption,
    WhereOption,
    choices,
    inputs,
    output,
    wanted,
)
from ldm.cli.sampling import settings
from ldm.data.where import parse_where
from ldm.devices import pick_device
from ldm.requests.sampling import AskedSampler

Animation = choices("Animation", ("gif", "apng", "webp"))


@app.command(rich_help_panel="Generate")
@settings("sample", "sweep")
def sequence(
    model: ModelOption,
    vary: Annotated[
        str, wanted("--vary", help="What moves: name=start:stop:count, as score=0:1:5; of genes MKI67:0:1:5.")
    ],
    out: Annotated[Path, output("--out", help="Folder for images, their list, a grid and an animation.")],
    sampler: AskedSampler,
    condition: ConditionOption = None,
    count: Annotated[
        int | None, wanted("--count", min=1, help="Number of sequences: by default 8, or one per real image.")
    ] = None,
    images: Annotated[
        Path | None, inputs("--images", help="Real images to start from: a file, a folder, a tile store.")
    ] = None,
    images_mpp: Annotated[
        float | None, inputs("--images-mpp", help="Micrometres per pixel of the images, where not the model's.")
    ] = None,
    where: WhereOption = None,
    files_in: FilesInOption = None,
    source: Annotated[
        list[str] | None,
        inputs("--source", help="Condition, name=value, that real images are inverted under; a store has it."),
    ] = None,
    strength: Annotated[
        float, wanted("--strength", help="Share of the inversion's steps, up to 1: the less, the more stays.")
    ] = 1.0,
    scorer: Annotated[
        Path | None, inputs("--scorer", help="Scorer folder: its curve under the grid, its scores in the list.")
    ] = None,
    animation: Annotated[Animation, output("--animation", help="Format of the moving picture.")] = Animation.gif,
    device: DeviceOption = "auto",
    allow_target: AllowTargetOption = None,
) -> None:
    r"""Move one condition in steps with the noise kept: what the model makes of it, image by image.

    Defaults of two kinds are those of sequences from noise and of those from real images.

    Examples:

        histoldm sequence --model M --vary score=0:1:5 --count 8 \
            --scorer scorer --out sequences
        histoldm sequence --model M --vary score=0:1:5 --images cohort \
            --where split=val --out moved
    """
    from ldm.commands.sequence import AskedReal, write_sequences

    real = AskedReal(images, images_mpp, parse_where(where), source or [], strength, count)
    write_sequences(model, out, pick_device(device), vary, condition or [], scorer, animation.value, real, sampler)
