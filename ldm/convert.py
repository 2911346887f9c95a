"""Published checkpoints as model folders of this toolkit, and model folders in the forms of others."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm import model_folder
from ldm.conditioners.compose import keys_of
from ldm.config import allowing, instantiate_from_config
from ldm.diffusion.schedules import make_betas
from ldm.encoders.registry import REGISTRY
from ldm.errors import UserError, suggest
from ldm.files import owns, sha256
from ldm.foreign.paths import write_files
from ldm.foreign.settings import check_numbers
from ldm.interop.checkpoint import read_checkpoint
from ldm.interop.converted import Converted
from ldm.interop.diffusers_names import to_convolutions
from ldm.interop.export import apart
from ldm.interop.forms import file_of
from ldm.interop.noise_buffers import schedule_buffers
from ldm.interop.terms import licence_beside

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

# Families of published models, the first that recognises a source reads it: name -> (recogniser, reader).
#   recogniser(path, content) -> bool; content is what `read_checkpoint` gives of a file, None of a folder
#   reader(path, content, *, <options that it takes>) -> Converted; options are those of `read_published`, each passed
#   only where the user gave it
FAMILIES = {
    "mitotic-figure DPM": ("ldm.interop.mitotic.is_mitotic", "ldm.interop.mitotic.read_mitotic"),
    "MIDiffusion": ("ldm.interop.midiffusion.is_midiffusion", "ldm.interop.midiffusion.read_midiffusion"),
    "ControlNet of PixCell": ("ldm.interop.pixcell_control.is_control", "ldm.interop.pixcell_control.read_control"),
    "PixCell": ("ldm.interop.pixcell.is_pixcell", "ldm.interop.pixcell.read_pixcell"),
    "virtual staining of PixCell": ("ldm.interop.staining.is_staining", "ldm.interop.staining.read_staining"),
    "representation autoencoder": ("ldm.interop.rae.is_rae", "ldm.interop.rae.read_rae"),
    "DiT-DH": ("ldm.interop.rae.is_ddt", "ldm.interop.rae.read_ddt"),
    "SiT": ("ldm.interop.sit.is_sit", "ldm.interop.sit.read_sit"),
    "conditioning model of ZoomLDM": ("ldm.interop.zoomldm_cdm.is_cdm", "ldm.interop.zoomldm_cdm.read_cdm"),
    "diffusers folder": ("ldm.interop.diffusers_folder.is_diffusers", "ldm.interop.diffusers_folder.read_diffusers"),
    "Stable Diffusion": (
        "ldm.interop.stable_diffusion.is_stable_diffusion",
        "ldm.interop.stable_diffusion.read_stable_diffusion",
    ),
    "autoencoder": ("ldm.interop.first_stages.is_autoencoder", "ldm.interop.first_stages.read_autoencoder"),
    "latent-diffusion": ("ldm.interop.compvis.is_compvis", "ldm.interop.compvis.read_compvis"),
    "guided-diffusion": ("ldm.interop.guided.is_guided", "ldm.interop.guided.read_guided"),
}
# Forms that model folders are written in: name -> writer(model folder, out, half, [betas]) -> what to say
EXPORTS = {
    "diffusers": "ldm.interop.export_diffusers.to_diffusers",
    "compvis": "ldm.interop.export_compvis.to_compvis",
}
OWN = "histoldm_config"  # in checkpoints of this toolkit's own trainings
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


@owns(beside=True)
def convert(
    source: str | Path,
    out: str | Path,
    half: bool = False,
    encoder: str | None = None,
    mpp: float | None = None,
    licence: str | None = None,
    say: Callable[[str], None] = print,
    **options: Any,
) -> Path:
    """Make a model folder of a published model; say what was guessed and what became of every tensor.

    source: a checkpoint, or a folder of diffusers. half: store the weights in float16. encoder, mpp, licence: what its
    features were made with, micrometres per pixel, terms: recorded in the folder. options: those of `read_published`.

    >>> checkpoint = published / "more" / "mid_ddpm_model" / "ckpt.pth"
    >>> folder = convert(checkpoint, "model", licence="MIT", say=lambda line: None)
    >>> sorted(path.name for path in folder.iterdir())
    ['config.yaml', 'model.safetensors']
    """
    with allowing(options.get("allow_target") or ()):
        found = read_published(source, **options)
        module = check(found, source)
        found.metadata |= _facts(found, module, encoder, mpp, licence) | {"converted_from": Path(source).name}
    for line in _account(found):
        say(line)
    return model_folder.write_model_folder(
        out, found.node, apart(found.state), found.metadata, torch.float16 if half else None, found.files
    )


@owns(beside=True)
def export_as(form: str, folder: str | Path, out: str | Path, half: bool = False) -> list[str]:
    """Write a model folder in the form of others, one of EXPORTS; gives what is to be said of it.

    >>> export_as("onnx", models / "demo-ssl", "out")
    Traceback (most recent call last):
    ldm.errors.UserError: 'onnx' is no form that models are written in. Known: compvis, diffusers.
    """
    if form not in EXPORTS:
        raise UserError(f"'{form}' is no form that models are written in{suggest(form, EXPORTS)}")
    node, _ = model_folder.read_model_folder(folder)
    write = _of(EXPORTS[form])
    given = {"betas": _betas(node.get("params") or {})} if "betas" in inspect.signature(write).parameters else {}
    return write(Path(folder), Path(out), half, **given)


def load_model(
    path: str | Path, device: str | torch.device = "cpu", allow_target: Iterable[str] = (), **options: Any
) -> LatentDiffusion:
    """A LatentDiffusion in eval mode from a model folder, a run folder, or a checkpoint of this toolkit or of others.

    options: of a published checkpoint, those of `read_published`; its project YAML is found where it lies beside it.
    allow_target: prefixes of targets outside of this package that a config may name.

    >>> load_model(models / "demo-ssl").metadata["mpp"]
    0.499
    >>> type(load_model(published / "ldm_ckpt_lid_vq").first_stage_model).__name__
    'VQModel'
    """
    path = Path(path)
    with allowing(allow_target):
        published, content = _published(path)
        if not published:
            if options:
                raise UserError(f"{_flag(next(iter(options)))} goes with a published checkpoint, which {path} is not.")
            return model_folder.load_model(path, device)
        found = _read(path, content, {"allow_target": tuple(allow_target), **options})
        if found.averages:
            _name_averages(found, build(found), path)
        for note in found.notes:
            warnings.warn(f"{path.name}: {note}", stacklevel=2)
        with tempfile.TemporaryDirectory() as folder:
            node = _with_files(found, Path(folder))
            model = model_folder.loaded(node, found.metadata, found.state, path, device, Path(folder))
        _check_fixed(found, model, path)
        if model.cond_stage_model is not None and "text" not in model.cond_stage_model.keys:  # whose null takes long
            model.check_parts()
        return model


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

    >>> found = read_published(published / "ldm_ckpt_lid_vq")
    >>> found.node["target"], found.notes[0]
    ('ldm.latent_diffusion.LatentDiffusion', 'the config is config.yaml, which lies beside the checkpoint')
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source} does not exist.")
    file = _weights_file(source)
    return _read(source, None if file.is_dir() else read_checkpoint(file), options)


def _published(path: Path) -> tuple[bool, Any]:
    """Whether a path is a model of others, and what the checkpoint holds that was read to tell."""
    whole = (path / "config.yaml").is_file() and (path / model_folder.WEIGHTS).is_file()
    if whole or (path / "checkpoints").is_dir() or not path.exists():
        return False, None
    file = _weights_file(path)
    if file.is_dir():
        return any(_of(recognises)(file, None) for recognises, _ in FAMILIES.values()), None
    content = read_checkpoint(file)
    return not _is_own(content), content


def _weights_file(source: Path) -> Path:
    """The only .ckpt, or only weight file, in a folder; else `source` itself."""
    if not source.is_dir() or any(_of(recognises)(source, None) for recognises, _ in FAMILIES.values()):
        return source
    named = file_of(source)
    only = [[path for path in source.iterdir() if path.suffix in suffixes] for suffixes in (SUFFIXES[:1], SUFFIXES)]
    file = next((files[0] for files in only if len(files) == 1), None) if named is None or len(only[0]) == 1 else named
    return source if file is None else _weights_file(file)


def weights_of(model_path: Path) -> str:
    """SHA-256 of the weights that `load_model` reads.

    >>> Path("model.safetensors").touch()
    >>> weights_of(Path("."))[:8]
    'e3b0c442'
    """
    own = [model_path / "checkpoints" / "last.ckpt", model_path / model_folder.WEIGHTS]
    return sha256(next((path for path in own if path.is_file()), _weights_file(model_path)))


def _read(source: Path, content: Any, options: Mapping[str, Any]) -> Converted:
    source = _weights_file(source)
    if _is_own(content):
        raise UserError(f"{source} is a checkpoint of this toolkit; make a model folder of it with `histoldm export`.")
    given = {name: value for name, value in options.items() if value not in (None, False, (), [])}
    for family, (recognises, reader) in FAMILIES.items():
        if _of(recognises)(source, content):
            read = _of(reader)
            takes = list(inspect.signature(read).parameters)[2:]
            for name in given:
                if name not in takes:
                    raise UserError(f"{source} is a model of the family {family}, which takes no {_flag(name)}.")
            try:
                found = read(source, content, **given)
                if "licence" not in found.metadata and (terms := licence_beside(source)):
                    found.metadata["licence"] = terms
                return found
            except (UserError, OSError):
                raise
            except Exception as error:  # a reader stumbles over entries of other kinds than the family's have
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise UserError(f"{source} is not as models of the family {family} are ({reason}).") from error
    kind = "folder" if content is None else "file"
    raise UserError(f"{source} is no model whose form is known: the {kind} fits none of {', '.join(FAMILIES)}.")


def _facts(
    found: Converted, module: nn.Module, encoder: str | None, mpp: float | None, licence: str | None
) -> dict[str, Any]:
    """Metadata of what the user says of a model that its checkpoint does not."""
    about: dict[str, Any] = {}
    if "encoder" in found.metadata and encoder is None:
        encoder = found.metadata["encoder"]["encoder"]
    if licence:
        about["licence"] = licence
    if mpp is not None:
        if not mpp > 0:
            raise UserError(f"--mpp is micrometres per pixel, above 0; got {mpp}.")
        about["mpp"] = mpp
        if hasattr(module, "first_stage_model"):
            about["tile_size"] = module.tile_size
    if encoder:
        spec = REGISTRY.get(encoder)
        about["encoder"] = {"encoder": encoder, "licence": spec.licence if spec else "not recorded"}
        conditioner = getattr(module, "cond_stage_model", None)
        key = next(iter(keys_of(conditioner, "features")), None)
        dim = None if key is None else conditioner.describe()[key].dim
        if dim is None:
            raise UserError("the model is not conditioned on features; leave --encoder out.")
        if spec is None:
            found.notes.append(f"the encoder '{encoder}' is not one that is known by name: its licence is not recorded")
        elif spec.dim != dim:
            raise UserError(f"features of {encoder} have {spec.dim} values, the model takes {dim}: another encoder's.")
    return about


def check(found: Converted, source: str | Path) -> nn.Module:
    """The module that the node builds, on the meta device.

    UserError unless weights and noise schedule are its own, name by name, and its parts go together.

    >>> found = read_published(published / "ldm_ckpt_lid_vq")
    >>> type(check(found, "model.ckpt")).__name__
    'LatentDiffusion'
    """
    module = build(found)
    _name_averages(found, module, source)
    model_folder.check_names(found.state, module.state_dict(), source)
    if getattr(module, "cond_stage_model", None) is not None:  # without, a context may come as a tensor
        module.check_parts()
    _check_fixed(found, module, source)
    return module


def _name_averages(found: Converted, module: nn.Module, source: str | Path) -> None:
    """Give averaged weights, of a file that holds no others, the names of what they are averages of."""
    if not found.averages:
        return
    names = {}
    for name in module.state_dict():
        beginning = "model." if name.startswith("model.") else ""
        names[beginning + name.removeprefix(beginning).replace(".", "")] = name
    if strange := [name for name in found.averages if name not in names]:
        raise UserError(f"{len(strange)} averaged weights of {source} are of no weight of the model ({strange[0]}).")
    found.state |= to_convolutions({names[name]: value for name, value in found.averages.items()})
    found.averages = {}


def _check_fixed(found: Converted, module: nn.Module, source: str | Path) -> None:
    """UserError unless what a source holds that is no weight is what the model computes."""
    if found.schedule:
        _check_schedule(found, source)
    if found.positions is not None:
        own, held = module.model.diffusion_model.positions_of(), found.positions[0].float()
        if own.shape != held.shape or (own - held).abs().max() > 1e-3:
            raise UserError(f"{source} holds positions (pos_embed) that are not those of its kind; it is refused.")


def _check_schedule(found: Converted, source: str | Path) -> None:
    for name, wanted in schedule_buffers(_betas(found.node["params"])).items():
        held = found.schedule.get(name)
        if held is None:
            continue
        if held.shape != wanted.shape:
            raise UserError(f"{source} was trained with {held.numel()} noise levels, its config says {len(wanted)}.")
        wrong = ~torch.isclose(held.double(), wanted, rtol=max(1e-4, 4 * torch.finfo(held.dtype).eps), atol=1e-6)
        if wrong.any():
            at = int(wrong.nonzero()[-1])
            raise UserError(
                f"the noise schedule in {source} is not that of its config: {name} at step {at} is "
                f"{float(held[at]):.6g}, the config gives {float(wanted[at]):.6g}. Correct beta_schedule, timesteps, "
                "linear_start and linear_end in the YAML."
            )


def _betas(params: Mapping[str, Any]) -> Tensor:
    """The betas (T,) of a diffusion model's parameters."""
    names = ("timesteps", "linear_start", "linear_end", "cosine_s")
    return make_betas(params.get("beta_schedule", "linear"), **{name: params[name] for name in names if name in params})


def build(found: Converted) -> nn.Module:
    """The module of a converted model, without its weights, on the meta device.

    >>> module = build(read_published(published / "ldm_ckpt_lid_vq"))
    >>> next(module.parameters()).device
    device(type='meta')
    """
    with tempfile.TemporaryDirectory() as folder:
        node = _with_files(found, Path(folder))
        check_numbers(node, "the model", "model")
        with torch.device("meta"), model_folder.built_of(folder, found.state, "the model"):
            return instantiate_from_config(node)


def _account(found: Converted) -> list[str]:
    """What is to be said of a conversion: notes, then how many tensors were taken and why others were not."""
    lines = [f"note: {note}" for note in found.notes]
    count = sum(value.numel() for value in found.state.values())
    unknown = "none is stated beside the weights; look it up, and record it by --licence"
    lines.append(f"licence: {found.metadata.get('licence', unknown)}")
    if encoder := found.metadata.get("encoder"):
        lines.append(f"features: {encoder['encoder']} ({encoder['licence']})")
    lines.append(f"{len(found.state)} tensors taken, {count / 1e6:.2f} M values")
    for reason, number in Counter(found.unused.values()).items():
        first = next(name for name, why in found.unused.items() if why == reason)
        lines.append(f"{number} left: {reason} ({first}{', ...' if number > 1 else ''})")
    return lines


def _with_files(found: Converted, folder: Path) -> dict[str, Any]:
    """The node of a converted model, whose files are written to `folder`."""
    write_files(found.files, folder, found.metadata.get("converted_from", "the model"))
    return model_folder.within(found.node, folder)


def _is_own(content: Any) -> bool:
    """Whether a checkpoint is of a training of this toolkit."""
    return isinstance(content, dict) and OWN in content


def _of(name: str) -> Callable[..., Any]:
    home, _, attribute = name.rpartition(".")
    return getattr(import_module(home), attribute)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
