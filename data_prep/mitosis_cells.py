r"""Cut annotated cells out of slides, with a score for one class, such as mitotic figures.

Annotations are a SlideRunner database, a MIDOG file, or a folder of crops with votes. Each slide, or the folder of
crops, becomes a tile store, and index.parquet gets the columns `score`, `class`, `votes` (their number), `patient` and
`split`. A cell lies in the middle of its crop; beyond the slide's edge the crop goes on as its mirror image. When a run
was interrupted, the same command goes on where it stopped.

Examples:

    python -m data_prep.mitosis_cells --sqlite MITOS_WSI_CCMCT_ODAEL.sqlite \
        --slides WSI --out cohort
    python -m data_prep.mitosis_cells --midog MIDOG++.json \
        --images images --out cohort
    python -m data_prep.mitosis_cells --crops AtNorM-MD --votes votes.csv \
        --positive Atypical --labels soft --out cohort
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
from tqdm import tqdm

from data_prep.cut_cells import cut_crops, cut_slides, downsample_to
from data_prep.options import (
    LicenceOption,
    MppOption,
    OutOption,
    PatientOption,
    SeedOption,
    SizeOption,
    SlideMppOption,
    TestOption,
    ValidationOption,
    choices,
    inputs,
    taken,
)
from ldm.cli.script import script
from ldm.data.cohort import counted, merge_index
from ldm.data.extent import tell_scales
from ldm.data.splits import UNKNOWN, choose_splits, fractions, patient_of, tell_validation
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.images.slides import open_slide
from ldm.tables.annotations import Cell, find_files, read_crops, read_midog, read_sliderunner
from ldm.tables.patients import patients_of
from ldm.tables.votes import LABELS, class_called, distribution, scores_of, without_surplus

Labels = choices("Labels", LABELS)


def choose(
    cells: Sequence[Cell],
    positive: str,
    labels: str,
    validation: float | None,
    test: float,
    balance: bool,
    negatives_per_slide: int | None,
    seed: int,
    patient: str | None = None,
) -> pd.DataFrame:
    """Cells to cut, as a table: slide, class, score, votes, patient, split, and `cell`: the place in `cells`.

    A slide's cells are in one split; crops without a known patient are split one by one.
    """
    scores = scores_of(cells, positive, labels)
    owners = {} if patient is None else patients_of([Path(cell.slide).name for cell in cells], patient)
    names = [Path(cell.slide).name for cell in cells]
    patients = [owners.get(name) or cell.patient or patient_of(name) for name, cell in zip(names, cells)]
    splits = choose_splits(patients, validation, test)
    table = pd.DataFrame(
        {
            "cell": range(len(cells)),
            "slide": [cell.slide for cell in cells],
            "class": [cell.name for cell in cells],
            "score": scores,
            "votes": [len(cell.votes) for cell in cells],
            "patient": patients,
            "split": [splits[patient] for patient in patients],
        }
    )
    if any(cell.domain for cell in cells):
        table["domain"] = [cell.domain for cell in cells]
    table = table[table["score"].notna()]
    if negatives_per_slide is not None:
        table = _thinned(table, cells, "slide", seed, negatives_per_slide)
    if balance:
        table = _thinned(table, cells, "split", seed)
    return table.astype({"score": float}).reset_index(drop=True)


def _thinned(
    table: pd.DataFrame, cells: Sequence[Cell], group: str, seed: int, most: int | None = None
) -> pd.DataFrame:
    chosen = [cells[i] for i in table["cell"]]
    return table.iloc[without_surplus(chosen, table["score"].tolist(), table[group].tolist(), seed, most)]


def slides_of(cells: Sequence[Cell], folder: Path | str, skip_missing: bool) -> tuple[dict[str, Path], list[str]]:
    """The cells' slides in a folder, by name, and the names that are not there, which only `skip_missing` allows."""
    names = {cell.slide for cell in cells}
    paths = find_files(folder, names)
    missing = sorted(names - set(paths))
    if missing and (not skip_missing or not paths):
        raise UserError(
            f"{len(missing)} of {len(names)} annotated slides are not in {folder}: {', '.join(missing[:10])}"
            f"{', ...' if len(missing) > 10 else ''}; --skip-missing goes on without them"
        )
    return paths, missing


def within_slides(
    cells: Sequence[Cell], paths: dict[str, Path], slide_mpp: float | None, mpp: float | None
) -> tuple[list[Cell], list[Cell]]:
    """Cells of the slides in `paths` that lie inside them, and those outside. UserError for slides of no use."""
    stems: dict[str, Path] = {}
    for path in paths.values():
        if path.stem in stems:
            raise UserError(f"{stems[path.stem]} and {path} would both become {path.stem}.zarr; rename one of them")
        stems[path.stem] = path
    sizes = {}
    for name, path in tqdm(paths.items(), desc="opening slides", unit="slide", leave=False):
        slide = open_slide(path, slide_mpp)
        downsample_to(slide, mpp)
        sizes[name] = slide.dimensions
    inside, outside = [], []
    for cell in cells:
        if cell.slide in sizes:
            width, height = sizes[cell.slide]
            (inside if 0 <= cell.x < width and 0 <= cell.y < height else outside).append(cell)
    if not inside:
        raise UserError(
            f"all {len(outside)} annotations lie outside their slides, the first is {outside[0]}; are these the slides "
            "that were annotated?"
        )
    return inside, outside


def report(
    cells: Sequence[Cell],
    index: pd.DataFrame,
    positive: str,
    missing: Sequence[str],
    outside: Sequence[Cell],
    mirrored: int,
) -> str:
    """What was read, what was cut, and what was left out and why."""
    lines = [f"annotated: {len(cells)} cells: " + counted(cell.name for cell in cells)]
    votes = sorted(distribution(cells, positive).items())
    if any(given for (_, given), _ in votes):
        told = ", ".join(f"{count} of {given}: {number}" for (count, given), number in votes)
        lines.append(f"votes for '{positive}': {told}")
    lines.append(f"cut: {len(index)} cells: " + counted(index["class"]))
    lines.append("splits: " + counted(index["split"]))
    lines.append(f"score: mean {index['score'].mean():.4f}, {int((index['score'] >= 0.5).sum())} at 0.5 or above")
    if missing:
        lines.append(f"slides not found: {len(missing)}: " + ", ".join(missing))
    if outside:
        lines.append(f"outside their slides, left out: {len(outside)}, the first is {outside[0]}")
    if mirrored:
        lines.append(f"at the edge, filled up with their mirror image: {mirrored}")
    return "\n".join(lines)


def prepare(
    out: Path | str,
    *,
    sqlite: Path | str | None = None,
    slides: Path | str | None = None,
    midog: Path | str | None = None,
    images: Path | str | None = None,
    crops: Path | str | None = None,
    votes: Path | str | None = None,
    positive: str = "mitotic figure",
    labels: str = "hard",
    size: int = 64,
    mpp: float | None = None,
    slide_mpp: float | None = None,
    classes: Sequence[str] = (),
    annotators: Sequence[str] = (),
    balance: bool = False,
    negatives_per_slide: int | None = None,
    validation: float | None = None,
    test: float | None = None,
    skip_missing: bool = False,
    licence: str = "",
    seed: int = 0,
    patient: str | None = None,
) -> str:
    """Cut the cells of one source of annotations and return the report; see the options of the command."""
    sources = {"sqlite": sqlite, "midog": midog, "crops": crops}
    source = _source(sources, {"slides": slides, "images": images, "votes": votes})
    validation, test = fractions(out, validation, test)
    if annotators and source == "midog":
        raise UserError("a MIDOG file does not say whose votes it has; --annotators goes with --sqlite and --crops")
    if negatives_per_slide is not None and (source == "crops" or negatives_per_slide < 0):
        raise UserError(
            f"--negatives-per-slide is 0 or more and goes with --sqlite and --midog; got {negatives_per_slide} with "
            f"--{source}"
        )

    notes, paths, missing = [], {}, []
    if source == "sqlite":
        cells = read_sliderunner(sqlite, annotators)
    elif source == "midog":
        cells = read_midog(midog)
    else:
        cells, rest = read_crops(crops, votes, annotators)
        notes += [f"{rest} rows of {votes} have no crop"] if rest else []
    if not cells:
        raise UserError(f"no cell is annotated in {sqlite or midog}; is it the right file?")
    if classes:
        wanted = {class_called(name, cells, "classes") for name in classes}
        cells = [cell for cell in cells if cell.name in wanted]
    positive = class_called(positive, cells, "positive")
    present, outside, mirrored = cells, [], 0
    if source != "crops":
        paths, missing = slides_of(cells, slides or images, skip_missing)
        present, outside = within_slides(cells, paths, slide_mpp, mpp)
    out = Path(out)
    table = choose(present, positive, labels, validation, test, balance, negatives_per_slide, seed, patient)
    if table.empty:
        raise UserError(_nothing_left(scores_of(present, positive, labels), positive))
    instead = "Or `where` in the config holds out some of the cells."
    notes += filter(None, [tell_validation(table["patient"], table["split"], validation, test, instead)])
    undecided = sum(score is None for score in scores_of(present, positive, labels))
    if undecided:
        notes.append(f"{undecided} undecided cells have no hard label and are left out; --labels soft uses their votes")
    attrs = {"licence": licence, "score": {"positive": positive, "labels": labels}}
    if source != "crops":
        index, mirrored = cut_slides(present, table, paths, out, attrs, size, mpp, slide_mpp)
        names = {paths[name].stem for name in table["slide"]}
        scales = tell_scales([TileStore.open(out / "slides" / f"{name}.zarr") for name in sorted(names)])
    else:
        index, scales = cut_crops(present, table, Path(crops), out, attrs, size, mpp, slide_mpp), []
        if (index["patient"] == UNKNOWN).any():
            notes.append("patients are unknown: crops were split one by one, so a patient may be in several splits")
    merge_index(out, index.drop(columns="cell"), (validation, test))
    told = report(cells, index, positive, missing, outside, mirrored)
    return "\n".join([told, *scales, *(f"note: {note}" for note in notes)])


def _nothing_left(scores: Sequence[float | None], positive: str) -> str:
    """Why no cell is left to cut."""
    known = [score for score in scores if score is not None]
    if not known:
        return "no cell is left to cut: all are undecided; --labels soft uses their votes"
    if max(known) < 0.5:
        return (
            f"no cell is left to cut: none is '{positive}' with a score of 0.5 or above, and --balance or "
            "--negatives-per-slide leaves out all others"
        )
    return "no cell is left to cut"


def _source(sources: dict[str, Path | str | None], folders: dict[str, Path | str | None]) -> str:
    """Which of the sources is given, after checking that its folder is too and that nothing of the others is."""
    given = [name for name, path in sources.items() if path is not None]
    if len(given) != 1:
        raise UserError(f"give one of --sqlite, --midog and --crops; got {', '.join(given) or 'none'}")
    for source, (option, path) in zip(sources, folders.items()):
        if path is not None and source != given[0]:
            raise UserError(f"--{option} goes with --{source}, not with --{given[0]}")
        if path is None and source == given[0] != "crops":
            raise UserError(f"--{source} needs --{option}, the folder where its slides lie")
    return given[0]


@script("data_prep.mitosis_cells", __doc__)
def main(
    *,
    sqlite: Annotated[
        Path | None, inputs("--sqlite", help="SlideRunner database; --slides says where its slides are.")
    ] = None,
    slides: Annotated[
        Path | None, inputs("--slides", help="Folder of the slides of --sqlite, searched with all folders in it.")
    ] = None,
    midog: Annotated[
        Path | None, inputs("--midog", help="MIDOG annotations, JSON; --images says where their images are.")
    ] = None,
    images: Annotated[
        Path | None, inputs("--images", help="Folder of the images of --midog, searched with all folders in it.")
    ] = None,
    crops: Annotated[
        Path | None, inputs("--crops", help="Folder of images of single cells, with a folder for each class.")
    ] = None,
    votes: Annotated[
        Path | None, inputs("--votes", help="CSV of votes on --crops: file name, a column per annotator, Majority.")
    ] = None,
    slide_mpp: SlideMppOption = None,
    patient: PatientOption = None,
    out: OutOption,
    licence: LicenceOption = "",
    positive: Annotated[str, taken("--positive", help="Class whose cells score 1.")] = "mitotic figure",
    labels: Annotated[
        Labels, taken("--labels", help="Score by the agreed class (hard), or by the fraction of votes (soft).")
    ] = Labels.hard,
    size: SizeOption = 64,
    mpp: MppOption = None,
    classes: Annotated[
        list[str] | None, taken("--classes", help="Classes whose cells are cut: one or several (default: all).")
    ] = None,
    annotators: Annotated[
        list[str] | None, taken("--annotators", help="Annotators whose votes count: one or several (default: all).")
    ] = None,
    balance: Annotated[
        bool, taken("--balance", help="Take only as many cells with a score below 0.5 as above, in every split.")
    ] = False,
    negatives_per_slide: Annotated[
        int | None, taken("--negatives-per-slide", help="Take at most so many cells below 0.5 of a slide.")
    ] = None,
    skip_missing: Annotated[
        bool, taken("--skip-missing", help="Go on without the slides that are not found, and list them.")
    ] = False,
    seed: SeedOption = 0,
    validation: ValidationOption = None,
    test: TestOption = None,
) -> None:
    told = prepare(
        out, sqlite=sqlite, slides=slides, midog=midog, images=images, crops=crops, votes=votes, positive=positive,
        labels=labels.value, size=size, mpp=mpp, slide_mpp=slide_mpp, classes=classes or (),
        annotators=annotators or (), balance=balance, negatives_per_slide=negatives_per_slide, validation=validation,
        test=test, skip_missing=skip_missing, licence=licence, seed=seed, patient=patient,
    )  # fmt: skip
    print(told)


if __name__ == "__main__":
    main.run()
