"""Where PyTorch computes."""

from __future__ import annotations

from ldm.errors import UserError


def pick_device(name: str = "auto") -> str:
    """The device of `--device`: `auto` is a GPU where there is one. UserError if it is not on this machine."""
    import torch  # not at the top: a command's --help need not wait for it

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    gpus += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return gpus[0] if gpus else "cpu"
    if name == "cuda" and "cuda:0" in gpus:
        return "cuda:0"
    if name not in ("cpu", *gpus):
        raise UserError(f"device '{name}' is not on this machine; it has {', '.join(['cpu', *gpus])}; auto chooses.")
    return name
