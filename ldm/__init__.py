"""HistoLDM: latent diffusion for histopathology and medical imaging.

    import ldm
    model = ldm.load_model("model_folder")
    fast = ldm.Sampler(steps=20, seed=0)
    tiles = ldm.sample(model, model.condition(features=features), sampler=fast)         # (N,3,H,W) in [-1,1]
    image = ldm.large_image(model, grid, size=(1024, 1024), sampler=fast)               # grid (rows, cols, D)
    grid = ldm.feature_field(fields, (15, 15), sampler=fast)                            # of a model of fields
    others = ldm.translate(model, images, source=cond_a, target=cond_b, sampler=fast)   # images (N,3,H,W) in [-1,1]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.convert import convert, load_model
    from ldm.images.write import to_uint8
    from ldm.model_folder import export
    from ldm.sampling.canvas import large_image
    from ldm.sampling.feature_fields import feature_field
    from ldm.sampling.guided import Classifier
    from ldm.sampling.sampler import Inversion, Sampler, Windows
    from ldm.sampling.tiles import sample
    from ldm.sampling.translate import translate

    __version__: str

_HOMES = {
    "convert": "ldm.convert",
    "load_model": "ldm.convert",
    "export": "ldm.model_folder",
    "sample": "ldm.sampling.tiles",
    "large_image": "ldm.sampling.canvas",
    "feature_field": "ldm.sampling.feature_fields",
    "Sampler": "ldm.sampling.sampler",
    "Windows": "ldm.sampling.sampler",
    "Inversion": "ldm.sampling.sampler",
    "Classifier": "ldm.sampling.guided",
    "to_uint8": "ldm.images.write",
    "translate": "ldm.sampling.translate",
}
__all__ = [
    "Classifier", "Inversion", "Sampler", "Windows", "convert", "export", "feature_field", "large_image", "load_model",
    "sample", "to_uint8", "translate",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # torch is imported when it is first needed, so that `--help` answers at once
    if name == "__version__":
        return import_module("ldm.files").tool_version()
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ldm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
