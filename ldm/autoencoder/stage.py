"""Training of a first stage with Lightning: two optimisers, autoencoder and discriminator, optimised by hand."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from ldm.autoencoder.alignment import TokenAlignment, alignment_of, balance
from ldm.autoencoder.autoencoder import Reconstruction
from ldm.autoencoder.weights import load_discriminator, load_weights
from ldm.config import foreign_config, instantiate_from_config
from ldm.errors import UserError
from ldm.metrics.pairs import psnr
from ldm.rng import generator, training_generator

ALIGN = "align"  # entry of the batch that holds the tokens with which latents are aligned


class AutoencoderStage(pl.LightningModule):
    """Trains `.autoencoder` (AutoencoderKL or VQModel) with `.loss` (`ldm.autoencoder.losses`).

    Both optimisers are Adam with betas (0.5, 0.9) and the rate `learning_rate`, which a training sets from
    `model.base_learning_rate`. `trainer.global_step` counts the autoencoder's updates; the discriminator's are as many
    from `disc_start` on. On several devices each step leaves one of the two without gradients: use the strategy
    `ddp_find_unused_parameters_true`. Batches are dicts with `image_key` (B,3,H,W) in [-1,1].

    Args:
        first_stage: node {target, params} of the autoencoder.
        loss: node {target, params} of its loss.
        image_key: entry of the batch that holds the images.
        ckpt_path: weights to start from (`ldm.autoencoder.weights`): a model folder or a published checkpoint; its
            discriminator too, where it has one that fits.
        freeze_encoder: train the decoder alone, so that latents, and models trained on them, stay valid.
        align: aligns the latents with patch tokens of the store, `{feature: uni2-h-tokens, weight: 0.1}`
            (`ldm.autoencoder.alignment.LatentAlignment`).
        monitor: logged value by which the best checkpoint is chosen.
        accumulate_grad_batches, gradient_clip_val: as the Trainer's, which manual optimisation does not take.
        seed: names, with rank and step, the draws of the latents' noise.
    """

    def __init__(
        self,
        first_stage: dict,
        loss: dict,
        image_key: str = "image",
        ckpt_path: str | None = None,
        freeze_encoder: bool = False,
        align: dict | None = None,
        monitor: str | None = "val/rec_loss",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.autoencoder = instantiate_from_config(first_stage)
        self.loss = instantiate_from_config(loss)
        if align is not None and freeze_encoder:
            raise UserError("align moves the latents, which freeze_encoder keeps; leave one of them out.")
        self.alignment = None if align is None else alignment_of(align)
        self.targets = {} if align is None else {ALIGN: f"features/{self.alignment.feature}"}  # of the training data
        self.image_key = image_key
        self.monitor = monitor
        self.accumulate = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.seed = seed
        self.learning_rate: float | None = None
        if ckpt_path is not None:
            rank_zero_info(load_weights(self.autoencoder, ckpt_path))
            found = load_discriminator(self.loss.discriminator, ckpt_path)
            rank_zero_info(f"discriminator: {'loaded too' if found else 'starts anew'}")
        self.metadata = _metadata(ckpt_path)
        if freeze_encoder:
            self.autoencoder.freeze_encoder()

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        return self.autoencoder(x, generator)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.alignment is not None:
            tile = self.trainer.datamodule.datasets["train"][0]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.align = TokenAlignment(self.alignment, self.autoencoder.channels, tile.get(ALIGN))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        if self.learning_rate is None:
            raise UserError("the autoencoder stage has no learning rate; set model.base_learning_rate in the config.")
        weights = [*self.autoencoder.parameters(), self.loss.logvar]
        weights += [] if self.alignment is None else self.align.parameters()
        trained = ([p for p in weights if p.requires_grad], list(self.loss.discriminator.parameters()))
        return [torch.optim.Adam(group, lr=self.learning_rate, betas=(0.5, 0.9)) for group in trained]

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        opt_ae, opt_disc = self.optimizers()
        step = self.global_step
        micro = batch_idx % self.accumulate
        update = micro == self.accumulate - 1 or self.trainer.is_last_batch
        x = self._images(batch)
        draws = training_generator(self.seed, self.global_rank, step * self.accumulate + micro)

        self.toggle_optimizer(opt_ae)  # the discriminator passes gradients on but collects none
        recon = self(x, draws)
        loss, logs = self.loss(x, recon, step, self.autoencoder.get_last_layer())
        if self.alignment is not None:
            apart = self.align(recon.latent, batch[ALIGN])
            weight = balance(loss, apart, self.autoencoder.encoder.conv_out.weight) * self.alignment.weight
            loss = loss + weight * apart
            logs["alignment"] = apart.detach()
        self.manual_backward(loss / self.accumulate)
        if update:
            opt_ae.step()
            opt_ae.zero_grad()
        self.untoggle_optimizer(opt_ae)

        if self.loss.adversarial(step):
            self.toggle_optimizer(opt_disc)
            disc_loss, disc_logs = self.loss.discriminator_loss(x, recon.image)
            self.manual_backward(disc_loss / self.accumulate)
            if update:
                with _uncounted(opt_disc):
                    opt_disc.step()
                opt_disc.zero_grad()
            self.untoggle_optimizer(opt_disc)
            logs |= disc_logs
            loss = loss.detach() + disc_loss.detach()

        progress = logs.pop("rec_loss")
        self.log("train/rec_loss", progress, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in logs.items()})
        return loss.detach()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self._measure(batch, "val")

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self._measure(batch, "test")

    def _measure(self, batch: dict, split: str) -> None:
        """Log how well a batch is reconstructed, as `<split>/<name>`."""
        x = self._images(batch)
        recon = self(x)  # mode of the posterior: the same images give the same numbers
        _, _, logs = self.loss.reconstruction(x, recon)
        logs["psnr"] = psnr(x.float(), recon.image.float().clamp(-1, 1)).mean()
        if recon.indices is not None:
            logs["codes_used"] = torch.tensor(float(recon.indices.unique().numel()), device=self.device)  # in a batch
        self.log_dict(
            {f"{split}/{name}": value for name, value in logs.items()}, batch_size=len(x), sync_dist=True, on_epoch=True
        )

    @torch.no_grad()
    def log_images(self, batch: dict, n: int = 8) -> dict[str, Tensor]:
        """First `n` images of a batch, their reconstructions (mode), and decodes of sampled latents; in [-1,1]."""
        x = self._images(batch)[:n].to(self.device)
        return {
            "inputs": x,
            "reconstructions": self(x).image.clamp(-1, 1),
            "samples": self(x, generator(self.seed, self.global_step)).image.clamp(-1, 1),
        }

    def _images(self, batch: dict) -> Tensor:
        if self.image_key not in batch:
            raise UserError(f"the data has no '{self.image_key}'; a batch holds {', '.join(map(str, batch))}.")
        return batch[self.image_key].contiguous(memory_format=torch.channels_last)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the norm of the gradients; Lightning calls it after it has undone the scaling of fp16."""
        if self.gradient_clip_val is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["histoldm_metadata"] = self.metadata

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.metadata = checkpoint.get("histoldm_metadata", self.metadata)


def _metadata(ckpt_path: str | None) -> dict:
    """Licence, mpp and origin of the model folder that training started from: they hold for what is trained from it."""
    config = Path(ckpt_path or "") / "config.yaml"
    return foreign_config(config).get("metadata", {}) if ckpt_path is not None and config.is_file() else {}


class _uncounted:
    """Steps of this Lightning optimiser do not move `trainer.global_step` while the context is open."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __enter__(self) -> None:
        self.hooks = self.optimizer._on_before_step, self.optimizer._on_after_step
        self.optimizer._on_before_step = self.optimizer._on_after_step = lambda: None

    def __exit__(self, *_) -> None:
        self.optimizer._on_before_step, self.optimizer._on_after_step = self.hooks
