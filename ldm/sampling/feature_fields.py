"""Fields of features that no slide has: grids of any size from a model of such grids, for large images and slides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.conditioners.compose import names_given
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import within
from ldm.diffusion.tiled import shifted, tiled
from ldm.errors import UserError
from ldm.rng import canvas_noise
from ldm.sampling.calls import explained
from ldm.sampling.given import checked_settings
from ldm.sampling.sampler import Sampler

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion


MOST_OVERLAP = 64  # tiles over each other along a side: the noise of textures is as much wider than a field
TEXTURE = 0x74657874757265  # stream of the noise that what no component keeps is drawn from


@explained
@torch.no_grad()
def feature_field(
    model: LatentDiffusion,
    size: tuple[int, int],
    sampler: Sampler | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """A field of features (rows,cols,D) on the CPU, NaN at holes, as `ldm.large_image` takes it.

    Windows as large as the crops that the model was trained on cover the field, at places drawn anew at every noise
    level, so that a field may be of any size (`ldm.diffusion.tiled.shifted`). What the model's first stage leaves out
    is drawn (`ldm.autoencoder.feature_codec.FeatureCodec.texture`). The features at a place depend on seed, condition
    and size, not on the batch size (to rounding).

    Args:
        model: of fields, as configs/own/field.yaml trains one.
        size: (rows, cols).
        sampler: how; by default `Sampler()`.
        conditions: by name, of the whole field: `{"class": "LUAD"}`; by default none.
    UserError: a model of images, no size, settings that the model cannot have.

    >>> feature_field(fields, (6, 9), ldm.Sampler(steps=2, progress=False)).shape
    torch.Size([6, 9, 8])
    """
    sampler = checked_settings(Sampler, sampler)
    if not conditions and sampler.named:
        raise UserError("guidance scales by name need conditions by name; none is given.")
    if not conditions and sampler.guide is None and sampler.negative is None:   # nothing to guide from
        sampler = replace(sampler, guidance_scale=1.0)
    sampler = sampler.settled(model, "field")
    if len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
        raise UserError(f"the size of a field is (rows, cols), 1 or more each; got {size}.")
    window, device = model.image_size, model.device
    canvas = tuple(max(side, window) for side in size)  # of a smaller one the corner is cut
    sigmas = sampler.sigmas(model)
    cond = model.condition(**conditions) if conditions else model.null_condition()
    if sampler.classifier is not None:
        cond |= sampler.classifier.target_of(model, [conditions or {}])

    def over_canvas(denoiser: Denoiser) -> Denoiser:
        moving = shifted(denoiser, window, None, sampler.batch_size, sampler.seed, device)
        settled = tiled(denoiser, window, max(window // 2, 1), None, sampler.batch_size, device, blend="smooth")
        return within(settled, moving, 0.0, float(sigmas[-2]))  # nothing comes after the last step to even it out

    def noise(step: int) -> Tensor:
        return canvas_noise(sampler.seed, model.channels, *canvas, stream=step + 1).to(device)

    given = names_given(model.cond_stage_model, conditions) if conditions else None
    solver = sampler.guided(model, cond if conditions else None, given).over(over_canvas)
    x = canvas_noise(sampler.seed, model.channels, *canvas).to(device) * sigmas[0]
    with tqdm(total=sampler.steps, desc="field", unit="step", disable=not sampler.progress) as bar:
        x = solver.solve(x, sigmas, cond, noise, lambda i, x, x0: bar.update())
    field = model.decode(x)[0, :, : size[0], : size[1]]
    codec = model.first_stage_model
    if codec.rest is not None:
        overlap = overlap_of(model.metadata)
        drawn = canvas_noise(
            sampler.seed, codec.rest.shape[1], *(side + overlap - 1 for side in size), stream=TEXTURE
        ).to(device)
        field = field + codec.texture(drawn, overlap)[0]
    return field.permute(1, 2, 0).cpu()


def overlap_of(metadata: Mapping[str, Any]) -> int:
    """The side of a tile of a model's fields in strides, 1 where it is not told.

    UserError: more than MOST_OVERLAP, which no cohort has.

    >>> overlap_of({"tile_size": 256, "field": {"feature": "uni", "stride": 64}})
    4
    """
    stride = metadata.get("field", {}).get("stride")
    overlap = max(round(metadata["tile_size"] / stride), 1) if stride and metadata.get("tile_size") else 1
    if overlap > MOST_OVERLAP:
        raise UserError(
            f"the model's tiles are {metadata['tile_size']} px and lie {stride} px apart: {overlap} over each other "
            f"along a side, where {MOST_OVERLAP} at most are taken. Train the model on a cohort of a larger --stride."
        )
    return overlap
