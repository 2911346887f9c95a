"""`histoldm field`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ldm.cli.app import app
from ldm.cli.options import AllowTargetOption, ConditionOption, DeviceOption, ModelOption, output, wanted
from ldm.cli.sampling import settings
from ldm.devices import pick_device
from ldm.requests.parse import parse_integers
from ldm.requests.sampling import AskedSampler


@app.command(rich_help_panel="Generate")
@settings("field")
def field(
    model: ModelOption,
    size: Annotated[str, wanted("--size", help="Size of the field: width,height in tiles of its lattice.")],
    out: Annotated[Path, output("--out", help="File to write: .npy, with .json and a picture .png beside it.")],
    sampler: AskedSampler,
    condition: ConditionOption = None,
    device: DeviceOption = "auto",
    allow_target: AllowTargetOption = None,
) -> None:
    r"""Generate a field of features that no slide has: the grid of which large-image makes an image.

    The model is one of fields, as configs/own/field.yaml trains it. Places without tissue are holes of the field.

    Example:

        histoldm field --model F --size 29,29 --out field.npy
        histoldm large-image --model M --features field.npy --out image.tif
    """
    from ldm.commands.field import generate_field

    wide = parse_integers(size, 2, "--size", "width,height")
    generate_field(model, out, wide, condition or [], pick_device(device), sampler)
