"""What conditions a model that was exported to diffusers: classes, scores and features as its networks take them.

This file lies in the exported folder too, and needs torch, safetensors and diffusers alone:

    from conditioning import Conditioning, sample
    condition = Conditioning(".")
    images = sample(".", condition(stain="ki67"), condition(), guidance_scale=2.0)     # (B,3,H,W) in 0..1

A condition has the parts that the model takes: `prompt_embeds` (B,L,D), which a pipeline takes by that name;
`class_labels` (B,E), which is added to the time embedding (class_embed_type "identity"); `map` (B,C,h,w), which is
concatenated to the latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

PARTS = {"crossattn": "prompt_embeds", "vector": "class_labels", "concat": "map"}


class Conditioning:
    """The conditions of an exported model, by name; one that is not given is null.

    Called with values by the names in conditioning.json: a class by its name, a score in [0, 1], features (B,D).

    >>> from ldm.convert import export_as
    >>> _ = export_as("diffusers", models / "demo-stains", "stains")
    >>> Conditioning("stains")(stain=["he", "ki67"])["class_labels"].shape
    torch.Size([2, 128])
    """

    def __init__(self, folder: str | Path):
        self.members = json.loads((Path(folder) / "conditioning.json").read_text(encoding="utf-8"))["members"]
        self.weights = load_file(Path(folder) / "conditioning.safetensors")

    def __call__(self, **given: Any) -> dict[str, Tensor]:
        if unknown := [name for name in given if name not in [member["key"] for member in self.members]]:
            raise ValueError(f"there is no condition {unknown[0]}")
        found: dict[str, list[Tensor]] = {}
        for member in self.members:
            for part, value in self._parts(member, given.get(member["key"])).items():
                found.setdefault(PARTS[part], []).append(value)
        count = max(len(value) for values in found.values() for value in values)
        wide = {part: [v.expand(count, *v.shape[1:]) for v in values] for part, values in found.items()}
        return {part: sum(v) if part == "class_labels" else torch.cat(v, dim=1) for part, v in wide.items()}

    def _parts(self, member: dict[str, Any], value: Any) -> dict[str, Tensor]:
        own = {name.removeprefix(member["prefix"]): v for name, v in self.weights.items()
               if name.startswith(member["prefix"])}  # fmt: skip
        if member["kind"] == "features":
            return _features(member, own, value)
        if member["kind"] == "class":
            names = [value] if isinstance(value, str) else value
            rows = [-1] if names is None else [member["classes"].index(name) for name in names]
            vectors = own["embedding.weight"][rows]
        elif value is None:
            vectors = own["null_score"][None]
        else:
            vectors = _layers(own, "score_fc", torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1))
        return {"vector": vectors} if member["acts"] == "vector" else {"crossattn": vectors[:, None]}


def _features(member: dict[str, Any], own: dict[str, Tensor], value: Any) -> dict[str, Tensor]:
    if value is None:
        features = own["patch_fc.weight"].new_zeros(1, member["embed_dim"])
    else:
        features = torch.as_tensor(value, dtype=torch.float32)
        features = F.normalize(features, dim=1) if member["normalize"] else features
    found = {"crossattn": F.linear(features, own["patch_fc.weight"], own["patch_fc.bias"])[:, None]}
    if side := member.get("grid"):
        cells = features.unflatten(1, (-1, side, side)).permute(0, 2, 3, 1)             # (B,row,col,d)
        mapped = F.linear(cells, own["cell_fc.weight"], own["cell_fc.bias"])
        found["concat"] = mapped.permute(0, 3, 1, 2)
    return found


def _layers(own: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Linear layers of a sequence, SiLU between them."""
    places = sorted({int(key.split(".")[1]) for key in own if key.startswith(f"{name}.")})
    for i, place in enumerate(places):
        x = F.linear(F.silu(x) if i else x, own[f"{name}.{place}.weight"], own[f"{name}.{place}.bias"])
    return x


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
    """Images (B,C,H,W) in 0..1 of an exported model, by diffusers' networks and its DDIM scheduler.

    condition, null: as `Conditioning` gives them. noise: (B,C,h,w) to begin with; by default drawn from the seed.

    >>> sample("nowhere", {})
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    config = json.loads((Path(folder) / "unet" / "config.json").read_text(encoding="utf-8"))
    import diffusers

    unet = getattr(diffusers, config["_class_name"]).from_pretrained(Path(folder) / "unet").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(Path(folder) / "scheduler")
    scheduler.set_timesteps(steps)
    if noise is None:
        shape = (1, config["out_channels"], config["sample_size"], config["sample_size"])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    count = max([len(noise), *map(len, condition.values())])
    x = noise.expand(count, *noise.shape[1:]) * scheduler.init_noise_sigma

    def predicted(x: Tensor, step: Tensor, given: dict[str, Tensor]) -> Tensor:
        parts = {part: value.expand(len(x), *value.shape[1:]) for part, value in given.items()}
        if "map" in parts:
            x = torch.cat([x, F.interpolate(parts["map"], x.shape[-2:], mode="bilinear")], dim=1)
        named = {"encoder_hidden_states": parts["prompt_embeds"]} if "prompt_embeds" in parts else {}
        named |= {"class_labels": parts["class_labels"]} if "class_labels" in parts else {}
        return unet(x, step, **named).sample

    for step in scheduler.timesteps:
        out = predicted(x, step, condition)
        if null is not None and guidance_scale != 1:
            free = predicted(x, step, null)
            out = free + guidance_scale * (out - free)
        x = scheduler.step(out, step, x, use_clipped_model_output=True).prev_sample
    if (Path(folder) / "vae").is_dir():
        vae = diffusers.AutoencoderKL.from_pretrained(Path(folder) / "vae").eval()
        x = vae.decode(x / vae.config.scaling_factor).sample
    return (x / 2 + 0.5).clamp(0, 1)
