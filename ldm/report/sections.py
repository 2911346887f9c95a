"""The questions of an evaluation, each as a section of its report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from ldm.data.image_sets import TCGA, ImageSet, images_by_name
from ldm.data.splits import patient_of
from ldm.encoders.extractors import Extractor
from ldm.encoders.feature_files import FeatureSet
from ldm.files import sha256
from ldm.images.sheets import LEAST, MADE, REAL, contact_sheet, grid
from ldm.metrics import conditional, frechet, kernels, manifold, memorisation, pairs
from ldm.metrics.measure import measure_of
from ldm.report import plots
from ldm.report.page import Section
from ldm.tables.text import read_table

Groups = tuple[np.ndarray | None, np.ndarray | None]
PAIRWISE = 10_000  # images of a set that kernels and neighbours are measured on
SHOWN = 16  # images of a grid
SHOWN_COPIES = 8


def _evenly(count: int, most: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def samples(sets: dict[str, ImageSet]) -> Section:
    """Some images of each set, evenly chosen. sets: by role, `generated`, `real` or `train`.

    >>> from ldm.data.image_sets import open_images
    >>> section = samples({"generated": open_images(cells)})
    >>> section.pictures[0][1]
    'SYNTHETIC: 16 of 48 images.'
    """
    section = Section("samples", "Samples", "Evenly chosen. Generated images are SYNTHETIC.")
    titles = {"generated": "SYNTHETIC", "real": "Real", "train": "Training"}
    for role, images in sets.items():
        rows = _evenly(len(images), SHOWN)
        page = contact_sheet([images.read(int(i)) for i in rows], most=LEAST)
        section.pictures.append((page, f"{titles[role]}: {len(rows)} of {len(images)} images."))
    return section


def distances(generated: FeatureSet, real: FeatureSet, groups: Groups, device: str, seed: int) -> Section:
    """How far generated images are from real ones: FID, FD∞, KID, CMMD, precision, recall, density and coverage.

    groups: whose the images of the two sets are, (N,) each, for intervals; None draws image by image.

    >>> sets = [FeatureSet(x, pd.DataFrame({"name": range(len(x))})) for x in (generated, real)]
    >>> section = distances(*sets, (None, None), "cpu", seed=0)
    >>> [(each.name, each.value) for each in section.measures[:3]]
    [('fid', 1.46), ('fd_infinity', 0.71), ('kid', 0.17)]
    """
    x, y, dim = generated.values, real.values, generated.values.shape[1]
    rng = np.random.default_rng(seed)
    few = conditional.few_images(len(x), len(y), dim)
    whole = frechet.fid(x, y)
    inverse, values = frechet.fid_by_size(x, y, seed)
    infinite = frechet.fd_infinity(inverse, values, whole)
    rows = [np.sort(rng.permutation(len(each))[:PAIRWISE]) for each in (x, y)]
    a, b = x[rows[0]], y[rows[1]]
    own = tuple(None if group is None else group[row] for group, row in zip(groups, rows))
    neighbours = min(manifold.NEIGHBOURS, len(a) - 1, len(b) - 1)
    measures = [
        measure_of("fid", whole, groups, seed=seed, invalid=few),
        measure_of("fd_infinity", infinite, groups, seed=seed, invalid=few),
        measure_of("kid", kernels.kid(x, y, device=device, seed=seed), groups, seed=seed),
        measure_of("cmmd", kernels.cmmd(a, b, device=device), own, seed=seed),
    ]
    near = manifold.prdc(a, b, neighbours, device)
    measures += [measure_of(name, each, own, seed=seed) for name, each in near.items()]
    intro = (
        f"{len(x)} generated and {len(y)} real images in {dim} dimensions. Intervals are a bootstrap of what each "
        "group of images adds; they do not hold the bias of FID, which FD∞ takes away."
    )
    smaller = min(len(x), len(y))
    return Section(
        "distances",
        "Distance to real images",
        intro,
        extractor_of(generated),
        measures,
        plots=[
            (plots.scatter(x, y, seed), "Features on the first two principal components of the real images."),
            (
                plots.size_line(inverse, values, infinite.value, smaller),
                "FID of random subsets; the line leads to infinitely many images.",
            ),
        ],
        data={"neighbours": neighbours, "dimensions": dim, "pairwise_images": [len(a), len(b)]},
    )


def extractor_of(features: FeatureSet) -> str:
    """The name of what made the features.

    >>> extractor_of(FeatureSet(real, pd.DataFrame(index=range(300)), {"extractor": "inception"}))
    'inception'
    """
    return str(features.about.get("extractor", "features"))


def following(
    generated: FeatureSet,
    conditions: FeatureSet,
    known: np.ndarray,
    groups: np.ndarray | None,
    pictures: tuple[ImageSet, ImageSet] | None,
    seed: int,
) -> Section:
    """Whether generated images show the tile whose features conditioned them. known: those that have one.

    >>> table = pd.DataFrame({"name": range(8), "slide": "a", "row": range(8)})
    >>> tiles = FeatureSet(real[:8], table)
    >>> section = following(FeatureSet(tiles.values + 0.1, table), tiles, np.arange(8), None, None, seed=0)
    >>> section.verdict
    ('good', 'Images follow their conditions: the interval of the margin leaves 0 out.')
    """
    which = conditions.table.groupby(["slide", "row"], sort=False).ngroup().to_numpy()
    tiles_of = np.unique(which, return_index=True)[1]  # several images may be of one tile
    found = conditional.following(generated.values[known], conditions.values[tiles_of], which)
    own = None if groups is None else groups[known]
    measures = conditional.following_measures(found, own, seed=seed)
    follows = measures[1].low > 0
    words = (
        "Images follow their conditions: the interval of the margin leaves 0 out."
        if follows
        else "No sign that images follow their conditions: the interval of the margin holds 0."
    )
    section = Section(
        "conditions",
        "Do images follow their conditions?",
        f"Features of {len(known)} generated images against those of the {found.count} tiles that conditioned them.",
        extractor_of(generated),
        measures,
        verdict=("good" if follows else "bad", words),
    )
    if pictures is not None:
        order = np.argsort(-found.own)
        rows = order[_evenly(len(order), 10)]
        images, tiles = pictures
        word = [f"cos {found.own[i]:.2f}, #{found.rank[i]}" for i in rows]
        shown = [[tiles.read(int(i)) for i in rows], [images.read(int(known[i])) for i in rows]]
        page = grid(shown, [[""] * len(rows), word], [f"condition,\n{REAL}", MADE], most=LEAST)
        section.pictures.append((page, "From the best followed condition to the worst: similarity, rank."))
    return section


def classes(
    generated: FeatureSet, real: FeatureSet, column: str, groups: Groups, seed: int
) -> tuple[Section, list[str]]:
    """FID within each class of `column` that both sets have, and warnings of the others.

    >>> sets = [FeatureSet(x, pd.DataFrame({"cancer": ["LUAD", "LUSC"] * (len(x) // 2)})) for x in (generated, real)]
    >>> section, warnings = classes(*sets, "cancer", (None, None), seed=0)
    >>> [each.title for each in section.measures]
    ['FID, cancer LUAD', 'FID, cancer LUSC']
    """
    measures, warnings = conditional.per_class(generated, real, column, groups, seed=seed)
    section = Section(
        "classes",
        f"FID by {column}",
        "Each against the real images of its own.",
        extractor_of(generated),
        measures,
        plots=[(plots.bars(measures, "FID"), "With 95% intervals; grey: not valid.")],
    )
    return section, warnings


def captions(features: FeatureSet, extractor: Extractor, groups: np.ndarray | None, seed: int) -> Section:
    """The CLIP score of images with the texts that they were generated from, of the column `text`.

    >>> extractor = Extractor("clip", 4, lambda images: images, words=lambda texts: np.eye(4)[: len(texts)])
    >>> made = FeatureSet(np.eye(4), pd.DataFrame({"text": ["a nerve", "fat", "muscle", "skin"]}))
    >>> captions(made, extractor, None, seed=0).measures[0].value
    100.0
    """
    which, texts = pd.factorize(features.table["text"].astype(str))
    measures = conditional.clip_score(features.values, extractor.words(list(texts)), groups, which, seed=seed)
    return Section(
        "captions",
        "Do images show their captions?",
        f"{len(texts)} captions of {len(which)} images.",
        extractor.name,
        measures,
    )


def memorised(
    sets: tuple[FeatureSet, FeatureSet, FeatureSet], groups: Groups, images: dict[str, ImageSet], device: str, seed: int
) -> Section:
    """Whether generated images copy training images.

    sets: features of generated, held-out real and training images; images: those that can be shown, by role.

    >>> sets = [FeatureSet(x, pd.DataFrame({"name": range(len(x))})) for x in (real[:40] + 0.01, generated, real)]
    >>> memorised(tuple(sets), (None, None), {}, "cpu", seed=0).verdict[0]
    'bad'
    """
    generated, real, train = sets
    found = memorisation.memorisation(generated, real, train, groups, device, seed=seed)
    kind = {"memorises": "bad", "nearer": "fair", "no sign": "good"}[found.verdict]
    names, known = generated.table["name"], train.table["name"]
    copies = [
        {
            "generated": names[i],
            "train": known[found.generated.row[i, 0]],
            "distance": float(found.generated.distance[i, 0]),
            "identical": bool(found.generated.same[i]),
        }
        for i in found.copies[np.argsort(found.generated.distance[found.copies, 0])]
    ]
    repeats = [[names[i], names[j]] for i, j in found.repeats[:200]]
    section = Section(
        "memorisation",
        "Has it learnt training images by heart?",
        f"Distances to the nearest of {len(train)} training images, of {len(generated)} generated and "
        f"{len(real)} held-out real images.",
        extractor_of(generated),
        found.measures,
        verdict=(kind, found.words),
        plots=[(plots.distance_histogram(found), "Left of the dashed line lie 5% of held-out images.")],
        data={"verdict": found.verdict, "flagged": copies, "repeated": repeats, "limit": found.limit},
    )
    if {"generated", "train"} <= images.keys():
        page = _nearest(MADE, found.generated, images["generated"], images["train"])
        section.pictures.append((page, "The generated images nearest to training images, and those."))
        if "real" in images:
            page = _nearest(f"{REAL}, held-out", found.held_out, images["real"], images["train"])
            section.pictures.append((page, "The same of held-out real images: what chance gives."))
    return section


def _nearest(name: str, found: memorisation.Nearest, images: ImageSet, train: ImageSet) -> np.ndarray:
    """The images that are nearest to training images, above those, each with its distance."""
    order = np.argsort(found.distance[:, 0])[:SHOWN_COPIES]
    rows, words = [[images.read(int(i)) for i in order]], [[""] * len(order)]
    for k in range(found.row.shape[1]):
        rows.append([train.read(int(found.row[i, k])) for i in order])
        words.append([f"{found.distance[i, k]:.3f}" for i in order])
    titles = [f"{name},\nnearest first", *(f"training,\nnearest {k + 1}" for k in range(found.row.shape[1]))]
    return grid(rows, words, titles, most=LEAST)


def paired(
    generated: Path,
    real: Path,
    stains: str,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    device: str,
    seed: int,
) -> tuple[Section, list[str]]:
    """How alike images of the same names in two folders are: reconstructions, translations; and warnings.

    stains: `he` or `hd`, which are compared one by one. perceptual: LPIPS, None leaves it out.

    >>> for folder, image in {"new": tile // 2, "old": tile}.items():
    ...     Path(folder).mkdir()
    ...     Image.fromarray(image[:64, :64]).save(f"{folder}/a.png")
    >>> section, warnings = paired(Path("new"), Path("old"), "he", None, "cpu", seed=0)
    >>> section.measures[0].title, section.measures[0].value
    ('PSNR', 10.0378)
    """
    of = images_by_name(generated), images_by_name(real)
    names, warnings = pairs.pair_up(*of)
    files = [(of[0][name], of[1][name]) for name in names]
    measured, more = pairs.compare(files, stains, perceptual, device)
    barcodes = pd.Series(names).str.extract(TCGA, expand=False)
    groups = barcodes.map(patient_of).to_numpy(str) if barcodes.notna().all() and barcodes.nunique() > 1 else None
    measures = pairs.pair_measures(measured, groups, seed=seed)
    order = np.argsort(measured["ssim"])
    rows = order[_evenly(len(order), 8)]
    shown = [pairs.read_pair(*files[i]) for i in rows]
    words = [[f"SSIM {measured['ssim'][i]:.2f}" for i in rows], [names[i][-16:] for i in rows]]
    page = grid(list(zip(*shown)), words, [MADE, f"{REAL},\nshould be"], most=LEAST)
    table = pd.DataFrame({"name": names, **measured})
    section = Section(
        "pairs",
        "Pairs of images",
        f"{len(names)} pairs of the same name.",
        measures=measures,
        pictures=[(page, "From the least similar pair to the most similar one.")],
        data={"pairs": table.replace({np.nan: None}).to_dict("records")},
    )
    return section, warnings + more


def known_of_files(path: Path) -> dict[str, Any]:
    """What a report tells of a folder of images by name, or of one file: their contents' SHA-256.

    >>> about = known_of_files(cells)
    >>> about["count"], len(about["files_sha256"])
    (48, 64)
    """
    files = images_by_name(path)
    words = "".join(f"{name} {sha256(files[name])}\n" for name in sorted(files))
    digest = hashlib.sha256(words.encode()).hexdigest()
    return {"path": path.name, "kind": "files by name", "count": len(files), "files_sha256": digest}


def scores(path: Path, seed: int) -> Section:
    """Whether the scores of an ensemble, in a table with `score` and `target`, are calibrated.

    >>> pd.DataFrame({"score": [0.1, 0.2, 0.7, 0.9], "target": [0, 0, 1, 1]}).to_csv("scores.csv", index=False)
    >>> {each.name: each.value for each in scores(Path("scores.csv"), seed=0).measures}
    {'calibration_error': 0.1750, 'brier': 0.0375, 'score_bias': -0.0250, 'auroc': 1.0}
    """
    table = read_table(path, numbers=True)
    groups = next((table[unit].to_numpy(str) for unit in ("patient", "slide") if unit in table), None)
    found = conditional.calibration(table, groups, seed=seed)
    return Section(
        "scores",
        "Are scores calibrated?",
        f"{len(table)} scores of {path.name}.",
        measures=found.measures,
        plots=[(plots.reliability(found), "Calibrated scores lie on the dashed line.")],
    )
