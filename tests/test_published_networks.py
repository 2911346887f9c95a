"""Networks that published checkpoints need: parity, sizes of the published instances, gradients."""

from __future__ import annotations

import pytest
import torch
from published import load, relative
from torch import Tensor, nn

from ldm.conditioners.score import LucidrainsScore
from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.networks.ddpm_unet import DDPMUNet
from ldm.networks.encoder_unet import POOLS, EncoderUNetModel
from ldm.networks.lucidrains import LucidrainsUNet, StandardizedConv
from ldm.networks.unet import UNetModel

CLASSIFIER = dict(image_size=16, in_channels=3, model_channels=32, out_channels=4, num_res_blocks=1,
                  attention_resolutions=[2], channel_mult=[1, 2], num_head_channels=32)  # fmt: skip
DDPM = dict(image_size=16, in_channels=3, out_ch=1, ch=32, ch_mult=[1, 2], num_res_blocks=2, attn_resolutions=[8])


def randomized(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1) * 0.5)
    return net


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def check_gradients(net: nn.Module, out: Tensor) -> None:
    out.square().mean().backward()
    lacking = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not lacking


@pytest.mark.slow
def test_the_ddpm_unet_is_the_published_one(oracle):
    folder = oracle / "more" / "mid_ddpm_model"
    io, (raw, _, _, _, average) = load(folder / "io.pt"), load(folder / "ckpt.pth")
    config = io["config"]["model"]
    names = ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resamp_with_conv")
    net = DDPMUNet(image_size=128, **{name: config[name] for name in names}).eval()
    x = torch.cat([io["x"], io["cond"]], 1)
    with torch.no_grad():
        net.load_state_dict({name.removeprefix("module."): value for name, value in raw.items()})
        assert relative(net(x, io["t"]), io["eps_raw"]) < 1e-5
        assert relative(net(x, io["t_big"]), io["eps_raw_t_big"]) < 1e-5
        net.load_state_dict(average)
        assert relative(net(x, io["t"]), io["eps_ema"]) < 1e-5


def test_the_classifier_is_the_published_one(oracle):
    golden = load(oracle / "more" / "hismmdm_classifier.pt")
    net = EncoderUNetModel(**golden["config"]).eval()
    net.load_state_dict(golden["state_dict"])
    x = golden["x"].requires_grad_()
    logits = net(x, golden["t"])
    assert relative(logits.detach(), golden["logits"]) < 1e-5
    log_probability = logits.log_softmax(1).gather(1, golden["y"][:, None]).sum()
    assert relative(torch.autograd.grad(log_probability, x)[0], golden["grad"]) < 1e-5


def test_published_sizes():
    """DDPM's by its paper (35.7 and 114 million), the others by the published code."""
    with torch.device("meta"):
        cifar = DDPMUNet(32, 3, 3, 128, [1, 2, 2, 2], 2, [16])
        lsun = DDPMUNet(256, 3, 3, 128, [1, 1, 2, 2, 4, 4], 2, [16])
        ixi = DDPMUNet(128, 3, 1, 64, [1, 2, 2, 2], 2, [16])
        adm = UNetModel(in_channels=3, out_channels=1, model_channels=64, num_res_blocks=2, attention_resolutions=[8],
                        channel_mult=[1, 1, 2, 3, 4], num_heads=1)  # fmt: skip
        cells = LucidrainsUNet(64), LucidrainsScore(64)
        ours = dict(in_channels=3, model_channels=128, out_channels=1000, num_res_blocks=2, num_head_channels=64,
                    use_scale_shift_norm=True, resblock_updown=True, pool="attention")  # fmt: skip
        imagenet = EncoderUNetModel(256, attention_resolutions=[8, 16, 32], channel_mult=[1, 1, 2, 2, 4, 4], **ours)
        large = EncoderUNetModel(512, attention_resolutions=[16, 32, 64], channel_mult=[0.5, 1, 1, 2, 2, 4, 4], **ours)
    assert (count(cifar), count(lsun), count(ixi), count(adm)) == (35_746_307, 113_673_219, 8_950_913, 21_423_169)
    assert count(*cells) == 38_398_787
    assert (count(imagenet), count(large)) == (54_096_360, 54_448_360)
    assert imagenet.out[2].positional_embedding.shape == (512, 65)
    assert large.input_blocks[0][0].out_channels == 64


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_a_classifiers_every_weight_is_trained_and_a_sample_is_judged_alone(pool, resblock_updown):
    net = randomized(EncoderUNetModel(**CLASSIFIER, pool=pool, resblock_updown=resblock_updown))
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([5.0, 300.0, 900.0])
    out = net(x, t)
    assert out.shape == (3, 4)
    torch.testing.assert_close(net.eval()(x[1:2], t[1:2]), out[1:2], rtol=1e-4, atol=1e-4)
    check_gradients(net, out)


def test_names_of_the_classifiers_pools():
    """Indices in `out` are those of guided-diffusion's Sequential."""
    names = {pool: {n for n, _ in EncoderUNetModel(**CLASSIFIER, pool=pool).out.named_parameters()} for pool in POOLS}
    assert names["adaptive"] == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert names["spatial"] == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert names["spatial_v2"] == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert {"0.weight", "2.positional_embedding", "2.qkv_proj.weight", "2.c_proj.bias"} < names["attention"]


@pytest.mark.parametrize("resamp_with_conv", [False, True])
def test_gradients_of_the_ddpm_unet(resamp_with_conv):
    net = randomized(DDPMUNet(**DDPM, resamp_with_conv=resamp_with_conv))
    out = net(torch.randn(2, 3, 16, 16), torch.tensor([5, 900]))
    assert out.shape == (2, 1, 16, 16)
    check_gradients(net, out)


def score_model() -> nn.Module:
    """The mitotic-figure DPM as a training of this toolkit, small."""
    return instantiate_from_config({
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "unet_config": {
                "target": "ldm.networks.lucidrains.LucidrainsUNet",
                "params": {"dim": 16, "dim_mults": [1, 2], "image_size": 8},
            },
            "first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"},
            "cond_stage_config": {"target": "ldm.conditioners.score.LucidrainsScore", "params": {"dim": 16}},
            "beta_schedule": "cosine", "loss_type": "l1", "use_ema": False,
        },
    })  # fmt: skip


def test_the_cell_network_and_its_score_are_trained_together():
    model = score_model()
    batch = {"image": torch.rand(6, 3, 8, 8) * 2 - 1, "score": torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])}
    rng = torch.Generator().manual_seed(0)  # of the six scores, some are dropped and some not
    model.loss(batch, rng).mean().backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not lacking


def test_the_condition_of_the_cell_network():
    conditioner = LucidrainsScore(16)
    kept, lost = conditioner({"score": torch.tensor([0.3, 0.3])}, torch.tensor([False, True]))["vector"]
    assert torch.equal(lost[None], conditioner.null()["vector"])
    assert not torch.equal(kept, lost)
    with pytest.raises(UserError, match="lies in"):
        conditioner.read({"score": 1.5})
    with pytest.raises(UserError, match="acts by vector, of dimension 64; got none"):
        LucidrainsUNet(16, [1, 2])(torch.zeros(1, 3, 8, 8), torch.zeros(1))


def test_filters_are_standardised_whatever_their_scale():
    conv, x = StandardizedConv(4, 8), torch.randn(2, 4, 6, 6)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(30).add_(1.5)
    torch.testing.assert_close(conv(x), before, rtol=1e-2, atol=2e-2)
    weight = conv.weight.detach().flatten(1)
    exact = (weight - weight.mean(1, keepdim=True)) / (weight.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    wanted = nn.functional.conv2d(x, exact.view_as(conv.weight), conv.bias, padding=1)
    torch.testing.assert_close(conv(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EncoderUNetModel(**CLASSIFIER | {"pool": "max"}), "pool must be one of adaptive, attention"),
        (lambda: EncoderUNetModel(**CLASSIFIER | {"num_head_channels": -1, "pool": "attention"}), "num_head_channels"),
        (lambda: EncoderUNetModel(**CLASSIFIER | {"model_channels": 48}), "multiple of 32"),
        (lambda: DDPMUNet(**DDPM | {"ch": 40}), "multiple of 32"),
        (lambda: LucidrainsUNet(12), "multiple of 8"),
    ],
)
def test_impossible_networks_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_images_of_another_size():
    net = randomized(EncoderUNetModel(**CLASSIFIER, pool="attention"))
    with pytest.raises(ValueError, match="takes 64 positions, got 16"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    x = torch.zeros(1, 3, 12, 12)
    for other in (LucidrainsUNet(16, [1, 2, 4, 8]), DDPMUNet(**DDPM | {"ch_mult": [1, 1, 1, 1]})):
        with pytest.raises(ValueError, match="multiples of 8"):
            other(x, torch.zeros(1))
