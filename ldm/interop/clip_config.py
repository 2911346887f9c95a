"""The config of a CLIP text tower whose checkpoint came without one, from the shapes of its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.foreign.paths import lies_in
from ldm.foreign.settings import read_json
from ldm.interop.text_names import text_config

HEAD_WIDTH = 64  # of every published CLIP
NEEDED = ("positional_embedding", "token_embedding.weight", "transformer.resblocks.0.mlp.c_fc.weight")
KNOWN = {  # version -> name and licence as ldm.encoders.text_registry has them
    "openai/clip-vit-large-patch14": ("clip-vit-l-14", "MIT"),
    "openai/clip-vit-base-patch32": ("clip-vit-b-32", "MIT"),
    "ViT-H-14": ("openclip-vit-h-14", "MIT"),
    "vinid/plip": ("plip", "none stated; its model card allows research and no deployed use"),
}


def tower_config(tower: Mapping[str, Tensor], version: str, beside: Path, quick_gelu: bool = True) -> tuple[str, str]:
    """The JSON text of a tower's config, and where its number of heads and activation (quick_gelu) come from.

    tower: weights in open_clip's names. version: what the published config calls it, a name or a folder. beside: the
    checkpoint, whose folder may hold the tower's text_config.json. UserError: a config that the weights do not fit.

    >>> tower_config({}, "ViT-H-14", Path("model.ckpt"))
    Traceback (most recent call last):
    ldm.errors.UserError: the checkpoint's text tower lacks positional_embedding.
    """
    name, licence = KNOWN.get(version, (Path(version).name, "unknown"))
    layers = [int(found[1]) for name in tower if (found := re.match(r"transformer\.resblocks\.(\d+)\.", name))]
    if lacking := [name for name in NEEDED if name not in tower]:
        raise UserError(f"the checkpoint's text tower lacks {lacking[0]}.")
    shapes = {
        "context_length": len(tower["positional_embedding"]),
        "vocab_size": len(tower["token_embedding.weight"]),
        "width": tower["token_embedding.weight"].shape[1],
        "layers": max(layers) + 1,
    }
    inner = tower["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    named = beside.parent / version / "config.json"  # a folder of the tower beside the checkpoint
    for path in (named, beside.with_name("text_config.json")):
        if lies_in(path, beside.parent) and path.is_file():
            config, source = _read(path), f"its config {path.name}"
            break
    else:
        heads = max(1, shapes["width"] // HEAD_WIDTH)
        text = {**shapes, "heads": heads, "mlp_ratio": inner / shapes["width"]}
        config = {"embed_dim": shapes["width"], "quick_gelu": quick_gelu, "text_cfg": text}
        source = f"what CLIPs have ({heads} heads of {HEAD_WIDTH}, {'quick ' if quick_gelu else ''}GELU)"
        if version not in KNOWN:
            source += ", a guess; put the tower's text_config.json beside the checkpoint to say it"
    for key, value in shapes.items():
        if config["text_cfg"].get(key) != value:
            told = config["text_cfg"].get(key)
            raise UserError(f"the config of the text tower says {key} {told}, its weights {value}.")
    return json.dumps({"name": name, "licence": licence, **config}, indent=2), source


def _read(path: Path) -> dict[str, Any]:
    return text_config(read_json(path, "the text tower's config"), path)
