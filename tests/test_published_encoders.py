"""Published tile encoders: networks against the implementations they were published with, inputs against transforms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
from open_clip.timm_model import TimmModel
from PIL import Image
from published import load
from safetensors.torch import load_file
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode, v2

from ldm.encoders.encoder import Encoder, find_encoder, load_weights, token_map
from ldm.encoders.preprocessing import prepare
from ldm.encoders.registry import REGISTRY
from ldm.encoders.spec import EncoderSpec
from ldm.errors import UserError

MADE_HERE = {name: spec for name, spec in REGISTRY.items() if not spec.unloadable}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}


@pytest.fixture(scope="module")
def slide(demo_slide) -> np.ndarray:
    import openslide

    with openslide.OpenSlide(str(demo_slide)) as opened:
        return np.asarray(opened.read_region((500, 200), 0, (1024, 1024)).convert("RGB"))


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", sorted(MADE_HERE))
def test_the_architecture_has_the_dimension_and_the_tokens_of_the_table(name):
    spec = MADE_HERE[name]
    if spec.arch.startswith(("vit_", "beit3_")):  # as wide, but shallow
        spec = replace(spec, kwargs=spec.kwargs | {"depth": 1})
    with torch.device("meta"):
        encoder = Encoder(spec)
        inputs = torch.zeros(1, 3, spec.input_size, spec.input_size)
        features, tokens = encoder.with_tokens(torch.zeros(1, 3, 256, 256), 4)
        assert features.shape == (1, spec.dim)
        assert tokens.shape[:2] == (1, 16)
        assert token_map(encoder.model, encoder._raw(inputs)).shape[-2:] == (spec.tokens, spec.tokens)


def test_the_table_says_of_each_encoder_what_a_user_must_know():
    assert len(MADE_HERE) > 24
    for name, spec in REGISTRY.items():
        assert name == spec.name
        assert spec.source.startswith("https://")
        assert spec.licence
        assert spec.non_commercial or not any(word in spec.licence for word in ("NC", "non-commercial")), name
        assert spec.mpp is None or spec.mpp in (0.5, 1.0)


def test_an_encoder_that_needs_code_of_its_own_is_named_with_the_way_to_its_features():
    with pytest.raises(UserError, match=r"(?s)'genbio-pathfm' cannot be loaded here.*import_features --name genbio"):
        find_encoder("genbio-pathfm")


def test_two_poolings_of_one_network_share_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOLDM_WEIGHTS", str(tmp_path))
    (tmp_path / "virchow2").mkdir()
    (tmp_path / "virchow2" / "pytorch_model.bin").touch()
    assert find_encoder("virchow2")[1] == find_encoder("virchow2-cls")[1]
    assert REGISTRY["virchow2-cls"].dim == 1280


# ------------------------------------------------------------------------------------- networks, by published weights


def small(name: str, **changes) -> EncoderSpec:
    """A published encoder as narrow and shallow as the tests' networks, for inputs of 32 px."""
    kwargs = REGISTRY[name].kwargs | SMALL | changes.pop("kwargs", {})
    return replace(REGISTRY[name], **{"kwargs": kwargs, "dim": 32, "input_size": 32, "resize": None} | changes)


def filled(spec: EncoderSpec, path: Path) -> Encoder:
    """An encoder with the weights of a file."""
    encoder = Encoder(spec).eval()
    load_weights(encoder, path)
    return encoder


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """A network all of whose weights matter: even layer scales and biases are random."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.2)
    return network.eval()


def dinov2(kind: str, **changes) -> torch.nn.Module:
    import transformers

    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(**config | changes)
    return shaken(getattr(transformers, f"{kind}Model")(config))


SWIGLU = {"mlp_ratio": 2 * 88 / 32}  # what transformers makes of a width of 32
OF_TRANSFORMERS = {
    "phikon": (lambda: dinov2("ViT", intermediate_size=128), small("phikon"), "cls"),
    "phikon-v2": (lambda: dinov2("Dinov2"), small("phikon-v2"), "cls"),
    "dinov2 resized": (lambda: dinov2("Dinov2", image_size=56), small("dinov2-base"), "cls"),
    "midnight": (
        lambda: dinov2("Dinov2", image_size=56, use_swiglu_ffn=True),
        small("midnight-12k", dim=64, kwargs=SWIGLU), "cls+mean",
    ),
    "midnight-cls": (
        lambda: dinov2("Dinov2", use_swiglu_ffn=True), small("midnight-12k-cls", kwargs=SWIGLU), "cls"
    ),
    "hibou": (
        lambda: dinov2("Dinov2WithRegisters", use_swiglu_ffn=True), small("hibou-b", kwargs=SWIGLU), "pooler"
    ),
    "hibou resized": (
        lambda: dinov2("Dinov2WithRegisters", image_size=56, use_swiglu_ffn=True),
        small("hibou-l", kwargs=SWIGLU), "pooler",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_checkpoints_of_transformers_give_what_transformers_gives(name, tmp_path):
    make, spec, pooling = OF_TRANSFORMERS[name]
    theirs = make()
    theirs.save_pretrained(tmp_path)
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out = theirs(inputs)
        tokens = out.last_hidden_state
        expected = {"cls": tokens[:, 0], "cls+mean": torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)}
        expected["pooler"] = getattr(out, "pooler_output", None)
        ours = filled(spec, tmp_path / "model.safetensors").features(inputs)
    assert torch.allclose(ours, expected[pooling], atol=1e-5)


def test_plip_gives_what_transformers_clip_gives(tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**shape, image_size=32, patch_size=8, hidden_act="quick_gelu")
    text = CLIPTextConfig(**shape, vocab_size=20, max_position_embeddings=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    theirs = shaken(CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = filled(small("plip", head=(16,), dim=16), tmp_path / "model.safetensors").features(inputs)
        expected = theirs.get_image_features(pixel_values=inputs)
    assert torch.allclose(ours, getattr(expected, "pooler_output", expected), atol=1e-5)


def test_quiltnet_gives_what_open_clip_gives(tmp_path):
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    theirs = shaken(open_clip.CLIP(16, vision, text))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = filled(small("quiltnet-b-32", head=(16,), dim=16), tmp_path / "open_clip_pytorch_model.bin")
        assert torch.allclose(ours.features(inputs), theirs.encode_image(inputs), atol=1e-5)


def test_biomedclip_gives_what_open_clip_gives(tmp_path):
    theirs = shaken(TimmModel("vit_tiny_patch16_224", 16, pool="", proj="linear", pretrained=False))
    torch.save({f"visual.{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "model.bin")
    kwargs = REGISTRY["biomedclip"].kwargs | {"embed_dim": 192, "num_heads": 3}
    inputs = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours = filled(replace(REGISTRY["biomedclip"], head=(16,), dim=16, kwargs=kwargs), tmp_path / "model.bin")
        assert torch.allclose(ours.features(inputs), theirs(inputs), atol=1e-4)


def test_musk_conch_and_dinov2_give_what_their_own_code_gave(oracle, tmp_path):
    golden = load(oracle / "more" / "encoders.pt")
    encoders = {
        "beit3": small("musk"),
        "conch": small("conch", dim=24),
        "dinov2": small("openmidnight", arch="vit_giant_patch14_dinov2", positions="scale", input_size=48,
                        kwargs=SWIGLU | {"img_size": 48}),
    }  # fmt: skip
    for name, spec in encoders.items():
        torch.save(golden[name]["state_dict"], tmp_path / name)
        encoder = filled(spec, tmp_path / name)
        with torch.no_grad():
            raw = encoder._raw(golden[name]["x"])
            features = encoder.features(golden[name]["x"])
        expected = golden[name].get("features", golden[name].get("tokens", features)[:, 0])
        assert torch.allclose(features, expected, atol=1e-5), name
        if name == "dinov2":
            assert torch.allclose(raw[:, 1:], golden[name]["patches"], atol=1e-5)


def test_conch_v15_pools_as_titan_does(tmp_path):
    trunk = shaken(timm.create_model("vit_large_patch16_224", num_classes=0, **SMALL, init_values=1.0))
    state = {f"trunk.{key}": value for key, value in trunk.state_dict().items()}
    torch.manual_seed(2)
    norm = {f"{key}.{leaf}": torch.randn(n) for key, n in (("ln_k", 32), ("ln_q", 24)) for leaf in ("weight", "bias")}
    pool = {"query": torch.randn(1, 24), "to_q.weight": torch.randn(24, 24), "to_kv.weight": torch.randn(48, 32),
            "to_out.weight": torch.randn(24, 24), **norm}  # fmt: skip
    state |= {f"attn_pool_contrast.{key}": value for key, value in pool.items()}
    state |= {"ln_contrast.weight": torch.ones(24), "ln_contrast.bias": torch.zeros(24)}
    torch.save(state, tmp_path / "vision.bin")
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = filled(small("conch-v1.5", dim=24), tmp_path / "vision.bin").features(inputs)
        # 8 heads of 3: softmax(q k / sqrt 3) v, no biases
        layer_norm = torch.nn.functional.layer_norm
        keys = layer_norm(trunk.forward_features(inputs), (32,), pool["ln_k.weight"], pool["ln_k.bias"])
        query = layer_norm(pool["query"], (24,), pool["ln_q.weight"], pool["ln_q.bias"]) @ pool["to_q.weight"].T
        key, value = (keys @ pool["to_kv.weight"].T).chunk(2, -1)
        query, key, value = (part.unflatten(-1, (8, 3)) for part in (query, key, value))
        weights = torch.einsum("qhd,bthd->bhqt", query * 3**-0.5, key).softmax(-1)
        out = torch.einsum("bhqt,bthd->bqhd", weights, value).flatten(2)[:, 0] @ pool["to_out.weight"].T
    assert torch.allclose(ours, layer_norm(out, (24,)), atol=1e-4)


def test_keep_has_its_head_and_unit_length(tmp_path):
    trunk = shaken(timm.create_model("vit_large_patch16_224", num_classes=0, **SMALL, init_values=1e-5))
    head = shaken(torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 24)))
    state = {f"visual.{key.replace('.gamma', '.weight')}": value for key, value in trunk.state_dict().items()}
    state |= {f"visual_head.{key}": value for key, value in head.state_dict().items()}
    state |= {"text.embeddings.word_embeddings.weight": torch.zeros(3, 2), "logit_scale": torch.zeros(())}
    torch.save(state, tmp_path / "model.bin")
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = filled(small("keep", head=(24, 24), dim=24), tmp_path / "model.bin").features(inputs)
        expected = torch.nn.functional.normalize(head(trunk(inputs)), dim=1)
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(("name", "last"), [("retccl", "layer4"), ("resnet50-truncated", "layer3")])
@pytest.mark.slow
def test_resnets_give_what_torchvision_gives(name, last, tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50().eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}  # as in old files
    torch.save(state, tmp_path / "weights.pth")
    inputs, maps = torch.randn(1, 3, 64, 64), {}
    getattr(theirs, last).register_forward_hook(lambda *call: maps.update(out=call[2]))
    with torch.no_grad():
        theirs(inputs)
        ours = filled(replace(REGISTRY[name], input_size=64), tmp_path / "weights.pth").features(inputs)
    assert torch.allclose(ours, maps["out"].mean((2, 3)), atol=1e-4)


def test_dinov2_with_registers_in_metas_names(tmp_path):
    theirs = dinov2("Dinov2WithRegisters", use_swiglu_ffn=True)
    theirs.save_pretrained(tmp_path)
    state, parts = {}, ("query", "key", "value")
    names = (("patch_embeddings.projection", "patch_embed.proj"), ("embeddings.position_embeddings", "pos_embed"),
             ("embeddings.", ""), ("layernorm.", "norm."), ("encoder.layer", "blocks"),
             ("attention.output.dense", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
             ("layer_scale2.lambda1", "ls2.gamma"), ("weights_in", "w12"), ("weights_out", "w3"))  # fmt: skip
    saved = load_file(tmp_path / "model.safetensors")
    for key, value in saved.items():
        if ".attention.attention." in key:
            if ".query." in key:
                value = torch.cat([saved[key.replace("query", part)] for part in parts])
                key = key.replace("attention.attention.query", "attn.qkv")
            else:
                continue
        for old, new in names:
            key = key.replace(old, new)
        state[key] = value
    torch.save(state, tmp_path / "teacher.pt")
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = filled(small("openmidnight", kwargs=SWIGLU), tmp_path / "teacher.pt").features(inputs)
        assert torch.allclose(ours, theirs(inputs).pooler_output, atol=1e-5)


def test_a_tower_that_lacks_a_part_is_refused_by_name(tmp_path):
    torch.save({"vision_model.embeddings.class_embedding": torch.zeros(32)}, tmp_path / "part.bin")
    with pytest.raises(UserError, match=r"part\.bin is not the weight file of encoder 'plip'.*it lacks "):
        filled(small("plip", head=(16,), dim=16), tmp_path / "part.bin")


# -------------------------------------------------------------------------------------- inputs, by published transforms

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


def of_pictures(values, size=None, interpolation=BILINEAR, crop=None):
    """The usual transform of a model card."""
    resize = [] if size is None else [T.Resize(size, interpolation=interpolation), T.CenterCrop(crop or size)]
    return T.Compose([*resize, T.ToTensor(), T.Normalize(*values)])


def of_tensors(values, size, interpolation=BILINEAR):
    """torchvision's v2 on tensors, whose own integer kernel rounds differently in a few pixels."""
    resize = v2.Resize(size, interpolation=interpolation, antialias=True)
    return v2.Compose([v2.ToImage(), resize, v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(*values)])  # fmt: skip


def of_timm(arch: str, **config):
    values = dict(zip(("mean", "std"), config.pop("values")))
    config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 1.0} | values | config
    return timm.data.create_transform(**config, is_training=False)


# encoder -> its published transform; those without a resize are for tiles of their own size
TRANSFORMS = {
    **dict.fromkeys(("uni", "uni2-h", "mstar"), of_pictures(IMAGENET, 224)),
    "conch": of_pictures(OPENAI, 448, BICUBIC),
    "conch-v1.5": of_pictures(IMAGENET, 448, BILINEAR),
    **dict.fromkeys(("virchow", "virchow2", "virchow2-cls"), of_timm("vit", values=IMAGENET)),
    **dict.fromkeys(("h-optimus-0", "h-optimus-1"), of_pictures(OPTIMUS)),
    **dict.fromkeys(("h0-mini", "h0-mini-cls"), of_timm("vit", values=OPTIMUS)),
    **dict.fromkeys(("prov-gigapath", "gigapath-flash"), of_pictures(IMAGENET, 256, BICUBIC, 224)),
    "musk": T.Compose([T.Resize(384, interpolation=BICUBIC, antialias=True), T.CenterCrop((384, 384)), T.ToTensor(),
                       T.Normalize(*HALF)]),
    "keep": of_pictures(IMAGENET, 224, BICUBIC),
    "ibot-vitb16": of_pictures(IMAGENET),
    "phikon": of_pictures(IMAGENET, (224, 224), BILINEAR),
    "phikon-v2": of_pictures(IMAGENET, 224, BICUBIC),
    **dict.fromkeys(("midnight-12k", "midnight-12k-cls"), of_tensors(HALF, 224)),
    "openmidnight": of_pictures(IMAGENET, (224, 224)),
    **dict.fromkeys(("hibou-b", "hibou-l"), of_tensors(HIBOU, 224, BICUBIC)),
    "gpfm": of_pictures(IMAGENET, (224, 224), BICUBIC),
    **dict.fromkeys([f"kaiko-{name}" for name in ("vits16", "vits8", "vitb16", "vitb8", "vitl14")],
                    of_tensors(HALF, 224)),
    **dict.fromkeys(("ctranspath", "chief-ctranspath"), of_pictures(IMAGENET, 224)),
    "retccl": of_pictures(IMAGENET, 256),
    "hipt-vits16": of_pictures(HALF),
    **dict.fromkeys(("lunit-dino-vits16", "lunit-dino-vits8", "lunit-bt", "lunit-mocov2", "lunit-swav"),
                    of_pictures(LUNIT)),
    **dict.fromkeys(("plip", "quiltnet-b-32", "quiltnet-b-16", "biomedclip"), of_pictures(OPENAI, 224, BICUBIC)),
    "vitb16-imagenet": of_timm("vit", values=HALF),
    "resnet50-imagenet": of_timm("resnet", values=IMAGENET),
    "resnet50-truncated": of_pictures(IMAGENET, (224, 224)),
    **dict.fromkeys([f"dinov2-{size}" for size in ("small", "base", "large", "giant")],
                    of_pictures(IMAGENET, 256, BICUBIC, 224)),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MADE_HERE))
def test_inputs_are_those_of_the_published_transform(name, slide):
    spec, transform = MADE_HERE[name], TRANSFORMS[name]
    steps = [type(step).__name__ for step in transform.transforms]
    sizes = (224, 256, 300, 512) if "Resize" in steps else (spec.input_size,)
    for size in sizes:
        tiles = [slide[y : y + size, x : x + size] for x, y in ((0, 0), (400, 300))]
        expected = torch.stack([transform(Image.fromarray(tile)) for tile in tiles])
        images = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        apart = (prepare(images, spec) - expected).abs()
        if "ToImage" in steps:  # at most one grey level, in few pixels
            levels = (apart * torch.tensor(spec.std)[:, None, None] * 255).round()
            assert levels.max() <= 1, size
            assert (levels > 0).float().mean() < 0.05, size
        else:
            assert apart.max() < 2e-6, size


def test_resized_inputs_let_gradients_through():
    images = torch.rand(1, 3, 40, 40, requires_grad=True)
    prepare(images * 2 - 1, REGISTRY["uni"]).sum().backward()
    assert (images.grad > 0).all()
