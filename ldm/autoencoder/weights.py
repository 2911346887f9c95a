"""Weights of a first stage from disk: a model folder, a .safetensors file, or a .ckpt of ours or of CompVis' shape."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ldm.errors import UserError
from ldm.foreign.paths import allowed, inside
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.forms import file_of
from ldm.interop.weights import check_finite

# where a first stage's weights lie: bare, in a latent-diffusion checkpoint, in a checkpoint of AutoencoderStage
PREFIXES = ("", "first_stage_model.", "autoencoder.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a model folder (its model.safetensors), a .safetensors file or a .ckpt/.pt, on the CPU.

    They are mapped from the file, of which nothing is executed (`ldm.interop.checkpoint`). UserError: no such file.

    >>> torch.save({"state_dict": {"conv.weight": torch.zeros(4, 3)}}, "model.ckpt")
    >>> {name: tuple(value.shape) for name, value in read_state_dict("model.ckpt").items()}
    {'conv.weight': (4, 3)}
    """
    path = Path(path)
    file = file_of(path) or path / "model.safetensors" if path.is_dir() else allowed(path)
    if not file.is_file():
        raise UserError(f"the weights {file} do not exist; give a model folder, a .safetensors file or a .ckpt.")
    return state_dict_of(read_checkpoint(file), file)


def load_weights(model: nn.Module, path: str | Path) -> str:
    """Load a first stage's weights by name and say what was loaded in one line.

    Takes the names as they are, or under `first_stage_model.` or `autoencoder.`. Everything else in the file
    (`loss.*` of a training checkpoint, a UNet) is left. UserError: weights that are missing or of another shape.

    >>> torch.save({"first_stage_model.weight": torch.ones(1, 1), "model.out": torch.zeros(1)}, "model.ckpt")
    >>> load_weights(torch.nn.Linear(1, 1, bias=False), "model.ckpt")
    'first stage: loaded 1 tensors from model.ckpt, left model'
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
    taken = {key: state[prefix + key] for key in wanted}
    check_finite(taken, path)
    model.load_state_dict(taken)
    names = {key.removeprefix(prefix) for key in state}
    ignored = sorted({name.split(".")[0] for name in names if name not in wanted})
    left = f", left {', '.join(ignored)}" if ignored else ""
    return f"first stage: loaded {len(wanted)} tensors from {path}{left}"


def load_discriminator(discriminator: nn.Module, path: str | Path) -> bool:
    """Load the discriminator that a first stage was trained against, if it is there and fits. Returns whether it was.

    It is `loss.discriminator.*` of a training checkpoint, or `discriminator.safetensors` of a model folder.

    >>> torch.save({"loss.discriminator.weight": torch.ones(1, 1)}, "model.ckpt")
    >>> [load_discriminator(torch.nn.Linear(size, 1, bias=False), "model.ckpt") for size in (1, 2)]
    [True, False]
    """
    path = Path(path)
    file = inside(path, "discriminator.safetensors") if path.is_dir() else path
    if not file.is_file():
        return False
    state = {key.removeprefix("loss.discriminator."): value for key, value in read_state_dict(file).items()}
    wanted = discriminator.state_dict()
    if any(key not in state or state[key].shape != value.shape for key, value in wanted.items()):
        return False
    taken = {key: state[key] for key in wanted}
    check_finite(taken, path)
    discriminator.load_state_dict(taken)
    return True
