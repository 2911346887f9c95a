"""Pairs of images that should be the same: reconstructions, translations of registered sections.

PSNR, SSIM (Wang et al. 2004), MS-SSIM (Wang et al. 2003), LPIPS (Zhang et al. 2018), SSIM of each stain (optical
densities along haematoxylin, eosin and DAB after Ruifrok & Johnston 2001), mutual information of grey in bits
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from skimage.color import hdx_from_rgb, hed_from_rgb, separate_stains
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError, some
from ldm.images.pictures import Picture, notes_of
from ldm.metrics.intervals import mean_of
from ldm.metrics.measure import HIGHER, LOWER, NONE, Measure, measure_of

SCALES = 5  # of MS-SSIM; the coarsest still holds its window of 11 px
SMALLEST = (11 - 1) * 2 ** (SCALES - 1) + 1
IDENTICAL = 100.0  # dB, for images that are the same
BINS = 64
STAINS = {"he": ("haematoxylin", "eosin"), "hd": ("haematoxylin", "DAB")}
STAIN_RANGE = 0.25  # of separated stains, from none to what the darkest nuclei reach
GREY = 2.0  # mean difference of the colour channels below which an image has no colours
TITLES = {
    "psnr": ("PSNR", HIGHER, "dB"),
    "ssim": ("SSIM", HIGHER, "window of 11 px"),
    "ms_ssim": ("MS-SSIM", HIGHER, f"{SCALES} scales"),
    "lpips": ("LPIPS", LOWER, "perceptual distance"),
    "mutual_information": ("mutual information", HIGHER, f"bits, grey in {BINS} bins"),
    "mae": ("mean absolute error", LOWER, "of 255"),
}


def pair_up(generated: Mapping[str, Path], real: Mapping[str, Path]) -> tuple[list[str], list[str]]:
    """Names that both have, and warnings of those that one lacks. UserError if they share none.

    >>> generated = {"a": Path("new/a.png"), "b": Path("new/b.png")}
    >>> pair_up(generated, {"b": Path("old/b.tif")})
    (['b'], ['1 generated images have no partner and are left out (a).'])
    """
    names = [name for name in generated if name in real]
    if not names:
        raise UserError(
            f"no two images have the same name: one set has {some(list(generated), 3)}, the other "
            f"{some(list(real), 3)}. Pairs are files of the same name in both folders, whatever their ending."
        )
    warnings = []
    for what, own in (("generated", generated), ("real", real)):
        if alone := [name for name in own if name not in names]:
            warnings.append(f"{len(alone)} {what} images have no partner and are left out ({some(alone, 3)}).")
    return names, warnings


def read_pair(generated: Path, real: Path) -> tuple[np.ndarray, np.ndarray]:
    """Both images (H,W,3) uint8. UserError where their sizes differ.

    >>> Image.fromarray(tile).save("a.png")
    >>> [image.shape for image in read_pair(Path("a.png"), Path("a.png"))]
    [(256, 256, 3), (256, 256, 3)]
    """
    a, b = (Picture.of_file(path).pixels() for path in (generated, real))
    if a.shape != b.shape:
        sizes = " and ".join(f"{each.shape[1]} x {each.shape[0]} px" for each in (a, b))
        raise UserError(f"{generated} and {real} are {sizes}; a pair is of one size.")
    return a, b


def compare(
    pairs: Sequence[tuple[Path, Path]],
    stains: str = "he",
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    device: str = "cpu",
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Measures of pairs (generated, real): name -> (N,), NaN where one has no meaning; and warnings.

    stains: `he`, or `hd` for IHC with DAB. perceptual: LPIPS, of images (1,3,H,W) in [-1,1].

    >>> for name, image in {"a.png": tile, "b.png": tile // 2}.items():
    ...     Image.fromarray(image[:64, :64]).save(name)
    >>> values, warnings = compare([(Path("a.png"), Path("b.png"))])
    >>> {name: float(values[name][0]) for name in ("psnr", "ssim", "ssim_eosin")}
    {'psnr': 10.0378, 'ssim': 0.6584, 'ssim_eosin': 0.8021}
    """
    rows: list[dict[str, float]] = []
    grey = small = 0
    for paths in tqdm(pairs, desc="pairs", unit="pair"):
        a, b = read_pair(*paths)
        own = measure(a, b, device)
        small += np.isnan(own["ms_ssim"])
        if min(map(colourfulness, (a, b))) < GREY:
            grey += 1
            own |= {f"ssim_{stain}": np.nan for stain in STAINS[stains]}
        else:
            own |= stain_similarity(a, b, stains, device)
        if perceptual is not None:
            with torch.inference_mode():
                own["lpips"] = float(perceptual(*(_tensor(each, device).float() / 127.5 - 1 for each in (a, b))))
        rows.append(own)
    warnings = notes_of(Picture.of_file(path) for pair in pairs for path in pair)
    if grey:
        warnings.append(f"{grey} of {len(rows)} pairs hold a grey image, which has no stains: left out of their SSIM.")
    if same := sum(row["psnr"] == IDENTICAL for row in rows):
        warnings.append(f"{same} of {len(rows)} pairs are the same image twice, pixel by pixel.")
    if small:
        warnings.append(f"{small} of {len(rows)} pairs are smaller than {SMALLEST} px: they have no MS-SSIM.")
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}, warnings


def _tensor(image: np.ndarray, device: str) -> Tensor:
    """(H,W,C) -> (1,C,H,W) float64: variances of plain areas are small differences of large numbers."""
    return torch.from_numpy(np.array(image)).to(device).double().movedim(-1, 0)[None]


def measure(a: np.ndarray, b: np.ndarray, device: str = "cpu") -> dict[str, float]:
    """PSNR, SSIM, MS-SSIM, mean absolute error and mutual information of two images (H,W,3) uint8.

    >>> measure(tile[:176, :176], tile[:176, :176] // 2)
    {'psnr': 10.1509, 'ssim': 0.6735, 'ms_ssim': 0.8116, 'mae': 74.7352, 'mutual_information': 3.7326}
    """
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure as ms_ssim,
    )

    x, y = _tensor(a, device), _tensor(b, device)
    large = min(a.shape[:2]) >= SMALLEST
    return {
        "psnr": float(psnr(x, y, 255.0)),
        "ssim": similarity(x, y, 255.0),
        "ms_ssim": float(ms_ssim(x, y, data_range=255.0, kernel_size=11)) if large else np.nan,
        "mae": float((x - y).abs().mean()),
        "mutual_information": mutual_information(a, b),
    }


def psnr(x: Tensor, y: Tensor, span: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B,C,H,W); 100 dB at most, which those that are the same have.

    span: of the values: 2 of images in [-1,1], 255 of 8-bit ones.

    >>> psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.2))
    tensor([20.])
    """
    error = (x - y).square().flatten(1).mean(1) / span**2
    return -10 * error.clamp(min=10 ** (-IDENTICAL / 10)).log10()


def similarity(x: Tensor, y: Tensor, span: float) -> float:
    """SSIM of (1,C,H,W), mean over channels, Gaussian window of 11 px; span: of the values.

    >>> x = torch.from_numpy(tile[:64, :64]).movedim(-1, 0)[None].double()
    >>> similarity(x, x, 255.0), similarity(x, x.flip(-1), 255.0)
    (1.0, 0.0633)
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(x, y, data_range=span))


def colourfulness(image: np.ndarray) -> float:
    """Mean range of a pixel's channels, 0 of a grey image.

    >>> colourfulness(tile), colourfulness(np.full((8, 8, 3), 128, np.uint8))
    (100.8877, 0.0)
    """
    return float(np.ptp(image.astype(np.int16), axis=-1).mean())


def stain_similarity(a: np.ndarray, b: np.ndarray, stains: str = "he", device: str = "cpu") -> dict[str, float]:
    """SSIM of the amount of each stain: `ssim_haematoxylin` and so on.

    >>> stain_similarity(tile[:64, :64], tile[:64, :64] // 2)
    {'ssim_haematoxylin': 0.2454, 'ssim_eosin': 0.8021}
    """
    first, second = (stain_amounts(image, stains) for image in (a, b))
    return {
        f"ssim_{name}": similarity(*(_tensor(each[..., [i]], device) for each in (first, second)), STAIN_RANGE)
        for i, name in enumerate(STAINS[stains])
    }


def stain_amounts(image: np.ndarray, stains: str = "he") -> np.ndarray:
    """(...,2): how much of each of STAINS pixels (...,3) uint8 have, in sixths of an optical density.

    >>> stain_amounts(tile).mean((0, 1))
    array([0.0051, 0.0458])
    """
    return separate_stains(image, hed_from_rgb if stains == "he" else hdx_from_rgb).clip(min=0)[..., :2]


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Bits that the grey of one image (H,W,3) says of the other's: KL of their joint histogram from independence.

    >>> mutual_information(tile, tile), mutual_information(tile, tile[::-1])
    (4.9039, 0.0317)
    """
    grey = [each.astype(np.float64).mean(-1).ravel() for each in (a, b)]
    joint = np.histogram2d(*grey, bins=BINS, range=((0, 256), (0, 256)))[0] / grey[0].size
    alone = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    kept = joint > 0
    return float((joint[kept] * np.log2(joint[kept] / alone[kept])).sum())


def pair_measures(measured: Mapping[str, np.ndarray], groups: np.ndarray | None, **settings: int) -> list[Measure]:
    """Means over pairs with their intervals.

    >>> [(m.title, m.value, m.note) for m in pair_measures({"psnr": np.array([20.0, 24.0, np.nan])}, None)]
    [('PSNR', 22.0, 'dB')]
    """
    measures = []
    for name, values in measured.items():
        kept = ~np.isnan(values)
        if not kept.any():
            continue
        title, better, note = TITLES.get(name, (f"SSIM of {name.removeprefix('ssim_')}", HIGHER, "separated stain"))
        own = None if groups is None else groups[kept]
        measures.append(measure_of(name, mean_of(values[kept]), (own, None), title, better or NONE, note, **settings))
    return measures
