"""Body of `histoldm translate`."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from ldm.commands.outputs import kept_images, provenance, written
from ldm.conditioners.compose import keys_of
from ldm.convert import load_model, weights_of
from ldm.data.extent import scale_differs, tell
from ldm.errors import UserError
from ldm.files import owns, write_text
from ldm.images.pictures import Picture, notes_of
from ldm.images.sheets import MADE, REAL, coloured, difference, labelled_sheet
from ldm.images.write import save_image, save_png, to_uint8
from ldm.requests.edits import Target
from ldm.requests.sampling import AskedSampler
from ldm.requests.spec import Plan
from ldm.requests.translations import AskedTranslations, pictures_and_plans
from ldm.sampling.canvas import decode_latents, encode_images
from ldm.sampling.sampler import Inversion, Sampler, changed
from ldm.sampling.translate import check_shape, settled, translate

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

STEPS = "intermediates"  # folder of the denoised images that are kept
SHOWN = 2048  # px along a large image on which differences are counted and sheets drawn


@dataclass
class Output:
    """One image to make: of which picture, to which target, its name, where, and what it says of itself."""

    picture: int
    target: Target
    name: str
    path: Path
    text: dict[str, Any]


@owns()
def translate_pictures(
    model_path: Path,
    images: Path,
    out: Path,
    device: str,
    asked: AskedTranslations,
    sampler: AskedSampler,
    inversion: Inversion,
    intermediates: int = 0,
    differences: bool | None = None,
) -> None:
    """`histoldm translate`: an image for every target of every image, translations.csv, and a sheet for each image.

    Images are written as they are made; those that a run of the same settings left are kept, those of others are an
    error.
    """
    model = load_model(model_path, device)
    pictures, plans = pictures_and_plans(model, images, asked)
    chosen, inversion = settled(sampler.loaded(model), inversion, model)
    usual = Inversion(enlarge=inversion.enlarge).settled(model)
    for picture in pictures:
        _check_picture(model, picture, inversion.enlarge or 1)
    mpps = {picture.file: _mpp(picture, inversion.enlarge) for picture in pictures}
    tell([*notes_of(pictures), scale_differs(mpps, model.metadata, str(model_path))])
    used = sampler.record(chosen, model, inversion.task) | changed(inversion, usual)
    used |= {"model_sha256": weights_of(model_path)}
    outputs = _outputs(model_path, model, pictures, plans, out, inversion.enlarge, used)
    left_out = Sampler.usual(model, inversion.task) | dict.fromkeys(("exact", "published"), False) | {"strength": 1.0}
    kept = kept_images(out, {output.path: output.text for output in outputs}, left_out | {"start": usual.start})
    if intermediates:
        kept = _with_steps(out, outputs, kept)
    side = model.tile_size // (inversion.enlarge or 1)
    groups = _groups(pictures, plans, outputs, kept, chosen.batch_size, side)
    place = {(output.picture, output.target.label): output for output in outputs}
    with tqdm(total=len(outputs), initial=len(kept), desc="translate", unit="image") as bar:
        for rows in groups:
            own = [plans[i] for i in rows]
            batch = torch.stack([to_tensor(model, pictures[i]) for i in rows])
            source = conditions(model, [plan.source for plan in own])
            told = [[plan.targets[k].values for plan in own] for k in range(len(own[0].targets))]
            targets = [conditions(model, values) for values in told]
            if chosen.classifier is not None:
                guides = [chosen.classifier.target_of(model, values) for values in told]
                targets = [target | guide for target, guide in zip(targets, guides)]
            steps = _Steps(model, out, [pictures[i] for i in rows], own, intermediates)
            bars = replace(chosen, progress=max(pictures[rows[0]].size) > side)
            watch = steps.seen if intermediates else None
            made = translate(model, batch, source, targets, bars, inversion, rows, watch)
            steps.write(used)  # first: an image that is there has them
            for k, results in enumerate(made):
                for plan, i, result in zip(own, rows, results):
                    output = place[i, plan.targets[k].label]
                    if output.path not in kept:
                        mpp = _mpp(pictures[i], inversion.enlarge)
                        save_image(output.path, to_uint8(result), output.text, mpp)
                        bar.update()
    rows = [(each.path.name, pictures[each.picture].file, each.target.label, each.text) for each in outputs]
    write_list(out, rows, chosen.seed)
    differ = bool(asked.edits or asked.spec) if differences is None else differences
    for i, picture in enumerate(tqdm(pictures, desc="sheets", disable=len(pictures) < 8)):
        made_of = [output for output in outputs if output.picture == i]
        done = all(output.path in kept for output in made_of) and (out / "sheets" / f"{picture.name}.png").exists()
        if not done:
            _show(model, picture, made_of, out, differ and not inversion.enlarge, used)
    print(written(len(outputs), len(kept), "images", out, "translations.csv and sheets"))


def _check_picture(model: LatentDiffusion, picture: Picture, times: int) -> None:
    channels = 1 if picture.gray and not keys_of(model.cond_stage_model, "control") else 3  # a layout may be gray
    if model.image_channels == 1:
        channels = 1  # colours that are alike are one channel: seen when it is read
    check_shape(model, channels, picture.size[1] * times, picture.size[0] * times, picture.file)


def to_tensor(model: LatentDiffusion, picture: Picture) -> Tensor:
    """A picture as (C,H,W) in [-1,1], with the model's channels."""
    pixels = picture.pixels()
    if model.image_channels == 1:
        spread = pixels.max(-1).astype(int) - pixels.min(-1)
        if int(spread.max()) > 8:
            raise UserError(f"{picture.file} is in colour, the model works on gray images; convert it to gray first.")
        pixels = pixels[..., :1]
    return torch.from_numpy(np.array(pixels)).movedim(-1, 0).float() / 127.5 - 1


def _mpp(picture: Picture, enlarge: int | None) -> float | None:
    return picture.mpp and picture.mpp / (enlarge or 1)


def words_of(values: Mapping[str, Any]) -> str:
    """Values by condition in words; arrays by their SHA-256.

    >>> words_of({"class": "LUAD", "expression": {"MKI67": 0.5}})
    'class=LUAD expression=MKI67:0.5'
    """
    words = []
    for key, value in values.items():
        if isinstance(value, (np.ndarray, Tensor)):
            value = "sha256:" + hashlib.sha256(np.asarray(value, np.float32).tobytes()).hexdigest()[:12]
        elif isinstance(value, Mapping):
            value = ",".join(f"{name}:{number:g}" for name, number in value.items())
        words.append(f"{key}={value}")
    return " ".join(words)


def _outputs(
    model_path: Path,
    model: LatentDiffusion,
    pictures: Sequence[Picture],
    plans: Sequence[Plan],
    out: Path,
    enlarge: int | None,
    settings: dict[str, Any],
) -> list[Output]:
    outputs = []
    for i, (picture, plan) in enumerate(zip(pictures, plans)):
        for target in plan.targets:
            text = provenance(model_path, model, words_of(target.values), settings) | picture.about
            text |= {"source_condition": words_of(plan.source), "target": target.label, "index": i}
            text |= {"mpp": _mpp(picture, enlarge)} if picture.mpp else {}
            text |= {"enlarge": enlarge} if enlarge else {}
            name = f"{picture.name}__{target.label}"
            path = out / f"{name}{picture.suffix}"
            outputs.append(Output(i, target, name, path, json.loads(json.dumps(text, default=str))))
    return outputs


def _groups(
    pictures: Sequence[Picture],
    plans: Sequence[Plan],
    outputs: Sequence[Output],
    kept: set[Path],
    batch_size: int,
    side: int,
) -> list[list[int]]:
    """Batches in which a picture still lacks an output: of those of one size with targets alike; larger ones than a
    tile of `side` px one by one. They are those of a run that keeps nothing, since others differ in the last bits."""
    missing = {output.picture for output in outputs if output.path not in kept}
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i in range(len(pictures)):
        targets = tuple(tuple(sorted(target.values)) for target in plans[i].targets)
        alike[pictures[i].size, targets, tuple(sorted(plans[i].source))].append(i)
    groups = []
    for (size, *_), members in alike.items():
        many = batch_size if max(size) <= side else 1
        groups += [members[k : k + many] for k in range(0, len(members), many)]
    return [members for members in groups if not missing.isdisjoint(members)]


def conditions(model: LatentDiffusion, values: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The condition of several images, each by its own values; null where there are none."""
    if model.cond_stage_model is None:
        return {}
    conds = [model.condition(**given) if given else model.null_condition() for given in values]
    return {part: torch.cat([cond[part] for cond in conds]) for part in conds[0]}


def _with_steps(out: Path, outputs: Sequence[Output], kept: set[Path]) -> set[Path]:
    """Those of the images that have intermediates too."""
    having = {path.name.rpartition("__step")[0] for path in (out / STEPS).glob("*__step*.png")}
    return {output.path for output in outputs if output.path in kept and output.name in having}


class _Steps:
    """Denoised images on the way down, a bounded number of each."""

    def __init__(
        self, model: LatentDiffusion, out: Path, pictures: Sequence[Picture], plans: Sequence[Plan], count: int
    ):
        self.model, self.out, self.pictures, self.plans, self.count = model, out, pictures, plans, count
        self.held: dict[tuple[int, int], list[Tensor]] = defaultdict(list)

    def seen(self, k: int, step: int, x: Tensor, x0: Tensor) -> None:
        if k >= 0:
            self.held[k, step].append(x0.float().cpu())

    def write(self, settings: Mapping[str, Any]) -> None:
        for k in {k for k, _ in self.held}:
            steps = sorted(step for number, step in self.held if number == k)
            for step in sorted({steps[round(place)] for place in np.linspace(0, len(steps) - 1, self.count)}):
                latents = torch.cat(self.held[k, step]).to(self.model.device)
                decoder = "full" if self.model.small_decoder is None else "small"
                images = to_uint8(decode_latents(self.model, latents, decoder).clamp(-1, 1))
                for picture, plan, image in zip(self.pictures, self.plans, images):
                    name = f"{picture.name}__{plan.targets[k].label}__step{step:03d}.png"
                    save_png(self.out / STEPS / name, image, {"step": step, **settings})


def write_list(out: Path, rows: Sequence[tuple[str, str, str, Mapping[str, Any]]], seed: int) -> None:
    """Write translations.csv, of (file, its source's, target, what the file says of itself).

    >>> about = {"source_condition": "", "condition": "class=B", "index": 0}
    >>> write_list(Path("."), [("a__B.png", "a.png", "B", about)], seed=0)
    >>> Path("translations.csv").read_text().splitlines()[1]
    'a__B.png,a.png,B,,class=B,0,0'
    """
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["file", "source_image", "target", "source_condition", "target_condition", "seed", "index"])
    for file, source, label, about in rows:
        writer.writerow([file, source, label, about["source_condition"], about["condition"], seed, about["index"]])
    write_text(out / "translations.csv", table.getvalue())


@torch.no_grad()
def _show(
    model: LatentDiffusion,
    picture: Picture,
    outputs: Sequence[Output],
    out: Path,
    differ: bool,
    settings: Mapping[str, Any],
) -> None:
    """The sheet of one image and, if wanted, a map of what changed in each of its translations."""
    if max(picture.size) > SHOWN:
        return
    image = to_tensor(model, picture)
    before = to_uint8(image)
    made = [(f"{MADE}: {output.target.label}", Picture.of_file(output.path).pixels()) for output in outputs]
    rows = [[(f"source, {MADE if picture.mark() else REAL}", before), *made]]
    about = {**settings, **picture.about}
    if differ:
        if model.first_stage_model.downsampling > 1:  # what the first stage loses is no change
            factor = model.first_stage_model.downsampling
            h, w = image.shape[-2:]
            padded = pad(image[None], (0, -w % factor, 0, -h % factor), mode="replicate")
            again = decode_latents(model, encode_images(model, padded.to(model.device)))[0, :, :h, :w]
            before = to_uint8(again.clamp(-1, 1))
        changes = [difference(before, after) for _, after in rows[0][1:]]
        most = max(float(np.quantile(change, 0.999)) for change in changes)
        maps = [("changes", np.full_like(before, 255))]
        for output, change in zip(outputs, changes):
            shown = coloured(change, most)
            save_png(
                out / "differences" / f"{picture.name}__{output.target.label}.png",
                shown,
                {**about, "target": output.target.label, "brightest": f"{most:.1f} grey levels"},
            )
            maps.append((f"mean {change.mean():.1f} grey levels", shown))
        rows.append(maps)
    save_png(out / "sheets" / f"{picture.name}.png", labelled_sheet(rows), about)
