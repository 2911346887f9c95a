"""Random changes of training images: orientation, stain, colour, blur. There are none but those that a config asks for.

    data:
      params:
        augment: {dihedral: true, stain: 0.05, colour: 0.1, blur: 0.1}

Tiles are turned where they are read, with their features, layouts and cached latents (`ldm.data.dihedral`). The numbers
that decide how pixels change are drawn there too, so that they are a function of the item's draw alone; the changes
themselves are made on whole batches, on the training's device, before a first stage or a network sees them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from skimage.color import rgb_from_hed
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import UserError
from ldm.rng import generator

DRAWS = "augmentation"  # batch key of the numbers (B,COUNT) that decide what happens to each image
COUNT = 9  # three stains, brightness, contrast, saturation, hue, whether to blur, how much
STREAM = 0x617567  # tells them from what else an item's draw decides
SIGMA = (0.5, 1.5)  # px, of blurs
KERNEL = 11  # px, three of the largest sigma on each side
STAINS = torch.from_numpy(rgb_from_hed).float()  # rows: densities (3,) of haematoxylin, eosin, DAB


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed at random, each by itself.

    Args:
        dihedral: show tiles in a random one of their eight orientations.
        stain: strength in [0, 1]: the amounts of haematoxylin, eosin and DAB are each multiplied by a factor within
            1 ± stain (Tellez et al. 2018, doi:10.1109/TMI.2018.2820199, without its offset, so that glass stays clear).
        colour: strength in [0, 1]: brightness, contrast and saturation are each multiplied by a factor within
            1 ± colour, and the hue turns by at most `colour` radians.
        blur: share of the images, in [0, 1], that a Gaussian of 0.5 to 1.5 px blurs.

    >>> Augmentation(stain=0.05, blur=0.1)
    Augmentation(dihedral=False, stain=0.05, colour=0.0, blur=0.1)
    """

    dihedral: bool = False
    stain: float = 0.0
    colour: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.dihedral, bool):
            raise UserError(f"augment.dihedral is true or false; got {self.dihedral!r}.")
        for name in ("stain", "colour", "blur"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f"augment.{name} is a number from 0 (off) to 1; got {value!r}.")

    @property
    def of_pixels(self) -> bool:
        """Are pixels changed, and not only turned?"""
        return bool(self.stain or self.colour or self.blur)

    @torch.no_grad()
    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Images (B,C,H,W) in [-1, 1] of 3 channels, to be blurred only of any number, changed as draws (B,COUNT) in
        [0, 1) say. A draw of 0.5 changes nothing but by blur.

        >>> images, draws = torch.zeros(2, 3, 16, 16), torch.rand(2, COUNT)
        >>> Augmentation(colour=0.1)(images, draws).shape
        torch.Size([2, 3, 16, 16])
        """
        from kornia import enhance, filters  # slow to import

        out, draws = images.float(), draws.float()
        change = 2 * draws - 1
        if self.stain or self.colour:
            out = (out + 1) / 2
            if self.stain:
                gain = 1 + self.stain * change[:, :3, None]
                stains = STAINS.to(out)
                out = restained(out, torch.linalg.inv(stains) @ (gain * stains))
            if self.colour:
                brightness, contrast, saturation, hue = (self.colour * change[:, 3:7]).unbind(1)
                out = enhance.adjust_brightness_accumulative(out, 1 + brightness)
                out = enhance.adjust_contrast_with_mean_subtraction(out, 1 + contrast)
                out = enhance.adjust_saturation_with_gray_subtraction(out, 1 + saturation)
                out = enhance.adjust_hue(out, hue)
            out = (2 * out - 1).clamp(-1, 1)
        if self.blur:
            sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * draws[:, 8:].expand(-1, 2)  # (B,2)
            blurred = draws[:, 7, None, None, None] < self.blur
            out = torch.where(blurred, filters.gaussian_blur2d(out, KERNEL, sigma), out)
        return out.to(images.dtype)

    def check(self, item: dict[str, Any]) -> None:
        """UserError if the pixels of such items cannot be changed as asked, or the change would reach nothing."""
        asked = ", ".join(name for name, value in asdict(self).items() if value and name != "dihedral")
        if "latent" in item:
            raise UserError(
                f"augment changes pixels ({asked}), and this training reads cached latents, which stay as they are: "
                "take `latent` out of the data's keys, so that tiles are encoded as they are read, or leave "
                f"{asked} out."
            )
        if "image" not in item:
            raise UserError(f"augment changes images ({asked}); the data give {', '.join(item)} and no image.")
        if len(item["image"]) != 3 and (self.stain or self.colour):
            raise UserError(
                f"augment.stain and augment.colour are of images with three channels; these have {len(item['image'])}: "
                "leave them out."
            )


def restained(images: Tensor, mix: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Images (B,3,H,W) in [0, 1] whose optical densities d = -ln(v) become d @ mix + offset.

    mix: (B,3,3), from channels to channels; offset: what (B,3,H,W) takes. The result may exceed 1.

    >>> restained(torch.full((1, 3, 1, 1), 0.5), 2 * torch.eye(3)[None]).flatten().tolist()
    [0.25, 0.25, 0.25]
    """
    density = -images.clamp(min=1 / 255).log()
    mixed = rearrange(mix.mT @ rearrange(density, "b c h w -> b c (h w)"), "b c (h w) -> b c h w", h=images.shape[-2])
    return (-(mixed + offset)).exp()


class WithDraws(Dataset):
    """A dataset whose items also hold the numbers (COUNT,) in [0, 1) that decide their augmentation."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self.dataset[key] | {DRAWS: torch.rand(COUNT, generator=generator(key[1], STREAM))}
