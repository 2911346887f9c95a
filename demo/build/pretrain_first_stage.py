r"""Train a small first stage from scratch on random crops of a few images.

The training is `ldm.autoencoder.stage.AutoencoderStage`'s; this script adds the crops and writes a model folder.
FOLDER-run keeps the checkpoint that an interrupted run goes on from, the numbers of every epoch and reconstructions of
held-out crops (above: real, below: reconstructed).

Example:

    python -m demo.build.pretrain_first_stage --out FOLDER \
        --config configs/demo/pretrain_first_stage.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_prep.options import inputs, output
from demo.build.pretrain_encoder import check_keys
from ldm.cli.script import script
from ldm.config import instantiate_from_config, load_config
from ldm.data.datasets import RegionDataset, to_tensor
from ldm.devices import TRAINER, faster_precision
from ldm.errors import UserError
from ldm.files import owns
from ldm.images.sheets import grid
from ldm.images.slides import open_slide
from ldm.images.write import save_png, to_uint8
from ldm.model_folder import write_model_folder
from ldm.rng import fold

KEYS = {"name", "licence", "seed", "model", "images", "train"}
TRAIN_KEYS = {"mpp", "crop", "glass", "batch_size", "steps_per_epoch", "epochs", "rate", "precision"}


class HeldOut(Dataset):
    """Non-overlapping tiles (3,S,S) of the rectangles that the first image excludes from training."""

    def __init__(self, images: list[dict], size: int):
        slide = open_slide(images[0]["path"], images[0].get("mpp"))
        width, height = slide.dimensions
        self.tiles = [
            to_tensor(slide.read(column, row, size, size))
            for x, y, w, h in images[0].get("exclude", [])
            for row in range(y, min(y + h, height) - size + 1, size)
            for column in range(x, min(x + w, width) - size + 1, size)
        ]
        if not self.tiles:
            raise UserError(f"the first image excludes no rectangle that holds a tile of {size} px to validate on")

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.tiles[index]}


class Consecutive(Sampler):
    """Epoch e takes items e·length .. (e+1)·length - 1 with their draws, so an interrupted run meets each item once."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        items = range(self.epoch * self.length, (self.epoch + 1) * self.length)
        return ((item, fold(self.seed, item)) for item in items)


class Rate(pl.Callback):
    """The learning rate follows a line through points (step, factor of the base rate)."""

    def __init__(self, points: list[list[float]]):
        self.steps, self.factors = zip(*points)

    def on_train_batch_start(self, trainer: pl.Trainer, stage: pl.LightningModule, batch, batch_idx: int) -> None:
        factor = float(np.interp(trainer.global_step, self.steps, self.factors))
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * factor


class Export(pl.Callback):
    """After every epoch: the model folder and a picture of held-out reconstructions."""

    def __init__(self, config: dict, config_path: Path, out: Path, pictures: Path, tiles: Dataset):
        self.config, self.config_path, self.out, self.pictures, self.tiles = config, config_path, out, pictures, tiles

    @torch.no_grad()
    def on_validation_end(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        stage.eval()
        x = torch.stack([self.tiles[i]["image"] for i in np.linspace(0, len(self.tiles) - 1, 5).astype(int)])
        recon = stage.log_images({"image": x}, n=len(x))["reconstructions"]
        about = {"content": "above: real; below: reconstructed", "step": trainer.global_step}
        picture = grid([to_uint8(x), to_uint8(recon)], least=0)
        save_png(self.pictures / f"step-{trainer.global_step:06d}.png", picture, about)

        z = torch.cat([stage.autoencoder.latent(self.tiles[i]["image"][None]) for i in range(len(self.tiles))])
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        trainer.print(f"step {trainer.global_step}: " + ", ".join(f"{k} {v:.4g}" for k, v in sorted(metrics.items())))
        training = {
            "command": "python -m demo.build.pretrain_first_stage",
            "config": str(self.config_path),
            "images": [entry["path"] for entry in self.config["images"]],
            "steps": trainer.global_step,
            "seed": self.config["seed"],
            "started_from": stage.metadata.get("training"),
            "held_out": {name.removeprefix("val/"): round(value, 4) for name, value in sorted(metrics.items())},
        }
        metadata = {
            "name": self.config["name"],
            "licence": self.config["licence"],
            "mpp": self.config["train"]["mpp"],
            "scale_factor": round(1 / float(z.std()), 5),  # latents times this have unit variance
            "latent_std_per_channel": [round(float(v), 4) for v in z.std(dim=(0, 2, 3))],
            "training": training,
        }
        node = self.config["model"]["params"]["first_stage"]
        write_model_folder(self.out, node, stage.autoencoder.state_dict(), metadata, dtype=torch.float16)
        if stage.loss.adversarial(trainer.global_step):  # for those who train on
            state = stage.loss.discriminator.state_dict()
            halves = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
            save_file(halves, self.out / "discriminator.safetensors")


@owns(beside=True)
def pretrain(config_path: Path, out: Path) -> None:
    config = load_config([config_path])
    check_keys(config, KEYS, "the config")
    check_keys(config["model"], {"target", "base_learning_rate", "params"}, "the config's model")
    check_keys(config["train"], TRAIN_KEYS, "the config's train")
    train = config["train"]
    run = out.with_name(out.name + "-run")
    pl.seed_everything(config["seed"])
    node = {"target": config["model"]["target"], "params": config["model"]["params"]}
    stage = instantiate_from_config(node, seed=config["seed"])
    stage.learning_rate = config["model"]["base_learning_rate"]
    length = train["steps_per_epoch"] * train["batch_size"]
    crops = RegionDataset(config["images"], train["crop"], length, train["mpp"], background=train["glass"])
    held_out = HeldOut(config["images"], size=256)
    checkpoint = ModelCheckpoint(run, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=TRAINER[faster_precision("cpu")[0]] if train["precision"] == "auto" else train["precision"],
        max_epochs=train["epochs"],
        logger=CSVLogger(run, name=None, version=""),
        log_every_n_steps=20,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        callbacks=[
            Rate(train["rate"]),
            Export(config, config_path, out, run / "pictures", held_out),
            checkpoint,
        ],
    )
    last = run / "last.ckpt"
    trainer.fit(
        stage,
        DataLoader(crops, batch_size=train["batch_size"], sampler=Consecutive(length, config["seed"])),
        DataLoader(held_out, batch_size=4),
        ckpt_path=last if last.is_file() else None,
        weights_only=True,
    )


@script("demo.build.pretrain_first_stage", __doc__)
def main(
    config: Annotated[Path, inputs("--config", help="Config, YAML, as configs/demo/pretrain_first_stage.yaml.")],
    out: Annotated[Path, output("--out", help="Model folder to write.")],
) -> None:
    pretrain(config, out)


if __name__ == "__main__":
    main.run()
