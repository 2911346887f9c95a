"""What trainings from a teacher share: its parts, and checkpoints that export to a model folder like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.latent_diffusion import LatentDiffusion

LATENT_DIFFUSION = f"{LatentDiffusion.__module__}.{LatentDiffusion.__name__}"


class Distilling(LatentDiffusion):
    """A LatentDiffusion of a teacher's config, changed, of which a training changes a part.

    Args:
        params: of the LatentDiffusion that is exported. metadata: of it, the teacher's.
        training: what is of the training alone.
    """

    def __init__(self, params: Mapping[str, Any], metadata: Mapping[str, Any], training: Mapping[str, Any]):
        super().__init__(**{**params, **training, "use_ema": False})
        self.node = {"target": LATENT_DIFFUSION, "params": dict(params)}
        self.metadata, self.measure_scale = dict(metadata), False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["histoldm_student"] = self.node
