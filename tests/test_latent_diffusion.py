"""LatentDiffusion: training, its weights on disk, and the images that come out."""

from __future__ import annotations

import re

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import ldm
from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.latent_diffusion import LatentDiffusion
from ldm.model_card import HEADINGS
from ldm.model_folder import load_weights, write_model_folder

DDCONFIG = dict(double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1],
                num_res_blocks=1, attn_resolutions=[], dropout=0.0)  # fmt: skip
UNET = dict(in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=[2],
            channel_mult=[1, 2], num_heads=2, use_spatial_transformer=True, context_dim=32, image_size=16)  # fmt: skip


def node(**params) -> dict:
    return {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": UNET},
            "first_stage_config": {
                "target": "ldm.autoencoder.autoencoder.AutoencoderKL",
                "params": {"ddconfig": DDCONFIG, "embed_dim": 4},
            },
            "cond_stage_config": {
                "target": "ldm.conditioners.ssl.PatchEmbedder",
                "params": {"embed_dim": 24, "context_dim": 32},
            },
            **params,
        },
    }


def build(seed: int = 0, **params) -> LatentDiffusion:
    torch.manual_seed(seed)
    model = instantiate_from_config(node(**params))
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batches(count: int = 8, size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    items = [
        {"latent": torch.randn(4, 16, 16, generator=generator), "ssl": torch.randn(24, generator=generator)}
        for _ in range(count * size)
    ]
    return DataLoader(items, batch_size=size)


def fit(model: LatentDiffusion, steps: int, tmp_path, **kwargs) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **kwargs,
    )  # fmt: skip
    trainer.fit(model, batches(), batches(2))
    return trainer


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0", "edm", "flow"])
def test_the_loss_reaches_every_trained_parameter_and_leaves_the_first_stage(parameterization):
    model = build(parameterization=parameterization, min_snr_gamma=5.0)
    batch = next(iter(batches()))
    loss = model.loss(batch, torch.Generator().manual_seed(0), dropout=False)
    assert loss.shape == (4,)
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("first_stage_model"):
            assert not parameter.requires_grad
        elif "attn2.to_q" in name or "attn2.to_k" in name or ".norm2." in name:
            continue  # one context token has weight 1 whatever the query
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.slow
def test_training_lowers_the_loss_and_moves_the_average(tmp_path):
    model = build()
    model.learning_rate = 2e-3
    before = model.model_ema.get_buffer("diffusion_modelout2weight").clone()
    batch = next(iter(batches()))

    def loss() -> float:
        return float(model.loss(batch, torch.Generator().manual_seed(1), dropout=False).mean())

    first = loss()
    trainer = fit(model, 40, tmp_path)
    assert loss() < first * 0.8
    assert trainer.callback_metrics["val/loss"] > 0
    assert not torch.equal(before, model.model_ema.get_buffer("diffusion_modelout2weight"))
    assert int(model.model_ema.num_updates) == 40


@pytest.mark.slow
def test_accumulation_updates_the_average_once_per_optimiser_step(tmp_path):
    model = build()
    fit(model, 3, tmp_path, accumulate_grad_batches=2)
    assert int(model.model_ema.num_updates) == 3


def test_scale_by_std_makes_the_latents_unit_variance(tmp_path):
    model = build(scale_by_std=True)
    loader = DataLoader([{"latent": 5 * torch.randn(4, 16, 16), "ssl": torch.randn(24)} for _ in range(4)], 4)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(model, loader)
    assert float(model.latents_of(next(iter(loader))).std()) == pytest.approx(1.0, abs=1e-3)


def test_condition_dropout_gives_the_null():
    model = build()
    batch = {"ssl": torch.randn(3, 24)}
    cond = model.condition_of(batch, torch.tensor([True, False, True]))["crossattn"]
    null = model.null_condition()["crossattn"]
    assert torch.equal(cond[0], null[0])
    assert torch.equal(cond[2], null[0])
    assert not torch.equal(cond[1], null[0])


def test_the_patch_embedder_matches_the_published_one(oracle):
    from ldm.conditioners.ssl import PatchEmbedder

    folder = oracle / "ldm_ckpt_lid_vq"
    state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    io = torch.load(folder / "io.pt", weights_only=True)
    embedder = PatchEmbedder(24, 32)
    prefix = "cond_stage_model."
    embedder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    torch.testing.assert_close(embedder({"ssl": io["batch"]["feat_patch"]})["crossattn"], io["raw"]["c"])
    torch.testing.assert_close(embedder.null()["crossattn"].expand(2, 1, 32), io["raw"]["uc"])


def model_folder(tmp_path, name="model", **kwargs):
    model = build(use_ema=False)
    folder = write_model_folder(tmp_path / name, node(use_ema=False), model.state_dict(), {"mpp": 0.5}, **kwargs)
    return model.eval(), folder


def test_a_model_folder_gives_the_same_images_elsewhere(tmp_path):
    model, folder = model_folder(tmp_path)
    moved = folder.rename(tmp_path / "moved")
    loaded = ldm.load_model(moved)
    assert loaded.metadata == {"mpp": 0.5}
    features = torch.randn(3, 24)
    sampler = ldm.Sampler(steps=3, progress=False)
    images = [ldm.sample(m, m.condition(features), sampler=sampler) for m in (model, loaded)]
    assert images[0].shape == (3, 3, 32, 32)
    assert torch.equal(*images)


def test_an_export_begins_a_card_and_leaves_one_that_is_there(tmp_path):
    model = build()
    data = {"params": {"train": {"params": {"dataset": {"params": {"stores": "/mnt/hospital/mine"}}}}}}
    config = {"model": node(), "data": data}
    checkpoint = {"state_dict": model.state_dict(), "histoldm_config": config, "global_step": 7}
    model.metadata = {"mpp": 0.5, "tile_size": 32, "slide_licence": "CC0-1.0", "licence": "MIT"}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    card = ldm.export(tmp_path / "last.ckpt", tmp_path / "mine") / "README.md"
    text = card.read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(HEADINGS)
    for words in ("# mine\n", "tiles of 32 px at 0.5", "- `mine`", "7 steps", "CC0-1.0", "\nMIT"):
        assert words in text
    assert "hospital" not in text
    ldm.load_model(tmp_path / "mine")
    card.write_text("what I know of it")
    ldm.export(tmp_path / "last.ckpt", tmp_path / "mine")
    assert card.read_text() == "what I know of it"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("first the card")
    ldm.export(tmp_path / "last.ckpt", tmp_path / "new")
    assert (tmp_path / "new" / "README.md").read_text() == "first the card"
    ldm.load_model(tmp_path / "new")


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch_size(tmp_path):
    model, _ = model_folder(tmp_path)
    cond = model.condition(torch.randn(5, 24))
    for solver in ("dpmpp_2m", "ddim", "euler", "heun"):
        one, all_ = (
            ldm.sample(model, cond, sampler=ldm.Sampler(steps=3, solver=solver, batch_size=b, progress=False))
            for b in (1, 5)
        )
        torch.testing.assert_close(one, all_, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_large_image_does_not_depend_on_the_batch_size_and_follows_its_grid(tmp_path):
    model, _ = model_folder(tmp_path)
    grid = torch.randn(2, 3, 24)
    for mode in ("shifted", "overlap"):
        one, many = (
            ldm.large_image(
                model, grid, sampler=ldm.Sampler(steps=2, batch_size=b, progress=False), windows=ldm.Windows(mode=mode)
            )
            for b in (1, 64)
        )
        assert one.shape == (1, 3, 64, 96)
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)
    single = ldm.large_image(model, grid[:1, :1], sampler=ldm.Sampler(steps=2, progress=False))
    assert single.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ldm.sample(m, sampler=ldm.Sampler(steps=1001)), "steps must be in 1..1000; got 1001"),
        (lambda m: m.condition(torch.randn(2, 25)), "dimension 24"),
        (lambda m: ldm.sample(m, m.condition(torch.randn(2, 24)), count=3), "of 2 samples"),
        (lambda m: ldm.large_image(m, torch.randn(2, 24)), r"\(rows, cols, D\)"),
        (lambda m: ldm.large_image(m, torch.randn(2, 2, 24), size=(50, 51)), "multiple of 2"),
        (lambda m: ldm.large_image(m, torch.randn(2, 2, 24), size=(16, 64)), "at least one tile of 32"),
        (lambda m: ldm.large_image(m, torch.full((2, 2, 24), float("nan"))), "every entry of the grid"),
        (
            lambda m: ldm.large_image(m, torch.randn(2, 2, 24), sampler=ldm.Sampler(cache=2, guidance_interval="all")),
            "leave cache out",
        ),
    ],
)
def test_mistakes_are_told(tmp_path, call, message):
    model, _ = model_folder(tmp_path)
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_half_model_folder_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ldm.load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.yaml"):
        ldm.load_model(tmp_path / "empty")
    _, folder = model_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        ldm.load_model(folder)


def test_half_precision_folders_load_as_float32(tmp_path):
    _, folder = model_folder(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in ldm.load_model(folder).parameters()} == {torch.float32}


def test_training_can_start_from_a_part_of_a_model(tmp_path):
    source, folder = model_folder(tmp_path)
    target = build(seed=1)
    report = load_weights(target, folder)
    assert report.endswith("network loaded, first stage loaded, conditioner loaded")
    assert torch.equal(target.model.diffusion_model.out[2].weight, source.model.diffusion_model.out[2].weight)
    with torch.no_grad():
        target.first_stage_model.quant_conv.bias.add_(1)
    assert load_weights(target, folder, own_first_stage=True).endswith("first stage kept, conditioner loaded")
    assert not torch.equal(target.first_stage_model.quant_conv.bias, source.first_stage_model.quant_conv.bias)
    params = node()["params"]
    params["unet_config"] = {"target": "ldm.networks.unet.UNetModel", "params": {**UNET, "channel_mult": [1, 1]}}
    smaller = LatentDiffusion(**params)
    with pytest.raises(UserError, match="do not fit"):
        load_weights(smaller, folder)


def test_a_grid_of_cells_conditions_the_place_it_lies_at():
    from ldm.conditioners.ssl import GridPatchEmbedder

    embedder = GridPatchEmbedder(embed_dim=12, context_dim=8, grid=2, map_channels=3)
    with torch.no_grad():
        embedder.cell_fc.weight.copy_(torch.eye(3))
        embedder.cell_fc.bias.zero_()
    feature = torch.arange(12.0).view(1, 3, 2, 2)  # as an encoder pools it: channel, row, column
    cond = embedder({"ssl": feature.flatten(1)})
    torch.testing.assert_close(cond["concat"], feature)
    assert {part: value.shape for part, value in embedder.null().items()} == {
        "crossattn": (1, 1, 8),
        "concat": (1, 3, 2, 2),
    }
    seen = []

    def network(x, time, context):
        seen.append(x)
        return x[:, :4]

    from ldm.diffusion.denoiser import call_network

    call_network(network, torch.zeros(1, 4, 8, 8), torch.ones(1), cond)
    assert seen[0].shape == (1, 7, 8, 8)
    torch.testing.assert_close(seen[0][:, 4:, ::7, ::7], feature)  # the corners of the map
    with pytest.raises(UserError, match="2 x 2 cells"):
        GridPatchEmbedder(embed_dim=13)


def test_fine_tuning_keeps_the_scale_that_the_model_was_trained_with(tmp_path):
    source = build(scale_by_std=True, use_ema=False)
    source.scale_factor.fill_(0.37)
    folder = write_model_folder(tmp_path / "scaled", node(scale_by_std=True, use_ema=False), source.state_dict(), {})
    model = build(scale_by_std=True, ckpt_path=str(folder))
    fit(model, 1, tmp_path)
    assert float(model.scale_factor) == pytest.approx(0.37)
    with pytest.raises(UserError, match="scale_by_std"):
        build(ckpt_path=str(folder))


def test_a_model_without_a_condition_given_samples_unconditionally(tmp_path):
    model, _ = model_folder(tmp_path)
    null = {part: value.expand(2, *value.shape[1:]) for part, value in model.null_condition().items()}
    plain = ldm.sample(model, count=2, sampler=ldm.Sampler(steps=2, progress=False))
    alone = ldm.Sampler(steps=2, guidance_scale=1.0, progress=False)
    torch.testing.assert_close(plain, ldm.sample(model, null, sampler=alone))
    later = ldm.sample(model, count=1, first=1, sampler=ldm.Sampler(steps=2, progress=False))
    torch.testing.assert_close(later, plain[1:], rtol=1e-4, atol=1e-4)


def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for name, message in (("text.ckpt", "cannot read"), ("foreign.ckpt", "no model whose form is known")):
        with pytest.raises(UserError, match=message):
            ldm.load_model(tmp_path / name)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="not a model folder"):
        write_model_folder(tmp_path / "taken", node(), {}, {})


def test_a_published_first_stage_becomes_a_model_folder(tmp_path):
    from ldm.autoencoder.autoencoder import AutoencoderKL
    from ldm.config import save_config
    from ldm.convert import convert
    from ldm.model_folder import load_first_stage

    torch.manual_seed(0)
    published = AutoencoderKL(DDCONFIG, 4)
    state = {**published.state_dict(), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    params = {"first_stage": node()["params"]["first_stage_config"], "loss": {"target": "torch.nn.Identity"}}
    save_config({"model": {"target": "ldm.autoencoder.stage.AutoencoderStage", "params": params}}, tmp_path / "c.yaml")
    folder = convert(tmp_path / "model.ckpt", tmp_path / "out", config=tmp_path / "c.yaml")
    assert torch.equal(load_first_stage(folder).quant_conv.weight, published.quant_conv.weight)


def test_every_step_costs_little_more_than_its_window_areas(tmp_path):
    model, _ = model_folder(tmp_path)
    windows: dict[float, int] = {}

    def count(module, inputs) -> None:
        x, time = inputs[:2]
        windows[float(time[0])] = windows.get(float(time[0]), 0) + len(x)

    model.model.register_forward_pre_hook(count)
    ldm.large_image(model, torch.randn(4, 4, 24), sampler=ldm.Sampler(steps=3, guidance_scale=1.0, progress=False))
    assert list(windows.values()) == [25, 25, 49]  # of 16 areas: 5/4 along each side, at last every half window


def test_the_legacy_schedule_is_the_published_spacing_or_one_message(tmp_path):
    model, _ = model_folder(tmp_path)
    sigmas = ldm.Sampler(steps=10, schedule="legacy").settled(model, "sample").sigmas(model)
    torch.testing.assert_close(sigmas[:-1], model.sigmas[1::100].flip(0))
    assert sigmas[-1] == model.sigmas[0]
    for steps in (30, 1000):
        with pytest.raises(UserError, match="divide its 1000 levels"):
            ldm.Sampler(steps=steps, schedule="legacy").settled(model, "sample")
