"""Sets of images, feature files and what makes features."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import h5py
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image

from ldm.data.cohort import merge_index, read_index, write_store
from ldm.data.features import read_features
from ldm.data.image_sets import images_by_name, open_images
from ldm.data.store_writers import ArrayWriter
from ldm.data.tile_store import TileStore
from ldm.encoders import inception
from ldm.encoders.clip import load_clip
from ldm.encoders.extractors import Extractor, load_extractor
from ldm.encoders.feature_files import (
    check_alike,
    extract,
    features_of_stores,
    read_feature_file,
    write_feature_file,
)
from ldm.errors import UserError
from ldm.files import owned
from ldm.images.slides import open_slide
from ldm.locks import Held

SIDE = 48


def tiles_of(slide, count=24, seed=0):
    """Tiles (count,SIDE,SIDE,3) of the demo slide."""
    rng = np.random.default_rng(seed)
    region = open_slide(slide).read(600, 400, 1024, 1024)
    corners = rng.integers(0, 1024 - SIDE, size=(count, 2))
    return np.stack([region[y : y + SIDE, x : x + SIDE] for x, y in corners])


def save(folder, images, name="{:03d}.png"):
    for i, image in enumerate(images):
        path = folder / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="module")
def tiles(demo_slide):
    return tiles_of(demo_slide)


@pytest.fixture(scope="module")
def cohort(tiles, tmp_path_factory):
    """Two slides of 12 tiles, their index with splits and classes, and features `means` (12,3)."""
    folder = tmp_path_factory.mktemp("cohort")
    for i, name in enumerate(("TCGA-AA-0001-01", "TCGA-AA-0002-01")):
        own = tiles[12 * i : 12 * i + 12]
        coords = np.stack([np.arange(12) * 300, np.full(12, 10)], 1)
        store = write_store(folder, name, own.__getitem__, 12, attrs={"tile_size": SIDE, "mpp": 0.5}, coords=coords)
        split = np.where(np.arange(12) < 8, "train", "test")
        merge_index(folder, pd.DataFrame({"slide": name, "row": range(12), "split": split, "class": "AB"[i]}))
        about = {"encoder": "means", "weights_sha256": "a" * 64}
        with ArrayWriter(store.path, "features/means", (3,), "f2", about) as writer:
            writer.append(own.mean((1, 2)))
    return folder


def test_a_cohort_knows_whose_its_images_are(cohort, tiles):
    images = open_images(cohort, {"split": "test"})
    assert len(images) == 8
    assert np.array_equal(images.read(0), tiles[8])
    assert images.about["patients"] == images.about["slides"] == 2
    assert images.about["splits"] == {"test": 8}
    assert images.table["patient"].tolist() == ["TCGA-AA-0001"] * 4 + ["TCGA-AA-0002"] * 4
    assert images.table["block"].nunique() > 2
    assert images.about["listing_sha256"] != open_images(cohort, {"split": "train"}).about["listing_sha256"]


def test_a_folder_gives_classes_and_patients_by_name(tiles, tmp_path):
    save(tmp_path / "a", tiles[:3], "TCGA-AA-000{}-01.png")
    save(tmp_path / "b", tiles[3:5], "TCGA-AA-000{}-02.png")
    images = open_images(tmp_path)
    assert images.table["class"].tolist() == ["a", "a", "a", "b", "b"]
    assert images.table["patient"].nunique() == 3
    assert sorted(images_by_name(tmp_path)) == [f"a/TCGA-AA-000{i}-01" for i in range(3)] + [
        f"b/TCGA-AA-000{i}-02" for i in range(2)
    ]


def test_a_large_image_is_its_crops(tiles, tmp_path):
    big = tiles[:6].reshape(2, 3, SIDE, SIDE, 3).swapaxes(1, 2).reshape(2 * SIDE, 3 * SIDE, 3)
    Image.fromarray(np.pad(big, ((0, 7), (0, 5), (0, 0)))).save(tmp_path / "big.png")
    images = open_images(tmp_path / "big.png", crop=SIDE)
    assert len(images) == 6
    assert all(np.array_equal(images.read(i), tiles[i]) for i in range(6))
    with pytest.raises(UserError, match="smaller than crops of 256 px"):
        open_images(tmp_path / "big.png")


def test_crops_are_alike_whatever_they_were_cut_from(tiles, tmp_path):
    folder = save(tmp_path / "mixed", [tiles[0], np.pad(tiles[1], ((0, 9), (0, 5), (0, 0)))])
    images = open_images(folder, crop=40)
    assert len(images) == 2  # one of each
    assert images.about["size"] == [40, 40]


def test_stores_of_other_tile_sizes_are_told(tiles, tmp_path):
    for name, side in (("a", SIDE), ("b", SIDE // 2)):
        write_store(tmp_path, name, tiles[:3, :side, :side].__getitem__, 3, attrs={"tile_size": side, "mpp": 0.5})
    with pytest.raises(UserError, match=r"2 sizes: 48 x 48 px \(3, as a row 0\), 24 x 24 px"):
        open_images(tmp_path)


def test_bad_folders_are_told(tiles, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in"):
        open_images(tmp_path / "empty")
    mixed = save(tmp_path / "mixed", [*tiles[:3], tiles[3][:20, :30]])
    with pytest.raises(UserError, match=r"2 sizes: 48 x 48 px \(3, as 000.png\), 30 x 20 px \(1, as 003.png\)"):
        open_images(mixed)
    resized = open_images(mixed, side=32)
    assert resized.read(3).shape == (32, 32, 3)
    broken = save(tmp_path / "broken", tiles[:2])
    (broken / "001.png").write_bytes((broken / "001.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"001.png cannot be read"):
        [open_images(broken).read(i) for i in range(2)]
    grey = save(tmp_path / "grey", [*tiles[:2], tiles[2].mean(-1).astype(np.uint8)])
    assert "1 of 3 images" in open_images(grey).warnings[0]


def counting(extractor):
    """An extractor that tells how many images it has seen, and may stop."""
    seen = []

    def network(images):
        if len(seen) == counting.stop:
            raise KeyboardInterrupt
        seen.append(len(images))
        return extractor.network(images)

    return replace(extractor, network=network), seen


def test_features_are_written_once_and_gone_on_with(tiles, tmp_path):
    images = open_images(save(tmp_path / "tiles", tiles))
    extractor, seen = counting(load_extractor("pixels"))
    counting.stop = 2
    with pytest.raises(KeyboardInterrupt):
        extract(images, extractor, tmp_path / "f.h5", batch_size=5)
    assert seen == [5, 5]
    assert not (tmp_path / "f.h5").exists()
    counting.stop = None
    features = extract(images, extractor, tmp_path / "f.h5", batch_size=5)
    assert sum(seen) == len(tiles) == len(features)
    assert np.array_equal(features.values, extractor.network(torch.from_numpy(tiles)).numpy())
    assert extract(images, extractor, tmp_path / "f.h5", batch_size=7).table.equals(features.table)
    assert sum(seen) == 2 * len(tiles)  # by the line before the last only
    assert [path.name for path in tmp_path.iterdir() if path.name != "tiles"] == ["f.h5"]
    again = extract(images, extractor, tmp_path / "g.h5")
    assert again.about["data"]["pixels_sha256"] == features.about["data"]["pixels_sha256"]
    assert again.about["extractor"] == "pixels"
    assert np.array_equal(read_features(tmp_path / "f.h5").values, features.values)  # for other commands


def test_changed_images_are_extracted_anew(tiles, tmp_path):
    folder = save(tmp_path / "tiles", tiles)
    counting.stop = None
    extractor, seen = counting(load_extractor("pixels"))
    before = extract(open_images(folder), extractor, tmp_path / "f.h5")
    Image.fromarray(tiles[1]).save(folder / "000.png", compress_level=1)
    after = extract(open_images(folder), extractor, tmp_path / "f.h5")
    assert len(seen) == 2
    assert before.digest[0] != after.digest[0] == after.digest[1]


def test_what_is_not_the_same_content_is_extracted_anew_whatever_its_size_and_time(tiles, tmp_path):
    counting.stop = None
    extractor, seen = counting(load_extractor("pixels"))
    folder = tmp_path / "tiles"
    folder.mkdir()
    for i, image in enumerate(tiles):
        Image.fromarray(image).save(folder / f"{i:03d}.bmp")
    before = extract(open_images(folder), extractor, tmp_path / "f.h5")
    known = (folder / "000.bmp").stat()
    Image.fromarray(tiles[1]).save(folder / "000.bmp")
    os.utime(folder / "000.bmp", ns=(known.st_atime_ns, known.st_mtime_ns))
    assert (folder / "000.bmp").stat().st_size == known.st_size
    after = extract(open_images(folder), extractor, tmp_path / "f.h5")
    assert len(seen) == 2
    assert np.array_equal(after.values[0], before.values[1])
    found = []
    for name, images in (("one", tiles[:4]), ("two", tiles[[1, 1, 2, 3]])):  # stores that say the same of themselves
        path = tmp_path / name / "cohort"
        write_store(path, "S", images.__getitem__, 4, attrs={"tile_size": SIDE})
        merge_index(path, pd.DataFrame({"slide": "S", "row": range(4)}))
        found.append(extract(open_images(path), extractor, tmp_path / "g.h5"))
    assert len(seen) == 4
    first, second = found
    assert (first.digest[0] == second.digest[0], first.digest[1] == second.digest[0]) == (False, True)


def test_the_same_content_elsewhere_is_not_extracted_again_and_is_told_as_it_is_now(cohort, tmp_path):
    counting.stop = None
    extractor, seen = counting(load_extractor("pixels"))
    before = extract(open_images(cohort), extractor, tmp_path / "f.h5")
    shutil.copytree(cohort, tmp_path / "moved")
    index = read_index(tmp_path / "moved")
    merge_index(tmp_path / "moved", index.assign(**{"class": "Z", "patient": "P"}))
    after = extract(open_images(tmp_path / "moved"), extractor, tmp_path / "f.h5")
    assert len(seen) == 1
    assert np.array_equal(before.values, after.values)
    assert set(after.table["class"]) == {"Z"}
    assert set(after.table["patient"]) == {"P"}
    assert after.about["data"]["path"] == "moved"


def test_a_damaged_feature_file_is_made_anew_or_refused(tiles, tmp_path, capsys):
    counting.stop = None
    extractor, seen = counting(load_extractor("pixels"))
    images = open_images(save(tmp_path / "tiles", tiles))
    whole = extract(images, extractor, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        file["features"][3, 5] += 1
    with pytest.raises(UserError, match=r"read as \.h5: it is not as it was written; extract its features again"):
        read_feature_file(tmp_path / "f.h5")
    assert np.array_equal(extract(images, extractor, tmp_path / "f.h5").values, whole.values)
    assert "They are made anew" in capsys.readouterr().err
    written = (tmp_path / "f.h5").read_bytes()
    for size in (0, 10, len(written) // 2, len(written) - 1):
        (tmp_path / "f.h5").write_bytes(written[:size])
        assert np.array_equal(extract(images, extractor, tmp_path / "f.h5").values, whole.values)
    assert len(seen) == 6


def test_one_run_at_a_time_extracts(tiles, tmp_path):
    images = open_images(save(tmp_path / "tiles", tiles))
    with owned(tmp_path / "f.h5", beside=True), pytest.raises(Held, match=r"f.h5 is being written by process"):
        extract(images, load_extractor("pixels"), tmp_path / "f.h5")


def test_features_of_stores_and_those_of_other_makers(cohort, tiles, tmp_path):
    features = features_of_stores(cohort, "means", {"split": "test"})
    expected = np.concatenate([tiles[8:12], tiles[20:24]]).mean((1, 2))
    assert np.allclose(features.values, expected, rtol=1e-3)
    assert features.about["weights_sha256"] == "a" * 64
    other = replace(features, about={**features.about, "weights_sha256": "b" * 64})
    with pytest.raises(UserError, match="different extractors: weights_sha256"):
        check_alike(features, other)
    np.save(tmp_path / "x.npy", np.zeros((5, 4), np.float32))
    with pytest.raises(UserError, match=r"dimension 3, x.npy of 4"):
        check_alike(features, read_feature_file(tmp_path / "x.npy"))
    np.save(tmp_path / "y.npy", np.zeros((5, 3), np.float32))
    check_alike(features, read_feature_file(tmp_path / "y.npy"))  # nothing is known of its maker
    assert TileStore.open(next((cohort / "slides").iterdir())).feature_names == ["means"]


def test_values_that_are_not_finite_are_refused(tiles, tmp_path):
    bad = Extractor("bad", 2, lambda images: torch.full((len(images), 2), torch.nan), {"extractor": "bad"})
    with pytest.raises(UserError, match="bad gives values that are not finite"):
        extract(open_images(save(tmp_path / "tiles", tiles)), bad, tmp_path / "f.h5")
    features = extract(open_images(tmp_path / "tiles"), load_extractor("pixels"), tmp_path / "g.h5")
    features.values[2, 5] = np.nan
    write_feature_file(tmp_path / "g.h5", features)
    with pytest.raises(UserError, match=r"1 of 24 features of .*g.h5 are NaN or infinite"):
        read_feature_file(tmp_path / "g.h5")
    (tmp_path / "broken.h5").write_bytes(b"no file")
    with pytest.raises(UserError, match=r"cannot be read as \.h5"):
        read_feature_file(tmp_path / "broken.h5")


# ---------------------------------------------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights under the published names, whose activations neither vanish nor grow."""
    torch.manual_seed(0)
    network = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("inception") / inception.FILE
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_is_the_one_of_torch_fidelity(inception_weights):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(inception_weights))
    images = torch.randint(0, 256, (1, 90, 120, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
    expected = theirs(images.permute(0, 3, 1, 2))[0]
    ours = load_extractor("inception", inception_weights, resize="tensorflow")
    assert ours.dim == 2048
    assert np.allclose(ours(images.numpy()), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    assert ours.about["resize"] == "tensorflow"


def test_inception_resizes_as_clean_fid():
    resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    for side in (64, 512):
        image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        ours = inception.clean_resize(torch.from_numpy(image)[None])[0].numpy()
        assert np.allclose(np.moveaxis(ours, 0, -1), np.clip(resize(image), 0, 255), atol=1e-3)


def test_missing_weights_of_inception_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOLDM_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)not at .*inception.*https://.*Apache-2.0.*put\s+it there"):
        load_extractor("inception")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is not pt_inception"):
        load_extractor("inception", tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"'incepton' is no extractor.*did you mean 'inception'"):
        load_extractor("incepton")


# --------------------------------------------------------------------------------------------------------------- CLIP


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    "quick_gelu": True,
}


def test_clip_is_that_of_transformers_and_of_open_clip(tiles, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    both = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**both, projection_dim=16)).eval()
    torch.save(theirs.state_dict(), tmp_path / "clip.bin")
    ours = load_clip("tiny", CLIP, tmp_path / "clip.bin")
    inputs = torch.from_numpy(tiles[:3, :32, :32]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        expected = theirs.get_image_features(pixel_values=(inputs - mean) / std)
    expected = torch.nn.functional.normalize(getattr(expected, "pooler_output", expected), dim=1)
    assert np.allclose(ours(tiles[:3, :32, :32]), expected, atol=1e-4)


@pytest.mark.slow
def test_clip_scores_images_and_words_in_one_space(tiles, tmp_path):
    torch.manual_seed(0)
    network = open_clip.model.CLIP(16, CLIP["vision_cfg"], CLIP["text_cfg"], quick_gelu=True)
    torch.save(network.state_dict(), tmp_path / "clip.pt")
    extractor = load_clip("tiny", CLIP, tmp_path / "clip.pt")
    images, words = extractor(tiles[:4]), extractor.words(["tumour", "normal tissue"])
    assert images.shape == (4, 16)
    assert np.allclose(np.linalg.norm(images, axis=1), 1, atol=1e-4)
    assert np.allclose(np.linalg.norm(words, axis=1), 1, atol=1e-4)
    state = network.state_dict()
    del state["visual.proj"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"visual.proj is missing"):
        load_clip("tiny", CLIP, tmp_path / "part.pt")


def test_a_feature_file_says_how_it_was_made(tiles, tmp_path):
    images = open_images(save(tmp_path / "tiles", tiles[:4]))
    extract(images, load_extractor("pixels"), tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5") as file:
        about = json.loads(file.attrs["histoldm"])
    assert about["data"]["count"] == 4
    assert about["extractor"] == "pixels"
    assert len(about["data"]["pixels_sha256"]) == 64
