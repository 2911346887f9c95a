"""What strangers send: settings that read the environment, multiply or nest without end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attacks import NODE, SECRET, VARIABLE, model_of, refused
from torch import nn

from ldm import model_folder
from ldm.autoencoder.stage import AutoencoderStage
from ldm.config import load_config
from ldm.convert import convert, load_model, read_published
from ldm.encoders.encoder import load_encoder
from ldm.encoders.feature_map import load_transport
from ldm.encoders.text_models import find_tower
from ldm.interop.targets import read_project
from ldm.requests.spec import load_spec
from ldm.scorers.ensemble import load_scorer
from ldm.tables.gene_lists import read_genes, read_scaler


@pytest.fixture(autouse=True)
def secret(monkeypatch) -> None:
    """A variable of the environment that nothing of a stranger's may tell."""
    monkeypatch.setenv(VARIABLE, SECRET)


# --- references ------------------------------------------------------------------------------------------------------

REFERENCES = (
    "${oc.env:HISTOLDM_TEST_TOKEN}", "x ${oc.decode:'1'}", "${${a}:HISTOLDM_TEST_TOKEN}", "${oc.create:{a: 1}}",
    "${other}", "${ oc.env:HOME }",
)  # fmt: skip


@pytest.mark.parametrize("text", REFERENCES)
def test_model_folders_refer_to_nothing(tmp_path, text):
    folder = model_of(tmp_path / "model", {"notes": [{"of": text}], "a": "oc.env", "other": "b"})
    assert "metadata.notes.0.of" in refused(lambda: model_folder.read_model_folder(folder), r"refers to something else")
    folder = model_of(tmp_path / "model", node={**NODE, "params": {"in_features": text, "out_features": 1}})
    assert "model.params.in_features" in refused(lambda: model_folder.load_network(folder), "refers to something else")


def test_configs_within_checkpoints_refer_to_nothing(tmp_path):
    path = tmp_path / "a.ckpt"
    for key in ("histoldm_config", "histoldm_metadata"):
        content = {"histoldm_config": {"model": NODE}, "histoldm_metadata": {}, "state_dict": {}}
        content[key] = {**content[key], "licence": REFERENCES[0]}
        torch.save(content, path)
        for take in (lambda: load_model(path), lambda: model_folder.export(path, tmp_path / "out")):
            assert f"{key}.licence" in refused(take, "refers to something else")
    assert not (tmp_path / "out").exists()


def test_settings_of_published_models_refer_to_nothing(tmp_path, oracle):
    pipeline = shutil.copytree(oracle / "diffusers_sd1", tmp_path / "pipeline")
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"note": REFERENCES[0]}))
    said = refused(lambda: convert(pipeline, tmp_path / "out", say=lambda line: None), "refers to something else")
    assert "metadata.scheduler.note" in said
    compvis = shutil.copytree(oracle / "ldm_ckpt_lid_vq", tmp_path / "compvis")
    (compvis / "config.yaml").write_text((compvis / "config.yaml").read_text() + f"\ntoken: '{REFERENCES[0]}'\n")
    assert "token" in refused(lambda: load_model(compvis), "refers to something else")
    for options in ({"config": compvis / "config.yaml"}, {}):
        refused(lambda options=options: read_published(compvis / "model.ckpt", **options), "refers to something else")
    flags = tmp_path / "flags.yaml"
    flags.write_text(f"image_size: 16\nnum_heads: '{REFERENCES[0]}'")
    refused(lambda: read_published(oracle / "hismmdm_unet.pt", config=flags), "num_heads refers to something else")


def test_a_training_from_a_folder_takes_no_references_along(tmp_path):
    folder = model_of(tmp_path / "model", {"licence": REFERENCES[0]})
    stage = {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"}
    loss = {
        "target": "ldm.autoencoder.losses.LPIPSWithDiscriminator",
        "params": {"disc_start": 0, "perceptual_weight": 0.0},
    }
    refused(lambda: AutoencoderStage(stage, loss, ckpt_path=str(folder)), "metadata.licence refers to something else")


def test_the_users_own_config_may_refer(tmp_path):
    (tmp_path / "own.yaml").write_text("name: ${oc.env:HISTOLDM_TEST_TOKEN}\ndata: {steps: 3, more: '${data.steps}'}")
    assert load_config([tmp_path / "own.yaml"]) == {"name": SECRET, "data": {"steps": 3, "more": 3}}


# --- settings that are too much -------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 5000))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
BOMBS = {
    "aliases": (LAUGHS, "more than 300000 entries"),
    "merges": (MERGED, "more than 300000 entries"),
    "chain": (CHAIN, "nested more than 64 deep"),
    "lists": ("a: " + "[" * 20_000 + "]" * 20_000, "nested more than 64 deep"),
    "open lists": ("[" * 200_000, "nested more than 64 deep"),
    "blocks": ("- " * 5000 + "x", "nested more than 64 deep"),
    "itself": ("a: &a [*a]", "more than 300000 entries"),
    "items": ("[" + "1," * 400_000 + "1]", "more than 300000 entries"),
    "bytes": ("a: '" + "x" * (1 << 25) + "'", "more than 32 MiB"),
    "digits": ("a: " + "9" * 10_000, "not valid YAML"),
    "bits": ("a: 0b" + "1" * 100_000, "not valid YAML"),
    "base 60": ("a: !!int " + ":".join(["1"] * 100_000), "not valid YAML"),
    "key twice": ("a: 1\na: 2", "the key a is there twice"),
    "tag": ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
}


def readers(path: Path) -> dict[str, Callable[[], object]]:
    """Every way by which YAML that others wrote comes in; `path` is a folder with their file under each name."""
    return {
        "config": lambda: load_config([path / "config.yaml"]),
        "model folder": lambda: model_folder.read_model_folder(path),
        "project": lambda: read_project(path / "config.yaml"),
        "scorer": lambda: load_scorer(path),
        "encoder": lambda: load_encoder(path),
        "map": lambda: load_transport(path),
        "specification": lambda: load_spec(path / "config.yaml"),
        "scaler": lambda: read_scaler(path),
    }


@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_that_multiplies_or_nests_is_one_message(tmp_path, bomb):
    text, message = BOMBS[bomb]
    for name in ("config.yaml", "encoder.yaml"):
        (tmp_path / name).write_text(text)
    for read in readers(tmp_path).values():
        refused(read, message)


def test_json_that_nests_is_one_message(tmp_path):
    deep = "[" * 200_000 + "]" * 200_000
    index, genes = tmp_path / "model.safetensors.index.json", tmp_path / "genes.json"
    for path in (index, genes, tmp_path / "config.json"):
        path.write_text(deep)
    refused(lambda: read_published(index), "index.json")
    refused(lambda: read_genes(genes, "genes"), "nested too deeply")
    refused(lambda: find_tower(str(tmp_path / "config.json")), "nested too deeply")
    refused(lambda: read_published(tmp_path), "nested too deeply")


def test_configs_within_checkpoints_that_multiply_are_one_message(tmp_path):
    node: object = "x"
    for _ in range(40):
        node = [node, node]  # pickle keeps one of each
    torch.save({"histoldm_config": {"model": NODE, "more": node}, "state_dict": {}}, tmp_path / "a.ckpt")
    refused(lambda: model_folder.export(tmp_path / "a.ckpt", tmp_path / "out"), "more than 300000 entries")
    cycle: list = []
    cycle.append(cycle)
    torch.save({"histoldm_config": {"model": NODE, "more": cycle}, "state_dict": {}}, tmp_path / "a.ckpt")
    refused(lambda: model_folder.export(tmp_path / "a.ckpt", tmp_path / "out"), "nested more than 64 deep")


def test_settings_as_large_as_models_have_are_read(tmp_path):
    genes = [f"G{i}" for i in range(30_000)]
    scaler = {"low": [0.5] * len(genes), "high": [1e-4] * len(genes)}
    folder = model_folder.write_model_folder(
        tmp_path / "model", NODE, nn.Linear(2, 1).state_dict(), {"genes": genes, "scaler": scaler}
    )
    assert model_folder.read_model_folder(folder)[1] == {"genes": genes, "scaler": scaler}
