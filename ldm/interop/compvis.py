"""Checkpoints of CompVis latent-diffusion, taming first stages, Large-Image-Diffusion, PathLDM and ZoomLDM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError, suggest
from ldm.interop import targets
from ldm.interop.checkpoint import state_dict_of
from ldm.interop.compvis_conditions import CONDITIONER, Published, blank, class_embedder, compose, read_conditioner
from ldm.interop.converted import Converted
from ldm.interop.diffusers_folder import base_model, replace_part
from ldm.interop.diffusers_names import to_convolutions
from ldm.interop.forms import weights_in
from ldm.interop.heads import heads_told
from ldm.interop.weights import STALE, never_updated

NETWORK, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
AVERAGE = "model_ema."
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
)  # fmt: skip
POSTERIOR = ("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")
LEFTOVERS = {  # beginning of a name -> why the model does without it
    "inception.": "the Inception network that measured FID while training",
    "loss.": "of the training loss",
    "logvar": "of the training loss",
    "lvlb_weights": "of the training loss",
    "colorize": "colours for pictures of segmentations",
}
WITHIN = "diffusion_model."  # begins the names of a network that was saved by itself, if anything does
FIRST_STAGE_NAMES = {"encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight"}


def is_compvis(path: Path, content: Any) -> bool:
    """Whether a checkpoint's tensors have the names of CompVis' diffusion models, their networks, or first stages.

    >>> is_compvis(Path("model.ckpt"), {"state_dict": {"first_stage_model.encoder.conv_in.weight": torch.ones(1)}})
    True
    """
    names = set(map(str, weights_in(content)))
    whole = any(name.startswith((NETWORK, FIRST_STAGE, AVERAGE)) for name in names) or names >= FIRST_STAGE_NAMES
    return whole or _is_network(names)


def _is_network(names: Iterable[str]) -> bool:
    """Whether the names are those of a UNet with cross-attention, which guided-diffusion's have not."""
    own = {name.removeprefix(WITHIN) for name in names}
    return "input_blocks.0.0.weight" in own and any(".transformer_blocks." in name for name in own)


def read_compvis(
    path: Path,
    content: Any,
    *,
    config: str | Path | None = None,
    raw_weights: bool = False,
    classes: Sequence[str] | None = None,
    allow_target: Iterable[str] = (),
    base: str | Path | None = None,
) -> Converted:
    """A diffusion model or a first stage with its project YAML, or a network alone.

    classes: names of the classes; of the magnifications, where the model is conditioned on these.
    base: of a network alone, the model folder (or pipeline of diffusers) that gives everything else.
    UserError: no config, targets or parameters that are not known, tensors that have no place.

    >>> from ldm.interop.checkpoint import read_checkpoint
    >>> path = published / "ldm_ckpt_lid_vq" / "model.ckpt"
    >>> read_compvis(path, read_checkpoint(path)).node["params"]["cond_stage_config"]["target"]
    'ldm.conditioners.ssl.PatchEmbedder'
    """
    if base is not None:
        if config is not None or classes is not None:
            raise UserError("--base gives all but the network; leave --config and --classes out.")
        return _read_network(path, state_dict_of(content, path), base_model(Path(base)), raw_weights)
    project = Path(config) if config else targets.find_project(path)
    if project is None:
        raise UserError(
            f"{path} does not say its architecture: give the project YAML that it came with, --config; of a network "
            "alone, the model folder that it goes with, --base."
        )
    node, _ = targets.read_project(project)
    found = Converted({}, {})
    if config is None:
        found.notes.append(f"the config is {project.name}, which lies beside the checkpoint")
    read_by(node, str(project), path, state_dict_of(content, path), found, raw_weights, classes, allow_target)
    return found


def read_by(
    node: Mapping[str, Any],
    project: str,
    path: Path,
    state: Mapping[str, Tensor],
    found: Converted,
    raw_weights: bool = False,
    classes: Sequence[str] | None = None,
    allow_target: Iterable[str] = (),
) -> None:
    """Fill `found` from the tensors of a checkpoint by the model node of a project, which messages call `project`.

    >>> read_by({"target": "ldm.models.autoencoder.VQModle"}, "a.yaml", Path("a.ckpt"), {}, Converted({}, {}))
    Traceback (most recent call last):
    ldm.errors.UserError: a.yaml: model.target 'ldm.models.autoencoder.VQModle' is not known; did you mean ...
    """
    rest = _Rest(state, found)
    if node["target"] in (*targets.FIRST_STAGES, *targets.FIRST_STAGES.values()):
        _read_first_stage(node, rest, found, raw_weights, allow_target)
        _none_for("classes", classes)
    elif node["target"] in targets.DIFFUSION_TARGETS:
        _read_diffusion(node, rest, found, path, raw_weights, classes, allow_target)
    else:
        known = [*targets.DIFFUSION_TARGETS, *targets.FIRST_STAGES]
        raise UserError(f"{project}: model.target '{node['target']}' is not known{suggest(node['target'], known)}")
    for beginning, why in LEFTOVERS.items():
        rest.leave(beginning, why)
    if rest.tensors:
        names = list(rest.tensors)
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise UserError(f"{len(names)} tensors of {path} have no place in the model of {project}: {listed}.")


class _Rest:
    """The tensors of a checkpoint that are not accounted for yet."""

    def __init__(self, tensors: Mapping[str, Tensor], found: Converted):
        self.tensors = dict(tensors)
        self.unused = found.unused

    def take(self, beginning: str) -> dict[str, Tensor]:
        """Tensors whose names begin so, by the rest of their names."""
        names = [name for name in self.tensors if name.startswith(beginning)]
        return {name.removeprefix(beginning): self.tensors.pop(name) for name in names}

    def leave(self, beginning: str, why: str) -> None:
        """Note why tensors whose names begin so are not needed."""
        for name in self.take(beginning):
            self.unused[beginning + name] = why


def _read_diffusion(
    node: Mapping[str, Any],
    rest: _Rest,
    found: Converted,
    path: Path,
    raw_weights: bool,
    classes: Sequence[str] | None,
    allow: Iterable[str],
) -> None:
    given = node["params"]
    params = targets.diffusion_params(given, found.notes)
    if "unet_config" not in given:
        raise UserError("model.params of the config has no unet_config.")
    unet = targets.unet_node(given["unet_config"], allow, given.get("image_size"))
    if targets.DIFFUSION_TARGETS[node["target"]]:
        channels = given.get("channels", 3)
        first_stage = {
            "target": targets.FIRST_STAGES["ldm.models.autoencoder.IdentityFirstStage"],
            "params": {"channels": channels},
        }
    else:
        first_stage = targets.first_stage_node(given.get("first_stage_config"), allow)
    _read_schedule(rest, found)
    network = _averaged(rest, found, "model.", raw_weights)
    if not network and not found.averages:
        raise UserError(f"{path} holds no network (no {NETWORK}*); is it a first stage? Then give its own config.")
    _read_scale(rest, found, params)
    rest.leave(FIRST_STAGE + "loss.", "of the first stage's training loss")
    rest.leave(FIRST_STAGE + AVERAGE, "averages of the first stage, which its diffusion model does not use")
    rest.leave(FIRST_STAGE + "colorize", LEFTOVERS["colorize"])
    found.state |= {FIRST_STAGE + name: value for name, value in rest.take(FIRST_STAGE).items()}

    members = {}
    label = unet["params"].pop("num_classes", None)
    if label is not None:
        held, name = (found.averages or network), "diffusion_model.label_emb.weight"
        weights = {"embedding.weight": held.pop(f"model.{name.replace('.', '')}" if found.averages else name)}
        own = {"dim": weights["embedding.weight"].shape[1], "acts": "vector"}
        told = targets.Conditioning("class", {"target": targets.CLASS_EMBEDDER, "params": own}, {"rows": label})
        members["class"] = class_embedder(Published(told, weights, classes, found, path), has_null=False)
    found.state |= to_convolutions({"model." + name: value for name, value in network.items()})
    if not targets.DIFFUSION_TARGETS[node["target"]]:
        told = targets.conditioning(given, allow)
        weights = rest.take(CONDITIONER)
        if told is not None:
            name, member = read_conditioner(Published(told, weights, classes, found, path))
            members[name] = member
        elif weights:
            raise UserError(f"{path} holds a conditioner (cond_stage_model.*), the config says none.")
    if given.get("conditioning_key") == "hybrid":
        channels = unet["params"]["in_channels"] - unet["params"]["out_channels"]
        members["map"] = (targets.hybrid_map(channels), blank(channels))
    if classes is not None and not members.keys() & {"class", "grid"}:
        _none_for("classes", classes)
    if unet["target"] == targets.UNET:
        found.notes.append(heads_told(unet["params"], "the config says"))
    cond_stage = compose(members, found.state)
    found.node = {
        "target": targets.LATENT_DIFFUSION,
        "params": {
            **params,
            "use_ema": False,
            "unet_config": unet,
            "first_stage_config": first_stage,
            **({"cond_stage_config": cond_stage} if cond_stage else {}),
        },
    }


def _read_network(path: Path, state: Mapping[str, Tensor], found: Converted, raw_weights: bool) -> Converted:
    """The network of a checkpoint in the place of that in a base, which tells its architecture too."""
    rest = _Rest(state, found)
    if parts := [part for part in (FIRST_STAGE, CONDITIONER) if any(name.startswith(part) for name in rest.tensors)]:
        raise UserError(f"{path} is more than a network: it holds {parts[0]}*. Give its project YAML, --config.")
    _read_schedule(rest, found)
    for beginning, why in LEFTOVERS.items():
        rest.leave(beginning, why)
    rest.leave("scale_factor", "of the latents, which the base gives")
    network = _averaged(rest, found, "model.", raw_weights) | rest.take("")
    replace_part(found, NETWORK, to_convolutions({name.removeprefix(WITHIN): v for name, v in network.items()}))
    return found


def _read_first_stage(
    node: Mapping[str, Any], rest: _Rest, found: Converted, raw_weights: bool, allow: Iterable[str]
) -> None:
    found.node = targets.first_stage_node(node, allow)
    if any(name.startswith(FIRST_STAGE) for name in rest.tensors):  # of a diffusion model: its first stage alone
        own = rest.take(FIRST_STAGE)
        rest.leave("", "of the diffusion model around the first stage")
        rest.tensors = own
    rest.leave("loss.", LEFTOVERS["loss."])
    rest.leave(AVERAGE + "loss", LEFTOVERS["loss."])
    rest.leave("quantize.used", "of training")
    found.state = _averaged(rest, found, "", raw_weights)


def _read_schedule(rest: _Rest, found: Converted) -> None:
    for name in SCHEDULE:
        if name in rest.tensors:
            found.schedule[name] = rest.tensors[name]
            rest.leave(name, "of the noise schedule, which the config gives")
    for name in POSTERIOR:
        rest.leave(name, "of the noise schedule, which the config gives")


def _averaged(rest: _Rest, found: Converted, beginning: str, raw_weights: bool) -> dict[str, Tensor]:
    """Weights whose names begin so; the averaged ones where there are any, unless the raw ones are asked for."""
    average = rest.take(AVERAGE)
    raw = rest.take(beginning) if beginning else rest.tensors.copy()
    if not beginning:
        rest.tensors.clear()
    stale = never_updated(average, raw)
    for name in ("decay", "num_updates"):
        if average.pop(name, None) is not None:
            found.unused[AVERAGE + name] = "counts of the averaging"
    if average and not raw:
        found.averages = {beginning + name: value for name, value in average.items()}
        found.notes.append("the file holds averaged weights alone")
        return {}
    names = {name.replace(".", ""): name for name in raw}
    if len(names) < len(raw):
        raise UserError("names of the averaged weights stand for more than one weight; give --raw-weights.")
    if strange := [name for name in average if name not in names]:
        raise UserError(f"{len(strange)} averaged weights are of no weight of the model (first: {strange[0]}).")
    if raw_weights:
        found.unused |= dict.fromkeys((AVERAGE + name for name in average), "averaged weights; raw ones were asked for")
        return raw
    if stale:
        found.notes.append(f"the averaged weights {STALE}")
        found.unused |= dict.fromkeys((AVERAGE + name for name in average), "averaged weights that were never updated")
        return raw
    if average and (rest_of := len(raw) - len(average)):
        found.notes.append(f"{len(average)} of {len(raw)} weights have an average; the other {rest_of} are as they are")
    replaced = {names[name]: value for name, value in average.items()}
    for name in replaced:
        found.unused[beginning + name] = "weights of the last step; the averaged ones are taken (--raw-weights: these)"
    return {name: replaced.get(name, value) for name, value in raw.items()}


def _read_scale(rest: _Rest, found: Converted, params: dict[str, Any]) -> None:
    """scale_factor: a buffer where it was measured, else in the config."""
    measured = rest.tensors.pop("scale_factor", None)
    if measured is None:
        if params.pop("scale_by_std", False):
            raise UserError("the config says scale_by_std, but the checkpoint has no scale_factor.")
        return
    if params.get("scale_by_std"):
        params.pop("scale_factor", None)
        found.state["scale_factor"] = measured
        return
    value, told = float(measured), params.get("scale_factor", 1.0)
    if value != told:
        found.notes.append(f"scale_factor is the checkpoint's {value:g}; the config says {told:g}")
    params["scale_factor"] = value
    found.unused["scale_factor"] = "stands in the config of the model folder"


def _none_for(option: str, value: Any) -> None:
    if value is not None:
        raise UserError(f"the model has no {option} to name; leave --{option} out.")
