"""Pipeline folders as diffusers writes them, and single networks of such, as models of this toolkit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config import foreign_config
from ldm.errors import UserError
from ldm.foreign.paths import only_within
from ldm.foreign.settings import read_json, settings_text
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.clip_config import KNOWN
from ldm.interop.converted import Converted
from ldm.interop.diffusers_config import schedule_params, unet_node, vae_node
from ldm.interop.diffusers_names import modern, renamed, to_convolutions
from ldm.interop.targets import FIRST_STAGES, LATENT_DIFFUSION, REPRESENTATIONS, TEXT_EMBEDDER
from ldm.interop.text_names import left_out, open_clip_config, to_open_clip
from ldm.interop.weights import check_finite

UNET, FIRST_STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
BESIDE = ("tokenizer", "scheduler")
MARKS = ("time_embedding.linear_1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight")  # of weights without folder
WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")


def is_diffusers(path: Path, content: Any) -> bool:
    """Whether a folder is a pipeline of diffusers or one of its networks, or a file the weights of such a network.

    >>> is_diffusers(published / "diffusers_sd1", None), is_diffusers(models / "demo-ssl", None)
    (True, False)
    """
    if content is not None:
        return isinstance(content, Mapping) and any(name in content for name in MARKS)
    if (path / "model_index.json").is_file() or any((path / part / "config.json").is_file() for part in PARTS):
        return True
    with only_within(path):
        config = path / "config.json"
        return config.is_file() and str(json_of(config).get("_class_name")) in PARTS.values()


def read_diffusers(path: Path, content: Any, *, base: str | Path | None = None, raw_weights: bool = False) -> Converted:
    """A pipeline's folder (model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/), or one network of it.

    base: a model folder, or a pipeline's, that gives the parts which `path` lacks, as a UNet alone does. raw_weights:
    take unet/ of a training checkpoint that has an average, unet_ema/, too. UserError: missing files, a kind of
    network or a setting that has no counterpart here, parts that do not go together.

    >>> found = read_diffusers(published / "diffusers_sd1", None)
    >>> found.metadata["scheduler"]["class"]
    'DDIMScheduler'
    """
    folder = path if content is None else path.parent
    whole = None if base is None else base_model(Path(base))
    with only_within(folder):
        return _read(folder, whole, raw_weights)


def _read(folder: Path, base: Converted | None, raw_weights: bool) -> Converted:
    parts = _parts(folder, raw_weights)
    if set(parts) == {"vae"}:
        return first_stage_in(parts["vae"])
    found = base or Converted({"target": LATENT_DIFFUSION, "params": {"use_ema": False}}, {})
    if base is None and (lacking := [part for part in ("unet", "vae", "scheduler") if part not in parts]):
        raise UserError(
            f"{folder} has no {' and no '.join(lacking)}; name the model folder, or the pipeline's, that it goes with "
            "by --base."
        )
    if "vae" in parts:
        _add_vae(found, parts["vae"])
    if "unet" in parts:
        _add_unet(found, parts["unet"], based=base is not None)
    if "text_encoder" in parts:
        _add_text(found, parts["text_encoder"], parts.get("tokenizer"))
    if "scheduler" in parts:
        _add_scheduler(found, parts["scheduler"])
    beside = {path.parent for path in folder.glob("*/*") if path.suffix in (".safetensors", ".bin")}
    for other in sorted(beside - set(parts.values())):
        twin = other.name in ("unet", "unet_ema")  # the weights of the last step, and their average
        found.unused[f"{other.name}/"] = "the other is taken" if twin else "a part of the pipeline, not of the model"
    if not found.node["params"].get("cond_stage_config"):
        found.notes.append(
            f"{folder} has no text_encoder: the network's context is to be given as a tensor, "
            'cond={"crossattn": ...}'
        )
    if any(value.is_floating_point() and value.itemsize < 4 for value in found.state.values()):
        found.notes.append("weights are stored in half precision; they are computed with in float32")
    _check_together(found.node["params"])
    return found


def json_of(path: Path) -> dict[str, Any]:
    """A JSON file's mapping. UserError: missing or unreadable.

    >>> json_of(published / "diffusers_sd1" / "vae" / "config.json")["latent_channels"]
    4
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; copy the whole folder.")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings by name.")
    return content


def weights_in_folder(folder: Path, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of a network's folder: one file or sharded, .safetensors or .bin; a variant if there is no other.

    >>> weights_in_folder(published / "diffusers_sd1" / "vae", [])["decoder.conv_in.bias"].ndim
    1
    """
    for suffix in ("safetensors", "bin"):
        for stem in WEIGHTS:
            if (folder / f"{stem}.{suffix}").is_file():
                return _tensors(folder / f"{stem}.{suffix}")
            if (folder / f"{stem}.{suffix}.index.json").is_file():
                return _tensors(folder / f"{stem}.{suffix}.index.json")
    for stem in WEIGHTS:
        for suffix in ("safetensors", "bin"):
            variants = sorted(folder.glob(f"{stem}.*.{suffix}"), key=lambda file: len(file.name))
            indices = sorted(folder.glob(f"{stem}.{suffix}.index.*.json"))
            if chosen := [file for file in variants if "-of-" not in file.name] or indices:
                notes.append(f"{folder.name}: the weights are those of {chosen[0].name}")
                return _tensors(chosen[0])
    raise UserError(f"{folder} has no weights: {WEIGHTS[0]}.safetensors, {WEIGHTS[1]}.safetensors or {WEIGHTS[2]}.bin.")


def _tensors(file: Path) -> dict[str, Tensor]:
    return state_dict_of(read_checkpoint(file), file)


def _parts(folder: Path, raw_weights: bool) -> dict[str, Path]:
    """Where the parts of a pipeline, or a network alone, lie."""
    if (folder / "config.json").is_file():
        kind = str(json_of(folder / "config.json").get("_class_name"))
        for part, name in PARTS.items():
            if kind == name and part != "text_encoder":
                return {part: folder}
        raise UserError(f"{folder} is a {kind}; a UNet2DConditionModel or an AutoencoderKL can be converted.")
    index = {}
    if (folder / "model_index.json").is_file():
        index = json_of(folder / "model_index.json")
    for part, entry in index.items():
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if part.startswith("_") or kind is None:
            continue
        if part in PARTS and kind not in (PARTS[part], f"{PARTS[part]}WithProjection"):
            raise UserError(f"the pipeline's {part} is a {kind}; a {PARTS[part]} can be converted.")
        if part in (*PARTS, *BESIDE) and not (folder / part).is_dir():
            raise UserError(f"{folder} has no {part}/, which its model_index.json names; copy the whole folder.")
        if part.endswith("_2") or part in ("transformer", "prior", "controlnet", "bert", "vqvae"):
            raise UserError(f"the pipeline has a {part}, Stable Diffusion 1 and 2 have none: it is not supported.")
    parts = {part: folder / part for part in (*PARTS, *BESIDE) if (folder / part).is_dir()}
    if not index and not raw_weights and (folder / "unet_ema").is_dir():
        parts["unet"] = folder / "unet_ema"
    if "unet" not in parts and "vae" not in parts:
        raise UserError(f"the pipeline {folder} has neither a unet/ nor a vae/.")
    return parts


def base_model(folder: Path) -> Converted:
    """A whole model to replace parts of: a model folder of this toolkit, or a pipeline's.

    >>> base_model(models / "demo-ssl").node["target"]
    'ldm.latent_diffusion.LatentDiffusion'
    """
    if not (folder / "config.yaml").is_file():
        if folder.is_dir() and is_diffusers(folder, None):
            return read_diffusers(folder, None)
        raise UserError(f"the base {folder} is neither a model folder (config.yaml) nor a pipeline's folder.")
    base = read_own(folder)
    if base.node["target"] != LATENT_DIFFUSION:
        raise UserError(f"the base {folder} is a first stage; give the folder of a whole diffusion model.")
    return base


def read_own(folder: Path) -> Converted:
    """A model folder of this toolkit, of a diffusion model or a first stage. UserError: it is none.

    >>> read_own(models / "demo-ssl").metadata["mpp"]
    0.499
    """
    with only_within(folder):
        return _read_own(folder)


def _read_own(folder: Path) -> Converted:
    config = foreign_config(folder / "config.yaml")
    node = config.get("model") or {}
    if node.get("target") not in (LATENT_DIFFUSION, REPRESENTATIONS, *FIRST_STAGES.values()):
        raise UserError(
            f"{folder} is not the model folder of a diffusion model or of a first stage; its model is "
            f"{node.get('target')}."
        )
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} has no model.safetensors; copy the whole model folder.")
    known = ("config.yaml", "model.safetensors")
    files = {
        file.name: settings_text(file, "the file")
        for file in folder.iterdir()
        if file.is_file() and file.suffix in (".json", ".txt", ".yaml", ".csv") and file.name not in known
    }
    state = read_checkpoint(folder / "model.safetensors")
    check_finite(state, folder)
    return Converted(node, state, config.get("metadata") or {}, files)


def replace_part(found: Converted, prefix: str, state: Mapping[str, Tensor]) -> None:
    """Put a part's tensors in place of those whose names begin so.

    >>> found = Converted({}, {"model.a": torch.zeros(1), "first_stage_model.a": torch.zeros(1)})
    >>> replace_part(found, "model.", {"b": torch.ones(1)})
    >>> list(found.state)
    ['first_stage_model.a', 'model.b']
    """
    kept = {name: value for name, value in found.state.items() if not name.startswith(prefix)}
    found.state = kept | {prefix + name: value for name, value in state.items()}


def _add_unet(found: Converted, folder: Path, based: bool) -> None:
    config = json_of(folder / "config.json")
    node, modules = unet_node(config, str(folder / "config.json"), found.notes)
    state = renamed(weights_in_folder(folder, found.notes), modules, str(folder))
    params, other = node["params"], found.node["params"].get("unet_config", {}).get("params", {})
    if based:
        for name in ("in_channels", "out_channels", "context_dim"):
            if other.get(name) != params[name]:
                raise UserError(f"{folder} has {name} {params[name]}, the base's UNet has {other.get(name)}.")
    if params["image_size"] is None:
        params["image_size"] = other.get("image_size", 64)
        found.notes.append(f"{folder} does not say its size; latents of {params['image_size']} are assumed.")
    found.node["params"]["unet_config"] = node
    replace_part(found, UNET, to_convolutions(state))


def _add_vae(found: Converted, folder: Path) -> None:
    vae = first_stage_in(folder)
    found.notes += vae.notes
    params = found.node["params"]
    params.pop("shift_factor", None)
    params |= {"first_stage_config": vae.node, **vae.metadata}
    params.pop("scale_by_std", None)
    found.state.pop("scale_factor", None)
    replace_part(found, FIRST_STAGE, vae.state)


def first_stage_in(folder: Path) -> Converted:
    """The AutoencoderKL in a folder of diffusers; scale and shift of its latents are its metadata.

    >>> first_stage_in(published / "diffusers_sd1" / "vae").metadata
    {'scale_factor': 0.18215}
    """
    config, notes = json_of(folder / "config.json"), []
    node, modules, scale = vae_node(config, str(folder / "config.json"), notes)
    state = renamed(modern(weights_in_folder(folder, notes)), modules, str(folder))
    return Converted(node, to_convolutions(state), scale, notes=notes)


def _add_text(found: Converted, folder: Path, tokenizer: Path | None) -> None:
    config = json_of(folder / "config.json")
    state = weights_in_folder(folder, found.notes)
    own = open_clip_config(config)
    own["embed_dim"] = own["embed_dim"] or own["text_cfg"]["width"]
    name = str(config.get("_name_or_path") or "") or f"text encoder of {folder.resolve().parent.name}"
    node, files = _text_condition(own, name, bool(config.get("use_attention_mask")), _padding(tokenizer))
    found.node["params"]["cond_stage_config"] = node
    replace_part(found, TEXT, {f"tower.{key}": value for key, value in to_open_clip(state).items()})
    found.files = files
    found.unused |= {f"text_encoder/{key}": why for key, why in left_out(state).items()}
    if tokenizer and (words := _vocabulary(tokenizer)) and words != clip_vocabulary():
        found.notes.append(f"{tokenizer} has other words than CLIP's, by which captions are read here: give token ids")


def _text_condition(
    config: Mapping[str, Any], name: str, mask_padding: bool = False, pad: str = "eos"
) -> tuple[dict[str, Any], dict[str, str]]:
    """The node of a CLIP text tower as Stable Diffusion is conditioned by it, and the files that the node names."""
    name, licence = KNOWN.get(name, (name, "unknown"))
    about = {"name": name, "licence": licence, **config}
    params = {"model": "./text_model.json", "mask_padding": mask_padding, "pad": pad}
    node = {"target": TEXT_EMBEDDER, "params": params}
    return node, {"text_model.json": json.dumps(about, indent=2)}


def _padding(tokenizer: Path | None) -> str:
    """What fills a caption's tokens: eos (Stable Diffusion 1), or zero, "!" (2)."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if tokenizer and (tokenizer / name).is_file() and "pad_token" in (words := json_of(tokenizer / name)):
            pad = words["pad_token"]
            pad = pad.get("content") if isinstance(pad, dict) else pad
            known = {"<|endoftext|>": "eos", "!": "zero"}
            if pad not in known:
                raise UserError(f"{tokenizer / name}: captions are padded with {pad!r}; known are {', '.join(known)}.")
            return known[pad]
    return "eos"


def _vocabulary(tokenizer: Path) -> dict[str, int] | None:
    if (tokenizer / "vocab.json").is_file():
        return json_of(tokenizer / "vocab.json")
    if (tokenizer / "tokenizer.json").is_file():
        return json_of(tokenizer / "tokenizer.json").get("model", {}).get("vocab")
    return None


def clip_vocabulary() -> dict[str, int]:
    """CLIP's words and their ids, as tokenizer/vocab.json has them.

    >>> clip_vocabulary()["<|startoftext|>"]
    49406
    """
    from open_clip.tokenizer import SimpleTokenizer

    words = dict(SimpleTokenizer().encoder)
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {ends.get(word, word): index for word, index in words.items()}


def _add_scheduler(found: Converted, folder: Path) -> None:
    path = folder / "scheduler_config.json"
    config = json_of(path)
    found.node["params"].pop("cosine_s", None)
    found.node["params"] |= schedule_params(config, str(path), found.notes)
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    found.metadata["scheduler"] = {"class": config.get("_class_name", "")} | own


def _check_together(params: Mapping[str, Any]) -> None:
    """UserError unless network, first stage and text tower have the same channels."""
    unet, latent = params["unet_config"]["params"], params["first_stage_config"]["params"].get("embed_dim")
    if unet["in_channels"] != latent or unet["out_channels"] != latent:
        raise UserError(
            f"the UNet takes {unet['in_channels']} and gives {unet['out_channels']} channels, the first stage's latent "
            f"has {latent}: inpainting, upscaling and depth models are not supported."
        )
