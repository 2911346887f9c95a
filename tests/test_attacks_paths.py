"""What strangers send names nothing outside its own folder: by absolute paths, by `..`, by links."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from attacks import NODE, SECRET, model_of, refused
from safetensors.torch import save_file
from torch import nn

from ldm import model_folder
from ldm.conditioners.text_towers import BertTower
from ldm.convert import convert, export_as, load_model, read_published
from ldm.data.features import read_features
from ldm.data.slide_files import find_slide_files
from ldm.data.tile_store import TileStore
from ldm.encoders.encoder import load_encoder
from ldm.encoders.feature_files import read_feature_file
from ldm.encoders.feature_map import Transport, load_transport, save_transport
from ldm.encoders.text_models import find_tower
from ldm.images.marks import read_mark
from ldm.images.slides import open_image
from ldm.images.write import save_ome_zarr
from ldm.scorers.ensemble import load_scorer
from ldm.tables.h5ad import read_h5ad

MODELS = Path(__file__).parents[1] / "data" / "models"
OUTSIDE = "lies outside of the folder|is no file of the folder"


@pytest.fixture
def secret(tmp_path, monkeypatch) -> Path:
    """A file of the user's, beside the folder of a stranger's, in the folder where the user works."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.txt").write_text(f"{SECRET}\nsecond\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HISTOLDM_TEST_TOKEN", SECRET)
    return tmp_path / "private" / "secret.txt"


def ways_to(file: Path, folder: Path) -> list[str]:
    """How a config in `folder` may name a file outside; a link of the same name is laid in the folder."""
    (folder / "link.txt").symlink_to(file)
    return [str(file), os.path.relpath(file), os.path.relpath(file, folder), f"./{os.path.relpath(file, folder)}",
            "./link.txt", str(folder / "link.txt"), "/proc/self/environ"]  # fmt: skip


# --- model folders --------------------------------------------------------------------------------------------------

LATENT = {
    "use_ema": False,
    "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": {
        "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1, "image_size": 16,
        "attention_resolutions": [], "channel_mult": [1], "num_heads": 4}},
    "first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"},
}  # fmt: skip
NAMING: dict[str, Callable[[str], dict]] = {  # a node whose parameter names a file
    "genes": lambda path: node("ldm.conditioners.omics.OmicsEmbedder", dim=8, mutation_genes=path),
    "gene sets": lambda path: node(
        "ldm.conditioners.omics.GeneSetEmbedder", dim=8, gene_sets=path, mutation_genes=["TP53", "EGFR"]
    ),
    "text model": lambda path: node("ldm.conditioners.text.TextEmbedder", model=f"{path}.json"),
    "text model's folder": lambda path: node("ldm.conditioners.text.TextEmbedder", model=str(Path(path).parent)),
    "codes": lambda path: node("ldm.autoencoder.taming.VectorQuantizer", n_e=4, e_dim=2, remap=path),
    "weights to start from": lambda path: node("ldm.latent_diffusion.LatentDiffusion", **LATENT, ckpt_path=path),
    "backbone": lambda path: node("ldm.autoencoder.perceptual.LPIPS", weights=path),
}


def node(target: str, **params: object) -> dict:
    return {"target": target, "params": params}


@pytest.mark.parametrize("what", NAMING)
def test_parameters_name_files_of_the_model_folder_alone(tmp_path, secret, what):
    folder = model_of(tmp_path / "model")
    shutil.copy(secret, secret.with_name("secret.txt.json"))
    (secret.parent / "config.json").write_text(json.dumps({SECRET: SECRET}))
    for way in ways_to(secret, folder):
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": NAMING[what](way)}))
        expected = (
            f"{OUTSIDE}|there is no such file|is no folder, no JSON|has none of" if what.startswith("text") else OUTSIDE
        )
        refused(lambda: model_folder.load_network(folder), expected)
        refused(lambda: load_model(folder), expected)


def test_a_model_folder_names_no_other_one(tmp_path, secret):
    other = shutil.copytree(MODELS / "demo-ssl", tmp_path / "private" / "model")
    stage = {"target": model_folder.FIRST_STAGE_FOLDER, "params": {"folder": str(other)}}
    folder = model_of(
        tmp_path / "model", node=node("ldm.latent_diffusion.LatentDiffusion", **LATENT | {"first_stage_config": stage})
    )
    for load in (load_model, model_folder.load_network, model_folder.load_first_stage):
        refused(lambda load=load: load(folder), "lies outside of the folder")
    torch.save(
        {"histoldm_config": {"model": yaml.safe_load((folder / "config.yaml").read_text())["model"]}, "state_dict": {}},
        "a.ckpt",
    )
    refused(lambda: load_model(Path("a.ckpt")), "lies outside of the folder")


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
def test_files_of_a_model_folder_are_no_links_to_others(tmp_path, secret, name):
    folder = model_of(tmp_path / "model")
    shutil.move(folder / name, secret.parent / name)
    (folder / name).symlink_to(secret.parent / name)
    for load in (model_folder.load_network, load_model, model_folder.load_first_stage):
        refused(lambda load=load: load(folder), "lies outside of the folder")
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    refused(lambda: model_folder.load_network(folder), "lies outside of the folder")


def test_a_snapshot_of_hugging_faces_cache_links_to_its_blobs(tmp_path, secret):
    folder = model_of(tmp_path / "models--a--b" / "snapshots" / "0123")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for name in ("config.yaml", "model.safetensors"):
        shutil.move(folder / name, blobs / f"of-{name}")
        (folder / name).symlink_to(Path("..", "..", "blobs", f"of-{name}"))
    assert model_folder.load_network(folder).weight.shape == (1, 2)
    (blobs / "of-config.yaml").unlink()
    (blobs / "of-config.yaml").symlink_to(secret)
    refused(lambda: model_folder.load_network(folder), "lies outside of the folder")


def test_a_model_folder_may_itself_be_a_link(tmp_path):
    model_of(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert model_folder.load_network(tmp_path / "link").weight.shape == (1, 2)


def test_checkpoints_write_no_file_outside(tmp_path, secret):
    embedder = {"target": "ldm.conditioners.omics.OmicsEmbedder", "params": {"dim": 8, "mutation_genes": "./genes.txt"}}
    model = node("ldm.latent_diffusion.LatentDiffusion", **LATENT)
    path, before = tmp_path / "a.ckpt", sorted(tmp_path.rglob("*"))
    for name in ("../evil.txt", str(tmp_path / "evil.txt"), "a/evil.txt", "config.yaml", "", "..", 7, "genes.txt"):
        text = {"not": "text"} if name == "genes.txt" else "evil"
        parts = {"histoldm_conditioner": embedder, "histoldm_files": {name: text}, "state_dict": {}}
        torch.save({"histoldm_config": {"model": model}, **parts}, path)
        refused(lambda: load_model(path), "it is not written")
        refused(lambda: model_folder.export(path, tmp_path / "out"), "it is not written")
        whole = model_folder.instantiate_from_config(model)
        refused(lambda whole=whole: model_folder.load_weights(whole, path), "no weights|it is not written")
        path.unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_no_file_is_taken_along_that_a_model_folder_links_to(tmp_path, secret):
    folder = shutil.copytree(MODELS / "demo-stains", tmp_path / "model")
    (folder / "notes.txt").symlink_to(secret)
    refused(lambda: export_as("diffusers", folder, tmp_path / "out"), "lies outside of the folder")


# --- encoders, scorers, maps ----------------------------------------------------------------------------------------


def test_an_encoder_folder_is_read_alone(tmp_path, secret):
    def made(**changes: object) -> Path:
        shutil.rmtree(tmp_path / "encoder", ignore_errors=True)
        folder = shutil.copytree(MODELS / "demo-encoder", tmp_path / "encoder")
        told = yaml.safe_load((folder / "encoder.yaml").read_text())
        (folder / "encoder.yaml").write_text(yaml.safe_dump(told | changes))
        return folder

    save_file({"a": torch.zeros(1)}, secret.parent / "other.safetensors")
    for name in (str(secret), "../private/other.safetensors", "/proc/self/environ"):
        refused(lambda name=name: load_encoder(made(file=name)), "lies outside of the folder")
    kwargs = yaml.safe_load((MODELS / "demo-encoder" / "encoder.yaml").read_text()).get("kwargs") or {}
    for more in ({"checkpoint_path": str(secret)}, {"pretrained_cfg": {"file": str(secret)}}, {"cache_dir": "x"}):
        refused(lambda more=more: load_encoder(made(kwargs=kwargs | more)), "is no argument of a network")
    refused(lambda: load_encoder(made(arch="hf-hub:someone/network")), "timm has no network")
    for name in ("model.safetensors", "encoder.yaml"):
        folder = made()
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
        refused(lambda folder=folder: load_encoder(folder), "lies outside of the folder")


def test_a_scorer_folder_is_read_alone(tmp_path, secret):
    def made() -> Path:
        shutil.rmtree(tmp_path / "scorer", ignore_errors=True)
        return shutil.copytree(MODELS / "demo-mitosis-scorers", tmp_path / "scorer")

    for name in ("member-1.safetensors", "config.yaml"):
        folder = made()
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
        refused(lambda folder=folder: load_scorer(folder), "lies outside of the folder")
    folder = made()
    told = yaml.safe_load((folder / "config.yaml").read_text())
    told["scorer"]["kwargs"] = {**(told["scorer"]["kwargs"] or {}), "checkpoint_path": str(secret)}
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    refused(lambda: load_scorer(folder), "is no argument of a network")


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_a_map_of_features_is_read_alone(tmp_path, secret, name):
    folder = save_transport(tmp_path / "map", Transport(4, 4), {})
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    refused(lambda: load_transport(folder), "lies outside of the folder")


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin", "tokenizer.json"])
def test_a_text_models_folder_is_read_alone(tmp_path, secret, name):
    folder = tmp_path / "tower"
    folder.mkdir()
    config = {"text_cfg": {"hf_model_name": "bert", "width": 8}, "hf_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    for other in ("pytorch_model.bin", "tokenizer.json"):
        (folder / other).write_text("{}")
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    refused(lambda: find_tower(str(folder)), "lies outside of the folder")


# --- published models -----------------------------------------------------------------------------------------------


def test_a_pipeline_of_diffusers_is_read_alone(tmp_path, oracle, secret):
    def made() -> Path:
        shutil.rmtree(tmp_path / "pipeline", ignore_errors=True)
        return shutil.copytree(oracle / "diffusers_sd1", tmp_path / "pipeline")

    names = sorted(path.relative_to(made()) for path in made().rglob("*") if path.is_file())
    read = [name for name in names if name.name in ("config.json", "scheduler_config.json", "model_index.json")
            or name.suffix in (".safetensors", ".bin")]  # fmt: skip
    assert len(read) > 5
    for name in read:
        folder = made()
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
        refused(lambda folder=folder: read_published(folder), "lies outside of the folder")
    folder = made()
    shutil.move(folder / "vae", secret.parent / "vae")
    (folder / "vae").symlink_to(secret.parent / "vae")
    refused(lambda: read_published(folder), "lies outside of the folder")
    config = made() / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": str(secret.parent)}))
    assert read_published(tmp_path / "pipeline").node


def test_an_index_of_shards_names_files_beside_it(tmp_path, secret):
    save_file({"a": torch.zeros(1)}, secret.parent / "shard.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.parent.mkdir()
    for name in ("../private/shard.safetensors", str(secret.parent / "shard.safetensors"), "link.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        (index.parent / "link.safetensors").unlink(missing_ok=True)
        (index.parent / "link.safetensors").symlink_to(secret.parent / "shard.safetensors")
        refused(lambda: read_published(index), "lies outside of the folder")
        refused(lambda: read_published(index.parent), "lies outside of the folder")


def test_a_project_names_no_file_that_is_read(tmp_path, oracle, secret):
    folder = shutil.copytree(oracle / "ldm_ckpt_lid_vq", tmp_path / "compvis")
    project = yaml.safe_load((folder / "config.yaml").read_text())
    project["model"]["params"]["ckpt_path"] = str(secret)
    project["model"]["params"]["first_stage_config"]["params"]["ckpt_path"] = "/proc/self/environ"
    (folder / "config.yaml").write_text(yaml.safe_dump(project))
    assert read_published(folder).node  # what it starts its training from is left
    for name in ("config.yaml", "model.ckpt"):
        linked = shutil.copytree(folder, tmp_path / f"linked-{name}")
        shutil.move(linked / name, secret.parent / name)
        (linked / name).symlink_to(secret.parent / name)
        if name == "config.yaml":
            refused(lambda linked=linked: read_published(linked / "model.ckpt"), "lies outside of the folder")
    assert convert(linked / "model.ckpt", tmp_path / "out", say=lambda line: None)  # the user names the link


def test_a_towers_version_is_no_folder_of_the_users(tmp_path, oracle, secret):
    from ldm.interop.clip_config import tower_config

    (secret.parent / "config.json").write_text(json.dumps({"text_cfg": {"width": SECRET}}))
    tower = {
        "positional_embedding": torch.zeros(4, 64), "token_embedding.weight": torch.zeros(16, 64),
        "transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(256, 64),
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    for version in (str(secret.parent), "private", "../private"):
        text, _ = tower_config(tower, version, tmp_path / "model" / "model.ckpt")
        assert SECRET not in text


def test_weights_that_the_user_names_may_be_a_link(tmp_path):
    save_file(nn.Linear(2, 1).state_dict(), tmp_path / "real.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    assert set(model_folder.read_state_dict(tmp_path / "link.safetensors")) == {"weight", "bias"}
    assert NODE["target"] == "torch.nn.Linear"


# --- HDF5 -----------------------------------------------------------------------------------------------------------


def h5_attacks(target: Path, raw: Path) -> dict[str, Callable[[h5py.File, str], None]]:
    """What puts the values of another file under a name."""

    def external(file: h5py.File, name: str) -> None:
        file.create_dataset(name, (2, 4), "u1", external=[(str(raw), 0, 8)])

    def virtual(file: h5py.File, name: str) -> None:
        layout = h5py.VirtualLayout((2, 4), "f4")
        layout[:] = h5py.VirtualSource(str(target), "features", (2, 4))
        file.create_virtual_dataset(name, layout)

    def through(file: h5py.File, name: str) -> None:
        file["other"] = h5py.ExternalLink(str(target), "/")
        file[name] = h5py.SoftLink("/other/features")

    return {
        "external link": lambda file, name: file.__setitem__(name, h5py.ExternalLink(str(target), "features")),
        "soft link through one": through,
        "external storage": external,
        "virtual": virtual,
    }


@pytest.mark.parametrize("attack", ["external link", "soft link through one", "external storage", "virtual"])
def test_no_h5_gives_the_values_of_another_file(tmp_path, secret, attack):
    (tmp_path / "raw").write_bytes(bytes(range(8)))
    with h5py.File(secret.parent / "other.h5", "w") as file:
        file["features"] = np.arange(8, dtype=np.float32).reshape(2, 4)
    put = h5_attacks(secret.parent / "other.h5", tmp_path / "raw")[attack]
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        put(file, "features")
        file["coords"] = np.array([[0, 0], [256, 0]])
        file.attrs["histoldm"] = json.dumps({"extractor": "pixels"})
        file["table/name"] = ["a", "b"]
    with h5py.File(path) as file:
        assert np.asarray(file["features"]).sum() == 28  # an unsafe reader gets them
    for read in (read_features, read_feature_file, lambda path: find_slide_files([path])):
        refused(lambda read=read: read(path), "in other files|in another file|to another file")
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((2, 4), np.float32)
        put(file, "coords")
    for read in (read_features, lambda path: find_slide_files([path])["a"].read()):
        refused(lambda read=read: read(path), "in other files|in another file|to another file")
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        for axis, names in {"obs": ["a", "b"], "var": ["G1", "G2", "G3", "G4"]}.items():
            file.create_group(axis).attrs["_index"] = "name"
            file[f"{axis}/name"] = names
        put(file, "layers/counts")
        file["X"] = np.zeros((2, 4))
    refused(lambda: read_h5ad(tmp_path / "a.h5ad", "counts"), "in other files|in another file|to another file")


def test_soft_links_within_an_h5_are_followed_and_rings_end(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["deep/values"] = np.ones((2, 4), np.float32)
        file["features"] = h5py.SoftLink("/deep/values")
        file["deep/ring"] = file["/"]
    assert read_features(tmp_path / "a.h5").values.sum() == 8


def test_the_config_of_a_bert_shapes_it_and_says_nothing_else():
    pytest.importorskip("transformers")
    own = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
           "intermediate_size": 16, "max_position_embeddings": 16, "attn_implementation": "someone/kernel",
           "auto_map": {"AutoModel": "code.Model"}}  # fmt: skip
    tower = BertTower({"text_cfg": {"hf_model_name": "bert", "context_length": 8}, "hf_config": own})
    assert tower(torch.zeros(1, 8).long()).shape == (1, 8, 16)
    assert "someone" not in str(tower.bert.config) + str(tower.bert.config._attn_implementation)


# --- Zarr -----------------------------------------------------------------------------------------------------------


def linked(path: Path, elsewhere: Path) -> None:
    """Put a link in a file's or folder's place, to itself in another folder."""
    elsewhere.mkdir(exist_ok=True)
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


@pytest.mark.parametrize("name", ["0/c/0/0/0", "0/c/0", "0", "0/zarr.json", "zarr.json"])
def test_an_ome_zarr_is_read_from_its_own_folder(tmp_path, secret, name):
    path = save_ome_zarr(tmp_path / "a.ome.zarr", np.full((64, 64, 3), 7, np.uint8), 0.5, {"seed": 1})
    linked(path / name, secret.parent)
    refused(lambda: open_image(path), "a link that leads out of|lies outside of")
    assert name != "zarr.json" or read_mark(path) == {}


@pytest.mark.parametrize("name", ["tiles/c/0/0/0/0", "tiles/c", "coords", "coords/zarr.json", "zarr.json"])
def test_a_tile_store_is_read_from_its_own_folder(tmp_path, tiny_store, secret, name):
    path = shutil.copytree(tiny_store, tmp_path / "a.zarr")
    assert TileStore.open(path).tile(0).shape == (256, 256, 3)
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.zarr").symlink_to(path)  # of a cohort that lies on several disks
    TileStore.open(tmp_path / "slides" / "a.zarr").tile(0)
    linked(path / name, secret.parent)
    refused(lambda: (TileStore.open(path).coords, TileStore.open(path).tile(0)), "leads out of|lies outside of")


@pytest.mark.parametrize("codec", ["pickle", "json2", "msgpack2", "categorize"])
def test_a_zarr_is_unpacked_by_codecs_that_only_decode(tmp_path, codec):
    path = tmp_path / "a.zarr"
    (path / "0").mkdir(parents=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    (path / ".zattrs").write_text(json.dumps({"multiscales": [{"axes": ["y", "x"], "datasets": [{"path": "0"}]}]}))
    array = {"zarr_format": 2, "shape": [4, 4], "chunks": [4, 4], "dtype": "|u1", "order": "C", "fill_value": 0}
    for packed in ({"compressor": {"id": codec}, "filters": None}, {"compressor": None, "filters": [{"id": codec}]}):
        (path / "0" / ".zarray").write_text(json.dumps(array | packed))
        refused(lambda: open_image(path), f"packed by the codec '{codec}'")
    (path / "0" / ".zarray").write_text(json.dumps(array | {"compressor": {"id": "zlib"}, "filters": None}))
    assert open_image(path).dimensions == (4, 4)
