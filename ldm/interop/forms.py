"""The forms in which training tools leave weights: names without their wrappers, and folders that are read or named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.foreign.paths import inside
from ldm.foreign.settings import read_json

WRAPPERS = ("_forward_module.", "module.")  # before all names: of Lightning's strategies, of DataParallel
COMPILED = re.compile(r"(^|\.)_orig_mod\.")  # of torch.compile, before the names of what was compiled
AVERAGE_COMPILED = re.compile(r"^(model_ema\..*?)_orig_mod")  # averages have names without dots
INNER = ("state_dict", "model_state_dict", "model", "module")  # where weights lie in a checkpoint
LORA = re.compile(r"(^|[._])lora_(A|B|up|down|unet|te\d?|embedding_[AB])([._]|$)|[._]lora\.(up|down)\.")
DIFFUSERS = "diffusion_pytorch_model"
SINGLE = ("model.safetensors", "pytorch_model.bin", f"{DIFFUSERS}.safetensors", f"{DIFFUSERS}.bin")
MERGE = (
    "a LoRA, low-rank changes to a model that is not in it: sample from that model with --lora, or put it into its "
    "weights by `histoldm export --merge 1 --base MODEL`"
)


def weights_in(content: Any) -> Mapping[Any, Any]:
    """The named tensors within a checkpoint's content, wherever training tools put them; empty if there are none.

    >>> weights_in({"epoch": 3, "model": {"out.weight": torch.ones(1)}})
    {'out.weight': tensor([1.])}
    """
    if not isinstance(content, Mapping):
        return {}
    for name in INNER:
        if isinstance(inner := content.get(name), Mapping) and (name == INNER[0] or _names(inner)):
            return inner
    return content


def unwrapped(content: Any, depth: int = 2) -> Any:
    """A checkpoint's content whose tensors have the names of the model itself, without what wrapped it.

    >>> unwrapped({"state_dict": {"_forward_module.net._orig_mod.weight": torch.ones(1)}})
    {'state_dict': {'net.weight': tensor([1.])}}
    """
    if isinstance(content, list) and depth:
        return [unwrapped(value, depth - 1) for value in content]
    if not isinstance(content, Mapping):
        return content
    found = {name: unwrapped(value, depth - 1) if depth else value for name, value in content.items()}
    names = _names(content)
    plain = {name: AVERAGE_COMPILED.sub(r"\1", COMPILED.sub(r"\1", name)) for name in names}
    while names and (all_have := [w for w in WRAPPERS if all(name.startswith(w) for name in plain.values())]):
        plain = {name: short.removeprefix(all_have[0]) for name, short in plain.items()}
    if len(set(plain.values())) < len(names):  # they would stand for one another
        return found
    return {plain.get(name, name): value for name, value in found.items()}


def _names(state: Mapping[Any, Any]) -> list[str]:
    return [name for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)]


def check_form(content: Any, path: Path) -> None:
    """UserError for files that hold no whole weights: of a LoRA, an optimizer, a part of DeepSpeed's.

    >>> check_form({"unet.to_q.lora_A.weight": torch.ones(1)}, Path("style.safetensors"))
    Traceback (most recent call last):
    ldm.errors.UserError: style.safetensors is a LoRA, low-rank changes to a model that is not in it: sample ...
    """
    if not isinstance(content, Mapping):
        return
    ours = "histoldm_lora" in content  # a training's, of which everything else is there
    if not ours and any(LORA.search(name) for name in _names(weights_in(content))):
        raise UserError(f"{path} is {MERGE}.")
    if content.keys() & {"ds_config", "ds_version"}:
        raise UserError(f"{path} is {_deepspeed(path.parent)}")
    if content.keys() == {"state", "param_groups"}:
        raise UserError(f"{path} is the state of an optimizer, without weights; give the model's file beside it.")


def _deepspeed(folder: Path) -> str:
    root = next((place for place in (folder, folder.parent) if (place / "latest").is_file()), folder)
    return (
        f"a checkpoint of DeepSpeed, in parts: make whole weights of it by its own script, `cd {root}; python "
        "zero_to_fp32.py . WHOLE`, and give WHOLE."
    )


def name_form(path: Path) -> None:
    """UserError for a folder, maybe in place of a file, whose weights another program must make whole first.

    >>> Path("last.ckpt").mkdir()
    >>> Path("last.ckpt/zero_to_fp32.py").touch()
    >>> name_form(Path("last.ckpt"))
    Traceback (most recent call last):
    ldm.errors.UserError: last.ckpt is a checkpoint of DeepSpeed, in parts: make whole weights of it by its own ...
    """
    if path.is_dir():
        file_of(path)


def file_of(folder: Path) -> Path | None:
    """The file of the weights in a folder that a training tool wrote, or the index of its shards; None: there is none.

    Raises:
        UserError: the folder holds weights in a form that another program must make whole first; several models.

    >>> Path("run").mkdir()
    >>> [Path("run", name).touch() for name in ("pytorch_model.bin", "optimizer.bin", "random_states_0.pkl")]
    [None, None, None]
    >>> file_of(Path("run")).name
    'pytorch_model.bin'
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is {MERGE}.")
    parts = [path.parent for path in (*folder.glob("*.distcp"), *folder.glob("*/*.distcp"))]
    if parts:
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {parts[0]} whole.ckpt"
        raise UserError(
            f"{folder} is a checkpoint of FSDP, in parts: make one file of it, `{command}`, and give that file."
        )
    if any((*folder.glob("*mp_rank_*"), *folder.glob("*/*mp_rank_*"))) or (folder / "zero_to_fp32.py").is_file():
        raise UserError(f"{folder} is {_deepspeed(folder)}")
    more = sorted(path.name for path in folder.glob("model_[0-9].safetensors"))
    if more and (folder / SINGLE[0]).is_file():
        raise UserError(f"{folder} holds several models ({SINGLE[0]}, {', '.join(more)}); give the file of one.")
    for name in SINGLE:
        for place in (folder / name, folder / f"{name}.index.json"):
            if place.is_file():
                return inside(folder, place.name)
    return None


def shards_of(index: Path) -> dict[Path, list[str]]:
    """The files that an index names, and the tensors that each is to hold.

    >>> Path("model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}') > 0
    True
    >>> shards_of(Path("model.safetensors.index.json"))
    Traceback (most recent call last):
    ldm.errors.UserError: model.safetensors.index.json names 1.safetensors, which is not in its folder; copy ...
    """
    try:
        places = read_json(index, "the index")["weight_map"]
        found: dict[Path, list[str]] = {}
        for tensor, name in places.items():
            found.setdefault(inside(index.parent, name), []).append(tensor)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} does not say in which file of its folder each tensor is.") from error
    if lost := [path.name for path in found if not path.is_file()]:
        raise UserError(f"{index} names {lost[0]}, which is not in its folder; copy the whole folder.")
    return found
