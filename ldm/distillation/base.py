"""What trainings from a teacher share: its parts, and checkpoints that export to a model folder like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.model_folder import load_model, read_model_folder

LATENT_DIFFUSION = f"{LatentDiffusion.__module__}.{LatentDiffusion.__name__}"


def read_teacher(folder: str | None) -> tuple[dict[str, Any], dict[str, Any], LatentDiffusion]:
    """Params and metadata of a teacher's folder, and the teacher. UserError: none is named, or it is no model's.

    >>> read_teacher(None)
    Traceback (most recent call last):
    ldm.errors.UserError: no teacher is named; model.params.teacher=FOLDER names the model folder of one.
    """
    if not isinstance(folder, str) or not folder:
        raise UserError("no teacher is named; model.params.teacher=FOLDER names the model folder of one.")
    node, metadata = read_model_folder(folder)
    return dict(node["params"]), metadata, load_model(folder)


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
