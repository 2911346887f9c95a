"""Features of stores: by encoders known by name, folders, timm models and callables; patch tokens; batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms as T

from conftest import ROOT
from data_prep import extract_features
from ldm.conditioners.grid import GridTokens
from ldm.conditioners.ssl import PatchEmbedder
from ldm.data import dihedral
from ldm.data.datasets import TileDataset
from ldm.data.features import read_features
from ldm.data.store_writers import TileStoreWriter
from ldm.data.tile_store import TileStore
from ldm.encoders.encoder import Encoder, load_encoder
from ldm.encoders.own import state_sha256
from ldm.encoders.registry import REGISTRY
from ldm.encoders.spec import EncoderSpec
from ldm.errors import UserError

DEMO = ROOT / "data" / "models" / "demo-encoder"
GLASS, TISSUE = (0, 0), (896, 512)  # level-0 x, y of a tile without and with tissue
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 48, "dynamic_img_size": True}


@pytest.fixture(scope="module")
def demo():
    return load_encoder(DEMO)


@pytest.fixture(scope="module")
def slide(demo_slide):
    import openslide

    with openslide.OpenSlide(str(demo_slide)) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def tiles_at(slide, corners):
    return np.stack([slide[y : y + 256, x : x + 256] for x, y in corners])


def images_of(tiles):
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture
def published(monkeypatch, tmp_path) -> Path:
    """A small "published" encoder, non-commercial, for tiles of another resolution: the folder of its weights."""
    spec = EncoderSpec(
        name="tiny", arch="vit_small_patch16_224", dim=32, kwargs=TINY, input_size=48, mpp=1.0, source="made here",
        non_commercial=True, licence="for non-commercial purposes",
    )  # fmt: skip
    monkeypatch.setitem(REGISTRY, "tiny", spec)
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(Encoder(spec).model.state_dict(), folder / spec.file)
    return folder


@pytest.fixture
def store(tmp_path, slide):
    corners = np.array([GLASS, TISSUE, (1200, 900), (1200, 1400), (700, 2000)])
    path = tmp_path / "cmu.zarr"
    attrs = {"slide": "cmu.svs", "mpp": 0.499, "tile_size": 256, "stride": 256, "level0_size": [2220, 2967],
             "downsample": 1.0}  # fmt: skip
    with TileStoreWriter.create(path, len(corners), attrs) as writer:
        writer.append(tiles_at(slide, corners), corners)
    return path


def test_features_are_written_with_their_provenance(store, demo):
    extract_features.main(["--store", str(store), "--encoder", str(DEMO), "--batch-size", "2", "--device", "cpu"])
    opened = TileStore.open(store)
    features = opened.features("demo-encoder")
    expected = demo(images_of(np.asarray(opened.tiles[:])))
    assert np.allclose(features[:], expected, atol=2e-2)
    attrs = dict(features.attrs)
    assert attrs["licence"] == demo.licence
    assert attrs["preprocessing"]["input_size"] == demo.spec.input_size
    assert len(attrs["weights_sha256"]) == 64
    assert attrs["non_commercial"] is False


def test_dihedral_features_are_those_of_the_turned_tiles(store, demo):
    extract_features.extract([TileStore.open(store)], DEMO, batch_size=3, device="cpu", with_dihedral=True)
    opened = TileStore.open(store)
    features = opened.features("demo-encoder")
    assert features.shape == (5, 8, demo.dim)
    assert features.attrs["dihedral"] is True
    for k in (0, 3, 6):
        turned = dihedral.apply(images_of(opened.tile(1)[None]), k)
        assert np.allclose(features[1, k], demo(turned)[0], atol=2e-2)


def test_features_go_on_after_an_interruption(store, demo, monkeypatch):
    encode, calls = extract_features.each_variant, []

    def stop_later(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(extract_features, "each_variant", stop_later)
    with pytest.raises(KeyboardInterrupt):
        extract_features.extract([TileStore.open(store)], DEMO, batch_size=2, device="cpu")
    assert TileStore.open(store).feature_names == []
    extract_features.extract([TileStore.open(store)], DEMO, batch_size=2, device="cpu")
    opened = TileStore.open(store)
    assert np.allclose(opened.features("demo-encoder")[:], demo(images_of(np.asarray(opened.tiles[:]))), atol=2e-2)


def test_another_resolution_is_refused_before_work(store, published):
    with pytest.raises(UserError, match="--any-mpp"):
        extract_features.extract([TileStore.open(store)], "tiny", published, device="cpu")
    assert TileStore.open(store).feature_names == []


def test_non_commercial_licence_is_said_and_recorded(store, published, capsys):
    extract_features.extract([TileStore.open(store)], "tiny", published, device="cpu", any_mpp=True)
    assert "non-commercial" in capsys.readouterr().err
    assert TileStore.open(store).features("tiny").attrs["non_commercial"] is True


@pytest.mark.parametrize("batch_size", [1, 7])
def test_rows_do_not_depend_on_the_batch(store, batch_size):
    stores = [TileStore.open(store)]
    for name, size in (("own", batch_size), ("all", 16)):
        extract_features.extract(stores, DEMO, batch_size=size, device="cpu", name=name)
    opened = TileStore.open(store)
    assert np.array_equal(opened.features("own")[:], opened.features("all")[:])


# ------------------------------------------------------------------------------------------------ encoders of one's own


def pooled(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def test_a_callable_gets_images_and_says_what_it_is(store):
    name = extract_features.extract([TileStore.open(store)], pooled, name="colours", batch_size=2, device="cpu")
    array = TileStore.open(store).features(name)
    assert np.allclose(array[:], pooled(images_of(np.asarray(TileStore.open(store).tiles[:]))), atol=1e-3)
    attrs = dict(array.attrs)
    assert attrs["encoder"] == "colours"
    assert attrs["dim"] == 6
    assert attrs["source"] == "test_extract_features.pooled"
    assert attrs["preprocessing"] == "none: images (B,3,H,W) in [-1, 1]"
    assert "weights_sha256" not in attrs


def test_a_callable_gets_what_its_transform_makes_of_pictures(store):
    transform = T.Compose([T.Resize(32), T.ToTensor(), T.Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))])
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    extract_features.extract(
        [TileStore.open(store)], network, name="mine", transform=transform, device="cpu", with_dihedral=True,
        licence="MIT",
    )  # fmt: skip
    opened = TileStore.open(store)
    array = opened.features("mine")
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(opened.tile(1))))  # variant 1: a quarter turn
    with torch.no_grad():
        assert np.allclose(array[1, 1], network(transform(turned)[None])[0], atol=2e-3)
    assert array.attrs["weights_sha256"] == state_sha256(network)
    assert array.attrs["licence"] == "MIT"
    assert "Resize(size=32" in array.attrs["preprocessing"]
    with torch.no_grad():
        network[0].weight.add_(1)
    with pytest.raises(UserError, match="weights_sha256 was"):
        extract_features.extract(
            [opened], network, name="mine", transform=transform, with_dihedral=True, device="cpu", licence="MIT"
        )


def test_a_timm_model_brings_the_transform_of_its_weights(store, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "resnet10t.safetensors")
    words = ["--store", str(store), "--encoder", "timm:resnet10t", "--device", "cpu", "--licence", "Apache-2.0"]
    extract_features.main([*words, "--weights", str(tmp_path / "resnet10t.safetensors"), "--tokens", "2"])
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    opened = TileStore.open(store)
    inputs = torch.stack([transform(Image.fromarray(opened.tile(row))) for row in range(5)])
    with torch.no_grad():
        maps = model.forward_features(inputs)
    array = opened.features("resnet10t")
    assert np.allclose(array[:], maps.mean((2, 3)), atol=2e-2)
    assert "Resize(size=" in array.attrs["preprocessing"]
    assert array.attrs["source"] == "timm:resnet10t"
    tokens = opened.features("resnet10t-tokens2", tokens=True)
    assert np.allclose(tokens[:], torch.nn.functional.adaptive_avg_pool2d(maps, 2).flatten(2).mT, atol=2e-2)
    model.reset_classifier(0)
    extract_features.extract([opened], model, name="resnet10t", licence="Apache-2.0", device="cpu")  # the same: skipped


def test_an_encoder_that_is_loaded_already_says_the_same_of_itself(store, demo):
    stores = [TileStore.open(store)]
    extract_features.extract(stores, DEMO, device="cpu")
    extract_features.extract(stores, demo, device="cpu")  # which finds that it is done
    extract_features.extract(stores, demo, device="cpu", name="again")
    named, again = (stores[0].features(name) for name in ("demo-encoder", "again"))
    assert dict(named.attrs) == dict(again.attrs)
    assert np.array_equal(named[:], again[:])


REFUSED = {
    "no name": (lambda: pooled, {}, "give the features of your own encoder a name"),
    "no such model": (lambda: "timm:resnet10", {}, "did you mean 'resnet10t'"),
    "no weights": (lambda: "timm:resnet10t", {}, "nothing is downloaded"),
    "no pooling": (lambda: lambda images: images, {"name": "all"}, r"gives a tensor of shape \(1, 3, 256, 256\)"),
    "no tensor": (lambda: lambda images: None, {"name": "all"}, "gives NoneType for 1 images"),
    "no callable": (lambda: 3, {"name": "all"}, "an encoder is a name"),
    "tokens of a callable": (lambda: pooled, {"name": "all", "tokens": 4}, "patch tokens are taken from"),
    "licence of a name": (lambda: DEMO, {"licence": "mine"}, "the licence of encoder 'demo-encoder' is known, MIT"),
    "transform of a name": (lambda: DEMO, {"transform": T.ToTensor()}, "has its own transform"),
    "too many tokens": (lambda: DEMO, {"tokens": 5}, "has 4 x 4 patch tokens; pool them to 1 to 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_told_before_anything_is_written(store, case):
    make, settings, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        extract_features.extract([TileStore.open(store)], make(), device="cpu", **settings)
    assert not list((store / "features").glob("[!z]*"))


# --------------------------------------------------------------------------------------------------------- patch tokens


@pytest.fixture
def with_tokens(store, published) -> Path:
    extract_features.extract([TileStore.open(store)], "tiny", published, device="cpu", any_mpp=True, tokens=3)
    return store


def test_patch_tokens_are_the_means_of_parts_of_the_tile_row_by_row(with_tokens, published):
    encoder, opened = load_encoder("tiny", published), TileStore.open(with_tokens)
    tokens = opened.features("tiny-tokens3", tokens=True)
    assert tokens.shape == (5, 9, 32)
    assert tokens.dtype == np.float16
    assert tokens.attrs["tokens"] == 3
    inputs = encoder._inputs(images_of(opened.tile(2)[None]))
    with torch.no_grad():
        grid = encoder.model.forward_features(inputs)[0, 1:].unflatten(0, (3, 3))  # 48 px of 16 px patches
    assert np.allclose(tokens[2].reshape(3, 3, 32), grid, atol=1e-2)
    assert np.allclose(opened.features("tiny")[:], encoder(images_of(np.asarray(opened.tiles[:]))), atol=1e-2)


def test_turned_tiles_have_tokens_of_their_own(store, published):
    extract_features.extract(
        [TileStore.open(store)], "tiny", published, device="cpu", any_mpp=True, tokens=3, with_dihedral=True
    )
    encoder, opened = load_encoder("tiny", published), TileStore.open(store)
    tokens = opened.features("tiny-tokens3", tokens=True)
    assert tokens.shape == (5, 8, 9, 32)
    for k in (0, 3, 6):
        turned = dihedral.apply(images_of(opened.tile(1)[None]), k)
        assert np.allclose(tokens[1, k], encoder.with_tokens(turned, 3)[1][0], atol=1e-2)


def test_tokens_are_made_beside_features_that_are_there(with_tokens, published):
    before = TileStore.open(with_tokens).features("tiny")[:]
    extract_features.extract([TileStore.open(with_tokens)], "tiny", published, device="cpu", any_mpp=True, tokens=1)
    opened = TileStore.open(with_tokens)
    assert opened.features("tiny-tokens1", tokens=True).shape == (5, 1, 32)
    assert np.array_equal(opened.features("tiny")[:], before)


def test_tokens_and_features_of_which_one_is_further_go_on_together(store, published, monkeypatch):
    encode, calls = extract_features.each_variant, []

    def stop_later(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*arguments)

    settings = {"weights": published, "device": "cpu", "any_mpp": True, "batch_size": 2}
    monkeypatch.setattr(extract_features, "each_variant", stop_later)
    with pytest.raises(KeyboardInterrupt):
        extract_features.extract([TileStore.open(store)], "tiny", **settings)  # two rows of features, none of tokens
    monkeypatch.setattr(extract_features, "each_variant", encode)
    extract_features.extract([TileStore.open(store)], "tiny", **settings, tokens=3)
    opened, encoder = TileStore.open(store), load_encoder("tiny", published)
    features, tokens = encoder.with_tokens(images_of(np.asarray(opened.tiles[:])), 3)
    assert np.allclose(opened.features("tiny")[:], features, atol=1e-2)
    assert np.allclose(opened.features("tiny-tokens3", tokens=True)[:], tokens, atol=1e-2)


def test_readers_of_one_feature_per_tile_refuse_tokens_by_name(with_tokens):
    opened = TileStore.open(with_tokens)
    assert opened.feature_names == ["tiny"]
    assert read_features(with_tokens).values.shape == (5, 32)
    for reader in (
        lambda: opened.features("tiny-tokens3"),
        lambda: read_features(with_tokens, "tiny-tokens3"),
        lambda: opened.grid(None, "tiny-tokens3"),
        lambda: TileDataset([str(with_tokens)], ("ssl",), feature="tiny-tokens3"),
    ):
        with pytest.raises(UserError, match="tiny-tokens3 holds 3 x 3 patch tokens of each tile"):
            reader()
    tokens = TileDataset([str(with_tokens)], ("image",), conditions={"ssl": "features/tiny-tokens3"})
    with pytest.raises(UserError, match=r"patch tokens of encoder 'tiny': .*GridTokens takes them"):
        PatchEmbedder(32).check_data(tokens.metadata)


@pytest.mark.parametrize("turned_by_encoder", [False, True])
def test_a_model_takes_patch_tokens_as_context_and_they_turn_with_the_tile(store, published, turned_by_encoder):
    settings = {"weights": published, "device": "cpu", "any_mpp": True, "tokens": 3}
    extract_features.extract([TileStore.open(store)], "tiny", **settings, with_dihedral=turned_by_encoder)
    dataset = TileDataset([str(store)], ("image",), conditions={"ssl": "features/tiny-tokens3"}, dihedral=True)
    plain, turned = dataset[1], dataset[1, 6]  # variant 6: a flip and a half turn
    assert torch.equal(turned["image"], dihedral.apply(plain["image"], 6))
    encoder = load_encoder("tiny", published)
    for item, image in ((plain, plain["image"]), (turned, turned["image"])):
        tokens = encoder.with_tokens(image[None], 3)[1][0].T.unflatten(1, (3, 3))  # (D,row,column)
        if item is plain or turned_by_encoder:
            assert torch.allclose(item["ssl"], tokens, atol=1e-2)
        else:
            assert torch.equal(item["ssl"], dihedral.apply(plain["ssl"], 6))
    conditioner = GridTokens(32, context_dim=24, grid=3).eval()
    conditioner.check_data(dataset.metadata)
    cond = conditioner({"ssl": torch.stack([plain["ssl"], turned["ssl"]])})
    assert cond["crossattn"].shape == (2, 9, 24)
    with pytest.raises(UserError, match="with 32 values, but the conditioner's embed_dim is 36"):
        GridTokens(36, context_dim=24).check_data(dataset.metadata)


def test_an_encoder_of_ones_own_is_resolved_once(store):
    own = extract_features.resolve(lambda images: images.mean((2, 3)), name="colours")
    assert extract_features.extract([TileStore.open(store)], own, device="cpu", licence="CC0") == "colours"
