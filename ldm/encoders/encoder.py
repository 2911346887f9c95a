"""Tile encoders: a timm trunk, its preprocessing and its pooling, behind one callable.

    encoder = load_encoder("hipt-vits16", device="cuda")       # a published encoder, weights from disk
    encoder = load_encoder("data/models/demo-encoder")         # an encoder folder: encoder.yaml + model.safetensors
    features = encoder(images)                                 # (B,3,H,W) in [-1,1] -> (B,D) float32

Nothing is downloaded. Weights of published encoders (`encoder_registry.py`) are looked for at `weights`, then in
`$HISTOLDM_WEIGHTS/<name>/`, by default `~/.cache/histoldm/weights/<name>/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import SwiGLUPacked, to_2tuple
from timm.models import swin_transformer
from torch import Tensor, nn

from ldm.devices import pick_device
from ldm.encoders.registry import REGISTRY, EncoderSpec, weights_home
from ldm.encoders.timm_networks import make_network
from ldm.errors import UserError, suggest
from ldm.foreign.paths import inside, only_within
from ldm.foreign.settings import read_yaml
from ldm.interop.checkpoint import read_checkpoint, state_dict_of
from ldm.interop.weights import check_finite

# keys of checkpoints that are no part of the trunk: heads of training, masks of iBOT and DINOv2
NOT_TRUNK = re.compile(r"^(head\.|fc\.|fc_norm\.|pre_logits\.|pooler\.|masked_embed$|mask_token$)")
STANDARDISATION = ("feature_mean", "feature_std")


class ConvStem(nn.Module):
    """CTransPath's patch embedding: two strided 3x3 convolutions, a 1x1 and a norm. (B,3,H,W) -> (B,H/4,W/4,C)."""

    def __init__(self, img_size=224, patch_size=4, in_chans=3, embed_dim=96, norm_layer=nn.LayerNorm, **_):
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.grid_size = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size, strict=True))
        widths = [in_chans, embed_dim // 8, embed_dim // 4]
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


LAYERS = {"SwiGLUPacked": SwiGLUPacked, "ConvStem": ConvStem}


class Encoder(nn.Module):
    """A tile encoder. Call it: images (B,3,H,W) float in [-1,1] -> features (B,D) float32. Any H, W: it resizes itself.

    Attributes: spec (an `EncoderSpec`); name, licence, source, dim, tile_size (px), mpp (µm per px or None) of it;
    weights_path: the file its weights came from.
    """

    weights_path: Path | None = None

    def __init__(self, spec: EncoderSpec):
        super().__init__()
        self.spec = spec
        named = {key: LAYERS[value] for key, value in spec.kwargs.items() if isinstance(value, str) and value in LAYERS}
        self.model = make_network(spec.arch, 0, spec.kwargs | named)
        dim = self.model.num_features * {"token": 1, "avg": 1, "token+avg": 2, "grid": spec.grid**2}[spec.pooling]
        if dim != spec.dim:
            raise UserError(f"encoder {spec.name}: {spec.arch} with {spec.pooling} gives {dim} values, not {spec.dim}")
        if spec.standardise:
            self.register_buffer("feature_mean", torch.zeros(dim))
            self.register_buffer("feature_std", torch.ones(dim))

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def licence(self) -> str:
        return self.spec.licence

    @property
    def source(self) -> str:
        return self.spec.source

    @property
    def dim(self) -> int:
        return self.spec.dim

    @property
    def tile_size(self) -> int:
        return self.spec.tile_size

    @property
    def mpp(self) -> float | None:
        return self.spec.mpp

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B,3,H,W), got {tuple(images.shape)}")
        size = (self.spec.input_size, self.spec.input_size)
        if images.shape[-2:] != size:  # bicubic overshoots: stay in the range of images
            images = F.interpolate(images.float(), size, mode=self.spec.interpolation, antialias=True).clamp(-1, 1)
        return self.features(self.normalise((images + 1) / 2))

    def normalise(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0, 1] -> the network's input, same shape."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.spec.mean, self.spec.std))
        return (images - mean) / std

    def features(self, inputs: Tensor) -> Tensor:
        """The network's input (B,3,S,S) -> features (B,D) float32."""
        features = self.pool(self.model.forward_features(inputs)).float()
        return (features - self.feature_mean) / self.feature_std if self.spec.standardise else features

    def pool(self, features: Tensor) -> Tensor:
        """timm's `forward_features`, tokens (B,L,C) or a map (B,C,h,w) or (B,h,w,C) -> (B,D), not standardised."""
        pooling, prefix = self.spec.pooling, getattr(self.model, "num_prefix_tokens", 0)
        if features.ndim == 3:  # (B,L,C): class token, registers, patches
            if pooling == "token":
                return features[:, 0]
            if pooling == "token+avg":
                return torch.cat([features[:, 0], features[:, prefix:].mean(1)], 1)
            side = round((features.shape[1] - prefix) ** 0.5)
            features = rearrange(features[:, prefix:], "b (h w) c -> b c h w", h=side)
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            features = rearrange(features, "b h w c -> b c h w")
        cells = self.spec.grid if pooling == "grid" else 1
        return F.adaptive_avg_pool2d(features, cells).flatten(1)  # (B,C*cells*cells)


def load_encoder(name_or_folder: str | Path, weights: str | Path | None = None, device: str = "cpu") -> Encoder:
    """A tile encoder in eval mode, without gradients for its weights.

    name_or_folder: a name of `REGISTRY`, or an encoder folder (encoder.yaml, model.safetensors).
    weights: a weight file, or a folder that holds it, instead of the usual place.

    Raises UserError: unknown name; weights missing (it says where to get them, their licence and where to put them),
    unreadable, or not of this encoder.

    >>> encoder = load_encoder(models / "demo-encoder")
    >>> encoder(torch.zeros(2, 3, 256, 256)).shape
    torch.Size([2, 512])
    """
    spec, path = find_encoder(name_or_folder, weights)
    encoder = Encoder(spec)
    load_weights(encoder, path)
    encoder.weights_path = path
    return encoder.eval().requires_grad_(False).to(pick_device(str(device)))


def find_encoder(name_or_folder: str | Path, weights: str | Path | None = None) -> tuple[EncoderSpec, Path]:
    """The specification of an encoder and its weight file, which exists.

    >>> spec, path = find_encoder(models / "demo-encoder")
    >>> spec.dim, path.name
    (512, 'model.safetensors')
    """
    name, folder = str(name_or_folder), Path(name_or_folder)
    if name in REGISTRY:
        spec, home = REGISTRY[name], weights_home() / name
    elif folder.is_dir():
        spec, home = _read_spec(folder / "encoder.yaml"), folder
    else:
        raise UserError(f"'{name}' is neither an encoder folder nor the name of an encoder{suggest(name, REGISTRY)}")
    path = home / spec.file if name in REGISTRY else inside(home, spec.file)
    if weights is not None:
        path = Path(weights) / spec.file if Path(weights).is_dir() else Path(weights)
    if not path.is_file():
        raise UserError(
            f"weights of encoder '{spec.name}' are not at {path}. Get {spec.file} from {spec.source} "
            f"(licence: {spec.licence}) and put it there, or say where it is "
            f"(weights=, --weights; $HISTOLDM_WEIGHTS replaces {weights_home()})."
        )
    return spec, path


def _read_spec(path: Path) -> EncoderSpec:
    """The specification in an encoder.yaml. Its keys `training` and `figures` are a record for people."""
    if not path.is_file():
        raise UserError(f"encoder folder {path.parent} has no {path.name}")
    with only_within(path.parent):
        record = read_yaml(path, "the encoder's specification")
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no specification of an encoder")
    known = [entry.name for entry in fields(EncoderSpec)]
    for key in record.keys() - {*known, "training", "figures"}:
        raise UserError(f"{path}: unknown key '{key}'{suggest(key, known)}")
    try:
        return EncoderSpec(**{key: value for key, value in record.items() if key in known})
    except TypeError as error:
        raise UserError(f"{path}: {error}") from error


def load_weights(encoder: Encoder, path: Path) -> None:
    """Load a checkpoint into an encoder: every weight must be there and fit. UserError names those that do not.

    >>> spec, path = find_encoder(models / "demo-encoder")
    >>> encoder = Encoder(spec)
    >>> load_weights(encoder, path)
    >>> bool((encoder.feature_std != 1).all())
    True
    """
    spec = encoder.spec
    state = read_weights(path, spec.checkpoint_key)
    stored = {key: state.pop(key) for key in STANDARDISATION if key in state}
    expected = encoder.model.state_dict()
    state = trunk_weights(state, encoder.model)
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    misfit = [
        f"{k} {tuple(state[k].shape)}, not {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if spec.standardise:
        missing += sorted(set(STANDARDISATION) - stored.keys())
        misfit += [f"{k} {tuple(v.shape)}, not ({spec.dim},)" for k, v in stored.items() if v.shape != (spec.dim,)]
    if missing or unexpected or misfit:
        problems = (("lacks", missing), ("holds unknown", unexpected), ("holds", misfit))
        said = "; ".join(f"{verb} {', '.join(keys[:3])}{_more(keys)}" for verb, keys in problems if keys)
        raise UserError(f"{path} is not the weight file of encoder '{spec.name}' ({spec.arch}): it {said}")
    check_finite(state | stored, path)
    encoder.model.load_state_dict(state)
    if spec.standardise:
        encoder.feature_mean.copy_(stored["feature_mean"])
        encoder.feature_std.copy_(stored["feature_std"])


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 3} more" if len(keys) > 3 else ""


def read_weights(path: Path, key: str = "") -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, those under `key` where it has it.

    >>> torch.save({"teacher": {"weight": torch.zeros(2)}, "epoch": 3}, "dino.pth")
    >>> list(read_weights(Path("dino.pth"), "teacher"))
    ['weight']
    """
    content = read_checkpoint(path)
    inner = content.get(key) if isinstance(content, Mapping) else None  # converted files hold the weights themselves
    return state_dict_of(inner if isinstance(inner, Mapping) else content, path)


def trunk_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint's tensors under timm's names: prefixes of wrappers and training heads are dropped.

    >>> state = {"module.backbone.norm.bias": torch.zeros(1), "module.head.bias": torch.zeros(1)}
    >>> trunk_weights(state, nn.Identity())
    {'norm.bias': tensor([0.])}
    """
    while state and any(key.startswith(("module.", "backbone.", "model.")) for key in state):
        state = {re.sub(r"^(module|backbone|model)\.", "", key): value for key, value in state.items()}
    if "embeddings.cls_token" in state:
        state = _from_transformers(state)
    if isinstance(model, swin_transformer.SwinTransformer):  # old Swin files keep `downsample` one stage earlier
        state = swin_transformer.checkpoint_filter_fn(state, model)
    return {key: value for key, value in state.items() if not NOT_TRUNK.match(key)}


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a transformers `ViTModel` -> names of timm's VisionTransformer (query, key and value become one qkv)."""
    names = [
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^layernorm\.", "norm."),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(?<!attention)\.output\.dense\.", ".mlp.fc2."),
    ]
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attention.attention." in key:
            continue
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for key in [key for key in state if ".attention.attention.query." in key]:
        parts = [state[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
        name = re.sub(r"^encoder\.layer\.(\d+)\.attention\.attention\.query\.", r"blocks.\1.attn.qkv.", key)
        renamed[name] = torch.cat(parts)
    return renamed
