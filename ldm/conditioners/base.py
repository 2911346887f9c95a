"""What every conditioner is: from the values that users give to what a network is told, and back to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError


@dataclass(frozen=True)
class About:
    """What is worth knowing of a condition: for people, for messages, and to tell conditions apart.

    Attributes:
        kind: class, score, mutation, expression, multiplier, features, text, modality, image, control or map; "" of
            those that a class outside of this package has.
        names: of classes. genes: of mutations and expression. dim: of features.
        range: lowest and highest value of numbers. size, channels: of images and maps, in pixels.
        grid: tiles along the sides of grids of features. optional: whether the others may be given without it.
        model, licence, prompt: of a text tower, and what stands before every text.

    >>> About("class", names=("LUAD", "LUSC")).words()
    'class: LUAD, LUSC'
    """

    kind: str = ""
    names: tuple[str, ...] = ()
    genes: tuple[str, ...] = ()
    dim: int | None = None
    range: tuple[float, float] | None = None
    size: int | None = None
    channels: int | None = None
    grid: tuple[int, ...] = ()
    optional: bool = False
    model: str = ""
    licence: str = ""
    prompt: str = ""

    def words(self, most: int = 12) -> str:
        """All of it in one line; at most so many names of classes or genes."""
        listed = self.names or self.genes
        told = {each.name: getattr(self, each.name) for each in fields(self)[3:]}
        rest = ", ".join(f"{name} {value}" for name, value in told.items() if value)
        more = f", ... ({len(listed)})" if len(listed) > most else ""
        about = f"{self.kind} ({rest})" if rest else self.kind
        return f"{about}: {', '.join(listed[:most])}{more}" if listed else about


class Conditioner(nn.Module):
    """A condition of samples: reads values from a batch and tells a network.

    `forward(batch, drop)` gives the condition, a dict of the parts of a network where it acts: {"crossattn": (B,L,D),
    "vector": (B,E), "concat": (B,C,h,w), "label": (B,)}; `null()` the unconditional one of one sample. Values that
    users name ("LUAD", 0.7, {"TP53": 1}) become batch values by `read`, texts of a command line by `parse`; a user's
    mistake is a UserError.

    Attributes:
        keys: batch keys that it reads; users give conditions by the same names.
        dropout: probability of dropping the condition of a training sample (classifier-free guidance).
        encoded: parts of the condition that are images, of which the network is told the latents.
    """

    keys: tuple[str, ...] = ()
    encoded: tuple[str, ...] = ()

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        if not 0 <= dropout <= 1:
            raise UserError(f"the condition's dropout is a probability in [0, 1]; got {dropout}.")
        self.dropout = dropout

    def forward(self, batch: Mapping[str, Any], drop: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of a batch; samples where drop (B,) is true get the unconditional value."""
        raise NotImplementedError

    def null(self) -> dict[str, Tensor]:
        """The unconditional condition of one sample."""
        raise NotImplementedError

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Which of `count` training samples lose their condition: (count,) bool on rng's device."""
        return torch.rand(count, generator=rng, device=rng.device) < self.dropout

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The batch of values that a user gives for some of `keys`: one, or a list or array of N, each."""
        raise NotImplementedError

    def parse(self, key: str, text: str) -> Any:
        """The value that `text`, from a command line as key=text, stands for; `read` takes it."""
        raise UserError(f"'{key}' cannot be given on a command line.")

    def check_data(self, metadata: Mapping[str, Any]) -> None:
        """UserError if training data (`metadata` of their dataset) do not have what this conditioner was made for."""

    def describe(self) -> dict[str, About]:
        """What is worth knowing of each of `keys`."""
        return {key: About() for key in self.keys}

    def portable(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What makes the conditioner independent of other files: params that replace those of its config node, and
        files {name: text} for the model folder, which such params name as "./name"."""
        return {}, {}

    def _value(self, batch: Mapping[str, Any], key: str) -> Any:
        """batch[key]; UserError if the data do not give it."""
        if key not in batch:
            raise UserError(
                f"the model is conditioned on '{key}', which the data do not give (they give {', '.join(batch)}); "
                f"name its source in the dataset's `conditions`, as {key}: <column of the index>."
            )
        return batch[key]


def where_kept(values: Tensor, null: Tensor, drop: Tensor | None) -> Tensor:
    """values (B,...) with those of samples where drop (B,) is true replaced by null (...) or (1,...).

    >>> where_kept(torch.ones(2, 3), torch.zeros(3), torch.tensor([False, True]))
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    """
    if drop is None:
        return values
    return torch.where(drop.view(-1, *[1] * (values.ndim - 1)), null.to(values), values)


def as_list(value: Any) -> list[Any]:
    """One value, or several in a list, tuple, array or tensor (N,), as a list.

    >>> as_list("LUAD"), as_list(torch.tensor([0.5, 1.0])), as_list(("LUAD", "LUSC"))
    (['LUAD'], [0.5, 1.0], ['LUAD', 'LUSC'])
    """
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
