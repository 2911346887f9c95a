"""What `histoldm export` makes of an adapter (LoRA): a folder of its own, or its base model with it in the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ldm.errors import UserError, note
from ldm.files import owns, whole, write_text
from ldm.interop.checkpoint import read_checkpoint
from ldm.interop.lora import CONFIG, WEIGHTS, Lora, read_lora, to_peft
from ldm.interop.terms import together
from ldm.model_folder import export, load_model, read_model_folder, write_model_folder
from ldm.sampling.adapters import Adapters


def is_adapter(path: Path) -> bool:
    """Whether a path is a training of an adapter, or an adapter itself.

    >>> is_adapter(Path("models/ssl"))
    False
    """
    if any((path / name).is_file() for name in (CONFIG, WEIGHTS)):
        return True
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not checkpoint.is_file():
        return False
    content = read_checkpoint(checkpoint, lora=True)
    return isinstance(content, Mapping) and ("histoldm_lora" in content or any("lora" in str(name) for name in content))


@owns(beside=True)
def export_adapter(path: Path, out: Path, metadata: Mapping[str, Any]) -> Path:
    """Make a folder of an adapter, which peft reads too. It takes the place of one that is there."""
    lora = read_lora(path)
    if "rank" not in lora.about:
        raise UserError(f"{path} was not trained here and is an adapter folder already; --merge puts it into a --base.")
    if out.exists() and not (out / CONFIG).is_file():
        raise UserError(f"{out} exists and is no adapter; give another --out.")
    base = str(lora.about.get("base", ""))
    state, settings = to_peft(lora.layers, {**lora.about, **metadata}, Path(base).name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as part:
        part.mkdir()
        save_file({name: value.contiguous() for name, value in state.items()}, part / WEIGHTS)
        write_text(part / CONFIG, settings)
    return out


@owns(beside=True)
def merge_adapter(
    path: Path, out: Path, base: Path | None, scale: float, dtype: torch.dtype | None, metadata: Mapping[str, Any]
) -> Path:
    """Make a model folder of the model `base`, by default that of its own training, with an adapter in its weights."""
    adapters = Adapters({path: scale})
    own = (path / "checkpoints").is_dir()  # a run of the user's; what others made names no files
    recorded = adapters.loras[0][0].about.get("base") if own else None
    base = base or (Path(recorded) if recorded else None)
    if base is None:
        raise UserError(f"{path} does not say which model it changes; name its folder by --base.")
    if not base.exists():
        raise UserError(f"{path} changes the model {base}, which is not there; name its folder by --base.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = base if (base / "config.yaml").is_file() else export(base, Path(scratch) / "base")
        node, known = read_model_folder(folder)
        model = load_model(folder)
        twin = adapters.network(model).state_dict()
        state = model.state_dict() | {f"model.{name}": value for name, value in twin.items()}
        params, files = dict(node["params"]), {}
        if model.cond_stage_model is not None:
            params["cond_stage_config"], files = model.portable_conditioner()
        about = {**known, "adapters": adapters.record(), **metadata}
        if "licence" not in metadata:
            about |= _licence(adapters.loras[0][0], known)
        return write_model_folder(out, {**node, "params": params}, state, about, dtype, files)


def _licence(lora: Lora, known: Mapping[str, Any]) -> dict[str, str]:
    """The licence of a model with an adapter in it, as metadata, where one of both is known."""
    if lora.licence is None:
        note(f"the adapter {lora.name} states no licence; look it up, and record that of the whole by --licence.")
    terms = together(known.get("licence"), f"adapter {lora.name}", lora.licence)
    return {"licence": terms} if terms else {}
