"""From what a user asks of `histoldm translate` to the images and what each becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ldm.conditioners.compose import cells_of, keys_of, parse_conditions
from ldm.data.collection import read_pictures
from ldm.data.tile_store import holds_stores, open_cohort
from ldm.data.where import Where
from ldm.encoders.encoder import load_encoder
from ldm.encoders.feature_map import load_transport
from ldm.errors import UserError, some
from ldm.images.pictures import Picture
from ldm.requests.edits import Target, gene_values, safe
from ldm.requests.spec import Plan, mmdm_source, plan_of_flags, read_pairs, read_spec
from ldm.requests.tiles import AskedTiles, check_encoder, feature_dim, features_in, requested_tiles
from ldm.tables.genes import barcode, read_gene_table

if TYPE_CHECKING:
    from ldm.conditioners.base import Conditioner
    from ldm.latent_diffusion import LatentDiffusion

CHECKED = ("class", "score", "mutation", "expression", "multiplier")  # kinds whose values are cheap to read


@dataclass(frozen=True)
class AskedTranslations:
    """What a user asks of a translation, besides the images.

    Attributes:
        region: x, y, width, height of one large image. mpp: micrometres per pixel of files that do not say it.
        where, count: which tiles of a store; at most so many images.
        source, targets, edits: see `plan_of_flags`. spec: see `read_spec`. table: see `read_pairs`.
        names: a source's class is the beginning of the file's name, up to two underscores.
        mutation_table, expression_table: genes of the sources, by the sample that the file's name tells.
        encoder: name or folder of the encoder that makes the sources' features; features: a file of them instead.
        target_features: a file of features, one or one for each image. map_features: a folder of
            `ldm.encoders.feature_map`, which maps the sources' features to those of the targets.
    """

    region: Sequence[int] | None = None
    mpp: float | None = None
    where: Where = ()
    count: int | None = None
    source: Sequence[str] = ()
    targets: Sequence[str] = ()
    edits: Sequence[str] = ()
    spec: Path | None = None
    table: Path | None = None
    names: bool = False
    mutation_table: Path | None = None
    expression_table: Path | None = None
    encoder: str | None = None
    features: Path | None = None
    target_features: Path | None = None
    map_features: Path | None = None


def pictures_and_plans(
    model: LatentDiffusion, images: Path, asked: AskedTranslations
) -> tuple[list[Picture], list[Plan]]:
    """The images, and the plan of each; those that a specification or table leaves out are not among them.

    >>> model = ldm.load_model(models / "demo-omics")
    >>> asked = AskedTranslations(source=["class=COAD"], targets=["class=HNSC"], count=1)
    >>> pictures, plans = pictures_and_plans(model, cells / "Normal", asked)
    >>> len(pictures), plans[0].targets[0].label
    (1, 'HNSC')
    """
    conditioner = model.cond_stage_model
    _check_flags(conditioner, asked)
    if holds_stores(images):
        if asked.region or asked.mpp:
            raise UserError(f"--region and --mpp are of image files; {images} is a tile store.")
        tiles = AskedTiles(images, where=asked.where, conditions=asked.source, count=asked.count)
        found = requested_tiles(model, tiles)
        if found.absent:
            print(f"{images} has no {', '.join(found.absent)}: unknown to the model")
        pictures = _tiles(images, found.about)
        known = [{**{key: values[i] for key, values in found.values.items()}, **found.fixed} for i in range(len(found))]
        image_key = [*keys_of(conditioner, "image"), *keys_of(conditioner, "control")]
        known = [{key: value for key, value in own.items() if key not in image_key} for own in known]
    else:
        if asked.where:
            raise UserError(f"--where selects tiles of a store; {images} is none.")
        pictures = _files(images, asked.region, asked.mpp)[: asked.count]
        known = [parse_conditions(conditioner, asked.source) for _ in pictures]
    if asked.names:
        known = [{**_named(conditioner, picture.file), **own} for picture, own in zip(pictures, known)]
    for kind, path in {"mutation": asked.mutation_table, "expression": asked.expression_table}.items():
        if path is not None:
            _add_genes(conditioner, kind, path, pictures, known)
    mapped: Sequence[Target | None] = [None] * len(pictures)
    if asked.encoder or asked.features or asked.map_features or asked.target_features:
        mapped = _with_features(model, pictures, known, asked)
    if listed := asked.spec or asked.table:
        own = {picture.file: values for picture, values in zip(pictures, known)}
        read = read_pairs if asked.spec is None else read_spec
        found_plans = read(listed, conditioner, list(own), own.__getitem__)
        pictures = [picture for picture in pictures if picture.file in found_plans]
        plans = [found_plans[picture.file] for picture in pictures]
    else:
        plans = [plan_of_flags(conditioner, values, asked.targets, asked.edits) for values in known]
        plans = [plan if target is None else _with_target(plan, target) for plan, target in zip(plans, mapped)]
    return pictures, _whole_plans(model, plans)


def plan_of_all(
    model: LatentDiffusion, asked: AskedTranslations, what: str = "volumes", also: Sequence[str] = ()
) -> Plan:
    """The plan of all slices of volumes, or of a slide: of source, targets and edits.

    also: what may be asked besides. UserError for what is of images by name.

    >>> model = ldm.load_model(models / "demo-slices")
    >>> plan_of_all(model, AskedTranslations()).targets
    [Target(label='translated', values={})]
    """
    told = dict.fromkeys(("source", "targets", "edits"), ()) | dict.fromkeys(also)
    if given := [name for name, value in vars(replace(asked, **told)).items() if value]:
        raise UserError(f"{', '.join(given)}: that is of images, not of {what}; leave the option out.")
    _check_flags(model.cond_stage_model, asked)
    source = parse_conditions(model.cond_stage_model, asked.source)
    return _whole_plans(model, [plan_of_flags(model.cond_stage_model, source, asked.targets, asked.edits)])[0]


def _whole_plans(model: LatentDiffusion, plans: list[Plan]) -> list[Plan]:
    """Plans with a target each, whose values the model takes."""
    if model.image_condition:
        plans = [plan if plan.targets else Plan(plan.source, [Target("translated", plan.source)]) for plan in plans]
    if not all(plan.targets for plan in plans):
        raise UserError(
            f"say what the images shall become: --target name=value ({', '.join(model.cond_stage_model.keys)}), "
            "--edit, --target-features, --map-features, --table or --spec."
        )
    _check_values(model.cond_stage_model, plans)
    return plans


def _files(path: Path, region: Sequence[int] | None, mpp: float | None) -> list[Picture]:
    """The images of a file or folder, about where they come from. UserError: two of one name, a region of several."""
    pictures = list(read_pictures(path, subfolders=False, mpp=mpp))
    names = [picture.name for picture in pictures]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path} has two images called {twice}; outputs are named like the inputs, so rename one.")
    if region is not None and len(pictures) > 1:
        raise UserError(f"--region is of one image; {path} holds {len(pictures)}.")
    place = {} if region is None else {"region": ",".join(map(str, region))}
    part = None if region is None else tuple(region)
    return [replace(picture, about={"source_image": picture.path.name} | place, region=part) for picture in pictures]


def _tiles(path: Path, asked: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Tiles of stores: those that `requested_tiles` chose, by their slide (source) and row."""
    stores = {store.slide: store for store in open_cohort(path)}
    tiles = []
    for own in asked:
        slide, row = own["source"], int(own["row"])
        tile = stores[slide].picture(row, {"source_image": slide, **own})
        tiles.append(replace(tile, file=f"{slide}_{row:06d}.png"))
    return tiles


def _check_values(conditioner: Conditioner | None, plans: Sequence[Plan]) -> None:
    """UserError for a class, a number or a gene's value that the model does not take."""
    if conditioner is None:
        return
    simple = {key for kind in CHECKED for key in keys_of(conditioner, kind)}
    seen = set()
    for plan in plans:
        for values in (plan.source, *(target.values for target in plan.targets)):
            given = {key: value for key, value in values.items() if key in simple}
            if given and (words := repr(given)) not in seen:
                seen.add(words)
                conditioner.read(given)


def _check_flags(conditioner: Conditioner | None, asked: AskedTranslations) -> None:
    flags = {
        "--source": asked.source,
        "--target": asked.targets,
        "--edit": asked.edits,
        "--target-features": asked.target_features,
        "--map-features": asked.map_features,
    }
    given = [name for name, value in flags.items() if value]
    if asked.spec is not None and asked.table is not None:
        raise UserError("give a specification (--spec) or a table of pairs (--table), not both.")
    whole = "--spec" if asked.spec is not None else "--table" if asked.table is not None else None
    if whole and given:
        raise UserError(f"{whole} says what images are and become; leave {', '.join(given)} out, or the {whole[2:]}.")
    if conditioner is None and (whole or given):
        raise UserError(f"the model is unconditional; it takes no {whole or given[0]}.")


def _named(conditioner: Conditioner | None, file: str) -> dict[str, Any]:
    found = {} if conditioner is None else mmdm_source(conditioner, file)
    if not found:
        raise UserError(
            f"{file}: --class-of-name is for models of classes and files called <class>__<anything>.png, as "
            "TCGA-COAD__a.png."
        )
    return found


def _add_genes(
    conditioner: Conditioner | None, kind: str, path: Path, pictures: Sequence[Picture], known: Sequence[dict[str, Any]]
) -> None:
    """The genes of each picture's sample, of a table of samples and genes."""
    keys = keys_of(conditioner, kind)
    if not keys:
        raise UserError(f"the model is not conditioned on {kind}; leave --{kind}-table out.")
    genes = conditioner.describe()[keys[0]].genes
    table = read_gene_table(path, kind)
    if not set(genes) & set(table.genes):
        raise UserError(f"{path} has none of the model's genes ({some(genes, 5)}); it has {some(table.genes, 5)}.")
    columns = {gene: table.genes.index(gene) for gene in genes if gene in set(table.genes)}
    rows = {sample: row for row, sample in enumerate(table.samples)}
    missing = []
    for picture, own in zip(pictures, known):
        name = picture.name.partition("__")[2] or picture.name
        told = barcode(name)
        row = next((rows[n] for n in (name, *(reversed(told) if told else ())) if n in rows), None)
        if row is None:
            missing.append(picture.file)
            continue
        values = gene_values(None, genes)
        for gene, column in columns.items():
            values[genes.index(gene)] = table.values[row, column]
        own.setdefault(keys[0], values)
    if len(missing) == len(pictures):
        raise UserError(
            f"{path} has no sample of these images; it knows {some(table.samples, 3)}, the images are "
            f"{some(missing, 3)}."
        )


def _with_features(
    model: LatentDiffusion, pictures: Sequence[Picture], known: Sequence[dict[str, Any]], asked: AskedTranslations
) -> Sequence[Target | None]:
    """Adds the sources' features to what is known; gives the targets that features make."""
    target_features, map_features = asked.target_features, asked.map_features
    keys, dim = keys_of(model.cond_stage_model, "features"), feature_dim(model)
    if not keys:
        raise UserError("the model is not conditioned on features; leave --encoder and the features out.")
    key, count, cells = keys[0], len(pictures), cells_of(model.cond_stage_model)
    if cells > 1 and asked.encoder:
        raise UserError(f"the model takes {cells} x {cells} features for an image: give them with --features.")
    transport = None if map_features is None else load_transport(map_features)
    own_dim = dim if transport is None else transport.dim
    values = None
    if asked.features is not None:
        values = _rows(asked.features, count, own_dim, cells)
    elif asked.encoder is not None:
        values = _encoded(model, pictures, asked.encoder, check=transport is None)
    elif all(key in own for own in known):
        values = np.stack([np.asarray(own[key], np.float32) for own in known])
        values = values if cells > 1 else values.reshape(len(known), -1)
    if values is not None and values.shape[1] == dim:
        for own, row in zip(known, values):
            own[key] = row
    if target_features is not None:
        if map_features is not None:
            raise UserError("give --target-features or --map-features, not both.")
        return [Target(safe(target_features.stem), {key: row}) for row in _rows(target_features, count, dim, cells)]
    if transport is None:
        return [None] * count
    if values is None:
        raise UserError("--map-features maps the sources' features: give them with --features, or an --encoder.")
    rows = np.moveaxis(values, 1, -1)  # (N,D), or (N,cells,cells,D)
    mapped = transport.map(torch.from_numpy(rows.reshape(-1, rows.shape[-1]))).numpy()
    mapped = np.moveaxis(mapped.reshape(*rows.shape[:-1], -1), -1, 1)
    if mapped.shape[1] != dim:
        raise UserError(f"{map_features} maps to features of {mapped.shape[1]} values, the model takes {dim}.")
    return [Target("mapped", {key: row}) for row in mapped]


def _rows(path: Path, count: int, dim: int | None, cells: int) -> np.ndarray:
    values = features_in(path, dim, cells)
    if len(values) not in (1, count):
        raise UserError(f"{path} has {len(values)} features for {count} images; give one, or one for each in order.")
    return np.broadcast_to(values, (count, *values.shape[1:])).astype(np.float32)


def _encoded(model: LatentDiffusion, pictures: Sequence[Picture], encoder: str, check: bool) -> np.ndarray:
    net = load_encoder(encoder, device=str(model.device))
    if check:
        check_encoder(model, {"encoder": net.name}, Path(encoder))
    found = []
    for picture in pictures:
        pixels = torch.from_numpy(np.array(picture.pixels())).movedim(-1, 0)[None].float() / 127.5 - 1
        found.append(net(pixels.to(model.device)).float().cpu().numpy())
    return np.concatenate(found)


def _with_target(plan: Plan, target: Target) -> Plan:
    """The plan whose targets have the values of another too; of that alone if it has none."""
    for each in plan.targets:
        each.values = {**each.values, **target.values}
    return plan if plan.targets else Plan(plan.source, [Target(target.label, {**plan.source, **target.values})])
