"""Weights in the forms that training tools leave them in are read, or named with what is to be done."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from published import load
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp

import ldm
from ldm.autoencoder.weights import read_state_dict
from ldm.convert import check, convert, read_published
from ldm.errors import UserError
from ldm.interop.checkpoint import read_checkpoint
from ldm.training.resume import find_run

SLOW = pytest.mark.slow
TINY = {"net.0.weight": torch.arange(6.0).reshape(2, 3), "net.1.bias": torch.ones(2)}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def diffusion(oracle) -> tuple[Path, dict[str, Tensor]]:
    """The project YAML and the tensors of a published diffusion model, with averages beside them."""
    folder = oracle / "ldm_ckpt_lid_vq"
    state = read_state_dict(folder / "model.ckpt")
    raw = {name.removeprefix("model.").replace(".", ""): v for name, v in state.items() if name.startswith("model.")}
    average = {f"model_ema.{name}": value * 0.5 for name, value in raw.items()}
    return folder / "config.yaml", state | average | {"model_ema.num_updates": torch.tensor(7)}


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net = wrap(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))


WRAPPERS = {
    "DataParallel": lambda: nn.DataParallel(Wrapped(lambda net: net)),
    "torch.compile": lambda: torch.compile(Wrapped(lambda net: net)),
    "torch.compile of a part": lambda: Wrapped(torch.compile),
    "both": lambda: nn.DataParallel(Wrapped(torch.compile)),
}
COMPILED = list(WRAPPERS)[1:]


@pytest.mark.parametrize("wrapper", [pytest.param(w, marks=SLOW if w in COMPILED else ()) for w in WRAPPERS])
def test_wrappers_leave_no_trace_in_names(wrapper):
    state = dict(WRAPPERS[wrapper]().state_dict())
    for within in ("", "state_dict", "model", "module", "model_state_dict"):
        torch.save({within: state, "epoch": 1} if within else state, "model.ckpt")
        found = read_state_dict("model.ckpt")
        assert list(found) == ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"]
        assert all(torch.equal(value, held) for value, held in zip(found.values(), state.values()))


def renamed(state: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    if form == "compiled":  # averages have names without dots
        inner = {"model.diffusion_model.": "_orig_mod.", "model_ema.diffusion_model": "_orig_mod"}
        for begins, mark in inner.items():
            state = {name.replace(begins, begins + mark): value for name, value in state.items()}
        return state
    return {f"{form}{name}": value for name, value in state.items()}


@pytest.mark.parametrize("form", ["compiled", "_forward_module.", "module.", "_forward_module.module."])
def test_published_models_are_the_same_whatever_wrapped_them(form, diffusion):
    config, state = diffusion
    torch.save({"state_dict": state}, "plain.ckpt")
    torch.save({"state_dict": renamed(state, form)}, "wrapped.ckpt")
    plain, found = (read_published(f"{name}.ckpt", config=config).state for name in ("plain", "wrapped"))
    assert found.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


def test_names_that_only_look_wrapped_stay():
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, "model.ckpt")
    assert list(read_state_dict("model.ckpt")) == ["module.a", "b"]


def halves(folder: Path, suffix: str, state: dict[str, Tensor]) -> None:
    """The shards and the index that transformers, diffusers and accelerate write."""
    names, places = list(state), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{Path(suffix).stem}-{number:05d}-of-00002{Path(suffix).suffix}"
        places |= dict.fromkeys(part, file)
        tensors = {name: state[name] for name in part}
        save_file(tensors, folder / file) if suffix.endswith("safetensors") else torch.save(tensors, folder / file)
    (folder / f"{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_folders_of_accelerate_are_read(name, sharded, diffusion):
    config, state = diffusion
    folder = Path("checkpoint-500")
    folder.mkdir()
    state = {name: value.contiguous() for name, value in state.items()}
    if sharded:
        halves(folder, name, state)
    else:
        save_file(state, folder / name) if name.endswith("safetensors") else torch.save(state, folder / name)
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")
    (folder / "random_states_0.pkl").touch()
    assert read_state_dict(folder).keys() == state.keys()
    found = read_published(folder, config=config)
    assert found.node["target"] == "ldm.latent_diffusion.LatentDiffusion"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ldm.load_model(folder, config=config).channels == 3


def test_shards_that_are_missing_or_cut_are_told():
    folder = Path("model")
    folder.mkdir()
    halves(folder, "model.safetensors", TINY)
    save_file({}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"says that model-00002-of-00002\.safetensors holds net\.1\.bias, which"):
        read_state_dict(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-00002\.safetensors, which is not in its folder; copy"):
        read_state_dict(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match=r"secret\.safetensors lies outside of the folder model"):
        read_state_dict(folder)


@pytest.mark.slow
def test_the_command_told_for_folders_of_fsdp_makes_a_checkpoint_of_them(diffusion):
    config, state = diffusion
    torch.save({"model": {f"_forward_module.{name}": value for name, value in state.items()}}, "whole.bin")
    torch_save_to_dcp("whole.bin", "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt is a checkpoint of FSDP, in parts") as error:
        read_published("last.ckpt", config=config)
    command = str(error.value).split("`")[1].split()
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    found, plain = (read_published(path, config=config).state for path in ("whole.ckpt", "whole.bin"))
    assert found.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


def deepspeed() -> Path:
    """What Lightning's strategy leaves in place of last.ckpt."""
    folder = Path("run/checkpoints/last.ckpt")
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    (folder / "zero_to_fp32.py").touch()
    torch.save({"module": TINY, "ds_config": {}}, folder / "checkpoint" / "mp_rank_00_model_states.pt")
    return folder


def lora(name: str) -> Path:
    save_file({name: torch.ones(1)}, "style.safetensors")
    return Path("style.safetensors")


def adapter() -> Path:
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    save_file(TINY, "adapter/adapter_model.safetensors")
    return Path("adapter")


def optimizer() -> Path:
    torch.save(torch.optim.Adam([nn.Parameter(torch.ones(1))]).state_dict(), "optimizer.bin")
    return Path("optimizer.bin")


def two_models() -> Path:
    Path("two").mkdir()
    for name in ("model", "model_1"):
        save_file(TINY, f"two/{name}.safetensors")
    return Path("two")


DEEPSPEED = r"is a checkpoint of DeepSpeed, in parts: .* `cd run/checkpoints/last\.ckpt; python zero_to_fp32\.py"
NAMED = {
    "DeepSpeed": (deepspeed, DEEPSPEED),
    "its part": (lambda: deepspeed() / "checkpoint" / "mp_rank_00_model_states.pt", rf"mp_rank_00\S+ {DEEPSPEED}"),
    "LoRA of diffusers": (lambda: lora("unet.down_blocks.0.to_q.lora_A.weight"), r"is a LoRA, low-.*--lora.*--merge"),
    "LoRA of kohya": (lambda: lora("lora_unet_down_blocks_0_to_q.lora_down.weight"), "is a LoRA"),
    "older LoRA": (lambda: lora("unet.mid_block.processor.to_q_lora.up.weight"), "is a LoRA"),
    "adapter": (adapter, "adapter is a LoRA, low-rank changes"),
    "optimizer": (optimizer, "is the state of an optimizer, without weights; give the model's file beside it"),
    "two models": (two_models, r"holds several models \(model\.safetensors, model_1\.safetensors\); give the file of"),
}


@pytest.mark.parametrize("form", NAMED)
def test_other_forms_are_named_with_the_next_step(form):
    make, told = NAMED[form]
    path = make()
    for enter in (read_checkpoint, read_state_dict, ldm.load_model, read_published):
        with pytest.raises(UserError, match=told):
            enter(path)


def test_a_run_trained_with_deepspeed_is_named_too():
    run = deepspeed().parent.parent
    checkpoint = run / "checkpoints" / "last.ckpt"
    for enter, path in (
        (ldm.load_model, run), (lambda path: ldm.export(path, "out"), run), (find_run, run),
        (lambda path: ldm.export(path, "out"), checkpoint), (find_run, checkpoint),
    ):  # fmt: skip
        with pytest.raises(UserError, match="is a checkpoint of DeepSpeed, in parts"):
            enter(path)


def test_averages_of_a_published_model_that_were_never_updated_are_left(diffusion):
    config, state = diffusion
    torch.save({"state_dict": state}, "model.ckpt")
    raw = read_published("model.ckpt", config=config, raw_weights=True)
    found = read_published("model.ckpt", config=config)
    name = "model.diffusion_model.out.2.bias"
    assert torch.equal(found.state[name], raw.state[name] * 0.5)
    assert found.notes == raw.notes
    torch.save({"state_dict": state | {"model_ema.num_updates": torch.tensor(0)}}, "model.ckpt")
    found = read_published("model.ckpt", config=config)
    assert all(torch.equal(value, raw.state[name]) for name, value in found.state.items())
    assert any(note.startswith("the averaged weights were never updated") for note in found.notes)


def test_a_file_is_read_by_its_content_whatever_its_name():
    state = {"a": torch.arange(3.0)}
    save_file(state, "model.ckpt")
    torch.save(state, "model.safetensors")
    for name in ("model.ckpt", "model.safetensors"):
        assert torch.equal(read_state_dict(name)["a"], state["a"])
    torch.save(state, "old.safetensors", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict("old.safetensors")["a"], state["a"])


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"model": state},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}, "args": None},
        lambda state: {f"model.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
        lambda state: {"model": {name: value + 1 for name, value in state.items()}, "ema": state},
        lambda state: {"ema": state},
    ],
)
def test_a_network_of_guided_diffusion_is_found_in_every_wrapper(wrapped, oracle, tmp_path):
    golden = load(oracle / "hismmdm_unet.pt")
    torch.save(wrapped(golden["state_dict"]), tmp_path / "model.pt")
    (tmp_path / "flags.yaml").write_text("{image_size: 16, num_heads: 4, use_new_attention_order: true}")
    found = read_published(tmp_path / "model.pt", config=tmp_path / "flags.yaml")
    name = "input_blocks.0.0.weight"
    assert torch.equal(found.state[f"model.diffusion_model.{name}"], golden["state_dict"][name])
    assert "4 attention heads, as the flags say: no tensor tells" in found.notes
    check(found, tmp_path / "model.pt")


def averages_of(state: dict, only: int | None = None) -> dict:
    network = [name for name in state if name.startswith("model.diffusion_model.")][:only]
    return {f"model_ema.{name.removeprefix('model.').replace('.', '')}": state[name] + 1 for name in network}


def test_averages_alone_load_and_averages_of_some_are_counted(oracle, tmp_path):
    folder = oracle / "ldm_ckpt_lid_vq"
    state = {n: v for n, v in read_checkpoint(folder / "model.ckpt")["state_dict"].items() if "model_ema" not in n}
    config = folder / "config.yaml"
    rest = {name: value for name, value in state.items() if not name.startswith("model.")}
    torch.save({"state_dict": rest | averages_of(state)}, tmp_path / "alone.ckpt")
    lines: list[str] = []
    convert(tmp_path / "alone.ckpt", tmp_path / "alone", config=config, say=lines.append)
    assert "note: the file holds averaged weights alone" in lines
    held, name = load_file(tmp_path / "alone" / "model.safetensors"), "model.diffusion_model.out.2.weight"
    assert torch.equal(held[name], state[name] + 1)
    assert torch.equal(ldm.load_model(tmp_path / "alone.ckpt", config=config).state_dict()[name], held[name])

    torch.save({"state_dict": state | averages_of(state, 3)}, tmp_path / "some.ckpt")
    found = read_published(tmp_path / "some.ckpt", config=config)
    network = [name for name in state if name.startswith("model.diffusion_model.")]
    some = f"3 of {len(network)} weights have an average; the other {len(network) - 3} are as they are"
    assert some in found.notes
    assert any("attention heads, as the config says: no tensor tells" in note or "channels, as the config" in note
               for note in found.notes)  # fmt: skip
    wrong = rest | averages_of(state) | {"model_ema.other": torch.ones(1)}
    torch.save({"state_dict": wrong}, tmp_path / "wrong.ckpt")
    with pytest.raises(UserError, match=r"1 averaged weights of .*wrong.ckpt are of no weight of the model"):
        convert(tmp_path / "wrong.ckpt", tmp_path / "wrong", config=config)
