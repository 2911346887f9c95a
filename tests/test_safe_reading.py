"""Files of others are data: whatever a pickle asks for, nothing of it is executed; and what is whole is read whole."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import enum
import functools
import io
import os
import pathlib
import pickle
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from ldm import config, model_folder
from ldm.autoencoder.autoencoder import AutoencoderKL
from ldm.autoencoder.perceptual import LPIPS
from ldm.autoencoder.weights import read_state_dict
from ldm.conditioners.text_towers import build_tower
from ldm.config import instantiate_from_config
from ldm.convert import convert, load_model, read_published
from ldm.data.features import read_features
from ldm.encoders import encoder as encoders
from ldm.encoders.text_models import TowerSource
from ldm.errors import UserError
from ldm.interop.checkpoint import Inert, read_checkpoint, state_dict_of
from ldm.scorers.ensemble import load_scorer
from ldm.training.command import main as train

DDCONFIG = {
    "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1,
    "attn_resolutions": [], "num_groups": 4, "double_z": True,
}  # fmt: skip
PROJECT = {
    "model": {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {"ddconfig": DDCONFIG, "embed_dim": 3, "lossconfig": {"target": "torch.nn.Identity"}},
    }
}


class Calls:
    """Pickled as a call; `of` is the function, or what such a call gives."""

    def __init__(self, of: Callable, *args: Any, state: Any = None):
        self.how = (of, args) if state is None else (of, args, state)

    def __reduce__(self):
        return self.how

    def __call__(self):
        raise AssertionError("only what is loaded is called")


class Colour(enum.Enum):
    RED = 1


class Callback:
    pass


def first_stage() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return AutoencoderKL(DDCONFIG, embed_dim=3).state_dict()


def nested(harm: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(Calls(os.system, harm), buffer)
    return buffer.getvalue()


# what runs a command when an unsafe unpickler reads it
GADGETS: dict[str, Callable[[str], Any]] = {
    "os.system": lambda harm: Calls(os.system, harm),
    "eval": lambda harm: Calls(eval, f"__import__('os').system({harm!r})"),
    "exec": lambda harm: Calls(exec, f"import os; os.system({harm!r})"),
    "subprocess": lambda harm: Calls(subprocess.call, ["sh", "-c", harm]),
    "getattr": lambda harm: Calls(Calls(getattr, Calls(__import__, "os"), "system"), harm),
    "partial": lambda harm: Calls(Calls(functools.partial, os.system, harm)),
    "map": lambda harm: Calls(list, Calls(map, os.system, [harm])),
    "setstate": lambda harm: Calls(Calls(functools.partial, print, state=(os.system, (harm,), {}, {}))),
    "storage of bytes": lambda harm: Calls(torch.storage._load_from_bytes, nested(harm)),
    "pickle in a pickle": lambda harm: Calls(pickle.loads, pickle.dumps(Calls(os.system, harm))),
    "object array": lambda harm: np.array([Calls(os.system, harm)], dtype=object),
    "parameter": lambda harm: Calls(torch._utils._rebuild_parameter, Calls(os.system, harm), True, {}),
    "tensor type": lambda harm: Calls(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (harm,), {}),
}
# the same by hand, in opcodes that picklers do not write
OPCODES = {
    "inst": b"(S'%s'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'%s'\no.",
    "global by stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93S'%s'\n\x85R.",
}


def with_pickle(path: Path, data: bytes) -> None:
    """A torch file whose pickle is `data`."""
    torch.save({"state_dict": first_stage()}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)


def entry_points(path: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Every way a checkpoint of others comes in."""
    project = out.with_suffix(".yaml")
    project.write_text(yaml.safe_dump(PROJECT))
    params = {"ddconfig": DDCONFIG, "embed_dim": 3}
    stage = {"target": "ldm.autoencoder.autoencoder.AutoencoderKL", "params": params}
    trained = out.with_suffix(".stage.yaml")
    training = {"target": "ldm.autoencoder.stage.AutoencoderStage", "params": {"first_stage": stage}}
    trained.write_text(yaml.safe_dump({"model": training}))
    return {
        "read_checkpoint": lambda: read_checkpoint(path),
        "read_state_dict": lambda: read_state_dict(path),
        "read_published": lambda: read_published(path, config=project),
        "convert": lambda: convert(path, out, config=project, say=lambda line: None),
        "ldm.load_model": lambda: load_model(path, config=project),
        "load_model": lambda: model_folder.load_model(path),
        "export": lambda: model_folder.export(path, out),
        "convert by a config of ours": lambda: convert(path, out, config=trained, say=lambda line: None),
    }


PLACES: dict[str, Callable[[Any, dict], Any]] = {
    "beside the weights": lambda evil, state: {"callbacks": evil, "state_dict": state},
    "among the weights": lambda evil, state: {"state_dict": {**state, "loss.more": evil}},
    "within a list": lambda evil, state: {"state_dict": state, 7: [{"a": (evil,)}]},
    "in place of the weights": lambda evil, state: {"state_dict": evil},
    "in place of all": lambda evil, state: evil,
}


def harms(path: Path, mark: Path) -> bool:
    """Whether an unsafe reader would have done it."""
    assert not mark.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    return mark.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("gadget", GADGETS)
def test_nothing_that_a_pickle_asks_for_is_done(tmp_path, gadget, legacy):
    mark, path = tmp_path / "harmed", tmp_path / "model.ckpt"
    content = PLACES["beside the weights"](GADGETS[gadget](f"touch {mark}"), first_stage())
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(path)
    assert set(found) == {"callbacks", "state_dict"}
    for name, value in first_stage().items():
        assert torch.equal(found["state_dict"][name], value)
    assert harms(path, mark)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_is_executed_at_any_entry(tmp_path, place, legacy):
    mark, path = tmp_path / "harmed", tmp_path / "model.ckpt"
    content = PLACES[place](GADGETS["os.system"](f"touch {mark}"), first_stage())
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for name, enter in entry_points(path, tmp_path / "out").items():
        own = name in ("load_model", "ldm.load_model", "export")  # they take no first stage of others
        refused = own or (place.startswith("in place") and name[:6] != "read_c")
        with pytest.raises(UserError) if refused else contextlib.nullcontext():
            assert enter() is not None
        assert not mark.exists(), name
    assert harms(path, mark)


@pytest.mark.parametrize("place", PLACES)
def test_other_weights_and_features_are_only_read_too(tmp_path, place):
    mark, path = tmp_path / "harmed", tmp_path / "weights.pt"
    torch.save(PLACES[place](GADGETS["os.system"](f"touch {mark}"), {"features.0.weight": torch.zeros(1)}), path)
    text = {"width": 8, "heads": 2, "layers": 1, "vocab_size": 16, "context_length": 4}
    for enter in (
        read_features, lambda p: LPIPS("squeeze", str(p)), lambda p: load_scorer([p]),
        lambda p: build_tower(TowerSource("tiny", "", {"text_cfg": text}, p)),
    ):
        with pytest.raises(UserError):
            enter(path)
        assert not mark.exists()
    with contextlib.suppress(UserError):
        encoders.read_weights(path)
    assert not mark.exists()
    assert harms(path, mark)


@pytest.mark.slow
def test_a_run_is_resumed_from_tensors_and_plain_values_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ALLOWED", (*config.ALLOWED, "tiny_training."))
    monkeypatch.chdir(tmp_path)
    tiny = str(Path(__file__).parent / "configs" / "tiny.yaml")
    common = ["-t", "--enable_progress_bar", "false", "--max_steps", "1"]
    assert train([*common, "--base", tiny, "--logdir", "logs"]) == 0
    (run,) = Path("logs").iterdir()
    checkpoint, mark = run / "checkpoints" / "last.ckpt", tmp_path / "harmed"
    content = torch.load(checkpoint, weights_only=True)
    for name in ("os.system", "getattr", "storage of bytes"):
        torch.save({**content, "callbacks": GADGETS[name](f"touch {mark}")}, checkpoint)
        with pytest.raises(pickle.UnpicklingError):
            train([*common, "--resume", str(run)])
        assert not mark.exists(), name


@pytest.mark.parametrize("opcodes", OPCODES)
def test_opcodes_that_no_pickler_writes(tmp_path, opcodes):
    mark, path = tmp_path / "harmed", tmp_path / "model.ckpt"
    with_pickle(path, OPCODES[opcodes] % str(f"touch {mark}").encode())
    assert isinstance(read_checkpoint(path), Inert)
    assert harms(path, mark)
    with pytest.raises(UserError, match=r"a pickled object of the class os\.system, which only its own code can read"):
        read_state_dict(path)


@pytest.mark.parametrize(
    "data",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'__defaults__'\n)stb.",  # of a function
        b"ctorch._utils\n_rebuild_tensor_v2\n}S'__defaults__'\n)sb.",
        b"ccollections\nOrderedDict\n(N}S'fromkeys'\nI1\nstb.",  # of a class
        b"(lp0\nN}S'append'\nI1\ns\x86b.",  # of a list
        b"ctorch\nfloat32\n}S'itemsize'\nI1\nsb.",
    ],
)
def test_pickles_cannot_change_what_reads_them(tmp_path, data):
    path = tmp_path / "model.ckpt"
    with_pickle(path, data)
    with pytest.raises(UserError, match="cannot read"):
        read_checkpoint(path)
    torch.save({"state_dict": first_stage()}, path)
    assert len(read_state_dict(path)) == len(first_stage())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (((10**6,), (1,)), "reaches beyond its storage"),
        (((2,), (10**9,)), "reaches beyond its storage"),
        (((10**9, 10**9), (0, 0)), "would take 4e\\+03 PB|would take 4 EB"),
        (((2,), (-1,)), "impossible shape"),
        (((2, 2), (1,)), "not known"),
        ((("2",), (1,)), "impossible shape"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_tensors_stay_within_their_storage(tmp_path, shape, message, legacy):
    path = tmp_path / "model.ckpt"
    odd = Calls(torch._utils._rebuild_tensor_v2, torch.zeros(8).storage(), 0, *shape, False, {})
    torch.save({"weight": odd}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


# --- what is whole is read whole ------------------------------------------------------------------------------------


def variety() -> dict[str, Any]:
    torch.manual_seed(1)
    base = torch.randn(6, 8)
    return {
        "plain": base, "transposed": base.T, "view": base[1:3, ::2], "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4), "expanded": torch.ones(1, 3).expand(4, 3), "parameter": nn.Parameter(base + 1),
        "half": base.half(), "bfloat16": base.bfloat16(), "double": base.double(), "complex": base + 1j,
        "long": torch.arange(5), "bool": base > 0, "byte": torch.arange(3, dtype=torch.uint8),
        "float8": base.to(torch.float8_e4m3fn), "buffer": nn.Buffer(base + 2),
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_every_kind_are_read_as_they_are(tmp_path, protocol, legacy):
    path, tensors = tmp_path / "model.pt", variety()
    if legacy:
        tensors.pop("float8")  # which that form has not
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    found = read_checkpoint(path)
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].float() if name == "float8" else found[name], value.data.float()
                           if name == "float8" else value.data), name  # fmt: skip
    assert found["plain"].data_ptr() == found["transposed"].data_ptr()  # what was shared still is
    found["plain"].add_(1)  # and is the process' own
    assert torch.equal(read_checkpoint(path)["plain"], tensors["plain"])


def test_checkpoints_of_old_lightning_are_read(tmp_path, oracle):
    old = read_checkpoint(oracle / "legacy_pl1_callbacks.ckpt")
    assert set(old) >= {"callbacks", "state_dict", "epoch"}
    assert all(isinstance(value, torch.Tensor) for value in old["state_dict"].values())


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_other_classes_become_inert(tmp_path, protocol):
    path = tmp_path / "model.ckpt"
    own = {
        "callbacks": {Callback: {"best": torch.ones(2), "path": pathlib.Path("x")}},
        "hyper_parameters": OmegaConf.create({"a": {"b": [1, 2]}}),
        "args": argparse.Namespace(lr=0.1),
        "step": np.float64(3.0), "array": np.arange(3), "colour": Colour.RED, "date": datetime.date(2026, 1, 1),
        "state": collections.defaultdict(dict, {"a": {"exp_avg": torch.zeros(3)}}),
        "counts": collections.Counter("aab"), "seen": {1, 2}, "size": torch.Size([2, 3]), "dtype": torch.float16,
        "plain": [1, 2.5, "three", None, True, b"bytes", (4, 5j)],
    }  # fmt: skip
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), **own}, path, pickle_protocol=protocol)
    found = read_checkpoint(path)
    assert set(found["state_dict"]) == {"weight", "bias"}
    ((key, value),) = found["callbacks"].items()
    assert issubclass(key, Inert)
    assert torch.equal(value["best"], torch.ones(2))
    for name in ("hyper_parameters", "args", "colour", "date"):
        assert isinstance(found[name], Inert), name
        assert not vars(found[name])
    assert (found["step"], found["array"].tolist()) == (3.0, [0, 1, 2])
    assert found["state"] == {"a": {"exp_avg": found["state"]["a"]["exp_avg"]}}
    assert found["counts"] == {"a": 2, "b": 1}
    assert (found["seen"], found["size"], found["dtype"]) == ({1, 2}, (2, 3), torch.float16)
    assert found["plain"][:5] == own["plain"][:5]
    assert found["plain"][6] == (4, 5j)


def test_a_whole_pickled_module_is_refused_with_a_way_out(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"object of the class torch\.nn\.modules\.linear\.Linear, .*state_dict"):
        read_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_and_damaged_files_are_errors(tmp_path, form):
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.ckpt")
    if form == "safetensors":
        save_file(first_stage(), path)
    else:
        torch.save({"state_dict": first_stage()}, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for part in (0.02, 0.3, 0.7, 0.999):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(UserError, match="cannot read"):
            read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot read"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page, not a checkpoint"),
        (b"\x1f\x8b\x08\x00", "is a gzip archive; unpack it first"),
        (b"not a checkpoint", "cannot read .*: it is no file of torch"),
        (pickle.dumps({"a": 1}), "is a pickle that torch.save did not write"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_archives_are_named(tmp_path):
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.ckpt", b"weights")
    with pytest.raises(UserError, match=r"a zip archive that holds model\.ckpt; unpack it"):
        read_checkpoint(path)
    torch.save({"a": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="is a compressed archive"):
        read_checkpoint(path)
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    with pytest.raises(UserError, match="is a TorchScript program"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no weights"):
        state_dict_of(read_checkpoint(path), path)


# --- configs of others ---------------------------------------------------------------------------------------------

# what a downloaded model folder might name in place of a network, a first stage or a conditioner
FOREIGN = {
    "os.system": {"command": "touch {mark}"},
    "ldm.files.os.system": {"command": "touch {mark}"},
    "ldm.files.write_text": {"path": "{mark}", "text": "harm"},
    "ldm.locks.Lock": {"path": "{mark}"},
    "ldm.data.datasets.TileDataset": {"path": "{mark}"},
    "pytorch_lightning.loggers.CSVLogger": {"save_dir": "{mark}"},
    "torch.nn.modules.module.torch.load": {"f": "{mark}"},
}


@pytest.mark.parametrize("target", FOREIGN)
@pytest.mark.parametrize("part", ["model", "unet_config", "first_stage_config", "cond_stage_config"])
def test_model_folders_build_nothing_but_modules(tmp_path, part, target):
    mark = tmp_path / "harmed"
    node = {"target": target, "params": {name: text.format(mark=mark) for name, text in FOREIGN[target].items()}}
    stage = {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"}
    unet = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1, "image_size": 16,
            "attention_resolutions": [], "channel_mult": [1], "num_heads": 4}  # fmt: skip
    params = {"unet_config": {"target": "ldm.networks.unet.UNetModel", "params": unet}, "first_stage_config": stage}
    whole = {"target": "ldm.latent_diffusion.LatentDiffusion", "params": {**params, part: node}}
    folder = tmp_path / "model"
    model_folder.write_model_folder(folder, node if part == "model" else whole, first_stage(), {})
    for load in (model_folder.load_model, model_folder.load_network, model_folder.load_first_stage):
        if part in ("unet_config", "cond_stage_config") and load is model_folder.load_first_stage:
            continue
        with pytest.raises(UserError, match=r"not allowed|is a function|part of a model|is not a class or function"):
            load(folder)
        assert not mark.exists()


# --- memory ---------------------------------------------------------------------------------------------------------


def mapped_from(value: torch.Tensor) -> str:
    """The file in which a tensor's memory lies, "" if it is in none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5) if len(line.split(maxsplit=5)) == 6 else (line.split()[0], "")
        start, end = (int(end, 16) for end in span.split("-"))
        if start <= value.data_ptr() < end:
            return name if name.startswith("/") else ""
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is told by /proc")
def test_weights_are_mapped_not_copied(tmp_path):
    node = {
        "target": "ldm.latent_diffusion.LatentDiffusion",
        "params": {
            "use_ema": False,
            "unet_config": {"target": "ldm.networks.unet.UNetModel", "params": {
                "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1, "image_size": 16,
                "attention_resolutions": [], "channel_mult": [1], "num_heads": 4}},
            "first_stage_config": {"target": "ldm.autoencoder.autoencoder.IdentityFirstStage"},
        },
    }  # fmt: skip
    state = instantiate_from_config(node).state_dict()
    assert {mapped_from(value) for value in state.values()} == {""}
    folder = model_folder.write_model_folder(tmp_path / "model", node, state, {})
    model = model_folder.load_model(folder)
    assert {mapped_from(value) for value in model.state_dict().values()} == {str(folder / "model.safetensors")}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state}, path)
    assert {mapped_from(value) for value in read_checkpoint(path)["state_dict"].values()} == {str(path)}
