"""What generated files say of themselves, and which are kept from an earlier run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.convert import weights_file
from ldm.errors import UserError
from ldm.files import sha256
from ldm.images.marks import MARK, read_mark


def provenance(model_path: Path, model: Any, condition: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a generated file says of itself."""
    encoder = model.metadata.get("encoder", {})
    known = {} if model.cond_stage_model is None else model.cond_stage_model.describe()
    sources = [model.metadata.get("conditions", {}), known]  # of features beside the tile's own, of text towers
    licences = {key: about["licence"] for source in sources for key, about in source.items() if about.get("licence")}
    return {
        **MARK,
        "model": str(model_path.name),
        "condition": condition,
        **({"encoder": encoder["encoder"], "encoder_licence": encoder.get("licence")} if "encoder" in encoder else {}),
        **({"condition_licences": licences} if licences else {}),
        **settings,
    }


def weights_of(model_path: Path) -> str:
    """SHA-256 of the weights that `load_model` reads."""
    own = [model_path / "checkpoints" / "last.ckpt", model_path / "model.safetensors"]
    return sha256(next((path for path in own if path.is_file()), weights_file(model_path)))


def kept_tiles(out: Path, wanted: Mapping[Path, dict[str, Any]]) -> set[Path]:
    """The files of `wanted`, path -> what it says of itself, that are there already. UserError for one that differs."""
    kept = set()
    for path in sorted(out.glob("[0-9]*.png")):
        found = read_mark(path, whole=True)
        want = json.loads(json.dumps(wanted.get(path), default=str)) or {}
        differ = sorted(name for name in want.keys() | found.keys() if want.get(name) != found.get(name))
        if differ or not found:
            what = "is none of these tiles" if path not in wanted else f"was made otherwise ({', '.join(differ)})"
            raise UserError(f"--out {out} holds tiles of other settings: {path.name} {what}; choose another --out.")
        kept.add(path)
    return kept
