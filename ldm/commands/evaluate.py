"""`histoldm evaluate`: everything that the sets given allow to measure, in one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.hub import get_dir

from ldm.data.extent import FAR
from ldm.data.features import read_features
from ldm.data.field_files import extent_of, known_of_field
from ldm.data.image_sets import ImageSet
from ldm.data.tile_store import holds_stores, open_cohort
from ldm.data.where import Where
from ldm.encoders.feature_files import SUFFIXES, FeatureSet, check_alike
from ldm.errors import UserError, some, suggest
from ldm.files import owned, owns, sha256, write_text
from ldm.images.kinds import is_ome_zarr
from ldm.images.slides import Slide, open_image
from ldm.metrics.conditional import few_images
from ldm.metrics.intervals import choose_unit, groups_of
from ldm.metrics.whole_slides import ALONG, LEAST
from ldm.report import sections as ask
from ldm.report.compare import compare_lines, compare_page, compared, read_report
from ldm.report.large_images import Conditions, Looked, canvas, together, whole_distance
from ldm.report.page import Report, Section
from ldm.report.sets import Extractors, Source, encoder_of, of_conditions, parse_weights
from ldm.report.unlike import unlike

if TYPE_CHECKING:
    from ldm.autoencoder.perceptual import LPIPS

FEWEST = 8  # images of a set that a distance needs


@dataclass
class Asked:
    """What a user asks for, as the command takes it."""

    out: Path
    generated: Path | None = None
    real: Path | None = None
    train: Path | None = None
    conditions: Path | None = None
    pairs: Path | None = None
    scores: Path | None = None
    where: Where = ()
    train_where: Where = ()
    features: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    resize: str = "clean"
    by: str | None = None
    class_column: str = "class"
    crop: int | None = None
    tile: int = 256
    windows: int = 1024
    image_size: int | None = None
    stains: str = "he"
    lpips: Path | None = None
    seed: int = 0
    title: str = "Evaluation"

    def __post_init__(self):
        if self.generated is None and self.scores is None:
            raise UserError("say what to evaluate: --generated, or --scores for a table of scores.")
        if self.generated is not None and self.real is None and self.pairs is None and not is_large(self.generated):
            raise UserError(
                "say what to compare with: --real for sets of images, --pairs for images of the same names."
            )
        if self.train is not None and self.real is None:
            raise UserError("memorisation is judged against held-out real images: give --real too.")
        if self.where and self.real is None:
            raise UserError("--where selects real images; give --real.")


def is_large(path: Path) -> bool:
    """Whether a path is one image rather than a set of them."""
    return path.suffix not in SUFFIXES if path.is_file() else is_ome_zarr(path)


def evaluate(asked: Asked, device: str) -> None:
    """Measure, write report.html and report.json into `asked.out`, and print the figures."""
    with owned(asked.out):
        _evaluate(asked, device)


def _evaluate(asked: Asked, device: str) -> None:
    exact = "cpu" if device == "mps" else device  # Apple's GPUs have no float64, which distances are in
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(asked).items()}
    report = Report(asked.title, settings, date=f"{date.today():%d %B %Y}")
    if asked.scores is not None:
        report.sections.append(ask.scores(asked.scores, asked.seed))
    if asked.pairs is not None:
        perceptual = lpips_of(asked, report, exact)
        section, warnings = ask.paired(asked.generated, asked.pairs, asked.stains, perceptual, exact, asked.seed)
        report.sections.append(section)
        report.warnings += warnings
    extractors = Extractors(parse_weights(asked.weights, asked.features), device, asked.resize)
    if asked.generated is not None and (asked.real is not None or is_large(asked.generated)):
        compare_sets(asked, report, extractors, exact)
    if asked.pairs is not None:
        report.sets.setdefault("generated", ask.known_of_files(asked.generated))
        report.sets["paired"] = ask.known_of_files(asked.pairs)
    if asked.scores is not None:
        about = {"path": asked.scores.name, "kind": "table of scores", "files_sha256": sha256(asked.scores)}
        report.sets["scores"] = about
    report.write(asked.out)
    print("\n".join(report.lines()))
    for warning in report.warnings:
        print(f"note: {warning}")
    print(f"wrote {asked.out / 'report.html'} and report.json")


def compare_sets(asked: Asked, report: Report, extractors: Extractors, device: str) -> None:
    """Distances, conditions, classes, captions, memorisation, canvas."""
    given = {
        "generated": (asked.generated, ()),
        "real": (asked.real, asked.where),
        "train": (asked.train, asked.train_where),
    }
    sources = {
        role: Source(role, path, where, asked.crop, asked.image_size)
        for role, (path, where) in given.items()
        if path is not None
    }
    images = {role: source.images for role, source in sources.items() if not source.is_file_of_features}
    report.warnings += [text for each in images.values() for text in each.warnings]
    report.warnings += unlike(images)
    check_sizes(sources)
    check_column(asked.class_column, [sources[role] for role in ("generated", "real") if role in sources])
    names = asked.features
    if all(source.is_file_of_features for source in sources.values()):
        if names:
            raise UserError("--features is of images; the sets are feature files, which hold theirs already.")
        names = [""]
    if not names and asked.real is not None:
        raise UserError(
            "say what features to measure in: --features inception, --features data/models/demo-encoder, any encoder "
            "by name, or pixels; repeat for several."
        )
    large = {
        role: open_image(source.path) for role, source in sources.items() if is_large(source.path) and role != "train"
    }
    made_of = None
    if len(large) > 1:
        check_slides(large["generated"], large["real"], asked)
        if asked.conditions is not None:
            made_of = conditions_of(asked.conditions, large["generated"], names)
            asked = replace(asked, conditions=None)
    looked = look_at(large, names, asked, extractors)
    sections = [ask.samples(images)] if images else []
    for name in names:
        sections += sections_of(name, sources, images, asked, report, extractors, device)
    sections += canvases(looked, names, asked, extractors, made_of)
    report.sections += sections
    for role, each in images.items():
        report.sets[role] = each.about | report.sets.get(role, {})


def check_column(column: str, sources: Sequence[Source]) -> None:
    """UserError where a column that is asked for, which `class` need not be, is not known of a set of images."""
    for source in sources:
        if column != "class" and not source.is_file_of_features and column not in source.images.table:
            known = suggest(column, source.images.table.columns)
            raise UserError(f"--class {column} is not known of the images of {source.path}{known}")


def check_sizes(sources: dict[str, Source]) -> None:
    """UserError where sets of images are of different sizes: their features would differ by the resizing."""
    sizes = {
        role: tuple(source.images.about["size"]) for role, source in sources.items() if not source.is_file_of_features
    }
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{role} {w} x {h} px" for role, (w, h) in sizes.items())
        raise UserError(
            f"the sets are of different sizes ({listed}), so their features would differ by the resizing alone. Give "
            "--image-size to resize all of them first, --crop to cut files, or tiles of one size."
        )


def sections_of(
    name: str,
    sources: dict[str, Source],
    images: dict[str, ImageSet],
    asked: Asked,
    report: Report,
    extractors: Extractors,
    device: str,
) -> list[Section]:
    """What one extractor's features say."""
    out, seed = asked.out, asked.seed
    features = {role: source.features(name, extractors, out) for role, source in sources.items()}
    generated = features["generated"]
    groups = {}
    for role in ("generated", "real"):
        if role in features:
            groups[role] = grouped(features[role], role, asked.by, report)
    for role, each in features.items():
        few = len(each) < FEWEST
        if few and role != "train" and "real" in features:
            raise UserError(f"{each.name} has {len(each)} {role} images; distances need {FEWEST} at least.")
        report.sets[role] = report.sets.get(role, {}) | each.about.get("data", {})
        check_alike(generated, each)
    about = {key: value for key, value in generated.about.items() if key not in ("data", "tool", "version")}
    report.extractors[ask.extractor_of(generated)] = about
    found = []
    if "real" in features:
        real = features["real"]
        both = (groups["generated"], groups["real"])
        found.append(ask.distances(generated, real, both, device, seed))
        warn_few(generated, real, report)
        column = asked.class_column
        if column in generated.table and column in real.table and generated.table[column].nunique() > 1:
            section, warnings = ask.classes(generated, real, column, both, seed)
            found.append(section)
            report.warnings += warnings
        elif column != "class":
            raise UserError(
                f"'{column}' is not known of both sets with several values; see tiles.csv and index.parquet."
            )
    if "text" in generated.table and name and name in extractors.made and extractors.made[name].words:
        found.append(ask.captions(generated, extractors.made[name], groups["generated"], seed))
    found += follow(name, sources, features, images, asked, extractors, groups["generated"])
    if "train" in features:
        three = (generated, features["real"], features["train"])
        found.append(ask.memorised(three, (groups["generated"], groups["real"]), images, device, seed))
    return found


def grouped(features: FeatureSet, role: str, by: str | None, report: Report) -> np.ndarray | None:
    """Groups of a set for its intervals; what they are stands in the report."""
    known = by in (None, "image") or by in features.table
    unit, warnings = choose_unit([features.table], by if known else None)
    report.sets.setdefault(role, {})["unit"] = f"{unit}s"
    report.warnings += [text for text in warnings if text not in report.warnings]
    if not known:
        report.warnings.append(f"{features.name} does not tell the {by} of its images; their intervals draw {unit}s.")
    return groups_of(features.table, unit)


def warn_few(generated: FeatureSet, real: FeatureSet, report: Report) -> None:
    dim = generated.values.shape[1]
    if few_images(len(generated), len(real), dim):
        fewest = min(len(generated), len(real))
        report.warnings.append(
            f"{fewest} images are fewer than the {dim} dimensions of {ask.extractor_of(generated)}: FID and FD∞ are "
            "not valid, in the whole and by class. KID, CMMD, precision, recall, density and coverage are."
        )


def follow(
    name: str,
    sources: dict[str, Source],
    features: dict[str, FeatureSet],
    images: dict[str, ImageSet],
    asked: Asked,
    extractors: Extractors,
    groups: np.ndarray | None,
) -> list[Section]:
    """Whether images follow the tiles that conditioned them, where the list beside them names those."""
    candidates = [asked.conditions] if asked.conditions else [asked.real, asked.train]
    for path in candidates:
        if path is None or not name or sources["generated"].is_file_of_features:
            continue
        source = Source("conditions", path, {})
        found = of_conditions(features["generated"], source, name, extractors, asked.out)
        if found is not None:
            conditions, known = found
            tiles = shown_tiles(source, conditions)
            pictures = (images["generated"], tiles) if "generated" in images else None
            return [ask.following(features["generated"], conditions, known, groups, pictures, asked.seed)]
    if asked.conditions:
        raise UserError(
            f"{sources['generated'].path} does not name tiles of {asked.conditions} as its conditions; `histoldm "
            "sample --features <cohort>` lists them in tiles.csv."
        )
    return []


def shown_tiles(source: Source, conditions: FeatureSet) -> ImageSet:
    """The images of the conditioning tiles."""
    whole = source.images
    place = {key: i for i, key in enumerate(zip(whole.table["slide"], whole.table["row"].astype(int)))}
    rows = [place[key] for key in zip(conditions.table["slide"], conditions.table["row"].astype(int))]
    return replace(whole, pictures=whole.pictures.take(rows), table=conditions.table)


def look_at(large: dict[str, Slide], names: Sequence[str], asked: Asked, extractors: Extractors) -> dict[str, Looked]:
    """Large images by role, looked at. UserError: of two that are compared as wholes, one is hardly of tissue."""
    extractor = extractors.get(names[0]) if names and large else None
    window = asked.crop or asked.tile
    looked = {role: Looked.at(image, window, extractor) for role, image in large.items()}
    for role, each in looked.items():
        count = int(each.tissue.sum())
        if len(looked) > 1 and count < LEAST:
            raise UserError(
                f"{each.image.path} (--{role}) has tissue in {count} windows of {window} px, and large images are "
                f"compared as wholes where they have {LEAST} at least: give another one, or smaller windows by --crop."
            )
    return looked


def canvases(
    looked: dict[str, Looked], names: Sequence[str], asked: Asked, extractors: Extractors, made_of: Conditions | None
) -> list[Section]:
    """What is measured of whole large images, and of both where there are two. made_of: the generated one."""
    name = extractors.get(names[0]).name if names and looked else ""
    found = [canvas(each, role, asked.tile, name) for role, each in looked.items()]
    if len(looked) > 1:
        extractor, both = extractors.get(names[0]), (looked["generated"], looked["real"])
        found.insert(0, together(*both, asked.tile, asked.stains, extractor, asked.windows, asked.seed, made_of))
        found.append(whole_distance(both[0].image, both[1].image, extractor))
    return found


def check_slides(made: Slide, real: Slide, asked: Asked) -> None:
    """UserError where two large images cannot be compared as wholes: too small, or of unlike micrometres per pixel."""
    window = asked.crop or asked.tile
    for image, role in ((made, "generated"), (real, "real")):
        least = max(ALONG * window, 2 * asked.tile)
        if min(image.dimensions) < least:
            size = " x ".join(map(str, image.dimensions))
            raise UserError(
                f"{image.path} (--{role}) is {size} px. Large images are compared as wholes where they have {ALONG} "
                f"windows of {window} px and two tiles of {asked.tile} px along each side, {least} px: give a larger "
                "one, or a smaller --crop and --tile; tiles of it can be compared as a folder."
            )
    if made.mpp and real.mpp and abs(made.mpp / real.mpp - 1) > FAR:
        raise UserError(
            f"{made.path} has {made.mpp:.3g} um/px and {real.path} {real.mpp:.3g}: large images are compared at one "
            f"scale. Give a real slide at {made.mpp:.3g} um/px, or a cohort tiled at that (tile_slides --mpp)."
        )


def conditions_of(path: Path, made: Slide, names: Sequence[str]) -> Conditions:
    """The grid of features that a slide was made of: a tile store, or a field with its JSON, of all of it.

    UserError: neither, features that are not measured in, a grid of another size.
    """
    if holds_stores(path):
        stores = open_cohort(path)
        if len(stores) > 1:
            raise UserError(f"{path} holds {len(stores)} slides; the conditions of one slide are those of one store.")
        store = stores[0]
        of, known = store.feature_names, {"stride": store.stride, "tile_size": store.tile_size}
    else:
        known = known_of_field(path)
        if not {"stride", "tile_size", "feature"} <= known.keys():
            raise UserError(
                f"{path} does not say on which lattice its features lie; the conditions of a slide are a tile store, "
                "or a field (.npy) with the .json that `histoldm field` writes beside it."
            )
        store, of = None, [known["feature"]]
    name = Path(encoder_of(names[0])).name
    if name not in of:
        raise UserError(
            f"{path} holds features of {some(of)}, and windows are measured in those of {name}: give --features "
            f"{of[0] if of else name} first."
        )
    grid = read_features(path).grid()[0] if store is None else store.grid(None, name)[0]
    extent = extent_of(known, grid.shape[:2])[::-1]
    if any(abs(a - b) > known["stride"] for a, b in zip(extent, made.dimensions)):
        of, size = (" x ".join(map(str, each)) for each in (extent, made.dimensions))
        raise UserError(
            f"{path} is the grid of an image of {of} px, and {made.path} is {size}: it was made of another."
        )
    return Conditions(grid, known["stride"], known["tile_size"])


def lpips_of(asked: Asked, report: Report, device: str) -> LPIPS | None:
    """LPIPS, where its backbone is on disk; else a warning, or UserError if it was asked for."""
    from ldm.autoencoder.perceptual import BACKBONES, LPIPS

    file = asked.lpips or Path(get_dir()) / "checkpoints" / BACKBONES["alex"]
    if not file.is_file():
        message = (
            f"LPIPS needs the AlexNet of torchvision, which is not at {file}: get it from "
            f"https://download.pytorch.org/models/{BACKBONES['alex']} (BSD-3-Clause; trained on ImageNet, whose terms "
            "allow non-commercial research) and put it there, or name your copy with --lpips."
        )
        if asked.lpips:
            raise UserError(message)
        report.warnings.append(f"LPIPS is left out. {message}")
        return None
    with torch.device("cpu"):
        return LPIPS("alex", str(file)).to(device).eval()


@owns()
def compare_reports(a: Path, b: Path, out: Path) -> None:
    """`histoldm evaluate --compare`: two reports side by side, as a page and on the terminal."""
    reports = [read_report(path) for path in (a, b)]
    rows, warnings = compared(*reports)
    write_text(out / "comparison.html", compare_page(*reports, rows, warnings))
    print("\n".join(compare_lines(rows)))
    for warning in warnings:
        print(f"note: {warning}")
    print(f"wrote {out / 'comparison.html'}")
