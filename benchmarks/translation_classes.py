"""Tiles of one cancer as another's, by its class and by its genes, judged by a classifier of real tiles.

    python benchmarks/translation_classes.py --model MODEL --tiles COHORT [--count 24] [--guidance 2] [--out PNG]

The cohort has a label (`--column`) and the genes of each tile's sample (`data_prep.join_omics`). Tiles of the split
`val`, which the model was not trained on, are inverted under what their sample is, and decoded under what the other's
is:

    class and omics    both change
    class              the model is told the class alone, on both ways
    omics              the model is told mutations and expression alone, on both ways
    unchanged          decoded under their own class and omics: what the procedure itself changes

Printed for each: how many the classifier calls the target's (of `unchanged`: their own), and the SSIM of the
haematoxylin channel with the source's, beside that of real target tiles of another place; with the middle 95% over
draws of tiles. The classifier learns here from the real tiles of the split `train`; its accuracy on held-out real tiles
is printed first. One sample stands for each cancer: what tells them apart is also slide, stain and scanner.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from stain_measures import Pair, judged, known, right, shown, summary, tiles_of, train_classifier
from torch import Tensor, nn

from ldm import load_model
from ldm.data.datasets import TileDataset
from ldm.diffusion.denoiser import Cond
from ldm.images.sheets import grid
from ldm.images.write import save_png
from ldm.requests.tiles import evenly
from ldm.sampling.sampler import PRECISIONS, Inversion, Sampler
from ldm.sampling.translate import translate

OMICS = ("mutation", "expression")
WAYS = {"class and omics": ("class", *OMICS), "class": ("class",), "omics": OMICS}
UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Changed:
    """hits: class -> (N,), which held-out real tiles the classifier knows. pairs: way -> translations. page: a sheet.

    The target of an unchanged tile is its source.
    """

    hits: dict[str, np.ndarray]
    pairs: dict[str, list[Pair]]
    page: list[np.ndarray]


def sample_of(cohort: str, column: str, name: str) -> dict[str, Tensor]:
    """Mutations and expression (1,genes) of the first held-out tile of a class."""
    sources = {key: f"omics/{key}" for key in OMICS}
    tiles = TileDataset(cohort, ("image",), conditions=sources, where={column: name, "split": "val"})
    return {key: torch.as_tensor(tiles[0][key])[None] for key in OMICS}


def measure(
    model: nn.Module, cohort: str, column: str = "acronym", count: int = 24, steps: int = 20, strength: float = 1.0,
    guidance: float = 2.0, classifier_steps: int = 150, precision: str = "fp32",
) -> Changed:  # fmt: skip
    """Held-out tiles of every class of the model under every other, in all WAYS and unchanged."""
    names = model.cond_stage_model.describe()["class"].names
    trained = {name: tiles_of(cohort, column, name, "train", 500) for name in names}
    classifier = train_classifier(trained, classifier_steps)
    real = {name: tiles_of(cohort, column, name, "val") for name in names}
    sampler = Sampler(
        steps=steps, solver="euler", schedule="uniform", guidance_scale=guidance, precision=precision, progress=False
    )
    about = {name: sample_of(cohort, column, name) | {"class": name} for name in names}

    def condition(name: str, told: tuple[str, ...]) -> Cond:
        return model.condition(**{key: about[name][key] for key in told})

    pairs: dict[str, list[Pair]] = {way: [] for way in (*WAYS, UNCHANGED)}
    page = []
    for source in names:
        chosen = real[source][evenly(len(real[source]), count)]
        others = [name for name in names if name != source]
        page.append(shown(chosen))
        for way, told in WAYS.items():
            targets = [*others, source] if way == "class and omics" else others
            conds = [condition(name, told) for name in (source, *targets)]
            found = translate(model, chosen, conds[0], conds[1:], sampler, Inversion(start="invert", strength=strength))
            for name, image in zip(targets, found):
                image, other = image.clamp(-1, 1), real[name][evenly(len(real[name]), len(chosen))]
                own = UNCHANGED if name == source else way
                if name == source:
                    other = other.roll(1, 0)  # another place of the same slide
                pairs[own].append(judged(classifier, names, source, name, chosen, image, other, own))
                page.append(shown(image))
    return Changed(right(classifier, real), pairs, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="model folder or run, conditioned on class, mutation and expression")
    add("--tiles", required=True, help="cohort with the splits train and val, joined to omics")
    add("--column", default="acronym", help="of the cohort's table, that names the class (default %(default)s)")
    add("--count", type=int, default=24, help="tiles of each source (default %(default)s)")
    add("--steps", type=int, default=20)
    add("--strength", type=float, default=1.0, help="of the inversion")
    add("--guidance", type=float, default=2.0, help="scale on the way back")
    add("--classifier-steps", type=int, default=150)
    add("--precision", default="fp32", choices=PRECISIONS)
    add("--out", help="picture: sources, and under them what each way makes of them")
    options = parser.parse_args()
    found = measure(
        load_model(options.model), options.tiles, options.column, options.count, options.steps, options.strength,
        options.guidance, options.classifier_steps, options.precision,
    )  # fmt: skip
    print(f"classifier, held-out real tiles: {known(found.hits)}")
    for way, pairs in found.pairs.items():
        for pair in pairs:
            print(pair.line())
        print(f"{way}, {summary(pairs)}")
    if options.out:
        content = "each source, then by class and omics, unchanged, by class, by omics"
        save_png(options.out, grid(found.page, least=64), {"content": content, "model": options.model})


if __name__ == "__main__":
    main()
