"""Checkpoints of CompVis and its forks: through a model folder, the outputs of the code that made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published import load, relative
from torch import Tensor

from ldm import cli
from ldm.conditioners.rescaler import SpatialRescaler
from ldm.conditioners.text_transformer import TokenTransformer
from ldm.config import instantiate_from_config
from ldm.convert import build, check, convert, load_model, read_published
from ldm.diffusion import samplers, schedules
from ldm.diffusion.denoiser import call_network
from ldm.diffusion.fields import FeatureField
from ldm.diffusion.guidance import cfg, clip
from ldm.errors import UserError
from ldm.interop import targets
from ldm.interop.checkpoint import read_checkpoint
from ldm.interop.compvis import read_compvis
from ldm.model_folder import load_first_stage, read_model_folder
from ldm.networks.unet import UNetModel


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def model_of(oracle, tmp_path_factory):
    """Convert the checkpoint of an oracle's folder and load the model folder."""

    def make(name: str, **options: Any):
        folder = oracle / name
        (checkpoint,) = folder.glob("*.ckpt")
        out = tmp_path_factory.mktemp("models") / folder.name
        options = {"config": folder / "config.yaml", **options}
        return load_model(convert(checkpoint, out, say=silent, **options)), load(folder / "io.pt")

    return make


@pytest.fixture(scope="module")
def lid(model_of):
    return model_of("ldm_ckpt_lid_vq")


def eps(model, io: dict, cond: dict) -> Tensor:
    with torch.no_grad():
        return call_network(model.model, io["x_T"], io["t"], cond)


def published_ddim(model, io: dict, cond: dict, null=None, sampler=samplers.sample_euler, *extra) -> Tensor:
    """The published sampler's ten steps: its spacing, its end above zero."""
    sigmas = schedules.table_sigmas(model.sigmas, 10, "legacy")
    denoiser = model.denoiser() if null is None else cfg(model.denoiser(), null, io["cfg_scale"])
    start = io["x_T"] * (1 + sigmas[0] ** 2).sqrt()
    with torch.no_grad():
        return sampler(denoiser, start, sigmas, cond, *extra) / (1 + sigmas[-1] ** 2).sqrt()


def close(ours: Tensor, golden: Tensor, tolerance: float = 1e-5) -> None:
    assert relative(ours, golden) < tolerance


# --- every published checkpoint --------------------------------------------------------------------------------------


def test_large_image_diffusion(lid):
    model, io = lid
    raw = io["raw"]
    cond, null = model.condition(features=io["batch"]["feat_patch"]), model.null_condition()
    close(cond["crossattn"], raw["c"])
    close(null["crossattn"], raw["uc"][:1])
    close(eps(model, io, cond), raw["eps"])
    sampled = published_ddim(model, io, cond, null)
    close(sampled, raw["ddim"], 1e-4)
    close(published_ddim(model, io, cond), raw["ddim_no_cfg"], 1e-4)
    close(published_ddim(model, io, cond, null, samplers.sample_plms), raw["plms"], 1e-4)
    run = io["ddim_eta1"]
    noisy = published_ddim(model, io, cond, null, samplers.sample_ddim, lambda step: run["noises"][step])
    close(noisy, run["out"], 1e-4)
    close(model.decode(raw["ddim"][:1]), raw["decoded"])
    close(model.encode(io["image"]), io["z0"])
    assert model.scale_factor == 0.8


@pytest.mark.slow
def test_large_image_diffusion_with_the_region(model_of):
    model, io = model_of("more/lid_ssl_ckpt")
    batch = io["batch"]
    cond = model.condition(ssl=batch["feat_20x"], region=batch["feat_5x"])
    close(cond["crossattn"], io["c"])
    close(model.null_condition()["crossattn"], io["uc"][:1])
    close(eps(model, io, cond), io["eps"])
    close(published_ddim(model, io, cond, model.null_condition()), io["ddim"], 1e-4)
    close(published_ddim(model, io, cond, model.null_condition(), samplers.sample_plms), io["plms"], 1e-4)
    close(model.decode(io["ddim"][:1]), io["decoded"])
    close(model.encode(io["image"]), io["z0"])


def test_pathldm_by_class(model_of):
    names = ["low low", "low high", "high low", "high high"]
    model, io = model_of("more/pathldm_class_ckpt", classes=names)
    cond = model.condition(class_=[names[label] for label in io["batch"]["class_label"]])
    close(cond["crossattn"], io["c"])
    close(model.null_condition()["crossattn"], io["uc"][:1])
    close(eps(model, io, cond), io["eps"])
    close(published_ddim(model, io, cond, model.null_condition()), io["ddim"], 1e-4)
    close(model.decode(io["ddim"][:1]), io["decoded"])


def test_pathldm_by_text(model_of):
    model, io = model_of("more/pathldm_text_ckpt")
    text = model.cond_stage_model
    cond = {"crossattn": text.encode(io["input_ids"], io["attention_mask"])}
    close(cond["crossattn"], io["c"])
    close(text.encode(io["input_ids_uncond"], io["attention_mask_uncond"]), io["uc"])
    close(model.null_condition()["crossattn"], io["uc"][:1])
    close(eps(model, io, cond), io["eps"])
    close(published_ddim(model, io, cond, model.null_condition()), io["ddim"], 1e-4)
    close(model.decode(io["ddim"][:1]), io["decoded"])


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("config", ["config.yaml", "config_published_style.yaml"])
@pytest.mark.slow
def test_zoomldm(model_of, oracle, weights, config):
    levels = ["20x", "10x", "5x", "2.5x", "1.25x", "0.625x", "0.3125x", "0.15625x"]
    project = oracle / "more" / "zoomldm_ckpt" / config
    model, io = model_of("more/zoomldm_ckpt", raw_weights=weights == "raw", classes=levels, config=project)
    golden, batch = io[weights], io["batch"]
    cond = model.condition(ssl=batch["ssl_feat"], magnification=[levels[level] for level in batch["mag"]])
    close(cond["crossattn"], golden["c"])
    null = model.null_condition()
    noisy = eps(model, io, cond)
    close(noisy, golden["eps"])
    without = eps(model, io, {"crossattn": null["crossattn"].expand(2, -1, -1)})
    close(without, golden["eps_uncond"])
    close(3 * noisy - 2 * without, golden["large_image_pred_w2"])
    if config == "config.yaml":
        close(published_ddim(model, io, cond, null), golden["ddim"], 1e-4)
        close(published_ddim(model, io, cond, null, samplers.sample_plms), golden["plms"], 1e-4)
        close(model.decode(golden["ddim"][:1]), golden["decoded"])
        close(model.encode(io["image"]), io["z0"])


@pytest.mark.slow
def test_segmentation_beside_the_latent(model_of):
    model, io = model_of("more/ldm_concat_ckpt")
    cond = model.condition(segmentation=io["cond_input"])
    close(cond["concat"], io["c"])
    close(eps(model, io, cond), io["eps"])
    close(published_ddim(model, io, cond), io["ddim"], 1e-4)
    run = io["ddim_eta1"]
    noisy = published_ddim(model, io, cond, None, samplers.sample_ddim, lambda step: run["noises"][step])
    close(noisy, run["out"], 1e-4)
    close(model.decode(io["ddim"][:1]), io["decoded"])
    nothing = model.null_condition()  # of one value, for any size
    io["cfg_scale"] = 1.5
    assert published_ddim(model, io, cond, nothing).isfinite().all()


def test_a_rescaled_map_is_a_conditioner():
    rescaler = SpatialRescaler(5, 3, stages=2, bias=True, dropout=0.5, key="segmentation")
    maps = torch.randn(4, 5, 16, 16)
    drop = torch.tensor([True, False, False, True])
    out = rescaler({"segmentation": maps}, drop)["concat"]
    assert out.shape == (4, 3, 4, 4)
    torch.testing.assert_close(out[drop], rescaler.null()["concat"].expand(2, 3, 4, 4))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rescaler.parameters())
    for value, message in ((maps[:, :4], "a map of 5 channels"), (maps[0, 0], "a map of 5 channels")):
        with pytest.raises(UserError, match=message):
            rescaler(rescaler.read({"segmentation": value}))
    with pytest.raises(UserError, match="one of nearest, bilinear"):
        SpatialRescaler(5, method="linear")


def test_hybrid_of_classes_and_a_map(model_of):
    model, io = model_of("more/ldm_hybrid_ckpt", classes=list("abcdef"))
    labels = [model.condition(class_=label, map=io["c_concat"]) for label in io["class_labels"].unbind(1)]
    cond = labels[0] | {"class/crossattn": torch.cat([label["class/crossattn"] for label in labels], 1)}
    close(cond["class/crossattn"], io["c_crossattn"])
    close(eps(model, io, cond), io["eps"])
    close(published_ddim(model, io, cond), io["ddim"], 1e-4)


def write(folder: Path, target: str, params: dict, state: dict, **around: Any) -> Path:
    """A checkpoint and the project YAML beside it."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"target": target, "params": params}}))
    torch.save({"state_dict": state, **around}, folder / "model.ckpt")
    return folder / "model.ckpt"


@pytest.mark.parametrize("name", ["ldm_ae_kl_f8.pt", "more/ldm_ae_kl_f4.pt"])
def test_kl_first_stages(oracle, tmp_path, name):
    golden = load(oracle / name)
    state = golden.get("state_dict") or golden["state_dict_fp16"]
    params = golden["config"] | {"monitor": "val/rec_loss", "ckpt_path": "kl-f8/model.ckpt"}
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2)}
    source = write(tmp_path / "kl", "ldm.models.autoencoder.AutoencoderKL", params, {**state, **loss})
    stage = load_first_stage(str(convert(source, tmp_path / "model", say=silent)))
    assert {value.dtype for value in stage.state_dict().values()} == {torch.float32}  # of a float16 file too
    with torch.no_grad():
        posterior = stage.encode(golden["x"])
        close(posterior.mean, golden["mean"])
        close(posterior.logvar, golden["logvar"])
        close(stage.decode(golden["mean"]), golden["dec_mode"])


@pytest.mark.parametrize("name", ["ldm_ae_vq_f4.pt", "more/ldm_ae_vq_f8.pt"])
def test_vq_first_stages(oracle, tmp_path, name):
    golden = load(oracle / name)
    if "state_dict_file" in golden:  # the first stage in a diffusion model's checkpoint
        state = load(oracle / golden["state_dict_file"])["state_dict"]
        target = "ldm.models.autoencoder.VQModelInterface"
    else:
        state, target = golden["state_dict_fp16"], "taming.models.vqgan.VQModel"
    source = write(tmp_path / "vq", target, golden["config"], state)
    stage = load_first_stage(str(convert(source, tmp_path / "model", say=silent)))
    with torch.no_grad():
        hidden = stage.encode(golden["x"])
        close(hidden, golden["h"])
        quantised = stage.quantize(golden["h"])
        assert torch.equal(quantised.indices.flatten(), golden["indices"].flatten())
        close(stage.decode(golden["h"]), golden["dec"])
        close(stage.decode(golden["h"], force_not_quantize=True), golden["dec_force_not_quantize"])


def test_averages_of_a_first_stage(oracle, tmp_path):
    golden = load(oracle / "more" / "ldm_ae_vq_f8.pt")
    raw = {name: value.float() for name, value in golden["state_dict_fp16"].items()}
    average = {f"model_ema.{name.replace('.', '')}": value + 1 for name, value in raw.items()}
    counts = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}
    loss = {"loss.discriminator.a": torch.zeros(1), "model_ema.lossdiscriminatora": torch.zeros(1)}
    params = golden["config"] | {"use_ema": True}
    source = write(tmp_path, "ldm.models.autoencoder.VQModel", params, raw | average | counts | loss)
    for raw_weights, shift in ((False, 1), (True, 0)):
        found = read_published(source, raw_weights=raw_weights)
        assert all(torch.equal(value, raw[name] + shift) for name, value in found.state.items())
        assert len(found.unused) == len(raw) + 4
    stray = {"model_ema.stray": torch.zeros(1)}
    source = write(tmp_path, "ldm.models.autoencoder.VQModel", params, raw | average | stray)
    with pytest.raises(UserError, match=r"1 averaged weights are of no weight of the model \(first: stray\)"):
        read_published(source)


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.slow
def test_pixel_model_with_a_cosine_schedule(oracle, tmp_path, weights):
    golden = load(oracle / "more" / "ldm_ddpm_cosine.pt")
    source = write(tmp_path / "ddpm", "ldm.models.diffusion.ddpm.DDPM", golden["config"], golden["state_dict"])
    model = load_model(convert(source, tmp_path / "model", raw_weights=weights == "raw", say=silent))
    run = golden["p_sample_loop" if weights == "raw" else "p_sample_loop_ema"]
    if weights == "raw":
        with torch.no_grad():
            close(model.model(golden["x_probe"], golden["t"]), golden["out_probe"])
    sigmas = schedules.table_sigmas(model.sigmas, 20)
    start = run["x_T"] * (1 + sigmas[0] ** 2).sqrt()
    out = samplers.sample_ddpm(clip(model.denoiser()), start, sigmas, {}, lambda step: run["noises"][step])
    close(out, run["out"], 5e-5)


def test_labels_within_the_unet(oracle, tmp_path):
    golden = load(oracle / "ldm_unet_C.pt")
    params = {
        "unet_config": {"target": targets.UNETS[0], "params": golden["config"]},
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "cond_stage_config": {"target": "torch.nn.Identity"},
        "conditioning_key": "adm",
        "image_size": 16,
    }
    state = {f"model.diffusion_model.{name}": value for name, value in golden["state_dict"].items()}
    source = write(tmp_path / "adm", "ldm.models.diffusion.ddpm.LatentDiffusion", params, state)
    model = load_model(convert(source, tmp_path / "model", classes=list("abcde"), say=silent))
    cond = model.condition(class_=golden["y"])
    with torch.no_grad():
        close(call_network(model.model, golden["x"], golden["t"], cond), golden["out"])
        close(call_network(model.model, golden["x"], golden["t_float"], cond), golden["out_t_float"])
    assert model.cond_stage_model.dropout == 0  # it has no null: guidance is 1 by default


def test_windows_of_the_published_large_image(lid, oracle):
    """What get_panorama tells the network at every window; tests/test_tiled.py has the image itself."""
    model, _ = lid
    golden = load(oracle / "lid_large_image.pt")
    field = FeatureField(golden["embeddings"].view(2, 2, 24), (128, 128), 64, "slerp")
    corners = [(row, col) for row in range(0, 65, 16) for col in range(0, 65, 16)]
    close(model.condition(features=field.at(corners))["crossattn"], golden["window_context"])
    close(model.null_condition()["crossattn"], golden["uncond_context"])


def bert_embedder(ids: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The published text transformer written down once more (x_transformer.py: Encoder, TransformerWrapper)."""
    x = state["token_emb.weight"][ids] + state["pos_emb.emb.weight"][: ids.shape[1]]
    layer = 0
    while f"attn_layers.layers.{layer}.0.weight" in state:
        name = f"attn_layers.layers.{layer}."
        own = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
        h = torch.nn.functional.layer_norm(x, x.shape[-1:], own["0.weight"], own["0.bias"])
        if layer % 2 == 0:
            q, k, v = (torch.einsum("bld,od->blo", h, own[f"1.to_{part}.weight"]) for part in "qkv")
            q, k, v = (part.view(*part.shape[:2], 8, 64) for part in (q, k, v))
            weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 8).softmax(-1)
            h = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2) @ own["1.to_out.weight"].T + own["1.to_out.bias"]
        else:
            h = torch.nn.functional.gelu(h @ own["1.net.0.0.weight"].T + own["1.net.0.0.bias"])
            h = h @ own["1.net.2.weight"].T + own["1.net.2.bias"]
        x, layer = x + h, layer + 1
    return torch.nn.functional.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"])


def test_the_text_transformer_of_latent_diffusion(edited, tmp_path):
    torch.manual_seed(0)
    shapes = {"token_emb.weight": (40, 32), "pos_emb.emb.weight": (10, 32), "norm.weight": (32,), "norm.bias": (32,),
              "to_logits.weight": (40, 32), "to_logits.bias": (40,)}  # fmt: skip
    for layer in range(4):
        parts = {"0.weight": (32,), "0.bias": (32,)}
        parts |= {f"1.to_{part}.weight": (512, 32) for part in "qkv"} if layer % 2 == 0 else {}
        parts |= {"1.to_out.weight": (32, 512), "1.to_out.bias": (32,)} if layer % 2 == 0 else {
            "1.net.0.0.weight": (128, 32), "1.net.0.0.bias": (128,), "1.net.2.weight": (32, 128), "1.net.2.bias": (32,)
        }  # fmt: skip
        shapes |= {f"attn_layers.layers.{layer}.{name}": shape for name, shape in parts.items()}
    weights = {name: 0.2 * torch.randn(shape) + (name.endswith("norm.weight")) for name, shape in shapes.items()}

    def edit(state: dict, params: dict) -> None:
        for name in [name for name in state if name.startswith("cond_stage_model.")]:
            state.pop(name)
        state.update({f"cond_stage_model.transformer.{name}": value for name, value in weights.items()})
        told = {"n_embed": 32, "n_layer": 2, "vocab_size": 40, "max_seq_len": 10}
        params["cond_stage_config"] = {"target": targets.ENCODERS + "BERTEmbedder", "params": told}

    source = edited(edit)
    with pytest.raises(UserError, match=r"put its tokenizer\.json .* into"):
        convert(source, tmp_path / "model", say=silent)
    source.with_name("tokenizer.json").write_text("{}")
    said: list[str] = []
    text = load_model(convert(source, tmp_path / "model", say=said.append)).cond_stage_model
    ids = torch.randint(0, 40, (3, 10))
    close(text.encode(ids), bert_embedder(ids, weights))
    assert any("predicts words" in line for line in said)
    wrong = bert_embedder(ids.flip(1), weights).flip(1)
    assert relative(text.encode(ids), wrong) > 1e-2


# --- by name, strictly ---------------------------------------------------------------------------------------------


@pytest.fixture
def edited(oracle, tmp_path):
    """A copy of an oracle's checkpoint and config after `edit(state, model params)`."""

    def make(edit, name: str = "ldm_ckpt_lid_vq", **around: Any) -> Path:
        (checkpoint,) = (oracle / name).glob("*.ckpt")
        content = read_checkpoint(checkpoint)
        state = dict(content.get("state_dict", content))
        model = yaml.safe_load((oracle / name / "config.yaml").read_text())["model"]
        edit(state, model["params"])
        return write(tmp_path / "edited", model["target"], model["params"], state, **around)

    return make


def unet(params: dict) -> dict:
    return params["unet_config"]["params"]


def cond_params(params: dict) -> dict:
    return params["cond_stage_config"]["params"]


IDENTITY = {"target": "torch.nn.Identity"}
WEIGHT = "model.diffusion_model.out.2.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s, p: s.pop(WEIGHT), f"1 weights are missing .first: {WEIGHT}"),
        (lambda s, p: s.update(surplus=torch.zeros(2)), "1 tensors of .* have no place in the model of .*: surplus"),
        (lambda s, p: s.update({"model.diffusion_model.more": torch.zeros(2)}), "are not of this model"),
        (lambda s, p: unet(p).update(model_channels=64), "has shape .*, expected"),
        (lambda s, p: unet(p).update(num_res_blocks=2), "weights are missing"),
        (lambda s, p: cond_params(p).update(patch_embed_dim=768), "patch_fc.weight has shape .32, 24., expected .*768"),
        (lambda s, p: p.update(linear_end=0.0205), "the noise schedule in .* is not that of its config: betas at step"),
        (lambda s, p: p.update(beta_schedule="cosine"), "the noise schedule in"),
        (lambda s, p: p.update(timesteps=500), "trained with 1000 noise levels, its config says 500"),
        (lambda s, p: p.update(scale_by_std=True), "has no scale_factor"),
        (lambda s, p: p["cond_stage_config"].update(target="os.system"), "cond_stage_config.target 'os.system' is not"),
        (lambda s, p: p["unet_config"].update(target="mylab.UNet"), "unet_config.target 'mylab.UNet' is not known"),
        (lambda s, p: p.update(first_stage_config=IDENTITY), "first_stage_config.target 'torch.nn.Identity' is not"),
        (lambda s, p: cond_params(p).update(patch_dim=3), "PatchEmbedder has no parameter 'patch_dim'"),
        (lambda s, p: unet(p).update(heads=3), "unet_config.params.heads is not known"),
        (lambda s, p: unet(p).update(dims=3), "unet_config.params.dims is 3; only 2 is supported"),
        (lambda s, p: p.update(cond_stage_config="__is_unconditional__"), "holds a conditioner .* says none"),
        (lambda s, p: p.update(cond_stage_config="__is_first_stage__"), "its first stage, which is not supported"),
        (lambda s, p: p.update(conditioning_key="concat"), "conditioning_key is 'concat', which does not fit"),
        (lambda s, p: [s.pop(n) for n in list(s) if n.startswith("model.")], "holds no network"),
    ],
)
@pytest.mark.slow
def test_what_does_not_fit_is_an_error_that_says_so(edited, tmp_path, edit, message):
    with pytest.raises(UserError, match=message):
        convert(edited(edit), tmp_path / "model", say=silent)
    assert not (tmp_path / "model").exists()


def test_every_tensor_is_accounted_for(edited, tmp_path):
    def edit(state: dict, params: dict) -> None:
        state.update({"inception.a": torch.ones(1), "first_stage_model.loss.b": torch.ones(1), "logvar": torch.ones(9)})
        params.update(fid_path="x.npz", scheduler_config={"target": "ldm.lr_scheduler.LambdaLinearScheduler"}, odd=1)

    source = edited(edit)
    found = read_published(source)
    assert len(found.state) + len(found.unused) == len(read_checkpoint(source)["state_dict"])
    assert found.unused["inception.a"].startswith("the Inception network")
    assert any("model.params.odd of the config is not known" in note for note in found.notes)
    said: list[str] = []
    convert(source, tmp_path / "model", say=said.append)
    assert "1 left: the Inception network that measured FID while training (inception.a)" in said
    assert said[0].startswith("note: the config is config.yaml")


def test_the_measured_scale_is_kept(edited, tmp_path):
    source = edited(lambda s, p: s.update(scale_factor=torch.tensor(0.25)) or p.update(scale_by_std=True))
    model = load_model(convert(source, tmp_path / "measured", say=silent))
    assert float(model.scale_factor) == 0.25
    source = edited(lambda s, p: s.update(scale_factor=torch.tensor(0.25)))
    said: list[str] = []
    model = load_model(convert(source, tmp_path / "told", say=said.append))
    assert model.scale_factor == 0.25
    assert "note: scale_factor is the checkpoint's 0.25; the config says 0.8" in said


def test_half_precision_files_and_folders(edited, tmp_path):
    def halve(state: dict, params: dict) -> None:
        state.update({name: value.half() for name, value in state.items()})

    source = edited(halve)
    model = load_model(convert(source, tmp_path / "half", say=silent))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = read_checkpoint(source)["state_dict"][WEIGHT].float()
    assert torch.equal(model.state_dict()[WEIGHT], expected)
    small = convert(source, tmp_path / "small", half=True, say=silent)
    assert torch.equal(load_model(small).state_dict()[WEIGHT], expected)


def test_classes_are_asked_for_and_stored(model_of, oracle, tmp_path):
    source = oracle / "more" / "pathldm_class_ckpt" / "model.ckpt"
    said: list[str] = []
    folder = convert(source, tmp_path / "numbered", say=said.append)
    assert any("they are 0 to 3; the last of its embeddings is taken as the unconditional one" in line for line in said)
    assert load_model(folder).cond_stage_model.classes == ("0", "1", "2", "3")
    model = load_model(convert(source, tmp_path / "all", classes=list("abcde"), say=silent))  # no unconditional one
    assert model.cond_stage_model.classes == tuple("abcde")
    assert model.cond_stage_model.dropout == 0
    assert model.null_condition()["crossattn"].abs().max() == 0
    with pytest.raises(UserError, match=r"5 class embeddings; give 4 \(without the unconditional one, the last\) or 5"):
        convert(source, tmp_path / "few", classes=["a", "b"], say=silent)
    with pytest.raises(UserError, match="no classes to name"):
        convert(oracle / "ldm_ckpt_lid_vq" / "model.ckpt", tmp_path / "none", classes=["a"], say=silent)


def test_facts_of_the_user_are_stored(oracle, tmp_path):
    source = oracle / "ldm_ckpt_lid_vq" / "model.ckpt"
    folder = convert(source, tmp_path / "m", encoder="ours", mpp=0.5, licence="CC BY-NC 4.0", say=silent)
    _, metadata = read_model_folder(folder)
    assert metadata == {
        "licence": "CC BY-NC 4.0",
        "mpp": 0.5,
        "tile_size": 64,
        "converted_from": "model.ckpt",
        "encoder": {"encoder": "ours", "licence": "not recorded"},
    }
    with pytest.raises(UserError, match="features of uni have 1024 values, the model takes 24"):
        convert(source, tmp_path / "m", encoder="uni", say=silent)
    with pytest.raises(UserError, match="above 0"):
        convert(source, tmp_path / "m", mpp=0, say=silent)
    with pytest.raises(UserError, match="takes no --mutation-genes"):
        convert(source, tmp_path / "m", mutation_genes="genes.txt", say=silent)


@pytest.mark.slow
def test_a_published_checkpoint_is_loaded_without_a_folder(lid, oracle):
    with pytest.warns(UserWarning, match="the config is config.yaml, which lies beside"):
        model = load_model(oracle / "ldm_ckpt_lid_vq" / "model.ckpt")
    for name, value in lid[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model.sigmas, lid[0].sigmas)


@pytest.mark.slow
def test_targets_of_others_are_refused_unless_allowed(edited, tmp_path, monkeypatch):
    (tmp_path / "mylab.py").write_text(
        "from ldm.conditioners.ssl import PatchEmbedder\n"
        "class Embedder(PatchEmbedder):\n    def __init__(self):\n        super().__init__(24, 32)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = edited(lambda s, p: p.update(cond_stage_config={"target": "mylab.Embedder"}))
    with pytest.raises(UserError, match="taken with --allow-target"):
        convert(source, tmp_path / "model", say=silent)
    folder = convert(source, tmp_path / "model", allow_target=["mylab."], say=silent)
    with pytest.raises(UserError, match=r"'mylab\.Embedder' is not allowed"):
        load_model(folder)
    assert type(load_model(folder, allow_target=["mylab."]).cond_stage_model).__name__ == "Embedder"

    for given, status in (([], 2), (["--allow-target", "yourlab."], 2), (["--allow-target", "mylab."], 0), ([], 2)):
        monkeypatch.setattr("sys.argv", ["histoldm", "describe", str(folder), *given])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == status


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.system ['touch harmed']", "is not valid YAML"),
        ("model: {target: '${oc.env:HOME}'}", "model.target refers to something else"),
        ("a: 1", "has no `model:"),
        ("model: {target: ldm.Nothing}", "model.target 'ldm.Nothing' is not known"),
    ],
)
def test_a_project_yaml_is_only_read(oracle, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        convert(oracle / "ldm_ckpt_lid_vq" / "model.ckpt", tmp_path / "m", config=tmp_path / "bad.yaml", say=silent)
    assert not (tmp_path / "harmed").exists()


# --- full-size instances of the published configs ------------------------------------------------------------------


VQ_F4 = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3, "n_embed": 8192, "ckpt_path": "model.ckpt", "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {"double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
                     "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0},
    },
}  # fmt: skip
LDM = {"image_size": 64, "in_channels": 3, "out_channels": 3, "attention_resolutions": [8, 4, 2], "num_res_blocks": 2}
BRCA = {**LDM, "model_channels": 192, "channel_mult": [1, 2, 3, 5], "num_heads": 1, "use_spatial_transformer": True,
        "transformer_depth": 1, "context_dim": 512, "use_fp16": True, "ckpt_path": "unet.ckpt"}  # fmt: skip
CELEBA = {**LDM, "model_channels": 224, "channel_mult": [1, 2, 3, 4], "num_head_channels": 32}
CHURCHES = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 192, "num_res_blocks": 2,
            "attention_resolutions": [1, 2, 4, 8], "channel_mult": [1, 2, 2, 4, 4], "num_heads": 8,
            "use_scale_shift_norm": True, "resblock_updown": True}  # fmt: skip
TXT2IMG = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2,
           "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "num_heads": 8, "legacy": False,
           "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 1280}  # fmt: skip
KL_F8 = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "monitor": "val/rec_loss", "lossconfig": {"target": "torch.nn.Identity"},
               "ddconfig": {**VQ_F4["params"]["ddconfig"], "double_z": True, "z_channels": 4, "ch_mult": [1, 2, 4, 4]}},
}  # fmt: skip
ENCODERS = targets.ENCODERS


@pytest.mark.parametrize(
    ("unet_params", "first_stage", "cond_stage", "count"),
    [
        (BRCA, VQ_F4, {"target": ENCODERS + "SSLEmbedder", "params": {"normalize_ssl": True}}, 400.92),
        (BRCA, VQ_F4, {"target": ENCODERS + "PatchEmbedder", "params": {"patch_embed_dim": 1024}}, 400.92),
        (BRCA, VQ_F4, {"target": ENCODERS + "ClassEmbedder", "params": {"n_classes": 1001, "embed_dim": 512}}, 400.92),
        (BRCA, VQ_F4, {"target": ENCODERS + "EmbeddingViT2_5", "params": {"hidden_channels": 512}}, 400.92),
        (CELEBA, VQ_F4, "__is_unconditional__", 274.06),
        (CHURCHES, KL_F8, "__is_unconditional__", 294.97),
        (TXT2IMG, KL_F8, {"target": ENCODERS + "BERTEmbedder", "params": {"n_embed": 1280, "n_layer": 32}}, 872.3),
    ],
    ids=["brca", "crc", "cin256", "zoomldm", "celeba", "churches", "txt2img"],
)
@pytest.mark.slow
def test_published_configs_have_the_published_size(tmp_path, unet_params, first_stage, cond_stage, count):
    """The names and shapes of the tensors are those of a checkpoint made of that very config."""
    params = {"unet_config": {"target": targets.UNETS[0], "params": unet_params}, "first_stage_config": first_stage,
              "cond_stage_config": cond_stage, "linear_start": 0.0015, "linear_end": 0.0195,
              "conditioning_key": "crossattn"}  # fmt: skip
    with torch.device("meta"):
        node = targets.unet_node(params["unet_config"], ())
        net = UNetModel(**node["params"])
        stage = instantiate_from_config(targets.first_stage_node(first_stage))
        state = {f"model.diffusion_model.{name}": value for name, value in net.state_dict().items()}
        state |= {f"first_stage_model.{name}": value for name, value in stage.state_dict().items()}
        told = targets.conditioning(params, ())
        if told is not None and told.kind == "bert":
            (tmp_path / "tokenizer.json").write_text("{}")
            names = {f"transformer.{name}": v for name, v in TokenTransformer(told.published).state_dict().items()}
            state |= {f"cond_stage_model.{name}": value for name, value in names.items()}
        elif told is not None:
            extra = {"class": {"classes": [str(i) for i in range(1000)]}, "grid": {"magnifications": 8}}
            conditioner = instantiate_from_config(
                {**told.node, "params": told.node["params"] | extra.get(told.kind, {})}
            )
            state |= {f"cond_stage_model.{name}": value for name, value in conditioner.state_dict().items()}
    project = tmp_path / "config.yaml"
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    project.write_text(yaml.safe_dump({"model": {"target": target, "params": params}}))
    found = read_compvis(tmp_path / "model.ckpt", {"state_dict": state})
    check(found, "the config")
    assert round(sum(p.numel() for p in build(found).model.parameters()) / 1e6, 2) == count


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_converts_a_published_folder(oracle, tmp_path, monkeypatch, capsys):
    folder = oracle / "more" / "pathldm_class_ckpt"
    (tmp_path / "names.txt").write_text("low low\nlow high\nhigh low\nhigh high\n")
    names = str(tmp_path / "names.txt")
    for classes, status in ((names, 0), ("a,b,c,d", 0), ("a,b", 2), ("a,a,b,c", 2)):
        out = tmp_path / f"model{classes[-3:]}"
        monkeypatch.setattr("sys.argv", ["histoldm", "convert", str(folder), "--out", str(out), "--classes", classes])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == status
        assert out.exists() == (status == 0)
    printed = capsys.readouterr()
    assert "3 left: the Inception network that measured FID while training" in printed.out
    assert "give 4 (without the unconditional one, the last) or 5 names, got 2" in printed.err
    assert load_model(tmp_path / "modeltxt").cond_stage_model.classes[3] == "high high"


def test_a_published_checkpoint_is_a_model_to_every_command(oracle, tmp_path, capsys):
    from ldm.commands.describe import describe_model
    from ldm.commands.generate import sample_tiles
    from ldm.requests.sampling import AskedSampler
    from ldm.requests.tiles import AskedTiles
    from ldm.sampling.sampler import Sampler

    folder = oracle / "more" / "pathldm_class_ckpt"
    with pytest.warns(UserWarning, match="the classes have no names"):
        describe_model(folder)
    asked = AskedTiles(conditions=["class=2"], count=2)
    with pytest.warns(UserWarning, match="the classes have no names"):
        sample_tiles(folder / "model.ckpt", tmp_path / "tiles", "cpu", asked, AskedSampler(Sampler(steps=2)))
    assert "class        class: 0, 1, 2, 3" in capsys.readouterr().out
    assert len(list((tmp_path / "tiles").glob("0*.png"))) == 2


def test_a_shipped_config_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node, _ = targets.read_project(Path("autoencoder/vq-f4"))
    assert (node["target"], node["params"]["n_embed"]) == ("ldm.autoencoder.autoencoder.VQModel", 8192)
