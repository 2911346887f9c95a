"""PixCell's ControlNet (arXiv:2506.05127): a branch beside the transformer of a model that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.foreign.paths import only_within
from ldm.interop.converted import Converted
from ldm.interop.diffusers_folder import base_model, json_of
from ldm.interop.pixcell import network_in
from ldm.interop.targets import CONDITIONER_SET
from ldm.interop.terms import licence_beside, together
from ldm.interop.transformers import DIT, NETWORK

CLASS = "PixCellControlNet"
CONTROLLED = "ldm.networks.control.ControlledDiT"
CONTROL_IMAGE = "ldm.conditioners.source_image.ControlImage"
CONDITIONER = "cond_stage_model."
MORE = {"cond_pos_embed.": "cond_embedder.", "controlnet_blocks.": "zero_layers."}
LEFT = {
    "final_layer.linear.weight": "of an output, which a ControlNet does not have",
    "final_layer.linear.bias": "of an output, which a ControlNet does not have",
    "final_layer.scale_shift_table": "of an output, which a ControlNet does not have",
    "y_embedder.y_embedding": "the condition's null, which is the model's",
}


def is_control(path: Path, content: Any) -> bool:
    """Whether a folder is PixCell's ControlNet.

    >>> is_control(Path("controlnet"), None)
    False
    """
    if content is not None:
        return False
    with only_within(path):
        config = path / "config.json"
        return config.is_file() and json_of(config).get("_class_name") == CLASS


def read_control(path: Path, content: Any, *, base: str | Path | None = None) -> Converted:
    """The model folder `base` with the ControlNet of a folder (config.json, weights) in its network.

    UserError: no base, one that it was not made for or that has a ControlNet already.

    >>> read_control(Path("controlnet"), None)
    Traceback (most recent call last):
    ldm.errors.UserError: controlnet is a ControlNet; name the model that it leads by --base, a model folder that ...
    """
    if base is None or not (Path(base) / "config.yaml").is_file():
        what = "a ControlNet" if base is None else f"a ControlNet, and the base {base} no model folder"
        raise UserError(
            f"{path} is {what}; name the model that it leads by --base, a model folder that `histoldm convert` made of "
            "its transformer."
        )
    found = base_model(Path(base))
    params = found.node["params"]
    network = params["unet_config"]
    if network["target"] != DIT:
        kind = "has a ControlNet already" if network["target"] == CONTROLLED else "is no model of PixCell's kind"
        raise UserError(f"the base {base} {kind}; give the model folder of a PixCell transformer by itself.")
    with only_within(path):
        own, weights = network_in(path, found.notes, "n_controlnet_blocks", MORE)
    terms = licence_beside(path)
    depth = own.pop("depth")
    for name in sorted({*own, "position_scale"}):
        if own.get(name) != network["params"].get(name):
            raise UserError(
                f"{path} has {name} {own.get(name)}, the base {base} {network['params'].get(name)}: it was made for "
                "another model."
            )
    found.unused |= {name: why for name, why in LEFT.items() if weights.pop(name, None) is not None}
    found.state |= {f"{NETWORK}control.{name}": value for name, value in weights.items()}
    _add_condition(found, network["params"]["image_size"])
    params["unet_config"] = {"target": CONTROLLED, "params": {**network["params"], "control_depth": depth}}
    found.metadata = {**found.metadata, "base": found.metadata.get("converted_from", Path(base).name)}
    if terms := together(found.metadata.get("licence"), "ControlNet", terms):
        found.metadata["licence"] = terms
    return found


def _add_condition(found: Converted, side: int) -> None:
    """Give the model the image that leads it, beside what it is conditioned on already."""
    params = found.node["params"]
    node, levels = params["cond_stage_config"], params["first_stage_config"]["params"]["ddconfig"]["ch_mult"]
    if node["target"] != CONDITIONER_SET:
        name = node["params"].get("key", "ssl")
        found.state = {
            key.replace(CONDITIONER, f"{CONDITIONER}members.{name}.", 1) if key.startswith(CONDITIONER) else key: value
            for key, value in found.state.items()
        }
        node = {"target": CONDITIONER_SET, "params": {"conditioners": {name: node}}}
    image = {"target": CONTROL_IMAGE, "params": {"size": side * 2 ** (len(levels) - 1)}}
    members = {**node["params"]["conditioners"], "control": image}
    params["cond_stage_config"] = {"target": CONDITIONER_SET, "params": {"conditioners": members}}
