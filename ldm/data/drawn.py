"""Conditions alone, drawn from what a user lists: for trainings that need no images, as a student's of its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import UserError
from ldm.rng import fold


class DrawnConditions(Dataset):
    """Items of conditions without images, each one of `choices`, all equally often; `row` is which.

    Args:
        choices: conditions that belong together, as `[{stain: he}, {stain: ki67}]` or `[{modality: MRI, text: T1}]`.
            A pair of numbers is a range, of which each draw is uniform: `[{score: [0.0, 1.0]}]`.
        length: items of an epoch.
    Raises:
        UserError: no choices, choices of different conditions, a value that is neither text, number nor range.

    Item i is choice i mod K; its numbers are decided by (i, draw) alone, so a resumed training repeats them.

    >>> drawn = DrawnConditions([{"stain": "he", "score": [0.0, 1.0]}, {"stain": "ki67", "score": 0.5}], length=4)
    >>> drawn[1], drawn[2]["score"], drawn[(2, 7)]["score"]
    ({'row': 1, 'stain': 'ki67', 'score': tensor(0.5000)}, tensor(0.0758), tensor(0.0152))
    """

    def __init__(self, choices: Sequence[Mapping[str, Any]], length: int) -> None:
        if not isinstance(choices, Sequence) or not choices or not all(isinstance(each, Mapping) for each in choices):
            raise UserError(f"`choices` are one or more conditions, as [{{score: [0, 1]}}]; got {choices!r}.")
        if type(length) is not int or length < 1:
            raise UserError(f"`length` is the number of items of an epoch, 1 or more; got {length!r}.")
        keys = set(choices[0])
        for k, choice in enumerate(choices):
            if not choice or set(choice) != keys:
                names = ", ".join(map(str, choice)) or "nothing"
                raise UserError(
                    f"every one of `choices` has the same conditions; the first has {', '.join(keys) or 'nothing'}, "
                    f"number {k + 1} {names}."
                )
            for key, value in choice.items():
                _check(key, value)
        self.choices, self.length = [dict(choice) for choice in choices], length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor | str | int]:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng, row = np.random.default_rng(fold(index, draw)), index % len(self.choices)
        return {"row": row} | {name: _drawn(value, rng) for name, value in self.choices[row].items()}


def _check(key: str, value: Any) -> None:
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if isinstance(value, str) or (_are_numbers(numbers) and (numbers is not value or _is_range(value))):
        return
    raise UserError(f"the condition '{key}' is text, a number, or a range [low, high]; got {value!r}.")


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(value) for value in values)


def _is_range(value: Sequence[Any]) -> bool:
    return len(value) == 2 and value[0] <= value[1]


def _drawn(value: Any, rng: np.random.Generator) -> Tensor | str:
    if isinstance(value, str):
        return value
    low, high = value if isinstance(value, Sequence) else (value, value)
    return torch.tensor(float(rng.uniform(low, high)))
