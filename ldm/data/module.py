"""The LightningDataModule of training: datasets from config nodes, in an order that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.config import instantiate_from_config
from ldm.data.sampler import ResumableBatchSampler, ResumableDataLoader, evaluation_batches, ignore_interrupts
from ldm.errors import UserError


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of items; tensors that differ in shape from item to item, as grids of features may, stay a list."""
    ragged = [
        key for key, value in items[0].items()
        if isinstance(value, Tensor) and len({item[key].shape for item in items}) > 1
    ]  # fmt: skip
    batch = default_collate([{key: value for key, value in item.items() if key not in ragged} for item in items])
    return batch | {key: [item[key] for item in items] for key in ragged}


class TileDataModule(pl.LightningDataModule):
    """Batches of the datasets named in a config.

    Args:
        train, validation, test: nodes `{target: ldm.data.datasets.TileDataset, params: {...}}`; items are asked for by
            (index, draw), see `ldm.data.datasets`.
        batch_size: tiles per device and step. num_workers: processes that load tiles, per device.
        seed: of the order of tiles and of everything random in them.
    """

    def __init__(
        self,
        train: Mapping[str, Any],
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"batch_size is at least 1 and num_workers at least 0, got {batch_size} and {num_workers}")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        nodes = {"train": train, "validation": validation, "test": test}
        self.datasets: dict[str, Dataset] = {k: instantiate_from_config(node) for k, node in nodes.items() if node}
        self._loader: ResumableDataLoader | None = None
        self._resume: dict[str, int] | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What a model trained on this data must remember of it."""
        return getattr(self.datasets["train"], "metadata", {})

    def _workers(self) -> dict[str, Any]:
        return {
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": ignore_interrupts,
        }

    def train_dataloader(self) -> ResumableDataLoader:
        dataset, trainer = self.datasets["train"], self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        order = ResumableBatchSampler(len(dataset), self.batch_size, self.seed, rank, world_size)
        self._loader = ResumableDataLoader(dataset, order, **self._workers())
        if self._resume is not None:
            self._loader.load_state_dict(self._resume)
        return self._loader

    def _evaluation(self, split: str) -> DataLoader | list:
        if split not in self.datasets:
            return []
        dataset, trainer = self.datasets[split], self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        batches = evaluation_batches(len(dataset), self.batch_size, self.seed, rank, world_size)
        return DataLoader(dataset, batch_sampler=batches, **self._workers())

    def val_dataloader(self) -> DataLoader | list:
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader | list:
        return self._evaluation("test")

    def state_dict(self) -> dict[str, Any]:
        return {"train_loader": self._loader.state_dict()} if self._loader else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._resume = state["train_loader"]
