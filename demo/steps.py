"""What the demo does, step by step: the commands, what each leaves behind, and how an interrupted one goes on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

OUT = Path("demo_output")  # as the configs in configs/demo name it
SLIDE = Path("data/demo/CMU-1-Small-Region.svs")
HELD_OUT = (0, 1856, 2220, 512)  # x, y, width, height in level-0 px: never trained on, by encoder, first stage or model
REGION = (896, 1472, 1024, 1024)  # what is generated again; it crosses the held-out band
ENCODER = "demo-encoder"
FIRST_STAGE = "first-stage"
SEED = 0


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    outputs: what exists when it is done; removed when the step begins anew.
    inputs: files and folders of the repository that decide its result, besides what earlier steps made: when one of
        them changes, the step begins anew.
    run_name: of a training, the name of its run folder in `logs`, for it to be resumed; the commands of later steps
        name that folder by the step in braces.
    """

    name: str
    title: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...] = ()
    inputs: tuple[Path, ...] = ()
    run_name: str = ""


def region_text(region: tuple[int, ...]) -> str:
    return ",".join(map(str, region))


def demo_steps(out: Path, precision: str = "fp32") -> list[Step]:
    """The steps that fill `out`. Limits of time in the configs hold the whole under ten minutes on two slow cores.

    precision: bf16 or fp32, of what encodes and generates; trainings choose their own.
    """
    cohort = out / "cohort"
    store = cohort / "slides" / f"{SLIDE.stem}.zarr"
    logs = out / "logs"
    image = out / "synthetic_1024"

    encoder, model = Path("data/models") / ENCODER, Path("data/models/demo-ssl")

    def yaml(config: str) -> Path:
        return Path(f"configs/demo/{config}.yaml")

    def train(*configs: str) -> tuple[str, ...]:
        files = (str(yaml(config)) for config in configs)
        options = ("--logdir", str(logs), "--no-test", "--seed", str(SEED))
        return ("python", "main.py", "-t", "--base", *files, *options)

    return [
        Step(
            "tiles", "Tile the slide at its own resolution, over tissue and a little glass; hold out a band",
            ("python", "-m", "data_prep.tile_slides", "--slides", str(SLIDE), "--out", str(cohort), "--stride", "64",
             "--min-tissue", "0.05", "--keep-background", "0.08", "--holdout", region_text(HELD_OUT),
             "--licence", "CC0-1.0"),
            (cohort,), (SLIDE,),
        ),
        Step(
            "features", "Extract self-supervised features of every tile",
            ("python", "-m", "data_prep.extract_features", "--store", str(cohort), "--encoder", str(encoder)),
            (store / "features" / ENCODER,), (encoder,),
        ),
        Step(
            "first_stage", "Fine-tune the first stage: the decoder of a KL autoencoder",
            train("first_stage"), (), (yaml("first_stage"), model, encoder),
            run_name="first_stage",
        ),
        Step(
            "export_first_stage", "Make a model folder of it",
            ("histoldm", "export", "{first_stage}", "--out", str(out / FIRST_STAGE)),
            (out / FIRST_STAGE,),
        ),
        Step(
            "latents", "Encode every tile once: the diffusion model trains on latents",
            ("python", "-m", "data_prep.encode_latents", "--store", str(cohort),
             "--first-stage", str(out / FIRST_STAGE), "--precision", precision),
            (store / "latents" / FIRST_STAGE,),
        ),
        Step(
            "ssl", "Train the latent diffusion model on latents and features, from the shipped weights",
            train("ssl", "ssl_finetune"), (), (yaml("ssl"), yaml("ssl_finetune"), model),
            run_name="ssl",
        ),
        Step(
            "export", "Make a model folder of it",
            ("histoldm", "export", "{ssl}", "--out", str(out / "model")),
            (out / "model",),
        ),
        Step(
            "large_image", "Generate 1024 x 1024 px from the slide's own grid of features",
            ("histoldm", "large-image", "--model", str(out / "model"), "--features", str(store), "--feature", ENCODER,
             "--region", region_text(REGION), "--out", f"{image}.png", "--out", f"{image}.tif", "--seed", str(SEED),
             "--precision", precision),
            (image.with_suffix(".png"), image.with_suffix(".tif")),
        ),
        Step(
            "figures", "Measure: do tiles follow their condition, do borders show?",
            ("python", "benchmarks/conditioning.py", "--model", str(out / "model"), "--store", str(cohort),
             "--feature", ENCODER, "--encoder", str(encoder), "--image", f"{image}.png", "--slide",
             str(SLIDE), "--region", region_text(REGION), "--count", "64", "--steps", "10", "--precision", precision,
             "--out", str(out / "conditioning")),
            (out / "conditioning",),
        ),
        Step(
            "report", "Put it all on one page",
            ("python", "-m", "demo.report", str(out)),
            (out / "report.html", out / "comparison.jpg"),
        ),
    ]  # fmt: skip


def executable(command: tuple[str, ...]) -> list[str]:
    """`python` and `histoldm` of the environment that runs the demo."""
    first = sys.executable if command[0] == "python" else str(Path(sys.executable).parent / command[0])
    return [first, *command[1:]]
