"""What conditions a model that was exported to diffusers: classes, scores and features as its networks take them.

This file lies in the exported folder too, and needs torch, safetensors and diffusers alone:

    from conditioning import Conditioning, sample
    condition = Conditioning(".")
    images = sample(".", condition(stain="ki67"), condition(), guidance_scale=2.0)     # (B,3,H,W) in 0..1

A condition has the parts that the model takes: `prompt_embeds` (B,L,D), which a pipeline takes by that name;
`class_labels`, which is added to the time embedding: (B,E) of UNets (class_embed_type "identity") and of transformers
by vectors, (B,) of transformers by class; `map` (B,C,h,w), which is concatenated to the latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

PARTS = {"crossattn": "prompt_embeds", "vector": "class_labels", "label": "class_labels", "concat": "map"}
FLOW = "FlowMatchEulerDiscreteScheduler"
NOISIEST = 160 / 161  # the time that flows begin at, as samplers of the toolkit do
SLOTS = 64  # of grids of features through a transformer
Own = dict[str, Tensor]


class Conditioning:
    """The conditions of an exported model, by name; one that is not given is null.

    Called with values by the names in conditioning.json: a class by its name, a score in [0, 1], features (B,D) or
    grids of them (B,D,k,k), maps (B,C,H,W).

    >>> from ldm.convert import export_as
    >>> _ = export_as("diffusers", models / "demo-stains", "stains")
    >>> Conditioning("stains")(stain=["he", "ki67"])["class_labels"].shape
    torch.Size([2, 128])
    """

    def __init__(self, folder: str | Path):
        told = json.loads((Path(folder) / "conditioning.json").read_text(encoding="utf-8"))
        self.members, self.size = told["members"], told["size"]
        self.weights = load_file(Path(folder) / "conditioning.safetensors")

    def __call__(self, **given: Any) -> dict[str, Tensor]:
        known = [key for member in self.members for key in member["keys"]]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"there is no condition {unknown[0]}; there are {', '.join(known)}")
        found: dict[str, list[Tensor]] = {}
        for member in self.members:
            own = {name.removeprefix(member["prefix"]): value for name, value in self.weights.items()
                   if name.startswith(member["prefix"])}  # fmt: skip
            values = [given.get(key) for key in member["keys"]]
            for part, value in KINDS[member["kind"]](member, own, *values).items():
                found.setdefault(PARTS[part], []).append(value)
        count = max((len(value) for values in found.values() for value in values), default=1)
        wide = {part: [v.expand(count, *v.shape[1:]) for v in values] for part, values in found.items()}
        return {part: self._joined(part, values) for part, values in wide.items()}

    def _joined(self, part: str, values: list[Tensor]) -> Tensor:
        if part == "class_labels":
            total = sum(values)
            linear = [self.weights.get(f"network.vector.{kind}") for kind in ("weight", "bias")]
            return total if linear[0] is None else F.linear(total, *linear)
        if part == "map":
            return values[0] if len(values) == 1 else torch.cat([_resized(v, [self.size] * 2) for v in values], dim=1)
        tokens = torch.cat(values, dim=1)
        return tokens + self.weights.get("network.positions", 0)


def _class(member: dict[str, Any], own: Own, value: Any) -> dict[str, Tensor]:
    names = [value] if isinstance(value, str) else value
    null = len(member["classes"])
    rows = torch.tensor([null] if names is None else [member["classes"].index(name) for name in names])
    return {"label": rows} if member["acts"] == "label" else _acts(member, own["embedding.weight"][rows])


def _score(member: dict[str, Any], own: Own, value: Any) -> dict[str, Tensor]:
    if value is None:
        return _acts(member, own["null_score"][None])
    return _acts(member, _layers(own, "score_fc", torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1), F.silu))


def _acts(member: dict[str, Any], vectors: Tensor) -> dict[str, Tensor]:
    return {"vector": vectors} if member["acts"] == "vector" else {"crossattn": vectors[:, None]}


def _feature(member: dict[str, Any], own: Own, value: Any) -> dict[str, Tensor]:
    """A feature as one token, of an encoder that pools over a grid also as a map of its cells."""
    features = _row(member, own["patch_fc.weight"], value)
    found = {"crossattn": F.linear(features, own["patch_fc.weight"], own["patch_fc.bias"])[:, None]}
    if side := member.get("grid"):
        cells = features.unflatten(1, (-1, side, side)).permute(0, 2, 3, 1)             # (B,row,col,d)
        mapped = F.linear(cells, own["cell_fc.weight"], own["cell_fc.bias"])
        found["concat"] = mapped.permute(0, 3, 1, 2)
    return found


def _region(member: dict[str, Any], own: Own, value: Any, around: Any) -> dict[str, Tensor]:
    """Features of a tile and of the region around it, two tokens."""
    tokens = []
    for name, given in (("patch_fc", value), ("region_fc", around)):
        features = _row(member, own[f"{name}.weight"], given)
        tokens.append(F.linear(features, own[f"{name}.weight"], own[f"{name}.bias"]))
    return {"crossattn": torch.stack(torch.broadcast_tensors(*tokens), 1)}


def _row(member: dict[str, Any], weight: Tensor, value: Any) -> Tensor:
    """Features (B,D), normalised where the model does; zeros of none."""
    if value is None:
        return weight.new_zeros(1, weight.shape[1])
    features = torch.as_tensor(value, dtype=torch.float32)
    return F.normalize(features, dim=1) if member["normalize"] else features


def _vector(member: dict[str, Any], own: Own, value: Any) -> dict[str, Tensor]:
    return {"vector": own["uncond_embedding"] if value is None else torch.as_tensor(value, dtype=torch.float32)}


def _tokens(member: dict[str, Any], own: Own, value: Any) -> dict[str, Tensor]:
    """k x k features, one token each, with positions and a projection where the model has them."""
    tokens = own["uncond_embedding"][None] if value is None else _cells(value).flatten(2).mT + own.get("positions", 0)
    if "projection.0.weight" in own:
        tokens = _layers(own, "projection", tokens, lambda x: F.gelu(x, approximate="tanh"))
    return {"crossattn": tokens}


def _cells(value: Any) -> Tensor:
    """Features (B,D) or (B,D,k,k) as (B,D,k,k)."""
    grids = torch.as_tensor(value, dtype=torch.float32)
    return grids[:, :, None, None] if grids.ndim == 2 else grids


def _levels(member: dict[str, Any], own: Own, value: Any, level: Any) -> dict[str, Tensor]:
    """Grids of features and their magnification through a transformer (ZoomLDM)."""
    if value is None:
        return {"crossattn": own["pad_token"].new_zeros(1, SLOTS + 1, len(own["final_proj.bias"]))}
    grids = _cells(value)
    grids = F.adaptive_avg_pool2d(grids, 8) if grids.shape[-1] > 8 else grids
    if member["standardize"]:
        grids = (grids - grids.mean(1, keepdim=True)) / (grids.std(1, keepdim=True) + 1e-8)
    cells = F.linear(grids.flatten(2).mT, own["dim_reduce.weight"], own["dim_reduce.bias"])
    start, count = SLOTS // 2 - cells.shape[1] // 2, cells.shape[1]
    slots = own["pad_token"].repeat(len(cells), SLOTS, 1)
    slots[:, start : start + count] = cells
    names = [level] if isinstance(level, str) else level
    rows = torch.tensor([member["levels"].index(str(name)) for name in names])
    x = torch.cat([own["mag_embedding.weight"][rows][:, None].expand(len(slots), -1, -1), slots], 1)
    x = x + own["encoder.pos_embedding"]
    for i in range(member["depth"]):
        block = {name.removeprefix(f"encoder.layers.encoder_layer_{i}."): v for name, v in own.items()
                 if name.startswith(f"encoder.layers.encoder_layer_{i}.")}  # fmt: skip
        x = x + _attention(block, _normed(block, "ln_1", x, 1e-6), member["heads"])
        x = x + _layers(block, "mlp", _normed(block, "ln_2", x, 1e-6), F.gelu)
    x = F.linear(_normed(own, "encoder.ln", x, 1e-6), own["final_proj.weight"], own["final_proj.bias"])
    return {"crossattn": _normed(own, "layer_norm", x, 1e-5) if "layer_norm.weight" in own else x}


def _attention(own: Own, x: Tensor, heads: int) -> Tensor:
    joined = F.linear(x, own["self_attention.in_proj_weight"], own["self_attention.in_proj_bias"])
    q, k, v = joined.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)               # (B,heads,N,d)
    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(x, own["self_attention.out_proj.weight"], own["self_attention.out_proj.bias"])


def _normed(own: Own, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], eps)


def _map(member: dict[str, Any], own: Own, value: Any) -> dict[str, Tensor]:
    """A map or an image beside the latents, resized and mapped to fewer channels where the model does so."""
    maps = own["blank"] if value is None else torch.as_tensor(value, dtype=torch.float32)
    for _ in range(0 if value is None else member["stages"]):
        maps = F.interpolate(maps, scale_factor=member["multiplier"], mode=member["method"])
    if "channel_mapper.weight" in own:
        maps = F.conv2d(maps, own["channel_mapper.weight"], own.get("channel_mapper.bias"))
    return {"concat": maps}


def _layers(own: Own, name: str, x: Tensor, between: Callable[[Tensor], Tensor]) -> Tensor:
    """Linear layers of a sequence, and what lies between them."""
    places = sorted({int(key.split(".")[1]) for key in own if key.startswith(f"{name}.")})
    for i, place in enumerate(places):
        x = F.linear(between(x) if i else x, own[f"{name}.{place}.weight"], own[f"{name}.{place}.bias"])
    return x


def _resized(maps: Tensor, size: Any) -> Tensor:
    return maps if tuple(maps.shape[-2:]) == tuple(size) else F.interpolate(maps, tuple(size), mode="bilinear")


KINDS = {
    "class": _class, "score": _score, "features": _feature, "region": _region, "vector": _vector, "tokens": _tokens,
    "levels": _levels, "map": _map,
}  # fmt: skip


def network(folder: str | Path) -> nn.Module:
    """The UNet or transformer of an exported model, of diffusers' class, in eval mode.

    Transformers that know time by other frequencies than diffusers' class are told so, and those by vectors take
    these in the place of labels: `from_pretrained` alone cannot say it.

    >>> network("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    import diffusers

    folder = Path(folder)
    part = "transformer" if (folder / "transformer").is_dir() else "unet"
    kind = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))["_class_name"]
    net = getattr(diffusers, kind).from_pretrained(folder / part).eval()
    told = json.loads((folder / "conditioning.json").read_text(encoding="utf-8"))
    for module in net.modules():
        if hasattr(module, "time_proj") and "time" in told:
            module.time_proj.downscale_freq_shift, module.time_proj.scale = 0, told["time"]["scale"]
        if hasattr(module, "class_embedder") and told.get("by_vectors"):
            module.class_embedder = nn.Identity()
    return net


@torch.no_grad()
def sample(
    folder: str | Path,
    condition: dict[str, Tensor],
    null: dict[str, Tensor] | None = None,
    steps: int = 20,
    guidance_scale: float = 1.0,
    noise: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Images (B,C,H,W) in 0..1 of an exported model, by diffusers' networks and the scheduler of the folder.

    condition, null: as `Conditioning` gives them. noise: (B,C,h,w) to begin with; by default drawn from the seed.

    >>> sample("nowhere", {})
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    folder = Path(folder)
    told = json.loads((folder / "conditioning.json").read_text(encoding="utf-8"))
    about = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    import diffusers

    net, latents = network(folder), (folder / "vae").is_dir()
    scheduler = getattr(diffusers, about["_class_name"]).from_config(about)
    flow = about["_class_name"] == FLOW
    scheduler.set_timesteps(**({"sigmas": [NOISIEST * (1 - i / steps) for i in range(steps)]} if flow else
                               {"num_inference_steps": steps}))  # fmt: skip
    scaled = getattr(scheduler, "scale_model_input", lambda x, step: x)
    clipped = {"use_clipped_model_output": True} if about["_class_name"] == "DDIMScheduler" else {}
    if noise is None:
        shape = (1, told["channels"], told["size"], told["size"])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    count = max([len(noise), *map(len, condition.values())])
    x = noise.expand(count, *noise.shape[1:]) * getattr(scheduler, "init_noise_sigma", 1.0)

    def predicted(x: Tensor, step: Tensor, given: dict[str, Tensor]) -> Tensor:
        parts = {part: value.expand(len(x), *value.shape[1:]) for part, value in given.items()}
        x = scaled(x, step)
        if "map" in parts:
            x = torch.cat([x, _resized(parts["map"], x.shape[-2:])], dim=1)
        named = {"encoder_hidden_states": parts["prompt_embeds"]} if "prompt_embeds" in parts else {}
        if "class_labels" in parts:
            named["class_labels"] = parts["class_labels"]
        elif type(net).__name__ == "DiTTransformer2DModel":  # which has no way without
            named["class_labels"] = torch.zeros(len(x), dtype=torch.long)
        return net(x, timestep=step.expand(len(x)), **named).sample[:, : noise.shape[1]]

    for step in scheduler.timesteps:
        out = predicted(x, step, condition)
        if null is not None and guidance_scale != 1:
            free = predicted(x, step, null)
            out = free + guidance_scale * (out - free)
        if flow and not latents:  # on pixels, what is predicted is clipped, as DDIM's scheduler does
            time = step / scheduler.config.num_train_timesteps
            out = (x - (x - time * out).clamp(-1, 1)) / time
        x = scheduler.step(out, step, x, **clipped).prev_sample
    if latents:
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
        x = vae.decode(x / vae.config.scaling_factor).sample
    return (x / 2 + 0.5).clamp(0, 1)
