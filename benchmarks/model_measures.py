"""What the cards of the demo models state, measured: a function for each model, of its folder, that returns rows.

Data and settings are chosen here; the measures are those of the other benchmarks. `models_report.py` runs them, from
the repository's folder, and writes what is made on the way to out/models_report.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ldm
from ldm.errors import UserError
from ldm.metrics.measure import Measure

DATA, MODELS = Path("data"), Path("data/models")
OUT = Path("out/models_report")
SLIDE, BAND = DATA / "demo/CMU-1-Small-Region.svs", "0,1856,2220,512"
FEATURE = "demo-encoder"
STEPS_OF_PAIRS = 1
REGION = (896, 1472, 1024, 1024)  # of the slide, generated again; it crosses the band


@dataclass(frozen=True)
class Row:
    """A figure as a card states it; `interval` is of 95%, or empty."""

    measure: str
    value: str
    interval: str
    on: str


def row(measure: str, found: Sequence[float], on: str, digits: int = 3) -> Row:
    """found: value, low, high; or the value alone."""
    value, *ends = (f"{each:.{digits}f}" for each in found)
    return Row(measure, value, " to ".join(ends), on)


def share(measure: str, hits: np.ndarray, on: str) -> Row:
    """The part of hits (N,) that are 1, with the interval of a proportion."""
    from ldm.scorers.calibration import proportion

    return row(measure, proportion(int(hits.sum()), len(hits)), on)


@contextmanager
def quietly() -> Iterator[None]:
    """Words and bars go to OUT/log.txt."""
    with (OUT / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def run_quietly(main: Callable[[list[str]], Any], *args: Any) -> None:
    """A command of data_prep."""
    with quietly():
        main([str(arg) for arg in args])


def tile(out: Path, *args: Any) -> None:
    from data_prep import tile_slides

    run_quietly(tile_slides.main, "--out", out, *args)


def encoder(folder: Path, precision: str) -> list[Row]:
    from demo.build.pretrain_encoder import build, held_out_tiles, tile_measures
    from ldm.config import load_config
    from ldm.encoders.encoder import load_encoder
    from ldm.scorers.calibration import with_intervals

    config = load_config([Path("configs/demo/encoder.yaml")])
    tiles = held_out_tiles(load_encoder(str(folder)), config, build(config)[1])
    found = with_intervals(
        lambda rows: tile_measures({name: values[rows] for name, values in tiles.items()}), tiles["column"].astype(int)
    )
    tissue = int((tiles["tissue"] > 0.25).sum())
    where = "tiles of the held-out band, drawn by columns of the slide"
    return [
        row(
            "a second view of a tile is nearest to the tile itself",
            found["retrieval_top1"],
            f"{tissue} {where}; tiles with tissue, among all {len(tiles['hit'])}",
        ),
        row("R2 of the tissue fraction, by ridge regression", found["tissue_r2"], f"{len(tiles['hit'])} {where}"),
    ]


def skin() -> Path:
    """The cohort of the demo's slide with the features of its encoder."""
    from data_prep import extract_features

    cohort = OUT / "skin"
    tile(cohort, "--slides", SLIDE, "--stride", 64, "--min-tissue", 0.05, "--keep-background", 0.08, "--holdout", BAND)
    run_quietly(extract_features.main, "--store", cohort, "--encoder", MODELS / FEATURE)
    return cohort


def student(folder: Path, precision: str) -> list[Row]:
    """In float32, whatever the precision: the arms' times are no part of the card."""
    import few_steps

    names = ("--student", folder, "--teacher", MODELS / "demo-ssl", "--store", skin(), "--encoder", MODELS / FEATURE)
    options = few_steps.parser_of().parse_args([str(name) for name in names])
    tiles, results, _ = few_steps.compared(options)
    return student_rows(results, f"{len(tiles.pixels)} conditions of the held-out band, {options.seeds} seeds", folder)


def student_rows(results: dict[str, dict[str, Any]], on: str, folder: Path) -> list[Row]:
    """The arms of few_steps.py, the teacher's first, with what each keeps of it."""
    first, *_ = results.values()
    rows = []
    for name, found in results.items():
        for key in ("KID", "recall", "coverage", "spread", "margin"):
            share = f"; {found[key][0] / first[key][0]:.3f} of the teacher's in 50 steps"
            kept = share if found is not first and key != "KID" else ""
            rows.append(row(f"{name.replace(folder.name, 'student')}: {key}", found[key], on + kept))
    return rows


def ssl(folder: Path, precision: str) -> list[Row]:
    from conditioning import measure_conditioning

    from ldm.data.tile_store import open_cohort
    from ldm.metrics.seams import measure_seams

    cohort, feature = skin(), FEATURE
    asked = argparse.Namespace(
        model=folder, store=cohort, feature=feature, encoder=str(MODELS / feature), split="val", count=64, steps=20,
        guidance_scale=2.0, seed=0, batch_size=16, device="cpu", precision=precision,
    )  # fmt: skip
    c = measure_conditioning(asked)[0]
    grid, _ = open_cohort(cohort)[0].grid(REGION, feature)
    sampler = ldm.Sampler(steps=10, seed=0, precision=precision, progress=False)
    image = ldm.large_image(ldm.load_model(folder), grid, REGION[2:], sampler)
    seams = measure_seams(ldm.to_uint8(image)[0], 256, folder)["like"]
    on = f"{c['tiles']} tiles of the held-out band, drawn by {c['blocks']} columns of the slide"
    if c["judge"] is None:
        raise UserError("the judge is not installed, which measures too: pip install 'histoldm[judge]'")
    return [
        row("margin: cosine to its own condition less that to others'", (c["margin"], c["low"], c["high"]), on),
        row("the same to the held-out tile itself, in features of the judge", c["judge"], on),
        row("cosine to its own condition", [c["own"]], on),
        row("cosine to its own condition of the first stage's reconstruction", [c["reconstruction"]], on),
        row("first stage: PSNR of the reconstruction, dB", c["psnr"], on, 1),
        row(
            "gradient across borders of the 256 px lattice over that beside them",
            [seams["ratio"]],
            f"one image of 1024 px; 95% of other lattices in it {seams['low']:.3f} to {seams['high']:.3f}",
        ),
    ]


def field(folder: Path, precision: str) -> list[Row]:
    """In float32, whatever the precision."""
    from fields import real_fields, sampled_fields

    from ldm.metrics.fields import LAGS, field_measures

    cohort, model = [str(skin())], ldm.load_model(folder)
    train, other = (real_fields(cohort, FEATURE, ["split=train"], other) for other in (False, True))
    sampled = sampled_fields(model, 4, (26, 31), seed=0, steps=20)
    ours, rest = ({each.name: each for each in field_measures(part, train)} for part in (sampled, other))

    def of(measure: str, found: Measure, on: str) -> Row:
        return row(measure, (found.value, found.low, found.high), on)

    drawn = "drawn by blocks of 4 x 4 tiles"
    on = f"4 fields of 31 x 26 tiles, seeds 0 to 3, 20 steps; {drawn}"
    rows = [
        of("KID of features to those it was trained on", ours["kid"], on),
        of("the same of real features", rest["kid"], f"tiles in and at the held-out band; {drawn}"),
    ]
    known = f"tiles it was trained on; {drawn}"
    for lag in LAGS:
        rows.append(of(f"correlation of features {lag} tiles apart", ours[f"correlation_{lag}"], on))
        rows.append(of(f"real features {lag} tiles apart", ours[f"real_correlation_{lag}"], known))
    return rows


def mitosis(folder: Path, precision: str) -> list[Row]:
    from mitosis_sequences import measure
    from stain_measures import interval

    from ldm.sampling.sweeps import parse_sweep
    from ldm.scorers.ensemble import load_scorer

    found = measure(
        ldm.load_model(folder), load_scorer(MODELS / "demo-mitosis-scorers"), parse_sweep("score=0:1:5"), 6.0, 64, 12,
        precision=precision,
    )  # fmt: skip
    on = "64 sequences of 5 cells, guidance 6, 12 steps, scored by demo-mitosis-scorers"
    return [
        row(
            "Spearman correlation of the score asked for and the scorers' mean",
            (found.spearman, found.low, found.high),
            on,
        ),
        row("the same, scores dealt out anew within sequences (95% are below)", [found.dealt], on),
        row("scorers' mean where score 0 is asked for", interval(found.scores[:, 0]), on),
        row("scorers' mean where score 1 is asked for", interval(found.scores[:, -1]), on),
    ]


def scorers(folder: Path, precision: str) -> list[Row]:
    from ldm.data.collection import read_pictures
    from ldm.scorers.calibration import measures, with_intervals
    from ldm.scorers.ensemble import load_scorer
    from ldm.scorers.select import score_pictures

    scorer, pictures = load_scorer(folder), read_pictures(DATA / "samples/cells-held-out")
    each = score_pictures(scorer, pictures, progress=False)
    mean, targets = each.mean(1), np.array(pictures.column("score"), float)
    groups = np.array(pictures.column("case"))
    found = with_intervals(lambda rows: measures("graded", mean[rows], targets[rows]), groups)
    single = [measures("graded", each[:, k], targets)["spearman"] for k in range(scorer.count)]
    on = f"{len(targets)} crops in {len(set(groups))} groups that were held out, drawn by groups"
    names = {
        "spearman": "Spearman correlation with the experts' votes",
        "auroc": "AUROC of the experts' majority",
        "mae": "mean absolute error of the fraction of votes",
        "ece": "calibration error",
    }
    return [row(name, found[key], on) for key, name in names.items()] + [
        row("Spearman correlation of the weakest network alone", [min(single)], on),
        row("Spearman correlation of the strongest network alone", [max(single)], on),
    ]


def stains(folder: Path, precision: str) -> list[Row]:
    from stain_measures import interval, together
    from translation_stains import measure

    cohort, sources = OUT / "stains", OUT / "stains-sources"
    sources.mkdir(parents=True, exist_ok=True)
    stain = {
        "he.tif": (DATA / "pretrain/OS-1-detail.ome.tif", "--stride", 4, "--holdout", "0,771,1101,330"),
        "ki67.tif": (DATA / "samples/stains/OS-2-ndpi.ome.tif", "--stride", 8, "--holdout", "0,1541,2202,661"),
        "fhl2.png": (DATA / "samples/stains/ihc.png", "--stride", 4, "--holdout", "0,358,512,154", "--slide-mpp", 0.5),
    }
    for name, (path, *settings) in stain.items():  # a stain per name
        shutil.copy(path, sources / name)
        tile(cohort, "--slides", sources / name, "--mpp", 1, "--tile-size", 32, "--keep-background", 0.02, *settings)
    found = measure(ldm.load_model(folder), str(cohort), precision=precision)
    on, told = "24 held-out tiles of each stain under both others, 20 steps, guidance 2", {"he": "H&E"}
    names = {name: told.get(name, name.capitalize() if name == "ki67" else name.upper()) for name in found.hits}
    among = [pair for pair in found.pairs if {pair.source, pair.target} == {"he", "ki67"}]
    rows = [
        share("taken for the target by a classifier of real tiles", together(found.pairs, "called"), on),
        share("the same classifier is right on real tiles", np.concatenate(list(found.hits.values())),
              f"held-out tiles of {', '.join(names.values())}"),
        row("SSIM of haematoxylin with the source", interval(together(found.pairs, "kept")), on),
        row("SSIM of haematoxylin with the source, of real tiles of the target",
            interval(together(found.pairs, "other")), on),
        row("SSIM of haematoxylin with the source, between H&E and Ki67", interval(together(among, "kept")),
            f"{sum(len(pair.kept) for pair in among)} of them"),
    ]  # fmt: skip
    return rows


def slices(folder: Path, precision: str) -> list[Row]:
    from stain_measures import interval
    from translation_slices import measure

    from data_prep import slice_volumes

    cohort = OUT / "slices"
    files = {modality: f"TCGA-FG-6692_{modality}.nii.gz" for modality in ("t1", "t2", "fla")}
    run_quietly(
        slice_volumes.main, "--volumes", *(DATA / "samples/slices" / name for name in files.values()), "--modality",
        *(f"{modality}=*_{modality}.nii.gz" for modality in files), "--size", 64, "--percentiles", "0,98",
        "--out", cohort,  # the window that it was trained in
    )  # fmt: skip
    model, rows = ldm.load_model(folder), []
    for source, name in (("t2", "T2"), ("fla", "FLAIR")):
        found = measure(model, str(cohort), source, low=0, every=2, steps=12, samples=4, precision=precision)
        on = f"{len(found.real)} held-out slices of one head, 12 steps, mean of 4 images"
        for way, words in ((found.last, ""), ("matched", ", of the source with the real T1's histogram")):
            ssim, mae = found.rows[way].T
            rows += [
                row(f"{name} to T1: SSIM inside the head{words}", interval(ssim), on),
                row(f"{name} to T1: mean error, of 255 grey levels{words}", interval(mae), on, 1),
            ]
    return rows


def slices_pairs(folder: Path, precision: str) -> list[Row]:
    from stain_measures import interval
    from translation_heads import rows_of, slices_of, ways

    from data_prep import slice_volumes

    cohort, sources = OUT / "heads", {"t2": "T2", "flair": "FLAIR", "t1post": "T1 with contrast"}
    run_quietly(
        slice_volumes.main, "--volumes", DATA / "samples/heads", "--modality",
        *(f"{modality}={modality}.nii.gz" for modality in ("t1", *sources)), "--size", 64, "--percentiles", "0,98",
        "--out", cohort,
    )  # fmt: skip
    model, rows = ldm.load_model(folder), []
    real = slices_of(str(cohort), "patient19", "t1", every=2)
    on = f"{len(real)} slices of one head that trained nothing, {STEPS_OF_PAIRS} step"
    words = {"translation": "", "matched": ", of the source with the real T1's histogram", "source": ", of the source"}
    for source, name in sources.items():
        seen = slices_of(str(cohort), "patient19", source, every=2)
        made = ways(model, seen, real, STEPS_OF_PAIRS, samples=1, precision=precision)
        for way, told in words.items():
            ssim, _, error = rows_of(made[way], real).T
            rows += [
                row(f"{name} to T1: SSIM inside the head{told}", interval(ssim), on),
                row(f"{name} to T1: mean error, of 255 grey levels{told}", interval(error), on, 1),
            ]
    return rows


def omics(folder: Path, precision: str) -> list[Row]:
    from stain_measures import interval, together
    from translation_classes import UNCHANGED, measure

    from data_prep import join_omics

    cohort, samples = OUT / "omics", DATA / "samples/cancers"
    settings = ("--mpp", 1, "--tile-size", 64, "--keep-background", 0)
    for slide in sorted(samples.glob("TCGA-AD-6964*.jpg")):
        tile(cohort, "--slides", slide, "--slide-mpp", 0.5, "--stride", 8, "--holdout", "0,384,512,128", *settings)
    # the whole region was held out; its left half teaches the classifier
    region = samples / "TCGA-CR-7395_1600,2400.png"
    tile(cohort, "--slides", region, "--slide-mpp", 1, "--stride", 32, "--holdout", "512,0,512,320", *settings)
    run_quietly(
        join_omics.main, "--cohort", cohort, "--mutation", samples / "mutation-matrix-all-samples.tsv", "--expression",
        samples / "expression-matrix-all-samples.tsv", "--genes", samples / "expression-genes.tsv", "--scaler", folder,
        "--labels", samples / "samples.tsv", "--columns", "acronym",
    )  # fmt: skip
    found = measure(ldm.load_model(folder), str(cohort), precision=precision)
    on = "24 held-out tiles of each cancer under the other, 20 steps, guidance 2"
    rows = [
        share(
            "the classifier of real tiles is right on real tiles",
            np.concatenate(list(found.hits.values())),
            f"held-out tiles of {', '.join(found.hits)}",
        ),
    ]
    for way, pairs in found.pairs.items():
        told = "decoded under their own class and omics" if way == UNCHANGED else f"translated by {way}"
        words = "their own cancer" if way == UNCHANGED else "the other cancer"
        where = "24 held-out tiles of each cancer, 20 steps, guidance 2" if way == UNCHANGED else on
        rows += [
            share(f"{told}: taken for {words}", together(pairs, "called"), where),
            row(f"{told}: SSIM of haematoxylin with the source", interval(together(pairs, "kept")), where),
        ]
    changed = [pair for way, pairs in found.pairs.items() if way != UNCHANGED for pair in pairs]
    rows.append(
        row(
            "SSIM of haematoxylin with the source, of real tiles of the other cancer",
            interval(together(changed, "other")),
            "the same",
        )
    )
    return rows


def captions() -> Path:
    """A cohort of captioned images of what the repository has: tissue as in the training, slices of no tumour label."""
    from PIL import Image

    from data_prep import import_captions
    from demo.build import demo_captions
    from ldm.data.volumes import Volume, cut_slice, to_tile, windowed

    source, cohort, samples = OUT / "captioned", OUT / "captions", DATA / "samples"
    if (cohort / "index.parquet").is_file():
        return cohort
    tissue = {"H&E: skin": [SLIDE], "H&E: colon cancer": sorted((samples / "cancers").glob("TCGA-AD-6964*.jpg"))}
    tissue |= {"IHC: Ki67": [samples / "stains/OS-2-ndpi.ome.tif"], "IHC: FHL2, colon": [samples / "stains/ihc.png"]}
    named = [f"{name}={path}" for name, paths in tissue.items() for path in paths]
    run_quietly(
        demo_captions.main, *(word for each in named for word in ("--tissue", each)), "--mpp", 0.5, "--out", source
    )
    with (source / "captions.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        for modality, name in (("t1", "T1"), ("t2", "T2"), ("fla", "FLAIR")):
            volume = Volume(samples / f"slices/TCGA-FG-6692_{modality}.nii.gz")
            values = volume.values()
            low, high = np.percentile(values, (0.5, 99.5))
            for i in range(values.shape[2]):
                image = to_tile(windowed(cut_slice(values, 2, i), low, high), 64, volume.spacing[:2])
                path = f"images/{modality}-{i:03}.png"
                Image.fromarray(image).save(source / path)
                writer.writerow((path, name, "MRI", f"slices-{i // 5}"))
    run_quietly(
        import_captions.main, "--table", source / "captions.csv", "--patient", "patient", "--size", 64,
        "--validation", 0.1, "--out", cohort,
    )  # fmt: skip
    return cohort


def text(folder: Path, precision: str) -> list[Row]:
    from text_prompts import measure

    found = measure(ldm.load_model(folder), str(captions()), precision=precision)
    count = len(next(iter(found.kind.values())))
    on = f"{count} images of each of {', '.join(found.kind)}; guidance 3, 20 steps; chance {found.chance:.3f}"
    rows = [
        share("classifier of real images is right on real images: kind", found.known_kind, "held-out images"),
        share("taken for the kind that the prompt says", np.concatenate(list(found.kind.values())), on),
    ]
    rows += [share(f"the same, {kind}", hits, f"{count} images") for kind, hits in found.kind.items()]
    if found.bright:
        rows.append(
            share(
                "slices asked for that are none: brighter at the edge than any real slice, as radiographs are",
                np.concatenate(list(found.bright.values())),
                f"{count} images of each of {', '.join(found.bright)}",
            )
        )
    rows += [
        share("classifier of real tiles is right on real tiles: many or few nuclei", found.known_nuclei,
              "held-out tiles; chance 0.500"),
        share("many or few nuclei as the prompt says", np.concatenate(list(found.nuclei.values())),
              f"{count} tiles of each tissue; chance 0.500"),
    ]  # fmt: skip
    if found.copies is not None:
        near = {measured.name: measured for measured in found.copies.measures}
        on, held_out = f"{count} images of {found.compared}, in pixels", len(found.copies.held_out.distance)
        for name, words in (
            ("nearer", f"nearer to a training image than a held-out one is ({held_out} of those); 0.5 is usual"),
            ("close_share", "share nearer to a training image than 95% of held-out ones"),
        ):
            measured = near[name]
            rows.append(row(words, (measured.value, measured.low, measured.high), on))
        rows.append(Row("pixels of a training image", f"{near['identical'].value:.0f}", "", on))
    return rows
