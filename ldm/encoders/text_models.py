"""Text models on this disk: the config, the files and the terms of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from ldm.config import shipped
from ldm.encoders.registry import weights_home
from ldm.encoders.text_registry import REGISTRY, TextModel
from ldm.errors import UserError, suggest
from ldm.foreign.paths import inside
from ldm.foreign.settings import read_json
from ldm.interop.text_names import text_config

TOKEN_TRANSFORMER = "token_transformer"  # in text_cfg: the tower is CompVis' own
CONFIGS = ("open_clip_config.json", "config.json")
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class TowerSource:
    """A text model on disk: its config (as open_clip's model configs; of a BERT, its own as `hf_config`), files, terms.

    weights is None where none are to be read: a bare config, or a model that is built to be filled afterwards.
    """

    name: str
    licence: str
    config: dict[str, Any]
    weights: Path | None = None
    tokenizer: Path | None = None

    @property
    def is_bert(self) -> bool:
        """Whether its words are a BERT's."""
        return _has_bert_words(self.config)

    def as_json(self) -> str:
        """The config with name and licence, as one JSON file that `find_tower` reads."""
        about = {"name": self.name, "licence": self.licence}
        return json.dumps(about | {key: value for key, value in self.config.items() if key != "vision_cfg"}, indent=2)


def find_tower(model: str, weights: str | None = None, tokenizer: str | None = None) -> TowerSource:
    """What `model` is: a name of REGISTRY, a folder, a JSON model config, or an open_clip architecture.

    weights: a weight file, or a folder that holds it. Nothing is downloaded, and on the meta device no weights are
    looked for. Raises UserError: unknown name, missing files (it says what they are, where to get them, their licence
    and where to put them), a config that is none of a CLIP.

    >>> find_tower("plip", weights="downloads")
    Traceback (most recent call last):
    ldm.errors.UserError: the text model 'plip' has no weights: downloads does not exist. Get config.json, ...
    """
    known, folder = REGISTRY.get(model), None
    if model.endswith(".json"):
        config, name = read_config(shipped(model)), Path(model).stem
    elif known or Path(model).is_dir():
        folder = weights_home() / model if known else Path(model)
        folder = Path(weights) if weights and Path(weights).is_dir() else folder
        config, name = _folder_config(folder, known), folder.name
    elif model in open_clip.list_models():
        config, name = open_clip.get_model_config(model), model
        if not (weights or torch.empty(0).is_meta):
            raise UserError(
                f"the text model '{model}' is an architecture; `weights` names its checkpoint on disk (open_clip's "
                "names, or transformers'). Nothing is downloaded."
            )
    else:
        raise UserError(
            f"'{model}' is no folder, no JSON file, no architecture of open_clip (such as ViT-L-14) and no text model "
            f"known by name{suggest(model, REGISTRY)}"
        )
    place = Path(weights) if weights else folder
    file = None if place is None or torch.empty(0).is_meta else _weight_file(place, model, known)
    words = None
    if _has_bert_words(config):  # CLIP's own words are in open_clip
        words = Path(tokenizer) if tokenizer else inside(folder or Path(), "tokenizer.json")
        if not words.is_file():
            raise UserError(f"the text model '{model}' needs a tokenizer.json; none is at {words}.{_where(known)}")
    if known:
        return TowerSource(known.name, known.licence, config, file, words)
    return TowerSource(config.pop("name", name), config.pop("licence", "unknown"), config, file, words)


def _has_bert_words(config: Mapping[str, Any]) -> bool:
    return bool(config["text_cfg"].get("hf_model_name")) or bool(config["text_cfg"].get(TOKEN_TRANSFORMER))


def _where(known: TextModel | None) -> str:
    if known is None:
        return ""
    files = ", ".join(file.replace("|", " or ") for file in known.files)
    return (
        f" Get {files} from {known.source} (licence: {known.licence}) and put them into {weights_home() / known.name}, "
        "or say where they are (`weights`; $HISTOLDM_WEIGHTS replaces the folder of all weights)."
    )


def _weight_file(place: Path, model: str, known: TextModel | None) -> Path:
    if place.is_file():
        return place
    found = next((inside(place, name) for name in WEIGHTS if (place / name).is_file()), None)
    if found is None:
        what = f"{place} has none of {', '.join(WEIGHTS)}" if place.is_dir() else f"{place} does not exist"
        raise UserError(f"the text model '{model}' has no weights: {what}.{_where(known)}")
    return found


def _folder_config(folder: Path, known: TextModel | None) -> dict[str, Any]:
    found = next((inside(folder, name) for name in CONFIGS if (folder / name).is_file()), None)
    if found:
        return read_config(found)
    if not (known and known.arch):
        raise UserError(f"the text model's folder {folder} has none of {', '.join(CONFIGS)}.{_where(known)}")
    return open_clip.get_model_config(known.arch)


def read_config(path: Path) -> dict[str, Any]:
    """A model config as open_clip has them, of its own files, of open_clip_config.json or of transformers' CLIP.

    >>> Path("config.json").write_text('{"model_type": "clip_text_model", "hidden_size": 768}')
    53
    >>> read_config(Path("config.json"))["text_cfg"]["width"]
    768
    """
    config = text_config(read_json(path, "the text model's config"), f"the text model's config {path}")
    if config["text_cfg"].get("hf_model_name") and "hf_config" not in config:
        bert = inside(path.parent, "config.json")
        if not bert.is_file():
            raise UserError(
                f"{path} names the text tower {config['text_cfg']['hf_model_name']}, whose own config is not beside "
                f"it: put its config.json into {path.parent}, and its tokenizer.json."
            )
        return text_config({**config, "hf_config": read_json(bert, "the text tower's config")}, bert)
    return config
