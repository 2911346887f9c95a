"""Options that several commands share. Those of sampling are made from its settings (`ldm.cli.sampling`)."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ldm.config import allowing
from ldm.data.where import FORMS
from ldm.foreign.paths import files_in

inputs = partial(typer.Option, rich_help_panel="Input")
wanted = partial(typer.Option, rich_help_panel="What is made")
output = partial(typer.Option, rich_help_panel="Output")
speed = partial(typer.Option, rich_help_panel="Speed")

# what `ldm.tables.patients` takes for an option --patient
PATIENT_RULE = "a table with columns slide and patient, or a regular expression of the patient's part of the name"


def choices(name: str, values: Iterable[str]) -> type[StrEnum]:
    """The type of an option that takes one of `values`."""
    return StrEnum(name, {value: value for value in values})


Axis = choices("Axis", ("sagittal", "coronal", "axial", "0", "1", "2"))  # as `ldm.data.volumes.AXIS` knows them
Form = choices("Form", ("diffusers", "compvis"))
Precision = choices("Precision", ("fp32", "bf16"))


def allow_targets(context: typer.Context, prefixes: list[str] | None) -> list[str] | None:
    """Until the command ends, models may name classes whose dotted names begin so."""
    context.with_resource(allowing(prefixes or ()))
    return prefixes


AllowTargetOption = Annotated[
    list[str] | None,
    inputs(
        "--allow-target",
        callback=allow_targets,
        show_default=False,
        help="Allow classes outside of this package whose names begin so, as mylab. (repeat).",
    ),
]
def allow_files_in(context: typer.Context, folders: list[Path] | None) -> list[Path] | None:
    """Until the command ends, tables may name files that lie in these folders."""
    context.with_resource(files_in(folders or ()))
    return folders


FilesInOption = Annotated[
    list[Path] | None,
    inputs(
        "--files-in",
        callback=allow_files_in,
        show_default=False,
        help="Folder beside a table's own where files that it names may lie (repeat).",
    ),
]
ModelOption = Annotated[Path, inputs("--model", help="Model folder, or a training run's folder.")]
FeaturesOption = Annotated[
    Path, inputs("--features", help="Features: .npy, .h5 (CLAM, TRIDENT), .pt, or a tile store (.zarr).")
]
FeatureOption = Annotated[
    str | None, inputs("--feature", help="Name of the feature in a tile store; needed where it has several.")
]
ConditionOption = Annotated[
    list[str] | None,
    wanted(
        "--condition", help="Condition, name=value, as class=LUAD, mutation=TP53:1, score=0.7, text='...' (repeat)."
    ),
]
OverviewOption = Annotated[
    Path | None,
    inputs("--overview", help="Image of the whole at a lower magnification, with which it is to agree."),
]
WhereOption = Annotated[
    list[str] | None,
    inputs("--where", help=f"Selection of tiles in a store: {FORMS} (repeat)."),
]
SeedOption = Annotated[int, wanted("--seed", min=0, help="Seed of everything random.")]
BatchOption = Annotated[int, speed("--batch-size", min=1, help="Tiles that the network sees at once.")]
DeviceOption = Annotated[
    str, speed("--device", help="Device: auto (a GPU where there is one), cpu, cuda, cuda:1 or mps.")
]
PrecisionOption = Annotated[Precision, speed("--precision", help="Precision of the networks' arithmetic.")]
