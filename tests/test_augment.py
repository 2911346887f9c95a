"""Augmentation: a change does what it says and nothing else, draws are the item's own, what cannot act is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.color import hed_from_rgb, rgb2hsv
from torch import Tensor

from ldm.config import save_config
from ldm.data import dihedral
from ldm.data.augment import COUNT, DRAWS, SIGMA, Augmentation
from ldm.data.datasets import to_tensor
from ldm.data.module import TileDataModule
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore
from ldm.errors import UserError
from ldm.training import command

CONFIGS = Path(__file__).parent / "configs"
TILES, REGIONS = "ldm.data.datasets.TileDataset", "ldm.data.datasets.RegionDataset"
BLUR, SIZE = 7, 8  # places of the draws


@pytest.fixture(scope="module")
def tiles(tiny_store: Path) -> Tensor:
    """Four tiles (4,3,64,64) of tissue."""
    store = TileStore.open(tiny_store)
    rows = np.argsort(store.labels("tissue"))[-4:]
    return torch.stack([to_tensor(store.tile(int(row))[:64, :64]) for row in rows])


@pytest.fixture
def picture(demo_slide: Path, tmp_path: Path, tiles: Tensor) -> Path:
    """A small picture of tissue, to cut crops from."""
    path = tmp_path / "tissue.png"
    Image.fromarray(((tiles[0] + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(path)
    return path


def nothing(count: int, **changed: float) -> Tensor:
    """Draws (count,COUNT) that change nothing, but those of the given places."""
    draws = torch.full((count, COUNT), 0.5)
    draws[:, BLUR] = 1
    for place, value in changed.items():
        draws[:, int(place.removeprefix("at"))] = value
    return draws


def unit(images: Tensor) -> np.ndarray:
    """(B,H,W,3) in [0, 1]."""
    return ((images.double() + 1) / 2).permute(0, 2, 3, 1).numpy()


def amounts(images: Tensor) -> np.ndarray:
    """(B,H,W,3): haematoxylin, eosin and DAB of images."""
    return -np.log(unit(images).clip(1 / 255)) @ hed_from_rgb


@pytest.mark.parametrize("place", range(3))
def test_one_stain_is_scaled_and_the_others_stay(tiles, place):
    images = tiles.clone()
    images[:, :, :8, :8] = 1  # glass
    images = images.clamp(-0.8, 1)  # nothing so dark that it would be cut off
    out = Augmentation(stain=0.2)(images, nothing(4, **{f"at{place}": 0.25}))
    wanted = amounts(images)
    wanted[..., place] *= 0.9
    light = unit(out).max(-1) < 1  # less of a negative amount may be lighter than white, which is cut off
    assert light.mean() > 0.9
    np.testing.assert_allclose(amounts(out)[light], wanted[light], atol=1e-4)
    assert torch.equal(out[:, :, :8, :8], images[:, :, :8, :8])


def test_colour_changes_brightness_contrast_saturation_and_hue_each_by_itself(tiles):
    images, colour = tiles.clamp(-0.6, 0.6), Augmentation(colour=0.1)
    before = unit(images)
    grey = before @ [0.299, 0.587, 0.114]

    def after(place: int) -> np.ndarray:
        return unit(colour(images, nothing(4, **{f"at{place}": 1.0})))

    np.testing.assert_allclose(after(3), before * 1.1, atol=1e-5)
    middle = grey.mean((1, 2))[:, None, None, None]
    np.testing.assert_allclose(after(4), middle + 1.1 * (before - middle), atol=1e-5)
    np.testing.assert_allclose(after(5), grey[..., None] + 1.1 * (before - grey[..., None]), atol=1e-5)
    first, second = rgb2hsv(before), rgb2hsv(after(6))
    np.testing.assert_allclose(second[..., 1:], first[..., 1:], atol=1e-4)  # saturation and value stay
    coloured = first[..., 1] > 0.05
    turned = (second - first)[..., 0][coloured] * 2 * np.pi
    np.testing.assert_allclose(np.angle(np.exp(1j * turned)), 0.1, atol=1e-3)


def test_blur_is_a_gaussian_and_leaves_the_others_bit_for_bit(tiles):
    draws = nothing(4)
    draws[1:3, BLUR], draws[1:3, SIZE] = 0.09, torch.tensor([0.0, 1.0])
    out = Augmentation(blur=0.1)(tiles, draws)
    assert torch.equal(out[0], tiles[0])
    assert torch.equal(out[3], tiles[3])
    for i, sigma in zip((1, 2), SIGMA):
        wanted = gaussian_filter(tiles[i].numpy(), (0, sigma, sigma), mode="mirror", radius=(0, 5, 5))
        np.testing.assert_allclose(out[i].numpy(), wanted, atol=1e-4)


def test_without_strength_nothing_changes_and_what_changes_carries_no_gradient(tiles):
    draws = torch.rand(4, COUNT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Augmentation()(tiles, draws), tiles)
    everything = Augmentation(stain=0.1, colour=0.1, blur=1.0)
    lit = tiles.clamp(min=-0.99)
    torch.testing.assert_close(everything(lit, nothing(4)), lit, atol=1e-4, rtol=0)
    changed = everything(tiles.clone().requires_grad_(), draws)
    assert not changed.requires_grad
    assert (changed - tiles).abs().mean() > 0.01
    assert changed.abs().max() <= 1


def test_every_image_has_its_own_change_whatever_stands_beside_it(tiles):
    draws = torch.rand(4, COUNT, generator=torch.Generator().manual_seed(1))
    augmentation = Augmentation(stain=0.2, colour=0.2, blur=0.5)
    out = augmentation(tiles[:1].expand(4, -1, -1, -1), draws)
    assert all((out[i] - out[k]).abs().mean() > 1e-3 for i in range(4) for k in range(i))
    alone = torch.cat([augmentation(tiles[i : i + 1], draws[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(augmentation(tiles, draws), alone, atol=1e-6, rtol=0)


# --- in the data ----------------------------------------------------------------------------------------------------


def tile_data(store: Path, augment: Any = None, keys: tuple[str, ...] = ("image",), **params: Any) -> TileDataModule:
    node = {"target": TILES, "params": {"stores": str(store), "keys": list(keys), **params}}
    return TileDataModule(node, node, batch_size=3, seed=5, augment=augment)


def test_draws_are_the_items_own(tiny_store):
    data = tile_data(tiny_store, {"stain": 0.05})
    batch = next(iter(data.train_dataloader()))
    again = next(iter(tile_data(tiny_store, {"stain": 0.05}).train_dataloader()))
    assert torch.equal(batch[DRAWS], again[DRAWS])
    assert len(batch[DRAWS].unique()) == 3 * COUNT
    index = int(batch["row"][0])
    loader = data.train_dataloader()
    key = next(key for key in loader.batch_sampler.batch(0) if key[0] == index)
    assert torch.equal(loader.dataset[key][DRAWS], batch[DRAWS][0])  # whichever batch, worker or rank asks for it
    assert not torch.equal(loader.dataset[(index, key[1] + 1)][DRAWS], batch[DRAWS][0])


def test_training_batches_are_changed_and_others_are_not(tiny_store):
    data = tile_data(tiny_store, {"stain": 0.3})
    batch = next(iter(data.train_dataloader()))
    image, draws = batch["image"], batch[DRAWS]
    changed = data.on_after_batch_transfer(dict(batch), 0)
    assert DRAWS not in changed
    assert torch.equal(changed["image"], data.augmentation(image, draws))
    assert not torch.equal(changed["image"], image)
    batch = next(iter(data.val_dataloader()))
    assert data.on_after_batch_transfer(dict(batch), 0)["image"] is batch["image"]


def test_there_is_none_by_default(tiny_store):
    data = tile_data(tiny_store)
    assert data.augmentation == Augmentation()
    batch = next(iter(data.train_dataloader()))
    assert DRAWS not in batch
    stored = TileStore.open(tiny_store).tile(int(batch["row"][0]))
    assert torch.equal(data.on_after_batch_transfer(batch, 0)["image"][0], to_tensor(stored))


def test_tiles_of_the_training_are_turned_by_their_draw(tiny_store):
    data = tile_data(tiny_store, {"dihedral": True})
    loader = data.train_dataloader()
    for key in loader.batch_sampler.batch(0):
        stored = to_tensor(TileStore.open(tiny_store).tile(key[0]))
        assert torch.equal(loader.dataset[key]["image"], dihedral.apply(stored, key[1] % 8))
    assert not data.datasets["validation"].dihedral


def test_what_cannot_act_is_refused(tiny_store):
    cases: list[tuple[Any, str]] = [
        ({"stain": 1.5}, r"augment\.stain is a number from 0 \(off\) to 1; got 1\.5"),
        ({"blur": True}, r"augment\.blur is a number"),
        ({"dihedral": 1}, r"augment\.dihedral is true or false; got 1"),
        ({"color": 0.1}, r"unknown key 'augment\.color'.*colour"),
        (True, "augment is `key: value` pairs"),
    ]
    for augment, message in cases:
        with pytest.raises(UserError, match=message):
            tile_data(tiny_store, augment)
    with pytest.raises(UserError, match="three channels; these have 1"):
        tile_data(tiny_store, {"stain": 0.1, "blur": 0.1}, gray=True)
    tile_data(tiny_store, {"blur": 0.1}, gray=True)
    with pytest.raises(UserError, match="state it already"):
        tile_data(tiny_store, {"dihedral": True}, dihedral=False)


def test_cached_latents_are_not_changed_behind_the_back(tiny_store, tmp_path):
    path = tmp_path / tiny_store.name
    shutil.copytree(tiny_store, path)
    count = len(TileStore.open(path))
    with ArrayWriter(path, "latents/one", (2, 4, 4), "f2") as writer:
        writer.append(np.zeros((count, 2, 4, 4), np.float16))
    cached = {"keys": ("image", "latent"), "latents": "one"}
    with pytest.raises(UserError, match=r"pixels \(stain, blur\).*cached latents.*take `latent` out"):
        tile_data(path, {"stain": 0.1, "blur": 0.1}, **cached)
    with pytest.raises(UserError, match="in one orientation"):
        tile_data(path, {"dihedral": True}, **cached)


@pytest.mark.parametrize("model", ["tiny_autoencoder", "tiny_diffusion"])
@pytest.mark.slow
def test_an_augmented_training_is_repeated_bit_by_bit(model, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{model}.yaml"))
    params = config["model"]["params"]
    if model == "tiny_diffusion":  # of pixels, unconditional
        del params["cond_stage_config"]
        params["unet_config"]["params"] |= {"image_size": 16, "use_spatial_transformer": False, "context_dim": None}
    images = [{"path": str(picture), "mpp": 0.5}]
    node = {"target": REGIONS, "params": {"images": images, "size": 16, "length": 8, "dihedral": False}}
    augment = {"stain": 0.2, "colour": 0.2, "blur": 0.5}
    config["data"] = {
        "target": "ldm.data.module.TileDataModule",
        "params": {"train": node, "validation": node, "batch_size": 2, "augment": augment},
    }
    save_config(config, "augmented.yaml")

    def run(logs: str, *options: str) -> dict:
        steps = ["-t", "-l", logs, "--enable_progress_bar", "false", "lightning.callbacks.image_logger=null"]
        assert command.main([*steps, *options]) == 0
        (folder,) = Path(logs).iterdir()
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)

    new = ["-b", "augmented.yaml"]
    straight = run("straight", *new, "--max_steps", "2")
    run("halves", *new, "--max_steps", "1")
    resumed = run("halves", "-r", str(next(Path("halves").iterdir())), "--max_steps", "2")
    plain = run("plain", *new, "--max_steps", "2", "data.params.augment=null")
    weights = {name: value for name, value in straight["state_dict"].items() if "perceptual" not in name}
    assert resumed["global_step"] == 2
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in weights.items())
    assert any(not torch.equal(value, plain["state_dict"][name]) for name, value in weights.items())
