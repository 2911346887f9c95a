"""`histoldm train-scorer`, `score`, `filter`, `rate`, `resample` and `utility`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.app import app
from ldm.cli.options import (
    BatchOption,
    ConditionOption,
    DeviceOption,
    EtaOption,
    FeatureOption,
    GuidanceOption,
    ModelOption,
    Precision,
    PrecisionOption,
    Schedule,
    ScheduleOption,
    SeedOption,
    Solver,
    SolverOption,
    StepsOption,
)
from ldm.devices import pick_device
from ldm.errors import UserError

Kind = Enum("Kind", {name: name for name in ("binary", "graded", "classes")}, type=str)

ScorerOption = Annotated[
    list[Path], typer.Option("--scorer", help="Scorer folder; or checkpoints of the published networks (repeat).")
]
ImagesOption = Annotated[
    Path, typer.Option("--images", help="Folder of images, output of `histoldm sample`, tile store or cohort.")
]
CropOption = Annotated[int | None, typer.Option("--crop", help="Only the middle of each image counts, px.")]
ScoreBatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images per network call.")]
AboveOption = Annotated[
    list[str] | None, typer.Option("--above", help="Least score: 0.5, or of a value of --by, LUAD=0.7 (repeat).")
]
ClassOption = Annotated[str | None, typer.Option("--class", help="Keep by the probability of this class.")]
MatchesOption = Annotated[
    str | None,
    typer.Option(
        "--matches",
        help="Keep by agreement with this condition: the probability of the class it names; of grades 1 less the "
        "difference over the range.",
    ),
]
LabelOption = Annotated[str | None, typer.Option("--label", help="Column of the label; default: label, rating, class.")]
KindOption = Annotated[Kind | None, typer.Option("--kind", help="Default: what the labels look like.")]
PositiveOption = Annotated[str | None, typer.Option("--positive", help="Class that a binary score is for.")]
PatientOption = Annotated[
    str | None, typer.Option("--patient", help="Column that says whose an image is; default: patient, group, case.")
]
WhereOption = Annotated[list[str] | None, typer.Option("--where", help="Keep images whose table says name=value.")]
ArchOption = Annotated[str, typer.Option("--arch", help="timm network.")]
ArchArgOption = Annotated[
    list[str] | None, typer.Option("--arch-arg", help="Argument of it, as channels=[32,64,128,256] (repeat).")
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="Local file to begin with. Nothing is ever downloaded.")
]
SizeOption = Annotated[int, typer.Option("--size", help="Pixels along a side that the networks see.")]
MembersOption = Annotated[int, typer.Option("--members", help="Networks; each validates on its own fold.")]
TestOption = Annotated[float, typer.Option("--test", help="Fraction of the groups that is held out.")]
EpochsOption = Annotated[int, typer.Option("--epochs", help="At most.")]
PatienceOption = Annotated[int, typer.Option("--patience", help="Epochs without a better validation figure.")]
RateOption = Annotated[float, typer.Option("--learning-rate", help="Of AdamW, at its largest.")]
ColourOption = Annotated[
    float, typer.Option("--colour", help="Random change of optical densities; 0 where colour faults are to be seen.")
]
ShiftOption = Annotated[int, typer.Option("--shift", help="Largest random shift, px.")]
ViewsOption = Annotated[int, typer.Option("--views", help="Orientations a score is averaged over: 1 or 8.")]


def _recipe(arch_args: list[str] | None, weights: Path | None, **given: Any) -> Any:
    import yaml

    from ldm.scorers.training import Recipe

    kwargs = {}
    for text in arch_args or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"--arch-arg takes name=value, as channels=[32,64,128,256]; got '{text}'.")
        try:
            kwargs[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--arch-arg {text}: cannot read the value as YAML.") from error
    return Recipe(kwargs=kwargs or None, weights=None if weights is None else str(weights), **given)


@app.command("train-scorer", rich_help_panel="Measure and choose")
def train_scorer(
    data: Annotated[
        Path, typer.Option("--data", help="Folder of class subfolders, CSV (path, label, patient), ratings, cohort.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Scorer folder to write.")],
    label: LabelOption = None,
    kind: KindOption = None,
    positive: PositiveOption = None,
    patient: PatientOption = None,
    where: WhereOption = None,
    skip_unrated: Annotated[bool, typer.Option("--skip-unrated", help="Leave out images without a rating.")] = False,
    arch: ArchOption = "resnet10t",
    arch_arg: ArchArgOption = None,
    weights: WeightsOption = None,
    size: SizeOption = 64,
    crop: CropOption = None,
    members: MembersOption = 4,
    test: TestOption = 0.2,
    epochs: EpochsOption = 40,
    patience: PatienceOption = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per step.")] = 32,
    learning_rate: RateOption = 1e-3,
    colour: ColourOption = 0.1,
    shift: ShiftOption = 4,
    views: ViewsOption = 1,
    licence: Annotated[str, typer.Option("--licence", help="Licence of the scorer, recorded in it.")] = "",
    half: Annotated[bool, typer.Option("--half", help="Store weights in float16: half the size.")] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    """Train an ensemble that scores images, on labelled images split by patient. A stopped training goes on.

    Examples: histoldm train-scorer --data crops --positive Atypical --crop 64 --out scorer;
    histoldm train-scorer --data ratings/ratings.csv --colour 0 --out filter
    """
    from ldm.commands.scorers import train
    from ldm.requests.tiles import parse_where

    recipe = _recipe(
        arch_arg, weights, arch=arch, size=size, members=members, test=test, epochs=epochs,
        patience=patience, batch_size=batch_size, learning_rate=learning_rate, colour=colour, shift=shift, views=views,
        seed=seed,
    )  # fmt: skip
    asked = {"label": label, "kind": kind.value if kind else None, "positive": positive, "patient": patient}
    asked |= {"where": parse_where(where or []), "skip_unrated": skip_unrated, "crop": crop}
    train(data, out, asked, recipe, pick_device(device), _bf16(precision), licence, half)


def _bf16(precision: Precision) -> bool:
    if precision is Precision.fp16:
        raise UserError("scorers are trained in --precision fp32 or bf16.")
    return precision is Precision.bf16


@app.command(rich_help_panel="Measure and choose")
def score(
    scorer: ScorerOption,
    images: ImagesOption,
    out: Annotated[Path, typer.Option("--out", help="CSV to write: image, label, mean score, each network's.")],
    crop: CropOption = None,
    where: WhereOption = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Column of what each image shall be, for `evaluate --scores`.")
    ] = None,
    batch_size: ScoreBatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Score images.

    Example: histoldm score --scorer scorer --images tiles --out scores.csv
    """
    from ldm.commands.filter import score_images
    from ldm.requests.tiles import parse_where

    score_images(scorer, images, out, pick_device(device), batch_size, crop, parse_where(where or []), target)


@app.command("filter", rich_help_panel="Measure and choose")
def filter_command(
    scorer: ScorerOption,
    images: ImagesOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for those that pass, their list and contact sheets.")],
    above: AboveOption = None,
    top: Annotated[float | None, typer.Option("--top", help="Keep the best fraction, of each value of --by.")] = None,
    class_name: ClassOption = None,
    matches: MatchesOption = None,
    by: Annotated[str | None, typer.Option("--by", help="Column of the images' list whose values are apart.")] = None,
    link: Annotated[bool, typer.Option("--link", help="Hard links in place of copies.")] = False,
    crop: CropOption = None,
    batch_size: ScoreBatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Keep the images that pass a scorer.

    Examples: histoldm filter --scorer filter --images tiles --above 0.5 --out good;
    histoldm filter --scorer scorer --images tiles --matches class --by class --top 0.2 --out good
    """
    from ldm.commands.filter import filter_images

    filter_images(
        scorer, images, out, pick_device(device), batch_size, crop, above or [], top, class_name, matches, by, link
    )


@app.command(rich_help_panel="Measure and choose")
def rate(
    images: ImagesOption,
    out: Annotated[Path, typer.Option("--out", help="Rating folder to write.")],
    count: Annotated[int, typer.Option("--count", min=2, help="Images, drawn at random.")] = 96,
    scale: Annotated[str, typer.Option("--scale", help="1-5, or names from bad to good: bad,good.")] = "bad,good",
    seed: SeedOption = 0,
) -> None:
    """Write numbered contact sheets and a table for people to rate images in; `train-scorer` learns from it.

    Example: histoldm rate --images tiles --scale 1-5 --out ratings
    """
    from ldm.commands.filter import rate as write

    write(images, out, count, scale, seed)


@app.command(rich_help_panel="Measure and choose")
def resample(
    model: ModelOption,
    scorer: ScorerOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the tiles that pass.")],
    above: AboveOption = None,
    until: Annotated[int, typer.Option("--until", min=1, help="Tiles that are to pass, of each request.")] = 16,
    max_attempts: Annotated[int, typer.Option("--max-attempts", min=1, help="Tiles that are sampled at most.")] = 256,
    class_name: ClassOption = None,
    matches: MatchesOption = None,
    condition: ConditionOption = None,
    features: Annotated[Path | None, typer.Option("--features", help="As of `histoldm sample`.")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="As of `histoldm sample`: a request per row.")] = None,
    feature: FeatureOption = None,
    where: Annotated[list[str] | None, typer.Option("--where", help="Selection in a tile store, label=value.")] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="Requests, of features, store or table.")] = None,
    steps: StepsOption = 20,
    solver: SolverOption = Solver.dpmpp_2m,
    schedule: ScheduleOption = Schedule.trailing,
    eta: EtaOption = 1.0,
    guidance_scale: GuidanceOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    """Sample tiles until enough pass a scorer, and tell the acceptance rate. A stopped run goes on.

    Example: histoldm resample --model M --condition score=0.8 --scorer S --matches score --above 0.9 --until 32 --out D
    """
    from ldm.commands.resample import resample as run
    from ldm.requests.tiles import parse_guidance, parse_where

    if features is None and table is None and count is not None:
        raise UserError("--count goes with --features or --table; --until says how many tiles are to pass.")
    asked = {"features": features, "feature": feature, "where": parse_where(where or []), "table": table}
    run(
        model, scorer, out, pick_device(device), batch_size,
        {**asked, "conditions": condition or [], "count": count}, until, max_attempts, above or [], class_name,
        matches, steps=steps, solver=solver.value, schedule=schedule.value, eta=eta,
        guidance_scale=parse_guidance(guidance_scale or []), seed=seed, precision=precision.value,
    )  # fmt: skip


@app.command(rich_help_panel="Measure and choose")
def utility(
    real: Annotated[Path, typer.Option("--real", help="Labelled real images, as of `train-scorer --data`.")],
    synthetic: Annotated[
        Path, typer.Option("--synthetic", help="Labelled synthetic ones; or an output of `sample` or `resample`.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for utility.json and the three ensembles.")],
    label: LabelOption = None,
    kind: KindOption = None,
    positive: PositiveOption = None,
    patient: PatientOption = None,
    arch: ArchOption = "resnet10t",
    arch_arg: ArchArgOption = None,
    weights: WeightsOption = None,
    size: SizeOption = 64,
    crop: Annotated[int | None, typer.Option("--crop", help="Only the middle of each real image counts, px.")] = None,
    members: MembersOption = 2,
    test: TestOption = 0.3,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", help="Real images to test on, as split=test; default: --test at random (repeat)."),
    ] = None,
    epochs: EpochsOption = 40,
    patience: PatienceOption = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per step.")] = 32,
    learning_rate: RateOption = 1e-3,
    colour: ColourOption = 0.1,
    shift: ShiftOption = 4,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    """What synthetic images are worth: classifiers trained on real ones, synthetic ones and both, with intervals.

    Example: histoldm utility --real crops.csv --synthetic cells --label score --crop 32 --out utility
    """
    from ldm.commands.scorers import utility as run
    from ldm.requests.tiles import parse_where

    recipe = _recipe(
        arch_arg, weights, arch=arch, size=size, members=members, test=test, epochs=epochs,
        patience=patience, batch_size=batch_size, learning_rate=learning_rate, colour=colour, shift=shift, seed=seed,
    )  # fmt: skip
    asked = {"label": label, "kind": kind.value if kind else None, "positive": positive, "patient": patient}
    asked["crop"] = crop
    run(real, synthetic, out, asked, recipe, pick_device(device), _bf16(precision), parse_where(held_out or []))
