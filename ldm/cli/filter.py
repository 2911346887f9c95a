"""`histoldm train-scorer`, `score`, `filter`, `rate`, `resample` and `utility`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.app import app
from ldm.cli.options import (
    PATIENT_RULE,
    AllowTargetOption,
    ConditionOption,
    DeviceOption,
    FeatureOption,
    FilesInOption,
    ModelOption,
    Precision,
    PrecisionOption,
    SeedOption,
    WhereOption,
    choices,
    inputs,
    output,
    speed,
    wanted,
)
from ldm.cli.sampling import settings
from ldm.data.where import FORMS, parse_where
from ldm.devices import pick_device
from ldm.errors import UserError
from ldm.requests.sampling import AskedSampler

if TYPE_CHECKING:
    from ldm.scorers.training import Recipe

choose = partial(typer.Option, rich_help_panel="What passes")
learnt = partial(typer.Option, rich_help_panel="What is learnt")
network = partial(typer.Option, rich_help_panel="Networks and training")
Kind = choices("Kind", ("binary", "graded", "classes"))

ScorerOption = Annotated[
    list[Path], inputs("--scorer", help="Scorer folder, or checkpoints of the published networks (repeat).")
]
ImagesOption = Annotated[
    Path, inputs("--images", help="Images: a folder, an output of `histoldm sample`, a tile store or a cohort.")
]
CropOption = Annotated[int | None, inputs("--crop", help="Side in pixels of the middle of each image that counts.")]
ScoreBatchOption = Annotated[int, speed("--batch-size", min=1, help="Images per network call.")]
AboveOption = Annotated[
    list[str] | None, choose("--above", help="Least score that passes: 0.5, or of a value of --by, LUAD=0.7 (repeat).")
]
ClassOption = Annotated[str | None, choose("--class", help="Class whose probability decides.")]
MatchesOption = Annotated[
    str | None,
    choose(
        "--matches",
        help="Condition to agree with: the probability of the class that it names; of grades 1 less the difference "
        "over the range.",
    ),
]
LabelOption = Annotated[str | None, learnt("--label", help="Column of the label; by default label, rating or class.")]
KindOption = Annotated[Kind | None, learnt("--kind", help="Kind of label; by default what the labels look like.")]
PositiveOption = Annotated[str | None, learnt("--positive", help="Class that a binary score is for.")]
ChosenOption = Annotated[
    list[str] | None, inputs("--where", help=f"Selection of the images by their table: {FORMS} (repeat).")
]
PatientOption = Annotated[
    str | None,
    learnt("--patient", help=f"Whose an image is: a column (default: patient, group or case), {PATIENT_RULE}."),
]
ArchOption = Annotated[str, network("--arch", help="Architecture of the networks, by timm's name.")]
ArchArgOption = Annotated[
    list[str] | None, network("--arch-arg", help="Argument of the architecture, as channels=[32,64,128,256] (repeat).")
]
WeightsOption = Annotated[
    Path | None, network("--weights", help="File of weights to begin with. Nothing is ever downloaded.")
]
SizeOption = Annotated[int, network("--size", help="Side in pixels of what the networks see.")]
MembersOption = Annotated[int, network("--members", help="Number of networks; each validates on its own fold.")]
TestOption = Annotated[float, learnt("--test", help="Fraction of the groups that is held out.")]
EpochsOption = Annotated[int, network("--epochs", help="Number of epochs at most.")]
PatienceOption = Annotated[
    int, network("--patience", help="Number of epochs without a better validation figure that end the training.")
]
RateOption = Annotated[float, network("--learning-rate", help="Learning rate of AdamW at its largest.")]
ColourOption = Annotated[
    float,
    network("--colour", help="Size of random changes of optical densities; 0 where colour faults are to be seen."),
]
ShiftOption = Annotated[int, network("--shift", help="Largest random shift in pixels.")]
ViewsOption = Annotated[int, network("--views", help="Number of orientations that a score is averaged over: 1 or 8.")]


def _recipe(arch_args: list[str] | None, weights: Path | None, **given: Any) -> Recipe:
    from ldm.foreign.settings import parse_yaml
    from ldm.scorers.training import Recipe

    kwargs = {}
    for text in arch_args or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"--arch-arg takes name=value, as channels=[32,64,128,256]; got '{text}'.")
        kwargs[name] = parse_yaml(value, f"the value of --arch-arg {text}")
    return Recipe(kwargs=kwargs or None, weights=None if weights is None else str(weights), **given)


@app.command("train-scorer", rich_help_panel="Measure and choose")
def train_scorer(
    data: Annotated[
        Path,
        inputs(
            "--data",
            help="Labelled images: a folder of class subfolders, a table (path, label, patient), ratings, a cohort.",
        ),
    ],
    out: Annotated[Path, output("--out", help="Scorer folder to write.")],
    label: LabelOption = None,
    kind: KindOption = None,
    positive: PositiveOption = None,
    patient: PatientOption = None,
    where: ChosenOption = None,
    files_in: FilesInOption = None,
    skip_unrated: Annotated[bool, learnt("--skip-unrated", help="Leave out images without a rating.")] = False,
    arch: ArchOption = "resnet10t",
    arch_arg: ArchArgOption = None,
    weights: WeightsOption = None,
    size: SizeOption = 64,
    crop: CropOption = None,
    members: MembersOption = 4,
    test: TestOption = 0.2,
    epochs: EpochsOption = 40,
    patience: PatienceOption = 10,
    batch_size: Annotated[int, speed("--batch-size", help="Images per step.")] = 32,
    learning_rate: RateOption = 1e-3,
    colour: ColourOption = 0.1,
    shift: ShiftOption = 4,
    views: ViewsOption = 1,
    licence: Annotated[str, output("--licence", help="Licence of the scorer, recorded in it.")] = "",
    half: Annotated[bool, output("--half", help="Store weights in float16: half the size.")] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    r"""Train an ensemble that scores images, on labelled images split by patient. A stopped training goes on.

    Examples:

        histoldm train-scorer --data crops --positive Atypical --crop 64 \
            --out scorer
        histoldm train-scorer --data ratings/ratings.csv --colour 0 --out filter
    """
    from ldm.commands.scorers import AskedLabels, train

    recipe = _recipe(
        arch_arg,
        weights,
        arch=arch,
        size=size,
        members=members,
        test=test,
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        learning_rate=learning_rate,
        colour=colour,
        shift=shift,
        views=views,
        seed=seed,
    )
    asked = AskedLabels(label, kind and kind.value, positive, patient, parse_where(where))
    bf16 = precision is Precision.bf16
    train(data, out, asked, recipe, pick_device(device), bf16, licence, half, crop, skip_unrated)


@app.command(rich_help_panel="Measure and choose")
def score(
    scorer: ScorerOption,
    images: ImagesOption,
    out: Annotated[Path, output("--out", help="CSV to write: image, label, mean score, each network's.")],
    crop: CropOption = None,
    where: ChosenOption = None,
    files_in: FilesInOption = None,
    target: Annotated[
        str | None, output("--target", help="Column of what each image shall be, for `evaluate --scores`.")
    ] = None,
    batch_size: ScoreBatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Score images.

    Example:

        histoldm score --scorer scorer --images tiles --out scores.csv
    """
    from ldm.commands.filter import score_images

    score_images(scorer, images, out, pick_device(device), batch_size, crop, parse_where(where), target)


@app.command("filter", rich_help_panel="Measure and choose")
def filter_command(
    scorer: ScorerOption,
    images: ImagesOption,
    out: Annotated[Path, output("--out", help="Folder for those that pass, their list and contact sheets.")],
    above: AboveOption = None,
    top: Annotated[float | None, choose("--top", help="Fraction to keep of the best, of each value of --by.")] = None,
    class_name: ClassOption = None,
    matches: MatchesOption = None,
    by: Annotated[str | None, choose("--by", help="Column of the images' list whose values are kept apart.")] = None,
    files_in: FilesInOption = None,
    link: Annotated[bool, output("--link", help="Make hard links in place of copies.")] = False,
    crop: CropOption = None,
    batch_size: ScoreBatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    r"""Keep the images that pass a scorer.

    Examples:

        histoldm filter --scorer filter --images tiles --above 0.5 --out good
        histoldm filter --scorer scorer --images tiles --matches class \
            --by class --top 0.2 --out good
    """
    from ldm.commands.filter import filter_images

    filter_images(
        scorer, images, out, pick_device(device), batch_size, crop, above or [], top, class_name, matches, by, link
    )


@app.command(rich_help_panel="Measure and choose")
def rate(
    images: ImagesOption,
    out: Annotated[Path, output("--out", help="Rating folder to write.")],
    count: Annotated[
        int, wanted("--count", min=2, help="Number of images that are drawn at random, or of requests.")
    ] = 96,
    scale: Annotated[
        str, wanted("--scale", help="Scale of the ratings: 1-5, or names from bad to good, as bad,good.")
    ] = "bad,good",
    files_in: FilesInOption = None,
    seed: SeedOption = 0,
) -> None:
    """Write numbered contact sheets and a table for people to rate images in; `train-scorer` learns from it.

    Example:

        histoldm rate --images tiles --scale 1-5 --out ratings
    """
    from ldm.commands.filter import rate as write

    write(images, out, count, scale, seed)


@app.command(rich_help_panel="Measure and choose")
@settings("sample")
def resample(
    model: ModelOption,
    scorer: ScorerOption,
    out: Annotated[Path, output("--out", help="Folder for the tiles that pass.")],
    sampler: AskedSampler,
    above: AboveOption = None,
    until: Annotated[int, choose("--until", min=1, help="Number of tiles that are to pass, of each request.")] = 16,
    max_attempts: Annotated[
        int, choose("--max-attempts", min=1, help="Number of tiles that are sampled at most.")
    ] = 256,
    class_name: ClassOption = None,
    matches: MatchesOption = None,
    condition: ConditionOption = None,
    features: Annotated[
        Path | None, inputs("--features", help="Features or a tile store, as of `histoldm sample`.")
    ] = None,
    table: Annotated[
        Path | None, inputs("--table", help="Table of conditions, as of `histoldm sample`: a request per row.")
    ] = None,
    feature: FeatureOption = None,
    where: WhereOption = None,
    count: Annotated[
        int | None, wanted("--count", min=1, help="Number of images that are drawn at random, or of requests.")
    ] = None,
    device: DeviceOption = "auto",
    allow_target: AllowTargetOption = None,
) -> None:
    r"""Sample tiles until enough pass a scorer, and tell the acceptance rate. A stopped run goes on.

    Example:

        histoldm resample --model M --condition score=0.8 --scorer scorer \
            --matches score --above 0.9 --until 32 --out tiles
    """
    from ldm.commands.resample import resample as run
    from ldm.requests.tiles import AskedTiles

    if features is None and table is None and count is not None:
        raise UserError("--count goes with --features or --table; --until says how many tiles are to pass.")
    asked = AskedTiles(features, feature, parse_where(where), condition or [], table, count)
    run(model, scorer, out, pick_device(device), asked, until, max_attempts, above or [], class_name, matches, sampler)


@app.command(rich_help_panel="Measure and choose")
def utility(
    real: Annotated[Path, inputs("--real", help="Labelled real images, as of `train-scorer --data`.")],
    synthetic: Annotated[
        Path, inputs("--synthetic", help="Labelled synthetic ones; or an output of `sample` or `resample`.")
    ],
    out: Annotated[Path, output("--out", help="Folder for utility.json and the three ensembles.")],
    label: LabelOption = None,
    kind: KindOption = None,
    positive: PositiveOption = None,
    patient: PatientOption = None,
    files_in: FilesInOption = None,
    arch: ArchOption = "resnet10t",
    arch_arg: ArchArgOption = None,
    weights: WeightsOption = None,
    size: SizeOption = 64,
    crop: CropOption = None,
    members: MembersOption = 2,
    test: TestOption = 0.3,
    held_out: Annotated[
        list[str] | None,
        learnt(
            "--held-out",
            help="Selection of real images to test on, as split=test (repeat); by default --test at random.",
        ),
    ] = None,
    epochs: EpochsOption = 40,
    patience: PatienceOption = 10,
    batch_size: Annotated[int, speed("--batch-size", help="Images per step.")] = 32,
    learning_rate: RateOption = 1e-3,
    colour: ColourOption = 0.1,
    shift: ShiftOption = 4,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
) -> None:
    r"""What synthetic images are worth: classifiers trained on real ones, synthetic ones and both, with intervals.

    Example:

        histoldm utility --real crops.csv --synthetic cells --label score \
            --crop 32 --out utility
    """
    from ldm.commands.scorers import AskedLabels
    from ldm.commands.scorers import utility as run

    recipe = _recipe(
        arch_arg,
        weights,
        arch=arch,
        size=size,
        members=members,
        test=test,
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        learning_rate=learning_rate,
        colour=colour,
        shift=shift,
        seed=seed,
    )
    asked = AskedLabels(label, kind and kind.value, positive, patient)
    bf16 = precision is Precision.bf16
    run(real, synthetic, out, asked, recipe, pick_device(device), bf16, parse_where(held_out), crop)
