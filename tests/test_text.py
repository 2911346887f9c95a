"""Text towers as a condition: layouts, published checkpoints, nulls, prompts, cached features, errors."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from ldm.conditioners.compose import ConditionerSet, conditions_given
from ldm.conditioners.text import TextEmbedder
from ldm.conditioners.text_tokens import lay_out
from ldm.config import instantiate_from_config, load_config, validate
from ldm.encoders.text_registry import REGISTRY
from ldm.errors import UserError
from ldm.interop.text_names import is_transformers, open_clip_config, to_open_clip
from ldm.training.run import CALLBACKS

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "tests" / "configs" / "tiny_clip.json"
LONG = "tumour cells with necrosis and lymphocytes " * 30  # far more than 77 tokens


@pytest.fixture(scope="module")
def clip() -> torch.nn.Module:
    torch.manual_seed(0)
    config = json.loads(CONFIG.read_text())
    return open_clip.CLIP(**config).eval()


@pytest.fixture(scope="module")
def weights(clip, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("clip") / "open_clip_pytorch_model.bin"
    torch.save(clip.state_dict(), path)
    return str(path)


@pytest.fixture
def embedder(weights):
    def build(**params) -> TextEmbedder:
        return TextEmbedder(str(CONFIG), **{"weights": weights, "dropout": 0.5, **params})

    return build


def tokens(embedder: TextEmbedder, *texts: str, **more) -> torch.Tensor:
    return embedder({"text": list(texts), **more})["crossattn"]


def hf_names(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """A checkpoint of transformers' CLIPModel that has the weights of open_clip's `state`."""
    named = {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}
    named[f"{prefix}vision_model.post_layernorm.weight"] = torch.ones(3)
    whole = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    for name, value in state.items():
        if name in whole:
            named[f"{prefix}text_model.{whole[name]}"] = value
        elif name.startswith("transformer.resblocks."):
            _, _, layer, inner = name.split(".", 3)
            home = f"{prefix}text_model.encoder.layers.{layer}."
            if inner.startswith("attn.in_proj_"):
                kind = inner.removeprefix("attn.in_proj_")
                for part, third in zip("qkv", value.chunk(3)):
                    named[f"{home}self_attn.{part}_proj.{kind}"] = third
            else:
                module, kind = inner.rsplit(".", 1)
                named[f"{home}{parts[module]}.{kind}"] = value
    return named


def test_tokens_are_those_of_open_clip(clip, embedder):
    text = "Pleomorphic nuclei, 12 mitoses"
    ids = open_clip.tokenize([text])
    with torch.no_grad():
        x = clip.token_embedding(ids) + clip.positional_embedding
        expected = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))
    torch.testing.assert_close(tokens(embedder(mask_padding=False, pad="zero"), text), expected, rtol=1e-5, atol=1e-5)
    used = (ids[0] != 0).sum()
    masked = tokens(embedder(pad="zero"), text)  # a causal tower: padding comes after all words
    torch.testing.assert_close(masked[:, :used], expected[:, :used], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(masked[:, used:], expected[:, used:], atol=1e-3)


def test_published_text_checkpoint(oracle, tmp_path):
    """PathLDM: 154 tokens in one pass, positions anew in each chunk, no attention to padding (arXiv:2309.00748)."""
    folder = oracle / "more" / "pathldm_text_ckpt"
    io = torch.load(folder / "io.pt", weights_only=True)
    state = torch.load(folder / "model.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    config = open_clip_config(json.loads((folder / "text_config.json").read_text()))
    (tmp_path / "tower.json").write_text(json.dumps(config))
    for trainable in (False, True):
        text = TextEmbedder(str(tmp_path / "tower.json"), str(tmp_path / "model.ckpt"), chunks=2, trainable=trainable)
        found = text.encode(io["input_ids"], io["attention_mask"]).detach()
        assert (found - io["c"]).norm() <= 1e-5 * io["c"].norm()
        null = text.null()["crossattn"].detach()
        assert (null - io["uc"][:1]).norm() <= 1e-5 * io["uc"][:1].norm()
    one = TextEmbedder(str(tmp_path / "tower.json"), str(tmp_path / "model.ckpt"))
    plain = one.encode(io["input_ids"][:, :77], io["attention_mask"][:, :77])
    torch.testing.assert_close(plain, io["plain_clip_first_chunk"], rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="knows 120 words"):
        one({"text": ["a tile"]})


@pytest.mark.parametrize("prefix", ["", "cond_stage_model.transformer."])
def test_transformers_names_give_the_same_tower(clip, embedder, tmp_path, prefix):
    state = hf_names(clip.state_dict(), prefix)
    assert is_transformers(state)
    named = to_open_clip(state)
    assert all(torch.equal(named[name], clip.state_dict()[name]) for name in named)
    torch.save(state, tmp_path / "pytorch_model.bin")
    expected = tokens(embedder(), "a tile")
    torch.testing.assert_close(tokens(embedder(weights=str(tmp_path / "pytorch_model.bin")), "a tile"), expected)
    text = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    told = {"model_type": "clip", "projection_dim": 16, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(told))
    folder = TextEmbedder(str(tmp_path))  # a folder of transformers' CLIPModel
    torch.testing.assert_close(tokens(folder, "a tile"), expected)
    (tmp_path / "config.json").write_text(json.dumps({**told, "text_config": {**text, "hidden_act": "gelu"}}))
    with pytest.raises(UserError, match="says quick_gelu: False"):
        embedder(weights=str(tmp_path / "pytorch_model.bin"))


def test_captions_differ_and_the_null_is_the_empty_one(embedder):
    text = embedder()
    first, second = tokens(text, "a tumour", "normal mucosa")
    assert text.length == 77
    assert first.shape == (77, 16)
    assert (first - second).abs().max() > 0.1
    null = text.null()["crossattn"]
    assert (first - null[0]).abs().max() > 0.1
    dropped = text({"text": ["a tumour", "normal mucosa"]}, torch.tensor([True, False]))["crossattn"]
    torch.testing.assert_close(dropped[:1], null)
    torch.testing.assert_close(dropped[1], second)


def test_chunks_and_layouts():
    words = [list(range(1, 11))]
    ids, keep = lay_out(words, 2, 6, "joint", 90, 91, 0)
    assert ids.tolist() == [[90, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 91]]
    assert keep.all()
    ids, keep = lay_out(words, 2, 6, "separate", 90, 91, 0)
    assert ids.tolist() == [[90, 1, 2, 3, 4, 91, 90, 5, 6, 7, 8, 91]]
    ids, keep = lay_out([[1]], 2, 4, "separate", 90, 91, 7)
    assert ids.tolist() == [[90, 1, 91, 7, 90, 91, 7, 7]]
    assert keep.tolist() == [[True, True, True, False, True, True, False, False]]


@pytest.mark.parametrize("layout", ["joint", "separate"])
def test_long_captions_reach_the_second_chunk(embedder, layout):
    text = embedder(chunks=2, layout=layout)
    end = LONG[:500] + " fat"  # its end lies in the second chunk
    a, b = tokens(text, LONG[:500] + " bone", end)
    assert a.shape == (154, 16)
    assert torch.allclose(a[:70], b[:70], atol=1e-5)
    assert (a[77:] - b[77:]).abs().max() > 0.1
    assert text.capacity == {"joint": 152, "separate": 150}[layout]
    alone = embedder()
    first = tokens(alone, end)[0]
    assert torch.allclose(tokens(text, end)[0, :77], first, atol=1e-5) == (layout == "separate")


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_every_parameter_gets_a_gradient_when_trained(embedder, layer):
    text = embedder(trainable=True, layer=layer, chunks=2, context_dim=8)
    out = text({"text": [LONG, "a tile"]}, torch.tensor([False, True]))["crossattn"]
    assert out.shape == (2, 154, 8)
    out.square().sum().backward()
    assert len(text.tower.blocks) == (2 if layer == "last" else 1)
    for name, parameter in text.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert not any("visual" in name or "projection" in name or "logit" in name for name in text.state_dict())


def test_a_frozen_tower_has_no_gradients_and_stays_in_eval_mode(embedder):
    text = embedder(context_dim=8).train()
    assert not text.tower.training
    text({"text": ["a tile"]})["crossattn"].sum().backward()
    assert {name for name, p in text.named_parameters() if p.grad is not None} == {"project.weight", "project.bias"}


def test_the_null_follows_the_weights(embedder):
    text = embedder()
    with torch.inference_mode():
        before = text.null()["crossattn"].clone()
    changed = {name: value + 0.3 * torch.randn_like(value) for name, value in text.state_dict().items()}
    text.load_state_dict(changed)
    after = text.null()["crossattn"]
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, text.encode(*text.empty_tokens()))


def test_prompts_name_the_modality(embedder):
    text = embedder(prompt="{modality}: {text}")
    assert text.keys == ("text", "modality")
    batch = {"text": ["a mass", "a {mass}", "a mass"], "modality": ["CT", "MRI", None]}
    assert text.prompts(batch) == ["CT: a mass", "MRI: a {mass}", "a mass"]
    assert text.prompts(text.read({"text": ["a", "b"], "modality": "CT"})) == ["CT: a", "CT: b"]
    assert text.prompts(text.read({"text": "a"})) == ["a"]
    only = embedder(prompt="{modality}: {text}", text_only=True)
    assert only.keys == ("text",)
    assert only.prompts(batch) == batch["text"]
    assert text.parse("text", "a, b: c") == "a, b: c"
    cond = conditions_given(text, {"text": "a mass", "modality": ["CT", "MRI"]})["crossattn"]
    assert cond.shape == (2, 77, 16)
    assert (cond[0] - cond[1]).abs().max() > 0.1


def test_cached_features_stand_for_captions(embedder):
    text = embedder(context_dim=8)
    cached = text.encode(*text.tokens(["a tumour", "a tile"]))
    expected = tokens(text, "a tumour", "a tile")
    torch.testing.assert_close(text({"text": cached})["crossattn"], expected)
    drop = torch.tensor([False, True])
    torch.testing.assert_close(text({"text": cached}, drop)["crossattn"][1:], text.null()["crossattn"])
    made = {"source": "features/clip", "shape": [77, 16], **text.settings()}
    text.check_data({"conditions": {"text": made}})
    with pytest.raises(UserError, match="was made with chunks 2"):
        text.check_data({"conditions": {"text": {**made, "chunks": 2}}})
    with pytest.raises(UserError, match="was made with weights_sha256"):
        text.check_data({"conditions": {"text": {**made, "weights_sha256": "0"}}})
    with pytest.raises(UserError, match=r"features of shape \(B, 77, 16\)"):
        text({"text": cached[:, :5]})
    with pytest.raises(UserError, match="trainable text tower"):
        embedder(trainable=True)({"text": cached})


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_travels_with_a_model(embedder, tmp_path, layer):
    """Built on the meta device from what `portable` gives, then filled: the same tokens, without the weight file."""
    params = {"chunks": 2, "layer": layer, "context_dim": 8, "mask_padding": False, "prompt": "{modality}: {text}"}
    text = embedder(**params)
    replaced, files = text.portable()
    assert set(files) == {"text_model.json"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    replaced = {k: str(tmp_path / v[2:]) if isinstance(v, str) else v for k, v in replaced.items()}
    node = {"target": "ldm.conditioners.text.TextEmbedder", "params": {**params, **replaced}}
    with torch.device("meta"):
        copy = instantiate_from_config(node)
    assert set(copy.state_dict()) == set(text.state_dict())
    copy.to_empty(device="cpu")
    copy.load_state_dict(text.state_dict(), assign=True)
    (tmp_path / "text_model.json").unlink()
    copy.eval()
    batch = {"text": ["a mass", LONG], "modality": ["CT", "MRI"]}
    torch.testing.assert_close(copy(batch)["crossattn"], text(batch)["crossattn"])
    torch.testing.assert_close(copy.null()["crossattn"], text.null()["crossattn"])
    copy.check_data({})
    assert copy.describe()["text"] == text.describe()["text"]
    assert copy.describe()["text"].licence == "unknown"


def test_in_a_set_of_conditions(weights):
    params = {"model": str(CONFIG), "weights": weights}
    both = ConditionerSet(
        {
            "caption": {"target": "ldm.conditioners.text.TextEmbedder", "params": params},
            "grade": {"target": "ldm.conditioners.score.ScoreEmbedder", "params": {"dim": 8}},
        }
    )
    cond = conditions_given(both, {"text": "a tile"})
    assert cond["caption/crossattn"].shape == (1, 77, 16)
    nodes, files = both.portable()
    assert nodes["conditioners"]["caption"]["params"]["model"] == "./caption_text_model.json"
    assert set(files) == {"caption_text_model.json"}


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_missing_published_weights_say_where_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOLDM_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError) as error:
        TextEmbedder(name)
    for part in (name, REGISTRY[name].licence, REGISTRY[name].source, str(tmp_path / name)):
        assert part in str(error.value)


def test_a_published_model_builds_on_meta_without_its_weights(tmp_path, monkeypatch):
    """As when a checkpoint that holds the tower is loaded."""
    monkeypatch.setenv("HISTOLDM_WEIGHTS", str(tmp_path))
    with torch.device("meta"):
        text = TextEmbedder("clip-vit-l-14")
    assert text.tower.width == 768
    assert len(text.tower.blocks) == 12


def test_a_bert_tower_needs_transformers_and_its_files(tmp_path):
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"hf_model_name": "org/bert",
              "hf_tokenizer_name": "org/bert", "hf_proj_type": "mlp", "context_length": 256}}}  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"config\.json"):
        TextEmbedder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        TextEmbedder(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    try:
        import transformers  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install transformers"):
            TextEmbedder(str(tmp_path))


def test_a_bert_tower(tmp_path):
    """A folder as BiomedCLIP's: a BERT under `text.transformer.`, its config and its tokenizer."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "tumour", "cells", "fat", "##s"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(dict(zip(words, range(8))), unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=8, max_position_embeddings=32, **sizes)
    config.to_json_file(tmp_path / "config.json")
    about = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"hf_model_name": "org/bert", "context_length": 12}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": about}))
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    state = {f"text.transformer.{name}": value for name, value in bert.state_dict().items()}
    torch.save({**state, "text.proj.0.weight": torch.ones(3)}, tmp_path / "open_clip_pytorch_model.bin")
    text = TextEmbedder(str(tmp_path))
    ids = torch.tensor([[2, 4, 5, 6, 7, 3, *[0] * 6]])
    expected = bert(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    torch.testing.assert_close(tokens(text, "Tumour cells  fats"), expected)
    params, files = text.portable()
    assert params["tokenizer"] == "./tokenizer.json"
    assert set(files) == {"text_model.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"model": "plib"}, "did you mean 'plip'"),
        ({"model": "ViT-B-32", "weights": None}, "Nothing is downloaded"),
        ({"weights": "nowhere.bin"}, "nowhere.bin"),
        ({"layout": "both"}, "joint, separate"),
        ({"pad": "1"}, "eos, zero"),
        ({"chunks": 0}, "1 or more"),
        ({"layer": "first"}, "last, penultimate"),
        ({"prompt": "an image"}, "{text}"),
        ({"prompt": "{kind}: {text}"}, "{modality}"),
        ({"model": "ViT-B-32"}, "does not fit the text model 'ViT-B-32'"),
        ({"model": "coca_ViT-B-32"}, "`embed_cls`"),
    ],
)
def test_errors_of_a_config(weights, params, message):
    with pytest.raises(UserError) as error:
        TextEmbedder(**{"model": str(CONFIG), "weights": weights, **params})
    assert message in str(error.value)


def test_errors_of_values(embedder):
    text = embedder(prompt="{modality}: {text}")
    for values, message in (
        ({"text": "  "}, "a caption is empty"),
        ({"text": 3}, "a caption is text; got 3"),
        ({"modality": "CT"}, "a modality goes with a text"),
        ({"text": ["a", "b"], "modality": ["x", "y", "z"]}, "2 texts and 3 modalities"),
    ):
        with pytest.raises(UserError, match=message):
            text.read(values)
    with pytest.raises(UserError, match="a caption is empty"):
        text({"text": ["a", ""], "modality": ["CT", "CT"]})
    with pytest.raises(UserError, match="'modality', which the data do not give"):
        text({"text": ["a"]})
    with pytest.raises(UserError, match="empty caption"):
        text.check_data({"conditions": {"text": {"source": "text", "names": ["", "a"]}}})
    with pytest.raises(UserError, match="is frozen and has no weights"):
        TextEmbedder(str(CONFIG)).check_data({})
    TextEmbedder(str(CONFIG), trainable=True).check_data({})


def test_a_deeper_checkpoint_is_refused(clip, tmp_path):
    state = clip.state_dict()
    state |= {n.replace("resblocks.1.", "resblocks.2."): v for n, v in state.items() if "resblocks.1." in n}
    state = {n: v for n, v in state.items() if not n.startswith("visual.")}
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "deep.pt")
    with pytest.raises(UserError, match="more than its config has"):
        TextEmbedder(str(CONFIG), str(tmp_path / "deep.pt"))


@pytest.mark.parametrize(
    ("name", "parameters", "tokens", "width"),
    [
        ("latent-diffusion/pathldm_text", 400_920_579, 154, 512),
        ("latent-diffusion/minim_text", 859_520_964, 77, 768),
        ("demo/text", None, 231, 64),
    ],
)
@pytest.mark.slow
def test_configs(name, parameters, tokens, width, monkeypatch, tmp_path):
    """They are valid in any folder, and network and text tower fit each other and the published sizes."""
    monkeypatch.chdir(tmp_path)
    callbacks = {"callbacks": {name: {"target": target} for name, target in CALLBACKS.items()}}
    config = load_config([ROOT / "configs" / f"{name}.yaml"], defaults={"lightning": callbacks})
    validate(config)
    params = config["model"]["params"]
    with torch.device("meta"):
        network = instantiate_from_config(params["unet_config"])
        text = instantiate_from_config(params["cond_stage_config"])
    assert (text.length, text.tower.width) == (tokens, width)
    assert network.context_dim == width
    assert parameters in (None, sum(p.numel() for p in network.parameters()))
    assert set(config["data"]["params"]["conditions"]) == set(text.keys)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "is \\[\\], not `key: value` pairs"),
        ('{"text_cfg": {"width": 7, "heads": 2}}', "a multiple of its heads; its config has 7 and 2"),
    ],
)
def test_configs_that_are_none(tmp_path, config, message):
    (tmp_path / "m.json").write_text(config)
    with pytest.raises(UserError, match=message):
        TextEmbedder(str(tmp_path / "m.json"))
