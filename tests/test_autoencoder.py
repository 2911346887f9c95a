from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.autoencoder.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from ldm.autoencoder.latent import DiagonalGaussian
from ldm.autoencoder.weights import load_weights, read_state_dict
from ldm.config import instantiate_from_config, load_config
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DDCONFIG = {
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [16],
    "num_groups": 4,
}


def tiny_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(DDCONFIG, embed_dim=3)


def tiny_vq() -> VQModel:
    torch.manual_seed(0)
    return VQModel(DDCONFIG, n_embed=16, embed_dim=3, sane_index_shape=True)


def assert_close(value, reference, tolerance=1e-5):
    error = (value - reference).abs().max() / reference.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def load_oracle(path) -> tuple[dict, dict]:
    """An oracle's content and the weights it was computed with, in float32."""
    data = torch.load(path, weights_only=True)
    if "state_dict_file" in data:
        prefix = data["state_dict_prefix"]
        state = torch.load(path.parent / data["state_dict_file"], weights_only=True)["state_dict"]
        return data, {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    state = data.get("state_dict") or data["state_dict_fp16"]
    return data, {key: value.float() for key, value in state.items()}


@pytest.mark.parametrize("name", ["ldm_ae_kl_f8.pt", "more/ldm_ae_kl_f4.pt"])
def test_kl_autoencoder_equals_the_published_one(oracle, name):
    data, state = load_oracle(oracle / name)
    model = AutoencoderKL(data["config"]["ddconfig"], data["config"]["embed_dim"]).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        posterior = model.encode(data["x"])
        assert_close(posterior.mean, data["mean"])
        assert_close(posterior.logvar, data["logvar"])
        assert_close(posterior.kl(), data["kl"])
        assert_close(posterior.mean + torch.exp(posterior.logvar / 2) * data["noise"], data["z_sample"])
        assert_close(model.decode(data["mean"]), data["dec_mode"])


@pytest.mark.parametrize("name", ["ldm_ae_vq_f4.pt", "more/ldm_ae_vq_f8.pt"])
def test_vq_autoencoder_equals_the_published_one(oracle, name):
    data, state = load_oracle(oracle / name)
    config = data["config"]
    model = VQModel(config["ddconfig"], config["n_embed"], config["embed_dim"], sane_index_shape=True).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert_close(model.latent(data["x"]), data["h"])
        z, loss, indices = model.quantize(data["h"])
        assert_close(z, data["z_q"])
        assert_close(loss, data["loss"])
        assert torch.equal(indices, data["indices"])
        assert_close(model.decode(data["h"]), data["dec"])
        assert_close(model.decode(data["h"], force_not_quantize=True), data["dec_force_not_quantize"])


@pytest.mark.parametrize(
    ("name", "parameters", "latent"),
    [("kl-f4", 55_312_063, (3, 64)), ("kl-f8", 83_653_863, (4, 32)), ("vq-f4", 55_322_782, (3, 64)),
     ("vq-f8", 67_717_295, (4, 32))],
)  # fmt: skip
def test_shipped_configs_have_the_published_sizes(name, parameters, latent):
    node = load_config([ROOT / "configs" / "autoencoder" / f"{name}.yaml"])["model"]["params"]["first_stage"]
    with torch.device("meta"):
        model = instantiate_from_config(node)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (model.channels, 256 // model.downsampling) == latent


@pytest.mark.parametrize("make", [tiny_kl, tiny_vq])
def test_every_parameter_gets_a_gradient(make):
    model, x = make(), torch.randn(2, 3, 32, 32)
    recon = model(x, torch.Generator().manual_seed(0))
    assert recon.image.shape == x.shape
    (recon.image.square().mean() + recon.latent_loss).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a softmax over positions does not see the bias of its keys
    assert all(name.endswith("k.bias") for name in without), without


@pytest.mark.parametrize("make", [tiny_kl, tiny_vq, lambda: IdentityFirstStage(3)])
def test_first_stages_share_one_face(make):
    model, x = make().eval(), torch.randn(1, 3, 32, 48)
    z = model.latent(x)
    assert z.shape == (1, model.channels, 32 // model.downsampling, 48 // model.downsampling)
    assert model.decode(z).shape == x.shape


def test_kl_latent_is_the_mode_or_a_sample_named_by_its_generator():
    model, x = tiny_kl().eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        posterior = model.encode(x)
        first, again = (model.latent(x, torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(model.latent(x), posterior.mean)
    assert torch.equal(first, again)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(first, posterior.mean + torch.exp(0.5 * posterior.logvar) * noise)


def test_gaussian_matches_torch_distributions():
    mean, logvar = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    ours = DiagonalGaussian(mean, logvar)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    assert_close(ours.kl(), torch.distributions.kl_divergence(normal, unit).sum((1, 2, 3)))
    assert DiagonalGaussian(mean, logvar + 100).logvar.max() == 20


def test_quantiser_uses_its_codebook_and_passes_gradients_straight_through():
    model = tiny_vq()
    codes = model.quantize.embedding.weight.detach()
    z = codes[torch.arange(16)].reshape(1, 4, 4, 3).permute(0, 3, 1, 2).contiguous().requires_grad_()
    quantised = model.quantize(z + 1e-4)
    assert torch.equal(quantised.indices.flatten(), torch.arange(16))
    assert torch.allclose(quantised.z, z, atol=1e-6)
    quantised.z.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_quantiser_finds_near_codes_under_autocast():
    quantize = tiny_vq().quantize
    with torch.no_grad():
        quantize.embedding.weight.copy_(1 + 1e-3 * torch.arange(16)[:, None])  # equal in bfloat16
    z = quantize.embedding.weight.detach().T.reshape(1, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantize(z).indices.flatten(), torch.arange(16))


def test_image_is_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert tiny_kl()(torch.randn(1, 3, 16, 16)).image.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chmult": [1, 2]}, "did you mean 'ch_mult'"),
        ({"ch": 10}, "num_groups 4 must divide"),
        ({"double_z": False}, "double_z: True"),
        ({"ch_mult": []}, "at least one level"),
        ({"z_channels": None}, "lacks z_channels"),
    ],
)
def test_wrong_ddconfig_is_refused(change, message):
    ddconfig = {key: value for key, value in (DDCONFIG | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        AutoencoderKL(ddconfig, embed_dim=3)


def test_odd_image_size_is_refused():
    with pytest.raises(ValueError, match="multiples of 2 px"):
        tiny_kl().latent(torch.zeros(1, 3, 17, 16))


def test_published_checkpoint_shape_loads_without_its_leftovers(tmp_path):
    source, target = tiny_kl(), AutoencoderKL(DDCONFIG, embed_dim=3)
    leftovers = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    for prefix in ("", "first_stage_model.", "autoencoder."):
        state = {prefix + key: value for key, value in source.state_dict().items()}
        torch.save({"epoch": 1, "state_dict": state | leftovers}, tmp_path / "model.ckpt")
        with torch.no_grad():
            target.quant_conv.weight.zero_()
        report = load_weights(target, tmp_path / "model.ckpt")
        assert "loaded" in report
        assert "left loss" in report
        assert torch.equal(target.quant_conv.weight, source.quant_conv.weight)


def test_old_lightning_checkpoint_is_read_without_running_it(oracle):
    path = oracle / "legacy_pl1_callbacks.ckpt"
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in read_state_dict(path).values())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"state_dict": tiny_vq().state_dict()}, tmp_path / "vq.ckpt")
    with pytest.raises(UserError, match="does not fit the first stage"):
        load_weights(tiny_kl(), tmp_path / "vq.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    for name, message in (("text.ckpt", "cannot read"), ("text.safetensors", "cannot read"), ("no.ckpt", "not exist")):
        with pytest.raises(UserError, match=message):
            load_weights(tiny_kl(), tmp_path / name)


def test_shipped_first_stage_reconstructs_held_out_tissue(demo_slide):
    from ldm.images.slides import open_slide
    from ldm.model_folder import load_first_stage

    folder = ROOT / "data" / "models" / "demo-ssl"
    model = load_first_stage(str(folder))
    pixels = open_slide(demo_slide).read(1024, 1900, 256, 256)
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        z = model.latent(x)
        y = model.decode(z).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (x - y).square().mean())
    assert psnr > 18
    assert 0.6 < y.diff(dim=-1).abs().mean() / x.diff(dim=-1).abs().mean() < 1.1  # as sharp as tissue is
    assert 0.8 < float(z.std()) < 2.5
