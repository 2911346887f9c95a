"""Weights of a first stage from disk: a model folder, a .safetensors file, or a .ckpt of ours or of CompVis' shape."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.errors import UserError

# where a first stage's weights lie: bare, in a latent-diffusion checkpoint, in a checkpoint of AutoencoderStage
PREFIXES = ("", "first_stage_model.", "autoencoder.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a model folder (its model.safetensors), a .safetensors file or a .ckpt/.pt, on the CPU.

    Nothing in the file is executed: pickles are read with `weights_only`, where classes that old Lightning
    checkpoints name as keys of their callbacks' state are replaced by an empty stand-in.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"weights {file} do not exist; give a model folder, a .safetensors file or a .ckpt.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(_lightning_classes(file)):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read weights from {file}: {reason}") from error
    except Exception as error:  # safetensors' own error type derives from Exception only
        raise UserError(f"cannot read weights from {file}: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{file} holds no weights; a checkpoint has a state_dict of named tensors.")
    return state


def load_weights(model: nn.Module, path: str | Path) -> str:
    """Load a first stage's weights by name and say what was loaded in one line.

    Takes the names as they are, or under `first_stage_model.` or `autoencoder.`. Everything else in the file
    (`loss.*` of a training checkpoint, a UNet) is left. Missing or misshapen weights raise `UserError`.
    """
    state = read_state_dict(path)
    wanted = model.state_dict()
    prefix = max(PREFIXES, key=lambda p: sum(p + key in state for key in wanted))
    missing = [key for key in wanted if prefix + key not in state]
    if missing:
        raise UserError(
            f"{path} does not fit the first stage of the config: {len(missing)} of {len(wanted)} weights are missing "
            f"(first: {missing[0]}). Compare ddconfig, embed_dim and n_embed with the checkpoint's config."
        )
    for key, value in wanted.items():
        if state[prefix + key].shape != value.shape:
            raise UserError(
                f"{path} does not fit the first stage of the config: {key} is {tuple(state[prefix + key].shape)}, "
                f"expected {tuple(value.shape)}. Compare ddconfig, embed_dim and n_embed with the checkpoint's config."
            )
    model.load_state_dict({key: state[prefix + key] for key in wanted})
    names = {key.removeprefix(prefix) for key in state}
    ignored = sorted({name.split(".")[0] for name in names if name not in wanted})
    left = f", left {', '.join(ignored)}" if ignored else ""
    return f"first stage: loaded {len(wanted)} tensors from {path}{left}"


def load_discriminator(discriminator: nn.Module, path: str | Path) -> bool:
    """Load the discriminator that a first stage was trained against, if it is there and fits; whether it was.

    It is `loss.discriminator.*` of a training checkpoint, or `discriminator.safetensors` of a model folder.
    """
    path = Path(path)
    file = path / "discriminator.safetensors" if path.is_dir() else path
    if not file.is_file():
        return False
    state = {key.removeprefix("loss.discriminator."): value for key, value in read_state_dict(file).items()}
    wanted = discriminator.state_dict()
    if any(key not in state or state[key].shape != value.shape for key, value in wanted.items()):
        return False
    discriminator.load_state_dict({key: state[key] for key in wanted})
    return True


def _lightning_classes(file: Path) -> list[tuple[type, str]]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (RuntimeError, ValueError):  # not a zip archive: torch.load says what is wrong
        return []
    return [(type("StandIn", (), {}), name) for name in names if name.startswith("pytorch_lightning.callbacks.")]
