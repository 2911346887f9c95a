"""The smallest model and data that have everything which a resume can get wrong, for the tests of main.py."""

from __future__ import annotations

import os
import signal
import time

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.data.sampler import ResumableBatchSampler, ResumableDataLoader, evaluation_batches
from ldm.errors import UserError
from ldm.rng import generator, training_generator


class Items(Dataset):
    """Item i: its own image (3,size,size), turned and shifted as its draw says, and a feature (8,)."""

    def __init__(self, length: int, size: int = 4, damaged: int = -1, delay: float = 0.0):
        self.length, self.size, self.damaged, self.delay = length, size, damaged, delay

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        index, draw = key
        time.sleep(self.delay)
        if index == self.damaged:
            raise UserError(f"tile {index} is damaged")
        image = torch.randn(3, self.size, self.size, generator=generator(index)).rot90(draw % 4, (1, 2)) / 3
        return {"image": image + draw % 7 / 7, "ssl": image.flatten()[:8], "row": torch.tensor(index)}


class TinyData(pl.LightningDataModule):
    def __init__(
        self, batch_size: int, length=22, num_workers=0, persistent=False, size=4, damaged=-1, delay=0.0, seed=0,
        test=0, stop_at=-1, where="train", nan_at=-1, broken_at=-1, overflow_at=-1,
    ):  # fmt: skip
        super().__init__()
        self.stop_at, self.where, self.nan_at, self.broken_at = stop_at, where, nan_at, broken_at
        self.overflow_at = overflow_at
        self.damaged, self.delay, self.test = damaged, delay, test
        self.batch_size, self.length, self.num_workers, self.seed = batch_size, length, num_workers, seed
        self.persistent, self.size, self.loader, self.resume = persistent, size, None, None

    def setup(self, stage: str) -> None:
        if self.length < 1:
            raise UserError("there are no tiles")

    def train_dataloader(self) -> DataLoader:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        sampler = ResumableBatchSampler(self.length, self.batch_size, self.seed, rank, world)
        items = Items(self.length, self.size, self.damaged, self.delay)
        self.loader = ResumableDataLoader(
            items, sampler, num_workers=self.num_workers, persistent_workers=self.persistent
        )
        if self.resume:
            self.loader.load_state_dict(self.resume)
        return self.loader

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Items(5, self.size), batch_sampler=evaluation_batches(5, 2, self.seed))

    def test_dataloader(self) -> DataLoader | list:
        return DataLoader(Items(self.test), batch_sampler=evaluation_batches(self.test, 2)) if self.test else []

    def state_dict(self) -> dict:
        return {"train_loader": self.loader.state_dict()} if self.loader else {}

    def load_state_dict(self, state: dict) -> None:
        self.resume = state["train_loader"]


class TinyModel(pl.LightningModule):
    """Dropout, noise of its own, BatchNorm buffers, AdamW, a schedule, an average kept in on_train_batch_end."""

    def __init__(self, width: int = 8, monitor: str = "val/loss", seed=0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(48, width), nn.BatchNorm1d(width), nn.SiLU(), nn.Dropout(0.3), nn.Linear(width, 48)
        )
        self.register_buffer("average", torch.zeros(48))
        self.monitor, self.seed = monitor, seed
        self.learning_rate = 0.0

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        done = self.trainer.fit_loop.total_batch_idx
        x = batch["image"]
        noise = torch.randn(x.shape, generator=training_generator(self.seed, self.global_rank, done))
        loss = (self.net(x + noise) - noise.flatten(1)).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        data = self.trainer.datamodule
        if data.where != "val" and done + 1 == data.stop_at:
            (os.kill if data.where == "train" else os.killpg)(os.getpid(), signal.SIGINT)
        return loss * float("nan") if done + 1 == data.nan_at else loss

    def on_train_batch_end(self, *_) -> None:
        self.average = 0.9 * self.average + 0.1 * self.net[-1].bias.detach()
        if self.trainer.fit_loop.total_batch_idx + 1 == self.trainer.datamodule.broken_at:
            self.average[5] = float("nan")
        if self.trainer.fit_loop.total_batch_idx + 1 == self.trainer.datamodule.overflow_at:
            self.optimizers().state[self.net[1].bias]["exp_avg_sq"][0] = float("inf")

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x = batch["image"]
        self.log("val/loss", (self.net(x) - torch.randn(x.shape).flatten(1)).square().mean())
        data = self.trainer.datamodule
        if data.where == "val" and self.trainer.fit_loop.total_batch_idx + 1 == data.stop_at and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self.log("test/loss", (self.net(batch["image"]) - batch["image"].flatten(1)).square().mean())

    def log_images(self, batch: dict, n: int) -> dict[str, Tensor]:
        return {"inputs": batch["image"][:n], "samples": torch.randn(n, 3, 4, 4)}

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
