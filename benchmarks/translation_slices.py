"""Zero-shot translation of MR slices: a model of one modality makes it out of others that it never saw.

    python benchmarks/translation_slices.py --model MODEL --slices COHORT [--target t1] [--sources t2 fla] [--from 95]

Slices from number `--from` on were not trained on. SSIM and mean absolute error (of 255 grey levels) inside the head,
against the real slice of the target modality, with the middle 95% over draws of slices; after each other way, how much
the last one, the translation, is ahead of it on the same slices:

    source          the source itself
    matched         its histogram made that of the real target (which no user has): the strongest such baseline
    matched, train  its histogram made that of the target's training slices
    SDEdit s        matched, train with noise of strength s, denoised by the same model without its source
    gradient w      from noise, the same model without its source, led by the gradient of the LMI at scale w
    translation     the model with the source's LMI maps, from noise
    mean of K       of so many translations, from K noises (--samples): what they have in common

With --from 0 no slices of the training are there, and the ways that need them (matched, train and SDEdit) are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from einops import rearrange, repeat
from skimage.exposure import match_histograms
from skimage.metrics import structural_similarity
from stain_measures import interval
from torch import Tensor, nn

from ldm import load_model
from ldm.data.datasets import TileDataset
from ldm.diffusion.guidance import clip, likeness_guidance
from ldm.diffusion.samplers import sample_ddpm, sample_dpmpp_2m, sample_euler
from ldm.diffusion.schedules import sigmas_from
from ldm.images.write import save_png
from ldm.networks.lmi import lmi_score
from ldm.rng import fold, sample_noise
from ldm.sampling.guided import PRECISIONS
from ldm.sampling.sampler import Sampler

HEAD = 0.02  # of [0, 1]: darker is outside the head
GAP = 6  # slices between those of the training and the first that is translated


def slices_of(cohort: str, modality: str, low: int, high: int, every: int) -> Tensor:
    """Slices (N,1,H,W) in [-1,1] of a modality."""
    where = {"modality": modality, "slice": {"min": low, "max": high}}
    tiles = TileDataset(cohort, ("image",), gray=True, where=where)
    return torch.stack([tiles[i]["image"] for i in range(0, len(tiles), every)])


def measures(found: Tensor, real: Tensor) -> np.ndarray:
    """SSIM and mean absolute error in grey levels, of each slice, inside the head: (N,2)."""
    rows = []
    for a, b in zip(found.numpy()[:, 0] / 2 + 0.5, real.numpy()[:, 0] / 2 + 0.5):
        head = b > HEAD
        _, ssim = structural_similarity(b, a, data_range=1.0, full=True, gaussian_weights=True, sigma=1.5)
        rows.append((ssim[head].mean(), 255 * np.abs(a - b)[head].mean()))
    return np.array(rows)


def matched(source: Tensor, reference: Tensor) -> Tensor:
    """The source with the reference's histogram inside the head, slice by slice."""
    found = np.full_like(source.numpy(), -1.0)
    for i, image in enumerate(source.numpy()):
        other = reference.numpy() if len(reference) != len(source) else reference.numpy()[i]
        head = image > 2 * HEAD - 1
        found[i][head] = match_histograms(image[head], other[other > 2 * HEAD - 1])
    return torch.from_numpy(found)


@dataclass(frozen=True)
class Translated:
    """Slices of one source in every way: images (N,1,H,W), and their SSIM and mean absolute error (N,2)."""

    ways: dict[str, Tensor]
    rows: dict[str, np.ndarray]
    real: Tensor

    @property
    def last(self) -> str:
        return list(self.ways)[-1]


def measure(
    model: nn.Module, cohort: str, name: str, target: str = "t1", low: int = 95, every: int = 1, steps: int = 25,
    strengths: Sequence[float] = (), gradient: Sequence[float] = (), samples: int = 1, seed: int = 0,
    stochastic: bool = False, precision: str = "fp32",
) -> Translated:  # fmt: skip
    """Slices of the modality `name` as the target's, in every way. low: the first that was not trained on."""
    real, source = (slices_of(cohort, modality, low, 10_000, every) for modality in (target, name))
    sigmas = Sampler(steps=steps).settled(model, "sample").sigmas(model)
    shape = real.shape[1:]
    noise = sample_noise([fold(seed, i) for i in range(len(real))], shape)
    denoiser, null = clip(model.denoiser(PRECISIONS[precision])), model.null_condition()
    null = {part: value.expand(len(real), *value.shape[1:]) for part, value in null.items()}
    ways = {"source": source, "matched": matched(source, real)}
    if low > GAP:
        near = ways["matched, train"] = matched(source, slices_of(cohort, target, 0, low - GAP, 4))
        for strength in strengths:
            levels = sigmas_from(sigmas, strength)
            ways[f"SDEdit {strength:g}"] = sample_dpmpp_2m(denoiser, near + levels[0] * noise, levels, null)

    def likeness(x0: Tensor) -> Tensor:
        return lmi_score((source + 1) / 2, (x0 + 1) / 2)

    for scale in gradient:
        led = likeness_guidance(model.denoiser(), likeness, scale)
        ways[f"gradient {scale:g}"] = sample_euler(clip(led), noise * sigmas[0], sigmas, null)
    found = []
    for sample in range(samples):
        others = [fold(seed + sample, i) for i in range(len(real))]
        run = sample_dpmpp_2m
        if stochastic:
            run = partial(sample_ddpm, noise=lambda step, of=others: sample_noise(of, shape, stream=step + 1))
        start = sample_noise(others, shape) * sigmas[0]
        with torch.no_grad():
            found.append(run(denoiser, start, sigmas, model.condition(image=source)).clamp(-1, 1))
    ways["translation"] = found[0]
    if samples > 1:
        ways[f"mean of {samples}"] = torch.stack(found).mean(0)
    ways = {way: image.clamp(-1, 1) for way, image in ways.items()}
    return Translated(ways, {way: measures(image, real) for way, image in ways.items()}, real)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="model folder or run, trained on the target modality")
    add("--slices", required=True, help="cohort of data_prep.slice_volumes")
    add("--target", default="t1")
    add("--sources", nargs="+", default=["t2", "fla"])
    add("--from", dest="low", type=int, default=95, help="first slice that was not trained on (default %(default)s)")
    add("--every", type=int, default=1, help="take every n-th slice")
    add("--steps", type=int, default=25)
    add("--stochastic", action="store_true", help="translate with ancestral sampling, as published")
    add("--strengths", type=float, nargs="*", default=[0.3, 0.5, 0.7, 0.9])
    add("--gradient", type=float, nargs="*", default=[], help="scales of guidance by the gradient of the LMI")
    add("--samples", type=int, default=1, help="translations that the last way averages (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--precision", default="fp32", choices=list(PRECISIONS))
    add("--out", help="picture of the ways side by side")
    options = parser.parse_args()
    model = load_model(options.model)
    pictures = []
    for name in options.sources:
        made = measure(
            model, options.slices, name, options.target, options.low, options.every, options.steps, options.strengths,
            options.gradient, options.samples, options.seed, options.stochastic, options.precision,
        )  # fmt: skip
        ways, rows, last, real = made.ways, made.rows, made.last, made.real
        print(f"{name} -> {options.target}: {len(real)} slices that were not trained on, {options.steps} steps")
        for way, found in rows.items():
            (ssim, a, b), (mae, c, d) = (interval(found[:, k]) for k in (0, 1))
            line = f"  {way:15} SSIM {ssim:.3f} ({a:.3f} to {b:.3f})   MAE {mae:5.1f} ({c:.1f} to {d:.1f})"
            if way != last:
                ahead = rows[last] - found
                (_, a, b), (_, c, d) = interval(ahead[:, 0]), interval(-ahead[:, 1])
                line += f"   {last} ahead by {a:+.3f} to {b:+.3f}, {c:+.1f} to {d:+.1f}"
            print(line, flush=True)
        chosen = np.linspace(0, len(real) - 1, 3).round().astype(int)
        edits = [way for way in rows if way.startswith("SDEdit")]
        best = [max(edits, key=lambda way, rows=rows: rows[way][:, 0].mean())] if edits else []
        columns = ["source", "matched", *best, *[way for way in rows if way.startswith("gradient")], last]
        shown = [ways[way][chosen] for way in columns] + [real[chosen]]
        shown.append((shown[-2] - shown[-1]).abs() - 1)
        pictures.append(rearrange(shown, "column n 1 h w -> (n h) (column w)"))
    if options.out:
        page = (torch.cat(pictures) / 2 + 0.5).clamp(0, 1).mul(255).byte().numpy()
        content = "source, matched, SDEdit, gradient, translation, real, |difference|"
        about = {"content": content, "model": options.model}
        save_png(options.out, repeat(page, "h w -> (h 2) (w 2) 3"), about)


if __name__ == "__main__":
    main()
