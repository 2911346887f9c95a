"""Virtual staining by inversion: tiles of one stain under another's class, judged by a classifier of real tiles.

    python benchmarks/translation_stains.py --model MODEL --tiles COHORT [--count 24] [--guidance 2] [--out PNG]
    python benchmarks/translation_stains.py --model STUDENT --tiles COHORT --start noise --steps 4 --strength 0.5

All tiles translated are of regions that the model was not trained on (split `val`). Printed for each source and target:
how many of the translated tiles the classifier calls the target's, and the SSIM of the haematoxylin channel (colour
deconvolution) with the source's, beside that of real target tiles of another place; with the middle 95% over draws of
tiles. The classifier is a small convolutional network trained here on the real tiles of the training regions; its
accuracy on held-out real tiles is printed first.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
from stain_measures import Pair, judged, known, right, shown, summary, tiles_of, train_classifier
from torch import nn

from ldm import load_model
from ldm.images.sheets import grid
from ldm.images.write import save_png
from ldm.requests.tiles import evenly
from ldm.sampling.sampler import PRECISIONS, Inversion, Sampler
from ldm.sampling.translate import translate


@dataclass(frozen=True)
class Stained:
    """hits: class -> (N,), which held-out real tiles the classifier knows. pairs: the translations. page: a sheet."""

    hits: dict[str, np.ndarray]
    pairs: list[Pair]
    page: list[np.ndarray]


def measure(
    model: nn.Module, cohort: str, column: str = "patient", count: int = 24, steps: int = 20, strength: float = 1.0,
    guidance: float = 2.0, exact: bool = False, classifier_steps: int = 100,
    precision: str = "fp32", start: str = "invert",
) -> Stained:  # fmt: skip
    """Held-out tiles of every class of the model under every other."""
    (key,) = model.cond_stage_model.keys
    names = model.cond_stage_model.describe()[key].names
    trained = {name: tiles_of(cohort, column, name, "train", 500) for name in names}
    classifier = train_classifier(trained, classifier_steps)
    real = {name: tiles_of(cohort, column, name, "val") for name in names}
    sampler = Sampler(steps=steps, guidance_scale=guidance, precision=precision, progress=False)
    if start == "invert":
        sampler = replace(sampler, solver="euler", schedule="uniform")
    inversion = Inversion(start=start, strength=strength, exact=exact)
    conditions = {name: model.condition(**{key: name}) for name in names}
    page, pairs = [], []
    for source in names:
        chosen = real[source][evenly(len(real[source]), count)]
        targets = [name for name in names if name != source]
        found = translate(
            model, chosen, conditions[source], [conditions[name] for name in targets], sampler, inversion
        )
        page.append(shown(chosen))
        for name, image in zip(targets, found):
            image, other = image.clamp(-1, 1), real[name][evenly(len(real[name]), len(chosen))]
            pairs.append(judged(classifier, names, source, name, chosen, image, other))
            page += [shown(image), shown(other)]
    return Stained(right(classifier, real), pairs, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="model folder or run, conditioned on a class")
    add("--tiles", required=True, help="cohort with the splits train and val")
    add("--column", default="patient", help="of the cohort's table, that names the class (default %(default)s)")
    add("--count", type=int, default=24, help="tiles of each source (default %(default)s)")
    add("--steps", type=int, default=20)
    add("--strength", type=float, default=1.0, help="share of the steps that are taken")
    add("--start", choices=("invert", "noise"), default="invert", help="from what (default %(default)s)")
    add("--guidance", type=float, default=2.0, help="scale on the way back")
    add("--exact", action="store_true", help="invert by fixed points")
    add("--classifier-steps", type=int, default=100)
    add("--precision", default="fp32", choices=PRECISIONS)
    add("--out", help="picture: sources, and under them each target, then real tiles of it")
    options = parser.parse_args()
    found = measure(
        load_model(options.model), options.tiles, options.column, options.count, options.steps, options.strength,
        options.guidance, options.exact, options.classifier_steps, options.precision, options.start,
    )  # fmt: skip
    print(f"classifier, held-out real tiles: {known(found.hits)}")
    for pair in found.pairs:
        print(pair.line())
    print(summary(found.pairs))
    if options.out:
        content = "source, then for each target: translation, real tiles"
        save_png(options.out, grid(found.page, least=64), {"content": content, "model": options.model})


if __name__ == "__main__":
    main()
