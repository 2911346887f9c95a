"""Put what the demo made on one self-contained page, report.html.

Its figures, pictures and settings come from the folder that `python -m demo` fills; an unfinished one is refused.

Example:

    python -m demo.report demo_output
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
import yaml
from PIL import Image

from demo import figures
from demo.record import Record, runs_of
from demo.steps import ENCODER, FIRST_STAGE, HELD_OUT, REGION, SEED, SLIDE, Step, demo_steps
from ldm.cli.script import script
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.files import whole, write_text
from ldm.images.marks import mark_text
from ldm.images.pictures import Picture
from ldm.images.sheets import grid
from ldm.images.slides import open_slide

PACKAGES = ("histoldm", "torch", "pytorch-lightning", "timm", "zarr", "openslide-python", "numpy", "tifffile")
WIDTH = 1600  # px of comparison.jpg
DETAIL = 256
DETAILS = ((0, 0), (256, 512), (512, 128), (640, 640))  # row, col of the crops shown at full resolution


def losses_of(run: Path) -> list[tuple[int, str, float]]:
    """Rows (batch, name, value) of a run's losses.csv."""
    from ldm.callbacks import read_losses

    path = run / "losses.csv"
    return read_losses(path) if path.is_file() else []


def read(path: Path) -> Image.Image:
    """An image of the demo's own folder."""
    return Image.fromarray(Picture.of_file(path).pixels())


def embed(picture: Image.Image, alt: str, quality: int = 90) -> str:
    """An <img> that carries its own JPEG."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=quality, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">'


def figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows of cells, escaped; the first column is a header."""
    top = f"<tr>{''.join(f'<th scope=col>{html.escape(h)}</th>' for h in head)}</tr>" if head else ""
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in rest)
        body.append(f"<tr><th scope=row>{html.escape(str(first))}</th>{cells}</tr>")
    return f"<table>{top}{''.join(body)}</table>"


def comparison(out: Path) -> Image.Image:
    """Real region | generated image, with scale bars and the held-out band."""
    slide = open_slide(SLIDE)
    generated = Picture.of_file(out / "synthetic_1024.png").pixels()
    band = figures.overlap(REGION, HELD_OUT)
    pictures = [
        figures.annotate(slide.read(*REGION), "real", slide.mpp, band),
        figures.annotate(generated, "SYNTHETIC", slide.mpp, band),
    ]
    return Image.fromarray(grid([pictures], least=0, gap=16, margin=0))


def main_section(out: Path) -> str:
    real = open_slide(SLIDE).read(*REGION)
    generated = Picture.of_file(out / "synthetic_1024.png").pixels()
    x, y, width, height = REGION
    return (
        "<h2>The image</h2>"
        + figure(
            embed(comparison(out), "real region beside the generated image"),
            f"Left: {SLIDE.name}, {width} × {height} px at ({x}, {y}). Right: generated from noise and the grid of "
            "that region's tile features; no pixel of the slide goes in. Inside the brackets lies the held-out band: "
            "neither encoder nor first stage nor diffusion model has seen any of it in training.",
        )
        + figure(
            embed(Image.fromarray(figures.details(real, generated, DETAILS, DETAIL)), "crops at full resolution"),
            f"Crops of {DETAIL} px at full resolution: real above, generated below, from the same places.",
        )
    )


def store_section(store: TileStore, index: pd.DataFrame) -> str:
    slide = open_slide(SLIDE)
    thumbnail = Image.fromarray(slide.thumbnail(2.0))
    scale = thumbnail.width / slide.dimensions[0]
    splits, tissue = index["split"].to_numpy(str), index["tissue"].to_numpy()
    centres = index[["x", "y"]].to_numpy() + store.tile_size * store.downsample / 2
    picture = figures.slide_map(
        thumbnail, centres, splits, scale, store.stride * store.downsample * 0.6, HELD_OUT, REGION
    )
    counts = {name: int((splits == name).sum()) for name in figures.SPLITS}
    features, latents = store.features(ENCODER), store.latents(FIRST_STAGE)
    rows = [
        ("slide", f"{store.slide}, {' × '.join(map(str, store.attrs['level0_size']))} px"),
        ("resolution", f"{store.mpp:g} µm per px, {store.attrs.get('magnification') or '?'}×"),
        ("tiles", f"{len(store)} of {store.tile_size} px every {store.stride} px"),
        ("split", ", ".join(f"{count} {name}" for name, count in counts.items())),
        ("features", f"{ENCODER} {features.shape}, {features.attrs.get('licence', '')}"),
        ("latents", f"{FIRST_STAGE} {latents.shape}"),
        ("licence of the slide", store.attrs.get("licence") or "not recorded"),
    ]
    legend = " ".join(
        f'<span class="key"><i style="background:{colour}"></i>{label}</span>'
        for colour, label in zip(
            figures.SPLITS.values(), ("training", "held out", "neither: touches the held-out band")
        )
    )
    return (
        "<h2>The tile store</h2><div class=columns>"
        + figure(
            embed(picture, "slide with its tiles"),
            f"{legend}<br>A spot at the centre of each tile. Orange frame: held-out band. Black frame: region above.",
        )
        + f"<div>{table(rows)}{figure(figures.tissue_histogram(tissue), 'Tissue fraction of the tiles.')}</div></div>"
    )


def training_section(title: str, run: Path, names: Sequence[tuple[str, str]], grids: Sequence[tuple[str, str]]) -> str:
    """Loss curves, and the last image grids of the validation tiles."""
    curves = figure(figures.loss_curves(losses_of(run), names), "Blue: training batches. Orange: held-out tiles.")
    pictures = "".join(
        figure(embed(read(path), caption), caption)
        for name, caption in grids
        if (path := figures.newest(run / "images" / "val", name))
    )
    return f"<h2>{title}</h2>{curves}<div class=columns>{pictures}</div>"


def seam_rows(name: str, seams: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table of figures for one image's seam ratios."""
    rows = []
    for key, what in (("all", "all of the inside"), ("like", "like for like: block edges within 32 px of a border")):
        r = seams[key]
        note = f"gradient across tile borders over that inside tiles, {what}; 95% of other lattices"
        rows.append((f"seams, {name}", f"{r['ratio']:.3f}", f"{note} {r['low']:.3f} to {r['high']:.3f}"))
    return rows


def figures_section(out: Path) -> str:
    measured = json.loads((out / "conditioning" / "measures.json").read_text())
    c, judged = measured["conditioning"], []
    if by_judge := c.get("judge"):
        value, low, high = by_judge
        told = f"95% interval {low:.3f} to {high:.3f}; features of a network that conditioned none of the images"
        judged = [("margin to the held-out tile itself, by the judge", f"{value:.3f}", told)]
    rows = [
        (
            "cosine similarity to its own condition",
            f"{c['own']:.3f}",
            f"{c['tiles']} held-out tiles, {c['steps']} steps",
        ),
        ("cosine similarity to shuffled conditions", f"{c['shuffled']:.3f}", "the other tiles' features"),
        (
            "margin between the two",
            f"{c['margin']:.3f}",
            f"95% interval {c['low']:.3f} to {c['high']:.3f}, bootstrap over {c['blocks']} blocks of slide columns",
        ),
        ("the same after the first stage alone", f"{c['reconstruction']:.3f}", "what sampling could reach at most"),
        *judged,
        *seam_rows("generated image", measured["seams"]),
        *seam_rows("real region", measured["seams_real"]),
    ]
    return (
        "<h2>Does it follow its condition? Do borders show?</h2>"
        + table(rows, ("figure", "value", "of"))
        + figure(
            embed(read(out / "conditioning" / "tiles.png"), "held-out tiles and samples"),
            "Above: held-out tiles. Below: SYNTHETIC tiles, each sampled from the features of the tile above it.",
        )
    )


def settings_section(steps: list[Step], record: dict[str, Any], out: Path) -> str:
    times = []
    for step in steps:
        entry = record.get(step.name, {})
        if entry.get("done"):  # the report itself is not, while it is written
            took = f"{entry['seconds']:.0f} s"
            times.append((step.title, took, f"{entry['peak_mib']:.0f} MiB", " ".join(entry["command"])))
    total = sum(entry["seconds"] for entry in record.values() if entry["done"])
    model = yaml.safe_load((out / "model" / "config.yaml").read_text())
    installed = [(name, package_version(name)) for name in PACKAGES]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}, {cores} cores"
    machine = [("Python", platform.python_version()), ("system", system)]
    dump = html.escape(yaml.safe_dump(model, sort_keys=False))
    return (
        "<h2>How it was made</h2>"
        + table([*times, ("total", f"{total:.0f} s", "", "")], ("step", "time", "peak memory", "command"))
        + "<div class=columns>"
        + table([*machine, *installed], ("software", "version"))
        + f"<div><details><summary>config.yaml of the model</summary><pre>{dump}</pre></details></div></div>"
        + "<p>Licences: slide CC0-1.0 (OpenSlide test data); encoder, first stage and model weights and HistoLDM MIT. "
        "Models that are conditioned on a published encoder's features inherit its licence; stores and models record "
        "it.</p>"
    )


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #202124; background: #fff; max-width: 1160px; margin: 0 auto;
  padding: 24px }
h1 { font-size: 28px; margin: 0 } h2 { font-size: 20px; margin: 40px 0 12px; border-bottom: 1px solid #dadce0 }
p.lead { margin: 4px 0 0; color: #5f6368 }
p.note { background: #fff4e5; border-left: 4px solid #d9822b; padding: 8px 12px }
figure { margin: 0 0 16px } img, svg { max-width: 100%; height: auto; display: block }
figcaption { font-size: 14px; color: #5f6368; margin-top: 6px }
table { border-collapse: collapse; font-size: 14px; margin-bottom: 16px }
th, td { text-align: left; vertical-align: top; padding: 4px 12px 4px 0; border-bottom: 1px solid #eceff1 }
th[scope=row] { font-weight: 500 } td { font-variant-numeric: tabular-nums; white-space: nowrap }
td:last-child { white-space: normal; overflow-wrap: anywhere }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 24px }
@media (max-width: 800px) { .columns { grid-template-columns: 1fr } }
.key { margin-right: 12px } .key i { display: inline-block; width: 10px; height: 10px; border-radius: 5px;
  margin-right: 4px }
pre { font-size: 12px; overflow: auto; max-height: 400px; background: #f8f9fa; padding: 8px }
"""


def build_report(out: Path, steps: list[Step], record: dict[str, Any], runs: dict[str, Path]) -> Path:
    """Write `out`/report.html, and its first picture as comparison.jpg, from what the steps left there.

    runs: run folders of `first_stage` and `ssl`.
    """
    store = TileStore.open(out / "cohort" / "slides" / f"{SLIDE.stem}.zarr")
    index = pd.read_parquet(out / "cohort" / "index.parquet")
    sections = [
        main_section(out),
        figures_section(out),
        store_section(store, index),
        training_section(
            "Training of the first stage", runs["first_stage"],
            [("train/rec_loss", "val/rec_loss"), ("train/latent_loss", "val/latent_loss")],
            [("inputs", "Held-out tiles."), ("reconstructions", "Their reconstructions.")],
        ),
        training_section(
            "Training of the latent diffusion model", runs["ssl"],
            [("train/loss", "val/loss")],
            [("samples", "SYNTHETIC samples from held-out features, without guidance."),
             ("samples_guided", "The same with guidance 2.")],
        ),
        settings_section(steps, record, out),
    ]  # fmt: skip
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>HistoLDM demo</title><style>{STYLE}</style><h1>HistoLDM: from a slide to a generated image</h1>"
        f"<p class=lead>{SLIDE.name} · {date.today():%d %B %Y} · seed {SEED}</p>"
        "<p class=note>Generated images on this page are SYNTHETIC, by a small model that was trained for minutes on "
        f"one slide. They show that the toolkit works, and are of no diagnostic use.</p>{''.join(sections)}</html>"
    )
    picture = comparison(out)
    picture.thumbnail((WIDTH, WIDTH))
    about = mark_text({"content": "left: real region; right: generated", "model": "demo", "seed": SEED})
    with whole(out / "comparison.jpg") as part:
        picture.save(part, format="JPEG", quality=85, comment=about)
    write_text(out / "report.html", page)
    return out / "report.html"


def run(out: Path) -> None:
    steps = demo_steps(out)
    whole = Record(out / "times.json")
    record, runs = whole.steps, runs_of(steps, whole, out / "logs")
    missing = [step.title for step in steps[:-1] if not record.get(step.name, {}).get("done")]
    if missing:
        raise UserError(f"{out} is not complete: {missing[0]} (`make demo` continues)")
    path = build_report(out, steps, record, runs)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


@script("demo.report", __doc__)
def main(out: Annotated[Path, typer.Argument(help="Folder that the demo fills.")]) -> None:
    run(out)


if __name__ == "__main__":
    main.run()
