"""Body of `histoldm sequence`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.commands.outputs import kept_images, provenance, written
from ldm.commands.sequence_pictures import film, sheet
from ldm.conditioners.compose import known_key, parse_conditions
from ldm.convert import load_model, weights_of
from ldm.data.collection import read_pictures
from ldm.data.extent import tell
from ldm.data.tile_store import holds_stores
from ldm.data.where import Where
from ldm.errors import UserError
from ldm.files import owns, sha256, write_text
from ldm.images.pictures import Picture, notes_of
from ldm.images.write import save_animation, save_png, to_uint8
from ldm.requests.sampling import AskedSampler
from ldm.requests.tiles import AskedTiles, requested_tiles
from ldm.sampling.sampler import Sampler, Task
from ldm.sampling.sweeps import Sweep, parse_sweep, sweep_images, sweep_noise
from ldm.scorers.calibration import spearman, with_intervals
from ldm.scorers.ensemble import Scorer, load_scorer

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

SHOWN = 16  # sequences on the grid and in the moving picture
MOVING = ("score", "mutation", "expression", "multiplier")  # kinds of conditions that are numbers
COUNT = 8  # sequences, where nothing says how many
ENDINGS = {"gif": ".gif", "apng": ".png", "webp": ".webp"}


@dataclass(frozen=True)
class AskedReal:
    """Real images that sequences start from.

    Attributes:
        images: a file, a folder or a tile store. mpp: micrometres per pixel of files that do not say it; of files, the
            middle is taken.
        where, count: which of them; count is that of all sequences where there are no images.
        source: conditions as name=value, in place of a store's own. strength: of the inversion.
    """

    images: Path | None = None
    mpp: float | None = None
    where: Where = ()
    source: Sequence[str] = ()
    strength: float = 1.0
    count: int | None = None


@owns()
def write_sequences(
    model_path: Path,
    out: Path,
    device: str,
    vary: str,
    fixed: Sequence[str],
    scorer: Path | None,
    animation: str,
    real: AskedReal,
    sampler: AskedSampler,
) -> None:
    """`histoldm sequence`: a PNG for every image, sequences.csv, a grid and a moving picture.

    Images are written as they are made; those that an interrupted run of the same settings left are kept.
    """
    sweep = parse_sweep(vary)
    model, judge = load_model(model_path, device), load_scorer(scorer, device) if scorer else None
    if judge is not None:
        if judge.task.kind == "classes":
            raise UserError(f"{scorer} tells classes; the curve under a sequence is of one score.")
        judge.check_extent(model.tile_size, model.metadata.get("mpp"), str(model_path))
    conditions = conditions_of(model, sweep, fixed)
    starts, sources, names = read_real(model, real)
    names = names if starts is not None else [""] * (real.count or COUNT)
    task: Task = "sample" if starts is None else "sweep"
    chosen = replace(sampler.loaded(model).settled(model, task), progress=False)
    if chosen.classifier is not None:
        target = chosen.classifier.target_of(model, [parse_conditions(model.cond_stage_model, fixed)])
        conditions = [cond | target for cond in conditions]
    about = sampler.record(chosen, model, task)
    if starts is not None:
        about |= {"source_condition": " ".join(real.source)}
        about |= {"strength": real.strength} if real.strength != 1 else {}
    about |= {"vary": vary, "fixed": " ".join(fixed), "model_sha256": weights_of(model_path)}
    places = [(i, k) for i in range(len(names)) for k in range(len(sweep.values))]
    paths = {place: out / "{:05d}_{:02d}.png".format(*place) for place in places}
    texts = {
        paths[i, k]: provenance(model_path, model, " ".join([*fixed, f"{sweep.name}={sweep.texts()[k]}"]), about)
        | {"sequence": i, "position": k}
        | ({"source_image": names[i]} if names[i] else {})
        for i, k in places
    }
    kept = kept_images(out, texts, Sampler.usual(model, task) | {"strength": 1.0})
    with tqdm(total=len(paths), initial=len(kept), desc="sequences", unit="image") as bar:
        for first in range(0, len(names), chosen.batch_size):
            rows = range(first, min(first + chosen.batch_size, len(names)))
            missing = [place for place in places if place[0] in rows and paths[place] not in kept]
            if not missing:
                continue
            part = slice(rows.start, rows.stop)
            if starts is None:
                made = sweep_noise(model, conditions, len(rows), chosen, first)
            else:
                own = {name: value[part] if len(value) > 1 else value for name, value in sources.items()}
                made = sweep_images(model, starts[part], own, conditions, chosen, real.strength)
            pixels = to_uint8(made)  # (rows,N,H,W,3)
            for i, k in missing:
                save_png(paths[i, k], pixels[i - first, k], texts[paths[i, k]])
            bar.update(len(missing))
    scores = None if judge is None else scored(judge, paths, len(sweep.values), device)
    summary = provenance(model_path, model, f"{vary} {' '.join(fixed)}".strip(), about)
    if judge is not None:
        summary["scorer"] = {"name": scorer.name, "sha256": sha256(scorer)[:16]}
    write_list(out, paths, sweep, names, scores)
    shown = np.stack(
        [
            np.stack([Picture.of_file(paths[i, k]).pixels() for k in range(len(sweep.values))])
            for i in range(min(len(names), SHOWN))
        ]
    )  # (S,N,H,W,3)
    first_images = None if starts is None else to_uint8(starts[: len(shown)])
    label = f"{sweep.name} {sweep.part}".strip()
    save_png(out / "grid.png", sheet(shown, sweep.values, label, scores, first_images), summary)
    moving = out / f"sequence{ENDINGS[animation]}"
    save_animation(moving, film(shown, sweep.values, label, scores), summary)
    print(written(len(paths), len(kept), "images", out, f"sequences.csv, grid.png, {moving.name}"))
    if scores is not None:
        values = np.tile(sweep.values, len(scores))
        flat, groups = scores.ravel(), np.repeat(np.arange(len(scores)), len(sweep.values))
        found = with_intervals(lambda rows: {"": spearman(values[rows], flat[rows])}, groups)[""]
        print(
            f"Spearman correlation of {label} with the scorer over {len(scores)} sequences of {len(sweep.values)}: "
            "{:.3f} (95% of resampled sequences: {:.3f} to {:.3f})".format(*found)
        )


def conditions_of(model: LatentDiffusion, sweep: Sweep, fixed: Sequence[str]) -> list[dict[str, Tensor]]:
    """The condition, of one sample, at each place of a sweep, with what stays fixed."""
    conditioner = model.cond_stage_model
    if conditioner is None:
        raise UserError("the model is unconditional: nothing of it varies.")
    key = known_key(conditioner, sweep.name)
    kind = conditioner.describe()[key].kind
    if kind not in MOVING:
        raise UserError(f"'{key}' is a {kind}; what varies is a number: a score, or a gene of mutations or expression.")
    stays = parse_conditions(conditioner, fixed)
    if key in stays:
        raise UserError(f"'{key}' varies; leave it out of --condition.")
    return [model.condition(**stays, **{key: conditioner.parse(key, text)}) for text in sweep.texts()]


def read_real(model: LatentDiffusion, real: AskedReal) -> tuple[Tensor | None, Mapping[str, Tensor], list[str]]:
    """Real images (B,C,H,W) in [-1,1], the condition that they are inverted under, and their names."""
    path, source = real.images, real.source
    if path is None:
        if source or real.where or real.mpp:
            raise UserError("--source, --where and --images-mpp are of real images; give them with --images.")
        return None, {}, []
    if not path.exists():
        raise UserError(f"there are no images at {path}.")
    conditioner = model.cond_stage_model
    condition = model.condition(**parse_conditions(conditioner, source)) if source else model.null_condition()
    side = model.tile_size
    if holds_stores(path):
        tiles = requested_tiles(model, AskedTiles(path, where=real.where, conditions=source, count=real.count))
        pixels = np.stack([tiles.real(i) for i in range(len(tiles))])
        if pixels.shape[1] != side:
            cut = f"tiles of {path} are {pixels.shape[1]} px, the model's {side} px"
            raise UserError(f"{cut}; cut them as its own were.")
        names = [f"{row['source']} row {row['row']}" for row in tiles.about]
        condition = model.condition(**tiles.given(range(len(tiles))))
    else:
        if real.where:
            raise UserError(f"--where selects tiles of a store; {path} is none.")
        wanted = model.metadata.get("mpp")
        if real.mpp is not None and not wanted:
            raise UserError("the model does not know its micrometres per pixel; cut the images to its size.")
        pictures = list(read_pictures(path, subfolders=False, mpp=real.mpp))[: real.count]
        tell(notes_of(pictures))
        extents = [side if real.mpp is None else side * (wanted / own.mpp) for own in pictures]  # in the images' pixels
        pixels = np.stack([own.part(extent).pixels((side, side)) for own, extent in zip(pictures, extents)])
        names = [picture.file for picture in pictures]
    starts = torch.from_numpy(pixels).movedim(-1, 1).float() / 127.5 - 1
    if model.image_channels == 1:
        starts = starts.mean(1, keepdim=True)
    return starts, condition, names


@torch.no_grad()
def scored(judge: Scorer, paths: Mapping[tuple[int, int], Path], positions: int, device: str) -> np.ndarray:
    """What a scorer says of the written images, (S,N)."""
    found = []
    files = list(paths.values())
    for start in range(0, len(files), 64):
        pixels = np.stack([Picture.of_file(path).pixels() for path in files[start : start + 64]])
        images = torch.from_numpy(pixels).movedim(-1, 1).float().to(device) / 127.5 - 1
        found.append(judge(images).cpu().numpy())
    return np.concatenate(found).reshape(-1, positions)


def write_list(
    out: Path, paths: Mapping[tuple[int, int], Path], sweep: Sweep, names: Sequence[str], scores: np.ndarray | None
) -> None:
    """sequences.csv: which file is what."""
    table = io.StringIO()
    label = f"{sweep.name}:{sweep.part}" if sweep.part else sweep.name
    columns = ["file", "sequence", "position", label, "source_image"]
    writer = csv.DictWriter(table, columns + (["scorer"] if scores is not None else []))
    writer.writeheader()
    for (i, k), path in paths.items():
        row = {"file": path.name, "sequence": i, "position": k, label: f"{sweep.values[k]:.6g}"}
        row |= {"source_image": names[i]} | ({} if scores is None else {"scorer": f"{scores[i, k]:.5f}"})
        writer.writerow(row)
    write_text(out / "sequences.csv", table.getvalue())
