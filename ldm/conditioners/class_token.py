"""Conditioning on one of K named classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioners.base import About, Conditioner, as_list
from ldm.errors import UserError, suggest

ACTS = ("crossattn", "vector")


class ClassEmbedder(Conditioner):
    """K named classes and a learned null, as one cross-attention token or added to the time embedding.

    Reads batch[key]: class names (list of B), or their indices (B,) in `classes`. The last of the K+1 embeddings is the
    null, as PathLDM's (arXiv:2309.00748) and CompVis' class-conditional models have it.

    Args:
        classes: names, in the order of their embeddings; they are saved with the model.
        dim: size of the embedding: the UNet's context_dim (crossattn), or 4*model_channels (vector).
        acts: crossattn: {"crossattn": (B,1,dim)}; vector: {"vector": (B,dim)}, guided-diffusion's label embedding.
        key: batch key, and the name under which users give the class.
    """

    def __init__(
        self, classes: Sequence[str], dim: int, acts: str = "crossattn", dropout: float = 0.1, key: str = "class"
    ):
        super().__init__(dropout)
        if acts not in ACTS:
            raise UserError(f"a class acts as one of {', '.join(ACTS)}; got '{acts}'.")
        self.classes = tuple(str(name) for name in classes)
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise UserError(f"`classes` are two or more different names; got {', '.join(self.classes) or 'none'}.")
        self.keys, self.acts = (key,), acts
        self.embedding = nn.Embedding(len(self.classes) + 1, dim)
        self._index = {name: index for index, name in enumerate(self.classes)}

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        labels = self.labels(self._value(batch, self.keys[0]))                  # (B,)
        if drop is not None:
            labels = labels.masked_fill(drop, len(self.classes))
        return self._act(self.embedding(labels))

    def null(self) -> dict[str, Tensor]:
        return self._act(self.embedding.weight[-1:])

    def labels(self, values: Any) -> Tensor:
        """Indices (B,) of class names, or of indices after a check."""
        if isinstance(values, Tensor) and not values.is_floating_point():
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < len(self.classes):
                raise UserError(f"class indices lie in 0..{len(self.classes) - 1}; got {values.unique().tolist()}.")
            return values.to(self.embedding.weight.device)
        names = [f"{name:g}" if isinstance(name, float) else str(name) for name in as_list(values)]  # grade 2.0 is 2
        for name in names:
            if name not in self._index:
                raise UserError(f"the model has no {self.keys[0]} '{name}'{suggest(name, self.classes)}")
        return torch.tensor([self._index[name] for name in names], device=self.embedding.weight.device)

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = values.values()
        return {self.keys[0]: self.labels(value)}

    def parse(self, key: str, text: str) -> str:
        return text

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        found = metadata.get("conditions", {}).get(self.keys[0], {}).get("names", ())
        for name in found:
            if name not in self._index:
                raise UserError(
                    f"the data have the {self.keys[0]} '{name}', which the conditioner's `classes` "
                    f"({', '.join(self.classes)}) lack. Add it, or leave its tiles out with the dataset's `where`."
                )

    def describe(self) -> dict[str, About]:
        return {self.keys[0]: About("class", names=tuple(self.classes))}

    def _act(self, vectors: Tensor) -> dict[str, Tensor]:
        return {"crossattn": vectors[:, None]} if self.acts == "crossattn" else {"vector": vectors}
