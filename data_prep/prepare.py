r"""Prepare a cohort for training: tiles, features and latents of all slides, checked, on one machine or on many.

The same as data_prep.tile_slides, extract_features, encode_latents and verify one after the other. What is done is
skipped; what failed is listed with its reason and tried again by the next call. Without --workers, --scheduler or
--slurm the work runs in this process; the result is the same however many processes did it. Each run leaves
runs/<time>.json and summary.html in the cohort.

Examples:

    python -m data_prep.prepare --slides slides/ --mpp 0.5 --out cohort \
        --encoder uni2-h --first-stage models/vq-f4 --workers 8
    python -m data_prep.prepare --slides cohort.csv --mpp 0.5 \
        --encoder uni2-h --out cohort \
        --slurm jobs=8,partition=gpu,gpus=1,cores=8,memory=32GB
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from data_prep.cohort_index import tell_splits, update_index
from data_prep.engine import (
    AHEAD,
    BUSY,
    DONE,
    FAILED,
    KEPT,
    LEFT_OUT,
    Outcome,
    Task,
    dask_client,
    has_dashboard,
    run_by,
    run_here,
)
from data_prep.fetch import fetch
from data_prep.options import (
    DeviceOption,
    FilesInOption,
    InsideOption,
    JpegQualityOption,
    KeepBackgroundOption,
    LicenceOption,
    MinInsideOption,
    MinTissueOption,
    MppOption,
    OutOption,
    OutsideOption,
    PatientOption,
    Pixels,
    PixelsOption,
    Precision,
    PrecisionOption,
    PreviewsOption,
    RegionOriginOption,
    RegionsOption,
    SeedOption,
    SlideMppOption,
    SlidesOption,
    StrideOption,
    TestOption,
    TileSizeOption,
    TokensOption,
    ValidationOption,
    WeightsOption,
    inputs,
    number,
    speed,
    taken,
)
from data_prep.run_record import RunRecord
from data_prep.slide_stages import check, encoder_of, features, first_stage_of, latents, store_of, tile
from data_prep.slide_table import SlideEntry, read_slides, tell_renamed
from ldm.cli.script import script
from ldm.data.slide_tiles import check_quality, tell_pixels
from ldm.data.splits import fractions
from ldm.data.tile_store import TileStore, is_finished
from ldm.errors import UserError, note, some
from ldm.locks import clear_dead
from ldm.tables.regions import check_files

STAGES = (AHEAD, "tiles", "features", "latents", "check")
PATHS = ("regions", "encoder", "weights", "first_stage_folder")  # settings that may be paths
PAUSE = 5.0  # seconds until slides that another run is at work on are tried again


# --- a cohort ---------------------------------------------------------------------------------------------------------


def plan(
    entries: Sequence[SlideEntry],
    out: Path,
    tiling: Mapping[str, Any],
    encoder: Mapping[str, Any] | None = None,
    first_stage: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> list[Task]:
    """The tasks of a cohort, slide by slide.

    tiling, encoder, first_stage: arguments of `tile_slide`, `extract` and `encode_latents`; None leaves a stage out.

    >>> tasks = plan([SlideEntry(Path("a.svs"), name="a.svs")], Path("cohort"), {"mpp": 0.5}, {"encoder": "uni"})
    >>> [(task.stage, task.needs) for task in tasks]
    [('tiles', ()), ('features', ('tiles',)), ('check', ('tiles', 'features'))]
    """
    tasks = []
    for entry in entries:
        name, store = entry.name, store_of(out, entry.name)
        settings = {"path": entry.path, "out": out, "settings": {**tiling, **entry.settings()}, "cache": cache}
        if cache is not None:
            tasks.append(Task(name, AHEAD, fetch, {"path": entry.path, "cache": cache, "unless": store}))
        tasks.append(Task(name, "tiles", tile, settings, needs=() if cache is None else (AHEAD,)))
        made = ["tiles"]
        if encoder is not None:
            tasks.append(Task(name, "features", features, {"store": store, **encoder}, ("tiles",), gpu=True))
            made.append("features")
        if first_stage is not None:
            tasks.append(Task(name, "latents", latents, {"store": store, **first_stage}, ("tiles",), gpu=True))
            made.append("latents")
        tasks.append(Task(name, "check", check, {"store": store}, tuple(made)))
    return tasks


def work(tasks: Sequence[Task], client: Any, record: RunRecord) -> None:
    """Run all tasks, and those again that met another run at work; the bar counts slides, and tells tiles."""
    slides = list(dict.fromkeys(task.slide for task in tasks))
    with tqdm(total=len(slides), desc="preparing", unit="slide") as bar:
        while tasks:
            busy = []
            for outcome in run_here(tasks) if client is None else run_by(client, tasks):
                if outcome.state == BUSY:
                    busy.append(outcome)
                    continue
                record.add(outcome)
                if outcome.state == FAILED:
                    tqdm.write(f"error: {outcome.slide}, {outcome.stage}: {outcome.reason}", file=sys.stderr)
                if outcome.stage == "check":
                    bar.update()
                bar.set_postfix_str(f"{record.tiles} tiles", refresh=False)
            again = {(each.slide, each.stage) for each in busy}
            tasks = [task for task in tasks if (task.slide, task.stage) in again]
            tasks = [_without_ended(task, again) for task in tasks]
            if tasks:
                bar.set_postfix_str(f"waiting for another run at {len({task.slide for task in tasks})} slides")
                time.sleep(PAUSE)


def _without_ended(task: Task, again: set[tuple[str, str]]) -> Task:
    needs = tuple(need for need in task.needs if (task.slide, need) in again)
    return Task(task.slide, task.stage, task.call, task.arguments, needs, task.gpu)


def told(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """Lines on what was done, and what was not."""
    for stage in STAGES[1:]:
        states = Counter(outcome.state for outcome in outcomes if outcome.stage == stage)
        if states:
            counts = (f"{states[state]} {state}" for state in (DONE, KEPT, FAILED, LEFT_OUT) if states[state])
            yield f"{stage}: {', '.join(counts)}"


def prepare(
    slides: Sequence[Path | str],
    out: Path | str,
    *,
    tiling: Mapping[str, Any] | None = None,
    encoder: Mapping[str, Any] | None = None,
    first_stage: Mapping[str, Any] | None = None,
    validation: float | None = None,
    test: float | None = None,
    patient: str | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    slurm: str | None = None,
) -> RunRecord:
    """Prepare a cohort; see the command.

    Args:
        slides: as of `read_slides`.
        tiling, encoder, first_stage: arguments of `tile_slide`, `extract` and `encode_latents`; of the last two None
            leaves features or latents out.
        workers, scheduler, slurm: where the work runs, see `engine.dask_client`.
    Returns:
        What was done, also where some slides failed.
    Raises:
        UserError: before any work: nothing to do, settings other than those of the cohort, no such encoder or model.
    """
    entries, out = read_slides(slides), Path(out)
    tell_renamed({entry.path: entry.name for entry in entries}, out)
    validation, test = fractions(out, validation, test)
    tiling = dict(tiling or {})
    if workers:
        tiling.setdefault("workers", max(1, (os.cpu_count() or 1) // workers))
    _check_before(out, entries, tiling, encoder, first_stage)
    places = [_absolute(each, PATHS) for each in (tiling, encoder, first_stage)]
    far = [replace(entry, path=entry.path.absolute(), roi=entry.roi and entry.roi.absolute()) for entry in entries]
    tasks = plan(far, out.absolute(), *places, cache and Path(cache).absolute())
    asked = {"tiling": tiling, "encoder": encoder, "first_stage": first_stage}
    asked |= {"validation": validation, "test": test, "patient": patient}
    record = RunRecord(out, [asdict(entry) for entry in entries], asked)
    try:
        with dask_client(workers, scheduler, slurm) as client:
            if client is not None and has_dashboard():
                print(f"dashboard: {client.dashboard_link}", file=sys.stderr)
            work(tasks, client, record)
    finally:
        if any(is_finished(store_of(out, entry.name)) for entry in entries):
            update_index(out, validation, test, patient=patient, entries=entries)
        record.write()
    return record


def _absolute(settings: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, Any] | None:
    """Settings whose paths hold for workers that were started in other folders too."""
    if settings is None:
        return None
    given = {name: settings[name] for name in names if isinstance(settings.get(name), (str, Path))}
    return {**settings} | {name: Path(path).absolute() for name, path in given.items() if Path(path).exists()}


def clear_locks(cohort: Path) -> None:
    """Remove the locks that other machines left in a cohort, unless the file system says that their process lives.

    >>> clear_locks(store.path.parent.parent)
    """
    for path in clear_dead(cohort, strict=False):
        note(f"{path} is of a process that does not run any more; removed")


def _check_before(
    out: Path,
    entries: Sequence[SlideEntry],
    tiling: Mapping[str, Any],
    encoder: Mapping[str, Any] | None,
    first_stage: Mapping[str, Any] | None,
) -> None:
    """UserError for what would fail on every slide."""
    from data_prep.extract_features import check_encoder

    if encoder is not None:
        encoder_of.cache_clear()
        check_encoder(encoder["encoder"], encoder.get("weights"))
    if first_stage is not None:
        first_stage_of.cache_clear()  # of another call in this process
        first_stage_of(str(first_stage["first_stage_folder"]))
    drawn = [(entry.roi or tiling.get("regions"), entry.name) for entry in entries]
    check_files([each for each in drawn if each[0]], tiling.get("inside", ()), tiling.get("outside", ()))
    for entry in entries:
        if not is_finished(store := store_of(out, entry.name)):
            continue
        attrs = TileStore.open(store).attrs
        wanted = {**tiling, **entry.settings()}
        before = {**attrs, **attrs.get("tissue", {})}
        names = ("mpp", "tile_size", "stride", "min_tissue", "keep_background", "seed", "pixels")
        differ = [name for name in names if wanted.get(name) is not None and wanted[name] != before.get(name)]
        if differ:
            was = ", ".join(f"{name} {before.get(name)}" for name in differ)
            now = ", ".join(f"{name} {wanted[name]}" for name in differ)
            raise UserError(
                f"{store} was made with {was}, and {now} is asked for now; ask for what was, or write to another --out"
            )
        return


@script("data_prep.prepare", __doc__)
def main(
    slides: SlidesOption,
    out: OutOption,
    files_in: FilesInOption = None,
    slide_mpp: SlideMppOption = None,
    patient: PatientOption = None,
    licence: LicenceOption = "",
    mpp: MppOption = None,
    tile_size: TileSizeOption = 256,
    stride: StrideOption = None,
    min_tissue: MinTissueOption = 0.25,
    keep_background: KeepBackgroundOption = 0.05,
    seed: SeedOption = 0,
    validation: ValidationOption = None,
    test: TestOption = None,
    regions: RegionsOption = None,
    inside: InsideOption = None,
    outside: OutsideOption = None,
    min_inside: MinInsideOption = 0.5,
    region_origin: RegionOriginOption = None,
    previews: PreviewsOption = True,
    pixels: PixelsOption = Pixels.zstd,
    jpeg_quality: JpegQualityOption = None,
    encoder: Annotated[
        str | None,
        inputs(
            "--encoder",
            help="Encoder of features: the name of a published one, an encoder folder, or timm:<model> with --weights.",
        ),
    ] = None,
    weights: WeightsOption = None,
    any_mpp: Annotated[
        bool, taken("--any-mpp", help="Take tiles of another resolution than the encoder was made for.")
    ] = False,
    first_stage: Annotated[
        Path | None, inputs("--first-stage", help="Model folder of the first stage that makes latents.")
    ] = None,
    dihedral: Annotated[
        bool, taken("--dihedral", help="Write features and latents of all eight rotations and flips of each tile.")
    ] = False,
    tokens: TokensOption = 0,
    batch_size: Annotated[
        int | None,
        speed(
            "--batch-size",
            help="Tiles per network call.",
            show_default="of features 64 on a GPU and 8 on a CPU, of latents 16",
        ),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
    workers: Annotated[
        int | None, speed("--workers", min=1, help="Processes of this machine that share the work, one GPU each.")
    ] = None,
    scheduler: Annotated[
        str | None, speed("--scheduler", help="Dask scheduler that runs already: tcp://host:8786, or its file.")
    ] = None,
    slurm: Annotated[
        str | None,
        speed("--slurm", help="Jobs of SLURM that share the work, as jobs=8,partition=gpu,gpus=1,cores=8,memory=32GB."),
    ] = None,
    clear_dead_locks: Annotated[
        bool, speed("--clear-dead-locks", help="Remove what a machine that crashed left locked, and go on.")
    ] = False,
    cache: Annotated[
        Path | None, speed("--cache", help="Folder on a local disk; slides are copied there ahead of their tiling.")
    ] = None,
) -> None:
    tiling = {
        "mpp": mpp, "tile_size": tile_size, "stride": stride, "min_tissue": min_tissue, "seed": seed,
        "keep_background": keep_background, "licence": licence, "slide_mpp": slide_mpp,
        "regions": regions, "inside": inside or [], "outside": outside or [],
        "min_inside": min_inside, "region_origin": region_origin and region_origin.value, "previews": previews,
        "pixels": pixels.value, "jpeg_quality": jpeg_quality,
    }  # fmt: skip
    shared = {"device": device, "precision": precision.value, "with_dihedral": dihedral}
    shared |= {} if batch_size is None else {"batch_size": batch_size}
    of_encoder = encoder and {"encoder": encoder, "weights": weights, "any_mpp": any_mpp, "tokens": tokens, **shared}
    of_stage = first_stage and {"first_stage_folder": first_stage, **shared}
    check_quality(pixels.value, jpeg_quality)
    tell_pixels(pixels)
    if clear_dead_locks:
        clear_locks(out)
    record = prepare(
        slides, out, tiling=tiling, encoder=of_encoder, first_stage=of_stage, validation=validation, test=test,
        patient=patient, cache=cache, workers=workers, scheduler=scheduler, slurm=slurm,
    )  # fmt: skip
    for text, names in record.notes().items():
        note(f"{text} ({some(names, 3)})")
    print("\n".join(told(record.outcomes)))
    index = out / "index.parquet"
    if index.is_file():
        print(tell_splits(index, *fractions(out, validation, test), "Give more slides."))
    print(f"{number(record.tiles, 'tile')} in {out / 'slides'}; summary: {out / 'summary.html'}")
    if failed := record.failed():
        listed = "".join(f"\n  {each.slide}, {each.stage}: {each.reason}" for each in failed)
        raise UserError(f"{number(len(failed), 'slide')} failed; the same command tries them again:{listed}")


if __name__ == "__main__":
    main.run()
