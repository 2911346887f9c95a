"""Body of `histoldm translate` for volumes: NIfTI in, NIfTI out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.commands.outputs import differing, provenance
from ldm.commands.translate import conditions, words_of, write_list
from ldm.convert import load_model, weights_of
from ldm.data.volumes import (
    AXES,
    AXIS,
    PERCENTILES,
    WRITTEN,
    Volume,
    cut_slice,
    fitted,
    head_in,
    in_plane,
    name_of,
    put_slice,
    unfitted,
    volumes_in,
    window_of,
    windowed,
)
from ldm.errors import UserError, note
from ldm.files import hidden, owned, remove, sha256, whole, write_text
from ldm.foreign.settings import read_json
from ldm.images.marks import mark_text, read_mark
from ldm.metrics.volumes import roughness
from ldm.requests.edits import Target
from ldm.requests.sampling import AskedSampler
from ldm.requests.spec import Plan
from ldm.requests.translations import AskedTranslations, plan_of_all
from ldm.sampling.sampler import Inversion, Sampler, changed
from ldm.sampling.translate import check_shape, settled, translate

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

OTHERS = (".gz", ".hdr", ".img", ".mgz", ".mha", ".png", ".tif", ".tiff", ".zarr")  # endings that folders do not have
SETTINGS = "settings.json"  # in the folder of what is done of a volume: what made it


@dataclass(frozen=True)
class AskedVolumes:
    """How volumes are cut and what grey levels mean.

    Attributes:
        axis: of the slices; None: the model's (its metadata), else axial.
        window: values of the source that are black and white; None: `percentiles` of its head, see `window_of`; of
            None the model's, else PERCENTILES.
        scale: values that black and white become; None: the model's, else the source's window.
    """

    axis: str | None = None
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    scale: tuple[float, float] | None = None

    def settled(self, trained: Mapping[str, Any]) -> AskedVolumes:
        """The same with what the model knows of its training's volumes, `metadata["volumes"]`.

        >>> AskedVolumes().settled({"axis": 1, "percentiles": [0, 98], "window": [0, 300]})
        AskedVolumes(axis='coronal', window=None, percentiles=(0, 98), scale=(0, 300))
        """
        names = {number: name for name, number in AXES.items()}
        axis = names[AXIS[self.axis]] if self.axis else names.get(trained.get("axis"), "axial")
        low, high = self.percentiles or (0, 100)
        if not 0 <= low <= high <= 100:
            raise UserError(f"--percentiles lie from 0 to 100; got {low:g},{high:g}.")
        if self.window and self.percentiles:
            raise UserError("--window and --percentiles both say what is black and white; give one of them.")
        percentiles = self.percentiles or tuple(trained.get("percentiles") or PERCENTILES)
        scale = self.scale or (tuple(trained["window"]) if trained.get("window") else None)
        return AskedVolumes(axis, self.window, percentiles, scale)


@dataclass
class _Job:
    """A volume: where its outputs go, what they say of themselves, what black and white are before and after."""

    volume: Volume
    values: np.ndarray
    paths: dict[str, Path]
    texts: dict[str, dict[str, Any]]
    window: tuple[float, float]
    scale: tuple[float, float]
    axis: int

    @property
    def count(self) -> int:
        return self.values.shape[self.axis]

    @property
    def plane(self) -> tuple[float, float]:
        return in_plane(self.volume.spacing, self.axis)

    def slice(self, index: int) -> np.ndarray:
        """(H,W) in [0, 1]."""
        return windowed(cut_slice(self.values, self.axis, index), *self.window)


def translate_volumes(
    model_path: Path,
    images: Path,
    out: Path,
    device: str,
    asked: AskedTranslations,
    how: AskedVolumes,
    sampler: AskedSampler,
    inversion: Inversion,
) -> None:
    """`histoldm translate` of volumes: slice by slice, each from the same noise, written as NIfTI like the sources.

    Slices are those of `data_prep.slice_volumes`, resampled to the model's tile and back; those without a head are not
    made, and what lies outside the head is black. Finished batches of slices are kept until the volume is written, so
    that a run that was stopped goes on; a volume that is there is kept if the same settings made it, else it is an
    error.
    """
    paths = volumes_in(images)
    single = out.name.lower().endswith(WRITTEN)
    if not single and out.suffix.lower() in OTHERS:
        raise UserError(f"a volume is written as {' or '.join(WRITTEN)}, or into a folder; got --out {out.name}.")
    if single and len(paths) > 1:
        raise UserError(f"{images} holds {len(paths)} volumes and --out is one, {out.name}; give a folder.")
    if inversion.enlarge:
        raise UserError("--enlarge is of images; a volume keeps its voxels. Leave it out.")
    model = load_model(model_path, device)
    plan = plan_of_all(model, asked)
    if single and len(plan.targets) > 1:
        raise UserError(f"there are {len(plan.targets)} targets and --out is one volume, {out.name}; give a folder.")
    check_shape(model, 1, model.tile_size, model.tile_size, str(images))
    chosen, inversion = settled(sampler.loaded(model), inversion, model)
    used = sampler.record(chosen, model, inversion.task) | changed(inversion, Inversion().settled(model))
    used |= {"model_sha256": weights_of(model_path)}
    usual = Sampler.usual(model, inversion.task) | dict.fromkeys(("exact", "published"), False)
    usual |= {"strength": 1.0, "start": Inversion().settled(model).start}
    how = how.settled(model.metadata.get("volumes") or {})
    volumes = [Volume(path) for path in paths]  # what is wrong with any is told before work
    rows = []
    with owned(out, beside=single):
        for index, volume in enumerate(volumes):
            name = name_of(volume.path)
            places = {t.label: out if single else out / f"{name}__{t.label}.nii.gz" for t in plan.targets}
            job = _job(model_path, model, volume, plan, places, how, used | {"index": index})
            rows += [(path.name, volume.path.name, label, job.texts[label]) for label, path in places.items()]
            if kept := [path for label, path in places.items() if _is_there(path, job.texts[label], usual)]:
                print(f"there already from an earlier run, and kept: {', '.join(map(str, kept))}")
            scratch = hidden(out if single else out / name, ".slices")
            if len(kept) < len(places):
                _make(model, job, plan, chosen, inversion, scratch, kept)
            remove(scratch)
        if not single:
            write_list(out, rows, chosen.seed)


def _job(
    model_path: Path,
    model: LatentDiffusion,
    volume: Volume,
    plan: Plan,
    places: dict[str, Path],
    how: AskedVolumes,
    settings: dict[str, Any],
) -> _Job:
    values = volume.values()
    window = how.window or window_of(values, how.percentiles)[:2]
    if not window[0] < window[1]:
        raise UserError(f"{volume.path} is {window[0]:g} nearly everywhere; give a --window or wider --percentiles.")
    scale = how.scale or window
    about = {"source_image": volume.path.name, "source_sha256": sha256(volume.path), "axis": how.axis,
             "window": list(window), "scale": list(scale), "source_condition": words_of(plan.source)}  # fmt: skip
    texts = {}
    for target in plan.targets:
        text = provenance(model_path, model, words_of(target.values), settings) | about | {"target": target.label}
        texts[target.label] = json.loads(json.dumps(text, default=str))
    return _Job(volume, values, places, texts, window, scale, AXES[how.axis])


def _is_there(path: Path, text: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """UserError for a file that was made otherwise, or is damaged."""
    if not path.exists():
        return False
    found = read_mark(path, whole=True)
    differ = differing(found, text, usual)
    if found and not differ:
        return True
    what = f"was made otherwise ({', '.join(differ)})" if found else "is none of these volumes, or damaged"
    raise UserError(f"{path} is there and {what}; choose another --out, or remove it.")


def _make(
    model: LatentDiffusion, job: _Job, plan: Plan, sampler: Sampler, inversion: Inversion, scratch: Path,
    kept: Sequence[Path],
) -> None:  # fmt: skip
    """Make the volumes of a job that are not kept, and tell how rough they are."""
    side, labels = model.tile_size, list(job.paths)
    heads = [k for k in range(job.count) if head_in(job.slice(k)).any()]
    _prepare(scratch, {"texts": job.texts, "slices": heads, "side": side})
    told = f"{len(heads)} of {job.count} slices"
    with tqdm(total=len(heads), desc=job.volume.path.name, unit="slice") as bar:
        for begin in range(0, len(heads), sampler.batch_size):
            rows = heads[begin : begin + sampler.batch_size]
            if not (part := scratch / f"{rows[0]:05}.npy").exists():
                tiles = np.stack([fitted(job.slice(k), side, job.plane) for k in rows])
                made = _translated(model, tiles, plan, sampler, inversion)
                with whole(part) as path:
                    np.save(path, made)
            bar.update(len(rows))
    parts = sorted(scratch.glob("*.npy"))
    stacks = np.concatenate([np.load(part) for part in parts], 1) if parts else np.zeros((len(labels), 0, side, side))
    seen = np.array([fitted(job.slice(k), side, job.plane) for k in heads]).reshape(-1, side, side)
    inside = np.array([head_in(tile, margin=0) for tile in seen], bool).reshape(seen.shape)
    for label, stack in zip(labels, stacks):
        if (path := job.paths[label]) in kept:
            continue
        job.volume.save(path, _assembled(job, heads, stack), mark_text(job.texts[label]), job.scale)
        own, source = roughness(stack, inside), roughness(seen, inside)
        low, high = job.scale
        print(f"wrote {path}: {told} with a head, black is {low:g} and white {high:g}; through the slices {own:.2f} as "
              f"rough as within, the source {source:.2f}")  # fmt: skip
        if own > source:
            note(f"neighbouring slices of {path.name} agree less than the source's; more --steps may help.")


def _prepare(scratch: Path, settings: Mapping[str, Any]) -> None:
    """A folder for the batches of a volume: what is there of the same settings stays."""
    told = json.loads(json.dumps(settings))
    try:
        same = read_json(scratch / SETTINGS) == told
    except (OSError, UserError):
        same = False
    if not same:
        remove(scratch)
        scratch.mkdir()
        write_text(scratch / SETTINGS, json.dumps(told))


def _translated(
    model: LatentDiffusion, tiles: np.ndarray, plan: Plan, sampler: Sampler, inversion: Inversion
) -> np.ndarray:
    """Tiles (N,side,side) in [0, 1] under each target: (targets,N,side,side). All from one noise."""
    batch = torch.from_numpy(tiles)[:, None] * 2 - 1
    source = conditions(model, [plan.source] * len(tiles))
    targets = []
    for target in plan.targets:
        targets.append(_target(model, target, len(tiles), sampler))
    made = translate(model, batch, source, targets, replace(sampler, progress=False), inversion, [0] * len(tiles))
    return np.stack([(each[:, 0].numpy() + 1) / 2 for each in made])


def _target(model: LatentDiffusion, target: Target, count: int, sampler: Sampler) -> dict[str, Tensor]:
    told = [target.values] * count
    found = conditions(model, told)
    return found if sampler.classifier is None else found | sampler.classifier.target_of(model, told)


def _assembled(job: _Job, slices: Sequence[int], stack: np.ndarray) -> np.ndarray:
    """The volume (X,Y,Z) of a stack of tiles (N,side,side) in [0, 1]: black outside the head."""
    low, high = job.scale
    black = 0.0 if low >= 0 else low
    volume = np.full(job.values.shape, black, np.float32)
    for k, tile in zip(slices, stack):
        own = job.slice(k)
        image = unfitted(tile, own.shape, job.plane).clip(0, 1)
        put_slice(volume, job.axis, k, np.where(head_in(own), low + image * (high - low), black))
    return volume
