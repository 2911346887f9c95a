"""Do cells follow the score they are asked for? Sequences of one noise, scored by networks that the model never met.

    python benchmarks/mitosis_sequences.py --model MODEL --scorer SCORER [--sequences 64] [--guidance 1 2 4] [--out PNG]

Prints Spearman's correlation of the condition with the scorer's mean over all images of all sequences, with the middle
95% over draws of sequences; how often the scorer's own order within a sequence is the condition's; and the mean score
at each value. For comparison: the size of the correlation when the scores within each sequence are dealt out
anew.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from ldm import inference, load_model
from ldm.commands.sequence_pictures import sheet
from ldm.data.images_out import save_png, to_uint8
from ldm.metrics.scorers import load_scorer
from ldm.sequences import correlation_interval, generated, parse_sweep, rank_correlation


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
    add("--precision", default="fp32", choices=tuple(inference.PRECISIONS))
    add("--out", help="picture of the first 8 sequences at the last scale, with the scorer's curves")
    options = parser.parse_args()
    model, scorer, sweep = load_model(options.model), load_scorer(options.scorer), parse_sweep(options.vary)
    values = np.array(sweep.values)
    conditions = [model.condition(**{sweep.name: value}) for value in sweep.values]
    for scale in options.guidance:
        made = generated(
            model, conditions, options.sequences, steps=options.steps, guidance_scale=scale, seed=options.seed,
            batch_size=options.sequences, precision=options.precision, progress=False,
        )  # fmt: skip
        with torch.no_grad():
            scores = scorer(made.flatten(0, 1)).view(made.shape[:2]).numpy()    # (S,N)
        low, high = correlation_interval(values, scores, seed=options.seed)
        within = np.mean([rank_correlation(values, row[None]) for row in scores])
        rng = np.random.default_rng(options.seed)
        dealt = [abs(rank_correlation(values, rng.permuted(scores, axis=1))) for _ in range(200)]
        print(
            f"guidance {scale:g}, {len(scores)} sequences of {len(values)}, {options.steps} steps: Spearman "
            f"{rank_correlation(values, scores):.3f} (95%: {low:.3f} to {high:.3f}); within a sequence {within:.3f}; "
            f"dealt out anew at most {np.quantile(dealt, 0.95):.3f} (95%)"
        )
        means = ", ".join(f"{value:g}: {mean:.2f}" for value, mean in zip(values, scores.mean(0)))
        print(f"  mean of the scorer at {sweep.name} {means}", flush=True)
    if options.out:
        about = {"model": str(options.model), "condition": options.vary, "guidance_scale": scale, "seed": options.seed}
        save_png(options.out, sheet(to_uint8(made[:8]), values, sweep.name, scores, None), about)


if __name__ == "__main__":
    main()
