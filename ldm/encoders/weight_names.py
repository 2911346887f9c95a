"""Published checkpoints of tile encoders under the names of `Encoder`: a timm trunk, `pooler.` and `head.` behind it.

Each function is for one layout of names; `network_weights` tells them apart by a key that only that layout has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from timm.models import swin_transformer
from torch import Tensor, nn

from ldm.encoders.spec import EncoderSpec

Weights = dict[str, Tensor]

# keys of checkpoints that are no part of the network: heads of training, masks of iBOT and DINOv2
NOT_TRUNK = re.compile(r"^(head\.|fc\.|fc_norm\.|pre_logits\.|pooler\.|masked_embed$|mask_token$)")


def network_weights(state: Weights, spec: EncoderSpec, model: nn.Module) -> Weights:
    """A checkpoint's tensors as `Encoder` names them: prefixes of wrappers, heads of training and other towers go.

    model: the encoder's trunk, for whose grid the position embeddings are made.

    >>> spec = EncoderSpec("mine", "resnet18", "none", "made here", dim=512, pooling="avg")
    >>> state = {"module.backbone.norm.bias": torch.zeros(1), "module.head.bias": torch.zeros(1)}
    >>> network_weights(state, spec, nn.Identity())
    {'model.norm.bias': tensor([0.])}
    """
    state = unwrapped(state)
    layout = next((read for key, read in LAYOUTS.items() if key in state), None)
    trunk, behind = layout(state) if layout else _own(state, spec)
    if "register_tokens" in trunk:
        trunk = _free_registers(trunk)
    if isinstance(model, swin_transformer.SwinTransformer):  # old Swin files keep `downsample` one stage earlier
        trunk = swin_transformer.checkpoint_filter_fn(trunk, model)
    trunk = {_renamed(key, DINOV2): value for key, value in trunk.items() if not NOT_TRUNK.match(key)}
    if spec.kwargs.get("features_only"):  # a trunk cut short
        trunk = {key: value for key, value in trunk.items() if key in model.state_dict()}
    if spec.positions and "pos_embed" in trunk:
        trunk["pos_embed"] = positions(trunk["pos_embed"], model, spec.positions)
    return {f"model.{key}": value for key, value in trunk.items()} | behind


def unwrapped(state: Weights) -> Weights:
    """A state dict without the prefixes of what held the network while it was trained.

    >>> list(unwrapped({"module.backbone.norm.bias": torch.zeros(1)}))
    ['norm.bias']
    """
    while state and any(key.startswith(("module.", "backbone.", "model.")) for key in state):
        state = {re.sub(r"^(module|backbone|model)\.", "", key): value for key, value in state.items()}
    return state


def _own(state: Weights, spec: EncoderSpec) -> tuple[Weights, Weights]:
    """Names that are those of `Encoder` already."""
    parts = (("head.",) if spec.head else ()) + (("pooler.",) if spec.pooling == "attention" else ())
    behind = {key: value for key, value in state.items() if key.startswith(parts)}
    return {key: value for key, value in state.items() if key not in behind}, behind


def positions(embeddings: Tensor, model: nn.Module, how: str) -> Tensor:
    """Position embeddings (1,L,C) of a square grid on the grid of the model's patches.

    how: bicubic by "size", as transformers' Dinov2; by size with "antialias", as timm and DINOv2 with registers; by
        "scale", as DINO, HIPT and iBOT, which add 0.1 to the number of patches.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    >>> positions(torch.zeros(1, 1 + 14 * 14, 192), model, "scale").shape
    torch.Size([1, 17, 192])
    """
    before = 0 if model.no_embed_class else model.num_prefix_tokens
    first, grid = embeddings[:, :before], embeddings[:, before:]
    side = round(grid.shape[1] ** 0.5)
    rows, columns = model.patch_embed.grid_size
    if side**2 != grid.shape[1] or (side, side) == (rows, columns):
        return embeddings
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    if how == "scale":
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
    else:
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=how == "antialias")
    return torch.cat([first, grid.flatten(2).mT.to(embeddings.dtype)], 1)


def _renamed(key: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key


def _below(state: Weights, prefix: str) -> Weights:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _joined(state: Weights, parts: tuple[str, str, str], name: str) -> Weights:
    """Query, key and value, whose keys hold one of `parts`, as one tensor each under `name`."""
    joined = {key: value for key, value in state.items() if not any(part in key for part in parts)}
    for key in [key for key in state if parts[0] in key]:
        joined[key.replace(parts[0], name)] = torch.cat([state[key.replace(parts[0], part)] for part in parts])
    return joined


def _free_registers(state: Weights) -> Weights:
    """DINOv2 with registers: timm adds positions to patches alone, so that of the class token goes into the token."""
    rest = {key: value for key, value in state.items() if key not in ("register_tokens", "cls_token", "pos_embed")}
    tokens, places = state["cls_token"], state["pos_embed"]
    return rest | {
        "reg_token": state["register_tokens"],
        "cls_token": tokens + places[:, :1],
        "pos_embed": places[:, 1:],
    }


DINOV2 = [(r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2.")]
TRANSFORMERS = [
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
]


def _transformers(state: Weights) -> tuple[Weights, Weights]:
    """ViT, Dinov2 and Dinov2WithRegisters of transformers, as Phikon, Phikon-v2, Midnight and Hibou are published."""
    parts = (".attention.attention.query.", ".attention.attention.key.", ".attention.attention.value.")
    state = _joined(state, parts, ".attn.qkv.")
    return {_renamed(key, TRANSFORMERS): value for key, value in state.items()}, {}


CLIP_OF_TRANSFORMERS = [
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
]


def _clip_of_transformers(state: Weights) -> tuple[Weights, Weights]:
    """The image tower of transformers' CLIPModel, as PLIP is published."""
    tower = _below(state, "vision_model.")
    tower.pop("embeddings.position_ids", None)
    tower = _joined(tower, (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."), ".attn.qkv.")
    trunk = {_renamed(key, CLIP_OF_TRANSFORMERS): value for key, value in tower.items()}
    return _tokens_of_clip(trunk), {"head.0.weight": state["visual_projection.weight"]}


OPEN_CLIP = [
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def _open_clip(state: Weights) -> tuple[Weights, Weights]:
    """The image tower of an open_clip model, as QuiltNet is published."""
    tower = _below(state, "visual.")
    behind = {"head.0.weight": tower.pop("proj").T}
    return _tokens_of_clip({_renamed(key, OPEN_CLIP): value for key, value in tower.items()}), behind


def _tokens_of_clip(trunk: Weights) -> Weights:
    return trunk | {"cls_token": trunk["cls_token"].view(1, 1, -1), "pos_embed": trunk["pos_embed"][None]}


BEIT3 = [
    (r"^vision_embed\.cls_token$", "cls_token"),
    (r"^vision_embed\.", "patch_embed."),
    (r"^encoder\.embed_positions\.A\.weight$", "pos_embed"),
    (r"^encoder\.layer_norm\.A\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.A\.", "."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.ffn\.ffn_layernorm\.", ".mlp.norm."),
    (r"\.ffn\.", ".mlp."),
    (r"\.self_attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
]


def _beit3(state: Weights) -> tuple[Weights, Weights]:
    """The image half, A, of torchscale's BEiT-3, as MUSK is published; its positions begin at 2."""
    tower = {key: value for key, value in _below(state, "beit3.").items() if ".B." not in key}
    for name in ("text_embed.weight", "vision_embed.mask_token"):
        tower.pop(name, None)
    tower = _joined(tower, (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."), ".attn.qkv.")
    trunk = {_renamed(key, BEIT3): value for key, value in tower.items()}
    return trunk | {"pos_embed": trunk["pos_embed"][None, 2:]}, {}


def _tower_of_timm(state: Weights) -> tuple[Weights, Weights]:
    """A timm trunk in a model of images and text: CONCH's with its pooling for contrast, BiomedCLIP's with a head."""
    if "visual.head.proj.weight" in state:
        behind = {"head.0.weight": state["visual.head.proj.weight"]}
    else:
        behind = _pooler(_below(state, "visual.attn_pool_contrast."), _below(state, "visual.ln_contrast."))
    return _below(state, "visual.trunk."), behind


def _conch_of_titan(state: Weights) -> tuple[Weights, Weights]:
    """CONCH v1.5, whose pooling has no biases, and key and value in one."""
    pool = _below(state, "attn_pool_contrast.")
    key, value = pool.pop("to_kv.weight").chunk(2)
    out = pool.pop("to_out.weight")
    pool |= {"attn.q_proj_weight": pool.pop("to_q.weight"), "attn.k_proj_weight": key, "attn.v_proj_weight": value}
    pool |= {"attn.out_proj.weight": out, "attn.out_proj.bias": out.new_zeros(len(out))}
    pool |= {"attn.in_proj_bias": out.new_zeros(3 * len(out))}
    return _below(state, "trunk."), _pooler(pool, _below(state, "ln_contrast."))


def _pooler(pool: Weights, norm: Weights) -> Weights:
    return {f"pooler.{key}": value for key, value in pool.items()} | {
        f"pooler.norm.{key}": value for key, value in norm.items()
    }


def _keep(state: Weights) -> tuple[Weights, Weights]:
    """KEEP: a timm trunk in which layer scales are called weight, and a head of two layers."""
    trunk = {re.sub(r"\.ls(\d)\.weight$", r".ls\1.gamma", key): v for key, v in _below(state, "visual.").items()}
    return trunk, {f"head.{key}": value for key, value in _below(state, "visual_head.").items()}


LAYOUTS: dict[str, Callable[[Weights], tuple[Weights, Weights]]] = {
    "embeddings.cls_token": _transformers,
    "vision_model.embeddings.class_embedding": _clip_of_transformers,
    "visual.class_embedding": _open_clip,
    "beit3.vision_embed.cls_token": _beit3,
    "visual.trunk.cls_token": _tower_of_timm,
    "trunk.cls_token": _conch_of_titan,
    "visual_head.0.weight": _keep,
}
