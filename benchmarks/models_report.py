"""The figures of the models in data/models, as their cards state them.

    make models-report            # or python benchmarks/models_report.py; SAVE=1, or --save, writes the cards
    python benchmarks/models_report.py --only demo-stains demo-slices

Everything is measured on what the repository holds: data/demo, data/pretrain, data/samples, data/models. A table for
each model is printed and written to out/models_report.json. What a stopped run has measured is kept there and used
again as long as the model and the benchmarks are the same. With --save the figures go to data/models/figures.json and
into the tables of the cards, data/models/<model>/README.md. Else the last lines say which figures differ from the
cards': another processor rounds otherwise, bfloat16 is used where it is native. One core computes, so that the number
of cores changes nothing: 6 minutes with native bfloat16.

The measures are those of the other benchmarks; this one chooses data and settings.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import ldm
from ldm.errors import UserError, run_command
from ldm.files import CARD, sha256, writable_folder, write_text

ROOT = Path(__file__).resolve().parent.parent
DATA, MODELS = Path("data"), Path("data/models")
OUT = Path("out/models_report")
FIGURES = MODELS / "figures.json"
SLIDE, BAND = DATA / "demo/CMU-1-Small-Region.svs", "0,1856,2220,512"
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
    from ldm.metrics.scorer_figures import proportion

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


# --- models ----------------------------------------------------------------------------------------------------------


def encoder(folder: Path, precision: str) -> list[Row]:
    from data_prep.pretrain_encoder import build, held_out_tiles, tile_figures
    from ldm.config import load_config
    from ldm.metrics.encoders import load_encoder
    from ldm.metrics.scorer_figures import with_intervals

    config = load_config([Path("configs/demo/encoder.yaml")])
    tiles = held_out_tiles(load_encoder(str(folder)), config, build(config)[1])
    found = with_intervals(
        lambda rows: tile_figures({name: values[rows] for name, values in tiles.items()}), tiles["column"].astype(int)
    )
    tissue = int((tiles["tissue"] > 0.25).sum())
    where = "tiles of the held-out band, drawn by columns of the slide"
    return [
        row("a second view of a tile is nearest to the tile itself", found["retrieval_top1"],
            f"{tissue} {where}; tiles with tissue, among all {len(tiles['hit'])}"),
        row("R2 of the tissue fraction, by ridge regression", found["tissue_r2"], f"{len(tiles['hit'])} {where}"),
    ]  # fmt: skip


def ssl(folder: Path, precision: str) -> list[Row]:
    from conditioning import measure_conditioning

    from data_prep import extract_features
    from ldm.data.tile_store import open_cohort
    from ldm.metrics.seams import measure_seams

    cohort, feature = OUT / "skin", "demo-encoder"
    tile(cohort, "--slides", SLIDE, "--stride", 64, "--min-tissue", 0.05, "--keep-background", 0.08, "--holdout", BAND)
    run_quietly(extract_features.main, "--store", cohort, "--encoder", MODELS / feature)
    asked = argparse.Namespace(
        model=folder, store=cohort, feature=feature, encoder=str(MODELS / feature), split="val", count=64, steps=20,
        guidance_scale=2.0, seed=0, batch_size=16, device="cpu", precision=precision,
    )  # fmt: skip
    c = measure_conditioning(asked)[0]
    grid, _ = open_cohort(cohort)[0].grid(REGION, feature)
    image = ldm.large_image(
        ldm.load_model(folder), grid, REGION[2:], steps=10, seed=0, precision=precision, progress=False
    )  # fmt: skip
    seams = measure_seams(ldm.to_uint8(image)[0], 256, folder)["like"]
    on = f"{c['tiles']} tiles of the held-out band, drawn by {c['blocks']} columns of the slide"
    return [
        row("margin: cosine to its own condition less that to others'", (c["margin"], c["low"], c["high"]), on),
        row("cosine to its own condition", [c["own"]], on),
        row("cosine to its own condition of the first stage's reconstruction", [c["reconstruction"]], on),
        row("first stage: PSNR of the reconstruction, dB", c["psnr"], on, 1),
        row("gradient across borders of the 256 px lattice over that beside them", [seams["ratio"]],
            f"one image of 1024 px; 95% of other lattices in it {seams['low']:.3f} to {seams['high']:.3f}"),
    ]  # fmt: skip


def mitosis(folder: Path, precision: str) -> list[Row]:
    from mitosis_sequences import measure
    from stain_measures import interval

    from ldm.metrics.scorers import load_scorer
    from ldm.sequences import parse_sweep

    found = measure(
        ldm.load_model(folder), load_scorer(MODELS / "demo-mitosis-scorers"), parse_sweep("score=0:1:5"), 6.0, 64, 12,
        precision=precision,
    )  # fmt: skip
    on = "64 sequences of 5 cells, guidance 6, 12 steps, scored by demo-mitosis-scorers"
    return [
        row("Spearman correlation of the score asked for and the scorers' mean",
            (found.spearman, found.low, found.high), on),
        row("the same, scores dealt out anew within sequences (95% are below)", [found.dealt], on),
        row("scorers' mean where score 0 is asked for", interval(found.scores[:, 0]), on),
        row("scorers' mean where score 1 is asked for", interval(found.scores[:, -1]), on),
    ]  # fmt: skip


def scorers(folder: Path, precision: str) -> list[Row]:
    from ldm.metrics.pictures import read_pictures
    from ldm.metrics.scorer_figures import figures, with_intervals
    from ldm.metrics.scorers import load_scorer
    from ldm.metrics.scoring import score_pictures

    scorer, pictures = load_scorer(folder), read_pictures(DATA / "samples/cells-held-out")
    each = score_pictures(scorer, pictures, progress=False)
    mean, targets = each.mean(1), np.array(pictures.column("score"), float)
    groups = np.array(pictures.column("case"))
    found = with_intervals(lambda rows: figures("graded", mean[rows], targets[rows]), groups)
    single = [figures("graded", each[:, k], targets)["spearman"] for k in range(scorer.count)]
    on = f"{len(targets)} crops in {len(set(groups))} groups that were held out, drawn by groups"
    names = {
        "spearman": "Spearman correlation with the experts' votes", "auroc": "AUROC of the experts' majority",
        "mae": "mean absolute error of the fraction of votes", "ece": "calibration error",
    }  # fmt: skip
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
    from translation_slices import interval, measure

    from data_prep import slice_volumes

    cohort = OUT / "slices"
    files = {modality: f"TCGA-FG-6692_{modality}.nii.gz" for modality in ("t1", "t2", "fla")}
    run_quietly(
        slice_volumes.main, "--volumes", *(DATA / "samples/slices" / name for name in files.values()), "--modality",
        *(f"{modality}=*_{modality}.nii.gz" for modality in files), "--size", 64, "--out", cohort,
    )  # fmt: skip
    model, rows = ldm.load_model(folder), []
    for source, name in (("t2", "T2"), ("fla", "FLAIR")):
        found = measure(model, str(cohort), source, low=0, every=2, steps=12, samples=4, precision=precision)
        on = f"{len(found.real)} held-out slices of one head, 12 steps, mean of 4 images"
        for way, words in ((found.last, ""), ("matched", ", of the source with the real T1's histogram")):
            ssim, mae = found.rows[way].T
            rows += [
                row(f"{name} to T1: SSIM inside the head{words}", (ssim.mean(), *interval(ssim)), on),
                row(f"{name} to T1: mean error, of 255 grey levels{words}", (mae.mean(), *interval(mae)), on, 1),
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
        share("the classifier of real tiles is right on real tiles", np.concatenate(list(found.hits.values())),
              f"held-out tiles of {', '.join(found.hits)}"),
    ]  # fmt: skip
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
        row("SSIM of haematoxylin with the source, of real tiles of the other cancer",
            interval(together(changed, "other")), "the same")
    )  # fmt: skip
    return rows


def captions() -> Path:
    """A cohort of captioned images of what the repository has: tissue as in the training, slices of no tumour label."""
    from PIL import Image

    from data_prep import demo_captions, import_captions
    from ldm.data.volumes import Volume, cut_slice, to_tile, windowed

    source, cohort, samples = OUT / "captioned", OUT / "captions", DATA / "samples"
    if (cohort / "index.parquet").is_file():
        return cohort
    tissue = {"H&E: skin": [SLIDE], "H&E: colon cancer": sorted((samples / "cancers").glob("TCGA-AD-6964*.jpg"))}
    tissue |= {"IHC: Ki67": [samples / "stains/OS-2-ndpi.ome.tif"], "IHC: FHL2, colon": [samples / "stains/ihc.png"]}
    named = [f"{name}={path}" for name, paths in tissue.items() for path in paths]
    run_quietly(demo_captions.main, *(word for each in named for word in ("--tissue", each)), "--mpp", 0.5,
                "--out", source)  # fmt: skip
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
        import_captions.main, "--table", source / "captions.csv", "--patient-column", "patient", "--size", 64,
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
            share("slices asked for that are none: brighter at the edge than any real slice, as radiographs are",
                  np.concatenate(list(found.bright.values())), f"{count} images of each of {', '.join(found.bright)}")
        )  # fmt: skip
    rows += [
        share("classifier of real tiles is right on real tiles: many or few nuclei", found.known_nuclei,
              "held-out tiles; chance 0.500"),
        share("many or few nuclei as the prompt says", np.concatenate(list(found.nuclei.values())),
              f"{count} tiles of each tissue; chance 0.500"),
    ]  # fmt: skip
    if found.copies is not None:
        near = {figure.name: figure for figure in found.copies.figures}
        on, held_out = f"{count} images of {found.compared}, in pixels", len(found.copies.held_out.distance)
        for name, words in (
            ("nearer", f"nearer to a training image than a held-out one is ({held_out} of those); 0.5 is usual"),
            ("close_share", "share nearer to a training image than 95% of held-out ones"),
        ):
            figure = near[name]
            rows.append(row(words, (figure.value, figure.low, figure.high), on))
        rows.append(Row("pixels of a training image", f"{near['identical'].value:.0f}", "", on))
    return rows


@dataclass(frozen=True)
class Job:
    """seconds: of one core with native bfloat16, about."""

    measure: Callable[[Path, str], list[Row]]
    seconds: int


JOBS = {
    "demo-encoder": Job(encoder, 15),
    "demo-ssl": Job(ssl, 70),
    "demo-mitosis": Job(mitosis, 35),
    "demo-mitosis-scorers": Job(scorers, 5),
    "demo-stains": Job(stains, 35),
    "demo-slices": Job(slices, 70),
    "demo-omics": Job(omics, 95),
    "demo-text": Job(text, 150),
}


# --- report and cards ------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as a table of Markdown, as cards have it."""
    head = ["| measure | value | 95% interval | on |", "|---|---|---|---|"]
    return head + [f"| {each.measure} | {each.value} | {each.interval} | {each.on} |" for each in rows]


def rows_of(card: str) -> list[Row]:
    """The rows of the table under `## Figures` of a card."""
    section = re.split(r"^## ", card, flags=re.MULTILINE)
    (figures,) = [part for part in section if part.startswith("Figures\n")]
    lines = [line for line in figures.splitlines() if line.startswith("|")][2:]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]


def with_table(card: str, rows: Sequence[Row]) -> str:
    """The card with these rows in the table under `## Figures`; its other words stay."""
    before, heading, rest = card.partition("\n## Figures\n")
    if not heading:
        raise UserError("a card has the heading `## Figures`")
    section, *others = re.split(r"(?=^## )", rest, flags=re.MULTILINE)
    words = "\n".join(line for line in section.splitlines() if not line.startswith("|")).strip()
    new = "\n".join(["", *table(rows), *(["", words] if words else []), "", ""])
    return before + heading + new + "".join(others)


def key_of(folder: Path) -> str:
    """What decides a model's figures: its files, the scorers', and the benchmarks."""
    files = [*folder.iterdir(), *(MODELS / "demo-mitosis-scorers").iterdir(), *(ROOT / "benchmarks").glob("*.py")]
    kept = sorted(path for path in files if path.is_file() and path.name != CARD)
    return hashlib.sha256("".join(map(sha256, kept)).encode()).hexdigest()


def set_up() -> str:
    """One thread, whose roundings do not depend on the number of cores; returns the precision to compute in."""
    import torch

    torch.set_num_threads(1)
    sys.path.append(str(ROOT))
    from demo.steps import native_bf16

    return "bf16" if native_bf16() else "fp32"


def report(options: argparse.Namespace) -> None:
    os.chdir(ROOT)
    if unknown := [name for name in options.only or () if name not in JOBS]:
        raise UserError(f"no model is called {unknown[0]}; there are {', '.join(JOBS)}")
    asked = [name for name in options.only or JOBS if any((MODELS / name).glob("*.safetensors"))]
    if lacking := [name for name in options.only or () if name not in asked]:
        raise UserError(f"{MODELS / lacking[0]} has no weights (*.safetensors); there is nothing to measure")
    writable_folder(OUT)
    result = OUT.with_suffix(".json")
    done: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
    saved = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    total, differ, precision = sum(JOBS[name].seconds for name in asked), [], ""
    bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed}, left {remaining}"
    with tqdm(total=total, bar_format=bar_format) as bar:
        for name in asked:
            bar.set_description(name)
            key = key_of(MODELS / name)
            if options.fresh or options.save or done.get(name, {}).get("key") != key:
                precision = precision or set_up()
                with quietly():
                    rows = JOBS[name].measure(MODELS / name, precision)
                done[name] = {"key": key, "precision": precision, "rows": [asdict(each) for each in rows]}
                write_text(result, json.dumps(done, indent=1))
            rows = done[name]["rows"]
            before = {each["measure"]: each["value"] for each in saved.get(name, [])}
            differ += [f"{name}: {each['measure']} {each['value']}, card {before.get(each['measure'], 'none')}"
                       for each in rows if before.get(each["measure"]) != each["value"]]  # fmt: skip
            bar.update(JOBS[name].seconds)
            bar.write("\n".join(["", name, *table([Row(**each) for each in rows])]), file=sys.stdout)
    if options.save:
        save({name: done[name]["rows"] for name in asked}, saved)
    elif differ:
        raise UserError("\n  ".join([f"{len(differ)} figures are not those of the cards:", *differ]))
    else:
        print(f"\nall figures are those of the cards in {MODELS}")


def save(found: dict[str, list[dict[str, str]]], saved: dict[str, list[dict[str, str]]]) -> None:
    """Write figures.json and the tables of the cards."""
    everything = {name: (saved | found)[name] for name in JOBS if name in saved | found}
    write_text(FIGURES, json.dumps(everything, indent=1) + "\n")
    for name, rows in found.items():
        card = MODELS / name / CARD
        if card.is_file():
            write_text(card, with_table(card.read_text(), [Row(**each) for each in rows]))
    print(f"\nwrote {FIGURES} and the tables of {len(found)} cards")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models alone")
    parser.add_argument("--save", action="store_true", help="measure anew; write figures.json and the cards' tables")
    parser.add_argument("--fresh", action="store_true", help="measure what was measured already, too")
    return run_command(lambda: report(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
