"""Translation between modalities on whole heads, each by itself, beside what a change of grey levels alone can do.

    python benchmarks/translation_heads.py --model MODEL --slices COHORT --subjects patient19 --sources t2 flair

COHORT is what `data_prep.slice_volumes` wrote; the subjects should be heads that did not train the model. SSIM, PSNR
(dB) and mean absolute error (of 255 grey levels) inside the head, against the real slice of the target modality, with
the middle 95% over draws of slices:

    source        the source itself
    matched       its histogram made that of the real target, slice by slice (which no user has)
    linear        the line a + b v of its grey levels that is nearest to the real target of this head (nor that)
    levels        the mean of the real target at each of 64 grey levels of the source: the best that any change of grey
                  levels can do (nor that)
    translation   by the model, black outside the source's head, as `histoldm translate` does with volumes
    mean of K     of so many translations, from K noises (--samples)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange, repeat
from stain_measures import interval
from torch import Tensor, nn
from translation_slices import HEAD, matched, measures

import ldm
from ldm.data.datasets import TileDataset
from ldm.data.volumes import head_in
from ldm.images.write import save_png

LEVELS = 64


def slices_of(cohort: str, subject: str, modality: str, every: int) -> Tensor:
    """Slices (N,1,H,W) in [-1,1]."""
    tiles = TileDataset(cohort, ("image",), gray=True, where={"modality": modality, "subject": subject})
    return torch.stack([tiles[i]["image"] for i in range(0, len(tiles), every)])


def linear(source: Tensor, real: Tensor) -> Tensor:
    """The line of the source's grey levels nearest to the real target inside the head."""
    inside = (source > 2 * HEAD - 1) & (real > 2 * HEAD - 1)
    slope, start = np.polyfit(source[inside].numpy(), real[inside].numpy(), 1)
    return torch.where(source > 2 * HEAD - 1, slope * source + start, -1.0).clamp(-1, 1)


def levels(source: Tensor, real: Tensor) -> Tensor:
    """The mean of the real target at each grey level of the source."""
    inside = (source > 2 * HEAD - 1) & (real > 2 * HEAD - 1)
    place = ((source + 1) / 2 * LEVELS).long().clamp(max=LEVELS - 1)
    sums = torch.zeros(LEVELS).index_add(0, place[inside], real[inside])
    counts = torch.bincount(place[inside], minlength=LEVELS)
    table = torch.where(counts > 0, sums / counts.clamp(min=1), -1.0)
    return torch.where(source > 2 * HEAD - 1, table[place], -1.0)


def clamped(made: Tensor, source: Tensor) -> Tensor:
    """Black outside the source's head."""
    head = torch.from_numpy(np.stack([head_in(image[0] / 2 + 0.5) for image in source.numpy()]))[:, None]
    return torch.where(head, made, -1.0)


def ways(
    model: nn.Module, source: Tensor, real: Tensor, steps: int, samples: int, precision: str | None = None
) -> dict[str, Tensor]:
    """The slices of a head in every way: images (N,1,H,W) in [-1,1]."""
    found = {"source": source, "matched": matched(source, real)}
    found |= {"linear": linear(source, real), "levels": levels(source, real)}
    made = []
    for sample in range(samples):
        sampler = ldm.Sampler(steps=steps, seed=sample, guidance_scale=1.0, precision=precision, progress=False)
        made.append(clamped(ldm.translate(model, source, sampler=sampler, first=[0] * len(source)), source))
    found["translation"] = made[0]
    return found | ({f"mean of {samples}": torch.stack(made).mean(0)} if samples > 1 else {})


def rows_of(found: Tensor, real: Tensor) -> np.ndarray:
    """SSIM, PSNR and mean absolute error of each slice: (N,3)."""
    squares = [(a - b)[b > 2 * HEAD - 1].square().mean() / 4 for a, b in zip(found, real)]
    ssim, error = measures(found, real).T
    return np.stack([ssim, -10 * np.log10(np.array(squares)), error], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--slices", required=True, help="cohort of data_prep.slice_volumes")
    add("--subjects", nargs="+", required=True)
    add("--target", default="t1")
    add("--sources", nargs="+", default=["t2", "flair"])
    add("--every", type=int, default=1, help="take every n-th slice")
    add("--steps", type=int, default=8)
    add("--samples", type=int, default=1, help="translations that the last way averages (default %(default)s)")
    add("--out", help="picture of source, matched, translation and real")
    options = parser.parse_args()
    model, pictures = ldm.load_model(options.model), []
    for subject in options.subjects:
        real = slices_of(options.slices, subject, options.target, options.every)
        for name in options.sources:
            source = slices_of(options.slices, subject, name, options.every)
            made = ways(model, source, real, options.steps, options.samples)
            print(f"{subject}: {name} -> {options.target}, {len(real)} slices, {options.steps} steps")
            for way, images in made.items():
                figures = [interval(column) for column in rows_of(images, real).T]
                told = [f"{a:.{n}f} ({b:.{n}f} to {c:.{n}f})" for n, (a, b, c) in zip((3, 1, 1), figures)]
                print(f"  {way:12} SSIM {told[0]}   PSNR {told[1]}   error {told[2]}", flush=True)
            pictures.append(sheet([source, made["matched"], list(made.values())[-1], real]))
    if options.out:
        page = (torch.cat(pictures) / 2 + 0.5).clamp(0, 1).mul(255).byte().numpy()
        about = {"content": "rows: source, matched, translation, real", "model": options.model}
        save_png(options.out, repeat(page, "h w -> (h 2) (w 2) 3"), about)


def sheet(rows: Sequence[Tensor], count: int = 6) -> Tensor:
    """Some of the slices side by side, a row for each way."""
    chosen = np.linspace(0, len(rows[0]) - 1, count).round().astype(int)
    return rearrange([row[chosen] for row in rows], "way n 1 h w -> (way h) (n w)")


if __name__ == "__main__":
    main()
