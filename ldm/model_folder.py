"""Model folders: what a user keeps and shares. `model.safetensors`, and `config.yaml` with everything else it needs.

    model: {target, params}     builds the module; paths in it begin with ./ and are files of the folder
    metadata: {...}             encoder and licence, mpp, tile size, training provenance

Checkpoints (`.ckpt`) are for resuming; `export` makes a model folder of one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.autoencoder.weights import read_state_dict
from ldm.config import SHIPPED, foreign_config, instantiate_from_config, modules_only, save_config
from ldm.devices import pick_device
from ldm.encoders.registry import weights_home
from ldm.errors import UserError
from ldm.files import CARD, names_in, owns, whole
from ldm.foreign.budget import afford
from ldm.foreign.modules import as_large_as
from ldm.foreign.paths import only_within, write_files
from ldm.foreign.settings import check_numbers, check_settings
from ldm.foreign.shape import ABOVE_0, MAPPING, SIZE, TEXT, Is, check_shape, maybe
from ldm.interop.checkpoint import read_checkpoint
from ldm.interop.forms import name_form
from ldm.interop.weights import averaged, check_finite, in_words, not_finite
from ldm.model_card import begun_card

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

FIRST_STAGE_FOLDER = "ldm.model_folder.load_first_stage"
WEIGHTS = "model.safetensors"
PROJECTION = "repa."  # of an alignment, which trains alone
AUTOENCODER = "autoencoder."  # the first stage within its training
EMBEDDED = ("histoldm_config", "histoldm_metadata", "histoldm_conditioner", "histoldm_first_stage", "histoldm_student")
TRAINING_ONLY = (
    "ckpt_path", "seed", "ema_decay", "warmup_steps", "decay_steps", "weight_decay", "monitor", "repa", "lora",
)  # fmt: skip
_METADATA = {
    "mpp?": maybe(ABOVE_0), "tile_size?": maybe(SIZE), "licence?": maybe(TEXT), "encoder?": maybe(MAPPING),
    "conditions?": maybe(MAPPING), "field?": {"feature": TEXT, "stride": SIZE},
}  # fmt: skip
_NODE = {"target": TEXT, "params": MAPPING}
_CHECKPOINT = {
    "histoldm_config": {"model": _NODE}, "state_dict": {"*": Is("a tensor", lambda value: isinstance(value, Tensor))},
    "histoldm_files?": MAPPING, "histoldm_first_stage?": maybe(MAPPING), "histoldm_conditioner?": maybe(MAPPING),
    "histoldm_lora?": {"base": TEXT}, "histoldm_student?": _NODE,
}  # fmt: skip
PREFIX = {"network": "model.", "first stage": "first_stage_model.", "conditioner": "cond_stage_model."}


def write_model_folder(
    folder: str | Path,
    node: Mapping[str, Any],
    state: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a model folder whole or not at all; an existing model folder there is replaced, but for its card.

    files: name -> text of further files, which the node names as "./name".
    dtype: store floating tensors in this precision (float16 halves the file); they are read back as float32.

    >>> node = {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 1}}
    >>> folder = write_model_folder("tiny", node, torch.nn.Linear(2, 1).state_dict(), {"licence": "MIT"})
    >>> read_model_folder(folder)[1]
    {'licence': 'MIT'}
    """
    folder = Path(folder)
    check_settings({"model": node, "metadata": metadata}, folder)
    tensors = {
        name: (value.to(dtype) if dtype and value.is_floating_point() and value.ndim else value)
        for name, value in state.items()
    }
    if wrong := not_finite(tensors):
        narrow = dtype is not None and not not_finite(state)
        way = "float16 does not hold such values: store them in full" if narrow else "take an earlier checkpoint"
        raise UserError(f"{folder} is not written: {in_words(wrong, tensors)}; {way}.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole(folder) as part:
            held = set(names_in(folder)) if folder.is_dir() else set()
            if folder.is_file() or (held - {CARD} and "config.yaml" not in held):
                raise UserError(f"{folder} exists and is not a model folder; give another --out.")
            part.mkdir()
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part / WEIGHTS)
            save_config({"model": dict(node), "metadata": dict(metadata)}, part / "config.yaml")
            write_files(files or {}, part, folder)
            if CARD in held:
                shutil.copy(folder / CARD, part / CARD)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. Give a folder that can be written.") from error
    return folder


def read_model_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model node and the metadata of a model folder.

    >>> node, metadata = read_model_folder(models / "demo-ssl")
    >>> node["target"], metadata["encoder"]["encoder"]
    ('ldm.latent_diffusion.LatentDiffusion', 'demo-encoder')
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        state = "is not a model folder: it has no config.yaml" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{folder} {state}. A model folder holds config.yaml and "
            "model.safetensors; `histoldm export RUN_FOLDER --out FOLDER` makes one of a training run."
        )
    with only_within(folder):
        config = foreign_config(folder / "config.yaml")
    return within(_node(config.get("model"), folder / "config.yaml"), folder), _metadata(config, folder / "config.yaml")


def _node(node: Any, source: Path) -> dict[str, Any]:
    if not (isinstance(node, Mapping) and isinstance(node.get("params") or {}, Mapping)):
        raise UserError(f"{source} has no `model: {{target, params}}`.")
    return {**node, "params": dict(node.get("params") or {})}


def _metadata(content: Mapping[str, Any], source: Path, key: str = "metadata") -> dict[str, Any]:
    metadata = content.get(key) or {}
    check_shape(metadata, _METADATA, source, key)
    return dict(metadata)


def within(value: Any, folder: Path) -> Any:
    """A config node whose paths ("./name") are those of files in `folder`.

    >>> Path("genes.txt").touch()
    >>> within({"mutation_genes": "./genes.txt", "dim": 8}, Path("."))
    {'mutation_genes': 'genes.txt', 'dim': 8}
    """
    if isinstance(value, Mapping):
        return {key: within(child, folder) for key, child in value.items()}
    if isinstance(value, list):
        return [within(child, folder) for child in value]
    if isinstance(value, str) and value.startswith("./"):
        if "/" in value[2:] or not (folder / value).is_file():
            raise UserError(f"{folder / 'config.yaml'} names {value}, which is no file of the folder; copy it whole.")
        return str(folder / value)
    return value


def load_first_stage(folder: str) -> nn.Module:
    """The frozen first stage of a model folder, its own or a diffusion model's, in eval mode with float32 weights.

    >>> first_stage = load_first_stage(models / "demo-ssl")
    >>> first_stage.latent(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 8, 8, 8])
    """
    node, state = _first_stage_node(folder), _weights_of(folder)
    inner = PREFIX["first stage"]
    if any(name.startswith(inner) for name in state):
        state = {name.removeprefix(inner): value for name, value in state.items() if name.startswith(inner)}
    return _filled(node, state, Path(folder), Path(folder)).eval().requires_grad_(False)


def _first_stage_node(folder: str | Path) -> dict[str, Any]:
    """The node of the first stage in a model folder: the folder's own, or that of the diffusion model in it."""
    node, _ = read_model_folder(folder)
    return node["params"].get("first_stage_config", node)


def resolve_first_stage(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The node that builds a first stage: `node`, or what is in the model folder that it names.

    >>> node = {"target": FIRST_STAGE_FOLDER, "params": {"folder": str(models / "demo-ssl")}}
    >>> resolve_first_stage(node)["target"]
    'ldm.autoencoder.autoencoder.AutoencoderKL'
    """
    return _first_stage_node(node["params"]["folder"]) if node["target"] == FIRST_STAGE_FOLDER else node


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LatentDiffusion:
    """A LatentDiffusion in eval mode from a model folder, a run folder or one of its checkpoints.

    The averaged weights are used where there are any. Errors: not a model folder, missing weight file, weights that
    do not fit the config.

    >>> load_model(models / "demo-ssl").tile_size
    256
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"model {path} does not exist.")
    checkpoint = path if path.is_file() else path / "checkpoints" / "last.ckpt"
    if checkpoint.exists():
        node, metadata, state, files = _parts(_read(checkpoint), checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            write_files(files, Path(folder), checkpoint)
            return loaded(within(node, Path(folder)), metadata, state, path, device, Path(folder))
    node, metadata = read_model_folder(path)
    if not (path / "model.safetensors").is_file():
        raise UserError(f"{path} has no model.safetensors; copy the whole model folder, its weights too.")
    return loaded(node, metadata, _weights_of(path), path, device)


def loaded(
    node: Mapping[str, Any],
    metadata: dict[str, Any],
    state: Mapping[str, Tensor],
    path: Path,
    device: str | torch.device,
    folder: Path | None = None,
) -> LatentDiffusion:
    """The model of a node with its weights, ready to sample from.

    path: what messages call it. folder: where the files lie that the node names; None: there.

    >>> node, metadata = read_model_folder(models / "demo-ssl")
    >>> model = loaded(node, metadata, read_state_dict(models / "demo-ssl"), Path("demo-ssl"), "cpu")
    >>> model.metadata["mpp"]
    0.499
    """
    device = pick_device(str(device))
    model = _filled(node, state, path, folder or path)
    if not hasattr(model, "build_noise_table"):
        what = "a first stage" if hasattr(model, "decode") else "no diffusion model"
        raise UserError(f"{path} is a {type(model).__name__}, {what}; give the folder of a diffusion model.")
    model.build_noise_table()
    side = model.tile_size
    afford(4 * 8 * (3 * side**2 + model.channels * model.image_size**2), f"an image of {side} x {side} px by {path}")
    model.metadata = metadata
    layout = torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format
    return model.to(device, memory_format=layout).eval().requires_grad_(False)


def load_network(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The network that a model folder holds by itself, such as a classifier of noisy images, in eval mode.

    Raises:
        UserError: the folder of a diffusion model, which `load_model` loads.

    >>> node = {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 1}}
    >>> folder = write_model_folder("tiny", node, torch.nn.Linear(2, 1).state_dict(), {"classes": ["tumour"]})
    >>> load_network(folder).metadata
    {'classes': ['tumour']}
    """
    device = pick_device(str(device))
    node, metadata = read_model_folder(folder)
    network = _filled(node, _weights_of(folder), Path(folder), Path(folder))
    if hasattr(network, "build_noise_table"):
        raise UserError(f"{folder} holds a diffusion model; give the folder of a network alone, such as a classifier.")
    network.metadata = metadata
    return network.to(device).eval().requires_grad_(False)


@contextmanager
def built_of(folder: str | Path, state: Mapping[str, Tensor], source: str | Path | None = None) -> Iterator[None]:
    """A context to build a model in whose config came from anybody: it names modules, and files of `folder` alone, and
    describes what its weights `state` have room for.

    >>> with built_of("model", {}):
    ...     instantiate_from_config({"target": "torch.optim.Adam"})
    Traceback (most recent call last):
    ldm.errors.UserError: 'torch.optim.Adam' cannot be part of a model: it is not a torch.nn.Module
    """
    with only_within(folder, SHIPPED, weights_home()), modules_only(), as_large_as(state, source or folder):
        yield


def _weights_of(folder: str | Path) -> dict[str, Tensor]:
    with only_within(folder):
        return read_state_dict(folder)


def _filled(node: Mapping[str, Any], state: Mapping[str, Tensor], path: Path, folder: Path) -> nn.Module:
    """The module of a node, which names files of `folder`, and whose parameters are the tensors of `state` themselves,
    in float32."""
    check_numbers(node, path, "model")
    with torch.device("meta"), built_of(folder, state, path):
        module = instantiate_from_config(node)
    check_names(state, module.state_dict(), path)
    if lost := {name for name, _ in module.named_buffers()} - module.state_dict().keys() - {"sigmas"}:
        raise UserError(f"{path}: its weights do not hold all of {node['target']} ({', '.join(sorted(lost))}).")
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, assign=True)
    return module


@owns(beside=True)
def export(
    path: str | Path, out: str | Path, dtype: torch.dtype | None = None, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Make a model folder of a run folder or checkpoint; `metadata` is added to what the training recorded.

    Of a LatentDiffusion: averaged weights, first stage and conditioner too. Of an AutoencoderStage: the first stage.
    With the beginning of a card; one that is there stays.

    >>> export("logs/run", "model")
    Traceback (most recent call last):
    ldm.errors.UserError: logs/run does not exist; give a run folder or a .ckpt of this toolkit.
    """
    path = Path(path)
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not checkpoint.exists():
        name_form(path)
        raise UserError(f"{checkpoint} does not exist; give a run folder or a .ckpt of this toolkit.")
    content = _read(checkpoint)
    node, recorded, state, files = _parts(content, checkpoint)
    about = {**recorded, **(metadata or {})}
    card = begun_card(Path(out).name, content["histoldm_config"], about, content.get("global_step", 0))
    return write_model_folder(out, node, state, about, dtype, {CARD: card, **files})


def _read(checkpoint: Path) -> dict[str, Any]:
    content = read_checkpoint(checkpoint)
    if not isinstance(content, dict) or "histoldm_config" not in content:
        raise UserError(f"{checkpoint} is no checkpoint of this toolkit; `histoldm convert` takes those of others.")
    return _checked(content, checkpoint)


def _checked(content: Mapping[str, Any], checkpoint: Path) -> Mapping[str, Any]:
    """The content of a checkpoint of this toolkit, whose configs are no more than `foreign_config` lets in."""
    for key in EMBEDDED:
        check_settings(content.get(key), checkpoint, key)
    return content


def _parts(
    content: Mapping[str, Any], source: Path
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Model node, metadata, inference weights and further files of a training checkpoint of this toolkit."""
    check_shape(content, _CHECKPOINT, source)
    node, state = content["histoldm_config"]["model"], dict(content["state_dict"])
    metadata = _metadata(content, source, "histoldm_metadata")
    if "first_stage" in node["params"]:  # a training of a first stage: the folder is of the autoencoder alone
        weights = {n.removeprefix(AUTOENCODER): v for n, v in state.items() if n.startswith(AUTOENCODER)}
        return node["params"]["first_stage"], metadata, weights, {}
    if lora := content.get("histoldm_lora"):
        raise UserError(
            f"{source} holds an adapter of {lora['base']}: sample from that model with --lora {source}, or put it into "
            "its weights by `histoldm export --merge 1`."
        )
    node = content.get("histoldm_student") or node
    params = dict(node["params"])
    state = averaged({n: v for n, v in state.items() if not n.startswith(PROJECTION)}, state, source)
    params["first_stage_config"] = content.get("histoldm_first_stage") or params["first_stage_config"]
    if "histoldm_conditioner" in content:
        params["cond_stage_config"] = content["histoldm_conditioner"]
    for key in TRAINING_ONLY:
        params.pop(key, None)
    params["use_ema"] = False
    return {"target": node["target"], "params": params}, metadata, state, content.get("histoldm_files", {})


def load_weights(model: nn.Module, path: str | Path, own_first_stage: bool = False) -> str:
    """Start a LatentDiffusion from the weights of `path`, by name; say in one line what was and was not taken.

    Averaged weights are preferred. The network must be there and fit. The conditioner is taken if it fits, and else
    starts fresh: a model is often fine-tuned to another condition. The first stage is taken if it fits, but never in
    place of one that the config took from a model folder of its own.

    >>> load_weights(ldm.load_model(models / "demo-ssl"), models / "demo-ssl")
    'weights of ...demo-ssl: network loaded, first stage loaded, conditioner loaded'
    """
    own = model.state_dict()
    state = averaged(read_state_dict(path), own, path)
    report = []
    for part, prefix in PREFIX.items():
        wanted = {name: value for name, value in own.items() if name.startswith(prefix)}
        given = {name: value for name, value in state.items() if name.startswith(prefix)}
        fits = {n: v.shape for n, v in given.items()} == {n: v.shape for n, v in wanted.items()}
        fits = fits and not (part == "first stage" and own_first_stage)
        if part == "conditioner" and fits and wanted:
            own_words = model.cond_stage_model.describe()
            fits = _described(path, state) in (None, own_words)  # classes or genes of other names
        if part == "network" or fits:
            check_names(given, wanted, path)
        if fits and wanted:
            model.load_state_dict({name: value.float() for name, value in given.items()}, strict=False)
        report.append(f"{part} {'loaded' if fits and wanted else 'kept'}")
    if "scale_factor" in state:
        if not model.scale_by_std:
            raise UserError(f"{path} was trained with scale_by_std; set model.params.scale_by_std: true to use it.")
        model.scale_factor.copy_(state["scale_factor"])
        model.measure_scale = False
    return f"weights of {path}: {', '.join(report)}"


def _described(path: str | Path, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What the conditioner of a model folder, or of a checkpoint of this toolkit, says of itself; else None."""
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        node = None
        if (path / "config.yaml").is_file():
            node = read_model_folder(path)[0].get("params", {}).get("cond_stage_config")
        elif isinstance(content := read_checkpoint(path), dict) and "histoldm_conditioner" in content:
            write_files(_checked(content, path)["histoldm_files"], Path(folder), path)
            node = within(content["histoldm_conditioner"], Path(folder))
        if node is None:
            return None
        check_numbers(node, path, "model")
        with torch.device("meta"), built_of(path if (path / "config.yaml").is_file() else folder, state, path):
            return instantiate_from_config(node).describe()


def check_names(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str | Path) -> None:
    """UserError unless names and shapes agree and values are finite, saying which are not.

    >>> check_names({}, {"out.weight": torch.zeros(2)}, "model")
    Traceback (most recent call last):
    ldm.errors.UserError: the weights in model do not fit their config: 1 weights are missing (first: out.weight).
    """
    missing = [name for name in wanted if name not in state]
    surplus = [name for name in state if name not in wanted]
    shapes = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or surplus or shapes:
        parts = []
        if missing:
            parts.append(f"{len(missing)} weights are missing (first: {missing[0]})")
        if surplus:
            parts.append(f"{len(surplus)} are not of this model (first: {surplus[0]})")
        if shapes:
            name = shapes[0]
            parts.append(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}")
        raise UserError(f"the weights in {source} do not fit their config: {'; '.join(parts)}.")
    check_finite(state, source)
