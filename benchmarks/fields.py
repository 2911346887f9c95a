"""How fields that a model samples differ from the grids of features of real slides.

    python benchmarks/fields.py --model F --store COHORT [--where split=val] [--fields 4] [--size 32,32] [--seed 0]

Fields are sampled and measured by `ldm.metrics.fields`: how far their features are, wherever they lie, from real ones
(KID and FID in the space of the features), and the correlation of features 1, 2, 4 and 8 tiles apart, beside that of
the real slides with its interval over blocks of 4 x 4 tiles. Real features that --where leaves out tell what is usual;
a line without texture, what the network samples; one of the first stage, what is lost by the components that it does
not keep. Printed is a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import ldm
from ldm.data.datasets import TileDataset
from ldm.data.field_crops import lattice
from ldm.errors import UserError, run_command
from ldm.latent_diffusion import LatentDiffusion
from ldm.metrics.fields import LAGS, field_measures
from ldm.metrics.measure import Measure
from ldm.requests.parse import parse_integers


def real_fields(stores: Sequence[str], feature: str, where: Sequence[str], other: bool = False) -> np.ndarray:
    """The grids of stores as one field (rows,cols,D), below each other and apart, of the tiles that `where` selects.

    other: of those that it does not select.
    """
    tiles = TileDataset(list(stores), ("ssl",), feature, where=list(where) or None)
    parts = []
    for store, chosen in zip(tiles.stores, tiles.conditions.rows):
        places = lattice(store)
        wanted = np.isin(places, chosen) != other
        array = store.features(feature)
        part = np.full((places.shape[0] + max(LAGS), places.shape[1], array.shape[-1]), np.nan, np.float32)
        for row, col in np.argwhere(wanted & (places >= 0)):
            values = np.asarray(array[int(places[row, col])], np.float32)
            part[row, col] = values[0] if values.ndim == 2 else values
        parts.append(part)
    wide = max(part.shape[1] for part in parts)
    gaps = [np.pad(part, ((0, 0), (0, wide - part.shape[1]), (0, 0)), constant_values=np.nan) for part in parts]
    return np.concatenate(gaps)


def sampled_fields(model: LatentDiffusion, count: int, size: tuple[int, int], seed: int, steps: int) -> np.ndarray:
    """So many fields below each other and apart, as one."""
    gap = np.full((max(LAGS), size[1], model.first_stage_model.dim), np.nan, np.float32)
    made = []
    for number in range(count):
        sampler = ldm.Sampler(steps=steps, seed=seed + number)
        made += [ldm.feature_field(model, size, sampler).numpy(), gap]
    return np.concatenate(made)


def line(name: str, found: Sequence[Measure]) -> str:
    """A row of the table: distances, and correlations by lag."""
    known = {measure.name: measure for measure in found}

    def told(key: str, digits: int) -> str:
        measure = known.get(key)
        if measure is None:
            return "-"
        ends = "" if measure.low is None else f" ({measure.low:.{digits}f} to {measure.high:.{digits}f})"
        return f"{measure.value:.{digits}f}{ends}"

    keys = [("kid", 3), ("fid", 1), *((f"correlation_{lag}", 3) for lag in LAGS)]
    return f"| {name} | {' | '.join(told(*key) for key in keys)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="model of fields")
    parser.add_argument("--store", nargs="+", required=True, help="stores, or cohorts, of real slides")
    parser.add_argument("--where", nargs="*", default=[], help="real tiles that fields are compared with: split=train")
    parser.add_argument("--fields", type=int, default=4)
    parser.add_argument("--size", default="32,32", help="width,height of a field in tiles")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = ldm.load_model(args.model)
    if model.makes != "fields":
        raise UserError(f"{args.model} makes {model.makes}, not fields of features.")
    feature = model.metadata["field"]["feature"]
    real = real_fields(args.store, feature, args.where)
    size = parse_integers(args.size, 2, "--size", "width,height")[::-1]
    sampled = sampled_fields(model, args.fields, size, args.seed, args.steps)
    with torch.no_grad():
        codec = model.first_stage_model
        kept = codec.decode(codec.encode(torch.from_numpy(real).permute(2, 0, 1)[None]))[0].permute(1, 2, 0).numpy()
    sets = {f"{args.fields} sampled fields of {args.size} tiles": sampled}
    if codec.rest is not None:
        codec.rest = None
        sets["the same without texture"] = sampled_fields(model, args.fields, size, args.seed, args.steps)
    sets["real, through the first stage"] = kept
    if args.where:
        sets["real, left out by --where"] = real_fields(args.store, feature, args.where, other=True)
    print("| features | KID | FID |", " | ".join(f"r at {lag}" for lag in LAGS), "|")
    print("|---" * (3 + len(LAGS)) + "|")
    own = [measure for measure in field_measures(real, real) if measure.name not in ("kid", "fid")]
    print(line("real", own))
    for name, other in sets.items():
        print(line(name, field_measures(other, real)), flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
