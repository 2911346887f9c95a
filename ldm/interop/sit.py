"""Checkpoints of SiT, REPA and REPA-E (arXiv:2401.08740, 2410.06940, 2504.10483), and of DiT: {model, ema, args, ...}.

Their files hold the arguments of the training as an object of Python, which is not made. REPA-E's hold the autoencoder
that was trained along, and the statistics by which its latents are normalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.interop import targets
from ldm.interop.compvis_conditions import Published, class_embedder
from ldm.interop.converted import Converted
from ldm.interop.first_stages import autoencoder, first_stage_of
from ldm.interop.transformers import complete, names_in, settings_of, transformer, weights_of

MARKS = {"x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.bias", "final_layer.linear.bias"}
TRAINING = {  # beginnings of names -> why a model does without
    "projectors.": "projections of the alignment (REPA), of the training alone",
}
STATISTICS = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
PARTS = {"discriminator": "judged the autoencoder while training"}  # of a checkpoint, beside the networks
LABELS = "y_embedder.embedding_table.weight"
TABLE = {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 2e-2, "timesteps": 1000}  # DiT's


def is_sit(path: Path, content: Any) -> bool:
    """Whether a file holds a transformer with a modulation of its own in each block, over images.

    >>> is_sit(Path("0400000.pt"), {"ema": dict.fromkeys(MARKS), "args": None})
    True
    """
    return MARKS <= names_in(content)


def read_sit(
    path: Path,
    content: Any,
    *,
    base: str | Path | None = None,
    config: str | Path | None = None,
    classes: Sequence[str] | None = None,
    raw_weights: bool = False,
) -> Converted:
    """A transformer that predicts velocities (SiT), or noise with a variance (DiT), by class or by a feature's vector.

    base: the autoencoder, where the file has none: a model folder, diffusers' folder or a file. config: YAML with
    num_heads or prediction. classes: names of the classes, the null not among them.
    UserError: no autoencoder, tensors that have no place.

    >>> read_sit(Path("0400000.pt"), {"ema": {"x_embedder.proj.weight": torch.ones(4, 4, 2, 2)}})
    Traceback (most recent call last):
    ldm.errors.UserError: 0400000.pt is no whole transformer of the published kind: it lacks 'final_layer.linear.bias'.
    """
    found, settings = Converted({}, {}), settings_of(config)
    weights = weights_of(content, path, raw_weights, found)
    for beginning, why in TRAINING.items():
        for name in [name for name in weights if name.startswith(beginning)]:
            found.unused[name] = why
            del weights[name]
    statistics = {name: weights.pop(name) for name in STATISTICS if name in weights}
    params = transformer(weights, settings, found, path)
    if "image_size" not in params:
        raise UserError(f"{path} lacks pos_embed, which tells the size of its images; get it whole.")
    stage = _first_stage(path, content, base, statistics, found)
    conditioner = _condition(path, weights, params, classes, found)
    schedule = _prediction(params, settings, found.notes)
    return complete(found, params, weights, schedule, (stage.node, stage.state, stage.metadata), conditioner)


def _prediction(params: dict[str, Any], settings: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The parameterisation, which the number of outputs tells: C of a velocity, 2C of noise and a variance."""
    channels, outs = params["in_channels"], params["out_channels"]
    if outs not in (channels, 2 * channels):
        raise UserError(f"the network takes {channels} channels and gives {outs}; supported are as many, or twice.")
    told = settings.get("prediction")
    if (told or ("velocity" if outs == channels else "eps")) == "velocity":
        if outs != channels:
            raise UserError("a velocity with a variance (the first SiT's learn_sigma) is not supported.")
        params["time_scale"] = 0.001  # it knows time from 0 to 1
        return {"parameterization": "flow"}
    notes.append("it predicts noise on DiT's table, 1000 betas linear from 0.0001 to 0.02: no tensor tells")
    return {"parameterization": "eps", **TABLE, **({"learn_sigma": True} if outs != channels else {})}


def _first_stage(
    path: Path, content: Any, base: str | Path | None, statistics: Mapping[str, Tensor], found: Converted
) -> Converted:
    """The autoencoder of the file or of a base; latents scaled by the statistics of the file where it has any."""
    own = content.get("vae") if isinstance(content, Mapping) else None
    for part, why in PARTS.items():
        if isinstance(held := content.get(part), Mapping):
            found.unused |= {f"{part}: {name}": why for name, value in held.items() if isinstance(value, Tensor)}
    if isinstance(own, Mapping) and base is None:
        stage = autoencoder(path, {name: value for name, value in own.items() if isinstance(value, Tensor)})
        stage.notes = [] if statistics else stage.notes
        found.unused |= {f"vae: {name}": why for name, why in stage.unused.items()}
    elif base is not None:
        if isinstance(own, Mapping):
            found.unused |= {f"vae: {name}": "the autoencoder of the base is taken" for name in own}
        stage = first_stage_of(Path(base))
    else:
        raise UserError(
            f"{path} has no autoencoder; name the one that it was trained with by --base (of REPA's, Stable "
            "Diffusion's vae): a model folder, a folder of diffusers or a file of it."
        )
    found.notes += stage.notes
    if statistics:
        mean, variance = (statistics[name].float() for name in STATISTICS[:2])
        stage.metadata = {"scale_factor": torch.rsqrt(variance).tolist(), "shift_factor": mean.tolist()}
        found.unused |= dict.fromkeys(statistics, "statistics of the latents, from which their scale and shift are")
    return stage


def _condition(
    path: Path, weights: dict[str, Tensor], params: dict[str, Any], classes: Sequence[str] | None, found: Converted
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The condition in the place of the label: classes and their null, or a vector, through a linear layer if any."""
    hidden = params["hidden_size"]
    if LABELS in weights:
        told = targets.Conditioning(
            "class", {"target": targets.CLASS_EMBEDDER, "params": {"dim": hidden, "acts": "vector"}}
        )
        label = {"embedding.weight": weights.pop(LABELS)}
        return class_embedder(Published(told, label, classes, found, path), has_null=True)
    if classes is not None:
        raise UserError(f"{path} has no classes to name; leave --classes out.")
    other = [name for name in weights if name.startswith("y_embedder.")]
    dim, null = hidden, torch.zeros(1, hidden)
    if other:
        layer = {name.rpartition(".")[2]: weights[name] for name in other}
        if sorted(layer) != ["bias", "weight"] or len(other) != 2 or layer["weight"].ndim != 2:
            raise UserError(
                f"{path} is conditioned in a way that is not known ({', '.join(other[:4])}); known are a table of "
                "classes (embedding_table), and one linear layer of a feature."
            )
        for name in other:
            weights[f"vector_embedder.{name.rpartition('.')[2]}"] = weights.pop(name)
        dim = layer["weight"].shape[1]
        params["vector_dim"], null = dim, torch.zeros(1, dim)
    found.notes.append(
        f"a feature of {dim} values stands in the place of the label; without it zeros do, as the file has no other. "
        "--encoder says which encoder's it is"
    )
    return {"target": "ldm.conditioners.raw.FeatureVector", "params": {"embed_dim": dim}}, {"uncond_embedding": null}
