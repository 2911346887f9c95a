"""What a user asks of a sampler on a command line: its settings, and what stays in words until a model is there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.sampling.sampler import Sampler, Task

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion


@dataclass(frozen=True)
class AskedSampler:
    """A Sampler whose negative condition is in words, and whose guiding models are in folders.

    Attributes:
        negative: name=value texts. guide: folder of a model. classifier: folder of a classifier of noisy images. lora:
            adapters, path or path=scale.
    """

    sampler: Sampler = field(default_factory=Sampler)
    negative: tuple[str, ...] = ()
    guide: Path | None = None
    classifier: Path | None = None
    classifier_scale: float = 1.0
    lora: tuple[str, ...] = ()

    def loaded(self, model: LatentDiffusion) -> Sampler:
        """The Sampler for a model, with everything read."""
        from ldm.conditioners.compose import parse_conditions
        from ldm.convert import load_model
        from ldm.model_folder import load_network
        from ldm.sampling.adapters import parse_adapters
        from ldm.sampling.guided import Classifier

        device, parts = str(model.device), {}
        if self.negative:
            parts["negative"] = model.condition(**parse_conditions(model.cond_stage_model, self.negative))
        if self.guide is not None:
            parts["guide"] = load_model(self.guide, device)
        if self.classifier is not None:
            parts["classifier"] = Classifier(load_network(self.classifier, device), self.classifier_scale)
        if self.lora:
            parts["lora"] = parse_adapters(self.lora)
        return replace(self.sampler, **parts)

    def record(self, sampler: Sampler, model: LatentDiffusion, task: Task) -> dict[str, Any]:
        """What files say of `sampler`, of `loaded`: see `Sampler.record`."""
        from ldm.convert import weights_of

        told = sampler.record(model, task)
        told |= {"negative_condition": " ".join(self.negative)} if self.negative else {}
        told |= {"guide_sha256": weights_of(self.guide)} if self.guide is not None else {}
        if self.classifier is not None:
            told |= {"classifier_sha256": weights_of(self.classifier), "classifier_scale": self.classifier_scale}
        return told
