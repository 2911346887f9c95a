"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ldm.config import allowing
from ldm.errors import UserError

SOLVERS = (
    "dpmpp_2m", "unipc", "euler", "heun", "plms", "ddpm", "ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde",
)  # fmt: skip
Solver = Enum("Solver", {name: name for name in SOLVERS}, type=str)
SCHEDULES = ("trailing", "uniform", "legacy", "karras", "exponential", "optimised")
Schedule = Enum("Schedule", {name: name for name in SCHEDULES}, type=str)
Precision = Enum("Precision", {name: name for name in ("fp32", "bf16", "fp16")}, type=str)
Mode = Enum("Mode", {name: name for name in ("shifted", "overlap")}, type=str)
Form = Enum("Form", {name: name for name in ("diffusers", "compvis")}, type=str)
Interpolation = Enum("Interpolation", {name: name for name in ("linear", "slerp", "nearest")}, type=str)



def allow_targets(context: typer.Context, prefixes: list[str] | None) -> list[str] | None:
    """Until the command ends, models may name classes whose dotted names begin so."""
    context.with_resource(allowing(prefixes or ()))
    return prefixes


AllowTargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-target", callback=allow_targets, show_default=False,
        help="Beginning of names of classes outside of this package that a model may use, as mylab. (repeat).",
    ),
]  # fmt: skip
ModelOption = Annotated[Path, typer.Option("--model", help="Model folder (or a training run's folder).")]
FeaturesOption = Annotated[
    Path, typer.Option("--features", help="Features: .npy, .h5 (CLAM, TRIDENT), .pt, or a tile store (.zarr).")
]
FeatureOption = Annotated[
    str | None, typer.Option("--feature", help="Name of the feature in a tile store; needed where it has several.")
]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")]
SolverOption = Annotated[Solver, typer.Option("--solver", help="dpmpp_2m is the fastest to a good image.")]
ScheduleOption = Annotated[Schedule, typer.Option("--schedule", help="Where the steps lie on the noise schedule.")]
EtaOption = Annotated[float, typer.Option("--eta", min=0, max=1, help="Noise of ddim, euler_ancestral and the *_sde.")]
GuidanceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--guidance-scale",
        help="1: no guidance; default 2 (1 of models without a null); or name=scale, as class=3 (repeat).",
        show_default=False,
    ),
]
IntervalOption = Annotated[
    str, typer.Option("--guidance-interval", help="low,high noise levels that are guided; 'all' guides every step.")
]
ConditionOption = Annotated[
    list[str] | None,
    typer.Option("--condition", help="name=value, as class=LUAD, mutation=TP53:1, score=0.7, text='...' (repeat)."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="The same seed gives the same image at any batch size.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Tiles or windows per network call.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Of the network's arithmetic.")]


def interval(text: str) -> tuple[float, float] | None:
    if text == "all":
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        raise UserError(f"--guidance-interval takes low,high noise levels, as 1,7, or all; got '{text}'.")
    return low, high


def integers(text: str | None, count: int, option: str, form: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != count or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"{option} takes {form} as {count} whole numbers; got '{text}'.")
    return tuple(int(part) for part in parts)
