"""Every class equally often, however rare it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.rng import fold


class Balanced(Dataset):
    """A dataset whose epochs show every class equally often.

    One epoch is as long as the dataset. Item i is of class i mod K; which of its tiles, the item's `draw` decides, so a
    resumed training repeats the choice.

    Args:
        dataset: node of a TileDataset, whose condition `by` is text, or a number.
        by: the condition's batch key. thresholds: where numbers are cut into classes; [0.5] makes two of a score.
    """

    def __init__(self, dataset: Mapping[str, Any], by: str, thresholds: tuple[float, ...] | list[float] = ()):
        self.dataset = instantiate_from_config(dataset)
        values = self.dataset.values(by)
        if values.dtype != object and not len(thresholds):
            if len(np.unique(values)) > 20:
                raise UserError(f"'{by}' is a number; give `thresholds`, as [0.5], to balance its classes.")
        elif len(thresholds):
            values = np.digitize(values.astype(float), sorted(thresholds))
        self.classes, member = np.unique(values, return_inverse=True)
        if len(self.classes) < 2:
            raise UserError(f"all tiles have the same '{by}' ({self.classes[0]}); there is nothing to balance.")
        self.members = [np.flatnonzero(member == k) for k in range(len(self.classes))]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        members = self.members[index % len(self.members)]
        chosen = int(members[fold(index, draw) % len(members)])
        return self.dataset[(chosen, draw) if isinstance(key, tuple) else chosen]

    @property
    def metadata(self) -> dict[str, Any]:
        return self.dataset.metadata
