"""Do cells follow the score they are asked for? Sequences of one noise, scored by networks that the model never met.

    python benchmarks/mitosis_sequences.py --model MODEL --scorer SCORER [--sequences 64] [--guidance 1 2 4] [--out PNG]

Prints Spearman's correlation of the condition with the scorer's mean over all images of all sequences, with the middle
95% over draws of sequences; how often the scorer's own order within a sequence is the condition's; and the mean score
at each value. For comparison: the size of the correlation when the scores within each sequence are dealt out
anew.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ldm import load_model
from ldm.commands.sequence_pictures import sheet
from ldm.images.write import save_png, to_uint8
from ldm.sampling.sampler import PRECISIONS, Sampler
from ldm.sampling.sweeps import Sweep, parse_sweep, sweep_noise
from ldm.scorers.calibration import spearman, with_intervals
from ldm.scorers.ensemble import load_scorer


@dataclass(frozen=True)
class Followed:
    """Sequences and how they follow what they are asked for.

    made: (S,N,3,H,W). scores: (S,N). spearman: of all images; low, high: its 95% interval over draws of sequences.
    within: its mean within a sequence; dealt: what scores dealt out anew within sequences stay below in 95% of draws.
    """

    made: Tensor
    scores: np.ndarray
    spearman: float
    low: float
    high: float
    within: float
    dealt: float


def measure(
    model: nn.Module, scorer: nn.Module, sweep: Sweep, guidance: float, sequences: int = 64, steps: int = 15,
    seed: int = 0, precision: str = "fp32",
) -> Followed:  # fmt: skip
    """Sequences of one noise each, and what the scorer says of them."""
    values = np.array(sweep.values)
    conditions = [model.condition(**{sweep.name: value}) for value in sweep.values]
    sampler = Sampler(
        steps=steps, guidance_scale=guidance, seed=seed, batch_size=sequences, precision=precision, progress=False
    )
    made = sweep_noise(model, conditions, sequences, sampler)
    with torch.no_grad():
        scores = scorer(made.flatten(0, 1)).view(made.shape[:2]).numpy()  # (S,N)
    asked, groups = np.tile(values, len(scores)), np.repeat(np.arange(len(scores)), len(values))

    def correlation(rows: np.ndarray) -> dict[str, float]:
        return {"": spearman(asked[rows], scores.ravel()[rows])}

    own, low, high = with_intervals(correlation, groups, seed=seed)[""]
    within = np.mean([spearman(values, row) for row in scores])
    rng = np.random.default_rng(seed)
    dealt = [abs(spearman(asked, rng.permuted(scores, axis=1).ravel())) for _ in range(200)]
    return Followed(made, scores, own, low, high, float(within), float(np.quantile(dealt, 0.95)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="model folder conditioned on a score")
    add("--scorer", required=True, help="scorer folder")
    add("--vary", default="score=0:1:5", help="condition and its values (default %(default)s)")
    add("--sequences", type=int, default=64)
    add("--guidance", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="scales to compare")
    add("--steps", type=int, default=15)
    add("--seed", type=int, default=0)
    add("--precision", default="fp32", choices=PRECISIONS)
    add("--out", help="picture of the first 8 sequences at the last scale, with the scorer's curves")
    options = parser.parse_args()
    model, scorer, sweep = load_model(options.model), load_scorer(options.scorer), parse_sweep(options.vary)
    for scale in options.guidance:
        found = measure(model, scorer, sweep, scale, options.sequences, options.steps, options.seed, options.precision)
        print(
            f"guidance {scale:g}, {len(found.scores)} sequences of {len(sweep.values)}, {options.steps} steps: "
            f"Spearman {found.spearman:.3f} (95%: {found.low:.3f} to {found.high:.3f}); within a sequence "
            f"{found.within:.3f}; dealt out anew at most {found.dealt:.3f} (95%)"
        )
        means = ", ".join(f"{value:g}: {mean:.2f}" for value, mean in zip(sweep.values, found.scores.mean(0)))
        print(f"  mean of the scorer at {sweep.name} {means}", flush=True)
    if options.out:
        about = {"model": str(options.model), "condition": options.vary, "guidance_scale": scale, "seed": options.seed}
        page = sheet(to_uint8(found.made[:8]), np.array(sweep.values), sweep.name, found.scores, None)
        save_png(options.out, page, about)


if __name__ == "__main__":
    main()
