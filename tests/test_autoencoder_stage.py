from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from demo.build.pretrain_first_stage import pretrain
from ldm.autoencoder import perceptual
from ldm.autoencoder.autoencoder import Reconstruction
from ldm.autoencoder.losses import (
    LPIPSWithDiscriminator,
    VQLPIPSWithDiscriminator,
    adaptive_weight,
    hinge_d_loss,
    vanilla_d_loss,
)
from ldm.autoencoder.stage import AutoencoderStage
from ldm.autoencoder.weights import read_state_dict
from ldm.config import load_config, save_config
from ldm.errors import UserError
from ldm.model_folder import load_first_stage, read_model_folder, write_model_folder

ROOT = Path(__file__).resolve().parent.parent
DDCONFIG = {
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "mid_attention": False,
    "num_groups": 4,
}
KL = {"target": "ldm.autoencoder.autoencoder.AutoencoderKL", "params": {"ddconfig": DDCONFIG, "embed_dim": 3}}
VQ = {
    "target": "ldm.autoencoder.autoencoder.VQModel",
    "params": {"ddconfig": DDCONFIG, "embed_dim": 3, "n_embed": 16},
}
DISC = {"perceptual_weight": 0, "disc_ndf": 4, "disc_num_layers": 2}


def loss_node(kind: str = "LPIPSWithDiscriminator", disc_start: int = 0, **params) -> dict:
    return {"target": f"ldm.autoencoder.losses.{kind}", "params": {"disc_start": disc_start, **DISC, **params}}


class Tiles(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)) * 2 - 1}


def stage(first_stage=KL, loss=None, **params) -> AutoencoderStage:
    torch.manual_seed(0)
    built = AutoencoderStage(first_stage, loss or loss_node(), **params)
    built.learning_rate = 1e-3
    return built


def fit(model: AutoencoderStage, folder, steps: int, ckpt_path=None, **options) -> pl.Trainer:
    """Epochs of two batches; the checkpoint of the end is `last.ckpt`."""
    options = {"max_epochs": steps // 2, "limit_val_batches": 0, "logger": False, "precision": "32-true"} | options
    trainer = pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        enable_checkpointing=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    loader = DataLoader(Tiles(), batch_size=2)
    trainer.fit(model, loader, loader, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


# ------------------------------------------------------------------------------------------------------------- losses


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    last = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    features, logit_weights = torch.randn(7, 2), torch.randn(7)
    y = features @ last.T
    nll, logits = y.abs().sum(), y[:, 0] * logit_weights
    nll_gradient = (y.sign() * features).sum(0).norm()
    g_gradient = -(logit_weights[:, None] * features).mean(0)
    expected = nll_gradient / (g_gradient.norm() + 1e-4) * 0.5
    assert torch.allclose(adaptive_weight(nll, logits, last, disc_weight=0.5), expected)
    assert adaptive_weight(1e9 * y.sum(), 1e-9 * logits, last, disc_weight=0.5) == 0.5e4


def test_discriminator_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert hinge_d_loss(real, fake) == pytest.approx(0.5 * (0.25 + 0.5))
    expected = nn.functional.binary_cross_entropy_with_logits
    assert vanilla_d_loss(real, fake) == pytest.approx(
        float(0.5 * (expected(real, torch.ones(2)) + expected(fake, torch.zeros(2))))
    )


@pytest.mark.parametrize(
    ("kind", "key", "told"),
    [
        ("LPIPSWithDiscriminator", "disc_wieght", "did you mean 'disc_weight'"),
        ("VQLPIPSWithDiscriminator", "disc_wieght", "did you mean 'disc_weight'"),
        ("VQLPIPSWithDiscriminator", "learn_logvar", "Known: codebook_weight, disc_factor, disc_in_channels"),
    ],
)
def test_unknown_settings_of_a_loss_are_refused(kind, key, told):
    with pytest.raises(UserError, match=f"{kind}.{key}' of {kind}.*{told}"):
        stage(loss=loss_node(kind, **{key: 1}))


def test_kl_loss_sums_over_pixels_and_vq_loss_averages():
    x, y, last = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.5), nn.Parameter(torch.zeros(1))
    recon = Reconstruction(y, torch.tensor(7.0), None, y)
    loss, logs = LPIPSWithDiscriminator(disc_start=9, kl_weight=0.1, logvar_init=0.3, **DISC)(x, recon, 0, last)
    assert loss.item() == pytest.approx(3 * 16 * 16 * (0.5 / torch.tensor(0.3).exp().item() + 0.3) + 0.7, rel=1e-5)
    assert logs["rec_loss"] == 0.5
    loss, _ = VQLPIPSWithDiscriminator(disc_start=9, codebook_weight=0.1, **DISC)(x, recon, 0, last)
    assert loss.item() == pytest.approx(0.5 + 0.7)
    loss, _ = VQLPIPSWithDiscriminator(disc_start=9, codebook_weight=0, pixel_loss="l2", **DISC)(x, recon, 0, last)
    assert loss.item() == pytest.approx(0.25)


def test_wrong_loss_names_are_refused():
    for wrong in ({"pixel_loss": "l3"}, {"disc_loss": "hinges"}, {"perceptual_loss": "vgg19", "perceptual_weight": 1}):
        with pytest.raises(UserError):
            LPIPSWithDiscriminator(disc_start=0, **(DISC | wrong))


def test_missing_lpips_backbone_is_named_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download was tried"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError) as error:
        LPIPSWithDiscriminator(disc_start=0)
    for part in ("vgg16-397923af.pth", str(tmp_path), "https://download.pytorch.org", "BSD-3", "perceptual_weight=0"):
        assert part in str(error.value)


def test_lpips_runs_on_a_local_backbone(tmp_path, monkeypatch):
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).state_dict(), tmp_path / "backbone.pth")
    distance = perceptual.LPIPS("squeeze", str(tmp_path / "backbone.pth"))
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    assert distance(x, y).shape == (2, 1, 1, 1)
    assert distance(x, y).min() > 0
    assert distance(x, x).abs().max() == 0
    assert not any(p.requires_grad for p in distance.parameters())
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="not the torchvision backbone"):
        perceptual.LPIPS("squeeze", str(tmp_path / "backbone.pth"))


class TwoMaps(nn.Module):
    def forward(self, x):
        return [x, nn.functional.avg_pool2d(x, 2)]


def test_feature_distance_is_a_mean_of_unit_vector_differences():
    distance = perceptual.FeatureDistance(TwoMaps())
    x = torch.zeros(1, 3, 4, 4)
    y = x.clone()
    x[:, 0], y[:, 1] = 2.0, 5.0  # orthogonal directions at every position: squared difference 2, in both maps
    assert distance(x, y).item() == pytest.approx(4, rel=1e-4)
    assert distance(x, 3 * x).item() == pytest.approx(0, abs=1e-6)


def test_maps_of_the_shipped_encoder_tell_blurred_tissue_from_sharp(demo_slide):
    from ldm.images.slides import open_slide

    maps = perceptual.EncoderMaps(str(ROOT / "data" / "models" / "demo-encoder"), levels=4)
    pixels = open_slide(demo_slide).read(1024, 1900, 128, 128)
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert [tuple(m.shape[2:]) for m in maps(x)] == [(64, 64), (32, 32), (16, 16), (8, 8)]
    blurred = nn.functional.avg_pool2d(x, 9, 1, 4, count_include_pad=False)
    brighter = x + (blurred - x).abs().mean()  # as far in pixels
    distance = perceptual.FeatureDistance(maps)
    assert distance(x, blurred) > 1.5 * distance(x, brighter)


# -------------------------------------------------------------------------------------------------------------- stage


def test_discriminator_sleeps_until_its_start(tmp_path, monkeypatch):
    model = stage(loss=loss_node(disc_start=4))
    before = [p.clone() for p in model.loss.discriminator.parameters()]
    monkeypatch.setattr(model.loss.discriminator, "forward", lambda _: pytest.fail("the discriminator was run"))
    trainer = fit(model, tmp_path, steps=4)
    assert trainer.global_step == 4
    assert all(torch.equal(p, q) for p, q in zip(before, model.loss.discriminator.parameters()))


@pytest.mark.parametrize(("first_stage", "kind"), [(KL, "LPIPSWithDiscriminator"), (VQ, "VQLPIPSWithDiscriminator")])
def test_both_optimisers_train_and_steps_count_updates_of_the_autoencoder(tmp_path, first_stage, kind):
    model = stage(first_stage, loss_node(kind, disc_start=1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = fit(model, tmp_path, steps=4)
    assert trainer.global_step == 4
    kept = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    fixed = {"loss.logvar", "loss.discriminator.main.8.bias"}  # fixed; no pull while hinges are linear
    assert kept <= fixed, kept
    steps = [next(iter(opt.state.values()))["step"].item() for opt in trainer.optimizers]
    assert steps == [4, 3]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.slow
def test_resuming_repeats_the_run_bit_by_bit(tmp_path, precision):
    loss = loss_node(disc_start=1)
    straight, first, resumed = (stage(loss=loss, seed=3) for _ in range(3))
    fit(straight, tmp_path / "straight", steps=4, precision=precision)
    fit(first, tmp_path / "half", steps=2, precision=precision)
    torch.manual_seed(99)  # nothing may depend on it
    fit(resumed, tmp_path / "half", steps=4, precision=precision, ckpt_path=tmp_path / "half" / "last.ckpt")
    one, two = (torch.load(tmp_path / d / "last.ckpt", weights_only=True) for d in ("straight", "half"))
    assert one["global_step"] == two["global_step"] == 4
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    for a, b in zip(one["optimizer_states"], two["optimizer_states"]):
        for index, state in a["state"].items():
            assert all(torch.equal(value, b["state"][index][name]) for name, value in state.items())


@pytest.mark.slow
def test_seed_decides_the_noise_of_the_latents(tmp_path):
    runs = [stage(seed=seed) for seed in (0, 0, 1)]
    for index, model in enumerate(runs):
        fit(model, tmp_path / str(index), steps=2)
    one, same, other = (model.autoencoder.decoder.conv_in.weight for model in runs)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_accumulation_averages_batches_and_clipping_bounds_the_step(tmp_path):
    model = stage(loss=loss_node(disc_start=9), accumulate_grad_batches=2)
    assert fit(model, tmp_path, steps=4).global_step == 2
    model = stage(loss=loss_node(disc_start=0), gradient_clip_val=1e-3)
    norms, clip = [], model.on_before_optimizer_step

    def clip_and_note(optimizer):
        clip(optimizer)
        norms.append(torch.stack([p.grad.norm() for g in optimizer.param_groups for p in g["params"]]).norm())

    model.on_before_optimizer_step = clip_and_note
    fit(model, tmp_path, steps=2)
    assert len(norms) == 4
    assert max(norms) <= 1e-3 * 1.001


def test_frozen_encoder_keeps_the_latents(tmp_path):
    model = stage(loss=loss_node(disc_start=1), freeze_encoder=True)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        z, y = model.autoencoder.latent(x), model.autoencoder(x).image
        fit(model, tmp_path, steps=4)
        model.eval()
        assert torch.equal(model.autoencoder.latent(x), z)
        assert not torch.equal(model.autoencoder(x).image, y)


@pytest.mark.parametrize("first_stage", [KL, VQ])
def test_validation_numbers_and_images(tmp_path, first_stage):
    model = stage(first_stage, loss_node("VQLPIPSWithDiscriminator" if first_stage is VQ else "LPIPSWithDiscriminator"))
    trainer = fit(model, tmp_path, steps=2, limit_val_batches=2)
    assert {"val/rec_loss", "val/psnr", "train/rec_loss", "train/d_weight"} <= set(trainer.callback_metrics)
    assert first_stage is KL or 1 <= trainer.callback_metrics["val/codes_used"] <= 16
    loader = DataLoader(Tiles(), batch_size=2)
    (measured,) = trainer.test(model, loader, verbose=False)
    assert measured["test/psnr"] == pytest.approx(trainer.validate(model, loader, verbose=False)[0]["val/psnr"])
    images = model.log_images(next(iter(DataLoader(Tiles(), batch_size=4))), n=3)
    assert set(images) == {"inputs", "reconstructions", "samples"}
    assert all(value.shape == (3, 3, 32, 32) and value.abs().max() <= 1 for value in images.values())


def test_what_is_reduced_over_ranks_lies_on_the_device(monkeypatch):
    model = stage(VQ, loss_node("VQLPIPSWithDiscriminator"))
    logged: dict = {}
    monkeypatch.setattr(model, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(AutoencoderStage, "device", torch.device("meta"))
    model.validation_step(next(iter(DataLoader(Tiles(), batch_size=2))), 0)
    assert logged["val/codes_used"].device.type == "meta"


def test_starting_from_a_model_folder_takes_its_weights_and_its_licence(tmp_path):
    source = stage()
    write_model_folder(tmp_path / "folder", KL, source.autoencoder.state_dict(), {"licence": "CC0"})
    model = stage(ckpt_path=str(tmp_path / "folder"))
    assert torch.equal(model.autoencoder.quant_conv.weight, source.autoencoder.quant_conv.weight)
    fit(model, tmp_path, steps=2)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["histoldm_metadata"] == {"licence": "CC0"}


def test_starting_from_a_checkpoint_takes_its_discriminator_where_it_fits(tmp_path):
    source = stage()
    fit(source, tmp_path, steps=2)
    trained = source.loss.discriminator.main[0].weight
    for loss, fits in ((loss_node(), True), (loss_node(disc_ndf=8), False)):
        model = AutoencoderStage(KL, loss, ckpt_path=str(tmp_path / "last.ckpt"))
        weight = model.loss.discriminator.main[0].weight
        assert (weight.shape == trained.shape and torch.equal(weight, trained)) == fits


def test_users_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"base_learning_rate"):
        AutoencoderStage(KL, loss_node()).configure_optimizers()
    with pytest.raises(UserError, match="no 'picture'"):
        fit(stage(image_key="picture"), tmp_path, steps=2)


# ------------------------------------------------------------------------------------------------------- pre-training


@pytest.mark.slow
def test_pretraining_writes_a_model_folder_and_continues_where_it_stopped(tmp_path, demo_slide):
    from ldm.images.slides import open_slide

    pixels = np.ascontiguousarray(open_slide(demo_slide).read(900, 1500, 320, 480))
    Image.fromarray(pixels).save(tmp_path / "tissue.png")
    config = load_config([ROOT / "configs" / "demo" / "pretrain_first_stage.yaml"])
    config["model"]["params"]["first_stage"] = KL
    config["model"]["params"]["loss"] = loss_node(disc_start=1)
    held_out = [0, 220, 320, 260]
    config["images"] = [{"path": str(tmp_path / "tissue.png"), "mpp": 0.499, "exclude": [held_out]}]
    config["train"] |= {"crop": 32, "batch_size": 2, "steps_per_epoch": 2, "precision": "32-true"}
    config["train"]["rate"] = [[0, 1], [4, 0]]
    lacking = {name: value for name, value in config["train"].items() if name != "glass"}
    misspelt = {**lacking, "glas": 0}
    for wrong, message in ((lacking, "the config's train lacks glass"), (misspelt, "did you mean 'glass'")):
        save_config(config | {"train": wrong}, tmp_path / "wrong.yaml")
        with pytest.raises(UserError, match=message):
            pretrain(tmp_path / "wrong.yaml", tmp_path / "never")
    assert not list(tmp_path.glob("never*"))

    def run(name: str, epochs: int) -> Path:
        config["train"]["epochs"] = epochs
        save_config(config, tmp_path / "config.yaml")
        pretrain(tmp_path / "config.yaml", tmp_path / name)
        return tmp_path / name

    run("stopped", 1)
    stopped, straight = read_state_dict(run("stopped", 2)), read_state_dict(run("straight", 2))
    assert all(torch.equal(value, stopped[name]) for name, value in straight.items())
    _, metadata = read_model_folder(tmp_path / "straight")
    assert metadata["training"]["steps"] == 4
    assert {"psnr", "rec_loss"} <= set(metadata["training"]["held_out"])
    again = AutoencoderStage(KL, config["model"]["params"]["loss"], ckpt_path=str(tmp_path / "straight"))
    discriminator = read_state_dict(tmp_path / "straight" / "discriminator.safetensors")
    assert torch.equal(again.loss.discriminator.main[0].weight, discriminator["main.0.weight"].float())
    z = load_first_stage(str(tmp_path / "straight")).latent(torch.zeros(1, 3, 32, 32))
    assert z.shape == (1, 3, 16, 16)
    assert (tmp_path / "straight-run" / "pictures" / "step-000004.png").is_file()
