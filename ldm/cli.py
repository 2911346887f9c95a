"""The console command `histoldm`: thin commands over the Python face."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ldm.devices import pick_device
from ldm.errors import UserError, run_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Latent diffusion for histopathology: tiles and slide-sized images from a trained model.",
)

USAGE_ERROR = typer.BadParameter.__base__  # typer may bring a click of its own

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
ConditionOption = Annotated[
    list[str] | None,
    typer.Option("--condition", help="name=value, as class=LUAD, mutation=TP53:1, score=0.7, text='...' (repeat)."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="The same seed gives the same image at any batch size.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Tiles or windows per network call.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Of the network's arithmetic.")]


@app.command()
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
    seed: SeedOption = 0,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network first: pays for many tiles.")] = False,
    cache: Annotated[
        int, typer.Option("--cache", min=1, help="Deep features at every n-th step only: faster, approximate.")
    ] = 1,
) -> None:
    """Generate tiles under conditions by name, of a table, of a file of features, or of the tiles of a store.

    Examples: histoldm sample --model M --condition class=LUAD --condition score=0.7 --count 8 --out tiles;
    histoldm sample --model data/models/demo-ssl --features store.zarr --where split=val --out tiles
    """
    from ldm.commands import sample_tiles
    from ldm.requests import parse_guidance, parse_where

    asked = {"features": features, "feature": feature, "where": parse_where(where or []), "table": table}
    sample_tiles(
        model, out, pick_device(device), batch_size, {**asked, "conditions": condition or [], "count": count},
        steps=steps, solver=solver.value, schedule=schedule.value, eta=eta,
        guidance_scale=parse_guidance(guidance_scale or []), seed=seed, precision=precision.value, compile=compile,
        cache=cache,
    )  # fmt: skip


@app.command("large-image")
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
    guidance_interval: Annotated[
        str, typer.Option("--guidance-interval", help="low,high noise levels that are guided; 'all' guides every step.")
    ] = "0.5,10",
    seed: SeedOption = 0,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    """Generate one image of any size from a grid of features; the one at (row, col) conditions the image there.

    Example: histoldm large-image --model M --features store.zarr --region 896,1472,1024,1024 --out image.tif
    """
    from ldm.commands import generate_large_image
    from ldm.requests import parse_guidance

    generate_large_image(
        model, features, out, feature, _integers(region, 4, "--region", "x,y,width,height"),
        _integers(size, 2, "--size", "height,width"), mpp, condition or [], pick_device(device), mode=mode.value,
        stride=stride, interpolation=interpolation.value, steps=steps, solver=solver.value, schedule=schedule.value,
        eta=eta, guidance_scale=parse_guidance(guidance_scale or []), seed=seed, batch_size=batch_size,
        precision=precision.value, guidance_interval=_interval(guidance_interval),
    )  # fmt: skip


@app.command()
def describe(
    model: Annotated[Path, typer.Argument(help="Model folder (or a training run's folder).")],
) -> None:
    """Say what a model is and which conditions it takes, by name.

    Example: histoldm describe data/models/demo-ssl
    """
    from ldm.commands import describe_model

    describe_model(model)


@app.command()
def export(
    run: Annotated[
        Path, typer.Argument(help="Training run folder (logs/<time>_<name>) or a checkpoint of one.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="Config that a published first-stage checkpoint fits.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store weights in float16: half the size.")] = False,
    licence: Annotated[str | None, typer.Option("--licence", help="Licence of the model, recorded in it.")] = None,
) -> None:
    """Make a model folder of a training run: what every command takes and what you share.

    Examples: histoldm export logs/2026-01-31T12-00-00_ssl --out models/ssl; of a published first stage:
    histoldm export weights/vq-f4/model.ckpt --config configs/autoencoder/vq-f4.yaml --out models/vq-f4
    """
    import torch

    from ldm.model_folder import export as export_run

    metadata = {"licence": licence} if licence else {}
    folder = export_run(run, out, torch.float16 if half else None, metadata, config=config)
    print(f"wrote {folder}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Published checkpoint or folder; a model folder with --to.")],
    out: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML that the weights came with: project YAML, or training flags.")
    ] = None,
    raw_weights: Annotated[
        bool, typer.Option("--raw-weights", help="Weights of the last step where there are averaged ones.")
    ] = False,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Names of classes or magnifications: a,b,c or a file of them.")
    ] = None,
    mutation_genes: Annotated[
        Path | None, typer.Option("--mutation-genes", help="File of gene names in the order of their embeddings.")
    ] = None,
    expression_genes: Annotated[
        Path | None, typer.Option("--expression-genes", help="The same, of expression.")
    ] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", help="What the model's features were made with.")] = None,
    mpp: Annotated[float | None, typer.Option("--mpp", help="Micrometres per pixel of its tiles.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="Licence of the weights, recorded in it.")] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="Model folder with the parts that a network alone lacks.")
    ] = None,
    allow_target: Annotated[
        list[str] | None, typer.Option("--allow-target", help="Beginning of further targets in the YAML (repeat).")
    ] = None,
    to: Annotated[Form | None, typer.Option("--to", help="Write a model folder in the form of others.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Store weights in float16: half the size.")] = False,
) -> None:
    """Make a model folder of a published model: latent-diffusion and its forks, guided-diffusion, diffusers, ...

    Examples: histoldm convert brca.ckpt --config zoomldm_brca.yaml --encoder uni --mpp 0.5 --out models/brca;
    histoldm convert models/brca --to compvis --out brca-compvis
    """
    from ldm.commands import convert_model

    asked = {"config": config, "raw_weights": raw_weights, "classes": classes, "mutation_genes": mutation_genes,
             "expression_genes": expression_genes, "base": base, "allow_target": allow_target, "encoder": encoder,
             "mpp": mpp, "licence": licence}  # fmt: skip
    convert_model(source, out, asked, to.value if to else None, half)


def _interval(text: str) -> tuple[float, float] | None:
    if text == "all":
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        raise UserError(f"--guidance-interval takes low,high noise levels, as 0.5,10, or all; got '{text}'.")
    return low, high


def _integers(text: str | None, count: int, option: str, form: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != count or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"{option} takes {form} as {count} whole numbers; got '{text}'.")
    return tuple(int(part) for part in parts)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""

    def run() -> None:
        try:
            app(standalone_mode=False)
        except typer.Exit as stop:
            sys.exit(stop.exit_code)
        except typer.Abort:
            raise KeyboardInterrupt from None
        except USAGE_ERROR as error:
            error.show()
            sys.exit(error.exit_code)

    sys.exit(run_command(run))
