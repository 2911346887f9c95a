"""The one place where first stage, network, noise schedule and conditioner meet: the LightningModule that trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from ldm.config import instantiate_from_config
from ldm.diffusion import schedules
from ldm.diffusion.denoiser import (
    DISCRETE,
    PARAMETERIZATIONS,
    per_sample,
)
from ldm.diffusion.guidance import cfg
from ldm.diffusion.losses import error_scale, min_snr_scale, scaled_error, variational_bound
from ldm.diffusion.samplers import sample_dpmpp_2m
from ldm.diffusion.student import Student
from ldm.diffusion_model import DiffusionModel, DiffusionWrapper
from ldm.errors import UserError
from ldm.interop.weights import state_sha256
from ldm.model_folder import FIRST_STAGE_FOLDER, load_weights, resolve_first_stage
from ldm.networks.ema import EMA
from ldm.networks.lora import adapted, check_same, trained_alone
from ldm.networks.repa import alignment_of, projection, watched
from ldm.networks.takes import check_takes, declared
from ldm.rng import generator, sample_noise, training_generator

VALIDATION_STREAM = 0x76616C


class LatentDiffusion(DiffusionModel, pl.LightningModule):
    """Latent diffusion (arXiv:2112.10752) with any network, first stage and conditioner, built from config nodes.

    Attributes `model.diffusion_model`, `first_stage_model`, `cond_stage_model`, `scale_factor`, `model_ema` keep the
    names of published checkpoints.

    Args:
        unet_config: node of the network, called as network(x, timesteps, context=..., y=..., vector=...).
        first_stage_config: node of the first stage; it stays frozen.
        cond_stage_config: node of the conditioner, trained along; none for an unconditional model.
        parameterization: what the network predicts: eps, v, x0 (on the table below), edm or flow (continuous).
        beta_schedule, timesteps, linear_start, linear_end, cosine_s: the noise table (`ldm.diffusion.schedules`).
        learn_sigma: the network has 2C outputs, the second half a learned variance (arXiv:2102.09672); it is trained by
            the variational bound, and `ddpm` samples with it.
        loss_type: l2 or l1 on the network's error. min_snr_gamma: min-SNR weighting (arXiv:2303.09556).
        time_shift: of flows: noise levels, trained and sampled, are multiplied by it (arXiv:2403.03206, equation 23).
        sigma_data, p_mean, p_std: EDM's data scale and its log-normal training noise (arXiv:2206.00364, table 1).
        scale_factor, shift_factor: first-stage latents z become (z - shift) * scale; one number each, or one of each
            channel. scale_by_std: set it to 1/std of the first training batch.
        use_ema, ema_decay: average the network's weights; samples and validation use the average.
        weight_decay, warmup_steps, decay_steps: AdamW; linear warm-up, then constant, or cosine decay to zero at
            decay_steps.
        ckpt_path: weights to start from: a model folder or a checkpoint (`ldm.model_folder.load_weights`).
        lora: trains an adapter of the network alone, `{rank: 16}` (`ldm.networks.lora.LoraSettings`); what ckpt_path
            names stays as it is, and checkpoints hold the adapter.
        repa: aligns a block of the network with features of the store while it trains, `{feature: uni2-h, block: 8}`
            (`ldm.networks.repa.Alignment`).
        small_decoder_config: node of a decoder that was distilled from the first stage's (`ldm.autoencoder.small`).
        student: what a distilled model was trained for (`ldm.diffusion.student.Student`); its network tells more.
        monitor: what the best checkpoint is chosen by. seed: of noise levels, noise and condition dropout.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | None = None,
        parameterization: str = "eps",
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        learn_sigma: bool = False,
        loss_type: str = "l2",
        min_snr_gamma: float | None = None,
        time_shift: float = 1.0,
        sigma_data: float = 1.0,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        scale_factor: float | Sequence[float] = 1.0,
        shift_factor: float | Sequence[float] = 0.0,
        scale_by_std: bool = False,
        use_ema: bool = True,
        ema_decay: float = 0.9999,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        ckpt_path: str | None = None,
        lora: Mapping[str, Any] | None = None,
        repa: Mapping[str, Any] | None = None,
        small_decoder_config: Mapping[str, Any] | None = None,
        student: Mapping[str, Any] | None = None,
        monitor: str = "val/loss",
        seed: int = 0,
    ):
        super().__init__()
        if parameterization not in PARAMETERIZATIONS:
            raise UserError(
                f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}; got '{parameterization}'."
            )
        if beta_schedule not in schedules.SCHEDULES:
            raise UserError(f"beta_schedule must be one of {', '.join(schedules.SCHEDULES)}; got '{beta_schedule}'.")
        if loss_type not in ("l1", "l2"):
            raise UserError(f"loss_type must be l1 or l2; got '{loss_type}'.")
        if min_snr_gamma is not None and loss_type == "l1":
            raise UserError("min_snr_gamma weighs a squared error; use it with loss_type l2.")
        if learn_sigma and parameterization not in DISCRETE:
            raise UserError(f"a variance is learnt with one of {', '.join(DISCRETE)}; got '{parameterization}'.")
        if not time_shift > 0 or (time_shift != 1 and parameterization != "flow"):
            raise UserError(f"time_shift is of flows, above 0; got {time_shift} with '{parameterization}'.")
        self.learn_sigma, self.time_shift = learn_sigma, time_shift
        self.parameterization, self.loss_type, self.min_snr_gamma = parameterization, loss_type, min_snr_gamma
        self.sigma_data, self.p_mean, self.p_std = sigma_data, p_mean, p_std
        self.weight_decay, self.warmup_steps, self.decay_steps = weight_decay, warmup_steps, decay_steps
        self.monitor, self.learning_rate = monitor, 1e-4
        self.seed = seed
        self.metadata: dict[str, Any] = {}

        self.model = DiffusionWrapper(instantiate_from_config(unet_config))
        self.first_stage_node = dict(resolve_first_stage(first_stage_config))
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        self.cond_stage_model = instantiate_from_config(cond_stage_config) if cond_stage_config else None
        self.cond_stage_node = cond_stage_config
        self.image_size = declared(self.model.diffusion_model).image_size
        if type(self.image_size) is not int or self.image_size < 1:
            raise UserError(
                f"unet_config.params.image_size is {self.image_size}; it is the side of a tile's latent, which samples "
                "have, a whole number above 0."
            )
        self.channels = self.first_stage_model.channels
        self.small_decoder = instantiate_from_config(small_decoder_config) if small_decoder_config else None
        self.student = None if student is None else Student(**student)
        self.alignment = None if repa is None else alignment_of(repa, self.model.diffusion_model)
        self.targets = {} if repa is None else {"repa": f"features/{self.alignment.feature}"}  # of the training data
        if not next(self.model.parameters()).is_meta:
            self.check_parts()

        self._table = (beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self.register_buffer("sigmas", None, persistent=False)
        self.build_noise_table()
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(self._of_latents(scale_factor, "scale_factor", one=True)))
        else:
            self.scale_factor = self._of_latents(scale_factor, "scale_factor")
        self.shift_factor = self._of_latents(shift_factor, "shift_factor")
        self.model_ema = EMA(self.model, ema_decay) if use_ema else None
        self.measure_scale = scale_by_std  # on the first batch
        self.lora: dict[str, Any] | None = None
        if lora is not None and ckpt_path is None:
            raise UserError("lora adapts a model that is there; name it by model.params.ckpt_path.")
        if ckpt_path is not None:
            rank_zero_info(load_weights(self, ckpt_path, first_stage_config["target"] == FIRST_STAGE_FOLDER))
            if lora is not None:
                base = {"base": str(ckpt_path), "base_sha256": state_sha256(self.model.diffusion_model)}
                self.lora = adapted(self.model.diffusion_model, lora, seed) | base
                if self.cond_stage_model is not None:
                    self.cond_stage_model.requires_grad_(False)
            if self.model_ema is not None:  # the average restarts at the weights that training starts from
                self.model_ema = EMA(self.model, ema_decay)
        if self.model_ema is not None:  # every rank keeps its own, equal average: nothing to broadcast
            self._ddp_params_and_buffers_to_ignore = [f"model_ema.{name}" for name, _ in self.model_ema.named_buffers()]

    def _of_latents(self, value: float | Sequence[float], name: str, one: bool = False) -> float | tuple[float, ...]:
        """A scale or shift of latents: one of all channels, or one of each. UserError: another number of them."""
        if not isinstance(value, Sequence):
            return float(value)
        if one or len(value) != self.channels:
            several = "" if one else f", or {self.channels}, one of each channel"
            raise UserError(f"{name} is one number{several}; got {len(value)}.")
        return tuple(map(float, value))

    def check_parts(self) -> None:
        """UserError if the network has no place for what the conditioner tells it, or waits for what it does not."""
        parts: dict[str, list[int]] = {}
        with torch.no_grad():
            for key, value in self.null_condition().items():
                name = key.rpartition("/")[2]
                parts.setdefault(name, []).append(value.shape[1 if name == "concat" else -1])
        parts |= {"control": [self.channels]} if self.cond_stage_model and self.cond_stage_model.encoded else {}
        check_takes(declared(self.model.diffusion_model), parts, self.first_stage_model.channels, self.learn_sigma)

    def build_noise_table(self) -> None:
        """Compute `sigmas` (timesteps,), the ascending noise levels of the training schedule; checkpoints lack them."""
        alphas_cumprod = (1 - schedules.make_betas(*self._table)).cumprod(0)
        self.sigmas = schedules.sigmas_from_alphas_cumprod(alphas_cumprod).float()

    # --- training ---------------------------------------------------------------------------------------------------

    def latents_of(self, batch: Mapping[str, Tensor], rng: torch.Generator | None = None) -> Tensor:
        """Scaled latents of a batch, from its cached `latent` where there is one, else from its `image`."""
        if "latent" in batch:
            return self.latent_scale.apply(batch["latent"])
        if "image" not in batch:
            raise UserError(f"training needs 'latent' or 'image' in the data; they give {', '.join(batch)}.")
        return self.encode(batch["image"], rng)

    def training_sigmas(self, count: int, rng: torch.Generator) -> Tensor:
        """Noise levels (count,) as this parameterisation is trained: uniform on the table, or log-normal."""
        if self.parameterization == "edm":
            return (self.p_mean + self.p_std * torch.randn(count, generator=rng, device=self.device)).exp()
        if self.parameterization == "flow":  # logit-normal t = sigmoid(n) is sigma = exp(n) (arXiv:2403.03206)
            return self.time_shift * torch.randn(count, generator=rng, device=self.device).exp()
        return self.sigmas[torch.randint(len(self.sigmas), (count,), generator=rng, device=self.device)]

    def loss(self, batch: Mapping[str, Tensor], rng: torch.Generator, dropout: bool = True) -> Tensor:
        """Denoising loss (B,) of a batch at noise levels, noise and condition dropout drawn from rng."""
        x0 = self.latents_of(batch, rng)
        drop = None
        if dropout and self.cond_stage_model is not None:
            drop = self.cond_stage_model.draw(len(x0), rng)
        sigma = self.training_sigmas(len(x0), rng)
        noise = torch.randn(x0.shape, generator=rng, device=self.device)
        scale = error_scale(self.parameterization, sigma, self.sigma_data)
        x, cond, place = x0 + per_sample(sigma, x0) * noise, self.condition_of(batch, drop), None
        denoiser = self.make_denoiser(self.model)
        if self.learn_sigma:
            estimate, place = denoiser.with_variance(x, sigma, cond)
        else:
            estimate = denoiser(x, sigma, cond)
        losses = scaled_error(estimate, x0, scale, self.loss_type)
        if self.min_snr_gamma is not None:
            losses = losses * min_snr_scale(sigma, self.min_snr_gamma, self.parameterization, self.sigma_data)
        if place is not None:  # weighted as in arXiv:2102.09672: 1/1000 of the sum over the table
            bound = variational_bound(x0, estimate.detach(), place, sigma, self.sigmas)
            losses = losses + bound * len(self.sigmas) / 1000
        return losses

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.alignment is not None:
            tile = self.trainer.datamodule.datasets["train"][0]
            self.repa = projection(self.alignment, self.model.diffusion_model, tile.get("repa"), self.seed)

    def on_fit_start(self) -> None:
        if self.device.type == "cuda":  # its convolutions want this layout; a CPU's group normalisation does not
            self.to(memory_format=torch.channels_last)
        self.metadata |= getattr(self.trainer.datamodule, "metadata", {})
        if self.cond_stage_model is not None:
            self.cond_stage_model.check_data(self.metadata)
        for about in self.metadata.get("conditions", {}).values():  # known to the conditioner, or nobody's business
            for name in ("names", "genes", "report"):
                about.pop(name, None)

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        if self.measure_scale and self.trainer.fit_loop.total_batch_idx == 0:
            std = self.latent_scale.undo(self.latents_of(batch)).std()
            self.scale_factor.copy_(1 / self.trainer.strategy.reduce(std, reduce_op="mean"))

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        step = self.trainer.fit_loop.total_batch_idx
        rng = training_generator(self.seed, self.global_rank, step, self.device)
        with watched(self.model.diffusion_model, self.alignment) as maps:
            loss = self.loss(batch, rng).mean()
        self.log("train/loss", loss, prog_bar=True)
        if self.alignment is None:
            return loss
        apart = self.repa(maps[0], batch["repa"]).mean()
        self.log("train/alignment", apart, prog_bar=True)
        return loss + self.alignment.weight * apart

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.model_ema is not None:
            self.model_ema.update(self.model)

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """The loss of the averaged weights at the same noise levels and noise in every validation."""
        self._evaluate("val/loss", batch, batch_idx)

    @torch.no_grad()
    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test/loss", batch, batch_idx)

    def _evaluate(self, name: str, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        rng = generator(VALIDATION_STREAM, self.global_rank, batch_idx, device=self.device)
        with self.averaged_weights():
            losses = self.loss(batch, rng, dropout=False)
        self.log(name, losses.mean(), prog_bar=True, sync_dist=True, batch_size=len(losses))

    def averaged_weights(self) -> Any:
        """A context in which the network has its averaged weights, if an average is kept."""
        return nullcontext() if self.model_ema is None else self.model_ema.averaged(self.model)

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.cond_stage_model is not None:
            parameters += [p for p in self.cond_stage_model.parameters() if p.requires_grad]
        if self.alignment is not None:
            parameters += self.repa.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay_steps is None:
            return 1.0
        done = (step - self.warmup_steps) / max(self.decay_steps - self.warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def portable_conditioner(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The conditioner's node, and the texts of the files that it names as "./name"."""
        params, files = self.cond_stage_model.portable()
        params = {**self.cond_stage_node.get("params", {}), **params}
        return {"target": self.cond_stage_node["target"], "params": params}, files

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["histoldm_metadata"] = self.metadata
        checkpoint["histoldm_first_stage"] = self.first_stage_node
        if self.lora is not None:
            checkpoint |= {"histoldm_lora": self.lora, "state_dict": trained_alone(self, checkpoint["state_dict"])}
        if self.cond_stage_model is not None:
            checkpoint["histoldm_conditioner"], checkpoint["histoldm_files"] = self.portable_conditioner()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.metadata = checkpoint.get("histoldm_metadata", {})
        if self.lora is not None:
            check_same(checkpoint.get("histoldm_lora"), self.lora)
            checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]
        for name, own in self.first_stage_model.state_dict().items():
            held = checkpoint["state_dict"].get(f"first_stage_model.{name}")
            if held is not None and held.shape == own.shape and not torch.equal(own.to(held), held):
                raise UserError(
                    f"the first stage that the config names now is not the one of the checkpoint ({name} differs); "
                    "name that one, or start a new run with model.params.ckpt_path."
                )

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], n: int = 8) -> dict[str, Tensor]:
        """Inputs, reconstructions, and samples under the batch's conditions without and with guidance, (n,3,H,W)."""
        batch = {key: value[:n] for key, value in batch.items()}  # tensors and lists of names
        latents = self.latents_of(batch)
        images = {"reconstructions": self.decode(latents)}
        if "image" in batch:
            images = {"inputs": batch["image"], **images}
        plain = self.denoiser()
        sigmas = schedules.table_sigmas(self.sigmas, min(20, len(self.sigmas)))
        if self.parameterization in ("edm", "flow"):
            sigmas = schedules.karras_sigmas(20, plain.sigma_min, plain.sigma_max).to(latents)
        start = sample_noise(range(len(latents)), latents.shape[1:]).to(latents) * sigmas[0]
        cond = self.condition_of(batch)
        with self.averaged_weights():
            images["samples"] = self.decode(sample_dpmpp_2m(plain, start, sigmas, cond))
            if cond and self.cond_stage_model.dropout:
                guided = cfg(plain, self.null_condition(), 2.0)
                images["samples_guided"] = self.decode(sample_dpmpp_2m(guided, start, sigmas, cond))
        if self.makes == "fields":
            return {name: self.first_stage_model.picture(fields) for name, fields in images.items()}
        return images
