"""What notebooks, other people's scripts and the commands use: images from a trained model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.autoencoder.autoencoder import IdentityFirstStage
from ldm.autoencoder.model import AttnBlock
from ldm.conditioners.compose import guidance_terms, names_given
from ldm.devices import send
from ldm.diffusion import samplers, schedules
from ldm.diffusion.denoiser import Cond, Denoiser, RangeDenoiser
from ldm.diffusion.fields import FeatureField
from ldm.diffusion.guidance import autoguidance, cfg, clip, compose, keep_variance, within
from ldm.diffusion.tiled import shifted, tiled
from ldm.errors import UserError
from ldm.images.write import to_uint8
from ldm.rng import canvas_noise, fold, sample_noise
from ldm.sampling.local_norm import decode_tiles

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

STOCHASTIC = ("ddim", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")  # their noise is scaled by eta
SOLVERS = ("dpmpp_2m", "unipc", "euler", "heun", "plms", "ddpm", *STOCHASTIC)
SCHEDULES = ("trailing", "uniform", "legacy", "karras", "exponential", "optimised")
MODES = ("shifted", "overlap")
DECODE_PART = 2048  # pixels along what is decoded in one piece
ATTENDED_PART = 512  # pixels, of decoders with attention
Guidance = float | Mapping[str, float]  # one scale, or one for each condition by name
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sampling_sigmas(model: LatentDiffusion, steps: int, schedule: str = "trailing") -> Tensor:
    """Descending sigmas (steps+1,) for a model: from its own table (trailing, uniform, legacy), or of its range.

    legacy is the spacing of published DDIM codes, which ends above zero; its steps divide the table's length.
    """
    denoiser = model.denoiser()
    discrete = hasattr(denoiser, "table")
    if not 1 <= steps <= (len(model.sigmas) if discrete else 10_000):
        raise UserError(f"steps must be in 1..{len(model.sigmas) if discrete else 10_000}; got {steps}.")
    if schedule not in SCHEDULES:
        raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}; got '{schedule}'.")
    if schedule == "legacy" and (not discrete or len(model.sigmas) % steps or steps == len(model.sigmas)):
        table = f"divide its {len(model.sigmas)} levels" if discrete else "do not exist for this model"
        raise UserError(f"the legacy schedule takes steps of the model's noise table that {table}; got {steps}.")
    if schedule in ("trailing", "uniform", "legacy") and discrete:
        return schedules.table_sigmas(model.sigmas, steps, schedule)
    continuous = {"exponential": schedules.exponential_sigmas, "optimised": schedules.optimised_sigmas}
    make = continuous.get(schedule, schedules.karras_sigmas)  # models without a table have no other
    return make(steps, denoiser.sigma_min, denoiser.sigma_max).to(model.sigmas)


def run_solver(
    solver: str, denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Cond, noise: samplers.Noise, eta: float,
    progress: samplers.Callback, variance: float | None = 0.0,
) -> Tensor:  # fmt: skip
    """One of SOLVERS by name. variance: of `ddpm`, see `sample_ddpm`."""
    if solver not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}; got '{solver}'.")
    run = getattr(samplers, f"sample_{'ddim' if solver == 'euler_ancestral' else solver}")  # the same in sigma
    if solver in STOCHASTIC:
        return run(denoiser, x, sigmas, cond, noise, eta, callback=progress)
    if solver == "ddpm":
        return run(denoiser, x, sigmas, cond, noise, variance, callback=progress)
    return run(denoiser, x, sigmas, cond, callback=progress)


def default_guidance(model: LatentDiffusion) -> float:
    """2 for models that were trained to do without their condition, 1 for others."""
    return 2.0 if model.cond_stage_model is not None and model.cond_stage_model.dropout else 1.0


def guided_denoiser(
    model: LatentDiffusion, guidance: Guidance | None, precision: str = "fp32", cond: Cond | None = None,
    solver: str = "", compile: bool = False, cache: int = 1, given: Collection[str] | None = None,
    negative: Cond | None = None, rescale: float = 0.0, guide: LatentDiffusion | None = None,
) -> Denoiser | RangeDenoiser:  # fmt: skip
    """The model's denoiser under guidance, clipped if it works on pixels.

    guidance: one scale, or a scale for each of the model's conditions by name (`guidance_terms`, of `cond` or of
    the names `given`); None is `default_guidance`. For the solver `ddpm` a model that learnt its variance returns that
    too. compile, cache: see `LatentDiffusion.denoiser`; negative, rescale, guide: see `sample`.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}; got '{precision}'.")
    if guidance is None:
        guidance = default_guidance(model) if guide is None else 2.0
    named = isinstance(guidance, Mapping)
    if not all(math.isfinite(scale) for scale in (guidance.values() if named else [guidance])):
        raise UserError(f"a guidance scale is a finite number; got {guidance}.")
    if guidance != 1.0 and model.cond_stage_model is None and guide is None:
        raise UserError(f"an unconditional model has no guidance; set the guidance scale to 1 (got {guidance}).")
    if named and (negative or rescale or guide):
        raise UserError("guidance scales by name go without a negative condition, rescale or guiding model.")
    if guide is not None and (negative or rescale):
        raise UserError("a guiding model stands in place of the null: it goes without negative condition and rescale.")
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance rescale is in 0..1; got {rescale}.")
    null = _negative(model, negative) if negative else model.null_condition()
    terms = guidance_terms(null, cond or null, guidance, given) if named else None
    weak = _weak(model, guide).denoiser(PRECISIONS[precision]) if guide is not None else None

    def guided(denoiser: Denoiser) -> Denoiser:
        if weak is not None:
            denoiser = autoguidance(denoiser, weak, guidance)
        elif terms is not None:
            denoiser = compose(denoiser, null, terms)
        else:
            denoiser = cfg(denoiser, null, guidance, rescale)
        return clip(denoiser) if isinstance(model.first_stage_model, IdentityFirstStage) else denoiser

    denoiser = model.denoiser(PRECISIONS[precision], compile, cache)
    if solver == "ddpm" and model.learn_sigma:
        return keep_variance(denoiser.with_variance, guided)
    return guided(denoiser)


def _negative(model: LatentDiffusion, cond: Cond) -> Cond:
    """A condition to stand in place of the null: of one sample, with the same parts."""
    null = model.null_condition()
    if set(cond) != set(null) or any(len(value) != 1 for value in cond.values()):
        raise UserError(f"a negative condition is of one sample, with {', '.join(null) or 'nothing'}, as the model's.")
    return cond


def _weak(model: LatentDiffusion, guide: LatentDiffusion) -> LatentDiffusion:
    """A model to guide by, which must take the same latents and conditions."""
    own, other = (
        {"latent": (m.channels, m.image_size), **{part: tuple(v.shape[-1:]) for part, v in m.null_condition().items()}}
        for m in (model, guide)
    )
    if own != other:
        raise UserError(f"the guiding model takes {other}, the model {own}; they must be of one kind.")
    return guide


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    cond: Cond | None = None,
    count: int | None = None,
    steps: int = 20,
    solver: str = "dpmpp_2m",
    guidance_scale: Guidance | None = None,
    seed: int = 0,
    batch_size: int = 16,
    schedule: str = "trailing",
    eta: float = 1.0,
    precision: str = "fp32",
    first: int = 0,
    compile: bool = False,
    cache: int = 1,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float = 0.0,
    negative: Cond | None = None,
    guide: LatentDiffusion | None = None,
    progress: bool = True,
) -> Tensor:
    """Sample tiles: (N,3,H,W) in [-1,1] on the CPU.

    cond: a condition of N samples, or of one that `count` samples share (None for unconditional models). Image i
    depends on `seed`, `first` + i and its condition, not on batch_size (to rounding). guidance_scale: one number, or
    one for each condition by name, `{"class": 3.0, "text": 1.5}`, "a+b" guiding by both jointly: each then adds its
    own difference to the unconditional prediction; by default `default_guidance`. eta: noise of the solvers in
    STOCHASTIC, 0 for none. compile: run the network through torch.compile, which takes a minute at first. cache:
    compute its deep features at every `cache`-th step only (DeepCache, arXiv:2312.00858): faster, approximate.
    guidance_interval: (low, high) noise levels that are guided (arXiv:2404.07724); None: all. guidance_rescale: 0..1,
    draws contrast that guidance raised back (arXiv:2305.08891). negative: a condition of one sample to move away from,
    in place of the null. guide: a smaller or less trained model to move away from (autoguidance, arXiv:2406.02507).
    """
    if not cond:  # the null, which is empty for an unconditional model
        if isinstance(guidance_scale, Mapping):
            raise UserError("guidance scales by name need conditions by name; none is given.")
        cond, guidance_scale = model.null_condition(), 1.0 if guide is None else guidance_scale
    given = next((len(value) for value in cond.values()), None)
    count = count or given or 1
    if given not in (None, 1, count):
        raise UserError(f"the condition is of {given} samples, count asks for {count}; give one condition, or equal.")
    cond = {part: value.expand(count, *value.shape[1:]) for part, value in cond.items()}
    if getattr(model.model.diffusion_model, "context_dim", None) and not any("crossattn" in part for part in cond):
        raise UserError("the network attends to a context, and the model has no conditioner that gives one.")
    if batch_size < 1:
        raise UserError(f"batch size must be at least 1; got {batch_size}.")
    shared = {"precision": precision, "cond": cond, "solver": solver, "compile": compile, "cache": cache}
    denoiser = guided_denoiser(
        model, guidance_scale, **shared, negative=negative, rescale=guidance_rescale, guide=guide
    )  # fmt: skip
    if guidance_interval is not None:
        if cache > 1:
            raise UserError("features are cached over steps of one kind; guide all steps, or leave the cache out.")
        denoiser = within(denoiser, guided_denoiser(model, 1.0, **shared), *guidance_interval)
    large = model.metadata.get("variance") == "fixedlarge"  # as some published models are sampled
    variance = None if model.learn_sigma and solver == "ddpm" else float(large)
    sigmas = sampling_sigmas(model, steps, schedule)
    shape = (model.channels, model.image_size, model.image_size)
    images = []
    with tqdm(total=count * steps, desc="sample", unit="step", disable=not progress) as bar:
        for start in range(0, count, batch_size):
            rows = range(start, min(start + batch_size, count))
            seeds = [fold(seed, first + row) for row in rows]
            part = {name: value[rows.start : rows.stop] for name, value in cond.items()}
            x = sample_noise(seeds, shape).to(model.device, model.sample_dtype) * sigmas[0]
            x = run_solver(
                solver, denoiser, x, sigmas, part, _tile_noise(seeds, shape), eta,
                lambda i, x, x0: bar.update(len(x)), variance,
            )  # fmt: skip
            images.append(model.decode(x.float()).clamp(-1, 1).cpu())
    return torch.cat(images)


def _tile_noise(seeds: Sequence[int], shape: Sequence[int]) -> samplers.Noise:
    return lambda step: sample_noise(seeds, shape, stream=step + 1)


@torch.no_grad()
def large_image(
    model: LatentDiffusion,
    features: Any,
    size: tuple[int, int] | None = None,
    mode: str = "shifted",
    steps: int = 10,
    solver: str = "dpmpp_2m",
    guidance_scale: Guidance | None = None,
    seed: int = 0,
    batch_size: int = 16,
    schedule: str = "trailing",
    eta: float = 1.0,
    precision: str = "fp32",
    interpolation: str = "linear",
    stride: int | None = None,
    background: Any = None,
    conditions: Mapping[str, Any] | None = None,
    guidance_interval: tuple[float, float] | None = (1.0, 7.0),
    offload: bool = False,
    out: Any = None,
    progress: bool = True,
) -> Tensor | Any:
    """An image of any size from a grid of SSL features: (1,3,height,width) in [-1,1] on the CPU.

    features (rows, cols, D): the entry at [row, col] conditions the image there. The first tile of the grid lies in
    the upper left corner, the last in the lower right. Rows of NaN are holes; they take `background` (D,), or the
    nearest known feature.

    Args:
        size: (height, width) in pixels, multiples of the first stage's downsampling; by default adjoining tiles.
        mode: `shifted`: windows that overlap by 3/16 on average, at places drawn anew at every step, by half in the
            last one; `overlap`: windows every `stride` pixels, averaged (the published procedure; 10 times the work
            at the default stride of a quarter tile).
        interpolation: between the features of the grid: linear, slerp, nearest.
        conditions: other conditions by name, the same everywhere: `{"class": "LUAD"}`.
        guidance_interval: (low, high) noise levels; steps at low < sigma <= high are guided, others follow the
            condition alone and cost half (arXiv:2404.07724), and the features are followed no worse. None guides all.
        offload: keep the canvas in main memory while windows visit the GPU: for one larger than the GPU holds.
        out: (height, width, 3) uint8, assigned to by slices (a memory map, a zarr array): takes the image part by part
            as it is decoded, and is returned in its place.
    """
    factor, window = model.first_stage_model.downsampling, model.image_size
    tile = window * factor
    features = torch.as_tensor(np.asarray(features), dtype=torch.float32)
    if features.ndim != 3:
        raise UserError(f"a large image takes a grid of features (rows, cols, D); got shape {tuple(features.shape)}.")
    if model.cond_stage_model is None:
        raise UserError("the model is unconditional; a large image needs one conditioned on features.")
    height, width = size or (features.shape[0] * tile, features.shape[1] * tile)
    if height % factor or width % factor or min(height, width) < tile:
        raise UserError(
            f"the size must be at least one tile of {tile} px and a multiple of {factor} px; got {height}x{width}."
        )
    if mode not in MODES:
        raise UserError(f"mode must be one of {', '.join(MODES)}; got '{mode}'.")
    if stride is not None and (mode != "overlap" or stride % factor or not factor <= stride <= tile):
        raise UserError(f"stride goes with mode 'overlap' and is a multiple of {factor} px up to {tile}; got {stride}.")
    if out is not None and (tuple(out.shape) != (height, width, 3) or out.dtype != np.uint8):
        raise UserError(f"out must be ({height}, {width}, 3) uint8, as the image; got {tuple(out.shape)} {out.dtype}.")
    canvas = (height // factor, width // factor)
    if background is not None:
        background = torch.as_tensor(np.asarray(background), dtype=torch.float32)
    field = FeatureField(features, canvas, window, interpolation, background)

    def window_condition(corners: Sequence[tuple[int, int]]) -> Mapping[str, Tensor]:
        return model.condition(features=send(field.at(corners), model.device), **(conditions or {}))

    sigmas = sampling_sigmas(model, steps, schedule)

    def over_canvas(windows: Denoiser) -> Denoiser:
        if mode == "overlap":
            step = (stride or tile // 4) // factor
            return tiled(windows, window, step, window_condition, batch_size, model.device)
        moving = shifted(windows, window, window_condition, batch_size, seed, model.device)
        settled = tiled(windows, window, window // 2, window_condition, batch_size, model.device, blend="smooth")
        return within(settled, moving, 0.0, float(sigmas[-2]))  # nothing comes after the last step to even it out

    given = names_given(model.cond_stage_model, ["features", *(conditions or {})])
    denoiser = over_canvas(guided_denoiser(model, guidance_scale, precision, given=given))
    if guidance_interval is not None:
        denoiser = within(denoiser, over_canvas(guided_denoiser(model, 1.0, precision)), *guidance_interval)

    def noise(step: int) -> Tensor:
        return canvas_noise(seed, model.channels, *canvas, stream=step + 1)

    home = torch.device("cpu") if offload else model.device
    x = canvas_noise(seed, model.channels, *canvas).mul_(sigmas[0].cpu()).to(home)
    with tqdm(total=steps, desc="large image", unit="step", disable=not progress) as bar:
        x = run_solver(solver, denoiser, x, sigmas, {}, noise, eta, lambda i, x, x0: bar.update())
    return decode_canvas(model, x, progress, out)


def decode_canvas(model: LatentDiffusion, latents: Tensor, progress: bool = True, out: Any = None) -> Tensor | Any:
    """The image of a canvas of scaled latents (1,C,h,w): at once if it is small, else in parts.

    Returns (1,3,H,W) in [-1,1] on the CPU; or `out`, an array (H,W,3) uint8 that can be assigned to by slices (a memory
    map, a zarr array), where parts go as they are made, so that the image needs no memory. Latents may lie on the CPU
    while the model is on a GPU. A decoder with attention, which is quadratic in the canvas and was trained on tiles,
    decodes no more than 512 px at once.
    """
    first_stage, factor = model.first_stage_model, model.first_stage_model.downsampling
    height, width = (side * factor for side in latents.shape[-2:])
    attends = any(isinstance(layer, AttnBlock) for layer in first_stage.modules())
    part = ATTENDED_PART if attends else DECODE_PART
    if height * width <= part**2:
        part = max(height, width)
    image = torch.empty(1, 3, height, width) if out is None else None
    total = -(-height // part) * -(-width // part)
    halo = model.image_size // 2 if attends else None
    parts = decode_tiles(first_stage, latents / model.scale_factor, model.image_size, max(part // factor, 1), halo)
    for rows, cols, decoded in tqdm(parts, desc="decode", total=total, disable=not progress or total == 1):
        if out is None:
            image[..., rows, cols] = decoded.clamp(-1, 1)
        else:
            out[rows, cols] = to_uint8(decoded)[0]
    return image if out is None else out
