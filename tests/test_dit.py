"""The transformer: parity with the published ones, any size, gradients everywhere, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from published import load, relative
from torch import Tensor

from ldm.config import instantiate_from_config
from ldm.errors import UserError
from ldm.networks.dit import CrossAttention, DiT
from ldm.networks.positions import axes

SMALL = dict(in_channels=4, out_channels=4, image_size=8, hidden_size=32, depth=2, num_heads=2)
FORMS = {
    "DiT": dict(num_classes=5),
    "PixArt": dict(modulation="shared", context_dim=16, context_tokens=4),
    "modern": dict(context_dim=16, positions="rotary", norm="rms", mlp="swiglu", qk_norm="rms", vector_dim=6),
    "sequence": dict(context_dim=16, context="sequence", positions="rotary", qk_norm="layer"),
    "all": dict(modulation="shared", num_classes=5, context_dim=16, vector_dim=6),
}


def network(form: str, **more) -> DiT:
    """One whose weights are all drawn, since a fresh one predicts zero."""
    torch.manual_seed(0)
    net = DiT(**SMALL, **FORMS[form] | more)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return net.eval()


def conditions(net: DiT, count: int = 2) -> dict[str, Tensor]:
    """Conditions that the network takes, drawn from a seed."""
    generator = torch.Generator().manual_seed(1)
    cond: dict[str, Tensor] = {}
    if net.takes.num_classes:
        cond["y"] = torch.arange(count) % 5
    if net.takes.context_dim:
        cond["context"] = torch.randn(count, 4, 16, generator=generator)
    if net.takes.needs_vector:
        cond["vector"] = torch.randn(count, 6, generator=generator)
    return cond


@pytest.fixture
def third(shared):
    return shared("oracle") / "third"


def parts_of(state: dict[str, Tensor], *training: str) -> dict[str, Tensor]:
    """Weights of the network, without fixed positions and what only training used."""
    return {k: v for k, v in state.items() if k != "pos_embed" and not k.startswith(training)}


@pytest.mark.parametrize(("file", "more"), [("repa_sit.pt", ()), ("repae_sit.pt", ("bn.",))])
def test_sit_is_the_published_one(third, file, more):
    golden = load(third / file)
    config = golden["config"]
    net = DiT(4, 4, 16, 2, config["hidden_size"], config["depth"], config["num_heads"], num_classes=1001).eval()
    net.load_state_dict(parts_of(golden["state_dict"], "projectors.", *more))
    with torch.no_grad():
        assert relative(net(golden["x"], golden["t"], y=golden["y"]), golden["out"]) < 1e-5
        times = DiT(4, 4, 16, 2, config["hidden_size"], config["depth"], config["num_heads"], num_classes=1001,
                    time_scale=0.001).eval()  # fmt: skip
        times.load_state_dict(net.state_dict())
        assert relative(times(golden["x"], 1000 * golden["t"], y=golden["y"]), golden["out"]) < 1e-5
    vector = DiT(4, 4, 16, 2, config["hidden_size"], config["depth"], config["num_heads"]).eval()
    vector.load_state_dict(parts_of(golden["state_dict"], "projectors.", "y_embedder.", *more))
    with torch.no_grad():
        assert relative(vector(golden["x"], golden["t"], vector=golden["y_vector"]), golden["out_y_vector"]) < 1e-5


@pytest.mark.parametrize(("name", "tokens"), [("pixcell_256", 1), ("pixcell_1024", 16)])
def test_pixart_is_the_published_one(third, name, tokens):
    folder = third / name / "original"
    golden, weights = load(folder / "io.pt"), load(folder / "epoch_3_step_1234.pth")
    kwargs = golden["kwargs"]
    net = DiT(16, 32, kwargs["input_size"], 2, kwargs["hidden_size"], kwargs["depth"], kwargs["num_heads"],
              modulation="shared", context_dim=kwargs["caption_channels"], context_tokens=tokens,
              position_scale=kwargs["pe_interpolation"]).eval()  # fmt: skip
    own = {name: value.clone() for name, value in net.named_buffers()}
    for kind, out in (("state_dict", "out"), ("state_dict_ema", "out_ema")):
        state = parts_of(weights[kind], "y_embedder.y_embedding")
        net.load_state_dict(state)
        with torch.no_grad():
            assert relative(net(golden["x"], golden["t"], context=golden["y"]), golden[out]) < 1e-5
    for name, value in own.items():
        assert relative(value, weights["state_dict"][name]) < 1e-6


def test_sequences_are_the_published_conditioning_model(third):
    golden, weights = load(third / "zoomldm_cdm.pt"), load(third / "zoomldm_cdm_ckpt" / "0000010.pt")
    config = golden["config"]
    size = dict(hidden_size=config["hidden_size"], depth=config["depth"], num_heads=config["num_heads"])
    net = DiT(config["in_channels"], 2 * config["in_channels"], config["num_patches"], 0, num_classes=8, **size).eval()
    for kind, out in (("model", "out_raw"), ("ema", "out_ema")):
        net.load_state_dict(parts_of(weights[kind]))
        with torch.no_grad():
            assert relative(net(golden["x"], golden["t"], y=golden["y"]), golden[out]) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_training_reaches_every_parameter(form):
    net = network(form).train()
    net(torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), **conditions(net)).square().mean().backward()
    assert [name for name, each in net.named_parameters() if each.grad is None or not each.grad.abs().sum()] == []


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_changes_no_gradient(form):
    grads = []
    for use in (False, True):
        net = network(form, use_checkpoint=use).train()
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        net(x, torch.tensor([3.0, 700.0]), **conditions(net)).square().mean().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_its_samples_and_one_timestep_is_that_of_all(form):
    net = network(form)
    x, cond = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(3)), conditions(net, 3)
    with torch.no_grad():
        whole = net(x, torch.full((3,), 500.0), **cond)
        torch.testing.assert_close(net(x, torch.tensor([500.0]), **cond), whole)
        for i in range(3):
            own = {name: value[i : i + 1] for name, value in cond.items()}
            torch.testing.assert_close(net(x[i : i + 1], torch.tensor([500.0]), **own), whole[i : i + 1])
    assert whole.shape == (3, 4, 8, 12)


@pytest.mark.parametrize("form", FORMS)
def test_every_condition_and_place_counts(form):
    net = network(form)
    x, cond = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4)), conditions(net, 1)
    time = torch.tensor([9.0])
    with torch.no_grad():
        out = net(x, time, **cond)
        for name, value in cond.items():
            other = (value + 1) % 5 if name == "y" else value + 1
            assert relative(net(x, time, **cond | {name: other}), out) > 1e-3
        assert relative(net(x.roll(2, 2), time, **cond).roll(-2, 2), out) > 1e-3
        assert relative(net(x.roll(2, 3), time, **cond).roll(-2, 3), out) > 1e-3
        assert relative(net(x, time + 1, **cond), out) > 1e-4


def places(net: DiT, rows: int, columns: int) -> list[list[float]]:
    grid = (rows, columns)
    return [each.tolist() for each in axes(grid, net._steps(grid), torch.device("cpu"))]


def test_positions_are_interpolated_to_the_size_that_was_trained_on():
    net = network("DiT")  # 4 x 4 tokens
    assert places(net, 2, 2) == [[0, 0, 2, 2], [0, 2, 0, 2]]
    assert max(max(each) for each in places(net, 16, 8)) < 4


@pytest.mark.parametrize("form", ["DiT", "modern"])
def test_positions_that_are_kept_serve_a_training_after_a_sampling_in_inference_mode(form):
    net, x = network(form), torch.randn(1, 4, 8, 20)
    cond = conditions(net, 1)
    with torch.inference_mode():
        first = net(x, torch.tensor([5.0]), **cond)
    out = net.train()(x, torch.tensor([5.0]), **cond)
    out.square().mean().backward()
    assert torch.equal(out, first)


@pytest.mark.parametrize(("tokens", "length", "folded"), [(64, 4, True), (16, 4, False), (16, 1, True)])
def test_few_tokens_of_context_fold_weights_for_the_same_result(tokens, length, folded, monkeypatch):
    attention = CrossAttention(32, 2)
    x, context = torch.randn(2, tokens, 32), torch.randn(2, length, 32)
    ways, fold = [], attention._folded
    monkeypatch.setattr(attention, "_folded", lambda *given: ways.append(1) or fold(*given))
    q = attention.q_linear(x).unflatten(-1, (2, 16)).transpose(1, 2)
    k, v = attention.kv_linear(context).unflatten(-1, (2, 2, 16)).permute(2, 0, 3, 1, 4)
    expected = attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    found = attention(x, context)
    assert bool(ways) == folded
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), list(attention.parameters())) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert relative(attention.eval()(x, context).expand(2, tokens, 32), expected) < 1e-5


def test_a_fresh_network_predicts_zero_and_each_block_is_the_identity():
    net = DiT(**SMALL, **FORMS["all"])
    cond = conditions(net)
    assert net(torch.randn(2, 4, 8, 8), torch.tensor([3.0]), **cond).abs().max() == 0
    tokens = torch.randn(2, 16, 32)
    deep = DiT(**SMALL)
    assert torch.equal(deep.blocks[0](tokens, torch.randn(1, 32), None, None), tokens)


@pytest.mark.parametrize("form", ["DiT", "PixArt", "modern"])
def test_half_precision_stays_near(form):
    net = network(form)
    x, cond = torch.randn(2, 4, 8, 8), conditions(net)
    with torch.no_grad():
        want = net(x, torch.tensor([899.1]), **cond)
        with torch.autocast("cpu", torch.bfloat16):
            got = net(x, torch.tensor([899.1]), **cond)
    assert relative(got.float(), want) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("form", ["all", "modern"])
def test_it_compiles_without_a_break(form):
    net = network(form)
    x, cond = torch.randn(2, 4, 8, 8), conditions(net)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.compile(net, fullgraph=True, backend="aot_eager")(x, torch.tensor([5.0]), **cond)
        torch.testing.assert_close(got, net(x, torch.tensor([5.0]), **cond))


def test_published_sizes():
    """DiT-XL/2 has 675 million parameters (arXiv:2212.09748, table 4), DiT-S/2 33, DiT-B/2 130, DiT-L/2 458."""
    sizes = {675: (1152, 28, 16), 33: (384, 12, 6), 130: (768, 12, 12), 458: (1024, 24, 16)}
    for millions, (hidden, depth, heads) in sizes.items():
        with torch.device("meta"):
            net = DiT(4, 8, 32, 2, hidden, depth, heads, num_classes=1001)
        assert round(sum(each.numel() for each in net.parameters()) / 1e6) == pytest.approx(millions, abs=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(num_heads=3), "hidden_size is a multiple of num_heads"),
        (dict(patch_size=3), "image_size 8 is not a multiple of patch_size 3"),
        (dict(positions="learned"), "positions of a transformer is one of sincos, rotary; got learned"),
        (dict(qk_norm="batch"), "qk_norm of a transformer is one of None, layer, rms"),
        (dict(context_tokens=4), "context_tokens 4 lie on a square, with a context_dim"),
        (dict(context_tokens=5, context_dim=16), "context_tokens 5 lie on a square"),
        (dict(num_heads=16, positions="rotary"), "rotary positions need heads of a multiple of 4; got 2"),
    ],
)
def test_what_it_refuses(given, message):
    with pytest.raises(UserError, match=message):
        DiT(**SMALL | given)


def test_it_takes_every_kind_of_condition_at_once():
    """Tokens by cross-attention, vectors by the time embedding and maps by their channels, all composed and trained."""
    from test_conditioners import CLASSES, model_node, module

    members = {
        "class": module("class_token.ClassEmbedder", classes=CLASSES, dim=24, dropout=0.2),
        "score": module("score.ScoreEmbedder", dim=32, dropout=0.5),
        "ssl": module("ssl.PatchEmbedder", embed_dim=5, context_dim=24, dropout=0.1),
        "source": module("source_image.SourceImage", size=16, channels=3, key="source", dropout=0.1),
    }
    node = model_node(module("compose.ConditionerSet", conditioners=members))
    params = dict(in_channels=6, out_channels=3, image_size=16, hidden_size=32, depth=2, num_heads=2, context_dim=24)
    node["params"]["unet_config"] = {"target": "ldm.networks.dit.DiT", "params": params}
    torch.manual_seed(0)
    model = instantiate_from_config(node)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = {
        "image": torch.randn(6, 3, 16, 16).clamp(-1, 1), "class": CLASSES * 2, "score": torch.rand(6),
        "ssl": torch.randn(6, 5), "source": torch.randn(6, 3, 16, 16).clamp(-1, 1),
    }  # fmt: skip
    model.loss(batch, torch.Generator().manual_seed(1)).mean().backward()
    lacking = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    assert lacking == []
