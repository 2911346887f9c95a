"""What generated files say of themselves, and which are kept from an earlier run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.images.marks import MARK, read_mark

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion


def provenance(model_path: Path, model: LatentDiffusion, condition: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a generated file says of itself."""
    encoder = model.metadata.get("encoder", {})
    known = {} if model.cond_stage_model is None else model.cond_stage_model.describe()
    held = model.metadata.get("conditions", {})  # features beside the tile's own
    licences = {key: about["licence"] for key, about in held.items() if about.get("licence")}
    licences |= {key: about.licence for key, about in known.items() if about.licence}  # of text towers
    return {
        **MARK,
        "model": str(model_path.name),
        "condition": condition,
        **({"encoder": encoder["encoder"], "encoder_licence": encoder.get("licence")} if "encoder" in encoder else {}),
        **({"condition_licences": licences} if licences else {}),
        **settings,
    }


def written(count: int, kept: int, things: str, out: Path, beside: str) -> str:
    """The last line of a command that made `count` images of which `kept` were there already.

    >>> written(5, 3, "tiles", Path("out"), "tiles.csv")
    'wrote 2 tiles to out, with tiles.csv; 3 were there already from an earlier run and stay'
    """
    told = f"; {kept} were there already from an earlier run and stay" if kept else ""
    return f"wrote {count - kept} {things} to {out}, with {beside}{told}"


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """Names of what differs between a record that is there and one that is wanted, both as they read back from JSON.

    usual: settings that a record leaves out: one that holds them all the same, as those of version 0.1.0 do, says the
    same thing.

    >>> differing({"seed": 0, "steps": 20}, {"seed": 1}, usual={"steps": 20})
    ['seed']
    """
    told = json.loads(json.dumps(wanted, default=str))
    spoken = {name: value for name, value in found.items() if name not in usual or value not in (usual[name], None)}
    return sorted(name for name in {*told, *spoken} if told.get(name) != spoken.get(name))


def kept_images(out: Path, wanted: Mapping[Path, Mapping[str, Any]], usual: Mapping[str, Any]) -> set[Path]:
    """The files of `wanted`, path -> what it says of itself, that are there already.

    UserError for one that was made otherwise, or that is damaged, and for a numbered image that is none of them.

    >>> from ldm.images.write import save_png
    >>> done = save_png(Path("00000.png"), np.zeros((8, 8, 3), np.uint8), {"seed": 0})
    >>> wanted = {Path(f"0000{i}.png"): read_mark("00000.png") for i in range(2)}
    >>> kept_images(Path("."), wanted, usual={})
    {PosixPath('00000.png')}
    """
    kept = set()
    numbered = sorted(path for path in out.glob("[0-9]*.png") if re.fullmatch(r"\d+(_\d+)?", path.stem))
    for path in [*wanted, *(path for path in numbered if path not in wanted)]:
        if not path.exists():
            continue
        found = read_mark(path, whole=True)
        if path not in wanted or not found:
            what = "is none of these images, or damaged"
        elif differ := differing(found, wanted[path], usual):
            what = f"was made otherwise ({', '.join(differ)})"
        else:
            kept.add(path)
            continue
        raise UserError(f"{path} is there and {what}; choose another --out, or remove it.")
    return kept
