"""What makes networks fast changes no result: layouts, cast weights, compiled code; and what caching promises."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT
from ldm.errors import UserError
from ldm.networks.cache import CastNetwork, CompiledNetwork, DeepCache, cast_weights
from ldm.networks.layers import Conv3x3, CrossAttention, GroupNorm32, PointwiseConv, Upsample, attend
from ldm.networks.unet import UNetModel

sys.path.append(str(ROOT / "benchmarks"))

import network
import pairs
import speed

TINY = dict(in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=[2],
            channel_mult=[1, 2], num_heads=2, use_spatial_transformer=True, context_dim=16)  # fmt: skip


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = UNetModel(**TINY).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return net


def inputs(batch: int = 2, tokens: int = 3, side: int = 16, time: float = 500.0):
    generator = torch.Generator().manual_seed(batch + tokens)
    x = torch.randn(batch, 3, side, side, generator=generator)
    return x, torch.full((batch,), time), torch.randn(batch, tokens, 16, generator=generator)


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [2, 8])
@pytest.mark.parametrize("channels", [24, 32])
def test_convolutions_are_those_of_torch(layout, side, channels):
    x = torch.randn(3, 32, side, side, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    for conv, padding in ((PointwiseConv(32, channels), 0), (Conv3x3(32, channels), 1)):
        conv = conv.to(torch.float64, memory_format=layout)
        expected = F.conv2d(x, conv.weight, conv.bias, padding=padding)
        found = conv(x)
        torch.testing.assert_close(found, expected)
        probe, of = torch.randn_like(expected), (x, *conv.parameters())
        gradients = (torch.autograd.grad(out, of, probe) for out in (found, expected))
        for ours, theirs in zip(*gradients):
            torch.testing.assert_close(ours, theirs)


def test_heavy_weights_take_the_way_of_one_product(monkeypatch):
    conv, taken = Conv3x3(4, 64), []
    monkeypatch.setattr(conv, "_product", lambda x: taken.append(x.shape) or x)
    conv(torch.randn(2, 4, 4, 4))
    assert not taken
    conv(torch.randn(1, 4, 4, 4))
    assert len(taken) == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_repeats_every_pixel(layout):
    x = torch.randn(2, 5, 4, 6).contiguous(memory_format=layout)
    assert torch.equal(Upsample(5, False)(x), F.interpolate(x, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [8, 32])
def test_group_norm_does_not_depend_on_the_layout(dtype, side):
    x, norm = (3 + torch.randn(2, 64, side, side)).to(dtype), GroupNorm32(64)
    expected = F.group_norm(x.float(), 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = norm(x.contiguous(memory_format=layout))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_same_with_and_without_gradients(dtype):
    q, k, v = (torch.randn(2, length, 32, dtype=dtype) for length in (9, 5, 5))
    expected = attend(q.double(), k.double(), v.double(), 4)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for gradients in (False, True):
        found = attend(q.requires_grad_(gradients), k, v, 4)
        torch.testing.assert_close(found.double(), expected, **tolerance)


def test_a_single_token_gives_every_query_the_same_and_all_parameters_their_gradients(net):
    x, t, context = inputs(tokens=1)
    twice = context.expand(-1, 2, -1)  # two equal tokens: the general way, and the same result
    net.train()
    out, general = net(x, t, context), net(x, t, twice)
    torch.testing.assert_close(out, general, rtol=1e-4, atol=1e-5)
    names, parameters = zip(*net.named_parameters())
    ours, theirs = (torch.autograd.grad(value.square().sum(), parameters) for value in (out, general))
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for name, a, b in zip(names, ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_dropout_after_attention_stays_one_draw_for_each_query():
    attention = CrossAttention(8, 16, 2, 4, dropout=0.5)
    context = torch.randn(1, 1, 16)
    assert not attention.ignores_query(context)
    assert attention.eval().ignores_query(context)


# --- the network ----------------------------------------------------------------------------------------------------


def test_one_timestep_for_all_samples_is_embedded_once(net):
    x, t, context = inputs(4)
    rows = []
    net.time_embed.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    with torch.no_grad():
        torch.testing.assert_close(net(x, t[:1], context), net(x, t, context), rtol=1e-4, atol=1e-5)
    assert rows == [1, 4]


def test_the_network_is_the_same_in_channels_last(net):
    x, t, context = inputs()
    with torch.no_grad():
        expected = net(x, t, context)
        found = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t, context)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_cast_weights_give_what_autocast_gives(net):
    x, t, context = inputs()
    with torch.no_grad():
        exact = net(x, t, context)
        with torch.autocast("cpu", torch.bfloat16):
            expected = net(x, t, context).float()
        twin = cast_weights(net, torch.bfloat16)
        found = CastNetwork(net, torch.bfloat16)(x, t, context)
    assert {type(m) for m in twin.modules()} == {type(m) for m in net.modules()}
    assert twin.input_blocks[0][0].weight.dtype == torch.bfloat16
    assert net.input_blocks[0][0].weight.dtype == torch.float32
    assert found.dtype == torch.float32
    error, of_autocast = (float((value - exact).norm() / exact.norm()) for value in (found, expected))
    assert 0 < error < 1.5 * of_autocast < 0.05


def test_cast_weights_are_never_stale(net):
    x, t, context = inputs()
    casts = []
    cast = CastNetwork(net, torch.bfloat16, lambda twin: casts.append(twin) or twin)
    with torch.no_grad():
        before = cast(x, t, context)
        assert torch.equal(cast(x, t, context), before)
        assert len(casts) == 1
        net.out[2].weight.mul_(2)
        net.out[2].bias.mul_(2)
        torch.testing.assert_close(cast(x, t, context), 2 * before, rtol=1e-2, atol=1e-2)
        net.out[2].weight.data = torch.zeros_like(net.out[2].weight)
        assert not torch.equal(cast(x, t, context), 2 * before)
    assert len(casts) == 3
    cast(x, t, context).sum().backward()
    assert net.time_embed[0].weight.grad is not None


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.slow
def test_a_compiled_network_gives_the_same_for_any_batch_up_to_its_size():
    shapes = []

    class Network(nn.Module):
        def forward(self, x, timesteps, context):
            shapes.append(len(x))
            return F.silu(x) + timesteps[:, None] + context

    network = Network()
    compiled = CompiledNetwork(network)
    for batch in (3, 2):
        x, t, context = torch.randn(batch, 16), torch.arange(batch) / 9, torch.randn(batch, 16)
        torch.testing.assert_close(compiled(x, t, context=context), network(x, t, context))
    assert compiled.compiled is not None
    assert shapes.count(2) == 1  # only uncompiled: the smaller batch was filled up


@pytest.mark.slow
def test_a_network_that_cannot_be_compiled_runs_as_it_is(net, monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed

    compiled = CompiledNetwork(net)

    def fail(*args, **kwargs):
        raise BackendCompilerFailed(lambda: None, RuntimeError("no compiler"), None)

    monkeypatch.setattr(compiled, "compiled", fail)
    x, t, context = inputs()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="could not be compiled"):
            assert torch.equal(compiled(x, t, context=context), net(x, t, context))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled(x, t, context=context)


# --- caching of deep features ---------------------------------------------------------------------------------------


def count_deep(net):
    calls = []
    net.middle_block.register_forward_hook(lambda *_: calls.append(1))
    return calls


@torch.no_grad()
def test_an_interval_of_one_is_the_plain_network(net):
    x, _, context = inputs()
    cached = DeepCache(net, 1)
    for time in (900.0, 600.0, 300.0):
        t = torch.full((2,), time)
        assert torch.equal(cached(x, t, context=context), net(x, t, context))


@torch.no_grad()
def test_deep_features_are_computed_at_every_nth_step(net):
    x, _, context = inputs()
    calls = count_deep(net)
    cached = DeepCache(net, 2)
    differences = []
    for step, time in enumerate((900.0, 898.0, 896.0, 894.0, 892.0)):
        t = torch.full((2,), time)
        before = len(calls)
        out = cached(x, t, context=context)
        assert len(calls) - before == (step % 2 == 0)
        plain = net(x, t, context)
        differences.append(float((out - plain).norm() / plain.norm()))
    assert differences[0] == differences[2] == differences[4] == 0
    assert 0 < differences[1] < 0.05
    assert 0 < differences[3] < 0.05


@torch.no_grad()
def test_reused_features_are_exact_where_nothing_changed_but_the_time_of_the_shallow_blocks(net):
    x, _, context = inputs()
    t = torch.full((2,), 500.0)
    out, deep = net.run(x, t, context)
    assert torch.equal(net.run(x, t, context, deep=deep)[0], out)
    with pytest.raises(AssertionError):
        assert torch.equal(net.run(x, t, context, deep=deep + 1)[0], out)


@torch.no_grad()
@pytest.mark.parametrize("change", ["batch", "size", "context", "tokens", "time rises", "per-sample times"])
def test_a_call_that_is_not_the_next_step_recomputes(net, change):
    x, _, context = inputs()
    cached = DeepCache(net, 4)
    cached(x, torch.full((2,), 500.0), context=context)
    t = torch.full((2,), 480.0)
    if change == "batch":
        x, context, t = x[:1], context[:1], t[:1]
    elif change == "size":
        x = torch.cat([x, x], 2)
    elif change == "context":
        context = context + 0.1
    elif change == "tokens":
        context = context[:, :2]
    elif change == "time rises":
        t = t + 100
    else:
        t[1] = 700.0
    assert torch.equal(cached(x, t, context=context), net(x, t, context))


@torch.no_grad()
def test_a_batch_that_comes_in_parts_is_never_mixed_up(net):
    x, _, context = inputs(4)
    context = context[:1].expand(4, -1, -1)  # the parts cannot be told by their condition
    cached = DeepCache(net, 3)
    for time in (900.0, 800.0, 700.0):
        for part in (x[:2], x[2:]):
            t = torch.full((2,), time)
            assert torch.equal(cached(part, t, context=context[:2]), net(part, t, context[:2]))


@pytest.mark.parametrize(("interval", "shallow"), [(0, 1), (2, 0), (2, 9)])
def test_impossible_caches_are_refused(net, interval, shallow):
    with pytest.raises(UserError, match="interval of 1 or more"):
        DeepCache(net, interval, shallow)


def test_caching_leaves_gradients_alone(net):
    x, t, context = inputs()
    cached = DeepCache(net, 2)
    for _ in range(2):
        cached(x, t, context=context).sum().backward()
        assert net.middle_block[0].in_layers[2].weight.grad.abs().sum() > 0
        net.zero_grad()


# --- the benchmark's arithmetic -------------------------------------------------------------------------------------


def test_the_benchmark_counts_two_operations_for_a_multiply_add():
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    assert speed.flops_of(lambda: a @ b) == 2 * 4 * 5 * 6
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert speed.flops_of(lambda: conv(torch.randn(2, 3, 16, 16))) == 2 * 2 * 8 * 3 * 9 * 256


def test_rates_of_the_benchmark():
    assert speed.rates(flops=8e12, batch=4, taken=2.0, ceiling=16.0) == (2.0, 4.0, 0.25)


def test_the_benchmark_lets_steps_take_turns_after_warming_up():
    order = []
    taken = speed.race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, "cpu")
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert set(taken) == {"a", "b"}


@pytest.mark.parametrize("size", ["small", "crc"])
@pytest.mark.slow
def test_the_benchmark_compares_unets_of_one_size(size):
    pytest.importorskip("diffusers")
    params = pairs.unet_params(size)
    with torch.device("meta"):
        ours, theirs = UNetModel(**params), pairs.diffusers_unet(params)
    assert speed.size_in_millions(ours) == speed.size_in_millions(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["dit-small", "pixart-small"])
def test_the_benchmark_compares_transformers_that_do_the_same(size):
    pytest.importorskip("diffusers")
    pair = pairs.pair_of(size)
    given = torch.randn(2, *pair.shape), torch.tensor([500, 500]), pair.condition(2)
    ours, theirs = map(speed.size_in_millions, (pair.ours, pair.theirs))
    assert ours == pytest.approx(theirs - pair.repeated, rel=1e-3)
    with torch.no_grad():
        ours, theirs = pair.call_ours(pair.ours, *given), pair.call_theirs(pair.theirs, *given)
    assert ours.shape == theirs.shape
    steps = network.steps_of(pair, "forward", torch.float32, given)
    assert speed.flops_of(steps["ours"]) == pytest.approx(speed.flops_of(steps["theirs"]), rel=0.03)


def test_the_benchmarks_unet_of_lucidrains_gives_what_theirs_gives():
    pytest.importorskip("denoising_diffusion_pytorch")
    pair = pairs.class_unets(16, dim=32)
    state = pair.theirs.state_dict()
    own = {name: name.removeprefix("network.") for name in pair.ours.state_dict()}
    pair.ours.load_state_dict({name: state[theirs] for name, theirs in own.items()})
    given = torch.randn(2, *pair.shape), torch.tensor([3, 700]), pair.condition(2)
    torch.testing.assert_close(pair.ours(*given), pair.theirs(*given), rtol=1e-3, atol=1e-4)


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    import ldm

    return ldm.load_model(Path(__file__).parents[1] / "data" / "models" / "demo-ssl")


@torch.no_grad()
def test_the_models_denoiser_in_bf16_and_with_cached_features_is_near_the_exact_one(model):
    x, cond = torch.randn(1, model.channels, 32, 32), model.null_condition()
    exact, quick = model.denoiser(), model.denoiser(torch.bfloat16)
    cached, cached_quick = model.denoiser(cache=2), model.denoiser(torch.bfloat16, cache=2)
    for step, level in enumerate((6.0, 5.9)):
        sigma = torch.tensor([level])
        expected = exact(x * sigma, sigma, cond)
        for denoiser, most in ((quick, 0.02), (cached, 0.1 * step), (cached_quick, 0.1 * step + 0.02)):
            assert float((denoiser(x * sigma, sigma, cond) - expected).norm() / expected.norm()) <= most


def test_compiling_and_caching_are_one_or_the_other(model):
    with pytest.raises(UserError, match="leave one of them out"):
        model.denoiser(compile=True, cache=2)


def test_only_a_unet_keeps_deep_features(model, monkeypatch):
    monkeypatch.setattr(model.model, "diffusion_model", nn.Identity())
    with pytest.raises(UserError, match="Identity"):
        model.denoiser(cache=2)


def test_samples_with_deep_features_of_every_step_are_the_plain_ones(tmp_path):
    from test_conditioners import build, three

    import ldm

    model = build(three())
    settings = {"steps": 4, "progress": False, "seed": 3}
    cond = model.condition(score=[0.1, 0.8])
    plain = ldm.sample(model, cond, sampler=ldm.Sampler(**settings))
    assert torch.equal(ldm.sample(model, cond, sampler=ldm.Sampler(cache=1, **settings)), plain)
    near = ldm.sample(model, cond, sampler=ldm.Sampler(cache=2, **settings))
    assert not torch.equal(near, plain)
    alone = torch.cat([ldm.sample(model, model.condition(score=s), first=i, sampler=ldm.Sampler(cache=2, **settings))
                       for i, s in enumerate([0.1, 0.8])])  # fmt: skip
    torch.testing.assert_close(near, alone, rtol=1e-4, atol=1e-4)  # of one image's steps, whatever the batch
