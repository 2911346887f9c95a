"""Body of `histoldm resample`: tiles are sampled until enough of them pass a scorer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.commands.filter import parse_above
from ldm.commands.outputs import differing, provenance
from ldm.convert import load_model, weights_of
from ldm.data.collection import LIST, Pictures
from ldm.errors import UserError
from ldm.files import names_in, owns, whole, write_text
from ldm.images.pictures import Picture
from ldm.images.sheets import contact_sheet
from ldm.images.write import save_png, to_uint8
from ldm.requests.sampling import AskedSampler
from ldm.requests.tiles import AskedTiles, Requests, evenly, requested_tiles
from ldm.sampling.sampler import Sampler
from ldm.sampling.tiles import decoded, sample_latents
from ldm.scorers.calibration import proportion
from ldm.scorers.data import to_range
from ldm.scorers.ensemble import Scorer, load_scorer
from ldm.scorers.select import merit
from ldm.tables.text import read_table

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

SETTINGS, ATTEMPTS = "resample.json", "attempts.csv"
RESULTS = ("passed", "attempts", "acceptance")  # in the first, once it is finished
SHOWN = 48
MOST = 4  # attempts of a round for each image that a request lacks


class Log:
    """Attempts so far, of `requests` requests that are to have `needed` images each.

    rows: index (of the noise), request, score, kept_by, kept of each. tried, passed: how many, of each request.
    """

    def __init__(self, needed: int, requests: int):
        self.needed, self.rows = needed, []
        self.tried, self.passed = [0] * requests, [0] * requests

    def lacks(self, request: int) -> bool:
        return self.passed[request] < self.needed

    @property
    def done(self) -> bool:
        return not any(map(self.lacks, range(len(self.passed))))

    def round(self) -> list[int]:
        """The requests of the next attempts: of each that lacks images, as many as its acceptance so far asks for."""
        plan = []
        for r in filter(self.lacks, range(len(self.passed))):
            lacking, share = self.needed - self.passed[r], (self.passed[r] + 1) / (self.tried[r] + 2)
            plan += [r] * (min(math.ceil(lacking / share), MOST * lacking) if self.tried[r] else lacking)
        return plan

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.tried[row["request"]] += 1
        self.passed[row["request"]] += bool(row["kept"])


@owns()
def resample(
    model_path: Path,
    scorer: Sequence[Path],
    out: Path,
    device: str,
    asked: AskedTiles,
    until: int,
    max_attempts: int,
    above: Sequence[str],
    class_name: str | None,
    matches: str | None,
    sampler: AskedSampler,
) -> None:
    """`histoldm resample`: `until` tiles of each request that pass, their list, a contact sheet and all attempts.

    A stopped run goes on, also with a larger `max_attempts`. UserError if
    attempts end before enough pass; what passed stays.
    """
    least = parse_above(above)
    if set(least) != {""}:
        raise UserError("--above takes one number here; requests of a --table that differ are told by --matches.")
    if until < 1 or max_attempts < until:
        raise UserError(f"--until {until} tiles cannot pass in --max-attempts {max_attempts}.")
    network, model = load_scorer(scorer, device), load_model(model_path, device)
    tiles = requested_tiles(model, asked)
    chosen = replace(sampler.loaded(model), progress=False)
    usual, batch_size = Sampler.usual(model, "sample"), chosen.batch_size
    # a mistake in --class or --matches shows before any work
    judged(network, torch.zeros(1, 3, 32, 32, device=device), tiles, [0], class_name, matches)
    network.check_extent(model.tile_size, model.metadata.get("mpp"), str(model_path))
    about = sampler.record(chosen, model, "sample") | {"model_sha256": weights_of(model_path), "scorer": network.name}
    about |= {"scorer_sha256": network.identity, "above": least[""], "class": class_name, "matches": matches}
    begin = about | {"requests": [tiles.digest(i) for i in range(len(tiles))], "until": until}
    held, log, base = _held(out, json.loads(json.dumps(begin)), usual), Log(until, len(tiles)), 0
    quick = chosen.decoder == "full" and model.small_decoder is not None

    def looked_at(latents: Tensor, part: Sequence[int]) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Images, their scores and what they are kept by; what fails as the small decoder makes it stays so."""
        images = decoded(model, latents, "small" if quick else chosen.decoder)
        scores, values = judged(network, images.to(device), tiles, part, class_name, matches)
        passing = np.flatnonzero(values >= least[""]) if quick else []
        if len(passing):
            images[passing] = decoded(model, latents[passing])
            own = [part[i] for i in passing]
            scores[passing], values[passing] = judged(
                network, images[passing].to(device), tiles, own, class_name, matches
            )
        return images, scores, values

    condition_of, sheet_text = _conditions(model, tiles, chosen), provenance(model_path, model, "see tiles.csv", about)
    with tqdm(total=until * len(tiles), desc="resample", unit="passed") as bar:
        while not log.done and len(log.rows) < max_attempts:
            plan = log.round()
            for start in range(0, len(plan), batch_size):
                part, first = plan[start : start + batch_size], base + start
                asked_now = {first + i: r for i, r in enumerate(part) if log.lacks(r)}
                if any(index not in held for index in asked_now):
                    images, scores, values = looked_at(
                        sample_latents(model, condition_of(part), len(part), chosen, first), part
                    )
                for index, request in asked_now.items():
                    if not log.lacks(request) or len(log.rows) >= max_attempts:
                        continue
                    if index not in held:
                        i = index - first
                        row = {"index": index, "request": request, "score": float(scores[i])}
                        held[index] = row | {"kept_by": float(values[i]), "kept": bool(values[i] >= least[""])}
                        if held[index]["kept"]:
                            words = " ".join(f"{k}={v}" for k, v in tiles.about[request].items() if v != "")
                            text = provenance(model_path, model, words, about) | {"index": index, **held[index]}
                            text |= {"condition_sha256": tiles.digest(request)}
                            save_png(_name(out, index), to_uint8(images[i]), text)
                    log.add(held[index])
                    bar.update(held[index]["kept"])
                with whole(out / ATTEMPTS) as file:
                    pd.DataFrame(log.rows).to_csv(file, index=False)
                bar.set_postfix(attempts=len(log.rows))
            base += len(plan)
    _finish(out, log, tiles, chosen.seed, begin, sheet_text)
    if not log.done:
        passed = sum(log.passed)
        share, low, high = proportion(passed, len(log.rows))
        raise UserError(
            f"{passed} of {until * len(tiles)} tiles passed in {len(log.rows)} attempts ({share:.1%} [{low:.1%}, "
            f"{high:.1%}]); a larger --max-attempts goes on from here, a lower --above lets more pass."
        )


def judged(
    network: Scorer,
    images: torch.Tensor,
    tiles: Requests,
    requests: Sequence[int],
    class_name: str | None,
    matches: str | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n,) and what is kept by (n,), of images (n,3,H,W) in [-1,1] made for these requests.

    The scores are of the images as their files hold them.
    """
    pixels = to_uint8(images)
    held = to_range(pixels).permute(0, 3, 1, 2).to(images.device)
    with torch.no_grad():
        mean = network.members(held).float().mean(1).cpu().numpy()
    made = [Picture.of_pixels(image, f"request {r}", tiles.about[r]) for image, r in zip(pixels, requests)]
    values = merit(network.task, mean, Pictures(made, "the requests"), class_name, matches)
    return (mean.max(1) if mean.ndim == 2 else mean), values


def _conditions(
    model: LatentDiffusion, tiles: Requests, sampler: Sampler
) -> Callable[[Sequence[int]], dict[str, Tensor] | None]:
    """A function of places of requests: the model's condition of those, row by row."""
    if model.cond_stage_model is None:
        return lambda requests: None
    given = [tiles.given(range(r, r + 1)) for r in range(len(tiles))]
    each = [model.condition(**values) for values in given]
    if sampler.classifier is not None:
        each = [cond | sampler.classifier.target_of(model, [values]) for cond, values in zip(each, given)]
    if len({tuple((name, value.shape[1:]) for name, value in cond.items()) for cond in each}) > 1:
        raise UserError("the requests' conditions differ in shape; resample them one by one.")
    return lambda requests: {name: torch.cat([each[r][name] for r in requests]) for name in each[0]}


def _name(out: Path, index: int) -> Path:
    return out / f"{index:06d}.png"


def _held(out: Path, begin: dict[str, Any], usual: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Attempts of an earlier run of the same settings by index; UserError if `out` holds anything else."""
    if not (out / SETTINGS).is_file():
        if files := names_in(out):
            raise UserError(f"{out} holds other files ({files[0]}, ...); give an --out that is empty or new.")
        write_text(out / SETTINGS, json.dumps(begin, indent=1))
    before = json.loads((out / SETTINGS).read_text())
    if differ := differing({name: before[name] for name in before if name not in RESULTS}, begin, usual):
        raise UserError(f"{out} holds tiles of other settings ({', '.join(differ)} differ); give another --out.")
    table = out / ATTEMPTS
    rows = read_table(table, numbers=True, missing=("",)).to_dict("records") if table.is_file() else []
    held = {row["index"]: row for row in rows if not row["kept"] or _name(out, row["index"]).is_file()}
    for path in out.glob("[0-9]*.png"):  # made after the attempts were last noted
        if int(path.stem) not in held:
            path.unlink()
    return held


def _finish(out: Path, log: Log, tiles: Requests, seed: int, begin: dict[str, Any], sheet_text: dict[str, Any]) -> None:
    kept = [row for row in log.rows if row["kept"]]
    if kept:
        listed = [
            {"file": _name(out, row["index"]).name, **tiles.about[row["request"]], "seed": seed, "index": row["index"]}
            | {"scored": round(row["score"], 6)}
            for row in kept
        ]
        with whole(out / LIST) as part:
            pd.DataFrame(listed).to_csv(part, index=False)
        shown = [kept[i] for i in evenly(len(kept), SHOWN)]
        images = [Picture.of_file(_name(out, row["index"])).pixels() for row in shown]
        sheet = contact_sheet(images, labels=[f"{r['kept_by']:.3f}" for r in shown], most=256)
        save_png(out / "contact_sheet.png", sheet, sheet_text)
    acceptance = [round(v, 5) for v in proportion(len(kept), len(log.rows))]
    found = dict(zip(RESULTS, (len(kept), len(log.rows), acceptance)))
    write_text(out / SETTINGS, json.dumps(begin | found, indent=1))
    share, low, high = acceptance
    print(f"{len(kept)} of {len(log.rows)} attempts passed: {share:.1%} [{low:.1%}, {high:.1%}]; in {out}")
    for r in range(len(tiles) if len(tiles) > 1 else 0):
        words = " ".join(f"{k}={v}" for k, v in tiles.about[r].items() if k != "source" and v != "")
        print(f"  {words}: {log.passed[r]} of {log.tried[r]}")
