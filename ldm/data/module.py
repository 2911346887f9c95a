"""The LightningDataModule of training: datasets from config nodes, in an order that a resumed run repeats."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.config import check_params, get_obj_from_str, instantiate_from_config
from ldm.data.augment import DRAWS, Augmentation, WithDraws
from ldm.data.datasets import NoTiles, TileDataset
from ldm.data.sampler import ResumableBatchSampler, ResumableDataLoader, evaluation_batches, ignore_interrupts
from ldm.errors import UserError


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of items; tensors that differ in shape from item to item, as grids of features may, stay a list.

    >>> items = [{"image": torch.zeros(3, 8, 8), "grid": torch.zeros(8, side, side)} for side in (1, 4)]
    >>> batch = collate(items)
    >>> batch["image"].shape, [tuple(grid.shape) for grid in batch["grid"]]
    (torch.Size([2, 3, 8, 8]), [(8, 1, 1), (8, 4, 4)])
    """
    ragged = [
        key
        for key, value in items[0].items()
        if isinstance(value, Tensor) and len({item[key].shape for item in items}) > 1
    ]
    batch = default_collate([{key: value for key, value in item.items() if key not in ragged} for item in items])
    return batch | {key: [item[key] for item in items] for key in ragged}


def with_shared(node: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """A node whose dataset, or the dataset within it, has the params of `shared` that it takes and does not state.

    >>> tiles = {"target": "ldm.data.datasets.TileDataset", "params": {"where": {"split": "val"}}}
    >>> with_shared(tiles, {"stores": "cohort"})["params"]
    {'stores': 'cohort', 'where': {'split': 'val'}}
    """
    takes = inspect.signature(get_obj_from_str(node["target"])).parameters
    own = {
        key: with_shared(value, shared) if isinstance(value, Mapping) and "target" in value else value
        for key, value in (node.get("params") or {}).items()
    }
    return {**node, "params": {key: value for key, value in shared.items() if key in takes} | own}


def with_targets(node: Mapping[str, Any], targets: Mapping[str, str]) -> Mapping[str, Any]:
    """The node of a training set whose items also have `targets`, as further conditions. UserError: it takes none.

    >>> tiles = {"target": "ldm.data.datasets.TileDataset", "params": {"conditions": {"class": "disease"}}}
    >>> with_targets(tiles, {"repa": "features/uni"})["params"]["conditions"]
    {'class': 'disease', 'repa': 'features/uni'}
    """
    if not targets:
        return node
    params = dict(node.get("params") or {})
    if "conditions" in inspect.signature(get_obj_from_str(node["target"])).parameters:
        return {**node, "params": params | {"conditions": {**(params.get("conditions") or {}), **targets}}}
    inner = [key for key, value in params.items() if isinstance(value, Mapping) and "target" in value]
    if len(inner) != 1:
        named = ", ".join(targets.values())
        raise UserError(f"{node['target']} has no place for {named}, which the model's loss reads.")
    return {**node, "params": params | {inner[0]: with_targets(params[inner[0]], targets)}}


def _augmentation(node: Mapping[str, Any]) -> Augmentation:
    if not isinstance(node, Mapping):
        raise UserError(f"augment is `key: value` pairs, as {{stain: 0.05}}; got {node!r}.")
    check_params(Augmentation, node, "augment")
    return Augmentation(**node)


def _turned(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node of a training set with `dihedral: true`. UserError if it has no place for it, or states it."""
    turned = with_shared(node, {"dihedral": True})
    if turned["params"] == (node.get("params") or {}):
        raise UserError(
            f"augment.dihedral has no place in the training set: {node['target']} takes no `dihedral`, or its params "
            "state it already; leave one of them out."
        )
    return turned


class TileDataModule(pl.LightningDataModule):
    """Batches of the datasets named in a config.

    Args:
        train, validation, test: nodes `{target: ldm.data.datasets.TileDataset, params: {...}}`; items are asked for by
            (index, draw), see `ldm.data.datasets`. A test set without tiles is told and left out.
        batch_size: tiles per device and step. num_workers: processes that load tiles, per device.
        seed: of the order of tiles and of everything random in them.
        stores, keys, feature, latents, conditions, missing, gray, in_memory: params of those of the three that do not
            state them, see `ldm.data.datasets.TileDataset`.
        augment: how training images are changed at random, `{dihedral: true, stain: 0.05, colour: 0.1, blur: 0.1}`;
            see `ldm.data.augment.Augmentation`.
        targets: what losses read of training tiles beside what all three have, batch key -> source, as `conditions`;
            a training fills it in from its model.
    Raises:
        UserError: whatever is wrong with a dataset; no tile to train or to validate on; an augmentation that would
            change nothing.
    """

    def __init__(
        self,
        train: Mapping[str, Any],
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        stores: str | Sequence[str] | None = None,
        keys: Sequence[str] | None = None,
        feature: str | None = None,
        latents: str | None = None,
        conditions: Mapping[str, str] | None = None,
        missing: str | None = None,
        gray: bool | None = None,
        in_memory: bool | None = None,
        augment: Mapping[str, Any] | None = None,
        targets: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"batch_size is at least 1 and num_workers at least 0, got {batch_size} and {num_workers}.")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.augmentation = _augmentation(augment or {})
        if self.augmentation.dihedral:
            train = _turned(train)
        shared = {
            "stores": stores, "keys": keys, "feature": feature, "latents": latents, "conditions": conditions,
            "missing": missing, "gray": gray, "in_memory": in_memory,
        }  # fmt: skip
        shared = {key: value for key, value in shared.items() if value is not None}
        self.targets = dict(targets or {})
        self.datasets: dict[str, Dataset] = {}
        for split, node in {"train": train, "validation": validation, "test": test}.items():
            if not node:
                continue
            node = with_shared(node, shared)
            try:
                self.datasets[split] = instantiate_from_config(
                    with_targets(node, self.targets) if split == "train" else node
                )
            except NoTiles as error:
                if split != "test":
                    raise
                if rank_zero_only.rank == 0:
                    print(f"there is nothing to test on: {error}")
        for dataset in self.datasets.values():
            if isinstance(dataset, TileDataset):
                dataset.check_slides()
        if self.augmentation.of_pixels:
            self.augmentation.check(self.datasets["train"][0])
        self._loader: ResumableDataLoader | None = None
        self._resume: dict[str, int] | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What a model trained on this data must remember of it."""
        known = dict(getattr(self.datasets["train"], "metadata", {}))
        if not self.targets or "conditions" not in known:
            return known
        conditions = {key: about for key, about in known["conditions"].items() if key not in self.targets}
        return {key: value for key, value in known.items() if key != "conditions"} | (
            {"conditions": conditions} if conditions else {}
        )

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
        items = WithDraws(dataset) if self.augmentation.of_pixels else dataset
        self._loader = ResumableDataLoader(items, order, **self._workers())
        if self._resume is not None:
            self._loader.load_state_dict(self._resume)
        return self._loader

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Lightning's hook, on the device. A batch of the training has draws, one of an evaluation has none."""
        draws = batch.pop(DRAWS, None)
        return batch if draws is None else batch | {"image": self.augmentation(batch["image"], draws)}

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
