"""KL autoencoders alone: single files by the original names, as SD3's and FLUX's, and those that a base lends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config import foreign_config
from ldm.errors import UserError
from ldm.interop import targets
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.converted import Converted
from ldm.interop.diffusers_config import vae_node
from ldm.interop.diffusers_folder import FIRST_STAGE, first_stage_in, is_diffusers, read_own
from ldm.interop.diffusers_names import to_convolutions
from ldm.interop.forms import file_of, weights_in

AUTOENCODER_KL = "ldm.autoencoder.autoencoder.AutoencoderKL"
RESOLUTION = 256  # of training, where nothing says it
GROUPS = 32  # of normalisation; no tensor tells
PREFIXES = ("", FIRST_STAGE, "vae.")  # before the names of an autoencoder within a larger file
ENDS = ("encoder.conv_in.weight", "decoder.conv_in.weight")
FLUX = {"scale_factor": 0.3611, "shift_factor": 0.1159}
SD3 = {"scale_factor": 1.5305, "shift_factor": 0.0609}
NAMES = {r"sd3|stable-diffusion-3": SD3, r"flux|(^|/)ae\.": FLUX}  # within the names of a file and its folder


def first_stage_params(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Parameters of the KL autoencoder with tensors of these shapes, by their names within it.

    >>> stage = ldm.load_model(models / "demo-ssl").first_stage_model
    >>> first_stage_params({name: tuple(value.shape) for name, value in stage.state_dict().items()})["embed_dim"]
    8
    """
    ch, in_channels = shapes["encoder.conv_in.weight"][:2]
    levels = range(sum(f"encoder.down.{i}.block.0.conv2.weight" in shapes for i in range(16)))
    ddconfig = {
        "double_z": True,
        "z_channels": shapes["decoder.conv_in.weight"][1],
        "resolution": RESOLUTION,
        "in_channels": in_channels,
        "out_ch": shapes["decoder.conv_out.weight"][0],
        "ch": ch,
        "ch_mult": [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] // ch for i in levels],
        "num_res_blocks": sum(f"encoder.down.0.block.{j}.conv2.weight" in shapes for j in range(16)),
        "attn_resolutions": [RESOLUTION // 2**i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in shapes],
        "dropout": 0.0,
    }
    if "encoder.mid.attn_1.q.weight" not in shapes:
        ddconfig["mid_attention"] = False
    if "post_quant_conv.weight" in shapes:
        return {"embed_dim": shapes["post_quant_conv.weight"][1], "ddconfig": ddconfig}
    return {"embed_dim": ddconfig["z_channels"], "ddconfig": ddconfig, "quant_conv": False}


def is_autoencoder(path: Path, content: Any) -> bool:
    """Whether a file holds, alone or within a larger model, a KL autoencoder without quant convolutions.

    >>> is_autoencoder(Path("ae.safetensors"), {"encoder.conv_in.weight": 0, "decoder.conv_in.weight": 0})
    True
    """
    return content is not None and _prefix(weights_in(content)) is not None


def read_autoencoder(path: Path, content: Any, *, config: str | Path | None = None) -> Converted:
    """The autoencoder of Stable Diffusion 3 or FLUX in one file, by its original names.

    config: diffusers' config.json of it, or a YAML of the same names: scaling_factor, shift_factor, norm_num_groups.
    UserError: tensors that are missing or have no place.

    >>> read_autoencoder(Path("ae.safetensors"), {"encoder.conv_in.weight": torch.zeros(1, 1, 3, 3)})
    Traceback (most recent call last):
    ldm.errors.UserError: ae.safetensors holds no whole autoencoder without quant convolutions.
    """
    whole = state_dict_of(content, path)
    prefix = _prefix(whole)
    if prefix is None:
        raise UserError(f"{path} holds no whole autoencoder without quant convolutions.")
    found = autoencoder(path, {n.removeprefix(prefix): v for n, v in whole.items() if n.startswith(prefix)}, config)
    found.unused |= {name: "not of the autoencoder" for name in whole if not name.startswith(prefix)}
    return found


def autoencoder(path: Path, state: Mapping[str, Tensor], config: str | Path | None = None) -> Converted:
    """A KL autoencoder of these tensors, by CompVis' names; scale and shift of its latents are its metadata.

    >>> stage = ldm.load_model(models / "demo-ssl").first_stage_model
    >>> _ = Path("vae.yaml").write_text("{norm_num_groups: 8, scaling_factor: 0.5}")
    >>> autoencoder(Path("vae.safetensors"), stage.state_dict(), "vae.yaml").metadata
    {'scale_factor': 0.5}
    """
    notes: list[str] = []
    loss = {name: "of the training loss" for name in state if name.startswith("loss.")}
    state = {name: value for name, value in state.items() if name not in loss}
    try:
        params = first_stage_params({name: tuple(value.shape) for name, value in state.items()})
    except (KeyError, IndexError) as error:
        raise UserError(f"{path} is no whole autoencoder: it lacks {error}.") from None
    told = foreign_config(Path(config)) if config else {}
    if told:
        quant = dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), params.get("quant_conv", True))
        _, _, scale = vae_node(told | quant, str(config), notes)
        scale = scale if "scaling_factor" in told else {}
        params["ddconfig"]["num_groups"] = told.get("norm_num_groups", GROUPS)
        notes.append(f"{params['ddconfig']['num_groups']} groups of normalisation, as the config says: no tensor tells")
    else:
        scale = _known_scale(path, params, notes)
        if params["ddconfig"]["ch"] % GROUPS:
            raise UserError(
                f"{path} normalises {params['ddconfig']['ch']} channels in groups of a number that no tensor tells: "
                "give its config.json, or a YAML with norm_num_groups, by --config."
            )
    return Converted({"target": AUTOENCODER_KL, "params": params}, to_convolutions(state), scale, {}, loss, notes)


def first_stage_of(base: Path) -> Converted:
    """The first stage that a user names by --base; scale and shift of its latents are its metadata.

    It is of a model folder, a folder of diffusers or a file. UserError: none of these, a scale that is not known.

    >>> first_stage_of(models / "demo-ssl").node["target"]
    'ldm.autoencoder.autoencoder.AutoencoderKL'
    """
    found = _first_stage_of(base)
    if "scale_factor" not in found.metadata:
        raise UserError(
            f"{base} does not say the scale of its latents: name a folder of diffusers whose config.json has "
            "scaling_factor, or convert it first by itself, with --config."
        )
    scale = {name: found.metadata[name] for name in ("scale_factor", "shift_factor") if name in found.metadata}
    return Converted(found.node, found.state, scale, notes=found.notes)


def _first_stage_of(base: Path) -> Converted:
    if (base / "config.yaml").is_file():
        own = read_own(base)
        if own.node["target"] != targets.LATENT_DIFFUSION:
            return own
        params = own.node["params"]
        state = {n.removeprefix(FIRST_STAGE): v for n, v in own.state.items() if n.startswith(FIRST_STAGE)}
        scale = {name: params[name] for name in ("scale_factor", "shift_factor") if name in params}
        if "scale_factor" in own.state:
            scale["scale_factor"] = float(own.state["scale_factor"])
        return Converted(params["first_stage_config"], state, {"scale_factor": 1.0} | scale)
    if base.is_dir() and is_diffusers(base, None):
        return first_stage_in(base if (base / "config.json").is_file() else base / "vae")
    file = file_of(base) if base.is_dir() else base
    if file is None or not file.is_file():
        raise UserError(f"the base {base} is no model folder, no folder of diffusers and no file of an autoencoder.")
    whole = state_dict_of(read_checkpoint(file), file)
    prefix = next((prefix for prefix in PREFIXES if prefix + ENDS[1] in whole), None)
    if prefix is None:
        raise UserError(f"the base {base} holds no autoencoder (no {ENDS[1]}).")
    return autoencoder(file, {n.removeprefix(prefix): v for n, v in whole.items() if n.startswith(prefix)})


def _prefix(state: Mapping[str, Any]) -> str | None:
    """What is before the names of an autoencoder without quant convolutions; None: the file has none."""
    for prefix in PREFIXES:
        if all(prefix + name in state for name in ENDS) and prefix + "post_quant_conv.weight" not in state:
            return prefix
    return None


def _known_scale(path: Path, params: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Scale and shift of published autoencoders, told by the name of the file."""
    if params.get("quant_conv", True):
        notes.append("scale_factor is 0.18215, that of Stable Diffusion 1 and 2: the file does not say it")
        return {"scale_factor": 0.18215}
    name = f"{path.parent.name}/{path.name}".lower()
    scale = next((scale for pattern, scale in NAMES.items() if re.search(pattern, name)), None)
    if scale is None:
        notes.append(
            f"the scale of its latents is not known: SD3's are {SD3}, FLUX's {FLUX}; --config with a YAML of "
            "scaling_factor and shift_factor says it"
        )
        return {}
    notes.append(f"scale and shift of its latents are those that the name {path.name} tells: {scale}")
    return scale
