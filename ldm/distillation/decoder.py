"""Distillation of a small decoder from a model's first stage.

    python main.py -t --base configs/distil/decoder.yaml model.params.teacher=models/my-model
    histoldm export logs/<time>_decoder --out models/my-model-small

What is exported is the model with the decoder in it: `--decoder small` takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.distillation.base import Distilling, read_teacher
from ldm.errors import UserError

SCALES = 3  # sizes at which edges are compared, each half of the one before


class DecoderDistillation(Distilling):
    """Trains a small decoder to make of latents what the first stage's decoder makes of them; all else stays.

    Data give latents of the first stage, or images, which it encodes.

    Args:
        teacher: model folder whose first stage decodes.
        widths, blocks: of the decoder (`ldm.autoencoder.small.SmallDecoder`).
        edges: weight of the differences of neighbouring pixels, at several sizes, beside those of pixels.
        weight_decay, warmup_steps, decay_steps, monitor, seed: as of LatentDiffusion.
    """

    def __init__(
        self,
        teacher: str,
        widths: Sequence[int] = (64, 48, 32),
        blocks: Sequence[int] = (3, 2, 1),
        edges: float = 1.0,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        monitor: str = "val/loss",
        seed: int = 0,
    ):
        params, metadata, leader = read_teacher(teacher)
        if leader.small_decoder is not None:
            raise UserError(f"the model {teacher} has a small decoder already; give the one that it was made of.")
        params["small_decoder_config"] = {
            "target": "ldm.autoencoder.small.SmallDecoder",
            "params": {
                "channels": leader.channels, "out_channels": leader.image_channels,
                "factor": leader.first_stage_model.downsampling, "widths": list(widths), "blocks": list(blocks),
            },
        }  # fmt: skip
        training = {"weight_decay": weight_decay, "warmup_steps": warmup_steps, "decay_steps": decay_steps}
        super().__init__(params, metadata, {**training, "monitor": monitor, "seed": seed})
        self.load_state_dict(leader.state_dict(), strict=False)
        self.requires_grad_(False)
        self.small_decoder.requires_grad_(True)
        self.edges = edges

    def loss(self, batch: Mapping[str, Tensor], rng: torch.Generator, dropout: bool = True) -> Tensor:
        """How far (B,) the small decoder's images are from the first stage's: pixels, and their edges."""
        latents = self.latents_of(batch, rng)
        with torch.no_grad():
            wanted = self.decode(latents).clamp(-1, 1)
        made = self.decode(latents, "small")
        total = (made - wanted).abs().flatten(1).mean(1)
        for _ in range(SCALES if self.edges else 0):
            for dim in (2, 3):
                total = total + self.edges * (made.diff(dim=dim) - wanted.diff(dim=dim)).abs().flatten(1).mean(1)
            made, wanted = (F.avg_pool2d(image, 2) for image in (made, wanted))
        return total

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.small_decoder.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], n: int = 8) -> dict[str, Tensor]:
        """Images of the batch's latents by both decoders."""
        latents = self.latents_of({key: value[:n] for key, value in batch.items()})
        return {"full": self.decode(latents), "small": self.decode(latents, "small")}
