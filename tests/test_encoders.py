from __future__ import annotations

import argparse
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from conftest import ROOT
from demo.build import pretrain_encoder
from ldm.config import load_config
from ldm.encoders import encoder as encoders
from ldm.encoders.encoder import Encoder, load_encoder
from ldm.encoders.registry import REGISTRY
from ldm.encoders.spec import EncoderSpec
from ldm.errors import UserError

DEMO = ROOT / "data" / "models" / "demo-encoder"
GLASS, TISSUE = (0, 0), (896, 512)  # level-0 x, y of a tile without and with tissue


@pytest.fixture(scope="module")
def demo():
    return load_encoder(DEMO)


@pytest.fixture(scope="module")
def slide():
    import openslide

    with openslide.OpenSlide(str(ROOT / "data" / "demo" / "CMU-1-Small-Region.svs")) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def tiles_at(slide, corners):
    return np.stack([slide[y : y + 256, x : x + 256] for x, y in corners])


def images_of(tiles):
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 127.5 - 1


TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "dynamic_img_size": True}


def tiny_spec(**changes):
    given = {"name": "tiny", "arch": "vit_small_patch16_224", "dim": 32, "kwargs": TINY, "input_size": 48}
    return EncoderSpec(**{**given, "licence": "none", "source": "made here", **changes})


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A small "published" encoder, non-commercial, for tiles of another resolution: the folder of its weights."""
    spec = tiny_spec(mpp=1.0, non_commercial=True, licence="for non-commercial purposes")
    monkeypatch.setitem(REGISTRY, "tiny", spec)
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(Encoder(spec).model.state_dict(), folder / spec.file)
    return folder


# ------------------------------------------------------------------------------------------------ the shipped encoder


def test_demo_encoder_is_deterministic_and_batch_independent(demo, slide):
    images = images_of(tiles_at(slide, [(x, y) for x in (600, 900, 1200) for y in (300, 1500)]))
    together, alone = demo(images), torch.cat([demo(image[None]) for image in images])
    assert together.shape == (6, demo.dim)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    assert torch.equal(together, demo(images))
    assert torch.allclose(together, alone, atol=2e-3)


def test_demo_encoder_tells_tissue_from_glass_and_where_it_is(demo, slide):
    glass, tissue = images_of(tiles_at(slide, [GLASS, TISSUE]))
    mixed = tissue.clone()
    mixed[..., 128:] = glass[..., 128:]
    cells = demo(torch.stack([glass, tissue, mixed, mixed.flip(-1)])).unflatten(1, (-1, 2, 2))  # (4,C,row,column)
    glass, tissue, left, right = cells

    def near(a, b):
        return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()

    assert near(glass, tissue) < 0.2
    assert near(left[..., 0], tissue[..., 0]) > near(left[..., 0], glass[..., 0]) + 0.3
    assert near(left[..., 1], glass[..., 1]) > near(left[..., 1], tissue[..., 1]) + 0.3
    assert near(right[..., 0], glass[..., 0]) > near(right[..., 0], tissue[..., 0]) + 0.1


@pytest.mark.slow
def test_demo_encoder_reaches_its_recorded_figures_on_held_out_tiles(demo):
    recorded = yaml.safe_load((DEMO / "encoder.yaml").read_text())["figures"]
    config = load_config([ROOT / "configs" / "demo" / "encoder.yaml"])
    config["images"][0]["path"] = str(ROOT / config["images"][0]["path"])
    measures = pretrain_encoder.held_out_measures(demo, config, size=162)
    assert measures["held_out_tiles"] == recorded["held_out_tiles"] > 100
    assert measures["retrieval_top1"] >= recorded["retrieval_top1"] - 0.03 > 0.8
    assert measures["tissue_r2"] >= recorded["tissue_r2"] - 0.03 > 0.8


def test_demo_encoder_features_have_unit_scale(demo, slide):
    rng = np.random.default_rng(0)
    corners = [(x, y) for x, y in zip(rng.integers(300, 1900, 64), rng.integers(0, 1600, 64), strict=True)]
    features = demo(images_of(tiles_at(slide, corners)))
    assert 0.5 < features.std(0).median() < 1.5
    assert features.abs().max() < 60000


# ---------------------------------------------------------------------------------------------------- loading weights


def test_missing_weights_say_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOLDM_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)uni/pytorch_model.bin.*huggingface.co/MahmoodLab/UNI.*CC BY-NC-ND"):
        load_encoder("uni")
    with pytest.raises(UserError, match="did you mean 'virchow2'"):
        load_encoder("virchow-2")
    with pytest.raises(UserError, match=r"has no encoder\.yaml"):
        load_encoder(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path, published):
    deeper = timm.create_model("vit_small_patch16_224", num_classes=0, **TINY | {"depth": 3, "embed_dim": 64})
    save_file(deeper.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"not the weight file of encoder 'tiny'.*unknown blocks\.2.*and \d+ more.*64"):
        load_encoder("tiny", weights=tmp_path)
    (tmp_path / "page.pth").write_text("<html>sign in</html>")
    with pytest.raises(UserError, match=r"page\.pth is a web page, not a checkpoint"):
        load_encoder("tiny", weights=tmp_path / "page.pth")


def test_folder_with_a_misspelt_key_is_refused(tmp_path):
    shutil.copytree(DEMO, tmp_path / "encoder")
    path = tmp_path / "encoder" / "encoder.yaml"
    path.write_text(path.read_text().replace("input_size:", "input_siez:"))
    with pytest.raises(UserError, match="'input_siez'; did you mean 'input_size'"):
        load_encoder(tmp_path / "encoder")


def test_dino_checkpoint_loads_by_its_prefixes(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=0, **TINY).eval()
    teacher = {f"module.backbone.{key}": value for key, value in model.state_dict().items()}
    teacher["module.head.mlp.0.weight"] = torch.zeros(3)
    path = tmp_path / "dino.pth"
    torch.save({"teacher": teacher, "student": {}, "args": argparse.Namespace(arch="vit_small"), "epoch": 3}, path)
    encoder = Encoder(tiny_spec(checkpoint_key="teacher", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))).eval()
    encoders.load_weights(encoder, path)
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    assert torch.allclose(encoder(images), model(images), atol=1e-5)
    assert torch.equal(encoder(images), encoder(images.repeat_interleave(2, 0))[::2])


def test_ctranspath_checkpoint_of_old_timm_loads(tmp_path):
    small = {"embed_dim": 32, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)}
    spec = replace(REGISTRY["ctranspath"], kwargs=REGISTRY["ctranspath"].kwargs | small, dim=256)
    encoder, loaded = Encoder(spec), Encoder(spec)
    state = {}
    for key, value in encoder.model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":  # timm 0.5.4: at the end of the stage before
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts)] = value
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / spec.file)
    encoders.load_weights(loaded, tmp_path / spec.file)
    expected = encoder.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items())


def test_pooling_orders_channels_then_cells():
    encoder = Encoder(tiny_spec(pooling="grid", grid=2, dim=128))
    tokens = torch.zeros(1, 1 + 4 * 4, 32)
    tokens[0, 1:].unflatten(0, (4, 4))[:2, 2:, 5] = 1.0  # channel 5, upper right
    pooled = encoder.pool(tokens)[0]
    assert pooled.nonzero().flatten().tolist() == [5 * 4 + 1]
    assert pooled[21] == 1
    both = Encoder(tiny_spec(pooling="token+avg", dim=64)).pool(tokens)[0]
    assert both[:32].eq(0).all()
    assert both[32 + 5] == 0.25


# --------------------------------------------------------------------------------------------------------- pre-training


def test_nt_xent_is_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    ignore = torch.zeros(3, 3, dtype=torch.bool)
    ignore[0, 2] = ignore[2, 0] = True
    z = F.normalize(torch.cat([a, b]), dim=1)
    losses = []
    for i in range(6):
        kept = [k for k in range(6) if k != i and not ignore[i % 3, k % 3]]
        others = sum(torch.exp(z[i] @ z[k] / 0.2) for k in kept)
        losses.append(-torch.log(torch.exp(z[i] @ z[(i + 3) % 6] / 0.2) / others))
    assert torch.allclose(pretrain_encoder.nt_xent(a, b, ignore, 0.2), torch.stack(losses).mean(), atol=1e-5)


def test_crops_stay_out_of_excluded_rectangles():
    pixels = np.zeros((60, 50, 3), np.uint8)
    places = pretrain_encoder.corners(pixels, 10, [(20, 30, 5, 8)])[0]
    touching = (places[:, 0] < 38) & (places[:, 0] + 10 > 30) & (places[:, 1] < 25) & (places[:, 1] + 10 > 20)
    assert len(places) == 51 * 41 - 17 * 14
    assert not touching.any()


@pytest.mark.slow
def test_pretraining_stopped_and_continued_gives_the_same_weights(tmp_path, monkeypatch):
    config = load_config([ROOT / "configs" / "demo" / "encoder.yaml"])
    config["images"] = [{"path": str(ROOT / "data/pretrain/OS-1-detail.ome.tif"), "mpp": 0.2271}]
    config["encoder"]["kwargs"]["channels"] = [8, 8, 8, 128]
    config["train"] |= {"steps": 3, "batch_size": 4, "save_every": 1, "warmup": 1}
    monkeypatch.setattr(pretrain_encoder, "set_standardisation", lambda *_: None)
    pretrain_encoder.pretrain(config, tmp_path / "straight")
    step = pretrain_encoder.training_step

    def stop_at_2(model, images, config, number, size):
        if number == 2:
            raise KeyboardInterrupt
        return step(model, images, config, number, size)

    monkeypatch.setattr(pretrain_encoder, "training_step", stop_at_2)
    with pytest.raises(KeyboardInterrupt):
        pretrain_encoder.pretrain(config, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    monkeypatch.setattr(pretrain_encoder, "training_step", step)
    pretrain_encoder.pretrain(config, tmp_path / "stopped")
    straight, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(value, stopped[key]) for key, value in straight.items())
    with pytest.raises(UserError, match="another config"):
        pretrain_encoder.pretrain({**config, "seed": 1}, tmp_path / "stopped")


def test_pretraining_refuses_a_misspelt_key(tmp_path):
    config = load_config([ROOT / "configs" / "demo" / "encoder.yaml"], ["train.stepz=3"])
    with pytest.raises(UserError, match="unknown key 'stepz' in the config's train; did you mean 'steps'"):
        pretrain_encoder.pretrain(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
