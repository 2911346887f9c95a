"""What strangers send asks for no more memory or time than its file can hold and the machine has; the size is told."""

from __future__ import annotations

import io
import json
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from attacks import refused

from ldm import model_folder
from ldm.convert import load_model
from ldm.data.features import read_features
from ldm.data.tile_store import TileStore
from ldm.encoders.encoder import load_encoder
from ldm.encoders.feature_files import read_feature_file
from ldm.foreign.budget import afford, available
from ldm.images.slides import open_image
from ldm.interop.checkpoint import read_checkpoint
from ldm.requests.spec import load_spec
from ldm.scorers.ensemble import load_scorer
from ldm.tables.geojson import read_geojson
from ldm.tables.h5ad import read_h5ad

MODELS = Path(__file__).parents[1] / "data" / "models"
GIGABYTES = r"would take [\d.e+]+ (GB|TB|PB|EB)"


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """What an attack takes it does not get: a few gigabytes more than there are now end in a MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_memory_is_what_the_process_may_take():
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    assert 0 < available() <= limit
    refused(lambda: afford(available() * 2, "the image"), r"the image would take .* and this machine has .* left")
    afford(1000, "the image")


# --- tensors, pickles, arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_no_larger_than_their_file(tmp_path, legacy):
    path = tmp_path / "a.pt"
    torch.save({"features": torch.zeros(1, 1).expand(4_000_000, 1000)}, path, _use_new_zipfile_serialization=not legacy)
    assert path.stat().st_size < 3000
    for read in (read_features, read_checkpoint):
        assert "16 GB" in refused(lambda read=read: read(path), GIGABYTES)
    many = torch.zeros(1_000_000, 1)  # each below what is not asked about
    torch.save({f"a{i}": many.expand(1_000_000, 10) for i in range(100)}, path)
    refused(lambda: read_checkpoint(path), "would take 80 MB, and the file has 4.* MB")


def pickles() -> dict[str, bytes]:
    """Pickles that ask for what they do not hold."""
    lists = pickle.dumps([None] * 100_000, 4)[:-1] + b"q\x00"  # a list, then many copies of it
    copy = b"c__builtin__\nlist\nh\x00\x85R"
    return {
        "bytes": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
        "text": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x.",
        "bytearray": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
        "frame": b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"].",
        "number": b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b"x.",
        "memo": b"\x80\x04]r\xff\xff\xff\x7f.",
        "memo in words": b"]p4000000000\n.",
        "copies": lists + b"(" + copy * 10_000 + b"t.",
    }


@pytest.mark.parametrize("name", list(pickles()))
def test_pickles_ask_for_no_more_than_they_hold(tmp_path, name):
    data = pickles()[name]
    (tmp_path / "a.pkl").write_bytes(data)
    refused(lambda: load_spec(tmp_path / "a.pkl"), "cannot be read")
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    ends = [i + 1 for i in range(len(whole)) if whole[i : i + 1] == b"."]
    inserted = next(end for end in ends if len(pickle_at(whole, end)) == 3)  # after magic, version and system
    (tmp_path / "a.ckpt").write_bytes(whole[:inserted] + data)
    refused(lambda: read_checkpoint(tmp_path / "a.ckpt"), "cannot read")


def pickle_at(data: bytes, end: int) -> list:
    """The pickles that stand one after the other before a place; none where one of them is not whole."""
    stream, found = io.BytesIO(data[:end]), []
    try:
        while stream.tell() < end:
            found.append(pickle.load(stream))
    except Exception:
        return []
    return found


def test_arrays_are_no_larger_than_their_file(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64)
    refused(lambda: read_features(tmp_path / "a.npy"), "cannot be read as .npy")


SHAPES: dict[str, Callable[[h5py.File, str], None]] = {
    "without a chunk": lambda file, name: file.create_dataset(name, (10**9, 10**6), "f4", chunks=(1, 10**6)),
    "compressed": lambda file, name: file.create_dataset(
        name, (10**8, 1024), "f4", chunks=(256, 1024), compression="gzip"
    ),
    "wide": lambda file, name: file.create_dataset(name, (1, 4), f"S{1 << 30}", chunks=(1, 1)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_h5_arrays_are_no_larger_than_their_file(tmp_path, shape):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        SHAPES[shape](file, "features")
        file.attrs["histoldm"] = '{"extractor": "pixels"}'
    assert path.stat().st_size < 20_000
    for read in (read_features, read_feature_file):
        refused(lambda read=read: read(path), GIGABYTES)
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((2, 4), np.float32)
        file.create_dataset("coords", (10**12, 2), "i4", chunks=(1 << 16, 2))
    refused(lambda: read_features(path), GIGABYTES)
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        for axis, count in {"obs": 10**9, "var": 4}.items():
            file.create_group(axis).attrs["_index"] = "name"
            file.create_dataset(f"{axis}/name", (count,), h5py.string_dtype(), chunks=(4,))
        file["X"] = np.zeros((2, 4))
    refused(lambda: read_h5ad(tmp_path / "a.h5ad"), GIGABYTES)


def test_texts_of_an_h5_that_are_one_long_text_are_counted(tmp_path):
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w") as file:
        for axis, names in {"obs": ["x" * 1_000_000] * 3000, "var": ["G1", "G2"]}.items():
            file.create_group(axis).attrs["_index"] = "name"
            file.create_dataset(f"{axis}/name", (len(names),), h5py.string_dtype(), chunks=(len(names),))
            file[f"{axis}/name"][: min(len(names), 2)] = names[:2]
        file["X"] = np.zeros((3000, 2))
        chunk = file["obs/name"].id.read_direct_chunk((0,))[1]
        file["obs/name"].id.write_direct_chunk((0,), chunk[:16] * 3000)  # all of them are the first
    assert path.stat().st_size < 4_000_000
    refused(lambda: read_h5ad(path), "the texts of /obs/name in .* " + GIGABYTES.replace("(GB", "(MB|GB"))


# --- Zarr -----------------------------------------------------------------------------------------------------------


def described(shape: list[int], chunk: list[int], kind: str = "uint8") -> dict:
    return {
        "zarr_format": 3, "node_type": "array", "shape": shape, "data_type": kind, "fill_value": 0, "attributes": {},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "chunk", "message"),
    [
        ([10**12, 10**12], [256, 256], "would have 15\\d+ chunks of an array of shape"),
        ([10**12, 10**12], [10**12, 10**12], "a chunk of .* would take .* EB"),
        ([10**6, 10**6], [10**6, 10**6], "a chunk of .* would take .* TB"),
        ([-4, 4], [4, 4], "does not say its shape"),
        ([4, 4], [0, 4], "does not say its shape"),
    ],
)
def test_an_ome_zarr_has_no_more_chunks_than_it_can(tmp_path, shape, chunk, message):
    refused(lambda: open_image(image_of(tmp_path / "a.zarr", shape, chunk)), message)


def image_of(path: Path, shape: list[int], chunk: list[int], levels: int = 1) -> Path:
    """An OME-Zarr image of one array, which is each of its levels."""
    (path / "0").mkdir(parents=True)
    image = {"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "0"}] * levels}
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"multiscales": [image]}}}
    (path / "zarr.json").write_text(json.dumps(group))
    (path / "0" / "zarr.json").write_text(json.dumps(described(shape, chunk)))
    return path


def test_an_ome_zarr_has_no_more_levels_than_any_image(tmp_path):
    """Each is opened, which of 50,000 takes a minute."""
    path = image_of(tmp_path / "a.zarr", [4, 4], [4, 4], levels=50_000)
    refused(lambda: open_image(path), "has 50000 levels")


def test_a_tile_store_has_no_more_tiles_than_it_can(tmp_path, tiny_store):
    path = shutil.copytree(tiny_store, tmp_path / "a.zarr")
    for shape, chunk in (([10**12, 2], [1, 2]), ([10**12, 2], [10**12, 2]), ([10**15, 2], [10**6, 2])):
        (path / "coords" / "zarr.json").write_text(json.dumps(described(shape, chunk, "int32")))
        refused(lambda: TileStore.open(path).coords, "chunks of an array of shape|would take")
    (path / "coords" / "zarr.json").write_text(json.dumps(described([10**9, 2], [10**9, 2], "int32")))
    refused(lambda: TileStore.open(path).coords, "would take 16 GB")


# --- models ---------------------------------------------------------------------------------------------------------

NETWORK = {
    "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1, "image_size": 16,
    "attention_resolutions": [], "channel_mult": [1], "num_heads": 4,
}  # fmt: skip
STAGE = {"z_channels": 3, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1],
         "num_res_blocks": 1, "attn_resolutions": []}  # fmt: skip
KL = "ldm.autoencoder.autoencoder.AutoencoderKL"


def whole(unet: dict | None = None, stage: dict | None = None, cond: dict | None = None, **params: object) -> dict:
    """The node of a small diffusion model."""
    first_stage = {"target": KL, "params": {"embed_dim": 3, "ddconfig": STAGE | (stage or {})}}
    unet_config = {"target": "ldm.networks.unet.UNetModel", "params": NETWORK | (unet or {})}
    parts = {"use_ema": False, "unet_config": unet_config, "first_stage_config": first_stage}
    return {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": parts | ({"cond_stage_config": cond} if cond else {}) | params,
    }


NUMBERS: dict[str, tuple[dict, str]] = {
    "noise levels": (whole(timesteps=1e10), "timesteps is 10000000000"),
    "fewer noise levels": (whole(timesteps=900_000), "timesteps is .* a whole number from 1 to 100000; got 900000"),
    "blocks": (whole({"num_res_blocks": 10**7}), "num_res_blocks is 10000000; numbers of a model are up to 1000000"),
    "fewer blocks": (whole({"num_res_blocks": 900_000}), "describes a model of more than .* parts, and its weights"),
    "levels": (whole({"channel_mult": [1] * 50_000}), "describes a model of more than .* parts, and its weights"),
    "channels": (whole({"model_channels": 960_000}), r"describes a model of more than .* (MB|GB), and its weights are"),
    "blocks of the first stage": (whole(None, {"num_res_blocks": 900_000}), "describes a model of more than .* parts"),
    "channels of the first stage": (whole(None, {"ch": 960_000}), "describes a model of more than .* (MB|GB)"),
    "size": (whole({"image_size": 900_000}), "an image of 900000 x 900000 px by .* would take .* TB"),
    "magnifications": (
        whole(cond={"target": "ldm.conditioners.grid.GridEmbedder", "params": {"magnifications": 10**9}}),
        "magnifications is 1000000000",
    ),
    "not a number": (whole(linear_start=float("nan")), "linear_start is nan"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model_weights() -> dict[str, torch.Tensor]:
    from ldm.config import instantiate_from_config

    return instantiate_from_config(whole()).state_dict()


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_of_a_model_are_those_that_its_weights_have(tmp_path, model_weights, what):
    node, message = NUMBERS[what]
    folder = model_folder.write_model_folder(tmp_path / "model", node, model_weights, {})
    refused(lambda: load_model(folder), message)
    content = {"histoldm_config": {"model": node}, "histoldm_first_stage": node["params"]["first_stage_config"]}
    torch.save(content | {"state_dict": model_weights}, tmp_path / "a.ckpt")
    refused(lambda: load_model(tmp_path / "a.ckpt"), message)
    if "first stage" in what:
        refused(lambda: model_folder.load_first_stage(folder), message)


def test_the_model_of_these_tests_is_one(tmp_path, model_weights):
    folder = model_folder.write_model_folder(tmp_path / "model", whole(), model_weights, {})
    assert load_model(folder).tile_size == 16
    assert model_folder.load_first_stage(folder).downsampling == 1


@pytest.mark.parametrize(
    "changes", [{"depth": 900_000}, {"embed_dim": 768_000}, {"img_size": 80_000}, {"mlp_ratio": 100_000}]
)
def test_numbers_of_an_encoder_are_those_that_its_weights_have(tmp_path, changes):
    folder = shutil.copytree(MODELS / "demo-encoder", tmp_path / "encoder")
    told = yaml.safe_load((folder / "encoder.yaml").read_text())
    vit = {"arch": "vit_tiny_patch16_224", "kwargs": changes, "standardise": False}
    (folder / "encoder.yaml").write_text(yaml.safe_dump(told | vit))
    refused(lambda: load_encoder(folder), "describes a model of more than")


def test_numbers_of_a_scorer_are_those_that_its_weights_have(tmp_path):
    folder = shutil.copytree(MODELS / "demo-mitosis-scorers", tmp_path / "scorer")
    told = yaml.safe_load((folder / "config.yaml").read_text())
    for change in ({"layers": [900_000, 1, 1, 1]}, {"channels": [640_000, 64, 64, 64]}):
        told["scorer"]["kwargs"] = change
        (folder / "config.yaml").write_text(yaml.safe_dump(told))
        refused(lambda: load_scorer(folder), "describes a model of more than")


# --- outlines --------------------------------------------------------------------------------------------------------


def test_an_outline_that_crosses_itself_without_end_is_told(tmp_path):
    """To repair it takes memory for every crossing; a drawn one that crosses itself somewhere is repaired."""
    star, drawn = (
        1000 + 900 * np.stack([np.cos(angles), np.sin(angles)], -1)
        for angles in (np.arange(10_000) * 2.4, np.linspace(0, 2 * np.pi, 3000, endpoint=False))
    )
    drawn[[5, 9]] = drawn[[9, 5]]
    for corners in (star, drawn):
        shape = {"type": "Polygon", "coordinates": [[*corners.tolist(), corners[0].tolist()]]}
        (tmp_path / "a.geojson").write_text(json.dumps({"type": "Feature", "geometry": shape, "properties": {}}))
        if corners is star:
            refused(lambda: read_geojson(tmp_path / "a.geojson"), "crosses itself some .* times")
    assert read_geojson(tmp_path / "a.geojson").regions[0].shape.area == pytest.approx(900**2 * np.pi, rel=0.01)
