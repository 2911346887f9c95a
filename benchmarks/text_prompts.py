"""Do images show what their prompt says? Judged by classifiers of real images; and are they copies of training images?

    python benchmarks/text_prompts.py --model MODEL --images COHORT [--count 24] [--guidance 3] [--out PNG]

The cohort is that of `demo.build.demo_captions` and `import_captions`: tissue of several organs and stains with many or
few nuclei, slices of several sequences with or without tumour. Those kinds that it has (radiographs are left out) are
asked for by their captions, `--count` images of each. Two small classifiers learn here from the real images of the
split `train`: which kind an image is of, and whether tissue has many or few nuclei. Printed: how many of the images
each takes for what the prompt said, with the 95% interval (Wilson), beside chance; and first what it makes of held-out
real images (split `val`), where there are any. A slice is dark around the head: an image with an edge brighter than
that of any real slice is none, a radiograph for instance, whatever the classifier says, which knows none.

Memorisation: the distance of each image of one kind to the nearest training image of it, against that of held-out real
images (`ldm.metrics.memorisation`), in the pixels of both: the model was trained on no other orientations.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from stain_measures import called, shown, train_classifier
from torch import Tensor, nn

import ldm
from ldm.data.cohort import read_index
from ldm.data.datasets import TileDataset
from ldm.encoders.extractors import load_extractor
from ldm.encoders.feature_files import FeatureSet
from ldm.errors import UserError
from ldm.images.sheets import grid
from ldm.images.write import save_png, to_uint8
from ldm.metrics.memorisation import LEAST, Memorisation, memorisation
from ldm.requests.tiles import evenly
from ldm.rng import fold
from ldm.sampling.sampler import PRECISIONS
from ldm.scorers.calibration import proportion

NUCLEI, TUMOUR = (", many nuclei", ", few nuclei"), (", with tumour", ", without tumour")
KINDS = {  # kind -> modality, text, what the text may add
    "H&E skin": ("H&E", "skin", NUCLEI),
    "H&E colon cancer": ("H&E", "colon cancer", NUCLEI),
    "Ki67": ("IHC", "Ki67", NUCLEI),
    "FHL2": ("IHC", "FHL2, colon", NUCLEI),
    "T1": ("MRI", "T1", TUMOUR),
    "T2": ("MRI", "T2", TUMOUR),
    "FLAIR": ("MRI", "FLAIR", TUMOUR),
}
FEWEST = 8  # training images of a kind
EDGE, MARGIN = 3, 0.1  # px around a slice that are dark; how much brighter than in any real slice they may be


@dataclass(frozen=True)
class Prompted:
    """What was made of each kind, and whether it shows what was asked for.

    made: kind -> images (N,3,H,W), one after the other of its texts. kind, nuclei: (N,) of 0 and 1 over all images, and
    over those of tissue. bright: kind -> (N,), of slices, whose edge is too bright for one. known_kind, known_nuclei:
    of held-out real images; empty where there are none.
    chance: of the kind. copies: of the kind `compared`; None where too few real images are held out.
    """

    made: dict[str, Tensor]
    kind: dict[str, np.ndarray]
    nuclei: dict[str, np.ndarray]
    bright: dict[str, np.ndarray]
    known_kind: np.ndarray
    known_nuclei: np.ndarray
    compared: str
    copies: Memorisation | None

    @property
    def chance(self) -> float:
        return 1 / len(self.made)


def kind_of(modality: str, text: str) -> str:
    """The kind of KINDS that a caption is of; "" of others."""
    for kind, (of, words, adds) in KINDS.items():
        if of == modality and text in [words + add for add in ("", *adds)]:
            return kind
    return ""


def real_images(cohort: str, split: str) -> dict[str, dict[str, Tensor]]:
    """kind -> what its text adds ("" too) -> images (N,3,H,W) of a split."""
    if split not in set(read_index(cohort)["split"]):
        return {}
    tiles = TileDataset(cohort, ("image",), conditions={"modality": "modality", "text": "text"}, where={"split": split})
    modality, text = tiles.values("modality"), tiles.values("text")
    found: dict[str, dict[str, Tensor]] = {}
    for kind, (of, words, adds) in KINDS.items():
        for add in ("", *adds):
            rows = np.flatnonzero((modality == of) & (text == words + add))
            if len(rows):
                found.setdefault(kind, {})[add] = torch.stack([tiles[int(i)]["image"] for i in rows])
    return found


def by_nuclei(images: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """ ", many nuclei" and ", few nuclei" -> images of all kinds of tissue."""
    parts = {add: [each[add] for each in images.values() if add in each] for add in NUCLEI}
    return {add: torch.cat(part) for add, part in parts.items() if part}


def edge(images: Tensor) -> np.ndarray:
    """The mean (N,) of the outermost EDGE px of images (N,3,H,W)."""
    frame = torch.ones(images.shape[-2:], dtype=torch.bool)
    frame[EDGE:-EDGE, EDGE:-EDGE] = False
    return images[..., frame].mean((1, 2)).numpy()


def in_pixels(images: Tensor) -> FeatureSet:
    extractor = load_extractor("pixels")
    return FeatureSet(extractor(to_uint8(images)), pd.DataFrame(index=range(len(images))), extractor.about)


def measure(
    model: nn.Module, cohort: str, count: int = 24, steps: int = 20, guidance: float = 3.0, seed: int = 0,
    precision: str = "fp32", classifier_steps: int = 800, compared: str = "H&E skin",
) -> Prompted:  # fmt: skip
    """Images of every kind that the cohort has, half of them with each of the words that its text may add."""
    train, held_out = real_images(cohort, "train"), real_images(cohort, "val")
    train = {kind: each for kind, each in train.items() if sum(map(len, each.values())) >= FEWEST}
    if len(train) < 2:
        raise UserError(f"{cohort} has fewer than two of the kinds {', '.join(KINDS)}; make it by demo_captions.")
    kinds = list(train)
    of_kind = train_classifier({kind: torch.cat(list(each.values())) for kind, each in train.items()}, classifier_steps)
    nuclei = by_nuclei(train)
    of_nuclei = train_classifier(nuclei, classifier_steps) if len(nuclei) == 2 else None
    made, shown_kind, shown_nuclei, bright = {}, {}, {}, {}
    for k, kind in enumerate(kinds):
        modality, words, adds = KINDS[kind]
        texts = [words + adds[i * len(adds) // count] for i in range(count)]
        condition = model.condition(text=texts, modality=[modality] * count)
        sampler = ldm.Sampler(
            steps=steps, guidance_scale=guidance, seed=fold(seed, k), batch_size=count, precision=precision,
            progress=False,
        )  # fmt: skip
        made[kind] = ldm.sample(model, condition, sampler=sampler)
        shown_kind[kind] = called(of_kind, made[kind], k)
        if modality == "MRI":
            limit = edge(torch.cat(list(train[kind].values()))).max() + MARGIN
            bright[kind] = (edge(made[kind]) > limit).astype(float)
            shown_kind[kind] *= 1 - bright[kind]
        if adds == NUCLEI and of_nuclei is not None:
            half = (np.arange(count) * 2 // count).astype(int)
            each = [called(of_nuclei, made[kind], which) for which in (0, 1)]
            shown_nuclei[kind] = np.where(half == 0, *each)
    known = [
        called(of_kind, torch.cat(list(held_out[kind].values())), kinds.index(kind))
        for kind in kinds
        if kind in held_out
    ]
    fresh = by_nuclei(held_out)
    seen = [called(of_nuclei, fresh[add], k) for k, add in enumerate(NUCLEI) if of_nuclei is not None and add in fresh]
    real = {
        part: torch.cat(list(each[compared].values()))
        for part, each in (("train", train), ("val", held_out))
        if compared in each
    }
    copies = None
    if len(real) == 2 and len(real["val"]) >= LEAST:
        copies = memorisation(*map(in_pixels, (made[compared], real["val"], real["train"])))
    empty = np.empty(0)
    known_kind, known_nuclei = np.concatenate([empty, *known]), np.concatenate([empty, *seen])
    return Prompted(made, shown_kind, shown_nuclei, bright, known_kind, known_nuclei, compared, copies)


def told(hits: np.ndarray) -> str:
    share, low, high = proportion(int(hits.sum()), len(hits))
    return f"{share:.3f} ({low:.3f} to {high:.3f}) of {len(hits)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="model folder or run, conditioned on text and modality")
    add("--images", required=True, help="cohort of data_prep.import_captions")
    add("--count", type=int, default=24, help="images of each kind (default %(default)s)")
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=3.0)
    add("--seed", type=int, default=0)
    add("--precision", default="fp32", choices=PRECISIONS)
    add("--classifier-steps", type=int, default=800)
    add("--out", help="picture: images of each kind, first those of its first words")
    options = parser.parse_args()
    found = measure(
        ldm.load_model(options.model), options.images, options.count, options.steps, options.guidance, options.seed,
        options.precision, options.classifier_steps,
    )  # fmt: skip
    for words, known in (("kind", found.known_kind), ("nuclei", found.known_nuclei)):
        print(f"classifier of the {words}, held-out real images: {told(known) if len(known) else 'there are none'}")
    for kind, hits in found.kind.items():
        nuclei = f"; many or few nuclei as asked {told(found.nuclei[kind])}" if kind in found.nuclei else ""
        bright = f"; with the edge of no slice {told(found.bright[kind])}" if kind in found.bright else ""
        print(f"  {kind:17} taken for it {told(hits)}{nuclei}{bright}")
    print(f"all: taken for their kind {told(np.concatenate(list(found.kind.values())))}, chance {found.chance:.3f}")
    if found.nuclei:
        print(f"tissue: many or few nuclei as asked {told(np.concatenate(list(found.nuclei.values())))}, chance 0.500")
    if found.copies is not None:
        print(f"{found.compared} against its training images, in pixels: {found.copies.words}")
        for each in found.copies.measures:
            print(f"  {each.title:36} {each.value:.3f}  {each.note}")
    if options.out:
        rows = [shown(images[evenly(len(images), 12)]) for images in found.made.values()]
        about = {"content": f"images of {', '.join(found.made)}", "model": options.model}
        save_png(options.out, grid(rows, least=64), about)


if __name__ == "__main__":
    main()
