"""Conditioning on a graded label: a mitosis score, a grade, any scalar in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioners.base import About, Conditioner, where_kept
from ldm.errors import UserError

ACTS = ("vector", "crossattn")


class Score(Conditioner):
    """A scalar in [0, 1]: how users give it, and what training data hold of it.

    Reads batch[key] (B,) or (B,1): soft labels such as the fraction of experts who voted for a class, or hard ones.

    Args:
        key: batch key, and the name under which users give the score.
    """

    def __init__(self, dropout: float, key: str):
        super().__init__(dropout)
        self.keys = (key,)

    def scores(self, values: Any) -> Tensor:
        """Scores (B,1), checked."""
        try:
            scores = torch.as_tensor(values, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"a {self.keys[0]} is a number in [0, 1]; got {values!r}.") from error
        scores = scores.reshape(-1, 1)
        wrong = ~((scores >= 0) & (scores <= 1))  # NaN too
        if wrong.any():
            raise UserError(f"a {self.keys[0]} lies in [0, 1]; got {float(scores[wrong][0]):g}.")
        return scores.to(next(self.parameters()))

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        (value,) = values.values()
        return {self.keys[0]: self.scores(value)}

    def parse(self, key: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise UserError(f"{key} is a number in [0, 1]; got '{text}'.")
        return value

    def describe(self) -> dict[str, About]:
        return {self.keys[0]: About("score", range=(0, 1))}


class ScoreEmbedder(Score):
    """A score with a learned null.

    Args:
        dim: size of the embedding: the UNet's 4*model_channels (vector) or its context_dim (crossattn).
        acts: vector: added to the time embedding, {"vector": (B,dim)}; crossattn: {"crossattn": (B,1,dim)}.
        hidden: width of the layer between; None is a single linear map of the score.
    """

    def __init__(
        self, dim: int, acts: str = "vector", hidden: int | None = None, dropout: float = 0.5, key: str = "score"
    ):
        super().__init__(dropout, key)
        if acts not in ACTS:
            raise UserError(f"a score acts as one of {', '.join(ACTS)}; got '{acts}'.")
        self.acts = acts
        layers = [nn.Linear(1, dim)] if hidden is None else [nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, dim)]
        self.score_fc = nn.Sequential(*layers)
        self.null_score = nn.Parameter(torch.randn(dim) * dim**-0.5)

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.scores(self._value(batch, self.keys[0]))                  # (B,1)
        return self._act(where_kept(self.score_fc(scores), self.null_score, drop))

    def null(self) -> dict[str, Tensor]:
        return self._act(self.null_score[None])

    def _act(self, vectors: Tensor) -> dict[str, Tensor]:
        return {"vector": vectors} if self.acts == "vector" else {"crossattn": vectors[:, None]}


class LucidrainsScore(Score):
    """The score as `ldm.networks.lucidrains.LucidrainsUNet` takes it, under the names of the published weights:
    {"vector": (B,4*dim)}. The score's embedding, and the null's, goes through two layers.

    Args:
        dim: the network's.
    """

    def __init__(self, dim: int, dropout: float = 0.5, key: str = "score"):
        super().__init__(dropout, key)
        self.classes_emb = nn.Linear(1, dim)
        self.null_classes_emb = nn.Parameter(torch.randn(dim))
        self.classes_mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.scores(self._value(batch, self.keys[0]))                  # (B,1)
        vectors = self.classes_mlp(self.classes_emb(scores))                    # (B,4*dim)
        return {"vector": where_kept(vectors, self.null()["vector"], drop)}

    def null(self) -> dict[str, Tensor]:
        return {"vector": self.classes_mlp(self.null_classes_emb[None])}
