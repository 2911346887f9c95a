"""Published checkpoints as model folders of this toolkit, and model folders in the forms of others."""

from __future__ import annotations

import inspect
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import model_folder
from ldm.config import instantiate_from_config
from ldm.errors import UserError, suggest
from ldm.interop.checkpoint import read_checkpoint
from ldm.interop.converted import Converted

# Families of published models, the first that recognises a source reads it: name -> (recogniser, reader).
#   recogniser(path, content) -> bool; content is what `read_checkpoint` gives of a file, None of a folder
#   reader(path, content, *, <options that it takes>) -> Converted; options are those of `read_published`, each passed
#   only where the user gave it
FAMILIES = {
    "mitotic-figure DPM": ("ldm.interop.mitotic.is_mitotic", "ldm.interop.mitotic.read_mitotic"),
    "MIDiffusion": ("ldm.interop.midiffusion.is_midiffusion", "ldm.interop.midiffusion.read_midiffusion"),
    "diffusers folder": ("ldm.interop.diffusers_folder.is_diffusers", "ldm.interop.diffusers_folder.read_diffusers"),
    "Stable Diffusion": (
        "ldm.interop.stable_diffusion.is_stable_diffusion", "ldm.interop.stable_diffusion.read_stable_diffusion",
    ),
    "latent-diffusion": ("ldm.interop.compvis.is_compvis", "ldm.interop.compvis.read_compvis"),
    "guided-diffusion": ("ldm.interop.guided.is_guided", "ldm.interop.guided.read_guided"),
}  # fmt: skip
# Forms that model folders are written in: name -> writer(model folder, out, half) -> notes
EXPORTS = {
    "diffusers": "ldm.interop.export.to_diffusers",
    "compvis": "ldm.interop.export.to_compvis",
}
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
NOT_LOADED = "is no checkpoint of this toolkit and none whose form is known"


def convert(
    source: str | Path,
    out: str | Path,
    half: bool = False,
    metadata: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> Path:
    """Make a model folder of a published model; say what was guessed and what became of every tensor.

    source: a checkpoint, or a folder of diffusers. half: store the weights in float16. metadata: is added to what the
    source tells. options: those of `read_published`.
    """
    found = read_published(source, **options)
    check(found, source)
    for line in account(found):
        say(line)
    about = {**found.metadata, **(metadata or {}), "converted_from": Path(source).name}
    return model_folder.write_model_folder(
        out, found.node, _apart(found.state), about, torch.float16 if half else None, found.files
    )


def read_published(source: str | Path, **options: Any) -> Converted:
    """What a published checkpoint or folder holds, in this toolkit's terms.

    Options, each only where the family takes it (None is not given):
        config: the YAML that the weights were trained with; the one that lies beside a checkpoint is found.
        raw_weights: take the weights of the last step, where there are averaged ones too.
        classes: names of the classes, in the order of their embeddings.
        mutation_genes, expression_genes: files with the names of genes, in the order of their embeddings.
        base: model folder that gives the parts which a checkpoint of a network alone lacks.
        allow_target: prefixes of further targets that a config may name.
    UserError: an unreadable file, a form that is not known, an option that its family does not take.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source} does not exist.")
    content = None if source.is_dir() else read_checkpoint(source)
    for family, (recognises, reader) in FAMILIES.items():
        if _of(recognises)(source, content):
            read = _of(reader)
            given = {name: value for name, value in options.items() if value not in (None, False, (), [])}
            takes = list(inspect.signature(read).parameters)[2:]
            for name in given:
                if name not in takes:
                    raise UserError(f"{source} is a model of the family {family}, which takes no {_flag(name)}.")
            return read(source, content, **given)
    kind = "folder" if content is None else "file"
    raise UserError(f"{source} {NOT_LOADED}: the {kind} fits none of {', '.join(FAMILIES)}.")


def check(found: Converted, source: str | Path) -> None:
    """UserError unless the weights are, by name and shape, those of the module that their node builds."""
    wanted = build(found).state_dict()
    model_folder.check_names(found.state, wanted, source)


def build(found: Converted) -> nn.Module:
    """The module of a converted model, without its weights, on the meta device."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in found.files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        with torch.device("meta"):
            return instantiate_from_config(model_folder.within(found.node, Path(folder)))


def account(found: Converted) -> list[str]:
    """What is to be said of a conversion: notes, then how many tensors were taken and why others were not."""
    lines = [f"note: {note}" for note in found.notes]
    count = sum(value.numel() for value in found.state.values())
    lines.append(f"{len(found.state)} tensors taken, {count / 1e6:.2f} M values")
    reasons = Counter(found.unused.values())
    for reason, number in reasons.items():
        first = next(name for name, why in found.unused.items() if why == reason)
        lines.append(f"{number} left: {reason} ({first}{', ...' if number > 1 else ''})")
    return lines


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that share memory with another copied: a .safetensors file holds each by itself."""
    seen: set[int] = set()
    apart = {}
    for name, value in state.items():
        where = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if where in seen else value
        seen.add(where)
    return apart


def _of(name: str) -> Callable[..., Any]:
    home, _, attribute = name.rpartition(".")
    return getattr(import_module(home), attribute)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
