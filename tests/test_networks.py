"""The UNet against the published implementations, and its own properties."""

from __future__ import annotations

import pytest
import torch

from ldm.errors import UserError
from ldm.networks.cache import DeepCache
from ldm.networks.ema import EMA
from ldm.networks.residual import SourceResidual
from ldm.networks.unet import UNetModel

TINY = dict(in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=[2],
            channel_mult=[1, 2], num_heads=2, use_spatial_transformer=True, context_dim=16)  # fmt: skip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def random_weights(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1) * 0.5)
    return net


def test_cross_attention_unet_matches_latent_diffusion(oracle):
    golden = torch.load(oracle / "ldm_unet_A.pt", weights_only=True)
    state = torch.load(oracle / golden["state_dict_file"], weights_only=True)["state_dict"]
    prefix = golden["state_dict_prefix"]
    config = golden["config"]
    net = UNetModel(**config).eval()
    net.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    with torch.no_grad():
        assert relative(net(golden["x"], golden["t"], golden["context"]), golden["out"]) < 1e-5
        assert relative(net(golden["x"], golden["t_float"], golden["context"]), golden["out_t_float"]) < 1e-5
        net.train()  # the general attention path instead of the single-token one
        assert relative(net(golden["x"], golden["t"], golden["context"]), golden["out"]) < 1e-5


def test_class_unet_matches_latent_diffusion(oracle):
    golden = torch.load(oracle / "ldm_unet_C.pt", weights_only=True)
    net = UNetModel(**golden["config"]).eval()
    net.load_state_dict(golden["state_dict"])
    with torch.no_grad():
        assert relative(net(golden["x"], golden["t"], y=golden["y"]), golden["out"]) < 1e-5
        assert relative(net(golden["x"], golden["t_float"], y=golden["y"]), golden["out_t_float"]) < 1e-5


def test_guided_diffusion_unet_matches_his_mmdm(oracle):
    golden = torch.load(oracle / "hismmdm_unet.pt", weights_only=True)
    net = UNetModel(
        in_channels=3, out_channels=6, model_channels=32, num_res_blocks=1, attention_resolutions=[2],
        channel_mult=[1, 1], num_heads=4, num_classes=5, use_scale_shift_norm=True, resblock_updown=True,
        use_new_attention_order=True,
    ).eval()  # fmt: skip
    net.load_state_dict(golden["state_dict"])
    with torch.no_grad():
        assert relative(net(golden["x"], golden["t"], y=golden["y"]), golden["out"]) < 1e-5


@pytest.mark.parametrize("name", ["ldm_concat_ckpt", "ldm_hybrid_ckpt"])
def test_every_option_of_the_published_unets_loads_by_name(oracle, name):
    import yaml

    config = yaml.safe_load((oracle / "more" / name / "config.yaml").read_text())["model"]["params"]["unet_config"]
    state = torch.load(oracle / "more" / name / "model.ckpt", weights_only=True)["state_dict"]
    prefix = "model.diffusion_model."
    UNetModel(**config["params"]).load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_scale_shift_norm": True, "resblock_updown": True},
        {"use_spatial_transformer": False, "context_dim": None, "num_classes": 4},
        {"use_checkpoint": True},
    ],
)
def test_gradient_reaches_every_parameter(options):
    config = TINY | options
    net = random_weights(UNetModel(**config)).train()
    kwargs = {"y": torch.tensor([0, 3])} if config.get("num_classes") else {"context": torch.randn(2, 3, 16)}
    net(torch.randn(2, 3, 16, 16), torch.tensor([5, 900]), **kwargs).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        if name != "label_emb.weight":
            assert parameter.grad.abs().sum() > 0, name


def test_checkpointing_changes_no_gradient():
    x, t, c = torch.randn(2, 3, 16, 16), torch.tensor([5, 900]), torch.randn(2, 3, 16)
    grads = []
    for use_checkpoint in (False, True):
        net = random_weights(UNetModel(**TINY, use_checkpoint=use_checkpoint)).train()
        net(x, t, c).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(*grads)


def test_the_published_size_of_the_brca_and_crc_unet():
    with torch.device("meta"):
        net = UNetModel(
            image_size=64, in_channels=3, out_channels=3, model_channels=192, attention_resolutions=[8, 4, 2],
            num_res_blocks=2, channel_mult=[1, 2, 3, 5], num_heads=1, use_spatial_transformer=True,
            transformer_depth=1, context_dim=512,
        )  # fmt: skip
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 400.92


@pytest.mark.parametrize(
    "change", [{"num_heads": 3}, {"model_channels": 48}, {"context_dim": None}, {"num_head_channels": 8}]
)
def test_impossible_unets_are_refused(change):
    with pytest.raises(UserError):
        UNetModel(**(TINY | change))


def residual(**change) -> SourceResidual:
    params = {"in_channels": 2, "out_channels": 1, "model_channels": 32, "num_res_blocks": 1, "num_heads": 1,
              "attention_resolutions": [], "channel_mult": [1], "norm_groups": 8}  # fmt: skip
    return SourceResidual({"target": "ldm.networks.unet.UNetModel", "params": params | change})


def test_a_source_is_changed_by_what_the_network_says():
    torch.manual_seed(0)
    network, x, time = residual(), torch.randn(2, 2, 8, 8), torch.tensor([3, 900])
    torch.testing.assert_close(network(x, time), x[:, 1:], atol=0, rtol=0)
    random_weights(network)
    torch.testing.assert_close(network(x, time), x[:, 1:] + network.unet(x, time))
    assert (network(x, time) - x[:, 1:]).abs().mean() > 0.01
    network(x, time).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_a_residual_needs_a_source_of_its_own_channels_and_keeps_no_deep_features():
    with pytest.raises(UserError, match="in_channels must be twice out_channels; got 3 and 1"):
        residual(in_channels=3)
    with pytest.raises(UserError, match="a SourceResidual keeps no deep features"):
        DeepCache(residual(), 2)


def test_ema_follows_its_formula_and_gives_the_weights_back():
    net = torch.nn.Linear(2, 2)
    ema = EMA(net, decay=0.5)
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1.0)
    ema.update(net)
    decay = min(0.5, 2 / 11)
    torch.testing.assert_close(ema.get_buffer("weight"), decay * before + (1 - decay) * (before + 1))
    own = net.weight.detach().clone()
    with ema.averaged(net):
        assert torch.equal(net.weight, ema.get_buffer("weight"))
    assert torch.equal(net.weight, own)
