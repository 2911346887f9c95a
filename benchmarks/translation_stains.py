"""Virtual staining by inversion: tiles of one stain under another's class, judged by a classifier of real tiles.

    python benchmarks/translation_stains.py --model MODEL --tiles COHORT [--count 24] [--guidance 2] [--out PNG]

All tiles translated are of regions that nothing was trained on (split `val`). Printed for each source and target: how
many of the translated tiles the classifier calls the target's, and the SSIM of the haematoxylin channel (colour
deconvolution) with the source's, beside that of real target tiles of another place; with the middle 95% over draws of
tiles. The classifier is a small convolutional network trained here on the real tiles of the training regions; its
accuracy on held-out real tiles is printed first.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import rgb2hed
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from ldm import load_model
from ldm.data import dihedral
from ldm.data.datasets import TileDataset
from ldm.data.images_out import save_png, to_uint8
from ldm.diffusion.guidance import expand_cond
from ldm.inference import guided_denoiser, sampling_sigmas
from ldm.requests import evenly
from ldm.translation import invertible, translate


def tiles_of(cohort: str, column: str, name: str, split: str, count: int | None = None) -> Tensor:
    """Tiles (N,3,H,W) in [-1,1] of one class, evenly chosen."""
    tiles = TileDataset(cohort, ("image",), where={column: name, "split": split})
    return torch.stack([tiles[int(i)]["image"] for i in evenly(len(tiles), count)])


def train_classifier(tiles: dict[str, Tensor], steps: int, seed: int = 0) -> nn.Module:
    """A classifier (B,3,H,W) -> (B,K) of real tiles, in random orientation, brightness and contrast."""
    torch.manual_seed(seed)
    widths = (3, 16, 32, 64)
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.ReLU()) for a, b in pairwise(widths)
    ]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(tiles)))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        labels = torch.randint(len(tiles), (32,), generator=rng)
        classes = [list(tiles.values())[k] for k in labels]
        images = [each[int(torch.randint(len(each), (), generator=rng))] for each in classes]
        batch = dihedral.apply(torch.stack(images), int(torch.randint(8, (), generator=rng)))
        contrast = 0.8 + 0.4 * torch.rand(32, 1, 1, 1, generator=rng)
        shift = 0.2 * torch.randn(32, 1, 1, 1, generator=rng)
        loss = F.cross_entropy(network(batch * contrast + shift), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def haematoxylin(images: Tensor) -> np.ndarray:
    """The haematoxylin channel (N,H,W) of images (N,3,H,W) in [-1,1]."""
    return rgb2hed(to_uint8(images))[..., 0].astype(np.float32)


def likeness(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """SSIM (N,) of haematoxylin channels, each as it spreads around its own mean: stains differ in strength."""
    normed = [
        (each - each.mean((1, 2), keepdims=True)) / (each.std((1, 2), keepdims=True) + 1e-6) for each in (first, second)
    ]
    return np.array([structural_similarity(a, b, data_range=4.0) for a, b in zip(*normed)])


def interval(values: np.ndarray, draws: int = 2000) -> str:
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="model folder or run, conditioned on a class")
    add("--tiles", required=True, help="cohort with the splits train and val")
    add("--column", default="patient", help="of the cohort's table, that names the class (default %(default)s)")
    add("--count", type=int, default=24, help="tiles of each source (default %(default)s)")
    add("--steps", type=int, default=20)
    add("--strength", type=float, default=1.0, help="of the inversion")
    add("--guidance", type=float, default=2.0, help="scale on the way back")
    add("--exact", action="store_true", help="invert by fixed points")
    add("--classifier-steps", type=int, default=100)
    add("--out", help="picture: sources, and under them each target, then real tiles of it")
    options = parser.parse_args()
    model = load_model(options.model)
    (key,) = model.cond_stage_model.keys
    names = model.cond_stage_model.describe()[key]["names"]
    classifier = train_classifier(
        {name: tiles_of(options.tiles, options.column, name, "train", 500) for name in names}, options.classifier_steps
    )
    real = {name: tiles_of(options.tiles, options.column, name, "val") for name in names}
    with torch.no_grad():
        right = [(classifier(real[name]).argmax(1) == k).float().mean().item() for k, name in enumerate(names)]
    known = ", ".join(f"{name} {part:.0%} of {len(real[name])}" for name, part in zip(names, right))
    print(f"classifier, held-out real tiles: {known}")
    levels = invertible(sampling_sigmas(model, options.steps, "uniform"), options.strength)
    encoder, decoder = guided_denoiser(model, 1.0), guided_denoiser(model, options.guidance)
    conditions = {name: model.condition(**{key: name}) for name in names}
    pages, called_all, kept_all, other_all = [], [], [], []
    for source in names:
        chosen = real[source][evenly(len(real[source]), options.count)]
        targets = [name for name in names if name != source]
        with torch.no_grad():
            found = translate(
                encoder, decoder, chosen, levels, expand_cond(conditions[source], len(chosen)),
                [expand_cond(conditions[name], len(chosen)) for name in targets], exact=options.exact,
            )  # fmt: skip
        page, own = [to_uint8(chosen[:12])], haematoxylin(chosen)
        for name, image in zip(targets, found):
            image = image.clamp(-1, 1)
            other = real[name][evenly(len(real[name]), len(chosen))]
            with torch.no_grad():
                called = (classifier(image).argmax(1) == names.index(name)).float().numpy()
            kept, random = likeness(own, haematoxylin(image)), likeness(own, haematoxylin(other))
            called_all, kept_all, other_all = [*called_all, called], [*kept_all, kept], [*other_all, random]
            print(
                f"{source:>6} -> {name:6} {len(chosen)} tiles: called {name} {interval(called)}; haematoxylin SSIM "
                f"with the source {interval(kept)}, of real {name} tiles {interval(random)}",
                flush=True,
            )
            page += [to_uint8(image[:12]), to_uint8(other[:12])]
        pages.append(np.concatenate([np.concatenate(list(row), 1) for row in page]))
    called, kept, other = (np.concatenate(each) for each in (called_all, kept_all, other_all))
    shares = f"SSIM {interval(kept)}, of real target tiles {interval(other)}"
    print(f"all {len(called)}: called the target {interval(called)}; {shares}")
    if options.out:
        page = np.concatenate(pages).repeat(2, 0).repeat(2, 1)
        content = "source, then for each target: translation, real tiles"
        save_png(options.out, page, {"content": content, "model": options.model})


if __name__ == "__main__":
    main()
