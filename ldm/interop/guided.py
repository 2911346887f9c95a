"""State dicts of guided-diffusion and His-MMDM: UNets on pixels by class and omics, and classifiers of noisy images.

Their files hold no settings, but shapes tell most of the architecture. What they do not tell (heads, their order, the
size of images, the noise schedule) is in the flags the model was trained with, a YAML of create_model's arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config import foreign_config
from ldm.errors import UserError, suggest
from ldm.interop import targets
from ldm.interop.checkpoint import state_dict_of
from ldm.interop.compvis_conditions import Published, class_embedder, compose
from ldm.interop.converted import Converted
from ldm.interop.forms import weights_in
from ldm.interop.heads import heads_told

CLASSIFIER = "ldm.networks.encoder_unet.EncoderUNetModel"
OMICS = "ldm.conditioners.omics.OmicsEmbedder"
GENES = {"genomics_emb": "mutation_genes", "transcriptomics_emb": "expression_genes"}
HIS_MMDM = {"num_heads": 4, "use_new_attention_order": True}  # of its published models, all of one architecture
DEFAULT_SIZES = {(0.5, 1, 1, 2, 2, 4, 4): 512, (1, 1, 2, 2, 4, 4): 256, (1, 1, 2, 3, 4): 128, (1, 2, 3, 4): 64}
SCHEDULES = {"linear": "sqrt_linear", "cosine": "cosine"}
WITHIN = ("model.diffusion_model.", "diffusion_model.", "model.")  # before the names of a network, in some files
CLASSIFIER_HEAD = 64  # width of a head in create_classifier
NUMBERS = (  # whole, above 0; -1 is none
    "image_size", "num_channels", "num_res_blocks", "num_heads", "num_heads_upsample", "num_head_channels",
    "num_classes", "diffusion_steps", "in_channels", "model_channels", "out_channels", "classifier_width",
    "classifier_depth",
)  # fmt: skip
# flags that are read: those of create_model_and_diffusion, create_classifier and of the networks themselves
FLAGS = (
    "model_type", "image_size", "num_channels", "num_res_blocks", "num_heads", "num_heads_upsample",
    "num_head_channels", "attention_resolutions", "channel_mult", "dropout", "class_cond", "num_classes",
    "num_genomics_genes", "num_transcriptomics_genes", "use_checkpoint", "use_scale_shift_norm", "resblock_updown",
    "use_fp16", "use_new_attention_order", "learn_sigma", "diffusion_steps", "noise_schedule", "timestep_respacing",
    "use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas", "class_mapping", "in_channels",
    "model_channels", "out_channels", "conv_resample", "pool", "classifier_use_fp16", "classifier_width",
    "classifier_depth", "classifier_attention_resolutions", "classifier_use_scale_shift_norm",
    "classifier_resblock_updown", "classifier_pool",
)  # fmt: skip


def is_guided(path: Path, content: Any) -> bool:
    """Whether a file is a bare state dict of a guided-diffusion network.

    >>> state = {"time_embed.0.weight": torch.ones(1), "input_blocks.0.0.weight": torch.ones(1)}
    >>> is_guided(Path("model.pt"), state)
    True
    """
    return {"time_embed.0.weight", "input_blocks.0.0.weight"} <= {*_network(content, Converted({}, {}))}


def read_guided(
    path: Path,
    content: Any,
    *,
    config: str | Path | None = None,
    classes: Sequence[str] | None = None,
    mutation_genes: str | Path | None = None,
    expression_genes: str | Path | None = None,
    raw_weights: bool = False,
) -> Converted:
    """A class-conditional or omics UNet as a diffusion model on pixels; a classifier as the network that it is.

    config: YAML of the flags it was trained with. classes, mutation_genes, expression_genes: names, by embedding.

    >>> from ldm.interop.checkpoint import read_checkpoint
    >>> path = published / "hismmdm_unet.pt"
    >>> _ = Path("flags.yaml").write_text("{image_size: 16, num_heads: 4, use_new_attention_order: true}")
    >>> read_guided(path, read_checkpoint(path), config="flags.yaml").node["params"]["learn_sigma"]
    True
    """
    found = Converted({}, {})
    state = state_dict_of(_network(content, found, raw_weights), path)
    flags = _read_flags(Path(config), found.notes) if config else {}
    if "middle_block.0.in_layers.0.weight" not in state:
        raise UserError(f"{path} is no whole network of guided-diffusion: it has no middle_block.")
    if not any(name.startswith("output_blocks.") for name in state):
        return _classifier(state, flags, found, classes)
    shape = unet_shape(state)
    if config is None and not (set(GENES) & {name.partition(".")[0] for name in state}):
        raise UserError(
            f"{path} does not say all of its architecture: give --config with a YAML of the flags that it was trained "
            "with, at least image_size, num_heads or num_head_channels, and use_new_attention_order; those of His-MMDM "
            "are image_size: 128, num_heads: 4, use_new_attention_order: true."
        )
    if config is None:
        flags = dict(HIS_MMDM)
        found.notes.append("no flags are given: they are taken to be those of His-MMDM's models, with the new order")
    _check_flags(flags, shape)
    unet = {
        **shape,
        **_heads(flags, found.notes),
        "use_new_attention_order": flags.get("use_new_attention_order", False),
        "dropout": flags.get("dropout", 0.0),
        "image_size": _image_size(flags, shape, found.notes),
    }
    channels, outs = unet["in_channels"], unet["out_channels"]
    if outs not in (channels, 2 * channels):
        raise UserError(f"the network takes {channels} channels and gives {outs}, as super-resolution; not supported.")

    weights = dict(state)
    members = {}
    if "label_emb.weight" in weights:
        label = {"embedding.weight": weights.pop("label_emb.weight")}
        rows = len(label["embedding.weight"])
        if flags.get("class_cond") and flags.get("num_classes", rows) != rows:
            raise UserError(f"the flags say num_classes {flags['num_classes']}, the weights are of {rows}.")
        names = classes if classes is not None else _mapped(flags.get("class_mapping"), rows)
        told = {"dim": 4 * unet["model_channels"], "acts": "vector"}
        told = targets.Conditioning("class", {"target": targets.CLASS_EMBEDDER, "params": told})
        members["class"] = class_embedder(Published(told, label, names, found, path), has_null=False)
    elif classes is not None:
        raise UserError("the model has no classes to name; leave --classes out.")
    genes = {name: weights.pop(name) for name in list(weights) if name.startswith(tuple(GENES))}
    files = {"mutation_genes": mutation_genes, "expression_genes": expression_genes}
    members |= _omics(genes, files, 4 * unet["model_channels"], found)
    found.state = {"model.diffusion_model." + name: value for name, value in weights.items()}
    cond_stage = compose(members, found.state)
    found.node = {
        "target": targets.LATENT_DIFFUSION,
        "params": {
            **_diffusion(flags, found.notes),
            "learn_sigma": outs == 2 * channels,
            "use_ema": False,
            "unet_config": {"target": targets.UNET, "params": unet},
            "first_stage_config": {
                "target": targets.FIRST_STAGES["ldm.models.autoencoder.IdentityFirstStage"],
                "params": {"channels": channels},
            },
            **({"cond_stage_config": cond_stage} if cond_stage else {}),
        },
    }
    return found


def _network(content: Any, found: Converted, raw_weights: bool = False) -> dict[str, Any]:
    """The tensors of a file by the network's own names: without `model.` before them, the averages if it has both."""
    raw, average = weights_in(content), content.get("ema") if isinstance(content, Mapping) else None
    own = average if isinstance(average, Mapping) and not (raw_weights and raw is not content) else raw
    if own is not raw and raw is not content:
        found.unused |= {f"model: {name}": "weights of the last step; the averages are taken" for name in raw}
    elif own is raw and isinstance(average, Mapping):
        found.unused |= {f"ema: {name}": "averaged weights; raw ones were asked for" for name in average}
    tensors = {name: value for name, value in own.items() if isinstance(name, str)}
    for prefix in WITHIN:
        inner = [name for name in tensors if name.startswith(prefix)]
        if f"{prefix}time_embed.0.weight" in tensors and len(inner) == len(tensors):
            return {name.removeprefix(prefix): tensors[name] for name in inner}
    return tensors


# --- the architecture --------------------------------------------------------------------------------------------


def unet_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parameters of a UNet that the shapes of its weights tell: all but heads, their order and the size of images.

    >>> net = ldm.load_model(models / "demo-omics").model.diffusion_model
    >>> unet_shape(net.state_dict())["channel_mult"]
    [1, 2, 2, 3]
    """
    levels = 1 + sum(bool(re.fullmatch(r"output_blocks\.\d+\.[1-9]\.(conv|in_layers\.0)\.weight", n)) for n in state)
    outs = len(_blocks(state, "output_blocks"))
    if outs % levels:
        raise UserError("the levels of the network cannot be told from its weights; is it one of guided-diffusion?")
    return {**_half_shape(state, outs // levels - 1, levels), "out_channels": len(state["out.2.weight"])}


def _half_shape(state: Mapping[str, Tensor], depth: int, levels: int) -> dict[str, Any]:
    """What the blocks on the way down tell, where each of `levels` has `depth` residual blocks."""
    width, stem = state["time_embed.0.weight"].shape[1], len(state["input_blocks.0.0.weight"])
    firsts = [1 + level * (depth + 1) for level in range(levels)]
    widths = [len(state[f"input_blocks.{first}.0.out_layers.3.weight"]) for first in firsts]
    mult = [wide / width for wide in widths]
    down = f"input_blocks.{depth + 1}.0."
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "model_channels": width,
        "num_res_blocks": depth,
        "channel_mult": [int(m) if m == int(m) else m for m in mult],
        **({"stem_channels": stem} if stem != width else {}),
        "attention_resolutions": [
            2**level for level, first in enumerate(firsts) if f"input_blocks.{first}.1.qkv.weight" in state
        ],
        "use_scale_shift_norm": len(state["middle_block.0.emb_layers.1.weight"]) == 2 * widths[-1],
        "resblock_updown": levels > 1 and down + "in_layers.0.weight" in state,
    }


def _blocks(state: Mapping[str, Tensor], kind: str) -> set[str]:
    return {name.split(".")[1] for name in state if name.startswith(f"{kind}.")}


def _classifier(
    state: Mapping[str, Tensor], flags: Mapping[str, Any], found: Converted, classes: Sequence[str] | None
) -> Converted:
    depth = flags.get("classifier_depth", flags.get("num_res_blocks", 2))
    blocks = len(_blocks(state, "input_blocks"))
    levels, rest = divmod(blocks, depth + 1)
    if rest:
        raise UserError(
            f"the classifier has {blocks} blocks, which {depth} residual blocks a level do not give; give --config "
            "with its flags (classifier_depth)."
        )
    shape = _half_shape(state, depth, levels)
    pool, last = _pool(state)
    shape["out_channels"] = len(state[last])
    if pool == "attention":
        side = round((state["out.2.positional_embedding"].shape[1] - 1) ** 0.5)
        shape["image_size"] = side * 2 ** (levels - 1)
    else:
        shape["image_size"] = _image_size(flags, shape, found.notes)
    stem = shape.pop("stem_channels", shape["model_channels"])
    if stem != int(shape["channel_mult"][0] * shape["model_channels"]):
        raise UserError("the classifier's first convolution is not as wide as its first level.")
    own = [name for name in flags if name.startswith("classifier_")]
    own = [*own, "image_size", "num_classes"] if own else list(flags)  # beside them are those of the UNet
    given = {name.removeprefix("classifier_"): flags[name] for name in own if name in flags}
    for old, new in (("width", "model_channels"), ("depth", "num_res_blocks")):
        if old in given:
            given[new] = given.pop(old)
    if given.get("pool", pool) != pool:
        raise UserError(f"the flags say pool {given['pool']}, the classifier's weights are of pool {pool}.")
    _check_flags({**given, "out_channels": given.get("num_classes", given.get("out_channels"))}, shape)
    heads = given.get("num_head_channels", -1)
    if heads == -1:
        heads = CLASSIFIER_HEAD
        found.notes.append(f"a head of the classifier is {heads} channels wide, as in create_classifier")
    order = given.get("use_new_attention_order", False)
    params = {**shape, "num_head_channels": heads, "use_new_attention_order": order, "pool": pool}
    if "classifier_depth" not in flags and "num_res_blocks" not in flags:
        found.notes.append("the classifier has 2 residual blocks a level, the default")
    names = classes if classes is not None else _mapped(flags.get("class_mapping"), shape["out_channels"])
    if names is not None and len(names) != shape["out_channels"]:
        raise UserError(f"the classifier tells {shape['out_channels']} classes; --classes gives {len(names)} names.")
    if names is None:
        found.notes.append("the classes have no names but their numbers. --classes names them")
    else:
        found.metadata["classes"] = [str(name) for name in names]
    found.node, found.state = {"target": CLASSIFIER, "params": params}, dict(state)
    return found


def _pool(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """A classifier's kind of pool, and the name of its last weight."""
    for pool, last, dims in (
        ("attention", "out.2.c_proj.weight", 3),
        ("adaptive", "out.3.weight", 4),
        ("spatial_v2", "out.3.weight", 2),
        ("spatial", "out.2.weight", 2),
    ):
        if last in state and state[last].ndim == dims:
            return pool, last
    raise UserError("the network has no way up (output_blocks) and is no classifier of guided-diffusion either.")


# --- flags ---------------------------------------------------------------------------------------------------------


def _read_flags(path: Path, notes: list[str]) -> dict[str, Any]:
    """The flags of a YAML of `flag: value` pairs, as His-MMDM's args.yaml; what concerns no network is left out."""
    config = foreign_config(path)
    flags = {name: value for name, value in config.items() if name in FLAGS and value is not None}
    left = [name for name in config if name not in FLAGS]
    if left:
        notes.append(f"of the flags these concern no network: {', '.join(left)}")
    if not flags:
        raise UserError(f"{path} has none of create_model's flags{suggest(left[0] if left else '', FLAGS)}")
    for name in NUMBERS:
        if name in flags:
            flags[name] = _whole(flags[name], name, path)
    if not flags.get("conv_resample", True):
        raise UserError(f"{path}: conv_resample false (resampling without weights) is not supported.")
    if "channel_mult" in flags:
        mult = flags["channel_mult"]
        mult = mult.split(",") if isinstance(mult, str) else mult if isinstance(mult, list) else [mult]
        flags["channel_mult"] = [float(m) for m in mult if str(m).strip()]
    for name in ("attention_resolutions", "classifier_attention_resolutions"):
        if name in flags and not isinstance(flags[name], list):  # sides of maps in pixels, else factors
            sides = str(flags.pop(name)).split(",")
            if "image_size" in flags:
                flags[name] = [flags["image_size"] // int(side) for side in sides]
    return flags


def _whole(value: Any, name: str, path: Path) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number != -1 and number < 1:
        raise UserError(f"{path}: {name} is a whole number; got {value!r}.")
    return number


def _check_flags(flags: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """UserError if a flag says otherwise than the weights."""
    same = {"num_channels": "model_channels"}
    if "learn_sigma" in flags and "out_channels" in shape:
        told, own = bool(flags["learn_sigma"]), shape["out_channels"] == 2 * shape["in_channels"]
        if told != own:
            raise UserError(f"the flags say learn_sigma {told}, the network has {shape['out_channels']} outputs.")
    for name in (
        "num_channels",
        "model_channels",
        "num_res_blocks",
        "channel_mult",
        "attention_resolutions",
        "use_scale_shift_norm",
        "resblock_updown",
        "image_size",
        "in_channels",
        "out_channels",
    ):
        own = shape.get(same.get(name, name))
        told = flags.get(name)
        if told is None or own is None or told == [] or (name == "resblock_updown" and len(shape["channel_mult"]) == 1):
            continue
        if name == "attention_resolutions":
            told = [factor for factor in sorted(told) if factor <= 2 ** (len(shape["channel_mult"]) - 1)]
        if told != own:
            raise UserError(f"the flags say {name} {told}, the weights are of {own}: those of another checkpoint?")


def _heads(flags: Mapping[str, Any], notes: list[str]) -> dict[str, int]:
    if "num_heads" not in flags and flags.get("num_head_channels", -1) == -1:
        notes.append("the flags have no num_heads: 4, the default of guided-diffusion")
    else:
        notes.append(heads_told(flags, "the flags say"))
    return heads_of({"num_heads": 4, **flags})


def heads_of(told: Mapping[str, Any]) -> dict[str, int]:
    """A UNet's heads as create_model's arguments have them: of one width, or of one number on each way.

    >>> heads_of({"num_heads": 4, "num_heads_upsample": 8})
    {'num_heads': 4, 'num_heads_upsample': 8}
    """
    if told.get("num_head_channels", -1) != -1:
        return {"num_head_channels": told["num_head_channels"]}
    up = told.get("num_heads_upsample", -1)
    return {"num_heads": told["num_heads"], **({} if up in (-1, told["num_heads"]) else {"num_heads_upsample": up})}


def _image_size(flags: Mapping[str, Any], shape: Mapping[str, Any], notes: list[str]) -> int:
    if "image_size" in flags:
        return flags["image_size"]
    size = DEFAULT_SIZES.get(tuple(shape["channel_mult"]))
    if size is None:
        raise UserError("the size of images is not known; give --config with image_size.")
    notes.append(f"images have {size} px, the size that the network's levels are guided-diffusion's default for")
    return size


def _diffusion(flags: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The noise schedule and the parameterisation of the flags."""
    steps, schedule = flags.get("diffusion_steps", 1000), flags.get("noise_schedule", "linear")
    if schedule not in SCHEDULES:
        raise UserError(f"noise_schedule is one of {', '.join(SCHEDULES)}; got '{schedule}'.")
    if "noise_schedule" not in flags:
        notes.append(f"the noise schedule is taken to be guided-diffusion's linear one of {steps} steps")
    if flags.get("rescale_timesteps") and steps != 1000:
        raise UserError(f"rescale_timesteps with {steps} steps is not supported (with 1000 it changes nothing).")
    return {
        "timesteps": steps,
        "beta_schedule": SCHEDULES[schedule],
        **({"linear_start": 0.1 / steps, "linear_end": 20 / steps} if schedule == "linear" else {}),
        "parameterization": "x0" if flags.get("predict_xstart") else "eps",
    }


# --- conditions ----------------------------------------------------------------------------------------------------


def _omics(
    weights: dict[str, Tensor], files: Mapping[str, str | Path | None], dim: int, found: Converted
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    counts = {flag: len(weights[f"{name}.weight"]) for name, flag in GENES.items() if f"{name}.weight" in weights}
    for flag, file in files.items():
        if file is not None and flag not in counts:
            raise UserError(f"the model has no {flag.replace('_', ' ')}; leave --{flag.replace('_', '-')} out.")
    if not counts:
        return {}
    params: dict[str, Any] = {"dim": dim, "dropout": 0.0}
    for flag, count in counts.items():
        names = _gene_names(files[flag], count, flag) if files[flag] else [f"{flag[:-6]}_{i}" for i in range(count)]
        if not files[flag]:
            told = f"{names[0]} to {names[-1]}. --{flag.replace('_', '-')} names them"
            found.notes.append(f"the {count} {flag.replace('_', ' ')} have no names: they are {told}")
        found.files[f"{flag}.txt"] = "\n".join(names) + "\n"
        params[flag] = f"./{flag}.txt"
    return {"omics": ({"target": OMICS, "params": params}, weights)}


def _gene_names(path: str | Path, count: int, flag: str) -> list[str]:
    """Names of genes: one a line, or the first column of a table; a header is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {flag} from {path}: {getattr(error, 'strerror', None) or error}.") from error
    names = [re.split(r"[,\t]", line)[0].strip().strip('"') for line in lines if line.strip()]
    names = names[1:] if len(names) == count + 1 else names
    if len(names) != count or len(set(names)) < count:
        what = f"{len(names)} names" if len(names) != count else "a name twice"
        raise UserError(f"the model has {count} {flag.replace('_', ' ')}, {path} has {what}.")
    return names


def _mapped(mapping: Any, count: int) -> list[str] | None:
    """Class names in order of a class_mapping, "LUAD:0,LUSC:1" or a dict; numbers that it leaves out stay numbers."""
    if not mapping:
        return None
    try:
        if isinstance(mapping, str):
            pairs = [pair.rsplit(":", 1) for pair in mapping.split(",")]
            mapping = {name: int(number) for name, number in pairs}
        names = {int(number): str(name) for name, number in mapping.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"class_mapping is written name:number,name:number; got '{mapping}'.") from error
    if wrong := [number for number in names if not 0 <= number < count]:
        raise UserError(f"class_mapping names class {wrong[0]}, the model has {count}.")
    return [names.get(number, str(number)) for number in range(count)]
